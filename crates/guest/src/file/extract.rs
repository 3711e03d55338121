//! Unpacking tar streams, as an enemy would write them.
//!
//! Entries stay below the target directory; regular files, directories,
//! symbolic and hard links are made, anything else is refused. Modes and times
//! are kept; what is made belongs to the guest's user.

use super::beneath::{Place, Root, clear, is_directory};
use super::error::{FileError, failed};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};
use skyrl_protocol::guest::TarSummary;
use std::cell::Cell;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tar::{Archive, EntryType, Header};

/// Most bytes of names and attributes of one entry; the library holds them in
/// memory.
const MAX_METADATA: u64 = 1 << 20;

/// Directories whose mode and time are set last, since writing into them needs
/// and changes these.
const MAX_LATE: usize = 100_000;

/// Lets through as many bytes as it is told to.
struct Metered<'r> {
    reader: &'r mut dyn Read,
    allowance: Rc<Cell<u64>>,
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let allowed = usize::try_from(self.allowance.get()).unwrap_or(usize::MAX);
        if allowed == 0 && !buffer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an entry's name and attributes are too long",
            ));
        }
        let most = buffer.len().min(allowed);
        let count = self.reader.read(&mut buffer[..most])?;
        self.allowance.set(self.allowance.get() - count as u64);
        Ok(count)
    }
}

/// A directory whose mode and time are still to be set.
struct Late {
    path: PathBuf,
    mode: u32,
    modified: i64,
}

/// Unpacks a tar stream into a directory, which is made if missing.
///
/// # Errors
/// At the first entry that is malformed, refused or can't be written; what
/// came before it stays.
pub fn extract(stream: &mut dyn Read, target: &Path) -> Result<TarSummary, FileError> {
    std::fs::create_dir_all(target).map_err(failed("make directory", target))?;
    let root = Root::open(target).map_err(failed("unpack into", target))?;
    let allowance = Rc::new(Cell::new(MAX_METADATA));
    let mut archive = Archive::new(Metered {
        reader: stream,
        allowance: Rc::clone(&allowance),
    });
    let mut summary = TarSummary::default();
    let mut late = Vec::new();
    let malformed =
        |error: io::Error| FileError::rule("unpack into", target, format!("bad tar: {error}"));
    let mut entries = archive.entries().map_err(malformed)?;
    loop {
        allowance.set(MAX_METADATA);
        let Some(entry) = entries.next() else {
            break;
        };
        let mut entry = entry.map_err(malformed)?;
        allowance.set(u64::MAX);
        let path = entry.path().map_err(malformed)?.into_owned();
        let link = entry
            .link_name()
            .map_err(malformed)?
            .map(|l| l.into_owned());
        let header = entry.header().clone();
        let written = unpack(
            &root,
            &path,
            &header,
            link.as_deref(),
            &mut entry,
            &mut late,
        )
        .map_err(failed("unpack", &path))?;
        if let Some(bytes) = written {
            summary.entries += 1;
            summary.bytes += bytes;
        }
    }
    // Deepest first: an outer one may forbid entering.
    for directory in late.iter().rev() {
        settle(&root, directory).map_err(failed("set the mode of", &directory.path))?;
    }
    Ok(summary)
}

/// Makes one entry; its bytes of content, or nothing for what is no file.
fn unpack(
    root: &Root,
    path: &Path,
    header: &Header,
    link: Option<&Path>,
    content: &mut dyn Read,
    late: &mut Vec<Late>,
) -> io::Result<Option<u64>> {
    let kind = entry_type(header, path);
    if matches!(kind, EntryType::XGlobalHeader) {
        return Ok(None);
    }
    let mode = header.mode()? & 0o7777;
    let modified = i64::try_from(header.mtime()?).unwrap_or(0);
    let Some(place) = root.place(path, true)? else {
        // "./": the target itself, whose mode is its owner's business.
        return match kind {
            EntryType::Directory => Ok(Some(0)),
            _ => Err(refused("it has no name")),
        };
    };
    match kind {
        EntryType::Directory => {
            make_directory(root, &place, path)?;
            let directory = Late {
                path: path.to_owned(),
                mode,
                modified,
            };
            if late.len() < MAX_LATE {
                late.push(directory);
            } else {
                settle(root, &directory)?;
            }
            Ok(Some(0))
        }
        EntryType::Regular | EntryType::Continuous => {
            clear(&place)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let private = Mode::from_raw_mode(0o600);
            let fd = rustix::fs::openat(place.dir(), &place.name, flags, private)?;
            let mut file = File::from(fd);
            let bytes = copy(content, &mut file)?;
            file.set_permissions(Permissions::from_mode(mode))?;
            rustix::fs::futimens(&file, &times(modified))?;
            Ok(Some(bytes))
        }
        EntryType::Symlink => {
            let target = link.ok_or_else(|| refused("it links to nothing"))?;
            clear(&place)?;
            rustix::fs::symlinkat(target, place.dir(), &place.name)?;
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(place.dir(), &place.name, &times(modified), flags)?;
            Ok(Some(0))
        }
        EntryType::Link => {
            let target = link.ok_or_else(|| refused("it links to nothing"))?;
            let source = root
                .place(target, false)?
                .ok_or_else(|| refused("it links to a directory"))?;
            clear(&place)?;
            // Without following: a link to a link outside gives another link.
            rustix::fs::linkat(
                source.dir(),
                &source.name,
                place.dir(),
                &place.name,
                AtFlags::empty(),
            )?;
            Ok(Some(0))
        }
        EntryType::Char | EntryType::Block => Err(refused("it is a device")),
        EntryType::Fifo => Err(refused("it is a FIFO")),
        // Its holes may be of any size; writing them would never end.
        EntryType::GNUSparse => Err(refused("it is a sparse file")),
        other => Err(refused(&format!(
            "its type {:?} is not supported",
            char::from(other.as_byte())
        ))),
    }
}

