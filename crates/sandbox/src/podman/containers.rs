//! The calls of Podman's service that the engine makes, with their answers.

use super::request::{Create, OWNER_LABEL};
use super::rest::{Call, QUICK, Repeat, Rest, WORK, query};
use crate::error::EngineError;
use hyper::StatusCode;
use serde::Deserialize;
use skyrl_protocol::SandboxId;
use std::time::Duration;

/// Lines of a guest's log that go into an error.
const LOG_LINES: usize = 10;

/// What `GET /containers/<name>/json` says, as far as it is needed.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Inspected {
    #[serde(rename = "State")]
    pub(super) state: State,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct State {
    #[serde(default)]
    pub(super) running: bool,
    #[serde(default)]
    pub(super) pid: i32,
    #[serde(default)]
    pub(super) conmon_pid: i32,
    #[serde(default)]
    pub(super) exit_code: i32,
    #[serde(default)]
    pub(super) error: String,
}

impl State {
    /// How it ended, in words.
    pub(super) fn cause(&self) -> String {
        let code = self.exit_code;
        let mut cause = if code > 128 && code <= 128 + 64 {
            format!("killed by signal {}", code - 128)
        } else {
            format!("exit code {code}")
        };
        if !self.error.is_empty() {
            cause.push_str(&format!(" ({})", self.error));
        }
        cause
    }
}

#[derive(Debug, Deserialize)]
struct Listed {
    #[serde(rename = "Names", default)]
    names: Vec<String>,
}

/// Makes a container.
///
/// # Errors
/// [`EngineError::Exists`] when the name is taken.
pub(super) async fn create(
    rest: &Rest,
    id: &SandboxId,
    request: &Create,
) -> Result<(), EngineError> {
    let call = || Call::post("/containers/create", WORK, Repeat::Never).json(request);
    let reply = match rest.send(call()?).await {
        // The service died under it. Nobody else makes containers with this
        // name, so what there is of it is the first try's.
        Err(EngineError::HelperGone { .. }) => {
            remove(rest, id).await?;
            rest.send(call()?).await?
        }
        other => other?,
    };
    if reply.status == StatusCode::CONFLICT
        || (!reply.status.is_success() && reply.message().contains("already in use"))
    {
        return Err(EngineError::Exists(id.clone()));
    }
    reply.success().map(drop)
}

/// Starts a container; one that runs already is no error.
pub(super) async fn start(rest: &Rest, id: &SandboxId) -> Result<(), EngineError> {
    let target = format!("/containers/{id}/start");
    let reply = rest
        .send(Call::post(&target, WORK, Repeat::Harmless))
        .await?;
    if reply.status == StatusCode::NOT_MODIFIED {
        return Ok(());
    }
    if reply.status == StatusCode::NOT_FOUND {
        return Err(EngineError::NotFound(id.clone()));
    }
    reply.success().map(drop)
}

/// What Podman knows of a container; absent when it knows nothing.
pub(super) async fn inspect(rest: &Rest, id: &SandboxId) -> Result<Option<State>, EngineError> {
    let target = format!("/containers/{id}/json");
    let reply = rest.send(Call::get(&target)).await?;
    if reply.status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    reply.read::<Inspected>().map(|found| Some(found.state))
}

/// Removes a container whatever it does; one that is not there is removed.
pub(super) async fn remove(rest: &Rest, id: &SandboxId) -> Result<(), EngineError> {
    let target = format!("/containers/{id}?force=true&timeout=0&v=true");
    let mut pause = Duration::from_millis(5);
    let mut tries = 0;
    loop {
        let reply = rest.send(Call::delete(&target)).await?;
        if reply.status == StatusCode::NOT_FOUND {
            return Ok(());
        }
        tries += 1;
        // Another of its verbs may just be ending.
        if reply.status.is_success() || tries == 8 {
            return reply.success().map(drop);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}

/// Names of an owner's containers, whatever they do.
pub(super) async fn list(rest: &Rest, key: &str) -> Result<Vec<SandboxId>, EngineError> {
    let filters = format!(r#"{{"label":["{OWNER_LABEL}={key}"]}}"#);
    let target = format!("/containers/json?all=true&filters={}", query(&filters));
    let listed: Vec<Listed> = rest.send(Call::get(&target)).await?.read()?;
    Ok(listed
        .into_iter()
        .flat_map(|one| one.names)
        .filter_map(|name| name.parse().ok())
        .collect())
}

/// The last lines a guest said.
pub(super) async fn log(rest: &Rest, id: &SandboxId) -> Option<String> {
    let target = format!("/containers/{id}/logs?stdout=true&stderr=true&tail={LOG_LINES}");
    let mut call = Call::get(&target);
    call.deadline = QUICK.min(Duration::from_secs(5));
    let reply = rest.send(call).await.ok()?.success().ok()?;
    let text = unframed(&reply.body);
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Takes the frames off a log: eight bytes each, the last four of which say
/// how long the text after them is.
fn unframed(mut body: &[u8]) -> String {
    let mut text = Vec::new();
    while let Some((head, rest)) = body.split_at_checked(8) {
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let Some((line, rest)) = rest.split_at_checked(length) else {
            text.extend_from_slice(rest);
            break;
        };
        text.extend_from_slice(line);
        body = rest;
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_even_when_it_is_cut_off() {
        let mut body = vec![1, 0, 0, 0, 0, 0, 0, 3];
        body.extend(b"ab\n");
        body.extend([2, 0, 0, 0, 0, 0, 0, 99]);
        body.extend(b"cd");
        assert_eq!(unframed(&body), "ab\ncd");
        assert_eq!(unframed(b"short"), "");
    }

    #[test]
    fn an_end_is_told_in_words() {
        let state = |exit_code| State {
            running: false,
            pid: 0,
            conmon_pid: 0,
            exit_code,
            error: String::new(),
        };
        assert_eq!(state(3).cause(), "exit code 3");
        assert_eq!(state(137).cause(), "killed by signal 9");
    }
}
