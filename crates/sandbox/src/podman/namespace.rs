//! The engine's own mount namespace. Podman's mounts (one root and more for
//! every container) live in it and in no other, so they never burden the
//! machine's mount table, and they vanish with its last process, whatever
//! killed that. It also carries a tmpfs for Podman's databases.
//!
//! As root a holder process keeps the namespace, so that it outlives a service
//! that crashed and an owner that was killed. As a plain user Podman has such
//! a process of its own ("pause"), which also keeps the user namespace.

use super::install::{Installation, Privilege};
use super::layout::Layout;
use super::processes::Process;
use super::service::podman_command;
use crate::engine::EngineKind;
use crate::error::EngineError;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// How long Podman may take to set its namespace up as a plain user.
const SETUP_DEADLINE: Duration = Duration::from_secs(60);

/// Keeps reading a pipe that nobody writes to, because it holds the other end
/// itself.
const HOLDER: &str = "while read -r _; do :; done";

/// Ids a plain user has in the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ids {
    /// Root and a range of others.
    Range,
    /// Root only: no subordinate ids were granted.
    Single,
}

/// The namespace of an owner's Podman.
#[derive(Debug, Clone)]
pub(super) struct Namespace {
    /// As a plain user.
    user: Option<Arc<File>>,
    mount: Arc<File>,
    pub(super) ids: Ids,
}

impl Namespace {
    /// Makes the namespace, or finds the one an earlier process of the owner
    /// left.
    pub(super) async fn open(
        layout: &Layout,
        install: &Installation,
        environment: &[(&'static str, OsString)],
    ) -> Result<Self, EngineError> {
        let (keeper, ids) = match install.privilege {
            Privilege::Rootful => {
                let holder = match recorded_holder(layout) {
                    Some(holder) => holder,
                    None => start_holder(layout)?,
                };
                (holder, Ids::Range)
            }
            Privilege::Rootless => {
                let podman = podman_command(install, layout, environment);
                let ids = mount_rootless(layout, podman).await?;
                let pause = pause_process(layout)
                    .filter(|pause| sees_databases(*pause, layout))
                    .ok_or_else(|| gone("pause process", "it did not stay"))?;
                (pause, ids)
            }
        };
        Self::of(keeper, install.privilege, ids)
    }

    fn of(keeper: Process, privilege: Privilege, ids: Ids) -> Result<Self, EngineError> {
        let open = |kind: &str| {
            let path = format!("/proc/{}/ns/{kind}", keeper.pid);
            File::open(&path)
                .map(Arc::new)
                .map_err(|e| EngineError::step("opening", path, e))
        };
        let namespace = Self {
            user: match privilege {
                Privilege::Rootful => None,
                Privilege::Rootless => Some(open("user")?),
            },
            mount: open("mnt")?,
            ids,
        };
        // The number may have been somebody else's by the time it was opened.
        if keeper.lives() {
            Ok(namespace)
        } else {
            Err(gone("namespace holder", "it ended"))
        }
    }

    /// Makes a program start inside, as its root, in a directory.
    ///
    /// # Errors
    /// When the directory's name can't be given to the kernel.
    pub(super) fn enter(&self, command: &mut Command, directory: &Path) -> Result<(), EngineError> {
        let (user, mount) = (self.user.clone(), self.mount.clone());
        let directory = kernel_path(directory)?;
        // SAFETY: runs between fork and exec; system calls on descriptors
        // opened before, no allocation, no lock.
        unsafe {
            command.pre_exec(move || {
                if let Some(user) = &user {
                    move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))?;
                }
                // This also goes to the namespace's root directory.
                move_into_link_name_space(mount.as_fd(), Some(LinkNameSpaceType::Mount))?;
                rustix::process::chdir(directory.as_c_str())?;
                Ok(())
            });
        }
        Ok(())
    }
}

/// The holder written down by an earlier process, if it still lives. Trusted
/// because only the owner can write there; a process's own looks are not.
fn recorded_holder(layout: &Layout) -> Option<Process> {
    let text = std::fs::read(layout.holder()).ok()?;
    let holder: Process = serde_json::from_slice(&text).ok()?;
    holder.lives().then_some(holder)
}

/// Podman's own keeper of a plain user's namespaces. Its number may be stale,
/// so whoever has it must look the part: ours, and in another user namespace.
pub(super) fn pause_process(layout: &Layout) -> Option<Process> {
    let text = std::fs::read_to_string(layout.tmp().join("pause.pid")).ok()?;
    let process = Process::of(text.trim().parse().ok()?)?;
    let proc = format!("/proc/{}", process.pid);
    let ours = std::fs::metadata(&proc).ok()?.uid() == rustix::process::geteuid().as_raw();
    let namespace = |of: &str| std::fs::read_link(format!("{of}/ns/user")).ok();
    let apart = namespace(&proc)? != namespace("/proc/self")?;
    (ours && apart && process.lives()).then_some(process)
}

/// Whether a process sees the databases' tmpfs.
fn sees_databases(process: Process, layout: &Layout) -> bool {
    let mounts = std::fs::read(format!("/proc/{}/mountinfo", process.pid)).unwrap_or_default();
    mounts
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .any(|at| crate::cgroup::unescape_mount_path(at) == layout.meta())
}

fn kernel_path(path: &Path) -> Result<CString, EngineError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|e| EngineError::step("using", path.display(), e.into()))
}

