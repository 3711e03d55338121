//! Control groups against the real kernel. Where this machine lets the user
//! make none, the probe must say why for every controller.

use skyrl_sandbox::cgroup::group::{Frozen, sweep};
use skyrl_sandbox::cgroup::{Bounds, Cgroups, Controller, Group, victims};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// Makes a group, or checks that its absence is explained.
fn group(key: &str, bounds: &Bounds) -> Option<(Cgroups, Group)> {
    let cgroups = Cgroups::probe();
    let unusable: Vec<Controller> = Controller::ALL
        .into_iter()
        .filter(|c| cgroups.check(*c).is_err())
        .collect();
    if !unusable.is_empty() {
        assert!(
            !rustix::process::geteuid().is_root(),
            "root lacks {unusable:?} here: {:?}",
            cgroups.check(unusable[0])
        );
        for controller in unusable {
            assert!(!cgroups.check(controller).unwrap_err().is_empty());
        }
        return None;
    }
    cgroups.claim().unwrap();
    let key = format!("{key}-{}", std::process::id());
    let group = cgroups.plan(&key, "box");
    group.create(bounds).unwrap();
    Some((cgroups, group))
}

/// A shell inside the group from its first instruction.
fn shell(group: &Group, script: &str) -> Child {
    let enter: String = group
        .directories()
        .into_iter()
        .map(|d| format!("echo $$ > '{}/cgroup.procs' && ", d.display()))
        .collect();
    Command::new("sh")
        .args(["-c", &format!("{enter} {{ {script}; }}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn wait_for(what: &str, mut check: impl FnMut() -> bool) {
    let until = Instant::now() + 10 * SECOND;
    while !check() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn gone(group: &Group) -> bool {
    group.directories().into_iter().all(|d| !d.exists())
}

#[test]
fn a_group_counts_freezes_thaws_and_is_removed_with_what_runs_in_it() {
    let Some((_, group)) = group("count", &Bounds::default()) else {
        return;
    };
    let mut child = shell(&group, "while :; do :; done");
    wait_for("the shell is inside and counted", || {
        group.processes() == [child.id() as i32]
            && group.usage().cpu_seconds.unwrap() > 0.01
            && group.usage().memory_bytes.unwrap() > 0
    });
    assert_eq!(group.usage().pids, Some(1));
    group.set_frozen(Frozen::Yes, SECOND).unwrap();
    assert!(group.is_frozen());
    let used = group.usage().cpu_seconds;
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(group.usage().cpu_seconds, used, "it ran while frozen");
    group.set_frozen(Frozen::No, SECOND).unwrap();
    wait_for("it runs again", || group.usage().cpu_seconds > used);
    group.set_frozen(Frozen::Yes, SECOND).unwrap();
    group.kill();
    child.wait().unwrap();
    group.remove(SECOND).unwrap();
    group.remove(SECOND).unwrap();
    assert!(gone(&group));
    sweep_owner(&group);
}

/// Removes the owner's group too, as an engine's shutdown does.
fn sweep_owner(group: &Group) {
    let owners: Vec<PathBuf> = group
        .directories()
        .into_iter()
        .filter_map(Path::parent)
        .map(Path::to_owned)
        .collect();
    let key = owners[0].file_name().unwrap().to_str().unwrap();
    let key = key.strip_prefix("skyrl-").unwrap();
    let parents: Vec<PathBuf> = owners
        .iter()
        .map(|o| o.parent().unwrap().to_owned())
        .collect();
    sweep(&parents, key, SECOND).unwrap();
    sweep(&parents, key, SECOND).unwrap();
    assert!(owners.iter().all(|o| !o.exists()));
}

#[test]
fn memory_over_the_bound_is_an_oom_kill_with_a_named_victim() {
    let bounds = Bounds {
        memory_bytes: Some(16 << 20),
        ..Bounds::default()
    };
    let Some((_, group)) = group("oom", &bounds) else {
        return;
    };
    let status = shell(&group, "exec tail /dev/zero").wait().unwrap();
    assert!(!status.success());
    assert_eq!(group.usage().oom_kills, 1);
    assert!(group.usage().memory_peak_bytes.unwrap() <= 16 << 20);
    let victims = victims(group.memory_directory().unwrap());
    assert_eq!(victims.len(), 1);
    assert_eq!(victims[0].name, "tail");
    sweep_owner(&group);
}

#[test]
fn processes_and_cpu_are_bounded() {
    let bounds = Bounds {
        pids: Some(4),
        cpus: Some(0.2),
        ..Bounds::default()
    };
    let Some((_, group)) = group("bounds", &bounds) else {
        return;
    };
    let mut child = shell(
        &group,
        "for i in 1 2 3 4 5 6 7 8; do sleep 60 & done 2>/dev/null; while :; do :; done",
    );
    wait_for("forks fail", || group.usage().pids == Some(4));
    let (before, since) = (group.usage().cpu_seconds.unwrap(), Instant::now());
    std::thread::sleep(SECOND);
    let used = group.usage().cpu_seconds.unwrap() - before;
    let share = used / since.elapsed().as_secs_f64();
    assert!(share < 0.35, "used {share} of a core");
    group.remove(SECOND).unwrap();
    child.wait().unwrap();
    sweep_owner(&group);
}

#[test]
fn sweeping_removes_groups_that_only_their_owner_name_leads_to() {
    let Some((cgroups, group)) = group("swept", &Bounds::default()) else {
        return;
    };
    let mut child = shell(&group, "sleep 60 & sleep 60");
    wait_for("both run", || group.processes().len() >= 2);
    let key = format!("swept-{}", std::process::id());
    sweep(&cgroups.parents(), &key, 2 * SECOND).unwrap();
    assert!(gone(&group));
    assert!(!child.wait().unwrap().success());
}
