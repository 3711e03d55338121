//! Keeps `podman system service` running: starts it, starts it again when it
//! died (containers don't need it), ends it. The kernel ends it when this
//! process dies.

use super::install::{Installation, Privilege};
use super::layout::Layout;
use super::namespace::Namespace;
use super::processes::Process;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::guest_client::connect;
use rustix::process::Signal;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a service may take until it accepts connections.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long it may take to end by itself.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// A service that died so often within [`CRASH_WINDOW`] is not started again.
const MAX_CRASHES: usize = 5;
const CRASH_WINDOW: Duration = Duration::from_secs(60);
/// Lines of its complaints that are kept.
const KEPT_LINES: usize = 20;

/// The service of one owner.
pub(super) struct Service {
    layout: Layout,
    install: Installation,
    namespace: Namespace,
    environment: Vec<(&'static str, OsString)>,
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    started: u64,
    crashes: VecDeque<Instant>,
}

struct Running {
    number: u64,
    process: Process,
    /// How it ended, once it has.
    ended: watch::Receiver<Option<String>>,
}

/// A service that accepts connections. The number tells one from its
/// successor, whose connections are other ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) number: u64,
    pub(super) socket: PathBuf,
}

impl Service {
    pub(super) fn new(
        layout: Layout,
        install: Installation,
        namespace: Namespace,
        environment: Vec<(&'static str, OsString)>,
    ) -> Self {
        Self {
            layout,
            install,
            namespace,
            environment,
            state: tokio::sync::Mutex::default(),
        }
    }

    /// Where it listens, after starting it if it does not run.
    ///
    /// # Errors
    /// [`EngineError::HelperGone`] when it can't be started or keeps dying.
    pub(super) async fn ensure(&self) -> Result<Address, EngineError> {
        let mut state = self.state.lock().await;
        if let Some(running) = &state.running {
            let how = running.ended.borrow().clone();
            match how {
                None => return Ok(self.address(running.number)),
                Some(how) => {
                    tracing::warn!(%how, "podman's service ended; starting it again");
                    state.running = None;
                    let now = Instant::now();
                    state.crashes.push_back(now);
                    while state
                        .crashes
                        .front()
                        .is_some_and(|at| now - *at > CRASH_WINDOW)
                    {
                        state.crashes.pop_front();
                    }
                    if state.crashes.len() > MAX_CRASHES {
                        return Err(gone(format!("it keeps dying: {how}")));
                    }
                }
            }
        }
        state.started += 1;
        let number = state.started;
        state.running = Some(self.start(number).await?);
        Ok(self.address(number))
    }

    fn socket_name(number: u64) -> String {
        format!("{number}.sock")
    }

    fn address(&self, number: u64) -> Address {
        Address {
            number,
            socket: self.layout.engine().join(Self::socket_name(number)),
        }
    }

    async fn start(&self, number: u64) -> Result<Running, EngineError> {
        let address = self.address(number);
        let _ = std::fs::remove_file(&address.socket);
        let mut command = self.podman();
        command
            .args(["system", "service", "--time=0"])
            // Its real path may be too long to listen on: an address holds
            // 107 bytes.
            .arg(format!(
                "unix:///proc/self/cwd/{}",
                Self::socket_name(number)
            ))
            .current_dir(self.layout.engine())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // As a plain user Podman enters by itself, and has to.
        if self.install.privilege == Privilege::Rootful {
            self.namespace.enter(&mut command, self.layout.engine())?;
        }
        let owner = rustix::process::getpid();
        // SAFETY: runs between fork and exec; system calls only.
        unsafe {
            command.pre_exec(move || {
                rustix::process::setsid()?;
                // Podman hands SIGTERM on to its child in the user namespace.
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                if rustix::process::getppid() != Some(owner) {
                    return Err(std::io::ErrorKind::NotConnected.into());
                }
                Ok(())
            });
        }
        let complaints = Arc::new(Mutex::new(VecDeque::new()));
        let (process, mut ended) = spawn(command, complaints.clone()).await?;
        let accepts = async {
            let mut pause = Duration::from_millis(2);
            while connect(&address.socket).await.is_err() {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(20));
            }
        };
        let died = async {
            let _ = ended.wait_for(Option::is_some).await;
        };
        let outcome = tokio::time::timeout(START_DEADLINE, async {
            tokio::select! {
                () = accepts => true,
                () = died => false,
            }
        })
        .await;
        match outcome {
            Ok(true) => Ok(Running {
                number,
                process,
                ended,
            }),
            Ok(false) => {
                let how = ended.borrow().clone().unwrap_or_default();
                Err(gone(format!("{how}: {}", tail(&complaints))))
            }
            Err(_) => {
                let _ = process.signal(Signal::KILL);
                Err(gone(format!(
                    "it did not listen within {START_DEADLINE:?}: {}",
                    tail(&complaints)
                )))
            }
        }
    }

