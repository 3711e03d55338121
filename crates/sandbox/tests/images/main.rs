//! The image store and snapshots against real archives, real overlays, real
//! skopeo and a registry made here, as root and as a plain user.

mod archive;
mod attacks;
mod crash;
mod merge;
mod registry;
mod snapshots;
mod sources;
mod store;
mod support;
mod trees;
mod unpack;
