//! `/file/archive`: a directory as `tar.gz`, or as a patch against what its
//! remote has.

use super::files::{attachment, percent_encode};
use super::git::refusal;
use super::validate::Problems;
use super::{Answer, failure};
use crate::Guest;
use crate::git::{self, Base};
use crate::http::{Request, Response};
use flate2::Compression;
use flate2::write::GzEncoder;
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use serde_json::json;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Left out unless the client says otherwise.
const DEFAULT_EXCLUDES: [&str; 13] = [
    ".git/",
    "node_modules/",
    ".venv/",
    "venv/",
    "__pycache__/",
    ".mypy_cache/",
    ".pytest_cache/",
    ".ruff_cache/",
    "dist/",
    "build/",
    ".next/",
    "target/",
    "*.pyc",
];

/// Directories below the archived one that are entered.
const MAX_DEPTH: usize = 200;

/// Globs a client may add.
const MAX_EXCLUDES: usize = 100;

/// Name of the list of contents inside the archive.
const MANIFEST: &str = "archive_manifest.json";

/// `GET /file/archive`.
pub(super) fn archive(guest: &Guest, request: &Request<'_>) -> Answer {
    let query = &request.query;
    let mut problems = Problems::default();
    let path = problems.required(query, "path");
    let format = problems.word(query, "format", "literal_error", &["git-delta", "tar.gz"]);
    let path = Path::new(problems.check(path)?);
    if !path.is_absolute() {
        return Err(failure(400, "Path must be absolute"));
    }
    match fs::metadata(path) {
        Err(_) => return Err(failure(404, "Directory not found")),
        Ok(meta) if !meta.is_dir() => return Err(failure(400, "Path is not a directory")),
        Ok(_) => {}
    }
    let mut excludes: Vec<String> = query.all("exclude").map(str::to_owned).collect();
    if excludes.len() > MAX_EXCLUDES {
        return Err(failure(
            400,
            &format!("More than {MAX_EXCLUDES} globs to exclude"),
        ));
    }
    if query.get("use_default_excludes").is_none() || query.flag("use_default_excludes") {
        excludes.splice(0..0, DEFAULT_EXCLUDES.map(str::to_owned));
    }
    if format == Some("tar.gz") {
        tarball(path, excludes)
    } else {
        delta(guest, path, query.get("base_ref"), &excludes)
    }
}

fn base_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || "root".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// A patch that turns the base into what is on disk.
fn delta(guest: &Guest, path: &Path, base_ref: Option<&str>, excludes: &[String]) -> Answer {
    let base = base_ref.map_or(Base::Published, Base::Given);
    let delta = git::patch(&guest.processes, path, base, excludes).map_err(refusal)?;
    let name = format!("{}.patch", base_name(path));
    Ok(
        Response::bytes(200, "text/x-patch; charset=utf-8", delta.patch)
            .with_header("content-disposition", attachment(&name))
            .with_header(
                "x-archive-branch",
                percent_encode(&delta.branch.unwrap_or_default()),
            )
            .with_header("x-archive-head-commit", delta.head.unwrap_or_default())
            .with_header("x-archive-repo-root", percent_encode(&delta.root)),
    )
}

/// A compressed tar stream, made while it is sent.
fn tarball(path: &Path, excludes: Vec<String>) -> Answer {
    let filter = Excludes::new(&excludes)
        .map_err(|error| failure(400, &format!("A glob to exclude can't be used: {error}")))?;
    let source = path.to_owned();
    let name = base_name(path);
    let file_name = format!("{name}.tar.gz");
    let body = Box::new(move |out: &mut dyn Write| {
        // The archive is made on the spot; what a client pays for is the
        // time to get it.
        let gzip = GzEncoder::new(
            io::BufWriter::with_capacity(64 << 10, out),
            Compression::fast(),
        );
        let mut writer = TreeWriter {
            tar: tar::Builder::new(gzip),
            filter,
            files: 0,
            bytes: 0,
        };
        writer.tar.follow_symlinks(false);
        writer.add_directory(&source, Path::new(&name), Path::new(""), 0)?;
        writer.add_manifest(&name, &excludes)?;
        writer.tar.into_inner()?.finish()?.flush()
    });
    Ok(Response::stream(200, "application/gzip", body)
        .with_header("content-disposition", attachment(&file_name)))
}

