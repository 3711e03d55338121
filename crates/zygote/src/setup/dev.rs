//! `/dev` as a sandbox sees it: the harmless devices, terminals of its own,
//! shared memory of its own.

use super::attach::{Depth, attach, copy_tree, make_dir, make_mount_point, new_file_system};
use crate::step::{Failed, Step};
use rustix::fs::{FileType, Mode, makedev, mknodat, symlinkat};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use skyrl_protocol::zygote::{StartPlan, UserNamespacePlan};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Name and number of the devices every program may expect.
const DEVICES: [(&str, (u32, u32)); 6] = [
    ("null", (1, 3)),
    ("zero", (1, 5)),
    ("full", (1, 7)),
    ("random", (1, 8)),
    ("urandom", (1, 9)),
    ("tty", (5, 0)),
];

const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Group `tty` in every distribution.
const TTY_GROUP: &str = "5";

/// Mounts it below a root.
pub(super) fn mount(root: BorrowedFd<'_>, plan: &StartPlan) -> Result<(), Failed> {
    let path = Path::new("/dev");
    let dev = new_file_system(
        "tmpfs",
        &[("mode", "755"), ("size", "1m"), ("nr_inodes", "1024")],
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
    .step("mounting", path)?;
    attach(dev.as_fd(), make_dir(root, path)?.0.as_fd()).step("mounting", path)?;
    let dev = dev.as_fd();
    for (name, number) in DEVICES {
        make_device(dev, name, number)?;
    }
    for (name, target) in LINKS {
        symlinkat(target, dev, name).step("linking in /dev", name)?;
    }
    let mut terminals = vec![("ptmxmode", "0666"), ("mode", "0620")];
    if plan.user_namespace == UserNamespacePlan::Host {
        terminals.push(("gid", TTY_GROUP));
    }
    let pts = new_file_system(
        "devpts",
        &terminals,
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
    .step("mounting", "/dev/pts")?;
    attach(pts.as_fd(), make_dir(dev, Path::new("pts"))?.0.as_fd()).step("mounting", "/dev/pts")?;
    let shm =
        scratch(plan.shm_bytes, MountAttrFlags::MOUNT_ATTR_NOEXEC).step("mounting", "/dev/shm")?;
    attach(shm.as_fd(), make_dir(dev, Path::new("shm"))?.0.as_fd()).step("mounting", "/dev/shm")
}

/// Memory as a directory that everybody may write to.
pub(super) fn scratch(bytes: u64, extra: MountAttrFlags) -> Result<OwnedFd, Errno> {
    new_file_system(
        "tmpfs",
        &[("mode", "1777"), ("size", &bytes.to_string())],
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | extra,
    )
}

/// Makes a device, or borrows the host's where making one is not permitted.
fn make_device(dev: BorrowedFd<'_>, name: &str, (major, minor): (u32, u32)) -> Result<(), Failed> {
    match mknodat(
        dev,
        name,
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        makedev(major, minor),
    ) {
        Err(Errno::PERM) => {}
        result => return result.step("making device", name),
    }
    let host = Path::new("/dev").join(name);
    let device = copy_tree(&host, Depth::One).step("copying", &host)?;
    let target = make_mount_point(dev, Path::new(name))?;
    attach(device.as_fd(), target.as_fd()).step("mounting", &host)
}
