//! Messages between a native engine and its zygote, the single-threaded
//! process that clones sandboxes. One JSON message per packet of a Unix
//! `SOCK_SEQPACKET` connection; file descriptors never travel.

use crate::SandboxId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Version of these messages. A zygote of another version is ended, not
/// adopted.
pub const VERSION: u32 = 1;

/// Longest message in bytes, both ways.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Name of the zygote's socket in its directory.
pub const SOCKET: &str = "zygote.sock";

/// Name of the file in the zygote's directory that holds its [`Identity`].
pub const IDENTITY: &str = "zygote.json";

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
    /// Kill every process of a sandbox and answer when they are gone; at once
    /// if there is no such sandbox.
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
    /// First message of every connection.
    Hello {
        /// [`VERSION`] of the zygote.
        version: u32,
    },
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
        /// Which step failed, and why.
        failure: StepFailure,
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
    /// Every sandbox is gone and the zygote ends after this.
    ShuttingDown {
        /// Of the question.
        seq: u64,
    },
    /// A question could not be read or contradicts what is.
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
        /// The last of what its guest printed; lossy, at most a few KiB.
        output: String,
    },
}

/// A step that the operating system refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepFailure {
    /// What was attempted, e.g. "mounting".
    pub step: String,
    /// Path or value concerned.
    pub subject: String,
    /// What the system answered; 0 when the reason is all in the words.
    pub errno: i32,
}

/// All a zygote needs to start one sandbox. Every host path is absolute and
/// was prepared by the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPlan {
    /// Which sandbox.
    pub id: SandboxId,
    /// Host name inside.
    pub hostname: String,
    /// How the root file system is made.
    pub root: RootPlan,
    /// Files written into the root before anything runs in it.
    pub files: Vec<FilePlan>,
    /// Host paths bound into the sandbox, in order.
    pub binds: Vec<BindPlan>,
    /// Arguments of the guest, program name first.
    pub argv: Vec<String>,
    /// Environment of the guest, `KEY=value`.
    pub env: Vec<String>,
    /// Where the zygote binds the guest's listening socket, on the host. The
    /// guest inherits it as descriptor 3.
    pub socket: PathBuf,
    /// Host file that counts kills for lack of memory; the guest inherits it
    /// read-only as descriptor 4.
    pub oom_counter: Option<PathBuf>,
    /// Working directory of the guest inside the sandbox; made if missing.
    pub workdir: String,
    /// User of the guest inside the sandbox.
    pub uid: u32,
    /// Group of the guest inside the sandbox.
    pub gid: u32,
    /// Whether the sandbox gets a user namespace of its own.
    pub user_namespace: UserNamespacePlan,
    /// What network the sandbox has.
    pub network: NetworkPlan,
    /// cgroup directories it enters.
    pub cgroups: CgroupPlan,
    /// Resource limits: (resource number, soft, hard).
    pub rlimits: Vec<(u32, u64, u64)>,
    /// Root is mounted read-only, with a writable `/tmp` over it.
    pub read_only_root: bool,
    /// Bytes of `/dev/shm`, and of `/tmp` over a read-only root.
    pub shm_bytes: u64,
}

/// All a zygote needs to run a container runtime (`skyrl-zygote launch FILE`)
/// in surroundings made for one sandbox: its groups, a mount namespace in
/// which its root is mounted, and its guest's listening socket as descriptor
/// 3. Every host path is absolute and was prepared by the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchPlan {
    /// How the root file system is made.
    pub root: RootPlan,
    /// Files written into the root.
    pub files: Vec<FilePlan>,
    /// Host paths bound into the root, in order.
    pub binds: Vec<BindPlan>,
    /// Working directory inside the root; made if missing, for `uid` and
    /// `gid` then.
    pub workdir: String,
    /// User that a new working directory is made for.
    pub uid: u32,
    /// Group that a new working directory is made for.
    pub gid: u32,
    /// With a namespace of its own, the runtime is root in it.
    pub user_namespace: UserNamespacePlan,
    /// cgroup directories the runtime enters.
    pub cgroups: CgroupPlan,
    /// Where the guest's listening socket is bound, on the host.
    pub socket: PathBuf,
    /// Host file that counts kills for lack of memory; inherited as
    /// descriptor 4.
    pub oom_counter: Option<PathBuf>,
    /// The guest's program; inherited as the descriptor after those.
    pub guest: PathBuf,
    /// The runtime's program.
    pub program: PathBuf,
    /// Arguments of the runtime, program name first.
    pub argv: Vec<String>,
    /// Environment of the runtime, `KEY=value`.
    pub env: Vec<String>,
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

/// A file to be written inside the root, replacing what is there, where the
/// image's permissions allow that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePlan {
    /// Absolute path inside; its directory is made if missing.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
}

/// A host path inside the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindPlan {
    /// On the host.
    pub source: PathBuf,
    /// Inside the sandbox; the mount point is made if missing. Never followed
    /// out of the sandbox's root through symbolic links.
    pub target: PathBuf,
    /// Mounted read-only, with all that is mounted below it.
    pub read_only: bool,
}

/// User namespace of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum UserNamespacePlan {
    /// None: the zygote is root and the sandbox's ids are the host's.
    Host,
    /// Its own, with one id mapped: the guest's `uid`/`gid` onto the
    /// zygote's.
    OwnSingleId,
}

/// Network of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum NetworkPlan {
    /// Own namespace, loopback up.
    Loopback,
    /// The host's.
    Host,
    /// Own namespace, connected by a program the zygote runs beside the
    /// sandbox.
    Helper {
        /// Program and arguments. `{pid}` stands for the sandbox's first
        /// process, `{ready}` for a descriptor the program writes to when the
        /// network works.
        argv: Vec<String>,
    },
}

/// Control groups of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPlan {
    /// v1 directories.
    pub v1: Vec<PathBuf>,
    /// v2 directory.
    pub v2: Option<PathBuf>,
    /// v1 `freezer.state`, to be thawed before killing.
    pub v1_freezer: Option<PathBuf>,
}

/// Names a process beyond the reuse of its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process number.
    pub pid: i32,
    /// Start time in clock ticks after boot, field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// Whether something works here, or why not.
pub type Finding = Result<(), String>;

/// What the zygote finds when it tries, by the very calls that start a
/// sandbox. `skyrl-zygote probe DIR` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// Whether it runs as root with the right to mount.
    pub privileged: bool,
    /// The kernel's calls that are needed whatever the user.
    pub kernel: Finding,
    /// A user namespace with one id mapped.
    pub user_namespace: Finding,
    /// PID, mount, IPC, UTS and network namespaces.
    pub namespaces: Finding,
    /// A fresh `/proc`.
    pub proc_mount: Finding,
    /// overlayfs of the kernel on the directory, mounted as root.
    pub overlay: Finding,
    /// overlayfs of the kernel on the directory, mounted in a user namespace.
    pub overlay_in_user_namespace: Finding,
    /// Filtering system calls.
    pub seccomp: Finding,
}
