//! Where this process may make control groups, and why not elsewhere.
//!
//! Reads `/proc/self/cgroup` and `/proc/self/mountinfo`, then tries. The
//! parsing is pure; only [`Cgroups::probe`] touches the machine.

use super::{Controller, unescape_mount_path};
use crate::cgroup::CgroupError;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The groups below which this process can make groups for sandboxes.
#[derive(Debug, Clone, Default)]
pub struct Cgroups {
    /// v1: the caller's own group in each writable hierarchy.
    pub(super) v1: BTreeMap<Controller, PathBuf>,
    /// v2: the group below which sandboxes get theirs.
    pub(super) v2: Option<V2Parent>,
    /// Why a controller can't be used.
    refused: BTreeMap<Controller, String>,
}

/// A v2 group that may have children.
#[derive(Debug, Clone)]
pub(super) struct V2Parent {
    pub(super) path: PathBuf,
    /// Controllers its children can have.
    pub(super) controllers: BTreeSet<Controller>,
    /// Its processes must move to a leaf before children get controllers.
    pub(super) must_vacate: bool,
}

/// The caller's own group in every mounted v1 hierarchy, whatever it controls:
/// where programs that make their own groups make them.
pub fn own_groups() -> Vec<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (own, mounts) = (memberships(&own), mounted(&mounts));
    own.iter()
        .filter_map(|own| {
            let controller = own.controllers.first()?;
            let mount = mounts
                .iter()
                .find(|m| !m.v2 && m.options.contains(controller))?;
            directory(mount, own.path).ok()
        })
        .collect()
}

/// One line of `/proc/self/cgroup`.
#[derive(Debug, PartialEq, Eq)]
struct Membership<'a> {
    /// Empty for v2.
    controllers: Vec<&'a str>,
    path: &'a str,
}

/// A mounted hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Mounted<'a> {
    root: &'a str,
    point: PathBuf,
    v2: bool,
    options: Vec<&'a str>,
}

fn memberships(text: &str) -> Vec<Membership<'_>> {
    text.lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            Some(Membership {
                controllers: controllers.split(',').filter(|c| !c.is_empty()).collect(),
                path,
            })
        })
        .collect()
}

fn mounted(mountinfo: &str) -> Vec<Mounted<'_>> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut after = after.split(' ');
            let kind = after.next()?;
            if kind != "cgroup" && kind != "cgroup2" {
                return None;
            }
            let mut before = before.split(' ').skip(3);
            Some(Mounted {
                root: before.next()?,
                point: unescape_mount_path(before.next()?.as_bytes()),
                v2: kind == "cgroup2",
                options: after.nth(1)?.split(',').collect(),
            })
        })
        .collect()
}

/// Directory of a group, given its hierarchy's mount.
fn directory(mount: &Mounted<'_>, group: &str) -> Result<PathBuf, String> {
    let below = Path::new(group)
        .strip_prefix(mount.root)
        .map_err(|_| format!("this process's group {group} lies outside the mounted hierarchy"))?;
    if below.components().any(|c| c.as_os_str() == "..") {
        return Err(format!(
            "this process's group {group} lies outside its cgroup namespace"
        ));
    }
    Ok(mount.point.join(below))
}

