//! From what a caller asks for to what is asked of Podman. Pure.

use super::install::Version;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::image::{ImageConfig, ReadOnlyBind};
use crate::spec::{HostMount, Network, SandboxSpec};
use serde::Serialize;
use skyrl_protocol::guest::UserGroup;
use skyrl_protocol::{OwnerId, SandboxId};
use std::collections::BTreeMap;
use std::path::Path;

/// Where the guest's program is inside.
const GUEST: &str = "/.skyrl/guest";
/// Where the guest's socket is inside.
const CONTROL: &str = "/.skyrl/run";
/// Name of the socket in its directory.
pub(super) const SOCKET: &str = "guest.sock";
/// Seconds a guest lives if nobody ever speaks to it.
const FIRST_LEASE: u32 = 120;

/// Label with the owner's key.
pub(super) const OWNER_LABEL: &str = "skyrl.owner";
/// Prefix of the caller's own labels.
const LABEL_PREFIX: &str = "skyrl.label.";

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes of `/dev/shm`.
const SHM_BYTES: i64 = 64 << 20;

/// Body of `POST /containers/create`: those fields of Podman's
/// `SpecGenerator` that are not left at their defaults.
#[derive(Debug, Serialize)]
pub(super) struct Create {
    name: String,
    rootfs: String,
    command: Vec<String>,
    env: BTreeMap<String, String>,
    env_host: bool,
    httpproxy: bool,
    terminal: bool,
    stdin: bool,
    user: String,
    work_dir: &'static str,
    hostname: String,
    labels: BTreeMap<String, String>,
    netns: Namespace,
    cgroupns: Namespace,
    ipcns: Namespace,
    pidns: Namespace,
    utsns: Namespace,
    cgroups_mode: &'static str,
    r_limits: Vec<Rlimit>,
    read_only_filesystem: bool,
    no_new_privileges: bool,
    image_volume_mode: &'static str,
    systemd: &'static str,
    #[serde(rename = "sdnotifyMode")]
    sdnotify_mode: &'static str,
    restart_policy: &'static str,
    stop_timeout: u32,
    shm_size: i64,
    mounts: Vec<Mount>,
}

#[derive(Debug, Serialize)]
struct Namespace {
    nsmode: &'static str,
}

#[derive(Debug, Serialize)]
struct Rlimit {
    #[serde(rename = "type")]
    kind: &'static str,
    soft: u64,
    hard: u64,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
struct Mount {
    destination: String,
    #[serde(rename = "type")]
    kind: &'static str,
    source: String,
    options: Vec<&'static str>,
}

/// A program that gives sandboxes a network of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Translator {
    Slirp4netns,
    Pasta,
}

impl Translator {
    /// The one to use, by what is installed. Podman knows pasta since 4.4.
    pub(super) fn choose(podman: Version, slirp4netns: bool, pasta: bool) -> Option<Self> {
        if slirp4netns {
            Some(Self::Slirp4netns)
        } else if pasta && podman >= Version(4, 4, 0) {
            Some(Self::Pasta)
        } else {
            None
        }
    }

    fn mode(self) -> &'static str {
        match self {
            Self::Slirp4netns => "slirp4netns",
            Self::Pasta => "pasta",
        }
    }
}

/// Hard limits of this process, which no sandbox's can exceed.
#[derive(Debug, Clone, Copy)]
pub(super) struct HardLimits {
    pub(super) open_files: u64,
    pub(super) processes: u64,
}

impl HardLimits {
    /// Those of this process.
    pub(super) fn own() -> Self {
        use rustix::process::{Resource, getrlimit};
        let hard = |resource| getrlimit(resource).maximum.unwrap_or(1 << 20).min(1 << 20);
        // Podman lowers its own limit, which it then can't exceed, to this.
        let numbers = std::fs::read_to_string("/proc/sys/kernel/pid_max")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(32_768);
        Self {
            open_files: hard(Resource::Nofile),
            processes: hard(Resource::Nproc).min(numbers),
        }
    }
}

/// What a container is made of.
pub(super) struct Parts<'a> {
    pub(super) id: &'a SandboxId,
    pub(super) owner: &'a OwnerId,
    pub(super) key: &'a str,
    pub(super) spec: &'a SandboxSpec,
    pub(super) config: &'a ImageConfig,
    pub(super) binds: &'a [ReadOnlyBind],
    /// The mounted root.
    pub(super) root: &'a Path,
    /// The guest's program on the host.
    pub(super) guest: &'a Path,
    /// Directory of the guest's socket on the host.
    pub(super) control: &'a Path,
    pub(super) translator: Option<Translator>,
    pub(super) hard: HardLimits,
}

