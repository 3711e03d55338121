//! The zygote's loop: it waits for questions, for clones to finish their
//! set-up, and for sandboxes to end, and never for anything else.

use crate::spawn::{Cloned, Parent};
use crate::step::{Failed, Step};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid,
};
use skyrl_protocol::SandboxId;
use skyrl_protocol::zygote::{
    Ask, MAX_MESSAGE, NetworkPlan, StartPlan, StepFailure, Tell, VERSION,
};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Engines connected at the same time, at most.
const MAX_CONNECTIONS: usize = 8;

/// Messages taken from one connection in a row.
const MAX_BURST: usize = 16;

/// Bytes of a failure or of a program's words that are looked at.
const MAX_WORDS: usize = 4096;

/// How long killed sandboxes may take before the zygote ends regardless (the
/// kernel then kills them again).
const LAST_WAIT: Duration = Duration::from_secs(10);

/// A zygote at work.
#[derive(Debug)]
pub struct Server {
    listener: OwnedFd,
    parent: Parent,
    grace: Duration,
    connections: BTreeMap<u64, OwnedFd>,
    next_connection: u64,
    sandboxes: BTreeMap<SandboxId, Sandbox>,
    /// When the last engine left.
    alone_since: Instant,
    ending: Option<Ending>,
}

#[derive(Debug)]
struct Ending {
    since: Instant,
    tell: Option<Asker>,
}

/// Who asked what.
#[derive(Debug, Clone, Copy)]
struct Asker {
    connection: u64,
    seq: u64,
}

#[derive(Debug)]
struct Sandbox {
    pid: i32,
    pidfd: OwnedFd,
    output: OwnedFd,
    v1_freezer: Option<PathBuf>,
    network: NetworkPlan,
    phase: Phase,
    /// Who waits for it to be gone.
    stops: Vec<Asker>,
    helper: Option<Helper>,
}

#[derive(Debug)]
enum Phase {
    /// It sets itself up; words that arrive are its failure.
    SettingUp {
        asker: Asker,
        failure: OwnedFd,
        words: Vec<u8>,
    },
    /// The guest was executed, its network is being connected.
    Connecting {
        asker: Asker,
    },
    Running,
    /// It could not be started and is being killed.
    Failed {
        asker: Asker,
        failure: StepFailure,
    },
}

/// The program that connects a sandbox's network.
#[derive(Debug)]
struct Helper {
    pid: i32,
    pidfd: OwnedFd,
    ready: Option<OwnedFd>,
    words: OwnedFd,
}

/// What a descriptor in the poll set belongs to.
#[derive(Debug, Clone)]
enum Source {
    Listener,
    Connection(u64),
    Failure(SandboxId),
    HelperReady(SandboxId),
    HelperEnd(SandboxId),
    End(SandboxId),
}

impl Server {
    /// A zygote that ends `grace` after the last engine left.
    pub fn new(listener: OwnedFd, parent: Parent, grace: Duration) -> Self {
        Self {
            listener,
            parent,
            grace,
            connections: BTreeMap::new(),
            next_connection: 0,
            sandboxes: BTreeMap::new(),
            alone_since: Instant::now(),
            ending: None,
        }
    }

