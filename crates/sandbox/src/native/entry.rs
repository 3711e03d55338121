//! What the engine knows about one of its sandboxes while it runs.

use super::record::Record;
use crate::cgroup::{Usage, Victim, victims};
use crate::engine::{Liveness, Stats};
use crate::error::EngineError;
use crate::watchdog::{Overrun, ProcessTree};
use skyrl_protocol::SandboxId;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One sandbox.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: SandboxId,
    /// Held during verbs that must not overlap.
    pub(super) verb: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    record: Record,
    /// Its processes, once started.
    processes: Option<Arc<ProcessTree>>,
    /// Stopped by signals, where there is no freezer.
    stopped: bool,
    /// How it ended, as far as its end was noticed.
    ended: Option<String>,
    /// What the watchdog did to it.
    overruns: Vec<Overrun>,
    memory_peak: u64,
}

/// Overruns remembered of one sandbox.
const MAX_OVERRUNS: usize = 64;

impl Entry {
    pub(super) fn new(id: SandboxId, record: Record) -> Self {
        Self {
            id,
            verb: tokio::sync::Mutex::new(()),
            state: Mutex::new(State {
                record,
                processes: None,
                stopped: false,
                ended: None,
                overruns: Vec::new(),
                memory_peak: 0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn record(&self) -> Record {
        self.state().record.clone()
    }

    /// Notes what is known once its files are there.
    pub(super) fn prepared(&self, record: Record) {
        self.state().record = record;
    }

    /// Forgets an earlier run.
    pub(super) fn starting(&self) {
        let mut state = self.state();
        state.processes = None;
        state.stopped = false;
        state.ended = None;
        state.overruns.clear();
    }

    /// Notes its processes; returns the record to be written down.
    pub(super) fn started(&self, processes: Arc<ProcessTree>, pid: i32) -> Record {
        let mut state = self.state();
        state.record.process = skyrl_zygote::process::identity(pid);
        state.processes = Some(processes);
        state.record.clone()
    }

    pub(super) fn processes(&self) -> Option<Arc<ProcessTree>> {
        self.state().processes.clone()
    }

    /// Its processes, which it must have.
    pub(super) fn running(&self) -> Result<Arc<ProcessTree>, EngineError> {
        match (self.liveness(), self.processes()) {
            (Liveness::Ended { cause }, _) => Err(EngineError::Ended {
                id: self.id.clone(),
                cause,
            }),
            (_, Some(processes)) => Ok(processes),
            (_, None) => Err(EngineError::Ended {
                id: self.id.clone(),
                cause: "it was not started".into(),
            }),
        }
    }

    pub(super) fn set_stopped(&self, stopped: bool) {
        self.state().stopped = stopped;
    }

    /// The watchdog reports.
    pub(super) fn overrun(&self, overrun: Overrun) {
        let mut state = self.state();
        if let Overrun::Disk { bytes } = overrun {
            let limit = state.record.spec.limits.disk_bytes.unwrap_or(0);
            state.ended = Some(format!(
                "over its disk limit: {bytes} bytes written, {limit} allowed"
            ));
        }
        if state.overruns.len() < MAX_OVERRUNS {
            state.overruns.push(overrun);
        }
    }

    /// Its first process ended, the zygote says.
    pub(super) fn exited(&self, status: i32, output: &str) {
        let usage = self.state().record.group.usage();
        let mut state = self.state();
        if state.ended.is_none() {
            let status = ExitStatus::from_raw(status);
            let mut cause = match state.memory_cause(&usage) {
                Some(memory) if status.signal() == Some(libc::SIGKILL) => memory,
                _ => format!("its guest ended: {status}"),
            };
            if !output.is_empty() {
                cause.push_str(": ");
                cause.push_str(output);
            }
            state.ended = Some(cause);
        }
    }

    pub(super) fn liveness(&self) -> Liveness {
        let state = self.state();
        let alive = state.processes.as_ref().map(|p| p.is_alive());
        if alive != Some(true) {
            let cause = state.ended.clone().unwrap_or_else(|| match alive {
                None => "it was not started".into(),
                Some(_) => "it was killed".into(),
            });
            return Liveness::Ended { cause };
        }
        if state.stopped || state.record.group.is_frozen() {
            Liveness::Paused
        } else {
            Liveness::Running
        }
    }

    /// What it uses. Reads many files.
    pub(super) fn stats(&self) -> Result<Stats, EngineError> {
        let (record, processes, watched_kills) = {
            let state = self.state();
            let kills = state.watched_kills();
            (state.record.clone(), state.processes.clone(), kills)
        };
        let usage = record.group.usage();
        let mut stats = Stats {
            cpu_seconds: usage.cpu_seconds,
            memory_bytes: usage.memory_bytes,
            memory_peak_bytes: usage.memory_peak_bytes,
            oom_kills: usage.oom_kills + watched_kills,
            pids: usage.pids,
            disk_bytes: Some(record.rootfs.size()?.saturating_sub(record.disk_baseline)),
        };
        if let Some(tree) = processes {
            if stats.cpu_seconds.is_none() {
                stats.cpu_seconds = Some(tree.cpu_seconds());
            }
            if stats.memory_bytes.is_none() || stats.pids.is_none() {
                self.fill_from_processes(&mut stats, &tree);
            }
        }
        Ok(stats)
    }

    fn fill_from_processes(&self, stats: &mut Stats, tree: &ProcessTree) {
        let all = tree.processes();
        if stats.memory_bytes.is_none() {
            let bytes = all.iter().map(|p| p.anonymous + p.shared).sum();
            let mut state = self.state();
            state.memory_peak = state.memory_peak.max(bytes);
            stats.memory_bytes = Some(bytes);
            stats.memory_peak_bytes = Some(state.memory_peak);
        }
        stats
            .pids
            .get_or_insert_with(|| all.iter().map(|p| p.threads).sum());
    }
}

impl State {
    fn watched_kills(&self) -> u64 {
        self.overruns
            .iter()
            .filter(|overrun| matches!(overrun, Overrun::Memory { .. }))
            .count() as u64
    }

    /// In words, if memory ran out.
    fn memory_cause(&self, usage: &Usage) -> Option<String> {
        let watched = self
            .overruns
            .iter()
            .rev()
            .find_map(|overrun| match overrun {
                Overrun::Memory { victim, .. } => Some(victim.clone()),
                Overrun::Pids { .. } | Overrun::Disk { .. } => None,
            });
        if usage.oom_kills == 0 && watched.is_none() {
            return None;
        }
        let victim = watched.or_else(|| {
            let dir = self.record.group.memory_directory()?;
            victims(dir).pop()
        });
        let limit = self.record.spec.limits.memory_bytes;
        let limit = limit.map_or(String::new(), |bytes| {
            format!(" at its limit of {bytes} bytes")
        });
        Some(match victim {
            Some(Victim { name, pid }) => {
                format!("out of memory{limit}: {name} (process {pid}) was killed")
            }
            None => format!("out of memory{limit}"),
        })
    }
}
