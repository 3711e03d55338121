//! Copies that keep everything a file system shows: owners (as root), modes,
//! times, extended attributes, hard links, holes, FIFOs, and what overlayfs
//! keeps in an upper directory: whiteouts and opaque marks.

use super::TreeError;
use super::at::{chmod_entry, open_file_at, open_path_at, proc_path, read_xattr, stat_entry};
use super::remove::remove_tree;
use super::walk::Cursor;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// How to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOptions<'a> {
    /// Ends the copy with `EINTR` when set.
    pub stop: Option<&'a AtomicBool>,
}

impl CopyOptions<'_> {
    pub(super) fn check(&self) -> Result<(), Errno> {
        match self.stop {
            Some(stop) if stop.load(Ordering::Relaxed) => Err(Errno::INTR),
            _ => Ok(()),
        }
    }
}

/// Copies a directory tree to a path that does not exist yet. The source
/// should not change meanwhile. Mounted things inside are left out. After an
/// error the caller removes what was made.
///
/// # Errors
/// When something can't be read or made. Attributes that the target's file
/// system or the caller's rights don't allow are left out silently if they
/// belong to a security module, and are errors otherwise.
pub fn copy_tree(from: &Path, to: &Path, options: CopyOptions<'_>) -> Result<(), TreeError> {
    let mut source = Cursor::open(from)?;
    rustix::fs::mkdir(to, Mode::RWXU).map_err(|e| TreeError::new("making", to, e))?;
    let mut target = Cursor::open(to)?;
    let links = Links::beside(to);
    let done = copy_entries(&mut source, &mut target, &links, options);
    // The way up has to be walked even after a failure: it gives lent modes
    // back.
    while source.leave().ok().flatten().is_some() {}
    let cleared = links.remove();
    done.and(cleared)
}

struct Level {
    pending: Vec<CString>,
    inode: Inode,
}

fn copy_entries(
    source: &mut Cursor,
    target: &mut Cursor,
    links: &Links,
    options: CopyOptions<'_>,
) -> Result<(), TreeError> {
    let mut levels = vec![copy_level(source, target, links, options)?];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.pending.pop() {
            if source.enter(&name)? {
                rustix::fs::mkdirat(target.fd(), &name, Mode::RWXU)
                    .map_err(|e| target.error("making a directory in", e))?;
                if !target.enter(&name)? {
                    return Err(target.error("entering a new directory of", Errno::NOENT));
                }
                levels.push(copy_level(source, target, links, options)?);
            }
            continue;
        }
        let place = target.path();
        let finish = |fd: &OwnedFd, inode: &Inode| {
            copy_attributes(fd, inode)
                .map_err(|e| TreeError::new("setting attributes of", &place, e))
        };
        if target.depth() == 0 {
            let fd = target
                .fd()
                .try_clone_to_owned()
                .map_err(|e| TreeError::new("opening", &place, e))?;
            finish(&fd, &level.inode)?;
        } else {
            source.leave()?;
            if let Some(fd) = target.leave()? {
                finish(&fd, &level.inode)?;
            }
        }
        levels.pop();
    }
    Ok(())
}

/// Copies all but the subdirectories of the current directory.
fn copy_level(
    source: &Cursor,
    target: &Cursor,
    links: &Links,
    options: CopyOptions<'_>,
) -> Result<Level, TreeError> {
    let mut pending = Vec::new();
    let mut entries = source.entries()?;
    while let Some(entry) = entries.read() {
        let entry = entry.map_err(|e| source.error("reading", e))?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let fail = |error| {
            let mut error = source.error("copying", error);
            error.path.push(super::name_of(name));
            error
        };
        options.check().map_err(fail)?;
        let stat = match stat_entry(source.fd(), name) {
            Err(Errno::NOENT) => continue,
            other => other.map_err(fail)?,
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            pending.push(name.to_owned());
            continue;
        }
        if links.link(&stat, target.fd(), name).map_err(fail)? {
            continue;
        }
        match clone_entry(source.fd(), name, &stat, target.fd(), name) {
            Ok(()) => links.keep(&stat, target.fd(), name).map_err(fail)?,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(fail(error)),
        }
    }
    let inode = Inode::read(source.fd(), &source.stat())
        .map_err(|e| source.error("reading attributes of", e))?;
    Ok(Level { pending, inode })
}

