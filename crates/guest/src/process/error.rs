//! Why a command could not be started.

use skyrl_protocol::guest::UserGroup;
use std::fmt;
use std::io;

/// Why a command could not be started. Nothing of it is left.
#[derive(Debug)]
pub enum SpawnError {
    /// The argument list is empty, or a string holds a NUL byte; which.
    Invalid(String),
    /// The working directory can't be entered.
    WorkingDirectory {
        /// The directory.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// No directory of the command's `PATH` holds the program.
    NotFound {
        /// The program as named.
        program: String,
        /// The `PATH` searched.
        searched: String,
    },
    /// The program exists or was named by path, but can't be executed.
    CannotExecute {
        /// Its path.
        program: String,
        /// Why.
        source: io::Error,
        /// It exists, so an `ENOENT` means its interpreter or dynamic linker.
        exists: bool,
    },
    /// A shell is needed and the image has none.
    NoShell {
        /// The paths looked at.
        looked_for: &'static [&'static str],
    },
    /// The user could not be taken on.
    User {
        /// Which.
        user: UserGroup,
        /// Why.
        source: io::Error,
    },
    /// No pseudo-terminal could be made.
    Terminal(io::Error),
    /// The guest's bound on live commands.
    TooMany {
        /// The bound.
        limit: usize,
    },
    /// The kernel refused pipes, memory or a process.
    Resources {
        /// What was asked for.
        what: &'static str,
        /// Why it was refused.
        source: io::Error,
    },
}

impl SpawnError {
    /// The operating system's number, where it refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::WorkingDirectory { source, .. }
            | Self::CannotExecute { source, .. }
            | Self::User { source, .. }
            | Self::Terminal(source)
            | Self::Resources { source, .. } => source.raw_os_error(),
            Self::NotFound { .. } | Self::NoShell { .. } => Some(libc::ENOENT),
            Self::Invalid(_) | Self::TooMany { .. } => None,
        }
    }

    /// What to do next, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotFound { .. } => {
                Some("install the program in the image, or give its absolute path")
            }
            Self::CannotExecute {
                source,
                exists: true,
                ..
            } if source.raw_os_error() == Some(libc::ENOENT) => Some(
                "the file exists: its interpreter (first line of a script) or dynamic linker does not",
            ),
            Self::CannotExecute { source, .. } if source.raw_os_error() == Some(libc::ENOEXEC) => {
                Some("the file is neither a program of this machine nor a script with a #! line")
            }
            Self::CannotExecute { source, .. } if source.raw_os_error() == Some(libc::EACCES) => {
                Some("set its execute bit, or check that its file system is not mounted noexec")
            }
            Self::CannotExecute { source, .. } if source.raw_os_error() == Some(libc::E2BIG) => {
                Some("pass long input on stdin or in a file instead of arguments")
            }
            Self::NoShell { .. } => Some("run a program by its arguments instead of a shell line"),
            Self::Terminal(_) => Some("mount devpts at /dev/pts in the sandbox"),
            Self::TooMany { .. } => Some("wait for commands to finish, or kill some"),
            Self::Resources { .. } => Some("the sandbox's process or descriptor limit is reached"),
            _ => None,
        }
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(what) => f.write_str(what),
            Self::WorkingDirectory { path, source } => {
                write!(f, "working directory {path:?} can't be entered: {source}")
            }
            Self::NotFound { program, searched } => {
                write!(f, "program {program:?} was not found in PATH={searched}")
            }
            Self::CannotExecute {
                program, source, ..
            } => write!(f, "{program:?} can't be executed: {source}"),
            Self::NoShell { looked_for } => write!(
                f,
                "the image has no shell: looked for {}",
                looked_for.join(", ")
            ),
            Self::User { user, source } => write!(
                f,
                "can't run as user {} and group {}: {source}",
                user.uid, user.gid
            ),
            Self::Terminal(source) => write!(f, "no pseudo-terminal could be made: {source}"),
            Self::TooMany { limit } => write!(f, "{limit} commands are running already"),
            Self::Resources { what, source } => write!(f, "could not make {what}: {source}"),
        }
    }
}

impl std::error::Error for SpawnError {}
