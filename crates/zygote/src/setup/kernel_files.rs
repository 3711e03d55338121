//! `/proc` and `/sys` as a sandbox sees them: its own processes and network,
//! nothing that tells of or changes the host.

use super::attach::{
    Depth, add_flags, attach, copy_open_tree, copy_tree, empty_directory, make_dir,
    new_file_system, open_in,
};
use crate::step::{Failed, Step};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Hidden below `/proc`: the container engines' well-known list.
const PROC_HIDDEN: [&str; 12] = [
    "acpi",
    "asound",
    "interrupts",
    "kcore",
    "keys",
    "kmsg",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
    "vmallocinfo",
];

/// Read-only below `/proc`.
const PROC_READ_ONLY: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];

/// Hidden below `/sys`.
const SYS_HIDDEN: [&str; 5] = [
    "firmware",
    "devices/virtual/powercap",
    "kernel/debug",
    "kernel/tracing",
    "fs/selinux",
];

fn harmless() -> MountAttrFlags {
    MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
}

/// What hides things.
struct Cover {
    directory: OwnedFd,
    file: OwnedFd,
}

impl Cover {
    fn make() -> Result<Self, Failed> {
        let null = Path::new("/dev/null");
        Ok(Self {
            directory: empty_directory()?,
            file: copy_tree(null, Depth::One).step("copying", null)?,
        })
    }

    /// Covers a path below a mounted tree, if it exists there.
    fn hide(&self, tree: BorrowedFd<'_>, name: &str) -> Result<(), Failed> {
        let target = match open_in(tree, Path::new(name), OFlags::PATH) {
            Err(Errno::NOENT) => return Ok(()),
            result => result.step("opening", name)?,
        };
        let kind = rustix::fs::fstat(&target).step("looking at", name)?.st_mode;
        let cover = match FileType::from_raw_mode(kind) {
            FileType::Directory => &self.directory,
            _ => &self.file,
        };
        copy_open_tree(cover.as_fd(), Depth::One)
            .and_then(|copy| attach(copy.as_fd(), target.as_fd()))
            .step("hiding", name)
    }
}

/// Mounts both below a root.
pub(super) fn mount(root: BorrowedFd<'_>) -> Result<(), Failed> {
    let cover = Cover::make()?;
    let path = Path::new("/proc");
    let proc = new_proc().step("mounting", path)?;
    attach(proc.as_fd(), make_dir(root, path)?.0.as_fd()).step("mounting", path)?;
    for name in PROC_HIDDEN {
        cover.hide(proc.as_fd(), name)?;
    }
    for name in PROC_READ_ONLY {
        make_read_only(proc.as_fd(), name)?;
    }
    let path = Path::new("/sys");
    let sys = match new_file_system("sysfs", &[], harmless() | MountAttrFlags::MOUNT_ATTR_RDONLY) {
        Ok(sys) => sys,
        // The kernel shows sysfs only to the owner of the network namespace:
        // not to a user namespace that shares the host's network.
        Err(Errno::PERM) => {
            return attach(empty_directory()?.as_fd(), make_dir(root, path)?.0.as_fd())
                .step("mounting", path);
        }
        Err(error) => return Err(error).step("mounting", path),
    };
    attach(sys.as_fd(), make_dir(root, path)?.0.as_fd()).step("mounting", path)?;
    for name in SYS_HIDDEN {
        cover.hide(sys.as_fd(), name)?;
    }
    Ok(())
}

/// A `/proc` of the calling process's PID namespace.
pub(crate) fn new_proc() -> Result<OwnedFd, Errno> {
    new_file_system("proc", &[], harmless())
}

fn make_read_only(tree: BorrowedFd<'_>, name: &str) -> Result<(), Failed> {
    let target = match open_in(tree, Path::new(name), OFlags::PATH) {
        Err(Errno::NOENT) => return Ok(()),
        result => result.step("opening", name)?,
    };
    let copy = copy_open_tree(target.as_fd(), Depth::One).step("copying", name)?;
    add_flags(copy.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, Depth::One)
        .and_then(|()| attach(copy.as_fd(), target.as_fd()))
        .step("making read-only", name)
}
