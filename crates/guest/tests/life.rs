//! How the guest begins and ends, and what it needs of the image: as a plain
//! process and as PID 1 of a pid namespace.

mod common;

use common::{GUEST, TestGuest, eventually, is_alive, kill};
use skyrl_protocol::guest::{
    CommandStatus, ErrorCode, ExecRequest, ExecResult, Lease, TerminalRequest,
};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn start(guest: &TestGuest, line: &str) -> CommandStatus {
    guest.post("/v1/commands", &ExecRequest::shell(line)).ok()
}

/// Starts a command with descendants of every kind; all their pids.
fn start_family(guest: &TestGuest) -> Vec<i32> {
    let line = "trap '' TERM HUP INT; echo $$; sleep 1000 & echo $!; \
                setsid sleep 1000 & echo $!; (setsid sh -c 'echo $$; sleep 1000; true' &); wait; wait";
    let id = start(guest, line).id;
    let output = format!("/v1/commands/{id}/output");
    let mut pids = Vec::new();
    eventually("the family is there", || {
        let text = guest.send("GET", &output, b"").text();
        pids = text.lines().filter_map(|line| line.parse().ok()).collect();
        pids.len() == 4
    });
    pids
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn sigterm_ends_everything_and_removes_the_socket() {
    let mut guest = TestGuest::start();
    let polite = start(
        &guest,
        "trap 'echo bye > said; exit' TERM; sleep 1000 & wait",
    );
    let family = start_family(&guest);
    assert!(is_alive(polite.pid));
    let begin = Instant::now();
    guest.signal(libc::SIGTERM);
    let status = guest.await_end(Duration::from_secs(10));
    assert_eq!(status.code(), Some(0));
    assert!(
        begin.elapsed() > Duration::from_millis(1900),
        "no grace was given"
    );
    assert!(!family.iter().any(|pid| is_alive(*pid)), "{family:?}");
    assert_eq!(fs::read_to_string(guest.path("said")).unwrap(), "bye\n");
    assert!(!guest.socket.exists());
}

#[test]
fn sigterm_without_commands_ends_the_guest_at_once() {
    let mut guest = TestGuest::start();
    let begin = Instant::now();
    guest.signal(libc::SIGTERM);
    guest.await_end(Duration::from_secs(5));
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn other_signals_are_passed_on() {
    let guest = TestGuest::start();
    let id = start(
        &guest,
        "trap 'echo hup; exit 3' HUP; echo ready; sleep 1000 & wait",
    )
    .id;
    let target = format!("/v1/commands/{id}");
    eventually("the trap is set", || {
        guest.send("GET", &format!("{target}/output"), b"").text() == "ready\n"
    });
    guest.signal(libc::SIGHUP);
    let status: CommandStatus = guest
        .send("GET", &format!("{target}?wait_ms=10000"), b"")
        .ok();
    let result = status.result.unwrap();
    assert_eq!(
        (result.exit_code, result.stdout.text.as_str()),
        (Some(3), "ready\nhup\n")
    );
    assert_eq!(guest.health().status, "ok");
}

#[test]
fn a_lease_that_is_not_renewed_ends_everything() {
    let mut guest = TestGuest::start_with(|command, _| {
        command.args(["--lease", "60"]);
    });
    let lease = |seconds| {
        let lease = serde_json::to_vec(&Lease { seconds }).unwrap();
        assert_eq!(guest.send("PUT", "/v1/lease", &lease).status, 200);
    };
    let family = start_family(&guest);
    lease(1);
    lease(0);
    std::thread::sleep(Duration::from_millis(1500));
    for _ in 0..3 {
        lease(1);
        std::thread::sleep(Duration::from_millis(500));
    }
    guest.await_end(Duration::from_secs(10));
    assert!(!family.iter().any(|pid| is_alive(*pid)), "{family:?}");
}

#[test]
fn a_lease_does_not_run_while_the_guest_is_frozen() {
    let mut guest = TestGuest::start_with(|command, _| {
        command.args(["--lease", "2"]);
    });
    guest.signal(libc::SIGSTOP);
    std::thread::sleep(Duration::from_secs(5));
    guest.signal(libc::SIGCONT);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(guest.health().status, "ok");
    guest.await_end(Duration::from_secs(10));
}

#[test]
fn a_socket_may_have_a_long_path_and_a_stale_predecessor() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
    fs::create_dir_all(&deep).unwrap();
    let socket = deep.join("guest.sock");
    let mut guest = Command::new(GUEST)
        .arg("--listen")
        .arg(&socket)
        .spawn()
        .unwrap();
    eventually("it listens", || socket.exists());
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    kill(guest.id() as i32, libc::SIGKILL);
    guest.wait().unwrap();
    assert!(socket.exists());
    let mut guest = Command::new(GUEST)
        .arg("--listen")
        .arg(&socket)
        .spawn()
        .unwrap();
    // Reachable through a short name.
    let short = dir.path().join("s");
    std::os::unix::fs::symlink(&socket, &short).unwrap();
    eventually("the next one listens", || {
        std::os::unix::net::UnixStream::connect(&short).is_ok()
    });
    kill(guest.id() as i32, libc::SIGTERM);
    guest.wait().unwrap();
    fs::write(&socket, "not a socket").unwrap();
    let refused = Command::new(GUEST)
        .arg("--listen")
        .arg(&socket)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(refused.code(), Some(1));
    assert_eq!(fs::read_to_string(&socket).unwrap(), "not a socket");
}

#[test]
fn nothing_inherited_but_the_listener_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("g.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let secret = fs::File::open("/etc/passwd").unwrap();
    let (fd, leaked) = (listener.as_raw_fd(), secret.as_raw_fd());
    let mut command = Command::new(GUEST);
    command.args(["--listen-fd", "9"]).stdin(Stdio::null());
    // SAFETY: only duplicates descriptors between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::dup2(fd, 9);
            libc::dup2(leaked, 33);
            libc::close(0);
            Ok(())
        });
    }
    let guest = TestGuest {
        dir,
        child: command.spawn().unwrap(),
        socket,
    };
    assert_eq!(guest.health().status, "ok");
    let own = format!("/proc/{}/fd", guest.child.id());
    let links: Vec<PathBuf> = fs::read_dir(&own)
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .collect();
    assert!(!links.contains(&PathBuf::from("/etc/passwd")), "{links:?}");
    assert!(Path::new(&own).join("0").exists());
    assert_eq!(guest.shell("cat; echo end").stdout.text, "end\n");
}

