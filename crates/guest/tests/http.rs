//! The HTTP server, spoken to badly.

mod common;

use common::{Client, TestGuest, eventually};
use skyrl_protocol::guest::{ErrorCode, ExecRequest, Health};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Sends bytes as they are; all that comes back until the connection closes.
fn raw(guest: &TestGuest, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(&guest.socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    // The guest may have seen enough before all is sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    // A reset after the answer is no loss.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status_of(answer: &str) -> &str {
    answer.get(9..12).unwrap_or("")
}

#[test]
fn many_requests_share_a_connection_even_unasked() {
    let guest = TestGuest::start();
    let mut client = guest.connect();
    for _ in 0..50 {
        let health: Health = client.send("GET", "/v1/health", &[], b"").ok();
        assert_eq!(health.status, "ok");
    }
    let body = serde_json::to_vec(&ExecRequest::shell("echo hi")).unwrap();
    let one = format!(
        "POST /v1/exec HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut pipelined = Vec::new();
    for _ in 0..5 {
        pipelined.extend_from_slice(one.as_bytes());
        pipelined.extend_from_slice(&body);
        pipelined.extend_from_slice(b"GET /v1/health HTTP/1.1\r\n\r\n");
    }
    client.write(&pipelined);
    for _ in 0..5 {
        assert!(client.read_answer(false).unwrap().text().contains("hi\\n"));
        assert!(
            client
                .read_answer(false)
                .unwrap()
                .text()
                .contains("uptime_ms")
        );
    }
}

#[test]
fn chunked_bodies_are_understood_and_unread_ones_skipped() {
    let guest = TestGuest::start();
    let mut client = guest.connect();
    client.write(
        b"POST /v1/exec HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n\
          10;a=b\r\n{\"program\":{\"she\r\n",
    );
    client.write(b"E\r\nll\":\"echo 1\"}}\r\n0\r\nx: y\r\n\r\n");
    assert!(client.read_answer(false).unwrap().text().contains("1\\n"));
    let answer = client.send("POST", "/v1/nowhere", &[], &[b'x'; 100_000]);
    assert_eq!(answer.error().code, ErrorCode::NotFound);
    assert_eq!(client.send("GET", "/v1/health", &[], b"").status, 200);
    // Too long to skip: answered, then closed.
    let answer = client.send("POST", "/v1/nowhere", &[], &vec![b'x'; 2 << 20]);
    assert_eq!(answer.status, 404);
    assert_eq!(answer.header("connection"), Some("close"));
    assert!(client.is_closed());
}

#[test]
fn clients_that_ask_before_sending_are_told_to_go_on() {
    let guest = TestGuest::start();
    let mut stream = UnixStream::connect(&guest.socket).unwrap();
    let target = format!("/v1/file?path={}", guest.path("f"));
    let head =
        format!("PUT {target} HTTP/1.1\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"abc").unwrap();
    let mut answer = [0; 15];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    assert_eq!(std::fs::read(guest.path("f")).unwrap(), b"abc");
    // Refused without being told to send: the connection can't go on.
    let refused = raw(
        &guest,
        b"POST /v1/nowhere HTTP/1.1\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n",
    );
    assert!(refused.starts_with("HTTP/1.1 404") && refused.contains("connection: close"));
    assert_eq!(
        status_of(&raw(&guest, b"GET / HTTP/1.1\r\nexpect: x\r\n\r\n")),
        "417"
    );
}

#[test]
fn malformed_requests_are_answered_and_end_the_connection() {
    let guest = TestGuest::start();
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(101));
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000));
    for (bytes, status) in [
        (b"GET / HTTP/2.0\r\n\r\n".as_slice(), "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400"),
        (b"GET\r\n\r\n", "400"),
        (b"GET nowhere HTTP/1.1\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n", "400"),
        (
            b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            "400",
        ),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n", "501"),
        (many.as_bytes(), "431"),
        (long.as_bytes(), "431"),
    ] {
        let answer = raw(&guest, bytes);
        assert_eq!(
            status_of(&answer),
            status,
            "{}",
            String::from_utf8_lossy(bytes)
        );
        assert!(answer.contains("connection: close"), "{answer}");
    }
    // Bodies that break their own framing.
    let chunked = b"POST /v1/exec HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".as_slice();
    assert_eq!(status_of(&raw(&guest, chunked)), "400");
    assert_eq!(guest.health().status, "ok");
}

