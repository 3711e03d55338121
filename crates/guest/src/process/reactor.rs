//! The one thread that reads pipes, reaps children and enforces deadlines, and
//! the state it shares with the threads that start commands and wait for them.
//!
//! Locks are taken in the order: a command's state, then tables or timers.

use super::clock::Timers;
use super::command::Stream;
use super::registry::Tables;
use super::{OomCounter, prepare::Environment};
use crate::sync::lock;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const TIMER: u64 = u64::MAX;
const SIGNALS: u64 = u64::MAX - 1;

/// Key of the lease among the deadlines; commands count from 1.
pub(super) const LEASE: u64 = 0;

/// What a descriptor is to its key; the low bits of an epoll token.
#[derive(Clone, Copy)]
enum Kind {
    Stdout,
    Stderr,
    Stdin,
    Client,
}

fn token(key: u64, kind: Kind) -> EventData {
    EventData::new_u64(key << 2 | kind as u64)
}

/// What happened to the guest as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A signal other than SIGCHLD arrived.
    Signal(i32),
    /// The lease ran out.
    LeaseExpired,
}

/// What all commands have in common.
pub struct Settings {
    /// The environment they start from.
    pub environment: Environment,
    /// Their working directory unless they say otherwise; absolute.
    pub workdir: PathBuf,
    /// Kill count of the sandbox.
    pub oom: OomCounter,
    /// Soft limit of open files to give back to them.
    pub open_files: Option<libc::rlimit64>,
    /// A signalfd of SIGCHLD and what else is to be reported; these signals
    /// must be blocked in every thread.
    pub signals: OwnedFd,
    /// Told of what concerns the guest; must not block.
    pub on_event: Box<dyn Fn(Event) + Send + Sync>,
}

/// A client's connection that is watched while someone waits on its behalf.
pub(super) struct Watch {
    key: u64,
    command: u64,
    gone: AtomicBool,
}

impl Watch {
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

pub(super) struct Shared {
    pub(super) settings: Settings,
    epoll: OwnedFd,
    timer: OwnedFd,
    timers: Mutex<Timers>,
    pub(super) tables: Mutex<Tables>,
    /// Counts reapings, for those who wait until all processes are gone.
    pub(super) reaped: (Mutex<u64>, Condvar),
    pub(super) origin: Instant,
}

impl Shared {
    pub(super) fn new(settings: Settings) -> io::Result<Self> {
        let shared = Self {
            settings,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            timers: Mutex::default(),
            tables: Mutex::default(),
            reaped: (Mutex::new(0), Condvar::new()),
            origin: Instant::now(),
        };
        let read = EventFlags::IN;
        epoll::add(
            &shared.epoll,
            &shared.timer,
            EventData::new_u64(TIMER),
            read,
        )?;
        epoll::add(
            &shared.epoll,
            &shared.settings.signals,
            EventData::new_u64(SIGNALS),
            read,
        )?;
        Ok(shared)
    }

