//! Observations as the client reads them: every member of `extras` becomes an
//! argument there, so none may be added.

use serde_json::{Value, json};

/// Most characters of a command's output that an agent is shown.
const MOST_CHARACTERS: usize = 30_000;

/// What is told about a command beside its output.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Metadata {
    /// Exit code; −1 when it is not known.
    pub(super) exit_code: i32,
    /// What is only known when the command has ended.
    pub(super) ended: Option<Ended>,
    /// Shown before the output.
    pub(super) prefix: String,
    /// Shown after it.
    pub(super) suffix: String,
}

/// What is known of the shell after a command.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Ended {
    /// Last background job, −1 without.
    pub(super) pid: i32,
    pub(super) username: String,
    pub(super) hostname: String,
    pub(super) working_dir: String,
    pub(super) python: String,
}

impl Metadata {
    fn json(&self) -> Value {
        let ended = self.ended.as_ref();
        json!({
            "exit_code": self.exit_code,
            "pid": ended.map_or(-1, |e| e.pid),
            "username": ended.map(|e| &e.username),
            "hostname": ended.map(|e| &e.hostname),
            "working_dir": ended.map(|e| &e.working_dir),
            "py_interpreter_path": ended.map(|e| &e.python),
            "prefix": self.prefix,
            "suffix": self.suffix,
        })
    }
}

/// Of a command.
pub(super) fn run(command: &str, content: &str, metadata: &Metadata, hidden: bool) -> Value {
    let content = if hidden {
        content.to_owned()
    } else {
        truncated(content)
    };
    json!({
        "observation": "run",
        "message": format!(
            "Command `{command}` executed with exit code {}.",
            metadata.exit_code
        ),
        "content": content,
        "extras": {"command": command, "metadata": metadata.json(), "hidden": hidden},
        "success": metadata.exit_code == 0,
    })
}

/// Keeps the first and the last characters of a long text.
fn truncated(content: &str) -> String {
    let half = MOST_CHARACTERS / 2;
    if content.len() <= MOST_CHARACTERS || content.chars().count() <= MOST_CHARACTERS {
        return content.to_owned();
    }
    let head = content.char_indices().nth(half).map_or(0, |(at, _)| at);
    let tail = content
        .char_indices()
        .nth_back(half - 1)
        .map_or(0, |(at, _)| at);
    format!(
        "{}\n[... Observation truncated due to length ...]\n{}",
        &content[..head],
        &content[tail..]
    )
}

/// Of a failure that the agent shall see.
pub(super) fn error(content: &str) -> Value {
    json!({
        "observation": "error",
        "message": content,
        "content": content,
        "extras": {"error_id": ""},
    })
}

/// Of Python code.
pub(super) fn ipython(code: &str, content: &str) -> Value {
    json!({
        "observation": "run_ipython",
        "message": "Code executed in IPython cell.",
        "content": content,
        "extras": {"code": code, "image_urls": []},
    })
}

/// Of a file that was read.
pub(super) fn read(path: &str, content: &str, implementation: &str) -> Value {
    json!({
        "observation": "read",
        "message": format!("I read the file {path}."),
        "content": content,
        "extras": {"path": path, "impl_source": implementation},
    })
}

/// Of a file that was written.
pub(super) fn write(path: &str) -> Value {
    json!({
        "observation": "write",
        "message": format!("I wrote to the file {path}."),
        "content": "",
        "extras": {"path": path},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_output_keeps_both_ends() {
        let text = "\u{e9}".repeat(20_000) + &"z".repeat(20_000);
        let short = truncated(&text);
        let (head, tail) = short
            .split_once("\n[... Observation truncated due to length ...]\n")
            .expect("truncated");
        assert_eq!(
            (head.chars().count(), tail.chars().count()),
            (15_000, 15_000)
        );
        assert!(head.ends_with('\u{e9}') && tail.starts_with('z'));
        let fits = "\u{e9}".repeat(30_000);
        assert_eq!(truncated(&fits), fits);
    }

    #[test]
    fn a_command_that_has_not_ended_has_no_surroundings() {
        let metadata = Metadata {
            exit_code: -1,
            suffix: "\n[s]".into(),
            ..Metadata::default()
        };
        let observation = run("x", "out", &metadata, false);
        assert_eq!(
            observation["extras"]["metadata"],
            json!({
                "exit_code": -1, "pid": -1, "username": null, "hostname": null,
                "working_dir": null, "py_interpreter_path": null, "prefix": "", "suffix": "\n[s]",
            })
        );
        assert_eq!(observation["success"], false);
    }
}
