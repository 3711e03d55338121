//! The container runtimes of this machine: finding them, and how each is
//! called. Pure apart from looking for the program and asking its version.

use crate::command::{find_program, run};
use crate::error::EngineError;
use serde::{Deserialize, Serialize};
use skyrl_protocol::zygote::StepFailure;
use skyrl_zygote::sealed::sealed_copy;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// Which runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuntimeKind {
    /// crun: small and quick, leaves control groups to us.
    Crun,
    /// runc: makes its own control groups; slower.
    Runc,
}

impl RuntimeKind {
    /// All runtimes, best first.
    pub const ALL: [Self; 2] = [Self::Crun, Self::Runc];

    /// Its program's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
        }
    }
}

impl fmt::Display for RuntimeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An installed runtime.
#[derive(Debug)]
pub struct Runtime {
    /// Which.
    pub kind: RuntimeKind,
    /// Its program.
    pub path: PathBuf,
    /// What it says its version is.
    pub version: String,
    /// What is executed: a copy in memory that can't be changed. The runtimes
    /// make one for themselves at every start if they are not such a copy
    /// already; that takes as long as the rest of their work.
    program: Sealed,
}

/// A program as a file in memory that can't be changed.
#[derive(Debug)]
pub(super) struct Sealed(OwnedFd);

impl Sealed {
    /// Copies a program.
    pub(super) fn copy(program: &Path) -> Result<Self, EngineError> {
        sealed_copy(program).map(Self).map_err(|failed| {
            let StepFailure {
                step,
                subject,
                errno,
            } = failed.0;
            EngineError::step(step, subject, io::Error::from_raw_os_error(errno))
        })
    }

    /// A path that leads to it while this value lives.
    pub(super) fn path(&self) -> PathBuf {
        let (pid, fd) = (std::process::id(), self.0.as_raw_fd());
        PathBuf::from(format!("/proc/{pid}/fd/{fd}"))
    }
}

/// One call that starts a container and leaves it running.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunCall<'a> {
    /// Where the runtime keeps its state.
    pub(super) state: &'a Path,
    /// Directory of the configuration.
    pub(super) bundle: &'a Path,
    /// Where the runtime writes the number of the first process.
    pub(super) pid_file: &'a Path,
    /// Name of the container.
    pub(super) name: &'a str,
    /// Leave the session keyring alone: keys are few for plain users.
    pub(super) keep_keyring: bool,
    /// Descriptors the guest inherits beyond the standard ones.
    pub(super) inherited: usize,
}

impl Runtime {
    /// Looks for a runtime.
    ///
    /// # Errors
    /// Why it can't be used, in words.
    pub fn find(kind: RuntimeKind) -> Result<Self, String> {
        let path = find_program(kind.as_str()).ok_or("not installed")?;
        let said =
            run(Command::new(&path).arg("--version"), VERSION_LIMIT).map_err(|e| e.to_string())?;
        let program = Sealed::copy(&path).map_err(|e| e.to_string())?;
        Ok(Self {
            kind,
            path,
            version: version(&said),
            program,
        })
    }

    /// A path that leads to its sealed copy while this value lives.
    pub(super) fn program(&self) -> PathBuf {
        self.program.path()
    }

    /// Arguments, program name first, of the call that starts a container.
    pub(super) fn run_arguments(&self, call: &RunCall<'_>) -> Vec<String> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut arguments = vec![
            self.kind.as_str().to_owned(),
            "--root".into(),
            path(call.state),
        ];
        if self.kind == RuntimeKind::Crun {
            // The launcher placed it in the sandbox's groups already.
            arguments.push("--cgroup-manager=disabled".into());
        }
        arguments.extend([
            "run".into(),
            "--detach".into(),
            format!("--preserve-fds={}", call.inherited),
            "--bundle".into(),
            path(call.bundle),
            "--pid-file".into(),
            path(call.pid_file),
        ]);
        if call.keep_keyring {
            arguments.push("--no-new-keyring".into());
        }
        arguments.push(call.name.to_owned());
        arguments
    }

    /// Lets the runtime itself forget a container, for what it keeps beyond
    /// its state directory.
    ///
    /// # Errors
    /// [`EngineError::Program`] when it fails or hangs.
    pub(super) fn delete(
        kind: RuntimeKind,
        state: &Path,
        name: &str,
        limit: Duration,
    ) -> Result<(), EngineError> {
        let Some(program) = find_program(kind.as_str()) else {
            return Err(EngineError::Program {
                program: kind.as_str().into(),
                status: "not installed".into(),
                output: "it was, when the sandbox was started".into(),
            });
        };
        run(
            Command::new(program)
                .arg("--root")
                .arg(state)
                .args(["delete", "--force", name]),
            limit,
        )
        .map(drop)
    }
}

/// The number in `crun version 1.8.1` and the like.
fn version(said: &str) -> String {
    said.lines()
        .next()
        .and_then(|line| line.rsplit(' ').next())
        .unwrap_or("unknown")
        .to_owned()
}

/// What can be done about a runtime's complaint, where we know.
pub(super) fn remedy(complaint: &str) -> Option<&'static str> {
    const KNOWN: [(&str, &str); 3] = [
        (
            "cgroups in hybrid mode",
            "give the controllers of the cgroup2 mount to v1, e.g. `mkdir /sys/fs/cgroup/hugetlb && mount -t cgroup -o hugetlb cgroup /sys/fs/cgroup/hugetlb` (see /sys/fs/cgroup/unified/cgroup.controllers for which), or install runc",
        ),
        (
            "mount `proc` to `proc`",
            "this machine's own /proc has something mounted over it, which forbids a fresh one in a user namespace; run outside of the surrounding container, or ask for an unmasked /proc",
        ),
        (
            "setrlimit",
            "the sandbox's resource limits exceed the caller's: raise them with `ulimit -H`",
        ),
    ];
    KNOWN
        .iter()
        .find(|(words, _)| complaint.contains(words))
        .map(|(_, remedy)| *remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_runtimes_print() {
        assert_eq!(version("crun version 1.8.1\ncommit: f8a0"), "1.8.1");
        assert_eq!(version("runc version 1.1.5+ds1\nspec: 1.0.2"), "1.1.5+ds1");
        assert_eq!(version(""), "unknown");
    }

    #[test]
    fn the_refusal_of_hybrid_groups_is_recognised_and_cured() {
        let said = "cgroups in hybrid mode not supported, drop all controllers from cgroupv2";
        assert!(remedy(said).unwrap().contains("hugetlb"));
        assert_eq!(remedy("exec format error"), None);
    }
}
