//! Starting a container: the launcher runs the runtime, the runtime leaves
//! the guest running. Blocking, with a deadline.

use super::config::{Container, DeviceBind, Ids, ResourceLimit, RuntimeGroups};
use super::init::{Init, ended_within};
use super::record::{NAME_OPTION, Place, Record, guest_name, runtime_state};
use super::runtime::{RunCall, Runtime, RuntimeKind, Sealed, remedy};
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::native::limits::Enforcement;
use crate::native::plan;
use crate::spec::Network;
use crate::state::make_dir;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use skyrl_protocol::guest::UserGroup;
use skyrl_protocol::zygote::{CgroupPlan, FilePlan, LaunchPlan, StepFailure, UserNamespacePlan};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a runtime may take to start a container.
const LIMIT: Duration = Duration::from_secs(60);

/// How often a start looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(20);

/// Seconds a guest lives without its owner's first word.
const FIRST_LEASE: u32 = 120;

/// Bytes kept of what runtime and guest print.
const WORDS: u64 = 16 * 1024;

/// Memory for `/dev/shm` without a memory limit.
const SHARED_MEMORY: u64 = 1 << 30;

/// The guest's listening socket inside.
const LISTENER: usize = 3;

/// The counter of kills for lack of memory inside.
const OOM_COUNTER: usize = 4;

/// Host paths mounted below here are placed by the runtime, over its own
/// mount.
const DEV: &str = "/dev";

/// What all launches of an engine share.
#[derive(Debug)]
pub(super) struct Launcher<'a> {
    pub(super) zygote: &'a Path,
    pub(super) guest: &'a Sealed,
    pub(super) runtime: &'a Runtime,
    /// The engine is root and needs no user namespaces.
    pub(super) privileged: bool,
    /// Path of the sandbox's groups below the engine's own.
    pub(super) group_path: String,
}

/// A container that runs.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) init: Init,
    pub(super) words: Words,
}

/// What runtime and guest print: a file in memory of fixed size, so that
/// neither a full pipe nor a vanished reader ever disturbs the guest, and
/// nothing in the sandbox can fill anything through it.
#[derive(Debug)]
pub(super) struct Words(File);

impl Words {
    pub(super) fn new() -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create(
            "output",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?);
        file.set_len(WORDS)?;
        rustix::fs::fcntl_add_seals(
            file.as_fd(),
            SealFlags::SEAL | SealFlags::GROW | SealFlags::SHRINK,
        )?;
        Ok(Self(file))
    }

    /// What was printed, as printable text.
    pub(super) fn text(&self) -> String {
        let mut bytes = vec![0; WORDS as usize];
        let read = self.0.read_at(&mut bytes, 0).unwrap_or(0);
        bytes.truncate(read);
        let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        String::from_utf8_lossy(&bytes[..end])
            .chars()
            .filter(|c| !c.is_control() || *c == '\n')
            .collect::<String>()
            .trim()
            .to_owned()
    }
}

