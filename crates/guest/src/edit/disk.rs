//! What the editor needs of one file on disk: its bytes within a bound, and a
//! new file that was not there. Knows nothing of text.

use crate::file::{self, FileError};
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

/// What opening a path for reading found.
pub(super) enum Opened {
    /// A regular file within the bound: its bytes.
    File(Vec<u8>),
    /// A regular file that is too large, with its size.
    TooLarge(u64),
    /// A directory.
    Directory,
    /// A device, FIFO or socket.
    Special,
}

/// Reads a regular file of at most `limit` bytes, following links. Never
/// waits: a FIFO or device is recognised without reading it.
pub(super) fn read(path: &Path, limit: u64) -> io::Result<Opened> {
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        return Ok(Opened::Directory);
    }
    if !meta.is_file() {
        return Ok(Opened::Special);
    }
    let source = file::open(path, 0, None).map_err(|error| error.source)?;
    if source.size > limit {
        return Ok(Opened::TooLarge(source.size));
    }
    // Files of pseudo file systems say 0 and grow while read.
    let mut bytes = Vec::new();
    source.reader.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Ok(Opened::TooLarge(bytes.len() as u64));
    }
    Ok(Opened::File(bytes))
}

/// Writes a file that does not exist yet; removes it again if that fails.
pub(super) fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(content).inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}

/// Replaces a file's content at once, unless its mode forbids writing.
pub(super) fn replace(path: &Path, mut content: &[u8]) -> io::Result<()> {
    // A rename would get around a mode that forbids writing.
    OpenOptions::new().write(true).open(path)?;
    let written = file::write_atomically(path, file::WriteOptions::default(), &mut content);
    written.map(|_| ()).map_err(|error: FileError| error.source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_fifo_or_device_is_recognised_without_waiting_for_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .expect("mkfifo");
        let link = dir.path().join("link");
        symlink("/dev/zero", &link).expect("symlink");
        assert!(matches!(read(&fifo, 10), Ok(Opened::Special)));
        assert!(matches!(read(&link, 10), Ok(Opened::Special)));
        assert!(matches!(read(dir.path(), 10), Ok(Opened::Directory)));
    }
}
