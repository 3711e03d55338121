//! Control groups of sandboxes, v1, v2 and both at once, for every engine
//! that makes its own.
//!
//! A sandbox's groups lie below the caller's own (`<own>/skyrl-<key>/<id>`),
//! so that whatever bounds the caller (a SLURM job, a container) bounds its
//! sandboxes too. [`discover`] finds where groups can be made, [`group`] works
//! with one sandbox's groups. Nothing here knows engines or images.

pub mod discover;
pub mod group;
mod victims;

pub use discover::{Cgroups, own_groups};
pub use group::{Bounds, Frozen, Group, Usage};
pub use victims::{Victim, victims};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::PathBuf;

/// What a group can count or bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Controller {
    /// CPU time per wall time.
    Cpu,
    /// CPU time used (v1 only; v2 counts it in every group).
    CpuAccounting,
    /// Memory.
    Memory,
    /// Processes and threads.
    Pids,
    /// Stopping all processes at once (v1 only; every v2 group can).
    Freezer,
}

impl Controller {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Cpu,
        Self::CpuAccounting,
        Self::Memory,
        Self::Pids,
        Self::Freezer,
    ];

    /// The kernel's name in `/proc/self/cgroup`.
    pub fn v1_name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::CpuAccounting => "cpuacct",
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Freezer => "freezer",
        }
    }

    /// Name in `cgroup.controllers`; absent for what v2 has without one.
    pub fn v2_name(self) -> Option<&'static str> {
        match self {
            Self::Cpu => Some("cpu"),
            Self::Memory => Some("memory"),
            Self::Pids => Some("pids"),
            Self::CpuAccounting | Self::Freezer => None,
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuAccounting => "cpu accounting",
            other => other.v1_name(),
        })
    }
}

/// A failed step on a control group.
#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {source}", path = .path.display())]
pub struct CgroupError {
    /// What was attempted.
    pub step: &'static str,
    /// On which file or group.
    pub path: PathBuf,
    /// What the kernel answered.
    pub source: io::Error,
}

impl CgroupError {
    fn new(step: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self {
            step,
            path: path.into(),
            source,
        }
    }
}

impl From<CgroupError> for crate::EngineError {
    fn from(error: CgroupError) -> Self {
        Self::step(error.step, error.path.display(), error.source)
    }
}

/// Undoes the octal escapes of paths in `/proc/self/mountinfo`.
pub(crate) fn unescape_mount_path(text: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\' && tail.len() >= 3)
            .then(|| std::str::from_utf8(&tail[..3]).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}
