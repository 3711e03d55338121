//! The bash events of the agent-server dialect: what commands were started
//! and what they answered, in order of time, bounded in number and bytes.
//! Pure memory: it neither runs commands nor speaks HTTP.

use super::time::{self, Micros};
use serde_json::{Value, json};
use std::collections::{HashSet, VecDeque};

/// Characters of a stream in one event; longer output comes in several.
const CHUNK_CHARS: usize = 1_048_576;

/// Bytes of text kept of all events.
const MAX_BYTES: usize = 64 << 20;

/// Events kept.
const MAX_EVENTS: usize = 5_000;

/// Kinds of event, as clients name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Command,
    Output,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Command => "BashCommand",
            Self::Output => "BashOutput",
        }
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) id: String,
    at: Micros,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Command {
        command: String,
        cwd: Option<String>,
        timeout: i64,
    },
    Output(Output),
}

/// What a command answered, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) command_id: String,
    pub(super) order: i64,
    pub(super) exit_code: Option<i32>,
    pub(super) stdout: Option<String>,
    pub(super) stderr: Option<String>,
}

impl Event {
    /// A command that begins now.
    pub(super) fn command(command: String, cwd: Option<String>, timeout: i64) -> Self {
        Self {
            id: crate::random_id(),
            at: time::now(),
            content: Content::Command {
                command,
                cwd,
                timeout,
            },
        }
    }

    fn output(at: Micros, output: Output) -> Self {
        Self {
            id: crate::random_id(),
            at,
            content: Content::Output(output),
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self.content {
            Content::Command { .. } => Kind::Command,
            Content::Output(_) => Kind::Output,
        }
    }

    /// The command that an output belongs to.
    fn command_id(&self) -> Option<&str> {
        match &self.content {
            Content::Command { .. } => None,
            Content::Output(output) => Some(&output.command_id),
        }
    }

    /// What it says, for an output.
    pub(super) fn as_output(&self) -> Option<&Output> {
        match &self.content {
            Content::Command { .. } => None,
            Content::Output(output) => Some(output),
        }
    }

    /// The command that an event is about.
    fn owner(&self) -> &str {
        self.command_id().unwrap_or(&self.id)
    }

    fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        match &self.content {
            Content::Command { command, cwd, .. } => command.len() + text(cwd),
            Content::Output(output) => text(&output.stdout) + text(&output.stderr),
        }
    }

    /// Names the place of an event in the sequence, for paging.
    fn page_id(&self) -> String {
        let at = time::compact(self.at);
        match &self.content {
            Content::Command { .. } => format!("{at}_BashCommand_{}", self.id),
            Content::Output(output) => format!("{at}_BashOutput_{}_{}", output.command_id, self.id),
        }
    }

    /// As clients read it.
    pub(super) fn json(&self) -> Value {
        let mut event = match &self.content {
            Content::Command {
                command,
                cwd,
                timeout,
            } => json!({"command": command, "cwd": cwd, "timeout": timeout}),
            Content::Output(output) => json!({
                "command_id": output.command_id,
                "order": output.order,
                "exit_code": output.exit_code,
                "stdout": output.stdout,
                "stderr": output.stderr,
            }),
        };
        event["id"] = self.id.as_str().into();
        event["timestamp"] = time::iso(self.at).into();
        event["kind"] = self.kind().name().into();
        event
    }
}

/// The outputs of a command that has ended: one, unless a stream is longer
/// than a chunk; then the chunks come first and the last has the rest of both
/// streams and the exit code.
pub(super) fn outputs(
    command_id: &str,
    exit_code: i32,
    stdout: String,
    stderr: String,
) -> Vec<Output> {
    let (stdout_chunks, stdout_rest) = chunks(stdout);
    let (stderr_chunks, stderr_rest) = chunks(stderr);
    let partial = |stdout, stderr| (None, stdout, stderr);
    let mut parts: Vec<_> = stdout_chunks
        .into_iter()
        .map(|chunk| partial(Some(chunk), None))
        .collect();
    parts.extend(
        stderr_chunks
            .into_iter()
            .map(|chunk| partial(None, Some(chunk))),
    );
    parts.push((Some(exit_code), stdout_rest, stderr_rest));
    (0..)
        .zip(parts)
        .map(|(order, (exit_code, stdout, stderr))| Output {
            command_id: command_id.to_owned(),
            order,
            exit_code,
            stdout,
            stderr,
        })
        .collect()
}

/// Whole chunks, and the rest where there is one. Each has no more memory than
/// it needs.
fn chunks(text: String) -> (Vec<String>, Option<String>) {
    let mut chunks = Vec::new();
    let mut rest = text.as_str();
    // A text has at least as many bytes as characters.
    while rest.len() >= CHUNK_CHARS {
        let end = match rest.char_indices().nth(CHUNK_CHARS) {
            Some((end, _)) => end,
            None if rest.chars().count() == CHUNK_CHARS => rest.len(),
            None => break,
        };
        let (chunk, after) = rest.split_at(end);
        chunks.push(chunk.to_owned());
        rest = after;
    }
    let rest = match (chunks.is_empty(), rest.is_empty()) {
        (_, true) => None,
        (true, false) => Some(text),
        (false, false) => Some(rest.to_owned()),
    };
    (chunks, rest)
}

