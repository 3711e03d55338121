//! The single-threaded process that clones the native engine's sandboxes.
//!
//! Cloning inside a threaded server is a hazard (locks held by threads that do
//! not exist in the child), so the engine keeps this small static process for
//! it: it waits on one socket, clones, and each clone sets its own sandbox up
//! ([`setup`]) before it becomes the guest. It survives nothing: if it dies,
//! the kernel kills its sandboxes.
//!
//! The same steps serve the container runtimes of the `oci` engine: [`launch`]
//! makes their surroundings.
//!
//! It knows nothing of images, limits or records: the engine's plan says all.

pub mod launch;
pub mod overlay;
pub mod probe;
pub mod process;
pub mod sealed;
pub mod seccomp;
pub mod server;
pub mod setup;
pub mod spawn;
pub mod step;
