//! What the podman engine's tests share: an owner in a directory of its own,
//! an image, and looking at what is left on the machine.

use skyrl_protocol::guest::{ExecRequest, ExecResult};
use skyrl_protocol::{OwnerId, SandboxId};
use skyrl_sandbox::image::Quiet;
use skyrl_sandbox::programs::Programs;
use skyrl_sandbox::{
    Engine, EngineContext, GuestClient, ImageRef, ImageStore, OwnerLock, PodmanEngine, SandboxSpec,
    StateDir,
};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A state directory with one owner.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) state: StateDir,
    pub(crate) lock: OwnerLock,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("skyrl-podman-")
            .tempdir()
            .unwrap();
        Self::at(dir, "test")
    }

    pub(crate) fn at(dir: tempfile::TempDir, owner: &str) -> Self {
        let state = StateDir::open(&dir.path().join("s")).unwrap();
        let owner: OwnerId = owner.parse().unwrap();
        let lock = state.lock_owner(&owner).unwrap();
        Self { dir, state, lock }
    }

    pub(crate) fn context(&self) -> EngineContext {
        context(&self.state, &self.lock)
    }

    pub(crate) async fn engine(&self) -> PodmanEngine {
        PodmanEngine::open(self.context()).await.unwrap()
    }

    /// A root with busybox only, as `dir:` image.
    pub(crate) fn busybox(&self) -> ImageRef {
        let root = self.dir.path().join("busybox");
        if !root.exists() {
            busybox_root(&root);
        }
        ImageRef::Directory(root)
    }

    pub(crate) fn spec(&self) -> SandboxSpec {
        SandboxSpec::new(self.busybox())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Whatever became of the test.
        let owner = self.lock.dir().clone();
        let swept = std::thread::spawn(move || {
            tokio::runtime::Runtime::new()
                .unwrap()
                .block_on(skyrl_sandbox::podman::sweep(&owner))
        })
        .join()
        .unwrap();
        if let Err(error) = swept {
            eprintln!("left behind: {error}");
        }
    }
}

/// A name that no other test's sandbox has.
pub(crate) fn unique(name: &str) -> String {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    format!("{name}-{}-{next}", std::process::id())
}

pub(crate) fn context(state: &StateDir, lock: &OwnerLock) -> EngineContext {
    let programs = Programs::install(&state.programs()).unwrap();
    EngineContext {
        owner: lock.dir().clone(),
        images: Arc::new(ImageStore::open(&state.images(), None).unwrap()),
        progress: Arc::new(Quiet),
        guest: programs.guest,
        zygote: programs.zygote,
    }
}

pub(crate) fn busybox_root(root: &Path) {
    for dir in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy(find_busybox(), root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "ls", "sleep", "id", "dd", "mkdir", "rm", "ps", "mount", "hostname", "env",
        "pwd", "kill", "chown", "touch", "head", "yes", "tail", "wget", "ip", "stat",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
}

fn find_busybox() -> PathBuf {
    ["/bin/busybox", "/usr/bin/busybox"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.exists())
        .expect("busybox-static is installed")
}

pub(crate) fn id(name: &str) -> SandboxId {
    name.parse().unwrap()
}

/// Creates and starts a sandbox; gives its guest.
pub(crate) async fn start(engine: &dyn Engine, name: &str, spec: &SandboxSpec) -> GuestClient {
    let id = id(name);
    engine.create(&id, spec).await.unwrap();
    let socket = engine.start(&id).await.unwrap();
    GuestClient::new(id, socket)
}

/// Runs a shell line.
pub(crate) async fn sh(guest: &GuestClient, line: &str) -> ExecResult {
    guest.exec(&ExecRequest::shell(line)).await.unwrap()
}

/// Runs a shell line that must succeed; what it printed.
pub(crate) async fn out(guest: &GuestClient, line: &str) -> String {
    let result = sh(guest, line).await;
    assert!(result.success(), "{line}: {result:?}");
    result.stdout.text.trim().to_owned()
}

/// Everything on the machine that mentions a directory: processes' arguments
/// and mounts of any process.
pub(crate) fn traces(of: &Path) -> Vec<String> {
    let needle = of.to_str().unwrap();
    let mut found = Vec::new();
    let own = std::process::id().to_string();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid.parse::<u32>().is_err() || pid == own {
            continue;
        }
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        if arguments.contains(needle) {
            found.push(format!("process {pid}: {arguments}"));
        }
        let mounts = std::fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        if mounts.contains(needle) {
            found.push(format!("mount seen by {pid}"));
        }
    }
    found
}

/// Waits until nothing on the machine mentions a directory any more.
#[track_caller]
pub(crate) fn assert_no_traces(of: &Path) {
    eventually("nothing is left", || {
        let left = traces(of);
        if !left.is_empty() {
            eprintln!("still there: {left:?}");
        }
        left.is_empty()
    });
}

/// Waits for something that must happen.
#[track_caller]
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !check() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Control groups with this name.
pub(crate) fn groups(name: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, name: &str, found: &mut Vec<PathBuf>, depth: usize) {
        let Ok(entries) = std::fs::read_dir(dir) else {
            return;
        };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if entry.file_name().to_string_lossy() == name {
                found.push(entry.path());
            }
            if depth > 0 {
                walk(&entry.path(), name, found, depth - 1);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), name, &mut found, 6);
    found
}
