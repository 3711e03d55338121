//! Everything about a command that can be found out before the fork: which
//! file to execute, its arguments and environment as C strings.

use super::error::SpawnError;
use skyrl_protocol::guest::Program;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// `PATH` of a sandbox that sets none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where a shell is looked for.
pub(super) const SHELLS: [&str; 4] = ["/bin/sh", "/usr/bin/sh", "/bin/bash", "/busybox/sh"];

/// Names of variables that hold credentials of an in-sandbox server and never
/// reach a command.
fn is_secret(name: &[u8]) -> bool {
    name == b"SESSION_API_KEY"
        || name == b"OH_SECRET_KEY"
        || name == b"LMNR_PROJECT_API_KEY"
        || name.starts_with(b"OH_SESSION_API_KEYS_")
        || (name.starts_with(b"OTEL_") && name.ends_with(b"HEADERS"))
}

/// The environment commands start from.
#[derive(Debug, Clone)]
pub struct Environment {
    /// `NAME=value` and the length of the name.
    variables: Vec<(CString, usize)>,
    path: String,
}

impl Environment {
    /// From name and value pairs; secrets of the guest are left out, and
    /// `PATH` is added if missing.
    pub fn new(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut environment = Self {
            variables: Vec::new(),
            path: DEFAULT_PATH.to_owned(),
        };
        let mut has_path = false;
        for (name, value) in variables {
            let name = name.into_vec();
            if is_secret(&name) {
                continue;
            }
            if name == b"PATH" {
                has_path = true;
                environment.path = String::from_utf8_lossy(value.as_bytes()).into_owned();
            }
            let length = name.len();
            let joined = [name, value.into_vec()].join(&b'=');
            if let Ok(joined) = CString::new(joined) {
                environment.variables.push((joined, length));
            }
        }
        if !has_path && let Ok(path) = CString::new(format!("PATH={DEFAULT_PATH}")) {
            environment.variables.push((path, 4));
        }
        environment
    }

    /// Value of a variable.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables
            .iter()
            .find(|(joined, length)| &joined.as_bytes()[..*length] == name.as_bytes())
            .and_then(|(joined, length)| std::str::from_utf8(&joined.as_bytes()[length + 1..]).ok())
    }

    fn with(
        &self,
        added: &BTreeMap<String, String>,
        clear: bool,
    ) -> Result<Vec<CString>, SpawnError> {
        let mut all = Vec::with_capacity(self.variables.len() + added.len());
        if !clear {
            let kept = self.variables.iter().filter(|(joined, length)| {
                std::str::from_utf8(&joined.as_bytes()[..*length])
                    .map_or(true, |name| !added.contains_key(name))
            });
            all.extend(kept.map(|(joined, _)| joined.clone()));
        }
        for (name, value) in added {
            if name.is_empty() || name.contains('=') {
                return Err(SpawnError::Invalid(format!(
                    "{name:?} is not a name of an environment variable"
                )));
            }
            all.push(c_string(
                "an environment variable",
                format!("{name}={value}"),
            )?);
        }
        Ok(all)
    }
}

/// A command ready to be executed.
pub(super) struct Prepared {
    /// Files to try, in order.
    pub(super) candidates: Vec<CString>,
    pub(super) argv: Vec<CString>,
    pub(super) envp: Vec<CString>,
    pub(super) cwd: CString,
}

impl Prepared {
    /// The first candidate, for messages.
    pub(super) fn program(&self) -> String {
        self.candidates
            .first()
            .map(|path| lossy(path))
            .unwrap_or_default()
    }
}

pub(super) fn lossy(text: &CStr) -> String {
    text.to_string_lossy().into_owned()
}

fn c_string(what: &str, text: impl Into<Vec<u8>>) -> Result<CString, SpawnError> {
    CString::new(text).map_err(|_| SpawnError::Invalid(format!("{what} holds a NUL byte")))
}

