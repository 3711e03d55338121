//! The SWE-ReX dialect over the wire.

mod common;

use common::{Answer, TestGuest, eventually};
use serde_json::{Value, json};
use std::io::{Cursor, Write};
use std::time::{Duration, Instant};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

fn post(guest: &TestGuest, path: &str, body: &Value) -> Answer {
    guest.post(path, body)
}

fn create(guest: &TestGuest, session: &str) -> Value {
    let body = json!({"session_type": "bash", "session": session, "startup_source": []});
    post(guest, "/create_session", &body).ok()
}

fn action(guest: &TestGuest, command: &str, more: Value) -> Answer {
    let mut body = json!({"action_type": "bash", "command": command, "timeout": 20.0});
    body.as_object_mut()
        .expect("object")
        .extend(more.as_object().cloned().unwrap_or_default());
    post(guest, "/run_in_session", &body)
}

fn run(guest: &TestGuest, command: &str, more: Value) -> Value {
    action(guest, command, more).ok()
}

/// The exception of a failed request: class and message.
fn raised(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 511, "{}", answer.text());
    let body: Value = answer.json();
    let exception = &body["swerexception"];
    for field in ["traceback", "extra_info"] {
        assert!(!exception[field].is_null(), "{exception}");
    }
    (
        exception["class_path"].as_str().expect("class").to_owned(),
        exception["message"].as_str().expect("message").to_owned(),
    )
}

#[test]
fn a_session_runs_commands_and_keeps_its_state() {
    let guest = TestGuest::start();
    assert_eq!(
        guest.send("GET", "/", b"").json::<Value>(),
        json!({"message": "hello world"})
    );
    let alive: Value = guest.send("GET", "/is_alive", b"").json();
    assert_eq!(alive, json!({"is_alive": true, "message": ""}));
    assert_eq!(
        create(&guest, "default"),
        json!({"output": "", "session_type": "bash"})
    );
    assert_eq!(
        run(&guest, "echo hi; echo err >&2", json!({})),
        json!({
            "output": "hi\nerr\n", "exit_code": 0, "failure_reason": "",
            "expect_string": "SHELLPS1PREFIX", "session_type": "bash",
        })
    );
    run(
        &guest,
        "cd /usr\nexport A=1\nf() { echo \"f $1\"; }",
        json!({}),
    );
    assert_eq!(
        run(&guest, "pwd; echo $A; f x", json!({}))["output"],
        "/usr\n1\nf x\n"
    );
    assert_eq!(
        run(&guest, "cat <<'E'\n a\n  b\nE", json!({}))["output"],
        " a\n  b\n"
    );
    assert_eq!(
        run(&guest, "printf '\\033[1mx\\033[0m\\377'", json!({}))["output"],
        "x\\xff"
    );
}

#[test]
fn the_exit_code_is_raised_told_or_not_asked_for() {
    let guest = TestGuest::start();
    create(&guest, "default");
    let (class, message) = raised(&action(
        &guest,
        "echo out; false",
        json!({"error_msg": "oops"}),
    ));
    assert_eq!(class, "swerex.exceptions.NonZeroExitCodeError");
    assert_eq!(
        message,
        "oops: Command 'echo out; false' failed with exit code 1. Here is the output:\n'out\\n'"
    );
    assert_eq!(
        run(&guest, "false", json!({"check": "silent"}))["exit_code"],
        1
    );
    assert_eq!(
        run(&guest, "false", json!({"check": "ignore"}))["exit_code"],
        Value::Null
    );
}

#[test]
fn a_syntax_error_is_found_before_anything_runs() {
    let guest = TestGuest::start();
    create(&guest, "default");
    let answer = action(&guest, "touch made; echo 'open", json!({}));
    let (class, message) = raised(&answer);
    assert_eq!(class, "swerex.exceptions.BashIncorrectSyntaxError");
    assert!(
        message.starts_with("Error (exit code 2) while checking bash command"),
        "{message}"
    );
    let info = &answer.json::<Value>()["swerexception"]["extra_info"];
    assert!(
        info["bash_stderr"]
            .as_str()
            .expect("text")
            .contains("unexpected EOF")
    );
    assert_eq!(info["bash_stdout"], "");
    assert!(!guest.work().join("made").exists());
}

