//! The OpenHands 1.x dialect over the wire: commands and their events.

mod common;

use common::{Answer, TestGuest, eventually, is_alive};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn get(guest: &TestGuest, target: &str) -> Answer {
    guest.send("GET", target, b"")
}

fn run(guest: &TestGuest, body: &Value) -> Value {
    guest.post("/api/bash/execute_bash_command", body).ok()
}

fn shell(guest: &TestGuest, line: &str) -> Value {
    run(guest, &json!({"command": line, "timeout": 90}))
}

/// Starts a command and gives its id.
fn start(guest: &TestGuest, line: &str, timeout: u64) -> String {
    let event: Value = guest
        .post(
            "/api/bash/start_bash_command",
            &json!({"command": line, "timeout": timeout}),
        )
        .ok();
    assert_eq!(event["kind"], "BashCommand");
    assert_eq!(event["timeout"], timeout);
    let id = event["id"].as_str().expect("an id").to_owned();
    assert_eq!(id.len(), 32);
    id
}

/// What a workspace client polls.
fn poll(guest: &TestGuest, id: &str) -> Vec<Value> {
    let target = format!(
        "/api/bash/bash_events/search?kind__eq=BashOutput&sort_order=TIMESTAMP&limit=100&command_id__eq={id}"
    );
    items(&get(guest, &target))
}

/// What a workspace client asks to see how a command stands.
fn latest(guest: &TestGuest, id: &str) -> Vec<Value> {
    let target = format!(
        "/api/bash/bash_events/search?kind__eq=BashOutput&sort_order=TIMESTAMP_DESC&limit=1&command_id__eq={id}"
    );
    items(&get(guest, &target))
}

fn items(answer: &Answer) -> Vec<Value> {
    let page: Value = answer.ok();
    page["items"].as_array().expect("items").clone()
}

#[test]
fn a_key_guards_the_api_and_nothing_else() {
    let guest = TestGuest::start_with(|command, _| {
        command.env("SESSION_API_KEY", "secret");
    });
    for open in ["/alive", "/health", "/ready", "/server_info"] {
        assert_eq!(get(&guest, open).status, 200, "{open}");
    }
    assert_eq!(
        get(&guest, "/health").json::<Value>(),
        json!({"status": "ok"})
    );
    assert_eq!(
        get(&guest, "/ready").json::<Value>(),
        json!({"status": "ready"})
    );
    let home = "/api/file/home";
    for wrong in ["", "secreT", "secret1"] {
        let answer = guest
            .connect()
            .send("GET", home, &[("X-Session-API-Key", wrong)], b"");
        assert_eq!(answer.status, 401);
        assert_eq!(answer.json::<Value>(), json!({"detail": "Unauthorized"}));
    }
    let right = [("X-Session-API-Key", "secret")];
    assert_eq!(guest.connect().send("GET", home, &right, b"").status, 200);
    let echoed = guest.connect().send(
        "POST",
        "/api/bash/execute_bash_command",
        &right,
        br#"{"command": "env"}"#,
    );
    let echoed: Value = echoed.ok();
    let env = echoed["stdout"].as_str().expect("text");
    assert!(!env.contains("secret") && env.contains("AI_AGENT=openhands"));
}

#[test]
fn server_info_serves_both_generations_of_clients() {
    let guest = TestGuest::start();
    shell(&guest, "true");
    let info: Value = get(&guest, "/server_info").ok();
    for field in [
        "uptime",
        "idle_time",
        "title",
        "version",
        "sdk_version",
        "tools_version",
        "workspace_version",
        "build_git_sha",
        "build_git_ref",
        "python_version",
        "usable_tools",
        "runtime_idle_timeout_seconds",
        "conversation_runtime",
        "available_conversation_runtimes",
        "capabilities",
        "app_backend_ingress_url",
        "max_foreground_terminal_timeout_seconds",
        "docs",
        "redoc",
        "resources",
    ] {
        assert!(info.get(field).is_some(), "{field}");
    }
    assert!(info["resources"]["memory"]["rss"].as_u64() > Some(0));
    assert!(info["idle_time"].as_f64() <= info["uptime"].as_f64());
}

