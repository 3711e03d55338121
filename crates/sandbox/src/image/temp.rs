//! Directories for work in progress. Each has a lock held by its maker; one
//! whose lock is free belongs to nobody alive and is removed by the next
//! sweep.

use super::lock::{FileLock, Sharing};
use super::records::random_name;
use crate::tree::remove_tree;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// A private directory, removed when dropped.
#[derive(Debug)]
pub(crate) struct TempDir {
    path: PathBuf,
    lock: Option<FileLock>,
}

impl TempDir {
    /// Makes one below `parent`.
    pub(crate) fn new(parent: &Path) -> io::Result<Self> {
        for _ in 0..100 {
            let name = random_name()?;
            // The lock comes first, so that no sweep sees the directory
            // without it.
            let Some(lock) =
                FileLock::try_take(&parent.join(format!("{name}.lock")), Sharing::Exclusive)?
            else {
                continue;
            };
            let path = parent.join(name);
            DirBuilder::new().mode(0o700).create(&path)?;
            return Ok(Self {
                path,
                lock: Some(lock),
            });
        }
        Err(io::Error::other("no free temporary name"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!(%error, "a temporary directory stays until the next start");
            return;
        }
        if let Some(lock) = self.lock.take() {
            let _ = lock.remove();
        }
    }
}

/// Removes what dead processes left below `parent`; returns how many
/// directories that were.
pub(crate) fn sweep(parent: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(parent)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else {
            continue;
        };
        let lock_path = match name.strip_suffix(".lock") {
            Some(_) => parent.join(name),
            None => parent.join(format!("{name}.lock")),
        };
        let Some(lock) = FileLock::try_take(&lock_path, Sharing::Exclusive)? else {
            continue;
        };
        let dir = parent.join(name.strip_suffix(".lock").unwrap_or(name));
        if dir.exists() {
            removed += 1;
        }
        remove_tree(&dir).map_err(io::Error::other)?;
        lock.remove()?;
    }
    Ok(removed)
}
