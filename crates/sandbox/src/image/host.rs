//! The `host` image: this machine's own programs, read-only, over a small
//! root made here. Planning is pure apart from reading; the plan's digest is
//! the image's digest.
//!
//! Shown as they are (bound read-only): `/usr`, and `/bin`, `/sbin`, `/lib*`
//! where they are directories of their own rather than links into `/usr`.
//! Copied into the synthetic `/etc`: what programs below `/usr` need to run
//! (loader cache, alternatives, certificate bundles, time zone and the like),
//! and of that only what everybody on the machine may read and what holds no
//! private key. Nothing of `/root`, `/home`, `/var`, `/opt`, no account data,
//! no machine identity, no keys, no site configuration; `/usr/local/etc` and
//! `/usr/local/var`, where sites keep such things, appear empty. Programs
//! installed elsewhere (`/opt`, a home directory, an environment of modules)
//! are not part of it.

use super::image::{ImageConfig, ReadOnlyBind};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Names below `/etc` that are copied. Those ending in `*` are prefixes.
const PUBLIC: [&str; 37] = [
    "R",
    "alternatives",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "fonts",
    "inputrc",
    "java*",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "localtime",
    "lsb-release",
    "magic",
    "mime.types",
    "os-release",
    "perl",
    "pki/ca-trust/extracted",
    "pki/tls/cert.pem",
    "pki/tls/certs",
    "pki/tls/openssl.cnf",
    "pki/tls/openssl.d",
    "protocols",
    "python*",
    "redhat-release",
    "rpc",
    "services",
    "shells",
    "ssl/cert.pem",
    "ssl/certs",
    "ssl/openssl.cnf",
    "system-release",
    "terminfo",
    "timezone",
    "vulkan",
    "xattr.conf",
];

/// Bounds on what is copied from `/etc`: a file, all files, all entries.
const MAX_FILE: u64 = 8 << 20;
const MAX_TOTAL: u64 = 128 << 20;
const MAX_ENTRIES: usize = 20_000;
const MAX_NESTING: usize = 8;

/// Directories every root has, with their modes.
const DIRECTORIES: [(&str, u32); 31] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("etc/profile.d", 0o755),
    ("home", 0o755),
    ("media", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("run/lock", 0o1777),
    ("srv", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("var", 0o755),
    ("var/cache", 0o755),
    ("var/lib", 0o755),
    ("var/local", 0o755),
    ("var/log", 0o755),
    ("var/mail", 0o755),
    ("var/opt", 0o755),
    ("var/spool", 0o755),
    ("var/tmp", 0o1777),
    ("workspace", 0o755),
    (".skyrl-host", 0o755),
    (".skyrl-host/empty", 0o755),
    ("etc/ssl", 0o755),
    ("etc/pki", 0o755),
    ("etc/pki/tls", 0o755),
    ("etc/pki/ca-trust", 0o755),
];

/// Source, inside the layer, of the empty directories shown over parts of
/// `/usr`.
const EMPTY: &str = ".skyrl-host/empty";

const FILES: [(&str, &str); 10] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\n\
         daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n\
         bin:x:2:2:bin:/bin:/usr/sbin/nologin\n\
         nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    ),
    (
        "etc/group",
        "root:x:0:\ndaemon:x:1:\nbin:x:2:\ntty:x:5:\nmail:x:8:\nusers:x:100:\nnogroup:x:65534:\n",
    ),
    (
        "etc/hosts",
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    ),
    ("etc/host.conf", "multi on\n"),
    ("etc/hostname", "sandbox\n"),
    // The engine fills it if the sandbox has a network.
    ("etc/resolv.conf", ""),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n\
         networks: files\nprotocols: files\nservices: files\n",
    ),
    (
        "etc/profile",
        "export PATH=\"${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}\"\n\
         for part in /etc/profile.d/*.sh; do\n  [ -r \"$part\" ] && . \"$part\"\ndone\nunset part\n",
    ),
    ("etc/fstab", ""),
    ("etc/motd", ""),
];

const LINKS: [(&str, &str); 3] = [
    ("etc/mtab", "../proc/self/mounts"),
    ("var/run", "../run"),
    ("var/lock", "../run/lock"),
];

