//! What the engine finds on this machine, for people and for choosing. Looks
//! only: nothing is made and no Podman state is touched.

use super::conf::Runtime;
use super::install::{
    Installation, OLDEST, Privilege, Version, find_monitor, find_runtime, hybrid_controllers,
    privilege, version_of,
};
use crate::cgroup::{Cgroups, Controller};
use crate::command::find_program;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::probe::{EngineProbe, Fact};
use std::path::PathBuf;

/// What was found, before judging it.
#[derive(Debug, Clone)]
struct Found {
    podman: Option<PathBuf>,
    version: Option<Version>,
    monitor: Option<PathBuf>,
    runtime: Option<Runtime>,
    /// Controllers in the way of crun.
    hybrid: Option<String>,
    privilege: Privilege,
    slirp4netns: Option<PathBuf>,
    pasta: Option<PathBuf>,
    mount: bool,
    /// As a plain user.
    user: UserFound,
}

/// What a plain user has of what Podman needs then.
#[derive(Debug, Clone, PartialEq, Eq)]
struct UserFound {
    /// `user.max_user_namespaces`.
    namespaces: u64,
    /// Ranges in `/etc/subuid` and `/etc/subgid`.
    ranges: bool,
    /// newuidmap and newgidmap.
    mappers: bool,
}

