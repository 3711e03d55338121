//! Who uses which image, and what is in the store.

use super::{ImageStore, Inner, remove_file};
use crate::image::error::ImageError;
use crate::image::image::Image;
use crate::image::layout::{ImageRecord, LayerRecord, RefRecord, UseRecord, io_error};
use crate::image::records;
use crate::image::reference::ImageRef;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use skyrl_protocol::{OwnerId, SandboxId, SnapshotId};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::SystemTime;

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// What it is known as.
    pub references: Vec<String>,
    /// Digest of its content.
    pub digest: String,
    /// Bytes of its layers on the disk; layers shared with other images count
    /// in each. Zero for a directory used in place.
    pub bytes: u64,
    /// When a sandbox was last started from it.
    pub last_used: SystemTime,
    /// Who needs it: `owner/sandbox` or `owner/snapshot:id`.
    pub used_by: Vec<String>,
}

/// What the store's records say, read at once.
pub(super) struct Inventory {
    pub(super) images: Vec<(ImageRecord, SystemTime)>,
    pub(super) refs: Vec<RefRecord>,
    pub(super) layers: BTreeMap<String, LayerRecord>,
    /// `owner/user`, and what it uses.
    pub(super) uses: Vec<(String, UseRecord)>,
}

impl Inventory {
    /// Bytes of all layers in the store.
    pub(super) fn bytes(&self) -> u64 {
        self.layers.values().map(|layer| layer.bytes).sum()
    }

    /// Users of an image or of any layer only it could have brought.
    pub(super) fn users(&self, image: &ImageRecord) -> Vec<String> {
        self.uses
            .iter()
            .filter(|(_, used)| used.digest == image.digest)
            .map(|(user, _)| user.clone())
            .collect()
    }

    /// Layers that an image or a user needs.
    pub(super) fn needed_layers(&self) -> BTreeSet<&str> {
        let by_images = self
            .images
            .iter()
            .flat_map(|(image, _)| image.stored_layers());
        let by_users = self
            .uses
            .iter()
            .flat_map(|(_, used)| used.layers.iter().map(String::as_str));
        by_images.chain(by_users).collect()
    }
}

impl ImageStore {
    /// Records that a sandbox needs an image until [`ImageStore::unmark`],
    /// even if this process dies. Call it while `image` is held.
    ///
    /// # Errors
    /// When the record can't be written.
    pub fn mark_used(
        &self,
        image: &Image,
        owner: &OwnerId,
        sandbox: &SandboxId,
    ) -> Result<(), ImageError> {
        self.inner.mark(image, owner, sandbox.as_str())
    }

    /// Takes a sandbox's mark back; there may be none.
    ///
    /// # Errors
    /// When the record can't be removed.
    pub fn unmark(&self, owner: &OwnerId, sandbox: &SandboxId) -> Result<(), ImageError> {
        self.inner.unmark(owner, sandbox.as_str())
    }

    /// Takes all marks of an owner back, for owners that are gone.
    ///
    /// # Errors
    /// When a record can't be removed.
    pub fn unmark_owner(&self, owner: &OwnerId) -> Result<(), ImageError> {
        crate::tree::remove_tree(&self.inner.layout.uses(owner)).map_err(Into::into)
    }

