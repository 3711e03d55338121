//! Running commands: to their end within a request, or beyond it.

use super::{done, number, unknown};
use crate::Guest;
use crate::api::{ApiError, ApiResult};
use crate::http::{Request, Response};
use crate::process::text::Decoder;
use crate::process::{Command, Keep, Spec, Stream, Waited};
use skyrl_protocol::guest::{
    CommandStatus, ErrorCode, ExecEvent, ExecRequest, ExecResult, Output, SignalRequest,
};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that a streamed command may be ahead of its client.
const STREAM_WINDOW: u64 = 256 * 1024;

/// Bytes of output in one event or one answer.
const MAX_PIECE: usize = 64 * 1024;
const MAX_READ: u64 = 64 << 20;

/// Longest wait for a command's status, and for a command to read its input.
const MAX_WAIT: Duration = Duration::from_secs(3600);
const INPUT_PATIENCE: Duration = Duration::from_secs(60);

/// `POST /v1/exec`.
pub(super) fn exec(guest: &Arc<Guest>, request: &mut Request<'_>) -> ApiResult {
    let wanted: ExecRequest = request.json()?;
    if wanted.keep_stdin {
        return Err(
            ApiError::bad_request("keep_stdin needs a command that can be written to")
                .with_hint("use POST /v1/commands"),
        );
    }
    if wanted.stream {
        return stream(guest, request, wanted);
    }
    let command = guest.processes.spawn(&Spec::from(wanted))?;
    if command.wait_for_client(request.client, None) == Waited::ClientGone {
        command.end(Duration::ZERO);
        command.wait(None);
    }
    let result = command.result().ok_or_else(lost)?;
    Ok(Response::json(200, &result))
}

fn lost() -> ApiError {
    ApiError::new(ErrorCode::Io, "the guest lost sight of the command")
}

fn stream(guest: &Arc<Guest>, request: &Request<'_>, wanted: ExecRequest) -> ApiResult {
    let spec = Spec {
        keep: Keep::Flow(STREAM_WINDOW),
        ..Spec::from(wanted)
    };
    // The stream is written after this request was answered.
    let client = request
        .client
        .map(|fd| fd.try_clone_to_owned())
        .transpose()
        .map_err(|error| ApiError::io("watching the connection", &error))?;
    let command = guest.processes.spawn(&spec)?;
    Ok(Response::stream(
        200,
        "application/x-ndjson",
        Box::new(move |out| {
            let streamed = write_events(&command, client.as_ref(), out);
            if !command.is_finished() {
                command.end(Duration::ZERO);
            }
            streamed
        }),
    ))
}

fn write_event(out: &mut dyn Write, event: &ExecEvent) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    out.write_all(&line)
}

fn write_events(
    command: &Command,
    client: Option<&OwnedFd>,
    out: &mut dyn Write,
) -> io::Result<()> {
    write_event(out, &ExecEvent::Started { pid: command.pid() })?;
    let mut seen = [0; 2];
    let mut decoders = [Decoder::default(), Decoder::default()];
    loop {
        let waited = command.wait_output(seen, client.map(AsFd::as_fd), None);
        if waited == Waited::ClientGone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            let piece = command.read_since(stream, seen[index], MAX_PIECE);
            if !piece.bytes.is_empty() {
                seen[index] = piece.next();
                // Said at once, so that the command may go on.
                command.read_since(stream, seen[index], 0);
                let text = decoders[index].push(&piece.bytes);
                write_text(out, stream, text)?;
            }
        }
        if waited == Waited::Finished {
            break;
        }
    }
    for (decoder, stream) in decoders.iter_mut().zip([Stream::Stdout, Stream::Stderr]) {
        write_text(out, stream, decoder.finish())?;
    }
    let result = command.result().ok_or(io::ErrorKind::BrokenPipe)?;
    let without_text = |output: Output| Output {
        text: String::new(),
        ..output
    };
    let result = Box::new(ExecResult {
        stdout: without_text(result.stdout),
        stderr: without_text(result.stderr),
        ..result
    });
    write_event(out, &ExecEvent::Finished { result })
}

fn write_text(out: &mut dyn Write, stream: Stream, text: String) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let event = match stream {
        Stream::Stdout => ExecEvent::Stdout { text },
        Stream::Stderr => ExecEvent::Stderr { text },
    };
    write_event(out, &event)
}

