//! Trees as a hostile sandbox would leave them.

use super::{CopyOptions, clear_directory, copy_tree, remove_tree, tree_size};
use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags};
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

/// A chain of directories far longer than any path can be.
fn dig(root: &Path, depth: usize) {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let mut here = rustix::fs::openat(CWD, root, flags, Mode::empty()).unwrap();
    for _ in 0..depth {
        rustix::fs::mkdirat(&here, c"deeper", Mode::RWXU).unwrap();
        here = rustix::fs::openat(&here, c"deeper", flags, Mode::empty()).unwrap();
    }
    rustix::fs::openat(
        &here,
        c"bottom",
        OFlags::CREATE | OFlags::WRONLY,
        Mode::RUSR,
    )
    .unwrap();
}

#[test]
fn a_tree_deeper_than_any_path_is_measured_copied_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    dig(&from, 3000);
    let size = tree_size(&from).unwrap();
    assert_eq!(size.entries, 3002);
    copy_tree(&from, &to, CopyOptions::default()).unwrap();
    assert_eq!(tree_size(&to).unwrap().entries, 3002);
    remove_tree(&from).unwrap();
    remove_tree(&to).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn links_out_of_the_tree_are_removed_and_copied_as_links() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "kept").unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    symlink(&outside, tree.join("way-out")).unwrap();
    symlink("../outside/precious", tree.join("file-out")).unwrap();
    let copy = dir.path().join("copy");
    copy_tree(&tree, &copy, CopyOptions::default()).unwrap();
    assert_eq!(fs::read_link(copy.join("way-out")).unwrap(), outside);
    remove_tree(&tree).unwrap();
    clear_directory(&copy).unwrap();
    assert_eq!(fs::read_dir(&copy).unwrap().count(), 0);
    // The tree itself given as a link: only the link goes.
    symlink(&outside, &tree).unwrap();
    assert!(tree_size(&tree).is_err());
    remove_tree(&tree).unwrap();
    assert_eq!(
        fs::read_to_string(outside.join("precious")).unwrap(),
        "kept"
    );
    remove_tree(&dir.path().join("never-was")).unwrap();
}

#[test]
fn a_copy_keeps_modes_times_links_holes_and_special_files() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(from.join("d")).unwrap();
    fs::write(from.join("d/tool"), "#!").unwrap();
    fs::set_permissions(from.join("d/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(from.join("d/tool"), from.join("same")).unwrap();
    let mut sparse = fs::File::create(from.join("sparse")).unwrap();
    sparse.write_all(b"start").unwrap();
    sparse.seek(SeekFrom::Start(64 << 20)).unwrap();
    sparse.write_all(b"end").unwrap();
    sparse.set_len(80 << 20).unwrap();
    let mknod = |name: &str, kind| {
        rustix::fs::mknodat(CWD, from.join(name), kind, Mode::from(0o620), 0).unwrap();
    };
    mknod("pipe", FileType::Fifo);
    fs::set_permissions(from.join("pipe"), fs::Permissions::from_mode(0o622)).unwrap();
    mknod("whiteout", FileType::CharacterDevice);
    mknod("socket", FileType::Socket);
    rustix::fs::setxattr(
        from.join("d"),
        c"user.overlay.opaque",
        b"y",
        XattrFlags::empty(),
    )
    .unwrap();
    rustix::fs::setxattr(
        from.join("d"),
        c"user.overlay.origin",
        b"x",
        XattrFlags::empty(),
    )
    .unwrap();
    rustix::fs::setxattr(from.join("same"), c"user.note", b"n", XattrFlags::empty()).unwrap();
    let old = fs::FileTimes::new()
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 7));
    for name in ["same", "d"] {
        fs::File::open(from.join(name))
            .unwrap()
            .set_times(old)
            .unwrap();
    }

    copy_tree(&from, &to, CopyOptions::default()).unwrap();

    let meta = |name: &str| to.join(name).symlink_metadata().unwrap();
    assert_eq!(meta("same").mode() & 0o7777, 0o4755);
    assert_eq!(meta("same").ino(), meta("d/tool").ino());
    assert_eq!(meta("same").nlink(), 2);
    assert_eq!((meta("d").mtime(), meta("d").mtime_nsec()), (1_000_000, 7));
    assert_eq!(
        (meta("same").mtime(), meta("same").mtime_nsec()),
        (1_000_000, 7)
    );
    assert_eq!(meta("sparse").len(), 80 << 20);
    assert!(meta("sparse").blocks() * 512 < 1 << 20, "holes were filled");
    let mut copy = fs::File::open(to.join("sparse")).unwrap();
    copy.seek(SeekFrom::Start(64 << 20)).unwrap();
    let mut end = [0; 4];
    copy.read_exact(&mut end).unwrap();
    assert_eq!(&end, b"end\0");
    assert!(meta("pipe").file_type().is_fifo());
    assert_eq!(meta("pipe").mode() & 0o777, 0o622);
    assert!(meta("whiteout").file_type().is_char_device());
    assert_eq!(meta("whiteout").rdev(), 0);
    assert!(meta("socket").file_type().is_socket());
    let xattr = |name: &str, key: &std::ffi::CStr| {
        let mut value = [0_u8; 8];
        rustix::fs::getxattr(to.join(name), key, &mut value)
            .map(|n| value[..n].to_vec())
            .ok()
    };
    assert_eq!(
        xattr("d", c"user.overlay.opaque").as_deref(),
        Some(&b"y"[..])
    );
    assert_eq!(xattr("d", c"user.overlay.origin"), None);
    assert_eq!(xattr("d/tool", c"user.note").as_deref(), Some(&b"n"[..]));
    assert!(!dir.path().join("to.links").exists());
}

#[test]
fn hard_links_count_once_and_holes_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let empty = tree_size(&tree).unwrap().bytes;
    fs::write(tree.join("a"), vec![1; 1 << 20]).unwrap();
    fs::hard_link(tree.join("a"), tree.join("b")).unwrap();
    fs::File::create(tree.join("hole"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let size = tree_size(&tree).unwrap();
    assert_eq!(size.entries, 4);
    assert!(
        (1 << 20..2 << 20).contains(&(size.bytes - empty)),
        "{size:?}"
    );
}

#[test]
fn what_is_mounted_inside_survives_the_removal_around_it() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let precious = dir.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "kept").unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("forgotten")).unwrap();
    rustix::mount::mount_bind(&precious, tree.join("forgotten")).unwrap();
    let removed = remove_tree(&tree);
    let copied = copy_tree(&tree, &dir.path().join("copy"), CopyOptions::default());
    rustix::mount::unmount(tree.join("forgotten"), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(removed.is_err());
    copied.unwrap();
    assert!(!dir.path().join("copy/forgotten/file").exists());
    assert_eq!(fs::read_to_string(precious.join("file")).unwrap(), "kept");
    remove_tree(&tree).unwrap();
    assert!(!tree.exists());
}

#[test]
fn a_copy_ends_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("a"), "a").unwrap();
    let stop = std::sync::atomic::AtomicBool::new(true);
    let options = CopyOptions { stop: Some(&stop) };
    let error = copy_tree(&from, &dir.path().join("to"), options).unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::EINTR), "{error}");
}
