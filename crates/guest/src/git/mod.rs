//! Questions about a git work tree, answered by the image's own git: status,
//! changes against a base, contents of a file then and now, history, and a
//! patch of everything. Nothing here writes to the repository. It does not
//! know who asks.

mod parse;
mod run;

pub use parse::Commit;
pub use run::GitError;

use crate::process::Processes;
use parse::Refs;
use run::Git;
use skyrl_protocol::guest::{GitChange, GitStatus};
use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest file whose contents are compared, in bytes.
pub const MAX_DIFF_FILE: u64 = 1 << 20;

/// Directories looked into for nested repositories.
const MAX_NESTED: usize = 200;

/// Whether a rename is one change or two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Renames {
    /// One change of kind `MOVED`.
    Detected,
    /// A deletion and an addition.
    Split,
}

/// What a work tree is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base<'r> {
    /// The commit that a client's words name.
    Given(&'r str),
    /// The last commit; nothing before the first.
    Head,
    /// The state that the work on this branch started from, as far as it can
    /// be told.
    Detected,
    /// The latest state that the remote has too; nothing without a remote.
    Published,
}

/// A file's text at the base and now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileDiff {
    /// At the base; empty when it was not there.
    pub original: String,
    /// Now; empty when it is gone.
    pub modified: String,
}

/// A patch of a work tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Unified diff.
    pub patch: Vec<u8>,
    /// Top of the work tree.
    pub root: String,
    /// Branch, unless detached.
    pub branch: Option<String>,
    /// Commit of HEAD, where there is one.
    pub head: Option<String>,
}

/// Branch, commit and changes against HEAD of the work tree that holds `path`.
pub fn status(processes: &Processes, path: &Path) -> Result<GitStatus, GitError> {
    let git = Git::new(processes, path);
    require_repository(&git, path)?;
    let base = find_base(&git, Base::Head)?;
    Ok(GitStatus {
        branch: branch(&git)?,
        head: head(&git)?,
        changes: parse::sorted(changes_since(&git, &base, Renames::Detected)?),
    })
}

/// Changes below `path` since a base, with those of repositories one level
/// below. Empty outside of repositories.
pub fn changes(
    processes: &Processes,
    path: &Path,
    base: Base<'_>,
) -> Result<Vec<GitChange>, GitError> {
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let git = Git::new(processes, path);
    let mut all = Vec::new();
    if toplevel(&git)?.is_some() {
        let base = find_base(&git, base)?;
        all = changes_since(&git, &base, Renames::Split)?;
    }
    for nested in nested_repositories(path) {
        let inner = git.at(&path.join(&nested));
        // A nested repository that can't answer hides nothing of the others.
        let Ok(base) = find_base(&inner, base) else {
            continue;
        };
        let below = changes_since(&inner, &base, Renames::Split)?;
        all.extend(below.into_iter().map(|change| GitChange {
            path: format!("{nested}/{}", change.path),
            ..change
        }));
    }
    Ok(parse::sorted(all))
}

/// A file at the base and on disk; `None` outside of repositories.
pub fn file_diff(
    processes: &Processes,
    path: &Path,
    base: Base<'_>,
) -> Result<Option<FileDiff>, GitError> {
    let Some((git, name)) = beside(processes, path)? else {
        return Ok(None);
    };
    let base = find_base(&git, base)?;
    let original = text_at(&git, &base, &name)?;
    let modified = match read_text(path) {
        Ok(text) => text,
        Err(GitError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            if original.is_none() {
                return Err(GitError::NoFile(path.to_string_lossy().into_owned()));
            }
            String::new()
        }
        Err(error) => return Err(error),
    };
    Ok(Some(FileDiff {
        original: original.unwrap_or_default(),
        modified,
    }))
}

/// A file before and after a commit; `None` outside of repositories.
pub fn file_diff_of_commit(
    processes: &Processes,
    path: &Path,
    commit: &str,
) -> Result<Option<FileDiff>, GitError> {
    let Some((git, name)) = beside(processes, path)? else {
        return Ok(None);
    };
    let commit = resolve(&git, commit)?;
    let parent = parent(&git, &commit)?;
    Ok(Some(FileDiff {
        original: text_at(&git, &parent, &name)?.unwrap_or_default(),
        modified: text_at(&git, &commit, &name)?.unwrap_or_default(),
    }))
}

