//! Removal. Takes the permissions it needs (the files are ours or we are
//! root), works at any depth with a bounded number of descriptors by moving
//! deep directories up, and refuses to enter what is mounted inside, so that a
//! forgotten bind mount of `/usr` can't cost the host its `/usr`.

use super::TreeError;
use super::at::{chmod_entry, name_of, open_dir_at};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Open directories at a time; deeper ones are moved up first.
const MAX_OPEN: usize = 32;

/// Removes a file, a link or a whole directory. What does not exist is
/// removed already.
///
/// # Errors
/// When something below is a mount point (`EXDEV` or `EBUSY`), belongs to
/// somebody else, or keeps being added to.
pub fn remove_tree(path: &Path) -> Result<(), TreeError> {
    let fail = |error: Errno| TreeError::new("removing", path, error);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(fail(Errno::INVAL));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let name = CString::new(name.as_bytes()).map_err(|_| fail(Errno::INVAL))?;
    let parent = match rustix::fs::openat(
        CWD,
        parent,
        OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(fail(error)),
    }
    for _ in 0..MAX_ROUNDS {
        match open_writable(&parent, &name) {
            Ok(root) => empty(root, path)?,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(fail(error)),
        }
        match rustix::fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Somebody added to it meanwhile.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(fail(error)),
        }
    }
    Err(fail(Errno::NOTEMPTY))
}

/// Removes everything in a directory, but not the directory.
///
/// # Errors
/// As [`remove_tree`].
pub fn clear_directory(path: &Path) -> Result<(), TreeError> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let root = rustix::fs::openat(CWD, path, flags, Mode::empty())
        .map_err(|error| TreeError::new("emptying", path, error))?;
    empty(root, path)
}

/// How often a directory that is being added to is emptied again.
const MAX_ROUNDS: usize = 100;

/// Opens a directory so that its entries can be removed.
fn open_writable(dir: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let dir = dir.as_fd();
    let fd = match open_dir_at(dir, name) {
        Err(Errno::ACCESS) => {
            chmod_entry(dir, name, 0o700)?;
            open_dir_at(dir, name)?
        }
        other => other?,
    };
    let mode = rustix::fs::fstat(&fd)?.st_mode;
    if mode & 0o700 != 0o700 && !rustix::process::geteuid().is_root() {
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o700))?;
    }
    Ok(fd)
}

/// Removes everything below an open directory. `path` is for messages.
fn empty(root: OwnedFd, path: &Path) -> Result<(), TreeError> {
    let fail =
        |name: &CStr, error: Errno| TreeError::new("removing", path.join(name_of(name)), error);
    let top = |error: Errno| TreeError::new("removing", path, error);
    let anchor = root
        .try_clone()
        .map_err(|e| TreeError::new("removing", path, e))?;
    let mut moved = 0_u64;
    // Names of the open directories below the root.
    let mut names: Vec<CString> = Vec::new();
    let mut open = vec![Dir::new(root).map_err(top)?];
    // Rounds over the root in a row that moved nothing up to it.
    let mut rounds = 0;
    let mut moved_before = 0;
    loop {
        let depth = open.len();
        let Some(dir) = open.last_mut() else {
            return Ok(());
        };
        let Some(entry) = dir.read() else {
            if depth == 1 {
                // Directories moved up here may have been missed by the
                // reading that was under way.
                if moved > moved_before {
                    moved_before = moved;
                    rounds = 0;
                }
                if rounds < MAX_ROUNDS && !is_empty(&anchor).map_err(top)? {
                    rounds += 1;
                    open[0].rewind();
                    continue;
                }
                return Ok(());
            }
            open.pop();
            let name = names.pop().unwrap_or_default();
            let parent = open[open.len() - 1].fd().map_err(top)?;
            match rustix::fs::unlinkat(parent, &name, AtFlags::REMOVEDIR) {
                // Added to meanwhile: the root's next round finds it.
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(error) => return Err(fail(&name, error)),
            }
            continue;
        };
        let entry = match entry {
            Ok(entry) => entry,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(top(error)),
        };
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let here = dir.fd().map_err(top)?;
        match rustix::fs::unlinkat(here, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(fail(name, error)),
        }
        let child = match open_writable(here, name) {
            Ok(child) => child,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(fail(name, error)),
        };
        if depth < MAX_OPEN {
            names.push(name.to_owned());
            open.push(Dir::new(child).map_err(top)?);
            continue;
        }
        drop(child);
        loop {
            let place = format!(".deep-{moved}");
            moved += 1;
            match rustix::fs::renameat_with(here, name, &anchor, &*place, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                Ok(()) | Err(Errno::NOENT) => break,
                Err(error) => return Err(fail(name, error)),
            }
        }
    }
}

fn is_empty(dir: &OwnedFd) -> Result<bool, Errno> {
    let mut entries = Dir::read_from(dir)?;
    while let Some(entry) = entries.read() {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}
