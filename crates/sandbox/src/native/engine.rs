//! The verbs.

use super::entry::Entry;
use super::limits::{Enforcement, enforce};
use super::link::{Link, News, ZygotePlace, blocking};
use super::machine::Machine;
use super::plan;
use super::record::{Record, cgroup_key, recorded, socket, write_json};
use super::sweep::CGROUP_PARENTS;
use super::trash::Trash;
use crate::cgroup::Cgroups;
use crate::cgroup::group::Frozen;
use crate::context::EngineContext;
use crate::engine::{Engine, EngineKind, Liveness, SnapshotMode, Stats};
use crate::error::EngineError;
use crate::image::{Image, ImageRef, ImageStore};
use crate::rootfs::{RootMethod, Rootfs};
use crate::snapshot::Snapshots;
use crate::spec::SandboxSpec;
use crate::state::{OwnerDir, make_dir};
use crate::tree::CopyOptions;
use crate::watchdog::{Overrun, ProcessTree, Subject, Watchdog};
use async_trait::async_trait;
use skyrl_protocol::{SandboxId, SnapshotId};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How long freezing may take.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// How long the kernel may take to let go of a dead sandbox's groups.
const GROUP_LIMIT: Duration = Duration::from_secs(10);

/// How the engine is to work; the default fits.
#[derive(Debug, Clone)]
pub struct NativeOptions {
    /// How long sandboxes outlive an owner that vanished.
    pub grace: Duration,
    /// How roots are made; the best way when absent.
    pub root: Option<RootMethod>,
    /// Leave control groups alone even where they could be made.
    pub without_cgroups: bool,
}

impl Default for NativeOptions {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(30),
            root: None,
            without_cgroups: false,
        }
    }
}

/// Sandboxes of one owner, made of namespaces.
pub struct NativeEngine {
    context: EngineContext,
    machine: Machine,
    root_method: RootMethod,
    cgroup_key: String,
    place: ZygotePlace,
    link: tokio::sync::Mutex<Option<Arc<Link>>>,
    books: Arc<Books>,
    snapshots: Arc<Snapshots>,
    watchdog: Watchdog,
    trash: Arc<Mutex<Trash>>,
}

/// The sandboxes this process knows.
#[derive(Debug, Default)]
struct Books {
    entries: Mutex<HashMap<SandboxId, Arc<Entry>>>,
}

impl Books {
    fn entries(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Entry>>> {
        lock(&self.entries)
    }

    fn find(&self, id: &SandboxId) -> Option<Arc<Entry>> {
        self.entries().get(id).cloned()
    }
}

impl NativeEngine {
    /// Opens the engine for an owner.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] where it can't work, with the reason.
    pub async fn open(context: EngineContext) -> Result<Self, EngineError> {
        Self::open_with(context, NativeOptions::default()).await
    }

    /// [`NativeEngine::open`] with options.
    ///
    /// # Errors
    /// As [`NativeEngine::open`].
    pub async fn open_with(
        context: EngineContext,
        options: NativeOptions,
    ) -> Result<Self, EngineError> {
        blocking(move || Self::open_blocking(context, &options)).await
    }

    fn open_blocking(context: EngineContext, options: &NativeOptions) -> Result<Self, EngineError> {
        let dir = context.owner.engine(EngineKind::Native);
        make_dir(&dir)?;
        let mut machine = Machine::look(&context.zygote, &dir)?;
        if options.without_cgroups {
            machine.cgroups = Cgroups::unavailable("control groups are switched off");
        }
        let report = machine.report();
        if !report.usable {
            return Err(report.refusal());
        }
        let (root_method, why) =
            machine
                .root_method(options.root)
                .map_err(|reason| EngineError::Unusable {
                    engine: EngineKind::Native,
                    reason,
                    hint: "`skyrl sandbox probe` shows which ways of making a root work".into(),
                })?;
        tracing::debug!(%root_method, why, "opened the native engine");
        // Recorded before any is made.
        write_json(&dir.join(CGROUP_PARENTS), &machine.cgroups.parents())?;
        machine.cgroups.claim()?;
        let books = Arc::<Books>::default();
        let watched = Arc::clone(&books);
        let watchdog = Watchdog::start(move |id, overrun| tell(&watched, id, overrun))
            .map_err(|e| EngineError::step("starting", "the watchdog", e))?;
        let store = (*context.images).clone();
        Ok(Self {
            place: ZygotePlace {
                program: context.zygote.clone(),
                guest: context.guest.clone(),
                grace: options.grace,
                dir: dir.clone(),
            },
            snapshots: Arc::new(Snapshots::open(Arc::clone(&context.owner), store)?),
            trash: Arc::new(Mutex::new(Trash::open(dir.join("trash"))?)),
            cgroup_key: cgroup_key(&context.owner),
            link: tokio::sync::Mutex::new(None),
            context,
            machine,
            root_method,
            books,
            watchdog,
        })
    }

