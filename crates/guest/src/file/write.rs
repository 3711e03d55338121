//! Writing files so that readers see the old content or the new one, never a
//! part.

use super::error::{FileError, failed};
use rustix::fs::{Mode, OFlags};
use std::ffi::OsString;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Links followed from a path before it counts as a loop.
const MAX_LINKS: usize = 40;

/// How a file is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Permission bits; absent: those of the file that is there, else 0644.
    pub mode: Option<u32>,
    /// Make missing parent directories.
    pub parents: bool,
}

/// Makes a directory and its missing parents.
pub fn make_directories(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).map_err(failed("make directory", path))
}

/// Writes a file: to a temporary name beside it, then renamed over it. Keeps
/// mode and owner of a file that is there, and writes through symbolic links.
/// Where the directory allows no new names, or the file is a mount point or
/// has several names, it is written in place. Returns the bytes written.
pub fn write_atomically(
    path: &Path,
    options: WriteOptions,
    content: &mut dyn Read,
) -> Result<u64, FileError> {
    if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(FileError::rule("write", path, "it does not name a file"));
    }
    let target = follow_links(path)?;
    let existing = match fs::symlink_metadata(&target) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(FileError::new("look at", &target, error)),
    };
    match &existing {
        Some(found) if found.is_dir() => {
            let error = io::Error::from_raw_os_error(libc::EISDIR);
            return Err(FileError::new("write", &target, error));
        }
        Some(found) if !found.is_file() => {
            return Err(FileError::rule(
                "write",
                &target,
                "it is not a regular file",
            ));
        }
        _ => {}
    }
    let directory = target.parent().unwrap_or(Path::new("/"));
    if options.parents && existing.is_none() {
        make_directories(directory)?;
    }
    let mut temporary = match Temporary::create(directory) {
        Ok(temporary) => temporary,
        Err(error) if existing.is_some() && may_work_in_place(&error) => {
            return write_in_place(&target, options, content);
        }
        Err(error) => return Err(FileError::new("write in", directory, error)),
    };
    let written =
        copy(content, &mut temporary.file).map_err(|error| read_or_write(&target, error))?;
    if keep_identity(&temporary.file, existing.as_ref(), options).is_err() {
        // Another user's file: replacing it would take it from them.
        return replace_in_place(&target, options, &mut temporary);
    }
    if existing.as_ref().is_some_and(|found| found.nlink() > 1) {
        // A rename would part it from its other names.
        return replace_in_place(&target, options, &mut temporary);
    }
    match fs::rename(&temporary.path, &target) {
        Ok(()) => {
            temporary.renamed = true;
            Ok(written)
        }
        Err(error) if existing.is_some() && may_work_in_place(&error) => {
            replace_in_place(&target, options, &mut temporary)
        }
        Err(error) => Err(FileError::new("rename a new file to", &target, error)),
    }
}

/// The path a chain of symbolic links ends at; its last part may not exist.
fn follow_links(path: &Path) -> Result<PathBuf, FileError> {
    let mut target = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&target) {
            Ok(next) => {
                let directory = target.parent().unwrap_or(Path::new("/"));
                target = directory.join(next);
            }
            Err(_) => return Ok(target),
        }
    }
    let error = io::Error::from_raw_os_error(libc::ELOOP);
    Err(FileError::new("follow the links of", path, error))
}

fn may_work_in_place(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::EBUSY | libc::EXDEV)
    )
}

/// A failure of copying is either side's.
fn read_or_write(target: &Path, error: CopyError) -> FileError {
    match error {
        CopyError::Read(error) => FileError::rule(
            "write",
            target,
            format!("the content could not be read: {error}"),
        ),
        CopyError::Write(error) => FileError::new("write", target, error),
    }
}

enum CopyError {
    Read(io::Error),
    Write(io::Error),
}

