//! Telling the caller how far an image is.

use std::fmt;

/// Receives what happens while an image is made present. Called from the task
/// that awaits it; must not block.
pub trait Progress: Send + Sync {
    /// Something changed.
    fn update(&self, update: &PullUpdate);
}

/// How far an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullUpdate {
    /// Another thread or process is fetching it.
    Waiting,
    /// It is being fetched.
    Fetching {
        /// Bytes so far.
        bytes: u64,
    },
    /// Fetching failed and is tried again.
    Retrying {
        /// Which attempt comes next; the first one is 1.
        attempt: u32,
        /// Why the last one failed.
        reason: String,
    },
    /// Its layers are being unpacked.
    Unpacking {
        /// Layers that are complete.
        done: usize,
        /// Layers it has.
        layers: usize,
        /// Bytes unpacked so far.
        bytes: u64,
    },
}

impl fmt::Display for PullUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        match self {
            Self::Waiting => f.write_str("waiting for another process that fetches it"),
            Self::Fetching { bytes } => write!(f, "fetching, {} MiB", bytes / MIB),
            Self::Retrying { attempt, reason } => write!(f, "attempt {attempt}: {reason}"),
            Self::Unpacking {
                done,
                layers,
                bytes,
            } => write!(
                f,
                "unpacking, {done} of {layers} layers, {} MiB",
                bytes / MIB
            ),
        }
    }
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn update(&self, _: &PullUpdate) {}
}

impl<F: Fn(&PullUpdate) + Send + Sync> Progress for F {
    fn update(&self, update: &PullUpdate) {
        self(update);
    }
}