#[test]
fn a_kill_for_lack_of_memory_is_told_from_others() {
    let dir = tempfile::tempdir().unwrap();
    let events = dir.path().join("memory.events");
    fs::write(&events, "oom 0\noom_kill 2\n").unwrap();
    let opened = fs::File::open(&events).unwrap();
    let fd = opened.as_raw_fd();
    let guest = TestGuest::start_with(|command, _| {
        command.args(["--oom-fd", "9"]);
        // SAFETY: only duplicates a descriptor between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::dup2(fd, 9);
                Ok(())
            });
        }
    });
    let count = format!("echo oom_kill 3 > {}", events.display());
    assert!(!guest.shell("kill -9 $$").oom_killed);
    assert!(guest.shell(&format!("{count}; kill -9 $$")).oom_killed);
    assert!(!guest.shell("kill -9 $$").oom_killed, "an earlier kill");
    // Somebody else's misfortune does not spoil a success.
    assert!(!guest.shell(&format!("{count}4; true")).oom_killed);
}

#[test]
fn wrong_usage_is_explained() {
    for arguments in [
        &[][..],
        &["--listen"],
        &["--listen-fd", "x"],
        &["--what", "1"],
    ] {
        let output = Command::new(GUEST).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage:"));
    }
    let closed = Command::new(GUEST)
        .args(["--listen-fd", "77"])
        .output()
        .unwrap();
    assert_eq!(closed.status.code(), Some(1));
}

