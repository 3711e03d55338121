//! `skyrl sandbox probe`: what this machine offers.

use crate::exit::{Exit, Failure};
use crate::printer::Printer;
use skyrl_sandbox::{StateDir, probe};
use std::path::Path;
use std::process::ExitCode;

/// Arguments of `skyrl sandbox probe`.
#[derive(clap::Args)]
pub(crate) struct Probe {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Probe {
    pub(super) async fn run(self, state: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
        let probes = probe::all(&StateDir::open(state)?).await?;
        let choice = probe::choose(&probes);
        if self.json {
            printer.json(&serde_json::json!({
                "engines": probes,
                "choice": choice.as_ref().ok(),
            }))?;
        } else {
            let mut rows = Vec::new();
            for probe in &probes {
                let verdict = if probe.usable { "usable" } else { "NOT USABLE" };
                rows.push(vec![
                    probe.engine.to_string(),
                    verdict.to_owned(),
                    probe.reason.clone(),
                    String::new(),
                ]);
                rows.extend(probe.facts.iter().map(|fact| {
                    vec![
                        String::new(),
                        if fact.ok { "ok" } else { "lacking" }.to_owned(),
                        format!("{}: {}", fact.name, fact.value),
                        fact.remedy.clone().unwrap_or_default(),
                    ]
                }));
            }
            printer.table(&["ENGINE", "", "FOUND", "REMEDY"], &rows);
            if let Ok(choice) = &choice {
                printer.line("");
                printer.line(&format!("auto takes {}", choice.why));
            }
        }
        match choice {
            Ok(_) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(Failure {
                exit: Exit::Environment,
                ..error.into()
            }),
        }
    }
}
