//! `skyrl-guest`: see the library for what it does.

use skyrl_guest::process::{Environment, OomCounter, Processes, Settings};
use skyrl_guest::{Config, Guest, init};
use std::ffi::OsString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const USAGE: &str = "usage: skyrl-guest (--listen-fd N | --listen PATH) \
    [--workdir DIR] [--lease SECONDS] [--oom-fd N] [--name NAME]";

enum Listen {
    Descriptor(RawFd),
    Path(PathBuf),
}

struct Arguments {
    listen: Listen,
    workdir: Option<PathBuf>,
    lease: Option<Duration>,
    oom_fd: Option<RawFd>,
}

fn parse(mut given: impl Iterator<Item = OsString>) -> Result<Arguments, String> {
    let (mut listen, mut workdir, mut lease, mut oom_fd) = (None, None, None, None);
    while let Some(name) = given.next() {
        let name = name.to_string_lossy().into_owned();
        let value = given.next().ok_or(format!("{name} needs a value"))?;
        let number = || {
            value
                .to_str()
                .and_then(|text| text.parse::<u32>().ok())
                .filter(|number| *number <= i32::MAX as u32)
                .ok_or(format!("{name} {value:?} is not a number"))
        };
        match name.as_str() {
            "--listen" => listen = Some(Listen::Path(PathBuf::from(value))),
            "--listen-fd" => listen = Some(Listen::Descriptor(number()? as RawFd)),
            "--workdir" => workdir = Some(PathBuf::from(value)),
            "--lease" => lease = Some(Duration::from_secs(number()?.into())),
            // Only there to be seen in the process table.
            "--name" => {}
            "--oom-fd" => oom_fd = Some(number()? as RawFd),
            _ => return Err(format!("unknown option {name}")),
        }
    }
    Ok(Arguments {
        listen: listen.ok_or("no listener is given")?,
        workdir,
        lease: lease.filter(|lease| !lease.is_zero()),
        oom_fd,
    })
}

/// The default directory of commands: absolute, made if missing.
fn workdir(given: Option<PathBuf>) -> PathBuf {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    match given {
        None => here,
        Some(given) => {
            let directory = here.join(given);
            // If it can't be made, each command says so precisely.
            let _ = std::fs::create_dir_all(&directory);
            directory
        }
    }
}

fn session_key() -> Option<String> {
    ["SESSION_API_KEY", "OH_SESSION_API_KEYS_0"]
        .into_iter()
        .filter_map(|name| std::env::var(name).ok())
        .find(|key| !key.is_empty())
}

fn run(arguments: Arguments) -> io::Result<()> {
    init::tune_memory();
    init::open_standard_streams()?;
    let mut keep: Vec<RawFd> = arguments.oom_fd.into_iter().collect();
    if let Listen::Descriptor(fd) = arguments.listen {
        keep.push(fd);
    }
    init::close_inherited(&keep)?;
    let signals = init::take_signals()?;
    init::adopt_orphans()?;
    let open_files = init::raise_open_files();
    // Before anyone can connect: a client may write there at once.
    let workdir = workdir(arguments.workdir);
    let (listener, path) = match &arguments.listen {
        Listen::Descriptor(fd) => (init::listen_on_descriptor(*fd)?, None),
        Listen::Path(path) => {
            let path = std::path::absolute(path)?;
            (init::listen_on_path(&path)?, Some(path))
        }
    };
    let oom = match arguments.oom_fd {
        // SAFETY: the option hands the descriptor over; nothing else uses it.
        Some(fd) => OomCounter::from_fd(unsafe { OwnedFd::from_raw_fd(fd) }),
        None => OomCounter::discover(),
    };
    let processes = Arc::new(OnceLock::<Processes>::new());
    let guest = Guest::new(Config {
        settings: Settings {
            environment: Environment::new(std::env::vars_os()),
            workdir,
            oom,
            open_files,
            signals,
            on_event: init::react(Arc::clone(&processes), move || {
                remove_socket(path.as_deref())
            }),
        },
        session_key: session_key(),
    })?;
    let _ = processes.set(guest.processes.clone());
    guest.processes.lease(arguments.lease);
    Err(guest.serve(&listener))
}

fn remove_socket(path: Option<&Path>) {
    if let Some(path) = path {
        // Whoever removed it earlier did what was to be done.
        let _ = std::fs::remove_file(path);
    }
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("skyrl-guest: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("skyrl-guest: {error}");
            ExitCode::from(1)
        }
    }
}
