//! Commands that outlive the request that started them, by name.

use super::command::Command;
use crate::sync::lock;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Most commands remembered, running or finished.
const MAX_ENTRIES: usize = 4096;

/// How long a finished command is remembered.
const MAX_AGE: Duration = Duration::from_secs(3600);

/// Bytes of output kept of all finished commands together.
const MAX_BYTES: u64 = 128 << 20;

/// The bound on remembered commands is reached, all of them running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableFull;

impl fmt::Display for TableFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MAX_ENTRIES} commands are running already")
    }
}

impl std::error::Error for TableFull {}

/// Entries freed at once when the table is full, and the time between looks at
/// it when it is not: looking costs something for each entry.
const FREED: usize = MAX_ENTRIES / 8;
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Remembered commands.
#[derive(Default)]
pub struct Commands {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    entries: HashMap<String, Arc<Command>>,
    last_look: Option<Instant>,
}

/// What decides whether a finished command is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Finished {
    age: Duration,
    bytes: u64,
}

/// Indices of the finished commands to forget, so that none is too old, the
/// rest is within the byte budget, and `room` entries become free.
fn to_forget(finished: &[Finished], room: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..finished.len()).collect();
    order.sort_by_key(|index| finished[*index].age);
    let mut bytes = 0u64;
    let keep = order.len().saturating_sub(room);
    order
        .into_iter()
        .enumerate()
        .filter(|(rank, index)| {
            let entry = finished[*index];
            bytes = bytes.saturating_add(entry.bytes);
            *rank >= keep || entry.age > MAX_AGE || bytes > MAX_BYTES
        })
        .map(|(_, index)| index)
        .collect()
}

impl Commands {
    /// Remembers a command under a new name: 32 hexadecimal digits.
    pub fn insert(&self, command: Arc<Command>) -> Result<String, TableFull> {
        let id = crate::random_id();
        let mut table = lock(&self.table);
        table.sweep();
        if table.entries.len() >= MAX_ENTRIES {
            return Err(TableFull);
        }
        table.entries.insert(id.clone(), command);
        Ok(id)
    }

    /// Looks a command up.
    pub fn get(&self, id: &str) -> Option<Arc<Command>> {
        lock(&self.table).entries.get(id).cloned()
    }

    /// Forgets a command.
    pub fn remove(&self, id: &str) -> Option<Arc<Command>> {
        lock(&self.table).entries.remove(id)
    }

    /// All remembered commands, oldest first.
    pub fn list(&self) -> Vec<(String, Arc<Command>)> {
        let mut table = lock(&self.table);
        table.sweep();
        let mut all: Vec<_> = table
            .entries
            .iter()
            .map(|(id, command)| (id.clone(), Arc::clone(command)))
            .collect();
        drop(table);
        all.sort_by_key(|(_, command)| command.started());
        all
    }

    /// Forgets what is too old or too much; the owner's regular questions
    /// about health call it, so that an idle guest forgets, too.
    pub fn sweep(&self) {
        lock(&self.table).sweep();
    }
}

impl Table {
    fn sweep(&mut self) {
        let now = Instant::now();
        let is_full = self.entries.len() >= MAX_ENTRIES;
        if !is_full && self.last_look.is_some_and(|last| now - last < LOOK_EVERY) {
            return;
        }
        self.last_look = Some(now);
        let (ids, finished): (Vec<String>, Vec<Finished>) = self
            .entries
            .iter()
            .filter_map(|(id, command)| {
                let age = now.saturating_duration_since(command.finished_at()?);
                let bytes = command.kept_bytes();
                Some((id.clone(), Finished { age, bytes }))
            })
            .unzip();
        let room = if is_full { FREED } else { 0 };
        for index in to_forget(&finished, room) {
            self.entries.remove(&ids[index]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(seconds: u64, bytes: u64) -> Finished {
        Finished {
            age: Duration::from_secs(seconds),
            bytes,
        }
    }

    #[test]
    fn the_old_and_the_large_are_forgotten_oldest_first() {
        let all = [finished(5, 1), finished(4000, 1), finished(1, 1)];
        assert_eq!(to_forget(&all, 0), [1]);
        assert_eq!(to_forget(&all, 2), [0, 1]);
        let large = [
            finished(3, MAX_BYTES / 2),
            finished(2, 1),
            finished(1, MAX_BYTES / 2),
        ];
        assert_eq!(to_forget(&large, 0), [0]);
        assert_eq!(to_forget(&[], 3), [] as [usize; 0]);
    }
}
