//! The configuration a container runtime is given (`config.json` of the OCI
//! runtime specification). Pure: what the engine decided goes in, JSON comes
//! out.

use crate::cgroup::Bounds;
use crate::seccomp;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What the runtime's user and the sandbox's are to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ids {
    /// The runtime is root, and ids inside are those of the host.
    Host,
    /// The runtime is root of a user namespace that knows one id, and so is
    /// the sandbox.
    OwnRoot,
    /// The same, but the sandbox knows that one id by other numbers.
    OwnUser,
}

/// A resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ResourceLimit {
    pub(super) name: &'static str,
    pub(super) soft: u64,
    pub(super) hard: u64,
}

/// A host path below the sandbox's `/dev`, which only the runtime can place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeviceBind {
    pub(super) source: PathBuf,
    pub(super) target: PathBuf,
    pub(super) read_only: bool,
}

/// Control groups, for a runtime that insists on making its own.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RuntimeGroups {
    /// Relative to the runtime's own groups.
    pub(super) path: String,
    pub(super) bounds: Bounds,
}

/// One container.
#[derive(Debug, Clone)]
pub(super) struct Container<'a> {
    pub(super) hostname: &'a str,
    /// Where its root is mounted, as the runtime sees it.
    pub(super) root: &'a Path,
    pub(super) read_only_root: bool,
    /// The guest and its arguments.
    pub(super) arguments: Vec<String>,
    /// `KEY=value`.
    pub(super) env: Vec<String>,
    pub(super) workdir: &'a str,
    pub(super) user: (u32, u32),
    pub(super) ids: Ids,
    pub(super) host_network: bool,
    pub(super) limits: Vec<ResourceLimit>,
    pub(super) devices: Vec<DeviceBind>,
    /// Bytes of `/dev/shm`, and of `/tmp` over a read-only root.
    pub(super) shm_bytes: u64,
    pub(super) groups: Option<RuntimeGroups>,
}

/// What a sandbox's root may do: the container engines' well-known default
/// without `CAP_MKNOD` (no device group contains it) and `CAP_AUDIT_WRITE`
/// (the audit log is the host's).
const CAPABILITIES: [&str; 12] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Hidden: the container engines' well-known list.
const MASKED: [&str; 17] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
    "/sys/kernel/debug",
    "/sys/kernel/tracing",
];

const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Group `tty` in every distribution.
const TTY_GROUP: u32 = 5;

/// CPU bandwidth is given out in periods of this many microseconds.
const CPU_PERIOD_US: u64 = 100_000;

