//! Real skopeo (and podman) against a registry served by this test.

use crate::archive::{Built, Compression, Entry, build, tar};
use crate::support::{assert_clean, ensure, ensure_with, is_root, names, open, runtime, temp};
use skyrl_sandbox::image::PullUpdate;
use skyrl_sandbox::{ImageError, ImageRef, PullPolicy};
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How the registry behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mood {
    Kind,
    /// Answers 503 this many more times.
    Overloaded(u32),
    RateLimiting,
    WantsLogin,
    /// Sends the beginning of a blob and then nothing.
    Hanging,
}

struct State {
    mood: Mood,
    /// Digest to content; `tag:NAME` to digest.
    content: HashMap<String, Vec<u8>>,
    /// Paths asked for.
    asked: Vec<String>,
}

#[derive(Clone)]
struct Registry {
    state: Arc<Mutex<State>>,
    host: String,
}

impl Registry {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State {
            mood: Mood::Kind,
            content: HashMap::new(),
            asked: Vec::new(),
        }));
        let registry = Self {
            state: state.clone(),
            host: host.clone(),
        };
        let conf =
            Path::new(&std::env::var("HOME").unwrap()).join(".config/containers/registries.conf");
        fs::create_dir_all(conf.parent().unwrap()).unwrap();
        let text =
            format!("[[registry]]\nprefix = \"{host}\"\nlocation = \"{host}\"\ninsecure = true\n");
        fs::write(conf, text).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                std::thread::spawn(move || serve(&stream, &state));
            }
        });
        registry
    }

    fn put(&self, tag: &str, image: &Built) {
        let mut state = self.state.lock().unwrap();
        for (name, data) in &image.files {
            let digest = format!("sha256:{}", name.rsplit('/').next().unwrap());
            state.content.insert(digest, data.clone());
        }
        state
            .content
            .insert(format!("tag:{tag}"), image.manifest.clone().into_bytes());
    }

    fn mood(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
    }

    /// Blobs fetched since the last call.
    fn fetched(&self) -> Vec<String> {
        let asked = std::mem::take(&mut self.state.lock().unwrap().asked);
        asked
            .iter()
            .filter_map(|path| Some(path.split_once("/blobs/")?.1.to_owned()))
            .collect()
    }

    fn image(&self, tag: &str) -> String {
        format!("{}/some/image:{tag}", self.host)
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request).unwrap_or(0) == 0 {
            return;
        }
        let mut login = false;
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap_or(0) > 2 {
            login |= line.trim_end().ends_with(" dGVzdDpzZWNyZXQ=");
            line.clear();
        }
        let parts: Vec<&str> = request.split(' ').collect();
        let (method, path) = (parts[0], parts[1].to_owned());
        let mut state_now = state.lock().unwrap();
        state_now.asked.push(path.clone());
        let mood = state_now.mood;
        if let Mood::Overloaded(left @ 1..) = mood {
            state_now.mood = Mood::Overloaded(left - 1);
        }
        let wanted = path.rsplit('/').next().unwrap().to_owned();
        let manifest = path.contains("/manifests/");
        let digest = match state_now.content.get(&format!("tag:{wanted}")) {
            Some(digest) if manifest => String::from_utf8(digest.clone()).unwrap(),
            _ => wanted,
        };
        let content = state_now.content.get(&digest).cloned();
        drop(state_now);
        let (status, headers, body) = match (mood, content) {
            (Mood::Overloaded(1..), _) => ("503 Service Unavailable", String::new(), Vec::new()),
            (Mood::RateLimiting, _) if path != "/v2/" => (
                "429 Too Many Requests",
                "Retry-After: 0\r\n".into(),
                br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit."}]}"#.to_vec(),
            ),
            (Mood::WantsLogin, _) if !login => (
                "401 Unauthorized",
                "WWW-Authenticate: Basic realm=\"test\"\r\n".into(),
                br#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#.to_vec(),
            ),
            _ if path == "/v2/" => ("200 OK", String::new(), b"{}".to_vec()),
            (_, Some(body)) => {
                let kind = if manifest {
                    "application/vnd.oci.image.manifest.v1+json"
                } else {
                    "application/octet-stream"
                };
                ("200 OK", format!("Content-Type: {kind}\r\nDocker-Content-Digest: {digest}\r\n"), body)
            }
            (_, None) => (
                "404 Not Found",
                "Content-Type: application/json\r\n".into(),
                br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#.to_vec(),
            ),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n",
            body.len()
        );
        writer.write_all(head.as_bytes()).unwrap_or(());
        if mood == Mood::Hanging && path.contains("/blobs/") && body.len() > 10_000 {
            writer.write_all(&body[..5000]).unwrap_or(());
            // Until the client is gone.
            let _ = reader.read(&mut [0]);
            return;
        }
        if method != "HEAD" && writer.write_all(&body).is_err() {
            return;
        }
    }
}

