//! The `podman` engine: containers made, watched and removed through Podman's
//! own REST service, with everything Podman is slow or fragile at taken out
//! of its hands.
//!
//! - Each owner has its own service with its own storage, run and temporary
//!   directories ([`layout`], [`conf`]), started and restarted by us
//!   ([`service`], [`rest`]), in a mount namespace of its own ([`namespace`]).
//!   No job ever sees another one's Podman state, and the user's own Podman is
//!   never touched.
//! - Root file systems come from the image store all engines share and are
//!   mounted by us ([`roots`]); Podman is given finished roots. So an image is
//!   fetched once for all owners and engines, and snapshots and forks cost
//!   what they cost elsewhere, where `podman commit` would copy every byte.
//! - Control groups are ours, below this process's own: what bounds the job
//!   bounds its sandboxes, and limits are held or refused, never dropped as
//!   Podman does for plain users.
//!
//! The engine knows nothing of how images are fetched or what guests do.

mod conf;
mod containers;
mod freezing;
mod install;
mod layout;
mod lifecycle;
mod namespace;
mod probe;
mod processes;
mod record;
mod request;
mod rest;
mod roots;
mod service;
mod sweep;
mod watch;

pub use probe::probe;
pub use sweep::sweep;

use crate::cgroup::Cgroups;
use crate::context::EngineContext;
use crate::engine::{Engine, EngineKind, Liveness, SnapshotMode, Stats};
use crate::error::EngineError;
use crate::rootfs::{RootMethod, RootWays};
use crate::seccomp;
use crate::snapshot::Snapshots;
use crate::spec::SandboxSpec;
use crate::state::network_file_system;
use async_trait::async_trait;
use install::Installation;
use layout::Layout;
use lifecycle::Podman;
use namespace::Namespace;
use request::Translator;
use rest::Rest;
use roots::{Roots, blocking};
use service::Service;
use skyrl_protocol::{SandboxId, SnapshotId};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the engine is to work; the default fits.
#[derive(Debug, Clone, Default)]
pub struct PodmanOptions {
    /// How roots are made; the best way when absent.
    pub root: Option<RootMethod>,
    /// `crun` or `runc`; the better one when absent.
    pub runtime: Option<String>,
}

/// Makes sandboxes with Podman.
pub struct PodmanEngine {
    podman: Arc<Podman>,
}

impl PodmanEngine {
    /// Starts an owner's Podman, or takes over what an earlier process of the
    /// owner left of it.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] when Podman can't work here, with what would
    /// make it.
    pub async fn open(context: EngineContext) -> Result<Self, EngineError> {
        Self::open_with(context, PodmanOptions::default()).await
    }

    /// The same, told how to work.
    ///
    /// # Errors
    /// As [`PodmanEngine::open`].
    pub async fn open_with(
        context: EngineContext,
        options: PodmanOptions,
    ) -> Result<Self, EngineError> {
        let runtime = options.runtime.clone();
        let install = blocking("looking for podman", move || {
            probe::installation(runtime.as_deref())
        })
        .await?;
        refuse_network_file_systems(context.owner.root())?;
        let layout = Layout::new(&context.owner);
        layout.make()?;
        write_configuration(&layout, &install)?;
        let cgroups = Cgroups::probe();
        cgroups.claim()?;
        sweep::record_parents(&layout, &cgroups)?;
        let environment = service::environment(&layout);
        let namespace = Namespace::open(&layout, &install, &environment).await?;
        let ways = {
            let (zygote, dir) = (context.zygote.clone(), context.owner.root().to_owned());
            blocking("probing root file systems", move || {
                RootWays::probe(&zygote, &dir)
            })
            .await?
        };
        let (method, why) =
            ways.choose(&Roots::acceptable(install.privilege))
                .map_err(|reason| EngineError::Unusable {
                    engine: EngineKind::Podman,
                    reason,
                    hint: "`skyrl sandbox probe` shows what is lacking".into(),
                })?;
        tracing::debug!(%method, %why, ids = ?namespace.ids, "podman's roots");
        let roots = Roots::new(
            namespace.clone(),
            context.zygote.clone(),
            method,
            install.privilege,
        );
        // What an earlier process was about to remove may hold files that only
        // the namespace can remove.
        freezing::clear_half_removed(&layout, &roots).await?;
        let snapshots = {
            let (owner, images) = (context.owner.clone(), (*context.images).clone());
            blocking("opening snapshots", move || {
                Ok(Snapshots::open(owner, images)?)
            })
            .await?
        };
        let translator = Translator::choose(
            install.version,
            install.slirp4netns.is_some(),
            install.pasta.is_some(),
        );
        let regroup = install.runtime.makes_groups();
        let rest = Rest::new(Service::new(
            layout.clone(),
            install,
            namespace,
            environment,
        ));
        // Fails now rather than at the first sandbox.
        rest.service().ensure().await?;
        Ok(Self {
            podman: Arc::new(Podman {
                context,
                layout,
                rest,
                roots,
                cgroups,
                snapshots: Arc::new(snapshots),
                books: Default::default(),
                translator,
                regroup,
                sandboxes: Default::default(),
            }),
        })
    }
}

