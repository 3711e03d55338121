//! Where sandboxes live on this machine's disk, and who owns them.
//!
//! ```text
//! <state>/
//!   bin/                         the guest and the zygote, by content hash
//!   images/                      the image store, shared by all owners
//!   owners/<owner>/
//!     lock                       held (flock) while the owner lives
//!     engine/<engine>/           what an engine keeps for itself
//!     sandboxes/<id>/            all that belongs to one sandbox
//!     snapshots/<id>/            frozen files
//! ```
//!
//! The state directory is node-local: locks and overlays don't work on NFS.
//! An owner whose lock is free is dead, and everything below its directory may
//! be removed; that is how nothing is left behind after `kill -9`.

use crate::engine::EngineKind;
use crate::error::EngineError;
use rustix::fs::{FlockOperation, StatVfsMountFlags};
use skyrl_protocol::{OwnerId, SandboxId, SnapshotId};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The state directory of one user on one machine.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Uses (and makes, mode 0700) a directory.
    ///
    /// # Errors
    /// [`EngineError::State`] when it is on a network file system, belongs to
    /// somebody else or can't be made.
    pub fn open(root: &Path) -> Result<Self, EngineError> {
        let refuse = |reason: String, hint: &str| EngineError::State {
            path: root.to_owned(),
            reason,
            hint: hint.to_owned(),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|e| refuse(e.to_string(), "choose another with --state-dir"))?;
        let root = root
            .canonicalize()
            .map_err(|e| refuse(e.to_string(), "choose another with --state-dir"))?;
        let meta = root.metadata().map_err(|e| refuse(e.to_string(), ""))?;
        if meta.uid() != rustix::process::geteuid().as_raw() {
            return Err(refuse(
                format!("it belongs to user {}", meta.uid()),
                "choose a directory of your own with --state-dir",
            ));
        }
        if let Some(name) = network_file_system(&root) {
            return Err(refuse(
                format!("it is on {name}, where locks and overlay file systems do not work"),
                "choose a node-local directory with --state-dir, such as /tmp or $SLURM_TMPDIR",
            ));
        }
        let mounted = rustix::fs::statvfs(&root).map_err(|e| refuse(e.to_string(), ""))?;
        if mounted.f_flag.contains(StatVfsMountFlags::NOEXEC) {
            return Err(refuse(
                "it is mounted noexec, so programs in it can't run".into(),
                "choose a directory elsewhere with --state-dir",
            ));
        }
        let state = Self { root };
        for part in ["bin", "images", "owners"] {
            make_dir(&state.root.join(part))?;
        }
        Ok(state)
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where injected programs are kept.
    pub fn programs(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// Where the image store is.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Names of the owners that have a directory here.
    pub fn owners(&self) -> io::Result<Vec<OwnerId>> {
        let mut owners: Vec<OwnerId> = std::fs::read_dir(self.root.join("owners"))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        owners.sort();
        Ok(owners)
    }

    /// Directory of an owner, whether it exists or not.
    pub fn owner_dir(&self, owner: &OwnerId) -> OwnerDir {
        OwnerDir {
            root: self.root.join("owners").join(owner.as_str()),
            owner: owner.clone(),
        }
    }

    /// Whether a living process holds an owner's lock.
    pub fn is_alive(&self, owner: &OwnerId) -> bool {
        let Ok(file) = File::open(self.owner_dir(owner).root.join("lock")) else {
            return false;
        };
        // Shared, so that two that ask at the same time don't take each other
        // for the owner.
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Becomes an owner: takes its lock, making its directory if it is new.
    ///
    /// # Errors
    /// [`EngineError::State`] when a living process holds the lock.
    pub fn lock_owner(&self, owner: &OwnerId) -> Result<OwnerLock, EngineError> {
        let dir = self.owner_dir(owner);
        // A dead owner's directory may be removed between making it and
        // locking the file in it: then the locked file is no longer there,
        // and the next turn makes a new one.
        for _ in 0..100 {
            for part in ["engine", "sandboxes", "snapshots"] {
                make_dir(&dir.root.join(part))?;
            }
            let path = dir.root.join("lock");
            let opened = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path);
            let file = match opened {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(EngineError::step("opening", path.display(), error)),
            };
            if !locked_within(&file, LOCK_PATIENCE) {
                return Err(EngineError::State {
                    path,
                    reason: format!("owner {owner} is alive in another process"),
                    hint: "choose another owner name, or end that process".into(),
                });
            }
            let held = file.metadata().map(|m| m.ino()).ok();
            let named = path.metadata().map(|m| m.ino()).ok();
            if held.is_some() && held == named {
                return Ok(OwnerLock {
                    dir: Arc::new(dir),
                    file,
                });
            }
        }
        Err(EngineError::State {
            path: dir.root,
            reason: "its lock file keeps vanishing".into(),
            hint: "is another program cleaning this directory? choose another with --state-dir"
                .into(),
        })
    }
}

/// Where one owner keeps its things.
#[derive(Debug, Clone)]
pub struct OwnerDir {
    root: PathBuf,
    owner: OwnerId,
}

impl OwnerDir {
    /// Whose it is.
    pub fn owner(&self) -> &OwnerId {
        &self.owner
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What an engine keeps for itself.
    pub fn engine(&self, kind: EngineKind) -> PathBuf {
        self.root.join("engine").join(kind.as_str())
    }

    /// Parent of the sandboxes' directories.
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    /// All that belongs to one sandbox.
    pub fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// Frozen files.
    pub fn snapshot(&self, id: &SnapshotId) -> PathBuf {
        self.root.join("snapshots").join(id.as_str())
    }
}

/// Being an owner; dropping it (or dying) gives it up.
#[derive(Debug)]
pub struct OwnerLock {
    dir: Arc<OwnerDir>,
    file: File,
}

impl OwnerLock {
    /// The owner's directory.
    pub fn dir(&self) -> &Arc<OwnerDir> {
        &self.dir
    }

    /// Gives the lock up together with the directory, which must hold nothing
    /// that still needs care.
    ///
    /// # Errors
    /// When a file can't be removed.
    pub fn remove(self) -> io::Result<()> {
        std::fs::remove_dir_all(&self.dir.root)?;
        drop(self.file);
        Ok(())
    }
}

/// How long a lock may be taken before its holder counts as the owner and not
/// as somebody who looks whether the owner lives.
const LOCK_PATIENCE: Duration = Duration::from_millis(200);

fn locked_within(file: &File, patience: Duration) -> bool {
    let started = Instant::now();
    loop {
        if rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        if started.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Makes a directory (mode 0700) with its parents.
pub(crate) fn make_dir(path: &Path) -> Result<(), EngineError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| EngineError::step("making directory", path.display(), e))
}

/// Name of the network file system a path is on, if it is on one.
pub fn network_file_system(path: &Path) -> Option<&'static str> {
    const KNOWN: [(u64, &str); 11] = [
        (0x6969, "NFS"),
        (0xFE53_4D42, "SMB"),
        (0xFF53_4D42, "CIFS"),
        (0x0BD0_0BD0, "Lustre"),
        (0x4750_4653, "GPFS"),
        (0x1983_0326, "BeeGFS"),
        (0x00C3_6400, "Ceph"),
        (0x0102_1997, "9p"),
        (0x5346_414F, "AFS"),
        (0xAAD7_AAEA, "PanFS"),
        (0x7375_7245, "Coda"),
    ];
    let magic = rustix::fs::statfs(path).ok()?.f_type as u64 & 0xFFFF_FFFF;
    KNOWN
        .iter()
        .find(|(known, _)| *known == magic)
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_can_be_locked_once_and_again_after_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let owner: OwnerId = "run-1".parse().unwrap();
        let lock = state.lock_owner(&owner).unwrap();
        let error = state.lock_owner(&owner).unwrap_err();
        assert!(error.to_string().contains("alive"), "{error}");
        drop(lock);
        let lock = state.lock_owner(&owner).unwrap();
        assert_eq!(state.owners().unwrap(), std::slice::from_ref(&owner));
        assert!(state.is_alive(&owner));
        lock.remove().unwrap();
        assert!(state.owners().unwrap().is_empty());
    }
}
