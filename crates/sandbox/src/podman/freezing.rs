//! Freezing sandboxes' files as snapshots, and giving them up.
//!
//! The bookkeeping is [`Snapshots`]'s, for all engines. What is added here is
//! for plain users with further ids: their sandboxes leave files that this
//! process can't read or remove, so those are copied and removed from within
//! the engine's namespace, before the bookkeeping comes to them.
//!
//! [`Snapshots`]: crate::snapshot::Snapshots

use super::layout::Layout;
use super::lifecycle::Podman;
use super::record::Record;
use super::roots::{Roots, blocking};
use crate::engine::SnapshotMode;
use crate::error::EngineError;
use crate::image::{Image, ImageRef};
use crate::rootfs::Rootfs;
use crate::snapshot::{MAX_CHAIN, SnapshotSummary, Source};
use crate::state::make_dir;
use crate::tree::CopyOptions;
use skyrl_protocol::{SandboxId, SnapshotId};
use std::path::PathBuf;
use std::sync::Arc;

/// Where a sandbox's files are, by what they are.
enum Frozen {
    Upper(PathBuf),
    FuseUpper(PathBuf),
    Root(PathBuf),
}

impl Podman {
    pub(super) async fn acquire(
        &self,
        snapshot: &SnapshotId,
        id: &SandboxId,
    ) -> Result<Image, EngineError> {
        let _books = self.books.lock().await;
        let (snapshots, snapshot, id) = (self.snapshots.clone(), snapshot.clone(), id.clone());
        blocking("resolving a snapshot", move || {
            Ok(snapshots.acquire(&snapshot, &id)?)
        })
        .await
    }

    /// A sandbox no longer uses what it was started from.
    pub(super) async fn release(&self, id: &SandboxId) -> Result<(), EngineError> {
        let _books = self.books.lock().await;
        self.clear(|all| doomed(all, None, Some(id))).await?;
        let (snapshots, id) = (self.snapshots.clone(), id.clone());
        blocking("releasing a snapshot", move || Ok(snapshots.release(&id)?)).await
    }

    pub(super) async fn remove_snapshot(&self, snapshot: &SnapshotId) -> Result<(), EngineError> {
        let _books = self.books.lock().await;
        self.clear(|all| doomed(all, Some(snapshot), None)).await?;
        let (snapshots, snapshot) = (self.snapshots.clone(), snapshot.clone());
        blocking("removing a snapshot", move || {
            Ok(snapshots.remove(&snapshot)?)
        })
        .await
    }

    /// Removes the files of snapshots about to go that this process can't.
    async fn clear(
        &self,
        choose: impl FnOnce(&[SnapshotSummary]) -> Vec<SnapshotId>,
    ) -> Result<(), EngineError> {
        if !self.roots.foreign_files() {
            return Ok(());
        }
        let snapshots = self.snapshots.clone();
        let all = blocking("listing snapshots", move || Ok(snapshots.list()?)).await?;
        for id in choose(&all) {
            let files = self.layout.snapshots().join(id.as_str()).join("diff");
            self.roots.remove(&files).await?;
        }
        Ok(())
    }

    pub(super) async fn snapshot(
        self: &Arc<Self>,
        id: &SandboxId,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        let live = self.get(id)?;
        live.settled().await?;
        let record = live.record();
        match mode {
            SnapshotMode::Copy => {
                let paused = self.is_paused(&live);
                if !paused {
                    self.pause(id).await?;
                }
                let frozen = self.freeze(id, &record, snapshot, mode).await;
                if !paused {
                    self.resume(id).await?;
                }
                frozen
            }
            SnapshotMode::Consume => {
                self.kill(id, &record).await?;
                self.roots.unmount(&record.rootfs).await?;
                self.freeze(id, &record, snapshot, mode).await?;
                self.dismantle(id, Some(record)).await?;
                self.live().remove(id);
                Ok(())
            }
        }
    }

    async fn freeze(
        &self,
        id: &SandboxId,
        record: &Record,
        snapshot: &SnapshotId,
        mode: SnapshotMode,
    ) -> Result<(), EngineError> {
        let written = record.rootfs.written();
        let (frozen, mode) = if !self.roots.foreign_files() {
            let frozen = match record.rootfs.source(&written) {
                Source::Upper(_) => Frozen::Upper(written),
                Source::FuseUpper(_) => Frozen::FuseUpper(written),
                Source::Root(_) => Frozen::Root(written),
            };
            (frozen, mode)
        } else {
            self.take(id, record, mode).await?
        };
        let (snapshots, snapshot, image) = (
            self.snapshots.clone(),
            snapshot.clone(),
            record.image.clone(),
        );
        blocking("freezing files", move || {
            let source = match &frozen {
                Frozen::Upper(path) => Source::Upper(path),
                Frozen::FuseUpper(path) => Source::FuseUpper(path),
                Frozen::Root(path) => Source::Root(path),
            };
            Ok(snapshots.freeze(&snapshot, &image, source, mode, CopyOptions::default())?)
        })
        .await
    }

