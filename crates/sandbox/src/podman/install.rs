//! The programs an engine needs and how this user may run them, found once.
//! Deciding from what was found is pure; see [`super::probe()`] for the report.

use super::conf::Runtime;
use crate::command::find_program;
use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Oldest Podman whose REST service is known to work.
pub(super) const OLDEST: Version = Version(4, 0, 0);

/// A version of Podman.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32, pub(super) u32);

impl Version {
    /// Reads `podman version 4.3.1`, with or without a suffix.
    fn read(text: &str) -> Option<Self> {
        let word = text
            .split_whitespace()
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
        let mut parts = word.split(['.', '-', '+']);
        let mut next = || parts.next().and_then(|part| part.parse().ok());
        Some(Self(next()?, next().unwrap_or(0), next().unwrap_or(0)))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// As whom Podman runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Privilege {
    /// As the machine's root.
    Rootful,
    /// As a plain user, in a user namespace.
    Rootless,
}

/// What was found on the machine.
#[derive(Debug, Clone)]
pub(super) struct Installation {
    pub(super) podman: PathBuf,
    pub(super) version: Version,
    pub(super) monitor: PathBuf,
    pub(super) runtime: Runtime,
    pub(super) privilege: Privilege,
    pub(super) slirp4netns: Option<PathBuf>,
    pub(super) pasta: Option<PathBuf>,
}

/// Where programs are looked for: `PATH`, and the places that plain users'
/// `PATH` often lacks.
pub(super) fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    for more in ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"] {
        if !std::env::split_paths(&path).any(|dir| dir == Path::new(more)) {
            if !path.is_empty() {
                path.push(":");
            }
            path.push(more);
        }
    }
    path
}

/// The monitor, which some distributions keep out of `PATH`.
pub(super) fn find_monitor() -> Option<PathBuf> {
    find_program("conmon").or_else(|| {
        [
            "/usr/libexec/podman/conmon",
            "/usr/local/libexec/podman/conmon",
            "/usr/lib/podman/conmon",
            "/usr/libexec/crio/conmon",
            "/usr/lib/crio/bin/conmon",
        ]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
    })
}

/// Controllers that a hybrid machine's v2 hierarchy has: with any of them
/// there, crun refuses to run at all.
pub(super) fn hybrid_controllers() -> Option<String> {
    let text = std::fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// A runtime by name, or the best there is.
pub(super) fn find_runtime(wanted: Option<&str>) -> Option<Runtime> {
    let find = |name: &'static str| {
        wanted
            .is_none_or(|wanted| wanted == name)
            .then(|| find_program(name))
            .flatten()
            .map(|path| Runtime { name, path })
    };
    better_runtime(find("crun"), find("runc"), hybrid_controllers().is_some())
}

/// crun is faster and smaller, where it runs.
fn better_runtime(crun: Option<Runtime>, runc: Option<Runtime>, hybrid: bool) -> Option<Runtime> {
    if hybrid { runc.or(crun) } else { crun.or(runc) }
}

/// Asks a Podman for its version; absent when it does not run.
pub(super) fn version_of(podman: &Path) -> Option<Version> {
    // Even for this it wants a home and, as a plain user, makes directories
    // for its run state, in `/tmp` if it is told of no better place.
    let scratch = Scratch::new()?;
    let output = Command::new(podman)
        .arg("--version")
        .env_clear()
        .env("PATH", search_path())
        .env("HOME", &scratch.0)
        .env("XDG_RUNTIME_DIR", &scratch.0)
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    Version::read(&String::from_utf8_lossy(&output.stdout))
}

/// A directory for the moment.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Option<Self> {
        let name = format!("skyrl-podman-{:016x}", getrandom::u64().ok()?);
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path).ok()?;
        Some(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::debug!(%error, "a temporary directory was not removed");
        }
    }
}

/// As whom Podman would run.
pub(super) fn privilege() -> Privilege {
    if rustix::process::geteuid().is_root() {
        Privilege::Rootful
    } else {
        Privilege::Rootless
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared_by_number() {
        assert_eq!(
            Version::read("podman version 4.3.1"),
            Some(Version(4, 3, 1))
        );
        assert_eq!(
            Version::read("podman version 5.0.0-rc2\n"),
            Some(Version(5, 0, 0))
        );
        assert_eq!(
            Version::read("podman version 4.10"),
            Some(Version(4, 10, 0))
        );
        assert_eq!(Version::read("command not found"), None);
        assert!(Version(4, 10, 0) > Version(4, 9, 9));
    }

    #[test]
    fn runc_is_taken_where_crun_would_refuse() {
        let runtime = |name: &'static str| {
            Some(Runtime {
                name,
                path: name.into(),
            })
        };
        let best = |hybrid| better_runtime(runtime("crun"), runtime("runc"), hybrid);
        assert_eq!(best(false), runtime("crun"));
        assert_eq!(best(true), runtime("runc"));
        assert_eq!(better_runtime(runtime("crun"), None, true), runtime("crun"));
        assert_eq!(
            better_runtime(None, runtime("runc"), false),
            runtime("runc")
        );
    }
}
