//! Deadlines that do not run while the sandbox is frozen.
//!
//! The monotonic clock goes on while a cgroup is frozen, and nothing tells the
//! frozen. So time is looked at every [`TICK_MS`] while any deadline is set; a
//! look that comes much later than that means that nobody here could run, and
//! the gap is not counted.

use std::collections::{BTreeSet, HashMap};

/// Longest time between two looks while a deadline is set, in milliseconds.
pub(super) const TICK_MS: u64 = 500;

/// A look may be this late on a busy machine before it counts as frozen.
const SLACK_MS: u64 = 1500;

/// Deadlines by key, one each. Callers pass the time of the monotonic clock in
/// milliseconds.
#[derive(Debug, Default)]
pub(super) struct Timers {
    by_time: BTreeSet<(u64, u64)>,
    by_key: HashMap<u64, u64>,
    frozen: u64,
    last_look: u64,
}

impl Timers {
    /// Time as deadlines count it.
    fn look(&mut self, monotonic: u64) -> u64 {
        if !self.by_time.is_empty() {
            let gap = monotonic.saturating_sub(self.last_look);
            if gap > TICK_MS + SLACK_MS {
                self.frozen += gap - TICK_MS;
            }
        }
        self.last_look = monotonic;
        monotonic - self.frozen
    }

    /// Sets the deadline of a key to `delay` from now.
    pub(super) fn set(&mut self, monotonic: u64, key: u64, delay: u64) {
        let due = self.look(monotonic).saturating_add(delay);
        self.remove(key);
        self.by_time.insert((due, key));
        self.by_key.insert(key, due);
    }

    /// Forgets the deadline of a key.
    pub(super) fn remove(&mut self, key: u64) {
        if let Some(due) = self.by_key.remove(&key) {
            self.by_time.remove(&(due, key));
        }
    }

    /// Takes the keys that are due.
    pub(super) fn take_due(&mut self, monotonic: u64) -> Vec<u64> {
        let now = self.look(monotonic);
        let mut due = Vec::new();
        while let Some(&(time, key)) = self.by_time.first() {
            if time > now {
                break;
            }
            self.remove(key);
            due.push(key);
        }
        due
    }

    /// Milliseconds until the next look is needed.
    pub(super) fn next_look(&self) -> Option<u64> {
        let (time, _) = self.by_time.first()?;
        let now = self.last_look - self.frozen;
        Some(time.saturating_sub(now).min(TICK_MS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen_time_is_not_counted() {
        let mut timers = Timers::default();
        timers.set(10_000, 7, 1_001);
        assert_eq!(timers.next_look(), Some(TICK_MS));
        assert!(timers.take_due(10_500).is_empty());
        // An hour in the freezer.
        assert!(timers.take_due(3_610_500).is_empty());
        assert_eq!(timers.next_look(), Some(1));
        assert_eq!(timers.take_due(3_610_501), [7]);
        assert_eq!(timers.next_look(), None);
    }

    #[test]
    fn a_busy_machine_is_not_a_frozen_one() {
        let mut timers = Timers::default();
        timers.set(0, 1, 1_000);
        assert_eq!(timers.take_due(1_400), [1]);
    }

    #[test]
    fn a_deadline_set_after_thawing_counts_from_then() {
        let mut timers = Timers::default();
        timers.set(0, 1, 1_000);
        timers.set(100_000, 2, 10);
        assert!(timers.take_due(100_009).is_empty());
        assert_eq!(timers.take_due(100_010), [2]);
        assert!(timers.take_due(100_499).is_empty());
        assert_eq!(timers.take_due(100_500), [1]);
    }

    #[test]
    fn time_without_deadlines_is_nobodys() {
        let mut timers = Timers::default();
        timers.set(0, 1, 10);
        assert_eq!(timers.take_due(10), [1]);
        timers.set(50_000, 2, 10);
        assert_eq!(timers.next_look(), Some(10));
        assert_eq!(timers.take_due(50_010), [2]);
    }
}
