//! Searches in real directories.

use super::*;
use std::fs;
use std::os::unix::fs::symlink;
use tempfile::TempDir;

fn tree(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().expect("tempdir");
    for (name, content) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        fs::write(path, content).expect("write");
    }
    dir
}

fn deadline() -> Instant {
    Instant::now() + TIME_LIMIT
}

fn text_request(dir: &TempDir, pattern: &str) -> TextSearch {
    TextSearch {
        pattern: pattern.to_owned(),
        path: dir.path().to_string_lossy().into_owned(),
        glob: None,
        ignore_case: false,
        limit: 100,
    }
}

fn hits(dir: &TempDir, request: &TextSearch) -> Vec<(String, u64, String)> {
    let found = text(request, deadline()).expect("search");
    let root = format!("{}/", dir.path().display());
    found
        .matches
        .into_iter()
        .map(|m| (m.path.replace(&root, ""), m.line, m.text))
        .collect()
}

fn names(dir: &TempDir, glob: &str) -> Vec<String> {
    let request = FileSearch {
        glob: glob.to_owned(),
        path: dir.path().to_string_lossy().into_owned(),
        limit: 100,
    };
    let root = format!("{}/", dir.path().display());
    let found = files(&request, deadline()).expect("search");
    found.paths.iter().map(|p| p.replace(&root, "")).collect()
}

#[test]
fn lines_are_found_in_order_of_path_and_number() {
    let dir = tree(&[
        ("b.py", b"import os\r\nx = 1\r\nimport re"),
        ("a/z.py", b"import sys\n"),
        ("a-b.txt", b"important\n"),
        (".git/config", b"import nothing\n"),
        ("data.bin", b"import\0\n"),
    ]);
    let line = |p: &str, n, t: &str| (p.to_owned(), n, t.to_owned());
    assert_eq!(
        hits(&dir, &text_request(&dir, "^import")),
        [
            line("a-b.txt", 1, "important"),
            line("a/z.py", 1, "import sys"),
            line("b.py", 1, "import os"),
            line("b.py", 3, "import re"),
        ]
    );
    let mut request = text_request(&dir, r"IMPORT \w+$");
    assert_eq!(hits(&dir, &request), []);
    request.ignore_case = true;
    request.glob = Some("*.py".to_owned());
    assert_eq!(hits(&dir, &request).len(), 3);
    request.glob = Some("a/**/*.py".to_owned());
    assert_eq!(hits(&dir, &request), [line("a/z.py", 1, "import sys")]);
    request.path = dir.path().join("b.py").to_string_lossy().into_owned();
    assert_eq!(hits(&dir, &request).len(), 2, "a file may be named itself");
}

#[test]
fn names_are_matched_alone_or_as_paths() {
    let dir = tree(&[
        ("src/lib.rs", b""),
        ("src/deep/er/mod.rs", b""),
        ("src/main.c", b""),
        ("README", b""),
    ]);
    assert_eq!(names(&dir, "*.rs"), ["src/deep/er/mod.rs", "src/lib.rs"]);
    assert_eq!(names(&dir, "src/*.rs"), ["src/lib.rs"]);
    assert_eq!(names(&dir, "./src/**/*.{rs,c}").len(), 3);
    assert_eq!(names(&dir, "[A-Z]*"), ["README"]);
    assert_eq!(names(&dir, "?EADME"), ["README"]);
    assert_eq!(names(&dir, "src"), [""; 0], "directories are no files");
}

#[test]
fn links_lead_nowhere_and_loops_end() {
    let dir = tree(&[("real/f", b"needle\n")]);
    symlink(dir.path(), dir.path().join("real/loop")).expect("symlink");
    symlink("/etc", dir.path().join("out")).expect("symlink");
    symlink("real/f", dir.path().join("alias")).expect("symlink");
    let found = hits(&dir, &text_request(&dir, "needle|root"));
    assert_eq!(found, [("real/f".to_owned(), 1, "needle".to_owned())]);
    assert_eq!(names(&dir, "*"), ["alias", "out", "real/f", "real/loop"]);
}

#[test]
fn results_are_cut_at_the_limit_and_say_so() {
    let dir = tree(&[("f", "needle\n".repeat(50).as_bytes())]);
    let mut request = text_request(&dir, "needle");
    request.limit = 50;
    assert!(!text(&request, deadline()).expect("search").truncated);
    request.limit = 49;
    let cut = text(&request, deadline()).expect("search");
    assert!(cut.truncated && cut.matches.len() == 49);
    let late = text(&request, Instant::now()).expect("search");
    assert!(late.truncated && late.matches.is_empty());
}

#[test]
fn long_lines_and_invalid_utf_8_do_no_harm() {
    let mut long = vec![b'x'; 3 << 20];
    long.extend_from_slice(b" tail\nneedle \xff end\n");
    let dir = tree(&[("f", &long)]);
    let found = hits(&dir, &text_request(&dir, "needle"));
    assert_eq!(
        found,
        [("f".to_owned(), 2, "needle \u{fffd} end".to_owned())]
    );
    let head = hits(&dir, &text_request(&dir, "^xx"));
    assert_eq!(head[0].2.chars().count(), MAX_LINE_CHARS);
}

#[test]
fn what_cannot_be_searched_is_a_clear_error() {
    let dir = tree(&[]);
    let error = |request: &TextSearch| {
        text(request, deadline())
            .expect_err("must be refused")
            .to_string()
    };
    assert!(error(&text_request(&dir, "(")).contains("unclosed group"));
    assert!(error(&text_request(&dir, r"(\w{1000}){1000}")).contains("size limit"));
    let mut request = text_request(&dir, "x");
    request.glob = Some("[".to_owned());
    assert!(error(&request).contains("glob"));
    request.glob = None;
    request.path = "relative".to_owned();
    assert!(error(&request).contains("absolute"));
    request.path = dir.path().join("none").to_string_lossy().into_owned();
    assert!(error(&request).contains("No such file"));
}

#[test]
fn kernel_file_systems_below_the_root_are_not_entered() {
    let request = FileSearch {
        glob: "cpuinfo".to_owned(),
        path: "/".to_owned(),
        limit: 100,
    };
    let short = Instant::now() + Duration::from_secs(2);
    let found = files(&request, short).expect("search");
    assert!(!found.paths.contains(&"/proc/cpuinfo".to_owned()));
    let inside = FileSearch {
        path: "/proc/self".to_owned(),
        glob: "status".to_owned(),
        limit: 1,
    };
    let found = files(&inside, deadline()).expect("search");
    assert_eq!(found.paths, ["/proc/self/status"], "unless asked for");
}
