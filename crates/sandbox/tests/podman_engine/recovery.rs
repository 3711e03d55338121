//! What happens when something is killed: the service, the owner, a sandbox in
//! the making.

use crate::support::{
    Place, assert_no_traces, context, eventually, groups, id, out, start, unique,
};
use crate::users::{Subordinate, run, run_as_plain_user};
use skyrl_sandbox::image::ImageRef;
use skyrl_sandbox::{Engine, GuestClient, PodmanEngine, SandboxSpec, StateDir, podman};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Tells this program to be an owner: its state directory.
const OWNER: &str = "PODMAN_TEST_OWNER";
const KEPT: &str = "kept";

/// Numbers of an owner's services.
fn services(state: &Path) -> Vec<i32> {
    let needle = state.to_str().unwrap();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(needle) && line.contains("system service")
        })
        .collect()
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

async fn a_killed_service_is_started_again_and_sandboxes_do_not_notice() {
    let place = Place::new();
    let engine = place.engine().await;
    let name = unique("steady");
    let guest = start(&engine, &name, &place.spec()).await;
    engine.liveness(&id(&name)).await.unwrap();
    for pid in services(place.dir.path()) {
        kill(pid);
    }
    assert_eq!(out(&guest, "echo unmoved").await, "unmoved");
    engine.pause(&id(&name)).await.unwrap();
    engine.resume(&id(&name)).await.unwrap();
    let second = start(&engine, &unique("second"), &place.spec()).await;
    assert_eq!(out(&second, "echo too").await, "too");
    for pid in services(place.dir.path()) {
        kill(pid);
    }
    engine.destroy(&id(&name)).await.unwrap();
    assert!(groups(&name).is_empty());
    engine.shutdown().await.unwrap();
    assert_no_traces(place.dir.path());
}

/// Another process with an engine and a sandbox: this program again.
struct Owner(Child);

impl Owner {
    fn spawn(state: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "recovery::owner_process", "--nocapture"])
            .env(OWNER, state)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Run as a test it has nothing to show: the stories call it.
#[tokio::test(flavor = "multi_thread")]
async fn owner_process() {
    let Some(directory) = std::env::var_os(OWNER) else {
        return;
    };
    let directory = Path::new(&directory);
    let state = StateDir::open(&directory.join("s")).unwrap();
    let lock = state.lock_owner(&"test".parse().unwrap()).unwrap();
    let engine = PodmanEngine::open(context(&state, &lock)).await.unwrap();
    std::fs::write(directory.join("open"), "").unwrap();
    let image = ImageRef::Directory(directory.join("busybox"));
    let spec = SandboxSpec::new(image);
    let guest = start(&engine, KEPT, &spec).await;
    out(
        &guest,
        "echo noted > /root/note; (sleep 1000; true) >/dev/null 2>&1 &",
    )
    .await;
    std::fs::write(directory.join("ready"), "").unwrap();
    // Sandboxes come and go until it is killed.
    for turn in 0.. {
        let name = format!("passing-{turn}");
        start(&engine, &name, &spec).await;
        engine.destroy(&id(&name)).await.unwrap();
    }
}

fn prepared() -> tempfile::TempDir {
    let directory = tempfile::Builder::new()
        .prefix("skyrl-podman-")
        .tempdir()
        .unwrap();
    crate::support::busybox_root(&directory.path().join("busybox"));
    directory
}

async fn a_successor_takes_over_what_a_killed_owner_left() {
    let directory = prepared();
    let mut owner = Owner::spawn(directory.path());
    eventually("the owner is ready", || {
        directory.path().join("ready").exists()
    });
    tokio::time::sleep(Duration::from_millis(130)).await;
    owner.kill();

    let place = Place::at(directory, "test");
    eventually("the service went with its owner", || {
        services(place.dir.path()).is_empty()
    });
    let engine = place.engine().await;
    let adopted = engine.adopt().await.unwrap();
    let socket = adopted
        .iter()
        .find(|(found, _)| *found == id(KEPT))
        .map(|(_, socket)| socket.clone())
        .expect("the living sandbox is found");
    let guest = GuestClient::new(id(KEPT), socket);
    assert_eq!(out(&guest, "cat /root/note").await, "noted");
    engine.pause(&id(KEPT)).await.unwrap();
    engine.resume(&id(KEPT)).await.unwrap();
    for (found, _) in &adopted {
        engine.destroy(found).await.unwrap();
    }
    assert!(engine.adopt().await.unwrap().is_empty());
    engine.shutdown().await.unwrap();
    assert_no_traces(place.dir.path());
}

/// Kills an owner at many moments of opening, creating, starting and
/// destroying; each time everything of it can be removed.
async fn whenever_an_owner_is_killed_nothing_of_it_stays() {
    for delay_ms in [60, 250, 420, 520, 640, 780, 900, 1_100] {
        let directory = prepared();
        let begun = Instant::now();
        let mut owner = Owner::spawn(directory.path());
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        owner.kill();
        let killed = begun.elapsed();
        let state = StateDir::open(&directory.path().join("s")).unwrap();
        let dir = state.owner_dir(&"test".parse().unwrap());
        podman::sweep(&dir).await.unwrap();
        podman::sweep(&dir).await.unwrap();
        assert_no_traces(directory.path());
        let left: Vec<_> = std::fs::read_dir(dir.root().join("sandboxes"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        assert!(left.is_empty(), "killed after {killed:?}: {left:?}");
    }
    assert!(groups(KEPT).is_empty());
}

async fn sweeping_one_owner_leaves_the_other_alone() {
    let place = Place::new();
    let engine = place.engine().await;
    let name = unique("bystander");
    let guest = start(&engine, &name, &place.spec()).await;
    let dead = Place::new();
    let victim = dead.engine().await;
    let other = unique("victim");
    let lost = start(&victim, &other, &dead.spec()).await;
    podman::sweep(dead.lock.dir()).await.unwrap();
    assert!(lost.health().await.is_err());
    assert!(groups(&other).is_empty());
    assert_eq!(out(&guest, "echo here").await, "here");
    engine.pause(&id(&name)).await.unwrap();
    engine.resume(&id(&name)).await.unwrap();
    assert_no_traces(dead.dir.path());
}

macro_rules! stories {
    ($($story:ident)*) => {
        mod root {
            $(#[test]
            fn $story() {
                super::run(super::$story());
            })*
        }
        mod granted {
            use super::Subordinate;
            $(#[test]
            fn $story() {
                let name = concat!("recovery::granted::", stringify!($story));
                super::run_as_plain_user(name, Subordinate::Granted, super::$story());
            })*
        }
    };
}

stories! {
    a_killed_service_is_started_again_and_sandboxes_do_not_notice
    a_successor_takes_over_what_a_killed_owner_left
    whenever_an_owner_is_killed_nothing_of_it_stays
    sweeping_one_owner_leaves_the_other_alone
}