    /// Serves until asked to end or left alone.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub fn run(&mut self) -> Result<(), Failed> {
        loop {
            if self.is_over() {
                return Ok(());
            }
            for source in self.wait()? {
                self.handle(source);
            }
            if self.ending.is_none()
                && self.connections.is_empty()
                && self.alone_since.elapsed() >= self.grace
            {
                self.end(None);
            }
        }
    }

    fn is_over(&mut self) -> bool {
        let Some(ending) = &self.ending else {
            return false;
        };
        if !self.sandboxes.is_empty() && ending.since.elapsed() < LAST_WAIT {
            return false;
        }
        if let Some(asker) = ending.tell {
            self.tell(asker.connection, &Tell::ShuttingDown { seq: asker.seq });
        }
        true
    }

    /// Waits until something happened, or it is time to look at the clock.
    fn wait(&self) -> Result<Vec<Source>, Failed> {
        let mut sources = vec![(Source::Listener, self.listener.as_fd())];
        for (number, connection) in &self.connections {
            sources.push((Source::Connection(*number), connection.as_fd()));
        }
        for (id, sandbox) in &self.sandboxes {
            if let Phase::SettingUp { failure, .. } = &sandbox.phase {
                sources.push((Source::Failure(id.clone()), failure.as_fd()));
            }
            if let Some(helper) = &sandbox.helper {
                if let Some(ready) = &helper.ready {
                    sources.push((Source::HelperReady(id.clone()), ready.as_fd()));
                }
                sources.push((Source::HelperEnd(id.clone()), helper.pidfd.as_fd()));
            }
            sources.push((Source::End(id.clone()), sandbox.pidfd.as_fd()));
        }
        let mut fds: Vec<PollFd<'_>> = sources
            .iter()
            .map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        let timeout = self.timeout().map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Err(Errno::INTR) => return Ok(Vec::new()),
            result => result.step("waiting for", "events")?,
        };
        Ok(fds
            .iter()
            .zip(&sources)
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, (source, _))| source.clone())
            .collect())
    }

    fn timeout(&self) -> Option<Duration> {
        let margin = Duration::from_millis(1);
        if let Some(ending) = &self.ending {
            return Some(LAST_WAIT.saturating_sub(ending.since.elapsed()) + margin);
        }
        self.connections
            .is_empty()
            .then(|| self.grace.saturating_sub(self.alone_since.elapsed()) + margin)
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Listener => self.accept(),
            Source::Connection(number) => self.receive(number),
            Source::Failure(id) => self.read_failure(&id),
            Source::HelperReady(id) => self.helper_ready(&id),
            Source::HelperEnd(id) => self.helper_ended(&id),
            Source::End(id) => self.ended(&id),
        }
    }

    fn accept(&mut self) {
        let Ok(connection) =
            accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        else {
            return;
        };
        let own = rustix::process::geteuid();
        let trusted = rustix::net::sockopt::socket_peercred(&connection)
            .is_ok_and(|peer| peer.uid == own || peer.uid.is_root());
        if !trusted || self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let number = self.next_connection;
        self.next_connection += 1;
        self.connections.insert(number, connection);
        self.tell(number, &Tell::Hello { version: VERSION });
    }

    fn disconnect(&mut self, number: u64) {
        if self.connections.remove(&number).is_some() && self.connections.is_empty() {
            self.alone_since = Instant::now();
        }
    }

    /// Sends without waiting; an engine that does not read is cut off.
    fn tell(&mut self, number: u64, tell: &Tell) {
        let Some(connection) = self.connections.get(&number) else {
            return;
        };
        let sent = serde_json::to_vec(tell)
            .ok()
            .map(|text| send(connection, &text, SendFlags::NOSIGNAL | SendFlags::DONTWAIT));
        if !matches!(sent, Some(Ok(_))) {
            self.disconnect(number);
        }
    }

    fn tell_all(&mut self, tell: &Tell) {
        let numbers: Vec<u64> = self.connections.keys().copied().collect();
        for number in numbers {
            self.tell(number, tell);
        }
    }

    fn receive(&mut self, number: u64) {
        let mut packet = vec![0u8; MAX_MESSAGE + 1];
        for _ in 0..MAX_BURST {
            let Some(connection) = self.connections.get(&number) else {
                return;
            };
            match recv(connection, &mut packet[..], RecvFlags::DONTWAIT) {
                Ok((n, _)) if n > 0 => match serde_json::from_slice(&packet[..n]) {
                    Ok(ask) => self.answer(number, ask),
                    Err(error) => self.tell(
                        number,
                        &Tell::Refused {
                            seq: 0,
                            reason: error.to_string(),
                        },
                    ),
                },
                Err(Errno::AGAIN | Errno::INTR) => return,
                _ => return self.disconnect(number),
            }
        }
    }

    fn answer(&mut self, connection: u64, ask: Ask) {
        match ask {
            Ask::Start { seq, plan } => self.start(Asker { connection, seq }, &plan),
            Ask::Stop { seq, id } => match self.sandboxes.get_mut(&id) {
                Some(sandbox) => {
                    sandbox.stops.push(Asker { connection, seq });
                    sandbox.kill();
                }
                None => self.tell(connection, &Tell::Stopped { seq }),
            },
            Ask::List { seq } => {
                let sandboxes = self
                    .sandboxes
                    .iter()
                    .map(|(id, sandbox)| (id.clone(), sandbox.pid))
                    .collect();
                self.tell(connection, &Tell::Listed { seq, sandboxes });
            }
            Ask::Shutdown { seq } => self.end(Some(Asker { connection, seq })),
        }
    }

    fn start(&mut self, asker: Asker, plan: &StartPlan) {
        let refuse = if self.ending.is_some() {
            Some("the zygote is ending".to_owned())
        } else if self.sandboxes.contains_key(&plan.id) {
            Some(format!("sandbox {} runs already", plan.id))
        } else {
            None
        };
        if let Some(reason) = refuse {
            let seq = asker.seq;
            return self.tell(asker.connection, &Tell::Refused { seq, reason });
        }
        match self.parent.start(plan) {
            Ok(cloned) => {
                self.sandboxes
                    .insert(plan.id.clone(), Sandbox::new(cloned, plan, asker));
            }
            Err(failed) => self.tell(
                asker.connection,
                &Tell::StartFailed {
                    seq: asker.seq,
                    failure: failed.0,
                },
            ),
        }
    }

    /// Kills everything; the loop ends when all is gone.
    fn end(&mut self, tell: Option<Asker>) {
        for sandbox in self.sandboxes.values() {
            sandbox.kill();
        }
        self.ending = Some(Ending {
            since: Instant::now(),
            tell,
        });
    }

    fn read_failure(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else {
            return;
        };
        let Phase::SettingUp {
            asker,
            failure,
            words,
        } = &mut sandbox.phase
        else {
            return;
        };
        let asker = *asker;
        let mut buffer = [0u8; 1024];
        match rustix::io::read(&*failure, &mut buffer) {
            Ok(n) if n > 0 => {
                let room = MAX_WORDS.saturating_sub(words.len());
                words.extend_from_slice(&buffer[..n.min(room)]);
                return;
            }
            Err(Errno::INTR) => return,
            _ => {}
        }
        if !words.is_empty() {
            let failure = serde_json::from_slice(words).unwrap_or_else(|_| StepFailure {
                step: "setting up".into(),
                subject: String::from_utf8_lossy(words).into_owned(),
                errno: 0,
            });
            sandbox.fail(asker, failure);
            return;
        }
        sandbox.phase = Phase::Connecting { asker };
        match sandbox.network.clone() {
            NetworkPlan::Helper { argv } => match Helper::start(&argv, sandbox.pid) {
                Ok(helper) => sandbox.helper = Some(helper),
                Err(failed) => sandbox.fail(asker, failed.0),
            },
            NetworkPlan::Loopback | NetworkPlan::Host => self.started(id),
        }
    }

    /// The guest runs and its network works.
    fn started(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else {
            return;
        };
        let Phase::Connecting { asker } = sandbox.phase else {
            return;
        };
        // A clone that was killed closes its pipe like one that executed the
        // guest; it must not be reported as running.
        if is_readable(sandbox.pidfd.as_fd()) {
            return;
        }
        sandbox.phase = Phase::Running;
        let pid = sandbox.pid;
        self.tell(
            asker.connection,
            &Tell::Started {
                seq: asker.seq,
                pid,
            },
        );
    }

    fn helper_ready(&mut self, id: &SandboxId) {
        let Some(helper) = self
            .sandboxes
            .get_mut(id)
            .and_then(|sandbox| sandbox.helper.as_mut())
        else {
            return;
        };
        let Some(ready) = helper.ready.take() else {
            return;
        };
        let mut byte = [0u8; 1];
        // Closed without a word: it is about to end, which is noticed apart.
        if rustix::io::read(&ready, &mut byte) == Ok(1) {
            self.started(id);
        }
    }

    fn helper_ended(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else {
            return;
        };
        let Some(helper) = sandbox.helper.take() else {
            return;
        };
        reap(helper.pid);
        if let Phase::Connecting { asker } = sandbox.phase {
            let failure = StepFailure {
                step: "connecting the network:".into(),
                subject: last_words(&helper.words),
                errno: 0,
            };
            sandbox.fail(asker, failure);
        }
    }

    fn ended(&mut self, id: &SandboxId) {
        let Some(mut sandbox) = self.sandboxes.remove(id) else {
            return;
        };
        let status = reap(sandbox.pid);
        if let Some(helper) = sandbox.helper.take() {
            let _ = pidfd_send_signal(&helper.pidfd, Signal::KILL);
            reap(helper.pid);
        }
        let output = last_words(&sandbox.output);
        match sandbox.phase {
            Phase::Failed { asker, failure } => self.tell(
                asker.connection,
                &Tell::StartFailed {
                    seq: asker.seq,
                    failure,
                },
            ),
            Phase::SettingUp { asker, .. } | Phase::Connecting { asker } => self.tell(
                asker.connection,
                &Tell::StartFailed {
                    seq: asker.seq,
                    failure: StepFailure {
                        step: "starting".into(),
                        subject: format!("the guest: it ended with wait status {status} {output}"),
                        errno: 0,
                    },
                },
            ),
            Phase::Running => self.tell_all(&Tell::Exited {
                id: id.clone(),
                status,
                output,
            }),
        }
        for asker in sandbox.stops {
            self.tell(asker.connection, &Tell::Stopped { seq: asker.seq });
        }
    }
}

