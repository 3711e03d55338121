//! The requests of this dialect, with their defaults, and the refusal of those
//! that are not well formed.

use super::error::{Failure, invalid};
use crate::http::Request;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn default_session() -> String {
    "default".to_owned()
}

/// `/create_session`.
#[derive(Debug, Deserialize)]
pub(super) struct CreateSession {
    #[serde(default = "default_session")]
    pub(super) session: String,
    #[serde(default)]
    pub(super) startup_source: Vec<String>,
    #[serde(default = "one_second")]
    pub(super) startup_timeout: f64,
}

fn one_second() -> f64 {
    1.0
}

/// What becomes of a command's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Check {
    /// Told; nothing is raised.
    Silent,
    /// Raised if it is not 0.
    #[default]
    Raise,
    /// Not asked for.
    Ignore,
}

/// `/run_in_session` with `bash`.
#[derive(Debug, Deserialize)]
pub(super) struct BashAction {
    pub(super) command: String,
    #[serde(default = "default_session")]
    pub(super) session: String,
    pub(super) timeout: Option<f64>,
    #[serde(default)]
    pub(super) is_interactive_command: bool,
    #[serde(default)]
    pub(super) is_interactive_quit: bool,
    #[serde(default)]
    pub(super) check: Check,
    #[serde(default)]
    pub(super) error_msg: String,
    #[serde(default)]
    pub(super) expect: Vec<String>,
}

/// `/run_in_session` with `bash_interrupt`.
#[derive(Debug, Deserialize)]
pub(super) struct Interrupt {
    #[serde(default = "default_session")]
    pub(super) session: String,
    #[serde(default = "interrupt_timeout")]
    pub(super) timeout: f64,
    #[serde(default = "interrupt_retries")]
    pub(super) n_retry: u32,
    #[serde(default)]
    pub(super) expect: Vec<String>,
}

fn interrupt_timeout() -> f64 {
    0.2
}

fn interrupt_retries() -> u32 {
    3
}

/// `/close_session`.
#[derive(Debug, Deserialize)]
pub(super) struct CloseSession {
    #[serde(default = "default_session")]
    pub(super) session: String,
}

/// A command: a line, or a program with arguments.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(super) enum Line {
    /// One string.
    Text(String),
    /// Several.
    Words(Vec<String>),
}

/// `/execute`.
#[derive(Debug, Deserialize)]
pub(super) struct Execute {
    pub(super) command: Line,
    pub(super) timeout: Option<f64>,
    #[serde(default)]
    pub(super) shell: bool,
    #[serde(default)]
    pub(super) check: bool,
    #[serde(default)]
    pub(super) error_msg: String,
    pub(super) env: Option<BTreeMap<String, String>>,
    pub(super) cwd: Option<String>,
    #[serde(default)]
    pub(super) merge_output_streams: bool,
}

/// `/read_file`.
#[derive(Debug, Deserialize)]
pub(super) struct ReadFile {
    pub(super) path: String,
    pub(super) encoding: Option<String>,
    pub(super) errors: Option<String>,
}

/// `/write_file`.
#[derive(Debug, Deserialize)]
pub(super) struct WriteFile {
    pub(super) path: String,
    pub(super) content: String,
}

/// The body as JSON object.
pub(super) fn object(request: &mut Request<'_>) -> Result<Value, Failure> {
    let body: Value = request.json()?;
    match body {
        Value::Object(_) => Ok(body),
        Value::Null => Err(refuse("missing", &["body"], "Field required", &body)),
        _ => Err(refuse(
            "model_attributes_type",
            &["body"],
            "Input should be a valid dictionary or object to extract fields from",
            &body,
        )),
    }
}

/// The variant that a member of the body names.
pub(super) fn tag<'b>(body: &'b Value, member: &str, known: &[&str]) -> Result<&'b str, Failure> {
    match body.get(member).and_then(Value::as_str) {
        Some(tag) if known.contains(&tag) => Ok(tag),
        Some(_) => Err(refuse(
            "union_tag_invalid",
            &["body"],
            &format!("Input tag found using '{member}' does not match any of the expected tags"),
            body,
        )),
        None => Err(refuse(
            "union_tag_not_found",
            &["body"],
            &format!("Unable to extract tag using discriminator '{member}'"),
            body,
        )),
    }
}

/// The body as a request.
pub(super) fn read<T: DeserializeOwned>(body: Value) -> Result<T, Failure> {
    T::deserialize(&body).map_err(|error| {
        let text = error.to_string();
        match text
            .strip_prefix("missing field `")
            .and_then(|rest| rest.split('`').next())
        {
            Some(field) => refuse("missing", &["body", field], "Field required", &body),
            None => refuse("value_error", &["body"], &text, &body),
        }
    })
}

fn refuse(kind: &str, place: &[&str], message: &str, input: &Value) -> Failure {
    Failure::Refused(invalid(
        json!({"type": kind, "loc": place, "msg": message, "input": input}),
    ))
}
