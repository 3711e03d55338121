//! Talks to the guest of one sandbox over its Unix socket: a small pool of
//! keep-alive connections, typed calls for the native API, and raw requests
//! for those who forward other dialects.
//!
//! Nothing a guest answers is trusted: bodies read into memory are bounded and
//! every call has a deadline.

use crate::error::EngineError;
use http_body_util::{BodyExt, Full, Limited, combinators::BoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use skyrl_protocol::SandboxId;
use skyrl_protocol::guest::{
    ErrorBody, ExecEvent, ExecRequest, ExecResult, Health, Lease, TerminalRequest, frame,
};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::UnixStream;

/// Body of a request to a guest: known bytes or a stream.
pub type Body = BoxBody<Bytes, io::Error>;

/// Idle connections kept for one guest.
const POOLED_CONNECTIONS: usize = 16;

/// Longest answer read into memory, in bytes: two streams of output at the
/// guest's own bound, as JSON.
const MAX_ANSWER: usize = 256 << 20;

/// Deadline of calls that only ask the guest itself.
const CONTROL_DEADLINE: Duration = Duration::from_secs(10);

/// How long beyond a command's own time-out its answer may take.
const EXEC_SLACK: Duration = Duration::from_secs(30);

/// Handle on the guest of one sandbox; clones share the connections.
#[derive(Clone)]
pub struct GuestClient {
    inner: Arc<Inner>,
}

struct Inner {
    id: SandboxId,
    socket: PathBuf,
    idle: Mutex<Vec<http1::SendRequest<Body>>>,
}

/// Known bytes as a request body.
pub fn bytes_body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed()
}

/// Chunks arriving over time as a request body.
pub fn channel_body(chunks: tokio::sync::mpsc::Receiver<io::Result<Bytes>>) -> Body {
    ChannelBody(chunks).boxed()
}

struct ChannelBody(tokio::sync::mpsc::Receiver<io::Result<Bytes>>);

impl hyper::body::Body for ChannelBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0
            .poll_recv(context)
            .map(|chunk| chunk.map(|chunk| chunk.map(Frame::data)))
    }
}

impl GuestClient {
    /// A client of the guest listening on `socket`.
    pub fn new(id: SandboxId, socket: PathBuf) -> Self {
        Self {
            inner: Arc::new(Inner {
                id,
                socket,
                idle: Mutex::new(Vec::new()),
            }),
        }
    }

    /// The sandbox it belongs to.
    pub fn id(&self) -> &SandboxId {
        &self.inner.id
    }

    /// Path of the guest's socket on the host.
    pub fn socket(&self) -> &Path {
        &self.inner.socket
    }

    fn failed(&self, reason: impl ToString) -> EngineError {
        EngineError::Guest {
            id: self.inner.id.clone(),
            reason: reason.to_string(),
        }
    }

