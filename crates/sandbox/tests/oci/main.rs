//! The `oci` engine against the real runtimes and kernel, as root and as a
//! plain user.

mod bed;
mod isolation;
mod lifecycle;
mod limits;
mod network;
mod recovery;
