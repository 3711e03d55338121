//! Persistent shells over the wire: bash, dash and busybox as this machine has
//! them.

mod common;

use common::{TestGuest, eventually, is_alive};
use skyrl_protocol::guest::{
    ErrorCode, Keys, ShellInfo, ShellInput, ShellOutput, ShellRead, ShellRun, ShellSpec,
    ShellStartup, ShellState, ShellText,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// One shell of a guest.
struct Shell<'g> {
    guest: &'g TestGuest,
    id: String,
    /// What answers to input told; a command may end at any of them.
    told: RefCell<Vec<ShellOutput>>,
}

impl<'g> Shell<'g> {
    fn start(guest: &'g TestGuest, spec: &ShellSpec) -> Self {
        let info: ShellInfo = guest.post("/v1/shells", spec).ok();
        Self {
            guest,
            id: info.id,
            told: RefCell::default(),
        }
    }

    fn post<T: serde::Serialize>(&self, action: &str, body: &T) -> ShellOutput {
        self.guest
            .post(&format!("/v1/shells/{}/{action}", self.id), body)
            .ok()
    }

    fn send(&self, run: &ShellRun) -> ShellOutput {
        self.post("run", run)
    }

    /// Runs a command to its end: its output and exit code.
    fn run(&self, command: &str) -> (String, i32) {
        ended(self.send(&command_for(command, 20_000)), command)
    }

    /// Starts a command and leaves it running.
    fn begin(&self, command: &str) {
        let answer = self.send(&command_for(command, 0));
        assert_eq!(answer.state, ShellState::Running, "{command:?}: {answer:?}");
    }

    /// Waits for the end of the running command; gives all it printed.
    fn finish(&self, what: &str) -> (String, i32) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut so_far = String::new();
        let mut told = self.told.take().into_iter();
        loop {
            let mut answer = told
                .next()
                .unwrap_or_else(|| self.post("read", &waiting(20_000)));
            answer.output.insert_str(0, &so_far);
            if answer.state != ShellState::Running || Instant::now() > deadline {
                return ended(answer, what);
            }
            so_far = answer.output;
        }
    }

    fn input(&self, input: Keys) {
        let answer = self.post("input", &ShellInput { input, wait_ms: 0 });
        self.told.borrow_mut().push(answer);
    }

    fn interrupt(&self) -> ShellOutput {
        self.post("interrupt", &waiting(5_000))
    }

    fn info(&self) -> ShellInfo {
        let list: Vec<ShellInfo> = self.guest.send("GET", "/v1/shells", b"").ok();
        list.into_iter().find(|s| s.id == self.id).expect("listed")
    }

    fn close(&self) {
        let target = format!("/v1/shells/{}", self.id);
        let _: serde_json::Value = self.guest.send("DELETE", &target, b"").ok();
    }
}

fn command_for(command: &str, timeout_ms: u64) -> ShellRun {
    ShellRun {
        command: command.to_owned(),
        timeout_ms,
        quiet_ms: None,
        output_limit: 1 << 20,
    }
}

fn waiting(wait_ms: u64) -> ShellRead {
    ShellRead {
        wait_ms,
        expect: Vec::new(),
    }
}

fn ended(answer: ShellOutput, command: &str) -> (String, i32) {
    match answer.state {
        ShellState::Completed { exit_code } => (answer.output, exit_code),
        _ => panic!("{command:?} did not end: {answer:?}"),
    }
}

/// A shell of this machine without its start files.
fn plain(program: &Path) -> ShellSpec {
    ShellSpec {
        program: Some(program.to_str().expect("utf-8").to_owned()),
        startup: ShellStartup::None,
        cwd: Some("/tmp".into()),
        ..ShellSpec::default()
    }
}