/// What the layer holds, by path relative to its root.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Directory(u32),
    File(Vec<u8>, u32),
    Link(PathBuf),
}

/// A planned `host` image.
#[derive(Debug, Clone)]
pub(super) struct HostPlan {
    entries: BTreeMap<PathBuf, Entry>,
    /// Directories of the machine shown inside, and whether an empty one is
    /// shown instead.
    shown: Vec<(PathBuf, bool)>,
    total: u64,
}

impl HostPlan {
    /// Reads what the image is made of. `machine` is `/` except in tests.
    ///
    /// # Errors
    /// When there is no `/usr`.
    pub(super) fn read(machine: &Path) -> io::Result<Self> {
        let mut plan = Self {
            entries: BTreeMap::new(),
            shown: Vec::new(),
            total: 0,
        };
        fs::metadata(machine.join("usr"))?;
        for (path, mode) in DIRECTORIES {
            plan.entries.insert(path.into(), Entry::Directory(mode));
        }
        for pattern in PUBLIC {
            plan.copy_matching(machine, pattern);
        }
        plan.drop_empty_parents();
        let has_bash = machine.join("usr/bin/bash").exists();
        for (path, content) in FILES {
            let content = if has_bash {
                content.replace(":/root:/bin/sh", ":/root:/bin/bash")
            } else {
                content.to_owned()
            };
            plan.entries
                .insert(path.into(), Entry::File(content.into(), 0o644));
        }
        for (path, target) in LINKS {
            plan.entries.insert(path.into(), Entry::Link(target.into()));
        }
        plan.shown.push(("usr".into(), false));
        plan.show_roots(machine)?;
        for private in ["usr/local/etc", "usr/local/var"] {
            if fs::read_dir(machine.join(private)).is_ok_and(|mut d| d.next().is_some()) {
                plan.shown.push((private.into(), true));
            }
        }
        Ok(plan)
    }

