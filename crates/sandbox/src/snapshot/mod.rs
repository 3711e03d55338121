//! Frozen files of sandboxes, as images that further sandboxes start from.
//!
//! A snapshot is the upper layer of a sandbox, made read-only: the next
//! sandboxes stack it over the layers the first one had. Any number of them
//! share it, and snapshots of those stack further, up to [`MAX_CHAIN`].
//!
//! A snapshot stays while it has its name, while a sandbox uses it, and while
//! a later snapshot stacks on it; then its files go. Every step leaves either
//! the state before or the state after it, or something that
//! [`Snapshots::open`] removes. Knows no engine: the caller says where the
//! upper directory is and makes sure nobody writes to it.
//!
//! ```text
//! snapshots/
//!   <id>/snapshot.json    what it stacks on
//!   <id>/diff/            the frozen files
//!   <id>/users/<sandbox>  who uses it
//!   <id>/removed          its name was given up
//!   .new-<id>/            being frozen
//!   .gone-<random>/       being removed
//!   .lock                 held for each change
//! ```

use crate::engine::SnapshotMode;
use crate::image::{FileLock, Sharing, random_name, read_record, write_record};
use crate::image::{Image, ImageConfig, ImageError, ImageRef, ImageStore, ReadOnlyBind};
use crate::state::OwnerDir;
use crate::tree::{
    CopyOptions, copy_tree, for_each_directory, merge_layers, normalize_fuse_marks, remove_tree,
};
use serde::{Deserialize, Serialize};
use skyrl_protocol::{SandboxId, SnapshotId};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Most snapshots stacked on each other. The next one is merged with all of
/// them into one, so that neither mounting nor looking files up gets slower
/// with every generation.
pub const MAX_CHAIN: usize = 24;

/// How long a change waits for another one. Changes that take long (copying,
/// merging, deleting) are made outside of the lock.
const LOCK_LIMIT: Duration = Duration::from_secs(60);

/// Where a sandbox's files are.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// What it wrote over its image: the upper directory of its overlay, with
    /// whiteouts and opaque marks.
    Upper(&'a Path),
    /// The same, written by fuse-overlayfs, which marks opaque directories in
    /// its own way: they are marked in the kernel's, so that either can stack
    /// the snapshot. This looks at every directory.
    FuseUpper(&'a Path),
    /// Its whole root, where it had no overlay but a copy of the image.
    Root(&'a Path),
}

/// A snapshot, for listings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSummary {
    /// Its name.
    pub id: SnapshotId,
    /// What the first sandbox of its line started from.
    pub base: ImageRef,
    /// Snapshots it stacks on, nearest first.
    pub parents: Vec<SnapshotId>,
    /// Sandboxes that use it.
    pub used_by: Vec<SandboxId>,
    /// Its name was given up; it stays for its users.
    pub removed: bool,
}

/// `snapshot.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    id: SnapshotId,
    base: ImageRef,
    base_digest: String,
    base_layers: Vec<PathBuf>,
    binds: Vec<ReadOnlyBind>,
    config: ImageConfig,
    parents: Vec<SnapshotId>,
}

/// The snapshots of one owner.
#[derive(Debug)]
pub struct Snapshots {
    owner: Arc<OwnerDir>,
    dir: PathBuf,
    store: ImageStore,
}