/// A story told with each shell; whether it is bash is its second argument.
fn with_each(story: impl Fn(&Shell<'_>, bool)) {
    let guest = TestGuest::start();
    let busybox = guest.dir.path().join("sh");
    std::os::unix::fs::symlink("/bin/busybox", &busybox).expect("link");
    for program in [Path::new("/bin/bash"), Path::new("/bin/dash"), &busybox] {
        // Shown when the story fails.
        eprintln!("{}", program.display());
        story(
            &Shell::start(&guest, &plain(program)),
            program.ends_with("bash"),
        );
    }
}

#[test]
fn a_command_answers_with_exactly_its_output_and_exit_code() {
    with_each(|shell, _| {
        assert_eq!(shell.run("echo hi; false"), ("hi\n".into(), 1));
        assert_eq!(shell.run("true"), (String::new(), 0));
        assert_eq!(shell.run("printf no-newline"), ("no-newline".into(), 0));
        assert_eq!(shell.run("printf 'a\\r\\nb\\n'; sh -c 'exit 37'").1, 37);
        assert_eq!(shell.run(""), (String::new(), 37));
        assert_eq!(shell.run("# only a comment"), (String::new(), 37));
        let (text, code) = shell.run("no-such-program");
        assert_eq!(code, 127);
        assert!(
            text.contains("not found") && !text.contains("/proc"),
            "{text}"
        );
        assert_eq!(
            shell
                .run("kill -9 $(sh -c 'echo $$'); sh -c 'kill -9 $$'")
                .1,
            137
        );
    });
}

#[test]
fn the_last_exit_code_directory_variables_and_functions_last() {
    with_each(|shell, _| {
        shell.run("cd /usr; x='a  b'; f() { echo \"f:$x\"; }; sh -c 'exit 5'");
        assert_eq!(shell.run("echo $?"), ("5\n".into(), 0));
        assert_eq!(shell.run("pwd; f"), ("/usr\nf:a  b\n".into(), 0));
        assert_eq!(
            shell.send(&command_for("true", 9000)).cwd.as_deref(),
            Some("/usr")
        );
        assert_eq!(shell.run("export E=1; sh -c 'echo $E'").0, "1\n");
    });
}

#[test]
fn commands_of_many_lines_are_one_command() {
    with_each(|shell, _| {
        let text =
            "for i in 1 2; do\n  echo $i\ndone\ncat <<'E'\n$x 'quoted' \"\nE\necho a \\\n  b";
        assert_eq!(shell.run(text).0, "1\n2\n$x 'quoted' \"\na b\n");
        let long = format!("cat <<'E' | wc -c\n{}\nE", "x".repeat(300_000));
        assert_eq!(shell.run(&long).0.trim(), "300001");
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
            let (text, code) = shell.run(broken);
            assert_ne!(code, 0, "{broken}");
            assert!(!text.is_empty(), "{broken}");
            assert_eq!(shell.run("echo ok"), ("ok\n".into(), 0), "after {broken}");
        }
    });
}

#[test]
fn tracing_errexit_nounset_and_verbose_disturb_nothing() {
    with_each(|shell, _| {
        let (text, _) = shell.run("set -x; echo a");
        assert!(text.ends_with("echo a\na\n"), "{text}");
        let (text, _) = shell.run("echo b");
        assert!(text.trim_start_matches('+') == " echo b\nb\n", "{text}");
        shell.run("set +x; set -u; set -f; IFS=0123456789abcdef");
        assert_eq!(shell.run("echo c; false"), ("c\n".into(), 1));
        assert_eq!(shell.run("echo \"$?\"; unset IFS; set +u +f").0, "1\n");
        shell.run("set -v");
        assert_eq!(shell.run("echo d").1, 0);
        shell.run("set +v");
        assert_eq!(shell.run("echo e"), ("e\n".into(), 0));
        assert_eq!(
            shell.run("set -e; true; if false; then :; fi"),
            (String::new(), 0)
        );
        assert_eq!(shell.run("echo f"), ("f\n".into(), 0));
        let answer = shell.send(&command_for("false; echo not reached", 9000));
        assert_eq!(answer.state, ShellState::Exited { exit_code: 1 });
        let target = format!("/v1/shells/{}/run", shell.id);
        let refused = shell.guest.post(&target, &command_for("echo", 0)).error();
        assert_eq!(refused.code, ErrorCode::Conflict);
    });
}

#[test]
fn prompts_and_prompt_commands_never_show() {
    with_each(|shell, is_bash| {
        shell.run("PS1='prompt> '; PS2='more> '");
        assert_eq!(shell.run("echo a\necho b").0, "a\nb\n");
        if is_bash {
            shell.run("PROMPT_COMMAND='echo noise; PS1=\"(venv) \"'; PS0='zero'");
            assert_eq!(shell.run("echo c").0, "c\n");
            pause(50);
            assert_eq!(shell.run("echo d").0, "d\n");
            shell.run("runs=; PROMPT_COMMAND='runs=x$runs'");
            assert_eq!(shell.run("echo $runs $PROMPT_COMMAND").0, "x runs=x$runs\n");
            assert_eq!(shell.run("echo $runs").0, "xx\n");
            shell.run("unset PROMPT_COMMAND; readonly PS1");
            shell.run("echo settles");
            assert!(shell.run("echo e").0.ends_with("e\n"));
        }
    });
}

