//! Removes everything an owner's Podman left on the machine, whatever was
//! killed in the middle of whatever, without Podman's help: its service and
//! databases may be gone or broken.
//!
//! Order: processes first (helpers that could start more of them before what
//! they started), then groups, then mounts, which mostly went with their
//! namespace's last process, then files.

use super::install::{Privilege, privilege};
use super::layout::Layout;
use super::processes::{Process, all, works_for};
use super::record::{Record, control};
use super::roots::blocking;
use super::service::{environment, podman_command};
use crate::cgroup::{self, Cgroups, Frozen};
use crate::command::run;
use crate::error::EngineError;
use crate::rootfs::{mounts_below, unmount};
use crate::state::OwnerDir;
use crate::tree::remove_tree;
use rustix::process::Signal;
use skyrl_protocol::SandboxId;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long processes may take to die.
const DEATH_PATIENCE: Duration = Duration::from_secs(10);
/// How long removing files may take as a plain user.
const REMOVE_LIMIT: Duration = Duration::from_secs(600);

/// Notes where sandboxes' groups will be.
pub(super) fn record_parents(layout: &Layout, cgroups: &Cgroups) -> Result<(), EngineError> {
    let path = layout.cgroups();
    // An earlier process of the owner may have run in another group.
    let mut parents = recorded_parents(layout);
    parents.extend(cgroups.parents());
    serde_json::to_vec(&parents)
        .map_err(std::io::Error::from)
        .and_then(|json| std::fs::write(&path, json))
        .map_err(|e| EngineError::step("writing", path.display(), e))
}

fn recorded_parents(layout: &Layout) -> BTreeSet<PathBuf> {
    std::fs::read(layout.cgroups())
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default()
}

/// Removes everything the engine keeps for an owner. The caller holds the
/// owner's lock or is the owner.
///
/// # Errors
/// What could not be removed; a later call goes on.
pub async fn sweep(owner: &OwnerDir) -> Result<(), EngineError> {
    let layout = Layout::new(owner);
    if !layout.engine().exists() {
        return Ok(());
    }
    blocking("removing what podman left", move || clear(&layout)).await
}

/// A sandbox's directory, with what is written down in it if it got so far.
struct Leftover {
    directory: PathBuf,
    record: Option<Record>,
}

fn leftovers(layout: &Layout) -> Vec<Leftover> {
    let Ok(entries) = std::fs::read_dir(layout.sandboxes()) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| Leftover {
            record: Record::read(&entry.path()),
            directory: entry.path(),
        })
        .collect()
}

fn clear(layout: &Layout) -> Result<(), EngineError> {
    let leftovers = leftovers(layout);
    kill_processes(layout, &leftovers)?;
    for record in leftovers.iter().filter_map(|one| one.record.as_ref()) {
        record.remove_nested_groups();
    }
    let parents: Vec<PathBuf> = recorded_parents(layout).into_iter().collect();
    cgroup::group::sweep(&parents, layout.key(), DEATH_PATIENCE)?;
    for root in [layout.engine(), layout.sandboxes()] {
        for mounted in mounts_below(root) {
            unmount(&mounted)?;
        }
    }
    remove_files(layout, &leftovers)
}

fn kill_processes(layout: &Layout, leftovers: &[Leftover]) -> Result<(), EngineError> {
    // Frozen processes die only when thawed.
    for record in leftovers.iter().filter_map(|one| one.record.as_ref()) {
        if record.group.is_frozen() {
            record.group.set_frozen(Frozen::No, DEATH_PATIENCE)?;
        }
    }
    let control_directories: BTreeSet<(u64, u64)> = leftovers
        .iter()
        .filter_map(|one| one.directory.file_name()?.to_str()?.parse().ok())
        .filter_map(|id: SandboxId| std::fs::metadata(control(layout, &id)).ok())
        .map(|meta| (meta.dev(), meta.ino()))
        .collect();
    let known: BTreeSet<Process> = leftovers
        .iter()
        .filter_map(|one| one.record.as_ref())
        .flat_map(|record| [record.first, record.monitor])
        .flatten()
        .collect();
    let own = std::process::id() as i32;
    let until = Instant::now() + DEATH_PATIENCE;
    let mut pause = Duration::from_millis(1);
    loop {
        let mut left = Vec::new();
        for process in all() {
            if process.pid != own
                && (known.contains(&process)
                    || works_for(process, &[layout.engine(), layout.sandboxes()])
                    || lives_in(process, &control_directories))
            {
                process
                    .signal(Signal::KILL)
                    .map_err(|e| EngineError::step("killing", process.pid, e))?;
                left.push(process);
            }
        }
        if let Some(pause) = pause_process(layout) {
            pause
                .signal(Signal::KILL)
                .map_err(|e| EngineError::step("killing", pause.pid, e))?;
            left.push(pause);
        }
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(EngineError::Deadline {
                verb: "killing what podman left",
                limit: DEATH_PATIENCE,
            });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn pause_process(layout: &Layout) -> Option<Process> {
    match privilege() {
        Privilege::Rootful => None,
        Privilege::Rootless => super::namespace::pause_process(layout),
    }
}

/// Whether a process is inside a sandbox: it sees the sandbox's control
/// directory where only we mount one.
fn lives_in(process: Process, control_directories: &BTreeSet<(u64, u64)>) -> bool {
    let path = format!("/proc/{}/root/.skyrl/run", process.pid);
    std::fs::metadata(path)
        .is_ok_and(|meta| control_directories.contains(&(meta.dev(), meta.ino())))
}

fn remove_files(layout: &Layout, leftovers: &[Leftover]) -> Result<(), EngineError> {
    let mut written: Vec<&Path> = leftovers
        .iter()
        .map(|one| one.directory.as_path())
        .collect();
    written.push(layout.snapshots());
    if written.iter().any(|path| remove_tree(path).is_err()) && privilege() == Privilege::Rootless {
        remove_in_user_namespace(layout, &written)?;
    }
    for path in written {
        remove_tree(path)?;
    }
    Ok(remove_tree(layout.engine())?)
}

/// Files of subordinate ids can only be removed in a user namespace that has
/// them. Podman makes one, with a pause process of its own.
fn remove_in_user_namespace(layout: &Layout, paths: &[&Path]) -> Result<(), EngineError> {
    let install = super::probe::installation(None)?;
    layout.make()?;
    let mut command = podman_command(&install, layout, &environment(layout));
    command
        .args(["unshare", "rm", "-rf", "--one-file-system", "--"])
        .args(paths);
    let removed = run(&mut command, REMOVE_LIMIT);
    kill_processes(layout, &[])?;
    removed.map(drop)
}
