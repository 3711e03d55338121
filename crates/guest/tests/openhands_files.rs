//! The OpenHands 1.x dialect over the wire: files and git.

mod common;

use common::{Answer, TestGuest, encode};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

fn get(guest: &TestGuest, target: &str) -> Answer {
    guest.send("GET", target, b"")
}

fn upload(guest: &TestGuest, path: &str, part: &str, content: &[u8]) -> Answer {
    let mut body = format!(
        "--BB\r\nContent-Disposition: form-data; name=\"{part}\"; filename=\"x\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    )
    .into_bytes();
    body.extend_from_slice(content);
    body.extend_from_slice(b"\r\n--BB--\r\n");
    guest.connect().send(
        "POST",
        &format!("/api/file/upload?path={}", encode(path)),
        &[("content-type", "multipart/form-data; boundary=BB")],
        &body,
    )
}

fn refusal(answer: &Answer) -> (u16, String) {
    let body: Value = answer.json();
    (
        answer.status,
        body["detail"].as_str().unwrap_or_default().to_owned(),
    )
}

fn refused(status: u16, detail: &str) -> (u16, String) {
    (status, detail.to_owned())
}

/// Runs git as the agent would, with a fixed author and date.
fn git(directory: &Path, arguments: &str) {
    let status = Command::new("git")
        .args(arguments.split(' '))
        .current_dir(directory)
        .env("GIT_AUTHOR_NAME", "A B")
        .env("GIT_AUTHOR_EMAIL", "a@b")
        .env("GIT_COMMITTER_NAME", "C")
        .env("GIT_COMMITTER_EMAIL", "c@d")
        .env("GIT_AUTHOR_DATE", "2024-01-02T03:04:05Z")
        .env("GIT_COMMITTER_DATE", "2024-01-02T03:04:05Z")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .expect("git runs");
    assert!(
        status.status.success(),
        "git {arguments}: {}",
        String::from_utf8_lossy(&status.stderr)
    );
}

fn write(directory: &Path, name: &str, content: &str) {
    let path = directory.join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
    fs::write(path, content).expect("write");
}

/// A repository with two commits and one change of each kind.
fn repository(guest: &TestGuest) -> std::path::PathBuf {
    let repo = guest.work().join("repo");
    fs::create_dir_all(&repo).expect("mkdir");
    git(&repo, "init -q -b main .");
    for (name, content) in [
        ("a", "1\n"),
        ("b", "1\n2\n"),
        ("s/x", "x\n"),
        ("gone", "g\n"),
        ("mv", "mv\n"),
    ] {
        write(&repo, name, content);
    }
    git(&repo, "add -A");
    git(&repo, "commit -q -m first");
    write(&repo, "b", "1\n2\n3\n");
    git(&repo, "commit -q -a -m second");
    write(&repo, "b", "1\r\n2\r\n3\r\n4\r\n");
    write(&repo, "n w", "new\n");
    write(&repo, "s/t/u", "u\n");
    write(&repo, ".gitignore", "ign\n");
    write(&repo, "ign", "i\n");
    git(&repo, "rm -q gone");
    git(&repo, "mv mv moved");
    repo
}

fn changes(guest: &TestGuest, path: &Path, more: &str) -> Vec<(String, String)> {
    let target = format!(
        "/api/git/changes?path={}{more}",
        encode(&path.to_string_lossy())
    );
    let list: Vec<Value> = get(guest, &target).ok();
    list.iter()
        .map(|c| {
            let field = |name: &str| c[name].as_str().unwrap_or_default().to_owned();
            (field("status"), field("path"))
        })
        .collect()
}

fn expected(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter()
        .map(|(status, path)| ((*status).to_owned(), (*path).to_owned()))
        .collect()
}

#[test]
fn an_uploaded_file_comes_back_whole_or_in_part() {
    let guest = TestGuest::start();
    let path = guest.path("new/dir/na\"m é.bin");
    let content: Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
    let done: Value = upload(&guest, &path, "file", &content).ok();
    assert_eq!(done, json!({"success": true, "file_size": content.len()}));
    let target = format!("/api/file/download?path={}", encode(&path));
    let whole = get(&guest, &target);
    assert_eq!((whole.status, whole.body == content), (200, true));
    assert_eq!(
        whole.header("content-type"),
        Some("application/octet-stream")
    );
    assert_eq!(
        whole.header("content-disposition"),
        Some("attachment; filename*=utf-8''na%22m%20%C3%A9.bin")
    );
    assert!(
        whole
            .header("last-modified")
            .is_some_and(|date| date.ends_with(" GMT"))
    );
    let tag = whole.header("etag").expect("a tag").to_owned();
    let part = |range: &str, version: &str| {
        let fields = [("range", range), ("if-range", version)];
        guest.connect().send("GET", &target, &fields, b"")
    };
    let some = part("bytes=2-4", &tag);
    assert_eq!((some.status, some.body.as_slice()), (206, &content[2..5]));
    assert_eq!(some.header("content-range"), Some("bytes 2-4/3145728"));
    assert_eq!(part("bytes=99999999-", &tag).status, 416);
    assert_eq!(part("bytes=2-4", "\"other\"").status, 200);
    upload(&guest, &path, "file", b"shorter");
    assert_eq!(get(&guest, &target).body, b"shorter");
    assert_ne!(get(&guest, &target).header("etag"), Some(tag.as_str()));
}

#[test]
fn file_requests_that_make_no_sense_are_refused_in_known_words() {
    let guest = TestGuest::start();
    write(&guest.work(), "file", "x");
    let path = |name: &str| guest.path(name);
    let directory = path("");
    assert_eq!(
        refusal(&upload(&guest, "rel", "file", b"")),
        refused(400, "Path must be absolute")
    );
    assert_eq!(
        refusal(&upload(&guest, &directory, "file", b"")),
        refused(400, "Path is a directory")
    );
    assert_eq!(
        refusal(&upload(&guest, &path("file/below"), "file", b"")),
        refused(400, "A parent of the path is not a directory")
    );
    assert_eq!(upload(&guest, &path("y"), "other", b"").status, 422);
    assert!(!guest.work().join("y").exists());
    let download = |path: &str| refusal(&get(&guest, &format!("/api/file/download?path={path}")));
    assert_eq!(download("rel"), refused(400, "Path must be absolute"));
    assert_eq!(download(&path("none")), refused(404, "File not found"));
    assert_eq!(download(&directory), refused(400, "Path is not a file"));
    assert_eq!(download("/dev/zero"), refused(400, "Path is not a file"));
    let make = |path: &str| {
        guest.send(
            "POST",
            &format!("/api/file/create_directory?path={path}"),
            b"",
        )
    };
    assert_eq!(make(&path("a/b/c")).status, 200);
    assert_eq!(make(&path("a/b/c")).status, 200);
    assert_eq!(
        refusal(&make(&path("file"))),
        refused(400, "Path exists and is not a directory")
    );
    assert!(guest.work().join("a/b/c").is_dir());
}

#[test]
fn directories_are_listed_in_pages() {
    let guest = TestGuest::start();
    for name in ["b", "a", ".h", "c"] {
        fs::create_dir_all(guest.work().join(name)).expect("mkdir");
    }
    write(&guest.work(), "file", "x");
    let list = |more: &str| -> Value {
        let target = format!("/api/file/search_subdirs?path={}{more}", guest.path(""));
        get(&guest, &target).ok()
    };
    let names = |page: &Value| -> Vec<String> {
        let items = page["items"].as_array().expect("items").clone();
        items
            .iter()
            .map(|i| i["name"].as_str().unwrap_or("").to_owned())
            .collect()
    };
    let first = list("&limit=2");
    assert_eq!(
        (names(&first), &first["next_page_id"]),
        (vec!["a".into(), "b".into()], &json!("c"))
    );
    let second = list("&limit=2&page_id=c");
    assert_eq!(
        (names(&second), &second["next_page_id"]),
        (vec!["c".into()], &Value::Null)
    );
    assert_eq!(names(&list("&include_hidden=true")).len(), 4);
    let home: Value = get(&guest, "/api/file/home").ok();
    assert!(home["home"].is_string() && home["locations"].is_array());
}

#[test]
fn changes_of_a_work_tree_are_those_of_the_contract() {
    let guest = TestGuest::start();
    let repo = repository(&guest);
    let all = [
        ("ADDED", ".gitignore"),
        ("UPDATED", "b"),
        ("DELETED", "gone"),
        ("ADDED", "moved"),
        ("DELETED", "mv"),
        ("ADDED", "n w"),
        ("ADDED", "s/t/u"),
    ];
    assert_eq!(changes(&guest, &repo, ""), expected(&all));
    assert_eq!(changes(&guest, &repo, "&ref=HEAD~1"), expected(&all));
    assert_eq!(
        changes(&guest, &repo.join("s"), ""),
        expected(&[("ADDED", "t/u")])
    );
    assert_eq!(changes(&guest, &guest.work(), "")[0].1, "repo/.gitignore");
    assert_eq!(changes(&guest, Path::new("/nonexistent"), ""), []);
    assert_eq!(changes(&guest, &repo.join("a"), ""), []);
    for reference in ["nope", "--output=stolen", "HEAD:a"] {
        let target = format!("/api/git/changes?path={}&ref={reference}", repo.display());
        let (status, text) = refusal(&get(&guest, &target));
        assert!(
            status == 400 && text.starts_with("Git command failed: git"),
            "{text}"
        );
    }
    assert!(!repo.join("stolen").exists());
}

#[test]
fn changes_are_counted_from_where_the_work_began() {
    let guest = TestGuest::start();
    let work = guest.work();
    repository(&guest);
    git(&work, "clone -q --bare repo origin.git");
    git(&work, "clone -q origin.git clone");
    let clone = work.join("clone");
    write(&clone, "a", "local\n");
    git(&clone, "commit -q -a -m local");
    write(&clone, "b", "dirty\n");
    let both = expected(&[("UPDATED", "a"), ("UPDATED", "b")]);
    assert_eq!(changes(&guest, &clone, ""), both, "against origin/main");
    git(&clone, "push -q origin main");
    git(&clone, "checkout -q -b feature");
    write(&clone, "f", "f\n");
    git(&clone, "add f");
    git(&clone, "commit -q -m feature");
    let feature = expected(&[("UPDATED", "b"), ("ADDED", "f")]);
    assert_eq!(
        changes(&guest, &clone, ""),
        feature,
        "against the fork from origin's default"
    );
    git(&clone, "push -q origin feature");
    git(&clone, "checkout -q b");
    let pushed = expected(&[("ADDED", "f")]);
    assert_eq!(
        changes(&guest, &clone, ""),
        pushed,
        "clean and pushed: the default branch"
    );
    git(&clone, "remote remove origin");
    assert_eq!(changes(&guest, &clone, ""), pushed, "against local main");
    git(&clone, "checkout -q --detach");
    git(&clone, "branch -q -D main");
    assert_eq!(changes(&guest, &clone, ""), [], "against HEAD");
    let empty = work.join("empty");
    fs::create_dir(&empty).expect("mkdir");
    git(&empty, "init -q .");
    write(&empty, "a", "a\n");
    assert_eq!(changes(&guest, &empty, ""), expected(&[("ADDED", "a")]));
    // A repository inside a repository reports for itself.
    let nested = clone.join("nested");
    fs::create_dir(&nested).expect("mkdir");
    git(&nested, "init -q .");
    write(&nested, "n", "n\n");
    assert_eq!(
        changes(&guest, &clone, ""),
        expected(&[("ADDED", "nested/n")])
    );
}

#[test]
fn a_file_is_compared_with_its_base_or_across_a_commit() {
    let guest = TestGuest::start();
    let repo = repository(&guest);
    let diff = |name: &str, more: &str| {
        let path = encode(&repo.join(name).to_string_lossy());
        get(&guest, &format!("/api/git/diff?path={path}{more}"))
    };
    let texts = |answer: &Answer| -> (Value, Value) {
        let body: Value = answer.ok();
        (body["original"].clone(), body["modified"].clone())
    };
    let pair = |original: &str, modified: &str| (json!(original), json!(modified));
    assert_eq!(texts(&diff("b", "")), pair("1\n2\n3", "1\n2\n3\n4"));
    assert_eq!(texts(&diff("b", "&ref=HEAD~1")), pair("1\n2", "1\n2\n3\n4"));
    assert_eq!(texts(&diff("gone", "")), pair("g", ""));
    assert_eq!(texts(&diff("n w", "")), pair("", "new"));
    fs::write(repo.join("binary"), b"\0\xff").expect("write");
    assert_eq!(texts(&diff("binary", "")), pair("", ""));
    let outside = get(&guest, &format!("/api/git/diff?path={}", guest.path("f")));
    assert_eq!(texts(&outside), (Value::Null, Value::Null));
    assert_eq!(refusal(&diff("none", "")).0, 400);
    assert_eq!(refusal(&diff("s", "")).0, 400);
    fs::write(repo.join("huge"), vec![b'x'; 1_200_000]).expect("write");
    assert_eq!(
        refusal(&diff("huge", "")),
        refused(
            400,
            "File too large for git diff: 1200000 bytes (max: 1048576 bytes)"
        )
    );
    let list: Value = get(&guest, &format!("/api/git/commits?path={}", repo.display())).ok();
    let sha = |n: usize| {
        list["commits"][n]["sha"]
            .as_str()
            .expect("a commit")
            .to_owned()
    };
    assert_eq!(list["commits"][0]["subject"], "second");
    assert_eq!(list["commits"][0]["author"], "A B");
    assert_eq!(list["has_more"], false);
    assert_eq!(
        texts(&diff("b", &format!("&commit={}", sha(0)))),
        pair("1\n2", "1\n2\n3")
    );
    assert_eq!(
        texts(&diff("b", &format!("&commit={}", sha(1)))),
        pair("", "1\n2")
    );
    assert_eq!(diff("b", "&commit=zz").status, 422);
    assert_eq!(
        refusal(&diff("b", &format!("&commit={}&ref=HEAD", sha(0)))),
        refused(400, "'ref' and 'commit' are mutually exclusive")
    );
    let of = format!(
        "/api/git/commits/{}/changes?path={}",
        &sha(0)[..8],
        repo.join("s").display()
    );
    assert_eq!(
        get(&guest, &of).ok::<Value>(),
        json!([{"status": "UPDATED", "path": "b"}])
    );
    let one: Value = get(
        &guest,
        &format!("/api/git/commits?limit=1&path={}", repo.display()),
    )
    .ok();
    assert_eq!(one["has_more"], true);
}

#[test]
fn a_directory_is_archived_without_what_can_be_made_again() {
    let guest = TestGuest::start();
    let repo = repository(&guest);
    for name in ["node_modules/m", "x.pyc", "sub/target/t", "keep/d.txt"] {
        write(&repo, name, name);
    }
    std::os::unix::fs::symlink("/etc/passwd", repo.join("link")).expect("symlink");
    let archive = |more: &str| {
        get(
            &guest,
            &format!("/api/file/archive?path={}{more}", repo.display()),
        )
    };
    let packed = archive("&format=tar.gz&exclude=*.txt");
    assert_eq!(
        packed.header("content-disposition"),
        Some("attachment; filename=\"repo.tar.gz\"")
    );
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(packed.body.as_slice()));
    let names: Vec<String> = tar
        .entries()
        .expect("a tar stream")
        .map(|entry| {
            let entry = entry.expect("an entry");
            entry.path().expect("a path").to_string_lossy().into_owned()
        })
        .collect();
    assert_eq!(
        names,
        [
            "repo",
            "repo/.gitignore",
            "repo/a",
            "repo/b",
            "repo/ign",
            "repo/keep",
            "repo/link",
            "repo/moved",
            "repo/n w",
            "repo/s",
            "repo/s/t",
            "repo/s/t/u",
            "repo/s/x",
            "repo/sub",
            "repo/archive_manifest.json",
        ]
    );
    // The default is a patch; without a remote it holds everything.
    let patch = archive("");
    assert_eq!(patch.header("x-archive-branch"), Some("main"));
    let text = patch.text();
    assert!(text.contains("+++ b/a\n") && text.contains("+++ b/n w\t\n"));
    assert!(!text.contains("node_modules") && !text.contains("pyc") && !text.contains("/target/"));
    let delta = archive("&base_ref=HEAD").text();
    assert!(!delta.contains("+++ b/a\n") && delta.contains("+++ b/keep/d.txt\n"));
    assert_eq!(archive("&base_ref=nope").status, 400);
    assert_eq!(archive("&format=zip").status, 422);
    let file = get(
        &guest,
        &format!("/api/file/archive?path={}/a", repo.display()),
    );
    assert_eq!(refusal(&file), refused(400, "Path is not a directory"));
    let status = Command::new("git")
        .args(["status", "--porcelain", "n w"])
        .current_dir(&repo)
        .output()
        .expect("git runs");
    assert!(
        status.stdout.starts_with(b"??"),
        "the repository's own index is untouched"
    );
}

#[test]
fn without_git_the_answer_says_so() {
    let guest = TestGuest::start_with(|command, _| {
        command.env("PATH", "/nonexistent");
    });
    let answer = get(&guest, &format!("/api/git/changes?path={}", guest.path("")));
    assert_eq!(
        refusal(&answer),
        refused(400, "git is not installed in this image")
    );
}
