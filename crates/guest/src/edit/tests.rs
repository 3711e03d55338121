//! The editor against real files.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use tempfile::TempDir;

struct Bench {
    dir: TempDir,
    editor: Editor,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("tempdir"),
            editor: Editor::new(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, content).expect("write");
        path
    }

    fn ask(&self, request: EditRequest) -> EditResult {
        self.editor.apply(&request, self.dir.path())
    }

    fn view(&self, path: &str, view_range: Option<(i64, i64)>) -> EditResult {
        let path = path.to_owned();
        self.ask(EditRequest::View { path, view_range })
    }

    fn replace(&self, path: &str, old: &str, new: &str) -> EditResult {
        self.ask(EditRequest::StrReplace {
            path: path.to_owned(),
            old_str: old.to_owned(),
            new_str: Some(new.to_owned()),
        })
    }

    fn insert(&self, path: &str, insert_line: i64, new_str: &str) -> EditResult {
        self.ask(EditRequest::Insert {
            path: path.to_owned(),
            insert_line,
            new_str: new_str.to_owned(),
        })
    }

    fn create(&self, path: &str, file_text: &str) -> EditResult {
        self.ask(EditRequest::Create {
            path: path.to_owned(),
            file_text: file_text.to_owned(),
        })
    }

    fn undo(&self, path: &str) -> EditResult {
        let path = path.to_owned();
        self.ask(EditRequest::UndoEdit { path })
    }
}

fn numbered_lines(from: usize, to: usize) -> String {
    (from..=to).map(|n| format!("l{n}\n")).collect()
}

#[test]
fn a_file_is_viewed_whole_or_by_range() {
    let bench = Bench::new();
    let path = bench.write("f.txt", "a\nb\nc\n");
    assert_eq!(
        bench.view(&path, None).output,
        format!(
            "Here's the result of running `cat -n` on {path}:\n     1\ta\n     2\tb\n     3\tc\n     4\t\n"
        )
    );
    let ranged = |first, last| bench.view(&path, Some((first, last))).output;
    let head = format!("Here's the result of running `cat -n` on {path}:\n");
    assert_eq!(ranged(1, 2), format!("{head}     1\ta\n     2\tb\n"));
    assert_eq!(ranged(2, -1), format!("{head}     2\tb\n     3\tc\n"));
    assert!(ranged(1, 9).ends_with("     3\tc\n") && ranged(1, 9).starts_with("NOTE: "));
    for (first, last, rule) in [
        (0, 1, "within the range of lines of the file: [1, 3]."),
        (4, -1, "within the range of lines of the file: [1, 3]."),
        (2, 1, "greater than or equal to the first element `2`."),
        (2, -2, "greater than or equal to the first element `2`."),
    ] {
        let refused = bench.view(&path, Some((first, last)));
        assert!(refused.failed);
        assert!(
            refused.output.starts_with(&format!(
                "ERROR:\nInvalid `view_range` parameter: [{first}, {last}]."
            )) && refused.output.ends_with(rule),
            "{}",
            refused.output
        );
    }
}

#[test]
fn a_directory_is_viewed_two_levels_deep_without_hidden_entries() {
    let bench = Bench::new();
    fs::create_dir_all(bench.path("d/e/f")).expect("mkdir");
    fs::create_dir(bench.path(".git")).expect("mkdir");
    bench.write("d/x.txt", "x");
    bench.write("d/e/too-deep", "y");
    bench.write(".hidden", "");
    symlink("/", bench.path("up")).expect("symlink");
    let root = bench.dir.path().display().to_string();
    let shown = bench.view(&root, None);
    assert!(!shown.failed);
    let lines: Vec<&str> = shown.output.lines().collect();
    assert_eq!(
        lines[1..6],
        [
            format!("{root}/"),
            format!("{root}/d/"),
            format!("{root}/d/e/"),
            format!("{root}/d/x.txt"),
            format!("{root}/up"),
        ]
    );
    assert!(shown.output.contains("2 hidden entries"));
    let refused = bench.view(&root, Some((1, 2)));
    assert!(
        refused
            .output
            .contains("not allowed when `path` points to a directory")
    );
}