#[test]
fn a_command_leaves_one_event_with_both_streams_and_its_code() {
    let guest = TestGuest::start();
    let id = start(&guest, "echo out; echo err >&2; exit 3", 10);
    let found = poll(&guest, &id);
    assert_eq!(found.len(), 1);
    let output = &found[0];
    assert_eq!(output["stdout"], "out\n");
    assert_eq!(output["stderr"], "err\n");
    assert_eq!(
        (&output["exit_code"], &output["order"]),
        (&json!(3), &json!(0))
    );
    assert_eq!(
        (&output["kind"], &output["command_id"]),
        (&json!("BashOutput"), &json!(id))
    );
    let stamp = output["timestamp"].as_str().expect("a time");
    assert!(stamp.len() == 27 && stamp.ends_with('Z'), "{stamp}");
    // The same event again, by dashes, without a kind, and by its own id.
    let dashed = format!(
        "{}-{}-{}-{}-{}",
        &id[..8],
        &id[8..12],
        &id[12..16],
        &id[16..20],
        &id[20..]
    );
    assert_eq!(poll(&guest, &dashed), found);
    let old =
        format!("/api/bash/bash_events/search?sort_order=TIMESTAMP&limit=100&command_id__eq={id}");
    assert_eq!(items(&get(&guest, &old)), found);
    assert_eq!(
        items(&get(&guest, &format!("{old}&order__gt=0"))),
        [Value::Null; 0]
    );
    let event = output["id"].as_str().expect("an id");
    let again: Value = get(&guest, &format!("/api/bash/bash_events/{event}")).ok();
    assert_eq!(again, *output);
    let empty = shell(&guest, "true");
    assert_eq!(
        (&empty["stdout"], &empty["stderr"]),
        (&Value::Null, &Value::Null)
    );
}

#[test]
fn a_poll_is_held_until_the_end_and_a_status_question_is_not() {
    let guest = TestGuest::start();
    let begun = Instant::now();
    let id = start(&guest, "sleep 0.7; echo done", 10);
    assert_eq!(latest(&guest, &id).len(), 0);
    assert!(
        begun.elapsed() < Duration::from_millis(600),
        "answered at once"
    );
    let found = poll(&guest, &id);
    assert_eq!(found[0]["stdout"], "done\n");
    let taken = begun.elapsed();
    assert!(
        taken >= Duration::from_millis(690) && taken < Duration::from_secs(5),
        "{taken:?}"
    );
    assert_eq!(latest(&guest, &id), found);
}

#[test]
fn a_poll_is_answered_before_the_time_limit_of_the_command() {
    let guest = TestGuest::start();
    let begun = Instant::now();
    let id = start(&guest, "sleep 30", 1);
    assert_eq!(poll(&guest, &id).len(), 0);
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    eventually("the command is ended", || !latest(&guest, &id).is_empty());
    let last = &latest(&guest, &id)[0];
    assert_eq!(
        (&last["exit_code"], &last["stdout"]),
        (&json!(-1), &Value::Null)
    );
}

