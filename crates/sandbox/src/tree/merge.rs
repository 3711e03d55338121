//! Merges stacked layers into one directory: of each name the topmost entry.
//!
//! Over a base ([`merge_layers`]), whiteouts and opaque marks are kept because
//! the base stays below, and files are shared with the layers by hard links,
//! so merging costs no space for content. Alone ([`copy_layers`]), everything
//! is copied, and nothing is left to hide.

use super::TreeError;
use super::at::stat_entry;
use super::copy::{CopyOptions, Inode, Links, clone_entry, copy_attributes};
use super::overlay::{is_opaque, is_overlay_attribute, is_whiteout};
use super::walk::Cursor;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, Stat, XattrFlags};
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
    /// Layers of the base that show through here.
    base: Vec<usize>,
    pending: Vec<Pending>,
    inode: Inode,
    opaque: bool,
}

struct Merge<'a> {
    layers: Vec<Cursor>,
    /// How many of them are merged; the others are the base.
    merged: usize,
    target: Cursor,
    way: Way<'a>,
    options: CopyOptions<'a>,
}

/// What the result is for.
enum Way<'a> {
    /// To be stacked over a base; opaque directories get this attribute.
    OverBase(&'a CStr),
    /// To be used by itself.
    Alone(Links),
}

/// Merges layers (topmost first) into a directory that does not exist yet, to
/// be stacked over `base`. `mark` is the attribute for opaque directories. The
/// layers must be on the target's file system, must not change, and share
/// their files with the result from then on. After an error the caller removes
/// what was made.
///
/// # Errors
/// When something can't be read, linked or made, or a layer uses overlayfs'
/// redirects, which have no meaning elsewhere.
pub(crate) fn merge_layers(
    layers: &[PathBuf],
    base: &[PathBuf],
    to: &Path,
    mark: &CStr,
    options: CopyOptions<'_>,
) -> Result<(), TreeError> {
    merge(layers, base, to, Way::OverBase(mark), options)
}

/// Copies what stacked layers (topmost first) show to a directory that does
/// not exist yet. The layers must not change meanwhile. After an error the
/// caller removes what was made.
///
/// # Errors
/// When something can't be read or made, or a layer uses overlayfs' redirects.
pub fn copy_layers(
    layers: &[PathBuf],
    to: &Path,
    options: CopyOptions<'_>,
) -> Result<(), TreeError> {
    merge(layers, &[], to, Way::Alone(Links::beside(to)), options)
}

fn merge(
    layers: &[PathBuf],
    base: &[PathBuf],
    to: &Path,
    way: Way<'_>,
    options: CopyOptions<'_>,
) -> Result<(), TreeError> {
    if layers.is_empty() {
        return Err(TreeError::new("merging nothing into", to, Errno::INVAL));
    }
    rustix::fs::mkdir(to, Mode::RWXU).map_err(|e| TreeError::new("making", to, e))?;
    let mut merge = Merge {
        layers: layers
            .iter()
            .chain(base)
            .map(|layer| Cursor::open(layer))
            .collect::<Result<_, _>>()?,
        merged: layers.len(),
        target: Cursor::open(to)?,
        way,
        options,
    };
    let done = merge.run();
    // The way up gives lent modes back, after a failure too.
    for layer in &mut merge.layers {
        while layer.leave().ok().flatten().is_some() {}
    }
    if let Way::Alone(links) = &merge.way {
        links.remove()?;
    }
    done
}

impl Merge<'_> {
    fn run(&mut self) -> Result<(), TreeError> {
        let members = (0..self.merged).collect();
        let base = (self.merged..self.layers.len()).collect();
        let mut levels = vec![self.read_level(members, base, false)?];
        while let Some(level) = levels.last_mut() {
            match level.pending.pop() {
                Some(next) => {
                    let base = level.base.clone();
                    levels.push(self.descend(next, &base)?);
                }
                None => {
                    if let Some(level) = levels.pop() {
                        self.ascend(&level, levels.is_empty())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Enters a subdirectory in one layer; tells whether it hides the layers
    /// below.
    fn enter(&mut self, layer: usize, name: &CStr) -> Result<bool, TreeError> {
        let cursor = &mut self.layers[layer];
        if !cursor.enter(name)? {
            return Err(cursor.error("entering a directory of", Errno::NOENT));
        }
        is_opaque(cursor.fd()).map_err(|e| cursor.error("reading", e))
    }

    /// Layers of the base in which a directory shows; enters it there.
    fn enter_base(&mut self, above: &[usize], name: &CStr) -> Result<Vec<usize>, TreeError> {
        let mut base = Vec::new();
        for layer in above {
            let cursor = &self.layers[*layer];
            match stat_entry(cursor.fd(), name) {
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(cursor.error("reading", error)),
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Directory => break,
                Ok(_) => {}
            }
            base.push(*layer);
            if self.enter(*layer, name)? {
                break;
            }
        }
        Ok(base)
    }

    fn descend(&mut self, next: Pending, base: &[usize]) -> Result<Level, TreeError> {
        let mut members = Vec::new();
        let mut opaque = next.ended;
        for layer in next.layers {
            members.push(layer);
            if self.enter(layer, &next.name)? {
                opaque = true;
                break;
            }
        }
        let base = if opaque {
            Vec::new()
        } else {
            self.enter_base(base, &next.name)?
        };
        rustix::fs::mkdirat(self.target.fd(), &next.name, Mode::RWXU)
            .map_err(|e| self.target.error("making a directory in", e))?;
        if !self.target.enter(&next.name)? {
            return Err(self
                .target
                .error("entering a new directory of", Errno::NOENT));
        }
        self.read_level(members, base, opaque)
    }

    /// Puts all but the subdirectories of a directory into the target.
    fn read_level(
        &self,
        members: Vec<usize>,
        base: Vec<usize>,
        opaque: bool,
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
                        // Where nothing of the base shows, a whiteout hides
                        // nothing, and would be listed itself.
                        if !(base.is_empty() && is_whiteout(&stat)) {
                            self.put(cursor, name, &stat)?;
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
            base,
            pending: directories.into_values().collect(),
            inode,
            opaque,
        })
    }

    fn put(&self, from: &Cursor, name: &CStr, stat: &Stat) -> Result<(), TreeError> {
        let to = self.target.fd();
        let copied = |e| from.error("copying an entry of", e);
        match &self.way {
            Way::OverBase(_) => {
                match rustix::fs::linkat(from.fd(), name, to, name, AtFlags::empty()) {
                    Ok(()) => Ok(()),
                    // Too many links, or a kernel that does not allow this one.
                    Err(Errno::MLINK | Errno::PERM | Errno::XDEV) => {
                        clone_entry(from.fd(), name, stat, to, name).map_err(copied)
                    }
                    Err(error) => Err(from.error("linking an entry of", error)),
                }
            }
            Way::Alone(links) => {
                if links.link(stat, to, name).map_err(copied)? {
                    return Ok(());
                }
                clone_entry(from.fd(), name, stat, to, name)
                    .and_then(|()| links.keep(stat, to, name))
                    .map_err(copied)
            }
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
            for layer in level.members.iter().chain(&level.base) {
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
        if let (true, Way::OverBase(mark)) = (level.opaque, &self.way) {
            rustix::fs::fsetxattr(dir, *mark, b"y", XattrFlags::empty())?;
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