#[test]
fn a_wrong_path_is_refused_with_the_words_of_the_contract() {
    let bench = Bench::new();
    let missing = bench.path("nope");
    assert_eq!(
        bench.view(&missing, None).output,
        format!(
            "ERROR:\nInvalid `path` parameter: {missing}. The path {missing} does not exist. Please provide a valid path."
        )
    );
    let there = bench.write("there", "x");
    let relative = bench.view("there", None);
    assert!(relative.failed);
    assert!(
        relative
            .output
            .ends_with(&format!("Maybe you meant {there}?"))
    );
    assert!(!bench.view("not-there", None).output.contains("Maybe"));
    let directory = bench.replace(&bench.dir.path().display().to_string(), "a", "b");
    assert!(directory.output.contains("is a directory"));
}

#[test]
fn create_makes_a_file_with_its_directories_and_never_overwrites() {
    let bench = Bench::new();
    let path = bench.path("new/dir/f.txt");
    let created = bench.create(&path, "hi\n");
    assert_eq!(
        created.output,
        format!("File created successfully at: {path}")
    );
    assert!(!created.existed && !created.failed);
    assert_eq!(
        (created.old_content, created.new_content.as_deref()),
        (None, Some("hi\n"))
    );
    let again = bench.create(&path, "other");
    assert!(again.failed && again.existed && again.output.contains("File already exists at:"));
    assert_eq!(fs::read_to_string(&path).expect("read"), "hi\n");
    symlink("/nowhere/at/all", bench.path("dangling")).expect("symlink");
    assert!(bench.create(&bench.path("dangling"), "x").failed);
}

#[test]
fn str_replace_wants_exactly_one_occurrence() {
    let bench = Bench::new();
    let path = bench.write("f.txt", numbered_lines(1, 20));
    let done = bench.replace(&path, "l10\n", "X\nY\n");
    assert_eq!(
        done.output,
        format!(
            "The file {path} has been edited. Here's the result of running `cat -n` on a snippet of {path}:\n     6\tl6\n     7\tl7\n     8\tl8\n     9\tl9\n    10\tX\n    11\tY\n    12\tl11\n    13\tl12\n    14\tl13\n    15\tl14\n    16\tl15\nReview the changes and make sure they are as expected. Edit the file again if necessary."
        )
    );
    assert_eq!(done.old_content, Some(numbered_lines(1, 20)));
    let now = numbered_lines(1, 9) + "X\nY\n" + &numbered_lines(11, 20);
    assert_eq!(done.new_content.as_deref(), Some(now.as_str()));
    assert_eq!(fs::read_to_string(&path).expect("read"), now);

    assert_eq!(
        bench.replace(&path, "zz", "q").output,
        format!(
            "ERROR:\nNo replacement was performed, old_str `zz` did not appear verbatim in {path}."
        )
    );
    assert_eq!(
        bench.replace(&path, "l2", "q").output,
        "ERROR:\nNo replacement was performed. Multiple occurrences of old_str `l2` in lines [2, 21]. Please ensure it is unique."
    );
    assert!(bench.replace(&path, "X", "X").failed);
    assert!(bench.replace(&path, "", "X").failed);
    assert_eq!(fs::read_to_string(&path).expect("read"), now);
    let removed = bench.ask(EditRequest::StrReplace {
        path: path.clone(),
        old_str: "X\nY\n".to_owned(),
        new_str: None,
    });
    assert!(!removed.failed && !removed.new_content.expect("new").contains('X'));
}

#[test]
fn insert_puts_lines_after_a_line_within_the_file() {
    let bench = Bench::new();
    let path = bench.write("f.txt", "a\nb\nc\n");
    let done = bench.insert(&path, 0, "top");
    assert_eq!(
        done.output,
        format!(
            "The file {path} has been edited. Here's the result of running `cat -n` on a snippet of the edited file:\n     1\ttop\n     2\ta\n     3\tb\n     4\tc\n     5\t\nReview the changes and make sure they are as expected (correct indentation, no duplicate lines, etc). Edit the file again if necessary."
        )
    );
    assert!(!bench.insert(&path, 4, "x\ny").failed);
    assert_eq!(
        fs::read_to_string(&path).expect("read"),
        "top\na\nb\nc\nx\ny\n"
    );
    for line in [-1, 7] {
        assert_eq!(
            bench.insert(&path, line, "x").output,
            format!(
                "ERROR:\nInvalid `insert_line` parameter: {line}. It should be within the range of allowed values: [0, 6]"
            )
        );
    }
    let unended = bench.write("unended", "a\nb");
    assert!(!bench.insert(&unended, 2, "c").failed);
    assert_eq!(fs::read_to_string(&unended).expect("read"), "a\nb\nc\n");
    let empty = bench.write("empty", "");
    assert!(!bench.insert(&empty, 0, "q").failed);
    assert_eq!(fs::read_to_string(&empty).expect("read"), "q\n");
}

