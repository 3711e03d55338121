//! `multipart/form-data` as a stream: parts are read in order and never held
//! in memory, so that an upload may be larger than the sandbox's memory.

use std::fmt;
use std::io::{self, Read};

/// Longest head of a part, in bytes.
const MAX_PART_HEAD: usize = 8 * 1024;

/// Most parts of a body.
const MAX_PARTS: usize = 1000;

/// Longest boundary RFC 2046 allows.
const MAX_BOUNDARY: usize = 70;

/// Bytes asked of the body at a time.
const READ_SIZE: usize = 16 * 1024;

/// Why a body can't be read.
#[derive(Debug)]
pub enum MultipartError {
    /// The content type is not `multipart/form-data` with a boundary.
    ContentType,
    /// It breaks the format; how.
    Malformed(&'static str),
    /// A bound was passed; which.
    TooLarge(&'static str),
    /// The connection failed or ended early.
    Io(io::Error),
}

impl fmt::Display for MultipartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContentType => {
                f.write_str("the content type is not multipart/form-data with a boundary")
            }
            Self::Malformed(what) => write!(f, "malformed multipart body: {what}"),
            Self::TooLarge(what) => write!(f, "multipart body has too much: {what}"),
            Self::Io(error) => write!(f, "the request body could not be read: {error}"),
        }
    }
}

impl std::error::Error for MultipartError {}

impl From<MultipartError> for io::Error {
    fn from(error: MultipartError) -> Self {
        match error {
            MultipartError::Io(error) => error,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        }
    }
}

/// Name, file name and media type of a part.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PartHead {
    /// Name of the form field.
    pub name: String,
    /// File name, where one was sent; as the client wrote it, so it may hold
    /// slashes.
    pub filename: Option<String>,
    /// Media type, where one was sent.
    pub content_type: Option<String>,
}

/// A part; reading it gives its content.
pub struct Part<'m, 'b> {
    /// What it is.
    pub head: PartHead,
    form: &'m mut Multipart<'b>,
}

/// Reads the parts of a body in order.
pub struct Multipart<'b> {
    body: &'b mut dyn Read,
    /// CR LF `--` boundary.
    delimiter: Vec<u8>,
    bytes: Vec<u8>,
    at: usize,
    parts: usize,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before the first delimiter.
    Preamble,
    /// Inside a part's content.
    Content,
    /// Just after a delimiter.
    Delimiter,
    /// After the closing delimiter.
    End,
}

/// The boundary of a `multipart/form-data` content type.
pub fn boundary(content_type: &str) -> Option<String> {
    let (media_type, parameters) = content_type.split_once(';')?;
    if !media_type
        .trim()
        .eq_ignore_ascii_case("multipart/form-data")
    {
        return None;
    }
    parameter(parameters, "boundary")
        .filter(|boundary| (1..=MAX_BOUNDARY).contains(&boundary.len()))
}

