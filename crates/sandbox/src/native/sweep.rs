//! Removing all that this engine left of an owner that is dead, whatever it
//! was in the middle of. Needs no zygote and no running engine; safe to
//! repeat, and to be interrupted.

use super::link::identity_in;
use super::record::{Record, UNFINISHED, cgroup_key, read_json, recorded};
use crate::cgroup::group;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::rootfs::{mounts_below, unmount};
use crate::state::OwnerDir;
use crate::tree::remove_tree;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use skyrl_protocol::zygote::Identity;
use skyrl_zygote::process::is_alive;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long killed processes may take to be gone.
const DEATH: Duration = Duration::from_secs(10);

/// File in the engine's directory that lists where its cgroups are.
pub(super) const CGROUP_PARENTS: &str = "cgroups.json";

/// Removes processes, mounts, cgroups and directories of a dead owner's
/// native engine, and of nobody else. The caller holds the owner's lock, so
/// the owner is dead.
///
/// # Errors
/// The first thing that could not be removed; the rest is removed
/// nevertheless, and a repetition tries again.
pub fn sweep(owner: &OwnerDir) -> Result<(), EngineError> {
    let dir = owner.engine(EngineKind::Native);
    let mut result = Ok(());
    let mut note = |step: Result<(), EngineError>| {
        if let (Ok(()), Err(error)) = (&result, step) {
            result = Err(error);
        }
    };
    // The kernel kills its sandboxes with it.
    if let Some(zygote) = identity_in(&dir) {
        note(kill(&zygote, DEATH));
    }
    let ids = recorded(owner);
    for id in &ids {
        let Some(record) = Record::read(owner, id) else {
            continue;
        };
        record.group.kill();
        if let Some(process) = &record.process {
            note(kill(process, DEATH));
        }
        note(record.group.remove(DEATH).map_err(Into::into));
    }
    let parents: Vec<PathBuf> = read_json(&dir.join(CGROUP_PARENTS)).unwrap_or_default();
    note(group::sweep(&parents, &cgroup_key(owner), DEATH).map_err(Into::into));
    for id in &ids {
        for mounted in mounts_below(&owner.sandbox(id)) {
            note(unmount(&mounted));
        }
        note(remove_tree(&owner.sandbox(id)).map_err(Into::into));
    }
    remove_unrecorded(owner);
    note(remove_tree(&dir).map_err(Into::into));
    result
}

/// Removes directories that were made just before their record.
fn remove_unrecorded(owner: &OwnerDir) {
    for entry in std::fs::read_dir(owner.sandboxes())
        .into_iter()
        .flatten()
        .flatten()
    {
        let _ = std::fs::remove_file(entry.path().join(UNFINISHED));
        // What has anything else in it is not ours.
        let _ = std::fs::remove_dir(entry.path());
    }
}

/// Kills a process unless it ended and something else has its number, and
/// waits until it is gone.
pub(super) fn kill(identity: &Identity, limit: Duration) -> Result<(), EngineError> {
    let Some(pid) = Pid::from_raw(identity.pid) else {
        return Ok(());
    };
    // The descriptor first: after that the number can't come to mean another.
    let Ok(held) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    if !is_alive(identity) {
        return Ok(());
    }
    pidfd_send_signal(&held, Signal::KILL)
        .map_err(|e| EngineError::step("killing process", identity.pid, e.into()))?;
    let until = Instant::now() + limit;
    while is_alive(identity) {
        if Instant::now() >= until {
            return Err(EngineError::step(
                "killing process",
                identity.pid,
                io::ErrorKind::TimedOut.into(),
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
