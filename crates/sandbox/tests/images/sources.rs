//! Every form an image comes in gives the same image; what is none is refused
//! with a reason.

use crate::archive::{
    Built, Compression, Entry, build, build_for, compress, layout, tar, write_archive,
    write_directory,
};
use crate::support::{
    as_root_and_plain_user, assert_clean, ensure, ensure_with, is_root, mounted, open, temp,
};
use skyrl_sandbox::{ImageError, PullPolicy};
use std::fs;
use std::path::Path;
use std::process::Command;

fn two_layers(how: Compression) -> Built {
    let layers = [
        tar(&[
            Entry::file("bin/tool", "1").mode(0o755),
            Entry::file("gone", "1"),
        ]),
        tar(&[Entry::file(".wh.gone", ""), Entry::file("new", "2")]),
    ];
    build(&layers, how)
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn archives_layouts_and_folders_of_one_image_are_the_same_image() {
    as_root_and_plain_user(
        "sources::archives_layouts_and_folders_of_one_image_are_the_same_image",
        || {
            let dir = temp();
            let at = |name: &str| dir.path().join(name).display().to_string();
            let mut digests = Vec::new();
            let mut layers = Vec::new();
            let store = open(dir.path());
            let mut seen = |reference: &str| {
                let image = ensure(&store, reference).unwrap();
                assert_eq!(image.config.env["GREETING"], "hello=world");
                assert_eq!(image.config.workdir.as_deref(), Some("/work"));
                assert_eq!(image.config.user.as_deref(), Some("1000:1000"));
                assert_eq!(image.config.entrypoint, ["/bin/sh"]);
                assert_eq!(image.config.cmd, ["-c", "true"]);
                assert_eq!(image.config.labels["kind"], "test");
                digests.push(image.digest);
                layers.push(image.layers);
            };
            for how in [Compression::None, Compression::Gzip, Compression::Zstd] {
                two_layers(how).write(&dir.path().join("oci.tar"));
                seen(&format!("oci-archive:{}", at("oci.tar")));
            }
            seen(&format!("oci-archive:{}:v1", at("oci.tar")));
            let packed = compress(&fs::read(at("oci.tar")).unwrap(), Compression::Gzip);
            fs::write(at("oci.tar.gz"), packed).unwrap();
            seen(&format!("oci-archive:{}", at("oci.tar.gz")));
            write_directory(
                Path::new(&at("layout")),
                &two_layers(Compression::Gzip).layout(),
            );
            seen(&format!("dir:{}", at("layout")));
            // What skopeo makes of it.
            let layout = format!("oci:{}:v1", at("layout"));
            let skopeo = |to: String| {
                run(Command::new("skopeo").args(["--insecure-policy", "copy", "-q", &layout, &to]));
            };
            skopeo(format!("docker-archive:{}:some/name:v1", at("docker.tar")));
            skopeo(format!("dir:{}", at("folder")));
            skopeo(format!("oci-archive:{}:v1", at("oci2.tar")));
            seen(&format!("oci-archive:{}", at("oci2.tar")));
            seen(&format!("dir:{}", at("folder")));
            // Docker's own form of the configuration has another digest, but the
            // same layers.
            seen(&format!("docker-archive:{}", at("docker.tar")));
            seen(&format!("docker-archive:{}:v1", at("docker.tar")));
            seen(&format!(
                "docker-archive:{}:docker.io/some/name:v1",
                at("docker.tar")
            ));
            assert!(
                digests[..8].iter().all(|digest| *digest == digests[0]),
                "{digests:?}"
            );
            assert!(layers.iter().all(|paths| *paths == layers[0]), "{layers:?}");
            let shown = mounted(&layers[0], store.user_xattr());
            assert_eq!(shown.keys().collect::<Vec<_>>(), ["bin", "bin/tool", "new"]);
            assert_clean(dir.path());
        },
    );
}

#[test]
fn an_index_gives_the_image_for_this_machine() {
    let dir = temp();
    let mine = two_layers(Compression::Gzip);
    let other = build_for(
        &[tar(&[Entry::file("other", "")])],
        Compression::Gzip,
        "s390x",
    );
    let mut here = mine.descriptor("v1");
    here["platform"] = serde_json::json!({"os": "linux", "architecture": architecture()});
    let mut there = other.descriptor("v1");
    there["platform"] = serde_json::json!({"os": "linux", "architecture": "s390x"});
    let mut attestation = other.descriptor("v1");
    attestation["platform"] = serde_json::json!({"os": "unknown", "architecture": "unknown"});
    // An index inside of an index, as `docker buildx` writes it.
    let nested = |manifests: &[&serde_json::Value]| {
        let index = serde_json::to_vec(&serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        }))
        .unwrap();
        let digest = crate::archive::digest(&index);
        let descriptor = serde_json::json!({
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": digest,
            "size": index.len(),
        });
        let mut files = layout(&[descriptor], &[&mine, &other]);
        files.push((format!("blobs/sha256/{}", &digest[7..]), index));
        files
    };
    let store = open(dir.path());
    let path = dir.path().join("index.tar");
    let reference = format!("oci-archive:{}", path.display());
    write_archive(&path, &nested(&[&there, &here, &attestation]));
    assert_eq!(ensure(&store, &reference).unwrap().digest, mine.config);
    write_archive(&path, &nested(&[&there, &attestation]));
    let error = ensure(&store, &reference).unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("linux/s390x"), "{error}");
    other.write(&path);
    let error = ensure(&store, &reference).unwrap_err();
    assert!(error.to_string().contains("s390x processors"), "{error}");
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[test]
fn of_several_images_the_tag_chooses_and_without_one_the_choice_is_refused() {
    let dir = temp();
    let one = two_layers(Compression::None);
    let two = build(&[tar(&[Entry::file("two", "")])], Compression::None);
    let path = dir.path().join("both.tar");
    write_archive(
        &path,
        &layout(&[one.descriptor("v1"), two.descriptor("v2")], &[&one, &two]),
    );
    let store = open(dir.path());
    let by = |tag: &str| ensure(&store, &format!("oci-archive:{}{tag}", path.display()));
    assert_eq!(by(":v1").unwrap().digest, one.config);
    assert_eq!(by(":v2").unwrap().digest, two.config);
    for (tag, expected) in [
        ("", "several images (v1, v2)"),
        (":v3", "tagged v3; it has v1, v2"),
    ] {
        let error = by(tag).unwrap_err();
        assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn what_is_no_image_is_refused_with_a_reason() {
    let dir = temp();
    let store = open(dir.path());
    let at = |name: &str| dir.path().join(name).display().to_string();
    fs::write(
        at("text"),
        "hello, this is no archive, whatever its name is",
    )
    .unwrap();
    fs::write(at("nothing"), "").unwrap();
    fs::create_dir(at("empty")).unwrap();
    write_archive(Path::new(&at("tar")), &[("file".to_owned(), vec![1])]);
    let artifact = {
        let mut built = build(&[], Compression::None);
        built.files.push(("extra".into(), Vec::new()));
        built
    };
    artifact.write(Path::new(&at("artifact")));
    for (reference, expected) in [
        (format!("oci-archive:{}", at("text")), "broken"),
        (format!("oci-archive:{}", at("nothing")), "no index.json"),
        (format!("docker-archive:{}", at("tar")), "no manifest.json"),
        (format!("oci-archive:{}", at("tar")), "no index.json"),
        (
            format!("oci-archive:{}", at("artifact")),
            "no container image",
        ),
        (format!("dir:{}", at("empty")), "empty"),
        (format!("dir:{}", at("text")), "not a directory"),
        ("dir:/".to_owned(), "use `host`"),
        (format!("oci-archive:{}", at("missing")), "not found"),
        (format!("dir:{}", at("missing")), "not found"),
        ("snapshot:x".to_owned(), "belongs to its owner"),
    ] {
        let error = ensure(&store, &reference).unwrap_err();
        assert!(error.to_string().contains(expected), "{reference}: {error}");
        assert!(error.hint().is_some());
    }
    assert_clean(dir.path());
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn an_unpacked_root_is_used_where_it_is_and_found_anew_when_it_changes() {
    as_root_and_plain_user(
        "sources::an_unpacked_root_is_used_where_it_is_and_found_anew_when_it_changes",
        || {
            let dir = temp();
            let root = dir.path().join("root");
            fs::create_dir_all(root.join("bin")).unwrap();
            let store = open(dir.path());
            let reference = format!("dir:{}", root.display());
            let first = ensure_with(&store, &reference, PullPolicy::Never).unwrap();
            assert_eq!(first.layers, [root.canonicalize().unwrap()]);
            assert_eq!(ensure(&store, &reference).unwrap().digest, first.digest);
            assert_eq!(store.list().unwrap()[0].bytes, 0);
            fs::write(root.join("new"), "").unwrap();
            assert_ne!(ensure(&store, &reference).unwrap().digest, first.digest);
            drop(first);
            store.remove(&reference.parse().unwrap()).unwrap();
            assert!(root.join("bin").exists());
        },
    );
}

#[test]
fn the_host_image_has_the_machines_programs_and_none_of_its_secrets() {
    as_root_and_plain_user(
        "sources::the_host_image_has_the_machines_programs_and_none_of_its_secrets",
        || {
            let dir = temp();
            let store = open(dir.path());
            let image = ensure(&store, "host").unwrap();
            assert_eq!(image.layers.len(), 1);
            assert_eq!(image.binds[0].target, Path::new("/usr"));
            for bind in &image.binds {
                assert!(bind.source.exists(), "{bind:?}");
                assert!(
                    image.layers[0]
                        .join(bind.target.strip_prefix("/").unwrap())
                        .exists()
                        || bind.target.starts_with("/usr"),
                    "{bind:?}"
                );
            }
            let shown = mounted(&image.layers, store.user_xattr());
            assert_eq!(shown["tmp"].mode, 0o1777);
            for needed in [
                "etc/passwd",
                "etc/ld.so.cache",
                "proc",
                "sys",
                "dev",
                "workspace",
                "var/tmp",
            ] {
                assert!(shown.contains_key(needed), "{needed}");
            }
            for secret in [
                "etc/shadow",
                "etc/gshadow",
                "etc/machine-id",
                "etc/ssh",
                "etc/munge",
                "etc/krb5.keytab",
                "etc/hostname.orig",
            ] {
                assert!(!shown.contains_key(secret), "{secret}");
            }
            assert!(
                !shown
                    .keys()
                    .any(|name| name.starts_with("root/") || name.starts_with("home/"))
            );
            let again = ensure(&store, "host").unwrap();
            assert_eq!(again.digest, image.digest);
            assert_eq!(again.layers, image.layers);
        },
    );
}

/// A real image, built by buildah on this machine, is mounted by the kernel
/// from our layers and by buildah from its own storage: both look the same.
#[test]
fn a_real_image_looks_as_its_builder_shows_it() {
    if !is_root() {
        return;
    }
    let dir = temp();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let buildah = |args: &[&str]| {
        let mut command = Command::new("buildah");
        command.args([
            "--storage-driver",
            "vfs",
            "--root",
            &at("storage"),
            "--runroot",
            &at("run"),
        ]);
        run(command.args(args)).trim().to_owned()
    };
    let script = r#"
        set -e; cd "$1"
        mkdir -p bin etc/conf.d tmp deep/er/est
        cp /bin/busybox bin/busybox; ln -s busybox bin/sh; ln bin/busybox bin/ls
        echo a >etc/conf.d/a; echo b >etc/conf.d/b; chown 5:6 etc/conf.d/a
        chmod 4755 bin/busybox; chmod 1777 tmp; mkfifo pipe; echo x >deep/er/est/x
    "#;
    let base = buildah(&["from", "scratch"]);
    let root = buildah(&["mount", &base]);
    run(Command::new("sh").args(["-c", script, "sh", &root]));
    buildah(&["commit", "-q", &base, "base"]);
    let top = buildah(&["from", "localhost/base"]);
    let root = buildah(&["mount", &top]);
    let script = r#"
        set -e; cd "$1"
        rm etc/conf.d/a; rm -r tmp; mkdir tmp; echo new >tmp/new; chmod 600 etc/conf.d/b
        rm -r deep; echo "now a file" >deep; rm bin/ls; ln -s sh bin/ls
    "#;
    run(Command::new("sh").args(["-c", script, "sh", &root]));
    buildah(&["commit", "-q", &top, "top"]);
    buildah(&[
        "push",
        "-q",
        "localhost/top",
        &format!("oci-archive:{}:v1", at("real.tar")),
    ]);
    let store = open(dir.path());
    let image = ensure(&store, &format!("oci-archive:{}", at("real.tar"))).unwrap();
    let shown = mounted(&image.layers, store.user_xattr());
    let listing = run(Command::new("find").args([
        &root,
        "-mindepth",
        "1",
        "-printf",
        "%P %y %m %T@ %l %U\n",
    ]));
    let mut expected = 0;
    for line in listing.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let one = &shown[fields[0]];
        assert_eq!(one.kind.to_string(), fields[1], "{line}");
        assert_eq!(format!("{:o}", one.mode), fields[2], "{line}");
        if one.kind != 'd' {
            assert_eq!(
                one.mtime.to_string(),
                fields[3].split('.').next().unwrap(),
                "{line}"
            );
        }
        expected += 1;
    }
    assert_eq!(shown.len(), expected);
    assert_eq!(shown["deep"].content, "now a file\n");
    buildah(&["rm", "-a"]);
}
