//! Bash sessions of this dialect: one persistent shell each.

use super::Answer;
use super::error::{Exception, Failure};
use super::execute::with_reason;
use super::model::{self, BashAction, Check, CloseSession, CreateSession, Interrupt};
use super::syntax;
use crate::Guest;
use crate::api::python;
use crate::http::{Request, Response};
use crate::shell::{self, Extras, Invalid, Shell, ShellError, Until, Wait};
use crate::sync::{lock, wait_until};
use regex::Regex;
use serde_json::json;
use skyrl_protocol::guest::{ShellSpec, ShellStartup, ShellState, ShellText};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What the client takes for the end of a command.
const PROMPT: &str = "SHELLPS1PREFIX";
/// Longest wait; also when the client sets none.
const MOST_SECONDS: f64 = 86_400.0;
/// Least time that start files get: the client's default of one second is too
/// short on a busy machine.
const LEAST_START: Duration = Duration::from_secs(10);
/// Least time that an interrupt gets to end a command: the shell may have a
/// slow prompt command to run before it can say so, and another interrupt
/// would make it begin that anew.
const LEAST_INTERRUPT: Duration = Duration::from_secs(1);
/// Output kept of one command.
const MOST_OUTPUT: usize = 16 << 20;

/// Exit code of a command that C-z stopped.
const STOPPED: i32 = 128 + libc::SIGTSTP;

/// Sessions by name.
#[derive(Default)]
pub(super) struct Sessions(Mutex<HashMap<String, Arc<Session>>>);

/// One session. Requests to run something take turns.
struct Session {
    shell: Arc<Shell>,
    taken: Mutex<bool>,
    freed: Condvar,
}

/// The right to run something in a session.
struct Turn<'s>(&'s Session);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.taken) = false;
        self.0.freed.notify_one();
    }
}

impl Session {
    /// Waits for its turn; none when the deadline passes first.
    fn turn(&self, deadline: Instant) -> Option<Turn<'_>> {
        let mut taken = lock(&self.taken);
        while *taken {
            let (guard, in_time) = wait_until(&self.freed, taken, Some(deadline));
            taken = guard;
            if !in_time {
                return None;
            }
        }
        *taken = true;
        Some(Turn(self))
    }
}

/// Seconds of a request as a duration.
pub(super) fn duration(seconds: f64) -> Duration {
    if seconds.is_nan() {
        return Duration::ZERO;
    }
    Duration::from_secs_f64(seconds.clamp(0.0, MOST_SECONDS))
}

fn shell_id(session: &str) -> String {
    format!("swerex:{session}")
}

fn find(guest: &Guest, name: &str) -> Result<Arc<Session>, Failure> {
    lock(&guest.swerex.sessions.0)
        .get(name)
        .cloned()
        .ok_or_else(|| {
            let message = format!("session {} does not exist", python::repr(name));
            Exception::swerex("SessionDoesNotExistError", message).into()
        })
}

fn exists(name: &str) -> Failure {
    let message = format!("session {name} already exists");
    Exception::swerex("SessionExistsError", message).into()
}

impl From<ShellError> for Failure {
    fn from(error: ShellError) -> Self {
        match error {
            ShellError::Start(error) => error.into(),
            ShellError::Ended(code) => Exception::of(
                "pexpect.exceptions.EOF",
                format!("End Of File (EOF). The shell has ended with exit code {code}."),
            )
            .into(),
            ShellError::StartTimeout { .. } => {
                Exception::of("pexpect.exceptions.TIMEOUT", error.to_string()).into()
            }
            error => Exception::swerex("SessionNotInitializedError", error.to_string()).into(),
        }
    }
}