impl Cgroups {
    /// Looks and tries; leaves nothing behind.
    pub fn probe() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self::probe_from(&own, &mounts)
    }

    /// None at all, for callers that must do without.
    pub fn unavailable(reason: &str) -> Self {
        Self {
            refused: Controller::ALL
                .into_iter()
                .map(|c| (c, reason.to_owned()))
                .collect(),
            ..Self::default()
        }
    }

    fn probe_from(own: &str, mountinfo: &str) -> Self {
        let own = memberships(own);
        let mounts = mounted(mountinfo);
        let mut found = Self::default();
        let v2 = own
            .iter()
            .find(|m| m.controllers.is_empty())
            .zip(mounts.iter().find(|m| m.v2))
            .ok_or_else(|| "no cgroup v2 is mounted".to_owned())
            .and_then(|(own, mount)| v2_parent(&directory(mount, own.path)?, &mount.point));
        for controller in Controller::ALL {
            let v1 = own
                .iter()
                .find(|m| m.controllers.contains(&controller.v1_name()))
                .map(|own| {
                    let mount = mounts
                        .iter()
                        .find(|m| !m.v2 && m.options.contains(&controller.v1_name()))
                        .ok_or("its v1 hierarchy is not mounted")?;
                    let dir = directory(mount, own.path)?;
                    try_making(&dir).map(|()| dir)
                });
            match (v1, &v2) {
                (Some(Ok(dir)), _) => {
                    found.v1.insert(controller, dir);
                }
                (Some(Err(reason)), _) => {
                    found.refused.insert(controller, reason);
                }
                (None, Ok(parent))
                    if controller.v2_name().is_none()
                        || parent.controllers.contains(&controller) => {}
                (None, Ok(parent)) => {
                    found.refused.insert(
                        controller,
                        format!(
                            "cgroup {} does not offer the {controller} controller",
                            parent.path.display()
                        ),
                    );
                }
                (None, Err(reason)) => {
                    found.refused.insert(controller, reason.clone());
                }
            }
        }
        found.v2 = v2.ok();
        // Every v2 group can be frozen, whatever the v1 hierarchy says.
        if found.v2.is_some() {
            found.refused.remove(&Controller::Freezer);
        }
        found
    }

    /// Whether a controller can be used, and if not why.
    pub fn check(&self, controller: Controller) -> Result<(), &str> {
        match self.refused.get(&controller) {
            Some(reason) => Err(reason),
            None => Ok(()),
        }
    }

    /// Which version serves a controller, for reports.
    pub fn version(&self, controller: Controller) -> Option<u8> {
        if self.v1.contains_key(&controller) {
            Some(1)
        } else if self.refused.contains_key(&controller) {
            None
        } else {
            Some(2)
        }
    }

    /// The groups below which sandboxes' groups are made, to be recorded for
    /// [`super::group::sweep`].
    pub fn parents(&self) -> Vec<PathBuf> {
        let unique: BTreeSet<PathBuf> = self
            .v1
            .values()
            .chain(self.v2.as_ref().map(|p| &p.path))
            .cloned()
            .collect();
        unique.into_iter().collect()
    }

    /// Moves this process out of the v2 group that is to have children with
    /// controllers, when that is needed. Call once, before starting helpers.
    ///
    /// # Errors
    /// When the kernel refuses the move.
    pub fn claim(&self) -> Result<(), CgroupError> {
        let Some(parent) = &self.v2 else {
            return Ok(());
        };
        if parent.must_vacate {
            let leaf = parent.path.join("skyrl-main");
            make_group(&leaf)?;
            let procs = parent.path.join("cgroup.procs");
            // Processes may fork while they move: repeat until none is left.
            for _ in 0..16 {
                let text = read(&procs)?;
                if text.trim().is_empty() {
                    break;
                }
                for pid in text.lines() {
                    let target = leaf.join("cgroup.procs");
                    match fs::write(&target, pid) {
                        Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                            return Err(CgroupError::new("moving a process to", target, e));
                        }
                        _ => {}
                    }
                }
            }
        }
        enable(&parent.path, &parent.controllers)
    }
}

/// Lets a v2 group's children use controllers.
pub(super) fn enable(group: &Path, controllers: &BTreeSet<Controller>) -> Result<(), CgroupError> {
    let path = group.join("cgroup.subtree_control");
    let enabled = read(&path)?;
    let missing: Vec<String> = controllers
        .iter()
        .filter_map(|c| c.v2_name())
        .filter(|name| !enabled.split_whitespace().any(|e| e == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::write(&path, missing.join(" "))
        .map_err(|e| CgroupError::new("enabling controllers in", path, e))
}

pub(super) fn make_group(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::new("making cgroup", path, e))
        }
        _ => Ok(()),
    }
}

pub(super) fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|e| CgroupError::new("reading", path, e))
}

fn try_making(parent: &Path) -> Result<(), String> {
    let path = parent.join(format!("skyrl-probe-{}", unique()));
    fs::create_dir(&path)
        .map_err(|e| format!("can't make a cgroup below {}: {e}", parent.display()))?;
    let _ = fs::remove_dir(&path);
    Ok(())
}

