//! The configuration our Podman runs with. Pure text: nothing of the user's or
//! the machine's own Podman configuration is taken over.

use super::layout::Layout;
use std::path::{Path, PathBuf};

/// Capabilities of a sandbox's root: enough to install packages and to change
/// owners; no raw sockets, no device nodes, no audit log.
pub(super) const CAPABILITIES: [&str; 11] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Bytes of a guest's log that are kept.
const LOG_BYTES: u64 = 64 * 1024;

/// A program that runs containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Runtime {
    /// `crun` or `runc`.
    pub(super) name: &'static str,
    pub(super) path: PathBuf,
}

impl Runtime {
    /// Whether it makes control groups even when told not to.
    pub(super) fn makes_groups(&self) -> bool {
        self.name == RUNC
    }
}

/// The runtime that needs a wrapper.
const RUNC: &str = "runc";

/// A TOML string.
fn quoted(text: impl AsRef<Path>) -> String {
    let mut out = String::from("\"");
    for c in text.as_ref().to_string_lossy().chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn list<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    let items: Vec<String> = items.into_iter().map(quoted).collect();
    format!("[{}]", items.join(", "))
}

/// `containers.conf`.
pub(super) fn containers_conf(layout: &Layout, runtime: &Runtime) -> String {
    let capabilities = list(CAPABILITIES);
    let seccomp = quoted(layout.conf().join("seccomp.json"));
    let wrapper = quoted(layout.conf().join("conmon"));
    let networks = quoted(layout.engine().join("networks"));
    let Runtime { name, path } = runtime;
    let path = match *name {
        RUNC => quoted(layout.conf().join(RUNC)),
        _ => quoted(path),
    };
    format!(
        r#"# Written by skyrl for one owner's Podman; changes are overwritten.
[containers]
base_hosts_file = "none"
default_capabilities = {capabilities}
# Podman 4.3 swaps hard and soft limits given here: requests carry them.
default_ulimits = []
env = []
http_proxy = false
init = false
label = false
log_driver = "k8s-file"
log_size_max = {LOG_BYTES}
netns = "none"
pids_limit = 0
seccomp_profile = {seccomp}

[engine]
cgroup_manager = "cgroupfs"
conmon_path = [{wrapper}]
events_logger = "none"
hooks_dir = []
# One lock file per container below our own directory; the default is one
# shared memory segment for all Podmans of a user, of fixed size.
lock_type = "file"
runtime = "{name}"
# Podman 4.3 reads the first name, its documentation and later versions have
# the second.
runtime_supports_nocgroup = ["crun", "runc"]
runtime_supports_nocgroups = ["crun", "runc"]

[engine.runtimes]
{name} = [{path}]

[network]
network_backend = "netavark"
network_config_dir = {networks}
"#
    )
}

/// `storage.conf`. Sandboxes bring their own root file systems, so Podman's
/// storage holds empty ones only, and the simplest driver does.
pub(super) fn storage_conf(layout: &Layout) -> String {
    let graph_root = quoted(layout.graph_root());
    let run_root = quoted(layout.runtime_dir().join("containers"));
    format!(
        r#"# Written by skyrl for one owner's Podman; changes are overwritten.
[storage]
driver = "vfs"
graphroot = {graph_root}
runroot = {run_root}
rootless_storage_path = {graph_root}
"#
    )
}

/// A word for `sh`.
fn shell_word(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}

/// What Podman runs in place of runc: Podman tells a runtime to leave control
/// groups alone with an option that only crun knows.
pub(super) fn runc_wrapper(runtime: &Runtime) -> Option<String> {
    let path = shell_word(&runtime.path);
    runtime.makes_groups().then(|| {
        format!(
            r#"#!/bin/sh
# Written by skyrl: runs runc without the option that only crun knows.
left=$#
while [ "$left" -gt 0 ]; do
    word=$1
    shift
    left=$((left - 1))
    case $word in
    --cgroup-manager)
        shift
        left=$((left - 1))
        ;;
    *) set -- "$@" "$word" ;;
    esac
done
exec {path} "$@"
"#
        )
    })
}

/// What Podman runs in place of its monitor: enters the sandbox's control
/// groups, which the runtime then leaves alone, and drops the exit command,
/// because that is a whole `podman container cleanup` (50 ms of CPU and the
/// database's lock) for what removing the sandbox does anyway.
pub(super) fn monitor_wrapper(monitor: &Path, sandboxes: &Path) -> String {
    let monitor = shell_word(monitor);
    let sandboxes = shell_word(sandboxes);
    format!(
        r#"#!/bin/sh
# Written by skyrl: runs Podman's monitor in the sandbox's control groups and
# without an exit command.
monitor={monitor}
sandboxes={sandboxes}
name=
left=$#
while [ "$left" -gt 0 ]; do
    word=$1
    shift
    left=$((left - 1))
    case $word in
    --exit-command | --exit-command-arg | --exit-delay)
        shift
        left=$((left - 1))
        ;;
    -n)
        name=$1
        shift
        left=$((left - 1))
        set -- "$@" -n "$name"
        ;;
    *) set -- "$@" "$word" ;;
    esac
done
if [ -n "$name" ] && [ -e "$sandboxes/$name/cgroup.files" ]; then
    while read -r file; do
        echo 0 >"$file" || exit 1
    done <"$sandboxes/$name/cgroup.files"
fi
exec "$monitor" "$@"
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_quotes_stays_one_string_in_toml_and_in_sh() {
        assert_eq!(quoted(r#"/a "b" \c"#), r#""/a \"b\" \\c""#);
        assert_eq!(shell_word(Path::new("/it's")), r"'/it'\''s'");
    }

    #[test]
    fn the_monitor_gets_its_arguments_without_the_exit_command() {
        let dir = tempfile::tempdir().unwrap();
        let sandboxes = dir.path().join("sand boxes");
        std::fs::create_dir_all(sandboxes.join("box-1")).unwrap();
        let entered = dir.path().join("entered");
        std::fs::write(
            sandboxes.join("box-1/cgroup.files"),
            format!("{}\n", entered.display()),
        )
        .unwrap();
        let script = monitor_wrapper(Path::new("/bin/echo"), &sandboxes);
        let run = |arguments: &[&str]| {
            let output = std::process::Command::new("/bin/sh")
                .args(["-c", &script, "conmon"])
                .args(arguments)
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let words = [
            "-c",
            "id",
            "-n",
            "box-1",
            "--exit-command",
            "/usr/bin/podman",
            "--exit-command-arg",
            "a b",
            "--full attach",
            "-l",
            "x y",
        ];
        assert_eq!(run(&words), "-c id -n box-1 --full attach -l x y\n");
        assert_eq!(std::fs::read_to_string(&entered).unwrap(), "0\n");
        assert_eq!(run(&["-v", "x"]), "-v x\n");
    }
}
