//! The head of a request: request line and header fields, checked once, so
//! that the rest of the server works on types. Pure; it does no I/O.

use super::Query;
use super::query::percent_decode;
use std::fmt;

/// Longest head accepted, in bytes.
pub const MAX_HEAD: usize = 64 * 1024;

/// Most header fields accepted.
pub const MAX_FIELDS: usize = 100;

/// How a body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// So many bytes, 0 when there is no body.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

/// A parsed head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Method, upper case.
    pub method: String,
    /// Path, percent-decoded.
    pub path: String,
    /// Query parameters.
    pub query: Query,
    /// Header fields in order; names in lower case.
    pub headers: Vec<(String, String)>,
    /// How the body is delimited.
    pub framing: Framing,
    /// HTTP/1.1 rather than 1.0.
    pub is_1_1: bool,
    /// The client can use the connection again.
    pub keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

/// Why a head was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadError {
    /// Not HTTP; what was wrong.
    Malformed(String),
    /// Longer than [`MAX_HEAD`] or more fields than [`MAX_FIELDS`].
    TooLarge,
    /// A transfer encoding other than `chunked`.
    UnknownEncoding(String),
    /// An `Expect` other than `100-continue`.
    UnknownExpectation,
}

impl HeadError {
    /// Status code that tells the client.
    pub fn status(&self) -> u16 {
        match self {
            Self::Malformed(_) => 400,
            Self::TooLarge => 431,
            Self::UnknownEncoding(_) => 501,
            Self::UnknownExpectation => 417,
        }
    }
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(what) => write!(f, "malformed request: {what}"),
            Self::TooLarge => write!(
                f,
                "request head is over {MAX_HEAD} bytes or {MAX_FIELDS} fields"
            ),
            Self::UnknownEncoding(given) => {
                write!(f, "transfer encoding {given:?} is not supported")
            }
            Self::UnknownExpectation => write!(f, "only Expect: 100-continue is supported"),
        }
    }
}

fn malformed<T>(what: impl Into<String>) -> Result<T, HeadError> {
    Err(HeadError::Malformed(what.into()))
}

impl Head {
    /// Reads a head from the start of `bytes`: the head and its length, or
    /// nothing while it is incomplete.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, HeadError> {
        let window = &bytes[..bytes.len().min(MAX_HEAD)];
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        let length = match request.parse(window) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if window.len() == MAX_HEAD => {
                return Err(HeadError::TooLarge);
            }
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge),
            Err(error) => return malformed(error.to_string()),
        };
        let headers: Vec<(String, String)> = request
            .headers
            .iter()
            .map(|field| {
                (
                    field.name.to_ascii_lowercase(),
                    String::from_utf8_lossy(field.value).trim().to_owned(),
                )
            })
            .collect();
        let is_1_1 = request.version == Some(1);
        let (path, query) = split_target(request.path.unwrap_or_default())?;
        let framing = framing(&headers)?;
        let head = Self {
            method: request.method.unwrap_or_default().to_ascii_uppercase(),
            path,
            query,
            framing,
            is_1_1,
            keep_alive: keep_alive(&headers, is_1_1),
            expects_continue: expects_continue(&headers)?,
            headers,
        };
        Ok(Some((head, length)))
    }
}

/// Path and query of a request target in origin, absolute or asterisk form.
fn split_target(target: &str) -> Result<(String, Query), HeadError> {
    let origin = match target.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => {
            rest.find('/').map_or("/", |slash| &rest[slash..])
        }
        _ => target,
    };
    if !origin.starts_with('/') && origin != "*" {
        return malformed("the request target does not begin with '/'");
    }
    let origin = origin.split('#').next().unwrap_or_default();
    let (path, query) = origin.split_once('?').unwrap_or((origin, ""));
    Ok((percent_decode(path), Query::parse(query)))
}

