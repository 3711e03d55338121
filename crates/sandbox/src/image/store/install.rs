//! From the parts of an image to layers in the store.

use super::{Inner, Work, patch};
use crate::image::error::ImageError;
use crate::image::layer::{LayerError, UnpackOptions, unpack};
use crate::image::layout::{ImageRecord, LayerRecord, boot_id, io_error};
use crate::image::lock::{FileLock, Sharing};
use crate::image::progress::PullUpdate;
use crate::image::records;
use crate::image::reference::ImageRef;
use crate::image::source::{Files, Hashing, LayerPart, Parts, decompress};
use crate::image::temp::TempDir;
use crate::tree::tree_size;
use std::fs::File;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// Layers unpacked at a time.
const MAX_WORKERS: usize = 4;
/// Part of the free space an image may take, in percent.
const FREE_SHARE: u64 = 95;

/// What the workers of one image share.
struct Job<'a> {
    inner: &'a Inner,
    image: &'a ImageRef,
    files: &'a Files,
    work: &'a Work<'a>,
    layers: usize,
    done: AtomicUsize,
    bytes: AtomicU64,
    limit: u64,
}

impl Inner {
    /// Unpacks what is missing of an image and records it. Returns its digest.
    pub(super) fn install(
        &self,
        image: &ImageRef,
        parts: Parts,
        files: &Files,
        work: &Work<'_>,
    ) -> Result<String, ImageError> {
        // Nobody removes these layers until the image refers to them.
        let mut stays = Vec::new();
        for layer in &parts.layers {
            let stay = self.layout.stay_lock(&layer.diff_id);
            stays.push(self.wait(&stay, Sharing::Shared, image, work)?);
        }
        let mut missing: Vec<&LayerPart> = Vec::new();
        for layer in &parts.layers {
            let known = missing.iter().any(|other| other.diff_id == layer.diff_id);
            if !known && !self.layout.diff(&layer.diff_id).is_dir() {
                missing.push(layer);
            }
        }
        let job = Job {
            inner: self,
            image,
            files,
            work,
            layers: parts.layers.len(),
            done: AtomicUsize::new(parts.layers.len() - missing.len()),
            bytes: AtomicU64::new(0),
            limit: self.room()?,
        };
        job.unpack_all(&missing)?;
        self.make_durable(&parts)?;
        let mut layers = Vec::new();
        for layer in parts.layers.iter().rev() {
            layers.push(layer.diff_id.clone());
            let record = records::read::<LayerRecord>(&self.layout.layer_record(&layer.diff_id))?;
            if record.is_some_and(|record| record.opaque_root) {
                break;
            }
        }
        let _stay = self.set_right(&mut layers, image, work)?;
        let record = ImageRecord {
            digest: parts.digest.clone(),
            layers,
            binds: Vec::new(),
            config: parts.config,
        };
        records::write(&self.layout.record(&parts.digest), &record)?;
        Ok(parts.digest)
    }

