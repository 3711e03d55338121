//! Actions on files: `read`, `write`, and the editor's `edit`.

use super::observation;
use super::run::cwd;
use super::{Arguments, internal, invalid};
use crate::Guest;
use crate::file::{self, FileError, WriteOptions};
use crate::http::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use similar::TextDiff;
use skyrl_protocol::guest::EditRequest;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest file that is read.
const MOST_BYTES: u64 = 64 << 20;
/// Mode of a new file.
const NEW_FILE: u32 = 0o664;
/// How long a diff may be worked on before it becomes coarser.
const DIFF_PATIENCE: Duration = Duration::from_secs(1);

/// Files that are shown as data.
const MEDIA: [(&str, &str); 9] = [
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("bmp", "image/bmp"),
    ("gif", "image/gif"),
    ("pdf", "application/pdf"),
    ("mp4", "video/mp4"),
    ("webm", "video/webm"),
    ("ogg", "video/ogg"),
];

/// The path of an action: relative ones are relative to the agent's shell.
fn resolve(guest: &Guest, path: &str) -> PathBuf {
    if Path::new(path).is_absolute() {
        PathBuf::from(path)
    } else {
        Path::new(&cwd(guest)).join(path)
    }
}

/// Executes a `read`.
pub(super) fn read(guest: &Guest, arguments: &Arguments) -> Result<Value, Response> {
    let path = arguments.required("path")?;
    if arguments.text("impl_source") == Some("oh_aci") {
        let view_range = match arguments.0.get("view_range") {
            None | Some(Value::Null) => None,
            Some(range) => match range.as_array().map(Vec::as_slice) {
                Some([from, to]) => from.as_i64().zip(to.as_i64()),
                _ => None,
            }
            .map(Some)
            .ok_or_else(|| invalid("view_range is no pair of line numbers"))?,
        };
        let view = EditRequest::View {
            path: path.to_owned(),
            view_range,
        };
        let result = guest.editor.apply(&view, Path::new(&cwd(guest)));
        return Ok(observation::read(path, &result.output, "oh_aci"));
    }
    let resolved = resolve(guest, path);
    match content(&resolved) {
        Ok(Content::Data(url)) => Ok(observation::read(path, &url, "default")),
        Ok(Content::Text(text)) => {
            let start = arguments.number("start").unwrap_or(0);
            let end = arguments.number("end").unwrap_or(-1);
            let shown = lines(&text, start, end);
            Ok(observation::read(path, shown, "default"))
        }
        Ok(Content::Binary) => Ok(observation::error("ERROR_BINARY_FILE")),
        Err(error) => Ok(observation::error(&match error.kind() {
            io::ErrorKind::NotFound => format!(
                "File not found: {}. Your current working directory is {}.",
                resolved.display(),
                cwd(guest)
            ),
            io::ErrorKind::IsADirectory => format!(
                "Path is a directory: {}. You can only read files",
                resolved.display()
            ),
            io::ErrorKind::PermissionDenied => {
                format!("Malformed paths not permitted: {}", resolved.display())
            }
            _ => format!("{} can't be read: {error}", resolved.display()),
        })),
    }
}

enum Content {
    Text(String),
    /// A `data:` URL.
    Data(String),
    Binary,
}

fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut source = file::open(path, 0, Some(MOST_BYTES + 1)).map_err(|error| error.source)?;
    let mut bytes = Vec::new();
    source.reader.read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    Ok(bytes)
}

fn content(path: &Path) -> io::Result<Content> {
    let bytes = bytes_of(path)?;
    let extension = path
        .extension()
        .map(|e| e.to_string_lossy().to_ascii_lowercase())
        .unwrap_or_default();
    if let Some((_, media_type)) = MEDIA.iter().find(|(known, _)| *known == extension) {
        let encoded = STANDARD.encode(&bytes);
        return Ok(Content::Data(format!("data:{media_type};base64,{encoded}")));
    }
    if bytes.iter().take(8192).any(|byte| *byte == 0) {
        return Ok(Content::Binary);
    }
    Ok(match String::from_utf8(bytes) {
        // Text mode: every line end is "\n".
        Ok(text) => Content::Text(text.replace("\r\n", "\n")),
        Err(_) => Content::Binary,
    })
}

/// Lines from `start` up to `end`, counted from 0; −1 is the end.
fn lines(text: &str, start: i64, end: i64) -> &str {
    let start = usize::try_from(start).unwrap_or(0);
    let count = match usize::try_from(end) {
        Ok(end) => end.saturating_sub(start).max(1),
        Err(_) => usize::MAX,
    };
    let mut rest = text;
    for _ in 0..start {
        match rest.find('\n') {
            Some(at) => rest = &rest[at + 1..],
            None => return "",
        }
    }
    let end = rest
        .match_indices('\n')
        .nth(count - 1)
        .map_or(rest.len(), |(at, _)| at + 1);
    &rest[..end]
}

