//! Running a command to its end, over the wire.

mod common;

use common::{TestGuest, eventually, is_alive};
use skyrl_protocol::guest::{
    ErrorCode, ExecEvent, ExecRequest, ExecResult, Finish, Program, UserGroup,
};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

fn error_of(guest: &TestGuest, request: &ExecRequest) -> (ErrorCode, String) {
    let error = guest.post("/v1/exec", request).error();
    (error.code, error.message)
}

/// A pid that a command printed.
fn pid_in(result: &ExecResult) -> i32 {
    let text = result.stdout.text.trim();
    text.lines().next().unwrap().parse().unwrap()
}

#[test]
fn a_command_gives_its_output_and_exit_code() {
    let guest = TestGuest::start();
    let result = guest.shell("echo out; echo err >&2; exit 3");
    assert_eq!(result.exit_code, Some(3));
    assert_eq!(result.stdout.text, "out\n");
    assert_eq!(result.stderr.text, "err\n");
    assert!(!result.success() && !result.timed_out && !result.oom_killed);
    let result = guest.exec(&ExecRequest::argv(["pwd"]));
    assert_eq!(
        result.stdout.text.trim(),
        guest.path("").trim_end_matches('/')
    );
    let merged = ExecRequest {
        merge_output: true,
        ..ExecRequest::shell("echo a; echo b >&2; echo c")
    };
    assert_eq!(guest.exec(&merged).stdout.text, "a\nb\nc\n");
}

