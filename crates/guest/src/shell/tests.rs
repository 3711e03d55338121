//! Real shells of this machine: bash, dash and busybox.

use super::control::Flavor;
use super::mark::Nonce;
use super::pty::Launch;
use super::session::{Answer, Session, SessionError, Until, Wait};
use super::*;
use skyrl_protocol::guest::{ShellStartup, ShellText};
use std::time::Instant;

const SHELLS: [(&str, Flavor); 3] = [
    ("/bin/bash", Flavor::Bash),
    ("/bin/dash", Flavor::Posix),
    ("/bin/busybox", Flavor::Posix),
];

fn session(program: &str, flavor: Flavor, text: ShellText) -> Session {
    let launch = Launch {
        program: program.into(),
        flavor,
        env: vec![
            ("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into()),
            ("HOME".into(), "/root".into()),
        ],
        cwd: "/tmp".into(),
        user: None,
        size: (80, 24),
        echo: false,
    };
    let nonce = Nonce::from_u64(random().expect("random"));
    let session = Session::start(launch, text, nonce, false).expect("the shell starts");
    // As `Shell::start` does: an interrupt before it is ready would end it.
    assert_eq!(run(&session, ":"), (String::new(), 0));
    session
}

fn seconds(seconds: u64) -> Wait<'static> {
    Wait {
        timeout: Duration::from_secs(seconds),
        quiet: None,
        until: Until::End,
    }
}

fn run(session: &Session, command: &str) -> (String, i32) {
    session.begin(command, 1 << 20).expect("the shell is idle");
    ended(session.wait(seconds(20)), command)
}

fn ended(answer: Answer, command: &str) -> (String, i32) {
    match answer.state {
        ShellState::Completed { exit_code } => (answer.output, exit_code),
        _ => panic!("{command:?} did not end: {answer:?}"),
    }
}

/// A story told with each shell.
fn with_each(story: impl Fn(&Session, Flavor)) {
    for (program, flavor) in SHELLS {
        // Shown when the story fails.
        eprintln!("{program}");
        let session = session(program, flavor, ShellText::Plain);
        story(&session, flavor);
    }
}

#[test]
fn a_command_answers_with_exactly_its_output_and_exit_code() {
    with_each(|shell, _| {
        assert_eq!(run(shell, "echo hi; false"), ("hi\n".into(), 1));
        assert_eq!(run(shell, "true"), (String::new(), 0));
        assert_eq!(run(shell, "printf no-newline"), ("no-newline".into(), 0));
        assert_eq!(run(shell, "printf 'a\\r\\nb\\n'; sh -c 'exit 37'").1, 37);
        assert_eq!(run(shell, ""), (String::new(), 37));
        assert_eq!(run(shell, "# only a comment"), (String::new(), 37));
        let (text, code) = run(shell, "no-such-program");
        assert_eq!(code, 127);
        assert!(
            text.contains("not found") && !text.contains("/proc"),
            "{text}"
        );
        assert_eq!(
            run(shell, "kill -9 $(sh -c 'echo $$'); sh -c 'kill -9 $$'").1,
            137
        );
    });
}

#[test]
fn the_last_exit_code_directory_variables_and_functions_last() {
    with_each(|shell, _| {
        run(
            shell,
            "cd /usr; x='a  b'; f() { echo \"f:$x\"; }; sh -c 'exit 5'",
        );
        assert_eq!(run(shell, "echo $?"), ("5\n".into(), 0));
        assert_eq!(run(shell, "pwd; f"), ("/usr\nf:a  b\n".into(), 0));
        assert_eq!(shell.facts().cwd, "/usr");
        assert_eq!(run(shell, "export E=1; sh -c 'echo $E'").0, "1\n");
    });
}

#[test]
fn commands_of_many_lines_are_one_command() {
    with_each(|shell, _| {
        let text =
            "for i in 1 2; do\n  echo $i\ndone\ncat <<'E'\n$x 'quoted' \"\nE\necho a \\\n  b";
        assert_eq!(run(shell, text).0, "1\n2\n$x 'quoted' \"\na b\n");
        let long = format!("cat <<'E' | wc -c\n{}\nE", "x".repeat(300_000));
        assert_eq!(run(shell, &long).0.trim(), "300001");
    });
}

