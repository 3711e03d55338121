//! Arguments that describe a sandbox, shared by the verbs that start one.

use crate::exit::{Exit, Failure};
use skyrl_protocol::guest::UserGroup;
use skyrl_sandbox::{EngineKind, HostMount, ImageRef, Limits, Network, PullPolicy, SandboxSpec};
use std::time::Duration;

/// What the sandbox is made of and may use.
#[derive(clap::Args)]
pub(super) struct SpecArgs {
    /// native, oci, podman, or auto: the best that works here.
    #[arg(long, default_value = "auto", value_parser = engine, value_name = "ENGINE")]
    pub(super) engine: EngineChoice,
    /// Image: a registry reference, `host`, `oci-archive:FILE`,
    /// `docker-archive:FILE`, `dir:PATH`.
    #[arg(long, default_value = "host", value_parser = str::parse::<ImageRef>)]
    image: ImageRef,
    /// When to ask the registry: if-missing, always, never.
    #[arg(long, default_value = "if-missing", value_parser = pull)]
    pull: PullPolicy,
    /// CPU time per wall time, e.g. 1.5.
    #[arg(long, value_parser = cpus)]
    cpus: Option<f64>,
    /// Memory, e.g. 512M or 2G.
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    memory: Option<u64>,
    /// Processes and threads.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pids: Option<u32>,
    /// Bytes written over the image, e.g. 4G.
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    disk: Option<u64>,
    /// Destroy the sandbox at this age, in seconds.
    #[arg(long, value_name = "SECONDS")]
    lifetime: Option<u64>,
    /// none (own loopback), host, or nat (outgoing connections).
    #[arg(long, default_value = "none", value_parser = network)]
    network: Network,
    /// Environment variable, repeatable.
    #[arg(long = "env", short = 'e', value_parser = variable, value_name = "NAME=VALUE")]
    env: Vec<(String, String)>,
    /// Working directory inside.
    #[arg(long, short = 'w')]
    workdir: Option<String>,
    /// Numeric user, or user:group, inside.
    #[arg(long, short = 'u', value_parser = user, value_name = "UID[:GID]")]
    user: Option<UserGroup>,
    /// Host name inside.
    #[arg(long)]
    hostname: Option<String>,
    /// Mount the root read-only.
    #[arg(long)]
    read_only: bool,
    /// Host path to make visible inside, repeatable; read-only unless `:rw`.
    #[arg(long = "mount", value_parser = mount, value_name = "HOST:INSIDE[:rw]")]
    mounts: Vec<HostMount>,
}

/// Which engine a user asked for.
#[derive(Clone, Copy)]
pub(super) struct EngineChoice(pub(super) Option<EngineKind>);

impl SpecArgs {
    /// The sandbox they describe.
    pub(super) fn spec(&self) -> Result<SandboxSpec, Failure> {
        let mut spec = SandboxSpec::new(absolute(&self.image)?);
        spec.pull = self.pull;
        spec.env = self.env.iter().cloned().collect();
        spec.workdir = self.workdir.clone();
        spec.user = self.user;
        spec.hostname = self.hostname.clone();
        spec.network = self.network;
        spec.read_only_root = self.read_only;
        spec.mounts = self.mounts.clone();
        spec.limits = Limits {
            cpus: self.cpus,
            memory_bytes: self.memory,
            pids: self.pids,
            disk_bytes: self.disk,
            lifetime: self.lifetime.map(Duration::from_secs),
        };
        Ok(spec)
    }
}

/// The image with its path, if it has one, made absolute.
pub(crate) fn absolute(image: &ImageRef) -> Result<ImageRef, Failure> {
    let whole = |path: &std::path::Path| {
        std::path::absolute(path)
            .map_err(|e| Failure::new(Exit::Usage, format!("{}: {e}", path.display())))
    };
    Ok(match image {
        ImageRef::Directory(path) => ImageRef::Directory(whole(path)?),
        ImageRef::OciArchive { path, tag } => ImageRef::OciArchive {
            path: whole(path)?,
            tag: tag.clone(),
        },
        ImageRef::DockerArchive { path, tag } => ImageRef::DockerArchive {
            path: whole(path)?,
            tag: tag.clone(),
        },
        ImageRef::Host | ImageRef::Snapshot(_) | ImageRef::Registry(_) => image.clone(),
    })
}

fn engine(text: &str) -> Result<EngineChoice, String> {
    if text == "auto" {
        return Ok(EngineChoice(None));
    }
    text.parse().map(|kind| EngineChoice(Some(kind)))
}

fn cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if cpus.is_finite() && cpus >= 0.01 => Ok(cpus),
        _ => Err("a number of at least 0.01 is needed, e.g. 1.5".into()),
    }
}

/// Bytes with an optional binary suffix: K, M, G, T (also KiB, MB ...).
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        unit => return Err(format!("unknown unit {unit:?}: use K, M, G or T")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "a positive number with an optional K, M, G or T is needed".into())
}

/// A pull policy by name.
pub(crate) fn pull(text: &str) -> Result<PullPolicy, String> {
    match text {
        "if-missing" => Ok(PullPolicy::IfMissing),
        "always" => Ok(PullPolicy::Always),
        "never" => Ok(PullPolicy::Never),
        _ => Err("there are if-missing, always and never".into()),
    }
}

fn network(text: &str) -> Result<Network, String> {
    match text {
        "none" => Ok(Network::None),
        "host" => Ok(Network::Host),
        "nat" => Ok(Network::Nat),
        _ => Err("there are none, host and nat".into()),
    }
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("NAME=VALUE is needed".into()),
    }
}

fn user(text: &str) -> Result<UserGroup, String> {
    let number = |part: &str| {
        part.parse::<u32>()
            .map_err(|_| format!("{part:?} is not a numeric id"))
    };
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    Ok(UserGroup {
        uid: number(uid)?,
        gid: number(gid)?,
    })
}

fn mount(text: &str) -> Result<HostMount, String> {
    let (paths, read_only) = match text.strip_suffix(":rw") {
        Some(paths) => (paths, false),
        None => (text.strip_suffix(":ro").unwrap_or(text), true),
    };
    let (source, target) = paths.split_once(':').ok_or("HOST:INSIDE[:rw] is needed")?;
    if !source.starts_with('/') || !target.starts_with('/') {
        return Err("both paths must be absolute".into());
    }
    Ok(HostMount {
        source: source.into(),
        target: target.into(),
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(bytes("512"), Ok(512));
        assert_eq!(bytes("2G"), Ok(2 << 30));
        assert_eq!(bytes("512MiB"), Ok(512 << 20));
        for bad in ["", "G", "-1", "0", "1.5G", "9999999999999T", "1X"] {
            assert!(bytes(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_mount_is_read_only_unless_it_says_otherwise() {
        assert!(mount("/a:/b").unwrap().read_only);
        assert!(!mount("/a:/b:rw").unwrap().read_only);
        assert!(mount("a:/b").is_err());
    }
}
