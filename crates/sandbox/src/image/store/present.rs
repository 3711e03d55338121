//! Finding an image in the store, and making it present when it is not there.

use super::{Inner, Work};
use crate::image::error::ImageError;
use crate::image::host::{self, HostPlan};
use crate::image::image::{Image, ImageConfig};
use crate::image::layout::{ImageRecord, LayerRecord, RefRecord, boot_id, io_error};
use crate::image::lock::{FileLock, Sharing};
use crate::image::progress::PullUpdate;
use crate::image::records;
use crate::image::reference::{ImageRef, PullPolicy};
use crate::image::registry;
use crate::image::source::{self, DirectoryKind, Files};
use crate::image::temp::TempDir;
use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The name under which the meaning of a reference is recorded: paths are
/// made absolute, so that it does not depend on the working directory.
pub(super) fn key(image: &ImageRef) -> String {
    let absolute = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    match image {
        ImageRef::OciArchive { path, tag } => ImageRef::OciArchive {
            path: absolute(path),
            tag: tag.clone(),
        },
        ImageRef::DockerArchive { path, tag } => ImageRef::DockerArchive {
            path: absolute(path),
            tag: tag.clone(),
        },
        ImageRef::Directory(path) => ImageRef::Directory(absolute(path)),
        ImageRef::Registry(name) => ImageRef::Registry(registry::normalize(name)),
        other => other.clone(),
    }
    .to_string()
}

/// For what lies on this machine: changes when it does.
fn fingerprint(image: &ImageRef) -> io::Result<Option<String>> {
    let look = |path: &Path| -> io::Result<String> {
        let meta = fs::metadata(path)?;
        Ok(format!(
            "{}:{}:{}:{}.{}",
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec()
        ))
    };
    match image {
        ImageRef::Host => Ok(Some(host::fingerprint(Path::new("/")))),
        ImageRef::OciArchive { path, .. } | ImageRef::DockerArchive { path, .. } => {
            look(path).map(Some)
        }
        ImageRef::Directory(path) => {
            let mut print = look(path)?;
            for index in ["index.json", "manifest.json"] {
                print.push_str(&look(&path.join(index)).unwrap_or_default());
            }
            Ok(Some(print))
        }
        ImageRef::Snapshot(_) | ImageRef::Registry(_) => Ok(None),
    }
}

impl Inner {
    /// The image, if it is here and up to date.
    pub(super) fn present(&self, image: &ImageRef) -> Result<Option<Image>, ImageError> {
        let Some(known) = records::read::<RefRecord>(&self.layout.reference(&key(image)))? else {
            return Ok(None);
        };
        match fingerprint(image) {
            Ok(print) if print == known.fingerprint => {}
            // The archive is gone, but what was in it is here.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => return Ok(None),
        }
        self.load(image, &known.digest)
    }

    /// The image of a digest, held so that nobody removes it.
    pub(super) fn load(&self, image: &ImageRef, digest: &str) -> Result<Option<Image>, ImageError> {
        let path = self.layout.record(digest);
        if !path.exists() {
            return Ok(None);
        }
        let stay = self.layout.stay_lock(digest);
        let lease = FileLock::try_take(&stay, Sharing::Shared)
            .map_err(|e| io_error("locking", &stay, e))?;
        let (Some(lease), Some(record)) = (lease, records::read::<ImageRecord>(&path)?) else {
            return Ok(None);
        };
        let mut layers = Vec::with_capacity(record.layers.len());
        for layer in &record.layers {
            let diff = if layer.starts_with('/') {
                PathBuf::from(layer)
            } else {
                self.layout.diff(layer)
            };
            if !diff.is_dir() {
                return Ok(None);
            }
            layers.push(diff);
        }
        // The time of the last use.
        let now = fs::FileTimes::new().set_modified(std::time::SystemTime::now());
        let _ = fs::File::open(&path).and_then(|file| file.set_times(now));
        Ok(Some(Image {
            reference: image.clone(),
            digest: record.digest,
            layers,
            binds: record.binds,
            config: record.config,
            lease: Some(Arc::new(lease)),
        }))
    }