/// Starts a guest as PID 1 of a pid namespace of its own with its own `/proc`,
/// after `prepare` (shell) ran in its mount namespace; `{dir}` in it is the
/// temporary directory. The child process is `unshare`.
fn start_as_init(prepare: &str, run: &str) -> TestGuest {
    TestGuest::start_with(|command, dir| {
        let text = dir.to_str().unwrap();
        let mut arguments: Vec<String> = command
            .get_args()
            .map(|argument| argument.to_str().unwrap().to_owned())
            .collect();
        arguments.insert(0, GUEST.to_owned());
        let script = format!("{prepare}\n{run} \"$@\"").replace("{dir}", text);
        *command = Command::new("unshare");
        command
            .args(["--pid", "--mount", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-ec", &script, "sh"])
            .args(arguments)
            .stdin(Stdio::null());
    })
}

/// The host's pid of the guest in the namespace that `unshare` made.
fn init_pid(guest: &TestGuest) -> i32 {
    let parent = guest.child.id();
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    children.split_whitespace().next().unwrap().parse().unwrap()
}

/// Ends a guest that [`start_as_init`] started.
fn end_init(guest: &mut TestGuest) {
    kill(init_pid(guest), libc::SIGTERM);
    guest.await_end(Duration::from_secs(10));
}

fn require_root(what: &str) -> bool {
    if !is_root() {
        eprintln!("{what} needs root to make namespaces; the rest runs as anyone");
    }
    is_root()
}

#[test]
fn as_pid_1_it_reaps_ends_and_takes_all_along() {
    if !require_root("PID 1") {
        return;
    }
    let mut guest = start_as_init("", "exec");
    assert_eq!(guest.shell("echo $PPID").stdout.text, "1\n");
    for _ in 0..20 {
        guest.shell("(true &); (sleep 0.01 &)");
    }
    eventually("no zombies", || {
        !guest.shell("ps -e -o stat=").stdout.text.contains('Z')
    });
    start_family(&guest);
    let init = init_pid(&guest);
    let inside = |what: &str| {
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(what)
            })
            .count()
    };
    assert!(inside(guest.socket.to_str().unwrap()) >= 1);
    // A kill from inside does not reach PID 1.
    guest.shell("kill -9 1; kill -TERM -1 2>/dev/null; true");
    assert_eq!(guest.health().status, "ok");
    kill(init, libc::SIGTERM);
    guest.await_end(Duration::from_secs(10));
    assert!(!is_alive(init));
}

#[test]
fn killed_as_pid_1_it_leaves_nothing() {
    if !require_root("PID 1") {
        return;
    }
    let mut guest = start_as_init("", "exec");
    let mark = format!("sleep 1000.{}", std::process::id());
    start(&guest, &format!("setsid {mark} & {mark} & exec {mark}"));
    let count = || {
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| fs::read(entry.unwrap().path().join("cmdline")).ok())
            .filter(|line| String::from_utf8_lossy(line).replace('\0', " ").trim() == mark)
            .count()
    };
    eventually("all run", || count() == 3);
    kill(init_pid(&guest), libc::SIGKILL);
    guest.await_end(Duration::from_secs(10));
    eventually("all are gone", || count() == 0);
}

#[test]
fn an_image_without_a_shell_still_runs_programs() {
    if !require_root("chroot") {
        return;
    }
    let prepare = "mkdir -p {dir}/root/sock; cp $(command -v busybox) {dir}/root/busybox; \
                   cp $1 {dir}/root/guest; mount --bind {dir} {dir}/root/sock";
    let run = "shift; exec chroot {dir}/root /guest --listen /sock/g.sock --workdir /; :";
    let mut guest = start_without_libraries(prepare, run);
    let result = guest.exec(&ExecRequest::argv(["/busybox", "echo", "hi"]));
    assert_eq!(result.stdout.text, "hi\n");
    assert!(
        guest
            .exec(&ExecRequest::argv(["/busybox", "cat"]))
            .stdout
            .text
            .is_empty()
    );
    let error = guest.post("/v1/exec", &ExecRequest::shell("true")).error();
    assert_eq!(error.code, ErrorCode::NoShell);
    assert!(error.message.contains("/bin/sh") && error.hint.is_some());
    let error = guest
        .post("/v1/exec", &ExecRequest::argv(["busybox"]))
        .error();
    assert_eq!(error.code, ErrorCode::CannotExecute);
    // Without /proc only the group is known, and that is killed.
    let mut request = ExecRequest::argv(["/busybox", "sleep", "1000"]);
    request.timeout_ms = Some(100);
    request.grace_ms = 100;
    assert!(guest.exec(&request).timed_out);
    let terminal = guest.connect().send(
        "POST",
        "/v1/terminal",
        &[("upgrade", "skyrl-terminal")],
        &serde_json::to_vec(&TerminalRequest {
            program: None,
            cwd: None,
            env: [].into(),
            user: None,
            columns: 80,
            rows: 24,
        })
        .unwrap(),
    );
    assert_eq!(terminal.error().code, ErrorCode::NotSupported);
    let written = guest.send("PUT", "/v1/file?path=/new/file&parents=1", b"x");
    assert_eq!(written.status, 200);
    end_init(&mut guest);
}

