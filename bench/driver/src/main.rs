//! The benchmark's side of the sandbox library: one long-lived process per
//! engine, told by JSON lines on standard input what to do, answering with
//! JSON lines how long it took. So neither the start of a program nor Python
//! is in our figures, as neither is in a runtime server's.
//!
//! Everything is measured here; what is measured, when, and what it means is
//! the harness's business.

use serde::{Deserialize, Serialize};
use skyrl_protocol::guest::ExecRequest;
use skyrl_protocol::{OwnerId, SandboxId, SnapshotId};
use skyrl_sandbox::programs::{Programs, guest_size};
use skyrl_sandbox::{
    EngineKind, ImageRef, Options, Sandbox, SandboxSpec, Sandboxes, SnapshotMode, StateDir,
};
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// One line of the harness.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
enum Request {
    /// Starts a sandbox and runs `true` in it.
    Start { name: SandboxId, image: ImageRef },
    /// Runs a program in a sandbox; it must succeed.
    Run { name: SandboxId, argv: Vec<String> },
    /// Runs `true` in a sandbox, `times` times.
    Exec { name: SandboxId, times: usize },
    /// `callers` tasks run `true` for `seconds`, spread over `names`.
    Crowd {
        names: Vec<SandboxId>,
        callers: usize,
        seconds: f64,
    },
    /// Freezes a sandbox's files.
    Snapshot {
        name: SandboxId,
        snapshot: SnapshotId,
        mode: SnapshotMode,
    },
    /// Forgets a snapshot.
    RemoveSnapshot { snapshot: SnapshotId },
    /// Kills and removes a sandbox.
    Destroy { name: SandboxId },
    /// Starts `count` sandboxes named `prefix` and a number, `parallel` at once.
    StartMany {
        prefix: String,
        count: usize,
        parallel: usize,
        image: ImageRef,
    },
    /// Destroys them.
    DestroyMany {
        prefix: String,
        count: usize,
        parallel: usize,
    },
    /// Removes everything and ends this process.
    Shutdown,
}

/// How long things took, in milliseconds, and what the harness needs to look
/// at a sandbox from outside.
#[derive(Debug, Default, Serialize)]
struct Answer {
    /// One entry per call, in order.
    ms: Vec<f64>,
    /// From the first call to the end of the last, in seconds.
    seconds: f64,
    /// Until the guest answered; absent where nothing was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    start_ms: Option<f64>,
    /// The guest's socket on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
}

/// Said once, before the first request.
#[derive(Debug, Serialize)]
struct Hello {
    engine: EngineKind,
    guest: PathBuf,
    guest_bytes: usize,
}

fn since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

async fn run_true(sandbox: &Sandbox) -> Outcome<()> {
    run(sandbox, ["true"]).await
}

async fn run<I, S>(sandbox: &Sandbox, argv: I) -> Outcome<()>
where
    I: IntoIterator<Item = S>,
    S: Into<String>,
{
    let result = sandbox.guest.exec(&ExecRequest::argv(argv)).await?;
    if result.success() {
        return Ok(());
    }
    Err(format!("the command failed: {result:?}").into())
}

fn get(sandboxes: &Sandboxes, name: &SandboxId) -> Outcome<Sandbox> {
    sandboxes
        .get(name)
        .ok_or_else(|| format!("no sandbox {name} is running").into())
}

async fn crowd(sandboxes: Vec<Sandbox>, callers: usize, time: Duration) -> Outcome<Answer> {
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for caller in 0..callers {
        let sandboxes = sandboxes.clone();
        tasks.spawn(async move {
            let mut own = Vec::new();
            // A stride that shares no factor with the count visits all of them.
            let mut next = caller * 7919;
            while begin.elapsed() < time {
                let call = Instant::now();
                run_true(&sandboxes[next % sandboxes.len()]).await?;
                own.push(since(call));
                next += 7919;
            }
            Outcome::Ok(own)
        });
    }
    let mut ms = Vec::new();
    while let Some(own) = tasks.join_next().await {
        ms.extend(own??);
    }
    Ok(Answer {
        ms,
        seconds: begin.elapsed().as_secs_f64(),
        ..Answer::default()
    })
}

