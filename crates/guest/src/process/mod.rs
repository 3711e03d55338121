//! Everything that runs in the sandbox is started, watched and ended here.
//!
//! One thread, the [`reactor`], owns what happens *to* commands: it reads
//! their pipes into bounded buffers, reaps every child of the guest, and
//! enforces time limits. Request threads start commands and wait for what the
//! reactor reports. Nothing here knows HTTP or a client's dialect.

pub mod capture;
mod clock;
mod command;
mod ending;
mod error;
mod oom;
mod pipes;
mod prepare;
mod processes;
mod reactor;
mod registry;
mod spawn;
mod spec;
mod table;
pub(crate) mod terminal;
pub mod text;
mod tree;

pub use command::{Command, Exit, InputError, Piece, Stream, Waited};
pub use error::SpawnError;
pub use oom::OomCounter;
pub use prepare::Environment;
pub use processes::Processes;
pub use reactor::{Event, Settings};
pub use spawn::SCRIPT_DESCRIPTOR;
pub use spec::{Input, Keep, Spec, Stdio};
pub use table::{Commands, TableFull};
