//! Starting commands.

use super::capture::Capture;
use super::command::{Channel, Command, InputPipe, Stage, State, Stream};
use super::error::SpawnError;
use super::prepare::{Prepared, lossy, prepare};
use super::reactor::{LEASE, Settings, Shared};
use super::spawn::{self, Failure, SCRIPT_DESCRIPTOR, Setup, Step};
use super::spec::{Input, Keep, Spec, Stdio};
use super::terminal;
use crate::sync::lock;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use skyrl_protocol::guest::{ExecResult, Usage, UserGroup};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Most commands running at a time.
const MAX_COMMANDS: usize = 4096;

/// Starts and ends all that runs in the sandbox.
#[derive(Clone)]
pub struct Processes {
    shared: Arc<Shared>,
}

/// The descriptors of a new process and the guest's ends of them.
struct Plumbing {
    /// Become 0, 1 and 2 of the process.
    theirs: [OwnedFd; 3],
    input: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
}

fn resources(what: &'static str) -> impl Fn(rustix::io::Errno) -> SpawnError {
    move |source| SpawnError::Resources {
        what,
        source: source.into(),
    }
}

fn non_blocking(fd: &OwnedFd) -> Result<(), SpawnError> {
    rustix::io::ioctl_fionbio(fd, true).map_err(resources("a pipe"))
}

/// `/dev/null`, or a pipe nobody writes to where there is none. Programs like
/// grep read a pipe on standard input but not a device.
fn empty_input() -> Result<OwnedFd, SpawnError> {
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    match null {
        Ok(null) => Ok(null),
        Err(_) => Ok(pipe_with(PipeFlags::CLOEXEC)
            .map_err(resources("a pipe"))?
            .0),
    }
}

fn output_pipe() -> Result<(OwnedFd, OwnedFd), SpawnError> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(resources("a pipe"))?;
    non_blocking(&ours)?;
    Ok((ours, theirs))
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, SpawnError> {
    fd.try_clone().map_err(|source| SpawnError::Resources {
        what: "a descriptor",
        source,
    })
}

fn plumb(input: &Input, stdio: Stdio) -> Result<Plumbing, SpawnError> {
    if let Stdio::Terminal { columns, rows } = stdio {
        let (master, slave) = terminal::open(columns, rows).map_err(SpawnError::Terminal)?;
        return Ok(Plumbing {
            theirs: [duplicate(&slave)?, duplicate(&slave)?, slave],
            input: Some(duplicate(&master)?),
            outputs: [Some(master), None],
        });
    }
    let (their_input, our_input) = match input {
        Input::Empty => (empty_input()?, None),
        Input::Bytes(_) | Input::Open => {
            let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(resources("a pipe"))?;
            non_blocking(&ours)?;
            (theirs, Some(ours))
        }
    };
    let (our_output, their_output) = output_pipe()?;
    let (our_error, their_error) = if stdio == Stdio::Merged {
        (None, duplicate(&their_output)?)
    } else {
        let (ours, theirs) = output_pipe()?;
        (Some(ours), theirs)
    };
    Ok(Plumbing {
        theirs: [their_input, their_output, their_error],
        input: our_input,
        outputs: [Some(our_output), our_error],
    })
}

