//! The thread that serves one shell's terminal, and what it shares with the
//! callers: descriptors and the state.

use super::control::{Control, Packets};
use super::mark::{Piece, Scanner};
use super::pty::{self, Terminal};
use super::state::{Activity, State};
use crate::process::{Command, Exit};
use crate::sync::lock;
use rustix::event::{PollFd, PollFlags};
use rustix::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How often a shell is looked at that an interrupt may have kept from
/// reporting; and any other, for a signal the guest has not sent.
const LOOK_AFTER_INTERRUPT: Duration = Duration::from_millis(10);
const LOOK: Duration = Duration::from_secs(1);
/// How often a terminal that every program has left is looked at.
const REOPEN: Duration = Duration::from_millis(50);
/// How long an ended shell may take to be reaped.
const REAP_PATIENCE: Duration = Duration::from_secs(3);

/// What the pump and the callers share.
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    pub(super) wake: OwnedFd,
    pub(super) terminal: Terminal,
    pub(super) control_pipe: OwnedFd,
    pub(super) control: Control,
    pub(super) command: Arc<Command>,
}
impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Writes as much as the pipe takes now; the pump writes the rest.
    pub(super) fn write_control(&self, state: &mut State, packets: Packets) {
        state.control_queue.extend(packets);
        self.flush_control(state);
        if !state.control_queue.is_empty() {
            self.wake();
        }
    }

    fn flush_control(&self, state: &mut State) {
        while let Some(packet) = state.control_queue.front() {
            match rustix::io::write(&self.control_pipe, packet) {
                Ok(_) => {
                    state.control_queue.pop_front();
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(_) => {
                    // Nobody reads any more; the pump learns why.
                    state.control_queue.clear();
                    return;
                }
            }
        }
    }

    /// What the pump has to do. A shell that has read all it was given and
    /// does not report is asked once more: a signal made it drop its reports.
    fn duties(&self, looked: &mut Instant) -> Duties {
        let mut state = self.lock();
        let mut look_in = None;
        if state.activity == Activity::Running && !state.replaced {
            let period = if state.interrupted {
                LOOK_AFTER_INTERRUPT
            } else {
                LOOK
            };
            if looked.elapsed() >= period {
                *looked = Instant::now();
                let unread = rustix::io::ioctl_fionread(&self.control_pipe);
                if state.control_queue.is_empty() && unread == Ok(0) {
                    let report = self.control.report_line(state.seq);
                    self.write_control(&mut state, report);
                }
            }
            look_in = Some(period.saturating_sub(looked.elapsed()));
        }
        Duties {
            write_control: !state.control_queue.is_empty(),
            write_input: state.begun && !state.input_queue.is_empty(),
            watch_control: !state.replaced,
            closing: state.closing,
            look_in,
        }
    }

    pub(super) fn write_input(&self, state: &mut State) {
        while state.begun && !state.input_queue.is_empty() {
            let written = match rustix::io::write(&self.terminal, state.input_queue.as_slices().0) {
                Ok(0) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => break,
                Ok(written) => written,
                Err(_) => state.input_queue.len(),
            };
            state.input_queue.drain(..written);
        }
        if state.begun && !state.input_queue.is_empty() {
            self.wake();
        }
    }
}

/// A POSIX shell names its control pipe in messages; this calls it `sh`.
#[derive(Default)]
pub(super) struct Rewrite {
    held: Vec<u8>,
}

impl Rewrite {
    fn feed(&mut self, bytes: &[u8], mut give: impl FnMut(&[u8])) {
        let path = pty::SCRIPT_PATH.as_bytes();
        let mut joined = std::mem::take(&mut self.held);
        joined.extend_from_slice(bytes);
        let mut rest = joined.as_slice();
        while let Some(at) = rest.windows(path.len()).position(|window| window == path) {
            give(&rest[..at]);
            give(b"sh");
            rest = &rest[at + path.len()..];
        }
        // The path may have begun at the end.
        let cut = (1..path.len().min(rest.len() + 1))
            .rev()
            .find(|&length| rest.ends_with(&path[..length]))
            .unwrap_or(0);
        give(&rest[..rest.len() - cut]);
        self.held = rest[rest.len() - cut..].to_vec();
    }
}

/// Serves one shell's terminal until the shell and all that hold the terminal
/// are gone.
pub(super) struct Pump {
    pub(super) shared: Arc<Shared>,
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) scanner: Scanner,
    pub(super) rewrite: Option<Rewrite>,
}

