//! Files: single ones, listings, tar streams.

use super::{done, number, unknown};
use crate::Guest;
use crate::api::{ApiError, ApiResult, code_of};
use crate::file::{self, FileError, WriteOptions};
use crate::http::{Request, Response, ResponseBody};
use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use std::io::{self, Write};
use std::path::PathBuf;

/// Entries of a listing unless asked otherwise, and at most.
const LIST_LIMIT: usize = 10_000;
const MAX_LIST: usize = 100_000;

/// Bytes that gather before a piece of a tar stream is sent.
const TAR_PIECE: usize = 64 * 1024;

impl From<FileError> for ApiError {
    fn from(error: FileError) -> Self {
        Self::new(code_of(&error.source), error.to_string())
    }
}

/// Routes under `/v1/file`.
pub(super) fn route(
    guest: &Guest,
    request: &mut Request<'_>,
    method: &str,
    rest: &[&str],
) -> ApiResult {
    match (method, rest) {
        ("GET" | "HEAD", []) => read(guest, request),
        ("PUT", []) => write(guest, request),
        ("DELETE", []) => {
            file::remove(&path(guest, request)?, request.query.flag("recursive"))?;
            Ok(done())
        }
        ("GET", ["stat"]) => Ok(Response::json(200, &file::stat(&path(guest, request)?)?)),
        ("GET", ["list"]) => {
            let limit = number(request, "limit")?
                .unwrap_or(LIST_LIMIT)
                .min(MAX_LIST);
            Ok(Response::json(
                200,
                &file::list(&path(guest, request)?, limit)?,
            ))
        }
        _ => Err(unknown(method, &format!("file/{}", rest.join("/")))),
    }
}

/// The path asked for; relative ones are below the guest's default directory.
fn path(guest: &Guest, request: &Request<'_>) -> Result<PathBuf, ApiError> {
    match request.query.get("path") {
        None | Some("") => Err(ApiError::bad_request("the query has no path")),
        Some(path) if path.contains('\0') => {
            Err(ApiError::bad_request("the path holds a NUL byte"))
        }
        path => Ok(guest.processes.directory(path)),
    }
}

fn read(guest: &Guest, request: &Request<'_>) -> ApiResult {
    let path = path(guest, request)?;
    let offset = number(request, "offset")?.unwrap_or(0);
    let source = file::open(&path, offset, number(request, "limit")?)?;
    let mut response = Response::bytes(200, "application/octet-stream", Vec::new());
    response.body = match source.length {
        Some(length) => ResponseBody::Sized(length, source.reader),
        None => ResponseBody::Stream(Box::new(move |out| {
            let mut reader = source.reader;
            io::copy(&mut reader, out).map(drop)
        })),
    };
    Ok(response.with_header("skyrl-size", source.size.to_string()))
}

fn write(guest: &Guest, request: &mut Request<'_>) -> ApiResult {
    let path = path(guest, request)?;
    let mode = request
        .query
        .get("mode")
        .map(|given| {
            u32::from_str_radix(given.trim_start_matches("0o"), 8)
                .ok()
                .filter(|mode| *mode <= 0o7777)
                .ok_or_else(|| ApiError::bad_request(format!("mode={given:?} is not octal")))
        })
        .transpose()?;
    let options = WriteOptions {
        mode,
        parents: request.query.flag("parents"),
    };
    file::write_atomically(&path, options, request.body)?;
    Ok(done())
}

/// `PUT /v1/tar`.
pub(super) fn unpack(guest: &Guest, request: &mut Request<'_>) -> ApiResult {
    let path = path(guest, request)?;
    let summary = if request.query.flag("gzip") {
        file::extract(&mut MultiGzDecoder::new(&mut *request.body), &path)?
    } else {
        file::extract(request.body, &path)?
    };
    Ok(Response::json(200, &summary))
}

/// `GET /v1/tar`.
pub(super) fn pack(guest: &Guest, request: &Request<'_>) -> ApiResult {
    let path = path(guest, request)?;
    // What is not there is said before the stream begins.
    file::stat(&path)?;
    let gzip = request.query.flag("gzip");
    let media_type = if gzip {
        "application/gzip"
    } else {
        "application/x-tar"
    };
    Ok(Response::stream(
        200,
        media_type,
        Box::new(move |out| {
            let mut out = io::BufWriter::with_capacity(TAR_PIECE, out);
            if gzip {
                let mut encoder = GzEncoder::new(out, Compression::fast());
                file::archive(&path, &mut encoder).map_err(io::Error::other)?;
                encoder.finish()?.flush()
            } else {
                file::archive(&path, &mut out).map_err(io::Error::other)?;
                out.flush()
            }
        }),
    ))
}