    /// Brings files of further ids into a state that can be moved away as a
    /// whole.
    async fn take(
        &self,
        id: &SandboxId,
        record: &Record,
        mode: SnapshotMode,
    ) -> Result<(Frozen, SnapshotMode), EngineError> {
        let rootfs = &record.rootfs;
        let copy = self.layout.sandbox(id).join("frozen");
        self.roots.remove(&copy).await?;
        let chain = match &record.image.reference {
            ImageRef::Snapshot(parent) => {
                let snapshots = self.snapshots.clone();
                let all = blocking("listing snapshots", move || Ok(snapshots.list()?)).await?;
                all.iter()
                    .find(|one| one.id == *parent)
                    .map_or(0, |one| one.parents.len() + 1)
            }
            _ => 0,
        };
        let layered = !matches!(rootfs.source(&rootfs.written()), Source::Root(_));
        if layered && chain >= MAX_CHAIN {
            // Merged with all it stacks on, as the sandbox sees it. Its upper
            // directory is in use, so it is stacked as one more layer.
            let mut lowers = vec![rootfs.upper()];
            lowers.extend(rootfs.lowers.iter().cloned());
            let merged = self.layout.sandbox(id).join("merged");
            self.roots.remove(&merged).await?;
            make_dir(&merged)?;
            let view = Rootfs::plan(rootfs.method, lowers, &merged);
            view.create()?;
            self.roots.mount(&view).await?;
            let copied = self.roots.copy(&view.root(), &copy).await;
            self.roots.unmount(&view).await?;
            self.roots.remove(&merged).await?;
            copied?;
            return Ok((Frozen::Root(copy), SnapshotMode::Consume));
        }
        let written = match mode {
            SnapshotMode::Consume => rootfs.written(),
            SnapshotMode::Copy => {
                self.roots.copy(&rootfs.written(), &copy).await?;
                copy
            }
        };
        let frozen = if layered {
            Frozen::Upper(written)
        } else {
            Frozen::Root(written)
        };
        Ok((frozen, SnapshotMode::Consume))
    }
}

/// Snapshots whose files go when one is removed, or a sandbox no longer uses
/// its own.
fn doomed(
    all: &[SnapshotSummary],
    removed: Option<&SnapshotId>,
    released: Option<&SandboxId>,
) -> Vec<SnapshotId> {
    let mut going: Vec<SnapshotId> = Vec::new();
    loop {
        let next = all.iter().find(|snapshot| {
            let unnamed = snapshot.removed || Some(&snapshot.id) == removed;
            let used = snapshot.used_by.iter().any(|user| Some(user) != released);
            let stacked_on = all
                .iter()
                .any(|other| !going.contains(&other.id) && other.parents.contains(&snapshot.id));
            unnamed && !used && !stacked_on && !going.contains(&snapshot.id)
        });
        match next {
            Some(snapshot) => going.push(snapshot.id.clone()),
            None => return going,
        }
    }
}

/// Removes what an earlier process was making or removing when it died.
pub(super) async fn clear_half_removed(layout: &Layout, roots: &Roots) -> Result<(), EngineError> {
    if !roots.foreign_files() {
        return Ok(());
    }
    let Ok(entries) = std::fs::read_dir(layout.snapshots()) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(".new-") || name.starts_with(".gone-") {
            roots.remove(&entry.path().join("diff")).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str, parents: &[&str], users: &[&str], removed: bool) -> SnapshotSummary {
        SnapshotSummary {
            id: id.parse().unwrap(),
            base: ImageRef::Host,
            parents: parents.iter().map(|p| p.parse().unwrap()).collect(),
            used_by: users.iter().map(|u| u.parse().unwrap()).collect(),
            removed,
        }
    }

    fn names(ids: Vec<SnapshotId>) -> Vec<String> {
        ids.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_snapshot_goes_only_when_nobody_needs_it() {
        let all = [
            snapshot("a", &[], &[], false),
            snapshot("used", &[], &["box"], false),
            snapshot("base", &[], &[], false),
            snapshot("child", &["base"], &[], false),
        ];
        let removing = |id: &str| names(doomed(&all, Some(&id.parse().unwrap()), None));
        assert_eq!(removing("a"), ["a"]);
        assert!(removing("used").is_empty());
        assert!(removing("base").is_empty());
    }

    #[test]
    fn the_last_user_takes_a_whole_line_of_unnamed_snapshots_along() {
        let all = [
            snapshot("base", &[], &[], true),
            snapshot("child", &["base"], &["box"], true),
        ];
        assert_eq!(
            names(doomed(&all, None, Some(&"box".parse().unwrap()))),
            ["child", "base"]
        );
        assert!(doomed(&all, None, Some(&"other".parse().unwrap())).is_empty());
    }
}