/// The newest commits reachable from HEAD, and whether there are more. Empty
/// outside of repositories and before the first commit.
pub fn commits(
    processes: &Processes,
    path: &Path,
    limit: usize,
) -> Result<(Vec<Commit>, bool), GitError> {
    let git = Git::new(processes, path);
    if !path.is_dir() || toplevel(&git)?.is_none() || head(&git)?.is_none() {
        return Ok((Vec::new(), false));
    }
    let count = format!("--max-count={}", limit + 1);
    let output = git.ask(&["log", "-z", &count, parse::COMMIT_FORMAT, "HEAD"])?;
    let mut list = parse::commits(&output);
    let more = list.len() > limit;
    list.truncate(limit);
    Ok((list, more))
}

/// What a commit changed against its first parent, by paths from the top of
/// the work tree. Empty outside of repositories.
pub fn changes_of_commit(
    processes: &Processes,
    path: &Path,
    commit: &str,
) -> Result<Vec<GitChange>, GitError> {
    let git = Git::new(processes, path);
    if !path.is_dir() || toplevel(&git)?.is_none() {
        return Ok(Vec::new());
    }
    let commit = resolve(&git, commit)?;
    let parent = parent(&git, &commit)?;
    let output = git.ask(&[
        "diff-tree",
        "-r",
        "-z",
        "--no-renames",
        "--name-status",
        &parent,
        &commit,
    ])?;
    Ok(parse::sorted(parse::name_status(&output)))
}

/// A patch from a base to what is on disk below `path`, new files included,
/// binary files too, but for what matches a glob of `exclude`.
pub fn patch(
    processes: &Processes,
    path: &Path,
    base: Base<'_>,
    exclude: &[String],
) -> Result<Patch, GitError> {
    let git = Git::new(processes, path);
    let root = require_repository(&git, path)?;
    let head = head(&git)?;
    let base = find_base(&git, base)?;
    let branch = branch(&git)?;
    let git_path = |name: &str| -> Result<PathBuf, GitError> {
        let output = git.ask(&["rev-parse", "--git-path", name])?;
        Ok(path.join(parse::line(&output).unwrap_or_default()))
    };
    let (index, objects) = (git_path("index")?, git_path("objects")?);
    // Files that git does not know yet only enter a patch through an index; a
    // scratch one leaves the repository alone.
    let scratch = Scratch::make(&index)?;
    copy_index(&index, &scratch.path.join("index")).map_err(|source| GitError::Io {
        what: format!("can't copy {}", index.display()),
        source,
    })?;
    let inside = |name: &str| scratch.path.join(name).to_string_lossy().into_owned();
    let git = git
        .with("GIT_INDEX_FILE", inside("index"))
        .with("GIT_OBJECT_DIRECTORY", inside("objects"))
        .with("GIT_ALTERNATE_OBJECT_DIRECTORIES", absolute(&objects));
    let git = git.with("GIT_LITERAL_PATHSPECS", "0");
    let mut paths = vec!["--".to_owned(), ".".to_owned()];
    paths.extend(exclude.iter().map(|glob| exclusion(glob)));
    let add = ["add", "--all"].map(str::to_owned);
    git.ask(&[&add[..], &paths].concat())?;
    let diff = [
        "diff",
        "--cached",
        "--binary",
        "--no-ext-diff",
        "--no-textconv",
        "--no-renames",
        &base,
    ];
    let diff = diff.map(str::to_owned);
    let patch = git.ask(&[&diff[..], &paths].concat())?;
    Ok(Patch {
        patch,
        root,
        branch,
        head,
    })
}

