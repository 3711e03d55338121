//! Runs the image's git: no prompts, no pager, no locks that would disturb a
//! git run by the agent, bounded time and output. What is asked of git stands
//! elsewhere.

use crate::process::{Command, Exit, Keep, Processes, SpawnError, Spec, Stream, Waited};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time one operation may take, with all the git commands it needs.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Bytes read of one git command.
const MAX_OUTPUT: u64 = 64 << 20;

/// Settings in force for every command, whatever the repository says.
const SETTINGS: [&str; 8] = [
    // The work tree may belong to another user than the guest.
    "safe.directory=*",
    "core.fsmonitor=false",
    "core.quotePath=false",
    "color.ui=false",
    "diff.noprefix=false",
    "diff.mnemonicPrefix=false",
    "diff.renames=false",
    "advice.addEmbeddedRepo=false",
];

/// Why git could not answer.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// The image has no git.
    #[error("git is not installed in this image")]
    NoGit,
    /// The path lies in no work tree.
    #[error("Not a git repository: {0}")]
    NotARepository(String),
    /// The process could not be started.
    #[error("git could not be started: {0}")]
    Spawn(String),
    /// git failed.
    #[error("Git command failed: {command}{}", said(.message))]
    Failed {
        /// Its arguments, quoted for a shell.
        command: String,
        /// What it printed.
        message: String,
    },
    /// git took too long and was ended.
    #[error("Git command took longer than {} seconds and was ended: {command}", TIME_LIMIT.as_secs())]
    TimedOut {
        /// Its arguments.
        command: String,
    },
    /// git printed too much.
    #[error("Git command printed more than {MAX_OUTPUT} bytes: {command}")]
    TooMuch {
        /// Its arguments.
        command: String,
    },
    /// The file shown in a diff is too large; its size and the bound.
    #[error("File too large for git diff: {size} bytes (max: {limit} bytes)")]
    TooLarge {
        /// Size in bytes, at least.
        size: u64,
        /// Bound in bytes.
        limit: u64,
    },
    /// A file is needed and the path is something else.
    #[error("Path is not a file: {0}")]
    NotAFile(String),
    /// Neither the disk nor the base has the file.
    #[error("File does not exist: {0}")]
    NoFile(String),
    /// A file of the work tree can't be read, or a scratch directory made.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

fn said(message: &str) -> String {
    match message.lines().next() {
        Some(line) if !line.is_empty() => format!(" ({line})"),
        _ => String::new(),
    }
}

/// One operation on one directory.
pub(super) struct Git<'p> {
    processes: &'p Processes,
    directory: String,
    environment: BTreeMap<String, String>,
    deadline: Instant,
}

/// What a git command answered.
pub(super) struct Reply {
    pub(super) success: bool,
    pub(super) stdout: Vec<u8>,
    command: String,
    message: String,
}

impl Reply {
    /// An error unless it succeeded.
    pub(super) fn ok(self) -> Result<Vec<u8>, GitError> {
        if self.success {
            Ok(self.stdout)
        } else {
            Err(GitError::Failed {
                command: self.command,
                message: self.message,
            })
        }
    }
}

impl<'p> Git<'p> {
    /// Git in a directory.
    pub(super) fn new(processes: &'p Processes, directory: &Path) -> Self {
        let environment = [
            ("GIT_OPTIONAL_LOCKS", "0"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_LITERAL_PATHSPECS", "1"),
            ("GIT_PAGER", "cat"),
            ("GIT_EDITOR", "true"),
            // A partial clone would fetch what it lacks.
            ("GIT_NO_LAZY_FETCH", "1"),
            ("LC_ALL", "C"),
        ];
        Self {
            processes,
            directory: directory.to_string_lossy().into_owned(),
            environment: environment
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            deadline: Instant::now() + TIME_LIMIT,
        }
    }

    /// The same operation in another directory.
    pub(super) fn at(&self, directory: &Path) -> Self {
        Self {
            processes: self.processes,
            directory: directory.to_string_lossy().into_owned(),
            environment: self.environment.clone(),
            deadline: self.deadline,
        }
    }

    /// The same with a variable set.
    pub(super) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.insert(name.to_owned(), value.into());
        self
    }

    /// Runs git and expects success.
    pub(super) fn ask<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Vec<u8>, GitError> {
        self.run(arguments)?.ok()
    }

    /// Runs git; a failure it reports itself is an answer too.
    pub(super) fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Reply, GitError> {
        let mut argv = vec!["git".to_owned(), "--no-pager".to_owned()];
        let mut shown = argv.clone();
        for setting in SETTINGS {
            argv.extend(["-c".to_owned(), setting.to_owned()]);
        }
        argv.extend(arguments.iter().map(|a| a.as_ref().to_owned()));
        shown.extend(arguments.iter().map(|a| quoted(a.as_ref())));
        let shown = shown.join(" ");

        let mut spec = Spec::argv(argv);
        spec.cwd = Some(self.directory.clone());
        spec.env = self.environment.clone();
        spec.keep = Keep::HeadTail(MAX_OUTPUT);
        spec.timeout = Some(self.deadline.saturating_duration_since(Instant::now()));
        let command = self.processes.spawn(&spec).map_err(|error| match error {
            SpawnError::NotFound { .. } => GitError::NoGit,
            // The directory of the operation vanished or is a file.
            SpawnError::WorkingDirectory { path, .. } => GitError::NotARepository(path),
            other => GitError::Spawn(other.to_string()),
        })?;
        // The time limit of the command ends it; this is for a process that
        // can't be killed.
        let patience = self.deadline + Duration::from_secs(10);
        let ended = command.wait(Some(patience));
        if ended != Waited::Finished || command.timed_out() {
            return Err(GitError::TimedOut { command: shown });
        }
        let stdout = whole_output(&command).ok_or_else(|| GitError::TooMuch {
            command: shown.clone(),
        })?;
        Ok(Reply {
            success: command.exit() == Some(Exit::Code(0)),
            stdout,
            message: command.output(Stream::Stderr).text.trim().to_owned(),
            command: shown,
        })
    }
}

/// All bytes of a finished command's stdout; `None` when some were dropped.
fn whole_output(command: &Arc<Command>) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let piece = command.read_since(Stream::Stdout, bytes.len() as u64, usize::MAX);
        if piece.offset != bytes.len() as u64 {
            return None;
        }
        bytes.extend_from_slice(&piece.bytes);
        if bytes.len() as u64 == piece.total || piece.bytes.is_empty() {
            return (bytes.len() as u64 == piece.total).then_some(bytes);
        }
    }
}

/// An argument as one would type it into a shell.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_shown_as_a_shell_takes_them() {
        assert_eq!(quoted("--name-only"), "--name-only");
        assert_eq!(quoted("nope^{commit}"), "'nope^{commit}'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
