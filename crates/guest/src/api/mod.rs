//! Routes. The native API has `/v1` to itself; each client family's dialect
//! has the paths its clients expect. A dialect that does not know a path gives
//! the request to the next.

mod error;
mod native;
pub mod openhands;
pub mod openhands_v0;
mod python;
mod spool;
pub mod swerex;

pub use error::{ApiError, ApiResult, code_of};

use crate::Guest;
use crate::http::{Request, Response};
use std::sync::Arc;

/// Answers a request.
pub fn route(guest: &Arc<Guest>, request: &mut Request<'_>) -> Response {
    let path = request.path.clone();
    if let Some(rest) = path.strip_prefix("/v1/") {
        return native::route(guest, request, rest).unwrap_or_else(|error| error.response());
    }
    if let Some(answer) = openhands::route(guest, request) {
        return answer;
    }
    if let Some(answer) = openhands_v0::route(guest, request) {
        return answer;
    }
    if let Some(answer) = swerex::route(guest, request) {
        return answer;
    }
    let error = ApiError::not_found(format!("no route {} {path}", request.method));
    error.response()
}

/// Whether a secret was given; takes the same time wherever it differs.
fn same_secret(given: &str, secret: &str) -> bool {
    given.len() == secret.len()
        && given
            .bytes()
            .zip(secret.bytes())
            .fold(0, |differences, (a, b)| differences | (a ^ b))
            == 0
}
