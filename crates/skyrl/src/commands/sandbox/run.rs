//! `skyrl sandbox run`: one command in a fresh sandbox.

use super::session::with_sandbox;
use super::spec::SpecArgs;
use crate::exit::{Exit, Failure};
use skyrl_protocol::guest::{ExecEvent, ExecRequest, ExecResult};
use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

/// Longest standard input handed to a command, in bytes.
const MAX_STDIN: u64 = 32 << 20;

/// Arguments of `skyrl sandbox run`.
#[derive(clap::Args)]
pub(crate) struct Run {
    #[command(flatten)]
    spec: SpecArgs,
    /// Give standard input (read to its end first, at most 32 MiB of text) to
    /// the command.
    #[arg(long, short = 'i')]
    interactive: bool,
    /// Kill the command after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// The command with its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Run {
    pub(super) async fn run(self, state: &Path) -> Result<ExitCode, Failure> {
        let mut request = ExecRequest::argv(self.command.clone());
        request.timeout_ms = self.timeout.map(|seconds| seconds.saturating_mul(1_000));
        if self.interactive {
            request.stdin = Some(read_stdin()?);
        }
        let result = with_sandbox(state, &self.spec, |sandbox| async move {
            Ok(sandbox.guest.exec_streaming(&request, show).await?)
        })
        .await?;
        Ok(exit_code(&result))
    }
}

fn show(event: &ExecEvent) {
    // A reader that went away is no error of ours; the command goes on.
    let _ = match event {
        ExecEvent::Stdout { text } => {
            let mut stdout = std::io::stdout();
            stdout
                .write_all(text.as_bytes())
                .and_then(|()| stdout.flush())
        }
        ExecEvent::Stderr { text } => std::io::stderr().write_all(text.as_bytes()),
        ExecEvent::Started { .. } | ExecEvent::Finished { .. } => Ok(()),
    };
}

fn read_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    let read = std::io::stdin()
        .take(MAX_STDIN + 1)
        .read_to_string(&mut text);
    match read {
        Ok(length) if length as u64 > MAX_STDIN => Err(Failure::new(
            Exit::Usage,
            "standard input is longer than 32 MiB",
        )
        .hint("put large input into a file and use --mount")),
        Ok(_) => Ok(text),
        Err(error) => Err(Failure::new(
            Exit::Usage,
            format!("standard input: {error}"),
        )),
    }
}

/// As a shell would report it; says on stderr what a number can't.
pub(super) fn exit_code(result: &ExecResult) -> ExitCode {
    if result.oom_killed {
        eprintln!("note: a process was killed: the sandbox reached its memory limit");
    }
    if result.timed_out {
        eprintln!("note: the command was killed: it reached its time limit");
        return ExitCode::from(124);
    }
    let code = match (result.exit_code, result.signal) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    };
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1))
}
