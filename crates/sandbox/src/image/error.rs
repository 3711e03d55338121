//! What can go wrong with an image.

use std::io;
use std::path::PathBuf;

/// Failure to get or keep an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It does not exist where it was looked for.
    #[error("image {image} was not found: {reason}")]
    NotFound {
        /// The reference.
        image: String,
        /// Where it was looked for and what was answered.
        reason: String,
    },
    /// The registry asks to slow down.
    #[error("the registry limits pulls of {image}: {reason}")]
    RateLimited {
        /// The reference.
        image: String,
        /// The registry's words.
        reason: String,
    },
    /// The registry wants a login.
    #[error("the registry refused {image}: {reason}")]
    Unauthorized {
        /// The reference.
        image: String,
        /// The registry's words.
        reason: String,
    },
    /// The registry can't be reached.
    #[error("the registry of {image} can't be reached: {reason}")]
    Unreachable {
        /// The reference.
        image: String,
        /// What failed.
        reason: String,
    },
    /// Its content is not what an image must be; nothing of it was kept.
    #[error("image {image} is broken: {reason}")]
    Broken {
        /// The reference.
        image: String,
        /// What is wrong, with the entry concerned.
        reason: String,
    },
    /// A program needed to fetch it is missing or failed.
    #[error("{program}: {reason}")]
    Program {
        /// Which.
        program: String,
        /// Why.
        reason: String,
    },
    /// The file system failed.
    #[error("{step} {path}: {source}", path = .path.display())]
    Io {
        /// What was attempted.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The store can't hold images here.
    #[error("image store {path}: {reason}", path = .path.display())]
    Store {
        /// Its directory.
        path: PathBuf,
        /// Why.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// It would not fit.
    #[error("image {image} is too large: {reason}")]
    TooLarge {
        /// The reference.
        image: String,
        /// Which bound it passes.
        reason: String,
    },
    /// It took too long.
    #[error("image {image} was not ready within {limit:?}")]
    Deadline {
        /// The reference.
        image: String,
        /// The deadline.
        limit: std::time::Duration,
    },
    /// The name is taken.
    #[error("{image} exists already")]
    Exists {
        /// The reference.
        image: String,
    },
    /// It is used by living sandboxes.
    #[error("image {image} is in use by {users}")]
    InUse {
        /// The reference.
        image: String,
        /// Who uses it.
        users: String,
    },
}

impl ImageError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(
            match self {
                Self::NotFound { .. } => "check the name; `skyrl image ls` shows what is here, `skyrl image pull` fetches",
                Self::RateLimited { .. } => "log in to the registry (`skopeo login`), use a mirror, or pull later; `oci-archive:` files need no registry",
                Self::Unauthorized { .. } => "log in to the registry: `skopeo login REGISTRY`",
                Self::Unreachable { .. } => "pull on a node with network access, or carry the image as an `oci-archive:` file",
                Self::Broken { .. } => "fetch or export the image again",
                Self::Program { .. } => "install skopeo or podman, or use an `oci-archive:`, `docker-archive:` or `dir:` image",
                Self::Io { source, .. }
                    if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) =>
                {
                    "the disk is full: `skyrl image rm` frees space, `--state-dir` moves the store"
                }
                Self::Io { .. } => return None,
                Self::Store { hint, .. } => hint,
                Self::TooLarge { .. } => "free space with `skyrl image rm`, raise the quota, or move the store with `--state-dir`",
                Self::Deadline { .. } => "pull it beforehand with `skyrl image pull`; what was fetched of it so far is not kept",
                Self::Exists { .. } => "choose another name, or remove it first",
                Self::InUse { .. } => "remove those sandboxes first: `skyrl sandbox rm`",
            }
            .to_owned(),
        )
    }
}