/// Two different opinions about the length of a body are how requests are
/// smuggled past a proxy; both at once are refused.
fn framing(headers: &[(String, String)]) -> Result<Framing, HeadError> {
    let mut length: Option<u64> = None;
    let mut chunked = false;
    for (name, value) in headers {
        match name.as_str() {
            "content-length" => {
                if value.is_empty() || !value.bytes().all(|b| b.is_ascii_digit()) {
                    return malformed("Content-Length is not a number");
                }
                let Ok(given) = value.parse() else {
                    return malformed("Content-Length is too large");
                };
                if length.is_some_and(|earlier| earlier != given) {
                    return malformed("two different Content-Length fields");
                }
                length = Some(given);
            }
            "transfer-encoding" => {
                if chunked || !value.eq_ignore_ascii_case("chunked") {
                    return Err(HeadError::UnknownEncoding(value.clone()));
                }
                chunked = true;
            }
            _ => {}
        }
    }
    match (length, chunked) {
        (Some(_), true) => malformed("both Content-Length and Transfer-Encoding"),
        (length, false) => Ok(Framing::Length(length.unwrap_or(0))),
        (None, true) => Ok(Framing::Chunked),
    }
}

fn keep_alive(headers: &[(String, String)], is_1_1: bool) -> bool {
    let mut keep = is_1_1;
    for (_, value) in headers.iter().filter(|(name, _)| name == "connection") {
        for option in value.split(',').map(str::trim) {
            if option.eq_ignore_ascii_case("close") {
                return false;
            }
            keep |= option.eq_ignore_ascii_case("keep-alive");
        }
    }
    keep
}

fn expects_continue(headers: &[(String, String)]) -> Result<bool, HeadError> {
    match headers.iter().find(|(name, _)| name == "expect") {
        None => Ok(false),
        Some((_, value)) if value.eq_ignore_ascii_case("100-continue") => Ok(true),
        Some(_) => Err(HeadError::UnknownExpectation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Option<(Head, usize)>, HeadError> {
        Head::parse(text.as_bytes())
    }

    fn head(text: &str) -> Head {
        parse(text).unwrap().unwrap().0
    }

    #[test]
    fn a_head_is_read_whole_or_not_at_all() {
        let text = "GET /a%20b?x=1#f HTTP/1.1\r\nHost: s\r\nX-A: b\r\n\r\nrest";
        for end in 0..text.len() - 4 {
            assert_eq!(parse(&text[..end]), Ok(None), "{end}");
        }
        let (head, length) = parse(text).unwrap().unwrap();
        assert_eq!(&text[length..], "rest");
        assert_eq!(
            (head.path.as_str(), head.query.get("x")),
            ("/a b", Some("1"))
        );
        assert_eq!(head.headers[1], ("x-a".to_owned(), "b".to_owned()));
        assert!(head.keep_alive && head.framing == Framing::Length(0));
    }

    #[test]
    fn ambiguous_body_lengths_are_refused() {
        for fields in [
            "Content-Length: 1\r\nContent-Length: 2\r\n",
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
            "Content-Length: +1\r\n",
            "Content-Length: -1\r\n",
            "Content-Length: 99999999999999999999999\r\n",
            "Content-Length: \r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: gzip, chunked\r\n",
            "Content-Length : 3\r\n",
        ] {
            let text = format!("POST / HTTP/1.1\r\n{fields}\r\n");
            assert!(parse(&text).is_err(), "{fields:?} was accepted");
        }
        let same = "POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(head(same).framing, Framing::Length(2));
    }

    #[test]
    fn endless_heads_are_refused_at_the_bound() {
        let long = format!("GET /{} HTTP/1.1", "x".repeat(MAX_HEAD));
        assert_eq!(parse(&long), Err(HeadError::TooLarge));
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(MAX_FIELDS + 1)
        );
        assert_eq!(parse(&many), Err(HeadError::TooLarge));
    }

    #[test]
    fn connections_close_when_either_side_cannot_keep_them() {
        assert!(!head("GET / HTTP/1.0\r\n\r\n").keep_alive);
        assert!(head("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive);
        assert!(!head("GET / HTTP/1.1\r\nConnection: x, Close\r\n\r\n").keep_alive);
    }

    #[test]
    fn absolute_targets_lose_their_authority() {
        assert_eq!(head("GET http://h/p?q HTTP/1.1\r\n\r\n").path, "/p");
        assert_eq!(head("GET http://h HTTP/1.1\r\n\r\n").path, "/");
        assert!(parse("GET p HTTP/1.1\r\n\r\n").is_err());
    }
}
