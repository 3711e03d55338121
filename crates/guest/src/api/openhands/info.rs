//! `/server_info`: what this server is, how long it has been idle, what it
//! uses. One object serves OpenHands 1.x and V0, whose clients read different
//! parts of it.

use crate::Guest;
use crate::http::Response;
use rustix::fs::statvfs;
use serde_json::{Value, json};
use std::fs;

/// Version of the dialect spoken; clients compare it with their own.
const DIALECT: &str = "1.58.2";

/// `GET /server_info`.
pub(super) fn server_info(guest: &Guest) -> Response {
    let uptime = guest.uptime().as_secs_f64();
    Response::json(
        200,
        &json!({
            "uptime": uptime,
            "idle_time": guest.idle().as_secs_f64(),
            "title": "skyrl-guest",
            "version": DIALECT,
            "sdk_version": DIALECT,
            "tools_version": DIALECT,
            "workspace_version": DIALECT,
            "build_git_sha": "unknown",
            "build_git_ref": concat!("skyrl-guest-", env!("CARGO_PKG_VERSION")),
            "python_version": "",
            "usable_tools": [],
            "runtime_idle_timeout_seconds": null,
            "conversation_runtime": "none",
            "available_conversation_runtimes": [],
            "capabilities": [],
            "app_backend_ingress_url": null,
            "max_foreground_terminal_timeout_seconds": null,
            "docs": null,
            "redoc": null,
            "resources": resources(uptime),
        }),
    )
}

/// What the guest itself uses, and the disk of its root.
fn resources(uptime: f64) -> Value {
    let total = meminfo_total();
    let (vms, rss) = memory();
    let (read, written) = io_bytes();
    json!({
        "cpu_percent": share(cpu_seconds(), uptime),
        "memory": {"rss": rss, "vms": vms, "percent": share(rss as f64, total as f64)},
        "disk": disk(),
        "io": {"read_bytes": read, "write_bytes": written},
    })
}

/// Percent of a whole, one decimal.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 {
        (part / whole * 1_000.0).round() / 10.0
    } else {
        0.0
    }
}

fn disk() -> Value {
    let Ok(root) = statvfs("/") else {
        return json!({"total": 0, "used": 0, "free": 0, "percent": 0.0});
    };
    let total = root.f_blocks * root.f_frsize;
    let used = (root.f_blocks - root.f_bfree.min(root.f_blocks)) * root.f_frsize;
    let free = root.f_bavail * root.f_frsize;
    let percent = share(used as f64, (used + free) as f64);
    json!({"total": total, "used": used, "free": free, "percent": percent})
}

/// A file of `/proc`; empty where it is not mounted.
fn proc(name: &str) -> String {
    fs::read_to_string(format!("/proc/{name}")).unwrap_or_default()
}

/// Value of a `Name: value` line.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn meminfo_total() -> u64 {
    field(&proc("meminfo"), "MemTotal") * 1024
}

/// Virtual and resident size in bytes.
fn memory() -> (u64, u64) {
    let status = proc("self/status");
    (
        field(&status, "VmSize") * 1024,
        field(&status, "VmRSS") * 1024,
    )
}

fn io_bytes() -> (u64, u64) {
    let io = proc("self/io");
    (field(&io, "read_bytes"), field(&io, "write_bytes"))
}

/// CPU time used by the guest itself.
fn cpu_seconds() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_by_their_whole_name() {
        let text = "VmSizeX:\t9 kB\nVmSize:\t  12 kB\nVmRSS:\t7 kB\n";
        assert_eq!(field(text, "VmSize"), 12);
        assert_eq!(field(text, "VmRSS"), 7);
        assert_eq!(field(text, "None"), 0);
    }

    #[test]
    fn resources_have_the_fields_that_v0_reads() {
        let resources = resources(1.0);
        for pointer in [
            "/cpu_percent",
            "/memory/rss",
            "/memory/vms",
            "/memory/percent",
            "/disk/total",
            "/disk/used",
            "/disk/free",
            "/disk/percent",
            "/io/read_bytes",
            "/io/write_bytes",
        ] {
            assert!(
                resources.pointer(pointer).is_some_and(Value::is_number),
                "{pointer}"
            );
        }
    }
}
