//! Whether a command line is well formed, as `bash -n` says it.

use super::error::{Exception, Failure};
use crate::Guest;
use crate::api::python;
use crate::process::{Input, Spec, Stream};
use serde_json::json;
use std::time::Duration;

/// How long a check may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Words that begin something which needs an end.
const RESERVED: [&str; 22] = [
    "if", "then", "elif", "else", "fi", "time", "for", "in", "until", "while", "do", "done",
    "case", "esac", "coproc", "select", "function", "{", "}", "[[", "]]", "!",
];

/// Whether a line is a plain command beyond doubt, so that no shell has to be
/// asked.
fn is_plain(command: &str) -> bool {
    let first = command.split_ascii_whitespace().next().unwrap_or_default();
    !RESERVED.contains(&first)
        && command
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b" _-./=:,@%+\n".contains(&b))
        && command.lines().count() <= 1
}

/// Raises what the client knows when the command is malformed. Without a shell
/// that can check, everything passes.
pub(super) fn check(guest: &Guest, shell: &str, command: &str) -> Result<(), Failure> {
    if is_plain(command) {
        return Ok(());
    }
    let spec = Spec {
        input: Input::Bytes(format!("{command}\n").into_bytes()),
        timeout: Some(PATIENCE),
        grace: Duration::ZERO,
        ..Spec::argv([shell, "-n"])
    };
    let checked = guest.processes.spawn(&spec)?;
    checked.wait(None);
    let exit = checked.exit().map_or(0, |exit| exit.python_code());
    // Death by a signal says nothing about the command.
    if exit <= 0 {
        return Ok(());
    }
    let (stdout, stderr) = (
        checked.output(Stream::Stdout).text,
        checked.output(Stream::Stderr).text,
    );
    let message = format!(
        "Error (exit code {exit}) while checking bash command \n{}\n\
         ---- Stderr ----\n{stderr}\n---- Stdout ----\n{stdout}",
        python::repr(command)
    );
    Err(Exception::swerex("BashIncorrectSyntaxError", message)
        .with_info(json!({"bash_stdout": stdout, "bash_stderr": stderr}))
        .into())
}

#[cfg(test)]
mod tests {
    use super::is_plain;

    #[test]
    fn only_lines_that_cannot_be_malformed_are_plain() {
        for plain in ["ls -la /tmp", "A=1 env", "", "echo hi\n", "python3 -m x.y"] {
            assert!(is_plain(plain), "{plain:?}");
        }
        for doubtful in [
            "if", " done", "echo 'x", "a;b", "a\nfi", "(x", "x &", "# c", "a\\",
        ] {
            assert!(!is_plain(doubtful), "{doubtful:?}");
        }
    }
}
