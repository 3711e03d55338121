//! What stacking alone would show wrong, set right by a further layer of empty
//! directories on top.
//!
//! A layer that adds `tmp/x` without an entry for `tmp` leaves `/tmp` as the
//! layers below made it. overlayfs takes a directory's attributes from the
//! topmost layer that has it, where they are a guess: they are looked up below
//! instead.
//!
//! A whiteout of something that no layer below has hides nothing, but where
//! its directory is in no other layer, overlayfs lists it as an entry that
//! can't be looked up. A second layer with that directory makes it look.

use super::{Inner, Work};
use crate::image::error::ImageError;
use crate::image::layer::Unpacked;
use crate::image::layout::{HIDING, IMPLIED, LayerRecord, Marks, boot_id, io_error};
use crate::image::lock::{FileLock, Sharing};
use crate::image::reference::ImageRef;
use crate::image::temp::TempDir;
use crate::tree::{Inode, copy_attributes, is_opaque, is_overlay_attribute, open_dir_at};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of names kept for a layer; a layer with more shows as it is.
const MAX_NOTES: usize = 16 << 20;

/// Longest path that is set right, so that it can still be written in one.
const MAX_PATH: usize = 2048;

/// Notes directories of a layer that may have to be set right: those whose
/// attributes it does not tell, and those with whiteouts.
pub(super) fn write_notes(layer: &Path, unpacked: &Unpacked) -> Result<(), ImageError> {
    for (name, directories) in [(IMPLIED, &unpacked.implied), (HIDING, &unpacked.hiding)] {
        let text = directories.join(&0);
        if directories.is_empty() || text.len() > MAX_NOTES {
            continue;
        }
        let path = layer.join(name);
        fs::write(&path, text).map_err(|e| io_error("writing", &path, e))?;
    }
    Ok(())
}

