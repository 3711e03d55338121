//! Running a test of this program once more as a plain user. Such users are
//! made for the test and removed after it.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// Set in the process that runs a test as a plain user.
const INNER: &str = "SKYRL_TEST_AS_PLAIN_USER";
/// Names of users made here: this, the test process's number, a count.
const PREFIX: &str = "skyrltest";

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

/// Whether an account is granted ids beside its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subordinate {
    Granted,
    None,
}

/// Runs the test named `name` of this program as a plain user; `test` is what
/// that process does.
pub(crate) fn run_as_plain_user(
    name: &str,
    subordinate: Subordinate,
    test: impl Future<Output = ()>,
) {
    if !is_root() {
        return run(test);
    }
    assert!(std::env::var_os(INNER).is_none(), "still root");
    let account = Account::make(subordinate);
    let home = tempfile::Builder::new()
        .prefix("skyrl-u-")
        .tempdir()
        .unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let program = home.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new("setpriv")
        .args([
            "--reuid",
            &account.uid,
            "--regid",
            &account.gid(),
            "--clear-groups",
        ])
        .arg(program)
        .args(["--exact", name, "--nocapture"])
        .env(INNER, "1")
        // As on clusters whose home directories are not for this.
        .env("HOME", "/nonexistent")
        .env("USER", &account.name)
        .env_remove("XDG_RUNTIME_DIR")
        .env("TMPDIR", home.path())
        .current_dir("/")
        .output()
        .unwrap();
    let said = said(&output);
    assert!(output.status.success(), "as {}:\n{said}", account.name);
    assert!(
        said.contains("1 passed"),
        "no test is named {name}:\n{said}"
    );
    for fallback in ["podman-run-", "containers-user-", "storage-run-"] {
        let path = Path::new("/tmp").join(format!("{fallback}{}", account.uid));
        assert!(!path.exists(), "{} was left", path.display());
    }
    assert!(
        !Path::new("/nonexistent").exists(),
        "something was written to the home directory"
    );
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A user of this machine.
struct Account {
    name: String,
    uid: String,
}

impl Account {
    fn make(subordinate: Subordinate) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        remove_stale();
        let number = std::process::id();
        let count = NEXT.fetch_add(1, Ordering::Relaxed);
        let account = Self {
            name: format!("{PREFIX}{number}x{count}"),
            uid: (300_000 + number * 4 + count).to_string(),
        };
        // System accounts are given no subordinate ids by default.
        succeed(
            Command::new("useradd")
                .args(["--system", "--no-create-home", "--user-group"])
                .args(["--shell", "/bin/sh", "--uid", &account.uid])
                .arg(&account.name),
        );
        if subordinate == Subordinate::Granted {
            let first = 600_000_000 + u64::from(number * 2 + count) % 40_000 * 65_536;
            let range = format!("{first}-{}", first + 65_535);
            succeed(
                Command::new("usermod")
                    .args(["--add-subuids", &range, "--add-subgids", &range])
                    .arg(&account.name),
            );
        }
        account
    }
}

impl Account {
    /// Its primary group, which newuidmap insists on.
    fn gid(&self) -> String {
        let output = Command::new("id")
            .args(["-g", &self.name])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
}

fn remove(name: &str) {
    let output = Command::new("userdel").args(["--force", name]).output();
    if let Ok(output) = output
        && !output.status.success()
    {
        eprintln!("userdel {name}: {}", said(&output));
    }
}

/// Removes users of tests that were killed.
fn remove_stale() {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    for name in passwd.lines().filter_map(|line| line.split(':').next()) {
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('x').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(name);
        }
    }
}
