//! Single steps from an open directory to a name in it. Nothing here follows
//! a symbolic link or crosses a mount point.

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Opens one name below a directory, refusing links and mount points.
fn open_beneath(dir: impl AsFd, name: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let dir = dir.as_fd();
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let opened = retry(|| rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve));
    match opened {
        // Linux before 5.6, or a seccomp filter that does not know openat2. A
        // single component with NOFOLLOW can't leave `dir` either; a mount of
        // another device is told by its device number.
        Err(Errno::NOSYS | Errno::PERM) => {
            let fd = retry(|| rustix::fs::openat(dir, name, flags, Mode::empty()))?;
            if rustix::fs::fstat(&fd)?.st_dev == rustix::fs::fstat(dir)?.st_dev {
                Ok(fd)
            } else {
                Err(Errno::XDEV)
            }
        }
        other => other,
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR | Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// Opens a directory for reading.
pub(crate) fn open_dir_at(dir: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    open_beneath(dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Opens a regular file for reading; never blocks on a FIFO.
pub(super) fn open_file_at(dir: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    open_beneath(
        dir,
        name,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
    )
}

/// A handle on whatever has this name, links included, without opening it.
pub(super) fn open_path_at(dir: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    open_beneath(dir, name, OFlags::PATH)
}

/// Path of an open descriptor's object, for calls that only take paths.
pub(crate) fn proc_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Sets the mode of a directory entry that is not a link.
pub(super) fn chmod_entry(dir: impl AsFd, name: &CStr, mode: u32) -> Result<(), Errno> {
    let handle = open_path_at(dir, name)?;
    rustix::fs::chmod(proc_path(&handle), Mode::from_raw_mode(mode))
}

/// A name as part of a path for messages.
pub(super) fn name_of(name: &CStr) -> &Path {
    Path::new(OsStr::from_bytes(name.to_bytes()))
}

/// An extended attribute through a handle of any kind; `None` when it is not
/// set or the file system has none.
pub(super) fn read_xattr(handle: impl AsFd, name: &CStr) -> Result<Option<Vec<u8>>, Errno> {
    let path = proc_path(handle);
    let mut value = Vec::with_capacity(256);
    loop {
        match rustix::fs::getxattr(&path, name, rustix::buffer::spare_capacity(&mut value)) {
            Ok(_) => return Ok(Some(value)),
            Err(Errno::RANGE) => {
                let size = rustix::fs::getxattr(&path, name, &mut [0_u8; 0]).unwrap_or(0);
                let next = size.max(value.capacity() * 4).min(1 << 17);
                if next <= value.capacity() {
                    return Err(Errno::RANGE);
                }
                value = Vec::with_capacity(next);
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// Whether an entry is a directory, without following it.
pub(crate) fn stat_entry(dir: impl AsFd, name: &CStr) -> Result<rustix::fs::Stat, Errno> {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
}
