//! Holds limits by looking, where the kernel offers no group to hold them:
//! memory and processes without cgroups, and what a sandbox writes on the
//! disk.
//!
//! One thread looks at every watched sandbox, more often the closer it is to
//! a limit. It is less exact than the kernel: between two looks a limit can
//! be overrun. It decides here and tells its owner, which keeps the books.

mod usage;

pub use usage::{Process, ProcessTree};

use crate::cgroup::Victim;
use crate::tree::tree_size;
use rustix::process::Signal;
use skyrl_protocol::SandboxId;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between looks at a sandbox far from its limits.
const CALM: Duration = Duration::from_millis(250);

/// Between looks at a sandbox over half of its memory.
const ALERT: Duration = Duration::from_millis(50);

/// Between looks at a sandbox over four fifths of its memory.
const ALARM: Duration = Duration::from_millis(15);

/// Between measurements of what is on the disk, at least.
const DISK_CALM: Duration = Duration::from_secs(1);

/// Longest trust in the free space of the file system as a sign that little
/// was written.
const DISK_TRUST: Duration = Duration::from_secs(15);

/// Measuring may take this part of the time.
const DISK_SHARE: u32 = 10;

/// How long a killed process may take to give its memory back before the next
/// look.
const DEATH: Duration = Duration::from_millis(500);

/// Limits held by looking. Absent ones are not looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WatchLimits {
    /// Resident memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u32>,
    /// Bytes on the disk.
    pub disk_bytes: Option<u64>,
}

impl WatchLimits {
    /// Whether there is anything to look at.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A sandbox to be watched.
#[derive(Debug)]
pub struct Subject {
    /// Which.
    pub id: SandboxId,
    /// Its processes.
    pub processes: ProcessTree,
    /// What is held.
    pub limits: WatchLimits,
    /// Where its writes end up.
    pub written: PathBuf,
    /// Bytes that were there before it ran.
    pub disk_baseline: u64,
}

/// What the watchdog did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overrun {
    /// It used too much memory; its largest process was killed.
    Memory {
        /// What it used.
        bytes: u64,
        /// Who was killed.
        victim: Victim,
    },
    /// It had too many processes; all but its guest were killed.
    Pids {
        /// How many.
        count: u64,
    },
    /// It wrote too much; it was ended.
    Disk {
        /// How much.
        bytes: u64,
    },
}

/// Watches sandboxes until dropped.
#[derive(Debug)]
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    watched: BTreeMap<SandboxId, Arc<Watched>>,
    ending: bool,
}

#[derive(Debug)]
struct Watched {
    subject: Subject,
    clock: Mutex<Clock>,
}

#[derive(Debug)]
struct Clock {
    due: Instant,
    disk_due: Instant,
    disk_measured: Option<DiskMeasure>,
}

#[derive(Debug, Clone, Copy)]
struct DiskMeasure {
    at: Instant,
    used: u64,
    free_then: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watchdog {
    /// Starts watching; `report` hears of every overrun on the watchdog's own
    /// thread.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(report: impl Fn(&SandboxId, Overrun) + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("skyrl-watchdog".into())
            .spawn(move || own.run(&report))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Watches a sandbox from now on.
    pub fn watch(&self, subject: Subject) {
        let now = Instant::now();
        let watched = Watched {
            clock: Mutex::new(Clock {
                due: now,
                disk_due: now,
                disk_measured: None,
            }),
            subject,
        };
        let id = watched.subject.id.clone();
        self.shared.state().watched.insert(id, Arc::new(watched));
        self.shared.changed.notify_one();
    }

    /// Stops watching one.
    pub fn forget(&self, id: &SandboxId) {
        self.shared.state().watched.remove(id);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.state().ending = true;
        self.shared.changed.notify_one();
        // A measurement may be under way; it is bounded, but not ours to wait
        // for.
        drop(self.thread.take());
    }
}

impl Shared {
    fn run(&self, report: &dyn Fn(&SandboxId, Overrun)) {
        while let Some(watched) = self.next() {
            if !watched.subject.processes.is_alive() {
                self.state().watched.remove(&watched.subject.id);
                continue;
            }
            for overrun in watched.look() {
                report(&watched.subject.id, overrun);
            }
        }
    }

