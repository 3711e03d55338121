//! The engine's side of the zygote: starting it, finding a running one again,
//! asking and being told.

use crate::command::run;
use crate::engine::EngineKind;
use crate::error::EngineError;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with,
};
use skyrl_protocol::SandboxId;
use skyrl_protocol::zygote::{
    Ask, IDENTITY, Identity, MAX_MESSAGE, SOCKET, StartPlan, StepFailure, Tell, VERSION,
};
use skyrl_zygote::process::is_alive;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long the zygote may take to come up.
const SPAWN_LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to answer what needs no sandbox to be set up.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long a sandbox may take to set itself up.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long killed processes may take to be gone.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Where a zygote of one owner lives, and what it runs.
#[derive(Debug, Clone)]
pub(super) struct ZygotePlace {
    pub(super) dir: PathBuf,
    pub(super) program: PathBuf,
    pub(super) guest: PathBuf,
    /// How long it outlives its last engine.
    pub(super) grace: Duration,
}

/// What is heard unasked.
#[derive(Debug, Clone)]
pub(super) enum News {
    /// A sandbox's first process ended.
    Exited {
        id: SandboxId,
        status: i32,
        output: String,
    },
    /// The zygote is gone, and every sandbox with it.
    Gone,
}

/// A connection to a zygote.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    socket: AsyncFd<OwnedFd>,
    next: AtomicU64,
    /// Nothing once the connection is lost.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Tell>>>>,
}

impl ZygotePlace {
    /// Connects to the zygote that runs here, if one does and speaks our
    /// version.
    pub(super) async fn find(
        &self,
        news: impl Fn(News) + Send + Sync + 'static,
    ) -> Result<Option<Link>, EngineError> {
        let Some(identity) = self.identity().filter(is_alive) else {
            return Ok(None);
        };
        let found = match self.connect() {
            Ok(socket) => Link::open(socket, news).await,
            Err(error) => Err(EngineError::step(
                "connecting to the zygote in",
                self.dir.display(),
                error,
            )),
        };
        match found {
            Ok(link) => Ok(Some(link)),
            Err(error) => {
                tracing::warn!(%error, "ending a zygote that can't be spoken to");
                super::sweep::kill(&identity, STOP_LIMIT)?;
                Ok(None)
            }
        }
    }

    /// Starts a zygote and connects to it.
    pub(super) async fn start(
        &self,
        news: impl Fn(News) + Send + Sync + 'static,
    ) -> Result<Link, EngineError> {
        let place = self.clone();
        blocking(move || {
            run(
                Command::new(&place.program)
                    .args(["serve", "--dir"])
                    .arg(&place.dir)
                    .arg("--guest")
                    .arg(&place.guest)
                    .arg("--grace-ms")
                    .arg(place.grace.as_millis().to_string())
                    .env_clear(),
                SPAWN_LIMIT,
            )
            .map(drop)
        })
        .await?;
        let socket = self
            .connect()
            .map_err(|e| EngineError::step("connecting to the zygote in", self.dir.display(), e))?;
        Link::open(socket, news).await
    }

    /// Who the zygote here is or was.
    pub(super) fn identity(&self) -> Option<Identity> {
        identity_in(&self.dir)
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        // Through a descriptor of the directory: its path may be longer than
        // an address holds.
        let dir = std::fs::File::open(&self.dir)?;
        let path = Path::new("/proc/self/fd")
            .join(dir.as_raw_fd().to_string())
            .join(SOCKET);
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        connect(&socket, &SocketAddrUnix::new(&path)?)?;
        Ok(socket)
    }
}

/// Who the zygote of a directory is or was.
pub(super) fn identity_in(dir: &Path) -> Option<Identity> {
    super::record::read_json(&dir.join(IDENTITY))
}

/// Runs blocking work on a thread for it.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(EngineError::Bug {
            engine: EngineKind::Native,
            reason: error.to_string(),
        }),
    }
}

fn gone(reason: impl ToString) -> EngineError {
    EngineError::HelperGone {
        engine: EngineKind::Native,
        helper: "zygote",
        reason: reason.to_string(),
    }
}

impl Link {
    async fn open(
        socket: OwnedFd,
        news: impl Fn(News) + Send + Sync + 'static,
    ) -> Result<Self, EngineError> {
        // SAFETY: the descriptor is owned, open, and stays the same one for as
        // long as it is registered.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(gone)?;
        let hello = tokio::time::timeout(ANSWER_LIMIT, receive(&socket)).await;
        match hello {
            Ok(Ok(Some(Tell::Hello { version: VERSION }))) => {}
            Ok(Ok(other)) => return Err(gone(format!("it greets with {other:?}"))),
            Ok(Err(error)) => return Err(gone(error)),
            Err(_) => return Err(gone("it does not greet")),
        }
        let shared = Arc::new(Shared {
            socket,
            next: AtomicU64::new(1),
            waiting: Mutex::new(Some(HashMap::new())),
        });
        let reader = tokio::spawn(listen(Arc::clone(&shared), news));
        Ok(Self { shared, reader })
    }

