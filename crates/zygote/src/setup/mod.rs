//! What a freshly cloned process does to turn into a sandbox's guest: enter
//! groups, map ids, build the file system, give up every privilege, execute.
//!
//! Runs in the clone of a single-threaded process, so memory may be allocated
//! and any call made. Order matters throughout: what needs the host's file
//! system comes before the pivot, what needs privileges before they go.

mod attach;
mod dev;
mod identity;
mod kernel_files;
mod root;

pub(crate) use identity::map_single_id;
pub(crate) use kernel_files::new_proc;

use crate::seccomp::Filters;
use crate::step::{Failed, Step, check};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use skyrl_protocol::zygote::{CgroupPlan, LaunchPlan, NetworkPlan, StartPlan, UserNamespacePlan};
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The guest's listening socket inside the sandbox.
pub const LISTENER: i32 = 3;

/// The counter of kills for lack of memory inside the sandbox.
pub const OOM_COUNTER: i32 = 4;

/// What the zygote hands to its clones.
#[derive(Debug, Clone, Copy)]
pub struct Inherited<'a> {
    /// The guest's program.
    pub guest: BorrowedFd<'a>,
    /// The guest's listening socket.
    pub listener: BorrowedFd<'a>,
    /// Where the guest's own words go.
    pub output: BorrowedFd<'a>,
    /// The zygote, to notice its death.
    pub zygote: BorrowedFd<'a>,
    /// The zygote's own user and group.
    pub ids: (u32, u32),
    /// Which calls the sandbox may make.
    pub filters: &'a Filters,
}

/// Becomes the guest of a sandbox; returns only on failure.
///
/// # Errors
/// The first step that failed.
pub fn become_guest(
    plan: &StartPlan,
    inherited: &Inherited<'_>,
) -> Result<std::convert::Infallible, Failed> {
    let argv = strings(&plan.argv)?;
    let env = strings(&plan.env)?;
    let hostname = CString::new(plan.hostname.as_str()).step("reading", "the host name")?;

    die_with_zygote(inherited.zygote)?;
    enter_cgroups(&plan.cgroups)?;
    if plan.user_namespace == UserNamespacePlan::OwnSingleId {
        map_single_id((plan.uid, plan.gid), inherited.ids)?;
    }
    // SAFETY: the name is a valid string of that length.
    check(unsafe { libc::sethostname(hostname.as_ptr(), hostname.as_bytes().len()) }.into())
        .step("setting the host name", plan.hostname.as_str())?;
    if plan.network != NetworkPlan::Host {
        raise_loopback()?;
    }
    let counter = plan
        .oom_counter
        .as_deref()
        .map(root::open_read_only)
        .transpose()?;
    root::build(plan)?;
    limit_resources(plan)?;
    // SAFETY: neither call has memory effects.
    unsafe {
        libc::setsid();
        libc::umask(0o022);
    }
    identity::give_up_privileges(plan)?;
    arrange_descriptors(inherited, counter.as_ref())?;
    // Changing identity cleared the wish to die with the zygote.
    die_with_zygote(inherited.zygote)?;
    reset_signals();
    let guest = inherited.guest.as_raw_fd();
    inherited
        .filters
        .install()
        .step("installing", "the system call filter")?;
    execute(guest, &argv, &env)
}

/// What a launcher hands to its clone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ForRuntime<'a> {
    /// The runtime's program.
    pub(crate) program: BorrowedFd<'a>,
    /// The guest's listening socket.
    pub(crate) listener: BorrowedFd<'a>,
    /// The guest's program.
    pub(crate) guest: BorrowedFd<'a>,
    /// The launcher's own user and group.
    pub(crate) ids: (u32, u32),
}

/// Becomes a container runtime in the surroundings it needs; returns only on
/// failure. Standard descriptors stay as they are.
///
/// # Errors
/// The first step that failed.
pub(crate) fn become_runtime(
    plan: &LaunchPlan,
    inherited: &ForRuntime<'_>,
) -> Result<std::convert::Infallible, Failed> {
    let argv = strings(&plan.argv)?;
    let env = strings(&plan.env)?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .step("asking to die with", "the launcher")?;
    enter_v1_groups(&plan.cgroups)?;
    if plan.user_namespace == UserNamespacePlan::OwnSingleId {
        map_single_id((0, 0), inherited.ids)?;
    }
    let counter = plan
        .oom_counter
        .as_deref()
        .map(root::open_read_only)
        .transpose()?;
    root::build_for_runtime(plan)?;
    // SAFETY: no memory effects.
    unsafe { libc::umask(0o022) };
    let high = |fd: BorrowedFd<'_>| {
        rustix::io::fcntl_dupfd_cloexec(fd, 64).step("duplicating", "a descriptor")
    };
    let program = high(inherited.program)?;
    let mut last = LISTENER;
    let mut places = vec![(high(inherited.listener)?, LISTENER)];
    if let Some(counter) = &counter {
        places.push((high(counter.as_fd())?, OOM_COUNTER));
        last = OOM_COUNTER;
    }
    last += 1;
    places.push((high(inherited.guest)?, last));
    for (from, to) in &places {
        // SAFETY: duplicates onto numbers that nothing owned in this process
        // uses afterwards.
        check(unsafe { libc::dup2(from.as_raw_fd(), *to) }.into())
            .step("placing", &format!("descriptor {to}"))?;
    }
    close_on_exec_above(last)?;
    reset_signals();
    execute(program.as_raw_fd(), &argv, &env)
}

