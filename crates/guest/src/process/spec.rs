//! What to run and how, as callers say it.

use skyrl_protocol::guest::{ExecRequest, Finish, Program, UserGroup};
use std::collections::BTreeMap;
use std::time::Duration;

/// Largest output kept of one stream, in bytes, whatever a request asks for.
const MAX_OUTPUT: u64 = 256 << 20;

/// Standard input of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// End of file at once.
    Empty,
    /// These bytes, then end of file.
    Bytes(Vec<u8>),
    /// Kept open for [`super::Command::write_input`]. Terminals always are.
    Open,
}

/// What a command's standard streams are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdio {
    /// A pipe for each of stdout and stderr.
    Pipes,
    /// One pipe for both; it is read as stdout.
    Merged,
    /// A pseudo-terminal of its own, read as stdout.
    Terminal {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
}

/// What is kept of each output stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// So many bytes: the first half and the last half.
    HeadTail(u64),
    /// The last so many bytes.
    Tail(u64),
    /// Nothing is lost: beyond so many bytes not yet read through
    /// [`super::Command::read_since`] the command has to wait. Reading at an
    /// offset gives up what lies before it.
    Flow(u64),
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// What to run.
    pub program: Program,
    /// Working directory; the guest's default when absent.
    pub cwd: Option<String>,
    /// Variables added to the sandbox's environment.
    pub env: BTreeMap<String, String>,
    /// Start from an empty environment.
    pub clear_env: bool,
    /// Standard input.
    pub input: Input,
    /// Standard streams.
    pub stdio: Stdio,
    /// What is kept of the output.
    pub keep: Keep,
    /// Time after which the command is ended; frozen time does not count.
    pub timeout: Option<Duration>,
    /// Time between SIGTERM and SIGKILL when it is ended.
    pub grace: Duration,
    /// Run as this user and group.
    pub user: Option<UserGroup>,
    /// When it counts as finished.
    pub finish: Finish,
}

impl Spec {
    /// A command with every setting at its default: separate pipes, empty
    /// input, 1 MiB kept of each stream, no time limit.
    pub fn new(program: Program) -> Self {
        Self::from(ExecRequest::new(program))
    }

    /// A line for the image's shell.
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new(Program::Shell(line.into()))
    }

    /// A program with arguments.
    pub fn argv<I, S>(argv: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self::new(Program::Argv(argv.into_iter().map(Into::into).collect()))
    }
}

impl From<ExecRequest> for Spec {
    fn from(request: ExecRequest) -> Self {
        Self {
            program: request.program,
            cwd: request.cwd,
            env: request.env,
            clear_env: request.clear_env,
            input: match request.stdin {
                _ if request.keep_stdin => Input::Open,
                Some(text) if !text.is_empty() => Input::Bytes(text.into_bytes()),
                _ => Input::Empty,
            },
            stdio: if request.merge_output {
                Stdio::Merged
            } else {
                Stdio::Pipes
            },
            keep: Keep::HeadTail(request.output_limit.min(MAX_OUTPUT)),
            timeout: request.timeout_ms.map(Duration::from_millis),
            grace: Duration::from_millis(request.grace_ms),
            user: request.user,
            finish: request.finish,
        }
    }
}
