//! What git prints, read. Pure.

use skyrl_protocol::guest::{GitChange, GitChangeKind};

/// Longest line of a reference or hash worth reading.
const MAX_WORD: usize = 4_096;

/// The records of `-z` output.
fn records(output: &[u8]) -> impl Iterator<Item = String> {
    output
        .split(|&b| b == 0)
        .filter(|record| !record.is_empty())
        .map(|record| String::from_utf8_lossy(record).into_owned())
}

/// Output of `diff --name-status -z`.
pub(super) fn name_status(output: &[u8]) -> Vec<GitChange> {
    let mut changes = Vec::new();
    let mut records = records(output);
    while let (Some(status), Some(path)) = (records.next(), records.next()) {
        let (kind, path) = match status.as_bytes()[0] {
            b'A' => (GitChangeKind::Added, Some(path)),
            b'D' => (GitChangeKind::Deleted, Some(path)),
            // Renames and copies name the old path first.
            b'R' => (GitChangeKind::Moved, records.next()),
            b'C' => (GitChangeKind::Added, records.next()),
            _ => (GitChangeKind::Updated, Some(path)),
        };
        if let Some(path) = path {
            changes.push(GitChange { path, status: kind });
        }
    }
    changes
}

/// Output of `ls-files --others -z`. A directory, which is another
/// repository, is left out.
pub(super) fn untracked(output: &[u8]) -> Vec<GitChange> {
    records(output)
        .filter(|path| !path.ends_with('/'))
        .map(|path| GitChange {
            path,
            status: GitChangeKind::Added,
        })
        .collect()
}

/// One line of output, without its end.
pub(super) fn line(output: &[u8]) -> Option<String> {
    let line = output.split(|&b| b == b'\n').next()?;
    (!line.is_empty() && line.len() <= MAX_WORD).then(|| String::from_utf8_lossy(line).into_owned())
}

/// What the references around a branch point to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Refs {
    /// Commit of `origin/<branch>`.
    pub(super) upstream: Option<String>,
    /// Commit of origin's default branch.
    pub(super) origin_default: Option<String>,
    /// Commit of local `main`, else `master`.
    pub(super) local_default: Option<String>,
}

/// `--format` that [`Refs::parse`] reads.
pub(super) const REFS_FORMAT: &str = "--format=%(refname) %(objectname)";

impl Refs {
    /// References to ask `for-each-ref` about; they match as prefixes too.
    pub(super) fn wanted(branch: Option<&str>) -> Vec<String> {
        let mut wanted: Vec<String> = [
            "refs/remotes/origin/HEAD",
            "refs/remotes/origin/main",
            "refs/remotes/origin/master",
            "refs/heads/main",
            "refs/heads/master",
        ]
        .map(str::to_owned)
        .into();
        wanted.extend(branch.map(|branch| format!("refs/remotes/origin/{branch}")));
        wanted
    }

    /// Output of `for-each-ref` with [`REFS_FORMAT`].
    pub(super) fn parse(output: &[u8], branch: Option<&str>) -> Self {
        let text = String::from_utf8_lossy(output);
        let find = |name: &str| {
            text.lines().find_map(|line| match line.split_once(' ') {
                Some((found, commit)) if found == name => Some(commit.to_owned()),
                _ => None,
            })
        };
        Self {
            upstream: branch.and_then(|branch| find(&format!("refs/remotes/origin/{branch}"))),
            origin_default: find("refs/remotes/origin/HEAD")
                .or_else(|| find("refs/remotes/origin/main"))
                .or_else(|| find("refs/remotes/origin/master")),
            local_default: find("refs/heads/main").or_else(|| find("refs/heads/master")),
        }
    }
}

/// A commit of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// Full id.
    pub sha: String,
    /// Abbreviated id.
    pub short_sha: String,
    /// First line of the message.
    pub subject: String,
    /// Name of the author.
    pub author: String,
    /// When it was written, ISO 8601.
    pub timestamp: String,
}

/// `--format` that [`commits`] reads, to be used with `-z`.
pub(super) const COMMIT_FORMAT: &str = "--format=%H%x00%h%x00%s%x00%an%x00%aI";

/// Output of `log -z` with [`COMMIT_FORMAT`].
pub(super) fn commits(output: &[u8]) -> Vec<Commit> {
    let text = String::from_utf8_lossy(output);
    // Fields may be empty, so nothing is filtered here.
    let fields: Vec<&str> = text.split('\0').collect();
    fields
        .chunks_exact(5)
        .map(|commit| Commit {
            sha: commit[0].to_owned(),
            short_sha: commit[1].to_owned(),
            subject: commit[2].to_owned(),
            author: commit[3].to_owned(),
            timestamp: commit[4].to_owned(),
        })
        .collect()
}

/// Sorts by path and keeps the first of several changes of one path.
pub(super) fn sorted(mut changes: Vec<GitChange>) -> Vec<GitChange> {
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    changes.dedup_by(|later, first| later.path == first.path);
    changes
}

/// A text with `\n` line ends and without the last of them.
pub(super) fn normalized(text: &str) -> String {
    let mut text = text.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &str, status: GitChangeKind) -> GitChange {
        GitChange {
            path: path.to_owned(),
            status,
        }
    }

    #[test]
    fn every_status_letter_is_known() {
        assert_eq!(
            name_status(b"M\0a\0A\0b c\0D\0d\0R087\0old\0new\0C100\0src\0copy\0T\0link\0U\0x"),
            [
                change("a", GitChangeKind::Updated),
                change("b c", GitChangeKind::Added),
                change("d", GitChangeKind::Deleted),
                change("new", GitChangeKind::Moved),
                change("copy", GitChangeKind::Added),
                change("link", GitChangeKind::Updated),
                change("x", GitChangeKind::Updated),
            ]
        );
        assert_eq!(name_status(b"M"), []);
    }

    #[test]
    fn nested_repositories_are_not_untracked_files() {
        assert_eq!(
            untracked(b"nest/\0n\0s/t\0"),
            [
                change("n", GitChangeKind::Added),
                change("s/t", GitChangeKind::Added)
            ]
        );
    }

    #[test]
    fn references_are_told_apart_by_their_whole_name() {
        let output =
            b"refs/heads/main 1\nrefs/remotes/origin/HEAD 2\nrefs/remotes/origin/feat/x 3\n";
        let refs = Refs::parse(output, Some("feat"));
        assert_eq!(
            refs,
            Refs {
                upstream: None,
                origin_default: Some("2".to_owned()),
                local_default: Some("1".to_owned()),
            }
        );
        assert_eq!(
            Refs::parse(output, Some("feat/x")).upstream.as_deref(),
            Some("3")
        );
    }

    #[test]
    fn commits_may_have_empty_fields() {
        let list = commits(b"aa\0a\0subject\0me\0on Monday\0bb\0b\0\0\0later\0");
        assert_eq!(list.len(), 2);
        assert_eq!((list[1].sha.as_str(), list[1].subject.as_str()), ("bb", ""));
    }
}
