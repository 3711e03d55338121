//! How sandboxes come and go: create, start, destroy, adopt. What is asked of a
//! living one is in [`super::watch`], freezing its files in
//! [`super::freezing`].

use super::containers;
use super::layout::Layout;
use super::processes::Process;
use super::record::{Live, Record, control};
use super::request::{self, HardLimits, Parts, SOCKET, Translator};
use super::rest::Rest;
use super::roots::{Roots, blocking};
use super::watch;
use crate::cgroup::{Bounds, Cgroups, Controller, Frozen, Group};
use crate::context::EngineContext;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::guest_client::connect;
use crate::image::{Image, ImageRef};
use crate::rootfs::Rootfs;
use crate::snapshot::Snapshots;
use crate::spec::{Limits, SandboxSpec};
use crate::state::make_dir;
use rustix::process::Signal;
use skyrl_protocol::SandboxId;
use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long a guest may take from its start until it listens.
const GUEST_DEADLINE: Duration = Duration::from_secs(60);
/// How long killed processes may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(10);

/// One owner's Podman.
pub(super) struct Podman {
    pub(super) context: EngineContext,
    pub(super) layout: Layout,
    pub(super) rest: Rest,
    pub(super) roots: Roots,
    pub(super) cgroups: Cgroups,
    pub(super) snapshots: Arc<Snapshots>,
    /// Held while it is decided what becomes of a snapshot.
    pub(super) books: tokio::sync::Mutex<()>,
    pub(super) translator: Option<Translator>,
    /// The runtime puts containers into groups of its own making, out of which
    /// they have to be brought.
    pub(super) regroup: bool,
    pub(super) sandboxes: Mutex<HashMap<SandboxId, Arc<Live>>>,
}

/// Refuses limits that nothing here would hold.
fn bounds(cgroups: &Cgroups, limits: &Limits) -> Result<Bounds, EngineError> {
    let wanted = [
        ("cpus", limits.cpus.is_some(), Controller::Cpu),
        ("memory", limits.memory_bytes.is_some(), Controller::Memory),
        ("pids", limits.pids.is_some(), Controller::Pids),
    ];
    for (limit, asked, controller) in wanted {
        if let (true, Err(reason)) = (asked, cgroups.check(controller)) {
            return Err(EngineError::LimitUnsupported {
                engine: EngineKind::Podman,
                limit,
                reason: reason.to_owned(),
            });
        }
    }
    Ok(Bounds {
        cpus: limits.cpus,
        memory_bytes: limits.memory_bytes,
        pids: limits.pids,
    })
}

/// Files through which the monitor enters a sandbox's groups. A single-threaded
/// process enters a v1 group cheapest through `tasks`.
fn entrances(group: &Group) -> String {
    let v1 = group.v1_directories().into_iter().map(|d| d.join("tasks"));
    let v2 = group.v2_directory().map(|d| d.join("cgroup.procs"));
    v1.chain(v2)
        .map(|path| format!("{}\n", path.display()))
        .collect()
}

