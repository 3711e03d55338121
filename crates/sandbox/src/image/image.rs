//! An image that is present: what an engine mounts, and how its commands are
//! to run. Made by the store and by snapshots; engines only read it.

use super::lock::FileLock;
use super::reference::ImageRef;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// An image on this machine, ready to be mounted.
///
/// While it (or a clone) is held, the store does not remove its files. What
/// must survive this process is marked with
/// [`ImageStore::mark_used`](super::ImageStore::mark_used).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Image {
    /// What it was asked for as.
    pub reference: ImageRef,
    /// Identifies its content: digest of its configuration (which names every
    /// layer) for real images, of its inputs for `host` and `dir:`.
    pub digest: String,
    /// Directories to be stacked read-only, topmost first, in the form
    /// overlayfs expects. Never empty.
    ///
    /// There may be more than a `mount(2)` option string of 4096 bytes can
    /// name by their full paths; open descriptors named as
    /// `/proc/self/fd/N`, paths relative to the working directory, or
    /// `fsconfig(2)` with `lowerdir+` have room. Root mounts with
    /// `redirect_dir=off,metacopy=off,index=off`, so that upper directories
    /// stay usable as layers elsewhere; `userxattr` implies it.
    pub layers: Vec<PathBuf>,
    /// Host paths to be bound read-only over the layers, in order. Only
    /// `host` has them.
    pub binds: Vec<ReadOnlyBind>,
    /// How its commands are to run.
    pub config: ImageConfig,
    /// Keeps the store from removing it.
    #[serde(skip)]
    #[expect(dead_code, reason = "held, never read")]
    pub(crate) lease: Option<Arc<FileLock>>,
}

/// A path of this machine shown inside a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadOnlyBind {
    /// On the host; may be a directory or a file, and may have further mounts
    /// below it.
    pub source: PathBuf,
    /// Inside; exists in the layers.
    pub target: PathBuf,
}

/// What an image says about running it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Working directory, absolute.
    pub workdir: Option<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
    /// Program and first arguments.
    pub entrypoint: Vec<String>,
    /// Further arguments.
    pub cmd: Vec<String>,
    /// Free-form marks.
    pub labels: BTreeMap<String, String>,
}
