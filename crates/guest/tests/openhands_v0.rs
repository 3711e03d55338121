//! The OpenHands V0 dialect over the wire.

mod common;

use common::{Answer, TestGuest, encode};
use serde_json::{Value, json};
use std::io::{Cursor, Read, Write};
use std::time::{Duration, Instant};
use zip::write::SimpleFileOptions;
use zip::{ZipArchive, ZipWriter};

/// A guest whose agent has a home of its own, so that this machine's start
/// files have no say.
fn start() -> TestGuest {
    start_with(&[])
}

fn start_with(variables: &[(&str, &str)]) -> TestGuest {
    TestGuest::start_with(|command, dir| {
        command
            .env("HOME", dir)
            .env_remove("PROMPT_COMMAND")
            .envs(variables.iter().copied());
    })
}

fn execute(guest: &TestGuest, kind: &str, arguments: Value, timeout: Option<f64>) -> Answer {
    let action = json!({
        "action": {
            "action": kind, "message": "", "args": arguments, "timeout": timeout,
            "source": "agent", "id": 7,
        }
    });
    guest.post("/execute_action", &action)
}

fn run_with(guest: &TestGuest, command: &str, more: Value, timeout: Option<f64>) -> Value {
    let mut arguments = json!({
        "command": command, "is_input": false, "blocking": false, "is_static": false,
        "cwd": null, "hidden": false, "thought": "", "security_risk": -1,
        "confirmation_state": "confirmed",
    });
    arguments
        .as_object_mut()
        .expect("object")
        .extend(more.as_object().cloned().unwrap_or_default());
    execute(guest, "run", arguments, timeout).ok()
}

/// With a hard time limit, as callers that set one do.
fn run(guest: &TestGuest, command: &str) -> Value {
    run_with(guest, command, json!({"blocking": true}), Some(30.0))
}

fn input(guest: &TestGuest, text: &str) -> Value {
    run_with(guest, text, json!({"is_input": true}), Some(20.0))
}

fn metadata<'v>(observation: &'v Value, name: &str) -> &'v Value {
    &observation["extras"]["metadata"][name]
}

#[test]
fn a_command_is_observed_with_all_that_the_client_reads_and_nothing_else() {
    let guest = start();
    let observation = run(&guest, "echo hello; sleep 300 &");
    let work = guest.work();
    let content = observation["content"].as_str().expect("text");
    assert!(content.starts_with("hello\n[1] "), "{content:?}");
    let observation = run(&guest, "  (exit 3)  ");
    assert_eq!(observation["observation"], "run");
    assert_eq!(observation["content"], "");
    assert_eq!(
        observation["message"],
        "Command `(exit 3)` executed with exit code 3."
    );
    assert_eq!(observation["success"], false);
    let extras = observation["extras"].as_object().expect("extras");
    let mut names: Vec<&str> = extras.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["command", "hidden", "metadata"]);
    assert_eq!(
        (&extras["command"], &extras["hidden"]),
        (&json!("(exit 3)"), &json!(false))
    );
    let fields = extras["metadata"].as_object().expect("metadata");
    let mut names: Vec<&str> = fields.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "exit_code",
            "hostname",
            "pid",
            "prefix",
            "py_interpreter_path",
            "suffix",
            "username",
            "working_dir"
        ]
    );
    assert_eq!(fields["exit_code"], 3);
    assert!(fields["pid"].as_i64().expect("pid") > 0);
    assert_eq!(fields["working_dir"], work.to_str().expect("utf-8"));
    assert_eq!(fields["prefix"], "");
    assert_eq!(
        fields["suffix"],
        "\n[The command completed with exit code 3.]"
    );
    let python = run(&guest, "which python || true");
    assert_eq!(metadata(&python, "py_interpreter_path"), &python["content"]);
}