#[test]
fn what_cannot_be_executed_is_told_apart() {
    let guest = TestGuest::start();
    let script = guest.path("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    let of = |request: &ExecRequest| error_of(&guest, request);
    let (code, message) = of(&ExecRequest::argv(["no-such-program"]));
    assert_eq!(code, ErrorCode::CannotExecute);
    assert!(message.contains("PATH="), "{message}");
    let (code, message) = of(&ExecRequest::argv([&script]));
    assert_eq!(code, ErrorCode::CannotExecute);
    assert!(message.contains("ermission denied"), "{message}");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = guest
        .post("/v1/exec", &ExecRequest::argv([&script]))
        .error();
    assert!(error.hint.unwrap().contains("interpreter"));
    let lost = ExecRequest {
        cwd: Some("/no/such/dir".into()),
        ..ExecRequest::shell("true")
    };
    let (code, message) = of(&lost);
    assert_eq!(code, ErrorCode::NotFound);
    assert!(message.contains("/no/such/dir"), "{message}");
    assert_eq!(
        of(&ExecRequest::argv([] as [&str; 0])).0,
        ErrorCode::BadRequest
    );
    assert_eq!(of(&ExecRequest::argv(["a\0b"])).0, ErrorCode::BadRequest);
    let garbage = guest.send("POST", "/v1/exec", b"{\"program\": 3}");
    assert_eq!(garbage.error().code, ErrorCode::BadRequest);
}

#[test]
fn environment_and_input_are_as_asked() {
    let guest = TestGuest::start_with(|command, _| {
        command.env("BASE", "1").env("SESSION_API_KEY", "secret");
    });
    let mut request = ExecRequest::argv(["env"]);
    request.env = BTreeMap::from([("BASE".into(), "2".into()), ("NEW".into(), "x y".into())]);
    let text = guest.exec(&request).stdout.text;
    assert!(text.contains("BASE=2\n") && text.contains("NEW=x y\n") && text.contains("PATH="));
    assert!(!text.contains("secret"), "{text}");
    request.clear_env = true;
    request.program = Program::Argv(vec!["/usr/bin/env".into()]);
    assert_eq!(guest.exec(&request).stdout.text, "BASE=2\nNEW=x y\n");
    let input = "é\n".repeat(200_000);
    let cat = ExecRequest {
        stdin: Some(input.clone()),
        ..ExecRequest::shell("cat")
    };
    assert_eq!(guest.exec(&cat).stdout.text, input);
    assert_eq!(guest.shell("wc -c").stdout.text.trim(), "0");
    let ignored = ExecRequest {
        stdin: Some(input),
        ..ExecRequest::shell("echo never read")
    };
    assert_eq!(guest.exec(&ignored).stdout.text, "never read\n");
}

#[test]
fn a_command_begins_with_a_clean_slate() {
    let guest = TestGuest::start();
    let result = guest.shell("ls /proc/self/fd; cat /proc/self/oom_score_adj");
    // `ls` itself opens the directory as 3.
    assert_eq!(result.stdout.text, "0\n1\n2\n3\n300\n");
    let status = guest
        .shell("grep -E 'Sig(Blk|Ign)' /proc/self/status")
        .stdout
        .text;
    for line in status.lines() {
        assert!(line.ends_with("0000000000000000"), "{line}");
    }
    let limits = guest.shell("ulimit -n").stdout.text;
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    assert_eq!(limits.trim().parse().ok(), own.current);
    // A session of its own: its id is its leader's.
    let ids = guest.shell("ps -o pid=,pgid=,sid= -p $$").stdout.text;
    let ids: Vec<&str> = ids.split_whitespace().collect();
    assert!(ids[0] == ids[1] && ids[1] == ids[2], "{ids:?}");
}

#[test]
fn a_signal_is_told_from_an_exit_code() {
    let guest = TestGuest::start();
    let result = guest.shell("kill -9 $$");
    assert_eq!((result.exit_code, result.signal), (None, Some(9)));
    let result = guest.shell("exit 137");
    assert_eq!((result.exit_code, result.signal), (Some(137), None));
}

#[test]
fn usage_is_counted() {
    let guest = TestGuest::start();
    let result = guest.shell("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 0.05");
    let usage = result.usage;
    assert!(usage.user_ms + usage.system_ms > 1.0, "{usage:?}");
    assert!(usage.wall_ms > 50.0 && usage.max_rss_kib > 100, "{usage:?}");
}

#[test]
fn at_its_time_limit_a_command_ends_with_all_its_children() {
    let guest = TestGuest::start();
    let mut request = ExecRequest {
        timeout_ms: Some(300),
        grace_ms: 200,
        // One child in a session of its own, everyone deaf to SIGTERM.
        ..ExecRequest::shell(
            "trap '' TERM; echo $$; setsid sleep 1000 & echo $!; sleep 1000 & echo $!; wait",
        )
    };
    let begin = Instant::now();
    let result = guest.exec(&request);
    let took = begin.elapsed();
    assert!(result.timed_out && result.exit_code.is_none());
    assert!(
        took >= Duration::from_millis(490) && took < Duration::from_secs(5),
        "{took:?}"
    );
    let pids: Vec<i32> = result
        .stdout
        .text
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 3);
    eventually("nobody survives", || !pids.iter().any(|pid| is_alive(*pid)));
    // Who listens to SIGTERM is not killed, and not waited for longer.
    request.program = Program::Shell("trap 'echo bye; exit 7' TERM; sleep 1000 & wait".into());
    request.grace_ms = 60_000;
    let begin = Instant::now();
    let result = guest.exec(&request);
    assert_eq!((result.exit_code, result.timed_out), (Some(7), true));
    assert_eq!(result.stdout.text, "bye\n");
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn background_children_are_left_alone_or_waited_for() {
    let guest = TestGuest::start();
    let line = "(sleep 0.5; echo late; echo alive > flag) & echo $!; echo now";
    let begin = Instant::now();
    let result = guest.shell(line);
    assert!(begin.elapsed() < Duration::from_millis(450));
    assert!(
        result.stdout.text.ends_with("now\n"),
        "{}",
        result.stdout.text
    );
    let child = pid_in(&result);
    assert!(is_alive(child));
    // It may write on without being killed for it.
    eventually("it ran on", || {
        std::path::Path::new(&guest.path("flag")).exists()
    });
    let patient = ExecRequest {
        finish: Finish::PipesClose,
        ..ExecRequest::shell(line)
    };
    assert!(guest.exec(&patient).stdout.text.ends_with("now\nlate\n"));
    let limited = ExecRequest {
        timeout_ms: Some(200),
        finish: Finish::PipesClose,
        ..ExecRequest::shell("sleep 1000 & echo $!")
    };
    let result = guest.exec(&limited);
    assert!(result.timed_out && result.exit_code == Some(0));
    let child = pid_in(&result);
    eventually("the child is gone", || !is_alive(child));
}

#[test]
fn orphans_are_reaped() {
    let guest = TestGuest::start();
    for _ in 0..20 {
        guest.shell("(sleep 0.01 &) ; (true &)");
    }
    eventually("no zombies", || {
        let children = guest.shell(&format!("ps --ppid {} -o stat=", guest.child.id()));
        !children.stdout.text.contains('Z')
    });
}

#[test]
fn output_beyond_the_limit_keeps_both_ends_and_little_memory() {
    let guest = TestGuest::start();
    let before = guest.rss_kib();
    let mut request =
        ExecRequest::shell("head -c 100000000 /dev/zero | tr '\\0' x; echo; echo END");
    request.output_limit = 100_000;
    let result = guest.exec(&request);
    assert_eq!(result.stdout.total_bytes, 100_000_005);
    assert_eq!(result.stdout.dropped_bytes, 99_900_005);
    assert!(result.stdout.text.starts_with("xxxx") && result.stdout.text.ends_with("\nEND\n"));
    assert!(
        result
            .stdout
            .text
            .contains("[... 99900005 bytes dropped ...]")
    );
    let grown = guest.rss_kib().saturating_sub(before);
    assert!(grown < 8 * 1024, "{grown} KiB");
}

#[test]
fn bytes_that_are_no_text_do_not_break_an_answer() {
    let guest = TestGuest::start();
    let result = guest.shell(r"printf 'a\377\376b\303'");
    assert_eq!(result.stdout.text, "a\u{FFFD}\u{FFFD}b\u{FFFD}");
    assert_eq!(result.stdout.total_bytes, 5);
    let noise = guest.shell("head -c 3000000 /dev/urandom");
    assert_eq!(noise.stdout.total_bytes, 3_000_000);
}

#[test]
fn output_streams_as_it_appears() {
    let guest = TestGuest::start();
    let request = ExecRequest {
        stream: true,
        ..ExecRequest::shell(r"printf 'a\303'; sleep 0.3; printf '\251b'; echo err >&2; exit 4")
    };
    let mut client = guest.connect();
    let body = serde_json::to_vec(&request).unwrap();
    let head = format!(
        "POST /v1/exec HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    client.write(head.as_bytes());
    client.write(&body);
    let begin = Instant::now();
    assert_eq!(client.read_head().unwrap().0, 200);
    let mut events = Vec::new();
    let mut first_output = None;
    while let Some(chunk) = client.read_chunk().unwrap() {
        let event: ExecEvent = serde_json::from_slice(&chunk).unwrap();
        if matches!(event, ExecEvent::Stdout { .. }) {
            first_output.get_or_insert(begin.elapsed());
        }
        events.push(event);
    }
    assert!(first_output.unwrap() < Duration::from_millis(250));
    let text: String = events
        .iter()
        .filter_map(|event| match event {
            ExecEvent::Stdout { text } => Some(text.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(text, "aéb");
    assert!(matches!(events[0], ExecEvent::Started { pid } if pid > 0));
    let Some(ExecEvent::Finished { result }) = events.last() else {
        panic!("{events:?}");
    };
    assert_eq!((result.exit_code, result.stdout.total_bytes), (Some(4), 4));
    assert_eq!(result.stdout.text, "");
}

#[test]
fn a_slow_reader_loses_nothing_and_costs_no_memory() {
    let guest = TestGuest::start();
    let before = guest.rss_kib();
    let request = ExecRequest {
        stream: true,
        ..ExecRequest::shell("seq 1 1000000")
    };
    let body = serde_json::to_vec(&request).unwrap();
    let mut client = guest.connect();
    client.write(
        format!(
            "POST /v1/exec HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .as_bytes(),
    );
    client.write(&body);
    std::thread::sleep(Duration::from_millis(300));
    assert!(guest.rss_kib() < before + 8 * 1024);
    let answer = client.read_answer(false).unwrap();
    let mut text = String::new();
    for line in answer.text().lines() {
        if let ExecEvent::Stdout { text: more } = serde_json::from_str(line).unwrap() {
            text.push_str(&more);
        }
    }
    let wanted: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    assert!(text == wanted, "{} bytes", text.len());
}

#[test]
fn a_command_ends_when_its_client_leaves() {
    let guest = TestGuest::start();
    for stream in [false, true] {
        let request = ExecRequest {
            stream,
            ..ExecRequest::shell("echo $$ > pid; sleep 1000; true")
        };
        let body = serde_json::to_vec(&request).unwrap();
        let mut client = guest.connect();
        client.write(
            format!(
                "POST /v1/exec HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
                body.len()
            )
            .as_bytes(),
        );
        client.write(&body);
        let file = guest.path("pid");
        eventually("it runs", || {
            std::fs::read_to_string(&file).is_ok_and(|t| t.ends_with('\n'))
        });
        let pid = std::fs::read_to_string(&file)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        assert!(is_alive(pid));
        drop(client);
        eventually("it ended", || !is_alive(pid));
        std::fs::remove_file(&file).unwrap();
    }
    eventually("nothing runs", || guest.health().running == 0);
}

#[test]
fn a_client_that_only_stops_sending_still_gets_its_answer() {
    let guest = TestGuest::start();
    let body = serde_json::to_vec(&ExecRequest::shell("sleep 0.2; echo done")).unwrap();
    let mut client = guest.connect();
    client.write(
        format!(
            "POST /v1/exec HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .as_bytes(),
    );
    client.write(&body);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let result: ExecResult = client.read_answer(false).unwrap().ok();
    assert_eq!(result.stdout.text, "done\n");
}

#[test]
fn hundreds_of_commands_run_at_once() {
    let guest = TestGuest::start();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let guest = &guest;
        for n in 0..300 {
            scope.spawn(move || {
                let result = guest.shell(&format!("sleep 0.5; echo {n}"));
                assert_eq!(result.stdout.text, format!("{n}\n"));
            });
        }
    });
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
    let health = guest.health();
    assert_eq!(health.running, 0);
    eventually("descriptors are closed", || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", guest.child.id())).unwrap();
        fds.count() < 20
    });
}

#[test]
fn another_user_is_taken_on_completely() {
    let guest = TestGuest::start();
    let request = ExecRequest {
        user: Some(UserGroup {
            uid: 1234,
            gid: 4321,
        }),
        cwd: Some("/".into()),
        ..ExecRequest::argv(["id"])
    };
    let answer = guest.post("/v1/exec", &request);
    if rustix::process::geteuid().is_root() {
        let text = answer.ok::<ExecResult>().stdout.text;
        assert_eq!(text.trim(), "uid=1234 gid=4321 groups=4321");
    } else {
        assert_eq!(answer.error().code, ErrorCode::PermissionDenied);
    }
}