fn copy(from: &mut dyn Read, to: &mut File) -> Result<u64, CopyError> {
    let mut buffer = vec![0; 64 * 1024];
    let mut copied = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(count) => {
                to.write_all(&buffer[..count]).map_err(CopyError::Write)?;
                copied += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CopyError::Read(error)),
        }
    }
}

fn keep_identity(
    file: &File,
    existing: Option<&Metadata>,
    options: WriteOptions,
) -> io::Result<()> {
    if let Some(existing) = existing {
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (existing.uid(), existing.gid()) {
            fchown(file, Some(existing.uid()), Some(existing.gid()))?;
        }
    }
    let mode = options
        .mode
        .or(existing.map(|found| found.mode()))
        .unwrap_or(0o644);
    file.set_permissions(Permissions::from_mode(mode & 0o7777))
}

fn replace_in_place(
    target: &Path,
    options: WriteOptions,
    temporary: &mut Temporary,
) -> Result<u64, FileError> {
    let mut content = File::open(&temporary.path).map_err(failed("read", &temporary.path))?;
    write_in_place(target, options, &mut content)
}

fn write_in_place(
    target: &Path,
    options: WriteOptions,
    content: &mut dyn Read,
) -> Result<u64, FileError> {
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(target, flags, Mode::empty()).map_err(failed("write", target))?;
    let mut file = File::from(fd);
    let written = copy(content, &mut file).map_err(|error| read_or_write(target, error))?;
    if let Some(mode) = options.mode {
        file.set_permissions(Permissions::from_mode(mode & 0o7777))
            .map_err(failed("set the mode of", target))?;
    }
    Ok(written)
}

/// A new file that is removed unless it was renamed.
struct Temporary {
    file: File,
    path: PathBuf,
    renamed: bool,
}

impl Temporary {
    fn create(directory: &Path) -> io::Result<Self> {
        let name = OsString::from(format!(".skyrl-{}.tmp", crate::random_id()));
        let path = directory.join(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600))?;
        Ok(Self {
            file: File::from(fd),
            path,
            renamed: false,
        })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing better can be done about a file that can't be removed.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(path: &Path, options: WriteOptions, text: &str) -> Result<u64, FileError> {
        write_atomically(path, options, &mut text.as_bytes())
    }

    #[test]
    fn replacing_a_file_keeps_its_mode_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.sh");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        let old = File::open(&path).unwrap();
        assert_eq!(write(&path, WriteOptions::default(), "new!").unwrap(), 4);
        assert_eq!(fs::read_to_string(&path).unwrap(), "new!");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o750);
        assert_eq!(io::read_to_string(old).unwrap(), "old", "written in place");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let mode = WriteOptions {
            mode: Some(0o600),
            parents: false,
        };
        write(&path, mode, "x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    }

    #[test]
    fn symbolic_links_are_written_through_even_dangling_ones() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("real", &link).unwrap();
        write(&link, WriteOptions::default(), "a").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(dir.path().join("real")).unwrap(), "a");
        let lap = dir.path().join("lap");
        symlink("lap", &lap).unwrap();
        assert!(write(&lap, WriteOptions::default(), "a").is_err());
    }

    #[test]
    fn a_file_of_several_names_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&path, "old").unwrap();
        fs::hard_link(&path, &other).unwrap();
        write(&path, WriteOptions::default(), "new").unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn failed_writes_leave_the_old_content() {
        struct Breaks;
        impl Read for Breaks {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "old").unwrap();
        let mut content = b"new".as_slice().chain(Breaks);
        assert!(write_atomically(&path, WriteOptions::default(), &mut content).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn parents_are_made_on_request_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/c");
        assert!(write(&path, WriteOptions::default(), "x").is_err());
        let parents = WriteOptions {
            mode: None,
            parents: true,
        };
        write(&path, parents, "x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        assert!(
            write(&dir.path().join("a"), parents, "x").is_err(),
            "a directory"
        );
        assert!(write(&dir.path().join("new/"), parents, "x").is_err());
    }
}