#[test]
fn state_lasts_and_git_has_no_pager() {
    let guest = start();
    run(&guest, "export A=1; cd /usr; f() { echo \"f $1\"; }");
    let observation = run(&guest, "pwd; echo $A; f x; echo $?");
    assert_eq!(observation["content"], "/usr\n1\nf x\n0");
    assert_eq!(metadata(&observation, "working_dir"), "/usr");
    assert!(
        run(&guest, "alias git")["content"]
            .as_str()
            .expect("text")
            .contains("--no-pager")
    );
    let apart = run_with(
        &guest,
        "pwd; A=2; cd /",
        json!({"is_static": true, "cwd": "/tmp"}),
        Some(30.0),
    );
    assert_eq!(apart["content"], "/tmp");
    assert_eq!(run(&guest, "pwd; echo $A")["content"], "/usr\n1");
}

#[test]
fn a_silent_command_can_be_waited_for_and_typed_to() {
    let guest = start_with(&[("NO_CHANGE_TIMEOUT_SECONDS", "1")]);
    let command = "echo first; read x; echo \"got $x\"; sleep 1.5; echo last";
    let observation = run_with(&guest, command, json!({}), Some(60.0));
    assert_eq!(observation["content"], "first");
    assert_eq!(metadata(&observation, "exit_code"), -1);
    assert_eq!(metadata(&observation, "working_dir"), &Value::Null);
    let suffix = metadata(&observation, "suffix")
        .as_str()
        .expect("text")
        .to_owned();
    assert!(
        suffix.starts_with("\n[The command has no new output after 1 seconds. "),
        "{suffix}"
    );
    for choice in [
        "empty command ''",
        "\"C-c\"",
        "\"C-z\"",
        "\"C-d\"",
        "timeout parameter",
    ] {
        assert!(suffix.contains(choice), "{suffix}");
    }
    let refused = run(&guest, "echo other");
    assert_eq!(refused["content"], "");
    assert_eq!(metadata(&refused, "exit_code"), -1);
    assert_eq!(
        metadata(&refused, "prefix"),
        "[Below is the output of the previous command.]\n"
    );
    let suffix = metadata(&refused, "suffix").as_str().expect("text");
    assert!(
        suffix.starts_with(
            "\n[Your command \"echo other\" is NOT executed. The previous command is still \
             running - You CANNOT send new commands until the previous command is completed. \
             By setting `is_input` to `true`, you can interact with the current process: "
        ),
        "{suffix}"
    );
    let typed = input(&guest, "answer");
    assert_eq!(typed["content"], "got answer");
    assert_eq!(metadata(&typed, "exit_code"), -1);
    let done = run_with(&guest, "", json!({}), Some(20.0));
    assert_eq!(done["content"], "last");
    assert_eq!(metadata(&done, "exit_code"), 0);
    assert_eq!(
        metadata(&done, "prefix"),
        "[Below is the output of the previous command.]\n"
    );
    assert_eq!(run(&guest, "echo free")["content"], "free");
}

#[test]
fn a_hard_timeout_leaves_the_command_and_a_key_ends_it() {
    let guest = start();
    let observation = run_with(
        &guest,
        "echo a; sleep 300",
        json!({"blocking": true}),
        Some(1.0),
    );
    assert_eq!(observation["content"], "a");
    let suffix = metadata(&observation, "suffix").as_str().expect("text");
    assert!(
        suffix.starts_with("\n[The command timed out after 1.0 seconds. "),
        "{suffix}"
    );
    let ended = input(&guest, "C-c");
    assert_eq!(metadata(&ended, "exit_code"), 130);
    assert_eq!(
        metadata(&ended, "suffix"),
        "\n[The command completed with exit code 130. CTRL+C was sent.]"
    );
    let observation = run(&guest, "echo b");
    assert_eq!(observation["content"], "b");
    assert_eq!(metadata(&observation, "prefix"), "");
}

#[test]
fn without_a_running_command_there_is_nothing_to_read_or_type_to() {
    let guest = start();
    run(&guest, "true");
    for (command, is_input, content) in [
        (
            "",
            false,
            "ERROR: No previous running command to retrieve logs from.",
        ),
        (
            "x",
            true,
            "ERROR: No previous running command to interact with.",
        ),
    ] {
        let observation = run_with(&guest, command, json!({"is_input": is_input}), None);
        assert_eq!(observation["observation"], "run");
        assert_eq!(observation["content"], content);
        assert_eq!(observation["extras"]["command"], "");
        assert_eq!(metadata(&observation, "exit_code"), -1);
    }
}

