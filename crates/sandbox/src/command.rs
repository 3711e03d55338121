//! Short-lived programs of the machine: finding them, and running them to
//! their end within a deadline. Blocking; callers on an async runtime move it
//! to a thread for such work.

use crate::error::EngineError;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Looks a program up in `PATH`, and where administrators' programs are.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| {
            candidate.is_absolute()
                && candidate
                    .metadata()
                    .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}

/// Runs a short-lived program to its end and returns what it printed. Its
/// output goes through files, so that a child it leaves behind can't hold us.
///
/// # Errors
/// [`EngineError::Program`] when it can't be run, fails or takes too long.
pub fn run(command: &mut Command, limit: Duration) -> Result<String, EngineError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let name = Path::new(&program)
        .file_name()
        .map_or(program.clone(), |n| n.to_string_lossy().into_owned());
    let fail = |status: String, output: String| EngineError::Program {
        program: name.clone(),
        status,
        output,
    };
    let start = |e: io::Error| fail("can't be run".into(), e.to_string());
    let (out, err) = (
        anonymous_file().map_err(start)?,
        anonymous_file().map_err(start)?,
    );
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone().map_err(start)?)
        .stderr(err.try_clone().map_err(start)?)
        .spawn()
        .map_err(start)?;
    let until = Instant::now() + limit;
    let mut pause = Duration::from_micros(500);
    let status = loop {
        match child.try_wait().map_err(start)? {
            Some(status) => break status,
            None if Instant::now() >= until => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(fail(format!("did not end within {limit:?}"), tail(&err)));
            }
            None => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
        }
    };
    if !status.success() {
        return Err(fail(status.to_string(), tail(&err)));
    }
    Ok(tail(&out))
}

/// Bytes of a program's output that are looked at.
const MAX_OUTPUT: u64 = 64 * 1024;

fn anonymous_file() -> io::Result<std::fs::File> {
    Ok(rustix::fs::memfd_create("output", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

fn tail(mut file: &std::fs::File) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let mut bytes = Vec::new();
    let end = file.metadata().map_or(0, |m| m.len());
    if file
        .seek(SeekFrom::Start(end.saturating_sub(MAX_OUTPUT)))
        .is_ok()
    {
        let _ = file.take(MAX_OUTPUT).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).trim().to_owned()
}
