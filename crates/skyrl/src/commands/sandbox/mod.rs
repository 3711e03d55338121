//! `skyrl sandbox ...`: sandboxes by hand.

mod demo;
mod list;
mod probe;
mod prune;
mod remove;
mod run;
mod session;
mod shell;
pub(super) mod spec;

use super::state::StateArgs;
use crate::exit::Failure;
use crate::printer::Printer;
use clap::Subcommand;
use std::process::ExitCode;

/// Arguments of `skyrl sandbox`.
#[derive(clap::Args)]
pub(crate) struct Sandbox {
    #[command(flatten)]
    state: StateArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a command in a fresh sandbox and end with its exit code.
    Run(run::Run),
    /// Open an interactive shell in a fresh or living sandbox.
    Shell(shell::Shell),
    /// List the sandboxes on this machine.
    Ls(list::List),
    /// End living sandboxes.
    Rm(remove::Remove),
    /// Remove everything that dead owners left behind.
    Prune(prune::Prune),
    /// Show what this machine offers and which engines work.
    Probe(probe::Probe),
    /// Start, use, fork and remove sandboxes with each engine, with timings.
    Demo(demo::Demo),
}

impl Sandbox {
    pub(crate) async fn run(self, printer: &Printer) -> Result<ExitCode, Failure> {
        let state = self.state.directory();
        match self.verb {
            Verb::Run(verb) => verb.run(&state).await,
            Verb::Shell(verb) => verb.run(&state, printer).await,
            Verb::Ls(verb) => verb.run(&state, printer),
            Verb::Rm(verb) => verb.run(&state, printer).await,
            Verb::Prune(verb) => verb.run(&state, printer).await,
            Verb::Probe(verb) => verb.run(&state, printer).await,
            Verb::Demo(verb) => verb.run(&state, printer).await,
        }
    }
}