    fn entry(&self, id: &SandboxId) -> Result<Arc<Entry>, EngineError> {
        self.books
            .find(id)
            .ok_or_else(|| EngineError::NotFound(id.clone()))
    }

    fn user_namespace(&self) -> bool {
        self.machine.kernel().user_namespace
    }

    fn enforcement(&self, spec: &SandboxSpec) -> Result<Enforcement, EngineError> {
        enforce(
            EngineKind::Native,
            &spec.limits,
            &self.machine.cgroups,
            self.machine.kernel(),
        )
    }

    /// What the zygote says unasked ends up in the books.
    fn news(&self) -> impl Fn(News) + Send + Sync + 'static {
        let books: Weak<Books> = Arc::downgrade(&self.books);
        move |news| match news {
            News::Exited { id, status, output } => {
                if let Some(entry) = books.upgrade().and_then(|books| books.find(&id)) {
                    entry.exited(status, &output);
                }
            }
            News::Gone => tracing::debug!("the zygote is gone"),
        }
    }

    /// The zygote, found or started.
    async fn link(&self) -> Result<Arc<Link>, EngineError> {
        let mut held = self.link.lock().await;
        if let Some(link) = held.as_ref().filter(|link| link.is_open()) {
            return Ok(Arc::clone(link));
        }
        let link = match self.place.find(self.news()).await? {
            Some(link) => link,
            None => self.place.start(self.news()).await?,
        };
        Ok(Arc::clone(held.insert(Arc::new(link))))
    }

    /// The zygote, if one runs.
    async fn running_link(&self) -> Result<Option<Arc<Link>>, EngineError> {
        let mut held = self.link.lock().await;
        if let Some(link) = held.as_ref().filter(|link| link.is_open()) {
            return Ok(Some(Arc::clone(link)));
        }
        let found = self.place.find(self.news()).await?.map(Arc::new);
        held.clone_from(&found);
        Ok(found)
    }

