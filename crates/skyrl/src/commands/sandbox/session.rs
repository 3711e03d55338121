//! One sandbox for the length of one command: made, used, and removed however
//! the command ends, interruption included.

use super::spec::SpecArgs;
use crate::commands::image::Plain;
use crate::exit::{Exit, Failure};
use skyrl_protocol::{OwnerId, SandboxId};
use skyrl_sandbox::{EngineError, EngineKind, ImageRef, Options, Sandbox, Sandboxes};
use std::path::Path;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

/// Opens the sandboxes of an owner that lives as long as this process.
pub(super) async fn open(
    state: &Path,
    engine: Option<EngineKind>,
    image: &ImageRef,
) -> Result<Sandboxes, EngineError> {
    let mut options = Options::new(state, owner()?);
    options.engine = engine;
    options.progress = Arc::new(Plain::new(image.to_string()));
    Sandboxes::open(options).await
}

/// Starts a sandbox, hands it to `work`, removes it.
pub(super) async fn with_sandbox<T, F>(
    state: &Path,
    args: &SpecArgs,
    work: impl FnOnce(Sandbox) -> F,
) -> Result<T, Failure>
where
    F: Future<Output = Result<T, Failure>>,
{
    let spec = args.spec()?;
    let id = random_id("run")?;
    let mut ended = Interruption::new()?;
    let sandboxes = tokio::select! {
        opened = open(state, args.engine.0, &spec.image) => opened?,
        failure = ended.wait() => return Err(failure),
    };
    let outcome = tokio::select! {
        outcome = async { work(sandboxes.start(id, spec).await?).await } => outcome,
        failure = ended.wait() => Err(failure),
    };
    let removed = sandboxes.shutdown().await;
    let value = outcome?;
    removed?;
    Ok(value)
}

/// A name nobody else has: `<prefix>-<16 hexadecimal digits>`.
pub(super) fn random_id(prefix: &str) -> Result<SandboxId, Failure> {
    let number =
        getrandom::u64().map_err(|e| Failure::new(Exit::Environment, format!("no random: {e}")))?;
    format!("{prefix}-{number:016x}")
        .parse()
        .map_err(|e| Failure::new(Exit::Bug, format!("{e}")))
}

fn owner() -> Result<OwnerId, EngineError> {
    let number = getrandom::u32().unwrap_or(0);
    let name = format!("cli-{}-{number:08x}", std::process::id());
    name.parse().map_err(|e| EngineError::Invalid {
        what: format!("{e}"),
        hint: "please report it".into(),
    })
}

/// Signals that ask this process to end.
struct Interruption {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Interruption {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| {
            signal(kind).map_err(|e| Failure::new(Exit::Environment, format!("signals: {e}")))
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn wait(&mut self) -> Failure {
        let name = tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "SIGHUP",
        };
        Failure::new(
            Exit::Cancelled,
            format!("cancelled by {name}; the sandbox was removed"),
        )
    }
}
