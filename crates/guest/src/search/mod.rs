//! Searches in the sandbox's files: lines by regular expression, files by
//! name. For images that have no grep or find, and for clients that want
//! bounded, ordered answers. It does not know who asks.

mod walk;

use crate::file;
use globset::{GlobBuilder, GlobMatcher};
use regex::bytes::{Regex, RegexBuilder};
use skyrl_protocol::guest::{FileMatches, FileSearch, TextMatch, TextMatches, TextSearch};
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use walk::{Found, Walk};

/// How long one search may take before it answers with what it has.
pub const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Results returned at most, whatever the request says.
pub const MAX_RESULTS: usize = 10_000;
/// Bytes of lines and paths returned at most.
const MAX_RESULT_BYTES: usize = 8 << 20;
/// Characters of a matching line that are returned.
const MAX_LINE_CHARS: usize = 500;
/// Bytes of a line that are looked at.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Bytes of a file that must be free of NUL for it to count as text.
const SNIFFED_BYTES: usize = 8 << 10;
/// Memory a compiled pattern may take.
const MAX_PATTERN_BYTES: usize = 4 << 20;

/// Why a search could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// The regular expression is malformed or too large.
    #[error("the pattern is no usable regular expression: {0}")]
    Pattern(#[from] regex::Error),
    /// The glob is malformed.
    #[error("the glob can't be used: {0}")]
    Glob(#[from] globset::Error),
    /// A relative path was given.
    #[error("{0:?} is not an absolute path")]
    Relative(String),
    /// The place to search can't be read.
    #[error("can't search {path}: {source}")]
    Io {
        /// The place.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// Looks for lines until `deadline`.
pub fn text(request: &TextSearch, deadline: Instant) -> Result<TextMatches, SearchError> {
    let pattern = RegexBuilder::new(&request.pattern)
        .case_insensitive(request.ignore_case)
        .size_limit(MAX_PATTERN_BYTES)
        .build()?;
    let name = request.glob.as_deref().map(NameMatcher::new).transpose()?;
    let root = absolute(&request.path)?;
    let mut search = LineSearch {
        pattern,
        deadline,
        limit: result_limit(request.limit),
        bytes: 0,
        found: TextMatches::default(),
    };
    if !is_directory(&root)? {
        let source = file::open(&root, 0, None).map_err(|error| SearchError::Io {
            path: request.path.clone(),
            source: error.source,
        })?;
        search.found.files_searched = 1;
        let _ = search.file(source, &request.path);
        return Ok(search.found);
    }
    let mut walk = Walk::new(deadline);
    walk.run(&root, &mut |found: Found<'_>| {
        if !found.regular || name.as_ref().is_some_and(|n| !n.matches(found.below)) {
            return ControlFlow::Continue(());
        }
        // What vanished or may not be read is passed over, as grep -s does.
        let Ok(source) = file::open(&found.path, 0, None) else {
            return ControlFlow::Continue(());
        };
        search.found.files_searched += 1;
        search.file(source, &found.path.to_string_lossy())
    })
    .map_err(|source| SearchError::Io {
        path: request.path.clone(),
        source,
    })?;
    search.found.truncated |= walk.truncated;
    Ok(search.found)
}

/// Looks for files by name until `deadline`.
pub fn files(request: &FileSearch, deadline: Instant) -> Result<FileMatches, SearchError> {
    let name = NameMatcher::new(&request.glob)?;
    let root = absolute(&request.path)?;
    let limit = result_limit(request.limit);
    let mut found = FileMatches::default();
    let mut bytes = 0;
    let mut walk = Walk::new(deadline);
    walk.run(&root, &mut |file: Found<'_>| {
        if !name.matches(file.below) {
            return ControlFlow::Continue(());
        }
        let path = file.path.to_string_lossy().into_owned();
        bytes += path.len();
        if found.paths.len() == limit || bytes > MAX_RESULT_BYTES {
            found.truncated = true;
            return ControlFlow::Break(());
        }
        found.paths.push(path);
        ControlFlow::Continue(())
    })
    .map_err(|source| SearchError::Io {
        path: request.path.clone(),
        source,
    })?;
    found.truncated |= walk.truncated;
    Ok(found)
}

fn result_limit(asked: u32) -> usize {
    usize::try_from(asked).map_or(MAX_RESULTS, |asked| asked.min(MAX_RESULTS))
}

fn absolute(path: &str) -> Result<PathBuf, SearchError> {
    let given = Path::new(path);
    if given.is_absolute() {
        Ok(given.to_owned())
    } else {
        Err(SearchError::Relative(path.to_owned()))
    }
}

fn is_directory(path: &Path) -> Result<bool, SearchError> {
    std::fs::metadata(path)
        .map(|meta| meta.is_dir())
        .map_err(|source| SearchError::Io {
            path: path.to_string_lossy().into_owned(),
            source,
        })
}

/// A glob on a path, or, without a slash, on its last component.
struct NameMatcher {
    glob: GlobMatcher,
    on_name: bool,
}

impl NameMatcher {
    fn new(glob: &str) -> Result<Self, SearchError> {
        let glob = glob.strip_prefix("./").unwrap_or(glob);
        Ok(Self {
            glob: GlobBuilder::new(glob)
                .literal_separator(true)
                .build()?
                .compile_matcher(),
            on_name: !glob.contains('/'),
        })
    }

    fn matches(&self, below: &str) -> bool {
        let subject = match below.rsplit_once('/') {
            Some((_, name)) if self.on_name => name,
            _ => below,
        };
        self.glob.is_match(subject)
    }
}

struct LineSearch {
    pattern: Regex,
    deadline: Instant,
    limit: usize,
    bytes: usize,
    found: TextMatches,
}

impl LineSearch {
    /// Searches one file; breaks when a bound of the whole search is reached.
    fn file(&mut self, source: file::Source, path: &str) -> ControlFlow<()> {
        let mut reader = BufReader::with_capacity(64 << 10, source.reader);
        match reader.fill_buf() {
            Ok(head) if !head[..head.len().min(SNIFFED_BYTES)].contains(&0) => {}
            _ => return ControlFlow::Continue(()),
        }
        let mut line = Vec::new();
        for number in 1.. {
            if number % 256 == 0 && Instant::now() >= self.deadline {
                return self.stop();
            }
            line.clear();
            match read_line(&mut reader, &mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            let text = trim_line_end(&line);
            if self.pattern.is_match(text) {
                self.add(path, number, text)?;
            }
        }
        ControlFlow::Continue(())
    }

    fn add(&mut self, path: &str, line: u64, text: &[u8]) -> ControlFlow<()> {
        // No character takes more than four bytes.
        let head = &text[..text.len().min(MAX_LINE_CHARS * 4)];
        let text: String = String::from_utf8_lossy(head)
            .chars()
            .take(MAX_LINE_CHARS)
            .collect();
        self.bytes += path.len() + text.len();
        if self.found.matches.len() == self.limit || self.bytes > MAX_RESULT_BYTES {
            return self.stop();
        }
        self.found.matches.push(TextMatch {
            path: path.to_owned(),
            line,
            text,
        });
        ControlFlow::Continue(())
    }

    fn stop(&mut self) -> ControlFlow<()> {
        self.found.truncated = true;
        ControlFlow::Break(())
    }
}

/// Reads a line, keeping at most [`MAX_LINE_BYTES`] of it. Answers 0 at the
/// end of the file.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    let read = reader
        .by_ref()
        .take(MAX_LINE_BYTES)
        .read_until(b'\n', line)?;
    if read as u64 == MAX_LINE_BYTES && line.last() != Some(&b'\n') {
        reader.skip_until(b'\n')?;
    }
    Ok(read)
}

fn trim_line_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests;