#[test]
fn several_commands_are_refused_and_one_of_many_lines_is_not() {
    let guest = start();
    let observation = run(&guest, "echo a\necho b");
    assert_eq!(observation["observation"], "error");
    assert_eq!(observation["extras"], json!({"error_id": ""}));
    assert_eq!(
        observation["content"],
        "ERROR: Cannot execute multiple commands at once.\nPlease run each command separately \
         OR chain them into a single command via && or ;\nProvided commands:\n(1) echo a\n(2) echo b"
    );
    let many = "cat <<'E' | tr a-z A-Z\nline 'one'\n\nE";
    assert_eq!(run(&guest, many)["content"], "LINE 'ONE'");
    assert_eq!(
        run(&guest, "for i in 1 2\ndo\n echo $i\ndone")["content"],
        "1\n2"
    );
    let broken = run(&guest, "echo 'open");
    assert_ne!(metadata(&broken, "exit_code"), 0);
    assert_eq!(run(&guest, "echo ok")["content"], "ok");
}

#[test]
fn long_output_is_cut_in_the_middle_and_progress_shows_its_last_state() {
    let guest = start();
    let observation = run(&guest, "seq 1 200000");
    let content = observation["content"].as_str().expect("text");
    let (head, tail) = content
        .split_once("\n[... Observation truncated due to length ...]\n")
        .expect("truncated");
    assert_eq!((head.len(), tail.len()), (15_000, 15_000));
    assert!(head.starts_with("1\n2\n") && tail.ends_with("\n200000"));
    let hidden = run_with(
        &guest,
        "seq 1 20000",
        json!({"hidden": true, "blocking": true}),
        Some(30.0),
    );
    assert!(hidden["content"].as_str().expect("text").len() > 100_000);
    assert_eq!(hidden["extras"]["hidden"], true);
    let progress = run(
        &guest,
        "for i in 1 2 3; do printf \"\\r$i%%\"; done; echo; printf '\\033[1mbold\\033[0m\\n'",
    );
    assert_eq!(progress["content"], "3%\nbold");
}

#[test]
fn back_to_back_commands_never_get_each_others_answers() {
    let guest = start();
    for number in 0..300 {
        let observation = run(&guest, &format!("echo mark{number}; (exit {})", number % 5));
        assert_eq!(observation["content"], format!("mark{number}"));
        assert_eq!(metadata(&observation, "exit_code"), number % 5);
    }
}

#[test]
fn a_shell_that_exits_is_replaced_where_it_was() {
    let guest = start();
    run(&guest, "cd /usr; x=1");
    let observation = run(&guest, "exit 4");
    assert_eq!(metadata(&observation, "exit_code"), 4);
    let suffix = metadata(&observation, "suffix").as_str().expect("text");
    assert!(suffix.contains("The shell has ended"), "{suffix}");
    assert_eq!(run(&guest, "pwd; echo \"<$x>\"")["content"], "/usr\n<>");
    run(&guest, "set -e");
    run(&guest, "false");
    assert_eq!(run(&guest, "echo alive")["content"], "alive");
}

#[test]
fn what_the_client_runs_after_connecting_works() {
    let guest = start();
    for command in [
        "git config --global user.name \"openhands\" && git config --global user.email \"openhands@all-hands.dev\"",
        "export K=\"v\"; export L=\"w x\"",
        "touch ~/.bashrc; grep -q \"^export K=\" ~/.bashrc || echo \"export K=\\\"v\\\"\" >> ~/.bashrc",
        "alias git=\"git --no-pager\"",
        "source ~/.bashrc",
        "mkdir -p swe_util/eval_data/instances",
    ] {
        let observation = run_with(&guest, command, json!({"blocking": true}), Some(600.0));
        assert_eq!(
            metadata(&observation, "exit_code"),
            0,
            "{command}: {observation}"
        );
    }
    assert_eq!(
        run(&guest, "echo $K $L; git config user.name")["content"],
        "v w x\nopenhands"
    );
}