impl Launcher<'_> {
    /// Writes the runtime's configuration and the launcher's plan.
    ///
    /// # Errors
    /// When they can't be written or the network can't be had.
    pub(super) fn prepare(
        &self,
        place: &Place<'_>,
        record: &Record,
        held: &Enforcement,
    ) -> Result<(), EngineError> {
        let spec = &record.spec;
        let user = spec.user.unwrap_or(UserGroup { uid: 0, gid: 0 });
        let ids = match (self.privileged, user.uid, user.gid) {
            (true, ..) => Ids::Host,
            (false, 0, 0) => Ids::OwnRoot,
            (false, ..) => Ids::OwnUser,
        };
        let hostname = plan::hostname(spec, place.id);
        let workdir = plan::workdir(spec, &record.image);
        let root = record.rootfs.root();
        let counted = record.group.oom_counter().is_some();
        let arguments = guest_arguments(place, &workdir, counted);
        let (devices, binds) = plan::binds(spec, &record.image)
            .into_iter()
            .partition::<Vec<_>, _>(|bind| bind.target.starts_with(DEV));
        let container = Container {
            hostname: &hostname,
            root: &root,
            read_only_root: spec.read_only_root,
            arguments,
            env: plan::environment(spec, &record.image, user, &hostname),
            workdir: &workdir,
            user: (user.uid, user.gid),
            ids,
            host_network: spec.network == Network::Host,
            limits: limits(held),
            devices: devices
                .into_iter()
                .map(|bind| DeviceBind {
                    source: bind.source,
                    target: bind.target,
                    read_only: bind.read_only,
                })
                .collect(),
            shm_bytes: spec
                .limits
                .memory_bytes
                .map_or(SHARED_MEMORY, |bytes| bytes / 2),
            groups: (record.runtime == RuntimeKind::Runc).then(|| RuntimeGroups {
                path: self.group_path.clone(),
                bounds: held.bounds,
            }),
        };
        make_dir(&place.bundle())?;
        make_dir(&runtime_state(place.owner))?;
        write(
            &place.bundle().join("config.json"),
            &serde_json::to_vec(&container.config()),
        )?;
        let launch = self.plan(place, record, (user, workdir.clone()), binds, {
            let (_, mut files) =
                crate::native::network::plan(EngineKind::Oci, spec.network, !self.privileged)?;
            files.push(plan::file("/etc/hostname", format!("{hostname}\n")));
            files.push(plan::file("/etc/hosts", plan::hosts(&hostname)));
            files
        });
        write(&place.launch_plan(), &serde_json::to_vec(&launch))
    }

    fn plan(
        &self,
        place: &Place<'_>,
        record: &Record,
        (user, workdir): (UserGroup, String),
        binds: Vec<skyrl_protocol::zygote::BindPlan>,
        files: Vec<FilePlan>,
    ) -> LaunchPlan {
        let group = &record.group;
        let cgroups = match record.runtime {
            RuntimeKind::Crun => CgroupPlan {
                v1: group
                    .v1_directories()
                    .into_iter()
                    .map(Path::to_owned)
                    .collect(),
                v2: group.v2_directory().map(Path::to_owned),
                v1_freezer: None,
            },
            RuntimeKind::Runc => CgroupPlan::default(),
        };
        let call = RunCall {
            state: &runtime_state(place.owner),
            bundle: &place.bundle(),
            pid_file: &place.pid_file(),
            name: place.id.as_str(),
            keep_keyring: !self.privileged,
            inherited: guest_descriptor(group.oom_counter().is_some()) - LISTENER + 1,
        };
        LaunchPlan {
            root: plan::root(&record.rootfs),
            files,
            binds,
            workdir,
            // In a namespace of one id, the launcher's is the sandbox's.
            uid: if self.privileged { user.uid } else { 0 },
            gid: if self.privileged { user.gid } else { 0 },
            user_namespace: if self.privileged {
                UserNamespacePlan::Host
            } else {
                UserNamespacePlan::OwnSingleId
            },
            cgroups,
            socket: place.socket(),
            oom_counter: group.oom_counter(),
            guest: self.guest.path(),
            program: self.runtime.program(),
            argv: self.runtime.run_arguments(&call),
            env: vec![format!("PATH={}", plan::PATH)],
        }
    }

    /// Runs what was prepared. When `unwanted` turns true, or time is up, the
    /// runtime is killed; what it had started by then is the caller's to
    /// remove.
    ///
    /// # Errors
    /// What launcher, runtime or guest said.
    pub(super) fn launch(
        &self,
        place: &Place<'_>,
        unwanted: &AtomicBool,
    ) -> Result<Launched, EngineError> {
        let step = |what: &str, e: io::Error| EngineError::step(what, self.zygote.display(), e);
        let words = Words::new().map_err(|e| step("making room for the output of", e))?;
        let output = || words.0.try_clone().map(Stdio::from);
        let mut child = Command::new(self.zygote)
            .arg("launch")
            .arg(place.launch_plan())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(output().map_err(|e| step("starting", e))?)
            .stderr(output().map_err(|e| step("starting", e))?)
            .spawn()
            .map_err(|e| step("starting", e))?;
        let status = wait(&mut child, unwanted).map_err(|e| step("waiting for", e))?;
        if !status.is_some_and(|status| status.success()) {
            return Err(self.failure(status, &words.text()));
        }
        let pid = read_pid(&place.pid_file())?;
        Ok(Launched {
            init: Init::hold(pid)?,
            words,
        })
    }

    fn failure(&self, status: Option<ExitStatus>, said: &str) -> EngineError {
        let first = said.lines().next().unwrap_or_default();
        if let Ok(failed) = serde_json::from_str::<StepFailure>(first) {
            let source = match failed.errno {
                0 => io::Error::other("refused"),
                errno => io::Error::from_raw_os_error(errno),
            };
            return EngineError::step(failed.step, failed.subject, source);
        }
        let mut output = said.to_owned();
        if let Some(remedy) = remedy(said) {
            output.push_str("; remedy: ");
            output.push_str(remedy);
        }
        EngineError::Program {
            program: format!("{} run", self.runtime.kind),
            status: match status {
                Some(status) => status.to_string(),
                None => "given up".into(),
            },
            output,
        }
    }
}

