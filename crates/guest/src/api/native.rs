//! The native API: routes of `skyrl_protocol::guest`, one module per group.

mod commands;
mod files;
mod shells;
mod terminal;
mod tools;

use super::{ApiError, ApiResult};
use crate::Guest;
use crate::http::{Request, Response};
use skyrl_protocol::guest::{Health, Lease, SessionKey};
use std::sync::Arc;
use std::time::Duration;

/// Answers a request under `/v1/`; `rest` is the path after that.
pub(super) fn route(guest: &Arc<Guest>, request: &mut Request<'_>, rest: &str) -> ApiResult {
    let segments: Vec<&str> = rest.split('/').collect();
    let method = request.method.clone();
    // What an owner does by itself is not use of the sandbox.
    if !matches!(segments[0], "health" | "lease" | "session-key") {
        guest.touch();
    }
    match (method.as_str(), segments.as_slice()) {
        ("GET" | "HEAD", ["health"]) => Ok(health(guest)),
        ("PUT", ["lease"]) => lease(guest, request),
        ("PUT", ["session-key"]) => session_key(guest, request),
        ("POST", ["exec"]) => commands::exec(guest, request),
        (_, ["commands", rest @ ..]) => commands::route(guest, request, &method, rest),
        ("POST", ["edit"]) => tools::edit(guest, request),
        ("POST", ["search", "text"]) => tools::search_text(request),
        ("POST", ["search", "files"]) => tools::search_files(request),
        ("GET", ["git", "status"]) => tools::git_status(guest, request),
        ("GET", ["git", "diff"]) => tools::git_diff(guest, request),
        ("POST", ["terminal"]) => terminal::open(guest, request),
        (_, ["file", rest @ ..]) => files::route(guest, request, &method, rest),
        ("PUT", ["tar"]) => files::unpack(guest, request),
        ("GET", ["tar"]) => files::pack(guest, request),
        (_, ["shells", rest @ ..]) => shells::route(guest, request, &method, rest),
        _ => Err(unknown(&method, rest)),
    }
}

/// The answer for a path or method that does not exist.
fn unknown(method: &str, rest: &str) -> ApiError {
    ApiError::not_found(format!("no route {method} /v1/{rest}"))
}

/// An empty object: it was done.
fn done() -> Response {
    Response::json(200, &serde_json::json!({}))
}

fn health(guest: &Guest) -> Response {
    guest.commands.sweep();
    Response::json(
        200,
        &Health {
            status: "ok".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: guest.uptime().as_millis() as u64,
            idle_ms: guest.idle().as_millis() as u64,
            running: guest.processes.running() as u32,
        },
    )
}

fn lease(guest: &Guest, request: &mut Request<'_>) -> ApiResult {
    let lease: Lease = request.json()?;
    let time = Duration::from_secs(lease.seconds.into());
    guest.processes.lease((!time.is_zero()).then_some(time));
    Ok(done())
}

fn session_key(guest: &Guest, request: &mut Request<'_>) -> ApiResult {
    let SessionKey { key } = request.json()?;
    guest.set_session_key(key.filter(|key| !key.is_empty()));
    Ok(done())
}

/// A number in the query.
fn number<T: std::str::FromStr>(
    request: &Request<'_>,
    name: &'static str,
) -> Result<Option<T>, ApiError> {
    request
        .query
        .get(name)
        .map(|given| {
            given
                .parse()
                .map_err(|_| ApiError::bad_request(format!("{name}={given:?} is not a number")))
        })
        .transpose()
}
