//! Going through a tree directory by directory, with one descriptor open at
//! any depth: the way down is by name, the way up by `..`, checked to lead
//! where we came from, so that a tree that is being moved about can end a walk
//! but not lead it astray.

use super::TreeError;
use super::at::{chmod_entry, open_dir_at, stat_entry};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A position in a tree.
pub(super) struct Cursor {
    here: OwnedFd,
    stat: Stat,
    above: Vec<Above>,
    root: PathBuf,
    /// Mode to give back to the current directory when leaving it, if it had
    /// to be changed to be read.
    restore: Option<u32>,
}

struct Above {
    dev: u64,
    ino: u64,
    name: CString,
    restore: Option<u32>,
}

impl Cursor {
    /// Starts at a directory, which must not be a link.
    pub(super) fn open(root: &Path) -> Result<Self, TreeError> {
        let fail = |error: Errno| TreeError::new("opening", root, error);
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut restore = None;
        let opened = rustix::fs::openat(CWD, root, flags | OFlags::RDONLY, Mode::empty());
        let here = match opened {
            Err(Errno::ACCESS) => {
                let handle = rustix::fs::openat(CWD, root, flags | OFlags::PATH, Mode::empty())
                    .map_err(fail)?;
                let mode = rustix::fs::fstat(&handle).map_err(fail)?.st_mode;
                let lent = Mode::from_raw_mode(mode & 0o7777 | 0o700);
                rustix::fs::chmod(super::proc_path(&handle), lent).map_err(fail)?;
                restore = Some(mode & 0o7777);
                rustix::fs::openat(CWD, root, flags | OFlags::RDONLY, Mode::empty())
            }
            other => other,
        }
        .map_err(fail)?;
        let mut cursor = Self {
            stat: rustix::fs::fstat(&here).map_err(fail)?,
            here,
            above: Vec::new(),
            root: root.to_owned(),
            restore,
        };
        cursor.lend_search().map_err(fail)?;
        Ok(cursor)
    }

    /// The current directory.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.here.as_fd()
    }

    /// Its attributes, as they were before its mode was lent.
    pub(super) fn stat(&self) -> Stat {
        let mut stat = self.stat;
        if let Some(mode) = self.restore {
            stat.st_mode = stat.st_mode & !0o7777 | mode;
        }
        stat
    }

    /// How deep below the start.
    pub(super) fn depth(&self) -> usize {
        self.above.len()
    }

    /// Where we are, for messages.
    pub(super) fn path(&self) -> PathBuf {
        let mut path = self.root.clone();
        // A path nobody could use says no more than its beginning.
        for above in self.above.iter().take(256) {
            path.push(OsStr::from_bytes(above.name.to_bytes()));
        }
        path
    }

    pub(super) fn error(&self, step: &'static str, error: Errno) -> TreeError {
        TreeError::new(step, self.path(), error)
    }

    /// Reading a directory takes `r`, looking its entries up takes `x`.
    fn lend_search(&mut self) -> Result<(), Errno> {
        let mode = self.stat.st_mode & 0o7777;
        if mode & 0o500 != 0o500 && self.restore.is_none() && !rustix::process::geteuid().is_root()
        {
            rustix::fs::fchmod(&self.here, Mode::from_raw_mode(mode | 0o700))?;
            self.restore = Some(mode);
        }
        Ok(())
    }

    /// Goes down. `Ok(false)` when the directory is gone, is one no more, or
    /// is a mount point.
    pub(super) fn enter(&mut self, name: &CStr) -> Result<bool, TreeError> {
        let mut restore = None;
        let opened = match open_dir_at(&self.here, name) {
            Err(Errno::ACCESS) => stat_entry(&self.here, name).and_then(|stat| {
                let mode = stat.st_mode & 0o7777;
                chmod_entry(&self.here, name, mode | 0o700)?;
                restore = Some(mode);
                open_dir_at(&self.here, name)
            }),
            other => other,
        };
        let fd = match opened {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => return Ok(false),
            Err(error) => return Err(self.error("entering a directory of", error)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.error("reading", e))?;
        self.above.push(Above {
            dev: self.stat.st_dev,
            ino: self.stat.st_ino,
            name: name.to_owned(),
            restore: self.restore.take(),
        });
        self.here = fd;
        self.stat = stat;
        self.restore = restore;
        self.lend_search().map_err(|e| self.error("reading", e))?;
        Ok(true)
    }

    /// Goes up, giving the directory its mode back. `Ok(false)` at the start.
    /// `finish` sees the directory being left.
    pub(super) fn leave(&mut self) -> Result<Option<OwnedFd>, TreeError> {
        let Some(above) = self.above.last() else {
            self.give_back();
            return Ok(None);
        };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let up = rustix::fs::openat(&self.here, c"..", flags, Mode::empty())
            .map_err(|e| self.error("leaving", e))?;
        let stat = rustix::fs::fstat(&up).map_err(|e| self.error("leaving", e))?;
        if (stat.st_dev, stat.st_ino) != (above.dev, above.ino) {
            return Err(self.error("leaving (it was moved meanwhile)", Errno::STALE));
        }
        self.give_back();
        self.stat = stat;
        if let Some(above) = self.above.pop() {
            self.restore = above.restore;
        }
        Ok(Some(std::mem::replace(&mut self.here, up)))
    }

    fn give_back(&mut self) {
        if let Some(mode) = self.restore.take() {
            // The tree is the sandbox's own; a mode it changed meanwhile is
            // the only thing that can be lost here.
            let _ = rustix::fs::fchmod(&self.here, Mode::from_raw_mode(mode));
        }
    }

    /// Names of the current directory.
    pub(super) fn entries(&self) -> Result<Dir, TreeError> {
        Dir::read_from(&self.here).map_err(|e| self.error("reading", e))
    }
}

