//! The verbs of the `oci` engine.

use super::init::Init;
use super::launch::{Launched, Launcher, Words};
use super::machine::{Chosen, Machine, OciOptions};
use super::network::{self, Helper};
use super::record::{OwnerRecord, Place, Record, recorded, runtime_state};
use super::runtime::{Runtime, RuntimeKind, Sealed};
use super::strays::Strays;
use crate::cgroup::{self, Usage, victims};
use crate::context::EngineContext;
use crate::engine::{Engine, EngineKind, Liveness, SnapshotMode, Stats};
use crate::error::EngineError;
use crate::image::ImageRef;
use crate::native::limits::{Enforcement, enforce};
use crate::native::plan;
use crate::native::record::cgroup_key;
use crate::native::trash::Trash;
use crate::programs::Programs;
use crate::rootfs::{RootMethod, Rootfs};
use crate::snapshot::Snapshots;
use crate::spec::{Network, SandboxSpec};
use crate::state::make_dir;
use crate::tree::CopyOptions;
use crate::watchdog::{Overrun, ProcessTree, Subject, Watchdog};
use async_trait::async_trait;
use skyrl_protocol::{SandboxId, SnapshotId};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// How long freezing may take.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// crun (or runc) on root file systems of the image store.
pub struct OciEngine {
    shared: Arc<Shared>,
}

struct Shared {
    context: EngineContext,
    /// The guest's program, sealed: one copy for all sandboxes, which none of
    /// them can change, and whose place on the host none of them can see.
    guest: Sealed,
    chosen: Chosen,
    key: String,
    snapshots: Snapshots,
    slots: Mutex<HashMap<SandboxId, Arc<Slot>>>,
    watchdog: Watchdog,
    overruns: Arc<Mutex<HashMap<SandboxId, Vec<Overrun>>>>,
    trash: Mutex<Trash>,
}

/// One sandbox. Work on it is done by whoever holds `state`, and goes on to
/// its end when the one who asked for it stops waiting.
#[derive(Default)]
struct Slot {
    state: Arc<AsyncMutex<State>>,
    /// A start in progress is to be given up.
    unwanted: AtomicBool,
}

#[derive(Default)]
struct State {
    record: Option<Record>,
    held: Enforcement,
    running: Option<Running>,
}

struct Running {
    init: Init,
    processes: ProcessTree,
    words: Option<Words>,
    helper: Option<Helper>,
    paused: bool,
}

/// Runs work that blocks to its end.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that is shutting down gives work up.
            Err(_) => std::future::pending().await,
        },
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OciEngine {
    /// Opens the engine for an owner.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] when no runtime works on this machine.
    pub async fn open(context: EngineContext) -> Result<Self, EngineError> {
        Self::open_with(context, OciOptions::default()).await
    }

    /// [`OciEngine::open`] with options.
    ///
    /// # Errors
    /// As [`OciEngine::open`].
    pub async fn open_with(
        context: EngineContext,
        options: OciOptions,
    ) -> Result<Self, EngineError> {
        let shared = blocking(move || Shared::open(context, &options)).await?;
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// In words: which runtime, and how roots are made.
    pub fn describe(&self) -> String {
        let chosen = &self.shared.chosen;
        format!(
            "{} {}, {}",
            chosen.runtime.kind, chosen.runtime.version, chosen.method
        )
    }

    /// Holds a sandbox's state and works on it where blocking is allowed.
    async fn with_state<T: Send + 'static>(
        &self,
        slot: &Slot,
        work: impl FnOnce(&Shared, &mut State) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let mut state: OwnedMutexGuard<State> = slot.state.clone().lock_owned().await;
        let shared = self.shared.clone();
        blocking(move || work(&shared, &mut state)).await
    }

    /// Work on a sandbox that exists.
    async fn with_running<T: Send + 'static>(
        &self,
        id: &SandboxId,
        work: impl FnOnce(&Shared, &Record, &mut Running) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let slot = self.shared.slot(id)?;
        let id = id.clone();
        self.with_state(&slot, move |shared, state| {
            match (&state.record, &mut state.running) {
                (Some(record), Some(running)) => work(shared, record, running),
                _ => Err(EngineError::NotFound(id)),
            }
        })
        .await
    }
}

