//! The image store: node-local, keyed by digest, shared by all owners of one
//! user, in any number of processes.
//!
//! Nothing is used before it is complete: layers and records are made under
//! temporary names and renamed. Who makes something holds a lock that the
//! kernel releases when it dies; what the dead left is removed at the next
//! [`ImageStore::open`].

mod evict;
mod install;
mod patch;
mod present;
mod usage;

pub use evict::Evicted;
pub use usage::ImageSummary;

use super::error::ImageError;
use super::image::Image;
use super::layout::{Format, Layout, Marks, VERSION, io_error};
use super::lock::{FileLock, Sharing};
use super::progress::{Progress, PullUpdate};
use super::records;
use super::reference::{ImageRef, PullPolicy};
use super::temp;
use rustix::fs::XattrFlags;
use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long an image may take to become present, unless set otherwise.
const DEFAULT_PULL_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Keeps images. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

/// The store as seen by its blocking work.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) layout: Layout,
    pub(super) marks: Marks,
    pub(super) quota: Option<u64>,
    pub(super) pull_limit: Duration,
    /// Requests of this process for the same image wait here, without a
    /// thread each; only one of them does the work.
    turns: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// What work in progress consults and tells.
pub(in crate::image) struct Work<'a> {
    pub(in crate::image) stop: &'a AtomicBool,
    pub(in crate::image) deadline: Instant,
    /// How long was allowed, for messages.
    pub(in crate::image) limit: Duration,
    pub(in crate::image) tell: &'a (dyn Fn(PullUpdate) + Sync),
}

