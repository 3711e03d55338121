//! From what a caller asks for to what the zygote does. Pure, but for looking
//! at the host's own limits.

use super::limits::Enforcement;
use super::network;
use super::record::{Record, socket};
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::image::Image;
use crate::rootfs::{RootMethod, Rootfs};
use crate::spec::SandboxSpec;
use crate::state::OwnerDir;
use skyrl_protocol::SandboxId;
use skyrl_protocol::guest::UserGroup;
use skyrl_protocol::zygote::{
    BindPlan, CgroupPlan, FilePlan, MAX_MESSAGE, RootPlan, StartPlan, UserNamespacePlan,
};
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// Search path of programs when the image names none.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Descriptors a process may open, unless the host allows less.
const OPEN_FILES: u64 = 1 << 20;

/// Memory for `/dev/shm` without a memory limit.
const SHARED_MEMORY: u64 = 1 << 30;

/// Room in a message for what is not part of the plan.
const ENVELOPE: usize = 1024;

/// Checks a request for what no sandbox could be made of.
pub(crate) fn check(spec: &SandboxSpec, id: &SandboxId) -> Result<(), EngineError> {
    let refuse = |what: String, hint: &str| {
        Err(EngineError::Invalid {
            what,
            hint: hint.to_owned(),
        })
    };
    let absolute = |path: &Path| {
        path.is_absolute()
            && !path
                .components()
                .any(|part| matches!(part, Component::ParentDir))
    };
    if let Some(workdir) = &spec.workdir
        && !absolute(Path::new(workdir))
    {
        return refuse(
            format!("working directory {workdir:?} is not an absolute path"),
            "give it as it is inside the sandbox, without `..`",
        );
    }
    for mount in &spec.mounts {
        if !absolute(&mount.target) || mount.target == Path::new("/") {
            return refuse(
                format!("{} can't be a mount's target", mount.target.display()),
                "give an absolute path below `/`, without `..`",
            );
        }
        if !mount.source.is_absolute() || !mount.source.exists() {
            return refuse(
                format!(
                    "{} can't be mounted: it does not exist",
                    mount.source.display()
                ),
                "give the absolute path of something on this machine",
            );
        }
    }
    let hostname = hostname(spec, id);
    if hostname.is_empty() || hostname.len() > 64 || hostname.contains(['/', '\0', '\n', ' ']) {
        return refuse(
            format!("{hostname:?} can't be a host name"),
            "use up to 64 letters, digits, `-` and `.`",
        );
    }
    if let Some(name) = spec
        .env
        .keys()
        .find(|name| name.is_empty() || name.contains('='))
    {
        return refuse(
            format!("{name:?} can't be an environment variable"),
            "give a name without `=`",
        );
    }
    Ok(())
}

pub(crate) fn hostname(spec: &SandboxSpec, id: &SandboxId) -> String {
    spec.hostname
        .clone()
        .unwrap_or_else(|| id.as_str().to_owned())
}

/// What the zygote is to start.
pub(crate) fn start(
    owner: &OwnerDir,
    id: &SandboxId,
    record: &Record,
    held: &Enforcement,
    user_namespace: bool,
) -> Result<StartPlan, EngineError> {
    let spec = &record.spec;
    let user = spec.user.unwrap_or(UserGroup { uid: 0, gid: 0 });
    let hostname = hostname(spec, id);
    let (network, mut files) = network::plan(EngineKind::Native, spec.network, user_namespace)?;
    files.push(file("/etc/hostname", format!("{hostname}\n")));
    files.push(file("/etc/hosts", hosts(&hostname)));
    let group = &record.group;
    let oom_counter = group.oom_counter();
    let workdir = workdir(spec, &record.image);
    let mut argv = vec!["skyrl-guest".to_owned()];
    argv.extend(["--listen-fd", "3", "--workdir", &workdir].map(str::to_owned));
    if oom_counter.is_some() {
        argv.extend(["--oom-fd", "4"].map(str::to_owned));
    }
    let plan = StartPlan {
        id: id.clone(),
        root: root(&record.rootfs),
        files,
        binds: binds(spec, &record.image),
        argv,
        env: environment(spec, &record.image, user, &hostname),
        socket: socket(owner, id),
        oom_counter,
        workdir,
        uid: user.uid,
        gid: user.gid,
        user_namespace: if user_namespace {
            UserNamespacePlan::OwnSingleId
        } else {
            UserNamespacePlan::Host
        },
        network,
        cgroups: CgroupPlan {
            v1: group
                .v1_directories()
                .into_iter()
                .map(Path::to_owned)
                .collect(),
            v2: group.v2_directory().map(Path::to_owned),
            v1_freezer: group.v1_freezer_state(),
        },
        rlimits: rlimits(held),
        read_only_root: spec.read_only_root,
        shm_bytes: spec
            .limits
            .memory_bytes
            .map_or(SHARED_MEMORY, |bytes| bytes / 2),
        hostname,
    };
    let size = serde_json::to_vec(&plan).map_or(usize::MAX, |text| text.len());
    if size > MAX_MESSAGE - ENVELOPE {
        return Err(EngineError::Invalid {
            what: format!(
                "environment and mounts of sandbox {id} take {size} bytes, more than {MAX_MESSAGE}"
            ),
            hint: "pass large values through files instead of the environment".into(),
        });
    }
    Ok(plan)
}

