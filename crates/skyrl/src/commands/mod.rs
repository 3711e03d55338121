//! One file (or folder) a verb.

pub(crate) mod image;
pub(crate) mod sandbox;
mod state;