/// Looks everything up. `cwd` is absolute.
pub(super) fn prepare(
    program: &Program,
    environment: &Environment,
    added: &BTreeMap<String, String>,
    clear: bool,
    cwd: &Path,
) -> Result<Prepared, SpawnError> {
    let envp = environment.with(added, clear)?;
    let cwd_c = c_string("the working directory", cwd.as_os_str().as_bytes())?;
    let (candidates, argv) = match program {
        Program::Shell(line) => {
            let shell = SHELLS
                .into_iter()
                .find(|path| is_program(Path::new(path)))
                .ok_or(SpawnError::NoShell {
                    looked_for: &SHELLS,
                })?;
            let argv = vec![
                c_string("the shell", "sh")?,
                c_string("the shell", "-c")?,
                c_string("the command line", line.as_str())?,
            ];
            (vec![c_string("the shell", shell)?], argv)
        }
        Program::Argv(given) => {
            let argv = given
                .iter()
                .map(|word| c_string("an argument", word.as_str()))
                .collect::<Result<Vec<_>, _>>()?;
            let Some(name) = given.first().filter(|name| !name.is_empty()) else {
                return Err(SpawnError::Invalid("no program is named".to_owned()));
            };
            let path = match added.get("PATH") {
                Some(path) => path.as_str(),
                None if clear => DEFAULT_PATH,
                None => &environment.path,
            };
            (candidates(name, path, cwd)?, argv)
        }
    };
    Ok(Prepared {
        candidates,
        argv,
        envp,
        cwd: cwd_c,
    })
}

/// Files that a program's name may mean. A name with a slash means itself;
/// relative directories of `PATH` are relative to the command's directory.
fn candidates(name: &str, path: &str, cwd: &Path) -> Result<Vec<CString>, SpawnError> {
    if name.contains('/') {
        return Ok(vec![c_string("the program", name)?]);
    }
    let mut found = Vec::new();
    for directory in path.split(':') {
        let candidate = cwd.join(directory).join(name);
        if is_program(&candidate) {
            found.push(c_string("the program", candidate.as_os_str().as_bytes())?);
        }
    }
    if found.is_empty() {
        return Err(SpawnError::NotFound {
            program: name.to_owned(),
            searched: path.to_owned(),
        });
    }
    Ok(found)
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::new(
            variables
                .iter()
                .map(|(name, value)| (OsString::from(name), OsString::from(value))),
        )
    }

    #[test]
    fn secrets_of_the_guest_never_reach_a_command() {
        let base = environment(&[
            ("SESSION_API_KEY", "s"),
            ("OH_SESSION_API_KEYS_0", "s"),
            ("OH_SECRET_KEY", "s"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "s"),
            ("A", "1"),
            ("B", "2"),
        ]);
        let added = BTreeMap::from([("A".to_owned(), "3".to_owned())]);
        let all: Vec<String> = base
            .with(&added, false)
            .unwrap()
            .iter()
            .map(|joined| lossy(joined))
            .collect();
        assert_eq!(all, ["B=2", &format!("PATH={DEFAULT_PATH}"), "A=3"]);
        assert_eq!(base.with(&added, true).unwrap().len(), 1);
        assert_eq!(
            (base.get("B"), base.get("SESSION_API_KEY")),
            (Some("2"), None)
        );
    }

    #[test]
    fn a_name_is_looked_up_in_the_path_of_the_command() {
        let base = environment(&[("PATH", "/nowhere")]);
        let look = |added: &[(&str, &str)], name: &str| {
            let added = added
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect();
            let program = Program::Argv(vec![name.to_owned()]);
            prepare(&program, &base, &added, false, Path::new("/")).map(|p| p.program())
        };
        assert!(matches!(look(&[], "sh"), Err(SpawnError::NotFound { .. })));
        assert_eq!(look(&[("PATH", "/nowhere:bin")], "sh").unwrap(), "/bin/sh");
        assert_eq!(look(&[], "./x").unwrap(), "./x");
        assert!(matches!(look(&[], ""), Err(SpawnError::Invalid(_))));
        assert!(matches!(look(&[], "a\0"), Err(SpawnError::Invalid(_))));
        assert!(matches!(
            look(&[("A=", "")], "/bin/sh"),
            Err(SpawnError::Invalid(_))
        ));
    }
}