    /// Sends any request. The target is a path with query; `Host` is set. The
    /// body of the answer streams; dropping it closes the connection, which
    /// cancels what the guest was doing for it.
    ///
    /// # Errors
    /// [`EngineError::Guest`] when the guest can't be reached or hangs up.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Answer>, EngineError> {
        request
            .headers_mut()
            .insert(HOST, HeaderValue::from_static("sandbox"));
        let mut connection = self.connection().await?;
        let response = connection
            .send_request(request)
            .await
            .map_err(|e| self.failed(describe(&e)))?;
        let client = self.clone();
        Ok(response.map(|body| Answer {
            body,
            give_back: Some((client, connection)),
        }))
    }

    async fn connection(&self) -> Result<http1::SendRequest<Body>, EngineError> {
        loop {
            let pooled = self.idle().pop();
            match pooled {
                Some(connection) if connection.is_ready() => return Ok(connection),
                Some(_) => {}
                None => break,
            }
        }
        let stream = connect(&self.inner.socket)
            .await
            .map_err(|e| self.failed(format!("connecting: {e}")))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.failed(describe(&e)))?;
        // Ends by itself when the sender is dropped or the guest hangs up.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<http1::SendRequest<Body>>> {
        match self.inner.idle.lock() {
            Ok(idle) => idle,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    /// One call with a JSON (or empty) body and a JSON answer.
    ///
    /// # Errors
    /// [`EngineError::Guest`] with the guest's own words when it refuses,
    /// [`EngineError::Deadline`] when `deadline` passes first.
    pub async fn call<Q, A>(
        &self,
        method: Method,
        target: &str,
        question: Option<&Q>,
        deadline: Option<Duration>,
    ) -> Result<A, EngineError>
    where
        Q: Serialize + ?Sized,
        A: DeserializeOwned,
    {
        let body = question
            .map(serde_json::to_vec)
            .transpose()
            .map_err(|e| self.failed(e))?
            .unwrap_or_default();
        let answer = self
            .exchange(method, target, bytes_body(body), deadline)
            .await?;
        serde_json::from_slice(&answer).map_err(|e| self.failed(format!("{target}: {e}")))
    }

    /// One call with any body; the whole answer as bytes.
    ///
    /// # Errors
    /// As for [`GuestClient::call`].
    pub async fn exchange(
        &self,
        method: Method,
        target: &str,
        body: Body,
        deadline: Option<Duration>,
    ) -> Result<Bytes, EngineError> {
        let work = async {
            let answer = self.send(self.request(method, target, body)?).await?;
            let status = answer.status();
            let bytes = answer
                .into_body()
                .collect(MAX_ANSWER)
                .await
                .map_err(|e| self.failed(e))?;
            if status.is_success() {
                return Ok(bytes);
            }
            Err(self.refused(target, status, &bytes))
        };
        match deadline {
            None => work.await,
            Some(limit) => {
                tokio::time::timeout(limit, work)
                    .await
                    .unwrap_or(Err(EngineError::Deadline {
                        verb: "a call to the guest",
                        limit,
                    }))
            }
        }
    }

    fn request(
        &self,
        method: Method,
        target: &str,
        body: Body,
    ) -> Result<Request<Body>, EngineError> {
        Request::builder()
            .method(method)
            .uri(target)
            .header(CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|e| self.failed(e))
    }

    fn refused(&self, target: &str, status: StatusCode, body: &[u8]) -> EngineError {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody { message, hint, .. }) => {
                let hint = hint.map(|h| format!(" (hint: {h})")).unwrap_or_default();
                self.failed(format!("{message}{hint}"))
            }
            Err(_) => {
                let text = String::from_utf8_lossy(&body[..body.len().min(500)]).into_owned();
                self.failed(format!("{target} answered {status}: {text}"))
            }
        }
    }

    /// Whether the guest serves.
    ///
    /// # Errors
    /// As for [`GuestClient::call`].
    pub async fn health(&self) -> Result<Health, EngineError> {
        self.call::<(), _>(Method::GET, "/v1/health", None, Some(CONTROL_DEADLINE))
            .await
    }

    /// Lets the guest live so much longer without its owner.
    ///
    /// # Errors
    /// As for [`GuestClient::call`].
    pub async fn renew_lease(&self, seconds: u32, deadline: Duration) -> Result<(), EngineError> {
        let lease = Lease { seconds };
        self.call::<_, serde_json::Value>(Method::PUT, "/v1/lease", Some(&lease), Some(deadline))
            .await
            .map(drop)
    }

    /// Runs a command and waits for its end: at most its own time-out and some
    /// slack, or as long as it takes when it has none. Dropping the future
    /// kills the command.
    ///
    /// # Errors
    /// [`EngineError::Guest`] when it can't be started or the sandbox ends.
    pub async fn exec(&self, request: &ExecRequest) -> Result<ExecResult, EngineError> {
        let deadline = request
            .timeout_ms
            .map(|ms| Duration::from_millis(ms.saturating_add(request.grace_ms)) + EXEC_SLACK);
        self.call(Method::POST, "/v1/exec", Some(request), deadline)
            .await
    }

    /// Runs a command and hands its output to `on_event` as it appears.
    ///
    /// # Errors
    /// As for [`GuestClient::exec`].
    pub async fn exec_streaming(
        &self,
        request: &ExecRequest,
        mut on_event: impl FnMut(&ExecEvent),
    ) -> Result<ExecResult, EngineError> {
        let request = ExecRequest {
            stream: true,
            ..request.clone()
        };
        let body = serde_json::to_vec(&request).map_err(|e| self.failed(e))?;
        let answer = self
            .send(self.request(Method::POST, "/v1/exec", bytes_body(body))?)
            .await?;
        let status = answer.status();
        let mut answer = answer.into_body();
        if !status.is_success() {
            let bytes = answer
                .collect(MAX_ANSWER)
                .await
                .map_err(|e| self.failed(e))?;
            return Err(self.refused("/v1/exec", status, &bytes));
        }
        let mut line = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|e| self.failed(e))? {
            for piece in chunk.split_inclusive(|b| *b == b'\n') {
                line.extend_from_slice(piece);
                if line.len() > MAX_ANSWER {
                    return Err(self.failed("an event is too long"));
                }
                if !piece.ends_with(b"\n") {
                    continue;
                }
                let event: ExecEvent = serde_json::from_slice(&line).map_err(|e| self.failed(e))?;
                line.clear();
                on_event(&event);
                if let ExecEvent::Finished { result } = event {
                    return Ok(*result);
                }
            }
        }
        Err(self.failed("the sandbox ended while the command ran"))
    }

    /// Opens an interactive terminal; the connection then carries the frames
    /// of [`skyrl_protocol::guest::frame`].
    ///
    /// # Errors
    /// [`EngineError::Guest`] when the program can't be started.
    pub async fn terminal(
        &self,
        request: &TerminalRequest,
    ) -> Result<TokioIo<hyper::upgrade::Upgraded>, EngineError> {
        let body = serde_json::to_vec(request).map_err(|e| self.failed(e))?;
        let mut request = self.request(Method::POST, "/v1/terminal", bytes_body(body))?;
        request
            .headers_mut()
            .insert(UPGRADE, HeaderValue::from_static(frame::PROTOCOL));
        request
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("upgrade"));
        let answer = self.send(request).await?;
        let status = answer.status();
        if status != StatusCode::SWITCHING_PROTOCOLS {
            let bytes = answer
                .into_body()
                .collect(MAX_ANSWER)
                .await
                .map_err(|e| self.failed(e))?;
            return Err(self.refused("/v1/terminal", status, &bytes));
        }
        let response = answer.map(|answer| answer.body);
        hyper::upgrade::on(response)
            .await
            .map(TokioIo::new)
            .map_err(|e| self.failed(describe(&e)))
    }
}

