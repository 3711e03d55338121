//! The editor that agents use: view, create, str_replace, insert, undo_edit.
//!
//! It answers every request with text for the agent, refusals included, and
//! with the contents before and after for those who make a diff of it. Paths
//! are the sandbox's own. It does not know in which dialect it was asked.

mod disk;
mod history;
mod render;
mod text;

use history::History;
use skyrl_protocol::guest::{EditRequest, EditResult};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use text::Document;

/// Largest file that can be viewed or edited, in bytes.
pub const MAX_FILE_BYTES: u64 = 10 << 20;

/// Entries of a directory view, and entries looked at for it.
const MAX_LISTED: usize = 2_000;
const MAX_SCANNED: usize = 100_000;

/// The editor with its undo history; one serves all clients of a guest.
#[derive(Debug, Default)]
pub struct Editor {
    /// Also held while a file is read and rewritten, so that two edits of one
    /// file don't lose each other's change.
    history: Mutex<History>,
}

/// Why an operation was refused; the text is what the agent sees.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(
        "Invalid `path` parameter: {path}. The path should be an absolute path, starting with `/`.{suggestion}"
    )]
    Relative { path: String, suggestion: String },
    #[error(
        "Invalid `path` parameter: {0}. The path {0} does not exist. Please provide a valid path."
    )]
    Missing(String),
    #[error(
        "Invalid `path` parameter: {0}. The path {0} is a directory; only `view` works on directories."
    )]
    Directory(String),
    #[error(
        "Invalid `path` parameter: {0}. {0} is a device, a FIFO or a socket, not a regular file."
    )]
    Special(String),
    #[error(
        "Invalid `path` parameter: {0}. File already exists at: {0}. Cannot overwrite files using command `create`."
    )]
    Exists(String),
    #[error(
        "The file {path} is too large ({size} bytes); the editor works on files of up to {MAX_FILE_BYTES} bytes. Use a command such as sed or python on it."
    )]
    TooLarge { path: String, size: u64 },
    #[error("The file {0} is binary; the editor works on text files only.")]
    Binary(String),
    #[error(
        "The file {path} is stored as ISO-8859-1, which has no character {character:?}; nothing was written. Convert it to UTF-8 first, for example with `iconv -f latin1 -t utf-8`."
    )]
    NotEncodable { path: String, character: char },
    #[error("Invalid `view_range` parameter: [{0}, {1}]. {2}")]
    Range(i64, i64, String),
    #[error(
        "Invalid `insert_line` parameter: {given}. It should be within the range of allowed values: [0, {lines}]"
    )]
    InsertLine { given: i64, lines: usize },
    #[error(
        "Invalid `old_str` parameter: it is empty, which names no place in {0}. Use `insert` to add text."
    )]
    EmptyOldText(String),
    #[error(
        "Invalid `new_str` parameter: it is the same as `old_str`. No replacement was performed."
    )]
    SameText,
    #[error("No replacement was performed, old_str `{old}` did not appear verbatim in {path}.")]
    NotFound { old: String, path: String },
    #[error(
        "No replacement was performed. Multiple occurrences of old_str `{old}` in lines {lines:?}. Please ensure it is unique."
    )]
    NotUnique { old: String, lines: Vec<usize> },
    #[error("There is no edit of {0} to undo.")]
    NothingToUndo(String),
    #[error("Could not {verb} {path}: {source}.")]
    Io {
        verb: &'static str,
        path: String,
        source: io::Error,
    },
}

/// What an operation did.
struct Done {
    output: String,
    existed: bool,
    old: Option<String>,
    new: Option<String>,
}

impl Done {
    fn shown(output: String) -> Self {
        Self {
            output,
            existed: true,
            old: None,
            new: None,
        }
    }
}

impl Editor {
    /// An editor with an empty history.
    pub fn new() -> Self {
        Self::default()
    }

