//! `/bash`: commands that run in the background and the events they leave.
//!
//! A command's outputs become events when it has ended and somebody looks, or
//! the next command starts. A client that polls for the end is answered when
//! the end has come: its request is held.

use super::events::{self, Event, Events, Filter, Kind};
use super::validate::{Problems, object};
use super::{Answer, failure, not_found};
use crate::Guest;
use crate::http::{Query, Request, Response};
use crate::process::{Command, Keep, SpawnError, Spec};
use crate::sync::lock;
use serde_json::{Value, json};
use skyrl_protocol::guest::{ExecResult, Finish};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Seconds a command may run when the client does not say.
const DEFAULT_TIMEOUT: i64 = 300;
/// Longest time limit, in seconds: a year, so that sums can't overflow.
const MAX_TIMEOUT: i64 = 31_536_000;
/// Time between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes kept of each stream of a command: the first and the last half.
const KEEP: u64 = 16 << 20;
/// Longest time a poll is held: below what clients and proxies wait.
const MAX_HOLD: Duration = Duration::from_secs(25);
/// A poll is answered so long before the command's time limit, so that the
/// client still notices the time limit itself, as it does with the reference.
const HOLD_MARGIN: Duration = Duration::from_millis(20);
/// Time that ending a command may take beyond the grace.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// What the bash routes remember.
#[derive(Default)]
pub(super) struct Bash {
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Memory {
    events: Events,
    /// Commands whose outputs are no events yet.
    running: HashMap<String, Run>,
}

#[derive(Clone)]
struct Run {
    command: Arc<Command>,
    timeout: Duration,
}

impl Memory {
    /// Makes events of the outputs of commands that have ended.
    fn settle(&mut self) {
        let mut ended: Vec<_> = self
            .running
            .iter()
            .filter_map(|(id, run)| Some((run.command.finished_at()?, id.clone())))
            .collect();
        ended.sort();
        for (_, id) in ended {
            if let Some(run) = self.running.remove(&id)
                && let Some(result) = run.command.result()
            {
                let code = exit_code(&result, run.timeout);
                let outputs = events::outputs(&id, code, result.stdout.text, result.stderr.text);
                self.add_outputs(outputs);
            }
        }
    }

    fn add_outputs(&mut self, outputs: Vec<events::Output>) {
        let running = &self.running;
        self.events
            .add_outputs(outputs, |id| running.contains_key(id));
    }
}

/// A time limit gives -1, a signal its negative number. No time at all is a
/// time limit reached, however fast the command was.
fn exit_code(result: &ExecResult, timeout: Duration) -> i32 {
    let timed_out = result.timed_out || timeout.is_zero();
    match (timed_out, result.exit_code, result.signal) {
        (true, ..) => -1,
        (_, Some(code), _) => code,
        (_, None, Some(signal)) => -signal,
        (_, None, None) => -1,
    }
}

/// A request to run a command.
struct Launch {
    command: String,
    cwd: Option<String>,
    timeout: i64,
}

impl Launch {
    fn read(request: &mut Request<'_>) -> Result<Self, Response> {
        let body = object(request)?;
        let mut problems = Problems::default();
        let launch = Self {
            command: problems.text(&body, "command").unwrap_or_default(),
            cwd: problems.optional_text(&body, "cwd"),
            timeout: match body.contains_key("timeout") {
                true => problems.optional_integer(&body, "timeout").unwrap_or(0),
                false => DEFAULT_TIMEOUT,
            },
        };
        problems.check(launch)
    }

    fn spec(&self, guest: &Guest) -> Spec {
        let mut spec = Spec::shell(&self.command);
        spec.cwd.clone_from(&self.cwd);
        spec.keep = Keep::HeadTail(KEEP);
        spec.timeout = Some(self.time_limit());
        spec.grace = GRACE;
        spec.finish = Finish::PipesClose;
        if guest
            .processes
            .settings()
            .environment
            .get("AI_AGENT")
            .is_none()
        {
            spec.env
                .insert("AI_AGENT".to_owned(), "openhands".to_owned());
        }
        spec
    }