/// Globs matched against a name and against the path below the root; one that
/// ends in `/` matches directories only.
struct Excludes {
    all: GlobSet,
    directories: GlobSet,
}

impl Excludes {
    fn new(globs: &[String]) -> Result<Self, globset::Error> {
        let mut all = GlobSetBuilder::new();
        let mut directories = GlobSetBuilder::new();
        for glob in globs {
            let (set, glob) = match glob.strip_suffix('/') {
                Some(directory) => (&mut directories, directory),
                None => (&mut all, glob.as_str()),
            };
            set.add(GlobBuilder::new(glob).literal_separator(true).build()?);
        }
        Ok(Self {
            all: all.build()?,
            directories: directories.build()?,
        })
    }

    fn leaves_out(&self, below: &Path, is_directory: bool) -> bool {
        let name = below.file_name().map(Path::new).unwrap_or(below);
        let hit = |set: &GlobSet| set.is_match(name) || set.is_match(below);
        hit(&self.all) || (is_directory && hit(&self.directories))
    }
}

struct TreeWriter<W: Write> {
    tar: tar::Builder<W>,
    filter: Excludes,
    files: u64,
    bytes: u64,
}

impl<W: Write> TreeWriter<W> {
    /// `inside` is the directory's name in the archive, `below` relative to
    /// the root of the archive.
    fn add_directory(
        &mut self,
        directory: &Path,
        inside: &Path,
        below: &Path,
        depth: usize,
    ) -> io::Result<()> {
        self.tar.append_dir(inside, directory)?;
        let mut entries: Vec<(PathBuf, fs::FileType)> = fs::read_dir(directory)?
            .flatten()
            .filter_map(|entry| Some((entry.file_name().into(), entry.file_type().ok()?)))
            .collect();
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, kind) in entries {
            let (path, below) = (directory.join(&name), below.join(&name));
            if self.filter.leaves_out(&below, kind.is_dir()) {
                continue;
            }
            let inside = inside.join(&name);
            if kind.is_dir() && depth < MAX_DEPTH {
                // A directory that vanished or can't be read is left out.
                if fs::read_dir(&path).is_ok() {
                    self.add_directory(&path, &inside, &below, depth + 1)?;
                }
            } else if kind.is_symlink() {
                self.tar.append_path_with_name(&path, &inside)?;
            } else if kind.is_file() {
                self.add_file(&path, &inside)?;
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, inside: &Path) -> io::Result<()> {
        let Ok(file) = File::open(path) else {
            return Ok(());
        };
        let meta = file.metadata()?;
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&meta);
        // A file that shrinks while it is read is filled up with zeros, so
        // that the stream keeps to its header.
        let content = io::Read::take(io::Read::chain(file, io::repeat(0)), meta.len());
        self.tar.append_data(&mut header, inside, content)?;
        self.files += 1;
        self.bytes += meta.len();
        Ok(())
    }

    fn add_manifest(&mut self, name: &str, excludes: &[String]) -> io::Result<()> {
        let manifest = json!({
            "excludes": excludes,
            "file_count": self.files,
            "format": "tar.gz",
            "source": name,
            "total_bytes": self.bytes,
        });
        let text = serde_json::to_vec_pretty(&manifest)?;
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        let inside = Path::new(name).join(MANIFEST);
        self.tar.append_data(&mut header, inside, text.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excludes_match_names_paths_and_directories_only_where_said() {
        let globs = ["build/", "*.pyc", "docs/*.txt"].map(str::to_owned);
        let excludes = Excludes::new(&globs).expect("globs");
        let out = |path: &str, dir| excludes.leaves_out(Path::new(path), dir);
        assert!(out("build", true) && out("a/build", true) && !out("build", false));
        assert!(out("x.pyc", false) && out("a/b/x.pyc", false));
        assert!(out("docs/a.txt", false) && !out("a/docs/a.txt", false));
    }
}
