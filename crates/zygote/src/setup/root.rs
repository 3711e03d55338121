//! The sandbox's file system, from the host's mounts to a root of its own.

use super::attach::{
    Depth, Made, add_flags, attach, copy_tree, make_dir, make_mount_point, write_file,
};
use super::{dev, kernel_files};
use crate::overlay::Overlay;
use crate::step::{Failed, Step};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{Gid, Uid};
use skyrl_protocol::zygote::{BindPlan, LaunchPlan, RootPlan, StartPlan};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Builds the root and moves into it, leaving the host's behind.
pub(super) fn build(plan: &StartPlan) -> Result<(), Failed> {
    detach_from_host()?;
    let root = mount_root(&plan.root)?;
    let at = root.as_fd();
    for file in &plan.files {
        match write_file(at, &file.path, &file.text) {
            // An image whose files belong to somebody the sandbox has no
            // number for keeps its own.
            Err(failed) if foreign(&failed) => {}
            result => result?,
        }
    }
    kernel_files::mount(at)?;
    dev::mount(at, plan)?;
    provide_tmp(at, plan)?;
    for bind in &plan.binds {
        mount_bind(at, bind)?;
    }
    let workdir = Path::new(&plan.workdir);
    make_workdir(at, workdir, (plan.uid, plan.gid))?;
    if plan.read_only_root {
        add_flags(at, MountAttrFlags::MOUNT_ATTR_RDONLY, Depth::One)
            .step("making read-only", "the root")?;
    }
    pivot(at)?;
    rustix::process::chdir(workdir).step("changing to", workdir)
}

/// Builds the root where a container runtime finds it; the runtime adds the
/// kernel's file systems and moves into it.
pub(super) fn build_for_runtime(plan: &LaunchPlan) -> Result<(), Failed> {
    detach_from_host()?;
    let root = mount_root(&plan.root)?;
    let at = root.as_fd();
    for file in &plan.files {
        match write_file(at, &file.path, &file.text) {
            // An image whose files belong to somebody the sandbox has no
            // number for keeps its own.
            Err(failed) if foreign(&failed) => {}
            result => result?,
        }
    }
    open_tmp(at)?;
    for bind in &plan.binds {
        mount_bind(at, bind)?;
    }
    make_workdir(at, Path::new(&plan.workdir), (plan.uid, plan.gid))
}

/// Mounts made from here on stay here.
fn detach_from_host() -> Result<(), Failed> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .step("detaching from the mounts of", Path::new("/"))?;
    // Modes of what is made are meant as they are written.
    rustix::process::umask(Mode::empty());
    Ok(())
}

fn make_workdir(
    root: BorrowedFd<'_>,
    workdir: &Path,
    (uid, gid): (u32, u32),
) -> Result<(), Failed> {
    let (dir, made) = make_dir(root, workdir)?;
    if made == Made::Now {
        rustix::fs::chownat(
            &dir,
            "",
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::EMPTY_PATH,
        )
        .step("giving away", workdir)?;
    }
    Ok(())
}

fn foreign(failed: &Failed) -> bool {
    matches!(failed.0.errno, libc::EACCES | libc::EPERM | libc::EOVERFLOW)
}

fn mount_root(plan: &RootPlan) -> Result<OwnedFd, Failed> {
    let path = match plan {
        RootPlan::Overlay {
            lowers,
            upper,
            work,
            merged,
            user_xattr,
        } => {
            Overlay {
                lowers,
                upper,
                work,
                user_xattr: *user_xattr,
            }
            .mount_on(merged)?;
            merged
        }
        RootPlan::Directory { path } => {
            let copy = copy_tree(path, Depth::All).step("copying the mount of", path)?;
            add_flags(copy.as_fd(), MountAttrFlags::MOUNT_ATTR_NODEV, Depth::All)
                .step("making devices unusable in", path)?;
            let on = open_directory(path)?;
            attach(copy.as_fd(), on.as_fd()).step("mounting", path)?;
            path
        }
    };
    // Opened anew: now the path leads to what was mounted on it.
    open_directory(path)
}

fn open_directory(path: &Path) -> Result<OwnedFd, Failed> {
    rustix::fs::openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step("opening", path)
}

/// Opens a file of the host so that whoever gets hold of the descriptor can't
/// open it again for writing, and learns nothing of where it is: through a
/// read-only mount of nothing but that file, which is attached nowhere.
pub(super) fn open_read_only(path: &Path) -> Result<OwnedFd, Failed> {
    let copy = copy_tree(path, Depth::One).step("opening", path)?;
    add_flags(copy.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, Depth::One)
        .step("protecting", path)?;
    rustix::fs::open(
        name_of(&copy),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step("opening", path)
}

/// A path that leads to what is open.
fn name_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// `/tmp` exists and can be written to, whatever the image has.
fn provide_tmp(root: BorrowedFd<'_>, plan: &StartPlan) -> Result<(), Failed> {
    let path = Path::new("/tmp");
    let tmp = open_tmp(root)?;
    if plan.read_only_root {
        let memory =
            dev::scratch(plan.shm_bytes, MountAttrFlags::empty()).step("mounting", path)?;
        return attach(memory.as_fd(), tmp.as_fd()).step("mounting", path);
    }
    Ok(())
}

/// Opens `/tmp`; a new one is everybody's.
fn open_tmp(root: BorrowedFd<'_>) -> Result<OwnedFd, Failed> {
    let path = Path::new("/tmp");
    let (tmp, made) = make_dir(root, path)?;
    if made == Made::Now {
        // An O_PATH descriptor can't be changed; its name can.
        rustix::fs::chmod(name_of(&tmp), Mode::from_raw_mode(0o1777))
            .step("opening to everybody", path)?;
    }
    Ok(tmp)
}

fn mount_bind(root: BorrowedFd<'_>, bind: &BindPlan) -> Result<(), Failed> {
    let source = copy_tree(&bind.source, Depth::All).step("binding", &bind.source)?;
    let mut flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    if bind.read_only {
        flags |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    add_flags(source.as_fd(), flags, Depth::All).step("restricting", &bind.source)?;
    let kind = rustix::fs::fstat(&source)
        .step("looking at", &bind.source)?
        .st_mode;
    let target = match FileType::from_raw_mode(kind) {
        FileType::Directory => make_dir(root, &bind.target)?.0,
        _ => make_mount_point(root, &bind.target)?,
    };
    attach(source.as_fd(), target.as_fd()).step("binding on", &bind.target)
}

/// Makes a mounted directory the root and lets go of all that was there
/// before.
fn pivot(root: BorrowedFd<'_>) -> Result<(), Failed> {
    rustix::process::fchdir(root).step("entering", "the new root")?;
    // The old root ends up mounted over the new one, at the very place the
    // current directory is, so that no directory is needed to hold it.
    rustix::process::pivot_root(".", ".").step("changing to", "the new root")?;
    unmount(".", UnmountFlags::DETACH).step("letting go of", "the host's root")?;
    rustix::process::chdir("/").step("entering", "the new root")
}
