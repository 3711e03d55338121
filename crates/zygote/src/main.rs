//! `skyrl-zygote serve --dir DIR --guest FILE --grace-ms N` starts a zygote in
//! the background, prints `ready` and returns; `skyrl-zygote probe DIR` prints
//! what this machine permits as JSON; `skyrl-zygote launch FILE` runs a
//! container runtime in the surroundings that the plan in FILE describes;
//! `mount-overlay` and `unmount` serve engines whose roots are mounted in
//! another process's namespace, which they enter before they run this. All are
//! run by engines, not by people.

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::net::SocketType;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{PidfdFlags, Resource, getpid, pidfd_open};
use skyrl_protocol::zygote::{IDENTITY, SOCKET};
use skyrl_zygote::launch::launch;
use skyrl_zygote::overlay::Overlay;
use skyrl_zygote::process::identity;
use skyrl_zygote::sealed::sealed_copy;
use skyrl_zygote::seccomp::Filters;
use skyrl_zygote::server::Server;
use skyrl_zygote::setup::OOM_COUNTER;
use skyrl_zygote::spawn::{Parent, listen_on};
use skyrl_zygote::step::{Failed, Step, check};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Engines waiting to be accepted, at most.
const BACKLOG: i32 = 8;

const USAGE: &str = "usage: skyrl-zygote serve --dir DIR --guest FILE --grace-ms N
       skyrl-zygote launch FILE
       skyrl-zygote mount-overlay (user|trusted) TARGET UPPER WORK LOWER...
       skyrl-zygote unmount TARGET
       skyrl-zygote probe DIR";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["launch", plan] => return launch(Path::new(plan)),
        ["probe", dir] => print_findings(Path::new(dir)),
        ["serve", "--dir", dir, "--guest", guest, "--grace-ms", grace] => match grace.parse() {
            Ok(grace) => serve(
                Path::new(dir),
                Path::new(guest),
                Duration::from_millis(grace),
            ),
            Err(_) => usage(),
        },
        [
            "mount-overlay",
            marks @ ("user" | "trusted"),
            target,
            upper,
            work,
            ref lowers @ ..,
        ] if !lowers.is_empty() => {
            let lowers: Vec<PathBuf> = lowers.iter().map(PathBuf::from).collect();
            Overlay {
                lowers: &lowers,
                upper: Path::new(upper),
                work: Path::new(work),
                user_xattr: marks == "user",
            }
            .mount_on(Path::new(target))
        }
        ["unmount", target] => unmount(Path::new(target)),
        _ => usage(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => {
            eprintln!("skyrl-zygote: {failed}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> Result<(), Failed> {
    Err(Failed::because("", USAGE))
}

/// What is not mounted, or not there, is unmounted already.
fn unmount(target: &Path) -> Result<(), Failed> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    match rustix::mount::unmount(target, flags) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error).step("unmounting", target),
    }
}

fn print_findings(dir: &Path) -> Result<(), Failed> {
    let findings = skyrl_zygote::probe::probe(dir);
    let text = serde_json::to_string(&findings).step("printing", "what was found")?;
    println!("{text}");
    Ok(())
}

fn serve(dir: &Path, guest: &Path, grace: Duration) -> Result<(), Failed> {
    let _reserved = reserve_low_descriptors()?;
    let lock = lock(dir)?;
    raise_descriptor_limit();
    let guest = sealed_copy(guest)?;
    let filters = Filters::compile().map_err(|reason| Failed::because("", reason))?;
    let (ready, ready_end) = pipe_with(PipeFlags::CLOEXEC).step("making", "a pipe")?;
    // SAFETY: this process has a single thread.
    match check(unsafe { libc::fork() }.into()).step("going to", "the background")? {
        0 => {}
        _ => return wait_until_ready(ready_end, ready),
    }
    drop(ready);
    // SAFETY: no memory effects.
    unsafe { libc::setsid() };
    let listener = match begin(dir) {
        Ok(listener) => listener,
        Err(failed) => {
            let _ = File::from(ready_end).write_all(failed.to_string().as_bytes());
            return Err(failed);
        }
    };
    let zygote = pidfd_open(getpid(), PidfdFlags::empty()).step("opening", "the zygote itself")?;
    let parent = Parent {
        guest,
        zygote,
        filters,
    };
    let mut server = Server::new(listener, parent, grace);
    let _ = File::from(ready_end).write_all(b"ready");
    quiet(dir)?;
    let result = server.run();
    let _ = fs::remove_file(dir.join(SOCKET));
    let _ = fs::remove_file(dir.join(IDENTITY));
    drop(lock);
    result
}

/// The first process: prints what the second says and leaves it alone.
fn wait_until_ready(writer: OwnedFd, reader: OwnedFd) -> Result<(), Failed> {
    drop(writer);
    let mut word = String::new();
    File::from(reader)
        .read_to_string(&mut word)
        .step("waiting for", "the zygote")?;
    if word != "ready" {
        return Err(Failed::because("starting the zygote:", word));
    }
    let mut out = io::stdout();
    writeln!(out, "{word}").step("printing", "that the zygote is ready")
}

/// One zygote per directory.
fn lock(dir: &Path) -> Result<File, Failed> {
    let path = dir.join("zygote.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .step("opening", &path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .step("being the only zygote with", &path)?;
    Ok(file)
}

/// Keeps the numbers that descriptors have inside sandboxes from being used
/// here: clones put theirs there.
fn reserve_low_descriptors() -> Result<Vec<OwnedFd>, Failed> {
    let null = Path::new("/dev/null");
    let mut reserved = Vec::new();
    loop {
        let fd = rustix::fs::open(null, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .step("opening", null)?;
        if fd.as_raw_fd() > OOM_COUNTER {
            return Ok(reserved);
        }
        reserved.push(fd);
    }
}

/// Each sandbox takes two descriptors.
fn raise_descriptor_limit() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

/// Says who this is, and listens.
fn begin(dir: &Path) -> Result<OwnedFd, Failed> {
    let path = dir.join(IDENTITY);
    let own = identity(getpid().as_raw_pid())
        .ok_or_else(|| Failed::because("reading", "/proc/self/stat"))?;
    let text = serde_json::to_vec(&own).step("writing", &path)?;
    let temporary: PathBuf = dir.join(format!("{IDENTITY}.new"));
    fs::write(&temporary, text).step("writing", &temporary)?;
    fs::rename(&temporary, &path).step("writing", &path)?;
    let listener = listen_on(&dir.join(SOCKET), SocketType::SEQPACKET, BACKLOG)?;
    let _ = rustix::io::ioctl_fionbio(&listener, true);
    Ok(listener)
}

/// Lets go of the terminal and of every directory.
fn quiet(dir: &Path) -> Result<(), Failed> {
    let null = Path::new("/dev/null");
    let input = rustix::fs::open(null, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .step("opening", null)?;
    let path = dir.join("zygote.log");
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .step("opening", &path)?;
    let redirect = || -> rustix::io::Result<()> {
        rustix::stdio::dup2_stdin(&input)?;
        rustix::stdio::dup2_stdout(&input)?;
        rustix::stdio::dup2_stderr(&log)
    };
    redirect().step("letting go of", "the terminal")?;
    rustix::process::chdir("/").step("leaving", "the current directory")
}
