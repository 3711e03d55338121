//! Finding the directory an entry belongs in, from the layer's root down, one
//! name at a time, never through a link.

use super::names::LayerPath;
use super::unpack::LayerError;
use crate::tree::{is_whiteout, open_dir_at, remove_tree, stat_entry};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, Stat};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What a directory is to become once nothing is put into it any more.
#[derive(Debug, Clone, Default)]
pub(super) struct DirectoryPlan {
    pub(super) attributes: Attributes,
    /// Hides what lower layers have in it.
    pub(super) opaque: bool,
    /// No entry of its own told its attributes: if lower layers have it, they
    /// do.
    pub(super) implied: bool,
    /// Whiteouts were put into it.
    pub(super) hiding: bool,
}

/// Mode, owner, times and extended attributes of an entry.
#[derive(Debug, Clone)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: Vec<(CString, Vec<u8>)>,
}

impl Default for Attributes {
    fn default() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: Vec::new(),
        }
    }
}

/// The directories of a layer that is being unpacked.
pub(super) struct Dirs {
    root: OwnedFd,
    /// Made so far; they get their attributes at the end.
    pub(super) made: BTreeMap<LayerPath, DirectoryPlan>,
    /// The directory of the last entry, where the next one most likely is too.
    last: Option<(LayerPath, OwnedFd)>,
}

impl Dirs {
    pub(super) fn new(root: OwnedFd) -> Self {
        let plan = DirectoryPlan {
            implied: true,
            ..DirectoryPlan::default()
        };
        let made = BTreeMap::from([(LayerPath::root(), plan)]);
        Self {
            root,
            made,
            last: None,
        }
    }

    /// The directory of this path, made with its parents where missing.
    pub(super) fn make(&mut self, path: &LayerPath) -> Result<BorrowedFd<'_>, LayerError> {
        if self.last.as_ref().is_none_or(|(last, _)| last != path) {
            let fd = self.descend(path, Missing::Make)?;
            self.last = Some((path.clone(), fd));
        }
        match &self.last {
            Some((_, fd)) => Ok(fd.as_fd()),
            None => Ok(self.root.as_fd()),
        }
    }

    /// The directory of this path, which must be there.
    pub(super) fn open(&mut self, path: &LayerPath) -> Result<OwnedFd, LayerError> {
        self.descend(path, Missing::Refuse)
    }

    fn descend(&mut self, path: &LayerPath, missing: Missing) -> Result<OwnedFd, LayerError> {
        let clone = self.root.try_clone();
        let mut here = clone.map_err(|e| LayerError::step("opening", path, e))?;
        for (depth, name) in path.names().iter().enumerate() {
            let upto = || path.upto(depth + 1);
            let refuse = |why: &str| LayerError::Broken(format!("entry {path} {why} {}", upto()));
            here = match open_dir_at(&here, name) {
                Ok(fd) => fd,
                Err(Errno::NOENT) if missing == Missing::Make => {
                    self.make_one(&here, name, upto(), false)?
                }
                Err(Errno::NOENT) => {
                    return Err(refuse("needs a directory the layer does not have:"));
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let stat = stat_entry(&here, name)
                        .map_err(|e| LayerError::step("reading", path, e))?;
                    if is_whiteout(&stat) && missing == Missing::Make {
                        rustix::fs::unlinkat(&here, name, AtFlags::empty())
                            .map_err(|e| LayerError::step("removing", path, e))?;
                        self.make_one(&here, name, upto(), true)?
                    } else if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                        return Err(refuse("goes through the symbolic link"));
                    } else {
                        return Err(refuse("goes through what is not a directory:"));
                    }
                }
                Err(error) => return Err(LayerError::step("opening", path, error)),
            };
        }
        Ok(here)
    }

    /// Makes a directory that only its owner can use until the end.
    fn make_one(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        path: LayerPath,
        opaque: bool,
    ) -> Result<OwnedFd, LayerError> {
        let made =
            rustix::fs::mkdirat(parent, name, Mode::RWXU).and_then(|()| open_dir_at(parent, name));
        let fd = made.map_err(|e| LayerError::step("making", &path, e))?;
        let plan = DirectoryPlan {
            opaque,
            // Whatever lower layers had here is hidden.
            implied: !opaque,
            ..DirectoryPlan::default()
        };
        self.made.insert(path, plan);
        Ok(fd)
    }

    /// Removes an entry of any kind, with what is below it.
    pub(super) fn remove(
        &mut self,
        parent: &LayerPath,
        name: &CString,
        stat: &Stat,
    ) -> Result<(), LayerError> {
        let path = parent.join(name.clone());
        let dir = self.open(parent)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return rustix::fs::unlinkat(&dir, name, AtFlags::empty())
                .map_err(|e| LayerError::step("replacing", &path, e));
        }
        self.last = None;
        let gone: Vec<LayerPath> = self
            .made
            .range(path.clone()..)
            .map(|(made, _)| made)
            .take_while(|made| made.starts_with(&path))
            .cloned()
            .collect();
        for made in gone {
            self.made.remove(&made);
        }
        let at = crate::tree::proc_path(&dir).join(Path::new(OsStr::from_bytes(name.to_bytes())));
        remove_tree(&at).map_err(|e| LayerError::step("replacing", &path, e.source))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Refuse,
}
