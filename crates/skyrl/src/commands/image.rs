//! `skyrl image ...`: the image store of this machine.

use super::sandbox::spec::{absolute, pull};
use super::state::StateArgs;
use crate::exit::Failure;
use crate::printer::Printer;
use clap::Subcommand;
use serde::Serialize;
use skyrl_sandbox::image::{ImageSummary, Progress, PullUpdate};
use skyrl_sandbox::{ImageRef, ImageStore, PullPolicy, StateDir};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant, UNIX_EPOCH};

/// Arguments of `skyrl image`.
#[derive(clap::Args)]
pub(crate) struct Image {
    #[command(flatten)]
    state: StateArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the images in the store, most recently used first.
    Ls {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make images present, so that sandboxes start without waiting.
    Pull {
        /// Registry references, `oci-archive:FILE`, `docker-archive:FILE`, `dir:PATH`.
        #[arg(required = true, value_parser = str::parse::<ImageRef>)]
        images: Vec<ImageRef>,
        /// When to ask the registry: if-missing, always, never.
        #[arg(long, default_value = "if-missing", value_parser = pull)]
        policy: PullPolicy,
    },
    /// Remove images that no sandbox uses.
    Rm {
        /// As they were pulled.
        #[arg(required = true, value_parser = str::parse::<ImageRef>)]
        images: Vec<ImageRef>,
    },
}

#[derive(Serialize)]
struct Row {
    references: Vec<String>,
    digest: String,
    bytes: u64,
    last_used_unix: u64,
    used_by: Vec<String>,
}

impl From<ImageSummary> for Row {
    fn from(image: ImageSummary) -> Self {
        Self {
            references: image.references.iter().map(ToString::to_string).collect(),
            digest: image.digest,
            bytes: image.bytes,
            last_used_unix: image
                .last_used
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
            used_by: image.used_by.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Image {
    pub(crate) async fn run(self, printer: &Printer) -> Result<ExitCode, Failure> {
        let state = StateDir::open(&self.state.directory())?;
        let store = ImageStore::open(&state.images(), None)?;
        match self.verb {
            Verb::Ls { json } => list(&store, json, printer)?,
            Verb::Pull { images, policy } => {
                for image in images {
                    let image = absolute(&image)?;
                    let progress = Plain::new(image.to_string());
                    let present = store.ensure(&image, policy, &progress).await?;
                    printer.line(&format!("{} {}", present.digest, present.reference));
                }
            }
            Verb::Rm { images } => {
                for image in images {
                    let image = absolute(&image)?;
                    store.remove(&image)?;
                    printer.line(&image.to_string());
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(store: &ImageStore, json: bool, printer: &Printer) -> Result<(), Failure> {
    let rows: Vec<Row> = store.list()?.into_iter().map(Row::from).collect();
    if json {
        return printer.json(&rows);
    }
    let cells: Vec<Vec<String>> = rows
        .into_iter()
        .map(|row| {
            vec![
                row.references.join(", "),
                row.digest.chars().take(19).collect(),
                format!("{:.1} MiB", row.bytes as f64 / f64::from(1 << 20)),
                match row.used_by.len() {
                    0 => String::new(),
                    users => format!("{users} in use"),
                },
            ]
        })
        .collect();
    printer.table(&["IMAGE", "DIGEST", "SIZE", "USE"], &cells);
    Ok(())
}

/// Progress on stderr: one line that is rewritten on a terminal, otherwise a
/// line every few seconds.
pub(crate) struct Plain {
    image: String,
    last: Mutex<Option<Instant>>,
}

impl Plain {
    pub(crate) fn new(image: String) -> Self {
        Self {
            image,
            last: Mutex::new(None),
        }
    }
}

impl Progress for Plain {
    fn update(&self, update: &PullUpdate) {
        let terminal = std::io::stderr().is_terminal();
        let pause = Duration::from_millis(if terminal { 100 } else { 5_000 });
        let Ok(mut last) = self.last.lock() else {
            return;
        };
        if last.is_some_and(|last| last.elapsed() < pause) {
            return;
        }
        *last = Some(Instant::now());
        if terminal {
            eprint!("\r\x1b[K{}: {update}", self.image);
        } else {
            eprintln!("{}: {update}", self.image);
        }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let shown = self.last.get_mut().is_ok_and(|last| last.is_some());
        if shown && std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
    }
}