impl ImageStore {
    /// Opens (and makes) a store below a directory, and removes what dead
    /// processes left half-done in it. `quota_bytes` bounds its size on the
    /// disk, see [`ImageStore::evict`].
    ///
    /// # Errors
    /// [`ImageError::Store`] when it was made by another user, by another
    /// version, or with other privileges than the caller has.
    pub fn open(root: &Path, quota_bytes: Option<u64>) -> Result<Self, ImageError> {
        let layout = Layout {
            root: root.to_owned(),
        };
        for part in Layout::DIRECTORIES {
            let path = layout.dir(part);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|e| io_error("making", &path, e))?;
        }
        let root = root
            .canonicalize()
            .map_err(|e| io_error("opening", root, e))?;
        let layout = Layout { root };
        let marks = check_format(&layout)?;
        let tmp = layout.dir("tmp");
        temp::sweep(&tmp).map_err(|e| io_error("cleaning", &tmp, e))?;
        let store = Self {
            inner: Arc::new(Inner {
                layout,
                marks,
                quota: quota_bytes,
                pull_limit: DEFAULT_PULL_LIMIT,
                turns: Mutex::default(),
            }),
        };
        store.inner.remove_stale()?;
        Ok(store)
    }

    /// The same store with another bound on the time an image may take.
    #[must_use]
    pub fn with_pull_limit(self, limit: Duration) -> Self {
        let inner = &self.inner;
        Self {
            inner: Arc::new(Inner {
                layout: inner.layout.clone(),
                marks: inner.marks,
                quota: inner.quota,
                pull_limit: limit,
                turns: Mutex::default(),
            }),
        }
    }

    /// Whether overlays of this store's layers are to be mounted with
    /// `userxattr`.
    pub fn user_xattr(&self) -> bool {
        self.inner.marks == Marks::User
    }

    /// Attribute that marks an opaque directory in layers of this store.
    pub(crate) fn opaque_mark(&self) -> &'static std::ffi::CStr {
        self.inner.marks.opaque()
    }

    /// Makes an image present. Any number of callers, in any number of
    /// processes, cause one fetch. The image stays while the returned value
    /// lives; see [`ImageStore::mark_used`] for what must outlive it. Dropping
    /// the future ends the fetch and its programs.
    ///
    /// # Errors
    /// Typed by what the user can do about it; nothing of a failed image is
    /// kept, except complete layers.
    pub async fn ensure(
        &self,
        image: &ImageRef,
        policy: PullPolicy,
        progress: &dyn Progress,
    ) -> Result<Image, ImageError> {
        if let ImageRef::Snapshot(id) = image {
            return Err(ImageError::NotFound {
                image: image.to_string(),
                reason: format!("snapshot {id} belongs to its owner, not to the image store"),
            });
        }
        let key = present::key(image);
        if policy != PullPolicy::Always
            && let Some(found) = self
                .blocking(image, |inner, image| inner.present(&image))
                .await?
        {
            return Ok(found);
        }
        let turn = self.turn(&key);
        let _held = match turn.try_lock() {
            Ok(held) => held,
            Err(_) => {
                progress.update(&PullUpdate::Waiting);
                turn.lock().await
            }
        };
        let (tell, mut told) = mpsc::channel(16);
        let stop = Arc::new(AtomicBool::new(false));
        let _stop_when_dropped = StopOnDrop(Arc::clone(&stop));
        let limit = self.inner.pull_limit;
        let work = self.blocking(image, move |inner, image| {
            inner.fetch(
                &image,
                policy,
                &Work {
                    stop: &stop,
                    deadline: Instant::now() + limit,
                    limit,
                    // Who listens slowly misses some.
                    tell: &|update| drop(tell.try_send(update)),
                },
            )
        });
        tokio::pin!(work);
        loop {
            tokio::select! {
                made = &mut work => break made,
                Some(update) = told.recv() => progress.update(&update),
            }
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        image: &ImageRef,
        work: impl FnOnce(&Inner, ImageRef) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let inner = Arc::clone(&self.inner);
        let image = image.clone();
        match tokio::task::spawn_blocking(move || work(&inner, image)).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => Err(ImageError::Program {
                    program: "image store".into(),
                    reason: error.to_string(),
                }),
            },
        }
    }

    fn turn(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self
            .inner
            .turns
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(key).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(key.to_owned(), Arc::downgrade(&turn));
        turn
    }
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads who made the store, or becomes its maker.
fn check_format(layout: &Layout) -> Result<Marks, ImageError> {
    let refuse = |reason: String, hint: &str| ImageError::Store {
        path: layout.root.clone(),
        reason,
        hint: hint.to_owned(),
    };
    let uid = rustix::process::geteuid().as_raw();
    let lock = layout.dir("locks/format");
    let _lock = FileLock::wait(
        &lock,
        Sharing::Exclusive,
        Instant::now() + Duration::from_secs(30),
        &AtomicBool::new(false),
        || {},
    )
    .map_err(|e| io_error("locking", &lock, e))?;
    let here = Format {
        version: VERSION,
        uid,
        marks: possible_marks(layout)?,
    };
    let Some(format) = records::read::<Format>(&layout.format())? else {
        records::write(&layout.format(), &here)?;
        return Ok(here.marks);
    };
    if format.version != VERSION {
        return Err(refuse(
            format!(
                "it has version {}, this program writes {VERSION}",
                format.version
            ),
            "choose another directory with --state-dir, or remove this one",
        ));
    }
    if format.uid != uid {
        return Err(refuse(
            format!("it was made by user {}, not by {uid}", format.uid),
            "choose a directory of your own with --state-dir",
        ));
    }
    if format.marks != here.marks {
        let who = |marks| match marks {
            Marks::Trusted => "with the privileges of root",
            Marks::User => "without privileges",
        };
        return Err(refuse(
            format!(
                "its layers were written {}, but this process runs {}",
                who(format.marks),
                who(here.marks)
            ),
            "use one state directory for each: --state-dir",
        ));
    }
    Ok(format.marks)
}

/// What this process can do: only root of the machine's own user namespace
/// can set `trusted` attributes.
fn possible_marks(layout: &Layout) -> Result<Marks, ImageError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(Marks::User);
    }
    let tmp = layout.dir("tmp");
    let probe = temp::TempDir::new(&tmp).map_err(|e| io_error("making", &tmp, e))?;
    let set = rustix::fs::setxattr(
        probe.path(),
        Marks::Trusted.opaque(),
        b"y",
        XattrFlags::empty(),
    );
    Ok(if set.is_ok() {
        Marks::Trusted
    } else {
        Marks::User
    })
}

/// Removes a file that may be gone already.
pub(super) fn remove_file(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io_error("removing", path, error))
        }
        _ => Ok(()),
    }
}