    fn time_limit(&self) -> Duration {
        Duration::from_secs(self.timeout.clamp(0, MAX_TIMEOUT) as u64)
    }
}

/// What the reference prints when Python can't start a command.
fn spawn_failure(error: &SpawnError) -> String {
    let what = match error {
        SpawnError::WorkingDirectory { path, source } => {
            let text = source.to_string();
            let reason = text.split(" (os error").next().unwrap_or(&text);
            match source.raw_os_error() {
                Some(number) => format!("[Errno {number}] {reason}: '{path}'"),
                None => format!("{reason}: '{path}'"),
            }
        }
        SpawnError::NoShell { looked_for } => format!(
            "[Errno 2] No such file or directory: '{}' (the image has no shell)",
            looked_for.first().copied().unwrap_or_default(),
        ),
        other => other.to_string(),
    };
    format!("Error executing command: {what}")
}

/// Starts a command; its id, its event, and the process unless it could not
/// be started, which is then its output.
fn launch(guest: &Guest, launch: Launch) -> (String, Value, Option<Arc<Command>>) {
    let bash = &guest.openhands.bash;
    let spec = launch.spec(guest);
    let timeout = launch.time_limit();
    let event = Event::command(launch.command, launch.cwd, launch.timeout);
    let id = event.id.clone();
    {
        let mut memory = lock(&bash.memory);
        memory.settle();
        let Memory { events, running } = &mut *memory;
        events.add(event, |id| running.contains_key(id));
    }
    let spawned = guest.processes.spawn(&spec);
    let mut memory = lock(&bash.memory);
    let command = match spawned {
        Ok(command) => {
            let run = Run {
                command: Arc::clone(&command),
                timeout,
            };
            memory.running.insert(id.clone(), run);
            Some(command)
        }
        Err(error) => {
            let text = spawn_failure(&error);
            let outputs = events::outputs(&id, -1, String::new(), text);
            memory.add_outputs(outputs);
            None
        }
    };
    let json = memory.events.get(&id).map_or(Value::Null, Event::json);
    (id, json, command)
}

/// `POST /bash/start_bash_command`.
pub(super) fn start(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let (_, event, _) = launch(guest, Launch::read(request)?);
    Ok(Response::json(200, &event))
}

/// `POST /bash/execute_bash_command`: waits and answers all output at once.
pub(super) fn execute(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let (id, _, command) = launch(guest, Launch::read(request)?);
    if let Some(command) = command {
        command.wait_for_client(request.client, None);
    }
    let mut memory = lock(&guest.openhands.bash.memory);
    memory.settle();
    let outputs = memory.events.outputs_of(&id);
    let contents: Vec<_> = outputs
        .iter()
        .filter_map(|event| event.as_output())
        .collect();
    let (Some(last), Some(merged)) = (outputs.last(), events::merged(&contents)) else {
        return Err(failure(
            500,
            "The command's output is gone: too much was printed by others meanwhile",
        ));
    };
    let mut event = last.json();
    event["stdout"] = json!(merged.stdout);
    event["stderr"] = json!(merged.stderr);
    Ok(Response::json(200, &event))
}

fn read_filter(query: &Query) -> Result<Filter, Response> {
    let mut problems = Problems::default();
    let kinds = [Kind::Command, Kind::Output];
    let kind = problems.word(query, "kind__eq", "literal_error", &kinds.map(Kind::name));
    let order = problems.word(
        query,
        "sort_order",
        "enum",
        &["TIMESTAMP", "TIMESTAMP_DESC"],
    );
    let filter = Filter {
        kind: kinds.into_iter().find(|k| kind == Some(k.name())),
        command_id: problems.query_uuid(query, "command_id__eq"),
        from: problems.instant(query, "timestamp__gte"),
        before: problems.instant(query, "timestamp__lt"),
        above_order: problems.integer(query, "order__gt", i64::MIN, i64::MAX),
        newest_first: order == Some("TIMESTAMP_DESC"),
        page_id: query.get("page_id").map(str::to_owned),
        limit: problems
            .integer(query, "limit", 1, 100)
            .and_then(|limit| usize::try_from(limit).ok())
            .unwrap_or(100),
    };
    problems.check(filter)
}

/// The command whose end a poll waits for. Clients poll in ascending order;
/// the descending form asks how things stand and is answered at once.
fn awaited<'f>(query: &Query, filter: &'f Filter) -> Option<&'f str> {
    let polls = query.get("sort_order") == Some("TIMESTAMP") && filter.kind != Some(Kind::Command);
    filter.command_id.as_deref().filter(|_| polls)
}