#[test]
fn traps_and_redirected_shells_still_report() {
    with_each(|shell, is_bash| {
        shell.run("trap 'echo bye' EXIT; trap 'echo usr' USR1");
        assert_eq!(shell.run("kill -USR1 $$; echo a").0, "usr\na\n");
        if is_bash {
            shell.run("trap 'echo dbg' DEBUG");
            assert!(shell.run("echo b").0.ends_with("dbg\nb\n"));
            shell.run("trap - DEBUG; trap 'echo err' ERR");
            assert!(shell.run("false").0.ends_with("err\n"));
            shell.run("trap - ERR");
        }
        assert_eq!(shell.run("exec >/dev/null; echo unseen").0, "");
        assert_eq!(shell.run("echo unseen; false"), (String::new(), 1));
        assert_eq!(
            shell.run("exec 2>&-; exec >/dev/tty 2>&1; echo seen").0,
            "seen\n"
        );
        shell.run("alias printf=false eval=false; alias command=false; printf() { false; }");
        assert_eq!(shell.run("unset -f printf; unalias -a; echo c").0, "c\n");
        let answer = shell.send(&command_for("exit 9", 9000));
        assert_eq!(answer.state, ShellState::Exited { exit_code: 9 });
        // bash says that it exits.
        assert!(answer.output.ends_with("bye\n"), "{}", answer.output);
    });
}

/// Lets the shell come so far as it does by itself: there is nothing to wait
/// for that would tell.
fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
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
            shell.begin(endless);
            pause(60);
            let (_, code) = ended(shell.interrupt(), endless);
            assert_eq!(code, 130, "{endless}");
            assert_eq!(shell.run("echo ok").0, "ok\n");
        }
    });
}

#[test]
fn many_interrupts_at_any_moment_lose_no_answer() {
    with_each(|shell, _| {
        for round in 0..40u64 {
            shell.begin("sleep 0.01; echo x");
            for _ in 0..3 {
                std::thread::sleep(Duration::from_micros(round * 97 % 2500));
                shell.input(Keys::Key("C-c".into()));
            }
            shell.finish("interrupted");
            let (text, _) = shell.run("echo next");
            assert!(text.ends_with("next\n"), "{text:?}");
        }
    });
}

#[test]
fn a_running_command_takes_input_and_the_next_does_not_get_the_rest() {
    with_each(|shell, _| {
        shell.begin("read a; echo \"got $a\"");
        shell.input(Keys::Text("one\rleft over\r".into()));
        assert_eq!(shell.finish("read").0, "got one\n");
        shell.begin("cat");
        shell.input(Keys::Line("line".into()));
        shell.input(Keys::Key("C-d".into()));
        assert_eq!(shell.finish("cat"), ("line\n".into(), 0));
        let target = format!("/v1/shells/{}/input", shell.id);
        let unknown = ShellInput {
            input: Keys::Key("Hyper".into()),
            wait_ms: 0,
        };
        let refused = shell.guest.post(&target, &unknown).error();
        assert_eq!(refused.code, ErrorCode::BadRequest);
    });
}

#[test]
fn input_shows_in_the_output_only_where_the_terminal_echoes() {
    let guest = TestGuest::start();
    let spec = ShellSpec {
        echo: true,
        ..plain(Path::new("/bin/bash"))
    };
    let shell = Shell::start(&guest, &spec);
    assert_eq!(
        shell
            .run("echo the command itself does not show")
            .0
            .lines()
            .count(),
        1
    );
    shell.begin("read a; echo \"got $a\"");
    shell.input(Keys::Line("typed".into()));
    assert_eq!(shell.finish("read").0, "typed\ngot typed\n");
}

