//! The podman engine against real Podman, as root and as plain users with and
//! without subordinate ids.

mod lifecycle;
mod limits;
mod recovery;
mod support;
mod users;
