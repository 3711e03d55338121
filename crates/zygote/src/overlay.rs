//! Mounting overlayfs, with as many layers as it takes and whatever their
//! paths look like.
//!
//! Layers are named by open descriptors (`/proc/self/fd/N`): short, free of
//! characters that would need escaping, and showing nothing of the host's
//! paths in the sandbox's `/proc/self/mountinfo`.

use crate::step::{Failed, Step};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, move_mount,
};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// An overlay to be mounted. Device nodes in it can't be opened.
#[derive(Debug, Clone, Copy)]
pub struct Overlay<'a> {
    /// Read-only layers, topmost first.
    pub lowers: &'a [PathBuf],
    /// Writable layer.
    pub upper: &'a Path,
    /// Scratch directory on the file system of `upper`, used by no other
    /// mount.
    pub work: &'a Path,
    /// Keep overlay's marks in `user.*` attributes: the only ones a user
    /// namespace may write.
    pub user_xattr: bool,
}

/// Upper directories must stay usable as layers elsewhere.
const PORTABLE: [(&str, &str); 3] = [
    ("index", "off"),
    ("metacopy", "off"),
    ("redirect_dir", "nofollow"),
];

/// Whether an older kernel refused an option that newer ones know.
fn unknown_option(error: Errno) -> bool {
    error == Errno::INVAL
}

impl Overlay<'_> {
    /// Mounts it on an existing directory.
    ///
    /// # Errors
    /// The step that failed, e.g. because a layer is missing.
    pub fn mount_on(&self, target: &Path) -> Result<(), Failed> {
        let lowers = self
            .lowers
            .iter()
            .map(|path| Layer::open(path))
            .collect::<Result<Vec<_>, _>>()?;
        let upper = Layer::open(self.upper)?;
        let work = Layer::open(self.work)?;
        match self.mount_by_file_descriptor(&lowers, &upper, &work) {
            Ok(mounted) => move_mount(
                &mounted,
                "",
                CWD,
                target,
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )
            .step("attaching the overlay to", target),
            // Before 6.7 layers can only be given as one string, which
            // fsconfig cuts at 256 bytes; mount(2) takes 4096.
            Err(error) if unknown_option(error) => self
                .mount_by_options(&lowers, &upper, &work, target)
                .step("mounting an overlay on", target),
            Err(error) => Err(error).step("mounting an overlay for", target),
        }
    }

    fn mount_by_file_descriptor(
        &self,
        lowers: &[Layer],
        upper: &Layer,
        work: &Layer,
    ) -> Result<OwnedFd, Errno> {
        let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let fs = fs.as_fd();
        for lower in lowers {
            fsconfig_set_string(fs, "lowerdir+", &lower.name)?;
        }
        fsconfig_set_string(fs, "upperdir", &upper.name)?;
        fsconfig_set_string(fs, "workdir", &work.name)?;
        for (key, value) in PORTABLE {
            fsconfig_set_string(fs, key, value)?;
        }
        // A sandbox's files need not survive a crash of the machine: without
        // syncs, package managers and databases inside are many times faster,
        // and unmounting does not wait for the disk.
        fsconfig_set_flag(fs, "volatile")?;
        if self.user_xattr {
            fsconfig_set_flag(fs, "userxattr")?;
        }
        fsconfig_create(fs)?;
        fsmount(
            fs,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_NODEV,
        )
    }

    fn mount_by_options(
        &self,
        lowers: &[Layer],
        upper: &Layer,
        work: &Layer,
        target: &Path,
    ) -> Result<(), Errno> {
        let lowers: Vec<&str> = lowers.iter().map(|l| l.name.as_str()).collect();
        let mut options = format!(
            "lowerdir={},upperdir={},workdir={},volatile",
            lowers.join(":"),
            upper.name,
            work.name
        );
        for (key, value) in PORTABLE {
            options.push_str(&format!(",{key}={value}"));
        }
        if self.user_xattr {
            options.push_str(",userxattr");
        }
        if options.len() >= 4096 {
            return Err(Errno::TOOBIG);
        }
        let options = CString::new(options).map_err(|_| Errno::INVAL)?;
        mount(
            "overlay",
            target,
            "overlay",
            MountFlags::NODEV,
            options.as_c_str(),
        )
    }
}

/// A directory held open under a short name.
struct Layer {
    name: String,
    /// Keeps `name` valid.
    _open: OwnedFd,
}

impl Layer {
    fn open(path: &Path) -> Result<Self, Failed> {
        let open = rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step("opening layer", path)?;
        Ok(Self {
            name: format!("/proc/self/fd/{}", open.as_raw_fd()),
            _open: open,
        })
    }
}
