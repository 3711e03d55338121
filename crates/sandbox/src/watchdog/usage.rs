//! What the processes of a sandbox use, read from `/proc`. A sandbox is a PID
//! namespace, so its processes are the descendants of its first one.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// Processes looked at, at most: what is over any sensible limit.
const MAX_PROCESSES: usize = 50_000;

/// A sandbox's processes, held by a descriptor of the first one, so that a
/// reused number is never mistaken for it.
#[derive(Debug)]
pub struct ProcessTree {
    first: i32,
    pidfd: OwnedFd,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number on the host.
    pub pid: i32,
    /// Command name.
    pub name: String,
    /// Threads.
    pub threads: u64,
    /// Resident anonymous memory in bytes.
    pub anonymous: u64,
    /// Resident shared memory in bytes.
    pub shared: u64,
}

impl ProcessTree {
    /// Holds on to the sandbox whose first process this is.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn open(first: i32) -> rustix::io::Result<Self> {
        let pid = Pid::from_raw(first).ok_or(rustix::io::Errno::SRCH)?;
        Ok(Self {
            first,
            pidfd: pidfd_open(pid, PidfdFlags::empty())?,
        })
    }

    /// Whether the first process lives.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(0))
    }

    /// Numbers of all processes, the first one first.
    pub fn pids(&self) -> Vec<i32> {
        let mut found = vec![self.first];
        let mut known = BTreeSet::from([self.first]);
        let mut at = 0;
        while at < found.len() && found.len() < MAX_PROCESSES {
            for child in children(found[at]) {
                if known.insert(child) {
                    found.push(child);
                }
            }
            at += 1;
        }
        if self.is_alive() { found } else { Vec::new() }
    }

    /// All processes with what they use.
    pub fn processes(&self) -> Vec<Process> {
        self.pids().into_iter().filter_map(Process::read).collect()
    }

    /// Bytes in the sandbox's `/dev/shm`.
    pub fn shared_memory_files(&self) -> u64 {
        rustix::fs::statvfs(format!("/proc/{}/root/dev/shm", self.first))
            .map_or(0, |s| (s.f_blocks - s.f_bfree) * s.f_frsize)
    }

    /// CPU seconds of living processes and of those they waited for.
    pub fn cpu_seconds(&self) -> f64 {
        let ticks: u64 = self.pids().into_iter().filter_map(cpu_ticks).sum();
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }

    /// Signals one of its processes; others that took over the number are
    /// left alone.
    pub fn signal(&self, pid: i32, signal: Signal) {
        if pid == self.first {
            let _ = pidfd_send_signal(&self.pidfd, signal);
            return;
        }
        let Some(Ok(held)) = Pid::from_raw(pid).map(|p| pidfd_open(p, PidfdFlags::empty())) else {
            return;
        };
        if namespace(pid).is_some() && namespace(pid) == namespace(self.first) && self.is_alive() {
            let _ = pidfd_send_signal(&held, signal);
        }
    }

    /// Kills one of its processes and waits until its memory is given back.
    pub fn kill_and_wait(&self, pid: i32, limit: Duration) {
        self.signal(pid, Signal::KILL);
        let until = Instant::now() + limit;
        while Process::read(pid).is_some_and(|p| p.anonymous + p.shared > 0)
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Signals all of its processes except the first, again and again until
    /// no new ones appear or `rounds` are over.
    pub fn signal_all_but_first(&self, signal: Signal, rounds: usize) {
        let mut done = BTreeSet::new();
        for _ in 0..rounds {
            let fresh: Vec<i32> = self
                .pids()
                .into_iter()
                .skip(1)
                .filter(|pid| done.insert(*pid))
                .collect();
            if fresh.is_empty() {
                return;
            }
            for pid in fresh {
                self.signal(pid, signal);
            }
        }
    }

    /// Stops all of its processes and waits until they are: a signal takes
    /// effect only when its receiver is scheduled. Whether that came within
    /// the limit.
    pub fn stop(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut pause = Duration::from_micros(200);
        loop {
            // The first one first, so that it starts nothing new meanwhile.
            let going: Vec<i32> = self
                .pids()
                .into_iter()
                .filter(|pid| !is_stopped(*pid))
                .collect();
            if going.is_empty() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            for pid in going {
                self.signal(pid, Signal::STOP);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    /// Lets all of its processes go on.
    pub fn go_on(&self) {
        for pid in self.pids().into_iter().rev() {
            self.signal(pid, Signal::CONT);
        }
    }
}

/// Whether every thread of a process is stopped, or gone.
fn is_stopped(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(')')
            .and_then(|(_, fields)| fields.trim_start().chars().next())
            .is_none_or(|state| matches!(state, 'T' | 't' | 'Z' | 'X'))
    })
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        let kib = |name| {
            field(name)
                .and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok())
                .map_or(0, |kib| kib * 1024)
        };
        Some(Self {
            pid,
            name: field("Name")?.to_owned(),
            threads: field("Threads").and_then(|v| v.parse().ok()).unwrap_or(1),
            anonymous: kib("RssAnon"),
            shared: kib("RssShmem"),
        })
    }

    /// The same with pages shared between processes counted in equal parts;
    /// slow. Falls back to what was read before.
    pub fn proportional(&self) -> u64 {
        let Ok(rollup) = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)) else {
            return self.anonymous + self.shared;
        };
        rollup
            .lines()
            .filter_map(|line| {
                line.strip_prefix("Pss_Anon:")
                    .or_else(|| line.strip_prefix("Pss_Shmem:"))
            })
            .filter_map(|v| v.split_whitespace().next()?.parse::<u64>().ok())
            .map(|kib| kib * 1024)
            .sum()
    }
}

fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<i32>>()
        })
        .collect()
}

/// Identity of a process's PID namespace.
fn namespace(pid: i32) -> Option<(u64, u64)> {
    let meta = fs::metadata(format!("/proc/{pid}/ns/pid")).ok()?;
    Some((meta.dev(), meta.ino()))
}

fn cpu_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    // utime, stime, cutime and cstime are fields 14 to 17.
    Some(
        fields
            .split_whitespace()
            .skip(11)
            .take(4)
            .filter_map(|ticks| ticks.parse::<u64>().ok())
            .sum(),
    )
}