/// `GET /bash/bash_events/search`.
pub(super) fn search(guest: &Guest, request: &mut Request<'_>) -> Answer {
    let filter = read_filter(&request.query)?;
    let memory = &guest.openhands.bash.memory;
    if let Some(id) = awaited(&request.query, &filter) {
        let run = lock(memory).running.get(id).cloned();
        if let Some(run) = run {
            let deadline = hold_until(Instant::now(), run.command.started(), run.timeout);
            run.command.wait_for_client(request.client, Some(deadline));
        }
    }
    let mut memory = lock(memory);
    memory.settle();
    let (found, next) = memory.events.search(&filter);
    let items: Vec<Value> = found.into_iter().map(Event::json).collect();
    Ok(Response::json(
        200,
        &json!({"items": items, "next_page_id": next}),
    ))
}

fn hold_until(now: Instant, started: Instant, timeout: Duration) -> Instant {
    (started + timeout.saturating_sub(HOLD_MARGIN)).min(now + MAX_HOLD)
}

/// `GET /bash/bash_events/{id}`.
pub(super) fn event(guest: &Guest, id: &str) -> Answer {
    let mut memory = lock(&guest.openhands.bash.memory);
    memory.settle();
    let id = id.replace('-', "").to_ascii_lowercase();
    let event = memory.events.get(&id).ok_or_else(not_found)?;
    Ok(Response::json(200, &event.json()))
}

/// `DELETE /bash/bash_events`.
pub(super) fn clear(guest: &Guest) -> Answer {
    let mut memory = lock(&guest.openhands.bash.memory);
    memory.settle();
    let count = memory.events.clear();
    Ok(Response::json(200, &json!({"cleared_count": count})))
}

/// `POST /bash/bash_commands/{id}/stop`.
pub(super) fn stop(guest: &Guest, id: &str) -> Answer {
    let mut problems = Problems::default();
    let id = problems.uuid(&["path", "command_id"], id);
    let id = problems.check(id)?.unwrap_or_default();
    let running = {
        let mut memory = lock(&guest.openhands.bash.memory);
        memory.settle();
        let run = memory.running.get(&id).cloned();
        if run.is_none() && !memory.events.knows_command(&id) {
            return Err(not_found());
        }
        run
    };
    if let Some(run) = running {
        run.command.end(GRACE);
        run.command
            .wait(Some(Instant::now() + GRACE + END_PATIENCE));
    }
    Ok(Response::json(200, &json!({"success": true})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poll_is_held_until_just_before_the_time_limit_but_not_for_long() {
        let start = Instant::now();
        let held = |timeout: u64, after: u64| {
            let now = start + Duration::from_millis(after);
            hold_until(now, start, Duration::from_secs(timeout)).saturating_duration_since(now)
        };
        assert_eq!(held(1, 300), Duration::from_millis(680));
        assert_eq!(held(1, 990), Duration::ZERO);
        assert_eq!(held(0, 0), Duration::ZERO);
        assert_eq!(held(300, 0), MAX_HOLD);
    }

    #[test]
    fn only_the_polling_form_of_a_search_is_held() {
        let id = "e8ef8156169a4d71acb896d4a821d501";
        let awaits = |text: &str| {
            let query = Query::parse(text);
            let filter = read_filter(&query).unwrap_or_default();
            awaited(&query, &filter).map(str::to_owned)
        };
        let poll = format!("sort_order=TIMESTAMP&limit=100&command_id__eq={id}");
        assert_eq!(awaits(&poll).as_deref(), Some(id));
        assert_eq!(
            awaits(&format!("{poll}&kind__eq=BashOutput&order__gt=0")).as_deref(),
            Some(id)
        );
        assert_eq!(
            awaits(&format!("sort_order=TIMESTAMP_DESC&command_id__eq={id}")),
            None
        );
        assert_eq!(awaits(&format!("command_id__eq={id}")), None);
        assert_eq!(awaits(&format!("{poll}&kind__eq=BashCommand")), None);
        assert_eq!(awaits("sort_order=TIMESTAMP"), None);
    }
}
