//! The root file system of one sandbox: which way of making it works on this
//! machine, its directories, and mounting it where that is done outside of
//! the sandbox.
//!
//! Used by every engine that makes its own roots. Knows layers as
//! directories, not images.

use crate::command::{find_program, run};
use crate::error::EngineError;
use crate::snapshot::Source;
use crate::state::make_dir;
use crate::tree::{CopyOptions, copy_layers, tree_size};
use serde::{Deserialize, Serialize};
use skyrl_protocol::zygote::{Finding, Findings};
use skyrl_zygote::overlay::Overlay;
use std::ffi::{CString, OsString};
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long the zygote's probe may take.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// How long mounting or unmounting by a program may take.
const MOUNT_LIMIT: Duration = Duration::from_secs(10);

/// Ways of making a root, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootMethod {
    /// overlayfs of the kernel, mounted as root.
    Overlay,
    /// overlayfs of the kernel, mounted in the sandbox's user namespace.
    OverlayInUserNamespace,
    /// overlayfs of a program, through FUSE.
    FuseOverlay,
    /// A copy of the image.
    Copy,
}

impl RootMethod {
    /// All ways, best first.
    pub const ALL: [Self; 4] = [
        Self::Overlay,
        Self::OverlayInUserNamespace,
        Self::FuseOverlay,
        Self::Copy,
    ];

    /// Whether overlay's marks in upper directories are `user.*` attributes.
    pub fn user_xattr(self) -> bool {
        self == Self::OverlayInUserNamespace
    }
}

impl fmt::Display for RootMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overlay => "overlayfs",
            Self::OverlayInUserNamespace => "overlayfs in a user namespace",
            Self::FuseOverlay => "fuse-overlayfs",
            Self::Copy => "a copied root",
        })
    }
}

/// What works here, and why not what does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootWays {
    ways: Vec<(RootMethod, Finding)>,
}

impl RootWays {
    /// Judges what the zygote found and whether fuse-overlayfs works.
    pub fn new(findings: &Findings, fuse: Finding) -> Self {
        Self {
            ways: vec![
                (RootMethod::Overlay, findings.overlay.clone()),
                (
                    RootMethod::OverlayInUserNamespace,
                    findings.overlay_in_user_namespace.clone(),
                ),
                (RootMethod::FuseOverlay, fuse),
                (RootMethod::Copy, Ok(())),
            ],
        }
    }

    /// Looks at this machine. `dir` is where sandboxes live.
    ///
    /// # Errors
    /// When the zygote's probe can't be run.
    pub fn probe(zygote: &Path, dir: &Path) -> Result<Self, EngineError> {
        Ok(Self::new(
            &findings(zygote, dir)?,
            fuse_overlayfs().map(drop),
        ))
    }

    /// Whether a way works.
    pub fn finding(&self, method: RootMethod) -> &Finding {
        const UNKNOWN: &Finding = &Ok(());
        self.ways
            .iter()
            .find(|(way, _)| *way == method)
            .map_or(UNKNOWN, |(_, finding)| finding)
    }

    /// The best of the acceptable ways that works, with why better ones were
    /// passed over.
    ///
    /// # Errors
    /// Why none of them does.
    pub fn choose(&self, acceptable: &[RootMethod]) -> Result<(RootMethod, String), String> {
        let mut passed_over = Vec::new();
        for method in RootMethod::ALL {
            if !acceptable.contains(&method) {
                continue;
            }
            match self.finding(method) {
                Ok(()) => return Ok((method, passed_over.join("; "))),
                Err(reason) => passed_over.push(format!("not {method}: {reason}")),
            }
        }
        Err(passed_over.join("; "))
    }
}

/// Runs the zygote's probe.
///
/// # Errors
/// When it can't be run, fails or hangs.
pub fn findings(zygote: &Path, dir: &Path) -> Result<Findings, EngineError> {
    let output = run(
        Command::new(zygote).arg("probe").arg(dir).env_clear(),
        PROBE_LIMIT,
    )?;
    serde_json::from_str(&output).map_err(|e| EngineError::Program {
        program: "skyrl-zygote probe".into(),
        status: "answered nonsense".into(),
        output: format!("{e}: {output}"),
    })
}

/// Finds fuse-overlayfs and sees whether it may be used.
///
/// # Errors
/// Why it can't, in words.
pub fn fuse_overlayfs() -> Result<PathBuf, String> {
    let program = find_program("fuse-overlayfs").ok_or("fuse-overlayfs is not installed")?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|e| format!("/dev/fuse: {e}"))?;
    if !rustix::process::geteuid().is_root() && find_program("fusermount3").is_none() {
        return Err("fusermount3 is not installed".into());
    }
    Ok(program)
}

/// A sandbox's root file system. Plain paths, to be recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rootfs {
    /// How it is made.
    pub method: RootMethod,
    /// Read-only layers, topmost first.
    pub lowers: Vec<PathBuf>,
    dir: PathBuf,
}

impl Rootfs {
    /// The root of a sandbox whose own directory is `dir`; nothing is made
    /// yet.
    pub fn plan(method: RootMethod, lowers: Vec<PathBuf>, dir: &Path) -> Self {
        Self {
            method,
            lowers,
            dir: dir.to_owned(),
        }
    }

    /// Writable layer, where there are layers.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Scratch space of overlayfs.
    pub fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// The root itself: where the layers are mounted, or the copy.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Where the sandbox's writes end up.
    pub fn written(&self) -> PathBuf {
        match self.method {
            RootMethod::Copy => self.root(),
            _ => self.upper(),
        }
    }

