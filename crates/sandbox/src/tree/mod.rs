//! Directory trees that a sandbox wrote: removed, copied and measured without
//! trusting anything in them.
//!
//! A sandbox may leave symbolic links to anywhere, directories nobody may
//! read, names that are not text, nesting deeper than a path can express, and
//! it may go on writing while we read. So every step is taken from an open
//! directory to one name in it, no link is ever followed, no mount point is
//! ever entered, and neither the stack nor the number of open descriptors
//! grows with the depth of the tree. Works as root and as the plain user who
//! owns the files. Knows nothing of images or sandboxes.

mod at;
mod copy;
mod merge;
mod overlay;
mod remove;
#[cfg(test)]
mod tests;
mod walk;

use at::name_of;
pub(crate) use at::{open_dir_at, proc_path, stat_entry};
pub use copy::{CopyOptions, copy_tree};
pub(crate) use copy::{Inode, copy_attributes};
pub use merge::copy_layers;
pub(crate) use merge::merge_layers;
pub(crate) use overlay::{is_opaque, is_overlay_attribute, is_whiteout, normalize_fuse_marks};
pub use remove::{clear_directory, remove_tree};
pub(crate) use walk::for_each_directory;
pub use walk::{TreeSize, tree_size};

use std::io;
use std::path::PathBuf;

/// A step on a tree failed.
#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {source}", path = .path.display())]
pub struct TreeError {
    /// What was attempted.
    pub step: &'static str,
    /// Where.
    pub path: PathBuf,
    /// What the system answered.
    pub source: io::Error,
}

impl TreeError {
    pub(crate) fn new(
        step: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self {
            step,
            path: path.into(),
            source: source.into(),
        }
    }
}

impl From<TreeError> for crate::error::EngineError {
    fn from(error: TreeError) -> Self {
        Self::step(error.step, error.path.display(), error.source)
    }
}

impl From<TreeError> for crate::image::ImageError {
    fn from(error: TreeError) -> Self {
        Self::Io {
            step: error.step,
            path: error.path,
            source: error.source,
        }
    }
}
