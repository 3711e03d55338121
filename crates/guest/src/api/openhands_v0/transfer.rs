//! Uploads, downloads and listings.

use super::{Answer, body, detail, invalid};
use crate::Guest;
use crate::api::spool;
use crate::file::{self, WriteOptions};
use crate::http::multipart::{Multipart, MultipartError};
use crate::http::{Request, Response};
use serde_json::json;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

/// Names listed at most.
const MOST_NAMES: usize = 100_000;

/// Why a transfer failed, in words.
pub(super) struct Failed(pub(super) String);

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<MultipartError> for Failed {
    fn from(error: MultipartError) -> Self {
        Self(error.to_string())
    }
}

/// The reference answers every failure with 500 and its text.
impl From<Failed> for Response {
    fn from(failed: Failed) -> Self {
        detail(500, &failed.0)
    }
}

/// `POST /upload_file`.
pub(super) fn upload(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let destination = request
        .query
        .get("destination")
        .ok_or_else(|| invalid("query parameter \"destination\" is missing"))?
        .to_owned();
    let recursive = request.query.flag("recursive");
    if !Path::new(&destination).is_absolute() {
        return Err(detail(
            500,
            "400: Destination path must be an absolute path",
        ));
    }
    let name = store(guest, request, Path::new(&destination), recursive)?;
    Ok(Response::json(
        200,
        &json!({"filename": name, "destination": destination, "recursive": recursive}),
    ))
}

fn store(
    guest: &Guest,
    request: &mut Request<'_>,
    destination: &Path,
    recursive: bool,
) -> Result<String, Failed> {
    let content_type = request.header("content-type").unwrap_or("").to_owned();
    let mut form = Multipart::new(&content_type, request.body)?;
    while let Some(mut part) = form.next_part()? {
        if part.head.name != "file" {
            continue;
        }
        let given = part.head.filename.clone().unwrap_or_default();
        let name = Path::new(&given)
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .ok_or_else(|| Failed(format!("400: {given:?} is no name of a file")))?;
        file::make_directories(destination)?;
        if recursive || name.to_ascii_lowercase().ends_with(".zip") {
            let mut spooled = spool::spool(&mut part, &guest.processes.directory(None))?;
            spooled.rewind()?;
            file::unzip(spooled, destination)?;
        } else {
            let options = WriteOptions::default();
            file::write_atomically(&destination.join(&name), options, &mut part)?;
        }
        return Ok(given);
    }
    Err(Failed("400: the request has no part \"file\"".to_owned()))
}

/// `GET /download_files`.
pub(super) fn download(_guest: &Guest, request: &mut Request<'_>) -> Answer {
    let path = request
        .query
        .get("path")
        .ok_or_else(|| invalid("query parameter \"path\" is missing"))?;
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(detail(500, "400: Path must be an absolute path"));
    }
    if !path.exists() {
        return Err(detail(500, "404: File not found"));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let safe: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_graphic() && c != '"' && c != '\\' {
                c
            } else {
                '_'
            }
        })
        .collect();
    let disposition = format!("attachment; filename=\"{safe}.zip\"");
    Ok(Response::stream(
        200,
        "application/zip",
        Box::new(move |out| {
            file::zip_directory(&path, out).map_err(|error| match error.source.kind() {
                io::ErrorKind::InvalidData => io::Error::other(error),
                _ => error.source,
            })
        }),
    )
    .with_header("content-disposition", disposition))
}

/// `POST /list_files`.
pub(super) fn list(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let body = body(request)?;
    let path = guest.processes.directory(body["path"].as_str());
    // What is missing or no directory has no files.
    let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
    let (mut directories, mut files) = (Vec::new(), Vec::new());
    for entry in entries.take(MOST_NAMES) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            directories.push(format!("{name}/"));
        } else {
            files.push(name);
        }
    }
    for names in [&mut directories, &mut files] {
        names.sort_by_cached_key(|name| name.to_lowercase());
    }
    directories.append(&mut files);
    Ok(Response::json(200, &directories))
}
