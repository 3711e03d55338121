//! The first process of a sandbox. It is no child of ours (the runtime's
//! detached helper started it and ended), so it is held by a descriptor that
//! tells of its end, and on newer kernels of how it ended.

use crate::error::EngineError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use skyrl_protocol::zygote::Identity;
use skyrl_zygote::process::{identity, is_alive};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// A process, beyond the reuse of its number.
#[derive(Debug)]
pub(super) struct Init {
    identity: Identity,
    pidfd: OwnedFd,
}

impl Init {
    /// Takes hold of a process that was just started.
    ///
    /// # Errors
    /// When there is no such process any more.
    pub(super) fn hold(pid: i32) -> Result<Self, EngineError> {
        let fail = |e: io::Error| EngineError::step("taking hold of process", pid, e);
        let pidfd = open(pid).map_err(fail)?;
        let identity =
            identity(pid).ok_or_else(|| fail(io::Error::from_raw_os_error(libc::ESRCH)))?;
        Ok(Self { identity, pidfd })
    }

    /// Takes hold of a process that was recorded earlier, if it still lives.
    pub(super) fn find(identity: &Identity) -> Option<Self> {
        let pidfd = open(identity.pid).ok()?;
        // Checked after opening: now the number can't pass to another.
        is_alive(identity).then(|| Self {
            identity: identity.clone(),
            pidfd,
        })
    }

    /// What to record of it.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its number.
    pub(super) fn pid(&self) -> i32 {
        self.identity.pid
    }

    /// Kills it, and with it all of its PID namespace.
    pub(super) fn kill(&self) {
        // It may have ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end; whether it came within the limit.
    pub(super) fn ended_within(&self, limit: Duration) -> bool {
        ended_within(&self.pidfd, limit)
    }

    /// How it ended, where the kernel tells (since 6.15).
    pub(super) fn exit_status(&self) -> Option<ExitStatus> {
        exit_status(&self.pidfd)
    }
}

fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until the process of a descriptor ended; whether it did within the
/// limit.
pub(super) fn ended_within(pidfd: &OwnedFd, limit: Duration) -> bool {
    let until = std::time::Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().min(i64::MAX as u64) as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

/// `struct pidfd_info` of the kernel, in its first version.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const PIDFD_INFO_EXIT: u64 = 1 << 3;

fn exit_status(pidfd: &OwnedFd) -> Option<ExitStatus> {
    const READ_AND_WRITE: libc::c_ulong = 3;
    const GET_INFO: libc::c_ulong =
        READ_AND_WRITE << 30 | (size_of::<PidfdInfo>() as libc::c_ulong) << 16 | 0xFF << 8 | 11;
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the structure has the kernel's layout, its size is part of the
    // request, and it lives through the call.
    let answer = unsafe { libc::ioctl(pidfd.as_raw_fd(), GET_INFO as _, &raw mut info) };
    (answer == 0 && info.mask & PIDFD_INFO_EXIT != 0).then(|| ExitStatus::from_raw(info.exit_code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_end_of_a_process_is_noticed_and_its_status_known_where_the_kernel_tells() {
        let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let init = Init::hold(child.id() as i32).unwrap();
        assert!(init.ended_within(Duration::from_secs(5)));
        child.wait().unwrap();
        if let Some(status) = init.exit_status() {
            assert_eq!(status.code(), Some(7));
        }
        assert!(Init::find(init.identity()).is_none());
    }

    #[test]
    fn killing_ends_it() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let init = Init::hold(child.id() as i32).unwrap();
        assert!(!init.ended_within(Duration::from_millis(1)));
        init.kill();
        assert!(init.ended_within(Duration::from_secs(5)));
        child.wait().unwrap();
    }
}
