//! What is left when an owner is killed, and who cleans up.

use crate::bed::{
    assert_nothing_left, busybox, id, image_path, is_root, ok, owner, run, run_as_plain_user, sh,
    start, sweep_now,
};
use skyrl_sandbox::oci::{OciEngine, OciOptions, RuntimeKind};
use skyrl_sandbox::{
    Engine, EngineContext, GuestClient, Network, OwnerLock, SandboxSpec, SnapshotMode, StateDir,
};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// State directory of the owner that this process is to be.
const STATE: &str = "SKYRL_TEST_OCI_STATE";

/// What it is to do there.
const WORK: &str = "SKYRL_TEST_OCI_WORK";

/// Works as an owner does, over and over, until it is killed or has done all
/// a few times. The tests below run it in a process of its own to kill it.
#[test]
fn an_owner_at_work_leaves_nothing_when_it_ends_in_order() {
    let given = std::env::var_os(STATE).map(PathBuf::from);
    // Not made when it is not used: nobody would remove it after a kill.
    let own = given.is_none().then(|| tempfile::tempdir().unwrap());
    let dir = match (&given, &own) {
        (Some(given), _) => given,
        (None, Some(own)) => own.path(),
        (None, None) => unreachable!("one of them is there"),
    };
    let work = std::env::var(WORK).unwrap_or_default();
    let (context, lock) = owner(dir);
    run(async {
        let engine = open(context, &work).await;
        match work.as_str() {
            "wait" => {
                for name in ["one", "two"] {
                    start(&engine, name, &busybox()).await.unwrap();
                }
                std::fs::write(dir.join("ready"), "").unwrap();
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            _ => {
                let rounds = if given.is_some() { 1000 } else { 2 };
                for _ in 0..rounds {
                    all_verbs(&engine, &work, dir).await;
                }
            }
        }
        engine.shutdown().await.unwrap();
    });
    assert_nothing_left(lock.dir().root());
}

async fn open(context: EngineContext, work: &str) -> OciEngine {
    let options = OciOptions {
        runtime: (work == "runc").then_some(RuntimeKind::Runc),
        without_cgroups: work == "without cgroups",
        ..OciOptions::default()
    };
    OciEngine::open_with(context, options).await.unwrap()
}

async fn all_verbs(engine: &OciEngine, work: &str, dir: &Path) {
    let mut spec = busybox();
    if work == "nat" {
        spec.network = Network::Nat;
    }
    start(engine, "a", &spec).await.unwrap();
    std::fs::write(dir.join("ready"), "").unwrap();
    let snapshot = "s".parse().unwrap();
    engine
        .snapshot(&id("a"), &snapshot, SnapshotMode::Consume)
        .await
        .unwrap();
    let fork = SandboxSpec::new("snapshot:s".parse().unwrap());
    start(engine, "b", &fork).await.unwrap();
    engine.destroy(&id("b")).await.unwrap();
    engine.remove_snapshot(&snapshot).await.unwrap();
}

/// An owner in a process of its own.
struct Victim(Child);

impl Victim {
    fn start(dir: &Path, work: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("recovery::an_owner_at_work_leaves_nothing_when_it_ends_in_order")
            .env(STATE, dir)
            .env(WORK, work)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn wait_until_ready(&mut self, dir: &Path) {
        let until = Instant::now() + Duration::from_secs(60);
        while !dir.join("ready").exists() {
            assert!(Instant::now() < until, "the owner never got to work");
            assert!(self.0.try_wait().unwrap().is_none(), "the owner ended");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lock_of(dir: &Path) -> OwnerLock {
    let state = StateDir::open(dir).unwrap();
    state.lock_owner(&"test".parse().unwrap()).unwrap()
}

/// Kills an owner at ever other points of its work.
fn killed_anywhere(work: &str, points: u64) {
    for point in 0..points {
        let dir = tempfile::tempdir().unwrap();
        let mut victim = Victim::start(dir.path(), work);
        if point > 0 {
            victim.wait_until_ready(dir.path());
        }
        std::thread::sleep(Duration::from_micros(point * 3_700));
        victim.kill();
        let lock = lock_of(dir.path());
        sweep_now(lock.dir());
        // Again: sweeping what is swept is no error.
        sweep_now(lock.dir());
        assert_nothing_left(lock.dir().root());
    }
}

#[test]
fn an_owner_killed_at_any_point_leaves_nothing_after_a_sweep() {
    assert!(is_root());
    killed_anywhere("", 25);
}

#[test]
fn an_owner_without_cgroups_killed_at_any_point_leaves_nothing_after_a_sweep() {
    assert!(is_root());
    killed_anywhere("without cgroups", 25);
}

#[test]
fn an_owner_with_translated_networks_killed_at_any_point_leaves_nothing_after_a_sweep() {
    assert!(is_root());
    killed_anywhere("nat", 10);
}

#[test]
fn an_owner_that_uses_runc_killed_at_any_point_leaves_nothing_after_a_sweep() {
    assert!(is_root());
    killed_anywhere("runc", 10);
}

#[test]
fn a_plain_users_owner_killed_at_any_point_leaves_nothing_after_a_sweep() {
    run_as_plain_user(
        "recovery::a_plain_users_owner_killed_at_any_point_leaves_nothing_after_a_sweep",
        async { killed_anywhere("", 20) },
    );
}

async fn a_successor_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut victim = Victim::start(dir.path(), "wait");
    victim.wait_until_ready(dir.path());
    victim.kill();
    let (context, lock) = owner(dir.path());
    let engine = OciEngine::open(context).await.unwrap();
    let mut adopted = engine.adopt().await.unwrap();
    adopted.sort();
    let names: Vec<&str> = adopted.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(names, ["one", "two"]);
    for (id, socket) in &adopted {
        let guest = GuestClient::new(id.clone(), socket.clone());
        assert_eq!(ok(&sh(&guest, "hostname").await), id.as_str());
        assert!(engine.stats(id).await.unwrap().memory_bytes.unwrap() > 0);
    }
    engine.pause(&id("one")).await.unwrap();
    engine.resume(&id("one")).await.unwrap();
    let snapshot = "s".parse().unwrap();
    engine
        .snapshot(&id("one"), &snapshot, SnapshotMode::Consume)
        .await
        .unwrap();
    engine.destroy(&id("two")).await.unwrap();
    engine.remove_snapshot(&snapshot).await.unwrap();
    engine.shutdown().await.unwrap();
    assert_nothing_left(lock.dir().root());
    assert!(image_path("busybox").exists());
}

#[test]
fn a_successor_takes_over_what_a_killed_owner_left_as_root() {
    run(a_successor_takes_over());
}

#[test]
fn a_successor_takes_over_what_a_killed_owner_left_as_a_plain_user() {
    run_as_plain_user(
        "recovery::a_successor_takes_over_what_a_killed_owner_left_as_a_plain_user",
        a_successor_takes_over(),
    );
}

#[test]
fn sweeping_one_owner_leaves_another_alone() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut victim = Victim::start(dir.path(), "wait");
        victim.wait_until_ready(dir.path());
        victim.kill();
        let other = crate::bed::Bed::new().await;
        let guest = other.start("one", &busybox()).await.unwrap();
        let lock = lock_of(dir.path());
        sweep_now(lock.dir());
        assert_nothing_left(lock.dir().root());
        assert_eq!(ok(&sh(&guest, "echo alive").await), "alive");
        other.end().await;
    });
}

#[test]
fn a_start_that_is_given_up_leaves_nothing() {
    run(async {
        let bed = crate::bed::Bed::new().await;
        for delay in [0u64, 1, 3, 6, 9, 12] {
            bed.engine.create(&id("box"), &busybox()).await.unwrap();
            let engine = bed.engine.clone();
            let starting = tokio::spawn(async move { engine.start(&id("box")).await.map(drop) });
            tokio::time::sleep(Duration::from_millis(delay)).await;
            starting.abort();
            bed.engine.destroy(&id("box")).await.unwrap();
        }
        bed.end().await;
    });
}
