//! A started command: what is known of it, what can be asked of it.

use super::capture::Capture;
use super::reactor::{Shared, Watch};
use super::text::output_of;
use crate::sync::{lock, wait_until};
use skyrl_protocol::guest::{ExecResult, Finish, Output, Usage};
use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// Most bytes of input that wait for a command to read them.
const INPUT_QUEUE: usize = 1 << 20;

/// An output stream of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; all output of a merged command or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// The code, or 128 + signal as shells say it.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }

    /// The code, or minus the signal as Python says it.
    pub fn python_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => -signal,
        }
    }
}

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// The command has finished.
    Finished,
    /// There is output past what was seen.
    Output,
    /// The deadline passed.
    TimedOut,
    /// The client that asked is gone.
    ClientGone,
}

/// Bytes read from an output stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Offset of the first byte; later than asked when bytes were dropped.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Bytes written to the stream in all, so far.
    pub total: u64,
    /// Nothing will follow after `total`.
    pub ended: bool,
}

impl Piece {
    /// Where to read next.
    pub fn next(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }
}

/// Why input could not be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputError {
    /// Standard input is closed, by either side.
    Closed,
    /// The command did not read it in time.
    TimedOut,
}

/// How far ending a command has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It is left alone.
    Running,
    /// Its members were told to end.
    Terminating,
    /// They were killed, so many times.
    Killing(u32),
}

/// One output stream.
pub(super) struct Channel {
    pub(super) fd: Option<OwnedFd>,
    pub(super) capture: Capture,
    /// Not listened to, until there is room.
    pub(super) paused: bool,
}

/// The writing end of standard input.
pub(super) struct InputPipe {
    pub(super) fd: OwnedFd,
    pub(super) queue: VecDeque<u8>,
    pub(super) close_when_empty: bool,
    /// Listened to, because the pipe was full.
    pub(super) armed: bool,
}

pub(super) struct State {
    pub(super) exit: Option<Exit>,
    pub(super) usage: Usage,
    pub(super) finished_at: Option<Instant>,
    /// Stdout and stderr.
    pub(super) channels: [Channel; 2],
    pub(super) input: Option<InputPipe>,
    pub(super) stage: Stage,
    pub(super) timed_out: bool,
    pub(super) oom_killed: bool,
    /// End it, with this grace.
    pub(super) end_asked: Option<Duration>,
}

impl State {
    pub(super) fn all_closed(&self) -> bool {
        self.channels.iter().all(|channel| channel.fd.is_none())
    }
}

/// A started command. Dropping it does not end it: the process module owns
/// what runs.
pub struct Command {
    pub(super) key: u64,
    pub(super) pid: i32,
    pub(super) finish: Finish,
    pub(super) is_terminal: bool,
    pub(super) grace: Duration,
    pub(super) started: Instant,
    pub(super) oom_baseline: Option<u64>,
    pub(super) shared: Weak<Shared>,
    pub(super) state: Mutex<State>,
    /// Output, input room or the end.
    pub(super) changed: Condvar,
    pub(super) finished: Condvar,
}

impl Command {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Process id inside the sandbox.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// How its process ended, once it has finished.
    pub fn exit(&self) -> Option<Exit> {
        let state = self.lock();
        state.finished_at.and(state.exit)
    }

    /// Whether it has finished.
    pub fn is_finished(&self) -> bool {
        self.lock().finished_at.is_some()
    }

    /// When it finished.
    pub fn finished_at(&self) -> Option<Instant> {
        self.lock().finished_at
    }

    /// Whether its time limit was reached.
    pub fn timed_out(&self) -> bool {
        self.lock().timed_out
    }

    /// Bytes of output kept now.
    pub fn kept_bytes(&self) -> u64 {
        let state = self.lock();
        state.channels.iter().map(|c| c.capture.kept()).sum()
    }

    /// The output kept of a stream, as text.
    pub fn output(&self, stream: Stream) -> Output {
        output_of(&self.lock().channels[stream as usize].capture)
    }

    /// The whole result, once it has finished.
    pub fn result(&self) -> Option<ExecResult> {
        let state = self.lock();
        state.finished_at?;
        let (exit_code, signal) = match state.exit {
            Some(Exit::Code(code)) => (Some(code), None),
            Some(Exit::Signal(signal)) => (None, Some(signal)),
            // It would not die: what ended it is the attempt.
            None => (None, Some(libc::SIGKILL)),
        };
        Some(ExecResult {
            exit_code,
            signal,
            timed_out: state.timed_out,
            oom_killed: state.oom_killed,
            stdout: output_of(&state.channels[0].capture),
            stderr: output_of(&state.channels[1].capture),
            usage: state.usage,
        })
    }

    /// Waits for its end.
    pub fn wait(&self, deadline: Option<Instant>) -> Waited {
        self.wait_for_client(None, deadline)
    }