impl Pump {
    pub(super) fn serve(mut self) {
        let mut buffer = vec![0; 64 << 10];
        let mut hung_up = false;
        let mut looked = Instant::now();
        loop {
            let duties = self.shared.duties(&mut looked);
            if self.pidfd.is_none() && (duties.closing || hung_up) {
                break;
            }
            let ready = self.poll(&duties, hung_up);
            if ready.terminal {
                hung_up = !self.read(&mut buffer);
            } else {
                hung_up = false;
            }
            let mut state = self.shared.lock();
            self.shared.flush_control(&mut state);
            self.shared.write_input(&mut state);
            if ready.control_closed {
                state.replaced = true;
            }
            drop(state);
            if ready.ended {
                hung_up = !self.read(&mut buffer);
                self.ended();
            }
        }
        self.shared.lock().pump_gone = true;
        self.shared.changed.notify_all();
    }

    fn poll(&self, duties: &Duties, hung_up: bool) -> Ready {
        let shared = &self.shared;
        let mut terminal_events = PollFlags::IN;
        terminal_events.set(PollFlags::OUT, duties.write_input);
        let mut control_events = PollFlags::empty();
        control_events.set(PollFlags::OUT, duties.write_control);
        let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
        let ended_at = self.pidfd.as_ref().map(|pidfd| {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
            fds.len() - 1
        });
        let control_at = duties.watch_control.then(|| {
            fds.push(PollFd::new(&shared.control_pipe, control_events));
            fds.len() - 1
        });
        // With all programs off the terminal, polling it would spin; somebody
        // may open it again.
        let terminal_at = (!hung_up).then(|| {
            fds.push(PollFd::from_borrowed_fd(
                shared.terminal.as_fd(),
                terminal_events,
            ));
            fds.len() - 1
        });
        let patience = match (duties.look_in, hung_up) {
            (Some(look_in), false) => Some(look_in),
            (Some(look_in), true) => Some(look_in.min(REOPEN)),
            (None, true) => Some(REOPEN),
            (None, false) => None,
        };
        let patience = patience.and_then(|patience| patience.try_into().ok());
        let outcome = rustix::event::poll(&mut fds, patience.as_ref());
        if outcome.is_err() {
            return Ready::default();
        }
        let events = |at: Option<usize>| at.map_or(PollFlags::empty(), |at| fds[at].revents());
        if !fds[0].revents().is_empty() {
            let mut counter = [0u8; 8];
            let _ = rustix::io::read(&shared.wake, &mut counter);
        }
        Ready {
            terminal: events(terminal_at)
                .intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR),
            ended: !events(ended_at).is_empty(),
            control_closed: events(control_at).intersects(PollFlags::ERR | PollFlags::HUP),
        }
    }

    /// Reads all there is; false when every program has left the terminal.
    fn read(&mut self, buffer: &mut [u8]) -> bool {
        // Bounded, so that a flood can't keep the pump from its other duties.
        for _ in 0..64 {
            match rustix::io::read(&self.shared.terminal, &mut *buffer) {
                Ok(0) => return false,
                Ok(count) => self.take(&buffer[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    fn take(&mut self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        let scanner = &mut self.scanner;
        match &mut self.rewrite {
            None => scanner.feed(bytes, |piece| state.take(piece)),
            Some(rewrite) => rewrite.feed(bytes, |bytes| {
                scanner.feed(bytes, |piece| state.take(piece));
            }),
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// The shell has ended: all it printed has been read.
    fn ended(&mut self) {
        self.pidfd = None;
        let command = &self.shared.command;
        command.wait(Some(Instant::now() + REAP_PATIENCE));
        let exit_code = command.exit().map_or(-1, Exit::shell_code);
        let held = self.scanner.finish();
        let mut state = self.shared.lock();
        state.take(Piece::Text(&held));
        let state = &mut *state;
        state.renderer.flush(&mut state.unread);
        state.activity = Activity::Ended(exit_code);
        state.control_queue.clear();
        state.input_queue.clear();
        self.shared.changed.notify_all();
    }
}

/// What the pump has to do beside reading.
struct Duties {
    write_control: bool,
    write_input: bool,
    watch_control: bool,
    closing: bool,
    look_in: Option<Duration>,
}

#[derive(Default)]
struct Ready {
    terminal: bool,
    ended: bool,
    control_closed: bool,
}
