//! What is written down about a sandbox, for listings by other processes and
//! for a successor of the owner.

use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::spec::SandboxSpec;
use crate::state::{OwnerDir, make_dir};
use serde::{Deserialize, Serialize};
use skyrl_protocol::SandboxId;
use std::path::PathBuf;
use std::time::SystemTime;

const FILE: &str = "sandbox.json";

/// One sandbox as written down in its directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Which.
    pub id: SandboxId,
    /// What made it.
    pub engine: EngineKind,
    /// From what.
    pub spec: SandboxSpec,
    /// When it was asked for.
    pub created: SystemTime,
    /// When its guest answered first; absent until then.
    pub ready: Option<SystemTime>,
    /// Where its guest listens; absent until it has answered once.
    pub socket: Option<PathBuf>,
}

impl SandboxRecord {
    pub(super) fn new(id: &SandboxId, engine: EngineKind, spec: &SandboxSpec) -> Self {
        Self {
            id: id.clone(),
            engine,
            spec: spec.clone(),
            created: SystemTime::now(),
            ready: None,
            socket: None,
        }
    }

    /// Written to a temporary name first, so that a reader never sees half of
    /// it. Not synced: after a crash of the machine no sandbox is left.
    pub(super) fn write(&self, owner: &OwnerDir) -> Result<(), EngineError> {
        let dir = owner.sandbox(&self.id);
        make_dir(&dir)?;
        let path = dir.join(FILE);
        let temporary = dir.join(".sandbox.json.new");
        serde_json::to_vec(self)
            .map_err(std::io::Error::from)
            .and_then(|json| std::fs::write(&temporary, json))
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(|e| EngineError::step("writing", path.display(), e))
    }

    /// Every sandbox directory of an owner with its record, where it has a
    /// readable one.
    ///
    /// # Errors
    /// When the owner's directory can't be read.
    pub fn read_all(owner: &OwnerDir) -> Result<Vec<(SandboxId, Option<Self>)>, EngineError> {
        let dir = owner.sandboxes();
        let entries =
            std::fs::read_dir(&dir).map_err(|e| EngineError::step("listing", dir.display(), e))?;
        let mut found: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<SandboxId>().ok())
            .map(|id| {
                let record = std::fs::read(owner.sandbox(&id).join(FILE))
                    .ok()
                    .and_then(|json| serde_json::from_slice(&json).ok());
                (id, record)
            })
            .collect();
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(found)
    }
}