impl Container<'_> {
    /// The configuration.
    pub(super) fn config(&self) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": self.user.0, "gid": self.user.1, "umask": 0o022},
                "args": self.arguments,
                "env": self.env,
                "cwd": self.workdir,
                "capabilities": self.capabilities(),
                "rlimits": self.limits.iter().map(|limit| json!({
                    "type": limit.name, "soft": limit.soft, "hard": limit.hard,
                })).collect::<Vec<_>>(),
                "noNewPrivileges": true,
            },
            "root": {"path": self.root, "readonly": self.read_only_root},
            "hostname": self.hostname,
            "mounts": self.mounts(),
            "linux": self.linux(),
        })
    }

    fn capabilities(&self) -> Value {
        let bounding: Vec<&str> = CAPABILITIES
            .into_iter()
            // Raw sockets would read the host's traffic.
            .filter(|name| !(self.host_network && *name == "CAP_NET_RAW"))
            .collect();
        let held = if self.user.0 == 0 { &bounding[..] } else { &[] };
        json!({"bounding": bounding, "effective": held, "permitted": held})
    }

    fn mounts(&self) -> Vec<Value> {
        let mut terminals = vec![
            "nosuid".to_owned(),
            "noexec".into(),
            "newinstance".into(),
            "ptmxmode=0666".into(),
            "mode=0620".into(),
        ];
        if self.ids == Ids::Host {
            terminals.push(format!("gid={TTY_GROUP}"));
        }
        let memory = |path: &str, extra: &[&str]| {
            let mut options = vec!["nosuid".to_owned(), "nodev".into(), "mode=1777".into()];
            options.push(format!("size={}", self.shm_bytes));
            options.extend(extra.iter().map(|o| (*o).to_owned()));
            json!({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options})
        };
        let mut mounts = vec![
            json!({
                "destination": "/proc", "type": "proc", "source": "proc",
                "options": ["nosuid", "noexec", "nodev"],
            }),
            json!({
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "noexec", "strictatime", "mode=755", "size=1m"],
            }),
            json!({
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": terminals,
            }),
            memory("/dev/shm", &["noexec"]),
            json!({
                "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"],
            }),
        ];
        if self.shows_sys() {
            mounts.push(json!({
                "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            }));
        }
        if self.read_only_root {
            mounts.push(memory("/tmp", &[]));
        }
        mounts.extend(self.devices.iter().map(|bind| {
            let access = if bind.read_only { "ro" } else { "rw" };
            json!({
                "destination": bind.target, "type": "bind", "source": bind.source,
                "options": ["rbind", access, "nosuid", "noexec"],
            })
        }));
        mounts
    }

    /// The kernel shows sysfs only to the owner of the network namespace: not
    /// to a user namespace that shares the host's network.
    fn shows_sys(&self) -> bool {
        self.ids == Ids::Host || !self.host_network
    }

    fn linux(&self) -> Value {
        let mut kinds = vec!["pid", "ipc", "uts", "mount", "cgroup"];
        if !self.host_network {
            kinds.push("network");
        }
        if self.ids == Ids::OwnUser {
            kinds.push("user");
        }
        let namespaces: Vec<Value> = kinds.iter().map(|kind| json!({"type": kind})).collect();
        let shown = |path: &&str| self.shows_sys() || !path.starts_with("/sys");
        let mut linux = json!({
            "namespaces": namespaces,
            "seccomp": seccomp::profile(),
            "maskedPaths": MASKED.iter().filter(|p| shown(p)).collect::<Vec<_>>(),
            "readonlyPaths": READ_ONLY,
        });
        if self.ids == Ids::OwnUser {
            let one = |inside: u32| json!([{"containerID": inside, "hostID": 0, "size": 1}]);
            linux["uidMappings"] = one(self.user.0);
            linux["gidMappings"] = one(self.user.1);
        }
        if let Some(groups) = &self.groups {
            linux["cgroupsPath"] = json!(groups.path);
            linux["resources"] = resources(&groups.bounds);
        }
        linux
    }
}

fn resources(bounds: &Bounds) -> Value {
    let mut resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
    if let Some(bytes) = bounds.memory_bytes {
        resources["memory"] = json!({"limit": bytes, "swap": bytes});
    }
    if let Some(pids) = bounds.pids {
        resources["pids"] = json!({"limit": pids});
    }
    if let Some(cpus) = bounds.cpus {
        // The kernel refuses quotas below 1 ms.
        let quota = ((cpus * CPU_PERIOD_US as f64) as u64).max(1_000);
        resources["cpu"] = json!({"quota": quota, "period": CPU_PERIOD_US});
    }
    resources
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> Container<'static> {
        Container {
            hostname: "box",
            root: Path::new("/state/box/root"),
            read_only_root: false,
            arguments: vec!["/proc/self/fd/4".into(), "--listen-fd".into(), "3".into()],
            env: vec!["PATH=/bin".into()],
            workdir: "/work",
            user: (0, 0),
            ids: Ids::Host,
            host_network: false,
            limits: vec![ResourceLimit {
                name: "RLIMIT_CORE",
                soft: 0,
                hard: 0,
            }],
            devices: Vec::new(),
            shm_bytes: 65_536,
            groups: None,
        }
    }

    /// Without the system call filter, which has a test of its own.
    fn config(container: &Container<'_>) -> Value {
        let mut config = container.config();
        assert!(config["linux"]["seccomp"].take().is_object());
        config
    }

    #[test]
    fn the_configuration_of_a_plain_container_is_the_recorded_one() {
        let recorded: Value = serde_json::from_str(include_str!("config.golden.json")).unwrap();
        let config = config(&container());
        let text = serde_json::to_string_pretty(&config).unwrap();
        assert!(config == recorded, "update config.golden.json:\n{text}");
    }

    #[test]
    fn a_sandbox_of_one_id_gets_no_group_it_does_not_know() {
        let config = config(&Container {
            ids: Ids::OwnUser,
            user: (1000, 100),
            ..container()
        });
        let linux = &config["linux"];
        assert_eq!(linux["uidMappings"][0]["containerID"], 1000);
        assert_eq!(linux["gidMappings"][0]["containerID"], 100);
        assert!(!config.to_string().contains("gid=5"), "{config}");
        assert_eq!(config["process"]["capabilities"]["effective"], json!([]));
    }

    #[test]
    fn the_hosts_network_brings_neither_raw_sockets_nor_a_sysfs_that_can_not_be_mounted() {
        let config = config(&Container {
            host_network: true,
            ids: Ids::OwnRoot,
            ..container()
        });
        let text = config.to_string();
        for absent in ["CAP_NET_RAW", "\"network\"", "\"/sys"] {
            assert!(!text.contains(absent), "{absent} in {text}");
        }
    }

    #[test]
    fn a_runtime_that_makes_groups_is_told_the_bounds() {
        let config = config(&Container {
            groups: Some(RuntimeGroups {
                path: "skyrl-x/box".into(),
                bounds: Bounds {
                    cpus: Some(1.5),
                    memory_bytes: Some(1 << 20),
                    pids: Some(7),
                },
            }),
            ..container()
        });
        let resources = &config["linux"]["resources"];
        assert_eq!(resources["cpu"]["quota"], 150_000);
        assert_eq!(resources["memory"]["swap"], 1 << 20);
        assert_eq!(resources["pids"]["limit"], 7);
        assert_eq!(resources["devices"][0]["allow"], false);
    }
}