    async fn image(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<Image, EngineError> {
        if let ImageRef::Snapshot(snapshot) = &spec.image {
            let (snapshots, snapshot, id) =
                (Arc::clone(&self.snapshots), snapshot.clone(), id.clone());
            return blocking(move || Ok(snapshots.acquire(&snapshot, &id)?)).await;
        }
        let images = Arc::clone(&self.context.images);
        let image = images
            .ensure(&spec.image, spec.pull, self.context.progress.as_ref())
            .await?;
        let (owner, id) = (self.context.owner.owner().clone(), id.clone());
        blocking(move || {
            images.mark_used(&image, &owner, &id)?;
            Ok(image)
        })
        .await
    }

    async fn prepare(&self, entry: &Arc<Entry>) -> Result<(), EngineError> {
        let mut record = entry.record();
        let bounds = self.enforcement(&record.spec)?.bounds;
        let (owner, entry) = (Arc::clone(&self.context.owner), Arc::clone(entry));
        blocking(move || {
            record.rootfs.create()?;
            record.rootfs.mount_outside()?;
            record.group.create(&bounds)?;
            if record.rootfs.method == RootMethod::Copy {
                record.disk_baseline = record.rootfs.size()?;
                record.write(&owner, &entry.id)?;
                entry.prepared(record);
            }
            Ok(())
        })
        .await
    }

    /// Removes all that is left of a sandbox whose processes are gone.
    async fn clear(&self, id: &SandboxId, record: Record) -> Result<(), EngineError> {
        let owner = Arc::clone(&self.context.owner);
        let images = Arc::clone(&self.context.images);
        let snapshots = Arc::clone(&self.snapshots);
        let trash = Arc::clone(&self.trash);
        let id = id.clone();
        blocking(move || {
            record.rootfs.unmount()?;
            record.group.remove(GROUP_LIMIT)?;
            lock(&trash).take(&owner.sandbox(&id))?;
            release(&owner, &images, &snapshots, &id)
        })
        .await
    }

    /// Gives up what [`NativeEngine::image`] took.
    async fn release_image(&self, id: &SandboxId) -> Result<(), EngineError> {
        let owner = Arc::clone(&self.context.owner);
        let images = Arc::clone(&self.context.images);
        let snapshots = Arc::clone(&self.snapshots);
        let id = id.clone();
        blocking(move || release(&owner, &images, &snapshots, &id)).await
    }

    /// Ends a sandbox's processes; returns when they are gone.
    async fn stop(&self, id: &SandboxId, record: &Record) -> Result<(), EngineError> {
        self.watchdog.forget(id);
        if record.process.is_none() && self.books.find(id).is_none_or(|e| e.processes().is_none()) {
            return Ok(());
        }
        match self.running_link().await? {
            Some(link) => link.stop(id).await,
            None => {
                let process = record.process.clone();
                blocking(move || match process {
                    Some(process) => super::sweep::kill(&process, GROUP_LIMIT),
                    None => Ok(()),
                })
                .await
            }
        }
    }

    fn watch(&self, entry: &Entry, record: &Record, pid: i32) -> Result<(), EngineError> {
        let held = self.enforcement(&record.spec)?;
        if held.watch.is_empty() {
            return Ok(());
        }
        self.watchdog.watch(Subject {
            id: entry.id.clone(),
            processes: processes(pid)?,
            limits: held.watch,
            written: record.rootfs.written(),
            disk_baseline: record.disk_baseline,
        });
        Ok(())
    }

    async fn set_paused(&self, id: &SandboxId, frozen: Frozen) -> Result<(), EngineError> {
        let entry = self.entry(id)?;
        let _turn = entry.verb.lock().await;
        let processes = entry.running()?;
        let group = entry.record().group;
        let own = Arc::clone(&entry);
        blocking(move || {
            if group.can_freeze() {
                return Ok(group.set_frozen(frozen, FREEZE_LIMIT)?);
            }
            if frozen == Frozen::No {
                processes.go_on();
            } else if !processes.stop(FREEZE_LIMIT) {
                processes.go_on();
                return Err(EngineError::Deadline {
                    verb: "stopping a sandbox's processes",
                    limit: FREEZE_LIMIT,
                });
            }
            own.set_stopped(frozen == Frozen::Yes);
            Ok(())
        })
        .await
    }

    async fn copy_snapshot(&self, entry: &Entry, snapshot: &SnapshotId) -> Result<(), EngineError> {
        let paused_before = entry.liveness() == Liveness::Paused;
        if !paused_before && entry.liveness() == Liveness::Running {
            self.pause(&entry.id).await?;
        }
        let frozen = self
            .freeze_files(entry.record(), snapshot, SnapshotMode::Copy)
            .await;
        if !paused_before && entry.liveness() == Liveness::Paused {
            self.resume(&entry.id).await?;
        }
        frozen
    }

    async fn freeze_files(
        &self,
        record: Record,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        let (snapshots, snapshot) = (Arc::clone(&self.snapshots), snapshot.clone());
        blocking(move || {
            let written = record.rootfs.written();
            let source = record.rootfs.source(&written);
            let options = CopyOptions::default();
            Ok(snapshots.freeze(&snapshot, &record.image, source, mode, options)?)
        })
        .await
    }
}

/// Writes down what the watchdog did.
fn tell(books: &Books, id: &SandboxId, overrun: Overrun) {
    tracing::info!(%id, ?overrun, "a sandbox went over a limit");
    if let Some(entry) = books.find(id) {
        entry.overrun(overrun);
    }
}

fn release(
    owner: &OwnerDir,
    images: &ImageStore,
    snapshots: &Snapshots,
    id: &SandboxId,
) -> Result<(), EngineError> {
    images.unmark(owner.owner(), id)?;
    Ok(snapshots.release(id)?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn processes(pid: i32) -> Result<ProcessTree, EngineError> {
    ProcessTree::open(pid).map_err(|e| EngineError::step("watching process", pid, e.into()))
}

#[async_trait]
impl Engine for NativeEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Native
    }

    async fn create(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), EngineError> {
        plan::check(spec, id)?;
        self.enforcement(spec)?;
        super::network::plan(EngineKind::Native, spec.network, self.user_namespace())?;
        let dir = self.context.owner.sandbox(id);
        if self.books.find(id).is_some() {
            return Err(EngineError::Exists(id.clone()));
        }
        let image = self.image(id, spec).await?;
        let record = Record {
            spec: spec.clone(),
            rootfs: Rootfs::plan(self.root_method, image.layers.clone(), &dir),
            group: self.machine.cgroups.plan(&self.cgroup_key, id.as_str()),
            image,
            disk_baseline: 0,
            process: None,
        };
        if let Err(error) = make_dir(&dir).and_then(|()| record.write(&self.context.owner, id)) {
            self.release_image(id).await?;
            return Err(error);
        }
        let entry = Arc::new(Entry::new(id.clone(), record));
        self.books.entries().insert(id.clone(), Arc::clone(&entry));
        if let Err(error) = self.prepare(&entry).await {
            self.destroy(id).await?;
            return Err(error);
        }
        Ok(())
    }

    async fn start(&self, id: &SandboxId) -> Result<PathBuf, EngineError> {
        let entry = self.entry(id)?;
        let _turn = entry.verb.lock().await;
        let record = entry.record();
        let held = self.enforcement(&record.spec)?;
        let owner = &self.context.owner;
        let plan = plan::start(owner, id, &record, &held, self.user_namespace())?;
        let link = self.link().await?;
        entry.starting();
        let pid = link.start(plan).await?;
        // A guest that ended at once is not there to be watched.
        let Ok(tree) = processes(pid) else {
            return entry.running().map(|_| socket(owner, id));
        };
        let record = entry.started(Arc::new(tree), pid);
        record.write(owner, id)?;
        self.watch(&entry, &record, pid)?;
        Ok(socket(owner, id))
    }

    async fn pause(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.set_paused(id, Frozen::Yes).await
    }

    async fn resume(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.set_paused(id, Frozen::No).await
    }

    async fn stats(&self, id: &SandboxId) -> Result<Stats, EngineError> {
        let entry = self.entry(id)?;
        blocking(move || entry.stats()).await
    }

    async fn liveness(&self, id: &SandboxId) -> Result<Liveness, EngineError> {
        Ok(self.entry(id)?.liveness())
    }

    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        let entry = self.entry(id)?;
        match mode {
            SnapshotMode::Copy => self.copy_snapshot(&entry, snapshot).await,
            SnapshotMode::Consume => {
                let record = entry.record();
                {
                    let _turn = entry.verb.lock().await;
                    self.stop(id, &record).await?;
                    record.rootfs.unmount()?;
                }
                self.freeze_files(record, snapshot, mode).await?;
                self.destroy(id).await
            }
        }
    }