    /// Carries an operation out. `cwd` only serves to suggest the absolute
    /// path that a relative one may have meant.
    pub fn apply(&self, request: &EditRequest, cwd: &Path) -> EditResult {
        let done = match request {
            EditRequest::View { path, view_range } => {
                absolute(path, cwd).and_then(|at| view(at, path, *view_range))
            }
            EditRequest::Create { path, file_text } => {
                absolute(path, cwd).and_then(|at| create(at, path, file_text))
            }
            EditRequest::StrReplace {
                path,
                old_str,
                new_str,
            } => absolute(path, cwd).and_then(|at| {
                self.rewrite(at, path, |document| {
                    str_replace(document, path, old_str, new_str.as_deref().unwrap_or(""))
                })
            }),
            EditRequest::Insert {
                path,
                insert_line,
                new_str,
            } => absolute(path, cwd).and_then(|at| {
                self.rewrite(at, path, |document| {
                    insert(document, path, *insert_line, new_str)
                })
            }),
            EditRequest::UndoEdit { path } => {
                absolute(path, cwd).and_then(|at| self.undo(at, path))
            }
        };
        match done {
            Ok(done) => EditResult {
                output: done.output,
                failed: false,
                existed: done.existed,
                old_content: done.old,
                new_content: done.new,
            },
            Err(refusal) => EditResult {
                output: format!("ERROR:\n{refusal}"),
                failed: true,
                existed: fs::symlink_metadata(requested_path(request)).is_ok(),
                old_content: None,
                new_content: None,
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a file, computes its new text and the answer, writes it back.
    fn rewrite(
        &self,
        at: &Path,
        path: &str,
        change: impl FnOnce(&Document) -> Result<(String, String), Refusal>,
    ) -> Result<Done, Refusal> {
        let mut history = self.lock();
        let real = resolve(at, path)?;
        let before = read_bytes(&real, path)?;
        let document = decode(before.clone(), path)?;
        let (text, output) = change(&document)?;
        let edited = document.with_text(text);
        write_back(&edited, &real, path)?;
        history.push(&real, before);
        Ok(Done {
            output,
            existed: true,
            old: Some(document.text),
            new: Some(edited.text),
        })
    }

    fn undo(&self, at: &Path, path: &str) -> Result<Done, Refusal> {
        let mut history = self.lock();
        let real = resolve(at, path)?;
        let now = decode(read_bytes(&real, path)?, path)?;
        let before = history
            .pop(&real)
            .ok_or_else(|| Refusal::NothingToUndo(path.to_owned()))?;
        if let Err(error) = disk::replace(&real, &before) {
            history.push(&real, before);
            return Err(io_refusal("write", path, error));
        }
        let restored = decode(before, path)?;
        Ok(Done {
            output: render::undone(path, &restored.text),
            existed: true,
            old: Some(now.text),
            new: Some(restored.text),
        })
    }
}

fn requested_path(request: &EditRequest) -> &str {
    match request {
        EditRequest::View { path, .. }
        | EditRequest::Create { path, .. }
        | EditRequest::StrReplace { path, .. }
        | EditRequest::Insert { path, .. }
        | EditRequest::UndoEdit { path } => path,
    }
}

fn absolute<'p>(path: &'p str, cwd: &Path) -> Result<&'p Path, Refusal> {
    let given = Path::new(path);
    if given.is_absolute() {
        return Ok(given);
    }
    let candidate = cwd.join(given);
    let suggestion = if !path.is_empty() && candidate.exists() {
        format!(" Maybe you meant {}?", candidate.display())
    } else {
        String::new()
    };
    Err(Refusal::Relative {
        path: path.to_owned(),
        suggestion,
    })
}

/// Follows links, so that a file keeps one history and a link stays a link.
fn resolve(at: &Path, path: &str) -> Result<PathBuf, Refusal> {
    fs::canonicalize(at).map_err(|error| io_refusal("open", path, error))
}

fn io_refusal(verb: &'static str, path: &str, source: io::Error) -> Refusal {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => Refusal::Missing(path),
        _ => Refusal::Io { verb, path, source },
    }
}