/// Runs a test in a process of its own whose copying programs look for their
/// settings in a directory made for it.
fn with_settings(name: &str, body: impl FnOnce(&Path)) {
    const SETTINGS: &str = "SKYRL_TEST_REGISTRY_SETTINGS";
    if let Ok(dir) = std::env::var(SETTINGS) {
        return body(Path::new(&dir));
    }
    let dir = temp();
    fs::write(dir.path().join("auth.json"), "{}").unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(SETTINGS, dir.path())
        .env("REGISTRY_AUTH_FILE", dir.path().join("auth.json"))
        .env("HOME", dir.path())
        .env("XDG_RUNTIME_DIR", dir.path())
        .output()
        .unwrap();
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn base() -> Vec<u8> {
    let noise: Vec<u8> = (0..300_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 23) as u8)
        .collect();
    tar(&[Entry::file("base", noise)])
}

#[test]
fn a_pulled_image_comes_once_and_layers_it_shares_are_not_fetched_again() {
    with_settings(
        "registry::a_pulled_image_comes_once_and_layers_it_shares_are_not_fetched_again",
        |dir| {
            let registry = Registry::start();
            let one = build(
                &[base(), tar(&[Entry::file("one", "1")])],
                Compression::Gzip,
            );
            let two = build(
                &[base(), tar(&[Entry::file("two", "2")])],
                Compression::Gzip,
            );
            registry.put("one", &one);
            registry.put("two", &two);
            let store = open(dir);
            let image = ensure(&store, &registry.image("one")).unwrap();
            assert_eq!(image.digest, one.config);
            assert!(registry.fetched().contains(&one.blobs[0]));
            // In the store, under all its names.
            ensure(&store, &format!("docker://{}", registry.image("one"))).unwrap();
            assert_eq!(registry.state.lock().unwrap().asked.len(), 0);
            // The base is here.
            let image = ensure(&store, &registry.image("two")).unwrap();
            let fetched = registry.fetched();
            assert!(
                fetched.contains(&two.blobs[1]) && !fetched.contains(&two.blobs[0]),
                "{fetched:?}"
            );
            assert_eq!(
                fs::read(image.layers[1].join("base")).unwrap().len(),
                300_000
            );
            // Asked anew, the same digest costs no layer.
            ensure_with(&store, &registry.image("two"), PullPolicy::Always).unwrap();
            let fetched = registry.fetched();
            assert!(
                !fetched.iter().any(|blob| two.blobs.contains(blob)),
                "{fetched:?}"
            );
            // The tag moves: only asking anew notices.
            registry.put("two", &one);
            assert_eq!(
                ensure(&store, &registry.image("two")).unwrap().digest,
                two.config
            );
            assert_eq!(
                ensure_with(&store, &registry.image("two"), PullPolicy::Always)
                    .unwrap()
                    .digest,
                one.config
            );
            let by_digest = format!("{}@{}", registry.image("one"), one.manifest);
            assert_eq!(ensure(&store, &by_digest).unwrap().digest, one.config);
            assert_clean(dir);
        },
    );
}

