//! Merges stacked layers into one that looks the same over any base: of each
//! name the topmost entry, with whiteouts and opaque marks kept because the
//! base stays below. Files are shared with the layers by hard links, so merging
//! costs no space for content.

use super::TreeError;
use super::at::stat_entry;
use super::copy::{CopyOptions, Inode, clone_entry, copy_attributes};
use super::overlay::{is_opaque, is_overlay_attribute, is_whiteout};
use super::walk::Cursor;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, XattrFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashSet};
use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

/// A subdirectory of the current directory, to be merged.
struct Pending {
    name: CString,
    /// Layers that have it, topmost first.
    layers: Vec<usize>,
    /// Below those, a layer has something else of this name.
    ended: bool,
}

struct Level {
    /// Layers whose cursors are in this directory.
    members: Vec<usize>,
    pending: Vec<Pending>,
    inode: Inode,
    opaque: bool,
    /// Nothing of the base shows here.
    hidden: bool,
}

struct Merge<'a> {
    layers: Vec<Cursor>,
    target: Cursor,
    mark: &'a CStr,
    options: CopyOptions<'a>,
}

/// Merges layers (topmost first) into a directory that does not exist yet.
/// `mark` is the attribute for opaque directories. The layers must be on the
/// target's file system, must not change, and share their files with the
/// result from then on. After an error the caller removes what was made.
///
/// # Errors
/// When something can't be read, linked or made, or a layer uses overlayfs'
/// redirects, which have no meaning elsewhere.
pub(crate) fn merge_layers(
    layers: &[PathBuf],
    to: &Path,
    mark: &CStr,
    options: CopyOptions<'_>,
) -> Result<(), TreeError> {
    rustix::fs::mkdir(to, Mode::RWXU).map_err(|e| TreeError::new("making", to, e))?;
    let mut merge = Merge {
        layers: layers
            .iter()
            .map(|layer| Cursor::open(layer))
            .collect::<Result<_, _>>()?,
        target: Cursor::open(to)?,
        mark,
        options,
    };
    let done = merge.run();
    // The way up gives lent modes back, after a failure too.
    for layer in &mut merge.layers {
        while layer.leave().ok().flatten().is_some() {}
    }
    done
}

impl Merge<'_> {
    fn run(&mut self) -> Result<(), TreeError> {
        let all = (0..self.layers.len()).collect();
        let mut levels = vec![self.read_level(all, false, false)?];
        while let Some(level) = levels.last_mut() {
            let hidden = level.hidden;
            match level.pending.pop() {
                Some(next) => levels.push(self.descend(next, hidden)?),
                None => {
                    if let Some(level) = levels.pop() {
                        self.ascend(&level, levels.is_empty())?;
                    }
                }
            }
        }
        Ok(())
    }

    fn descend(&mut self, next: Pending, hidden: bool) -> Result<Level, TreeError> {
        let mut members = Vec::new();
        let mut opaque = false;
        for layer in next.layers {
            let cursor = &mut self.layers[layer];
            if !cursor.enter(&next.name)? {
                return Err(cursor.error("entering a directory of", Errno::NOENT));
            }
            members.push(layer);
            if is_opaque(cursor.fd()).map_err(|e| cursor.error("reading", e))? {
                opaque = true;
                break;
            }
        }
        opaque |= next.ended;
        rustix::fs::mkdirat(self.target.fd(), &next.name, Mode::RWXU)
            .map_err(|e| self.target.error("making a directory in", e))?;
        if !self.target.enter(&next.name)? {
            return Err(self
                .target
                .error("entering a new directory of", Errno::NOENT));
        }
        self.read_level(members, opaque, hidden || opaque)
    }

    /// Puts all but the subdirectories of a directory into the target.
    fn read_level(
        &self,
        members: Vec<usize>,
        opaque: bool,
        hidden: bool,
    ) -> Result<Level, TreeError> {
        let mut directories: BTreeMap<CString, Pending> = BTreeMap::new();
        let mut decided: HashSet<CString> = HashSet::new();
        for layer in &members {
            let cursor = &self.layers[*layer];
            let mut entries = cursor.entries()?;
            while let Some(entry) = entries.read() {
                let entry = entry.map_err(|e| cursor.error("reading", e))?;
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") || decided.contains(name) {
                    continue;
                }
                self.options
                    .check()
                    .map_err(|e| cursor.error("merging", e))?;
                let stat = stat_entry(cursor.fd(), name).map_err(|e| cursor.error("reading", e))?;
                let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                match directories.get_mut(name) {
                    Some(pending) if pending.ended => {}
                    Some(pending) if is_directory => pending.layers.push(*layer),
                    Some(pending) => pending.ended = true,
                    None if is_directory => {
                        let pending = Pending {
                            name: name.to_owned(),
                            layers: vec![*layer],
                            ended: false,
                        };
                        directories.insert(name.to_owned(), pending);
                    }
                    None => {
                        decided.insert(name.to_owned());
                        if !(hidden && is_whiteout(&stat)) {
                            self.share(cursor, name, &stat)?;
                        }
                    }
                }
            }
        }
        let top = &self.layers[members[0]];
        let inode = Inode::read(top.fd(), &top.stat())
            .map_err(|e| top.error("reading attributes of", e))?;
        Ok(Level {
            members,
            pending: directories.into_values().collect(),
            inode,
            opaque,
            hidden,
        })
    }

    fn share(&self, from: &Cursor, name: &CStr, stat: &rustix::fs::Stat) -> Result<(), TreeError> {
        let to = self.target.fd();
        match rustix::fs::linkat(from.fd(), name, to, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            // Too many links, or a kernel that does not allow this one.
            Err(Errno::MLINK | Errno::PERM | Errno::XDEV) => {
                clone_entry(from.fd(), name, stat, to, name)
                    .map_err(|e| from.error("copying an entry of", e))
            }
            Err(error) => Err(from.error("linking an entry of", error)),
        }
    }

    fn ascend(&mut self, level: &Level, at_top: bool) -> Result<(), TreeError> {
        let place = self.target.path();
        let failed = |e: Errno| TreeError::new("setting attributes of", &place, e);
        let redirected =
            level.inode.xattrs.iter().any(|(name, _)| {
                is_overlay_attribute(name) && name.to_bytes().ends_with(b".redirect")
            });
        if redirected {
            return Err(failed(Errno::OPNOTSUPP));
        }
        let dir = if at_top {
            let dir = self.target.fd().try_clone_to_owned();
            Some(dir.map_err(|e| TreeError::new("opening", &place, e))?)
        } else {
            for layer in &level.members {
                self.layers[*layer].leave()?;
            }
            self.target.leave()?
        };
        let Some(dir) = dir else {
            return Ok(());
        };
        self.finish(&dir, level).map_err(failed)
    }

    fn finish(&self, dir: &OwnedFd, level: &Level) -> Result<(), Errno> {
        if level.opaque {
            rustix::fs::fsetxattr(dir, self.mark, b"y", XattrFlags::empty())?;
        }
        let inode = Inode {
            stat: level.inode.stat,
            xattrs: level
                .inode
                .xattrs
                .iter()
                .filter(|(name, _)| !is_overlay_attribute(name))
                .cloned()
                .collect(),
        };
        copy_attributes(dir, &inode)
    }
}
