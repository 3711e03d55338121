//! One connection: requests in, answers out, until either side has enough.

use super::body::{Body, Buffered, ReadHeadError, read_head};
use super::head::Head;
use super::write::{Sent, Shape, write_response};
use super::{Request, Response, ResponseBody, Service};
use std::cell::Cell;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long a connection may rest between requests.
const IDLE: Duration = Duration::from_secs(600);

/// How long a request's head may take from its first byte.
const HEAD: Duration = Duration::from_secs(30);

/// How long a body may pause, and how long a client may refuse to read.
const STALL: Duration = Duration::from_secs(120);

/// Most bytes of an unread body that are read away to keep the connection.
const DRAIN: u64 = 256 * 1024;

/// How long and how much a refused client may still send.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: u64 = 4 << 20;

#[derive(Clone, Copy)]
enum Patience {
    Idle,
    Until(Instant),
    Stall,
}

/// Reads from the stream with the time limit of the moment.
struct Socket {
    stream: Rc<UnixStream>,
    patience: Cell<Patience>,
    timeout: Cell<Duration>,
}

impl Socket {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(STALL))?;
        Ok(Self {
            stream: Rc::new(stream),
            patience: Cell::new(Patience::Idle),
            timeout: Cell::new(IDLE),
        })
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let timeout = match self.patience.get() {
            Patience::Idle => IDLE,
            Patience::Stall => STALL,
            Patience::Until(deadline) => deadline.saturating_duration_since(Instant::now()),
        };
        if timeout.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if timeout != self.timeout.replace(timeout) {
            self.stream.set_read_timeout(Some(timeout))?;
        }
        let result = (&*self.stream).read(buffer);
        // The first bytes of a head start its clock.
        if matches!(self.patience.get(), Patience::Idle) && matches!(result, Ok(count) if count > 0)
        {
            self.patience.set(Patience::Until(Instant::now() + HEAD));
        }
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::ErrorKind::TimedOut.into())
            }
            result => result,
        }
    }
}

/// Serves a connection to its end.
pub(super) fn serve<S: Service + ?Sized>(stream: UnixStream, service: &S) -> io::Result<()> {
    let mut from = Buffered::new(Socket::new(stream)?);
    loop {
        let patience = if from.pending().is_empty() {
            Patience::Idle
        } else {
            Patience::Until(Instant::now() + HEAD)
        };
        from.source().patience.set(patience);
        let head = match read_head(&mut from) {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(ReadHeadError::Io(error)) => {
                if error.kind() == io::ErrorKind::TimedOut && !from.pending().is_empty() {
                    refuse(
                        &from.source().stream,
                        408,
                        "the request did not arrive in time",
                    );
                }
                return Err(error);
            }
            Err(ReadHeadError::Head(error)) => {
                refuse(&from.source().stream, error.status(), &error.to_string());
                return Ok(());
            }
        };
        from.source().patience.set(Patience::Stall);
        match answer(&mut from, head, service)? {
            Next::Request => {}
            Next::Close => return Ok(()),
            Next::Upgraded(takeover) => {
                let (socket, pending) = from.into_parts();
                socket.stream.set_read_timeout(None)?;
                socket.stream.set_write_timeout(None)?;
                if let Ok(stream) = Rc::try_unwrap(socket.stream) {
                    takeover(stream, pending);
                }
                return Ok(());
            }
        }
    }
}

enum Next {
    Request,
    Close,
    Upgraded(super::Takeover),
}

fn answer<S: Service + ?Sized>(
    from: &mut Buffered<Socket>,
    head: Head,
    service: &S,
) -> io::Result<Next> {
    let out = Rc::clone(&from.source().stream);
    let shape = Shape {
        is_head: head.method == "HEAD",
        is_1_1: head.is_1_1,
    };
    let mut keep = head.keep_alive;
    let mut go_on = || (&*out).write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
    let mut body = Body::new(from, head.framing);
    if head.expects_continue && head.is_1_1 {
        body = body.before_first_read(&mut go_on);
    }
    let response = {
        let mut request = Request {
            method: head.method,
            path: head.path,
            query: head.query,
            headers: head.headers,
            body: &mut body,
            client: Some(out.as_fd()),
        };
        catch_unwind(AssertUnwindSafe(|| service.call(&mut request))).unwrap_or_else(|_| {
            keep = false;
            error_response(500, "the guest panicked while serving this request")
        })
    };
    let switches = matches!(response.body, ResponseBody::Upgrade(..));
    let keep = switches || (keep && body.drain(DRAIN));
    match write_response(&out, response, shape, keep)? {
        Sent::Whole if keep => Ok(Next::Request),
        Sent::Upgraded(takeover) => Ok(Next::Upgraded(takeover)),
        Sent::Whole => {
            linger(&out, &mut body);
            Ok(Next::Close)
        }
        Sent::Cut => Ok(Next::Close),
    }
}

/// Closes our half and reads on for a moment: a client still sending its body
/// would otherwise fail at that, and never look at the answer.
fn linger(stream: &UnixStream, body: &mut Body<'_, Socket>) {
    if stream.shutdown(Shutdown::Write).is_ok() {
        let until = Instant::now() + LINGER;
        body.source().patience.set(Patience::Until(until));
        body.drain(LINGER_BYTES);
    }
}

/// Answers what never became a request; the connection ends after it.
pub(super) fn refuse(stream: &UnixStream, status: u16, why: &str) {
    let shape = Shape {
        is_head: false,
        is_1_1: true,
    };
    // The client may be gone already; there is nobody else to tell.
    let _ = write_response(stream, error_response(status, why), shape, false);
}

fn error_response(status: u16, why: &str) -> Response {
    let code = match status {
        503 => "limit_reached",
        501 => "not_supported",
        500 => "io",
        _ => "bad_request",
    };
    Response::json(
        status,
        &serde_json::json!({ "code": code, "message": why, "detail": why }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Panics where asked to.
    struct Fragile;

    impl Service for Fragile {
        fn call(&self, request: &mut Request<'_>) -> Response {
            assert!(request.path != "/panic", "as asked");
            Response::bytes(200, "text/plain", b"fine".to_vec())
        }
    }

    #[test]
    fn a_panic_is_answered_and_ends_only_its_connection() {
        let talk = |text: &[u8]| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(text).unwrap();
            theirs.shutdown(Shutdown::Write).unwrap();
            serve(ours, &Fragile).unwrap();
            let mut answer = String::new();
            theirs.read_to_string(&mut answer).unwrap();
            answer
        };
        let answer = talk(b"GET /panic HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
        assert!(!answer.contains("fine"), "{answer}");
        assert!(talk(b"GET / HTTP/1.1\r\n\r\n").ends_with("fine"));
    }
}
