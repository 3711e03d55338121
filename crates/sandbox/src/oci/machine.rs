//! What this machine offers the `oci` engine, and what of it is used.

use super::launch::Launcher;
use super::record::{Place, Record, runtime_state};
use super::runtime::{Runtime, RuntimeKind, Sealed, remedy};
use crate::cgroup::{Cgroups, Controller, Group};
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::image::{Image, ImageConfig, ImageRef};
use crate::native::limits::{Enforcement, Kernel};
use crate::native::machine::shared_facts;
use crate::probe::{EngineProbe, Fact};
use crate::programs::Programs;
use crate::rootfs::{RootMethod, RootWays, Rootfs, findings, fuse_overlayfs};
use crate::spec::SandboxSpec;
use crate::state::{StateDir, make_dir};
use crate::tree::remove_tree;
use skyrl_protocol::zygote::Findings;
use skyrl_protocol::{OwnerId, SandboxId};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

const DELETE_LIMIT: Duration = Duration::from_secs(20);

/// Facts, and the choices that follow from them.
#[derive(Debug)]
pub(super) struct Machine {
    findings: Findings,
    ways: RootWays,
    pub(super) cgroups: Cgroups,
    root: Option<RootMethod>,
    runtimes: Vec<(RuntimeKind, Result<Runtime, String>)>,
}

/// How the engine is to work; the default fits.
#[derive(Debug, Clone, Default)]
pub struct OciOptions {
    /// Which runtime; the best that works when absent.
    pub runtime: Option<RuntimeKind>,
    /// How roots are made; the best way when absent.
    pub root: Option<RootMethod>,
    /// Leave control groups alone even where they could be made.
    pub without_cgroups: bool,
}

/// What the engine works with.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) runtime: Runtime,
    pub(super) method: RootMethod,
    pub(super) cgroups: Cgroups,
    pub(super) privileged: bool,
    pub(super) kernel: Kernel,
}

/// What this machine offers the `oci` engine. `dir` is an existing directory
/// where sandboxes would live. Blocking.
///
/// # Errors
/// When looking itself fails, for instance because `dir` can't be written.
pub fn probe(programs: &Programs, dir: &Path) -> Result<EngineProbe, EngineError> {
    Ok(Machine::look(programs, dir, &OciOptions::default())?.report())
}

impl Machine {
    /// Looks at this machine, trying every runtime that is installed until
    /// one works. `dir` is where sandboxes live.
    pub(super) fn look(
        programs: &Programs,
        dir: &Path,
        options: &OciOptions,
    ) -> Result<Self, EngineError> {
        let findings = findings(&programs.zygote, dir)?;
        let ways = RootWays::new(&findings, fuse_overlayfs().map(drop));
        let mut machine = Self {
            findings,
            ways,
            cgroups: if options.without_cgroups {
                Cgroups::unavailable("control groups are switched off")
            } else {
                Cgroups::probe()
            },
            root: options.root,
            runtimes: Vec::new(),
        };
        for kind in RuntimeKind::ALL {
            if options.runtime.is_some_and(|wanted| wanted != kind) {
                continue;
            }
            let found = machine.examine(kind, programs, dir);
            let works = found.is_ok();
            machine.runtimes.push((kind, found));
            if works {
                break;
            }
        }
        Ok(machine)
    }

    fn privileged(&self) -> bool {
        self.findings.privileged
    }

    fn examine(
        &self,
        kind: RuntimeKind,
        programs: &Programs,
        dir: &Path,
    ) -> Result<Runtime, String> {
        let runtime = Runtime::find(kind)?;
        if kind == RuntimeKind::Runc {
            // It insists on making groups in every hierarchy.
            for controller in [Controller::Memory, Controller::Pids] {
                self.cgroups
                    .check(controller)
                    .map_err(|reason| format!("it needs control groups: {reason}"))?;
            }
        }
        let trial = Trial::new(dir).map_err(|e| e.to_string())?;
        trial
            .run(&runtime, programs, self.privileged())
            .map_err(|e| e.to_string())?;
        Ok(runtime)
    }

    /// The best way of making roots that works, with why better ones were
    /// passed over.
    fn method(&self) -> Result<(RootMethod, String), String> {
        if let Some(wanted) = self.root {
            return self.ways.choose(&[wanted]);
        }
        let overlay = if self.privileged() {
            RootMethod::Overlay
        } else {
            RootMethod::OverlayInUserNamespace
        };
        self.ways
            .choose(&[overlay, RootMethod::FuseOverlay, RootMethod::Copy])
    }

    fn obstacle(&self) -> Option<String> {
        let found = &self.findings;
        if let Err(reason) = &found.kernel {
            return Some(reason.clone());
        }
        if !self.privileged()
            && let Err(reason) = &found.user_namespace
        {
            return Some(format!("user namespaces: {reason}"));
        }
        if self.runtimes.iter().any(|(_, found)| found.is_ok()) {
            return self.method().err();
        }
        let reasons: Vec<String> = self
            .runtimes
            .iter()
            .filter_map(|(kind, found)| Some(format!("{kind}: {}", found.as_ref().err()?)))
            .collect();
        Some(reasons.join("; "))
    }

