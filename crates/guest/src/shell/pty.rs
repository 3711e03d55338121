//! A pseudo-terminal and the shell process on it.
//!
//! Opens and starts; it does not know what is written to the shell.

use super::control::Flavor;
use crate::process::{Command, Processes, SCRIPT_DESCRIPTOR, SpawnError, Spec, Stdio, terminal};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Gid, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, OutputModes, QueueSelector, Termios,
};
use skyrl_protocol::guest::UserGroup;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The script of a POSIX shell: its control pipe, opened by name.
pub(crate) const SCRIPT_PATH: &str = "/proc/self/fd/9";
const _: () = assert!(SCRIPT_DESCRIPTOR == 9);

/// What to start.
pub(crate) struct Launch {
    /// Absolute path of the shell.
    pub(crate) program: String,
    /// What kind of shell it is.
    pub(crate) flavor: Flavor,
    /// What is added to the sandbox's environment.
    pub(crate) env: BTreeMap<String, String>,
    /// Its working directory.
    pub(crate) cwd: String,
    /// User and group to become.
    pub(crate) user: Option<UserGroup>,
    /// Columns and rows.
    pub(crate) size: (u16, u16),
    /// Whether the terminal shows what is typed.
    pub(crate) echo: bool,
}

/// A started shell.
pub(crate) struct Started {
    /// The process.
    pub(crate) command: Arc<Command>,
    /// Readable once the process has ended; absent when it has already.
    pub(crate) pidfd: Option<OwnedFd>,
    /// Our side of the terminal; non-blocking.
    pub(crate) terminal: Terminal,
    /// Where commands are written, in packets; non-blocking.
    pub(crate) control: OwnedFd,
}

/// Our side of a pseudo-terminal.
pub(crate) struct Terminal {
    master: OwnedFd,
    modes: Termios,
}

impl Terminal {
    /// Opens one; gives the programs' side too.
    fn open(size: (u16, u16), echo: bool) -> io::Result<(Self, OwnedFd)> {
        let (master, peer) = terminal::open(size.0, size.1)?;
        let mut modes = rustix::termios::tcgetattr(&master)?;
        // Line ends stay what the program printed.
        modes.output_modes.remove(OutputModes::ONLCR);
        modes.local_modes.set(LocalModes::ECHO, echo);
        // C-s must not stop a terminal on which nobody presses C-q.
        modes.input_modes.remove(InputModes::IXON);
        rustix::termios::tcsetattr(&master, OptionalActions::Now, &modes)?;
        Ok((Self { master, modes }, peer))
    }

    /// Undoes what the last program did to the terminal. Failures don't
    /// matter: it is a courtesy to the next program.
    pub(crate) fn reset(&self) {
        let _ = rustix::termios::tcsetattr(&self.master, OptionalActions::Now, &self.modes);
    }

    /// Forgets input that no program has read; signals of keys sent before
    /// are delivered when it returns. Failures don't matter.
    pub(crate) fn forget_input(&self) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let Ok(peer) = rustix::pty::ioctl_tiocgptpeer(&self.master, flags) else {
            return;
        };
        let forget = || rustix::termios::tcflush(&peer, QueueSelector::IFlush);
        let _ = forget();
        // The kernel hands input over in the background; polling the
        // programs' side waits for that.
        let mut fds = [PollFd::new(&peer, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        let _ = forget();
    }
}

impl AsFd for Terminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

fn refused(what: &'static str) -> impl Fn(rustix::io::Errno) -> SpawnError {
    move |source| SpawnError::Resources {
        what,
        source: source.into(),
    }
}

/// Starts a shell.
pub(crate) fn launch(processes: &Processes, launch: &Launch) -> Result<Started, SpawnError> {
    let (terminal, peer) =
        Terminal::open(launch.size, launch.echo).map_err(SpawnError::Terminal)?;
    if let Some(user) = launch.user {
        // Without it the user could not open its terminal by name; /dev/tty
        // works all the same.
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        let _ = rustix::fs::fchown(&peer, Some(uid), Some(gid));
    }
    let (read, control) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::DIRECT)
        .map_err(refused("a pipe"))?;
    rustix::fs::fcntl_setfl(&control, OFlags::NONBLOCK | OFlags::DIRECT)
        .map_err(refused("a pipe"))?;
    let mut argv = vec![launch.program.as_str()];
    let copy = || {
        peer.try_clone().map_err(|source| SpawnError::Resources {
            what: "a descriptor",
            source,
        })
    };
    let (input, script) = match launch.flavor {
        Flavor::Bash => {
            argv.extend(["--noprofile", "--norc", "--noediting", "-i"]);
            (read, None)
        }
        Flavor::Posix => {
            argv.extend(["-i", SCRIPT_PATH]);
            (copy()?, Some(read))
        }
    };
    let spec = Spec {
        cwd: Some(launch.cwd.clone()),
        env: launch.env.clone(),
        stdio: Stdio::Terminal {
            columns: launch.size.0,
            rows: launch.size.1,
        },
        user: launch.user,
        ..Spec::argv(argv)
    };
    let streams = [input, copy()?, copy()?];
    let command = processes.spawn_on(&spec, streams, script)?;
    // Unless it has been reaped by now, the id was its own all the time.
    let pidfd = Pid::from_raw(command.pid())
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok())
        .filter(|_| !command.is_finished());
    Ok(Started {
        command,
        pidfd,
        terminal,
        control,
    })
}
