//! Types that cross a process boundary: identifiers, the native API of the
//! in-sandbox guest, and the messages between an engine and its zygote.
//!
//! They live apart so that the guest, the zygote and the servers agree on a
//! wire format without knowing each other. Nothing here does I/O.

pub mod guest;
pub mod id;
pub mod zygote;

pub use id::{InvalidId, OwnerId, SandboxId, SnapshotId};
