//! `skyrl sandbox rm`: ends sandboxes, whoever owns them.
//!
//! A living owner is not ours to bypass: the sandbox's guest is told that its
//! lease is over, it ends with all its processes, and the owner clears up.

use super::list::find;
use crate::exit::{Exit, Failure};
use crate::printer::Printer;
use skyrl_protocol::SandboxId;
use skyrl_sandbox::{GuestClient, StateDir};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(15);
/// How long the guest may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a guest lives after a lease of one second.
const RUN_OUT: Duration = Duration::from_secs(4);

/// Arguments of `skyrl sandbox rm`.
#[derive(clap::Args)]
pub(crate) struct Remove {
    /// Which (see `sandbox ls`).
    #[arg(required = true)]
    ids: Vec<SandboxId>,
}

impl Remove {
    pub(super) async fn run(self, state: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
        for id in &self.ids {
            let (owner, record) = find(state, id)?;
            let directory = StateDir::open(state)?;
            if !directory.is_alive(&owner) {
                skyrl_sandbox::prune::dead_owner(&directory, &owner).await?;
                printer.line(id.as_str());
                continue;
            }
            let socket = record.socket.ok_or_else(|| {
                Failure::new(Exit::Failed, format!("sandbox {id} is still starting"))
                    .hint("try again in a moment")
            })?;
            end(&GuestClient::new(id.clone(), socket)).await?;
            printer.line(id.as_str());
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn end(guest: &GuestClient) -> Result<(), Failure> {
    let started = Instant::now();
    while started.elapsed() < DEADLINE {
        if guest.renew_lease(1, ANSWER).await.is_err() {
            return Ok(());
        }
        // The owner may have renewed the lease in between: then it is asked
        // to end again.
        let asked = Instant::now();
        while asked.elapsed() < RUN_OUT {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if guest.health().await.is_err() {
                return Ok(());
            }
        }
    }
    Err(Failure::new(
        Exit::TimedOut,
        format!("sandbox {} did not end", guest.id()),
    )
    .hint("end the process that owns it, then `skyrl sandbox prune`"))
}