#[test]
fn a_syntax_error_is_an_answer_and_the_shell_goes_on() {
    with_each(|shell, _| {
        for broken in [
            "echo \"unterminated",
            "if then fi",
            "case x in",
            "echo $(",
            ")",
            "a <<",
        ] {
            let (text, code) = run(shell, broken);
            assert_ne!(code, 0, "{broken}");
            assert!(!text.is_empty(), "{broken}");
            assert_eq!(run(shell, "echo ok"), ("ok\n".into(), 0), "after {broken}");
        }
    });
}

#[test]
fn tracing_errexit_nounset_and_verbose_disturb_nothing() {
    with_each(|shell, _| {
        let (text, _) = run(shell, "set -x; echo a");
        assert!(text.ends_with("echo a\na\n"), "{text}");
        let (text, _) = run(shell, "echo b");
        assert!(text.trim_start_matches('+') == " echo b\nb\n", "{text}");
        run(shell, "set +x; set -u; set -f; IFS=0123456789abcdef");
        assert_eq!(run(shell, "echo c; false"), ("c\n".into(), 1));
        assert_eq!(run(shell, "echo \"$?\"; unset IFS; set +u +f").0, "1\n");
        run(shell, "set -v");
        assert_eq!(run(shell, "echo d").1, 0);
        run(shell, "set +v");
        assert_eq!(run(shell, "echo e"), ("e\n".into(), 0));
        assert_eq!(
            run(shell, "set -e; true; if false; then :; fi"),
            (String::new(), 0)
        );
        assert_eq!(run(shell, "echo f"), ("f\n".into(), 0));
        shell
            .begin("false; echo not reached", 1 << 20)
            .expect("idle");
        assert_eq!(
            shell.wait(seconds(10)).state,
            ShellState::Exited { exit_code: 1 }
        );
        assert!(matches!(
            shell.begin("echo", 1),
            Err(SessionError::Ended(1))
        ));
    });
}

#[test]
fn prompts_and_prompt_commands_never_show() {
    with_each(|shell, flavor| {
        run(shell, "PS1='prompt> '; PS2='more> '");
        assert_eq!(run(shell, "echo a\necho b").0, "a\nb\n");
        if flavor == Flavor::Bash {
            run(
                shell,
                "PROMPT_COMMAND='echo noise; PS1=\"(venv) \"'; PS0='zero'",
            );
            assert_eq!(run(shell, "echo c").0, "c\n");
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(run(shell, "echo d").0, "d\n");
            run(shell, "unset PROMPT_COMMAND; readonly PS1");
            run(shell, "echo settles");
            assert!(run(shell, "echo e").0.ends_with("e\n"));
        }
    });
}

#[test]
fn traps_and_redirected_shells_still_report() {
    with_each(|shell, flavor| {
        run(shell, "trap 'echo bye' EXIT; trap 'echo usr' USR1");
        assert_eq!(run(shell, "kill -USR1 $$; echo a").0, "usr\na\n");
        if flavor == Flavor::Bash {
            run(shell, "trap 'echo dbg' DEBUG");
            assert!(run(shell, "echo b").0.ends_with("dbg\nb\n"));
            run(shell, "trap - DEBUG; trap 'echo err' ERR");
            assert!(run(shell, "false").0.ends_with("err\n"));
            run(shell, "trap - ERR");
        }
        assert_eq!(run(shell, "exec >/dev/null; echo unseen").0, "");
        assert_eq!(run(shell, "echo unseen; false"), (String::new(), 1));
        assert_eq!(
            run(shell, "exec 2>&-; exec >/dev/tty 2>&1; echo seen").0,
            "seen\n"
        );
        run(
            shell,
            "alias printf=false eval=false; alias command=false; printf() { false; }",
        );
        assert_eq!(run(shell, "unset -f printf; unalias -a; echo c").0, "c\n");
        shell.begin("exit 9", 1 << 20).expect("idle");
        let answer = shell.wait(seconds(10));
        assert_eq!(answer.state, ShellState::Exited { exit_code: 9 });
        // bash says that it exits.
        assert!(answer.output.ends_with("bye\n"), "{}", answer.output);
    });
}

