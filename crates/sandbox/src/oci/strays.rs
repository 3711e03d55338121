//! Processes of an owner that no record names: what a start left that was
//! killed half-way. They are recognised by their arguments, which name the
//! owner's own directories, and are of the caller's user.

use super::record::{NAME_OPTION, guest_name, owner_mark, runtime_state};
use super::runtime::RuntimeKind;
use crate::state::OwnerDir;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use skyrl_protocol::SandboxId;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Whose processes are looked for.
#[derive(Debug)]
pub(super) struct Strays<'a> {
    owner: &'a OwnerDir,
    /// Of one sandbox only.
    only: Option<&'a SandboxId>,
}

impl<'a> Strays<'a> {
    /// All of an owner.
    pub(super) fn of_owner(owner: &'a OwnerDir) -> Self {
        Self { owner, only: None }
    }

    /// Those of one sandbox.
    pub(super) fn of_sandbox(owner: &'a OwnerDir, id: &'a SandboxId) -> Self {
        Self {
            owner,
            only: Some(id),
        }
    }

    /// Kills them until none is found; whether that came to an end within the
    /// limit.
    pub(super) fn kill(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut pause = Duration::from_micros(500);
        loop {
            let found = self.find();
            if found.is_empty() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            for pid in found {
                self.kill_one(pid);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    fn kill_one(&self, pid: i32) {
        let Some(Ok(held)) = Pid::from_raw(pid).map(|p| pidfd_open(p, PidfdFlags::empty())) else {
            return;
        };
        // Looked at again: now the number can't pass to another.
        if self.is_one(pid) {
            let _ = pidfd_send_signal(&held, Signal::KILL);
        }
    }

    fn find(&self) -> Vec<i32> {
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| self.is_one(*pid))
            .collect()
    }

    fn is_one(&self, pid: i32) -> bool {
        let own = rustix::process::geteuid();
        let dir = format!("/proc/{pid}");
        // A sandbox's processes may have other users when we are root.
        let ours = own.is_root() || std::fs::metadata(&dir).is_ok_and(|m| m.uid() == own.as_raw());
        ours && std::fs::read(format!("{dir}/cmdline")).is_ok_and(|line| self.matches(&line))
    }

    /// Judges a command line as `/proc` shows it.
    fn matches(&self, line: &[u8]) -> bool {
        let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
        let [first, second, third, ..] = words[..] else {
            return false;
        };
        let program = Path::new(OsStr::from_bytes(first));
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let below = |word: &[u8]| {
            let path = Path::new(OsStr::from_bytes(word));
            match self.only {
                None => path.starts_with(self.owner.sandboxes()),
                Some(id) => path.starts_with(self.owner.sandbox(id)),
            }
        };
        if first.starts_with(b"/proc/self/fd/") && second == NAME_OPTION.as_bytes() {
            return match self.only {
                None => third.starts_with(format!("{}-", owner_mark(self.owner)).as_bytes()),
                Some(id) => third == guest_name(self.owner, id).as_bytes(),
            };
        }
        if RuntimeKind::ALL.iter().any(|kind| name == kind.as_str()) {
            return second == b"--root"
                && Path::new(OsStr::from_bytes(third)) == runtime_state(self.owner)
                && (self.only.is_none() || words.iter().any(|word| below(word)));
        }
        if name.starts_with("skyrl-zygote") {
            return second == b"launch" && below(third);
        }
        name == "slirp4netns" && words.iter().any(|word| below(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateDir;

    #[test]
    fn only_the_owners_own_processes_are_taken_for_strays() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let owner = state.owner_dir(&"run-1".parse().unwrap());
        let other = state.owner_dir(&"run-2".parse().unwrap());
        let id: SandboxId = "a".parse().unwrap();
        let line = |words: &[&str]| words.join("\0").into_bytes();
        let launch = owner.sandbox(&id).join("launch.json");
        let launch = line(&["/x/skyrl-zygote-00ff", "launch", launch.to_str().unwrap()]);
        let run = runtime_state(&owner);
        let bundle = owner.sandbox(&id).join("bundle");
        let crun = line(&[
            "crun",
            "--root",
            run.to_str().unwrap(),
            "run",
            "--bundle",
            bundle.to_str().unwrap(),
        ]);
        let name = guest_name(&owner, &id);
        let guest = line(&["/proc/self/fd/5", NAME_OPTION, &name, "--listen-fd", "3"]);
        for mine in [&launch, &crun, &guest] {
            assert!(Strays::of_owner(&owner).matches(mine));
            assert!(Strays::of_sandbox(&owner, &id).matches(mine));
            assert!(!Strays::of_owner(&other).matches(mine));
            let another: SandboxId = "aa".parse().unwrap();
            assert!(!Strays::of_sandbox(&owner, &another).matches(mine));
        }
        let shell = line(&[
            "sh",
            "-c",
            launch
                .iter()
                .map(|b| *b as char)
                .collect::<String>()
                .as_str(),
        ]);
        assert!(!Strays::of_owner(&owner).matches(&shell));
        assert!(!Strays::of_owner(&owner).matches(b""));
    }
}