/// Archives older than the directory type mark one by a slash at the end.
fn entry_type(header: &Header, path: &Path) -> EntryType {
    let slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let is_ancient = header.as_ustar().is_none() && header.as_gnu().is_none();
    match header.entry_type() {
        EntryType::Regular if slash && is_ancient => EntryType::Directory,
        kind => kind,
    }
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

/// Makes a directory; one that is there stays, also behind a link that stays
/// inside. Anything else in its place goes.
fn make_directory(root: &Root, place: &Place, path: &Path) -> io::Result<()> {
    match root.directory_at(path, true) {
        Ok(_) => Ok(()),
        Err(_) if !is_directory(place) => {
            clear(place)?;
            rustix::fs::mkdirat(place.dir(), &place.name, Mode::from_raw_mode(0o755))?;
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn settle(root: &Root, late: &Late) -> io::Result<()> {
    // An entry after it may have put something else in its place.
    let Ok(directory) = root.directory_at(&late.path, false) else {
        return Ok(());
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(&directory, ".", flags, Mode::empty())?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(late.mode))?;
    rustix::fs::futimens(&fd, &times(late.modified))?;
    Ok(())
}

fn times(modified: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: modified,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn copy(from: &mut dyn Read, to: &mut File) -> io::Result<u64> {
    let mut buffer = vec![0; 64 * 1024];
    let mut copied = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                copied += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use tar::Builder;

    /// A tar with names and links as they are, however evil.
    struct Evil(Vec<u8>);

    impl Evil {
        fn new() -> Self {
            Self(Vec::new())
        }

        fn add(mut self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Self {
            let mut header = Header::new_gnu();
            let fields = header.as_old_mut();
            fields.name[..name.len()].copy_from_slice(name.as_bytes());
            fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(kind);
            header.set_mode(0o644);
            header.set_mtime(1_000_000_000);
            header.set_size(content.len() as u64);
            header.set_cksum();
            self.0.extend_from_slice(header.as_bytes());
            self.0.extend_from_slice(content);
            self.0.resize(self.0.len().next_multiple_of(512), 0);
            self
        }

        fn unpack(&self, target: &Path) -> Result<TarSummary, FileError> {
            extract(&mut self.0.as_slice(), target)
        }
    }

    /// A directory `in` to unpack into, and a file `outside` beside it.
    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (target, outside) = (dir.path().join("in"), dir.path().join("outside"));
        fs::create_dir(&target).unwrap();
        fs::write(&outside, "precious").unwrap();
        (dir, target, outside)
    }

    #[test]
    fn names_that_leave_the_target_are_refused() {
        let (_dir, target, outside) = place();
        for name in ["../outside", "a/../../outside", "/tmp/skyrl-slip", ".."] {
            let evil = Evil::new().add(EntryType::Regular, name, "", b"evil");
            let error = evil.unpack(&target).unwrap_err().to_string();
            assert!(error.contains("path"), "{error}");
        }
        assert_eq!(fs::read_to_string(&outside).unwrap(), "precious");
        assert!(!Path::new("/tmp/skyrl-slip").exists());
    }

    #[test]
    fn links_made_by_the_archive_lead_nowhere_outside() {
        let (dir, target, outside) = place();
        let up = dir.path().to_str().unwrap();
        let mode = fs::metadata(dir.path()).unwrap().mode();
        for link in ["..", up, "/", "a/../../../x"] {
            let evil = Evil::new().add(EntryType::Symlink, "link", link, b"").add(
                EntryType::Regular,
                "link/outside",
                "",
                b"evil",
            );
            assert!(evil.unpack(&target).is_err(), "through {link}");
        }
        // A file in a link's place replaces the link.
        Evil::new()
            .add(EntryType::Symlink, "f", "../outside", b"")
            .add(EntryType::Regular, "f", "", b"evil")
            .unpack(&target)
            .unwrap();
        assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "evil");
        // So does a directory.
        Evil::new()
            .add(EntryType::Symlink, "d", "..", b"")
            .add(EntryType::Directory, "d", "", b"")
            .add(EntryType::Regular, "d/outside", "", b"evil")
            .unpack(&target)
            .unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "precious");
        assert_eq!(fs::metadata(dir.path()).unwrap().mode(), mode);
    }

    #[test]
    fn hard_links_reach_only_what_is_inside() {
        let (_dir, target, outside) = place();
        for link in ["../outside", outside.to_str().unwrap()] {
            let evil = Evil::new().add(EntryType::Link, "h", link, b"");
            assert!(evil.unpack(&target).is_err(), "{link}");
        }
        Evil::new()
            .add(EntryType::Symlink, "s", "../outside", b"")
            .add(EntryType::Link, "h", "s", b"")
            .add(EntryType::Regular, "h", "", b"evil")
            .unpack(&target)
            .unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "precious");
        Evil::new()
            .add(EntryType::Regular, "one", "", b"1")
            .add(EntryType::Link, "two", "one", b"")
            .unpack(&target)
            .unwrap();
        assert_eq!(fs::metadata(target.join("two")).unwrap().nlink(), 2);
    }

    #[test]
    fn devices_fifos_and_nameless_files_are_refused() {
        let (_dir, target, _) = place();
        for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo] {
            assert!(Evil::new().add(kind, "x", "", b"").unpack(&target).is_err());
        }
        assert!(
            Evil::new()
                .add(EntryType::Regular, "./", "", b"x")
                .unpack(&target)
                .is_err()
        );
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    }

    #[test]
    fn endless_names_are_refused_before_they_fill_the_memory() {
        let (_dir, target, _) = place();
        let long = vec![b'a'; 2 << 20];
        for kind in [
            EntryType::GNULongName,
            EntryType::GNULongLink,
            EntryType::XHeader,
        ] {
            let evil = Evil::new()
                .add(kind, "x", "", &long)
                .add(EntryType::Regular, "x", "", b"");
            let error = evil.unpack(&target).unwrap_err().to_string();
            assert!(error.contains("too long"), "{error}");
        }
    }

    #[test]
    fn links_inside_the_target_are_followed_wherever_they_were_made() {
        let (_dir, target, _) = place();
        fs::create_dir_all(target.join("usr/lib")).unwrap();
        symlink("usr/lib", target.join("lib")).unwrap();
        symlink(target.join("usr"), target.join("u")).unwrap();
        Evil::new()
            .add(EntryType::Directory, "lib", "", b"")
            .add(EntryType::Regular, "lib/a", "", b"1")
            .add(EntryType::Regular, "u/lib/b", "", b"2")
            .unpack(&target)
            .unwrap();
        assert!(target.join("usr/lib/a").exists() && target.join("usr/lib/b").exists());
        assert!(target.join("lib").is_symlink());
    }

    #[test]
    fn modes_times_and_long_names_survive() {
        let (dir, target, _) = place();
        let source = dir.path().join("source");
        let deep = source.join("d".repeat(120)).join("e".repeat(120));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("run"), "#!").unwrap();
        fs::set_permissions(deep.join("run"), Permissions::from_mode(0o4755)).unwrap();
        fs::set_permissions(&deep, Permissions::from_mode(0o550)).unwrap();
        symlink("nowhere", source.join("s")).unwrap();
        let mut bytes = Vec::new();
        crate::file::archive(&source, &mut bytes).unwrap();
        let summary = extract(&mut bytes.as_slice(), &target).unwrap();
        assert_eq!((summary.entries, summary.bytes), (5, 2));
        let copy = target.join(deep.strip_prefix(&source).unwrap());
        assert_eq!(fs::metadata(&copy).unwrap().mode() & 0o7777, 0o550);
        let (old, new) = (
            fs::metadata(deep.join("run")).unwrap(),
            fs::metadata(copy.join("run")).unwrap(),
        );
        assert_eq!((new.mode(), new.mtime()), (old.mode(), old.mtime()));
        assert_eq!(
            fs::read_link(target.join("s")).unwrap(),
            Path::new("nowhere")
        );
    }

    #[test]
    fn a_cut_stream_is_an_error() {
        let (_dir, target, _) = place();
        let whole = Evil::new().add(EntryType::Regular, "a", "", &[1; 3000]);
        for length in [100, 512, 1000, 3000] {
            let cut = extract(&mut &whole.0[..length], &target);
            assert!(cut.is_err(), "{length}");
        }
        let mut empty = Builder::new(Vec::new());
        empty.finish().unwrap();
        let bytes = empty.into_inner().unwrap();
        assert_eq!(extract(&mut bytes.as_slice(), &target).unwrap().entries, 0);
    }
}