/// `POST /create_session`.
pub(super) fn create(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let body = model::object(request)?;
    model::tag(&body, "session_type", &["bash"])?;
    let wanted: CreateSession = model::read(body)?;
    if lock(&guest.swerex.sessions.0).contains_key(&wanted.session) {
        return Err(exists(&wanted.session));
    }
    let environment = &guest.processes.settings().environment;
    let mut env = BTreeMap::new();
    if environment.get("TERM").is_none() {
        env.insert("TERM".to_owned(), "dumb".to_owned());
    }
    let spec = ShellSpec {
        id: Some(shell_id(&wanted.session)),
        env,
        startup: ShellStartup::Interactive,
        text: ShellText::Plain,
        columns: Some(80),
        rows: Some(24),
        ..ShellSpec::default()
    };
    let patience = duration(wanted.startup_timeout).max(LEAST_START);
    let extras = Extras {
        patience,
        invalid: Invalid::Backslash,
        ..Extras::default()
    };
    let (shell, mut output) = match guest.shells.create(&guest.processes, &spec, extras) {
        Err(ShellError::Exists(_)) => return Err(exists(&wanted.session)),
        created => created?,
    };
    if !wanted.startup_source.is_empty() {
        match source(&shell, &wanted.startup_source, patience) {
            Ok(printed) => output.push_str(&printed),
            Err(failure) => {
                // It was never a session.
                let _ = guest.shells.close(shell.id());
                return Err(failure);
            }
        }
    }
    let session = Session {
        shell,
        taken: Mutex::default(),
        freed: Condvar::new(),
    };
    lock(&guest.swerex.sessions.0).insert(wanted.session, Arc::new(session));
    Ok(Response::json(
        200,
        &json!({"output": output, "session_type": "bash"}),
    ))
}

/// Reads the files that a client wants read at the start.
fn source(shell: &Shell, files: &[String], patience: Duration) -> Result<String, Failure> {
    // Unquoted, as the reference does it: `~/.bashrc` is meant.
    let commands: Vec<String> = files.iter().map(|file| format!("source {file}")).collect();
    let answer = shell.run(
        &commands.join(" ; "),
        MOST_OUTPUT,
        Wait::for_end(patience, None),
    )?;
    match answer.state {
        ShellState::Completed { .. } => Ok(answer.output),
        ShellState::Exited { exit_code } => Err(ShellError::Ended(exit_code).into()),
        _ => Err(ShellError::StartTimeout {
            output: answer.output,
        }
        .into()),
    }
}

/// `POST /close_session`.
pub(super) fn close(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let body = model::object(request)?;
    model::tag(&body, "session_type", &["bash"])?;
    let wanted: CloseSession = model::read(body)?;
    find(guest, &wanted.session)?;
    forget(guest, &wanted.session);
    Ok(Response::json(200, &json!({"session_type": "bash"})))
}

/// `POST /close`.
pub(super) fn close_all(guest: &Guest, _request: &mut Request<'_>) -> Answer {
    let names: Vec<String> = lock(&guest.swerex.sessions.0).keys().cloned().collect();
    for name in names {
        forget(guest, &name);
    }
    Ok(Response::json(200, &json!({})))
}

fn forget(guest: &Guest, name: &str) {
    lock(&guest.swerex.sessions.0).remove(name);
    // Somebody else may have closed the shell already.
    let _ = guest.shells.close(&shell_id(name));
}

/// `POST /run_in_session`.
pub(super) fn run(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let body = model::object(request)?;
    match model::tag(&body, "action_type", &["bash", "bash_interrupt"])? {
        "bash" => {
            let action: BashAction = model::read(body)?;
            let session = find(guest, &action.session)?;
            let observation = if action.is_interactive_command || action.is_interactive_quit {
                run_interactive(&session, &action, request)?
            } else {
                run_normal(guest, &session, &action, request)?
            };
            Ok(observation.response())
        }
        _ => {
            let action: Interrupt = model::read(body)?;
            let session = find(guest, &action.session)?;
            Ok(interrupt(&session, &action)?.response())
        }
    }
}

/// What a client is told of an action.
struct Observation {
    output: String,
    exit_code: Option<i32>,
    expected: String,
}

impl Observation {
    fn response(&self) -> Response {
        Response::json(
            200,
            &json!({
                "output": self.output,
                "exit_code": self.exit_code,
                "failure_reason": "",
                "expect_string": self.expected,
                "session_type": "bash",
            }),
        )
    }
}

