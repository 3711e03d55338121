//! Nothing is left behind, whoever is killed and whenever.

use crate::bed::{
    Bed, assert_nothing_left, busybox, cause_of_end, eventually, ok, owner, processes_of, run,
    run_as_plain_user, sh,
};
use skyrl_protocol::SandboxId;
use skyrl_protocol::zygote::Identity;
use skyrl_sandbox::native::{NativeEngine, NativeOptions, sweep};
use skyrl_sandbox::{Engine, GuestClient, Liveness};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

fn id(name: &str) -> SandboxId {
    name.parse().unwrap()
}

fn zygote(owner: &Path) -> Identity {
    let text = std::fs::read(owner.join("engine/native/zygote.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

async fn zygote_killed() {
    let bed = Bed::new().await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    ok(&sh(
        &guest,
        "sleep 1000 >/dev/null 2>&1 & setsid sleep 1000 >/dev/null 2>&1 &",
    )
    .await);
    let owner = bed.context.owner.root().to_owned();
    let before = zygote(&owner);
    kill(before.pid);
    let cause = cause_of_end(&bed.engine, &id("box")).await;
    assert!(cause.contains("killed"), "{cause}");
    // The engine goes on with another zygote.
    bed.engine.destroy(&id("box")).await.unwrap();
    let guest = bed.start("box", &busybox()).await.unwrap();
    ok(&sh(&guest, "true").await);
    assert_ne!(zygote(&owner).pid, before.pid);
    bed.end().await;
}

#[test]
fn a_killed_zygote_takes_its_sandboxes_along_and_is_replaced_as_root() {
    run(zygote_killed());
}

#[test]
fn a_killed_zygote_takes_its_sandboxes_along_and_is_replaced_as_a_plain_user() {
    run_as_plain_user(
        "leftovers::a_killed_zygote_takes_its_sandboxes_along_and_is_replaced_as_a_plain_user",
        zygote_killed(),
    );
}

async fn guest_killed() {
    let bed = Bed::new().await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    ok(&sh(&guest, "sleep 1000 >/dev/null 2>&1 &").await);
    // No process of the sandbox can kill its guest.
    ok(&sh(&guest, "kill -9 1; kill -9 -1; true").await);
    let guest = GuestClient::new(id("box"), guest.socket().to_owned());
    ok(&sh(&guest, "true").await);
    let record = bed.context.owner.sandbox(&id("box")).join("native.json");
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    kill(record["process"]["pid"].as_i64().unwrap() as i32);
    let cause = cause_of_end(&bed.engine, &id("box")).await;
    assert!(
        cause.contains("signal: 9") || cause.contains("killed"),
        "{cause}"
    );
    bed.end().await;
}

#[test]
fn a_killed_guest_is_noticed_as_root() {
    run(guest_killed());
}

#[test]
fn a_killed_guest_is_noticed_as_a_plain_user() {
    run_as_plain_user(
        "leftovers::a_killed_guest_is_noticed_as_a_plain_user",
        guest_killed(),
    );
}

async fn adoption() {
    let bed = Bed::new().await;
    let guest = bed.start("kept", &busybox()).await.unwrap();
    ok(&sh(&guest, "echo here > /tmp/mark").await);
    bed.engine
        .create(&id("unstarted"), &busybox())
        .await
        .unwrap();
    let Bed {
        engine, context, ..
    } = &bed;
    let _ = engine;
    // A second engine of the same owner stands for the restarted process.
    let again = NativeEngine::open(context.clone()).await.unwrap();
    let adopted = again.adopt().await.unwrap();
    assert_eq!(adopted.len(), 1, "{adopted:?}");
    assert_eq!(adopted[0].0, id("kept"));
    let guest = GuestClient::new(id("kept"), adopted[0].1.clone());
    assert_eq!(ok(&sh(&guest, "cat /tmp/mark").await), "here");
    assert_eq!(
        again.liveness(&id("kept")).await.unwrap(),
        Liveness::Running
    );
    assert!(!context.owner.sandbox(&id("unstarted")).exists());
    again.destroy(&id("kept")).await.unwrap();
    drop(again);
    bed.end().await;
}

#[test]
fn a_restarted_owner_takes_its_living_sandboxes_over_as_root() {
    run(adoption());
}

#[test]
fn a_restarted_owner_takes_its_living_sandboxes_over_as_a_plain_user() {
    run_as_plain_user(
        "leftovers::a_restarted_owner_takes_its_living_sandboxes_over_as_a_plain_user",
        adoption(),
    );
}

async fn abandoned() {
    let dir = tempfile::tempdir().unwrap();
    let (context, lock) = owner(dir.path());
    let root = context.owner.root().to_owned();
    let options = NativeOptions {
        grace: Duration::from_millis(300),
        ..NativeOptions::default()
    };
    let engine = NativeEngine::open_with(context.clone(), options)
        .await
        .unwrap();
    engine.create(&id("box"), &busybox()).await.unwrap();
    engine.start(&id("box")).await.unwrap();
    assert!(!processes_of(&root).is_empty());
    drop(engine);
    eventually("the zygote ends itself", || processes_of(&root).is_empty());
    sweep(&context.owner).unwrap();
    sweep(&context.owner).unwrap();
    assert_nothing_left(&root);
    lock.remove().unwrap();
}

#[test]
fn an_abandoned_zygote_ends_after_its_grace_as_root() {
    run(abandoned());
}

#[test]
fn an_abandoned_zygote_ends_after_its_grace_as_a_plain_user() {
    run_as_plain_user(
        "leftovers::an_abandoned_zygote_ends_after_its_grace_as_a_plain_user",
        abandoned(),
    );
}

/// Where the owner to be killed keeps its state.
const DOOMED: &str = "SKYRL_TEST_DOOMED_OWNER";

/// Not a test of its own: the process that `whoever_is_killed` kills. It
/// creates, forks and destroys sandboxes until then.
#[test]
fn an_owner_that_is_busy_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DOOMED) else {
        return;
    };
    run(async move {
        let (context, _lock) = owner(Path::new(&dir));
        let engine = NativeEngine::open(context).await.unwrap();
        println!("busy");
        for n in 0.. {
            let name = format!("box-{n}");
            let _ = engine.create(&id(&name), &busybox()).await;
            let _ = engine.start(&id(&name)).await;
            if n % 3 == 1 {
                let snapshot = format!("s{n}").parse().unwrap();
                let mode = skyrl_sandbox::SnapshotMode::Consume;
                let _ = engine.snapshot(&id(&name), &snapshot, mode).await;
            }
            if n >= 3 {
                let _ = engine.destroy(&id(&format!("box-{}", n - 3))).await;
            }
        }
    });
}

fn busy_owner(dir: &Path) -> Child {
    use std::io::{BufRead, BufReader};
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "leftovers::an_owner_that_is_busy_until_it_is_killed",
            "--nocapture",
        ])
        .env(DOOMED, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    assert!(
        out.lines()
            .map_while(Result::ok)
            .any(|line| line.contains("busy")),
        "the owner never got busy"
    );
    child
}

