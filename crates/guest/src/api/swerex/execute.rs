//! `/execute`: a command of its own, as Python's `subprocess.run` runs it.

use super::Answer;
use super::error::{Exception, Failure};
use super::model::{self, Execute, Line};
use crate::Guest;
use crate::api::python;
use crate::http::{Request, Response};
use crate::process::{Command, Exit, Keep, Spec, Stdio, Stream, Waited};
use serde_json::json;
use skyrl_protocol::guest::{Finish, Program};
use std::time::Duration;

/// Bytes kept of each stream: the reference keeps all of it.
const MOST_OUTPUT: u64 = 64 << 20;
/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// `POST /execute`.
pub(super) fn execute(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let wanted: Execute = model::read(model::object(request)?)?;
    let shown = match &wanted.command {
        Line::Text(text) => python::repr(text),
        Line::Words(words) => python::repr_list(words),
    };
    let timeout = wanted.timeout.map(super::session::duration);
    let spec = Spec {
        cwd: wanted.cwd.clone(),
        clear_env: wanted.env.is_some(),
        env: wanted.env.clone().unwrap_or_default(),
        stdio: if wanted.merge_output_streams {
            Stdio::Merged
        } else {
            Stdio::Pipes
        },
        keep: Keep::HeadTail(MOST_OUTPUT),
        timeout,
        grace: Duration::ZERO,
        finish: Finish::PipesClose,
        ..Spec::new(program(&wanted)?)
    };
    let command = guest.processes.spawn(&spec)?;
    if command.wait_for_client(request.client, None) == Waited::ClientGone {
        command.end(Duration::ZERO);
        command.wait(None);
    }
    if command.timed_out() {
        let seconds = python::float(wanted.timeout.unwrap_or_default());
        let message = format!("Timeout ({seconds}s) exceeded while running command");
        return Err(Exception::swerex("CommandTimeoutError", message).into());
    }
    let code = command.exit().map_or(-libc::SIGKILL, Exit::python_code);
    let (stdout, stderr) = (
        text(&command, Stream::Stdout),
        text(&command, Stream::Stderr),
    );
    if wanted.check && code != 0 {
        let message = format!(
            "Command {shown} failed with exit code {code}. Stdout:\n{}\nStderr:\n{}",
            python::repr(&stdout),
            python::repr(&stderr)
        );
        let message = with_reason(&wanted.error_msg, message);
        return Err(Exception::swerex("NonZeroExitCodeError", message).into());
    }
    Ok(Response::json(
        200,
        &json!({"stdout": stdout, "stderr": stderr, "exit_code": code}),
    ))
}

/// The caller's words before a message.
pub(super) fn with_reason(reason: &str, message: String) -> String {
    if reason.is_empty() {
        message
    } else {
        format!("{reason}: {message}")
    }
}

/// What Python's `shell` argument makes of a command.
fn program(wanted: &Execute) -> Result<Program, Failure> {
    Ok(match (&wanted.command, wanted.shell) {
        (Line::Text(line), true) => Program::Shell(line.clone()),
        (Line::Text(program), false) => Program::Argv(vec![program.clone()]),
        (Line::Words(words), _) if words.is_empty() => {
            return Err(Exception::of("builtins.IndexError", "list index out of range").into());
        }
        (Line::Words(words), false) => Program::Argv(words.clone()),
        (Line::Words(words), true) if words.len() == 1 => Program::Shell(words[0].clone()),
        (Line::Words(words), true) => {
            let shell = ["/bin/sh", "-c"].map(str::to_owned);
            Program::Argv(shell.iter().chain(words).cloned().collect())
        }
    })
}

/// All that was kept of a stream; the bytes that are no UTF-8 spelled out.
fn text(command: &Command, stream: Stream) -> String {
    let mut bytes = Vec::new();
    loop {
        let at = bytes.len() as u64;
        let piece = command.read_since(stream, at, PIECE);
        if piece.offset != at {
            // Too much was printed: both ends, and a line about the rest.
            return command.output(stream).text;
        }
        if piece.bytes.is_empty() {
            return python::backslash_replace(&bytes);
        }
        bytes.extend_from_slice(&piece.bytes);
    }
}