/// Like [`start_as_init`], for a root that has no libraries: the guest's own
/// are copied along, since tests build it dynamically linked.
fn start_without_libraries(prepare: &str, run: &str) -> TestGuest {
    let libraries = "for f in $(ldd $1 | grep -o '/[^ ]*'); do \
                     mkdir -p {dir}/root/$(dirname $f); cp -L $f {dir}/root/$f; done";
    start_as_init(&format!("{prepare}; {libraries}"), run)
}

#[test]
fn a_read_only_root_without_tmp_is_enough() {
    if !require_root("chroot") {
        return;
    }
    let prepare = "mkdir -p {dir}/root/sock {dir}/root/bin; cp $(command -v busybox) {dir}/root/bin/sh; \
                   cp $1 {dir}/root/guest";
    let run = "mount --bind {dir}/root {dir}/root; mkdir {dir}/out; \
               mount --bind {dir} {dir}/root/sock; mount -o remount,bind,ro {dir}/root; \
               shift; exec chroot {dir}/root /guest --listen /sock/g.sock --workdir /work; :";
    let mut guest = start_without_libraries(prepare, run);
    let request = ExecRequest {
        cwd: Some("/".into()),
        ..ExecRequest::shell("echo ok; echo x > /f")
    };
    let result = guest.exec(&request);
    assert_eq!(result.stdout.text, "ok\n");
    assert!(
        result.stderr.text.contains("Read-only"),
        "{}",
        result.stderr.text
    );
    // The default directory could not be made: said when it is needed.
    let error = guest.post("/v1/exec", &ExecRequest::shell("true")).error();
    assert_eq!(error.code, ErrorCode::NotFound);
    assert!(error.message.contains("/work"), "{}", error.message);
    let refused = guest.send("PUT", "/v1/file?path=/f", b"x").error();
    assert_eq!(refused.code, ErrorCode::PermissionDenied);
    end_init(&mut guest);
}

#[test]
fn a_plain_user_is_enough() {
    if !require_root("becoming another user") {
        return;
    }
    let guest = TestGuest::start_with(|command, dir| {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        command.uid(54_321).gid(54_321);
    });
    assert_eq!(
        guest.shell("id -u; pwd").stdout.text,
        format!("54321\n{}\n", guest.work().display())
    );
    let own = ExecRequest {
        user: Some(skyrl_protocol::guest::UserGroup {
            uid: 54_321,
            gid: 54_321,
        }),
        ..ExecRequest::shell("id -g")
    };
    assert_eq!(guest.exec(&own).stdout.text, "54321\n");
    let root = ExecRequest {
        user: Some(skyrl_protocol::guest::UserGroup { uid: 0, gid: 0 }),
        ..ExecRequest::shell("id")
    };
    let error = guest.post("/v1/exec", &root).error();
    assert_eq!(error.code, ErrorCode::PermissionDenied);
    let mut limited = ExecRequest::shell("setsid sleep 1000 & echo $!; sleep 1000");
    limited.timeout_ms = Some(100);
    let result: ExecResult = guest.exec(&limited);
    let child: i32 = result.stdout.text.trim().parse().unwrap();
    eventually("its child is gone", || !is_alive(child));
}

#[test]
fn deleting_all_it_can_see_does_not_hurt_the_guest() {
    let guest = TestGuest::start_with(|command, dir| {
        // A copy, so that the commands can delete the program itself.
        let copy = dir.join("guest");
        fs::copy(GUEST, &copy).unwrap();
        let arguments: Vec<_> = command.get_args().map(|a| a.to_owned()).collect();
        *command = Command::new(copy);
        command.args(arguments).stdin(Stdio::null());
    });
    let mut client = guest.connect();
    let dir = guest.dir.path().to_str().unwrap();
    let request = serde_json::to_vec(&ExecRequest::shell(format!("rm -r {dir}"))).unwrap();
    let result: ExecResult = client.send("POST", "/v1/exec", &[], &request).ok();
    assert!(result.success(), "{}", result.stderr.text);
    let request = ExecRequest {
        cwd: Some("/".into()),
        ..ExecRequest::shell("echo still here")
    };
    let request = serde_json::to_vec(&request).unwrap();
    let result: ExecResult = client.send("POST", "/v1/exec", &[], &request).ok();
    assert_eq!(result.stdout.text, "still here\n");
    // Its own directory is gone, which is said precisely.
    let request = serde_json::to_vec(&ExecRequest::shell("true")).unwrap();
    let error = client.send("POST", "/v1/exec", &[], &request).error();
    assert_eq!(error.code, ErrorCode::NotFound);
}