    async fn remove_snapshot(&self, snapshot: &SnapshotId) -> Result<(), EngineError> {
        let (snapshots, snapshot) = (Arc::clone(&self.snapshots), snapshot.clone());
        blocking(move || Ok(snapshots.remove(&snapshot)?)).await
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), EngineError> {
        let owner = &self.context.owner;
        let entry = self.books.find(id);
        let record = match &entry {
            Some(entry) => Some(entry.record()),
            None => Record::read(owner, id),
        };
        let Some(record) = record else {
            return Ok(());
        };
        let _turn = match &entry {
            Some(entry) => Some(entry.verb.lock().await),
            None => None,
        };
        self.stop(id, &record).await?;
        self.clear(id, record).await?;
        self.books.entries().remove(id);
        Ok(())
    }

    async fn adopt(&self) -> Result<Vec<(SandboxId, PathBuf)>, EngineError> {
        let owner = &self.context.owner;
        let living: HashMap<SandboxId, i32> = match self.running_link().await? {
            Some(link) => link.list().await?.into_iter().collect(),
            None => HashMap::new(),
        };
        let mut adopted = Vec::new();
        for id in recorded(owner) {
            let record = Record::read(owner, &id);
            match (record, living.get(&id)) {
                (Some(record), Some(pid)) => {
                    let entry = Arc::new(Entry::new(id.clone(), record));
                    let record = entry.started(Arc::new(processes(*pid)?), *pid);
                    self.watch(&entry, &record, *pid)?;
                    self.books.entries().insert(id.clone(), entry);
                    adopted.push((id.clone(), socket(owner, &id)));
                }
                _ => self.destroy(&id).await?,
            }
        }
        // Without a record nobody could ever find them again.
        if let Some(link) = self.running_link().await? {
            for id in living.keys() {
                if self.books.find(id).is_none() {
                    link.stop(id).await?;
                }
            }
        }
        Ok(adopted)
    }

    async fn shutdown(&self) -> Result<(), EngineError> {
        let ids: Vec<SandboxId> = self.books.entries().keys().cloned().collect();
        for id in ids {
            self.destroy(&id).await?;
        }
        if let Some(link) = self.running_link().await? {
            link.shutdown().await?;
        }
        let parents = self.machine.cgroups.parents();
        let key = self.cgroup_key.clone();
        let trash = Arc::clone(&self.trash);
        blocking(move || {
            lock(&trash).finish();
            Ok(crate::cgroup::group::sweep(&parents, &key, GROUP_LIMIT)?)
        })
        .await
    }
}
