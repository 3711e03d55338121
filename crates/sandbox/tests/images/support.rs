//! What these tests share: running as a plain user, mounting layers, listing
//! trees.

use base64::Engine;
use skyrl_sandbox::image::Quiet;
use skyrl_sandbox::{Image, ImageError, ImageRef, ImageStore, PullPolicy};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A user nobody else has.
const PLAIN_USER: &str = "12345";
/// Tells a test process that it is the plain user's.
const AGAIN: &str = "SKYRL_TEST_AS_PLAIN_USER";

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a test's body, and if this is root, the same test once more as a plain
/// user. `name` is the test's path.
pub(crate) fn as_root_and_plain_user(name: &str, body: impl FnOnce()) {
    body();
    if is_root() && std::env::var_os(AGAIN).is_none() {
        let place = temp();
        let output = as_plain_user(
            place.path(),
            &["--exact", name, "--nocapture"],
            &[(AGAIN, "1")],
        )
        .output()
        .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let ran = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && ran.contains("1 passed"),
            "as a plain user: {ran}{said}"
        );
    }
}

/// A command that runs this test program as a plain user, in a directory that
/// becomes that user's.
pub(crate) fn as_plain_user(place: &Path, args: &[&str], env: &[(&str, &str)]) -> Command {
    let program = place.join("tests");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let id: u32 = PLAIN_USER.parse().unwrap();
    std::os::unix::fs::chown(place, Some(id), Some(id)).unwrap();
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid",
            PLAIN_USER,
            "--regid",
            PLAIN_USER,
            "--clear-groups",
        ])
        .arg(program)
        .args(args)
        .env("TMPDIR", place)
        .env("HOME", place)
        .envs(env.iter().copied())
        .current_dir(place);
    command
}

/// A directory under which a store and its archives fit.
pub(crate) fn temp() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

pub(crate) fn open(dir: &Path) -> ImageStore {
    ImageStore::open(&dir.join("images"), None).unwrap()
}

/// Makes an image present, on a runtime of its own.
pub(crate) fn ensure(store: &ImageStore, image: &str) -> Result<Image, ImageError> {
    ensure_with(store, image, PullPolicy::IfMissing)
}

pub(crate) fn ensure_with(
    store: &ImageStore,
    image: &str,
    policy: PullPolicy,
) -> Result<Image, ImageError> {
    let image: ImageRef = image.parse().unwrap();
    runtime().block_on(store.ensure(&image, policy, &Quiet))
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// What a file is, as far as a program inside the image can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) kind: char,
    pub(crate) mode: u32,
    pub(crate) mtime: i64,
    /// Content of a file, target of a link.
    pub(crate) content: String,
}

/// Lists what an image's layers look like when the kernel stacks them. Runs
/// in a mount namespace of its own (as a plain user, in a user namespace too).
pub(crate) fn mounted(layers: &[PathBuf], user_xattr: bool) -> BTreeMap<String, Shown> {
    let place = temp();
    // Paths relative to the current directory: the options of a mount have
    // room for 4096 bytes only.
    let mut lower: Vec<String> = layers
        .iter()
        .enumerate()
        .map(|(n, layer)| {
            std::os::unix::fs::symlink(layer, place.path().join(n.to_string())).unwrap();
            n.to_string()
        })
        .collect();
    // A single lower layer needs a second one to be an overlay.
    fs::create_dir(place.path().join("empty")).unwrap();
    lower.push("empty".into());
    let root = place.path().join("merged");
    fs::create_dir(&root).unwrap();
    let options = format!(
        "lowerdir={}{}",
        lower.join(":"),
        if user_xattr { ",userxattr" } else { "" }
    );
    list(
        &root,
        &format!("mount -t overlay overlay -o {options} merged"),
        place.path(),
    )
}

/// Lists a plain directory in the same way.
pub(crate) fn listed(root: &Path) -> BTreeMap<String, Shown> {
    list(root, "true", root)
}

fn list(root: &Path, prepare: &str, place: &Path) -> BTreeMap<String, Shown> {
    let run = |script: &str| {
        let output = unshared()
            .current_dir(place)
            .args([
                "sh",
                "-ec",
                &format!("{prepare}; cd \"$1\"; {script}"),
                "sh",
            ])
            .arg(root)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let mut shown = BTreeMap::new();
    for line in run(r"find . -mindepth 1 -printf '%P\t%y\t%m\t%T@\t%l\n'").lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        shown.insert(
            fields[0].to_owned(),
            Shown {
                kind: fields[1].chars().next().unwrap(),
                mode: u32::from_str_radix(fields[2], 8).unwrap(),
                mtime: fields[3].split('.').next().unwrap().parse().unwrap(),
                content: fields[4].to_owned(),
            },
        );
    }
    let contents =
        run(r"find . -type f -size -64k -printf '%P\n' -exec base64 -w0 {} \; -printf '\n'");
    let mut lines = contents.lines();
    while let (Some(name), Some(content)) = (lines.next(), lines.next()) {
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(content)
            .unwrap();
        shown.get_mut(name).unwrap().content = String::from_utf8_lossy(&bytes).into_owned();
    }
    shown
}

/// Runs a script inside an overlay with a writable layer.
pub(crate) fn run_mounted(
    layers: &[PathBuf],
    upper: &Path,
    work: &Path,
    user_xattr: bool,
    script: &str,
) {
    let place = temp();
    // Paths relative to the current directory: the options of a mount have
    // room for 4096 bytes only.
    let lower: Vec<String> = layers
        .iter()
        .enumerate()
        .map(|(n, layer)| {
            std::os::unix::fs::symlink(layer, place.path().join(n.to_string())).unwrap();
            n.to_string()
        })
        .collect();
    let root = place.path().join("merged");
    fs::create_dir(&root).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}{}",
        lower.join(":"),
        upper.display(),
        work.display(),
        if user_xattr {
            ",userxattr"
        } else {
            ",redirect_dir=off,metacopy=off,index=off"
        }
    );
    let prepare = r#"mount -t overlay overlay -o "$1" "$2" && cd "$2" && eval "$3""#;
    let output = unshared()
        .args(["sh", "-c", prepare, "sh", &options])
        .arg(&root)
        .arg(script)
        .current_dir(place.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The same, with fuse-overlayfs on the directories of `place`.
pub(crate) fn run_fuse_mounted(layers: &[PathBuf], place: &Path, script: &str) {
    let lower: Vec<String> = layers
        .iter()
        .map(|layer| layer.display().to_string())
        .collect();
    let options = format!("lowerdir={},upperdir=upper,workdir=work", lower.join(":"));
    let prepare = r#"
        fuse-overlayfs -o "$1" merged && { (cd merged && eval "$2"); umount merged; }
    "#;
    let output = unshared()
        .args(["sh", "-c", prepare, "sh", &options, script])
        .current_dir(place)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

fn unshared() -> Command {
    let mut command = Command::new("unshare");
    command.arg(if is_root() { "-m" } else { "-Urm" });
    command
}

/// Everything below a directory by relative path, without following links.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, root: &Path, found: &mut Vec<String>) {
        let Ok(entries) = fs::read_dir(dir) else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(root).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                walk(&path, root, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, dir, &mut found);
    found.sort();
    found
}

/// A store holds nothing half-made.
pub(crate) fn assert_clean(dir: &Path) {
    let left = names(&dir.join("images/tmp"));
    assert!(left.is_empty(), "left behind: {left:?}");
}
