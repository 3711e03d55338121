//! A file or directory as a tar stream.

use super::error::{FileError, failed};
use rustix::fs::{CWD, Mode, OFlags};
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tar::{Builder, EntryType, Header};

/// File systems that hold no files: walking into them would never end or say
/// nothing of the sandbox.
const NOT_FILES: [i64; 9] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x27_e0eb,   // cgroup
    0x6367_7270, // cgroup2
    0x1cd1,      // devpts
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0xcafe_4a11, // bpf
    0x7363_6673, // securityfs
];

/// Writes a tar stream. Entries of a directory are named relative to it, in
/// order of name, the directory itself first as `./`; a file is one entry with
/// its own name. Sockets, FIFOs and devices are left out, as is what vanishes
/// meanwhile. A file that changes while it is read has the size it began with.
///
/// # Errors
/// When something can't be read, or the stream not be written; the stream is
/// incomplete then.
pub fn archive(path: &Path, out: &mut dyn Write) -> Result<(), FileError> {
    let mut builder = Builder::new(out);
    let metadata = fs::symlink_metadata(path).map_err(failed("read", path))?;
    if metadata.is_dir() {
        walk(&mut builder, path)?;
    } else {
        let name = path.file_name().unwrap_or(path.as_os_str());
        append(&mut builder, path, Path::new(name), &metadata)?;
    }
    builder.finish().map_err(failed("archive", path))
}

fn walk(builder: &mut Builder<&mut dyn Write>, top: &Path) -> Result<(), FileError> {
    // Paths relative to `top`, the next one last.
    let mut todo = vec![PathBuf::new()];
    let top_device = fs::symlink_metadata(top)
        .map_err(failed("read", top))?
        .dev();
    while let Some(relative) = todo.pop() {
        let path = top.join(&relative);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(FileError::new("read", &path, error)),
        };
        let name = if relative.as_os_str().is_empty() {
            Path::new("./")
        } else {
            &relative
        };
        append(builder, &path, name, &metadata)?;
        if metadata.is_dir() && (metadata.dev() == top_device || holds_files(&path)) {
            let names = match names(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                names => names.map_err(failed("list", &path))?,
            };
            todo.extend(names.into_iter().rev().map(|name| relative.join(name)));
        }
    }
    Ok(())
}

fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let mut names = fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names)
}

fn holds_files(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|found| !NOT_FILES.contains(&found.f_type))
}

fn append(
    builder: &mut Builder<&mut dyn Write>,
    path: &Path,
    name: &Path,
    metadata: &Metadata,
) -> Result<(), FileError> {
    let mut header = header(metadata);
    let written = if metadata.is_dir() {
        header.set_entry_type(EntryType::Directory);
        builder.append_data(&mut header, name, io::empty())
    } else if metadata.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        match fs::read_link(path) {
            Ok(target) => builder.append_link(&mut header, name, target),
            Err(error) => vanished(error),
        }
    } else if metadata.is_file() {
        match open(path) {
            Ok(Some(file)) => {
                let size = file.metadata().map_err(failed("read", path))?.len();
                header.set_entry_type(EntryType::Regular);
                header.set_size(size);
                // Shrunk meanwhile: the rest reads as zeros.
                let content = file.chain(io::repeat(0)).take(size);
                builder.append_data(&mut header, name, content)
            }
            Ok(None) => Ok(()),
            Err(error) => vanished(error),
        }
    } else {
        Ok(())
    };
    written.map_err(failed("archive", path))
}

fn vanished(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

/// Opens a regular file; nothing if it became something else.
fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(CWD, path, flags, Mode::empty())?);
    Ok(file.metadata()?.is_file().then_some(file))
}

fn header(metadata: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn entries_are_in_order_and_special_files_left_out() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("b")).unwrap();
        for name in ["c", "b/x", "a"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let _socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        let mut bytes = Vec::new();
        archive(dir.path(), &mut bytes).unwrap();
        let mut tar = tar::Archive::new(bytes.as_slice());
        let names: Vec<String> = tar
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["./", "a", "b", "b/x", "c"]);
        assert!(archive(&dir.path().join("none"), &mut Vec::new()).is_err());
    }
}
