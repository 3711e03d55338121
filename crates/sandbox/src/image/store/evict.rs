//! Making room, and removing what nothing refers to.

use super::usage::{Inventory, names};
use super::{ImageStore, Inner, present, remove_file};
use crate::image::error::ImageError;
use crate::image::layout::{ImageRecord, boot_id, io_error};
use crate::image::layout::{LayerRecord, RefRecord};
use crate::image::lock::{FileLock, Sharing};
use crate::image::records;
use crate::image::reference::ImageRef;
use crate::image::temp::{self, TempDir};
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How long a layer that no image refers to is kept: it may belong to an
/// image whose fetch is about to be tried again.
const ORPHAN_AGE: Duration = Duration::from_secs(3600);

/// What [`ImageStore::evict`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Digests of the images removed.
    pub images: Vec<String>,
    /// Bytes freed.
    pub bytes: u64,
}

impl ImageStore {
    /// Removes leftovers of dead processes and, while the store is above its
    /// quota, the images whose last use is longest ago. Never removes what a
    /// sandbox, a snapshot or a held [`Image`](super::super::Image) needs, so
    /// the store may stay above its quota.
    ///
    /// # Errors
    /// When the store can't be read or files can't be removed.
    pub fn evict(&self) -> Result<Evicted, ImageError> {
        self.inner.evict()
    }
}

impl Inner {
    pub(super) fn evict(&self) -> Result<Evicted, ImageError> {
        let mut evicted = Evicted::default();
        let lock = self.layout.evict_lock();
        let taken = FileLock::try_take(&lock, Sharing::Exclusive);
        let Some(_alone) = taken.map_err(|e| io_error("locking", &lock, e))? else {
            return Ok(evicted);
        };
        let tmp = self.layout.dir("tmp");
        temp::sweep(&tmp).map_err(|e| io_error("cleaning", &tmp, e))?;
        self.remove_stale()?;
        self.remove_free_locks()?;
        let inventory = self.inventory()?;
        evicted.bytes += self.remove_orphans(&inventory, ORPHAN_AGE)?;
        let Some(quota) = self.quota else {
            return Ok(evicted);
        };
        let mut total = inventory.bytes().saturating_sub(evicted.bytes);
        if total > quota {
            let freed = self.remove_orphans(&self.inventory()?, Duration::ZERO)?;
            evicted.bytes += freed;
            total = total.saturating_sub(freed);
        }
        for image in oldest_first(&inventory) {
            if total <= quota {
                break;
            }
            if image.stored_layers().next().is_none() || !self.remove_image(&image)? {
                continue;
            }
            let freed = self.remove_orphans(&self.inventory()?, Duration::ZERO)?;
            evicted.bytes += freed;
            total = total.saturating_sub(freed);
            evicted.images.push(image.digest);
        }
        Ok(evicted)
    }

    pub(super) fn remove(&self, image: &ImageRef) -> Result<(), ImageError> {
        let key = present::key(image);
        let path = self.layout.reference(&key);
        let Some(known) = records::read::<RefRecord>(&path)? else {
            return Err(ImageError::NotFound {
                image: image.to_string(),
                reason: "it is not in the image store".into(),
            });
        };
        let inventory = self.inventory()?;
        let other_names = inventory
            .refs
            .iter()
            .any(|other| other.digest == known.digest && other.reference != key);
        let Some((record, _)) = inventory
            .images
            .iter()
            .find(|(i, _)| i.digest == known.digest)
        else {
            return remove_file(&path);
        };
        let mut users = inventory.users(record);
        if users.is_empty() && !other_names && !self.remove_image(record)? {
            users.push("a process that is starting a sandbox".into());
        }
        if !users.is_empty() {
            return Err(ImageError::InUse {
                image: image.to_string(),
                users: users.join(", "),
            });
        }
        remove_file(&path)?;
        self.remove_orphans(&self.inventory()?, Duration::ZERO)?;
        Ok(())
    }

    /// Removes an image's record and names, unless it is needed.
    fn remove_image(&self, image: &ImageRecord) -> Result<bool, ImageError> {
        let stay = self.layout.stay_lock(&image.digest);
        let taken = FileLock::try_take(&stay, Sharing::Exclusive);
        let Some(alone) = taken.map_err(|e| io_error("locking", &stay, e))? else {
            return Ok(false);
        };
        // Marks are made by who holds the image, so none appears from here on.
        let inventory = self.inventory()?;
        if !inventory.users(image).is_empty() {
            return Ok(false);
        }
        for known in &inventory.refs {
            if known.digest == image.digest {
                remove_file(&self.layout.reference(&known.reference))?;
            }
        }
        remove_file(&self.layout.record(&image.digest))?;
        alone.remove().map_err(|e| io_error("removing", &stay, e))?;
        Ok(true)
    }

