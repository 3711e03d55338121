//! What is known of one sandbox: what is written down, so that a later process
//! can go on or clean up, and what only this process needs.

use super::layout::Layout;
use super::processes::Process;
use crate::cgroup::Group;
use crate::error::EngineError;
use crate::image::Image;
use crate::rootfs::Rootfs;
use serde::{Deserialize, Serialize};
use skyrl_protocol::SandboxId;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use tokio::task::JoinHandle;

const FILE: &str = "podman.json";

/// A sandbox as written down in its directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) rootfs: Rootfs,
    pub(super) image: Image,
    pub(super) group: Group,
    pub(super) disk_bytes: Option<u64>,
    /// Its guest runs under an id that is not this process's.
    pub(super) foreign_guest: bool,
    /// The guest, once it is started.
    pub(super) first: Option<Process>,
    /// Podman's monitor of it.
    pub(super) monitor: Option<Process>,
}

impl Record {
    /// Written to a temporary name first, so that a reader never sees half of
    /// it. Not synced: after a crash of the machine no sandbox is left.
    pub(super) fn write(&self, layout: &Layout, id: &SandboxId) -> Result<(), EngineError> {
        let path = layout.sandbox(id).join(FILE);
        let temporary = layout.sandbox(id).join(".podman.json.new");
        serde_json::to_vec(self)
            .map_err(std::io::Error::from)
            .and_then(|json| std::fs::write(&temporary, json))
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(|e| EngineError::step("writing", path.display(), e))
    }

    /// Removes the groups a runtime made below the sandbox's, which have no
    /// processes any more.
    pub(super) fn remove_nested_groups(&self) {
        fn descend(directory: &Path) {
            let Ok(entries) = std::fs::read_dir(directory) else {
                return;
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    descend(&entry.path());
                    // If it can't be removed, neither can the one above,
                    // which is where it is told.
                    let _ = std::fs::remove_dir(entry.path());
                }
            }
        }
        for directory in self.group.directories() {
            descend(directory);
        }
    }

    /// What an earlier process wrote; absent when there is nothing readable.
    pub(super) fn read(directory: &Path) -> Option<Self> {
        let json = std::fs::read(directory.join(FILE)).ok()?;
        serde_json::from_slice(&json).ok()
    }
}

/// Directory of the guest's socket.
pub(super) fn control(layout: &Layout, id: &SandboxId) -> PathBuf {
    layout.sandbox(id).join("ctl")
}

/// A sandbox of this process.
pub(super) struct Live {
    record: Mutex<Record>,
    /// What goes on after the guest has answered.
    starting: tokio::sync::Mutex<Option<JoinHandle<Result<(), EngineError>>>>,
    /// Processes stopped one by one where groups can't be frozen.
    stopped: Mutex<Vec<Process>>,
    /// Why the engine ended it.
    sentence: Mutex<Option<String>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

impl Live {
    pub(super) fn new(record: Record) -> Self {
        Self {
            record: Mutex::new(record),
            starting: tokio::sync::Mutex::default(),
            stopped: Mutex::default(),
            sentence: Mutex::default(),
        }
    }

    /// What is written down of it.
    pub(super) fn record(&self) -> Record {
        locked(&self.record).clone()
    }

    /// Notes its processes.
    pub(super) fn found(
        &self,
        layout: &Layout,
        id: &SandboxId,
        first: Option<Process>,
        monitor: Option<Process>,
    ) -> Result<(), EngineError> {
        let record = {
            let mut record = locked(&self.record);
            record.first = first;
            record.monitor = monitor;
            record.clone()
        };
        record.write(layout, id)
    }

    /// Has the rest of a start go on by itself.
    pub(super) async fn go_on(&self, rest: JoinHandle<Result<(), EngineError>>) {
        *self.starting.lock().await = Some(rest);
    }

    /// Waits until the start is over entirely.
    pub(super) async fn settled(&self) -> Result<(), EngineError> {
        let mut starting = self.starting.lock().await;
        let Some(rest) = starting.as_mut() else {
            return Ok(());
        };
        let done = rest.await;
        *starting = None;
        done.unwrap_or_else(|e| {
            Err(EngineError::step(
                "starting",
                "a container",
                std::io::Error::other(e),
            ))
        })
    }

    pub(super) fn set_stopped(&self, processes: Vec<Process>) {
        *locked(&self.stopped) = processes;
    }

    pub(super) fn take_stopped(&self) -> Vec<Process> {
        std::mem::take(&mut *locked(&self.stopped))
    }

    pub(super) fn has_stopped(&self) -> bool {
        !locked(&self.stopped).is_empty()
    }

    pub(super) fn condemn(&self, why: String) {
        locked(&self.sentence).get_or_insert(why);
    }

    pub(super) fn sentence(&self) -> Option<String> {
        locked(&self.sentence).clone()
    }
}