/// Does `act` for each of `count` names, at most `parallel` at once.
async fn many<F, Fut>(prefix: &str, count: usize, parallel: usize, act: F) -> Outcome<Answer>
where
    F: Fn(SandboxId) -> Fut,
    Fut: Future<Output = Outcome<()>> + Send + 'static,
{
    let begin = Instant::now();
    let slots = Arc::new(Semaphore::new(parallel));
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let work = act(format!("{prefix}{number}").parse()?);
        let slots = slots.clone();
        tasks.spawn(async move {
            let _slot = slots.acquire().await?;
            let call = Instant::now();
            work.await?;
            Outcome::Ok(since(call))
        });
    }
    let mut ms = Vec::with_capacity(count);
    while let Some(spent) = tasks.join_next().await {
        ms.push(spent??);
    }
    Ok(Answer {
        ms,
        seconds: begin.elapsed().as_secs_f64(),
        ..Answer::default()
    })
}

async fn answer(sandboxes: &Arc<Sandboxes>, request: Request) -> Outcome<Answer> {
    let begin = Instant::now();
    let mut answer = Answer::default();
    match request {
        Request::Start { name, image } => {
            let sandbox = sandboxes.start(name, SandboxSpec::new(image)).await?;
            answer.start_ms = Some(since(begin));
            run_true(&sandbox).await?;
            answer.ms.push(since(begin));
            answer.socket = Some(sandbox.guest.socket().to_owned());
        }
        Request::Run { name, argv } => {
            run(&get(sandboxes, &name)?, argv).await?;
            answer.ms.push(since(begin));
        }
        Request::Exec { name, times } => {
            let sandbox = get(sandboxes, &name)?;
            for _ in 0..times {
                let call = Instant::now();
                run_true(&sandbox).await?;
                answer.ms.push(since(call));
            }
        }
        Request::Crowd {
            names,
            callers,
            seconds,
        } => {
            let chosen = names
                .iter()
                .map(|name| get(sandboxes, name))
                .collect::<Outcome<Vec<_>>>()?;
            return crowd(chosen, callers, Duration::from_secs_f64(seconds)).await;
        }
        Request::Snapshot {
            name,
            snapshot,
            mode,
        } => {
            sandboxes.snapshot(&name, &snapshot, mode).await?;
            answer.ms.push(since(begin));
        }
        Request::RemoveSnapshot { snapshot } => {
            sandboxes.remove_snapshot(&snapshot).await?;
            answer.ms.push(since(begin));
        }
        Request::Destroy { name } => {
            sandboxes.destroy(&name).await?;
            answer.ms.push(since(begin));
        }
        Request::StartMany {
            prefix,
            count,
            parallel,
            image,
        } => {
            return many(&prefix, count, parallel, |name| {
                let (sandboxes, image) = (sandboxes.clone(), image.clone());
                async move {
                    let sandbox = sandboxes.start(name, SandboxSpec::new(image)).await?;
                    run_true(&sandbox).await
                }
            })
            .await;
        }
        Request::DestroyMany {
            prefix,
            count,
            parallel,
        } => {
            return many(&prefix, count, parallel, |name| {
                let sandboxes = sandboxes.clone();
                async move { Ok(sandboxes.destroy(&name).await?) }
            })
            .await;
        }
        Request::Shutdown => {}
    }
    answer.seconds = begin.elapsed().as_secs_f64();
    Ok(answer)
}

async fn say<T: Serialize + Sync>(what: &T) -> Outcome<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let mut out = tokio::io::stdout();
    out.write_all(&line).await?;
    Ok(out.flush().await?)
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(engine), Some(state)) = (arguments.next(), arguments.next()) else {
        return Err("usage: skyrl-bench-driver ENGINE STATE_DIRECTORY".into());
    };
    let engine: EngineKind = engine.parse()?;
    let state = PathBuf::from(state);
    let installed = Programs::install(&StateDir::open(&state)?.programs())?;
    let mut options = Options::new(state, format!("bench-{engine}").parse::<OwnerId>()?);
    options.engine = Some(engine);
    let sandboxes = Arc::new(Sandboxes::open(options).await?);
    say(&Hello {
        engine,
        guest: installed.guest,
        guest_bytes: guest_size(),
    })
    .await?;

    // End of input means that the harness is gone: then clean up as well.
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let request: Request = serde_json::from_str(&line)?;
        if matches!(request, Request::Shutdown) {
            break;
        }
        match answer(&sandboxes, request).await {
            Ok(answer) => say(&answer).await?,
            Err(error) => say(&serde_json::json!({ "error": error.to_string() })).await?,
        }
    }
    let Ok(sandboxes) = Arc::try_unwrap(sandboxes) else {
        return Err("a call is still under way".into());
    };
    Ok(sandboxes.shutdown().await?)
}
