//! Which system calls a sandbox may make.
//!
//! The set is that of the container engines' well-known default profile as it
//! applies to a container with the default capabilities, with three changes:
//! `clone3` answers "no such call" so that the flags of `clone` can be looked
//! at, `io_uring` is refused, and sockets of the kernel's crypto and
//! hypervisor families are refused.
//!
//! Two filters are installed. The first lets through what is listed and
//! answers `ENOSYS` for the rest, so that programs fall back from calls newer
//! than this list. The second answers `EPERM` for what is refused on purpose,
//! so that programs report a lack of permission. Where both refuse, the one
//! installed last is heard.

use libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// The two filters, in order of installation.
#[derive(Debug, Clone)]
pub struct Filters {
    listed: BpfProgram,
    refused: BpfProgram,
}

/// Flags of `clone` that make namespaces.
pub const NAMESPACE_FLAGS: u64 = (CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET) as u64
    | CLONE_NEWTIME;
const CLONE_NEWTIME: u64 = 0x80;

/// Sockets of the kernel's crypto.
pub const AF_ALG: u64 = 38;
/// Sockets to the hypervisor.
pub const AF_VSOCK: u64 = 40;

/// A system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    number: c_long,
}

macro_rules! calls {
    ($($number:ident),* $(,)?) => {
        &[$(Call { name: stringify!($number).split_at(4).1, number: $number }),*]
    };
}

// Calls newer than the libc crate's tables; numbered alike everywhere.
const SYS_CACHESTAT: c_long = 451;
const SYS_MAP_SHADOW_STACK: c_long = 453;
const SYS_FUTEX_WAKE: c_long = 454;
const SYS_FUTEX_WAIT: c_long = 455;
const SYS_FUTEX_REQUEUE: c_long = 456;
#[cfg(target_arch = "x86_64")]
const SYS_IO_PGETEVENTS: c_long = 333;
#[cfg(target_arch = "aarch64")]
const SYS_IO_PGETEVENTS: c_long = 292;

/// Execution domains that only change what `uname` says or how memory is laid
/// out.
pub const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF];

impl Filters {
    /// Compiles them for this machine.
    ///
    /// # Errors
    /// In words, when this processor is not supported.
    pub fn compile() -> Result<Self, String> {
        let arch: TargetArch = std::env::consts::ARCH
            .try_into()
            .map_err(|e| format!("no filter for this processor: {e}"))?;
        let compile = |filter: Result<SeccompFilter, seccompiler::BackendError>| {
            filter
                .and_then(BpfProgram::try_from)
                .map_err(|e| format!("compiling the system call filter: {e}"))
        };
        Ok(Self {
            listed: compile(SeccompFilter::new(
                listed_rules().map_err(|e| e.to_string())?,
                SeccompAction::Errno(ENOSYS as u32),
                SeccompAction::Allow,
                arch,
            ))?,
            refused: compile(SeccompFilter::new(
                refused_rules().map_err(|e| e.to_string())?,
                SeccompAction::Allow,
                SeccompAction::Errno(EPERM as u32),
                arch,
            ))?,
        })
    }

    /// Puts the calling thread under them for good. It must have
    /// `no_new_privs` set.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn install(&self) -> std::io::Result<()> {
        for program in [&self.listed, &self.refused] {
            seccompiler::apply_filter(program).map_err(|error| match error {
                seccompiler::Error::Prctl(e) | seccompiler::Error::Seccomp(e) => e,
                other => std::io::Error::other(other.to_string()),
            })?;
        }
        Ok(())
    }
}

/// Calls let through whatever their arguments, for those who have another
/// build the filter. Beside them `clone`, `personality` and `socket` are let
/// through with arguments that make no namespace, are one of
/// [`PERSONALITIES`], and name neither [`AF_ALG`] nor [`AF_VSOCK`].
pub fn allowed() -> impl Iterator<Item = &'static Call> {
    ALLOWED.iter().chain(ALLOWED_HERE)
}

/// Calls answered with `EPERM`; what is in neither list is answered with
/// `ENOSYS`.
pub fn refused() -> impl Iterator<Item = &'static Call> {
    REFUSED.iter().chain(REFUSED_HERE)
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        argument, length, operator, value,
    )?])
}

fn listed_rules() -> Result<Rules, seccompiler::BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    let mut rules: Rules = allowed().map(|call| (call.number, Vec::new())).collect();
    rules.insert(
        SYS_clone,
        vec![condition(
            0,
            Qword,
            SeccompCmpOp::MaskedEq(NAMESPACE_FLAGS),
            0,
        )?],
    );
    rules.insert(
        SYS_personality,
        PERSONALITIES
            .into_iter()
            .map(|domain| condition(0, Dword, SeccompCmpOp::Eq, domain))
            .collect::<Result<_, _>>()?,
    );
    rules.insert(
        SYS_socket,
        vec![SeccompRule::new(vec![
            SeccompCondition::new(0, Dword, SeccompCmpOp::Ne, AF_ALG)?,
            SeccompCondition::new(0, Dword, SeccompCmpOp::Ne, AF_VSOCK)?,
        ])?],
    );
    Ok(rules)
}

