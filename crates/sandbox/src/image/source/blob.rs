//! Streams of bytes with a digest, compressed or not.

use sha2::{Digest, Sha256};
use std::io::{self, BufRead, BufReader, Read};

/// Largest window a zstd stream may ask memory for: 2^27 bytes.
const ZSTD_WINDOW: u32 = 27;

/// The digest of bytes, as images write it.
pub(super) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", crate::image::hex(&Sha256::digest(bytes)))
}

/// Whether a text is a digest; it is also a safe part of a file name then.
pub(in crate::image) fn check_digest(text: &str) -> Result<&str, String> {
    match text.strip_prefix("sha256:") {
        Some(hex)
            if hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) =>
        {
            Ok(hex)
        }
        _ => {
            let shown: String = text.chars().take(100).collect();
            Err(format!("{shown:?} is no sha256 digest"))
        }
    }
}

/// Computes the digest of what passes through.
pub(in crate::image) struct Hashing<R> {
    source: R,
    hash: Sha256,
    length: u64,
}

impl<R: Read> Hashing<R> {
    pub(in crate::image) fn new(source: R) -> Self {
        Self {
            source,
            hash: Sha256::new(),
            length: 0,
        }
    }

    /// Digest and length of what was read.
    pub(in crate::image) fn finish(self) -> (String, u64) {
        let digest = format!("sha256:{}", crate::image::hex(&self.hash.finalize()));
        (digest, self.length)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.length += count as u64;
        Ok(count)
    }
}

/// Undoes the compression, which is told by the first bytes.
///
/// # Errors
/// When it is of a kind that images don't use, or reading fails.
pub(in crate::image) fn decompress<'a>(
    source: impl Read + Send + 'a,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut source = BufReader::with_capacity(1 << 17, source);
    let start = source.fill_buf()?;
    let start = [0, 1, 2, 3, 4, 5].map(|at| start.get(at).copied().unwrap_or(0));
    let unsupported = |kind| {
        let text = format!("it is compressed with {kind}, which is not supported");
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    };
    match start {
        [0x1f, 0x8b, ..] => Ok(Box::new(flate2::bufread::MultiGzDecoder::new(source))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
            decoder.window_log_max(ZSTD_WINDOW)?;
            Ok(Box::new(decoder))
        }
        [0xfd, b'7', b'z', b'X', b'Z', _] => unsupported("xz"),
        [b'B', b'Z', b'h', ..] => unsupported("bzip2"),
        _ => Ok(Box::new(source)),
    }
}