/// Executes a `write`.
pub(super) fn write(guest: &Guest, arguments: &Arguments) -> Result<Value, Response> {
    let path = arguments.required("path")?;
    let resolved = resolve(guest, path);
    if resolved.is_dir() {
        return Ok(observation::error(&format!(
            "Path is a directory: {}. You can only write to files",
            resolved.display()
        )));
    }
    let content = arguments.required("content")?;
    let start = arguments.number("start").unwrap_or(0);
    let end = arguments.number("end").unwrap_or(-1);
    let (text, mode) = match existing(&resolved) {
        Ok(None) => (with_line_ends(content), Some(NEW_FILE)),
        Ok(Some(old)) => (replaced(&old, content, start, end), None),
        Err(error) => return Ok(failed(&resolved, &error)),
    };
    let options = WriteOptions {
        mode,
        parents: true,
    };
    match file::write_atomically(&resolved, options, &mut text.as_bytes()) {
        Ok(_) => Ok(observation::write(path)),
        Err(error) => Ok(observation::error(&error.to_string())),
    }
}

fn failed(path: &Path, error: &io::Error) -> Value {
    observation::error(&format!("{} can't be read: {error}", path.display()))
}

fn existing(path: &Path) -> io::Result<Option<String>> {
    match bytes_of(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Every line of a text, each with a line end.
fn with_line_ends(text: &str) -> String {
    format!("{text}\n")
}

/// A text with the lines from `start` up to `end` replaced.
fn replaced(old: &str, new: &str, start: i64, end: i64) -> String {
    let all: Vec<&str> = old.split_inclusive('\n').collect();
    let start = usize::try_from(start).unwrap_or(0).min(all.len());
    let end = usize::try_from(end).map_or(all.len(), |end| end.min(all.len()));
    let mut text = all[..start].concat();
    text.push_str(&with_line_ends(new));
    text.push_str(&all[end.max(start)..].concat());
    text
}

/// Executes an `edit`.
pub(super) fn edit(guest: &Guest, arguments: &Arguments) -> Result<Value, Response> {
    let path = arguments.required("path")?;
    if !matches!(arguments.text("impl_source"), None | Some("oh_aci")) {
        return Err(internal(
            "only edits with impl_source \"oh_aci\" are executed here",
        ));
    }
    let (at, text) = (path.to_owned(), |name: &str| {
        arguments.text(name).map(str::to_owned)
    });
    let request = match arguments.required("command")? {
        "view" => EditRequest::View {
            path: at,
            view_range: None,
        },
        "create" => EditRequest::Create {
            path: at,
            file_text: text("file_text").unwrap_or_default(),
        },
        "str_replace" => EditRequest::StrReplace {
            path: at,
            old_str: text("old_str").unwrap_or_default(),
            new_str: text("new_str"),
        },
        "insert" => EditRequest::Insert {
            path: at,
            insert_line: arguments
                .number("insert_line")
                .ok_or_else(|| invalid("action argument \"insert_line\" is no number"))?,
            new_str: text("new_str").unwrap_or_default(),
        },
        "undo_edit" => EditRequest::UndoEdit { path: at },
        other => {
            return Ok(observation::error(&format!(
                "ERROR:\nUnrecognized command {other}. The allowed commands are: view, create, \
                 str_replace, insert, undo_edit"
            )));
        }
    };
    let result = guest.editor.apply(&request, Path::new(&cwd(guest)));
    let diff = diff(
        path,
        result.old_content.as_deref().unwrap_or(""),
        result.new_content.as_deref().unwrap_or(""),
    );
    Ok(json!({
        "observation": "edit",
        "message": format!("I edited the file {path}."),
        "content": result.output,
        "extras": {
            "path": path,
            "prev_exist": result.existed,
            "old_content": arguments.text("old_str"),
            "new_content": arguments.text("new_str"),
            "impl_source": "oh_aci",
            "diff": diff,
            "_diff_cache": null,
        },
    }))
}

/// What changed, without context.
fn diff(path: &str, old: &str, new: &str) -> String {
    if old == new {
        return String::new();
    }
    let (old, new) = (format!("{}\n", old.trim()), format!("{}\n", new.trim()));
    let diff = TextDiff::configure()
        .timeout(DIFF_PATIENCE)
        .diff_lines(&old, &new);
    let mut unified = diff.unified_diff();
    let unified = unified.context_radius(0).header(path, path);
    unified.to_string().trim_end_matches('\n').to_owned()
}

impl From<FileError> for super::transfer::Failed {
    fn from(error: FileError) -> Self {
        Self(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_chosen_by_number() {
        let text = "0\n1\n2\n3";
        assert_eq!(lines(text, 0, -1), text);
        assert_eq!(lines(text, 1, 3), "1\n2\n");
        assert_eq!(lines(text, 3, -1), "3");
        assert_eq!(lines(text, 9, -1), "");
        assert_eq!(lines(text, 2, 99), "2\n3");
    }

    #[test]
    fn written_lines_replace_lines() {
        assert_eq!(with_line_ends("l1\nl2\n"), "l1\nl2\n\n");
        assert_eq!(replaced("a\nb\nc\n", "X\nY", 1, 2), "a\nX\nY\nc\n");
        assert_eq!(replaced("a\nb\n", "X", 0, -1), "X\n");
        assert_eq!(replaced("a\n", "X", 9, 12), "a\nX\n");
    }

    #[test]
    fn a_diff_has_no_context() {
        assert_eq!(
            diff("/f", "a\nb\nc\n", "a\nB\nc\n"),
            "--- /f\n+++ /f\n@@ -2 +2 @@\n-b\n+B"
        );
        assert_eq!(diff("/f", "same", "same"), "");
    }
}