impl Shared {
    fn open(context: EngineContext, options: &OciOptions) -> Result<Self, EngineError> {
        let owner = &context.owner;
        let programs = Programs {
            guest: context.guest.clone(),
            zygote: context.zygote.clone(),
        };
        let own = owner.engine(EngineKind::Oci);
        for dir in [&own, &runtime_state(owner)] {
            make_dir(dir)?;
        }
        let chosen = Machine::look(&programs, &own, options)?.choose()?;
        chosen.cgroups.claim()?;
        let mut group_parents = chosen.cgroups.parents();
        if chosen.runtime.kind == RuntimeKind::Runc {
            group_parents.extend(cgroup::own_groups());
        }
        OwnerRecord { group_parents }.write(owner)?;
        let overruns = Arc::<Mutex<HashMap<SandboxId, Vec<Overrun>>>>::default();
        let heard = overruns.clone();
        let watchdog = Watchdog::start(move |id, overrun| {
            locked(&heard).entry(id.clone()).or_default().push(overrun);
        })
        .map_err(|e| EngineError::step("starting", "the watchdog", e))?;
        Ok(Self {
            snapshots: Snapshots::open(owner.clone(), (*context.images).clone())?,
            trash: Mutex::new(Trash::open(own.join("trash"))?),
            key: cgroup_key(owner),
            slots: Mutex::default(),
            guest: Sealed::copy(&context.guest)?,
            chosen,
            watchdog,
            overruns,
            context,
        })
    }

    fn slot(&self, id: &SandboxId) -> Result<Arc<Slot>, EngineError> {
        locked(&self.slots)
            .get(id)
            .cloned()
            .ok_or_else(|| EngineError::NotFound(id.clone()))
    }

    fn new_slot(&self, id: &SandboxId) -> Result<Arc<Slot>, EngineError> {
        match locked(&self.slots).entry(id.clone()) {
            Entry::Occupied(_) => Err(EngineError::Exists(id.clone())),
            Entry::Vacant(vacant) => Ok(vacant.insert(Arc::default()).clone()),
        }
    }

    fn slot_or_new(&self, id: &SandboxId) -> Arc<Slot> {
        locked(&self.slots).entry(id.clone()).or_default().clone()
    }

    fn place<'a>(&'a self, id: &'a SandboxId) -> Place<'a> {
        Place {
            owner: &self.context.owner,
            id,
        }
    }

