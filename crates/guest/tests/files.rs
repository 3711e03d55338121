//! Files over the wire.

mod common;

use common::{TestGuest, encode};
use flate2::read::GzDecoder;
use skyrl_protocol::guest::{ErrorCode, FileKind, FileList, FileStat, TarSummary};
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn target(guest: &TestGuest, route: &str, name: &str, rest: &str) -> String {
    format!("/v1/{route}?path={}{rest}", encode(&guest.path(name)))
}

#[test]
fn a_file_is_written_read_in_ranges_and_removed() {
    let guest = TestGuest::start();
    let file = |rest: &str| target(&guest, "file", "new dir/ü.bin", rest);
    let content: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
    let missing = guest.send("PUT", &file(""), &content).error();
    assert_eq!(missing.code, ErrorCode::NotFound);
    assert_eq!(
        guest
            .send("PUT", &file("&parents=true&mode=750"), &content)
            .status,
        200
    );
    let mode = fs::metadata(guest.path("new dir/ü.bin")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o750);
    let whole = guest.send("GET", &file(""), b"");
    assert!(whole.body == content && whole.header("skyrl-size") == Some("1000000"));
    let part = guest.send("GET", &file("&offset=999990&limit=100"), b"");
    assert_eq!(part.body, content[999_990..]);
    assert_eq!(guest.send("GET", &file("&offset=2000000"), b"").body, b"");
    let head = guest.send("HEAD", &file(""), b"");
    assert_eq!(
        (head.header("content-length"), head.body.len()),
        (Some("1000000"), 0)
    );
    assert_eq!(guest.send("DELETE", &file(""), b"").status, 200);
    assert_eq!(
        guest.send("GET", &file(""), b"").error().code,
        ErrorCode::NotFound
    );
}

#[test]
fn what_is_no_plain_file_is_refused_at_once() {
    let guest = TestGuest::start();
    guest.shell("mkfifo fifo; ln -s fifo link; mkdir d; touch d/x");
    let code = |method: &str, name: &str| {
        guest
            .send(method, &target(&guest, "file", name, ""), b"x")
            .error()
            .code
    };
    assert_eq!(code("GET", "d"), ErrorCode::Conflict);
    assert_eq!(code("GET", "fifo"), ErrorCode::BadRequest);
    assert_eq!(code("PUT", "d"), ErrorCode::Conflict);
    assert_eq!(code("PUT", "link"), ErrorCode::BadRequest);
    assert_eq!(code("DELETE", "d"), ErrorCode::Conflict);
    assert_eq!(code("PUT", "d/x/y"), ErrorCode::NotFound);
    let bad = guest.send("GET", "/v1/file", b"").error();
    assert_eq!(bad.code, ErrorCode::BadRequest);
    let mode = target(&guest, "file", "f", "&mode=9");
    assert_eq!(
        guest.send("PUT", &mode, b"").error().code,
        ErrorCode::BadRequest
    );
    let root = guest.send("DELETE", "/v1/file?path=/tmp/..&recursive=1", b"");
    assert_eq!(root.error().code, ErrorCode::BadRequest);
}

#[test]
fn files_of_unknown_size_are_read_to_their_end() {
    let guest = TestGuest::start();
    let answer = guest.send("GET", "/v1/file?path=/proc/self/status", b"");
    assert!(answer.text().contains("skyrl-guest"), "{}", answer.text());
}

#[test]
fn directories_are_listed_and_described() {
    let guest = TestGuest::start();
    guest.shell("mkdir -m 700 d; printf abc > d/b; ln -s b d/a; touch d/c");
    let list: FileList = guest
        .send("GET", &target(&guest, "file/list", "d", "&limit=2"), b"")
        .ok();
    let names: Vec<&str> = list.entries.iter().map(|e| e.name.as_str()).collect();
    assert!(list.truncated);
    assert_eq!(names, ["a", "b"]);
    assert_eq!(list.entries[0].target.as_deref(), Some("b"));
    assert_eq!(
        (list.entries[1].kind, list.entries[1].size),
        (FileKind::File, 3)
    );
    let stat: FileStat = guest
        .send("GET", &target(&guest, "file/stat", "d", ""), b"")
        .ok();
    assert_eq!((stat.kind, stat.mode), (FileKind::Directory, 0o700));
    let none = guest.send("GET", &target(&guest, "file/stat", "none", ""), b"");
    assert_eq!(none.error().code, ErrorCode::NotFound);
}

