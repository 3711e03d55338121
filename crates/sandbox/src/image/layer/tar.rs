//! Reads a tar stream entry by entry, with a bound on everything that is kept
//! in memory: ustar, GNU (long names, sparse files) and PAX (long names, sizes,
//! times, extended attributes, the three forms of sparse files).
//!
//! The fields of a block are parsed by the `tar` crate; its own iterator is
//! not used because it reads extension headers of any length into memory.

use std::io::{self, Read};

const BLOCK: u64 = 512;
/// Longest name or PAX header accepted.
const MAX_EXTENSION: u64 = 1 << 20;
/// Extension headers in a row before an entry must come.
const MAX_EXTENSIONS: usize = 8;
/// Pieces of a sparse file.
const MAX_PIECES: usize = 1 << 18;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TarKind {
    File,
    HardLink,
    Symlink,
    Directory,
    Fifo,
    Device,
    Unknown(u8),
}

/// One entry; its data is read from the reader before the next is asked for.
#[derive(Debug, Clone)]
pub(crate) struct TarEntry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: TarKind,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Length of the file, holes included.
    pub(crate) size: u64,
    /// Where the stored bytes belong (offset, length), in order.
    pub(crate) pieces: Vec<(u64, u64)>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the stored bytes begin in the stream.
    pub(crate) offset: u64,
}

/// What extension headers said about the entry after them.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: PaxSparse,
}

#[derive(Default)]
struct PaxSparse {
    name: Option<Vec<u8>>,
    size: Option<u64>,
    /// Version 1.0: the map stands before the data.
    map_in_data: bool,
    numbers: Vec<u64>,
}

/// Reads entries from a stream.
pub(crate) struct TarReader<R> {
    source: R,
    position: u64,
    /// Bytes of the current entry not read yet, and its padding.
    remaining: u64,
    padding: u64,
    ended: bool,
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(source: R) -> Self {
        Self {
            source,
            position: 0,
            remaining: 0,
            padding: 0,
            ended: false,
        }
    }

    /// Bytes of the stream consumed so far.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The stream after the last entry.
    pub(crate) fn into_inner(self) -> R {
        self.source
    }

