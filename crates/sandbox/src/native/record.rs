//! What is written down about each sandbox, so that a later process can take
//! it over or remove it.

use crate::cgroup::Group;
use crate::error::EngineError;
use crate::image::Image;
use crate::rootfs::Rootfs;
use crate::spec::SandboxSpec;
use crate::state::OwnerDir;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use skyrl_protocol::SandboxId;
use skyrl_protocol::zygote::Identity;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Name of the record in a sandbox's directory.
const NAME: &str = "native.json";

/// Name of a record that is being written.
pub(super) const UNFINISHED: &str = "native.new";

/// One sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) spec: SandboxSpec,
    pub(crate) image: Image,
    pub(crate) rootfs: Rootfs,
    pub(crate) group: Group,
    /// Bytes that were in the written directory before the sandbox ran.
    pub(crate) disk_baseline: u64,
    /// Its first process, once started.
    pub(crate) process: Option<Identity>,
}

impl Record {
    /// Writes it down; complete or not at all.
    pub(crate) fn write(&self, owner: &OwnerDir, id: &SandboxId) -> Result<(), EngineError> {
        write_json(&owner.sandbox(id).join(NAME), self)
    }

    /// Reads it; absent if the sandbox is not this engine's.
    pub(crate) fn read(owner: &OwnerDir, id: &SandboxId) -> Option<Self> {
        read_json(&owner.sandbox(id).join(NAME))
    }
}

/// Where the guest's socket is.
pub(crate) fn socket(owner: &OwnerDir, id: &SandboxId) -> PathBuf {
    owner.sandbox(id).join("guest.sock")
}

/// Ids of the owner's directories that hold a record of this engine.
pub(crate) fn recorded(owner: &OwnerDir) -> Vec<SandboxId> {
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

/// Distinguishes owners of the same name in different state directories.
pub(crate) fn cgroup_key(owner: &OwnerDir) -> String {
    let digest = Sha256::digest(owner.root().as_os_str().as_bytes());
    let short: String = digest[..4].iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{short}", owner.owner())
}

/// Writes a file that is complete or absent. Without syncing: after a crash of
/// the machine nothing is left that it could describe.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), EngineError> {
    let fail = |e: io::Error| EngineError::step("writing", path.display(), e);
    let text = serde_json::to_vec(value).map_err(|e| fail(e.into()))?;
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, text)
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(fail)
}

/// Reads such a file; what can't be understood counts as absent.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