    /// The sandbox to look at next, when it is time to; nothing at the end.
    fn next(&self) -> Option<Arc<Watched>> {
        let mut state = self.state();
        loop {
            if state.ending {
                return None;
            }
            let next = state
                .watched
                .values()
                .min_by_key(|watched| watched.due())
                .cloned();
            let now = Instant::now();
            state = match next {
                Some(watched) if watched.due() <= now => return Some(watched),
                Some(watched) => {
                    let wait = watched.due() - now;
                    let woken = self.changed.wait_timeout(state, wait);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Watched {
    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn due(&self) -> Instant {
        self.clock().due
    }

    /// Looks, acts, and sets when to look again.
    fn look(&self) -> Vec<Overrun> {
        let limits = &self.subject.limits;
        let mut overruns = Vec::new();
        let mut pause = CALM;
        if limits.memory_bytes.is_some() || limits.pids.is_some() {
            let processes = self.subject.processes.processes();
            if let Some(limit) = limits.memory_bytes {
                let (overrun, next) = self.look_at_memory(&processes, limit);
                overruns.extend(overrun);
                pause = next;
            }
            if let Some(limit) = limits.pids {
                overruns.extend(self.look_at_pids(&processes, limit));
            }
        }
        if let Some(limit) = limits.disk_bytes {
            overruns.extend(self.look_at_disk(limit));
        }
        self.clock().due = Instant::now() + pause;
        overruns
    }

    fn look_at_memory(&self, processes: &[Process], limit: u64) -> (Option<Overrun>, Duration) {
        let files = self.subject.processes.shared_memory_files();
        let quick = memory(processes, files);
        if quick <= limit {
            return (None, pause_at(quick, limit));
        }
        // Forked processes share pages that were counted for each of them.
        let exact: Vec<(u64, &Process)> = processes.iter().map(|p| (p.proportional(), p)).collect();
        let bytes = exact.iter().map(|(bytes, _)| bytes).sum::<u64>().max(files);
        if bytes <= limit {
            return (None, ALERT);
        }
        let Some(victim) = largest(&exact, self.subject_first(processes)) else {
            return (None, ALARM);
        };
        self.subject.processes.kill_and_wait(victim.pid, DEATH);
        let victim = Victim {
            name: victim.name.clone(),
            pid: victim.pid,
        };
        (Some(Overrun::Memory { bytes, victim }), ALARM)
    }

    fn subject_first(&self, processes: &[Process]) -> i32 {
        processes.first().map_or(0, |p| p.pid)
    }

    fn look_at_pids(&self, processes: &[Process], limit: u32) -> Option<Overrun> {
        let count: u64 = processes.iter().map(|p| p.threads).sum();
        if count <= limit.into() {
            return None;
        }
        let tree = &self.subject.processes;
        // Stopped first: what is stopped does not fork while the others die.
        tree.signal_all_but_first(Signal::STOP, 64);
        tree.signal_all_but_first(Signal::KILL, 64);
        Some(Overrun::Pids { count })
    }

    fn look_at_disk(&self, limit: u64) -> Option<Overrun> {
        let now = Instant::now();
        let free = free_bytes(&self.subject.written);
        {
            let clock = self.clock();
            if now < clock.disk_due || clock.spared(now, free, limit) {
                return None;
            }
        }
        let used = tree_size(&self.subject.written)
            .map_or(0, |size| size.bytes)
            .saturating_sub(self.subject.disk_baseline);
        let took = now.elapsed();
        let mut clock = self.clock();
        clock.disk_due = Instant::now() + DISK_CALM.max(took * DISK_SHARE);
        clock.disk_measured = Some(DiskMeasure {
            at: now,
            used,
            free_then: free,
        });
        drop(clock);
        if used <= limit {
            return None;
        }
        let first = self.subject.processes.pids();
        if let Some(first) = first.first() {
            self.subject.processes.signal(*first, Signal::KILL);
        }
        Some(Overrun::Disk { bytes: used })
    }
}

impl Clock {
    /// Whether the file system's free space proves that the limit can't have
    /// been reached since the last measurement.
    fn spared(&self, now: Instant, free: u64, limit: u64) -> bool {
        self.disk_measured.is_some_and(|last| {
            now.duration_since(last.at) < DISK_TRUST
                && last.used + last.free_then.saturating_sub(free) <= limit
        })
    }
}

fn free_bytes(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |s| s.f_bfree * s.f_frsize)
}

/// Memory of processes, counting shared pages once for each, and files in
/// memory that no process may have mapped.
fn memory(processes: &[Process], files: u64) -> u64 {
    let anonymous: u64 = processes.iter().map(|p| p.anonymous).sum();
    let shared: u64 = processes.iter().map(|p| p.shared).sum();
    anonymous + shared.max(files)
}

/// The process to kill: the largest, the guest only when it is alone.
fn largest<'a>(processes: &[(u64, &'a Process)], first: i32) -> Option<&'a Process> {
    processes
        .iter()
        .filter(|(_, p)| p.pid != first)
        .max_by_key(|(bytes, _)| *bytes)
        .or_else(|| processes.first())
        .map(|(_, process)| *process)
}

fn pause_at(used: u64, limit: u64) -> Duration {
    match used.saturating_mul(10) / limit.max(1) {
        0..5 => CALM,
        5..8 => ALERT,
        _ => ALARM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, anonymous: u64, shared: u64) -> Process {
        Process {
            pid,
            name: format!("p{pid}"),
            threads: 1,
            anonymous,
            shared,
        }
    }

    #[test]
    fn files_in_memory_count_even_if_nobody_maps_them() {
        let processes = [process(1, 10, 5), process(2, 20, 0)];
        assert_eq!(memory(&processes, 0), 35);
        assert_eq!(memory(&processes, 100), 130);
    }

    #[test]
    fn the_largest_process_dies_and_the_guest_only_when_it_is_alone() {
        let (guest, small, big) = (process(1, 0, 0), process(2, 0, 0), process(3, 0, 0));
        let all = [(900, &guest), (10, &small), (20, &big)];
        assert_eq!(largest(&all, 1).unwrap().pid, 3);
        assert_eq!(largest(&all[..1], 1).unwrap().pid, 1);
    }

    #[test]
    fn looks_get_more_frequent_towards_the_limit() {
        assert_eq!(pause_at(10, 100), CALM);
        assert_eq!(pause_at(60, 100), ALERT);
        assert_eq!(pause_at(99, 100), ALARM);
    }

    #[test]
    fn free_space_that_hardly_shrank_spares_the_measurement_for_a_while() {
        let at = Instant::now();
        let clock = Clock {
            due: at,
            disk_due: at,
            disk_measured: Some(DiskMeasure {
                at,
                used: 10,
                free_then: 1000,
            }),
        };
        assert!(clock.spared(at, 950, 100));
        assert!(!clock.spared(at, 900, 100));
        assert!(!clock.spared(at + DISK_TRUST, 1000, 100));
    }

    #[test]
    fn a_process_that_takes_too_much_memory_is_killed_and_named() {
        let mut child = std::process::Command::new("tail")
            .arg("/dev/zero")
            .spawn()
            .unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let dog = Watchdog::start(move |id, overrun| {
            let _ = tell.send((id.clone(), overrun));
        })
        .unwrap();
        let id: SandboxId = "big".parse().unwrap();
        dog.watch(Subject {
            id: id.clone(),
            processes: ProcessTree::open(child.id() as i32).unwrap(),
            limits: WatchLimits {
                memory_bytes: Some(32 << 20),
                ..WatchLimits::default()
            },
            written: "/".into(),
            disk_baseline: 0,
        });
        let (who, overrun) = told.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(who, id);
        let Overrun::Memory { bytes, victim } = overrun else {
            panic!("{overrun:?}");
        };
        assert!(bytes > 32 << 20);
        assert_eq!(victim.name, "tail");
        child.wait().unwrap();
    }
}