/// Value of `name=value` or `name="value"` among `;`-separated parameters.
fn parameter(parameters: &str, name: &str) -> Option<String> {
    let mut rest = parameters;
    loop {
        rest = rest.trim_start_matches([';', ' ', '\t']);
        let (key, after) = rest.split_once('=')?;
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => unquote(quoted)?,
            None => {
                let end = after.find(';').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        if key.trim().eq_ignore_ascii_case(name) {
            return Some(value);
        }
        rest = after;
    }
}

/// The text up to the closing quote, and what follows it. Browsers and Python
/// escape a quote as `%22` or `\"`; other backslashes are literal.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = quoted.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' if matches!(chars.peek(), Some((_, '"'))) => {
                value.push('"');
                chars.next();
            }
            c => value.push(c),
        }
    }
    None
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(step) = haystack[from..].iter().position(|b| *b == first) {
        let at = from + step;
        if haystack.len() - at < needle.len() {
            return None;
        }
        if haystack[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

impl<'b> Multipart<'b> {
    /// Reads a body of the given `Content-Type`.
    pub fn new(content_type: &str, body: &'b mut dyn Read) -> Result<Self, MultipartError> {
        let boundary = boundary(content_type).ok_or(MultipartError::ContentType)?;
        Ok(Self {
            body,
            delimiter: format!("\r\n--{boundary}").into_bytes(),
            // The first delimiter needs no line end before it.
            bytes: b"\r\n".to_vec(),
            at: 0,
            parts: 0,
            stage: Stage::Preamble,
        })
    }

    /// The next part; what was not read of the one before is skipped.
    pub fn next_part(&mut self) -> Result<Option<Part<'_, 'b>>, MultipartError> {
        while matches!(self.stage, Stage::Preamble | Stage::Content) {
            let available = self.available()?;
            self.at += available;
        }
        if self.stage == Stage::End {
            return Ok(None);
        }
        while self.pending().len() < 2 {
            self.fill_or_fail()?;
        }
        if self.pending().starts_with(b"--") {
            self.stage = Stage::End;
            return Ok(None);
        }
        self.parts += 1;
        if self.parts > MAX_PARTS {
            return Err(MultipartError::TooLarge("parts"));
        }
        let head = self.part_head()?;
        self.stage = Stage::Content;
        Ok(Some(Part { head, form: self }))
    }

    fn pending(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    fn fill_or_fail(&mut self) -> Result<(), MultipartError> {
        self.bytes.drain(..self.at);
        self.at = 0;
        let old = self.bytes.len();
        self.bytes.resize(old + READ_SIZE, 0);
        let result = loop {
            match self.body.read(&mut self.bytes[old..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.bytes.truncate(old + *result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => Err(MultipartError::Malformed(
                "it ends before its last boundary",
            )),
            Ok(_) => Ok(()),
            Err(error) => Err(MultipartError::Io(error)),
        }
    }

    /// How many pending bytes are surely content; at least 1, unless the
    /// content ended, which moves on to the delimiter.
    fn available(&mut self) -> Result<usize, MultipartError> {
        loop {
            if let Some(end) = find(self.pending(), &self.delimiter) {
                if end == 0 {
                    self.at += self.delimiter.len();
                    self.stage = Stage::Delimiter;
                }
                return Ok(end);
            }
            // The last bytes may be the beginning of a delimiter.
            let certain = (self.pending().len() + 1).saturating_sub(self.delimiter.len());
            if certain > 0 {
                return Ok(certain);
            }
            self.fill_or_fail()?;
        }
    }

    fn part_head(&mut self) -> Result<PartHead, MultipartError> {
        // Spaces may follow a boundary; the line end belongs to the head, so
        // that a part without fields ends in an empty line too.
        let length = loop {
            if let Some(end) = find(self.pending(), b"\r\n\r\n") {
                break end + 4;
            }
            if self.pending().len() > MAX_PART_HEAD {
                return Err(MultipartError::TooLarge("bytes in the head of a part"));
            }
            self.fill_or_fail()?;
        };
        if length > MAX_PART_HEAD {
            return Err(MultipartError::TooLarge("bytes in the head of a part"));
        }
        let text = String::from_utf8_lossy(&self.pending()[..length]).into_owned();
        self.at += length;
        let (after_boundary, fields) = text.split_once("\r\n").unwrap_or_default();
        if !after_boundary.trim().is_empty() {
            return Err(MultipartError::Malformed("text after a boundary"));
        }
        read_fields(fields)
    }
}

fn read_fields(fields: &str) -> Result<PartHead, MultipartError> {
    let mut head = PartHead::default();
    let mut named = false;
    for line in fields.split("\r\n").filter(|line| !line.is_empty()) {
        let (name, value) = line
            .split_once(':')
            .ok_or(MultipartError::Malformed("a field without a colon"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-disposition") {
            let (kind, parameters) = value.split_once(';').unwrap_or((value, ""));
            if !kind.trim().eq_ignore_ascii_case("form-data") {
                return Err(MultipartError::Malformed("a part that is not form-data"));
            }
            head.name = parameter(parameters, "name")
                .ok_or(MultipartError::Malformed("a part without a name"))?;
            head.filename = parameter(parameters, "filename*")
                .as_deref()
                .and_then(extended_value)
                .or_else(|| parameter(parameters, "filename"));
            named = true;
        } else if name.eq_ignore_ascii_case("content-type") {
            head.content_type = Some(value.to_owned());
        }
    }
    if named {
        Ok(head)
    } else {
        Err(MultipartError::Malformed("a part without a name"))
    }
}

/// `UTF-8''na%C3%AFve.txt` of RFC 5987.
fn extended_value(value: &str) -> Option<String> {
    let mut pieces = value.splitn(3, '\'');
    let charset = pieces.next()?;
    let encoded = pieces.nth(1)?;
    charset
        .eq_ignore_ascii_case("utf-8")
        .then(|| super::query::percent_decode(encoded))
}

impl Read for Part<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.form.stage != Stage::Content {
            return Ok(0);
        }
        let count = self.form.available()?.min(buffer.len());
        buffer[..count].copy_from_slice(&self.form.pending()[..count]);
        self.form.at += count;
        Ok(count)
    }
}

impl Part<'_, '_> {
    /// The whole content as text, at most `limit` bytes; invalid UTF-8 is
    /// replaced.
    pub fn text(&mut self, limit: u64) -> Result<String, MultipartError> {
        let mut bytes = Vec::new();
        self.by_ref()
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(MultipartError::Io)?;
        if bytes.len() as u64 > limit {
            return Err(MultipartError::TooLarge("bytes in a text field"));
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(buffer.len()).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn parts(body: &[u8], step: usize) -> Result<Vec<(PartHead, Vec<u8>)>, MultipartError> {
        let mut source = Pieces(body, step);
        let mut form = Multipart::new("multipart/form-data; boundary=\"B-\"", &mut source)?;
        let mut parts = Vec::new();
        while let Some(mut part) = form.next_part()? {
            let mut content = Vec::new();
            part.read_to_end(&mut content).map_err(MultipartError::Io)?;
            parts.push((part.head, content));
        }
        Ok(parts)
    }

    const BODY: &[u8] = b"preamble\r\n--B-  \r\n\
        Content-Disposition: form-data; name=\"file\"; filename=\"a\\\"b.txt\"\r\n\
        Content-Type: text/plain\r\n\r\n\
        \r\n--B\r\n--\r\n\r\n--B-\r\n\
        content-disposition: form-data; name=unzip; filename*=UTF-8''%C3%A9\r\n\r\n\
        \r\n--B---\r\nepilogue";

    #[test]
    fn parts_are_the_same_however_the_bytes_arrive() {
        let whole = parts(BODY, usize::MAX).unwrap();
        assert_eq!(whole[0].0.filename.as_deref(), Some("a\"b.txt"));
        assert_eq!(whole[0].0.content_type.as_deref(), Some("text/plain"));
        assert_eq!(whole[0].1, b"\r\n--B\r\n--\r\n");
        assert_eq!(whole[1].0.name, "unzip");
        assert_eq!(whole[1].0.filename.as_deref(), Some("é"));
        assert_eq!(whole[1].1, b"");
        for step in 1..40 {
            assert_eq!(parts(BODY, step).unwrap(), whole, "{step}");
        }
    }

    #[test]
    fn unread_parts_are_skipped() {
        let mut source = Pieces(BODY, 7);
        let mut form = Multipart::new("multipart/form-data; boundary=B-", &mut source).unwrap();
        form.next_part().unwrap().unwrap();
        assert_eq!(form.next_part().unwrap().unwrap().head.name, "unzip");
        assert!(form.next_part().unwrap().is_none());
    }

    #[test]
    fn broken_bodies_are_refused() {
        let long = format!("--B-\r\nX: {}\r\n\r\n", "y".repeat(MAX_PART_HEAD));
        for bad in [
            "",
            "--B-",
            "--B-\r\n\r\nno name\r\n--B---",
            "--B-\r\nContent-Disposition: attachment; name=\"x\"\r\n\r\n\r\n--B---",
            "--B-\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\ncut",
            "--B-junk\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n\r\n--B---",
            "--B-\r\nnocolon\r\n\r\n\r\n--B---",
            &long,
        ] {
            assert!(parts(bad.as_bytes(), usize::MAX).is_err(), "{bad:.40?}");
        }
        for wrong in [
            "text/plain",
            "multipart/form-data",
            "multipart/form-data; boundary=",
        ] {
            assert!(boundary(wrong).is_none(), "{wrong}");
        }
    }
}