    /// A Podman of this owner, without a verb.
    pub(super) fn podman(&self) -> Command {
        podman_command(&self.install, &self.layout, &self.environment)
    }

    /// Ends it.
    pub(super) async fn stop(&self) {
        let mut state = self.state.lock().await;
        let Some(running) = state.running.take() else {
            return;
        };
        let _ = running.process.signal(Signal::TERM);
        if !running.process.gone_within(END_PATIENCE).await {
            let _ = running.process.signal(Signal::KILL);
            running.process.gone_within(END_PATIENCE).await;
        }
        let _ = std::fs::remove_file(self.address(running.number).socket);
    }
}

/// A Podman that sees our configuration and nothing of the user's.
pub(super) fn podman_command(
    install: &Installation,
    layout: &Layout,
    environment: &[(&'static str, OsString)],
) -> Command {
    let mut command = Command::new(&install.podman);
    command
        .env_clear()
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .arg("--tmpdir")
        .arg(layout.tmp());
    if install.privilege == Privilege::Rootful {
        // The runtime's default is one directory for everybody on the machine.
        let mut root = OsString::from("root=");
        root.push(layout.runtime_dir().join("runtime"));
        command.arg("--runtime-flag").arg(root);
    }
    command
}

/// Starts a process from a thread that lives as long as the process: the
/// kernel's signal at the parent's death is in truth one at the death of the
/// thread that forked.
async fn spawn(
    mut command: Command,
    complaints: Arc<Mutex<VecDeque<String>>>,
) -> Result<(Process, watch::Receiver<Option<String>>), EngineError> {
    let (started, start) = tokio::sync::oneshot::channel();
    let (end, ended) = watch::channel(None);
    std::thread::Builder::new()
        .name("podman-service".into())
        .stack_size(256 * 1024)
        .spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            let pid = child.id() as i32;
            if let Some(stderr) = child.stderr.take() {
                // Apart, since what the service started may hold the pipe
                // longer than it lives.
                let _ = std::thread::Builder::new()
                    .name("podman-stderr".into())
                    .stack_size(256 * 1024)
                    .spawn(move || listen(stderr, &complaints));
            }
            let _ = started.send(Ok(Process::of(pid)));
            let how = match child.wait() {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            end.send_replace(Some(how));
        })
        .map_err(|e| EngineError::step("starting", "a thread", e))?;
    match start.await {
        Ok(Ok(Some(process))) => Ok((process, ended)),
        Ok(Ok(None)) | Err(_) => Err(gone("it ended at once".into())),
        Ok(Err(error)) => Err(EngineError::step(
            "starting",
            "podman system service",
            error,
        )),
    }
}

/// Reads what it complains of until it ends.
fn listen(stderr: ChildStderr, complaints: &Mutex<VecDeque<String>>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut bounded = std::io::Read::take(&mut reader, 64 * 1024);
        match bounded.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        tracing::debug!(podman = %text);
        let mut kept = match complaints.lock() {
            Ok(kept) => kept,
            Err(poisoned) => poisoned.into_inner(),
        };
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
}

fn tail(complaints: &Mutex<VecDeque<String>>) -> String {
    let kept = match complaints.lock() {
        Ok(kept) => kept,
        Err(poisoned) => poisoned.into_inner(),
    };
    if kept.is_empty() {
        return "it said nothing".into();
    }
    kept.iter().cloned().collect::<Vec<_>>().join("; ")
}

fn gone(reason: String) -> EngineError {
    EngineError::HelperGone {
        engine: EngineKind::Podman,
        helper: "service",
        reason,
    }
}

/// The environment of every Podman of an owner: nothing but what it needs,
/// and no directory that may be on a network file system.
pub(super) fn environment(layout: &Layout) -> Vec<(&'static str, OsString)> {
    let mut environment: Vec<(&'static str, OsString)> = vec![
        ("PATH", super::install::search_path()),
        ("LANG", "C.UTF-8".into()),
        ("HOME", layout.home().into()),
        ("XDG_CONFIG_HOME", layout.home().join(".config").into()),
        ("XDG_DATA_HOME", layout.home().join(".local/share").into()),
        ("XDG_RUNTIME_DIR", layout.runtime_dir().into()),
        ("TMPDIR", layout.tmp().into()),
        (
            "CONTAINERS_CONF",
            layout.conf().join("containers.conf").into(),
        ),
        (
            "CONTAINERS_STORAGE_CONF",
            layout.conf().join("storage.conf").into(),
        ),
    ];
    // Looked up in the user database by some of Podman's helpers.
    for name in ["USER", "LOGNAME"] {
        if let Some(value) = std::env::var_os(name) {
            environment.push((name, value));
        }
    }
    environment
}
