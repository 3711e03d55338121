//! What the tests of the native engine share: an owner with an engine in a
//! directory of its own, images, and running a test again as a plain user.

use skyrl_protocol::SandboxId;
use skyrl_protocol::guest::{ExecRequest, ExecResult};
use skyrl_sandbox::cgroup::Cgroups;
use skyrl_sandbox::image::Quiet;
use skyrl_sandbox::native::{NativeEngine, NativeOptions};
use skyrl_sandbox::programs::Programs;
use skyrl_sandbox::{
    Engine, EngineContext, EngineError, GuestClient, ImageRef, ImageStore, Liveness, OwnerLock,
    SandboxSpec, StateDir,
};
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Set in the process that runs a test as a plain user.
const INNER: &str = "SKYRL_TEST_AS_PLAIN_USER";

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a test on a runtime of its own.
pub(crate) fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

/// Runs a test as a plain user: this process if it is one, else the test
/// named `name` of this binary once more under a user id made up here.
pub(crate) fn run_as_plain_user(name: &str, test: impl Future<Output = ()>) {
    if !is_root() {
        return run(test);
    }
    assert!(std::env::var_os(INNER).is_none(), "still root");
    let id = (200_000 + std::process::id()).to_string();
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let program = home.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", &id, "--regid", &id, "--clear-groups"])
        .arg(program)
        .args(["--exact", name, "--nocapture"])
        .env(INNER, "1")
        .env("HOME", home.path())
        .env("TMPDIR", home.path())
        .current_dir("/")
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "as user {id}:\n{said}");
    assert!(
        said.contains("1 passed"),
        "no test is named {name}:\n{said}"
    );
}

/// Path of a test image.
pub(crate) fn image_path(name: &str) -> PathBuf {
    let dir = std::env::var_os("SKYRL_TEST_IMAGES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/test-images"),
        PathBuf::from,
    );
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is missing: run `make test-images`",
        path.display()
    );
    path
}

/// A spec on the busybox image, unpacked into the store from an archive of
/// several layers.
pub(crate) fn busybox() -> SandboxSpec {
    SandboxSpec::new(ImageRef::OciArchive {
        path: image_path("busybox.oci.tar"),
        tag: Some("v1".into()),
    })
}

/// A spec on the Debian image.
pub(crate) fn debian() -> SandboxSpec {
    SandboxSpec::new(ImageRef::Directory(image_path("debian")))
}

/// An owner with an engine.
pub(crate) struct Bed {
    pub(crate) engine: NativeEngine,
    pub(crate) context: EngineContext,
    lock: Option<OwnerLock>,
    _dir: tempfile::TempDir,
}

impl Bed {
    pub(crate) async fn new() -> Self {
        Self::with(NativeOptions::default()).await
    }

    pub(crate) async fn with(options: NativeOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (context, lock) = owner(dir.path());
        let engine = NativeEngine::open_with(context.clone(), options)
            .await
            .unwrap();
        Self {
            engine,
            context,
            lock: Some(lock),
            _dir: dir,
        }
    }

    /// Creates and starts a sandbox.
    pub(crate) async fn start(
        &self,
        id: &str,
        spec: &SandboxSpec,
    ) -> Result<GuestClient, EngineError> {
        let id: SandboxId = id.parse().unwrap();
        self.engine.create(&id, spec).await?;
        let socket = self.engine.start(&id).await?;
        Ok(GuestClient::new(id, socket))
    }

    /// Ends everything in order and checks that nothing is left.
    pub(crate) async fn end(mut self) {
        self.engine.shutdown().await.unwrap();
        drop(self.engine);
        let lock = self.lock.take().unwrap();
        let owner = lock.dir().root().to_owned();
        assert_nothing_left(&owner);
        lock.remove().unwrap();
        assert!(!owner.exists());
    }
}

/// An owner named `test` in a state directory.
pub(crate) fn owner(dir: &std::path::Path) -> (EngineContext, OwnerLock) {
    let state = StateDir::open(dir).unwrap();
    let lock = state.lock_owner(&"test".parse().unwrap()).unwrap();
    let programs = Programs::install(&state.programs()).unwrap();
    let context = EngineContext {
        owner: Arc::clone(lock.dir()),
        images: Arc::new(ImageStore::open(&state.images(), None).unwrap()),
        progress: Arc::new(Quiet),
        guest: programs.guest,
        zygote: programs.zygote,
    };
    (context, lock)
}

/// Looks for processes, mounts, cgroups and directories of an owner.
pub(crate) fn assert_nothing_left(owner: &std::path::Path) {
    eventually("its processes are gone", || processes_of(owner).is_empty());
    let mounts = skyrl_sandbox::rootfs::mounts_below(owner);
    assert!(mounts.is_empty(), "left mounted: {mounts:?}");
    let groups = groups_of(owner);
    assert!(groups.is_empty(), "left cgroups: {groups:?}");
    let sandboxes: Vec<_> = std::fs::read_dir(owner.join("sandboxes"))
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    assert!(sandboxes.is_empty(), "left directories: {sandboxes:?}");
}

/// Host processes that have the owner's directory in their command line, or
/// whose root is a sandbox's that does.
pub(crate) fn processes_of(owner: &std::path::Path) -> Vec<i32> {
    let needle = owner.to_str().unwrap();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != std::process::id() as i32)
        .filter(|pid| {
            let read =
                |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let text = String::from_utf8_lossy(&read("cmdline")).into_owned();
            let environment = String::from_utf8_lossy(&read("environ")).into_owned();
            text.contains(needle) || environment.contains(needle)
        })
        .collect()
}

/// cgroups whose name belongs to the owner.
fn groups_of(owner: &std::path::Path) -> Vec<PathBuf> {
    let parents = Cgroups::probe().parents();
    parents
        .iter()
        .flat_map(|parent| std::fs::read_dir(parent).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("skyrl-test-") && path.join("cgroup.procs").exists()
        })
        .filter(|path| path.to_string_lossy().ends_with(&key_hash(owner)))
        .collect()
}

fn key_hash(owner: &std::path::Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let digest = <sha2::Sha256 as sha2::Digest>::digest(owner.as_os_str().as_bytes());
    digest[..4].iter().map(|b| format!("{b:02x}")).collect()
}

/// Waits for something that must happen.
#[track_caller]
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a shell line and returns all about it.
pub(crate) async fn sh(guest: &GuestClient, line: &str) -> ExecResult {
    guest.exec(&ExecRequest::shell(line)).await.unwrap()
}

/// Runs a shell line that must succeed; returns what it printed, trimmed.
#[track_caller]
pub(crate) fn ok(result: &ExecResult) -> String {
    assert!(
        result.success(),
        "exit {:?} signal {:?}\n{}\n{}",
        result.exit_code,
        result.signal,
        result.stdout.text,
        result.stderr.text
    );
    result.stdout.text.trim().to_owned()
}

/// The cause of a sandbox's end, which must have come or come soon.
pub(crate) async fn cause_of_end(engine: &dyn Engine, id: &SandboxId) -> String {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        if let Liveness::Ended { cause } = engine.liveness(id).await.unwrap() {
            return cause;
        }
        assert!(Instant::now() < until, "sandbox {id} lives on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
