//! Paths of an archive, resolved so that they never leave the directory it is
//! unpacked into, whatever links the archive (or a process of the sandbox,
//! meanwhile) puts there: each step opens one name without following links,
//! and links are resolved here.

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Links followed in one path before it counts as a loop.
const MAX_LINKS: usize = 40;

/// Most components of a path, those of links included.
const MAX_COMPONENTS: usize = 1024;

const STEP: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A directory that nothing resolved through it leaves.
pub(super) struct Root {
    fd: OwnedFd,
    /// Its real path, to recognise absolute links that stay inside.
    path: PathBuf,
}

/// Where an entry goes: the directory, and its name in there.
pub(super) struct Place {
    pub(super) directory: OwnedFd,
    pub(super) name: OsString,
}

impl Place {
    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The plain components of an archive's path; nothing for the root itself.
pub(super) fn components(path: &Path) -> io::Result<Vec<OsString>> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_owned()),
            Component::CurDir => {}
            Component::ParentDir => return Err(refused("its path goes up with \"..\"")),
            Component::RootDir | Component::Prefix(_) => {
                return Err(refused("its path is absolute"));
            }
        }
    }
    if parts.len() > MAX_COMPONENTS {
        return Err(refused("its path has too many components"));
    }
    Ok(parts)
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

impl Root {
    /// Opens a directory that exists.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let path = std::fs::canonicalize(path)?;
        let fd = rustix::fs::openat(CWD, &path, STEP, Mode::empty())?;
        Ok(Self { fd, path })
    }

    /// The place of an entry; missing directories on the way are made if
    /// `make`. Nothing for the root itself.
    pub(super) fn place(&self, path: &Path, make: bool) -> io::Result<Option<Place>> {
        let mut parts = components(path)?;
        let Some(name) = parts.pop() else {
            return Ok(None);
        };
        let directory = self.directory(parts, make)?;
        Ok(Some(Place { directory, name }))
    }

    /// A directory of the archive; missing ones are made if `make`.
    pub(super) fn directory_at(&self, path: &Path, make: bool) -> io::Result<OwnedFd> {
        self.directory(components(path)?, make)
    }

    fn directory(&self, parts: Vec<OsString>, make: bool) -> io::Result<OwnedFd> {
        let mut todo: VecDeque<OsString> = parts.into();
        let mut stack: Vec<OwnedFd> = Vec::new();
        let mut links = 0;
        let mut steps = 0;
        while let Some(part) = todo.pop_front() {
            steps += 1;
            if steps > MAX_COMPONENTS {
                return Err(refused("its path has too many components"));
            }
            if part == ".." {
                if stack.pop().is_none() {
                    return Err(refused("a link on its path leaves the target directory"));
                }
                continue;
            }
            let here = stack.last().map_or(self.fd.as_fd(), AsFd::as_fd);
            match enter(here, &part, make) {
                Ok(next) => stack.push(next),
                // Something is there that is no directory: maybe a link.
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let target = match rustix::fs::readlinkat(here, &part, Vec::new()) {
                        Ok(target) => target,
                        Err(_) => return Err(Errno::NOTDIR.into()),
                    };
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                    let inner = if target.is_absolute() {
                        stack.clear();
                        target.strip_prefix(&self.path).map_err(|_| {
                            refused("a link on its path leaves the target directory")
                        })?
                    } else {
                        target
                    };
                    for component in inner.components().rev() {
                        match component {
                            Component::Normal(part) => todo.push_front(part.to_owned()),
                            Component::ParentDir => todo.push_front("..".into()),
                            _ => {}
                        }
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        match stack.pop() {
            Some(directory) => Ok(directory),
            None => self.fd.try_clone(),
        }
    }
}

fn enter(here: BorrowedFd<'_>, part: &OsStr, make: bool) -> rustix::io::Result<OwnedFd> {
    match rustix::fs::openat(here, part, STEP, Mode::empty()) {
        Err(Errno::NOENT) if make => {
            match rustix::fs::mkdirat(here, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
            rustix::fs::openat(here, part, STEP, Mode::empty())
        }
        result => result,
    }
}

/// Removes what has the name, unless it is a directory.
pub(super) fn clear(place: &Place) -> io::Result<()> {
    match rustix::fs::unlinkat(place.dir(), &place.name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) if is_directory(place) => Err(Errno::ISDIR.into()),
        Err(error) => Err(error.into()),
    }
}

/// Whether the name is a directory, not a link to one.
pub(super) fn is_directory(place: &Place) -> bool {
    rustix::fs::openat(place.dir(), &place.name, STEP, Mode::empty()).is_ok()
}
