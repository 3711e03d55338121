//! The `oci` engine: crun (or runc) on root file systems of the image store.
//!
//! A start is one call of the runtime inside a launcher (see
//! [`skyrl_zygote::launch`]): the launcher enters the sandbox's groups, mounts
//! its root in a mount namespace of its own and executes the runtime there,
//! which starts the guest and ends. No mount appears on the host, and when the
//! guest ends the kernel removes them all. Everything afterwards (pausing,
//! counting, killing) is done on the process and its groups directly, without
//! calling the runtime again.
//!
//! | file | holds |
//! |---|---|
//! | `engine` | the verbs |
//! | `config` | what the runtime is told (pure) |
//! | `launch` | calling it |
//! | `runtime` | which runtimes there are and how they are called |
//! | `init` | the sandbox's first process |
//! | `network` | the program that translates a sandbox's network |
//! | `record` | what is written down, and where |
//! | `strays` | what interrupted starts left in the process table |
//! | `sweep` | removing all that a dead owner left |
//! | `machine` | what this machine offers, and what of it is used |

mod config;
mod engine;
mod init;
mod launch;
mod machine;
mod network;
mod record;
mod runtime;
mod strays;
mod sweep;

pub use engine::OciEngine;
pub use machine::{OciOptions, probe};
pub use runtime::{Runtime, RuntimeKind};
pub use sweep::sweep;
