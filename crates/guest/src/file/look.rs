//! What is there, and removing it.

use super::error::{FileError, failed};
use skyrl_protocol::guest::{FileKind, FileList, FileStat};
use std::collections::BinaryHeap;
use std::ffi::OsString;
use std::fs::{self, FileType, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

fn kind(file_type: FileType) -> FileKind {
    if file_type.is_file() {
        FileKind::File
    } else if file_type.is_dir() {
        FileKind::Directory
    } else if file_type.is_symlink() {
        FileKind::Symlink
    } else {
        FileKind::Other
    }
}

fn describe(path: &Path, metadata: &Metadata) -> FileStat {
    let name = path.file_name().unwrap_or(path.as_os_str());
    let target = metadata
        .is_symlink()
        .then(|| fs::read_link(path).ok())
        .flatten();
    FileStat {
        name: name.to_string_lossy().into_owned(),
        kind: kind(metadata.file_type()),
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_ms: metadata.mtime() * 1000 + metadata.mtime_nsec() / 1_000_000,
        target: target.map(|target| target.to_string_lossy().into_owned()),
    }
}

/// Describes a path; links are not followed.
pub fn stat(path: &Path) -> Result<FileStat, FileError> {
    let metadata = fs::symlink_metadata(path).map_err(failed("look at", path))?;
    Ok(describe(path, &metadata))
}

/// The first `limit` entries of a directory by name. Memory depends on the
/// limit, not on the directory.
pub fn list(path: &Path, limit: usize) -> Result<FileList, FileError> {
    let mut names: BinaryHeap<OsString> = BinaryHeap::new();
    let mut truncated = false;
    for entry in fs::read_dir(path).map_err(failed("list", path))? {
        names.push(entry.map_err(failed("list", path))?.file_name());
        if names.len() > limit {
            names.pop();
            truncated = true;
        }
    }
    let entries = names
        .into_sorted_vec()
        .into_iter()
        // What vanished since is not there.
        .filter_map(|name| stat(&path.join(name)).ok())
        .collect();
    Ok(FileList { entries, truncated })
}

/// Removes a file, link or directory, with `recursive` all that is in it.
pub fn remove(path: &Path, recursive: bool) -> Result<(), FileError> {
    let metadata = fs::symlink_metadata(path).map_err(failed("remove", path))?;
    let removed = match (metadata.is_dir(), recursive) {
        (true, true) => {
            if fs::canonicalize(path).is_ok_and(|real| real == Path::new("/")) {
                return Err(FileError::rule(
                    "remove",
                    path,
                    "it is the root of the sandbox",
                ));
            }
            fs::remove_dir_all(path)
        }
        (true, false) => fs::remove_dir(path),
        (false, _) => fs::remove_file(path),
    };
    removed.map_err(failed("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_sorted_and_cut_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["c", "a", "d", "b"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let names = |limit| {
            let found = list(dir.path(), limit).unwrap();
            let names: String = found.entries.into_iter().map(|e| e.name).collect();
            (names, found.truncated)
        };
        assert_eq!(names(10), ("abcd".to_owned(), false));
        assert_eq!(names(4), ("abcd".to_owned(), false));
        assert_eq!(names(2), ("ab".to_owned(), true));
    }

    #[test]
    fn links_are_described_and_removed_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::create_dir(&real).unwrap();
        fs::write(real.join("f"), "x").unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        let found = stat(&link).unwrap();
        assert_eq!(
            (found.kind, found.target.as_deref()),
            (FileKind::Symlink, Some("real"))
        );
        assert!(remove(&real, false).is_err());
        remove(&link, true).unwrap();
        assert!(real.join("f").exists());
        remove(&real, true).unwrap();
        assert!(stat(&real).is_err());
    }
}
