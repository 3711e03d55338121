//! Everything printed goes through here: data to stdout, talk to stderr.

use crate::exit::{Exit, Failure};
use serde::Serialize;
use std::io::Write;

/// Prints; a closed pipe ends the output quietly, as for `| head`.
pub(crate) struct Printer;

impl Printer {
    /// A line of data.
    pub(crate) fn line(&self, line: &str) {
        // A reader that went away is no error of ours.
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    /// A value as JSON, for programs.
    pub(crate) fn json<T: Serialize>(&self, value: &T) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| Failure::new(Exit::Bug, e.to_string()))?;
        self.line(&text);
        Ok(())
    }

    /// Rows under headings, columns aligned.
    pub(crate) fn table(&self, headings: &[&str], rows: &[Vec<String>]) {
        let width = |column: usize| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .chain([headings[column].chars().count()])
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..headings.len()).map(width).collect();
        let print = |cells: &[String]| {
            let line: Vec<String> = cells
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:width$}"))
                .collect();
            self.line(line.join("  ").trim_end());
        };
        print(&headings.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
        for row in rows {
            print(row);
        }
    }

    /// Something a person may want to know.
    pub(crate) fn talk(&self, message: &str) {
        eprintln!("{message}");
    }

    /// Why the verb failed and what to do next.
    pub(crate) fn error(&self, failure: &Failure) {
        eprintln!("error: {}", failure.message);
        if let Some(hint) = &failure.hint {
            eprintln!("hint: {hint}");
        }
    }
}