impl Podman {
    pub(super) fn live(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Live>>> {
        match self.sandboxes.lock() {
            Ok(live) => live,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    pub(super) fn get(&self, id: &SandboxId) -> Result<Arc<Live>, EngineError> {
        self.live()
            .get(id)
            .cloned()
            .ok_or_else(|| EngineError::NotFound(id.clone()))
    }

    fn socket(&self, id: &SandboxId) -> PathBuf {
        control(&self.layout, id).join(SOCKET)
    }

    async fn image(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<Image, EngineError> {
        if let ImageRef::Snapshot(snapshot) = &spec.image {
            return self.acquire(snapshot, id).await;
        }
        let progress = self.context.progress.as_ref();
        let images = &self.context.images;
        Ok(images.ensure(&spec.image, spec.pull, progress).await?)
    }

    pub(super) async fn create(
        self: &Arc<Self>,
        id: &SandboxId,
        spec: &SandboxSpec,
    ) -> Result<(), EngineError> {
        if self.live().contains_key(id) {
            return Err(EngineError::Exists(id.clone()));
        }
        let bounds = bounds(&self.cgroups, &spec.limits)?;
        let foreign_guest = self.roots.check_user(spec.user)?;
        let image = self.image(id, spec).await?;
        let rootfs = Rootfs::plan(
            self.roots.method,
            image.layers.clone(),
            &self.layout.sandbox(id),
        );
        let request = request::create(&Parts {
            id,
            owner: self.context.owner.owner(),
            key: self.layout.key(),
            spec,
            config: &image.config,
            binds: &image.binds,
            root: &rootfs.root(),
            guest: &self.context.guest,
            control: &control(&self.layout, id),
            translator: self.translator,
            hard: HardLimits::own(),
        })?;
        let record = Record {
            group: self.cgroups.plan(self.layout.key(), id.as_str()),
            disk_bytes: spec.limits.disk_bytes,
            foreign_guest,
            first: None,
            monitor: None,
            rootfs,
            image,
        };
        {
            let (podman, id, record) = (self.clone(), id.clone(), record.clone());
            blocking("preparing a sandbox", move || {
                podman.prepare(&id, &record, &bounds)
            })
            .await?;
        }
        tokio::try_join!(
            self.roots.mount(&record.rootfs),
            containers::create(&self.rest, id, &request),
        )?;
        self.live().insert(id.clone(), Arc::new(Live::new(record)));
        Ok(())
    }

    /// Everything a sandbox needs on disk. Written down before it is made.
    fn prepare(&self, id: &SandboxId, record: &Record, bounds: &Bounds) -> Result<(), EngineError> {
        let directory = self.layout.sandbox(id);
        make_dir(&directory)?;
        record.write(&self.layout, id)?;
        if !matches!(record.image.reference, ImageRef::Snapshot(_)) {
            self.context
                .images
                .mark_used(&record.image, self.context.owner.owner(), id)?;
        }
        record.group.create(bounds)?;
        let entrances_file = directory.join("cgroup.files");
        std::fs::write(&entrances_file, entrances(&record.group))
            .map_err(|e| EngineError::step("writing", entrances_file.display(), e))?;
        record.rootfs.create()?;
        let control = control(&self.layout, id);
        make_dir(&control)?;
        // The guest may run under any id; the directory above is ours only.
        std::fs::set_permissions(&control, std::fs::Permissions::from_mode(0o777))
            .map_err(|e| EngineError::step("opening to everybody", control.display(), e))
    }

    pub(super) async fn start(self: &Arc<Self>, id: &SandboxId) -> Result<PathBuf, EngineError> {
        let live = self.get(id)?;
        let mut rest = {
            let (podman, id, live) = (self.clone(), id.clone(), live.clone());
            tokio::spawn(async move { podman.start_container(&id, &live).await })
        };
        let listens = self.wait_for_guest(id, &live, &mut rest);
        let outcome = tokio::time::timeout(GUEST_DEADLINE, listens)
            .await
            .unwrap_or(Err(EngineError::Deadline {
                verb: "starting the guest",
                limit: GUEST_DEADLINE,
            }));
        if !rest.is_finished() {
            live.go_on(rest).await;
        }
        outcome?;
        if live.record().disk_bytes.is_some() {
            watch::watch_disk(self, id, &live);
        }
        Ok(self.socket(id))
    }

    /// Starts the container and notes what it consists of. The guest answers
    /// before this is done.
    async fn start_container(&self, id: &SandboxId, live: &Live) -> Result<(), EngineError> {
        containers::start(&self.rest, id).await?;
        let state = containers::inspect(&self.rest, id)
            .await?
            .ok_or_else(|| EngineError::NotFound(id.clone()))?;
        if self.regroup {
            // Nobody has been told of the guest yet, so it has no children.
            live.record().group.add(state.pid)?;
        }
        live.found(
            &self.layout,
            id,
            Process::of(state.pid).filter(|_| state.pid > 0),
            Process::of(state.conmon_pid).filter(|_| state.conmon_pid > 0),
        )?;
        // The container has its own copy of the mount.
        self.roots.unmount(&live.record().rootfs).await
    }

    async fn wait_for_guest(
        &self,
        id: &SandboxId,
        live: &Live,
        rest: &mut JoinHandle<Result<(), EngineError>>,
    ) -> Result<(), EngineError> {
        let socket = self.socket(id);
        let mut started = false;
        let mut pause = Duration::from_micros(500);
        loop {
            if socket.exists() && (started || !self.regroup) {
                if live.record().foreign_guest {
                    self.roots.open_socket(&socket).await?;
                }
                if connect(&socket).await.is_ok() {
                    return Ok(());
                }
            }
            if started && !live.record().first.is_some_and(Process::lives) {
                return Err(EngineError::Ended {
                    id: id.clone(),
                    cause: self.cause(id, live).await,
                });
            }
            tokio::select! {
                done = &mut *rest, if !started => {
                    started = true;
                    match done {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => return Err(self.explained(id, error).await),
                        Err(error) => return Err(EngineError::step(
                            "starting",
                            id,
                            std::io::Error::other(error),
                        )),
                    }
                }
                () = tokio::time::sleep(pause) => {
                    pause = (pause * 5 / 4).min(Duration::from_millis(10));
                }
            }
        }
    }

    /// Adds what the guest said to Podman's refusal to start it.
    async fn explained(&self, id: &SandboxId, error: EngineError) -> EngineError {
        match (error, containers::log(&self.rest, id).await) {
            (
                EngineError::Podman {
                    request,
                    status,
                    message,
                },
                Some(log),
            ) => EngineError::Podman {
                request,
                status,
                message: format!("{message}; the guest said: {log}"),
            },
            (error, _) => error,
        }
    }

    /// Kills what runs in a sandbox, and waits until it is gone.
    pub(super) async fn kill(&self, id: &SandboxId, record: &Record) -> Result<(), EngineError> {
        let (mut first, mut monitor) = (record.first, record.monitor);
        if first.is_none()
            && let Some(state) = containers::inspect(&self.rest, id).await?
        {
            first = (state.pid > 0).then(|| Process::of(state.pid)).flatten();
            monitor = (state.conmon_pid > 0)
                .then(|| Process::of(state.conmon_pid))
                .flatten();
        }
        if let Some(first) = first {
            // With the first process of its namespace go all others.
            first
                .signal(Signal::KILL)
                .map_err(|e| EngineError::step("killing", id, e))?;
            if record.group.is_frozen() {
                // On v1 the frozen die only when thawed.
                let group = record.group.clone();
                blocking("thawing a sandbox", move || {
                    Ok(group.set_frozen(Frozen::No, DEATH_PATIENCE)?)
                })
                .await?;
            }
            if !first.gone_within(DEATH_PATIENCE).await {
                return Err(EngineError::Deadline {
                    verb: "killing a sandbox",
                    limit: DEATH_PATIENCE,
                });
            }
        }
        // It writes down how the guest ended, which spares Podman asking.
        if let Some(monitor) = monitor
            && !monitor.gone_within(Duration::from_secs(2)).await
        {
            let _ = monitor.signal(Signal::KILL);
        }
        Ok(())
    }

    pub(super) async fn destroy(self: &Arc<Self>, id: &SandboxId) -> Result<(), EngineError> {
        let live = self.live().get(id).cloned();
        if let Some(live) = &live {
            // A failed start is being cleared up right here.
            let _ = live.settled().await;
        }
        let directory = self.layout.sandbox(id);
        let record = match &live {
            Some(live) => Some(live.record()),
            None => Record::read(&directory),
        };
        if let Some(record) = &record {
            self.kill(id, record).await?;
        }
        self.dismantle(id, record).await?;
        self.live().remove(id);
        Ok(())
    }

    /// Removes all that is left of a sandbox whose processes are gone.
    pub(super) async fn dismantle(
        self: &Arc<Self>,
        id: &SandboxId,
        record: Option<Record>,
    ) -> Result<(), EngineError> {
        let directory = self.layout.sandbox(id);
        let files = async {
            if let Some(record) = &record {
                self.roots.unmount(&record.rootfs).await?;
            }
            self.roots.remove(&directory).await
        };
        let from_snapshot = record
            .as_ref()
            .is_none_or(|r| matches!(r.image.reference, ImageRef::Snapshot(_)));
        tokio::try_join!(containers::remove(&self.rest, id), files)?;
        {
            let (podman, id) = (self.clone(), id.clone());
            blocking("removing a sandbox", move || {
                if let Some(record) = &record {
                    record.group.kill();
                    record.remove_nested_groups();
                    record.group.remove(DEATH_PATIENCE)?;
                }
                let owner = podman.context.owner.owner();
                Ok(podman.context.images.unmark(owner, &id)?)
            })
            .await?;
        }
        if from_snapshot {
            self.release(id).await?;
        }
        Ok(())
    }

    pub(super) async fn adopt(self: &Arc<Self>) -> Result<Vec<(SandboxId, PathBuf)>, EngineError> {
        let mut adopted = Vec::new();
        for id in containers::list(&self.rest, self.layout.key()).await? {
            let state = containers::inspect(&self.rest, &id).await?;
            let record = Record::read(&self.layout.sandbox(&id));
            let running = match (state, record) {
                (Some(state), Some(mut record)) if state.running => {
                    record.first = Process::of(state.pid).filter(|_| state.pid > 0);
                    record.monitor = Process::of(state.conmon_pid).filter(|_| state.conmon_pid > 0);
                    record.first.is_some().then_some(record)
                }
                _ => None,
            };
            let socket = self.socket(&id);
            match running {
                Some(record) if is_socket(&socket) => {
                    record.write(&self.layout, &id)?;
                    // Its start may have been cut off before this step.
                    self.roots.unmount(&record.rootfs).await?;
                    let limited = record.disk_bytes.is_some();
                    let live = Arc::new(Live::new(record));
                    self.live().insert(id.clone(), live.clone());
                    if limited {
                        watch::watch_disk(self, &id, &live);
                    }
                    adopted.push((id, socket));
                }
                _ => self.destroy(&id).await?,
            }
        }
        Ok(adopted)
    }
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.symlink_metadata()
        .is_ok_and(|meta| meta.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_nothing_holds_is_refused_by_name() {
        let none = Cgroups::unavailable("not delegated to this user");
        let limits = Limits {
            memory_bytes: Some(1 << 30),
            ..Limits::default()
        };
        let error = bounds(&none, &limits).unwrap_err();
        assert_eq!(
            error.to_string(),
            "engine podman can't enforce the memory limit here: not delegated to this user"
        );
        assert!(bounds(&none, &Limits::default()).is_ok());
    }
}
