//! What this machine offers the native engine, and how it would use that.

use super::limits::Kernel;
use super::network::slirp4netns;
use crate::cgroup::{Cgroups, Controller};
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::probe::{EngineProbe, Fact};
use crate::rootfs::{RootMethod, RootWays, findings, fuse_overlayfs};
use skyrl_protocol::zygote::{Finding, Findings};
use std::path::Path;

/// Facts and the choices that follow from them.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) findings: Findings,
    pub(super) ways: RootWays,
    pub(super) cgroups: Cgroups,
}

impl Machine {
    /// Looks at this machine. `dir` is where sandboxes live.
    pub(super) fn look(zygote: &Path, dir: &Path) -> Result<Self, EngineError> {
        let findings = findings(zygote, dir)?;
        let ways = RootWays::new(&findings, fuse_overlayfs().map(drop));
        Ok(Self {
            findings,
            ways,
            cgroups: Cgroups::probe(),
        })
    }

    /// Why the engine can't work here at all.
    fn obstacle(&self) -> Option<String> {
        let found = &self.findings;
        let mut needed = vec![
            ("", &found.kernel),
            ("namespaces: ", &found.namespaces),
            ("", &found.proc_mount),
            ("seccomp: ", &found.seccomp),
        ];
        if !found.privileged {
            needed.insert(1, ("user namespaces: ", &found.user_namespace));
        }
        needed
            .into_iter()
            .find_map(|(what, finding)| finding.as_ref().err().map(|e| format!("{what}{e}")))
            .or_else(|| self.root_method(None).err())
    }

    /// How roots are made, with why better ways were passed over.
    pub(super) fn root_method(
        &self,
        wanted: Option<RootMethod>,
    ) -> Result<(RootMethod, String), String> {
        match wanted {
            Some(method) => self.ways.choose(&[method]),
            None if self.findings.privileged => self.ways.choose(&[
                RootMethod::Overlay,
                RootMethod::FuseOverlay,
                RootMethod::Copy,
            ]),
            None => self.ways.choose(&[
                RootMethod::OverlayInUserNamespace,
                RootMethod::FuseOverlay,
                RootMethod::Copy,
            ]),
        }
    }

    pub(super) fn kernel(&self) -> Kernel {
        Kernel::of_this_machine(!self.findings.privileged)
    }

    /// The report for users.
    pub(super) fn report(&self) -> EngineProbe {
        let found = &self.findings;
        let mut facts = vec![
            Fact::good(
                "user",
                if found.privileged {
                    "root: no user namespaces needed"
                } else {
                    "a plain user: every sandbox gets a user namespace"
                },
            ),
            fact(
                "kernel",
                &found.kernel,
                "recent enough",
                "a newer kernel, or another engine",
            ),
            fact(
                "user namespaces",
                &found.user_namespace,
                "allowed",
                "ask the administrator for `sysctl user.max_user_namespaces=15000` and, where it exists, `kernel.apparmor_restrict_unprivileged_userns=0`",
            ),
            fact(
                "namespaces",
                &found.namespaces,
                "mount, PID, IPC, UTS and network",
                "ask the administrator for `sysctl user.max_net_namespaces=15000`",
            ),
            fact(
                "/proc",
                &found.proc_mount,
                "can be mounted anew",
                "a container that shows the whole of /proc (podman: --security-opt unmask=ALL)",
            ),
            fact(
                "seccomp",
                &found.seccomp,
                "filters work",
                "a kernel with CONFIG_SECCOMP_FILTER",
            ),
        ];
        facts.extend(shared_facts(&self.ways, &self.cgroups));
        match self.obstacle() {
            Some(reason) => EngineProbe::unusable(EngineKind::Native, facts, reason),
            None => EngineProbe::usable(EngineKind::Native, facts, self.summary()),
        }
    }

    fn summary(&self) -> String {
        let who = if self.findings.privileged {
            "namespaces as root"
        } else {
            "user namespaces"
        };
        let root = match self.root_method(None) {
            Ok((method, why)) if why.is_empty() => method.to_string(),
            Ok((method, why)) => format!("{method} ({why})"),
            Err(reason) => reason,
        };
        let limits = match self.cgroups.check(Controller::Memory) {
            Ok(()) => "limits by cgroups",
            Err(_) => "limits by resource limits and a watchdog",
        };
        format!("{who}, {root}, {limits}")
    }
}

fn fact(name: &str, finding: &Finding, good: &str, remedy: &str) -> Fact {
    match finding {
        Ok(()) => Fact::good(name, good),
        Err(reason) => Fact::lacking(name, reason, remedy),
    }
}

/// What engines that make their own roots, groups and networks have in common.
pub(crate) fn shared_facts(ways: &RootWays, cgroups: &Cgroups) -> Vec<Fact> {
    let mut facts = Vec::new();
    for method in RootMethod::ALL {
        facts.push(fact(
            &format!("root by {method}"),
            ways.finding(method),
            "works",
            remedy(method),
        ));
    }
    for controller in [
        Controller::Cpu,
        Controller::Memory,
        Controller::Pids,
        Controller::Freezer,
    ] {
        let name = format!("cgroup {controller}");
        facts.push(match cgroups.check(controller) {
            Ok(()) => {
                let version = cgroups.version(controller).unwrap_or(2);
                Fact::good(name, format!("writable, v{version}"))
            }
            Err(reason) => Fact::lacking(name, reason, without(controller)),
        });
    }
    facts.push(match slirp4netns() {
        Ok(program) => Fact::good("network nat", program.display().to_string()),
        Err(reason) => Fact::lacking(
            "network nat",
            reason,
            "install slirp4netns, with /dev/net/tun open to its user",
        ),
    });
    facts
}

fn remedy(method: RootMethod) -> &'static str {
    match method {
        RootMethod::Overlay => "run as root; a plain user has the other ways",
        RootMethod::OverlayInUserNamespace => {
            "a state directory on ext4, xfs, btrfs or tmpfs (`--state-dir`), Linux 5.12 or newer"
        }
        RootMethod::FuseOverlay => {
            "install fuse-overlayfs and fuse3, with /dev/fuse open to its user"
        }
        RootMethod::Copy => "",
    }
}

fn without(controller: Controller) -> &'static str {
    match controller {
        Controller::Memory | Controller::Pids => {
            "the watchdog holds this limit, less precisely; a delegated cgroup (`systemd-run --user --scope -p Delegate=yes`) holds it exactly"
        }
        Controller::Freezer => "pausing falls back to SIGSTOP",
        Controller::Cpu | Controller::CpuAccounting => {
            "a delegated cgroup (`systemd-run --user --scope -p Delegate=yes`)"
        }
    }
}
