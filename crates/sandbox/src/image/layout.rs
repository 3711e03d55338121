//! Where the store keeps things, and what it records about them.
//!
//! ```text
//! images/
//!   format.json        who made the store, and how it marks opaque directories
//!   refs/<hash>.json   what a reference last meant
//!   records/<id>.json  images; its modification time is that of the last use
//!   layers/<id>/       layer.json, diff/
//!   uses/<owner>/      which images living sandboxes use
//!   locks/             between processes
//!   tmp/               work in progress
//! ```

use super::error::ImageError;
use super::image::{ImageConfig, ReadOnlyBind};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use skyrl_protocol::OwnerId;
use std::path::{Path, PathBuf};

/// Version of the layout; a store of another one is refused.
pub(super) const VERSION: u32 = 1;

/// File of a layer that names directories whose attributes it does not know.
pub(super) const IMPLIED: &str = "implied";
/// File of a layer that names directories with whiteouts.
pub(super) const HIDING: &str = "hiding";

/// `format.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Format {
    pub(super) version: u32,
    pub(super) uid: u32,
    pub(super) marks: Marks,
}

/// How layers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Marks {
    /// By root: owners are kept, opaque directories are marked with
    /// `trusted.overlay.opaque`.
    Trusted,
    /// By a plain user (or by root of a user namespace): everything belongs
    /// to that user, opaque directories are marked with
    /// `user.overlay.opaque`; overlays are mounted with `userxattr`.
    User,
}

impl Marks {
    /// Attribute that makes a directory opaque.
    pub(super) fn opaque(self) -> &'static std::ffi::CStr {
        match self {
            Self::Trusted => c"trusted.overlay.opaque",
            Self::User => c"user.overlay.opaque",
        }
    }
}

/// What a reference last meant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RefRecord {
    pub(super) reference: String,
    pub(super) digest: String,
    /// For files and directories: changes when they do.
    pub(super) fingerprint: Option<String>,
}

/// An image that is complete.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) digest: String,
    /// Topmost first: diff ids of layers in the store, or absolute paths of
    /// directories used in place.
    pub(super) layers: Vec<String>,
    pub(super) binds: Vec<ReadOnlyBind>,
    pub(super) config: ImageConfig,
}

impl ImageRecord {
    /// Diff ids of its layers in the store.
    pub(super) fn stored_layers(&self) -> impl Iterator<Item = &str> {
        self.layers
            .iter()
            .map(String::as_str)
            .filter(|layer| !layer.starts_with('/'))
    }
}

/// A layer that is complete.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub(super) diff_id: String,
    /// Bytes on the disk.
    pub(super) bytes: u64,
    /// Its root hides everything below, which overlayfs can't express: lower
    /// layers are left out.
    pub(super) opaque_root: bool,
    /// When the machine is started anew, a layer that was not flushed to the
    /// disk may have lost content.
    pub(super) boot: String,
    /// Digest and length of the file it came in: the next image with that
    /// file does not need to fetch it.
    pub(super) blob: Option<(String, u64)>,
}

/// Which images a sandbox or snapshot uses.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct UseRecord {
    pub(super) digest: String,
    pub(super) layers: Vec<String>,
}

/// Paths of the store.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) root: PathBuf,
}

/// The file name for a digest or diff id: `sha256:abc` is `sha256-abc`.
fn file_name(id: &str) -> String {
    id.replace(':', "-")
}

impl Layout {
    pub(super) const DIRECTORIES: [&'static str; 6] =
        ["refs", "records", "layers", "uses", "locks", "tmp"];

    pub(super) fn dir(&self, part: &str) -> PathBuf {
        self.root.join(part)
    }

    pub(super) fn format(&self) -> PathBuf {
        self.root.join("format.json")
    }

    fn ref_key(reference: &str) -> String {
        super::hex(&Sha256::digest(reference.as_bytes()))
    }

    pub(super) fn reference(&self, reference: &str) -> PathBuf {
        self.root
            .join(format!("refs/{}.json", Self::ref_key(reference)))
    }

    pub(super) fn record(&self, digest: &str) -> PathBuf {
        self.root
            .join(format!("records/{}.json", file_name(digest)))
    }

    pub(super) fn layer(&self, diff_id: &str) -> PathBuf {
        self.root.join("layers").join(file_name(diff_id))
    }

    pub(super) fn diff(&self, diff_id: &str) -> PathBuf {
        self.layer(diff_id).join("diff")
    }

    pub(super) fn layer_record(&self, diff_id: &str) -> PathBuf {
        self.layer(diff_id).join("layer.json")
    }

    /// Present once the layer was flushed to the disk.
    pub(super) fn durable(&self, diff_id: &str) -> PathBuf {
        self.layer(diff_id).join("durable")
    }

    /// The diff id of a layer path handed out earlier.
    pub(super) fn diff_id_of(&self, diff: &Path) -> Option<String> {
        let name = diff.parent()?.strip_prefix(self.dir("layers")).ok()?;
        Some(name.to_str()?.replacen('-', ":", 1))
    }

    pub(super) fn uses(&self, owner: &OwnerId) -> PathBuf {
        self.root.join("uses").join(owner.as_str())
    }

    /// Held exclusively while a reference is fetched.
    pub(super) fn fetch_lock(&self, reference: &str) -> PathBuf {
        self.root
            .join(format!("locks/fetch-{}", Self::ref_key(reference)))
    }

    /// Held exclusively while a layer is unpacked.
    pub(super) fn unpack_lock(&self, diff_id: &str) -> PathBuf {
        self.root
            .join(format!("locks/unpack-{}", file_name(diff_id)))
    }

    /// Held shared by those who need a layer or an image to stay, exclusively
    /// by who removes it.
    pub(super) fn stay_lock(&self, id: &str) -> PathBuf {
        self.root.join(format!("locks/stay-{}", file_name(id)))
    }

    /// Held exclusively by the one process that makes room.
    pub(super) fn evict_lock(&self) -> PathBuf {
        self.root.join("locks/evict")
    }
}

/// Identifies this start of the machine.
pub(super) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

/// An I/O failure with its place.
pub(super) fn io_error(step: &'static str, path: &Path, source: std::io::Error) -> ImageError {
    ImageError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}
