//! The program that gives a sandbox's network a way out, run beside it. It is
//! started once the sandbox has its namespaces and ended with the sandbox.

use super::init::Init;
use super::record::Place;
use crate::error::EngineError;
use crate::native::network::slirp4netns;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use skyrl_protocol::zygote::Identity;
use skyrl_zygote::process::identity;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// How long it may take until the network works, in seconds.
const LIMIT_SECONDS: i64 = 10;

/// The running program.
#[derive(Debug)]
pub(super) struct Helper {
    pub(super) identity: Identity,
    /// Ours to wait for, as long as this process lives.
    pub(super) child: Child,
}

/// Starts the program for a sandbox and waits until its network works.
///
/// # Errors
/// What it said when it failed.
pub(super) fn start(
    place: &Place<'_>,
    init: &Init,
    user_namespace: bool,
) -> Result<Helper, EngineError> {
    let fail = |status: String, output: String| EngineError::Program {
        program: "slirp4netns".into(),
        status,
        output,
    };
    let program = slirp4netns().map_err(|reason| fail("can't be used".into(), reason))?;
    let step = |e: io::Error| fail("can't be run".into(), e.to_string());
    let link = place.network();
    // Left by a start that was given up.
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(format!("/proc/{}/ns/net", init.pid()), &link).map_err(step)?;
    let said: File = rustix::fs::memfd_create("output", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|e| step(e.into()))?
        .into();
    let (ready, ready_end) = io::pipe().map_err(step)?;
    let mut command = Command::new(program);
    command.args([
        "--configure",
        "--mtu=65520",
        // Services on the host's loopback are none of the sandbox's business.
        "--disable-host-loopback",
        "--ready-fd=0",
        "--netns-type=path",
    ]);
    if user_namespace {
        command.arg(format!("--userns-path=/proc/{}/ns/user", init.pid()));
    }
    let mut child = command
        .arg(&link)
        .arg("tap0")
        .env_clear()
        // It outlives this process, as the sandbox does.
        .process_group(0)
        .stdin(Stdio::from(OwnedFd::from(ready_end)))
        .stdout(said.try_clone().map_err(step)?)
        .stderr(said.try_clone().map_err(step)?)
        .spawn()
        .map_err(step)?;
    // The command holds the other end too.
    drop(command);
    if became_ready(&ready.into()) {
        let id = i32::try_from(child.id()).ok().and_then(identity);
        if let Some(identity) = id {
            return Ok(Helper { identity, child });
        }
    }
    let _ = child.kill();
    let status = child.wait().map_err(step)?;
    Err(fail(status.to_string(), text(&said)))
}

/// Whether a word came through the pipe before its end and in time.
fn became_ready(pipe: &OwnedFd) -> bool {
    let limit = Timespec {
        tv_sec: LIMIT_SECONDS,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)];
    if !matches!(poll(&mut fds, Some(&limit)), Ok(1)) {
        return false;
    }
    let mut word = [0u8; 1];
    matches!(rustix::io::read(pipe, &mut word), Ok(1))
}

fn text(file: &File) -> String {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; 4096];
    let read = file.read_at(&mut bytes, 0).unwrap_or(0);
    bytes.truncate(read);
    String::from_utf8_lossy(&bytes).trim().to_owned()
}
