//! A pseudo-terminal and the shell process on it.
//!
//! Opens, starts and kills; it does not know what is written to the shell.

use super::control::Flavor;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, LocalModes, OutputModes, QueueSelector, Termios, Winsize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where a POSIX shell finds its control pipe.
const SCRIPT_FD: i32 = 9;
/// The script of a POSIX shell: its control pipe, opened by name.
pub(crate) const SCRIPT_PATH: &str = "/proc/self/fd/9";

/// What to start.
pub(crate) struct Launch {
    /// Absolute path of the shell.
    pub(crate) program: String,
    /// What kind of shell it is.
    pub(crate) flavor: Flavor,
    /// Its whole environment.
    pub(crate) env: Vec<(String, String)>,
    /// Its working directory.
    pub(crate) cwd: String,
    /// User and group to become.
    pub(crate) user: Option<(u32, u32)>,
    /// Columns and rows.
    pub(crate) size: (u16, u16),
    /// Whether the terminal shows what is typed.
    pub(crate) echo: bool,
}

/// A started shell.
pub(crate) struct Started {
    /// The process.
    pub(crate) child: Child,
    /// Readable once the process has ended.
    pub(crate) pidfd: OwnedFd,
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
    /// Opens one.
    fn open(size: (u16, u16), echo: bool) -> io::Result<Self> {
        let master =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::unlockpt(&master)?;
        let mut modes = rustix::termios::tcgetattr(&master)?;
        // Line ends stay what the program printed.
        modes.output_modes.remove(OutputModes::ONLCR);
        modes.local_modes.set(LocalModes::ECHO, echo);
        // C-s must not stop a terminal on which nobody presses C-q.
        modes.input_modes.remove(rustix::termios::InputModes::IXON);
        rustix::termios::tcsetattr(&master, rustix::termios::OptionalActions::Now, &modes)?;
        rustix::termios::tcsetwinsize(
            &master,
            Winsize {
                ws_col: size.0,
                ws_row: size.1,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )?;
        let flags = rustix::fs::fcntl_getfl(&master)?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)?;
        Ok(Self { master, modes })
    }

    /// The programs' side, without opening a path.
    fn peer(&self) -> io::Result<OwnedFd> {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor,
        // which nothing else owns.
        unsafe {
            let fd = libc::ioctl(self.master.as_raw_fd(), libc::TIOCGPTPEER, flags);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }

    /// Undoes what the last program did to the terminal. Failures don't
    /// matter: it is a courtesy to the next program.
    pub(crate) fn reset(&self) {
        let now = rustix::termios::OptionalActions::Now;
        let _ = rustix::termios::tcsetattr(&self.master, now, &self.modes);
    }

    /// Forgets input that no program has read; signals of keys sent before
    /// are delivered when it returns. Failures don't matter.
    pub(crate) fn forget_input(&self) {
        let Ok(peer) = self.peer() else {
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

/// Why a shell could not be started.
#[derive(Debug)]
pub(crate) enum LaunchError {
    /// No pseudo-terminal.
    Terminal(io::Error),
    /// No process.
    Process(io::Error),
}

/// Starts a shell. It is killed when the calling thread ends.
pub(crate) fn launch(launch: &Launch) -> Result<Started, LaunchError> {
    let terminal = Terminal::open(launch.size, launch.echo).map_err(LaunchError::Terminal)?;
    let peer = terminal.peer().map_err(LaunchError::Terminal)?;
    let (read, control) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::DIRECT)
            .map_err(|e| LaunchError::Process(e.into()))?;
    let flags = OFlags::NONBLOCK | OFlags::DIRECT;
    rustix::fs::fcntl_setfl(&control, flags).map_err(|e| LaunchError::Process(e.into()))?;
    if let Some((uid, gid)) = launch.user {
        // Without it the user could not open its terminal by name; /dev/tty
        // works all the same.
        let _ = rustix::fs::fchown(
            &peer,
            Some(rustix::fs::Uid::from_raw(uid)),
            Some(rustix::fs::Gid::from_raw(gid)),
        );
    }
    let child = spawn(launch, &peer, read).map_err(LaunchError::Process)?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        .and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?))
        .map_err(LaunchError::Process)?;
    Ok(Started {
        child,
        pidfd,
        terminal,
        control,
    })
}

fn spawn(launch: &Launch, peer: &OwnedFd, read: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(&launch.program);
    command
        .env_clear()
        .envs(launch.env.iter().map(|(k, v)| (k, v)))
        .current_dir(&launch.cwd)
        .stdout(peer.try_clone()?)
        .stderr(peer.try_clone()?);
    let script = match launch.flavor {
        Flavor::Bash => {
            command.args(["--noprofile", "--norc", "--noediting", "-i"]);
            command.stdin(Stdio::from(read));
            None
        }
        Flavor::Posix => {
            command.arg0("sh").args(["-i", SCRIPT_PATH]);
            command.stdin(peer.try_clone()?);
            Some(read)
        }
    };
    if let Some((uid, gid)) = launch.user {
        command.uid(uid).gid(gid);
    }
    // SAFETY: the closure makes only system calls, all of them
    // async-signal-safe, on descriptors that outlive the fork.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 || libc::ioctl(1, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            // Whatever the guest has open and however it was opened: nothing
            // of it reaches the shell. Old kernels lack the call; there the
            // flag on each descriptor has to do.
            let _ = libc::syscall(
                libc::SYS_close_range,
                3u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            if let Some(read) = &script {
                let copied = if read.as_raw_fd() == SCRIPT_FD {
                    libc::fcntl(SCRIPT_FD, libc::F_SETFD, 0)
                } else {
                    libc::dup2(read.as_raw_fd(), SCRIPT_FD)
                };
                if copied < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn()
}

/// Kills every process of a session, new ones included, until none is left or
/// the patience ends.
pub(crate) fn kill_session(session: u32, patience: Duration) {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_micros(200);
    loop {
        let members = session_members(session);
        if members.is_empty() || Instant::now() >= deadline {
            return;
        }
        for pid in members {
            // A process that ended meanwhile is what we want.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Live processes of a session, zombies left out.
fn session_members(session: u32) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let pid: i32 = name.to_str()?.parse().ok()?;
            let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
            let stat = String::from_utf8_lossy(&stat);
            // The name in parentheses may hold anything.
            let (_, fields) = stat.rsplit_once(')')?;
            let mut fields = fields.split_ascii_whitespace();
            let state = fields.next()?;
            let sid: u32 = fields.nth(2)?.parse().ok()?;
            (sid == session && state != "Z" && state != "X").then(|| Pid::from_raw(pid))?
        })
        .collect()
}