impl Processes {
    /// Starts the thread that looks after commands. One per process: it reaps
    /// every child.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(settings)?);
        let reactor = Arc::clone(&shared);
        thread::Builder::new()
            .name("reactor".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                // A guest that can't see its children end is of no use, and
                // must not look alive.
                let _abort = AbortOnPanic;
                let error = reactor.run();
                eprintln!("skyrl-guest: waiting for events failed: {error}");
                std::process::abort();
            })?;
        Ok(Self { shared })
    }

    /// What all commands have in common.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Commands that have not finished.
    pub fn running(&self) -> usize {
        lock(&self.shared.tables).live
    }

    /// Starts a command.
    pub fn spawn(&self, spec: &Spec) -> Result<Arc<Command>, SpawnError> {
        self.start_command(spec, None, || plumb(&spec.input, spec.stdio))
    }

    /// Starts a command whose streams the caller looks after: nothing of its
    /// output is kept here. `script` becomes its descriptor
    /// [`SCRIPT_DESCRIPTOR`].
    pub fn spawn_on(
        &self,
        spec: &Spec,
        streams: [OwnedFd; 3],
        script: Option<OwnedFd>,
    ) -> Result<Arc<Command>, SpawnError> {
        // Out of the way of the number it will get.
        let script = script
            .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, SCRIPT_DESCRIPTOR + 1))
            .transpose()
            .map_err(resources("a descriptor"))?;
        self.start_command(spec, script.as_ref(), || {
            Ok(Plumbing {
                theirs: streams,
                input: None,
                outputs: [None, None],
            })
        })
    }

    fn start_command(
        &self,
        spec: &Spec,
        script: Option<&OwnedFd>,
        plumb: impl FnOnce() -> Result<Plumbing, SpawnError>,
    ) -> Result<Arc<Command>, SpawnError> {
        let cwd = self.directory(spec.cwd.as_deref());
        let environment = &self.shared.settings.environment;
        let prepared = prepare(&spec.program, environment, &spec.env, spec.clear_env, &cwd)?;
        let slot = {
            let mut tables = lock(&self.shared.tables);
            if tables.closed {
                return Err(SpawnError::Resources {
                    what: "a process",
                    source: io::Error::other("the sandbox is shutting down"),
                });
            }
            if tables.live >= MAX_COMMANDS {
                return Err(SpawnError::TooMany {
                    limit: MAX_COMMANDS,
                });
            }
            tables.live += 1;
            tables.begin_spawn()
        };
        let oom_baseline = self.shared.settings.oom.kills();
        let started = Instant::now();
        let spawned = plumb().and_then(|plumbing| {
            let setup = Setup {
                stdio: [0, 1, 2].map(|i: usize| plumbing.theirs[i].as_raw_fd()),
                terminal: matches!(spec.stdio, Stdio::Terminal { .. }),
                script: script.map(AsRawFd::as_raw_fd),
                user: spec.user.filter(|user| !is_own(*user)),
                open_files: self.shared.settings.open_files,
            };
            match spawn::spawn(&prepared, &setup, &slot) {
                Ok(pid) => Ok((pid, plumbing.input, plumbing.outputs)),
                Err(failure) => Err(explain(failure, &prepared, spec, &cwd)),
            }
        });
        let (pid, input, outputs) = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                let mut tables = lock(&self.shared.tables);
                tables.live -= 1;
                tables.abandon_spawn(&slot);
                return Err(error);
            }
        };
        let command = self.command(spec, pid, started, oom_baseline, input, outputs);
        let ended = lock(&self.shared.tables).complete_spawn(&slot, &command);
        self.connect(&command, spec);
        if let Some(ended) = ended {
            let mut state = command.lock();
            self.shared.process_ended(&command, &mut state, ended);
        }
        Ok(command)
    }

    fn command(
        &self,
        spec: &Spec,
        pid: i32,
        started: Instant,
        oom_baseline: Option<u64>,
        input: Option<OwnedFd>,
        outputs: [Option<OwnedFd>; 2],
    ) -> Arc<Command> {
        let (queue, close_when_empty) = match &spec.input {
            Input::Bytes(bytes) => (VecDeque::from(bytes.clone()), true),
            Input::Empty | Input::Open => (VecDeque::new(), false),
        };
        let keep_error = if spec.stdio == Stdio::Pipes {
            spec.keep
        } else {
            Keep::Tail(0)
        };
        let [stdout, stderr] = outputs;
        let channel = |fd, keep| Channel {
            fd,
            capture: Capture::new(keep),
            paused: false,
        };
        Arc::new(Command {
            key: lock(&self.shared.tables).next_key(),
            pid,
            finish: spec.finish,
            is_terminal: matches!(spec.stdio, Stdio::Terminal { .. }),
            grace: spec.grace,
            started,
            oom_baseline,
            shared: Arc::downgrade(&self.shared),
            state: Mutex::new(State {
                exit: None,
                usage: Usage::default(),
                finished_at: None,
                channels: [channel(stdout, spec.keep), channel(stderr, keep_error)],
                input: input.map(|fd| InputPipe {
                    fd,
                    queue,
                    close_when_empty,
                    armed: false,
                }),
                stage: Stage::Running,
                timed_out: false,
                oom_killed: false,
                end_asked: None,
            }),
            changed: Condvar::new(),
            finished: Condvar::new(),
        })
    }

    /// Hands the guest's ends of the pipes to the reactor. A command whose
    /// output can't be listened to is killed rather than left to block.
    fn connect(&self, command: &Arc<Command>, spec: &Spec) {
        let mut state = command.lock();
        let mut deaf = false;
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            if let Some(fd) = &state.channels[index].fd {
                deaf |= self.shared.listen(command.key, stream, fd.as_fd()).is_err();
            }
        }
        if matches!(spec.input, Input::Bytes(_)) {
            self.shared.flush_input(command, &mut state);
        }
        if deaf {
            state.end_asked = Some(Duration::ZERO);
            self.shared.wake_for(command.key, Duration::ZERO);
        } else if let Some(timeout) = spec.timeout
            && state.finished_at.is_none()
        {
            self.shared.wake_for(command.key, timeout);
        }
    }

    /// Runs a command to its end.
    pub fn run(&self, spec: &Spec) -> Result<ExecResult, SpawnError> {
        let command = self.spawn(spec)?;
        command.wait(None);
        command.result().ok_or(SpawnError::Resources {
            what: "a process",
            source: io::Error::other("the sandbox is shutting down"),
        })
    }

    /// A working directory made absolute.
    pub fn directory(&self, given: Option<&str>) -> PathBuf {
        let default = &self.shared.settings.workdir;
        given.map_or_else(|| default.clone(), |given| default.join(given))
    }

    /// Ends the guest through [`super::Event::LeaseExpired`] unless called
    /// again within this time; `None` removes the lease.
    pub fn lease(&self, time: Option<Duration>) {
        match time {
            Some(time) => self.shared.wake_for(LEASE, time),
            None => self.shared.forget(LEASE),
        }
    }

    /// Passes a signal on to every running command.
    pub fn forward(&self, signal: i32) {
        self.shared.signal_commands(signal);
    }

    /// Refuses new commands and ends all processes of the sandbox: SIGTERM,
    /// then SIGKILL after `grace`. Blocks; must not be called from an event.
    pub fn end_everything(&self, grace: Duration) {
        self.shared.end_everything(grace);
    }
}

/// Aborts the process if its thread unwinds.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

fn is_own(user: UserGroup) -> bool {
    rustix::process::geteuid().as_raw() == user.uid
        && rustix::process::getegid().as_raw() == user.gid
}

fn explain(failure: Failure, prepared: &Prepared, spec: &Spec, cwd: &Path) -> SpawnError {
    let source = io::Error::from_raw_os_error(failure.errno);
    match (failure.step, spec.user) {
        (Step::WorkingDirectory, _) => SpawnError::WorkingDirectory {
            path: lossy(&prepared.cwd),
            source,
        },
        (Step::Execute, _) => {
            let program = prepared.program();
            SpawnError::CannotExecute {
                exists: cwd.join(&program).exists(),
                program,
                source,
            }
        }
        (Step::User, Some(user)) => SpawnError::User { user, source },
        (Step::Terminal, _) => SpawnError::Terminal(source),
        (Step::Clone, _) => SpawnError::Resources {
            what: "a process",
            source,
        },
        (Step::Session | Step::Descriptors | Step::User, _) => SpawnError::Resources {
            what: "the descriptors of a process",
            source,
        },
    }
}