fn refused_rules() -> Result<Rules, seccompiler::BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    let mut rules: Rules = refused().map(|call| (call.number, Vec::new())).collect();
    // Any one namespace flag is enough: one rule for each.
    rules.insert(
        SYS_clone,
        (0..u64::BITS)
            .map(|bit| 1u64 << bit)
            .filter(|flag| NAMESPACE_FLAGS & flag != 0)
            .map(|flag| condition(0, Qword, SeccompCmpOp::MaskedEq(flag), flag))
            .collect::<Result<_, _>>()?,
    );
    rules.insert(
        SYS_socket,
        vec![
            condition(0, Dword, SeccompCmpOp::Eq, AF_ALG)?,
            condition(0, Dword, SeccompCmpOp::Eq, AF_VSOCK)?,
        ],
    );
    Ok(rules)
}

/// Calls every processor has.
#[rustfmt::skip]
const ALLOWED: &[Call] = calls![
    // Files by descriptor and path.
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv,
    SYS_pwritev, SYS_preadv2, SYS_pwritev2, SYS_openat, SYS_openat2, SYS_close, SYS_close_range,
    SYS_lseek, SYS_dup, SYS_dup3, SYS_fcntl, SYS_flock, SYS_ioctl, SYS_fstat, SYS_newfstatat,
    SYS_statx, SYS_statfs, SYS_fstatfs, SYS_faccessat, SYS_faccessat2, SYS_fchmod, SYS_fchmodat,
    SYS_fchmodat2, SYS_fchown, SYS_fchownat, SYS_truncate, SYS_ftruncate, SYS_fallocate,
    SYS_fsync, SYS_fdatasync, SYS_sync, SYS_syncfs, SYS_sync_file_range, SYS_fadvise64,
    SYS_readahead, SYS_getdents64, SYS_mkdirat, SYS_mknodat, SYS_unlinkat, SYS_linkat,
    SYS_symlinkat, SYS_readlinkat, SYS_renameat2, SYS_utimensat, SYS_umask, SYS_chdir, SYS_fchdir,
    SYS_chroot, SYS_getcwd, SYS_copy_file_range, SYS_sendfile, SYS_splice, SYS_tee, SYS_vmsplice,
    SYS_pipe2, SYS_memfd_create, SYS_memfd_secret, SYS_name_to_handle_at, SYS_getxattr,
    SYS_lgetxattr, SYS_fgetxattr, SYS_listxattr, SYS_llistxattr, SYS_flistxattr, SYS_setxattr,
    SYS_lsetxattr, SYS_fsetxattr, SYS_removexattr, SYS_lremovexattr, SYS_fremovexattr,
    SYS_inotify_init1, SYS_inotify_add_watch, SYS_inotify_rm_watch, SYS_fanotify_mark,
    SYS_CACHESTAT,
    // Waiting for events.
    SYS_pselect6, SYS_ppoll, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2,
    SYS_eventfd2, SYS_signalfd4, SYS_timerfd_create, SYS_timerfd_settime, SYS_timerfd_gettime,
    SYS_io_setup, SYS_io_destroy, SYS_io_submit, SYS_io_cancel, SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    // Memory.
    SYS_mmap, SYS_munmap, SYS_mremap, SYS_mprotect, SYS_madvise, SYS_msync, SYS_mincore,
    SYS_mlock, SYS_mlock2, SYS_munlock, SYS_mlockall, SYS_munlockall, SYS_brk,
    SYS_remap_file_pages, SYS_pkey_alloc, SYS_pkey_free, SYS_pkey_mprotect, SYS_membarrier,
    SYS_MAP_SHADOW_STACK, SYS_mseal, SYS_process_mrelease,
    // Processes and threads.
    SYS_execve, SYS_execveat, SYS_exit, SYS_exit_group, SYS_wait4, SYS_waitid, SYS_getpid,
    SYS_getppid, SYS_gettid, SYS_getpgid, SYS_setpgid, SYS_getsid, SYS_setsid,
    SYS_set_tid_address, SYS_set_robust_list, SYS_get_robust_list, SYS_rseq, SYS_futex,
    SYS_futex_waitv, SYS_FUTEX_WAKE, SYS_FUTEX_WAIT, SYS_FUTEX_REQUEUE, SYS_kill, SYS_tkill,
    SYS_tgkill, SYS_pidfd_open, SYS_pidfd_getfd, SYS_pidfd_send_signal, SYS_ptrace,
    SYS_process_vm_readv, SYS_process_vm_writev, SYS_prctl, SYS_seccomp, SYS_capget, SYS_capset,
    SYS_restart_syscall, SYS_landlock_create_ruleset, SYS_landlock_add_rule,
    SYS_landlock_restrict_self,
    // Scheduling and limits.
    SYS_sched_yield, SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_getparam,
    SYS_sched_setparam, SYS_sched_getscheduler, SYS_sched_setscheduler, SYS_sched_getattr,
    SYS_sched_setattr, SYS_sched_get_priority_max, SYS_sched_get_priority_min,
    SYS_sched_rr_get_interval, SYS_getpriority, SYS_setpriority, SYS_ioprio_get, SYS_ioprio_set,
    SYS_getrlimit, SYS_setrlimit, SYS_prlimit64, SYS_getrusage, SYS_times, SYS_getcpu,
    SYS_sysinfo, SYS_uname, SYS_getrandom,
    // Identity.
    SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid, SYS_getresuid, SYS_getresgid, SYS_getgroups,
    SYS_setuid, SYS_setgid, SYS_setreuid, SYS_setregid, SYS_setresuid, SYS_setresgid,
    SYS_setgroups, SYS_setfsuid, SYS_setfsgid,
    // Signals and time.
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigpending, SYS_rt_sigreturn, SYS_rt_sigsuspend,
    SYS_rt_sigtimedwait, SYS_rt_sigqueueinfo, SYS_rt_tgsigqueueinfo, SYS_sigaltstack,
    SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday,
    SYS_adjtimex, SYS_clock_adjtime, SYS_getitimer, SYS_setitimer, SYS_timer_create,
    SYS_timer_settime, SYS_timer_gettime, SYS_timer_getoverrun, SYS_timer_delete,
    // Sockets.
    SYS_socketpair, SYS_bind, SYS_listen, SYS_accept, SYS_accept4, SYS_connect, SYS_getsockname,
    SYS_getpeername, SYS_getsockopt, SYS_setsockopt, SYS_shutdown, SYS_sendto, SYS_sendmsg,
    SYS_sendmmsg, SYS_recvfrom, SYS_recvmsg, SYS_recvmmsg,
    // System V and POSIX inter-process communication, in the sandbox's own
    // namespace.
    SYS_shmget, SYS_shmat, SYS_shmdt, SYS_shmctl, SYS_semget, SYS_semop, SYS_semtimedop,
    SYS_semctl, SYS_msgget, SYS_msgsnd, SYS_msgrcv, SYS_msgctl, SYS_mq_open, SYS_mq_unlink,
    SYS_mq_timedsend, SYS_mq_timedreceive, SYS_mq_notify, SYS_mq_getsetattr,
];

