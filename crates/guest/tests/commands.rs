//! Commands that outlive the request that started them.

mod common;

use common::{TestGuest, eventually, is_alive};
use skyrl_protocol::guest::{CommandStatus, ErrorCode, ExecRequest, SessionKey, SignalRequest};
use std::time::{Duration, Instant};

fn start(guest: &TestGuest, request: &ExecRequest) -> CommandStatus {
    guest.post("/v1/commands", request).ok()
}

fn wait(guest: &TestGuest, id: &str) -> CommandStatus {
    let status: CommandStatus = guest
        .send("GET", &format!("/v1/commands/{id}?wait_ms=20000"), b"")
        .ok();
    assert!(status.result.is_some(), "{status:?}");
    status
}

#[test]
fn a_command_is_started_watched_and_forgotten() {
    let guest = TestGuest::start();
    let started = start(
        &guest,
        &ExecRequest::shell("echo a; sleep 0.3; echo b; exit 2"),
    );
    assert!(started.id.len() == 32 && started.result.is_none());
    let target = format!("/v1/commands/{}", started.id);
    let running: CommandStatus = guest.send("GET", &format!("{target}?wait_ms=10"), b"").ok();
    assert_eq!(running, started);
    let begin = Instant::now();
    let result = wait(&guest, &started.id).result.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert_eq!(
        (result.exit_code, result.stdout.text.as_str()),
        (Some(2), "a\nb\n")
    );
    let all: Vec<CommandStatus> = guest.send("GET", "/v1/commands", b"").ok();
    assert_eq!(all.len(), 1);
    assert_eq!(guest.send("DELETE", &target, b"").status, 200);
    assert_eq!(
        guest.send("GET", &target, b"").error().code,
        ErrorCode::NotFound
    );
}

#[test]
fn output_is_read_piece_by_piece_by_offset() {
    let guest = TestGuest::start();
    let mut request = ExecRequest::shell("printf 0123456789; printf err >&2");
    request.output_limit = 8;
    let id = start(&guest, &request).id;
    wait(&guest, &id);
    let read = |query: &str| {
        let answer = guest.send("GET", &format!("/v1/commands/{id}/output?{query}"), b"");
        let offset = answer.header("skyrl-offset").unwrap().to_owned();
        assert_eq!(answer.header("skyrl-ended"), Some("true"));
        (offset, answer.text())
    };
    assert_eq!(read("offset=0&limit=2"), ("0".into(), "01".into()));
    assert_eq!(read("offset=2"), ("2".into(), "23".into()));
    // What was dropped is jumped over.
    assert_eq!(read("offset=4"), ("6".into(), "6789".into()));
    assert_eq!(read("offset=10"), ("10".into(), String::new()));
    assert_eq!(read("stream=stderr"), ("0".into(), "err".into()));
    let bad = guest.send("GET", &format!("/v1/commands/{id}/output?stream=x"), b"");
    assert_eq!(bad.error().code, ErrorCode::BadRequest);
}

#[test]
fn input_is_given_while_it_runs() {
    let guest = TestGuest::start();
    let mut request = ExecRequest::argv(["wc", "-c"]);
    request.keep_stdin = true;
    let id = start(&guest, &request).id;
    let target = format!("/v1/commands/{id}/stdin");
    let megabytes = vec![b'x'; 5 << 20];
    assert_eq!(guest.send("POST", &target, &megabytes).status, 200);
    assert_eq!(
        guest
            .send("POST", &format!("{target}?close=true"), b"yz")
            .status,
        200
    );
    let result = wait(&guest, &id).result.unwrap();
    assert_eq!(result.stdout.text.trim(), (megabytes.len() + 2).to_string());
    let late = guest.send("POST", &target, b"late");
    assert_eq!(late.error().code, ErrorCode::Conflict);
    let deaf = start(&guest, &ExecRequest::shell("sleep 0.1")).id;
    let refused = guest.send("POST", &format!("/v1/commands/{deaf}/stdin"), b"x");
    assert_eq!(refused.error().code, ErrorCode::Conflict);
}