#[test]
fn each_refusal_of_a_registry_has_its_own_error() {
    with_settings(
        "registry::each_refusal_of_a_registry_has_its_own_error",
        |dir| {
            let registry = Registry::start();
            registry.put("v1", &build(&[base()], Compression::Gzip));
            let store = open(dir);
            let fail = |name: &str| {
                let error = ensure(&store, name).unwrap_err();
                assert!(error.hint().is_some());
                assert_clean(dir);
                error
            };
            let error = fail(&registry.image("nothing"));
            assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
            let error = fail("localhost/no-such-image-anywhere");
            assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
            registry.mood(Mood::WantsLogin);
            let error = fail(&registry.image("v1"));
            assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
            // With a login it works: test:secret.
            let auth = format!(
                r#"{{"auths":{{"{}":{{"auth":"dGVzdDpzZWNyZXQ="}}}}}}"#,
                registry.host
            );
            fs::write(dir.join("auth.json"), auth).unwrap();
            ensure(&store, &registry.image("v1")).unwrap();
            let error = store.with_pull_limit(Duration::from_secs(20));
            let error = ensure(&error, "127.0.0.1:1/nobody/listens").unwrap_err();
            assert!(matches!(error, ImageError::Unreachable { .. }), "{error}");
            assert_clean(dir);
        },
    );
}

#[test]
fn a_registry_that_limits_pulls_is_not_asked_again_by_us() {
    with_settings(
        "registry::a_registry_that_limits_pulls_is_not_asked_again_by_us",
        |dir| {
            let registry = Registry::start();
            registry.put("v1", &build(&[base()], Compression::Gzip));
            registry.mood(Mood::RateLimiting);
            let store = open(dir);
            let retries = Mutex::new(0);
            let progress = |update: &PullUpdate| {
                if matches!(update, PullUpdate::Retrying { .. }) {
                    *retries.lock().unwrap() += 1;
                }
            };
            let image: ImageRef = registry.image("v1").parse().unwrap();
            let error = runtime()
                .block_on(store.ensure(&image, PullPolicy::IfMissing, &progress))
                .unwrap_err();
            assert!(matches!(error, ImageError::RateLimited { .. }), "{error}");
            assert_eq!(*retries.lock().unwrap(), 0);
            assert_clean(dir);
        },
    );
}

#[test]
fn a_registry_that_recovers_is_asked_again_and_the_caller_is_told() {
    with_settings(
        "registry::a_registry_that_recovers_is_asked_again_and_the_caller_is_told",
        |dir| {
            let registry = Registry::start();
            let built = build(&[base()], Compression::Gzip);
            registry.put("v1", &built);
            registry.mood(Mood::Overloaded(1));
            let store = open(dir);
            let told = Mutex::new(Vec::new());
            let progress = |update: &PullUpdate| told.lock().unwrap().push(update.to_string());
            let image: ImageRef = registry.image("v1").parse().unwrap();
            let made = runtime()
                .block_on(store.ensure(&image, PullPolicy::IfMissing, &progress))
                .unwrap();
            assert_eq!(made.digest, built.config);
            let told = told.into_inner().unwrap();
            assert!(
                told.iter().any(|update| update.starts_with("attempt 2")),
                "{told:?}"
            );
        },
    );
}

