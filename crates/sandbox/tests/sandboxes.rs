//! What every engine must do alike, through the handle that callers use. Each
//! story runs with each engine.

use skyrl_protocol::guest::{ExecRequest, ExecResult};
use skyrl_protocol::{OwnerId, SandboxId};
use skyrl_sandbox::{
    EngineError, EngineKind, ImageRef, Liveness, Options, Sandbox, SandboxSpec, Sandboxes,
    SnapshotMode, StateDir, prune,
};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn id(name: &str) -> SandboxId {
    name.parse().unwrap()
}

fn owner() -> OwnerId {
    "story".parse().unwrap()
}

fn host() -> SandboxSpec {
    SandboxSpec::new(ImageRef::Host)
}

async fn open(state: &Path, engine: EngineKind) -> Sandboxes {
    let mut options = Options::new(state, owner());
    options.engine = Some(engine);
    Sandboxes::open(options).await.unwrap()
}

async fn shell(sandbox: &Sandbox, line: &str) -> ExecResult {
    let request = ExecRequest {
        timeout_ms: Some(30_000),
        ..ExecRequest::shell(line)
    };
    sandbox.guest.exec(&request).await.unwrap()
}

async fn says(sandbox: &Sandbox, line: &str) -> String {
    let result = shell(sandbox, line).await;
    assert!(result.success(), "{line}: {result:?}");
    result.stdout.text.trim_end().to_owned()
}

/// Everything below a state directory that a dead owner could have left.
fn leftovers(state: &Path) -> Vec<String> {
    let name = state.display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let dir = entry.ok()?.path();
        let line = std::fs::read(dir.join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let own = dir.ends_with(std::process::id().to_string());
        (line.contains(&name) && !own).then(|| format!("process {}: {line}", dir.display()))
    });
    let owners = std::fs::read_dir(state.join("owners"))
        .into_iter()
        .flatten()
        .map(|entry| format!("directory {}", entry.unwrap().path().display()));
    mounts
        .lines()
        .filter(|line| line.contains(&name))
        .map(|line| format!("mount {line}"))
        .chain(processes)
        .chain(owners)
        .collect()
}