#[test]
fn a_timeout_leaves_the_command_running_until_it_is_interrupted() {
    let guest = TestGuest::start();
    create(&guest, "default");
    let answer = action(&guest, "echo begun; sleep 300", json!({"timeout": 0.5}));
    assert_eq!(
        raised(&answer),
        (
            "swerex.exceptions.CommandTimeoutError".to_owned(),
            "timeout after 0.5 seconds while running command 'echo begun; sleep 300'".to_owned()
        )
    );
    // What comes after has to wait, and does not get its answer.
    let answer = action(&guest, "echo next", json!({"timeout": 0.3}));
    assert_eq!(raised(&answer).0, "swerex.exceptions.CommandTimeoutError");
    let interrupt = json!({"action_type": "bash_interrupt"});
    let answer: Value = post(&guest, "/run_in_session", &interrupt).ok();
    assert_eq!(
        (&answer["output"], &answer["exit_code"]),
        (&json!("begun"), &json!(0))
    );
    assert_eq!(run(&guest, "echo next", json!({}))["output"], "next\n");
    let answer: Value = post(&guest, "/run_in_session", &interrupt).ok();
    assert_eq!(answer["output"], "");
}

#[test]
fn a_program_that_ignores_the_interrupt_is_stopped_and_killed() {
    let guest = TestGuest::start();
    create(&guest, "default");
    let deaf = "sh -c \"trap '' INT; sleep 300; sleep 300\"";
    raised(&action(&guest, deaf, json!({"timeout": 0.5})));
    let interrupt = json!({"action_type": "bash_interrupt", "n_retry": 1});
    let _: Value = post(&guest, "/run_in_session", &interrupt).ok();
    assert_eq!(run(&guest, "wait; echo free", json!({}))["exit_code"], 0);
}

#[test]
fn interactive_programs_are_spoken_to_line_by_line() {
    let guest = TestGuest::start();
    create(&guest, "default");
    let talk = |line: &str, quit: bool| {
        let more = if quit {
            json!({"is_interactive_quit": true})
        } else {
            json!({"is_interactive_command": true, "expect": ["\\(in\\d\\) ", ">> "]})
        };
        run(&guest, line, more)
    };
    let program = "n=0; while printf '(in%s) ' $n; read x && [ \"$x\" != quit ]; do \
                   n=$((n+1)); echo \"got $x\"; done";
    let answer = talk(program, false);
    assert_eq!(
        (&answer["output"], &answer["expect_string"]),
        (&json!(""), &json!("\\(in\\d\\) "))
    );
    assert_eq!(talk("one", false)["output"], "got one");
    assert_eq!(talk("two", false)["output"], "got two");
    let answer = talk("quit", true);
    assert_eq!(
        (&answer["exit_code"], &answer["expect_string"]),
        (&json!(0), &json!("SHELLPS1PREFIX"))
    );
    assert_eq!(run(&guest, "echo back", json!({}))["output"], "back\n");
}

#[test]
fn sessions_are_told_apart_and_closed() {
    let guest = TestGuest::start();
    create(&guest, "default");
    let body = json!({"session_type": "bash"});
    assert_eq!(
        raised(&post(&guest, "/create_session", &body)),
        (
            "swerex.exceptions.SessionExistsError".into(),
            "session default already exists".into()
        )
    );
    assert_eq!(
        raised(&action(&guest, "true", json!({"session": "zz"}))),
        (
            "swerex.exceptions.SessionDoesNotExistError".into(),
            "session 'zz' does not exist".into()
        )
    );
    create(&guest, "other");
    run(&guest, "x=1", json!({}));
    assert_eq!(
        run(&guest, "echo \"<$x>\"", json!({"session": "other"}))["output"],
        "<>\n"
    );
    let closed: Value = post(&guest, "/close_session", &body).ok();
    assert_eq!(closed, json!({"session_type": "bash"}));
    assert_eq!(
        raised(&post(&guest, "/close_session", &body)).0,
        "swerex.exceptions.SessionDoesNotExistError"
    );
    assert_eq!(
        guest.send("POST", "/close", b"null").json::<Value>(),
        json!({})
    );
    eventually("all shells are gone", || guest.health().running == 0);
}

#[test]
fn a_session_whose_shell_has_exited_says_so() {
    let guest = TestGuest::start();
    create(&guest, "default");
    for command in ["exit 3", "echo gone"] {
        let (class, message) = raised(&action(&guest, command, json!({})));
        assert_eq!(class, "pexpect.exceptions.EOF");
        assert!(message.contains("exit code 3"), "{message}");
    }
    let _: Value = post(&guest, "/close_session", &json!({"session_type": "bash"})).ok();
    create(&guest, "default");
}

