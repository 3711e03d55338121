//! Unpacks one layer into a directory in the form overlayfs stacks.
//!
//! Refused, naming the entry: absolute paths, `..`, entries that go through a
//! symbolic link or through what is not a directory, hard links to what the
//! layer does not hold or to directories, whiteouts of nothing (`.wh.`), of
//! `.` or `..`, entries below a whiteout, kinds of entries that are not files,
//! archives that are cut off or have wrong checksums, and everything beyond
//! the given bounds.
//!
//! Kept: content with its holes, modes (setuid and the like too), times,
//! symbolic and hard links, FIFOs, `user.*` attributes; as root also owners,
//! `security.capability` and POSIX access lists. Without privileges every
//! file belongs to the unpacking user, and capabilities and access lists are
//! left out, which the count of dropped attributes tells. Always left out:
//! attributes that overlay file systems or security modules give a meaning of
//! their own, and devices: a sandbox gets its devices from its engine.
//!
//! An entry that comes twice is replaced by its later form. Whiteouts hide
//! what lower layers have, never what the same layer brings.

use super::dirs::{Attributes, DirectoryPlan, Dirs};
use super::names::{LayerPath, Request, request, request_target, show};
use super::tar::{TarEntry, TarKind, TarReader};
use crate::image::layout::Marks;
use crate::tree::{is_whiteout, stat_entry};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Entries of a layer.
const MAX_ENTRIES: u64 = 4_000_000;
/// What an entry takes beside its content.
const ENTRY_COST: u64 = 4096;
/// Apparent size of a file.
const MAX_FILE: u64 = 1 << 43;
/// Zeros of this length become holes.
const HOLE: usize = 1 << 16;

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// It is not what a layer must be.
    #[error("{0}")]
    Broken(String),
    /// It passes a bound.
    #[error("{0}")]
    TooLarge(String),
    /// This file system or kernel can't hold it.
    #[error("{0}")]
    Unsupported(String),
    /// The caller gave up.
    #[error("unpacking was stopped")]
    Stopped,
    /// The file system failed.
    #[error("{step} {path}: {source}", path = .path.display())]
    Io {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl LayerError {
    pub(super) fn step(step: &'static str, path: &LayerPath, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        if source.raw_os_error() == Some(libc::ENAMETOOLONG) {
            return Self::Broken(format!(
                "entry {path} has a name too long for this file system"
            ));
        }
        Self::Io {
            step,
            path: path.to_string().into(),
            source,
        }
    }

    /// A failure to read the stream: the disk's if the system says so, else
    /// the stream's own.
    pub(crate) fn reading(error: io::Error) -> Self {
        if error.raw_os_error().is_some() {
            Self::Io {
                step: "reading",
                path: "the layer's archive".into(),
                source: error,
            }
        } else {
            Self::Broken(error.to_string())
        }
    }
}

/// Bounds and habits of unpacking.
pub(crate) struct UnpackOptions<'a> {
    /// How opaque directories are marked, and whether owners are kept.
    pub(crate) marks: Marks,
    /// Told before bytes are taken from the stream; refuses when there were
    /// too many.
    pub(crate) spend: &'a (dyn Fn(u64) -> Result<(), LayerError> + Sync),
    /// Ends the work when set.
    pub(crate) stop: &'a AtomicBool,
}

/// What became of a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Its root hides everything below.
    pub(crate) opaque_root: bool,
    /// Entries of the archive.
    pub(crate) entries: u64,
    /// Devices left out.
    pub(crate) devices: u64,
    /// Extended attributes left out.
    pub(crate) dropped_xattrs: u64,
    /// Directories whose attributes lower layers tell, if they have them.
    pub(crate) implied: Vec<Vec<u8>>,
    /// Directories with whiteouts.
    pub(crate) hiding: Vec<Vec<u8>>,
}