    /// Reads data of the current entry; 0 at its end.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.remaining == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let wanted = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = read_some(&mut self.source, &mut buffer[..wanted])?;
        if count == 0 {
            return Err(broken("the archive ends in the middle of a file"));
        }
        self.remaining -= count as u64;
        self.position += count as u64;
        Ok(count)
    }

    /// The next entry, or `None` at the end of the archive.
    ///
    /// # Errors
    /// `InvalidData` when this is not a sound archive.
    pub(crate) fn next_entry(&mut self) -> io::Result<Option<TarEntry>> {
        let mut extension = Extension::default();
        for _ in 0..=MAX_EXTENSIONS {
            self.skip_data()?;
            let Some(header) = self.read_header()? else {
                return Ok(None);
            };
            let kind = header.as_bytes()[156];
            let size = header
                .entry_size()
                .map_err(|_| broken("a header has no valid size"))?;
            match kind {
                b'L' => extension.path = Some(trimmed(self.read_extension(size)?)),
                b'K' => extension.link = Some(trimmed(self.read_extension(size)?)),
                b'x' | b'X' => {
                    let records = self.read_extension(size)?;
                    parse_pax(&records, &mut extension)?;
                }
                // Global headers and volume labels say nothing about files.
                b'g' | b'V' => {
                    self.read_extension(size)?;
                }
                _ => return self.entry(&header, kind, extension).map(Some),
            }
        }
        Err(broken("too many extension headers in a row"))
    }

    fn entry(
        &mut self,
        header: &tar::Header,
        kind: u8,
        extension: Extension,
    ) -> io::Result<TarEntry> {
        let number = |value: io::Result<u64>, what| {
            value.map_err(|_| broken(format!("a header has no valid {what}")))
        };
        let sparse = extension.sparse;
        let path = sparse
            .name
            .or(extension.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extension
            .link
            .unwrap_or_else(|| header.link_name_bytes().map(Vec::from).unwrap_or_default());
        if path.contains(&0) || link.contains(&0) {
            return Err(broken("a name holds a zero byte"));
        }
        let tar_kind = match kind {
            0 | b'0' if path.ends_with(b"/") => TarKind::Directory,
            0 | b'0' | b'7' | b'S' => TarKind::File,
            b'1' => TarKind::HardLink,
            b'2' => TarKind::Symlink,
            b'3' | b'4' => TarKind::Device,
            b'5' => TarKind::Directory,
            b'6' => TarKind::Fifo,
            other => TarKind::Unknown(other),
        };
        // Other kinds have no data, whatever their size field says.
        let stored = match tar_kind {
            TarKind::File | TarKind::Unknown(_) => match extension.size {
                Some(size) => size,
                None => number(header.entry_size(), "size")?,
            },
            _ => 0,
        };
        self.begin_data(stored)?;
        let (size, pieces) = if kind == b'S' {
            self.gnu_sparse(header, stored)?
        } else if let Some(size) = sparse.size.filter(|_| tar_kind == TarKind::File) {
            let numbers = if sparse.map_in_data {
                self.pax_map_in_data()?
            } else {
                sparse.numbers
            };
            (size, pieces_of(&numbers, size, self.remaining)?)
        } else {
            (stored, vec![(0, stored)])
        };
        Ok(TarEntry {
            path,
            link,
            kind: tar_kind,
            mode: header
                .mode()
                .map_err(|_| broken("a header has no valid mode"))?
                & 0o7777,
            uid: extension
                .uid
                .map_or_else(|| number(header.uid(), "owner"), Ok)?,
            gid: extension
                .gid
                .map_or_else(|| number(header.gid(), "group"), Ok)?,
            mtime: match extension.mtime {
                Some(mtime) => mtime,
                // Before 1970, in base 256, reads as a huge number.
                None => (number(header.mtime(), "time")?.cast_signed(), 0),
            },
            size,
            pieces,
            xattrs: extension.xattrs,
            offset: self.position,
        })
    }

    fn begin_data(&mut self, stored: u64) -> io::Result<()> {
        self.remaining = stored;
        self.padding = stored
            .checked_next_multiple_of(BLOCK)
            .ok_or_else(|| broken("a size is out of range"))?
            - stored;
        Ok(())
    }

    fn skip_data(&mut self) -> io::Result<()> {
        let mut buffer = [0_u8; 8192];
        while self.read_data(&mut buffer)? > 0 {}
        self.remaining = std::mem::take(&mut self.padding);
        while self.read_data(&mut buffer)? > 0 {}
        Ok(())
    }

    fn read_extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(broken(format!("an extension header has {size} bytes")));
        }
        self.begin_data(size)?;
        let mut data = vec![0; usize::try_from(size).unwrap_or(0)];
        let mut filled = 0;
        while filled < data.len() {
            filled += self.read_data(&mut data[filled..])?;
        }
        Ok(data)
    }

    /// `None` at two zero blocks or at the end of the stream.
    fn read_header(&mut self) -> io::Result<Option<tar::Header>> {
        if self.ended {
            return Ok(None);
        }
        let mut header = tar::Header::new_old();
        for _ in 0..2 {
            if !self.read_block(header.as_mut_bytes())? {
                self.ended = true;
                return Ok(None);
            }
            if header.as_bytes().iter().any(|byte| *byte != 0) {
                break;
            }
            self.ended = true;
        }
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if self.ended {
            return Err(broken("a single zero block stands between entries"));
        }
        let sum: u32 = bytes
            .iter()
            .enumerate()
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .sum();
        match header.cksum() {
            Ok(stated) if stated == sum => Ok(Some(header)),
            _ => Err(broken("a header's checksum is wrong")),
        }
    }

    /// Reads a whole block; false at a clean end of the stream.
    fn read_block(&mut self, block: &mut [u8; 512]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < block.len() {
            match read_some(&mut self.source, &mut block[filled..])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(broken("the archive ends in the middle of a header")),
                count => filled += count,
            }
        }
        self.position += BLOCK;
        Ok(true)
    }

    /// The old GNU form: pieces in the header and in blocks after it that do
    /// not count as data.
    fn gnu_sparse(
        &mut self,
        header: &tar::Header,
        stored: u64,
    ) -> io::Result<(u64, Vec<(u64, u64)>)> {
        let unsound = || broken("a sparse file's header is unsound");
        let gnu = header.as_gnu().ok_or_else(unsound)?;
        let size = gnu.real_size().map_err(|_| unsound())?;
        let mut numbers = Vec::new();
        let mut add = |piece: &tar::GnuSparseHeader| -> io::Result<()> {
            if !piece.is_empty() && numbers.len() < 2 * MAX_PIECES {
                numbers.push(piece.offset().map_err(|_| unsound())?);
                numbers.push(piece.length().map_err(|_| unsound())?);
            }
            Ok(())
        };
        for piece in &gnu.sparse {
            add(piece)?;
        }
        let mut more = gnu.is_extended();
        let mut blocks = 0;
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            if !self.read_block(block.as_mut_bytes())? || blocks > MAX_PIECES / 21 {
                return Err(unsound());
            }
            blocks += 1;
            for piece in block.sparse() {
                add(piece)?;
            }
            more = block.is_extended();
        }
        Ok((size, pieces_of(&numbers, size, stored)?))
    }

    /// PAX form 1.0: decimal numbers, one a line, padded to a block.
    fn pax_map_in_data(&mut self) -> io::Result<Vec<u64>> {
        let unsound = || broken("a sparse file's map is unsound");
        let mut numbers: Vec<u64> = Vec::new();
        let mut expected = None;
        let mut number: Option<u64> = None;
        let mut block = [0_u8; 512];
        while expected != Some(numbers.len()) {
            let mut filled = 0;
            while filled < block.len() {
                match self.read_data(&mut block[filled..])? {
                    0 => return Err(unsound()),
                    count => filled += count,
                }
            }
            for byte in block {
                if expected == Some(numbers.len()) {
                    break;
                }
                match byte {
                    b'0'..=b'9' => {
                        let next = number
                            .unwrap_or(0)
                            .checked_mul(10)
                            .and_then(|n| n.checked_add(u64::from(byte - b'0')));
                        number = Some(next.ok_or_else(unsound)?);
                    }
                    b'\n' => {
                        let value = number.take().ok_or_else(unsound)?;
                        if expected.is_some() {
                            numbers.push(value);
                        } else {
                            let pieces = usize::try_from(value).map_err(|_| unsound())?;
                            if pieces > MAX_PIECES {
                                return Err(unsound());
                            }
                            expected = Some(2 * pieces);
                        }
                    }
                    _ => return Err(unsound()),
                }
            }
        }
        Ok(numbers)
    }
}

