//! Where one owner's Podman keeps its things. Everything is below the owner's
//! directory, so that no other job's Podman is ever touched and removing the
//! directory removes it all.
//!
//! ```text
//! <owner>/engine/podman/
//!   conf/           configuration written by us, and the monitor's wrapper
//!   home/           stands in for $HOME: nothing is read from or written to NFS
//!   meta/           Podman's databases, on a tmpfs of the engine's own mount
//!                   namespace: they are synced at every step, and on a disk
//!                   that costs more than making the container
//!   tmp/            Podman's run state that must be seen from outside
//!   holder.json     the process that keeps the mount namespace (as root)
//!   cgroups.json    where sandboxes' control groups are
//!   <n>.sock        the service's socket
//! ```

use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::state::{OwnerDir, make_dir};
use sha2::{Digest, Sha256};
use skyrl_protocol::SandboxId;
use std::path::{Path, PathBuf};

/// Paths of one owner's Podman.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    engine: PathBuf,
    sandboxes: PathBuf,
    snapshots: PathBuf,
    key: String,
}

impl Layout {
    pub(super) fn new(owner: &OwnerDir) -> Self {
        let engine = owner.engine(EngineKind::Podman);
        let digest = Sha256::digest(engine.as_os_str().as_encoded_bytes());
        Self {
            sandboxes: owner.sandboxes(),
            snapshots: owner.root().join("snapshots"),
            key: digest[..6].iter().map(|b| format!("{b:02x}")).collect(),
            engine,
        }
    }

    /// Makes the directories.
    pub(super) fn make(&self) -> Result<(), EngineError> {
        for dir in [
            self.conf(),
            self.home().join(".config/containers"),
            self.runtime_dir(),
            self.tmp(),
        ] {
            make_dir(&dir)?;
        }
        Ok(())
    }

    /// The directory itself.
    pub(super) fn engine(&self) -> &Path {
        &self.engine
    }

    /// Names the owner in control groups: differs between state directories.
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn conf(&self) -> PathBuf {
        self.engine.join("conf")
    }

    /// Stands in for the user's home.
    pub(super) fn home(&self) -> PathBuf {
        self.engine.join("home")
    }

    /// Podman's storage. Sandboxes' files are not in it.
    pub(super) fn graph_root(&self) -> PathBuf {
        self.meta().join("storage")
    }

    /// Mount point of the databases' tmpfs.
    pub(super) fn meta(&self) -> PathBuf {
        self.engine.join("meta")
    }

    /// Stands in for `$XDG_RUNTIME_DIR`. It exists twice: on disk for Podman's
    /// first steps as a plain user, and on the tmpfs once it has entered its
    /// namespace.
    pub(super) fn runtime_dir(&self) -> PathBuf {
        self.meta().join("run")
    }

    pub(super) fn tmp(&self) -> PathBuf {
        self.engine.join("tmp")
    }

    pub(super) fn holder(&self) -> PathBuf {
        self.engine.join("holder.json")
    }

    pub(super) fn cgroups(&self) -> PathBuf {
        self.engine.join("cgroups.json")
    }

    /// What belongs to one sandbox.
    pub(super) fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes.join(id.as_str())
    }

    /// Frozen files.
    pub(super) fn snapshots(&self) -> &Path {
        &self.snapshots
    }

    /// Parent of all of those.
    pub(super) fn sandboxes(&self) -> &Path {
        &self.sandboxes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateDir;

    #[test]
    fn the_same_owner_name_in_two_state_directories_has_two_keys() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = |dir: &Path| {
            let state = StateDir::open(dir).unwrap();
            Layout::new(&state.owner_dir(&"x".parse().unwrap())).key
        };
        assert_ne!(key(a.path()), key(b.path()));
        assert_eq!(key(a.path()), key(a.path()));
    }
}
