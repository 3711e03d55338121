//! Why a persistent shell could not do what was asked.

use super::session::SessionError;
use crate::process::SpawnError;
use skyrl_protocol::guest::ErrorCode;
use std::fmt;

/// Why a persistent shell could not do what was asked.
#[derive(Debug)]
pub enum ShellError {
    /// The image has no shell.
    NoShell {
        /// Where it was looked for.
        looked_for: String,
    },
    /// So many shells exist already.
    TooMany {
        /// The bound.
        limit: usize,
    },
    /// A shell of this name exists.
    Exists(String),
    /// No shell of this name exists.
    NotFound(String),
    /// A command runs in it.
    Busy,
    /// The shell has ended with this exit code.
    Ended(i32),
    /// A command or input the shell can't be given, and why.
    Unusable(&'static str),
    /// Too much input waits to be read by the program in the foreground.
    InputFull,
    /// The process could not be started.
    Start(SpawnError),
    /// Its start files did not end in time.
    StartTimeout {
        /// What they printed.
        output: String,
    },
}

impl ShellError {
    /// For programs.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NoShell { .. } => ErrorCode::NoShell,
            Self::TooMany { .. } | Self::InputFull => ErrorCode::LimitReached,
            Self::Exists(_) | Self::Busy | Self::Ended(_) | Self::StartTimeout { .. } => {
                ErrorCode::Conflict
            }
            Self::NotFound(_) => ErrorCode::NotFound,
            Self::Unusable(_) => ErrorCode::BadRequest,
            Self::Start(_) => ErrorCode::Io,
        }
    }

    /// What to do next.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NoShell { .. } => "run programs by argv with /v1/exec instead",
            Self::TooMany { .. } => "delete shells that are not needed",
            Self::Exists(_) => "use it, delete it, or choose another name",
            Self::NotFound(_) => "create it first",
            Self::Busy => "read on until it ends, send it input, or interrupt it",
            Self::Ended(_) => "delete the shell and create it again",
            Self::InputFull => "wait until the program reads, or interrupt it",
            Self::StartTimeout { .. } => "repair the start files, or start the shell without them",
            Self::Start(error) => return error.hint(),
            Self::Unusable(_) => return None,
        })
    }
}

impl From<SpawnError> for ShellError {
    fn from(error: SpawnError) -> Self {
        Self::Start(error)
    }
}

impl From<SessionError> for ShellError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Busy => Self::Busy,
            SessionError::Ended(code) => Self::Ended(code),
            SessionError::NulByte => Self::Unusable("a command can't hold a NUL byte"),
            SessionError::InputFull => Self::InputFull,
        }
    }
}

impl fmt::Display for ShellError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoShell { looked_for } => {
                write!(f, "the image has no shell: looked for {looked_for}")
            }
            Self::TooMany { limit } => write!(f, "{limit} shells exist already"),
            Self::Exists(id) => write!(f, "shell {id:?} exists already"),
            Self::NotFound(id) => write!(f, "there is no shell {id:?}"),
            Self::Busy => f.write_str("a command is running in the shell"),
            Self::Ended(code) => write!(f, "the shell has ended with exit code {code}"),
            Self::Unusable(why) => f.write_str(why),
            Self::InputFull => f.write_str("the program does not read its input"),
            Self::Start(error) => write!(f, "the shell could not be started: {error}"),
            Self::StartTimeout { output } => {
                write!(f, "the shell's start files did not end in time")?;
                if !output.is_empty() {
                    write!(f, "; they printed: {output}")?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for ShellError {}
