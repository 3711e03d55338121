//! `/git`: changes, contents and history of a work tree.

use super::validate::Problems;
use super::{Answer, failure, internal};
use crate::Guest;
use crate::git::{self, Base, Commit, GitError};
use crate::http::{Request, Response};
use serde_json::{Value, json};
use std::path::Path;

/// Commits answered when the client does not say how many, and at most.
const DEFAULT_COMMITS: i64 = 50;
const MAX_COMMITS: i64 = 200;

/// Statuses that clients know: a refusal by git is the request's fault.
pub(super) fn refusal(error: GitError) -> Response {
    match error {
        GitError::Spawn(_) | GitError::Io { .. } => internal(&error.to_string()),
        error => failure(400, &error.to_string()),
    }
}

fn base(reference: Option<&str>) -> Base<'_> {
    reference.map_or(Base::Detected, Base::Given)
}

/// `GET /git/changes`.
pub(super) fn changes(guest: &Guest, request: &Request<'_>) -> Answer {
    let mut problems = Problems::default();
    let path = problems.required(&request.query, "path");
    let path = problems.check(path)?;
    let base = base(request.query.get("ref"));
    let changes = git::changes(&guest.processes, Path::new(path), base).map_err(refusal)?;
    Ok(Response::json(200, &changes))
}

/// `GET /git/diff`.
pub(super) fn diff(guest: &Guest, request: &Request<'_>) -> Answer {
    let query = &request.query;
    let mut problems = Problems::default();
    let path = problems.required(query, "path");
    let commit = query.get("commit");
    if let Some(commit) = commit {
        problems.commit(&["query", "commit"], commit);
    }
    let path = Path::new(problems.check(path)?);
    let diff = match (commit, query.get("ref")) {
        (Some(_), Some(_)) => {
            return Err(failure(400, "'ref' and 'commit' are mutually exclusive"));
        }
        (Some(commit), None) => git::file_diff_of_commit(&guest.processes, path, commit),
        (None, reference) => git::file_diff(&guest.processes, path, base(reference)),
    };
    let body = match diff.map_err(refusal)? {
        Some(diff) => json!({"modified": diff.modified, "original": diff.original}),
        None => json!({"modified": null, "original": null}),
    };
    Ok(Response::json(200, &body))
}

fn commit_json(commit: &Commit) -> Value {
    json!({
        "sha": commit.sha,
        "short_sha": commit.short_sha,
        "subject": commit.subject,
        "author": commit.author,
        "timestamp": commit.timestamp,
    })
}

/// `GET /git/commits`.
pub(super) fn commits(guest: &Guest, request: &Request<'_>) -> Answer {
    let mut problems = Problems::default();
    let path = problems.required(&request.query, "path");
    let limit = problems.integer(&request.query, "limit", 1, MAX_COMMITS);
    let path = problems.check(path)?;
    let limit = limit.unwrap_or(DEFAULT_COMMITS) as usize;
    let (commits, more) =
        git::commits(&guest.processes, Path::new(path), limit).map_err(refusal)?;
    let commits: Vec<Value> = commits.iter().map(commit_json).collect();
    Ok(Response::json(
        200,
        &json!({"commits": commits, "has_more": more}),
    ))
}

/// `GET /git/commits/{sha}/changes`.
pub(super) fn commit_changes(guest: &Guest, request: &Request<'_>, sha: &str) -> Answer {
    let mut problems = Problems::default();
    problems.commit(&["path", "sha"], sha);
    let path = problems.required(&request.query, "path");
    let path = problems.check(path)?;
    let changes =
        git::changes_of_commit(&guest.processes, Path::new(path), sha).map_err(refusal)?;
    Ok(Response::json(200, &changes))
}