pub(crate) fn file(path: &str, text: String) -> FilePlan {
    FilePlan {
        path: path.into(),
        text,
    }
}

pub(crate) fn hosts(hostname: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    )
}

pub(crate) fn root(rootfs: &Rootfs) -> RootPlan {
    match rootfs.method {
        RootMethod::Overlay | RootMethod::OverlayInUserNamespace => RootPlan::Overlay {
            lowers: rootfs.lowers.clone(),
            upper: rootfs.upper(),
            work: rootfs.work(),
            merged: rootfs.root(),
            user_xattr: rootfs.method.user_xattr(),
        },
        RootMethod::FuseOverlay | RootMethod::Copy => RootPlan::Directory {
            path: rootfs.root(),
        },
    }
}

pub(crate) fn workdir(spec: &SandboxSpec, image: &Image) -> String {
    spec.workdir
        .as_ref()
        .or(image.config.workdir.as_ref())
        .filter(|dir| dir.starts_with('/'))
        .map_or("/", String::as_str)
        .to_owned()
}

pub(crate) fn binds(spec: &SandboxSpec, image: &Image) -> Vec<BindPlan> {
    let of_image = image.binds.iter().map(|bind| BindPlan {
        source: bind.source.clone(),
        target: bind.target.clone(),
        read_only: true,
    });
    let of_caller = spec.mounts.iter().map(|mount| BindPlan {
        source: mount.source.clone(),
        target: mount.target.clone(),
        read_only: mount.read_only,
    });
    of_image.chain(of_caller).collect()
}

pub(crate) fn environment(
    spec: &SandboxSpec,
    image: &Image,
    user: UserGroup,
    hostname: &str,
) -> Vec<String> {
    let home = if user.uid == 0 { "/root" } else { "/" };
    let mut all: BTreeMap<&str, &str> =
        BTreeMap::from([("PATH", PATH), ("HOME", home), ("HOSTNAME", hostname)]);
    for (name, value) in image.config.env.iter().chain(&spec.env) {
        all.insert(name, value);
    }
    all.into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect()
}

/// Resource limits, none above what this process may have itself.
pub(crate) fn rlimits(held: &Enforcement) -> Vec<(u32, u64, u64)> {
    let mut wanted = vec![(libc::RLIMIT_CORE, 0), (libc::RLIMIT_NOFILE, OPEN_FILES)];
    wanted.extend(&held.rlimits);
    wanted
        .into_iter()
        .map(|(resource, value)| {
            let value = value.min(own_hard_limit(resource));
            (resource, value, value)
        })
        .collect()
}

fn own_hard_limit(resource: u32) -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the structure lives through the call.
    unsafe { libc::getrlimit(resource as _, &raw mut limit) };
    limit.rlim_max
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{ImageConfig, ImageRef};
    use crate::spec::HostMount;

    fn spec() -> SandboxSpec {
        SandboxSpec::new(ImageRef::Host)
    }

    fn image() -> Image {
        Image {
            reference: ImageRef::Host,
            digest: "d".into(),
            layers: vec!["/layer".into()],
            binds: Vec::new(),
            config: ImageConfig {
                env: BTreeMap::from([
                    ("PATH".into(), "/image/bin".into()),
                    ("A".into(), "image".into()),
                ]),
                workdir: Some("/work".into()),
                ..ImageConfig::default()
            },
            lease: None,
        }
    }

    #[test]
    fn the_callers_environment_wins_over_the_images_and_that_over_defaults() {
        let mut spec = spec();
        spec.env.insert("A".into(), "caller".into());
        let root = UserGroup { uid: 0, gid: 0 };
        assert_eq!(
            environment(&spec, &image(), root, "box"),
            ["A=caller", "HOME=/root", "HOSTNAME=box", "PATH=/image/bin"]
        );
    }

    #[test]
    fn the_callers_working_directory_wins_over_the_images() {
        assert_eq!(workdir(&spec(), &image()), "/work");
        let spec = SandboxSpec {
            workdir: Some("/here".into()),
            ..spec()
        };
        assert_eq!(workdir(&spec, &image()), "/here");
    }

    #[test]
    fn paths_and_names_that_could_lead_astray_are_refused() {
        let id: SandboxId = "box".parse().unwrap();
        assert!(check(&spec(), &id).is_ok());
        let mount = |source: &str, target: &str| SandboxSpec {
            mounts: vec![HostMount {
                source: source.into(),
                target: target.into(),
                read_only: true,
            }],
            ..spec()
        };
        for bad in [
            SandboxSpec {
                workdir: Some("relative".into()),
                ..spec()
            },
            SandboxSpec {
                workdir: Some("/a/../b".into()),
                ..spec()
            },
            SandboxSpec {
                hostname: Some("a b".into()),
                ..spec()
            },
            SandboxSpec {
                env: BTreeMap::from([("A=B".into(), String::new())]),
                ..spec()
            },
            mount("/usr", "/"),
            mount("/usr", "x"),
            mount("/usr", "/../x"),
            mount("/no/such/thing", "/x"),
        ] {
            assert!(check(&bad, &id).is_err(), "{bad:?}");
        }
    }
}