    /// `/bin`, `/sbin`, `/lib*`: links as they are, directories bound.
    fn show_roots(&mut self, machine: &Path) -> io::Result<()> {
        let mut names: Vec<_> = fs::read_dir(machine)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name == "bin" || name == "sbin" || name.starts_with("lib"))
            .collect();
        names.sort();
        for name in names {
            let path = machine.join(&name);
            if let Ok(target) = fs::read_link(&path) {
                self.entries.insert(name.into(), Entry::Link(target));
            } else if path.is_dir() {
                self.entries
                    .insert(name.clone().into(), Entry::Directory(0o755));
                self.shown.push((name.into(), false));
            }
        }
        Ok(())
    }

    fn copy_matching(&mut self, machine: &Path, pattern: &str) {
        let etc = machine.join("etc");
        let Some(prefix) = pattern.strip_suffix('*') else {
            self.copy_public(&etc.join(pattern), &Path::new("etc").join(pattern), 0);
            return;
        };
        let Ok(entries) = fs::read_dir(&etc) else {
            return;
        };
        for name in entries.filter_map(|entry| Some(entry.ok()?.file_name())) {
            if name.as_encoded_bytes().starts_with(prefix.as_bytes()) {
                self.copy_public(&etc.join(&name), &Path::new("etc").join(&name), 0);
            }
        }
    }

    /// Takes a path with what is below it, leaving out whatever is not public
    /// or too large. Links are taken as links: what they lead to is inside or
    /// it is not.
    fn copy_public(&mut self, from: &Path, to: &Path, nesting: usize) {
        let Ok(meta) = fs::symlink_metadata(from) else {
            return;
        };
        if self.entries.len() >= MAX_ENTRIES || nesting > MAX_NESTING {
            return;
        }
        let kind = meta.file_type();
        if kind.is_symlink() {
            if let Ok(target) = fs::read_link(from) {
                self.entries.insert(to.into(), Entry::Link(target));
            }
        } else if kind.is_dir() {
            if meta.mode() & 0o005 != 0o005 {
                return;
            }
            self.entries.insert(to.into(), Entry::Directory(0o755));
            let Ok(entries) = fs::read_dir(from) else {
                return;
            };
            for name in entries.filter_map(|entry| Some(entry.ok()?.file_name())) {
                self.copy_public(&from.join(&name), &to.join(&name), nesting + 1);
            }
        } else if kind.is_file() {
            let public = meta.mode() & 0o004 != 0;
            if !public || meta.len() > MAX_FILE || self.total + meta.len() > MAX_TOTAL {
                return;
            }
            let Ok(content) = fs::read(from) else {
                return;
            };
            if contains(&content, b"PRIVATE KEY-----") {
                return;
            }
            self.total += content.len() as u64;
            let mode = 0o644 | meta.mode() & 0o111;
            self.entries.insert(to.into(), Entry::File(content, mode));
        }
    }

    /// `etc/pki` and the like are there only for what was found in them.
    fn drop_empty_parents(&mut self) {
        for parent in ["etc/pki/ca-trust", "etc/pki/tls", "etc/pki", "etc/ssl"] {
            let path = PathBuf::from(parent);
            if !self
                .entries
                .keys()
                .any(|p| p.starts_with(&path) && *p != path)
            {
                self.entries.remove(&path);
            }
        }
    }

    /// Digest of everything the image is made of.
    pub(super) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(b"host image, version 1");
        for (path, entry) in &self.entries {
            field(path.as_os_str().as_encoded_bytes());
            match entry {
                Entry::Directory(mode) => field(format!("directory {mode:o}").as_bytes()),
                Entry::File(content, mode) => {
                    field(format!("file {mode:o}").as_bytes());
                    field(content);
                }
                Entry::Link(target) => {
                    field(b"link");
                    field(target.as_os_str().as_encoded_bytes());
                }
            }
        }
        for (path, hidden) in &self.shown {
            field(path.as_os_str().as_encoded_bytes());
            field(if *hidden { b"hidden" } else { b"shown" });
        }
        format!("sha256:{}", super::hex(&hash.finalize()))
    }

    /// Bytes of its files.
    pub(super) fn bytes(&self) -> u64 {
        self.total
    }

    /// The binds of the image whose layer is (going to be) at `layer`.
    pub(super) fn binds(&self, layer: &Path) -> Vec<ReadOnlyBind> {
        self.shown
            .iter()
            .map(|(path, hidden)| {
                let target = Path::new("/").join(path);
                ReadOnlyBind {
                    source: if *hidden {
                        layer.join(EMPTY)
                    } else {
                        target.clone()
                    },
                    target,
                }
            })
            .collect()
    }

    /// Makes the layer in a directory that does not exist yet.
    pub(super) fn write(&self, layer: &Path) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o755).create(layer)?;
        fs::set_permissions(layer, fs::Permissions::from_mode(0o755))?;
        // Sorted by path: parents come before what is in them.
        for (path, entry) in &self.entries {
            let to = layer.join(path);
            match entry {
                Entry::Directory(mode) => {
                    fs::create_dir(&to)?;
                    fs::set_permissions(&to, fs::Permissions::from_mode(*mode))?;
                }
                Entry::File(content, mode) => {
                    use std::io::Write;
                    let mut file = fs::OpenOptions::new()
                        .create_new(true)
                        .write(true)
                        .mode(0o600)
                        .open(&to)?;
                    file.write_all(content)?;
                    file.set_permissions(fs::Permissions::from_mode(*mode))?;
                }
                Entry::Link(target) => symlink(target, &to)?,
            }
        }
        Ok(())
    }

    /// How its commands run.
    pub(super) fn config() -> ImageConfig {
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        ImageConfig {
            env: [("PATH", path), ("LANG", "C.UTF-8")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            workdir: Some("/workspace".into()),
            cmd: vec!["/bin/sh".into()],
            ..ImageConfig::default()
        }
    }
}