    fn launcher(&self, id: &SandboxId) -> Launcher<'_> {
        Launcher {
            zygote: &self.context.zygote,
            guest: &self.guest,
            runtime: &self.chosen.runtime,
            privileged: self.chosen.privileged,
            group_path: format!("skyrl-{}/{id}", self.key),
        }
    }

    fn create(&self, state: &mut State, record: Record, id: &SandboxId) -> Result<(), EngineError> {
        let place = self.place(id);
        make_dir(&place.dir())?;
        // Written before anything it names is made.
        record.write(&place)?;
        let record = state.record.insert(record);
        record.rootfs.create()?;
        if record.rootfs.method == RootMethod::Copy {
            record.disk_baseline = record.rootfs.size()?;
            record.write(&place)?;
        }
        record.group.create(&state.held.bounds)?;
        self.launcher(id).prepare(&place, record, &state.held)
    }

    fn start(
        &self,
        state: &mut State,
        id: &SandboxId,
        unwanted: &AtomicBool,
    ) -> Result<PathBuf, EngineError> {
        let place = self.place(id);
        let Some(record) = &mut state.record else {
            return Err(EngineError::NotFound(id.clone()));
        };
        if record.rootfs.method == RootMethod::FuseOverlay {
            record.rootfs.mount()?;
        }
        let Launched { init, words } = self.launcher(id).launch(&place, unwanted)?;
        record.init = Some(init.identity().clone());
        let processes = tree(&init)?;
        let running = state.running.insert(Running {
            init,
            processes,
            words: Some(words),
            helper: None,
            paused: false,
        });
        record.write(&place)?;
        if record.spec.network == Network::Nat {
            let helper = network::start(&place, &running.init, !self.chosen.privileged)?;
            record.helper = Some(helper.identity.clone());
            running.helper = Some(helper);
            record.write(&place)?;
        }
        self.watch(id, record, &state.held)?;
        Ok(place.socket())
    }

    fn watch(
        &self,
        id: &SandboxId,
        record: &Record,
        held: &Enforcement,
    ) -> Result<(), EngineError> {
        if held.watch.is_empty() {
            return Ok(());
        }
        let Some(init) = record.init.as_ref().and_then(Init::find) else {
            return Ok(());
        };
        self.watchdog.watch(Subject {
            id: id.clone(),
            processes: tree(&init)?,
            limits: held.watch,
            written: record.rootfs.written(),
            disk_baseline: record.disk_baseline,
        });
        Ok(())
    }

    /// Ends every process of a sandbox; its files stay.
    fn kill(&self, state: &mut State, id: &SandboxId) -> Result<(), EngineError> {
        self.watchdog.forget(id);
        let place = self.place(id);
        let late = || EngineError::Deadline {
            verb: "killing a sandbox",
            limit: KILL_LIMIT,
        };
        if let Some(record) = &state.record {
            record.group.kill();
        }
        match &mut state.running {
            Some(running) => {
                running.init.kill();
                if let Some(helper) = &mut running.helper {
                    let _ = helper.child.kill();
                    let _ = helper.child.wait();
                }
                if !running.init.ended_within(KILL_LIMIT) {
                    return Err(late());
                }
            }
            // Its start did not come to its end: nobody knows how far.
            None if !Strays::of_sandbox(place.owner, id).kill(KILL_LIMIT) => return Err(late()),
            None => {}
        }
        if let Some(record) = &state.record {
            for identity in record.init.iter().chain(&record.helper) {
                if let Some(process) = Init::find(identity) {
                    process.kill();
                    if !process.ended_within(KILL_LIMIT) {
                        return Err(late());
                    }
                }
            }
            record.group.remove(KILL_LIMIT)?;
            record.rootfs.unmount()?;
        }
        Ok(())
    }

    /// Removes what a dead sandbox left.
    fn clear(&self, state: &mut State, id: &SandboxId) -> Result<(), EngineError> {
        let place = self.place(id);
        let container = runtime_state(place.owner).join(id.as_str());
        let runc = state
            .record
            .as_ref()
            .is_some_and(|record| record.runtime == RuntimeKind::Runc);
        if runc && container.exists() {
            Runtime::delete(
                RuntimeKind::Runc,
                &runtime_state(place.owner),
                id.as_str(),
                KILL_LIMIT,
            )?;
        }
        let trash = locked(&self.trash);
        trash.take(&container)?;
        trash.take(&place.dir())?;
        drop(trash);
        self.context.images.unmark(self.context.owner.owner(), id)?;
        self.snapshots.release(id)?;
        locked(&self.overruns).remove(id);
        state.running = None;
        state.record = None;
        Ok(())
    }

    fn freeze(&self, record: &Record, running: &mut Running) -> Result<(), EngineError> {
        if record.group.can_freeze() {
            record
                .group
                .set_frozen(cgroup::group::Frozen::Yes, FREEZE_LIMIT)?;
        } else if !running.processes.stop(FREEZE_LIMIT) {
            running.processes.go_on();
            return Err(EngineError::Deadline {
                verb: "stopping a sandbox's processes",
                limit: FREEZE_LIMIT,
            });
        }
        running.paused = true;
        Ok(())
    }

    fn thaw(&self, record: &Record, running: &mut Running) -> Result<(), EngineError> {
        if record.group.can_freeze() {
            record
                .group
                .set_frozen(cgroup::group::Frozen::No, FREEZE_LIMIT)?;
        } else {
            running.processes.go_on();
        }
        running.paused = false;
        Ok(())
    }

    fn snapshot(
        &self,
        state: &mut State,
        id: &SandboxId,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        if mode == SnapshotMode::Consume {
            self.kill(state, id)?;
        }
        let Some(record) = &state.record else {
            return Err(EngineError::NotFound(id.clone()));
        };
        let written = record.rootfs.written();
        let freeze = || {
            self.snapshots.freeze(
                snapshot,
                &record.image,
                record.rootfs.source(&written),
                mode,
                CopyOptions::default(),
            )
        };
        match (mode, &mut state.running) {
            (SnapshotMode::Copy, Some(running)) if !running.paused => {
                self.freeze(record, running)?;
                let frozen = freeze();
                self.thaw(record, running)?;
                frozen?;
            }
            _ => freeze()?,
        }
        if mode == SnapshotMode::Consume {
            self.clear(state, id)?;
        }
        Ok(())
    }

    fn stats(
        &self,
        record: &Record,
        running: &Running,
        id: &SandboxId,
    ) -> Result<Stats, EngineError> {
        let Usage {
            cpu_seconds,
            memory_bytes,
            memory_peak_bytes,
            oom_kills,
            pids,
        } = record.group.usage();
        let overruns = locked(&self.overruns);
        let by_watchdog = overruns.get(id).map_or(0, |heard| {
            heard
                .iter()
                .filter(|overrun| matches!(overrun, Overrun::Memory { .. }))
                .count()
        });
        drop(overruns);
        let processes = if memory_bytes.is_none() || pids.is_none() {
            running.processes.processes()
        } else {
            Vec::new()
        };
        Ok(Stats {
            cpu_seconds: cpu_seconds.or_else(|| Some(running.processes.cpu_seconds())),
            memory_bytes: memory_bytes.or_else(|| {
                let used = processes.iter().map(|p| p.anonymous + p.shared);
                Some(used.sum())
            }),
            memory_peak_bytes,
            oom_kills: oom_kills + by_watchdog as u64,
            pids: pids.or_else(|| Some(processes.iter().map(|p| p.threads).sum())),
            disk_bytes: Some(record.rootfs.size()?.saturating_sub(record.disk_baseline)),
        })
    }

    fn liveness(&self, record: &Record, running: &Running, id: &SandboxId) -> Liveness {
        if !running.init.ended_within(Duration::ZERO) {
            return if running.paused || record.group.is_frozen() {
                Liveness::Paused
            } else {
                Liveness::Running
            };
        }
        Liveness::Ended {
            cause: self.cause(record, running, id),
        }
    }

    fn cause(&self, record: &Record, running: &Running, id: &SandboxId) -> String {
        let overruns = locked(&self.overruns).get(id).cloned().unwrap_or_default();
        let last = overruns.last();
        let mut cause = if let Some(Overrun::Disk { bytes }) = last {
            format!("it wrote {bytes} bytes, more than its disk limit")
        } else if record.group.usage().oom_kills > 0 {
            out_of_memory(record)
        } else if let Some(Overrun::Memory { victim, .. }) = last {
            format!("out of memory: {} was killed", victim.name)
        } else {
            match running.init.exit_status() {
                Some(status) => match (status.code(), status.signal()) {
                    (Some(code), _) => format!("its guest ended with exit code {code}"),
                    (None, Some(signal)) => format!("its guest was killed by signal {signal}"),
                    (None, None) => "its guest ended".into(),
                },
                None => "its guest ended".into(),
            }
        };
        if let Some(said) = running.words.as_ref().map(Words::text)
            && !said.is_empty()
        {
            cause.push_str("; it said: ");
            cause.push_str(&said);
        }
        cause
    }

    fn adopt(&self, id: &SandboxId) -> Option<(SandboxId, PathBuf)> {
        let place = self.place(id);
        let record = Record::read(&place)?;
        let held = self.held(&record.spec).ok()?;
        let slot = self.slot_or_new(id);
        let mut state = slot.state.try_lock().ok()?;
        let init = record.init.as_ref().and_then(Init::find);
        let running = init.and_then(|init| {
            Some(Running {
                processes: tree(&init).ok()?,
                init,
                words: None,
                helper: None,
                paused: record.group.is_frozen(),
            })
        });
        let lives = running.is_some();
        if lives {
            self.watch(id, &record, &held).ok()?;
        }
        *state = State {
            record: Some(record),
            held,
            running,
        };
        lives.then(|| (id.clone(), place.socket()))
    }

    fn held(&self, spec: &SandboxSpec) -> Result<Enforcement, EngineError> {
        enforce(
            EngineKind::Oci,
            &spec.limits,
            &self.chosen.cgroups,
            self.chosen.kernel,
        )
    }
}

