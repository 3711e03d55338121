//! How commands end: reaping, time limits, killing all their processes.

use super::command::{Command, Exit, Stage, State, Stream};
use super::reactor::Shared;
use super::registry::Ended;
use super::tree::{self, Process};
use crate::sync::lock;
use skyrl_protocol::guest::{Finish, Usage};
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pipes that background processes of finished commands may keep open; those
/// of further ones are closed.
const MAX_DRAINING: usize = 2048;

/// How long a terminal may take to hang up after its program ended.
const HANG_UP: Duration = Duration::from_millis(200);

/// Pause between attempts to kill, and their number: about ten seconds.
const KILL_AGAIN: Duration = Duration::from_millis(250);
const KILL_ATTEMPTS: u32 = 40;

/// Whether a command counts as finished; `members` tells if any of its
/// processes live.
fn is_finished(
    exited: bool,
    all_closed: bool,
    finish: Finish,
    stage: Stage,
    members: impl FnOnce() -> bool,
) -> bool {
    exited
        && match (stage, finish) {
            (Stage::Running, Finish::ProcessExits) => true,
            (Stage::Running, Finish::PipesClose) => all_closed,
            (Stage::Terminating, _) => !members(),
            (Stage::Killing(_), _) => true,
        }
}

/// The id of a child that ended and was not reaped, if there is one.
fn peek() -> Option<i32> {
    // SAFETY: waitid fills the structure it is given; `si_pid` is valid for
    // what it reports about children, and zero if there was nothing.
    unsafe {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        let result = libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), options);
        let pid = info.assume_init().si_pid();
        (result == 0 && pid > 0).then_some(pid)
    }
}

fn milliseconds(time: libc::timeval) -> f64 {
    time.tv_sec as f64 * 1e3 + time.tv_usec as f64 / 1e3
}

/// Reaps an ended child.
fn reap(pid: i32) -> Option<Ended> {
    // SAFETY: wait4 fills the two values it is given.
    let (reaped, status, usage) = unsafe {
        let mut status = 0;
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        let reaped = libc::wait4(pid, &mut status, libc::WNOHANG, usage.as_mut_ptr());
        (reaped, status, usage.assume_init())
    };
    (reaped == pid).then(|| Ended {
        exit: if libc::WIFSIGNALED(status) {
            Exit::Signal(libc::WTERMSIG(status))
        } else {
            Exit::Code(libc::WEXITSTATUS(status))
        },
        usage: Usage {
            wall_ms: 0.0,
            user_ms: milliseconds(usage.ru_utime),
            system_ms: milliseconds(usage.ru_stime),
            max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
        },
    })
}

impl Shared {
    /// Reaps every ended child of the guest, commands and orphans alike.
    pub(super) fn reap_all(&self) {
        let mut any = false;
        while let Some(pid) = peek() {
            any = true;
            let mut tables = lock(&self.tables);
            let Some(command) = tables.owner(pid).cloned() else {
                if let Some(ended) = reap(pid) {
                    tables.reaped_stranger(pid, ended);
                }
                continue;
            };
            drop(tables);
            // Reaping frees the process id: nobody may be about to signal it.
            let mut state = command.lock();
            if let Some(ended) = reap(pid) {
                lock(&self.tables).disown(pid);
                self.process_ended(&command, &mut state, ended);
            }
        }
        if any {
            self.settle_ending();
            *lock(&self.reaped.0) += 1;
            self.reaped.1.notify_all();
        }
    }

    /// The command's own process ended.
    pub(super) fn process_ended(&self, command: &Command, state: &mut State, ended: Ended) {
        state.exit = Some(ended.exit);
        state.usage = ended.usage;
        if command.is_terminal {
            // Its last output is still on its way through the kernel; the
            // hang-up comes after it.
            if state.stage == Stage::Running && !state.all_closed() {
                self.wake_for(command.key, HANG_UP);
            }
        } else if command.finish == Finish::ProcessExits || state.stage != Stage::Running {
            self.take_rest(state);
        }
        self.settle(command, state);
    }

