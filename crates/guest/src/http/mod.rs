//! HTTP/1.1 as the guest speaks it: one thread a connection, keep-alive,
//! bounded headers, streamed bodies both ways. It knows nothing of what is
//! served; routes live in `crate::api`.

pub mod body;
mod connection;
pub mod head;
pub mod multipart;
mod query;
mod server;
mod write;

pub use query::Query;
pub use server::serve;

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

/// Longest JSON body read into memory, in bytes.
pub const MAX_JSON_BODY: u64 = 64 << 20;

/// A request whose body is still on the connection.
pub struct Request<'c> {
    /// Method, upper case.
    pub method: String,
    /// Path, percent-decoded, without the query.
    pub path: String,
    /// Query parameters.
    pub query: Query,
    /// Header fields in order; names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body: de-chunked, bounded by its declared length.
    pub body: &'c mut dyn Read,
    /// The client's end of the connection, to notice that it went away while
    /// it waits; absent when the request came from elsewhere.
    pub client: Option<BorrowedFd<'c>>,
}

/// What answers requests.
pub trait Service: Send + Sync + 'static {
    /// Answers one request. Runs on the connection's own thread and may block;
    /// a panic is answered with 500 and ends only this connection.
    fn call(&self, request: &mut Request<'_>) -> Response;
}

/// Why a body could not be used.
#[derive(Debug)]
pub enum BodyError {
    /// The connection failed or ended early.
    Io(io::Error),
    /// It is longer than allowed (the bound in bytes).
    TooLong(u64),
    /// It is not the JSON expected; the parser's own words.
    Json(serde_json::Error),
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "the request body could not be read: {error}"),
            Self::TooLong(limit) => write!(f, "the request body is over {limit} bytes"),
            Self::Json(error) => write!(f, "the request body is not the JSON expected: {error}"),
        }
    }
}

impl std::error::Error for BodyError {}

impl Request<'_> {
    /// First value of a header field, by lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    /// The whole body, at most `limit` bytes.
    pub fn bytes(&mut self, limit: u64) -> Result<Vec<u8>, BodyError> {
        let mut bytes = Vec::new();
        let mut bounded = (&mut *self.body).take(limit + 1);
        bounded.read_to_end(&mut bytes).map_err(BodyError::Io)?;
        if bytes.len() as u64 > limit {
            return Err(BodyError::TooLong(limit));
        }
        Ok(bytes)
    }

    /// The body as JSON; an empty body reads as `null`.
    pub fn json<T: DeserializeOwned>(&mut self) -> Result<T, BodyError> {
        let bytes = self.bytes(MAX_JSON_BODY)?;
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(BodyError::Json)
    }
}

/// Takes the connection over after `101 Switching Protocols`; what the client
/// sent early is the second argument.
pub type Takeover = Box<dyn FnOnce(UnixStream, Vec<u8>) + Send>;

/// Writes a body of unknown length piece by piece; each `write` reaches the
/// client at once. An error means that the client is gone.
pub type StreamBody = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + Send>;

/// Body of an answer.
pub enum ResponseBody {
    /// Known bytes.
    Bytes(Vec<u8>),
    /// So many bytes from a reader.
    Sized(u64, Box<dyn Read + Send>),
    /// Chunked.
    Stream(StreamBody),
    /// Switch protocols to the one named, then hand the connection over.
    Upgrade(&'static str, Takeover),
}

/// An answer.
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header fields beside length and connection, which the server adds.
    pub headers: Vec<(&'static str, String)>,
    /// Body.
    pub body: ResponseBody,
}

impl Response {
    /// Bytes of a media type.
    pub fn bytes(status: u16, media_type: &str, bytes: Vec<u8>) -> Self {
        Self {
            status,
            headers: vec![("content-type", media_type.to_owned())],
            body: ResponseBody::Bytes(bytes),
        }
    }

    /// A value as JSON.
    pub fn json<T: Serialize + ?Sized>(status: u16, value: &T) -> Self {
        match serde_json::to_vec(value) {
            Ok(bytes) => Self::bytes(status, "application/json", bytes),
            Err(error) => Self::bytes(500, "text/plain", error.to_string().into_bytes()),
        }
    }

    /// A chunked body.
    pub fn stream(status: u16, media_type: &str, body: StreamBody) -> Self {
        Self {
            status,
            headers: vec![("content-type", media_type.to_owned())],
            body: ResponseBody::Stream(body),
        }
    }

    /// Adds a header field.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}
