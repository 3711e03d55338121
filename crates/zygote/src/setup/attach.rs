//! Placing files, directories and mounts below a root that may be hostile: an
//! image's symbolic links never lead out of it.

use crate::step::{Failed, Step, check};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Opens a path as a process with its root there would, whatever links it
/// holds.
pub(super) fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        root,
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Whether [`make_dir`] had to make the last component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    Now,
    Before,
}

/// Links followed on the way to a directory to be made, at most.
const MAX_LINKS: u32 = 40;

/// Opens a directory below a root, making what is missing of it, also where
/// links lead to what is missing.
pub(super) fn make_dir(root: BorrowedFd<'_>, path: &Path) -> Result<(OwnedFd, Made), Failed> {
    make_dir_through(root, &normal(path), MAX_LINKS)
}

fn make_dir_through(
    root: BorrowedFd<'_>,
    path: &Path,
    links: u32,
) -> Result<(OwnedFd, Made), Failed> {
    let open = || open_in(root, path, OFlags::PATH | OFlags::DIRECTORY);
    match open() {
        Ok(dir) => return Ok((dir, Made::Before)),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error).step("opening in the image", path),
    }
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NOENT).step("opening in the image", path);
    };
    let (parent, _) = make_dir_through(root, &normal(above), links)?;
    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => {
            let dir = open().step("opening in the image", path)?;
            Ok((dir, Made::Now))
        }
        // A link to what is missing.
        Err(Errno::EXIST) if links > 0 => {
            let target = rustix::fs::readlinkat(&parent, name, Vec::new())
                .step("following in the image", path)?;
            let target = Path::new(OsStr::from_bytes(target.to_bytes()));
            make_dir_through(root, &normal(&above.join(target)), links - 1)
        }
        Err(Errno::EXIST) => Err(Errno::LOOP).step("following in the image", path),
        Err(error) => Err(error).step("making directory in the image", path),
    }
}

/// A path without `.` and `..`, never empty, and never above the root.
fn normal(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if plain.as_os_str().is_empty() {
        plain.push(".");
    }
    plain
}

/// Opens a file below a root to be mounted over, making it if it is missing.
pub(super) fn make_mount_point(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Failed> {
    match open_in(root, path, OFlags::PATH) {
        Ok(file) => return Ok(file),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error).step("opening in the image", path),
    }
    let (parent, name) = parent_in(root, path)?;
    rustix::fs::openat(
        &parent,
        name,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o644),
    )
    .step("making file in the image", path)?;
    open_in(root, path, OFlags::PATH).step("opening in the image", path)
}

/// Writes a file below a root in place of whatever has its name.
pub(super) fn write_file(root: BorrowedFd<'_>, path: &Path, text: &str) -> Result<(), Failed> {
    let (parent, name) = parent_in(root, path)?;
    let open = || {
        rustix::fs::openat(
            &parent,
            name,
            OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        )
    };
    let file = match open() {
        Err(Errno::LOOP | Errno::NXIO) => {
            rustix::fs::unlinkat(&parent, name, AtFlags::empty())
                .step("replacing in the image", path)?;
            open()
        }
        result => result,
    };
    File::from(file.step("writing in the image", path)?)
        .write_all(text.as_bytes())
        .step("writing in the image", path)
}

fn parent_in<'a>(
    root: BorrowedFd<'_>,
    path: &'a Path,
) -> Result<(OwnedFd, &'a std::ffi::OsStr), Failed> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((make_dir(root, parent)?.0, name)),
        _ => Err(Errno::INVAL).step("placing in the image", path),
    }
}

/// Whether a copy of a mount takes along what is mounted below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    One,
    All,
}

/// A detached copy of a mounted tree, by path.
pub(super) fn copy_tree(source: &Path, depth: Depth) -> Result<OwnedFd, Errno> {
    open_tree(CWD, source, copy_flags(depth))
}

/// A detached copy of a mounted tree, by descriptor.
pub(super) fn copy_open_tree(source: BorrowedFd<'_>, depth: Depth) -> Result<OwnedFd, Errno> {
    open_tree(source, "", copy_flags(depth) | OpenTreeFlags::AT_EMPTY_PATH)
}

fn copy_flags(depth: Depth) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match depth {
        Depth::One => flags,
        Depth::All => flags | OpenTreeFlags::AT_RECURSIVE,
    }
}

/// Adds flags to a mount, or with [`Depth::All`] to all below it too.
pub(super) fn add_flags(
    mount: BorrowedFd<'_>,
    flags: MountAttrFlags,
    depth: Depth,
) -> Result<(), Errno> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attr = MountAttr {
        set: flags.bits().into(),
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    let mut at = libc::AT_EMPTY_PATH;
    if depth == Depth::All {
        at |= libc::AT_RECURSIVE;
    }
    // SAFETY: the structure has the kernel's layout and size and lives through
    // the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            at,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
    .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

/// Mounts a detached tree on what is open.
pub(super) fn attach(tree: BorrowedFd<'_>, on: BorrowedFd<'_>) -> Result<(), Errno> {
    move_mount(
        tree,
        "",
        on,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// A new file system, not attached anywhere yet.
pub(super) fn new_file_system(
    kind: &str,
    options: &[(&str, &str)],
    flags: MountAttrFlags,
) -> Result<OwnedFd, Errno> {
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(fs.as_fd(), *key, *value)?;
    }
    fsconfig_create(fs.as_fd())?;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// An empty read-only directory.
pub(super) fn empty_directory() -> Result<OwnedFd, Failed> {
    new_file_system(
        "tmpfs",
        &[("size", "4k"), ("nr_inodes", "2"), ("mode", "555")],
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
    .step("mounting", "an empty directory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn directory() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("skyrl-attach-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("root")).unwrap();
        dir
    }

    #[test]
    fn what_links_lead_to_is_made_inside_of_the_root() {
        let dir = directory();
        let root = dir.join("root");
        symlink(dir.join("outside"), root.join("absolute")).unwrap();
        symlink("../../../up", root.join("relative")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let open = File::open(&root).unwrap();
        for path in ["/absolute/a", "relative/b", "/c/../d/./e"] {
            let (_, made) = make_dir(open.as_fd(), Path::new(path)).unwrap();
            assert_eq!(made, Made::Now, "{path}");
            let (_, made) = make_dir(open.as_fd(), Path::new(path)).unwrap();
            assert_eq!(made, Made::Before, "{path}");
        }
        write_file(open.as_fd(), Path::new("/absolute/f/file"), "text").unwrap();
        assert!(root.join("up/b").is_dir());
        assert!(root.join("d/e").is_dir());
        assert!(!dir.join("outside").exists() && !dir.join("up").exists());
        let error = make_dir(open.as_fd(), Path::new("/loop/x")).unwrap_err();
        assert_eq!(error.0.errno, libc::ELOOP);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