fn text(path: &Path) -> Result<String, EngineError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| EngineError::Invalid {
            what: format!("{} is not UTF-8, which Podman needs", path.display()),
            hint: "use another path".into(),
        })
}

fn bind(source: &Path, target: &Path, options: &[&'static str]) -> Result<Mount, EngineError> {
    Ok(Mount {
        destination: text(target)?,
        kind: "bind",
        source: text(source)?,
        options: options.to_vec(),
    })
}

fn host_mount(mount: &HostMount) -> Result<Mount, EngineError> {
    let refuse = |what: String| {
        Err(EngineError::Invalid {
            what,
            hint: "mounts are `absolute source:absolute target[:ro]`".into(),
        })
    };
    if !mount.source.is_absolute() || !mount.target.is_absolute() {
        return refuse(format!(
            "mount {} on {} is not absolute",
            mount.source.display(),
            mount.target.display()
        ));
    }
    if mount.target.starts_with("/.skyrl") || mount.target == Path::new("/") {
        return refuse(format!(
            "nothing can be mounted on {}",
            mount.target.display()
        ));
    }
    let access = if mount.read_only { "ro" } else { "rw" };
    bind(
        &mount.source,
        &mount.target,
        &["rbind", "rprivate", "nosuid", "nodev", access],
    )
}

/// The request that makes a sandbox's container.
///
/// # Errors
/// [`EngineError::Invalid`] for what can't be met.
pub(super) fn create(parts: &Parts<'_>) -> Result<Create, EngineError> {
    let spec = parts.spec;
    let nsmode = match (spec.network, parts.translator) {
        (Network::None, _) => "none",
        (Network::Host, _) => "host",
        (Network::Nat, Some(translator)) => translator.mode(),
        (Network::Nat, None) => {
            return Err(EngineError::Unusable {
                engine: EngineKind::Podman,
                reason: "network nat needs slirp4netns, or pasta and Podman 4.4".into(),
                hint: "install slirp4netns, or use --network none or host".into(),
            });
        }
    };
    let workdir = spec
        .workdir
        .as_ref()
        .or(parts.config.workdir.as_ref())
        .map_or("/", String::as_str);
    let mut env = parts.config.env.clone();
    env.extend(spec.env.clone());
    env.entry("PATH".into()).or_insert(DEFAULT_PATH.into());
    let UserGroup { uid, gid } = spec.user.unwrap_or(UserGroup { uid: 0, gid: 0 });
    let mut labels: BTreeMap<String, String> = spec
        .labels
        .iter()
        .map(|(name, value)| (format!("{LABEL_PREFIX}{name}"), value.clone()))
        .collect();
    labels.insert(OWNER_LABEL.into(), parts.key.into());
    labels.insert("skyrl.owner-name".into(), parts.owner.to_string());
    labels.insert("skyrl.sandbox".into(), parts.id.to_string());
    Ok(Create {
        name: parts.id.to_string(),
        rootfs: text(parts.root)?,
        command: vec![
            GUEST.into(),
            "--listen".into(),
            format!("{CONTROL}/{SOCKET}"),
            "--lease".into(),
            FIRST_LEASE.to_string(),
            "--workdir".into(),
            workdir.into(),
        ],
        env,
        env_host: false,
        httpproxy: false,
        terminal: false,
        stdin: false,
        user: format!("{uid}:{gid}"),
        work_dir: "/",
        hostname: spec
            .hostname
            .clone()
            .unwrap_or_else(|| parts.id.to_string()),
        labels,
        netns: Namespace { nsmode },
        cgroupns: Namespace { nsmode: "private" },
        ipcns: Namespace { nsmode: "private" },
        pidns: Namespace { nsmode: "private" },
        utsns: Namespace { nsmode: "private" },
        // They are ours; the monitor is started in them.
        cgroups_mode: "disabled",
        r_limits: vec![
            Rlimit {
                kind: "nofile",
                soft: parts.hard.open_files,
                hard: parts.hard.open_files,
            },
            Rlimit {
                kind: "nproc",
                soft: parts.hard.processes,
                hard: parts.hard.processes,
            },
        ],
        read_only_filesystem: spec.read_only_root,
        no_new_privileges: true,
        image_volume_mode: "ignore",
        systemd: "false",
        sdnotify_mode: "ignore",
        restart_policy: "no",
        stop_timeout: 0,
        shm_size: SHM_BYTES,
        mounts: mounts(parts)?,
    })
}

fn mounts(parts: &Parts<'_>) -> Result<Vec<Mount>, EngineError> {
    let mut mounts = Vec::new();
    for shown in parts.binds {
        mounts.push(bind(
            &shown.source,
            &shown.target,
            &["rbind", "rprivate", "nosuid", "nodev", "ro"],
        )?);
    }
    if parts.spec.network == Network::Host {
        // Podman is told to make a hosts file of its own otherwise.
        mounts.push(bind(
            Path::new("/etc/hosts"),
            Path::new("/etc/hosts"),
            &["bind", "rprivate", "ro"],
        )?);
    }
    if parts.spec.read_only_root {
        mounts.push(Mount {
            destination: "/tmp".into(),
            kind: "tmpfs",
            source: "tmpfs".into(),
            options: vec!["rw", "nosuid", "nodev", "mode=1777"],
        });
    }
    for mount in &parts.spec.mounts {
        mounts.push(host_mount(mount)?);
    }
    mounts.push(bind(
        parts.guest,
        Path::new(GUEST),
        &["bind", "rprivate", "nosuid", "nodev", "ro"],
    )?);
    mounts.push(bind(
        parts.control,
        Path::new(CONTROL),
        &["bind", "rprivate", "nosuid", "nodev", "noexec", "rw"],
    )?);
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageRef;

    fn made(spec: &SandboxSpec, translator: Option<Translator>) -> Result<Create, EngineError> {
        create(&Parts {
            id: &"box".parse().unwrap(),
            owner: &"me".parse().unwrap(),
            key: "0a",
            spec,
            config: &ImageConfig {
                env: [("A", "image"), ("B", "image")]
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .into(),
                workdir: Some("/src".into()),
                ..ImageConfig::default()
            },
            binds: &[],
            root: Path::new("/s/root"),
            guest: Path::new("/bin/guest"),
            control: Path::new("/s/ctl"),
            translator,
            hard: HardLimits {
                open_files: 20_000,
                processes: 5,
            },
        })
    }

    #[test]
    fn the_callers_environment_wins_over_the_images_and_both_over_ours() {
        let mut spec = SandboxSpec::new(ImageRef::Host);
        spec.env.insert("B".into(), "caller".into());
        let create = made(&spec, None).unwrap();
        assert_eq!(create.env["A"], "image");
        assert_eq!(create.env["B"], "caller");
        assert_eq!(create.env["PATH"], DEFAULT_PATH);
        assert_eq!(create.command.last().unwrap(), "/src");
    }

    #[test]
    fn limits_of_descriptors_and_processes_are_named_as_podman_4_3_wants_them() {
        let create = made(&SandboxSpec::new(ImageRef::Host), None).unwrap();
        let json = serde_json::to_value(&create).unwrap();
        assert_eq!(
            json["r_limits"],
            serde_json::json!([
                {"type": "nofile", "soft": 20_000, "hard": 20_000},
                {"type": "nproc", "soft": 5, "hard": 5},
            ])
        );
        assert_eq!(json["sdnotifyMode"], "ignore");
        assert!(json.get("portmappings").is_none());
    }

    #[test]
    fn a_network_that_cannot_be_made_is_refused_with_what_to_install() {
        let mut spec = SandboxSpec::new(ImageRef::Host);
        spec.network = Network::Nat;
        let error = made(&spec, None).unwrap_err();
        assert!(error.hint().unwrap().contains("slirp4netns"));
        assert!(made(&spec, Some(Translator::Pasta)).is_ok());
        assert_eq!(Translator::choose(Version(4, 3, 1), false, true), None);
        assert_eq!(
            Translator::choose(Version(4, 4, 0), false, true),
            Some(Translator::Pasta)
        );
    }

    #[test]
    fn a_mount_over_the_guest_or_the_root_is_refused() {
        for target in ["/", "/.skyrl/guest", "relative"] {
            let mut spec = SandboxSpec::new(ImageRef::Host);
            spec.mounts.push(HostMount {
                source: "/srv".into(),
                target: target.into(),
                read_only: true,
            });
            assert!(made(&spec, None).is_err(), "{target} was accepted");
        }
    }
}
