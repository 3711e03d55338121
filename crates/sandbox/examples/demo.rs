//! What `make demo` shows, and how this library is used: with each engine that
//! works here, a sandbox of this very machine (`host` image) is started, a
//! command run, the sandbox forked, and everything removed again.

use skyrl_protocol::guest::ExecRequest;
use skyrl_protocol::{OwnerId, SandboxId};
use skyrl_sandbox::{
    EngineError, EngineKind, ImageRef, Options, Sandbox, SandboxSpec, Sandboxes, SnapshotMode,
};
use std::error::Error;
use std::path::Path;
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Copies made of the prepared sandbox.
const COPIES: usize = 3;

fn told(what: &str, since: Instant, result: &str) {
    let ms = since.elapsed().as_secs_f64() * 1000.0;
    println!("  {what:<34} {ms:>8.1} ms   {result}");
}

async fn sh(sandbox: &Sandbox, line: &str) -> Outcome<String> {
    let result = sandbox.guest.exec(&ExecRequest::shell(line)).await?;
    if !result.success() {
        return Err(format!("`{line}` failed: {result:?}").into());
    }
    Ok(result.stdout.text.trim_end().to_owned())
}

async fn show(sandboxes: &Sandboxes) -> Outcome<()> {
    let prepared: SandboxId = "prepared".parse()?;
    let begin = Instant::now();
    let sandbox = sandboxes
        .start(prepared.clone(), SandboxSpec::new(ImageRef::Host))
        .await?;
    told("start a sandbox of this machine", begin, "");

    let begin = Instant::now();
    let seen = sh(&sandbox, "echo process $$ of $(ls -d /proc/[0-9]* | wc -l), user $(id -u), host $(cat /proc/sys/kernel/hostname)").await?;
    told("run a command", begin, &seen);

    let begin = Instant::now();
    sh(&sandbox, "mkdir -p /workspace && cd /workspace && for n in 1 2 3 4 5; do head -c 1000000 /dev/urandom > $n; done").await?;
    told("prepare it: write 5 MB", begin, "");

    let begin = Instant::now();
    let ids = (1..=COPIES)
        .map(|number| Ok(format!("copy-{number}").parse()?))
        .collect::<Outcome<Vec<SandboxId>>>()?;
    let copies = sandboxes.fork(&prepared, ids, SnapshotMode::Consume).await?;
    told(&format!("fork it {COPIES} times"), begin, "");

    for (number, copy) in copies.iter().enumerate() {
        let begin = Instant::now();
        let seen = sh(copy, &format!("cd /workspace && echo {number} >> own && echo $(ls | wc -l) files, $(cat own | wc -l) of its own")).await?;
        told(&format!("look into copy {}", number + 1), begin, &seen);
    }

    let begin = Instant::now();
    for copy in &copies {
        sandboxes.destroy(copy.guest.id()).await?;
    }
    told(&format!("destroy all {COPIES}"), begin, "");
    Ok(())
}

/// Whether the engine worked; one that this machine can't have is no failure.
async fn demonstrate(engine: EngineKind, state: &Path) -> Outcome<bool> {
    let mut options = Options::new(state, "demo".parse::<OwnerId>()?);
    options.engine = Some(engine);
    let begin = Instant::now();
    let sandboxes = match Sandboxes::open(options).await {
        Ok(sandboxes) => sandboxes,
        Err(error @ EngineError::Unusable { .. }) => {
            println!("\n{engine}: {error}");
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    };
    println!("\n{engine}: {}", sandboxes.engine_reason());
    told("open the engine", begin, "");
    let shown = show(&sandboxes).await;
    sandboxes.shutdown().await?;
    shown.map(|()| true)
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let state = tempfile::tempdir()?;
    let mut worked = 0;
    for engine in EngineKind::ALL {
        worked += usize::from(demonstrate(engine, state.path()).await?);
    }
    if worked == 0 {
        return Err("no engine works on this machine; the lines above say why".into());
    }
    println!("\n{worked} of {} engines shown; nothing is left of them.", EngineKind::ALL.len());
    Ok(())
}