#[test]
fn a_session_that_blocks_delays_nobody() {
    let guest = TestGuest::start();
    create(&guest, "slow");
    create(&guest, "quick");
    std::thread::scope(|scope| {
        scope.spawn(|| run(&guest, "sleep 1.5", json!({"session": "slow"})));
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        run(&guest, "true", json!({"session": "quick"}));
        guest.send("GET", "/is_alive", b"");
        let _: Value = post(&guest, "/execute", &json!({"command": ["true"]})).ok();
        assert!(
            begun.elapsed() < Duration::from_millis(1200),
            "{:?}",
            begun.elapsed()
        );
    });
}

#[test]
fn execute_runs_as_subprocess_run_does() {
    let guest = TestGuest::start();
    let execute = |body: Value| post(&guest, "/execute", &body);
    let ok = |body: Value| execute(body).ok::<Value>();
    assert_eq!(
        ok(json!({"command": ["echo", "a b"]})),
        json!({"stdout": "a b\n", "stderr": "", "exit_code": 0})
    );
    let both = ok(json!({"command": "echo o; echo e >&2; exit 3", "shell": true}));
    assert_eq!(
        both,
        json!({"stdout": "o\n", "stderr": "e\n", "exit_code": 3})
    );
    let merged =
        ok(json!({"command": "echo o; echo e >&2", "shell": true, "merge_output_streams": true}));
    assert_eq!(
        merged,
        json!({"stdout": "o\ne\n", "stderr": "", "exit_code": 0})
    );
    let env = ok(json!({"command": ["env"], "env": {"ONLY": "this"}}));
    assert_eq!(env["stdout"], "ONLY=this\n");
    assert_eq!(
        ok(json!({"command": "pwd", "shell": true, "cwd": "/usr"}))["stdout"],
        "/usr\n"
    );
    assert_eq!(
        ok(json!({"command": "kill -9 $$", "shell": true}))["exit_code"],
        -9
    );
    assert_eq!(
        ok(json!({"command": "printf 'a\\377'", "shell": true}))["stdout"],
        "a\\xff"
    );
    let fails = |body: Value| raised(&execute(body));
    assert_eq!(
        fails(json!({"command": "echo hi"})),
        (
            "builtins.FileNotFoundError".into(),
            "[Errno 2] No such file or directory: 'echo hi'".into()
        )
    );
    assert_eq!(
        fails(json!({"command": ["pwd"], "cwd": "/nope"})),
        (
            "builtins.FileNotFoundError".into(),
            "[Errno 2] No such file or directory: '/nope'".into()
        )
    );
    assert_eq!(
        fails(json!({"command": "sleep 9", "shell": true, "timeout": 0.5})),
        (
            "swerex.exceptions.CommandTimeoutError".into(),
            "Timeout (0.5s) exceeded while running command".into()
        )
    );
    assert_eq!(
        fails(json!({"command": ["false"], "check": true, "error_msg": "E"})),
        (
            "swerex.exceptions.NonZeroExitCodeError".into(),
            "E: Command ['false'] failed with exit code 1. Stdout:\n''\nStderr:\n''".into()
        )
    );
}

#[test]
fn files_are_read_and_written_as_text() {
    let guest = TestGuest::start();
    let path = guest.path("a/b.txt");
    let _: Value = post(
        &guest,
        "/write_file",
        &json!({"path": path, "content": "h\u{e4}\r\nx"}),
    )
    .ok();
    assert_eq!(
        std::fs::read_to_string(&path).expect("written"),
        "h\u{e4}\r\nx"
    );
    let read = |body: Value| post(&guest, "/read_file", &body);
    assert_eq!(
        read(json!({"path": path})).ok::<Value>()["content"],
        "h\u{e4}\nx"
    );
    let latin = read(json!({"path": path, "encoding": "latin-1"})).ok::<Value>();
    assert_eq!(latin["content"], "h\u{c3}\u{a4}\nx");
    std::fs::write(&path, b"\xff").expect("written");
    assert_eq!(
        raised(&read(json!({"path": path}))).0,
        "builtins.UnicodeDecodeError"
    );
    assert_eq!(
        read(json!({"path": path, "errors": "ignore"})).ok::<Value>()["content"],
        ""
    );
    assert_eq!(
        raised(&read(json!({"path": "/nope"}))).1,
        "[Errno 2] No such file or directory: '/nope'"
    );
    assert_eq!(
        raised(&read(json!({"path": "/usr"}))).0,
        "builtins.IsADirectoryError"
    );
}