#[test]
fn an_interrupt_ends_programs_loops_and_waits() {
    with_each(|shell, _| {
        for endless in [
            "sleep 100",
            "while :; do :; done",
            "sleep 100; echo not reached",
            "for i in 1 2 3; do sleep 100; done",
            "cat",
            "PS1='(venv) '; read x",
        ] {
            shell.begin(endless, 1 << 20).expect("idle");
            // The terminal acts on the key only once the program is there.
            std::thread::sleep(Duration::from_millis(60));
            let answer = shell.interrupt(Duration::from_secs(5)).expect("alive");
            let (_, code) = ended(answer, endless);
            assert_eq!(code, 130, "{endless}");
            assert_eq!(run(shell, "echo ok").0, "ok\n");
        }
    });
}

#[test]
fn many_interrupts_at_any_moment_lose_no_answer() {
    with_each(|shell, _| {
        for round in 0..40u64 {
            shell.begin("sleep 0.003; echo x", 1 << 20).expect("idle");
            for _ in 0..3 {
                std::thread::sleep(Duration::from_micros(round * 97 % 2500));
                shell.input(b"\x03").expect("input");
            }
            ended(shell.wait(seconds(5)), "interrupted");
        }
        run(shell, "echo settles");
        assert_eq!(run(shell, "echo ok").0, "ok\n");
    });
}

#[test]
fn a_running_command_takes_input_and_the_next_does_not_get_the_rest() {
    with_each(|shell, _| {
        shell
            .begin("echo ready; read a; echo \"got $a\"", 1 << 20)
            .expect("idle");
        let answer = shell.wait(Wait {
            timeout: Duration::from_secs(5),
            quiet: None,
            until: Until::Text(&["ready\n".to_owned()]),
        });
        assert_eq!((answer.output.as_str(), answer.found), ("", Some(0)));
        shell.input(b"one\rleft over\r").expect("input");
        assert_eq!(ended(shell.wait(seconds(5)), "read").0, "got one\n");
        shell.begin("cat", 1 << 20).expect("idle");
        shell.input(b"\x04").expect("input");
        assert_eq!(ended(shell.wait(seconds(5)), "cat"), (String::new(), 0));
    });
}

