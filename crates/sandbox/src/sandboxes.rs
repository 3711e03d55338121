//! What callers hold: the sandboxes of one owner, whichever engine makes them.
//!
//! Everything engines have in common happens here, once: ids are unique, verbs
//! on one sandbox never run at the same time, each verb has a deadline and
//! goes on to a clean end even when its caller stops waiting, a failed start
//! leaves nothing, guests are kept alive by leases, and old age is enforced.

mod keeper;
mod open;
mod record;

pub use record::SandboxRecord;

use crate::context::EngineContext;
use crate::engine::{Engine, EngineKind, Liveness, SnapshotMode, Stats};
use crate::error::EngineError;
use crate::guest_client::GuestClient;
use crate::image::{ImageRef, ImageStore, Progress, Quiet};
use crate::programs::Programs;
use crate::prune;
use crate::spec::SandboxSpec;
use crate::state::{OwnerLock, StateDir};
use skyrl_protocol::{OwnerId, SandboxId, SnapshotId};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// How long each verb may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Making a sandbox, the pull of its image included.
    pub create: Duration,
    /// From there until its guest answers.
    pub start: Duration,
    /// Pausing, resuming, asking.
    pub quick: Duration,
    /// Freezing files.
    pub snapshot: Duration,
    /// Removing a sandbox.
    pub destroy: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            create: Duration::from_secs(30 * 60),
            start: Duration::from_secs(60),
            quick: Duration::from_secs(20),
            snapshot: Duration::from_secs(10 * 60),
            destroy: Duration::from_secs(60),
        }
    }
}

/// How to open the sandboxes of an owner.
#[derive(Clone)]
pub struct Options {
    /// Node-local state directory.
    pub state: PathBuf,
    /// Who owns what is started. An owner name used before takes over what an
    /// earlier process left.
    pub owner: OwnerId,
    /// Which engine; absent: the best that works here.
    pub engine: Option<EngineKind>,
    /// Bytes the image store may use before unused images are dropped.
    pub image_quota: Option<u64>,
    /// How long sandboxes outlive this process.
    pub lease: Duration,
    /// Deadlines of the verbs.
    pub deadlines: Deadlines,
    /// Hears how far the pull of an image is.
    pub progress: Arc<dyn Progress>,
}

impl Options {
    /// Defaults for an owner in a state directory.
    pub fn new(state: impl Into<PathBuf>, owner: OwnerId) -> Self {
        Self {
            state: state.into(),
            owner,
            engine: None,
            image_quota: None,
            lease: Duration::from_secs(120),
            deadlines: Deadlines::default(),
            progress: Arc::new(Quiet),
        }
    }
}

/// A running sandbox.
#[derive(Clone)]
pub struct Sandbox {
    /// Its guest, through which all work in it goes.
    pub guest: GuestClient,
    /// What it was made from.
    pub spec: Arc<SandboxSpec>,
    /// When its guest answered first.
    pub ready: SystemTime,
}

/// The sandboxes of one owner.
pub struct Sandboxes {
    shared: Arc<Shared>,
    keeper: tokio::task::JoinHandle<()>,
    pruner: tokio::task::JoinHandle<()>,
    lock: OwnerLock,
    adopted: Vec<SandboxId>,
    why: String,
}

struct Shared {
    engine: Box<dyn Engine>,
    images: Arc<ImageStore>,
    dir: Arc<crate::state::OwnerDir>,
    entries: Mutex<HashMap<SandboxId, Arc<Entry>>>,
    deadlines: Deadlines,
    lease: Duration,
}

struct Entry {
    spec: Arc<SandboxSpec>,
    /// When its guest answered first: its age counts from there, not from the
    /// pull of its image.
    ready: OnceLock<SystemTime>,
    /// Held while a verb works on the sandbox.
    verb: tokio::sync::Mutex<()>,
    phase: Mutex<Phase>,
    /// Tells a start in progress that nobody wants it any more.
    unwanted: watch::Sender<bool>,
}

#[derive(Clone)]
enum Phase {
    Starting,
    Running(GuestClient),
    Paused(GuestClient),
    Gone,
}

