//! Walks a directory tree in a fixed order within bounds of time, depth and
//! entries. Links are never followed, so there are no loops and no way out of
//! the tree. Knows nothing of patterns.

use rustix::fs::statfs;
use std::ffi::OsString;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Directories below the root that are entered.
const MAX_DEPTH: usize = 100;
/// Entries looked at in all.
const MAX_ENTRIES: u64 = 2_000_000;
/// Entries of one directory; they are held in memory to be sorted.
const MAX_IN_DIRECTORY: usize = 200_000;

/// A file met on the way.
pub(super) struct Found<'w> {
    /// Where it is.
    pub(super) path: PathBuf,
    /// The same relative to the root of the walk.
    pub(super) below: &'w str,
    /// It is a regular file, not a link, device, FIFO or socket.
    pub(super) regular: bool,
}

/// A walk and its bounds.
pub(super) struct Walk {
    deadline: Instant,
    entries_left: u64,
    /// Something was left out because of a bound.
    pub(super) truncated: bool,
}

impl Walk {
    pub(super) fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            entries_left: MAX_ENTRIES,
            truncated: false,
        }
    }

    /// Visits all files below a directory, sorted by path.
    pub(super) fn run(
        &mut self,
        root: &Path,
        visit: &mut dyn FnMut(Found<'_>) -> ControlFlow<()>,
    ) -> std::io::Result<()> {
        // Errors below the root are directories that vanish or can't be
        // read; the root itself must be readable.
        fs::read_dir(root)?;
        let device = fs::metadata(root)?.dev();
        let _ = self.descend(root, "", device, 0, visit);
        Ok(())
    }

    fn descend(
        &mut self,
        dir: &Path,
        below: &str,
        device: u64,
        depth: usize,
        visit: &mut dyn FnMut(Found<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut entries = self.entries(dir)?;
        entries.sort_unstable_by(|a, b| a.order.cmp(&b.order));
        for entry in entries {
            self.check_time()?;
            let path = dir.join(&entry.name);
            let name = entry.name.to_string_lossy();
            let below = if below.is_empty() {
                name.into_owned()
            } else {
                format!("{below}/{name}")
            };
            if !entry.kind.is_dir() {
                visit(Found {
                    path,
                    below: &below,
                    regular: entry.kind.is_file(),
                })?;
                continue;
            }
            if entry.name == ".git" {
                continue;
            }
            if depth == MAX_DEPTH {
                self.truncated = true;
                continue;
            }
            // Files that processes and kernels make up while they are read.
            let Ok(meta) = fs::symlink_metadata(&path) else {
                continue;
            };
            if meta.dev() != device && is_pseudo(&path) {
                continue;
            }
            self.descend(&path, &below, meta.dev(), depth + 1, visit)?;
        }
        ControlFlow::Continue(())
    }

    fn entries(&mut self, dir: &Path) -> ControlFlow<(), Vec<Entry>> {
        let mut entries = Vec::new();
        let Ok(reader) = fs::read_dir(dir) else {
            return ControlFlow::Continue(entries);
        };
        for entry in reader.flatten() {
            if self.entries_left == 0 || entries.len() == MAX_IN_DIRECTORY {
                self.truncated = true;
                break;
            }
            self.entries_left -= 1;
            if entries.len() % 1024 == 1023 {
                self.check_time()?;
            }
            if let Ok(kind) = entry.file_type() {
                entries.push(Entry::new(entry.file_name(), kind));
            }
        }
        ControlFlow::Continue(entries)
    }

    /// Stops the walk when its time is over.
    pub(super) fn check_time(&mut self) -> ControlFlow<()> {
        if Instant::now() >= self.deadline {
            self.truncated = true;
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

struct Entry {
    /// The name; a directory's with its slash, so that sorting by it sorts by
    /// path.
    order: Vec<u8>,
    name: OsString,
    kind: fs::FileType,
}

impl Entry {
    fn new(name: OsString, kind: fs::FileType) -> Self {
        let mut order = name.as_bytes().to_vec();
        if kind.is_dir() {
            order.push(b'/');
        }
        Self { order, name, kind }
    }
}

/// Whether a mount shows kernel state rather than stored files.
fn is_pseudo(path: &Path) -> bool {
    /// proc, sysfs, devpts, cgroup, cgroup2, debugfs, tracefs, securityfs,
    /// bpf, mqueue (`linux/magic.h`).
    const MAGIC: [u32; 10] = [
        0x9fa0,
        0x6265_6572,
        0x1cd1,
        0x0027_e0eb,
        0x6367_7270,
        0x6462_6720,
        0x7472_6163,
        0x7363_6673,
        0xcafe_4a11,
        0x1980_0202,
    ];
    statfs(path).is_ok_and(|fs| MAGIC.contains(&(fs.f_type as u32)))
}
