//! The one interface behind which sandboxes are made. What all engines share
//! (ids, records, deadlines, leases, snapshots' bookkeeping) is done once, in
//! [`crate::sandboxes`]; an engine only does what differs.

use crate::error::EngineError;
use crate::spec::SandboxSpec;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use skyrl_protocol::{SandboxId, SnapshotId};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// Podman through its REST socket.
    Podman,
    /// crun on root file systems of the image store.
    Oci,
    /// Namespaces made by our own zygote.
    Native,
}

impl EngineKind {
    /// All engines, in order of preference of `auto`.
    pub const ALL: [Self; 3] = [Self::Native, Self::Oci, Self::Podman];

    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Podman => "podman",
            Self::Oci => "oci",
            Self::Native => "native",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for EngineKind {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == name)
            .ok_or_else(|| format!("no engine {name:?}: there are native, oci and podman"))
    }
}

/// What a running sandbox uses. Absent where the machine offers no count.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// CPU time used, in seconds.
    pub cpu_seconds: Option<f64>,
    /// Memory in bytes, page cache included where the cgroup counts it.
    pub memory_bytes: Option<u64>,
    /// Largest memory so far, in bytes.
    pub memory_peak_bytes: Option<u64>,
    /// Processes killed for lack of memory so far.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Bytes written over the image.
    pub disk_bytes: Option<u64>,
}

/// Whether a sandbox lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Liveness {
    /// Its guest's process runs.
    Running,
    /// It is frozen.
    Paused,
    /// Its guest's process ended.
    Ended {
        /// In words: exit code, signal, out of memory.
        cause: String,
    },
}

/// What becomes of the sandbox whose files are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotMode {
    /// It ends; its files become the snapshot without being copied, so the
    /// cost does not depend on their size.
    Consume,
    /// It goes on (frozen while its files are copied).
    Copy,
}

/// Makes and keeps sandboxes for one owner.
///
/// Every method may be slow or hang; callers go through
/// [`crate::Sandboxes`], which sets deadlines and cleans up after failures.
/// No method may leave half a sandbox behind that [`Engine::destroy`] with the
/// same id would not remove; `destroy` of what does not exist succeeds.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Which engine this is.
    fn kind(&self) -> EngineKind;

    /// Makes all a sandbox needs except its processes: image, root file
    /// system, cgroups, directories.
    async fn create(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), EngineError>;

    /// Starts its guest. Returns the host path of the guest's Unix socket,
    /// which accepts connections by then.
    async fn start(&self, id: &SandboxId) -> Result<PathBuf, EngineError>;

    /// Freezes all its processes.
    async fn pause(&self, id: &SandboxId) -> Result<(), EngineError>;

    /// Thaws them.
    async fn resume(&self, id: &SandboxId) -> Result<(), EngineError>;

    /// What it uses.
    async fn stats(&self, id: &SandboxId) -> Result<Stats, EngineError>;

    /// Whether it lives.
    async fn liveness(&self, id: &SandboxId) -> Result<Liveness, EngineError>;

    /// Freezes its files under `snapshot`; the image reference
    /// `snapshot:<id>` then starts sandboxes from them. With
    /// [`SnapshotMode::Consume`] the sandbox is destroyed.
    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError>;

    /// Forgets a snapshot; its files go when the last sandbox using them does.
    async fn remove_snapshot(&self, snapshot: &SnapshotId) -> Result<(), EngineError>;

    /// Kills every process of a sandbox and removes all it left on the
    /// machine.
    async fn destroy(&self, id: &SandboxId) -> Result<(), EngineError>;

    /// Takes over what an earlier process of the same owner left: returns the
    /// living sandboxes with their guests' sockets.
    async fn adopt(&self) -> Result<Vec<(SandboxId, PathBuf)>, EngineError>;

    /// Ends the engine's helpers after its last sandbox is gone.
    async fn shutdown(&self) -> Result<(), EngineError>;
}
