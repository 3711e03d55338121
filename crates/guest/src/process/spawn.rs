//! From a prepared command to a running process: one `clone` that shares
//! memory with the guest until the program is executed, as `posix_spawn` does.
//! The cost does not depend on the size of the guest, and a failure of any
//! step comes back as a value.

use super::prepare::Prepared;
use skyrl_protocol::guest::UserGroup;
use std::ffi::{CString, c_char, c_int, c_long, c_void};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::AtomicI32;

/// Stack of the child until it executes the program, in bytes.
const CHILD_STACK: usize = 32 * 1024;

/// Number of the one descriptor beside the standard streams that a process
/// can be given.
pub const SCRIPT_DESCRIPTOR: RawFd = 9;

/// Commands are offered to the out-of-memory killer before the guest: losing
/// the guest is losing the sandbox.
const OOM_SCORE: &[u8] = b"300";

/// The step of starting a process that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Clone,
    Session,
    Terminal,
    Descriptors,
    User,
    WorkingDirectory,
    Execute,
}

/// Why a process could not be started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failure {
    pub(super) step: Step,
    pub(super) errno: i32,
}

/// What of a process is not in [`Prepared`].
pub(super) struct Setup {
    /// Become descriptors 0, 1 and 2; each is 3 or more.
    pub(super) stdio: [RawFd; 3],
    /// Make descriptor 2 the controlling terminal.
    pub(super) terminal: bool,
    /// Becomes [`SCRIPT_DESCRIPTOR`]; greater than that.
    pub(super) script: Option<RawFd>,
    /// Take on this user.
    pub(super) user: Option<UserGroup>,
    /// Soft limit of open files to go back to.
    pub(super) open_files: Option<libc::rlimit64>,
}

struct Job<'a> {
    setup: &'a Setup,
    candidates: Vec<*const c_char>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    cwd: *const c_char,
    failure: Option<Failure>,
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// Starts the process and returns its id. `pid_slot` holds the id before the
/// process does anything, so that a reaper can tell it from a stranger.
pub(super) fn spawn(
    prepared: &Prepared,
    setup: &Setup,
    pid_slot: &AtomicI32,
) -> Result<i32, Failure> {
    debug_assert!(setup.stdio.iter().all(|fd| *fd > 2));
    let mut job = Job {
        setup,
        candidates: pointers(&prepared.candidates),
        argv: pointers(&prepared.argv),
        envp: pointers(&prepared.envp),
        cwd: prepared.cwd.as_ptr(),
        failure: None,
    };
    let mut stack = Vec::<u128>::with_capacity(CHILD_STACK / size_of::<u128>());
    // SAFETY: the sets are plain data that sigfillset and pthread_sigmask
    // initialise. The child runs on a stack of its own, touches only `job` and
    // memory it owns, and makes system calls only; this thread is suspended
    // (CLONE_VFORK) until the child has executed its program or ended, so the
    // shared memory is never used by both and outlives the child's use. All
    // signals are blocked around it, so no handler runs in the child.
    unsafe {
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        let mut old = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        let top = stack.as_mut_ptr().add(stack.capacity()).cast::<c_void>();
        let pid = libc::clone(
            run_child,
            top,
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT_SETTID | libc::SIGCHLD,
            (&raw mut job).cast::<c_void>(),
            pid_slot.as_ptr(),
        );
        let errno = std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
        libc::pthread_sigmask(libc::SIG_SETMASK, &old, ptr::null_mut());
        // Read through the raw pointer's view: the child wrote to it.
        match ptr::read_volatile(&raw const job.failure) {
            _ if pid < 0 => Err(Failure {
                step: Step::Clone,
                errno,
            }),
            Some(failure) => Err(failure),
            None => Ok(pid),
        }
    }
}

extern "C" fn run_child(job: *mut c_void) -> c_int {
    let job = job.cast::<Job<'_>>();
    // SAFETY: `spawn` passes a pointer to a live `Job` and is suspended until
    // this function ends the process or executes a program.
    unsafe {
        let failure = execute(&*job);
        ptr::write_volatile(&raw mut (*job).failure, Some(failure));
        libc::syscall(libc::SYS_exit_group, 127 as c_long);
    }
    127
}