fn upload(guest: &TestGuest, content: &[u8], target: &str, unzip: &str) -> Answer {
    let mut body =
        b"--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n".to_vec();
    body.extend_from_slice(content);
    for (name, value) in [("target_path", target), ("unzip", unzip)] {
        let part =
            format!("\r\n--B\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}");
        body.extend_from_slice(part.as_bytes());
    }
    body.extend_from_slice(b"\r\n--B--\r\n");
    let headers = [("content-type", "multipart/form-data; boundary=B")];
    guest.connect().send("POST", "/upload", &headers, &body)
}

#[test]
fn uploads_become_a_file_or_are_unpacked() {
    let guest = TestGuest::start();
    let target = guest.path("deep/er/f");
    assert_eq!(
        upload(&guest, b"a\0b\r\n", &target, "false").ok::<Value>(),
        json!({})
    );
    assert_eq!(std::fs::read(&target).expect("there"), b"a\0b\r\n");
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in [("x", "X"), ("sub/y", "Y")] {
        writer
            .start_file(name, SimpleFileOptions::default())
            .expect("entry");
        writer.write_all(content.as_bytes()).expect("content");
    }
    let packed = writer.finish().expect("zip").into_inner();
    let target = guest.path("tree");
    assert_eq!(
        upload(&guest, &packed, &target, "true").ok::<Value>(),
        json!({})
    );
    assert_eq!(
        std::fs::read_to_string(guest.path("tree/sub/y")).expect("there"),
        "Y"
    );
    assert_eq!(
        raised(&upload(&guest, b"no zip", &target, "true")).0,
        "builtins.ValueError"
    );
}

#[test]
fn a_request_id_sent_again_gets_the_same_answer() {
    let guest = TestGuest::start();
    create(&guest, "default");
    let body = json!({"action_type": "bash", "command": "echo x >> log; wc -l < log"});
    let body = serde_json::to_vec(&body).expect("json");
    let send = |id: &str| {
        let headers = [("x-request-id", id)];
        let answer = guest
            .connect()
            .send("POST", "/run_in_session", &headers, &body);
        answer.ok::<Value>()["output"].clone()
    };
    assert_eq!(send("a"), "1\n");
    assert_eq!(send("a"), "1\n");
    assert_eq!(send("b"), "2\n");
    assert_eq!(send("a"), "1\n");
}

#[test]
fn requests_need_the_key_and_a_well_formed_body() {
    let guest = TestGuest::start_with(|command, _| {
        command.env("SESSION_API_KEY", "secret");
    });
    let get = |headers: &[(&str, &str)]| guest.connect().send("GET", "/is_alive", headers, b"");
    let answer = get(&[]);
    assert_eq!(
        (answer.status, answer.json::<Value>()),
        (401, json!({"detail": "Not authenticated"}))
    );
    let answer = get(&[("x-api-key", "wrong!")]);
    assert_eq!(
        (answer.status, answer.json::<Value>()),
        (401, json!({"detail": "Invalid API Key"}))
    );
    let key = [("x-api-key", "secret")];
    assert_eq!(get(&key).status, 200);
    let post = |path: &str, body: &str| guest.connect().send("POST", path, &key, body.as_bytes());
    for (path, body, kind) in [
        ("/create_session", "{}", "union_tag_not_found"),
        (
            "/create_session",
            "{\"session_type\": \"zsh\"}",
            "union_tag_invalid",
        ),
        ("/run_in_session", "{\"action_type\": \"bash\"}", "missing"),
        ("/execute", "{\"command\": 3}", "value_error"),
        ("/execute", "{", "json_invalid"),
        ("/read_file", "null", "missing"),
    ] {
        let answer = post(path, body);
        assert_eq!(answer.status, 422, "{path} {body}");
        assert_eq!(
            answer.json::<Value>()["detail"][0]["type"],
            kind,
            "{path} {body}"
        );
    }
    assert_eq!(
        guest.connect().send("GET", "/execute", &key, b"").status,
        405
    );
}
