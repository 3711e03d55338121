//! Earlier contents of edited files, for `undo_edit`: bounded in versions a
//! file, in entries and in bytes, the oldest going first. Knows no disk.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

/// Versions kept of one file.
const VERSIONS_PER_FILE: usize = 20;
/// Versions kept of all files.
const ENTRIES: usize = 1_000;
/// Bytes kept of all files; two of the largest files that can be edited.
const BYTES: usize = 20 << 20;

/// Contents from before edits, oldest first.
#[derive(Debug, Default)]
pub(super) struct History {
    entries: VecDeque<(PathBuf, Vec<u8>)>,
    bytes: usize,
}

impl History {
    /// Remembers what a file held before an edit.
    pub(super) fn push(&mut self, path: &Path, content: Vec<u8>) {
        self.bytes += content.len();
        self.entries.push_back((path.to_owned(), content));
        let versions = self.entries.iter().filter(|(p, _)| p == path).count();
        if versions > VERSIONS_PER_FILE
            && let Some(oldest) = self.entries.iter().position(|(p, _)| p == path)
        {
            self.remove(oldest);
        }
        while self.entries.len() > ENTRIES || self.bytes > BYTES {
            self.remove(0);
        }
    }

    /// Takes the latest remembered content of a file.
    pub(super) fn pop(&mut self, path: &Path) -> Option<Vec<u8>> {
        let latest = self.entries.iter().rposition(|(p, _)| p == path)?;
        self.remove(latest)
    }

    fn remove(&mut self, at: usize) -> Option<Vec<u8>> {
        let (_, content) = self.entries.remove(at)?;
        self.bytes -= content.len();
        Some(content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_version_of_each_file_comes_back_first() {
        let mut history = History::default();
        let (a, b) = (Path::new("/a"), Path::new("/b"));
        history.push(a, b"1".to_vec());
        history.push(b, b"x".to_vec());
        history.push(a, b"2".to_vec());
        assert_eq!(history.pop(a), Some(b"2".to_vec()));
        assert_eq!(history.pop(a), Some(b"1".to_vec()));
        assert_eq!(history.pop(a), None);
        assert_eq!(history.pop(b), Some(b"x".to_vec()));
        assert_eq!(history.bytes, 0);
    }

    #[test]
    fn old_versions_go_when_a_bound_is_reached() {
        let mut history = History::default();
        let path = Path::new("/a");
        for n in 0..=VERSIONS_PER_FILE {
            history.push(path, vec![n as u8]);
        }
        assert_eq!(history.entries.len(), VERSIONS_PER_FILE);
        history.push(Path::new("/big"), vec![0; BYTES]);
        assert_eq!(
            history.pop(path),
            None,
            "pushed out by the bytes of another"
        );
        assert_eq!(history.pop(Path::new("/big")).map(|c| c.len()), Some(BYTES));
    }
}
