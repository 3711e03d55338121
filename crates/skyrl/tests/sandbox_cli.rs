//! `skyrl sandbox` as a user types it.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn skyrl(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skyrl"));
    command.env("SKYRL_STATE_DIR", state);
    command
}

fn run(state: &Path, args: &[&str]) -> Output {
    skyrl(state).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

fn owners(state: &Path) -> usize {
    std::fs::read_dir(state.join("owners")).map_or(0, Iterator::count)
}

/// A sandbox that sleeps, started and ready.
fn sleeper(state: &Path) -> Child {
    let child = skyrl(state)
        .args(["sandbox", "run", "--", "sleep", "1000"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the sandbox is listed as ready", || {
        text(&run(state, &["sandbox", "ls"]).stdout).contains("ready")
    });
    child
}

#[test]
fn a_command_gives_its_output_and_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(
        dir.path(),
        &[
            "sandbox",
            "run",
            "-e",
            "WHO=you",
            "--",
            "sh",
            "-c",
            "echo hello $WHO; echo talk >&2; exit 3",
        ],
    );
    assert_eq!(
        text(&output.stdout),
        "hello you\n",
        "{}",
        text(&output.stderr)
    );
    assert_eq!(text(&output.stderr), "talk\n");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(owners(dir.path()), 0, "the owner's directory stayed");
}

#[test]
fn a_signal_and_a_time_limit_are_told_as_a_shell_does() {
    let dir = tempfile::tempdir().unwrap();
    let killed = run(
        dir.path(),
        &["sandbox", "run", "--", "sh", "-c", "kill -9 $$"],
    );
    assert_eq!(killed.status.code(), Some(137), "{}", text(&killed.stderr));
    let slow = run(
        dir.path(),
        &["sandbox", "run", "--timeout", "1", "--", "sleep", "60"],
    );
    assert_eq!(slow.status.code(), Some(124), "{}", text(&slow.stderr));
    assert!(text(&slow.stderr).contains("time limit"));
}

#[test]
fn standard_input_is_handed_over_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = skyrl(dir.path())
        .args(["sandbox", "run", "-i", "--", "wc", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"12345").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout).trim(), "5");
}

#[test]
fn wrong_usage_says_what_is_wrong_and_ends_with_2() {
    let dir = tempfile::tempdir().unwrap();
    for (args, expected) in [
        (
            vec!["sandbox", "run", "--memory", "0", "--", "true"],
            "positive number",
        ),
        (
            vec!["sandbox", "run", "--engine", "docker", "--", "true"],
            "native, oci and podman",
        ),
        (
            vec!["sandbox", "run", "--image", "a b", "--", "true"],
            "not an image reference",
        ),
        (vec!["sandbox", "rm", "absent"], "hint: `skyrl sandbox ls`"),
        (vec!["sandbox", "run"], "<COMMAND>"),
    ] {
        let output = run(dir.path(), &args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
    }
}

#[test]
fn an_interrupted_run_removes_its_sandbox_and_ends_with_6() {
    let dir = tempfile::tempdir().unwrap();
    let child = sleeper(dir.path());
    signal(&child, "TERM");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(6));
    assert!(text(&output.stderr).contains("cancelled by SIGTERM"));
    assert_eq!(owners(dir.path()), 0);
}

#[test]
fn a_killed_run_is_listed_as_dead_and_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = sleeper(dir.path());
    child.kill().unwrap();
    child.wait().unwrap();
    let listed = text(&run(dir.path(), &["sandbox", "ls"]).stdout);
    assert!(listed.contains("(dead)"), "{listed}");
    let pruned = run(dir.path(), &["sandbox", "prune"]);
    assert!(pruned.status.success(), "{}", text(&pruned.stderr));
    assert!(text(&pruned.stderr).contains("1 dead owners removed"));
    assert_eq!(owners(dir.path()), 0);
}

#[test]
fn a_living_sandbox_can_be_ended_from_another_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let child = sleeper(dir.path());
    let json = text(&run(dir.path(), &["sandbox", "ls", "--json"]).stdout);
    let rows: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(rows[0]["owner_alive"], true);
    let removed = run(
        dir.path(),
        &["sandbox", "rm", rows[0]["id"].as_str().unwrap()],
    );
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    let output = child.wait_with_output().unwrap();
    // Either the command's end by SIGTERM was still told, or the sandbox's.
    let told = output.status.code() == Some(143) || text(&output.stderr).contains("ended");
    assert!(told, "{}", text(&output.stderr));
    assert_eq!(owners(dir.path()), 0);
}

#[test]
fn probe_explains_every_engine_and_the_choice() {
    let dir = tempfile::tempdir().unwrap();
    let table = run(dir.path(), &["sandbox", "probe"]);
    let stdout = text(&table.stdout);
    assert!(table.status.success(), "{stdout}");
    for word in ["native", "oci", "podman", "auto takes"] {
        assert!(stdout.contains(word), "{stdout}");
    }
    let json = text(&run(dir.path(), &["sandbox", "probe", "--json"]).stdout);
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["engines"].as_array().unwrap().len(), 3);
}

#[test]
fn a_shell_is_interactive_on_a_real_terminal() {
    let dir = tempfile::tempdir().unwrap();
    // `script` gives the command a terminal of its own.
    let line = format!("{} sandbox shell", env!("CARGO_BIN_EXE_skyrl"));
    let mut child = Command::new("script")
        .args(["-q", "-e", "-c", &line, "/dev/null"])
        .env("SKYRL_STATE_DIR", dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keys = child.stdin.take().unwrap();
    let mut screen = child.stdout.take().unwrap();
    let (sender, seen) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 1024];
        while let Ok(length @ 1..) = screen.read(&mut bytes) {
            let _ = sender.send(text(&bytes[..length]));
        }
    });
    let mut shown = String::new();
    let until = |mark: &str, shown: &mut String| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !shown.contains(mark) {
            assert!(Instant::now() < deadline, "no {mark:?} in {shown:?}");
            shown.push_str(
                &seen
                    .recv_timeout(Duration::from_millis(200))
                    .unwrap_or_default(),
            );
        }
    };
    until("#", &mut shown);
    keys.write_all(b"tty; echo $((40 + 2))\r").unwrap();
    until("/dev/pts/", &mut shown);
    until("42", &mut shown);
    // An interrupt ends what runs inside, not the session.
    keys.write_all(b"sleep 1000\r").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    keys.write_all(b"\x03").unwrap();
    keys.write_all(b"echo a''live\r").unwrap();
    until("alive", &mut shown);
    keys.write_all(b"exit 5\r").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5), "{shown}");
    assert_eq!(owners(dir.path()), 0);
}