/// Differs between probes at the same time in one process and between
/// processes.
fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// Chooses the v2 group that sandboxes' groups go below.
///
/// v2 gives controllers only to children of a group without processes of its
/// own, so the caller's group serves when it is the root, has no controllers
/// to give, or can be vacated because only the caller's own family is in it.
fn v2_parent(own: &Path, mount_point: &Path) -> Result<V2Parent, String> {
    try_making(own)?;
    let available = fs::read_to_string(own.join("cgroup.controllers")).unwrap_or_default();
    let controllers: BTreeSet<Controller> = Controller::ALL
        .into_iter()
        .filter(|c| {
            c.v2_name()
                .is_some_and(|name| available.split_whitespace().any(|a| a == name))
        })
        .collect();
    let plain = |controllers, must_vacate| V2Parent {
        path: own.to_owned(),
        controllers,
        must_vacate,
    };
    // Only the real root lacks cgroup.type.
    let real_root = own == mount_point && !own.join("cgroup.type").exists();
    if real_root || controllers.is_empty() {
        return Ok(plain(controllers, false));
    }
    let enabled = fs::read_to_string(own.join("cgroup.subtree_control")).unwrap_or_default();
    if controllers
        .iter()
        .filter_map(|c| c.v2_name())
        .all(|name| enabled.split_whitespace().any(|e| e == name))
    {
        return Ok(plain(controllers, false));
    }
    let inside = fs::read_to_string(own.join("cgroup.procs")).unwrap_or_default();
    let pids = inside.lines().filter_map(|l| l.trim().parse().ok());
    if pids.into_iter().all(in_own_family) {
        return Ok(plain(controllers, true));
    }
    // Freezing and killing work without controllers.
    Ok(plain(BTreeSet::new(), false))
}

/// Whether a process is this one, one that (transitively) started it, or one
/// it (transitively) started.
fn in_own_family(pid: u32) -> bool {
    let own = std::process::id();
    pid == own || ancestors(own).contains(&pid) || ancestors(pid).contains(&own)
}

fn ancestors(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut at = pid;
    // Bounded: pids may be reused while the chain is walked.
    while found.len() < 256 {
        let Some(parent) = parent_of(at).filter(|p| *p > 0) else {
            break;
        };
        found.push(parent);
        at = parent;
    }
    found
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID_OWN: &str = "10:pids:/\n5:cpu,cpuacct:/slurm/job_1\n0::/\n";
    const HYBRID_MOUNTS: &str = "\
30 20 0:26 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
31 20 0:27 / /sys/fs/cgroup/cpu\\040x rw - cgroup cgroup rw,cpu,cpuacct
32 20 0:28 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
33 20 0:29 / /tmp rw - tmpfs tmpfs rw";

    #[test]
    fn hierarchies_and_memberships_are_read() {
        let own = memberships(HYBRID_OWN);
        assert_eq!(own[1].controllers, ["cpu", "cpuacct"]);
        assert_eq!(own[2].path, "/");
        let mounts = mounted(HYBRID_MOUNTS);
        assert_eq!(mounts.len(), 3);
        assert_eq!(
            directory(&mounts[1], own[1].path).unwrap(),
            Path::new("/sys/fs/cgroup/cpu x/slurm/job_1")
        );
        assert!(mounts[2].v2);
    }

    #[test]
    fn a_group_outside_the_mounted_part_is_refused_with_the_reason() {
        let mounts = mounted("1 2 0:1 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw");
        assert_eq!(
            directory(&mounts[0], "/docker/abc/x").unwrap(),
            Path::new("/sys/fs/cgroup/x")
        );
        assert!(
            directory(&mounts[0], "/other")
                .unwrap_err()
                .contains("outside")
        );
        let mounts = mounted("1 2 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw");
        assert!(
            directory(&mounts[0], "/../sibling")
                .unwrap_err()
                .contains("namespace")
        );
    }

    #[test]
    fn without_any_hierarchy_every_controller_says_why() {
        let found = Cgroups::probe_from("", "");
        for controller in Controller::ALL {
            assert!(found.check(controller).is_err(), "{controller}");
            assert_eq!(found.version(controller), None);
        }
        assert!(found.parents().is_empty());
    }

    #[test]
    fn this_process_and_its_parents_are_family() {
        assert!(in_own_family(std::process::id()));
        assert!(in_own_family(std::os::unix::process::parent_id()));
    }
}