    /// Makes an image present, alone among all processes.
    pub(super) fn fetch(
        &self,
        image: &ImageRef,
        policy: PullPolicy,
        work: &Work<'_>,
    ) -> Result<Image, ImageError> {
        let key = key(image);
        let _turn = self.wait(
            &self.layout.fetch_lock(&key),
            Sharing::Exclusive,
            image,
            work,
        )?;
        if policy != PullPolicy::Always
            && let Some(found) = self.present(image)?
        {
            return Ok(found);
        }
        let is_local = matches!(image, ImageRef::Host | ImageRef::Directory(_));
        if policy == PullPolicy::Never && !is_local {
            return Err(ImageError::NotFound {
                image: image.to_string(),
                reason: "it is not in the image store, and fetching it was not allowed".into(),
            });
        }
        let print = fingerprint(image).map_err(|error| missing(image, &error))?;
        let digest = match image {
            ImageRef::Host => self.make_host(image, work)?,
            ImageRef::Directory(path) if DirectoryKind::of(path) == DirectoryKind::Root => {
                self.use_in_place(path)?
            }
            ImageRef::Directory(path) => {
                let files = Files::Directory(path.clone());
                self.install(image, source::read(image, &files)?, &files, work)?
            }
            ImageRef::OciArchive { path, .. } | ImageRef::DockerArchive { path, .. } => {
                let tmp = self.layout.dir("tmp");
                let scratch = TempDir::new(&tmp).map_err(|e| io_error("making", &tmp, e))?;
                let files = Files::archive(path, scratch.path(), self.room()?)
                    .map_err(|error| unreadable(image, path, error))?;
                self.install(image, source::read(image, &files)?, &files, work)?
            }
            ImageRef::Registry(name) => self.pull(image, name, policy, work)?,
            ImageRef::Snapshot(_) => {
                return Err(ImageError::NotFound {
                    image: image.to_string(),
                    reason: "snapshots are not in the image store".into(),
                });
            }
        };
        let known = RefRecord {
            reference: key.clone(),
            digest: digest.clone(),
            fingerprint: print,
        };
        records::write(&self.layout.reference(&key), &known)?;
        let made = self
            .load(image, &digest)?
            .ok_or_else(|| ImageError::NotFound {
                image: image.to_string(),
                reason: "it was removed as soon as it was complete".into(),
            })?;
        if self.quota.is_some()
            && let Err(error) = self.evict()
        {
            tracing::warn!(%error, "no room was made in the image store");
        }
        Ok(made)
    }