fn assert_nothing_left(state: &Path) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let left = leftovers(state);
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {left:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

async fn a_sandbox_lives_and_nothing_of_it_stays(engine: EngineKind) {
    let dir = tempfile::tempdir().unwrap();
    let sandboxes = open(dir.path(), engine).await;
    let sandbox = sandboxes.start(id("one"), host()).await.unwrap();
    assert_eq!(says(&sandbox, "echo hello; id -u").await, "hello\n0");
    assert_eq!(shell(&sandbox, "exit 7").await.exit_code, Some(7));
    let again = sandboxes.start(id("one"), host()).await;
    assert!(matches!(again, Err(EngineError::Exists(_))));

    sandboxes.pause(&id("one")).await.unwrap();
    assert_eq!(
        sandboxes.liveness(&id("one")).await.unwrap(),
        Liveness::Paused
    );
    sandboxes.resume(&id("one")).await.unwrap();
    assert_eq!(says(&sandbox, "echo back").await, "back");
    assert!(
        sandboxes
            .stats(&id("one"))
            .await
            .unwrap()
            .memory_bytes
            .is_some()
    );

    sandboxes.destroy(&id("one")).await.unwrap();
    sandboxes.destroy(&id("one")).await.unwrap();
    assert!(sandboxes.get(&id("one")).is_none());
    let gone = sandboxes.stats(&id("one")).await;
    assert!(matches!(gone, Err(EngineError::NotFound(_))));
    sandboxes.shutdown().await.unwrap();
    assert_nothing_left(dir.path());
}

async fn forks_share_the_prepared_files_and_nothing_else(engine: EngineKind) {
    let dir = tempfile::tempdir().unwrap();
    let sandboxes = open(dir.path(), engine).await;
    let source = sandboxes.start(id("source"), host()).await.unwrap();
    says(
        &source,
        "echo base > /workspace/file; rm -rf /opt; mkdir -p /root/deep/er",
    )
    .await;

    let forks = sandboxes
        .fork(&id("source"), vec![id("f1"), id("f2")], SnapshotMode::Copy)
        .await
        .unwrap();
    says(&source, "echo changed > /workspace/file").await;
    says(&forks[0], "echo mine >> /workspace/file").await;
    assert_eq!(says(&forks[0], "cat /workspace/file").await, "base\nmine");
    assert_eq!(
        says(&forks[1], "cat /workspace/file; ls -d /root/deep/er").await,
        "base\n/root/deep/er"
    );
    assert_eq!(says(&source, "cat /workspace/file").await, "changed");

    let grandchildren = sandboxes
        .fork(&id("f1"), vec![id("g1")], SnapshotMode::Consume)
        .await
        .unwrap();
    assert!(
        sandboxes.get(&id("f1")).is_none(),
        "a consumed sandbox is gone"
    );
    assert_eq!(
        says(&grandchildren[0], "cat /workspace/file").await,
        "base\nmine"
    );

    sandboxes.shutdown().await.unwrap();
    assert_nothing_left(dir.path());
}

async fn an_unwanted_or_failed_start_leaves_nothing(engine: EngineKind) {
    let dir = tempfile::tempdir().unwrap();
    let sandboxes = open(dir.path(), engine).await;
    let missing = SandboxSpec::new(ImageRef::Directory(dir.path().join("absent")));
    let error = sandboxes.start(id("bad"), missing).await.err().unwrap();
    assert!(error.to_string().contains("absent"), "{error}");
    assert!(sandboxes.ids().is_empty());

    let (started, destroyed) = tokio::join!(sandboxes.start(id("racing"), host()), async {
        tokio::task::yield_now().await;
        sandboxes.destroy(&id("racing")).await
    });
    destroyed.unwrap();
    if started.is_ok() {
        // The removal came first: then the start was never known to it.
        sandboxes.destroy(&id("racing")).await.unwrap();
    }
    assert!(sandboxes.ids().is_empty());
    sandboxes.shutdown().await.unwrap();
    assert_nothing_left(dir.path());
}

async fn a_successor_takes_living_sandboxes_over(engine: EngineKind) {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Owner::spawn(dir.path(), engine);
    first.kill();
    let sandboxes = open(dir.path(), engine).await;
    assert_eq!(sandboxes.adopted(), [id("kept")]);
    let kept = sandboxes.get(&id("kept")).unwrap();
    assert_eq!(says(&kept, "cat /tmp/note").await, "from the first owner");
    sandboxes.shutdown().await.unwrap();
    assert_nothing_left(dir.path());
}

async fn what_a_killed_owner_left_is_pruned_and_nobody_elses(engine: EngineKind) {
    let dir = tempfile::tempdir().unwrap();
    let mut dead = Owner::spawn(dir.path(), engine);
    let mut options = Options::new(dir.path(), "bystander".parse().unwrap());
    options.engine = Some(engine);
    let bystanders = Sandboxes::open(options).await.unwrap();
    let bystander = bystanders.start(id("bystander"), host()).await.unwrap();
    dead.kill();

    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(prune::dead_owners(&state).await.unwrap(), [owner()]);
    assert_eq!(says(&bystander, "echo alive").await, "alive");
    assert_eq!(state.owners().unwrap().len(), 1);
    bystanders.shutdown().await.unwrap();
    assert_nothing_left(dir.path());
}

async fn an_old_sandbox_is_removed(engine: EngineKind) {
    let dir = tempfile::tempdir().unwrap();
    let sandboxes = open(dir.path(), engine).await;
    let mut spec = host();
    spec.limits.lifetime = Some(Duration::from_secs(2));
    sandboxes.start(id("old"), spec).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while sandboxes.get(&id("old")).is_some() {
        assert!(Instant::now() < deadline, "it outlived its lifetime");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    sandboxes.shutdown().await.unwrap();
    assert_nothing_left(dir.path());
}

/// Another process that owns a sandbox `kept`: this test program again, told
/// by the environment to be one.
struct Owner(Child);

impl Owner {
    fn spawn(state: &Path, engine: EngineKind) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "owner_process", "--nocapture"])
            .env("STORY_STATE", state)
            .env("STORY_ENGINE", engine.as_str())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let ready = state.join("ready");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !ready.exists() {
            assert!(
                Instant::now() < deadline,
                "the owner process did not get ready"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
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

#[tokio::test(flavor = "multi_thread")]
async fn owner_process() {
    let Some(state) = std::env::var_os("STORY_STATE") else {
        // Run as a test it has nothing to show: the stories call it.
        return;
    };
    let state = Path::new(&state);
    let engine = std::env::var("STORY_ENGINE").unwrap().parse().unwrap();
    let sandboxes = open(state, engine).await;
    let kept = sandboxes.start(id("kept"), host()).await.unwrap();
    says(
        &kept,
        "echo from the first owner > /tmp/note; sleep 1000 >/dev/null 2>&1 &",
    )
    .await;
    std::fs::write(state.join("ready"), "").unwrap();
    std::future::pending::<()>().await;
}

macro_rules! stories {
    ($engine:ident, $kind:expr) => {
        mod $engine {
            use super::*;
            stories!(@each $kind,
                a_sandbox_lives_and_nothing_of_it_stays
                forks_share_the_prepared_files_and_nothing_else
                an_unwanted_or_failed_start_leaves_nothing
                a_successor_takes_living_sandboxes_over
                what_a_killed_owner_left_is_pruned_and_nobody_elses
                an_old_sandbox_is_removed);
        }
    };
    (@each $kind:expr, $($story:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $story() {
            super::$story($kind).await;
        })*
    };
}

stories!(native, EngineKind::Native);
stories!(oci, EngineKind::Oci);
stories!(podman, EngineKind::Podman);