/// Unpacks a tar stream into `diff`, which does not exist yet. After an error
/// the caller removes it. The stream is read to its end.
pub(crate) fn unpack(
    stream: impl Read,
    diff: &Path,
    options: &UnpackOptions<'_>,
) -> Result<Unpacked, LayerError> {
    let made = rustix::fs::mkdir(diff, Mode::RWXU).and_then(|()| {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat(CWD, diff, flags, Mode::empty())
    });
    let root = made.map_err(|source| LayerError::Io {
        step: "making",
        path: diff.to_owned(),
        source: source.into(),
    })?;
    let mut unpacker = Unpacker {
        dirs: Dirs::new(root),
        options,
        done: Unpacked::default(),
        buffer: vec![0; 4 * HOLE],
    };
    let mut tar = TarReader::new(stream);
    let mut counted = 0;
    while let Some(entry) = tar.next_entry().map_err(LayerError::reading)? {
        (options.spend)(tar.position() - counted)?;
        unpacker.check_bounds()?;
        unpacker.entry(entry, &mut tar)?;
        // Data is counted as it is written.
        counted = tar.position();
    }
    unpacker.finish()?;
    drain(tar.into_inner(), options)?;
    Ok(unpacker.done)
}

/// Reads what follows the archive, so that its digest covers all of it.
fn drain(mut stream: impl Read, options: &UnpackOptions<'_>) -> Result<(), LayerError> {
    let mut buffer = vec![0; HOLE];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => (options.spend)(count as u64)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(LayerError::reading(error)),
        }
    }
}

struct Unpacker<'a> {
    dirs: Dirs,
    options: &'a UnpackOptions<'a>,
    done: Unpacked,
    buffer: Vec<u8>,
}

