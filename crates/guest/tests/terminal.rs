//! Interactive programs over an upgraded connection.

mod common;

use common::{Client, TestGuest, eventually, is_alive};
use skyrl_protocol::guest::{ErrorCode, ExecResult, Program, TerminalRequest, frame};
use std::io;

struct Terminal {
    client: Client,
    seen: String,
}

impl Terminal {
    fn open(guest: &TestGuest, program: Option<Program>) -> Self {
        let request = TerminalRequest {
            program,
            cwd: None,
            env: [("PS1".to_owned(), "$ ".to_owned())].into(),
            user: None,
            columns: 80,
            rows: 24,
        };
        let body = serde_json::to_vec(&request).unwrap();
        let mut client = guest.connect();
        let head = format!(
            "POST /v1/terminal HTTP/1.1\r\nupgrade: {}\r\nconnection: upgrade\r\n\
             content-length: {}\r\n\r\n",
            frame::PROTOCOL,
            body.len()
        );
        client.write(head.as_bytes());
        client.write(&body);
        let (status, headers) = client.read_head().unwrap();
        assert_eq!(status, 101, "{headers:?}");
        Self {
            client,
            seen: String::new(),
        }
    }

    fn send(&mut self, kind: u8, payload: &[u8]) {
        self.client.write(&[kind]);
        self.client.write(&(payload.len() as u32).to_be_bytes());
        self.client.write(payload);
    }

    fn frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let head = self.client.read_exact(5)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        Ok((head[0], self.client.read_exact(length as usize)?))
    }

    fn read_until(&mut self, wanted: &str) {
        while !self.seen.contains(wanted) {
            let (kind, bytes) = self.frame().unwrap();
            assert_eq!(kind, frame::DATA, "{}", String::from_utf8_lossy(&bytes));
            self.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
    }

    fn read_exit(&mut self) -> ExecResult {
        loop {
            let (kind, bytes) = self.frame().unwrap();
            if kind == frame::EXIT {
                return serde_json::from_slice(&bytes).unwrap();
            }
            self.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
}

#[test]
fn a_shell_is_interactive_and_knows_its_size() {
    let guest = TestGuest::start();
    let mut terminal = Terminal::open(&guest, None);
    terminal.send(frame::DATA, b"stty size; test -t 0 && echo is-\"\"tty\n");
    terminal.read_until("24 80");
    terminal.read_until("is-tty");
    terminal.send(frame::RESIZE, &[0, 100, 0, 30]);
    terminal.send(frame::DATA, b"stty size\n");
    terminal.read_until("30 100");
    // Ctrl-C reaches what runs in the foreground, not the shell.
    terminal.send(frame::DATA, b"sh -c 'echo $((40+2)); sleep 1000'\n");
    terminal.read_until("42");
    terminal.send(frame::DATA, b"\x03");
    terminal.read_until("^C");
    // A shell that is interrupted throws away what was typed ahead.
    std::thread::sleep(std::time::Duration::from_millis(500));
    terminal.send(frame::DATA, b"exit 5\n");
    let result = terminal.read_exit();
    assert_eq!(result.exit_code, Some(5));
    assert_eq!(result.stdout.text, "");
    assert!(result.stdout.total_bytes > 10);
}

#[test]
fn all_output_arrives_before_the_exit() {
    let guest = TestGuest::start();
    for _ in 0..20 {
        let program = Program::Shell("seq 1 5000; printf last".into());
        let mut terminal = Terminal::open(&guest, Some(program));
        assert_eq!(terminal.read_exit().exit_code, Some(0));
        let wanted: String = (1..=5000).map(|n| format!("{n}\r\n")).collect();
        assert!(
            terminal.seen == wanted.clone() + "last",
            "{}",
            terminal.seen.len()
        );
    }
}

#[test]
fn a_client_that_hangs_up_takes_the_program_along() {
    let guest = TestGuest::start();
    let program = Program::Shell("trap '' HUP TERM; echo pid=$$=; sleep 1000; sleep 1000".into());
    let mut terminal = Terminal::open(&guest, Some(program));
    terminal.read_until("= ".trim_end());
    terminal.read_until("\n");
    let pid: i32 = terminal.seen.split('=').nth(1).unwrap().parse().unwrap();
    assert!(is_alive(pid));
    drop(terminal);
    eventually("it is gone", || !is_alive(pid));
    eventually("nothing runs", || guest.health().running == 0);
}

#[test]
fn nonsense_ends_the_terminal_not_the_guest() {
    let guest = TestGuest::start();
    let mut terminal = Terminal::open(&guest, Some(Program::Shell("cat".into())));
    terminal.client.write(&[9, 0xff, 0xff, 0xff, 0xff]);
    let result = terminal.read_exit_or_end();
    assert!(result.is_none_or(|result| result.exit_code.is_none()));
    eventually("nothing runs", || guest.health().running == 0);
}

#[test]
fn without_the_upgrade_header_there_is_no_terminal() {
    let guest = TestGuest::start();
    let answer = guest.send("POST", "/v1/terminal", b"{\"columns\":1,\"rows\":1}");
    assert_eq!(answer.error().code, ErrorCode::BadRequest);
    assert_eq!(guest.health().running, 0);
}

impl Terminal {
    fn read_exit_or_end(&mut self) -> Option<ExecResult> {
        loop {
            match self.frame() {
                Ok((frame::EXIT, bytes)) => return serde_json::from_slice(&bytes).ok(),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }
}