    /// Serves events for ever.
    pub(super) fn run(&self) -> io::Error {
        let mut events = Vec::with_capacity(128);
        let mut scratch = vec![0; super::pipes::READ_SIZE];
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return error.into(),
            }
            for event in &events {
                match event.data.u64() {
                    TIMER => self.on_timer(),
                    SIGNALS => self.on_signals(),
                    token => self.on_descriptor(token, &mut scratch),
                }
            }
        }
    }

    fn on_descriptor(&self, token: u64, scratch: &mut [u8]) {
        let key = token >> 2;
        let kind = token & 3;
        if kind == Kind::Client as u64 {
            let watch = lock(&self.tables).watches.get(&key).cloned();
            if let Some(watch) = watch {
                self.client_left(&watch);
            }
            return;
        }
        let Some(command) = lock(&self.tables).commands.get(&key).cloned() else {
            return;
        };
        let mut state = command.lock();
        if kind == Kind::Stdin as u64 {
            self.flush_input(&command, &mut state);
        } else {
            self.read_channel(&command, &mut state, kind as usize, scratch);
        }
    }

    // ---- clients -------------------------------------------------------

    /// Begins to watch a connection; nothing if the kernel refuses.
    pub(super) fn watch(&self, command: u64, client: BorrowedFd<'_>) -> Option<Arc<Watch>> {
        let mut tables = lock(&self.tables);
        let key = tables.next_key();
        let watch = Arc::new(Watch {
            key,
            command,
            gone: AtomicBool::new(false),
        });
        tables.watches.insert(key, Arc::clone(&watch));
        drop(tables);
        // No flags: a hang-up is always reported, and only that; a client
        // that merely shut its writing half down still waits for the answer.
        let added = epoll::add(
            &self.epoll,
            client,
            token(key, Kind::Client),
            EventFlags::ONESHOT,
        );
        if added.is_err() {
            lock(&self.tables).watches.remove(&key);
            return None;
        }
        Some(watch)
    }

    pub(super) fn unwatch(&self, watch: &Watch, client: BorrowedFd<'_>) {
        lock(&self.tables).watches.remove(&watch.key);
        // Fails only if it was removed already.
        let _ = epoll::delete(&self.epoll, client);
    }

    fn client_left(&self, watch: &Watch) {
        watch.gone.store(true, Ordering::Release);
        let tables = lock(&self.tables);
        let command = tables.commands.get(&watch.command).cloned();
        drop(tables);
        if let Some(command) = command {
            // The waiter looks at `gone` under this lock.
            drop(command.lock());
            command.changed.notify_all();
            command.finished.notify_all();
        }
    }

    // ---- time and signals ----------------------------------------------

    fn monotonic(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }

    /// Has the reactor look after a command (or the lease) in `delay`.
    pub(super) fn wake_for(&self, key: u64, delay: Duration) {
        let delay = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let mut timers = lock(&self.timers);
        timers.set(self.monotonic(), key, delay);
        self.arm(&timers);
    }

    /// Forgets the deadline of a command or the lease.
    pub(super) fn forget(&self, key: u64) {
        lock(&self.timers).remove(key);
    }

    fn arm(&self, timers: &Timers) {
        let Some(delay) = timers.next_look() else {
            return;
        };
        // Zero would disarm.
        let delay = Duration::from_millis(delay).max(Duration::from_nanos(1));
        let spec = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: delay.as_secs() as i64,
                tv_nsec: i64::from(delay.subsec_nanos()),
            },
        };
        // Fails only for a malformed specification.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }

    fn on_timer(&self) {
        let mut expirations = [0; 8];
        // Empty when it was re-armed meanwhile.
        let _ = rustix::io::read(&self.timer, &mut expirations);
        let mut timers = lock(&self.timers);
        let due = timers.take_due(self.monotonic());
        self.arm(&timers);
        drop(timers);
        for key in due {
            if key == LEASE {
                (self.settings.on_event)(Event::LeaseExpired);
                continue;
            }
            let command = lock(&self.tables).commands.get(&key).cloned();
            if let Some(command) = command {
                self.on_due(&command);
            }
        }
    }

    fn on_signals(&self) {
        let mut infos = [0; 16 * size_of::<libc::signalfd_siginfo>()];
        let Ok(length) = rustix::io::read(&self.settings.signals, &mut infos) else {
            return;
        };
        // The signal's number is the first field of each.
        for info in infos[..length].chunks_exact(size_of::<libc::signalfd_siginfo>()) {
            let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) as i32;
            if number != libc::SIGCHLD {
                (self.settings.on_event)(Event::Signal(number));
            }
        }
        // SIGCHLDs merge, so children are looked for after any signal.
        self.reap_all();
    }

    pub(super) fn listen(&self, key: u64, stream: Stream, fd: BorrowedFd<'_>) -> io::Result<()> {
        let kind = match stream {
            Stream::Stdout => Kind::Stdout,
            Stream::Stderr => Kind::Stderr,
        };
        Ok(epoll::add(
            &self.epoll,
            fd,
            token(key, kind),
            EventFlags::IN,
        )?)
    }

    pub(super) fn listen_input(&self, key: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        let flags = EventFlags::OUT;
        Ok(epoll::add(&self.epoll, fd, token(key, Kind::Stdin), flags)?)
    }

    /// Stops listening to a descriptor; it may not be listened to.
    pub(super) fn ignore(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }
}
