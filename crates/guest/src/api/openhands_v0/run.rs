//! Actions of type `run`: one persistent bash, spoken to by an agent that
//! sees a command's output up to now, may let it go on, and may type.

use super::observation::{self, Ended, Metadata};
use super::{Arguments, internal, split};
use crate::Guest;
use crate::api::python;
use crate::http::{Request, Response};
use crate::shell::{self, Answer, Extras, Shell, ShellError, Wait, key_bytes};
use crate::sync::lock;
use serde_json::Value;
use skyrl_protocol::guest::{ShellSpec, ShellStartup, ShellState, ShellText};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a command may be silent, unless `NO_CHANGE_TIMEOUT_SECONDS` says
/// otherwise.
const SILENCE: u64 = 10;
/// Longest wait of one action.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Output kept of one command: more than twice what an agent is shown.
const MOST_OUTPUT: usize = 1 << 20;
/// Name of the agent's shell.
const SHELL: &str = "openhands-v0";
/// Screen of the reference's terminal.
const SCREEN: (u16, u16) = (1000, 1000);

const PREVIOUS: &str = "[Below is the output of the previous command.]\n";
/// What an agent can do about a command that goes on.
const CHOICES: &str = "You may wait for more output by sending an empty command '', \
    send other commands to interact with the running process, \
    send keys (\"C-c\", \"C-z\", \"C-d\") to interrupt or end it before your next command, \
    or use the timeout parameter in execute_bash for future commands.";

/// The agent's terminal.
#[derive(Default)]
pub(super) struct Terminal(Mutex<Screen>);

#[derive(Default)]
struct Screen {
    shell: Option<Arc<Shell>>,
    /// Where the last shell was when it ended.
    cwd: Option<String>,
    /// A command goes on, as the agent knows.
    pending: bool,
    /// Some of its output was shown.
    shown: bool,
}

/// The directory that the agent's shell is in, or would begin in.
pub(super) fn cwd(guest: &Guest) -> String {
    let screen = lock(&guest.openhands_v0.terminal.0);
    screen.directory(guest)
}

impl Screen {
    fn directory(&self, guest: &Guest) -> String {
        let shell = self.shell.as_ref().map(|shell| shell.session().facts().cwd);
        shell.or_else(|| self.cwd.clone()).unwrap_or_else(|| {
            guest
                .processes
                .directory(None)
                .to_string_lossy()
                .into_owned()
        })
    }

    /// The shell, started if there is none.
    fn shell(&mut self, guest: &Guest) -> Result<Arc<Shell>, ShellError> {
        if let Some(shell) = &self.shell {
            if shell.session().is_alive() {
                return Ok(Arc::clone(shell));
            }
            self.forget(guest);
        }
        let shell = start(guest, Some(SHELL.to_owned()), self.cwd.clone())?;
        self.shell = Some(Arc::clone(&shell));
        Ok(shell)
    }

    /// The shell has ended; the next begins where it was.
    fn forget(&mut self, guest: &Guest) {
        if let Some(shell) = self.shell.take() {
            self.cwd = Some(shell.session().facts().cwd);
            // Its background jobs end with it.
            let _ = guest.shells.close(shell.id());
        }
        self.pending = false;
        self.shown = false;
    }
}

/// Starts a shell as an agent gets it.
fn start(guest: &Guest, id: Option<String>, cwd: Option<String>) -> Result<Arc<Shell>, ShellError> {
    let spec = |startup, cwd| ShellSpec {
        id: id.clone(),
        cwd,
        startup,
        text: ShellText::Screen,
        echo: true,
        columns: Some(SCREEN.0),
        rows: Some(SCREEN.1),
        ..ShellSpec::default()
    };
    let extras = Extras {
        probe_python: true,
        ..Extras::default()
    };
    let create = |startup, cwd| {
        guest
            .shells
            .create(&guest.processes, &spec(startup, cwd), extras)
    };
    let created = match create(ShellStartup::Login, cwd.clone()) {
        // Broken start files must not cost the agent its shell.
        Err(ShellError::Ended(_) | ShellError::StartTimeout { .. }) => {
            create(ShellStartup::None, cwd)
        }
        // The directory may be gone.
        Err(ShellError::Start(_)) if cwd.is_some() => create(ShellStartup::Login, None),
        created => created,
    };
    let (shell, _) = created?;
    let wait = Wait::for_end(Duration::from_secs(5), None);
    shell.run("alias git='git --no-pager'", MOST_OUTPUT, wait)?;
    Ok(shell)
}

