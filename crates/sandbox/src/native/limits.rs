//! Which mechanism holds which limit: the kernel's groups where they can be
//! written, else resource limits and the watchdog. What nothing can hold is
//! refused. A pure decision.

use crate::cgroup::{Bounds, Cgroups, Controller};
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::spec::Limits;
use crate::watchdog::WatchLimits;

/// How a sandbox's limits are held.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Enforcement {
    /// By control groups.
    pub(crate) bounds: Bounds,
    /// By resource limits: number, and value for soft and hard.
    pub(crate) rlimits: Vec<(u32, u64)>,
    /// By looking.
    pub(crate) watch: WatchLimits,
}

/// What the decision depends on, besides the groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Sandboxes have a user namespace of their own.
    pub(crate) user_namespace: bool,
    /// Processes are counted for each user namespace apart (since 5.14).
    pub(crate) counts_by_namespace: bool,
}

impl Kernel {
    /// Of this machine, for sandboxes with or without a user namespace.
    pub(crate) fn of_this_machine(user_namespace: bool) -> Self {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        let mut numbers = release
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        Self {
            user_namespace,
            counts_by_namespace: version >= (5, 14),
        }
    }
}

/// Least memory a guest and a shell can live in.
const LEAST_MEMORY: u64 = 8 << 20;

/// Least number of processes and threads a guest and a shell can live with.
const LEAST_PIDS: u32 = 16;

/// Headroom of a process's data over the memory limit before the kernel
/// itself refuses: programs reserve more than they use.
const RESERVATION: u64 = 1 << 30;

pub(crate) fn enforce(
    engine: EngineKind,
    limits: &Limits,
    cgroups: &Cgroups,
    kernel: Kernel,
) -> Result<Enforcement, EngineError> {
    let mut result = Enforcement::default();
    if let Some(cpus) = limits.cpus {
        if !(cpus.is_finite() && cpus > 0.0) {
            return Err(invalid(format!("{cpus} is not a number of CPUs")));
        }
        cgroups
            .check(Controller::Cpu)
            .map_err(|reason| EngineError::LimitUnsupported {
                engine,
                limit: "cpus",
                reason: reason.to_owned(),
            })?;
        result.bounds.cpus = Some(cpus);
    }
    if let Some(bytes) = limits.memory_bytes {
        if bytes < LEAST_MEMORY {
            return Err(invalid(format!(
                "a sandbox can't live in {bytes} bytes of memory: the least is {LEAST_MEMORY}"
            )));
        }
        if cgroups.check(Controller::Memory).is_ok() {
            result.bounds.memory_bytes = Some(bytes);
        } else {
            result.watch.memory_bytes = Some(bytes);
            let data = bytes
                .saturating_mul(2)
                .max(bytes.saturating_add(RESERVATION));
            result.rlimits.push((libc::RLIMIT_DATA, data));
        }
    }
    if let Some(pids) = limits.pids {
        if pids < LEAST_PIDS {
            return Err(invalid(format!(
                "a sandbox can't live with {pids} processes: the least is {LEAST_PIDS}"
            )));
        }
        if cgroups.check(Controller::Pids).is_ok() {
            result.bounds.pids = Some(pids);
        } else {
            result.watch.pids = Some(pids);
            if kernel.user_namespace && kernel.counts_by_namespace {
                result.rlimits.push((libc::RLIMIT_NPROC, pids.into()));
            }
        }
    }
    if let Some(bytes) = limits.disk_bytes {
        result.watch.disk_bytes = Some(bytes);
        result.rlimits.push((libc::RLIMIT_FSIZE, bytes));
    }
    Ok(result)
}

fn invalid(what: String) -> EngineError {
    EngineError::Invalid {
        what,
        hint: "give a larger limit or none".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: Kernel = Kernel {
        user_namespace: true,
        counts_by_namespace: true,
    };

    fn all() -> Limits {
        Limits {
            memory_bytes: Some(64 << 20),
            pids: Some(100),
            disk_bytes: Some(1 << 20),
            ..Limits::default()
        }
    }

    #[test]
    fn without_groups_the_watchdog_and_resource_limits_hold_what_they_can() {
        let none = Cgroups::unavailable("no cgroups here");
        let held = enforce(EngineKind::Native, &all(), &none, USER).unwrap();
        assert_eq!(held.bounds, Bounds::default());
        assert_eq!(held.watch.memory_bytes, Some(64 << 20));
        assert_eq!(held.watch.pids, Some(100));
        assert!(held.rlimits.contains(&(libc::RLIMIT_NPROC, 100)));
        assert!(held.rlimits.contains(&(libc::RLIMIT_FSIZE, 1 << 20)));
    }

    #[test]
    fn processes_are_not_limited_by_user_where_that_would_count_other_sandboxes() {
        let none = Cgroups::unavailable("no cgroups here");
        let old = Kernel {
            counts_by_namespace: false,
            ..USER
        };
        let held = enforce(EngineKind::Native, &all(), &none, old).unwrap();
        assert!(!held.rlimits.iter().any(|(r, _)| *r == libc::RLIMIT_NPROC));
        assert_eq!(held.watch.pids, Some(100));
    }

    #[test]
    fn a_limit_that_nothing_holds_is_refused_with_the_reason() {
        let none = Cgroups::unavailable("no cgroups here");
        let limits = Limits {
            cpus: Some(1.0),
            ..Limits::default()
        };
        let error = enforce(EngineKind::Native, &limits, &none, USER).unwrap_err();
        assert!(error.to_string().contains("no cgroups here"), "{error}");
    }

    #[test]
    fn nonsense_is_refused() {
        let none = Cgroups::unavailable("");
        for limits in [
            Limits {
                cpus: Some(f64::NAN),
                ..Limits::default()
            },
            Limits {
                memory_bytes: Some(1),
                ..Limits::default()
            },
            Limits {
                pids: Some(1),
                ..Limits::default()
            },
        ] {
            let error = enforce(EngineKind::Native, &limits, &none, USER).unwrap_err();
            assert!(matches!(error, EngineError::Invalid { .. }), "{error}");
        }
    }
}
