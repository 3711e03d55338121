//! One persistent shell: its state, the thread that serves its terminal, and
//! the calls that wait for it.
//!
//! The thread ([`Pump`]) reads the terminal all the time, so a background job
//! never blocks on a terminal nobody reads. What it reads goes through the
//! mark scanner; a mark decides to which command output belongs and when a
//! command is over. Callers only look at the state under its lock.

use super::control::{Carried, Control, Flavor, Packets, carried_flags};
use super::mark::{Mark, Nonce, Piece, Scanner};
use super::pty::{self, Launch, LaunchError, Started, Terminal};
use super::text::{HeadTail, Renderer};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fd::AsFd;
use skyrl_protocol::guest::{ShellState, ShellText};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Input that programs have not read yet: more is refused.
const MOST_INPUT: usize = 1 << 20;
/// Output kept while no command runs.
const IDLE_OUTPUT: usize = 64 << 10;
/// Largest output limit of a command.
pub(crate) const MOST_OUTPUT: usize = 16 << 20;
/// How long a shell may take to settle after an interrupt, before it is given
/// a command.
const SETTLE_PATIENCE: Duration = Duration::from_secs(2);
/// How often a shell is looked at that an interrupt may have kept from
/// reporting; and any other, for a signal the guest has not sent.
const LOOK_AFTER_INTERRUPT: Duration = Duration::from_millis(10);
const LOOK: Duration = Duration::from_secs(1);
/// How long an interrupt may take to end a command before it is repeated.
const INTERRUPT_AGAIN: Duration = Duration::from_millis(500);
/// How often a terminal that every program has left is looked at.
const REOPEN: Duration = Duration::from_millis(50);
/// How long closing waits for killed processes to be gone.
const CLOSE_PATIENCE: Duration = Duration::from_secs(3);
/// Stack of a shell's thread.
const STACK: usize = 128 << 10;

/// Why a shell refused.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// A command runs in it.
    Busy,
    /// It has ended, with this exit code.
    Ended(i32),
    /// The text can't be given to a shell.
    NulByte,
    /// Too much input waits to be read.
    InputFull,
}

/// What a wait is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wait<'w> {
    /// When to give up.
    pub(crate) timeout: Duration,
    /// Give up earlier when nothing was printed for so long.
    pub(crate) quiet: Option<Duration>,
    /// What beside the command's end ends the wait.
    pub(crate) until: Until<'w>,
}

/// What ends a wait beside the command's end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until<'w> {
    /// Nothing.
    End,
    /// Any output.
    Output,
    /// One of these texts in the output.
    Text(&'w [String]),
}

/// What a shell has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Output not returned before.
    pub(crate) output: String,
    /// Bytes dropped from its middle.
    pub(crate) dropped: u64,
    /// What became of the command.
    pub(crate) state: ShellState,
    /// Which of the texts waited for was found; the output ends before it,
    /// and what follows it is kept for the next answer.
    pub(crate) found: Option<usize>,
}

/// What is known of a shell between commands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Working directory.
    pub(crate) cwd: String,
    /// Last background job.
    pub(crate) background: Option<i32>,
    /// Path of `python`, empty when there is none or it is not asked for.
    pub(crate) python: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activity {
    Idle,
    Running,
    Ended(i32),
}

/// A command's end that no caller has seen.
struct Finished {
    exit_code: i32,
    output: String,
    dropped: u64,
}

/// How far the output has been searched for texts.
#[derive(Default)]
struct Search {
    seen: u64,
}

struct State {
    activity: Activity,
    seq: u64,
    renderer: Renderer,
    unread: HeadTail,
    finished: Option<Finished>,
    /// How the running command ended, before its report is complete.
    ending: Option<i32>,
    /// Output is that of a prompt command and dropped.
    prompting: bool,
    /// Output is the path of python.
    python: Option<Vec<u8>>,
    carried: Carried,
    facts: Facts,
    last_output: Instant,
    control_queue: VecDeque<Vec<u8>>,
    input_queue: VecDeque<u8>,
    input_sent: bool,
    /// The command has begun; before that its shell is still reading it, and
    /// an interrupt would cut it in two.
    begun: bool,
    /// The shell no longer reads commands: it was replaced by `exec`.
    replaced: bool,
    /// An interrupt was sent since the last command began.
    interrupted: bool,
    closing: bool,
    pump_gone: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: OwnedFd,
    terminal: Terminal,
    control_pipe: OwnedFd,
    control: Control,
}

/// One persistent shell.
pub(crate) struct Session {
    shared: Arc<Shared>,
    pid: u32,
}