/// Copies an index with its time: git looks into files that changed no earlier
/// than their index, even when size and time of the file are as recorded.
fn copy_index(from: &Path, to: &Path) -> io::Result<()> {
    let modified = match fs::metadata(from) {
        Ok(meta) => meta.modified()?,
        // Nothing was ever added.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    fs::copy(from, to)?;
    let copy = fs::OpenOptions::new().write(true).open(to)?;
    copy.set_modified(modified)
}

/// A pathspec that leaves out what matches a glob at any depth; one that ends
/// in `/` names directories.
fn exclusion(glob: &str) -> String {
    let below = if glob.ends_with('/') { "**" } else { "" };
    format!(":(exclude,glob)**/{glob}{below}")
}

/// A private directory for an index and objects; removed when dropped.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// In the usual places, else beside the repository's index: an image may
    /// have no `/tmp`.
    fn make(index: &Path) -> Result<Self, GitError> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!(".git-patch-{}-{serial}", std::process::id());
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        let places = ["/tmp", "/var/tmp", "/dev/shm"].map(Path::new);
        for place in places.into_iter().chain(index.parent()) {
            let path = place.join(&name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    let scratch = Self { path };
                    fs::create_dir(scratch.path.join("objects")).map_err(|source| {
                        GitError::Io {
                            what: "can't make a scratch directory for objects".to_owned(),
                            source,
                        }
                    })?;
                    return Ok(scratch);
                }
                Err(error) => last = error,
            }
        }
        Err(GitError::Io {
            what: "no directory for a scratch index (/tmp, /var/tmp, /dev/shm, .git)".to_owned(),
            source: last,
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing can be done about what will not go.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_owned())
        .to_string_lossy()
        .into_owned()
}

/// Top of the work tree; `None` outside of one.
fn toplevel(git: &Git<'_>) -> Result<Option<String>, GitError> {
    let reply = git.run(&["rev-parse", "--show-toplevel"])?;
    Ok(reply.success.then(|| parse::line(&reply.stdout)).flatten())
}

fn require_repository(git: &Git<'_>, path: &Path) -> Result<String, GitError> {
    toplevel(git)?.ok_or_else(|| GitError::NotARepository(path.to_string_lossy().into_owned()))
}

/// Git in the directory of a file, and the file's name there.
fn beside<'p>(
    processes: &'p Processes,
    path: &Path,
) -> Result<Option<(Git<'p>, String)>, GitError> {
    // A deleted file's directory may be gone as well.
    let Some(directory) = path.ancestors().skip(1).find(|a| a.is_dir()) else {
        return Ok(None);
    };
    let git = Git::new(processes, directory);
    let name = path.strip_prefix(directory).unwrap_or(path);
    let name = format!("./{}", name.to_string_lossy());
    Ok(toplevel(&git)?.map(|_| (git, name)))
}

/// Commit of HEAD; `None` before the first commit.
fn head(git: &Git<'_>) -> Result<Option<String>, GitError> {
    let reply = git.run(&["rev-parse", "--verify", "--quiet", "HEAD^{commit}"])?;
    Ok(reply.success.then(|| parse::line(&reply.stdout)).flatten())
}

/// Name of the current branch; `None` when HEAD is detached.
fn branch(git: &Git<'_>) -> Result<Option<String>, GitError> {
    let reply = git.run(&["symbolic-ref", "--quiet", "--short", "HEAD"])?;
    Ok(reply.success.then(|| parse::line(&reply.stdout)).flatten())
}

/// The id of the tree without entries, in the repository's hash.
fn empty_tree(git: &Git<'_>) -> Result<String, GitError> {
    let output = git.ask(&["hash-object", "-t", "tree", "--stdin"])?;
    Ok(parse::line(&output).unwrap_or_default())
}

/// The commit that a client's words name. They can't be taken as an option:
/// with this suffix no option is left.
fn resolve(git: &Git<'_>, reference: &str) -> Result<String, GitError> {
    let wanted = format!("{reference}^{{commit}}");
    let output = git.ask(&["rev-parse", "--verify", &wanted])?;
    Ok(parse::line(&output).unwrap_or_default())
}

/// First parent, or the empty tree.
fn parent(git: &Git<'_>, commit: &str) -> Result<String, GitError> {
    let wanted = format!("{commit}^1");
    let reply = git.run(&["rev-parse", "--verify", "--quiet", &wanted])?;
    match reply.success.then(|| parse::line(&reply.stdout)).flatten() {
        Some(parent) => Ok(parent),
        None => empty_tree(git),
    }
}

