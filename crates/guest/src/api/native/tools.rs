//! `/v1/edit`, `/v1/search` and `/v1/git`.

use super::super::{ApiError, ApiResult, code_of};
use crate::Guest;
use crate::git::{self, Base, GitError};
use crate::http::{Request, Response};
use crate::search::{self, SearchError};
use skyrl_protocol::guest::{EditRequest, ErrorCode, FileSearch, TextSearch};
use std::path::Path;
use std::time::Instant;

/// A refusal by the editor is an answer for the agent, not an error.
pub(super) fn edit(guest: &Guest, request: &mut Request<'_>) -> ApiResult {
    let edit: EditRequest = request.json()?;
    let workdir = &guest.processes.settings().workdir;
    Ok(Response::json(200, &guest.editor.apply(&edit, workdir)))
}

pub(super) fn search_text(request: &mut Request<'_>) -> ApiResult {
    let wanted: TextSearch = request.json()?;
    let found = search::text(&wanted, Instant::now() + search::TIME_LIMIT)?;
    Ok(Response::json(200, &found))
}

pub(super) fn search_files(request: &mut Request<'_>) -> ApiResult {
    let wanted: FileSearch = request.json()?;
    let found = search::files(&wanted, Instant::now() + search::TIME_LIMIT)?;
    Ok(Response::json(200, &found))
}

fn absolute<'r>(request: &'r Request<'_>) -> Result<&'r Path, ApiError> {
    let path = request
        .query
        .get("path")
        .ok_or_else(|| ApiError::bad_request("the query has no path"))?;
    let path = Path::new(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(ApiError::bad_request(format!(
            "{path:?} is not an absolute path"
        )))
    }
}

pub(super) fn git_status(guest: &Guest, request: &Request<'_>) -> ApiResult {
    let status = git::status(&guest.processes, absolute(request)?)?;
    Ok(Response::json(200, &status))
}

/// Against `base`, else HEAD; files that git does not know yet are included.
pub(super) fn git_diff(guest: &Guest, request: &Request<'_>) -> ApiResult {
    let base = request.query.get("base").map_or(Base::Head, Base::Given);
    let diff = git::patch(&guest.processes, absolute(request)?, base, &[])?;
    Ok(Response::bytes(200, "text/x-patch", diff.patch))
}

impl From<SearchError> for ApiError {
    fn from(error: SearchError) -> Self {
        let hint = match &error {
            SearchError::Io { source, .. } => {
                return Self::new(code_of(source), error.to_string());
            }
            SearchError::Pattern(_) => {
                "patterns are in the syntax of Rust's regex crate; escape literal brackets with \\"
            }
            SearchError::Glob(_) => "globs know **, *, ?, [..] and {a,b}; escape others with \\",
            SearchError::Relative(_) => "give the path from /",
        };
        Self::bad_request(error.to_string()).with_hint(hint)
    }
}

impl From<GitError> for ApiError {
    fn from(error: GitError) -> Self {
        let (code, hint) = match &error {
            GitError::NoGit => (
                ErrorCode::NotSupported,
                Some("install git in the image, or compare files with the editor's undo history"),
            ),
            GitError::NotARepository(_) => (
                ErrorCode::NotFound,
                Some("give a directory inside a work tree, or run git init there"),
            ),
            GitError::NoFile(_) => (ErrorCode::NotFound, None),
            GitError::Failed { .. } | GitError::NotAFile(_) => (ErrorCode::BadRequest, None),
            GitError::TooMuch { .. } | GitError::TooLarge { .. } | GitError::TimedOut { .. } => (
                ErrorCode::LimitReached,
                Some("ask about a smaller directory, or run git as a command"),
            ),
            GitError::Io { source, .. } => (code_of(source), None),
            GitError::Spawn(_) => (ErrorCode::Io, None),
        };
        let mut answer = Self::new(code, error.to_string());
        answer.body.hint = hint.map(str::to_owned);
        answer
    }
}