    /// Whether the connection still stands.
    pub(super) fn is_open(&self) -> bool {
        self.shared.waiting().is_some()
    }

    /// Starts a sandbox; returns its first process.
    pub(super) async fn start(&self, plan: StartPlan) -> Result<i32, EngineError> {
        let id = plan.id.clone();
        let plan = Box::new(plan);
        let answer = self
            .ask("start", START_LIMIT, |seq| Ask::Start { seq, plan })
            .await;
        match answer {
            Ok(Tell::Started { pid, .. }) => Ok(pid),
            Ok(Tell::StartFailed { failure, .. }) => Err(failed(failure)),
            Ok(other) => Err(unexpected(&other)),
            Err(error) => {
                // Whatever is half-made there must not come up later.
                if matches!(error, EngineError::Deadline { .. }) {
                    self.stop(&id).await?;
                }
                Err(error)
            }
        }
    }

    /// Kills a sandbox; returns when its processes are gone.
    pub(super) async fn stop(&self, id: &SandboxId) -> Result<(), EngineError> {
        let id = id.clone();
        match self
            .ask("stop", STOP_LIMIT, |seq| Ask::Stop { seq, id })
            .await?
        {
            Tell::Stopped { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The living sandboxes with their first processes.
    pub(super) async fn list(&self) -> Result<Vec<(SandboxId, i32)>, EngineError> {
        match self
            .ask("list", ANSWER_LIMIT, |seq| Ask::List { seq })
            .await?
        {
            Tell::Listed { sandboxes, .. } => Ok(sandboxes),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends the zygote with all its sandboxes.
    pub(super) async fn shutdown(&self) -> Result<(), EngineError> {
        match self
            .ask("shutdown", STOP_LIMIT, |seq| Ask::Shutdown { seq })
            .await?
        {
            Tell::ShuttingDown { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn ask(
        &self,
        verb: &'static str,
        limit: Duration,
        make: impl FnOnce(u64) -> Ask,
    ) -> Result<Tell, EngineError> {
        let seq = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let text = serde_json::to_vec(&make(seq)).map_err(gone)?;
        let (tell, told) = oneshot::channel();
        match self.shared.waiting().as_mut() {
            Some(waiting) => waiting.insert(seq, tell),
            None => return Err(gone("it closed the connection")),
        };
        let _forget = Forget(&self.shared, seq);
        let exchange = async {
            self.shared.send(&text).await.map_err(gone)?;
            told.await.map_err(|_| gone("it ended before it answered"))
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(EngineError::Deadline { verb, limit }),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Takes a question back whose asker does not wait any more.
struct Forget<'a>(&'a Shared, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.0.waiting().as_mut() {
            waiting.remove(&self.1);
        }
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Tell>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, text: &[u8]) -> io::Result<()> {
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                Ok(send(socket, text, SendFlags::NOSIGNAL)?)
            })
            .await
            .map(drop)
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<Tell>> {
    let packet = socket
        .async_io(Interest::READABLE, |socket| {
            let mut packet = vec![0u8; MAX_MESSAGE];
            let (length, _) = recv(socket, &mut packet[..], RecvFlags::empty())?;
            packet.truncate(length);
            Ok(packet)
        })
        .await?;
    if packet.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&packet)?))
}

/// Hands answers to whoever waits for them until the connection ends.
async fn listen(shared: Arc<Shared>, news: impl Fn(News)) {
    while let Ok(Some(tell)) = receive(&shared.socket).await {
        let seq = match &tell {
            Tell::Exited { .. } | Tell::Hello { .. } => None,
            Tell::Started { seq, .. }
            | Tell::StartFailed { seq, .. }
            | Tell::Stopped { seq }
            | Tell::Listed { seq, .. }
            | Tell::ShuttingDown { seq }
            | Tell::Refused { seq, .. } => Some(*seq),
        };
        match (seq, tell) {
            (Some(seq), tell) => {
                let asker = shared.waiting().as_mut().and_then(|w| w.remove(&seq));
                if let Some(asker) = asker {
                    // Who asked may have given up meanwhile.
                    let _ = asker.send(tell);
                }
            }
            (None, Tell::Exited { id, status, output }) => {
                news(News::Exited { id, status, output });
            }
            (None, _) => {}
        }
    }
    shared.waiting().take();
    news(News::Gone);
}

fn failed(failure: StepFailure) -> EngineError {
    let source = match failure.errno {
        0 => io::Error::other("the sandbox could not be set up"),
        errno => io::Error::from_raw_os_error(errno),
    };
    EngineError::step(failure.step, failure.subject, source)
}

fn unexpected(tell: &Tell) -> EngineError {
    match tell {
        Tell::Refused { reason, .. } => EngineError::Bug {
            engine: EngineKind::Native,
            reason: format!("the zygote refused: {reason}"),
        },
        other => EngineError::Bug {
            engine: EngineKind::Native,
            reason: format!("the zygote answered {other:?}"),
        },
    }
}