#[test]
fn edits_are_taken_back_one_by_one() {
    let bench = Bench::new();
    let path = bench.write("f.txt", "a\nb\n");
    assert!(!bench.replace(&path, "a", "1").failed);
    assert!(!bench.insert(&path, 0, "0").failed);
    assert!(!bench.undo(&path).failed);
    assert_eq!(
        bench.undo(&path).output,
        format!(
            "Last edit to {path} undone successfully. Here's the result of running `cat -n` on {path}:\n     1\ta\n     2\tb\n     3\t\n"
        )
    );
    assert_eq!(fs::read_to_string(&path).expect("read"), "a\nb\n");
    assert!(bench.undo(&path).failed);
}

#[test]
fn bytes_outside_the_edit_stay_as_they_were() {
    let bench = Bench::new();
    let dos = bench.write("dos", b"\xef\xbb\xbfa\r\nb\r\nc\r\n");
    let done = bench.replace(&dos, "a\nb", "x\ny");
    assert!(!done.failed && done.new_content.as_deref() == Some("x\ny\nc\n"));
    assert!(!bench.insert(&dos, 1, "i\r\nj").failed);
    assert_eq!(
        fs::read(&dos).expect("read"),
        b"\xef\xbb\xbfx\r\ni\r\nj\r\ny\r\nc\r\n"
    );
    let latin = bench.write("latin", b"caf\xe9 \x80\nend\n");
    assert!(!bench.replace(&latin, "end", "na\u{ef}ve").failed);
    assert_eq!(fs::read(&latin).expect("read"), b"caf\xe9 \x80\nna\xefve\n");
    let refused = bench.replace(&latin, "caf", "\u{2192}");
    assert!(refused.failed && refused.output.contains("iconv"));
    assert!(!bench.undo(&latin).failed);
    assert_eq!(fs::read(&latin).expect("read"), b"caf\xe9 \x80\nend\n");
}

#[test]
fn binary_large_and_special_files_are_refused() {
    let bench = Bench::new();
    let binary = bench.write("binary", b"\x7fELF\0\0");
    assert!(bench.view(&binary, None).output.contains("is binary"));
    let large = bench.path("large");
    let file = fs::File::create(&large).expect("create");
    file.set_len(MAX_FILE_BYTES + 1).expect("grow");
    assert!(bench.view(&large, None).output.contains("too large"));
    assert!(bench.insert(&large, 0, "x").output.contains("too large"));
    assert!(
        bench
            .view("/dev/zero", None)
            .output
            .contains("not a regular file")
    );
    let small = bench.write("small", "x");
    let grown = bench.replace(&small, "x", &"y".repeat(MAX_FILE_BYTES as usize + 1));
    assert!(grown.failed && grown.output.contains("too large"));
    assert_eq!(fs::read(&small).expect("read"), b"x");
}

#[test]
fn a_link_is_edited_at_its_target_with_mode_and_owner_kept() {
    let bench = Bench::new();
    let target = bench.write("target", "old\n");
    fs::set_permissions(&target, fs::Permissions::from_mode(0o751)).expect("chmod");
    let as_root = rustix::process::geteuid().is_root();
    if as_root {
        std::os::unix::fs::chown(&target, Some(1234), Some(2345)).expect("chown");
    }
    let link = bench.path("link");
    symlink("target", &link).expect("symlink");
    assert!(!bench.replace(&link, "old", "new").failed);
    assert!(fs::symlink_metadata(&link).expect("stat").is_symlink());
    assert_eq!(fs::read_to_string(&target).expect("read"), "new\n");
    let meta = fs::metadata(&target).expect("stat");
    assert_eq!(meta.mode() & 0o777, 0o751);
    if as_root {
        assert_eq!((meta.uid(), meta.gid()), (1234, 2345));
    }
    // One history, by whichever name.
    assert!(!bench.undo(&target).failed);
    assert_eq!(fs::read_to_string(&link).expect("read"), "old\n");
}
