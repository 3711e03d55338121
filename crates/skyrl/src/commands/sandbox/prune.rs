//! `skyrl sandbox prune`: removes what dead owners left.

use crate::exit::Failure;
use crate::printer::Printer;
use skyrl_sandbox::StateDir;
use std::path::Path;
use std::process::ExitCode;

/// Arguments of `skyrl sandbox prune`.
#[derive(clap::Args)]
pub(crate) struct Prune {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Prune {
    pub(super) async fn run(self, state: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
        let owners = skyrl_sandbox::prune::dead_owners(&StateDir::open(state)?).await?;
        if self.json {
            printer.json(&owners)?;
        } else {
            for owner in &owners {
                printer.line(owner.as_str());
            }
            printer.talk(&format!("{} dead owners removed", owners.len()));
        }
        Ok(ExitCode::SUCCESS)
    }
}
