//! What all requests share.

use crate::api::{openhands, openhands_v0, swerex};
use crate::edit::Editor;
use crate::http::{Request, Response, Service, serve};
use crate::process::{Commands, Processes, Settings};
use crate::shell::Shells;
use crate::sync::lock;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How a guest is set up.
pub struct Config {
    /// What its commands have in common.
    pub settings: Settings,
    /// Key that the clients' dialects ask for; none: everything is accepted.
    pub session_key: Option<String>,
}

/// The state of the in-sandbox server.
pub struct Guest {
    /// Commands and all other processes.
    pub processes: Processes,
    /// Commands of the native API that outlive their request.
    pub commands: Commands,
    /// The agents' editor, with its undo history.
    pub editor: Editor,
    /// What the OpenHands 1.x dialect remembers.
    pub openhands: openhands::State,
    /// What the OpenHands V0 dialect remembers.
    pub openhands_v0: openhands_v0::State,
    /// What the SWE-ReX dialect remembers.
    pub swerex: swerex::State,
    /// Persistent shells, those of the clients' dialects included.
    pub shells: Shells,
    session_key: Mutex<Option<String>>,
    started: Instant,
    /// Milliseconds after `started` of the last request that counts as use.
    last_use: AtomicU64,
}

impl Guest {
    /// Starts looking after processes; call [`Guest::serve`] next.
    pub fn new(config: Config) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            processes: Processes::start(config.settings)?,
            commands: Commands::default(),
            editor: Editor::new(),
            openhands: openhands::State::default(),
            openhands_v0: openhands_v0::State::default(),
            swerex: swerex::State::default(),
            shells: Shells::default(),
            session_key: Mutex::new(config.session_key),
            started: Instant::now(),
            last_use: AtomicU64::new(0),
        }))
    }

    /// Serves connections until the listener fails.
    pub fn serve(self: &Arc<Self>, listener: &UnixListener) -> io::Error {
        serve(listener, &Arc::new(Door(Arc::clone(self))))
    }

    /// The key that clients' dialects must send, if any.
    pub fn session_key(&self) -> Option<String> {
        lock(&self.session_key).clone()
    }

    /// Sets or removes the key.
    pub fn set_session_key(&self, key: Option<String>) {
        *lock(&self.session_key) = key;
    }

    /// Time since the guest started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Time since the last request that counts as use of the sandbox.
    pub fn idle(&self) -> Duration {
        let last = Duration::from_millis(self.last_use.load(Ordering::Relaxed));
        self.uptime().saturating_sub(last)
    }

    /// Notes that the sandbox is used now.
    pub fn touch(&self) {
        let now = self.uptime().as_millis() as u64;
        self.last_use.store(now, Ordering::Relaxed);
    }
}

/// Hands requests to the routes.
struct Door(Arc<Guest>);

impl Service for Door {
    fn call(&self, request: &mut Request<'_>) -> Response {
        crate::api::route(&self.0, request)
    }
}