    /// Bytes an image may take.
    pub(super) fn room(&self) -> Result<u64, ImageError> {
        let root = &self.layout.root;
        let space = rustix::fs::statvfs(root).map_err(|e| io_error("measuring", root, e.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize) / 100 * FREE_SHARE;
        Ok(self.quota.map_or(free, |quota| quota.min(free)))
    }

    /// Flushes new layers to the disk, so that they outlive a crash of the
    /// machine.
    fn make_durable(&self, parts: &Parts) -> Result<(), ImageError> {
        let fresh: Vec<_> = parts
            .layers
            .iter()
            .map(|layer| self.layout.durable(&layer.diff_id))
            .filter(|mark| !mark.exists())
            .collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let root = &self.layout.root;
        let synced = File::open(root).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
        synced.map_err(|e| io_error("flushing", root, e))?;
        for mark in fresh {
            File::create(&mark).map_err(|e| io_error("marking", &mark, e))?;
        }
        Ok(())
    }
}

impl Job<'_> {
    /// Unpacks layers, several at a time. They are independent of each other.
    fn unpack_all(&self, layers: &[&LayerPart]) -> Result<(), ImageError> {
        let next = AtomicUsize::new(0);
        let failure: Mutex<Option<ImageError>> = Mutex::new(None);
        let workers = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .clamp(1, MAX_WORKERS)
            .min(layers.len());
        self.tell();
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(layer) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = self.unpack_one(layer) {
                            // The others end after their layer.
                            next.fetch_add(layers.len(), Ordering::Relaxed);
                            let mut failure =
                                failure.lock().unwrap_or_else(PoisonError::into_inner);
                            failure.get_or_insert(error);
                            return;
                        }
                        self.done.fetch_add(1, Ordering::Relaxed);
                        self.tell();
                    }
                });
            }
        });
        failure
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    fn tell(&self) {
        (self.work.tell)(PullUpdate::Unpacking {
            done: self.done.load(Ordering::Relaxed),
            layers: self.layers,
            bytes: self.bytes.load(Ordering::Relaxed),
        });
    }

    fn unpack_one(&self, layer: &LayerPart) -> Result<(), ImageError> {
        let layout = &self.inner.layout;
        let lock = layout.unpack_lock(&layer.diff_id);
        let alone = self
            .inner
            .wait(&lock, Sharing::Exclusive, self.image, self.work)?;
        // Another image's fetch may have brought it meanwhile.
        if !layout.diff(&layer.diff_id).is_dir() {
            let tmp = layout.dir("tmp");
            let made = TempDir::new(&tmp).map_err(|e| io_error("making", &tmp, e))?;
            let opaque_root = self.unpack_into(&made, layer)?;
            let size = tree_size(&made.path().join("diff"))?;
            self.inner.publish_layer(
                &made,
                &LayerRecord {
                    diff_id: layer.diff_id.clone(),
                    bytes: size.bytes,
                    opaque_root,
                    boot: boot_id(),
                    blob: layer.blob.clone(),
                },
            )?;
        }
        remove_lock(alone);
        Ok(())
    }

    /// Unpacks into `diff` of a temporary directory, checking both digests.
    /// Returns whether the layer hides everything below it.
    fn unpack_into(&self, made: &TempDir, layer: &LayerPart) -> Result<bool, ImageError> {
        let broken = |reason: String| ImageError::Broken {
            image: self.image.to_string(),
            reason,
        };
        let read_error = |error: std::io::Error| {
            if error.kind() == std::io::ErrorKind::NotFound {
                broken(format!("its layer {} is missing", layer.file))
            } else {
                self.layer_error(layer, LayerError::reading(error))
            }
        };
        let file = self.files.open(&layer.file).map_err(read_error)?;
        let mut blob = Hashing::new(file);
        let plain = decompress(&mut blob).map_err(read_error)?;
        let mut content = Hashing::new(plain);
        let options = UnpackOptions {
            marks: self.inner.marks,
            spend: &|bytes| self.spend(bytes),
            stop: self.work.stop,
        };
        let unpacked = unpack(&mut content, &made.path().join("diff"), &options)
            .map_err(|error| self.layer_error(layer, error))?;
        let (diff_id, _) = content.finish();
        if diff_id != layer.diff_id {
            return Err(broken(format!(
                "a layer should have the digest {}, but has {diff_id}",
                layer.diff_id
            )));
        }
        if let Some((expected, length)) = &layer.blob {
            // The compression's trailer may not have been read.
            std::io::copy(&mut blob, &mut std::io::sink()).map_err(read_error)?;
            let (found, found_length) = blob.finish();
            if (&found, &found_length) != (expected, length) {
                return Err(broken(format!(
                    "a layer's file should have the digest {expected} and {length} bytes, but has {found} and {found_length}"
                )));
            }
        }
        if unpacked.devices + unpacked.dropped_xattrs > 0 {
            tracing::info!(
                layer = layer.diff_id,
                devices = unpacked.devices,
                attributes = unpacked.dropped_xattrs,
                "left parts of a layer out"
            );
        }
        patch::write_notes(made.path(), &unpacked)?;
        Ok(unpacked.opaque_root)
    }

    /// Accounts for bytes taken from a layer's archive.
    fn spend(&self, bytes: u64) -> Result<(), LayerError> {
        const REPORT: u64 = 16 << 20;
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let total = before.saturating_add(bytes);
        if total > self.limit {
            return Err(LayerError::TooLarge(format!(
                "it takes more than the {} MiB there is room for",
                self.limit >> 20
            )));
        }
        if before / REPORT != total / REPORT {
            if Instant::now() >= self.work.deadline {
                return Err(LayerError::Stopped);
            }
            self.tell();
        }
        Ok(())
    }

    fn layer_error(&self, layer: &LayerPart, error: LayerError) -> ImageError {
        let image = self.image.to_string();
        match error {
            LayerError::Broken(reason) => ImageError::Broken {
                image,
                reason: format!("layer {}: {reason}", layer.diff_id),
            },
            LayerError::TooLarge(reason) => ImageError::TooLarge { image, reason },
            LayerError::Unsupported(reason) => ImageError::Store {
                path: self.inner.layout.root.clone(),
                reason,
                hint: "choose a state directory on ext4 or xfs, or on tmpfs of Linux 6.6 and later: --state-dir".into(),
            },
            LayerError::Stopped => ImageError::Deadline {
                image,
                limit: self.inner.pull_limit,
            },
            LayerError::Io { step, path, source } => ImageError::Io { step, path, source },
        }
    }
}

/// Releases a lock whose file nobody will need soon.
fn remove_lock(lock: FileLock) {
    if let Err(error) = lock.remove() {
        tracing::debug!(%error, "a lock file stays");
    }
}
