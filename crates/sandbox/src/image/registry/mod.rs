//! Images from registries and from Podman's own storage, brought by skopeo or
//! Podman into an OCI layout on the disk.
//!
//! Fetching is repeated with growing pauses while the registry can't be
//! reached; what was fetched before stays. Layers the store already has are
//! not fetched: a file of holes of the right length stands for each of them,
//! and the copying programs take it for the layer's file.

mod child;
mod failure;

use super::error::ImageError;
use super::progress::PullUpdate;
use super::store::Work;
use child::{Ended, Program};
use failure::Failure;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Attempts while the registry can't be reached.
const ATTEMPTS: u32 = 4;
/// Pause before the second attempt; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// How long a fetch may go without a byte.
const STALL: Duration = Duration::from_secs(180);
/// Tag of the image in the layout.
const TAG: &str = "image";

/// What to fetch.
pub(super) struct Request<'a> {
    /// As the user gave it.
    pub(super) name: &'a str,
    /// Files of layers that need not be fetched: digest and length.
    pub(super) known: &'a [(String, u64)],
    /// Ask the registry even if Podman has the image.
    pub(super) skip_local: bool,
    /// An empty directory to work in.
    pub(super) scratch: &'a Path,
}

/// The full form of a reference: `busybox` means
/// `docker.io/library/busybox:latest`. A digest makes the tag meaningless.
pub(super) fn normalize(name: &str) -> String {
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (name, None),
    };
    let is_registry = |part: &str| part.contains(['.', ':']) || part == "localhost";
    let full = match rest.split_once('/') {
        Some((first, _)) if is_registry(first) => rest.to_owned(),
        Some(_) => format!("docker.io/{rest}"),
        None => format!("docker.io/library/{rest}"),
    };
    let last = full.rfind('/').map_or(0, |slash| slash + 1);
    let tag = full[last..].find(':').map(|colon| last + colon);
    match (digest, tag) {
        (Some(digest), Some(tag)) => format!("{}@{digest}", &full[..tag]),
        (Some(digest), None) => format!("{full}@{digest}"),
        (None, Some(_)) => full,
        (None, None) => format!("{full}:latest"),
    }
}

/// Fetches an image. Returns the OCI layout it is in, below the scratch
/// directory.
pub(super) fn fetch(request: &Request<'_>, work: &Work<'_>) -> Result<PathBuf, ImageError> {
    let name = normalize(request.name);
    let fetch = Fetch {
        name: &name,
        request,
        work,
        layout: request.scratch.join("layout"),
    };
    let (skopeo, podman) = (find("skopeo"), find("podman"));
    let only_local = name.starts_with("localhost/");
    if (!request.skip_local || only_local) && local_storage().is_some() {
        let program = skopeo.as_deref().or(podman.as_deref());
        if let Some(program) = program
            && let Some(layout) = fetch.copy_from_local_storage(program)?
        {
            return Ok(layout);
        }
    }
    if only_local {
        return Err(ImageError::NotFound {
            image: request.name.to_owned(),
            reason: "Podman's storage on this machine does not have it".into(),
        });
    }
    match (skopeo, podman) {
        (Some(skopeo), _) => fetch.repeated(|| fetch.skopeo(&skopeo, "docker://")),
        (None, Some(podman)) => fetch.repeated(|| fetch.podman(&podman)),
        (None, None) => Err(ImageError::Program {
            program: "skopeo".into(),
            reason: "neither skopeo nor podman is installed on this machine".into(),
        }),
    }
}

/// A program in the search path.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|program| {
            program
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0)
        })
}

/// Podman's storage of this user, if there is one: asking a program about a
/// storage that does not exist would make one, perhaps on a network home.
fn local_storage() -> Option<PathBuf> {
    let root = if let Some(root) = std::env::var_os("CONTAINERS_STORAGE_CONF") {
        return Some(root.into());
    } else if rustix::process::geteuid().is_root() {
        PathBuf::from("/var/lib/containers")
    } else if let Some(data) = std::env::var_os("XDG_DATA_HOME") {
        Path::new(&data).join("containers")
    } else {
        Path::new(&std::env::var_os("HOME")?).join(".local/share/containers")
    };
    let storage = root.join("storage");
    let entries = fs::read_dir(&storage).ok()?;
    entries
        .flatten()
        .any(|entry| entry.file_name().as_encoded_bytes().ends_with(b"-images"))
        .then_some(storage)
}

struct Fetch<'a> {
    name: &'a str,
    request: &'a Request<'a>,
    work: &'a Work<'a>,
    layout: PathBuf,
}