    /// The same, for freezing.
    pub fn source<'a>(&self, written: &'a Path) -> Source<'a> {
        match self.method {
            RootMethod::Copy => Source::Root(written),
            RootMethod::FuseOverlay => Source::FuseUpper(written),
            _ => Source::Upper(written),
        }
    }

    /// Makes its directories (below an existing one), and copies the image
    /// where that is the way.
    ///
    /// # Errors
    /// The step that failed.
    pub fn create(&self) -> Result<(), EngineError> {
        if self.method == RootMethod::Copy {
            return Ok(copy_layers(
                &self.lowers,
                &self.root(),
                CopyOptions::default(),
            )?);
        }
        for dir in [self.upper(), self.work(), self.root()] {
            make_dir(&dir)?;
        }
        // The mode of the upper directory is the mode of `/` inside.
        let upper = self.upper();
        std::fs::set_permissions(&upper, std::fs::Permissions::from_mode(0o755))
            .map_err(|e| EngineError::step("opening to everybody", upper.display(), e))
    }

    /// Bytes the sandbox wrote; the image's too where it was copied.
    ///
    /// # Errors
    /// When the tree can't be read.
    pub fn size(&self) -> Result<u64, EngineError> {
        Ok(tree_size(&self.written())?.bytes)
    }

    /// Mounts it at [`Rootfs::root`] in this process's mount namespace, for
    /// the ways that are mounted outside of the sandbox.
    ///
    /// # Errors
    /// The step that failed; [`EngineError::Invalid`] for a root that only
    /// the sandbox itself can mount.
    pub fn mount(&self) -> Result<(), EngineError> {
        match self.method {
            RootMethod::Copy => Ok(()),
            RootMethod::Overlay => self.mount_overlay(),
            RootMethod::FuseOverlay => self.mount_fuse(),
            RootMethod::OverlayInUserNamespace => Err(EngineError::Invalid {
                what: "an overlay of a user namespace can't be mounted outside of it".into(),
                hint: "`skyrl sandbox probe` shows which ways of making a root work here".into(),
            }),
        }
    }

    /// Mounts it where a program does that, so that a sandbox can be started
    /// on [`Rootfs::root`]; what the sandbox mounts itself is left to it.
    ///
    /// # Errors
    /// As [`Rootfs::mount`].
    pub fn mount_outside(&self) -> Result<(), EngineError> {
        match self.method {
            RootMethod::FuseOverlay => self.mount(),
            _ => Ok(()),
        }
    }

    fn mount_overlay(&self) -> Result<(), EngineError> {
        Overlay {
            lowers: &self.lowers,
            upper: &self.upper(),
            work: &self.work(),
            user_xattr: false,
        }
        .mount_on(&self.root())
        .map_err(|failed| {
            let step = failed.0;
            EngineError::step(
                step.step,
                step.subject,
                io::Error::from_raw_os_error(step.errno),
            )
        })
    }

    fn mount_fuse(&self) -> Result<(), EngineError> {
        run(&mut self.fuse_command()?, MOUNT_LIMIT).map(drop)
    }

    /// The program that mounts it through FUSE and serves it in the
    /// background.
    ///
    /// # Errors
    /// [`EngineError::Program`] when fuse-overlayfs can't be used.
    pub(crate) fn fuse_command(&self) -> Result<Command, EngineError> {
        let program = fuse_overlayfs().map_err(|reason| EngineError::Program {
            program: "fuse-overlayfs".into(),
            status: "can't be used".into(),
            output: reason,
        })?;
        let mut options = OsString::from("lowerdir=");
        for (index, lower) in self.lowers.iter().enumerate() {
            if index > 0 {
                options.push(":");
            }
            options.push(escaped(lower));
        }
        for (key, path) in [("upperdir", self.upper()), ("workdir", self.work())] {
            options.push(format!(",{key}="));
            options.push(escaped(&path));
        }
        let mut command = Command::new(program);
        command.arg("-o").arg(options).arg(self.root());
        Ok(command)
    }

    /// Undoes [`Rootfs::mount`]; does nothing where nothing is mounted.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unmount(&self) -> Result<(), EngineError> {
        match self.method {
            RootMethod::Overlay | RootMethod::FuseOverlay => unmount(&self.root()),
            RootMethod::OverlayInUserNamespace | RootMethod::Copy => Ok(()),
        }
    }
}

/// Unmounts whatever is mounted on a path, as often as it takes.
///
/// # Errors
/// When the kernel refuses.
pub fn unmount(path: &Path) -> Result<(), EngineError> {
    let fail = |e: io::Error| EngineError::step("unmounting", path.display(), e);
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| fail(io::ErrorKind::InvalidInput.into()))?;
    // Bounded: somebody might mount as fast as we unmount.
    for _ in 0..64 {
        match rustix::mount::unmount(
            name.as_c_str(),
            rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW,
        ) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(rustix::io::Errno::PERM) => {
                // A plain user's FUSE mounts go through the helper that made
                // them.
                let Some(helper) = find_program("fusermount3").filter(|_| is_mounted(path)) else {
                    return Ok(());
                };
                run(
                    Command::new(helper).args(["-u", "-z"]).arg(path),
                    MOUNT_LIMIT,
                )?;
            }
            Err(error) => return Err(fail(error.into())),
        }
    }
    Err(fail(io::ErrorKind::ResourceBusy.into()))
}

fn is_mounted(path: &Path) -> bool {
    mounts_below(path).iter().any(|mounted| mounted == path)
}

/// Mount points at or below a path in this mount namespace, innermost first.
pub fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .map(crate::cgroup::unescape_mount_path)
        .filter(|mounted| mounted.starts_with(path))
        .collect();
    found.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    found
}

/// Escapes what overlay options give a meaning of its own.
fn escaped(path: &Path) -> OsString {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b':' | b',') {
            bytes.push(b'\\');
        }
        bytes.push(*byte);
    }
    OsString::from_vec(bytes)
}