fn read_bytes(at: &Path, path: &str) -> Result<Vec<u8>, Refusal> {
    match disk::read(at, MAX_FILE_BYTES) {
        Ok(disk::Opened::File(bytes)) => Ok(bytes),
        Ok(disk::Opened::Directory) => Err(Refusal::Directory(path.to_owned())),
        Ok(disk::Opened::Special) => Err(Refusal::Special(path.to_owned())),
        Ok(disk::Opened::TooLarge(size)) => Err(Refusal::TooLarge {
            path: path.to_owned(),
            size,
        }),
        Err(error) => Err(io_refusal("read", path, error)),
    }
}

fn decode(bytes: Vec<u8>, path: &str) -> Result<Document, Refusal> {
    Document::decode(bytes).map_err(|text::Binary| Refusal::Binary(path.to_owned()))
}

fn encode(document: &Document, path: &str) -> Result<Vec<u8>, Refusal> {
    let bytes = document
        .encode()
        .map_err(|character| Refusal::NotEncodable {
            path: path.to_owned(),
            character,
        })?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Refusal::TooLarge {
            path: path.to_owned(),
            size: bytes.len() as u64,
        });
    }
    Ok(bytes)
}

fn write_back(document: &Document, at: &Path, path: &str) -> Result<(), Refusal> {
    let bytes = encode(document, path)?;
    disk::replace(at, &bytes).map_err(|error| io_refusal("write", path, error))
}

fn view(at: &Path, path: &str, range: Option<(i64, i64)>) -> Result<Done, Refusal> {
    let bytes = match (read_bytes(at, path), range) {
        (Err(Refusal::Directory(_)), None) => {
            return list(at, path).map(Done::shown);
        }
        (Err(Refusal::Directory(_)), Some((first, last))) => {
            let rule =
                "The `view_range` parameter is not allowed when `path` points to a directory.";
            return Err(Refusal::Range(first, last, rule.to_owned()));
        }
        (bytes, _) => bytes?,
    };
    let text = decode(bytes, path)?.text;
    let Some((first, last)) = range else {
        return Ok(Done::shown(render::view(path, &text, 1)));
    };
    let (range, note) = check_range(first, last, line_count(&text).max(1))?;
    let lines: Vec<&str> = text
        .split('\n')
        .skip(range.0 - 1)
        .take(range.1 + 1 - range.0)
        .collect();
    let shown = render::view(path, &lines.join("\n"), range.0);
    Ok(Done::shown(note + &shown))
}

/// Lines as people count them: a final line end begins no further line.
fn line_count(text: &str) -> usize {
    text.lines().count()
}

/// First and last line to show, and a note when the file is shorter.
fn check_range(first: i64, last: i64, lines: usize) -> Result<((usize, usize), String), Refusal> {
    let refuse = |rule: String| Err(Refusal::Range(first, last, rule));
    let start = match usize::try_from(first) {
        Ok(start) if (1..=lines).contains(&start) => start,
        _ => {
            return refuse(format!(
                "Its first element `{first}` should be within the range of lines of the file: [1, {lines}]."
            ));
        }
    };
    if last == -1 {
        return Ok(((start, lines), String::new()));
    }
    match usize::try_from(last) {
        Ok(end) if end > lines => Ok((
            (start, lines),
            format!("NOTE: The file has {lines} lines; showing up to the last one.\n"),
        )),
        Ok(end) if end >= start => Ok(((start, end), String::new())),
        _ => refuse(format!(
            "Its second element `{last}` should be greater than or equal to the first element `{first}`."
        )),
    }
}

/// A directory two levels deep.
fn list(at: &Path, path: &str) -> Result<String, Refusal> {
    let shown = if path.ends_with('/') {
        path.to_owned()
    } else {
        format!("{path}/")
    };
    let mut listing = Listing {
        entries: vec![shown.clone()],
        more: false,
        budget: MAX_SCANNED,
    };
    let hidden = listing
        .add(at, &shown, 1)
        .map_err(|error| io_refusal("list", path, error))?;
    Ok(render::listing(
        path,
        &listing.entries,
        listing.more,
        hidden,
    ))
}

struct Listing {
    entries: Vec<String>,
    more: bool,
    budget: usize,
}