    /// Finishes a command that has become finished.
    pub(super) fn settle(&self, command: &Command, state: &mut State) {
        if state.finished_at.is_some() {
            if state.all_closed() {
                lock(&self.tables).commands.remove(&command.key);
            }
            return;
        }
        let finish = if command.is_terminal {
            Finish::PipesClose
        } else {
            command.finish
        };
        // Whether members live is looked up for all at once, after reaping.
        let finished = is_finished(
            state.exit.is_some(),
            state.all_closed(),
            finish,
            state.stage,
            || true,
        );
        if finished {
            self.finish(command, state);
        }
    }

    /// After some process was reaped: finishes commands being ended of which
    /// nothing is left.
    fn settle_ending(&self) {
        let tables = lock(&self.tables);
        let ending: Vec<Arc<Command>> = tables
            .ending
            .iter()
            .filter_map(|key| tables.commands.get(key).cloned())
            .collect();
        drop(tables);
        if ending.is_empty() {
            return;
        }
        let all = tree::snapshot();
        for command in ending {
            let mut state = command.lock();
            let finished = is_finished(
                state.exit.is_some(),
                state.all_closed(),
                command.finish,
                state.stage,
                || !self.members(&all, &command).is_empty(),
            );
            if finished && state.finished_at.is_none() {
                if !command.is_terminal {
                    self.take_rest(&mut state);
                }
                self.finish(&command, &mut state);
            }
        }
    }

