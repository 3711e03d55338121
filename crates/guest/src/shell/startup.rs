//! Which shell an image has, the environment a shell gets, and the start
//! files it reads. Decides; starts nothing.

use super::control::{Flavor, quoted};
use skyrl_protocol::guest::ShellStartup;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// Looked at after the directories of `PATH`.
const USUAL_DIRECTORIES: [&str; 6] = [
    "/bin",
    "/usr/bin",
    "/usr/local/bin",
    "/sbin",
    "/usr/sbin",
    "/usr/local/sbin",
];

/// A shell program of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Absolute path.
    pub(crate) program: String,
    /// What it can do.
    pub(crate) flavor: Flavor,
}

/// bash, else sh; `is_program` says whether a path can be executed. The error
/// says where was looked.
pub(crate) fn find(
    path: &str,
    is_program: impl Fn(&str) -> bool,
    target_of: impl Fn(&str) -> Option<String>,
) -> Result<Found, String> {
    let mut directories: Vec<&str> = path.split(':').filter(|d| d.starts_with('/')).collect();
    directories.extend(USUAL_DIRECTORIES);
    let find = |name: &str| {
        directories
            .iter()
            .map(|directory| format!("{}/{name}", directory.trim_end_matches('/')))
            .find(|candidate| is_program(candidate))
    };
    if let Some(program) = find("bash") {
        return Ok(Found {
            program,
            flavor: Flavor::Bash,
        });
    }
    let program = find("sh").ok_or_else(|| format!("bash and sh in {}", directories.join(":")))?;
    Ok(named(&program, target_of))
}

/// The shell at a path; whether it is bash is told by its file's name.
pub(crate) fn named(program: &str, target_of: impl Fn(&str) -> Option<String>) -> Found {
    match target_of(program) {
        // By its own name: as `sh` it would hold itself back.
        Some(target) if target.ends_with("/bash") => Found {
            program: target,
            flavor: Flavor::Bash,
        },
        _ => Found {
            program: program.to_owned(),
            flavor: Flavor::Posix,
        },
    }
}

/// An account of the image, as far as `/etc/passwd` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    /// Login name.
    pub(crate) name: String,
    /// Home directory.
    pub(crate) home: String,
}

/// The account with this user id; one made up when the file has none.
pub(crate) fn account(uid: u32, passwd: &str) -> Account {
    passwd
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            (fields.len() >= 6 && fields[2].parse() == Ok(uid)).then(|| Account {
                name: fields[0].to_owned(),
                home: fields[5].to_owned(),
            })
        })
        .next()
        .unwrap_or_else(|| match uid {
            0 => Account {
                name: "root".into(),
                home: "/root".into(),
            },
            _ => Account {
                name: uid.to_string(),
                home: "/".into(),
            },
        })
}

/// Adds what a login would set and the environment lacks; `base` tells what
/// the environment has before `env` is added.
pub(crate) fn complete_env(
    env: &mut BTreeMap<String, String>,
    base: impl Fn(&str) -> bool,
    account: &Account,
    switched_user: bool,
    program: &str,
) {
    let mut set = |name: &str, value: &str, even_so: bool| {
        if !env.contains_key(name) && (even_so || !base(name)) {
            env.insert(name.to_owned(), value.to_owned());
        }
    };
    set("HOME", &account.home, switched_user);
    set("USER", &account.name, switched_user);
    set("LOGNAME", &account.name, switched_user);
    set("SHELL", program, false);
    set("TERM", "xterm-256color", false);
}

/// The command that reads the start files; empty when there is nothing to do.
/// `env_file` is the value of `ENV`, which a POSIX shell must not read by
/// itself; `path` is the image's `PATH`.
pub(crate) fn script(
    flavor: Flavor,
    startup: ShellStartup,
    env_file: Option<&str>,
    path: &str,
) -> String {
    let mut script = String::new();
    let source = |script: &mut String, file: &str| {
        let _ = writeln!(script, "if [ -r {file} ]; then . {file}; fi");
    };
    match (flavor, startup) {
        (Flavor::Bash, ShellStartup::Interactive) => {
            source(&mut script, "/etc/bash.bashrc");
            source(&mut script, "~/.bashrc");
        }
        (Flavor::Bash, ShellStartup::Login) => {
            source(&mut script, "/etc/profile");
            script.push_str(
                "if [ -r ~/.bash_profile ]; then . ~/.bash_profile\n\
                 elif [ -r ~/.bash_login ]; then . ~/.bash_login\n\
                 elif [ -r ~/.profile ]; then . ~/.profile; fi\n",
            );
        }
        (Flavor::Posix, ShellStartup::Login) => {
            source(&mut script, "/etc/profile");
            source(&mut script, "~/.profile");
        }
        (Flavor::Posix, ShellStartup::Interactive) | (_, ShellStartup::None) => {}
    }
    if startup == ShellStartup::Login {
        // A profile sets PATH anew; programs of the image must stay
        // reachable, behind what the profile prefers.
        for entry in path.split(':').filter(|entry| !entry.is_empty()) {
            let _ = writeln!(
                script,
                "case \":$PATH:\" in *:{0}:*) ;; *) PATH=\"$PATH\":{0} ;; esac",
                quoted(entry)
            );
        }
    }
    if let (Flavor::Posix, Some(file)) = (flavor, env_file) {
        let _ = writeln!(script, "export ENV={}", quoted(file));
        if startup != ShellStartup::None {
            source(&mut script, "\"$ENV\"");
        }
    }
    script
}

/// Whether a path is a file that somebody may execute.
pub(crate) fn is_program(path: &str) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Where a path leads in the end.
pub(crate) fn target_of(path: &str) -> Option<String> {
    let target = Path::new(path).canonicalize().ok()?;
    Some(target.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bash_is_preferred_and_a_sh_that_is_bash_counts_as_bash() {
        let have = |paths: &'static [&'static str]| move |path: &str| paths.contains(&path);
        let find = |paths, target: Option<&str>| {
            let target = target.map(str::to_owned);
            super::find("/opt/x:/usr/bin", have(paths), move |_| target.clone())
        };
        let bash = find(&["/bin/sh", "/opt/x/bash"], None).expect("found");
        assert_eq!(
            (bash.program.as_str(), bash.flavor),
            ("/opt/x/bash", Flavor::Bash)
        );
        let posix = find(&["/bin/sh"], Some("/bin/busybox")).expect("found");
        assert_eq!(
            (posix.program.as_str(), posix.flavor),
            ("/bin/sh", Flavor::Posix)
        );
        let disguised = find(&["/bin/sh"], Some("/usr/bin/bash")).expect("found");
        assert_eq!(disguised.flavor, Flavor::Bash);
        assert!(find(&[], None).expect_err("none").contains("/opt/x"));
    }

    #[test]
    fn an_unknown_user_still_has_an_account() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nu:x:7:7::/home/u:/bin/sh\n";
        assert_eq!(account(7, passwd).home, "/home/u");
        assert_eq!(account(8, passwd).name, "8");
        assert_eq!(account(0, "").home, "/root");
    }
}