#[test]
fn python_cells_share_one_interpreter() {
    let guest = start();
    let cell = |code: &str, extra: bool, timeout: Option<f64>| -> Value {
        let arguments =
            json!({"code": code, "include_extra": extra, "kernel_init_code": "init = 1"});
        execute(&guest, "run_ipython", arguments, timeout).ok()
    };
    let plain = |code: &str| cell(code, false, Some(30.0))["content"].clone();
    assert_eq!(plain("x = init + 1\nprint('hi')\nx"), "hi\n2");
    assert_eq!(
        plain("x += 1"),
        "[Code executed successfully with no output]"
    );
    assert_eq!(
        plain(
            "import subprocess, sys\n_ = subprocess.run(['echo', 'child'])\nprint(x, file=sys.stderr)"
        ),
        "child\n3"
    );
    assert_eq!(
        plain("!echo shell\n%cd /\nimport os; os.getcwd()"),
        "shell\n'/'"
    );
    let failed = plain("def f():\n    return 1 / 0\nf()");
    let failed = failed.as_str().expect("text");
    assert!(
        failed.starts_with("Traceback (most recent call last):"),
        "{failed}"
    );
    assert!(
        failed.contains("return 1 / 0") && failed.ends_with("ZeroDivisionError: division by zero"),
        "{failed}"
    );
    assert!(
        plain("x = (")
            .as_str()
            .expect("text")
            .contains("SyntaxError")
    );
    run(&guest, "cd /usr");
    let observation = cell("print('here')", true, Some(30.0));
    let content = observation["content"].as_str().expect("text");
    assert!(
        content.starts_with(
            "here\n[Jupyter current working directory: /usr]\n[Jupyter Python interpreter: /"
        ),
        "{content}"
    );
    assert_eq!(
        observation["extras"],
        json!({"code": "print('here')", "image_urls": []})
    );
    let slow = cell(
        "import time\nprint('begun')\ntime.sleep(100)",
        false,
        Some(1.0),
    );
    let content = slow["content"].as_str().expect("text");
    assert!(
        content.starts_with("begun\n") && content.ends_with("[Execution timed out (1.0 seconds).]"),
        "{content}"
    );
    assert_eq!(plain("x"), "3");
    let gone = plain("import os\nprint('bye', flush=True)\nos._exit(3)");
    assert!(gone.as_str().expect("text").starts_with("bye"), "{gone}");
    assert_eq!(plain("'x' in globals()"), "False");
}

#[test]
fn without_python_the_documented_error_is_given() {
    let guest = start_with(&[("PATH", "/nowhere")]);
    let answer = execute(&guest, "run_ipython", json!({"code": "1"}), None);
    assert_eq!(answer.status, 500);
    let body: Value = answer.json();
    assert!(
        body["detail"]
            .as_str()
            .expect("detail")
            .starts_with("Internal server error: JupyterRequirement not found"),
        "{body}"
    );
}

