//! One persistent shell as its callers see it: commands begin, waits end,
//! input goes in. The work is done by [`super::pump`], which reads the
//! terminal all the time, so that a background job never blocks on a terminal
//! nobody reads.

use super::control::{Control, Flavor};
use super::mark::{Nonce, Scanner};
use super::pty::{self, Launch, Started};
use super::pump::{Pump, Rewrite, Shared};
use super::state::{Activity, Facts, Search, State};
use super::text::Renderer;
use crate::process::{Processes, SpawnError};
use crate::sync::wait_until;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use skyrl_protocol::guest::ShellState;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Input that programs have not read yet: more is refused.
const MOST_INPUT: usize = 1 << 20;
/// Largest output limit of a command.
pub(crate) const MOST_OUTPUT: usize = 16 << 20;
/// How long a shell may take to settle after an interrupt, before it is given
/// a command.
const SETTLE_PATIENCE: Duration = Duration::from_secs(2);
/// How long an interrupt may take to end a command before it is repeated; a
/// slow prompt command of the user's is part of that.
const INTERRUPT_AGAIN: Duration = Duration::from_secs(1);
/// How often a waiting client is looked after.
const CLIENT_LOOK: Duration = Duration::from_secs(1);
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
#[derive(Clone, Copy)]
pub(crate) struct Wait<'w> {
    /// When to give up.
    pub(crate) timeout: Duration,
    /// Give up earlier when nothing was printed for so long.
    pub(crate) quiet: Option<Duration>,
    /// What beside the command's end ends the wait.
    pub(crate) until: Until<'w>,
    /// Leave the output of a command that goes on for the next answer.
    pub(crate) keep_partial: bool,
    /// On whose behalf: when that connection is gone, the wait ends and the
    /// output stays for the next to ask.
    pub(crate) client: Option<BorrowedFd<'w>>,
}

impl<'w> Wait<'w> {
    /// For the command's end.
    pub(crate) fn for_end(timeout: Duration, client: Option<BorrowedFd<'w>>) -> Self {
        Self {
            timeout,
            quiet: None,
            until: Until::End,
            keep_partial: false,
            client,
        }
    }
}

/// What ends a wait beside the command's end.
#[derive(Clone, Copy)]
pub(crate) enum Until<'w> {
    /// Nothing.
    End,
    /// Any output.
    Output,
    /// Something in the output. It is looked for in what is new and in
    /// [`REACH`] bytes before that.
    Found(&'w Find<'w>),
}

/// Looks for the first of several things in a text: which, and where.
pub(crate) type Find<'f> = dyn Fn(&str) -> Option<(usize, Range<usize>)> + 'f;

/// Longest text in bytes that [`Until::Found`] is certain to find.
pub(crate) const REACH: usize = 8192;

/// Looks for texts as they are.
pub(crate) fn find_texts(texts: &[String]) -> impl Fn(&str) -> Option<(usize, Range<usize>)> {
    move |output| {
        texts
            .iter()
            .enumerate()
            .filter_map(|(index, text)| Some((output.find(text.as_str())?, index)))
            .min()
            .map(|(at, index)| (index, at..at + texts[index].len()))
    }
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

impl Answer {
    /// Nothing was printed.
    fn empty(state: ShellState) -> Self {
        Self {
            output: String::new(),
            dropped: 0,
            state,
            found: None,
        }
    }
}

fn is_going_on(state: ShellState) -> bool {
    matches!(state, ShellState::Running | ShellState::Quiet)
}

/// Whether the other side of a connection has left it altogether.
fn is_gone(client: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(client, PollFlags::empty())];
    let looked = rustix::event::poll(&mut fds, Some(&Timespec::default()));
    looked.is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// One persistent shell.
pub(crate) struct Session {
    shared: Arc<Shared>,
}

impl Session {
    /// Starts a shell; its own start files are not read.
    pub(crate) fn start(
        processes: &Processes,
        launch: &Launch,
        renderer: Renderer,
        nonce: Nonce,
        probe_python: bool,
    ) -> Result<Self, SpawnError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|source| SpawnError::Resources {
                what: "a descriptor",
                source: source.into(),
            })?;
        let Started {
            command,
            pidfd,
            terminal,
            control,
        } = pty::launch(processes, launch)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(renderer, launch.cwd.clone())),
            changed: Condvar::new(),
            wake,
            terminal,
            control_pipe: control,
            control: Control::new(launch.flavor, nonce.clone(), probe_python),
            command: Arc::clone(&command),
        });
        shared.write_control(&mut shared.lock(), shared.control.opening());
        let pump = Pump {
            shared: Arc::clone(&shared),
            pidfd,
            scanner: Scanner::new(&nonce),
            rewrite: (launch.flavor == Flavor::Posix).then(Rewrite::default),
        };
        std::thread::Builder::new()
            .name("shell".into())
            .stack_size(STACK)
            .spawn(move || pump.serve())
            .map_err(|source| {
                command.end(Duration::ZERO);
                SpawnError::Resources {
                    what: "a thread",
                    source,
                }
            })?;
        Ok(Self { shared })
    }

    /// Process id.
    pub(crate) fn pid(&self) -> i32 {
        self.shared.command.pid()
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
        // The pump asks again if this report is hit.
        self.shared.wake();
        let deadline = Some(Instant::now() + SETTLE_PATIENCE);
        while state.activity == Activity::Running {
            let (guard, in_time) = wait_until(&self.shared.changed, state, deadline);
            state = guard;
            if !in_time {
                return Err(SessionError::Busy);
            }
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
                if wait.keep_partial && found.is_none() && is_going_on(answer) {
                    return Answer::empty(answer);
                }
                let (mut output, dropped) = state.take_unread();
                if let (Until::Found(find), true) = (wait.until, found.is_some())
                    && let Some((_, range)) = find(&output)
                {
                    state.unread.push(&output.as_bytes()[range.end..]);
                    output.truncate(range.start);
                }
                return Answer {
                    output,
                    dropped,
                    state: answer,
                    found,
                };
            }
            if let Some(client) = wait.client {
                if is_gone(client) {
                    return Answer::empty(ShellState::Running);
                }
                deadline = deadline.min(now + CLIENT_LOOK);
            }
            state = wait_until(&self.shared.changed, state, Some(deadline)).0;
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
            let mut answer = self.wait(Wait::for_end(left.min(INTERRUPT_AGAIN), None));
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
        let shared = &self.shared;
        let deadline = Some(Instant::now() + CLOSE_PATIENCE);
        if std::mem::replace(&mut shared.lock().closing, true) {
            return;
        }
        shared.command.end(Duration::ZERO);
        shared.command.wait(deadline);
        shared.command.end_leftovers();
        shared.wake();
        let mut state = shared.lock();
        while !state.pump_gone {
            let (guard, in_time) = wait_until(&shared.changed, state, deadline);
            state = guard;
            if !in_time {
                return;
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}
