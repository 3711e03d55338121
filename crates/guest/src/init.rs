//! What makes the process fit to be PID 1 of a sandbox, or a plain process
//! that behaves like one. Called from `main`, before any thread exists.

use crate::process::{Event, Processes};
use rustix::fs::{Mode, OFlags};
use rustix::process::Resource;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

/// Time that processes have between SIGTERM and SIGKILL when the guest is told
/// to end.
const GRACE: Duration = Duration::from_secs(2);

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Open files the guest asks for itself; each command costs it two or three.
const OPEN_FILES: u64 = 65_536;

/// Signals that are reported instead of acted upon.
const SIGNALS: [i32; 8] = [
    libc::SIGCHLD,
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGPWR,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// Keeps the allocator from holding on to memory that a busy moment needed:
/// few arenas, and large buffers go back to the kernel when they are freed.
pub fn tune_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets parameters of the allocator; any value is accepted.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 * 1024);
    }
}

/// Opens whichever of descriptors 0, 1 and 2 are closed, so that no pipe is
/// ever mistaken for one of them.
pub fn open_standard_streams() -> io::Result<()> {
    loop {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .or_else(|_| rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        // Stays open for the life of the process.
        std::mem::forget(null);
    }
}

/// Closes every inherited descriptor except the standard streams and those to
/// keep: whatever an engine forgot must not be reachable from the sandbox.
pub fn close_inherited(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<RawFd> = keep.iter().copied().filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep {
        close_between(from, fd - 1)?;
        from = fd + 1;
    }
    close_between(from, RawFd::MAX)
}

fn close_between(first: RawFd, last: RawFd) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: called before this process has opened anything it relies on;
    // descriptors that are closed belong to nobody.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0;
    if closed {
        return Ok(());
    }
    // Before Linux 5.9.
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    let limit = limit.unwrap_or(OPEN_FILES).min(1 << 20) as RawFd;
    for fd in first..=last.min(limit) {
        // SAFETY: as above.
        unsafe {
            libc::close(fd);
        }
    }
    Ok(())
}

/// Blocks the reported signals and returns a descriptor that reports them.
/// Threads made later inherit the block.
pub fn take_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; signalfd
    // returns a new descriptor that nothing else owns.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for signal in SIGNALS {
            libc::sigaddset(&mut set, signal);
            // An inherited SIG_IGN would swallow them; for SIGCHLD it would
            // also have the kernel reap behind our back.
            libc::signal(signal, libc::SIG_DFL);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Has orphans of the sandbox become children of the guest, which as PID 1
/// they do anyway.
pub fn adopt_orphans() -> io::Result<()> {
    if std::process::id() == 1 {
        return Ok(());
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    Ok(())
}

/// Raises the soft limit of open files; gives the old one, which commands get
/// back.
pub fn raise_open_files() -> Option<libc::rlimit64> {
    let old = rustix::process::getrlimit(Resource::Nofile);
    let wanted = old.maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
    let current = old.current?;
    if current >= wanted {
        return None;
    }
    let new = rustix::process::Rlimit {
        current: Some(wanted),
        ..old
    };
    rustix::process::setrlimit(Resource::Nofile, new).ok()?;
    Some(libc::rlimit64 {
        rlim_cur: current,
        rlim_max: old.maximum.unwrap_or(libc::RLIM64_INFINITY),
    })
}

/// A listener on an inherited descriptor.
///
/// # Errors
/// When it is not a Unix stream socket.
pub fn listen_on_descriptor(fd: RawFd) -> io::Result<UnixListener> {
    // SAFETY: the caller names a descriptor that it was given to own; that it
    // is open is checked before it is used.
    let owned = unsafe {
        if libc::fcntl(fd, libc::F_GETFD) < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    rustix::net::listen(&owned, BACKLOG)?;
    Ok(UnixListener::from(owned))
}

/// A listener on a new socket at a path, for this user only. A socket that is
/// there already is replaced; anything else is not.
pub fn listen_on_path(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => {}
    }
    let listener = bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Binds; an address holds 107 bytes only, so the directory is entered for the
/// moment. The process is single-threaded here.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let old_mask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = bind_relative(path);
    rustix::process::umask(old_mask);
    bound
}

fn bind_relative(path: &Path) -> io::Result<UnixListener> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if directory == OsStr::new("") {
        return UnixListener::bind(name);
    }
    let here = rustix::fs::open(".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    rustix::process::chdir(directory)?;
    let bound = UnixListener::bind(name);
    rustix::process::fchdir(here.as_fd())?;
    bound
}

/// What to do about an event that concerns the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reaction {
    /// End all processes with this grace, then the guest.
    End(Duration),
    /// Pass the signal on to the commands.
    Forward(i32),
}

fn reaction(event: Event) -> Reaction {
    match event {
        Event::LeaseExpired => Reaction::End(Duration::ZERO),
        Event::Signal(libc::SIGTERM | libc::SIGINT | libc::SIGPWR) => Reaction::End(GRACE),
        Event::Signal(other) => Reaction::Forward(other),
    }
}

/// Reacts to events for the life of the process. `processes` is filled in once
/// it exists; `at_end` runs last.
pub fn react(
    processes: Arc<OnceLock<Processes>>,
    at_end: impl Fn() + Send + Sync + 'static,
) -> Box<dyn Fn(Event) + Send + Sync> {
    let at_end = Arc::new(at_end);
    Box::new(move |event| {
        let Some(processes) = processes.get() else {
            // Nothing was started yet.
            at_end();
            std::process::exit(0);
        };
        match reaction(event) {
            Reaction::Forward(signal) => processes.forward(signal),
            Reaction::End(grace) => {
                let processes = processes.clone();
                let at_end = Arc::clone(&at_end);
                // The reactor has to go on reaping meanwhile. Two ends at
                // once do no harm.
                let ending = thread::Builder::new()
                    .name("end".into())
                    .stack_size(256 * 1024)
                    .spawn(move || {
                        processes.end_everything(grace);
                        at_end();
                        std::process::exit(0);
                    });
                if ending.is_err() {
                    std::process::exit(1);
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_ask_for_the_end_are_told_from_those_to_pass_on() {
        assert_eq!(reaction(Event::Signal(libc::SIGTERM)), Reaction::End(GRACE));
        assert_eq!(reaction(Event::LeaseExpired), Reaction::End(Duration::ZERO));
        let usr1 = libc::SIGUSR1;
        assert_eq!(reaction(Event::Signal(usr1)), Reaction::Forward(usr1));
    }
}