/// Calls only this processor has, older than their general forms.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_HERE: &[Call] = calls![
    SYS_open, SYS_creat, SYS_stat, SYS_lstat, SYS_access, SYS_chmod, SYS_chown, SYS_lchown,
    SYS_mkdir, SYS_rmdir, SYS_mknod, SYS_unlink, SYS_link, SYS_symlink, SYS_readlink, SYS_rename,
    SYS_renameat, SYS_getdents, SYS_utime, SYS_utimes, SYS_futimesat, SYS_dup2, SYS_pipe,
    SYS_poll, SYS_select, SYS_epoll_create, SYS_epoll_wait, SYS_epoll_ctl_old, SYS_epoll_wait_old,
    SYS_eventfd, SYS_signalfd, SYS_inotify_init, SYS_fork, SYS_vfork, SYS_getpgrp, SYS_time,
    SYS_alarm, SYS_pause, SYS_arch_prctl, SYS_modify_ldt, SYS_get_thread_area,
    SYS_set_thread_area,
];

/// Calls only this processor has, older than their general forms.
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[Call] = calls![];

/// Refused on purpose, wherever the call exists.
#[rustfmt::skip]
const REFUSED: &[Call] = calls![
    // Namespaces and mounts.
    SYS_unshare, SYS_setns, SYS_mount, SYS_umount2, SYS_pivot_root, SYS_mount_setattr,
    SYS_move_mount, SYS_open_tree, SYS_fsopen, SYS_fsconfig, SYS_fsmount, SYS_fspick,
    SYS_open_by_handle_at, SYS_quotactl, SYS_quotactl_fd, SYS_fanotify_init,
    // The kernel itself.
    SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_init_module, SYS_finit_module,
    SYS_delete_module, SYS_kexec_load, SYS_kexec_file_load, SYS_reboot, SYS_syslog, SYS_acct,
    SYS_swapon, SYS_swapoff, SYS_nfsservctl, SYS_lookup_dcookie, SYS_vhangup, SYS_kcmp,
    SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register, SYS_process_madvise,
    // Keys, names and clocks of the machine.
    SYS_keyctl, SYS_add_key, SYS_request_key, SYS_sethostname, SYS_setdomainname,
    SYS_settimeofday, SYS_clock_settime,
    // Placement on memory nodes.
    SYS_mbind, SYS_get_mempolicy, SYS_set_mempolicy, SYS_set_mempolicy_home_node,
    SYS_migrate_pages, SYS_move_pages,
];

#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const REFUSED_HERE: &[Call] = calls![
    SYS_iopl, SYS_ioperm, SYS__sysctl, SYS_uselib, SYS_ustat, SYS_sysfs,
];

#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[Call] = calls![];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_compile_and_no_call_is_both_let_through_and_refused() {
        Filters::compile().unwrap();
        for call in allowed() {
            assert!(refused().all(|other| other != call), "{call:?}");
        }
        assert!(allowed().any(|call| call.name == "openat"));
    }
}
