//! Which command owns which process, pipe and watcher.

use super::command::{Command, Exit};
use super::reactor::Watch;
use skyrl_protocol::guest::Usage;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// What the kernel said when a process was reaped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    pub(super) exit: Exit,
    pub(super) usage: Usage,
}

/// A process that is being started; holds its id as soon as it exists.
pub(super) type Slot = Arc<AtomicI32>;

#[derive(Default)]
pub(super) struct Tables {
    last_key: u64,
    /// Commands that run or whose pipes are still open.
    pub(super) commands: HashMap<u64, Arc<Command>>,
    pub(super) watches: HashMap<u64, Arc<Watch>>,
    /// Leaders that were not reaped yet.
    owners: HashMap<i32, Arc<Command>>,
    in_flight: Vec<Slot>,
    /// Reaped before whoever started them said that they are theirs.
    unclaimed: HashMap<i32, Ended>,
    /// Commands being ended whose members may outlive their leader.
    pub(super) ending: HashSet<u64>,
    /// Commands not finished.
    pub(super) live: usize,
    /// Nothing may be started any more.
    pub(super) closed: bool,
}

impl Tables {
    pub(super) fn next_key(&mut self) -> u64 {
        self.last_key += 1;
        self.last_key
    }

    /// Announces a process about to be started.
    pub(super) fn begin_spawn(&mut self) -> Slot {
        let slot = Slot::default();
        self.in_flight.push(Arc::clone(&slot));
        slot
    }

    /// The process was started: registers its command, and tells if it ended
    /// already.
    pub(super) fn complete_spawn(&mut self, slot: &Slot, command: &Arc<Command>) -> Option<Ended> {
        self.remove_slot(slot);
        self.commands.insert(command.key, Arc::clone(command));
        let ended = self.unclaimed.remove(&command.pid);
        if ended.is_none() {
            self.owners.insert(command.pid, Arc::clone(command));
        }
        ended
    }

    /// The process failed to become a command; whoever reaps it drops it.
    pub(super) fn abandon_spawn(&mut self, slot: &Slot) {
        self.remove_slot(slot);
        self.unclaimed.remove(&slot.load(Ordering::Acquire));
    }

    fn remove_slot(&mut self, slot: &Slot) {
        self.in_flight.retain(|other| !Arc::ptr_eq(slot, other));
    }

    pub(super) fn owner(&self, pid: i32) -> Option<&Arc<Command>> {
        self.owners.get(&pid)
    }

    pub(super) fn disown(&mut self, pid: i32) {
        self.owners.remove(&pid);
    }

    /// A process without a registered owner was reaped: kept if it is one
    /// being started, else it was an orphan.
    pub(super) fn reaped_stranger(&mut self, pid: i32, ended: Ended) {
        if self
            .in_flight
            .iter()
            .any(|slot| slot.load(Ordering::Acquire) == pid)
        {
            self.unclaimed.insert(pid, ended);
        }
    }
}
