//! Persistent shells: each a real shell of the image on a pseudo-terminal,
//! whose directory, variables, functions and jobs last from one command to
//! the next.
//!
//! How a command's end is known: the shell reads commands from a pipe of its
//! own (never from the terminal, so no program can eat them and nothing is
//! echoed), and around each it prints marks with a random number to the
//! terminal, in line with the output ([`mark`], [`control`]). No prompt is
//! guessed, nothing is polled, and an answer can't belong to another command:
//! marks carry the command's number.
//!
//! [`session`] is one shell to its callers, [`pump`] the thread that serves its
//! terminal, [`state`] what both know, [`pty`] the process and its terminal;
//! [`text`] turns terminal bytes into bounded text, [`startup`] decides which
//! shell and which start files. Nothing here knows HTTP or a client's
//! dialect.

mod control;
mod error;
mod keys;
mod mark;
mod pty;
mod pump;
mod session;
mod startup;
mod state;
mod text;

pub use error::ShellError;
pub(crate) use keys::key_bytes;
pub(crate) use session::{Answer, Find, Until, Wait, find_texts};
pub(crate) use text::Invalid;

use crate::process::Processes;
use crate::sync::lock;
use control::Flavor;
use mark::Nonce;
use pty::Launch;
use session::Session;
use skyrl_protocol::guest::{ShellInfo, ShellSpec, ShellState};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use text::Renderer;

/// Most shells alive at a time.
const MOST_SHELLS: usize = 256;
/// Longest name of a shell, in bytes.
const LONGEST_ID: usize = 256;
/// How long start files may take.
pub(crate) const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long start files that took too long have to heed an interrupt.
const INTERRUPT_PATIENCE: Duration = Duration::from_secs(1);

/// A persistent shell.
pub(crate) struct Shell {
    id: String,
    program: String,
    session: Session,
}

/// What dialects want of a shell beside its [`ShellSpec`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extras {
    /// Learn after each command which `python` the shell would run.
    pub(crate) probe_python: bool,
    /// How long start files may take.
    pub(crate) patience: Duration,
    /// What becomes of bytes that are no UTF-8.
    pub(crate) invalid: Invalid,
}

impl Default for Extras {
    fn default() -> Self {
        Self {
            probe_python: false,
            patience: START_PATIENCE,
            invalid: Invalid::default(),
        }
    }
}

/// All persistent shells of the guest, by name.
#[derive(Default)]
pub struct Shells {
    /// A name without a shell is taken: its shell is being started.
    table: Mutex<HashMap<String, Option<Arc<Shell>>>>,
}

impl Shells {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a shell and lets it read its start files; gives it and what
    /// they printed.
    pub(crate) fn create(
        &self,
        processes: &Processes,
        spec: &ShellSpec,
        extras: Extras,
    ) -> Result<(Arc<Shell>, String), ShellError> {
        let id = match &spec.id {
            Some(id) if id.is_empty() || id.len() > LONGEST_ID => {
                return Err(ShellError::Unusable("a shell's name has 1 to 256 bytes"));
            }
            Some(id) => id.clone(),
            None => crate::random_id(),
        };
        self.reserve(&id)?;
        let started = Shell::start(id.clone(), processes, spec, extras);
        let mut table = self.lock();
        match started {
            Ok((shell, output)) => {
                let shell = Arc::new(shell);
                table.insert(id, Some(Arc::clone(&shell)));
                Ok((shell, output))
            }
            Err(error) => {
                table.remove(&id);
                Err(error)
            }
        }
    }

    fn reserve(&self, id: &str) -> Result<(), ShellError> {
        let mut table = self.lock();
        if table.contains_key(id) {
            return Err(ShellError::Exists(id.to_owned()));
        }
        if table.len() >= MOST_SHELLS {
            table.retain(|_, shell| shell.as_ref().is_none_or(|shell| shell.session.is_alive()));
        }
        if table.len() >= MOST_SHELLS {
            return Err(ShellError::TooMany { limit: MOST_SHELLS });
        }
        table.insert(id.to_owned(), None);
        Ok(())
    }