fn tree(init: &Init) -> Result<ProcessTree, EngineError> {
    ProcessTree::open(init.pid())
        .map_err(|e| EngineError::step("taking hold of process", init.pid(), e.into()))
}

fn out_of_memory(record: &Record) -> String {
    let names: Vec<String> = record
        .group
        .memory_directory()
        .map(victims)
        .unwrap_or_default()
        .into_iter()
        .map(|victim| victim.name)
        .collect();
    if names.is_empty() {
        "out of memory".into()
    } else {
        format!("out of memory: {} was killed", names.join(", "))
    }
}

#[async_trait]
impl Engine for OciEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Oci
    }

    async fn create(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), EngineError> {
        let shared = &self.shared;
        plan::check(spec, id)?;
        let held = shared.held(spec)?;
        crate::native::network::plan(EngineKind::Oci, spec.network, !shared.chosen.privileged)?;
        let slot = shared.new_slot(id)?;
        let owner = shared.context.owner.owner();
        let image = match &spec.image {
            ImageRef::Snapshot(snapshot) => {
                let (own, snapshot, id) = (shared.clone(), snapshot.clone(), id.clone());
                blocking(move || Ok(own.snapshots.acquire(&snapshot, &id)?)).await?
            }
            image => {
                let context = &shared.context;
                let image = context
                    .images
                    .ensure(image, spec.pull, &*context.progress)
                    .await?;
                context.images.mark_used(&image, owner, id)?;
                image
            }
        };
        let record = Record {
            spec: spec.clone(),
            runtime: shared.chosen.runtime.kind,
            rootfs: Rootfs::plan(
                shared.chosen.method,
                image.layers.clone(),
                &shared.place(id).dir(),
            ),
            group: shared.chosen.cgroups.plan(&shared.key, id.as_str()),
            image,
            disk_baseline: 0,
            init: None,
            helper: None,
        };
        let id = id.clone();
        self.with_state(&slot, move |shared, state| {
            state.held = held;
            shared.create(state, record, &id)
        })
        .await
    }

    async fn start(&self, id: &SandboxId) -> Result<PathBuf, EngineError> {
        let slot = self.shared.slot(id)?;
        let (id, own) = (id.clone(), slot.clone());
        self.with_state(&slot, move |shared, state| {
            shared.start(state, &id, &own.unwanted)
        })
        .await
    }

    async fn pause(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.with_running(id, |shared, record, running| shared.freeze(record, running))
            .await
    }

    async fn resume(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.with_running(id, |shared, record, running| shared.thaw(record, running))
            .await
    }

    async fn stats(&self, id: &SandboxId) -> Result<Stats, EngineError> {
        let own = id.clone();
        self.with_running(id, move |shared, record, running| {
            shared.stats(record, running, &own)
        })
        .await
    }

    async fn liveness(&self, id: &SandboxId) -> Result<Liveness, EngineError> {
        let own = id.clone();
        self.with_running(id, move |shared, record, running| {
            Ok(shared.liveness(record, running, &own))
        })
        .await
    }

    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        let slot = self.shared.slot(id)?;
        let (own, snapshot) = (id.clone(), snapshot.clone());
        self.with_state(&slot, move |shared, state| {
            shared.snapshot(state, &own, &snapshot, mode)
        })
        .await?;
        if mode == SnapshotMode::Consume {
            locked(&self.shared.slots).remove(id);
        }
        Ok(())
    }

    async fn remove_snapshot(&self, snapshot: &SnapshotId) -> Result<(), EngineError> {
        let (shared, snapshot) = (self.shared.clone(), snapshot.clone());
        blocking(move || Ok(shared.snapshots.remove(&snapshot)?)).await
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), EngineError> {
        let slot = self.shared.slot_or_new(id);
        slot.unwanted.store(true, Ordering::Relaxed);
        let own = id.clone();
        self.with_state(&slot, move |shared, state| {
            if state.record.is_none() {
                // Of an earlier process of this owner, or interrupted early.
                state.record = Record::read(&shared.place(&own));
            }
            shared.kill(state, &own)?;
            shared.clear(state, &own)
        })
        .await?;
        locked(&self.shared.slots).remove(id);
        Ok(())
    }

    async fn adopt(&self) -> Result<Vec<(SandboxId, PathBuf)>, EngineError> {
        let shared = self.shared.clone();
        blocking(move || {
            let known = recorded(&shared.context.owner);
            Ok(known.iter().filter_map(|id| shared.adopt(id)).collect())
        })
        .await
    }

    async fn shutdown(&self) -> Result<(), EngineError> {
        let shared = self.shared.clone();
        let ids: Vec<SandboxId> = locked(&shared.slots).keys().cloned().collect();
        for id in ids {
            self.destroy(&id).await?;
        }
        blocking(move || {
            let parents = OwnerRecord::read(&shared.context.owner)
                .map(|record| record.group_parents)
                .unwrap_or_default();
            locked(&shared.trash).finish();
            Ok(cgroup::group::sweep(&parents, &shared.key, KILL_LIMIT)?)
        })
        .await
    }
}
