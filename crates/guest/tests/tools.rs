//! The native editor, search and git routes over the wire.

mod common;

use common::{Answer, TestGuest, encode};
use serde_json::json;
use skyrl_protocol::guest::{
    EditRequest, EditResult, ErrorCode, FileMatches, FileSearch, GitChangeKind, GitStatus,
    TextMatches, TextSearch,
};
use std::fs;
use std::path::Path;
use std::process::Command;

fn edit(guest: &TestGuest, request: &EditRequest) -> EditResult {
    guest.post("/v1/edit", request).ok()
}

fn text_search(guest: &TestGuest, pattern: &str) -> Answer {
    let request = TextSearch {
        pattern: pattern.to_owned(),
        path: guest.path(""),
        glob: None,
        ignore_case: false,
        limit: 100,
    };
    guest.post("/v1/search/text", &request)
}

fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=A", "-c", "user.email=a@b"])
        .args(arguments)
        .current_dir(directory)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .expect("git runs");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn an_edit_is_made_shown_and_taken_back() {
    let guest = TestGuest::start();
    let path = guest.path("new/file.txt");
    let created = edit(
        &guest,
        &EditRequest::Create {
            path: path.clone(),
            file_text: "one\ntwo\n".to_owned(),
        },
    );
    assert!(!created.failed && !created.existed);
    let replaced = edit(
        &guest,
        &EditRequest::StrReplace {
            path: path.clone(),
            old_str: "two".to_owned(),
            new_str: Some("2".to_owned()),
        },
    );
    assert_eq!(replaced.new_content.as_deref(), Some("one\n2\n"));
    let shown: EditResult = guest
        .post(
            "/v1/edit",
            &json!({"command": "view", "path": path, "view_range": [2, -1]}),
        )
        .ok();
    assert!(shown.output.ends_with(":\n     2\t2\n"), "{}", shown.output);
    let undone: EditResult = guest
        .post("/v1/edit", &json!({"command": "undo_edit", "path": path}))
        .ok();
    assert!(undone.output.starts_with("Last edit to "));
    assert_eq!(fs::read_to_string(&path).expect("read"), "one\ntwo\n");
    let relative: EditResult = guest
        .post(
            "/v1/edit",
            &json!({"command": "view", "path": "new/file.txt"}),
        )
        .ok();
    assert!(
        relative.failed
            && relative
                .output
                .contains(&format!("Maybe you meant {path}?"))
    );
    let unknown = guest.post("/v1/edit", &json!({"command": "rewrite", "path": path}));
    assert_eq!(unknown.error().code, ErrorCode::BadRequest);
}

#[test]
fn edits_of_one_file_by_many_lose_nothing() {
    let guest = TestGuest::start();
    let path = guest.path("shared");
    fs::create_dir_all(guest.work()).expect("mkdir");
    fs::write(&path, "").expect("write");
    std::thread::scope(|scope| {
        for n in 0..32 {
            let (guest, path) = (&guest, path.clone());
            scope.spawn(move || {
                let inserted = edit(
                    guest,
                    &EditRequest::Insert {
                        path,
                        insert_line: 0,
                        new_str: n.to_string(),
                    },
                );
                assert!(!inserted.failed, "{}", inserted.output);
            });
        }
    });
    assert_eq!(fs::read_to_string(&path).expect("read").lines().count(), 32);
}

#[test]
fn lines_and_names_are_found() {
    let guest = TestGuest::start();
    fs::create_dir_all(guest.path("src")).expect("mkdir");
    fs::write(guest.path("src/a.py"), "import os\nprint(1)\n").expect("write");
    fs::write(guest.path("b.txt"), "nothing\n").expect("write");
    let lines: TextMatches = text_search(&guest, r"^import\s").ok();
    assert_eq!(lines.matches.len(), 1);
    assert_eq!((lines.matches[0].line, lines.files_searched), (1, 2));
    let names: FileMatches = guest
        .post(
            "/v1/search/files",
            &FileSearch {
                glob: "*.py".to_owned(),
                path: guest.path(""),
                limit: 10,
            },
        )
        .ok();
    assert_eq!(names.paths.len(), 1);
    assert!(names.paths[0].ends_with("src/a.py"));
    let bad = text_search(&guest, "(").error();
    assert_eq!(bad.code, ErrorCode::BadRequest);
    assert!(bad.message.contains("unclosed") && bad.hint.is_some());
    let nowhere = guest.post(
        "/v1/search/files",
        &json!({"glob": "*", "path": "/nonexistent"}),
    );
    assert_eq!(nowhere.error().code, ErrorCode::NotFound);
}

