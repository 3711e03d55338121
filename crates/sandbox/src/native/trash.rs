//! Removing large directories without making anybody wait: they are moved
//! aside at once and deleted by one thread.

use crate::error::EngineError;
use crate::state::make_dir;
use crate::tree::remove_tree;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

/// Where things go to be deleted.
#[derive(Debug)]
pub(crate) struct Trash {
    dir: PathBuf,
    next: AtomicU64,
    /// Names only, one for each directory on the disk: bounded by those.
    queue: Option<Sender<PathBuf>>,
    thread: Option<JoinHandle<()>>,
}

impl Trash {
    /// Opens it, and deletes what an earlier process left in it.
    pub(crate) fn open(dir: PathBuf) -> Result<Self, EngineError> {
        make_dir(&dir)?;
        let (queue, work) = channel::<PathBuf>();
        let thread = std::thread::Builder::new()
            .name("skyrl-trash".into())
            .spawn(move || {
                for path in work {
                    if let Err(error) = remove_tree(&path) {
                        tracing::warn!(%error, "leaving a directory to the next clean-up");
                    }
                }
            })
            .map_err(|e| EngineError::step("starting", "the clean-up thread", e))?;
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let _ = queue.send(entry.path());
        }
        Ok(Self {
            next: AtomicU64::new(0),
            queue: Some(queue),
            thread: Some(thread),
            dir,
        })
    }

    /// Takes a directory on the same file system; what is not there is gone
    /// already.
    pub(crate) fn take(&self, path: &Path) -> Result<(), EngineError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let aside = self
            .dir
            .join(format!("{name}.{}-{number}", std::process::id()));
        match std::fs::rename(path, &aside) {
            Ok(()) => {
                if let Some(queue) = &self.queue {
                    let _ = queue.send(aside);
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(EngineError::step("removing", path.display(), error)),
        }
    }

    /// Waits until everything is deleted.
    pub(crate) fn finish(&mut self) {
        self.queue.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