/// Kills the owner (and sometimes its zygote) at some moment, sweeps, and
/// looks for leftovers.
fn whoever_is_killed() {
    for round in 0..6u64 {
        let dir = tempfile::tempdir().unwrap();
        let mut child = busy_owner(dir.path());
        std::thread::sleep(Duration::from_millis(20 + round * 37));
        let root = dir.path().join("owners/test");
        if round % 2 == 1 && root.join("engine/native/zygote.json").exists() {
            kill(zygote(&root).pid);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let (context, lock) = owner(dir.path());
        sweep(&context.owner).unwrap();
        sweep(&context.owner).unwrap();
        assert_nothing_left(&root);
        lock.remove().unwrap();
    }
}

#[test]
fn whoever_is_killed_and_whenever_a_sweep_removes_all_as_root() {
    run(async { whoever_is_killed() });
}

#[test]
fn whoever_is_killed_and_whenever_a_sweep_removes_all_as_a_plain_user() {
    run_as_plain_user(
        "leftovers::whoever_is_killed_and_whenever_a_sweep_removes_all_as_a_plain_user",
        async { whoever_is_killed() },
    );
}

#[test]
fn sweeping_one_owner_leaves_another_alone() {
    run(async {
        let bed = Bed::new().await;
        let guest = bed.start("box", &busybox()).await.unwrap();
        let dead = tempfile::tempdir().unwrap();
        let (context, lock) = owner(dead.path());
        let engine = NativeEngine::open(context.clone()).await.unwrap();
        engine.create(&id("box"), &busybox()).await.unwrap();
        engine.start(&id("box")).await.unwrap();
        drop(engine);
        sweep(&context.owner).unwrap();
        assert_nothing_left(context.owner.root());
        ok(&sh(&guest, "true").await);
        lock.remove().unwrap();
        bed.end().await;
    });
}