impl Fetch<'_> {
    /// Repeats what failed because the registry could not be reached.
    fn repeated(
        &self,
        fetch: impl Fn() -> Result<Result<PathBuf, Failure>, ImageError>,
    ) -> Result<PathBuf, ImageError> {
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            let failure = match fetch()? {
                Ok(layout) => return Ok(layout),
                Err(failure) => failure,
            };
            let late = Instant::now() + pause >= self.work.deadline;
            if attempt >= ATTEMPTS || late || !failure.may_pass() {
                return Err(failure.into_error(self.request.name));
            }
            attempt += 1;
            (self.work.tell)(PullUpdate::Retrying {
                attempt,
                reason: failure.to_string(),
            });
            self.sleep(pause)?;
            pause *= 2;
        }
    }

    fn sleep(&self, pause: Duration) -> Result<(), ImageError> {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            if self.work.stop.load(Ordering::Relaxed) {
                return Err(ImageError::Program {
                    program: "skopeo".into(),
                    reason: "the caller gave up".into(),
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// What Podman has on this machine, without asking any registry.
    fn copy_from_local_storage(&self, program: &Path) -> Result<Option<PathBuf>, ImageError> {
        let copied = if program.ends_with("skopeo") {
            self.skopeo(program, "containers-storage:")?
        } else {
            let mut save = self.command(program);
            save.args([
                "save", "--quiet", "--format", "oci-dir", "--output", "layout", "--",
            ]);
            save.arg(self.name);
            self.run(save, "podman save")?
        };
        match copied {
            Ok(layout) => Ok(Some(layout)),
            Err(failure) => {
                // Not there, locked, or of no use to this user: the registry
                // will say what is wrong with the name.
                tracing::debug!(image = self.name, %failure, "not from the local storage");
                self.clear()?;
                Ok(None)
            }
        }
    }

    fn skopeo(
        &self,
        program: &Path,
        transport: &str,
    ) -> Result<Result<PathBuf, Failure>, ImageError> {
        self.stand_in_for_known().map_err(|source| ImageError::Io {
            step: "preparing",
            path: self.layout.clone(),
            source,
        })?;
        let mut copy = self.command(program);
        if !has_policy() {
            copy.arg("--insecure-policy");
        }
        copy.args(["--override-os", "linux", "copy", "--quiet"]);
        copy.arg(format!("{transport}{}", self.name));
        // Relative, because the path of a layout may hold no colon.
        copy.arg(format!("oci:layout:{TAG}"));
        self.run(copy, "skopeo copy")
    }

    /// Without skopeo: Podman pulls into a storage of its own and saves from
    /// it.
    fn podman(&self, program: &Path) -> Result<Result<PathBuf, Failure>, ImageError> {
        let with_storage = || {
            let mut command = self.command(program);
            command.args([
                "--storage-driver",
                "vfs",
                "--storage-opt",
                "vfs.ignore_chown_errors=true",
            ]);
            command
                .arg("--root")
                .arg(self.request.scratch.join("storage"));
            command
                .arg("--runroot")
                .arg(self.request.scratch.join("run"));
            command
        };
        let mut pull = with_storage();
        pull.args(["pull", "--quiet", "--", self.name]);
        if let Err(failure) = self.run(pull, "podman pull")? {
            return Ok(Err(failure));
        }
        let mut save = with_storage();
        save.args([
            "save", "--quiet", "--format", "oci-dir", "--output", "layout", "--",
        ]);
        save.arg(self.name);
        self.run(save, "podman save")
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.request.scratch)
            .env("TMPDIR", self.request.scratch);
        command
    }

    /// Runs a program that fills the layout.
    fn run(
        &self,
        command: Command,
        name: &'static str,
    ) -> Result<Result<PathBuf, Failure>, ImageError> {
        let mut seen = 0;
        let mut grown = Instant::now();
        let program = Program {
            name,
            stop: self.work.stop,
            deadline: self.work.deadline,
        };
        let ended = program.run(command, || {
            let bytes = allocated(self.request.scratch);
            if bytes > seen {
                seen = bytes;
                grown = Instant::now();
                (self.work.tell)(PullUpdate::Fetching { bytes });
            }
            grown.elapsed() < STALL
        })?;
        Ok(match ended {
            Ended::Succeeded => Ok(self.layout.clone()),
            Ended::Stalled => Err(Failure::unreachable(format!(
                "no byte came for {} s",
                STALL.as_secs()
            ))),
            Ended::TimedOut => {
                return Err(ImageError::Deadline {
                    image: self.request.name.to_owned(),
                    limit: self.work.limit,
                });
            }
            Ended::Failed { status, output } => Err(Failure::read(name, &status, &output)),
        })
    }

    /// Files of holes for the layers the store has.
    fn stand_in_for_known(&self) -> io::Result<()> {
        let blobs = self.layout.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        for (digest, length) in self.request.known {
            let Some(hex) = digest.strip_prefix("sha256:") else {
                continue;
            };
            match File::create_new(blobs.join(hex)) {
                Ok(file) => file.set_len(*length)?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), ImageError> {
        crate::tree::remove_tree(&self.layout).map_err(Into::into)
    }
}

/// Whether the copying programs find a policy about signatures; they refuse to
/// work without one.
fn has_policy() -> bool {
    let home = std::env::var_os("HOME")
        .map(|home| Path::new(&home).join(".config/containers/policy.json"));
    home.is_some_and(|path| path.exists()) || Path::new("/etc/containers/policy.json").exists()
}

/// Bytes on the disk below a directory, as far as they can be seen while it
/// is being written.
fn allocated(dir: &Path) -> u64 {
    crate::tree::tree_size(dir).map_or(0, |size| size.bytes)
}

#[cfg(test)]
mod tests {
    use super::normalize;

    #[test]
    fn short_names_mean_docker_hub_and_a_digest_overrules_the_tag() {
        for (given, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/tool", "docker.io/user/tool:latest"),
            ("quay.io/a/b", "quay.io/a/b:latest"),
            ("localhost/x:y", "localhost/x:y"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
            ("10.0.0.1:5000/a/b:c", "10.0.0.1:5000/a/b:c"),
            ("a/b@sha256:00", "docker.io/a/b@sha256:00"),
            ("a.b/c:d@sha256:00", "a.b/c@sha256:00"),
        ] {
            assert_eq!(normalize(given), full);
        }
    }
}