/// Hard links already met, kept as a directory of further links: neither
/// memory nor the length of paths limits it.
pub(super) struct Links {
    path: std::path::PathBuf,
}

impl Links {
    pub(super) fn beside(target: &Path) -> Self {
        let mut name = target.as_os_str().to_owned();
        name.push(".links");
        Self { path: name.into() }
    }

    fn name(stat: &Stat) -> String {
        format!("{}-{}", stat.st_dev, stat.st_ino)
    }

    /// Makes `name` a link to the copy of this file, if there is one.
    pub(super) fn link(&self, stat: &Stat, dir: impl AsFd, name: &CStr) -> Result<bool, Errno> {
        if stat.st_nlink < 2 {
            return Ok(false);
        }
        let kept = self.path.join(Self::name(stat));
        match rustix::fs::linkat(CWD, &kept, dir, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT | Errno::MLINK) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn keep(&self, stat: &Stat, dir: impl AsFd, name: &CStr) -> Result<(), Errno> {
        if stat.st_nlink < 2 {
            return Ok(());
        }
        match rustix::fs::mkdir(&self.path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let kept = self.path.join(Self::name(stat));
        match rustix::fs::linkat(dir, name, CWD, &kept, AtFlags::empty()) {
            Ok(()) | Err(Errno::EXIST | Errno::MLINK) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn remove(&self) -> Result<(), TreeError> {
        remove_tree(&self.path)
    }
}

/// All that is known of a file beside its content.
pub(crate) struct Inode {
    /// Mode, owner, times.
    pub(crate) stat: Stat,
    /// Extended attributes.
    pub(crate) xattrs: Vec<(CString, Vec<u8>)>,
}

impl Inode {
    /// Reads it from a handle; the mode and owner are those of `stat`.
    pub(crate) fn read(handle: impl AsFd, stat: &Stat) -> Result<Self, Errno> {
        Ok(Self {
            stat: *stat,
            xattrs: list_xattrs(handle)?,
        })
    }
}

/// Extended attributes of a handle, without what overlayfs keeps about a
/// particular mount (origin, impure and so on), which is wrong in a copy.
pub(super) fn list_xattrs(handle: impl AsFd) -> Result<Vec<(CString, Vec<u8>)>, Errno> {
    let handle = handle.as_fd();
    let path = proc_path(handle);
    let mut names = Vec::with_capacity(1 << 16);
    match rustix::fs::listxattr(&path, rustix::buffer::spare_capacity(&mut names)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP | Errno::PERM) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let mut found = Vec::new();
    for name in names.split_inclusive(|b| *b == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        if belongs_to_one_mount(name.to_bytes()) {
            continue;
        }
        if let Some(value) = read_xattr(handle, name)? {
            found.push((name.to_owned(), value));
        }
    }
    Ok(found)
}

fn belongs_to_one_mount(name: &[u8]) -> bool {
    let Some(rest) = name
        .strip_prefix(b"trusted.overlay.")
        .or_else(|| name.strip_prefix(b"user.overlay."))
    else {
        return false;
    };
    matches!(
        rest,
        b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid" | b"protattr"
    )
}

/// Gives an open file or directory its attributes, times last.
pub(crate) fn copy_attributes(target: impl AsFd, inode: &Inode) -> Result<(), Errno> {
    let target = target.as_fd();
    let path = proc_path(target);
    let (late, early): (Vec<_>, Vec<_>) = inode
        .xattrs
        .iter()
        .partition(|(name, _)| name.to_bytes() == b"security.capability");
    set_xattrs(&path, &early)?;
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = owner(&inode.stat);
        rustix::fs::chown(&path, uid, gid)?;
    }
    rustix::fs::chmod(&path, Mode::from_raw_mode(inode.stat.st_mode & 0o7777))?;
    // Changing the owner clears capabilities.
    set_xattrs(&path, &late)?;
    rustix::fs::utimensat(CWD, &path, &times(&inode.stat), AtFlags::empty())
}

fn set_xattrs(path: &Path, xattrs: &[&(CString, Vec<u8>)]) -> Result<(), Errno> {
    for (name, value) in xattrs {
        match rustix::fs::setxattr(path, name.as_c_str(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // Labels of security modules are given by the kernel; trusted
            // ones can't be seen by whom they can't be set by.
            Err(Errno::PERM | Errno::OPNOTSUPP) if name.to_bytes().starts_with(b"security.") => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
}

fn times(stat: &Stat) -> Timestamps {
    let stamp = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    Timestamps {
        last_access: stamp(stat.st_atime, stat.st_atime_nsec),
        last_modification: stamp(stat.st_mtime, stat.st_mtime_nsec),
    }
}

/// Copies one entry that is not a directory.
pub(super) fn clone_entry(
    from: impl AsFd,
    name: &CStr,
    stat: &Stat,
    to: impl AsFd,
    new_name: &CStr,
) -> Result<(), Errno> {
    let (from, to) = (from.as_fd(), to.as_fd());
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let mut lent = false;
            let source = match open_file_at(from, name) {
                Err(Errno::ACCESS) => {
                    chmod_entry(from, name, stat.st_mode & 0o7777 | 0o400)?;
                    lent = true;
                    open_file_at(from, name)
                }
                other => other,
            };
            let copied = source.and_then(|source| {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                let target = rustix::fs::openat(to, new_name, flags, Mode::RUSR | Mode::WUSR)?;
                copy_content(&source, &target, stat)?;
                copy_attributes(&target, &Inode::read(&source, stat)?)
            });
            if lent {
                chmod_entry(from, name, stat.st_mode & 0o7777)?;
            }
            copied
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(link.as_c_str(), to, new_name)?;
            set_owner_and_times(to, new_name, stat)
        }
        kind => {
            let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
            rustix::fs::mknodat(to, new_name, kind, mode, stat.st_rdev)?;
            let handle = open_path_at(to, new_name)?;
            set_owner_and_times(to, new_name, stat)?;
            // mknod is subject to the umask.
            rustix::fs::chmod(proc_path(&handle), mode)
        }
    }
}

fn set_owner_and_times(dir: impl AsFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let dir = dir.as_fd();
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = owner(stat);
        rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    rustix::fs::utimensat(dir, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

/// Shares the blocks where the file system can, else copies what is not a
/// hole.
fn copy_content(source: &OwnedFd, target: &OwnedFd, stat: &Stat) -> Result<(), Errno> {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size == 0 || rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let mut position = 0;
    while position < size {
        let start = match rustix::fs::seek(source, SeekFrom::Data(position)) {
            Ok(start) => start.min(size),
            Err(Errno::NXIO) => break,
            // No holes on this file system.
            Err(Errno::INVAL) => position,
            Err(error) => return Err(error),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start)).map_or(size, |e| e.min(size));
        copy_range(source, target, start, end)?;
        position = end.max(start + 1);
    }
    rustix::fs::ftruncate(target, size)
}

fn copy_range(source: &OwnedFd, target: &OwnedFd, start: u64, end: u64) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        let (mut from, mut to) = (at, at);
        let wanted = usize::try_from((end - at).min(1 << 30)).unwrap_or(1 << 30);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), wanted) {
            // The file became shorter meanwhile.
            Ok(0) => return Ok(()),
            Ok(copied) => at += copied as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM) => {
                return copy_by_hand(source, target, at, end);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn copy_by_hand(source: &OwnedFd, target: &OwnedFd, start: u64, end: u64) -> Result<(), Errno> {
    let mut buffer = vec![0_u8; 1 << 17];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let read = match rustix::io::pread(source, &mut buffer[..wanted], at) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error),
        };
        let mut written = 0;
        while written < read {
            match rustix::io::pwrite(target, &buffer[written..read], at + written as u64) {
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        at += read as u64;
    }
    Ok(())
}