    /// Owners that have marks.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn owners(&self) -> Result<Vec<OwnerId>, ImageError> {
        let dir = self.inner.layout.dir("uses");
        Ok(names(&dir)?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect())
    }

    /// Marks an image as the base of a snapshot.
    pub(crate) fn mark_snapshot(
        &self,
        image: &Image,
        owner: &OwnerId,
        snapshot: &SnapshotId,
    ) -> Result<(), ImageError> {
        self.inner.mark(image, owner, &snapshot_user(snapshot))
    }

    /// Takes a snapshot's mark back.
    pub(crate) fn unmark_snapshot(
        &self,
        owner: &OwnerId,
        snapshot: &SnapshotId,
    ) -> Result<(), ImageError> {
        self.inner.unmark(owner, &snapshot_user(snapshot))
    }

    /// What is in the store, most recently used first.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let inventory = self.inner.inventory()?;
        let mut images: Vec<ImageSummary> = inventory
            .images
            .iter()
            .map(|(image, last_used)| ImageSummary {
                references: inventory
                    .refs
                    .iter()
                    .filter(|known| known.digest == image.digest)
                    .map(|known| known.reference.clone())
                    .collect(),
                digest: image.digest.clone(),
                bytes: image
                    .stored_layers()
                    .filter_map(|id| inventory.layers.get(id))
                    .map(|layer| layer.bytes)
                    .sum(),
                last_used: *last_used,
                used_by: inventory.users(image),
            })
            .collect();
        images.sort_by_key(|image| std::cmp::Reverse(image.last_used));
        Ok(images)
    }

    /// Removes an image under one of its names; its files go with the last
    /// name.
    ///
    /// # Errors
    /// [`ImageError::InUse`] when sandboxes, snapshots or processes need it,
    /// [`ImageError::NotFound`] when it is not in the store.
    pub fn remove(&self, image: &ImageRef) -> Result<(), ImageError> {
        self.inner.remove(image)
    }
}

/// A user name that no sandbox can have.
fn snapshot_user(snapshot: &SnapshotId) -> String {
    format!("snapshot:{snapshot}")
}

impl Inner {
    fn mark(&self, image: &Image, owner: &OwnerId, user: &str) -> Result<(), ImageError> {
        let dir = self.layout.uses(owner);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| io_error("making", &dir, e))?;
        let used = UseRecord {
            digest: image.digest.clone(),
            layers: image
                .layers
                .iter()
                .filter_map(|layer| self.layout.diff_id_of(layer))
                .collect(),
        };
        records::write(&dir.join(format!("{user}.json")), &used)
    }

    fn unmark(&self, owner: &OwnerId, user: &str) -> Result<(), ImageError> {
        let dir = self.layout.uses(owner);
        remove_file(&dir.join(format!("{user}.json")))?;
        // Stays while other marks are in it.
        let _ = fs::remove_dir(&dir);
        Ok(())
    }

    /// Reads all records.
    pub(super) fn inventory(&self) -> Result<Inventory, ImageError> {
        let mut images = Vec::new();
        let dir = self.layout.dir("records");
        for (name, image) in read_all::<ImageRecord>(&dir)? {
            let used = fs::metadata(dir.join(&name))
                .and_then(|meta| meta.modified())
                .unwrap_or(SystemTime::UNIX_EPOCH);
            images.push((image, used));
        }
        let refs = read_all::<RefRecord>(&self.layout.dir("refs"))?
            .into_iter()
            .map(|(_, known)| known)
            .collect();
        let mut layers = BTreeMap::new();
        let dir = self.layout.dir("layers");
        for name in names(&dir)? {
            if let Some(layer) = records::read::<LayerRecord>(&dir.join(name).join("layer.json"))? {
                layers.insert(layer.diff_id.clone(), layer);
            }
        }
        let mut uses = Vec::new();
        let dir = self.layout.dir("uses");
        for owner in names(&dir)? {
            for (name, used) in read_all::<UseRecord>(&dir.join(&owner))? {
                let user = name.trim_end_matches(".json");
                uses.push((format!("{owner}/{user}"), used));
            }
        }
        Ok(Inventory {
            images,
            refs,
            layers,
            uses,
        })
    }
}

/// Names in a directory, without those being written.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, ImageError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("reading", dir, error)),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    Ok(names)
}

fn read_all<T: DeserializeOwned>(dir: &Path) -> Result<Vec<(String, T)>, ImageError> {
    let mut found = Vec::new();
    for name in names(dir)? {
        if let Some(record) = records::read(&dir.join(&name))? {
            found.push((name, record));
        }
    }
    Ok(found)
}