/// Visits every directory of a tree, outermost first.
///
/// # Errors
/// What the visit returns, and when a directory can't be read.
pub(crate) fn for_each_directory(
    path: &Path,
    mut visit: impl FnMut(BorrowedFd<'_>) -> Result<(), Errno>,
) -> Result<(), TreeError> {
    let mut cursor = Cursor::open(path)?;
    let done = descend(&mut cursor, |cursor| {
        visit(cursor.fd()).map_err(|e| cursor.error("changing", e))?;
        let mut ignored = TreeSize::default();
        measure(cursor, &mut ignored)
    });
    // The way up gives lent modes back, after a failure too.
    while cursor.leave().ok().flatten().is_some() {}
    done
}

/// Goes through a tree; `enter` sees each directory and names its
/// subdirectories.
fn descend(
    cursor: &mut Cursor,
    mut enter: impl FnMut(&Cursor) -> Result<Vec<CString>, TreeError>,
) -> Result<(), TreeError> {
    let mut pending: Vec<Vec<CString>> = vec![enter(cursor)?];
    while let Some(names) = pending.last_mut() {
        match names.pop() {
            Some(name) => {
                if cursor.enter(&name)? {
                    pending.push(enter(cursor)?);
                }
            }
            None => {
                pending.pop();
                cursor.leave()?;
            }
        }
    }
    Ok(())
}

/// What a tree takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TreeSize {
    /// Bytes allocated on the disk. A file with several hard links counts in
    /// equal shares at each of them.
    pub bytes: u64,
    /// Files, directories, links and the rest.
    pub entries: u64,
}

/// Measures a tree. It may be in use: what appears or vanishes meanwhile is
/// counted or not. Space of files that were deleted while open is not seen.
///
/// # Errors
/// When a directory can't be read.
pub fn tree_size(path: &Path) -> Result<TreeSize, TreeError> {
    let mut cursor = Cursor::open(path)?;
    let mut size = TreeSize {
        bytes: allocated(&cursor.stat),
        entries: 1,
    };
    match descend(&mut cursor, |cursor| measure(cursor, &mut size)) {
        // A directory was moved about while in use: what was counted so far
        // is a lower bound, and the best there is.
        Err(error) if error.source.raw_os_error() == Some(libc::ESTALE) => Ok(size),
        done => done.map(|()| size),
    }
}

/// Adds the entries of the current directory; returns its subdirectories.
fn measure(cursor: &Cursor, size: &mut TreeSize) -> Result<Vec<CString>, TreeError> {
    let mut directories = Vec::new();
    let mut entries = cursor.entries()?;
    while let Some(entry) = entries.read() {
        let entry = entry.map_err(|e| cursor.error("reading", e))?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match stat_entry(cursor.fd(), name) {
            Ok(stat) => {
                size.bytes += allocated(&stat);
                size.entries += 1;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    directories.push(name.to_owned());
                }
            }
            Err(Errno::NOENT) => {}
            Err(error) => return Err(cursor.error("reading an entry of", error)),
        }
    }
    Ok(directories)
}

fn allocated(stat: &Stat) -> u64 {
    let bytes = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        bytes
    } else {
        bytes / stat.st_nlink.max(1)
    }
}