impl Entry {
    fn new(spec: SandboxSpec, phase: Phase) -> Arc<Self> {
        Arc::new(Self {
            spec: Arc::new(spec),
            ready: OnceLock::new(),
            verb: tokio::sync::Mutex::new(()),
            phase: Mutex::new(phase),
            unwanted: watch::Sender::new(false),
        })
    }

    fn ready(&self) -> SystemTime {
        *self.ready.get_or_init(SystemTime::now)
    }

    fn phase(&self) -> Phase {
        locked(&self.phase).clone()
    }

    fn set_phase(&self, phase: Phase) {
        *locked(&self.phase) = phase;
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

impl Sandboxes {
    /// Becomes the owner: installs the static programs, takes over living
    /// sandboxes of an earlier process of this owner, removes half-made ones,
    /// and clears what dead owners left (in the background).
    ///
    /// # Errors
    /// [`EngineError::State`] when the owner lives in another process or the
    /// directory is unfit, [`EngineError::Unusable`] when the engine is.
    pub async fn open(options: Options) -> Result<Self, EngineError> {
        let state = StateDir::open(&options.state)?;
        let lock = state.lock_owner(&options.owner)?;
        let programs = Programs::install(&state.programs())?;
        let images = Arc::new(ImageStore::open(&state.images(), options.image_quota)?);
        let context = EngineContext {
            owner: lock.dir().clone(),
            images: images.clone(),
            progress: options.progress,
            guest: programs.guest,
            zygote: programs.zygote,
        };
        let (engine, why) = open::open_engine(options.engine, &state, context).await?;
        let shared = Arc::new(Shared {
            engine,
            images,
            dir: lock.dir().clone(),
            entries: Mutex::new(HashMap::new()),
            deadlines: options.deadlines,
            lease: options.lease,
        });
        let adopted = shared.adopt().await?;
        let keeper = tokio::spawn(keeper::keep(Arc::downgrade(&shared)));
        let pruner = tokio::spawn(async move {
            if let Err(error) = prune::dead_owners(&state).await {
                tracing::warn!(%error, "what dead owners left could not be removed");
            }
        });
        Ok(Self {
            shared,
            keeper,
            pruner,
            lock,
            adopted,
            why,
        })
    }

    /// The engine in use.
    pub fn engine(&self) -> EngineKind {
        self.shared.engine.kind()
    }

    /// Why this engine was chosen, in words.
    pub fn engine_reason(&self) -> &str {
        &self.why
    }

    /// The image store.
    pub fn images(&self) -> &Arc<ImageStore> {
        &self.shared.images
    }

    /// Sandboxes taken over from an earlier process.
    pub fn adopted(&self) -> &[SandboxId] {
        &self.adopted
    }

    /// Starts a sandbox and waits until its guest answers. When it fails, or
    /// when [`Sandboxes::destroy`] comes meanwhile, nothing of it remains.
    ///
    /// # Errors
    /// [`EngineError::Exists`] when the id is in use, else what went wrong.
    pub async fn start(&self, id: SandboxId, spec: SandboxSpec) -> Result<Sandbox, EngineError> {
        let entry = Entry::new(spec, Phase::Starting);
        {
            let mut entries = locked(&self.shared.entries);
            if entries.contains_key(&id) {
                return Err(EngineError::Exists(id));
            }
            entries.insert(id.clone(), entry.clone());
        }
        let shared = self.shared.clone();
        detached(
            self.engine(),
            async move { shared.bring_up(&id, &entry).await },
        )
        .await
    }

    /// A sandbox by id, if it runs or is paused.
    pub fn get(&self, id: &SandboxId) -> Option<Sandbox> {
        let entry = locked(&self.shared.entries).get(id).cloned()?;
        match entry.phase() {
            Phase::Running(guest) | Phase::Paused(guest) => Some(Sandbox {
                guest,
                spec: entry.spec.clone(),
                ready: entry.ready(),
            }),
            Phase::Starting | Phase::Gone => None,
        }
    }

    /// Ids of all sandboxes, those still starting included.
    pub fn ids(&self) -> Vec<SandboxId> {
        let mut ids: Vec<_> = locked(&self.shared.entries).keys().cloned().collect();
        ids.sort();
        ids
    }

    /// Freezes all processes of a sandbox.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], or what went wrong.
    pub async fn pause(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.verb(
            id,
            "pause",
            self.shared.deadlines.quick,
            |shared, id, entry| async move {
                if let Phase::Running(guest) = entry.phase() {
                    shared.engine.pause(&id).await?;
                    entry.set_phase(Phase::Paused(guest));
                }
                Ok(())
            },
        )
        .await
    }

    /// Thaws them.
    ///
    /// # Errors
    /// As for [`Sandboxes::pause`].
    pub async fn resume(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.verb(
            id,
            "resume",
            self.shared.deadlines.quick,
            |shared, id, entry| async move {
                if let Phase::Paused(guest) = entry.phase() {
                    shared.engine.resume(&id).await?;
                    entry.set_phase(Phase::Running(guest));
                }
                Ok(())
            },
        )
        .await
    }

    /// What a sandbox uses.
    ///
    /// # Errors
    /// As for [`Sandboxes::pause`].
    pub async fn stats(&self, id: &SandboxId) -> Result<Stats, EngineError> {
        self.question(id, "stats", self.shared.engine.stats(id))
            .await
    }

    /// Whether a sandbox lives.
    ///
    /// # Errors
    /// As for [`Sandboxes::pause`].
    pub async fn liveness(&self, id: &SandboxId) -> Result<Liveness, EngineError> {
        self.question(id, "liveness", self.shared.engine.liveness(id))
            .await
    }

    /// Freezes a sandbox's files under a name that
    /// [`ImageRef::Snapshot`] then starts from.
    ///
    /// # Errors
    /// As for [`Sandboxes::pause`].
    pub async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        let snapshot = snapshot.clone();
        self.verb(
            id,
            "snapshot",
            self.shared.deadlines.snapshot,
            move |shared, id, entry| async move {
                shared.engine.snapshot(&id, &snapshot, mode).await?;
                if mode == SnapshotMode::Consume {
                    shared.forget(&id, &entry);
                }
                Ok(())
            },
        )
        .await
    }

    /// Forgets a snapshot; its files go with the last sandbox that uses them.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn remove_snapshot(&self, snapshot: &SnapshotId) -> Result<(), EngineError> {
        within(
            "removing a snapshot",
            self.shared.deadlines.destroy,
            self.shared.engine.remove_snapshot(snapshot),
        )
        .await
    }