    /// Waits for its end, for a client that may go away meanwhile.
    pub fn wait_for_client(
        &self,
        client: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Waited {
        self.wait_on(&self.finished, None, client, deadline)
    }

    /// Waits until more than `seen` bytes were written to stdout or stderr, or
    /// for the end.
    pub fn wait_output(
        &self,
        seen: [u64; 2],
        client: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Waited {
        self.wait_on(&self.changed, Some(seen), client, deadline)
    }

    fn wait_on(
        &self,
        condition: &Condvar,
        seen: Option<[u64; 2]>,
        client: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Waited {
        let mut state = self.lock();
        let mut watch: Option<WatchGuard<'_>> = None;
        loop {
            if let Some(seen) = seen
                && (0..2).any(|i| state.channels[i].capture.total() > seen[i])
            {
                return Waited::Output;
            }
            if state.finished_at.is_some() {
                return Waited::Finished;
            }
            match (&watch, client) {
                (None, Some(client)) => {
                    drop(state);
                    watch = Some(WatchGuard::new(self, client));
                    state = self.lock();
                    continue;
                }
                (Some(guard), _) if guard.is_gone() => return Waited::ClientGone,
                _ => {}
            }
            let (guard, in_time) = wait_until(condition, state, deadline);
            state = guard;
            if !in_time {
                return Waited::TimedOut;
            }
        }
    }

    /// Up to `limit` bytes of a stream from `offset` on.
    pub fn read_since(&self, stream: Stream, offset: u64, limit: usize) -> Piece {
        let mut state = self.lock();
        let finished = state.finished_at.is_some();
        let channel = &mut state.channels[stream as usize];
        let has_room_again = channel.capture.acknowledge(offset);
        let (offset, bytes) = channel.capture.read(offset, limit);
        let piece = Piece {
            offset,
            bytes,
            total: channel.capture.total(),
            ended: finished || channel.fd.is_none(),
        };
        if has_room_again
            && channel.paused
            && let Some(shared) = self.shared.upgrade()
        {
            shared.resume(self, channel, stream);
        }
        piece
    }

    /// Gives bytes to standard input; waits while the command does not read.
    pub fn write_input(&self, bytes: &[u8], deadline: Option<Instant>) -> Result<(), InputError> {
        let shared = self.shared.upgrade().ok_or(InputError::Closed)?;
        let mut left = bytes;
        let mut state = self.lock();
        while !left.is_empty() {
            let input = match &mut state.input {
                Some(input) if !input.close_when_empty => input,
                _ => return Err(InputError::Closed),
            };
            let room = INPUT_QUEUE - input.queue.len().min(INPUT_QUEUE);
            if room > 0 {
                let count = room.min(left.len());
                input.queue.extend(&left[..count]);
                left = &left[count..];
                shared.flush_input(self, &mut state);
                continue;
            }
            let (guard, in_time) = wait_until(&self.changed, state, deadline);
            state = guard;
            if !in_time {
                return Err(InputError::TimedOut);
            }
        }
        Ok(())
    }

    /// Closes standard input after what was given; a terminal's program sees
    /// Ctrl-D instead.
    pub fn close_input(&self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let mut state = self.lock();
        if let Some(input) = &mut state.input {
            if self.is_terminal {
                input.queue.push_back(4);
            } else {
                input.close_when_empty = true;
            }
            shared.flush_input(self, &mut state);
        }
    }

    /// Sends a signal to all its processes; false when it has finished.
    pub fn signal(&self, signal: i32) -> bool {
        match self.shared.upgrade() {
            Some(shared) => shared.signal(self, signal),
            None => false,
        }
    }

    /// Ends all its processes: SIGTERM, then SIGKILL after `grace`. Returns at
    /// once; wait for the end with [`Command::wait`].
    pub fn end(&self, grace: Duration) {
        if let Some(shared) = self.shared.upgrade() {
            let mut state = self.lock();
            if state.finished_at.is_none() {
                state.end_asked = Some(grace);
                shared.wake_for(self.key, Duration::ZERO);
            }
        }
    }

    /// Kills what a finished command has left running in its session.
    pub fn end_leftovers(&self) {
        if let Some(shared) = self.shared.upgrade()
            && self.is_finished()
        {
            shared.kill_leftovers(self);
        }
    }

    /// Changes the size of its terminal; does nothing for pipes.
    pub fn resize(&self, columns: u16, rows: u16) {
        let state = self.lock();
        if self.is_terminal
            && let Some(master) = &state.channels[0].fd
        {
            // The terminal may have hung up meanwhile.
            let _ = super::terminal::resize(master, columns, rows);
        }
    }
}

/// Watches a client's connection while someone waits on its behalf.
struct WatchGuard<'c> {
    watch: Option<(Arc<Shared>, Arc<Watch>)>,
    fd: BorrowedFd<'c>,
}

impl<'c> WatchGuard<'c> {
    fn new(command: &Command, fd: BorrowedFd<'c>) -> Self {
        let watch = command.shared.upgrade().and_then(|shared| {
            let watch = shared.watch(command.key, fd)?;
            Some((shared, watch))
        });
        Self { watch, fd }
    }

    fn is_gone(&self) -> bool {
        self.watch.as_ref().is_some_and(|(_, w)| w.is_gone())
    }
}

impl Drop for WatchGuard<'_> {
    fn drop(&mut self) {
        if let Some((shared, watch)) = &self.watch {
            shared.unwatch(watch, self.fd);
        }
    }
}