impl Snapshots {
    /// Opens an owner's snapshots and removes what an earlier process left
    /// half-made. The caller is the owner.
    ///
    /// # Errors
    /// When leftovers can't be removed.
    pub fn open(owner: Arc<OwnerDir>, store: ImageStore) -> Result<Self, ImageError> {
        let dir = owner.root().join("snapshots");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| failed("making", &dir, e))?;
        let snapshots = Self { owner, dir, store };
        snapshots.sweep()?;
        Ok(snapshots)
    }

    /// Freezes a sandbox's files. `base` is what the sandbox was started from
    /// (an image, or an earlier snapshot's). Nobody may write to the source
    /// meanwhile; with [`SnapshotMode::Consume`] it must be unmounted, and is
    /// gone afterwards if this succeeds.
    ///
    /// Consuming takes the same time whatever was written, except when the
    /// chain is full ([`MAX_CHAIN`]) or the source is on another file system
    /// than the state directory: then its files are copied.
    ///
    /// # Errors
    /// [`ImageError::Exists`] when the name is taken; otherwise the source is
    /// as it was, unless consuming failed after it was moved.
    pub fn freeze(
        &self,
        id: &SnapshotId,
        base: &Image,
        source: Source<'_>,
        mode: SnapshotMode,
        options: CopyOptions<'_>,
    ) -> Result<(), ImageError> {
        let making = self.dir.join(format!(".new-{id}"));
        let mut record = {
            let _lock = self.lock()?;
            if self.path(id).exists() || making.exists() {
                return Err(ImageError::Exists {
                    image: ImageRef::Snapshot(id.clone()).to_string(),
                });
            }
            let record = self.plan(id, base, source)?;
            make_dir(&making)?;
            self.store
                .mark_snapshot(base, self.owner.owner(), id)
                .inspect_err(|_| drop(fs::remove_dir(&making)))?;
            record
        };
        let made = self
            .fill(&making, source, mode, options)
            .and_then(|()| self.flatten(&making, &mut record, options))
            .and_then(|()| write_record(&making.join("snapshot.json"), &record))
            .and_then(|()| make_dir(&making.join("users")))
            .and_then(|()| self.publish(&making, id));
        if made.is_err() {
            self.store.unmark_snapshot(self.owner.owner(), id)?;
            remove_tree(&making)?;
        }
        made
    }

    /// What a snapshot of `base` is made of.
    fn plan(
        &self,
        id: &SnapshotId,
        base: &Image,
        source: Source<'_>,
    ) -> Result<Record, ImageError> {
        let mut record = match &base.reference {
            ImageRef::Snapshot(parent) => {
                let mut record = self.record(parent)?;
                record.parents.insert(0, parent.clone());
                record
            }
            reference => Record {
                id: id.clone(),
                base: reference.clone(),
                base_digest: base.digest.clone(),
                base_layers: base.layers.clone(),
                binds: base.binds.clone(),
                config: base.config.clone(),
                parents: Vec::new(),
            },
        };
        record.id = id.clone();
        if let Source::Root(_) = source {
            record.parents.clear();
            record.base_layers.clear();
        }
        Ok(record)
    }

    fn fill(
        &self,
        making: &Path,
        source: Source<'_>,
        mode: SnapshotMode,
        options: CopyOptions<'_>,
    ) -> Result<(), ImageError> {
        let diff = making.join("diff");
        let (Source::Upper(from) | Source::FuseUpper(from) | Source::Root(from)) = source;
        let is_moved = mode == SnapshotMode::Consume
            && match fs::rename(from, &diff) {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::CrossesDevices => false,
                Err(error) => return Err(failed("moving", from, error)),
            };
        if !is_moved {
            copy_tree(from, &diff, options)?;
        }
        if let Source::FuseUpper(_) = source {
            let mark = self.store.opaque_mark();
            for_each_directory(&diff, |dir| normalize_fuse_marks(dir, mark))?;
        }
        if mode == SnapshotMode::Consume && !is_moved {
            remove_tree(from)?;
        }
        Ok(())
    }

    /// Merges a full chain into one layer.
    fn flatten(
        &self,
        making: &Path,
        record: &mut Record,
        options: CopyOptions<'_>,
    ) -> Result<(), ImageError> {
        if record.parents.len() < MAX_CHAIN {
            return Ok(());
        }
        let top = making.join("top");
        let diff = making.join("diff");
        fs::rename(&diff, &top).map_err(|e| failed("moving", &diff, e))?;
        let mut layers = vec![top.clone()];
        layers.extend(record.parents.drain(..).map(|p| self.path(&p).join("diff")));
        let mark = self.store.opaque_mark();
        merge_layers(&layers, &record.base_layers, &diff, mark, options)?;
        remove_tree(&top).map_err(Into::into)
    }

    fn publish(&self, making: &Path, id: &SnapshotId) -> Result<(), ImageError> {
        let to = self.path(id);
        fs::rename(making, &to)
            .and_then(|()| File::open(&self.dir)?.sync_all())
            .map_err(|e| failed("publishing", &to, e))
    }

    /// The image a snapshot is.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] when there is none of this name.
    pub fn resolve(&self, id: &SnapshotId) -> Result<Image, ImageError> {
        if self.path(id).join("removed").exists() {
            return Err(not_found(id));
        }
        self.image(id)
    }

    /// Resolves a snapshot for a sandbox and keeps it for that sandbox until
    /// [`Snapshots::release`].
    ///
    /// # Errors
    /// As [`Snapshots::resolve`].
    pub fn acquire(&self, id: &SnapshotId, sandbox: &SandboxId) -> Result<Image, ImageError> {
        let _lock = self.lock()?;
        let image = self.resolve(id)?;
        let mark = self.path(id).join("users").join(sandbox.as_str());
        File::create(&mark).map_err(|e| failed("marking", &mark, e))?;
        Ok(image)
    }

    /// A sandbox is gone: whatever snapshots it used may go if nobody else
    /// needs them.
    ///
    /// # Errors
    /// When files can't be removed.
    pub fn release(&self, sandbox: &SandboxId) -> Result<(), ImageError> {
        let mut released = false;
        for id in self.ids()? {
            let mark = self.path(&id).join("users").join(sandbox.as_str());
            match fs::remove_file(&mark) {
                Ok(()) => released = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("releasing", &mark, error)),
            }
        }
        if released { self.collect() } else { Ok(()) }
    }

    /// Gives a snapshot's name up; its files go when nobody needs them.
    /// Succeeds if there is none.
    ///
    /// # Errors
    /// When files can't be removed.
    pub fn remove(&self, id: &SnapshotId) -> Result<(), ImageError> {
        let mark = self.path(id).join("removed");
        match File::create(&mark) {
            Ok(_) => self.collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("removing", &mark, error)),
        }
    }

    /// The owner's snapshots by name.
    ///
    /// # Errors
    /// When a record can't be read.
    pub fn list(&self) -> Result<Vec<SnapshotSummary>, ImageError> {
        let mut found = Vec::new();
        for id in self.ids()? {
            let Some(record) = read_record::<Record>(&self.path(&id).join("snapshot.json"))? else {
                continue;
            };
            found.push(SnapshotSummary {
                base: record.base,
                parents: record.parents,
                used_by: self.users(&id)?,
                removed: self.path(&id).join("removed").exists(),
                id,
            });
        }
        Ok(found)
    }

    /// Removes snapshots that nobody needs any more.
    fn collect(&self) -> Result<(), ImageError> {
        let mut gone = Vec::new();
        {
            let _lock = self.lock()?;
            let all = self.list()?;
            for snapshot in &all {
                let stacked_on = all.iter().any(|other| other.parents.contains(&snapshot.id));
                // A snapshot that is being made may stack on it too.
                let being_stacked_on = !snapshot.used_by.is_empty();
                if !snapshot.removed || stacked_on || being_stacked_on {
                    continue;
                }
                self.store
                    .unmark_snapshot(self.owner.owner(), &snapshot.id)?;
                let from = self.path(&snapshot.id);
                let name = random_name().map_err(|e| failed("naming", &from, e))?;
                let to = self.dir.join(format!(".gone-{name}"));
                fs::rename(&from, &to).map_err(|e| failed("removing", &from, e))?;
                gone.push(to);
            }
        }
        let again = !gone.is_empty();
        for path in gone {
            remove_tree(&path)?;
        }
        // What the removed ones stacked on may go now.
        if again { self.collect() } else { Ok(()) }
    }

    /// Removes what a dead process left half-made.
    fn sweep(&self) -> Result<(), ImageError> {
        let entries = fs::read_dir(&self.dir).map_err(|e| failed("reading", &self.dir, e))?;
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if let Some(id) = name.strip_prefix(".new-") {
                remove_tree(&entry.path())?;
                if let Ok(id) = id.parse::<SnapshotId>()
                    && !self.path(&id).exists()
                {
                    self.store.unmark_snapshot(self.owner.owner(), &id)?;
                }
            } else if name.starts_with(".gone-") {
                remove_tree(&entry.path())?;
            }
        }
        self.collect()
    }

    fn image(&self, id: &SnapshotId) -> Result<Image, ImageError> {
        let record = self.record(id)?;
        let mut layers = vec![self.path(id).join("diff")];
        layers.extend(record.parents.iter().map(|p| self.path(p).join("diff")));
        layers.extend(record.base_layers);
        Ok(Image {
            reference: ImageRef::Snapshot(id.clone()),
            digest: record.base_digest,
            layers,
            binds: record.binds,
            config: record.config,
            lease: None,
        })
    }

    fn record(&self, id: &SnapshotId) -> Result<Record, ImageError> {
        read_record(&self.path(id).join("snapshot.json"))?.ok_or_else(|| not_found(id))
    }

    fn users(&self, id: &SnapshotId) -> Result<Vec<SandboxId>, ImageError> {
        let dir = self.path(id).join("users");
        let entries = fs::read_dir(&dir).map_err(|e| failed("reading", &dir, e))?;
        let mut users: Vec<SandboxId> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        users.sort();
        Ok(users)
    }

    fn ids(&self) -> Result<Vec<SnapshotId>, ImageError> {
        let entries = fs::read_dir(&self.dir).map_err(|e| failed("reading", &self.dir, e))?;
        let mut ids: Vec<SnapshotId> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        ids.sort();
        Ok(ids)
    }

    fn path(&self, id: &SnapshotId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    fn lock(&self) -> Result<FileLock, ImageError> {
        let path = self.dir.join(".lock");
        FileLock::wait(
            &path,
            Sharing::Exclusive,
            Instant::now() + LOCK_LIMIT,
            &AtomicBool::new(false),
            || {},
        )
        .map_err(|e| failed("locking", &path, e))
    }
}

fn not_found(id: &SnapshotId) -> ImageError {
    ImageError::NotFound {
        image: ImageRef::Snapshot(id.clone()).to_string(),
        reason: "this owner has no snapshot of that name".into(),
    }
}

fn make_dir(path: &Path) -> Result<(), ImageError> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|e| failed("making", path, e))
}

fn failed(step: &'static str, path: &Path, source: io::Error) -> ImageError {
    ImageError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}