impl Unpacker<'_> {
    fn check_bounds(&mut self) -> Result<(), LayerError> {
        self.done.entries += 1;
        (self.options.spend)(ENTRY_COST)?;
        if self.options.stop.load(Ordering::Relaxed) {
            return Err(LayerError::Stopped);
        }
        if self.done.entries > MAX_ENTRIES {
            return Err(LayerError::TooLarge(format!(
                "a layer has more than {MAX_ENTRIES} entries"
            )));
        }
        Ok(())
    }

    fn entry<R: Read>(
        &mut self,
        entry: TarEntry,
        tar: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        match request(&entry.path)? {
            Request::Ignored => Ok(()),
            Request::Root => {
                if entry.kind != TarKind::Directory {
                    return Err(LayerError::Broken(format!(
                        "entry {} is the root, but not a directory",
                        show(&entry.path)
                    )));
                }
                let attributes = self.attributes(&entry)?;
                let plan = self.dirs.made.entry(LayerPath::root()).or_default();
                plan.attributes = attributes;
                plan.implied = false;
                Ok(())
            }
            Request::Opaque(dir) => {
                self.dirs.make(&dir)?;
                self.dirs.made.entry(dir).or_default().opaque = true;
                Ok(())
            }
            Request::Whiteout(parent, name) => self.whiteout(&parent, &name),
            Request::Entry(parent, name) => self.put(&parent, &name, &entry, tar),
        }
    }

    fn whiteout(&mut self, parent: &LayerPath, name: &CString) -> Result<(), LayerError> {
        let path = parent.join(name.clone());
        let dir = self.dirs.make(parent)?;
        match stat_entry(dir, name) {
            Err(Errno::NOENT) => {
                make_whiteout(dir, name).map_err(|error| match error {
                    Errno::PERM | Errno::ACCESS => LayerError::Unsupported(format!(
                        "this kernel does not let a plain user make the whiteout {path}"
                    )),
                    error => LayerError::step("making the whiteout", &path, error),
                })?;
                self.dirs.made.entry(parent.clone()).or_default().hiding = true;
                Ok(())
            }
            // The layer brings this directory anew.
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                let plan = self.dirs.made.entry(path).or_default();
                plan.opaque = true;
                plan.implied = false;
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(LayerError::step("reading", &path, error)),
        }
    }

    fn put<R: Read>(
        &mut self,
        parent: &LayerPath,
        name: &CString,
        entry: &TarEntry,
        tar: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let path = parent.join(name.clone());
        let attributes = self.attributes(entry)?;
        let dir = self.dirs.make(parent)?;
        let present = match stat_entry(dir, name) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(LayerError::step("reading", &path, error)),
        };
        let is_directory = |mode| FileType::from_raw_mode(mode) == FileType::Directory;
        let mut opaque = false;
        if let Some(stat) = &present {
            if entry.kind == TarKind::Directory && is_directory(stat.st_mode) {
                let plan = self.dirs.made.entry(path).or_default();
                plan.attributes = attributes;
                plan.implied = false;
                return Ok(());
            }
            if entry.kind == TarKind::HardLink && self.is_itself(entry, &path)? {
                return Ok(());
            }
            // What stood here hid whatever lower layers have.
            opaque = !is_directory(stat.st_mode);
            self.dirs.remove(parent, name, stat)?;
        }
        match entry.kind {
            TarKind::Directory => {
                self.dirs.make(&path)?;
                let plan = DirectoryPlan {
                    attributes,
                    opaque,
                    ..DirectoryPlan::default()
                };
                self.dirs.made.insert(path, plan);
                Ok(())
            }
            TarKind::File => self.file(parent, name, entry, &attributes, tar),
            TarKind::HardLink => self.hard_link(parent, name, entry),
            TarKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > 4095 {
                    return Err(LayerError::Broken(format!(
                        "link {path} has no valid target"
                    )));
                }
                let dir = self.dirs.make(parent)?;
                rustix::fs::symlinkat(entry.link.as_slice(), dir, name)
                    .map_err(|e| LayerError::step("making", &path, e))?;
                self.set_by_name(parent, name, &attributes)
            }
            TarKind::Fifo => {
                let dir = self.dirs.make(parent)?;
                let mode = Mode::from_raw_mode(attributes.mode);
                rustix::fs::mknodat(dir, name, FileType::Fifo, mode, 0)
                    .and_then(|()| rustix::fs::chmodat(dir, name, mode, AtFlags::empty()))
                    .map_err(|e| LayerError::step("making", &path, e))?;
                self.set_by_name(parent, name, &attributes)
            }
            TarKind::Device => {
                self.done.devices += 1;
                Ok(())
            }
            TarKind::Unknown(kind) => Err(LayerError::Broken(format!(
                "entry {path} is of the unknown kind {:?}",
                char::from(kind)
            ))),
        }
    }

    fn is_itself(&self, entry: &TarEntry, path: &LayerPath) -> Result<bool, LayerError> {
        Ok(LayerPath::parse_target(&entry.link)? == *path)
    }

    fn hard_link(
        &mut self,
        parent: &LayerPath,
        name: &CString,
        entry: &TarEntry,
    ) -> Result<(), LayerError> {
        let path = parent.join(name.clone());
        let refuse = |why: &str| {
            LayerError::Broken(format!(
                "entry {path} is a hard link to {}, {why}",
                show(&entry.link)
            ))
        };
        let Request::Entry(target_parent, target_name) = request_target(&entry.link)? else {
            return Err(refuse("which is not a file"));
        };
        let from = self.dirs.open(&target_parent)?;
        match stat_entry(&from, &target_name) {
            Err(Errno::NOENT) => return Err(refuse("which the layer does not hold")),
            Err(error) => return Err(LayerError::step("reading", &path, error)),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(refuse("which is a directory"));
            }
            Ok(stat) if is_whiteout(&stat) => return Err(refuse("which is a whiteout")),
            Ok(_) => {}
        }
        let dir = self.dirs.make(parent)?;
        rustix::fs::linkat(&from, &target_name, dir, name, AtFlags::empty())
            .map_err(|e| LayerError::step("linking", &path, e))
    }

    fn file<R: Read>(
        &mut self,
        parent: &LayerPath,
        name: &CString,
        entry: &TarEntry,
        attributes: &Attributes,
        tar: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let path = parent.join(name.clone());
        if entry.size > MAX_FILE {
            return Err(LayerError::TooLarge(format!(
                "file {path} has {} bytes",
                entry.size
            )));
        }
        let failed = |error: Errno| LayerError::step("writing", &path, error);
        let dir = self.dirs.make(parent)?;
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        let mut end = 0;
        for (offset, length) in &entry.pieces {
            let mut at = *offset;
            let mut left = *length;
            while left > 0 {
                let wanted = usize::try_from(left)
                    .unwrap_or(usize::MAX)
                    .min(self.buffer.len());
                let count = fill(tar, &mut self.buffer[..wanted])?;
                (self.options.spend)(count as u64)?;
                if self.options.stop.load(Ordering::Relaxed) {
                    return Err(LayerError::Stopped);
                }
                for chunk in self.buffer[..count].chunks(HOLE) {
                    if chunk.len() < HOLE || chunk.iter().any(|byte| *byte != 0) {
                        write_at(&file, chunk, at).map_err(failed)?;
                        end = at + chunk.len() as u64;
                    }
                    at += chunk.len() as u64;
                }
                left -= count as u64;
            }
        }
        if end < entry.size {
            rustix::fs::ftruncate(&file, entry.size).map_err(failed)?;
        }
        self.set_open(&file, attributes, &path)
    }

    /// Attributes of an open file or directory, in the order that keeps them:
    /// `user.*` needs a writable mode, changing the owner clears setuid and
    /// capabilities.
    fn set_open(
        &mut self,
        file: &OwnedFd,
        attributes: &Attributes,
        path: &LayerPath,
    ) -> Result<(), LayerError> {
        let failed = |error: Errno| LayerError::step("setting attributes of", path, error);
        let late = |name: &CStr| name.to_bytes() == b"security.capability";
        for (name, value) in attributes.xattrs.iter().filter(|(name, _)| !late(name)) {
            self.set_xattr(file, name, value).map_err(failed)?;
        }
        if self.options.marks == Marks::Trusted {
            let (uid, gid) = owner(attributes);
            rustix::fs::fchown(file, uid, gid).map_err(failed)?;
        }
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode)).map_err(failed)?;
        for (name, value) in attributes.xattrs.iter().filter(|(name, _)| late(name)) {
            self.set_xattr(file, name, value).map_err(failed)?;
        }
        rustix::fs::futimens(file, &times(attributes)).map_err(failed)
    }

    /// Attributes of what can't be opened.
    fn set_by_name(
        &mut self,
        parent: &LayerPath,
        name: &CString,
        attributes: &Attributes,
    ) -> Result<(), LayerError> {
        self.done.dropped_xattrs += attributes.xattrs.len() as u64;
        let keep_owner = self.options.marks == Marks::Trusted;
        let dir = self.dirs.make(parent)?;
        let set = || -> Result<(), Errno> {
            if keep_owner {
                let (uid, gid) = owner(attributes);
                rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            rustix::fs::utimensat(dir, name, &times(attributes), AtFlags::SYMLINK_NOFOLLOW)
        };
        set().map_err(|e| LayerError::step("setting attributes of", &parent.join(name.clone()), e))
    }

    fn set_xattr(&mut self, file: &OwnedFd, name: &CStr, value: &[u8]) -> Result<(), Errno> {
        match rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()) {
            Ok(()) => Ok(()),
            // The file system has no room or no place for them.
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::TOOBIG | Errno::RANGE | Errno::INVAL) => {
                self.done.dropped_xattrs += 1;
                Ok(())
            }
            Err(Errno::NOSPC) if value.len() > 1024 => {
                self.done.dropped_xattrs += 1;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn attributes(&mut self, entry: &TarEntry) -> Result<Attributes, LayerError> {
        let id = |id: u64| {
            u32::try_from(id)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| {
                    LayerError::Broken(format!("entry {} has the owner {id}", show(&entry.path)))
                })
        };
        let mut xattrs = Vec::new();
        for (name, value) in &entry.xattrs {
            match CString::new(name.as_slice()) {
                Ok(name) if is_kept(name.to_bytes(), self.options.marks) => {
                    xattrs.push((name, value.clone()));
                }
                _ => self.done.dropped_xattrs += 1,
            }
        }
        Ok(Attributes {
            mode: entry.mode,
            uid: id(entry.uid)?,
            gid: id(entry.gid)?,
            mtime: entry.mtime,
            xattrs,
        })
    }

    /// Gives the directories their attributes, the inner ones first: an outer
    /// one may become unreadable.
    fn finish(&mut self) -> Result<(), LayerError> {
        let made = std::mem::take(&mut self.dirs.made);
        let mut hiding: Option<&LayerPath> = None;
        let mut clear = Vec::new();
        for (path, plan) in &made {
            let is_hidden = hiding.is_some_and(|hiding| path.starts_with(hiding));
            if plan.implied && !is_hidden {
                self.done.implied.push(path.to_bytes());
            }
            if plan.hiding && !is_hidden && !plan.opaque {
                self.done.hiding.push(path.to_bytes());
            }
            if hiding.is_some_and(|hiding| !path.starts_with(hiding)) {
                hiding = None;
            }
            if plan.opaque && hiding.is_none() {
                hiding = Some(path);
            }
            if hiding.is_some() {
                clear.push(path);
            }
        }
        // Where nothing shows through from below, whiteouts hide nothing, and
        // overlayfs would list them as entries that can't be looked up.
        for path in clear {
            let fd = self.dirs.open(path)?;
            remove_whiteouts(&fd).map_err(|e| LayerError::step("clearing", path, e))?;
        }
        for (path, plan) in made.iter().rev() {
            let fd = self.dirs.open(path)?;
            if plan.opaque {
                if path.names().is_empty() {
                    self.done.opaque_root = true;
                } else {
                    self.mark_opaque(&fd, path)?;
                }
            }
            self.set_open(&fd, &plan.attributes, path)?;
        }
        Ok(())
    }

    fn mark_opaque(&self, fd: &OwnedFd, path: &LayerPath) -> Result<(), LayerError> {
        let mark = self.options.marks.opaque();
        rustix::fs::fsetxattr(fd, mark, b"y", XattrFlags::empty()).map_err(|error| match error {
            Errno::OPNOTSUPP | Errno::PERM => LayerError::Unsupported(format!(
                "this file system can't mark the directory {path} as opaque (attribute {})",
                mark.to_string_lossy()
            )),
            error => LayerError::step("marking as opaque", path, error),
        })
    }
}

