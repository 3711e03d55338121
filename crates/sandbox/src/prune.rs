//! Removes what dead owners left on this machine: processes, mounts, cgroups,
//! helpers, directories, and nothing of anybody else.

use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::image::ImageStore;
use crate::state::{OwnerDir, OwnerLock, StateDir};
use crate::{native, oci, podman, tree};
use skyrl_protocol::OwnerId;

/// Removes every owner whose process is gone. Returns their names.
///
/// # Errors
/// The first thing that could not be removed; what could be is gone, and a
/// later call goes on.
pub async fn dead_owners(state: &StateDir) -> Result<Vec<OwnerId>, EngineError> {
    let owners = state
        .owners()
        .map_err(|e| EngineError::step("listing owners in", state.root().display(), e))?;
    let mut removed = Vec::new();
    let mut outcome = Ok(());
    for owner in owners {
        if state.is_alive(&owner) {
            continue;
        }
        match dead_owner(state, &owner).await {
            Ok(()) => removed.push(owner),
            Err(error) => outcome = outcome.and(Err(error)),
        }
    }
    outcome.map(|()| removed)
}

/// Removes one owner.
///
/// # Errors
/// [`EngineError::State`] when it is alive, else what could not be removed.
pub async fn dead_owner(state: &StateDir, owner: &OwnerId) -> Result<(), EngineError> {
    // Holding its lock keeps a successor of the same name out meanwhile.
    let lock = state.lock_owner(owner)?;
    clear(lock.dir()).await?;
    ImageStore::open(&state.images(), None)?.unmark_owner(owner)?;
    remove(lock).await
}

/// Ends everything engines keep for an owner.
async fn clear(owner: &OwnerDir) -> Result<(), EngineError> {
    let native = owner.clone();
    tokio::task::spawn_blocking(move || native::sweep(&native))
        .await
        .unwrap_or_else(|panic| {
            Err(EngineError::Bug {
                engine: EngineKind::Native,
                reason: panic.to_string(),
            })
        })?;
    oci::sweep(owner).await?;
    podman::sweep(owner).await
}

/// Removes the owner's directory, whatever its sandboxes wrote there.
async fn remove(lock: OwnerLock) -> Result<(), EngineError> {
    let root = lock.dir().root().to_owned();
    let named = root.display().to_string();
    tokio::task::spawn_blocking(move || {
        for part in ["sandboxes", "snapshots", "engine"] {
            tree::remove_tree(&root.join(part)).map_err(std::io::Error::other)?;
        }
        lock.remove()
    })
    .await
    .map_err(std::io::Error::other)
    .and_then(|done| done)
    .map_err(|e| EngineError::step("removing", named, e))
}
