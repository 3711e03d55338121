//! Exit codes and the one error type of the command line.

use skyrl_sandbox::EngineError;
use skyrl_sandbox::image::ImageError;
use std::process::ExitCode;

/// Shown at the end of `--help`.
pub(crate) const HELP: &str = "Exit codes: 0 success; 1 the run failed; 2 usage or configuration error; \
3 environment not ready; 4 the batch system refused; 5 timed out waiting; 6 cancelled; 70 a bug. \
`sandbox run` and `sandbox shell` end with the code of the command they ran.";

/// Exit codes of `skyrl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The work failed.
    Failed = 1,
    /// Arguments or configuration are wrong.
    Usage = 2,
    /// This machine lacks something.
    Environment = 3,
    /// A deadline passed.
    TimedOut = 5,
    /// The user cancelled.
    Cancelled = 6,
    /// A bug of ours.
    Bug = 70,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a verb failed, for people, with what to do next.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let exit = match &error {
            EngineError::Unusable { .. } | EngineError::State { .. } => Exit::Environment,
            EngineError::Invalid { .. }
            | EngineError::Exists(_)
            | EngineError::NotFound(_)
            | EngineError::LimitUnsupported { .. } => Exit::Usage,
            EngineError::Deadline { .. } => Exit::TimedOut,
            EngineError::Bug { .. } => Exit::Bug,
            _ => Exit::Failed,
        };
        Self {
            exit,
            message: error.to_string(),
            hint: error.hint(),
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        EngineError::from(error).into()
    }
}