    /// Takes a lock, saying so when somebody else has it.
    pub(super) fn wait(
        &self,
        path: &Path,
        sharing: Sharing,
        image: &ImageRef,
        work: &Work<'_>,
    ) -> Result<FileLock, ImageError> {
        let busy = || (work.tell)(PullUpdate::Waiting);
        FileLock::wait(path, sharing, work.deadline, work.stop, busy).map_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                ImageError::Deadline {
                    image: image.to_string(),
                    limit: self.pull_limit,
                }
            } else {
                io_error("locking", path, error)
            }
        })
    }

    /// Brings an image from a registry.
    fn pull(
        &self,
        image: &ImageRef,
        name: &str,
        policy: PullPolicy,
        work: &Work<'_>,
    ) -> Result<String, ImageError> {
        let mut known: Vec<(String, u64)> = self
            .inventory()?
            .layers
            .into_values()
            .filter_map(|layer| layer.blob)
            .collect();
        loop {
            let tmp = self.layout.dir("tmp");
            let scratch = TempDir::new(&tmp).map_err(|e| io_error("making", &tmp, e))?;
            let request = registry::Request {
                name,
                known: &known,
                skip_local: policy == PullPolicy::Always,
                scratch: scratch.path(),
            };
            let files = Files::Directory(registry::fetch(&request, work)?);
            let parts = source::read(image, &files)?;
            let stood_in = parts
                .layers
                .iter()
                .any(|layer| layer.blob.as_ref().is_some_and(|blob| known.contains(blob)));
            match self.install(image, parts, &files, work) {
                // A layer that was here when fetching began may have been
                // removed meanwhile; it is fetched this time.
                Err(ImageError::Broken { .. } | ImageError::TooLarge { .. }) if stood_in => {
                    known.clear();
                }
                done => return done,
            }
        }
    }

    fn make_host(&self, image: &ImageRef, work: &Work<'_>) -> Result<String, ImageError> {
        let machine = Path::new("/");
        let plan = HostPlan::read(machine).map_err(|e| io_error("reading", machine, e))?;
        let digest = plan.digest();
        let stay = self.layout.stay_lock(&digest);
        let _stay = self.wait(&stay, Sharing::Shared, image, work)?;
        let diff = self.layout.diff(&digest);
        if !diff.is_dir() {
            let made = TempDir::new(&self.layout.dir("tmp"))
                .and_then(|temp| plan.write(&temp.path().join("diff")).map(|()| temp))
                .map_err(|e| io_error("making", &diff, e))?;
            self.publish_layer(
                &made,
                &LayerRecord {
                    diff_id: digest.clone(),
                    bytes: plan.bytes(),
                    opaque_root: false,
                    boot: boot_id(),
                    blob: None,
                },
            )?;
        }
        let record = ImageRecord {
            digest: digest.clone(),
            layers: vec![digest.clone()],
            binds: plan.binds(&diff),
            config: HostPlan::config(),
        };
        records::write(&self.layout.record(&digest), &record)?;
        Ok(digest)
    }

    /// An unpacked root is not copied: it becomes the only layer as it is.
    fn use_in_place(&self, path: &Path) -> Result<String, ImageError> {
        let broken = |reason: &str| ImageError::Broken {
            image: format!("dir:{}", path.display()),
            reason: reason.to_owned(),
        };
        let root = path
            .canonicalize()
            .map_err(|e| io_error("opening", path, e))?;
        let meta = root.metadata().map_err(|e| io_error("reading", &root, e))?;
        if !meta.is_dir() {
            return Err(broken("it is not a directory"));
        }
        if self.layout.root.starts_with(&root) {
            return Err(broken(
                "it holds this machine's own files, the image store among them; use `host` for its programs",
            ));
        }
        let empty = fs::read_dir(&root)
            .map_err(|e| io_error("reading", &root, e))?
            .next()
            .is_none();
        if empty {
            return Err(broken("it is empty"));
        }
        let Some(name) = root.to_str().filter(|name| name.starts_with('/')) else {
            return Err(broken("its path is not text"));
        };
        let identity = format!(
            "{name}\n{}:{}:{}.{}",
            meta.dev(),
            meta.ino(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        let digest = format!(
            "sha256:{}",
            crate::image::hex(&Sha256::digest(identity.as_bytes()))
        );
        let record = ImageRecord {
            digest: digest.clone(),
            layers: vec![name.to_owned()],
            binds: Vec::new(),
            config: ImageConfig::default(),
        };
        records::write(&self.layout.record(&digest), &record)?;
        Ok(digest)
    }

    /// Moves a complete layer (`diff` in a temporary directory) to its place.
    /// The caller holds the layer's stay lock.
    pub(super) fn publish_layer(
        &self,
        made: &TempDir,
        record: &LayerRecord,
    ) -> Result<(), ImageError> {
        records::write(&made.path().join("layer.json"), record)?;
        let to = self.layout.layer(&record.diff_id);
        let from = made.path().to_owned();
        match fs::rename(&from, &to) {
            Ok(()) => Ok(()),
            // Somebody else was as quick.
            Err(_) if self.layout.diff(&record.diff_id).is_dir() => Ok(()),
            Err(error) => Err(io_error("publishing", &to, error)),
        }
    }
}

/// An archive that can't be read as one.
fn unreadable(image: &ImageRef, path: &Path, error: io::Error) -> ImageError {
    match error.kind() {
        io::ErrorKind::NotFound => missing(image, &error),
        _ if error.raw_os_error().is_some() => io_error("reading", path, error),
        _ => ImageError::Broken {
            image: image.to_string(),
            reason: error.to_string(),
        },
    }
}

/// A file that should hold the image is not there or can't be read.
fn missing(image: &ImageRef, error: &io::Error) -> ImageError {
    ImageError::NotFound {
        image: image.to_string(),
        reason: error.to_string(),
    }
}
