//! `/file`: uploads, downloads, directories.

use super::time::http_date;
use super::validate::Problems;
use super::{Answer, failure, internal};
use crate::Guest;
use crate::file::{self, WriteOptions};
use crate::http::multipart::{Multipart, MultipartError};
use crate::http::{Query, Request, Response, ResponseBody};
use serde_json::json;
use std::fmt::Write as _;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Directories of one page.
const MAX_PAGE: i64 = 100;
/// Directories looked at.
const MAX_SUBDIRS: usize = 100_000;

/// The absolute path of the query.
fn absolute(query: &Query) -> Result<&Path, Response> {
    let mut problems = Problems::default();
    let path = problems.required(query, "path");
    let path = Path::new(problems.check(path)?);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(failure(400, "Path must be absolute"))
    }
}

/// `Content-Disposition` of a download.
pub(super) fn attachment(name: &str) -> String {
    let encoded = percent_encode(name);
    if encoded == name {
        format!("attachment; filename=\"{name}\"")
    } else {
        format!("attachment; filename*=utf-8''{encoded}")
    }
}

/// Everything but letters, digits and `_.-~` as `%XX`.
pub(super) fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) {
            encoded.push(byte as char);
        } else {
            // Writing to a String can't fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// What part of a file is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Whole,
    /// First byte and length.
    Part(u64, u64),
    /// The file has nothing of it.
    Unsatisfiable,
    /// It can't be read; why.
    Malformed(&'static str),
}

/// Reads a `Range` field. Several ranges are answered with the whole file,
/// which HTTP allows.
fn wanted(range: Option<&str>, size: u64) -> Wanted {
    let Some(range) = range else {
        return Wanted::Whole;
    };
    let Some(ranges) = range.trim().strip_prefix("bytes=") else {
        return Wanted::Malformed("Only support bytes range");
    };
    if ranges.contains(',') {
        return Wanted::Whole;
    }
    let malformed = Wanted::Malformed("Range header: range must be requested");
    let Some((first, last)) = ranges.trim().split_once('-') else {
        return malformed;
    };
    let number = |text: &str| text.trim().parse::<u64>();
    let (start, end) = match (first.trim().is_empty(), last.trim().is_empty()) {
        (true, true) => return malformed,
        (true, false) => match number(last) {
            Ok(count) => (size - count.min(size), size),
            Err(_) => return malformed,
        },
        (false, open) => match (number(first), number(last)) {
            (Ok(start), Ok(end)) if start <= end => (start, end.saturating_add(1).min(size)),
            (Ok(start), Err(_)) if open => (start, size),
            (Ok(_), Ok(_)) => {
                return Wanted::Malformed("Range header: start must be less than end");
            }
            _ => return malformed,
        },
    };
    if start >= size || start >= end {
        return Wanted::Unsatisfiable;
    }
    Wanted::Part(start, end - start)
}

/// Changes with the content of a file.
fn etag(meta: &Metadata) -> String {
    format!(
        "\"{:x}-{:x}-{:x}\"",
        meta.ino(),
        meta.mtime_nsec() + meta.mtime() * 1_000_000_000,
        meta.len()
    )
}

/// What is known of a regular file.
fn look(path: &Path) -> Result<Metadata, Response> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(meta),
        Ok(_) => Err(failure(400, "Path is not a file")),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                failure(404, "File not found")
            }
            _ => internal(&format!("can't look at {}: {error}", path.display())),
        }),
    }
}

fn text(status: u16, text: &str) -> Response {
    Response::bytes(
        status,
        "text/plain; charset=utf-8",
        text.as_bytes().to_vec(),
    )
}