#[test]
fn a_poller_that_leaves_does_not_disturb_the_command() {
    let guest = TestGuest::start();
    let id = start(&guest, "sleep 0.5; echo alive", 10);
    let mut client = guest.connect();
    let target = format!("/api/bash/bash_events/search?sort_order=TIMESTAMP&command_id__eq={id}");
    client.write(format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
    drop(client);
    assert_eq!(poll(&guest, &id)[0]["stdout"], "alive\n");
}

#[test]
fn long_output_comes_in_chunks_and_is_joined_by_execute() {
    let guest = TestGuest::start();
    let line = "head -c 2500000 /dev/zero | tr '\\0' x; echo e >&2";
    let found = poll(&guest, &start(&guest, line, 20));
    let shape: Vec<_> = found
        .iter()
        .map(|e| {
            let length = e["stdout"].as_str().map_or(0, str::len);
            (e["order"].as_i64(), e["exit_code"].as_i64(), length)
        })
        .collect();
    assert_eq!(
        shape,
        [
            (Some(0), None, 1_048_576),
            (Some(1), None, 1_048_576),
            (Some(2), Some(0), 402_848)
        ]
    );
    let joined = shell(&guest, line);
    assert_eq!(joined["stdout"].as_str().map(str::len), Some(2_500_000));
    assert_eq!(
        (&joined["order"], &joined["stderr"]),
        (&json!(2), &json!("e\n"))
    );
}

#[test]
fn a_flood_is_cut_in_the_middle_and_memory_stays_bounded() {
    let guest = TestGuest::start();
    for _ in 0..5 {
        let flood = shell(
            &guest,
            "echo first; head -c 40000000 /dev/zero | tr '\\0' x; echo last",
        );
        let text = flood["stdout"].as_str().expect("text");
        assert!(text.len() < 17 << 20 && text.starts_with("first\n") && text.ends_with("last\n"));
        assert!(text.contains("bytes dropped"));
    }
    assert!(guest.rss_kib() < 250 << 10, "{} KiB", guest.rss_kib());
    let seen: Value = get(&guest, "/api/bash/bash_events/search?kind__eq=BashCommand").ok();
    let kept = seen["items"].as_array().map_or(0, Vec::len);
    assert!((1..5).contains(&kept), "old events are forgotten: {kept}");
}

#[test]
fn ends_are_told_as_python_tells_them() {
    let guest = TestGuest::start();
    let code = |line: &str| shell(&guest, line)["exit_code"].clone();
    assert_eq!(code("kill -9 $$"), -9);
    assert_eq!(code("kill -TERM $$"), -15);
    assert_eq!(code("no-such-program"), 127);
    let invalid = shell(&guest, "printf '\\377a\\303'");
    assert_eq!(invalid["stdout"], "\u{fffd}a\u{fffd}");
    let missing = run(&guest, &json!({"command": "pwd", "cwd": "/nonexistent"}));
    assert_eq!(missing["exit_code"], -1);
    assert_eq!(
        missing["stderr"],
        "Error executing command: [Errno 2] No such file or directory: '/nonexistent'"
    );
    let there = run(&guest, &json!({"command": "pwd", "cwd": "/usr"}));
    assert_eq!(there["stdout"], "/usr\n");
    let none = run(&guest, &json!({"command": "true", "timeout": 0}));
    assert_eq!(none["exit_code"], -1);
}

#[test]
fn a_command_lasts_as_long_as_its_pipes_are_open() {
    let guest = TestGuest::start();
    let begun = Instant::now();
    let held = run(
        &guest,
        &json!({"command": "sleep 30 & echo bg $!", "timeout": 1}),
    );
    assert_eq!(held["exit_code"], -1);
    let pid: i32 = held["stdout"]
        .as_str()
        .and_then(|text| text.trim().rsplit(' ').next())
        .and_then(|pid| pid.parse().ok())
        .expect("a pid");
    assert!((1..4).contains(&begun.elapsed().as_secs()));
    eventually("the child is gone", || !is_alive(pid));
    let detached = run(
        &guest,
        &json!({"command": "sleep 5 >/dev/null 2>&1 & echo on", "timeout": 3}),
    );
    assert_eq!(
        (&detached["exit_code"], &detached["stdout"]),
        (&json!(0), &json!("on\n"))
    );
}

#[test]
fn a_command_is_stopped_even_when_it_ignores_it() {
    let guest = TestGuest::start();
    for (line, code) in [
        ("echo a; sleep 60", -15),
        ("trap '' TERM; echo a; sleep 60", -9),
    ] {
        let id = start(&guest, line, 50);
        // Until the shell has got to its trap.
        std::thread::sleep(Duration::from_millis(300));
        let stop = format!("/api/bash/bash_commands/{id}/stop");
        let stopped: Value = guest.send("POST", &stop, b"").ok();
        assert_eq!(stopped, json!({"success": true}));
        let last = &latest(&guest, &id)[0];
        assert_eq!(
            (&last["exit_code"], &last["stdout"]),
            (&json!(code), &json!("a\n"))
        );
        assert_eq!(
            guest.send("POST", &stop, b"").status,
            200,
            "it was known once"
        );
    }
    let unknown = format!("/api/bash/bash_commands/{}/stop", "0".repeat(32));
    assert_eq!(guest.send("POST", &unknown, b"").status, 404);
    assert_eq!(
        guest
            .send("POST", "/api/bash/bash_commands/zz/stop", b"")
            .status,
        422
    );
}

#[test]
fn events_are_paged_and_cleared() {
    let guest = TestGuest::start();
    for n in 0..3 {
        shell(&guest, &format!("echo {n}"));
    }
    let all = items(&get(&guest, "/api/bash/bash_events/search"));
    assert_eq!(all.len(), 6);
    let mut seen = Vec::new();
    let mut page = String::new();
    loop {
        let answer = get(
            &guest,
            &format!("/api/bash/bash_events/search?limit=4{page}"),
        );
        seen.extend(items(&answer));
        match answer.json::<Value>()["next_page_id"].as_str() {
            Some(next) => page = format!("&page_id={next}"),
            None => break,
        }
    }
    assert_eq!(seen, all);
    let past = "/api/bash/bash_events/search?timestamp__lt=2020-01-01T00:00:00Z";
    assert_eq!(items(&get(&guest, past)).len(), 0);
    let cleared: Value = guest.send("DELETE", "/api/bash/bash_events", b"").ok();
    assert_eq!(cleared, json!({"cleared_count": 6}));
    assert_eq!(items(&get(&guest, "/api/bash/bash_events/search")).len(), 0);
    assert_eq!(get(&guest, "/api/bash/bash_events/nope").status, 404);
}

#[test]
fn wrong_requests_are_told_what_is_wrong_with_them() {
    let guest = TestGuest::start();
    let detail = |answer: &Answer| -> Vec<(String, Value)> {
        assert_eq!(answer.status, 422, "{}", answer.text());
        let body: Value = answer.json();
        let list = body["detail"].as_array().expect("a list").clone();
        list.into_iter()
            .map(|d| {
                (
                    d["type"].as_str().unwrap_or("").to_owned(),
                    d["loc"].clone(),
                )
            })
            .collect()
    };
    let one = |kind: &str, place: Value| vec![(kind.to_owned(), place)];
    let bash = |body: &[u8]| guest.send("POST", "/api/bash/start_bash_command", body);
    assert_eq!(detail(&bash(b"")), one("missing", json!(["body"])));
    assert_eq!(detail(&bash(b"{")), one("json_invalid", json!(["body"])));
    assert_eq!(
        detail(&bash(b"[]")),
        one("model_attributes_type", json!(["body"]))
    );
    assert_eq!(
        detail(&bash(b"{}")),
        one("missing", json!(["body", "command"]))
    );
    assert_eq!(
        detail(&bash(br#"{"command": 1, "cwd": 2, "timeout": "q"}"#)).len(),
        3
    );
    let search = |query: &str| get(&guest, &format!("/api/bash/bash_events/search?{query}"));
    assert_eq!(
        detail(&search("limit=101")),
        one("less_than_equal", json!(["query", "limit"]))
    );
    assert_eq!(
        detail(&search("kind__eq=X&sort_order=UP&limit=0&command_id__eq=z")).len(),
        4
    );
    assert_eq!(
        detail(&get(&guest, "/api/git/changes")),
        one("missing", json!(["query", "path"]))
    );
    assert_eq!(get(&guest, "/api/bash/start_bash_command").status, 405);
    assert_eq!(get(&guest, "/api/nothing").status, 404);
}

#[test]
fn what_a_sandbox_does_not_offer_says_so() {
    let guest = TestGuest::start();
    let conversation = "/api/conversations/12345678-1234-5678-1234-567812345678";
    for path in [
        "/api/conversations",
        "/api/settings",
        "/api/settings/secrets/x",
        "/api/profiles/p",
        "/sockets/events/1",
        "/sockets/bash-events",
        &format!("{conversation}/events/search"),
        conversation,
    ] {
        let answer = get(&guest, path);
        assert_eq!(answer.status, 501, "{path}");
        let body: Value = answer.json();
        assert!(
            body["detail"]
                .as_str()
                .is_some_and(|d| d.contains("RemoteWorkspace"))
        );
    }
    // A workspace scoped to a conversation is a workspace.
    let scoped = format!("{conversation}/bash/execute_bash_command");
    let output: Value = guest.post(&scoped, &json!({"command": "echo scoped"})).ok();
    assert_eq!(output["stdout"], "scoped\n");
    assert_eq!(get(&guest, "/api/conversations/zz/file/home").status, 422);
    let credentials = format!("{conversation}/runtime/credentials");
    assert_eq!(guest.send("POST", &credentials, b"").status, 200);
    let runtime = format!("{conversation}/runtime");
    assert_eq!(guest.send("DELETE", &runtime, b"").status, 404);
}

#[test]
fn two_hundred_commands_run_side_by_side() {
    let guest = TestGuest::start();
    std::thread::scope(|scope| {
        for n in 0..200 {
            let guest = &guest;
            scope.spawn(move || {
                let id = start(guest, &format!("sleep 0.2; echo {n}"), 60);
                assert_eq!(poll(guest, &id)[0]["stdout"], format!("{n}\n"));
            });
        }
    });
}