    /// What the engine works with.
    ///
    /// # Errors
    /// [`EngineError::Unusable`] with every reason and remedy.
    pub(super) fn choose(self) -> Result<Chosen, EngineError> {
        let report = self.report();
        let method = self.method();
        let runtime = self.runtimes.into_iter().find_map(|(_, found)| found.ok());
        match (report.usable, method, runtime) {
            (true, Ok((method, _)), Some(runtime)) => Ok(Chosen {
                runtime,
                method,
                cgroups: self.cgroups,
                privileged: self.findings.privileged,
                kernel: Kernel::of_this_machine(!self.findings.privileged),
            }),
            _ => Err(report.refusal()),
        }
    }

    /// The report for users.
    pub(super) fn report(&self) -> EngineProbe {
        let mut facts = vec![Fact::good(
            "user",
            if self.privileged() {
                "root: no user namespaces needed"
            } else {
                "a plain user: every sandbox gets a user namespace with one id"
            },
        )];
        for (kind, found) in &self.runtimes {
            facts.push(match found {
                Ok(runtime) => Fact::good(
                    kind.as_str(),
                    format!(
                        "{} at {}, starts containers",
                        runtime.version,
                        runtime.path.display()
                    ),
                ),
                Err(reason) => {
                    let known = remedy(reason).map(str::to_owned);
                    let remedy = known.unwrap_or_else(|| format!("install a working {kind}"));
                    Fact::lacking(kind.as_str(), reason, remedy)
                }
            });
        }
        facts.extend(shared_facts(&self.ways, &self.cgroups));
        match self.obstacle() {
            Some(reason) => EngineProbe::unusable(EngineKind::Oci, facts, reason),
            None => EngineProbe::usable(EngineKind::Oci, facts, self.summary()),
        }
    }

    fn summary(&self) -> String {
        let runtime = self
            .runtimes
            .iter()
            .find_map(|(_, found)| found.as_ref().ok())
            .map_or_else(String::new, |r| format!("{} {}", r.kind, r.version));
        let who = if self.privileged() {
            "as root"
        } else {
            "in user namespaces"
        };
        let root = match self.method() {
            Ok((method, why)) if why.is_empty() => method.to_string(),
            Ok((method, why)) => format!("{method} ({why})"),
            Err(reason) => reason,
        };
        format!("{runtime} {who}, {root}")
    }
}

/// One container that is started and killed, by the very steps that start a
/// sandbox.
struct Trial {
    dir: PathBuf,
    id: SandboxId,
    owner: OwnerId,
}

impl Trial {
    fn new(parent: &Path) -> Result<Self, EngineError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!(".oci-trial-{}-{number}", std::process::id()));
        make_dir(&dir)?;
        let name = |what: String| EngineError::Invalid {
            what,
            hint: String::new(),
        };
        Ok(Self {
            dir,
            id: "trial".parse().map_err(|e| name(format!("{e}")))?,
            owner: "trial".parse().map_err(|e| name(format!("{e}")))?,
        })
    }

    fn run(
        &self,
        runtime: &Runtime,
        programs: &Programs,
        privileged: bool,
    ) -> Result<(), EngineError> {
        let state = StateDir::open(&self.dir)?;
        let owner = state.owner_dir(&self.owner);
        let place = Place {
            owner: &owner,
            id: &self.id,
        };
        let record = Record {
            spec: SandboxSpec::new(ImageRef::Host),
            image: Image {
                reference: ImageRef::Host,
                digest: String::new(),
                layers: Vec::new(),
                binds: Vec::new(),
                config: ImageConfig::default(),
                lease: None,
            },
            runtime: runtime.kind,
            rootfs: Rootfs::plan(RootMethod::Copy, Vec::new(), &place.dir()),
            group: Group::default(),
            disk_baseline: 0,
            init: None,
            helper: None,
        };
        make_dir(&record.rootfs.root())?;
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
        let guest = Sealed::copy(&programs.guest)?;
        let launcher = Launcher {
            zygote: &programs.zygote,
            guest: &guest,
            runtime,
            privileged,
            group_path: format!("skyrl-{}", name.trim_start_matches('.')),
        };
        launcher.prepare(&place, &record, &Enforcement::default())?;
        let launched = launcher.launch(&place, &AtomicBool::new(false))?;
        launched.init.kill();
        let ended = launched.init.ended_within(DELETE_LIMIT);
        if runtime.kind == RuntimeKind::Runc {
            let state = runtime_state(&owner);
            Runtime::delete(runtime.kind, &state, self.id.as_str(), DELETE_LIMIT)?;
        }
        if ended {
            Ok(())
        } else {
            Err(EngineError::Deadline {
                verb: "killing a trial container",
                limit: DELETE_LIMIT,
            })
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.dir) {
            tracing::warn!(%error, "a trial of a container runtime left files");
        }
    }
}
