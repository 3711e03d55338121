//! The native engine: sandboxes made of nothing but the kernel, as root or as
//! a plain user.
//!
//! The engine prepares directories and control groups, says what to start in
//! a plan, and keeps the books; a zygote (`skyrl-zygote`) clones. Everything
//! on the disk is recorded before it is made, so that [`sweep()`] can remove
//! it all whatever happened.

mod engine;
mod entry;
pub(crate) mod limits;
mod link;
pub(crate) mod machine;
pub(crate) mod network;
pub(crate) mod plan;
pub(crate) mod record;
mod sweep;
pub(crate) mod trash;

pub use engine::{NativeEngine, NativeOptions};
pub use sweep::sweep;

use crate::error::EngineError;
use crate::probe::EngineProbe;
use std::path::Path;

/// Finds out what this machine offers the engine. `dir` is where sandboxes
/// would live. Blocking.
///
/// # Errors
/// When the zygote can't even be run.
pub fn probe(zygote: &Path, dir: &Path) -> Result<EngineProbe, EngineError> {
    Ok(machine::Machine::look(zygote, dir)?.report())
}