/// Number of the descriptor the guest is executed from.
fn guest_descriptor(counted: bool) -> usize {
    if counted {
        OOM_COUNTER + 1
    } else {
        LISTENER + 1
    }
}

/// The guest and its arguments.
fn guest_arguments(place: &Place<'_>, workdir: &str, counted: bool) -> Vec<String> {
    let mut arguments = vec![
        format!("/proc/self/fd/{}", guest_descriptor(counted)),
        NAME_OPTION.into(),
        guest_name(place.owner, place.id),
        "--listen-fd".into(),
        LISTENER.to_string(),
        "--workdir".into(),
        workdir.to_owned(),
        "--lease".into(),
        FIRST_LEASE.to_string(),
    ];
    if counted {
        arguments.extend(["--oom-fd".into(), OOM_COUNTER.to_string()]);
    }
    arguments
}

/// Waits for a child's end; kills it when it is unwanted or takes too long,
/// and returns nothing then.
fn wait(child: &mut Child, unwanted: &AtomicBool) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let Some(Ok(pidfd)) = pidfd else {
        child.kill()?;
        child.wait()?;
        return Err(io::Error::last_os_error());
    };
    let until = Instant::now() + LIMIT;
    while !ended_within(&pidfd, LOOK) {
        if unwanted.load(Ordering::Relaxed) || Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
    }
    child.wait().map(Some)
}

fn read_pid(path: &Path) -> Result<i32, EngineError> {
    let fail = |e: io::Error| EngineError::step("reading", path.display(), e);
    let text = std::fs::read_to_string(path).map_err(fail)?;
    text.trim()
        .parse()
        .map_err(|_| fail(io::ErrorKind::InvalidData.into()))
}

fn write(path: &Path, content: &serde_json::Result<Vec<u8>>) -> Result<(), EngineError> {
    let fail = |e: io::Error| EngineError::step("writing", path.display(), e);
    match content {
        Ok(bytes) => std::fs::write(path, bytes).map_err(fail),
        Err(error) => Err(fail(io::Error::other(error.to_string()))),
    }
}

/// Resource limits by the names that runtimes know.
fn limits(held: &Enforcement) -> Vec<ResourceLimit> {
    const NAMES: [(u32, &str); 5] = [
        (libc::RLIMIT_CORE, "RLIMIT_CORE"),
        (libc::RLIMIT_NOFILE, "RLIMIT_NOFILE"),
        (libc::RLIMIT_NPROC, "RLIMIT_NPROC"),
        (libc::RLIMIT_FSIZE, "RLIMIT_FSIZE"),
        (libc::RLIMIT_DATA, "RLIMIT_DATA"),
    ];
    plan::rlimits(held)
        .into_iter()
        .filter_map(|(resource, soft, hard)| {
            let (_, name) = NAMES.iter().find(|(known, _)| *known == resource)?;
            Some(ResourceLimit { name, soft, hard })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_printed_is_kept_up_to_its_bound_and_without_control_characters() {
        let words = Words::new().unwrap();
        let mut writer = words.0.try_clone().unwrap();
        assert_eq!(words.text(), "");
        writer.write_all(b"\x1b[31mout of luck\n").unwrap();
        assert_eq!(words.text(), "[31mout of luck");
        assert!(writer.write_all(&[b'x'; 2 * WORDS as usize]).is_err());
        assert!(words.text().len() <= WORDS as usize);
    }

    #[test]
    fn every_resource_limit_in_use_has_a_name_for_runtimes() {
        let held = Enforcement {
            rlimits: vec![
                (libc::RLIMIT_NPROC, 10),
                (libc::RLIMIT_FSIZE, 10),
                (libc::RLIMIT_DATA, 10),
            ],
            ..Enforcement::default()
        };
        assert_eq!(limits(&held).len(), plan::rlimits(&held).len());
    }
}