/// Changes whenever the plan may have changed: cheap enough to be asked each
/// time a sandbox starts.
pub(super) fn fingerprint(machine: &Path) -> String {
    let mut hash = Sha256::new();
    let etc = machine.join("etc");
    let mut look = |path: &Path| {
        if let Ok(meta) = fs::symlink_metadata(path) {
            for number in [
                meta.ino(),
                meta.size(),
                meta.mtime() as u64,
                meta.mtime_nsec() as u64,
            ] {
                hash.update(number.to_le_bytes());
            }
        }
        hash.update([0]);
    };
    look(machine);
    look(&machine.join("usr/local"));
    look(&machine.join("usr/local/etc"));
    look(&machine.join("usr/local/var"));
    look(&etc);
    for name in PUBLIC {
        look(&etc.join(name));
    }
    super::hex(&hash.finalize())
}

fn contains(content: &[u8], needle: &[u8]) -> bool {
    content.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for path in [
            "usr/bin",
            "usr/lib",
            "usr/local/etc",
            "etc/ssl/certs",
            "etc/ssl/private",
            "etc/ssh",
            "lib64",
            "root/.ssh",
        ] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        symlink("usr/bin", dir.path().join("bin")).unwrap();
        for (path, content, mode) in [
            (
                "etc/passwd",
                "secretuser:x:1000:1000::/home/s:/bin/sh",
                0o644,
            ),
            ("etc/shadow", "root:$6$hash", 0o600),
            ("etc/machine-id", "0123", 0o644),
            ("etc/ssh/ssh_host_rsa_key", "key", 0o600),
            ("etc/ssl/certs/ca.pem", "certificate", 0o644),
            (
                "etc/ssl/certs/site.pem",
                "-----BEGIN PRIVATE KEY-----",
                0o644,
            ),
            ("etc/ssl/certs/closed.pem", "certificate", 0o640),
            ("etc/ssl/private/site.key", "key", 0o644),
            ("etc/ld.so.cache", "cache", 0o644),
            ("usr/local/etc/munge.key", "key", 0o644),
        ] {
            let path = dir.path().join(path);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        dir
    }

    #[test]
    fn only_what_is_public_and_needed_is_taken_from_the_machine() {
        let machine = machine();
        let layer = tempfile::tempdir().unwrap();
        let layer = layer.path().join("diff");
        let plan = HostPlan::read(machine.path()).unwrap();
        plan.write(&layer).unwrap();
        assert_eq!(
            fs::read_to_string(layer.join("etc/ld.so.cache")).unwrap(),
            "cache"
        );
        assert!(layer.join("etc/ssl/certs/ca.pem").exists());
        for absent in [
            "etc/shadow",
            "etc/machine-id",
            "etc/ssh",
            "etc/ssl/certs/site.pem",
            "etc/ssl/certs/closed.pem",
            "etc/ssl/private",
            "etc/pki",
            "root/.ssh",
        ] {
            assert!(!layer.join(absent).exists(), "{absent} was taken");
        }
        let passwd = fs::read_to_string(layer.join("etc/passwd")).unwrap();
        assert!(!passwd.contains("secretuser"), "{passwd}");
        assert_eq!(
            layer.join("tmp").metadata().unwrap().mode() & 0o7777,
            0o1777
        );
    }

    #[test]
    fn links_stay_links_directories_are_bound_and_private_ones_appear_empty() {
        let machine = machine();
        let plan = HostPlan::read(machine.path()).unwrap();
        assert_eq!(
            plan.entries[Path::new("bin")],
            Entry::Link("usr/bin".into())
        );
        let binds: Vec<(String, String)> = plan
            .binds(Path::new("/layer"))
            .into_iter()
            .map(|b| {
                (
                    b.source.display().to_string(),
                    b.target.display().to_string(),
                )
            })
            .collect();
        let expected = [
            ("/usr", "/usr"),
            ("/lib64", "/lib64"),
            ("/layer/.skyrl-host/empty", "/usr/local/etc"),
        ];
        assert_eq!(binds, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn the_digest_follows_the_inputs() {
        let machine = machine();
        let before = HostPlan::read(machine.path()).unwrap().digest();
        assert_eq!(before, HostPlan::read(machine.path()).unwrap().digest());
        let print = fingerprint(machine.path());
        fs::write(machine.path().join("etc/ld.so.cache"), "another").unwrap();
        assert_ne!(before, HostPlan::read(machine.path()).unwrap().digest());
        assert_ne!(print, fingerprint(machine.path()));
    }
}
