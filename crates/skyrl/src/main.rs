//! The `skyrl` command line: reads arguments, calls the crates that do the
//! work, prints. One file a verb in `commands/`; nothing here is worth testing
//! by itself.

mod commands;
mod exit;
mod printer;

use clap::{Parser, Subcommand};
use exit::{Exit, Failure};
use printer::Printer;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::process::ExitCode;

/// Agentic reinforcement learning on SLURM clusters.
#[derive(Parser)]
#[command(name = "skyrl", version, about, after_help = exit::HELP)]
struct Cli {
    /// Print more of what happens (repeat for more); talk goes to stderr.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start, enter, list and remove sandboxes on this machine.
    Sandbox(Box<commands::sandbox::Sandbox>),
    /// Fetch, list and remove images on this machine.
    Image(commands::image::Image),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors and go to stdout.
            let usage = error.use_stderr();
            if error.print().is_err() || usage {
                return Exit::Usage.into();
            }
            return ExitCode::SUCCESS;
        }
    };
    start_log(cli.verbose);
    allow_open_files();
    let printer = Printer;
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            printer.error(&Failure::new(
                Exit::Environment,
                format!("can't start threads: {error}"),
            ));
            return Exit::Environment.into();
        }
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Sandbox(sandbox) => sandbox.run(&printer).await,
            Command::Image(image) => image.run(&printer).await,
        }
    });
    // A blocked thread (a read of the terminal) must not hold the exit up.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            printer.error(&failure);
            failure.exit.into()
        }
    }
}

/// Raises the soft limit of open files to the hard one: each sandbox takes a
/// few descriptors. Where it is refused, the limit's own error tells later.
fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

fn start_log(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::new(default);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
