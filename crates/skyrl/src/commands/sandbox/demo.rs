//! `skyrl sandbox demo`: the life of a sandbox with each engine, timed.

use super::session::{open, random_id};
use crate::exit::{Exit, Failure};
use crate::printer::Printer;
use skyrl_protocol::guest::ExecRequest;
use skyrl_sandbox::{
    EngineKind, ImageRef, Sandbox, SandboxSpec, Sandboxes, SnapshotMode, StateDir, probe,
};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// Copies of the prepared sandbox.
const FORKS: usize = 3;

/// Arguments of `skyrl sandbox demo`.
#[derive(clap::Args)]
pub(crate) struct Demo {
    /// Image to start from.
    #[arg(long, default_value = "host", value_parser = str::parse::<ImageRef>)]
    image: ImageRef,
}

impl Demo {
    pub(super) async fn run(self, state: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
        let image = super::spec::absolute(&self.image)?;
        let mut rows = Vec::new();
        for found in probe::all(&StateDir::open(state)?).await? {
            if !found.usable {
                printer.talk(&format!("{}: not usable: {}", found.engine, found.reason));
                continue;
            }
            printer.talk(&format!("{}: {}", found.engine, found.reason));
            rows.push(one_engine(state, found.engine, &image, printer).await?);
        }
        if rows.is_empty() {
            return Err(
                Failure::new(Exit::Environment, "no engine works on this machine")
                    .hint("`skyrl sandbox probe` shows what is lacking"),
            );
        }
        printer.line("");
        printer.table(
            &[
                "ENGINE",
                "FIRST START",
                "START",
                "EXEC",
                "SNAPSHOT",
                "FORK",
                "DESTROY",
            ],
            &rows,
        );
        Ok(ExitCode::SUCCESS)
    }
}

async fn one_engine(
    state: &Path,
    engine: EngineKind,
    image: &ImageRef,
    printer: &Printer,
) -> Result<Vec<String>, Failure> {
    let sandboxes = open(state, Some(engine), image).await?;
    let outcome = life(&sandboxes, image, printer).await;
    let removed = sandboxes.shutdown().await;
    let times = outcome?;
    removed?;
    Ok([engine.to_string()]
        .into_iter()
        .chain(times.into_iter().map(|ms| format!("{ms:.1} ms")))
        .collect())
}

/// Milliseconds of: first start, start, exec, snapshot, fork, destroy. A start
/// ends with the result of a first command.
async fn life(
    sandboxes: &Sandboxes,
    image: &ImageRef,
    printer: &Printer,
) -> Result<Vec<f64>, Failure> {
    let spec = SandboxSpec::new(image.clone());
    let mut times = Vec::new();

    let clock = Instant::now();
    let first = sandboxes.start(random_id("demo")?, spec.clone()).await?;
    say(&first, "uname -n").await?;
    times.push(ms(clock));

    let clock = Instant::now();
    let prepared = sandboxes.start(random_id("demo")?, spec).await?;
    say(&prepared, "true").await?;
    times.push(ms(clock));

    let clock = Instant::now();
    let name = say(&prepared, "uname -n").await?;
    times.push(ms(clock));
    printer.talk(&format!("  a command in sandbox {name} says hello"));

    say(&prepared, "echo prepared by $(uname -n) > /tmp/prepared").await?;
    let snapshot = format!("{}-files", prepared.guest.id())
        .parse()
        .map_err(|e| Failure::new(Exit::Bug, format!("{e}")))?;
    let clock = Instant::now();
    sandboxes
        .snapshot(prepared.guest.id(), &snapshot, SnapshotMode::Consume)
        .await?;
    times.push(ms(clock));

    let fork = SandboxSpec::new(ImageRef::Snapshot(snapshot));
    let clock = Instant::now();
    let mut forks = Vec::new();
    for _ in 0..FORKS {
        let sandbox = sandboxes.start(random_id("fork")?, fork.clone()).await?;
        let found = say(&sandbox, "cat /tmp/prepared").await?;
        if found != format!("prepared by {name}") {
            return Err(Failure::new(
                Exit::Failed,
                format!("a fork found {found:?} instead of the prepared file"),
            ));
        }
        forks.push(sandbox);
    }
    times.push(ms(clock) / FORKS as f64);
    printer.talk(&format!(
        "  {FORKS} forks found the file prepared by {name}"
    ));

    let clock = Instant::now();
    sandboxes.destroy(first.guest.id()).await?;
    times.push(ms(clock));
    Ok(times)
}

/// First line a shell command prints; a failing command is a failure.
async fn say(sandbox: &Sandbox, line: &str) -> Result<String, Failure> {
    let result = sandbox.guest.exec(&ExecRequest::shell(line)).await?;
    if !result.success() {
        return Err(Failure::new(
            Exit::Failed,
            format!("`{line}` failed in the sandbox: {}", result.stderr.text),
        ));
    }
    Ok(result.stdout.text.trim_end().to_owned())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1_000.0
}
