//! The dialect of OpenHands 1.x: what its agent server offers a
//! `RemoteWorkspace` (commands, files, git) and the questions a client asks
//! before. Agent loops inside the sandbox, settings and the like are not
//! offered and say so.

mod archive;
mod bash;
mod events;
mod files;
mod git;
mod info;
mod time;
mod validate;

use crate::Guest;
use crate::http::{Request, Response};
use serde_json::json;
use validate::Problems;

/// What this dialect remembers between requests.
#[derive(Default)]
pub struct State {
    bash: bash::Bash,
}

/// A route's answer; an error is an answer too.
type Answer = Result<Response, Response>;

/// First parts of paths below `/api` that the reference serves and a sandbox
/// of ours does not.
const NOT_OFFERED: [&str; 19] = [
    "acp",
    "agent-profiles",
    "auth",
    "canvas-extensions",
    "conversations",
    "events",
    "hooks",
    "init",
    "llm",
    "mcp",
    "meta-profiles",
    "plugins",
    "profiles",
    "settings",
    "skills",
    "sub-agents",
    "tools",
    "vscode",
    "workspaces",
];

/// `{"detail": text}` with a status.
fn failure(status: u16, text: &str) -> Response {
    Response::json(status, &json!({"detail": text}))
}

/// An error of the server's side, in the reference's shape.
fn internal(text: &str) -> Response {
    Response::json(
        500,
        &json!({"detail": "Internal Server Error", "exception": text}),
    )
}

fn not_found() -> Response {
    failure(404, "Not Found")
}

fn not_offered(what: &str) -> Response {
    failure(
        501,
        &format!(
            "{what} is not offered inside this sandbox: it serves RemoteWorkspace (bash, file \
             and git). Run the agent loop on the client and use the sandbox as its workspace."
        ),
    )
}

/// Answers a request of this dialect; `None` for a path it does not know.
pub fn route(guest: &Guest, request: &mut Request<'_>) -> Option<Response> {
    let path = request.path.clone();
    if let "/alive" | "/health" | "/ready" | "/server_info" = path.as_str() {
        return Some(match (request.method.as_str(), path.as_str()) {
            ("GET", "/server_info") => info::server_info(guest),
            ("GET", "/ready") => Response::json(200, &json!({"status": "ready"})),
            ("GET", _) => Response::json(200, &json!({"status": "ok"})),
            _ => failure(405, "Method Not Allowed"),
        });
    }
    if path.starts_with("/sockets/") {
        return Some(not_offered("A websocket"));
    }
    let rest = path.strip_prefix("/api/")?;
    if !is_authorized(guest, request) {
        return Some(failure(401, "Unauthorized"));
    }
    guest.touch();
    let answer = match scoped(rest) {
        Ok(rest) => dispatch(guest, request, rest),
        Err(refusal) => Err(refusal),
    };
    guest.touch();
    Some(answer.unwrap_or_else(|refusal| refusal))
}

/// Whether the request carries the session key, where there is one.
fn is_authorized(guest: &Guest, request: &Request<'_>) -> bool {
    let Some(key) = guest.session_key() else {
        return true;
    };
    let given = request.header("x-session-api-key").unwrap_or_default();
    super::same_secret(given, &key)
}

/// What follows `conversations/{uuid}/` when a workspace of a conversation is
/// meant; other paths as they are.
fn scoped(rest: &str) -> Result<&str, Response> {
    let Some((id, below)) = rest
        .strip_prefix("conversations/")
        .and_then(|conversation| conversation.split_once('/'))
    else {
        return Ok(rest);
    };
    let first = below.split('/').next().unwrap_or_default();
    if !matches!(first, "bash" | "file" | "git" | "runtime") {
        return Ok(rest);
    }
    let mut problems = Problems::default();
    problems.uuid(&["path", "runtime_conversation_id"], id);
    problems.check(below)
}

fn dispatch(guest: &Guest, request: &mut Request<'_>, path: &str) -> Answer {
    let parts: Vec<&str> = path.split('/').collect();
    let method = request.method.clone();
    match (method.as_str(), parts.as_slice()) {
        ("POST", ["bash", "start_bash_command"]) => bash::start(guest, request),
        ("POST", ["bash", "execute_bash_command"]) => bash::execute(guest, request),
        ("GET", ["bash", "bash_events", "search"]) => bash::search(guest, request),
        ("GET", ["bash", "bash_events", id]) => bash::event(guest, id),
        ("DELETE", ["bash", "bash_events"]) => bash::clear(guest),
        ("POST", ["bash", "bash_commands", id, "stop"]) => bash::stop(guest, id),
        ("POST", ["file", "upload"]) => files::upload(request),
        ("GET", ["file", "download"]) => files::download(request),
        ("POST", ["file", "create_directory"]) => files::create_directory(request),
        ("GET", ["file", "archive"]) => archive::archive(guest, request),
        ("GET", ["file", "home"]) => Ok(files::home(guest)),
        ("GET", ["file", "search_subdirs"]) => files::search_subdirs(request),
        ("GET", ["file", "download-trajectory", _]) => Err(not_offered("A trajectory")),
        ("GET", ["git", "changes"]) => git::changes(guest, request),
        ("GET", ["git", "diff"]) => git::diff(guest, request),
        ("GET", ["git", "commits"]) => git::commits(guest, request),
        ("GET", ["git", "commits", sha, "changes"]) => git::commit_changes(guest, request, sha),
        ("POST", ["runtime", "credentials"]) => Ok(Response::json(
            200,
            &json!({"session_api_key": guest.session_key()}),
        )),
        ("DELETE", ["runtime"]) => Err(not_found()),
        (_, [first, ..]) if NOT_OFFERED.contains(first) => {
            Err(not_offered(&format!("/api/{first}")))
        }
        (
            _,
            [
                "bash",
                "start_bash_command" | "execute_bash_command" | "bash_events",
            ],
        )
        | (_, ["bash", "bash_events", _] | ["bash", "bash_commands", _, "stop"])
        | (
            _,
            [
                "file",
                "upload" | "download" | "create_directory" | "archive" | "home",
            ],
        )
        | (_, ["file", "search_subdirs"] | ["git", "changes" | "diff" | "commits"])
        | (_, ["git", "commits", _, "changes"] | ["runtime"] | ["runtime", "credentials"]) => {
            Err(failure(405, "Method Not Allowed"))
        }
        _ => Err(not_found()),
    }
}