fn refuse_network_file_systems(state: &Path) -> Result<(), EngineError> {
    match network_file_system(state) {
        None => Ok(()),
        Some(name) => Err(EngineError::Unusable {
            engine: EngineKind::Podman,
            reason: format!(
                "{} is on {name}, where Podman's locks and overlays do not work",
                state.display()
            ),
            hint: "choose a node-local directory with --state-dir, such as /tmp or $SLURM_TMPDIR"
                .into(),
        }),
    }
}

fn write_configuration(layout: &Layout, install: &Installation) -> Result<(), EngineError> {
    let write = |name: &str, text: String, mode: u32| {
        let path = layout.conf().join(name);
        // A service of an earlier process may be reading it.
        let temporary = layout.conf().join(format!(".{name}.new"));
        std::fs::write(&temporary, text)
            .and_then(|()| {
                std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode))
            })
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(|e| EngineError::step("writing", path.display(), e))
    };
    let wrapper = conf::monitor_wrapper(&install.monitor, layout.sandboxes());
    write("conmon", wrapper, 0o700)?;
    if let Some(wrapper) = conf::runc_wrapper(&install.runtime) {
        write(install.runtime.name, wrapper, 0o700)?;
    }
    write("seccomp.json", seccomp::profile().to_string(), 0o600)?;
    write("storage.conf", conf::storage_conf(layout), 0o600)?;
    let containers = conf::containers_conf(layout, &install.runtime);
    write("containers.conf", containers, 0o600)
}

#[async_trait]
impl Engine for PodmanEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Podman
    }

    async fn create(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), EngineError> {
        self.podman.create(id, spec).await
    }

    async fn start(&self, id: &SandboxId) -> Result<PathBuf, EngineError> {
        self.podman.start(id).await
    }

    async fn pause(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.podman.pause(id).await
    }

    async fn resume(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.podman.resume(id).await
    }

    async fn stats(&self, id: &SandboxId) -> Result<Stats, EngineError> {
        self.podman.stats(id).await
    }

    async fn liveness(&self, id: &SandboxId) -> Result<Liveness, EngineError> {
        self.podman.liveness(id).await
    }

    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        self.podman.snapshot(id, snapshot, mode).await
    }

    async fn remove_snapshot(&self, snapshot: &SnapshotId) -> Result<(), EngineError> {
        self.podman.remove_snapshot(snapshot).await
    }

    async fn destroy(&self, id: &SandboxId) -> Result<(), EngineError> {
        self.podman.destroy(id).await
    }

    async fn adopt(&self) -> Result<Vec<(SandboxId, PathBuf)>, EngineError> {
        self.podman.adopt().await
    }

    async fn shutdown(&self) -> Result<(), EngineError> {
        self.podman.rest.service().stop().await;
        sweep(&self.podman.context.owner).await
    }
}