/// The commit or tree to compare with.
fn find_base(git: &Git<'_>, base: Base<'_>) -> Result<String, GitError> {
    if let Base::Given(reference) = base {
        return resolve(git, reference);
    }
    let Some(head) = head(git)? else {
        return empty_tree(git);
    };
    if base == Base::Head {
        return Ok(head);
    }
    let branch = branch(git)?;
    let mut arguments = vec!["for-each-ref".to_owned(), parse::REFS_FORMAT.to_owned()];
    arguments.extend(Refs::wanted(branch.as_deref()));
    let refs = Refs::parse(&git.ask(&arguments)?, branch.as_deref());
    if let Some(upstream) = refs.upstream
        && (upstream != head || !is_clean(git)?)
    {
        return Ok(upstream);
    }
    if let Some(tip) = refs.origin_default {
        return Ok(merge_base(git, &head, &tip)?.unwrap_or(tip));
    }
    if base == Base::Published {
        return empty_tree(git);
    }
    if let Some(tip) = refs.local_default
        && let Some(fork) = merge_base(git, &head, &tip)?
    {
        return Ok(fork);
    }
    Ok(head)
}

fn is_clean(git: &Git<'_>) -> Result<bool, GitError> {
    let output = git.ask(&["status", "--porcelain", "-z", "--untracked-files=normal"])?;
    Ok(output.is_empty())
}

fn merge_base(git: &Git<'_>, one: &str, other: &str) -> Result<Option<String>, GitError> {
    let reply = git.run(&["merge-base", one, other])?;
    Ok(reply.success.then(|| parse::line(&reply.stdout)).flatten())
}

/// Changes of the work tree below git's directory since a commit or tree.
fn changes_since(git: &Git<'_>, base: &str, renames: Renames) -> Result<Vec<GitChange>, GitError> {
    let renames = match renames {
        Renames::Detected => "--find-renames",
        Renames::Split => "--no-renames",
    };
    let tracked = git.ask(&[
        "diff",
        "--name-status",
        "-z",
        "--no-ext-diff",
        "--relative",
        renames,
        base,
        "--",
        ".",
    ])?;
    let others = git.ask(&[
        "ls-files",
        "--others",
        "--exclude-standard",
        "-z",
        "--",
        ".",
    ])?;
    let mut changes = parse::name_status(&tracked);
    changes.extend(parse::untracked(&others));
    Ok(changes)
}

/// Names of the directories right below one that are repositories.
fn nested_repositories(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| entry.file_name() != ".git" && entry.path().join(".git").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .take(MAX_NESTED)
        .collect();
    names.sort();
    names
}

/// A file's text in a commit or tree; `None` when it has no such file.
fn text_at(git: &Git<'_>, tree: &str, name: &str) -> Result<Option<String>, GitError> {
    let object = format!("{tree}:{name}");
    let kind = git.run(&["cat-file", "-t", &object])?;
    if !kind.success || parse::line(&kind.stdout).as_deref() != Some("blob") {
        return Ok(None);
    }
    let size = git.ask(&["cat-file", "-s", &object])?;
    let size = parse::line(&size).and_then(|size| size.parse().ok());
    check_size(size.unwrap_or(0))?;
    let bytes = git.ask(&["cat-file", "blob", &object])?;
    Ok(Some(text_of(bytes)))
}

fn check_size(size: u64) -> Result<(), GitError> {
    if size > MAX_DIFF_FILE {
        return Err(GitError::TooLarge {
            size,
            limit: MAX_DIFF_FILE,
        });
    }
    Ok(())
}

/// Text for a diff; what is no text shows as nothing.
fn text_of(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).map_or_else(|_| String::new(), |text| parse::normalized(&text))
}

fn read_text(path: &Path) -> Result<String, GitError> {
    let io = |source| GitError::Io {
        what: format!("can't read {}", path.display()),
        source,
    };
    let meta = fs::symlink_metadata(path).map_err(io)?;
    if meta.is_symlink() {
        // What git stores of a link is where it points.
        let target = fs::read_link(path).map_err(io)?;
        return Ok(target.to_string_lossy().into_owned());
    }
    if !meta.is_file() {
        return Err(GitError::NotAFile(path.to_string_lossy().into_owned()));
    }
    check_size(meta.len())?;
    let file = fs::File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(MAX_DIFF_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    check_size(bytes.len() as u64)?;
    Ok(text_of(bytes))
}
