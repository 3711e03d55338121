//! Opening files to be read.

use super::error::{FileError, failed};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// A part of a file, ready to be read.
pub struct Source {
    /// How many bytes there are to read, where that is known; files of `/proc`
    /// and `/sys` do not know.
    pub length: Option<u64>,
    /// Size of the whole file.
    pub size: u64,
    /// The bytes.
    pub reader: Box<dyn Read + Send>,
}

/// Opens bytes `offset` to `offset + limit` of a regular file.
///
/// # Errors
/// When the path is not a regular file, or can't be opened or read.
pub fn open(path: &Path, offset: u64, limit: Option<u64>) -> Result<Source, FileError> {
    // Non-blocking: a FIFO without a writer would hold the request for ever.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open", path))?;
    let mut file = File::from(fd);
    let metadata = file.metadata().map_err(failed("look at", path))?;
    if metadata.is_dir() {
        let error = io::Error::from_raw_os_error(libc::EISDIR);
        return Err(FileError::new("read", path, error));
    }
    if !metadata.is_file() {
        return Err(FileError::rule("read", path, "it is not a regular file"));
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))
            .map_err(failed("seek in", path))?;
    }
    let size = metadata.len();
    let limit = limit.unwrap_or(u64::MAX);
    let length = (size > 0).then(|| size.saturating_sub(offset).min(limit));
    Ok(Source {
        length,
        size,
        reader: Box::new(file.take(length.unwrap_or(limit))),
    })
}
