//! What is asked of a living sandbox: pausing it, what it uses, whether it
//! lives, and if not, why.

use super::containers;
use super::lifecycle::Podman;
use super::processes::Process;
use super::record::{Live, Record};
use super::roots::blocking;
use crate::cgroup::{Frozen, victims};
use crate::engine::{Liveness, Stats};
use crate::error::EngineError;
use rustix::process::Signal;
use skyrl_protocol::SandboxId;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long freezing may take.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// How often what a sandbox wrote is measured at most.
const DISK_INTERVAL: Duration = Duration::from_millis(500);
/// Measuring may take one part in so many of the time.
const DISK_SHARE: u32 = 20;

impl Podman {
    pub(super) fn is_paused(&self, live: &Live) -> bool {
        live.has_stopped() || live.record().group.is_frozen()
    }

    fn running(&self, id: &SandboxId, record: &Record) -> Result<Process, EngineError> {
        record
            .first
            .filter(|first| first.lives())
            .ok_or_else(|| EngineError::Ended {
                id: id.clone(),
                cause: "its guest is gone".into(),
            })
    }

    pub(super) async fn pause(&self, id: &SandboxId) -> Result<(), EngineError> {
        let live = self.get(id)?;
        live.settled().await?;
        let record = live.record();
        let first = self.running(id, &record)?;
        if self.is_paused(&live) {
            return Ok(());
        }
        blocking("pausing a sandbox", move || {
            if record.group.can_freeze() {
                return Ok(record.group.set_frozen(Frozen::Yes, FREEZE_LIMIT)?);
            }
            live.set_stopped(first.stop_tree());
            Ok(())
        })
        .await
    }

    pub(super) async fn resume(&self, id: &SandboxId) -> Result<(), EngineError> {
        let live = self.get(id)?;
        let record = live.record();
        self.running(id, &record)?;
        blocking("resuming a sandbox", move || {
            if record.group.is_frozen() {
                record.group.set_frozen(Frozen::No, FREEZE_LIMIT)?;
            }
            for process in live.take_stopped() {
                process
                    .signal(Signal::CONT)
                    .map_err(|e| EngineError::step("continuing", process.pid, e))?;
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn stats(&self, id: &SandboxId) -> Result<Stats, EngineError> {
        let live = self.get(id)?;
        live.settled().await?;
        let record = live.record();
        let disk_bytes = self.roots.size(&record.rootfs).await.ok();
        blocking("reading what a sandbox uses", move || {
            let counted = record.group.usage();
            let tree = record.first.map(Process::tree_usage).unwrap_or_default();
            Ok(Stats {
                cpu_seconds: counted.cpu_seconds.or(Some(tree.cpu_seconds)),
                memory_bytes: counted.memory_bytes.or(Some(tree.memory_bytes)),
                memory_peak_bytes: counted.memory_peak_bytes,
                oom_kills: counted.oom_kills,
                pids: counted.pids.or(Some(tree.threads)),
                disk_bytes,
            })
        })
        .await
    }

    pub(super) async fn liveness(&self, id: &SandboxId) -> Result<Liveness, EngineError> {
        let live = self.get(id)?;
        // How a start went has been told to who started it.
        let _ = live.settled().await;
        // Who is condemned may take a moment to die.
        if live.sentence().is_none() && live.record().first.is_some_and(Process::lives) {
            return Ok(if self.is_paused(&live) {
                Liveness::Paused
            } else {
                Liveness::Running
            });
        }
        Ok(Liveness::Ended {
            cause: self.cause(id, &live).await,
        })
    }

    /// Why a sandbox ended, in words.
    pub(super) async fn cause(&self, id: &SandboxId, live: &Live) -> String {
        if let Some(sentence) = live.sentence() {
            return sentence;
        }
        let record = live.record();
        let mut cause = match containers::inspect(&self.rest, id).await {
            Ok(Some(state)) => state.cause(),
            Ok(None) => "Podman no longer knows it".to_owned(),
            Err(error) => format!("Podman can't tell: {error}"),
        };
        if record.group.usage().oom_kills > 0 {
            let named: Vec<String> = record
                .group
                .memory_directory()
                .map(victims)
                .unwrap_or_default()
                .into_iter()
                .map(|victim| victim.name)
                .collect();
            cause = if named.is_empty() {
                format!("out of memory ({cause})")
            } else {
                format!("out of memory, which killed {} ({cause})", named.join(", "))
            };
        }
        if let Some(log) = containers::log(&self.rest, id).await {
            cause.push_str(&format!("; the guest said: {log}"));
        }
        cause
    }
}

/// Ends a sandbox that writes more than it may. Podman bounds disk space on
/// XFS with project quotas only.
pub(super) fn watch_disk(podman: &Arc<Podman>, id: &SandboxId, live: &Arc<Live>) {
    let podman = Arc::downgrade(podman);
    let live = Arc::downgrade(live);
    let id = id.clone();
    tokio::spawn(async move {
        let mut pause = DISK_INTERVAL;
        loop {
            tokio::time::sleep(pause).await;
            match measure(&podman, &id, &live).await {
                Some(took) => pause = (took * DISK_SHARE).max(DISK_INTERVAL),
                None => return,
            }
        }
    });
}

/// One look; nothing when there is no reason for another.
async fn measure(podman: &Weak<Podman>, id: &SandboxId, live: &Weak<Live>) -> Option<Duration> {
    let (podman, live) = (podman.upgrade()?, live.upgrade()?);
    let record = live.record();
    let limit = record.disk_bytes?;
    let begun = Instant::now();
    match podman.roots.size(&record.rootfs).await {
        Ok(written) if written > limit => {
            live.condemn(format!(
                "it wrote {written} bytes, more than its disk limit of {limit}"
            ));
            // Its processes only: removing it is its owner's to do.
            let first = record.first?;
            if let Err(error) = first.signal(Signal::KILL) {
                tracing::error!(%id, %error, "a sandbox over its disk limit could not be ended");
            }
            None
        }
        Ok(_) => Some(begun.elapsed()),
        // It may be changing under the measurement.
        Err(error) => {
            tracing::debug!(%id, %error, "a sandbox's disk use was not measured");
            record.first.filter(|first| first.lives())?;
            Some(begun.elapsed())
        }
    }
}