/// The errno of the last system call.
fn errno() -> i32 {
    // SAFETY: returns this thread's errno, which always exists.
    unsafe { *libc::__errno_location() }
}

/// Runs in the child; returns only if something failed. System calls only, and
/// raw ones where the library's wrapper would act on all threads of the guest
/// (set*id) or take locks.
///
/// # Safety
/// Must run in a child that `spawn` made; the pointers in `job` are valid.
unsafe fn execute(job: &Job<'_>) -> Failure {
    let fail = |step| Failure {
        step,
        errno: errno(),
    };
    // SAFETY: all arguments are values or pointers into `job`, which lives.
    unsafe {
        if libc::syscall(libc::SYS_setsid) < 0 {
            return fail(Step::Session);
        }
        if job.setup.terminal
            && libc::syscall(libc::SYS_ioctl, job.setup.stdio[2], libc::TIOCSCTTY, 0) < 0
        {
            return fail(Step::Terminal);
        }
        for (target, source) in job.setup.stdio.iter().enumerate() {
            if libc::syscall(libc::SYS_dup3, *source, target, 0) < 0 {
                return fail(Step::Descriptors);
            }
        }
        let mut first_closed = 3;
        if let Some(script) = job.setup.script {
            if libc::syscall(libc::SYS_dup3, script, SCRIPT_DESCRIPTOR, 0) < 0 {
                return fail(Step::Descriptors);
            }
            libc::syscall(libc::SYS_close_range, 3, SCRIPT_DESCRIPTOR - 1, 0);
            first_closed = SCRIPT_DESCRIPTOR + 1;
        }
        // Everything of the guest is close-on-exec; this also catches what a
        // library may have forgotten. Absent before Linux 5.9.
        libc::syscall(
            libc::SYS_close_range,
            first_closed,
            c_long::from(u32::MAX),
            0,
        );
        raise_oom_score();
        if let Some(limit) = &job.setup.open_files {
            libc::syscall(
                libc::SYS_prlimit64,
                0,
                libc::RLIMIT_NOFILE,
                ptr::from_ref(limit),
                0,
            );
        }
        if let Some(user) = job.setup.user {
            let (uid, gid) = (c_long::from(user.uid), c_long::from(user.gid));
            if libc::syscall(libc::SYS_setgroups, 0, 0) < 0
                || libc::syscall(libc::SYS_setresgid, gid, gid, gid) < 0
                || libc::syscall(libc::SYS_setresuid, uid, uid, uid) < 0
            {
                return fail(Step::User);
            }
        }
        if libc::syscall(libc::SYS_chdir, job.cwd) < 0 {
            return fail(Step::WorkingDirectory);
        }
        default_signals();
        let mut failure = Failure {
            step: Step::Execute,
            errno: libc::ENOENT,
        };
        for candidate in &job.candidates {
            if candidate.is_null() {
                break;
            }
            libc::syscall(
                libc::SYS_execve,
                *candidate,
                job.argv.as_ptr(),
                job.envp.as_ptr(),
            );
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => failure.errno = libc::EACCES,
                other => {
                    failure.errno = other;
                    break;
                }
            }
        }
        failure
    }
}

/// # Safety
/// Must run in a child that `spawn` made.
unsafe fn raise_oom_score() {
    // SAFETY: paths and buffers are static; the descriptor is this child's.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_openat,
            libc::AT_FDCWD,
            c"/proc/self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        if fd >= 0 {
            libc::syscall(libc::SYS_write, fd, OOM_SCORE.as_ptr(), OOM_SCORE.len());
            libc::syscall(libc::SYS_close, fd);
        }
    }
}

/// The kernel's own `struct sigaction`, all zero: the default action.
#[repr(C)]
struct KernelSigaction([u64; 4]);

/// # Safety
/// Must run in a child that `spawn` made.
unsafe fn default_signals() {
    let default = KernelSigaction([0; 4]);
    let none = 0u64;
    // SAFETY: the structures have the size the kernel reads on 64-bit
    // machines; the child's dispositions are its own (no CLONE_SIGHAND).
    unsafe {
        for signal in 1..=64 {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                ptr::from_ref(&default),
                0,
                size_of::<u64>(),
            );
        }
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            0,
            size_of::<u64>(),
        );
    }
}