fn strings(from: &[String]) -> Result<Vec<CString>, Failed> {
    from.iter()
        .map(|text| {
            CString::new(text.as_str())
                .map_err(|_| Failed::because("a string of the plan holds a zero byte:", text))
        })
        .collect()
}

/// Asks the kernel to kill this process when the zygote ends, and makes sure
/// that it had not ended before.
fn die_with_zygote(zygote: BorrowedFd<'_>) -> Result<(), Failed> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .step("asking to die with", "the zygote")?;
    let mut fds = [PollFd::from_borrowed_fd(zygote, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let ended = poll(&mut fds, Some(&now)).step("looking after", "the zygote")?;
    if ended > 0 {
        return Err(Failed::because("starting", "a sandbox: the zygote is gone"));
    }
    Ok(())
}

/// Enters v1 groups and hides them all behind a cgroup namespace; the v2
/// group was entered by the clone itself.
fn enter_cgroups(cgroups: &CgroupPlan) -> Result<(), Failed> {
    enter_v1_groups(cgroups)?;
    // SAFETY: no memory is shared with anybody.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into())
        .step("making", "a cgroup namespace")?;
    Ok(())
}

fn enter_v1_groups(cgroups: &CgroupPlan) -> Result<(), Failed> {
    for dir in &cgroups.v1 {
        // Moving oneself through `tasks` is the only move that does not stop
        // every fork and exit on the machine for a moment.
        let tasks = dir.join("tasks");
        fs::write(&tasks, "0").step("entering cgroup", &tasks)?;
    }
    Ok(())
}

fn raise_loopback() -> Result<(), Failed> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .step("opening", "a socket for the loopback device")?;
    // SAFETY: ifreq is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is initialised and lives through the call.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    };
    check(result.into()).step("raising", "the loopback device")?;
    Ok(())
}

fn limit_resources(plan: &StartPlan) -> Result<(), Failed> {
    for (resource, soft, hard) in &plan.rlimits {
        let limit = libc::rlimit {
            rlim_cur: *soft,
            rlim_max: *hard,
        };
        // SAFETY: the limit lives through the call.
        check(unsafe { libc::setrlimit(*resource as _, &raw const limit) }.into()).step(
            "setting resource limit",
            &format!("{resource} to {soft}:{hard}"),
        )?;
    }
    Ok(())
}

/// Standard input is empty, output and errors go to the zygote, the listening
/// socket and the counter have their numbers, and nothing else survives the
/// execution.
fn arrange_descriptors(inherited: &Inherited<'_>, counter: Option<&OwnedFd>) -> Result<(), Failed> {
    let null = fs::File::open("/dev/null").step("opening", Path::new("/dev/null"))?;
    // Out of the way of 0..=3 first, whatever their numbers are.
    let high = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, 64);
    let null = high(null.as_fd()).step("duplicating", "standard input")?;
    let output = high(inherited.output).step("duplicating", "standard output")?;
    let listener = high(inherited.listener).step("duplicating", "the listening socket")?;
    let mut places = vec![
        (&null, 0),
        (&output, 1),
        (&output, 2),
        (&listener, LISTENER),
    ];
    let counter = counter
        .map(|counter| high(counter.as_fd()))
        .transpose()
        .step("duplicating", "the counter of kills")?;
    let mut last = LISTENER;
    if let Some(counter) = &counter {
        places.push((counter, OOM_COUNTER));
        last = OOM_COUNTER;
    }
    for (from, to) in places {
        // SAFETY: duplicates onto numbers that nothing owned in this process
        // uses afterwards.
        check(unsafe { libc::dup2(from.as_raw_fd(), to) }.into())
            .step("placing", &format!("descriptor {to}"))?;
    }
    close_on_exec_above(last)
}

fn close_on_exec_above(last: i32) -> Result<(), Failed> {
    // SAFETY: only marks descriptors.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            last as u32 + 1,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
    .step("closing", "inherited descriptors")?;
    Ok(())
}

/// The runtime of this program ignores SIGPIPE; the guest starts afresh.
fn reset_signals() {
    // SAFETY: sets default dispositions and an empty mask.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

fn execute(
    guest: i32,
    argv: &[CString],
    env: &[CString],
) -> Result<std::convert::Infallible, Failed> {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both vectors are null-terminated arrays of valid strings.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_execveat,
            guest,
            c"".as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    });
    match result {
        Ok(_) => Err(Failed::because("executing", "the guest")),
        Err(error) => Err(error).step("executing", "the guest"),
    }
}
