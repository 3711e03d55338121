//! Cloning: one system call that makes the namespaces and the process, and
//! the pipe through which a clone says what went wrong.

use crate::setup::{Inherited, become_guest};
use crate::step::{Failed, Step, check};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use rustix::pipe::{PipeFlags, pipe_with};
use skyrl_protocol::zygote::{CgroupPlan, NetworkPlan, StartPlan, StepFailure, UserNamespacePlan};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Connections to a guest that wait to be accepted, at most.
const BACKLOG: i32 = 1024;

/// Exit status of a clone that could not become a guest.
const SETUP_FAILED: i32 = 125;

/// The libc crate's constant of this name is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A process in namespaces of its own.
#[derive(Debug)]
pub struct Cloned {
    /// Its number.
    pub pid: i32,
    /// Its descriptor: readable once it ended.
    pub pidfd: OwnedFd,
    /// Closed without a word once the guest was executed; else it carries a
    /// [`StepFailure`].
    pub failure: OwnedFd,
    /// What the guest prints; kept by the kernel up to a page, unread.
    pub output: OwnedFd,
}

/// What all clones of a zygote share.
#[derive(Debug)]
pub struct Parent {
    /// The guest's program.
    pub guest: OwnedFd,
    /// The zygote itself.
    pub zygote: OwnedFd,
    /// Which calls sandboxes may make.
    pub filters: crate::seccomp::Filters,
}

impl Parent {
    /// Clones a sandbox; the clone sets itself up while this returns.
    ///
    /// # Errors
    /// When no clone could be made.
    pub fn start(&self, plan: &StartPlan) -> Result<Cloned, Failed> {
        let listener = listen_at(&plan.socket)?;
        let (output, output_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .step("making", "a pipe for the guest's output")?;
        // Pipes are charged to the user's budget: a page each is enough.
        let _ = rustix::pipe::fcntl_setpipe_size(&output, 4096);
        let (failure, failure_end) =
            pipe_with(PipeFlags::CLOEXEC).step("making", "a pipe for failures")?;
        let v2 = open_v2_group(&plan.cgroups)?;
        let ids = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let (pid, pidfd) = clone_into(namespaces(plan), v2.as_ref(), || {
            let inherited = Inherited {
                guest: self.guest.as_fd(),
                listener: listener.as_fd(),
                output: output_end.as_fd(),
                zygote: self.zygote.as_fd(),
                ids,
                filters: &self.filters,
            };
            let failed = match become_guest(plan, &inherited) {
                Ok(never) => match never {},
                Err(failed) => failed,
            };
            report(&failure_end, &failed.0);
        })?;
        Ok(Cloned {
            pid,
            pidfd,
            failure,
            output,
        })
    }
}

/// The v2 group to clone into.
pub(crate) fn open_v2_group(cgroups: &CgroupPlan) -> Result<Option<OwnedFd>, Failed> {
    cgroups
        .v2
        .as_deref()
        .map(|dir| {
            rustix::fs::openat(
                CWD,
                dir,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .step("opening cgroup", dir)
        })
        .transpose()
}

fn report(to: &OwnedFd, failure: &StepFailure) {
    if let (Ok(text), Ok(pipe)) = (serde_json::to_vec(failure), to.try_clone()) {
        let _ = std::fs::File::from(pipe).write_all(&text);
    }
}

fn namespaces(plan: &StartPlan) -> i32 {
    let mut flags =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if plan.network != NetworkPlan::Host {
        flags |= libc::CLONE_NEWNET;
    }
    if plan.user_namespace == UserNamespacePlan::OwnSingleId {
        flags |= libc::CLONE_NEWUSER;
    }
    flags
}

/// Clones this process, which must have a single thread, with new namespaces;
/// the clone runs `child` and ends.
///
/// # Errors
/// When the kernel refuses.
pub fn clone_into(
    namespaces: i32,
    cgroup: Option<&OwnedFd>,
    child: impl FnOnce(),
) -> Result<(i32, OwnedFd), Failed> {
    let mut pidfd: i32 = -1;
    // SAFETY: clone_args is plain data.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces as u64 | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the clone has its own copy of everything, as
    // after fork, and this process has a single thread, so no lock is held.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    });
    match result.step("cloning", "a process with its own namespaces")? {
        0 => {
            let _ = catch_unwind(AssertUnwindSafe(child));
            // SAFETY: ends the clone without running what belongs to the
            // original.
            unsafe { libc::_exit(SETUP_FAILED) }
        }
        // SAFETY: the kernel stored a descriptor that nobody else owns.
        pid => Ok((pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// Listens on a Unix socket. It is bound through a descriptor of its
/// directory, so that the path may be longer than an address holds, and the
/// address that the guest sees says nothing of the host.
///
/// # Errors
/// When the socket can't be made there.
pub fn listen_at(path: &Path) -> Result<OwnedFd, Failed> {
    listen_on(path, SocketType::STREAM, BACKLOG)
}

/// [`listen_at`] for any kind of socket.
///
/// # Errors
/// When the socket can't be made there.
pub fn listen_on(path: &Path, kind: SocketType, backlog: i32) -> Result<OwnedFd, Failed> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Failed::because("listening at", path.display()));
    };
    let dir = rustix::fs::openat(
        CWD,
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step("opening", parent)?;
    let _ = rustix::fs::unlinkat(&dir, name, rustix::fs::AtFlags::empty());
    let short = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name);
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .step("opening a socket for", path)?;
    let address = SocketAddrUnix::new(&short).step("naming socket", path)?;
    bind(&socket, &address).step("binding", path)?;
    listen(&socket, backlog).step("listening at", path)?;
    Ok(socket)
}
