//! Failures with what was being done and to which path.

use std::io;
use std::path::{Path, PathBuf};

/// Why something could not be done to a file.
#[derive(Debug, thiserror::Error)]
#[error("can't {doing} {}: {source}", .path.display())]
pub struct FileError {
    /// What was being done, as an infinitive.
    pub doing: &'static str,
    /// The file concerned.
    pub path: PathBuf,
    /// Why it failed.
    pub source: io::Error,
}

impl FileError {
    pub(super) fn new(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self {
            doing,
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// The file or request breaks a rule; which.
    pub(super) fn rule(doing: &'static str, path: &Path, rule: impl Into<String>) -> Self {
        let source = io::Error::new(io::ErrorKind::InvalidData, rule.into());
        Self::new(doing, path, source)
    }
}

/// For `map_err`.
pub(super) fn failed<E: Into<io::Error>>(
    doing: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> FileError {
    move |source| FileError::new(doing, path, source)
}
