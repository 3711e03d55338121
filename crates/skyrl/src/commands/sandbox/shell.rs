//! `skyrl sandbox shell`: this terminal, connected to one in a sandbox.

use super::list::find;
use super::run::exit_code;
use super::session::with_sandbox;
use super::spec::SpecArgs;
use crate::exit::{Exit, Failure};
use crate::printer::Printer;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use skyrl_protocol::SandboxId;
use skyrl_protocol::guest::{ExecResult, Program, TerminalRequest, frame};
use skyrl_sandbox::GuestClient;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Arguments of `skyrl sandbox shell`.
#[derive(clap::Args)]
pub(crate) struct Shell {
    /// A living sandbox (see `sandbox ls`); absent: a fresh one, removed
    /// afterwards.
    id: Option<SandboxId>,
    #[command(flatten)]
    spec: SpecArgs,
    /// Program to run instead of the image's shell.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Shell {
    pub(super) async fn run(self, state: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
        let stdin = std::io::stdin();
        if !isatty(&stdin) {
            return Err(
                Failure::new(Exit::Usage, "standard input is not a terminal")
                    .hint("for scripts there is `skyrl sandbox run`"),
            );
        }
        let size = tcgetwinsize(&stdin)
            .map_err(|e| Failure::new(Exit::Environment, format!("terminal size: {e}")))?;
        let mut env = std::collections::BTreeMap::new();
        if let Ok(term) = std::env::var("TERM") {
            env.insert("TERM".to_owned(), term);
        }
        let request = TerminalRequest {
            program: (!self.command.is_empty()).then(|| Program::Argv(self.command.clone())),
            cwd: None,
            env,
            user: None,
            // A terminal that does not know its size says 0.
            columns: if size.ws_col == 0 { 80 } else { size.ws_col },
            rows: if size.ws_row == 0 { 24 } else { size.ws_row },
        };
        let result = match &self.id {
            Some(id) => {
                let (_, record) = find(state, id)?;
                let socket = record.socket.ok_or_else(|| {
                    Failure::new(Exit::Failed, format!("sandbox {id} is still starting"))
                })?;
                connect(GuestClient::new(id.clone(), socket), request).await?
            }
            None => {
                printer.talk("a fresh sandbox; it is removed when the shell ends");
                with_sandbox(state, &self.spec, |sandbox| connect(sandbox.guest, request)).await?
            }
        };
        Ok(exit_code(&result))
    }
}

/// Carries bytes both ways until the program ends.
async fn connect(guest: GuestClient, request: TerminalRequest) -> Result<ExecResult, Failure> {
    let connection = guest.terminal(&request).await?;
    let (mut from_guest, mut to_guest) = tokio::io::split(connection);
    let _raw = RawTerminal::enter()?;
    let mut keys = terminal_input();
    let mut resized = signal(SignalKind::window_change()).map_err(lost)?;
    loop {
        tokio::select! {
            frame = read_frame(&mut from_guest) => match frame.map_err(lost)? {
                (frame::DATA, bytes) => {
                    let mut stdout = std::io::stdout();
                    stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(lost)?;
                }
                (frame::EXIT, bytes) => {
                    return serde_json::from_slice(&bytes)
                        .map_err(|e| Failure::new(Exit::Failed, format!("last frame: {e}")));
                }
                _ => {}
            },
            bytes = keys.recv() => match bytes {
                Some(bytes) => write_frame(&mut to_guest, frame::DATA, &bytes).await.map_err(lost)?,
                // The terminal is gone: the guest ends the program.
                None => return Err(Failure::new(Exit::Cancelled, "the terminal was closed")),
            },
            _ = resized.recv() => if let Ok(size) = tcgetwinsize(std::io::stdin()) {
                let [c, r] = [size.ws_col.to_be_bytes(), size.ws_row.to_be_bytes()];
                write_frame(&mut to_guest, frame::RESIZE, &[c[0], c[1], r[0], r[1]])
                    .await
                    .map_err(lost)?;
            },
        }
    }
}

fn lost(error: std::io::Error) -> Failure {
    Failure::new(
        Exit::Failed,
        format!("the connection to the sandbox broke: {error}"),
    )
}

/// Reads the terminal on a thread of its own: such a read can't be cancelled.
fn terminal_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(length @ 1..) = rustix::io::read(std::io::stdin(), &mut bytes) {
            if sender.blocking_send(bytes[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn read_frame(from: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<(u8, Vec<u8>)> {
    let kind = from.read_u8().await?;
    let length = from.read_u32().await?;
    if length > frame::MAX_PAYLOAD {
        return Err(std::io::Error::other("a frame is too long"));
    }
    let mut payload = vec![0; length as usize];
    from.read_exact(&mut payload).await?;
    Ok((kind, payload))
}

async fn write_frame(
    to: &mut (impl AsyncWriteExt + Unpin),
    kind: u8,
    payload: &[u8],
) -> std::io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(std::io::Error::other)?;
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes).await?;
    to.flush().await
}

/// The terminal without line editing and echo, put back when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self, Failure> {
        let failed = |e| Failure::new(Exit::Environment, format!("terminal settings: {e}"));
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &raw).map_err(failed)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}