fn start_holder(layout: &Layout) -> Result<Process, EngineError> {
    // Podman mounts network namespaces there.
    let netns = Path::new("/run/netns");
    std::fs::create_dir_all(netns)
        .map_err(|e| EngineError::step("making directory", netns.display(), e))?;
    let meta = kernel_path(&layout.meta())?;
    let run = kernel_path(&layout.runtime_dir())?;
    let (reader, writer) = io::pipe().map_err(|e| EngineError::step("making", "a pipe", e))?;
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", HOLDER])
        // Tells people, and `sweep`, whose it is.
        .arg(format!("{}/holder", layout.engine().display()))
        .env_clear()
        .current_dir("/")
        .stdin(reader)
        .stdout(writer)
        .stderr(Stdio::null());
    // SAFETY: runs between fork and exec; system calls on strings made before,
    // no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)?;
            // What the machine mounts later still arrives; nothing leaves.
            mount_change(
                c"/",
                MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
            )?;
            for target in [meta.as_c_str(), c"/run/netns"] {
                mount(
                    c"skyrl",
                    target,
                    c"tmpfs",
                    MountFlags::NOSUID | MountFlags::NODEV,
                    c"mode=700",
                )?;
            }
            rustix::fs::mkdir(run.as_c_str(), rustix::fs::Mode::RWXU)?;
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(|e| {
        EngineError::step("making a mount namespace for", layout.engine().display(), e)
    })?;
    let recorded = Process::of(child.id() as i32)
        .ok_or_else(|| gone("namespace holder", "it ended at once"))
        .and_then(|holder| {
            let path = layout.holder();
            serde_json::to_vec(&holder)
                .map_err(io::Error::from)
                .and_then(|json| std::fs::write(&path, json))
                .map_err(|e| EngineError::step("writing", path.display(), e))?;
            Ok(holder)
        });
    if recorded.is_err() {
        let _ = child.kill();
        let _ = child.wait();
        return recorded;
    }
    // Collects it whenever it ends; usually at the engine's end.
    std::thread::Builder::new()
        .name("podman-holder".into())
        .stack_size(64 * 1024)
        .spawn(move || child.wait())
        .map_err(|e| EngineError::step("starting", "a thread", e))?;
    recorded
}

fn gone(helper: &'static str, reason: &str) -> EngineError {
    EngineError::HelperGone {
        engine: EngineKind::Podman,
        helper,
        reason: reason.into(),
    }
}

/// As a plain user: has Podman make its namespaces, mounts the tmpfs, and
/// looks which ids there are.
async fn mount_rootless(layout: &Layout, podman: Command) -> Result<Ids, EngineError> {
    let script = r#"
set -e
if ! [ -e "$1/mounted" ]; then
    mount -t tmpfs -o mode=700,nosuid,nodev skyrl "$1"
    mkdir -m 700 "$1/run"
    : >"$1/mounted"
fi
cat /proc/self/uid_map
"#;
    let mut command = tokio::process::Command::from(podman);
    command
        .args(["unshare", "/bin/sh", "-c", script, "sh"])
        .arg(layout.meta())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(SETUP_DEADLINE, command.output())
        .await
        .map_err(|_| EngineError::Deadline {
            verb: "making Podman's user namespace",
            limit: SETUP_DEADLINE,
        })?
        .map_err(|e| EngineError::step("running", "podman unshare", e))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(refused(said.trim()));
    }
    Ok(ids(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads `/proc/self/uid_map`.
fn ids(map: &str) -> Ids {
    let granted: u64 = map
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok())
        .sum();
    if granted > 1 { Ids::Range } else { Ids::Single }
}

/// Why Podman could not make its user namespace.
fn refused(said: &str) -> EngineError {
    let last = said.lines().last().unwrap_or("it said nothing");
    // The last line only says that a helper failed.
    let words = said
        .lines()
        .rev()
        .find_map(|line| Some(&line[line.find("newuidmap: ").or(line.find("newgidmap: "))?..]))
        .unwrap_or(last)
        .trim_end_matches(['"', '\\', 'n']);
    let hint = if said.contains("owned by a different user") {
        "run with the account's own primary group, not one chosen by newgrp or sg"
    } else if said.contains("newuidmap") || said.contains("newgidmap") {
        "install newuidmap and newgidmap (package uidmap or shadow-utils) with their set-uid bit or file capabilities"
    } else if said.contains("user namespace") || said.contains("clone") {
        "ask for user namespaces: sysctl user.max_user_namespaces and, on Ubuntu, kernel.apparmor_restrict_unprivileged_userns=0"
    } else {
        "`podman unshare true` shows it by hand; `--engine native` does without Podman"
    };
    EngineError::Unusable {
        engine: EngineKind::Podman,
        reason: format!("it can't make its user namespace: {words}"),
        hint: hint.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_id_and_a_range_are_told_apart() {
        assert_eq!(ids("         0       7777          1\n"), Ids::Single);
        assert_eq!(ids("0 7777 1\n1 100000 65536\n"), Ids::Range);
    }

    #[test]
    fn a_missing_helper_is_named_with_its_remedy() {
        let error = refused("x\nError: exec: \"newuidmap\": executable file not found in $PATH");
        assert!(error.to_string().contains("newuidmap"), "{error}");
        assert!(error.hint().unwrap().contains("uidmap"));
    }

    #[test]
    fn a_foreign_primary_group_is_told_from_a_missing_helper() {
        let error = refused(
            "time=\"x\" level=error msg=\"running `/usr/bin/newuidmap 1 0 7 1`: newuidmap: Target process 1 is owned by a different user: uid:7\\n\"\nError: cannot set up namespace using \"/usr/bin/newuidmap\": exit status 1",
        );
        assert_eq!(
            error.to_string(),
            "engine podman can't be used here: it can't make its user namespace: newuidmap: Target process 1 is owned by a different user: uid:7"
        );
        assert!(error.hint().unwrap().contains("primary group"));
    }
}
