//! Messages between a native engine and its zygote, the single-threaded
//! process that clones sandboxes. One JSON message per packet of a Unix
//! `SOCK_SEQPACKET` connection; file descriptors never travel.

use crate::SandboxId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Longest message in bytes, both ways.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// What an engine asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum Ask {
    /// Clone a sandbox. Answered once its guest was executed or a set-up step
    /// failed.
    Start {
        /// Correlates the answer.
        seq: u64,
        /// What to start.
        plan: Box<StartPlan>,
    },
    /// Kill every process of a sandbox and answer when they are gone.
    Stop {
        /// Correlates the answer.
        seq: u64,
        /// Which.
        id: SandboxId,
    },
    /// Which sandboxes live.
    List {
        /// Correlates the answer.
        seq: u64,
    },
    /// Kill everything and end.
    Shutdown {
        /// Correlates the answer.
        seq: u64,
    },
}

/// What the zygote answers or reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "tell")]
pub enum Tell {
    /// The sandbox runs.
    Started {
        /// Of the question.
        seq: u64,
        /// Its first process, as the host numbers it.
        pid: i32,
    },
    /// A step of setting the sandbox up failed; nothing of it is left running.
    StartFailed {
        /// Of the question.
        seq: u64,
        /// Which step, in words.
        step: String,
        /// Path or value concerned.
        subject: String,
        /// errno.
        errno: i32,
    },
    /// The sandbox's processes are gone.
    Stopped {
        /// Of the question.
        seq: u64,
    },
    /// The living sandboxes.
    Listed {
        /// Of the question.
        seq: u64,
        /// Their ids and first processes.
        sandboxes: Vec<(SandboxId, i32)>,
    },
    /// The zygote ends after this.
    ShuttingDown {
        /// Of the question.
        seq: u64,
    },
    /// A question could not be read or names an unknown sandbox.
    Refused {
        /// Of the question, 0 if it could not be read.
        seq: u64,
        /// Why.
        reason: String,
    },
    /// Unasked: the first process of a sandbox ended.
    Exited {
        /// Which.
        id: SandboxId,
        /// Wait status as `waitpid` gives it.
        status: i32,
    },
}

/// All a zygote needs to start one sandbox. Every path is absolute and was
/// prepared by the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPlan {
    /// Which sandbox.
    pub id: SandboxId,
    /// Host name inside.
    pub hostname: String,
    /// How the root file system is made.
    pub root: RootPlan,
    /// Host paths bound into the sandbox, in order.
    pub binds: Vec<BindPlan>,
    /// The guest program on the host; bound read-only inside.
    pub guest: PathBuf,
    /// Arguments of the guest (without the program name).
    pub guest_args: Vec<String>,
    /// Environment of the guest, `KEY=value`.
    pub env: Vec<String>,
    /// Where the zygote binds the guest's listening socket, on the host.
    pub socket: PathBuf,
    /// Inherited number of the listening descriptor inside the guest.
    pub socket_fd: i32,
    /// Working directory of the guest inside the sandbox; made if missing.
    pub workdir: String,
    /// User of the guest inside the sandbox.
    pub uid: u32,
    /// Group of the guest inside the sandbox.
    pub gid: u32,
    /// Whether the sandbox gets a user namespace of its own.
    pub user_namespace: UserNamespacePlan,
    /// Whether the sandbox has a network namespace of its own.
    pub network: NetworkPlan,
    /// cgroup directories whose `cgroup.procs` the first process enters.
    pub cgroups: Vec<PathBuf>,
    /// Resource limits: (resource number, soft, hard).
    pub rlimits: Vec<(u32, u64, u64)>,
    /// Root is mounted read-only.
    pub read_only_root: bool,
    /// Bytes of `/dev/shm`.
    pub shm_bytes: u64,
}

/// How the root file system is made, inside the sandbox's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum RootPlan {
    /// overlayfs of the kernel.
    Overlay {
        /// Read-only layers, topmost first.
        lowers: Vec<PathBuf>,
        /// Writable layer.
        upper: PathBuf,
        /// Scratch directory on the file system of `upper`.
        work: PathBuf,
        /// Mount point.
        merged: PathBuf,
        /// Store overlay metadata in `user.*` attributes (needed without
        /// privileges).
        user_xattr: bool,
    },
    /// A directory that is already complete: a mounted fuse-overlayfs or a
    /// copied root.
    Directory {
        /// The root.
        path: PathBuf,
    },
}

/// A host path inside the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindPlan {
    /// On the host.
    pub source: PathBuf,
    /// Inside the sandbox; the mount point is made if missing. Never followed
    /// out of the sandbox's root through symbolic links.
    pub target: PathBuf,
    /// Mounted read-only.
    pub read_only: bool,
}

/// User namespace of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum UserNamespacePlan {
    /// None: the zygote is root and the sandbox's ids are the host's.
    Host,
    /// Its own, with one id mapped: the guest's `uid`/`gid` onto the
    /// zygote's.
    OwnSingleId,
}

/// Network of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkPlan {
    /// Own namespace, loopback up.
    Loopback,
    /// The host's.
    Host,
}
