//! Whether the kernel's out-of-memory killer struck in this sandbox.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// The kill count of the sandbox's memory cgroup, where it can be seen. An
/// engine that hides cgroups from the sandbox may hand the file in.
#[derive(Debug, Default)]
pub struct OomCounter {
    file: Option<File>,
}

impl OomCounter {
    /// Reads the given `memory.events` (cgroup v2) or `memory.oom_control`
    /// (v1).
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self {
            file: Some(File::from(fd)),
        }
    }

    /// Looks for the file of the guest's own cgroup.
    pub fn discover() -> Self {
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let file = candidates(&membership)
            .into_iter()
            .filter_map(|path| File::open(path).ok())
            .find(|file| read(file).is_some());
        Self { file }
    }

    /// Kills so far; absent when nothing can be seen.
    pub fn kills(&self) -> Option<u64> {
        self.file.as_ref().and_then(read)
    }
}

fn read(file: &File) -> Option<u64> {
    let mut buffer = [0; 512];
    let length = file.read_at(&mut buffer, 0).ok()?;
    parse(std::str::from_utf8(&buffer[..length]).ok()?)
}

fn parse(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
}

/// Files to try. The path of the membership is the host's when the sandbox has
/// no cgroup namespace; the mount may then show the sandbox's cgroup as root.
fn candidates(membership: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let path = path.trim_end_matches('/');
        if controllers.is_empty() {
            for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                paths.push(format!("{root}{path}/memory.events"));
                paths.push(format!("{root}/memory.events"));
            }
        } else if controllers.split(',').any(|name| name == "memory") {
            paths.push(format!("/sys/fs/cgroup/memory{path}/memory.oom_control"));
            paths.push("/sys/fs/cgroup/memory/memory.oom_control".to_owned());
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_generations_of_cgroups_are_understood() {
        assert_eq!(
            parse("low 0\noom 4\noom_kill 3\noom_group_kill 0\n"),
            Some(3)
        );
        assert_eq!(
            parse("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"),
            Some(7)
        );
        assert_eq!(parse("oom_kill_disable 0\n"), None);
        assert_eq!(
            candidates("4:cpu:/\n3:memory:/a/b\n0::/\n"),
            [
                "/sys/fs/cgroup/memory/a/b/memory.oom_control",
                "/sys/fs/cgroup/memory/memory.oom_control",
                "/sys/fs/cgroup/memory.events",
                "/sys/fs/cgroup/memory.events",
                "/sys/fs/cgroup/unified/memory.events",
                "/sys/fs/cgroup/unified/memory.events",
            ]
        );
    }
}