#[test]
fn a_timeout_leaves_the_command_running_and_its_end_is_told_later() {
    with_each(|shell, _| {
        let answer = shell.send(&command_for("echo a; sleep 0.5; echo b; (exit 4)", 200));
        assert_eq!(
            (answer.output.as_str(), answer.state),
            ("a\n", ShellState::Running)
        );
        let target = format!("/v1/shells/{}/run", shell.id);
        let refused = shell.guest.post(&target, &command_for("echo c", 0)).error();
        assert_eq!(refused.code, ErrorCode::Conflict);
        assert!(shell.info().busy);
        assert_eq!(shell.finish("the rest"), ("b\n".into(), 4));
        assert_eq!(
            shell.post("read", &ShellRead::default()).state,
            ShellState::Idle
        );
        let begun = Instant::now();
        let answer = shell.send(&ShellRun {
            quiet_ms: Some(150),
            ..command_for("echo a; sleep 5", 4000)
        });
        assert_eq!(answer.state, ShellState::Quiet);
        assert!(begun.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn an_expected_text_ends_the_wait_and_what_follows_it_is_kept() {
    let guest = TestGuest::start();
    let shell = Shell::start(&guest, &plain(Path::new("/bin/bash")));
    shell.begin("for i in 1 2 3 4 5; do echo line $i; sleep 0.02; done; printf 'name? '; read x; echo hello $x");
    let expecting = |texts: &[&str]| ShellRead {
        wait_ms: 9000,
        expect: texts.iter().map(|text| (*text).to_owned()).collect(),
    };
    let answer = shell.post("read", &expecting(&["never", "line 3\n"]));
    assert_eq!(
        (answer.output.as_str(), answer.found),
        ("line 1\nline 2\n", Some(1))
    );
    let answer = shell.post("read", &expecting(&["name? "]));
    assert_eq!(
        (answer.output.as_str(), answer.found),
        ("line 4\nline 5\n", Some(0))
    );
    shell.input(Keys::Line("you".into()));
    assert_eq!(shell.finish("read").0, "hello you\n");
}

#[test]
fn a_client_that_leaves_takes_no_output_with_it() {
    let guest = TestGuest::start();
    let shell = Shell::start(&guest, &plain(Path::new("/bin/bash")));
    let mut client = guest.connect();
    let body = serde_json::to_vec(&command_for("sleep 0.3; echo kept; sleep 2", 60_000)).unwrap();
    let head = format!(
        "POST /v1/shells/{}/run HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        shell.id,
        body.len()
    );
    client.write(head.as_bytes());
    client.write(&body);
    eventually("the command runs", || shell.info().busy);
    drop(client);
    assert_eq!(shell.finish("after the client left"), ("kept\n".into(), 0));
}

#[test]
fn background_jobs_run_on_and_what_they_print_comes_with_the_next_answer() {
    with_each(|shell, _| {
        let begun = Instant::now();
        shell.run("(sleep 0.4; echo late) & ");
        assert!(begun.elapsed() < Duration::from_millis(400));
        pause(600);
        let (text, _) = shell.run("echo next");
        assert!(
            text.contains("late\n") && text.ends_with("next\n"),
            "{text}"
        );
        // Many ends while idle: some shells take a signal for end of file.
        shell.run("for i in 1 2 3 4 5 6 7 8; do sleep 0.0$i & done");
        pause(300);
        assert!(shell.run("echo alive").0.ends_with("alive\n"));
    });
}

#[test]
fn stopped_jobs_can_be_listed_and_continued() {
    with_each(|shell, _| {
        shell.begin("sleep 0.3; echo never");
        pause(100);
        shell.input(Keys::Key("C-z".into()));
        let (_, code) = shell.finish("stop");
        assert!(code == 148 || code == 0, "{code}");
        assert!(shell.run("jobs").0.contains("sleep"));
        assert_eq!(shell.run("fg >/dev/null").1, 0);
    });
}

#[test]
fn a_thousand_commands_back_to_back_each_get_their_own_answer() {
    with_each(|shell, _| {
        let mut client = shell.guest.connect();
        let target = format!("/v1/shells/{}/run", shell.id);
        let begun = Instant::now();
        for number in 0..1000 {
            let run = command_for(&format!("echo mark{number}; (exit {})", number % 7), 9000);
            let body = serde_json::to_vec(&run).unwrap();
            let answer: ShellOutput = client.send("POST", &target, &[], &body).ok();
            let expected = (format!("mark{number}\n"), number % 7);
            assert_eq!(ended(answer, &run.command), expected);
        }
        eprintln!("1000 commands in {:?}", begun.elapsed());
    });
}

#[test]
fn a_flood_is_bounded_and_answered() {
    let guest = TestGuest::start();
    let shell = Shell::start(&guest, &plain(Path::new("/bin/bash")));
    let flood = |command: &str| {
        shell.send(&ShellRun {
            output_limit: 1 << 16,
            ..command_for(command, 60_000)
        })
    };
    let answer = flood("head -c 100000000 /dev/zero | tr '\\0' y; echo; echo end");
    assert_eq!(answer.state, ShellState::Completed { exit_code: 0 });
    assert!(answer.output.len() < (1 << 16) + 100 && answer.output.ends_with("\nend\n"));
    assert!(answer.dropped_bytes > 99_000_000);
    assert_eq!(shell.run("echo ok").0, "ok\n");
    // Not UTF-8, no lines, everything a terminal can choke on.
    let answer = flood("head -c 3000000 /dev/urandom; echo; echo end");
    assert!(matches!(answer.state, ShellState::Completed { .. }));
    assert_eq!(shell.run("echo ok").0, "ok\n");
    // A job that floods while nobody asks.
    shell.run("(head -c 10000000 /dev/zero | tr '\\0' y; echo; echo done > done) & cd /tmp");
    let done = format!("ls {}", guest.path("done"));
    shell.run(&format!("wait; {done}"));
    assert!(guest.rss_kib() < 64 << 10, "{} KiB", guest.rss_kib());
}

#[test]
fn exec_replaces_the_shell_and_its_end_ends_the_session() {
    with_each(|shell, _| {
        let answer = shell.send(&command_for("exec sh -c 'echo other; exit 3'", 9000));
        assert_eq!(answer.state, ShellState::Exited { exit_code: 3 });
        assert_eq!(answer.output, "other\n");
        assert!(!shell.info().alive);
    });
}

#[test]
fn a_program_that_wrecks_the_terminal_does_not_spoil_the_next() {
    with_each(|shell, _| {
        shell.run("stty raw -echo -isig");
        shell.begin("cat");
        shell.input(Keys::Line("line".into()));
        shell.input(Keys::Key("C-d".into()));
        assert_eq!(shell.finish("cat").0, "line\n");
    });
}

#[test]
fn closing_kills_every_process_of_the_session() {
    with_each(|shell, _| {
        shell.run("trap '' HUP TERM INT");
        let (text, _) = shell.run(
            "(trap '' HUP TERM; exec sleep 300) & echo pid:$!; \
             nohup setsid sleep 300 >/dev/null 2>&1 & echo pid:$!",
        );
        let pids: Vec<i32> = text
            .split("pid:")
            .skip(1)
            .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
            .collect();
        assert_eq!(pids.len(), 2, "{text}");
        shell.begin("sleep 300");
        let begun = Instant::now();
        shell.close();
        assert!(begun.elapsed() < Duration::from_secs(2));
        eventually("all are gone", || !pids.iter().any(|pid| is_alive(*pid)));
        let target = format!("/v1/shells/{}/run", shell.id);
        let gone = shell.guest.post(&target, &command_for("echo", 0)).error();
        assert_eq!(gone.code, ErrorCode::NotFound);
    });
}

#[test]
fn closing_a_shell_that_has_exited_kills_its_background_jobs() {
    with_each(|shell, _| {
        let (text, _) = shell.run("nohup sleep 300 >/dev/null 2>&1 & echo pid:$!");
        let pid = text
            .split("pid:")
            .nth(1)
            .and_then(|p| p.trim().parse().ok());
        let pid: i32 = pid.expect("a pid");
        shell.send(&command_for("exit 0", 9000));
        eventually("the shell is gone", || !shell.info().alive);
        assert!(is_alive(pid));
        shell.close();
        eventually("the job is gone", || !is_alive(pid));
    });
}

#[test]
fn shells_die_with_a_guest_that_is_killed() {
    let mut guest = TestGuest::start();
    let shells: Vec<i32> = [Path::new("/bin/bash"), Path::new("/bin/dash")]
        .map(|program| {
            let shell = Shell::start(&guest, &plain(program));
            shell.begin("sleep 300");
            shell.info().pid
        })
        .to_vec();
    guest.signal(libc::SIGKILL);
    guest.await_end(Duration::from_secs(5));
    eventually("the shells are gone", || {
        !shells.iter().any(|pid| is_alive(*pid))
    });
}

#[test]
fn a_shell_has_no_descriptor_but_its_terminal() {
    with_each(|shell, _| {
        let (text, _) = shell.run("ls -l /proc/self/fd 2>/dev/null");
        for ours in ["pipe:", "socket:", "anon_inode:", "memfd:"] {
            assert!(!text.contains(ours), "{text}");
        }
    });
}

#[test]
fn the_text_can_be_raw_plain_or_a_screen() {
    let guest = TestGuest::start();
    let show = |text| {
        let spec = ShellSpec {
            text,
            ..plain(Path::new("/bin/bash"))
        };
        Shell::start(&guest, &spec)
            .run("printf '\\033[1m10%%\\r100%%\\033[0m\\r\\n\\377'")
            .0
    };
    assert_eq!(
        show(ShellText::Raw),
        "\u{1b}[1m10%\r100%\u{1b}[0m\r\n\u{fffd}"
    );
    assert_eq!(show(ShellText::Plain), "10%\r100%\n\u{fffd}");
    assert_eq!(show(ShellText::Screen), "100%\n\u{fffd}");
}

#[test]
fn start_files_are_read_as_an_interactive_shell_reads_them() {
    let guest = TestGuest::start();
    let home = guest.dir.path();
    let bashrc = "case $- in *i*) ;; *) return ;; esac\n[ -z \"$PS1\" ] && return\n\
                  alias ll='echo aliased'\nPS1='\\u@\\h:\\w\\$ '\nFROM=bashrc\n";
    std::fs::write(home.join(".bashrc"), bashrc).expect("bashrc");
    std::fs::write(home.join(".profile"), ". ~/.bashrc; FROM=$FROM,profile\n").expect("profile");
    let start = |startup| {
        let spec = ShellSpec {
            startup,
            env: BTreeMap::from([
                ("HOME".to_owned(), home.to_str().expect("utf-8").to_owned()),
                ("PATH".to_owned(), "/usr/bin:/bin:/opt/image/bin".to_owned()),
            ]),
            ..ShellSpec::default()
        };
        Shell::start(&guest, &spec)
    };
    let shell = start(ShellStartup::Interactive);
    assert_eq!(shell.run("ll $FROM").0, "aliased bashrc\n");
    assert_eq!(shell.run("source ~/.bashrc; echo x").0, "x\n");
    let shell = start(ShellStartup::Login);
    assert_eq!(shell.run("echo $FROM").0, "bashrc,profile\n");
    assert!(shell.run("echo $PATH").0.contains("/opt/image/bin"));
    let shell = start(ShellStartup::None);
    assert_eq!(shell.run("echo $FROM").0, "\n");
    assert_eq!(
        shell.run("echo $HOME; pwd").0,
        format!("{}\n{}\n", home.display(), guest.work().display())
    );
}

#[test]
fn shells_that_cannot_start_say_why_and_leave_nothing() {
    let guest = TestGuest::start();
    let home = guest.dir.path();
    let env = BTreeMap::from([("HOME".to_owned(), home.to_str().expect("utf-8").to_owned())]);
    std::fs::write(home.join(".bashrc"), "exit 7").expect("bashrc");
    let refused = |spec: &ShellSpec| guest.post("/v1/shells", spec).error();
    let spec = ShellSpec {
        env,
        ..ShellSpec::default()
    };
    assert!(refused(&spec).message.contains("exit code 7"));
    let spec = ShellSpec {
        cwd: Some("/nowhere".into()),
        ..ShellSpec::default()
    };
    assert_eq!(refused(&spec).code, ErrorCode::NotFound);
    assert_eq!(
        refused(&plain(Path::new("/no/shell"))).code,
        ErrorCode::CannotExecute
    );
    let named = ShellSpec {
        id: Some("a".into()),
        ..plain(Path::new("/bin/bash"))
    };
    let shell = Shell::start(&guest, &named);
    assert_eq!(refused(&named).code, ErrorCode::Conflict);
    shell.close();
    let list: Vec<ShellInfo> = guest.send("GET", "/v1/shells", b"").ok();
    assert_eq!(list, []);
}

#[test]
fn the_number_of_shells_is_bounded_and_dead_ones_make_room() {
    let guest = TestGuest::start();
    let spec = plain(Path::new("/bin/dash"));
    let shells: Vec<Shell<'_>> = (0..256).map(|_| Shell::start(&guest, &spec)).collect();
    let refused = guest.post("/v1/shells", &spec).error();
    assert_eq!(refused.code, ErrorCode::LimitReached);
    shells[7].send(&command_for("exit", 9000));
    Shell::start(&guest, &spec);
}