#[test]
fn a_pull_that_is_given_up_or_too_slow_leaves_no_program_running() {
    with_settings(
        "registry::a_pull_that_is_given_up_or_too_slow_leaves_no_program_running",
        |dir| {
            let registry = Registry::start();
            registry.put("v1", &build(&[base()], Compression::Gzip));
            registry.mood(Mood::Hanging);
            let store = open(dir).with_pull_limit(Duration::from_secs(2));
            let error = ensure(&store, &registry.image("v1")).unwrap_err();
            assert!(matches!(error, ImageError::Deadline { .. }), "{error}");
            assert_eq!(children(), [0_u32; 0]);
            let store = open(dir);
            let image: ImageRef = registry.image("v1").parse().unwrap();
            let runtime = runtime();
            let given_up = runtime.block_on(async {
                let pull =
                    store.ensure(&image, PullPolicy::IfMissing, &skyrl_sandbox::image::Quiet);
                tokio::time::timeout(Duration::from_secs(1), pull).await
            });
            assert!(given_up.is_err());
            drop(runtime);
            assert_eq!(children(), [0_u32; 0]);
            assert_clean(dir);
        },
    );
}

/// Processes this one has started and that still run.
fn children() -> Vec<u32> {
    let pid = std::process::id();
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(
            text.split_whitespace()
                .map(|child| child.parse::<u32>().unwrap()),
        );
    }
    found
}

#[test]
fn what_podman_has_on_this_machine_needs_no_registry() {
    with_settings(
        "registry::what_podman_has_on_this_machine_needs_no_registry",
        |dir| {
            if !is_root() {
                return;
            }
            // A storage of its own, in place of the machine's.
            let conf = dir.join("storage.conf");
            let text = format!(
                "[storage]\ndriver = \"vfs\"\ngraphroot = \"{0}/graph\"\nrunroot = \"{0}/run\"\n",
                dir.display()
            );
            fs::write(&conf, text).unwrap();
            let built = build(&[base()], Compression::Gzip);
            let archive = dir.join("local.tar");
            built.write(&archive);
            let here = |command: &mut Command| {
                let output = command
                    .env("CONTAINERS_STORAGE_CONF", &conf)
                    .output()
                    .unwrap();
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{said}");
                String::from_utf8(output.stdout).unwrap()
            };
            let from = format!("oci-archive:{}", archive.display());
            here(Command::new("skopeo").args([
                "--insecure-policy",
                "copy",
                "-q",
                &from,
                "containers-storage:localhost/made/here:v1",
            ]));
            const INNER: &str = "SKYRL_TEST_LOCAL_STORAGE";
            if std::env::var_os(INNER).is_none() {
                let name = "registry::what_podman_has_on_this_machine_needs_no_registry";
                here(
                    Command::new(std::env::current_exe().unwrap())
                        .args(["--exact", name])
                        .env(INNER, "1"),
                );
                return;
            }
            let store = open(dir);
            let image = ensure(&store, "localhost/made/here:v1").unwrap();
            assert_eq!(image.digest, built.config);
            assert!(names(&image.layers[0]).contains(&"base".to_owned()));
            assert_clean(dir);
        },
    );
}

#[test]
fn without_skopeo_podman_fetches_the_image() {
    with_settings("registry::without_skopeo_podman_fetches_the_image", |dir| {
        const INNER: &str = "SKYRL_TEST_WITHOUT_SKOPEO";
        if std::env::var_os(INNER).is_none() {
            // A search path with everything but skopeo.
            let bin = dir.join("bin");
            fs::create_dir(&bin).unwrap();
            for place in ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin"] {
                for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                    let name = entry.file_name();
                    if name != "skopeo" {
                        let _ = std::os::unix::fs::symlink(entry.path(), bin.join(name));
                    }
                }
            }
            let output = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "registry::without_skopeo_podman_fetches_the_image",
                    "--nocapture",
                ])
                .env(INNER, "1")
                .env("PATH", &bin)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
            return;
        }
        let registry = Registry::start();
        let built = build(&[base(), tar(&[Entry::file("top", "")])], Compression::Gzip);
        registry.put("v1", &built);
        let store = open(dir);
        let image = ensure(&store, &registry.image("v1")).unwrap();
        assert_eq!(image.layers.len(), 2);
        let error = ensure(&store, &registry.image("nothing")).unwrap_err();
        assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
        assert_clean(dir);
    });
}