#[test]
fn files_are_read_written_and_edited() {
    let guest = start();
    let path = guest.path("d/f.txt");
    let action =
        |kind: &str, arguments: Value| -> Value { execute(&guest, kind, arguments, None).ok() };
    let written = action(
        "write",
        json!({"path": path, "content": "l1\nl2\n", "start": 0, "end": -1}),
    );
    assert_eq!(
        (&written["observation"], &written["content"]),
        (&json!("write"), &json!(""))
    );
    assert_eq!(written["extras"], json!({"path": path}));
    assert_eq!(
        std::fs::read_to_string(&path).expect("written"),
        "l1\nl2\n\n"
    );
    let read = action("read", json!({"path": path, "start": 1, "end": 2}));
    assert_eq!(
        (&read["observation"], &read["content"]),
        (&json!("read"), &json!("l2\n"))
    );
    assert_eq!(
        read["extras"],
        json!({"path": path, "impl_source": "default"})
    );
    run(&guest, "cd d");
    assert_eq!(
        action("read", json!({"path": "f.txt"}))["content"],
        "l1\nl2\n\n"
    );
    let missing = action("read", json!({"path": "none"}));
    let here = guest.path("d");
    assert_eq!(
        missing["content"],
        format!("File not found: {here}/none. Your current working directory is {here}.")
    );
    assert_eq!(missing["observation"], "error");
    let directory = action("read", json!({"path": here}));
    assert_eq!(
        directory["content"],
        format!("Path is a directory: {here}. You can only read files")
    );
    std::fs::write(guest.path("d/b"), b"a\0b").expect("written");
    assert_eq!(
        action("read", json!({"path": "b"}))["content"],
        "ERROR_BINARY_FILE"
    );
    std::fs::write(guest.path("d/i.png"), b"png").expect("written");
    assert_eq!(
        action("read", json!({"path": "i.png"}))["content"],
        "data:image/png;base64,cG5n"
    );

    let aci = |path: &str, range: Value| {
        action(
            "read",
            json!({"path": path, "impl_source": "oh_aci", "view_range": range}),
        )
    };
    let viewed = aci(&path, Value::Null);
    assert_eq!(
        viewed["extras"],
        json!({"path": path, "impl_source": "oh_aci"})
    );
    let content = viewed["content"].as_str().expect("text");
    assert!(
        content.starts_with(&format!(
            "Here's the result of running `cat -n` on {path}:\n     1\tl1\n"
        )),
        "{content}"
    );
    assert!(
        !aci(&path, json!([2, 2]))["content"]
            .as_str()
            .expect("text")
            .contains("l1")
    );
    let missing = aci("/no/such", Value::Null);
    assert_eq!(
        missing["content"],
        "ERROR:\nInvalid `path` parameter: /no/such. The path /no/such does not exist. Please provide a valid path."
    );
    assert_eq!(missing["observation"], "read");

    let edit = |arguments: Value| {
        let mut all = json!({"path": path, "impl_source": "oh_aci"});
        all.as_object_mut()
            .expect("object")
            .extend(arguments.as_object().cloned().expect("object"));
        action("edit", all)
    };
    let edited = edit(json!({"command": "str_replace", "old_str": "l2", "new_str": "L2"}));
    assert_eq!(edited["observation"], "edit");
    assert!(
        edited["content"]
            .as_str()
            .expect("text")
            .starts_with(&format!("The file {path} has been edited."))
    );
    assert_eq!(
        edited["extras"],
        json!({
            "path": path, "prev_exist": true, "old_content": "l2", "new_content": "L2",
            "impl_source": "oh_aci", "_diff_cache": null,
            "diff": format!("--- {path}\n+++ {path}\n@@ -2 +2 @@\n-l2\n+L2"),
        })
    );
    let failed = edit(json!({"command": "str_replace", "old_str": "zz", "new_str": "y"}));
    assert!(
        failed["content"]
            .as_str()
            .expect("text")
            .starts_with("ERROR:\nNo replacement was performed")
    );
    assert_eq!(failed["extras"]["diff"], "");
    edit(json!({"command": "undo_edit"}));
    assert_eq!(std::fs::read_to_string(&path).expect("read"), "l1\nl2\n\n");
    let browsed = action("browse", json!({"url": "http://x"}));
    assert_eq!(
        browsed["content"],
        "Browser functionality is not supported or disabled."
    );
}

fn upload(
    guest: &TestGuest,
    destination: &str,
    recursive: bool,
    name: &str,
    content: &[u8],
) -> Answer {
    let mut body = format!(
        "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n"
    )
    .into_bytes();
    body.extend_from_slice(content);
    body.extend_from_slice(b"\r\n--B--\r\n");
    let headers = [("content-type", "multipart/form-data; boundary=B")];
    let target = format!(
        "/upload_file?destination={}&recursive={recursive}",
        encode(destination)
    );
    guest.connect().send("POST", &target, &headers, &body)
}