/// Whether an image may set an attribute.
fn is_kept(name: &[u8], marks: Marks) -> bool {
    const MEANT_FOR_OVERLAYS: [&[u8]; 3] = [
        b"user.overlay.",
        b"user.fuseoverlayfs.",
        b"user.containers.",
    ];
    if name.starts_with(b"user.") {
        return !MEANT_FOR_OVERLAYS
            .iter()
            .any(|prefix| name.starts_with(prefix));
    }
    marks == Marks::Trusted
        && matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        )
}

fn make_whiteout(dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    rustix::fs::mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0)
}

fn remove_whiteouts(dir: &OwnedFd) -> Result<(), Errno> {
    let mut entries = Dir::read_from(dir)?;
    while let Some(entry) = entries.read() {
        let entry = entry?;
        if entry.file_type() == FileType::CharacterDevice
            && is_whiteout(&stat_entry(dir, entry.file_name())?)
        {
            rustix::fs::unlinkat(dir, entry.file_name(), AtFlags::empty())?;
        }
    }
    Ok(())
}

fn owner(attributes: &Attributes) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(attributes.uid)),
        Some(Gid::from_raw(attributes.gid)),
    )
}

fn times(attributes: &Attributes) -> Timestamps {
    let stamp = Timespec {
        tv_sec: attributes.mtime.0,
        tv_nsec: i64::from(attributes.mtime.1),
    };
    Timestamps {
        last_access: stamp,
        last_modification: stamp,
    }
}

/// Reads until the buffer is full or the entry ends.
fn fill<R: Read>(tar: &mut TarReader<R>, buffer: &mut [u8]) -> Result<usize, LayerError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match tar
            .read_data(&mut buffer[filled..])
            .map_err(LayerError::reading)?
        {
            0 => break,
            count => filled += count,
        }
    }
    if filled < buffer.len() {
        return Err(LayerError::Broken(
            "a file is shorter than its header says".into(),
        ));
    }
    Ok(filled)
}

fn write_at(file: &OwnedFd, bytes: &[u8], offset: u64) -> Result<(), Errno> {
    let mut written = 0;
    while written < bytes.len() {
        match rustix::io::pwrite(file.as_fd(), &bytes[written..], offset + written as u64) {
            Ok(count) => written += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
