//! A real guest on a socket in a temporary directory, and a small blocking
//! HTTP client for it. Every test binary uses a part of this.
#![allow(dead_code, unreachable_pub)]

use serde::Serialize;
use serde::de::DeserializeOwned;
use skyrl_protocol::guest::{ErrorBody, ExecRequest, ExecResult, Health};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The guest under test.
pub const GUEST: &str = env!("CARGO_BIN_EXE_skyrl-guest");

/// A running guest; ended when dropped.
pub struct TestGuest {
    pub dir: TempDir,
    pub child: Child,
    pub socket: PathBuf,
}

impl TestGuest {
    /// Starts one whose commands run in `work` of its temporary directory.
    pub fn start() -> Self {
        Self::start_with(|_, _| {})
    }

    /// Starts one after `change` had its way with the command line and the
    /// temporary directory.
    pub fn start_with(change: impl FnOnce(&mut Command, &Path)) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("guest-")
            .tempdir()
            .expect("temporary directory");
        let socket = dir.path().join("g.sock");
        let mut command = Command::new(GUEST);
        command
            .arg("--listen")
            .arg(&socket)
            .arg("--workdir")
            .arg(dir.path().join("work"))
            .stdin(Stdio::null())
            .env_remove("SESSION_API_KEY");
        change(&mut command, dir.path());
        let child = command.spawn().expect("the guest starts");
        let guest = Self { dir, child, socket };
        guest.await_healthy();
        guest
    }

    fn await_healthy(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(&self.socket).is_err() {
            assert!(Instant::now() < deadline, "the guest never listened");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The default directory of commands.
    pub fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    /// A path below the default directory, as text.
    pub fn path(&self, name: &str) -> String {
        self.work().join(name).to_str().unwrap().to_owned()
    }

    /// A new connection.
    pub fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// One request on a new connection.
    pub fn send(&self, method: &str, target: &str, body: &[u8]) -> Answer {
        self.connect().send(method, target, &[], body)
    }

    /// Sends a value as JSON.
    pub fn post<T: Serialize + ?Sized>(&self, target: &str, value: &T) -> Answer {
        self.send("POST", target, &serde_json::to_vec(value).unwrap())
    }

    /// Runs a command to its end.
    pub fn exec(&self, request: &ExecRequest) -> ExecResult {
        self.post("/v1/exec", request).ok()
    }

    /// Runs a line in the shell.
    pub fn shell(&self, line: &str) -> ExecResult {
        self.exec(&ExecRequest::shell(line))
    }

    pub fn health(&self) -> Health {
        self.send("GET", "/v1/health", b"").ok()
    }

    /// Resident memory of the guest in KiB.
    pub fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
            .expect("VmRSS")
    }

    /// Sends the guest itself a signal.
    pub fn signal(&self, signal: i32) {
        kill(self.child.id() as i32, signal);
    }

    /// Waits until the guest has ended.
    pub fn await_end(&mut self, patience: Duration) -> std::process::ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the guest did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.signal(libc::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(10);
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: a plain system call.
    unsafe {
        libc::kill(pid, signal);
    }
}

/// Whether a process lives (zombies do not).
pub fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
        !matches!(state, Some(b'Z' | b'X'))
    })
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON, whatever the status.
    pub fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.status, self.text()))
    }

    /// The body as JSON of a successful answer.
    pub fn ok<T: DeserializeOwned>(&self) -> T {
        assert!(
            (200..300).contains(&self.status),
            "{} {}",
            self.status,
            self.text()
        );
        self.json()
    }

    /// The body of a failure.
    pub fn error(&self) -> ErrorBody {
        assert!(self.status >= 400, "{} {}", self.status, self.text());
        self.json()
    }
}

/// A connection.
pub struct Client {
    pub stream: UnixStream,
    pending: Vec<u8>,
}

impl Client {
    pub fn connect(socket: &Path) -> Self {
        // Like the guest, tests may live in long paths.
        let stream = UnixStream::connect(socket).expect("connects");
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        Self {
            stream,
            pending: Vec::new(),
        }
    }

    pub fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let mut head = format!("{method} {target} HTTP/1.1\r\nhost: sandbox\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        // The guest may answer before it has read everything.
        let _ = self.stream.write_all(&bytes);
        self.read_answer(method == "HEAD").expect("an answer")
    }

    /// Writes bytes as they are.
    pub fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("written");
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.pending.extend_from_slice(&buffer[..count]);
                Ok(())
            }
        }
    }

    /// Reads status and header fields.
    pub fn read_head(&mut self) -> io::Result<(u16, Vec<(String, String)>)> {
        loop {
            let mut fields = [httparse::EMPTY_HEADER; 64];
            let mut response = httparse::Response::new(&mut fields);
            let parsed = response.parse(&self.pending).map_err(io::Error::other)?;
            if let httparse::Status::Complete(length) = parsed {
                let status = response.code.unwrap();
                let headers = response
                    .headers
                    .iter()
                    .map(|h| {
                        (
                            h.name.to_ascii_lowercase(),
                            String::from_utf8_lossy(h.value).into_owned(),
                        )
                    })
                    .collect();
                self.pending.drain(..length);
                if status != 100 {
                    return Ok((status, headers));
                }
                continue;
            }
            self.fill()?;
        }
    }

    pub fn read_answer(&mut self, is_head: bool) -> io::Result<Answer> {
        let (status, headers) = self.read_head()?;
        let field = |name: &str| {
            headers
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, v)| v.clone())
        };
        let mut body = Vec::new();
        if is_head || status == 204 || status == 101 {
        } else if field("transfer-encoding").as_deref() == Some("chunked") {
            while let Some(chunk) = self.read_chunk()? {
                body.extend_from_slice(&chunk);
            }
        } else if let Some(length) = field("content-length") {
            body = self.read_exact(length.parse().unwrap())?;
        } else {
            while self.fill().is_ok() {}
            body = std::mem::take(&mut self.pending);
        }
        Ok(Answer {
            status,
            headers,
            body,
        })
    }

    /// The next chunk of a chunked body; nothing at its end.
    pub fn read_chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = loop {
            if let Some(end) = self.pending.windows(2).position(|w| w == b"\r\n") {
                let line: Vec<u8> = self.pending.drain(..end + 2).collect();
                break String::from_utf8_lossy(&line[..end]).into_owned();
            }
            self.fill()?;
        };
        let size = usize::from_str_radix(&line, 16).map_err(io::Error::other)?;
        let mut chunk = self.read_exact(size + 2)?;
        chunk.truncate(size);
        Ok((size > 0).then_some(chunk))
    }

    pub fn read_exact(&mut self, count: usize) -> io::Result<Vec<u8>> {
        while self.pending.len() < count {
            self.fill()?;
        }
        Ok(self.pending.drain(..count).collect())
    }

    /// Whether the guest has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.fill(), Err(error) if error.kind() != io::ErrorKind::WouldBlock)
    }
}

/// Percent-encodes a query value.
pub fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
