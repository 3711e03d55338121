//! Removing all that a dead owner left, at whatever point it died. The caller
//! holds the owner's lock; files are the caller's to remove afterwards.

use super::init::Init;
use super::record::{OwnerRecord, Place, Record, recorded, runtime_state};
use super::runtime::{Runtime, RuntimeKind};
use super::strays::Strays;
use crate::cgroup;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::native::record::cgroup_key;
use crate::rootfs::{mounts_below, unmount};
use crate::state::OwnerDir;
use std::time::Duration;

/// How long killed processes may take to be gone.
const LIMIT: Duration = Duration::from_secs(20);

/// Ends every process of a dead owner's `oci` engine and removes its groups
/// and mounts. Safe to repeat; does nothing for owners without one.
///
/// # Errors
/// What could not be removed.
pub async fn sweep(owner: &OwnerDir) -> Result<(), EngineError> {
    let owner = owner.clone();
    super::engine::blocking(move || sweep_now(&owner)).await
}

fn sweep_now(owner: &OwnerDir) -> Result<(), EngineError> {
    if !owner.engine(EngineKind::Oci).exists() {
        return Ok(());
    }
    // First what might start more, then what was started.
    let mut outcome = kill_strays(owner);
    for id in recorded(owner) {
        let place = Place { owner, id: &id };
        let Some(record) = Record::read(&place) else {
            continue;
        };
        record.group.kill();
        for identity in record.init.iter().chain(&record.helper) {
            let Some(process) = Init::find(identity) else {
                continue;
            };
            process.kill();
            if !process.ended_within(LIMIT) {
                outcome = Err(EngineError::Deadline {
                    verb: "killing a dead owner's sandbox",
                    limit: LIMIT,
                });
            }
        }
        if record.runtime == RuntimeKind::Runc {
            let state = runtime_state(owner);
            // What it does not know any more is gone with the groups below.
            if let Err(error) = Runtime::delete(record.runtime, &state, id.as_str(), LIMIT) {
                tracing::debug!(%error, %id, "runc could not delete a container");
            }
        }
    }
    if let Some(record) = OwnerRecord::read(owner) {
        cgroup::group::sweep(&record.group_parents, &cgroup_key(owner), LIMIT)?;
    }
    for path in mounts_below(owner.root()) {
        unmount(&path)?;
    }
    outcome
}

fn kill_strays(owner: &OwnerDir) -> Result<(), EngineError> {
    if Strays::of_owner(owner).kill(LIMIT) {
        return Ok(());
    }
    Err(EngineError::Deadline {
        verb: "killing what a dead owner was starting",
        limit: LIMIT,
    })
}
