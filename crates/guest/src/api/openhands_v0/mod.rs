//! The dialect of OpenHands V0: its action execution server. One persistent
//! bash, one Python interpreter, files, an editor.

mod files;
mod ipython;
mod observation;
mod run;
mod split;
mod transfer;

use crate::Guest;
use crate::http::{BodyError, Request, Response};
use serde_json::{Map, Value, json};

/// What this dialect remembers between requests.
#[derive(Default)]
pub struct State {
    terminal: run::Terminal,
    interpreter: ipython::Interpreter,
}

/// An error is an answer too.
type Answer = Result<Response, Response>;

fn detail(status: u16, text: &str) -> Response {
    Response::json(status, &json!({"detail": text}))
}

/// An exception inside the reference's handler of actions.
fn internal(text: &str) -> Response {
    detail(500, &format!("Internal server error: {text}"))
}

fn invalid(errors: &str) -> Response {
    Response::json(
        422,
        &json!({"detail": "Invalid request parameters", "errors": errors}),
    )
}

/// Answers a request of this dialect; `None` for a path it does not know.
/// `/alive` and `/server_info` are those of OpenHands 1.x.
pub fn route(guest: &Guest, request: &mut Request<'_>) -> Option<Response> {
    type Handler = fn(&Guest, &mut Request<'_>) -> Answer;
    let (method, handler): (&str, Handler) = match request.path.as_str() {
        "/execute_action" => ("POST", execute),
        "/upload_file" => ("POST", transfer::upload),
        "/download_files" => ("GET", transfer::download),
        "/list_files" => ("POST", transfer::list),
        "/vscode/connection_token" => ("GET", |_, _| {
            Ok(Response::json(200, &json!({"token": null})))
        }),
        "/update_mcp_server" => ("POST", |_, request| {
            body(request)?;
            Ok(Response::json(
                200,
                &json!({
                    "detail": "MCP server updated successfully",
                    "router_error_log": "",
                }),
            ))
        }),
        _ => return None,
    };
    if let Some(key) = guest.session_key()
        && !super::same_secret(request.header("x-session-api-key").unwrap_or(""), &key)
    {
        return Some(detail(403, "Invalid API Key"));
    }
    if request.method != method {
        return Some(detail(405, "Method Not Allowed").with_header("allow", method));
    }
    guest.touch();
    let answer = handler(guest, request).unwrap_or_else(|refusal| refusal);
    guest.touch();
    Some(answer)
}

/// The body as JSON.
fn body(request: &mut Request<'_>) -> Result<Value, Response> {
    request.json().map_err(|error| match error {
        BodyError::TooLong(_) => detail(413, &error.to_string()),
        BodyError::Io(_) => detail(400, &error.to_string()),
        BodyError::Json(error) => invalid(&error.to_string()),
    })
}

/// The arguments of an action, read leniently: what is missing or null has
/// its default.
struct Arguments(Map<String, Value>);

impl Arguments {
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    /// Text that the action can't do without.
    fn required(&self, name: &str) -> Result<&str, Response> {
        self.text(name)
            .ok_or_else(|| invalid(&format!("action argument {name:?} is missing or no text")))
    }

    fn flag(&self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    fn number(&self, name: &str) -> Option<i64> {
        self.0.get(name)?.as_i64()
    }
}

/// `POST /execute_action`.
fn execute(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let mut body = body(request)?;
    let action = body
        .get_mut("action")
        .map(Value::take)
        .ok_or_else(|| invalid("field \"action\" is missing"))?;
    let kind = action["action"]
        .as_str()
        .ok_or_else(|| invalid("the action names no type"))?;
    let arguments = Arguments(action["args"].as_object().cloned().unwrap_or_default());
    let timeout = action["timeout"].as_f64();
    let observation = match kind {
        "run" => run::run(guest, &arguments, timeout, request)?,
        "run_ipython" => ipython::run(guest, &arguments, timeout, request)?,
        "read" => files::read(guest, &arguments)?,
        "write" => files::write(guest, &arguments)?,
        "edit" => files::edit(guest, &arguments)?,
        "browse" | "browse_interactive" => {
            observation::error("Browser functionality is not supported or disabled.")
        }
        other => {
            return Err(internal(&format!(
                "action type {other:?} can't be executed"
            )));
        }
    };
    Ok(Response::json(200, &observation))
}