    /// Starts copies of a prepared sandbox: its files are frozen once
    /// (`mode`), and each of `ids` starts from them with the same settings.
    /// On failure none of the copies remains.
    ///
    /// # Errors
    /// What went wrong with the snapshot or the first start that failed.
    pub async fn fork(
        &self,
        source: &SandboxId,
        ids: Vec<SandboxId>,
        mode: SnapshotMode,
    ) -> Result<Vec<Sandbox>, EngineError> {
        let spec = self
            .get(source)
            .ok_or_else(|| EngineError::NotFound(source.clone()))?
            .spec;
        let snapshot = fresh_snapshot_id(source)?;
        self.snapshot(source, &snapshot, mode).await?;
        let spec = SandboxSpec {
            image: ImageRef::Snapshot(snapshot.clone()),
            ..(*spec).clone()
        };
        let mut started = Vec::with_capacity(ids.len());
        let mut failure = None;
        for id in ids {
            match self.start(id.clone(), spec.clone()).await {
                Ok(sandbox) => started.push(sandbox),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        if failure.is_some() {
            for sandbox in started.drain(..) {
                if let Err(error) = self.destroy(sandbox.guest.id()).await {
                    tracing::warn!(%error, "a fork could not be taken back");
                }
            }
        }
        self.remove_snapshot(&snapshot).await?;
        failure.map_or(Ok(started), Err)
    }

    /// Kills and removes a sandbox; one that does not exist is no error. A
    /// start in progress is given up.
    ///
    /// # Errors
    /// What went wrong; the sandbox is then still known and can be destroyed
    /// again.
    pub async fn destroy(&self, id: &SandboxId) -> Result<(), EngineError> {
        let Some(entry) = locked(&self.shared.entries).get(id).cloned() else {
            return Ok(());
        };
        let shared = self.shared.clone();
        let id = id.clone();
        detached(
            self.engine(),
            async move { shared.tear_down(&id, &entry).await },
        )
        .await
    }

    /// Destroys every sandbox, ends the engine's helpers and gives the owner
    /// up. Dropping `Sandboxes` instead leaves all alive for a successor (or
    /// until their leases run out).
    ///
    /// # Errors
    /// The first sandbox or helper that could not be removed; `skyrl sandbox
    /// prune` finishes the work.
    pub async fn shutdown(self) -> Result<(), EngineError> {
        self.keeper.abort();
        let mut tasks = tokio::task::JoinSet::new();
        let entries: Vec<_> = locked(&self.shared.entries).clone().into_iter().collect();
        for (id, entry) in entries {
            let shared = self.shared.clone();
            tasks.spawn(async move { shared.tear_down(&id, &entry).await });
        }
        let mut outcome = Ok(());
        while let Some(result) = tasks.join_next().await {
            outcome = outcome.and(result.unwrap_or_else(|panic| Err(bug(self.engine(), &panic))));
        }
        let limit = self.shared.deadlines.destroy;
        outcome?;
        within(
            "shutting the engine down",
            limit,
            self.shared.engine.shutdown(),
        )
        .await?;
        if tokio::time::timeout(limit, self.pruner).await.is_err() {
            tracing::warn!("clearing dead owners takes long: left to the next start");
        }
        self.shared.images.unmark_owner(self.shared.dir.owner())?;
        let root = self.shared.dir.root().to_owned();
        self.lock
            .remove()
            .map_err(|e| EngineError::step("removing", root.display(), e))
    }

    async fn verb<T, F, W>(
        &self,
        id: &SandboxId,
        name: &'static str,
        limit: Duration,
        work: W,
    ) -> Result<T, EngineError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EngineError>> + Send,
        W: FnOnce(Arc<Shared>, SandboxId, Arc<Entry>) -> F + Send + 'static,
    {
        let entry = self.entry(id)?;
        let (shared, id) = (self.shared.clone(), id.clone());
        detached(self.engine(), async move {
            within(name, limit, async {
                let _alone = entry.verb.lock().await;
                if matches!(entry.phase(), Phase::Gone) {
                    return Err(EngineError::NotFound(id));
                }
                work(shared, id, entry.clone()).await
            })
            .await
        })
        .await
    }

    async fn question<T>(
        &self,
        id: &SandboxId,
        name: &'static str,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        self.entry(id)?;
        within(name, self.shared.deadlines.quick, work).await
    }

    fn entry(&self, id: &SandboxId) -> Result<Arc<Entry>, EngineError> {
        locked(&self.shared.entries)
            .get(id)
            .cloned()
            .ok_or_else(|| EngineError::NotFound(id.clone()))
    }
}

impl Shared {
    async fn bring_up(&self, id: &SandboxId, entry: &Entry) -> Result<Sandbox, EngineError> {
        let _alone = entry.verb.lock().await;
        let mut unwanted = entry.unwanted.subscribe();
        let started = tokio::select! {
            biased;
            _ = unwanted.wait_for(|unwanted| *unwanted) => Err(EngineError::NotFound(id.clone())),
            started = self.create_and_start(id, entry) => started,
        };
        match started {
            Ok(guest) => {
                entry.set_phase(Phase::Running(guest.clone()));
                Ok(Sandbox {
                    guest,
                    spec: entry.spec.clone(),
                    ready: entry.ready(),
                })
            }
            Err(error) => {
                if let Err(error) = self.clear(id).await {
                    tracing::error!(%id, %error, "a failed start could not be cleared");
                }
                self.forget(id, entry);
                Err(error)
            }
        }
    }

    async fn create_and_start(
        &self,
        id: &SandboxId,
        entry: &Entry,
    ) -> Result<GuestClient, EngineError> {
        let mut record = SandboxRecord::new(id, self.engine.kind(), &entry.spec);
        record.write(&self.dir)?;
        within(
            "create",
            self.deadlines.create,
            self.engine.create(id, &entry.spec),
        )
        .await?;
        within("start", self.deadlines.start, async {
            let socket = self.engine.start(id).await?;
            let guest = GuestClient::new(id.clone(), socket.clone());
            match guest
                .renew_lease(self.lease_seconds(), self.deadlines.start)
                .await
            {
                Ok(()) => {}
                Err(error) => return Err(self.why_silent(id, error).await),
            }
            record.socket = Some(socket);
            record.ready = Some(entry.ready());
            record.write(&self.dir)?;
            Ok(guest)
        })
        .await
    }

    /// Says that a sandbox ended, where that is why its guest is silent.
    async fn why_silent(&self, id: &SandboxId, error: EngineError) -> EngineError {
        match self.engine.liveness(id).await {
            Ok(Liveness::Ended { cause }) => EngineError::Ended {
                id: id.clone(),
                cause,
            },
            Ok(_) | Err(_) => error,
        }
    }

    async fn tear_down(&self, id: &SandboxId, entry: &Entry) -> Result<(), EngineError> {
        entry.unwanted.send_replace(true);
        let _alone = entry.verb.lock().await;
        if matches!(entry.phase(), Phase::Gone) {
            return Ok(());
        }
        self.clear(id).await?;
        self.forget(id, entry);
        Ok(())
    }

    /// Removes a sandbox with its directory.
    async fn clear(&self, id: &SandboxId) -> Result<(), EngineError> {
        within("destroy", self.deadlines.destroy, self.engine.destroy(id)).await?;
        // An engine that never heard of it leaves what was written down here.
        let dir = self.dir.sandbox(id);
        if dir.exists() {
            crate::tree::remove_tree(&dir)
                .map_err(|e| EngineError::step("removing", dir.display(), e.source))?;
        }
        Ok(())
    }

    fn forget(&self, id: &SandboxId, entry: &Entry) {
        entry.set_phase(Phase::Gone);
        locked(&self.entries).remove(id);
    }

    async fn adopt(&self) -> Result<Vec<SandboxId>, EngineError> {
        let living: HashMap<SandboxId, PathBuf> = self.engine.adopt().await?.into_iter().collect();
        let mut adopted = Vec::new();
        for known in SandboxRecord::read_all(&self.dir)? {
            let (id, record) = known;
            let guest = match (record, living.get(&id)) {
                (Some(record), Some(socket)) if record.engine == self.engine.kind() => {
                    let guest = GuestClient::new(id.clone(), socket.clone());
                    let answers = guest.renew_lease(self.lease_seconds(), self.deadlines.quick);
                    answers.await.ok().map(|()| (record, guest))
                }
                _ => None,
            };
            match guest {
                Some((record, guest)) => {
                    let entry = Entry::new(record.spec, Phase::Running(guest));
                    if let Some(ready) = record.ready {
                        entry.ready.get_or_init(|| ready);
                    }
                    locked(&self.entries).insert(id.clone(), entry);
                    adopted.push(id);
                }
                None => {
                    self.clear(&id).await?;
                }
            }
        }
        Ok(adopted)
    }

    fn lease_seconds(&self) -> u32 {
        u32::try_from(self.lease.as_secs())
            .unwrap_or(u32::MAX)
            .max(1)
    }
}

/// Runs work to its end even when the caller stops waiting for it.
async fn detached<T: Send + 'static>(
    engine: EngineKind,
    work: impl Future<Output = Result<T, EngineError>> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|panic| Err(bug(engine, &panic)))
}

async fn within<T>(
    verb: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, EngineError>>,
) -> Result<T, EngineError> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or(Err(EngineError::Deadline { verb, limit }))
}

fn bug(engine: EngineKind, panic: &tokio::task::JoinError) -> EngineError {
    EngineError::Bug {
        engine,
        reason: panic.to_string(),
    }
}

fn fresh_snapshot_id(source: &SandboxId) -> Result<SnapshotId, EngineError> {
    let number = getrandom::u64().map_err(|e| EngineError::Invalid {
        what: format!("no random numbers: {e}"),
        hint: "is /dev/urandom there?".into(),
    })?;
    let mut name = source.as_str().to_owned();
    name.truncate(40);
    Ok(format!("{name}-{number:016x}")
        .parse()
        .unwrap_or_else(|_| unreachable!("a sandbox id with a suffix is an id")))
}