    /// The shell of a name.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Shell>, ShellError> {
        self.lock()
            .get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| ShellError::NotFound(id.to_owned()))
    }

    /// All shells, sorted by name.
    pub fn list(&self) -> Vec<ShellInfo> {
        let mut list: Vec<ShellInfo> = self
            .lock()
            .values()
            .flatten()
            .map(|shell| shell.info())
            .collect();
        list.sort_by(|a, b| a.id.cmp(&b.id));
        list
    }

    /// Shells alive now.
    pub fn alive(&self) -> usize {
        self.lock()
            .values()
            .flatten()
            .filter(|shell| shell.session.is_alive())
            .count()
    }

    /// Kills a shell and all processes of its session, and forgets it.
    pub(crate) fn close(&self, id: &str) -> Result<(), ShellError> {
        let shell = self.get(id)?;
        shell.session.close();
        let mut table = self.lock();
        // Another caller may have closed it and made a new one meanwhile.
        let same = |entry: &Option<Arc<Shell>>| {
            entry
                .as_ref()
                .is_some_and(|entry| Arc::ptr_eq(entry, &shell))
        };
        if table.get(id).is_some_and(same) {
            table.remove(id);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Shell>>>> {
        lock(&self.table)
    }
}

impl Shell {
    fn start(
        id: String,
        processes: &Processes,
        spec: &ShellSpec,
        extras: Extras,
    ) -> Result<(Self, String), ShellError> {
        let mut env = spec.env.clone();
        let base = &processes.settings().environment;
        let variable = |name: &str| {
            spec.env
                .get(name)
                .map_or_else(|| base.get(name), |v| Some(v))
        };
        let path = variable("PATH").unwrap_or_default();
        let found = match &spec.program {
            Some(program) => startup::named(program, startup::target_of),
            None => startup::find(path, startup::is_program, startup::target_of)
                .map_err(|looked_for| ShellError::NoShell { looked_for })?,
        };
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let uid = spec
            .user
            .map_or_else(|| rustix::process::getuid().as_raw(), |user| user.uid);
        let account = startup::account(uid, &passwd);
        let has = |name: &str| base.get(name).is_some();
        startup::complete_env(&mut env, has, &account, spec.user.is_some(), &found.program);
        let env_file = match found.flavor {
            Flavor::Posix => variable("ENV").filter(|file| !file.is_empty()),
            Flavor::Bash => None,
        };
        let script = startup::script(found.flavor, spec.startup, env_file, path);
        if env_file.is_some() {
            // Empty: the shell must not read it by itself.
            env.insert("ENV".into(), String::new());
        }
        let cwd = processes.directory(spec.cwd.as_deref());
        let cwd = cwd.to_string_lossy().into_owned();
        env.insert("PWD".into(), cwd.clone());
        let launch = Launch {
            program: found.program.clone(),
            flavor: found.flavor,
            env,
            cwd,
            user: spec.user,
            size: (spec.columns.unwrap_or(200), spec.rows.unwrap_or(50)),
            echo: spec.echo,
        };
        let renderer = Renderer::new(spec.text, extras.invalid);
        let nonce = Nonce::new(&crate::random_id());
        let session = Session::start(processes, &launch, renderer, nonce, extras.probe_python)?;
        let shell = Self {
            id,
            program: found.program,
            session,
        };
        let output = shell.read_start_files(&script, extras.patience)?;
        Ok((shell, output))
    }

    /// Runs the first command, which also proves that the shell answers.
    fn read_start_files(&self, script: &str, patience: Duration) -> Result<String, ShellError> {
        self.session.begin(script, 64 << 10)?;
        let answer = self.session.wait(Wait::for_end(patience, None));
        match answer.state {
            ShellState::Completed { .. } => Ok(answer.output),
            ShellState::Exited { exit_code } => Err(ShellError::Ended(exit_code)),
            _ => {
                let mut output = answer.output;
                output.push_str(&self.session.interrupt(INTERRUPT_PATIENCE)?.output);
                Err(ShellError::StartTimeout { output })
            }
        }
    }

    /// Its name.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// As listed.
    pub(crate) fn info(&self) -> ShellInfo {
        ShellInfo {
            id: self.id.clone(),
            pid: self.session.pid(),
            shell: self.program.clone(),
            busy: self.session.is_busy(),
            alive: self.session.is_alive(),
            replaced: self.session.is_replaced(),
        }
    }

    /// What it runs in and knows.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Starts a command and waits.
    pub(crate) fn run(
        &self,
        command: &str,
        output_limit: usize,
        wait: Wait<'_>,
    ) -> Result<Answer, ShellError> {
        self.session.begin(command, output_limit)?;
        Ok(self.session.wait(wait))
    }
}

/// Login name of the guest's own user.
pub(crate) fn user_name() -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    startup::account(rustix::process::getuid().as_raw(), &passwd).name
}
