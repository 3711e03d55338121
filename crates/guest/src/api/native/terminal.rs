//! `POST /v1/terminal`: an interactive program on a pseudo-terminal, its bytes
//! in frames on an upgraded connection.

use crate::Guest;
use crate::api::{ApiError, ApiResult};
use crate::http::{Request, Response, ResponseBody};
use crate::process::{Command, Input, Keep, Spec, Stdio, Stream, Waited};
use skyrl_protocol::guest::{Program, TerminalRequest, frame};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Bytes the program may be ahead of its client.
const WINDOW: u64 = 256 * 1024;

/// Bytes of output in one frame.
const PIECE: usize = 32 * 1024;

/// How long a program may leave its input unread before the client waits in
/// vain, and how long a client may leave its output unread.
const PATIENCE: Duration = Duration::from_secs(120);

/// Shells for a terminal that names no program, in order.
const SHELLS: [&str; 5] = [
    "/bin/bash",
    "/usr/bin/bash",
    "/bin/sh",
    "/usr/bin/sh",
    "/busybox/sh",
];

/// Answers with the upgrade; the program runs by then.
pub(super) fn open(guest: &Arc<Guest>, request: &mut Request<'_>) -> ApiResult {
    let offers = request.header("upgrade").unwrap_or_default();
    if !offers
        .split(',')
        .any(|offer| offer.trim().eq_ignore_ascii_case(frame::PROTOCOL))
    {
        return Err(ApiError::bad_request(format!(
            "a terminal needs the header Upgrade: {}",
            frame::PROTOCOL
        )));
    }
    let wanted: TerminalRequest = request.json()?;
    let command = guest.processes.spawn(&spec(wanted))?;
    Ok(Response {
        status: 101,
        headers: Vec::new(),
        body: ResponseBody::Upgrade(
            frame::PROTOCOL,
            Box::new(move |stream, early| attend(&command, stream, early)),
        ),
    })
}

fn spec(wanted: TerminalRequest) -> Spec {
    let program = wanted.program.unwrap_or_else(|| {
        let shell = SHELLS
            .into_iter()
            .find(|path| std::path::Path::new(path).exists())
            .unwrap_or("/bin/sh");
        Program::Argv(vec![shell.to_owned()])
    });
    let mut spec = Spec::new(program);
    spec.cwd = wanted.cwd;
    spec.env = wanted.env;
    spec.env
        .entry("TERM".to_owned())
        .or_insert_with(|| "xterm-256color".to_owned());
    spec.user = wanted.user;
    spec.input = Input::Open;
    spec.keep = Keep::Flow(WINDOW);
    spec.stdio = Stdio::Terminal {
        columns: wanted.columns,
        rows: wanted.rows,
    };
    spec
}

/// Carries bytes both ways until either side ends. This thread writes; another
/// reads what the client sends.
fn attend(command: &Arc<Command>, stream: UnixStream, early: Vec<u8>) {
    let reader = {
        let command = Arc::clone(command);
        stream.try_clone().and_then(|stream| {
            thread::Builder::new()
                .name("terminal".into())
                .stack_size(256 * 1024)
                .spawn(move || {
                    // However it ends, nobody is at the keyboard any more.
                    let _ = take_input(&command, &mut early.as_slice().chain(&stream));
                    command.end(Duration::ZERO);
                })
        })
    };
    if reader.is_ok() {
        // A client that went away is noticed by the reader, too.
        let _ = give_output(command, &stream);
    }
    command.end(Duration::ZERO);
    let _ = stream.shutdown(Shutdown::Both);
    if let Ok(reader) = reader {
        // It ends with the connection.
        let _ = reader.join();
    }
}

fn write_frame(mut out: &UnixStream, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(5 + payload.len());
    bytes.push(kind);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    out.write_all(&bytes)
}

fn give_output(command: &Command, stream: &UnixStream) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut seen = 0;
    loop {
        let waited = command.wait_output([seen, u64::MAX], Some(stream.as_fd()), None);
        if waited == Waited::ClientGone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let piece = command.read_since(Stream::Stdout, seen, PIECE);
        if !piece.bytes.is_empty() {
            seen = piece.next();
            command.read_since(Stream::Stdout, seen, 0);
            write_frame(stream, frame::DATA, &piece.bytes)?;
        } else if waited == Waited::Finished {
            break;
        }
    }
    let result = command.result().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut result = serde_json::to_value(result)?;
    // The output was sent already.
    result["stdout"]["text"] = "".into();
    write_frame(stream, frame::EXIT, &serde_json::to_vec(&result)?)
}

/// A frame from the client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    kind: u8,
    payload: Vec<u8>,
}

/// Reads a frame; nothing at a clean end.
pub(crate) fn read_frame(from: &mut dyn Read) -> io::Result<Option<Frame>> {
    let mut head = [0; 5];
    if from.read(&mut head[..1])? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..])?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    if length > frame::MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
    }
    let mut payload = vec![0; length as usize];
    from.read_exact(&mut payload)?;
    Ok(Some(Frame {
        kind: head[0],
        payload,
    }))
}

fn take_input(command: &Command, from: &mut dyn Read) -> io::Result<()> {
    while let Some(frame) = read_frame(from)? {
        match (frame.kind, frame.payload.as_slice()) {
            (frame::DATA, bytes) => command
                .write_input(bytes, Some(Instant::now() + PATIENCE))
                .map_err(|_| io::ErrorKind::BrokenPipe)?,
            (frame::RESIZE, &[c1, c2, r1, r2]) => {
                command.resize(u16::from_be_bytes([c1, c2]), u16::from_be_bytes([r1, r2]));
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_whole_or_refused() {
        let mut bytes = &[0, 0, 0, 0, 2, b'h', b'i', 1, 0, 0, 0, 0][..];
        let first = read_frame(&mut bytes).unwrap().unwrap();
        assert_eq!(
            (first.kind, first.payload.as_slice()),
            (0, b"hi".as_slice())
        );
        assert_eq!(read_frame(&mut bytes).unwrap().unwrap().payload, b"");
        assert_eq!(read_frame(&mut bytes).unwrap(), None);
        assert!(read_frame(&mut &[0, 0, 0][..]).is_err());
        assert!(read_frame(&mut &[0, 0xff, 0, 0, 0][..]).is_err());
    }
}
