//! What a caller asks for when it wants a sandbox. Plain values, checked at
//! the edge; engines read them and refuse what they can't honour.

use crate::image::{ImageRef, PullPolicy};
use serde::{Deserialize, Serialize};
use skyrl_protocol::guest::UserGroup;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// A sandbox to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// The image it starts from.
    pub image: ImageRef,
    /// When to ask the registry for it.
    #[serde(default)]
    pub pull: PullPolicy,
    /// Variables over those of the image.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; the image's when absent, made if missing.
    #[serde(default)]
    pub workdir: Option<String>,
    /// Numeric user of the guest and of commands; root when absent (the
    /// image's own `USER` is not consulted: agents need to install things).
    #[serde(default)]
    pub user: Option<UserGroup>,
    /// Host name inside; the sandbox's id when absent.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Bounds on what it may use.
    #[serde(default)]
    pub limits: Limits,
    /// What it can reach.
    #[serde(default)]
    pub network: Network,
    /// Mount the root read-only; `/tmp` and `/dev/shm` stay writable.
    #[serde(default)]
    pub read_only_root: bool,
    /// Host paths made visible inside.
    #[serde(default)]
    pub mounts: Vec<HostMount>,
    /// Free-form marks, returned by listings.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl SandboxSpec {
    /// A sandbox of an image with every setting at its default.
    pub fn new(image: ImageRef) -> Self {
        Self {
            image,
            pull: PullPolicy::default(),
            env: BTreeMap::new(),
            workdir: None,
            user: None,
            hostname: None,
            limits: Limits::default(),
            network: Network::default(),
            read_only_root: false,
            mounts: Vec::new(),
            labels: BTreeMap::new(),
        }
    }
}

/// Bounds on a sandbox; absent means none. An engine that can't hold a bound
/// refuses it with [`crate::EngineError::LimitUnsupported`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// CPU time per wall time: 1.5 is one and a half cores.
    pub cpus: Option<f64>,
    /// Resident memory in bytes. Reaching it kills inside the sandbox and is
    /// reported as out of memory.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u32>,
    /// Bytes written over the image.
    pub disk_bytes: Option<u64>,
    /// Age, counted from its first answer, at which it is destroyed.
    pub lifetime: Option<Duration>,
}

/// What a sandbox can reach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Its own loopback only.
    #[default]
    None,
    /// What the host reaches, on the host's own interfaces and ports.
    Host,
    /// Outgoing connections through user-mode translation (slirp4netns or
    /// pasta).
    Nat,
}

/// A host path made visible inside a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMount {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path inside.
    pub target: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
}
