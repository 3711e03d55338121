//! Finding out what this machine permits, by the very calls that start a
//! sandbox, each in a process of its own.

use crate::overlay::Overlay;
use crate::seccomp::Filters;
use crate::setup::{map_single_id, new_proc};
use crate::spawn::clone_into;
use crate::step::{Failed, Step, check};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, chmod};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::CapabilitySet;
use skyrl_protocol::zygote::{Finding, Findings};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Oldest kernel that has every call used: `mount_setattr`.
const OLDEST_KERNEL: (u32, u32) = (5, 12);

/// Longest that one attempt may take, in seconds.
const DEADLINE_SECONDS: i64 = 10;

/// Tries everything. `dir` is where sandboxes would live.
pub fn probe(dir: &Path) -> Findings {
    let privileged = rustix::process::geteuid().is_root()
        && rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    let user = if privileged { 0 } else { libc::CLONE_NEWUSER };
    Findings {
        privileged,
        kernel: kernel(),
        user_namespace: attempt(libc::CLONE_NEWUSER, || Ok(())),
        namespaces: attempt(
            user | libc::CLONE_NEWNS
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWNET,
            || Ok(()),
        ),
        proc_mount: attempt(user | libc::CLONE_NEWNS | libc::CLONE_NEWPID, || {
            new_proc().map(drop).step("mounting", Path::new("/proc"))
        }),
        overlay: if privileged {
            overlay(dir, 0)
        } else {
            Err("only root may mount it".into())
        },
        overlay_in_user_namespace: overlay(dir, libc::CLONE_NEWUSER),
        seccomp: attempt(0, seccomp),
    }
}

fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|n| n.parse().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= OLDEST_KERNEL {
        return Ok(());
    }
    let (major, minor) = OLDEST_KERNEL;
    Err(format!(
        "kernel {release} is older than {major}.{minor}, which has the first complete set of mount calls"
    ))
}

/// Runs something in a clone with new namespaces.
fn attempt(namespaces: i32, what: impl FnOnce() -> Result<(), Failed>) -> Finding {
    let ids = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| e.to_string())?;
    let cloned = clone_into(namespaces, None, || {
        let prepared = if namespaces & libc::CLONE_NEWUSER != 0 {
            map_single_id((0, 0), ids)
        } else {
            Ok(())
        };
        let text = match prepared.and_then(|()| what()) {
            Ok(()) => "ok".to_owned(),
            Err(failed) => failed.to_string(),
        };
        if let Ok(writer) = writer.try_clone() {
            let _ = File::from(writer).write_all(text.as_bytes());
        }
    });
    drop(writer);
    let (pid, pidfd) = cloned.map_err(|e| e.to_string())?;
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    let limit = Timespec {
        tv_sec: DEADLINE_SECONDS,
        tv_nsec: 0,
    };
    if poll(&mut fds, Some(&limit)) != Ok(1) {
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
    }
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    }
    let mut text = String::new();
    let _ = File::from(reader).read_to_string(&mut text);
    match text.as_str() {
        "ok" => Ok(()),
        "" => Err("the attempt was killed or took too long".into()),
        _ => Err(text),
    }
}

fn seccomp() -> Result<(), Failed> {
    let filters = Filters::compile().map_err(|e| Failed::because(e, ""))?;
    filters
        .install()
        .step("installing", "the system call filter")?;
    // SAFETY: no memory effects.
    match check(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into()) {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(()),
        _ => Err(Failed::because("filtering", "unshare had no effect")),
    }
}

/// Mounts an overlay of two directories and changes what is in it.
fn overlay(dir: &Path, user_namespace: i32) -> Finding {
    let scratch = Scratch::make(dir).map_err(|e| e.to_string())?;
    attempt(libc::CLONE_NEWNS | user_namespace, || {
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .step("detaching from the mounts of", Path::new("/"))?;
        let merged = scratch.path("merged");
        Overlay {
            lowers: &[scratch.path("lower")],
            upper: &scratch.path("upper"),
            work: &scratch.path("work"),
            user_xattr: user_namespace != 0,
        }
        .mount_on(&merged)?;
        let file = merged.join("file");
        fs::write(&file, "changed").step("changing", &file)?;
        fs::remove_file(&file).step("removing", &file)?;
        // An opaque directory: needs the overlay's own attributes.
        let inner = merged.join("dir");
        fs::remove_dir(&inner).step("removing", &inner)?;
        fs::create_dir(&inner).step("making", &inner)
    })
}

/// Directories for one attempt, removed with it.
struct Scratch {
    root: PathBuf,
}

impl Scratch {
    fn make(dir: &Path) -> Result<Self, Failed> {
        let root = dir.join(format!(".probe-{}", std::process::id()));
        let scratch = Self { root };
        for part in ["lower/dir", "upper", "work", "merged"] {
            let path = scratch.path(part);
            fs::create_dir_all(&path).step("making", &path)?;
        }
        let file = scratch.path("lower/file");
        fs::write(&file, "first").step("writing", &file)?;
        Ok(scratch)
    }

    fn path(&self, part: &str) -> PathBuf {
        self.root.join(part)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // overlayfs leaves its directories there without any permission.
        for dir in ["work", "work/incompat", "work/incompat/volatile"] {
            let _ = chmod(self.path("work").join(dir), Mode::RWXU);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}
