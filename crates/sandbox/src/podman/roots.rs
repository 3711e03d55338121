//! Sandboxes' root file systems, seen from the engine's own namespace: they
//! are mounted there, and as a plain user with further ids only there can
//! their files be removed and counted. The work is done by short-lived
//! programs started inside.

use super::install::Privilege;
use super::namespace::{Ids, Namespace};
use crate::command::find_program;
use crate::error::EngineError;
use crate::rootfs::{RootMethod, Rootfs};
use crate::tree::remove_tree;
use skyrl_protocol::guest::UserGroup;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long mounting and other single steps may take.
const STEP_LIMIT: Duration = Duration::from_secs(20);
/// How long work on whole trees may take.
const TREE_LIMIT: Duration = Duration::from_secs(600);

/// Does what has to be done inside.
#[derive(Debug, Clone)]
pub(super) struct Roots {
    namespace: Namespace,
    zygote: PathBuf,
    /// How roots are made.
    pub(super) method: RootMethod,
    privilege: Privilege,
    /// Sandboxes leave files of ids that this process can't touch.
    foreign_files: bool,
}

impl Roots {
    pub(super) fn new(
        namespace: Namespace,
        zygote: PathBuf,
        method: RootMethod,
        privilege: Privilege,
    ) -> Self {
        Self {
            foreign_files: privilege == Privilege::Rootless && namespace.ids == Ids::Range,
            namespace,
            zygote,
            method,
            privilege,
        }
    }

    /// Ways of making roots that can be used, best first.
    pub(super) fn acceptable(privilege: Privilege) -> [RootMethod; 3] {
        let overlay = match privilege {
            Privilege::Rootful => RootMethod::Overlay,
            Privilege::Rootless => RootMethod::OverlayInUserNamespace,
        };
        [overlay, RootMethod::FuseOverlay, RootMethod::Copy]
    }

    /// Whether a guest of this user runs under an id that is not ours on the
    /// host.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] when there is no such id to be had.
    pub(super) fn check_user(&self, user: Option<UserGroup>) -> Result<bool, EngineError> {
        let Some(UserGroup { uid, gid }) = user.filter(|user| user.uid != 0 || user.gid != 0)
        else {
            return Ok(false);
        };
        if self.privilege == Privilege::Rootful {
            return Ok(false);
        }
        if self.namespace.ids == Ids::Single {
            return Err(EngineError::Invalid {
                what: format!(
                    "user {uid}:{gid} can't be had: this account has no subordinate ids, so root is the only user in its sandboxes"
                ),
                hint: "leave the user out, or have a range for the account added to /etc/subuid and /etc/subgid".into(),
            });
        }
        Ok(uid != 0)
    }

    /// Mounts a root whose directories exist.
    pub(super) async fn mount(&self, rootfs: &Rootfs) -> Result<(), EngineError> {
        let command = match rootfs.method {
            RootMethod::Copy => return Ok(()),
            RootMethod::FuseOverlay => rootfs.fuse_command()?,
            RootMethod::Overlay | RootMethod::OverlayInUserNamespace => {
                let marks = if rootfs.method.user_xattr() {
                    "user"
                } else {
                    "trusted"
                };
                let mut command = Command::new(&self.zygote);
                command
                    .args(["mount-overlay", marks])
                    .args([rootfs.root(), rootfs.upper(), rootfs.work()])
                    .args(&rootfs.lowers);
                command
            }
        };
        self.run(command, STEP_LIMIT).await.map(drop)
    }

    /// Undoes [`Roots::mount`], done or not.
    pub(super) async fn unmount(&self, rootfs: &Rootfs) -> Result<(), EngineError> {
        if rootfs.method == RootMethod::Copy {
            return Ok(());
        }
        let mut command = Command::new(&self.zygote);
        command.arg("unmount").arg(rootfs.root());
        self.run(command, STEP_LIMIT).await.map(drop)
    }

    /// Whether sandboxes leave files that this process can't touch.
    pub(super) fn foreign_files(&self) -> bool {
        self.foreign_files
    }

    /// Copies a tree with everything a file system shows, whiteouts and
    /// opaque marks included, where this process can't read all of it.
    pub(super) async fn copy(&self, from: &Path, to: &Path) -> Result<(), EngineError> {
        let mut command = tool("cp")?;
        command
            .args(["-a", "--one-file-system", "--no-target-directory", "--"])
            .args([from, to]);
        self.run(command, TREE_LIMIT).await.map(drop)
    }

    /// Removes a directory with all a sandbox wrote in it.
    pub(super) async fn remove(&self, directory: &Path) -> Result<(), EngineError> {
        if self.foreign_files && directory.exists() {
            let mut command = tool("rm")?;
            command
                .args(["-rf", "--one-file-system", "--"])
                .arg(directory);
            self.run(command, TREE_LIMIT).await?;
        }
        let directory = directory.to_owned();
        blocking("removing a directory", move || Ok(remove_tree(&directory)?)).await
    }

    /// Bytes a sandbox wrote.
    pub(super) async fn size(&self, rootfs: &Rootfs) -> Result<u64, EngineError> {
        if !self.foreign_files {
            let rootfs = rootfs.clone();
            return blocking("measuring a directory", move || rootfs.size()).await;
        }
        let mut command = tool("du")?;
        command.args(["-sx", "-B1", "--"]).arg(rootfs.written());
        let said = self.run(command, TREE_LIMIT).await?;
        said.split_whitespace()
            .next()
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| EngineError::Program {
                program: "du".into(),
                status: "answered nonsense".into(),
                output: said,
            })
    }

    /// Lets this process connect to the socket of a guest that runs under
    /// another id. Others can't reach it: directories above it are ours only.
    pub(super) async fn open_socket(&self, socket: &Path) -> Result<(), EngineError> {
        if !self.foreign_files {
            return Ok(());
        }
        let mut command = tool("chmod")?;
        command.args(["0666", "--"]).arg(socket);
        self.run(command, STEP_LIMIT).await.map(drop)
    }

    /// Runs a program inside to its end.
    async fn run(&self, mut command: Command, limit: Duration) -> Result<String, EngineError> {
        let name = Path::new(command.get_program())
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        command.env_clear().stdin(Stdio::null());
        self.namespace.enter(&mut command, Path::new("/"))?;
        let mut command = tokio::process::Command::from(command);
        let output = tokio::time::timeout(limit, command.kill_on_drop(true).output())
            .await
            .map_err(|_| EngineError::Program {
                program: name.clone(),
                status: format!("did not end within {limit:?}"),
                output: String::new(),
            })?
            .map_err(|e| EngineError::step("running", &name, e))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(EngineError::Program {
                program: name,
                status: output.status.to_string(),
                output: said.trim().to_owned(),
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn tool(name: &str) -> Result<Command, EngineError> {
    find_program(name)
        .map(Command::new)
        .ok_or_else(|| EngineError::Program {
            program: name.into(),
            status: "is not installed".into(),
            output: String::new(),
        })
}

/// Moves blocking work to a thread for it.
pub(super) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(EngineError::step(
            what,
            "on a thread",
            std::io::Error::other(error),
        )),
    }
}
