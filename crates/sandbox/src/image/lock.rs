//! Locks between processes: `flock` on small files that may be removed while
//! held. The kernel releases them when the holder dies, however it dies.

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A held lock; dropping it releases it.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
    path: PathBuf,
}

/// How a lock is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    Shared,
    Exclusive,
}

impl FileLock {
    /// Takes a lock if it is free.
    pub(crate) fn try_take(path: &Path, sharing: Sharing) -> io::Result<Option<Self>> {
        let operation = match sharing {
            Sharing::Shared => FlockOperation::NonBlockingLockShared,
            Sharing::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        // Who held the file may have removed it: then our lock is on nothing.
        for _ in 0..1000 {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(path)?;
            match rustix::fs::flock(&file, operation) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let held = file.metadata()?.ino();
            if path.metadata().is_ok_and(|named| named.ino() == held) {
                return Ok(Some(Self {
                    file,
                    path: path.to_owned(),
                }));
            }
        }
        Err(io::Error::other("the lock file keeps vanishing"))
    }

    /// Waits for a lock. `busy` is called once if it is not free at once.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, `Interrupted` once `stop` is set.
    pub(crate) fn wait(
        path: &Path,
        sharing: Sharing,
        deadline: Instant,
        stop: &AtomicBool,
        busy: impl FnOnce(),
    ) -> io::Result<Self> {
        let mut busy = Some(busy);
        let mut pause = Duration::from_millis(2);
        loop {
            if let Some(lock) = Self::try_take(path, sharing)? {
                return Ok(lock);
            }
            if let Some(busy) = busy.take() {
                busy();
            }
            if stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    /// Releases the lock and removes its file.
    pub(crate) fn remove(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)?;
        drop(self.file);
        Ok(())
    }
}
