//! Small JSON files that are either complete or absent.

use super::error::ImageError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes a record: a temporary file beside it (hidden by a leading dot), then
/// a rename. With a crash of the machine either the old or the new content is
/// found.
pub(crate) fn write(path: &Path, value: &impl Serialize) -> Result<(), ImageError> {
    let fail = |step, source| ImageError::Io {
        step,
        path: path.to_owned(),
        source,
    };
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Err(fail("writing", io::ErrorKind::InvalidInput.into()));
    };
    let text = serde_json::to_vec_pretty(value).map_err(|e| fail("writing", e.into()))?;
    let temporary = dir.join(format!(
        ".{name}.{}",
        random_name().map_err(|e| fail("naming", e))?
    ));
    let written = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&temporary, path))
        .and_then(|()| File::open(dir)?.sync_all());
    written.map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        fail("writing", e)
    })
}

/// Reads a record. One that can't be understood counts as absent: everything
/// recorded here can be made again.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, ImageError> {
    match std::fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text)
            .inspect_err(
                |error| tracing::warn!(path = %path.display(), %error, "ignoring a damaged record"),
            )
            .ok()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(source) => Err(ImageError::Io {
            step: "reading",
            path: path.to_owned(),
            source,
        }),
    }
}

/// A name nobody else uses.
pub(crate) fn random_name() -> io::Result<String> {
    let number = getrandom::u64().map_err(io::Error::other)?;
    Ok(format!("{number:016x}"))
}
