//! Which processes belong to a command, and signals to all of them.
//!
//! A command is the leader of a session. Its members are the processes of that
//! session and process group and all their descendants, so that a child that
//! began a session of its own is found as long as its ancestors live.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A process as `/proc` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) parent: i32,
    group: i32,
    session: i32,
    /// State letter: `Z` and `X` are dead already.
    state: u8,
    /// Start time in clock ticks; with the id it names a process for good.
    start: u64,
}

impl Process {
    fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

/// Reads a line of `/proc/<pid>/stat`. The name in parentheses may itself hold
/// spaces and parentheses.
fn parse_stat(text: &str) -> Option<Process> {
    let (pid, rest) = text.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = *fields.next()?.as_bytes().first()?;
    let mut number = || fields.next()?.parse::<i32>().ok();
    let (parent, group, session) = (number()?, number()?, number()?);
    // Fields 7 to 21 lie between the session and the start time.
    let start = fields.nth(15)?.parse().ok()?;
    Some(Process {
        pid: pid.parse().ok()?,
        parent,
        group,
        session,
        state,
        start,
    })
}

fn read_stat(pid: i32) -> Option<Process> {
    // A process's own name may be any bytes.
    let bytes = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&String::from_utf8_lossy(&bytes))
}

/// All processes that can be seen; none when `/proc` is not that of this pid
/// namespace.
pub(super) fn snapshot() -> Vec<Process> {
    let own = std::process::id() as i32;
    if read_stat(own).is_none_or(|found| found.pid != own) {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(read_stat)
        .collect()
}

/// Whether a process of this id lives.
pub(super) fn is_alive(all: &[Process], pid: i32) -> bool {
    all.iter()
        .any(|process| process.pid == pid && !process.is_dead())
}

/// The living members of a command among `all`, the leader first if it lives:
/// it should know that it is told to end before its children fail it.
pub(super) fn members(all: &[Process], leader: i32) -> Vec<Process> {
    let mut members = select(all, |process| {
        process.pid == leader || process.session == leader || process.group == leader
    });
    members.sort_by_key(|process| process.pid != leader);
    members
}

/// The living descendants of a process, without it.
pub(super) fn descendants(all: &[Process], ancestor: i32) -> Vec<Process> {
    select(all, |process| process.parent == ancestor)
}

/// All living processes but one.
pub(super) fn others(all: &[Process], own: i32) -> Vec<Process> {
    all.iter()
        .filter(|process| process.pid != own && !process.is_dead())
        .copied()
        .collect()
}

fn select(all: &[Process], is_root: impl Fn(&Process) -> bool) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<usize>> = HashMap::new();
    for (index, process) in all.iter().enumerate() {
        children.entry(process.parent).or_default().push(index);
    }
    let mut taken = vec![false; all.len()];
    let mut queue: Vec<usize> = (0..all.len()).filter(|i| is_root(&all[*i])).collect();
    let mut found = Vec::new();
    while let Some(index) = queue.pop() {
        if std::mem::replace(&mut taken[index], true) {
            continue;
        }
        found.push(all[index]);
        if let Some(more) = children.get(&all[index].pid) {
            queue.extend(more);
        }
    }
    found.retain(|process| !process.is_dead());
    found
}

/// Sends a signal to exactly the process that was seen: its id may have gone
/// to another one since.
pub(super) fn signal_process(process: &Process, signal: i32) {
    let pinned = pin(process.pid);
    if read_stat(process.pid).is_none_or(|now| now.start != process.start) {
        return;
    }
    // SAFETY: plain system calls with integer arguments; the descriptor lives.
    unsafe {
        match &pinned {
            Some(fd) => {
                use std::os::fd::AsRawFd;
                libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, 0, 0);
            }
            // Before Linux 5.3: the window between look and kill remains.
            None => {
                libc::kill(process.pid, signal);
            }
        }
    }
}

fn pin(pid: i32) -> Option<OwnedFd> {
    // SAFETY: a plain system call; a non-negative result is a new descriptor
    // that nothing else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// Signals a process group, for when `/proc` tells nothing.
pub(super) fn signal_group(leader: i32, signal: i32) {
    // SAFETY: a plain system call. Errors mean that nobody is left.
    unsafe {
        libc::kill(-leader, signal);
    }
}

/// Kills everything `find` finds, and what it starts meanwhile: all are
/// stopped first, until a look finds nobody new, since the stopped start
/// nobody.
pub(super) fn kill_all(find: impl Fn() -> Vec<Process>) {
    const PASSES: usize = 16;
    let mut stopped: HashMap<i32, u64> = HashMap::new();
    for _ in 0..PASSES {
        let fresh: Vec<Process> = find()
            .into_iter()
            .filter(|process| stopped.get(&process.pid) != Some(&process.start))
            .collect();
        if fresh.is_empty() {
            break;
        }
        for process in fresh {
            signal_process(&process, libc::SIGSTOP);
            stopped.insert(process.pid, process.start);
        }
    }
    for process in find() {
        signal_process(&process, libc::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, group: i32, session: i32, state: u8) -> Process {
        Process {
            pid,
            parent,
            group,
            session,
            state,
            start: 1,
        }
    }

    #[test]
    fn names_with_spaces_and_parentheses_do_not_confuse() {
        let line = "7 (a) b (c) S 1 7 6 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9";
        let found = parse_stat(line).unwrap();
        assert_eq!(
            (found.pid, found.parent, found.group, found.session),
            (7, 1, 7, 6)
        );
        assert_eq!((found.state, found.start), (b'S', 4242));
        assert_eq!(parse_stat("7 (x"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_child_with_its_own_session_is_still_a_member() {
        let all = [
            process(1, 0, 1, 1, b'S'),
            process(10, 1, 10, 10, b'S'),
            process(11, 10, 11, 11, b'S'),
            process(12, 11, 11, 11, b'S'),
            process(13, 1, 10, 10, b'S'),
            process(14, 1, 14, 10, b'R'),
            process(15, 10, 10, 10, b'Z'),
            process(20, 1, 20, 20, b'S'),
        ];
        let mut pids: Vec<i32> = members(&all, 10).iter().map(|p| p.pid).collect();
        assert_eq!(pids[0], 10);
        pids.sort_unstable();
        assert_eq!(pids, [10, 11, 12, 13, 14]);
        assert_eq!(descendants(&all, 1).len(), 6);
    }
}
