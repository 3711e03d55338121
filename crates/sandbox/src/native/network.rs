//! What a sandbox can reach: nothing, all that the host can, or the outside
//! through a translating program that the zygote runs beside it.

use crate::command::find_program;
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::spec::Network;
use skyrl_protocol::zygote::{FilePlan, NetworkPlan};
use std::path::PathBuf;

/// Name server that slirp4netns offers inside.
const SLIRP_NAME_SERVER: &str = "10.0.2.3";

/// Finds slirp4netns and sees whether it may be used.
pub(crate) fn slirp4netns() -> Result<PathBuf, String> {
    let program = find_program("slirp4netns").ok_or("slirp4netns is not installed")?;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|e| format!("slirp4netns needs /dev/net/tun: {e}"))?;
    Ok(program)
}

/// The network of a sandbox, with the files that make names resolve in it.
pub(crate) fn plan(
    engine: EngineKind,
    network: Network,
    user_namespace: bool,
) -> Result<(NetworkPlan, Vec<FilePlan>), EngineError> {
    match network {
        Network::None => Ok((NetworkPlan::Loopback, Vec::new())),
        Network::Host => {
            let files = std::fs::read_to_string("/etc/resolv.conf")
                .ok()
                .map(resolv_conf);
            Ok((NetworkPlan::Host, files.into_iter().collect()))
        }
        Network::Nat => {
            let program = slirp4netns().map_err(|reason| EngineError::Unusable {
                engine,
                reason: format!("network `nat`: {reason}"),
                hint: "install slirp4netns, or choose network `none` or `host`".into(),
            })?;
            let argv = slirp_arguments(&program.display().to_string(), user_namespace);
            let file = resolv_conf(format!("nameserver {SLIRP_NAME_SERVER}\n"));
            Ok((NetworkPlan::Helper { argv }, vec![file]))
        }
    }
}

fn resolv_conf(text: String) -> FilePlan {
    FilePlan {
        path: "/etc/resolv.conf".into(),
        text,
    }
}

fn slirp_arguments(program: &str, user_namespace: bool) -> Vec<String> {
    let mut argv = vec![
        program,
        "--configure",
        "--mtu=65520",
        // Services on the host's loopback are none of the sandbox's business.
        "--disable-host-loopback",
        "--ready-fd={ready}",
        "--netns-type=path",
    ];
    if user_namespace {
        argv.push("--userns-path=/proc/{pid}/ns/user");
    }
    argv.extend(["/proc/{pid}/ns/net", "tap0"]);
    argv.into_iter().map(str::to_owned).collect()
}