    fn finish(&self, command: &Command, state: &mut State) {
        state.finished_at = Some(Instant::now());
        state.usage.wall_ms = command.started.elapsed().as_secs_f64() * 1e3;
        if state.exit != Some(Exit::Code(0)) {
            state.oom_killed = match (command.oom_baseline, self.settings.oom.kills()) {
                (Some(before), Some(now)) => now > before,
                _ => false,
            };
        }
        self.close_input(state);
        self.forget(command.key);
        let mut tables = lock(&self.tables);
        tables.live -= 1;
        tables.ending.remove(&command.key);
        // Commands being started count as live before they are in the table.
        let draining = tables.commands.len().saturating_sub(tables.live);
        drop(tables);
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            let channel = &mut state.channels[index];
            if command.is_terminal || draining > MAX_DRAINING {
                self.close_channel(channel);
            } else if channel.paused {
                self.resume(command, channel, stream);
            }
        }
        if state.all_closed() {
            lock(&self.tables).commands.remove(&command.key);
        }
        command.changed.notify_all();
        command.finished.notify_all();
    }

    /// A command's deadline passed, or someone asked for its end.
    pub(super) fn on_due(&self, command: &Command) {
        let mut state = command.lock();
        if state.finished_at.is_some() {
            return;
        }
        let asked = state.end_asked.take();
        let grace = match (state.stage, asked) {
            (Stage::Running, Some(grace)) => grace,
            (Stage::Running, None) if command.is_terminal && state.exit.is_some() => {
                // The terminal did not hang up; take what there is.
                self.take_rest(&mut state);
                self.finish(command, &mut state);
                return;
            }
            (Stage::Running, None) => {
                state.timed_out = true;
                command.grace
            }
            (Stage::Terminating, Some(grace)) => grace,
            (Stage::Terminating, None) => Duration::ZERO,
            (Stage::Killing(_), _) => Duration::ZERO,
        };
        if grace > Duration::ZERO {
            let first = state.stage == Stage::Running;
            state.stage = Stage::Terminating;
            let exited = state.exit.is_some();
            drop(state);
            lock(&self.tables).ending.insert(command.key);
            if first {
                self.signal_members(command, exited, &[libc::SIGTERM, libc::SIGCONT]);
            }
            self.wake_for(command.key, grace);
            if exited {
                self.settle_ending();
            }
            return;
        }
        let attempts = match state.stage {
            Stage::Killing(attempts) => attempts + 1,
            _ => 1,
        };
        state.stage = Stage::Killing(attempts);
        let exited = state.exit.is_some();
        drop(state);
        self.kill_members(command, exited);
        let mut state = command.lock();
        if exited || attempts > KILL_ATTEMPTS {
            if !command.is_terminal {
                self.take_rest(&mut state);
            }
            self.finish(command, &mut state);
        } else {
            self.wake_for(command.key, KILL_AGAIN);
        }
    }

    /// The living members of a command. Once its leader was reaped, another
    /// command may have got its process id; then nobody can be told apart.
    fn members(&self, all: &[Process], command: &Command) -> Vec<Process> {
        let taken_over = lock(&self.tables)
            .owner(command.pid)
            .is_some_and(|owner| owner.key != command.key);
        if taken_over {
            return Vec::new();
        }
        tree::members(all, command.pid)
    }

    /// `exited`: the leader was reaped. Must be called by the reactor, which
    /// alone reaps, or with the command's state locked.
    fn signal_members(&self, command: &Command, exited: bool, signals: &[i32]) {
        let members = self.members(&tree::snapshot(), command);
        for signal in signals {
            for process in &members {
                tree::signal_process(process, *signal);
            }
            if members.is_empty() && !exited {
                tree::signal_group(command.pid, *signal);
            }
        }
    }

    fn kill_members(&self, command: &Command, exited: bool) {
        tree::kill_all(|| self.members(&tree::snapshot(), command));
        if !exited {
            tree::signal_group(command.pid, libc::SIGKILL);
        }
    }

    /// Kills the members of a finished command. A living process with the
    /// leader's id is another one: then nobody can be told apart.
    pub(super) fn kill_leftovers(&self, command: &Command) {
        tree::kill_all(|| {
            let all = tree::snapshot();
            if tree::is_alive(&all, command.pid) {
                return Vec::new();
            }
            self.members(&all, command)
        });
    }

    /// Signals all processes of a command; false when it has finished.
    pub(super) fn signal(&self, command: &Command, signal: i32) -> bool {
        let state = command.lock();
        if state.finished_at.is_some() {
            return false;
        }
        self.signal_members(command, state.exit.is_some(), &[signal]);
        true
    }

    /// Ends every process of the sandbox: SIGTERM, then SIGKILL after `grace`.
    /// Not for the reactor's own thread, which has to go on reaping.
    pub(super) fn end_everything(&self, grace: Duration) {
        lock(&self.tables).closed = true;
        let all = everything;
        for process in all() {
            tree::signal_process(&process, libc::SIGTERM);
            tree::signal_process(&process, libc::SIGCONT);
        }
        self.wait_until_gone(grace);
        tree::kill_all(all);
        // Without a /proc only the commands themselves are known.
        self.signal_commands(libc::SIGKILL);
        self.wait_until_gone(Duration::from_secs(2));
    }

    fn live_commands(&self) -> Vec<Arc<Command>> {
        lock(&self.tables).commands.values().cloned().collect()
    }

    /// Passes a signal on to the process group of every running command.
    pub(super) fn signal_commands(&self, signal: i32) {
        for command in self.live_commands() {
            let state = command.lock();
            if state.exit.is_none() {
                tree::signal_group(command.pid, signal);
            }
        }
    }

    fn wait_until_gone(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut count = lock(&self.reaped.0);
        while !everything().is_empty() {
            let (guard, in_time) = crate::sync::wait_until(&self.reaped.1, count, Some(deadline));
            count = guard;
            if !in_time {
                return;
            }
        }
    }
}

/// Every living process the guest answers for: all of its pid namespace when
/// it is its init, else its descendants.
fn everything() -> Vec<Process> {
    let all = tree::snapshot();
    let own = std::process::id() as i32;
    if own == 1 {
        tree::others(&all, own)
    } else {
        tree::descendants(&all, own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_finishes_as_it_was_asked_to() {
        let finished = |exited, closed, finish, stage, alive| {
            is_finished(exited, closed, finish, stage, || alive)
        };
        let running = Stage::Running;
        assert!(finished(true, false, Finish::ProcessExits, running, true));
        assert!(!finished(true, false, Finish::PipesClose, running, true));
        assert!(finished(true, true, Finish::PipesClose, running, true));
        assert!(!finished(false, true, Finish::PipesClose, running, false));
        let ending = Stage::Terminating;
        assert!(!finished(true, true, Finish::ProcessExits, ending, true));
        assert!(finished(true, false, Finish::PipesClose, ending, false));
        assert!(finished(
            true,
            false,
            Finish::PipesClose,
            Stage::Killing(1),
            true
        ));
        assert!(!finished(
            false,
            true,
            Finish::PipesClose,
            Stage::Killing(1),
            false
        ));
    }
}