/// The texts a client expects: regular expressions.
struct Expected {
    patterns: Vec<Regex>,
    given: Vec<String>,
}

impl Expected {
    fn new(given: &[String]) -> Result<Self, Failure> {
        let patterns = given
            .iter()
            .map(|pattern| {
                // Line ends of the client's terminal are two characters.
                let pattern = pattern
                    .replace("\\r\\n", "\\r?\\n")
                    .replace("\r\n", "\r?\n");
                Regex::new(&format!("(?s){pattern}")).map_err(|error| {
                    Failure::from(Exception::of("builtins.ValueError", error.to_string()))
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            patterns,
            given: given.to_vec(),
        })
    }

    /// The first match.
    fn find(&self, output: &str) -> Option<(usize, Range<usize>)> {
        self.patterns
            .iter()
            .enumerate()
            .filter_map(|(index, pattern)| Some((index, pattern.find(output)?.range())))
            .min_by_key(|(index, range)| (range.start, *index))
    }

    /// What to tell the client it was that ended the wait.
    fn name(&self, found: Option<usize>) -> String {
        found
            .and_then(|index| self.given.get(index))
            .map_or_else(|| PROMPT.to_owned(), String::clone)
    }
}

fn timed_out(action: &BashAction) -> Failure {
    let seconds = action
        .timeout
        .map_or_else(|| "None".to_owned(), python::float);
    let message = format!(
        "timeout after {seconds} seconds while running command {}",
        python::repr(&action.command)
    );
    Exception::swerex("CommandTimeoutError", message).into()
}

/// Waits for the end of the command, or for what is expected.
fn wait_for<'w, 'r: 'w>(
    timeout: Duration,
    find: &'w shell::Find<'w>,
    nothing_expected: bool,
    request: &Request<'r>,
) -> Wait<'w> {
    Wait {
        until: if nothing_expected {
            Until::End
        } else {
            Until::Found(find)
        },
        keep_partial: true,
        ..Wait::for_end(timeout, request.client)
    }
}