/// `GET /file/download`.
pub(super) fn download(request: &Request<'_>) -> Answer {
    let path = absolute(&request.query)?;
    let meta = look(path)?;
    let tag = etag(&meta);
    let modified = http_date(meta.mtime().max(0) as u64);
    // A range of another version of the file is of no use.
    let same = request
        .header("if-range")
        .is_none_or(|version| version == tag || version == modified);
    let range = request.header("range").filter(|_| same);
    let (status, start, limit) = match wanted(range, meta.len()) {
        Wanted::Whole => (200, 0, None),
        Wanted::Part(start, length) => (206, start, Some(length)),
        Wanted::Unsatisfiable => {
            let size = format!("bytes */{}", meta.len());
            return Err(text(416, "").with_header("content-range", size));
        }
        Wanted::Malformed(why) => return Err(text(400, why)),
    };
    let source = file::open(path, start, limit).map_err(|error| internal(&error.to_string()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let disposition = attachment(&name);
    let last = source.length.map(|length| start + length.saturating_sub(1));
    let body = match source.length {
        Some(length) => ResponseBody::Sized(length, source.reader),
        // A file of a pseudo file system does not know its size.
        None => {
            let mut reader = source.reader;
            ResponseBody::Stream(Box::new(move |out| io::copy(&mut reader, out).map(|_| ())))
        }
    };
    let response = Response {
        status,
        headers: vec![("content-type", "application/octet-stream".to_owned())],
        body,
    };
    let response = response
        .with_header("content-disposition", disposition)
        .with_header("accept-ranges", "bytes")
        .with_header("etag", tag)
        .with_header("last-modified", modified);
    Ok(match last {
        Some(last) if status == 206 => {
            let part = format!("bytes {start}-{last}/{}", source.size);
            response.with_header("content-range", part)
        }
        _ => response,
    })
}

/// `POST /file/upload`: the part `file` becomes the file at `path`.
pub(super) fn upload(request: &mut Request<'_>) -> Answer {
    let path = absolute(&request.query)?.to_owned();
    let content_type = request
        .header("content-type")
        .unwrap_or_default()
        .to_owned();
    let no_file = || {
        let mut problems = Problems::default();
        problems.missing(&["body", "file"], serde_json::Value::Null);
        problems.response()
    };
    let malformed = |error: MultipartError| match error {
        MultipartError::ContentType => no_file(),
        error => failure(400, &error.to_string()),
    };
    let mut form = Multipart::new(&content_type, request.body).map_err(malformed)?;
    while let Some(mut part) = form.next_part().map_err(malformed)? {
        if part.head.name != "file" {
            continue;
        }
        if path.is_dir() {
            return Err(failure(400, "Path is a directory"));
        }
        let options = WriteOptions {
            mode: None,
            parents: true,
        };
        let size =
            file::write_atomically(&path, options, &mut part).map_err(|error| {
                match error.source.kind() {
                    io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
                        failure(400, "A parent of the path is not a directory")
                    }
                    _ => internal(&error.to_string()),
                }
            })?;
        return Ok(Response::json(
            200,
            &json!({"success": true, "file_size": size}),
        ));
    }
    Err(no_file())
}

/// `POST /file/create_directory`.
pub(super) fn create_directory(request: &Request<'_>) -> Answer {
    let path = absolute(&request.query)?;
    match fs::create_dir_all(path) {
        Ok(()) => Ok(Response::json(200, &json!({"success": true}))),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                failure(400, "Path exists and is not a directory")
            }
            _ => internal(&format!("Can't create {}: {error}", path.display())),
        }),
    }
}

/// `GET /file/home`.
pub(super) fn home(guest: &Guest) -> Response {
    let home = guest.processes.settings().environment.get("HOME");
    Response::json(
        200,
        &json!({
            "home": home.unwrap_or("/"),
            "favorites": [],
            "locations": [{"label": "/", "path": "/"}],
        }),
    )
}

/// `GET /file/search_subdirs`.
pub(super) fn search_subdirs(request: &Request<'_>) -> Answer {
    let query = &request.query;
    let mut problems = Problems::default();
    problems.required(query, "path");
    let limit = problems.integer(query, "limit", 1, MAX_PAGE);
    problems.check(())?;
    let path = absolute(query)?;
    let entries = fs::read_dir(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => failure(404, "Directory not found"),
        io::ErrorKind::NotADirectory => failure(400, "Path is not a directory"),
        _ => internal(&format!("Can't list {}: {error}", path.display())),
    })?;
    let hidden = query.flag("include_hidden");
    let mut names: Vec<String> = entries
        .take(MAX_SUBDIRS)
        .flatten()
        // A link to a directory counts.
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| hidden || !name.starts_with('.'))
        .collect();
    names.sort();
    // The id of a page is the name it begins with.
    let start = query.get("page_id").map_or(0, |first| {
        names.partition_point(|name| name.as_str() < first)
    });
    let end = names.len().min(start + limit.unwrap_or(MAX_PAGE) as usize);
    let items: Vec<_> = names[start..end]
        .iter()
        .map(|name| json!({"name": name, "path": path.join(name).to_string_lossy()}))
        .collect();
    Ok(Response::json(
        200,
        &json!({"items": items, "next_page_id": names.get(end)}),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_http_says() {
        let part = |range| wanted(Some(range), 10);
        assert_eq!(wanted(None, 10), Wanted::Whole);
        assert_eq!(part("bytes=2-4"), Wanted::Part(2, 3));
        assert_eq!(part("bytes=7-"), Wanted::Part(7, 3));
        assert_eq!(part("bytes=-3"), Wanted::Part(7, 3));
        assert_eq!(part("bytes=-30"), Wanted::Part(0, 10));
        assert_eq!(part("bytes=5-500"), Wanted::Part(5, 5));
        assert_eq!(part("bytes=0-1,3-4"), Wanted::Whole);
        assert_eq!(part("bytes=10-"), Wanted::Unsatisfiable);
        assert_eq!(part("bytes=-0"), Wanted::Unsatisfiable);
        for bad in [
            "lines=1-2",
            "bytes=",
            "bytes=-",
            "bytes=x-1",
            "bytes=4-2",
            "bytes=1-x",
        ] {
            assert!(matches!(part(bad), Wanted::Malformed(_)), "{bad}");
        }
    }

    #[test]
    fn odd_names_are_encoded() {
        assert_eq!(attachment("a-1.txt"), "attachment; filename=\"a-1.txt\"");
        assert_eq!(
            attachment("na\"m é"),
            "attachment; filename*=utf-8''na%22m%20%C3%A9"
        );
        assert_eq!(percent_encode("/a\r\n"), "%2Fa%0D%0A");
    }
}
