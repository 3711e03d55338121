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
//! [`session`] holds one shell's state, [`pty`] the process and its terminal,
//! [`text`] turns terminal bytes into bounded text, [`startup`] decides which
//! shell and which start files. Nothing here knows HTTP or a client's
//! dialect.

mod control;
mod error;
mod keys;
mod mark;
mod pty;
mod session;
mod startup;
#[cfg(test)]
mod tests;
mod text;

pub use error::ShellError;
pub(crate) use keys::key_bytes;
pub(crate) use session::{Answer, Facts, Until, Wait};

use control::Flavor;
use mark::Nonce;
use pty::Launch;
use session::Session;
use skyrl_protocol::guest::{ShellInfo, ShellSpec, ShellState};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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

/// What a shell is started with beside its [`ShellSpec`].
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// The sandbox's environment, which the specification's is added to.
    pub(crate) env: BTreeMap<String, String>,
    /// Working directory when the specification has none.
    pub(crate) cwd: String,
    /// Learn after each command which `python` the shell would run.
    pub(crate) probe_python: bool,
    /// How long start files may take.
    pub(crate) patience: Duration,
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
        spec: &ShellSpec,
        surroundings: Surroundings,
    ) -> Result<(Arc<Shell>, String), ShellError> {
        let id = match &spec.id {
            Some(id) if id.is_empty() || id.len() > LONGEST_ID => {
                return Err(ShellError::Unusable("a shell's name has 1 to 256 bytes"));
            }
            Some(id) => id.clone(),
            None => format!("{:016x}", random()?),
        };
        self.reserve(&id)?;
        let started = Shell::start(id.clone(), spec, surroundings);
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
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shell {
    fn start(
        id: String,
        spec: &ShellSpec,
        surroundings: Surroundings,
    ) -> Result<(Self, String), ShellError> {
        let mut env = surroundings.env;
        env.extend(spec.env.iter().map(|(k, v)| (k.clone(), v.clone())));
        if env
            .iter()
            .any(|(k, v)| k.contains(['\0', '=']) || k.is_empty() || v.contains('\0'))
        {
            return Err(ShellError::Unusable(
                "a variable's name is not empty and holds neither NUL nor =, its value no NUL",
            ));
        }
        let path = env.get("PATH").cloned().unwrap_or_default();
        let found = startup::find(&path, startup::is_program, startup::target_of)
            .map_err(|looked_for| ShellError::NoShell { looked_for })?;
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let uid = spec
            .user
            .map_or_else(|| rustix::process::getuid().as_raw(), |user| user.uid);
        let account = startup::account(uid, &passwd);
        startup::complete_env(&mut env, &account, spec.user.is_some(), &found.program);
        let env_file = match found.flavor {
            Flavor::Posix => env.remove("ENV"),
            Flavor::Bash => None,
        };
        let script = startup::script(found.flavor, spec.startup, env_file.as_deref(), &path);
        let cwd = spec.cwd.clone().unwrap_or(surroundings.cwd);
        env.insert("PWD".into(), cwd.clone());
        let launch = Launch {
            program: found.program.clone(),
            flavor: found.flavor,
            env: env.into_iter().collect(),
            cwd: cwd.clone(),
            user: spec.user.map(|user| (user.uid, user.gid)),
            size: (spec.columns.unwrap_or(200), spec.rows.unwrap_or(50)),
            echo: spec.echo,
        };
        let nonce = Nonce::from_u64(random()?);
        let session = Session::start(launch, spec.text, nonce, surroundings.probe_python)
            .map_err(|error| ShellError::launch(error, &found.program, &cwd))?;
        let shell = Self {
            id,
            program: found.program,
            session,
        };
        let output = shell.read_start_files(&script, surroundings.patience)?;
        Ok((shell, output))
    }

    /// Runs the first command, which also proves that the shell answers.
    fn read_start_files(&self, script: &str, patience: Duration) -> Result<String, ShellError> {
        self.session.begin(script, 64 << 10)?;
        let wait = |timeout| Wait {
            timeout,
            quiet: None,
            until: Until::End,
        };
        let answer = self.session.wait(wait(patience));
        match answer.state {
            ShellState::Completed { .. } => Ok(answer.output),
            ShellState::Exited { exit_code } => Err(ShellError::Ended(exit_code)),
            _ => {
                self.session.input(b"\x03")?;
                let mut output = answer.output;
                let answer = self.session.wait(wait(INTERRUPT_PATIENCE));
                output.push_str(&answer.output);
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
            pid: i32::try_from(self.session.pid()).unwrap_or(-1),
            shell: self.program.clone(),
            busy: self.session.is_busy(),
            alive: self.session.is_alive(),
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

/// 64 random bits.
fn random() -> Result<u64, ShellError> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is valid for as many bytes as are asked for.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) == Ok(bytes.len()) {
        Ok(u64::from_ne_bytes(bytes))
    } else {
        Err(ShellError::Terminal(io::Error::last_os_error()))
    }
}
