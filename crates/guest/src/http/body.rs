//! Bytes of a connection: a buffer in front of the socket, and the body of one
//! request cut out of it, by length or by chunks. Works on any reader, so that
//! it can be fuzzed.

use super::head::{Framing, Head, HeadError, MAX_HEAD};
use std::io::{self, Read};

/// Longest line of chunked framing (sizes, extensions, trailers), in bytes.
const MAX_CHUNK_LINE: usize = 4096;

/// Most trailer lines read after the last chunk.
const MAX_TRAILERS: usize = 100;

/// Smallest read asked of the source, in bytes.
const READ_SIZE: usize = 8 * 1024;

/// A source of bytes with what was read of it but not yet used.
pub struct Buffered<R> {
    source: R,
    bytes: Vec<u8>,
    at: usize,
}

impl<R: Read> Buffered<R> {
    /// Wraps a source.
    pub fn new(source: R) -> Self {
        Self {
            source,
            bytes: Vec::new(),
            at: 0,
        }
    }

    /// What was read but not used.
    pub fn pending(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    /// The source.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// The source and what was read but not used.
    pub fn into_parts(mut self) -> (R, Vec<u8>) {
        self.bytes.drain(..self.at);
        (self.source, self.bytes)
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
        if self.at == self.bytes.len() {
            self.at = 0;
            self.bytes.clear();
            // A connection that once had a large head should not keep it.
            if self.bytes.capacity() > 2 * READ_SIZE {
                self.bytes = Vec::new();
            }
        }
    }

    /// Reads more; 0 means the end.
    fn fill(&mut self) -> io::Result<usize> {
        if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        let old = self.bytes.len();
        self.bytes.resize(old + READ_SIZE, 0);
        let result = loop {
            match self.source.read(&mut self.bytes[old..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.bytes.truncate(old + *result.as_ref().unwrap_or(&0));
        result
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.pending().is_empty() {
            // Large bodies go past the buffer.
            if buffer.len() >= READ_SIZE {
                return self.source.read(buffer);
            }
            if self.fill()? == 0 {
                return Ok(0);
            }
        }
        let count = self.pending().len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.pending()[..count]);
        self.consume(count);
        Ok(count)
    }

    /// Reads one line without its CR LF.
    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut searched = 0;
        loop {
            let pending = self.pending();
            if let Some(end) = pending[searched..].iter().position(|b| *b == b'\n') {
                let end = searched + end;
                if end > MAX_CHUNK_LINE {
                    return Err(bad_chunk("line too long"));
                }
                let line = &pending[..end];
                let Some(line) = line.strip_suffix(b"\r") else {
                    return Err(bad_chunk("line ends without CR"));
                };
                let line = line.to_vec();
                self.consume(end + 1);
                return Ok(line);
            }
            searched = pending.len();
            if searched > MAX_CHUNK_LINE {
                return Err(bad_chunk("line too long"));
            }
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Why no head was read.
#[derive(Debug)]
pub enum ReadHeadError {
    /// It is not acceptable.
    Head(HeadError),
    /// The connection failed or ended in the middle.
    Io(io::Error),
}

/// Reads the next head; nothing at a clean end of the connection.
pub fn read_head<R: Read>(from: &mut Buffered<R>) -> Result<Option<Head>, ReadHeadError> {
    loop {
        // Empty lines before a request line are tolerated.
        let blank = from
            .pending()
            .iter()
            .take_while(|b| matches!(b, b'\r' | b'\n'))
            .count();
        from.consume(blank);
        if !from.pending().is_empty() {
            match Head::parse(from.pending()) {
                Ok(Some((head, length))) => {
                    from.consume(length);
                    return Ok(Some(head));
                }
                Ok(None) => {}
                Err(error) => return Err(ReadHeadError::Head(error)),
            }
        }
        debug_assert!(from.pending().len() < MAX_HEAD);
        if from.fill().map_err(ReadHeadError::Io)? == 0 {
            return if from.pending().is_empty() {
                Ok(None)
            } else {
                Err(ReadHeadError::Io(io::ErrorKind::UnexpectedEof.into()))
            };
        }
    }
}

enum State {
    /// So many bytes of a body or chunk remain.
    Data { remaining: u64, chunked: bool },
    /// A chunk-size line comes next.
    Size,
    /// The body ended.
    End,
    /// It was malformed or cut off; nothing after it can be trusted.
    Broken,
}

/// The body of one request.
pub struct Body<'b, R> {
    from: &'b mut Buffered<R>,
    state: State,
    /// Called before the first byte is read.
    first_read: Option<&'b mut dyn FnMut() -> io::Result<()>>,
}

fn bad_chunk(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("malformed chunked body: {what}"),
    )
}

/// Reads `1f;extension` as 31.
fn chunk_size(line: &[u8]) -> io::Result<u64> {
    let digits = line
        .split(|b| matches!(b, b';' | b' ' | b'\t'))
        .next()
        .unwrap_or_default();
    if digits.is_empty() || digits.len() > 16 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(bad_chunk("bad size"));
    }
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| bad_chunk("bad size"))
}

impl<'b, R: Read> Body<'b, R> {
    /// The body that follows a head.
    pub fn new(from: &'b mut Buffered<R>, framing: Framing) -> Self {
        Self {
            from,
            state: match framing {
                Framing::Length(0) => State::End,
                Framing::Length(remaining) => State::Data {
                    remaining,
                    chunked: false,
                },
                Framing::Chunked => State::Size,
            },
            first_read: None,
        }
    }

