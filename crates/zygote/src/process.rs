//! Naming processes so that a reused number is never mistaken for them.

use skyrl_protocol::zygote::Identity;
use std::fs;

/// Identity of a living process.
pub fn identity(pid: i32) -> Option<Identity> {
    Some(Identity {
        pid,
        start_time: start_time(pid)?,
        boot_id: boot_id()?,
    })
}

/// Whether that very process still lives (a zombie does not).
pub fn is_alive(identity: &Identity) -> bool {
    let Some((state, start)) = state_and_start(identity.pid) else {
        return false;
    };
    start == identity.start_time
        && !matches!(state, 'Z' | 'X')
        && boot_id().as_deref() == Some(&identity.boot_id)
}

/// Start time in clock ticks after boot.
pub fn start_time(pid: i32) -> Option<u64> {
    state_and_start(pid).map(|(_, start)| start)
}

fn state_and_start(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold anything, parentheses too.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let own = identity(std::process::id() as i32).unwrap();
        assert!(is_alive(&own));
        let earlier = Identity {
            start_time: own.start_time - 1,
            ..own.clone()
        };
        assert!(!is_alive(&earlier));
        let other_boot = Identity {
            boot_id: "x".into(),
            ..own
        };
        assert!(!is_alive(&other_boot));
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let identity = identity(child.id() as i32);
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while identity.as_ref().is_some_and(is_alive) {
            assert!(std::time::Instant::now() < until);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.wait().unwrap();
    }
}
