//! Processes as `/proc` shows them: known by number and start time, so that a
//! reused number is never taken for the process that had it before.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// One process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// Clock ticks since boot.
    started: u64,
}

/// What `/proc/<pid>/stat` says.
struct Stat {
    state: u8,
    parent: i32,
    started: u64,
    cpu_ticks: u64,
    resident_pages: u64,
    threads: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, parentheses and spaces included.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        state: *fields.first()?.as_bytes().first()?,
        parent: fields.get(1)?.parse().ok()?,
        cpu_ticks: number(11)? + number(12)?,
        threads: number(17)?,
        started: number(19)?,
        resident_pages: number(21)?,
    })
}

/// What a tree of processes uses, from `/proc`, where no control group counts.
#[derive(Debug, Default, PartialEq)]
pub(super) struct TreeUsage {
    /// Of living processes only.
    pub(super) cpu_seconds: f64,
    /// Resident; shared pages count for each process.
    pub(super) memory_bytes: u64,
    pub(super) threads: u64,
}

impl Process {
    /// The process that has this number now, unless it is a zombie.
    pub(super) fn of(pid: i32) -> Option<Self> {
        let stat = stat(pid).filter(|s| s.state != b'Z' && s.state != b'X')?;
        Some(Self {
            pid,
            started: stat.started,
        })
    }

    /// Whether it runs (or is stopped).
    pub(super) fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    fn is_stopped(self) -> bool {
        stat(self.pid).is_some_and(|s| s.started == self.started && s.state == b'T')
    }

    fn handle(self) -> Option<OwnedFd> {
        let fd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // The descriptor is of whoever had the number when it was opened.
        self.lives().then_some(fd)
    }

    /// Sends a signal; a process that is gone is not an error.
    pub(super) fn signal(self, signal: Signal) -> io::Result<()> {
        match self.handle() {
            Some(fd) => match pidfd_send_signal(&fd, signal) {
                Err(rustix::io::Errno::SRCH) | Ok(()) => Ok(()),
                Err(error) => Err(error.into()),
            },
            None => Ok(()),
        }
    }

    /// Waits until it is gone; false when the time ran out.
    pub(super) async fn gone_within(self, limit: Duration) -> bool {
        let Some(fd) = self.handle() else {
            return true;
        };
        // SAFETY: the descriptor belongs to the registration alone.
        let Ok(fd) = (unsafe { AsyncFd::register(fd) }) else {
            return !self.lives();
        };
        matches!(
            tokio::time::timeout(limit, fd.readable()).await,
            Ok(Ok(_ready))
        ) || !self.lives()
    }

    /// Its arguments.
    fn arguments(self) -> Vec<u8> {
        std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default()
    }

    /// It and everything it (transitively) started that still lives. In a
    /// process-id namespace every orphan falls to the first process, so for a
    /// sandbox's first process this is the whole sandbox.
    pub(super) fn tree(self) -> Vec<Self> {
        let mut children: BTreeMap<i32, Vec<Self>> = BTreeMap::new();
        for process in all() {
            if let Some(stat) = stat(process.pid) {
                children.entry(stat.parent).or_default().push(process);
            }
        }
        let mut found = Vec::new();
        if self.lives() {
            found.push(self);
        }
        let mut next = 0;
        while let Some(process) = found.get(next).copied() {
            next += 1;
            found.extend(children.remove(&process.pid).unwrap_or_default());
        }
        found
    }

    /// What its tree uses.
    pub(super) fn tree_usage(self) -> TreeUsage {
        let ticks = rustix::param::clock_ticks_per_second().max(1) as f64;
        let page = rustix::param::page_size() as u64;
        let mut usage = TreeUsage::default();
        for stat in self.tree().into_iter().filter_map(|p| stat(p.pid)) {
            usage.cpu_seconds += stat.cpu_ticks as f64 / ticks;
            usage.memory_bytes += stat.resident_pages * page;
            usage.threads += stat.threads;
        }
        usage
    }

    /// Stops its tree where no control group can freeze it. Returns those it
    /// stopped, to be continued later; others were stopped already.
    pub(super) fn stop_tree(self) -> Vec<Self> {
        let mut stopped = Vec::new();
        // A process may fork before the signal reaches it: look again until a
        // whole round finds nobody left to stop. Bounded, since a fork bomb
        // may outrun us.
        for _ in 0..64 {
            let mut quiet = true;
            for process in self.tree() {
                if process.is_stopped() || stopped.contains(&process) {
                    continue;
                }
                quiet = false;
                if process.signal(Signal::STOP).is_ok() {
                    stopped.push(process);
                }
            }
            if quiet {
                break;
            }
        }
        stopped
    }
}

/// Every living process.
pub(super) fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(Process::of)
        .collect()
}

/// Names of programs that work for the engine: Podman with its monitor,
/// runtimes and network helpers, what serves roots through FUSE, and the shell
/// that keeps the namespace.
const HELPERS: [&str; 10] = [
    "podman",
    "conmon",
    "crun",
    "runc",
    "slirp4netns",
    "pasta",
    "pasta.avx2",
    "catatonit",
    "fuse-overlayfs",
    "sh",
];

/// Whether a process works for the engine in one of these directories: its
/// helpers all name one in their arguments. Sandboxed processes can make
/// themselves look like this, and then are killed as the only consequence.
pub(super) fn works_for(process: Process, directories: &[&Path]) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
    if !HELPERS.contains(&name.trim()) {
        return false;
    }
    let arguments = process.arguments();
    directories.iter().any(|directory| {
        let mut directory = directory.as_os_str().as_bytes().to_vec();
        directory.push(b'/');
        arguments
            .windows(directory.len())
            .any(|words| words == directory)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_that_ended_is_gone_even_while_it_is_a_zombie() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id() as i32).unwrap();
        assert!(process.lives());
        process.signal(Signal::KILL).unwrap();
        while process.lives() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(process.signal(Signal::KILL).ok(), Some(()));
        child.wait().unwrap();
    }

    #[test]
    fn a_tree_is_stopped_and_continued_as_a_whole() {
        let mut child = Command::new("sh")
            .args(["-c", "sleep 60 & sleep 60 & wait"])
            .spawn()
            .unwrap();
        let process = Process::of(child.id() as i32).unwrap();
        while process.tree().len() < 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let stopped = process.stop_tree();
        assert_eq!(stopped.len(), 3);
        assert!(process.tree_usage().threads == 3);
        for one in &stopped {
            one.signal(Signal::CONT).unwrap();
            one.signal(Signal::KILL).unwrap();
        }
        child.wait().unwrap();
    }
}