impl Session {
    /// Starts a shell; its own start files are not read.
    pub(crate) fn start(
        launch: Launch,
        text: ShellText,
        nonce: Nonce,
        probe_python: bool,
    ) -> Result<Self, LaunchError> {
        let control = Control::new(launch.flavor, nonce.clone(), probe_python);
        let cwd = launch.cwd.clone();
        let flavor = launch.flavor;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| LaunchError::Process(e.into()))?;
        let (tell, told) = mpsc::sync_channel(1);
        // The shell dies with the thread that starts it, so that thread is
        // the one which serves it.
        std::thread::Builder::new()
            .name("shell".into())
            .stack_size(STACK)
            .spawn(move || {
                let started = match pty::launch(&launch) {
                    Ok(started) => started,
                    Err(error) => {
                        let _ = tell.send(Err(error));
                        return;
                    }
                };
                let Started {
                    child,
                    pidfd,
                    terminal,
                    control: control_pipe,
                } = started;
                let shared = Arc::new(Shared {
                    state: Mutex::new(State::new(text, cwd)),
                    changed: Condvar::new(),
                    wake,
                    terminal,
                    control_pipe,
                    control,
                });
                let pid = child.id();
                if tell.send(Ok((Arc::clone(&shared), pid))).is_err() {
                    return;
                }
                Pump {
                    shared,
                    child,
                    pidfd: Some(pidfd),
                    scanner: Scanner::new(&nonce),
                    rewrite: (flavor == Flavor::Posix).then(Rewrite::default),
                }
                .serve();
            })
            .map_err(LaunchError::Process)?;
        let (shared, pid) = told
            .recv()
            .unwrap_or_else(|_| Err(LaunchError::Process(io::ErrorKind::Other.into())))?;
        {
            let mut state = shared.lock();
            shared.write_control(&mut state, shared.control.opening());
        }
        Ok(Self { shared, pid })
    }

    /// Process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether a command runs.
    pub(crate) fn is_busy(&self) -> bool {
        self.shared.lock().activity == Activity::Running
    }

    /// Whether the shell lives.
    pub(crate) fn is_alive(&self) -> bool {
        !matches!(self.shared.lock().activity, Activity::Ended(_))
    }

    /// Whether the shell was replaced by another program (`exec`).
    pub(crate) fn is_replaced(&self) -> bool {
        self.shared.lock().replaced
    }

    /// What is known since the last command ended.
    pub(crate) fn facts(&self) -> Facts {
        self.shared.lock().facts.clone()
    }

    /// Starts a command; [`Self::wait`] waits for it.
    pub(crate) fn begin(&self, command: &str, output_limit: usize) -> Result<(), SessionError> {
        if command.contains('\0') {
            return Err(SessionError::NulByte);
        }
        let mut state = self.shared.lock();
        match state.activity {
            Activity::Idle => {}
            Activity::Running => return Err(SessionError::Busy),
            Activity::Ended(code) => return Err(SessionError::Ended(code)),
        }
        self.shared.terminal.reset();
        if std::mem::take(&mut state.input_sent) {
            self.shared.terminal.forget_input();
        }
        if state.interrupted {
            state = self.settle(state)?;
        }
        state.next(false);
        state.unread.set_limit(output_limit.min(MOST_OUTPUT));
        state.unfinish();
        let text = self
            .shared
            .control
            .command(state.seq, command, &state.carried);
        self.shared.write_control(&mut state, text);
        Ok(())
    }

    /// Makes sure that no interrupt is still on its way: it would hit the
    /// shell while it reads the next command and cut that in two.
    fn settle<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
    ) -> Result<MutexGuard<'s, State>, SessionError> {
        let carried = state.carried.clone();
        state.unfinish();
        state.next(true);
        let report = self.shared.control.report_line(state.seq);
        self.shared.write_control(&mut state, report);
        let deadline = Instant::now() + SETTLE_PATIENCE;
        while state.activity == Activity::Running {
            let now = Instant::now();
            if now >= deadline {
                return Err(SessionError::Busy);
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if let Activity::Ended(code) = state.activity {
            return Err(SessionError::Ended(code));
        }
        state.interrupted = false;
        state.unfinish();
        state.carried = carried;
        Ok(state)
    }

    /// Waits for the command's end, or what else is asked for, and takes the
    /// output.
    pub(crate) fn wait(&self, wait: Wait<'_>) -> Answer {
        let begun = Instant::now();
        let mut search = Search::default();
        let mut state = self.shared.lock();
        loop {
            if let Some(finished) = state.finished.take() {
                return Answer {
                    output: finished.output,
                    dropped: finished.dropped,
                    state: ShellState::Completed {
                        exit_code: finished.exit_code,
                    },
                    found: None,
                };
            }
            let now = Instant::now();
            let mut deadline = begun + wait.timeout;
            let mut found = None;
            let given_up = match state.activity {
                Activity::Ended(exit_code) => Some(ShellState::Exited { exit_code }),
                Activity::Idle if !matches!(wait.until, Until::Output) => Some(ShellState::Idle),
                activity => {
                    let waiting = if activity == Activity::Idle {
                        ShellState::Idle
                    } else {
                        ShellState::Running
                    };
                    found = state.found(wait.until, &mut search);
                    if let Some(quiet) = wait.quiet {
                        let quiet_at = state.last_output.max(begun) + quiet;
                        if now >= quiet_at && now < deadline {
                            Some(ShellState::Quiet)
                        } else {
                            deadline = deadline.min(quiet_at);
                            (now >= deadline || found.is_some()).then_some(waiting)
                        }
                    } else {
                        (now >= deadline || found.is_some()).then_some(waiting)
                    }
                }
            };
            if let Some(answer) = given_up {
                let (mut output, dropped) = state.take_unread();
                if let (Until::Text(texts), Some(index)) = (wait.until, found)
                    && let Some((before, after)) = output.split_once(&texts[index])
                {
                    state.unread.push(after.as_bytes());
                    output.truncate(before.len());
                }
                return Answer {
                    output,
                    dropped,
                    state: answer,
                    found,
                };
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Sends bytes to the program in the foreground.
    pub(crate) fn input(&self, bytes: &[u8]) -> Result<(), SessionError> {
        let mut state = self.shared.lock();
        if let Activity::Ended(code) = state.activity {
            return Err(SessionError::Ended(code));
        }
        if state.input_queue.len() + bytes.len() > MOST_INPUT {
            return Err(SessionError::InputFull);
        }
        state.input_sent = true;
        state.interrupted |= bytes.iter().any(|b| matches!(b, 0x03 | 0x1c | 0x1a));
        state.input_queue.extend(bytes);
        self.shared.write_input(&mut state);
        if state.interrupted {
            // The pump looks more often from now on.
            self.shared.wake();
        }
        Ok(())
    }

    /// Presses C-c until the command ends or the time is over. Shells drop an
    /// interrupt that hits them in the middle of starting a program, so one is
    /// not always enough.
    pub(crate) fn interrupt(&self, timeout: Duration) -> Result<Answer, SessionError> {
        let deadline = Instant::now() + timeout;
        let mut so_far = (String::new(), 0);
        loop {
            self.input(b"\x03")?;
            let left = deadline.saturating_duration_since(Instant::now());
            let mut answer = self.wait(Wait {
                timeout: left.min(INTERRUPT_AGAIN),
                quiet: None,
                until: Until::End,
            });
            so_far.0.push_str(&answer.output);
            so_far.1 += answer.dropped;
            if answer.state != ShellState::Running || left <= INTERRUPT_AGAIN {
                (answer.output, answer.dropped) = so_far;
                return Ok(answer);
            }
        }
    }

    /// Kills the shell and every process of its session.
    pub(crate) fn close(&self) {
        {
            let mut state = self.shared.lock();
            if state.pump_gone {
                return;
            }
            state.closing = true;
        }
        self.shared.wake();
        pty::kill_session(self.pid, CLOSE_PATIENCE);
        let deadline = Instant::now() + CLOSE_PATIENCE;
        let mut state = self.shared.lock();
        while !state.pump_gone {
            let now = Instant::now();
            if now >= deadline {
                return;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // State is consistent after every statement that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Writes as much as the pipe takes now; the pump writes the rest.
    fn write_control(&self, state: &mut State, packets: Packets) {
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

    fn write_input(&self, state: &mut State) {
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

impl State {
    fn new(text: ShellText, cwd: String) -> Self {
        Self {
            activity: Activity::Idle,
            seq: 0,
            renderer: Renderer::new(text),
            unread: HeadTail::new(IDLE_OUTPUT),
            finished: None,
            ending: None,
            // The shell's own greeting, until the first command.
            prompting: true,
            python: None,
            carried: Carried::default(),
            facts: Facts {
                cwd,
                ..Facts::default()
            },
            last_output: Instant::now(),
            control_queue: VecDeque::new(),
            input_queue: VecDeque::new(),
            input_sent: false,
            begun: true,
            replaced: false,
            interrupted: false,
            closing: false,
            pump_gone: false,
        }
    }

    /// Begins the next numbered conversation with the shell.
    fn next(&mut self, begun: bool) {
        self.seq += 1;
        self.activity = Activity::Running;
        self.ending = None;
        self.begun = begun;
        self.last_output = Instant::now();
    }

    /// An end that no caller has seen: the output comes before what follows.
    fn unfinish(&mut self) {
        if let Some(finished) = self.finished.take() {
            let idle = self.take_unread().0;
            self.unread.push(finished.output.as_bytes());
            self.unread.push(idle.as_bytes());
        }
    }

    fn take_unread(&mut self) -> (String, u64) {
        self.renderer.commit(&mut self.unread);
        self.unread.take()
    }

    fn found(&mut self, until: Until<'_>, search: &mut Search) -> Option<usize> {
        if !matches!(until, Until::End) {
            self.renderer.commit(&mut self.unread);
        }
        match until {
            Until::End => None,
            Until::Output => (!self.unread.is_empty()).then_some(0),
            Until::Text(texts) => {
                // Only what is new, and so much before it as the longest text
                // may have begun there.
                let longest = texts.iter().map(String::len).max().unwrap_or(0) as u64;
                let new = self.unread.total() - search.seen + longest;
                search.seen = self.unread.total();
                let recent = self
                    .unread
                    .recent(usize::try_from(new).unwrap_or(usize::MAX));
                let recent = String::from_utf8_lossy(&recent);
                texts
                    .iter()
                    .enumerate()
                    .filter_map(|(index, text)| Some((recent.find(text.as_str())?, index)))
                    .min()
                    .map(|(_, index)| index)
            }
        }
    }

    /// Takes a piece of the terminal's output.
    fn take(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::Text(bytes) => {
                if let Some(path) = &mut self.python {
                    path.extend_from_slice(&bytes[..bytes.len().min(8192)]);
                } else if !self.prompting {
                    self.last_output = Instant::now();
                    self.renderer.feed(bytes, &mut self.unread);
                }
            }
            Piece::Mark(mark) => self.marked(mark),
        }
    }

    fn marked(&mut self, mark: Mark) {
        match mark {
            Mark::Start { seq } if seq == self.seq => {
                self.prompting = false;
                self.begun = true;
            }
            Mark::Prompt { seq, last: true } if seq == self.seq => self.prompting = false,
            Mark::End { seq, end } if self.is_running(seq) => {
                // The second report of an interrupted one says less.
                self.ending.get_or_insert(end.status);
                self.carried = Carried {
                    status: self.ending.unwrap_or(end.status),
                    flags: carried_flags(&end.flags),
                };
                self.facts.cwd = end.cwd;
                self.facts.background = end.background;
                self.prompting = end.prompt_command;
                // Marks of the report are text-free; what a prompt command
                // prints comes after it.
            }
            Mark::Python { seq } if self.is_running(seq) => self.python = Some(Vec::new()),
            Mark::Reported { seq } if self.is_running(seq) => self.finish(),
            _ => {}
        }
    }

    fn is_running(&self, seq: u64) -> bool {
        seq == self.seq && self.activity == Activity::Running
    }

    fn finish(&mut self) {
        let Some(exit_code) = self.ending else {
            return;
        };
        if let Some(path) = self.python.take() {
            let path = String::from_utf8_lossy(&path);
            self.facts.python = path
                .lines()
                .map(str::trim_end)
                .find(|line| line.starts_with('/'))
                .unwrap_or_default()
                .to_owned();
        }
        self.renderer.flush(&mut self.unread);
        let (output, dropped) = self.unread.take();
        self.unread.set_limit(IDLE_OUTPUT);
        self.activity = Activity::Idle;
        self.finished = Some(Finished {
            exit_code,
            output,
            dropped,
        });
    }
}

/// A POSIX shell names its control pipe in messages; this calls it `sh`.
#[derive(Default)]
struct Rewrite {
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
struct Pump {
    shared: Arc<Shared>,
    child: std::process::Child,
    pidfd: Option<OwnedFd>,
    scanner: Scanner,
    rewrite: Option<Rewrite>,
}

impl Pump {
    fn serve(mut self) {
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
        let exit_code = match self.child.wait() {
            Ok(status) => {
                use std::os::unix::process::ExitStatusExt;
                status
                    .code()
                    .or_else(|| status.signal().map(|signal| 128 + signal))
                    .unwrap_or(-1)
            }
            Err(_) => -1,
        };
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
