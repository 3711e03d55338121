//! What is written down about each sandbox and about the owner, so that a
//! later process can take over or remove everything. Written before the thing
//! it names is made.

use super::runtime::RuntimeKind;
use crate::cgroup::Group;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::image::Image;
use crate::native::record::{read_json, write_json};
use crate::rootfs::Rootfs;
use crate::spec::SandboxSpec;
use crate::state::OwnerDir;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use skyrl_protocol::SandboxId;
use skyrl_protocol::zygote::Identity;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Name of the record in a sandbox's directory.
const NAME: &str = "oci.json";

/// One sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) spec: SandboxSpec,
    pub(super) image: Image,
    pub(super) runtime: RuntimeKind,
    pub(super) rootfs: Rootfs,
    pub(super) group: Group,
    /// Bytes that were in the written directory before the sandbox ran.
    pub(super) disk_baseline: u64,
    /// Its first process, once started.
    pub(super) init: Option<Identity>,
    /// The program that translates its network, if it has one.
    pub(super) helper: Option<Identity>,
}

/// The owner.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct OwnerRecord {
    /// Groups below which the sandboxes' groups are made, those of runtimes
    /// that make their own included.
    pub(super) group_parents: Vec<PathBuf>,
}

impl Record {
    pub(super) fn write(&self, place: &Place<'_>) -> Result<(), EngineError> {
        write_json(&place.dir().join(NAME), self)
    }

    /// Reads it; absent if the sandbox is not this engine's.
    pub(super) fn read(place: &Place<'_>) -> Option<Self> {
        read_json(&place.dir().join(NAME))
    }
}

impl OwnerRecord {
    fn path(owner: &OwnerDir) -> PathBuf {
        owner.engine(EngineKind::Oci).join("owner.json")
    }

    pub(super) fn write(&self, owner: &OwnerDir) -> Result<(), EngineError> {
        write_json(&Self::path(owner), self)
    }

    pub(super) fn read(owner: &OwnerDir) -> Option<Self> {
        read_json(&Self::path(owner))
    }
}

/// Where the things of one sandbox are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) owner: &'a OwnerDir,
    pub(super) id: &'a SandboxId,
}

impl Place<'_> {
    pub(super) fn dir(&self) -> PathBuf {
        self.owner.sandbox(self.id)
    }

    /// The guest's socket.
    pub(super) fn socket(&self) -> PathBuf {
        self.dir().join("guest.sock")
    }

    /// The runtime's bundle: its configuration is in it.
    pub(super) fn bundle(&self) -> PathBuf {
        self.dir().join("bundle")
    }

    /// What the launcher is to do.
    pub(super) fn launch_plan(&self) -> PathBuf {
        self.dir().join("launch.json")
    }

    /// Where the runtime writes the number of the first process.
    pub(super) fn pid_file(&self) -> PathBuf {
        self.dir().join("pid")
    }

    /// A link to the sandbox's network namespace, by which the program that
    /// translates it can be recognised.
    pub(super) fn network(&self) -> PathBuf {
        self.dir().join("network")
    }
}

/// Where the runtime keeps its state for an owner.
pub(super) fn runtime_state(owner: &OwnerDir) -> PathBuf {
    owner.engine(EngineKind::Oci).join("run")
}

/// What the guests of an owner are recognised by in the process table, and
/// nobody else's.
pub(super) fn owner_mark(owner: &OwnerDir) -> String {
    let digest = Sha256::digest(owner.root().as_os_str().as_bytes());
    digest[..8].iter().map(|b| format!("{b:02x}")).collect()
}

/// The guest's option that names it in the process table.
pub(super) const NAME_OPTION: &str = "--name";

/// Name of a sandbox's guest in the process table.
pub(super) fn guest_name(owner: &OwnerDir, id: &SandboxId) -> String {
    format!("{}-{id}", owner_mark(owner))
}

/// Ids of the owner's directories that hold a record of this engine.
pub(super) fn recorded(owner: &OwnerDir) -> Vec<SandboxId> {
    let Ok(entries) = std::fs::read_dir(owner.sandboxes()) else {
        return Vec::new();
    };
    let mut ids: Vec<SandboxId> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|id| owner.sandbox(id).join(NAME).exists())
        .collect();
    ids.sort();
    ids
}