/// What an action asks for.
struct Action<'a> {
    command: &'a str,
    is_input: bool,
    hidden: bool,
    timeout: Option<f64>,
    silence: Option<u64>,
}

impl Action<'_> {
    fn wait<'w>(&self, request: &Request<'w>) -> Wait<'w> {
        let timeout = self.timeout.map_or(LONGEST, |seconds| {
            Duration::try_from_secs_f64(seconds).map_or(LONGEST, |t| t.min(LONGEST))
        });
        Wait {
            quiet: self.silence.map(Duration::from_secs),
            ..Wait::for_end(timeout, request.client)
        }
    }

    /// The key that the input names.
    fn key(&self) -> Option<Vec<u8>> {
        (self.command.starts_with("C-") && self.command.len() == 3)
            .then(|| key_bytes(self.command))
            .flatten()
    }

    fn observation(&self, content: &str, metadata: &Metadata) -> Value {
        observation::run(self.command, content, metadata, self.hidden)
    }
}

/// Executes an action.
pub(super) fn run(
    guest: &Guest,
    arguments: &Arguments,
    timeout: Option<f64>,
    request: &Request<'_>,
) -> Result<Value, Response> {
    let silence = guest
        .processes
        .settings()
        .environment
        .get("NO_CHANGE_TIMEOUT_SECONDS")
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(SILENCE);
    let action = Action {
        command: arguments.required("command")?.trim(),
        is_input: arguments.flag("is_input"),
        hidden: arguments.flag("hidden"),
        timeout: timeout.filter(|seconds| *seconds > 0.0),
        silence: (!arguments.flag("blocking")).then_some(silence),
    };
    let executed = if arguments.flag("is_static") {
        run_apart(guest, &action, arguments.text("cwd"), request)
    } else {
        // One action at a time, as the client sends them.
        let mut screen = lock(&guest.openhands_v0.terminal.0);
        screen.execute(guest, &action, request)
    };
    executed.map_err(|error| internal(&error.to_string()))
}

/// In a shell of its own.
fn run_apart(
    guest: &Guest,
    action: &Action<'_>,
    cwd: Option<&str>,
    request: &Request<'_>,
) -> Result<Value, ShellError> {
    let shell = start(guest, None, cwd.map(str::to_owned))?;
    let mut screen = Screen {
        shell: Some(shell),
        ..Screen::default()
    };
    let observation = screen.execute(guest, action, request);
    screen.forget(guest);
    observation
}

impl Screen {
    fn execute(
        &mut self,
        guest: &Guest,
        action: &Action<'_>,
        request: &Request<'_>,
    ) -> Result<Value, ShellError> {
        if !self.pending && (action.command.is_empty() || action.is_input) {
            let purpose = if action.command.is_empty() {
                "retrieve logs from"
            } else {
                "interact with"
            };
            let content = format!("ERROR: No previous running command to {purpose}.");
            let unknown = Metadata {
                exit_code: -1,
                ..Metadata::default()
            };
            return Ok(observation::run("", &content, &unknown, false));
        }
        let commands = split::split(action.command);
        if !action.is_input && commands.len() > 1 {
            return Ok(observation::error(&many_commands(&commands)));
        }
        let shell = self.shell(guest)?;
        let session = shell.session();
        let answer = if self.pending && session.is_busy() {
            if !action.is_input && !action.command.is_empty() {
                return Ok(self.refuse(&shell, action));
            }
            if !action.command.is_empty() {
                let bytes = action
                    .key()
                    .unwrap_or_else(|| format!("{}\r", action.command).into_bytes());
                session.input(&bytes)?;
            }
            session.wait(action.wait(request))
        } else if action.is_input || action.command.is_empty() {
            // It ended since the agent looked.
            session.wait(action.wait(request))
        } else {
            shell.run(action.command, MOST_OUTPUT, action.wait(request))?
        };
        Ok(self.observe(guest, &shell, action, answer))
    }