/// Body of an answer. Read to its end, its connection goes back to the pool.
pub struct Answer {
    body: Incoming,
    give_back: Option<(GuestClient, http1::SendRequest<Body>)>,
}

impl Answer {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// When the guest hangs up early.
    pub async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            match self.body.frame().await {
                None => {
                    self.finished();
                    return Ok(None);
                }
                Some(Err(error)) => return Err(io::Error::other(describe(&error))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All of it, at most `limit` bytes.
    ///
    /// # Errors
    /// When it is longer or the guest hangs up early.
    pub async fn collect(mut self, limit: usize) -> io::Result<Bytes> {
        let bytes = Limited::new(&mut self.body, limit)
            .collect()
            .await
            .map_err(io::Error::other)?
            .to_bytes();
        self.finished();
        Ok(bytes)
    }

    fn finished(&mut self) {
        if let Some((client, connection)) = self.give_back.take() {
            let mut idle = client.idle();
            if idle.len() < POOLED_CONNECTIONS {
                idle.push(connection);
            }
        }
    }
}

/// Connects to a Unix socket whose path may be longer than the 107 bytes that
/// an address can hold.
pub async fn connect(socket: &Path) -> io::Result<UnixStream> {
    if socket.as_os_str().len() < 108 {
        return UnixStream::connect(socket).await;
    }
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let dir = std::fs::File::open(dir)?;
    let short = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name);
    UnixStream::connect(short).await
}

fn describe(error: &hyper::Error) -> String {
    let source = std::error::Error::source(error);
    let broken_off = source
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|io| {
            matches!(
                io.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::BrokenPipe
            )
        });
    if broken_off || error.is_closed() || error.is_incomplete_message() || error.is_canceled() {
        "it hung up: the sandbox has ended".to_owned()
    } else {
        let source = source.map(|s| format!(": {s}"));
        format!("{error}{}", source.unwrap_or_default())
    }
}
