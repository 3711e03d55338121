//! Running a container runtime (crun, runc) for one sandbox, in a mount
//! namespace that goes away with it, so that no mount is ever left behind, and
//! in the sandbox's groups from its first instruction, so that no process of
//! it ever escapes them.
//!
//! The launcher clones itself into the new namespaces, lives as long as the
//! runtime, and ends as it does; killing the launcher kills the runtime.

use crate::setup::{ForRuntime, become_runtime};
use crate::spawn::{clone_into, listen_at, open_v2_group};
use crate::step::{Failed, Step};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};
use skyrl_protocol::zygote::{LaunchPlan, UserNamespacePlan};
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Exit status when it was the launcher that failed; what it prints then is a
/// [`StepFailure`](skyrl_protocol::zygote::StepFailure) as JSON.
pub const FAILED: u8 = 125;

/// Runs the runtime of the plan in a file to its end.
pub fn launch(plan: &Path) -> ExitCode {
    match run(plan) {
        Ok(code) => ExitCode::from(code),
        Err(failed) => {
            print(&failed);
            ExitCode::from(FAILED)
        }
    }
}

fn print(failed: &Failed) {
    let text = serde_json::to_string(&failed.0).unwrap_or_else(|_| failed.to_string());
    eprintln!("{text}");
}

fn run(path: &Path) -> Result<u8, Failed> {
    // When whoever started this is killed, so is this, and with it the
    // runtime.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .step("asking to die with", "the engine")?;
    let text = fs::read(path).step("reading", path)?;
    let plan: LaunchPlan = serde_json::from_slice(&text).step("reading", path)?;
    let open = |path: &PathBuf| {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).step("opening", path)
    };
    let program = open(&plan.program)?;
    let guest = open(&plan.guest)?;
    let listener = listen_at(&plan.socket)?;
    let v2 = open_v2_group(&plan.cgroups)?;
    let ids = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let mut namespaces = libc::CLONE_NEWNS;
    if plan.user_namespace == UserNamespacePlan::OwnSingleId {
        namespaces |= libc::CLONE_NEWUSER;
    }
    let (pid, _) = clone_into(namespaces, v2.as_ref(), || {
        let inherited = ForRuntime {
            program: program.as_fd(),
            listener: listener.as_fd(),
            guest: guest.as_fd(),
            ids,
        };
        match become_runtime(&plan, &inherited) {
            Ok(never) => match never {},
            Err(failed) => print(&failed),
        }
    })?;
    let pid = Pid::from_raw(pid).ok_or_else(|| Failed::because("cloning", "the runtime"))?;
    let (_, status) = waitpid(Some(pid), WaitOptions::empty())
        .step("waiting for", "the runtime")?
        .ok_or_else(|| Failed::because("waiting for", "the runtime"))?;
    Ok(exit_code(status))
}

/// As a shell would put it.
fn exit_code(status: WaitStatus) -> u8 {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => FAILED.into(),
    };
    u8::try_from(code).unwrap_or(FAILED)
}
