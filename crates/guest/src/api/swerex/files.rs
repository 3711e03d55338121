//! Files of this dialect: text in and out, uploads.

use super::Answer;
use super::error::{Exception, Failure, invalid};
use super::model::{self, ReadFile, WriteFile};
use crate::Guest;
use crate::api::{python, spool};
use crate::file::{self, WriteOptions};
use crate::http::multipart::{Multipart, MultipartError};
use crate::http::{Request, Response};
use serde_json::json;
use std::io::{Read, Seek};
use std::path::Path;

/// Largest file read as text.
const MOST_TEXT: u64 = 64 << 20;
/// Longest form field that is no file.
const MOST_FIELD: u64 = 64 << 10;

/// `POST /read_file`.
pub(super) fn read(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let wanted: ReadFile = model::read(model::object(request)?)?;
    let path = guest.processes.directory(Some(&wanted.path));
    let failed = |error: std::io::Error| Exception::os(&error, &wanted.path);
    let mut source = file::open(&path, 0, Some(MOST_TEXT + 1)).map_err(|e| failed(e.source))?;
    let mut bytes = Vec::new();
    source.reader.read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MOST_TEXT {
        return Err(failed(std::io::Error::from_raw_os_error(libc::EFBIG)).into());
    }
    let text = decode(&bytes, wanted.encoding.as_deref(), wanted.errors.as_deref())?;
    // Text mode: every line end is "\n".
    let content = text.replace("\r\n", "\n").replace('\r', "\n");
    Ok(Response::json(200, &json!({"content": content})))
}

/// Bytes in an encoding, with Python's ways to treat what does not fit.
fn decode(bytes: &[u8], encoding: Option<&str>, errors: Option<&str>) -> Result<String, Failure> {
    let name = encoding.unwrap_or("utf-8");
    let codec = name.to_ascii_lowercase().replace(['_', ' '], "-");
    match codec.as_str() {
        "utf-8" | "utf8" | "u8" | "utf-8-sig" => {}
        "ascii" | "us-ascii" | "646" => {
            if bytes.is_ascii() {
                return Ok(String::from_utf8_lossy(bytes).into_owned());
            }
        }
        "latin-1" | "latin1" | "iso-8859-1" | "iso8859-1" | "l1" => {
            return Ok(bytes.iter().map(|byte| char::from(*byte)).collect());
        }
        _ => {
            let message = format!("unknown encoding: {name}");
            return Err(Exception::of("builtins.LookupError", message).into());
        }
    }
    let bytes = match codec.as_str() {
        "utf-8-sig" => bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes),
        _ => bytes,
    };
    let is_ascii_only = matches!(codec.as_str(), "ascii" | "us-ascii" | "646");
    if !is_ascii_only && let Ok(text) = std::str::from_utf8(bytes) {
        return Ok(text.to_owned());
    }
    let replaced = |instead: &dyn Fn(u8) -> String| {
        let mut text = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            if is_ascii_only {
                for byte in chunk.valid().bytes() {
                    if byte.is_ascii() {
                        text.push(char::from(byte));
                    } else {
                        text.push_str(&instead(byte));
                    }
                }
            } else {
                text.push_str(chunk.valid());
            }
            chunk
                .invalid()
                .iter()
                .for_each(|byte| text.push_str(&instead(*byte)));
        }
        text
    };
    match errors.unwrap_or("strict") {
        "ignore" => Ok(replaced(&|_| String::new())),
        "replace" if is_ascii_only => Ok(replaced(&|_| "\u{fffd}".to_owned())),
        "replace" => Ok(String::from_utf8_lossy(bytes).into_owned()),
        "backslashreplace" => Ok(replaced(&|byte| format!("\\x{byte:02x}"))),
        "strict" => {
            let at = match std::str::from_utf8(bytes) {
                Err(error) if !is_ascii_only => error.valid_up_to(),
                _ => bytes.iter().position(|b| !b.is_ascii()).unwrap_or(0),
            };
            let message = format!(
                "'{codec}' codec can't decode byte 0x{:02x} in position {at}",
                bytes.get(at).copied().unwrap_or_default()
            );
            Err(Exception::of("builtins.UnicodeDecodeError", message).into())
        }
        other => {
            let message = format!("unknown error handler name {}", python::repr(other));
            Err(Exception::of("builtins.LookupError", message).into())
        }
    }
}