    /// Calls `action` before the first byte is read: the client waits for
    /// `100 Continue` until then.
    pub fn before_first_read(mut self, action: &'b mut dyn FnMut() -> io::Result<()>) -> Self {
        self.first_read = Some(action);
        self
    }

    /// The source behind the buffer.
    pub fn source(&self) -> &R {
        self.from.source()
    }

    /// Reads and drops the rest so that the next request can be read; false
    /// when that would take more than `limit` bytes or is impossible.
    pub fn drain(&mut self, limit: u64) -> bool {
        match self.state {
            State::End => return true,
            State::Broken => return false,
            // The client would not send the body before being told to.
            _ if self.first_read.is_some() => return false,
            State::Data {
                remaining,
                chunked: false,
            } if remaining > limit => return false,
            _ => {}
        }
        let mut scratch = [0; 4096];
        let mut left = limit;
        loop {
            match self.read(&mut scratch) {
                Ok(0) => return true,
                Ok(count) if count as u64 <= left => left -= count as u64,
                _ => return false,
            }
        }
    }

    fn advance(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.state {
                State::End => return Ok(0),
                State::Broken => return Err(io::ErrorKind::UnexpectedEof.into()),
                State::Size => {
                    let line = self.from.line()?;
                    let remaining = chunk_size(&line)?;
                    if remaining == 0 {
                        self.skip_trailers()?;
                        self.state = State::End;
                    } else {
                        self.state = State::Data {
                            remaining,
                            chunked: true,
                        };
                    }
                }
                State::Data { remaining, chunked } => {
                    let most = usize::try_from(remaining).unwrap_or(usize::MAX);
                    let most = most.min(buffer.len());
                    let count = self.from.read(&mut buffer[..most])?;
                    if count == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    let remaining = remaining - count as u64;
                    self.state = match (remaining, chunked) {
                        (0, false) => State::End,
                        (0, true) => {
                            if !self.from.line()?.is_empty() {
                                return Err(bad_chunk("chunk longer than its size"));
                            }
                            State::Size
                        }
                        _ => State::Data { remaining, chunked },
                    };
                    return Ok(count);
                }
            }
        }
    }

    fn skip_trailers(&mut self) -> io::Result<()> {
        for _ in 0..MAX_TRAILERS {
            if self.from.line()?.is_empty() {
                return Ok(());
            }
        }
        Err(bad_chunk("too many trailers"))
    }
}

impl<R: Read> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if !matches!(self.state, State::End)
            && let Some(action) = self.first_read.take()
        {
            action()?;
        }
        let result = self.advance(buffer);
        if matches!(&result, Err(error) if error.kind() != io::ErrorKind::Interrupted) {
            self.state = State::Broken;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one byte at a time, as a slow client does.
    struct Dribble<'a>(&'a [u8]);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(1).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn body_of(text: &str) -> io::Result<(String, String)> {
        let mut from = Buffered::new(Dribble(text.as_bytes()));
        let head = match read_head(&mut from) {
            Ok(Some(head)) => head,
            Ok(None) => panic!("no head"),
            Err(ReadHeadError::Io(error)) => return Err(error),
            Err(ReadHeadError::Head(error)) => panic!("{error}"),
        };
        let mut body = String::new();
        Body::new(&mut from, head.framing).read_to_string(&mut body)?;
        let mut rest = String::new();
        let (mut source, pending) = from.into_parts();
        rest.push_str(&String::from_utf8(pending).unwrap());
        source.read_to_string(&mut rest)?;
        Ok((body, rest))
    }

    #[test]
    fn a_chunked_body_ends_where_the_next_request_begins() {
        let text = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
                    3;x=y\r\nabc\r\n0A\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\nGET /next";
        let (body, rest) = body_of(text).unwrap();
        assert_eq!(
            (body.as_str(), rest.as_str()),
            ("abc0123456789", "GET /next")
        );
    }

    #[test]
    fn a_body_of_declared_length_leaves_the_pipelined_request() {
        let text = "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /next";
        assert_eq!(
            body_of(text).unwrap(),
            ("abc".to_owned(), "GET /next".to_owned())
        );
    }

    #[test]
    fn malformed_or_cut_bodies_are_errors() {
        let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        for bad in [
            "3\r\nabcd\r\n0\r\n\r\n",
            "-1\r\n",
            "g\r\n",
            "\r\n",
            "11111111111111111\r\n",
            "3\nabc\r\n0\r\n\r\n",
            "3\r\nab",
            "3\r\nabc\r\n0\r\n",
        ] {
            assert!(body_of(&format!("{chunked}{bad}")).is_err(), "{bad:?}");
        }
        assert!(body_of(&format!("{chunked}3;{}\r\n", "x".repeat(5000))).is_err());
        assert!(body_of("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab").is_err());
    }

    #[test]
    fn draining_stops_at_its_bound() {
        let drain = |bytes: &[u8], framing, limit| {
            Body::new(&mut Buffered::new(Dribble(bytes)), framing).drain(limit)
        };
        assert!(drain(b"abc", Framing::Length(3), 3));
        assert!(!drain(b"abcd", Framing::Length(4), 3));
        assert!(drain(b"3\r\nabc\r\n0\r\n\r\n", Framing::Chunked, 3));
        assert!(!drain(b"4\r\nabcd\r\n0\r\n\r\n", Framing::Chunked, 3));
    }
}
