//! The dialect of SWE-ReX 1.4: bash sessions, commands, files. Failures travel
//! as exceptions, by class path and message, with status 511.
//!
//! Unlike the reference, sessions are independent of each other: one that
//! blocks delays nobody.

mod error;
mod execute;
mod files;
mod model;
mod replay;
mod session;
mod syntax;

use crate::Guest;
use crate::http::{Request, Response};
use error::Failure;
use serde_json::json;

/// What this dialect remembers between requests.
#[derive(Default)]
pub struct State {
    sessions: session::Sessions,
    replies: replay::Replies,
}

type Answer = Result<Response, Failure>;

/// Answers a request of this dialect; `None` for a path it does not know.
pub fn route(guest: &Guest, request: &mut Request<'_>) -> Option<Response> {
    let handler: Option<fn(&Guest, &mut Request<'_>) -> Answer> = match request.path.as_str() {
        "/" | "/is_alive" => None,
        "/create_session" => Some(session::create),
        "/run_in_session" => Some(session::run),
        "/close_session" => Some(session::close),
        "/execute" => Some(execute::execute),
        "/read_file" => Some(files::read),
        "/write_file" => Some(files::write),
        "/upload" => Some(files::upload),
        "/close" => Some(session::close_all),
        _ => return None,
    };
    if let Some(refusal) = unauthorized(guest, request) {
        return Some(refusal);
    }
    let allowed = if handler.is_some() { "POST" } else { "GET" };
    if request.method != allowed {
        return Some(detail(405, "Method Not Allowed").with_header("allow", allowed));
    }
    let Some(handler) = handler else {
        let body = match request.path.as_str() {
            "/" => json!({"message": "hello world"}),
            _ => json!({"is_alive": true, "message": ""}),
        };
        return Some(Response::json(200, &body));
    };
    guest.touch();
    let id = request.header("x-request-id").map(str::to_owned);
    let answer = guest.swerex.replies.once(id, || {
        handler(guest, request).unwrap_or_else(Failure::into_response)
    });
    guest.touch();
    Some(answer)
}

/// The refusal of a request without the key, where there is one.
fn unauthorized(guest: &Guest, request: &Request<'_>) -> Option<Response> {
    let key = guest.session_key()?;
    match request.header("x-api-key") {
        None | Some("") => Some(detail(401, "Not authenticated")),
        Some(given) if super::same_secret(given, &key) => None,
        Some(_) => Some(detail(401, "Invalid API Key")),
    }
}

fn detail(status: u16, text: &str) -> Response {
    Response::json(status, &json!({"detail": text}))
}