#[test]
fn old_and_modest_clients_are_served() {
    let guest = TestGuest::start();
    let answer = raw(&guest, b"GET /v1/health HTTP/1.0\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"));
    let body = "{\"program\":{\"shell\":\"echo hi\"},\"stream\":true}";
    let text = format!(
        "POST /v1/exec HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = raw(&guest, text.as_bytes());
    assert!(
        !answer.contains("chunked") && answer.contains("\"hi\\n\""),
        "{answer}"
    );
    let mut client = guest.connect();
    let head = client.send("HEAD", "/v1/health", &[], b"");
    assert!(head.status == 200 && head.body.is_empty());
    assert_eq!(
        client
            .send("GET", "http://x/v1/health?a=b", &[], b"")
            .status,
        200
    );
}

#[test]
fn slow_clients_get_their_answer_and_hold_up_nobody() {
    let guest = TestGuest::start();
    let mut slow = UnixStream::connect(&guest.socket).unwrap();
    let text = b"GET /v1/health HTTP/1.1\r\nx: y\r\n\r\n";
    for byte in text {
        slow.write_all(&[*byte]).unwrap();
        let begin = Instant::now();
        guest.health();
        assert!(begin.elapsed() < Duration::from_secs(1));
    }
    let mut answer = [0; 15];
    slow.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
}

#[test]
fn half_a_request_is_not_waited_for_for_ever() {
    let guest = TestGuest::start();
    let mut idle = guest.connect();
    let mut half = UnixStream::connect(&guest.socket).unwrap();
    half.write_all(b"GET /v1/health HT").unwrap();
    half.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let begin = Instant::now();
    let mut answer = String::new();
    half.read_to_string(&mut answer).unwrap();
    assert_eq!(status_of(&answer), "408");
    let took = begin.elapsed();
    assert!(
        took > Duration::from_secs(25) && took < Duration::from_secs(45),
        "{took:?}"
    );
    // Who has not begun a request may rest longer.
    assert_eq!(idle.send("GET", "/v1/health", &[], b"").status, 200);
}

#[test]
fn connections_beyond_the_bound_are_turned_away() {
    let guest = TestGuest::start();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let limit = limit.current.unwrap_or(u64::MAX);
    assert!(
        limit > 1200,
        "this test opens 1100 connections; ulimit -n is {limit}"
    );
    let mut crowd: Vec<Client> = (0..1024).map(|_| guest.connect()).collect();
    let last = crowd.last_mut().unwrap();
    assert_eq!(last.send("GET", "/v1/health", &[], b"").status, 200);
    let mut refused = guest.connect();
    let answer = refused.read_answer(false).unwrap();
    assert_eq!(answer.error().code, ErrorCode::LimitReached);
    assert_eq!(answer.status, 503);
    let rss = guest.rss_kib();
    assert!(rss < 48 * 1024, "{rss} KiB for 1024 connections");
    drop(crowd);
    eventually("there is room again", || {
        guest.connect().send("GET", "/v1/health", &[], b"").status == 200
    });
}

#[test]
fn clients_that_leave_at_any_moment_do_no_harm() {
    let guest = TestGuest::start();
    let body = serde_json::to_vec(&ExecRequest::shell("seq 1 100000")).unwrap();
    let mut text = format!(
        "POST /v1/exec HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    text.extend_from_slice(&body);
    for end in 0..=text.len() {
        let mut stream = UnixStream::connect(&guest.socket).unwrap();
        stream.write_all(&text[..end]).unwrap();
    }
    eventually("all is quiet", || guest.health().running == 0);
    eventually("all connections are closed", || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", guest.child.id())).unwrap();
        fds.count() < 20
    });
}