fn look(runtime: Option<&str>) -> Found {
    let podman = find_program("podman");
    Found {
        version: podman.as_deref().and_then(version_of),
        podman,
        monitor: find_monitor(),
        runtime: find_runtime(runtime),
        hybrid: hybrid_controllers(),
        privilege: privilege(),
        slirp4netns: find_program("slirp4netns"),
        pasta: find_program("pasta"),
        mount: find_program("mount").is_some(),
        user: UserFound {
            namespaces: read("/proc/sys/user/max_user_namespaces")
                .trim()
                .parse()
                .unwrap_or(0),
            ranges: has_range(&read("/etc/subuid")) && has_range(&read("/etc/subgid")),
            mappers: find_program("newuidmap").is_some() && find_program("newgidmap").is_some(),
        },
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Whether a `/etc/subuid` grants this user anything.
fn has_range(text: &str) -> bool {
    let uid = rustix::process::getuid().as_raw();
    range_for(text, uid, name_of(uid, &read("/etc/passwd")).as_deref())
}

fn name_of(uid: u32, passwd: &str) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

fn range_for(text: &str, uid: u32, name: Option<&str>) -> bool {
    text.lines().any(|line| {
        let mut fields = line.trim().split(':');
        let who = fields.next().unwrap_or_default();
        let count: u64 = fields.nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        count > 0 && (who == uid.to_string() || Some(who) == name)
    })
}

/// The first thing without which nothing works: what, and what cures it.
fn obstacle(found: &Found) -> Option<(String, String)> {
    let lacks = |what: &str, cure: &str| Some((what.to_owned(), cure.to_owned()));
    if found.podman.is_none() {
        return lacks("podman is not installed", "install podman 4.0 or newer");
    }
    match found.version {
        None => return lacks("podman does not run", "`podman --version` shows why"),
        Some(version) if version < OLDEST => {
            return Some((
                format!("podman {version} is too old"),
                format!("install podman {OLDEST} or newer"),
            ));
        }
        Some(_) => {}
    }
    if found.monitor.is_none() {
        return lacks("conmon is not installed", "install conmon");
    }
    if found.runtime.is_none() {
        return lacks("neither crun nor runc is installed", "install crun");
    }
    if let (Some(Runtime { name: "crun", .. }), Some(controllers)) = (&found.runtime, &found.hybrid)
    {
        return Some((
            format!("crun refuses hybrid cgroups whose v2 tree has controllers ({controllers})"),
            hybrid_remedy(controllers),
        ));
    }
    if found.privilege == Privilege::Rootless {
        if found.user.namespaces == 0 {
            return lacks(
                "user namespaces are forbidden",
                "sysctl user.max_user_namespaces=10000",
            );
        }
        if found.user.ranges && !found.user.mappers {
            return lacks(
                "newuidmap and newgidmap are not installed, and podman insists on them for accounts with subordinate ids",
                "install uidmap (shadow-utils)",
            );
        }
        if !found.mount {
            return lacks("mount is not installed", "install util-linux");
        }
    }
    None
}

/// A controller that is mounted as v1 leaves v2.
fn hybrid_remedy(controllers: &str) -> String {
    let mounts: Vec<String> = controllers
        .split_whitespace()
        .map(|name| {
            format!("mkdir -p /sys/fs/cgroup/{name} && mount -t cgroup -o {name} cgroup /sys/fs/cgroup/{name}")
        })
        .collect();
    format!("install runc, or as root: {}", mounts.join(" && "))
}

/// The programs to work with.
///
/// # Errors
/// [`EngineError::Unusable`] with what is missing.
pub(super) fn installation(runtime: Option<&str>) -> Result<Installation, EngineError> {
    let found = look(runtime);
    if let Some((reason, hint)) = obstacle(&found) {
        return Err(EngineError::Unusable {
            engine: EngineKind::Podman,
            reason,
            hint,
        });
    }
    let Found {
        podman: Some(podman),
        version: Some(version),
        monitor: Some(monitor),
        runtime: Some(runtime),
        privilege,
        slirp4netns,
        pasta,
        ..
    } = found
    else {
        unreachable!("what is missing was an obstacle")
    };
    Ok(Installation {
        podman,
        version,
        monitor,
        runtime,
        privilege,
        slirp4netns,
        pasta,
    })
}

/// What the engine finds here.
pub fn probe() -> EngineProbe {
    judge(&look(None), &Cgroups::probe())
}

fn judge(found: &Found, cgroups: &Cgroups) -> EngineProbe {
    let facts = facts(found, cgroups);
    if let Some((reason, _)) = obstacle(found) {
        return EngineProbe::unusable(EngineKind::Podman, facts, reason);
    }
    let version = found.version.map(|v| v.to_string()).unwrap_or_default();
    let runtime = found.runtime.as_ref().map_or("", |runtime| runtime.name);
    let who = match (found.privilege, found.user.ranges) {
        (Privilege::Rootful, _) => "as root",
        (Privilege::Rootless, true) => "without root",
        (Privilege::Rootless, false) => {
            "without root; this account has no subordinate ids, so root is the only user in sandboxes"
        }
    };
    EngineProbe::usable(
        EngineKind::Podman,
        facts,
        format!("podman {version} with {runtime} {who}"),
    )
}

fn facts(found: &Found, cgroups: &Cgroups) -> Vec<Fact> {
    let program = |name: &str, path: Option<&PathBuf>, cure: &str| match path {
        Some(path) => Fact::good(name, path.display().to_string()),
        None => Fact::lacking(name, "not installed", cure),
    };
    let mut facts = vec![
        match (&found.podman, found.version) {
            (None, _) => Fact::lacking("podman", "not installed", "install podman"),
            (Some(path), None) => Fact::lacking(
                "podman",
                format!("{} does not run", path.display()),
                "`podman --version` shows why",
            ),
            (Some(path), Some(version)) if version < OLDEST => Fact::lacking(
                "podman",
                format!("{version} at {}", path.display()),
                format!("install podman {OLDEST} or newer"),
            ),
            (Some(path), Some(version)) => {
                Fact::good("podman", format!("{version} at {}", path.display()))
            }
        },
        program("conmon", found.monitor.as_ref(), "install conmon"),
        match &found.runtime {
            Some(Runtime { name: "crun", .. }) if found.hybrid.is_some() => Fact::lacking(
                "runtime",
                "crun, which refuses hybrid cgroups with controllers in v2",
                hybrid_remedy(found.hybrid.as_deref().unwrap_or_default()),
            ),
            Some(Runtime { name, path }) => {
                Fact::good("runtime", format!("{name} at {}", path.display()))
            }
            None => Fact::lacking("runtime", "neither crun nor runc", "install crun"),
        },
    ];
    match found.privilege {
        Privilege::Rootful => facts.push(Fact::good("runs as", "root")),
        Privilege::Rootless => facts.extend(user_facts(&found.user)),
    }
    let limits: Vec<String> = [Controller::Cpu, Controller::Memory, Controller::Pids]
        .into_iter()
        .filter_map(|controller| {
            let reason = cgroups.check(controller).err()?;
            Some(format!("{controller}: {reason}"))
        })
        .collect();
    facts.push(if limits.is_empty() {
        Fact::good("limits", "cpus, memory, pids by cgroups; disk by watching")
    } else {
        Fact::lacking(
            "limits",
            limits.join("; "),
            "run where cgroups are delegated (as root, or in a systemd user session), or leave these limits out",
        )
    });
    facts.push(match (&found.slirp4netns, &found.pasta) {
        (Some(path), _) | (None, Some(path)) => {
            Fact::good("network nat", path.display().to_string())
        }
        (None, None) => Fact::lacking(
            "network nat",
            "neither slirp4netns nor pasta",
            "install slirp4netns",
        ),
    });
    facts
}

fn user_facts(user: &UserFound) -> Vec<Fact> {
    vec![
        Fact::good("runs as", "a plain user"),
        match user.namespaces {
            0 => Fact::lacking(
                "user namespaces",
                "forbidden",
                "sysctl user.max_user_namespaces=10000",
            ),
            _ => Fact::good("user namespaces", "permitted"),
        },
        if user.ranges {
            Fact::good("subordinate ids", "granted")
        } else {
            Fact::lacking(
                "subordinate ids",
                "none for this account",
                "add a range to /etc/subuid and /etc/subgid if sandboxes need other users than root",
            )
        },
        if user.mappers {
            Fact::good("newuidmap, newgidmap", "installed")
        } else {
            Fact::lacking(
                "newuidmap, newgidmap",
                "not installed",
                "install uidmap (shadow-utils); needed with subordinate ids",
            )
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain_user() -> Found {
        Found {
            podman: Some("/usr/bin/podman".into()),
            version: Some(Version(4, 3, 1)),
            monitor: Some("/usr/bin/conmon".into()),
            runtime: Some(Runtime {
                name: "crun",
                path: "/usr/bin/crun".into(),
            }),
            hybrid: None,
            privilege: Privilege::Rootless,
            slirp4netns: None,
            pasta: None,
            mount: true,
            user: UserFound {
                namespaces: 1000,
                ranges: false,
                mappers: false,
            },
        }
    }

    #[test]
    fn an_account_without_subordinate_ids_is_served_and_told() {
        let probe = judge(&plain_user(), &Cgroups::unavailable("not delegated"));
        assert!(probe.usable);
        assert!(probe.reason.contains("no subordinate ids"), "{probe:?}");
        assert!(probe.remedies().contains("/etc/subuid"));
        assert!(
            probe
                .facts
                .iter()
                .any(|fact| fact.name == "limits" && fact.value.contains("not delegated"))
        );
    }

    #[test]
    fn subordinate_ids_without_the_programs_that_map_them_are_an_obstacle() {
        let mut found = plain_user();
        found.user.ranges = true;
        let probe = judge(&found, &Cgroups::unavailable(""));
        assert!(!probe.usable);
        assert!(probe.reason.contains("newuidmap"), "{}", probe.reason);
    }

    #[test]
    fn each_missing_program_is_named() {
        let usable = |change: &dyn Fn(&mut Found)| {
            let mut found = plain_user();
            change(&mut found);
            judge(&found, &Cgroups::unavailable("")).reason
        };
        assert!(usable(&|f| f.podman = None).contains("podman is not installed"));
        assert!(usable(&|f| f.version = Some(Version(3, 4, 4))).contains("3.4.4 is too old"));
        assert!(usable(&|f| f.monitor = None).contains("conmon"));
        assert!(usable(&|f| f.runtime = None).contains("crun"));
        assert!(usable(&|f| f.hybrid = Some("hugetlb".into())).contains("hugetlb"));
        assert!(usable(&|f| f.user.namespaces = 0).contains("user namespaces"));
    }

    #[test]
    fn ranges_are_granted_by_name_or_number() {
        assert!(range_for("a:1:2\njoe:100000:65536\n", 7, Some("joe")));
        assert!(range_for("7:100000:65536\n", 7, None));
        assert!(!range_for("joe:100000:0\n70:1:1\n", 7, Some("joe")));
        assert_eq!(
            name_of(7, "root:x:0:0::/:\njoe:x:7:7::/:/bin/sh\n").as_deref(),
            Some("joe")
        );
    }
}