#[test]
fn a_timeout_leaves_the_command_running_and_its_end_is_told_later() {
    with_each(|shell, _| {
        shell
            .begin("echo a; sleep 0.3; echo b; (exit 4)", 1 << 20)
            .expect("idle");
        let answer = shell.wait(Wait {
            timeout: Duration::from_millis(100),
            quiet: None,
            until: Until::End,
        });
        assert_eq!(
            (answer.output.as_str(), answer.state),
            ("a\n", ShellState::Running)
        );
        assert!(matches!(shell.begin("echo c", 1), Err(SessionError::Busy)));
        assert_eq!(ended(shell.wait(seconds(5)), "rest"), ("b\n".into(), 4));
        assert_eq!(shell.wait(seconds(5)).state, ShellState::Idle);
        shell.begin("echo a; sleep 5", 1 << 20).expect("idle");
        let begun = Instant::now();
        let answer = shell.wait(Wait {
            timeout: Duration::from_secs(4),
            quiet: Some(Duration::from_millis(150)),
            until: Until::End,
        });
        assert_eq!(answer.state, ShellState::Quiet);
        assert!(begun.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn background_jobs_run_on_and_what_they_print_comes_with_the_next_answer() {
    with_each(|shell, _| {
        let begun = Instant::now();
        run(shell, "(sleep 0.2; echo late) & ");
        assert!(begun.elapsed() < Duration::from_millis(200));
        assert!(shell.facts().background.is_some());
        std::thread::sleep(Duration::from_millis(400));
        let (text, _) = run(shell, "echo next");
        assert!(
            text.contains("late\n") && text.ends_with("next\n"),
            "{text}"
        );
        // Many ends while idle: some shells take a signal for end of file.
        run(shell, "for i in 1 2 3 4 5 6 7 8; do sleep 0.0$i & done");
        std::thread::sleep(Duration::from_millis(250));
        assert!(run(shell, "echo alive").0.ends_with("alive\n"));
    });
}

#[test]
fn stopped_jobs_can_be_listed_and_continued() {
    with_each(|shell, _| {
        shell.begin("sleep 0.2; echo never", 1 << 20).expect("idle");
        std::thread::sleep(Duration::from_millis(80));
        shell.input(b"\x1a").expect("input");
        let (_, code) = ended(shell.wait(seconds(5)), "stop");
        assert!(code == 148 || code == 0, "{code}");
        assert!(run(shell, "jobs").0.contains("sleep"));
        assert_eq!(run(shell, "fg >/dev/null").1, 0);
    });
}

#[test]
fn a_thousand_commands_back_to_back_each_get_their_own_answer() {
    for (program, flavor) in SHELLS {
        let shell = session(program, flavor, ShellText::Plain);
        let begun = Instant::now();
        for number in 0..1000 {
            let (text, code) = run(&shell, &format!("echo mark{number}; (exit {})", number % 7));
            assert_eq!((text, code), (format!("mark{number}\n"), number % 7));
        }
        eprintln!("{program}: 1000 commands in {:?}", begun.elapsed());
    }
}

#[test]
fn a_flood_is_bounded_and_answered() {
    let shell = session("/bin/bash", Flavor::Bash, ShellText::Plain);
    shell
        .begin(
            "head -c 100000000 /dev/zero | tr '\\0' y; echo; echo end",
            1 << 16,
        )
        .expect("idle");
    let answer = shell.wait(seconds(60));
    assert_eq!(answer.state, ShellState::Completed { exit_code: 0 });
    assert!(answer.output.len() < (1 << 16) + 100 && answer.output.ends_with("\nend\n"));
    assert!(answer.dropped > 99_000_000);
    assert_eq!(run(&shell, "echo ok").0, "ok\n");
    // Not UTF-8, no lines, everything a terminal can choke on.
    shell
        .begin("head -c 3000000 /dev/urandom; echo; echo end", 1 << 16)
        .expect("idle");
    assert!(matches!(
        shell.wait(seconds(60)).state,
        ShellState::Completed { .. }
    ));
    run(&shell, "echo settles");
    assert_eq!(run(&shell, "echo ok").0, "ok\n");
}

#[test]
fn exec_replaces_the_shell_and_that_is_seen() {
    with_each(|shell, _| {
        shell
            .begin("exec sh -c 'echo other; sleep 0.2; exit 3'", 1 << 20)
            .expect("idle");
        let answer = shell.wait(seconds(5));
        assert_eq!(answer.state, ShellState::Exited { exit_code: 3 });
        assert_eq!(answer.output, "other\n");
        assert!(shell.is_replaced());
    });
}

#[test]
fn a_program_that_wrecks_the_terminal_does_not_spoil_the_next() {
    with_each(|shell, _| {
        run(shell, "stty raw -echo -isig");
        shell.begin("cat", 1 << 20).expect("idle");
        std::thread::sleep(Duration::from_millis(60));
        shell.input(b"line\r\x04").expect("input");
        assert_eq!(ended(shell.wait(seconds(5)), "cat").0, "line\n");
    });
}

#[test]
fn closing_kills_every_process_of_the_session() {
    with_each(|shell, _| {
        run(shell, "trap '' HUP TERM INT");
        let (text, _) = run(
            shell,
            "(trap '' HUP TERM; sleep 300) & nohup sleep 300 >/dev/null 2>&1 & echo $$",
        );
        let session = text.lines().last().expect("pid").to_owned();
        shell.begin("sleep 300", 1 << 20).expect("idle");
        let begun = Instant::now();
        shell.close();
        assert!(begun.elapsed() < Duration::from_secs(2));
        let listing = std::process::Command::new("ps")
            .args(["-o", "pid=,stat=,args=", "-s", &session])
            .output()
            .expect("ps");
        let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
        let alive: Vec<&str> = listing
            .lines()
            .filter(|line| !line.contains(" Z"))
            .collect();
        assert!(alive.is_empty(), "{alive:?}");
        assert!(!shell.is_alive());
    });
}

#[test]
fn a_shells_descriptors_are_its_own() {
    with_each(|shell, _| {
        let (text, _) = run(shell, "ls -l /proc/self/fd");
        assert!(
            !text.contains("pipe:") && !text.contains("eventfd"),
            "{text}"
        );
    });
}

fn surroundings() -> Surroundings {
    Surroundings {
        env: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin:/opt/image/bin".to_owned())]),
        cwd: "/tmp".into(),
        probe_python: true,
        patience: Duration::from_secs(10),
    }
}

#[test]
fn start_files_are_read_as_an_interactive_shell_reads_them() {
    let home = tempfile::tempdir().expect("home");
    let bashrc = "case $- in *i*) ;; *) return ;; esac\n[ -z \"$PS1\" ] && return\n\
                  echo hello from bashrc\nshopt -s expand_aliases\nalias ll='echo aliased'\nPS1='\\u@\\h:\\w\\$ '\n";
    std::fs::write(home.path().join(".bashrc"), bashrc).expect("bashrc");
    std::fs::write(home.path().join(".profile"), ". ~/.bashrc; echo profile\n").expect("profile");
    let shells = Shells::new();
    let spec = |id: &str, startup| ShellSpec {
        id: Some(id.into()),
        startup,
        env: BTreeMap::from([(
            "HOME".to_owned(),
            home.path().to_str().expect("utf-8").to_owned(),
        )]),
        ..ShellSpec::default()
    };
    let (shell, output) = shells
        .create(&spec("a", ShellStartup::Interactive), surroundings())
        .expect("starts");
    assert_eq!(output, "hello from bashrc\n");
    assert_eq!(run(shell.session(), "ll").0, "aliased\n");
    assert_eq!(
        run(shell.session(), "source ~/.bashrc; echo x").0,
        "hello from bashrc\nx\n"
    );
    let python = run(shell.session(), "type -P python").0;
    assert_eq!(shell.session().facts().python, python.trim_end());
    let (shell, output) = shells
        .create(&spec("b", ShellStartup::Login), surroundings())
        .expect("starts");
    assert!(output.ends_with("hello from bashrc\nprofile\n"), "{output}");
    assert!(
        run(shell.session(), "echo $PATH")
            .0
            .contains("/opt/image/bin")
    );
    let (_, output) = shells
        .create(&spec("c", ShellStartup::None), surroundings())
        .expect("starts");
    assert_eq!(output, "");
    assert!(matches!(
        shells.create(&spec("c", ShellStartup::None), surroundings()),
        Err(ShellError::Exists(_))
    ));
    assert_eq!(shells.list().len(), 3);
    shells.close("a").expect("closes");
    assert!(matches!(shells.get("a"), Err(ShellError::NotFound(_))));
    assert_eq!(shells.alive(), 2);
}

#[test]
fn start_files_that_hang_or_exit_give_an_error() {
    let home = tempfile::tempdir().expect("home");
    let shells = Shells::new();
    let spec = ShellSpec {
        env: BTreeMap::from([(
            "HOME".to_owned(),
            home.path().to_str().expect("utf-8").to_owned(),
        )]),
        ..ShellSpec::default()
    };
    let quick = || Surroundings {
        patience: Duration::from_millis(300),
        ..surroundings()
    };
    std::fs::write(home.path().join(".bashrc"), "echo stuck; read x").expect("bashrc");
    match shells.create(&spec, quick()) {
        Err(ShellError::StartTimeout { output }) => assert!(output.contains("stuck")),
        other => panic!("{:?}", other.map(|(shell, output)| (shell.info(), output))),
    }
    std::fs::write(home.path().join(".bashrc"), "exit 7").expect("bashrc");
    assert!(matches!(
        shells.create(&spec, quick()),
        Err(ShellError::Ended(7))
    ));
    let nowhere = ShellSpec {
        cwd: Some("/nowhere".into()),
        ..ShellSpec::default()
    };
    assert!(matches!(
        shells.create(&nowhere, quick()),
        Err(ShellError::Start { .. })
    ));
    assert_eq!(shells.list().len(), 0);
}
