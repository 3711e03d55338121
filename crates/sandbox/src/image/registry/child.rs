//! Runs a program that must not outlive us: in its own process group, killed
//! when the caller gives up, at the deadline, when it stalls, and by the kernel
//! when this process dies.

use crate::image::error::ImageError;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes kept of what a program says.
const KEPT: usize = 16 << 10;
/// How often a running program is looked at.
const TICK: Duration = Duration::from_millis(20);
/// How often its progress is measured.
const MEASURE: Duration = Duration::from_millis(500);

/// A program to run, and when to end it.
pub(super) struct Program<'a> {
    pub(super) name: &'static str,
    pub(super) stop: &'a AtomicBool,
    pub(super) deadline: Instant,
}

/// How it ended.
pub(super) enum Ended {
    Succeeded,
    Failed { status: String, output: String },
    Stalled,
    TimedOut,
}

impl Program<'_> {
    /// Runs it to its end on this thread. `advancing` is asked now and then;
    /// once it says no, the program has stalled.
    pub(super) fn run(
        &self,
        mut command: Command,
        mut advancing: impl FnMut() -> bool,
    ) -> Result<Ended, ImageError> {
        let failed = |reason: String| ImageError::Program {
            program: self.name.to_owned(),
            reason,
        };
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        die_with_us(&mut command);
        let child = command.spawn().map_err(|e| failed(e.to_string()))?;
        let mut group = Group(child);
        let output = group.0.stderr.take().map(keep_tail);
        let mut measured = Instant::now();
        let ended = loop {
            match group.0.try_wait() {
                Ok(Some(status)) if status.success() => break Ended::Succeeded,
                Ok(Some(status)) => {
                    break Ended::Failed {
                        status: status.to_string(),
                        output: String::new(),
                    };
                }
                Ok(None) => {}
                Err(error) => return Err(failed(error.to_string())),
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(failed("the caller gave up".into()));
            }
            if Instant::now() >= self.deadline {
                break Ended::TimedOut;
            }
            if measured.elapsed() >= MEASURE {
                measured = Instant::now();
                if !advancing() {
                    break Ended::Stalled;
                }
            }
            std::thread::sleep(TICK);
        };
        drop(group);
        let said = output
            .and_then(|thread| thread.join().ok())
            .unwrap_or_default();
        Ok(match ended {
            Ended::Failed { status, .. } => Ended::Failed {
                status,
                output: said,
            },
            other => other,
        })
    }
}

/// The kernel kills the child when the thread that started it ends; that
/// thread waits for it, so only the death of this process ends it early.
fn die_with_us(command: &mut Command) {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only two system calls are made, which
    // neither allocate nor lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(io::Error::other("the parent is gone"));
            }
            Ok(())
        });
    }
}

/// A running child with all its descendants; dropping it ends them.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            // The group may be gone already.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

/// Reads all that is said, keeping the end.
fn keep_tail(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut kept: Vec<u8> = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            kept.extend_from_slice(&buffer[..count]);
            if kept.len() > 2 * KEPT {
                kept.drain(..kept.len() - KEPT);
            }
        }
        String::from_utf8_lossy(&kept).into_owned()
    })
}