/// Routes under `/v1/commands`.
pub(super) fn route(
    guest: &Arc<Guest>,
    request: &mut Request<'_>,
    method: &str,
    rest: &[&str],
) -> ApiResult {
    match (method, rest) {
        ("POST", []) => start(guest, request),
        ("GET", []) => {
            let all = guest.commands.list();
            let all: Vec<CommandStatus> = all.iter().map(|(id, c)| status(id, c)).collect();
            Ok(Response::json(200, &all))
        }
        ("GET", [id]) => {
            let command = find(guest, id)?;
            if let Some(wait) = number::<u64>(request, "wait_ms")? {
                let wait = Duration::from_millis(wait).min(MAX_WAIT);
                command.wait_for_client(request.client, Some(Instant::now() + wait));
            }
            Ok(Response::json(200, &status(id, &command)))
        }
        ("DELETE", [id]) => {
            let command = find(guest, id)?;
            command.end(Duration::ZERO);
            command.wait(Some(Instant::now() + INPUT_PATIENCE));
            guest.commands.remove(id);
            Ok(done())
        }
        ("GET", [id, "output"]) => output(&*find(guest, id)?, request),
        ("POST", [id, "stdin"]) => give_input(&*find(guest, id)?, request),
        ("POST", [id, "signal"]) => signal(id, &*find(guest, id)?, request),
        _ => Err(unknown(method, &format!("commands/{}", rest.join("/")))),
    }
}

fn find(guest: &Guest, id: &str) -> Result<Arc<Command>, ApiError> {
    guest.commands.get(id).ok_or_else(|| {
        ApiError::not_found(format!("no command {id:?}"))
            .with_hint("finished commands are forgotten after an hour")
    })
}

fn status(id: &str, command: &Command) -> CommandStatus {
    CommandStatus {
        id: id.to_owned(),
        pid: command.pid(),
        result: command.result(),
    }
}

fn start(guest: &Arc<Guest>, request: &mut Request<'_>) -> ApiResult {
    let wanted: ExecRequest = request.json()?;
    let command = guest.processes.spawn(&Spec::from(wanted))?;
    match guest.commands.insert(Arc::clone(&command)) {
        Ok(id) => Ok(Response::json(200, &status(&id, &command))),
        Err(full) => {
            command.end(Duration::ZERO);
            Err(full.into())
        }
    }
}

fn output(command: &Command, request: &Request<'_>) -> ApiResult {
    let stream = match request.query.get("stream") {
        None | Some("stdout") => Stream::Stdout,
        Some("stderr") => Stream::Stderr,
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "stream={other:?} is neither stdout nor stderr"
            )));
        }
    };
    let offset = number(request, "offset")?.unwrap_or(0);
    let limit = number(request, "limit")?.unwrap_or(MAX_READ).min(MAX_READ);
    let piece = command.read_since(stream, offset, limit as usize);
    let response = Response::bytes(200, "application/octet-stream", piece.bytes)
        .with_header("skyrl-offset", piece.offset.to_string())
        .with_header("skyrl-total", piece.total.to_string())
        .with_header("skyrl-ended", piece.ended.to_string());
    Ok(response)
}

fn give_input(command: &Command, request: &mut Request<'_>) -> ApiResult {
    let mut buffer = vec![0; MAX_PIECE];
    loop {
        let count = request
            .body
            .read(&mut buffer)
            .map_err(|error| ApiError::bad_request(format!("reading the input: {error}")))?;
        if count == 0 {
            break;
        }
        command.write_input(&buffer[..count], Some(Instant::now() + INPUT_PATIENCE))?;
    }
    if request.query.flag("close") {
        command.close_input();
    }
    Ok(done())
}

fn signal(id: &str, command: &Command, request: &mut Request<'_>) -> ApiResult {
    let SignalRequest { signal } = request.json()?;
    if !(1..=64).contains(&signal) {
        return Err(ApiError::bad_request(format!("{signal} is not a signal")));
    }
    if !command.signal(signal) {
        return Err(ApiError::new(
            ErrorCode::Conflict,
            "the command has finished",
        ));
    }
    Ok(Response::json(200, &status(id, command)))
}