#[test]
fn files_travel_in_and_out() {
    let guest = start();
    let into = guest.path("in/here");
    let answer: Value = upload(&guest, &into, false, "f.txt", b"content").ok();
    assert_eq!(
        answer,
        json!({"filename": "f.txt", "destination": into, "recursive": false})
    );
    assert_eq!(
        std::fs::read(guest.path("in/here/f.txt")).expect("there"),
        b"content"
    );
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for name in ["tree/a", "tree/sub/B"] {
        writer
            .start_file(name, SimpleFileOptions::default())
            .expect("entry");
        writer.write_all(name.as_bytes()).expect("content");
    }
    let packed = writer.finish().expect("zip").into_inner();
    let _: Value = upload(&guest, &into, true, "tree.zip", &packed).ok();
    assert_eq!(
        std::fs::read(guest.path("in/here/tree/sub/B")).expect("there"),
        b"tree/sub/B"
    );
    assert!(!guest.work().join("in/here/tree.zip").exists());
    let refused = upload(&guest, "relative", false, "f", b"");
    assert_eq!(
        (refused.status, refused.text().contains("400: ")),
        (500, true)
    );
    assert_eq!(
        upload(&guest, &into, true, "bad.zip", b"no zip").status,
        500
    );
    let _: Value = upload(&guest, &into, false, "../../../slip", b"x").ok();
    assert!(guest.work().join("in/here/slip").exists());

    let list = |body: Value| guest.post("/list_files", &body).ok::<Value>();
    assert_eq!(list(json!({})), json!(["in/"]));
    assert_eq!(
        list(json!({"path": into})),
        json!(["tree/", "f.txt", "slip"])
    );
    assert_eq!(list(json!({"path": "/none"})), json!([]));
    let get = |path: &str| {
        guest.send(
            "GET",
            &format!("/download_files?path={}", encode(path)),
            b"",
        )
    };
    let answer = get(&into);
    assert_eq!(answer.header("content-type"), Some("application/zip"));
    let mut archive = ZipArchive::new(Cursor::new(answer.body)).expect("zip");
    assert_eq!(archive.len(), 4);
    let mut content = String::new();
    archive
        .by_name("tree/sub/B")
        .expect("entry")
        .read_to_string(&mut content)
        .expect("read");
    assert_eq!(content, "tree/sub/B");
    assert_eq!((get("/none").status, get("x").status), (500, 500));
}

#[test]
fn requests_need_the_key_but_alive_does_not() {
    let guest = start_with(&[("SESSION_API_KEY", "secret")]);
    assert_eq!(
        guest.send("GET", "/alive", b"").ok::<Value>(),
        json!({"status": "ok"})
    );
    let info: Value = guest.send("GET", "/server_info", b"").ok();
    assert!(info["resources"]["memory"]["rss"].as_u64().expect("rss") > 0);
    let token = |headers: &[(&str, &str)]| {
        guest
            .connect()
            .send("GET", "/vscode/connection_token", headers, b"")
    };
    for headers in [&[][..], &[("x-session-api-key", "wrong!")]] {
        let refused = token(headers);
        assert_eq!(
            (refused.status, refused.json::<Value>()),
            (403, json!({"detail": "Invalid API Key"}))
        );
    }
    let key = [("x-session-api-key", "secret")];
    assert_eq!(token(&key).ok::<Value>(), json!({"token": null}));
    let post = |path: &str, body: &str| guest.connect().send("POST", path, &key, body.as_bytes());
    assert_eq!(
        post("/update_mcp_server", "[]").ok::<Value>()["router_error_log"],
        ""
    );
    for body in [
        "{",
        "{}",
        "{\"action\": {}}",
        "{\"action\": {\"action\": \"run\", \"args\": {}}}",
    ] {
        let refused = post("/execute_action", body);
        assert_eq!(refused.status, 422, "{body}");
        assert_eq!(
            refused.json::<Value>()["detail"],
            "Invalid request parameters"
        );
    }
    assert_eq!(
        post("/execute_action", "{\"action\": {\"action\": \"dance\"}}").status,
        500
    );
    let begun = Instant::now();
    assert_eq!(post("/execute_action", "{\"action\": {\"action\": \"run\", \"args\": {\"command\": \"echo $SESSION_API_KEY\"}}}").ok::<Value>()["content"], "");
    assert!(begun.elapsed() < Duration::from_secs(10));
}
