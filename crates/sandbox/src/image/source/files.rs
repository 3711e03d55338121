//! Named files, in a directory or inside a tar file.

use super::blob::decompress;
use crate::image::layer::{TarKind, TarReader};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files of an archive.
const MAX_MEMBERS: usize = 100_000;
/// Links followed from one member to the next.
const MAX_LINKS: usize = 8;

/// A set of files by name.
pub(in crate::image) enum Files {
    /// Below a directory.
    Directory(PathBuf),
    /// Inside an uncompressed tar file, found without unpacking it.
    Archive {
        file: Arc<File>,
        members: HashMap<String, Member>,
    },
}

/// Where a member of an archive is.
#[derive(Debug, Clone)]
pub(in crate::image) enum Member {
    Data { offset: u64, length: u64 },
    Link(String),
}

impl Files {
    /// Opens an archive. One that is compressed is first written to
    /// `scratch` without the compression, at most `limit` bytes of it.
    pub(in crate::image) fn archive(path: &Path, scratch: &Path, limit: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        let mut start = [0; 512];
        let count = file.read(&mut start)?;
        file.seek(SeekFrom::Start(0))?;
        // A tar begins with a name; the magic numbers are none.
        let compressed = count >= 4
            && (start.starts_with(&[0x1f, 0x8b]) || start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
        if compressed {
            let plain = scratch.join("archive.tar");
            let mut to = File::create_new(&plain)?;
            let copied = io::copy(&mut decompress(file)?.take(limit), &mut to)?;
            if copied == limit {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            file = File::open(&plain)?;
        }
        let members = index(&file)?;
        Ok(Self::Archive {
            file: Arc::new(file),
            members,
        })
    }

    /// Opens a file.
    pub(in crate::image) fn open(&self, name: &str) -> io::Result<Box<dyn Read + Send>> {
        match self {
            Self::Directory(root) => {
                let path = root.join(name);
                if !path.metadata()?.is_file() {
                    return Err(io::Error::other("it is not a file"));
                }
                Ok(Box::new(File::open(path)?))
            }
            Self::Archive { file, members } => {
                let mut name = normal(name);
                for _ in 0..MAX_LINKS {
                    match members.get(&name) {
                        Some(Member::Data { offset, length }) => {
                            return Ok(Box::new(Section {
                                file: Arc::clone(file),
                                at: *offset,
                                end: offset + length,
                            }));
                        }
                        Some(Member::Link(target)) => name.clone_from(target),
                        None => break,
                    }
                }
                Err(io::ErrorKind::NotFound.into())
            }
        }
    }

    /// Reads a file of at most `limit` bytes.
    pub(in crate::image) fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        self.open(name)?.take(limit + 1).read_to_end(&mut content)?;
        if content.len() as u64 > limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it has more than {limit} bytes"),
            ));
        }
        Ok(content)
    }
}

/// Notes where each member of a tar file is.
fn index(file: &File) -> io::Result<HashMap<String, Member>> {
    let mut members = HashMap::new();
    let mut tar = TarReader::new(Skipping(BufReader::new(file.try_clone()?)));
    while let Some(entry) = tar.next_entry()? {
        let name = normal(&String::from_utf8_lossy(&entry.path));
        let member = match entry.kind {
            TarKind::File if entry.pieces == [(0, entry.size)] || entry.size == 0 => Member::Data {
                offset: entry.offset,
                length: entry.size,
            },
            // docker save wrote layers it had written before as links.
            TarKind::Symlink => {
                let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
                let target = String::from_utf8_lossy(&entry.link);
                Member::Link(normal(&format!("{dir}/{target}")))
            }
            TarKind::HardLink => Member::Link(normal(&String::from_utf8_lossy(&entry.link))),
            _ => continue,
        };
        if members.len() >= MAX_MEMBERS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the archive has too many files",
            ));
        }
        members.insert(name, member);
        tar.skip_data_by_seeking()?;
    }
    Ok(members)
}

/// A reader that can pass over data without reading it.
struct Skipping(BufReader<File>);

impl Read for Skipping {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl crate::image::layer::Skip for Skipping {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let distance = i64::try_from(bytes).map_err(io::Error::other)?;
        self.0.seek_relative(distance)
    }
}

/// A path without `.`, `..` and doubled slashes; names are only looked up,
/// never used on the disk.
fn normal(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// A range of a file.
struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.file.read_at(&mut buffer[..wanted], self.at)?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the archive is cut off",
            ));
        }
        self.at += count as u64;
        Ok(count)
    }
}