/// Checks that pieces are in order, inside the file, and as long as what is
/// stored.
fn pieces_of(numbers: &[u64], size: u64, stored: u64) -> io::Result<Vec<(u64, u64)>> {
    let unsound = || broken("a sparse file's map is unsound");
    if !numbers.len().is_multiple_of(2) || numbers.len() > 2 * MAX_PIECES {
        return Err(unsound());
    }
    let mut end = 0_u64;
    let mut sum = 0_u64;
    let mut pieces = Vec::with_capacity(numbers.len() / 2);
    for pair in numbers.chunks_exact(2) {
        let (offset, length) = (pair[0], pair[1]);
        if offset < end {
            return Err(unsound());
        }
        end = offset.checked_add(length).ok_or_else(unsound)?;
        sum += length;
        pieces.push((offset, length));
    }
    if end > size || sum != stored {
        return Err(unsound());
    }
    Ok(pieces)
}

/// A GNU long name ends with a zero byte.
fn trimmed(mut name: Vec<u8>) -> Vec<u8> {
    while name.last() == Some(&0) {
        name.pop();
    }
    name
}

/// Parses `length key=value\n` records.
fn parse_pax(mut records: &[u8], into: &mut Extension) -> io::Result<()> {
    let unsound = || broken("a PAX header is unsound");
    while !records.is_empty() {
        let space = records
            .iter()
            .position(|byte| *byte == b' ')
            .ok_or_else(unsound)?;
        let length = decimal(&records[..space]).ok_or_else(unsound)?;
        let length = usize::try_from(length).map_err(|_| unsound())?;
        if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
            return Err(unsound());
        }
        let record = &records[space + 1..length - 1];
        records = &records[length..];
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .ok_or_else(unsound)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let number = || decimal(value).ok_or_else(unsound);
        match key {
            b"path" => into.path = Some(value.to_vec()),
            b"linkpath" => into.link = Some(value.to_vec()),
            b"size" => into.size = Some(number()?),
            b"uid" => into.uid = Some(number()?),
            b"gid" => into.gid = Some(number()?),
            b"mtime" => into.mtime = Some(pax_time(value).ok_or_else(unsound)?),
            b"GNU.sparse.name" => into.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.major" => into.sparse.map_in_data = number()? >= 1,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => into.sparse.size = Some(number()?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => into.sparse.numbers.push(number()?),
            b"GNU.sparse.map" => {
                into.sparse.numbers.clear();
                for part in value.split(|byte| *byte == b',') {
                    into.sparse.numbers.push(decimal(part).ok_or_else(unsound)?);
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    into.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with an optional fraction, perhaps negative.
fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

fn read_some(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// A source that can pass over bytes without reading them.
pub(crate) trait Skip: Read {
    /// Passes over this many bytes; it may be past the end.
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

impl<R: Skip> TarReader<R> {
    /// Passes over the rest of the current entry.
    pub(crate) fn skip_data_by_seeking(&mut self) -> io::Result<()> {
        let bytes = self.remaining.saturating_add(self.padding);
        self.source.skip(bytes)?;
        self.position = self.position.saturating_add(bytes);
        self.remaining = 0;
        self.padding = 0;
        Ok(())
    }
}