    /// The agent has to deal with the running command first.
    fn refuse(&mut self, shell: &Shell, action: &Action<'_>) -> Value {
        let answer = shell.session().wait(Wait::for_end(Duration::ZERO, None));
        let metadata = Metadata {
            exit_code: -1,
            prefix: self.prefix(),
            suffix: format!(
                "\n[Your command \"{}\" is NOT executed. The previous command is still running - \
                 You CANNOT send new commands until the previous command is completed. By \
                 setting `is_input` to `true`, you can interact with the current process: \
                 {CHOICES}]",
                action.command
            ),
            ..Metadata::default()
        };
        self.shown |= !answer.output.is_empty();
        if matches!(
            answer.state,
            ShellState::Completed { .. } | ShellState::Idle
        ) {
            self.pending = false;
        }
        action.observation(answer.output.trim_end(), &metadata)
    }

    fn prefix(&self) -> String {
        if self.shown {
            PREVIOUS.to_owned()
        } else {
            String::new()
        }
    }

    fn observe(
        &mut self,
        guest: &Guest,
        shell: &Shell,
        action: &Action<'_>,
        answer: Answer,
    ) -> Value {
        let mut content = answer.output.as_str();
        if action.is_input {
            // The terminal shows what was typed.
            let shown = content.trim_start();
            content = shown.strip_prefix(action.command).unwrap_or(shown);
            content = content.trim_start_matches(['\r', '\n']);
        }
        let content = content.trim_end();
        let mut metadata = Metadata {
            exit_code: -1,
            prefix: self.prefix(),
            ..Metadata::default()
        };
        match answer.state {
            ShellState::Running | ShellState::Quiet => {
                let why = match (answer.state, action.silence) {
                    (ShellState::Quiet, Some(seconds)) => {
                        format!("The command has no new output after {seconds} seconds.")
                    }
                    _ => format!(
                        "The command timed out after {} seconds.",
                        python::float(action.timeout.unwrap_or(LONGEST.as_secs_f64()))
                    ),
                };
                metadata.suffix = format!("\n[{why} {CHOICES}]");
                self.pending = true;
                self.shown |= !answer.output.is_empty();
            }
            ShellState::Completed { exit_code } => {
                metadata.suffix = match action.key().filter(|_| action.is_input) {
                    Some(_) => format!(
                        "\n[The command completed with exit code {exit_code}. CTRL+{} was sent.]",
                        action.command[2..].to_uppercase()
                    ),
                    None => format!("\n[The command completed with exit code {exit_code}.]"),
                };
                metadata.exit_code = exit_code;
                metadata.ended = Some(surroundings(shell));
                self.pending = false;
                self.shown = false;
            }
            ShellState::Idle => {
                self.pending = false;
                self.shown = false;
            }
            ShellState::Exited { exit_code } => {
                metadata.suffix = format!(
                    "\n[The command completed with exit code {exit_code}. The shell has ended; \
                     a new one without its variables and functions serves the next command.]"
                );
                metadata.exit_code = exit_code;
                metadata.ended = Some(surroundings(shell));
                self.forget(guest);
            }
        }
        action.observation(content, &metadata)
    }
}

fn surroundings(shell: &Shell) -> Ended {
    let facts = shell.session().facts();
    Ended {
        pid: facts.background.unwrap_or(-1),
        username: shell::user_name(),
        hostname: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        working_dir: facts.cwd,
        python: facts.python,
    }
}

fn many_commands(commands: &[&str]) -> String {
    let mut text = "ERROR: Cannot execute multiple commands at once.\n\
        Please run each command separately OR chain them into a single command via && or ;\n\
        Provided commands:"
        .to_owned();
    for (index, command) in commands.iter().enumerate() {
        text.push_str(&format!("\n({}) {command}", index + 1));
    }
    text
}
