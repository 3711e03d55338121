//! Persistent shells over the native API.

use super::{done, unknown};
use crate::Guest;
use crate::api::{ApiError, ApiResult};
use crate::http::{Request, Response};
use crate::shell::{Answer, Extras, Shell, ShellError, Until, Wait, find_texts, key_bytes};
use skyrl_protocol::guest::{
    Keys, ShellInput, ShellOutput, ShellRead, ShellRun, ShellSpec, ShellState,
};
use std::sync::Arc;
use std::time::Duration;

/// Longest wait of one request.
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);
/// Least time that an interrupt has to end a command.
const INTERRUPT_PATIENCE: Duration = Duration::from_secs(1);

impl From<ShellError> for ApiError {
    fn from(error: ShellError) -> Self {
        let text = error.to_string();
        match error {
            ShellError::Start(error) => {
                let mut answer = Self::from(error);
                answer.body.message = text;
                answer
            }
            error => {
                let answer = Self::new(error.code(), text);
                match error.hint() {
                    Some(hint) => answer.with_hint(hint),
                    None => answer,
                }
            }
        }
    }
}

/// Routes under `/v1/shells`.
pub(super) fn route(
    guest: &Arc<Guest>,
    request: &mut Request<'_>,
    method: &str,
    rest: &[&str],
) -> ApiResult {
    match (method, rest) {
        ("POST", []) => {
            let spec: ShellSpec = request.json()?;
            let (shell, _) = guest
                .shells
                .create(&guest.processes, &spec, Extras::default())?;
            Ok(Response::json(200, &shell.info()))
        }
        ("GET", []) => Ok(Response::json(200, &guest.shells.list())),
        ("DELETE", [id]) => {
            guest.shells.close(id)?;
            Ok(done())
        }
        ("POST", [id, action]) => {
            let shell = guest.shells.get(id)?;
            let answer = act(&shell, action, request)?;
            Ok(Response::json(200, &output(&shell, answer)))
        }
        _ => Err(unknown(method, &format!("shells/{}", rest.join("/")))),
    }
}

fn act(shell: &Shell, action: &str, request: &mut Request<'_>) -> Result<Answer, ApiError> {
    let session = shell.session();
    let patience = |milliseconds| Duration::from_millis(milliseconds).min(MAX_WAIT);
    match action {
        "run" => {
            let run: ShellRun = request.json()?;
            let limit = usize::try_from(run.output_limit).unwrap_or(usize::MAX);
            let wait = Wait {
                quiet: run.quiet_ms.map(Duration::from_millis),
                ..Wait::for_end(patience(run.timeout_ms), request.client)
            };
            Ok(shell.run(&run.command, limit, wait)?)
        }
        "input" => {
            let input: ShellInput = request.json()?;
            session
                .input(&bytes_of(&input.input)?)
                .map_err(ShellError::from)?;
            Ok(session.wait(Wait {
                until: Until::Output,
                ..Wait::for_end(patience(input.wait_ms), request.client)
            }))
        }
        "read" => {
            let read = request.json::<Option<ShellRead>>()?.unwrap_or_default();
            let find = find_texts(&read.expect);
            let until = if read.expect.is_empty() {
                Until::Output
            } else {
                Until::Found(&find)
            };
            Ok(session.wait(Wait {
                until,
                ..Wait::for_end(patience(read.wait_ms), request.client)
            }))
        }
        "interrupt" => {
            let read: Option<ShellRead> = request.json()?;
            let wait = patience(read.unwrap_or_default().wait_ms).max(INTERRUPT_PATIENCE);
            Ok(session.interrupt(wait).map_err(ShellError::from)?)
        }
        _ => Err(unknown("POST", &format!("shells/{}/{action}", shell.id()))),
    }
}

fn bytes_of(keys: &Keys) -> Result<Vec<u8>, ApiError> {
    Ok(match keys {
        Keys::Text(text) => text.clone().into_bytes(),
        Keys::Line(line) => format!("{line}\r").into_bytes(),
        Keys::Key(name) => key_bytes(name).ok_or_else(|| {
            ApiError::bad_request(format!("{name:?} is no key"))
                .with_hint("keys are C-<letter>, Enter, Tab, Escape, Up, Down and the like")
        })?,
    })
}

fn output(shell: &Shell, answer: Answer) -> ShellOutput {
    let idle = matches!(
        answer.state,
        ShellState::Completed { .. } | ShellState::Idle
    );
    ShellOutput {
        output: answer.output,
        dropped_bytes: answer.dropped,
        state: answer.state,
        found: answer.found.and_then(|index| u32::try_from(index).ok()),
        cwd: idle.then(|| shell.session().facts().cwd),
    }
}