/// `POST /write_file`.
pub(super) fn write(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let wanted: WriteFile = model::read(model::object(request)?)?;
    let path = guest.processes.directory(Some(&wanted.path));
    put(&path, &mut wanted.content.as_bytes())?;
    Ok(Response::json(200, &json!({})))
}

fn put(path: &Path, content: &mut dyn Read) -> Result<(), Failure> {
    let options = WriteOptions {
        mode: None,
        parents: true,
    };
    file::write_atomically(path, options, content)?;
    Ok(())
}

impl From<MultipartError> for Failure {
    fn from(error: MultipartError) -> Self {
        Self::Refused(super::detail(400, &error.to_string()))
    }
}

/// `POST /upload`.
pub(super) fn upload(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let content_type = request.header("content-type").unwrap_or("").to_owned();
    let (mut spooled, mut target, mut unzip) = (None, None, false);
    let mut form = Multipart::new(&content_type, request.body)?;
    while let Some(mut part) = form.next_part()? {
        match part.head.name.as_str() {
            "file" => {
                let directory = guest.processes.directory(None);
                let file = spool::spool(&mut part, &directory)
                    .map_err(|error| Exception::os(&error, "the upload"))?;
                spooled = Some(file);
            }
            "target_path" => target = Some(part.text(MOST_FIELD)?),
            "unzip" => {
                let given = part.text(MOST_FIELD)?.trim().to_ascii_lowercase();
                unzip = matches!(given.as_str(), "true" | "1" | "yes" | "on" | "t" | "y");
            }
            _ => {}
        }
    }
    let missing = |field: &str| {
        Failure::Refused(invalid(json!({
            "type": "missing", "loc": ["body", field], "msg": "Field required", "input": null,
        })))
    };
    let mut spooled = spooled.ok_or_else(|| missing("file"))?;
    let target = target.ok_or_else(|| missing("target_path"))?;
    let mut path = guest.processes.directory(Some(&target));
    spooled
        .rewind()
        .map_err(|error| Exception::os(&error, &target))?;
    if unzip {
        file::unzip(spooled, &path)?;
    } else {
        if path.is_dir() {
            // A move into a directory keeps the name the reference gives it.
            path.push("temp_file_transfer");
        }
        put(&path, &mut spooled)?;
    }
    Ok(Response::json(200, &json!({})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_decoded_as_python_decodes_it() {
        let decode = |bytes: &[u8], encoding, errors| decode(bytes, encoding, errors).ok();
        assert_eq!(
            decode("h\u{e9}".as_bytes(), None, None).as_deref(),
            Some("h\u{e9}")
        );
        assert_eq!(
            decode(b"\xe9", Some("latin-1"), None).as_deref(),
            Some("\u{e9}")
        );
        assert_eq!(
            decode(b"a\xff", None, Some("replace")).as_deref(),
            Some("a\u{fffd}")
        );
        assert_eq!(decode(b"a\xff", None, Some("ignore")).as_deref(), Some("a"));
        assert_eq!(
            decode(b"a\xff", None, Some("backslashreplace")).as_deref(),
            Some("a\\xff")
        );
        assert_eq!(
            decode(b"a\xc3\xa9", Some("ascii"), Some("ignore")).as_deref(),
            Some("a")
        );
        assert_eq!(
            decode(b"\xef\xbb\xbfx", Some("utf-8-sig"), None).as_deref(),
            Some("x")
        );
        for (bytes, encoding, errors) in [
            (b"\xff".as_slice(), None, None),
            (b"\xff", Some("ascii"), None),
            (b"x", Some("klingon"), None),
            (b"\xff", None, Some("shrug")),
        ] {
            assert_eq!(decode(bytes, encoding, errors), None);
        }
    }
}