fn read_notes(path: &Path) -> Result<BTreeSet<Vec<u8>>, ImageError> {
    match fs::read(path) {
        Ok(text) => Ok(text.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(io_error("reading", path, error)),
    }
}

/// A layer, as far as its directories are concerned.
struct Layer {
    diff: PathBuf,
    implied: BTreeSet<Vec<u8>>,
    /// Those with whiteouts.
    hiding: BTreeSet<Vec<u8>>,
}

/// What a layer has at a path.
enum Found {
    Directory {
        inode: Inode,
        /// Its parents hide lower layers.
        hides: bool,
        /// It hides lower layers itself.
        opaque: bool,
    },
    /// Nothing, and lower layers show through.
    Nothing,
    /// Something else, or nothing with lower layers hidden.
    End,
}

impl Inner {
    /// Puts a layer on top of `layers` (topmost first) if directories of theirs
    /// would show wrong attributes. The lock keeps that layer.
    pub(super) fn set_right(
        &self,
        layers: &mut Vec<String>,
        image: &ImageRef,
        work: &Work<'_>,
    ) -> Result<Option<FileLock>, ImageError> {
        let mut stack = Vec::with_capacity(layers.len());
        for id in layers.iter() {
            let layer = self.layout.layer(id);
            stack.push(Layer {
                diff: self.layout.diff(id),
                implied: read_notes(&layer.join(IMPLIED))?,
                hiding: read_notes(&layer.join(HIDING))?,
            });
        }
        let wrong = wrong_directories(&stack, self.marks)
            .map_err(|e| io_error("reading", &self.layout.dir("layers"), e.into()))?;
        if wrong.is_empty() {
            return Ok(None);
        }
        let id = digest(&wrong);
        let stay = self.layout.stay_lock(&id);
        let stay = self.wait(&stay, Sharing::Shared, image, work)?;
        if !self.layout.diff(&id).is_dir() {
            let tmp = self.layout.dir("tmp");
            let made = TempDir::new(&tmp)
                .and_then(|made| {
                    write_layer(&made.path().join("diff"), &wrong)?;
                    Ok(made)
                })
                .map_err(|e| io_error("making", &tmp, e))?;
            self.publish_layer(
                &made,
                &LayerRecord {
                    diff_id: id.clone(),
                    bytes: 4096 * wrong.len() as u64,
                    opaque_root: false,
                    boot: boot_id(),
                    blob: None,
                },
            )?;
        }
        layers.insert(0, id);
        Ok(Some(stay))
    }
}

/// Directories that would show wrong, with the right attributes, and the
/// directories on the way to them.
fn wrong_directories(stack: &[Layer], marks: Marks) -> Result<BTreeMap<Vec<u8>, Inode>, Errno> {
    let candidates: BTreeSet<&Vec<u8>> = stack
        .iter()
        .flat_map(|layer| layer.implied.iter().chain(&layer.hiding))
        .filter(|path| path.len() <= MAX_PATH)
        .collect();
    let mut wrong = BTreeMap::new();
    for path in candidates {
        let (shown, right) = look(stack, path)?;
        if let (Some(shown), Some(right)) = (shown, right)
            && (!same(&shown, &right, marks) || lists_whiteouts(stack, path)?)
        {
            for parent in ancestors(path) {
                let (_, inode) = look(stack, &parent)?;
                if let Some(inode) = inode {
                    wrong.entry(parent).or_insert(inode);
                }
            }
            wrong.insert(path.clone(), right);
        }
    }
    Ok(wrong)
}

/// The attributes a directory shows, and those it should show.
fn look(stack: &[Layer], path: &[u8]) -> Result<(Option<Inode>, Option<Inode>), Errno> {
    let mut shown = None;
    for layer in stack {
        match find(&layer.diff, path)? {
            Found::Nothing => {}
            Found::End => break,
            Found::Directory { inode, hides, .. } => {
                if !layer.implied.contains(path) {
                    let right = Inode {
                        stat: inode.stat,
                        xattrs: inode.xattrs.clone(),
                    };
                    return Ok((shown.or(Some(inode)), Some(right)));
                }
                shown.get_or_insert(inode);
                if hides {
                    break;
                }
            }
        }
    }
    // Nobody describes it: the guess stands.
    let right = shown.as_ref().map(|inode| Inode {
        stat: inode.stat,
        xattrs: inode.xattrs.clone(),
    });
    Ok((shown, right))
}

/// Whether a directory is in one layer only, and that one has whiteouts in it.
/// (The root is in every layer.)
fn lists_whiteouts(stack: &[Layer], path: &[u8]) -> Result<bool, Errno> {
    let mut only = None;
    for layer in stack {
        match find(&layer.diff, path)? {
            Found::Nothing => {}
            Found::End => break,
            Found::Directory { hides, opaque, .. } => {
                if only.replace(layer).is_some() {
                    return Ok(false);
                }
                if hides || opaque {
                    break;
                }
            }
        }
    }
    Ok(!path.is_empty() && only.is_some_and(|layer| layer.hiding.contains(path)))
}

fn find(diff: &Path, path: &[u8]) -> Result<Found, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut here = rustix::fs::openat(CWD, diff, flags, Mode::empty())?;
    let mut hides = false;
    for name in path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
    {
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        hides |= is_opaque(&here)?;
        here = match open_dir_at(&here, &name) {
            Ok(fd) => fd,
            Err(Errno::NOENT) if hides => return Ok(Found::End),
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            // A plain user may not look into it: its attributes stay.
            Err(Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => return Ok(Found::End),
            Err(error) => return Err(error),
        };
    }
    let stat = rustix::fs::fstat(&here)?;
    let mut inode = Inode::read(&here, &stat)?;
    inode.xattrs.retain(|(name, _)| !is_overlay_attribute(name));
    Ok(Found::Directory {
        inode,
        hides,
        opaque: is_opaque(&here)?,
    })
}

fn same(one: &Inode, other: &Inode, marks: Marks) -> bool {
    let owner = |inode: &Inode| (inode.stat.st_uid, inode.stat.st_gid);
    one.stat.st_mode == other.stat.st_mode
        && (marks == Marks::User || owner(one) == owner(other))
        && one.xattrs == other.xattrs
}

/// The directories above a path, the root first.
fn ancestors(path: &[u8]) -> Vec<Vec<u8>> {
    if path.is_empty() {
        return Vec::new();
    }
    let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
    std::iter::once(Vec::new())
        .chain(slashes.map(|(at, _)| path[..at].to_vec()))
        .collect()
}

fn digest(directories: &BTreeMap<Vec<u8>, Inode>) -> String {
    let mut hash = Sha256::new();
    let mut field = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    field(b"directories set right, version 1");
    for (path, inode) in directories {
        let stat = &inode.stat;
        field(path);
        let numbers = format!(
            "{:o} {} {} {}.{}",
            stat.st_mode, stat.st_uid, stat.st_gid, stat.st_mtime, stat.st_mtime_nsec
        );
        field(numbers.as_bytes());
        for (name, value) in &inode.xattrs {
            field(name.to_bytes());
            field(value);
        }
    }
    format!("sha256:{}", crate::image::hex(&hash.finalize()))
}

/// Makes the directories; each parent comes before what is in it. Attributes
/// are given in the opposite order.
fn write_layer(diff: &Path, directories: &BTreeMap<Vec<u8>, Inode>) -> io::Result<()> {
    let at = |path: &[u8]| diff.join(OsStr::from_bytes(path));
    rustix::fs::mkdir(diff, Mode::RWXU)?;
    for path in directories.keys().filter(|path| !path.is_empty()) {
        rustix::fs::mkdir(at(path), Mode::RWXU)?;
    }
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    for (path, inode) in directories.iter().rev() {
        let fd = rustix::fs::openat(CWD, at(path), flags, Mode::empty())?;
        copy_attributes(&fd, inode)?;
    }
    Ok(())
}