#[test]
fn signals_reach_every_process_of_a_command_and_no_other() {
    let guest = TestGuest::start();
    let other = start(&guest, &ExecRequest::shell("sleep 1000"));
    let line = "trap 'echo got; exit 9' USR1; sleep 1000 & echo $!; wait";
    let id = start(&guest, &ExecRequest::shell(line)).id;
    let output = format!("/v1/commands/{id}/output");
    eventually("the trap is set", || {
        guest.send("GET", &output, b"").text().ends_with('\n')
    });
    let child: i32 = guest
        .send("GET", &output, b"")
        .text()
        .trim()
        .parse()
        .unwrap();
    // Until it is `sleep`, the child is a shell that has the trap itself.
    eventually("the child is ready", || {
        std::fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| {
            name == "sleep
"
        })
    });
    let target = format!("/v1/commands/{id}/signal");
    guest
        .post(
            &target,
            &SignalRequest {
                signal: libc::SIGUSR1,
            },
        )
        .ok::<CommandStatus>();
    let result = wait(&guest, &id).result.unwrap();
    assert_eq!(result.exit_code, Some(9));
    assert!(result.stdout.text.ends_with("got\n"));
    eventually("the child is gone", || !is_alive(child));
    assert!(is_alive(other.pid));
    let late = guest.post(&target, &SignalRequest { signal: 9 });
    assert_eq!(late.error().code, ErrorCode::Conflict);
    let wrong = guest.post(&target, &SignalRequest { signal: 0 });
    assert_eq!(wrong.error().code, ErrorCode::BadRequest);
    let gone = format!("/v1/commands/{}", other.id);
    assert_eq!(guest.send("DELETE", &gone, b"").status, 200);
    assert!(!is_alive(other.pid));
}

#[test]
fn stopped_and_deaf_commands_are_deleted_all_the_same() {
    let guest = TestGuest::start();
    let line =
        "trap '' TERM INT HUP; (while :; do sleep 1000; done) & echo $!; kill -STOP $$; wait";
    let started = start(&guest, &ExecRequest::shell(line));
    let output = format!("/v1/commands/{}/output", started.id);
    eventually("it started", || {
        guest.send("GET", &output, b"").text().ends_with('\n')
    });
    let child: i32 = guest
        .send("GET", &output, b"")
        .text()
        .trim()
        .parse()
        .unwrap();
    guest.send("DELETE", &format!("/v1/commands/{}", started.id), b"");
    assert!(!is_alive(started.pid));
    eventually("the child is gone", || !is_alive(child));
}

#[test]
fn a_tree_that_forks_while_it_is_killed_dies() {
    let guest = TestGuest::start();
    // Each generation leaves a child behind and ends.
    let line = "spin() { (sleep 0.002; spin) & }; spin; spin; spin; wait; sleep 1000";
    let started = start(&guest, &ExecRequest::shell(line));
    std::thread::sleep(Duration::from_millis(200));
    guest.send("DELETE", &format!("/v1/commands/{}", started.id), b"");
    let sid = started.pid;
    eventually("nobody of the session lives", || {
        let found = guest.shell(&format!("ps -s {sid} -o stat= | grep -v Z; true"));
        found.stdout.text.trim().is_empty()
    });
}

#[test]
fn many_finished_commands_do_not_pile_up() {
    let guest = TestGuest::start();
    let mut client = guest.connect();
    let body = serde_json::to_vec(&ExecRequest::argv(["true"])).unwrap();
    for _ in 0..4500 {
        assert_eq!(client.send("POST", "/v1/commands", &[], &body).status, 200);
    }
    let all: Vec<CommandStatus> = guest.send("GET", "/v1/commands", b"").ok();
    assert!(all.len() <= 4096, "{}", all.len());
    assert!(guest.rss_kib() < 32 * 1024, "{} KiB", guest.rss_kib());
}

#[test]
fn health_tells_use_from_care() {
    let guest = TestGuest::start();
    guest.shell("true");
    std::thread::sleep(Duration::from_millis(60));
    let key = SessionKey {
        key: Some("k".into()),
    };
    let answer = guest.send("PUT", "/v1/session-key", &serde_json::to_vec(&key).unwrap());
    assert_eq!(answer.status, 200);
    let health = guest.health();
    assert!(
        health.idle_ms >= 50 && health.uptime_ms >= health.idle_ms,
        "{health:?}"
    );
    assert_eq!((health.status.as_str(), health.running), ("ok", 0));
    let id = start(&guest, &ExecRequest::shell("sleep 1000")).id;
    let health = guest.health();
    assert!(health.idle_ms < 50 && health.running == 1, "{health:?}");
    guest.send("DELETE", &format!("/v1/commands/{id}"), b"");
}