impl Listing {
    /// Adds what `dir` holds, shown below `prefix`; answers how many hidden
    /// entries it has.
    fn add(&mut self, dir: &Path, prefix: &str, level: u8) -> io::Result<usize> {
        let mut hidden = 0;
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let Some(left) = self.budget.checked_sub(1) else {
                self.more = true;
                break;
            };
            self.budget = left;
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                hidden += 1;
            } else {
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                names.push((name, is_dir, entry.path()));
            }
        }
        names.sort();
        for (name, is_dir, below) in names {
            if self.entries.len() >= MAX_LISTED {
                self.more = true;
                break;
            }
            let slash = if is_dir { "/" } else { "" };
            let shown = format!("{prefix}{name}{slash}");
            self.entries.push(shown.clone());
            if is_dir && level < 2 {
                // A directory that can't be read is still listed itself.
                let _ = self.add(&below, &shown, level + 1);
            }
        }
        Ok(hidden)
    }
}

fn create(at: &Path, path: &str, text: &str) -> Result<Done, Refusal> {
    if fs::symlink_metadata(at).is_ok() {
        return Err(Refusal::Exists(path.to_owned()));
    }
    let document = Document::new(text.to_owned());
    let bytes = encode(&document, path)?;
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent).map_err(|error| io_refusal("create", path, error))?;
    }
    disk::create(at, &bytes).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Refusal::Exists(path.to_owned()),
        _ => io_refusal("write", path, error),
    })?;
    Ok(Done {
        output: format!("File created successfully at: {path}"),
        existed: false,
        old: None,
        new: Some(document.text),
    })
}

/// The new text, and the answer.
fn str_replace(
    document: &Document,
    path: &str,
    old: &str,
    new: &str,
) -> Result<(String, String), Refusal> {
    let text = &document.text;
    let wanted = document.adopt(old);
    let replacement = document.adopt(new);
    if wanted.is_empty() {
        return Err(Refusal::EmptyOldText(path.to_owned()));
    }
    if wanted == replacement {
        return Err(Refusal::SameText);
    }
    let places: Vec<usize> = text.match_indices(&wanted).map(|(at, _)| at).collect();
    let at = match places[..] {
        [] => {
            return Err(Refusal::NotFound {
                old: old.to_owned(),
                path: path.to_owned(),
            });
        }
        [at] => at,
        _ => {
            return Err(Refusal::NotUnique {
                old: old.to_owned(),
                lines: line_numbers(text, &places),
            });
        }
    };
    let edited = [&text[..at], &replacement, &text[at + wanted.len()..]].concat();
    let before = line_ends(&text[..at]);
    let snippet = render::snippet(&edited, before, line_ends(&replacement));
    Ok((edited, render::replaced(path, &snippet)))
}

fn line_ends(text: &str) -> usize {
    text.bytes().filter(|&b| b == b'\n').count()
}

/// Distinct line numbers of ascending offsets.
fn line_numbers(text: &str, offsets: &[usize]) -> Vec<usize> {
    let mut lines = Vec::new();
    let (mut line, mut from) = (1, 0);
    for &at in offsets {
        line += line_ends(&text[from..at]);
        from = at;
        if lines.last() != Some(&line) {
            lines.push(line);
        }
    }
    lines
}

/// The new text, and the answer.
fn insert(
    document: &Document,
    path: &str,
    insert_line: i64,
    new: &str,
) -> Result<(String, String), Refusal> {
    let text = &document.text;
    let lines = line_count(text);
    let after = usize::try_from(insert_line)
        .ok()
        .filter(|&line| line <= lines)
        .ok_or(Refusal::InsertLine {
            given: insert_line,
            lines,
        })?;
    let inserted = document.adopt(new);
    let at = match after.checked_sub(1) {
        None => 0,
        Some(nth) => text
            .match_indices('\n')
            .nth(nth)
            .map_or(text.len(), |(end, _)| end + 1),
    };
    // After a last line without a line end, that line gets one.
    let unended = at > 0 && !text[..at].ends_with('\n');
    let joint = if unended { "\n" } else { "" };
    let edited = [&text[..at], joint, &inserted, "\n", &text[at..]].concat();
    let snippet = render::snippet(&edited, after, line_ends(&inserted));
    Ok((edited, render::inserted(path, &snippet)))
}

#[cfg(test)]
mod tests;