#[test]
fn a_directory_travels_as_tar_both_ways() {
    let guest = TestGuest::start();
    guest.shell("mkdir -p src/sub; echo one > src/sub/f; chmod 640 src/sub/f; ln -s sub/f src/l");
    for gzip in ["", "&gzip=true"] {
        let packed = guest.send("GET", &target(&guest, "tar", "src", gzip), b"");
        assert_eq!(packed.status, 200);
        let copy = target(&guest, "tar", "copy/here", gzip);
        let summary: TarSummary = guest.send("PUT", &copy, &packed.body).ok();
        assert_eq!((summary.entries, summary.bytes), (4, 4));
        let diff = guest.shell("diff -r src copy/here && readlink copy/here/l && rm -r copy");
        assert_eq!(diff.stdout.text, "sub/f\n", "{}", diff.stderr.text);
    }
    let packed = guest.send("GET", &target(&guest, "tar", "src/sub/f", "&gzip=1"), b"");
    let mut tar = tar::Archive::new(GzDecoder::new(packed.body.as_slice()));
    let mut entry = tar.entries().unwrap().next().unwrap().unwrap();
    assert_eq!(entry.path().unwrap().to_str(), Some("f"));
    let mut text = String::new();
    entry.read_to_string(&mut text).unwrap();
    assert_eq!(
        (text.as_str(), entry.header().mode().unwrap()),
        ("one\n", 0o640)
    );
}

#[test]
fn bad_tar_streams_are_refused_with_their_reason() {
    let guest = TestGuest::start();
    let to = target(&guest, "tar", "in", "");
    let error = guest.send("PUT", &to, &[b'x'; 2048]).error();
    assert_eq!(error.code, ErrorCode::BadRequest);
    let zipped = target(&guest, "tar", "in", "&gzip=1");
    assert_eq!(
        guest.send("PUT", &zipped, b"no gzip").error().code,
        ErrorCode::BadRequest
    );
    // Pack something with a name that leaves the target.
    guest.shell("mkdir -p a/b; echo evil > a/evil; cd a/b; tar -cPf ../../slip.tar ../evil");
    let slip = fs::read(guest.path("slip.tar")).unwrap();
    let error = guest.send("PUT", &to, &slip).error();
    assert_eq!(error.code, ErrorCode::BadRequest);
    assert!(error.message.contains("../evil"), "{}", error.message);
    assert!(!fs::exists(guest.path("evil")).unwrap());
    let none = guest.send("GET", &target(&guest, "tar", "none", ""), b"");
    assert_eq!(none.error().code, ErrorCode::NotFound);
}

#[test]
fn a_full_disk_is_called_so_and_leaves_nothing_half_written() {
    let guest = TestGuest::start();
    if !rustix::process::geteuid().is_root() {
        // Mounting is root's; the errno's mapping is the same for everyone.
        return;
    }
    let mount = guest.path("small");
    fs::create_dir(&mount).unwrap();
    let mounted = guest.shell("mount -t tmpfs -o size=256k small small");
    assert!(mounted.success(), "{}", mounted.stderr.text);
    let file = target(&guest, "file", "small/f", "");
    assert_eq!(guest.send("PUT", &file, b"old").status, 200);
    let error = guest.send("PUT", &file, &[1; 1 << 20]).error();
    assert_eq!(error.code, ErrorCode::DiskFull);
    assert_eq!(fs::read(guest.path("small/f")).unwrap(), b"old");
    assert_eq!(fs::read_dir(&mount).unwrap().count(), 1);
    assert!(guest.shell("umount small").success());
}

#[test]
fn another_users_file_stays_theirs() {
    let guest = TestGuest::start();
    if !rustix::process::geteuid().is_root() {
        return;
    }
    guest.shell("echo old > f; chown 1234:4321 f; chmod 604 f");
    guest.send("PUT", &target(&guest, "file", "f", ""), b"new");
    let found = fs::metadata(guest.path("f")).unwrap();
    assert_eq!((found.uid(), found.gid()), (1234, 4321));
    assert_eq!(found.permissions().mode() & 0o7777, 0o604);
    assert_eq!(fs::read(guest.path("f")).unwrap(), b"new");
}

#[test]
fn a_broken_upload_leaves_no_trace() {
    let guest = TestGuest::start();
    let mut client = guest.connect();
    let file = target(&guest, "file", "f", "");
    client.write(format!("PUT {file} HTTP/1.1\r\ncontent-length: 1000\r\n\r\nhalf").as_bytes());
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let answer = client.read_answer(false).unwrap();
    assert_eq!(answer.error().code, ErrorCode::BadRequest);
    assert_eq!(fs::read_dir(guest.work()).unwrap().count(), 0);
}