    /// Removes layers that nothing refers to; returns their bytes.
    fn remove_orphans(&self, inventory: &Inventory, age: Duration) -> Result<u64, ImageError> {
        let needed = inventory.needed_layers();
        let mut candidates = Vec::new();
        for id in inventory
            .layers
            .keys()
            .filter(|id| !needed.contains(id.as_str()))
        {
            let made = fs::metadata(self.layout.layer_record(id)).and_then(|meta| meta.modified());
            let is_old = made.is_ok_and(|made| {
                SystemTime::now().duration_since(made).unwrap_or_default() >= age
            });
            if !is_old {
                continue;
            }
            // Taken by whoever is about to use it.
            let stay = self.layout.stay_lock(id);
            let taken = FileLock::try_take(&stay, Sharing::Exclusive);
            if let Some(alone) = taken.map_err(|e| io_error("locking", &stay, e))? {
                candidates.push((id, alone));
            }
        }
        if candidates.is_empty() {
            return Ok(0);
        }
        // Whoever needed one of them published its image before letting go.
        let inventory = self.inventory()?;
        let needed = inventory.needed_layers();
        let mut freed = 0;
        for (id, alone) in candidates {
            if !needed.contains(id.as_str()) {
                freed += inventory.layers.get(id).map_or(0, |layer| layer.bytes);
                self.remove_layer(id, alone)?;
            }
        }
        Ok(freed)
    }

    /// Removes a layer: first out of sight, then from the disk.
    fn remove_layer(&self, id: &str, alone: FileLock) -> Result<(), ImageError> {
        let tmp = self.layout.dir("tmp");
        let grave = TempDir::new(&tmp).map_err(|e| io_error("making", &tmp, e))?;
        let from = self.layout.layer(id);
        match fs::rename(&from, grave.path().join("layer")) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("removing", &from, error)),
        }
        alone.remove().map_err(|e| io_error("removing", &from, e))
    }

    /// Removes layers that may have lost content when the machine went down,
    /// records that were never finished, and locks of nothing.
    pub(super) fn remove_stale(&self) -> Result<(), ImageError> {
        let boot = boot_id();
        let dir = self.layout.dir("layers");
        for name in names(&dir)? {
            let id = name.replacen('-', ":", 1);
            let record = records::read::<LayerRecord>(&self.layout.layer_record(&id))?;
            let sound = record.is_some_and(|layer| {
                layer.diff_id == id && (layer.boot == boot || self.layout.durable(&id).exists())
            });
            if sound {
                continue;
            }
            tracing::warn!(layer = id, "removing a layer that may be incomplete");
            for (image, _) in self.inventory()?.images {
                if image.stored_layers().any(|layer| layer == id) {
                    remove_file(&self.layout.record(&image.digest))?;
                }
            }
            crate::tree::remove_tree(&dir.join(&name))?;
        }
        for part in ["refs", "records"] {
            remove_old_temporaries(&self.layout.dir(part))?;
        }
        Ok(())
    }
}

impl Inner {
    /// Removes lock files nobody has asked for in a day.
    fn remove_free_locks(&self) -> Result<(), ImageError> {
        const AGE: Duration = Duration::from_secs(24 * 3600);
        let dir = self.layout.dir("locks");
        for name in names(&dir)? {
            let path = dir.join(name);
            let made = fs::metadata(&path).and_then(|meta| meta.modified());
            let is_old = made.is_ok_and(|made| {
                SystemTime::now().duration_since(made).unwrap_or_default() >= AGE
            });
            if is_old && let Ok(Some(free)) = FileLock::try_take(&path, Sharing::Exclusive) {
                free.remove().map_err(|e| io_error("removing", &path, e))?;
            }
        }
        Ok(())
    }
}

fn oldest_first(inventory: &Inventory) -> Vec<ImageRecord> {
    let mut images = inventory.images.clone();
    images.sort_by_key(|(_, used)| *used);
    images.into_iter().map(|(image, _)| image).collect()
}

/// Removes records whose writer died before renaming them.
fn remove_old_temporaries(dir: &Path) -> Result<(), ImageError> {
    let entries = fs::read_dir(dir).map_err(|e| io_error("reading", dir, e))?;
    for entry in entries.flatten() {
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        let old = || {
            let made = entry.metadata().and_then(|meta| meta.modified()).ok()?;
            SystemTime::now().duration_since(made).ok()
        };
        if hidden && old().is_some_and(|age| age > ORPHAN_AGE) {
            remove_file(&entry.path())?;
        }
    }
    Ok(())
}