impl Sandbox {
    fn new(cloned: Cloned, plan: &StartPlan, asker: Asker) -> Self {
        Self {
            pid: cloned.pid,
            pidfd: cloned.pidfd,
            output: cloned.output,
            v1_freezer: plan.cgroups.v1_freezer.clone(),
            network: plan.network.clone(),
            phase: Phase::SettingUp {
                asker,
                failure: cloned.failure,
                words: Vec::new(),
            },
            stops: Vec::new(),
            helper: None,
        }
    }

    /// Kills its first process, and with it, the kernel sees to that, all
    /// others of its PID namespace.
    fn kill(&self) {
        if let Some(state) = &self.v1_freezer {
            // What a v1 freezer holds does not even die.
            let _ = std::fs::write(state, "THAWED");
        }
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    fn fail(&mut self, asker: Asker, failure: StepFailure) {
        self.phase = Phase::Failed { asker, failure };
        self.kill();
    }
}

impl Helper {
    fn start(argv: &[String], sandbox: i32) -> Result<Self, Failed> {
        let (ready, ready_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .step("making", "a pipe for the network helper")?;
        let number = ready_end.as_raw_fd();
        let argv: Vec<String> = argv
            .iter()
            .map(|word| {
                word.replace("{pid}", &sandbox.to_string())
                    .replace("{ready}", &number.to_string())
            })
            .collect();
        let Some((program, arguments)) = argv.split_first() else {
            return Err(Failed::because(
                "starting",
                "a network helper without a name",
            ));
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: only calls that are safe between fork and exec.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                let ready = BorrowedFd::borrow_raw(number);
                rustix::io::fcntl_setfd(ready, rustix::io::FdFlags::empty())?;
                Ok(())
            });
        }
        let mut child = command.spawn().step("running", program)?;
        let pid = child.id() as i32;
        let pidfd = Pid::from_raw(pid)
            .ok_or(Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .step("watching", program)?;
        let words = child.stderr.take().map(OwnedFd::from);
        let words = words.ok_or(Errno::BADF).step("listening to", program)?;
        let _ = rustix::io::ioctl_fionbio(&words, true);
        Ok(Self {
            pid,
            pidfd,
            ready: Some(ready),
            words,
        })
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}

/// Wait status of a child that ended.
fn reap(pid: i32) -> i32 {
    Pid::from_raw(pid)
        .and_then(|pid| waitpid(Some(pid), WaitOptions::empty()).ok().flatten())
        .map_or(0, |(_, status)| status.as_raw())
}

/// What is left in a pipe, up to a bound.
fn last_words(pipe: &OwnedFd) -> String {
    let mut all = Vec::new();
    let mut buffer = [0u8; MAX_WORDS];
    while all.len() < MAX_WORDS {
        match rustix::io::read(pipe, &mut buffer) {
            Ok(n) if n > 0 => all.extend_from_slice(&buffer[..n]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&all).trim().to_owned()
}