fn run_normal(
    guest: &Guest,
    session: &Session,
    action: &BashAction,
    request: &Request<'_>,
) -> Result<Observation, Failure> {
    let expected = Expected::new(&action.expect)?;
    let shell = &session.shell;
    syntax::check(guest, &shell.info().shell, &action.command)?;
    let timeout = duration(action.timeout.unwrap_or(MOST_SECONDS));
    let deadline = Instant::now() + timeout;
    let _turn = session.turn(deadline).ok_or_else(|| timed_out(action))?;
    if shell.session().is_busy() {
        // A command that was given up goes on; its output is nobody's.
        let left = deadline.saturating_duration_since(Instant::now());
        let rest = shell.session().wait(Wait {
            keep_partial: true,
            ..Wait::for_end(left, request.client)
        });
        if rest.state == ShellState::Running {
            return Err(timed_out(action));
        }
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let find = |output: &str| expected.find(output);
    let wait = wait_for(left, &find, expected.given.is_empty(), request);
    let answer = shell.run(&action.command, MOST_OUTPUT, wait)?;
    let exit_code = match (answer.state, answer.found) {
        (ShellState::Completed { exit_code }, _) => Some(exit_code),
        (ShellState::Exited { exit_code }, _) => return Err(ShellError::Ended(exit_code).into()),
        (_, Some(_)) => None,
        _ => return Err(timed_out(action)),
    };
    let observation = Observation {
        output: answer.output,
        exit_code: exit_code.filter(|_| action.check != Check::Ignore),
        expected: expected.name(answer.found),
    };
    if action.check == Check::Raise {
        checked(action, &observation)?;
    }
    Ok(observation)
}

/// Raises what `check="raise"` asks for.
fn checked(action: &BashAction, observation: &Observation) -> Result<(), Failure> {
    match observation.exit_code {
        Some(0) => Ok(()),
        Some(code) => {
            let message = format!(
                "Command {} failed with exit code {code}. Here is the output:\n{}",
                python::repr(&action.command),
                python::repr(&observation.output)
            );
            let message = with_reason(&action.error_msg, message);
            Err(Exception::swerex("NonZeroExitCodeError", message).into())
        }
        None => Err(Exception::swerex("NoExitCodeError", "timeout while getting exit code").into()),
    }
}

/// A line for an interactive program, or one that starts it.
fn run_interactive(
    session: &Session,
    action: &BashAction,
    request: &Request<'_>,
) -> Result<Observation, Failure> {
    let expected = Expected::new(&action.expect)?;
    let shell = &session.shell;
    let timeout = duration(action.timeout.unwrap_or(MOST_SECONDS));
    let deadline = Instant::now() + timeout;
    let _turn = session.turn(deadline).ok_or_else(|| timed_out(action))?;
    let find = |output: &str| expected.find(output);
    let wait = wait_for(timeout, &find, expected.given.is_empty(), request);
    let answer = if shell.session().is_busy() {
        shell
            .session()
            .input(format!("{}\n", action.command).as_bytes())
            .map_err(ShellError::from)?;
        shell.session().wait(wait)
    } else {
        shell.run(&action.command, MOST_OUTPUT, wait)?
    };
    let ended = match answer.state {
        ShellState::Exited { exit_code } => return Err(ShellError::Ended(exit_code).into()),
        ShellState::Completed { .. } | ShellState::Idle => true,
        _ => false,
    };
    if !ended && answer.found.is_none() {
        return Err(timed_out(action));
    }
    // Some programs echo the line by themselves.
    let output = answer.output.trim_start();
    let output = output.strip_prefix(&action.command).unwrap_or(output);
    Ok(Observation {
        output: output.trim().to_owned(),
        exit_code: Some(0),
        expected: expected.name(answer.found),
    })
}

/// Presses C-c some times; then stops the program and kills it.
fn interrupt(session: &Session, action: &Interrupt) -> Result<Observation, Failure> {
    let expected = Expected::new(&action.expect)?;
    let find = |output: &str| expected.find(output);
    let shell = session.shell.session();
    let timeout = duration(action.timeout).max(LEAST_INTERRUPT);
    let observe = |output: &str, found: Option<usize>| Observation {
        output: output.trim().to_owned(),
        exit_code: Some(0),
        expected: expected.name(found),
    };
    if !shell.is_busy() {
        return Ok(observe("", None));
    }
    // The end of the command and its exit code, or what was expected.
    let press = |key: &[u8]| -> Result<Option<(Observation, Option<i32>)>, Failure> {
        shell.input(key).map_err(ShellError::from)?;
        let until = if expected.given.is_empty() {
            Until::End
        } else {
            Until::Found(&find)
        };
        let answer = shell.wait(Wait {
            until,
            keep_partial: true,
            ..Wait::for_end(timeout, None)
        });
        match answer.state {
            ShellState::Exited { exit_code } => Err(ShellError::Ended(exit_code).into()),
            ShellState::Completed { exit_code } => {
                Ok(Some((observe(&answer.output, None), Some(exit_code))))
            }
            ShellState::Idle => Ok(Some((observe(&answer.output, None), None))),
            _ => Ok(answer
                .found
                .map(|found| (observe(&answer.output, Some(found)), None))),
        }
    };
    for _ in 0..action.n_retry.min(100) {
        if let Some((observation, _)) = press(b"\x03")? {
            return Ok(observation);
        }
    }
    match press(b"\x1a")? {
        Some((stopped, Some(STOPPED))) => {
            let wait = Wait::for_end(timeout, None);
            let killed = session.shell.run("kill -9 %%", MOST_OUTPUT, wait)?;
            return Ok(observe(
                &format!("{}\n{}", stopped.output, killed.output),
                None,
            ));
        }
        Some((observation, _)) => return Ok(observation),
        None => {}
    }
    Err(Exception::of("pexpect.exceptions.TIMEOUT", "Failed to interrupt session").into())
}
