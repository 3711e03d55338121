//! Layers: from a tar stream in a registry's form to a directory overlayfs can
//! stack. Reads bytes nobody vouches for; see [`unpack()`] for what is refused.

mod dirs;
mod names;
mod tar;
mod unpack;

pub(super) use tar::{Skip, TarKind, TarReader};
pub(super) use unpack::{LayerError, UnpackOptions, Unpacked, unpack};
