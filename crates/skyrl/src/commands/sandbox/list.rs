//! `skyrl sandbox ls`: what is written down about this user's sandboxes.

use crate::exit::{Exit, Failure};
use crate::printer::Printer;
use serde::Serialize;
use skyrl_protocol::{OwnerId, SandboxId};
use skyrl_sandbox::{EngineError, SandboxRecord, StateDir};
use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// Arguments of `skyrl sandbox ls`.
#[derive(clap::Args)]
pub(crate) struct List {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    id: SandboxId,
    owner: OwnerId,
    owner_alive: bool,
    engine: String,
    image: String,
    created_unix: u64,
    ready: bool,
}

impl List {
    pub(super) fn run(self, state: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
        let state = StateDir::open(state)?;
        let mut rows = Vec::new();
        for (owner, records) in records(&state)? {
            let owner_alive = state.is_alive(&owner);
            rows.extend(records.into_iter().map(|record| {
                Row {
                    id: record.id,
                    owner: owner.clone(),
                    owner_alive,
                    engine: record.engine.to_string(),
                    image: record.spec.image.to_string(),
                    created_unix: record
                        .created
                        .duration_since(UNIX_EPOCH)
                        .unwrap_or_default()
                        .as_secs(),
                    ready: record.socket.is_some(),
                }
            }));
        }
        if self.json {
            printer.json(&rows)?;
            return Ok(ExitCode::SUCCESS);
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let orphans = rows.iter().any(|row| !row.owner_alive);
        let cells: Vec<Vec<String>> = rows
            .into_iter()
            .map(|row| {
                let owner = if row.owner_alive { "alive" } else { "dead" };
                vec![
                    row.id.to_string(),
                    format!("{} ({owner})", row.owner),
                    row.engine,
                    if row.ready { "ready" } else { "starting" }.to_owned(),
                    age(now.saturating_sub(row.created_unix)),
                    row.image,
                ]
            })
            .collect();
        printer.table(&["ID", "OWNER", "ENGINE", "STATE", "AGE", "IMAGE"], &cells);
        if orphans {
            printer.talk("hint: `skyrl sandbox prune` removes those of dead owners");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A sandbox by id, whoever owns it.
pub(super) fn find(state: &Path, id: &SandboxId) -> Result<(OwnerId, SandboxRecord), Failure> {
    let state = StateDir::open(state)?;
    records(&state)?
        .into_iter()
        .flat_map(|(owner, records)| records.into_iter().map(move |r| (owner.clone(), r)))
        .find(|(_, record)| &record.id == id)
        .ok_or_else(|| EngineError::NotFound(id.clone()).into())
}

fn records(state: &StateDir) -> Result<Vec<(OwnerId, Vec<SandboxRecord>)>, Failure> {
    let owners = state
        .owners()
        .map_err(|e| Failure::new(Exit::Failed, format!("listing owners: {e}")))?;
    Ok(owners
        .into_iter()
        .map(|owner| {
            // An owner that ended meanwhile has no sandboxes.
            let all = SandboxRecord::read_all(&state.owner_dir(&owner)).unwrap_or_default();
            let known = all.into_iter().filter_map(|(_, record)| record).collect();
            (owner, known)
        })
        .collect())
}

fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
