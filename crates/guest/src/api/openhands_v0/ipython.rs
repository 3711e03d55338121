//! Actions of type `run_ipython`: cells of Python code in one interpreter that
//! lasts. The image's own Python runs them, driven by a small program on its
//! standard input; where there is none, the reference's error is given.

use super::observation;
use super::run::cwd;
use super::{Arguments, internal};
use crate::Guest;
use crate::api::python;
use crate::http::{Request, Response};
use crate::process::{Command, Input, Keep, SpawnError, Spec, Stdio, Stream, Waited};
use crate::sync::lock;
use serde_json::{Value, json};
use skyrl_protocol::guest::Program;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What runs the cells.
const PROGRAM: &str = include_str!("interpreter.py");
/// Names of Python.
const NAMES: [&str; 2] = ["python3", "python"];
/// Output kept of a cell.
const MOST_OUTPUT: u64 = 1 << 20;
/// Longest a cell may run when no limit is set.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Time to heed an interrupt, and to read a cell.
const PATIENCE: Duration = Duration::from_secs(5);

/// The agent's interpreter.
#[derive(Default)]
pub(super) struct Interpreter(Mutex<Option<Running>>);

struct Running {
    command: Arc<Command>,
}

/// How a cell ended.
enum Outcome {
    /// Its output, and what the interpreter says of itself.
    Done(String, Value),
    /// It ran too long; its output so far.
    TimedOut(String),
    /// The interpreter ended; its last output.
    Gone(String),
}

/// Executes an action.
pub(super) fn run(
    guest: &Guest,
    arguments: &Arguments,
    timeout: Option<f64>,
    request: &Request<'_>,
) -> Result<Value, Response> {
    let code = arguments.required("code")?;
    let here = cwd(guest);
    let mut interpreter = lock(&guest.openhands_v0.interpreter.0);
    let mut cells = Vec::new();
    if interpreter.as_ref().is_none_or(|r| r.command.is_finished()) {
        *interpreter = Some(start(guest)?);
        cells.extend(arguments.text("kernel_init_code").filter(|c| !c.is_empty()));
    }
    let Some(running) = interpreter.as_ref() else {
        return Err(internal("the interpreter is gone"));
    };
    cells.push(code);
    let limit = timeout
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .map_or(LONGEST, |limit| limit.min(LONGEST));
    let (mut content, facts) = match running.execute(&cells, &here, limit, request)? {
        Outcome::Done(output, facts) => (output, facts),
        Outcome::TimedOut(output) => {
            let seconds = python::float(timeout.unwrap_or_default());
            let note = format!("[Execution timed out ({seconds} seconds).]");
            (format!("{output}\n{note}"), Value::Null)
        }
        Outcome::Gone(output) => {
            *interpreter = None;
            let note = "[The Python interpreter has ended; the next cell starts a new one.]";
            (format!("{output}\n{note}"), Value::Null)
        }
    };
    if content.is_empty() {
        content.push_str("[Code executed successfully with no output]");
    }
    let mut content = content.trim_end().to_owned();
    if arguments.flag("include_extra") {
        let fact =
            |name: &str, otherwise: &str| facts[name].as_str().unwrap_or(otherwise).to_owned();
        content.push_str(&format!(
            "\n[Jupyter current working directory: {}]\n[Jupyter Python interpreter: {}]",
            fact("cwd", &here),
            fact("python", "")
        ));
    }
    Ok(observation::ipython(code, &content))
}

fn start(guest: &Guest) -> Result<Running, Response> {
    for name in NAMES {
        let argv = [name, "-u", "-c", PROGRAM].map(str::to_owned);
        let spec = Spec {
            input: Input::Open,
            stdio: Stdio::Merged,
            keep: Keep::Tail(MOST_OUTPUT),
            ..Spec::new(Program::Argv(argv.to_vec()))
        };
        match guest.processes.spawn(&spec) {
            Ok(command) => return Ok(Running { command }),
            Err(SpawnError::NotFound { .. }) => {}
            Err(error) => return Err(internal(&error.to_string())),
        }
    }
    Err(internal(
        "JupyterRequirement not found. The image has no Python to run the code with: \
         install python3 in it, or use run actions only.",
    ))
}

impl Running {
    fn execute(
        &self,
        cells: &[&str],
        cwd: &str,
        limit: Duration,
        request: &Request<'_>,
    ) -> Result<Outcome, Response> {
        let nonce = crate::random_id();
        let from = self.command.read_since(Stream::Stdout, u64::MAX, 0).total;
        let line = json!({"cells": cells, "cwd": cwd, "nonce": nonce});
        let deadline = Instant::now() + limit;
        let sent = self.command.write_input(
            format!("{line}\n").as_bytes(),
            Some(Instant::now() + PATIENCE),
        );
        if sent.is_err() && !self.command.is_finished() {
            return Err(internal("the Python interpreter does not read"));
        }
        if let Some(done) = self.until_mark(from, &nonce, deadline, Some(request)) {
            return Ok(done);
        }
        self.command.signal(libc::SIGINT);
        let deadline = Instant::now() + PATIENCE;
        let output = match self.until_mark(from, &nonce, deadline, None) {
            Some(Outcome::Done(output, _)) => output,
            _ => {
                self.command.end(Duration::ZERO);
                self.output(from)
            }
        };
        Ok(Outcome::TimedOut(output))
    }

    /// Reads up to the mark; nothing when time is over or the client is gone.
    fn until_mark(
        &self,
        from: u64,
        nonce: &str,
        deadline: Instant,
        request: Option<&Request<'_>>,
    ) -> Option<Outcome> {
        let begin = format!("\n\0{nonce}");
        let mut seen = from;
        loop {
            let client = request.and_then(|request| request.client);
            let waited = self
                .command
                .wait_output([seen, u64::MAX], client, Some(deadline));
            let output = self.output(from);
            seen = self.command.read_since(Stream::Stdout, u64::MAX, 0).total;
            if let Some((text, mark)) = output.split_once(&begin)
                && let Some((facts, _)) = mark.split_once('\0')
            {
                let facts = serde_json::from_str(facts).unwrap_or_default();
                return Some(Outcome::Done(text.to_owned(), facts));
            }
            match waited {
                Waited::Output => {}
                Waited::Finished => return Some(Outcome::Gone(output)),
                Waited::TimedOut | Waited::ClientGone => return None,
            }
        }
    }

    /// What is kept of the output since an offset.
    fn output(&self, from: u64) -> String {
        let mut bytes = Vec::new();
        let mut at = from;
        loop {
            let piece = self.command.read_since(Stream::Stdout, at, 1 << 16);
            if piece.bytes.is_empty() {
                return String::from_utf8_lossy(&bytes).into_owned();
            }
            at = piece.next();
            bytes.extend(piece.bytes);
        }
    }
}
