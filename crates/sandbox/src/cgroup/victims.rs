//! Who was killed for lack of memory, from the kernel's log. Only privileged
//! processes may read it; others know the count but not the name.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A process the kernel killed for lack of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Victim {
    /// Its command name (up to 15 bytes).
    pub name: String,
    /// Its number on the host.
    pub pid: i32,
}

/// Records of the log looked at, at most.
const MAX_RECORDS: usize = 100_000;

/// Victims within a memory group, oldest first. Empty when the log can't be
/// read.
pub fn victims(memory_directory: &Path) -> Vec<Victim> {
    let Ok(mut log) = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut record = [0u8; 8192];
    for _ in 0..MAX_RECORDS {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(n) => found.extend(victim(
                &String::from_utf8_lossy(&record[..n]),
                memory_directory,
            )),
            // Overwritten while reading: the next read goes on behind it.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
            Err(_) => break,
        }
    }
    found
}

/// Reads one `oom-kill:` record; the group is matched by the end of its path,
/// since the log gives it relative to the hierarchy.
fn victim(record: &str, memory_directory: &Path) -> Option<Victim> {
    let (_, fields) = record.lines().next()?.split_once("oom-kill:")?;
    let get = |name: &str| {
        fields
            .split(',')
            .find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
    };
    let group = get("oom_memcg")?.trim_start_matches('/');
    if group.is_empty() || !memory_directory.ends_with(group) {
        return None;
    }
    Some(Victim {
        name: get("task")?.to_owned(),
        pid: get("pid")?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "6,1234,5678,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/job/skyrl-k/a,task_memcg=/job/skyrl-k/a,task=python3,pid=4242,uid=0\n SUBSYSTEM=x";

    #[test]
    fn the_victim_of_the_group_is_named_and_no_other() {
        let own = Path::new("/sys/fs/cgroup/memory/job/skyrl-k/a");
        assert_eq!(
            victim(RECORD, own),
            Some(Victim {
                name: "python3".into(),
                pid: 4242
            })
        );
        let other = Path::new("/sys/fs/cgroup/memory/job/skyrl-k/ba");
        assert_eq!(victim(RECORD, other), None);
        assert_eq!(victim("6,1,2,-;Out of memory", own), None);
    }
}
