//! Trees whose permissions are meant to keep others out, as their owner and as
//! root sees them.

use crate::support::{as_root_and_plain_user, is_root, temp};
use skyrl_sandbox::tree::{CopyOptions, copy_tree, remove_tree, tree_size};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

fn set(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().mode() & 0o7777
}

/// Directories nobody may read, enter or write, with files nobody may read.
fn closed(root: &Path) {
    fs::create_dir_all(root.join("closed/inner/innermost")).unwrap();
    fs::write(root.join("closed/inner/file"), vec![1; 10_000]).unwrap();
    fs::create_dir(root.join("read-only")).unwrap();
    fs::write(root.join("read-only/file"), "x").unwrap();
    set(&root.join("closed/inner/file"), 0);
    set(&root.join("closed/inner/innermost"), 0);
    set(&root.join("closed/inner"), 0o100);
    set(&root.join("closed"), 0);
    set(&root.join("read-only"), 0o555);
    set(root, 0o400);
}

#[test]
fn closed_directories_are_measured_copied_and_removed_and_stay_closed() {
    as_root_and_plain_user(
        "trees::closed_directories_are_measured_copied_and_removed_and_stay_closed",
        || {
            let dir = temp();
            let (from, to) = (dir.path().join("from"), dir.path().join("to"));
            fs::create_dir(&from).unwrap();
            closed(&from);
            let size = tree_size(&from).unwrap();
            assert_eq!(size.entries, 7);
            assert!(size.bytes >= 10_000);
            copy_tree(&from, &to, CopyOptions::default()).unwrap();
            for tree in [&from, &to] {
                assert_eq!(mode(tree), 0o400);
                assert_eq!(tree_size(tree).unwrap().entries, 7);
                // To look, the modes have to be lent here too.
                set(tree, 0o700);
                assert_eq!(mode(&tree.join("closed")), 0);
                assert_eq!(mode(&tree.join("read-only")), 0o555);
                set(&tree.join("closed"), 0o700);
                assert_eq!(mode(&tree.join("closed/inner")), 0o100);
                set(&tree.join("closed/inner"), 0o700);
                assert_eq!(mode(&tree.join("closed/inner/file")), 0);
                assert_eq!(mode(&tree.join("closed/inner/innermost")), 0);
                set(&tree.join("closed/inner"), 0);
                set(&tree.join("closed"), 0);
                set(tree, 0);
                remove_tree(tree).unwrap();
                assert!(!tree.exists());
            }
        },
    );
}

#[test]
fn what_belongs_to_others_is_kept_with_its_owner_by_root() {
    if !is_root() {
        return;
    }
    let dir = temp();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("program"), "#!").unwrap();
    std::os::unix::fs::symlink("program", from.join("link")).unwrap();
    for name in ["program", "link"] {
        std::os::unix::fs::lchown(from.join(name), Some(1234), Some(5678)).unwrap();
    }
    set(&from.join("program"), 0o6755);
    let capability: Vec<u8> = [0x0100_0002_u32.swap_bytes(), 1 << 13, 0, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let set_capability = rustix::fs::setxattr(
        from.join("program"),
        c"security.capability",
        &capability,
        rustix::fs::XattrFlags::empty(),
    );
    set_capability.unwrap();
    copy_tree(&from, &to, CopyOptions::default()).unwrap();
    for name in ["program", "link"] {
        let meta = to.join(name).symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 5678));
    }
    assert_eq!(mode(&to.join("program")), 0o6755);
    let mut kept = [0; 32];
    let length =
        rustix::fs::getxattr(to.join("program"), c"security.capability", &mut kept).unwrap();
    assert_eq!(&kept[..length], capability);
}
