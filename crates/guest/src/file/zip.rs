//! Zip archives: what the older clients upload and download directories as.
//!
//! Unpacked as an enemy would write them: entries stay below the target, and
//! are regular files or directories whatever they claim to be.

use super::beneath::{Root, clear};
use super::error::{FileError, failed};
use rustix::fs::{Mode, OFlags};
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Entries of an archive at most: their names are held in memory.
const MAX_ENTRIES: usize = 1_000_000;

/// Unpacks an archive into a directory, which is made if missing. Returns the
/// number of files.
///
/// # Errors
/// At the first entry that is malformed, refused or can't be written; what
/// came before it stays.
pub fn unzip<R: Read + Seek>(archive: R, target: &Path) -> Result<u64, FileError> {
    fs::create_dir_all(target).map_err(failed("make directory", target))?;
    let root = Root::open(target).map_err(failed("unpack into", target))?;
    let malformed =
        |error: ZipError| FileError::rule("unpack into", target, format!("bad zip: {error}"));
    let mut archive = ZipArchive::new(archive).map_err(malformed)?;
    if archive.len() > MAX_ENTRIES {
        return Err(FileError::rule(
            "unpack into",
            target,
            format!("the archive has more than {MAX_ENTRIES} entries"),
        ));
    }
    let mut files = 0;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(malformed)?;
        let path = PathBuf::from(entry.name().map_err(malformed)?.into_owned());
        if entry.is_dir() {
            root.directory_at(&path, true)
                .map_err(failed("unpack", &path))?;
            continue;
        }
        let mode = entry.unix_mode().unwrap_or(0o644) & 0o777;
        unpack(&root, &path, mode | 0o600, &mut entry).map_err(failed("unpack", &path))?;
        files += 1;
    }
    Ok(files)
}

fn unpack(root: &Root, path: &Path, mode: u32, content: &mut dyn Read) -> io::Result<()> {
    let place = root
        .place(path, true)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no name"))?;
    clear(&place)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let private = Mode::from_raw_mode(0o600);
    let fd = rustix::fs::openat(place.dir(), &place.name, flags, private)?;
    let mut file = File::from(fd);
    io::copy(content, &mut file)?;
    file.set_permissions(Permissions::from_mode(mode))
}

/// Writes all files below a directory as an archive; names are relative to it.
/// Directories and links to directories have no entries; links to files are
/// stored as the files. What vanishes meanwhile or can't be read as a regular
/// file is left out.
///
/// # Errors
/// When the archive can't be written; it is incomplete then.
pub fn zip_directory(path: &Path, out: &mut dyn Write) -> Result<(), FileError> {
    let written = || -> Result<(), ZipError> {
        let mut writer = ZipWriter::new_stream(out);
        // Directories relative to `path` still to be read.
        let mut todo = vec![PathBuf::new()];
        while let Some(directory) = todo.pop() {
            let Ok(entries) = fs::read_dir(path.join(&directory)) else {
                continue;
            };
            let mut names: Vec<_> = entries.flatten().collect();
            names.sort_by_key(fs::DirEntry::file_name);
            for entry in names {
                let relative = directory.join(entry.file_name());
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    todo.push(relative);
                } else if let Some(mut file) = regular_file(&path.join(&relative)) {
                    append(&mut writer, &relative, &mut file)?;
                }
            }
        }
        writer.finish()?;
        Ok(())
    };
    written().map_err(|error| match error {
        ZipError::Io(source) => FileError::new("archive", path, source),
        other => FileError::rule("archive", path, other.to_string()),
    })
}

/// Opens what is a regular file in the end; a FIFO is not waited for.
fn regular_file(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    file.metadata().ok()?.is_file().then_some(file)
}

fn append<W: Write + Seek>(
    writer: &mut ZipWriter<W>,
    name: &Path,
    file: &mut File,
) -> Result<(), ZipError> {
    let metadata = file.metadata()?;
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .unix_permissions(metadata.permissions().mode() & 0o777)
        .large_file(metadata.len() >= u64::from(u32::MAX));
    writer.start_file(name.to_string_lossy(), options)?;
    // A file that grows meanwhile keeps the size it began with.
    io::copy(&mut file.take(metadata.len()), writer)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use std::os::unix::fs::symlink;

    fn archive(entries: &[(&str, &str)]) -> Cursor<Vec<u8>> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in entries {
            let options = SimpleFileOptions::default().unix_permissions(0o755);
            writer.start_file(*name, options).unwrap();
            writer.write_all(content.as_bytes()).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn a_directory_survives_the_way_there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::create_dir_all(from.join("empty")).unwrap();
        fs::write(from.join("a/b/deep"), "x".repeat(100_000)).unwrap();
        fs::write(from.join("run"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(from.join("run"), Permissions::from_mode(0o755)).unwrap();
        symlink("run", from.join("link")).unwrap();
        symlink("..", from.join("up")).unwrap();
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            from.join("fifo"),
            Mode::from_raw_mode(0o600),
        )
        .unwrap();
        let mut packed = Vec::new();
        zip_directory(&from, &mut packed).unwrap();
        assert!(packed.len() < 10_000);
        assert_eq!(unzip(Cursor::new(packed), &to).unwrap(), 3);
        assert_eq!(fs::read(to.join("a/b/deep")).unwrap().len(), 100_000);
        assert_eq!(fs::read_to_string(to.join("link")).unwrap(), "#!/bin/sh\n");
        let mode = fs::metadata(to.join("run")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn the_archive_of_a_single_file_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        let mut packed = Vec::new();
        zip_directory(&file, &mut packed).unwrap();
        assert_eq!(ZipArchive::new(Cursor::new(packed)).unwrap().len(), 0);
    }

    #[test]
    fn entries_that_leave_the_target_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("in");
        fs::create_dir(&target).unwrap();
        symlink("..", target.join("up")).unwrap();
        for name in ["../evil", "a/../../evil", "/tmp/skyrl-zip-slip", "up/evil"] {
            assert!(unzip(archive(&[(name, "x")]), &target).is_err(), "{name}");
        }
        assert!(!dir.path().join("evil").exists());
        assert!(!Path::new("/tmp/skyrl-zip-slip").exists());
        assert!(unzip(Cursor::new(b"no zip".to_vec()), &target).is_err());
    }

    #[test]
    fn a_link_in_a_files_place_is_replaced_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("in");
        fs::create_dir(&target).unwrap();
        fs::write(dir.path().join("precious"), "precious").unwrap();
        symlink("../precious", target.join("f")).unwrap();
        unzip(archive(&[("f", "new")]), &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "new");
        assert_eq!(
            fs::read_to_string(dir.path().join("precious")).unwrap(),
            "precious"
        );
    }
}
