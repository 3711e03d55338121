//! Answers on the wire. A small answer leaves in one write; a stream leaves
//! piece by piece, each piece as soon as it exists.

use super::{Response, ResponseBody, Takeover};
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;

/// What the request says about the shape of its answer.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Header fields only.
    pub(super) is_head: bool,
    /// The client understands chunks.
    pub(super) is_1_1: bool,
}

/// What became of an answer.
pub(super) enum Sent {
    /// The client has all of it.
    Whole,
    /// It ended early; the client must see the connection close.
    Cut,
    /// The connection speaks another protocol from here on.
    Upgraded(Takeover),
}

/// Writes an answer. `keep`: the connection stays usable afterwards.
pub(super) fn write_response(
    out: &UnixStream,
    response: Response,
    shape: Shape,
    keep: bool,
) -> io::Result<Sent> {
    let mut head = Vec::with_capacity(256);
    write!(
        head,
        "HTTP/1.1 {} {}\r\n",
        response.status,
        reason(response.status)
    )?;
    for (name, value) in &response.headers {
        // A line end inside a value would begin another field.
        let value = value.replace(['\r', '\n'], " ");
        write!(head, "{name}: {value}\r\n")?;
    }
    let bodyless = shape.is_head || matches!(response.status, 204 | 304);
    let connection = match (&response.body, keep && shape.is_1_1, keep) {
        (ResponseBody::Upgrade(..), _, _) | (_, true, _) => "",
        (_, false, true) => "connection: keep-alive\r\n",
        (_, false, false) => "connection: close\r\n",
    };
    head.extend_from_slice(connection.as_bytes());
    match response.body {
        ResponseBody::Bytes(bytes) => {
            if response.status != 204 {
                write!(head, "content-length: {}\r\n", bytes.len())?;
            }
            head.extend_from_slice(b"\r\n");
            let bytes = if bodyless { Vec::new() } else { bytes };
            write_both(out, &mut head, &bytes)?;
            Ok(Sent::Whole)
        }
        ResponseBody::Sized(length, mut reader) => {
            write!(head, "content-length: {length}\r\n\r\n")?;
            let mut out = out;
            out.write_all(&head)?;
            if bodyless {
                return Ok(Sent::Whole);
            }
            let copied = copy(&mut reader.by_ref().take(length), &mut out)?;
            Ok(if copied == length {
                Sent::Whole
            } else {
                Sent::Cut
            })
        }
        ResponseBody::Stream(body) => {
            // A client of HTTP/1.0 reads to the end of the connection.
            let chunked = shape.is_1_1;
            if chunked {
                head.extend_from_slice(b"transfer-encoding: chunked\r\n");
            }
            head.extend_from_slice(b"\r\n");
            let mut writer = Chunks {
                out,
                head: Some(head),
                chunked,
            };
            if bodyless {
                writer.flush_head()?;
                return Ok(Sent::Whole);
            }
            body(&mut writer)?;
            writer.flush_head()?;
            if chunked {
                (&*out).write_all(b"0\r\n\r\n")?;
                Ok(Sent::Whole)
            } else {
                Ok(Sent::Cut)
            }
        }
        ResponseBody::Upgrade(protocol, takeover) => {
            write!(head, "connection: Upgrade\r\nupgrade: {protocol}\r\n\r\n")?;
            (&*out).write_all(&head)?;
            Ok(Sent::Upgraded(takeover))
        }
    }
}

/// Small bodies are copied behind the head; large ones are sent from where
/// they are.
fn write_both(mut out: &UnixStream, head: &mut Vec<u8>, body: &[u8]) -> io::Result<()> {
    if body.len() <= 16 * 1024 {
        head.extend_from_slice(body);
        out.write_all(head)
    } else {
        write_all_vectored(out, &mut [IoSlice::new(head), IoSlice::new(body)])
    }
}

fn write_all_vectored(mut out: &UnixStream, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match out.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// `io::copy` with a buffer on the heap: the stacks here are small.
fn copy(from: &mut dyn Read, out: &mut dyn Write) -> io::Result<u64> {
    let mut buffer = vec![0; 64 * 1024];
    let mut copied = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(count) => {
                out.write_all(&buffer[..count])?;
                copied += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The length is promised: cutting the connection is the only
            // way left to say that the file could not be read.
            Err(_) => return Ok(copied),
        }
    }
}

/// Frames each write as a chunk; the first carries the head along.
struct Chunks<'o> {
    out: &'o UnixStream,
    head: Option<Vec<u8>>,
    chunked: bool,
}

impl Chunks<'_> {
    fn flush_head(&mut self) -> io::Result<()> {
        match self.head.take() {
            Some(head) => self.out.write_all(&head),
            None => Ok(()),
        }
    }
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let mut before = self.head.take().unwrap_or_default();
        let after: &[u8] = if self.chunked {
            write!(before, "{:x}\r\n", bytes.len())?;
            b"\r\n"
        } else {
            b""
        };
        let mut slices = [
            IoSlice::new(&before),
            IoSlice::new(bytes),
            IoSlice::new(after),
        ];
        write_all_vectored(self.out, &mut slices)?;
        Ok(bytes.len())
    }

    /// Sends the head if nothing was written yet, so that the client learns
    /// that its request was accepted.
    fn flush(&mut self) -> io::Result<()> {
        self.flush_head()
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        101 => "Switching Protocols",
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        206 => "Partial Content",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        507 => "Insufficient Storage",
        _ => "Status",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(response: Response, shape: Shape, keep: bool) -> (String, io::Result<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let result = write_response(&ours, response, shape, keep).map(|_| ());
        drop(ours);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        (text, result)
    }

    const NORMAL: Shape = Shape {
        is_head: false,
        is_1_1: true,
    };

    #[test]
    fn header_values_cannot_begin_another_field() {
        let response = Response::bytes(200, "text/plain", b"x".to_vec())
            .with_header("x-name", "a\r\nset-cookie: b");
        let (text, _) = sent(response, NORMAL, true);
        assert!(text.contains("x-name: a  set-cookie: b\r\n"), "{text}");
        assert!(text.ends_with("content-length: 1\r\n\r\nx"), "{text}");
    }

    #[test]
    fn streams_are_chunked_for_1_1_and_plain_for_1_0() {
        let stream = || {
            Response::stream(
                200,
                "text/plain",
                Box::new(|out| {
                    out.write_all(b"hello")?;
                    out.write_all(b"you")
                }),
            )
        };
        let (text, _) = sent(stream(), NORMAL, true);
        assert!(
            text.ends_with("\r\n\r\n5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n"),
            "{text}"
        );
        let old = Shape {
            is_head: false,
            is_1_1: false,
        };
        let (text, _) = sent(stream(), old, false);
        assert!(
            text.ends_with("connection: close\r\n\r\nhelloyou"),
            "{text}"
        );
    }

    #[test]
    fn a_failing_stream_never_looks_complete() {
        let response = Response::stream(
            200,
            "text/plain",
            Box::new(|out| {
                out.write_all(b"part")?;
                Err(io::Error::other("lost"))
            }),
        );
        let (text, result) = sent(response, NORMAL, true);
        assert!(result.is_err() && text.ends_with("4\r\npart\r\n"), "{text}");
    }
}
