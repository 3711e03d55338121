//! What can go wrong with a sandbox, typed so that callers can tell a missing
//! image from a full disk, each with what to do next.

use crate::engine::EngineKind;
use skyrl_protocol::SandboxId;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Failure of an engine's verb.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// This engine can't work on this machine.
    #[error("engine {engine} can't be used here: {reason}")]
    Unusable {
        /// Which engine.
        engine: EngineKind,
        /// Why.
        reason: String,
        /// What would make it usable.
        hint: String,
    },
    /// The engine can't hold a limit, so it does not pretend to.
    #[error("engine {engine} can't enforce the {limit} limit here: {reason}")]
    LimitUnsupported {
        /// Which engine.
        engine: EngineKind,
        /// Which limit: `cpus`, `memory`, `pids`, `disk`.
        limit: &'static str,
        /// Why.
        reason: String,
    },
    /// The request can't be met as it stands.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
        /// How to put it right.
        hint: String,
    },
    /// No such sandbox.
    #[error("no sandbox {0}")]
    NotFound(SandboxId),
    /// The id is in use.
    #[error("sandbox {0} exists already")]
    Exists(SandboxId),
    /// The image could not be had.
    #[error(transparent)]
    Image(#[from] crate::image::ImageError),
    /// A step on this machine failed.
    #[error("{step} {subject}: {source}")]
    Step {
        /// What was attempted, e.g. "mounting the overlay on".
        step: String,
        /// Path or value concerned.
        subject: String,
        /// What the system answered.
        source: io::Error,
    },
    /// A program the engine relies on failed.
    #[error("{program} failed ({status}): {output}")]
    Program {
        /// Its name with the verb, e.g. `crun create`.
        program: String,
        /// How it ended.
        status: String,
        /// The last lines it printed.
        output: String,
    },
    /// Podman's service answered an error.
    #[error("podman answered {status} to {request}: {message}")]
    Podman {
        /// Method and path.
        request: String,
        /// HTTP status.
        status: u16,
        /// Its message.
        message: String,
    },
    /// The sandbox ended while it was needed.
    #[error("sandbox {id} ended: {cause}")]
    Ended {
        /// Which.
        id: SandboxId,
        /// Exit status, signal or out of memory, in words, with the tail of
        /// what its guest said.
        cause: String,
    },
    /// A verb took too long.
    #[error("{verb} did not finish within {limit:?}")]
    Deadline {
        /// Which verb.
        verb: &'static str,
        /// Its deadline.
        limit: Duration,
    },
    /// The engine's own helper process is gone.
    #[error("the {engine} engine's {helper} is gone: {reason}")]
    HelperGone {
        /// Which engine.
        engine: EngineKind,
        /// Which process.
        helper: &'static str,
        /// What is known.
        reason: String,
    },
    /// The guest answered something unexpected.
    #[error("guest of {id}: {reason}")]
    Guest {
        /// Which sandbox.
        id: SandboxId,
        /// What happened.
        reason: String,
    },
    /// Our own code failed.
    #[error("a bug in the {engine} engine: {reason}")]
    Bug {
        /// Which engine was at work.
        engine: EngineKind,
        /// What is known.
        reason: String,
    },
    /// The state directory can't be used.
    #[error("state directory {path}: {reason}")]
    State {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: String,
        /// What to do.
        hint: String,
    },
}

impl EngineError {
    /// A failed step of the operating system.
    pub fn step(step: impl Into<String>, subject: impl ToString, source: io::Error) -> Self {
        Self::Step {
            step: step.into(),
            subject: subject.to_string(),
            source,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unusable { hint, .. } | Self::Invalid { hint, .. } | Self::State { hint, .. } => {
                Some(hint.clone())
            }
            Self::LimitUnsupported { limit, .. } => Some(format!(
                "leave the {limit} limit out, or choose an engine that holds it: `skyrl sandbox probe` shows which"
            )),
            Self::NotFound(_) => Some("`skyrl sandbox ls` shows the living ones".into()),
            Self::Exists(_) => Some("choose another id, or `skyrl sandbox rm` it first".into()),
            Self::Image(error) => error.hint(),
            Self::Step { source, .. } => match source.raw_os_error() {
                Some(libc::ENOSPC | libc::EDQUOT) => Some(
                    "the disk is full: `skyrl sandbox prune` and `skyrl image rm` free space, `--state-dir` moves it".into(),
                ),
                Some(libc::EPERM | libc::EACCES) => {
                    Some("`skyrl sandbox probe` shows what this machine permits".into())
                }
                Some(libc::EMFILE | libc::ENFILE) => {
                    Some("raise the limit of open files: `ulimit -n`".into())
                }
                _ => None,
            },
            Self::Deadline { .. } => {
                Some("the machine may be overloaded; `skyrl sandbox ls` shows what runs".into())
            }
            Self::HelperGone { .. } => {
                Some("its sandboxes are gone too: start new ones; `skyrl sandbox prune` clears the rest".into())
            }
            Self::Bug { .. } => Some("please report it, with the output of `-vv`".into()),
            Self::Program { .. } | Self::Podman { .. } | Self::Ended { .. } | Self::Guest { .. } => None,
        }
    }

    /// Whether the disk was full.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Step { source, .. }
            if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)))
    }
}