/// Joins the outputs of one command into one, as the last of them.
pub(super) fn merged(outputs: &[&Output]) -> Option<Output> {
    let last = (*outputs.last()?).clone();
    let join = |part: fn(&Output) -> Option<&str>| {
        let text: String = outputs.iter().copied().filter_map(part).collect();
        (!text.is_empty()).then_some(text)
    };
    Some(Output {
        stdout: join(|output| output.stdout.as_deref()),
        stderr: join(|output| output.stderr.as_deref()),
        ..last
    })
}

/// Which events are wanted, and in which order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) kind: Option<Kind>,
    pub(super) command_id: Option<String>,
    pub(super) from: Option<Micros>,
    pub(super) before: Option<Micros>,
    /// Only outputs of a higher order.
    pub(super) above_order: Option<i64>,
    pub(super) newest_first: bool,
    pub(super) page_id: Option<String>,
    pub(super) limit: usize,
}

impl Filter {
    fn wants(&self, event: &Event) -> bool {
        self.kind.is_none_or(|kind| kind == event.kind())
            && self
                .command_id
                .as_deref()
                .is_none_or(|id| event.command_id() == Some(id))
            && self.from.is_none_or(|from| event.at >= from)
            && self.before.is_none_or(|before| event.at < before)
            && self.above_order.is_none_or(|order| match &event.content {
                Content::Output(output) => output.order > order,
                Content::Command { .. } => false,
            })
    }
}

/// The events that a guest remembers.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// Ascending in time, strictly.
    all: VecDeque<Event>,
    bytes: usize,
}

impl Events {
    /// Adds an event and ages out old ones. `running` tells which commands
    /// must stay known.
    pub(super) fn add(&mut self, mut event: Event, running: impl Fn(&str) -> bool) {
        if let Some(last) = self.all.back() {
            event.at = event.at.max(last.at + 1);
        }
        self.bytes += event.bytes();
        self.all.push_back(event);
        if self.all.len() > MAX_EVENTS || self.bytes > MAX_BYTES {
            self.age_out(&running);
        }
    }

    /// Adds the outputs of a command.
    pub(super) fn add_outputs(&mut self, outputs: Vec<Output>, running: impl Fn(&str) -> bool) {
        for output in outputs {
            self.add(Event::output(time::now(), output), &running);
        }
    }

    /// Forgets the oldest commands that have ended, with their outputs, until
    /// a quarter of the bounds is free. The newest event stays.
    fn age_out(&mut self, running: &impl Fn(&str) -> bool) {
        let newest = self.all.back().map(Event::owner).map(str::to_owned);
        let (mut count, mut bytes) = (self.all.len(), self.bytes);
        let mut forgotten = HashSet::new();
        for event in &self.all {
            if count <= MAX_EVENTS / 4 * 3 && bytes <= MAX_BYTES / 4 * 3 {
                break;
            }
            let owner = event.owner();
            if forgotten.contains(owner) || (!running(owner) && newest.as_deref() != Some(owner)) {
                forgotten.insert(owner.to_owned());
                count -= 1;
                bytes -= event.bytes();
            }
        }
        self.all.retain(|event| !forgotten.contains(event.owner()));
        self.bytes = self.all.iter().map(Event::bytes).sum();
    }

    /// Forgets everything; answers how many events that were.
    pub(super) fn clear(&mut self) -> usize {
        self.bytes = 0;
        std::mem::take(&mut self.all).len()
    }

    /// An event by its id.
    pub(super) fn get(&self, id: &str) -> Option<&Event> {
        self.all.iter().find(|event| event.id == id)
    }

    /// Whether a command of this id is remembered.
    pub(super) fn knows_command(&self, id: &str) -> bool {
        self.get(id)
            .is_some_and(|event| event.kind() == Kind::Command)
    }

    /// The outputs of a command, in order.
    pub(super) fn outputs_of(&self, command_id: &str) -> Vec<&Event> {
        self.all
            .iter()
            .filter(|event| event.command_id() == Some(command_id))
            .collect()
    }