#[test]
fn a_work_tree_tells_its_state_and_its_difference() {
    let guest = TestGuest::start();
    let repo = guest.work().join("repo");
    fs::create_dir_all(&repo).expect("mkdir");
    git(&repo, &["init", "-q", "-b", "trunk", "."]);
    let status = |path: &Path| -> GitStatus {
        let target = format!("/v1/git/status?path={}", encode(&path.to_string_lossy()));
        guest.send("GET", &target, b"").ok()
    };
    let new = status(&repo);
    assert_eq!(
        (new.branch.as_deref(), new.head, new.changes.len()),
        (Some("trunk"), None, 0)
    );
    fs::write(repo.join("old name"), "some content\nthat stays\n").expect("write");
    fs::write(repo.join("edited"), "1\n").expect("write");
    git(&repo, &["add", "-A"]);
    git(&repo, &["commit", "-q", "-m", "first"]);
    let head = git(&repo, &["rev-parse", "HEAD"]);
    git(&repo, &["mv", "old name", "new name"]);
    fs::write(repo.join("edited"), "2\n").expect("write");
    fs::write(repo.join("added"), b"\0binary").expect("write");
    let now = status(&repo);
    assert_eq!(now.head.as_deref(), Some(head.as_str()));
    let changes: Vec<_> = now
        .changes
        .iter()
        .map(|c| (c.path.as_str(), c.status))
        .collect();
    assert_eq!(
        changes,
        [
            ("added", GitChangeKind::Added),
            ("edited", GitChangeKind::Updated),
            ("new name", GitChangeKind::Moved),
        ]
    );
    let target = format!("/v1/git/diff?path={}", repo.display());
    let patch = guest.send("GET", &target, b"");
    assert_eq!(patch.status, 200);
    // The patch makes the same tree of a clean copy.
    let copy = guest.work().join("copy");
    git(&guest.work(), &["clone", "-q", "repo", "copy"]);
    fs::write(guest.path("p"), &patch.body).expect("write");
    git(&copy, &["apply", "--binary", "../p"]);
    assert_eq!(fs::read(copy.join("added")).expect("read"), b"\0binary");
    assert_eq!(fs::read(copy.join("edited")).expect("read"), b"2\n");
    assert!(copy.join("new name").exists() && !copy.join("old name").exists());
    assert_eq!(git(&repo, &["status", "--porcelain", "added"]), "?? added");
    let since = guest
        .send("GET", &format!("{target}&base=nope"), b"")
        .error();
    assert_eq!(since.code, ErrorCode::BadRequest);
}

#[test]
fn a_work_tree_of_another_user_is_no_obstacle() {
    if !rustix::process::geteuid().is_root() {
        // Only root can make one.
        return;
    }
    let guest = TestGuest::start();
    let repo = guest.work().join("repo");
    fs::create_dir_all(&repo).expect("mkdir");
    git(&repo, &["init", "-q", "."]);
    fs::write(repo.join("f"), "x").expect("write");
    let owned = Command::new("chown")
        .args(["-R", "12345:12345"])
        .arg(&repo)
        .status();
    assert!(owned.expect("chown runs").success());
    let target = format!("/v1/git/status?path={}", repo.display());
    let status: GitStatus = guest.send("GET", &target, b"").ok();
    assert_eq!(status.changes.len(), 1);
}

#[test]
fn what_git_cannot_answer_is_a_clear_error() {
    let guest = TestGuest::start();
    fs::create_dir_all(guest.work()).expect("mkdir");
    let target = format!("/v1/git/status?path={}", guest.path(""));
    let outside = guest.send("GET", &target, b"").error();
    assert_eq!(outside.code, ErrorCode::NotFound);
    assert!(outside.message.starts_with("Not a git repository") && outside.hint.is_some());
    let without = TestGuest::start_with(|command, _| {
        command.env("PATH", "/nonexistent");
    });
    let target = format!("/v1/git/status?path={}", without.path(""));
    let missing = without.send("GET", &target, b"").error();
    assert_eq!(missing.code, ErrorCode::NotSupported);
    assert_eq!(guest.send("GET", "/v1/git/status", b"").status, 400);
}