    /// A page of events and the id of the next page.
    pub(super) fn search(&self, filter: &Filter) -> (Vec<&Event>, Option<String>) {
        let wanted = self.all.iter().filter(|event| filter.wants(event));
        let mut found: Vec<&Event> = if filter.newest_first {
            wanted.rev().collect()
        } else {
            wanted.collect()
        };
        if let Some(page) = &filter.page_id
            && let Some(start) = found.iter().position(|event| event.page_id() == *page)
        {
            found.drain(..start);
        }
        let next = found.get(filter.limit).map(|event| event.page_id());
        found.truncate(filter.limit);
        (found, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none_running(_: &str) -> bool {
        false
    }

    fn filter() -> Filter {
        Filter {
            limit: 100,
            ..Filter::default()
        }
    }

    fn run(events: &mut Events, command: &str, stdout: &str) -> String {
        let event = Event::command(command.to_owned(), None, 300);
        let id = event.id.clone();
        events.add(event, none_running);
        let outputs = outputs(&id, 0, stdout.to_owned(), String::new());
        events.add_outputs(outputs, none_running);
        id
    }

    #[test]
    fn short_output_is_one_event_and_long_output_several() {
        let one = outputs("c", 3, "out".to_owned(), String::new());
        assert_eq!(one.len(), 1);
        assert_eq!(
            (one[0].exit_code, one[0].stderr.as_deref()),
            (Some(3), None)
        );
        let long = "é".repeat(2 * CHUNK_CHARS + 5);
        let several = outputs("c", 0, long.clone(), "err".to_owned());
        let shape: Vec<_> = several
            .iter()
            .map(|o| {
                (
                    o.order,
                    o.exit_code,
                    o.stdout.as_ref().map_or(0, |s| s.chars().count()),
                )
            })
            .collect();
        assert_eq!(
            shape,
            [
                (0, None, CHUNK_CHARS),
                (1, None, CHUNK_CHARS),
                (2, Some(0), 5)
            ]
        );
        assert_eq!(several[2].stderr.as_deref(), Some("err"));
        assert_eq!(
            merged(&several.iter().collect::<Vec<_>>()).and_then(|m| m.stdout),
            Some(long)
        );
        let exact = outputs("c", 0, "x".repeat(CHUNK_CHARS), String::new());
        assert_eq!((exact.len(), exact[1].stdout.as_deref()), (2, None));
    }

    #[test]
    fn events_are_found_by_kind_command_order_and_time() {
        let mut events = Events::default();
        let a = run(&mut events, "a", "1");
        let b = run(&mut events, "b", &"x".repeat(CHUNK_CHARS + 1));
        let count = |filter: &Filter| events.search(filter).0.len();
        assert_eq!(count(&filter()), 5);
        assert_eq!(
            count(&Filter {
                kind: Some(Kind::Command),
                ..filter()
            }),
            2
        );
        assert_eq!(
            count(&Filter {
                command_id: Some(a.clone()),
                ..filter()
            }),
            1
        );
        let of_b = Filter {
            command_id: Some(b),
            ..filter()
        };
        assert_eq!(count(&of_b), 2);
        assert_eq!(
            count(&Filter {
                above_order: Some(0),
                ..of_b.clone()
            }),
            1
        );
        assert_eq!(
            count(&Filter {
                kind: Some(Kind::Command),
                ..of_b.clone()
            }),
            0
        );
        assert_eq!(
            count(&Filter {
                before: Some(0),
                ..filter()
            }),
            0
        );
        let newest = Filter {
            newest_first: true,
            limit: 1,
            ..of_b
        };
        let (found, more) = events.search(&newest);
        assert_eq!(found[0].json()["exit_code"], 0);
        assert!(more.is_some());
        assert!(events.knows_command(&a) && events.get("nope").is_none());
    }

    #[test]
    fn pages_follow_each_other_in_both_directions() {
        let mut events = Events::default();
        for n in 0..5 {
            run(&mut events, &n.to_string(), "x");
        }
        for newest_first in [false, true] {
            let mut seen = Vec::new();
            let mut page_id = None;
            loop {
                let page = Filter {
                    newest_first,
                    page_id,
                    limit: 3,
                    ..filter()
                };
                let (found, next) = events.search(&page);
                seen.extend(found.iter().map(|event| event.id.clone()));
                page_id = next;
                if page_id.is_none() {
                    break;
                }
            }
            let mut all: Vec<_> = events.all.iter().map(|event| event.id.clone()).collect();
            if newest_first {
                all.reverse();
            }
            assert_eq!(seen, all);
        }
    }

    #[test]
    fn the_oldest_ended_command_is_forgotten_first() {
        let mut events = Events::default();
        let big = "x".repeat(MAX_BYTES / 3);
        let first = run(&mut events, "1", &big);
        let second = run(&mut events, "2", &big);
        let running = first.clone();
        let event = Event::command("3".to_owned(), None, 1);
        let third = event.id.clone();
        events.add(event, |id| id == running);
        events.add_outputs(outputs(&third, 0, big, String::new()), |id| id == running);
        assert!(events.knows_command(&first), "it still runs");
        assert!(!events.knows_command(&second) && events.outputs_of(&second).is_empty());
        assert!(events.knows_command(&third));
        assert!(events.bytes <= MAX_BYTES);
        for n in 0..MAX_EVENTS {
            run(&mut events, &n.to_string(), "");
        }
        assert!(events.all.len() <= MAX_EVENTS);
        assert!(events.clear() > MAX_EVENTS / 2);
        assert_eq!((events.bytes, events.all.len()), (0, 0));
    }
}
