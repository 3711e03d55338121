//! Layers that try to get out, to fill the disk, or to confuse. Each is refused
//! with the name of the entry, nothing is written outside of the store, and
//! nothing of the image is kept.

use crate::archive::{Compression, Entry, build, compress, digest, layout, tar, write_archive};
use crate::support::{as_root_and_plain_user, assert_clean, ensure, names, open, temp};
use skyrl_sandbox::{ImageError, ImageStore};
use std::fs;
use std::path::Path;

/// Unpacks a single layer; returns the error.
fn refused(dir: &Path, layer: &[u8]) -> ImageError {
    let path = dir.join("attack.tar");
    build(&[layer.to_vec()], Compression::Gzip).write(&path);
    let store = open(dir);
    let error = ensure(&store, &format!("oci-archive:{}", path.display())).unwrap_err();
    assert_clean(dir);
    assert_eq!(
        names(&dir.join("images/layers")),
        [""; 0],
        "kept in spite of: {error}"
    );
    assert!(store.list().unwrap().is_empty());
    error
}

#[test]
fn entries_that_lead_out_of_the_image_are_refused_by_name() {
    as_root_and_plain_user(
        "attacks::entries_that_lead_out_of_the_image_are_refused_by_name",
        || {
            let dir = temp();
            let victim = dir.path().join("victim");
            fs::create_dir(&victim).unwrap();
            fs::write(victim.join("file"), "untouched").unwrap();
            let out = victim.display().to_string();
            let out_file = format!("{out}/file");
            let up = format!("{}{out_file}", "../".repeat(20));
            let attacks: Vec<(Vec<Entry>, &str)> = vec![
                (vec![Entry::file(&out_file, "x")], "absolute"),
                (vec![Entry::file(&format!("/{out_file}"), "x")], "absolute"),
                (vec![Entry::file("../../victim/file", "x")], "leads out"),
                (
                    vec![Entry::file("a/../../../victim/file", "x")],
                    "leads out",
                ),
                (vec![Entry::dir("..")], "leads out"),
                (
                    vec![Entry::symlink("l", &out), Entry::file("l/file", "x")],
                    "symbolic link",
                ),
                (
                    vec![Entry::symlink("l", "."), Entry::file("l/file", "x")],
                    "symbolic link",
                ),
                (
                    vec![
                        Entry::dir("d"),
                        Entry::symlink("d/l", &out),
                        Entry::dir("d/l/sub"),
                    ],
                    "symbolic link",
                ),
                (
                    vec![Entry::symlink("l", &out), Entry::file("l/.wh.file", "")],
                    "symbolic link",
                ),
                (
                    vec![Entry::symlink("l", &out), Entry::file("l/.wh..wh..opq", "")],
                    "symbolic link",
                ),
                (vec![Entry::hard_link("h", &up)], "leads out"),
                (vec![Entry::hard_link("h", &out_file)], "does not have"),
                (
                    vec![Entry::symlink("l", &out), Entry::hard_link("h", "l/file")],
                    "symbolic link",
                ),
                (vec![Entry::hard_link("h", "nothing")], "does not hold"),
                (
                    vec![Entry::dir("d"), Entry::hard_link("h", "d")],
                    "directory",
                ),
                (
                    vec![Entry::file(".wh.w", ""), Entry::hard_link("h", "w")],
                    "whiteout",
                ),
                (vec![Entry::hard_link("h", "h")], "does not hold"),
                (
                    vec![Entry::file("f", ""), Entry::file("f/g", "")],
                    "not a directory",
                ),
                (vec![Entry::file(".wh..", "")], "whiteout of nothing"),
                (vec![Entry::file(".wh...", "")], "whiteout of nothing"),
                (vec![Entry::file(".wh.", "")], "whiteout of nothing"),
                (vec![Entry::file(".wh.d/file", "")], "below a whiteout"),
                (
                    vec![Entry::file("x", "").pax("path", "../../victim/file")],
                    "leads out",
                ),
                (
                    vec![Entry::hard_link("h", "x").pax("linkpath", up.clone())],
                    "leads out",
                ),
                (vec![Entry::file("x", "").pax("path", "a\0b")], "zero byte"),
                (vec![Entry::file(&"n".repeat(300), "")], "longer than 255"),
                (vec![Entry::special("x", b'Q')], "unknown kind"),
                (vec![Entry::symlink("l", "")], "no valid target"),
                (vec![Entry::symlink("./", "x")], "not a directory"),
                (vec![Entry::file("x", "").pax("uid", "4294967295")], "owner"),
            ];
            for (entries, expected) in attacks {
                let error = refused(dir.path(), &tar(&entries));
                let said = error.to_string();
                assert!(
                    matches!(error, ImageError::Broken { .. }),
                    "{entries:?}: {said}"
                );
                assert!(said.contains(expected), "{entries:?}: {said}");
            }
            assert_eq!(
                fs::read_to_string(victim.join("file")).unwrap(),
                "untouched"
            );
            assert_eq!(names(&victim), ["file"]);
        },
    );
}

#[test]
fn an_entry_after_a_link_of_the_same_name_replaces_the_link() {
    as_root_and_plain_user(
        "attacks::an_entry_after_a_link_of_the_same_name_replaces_the_link",
        || {
            let dir = temp();
            let victim = dir.path().join("victim");
            fs::write(&victim, "untouched").unwrap();
            let out = victim.display().to_string();
            let reference = crate::archive::image(
                dir.path(),
                "replace",
                &[vec![
                    Entry::symlink("link", &out),
                    Entry::file("link", "own"),
                    Entry::file("a", "a"),
                    Entry::hard_link("b", "a"),
                    Entry::file("b", "b"),
                ]],
            );
            let image = ensure(&open(dir.path()), &reference).unwrap();
            let read = |name: &str| fs::read_to_string(image.layers[0].join(name)).unwrap();
            assert_eq!(
                (
                    read("link").as_str(),
                    read("a").as_str(),
                    read("b").as_str()
                ),
                ("own", "a", "b")
            );
            assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        },
    );
}

#[test]
fn archives_that_are_cut_off_or_damaged_are_refused() {
    let dir = temp();
    let sound = tar(&[Entry::file("file", vec![7; 5000])]);
    for cut in [100, 512, 600, 3000] {
        refused(dir.path(), &sound[..cut]);
    }
    let mut damaged = sound.clone();
    damaged[3] ^= 1;
    let error = refused(dir.path(), &damaged);
    assert!(error.to_string().contains("checksum"), "{error}");
    for (entry, expected) in [
        (
            Entry::file("x", "").pax("size", "99999999999999999999999"),
            "PAX",
        ),
        (
            Entry::file("x", "").stated_size(1 << 30),
            "middle of a file",
        ),
        (
            Entry::special("x", b'x').stated_size(1 << 40),
            "extension header",
        ),
        (
            Entry::file("x", "")
                .pax("GNU.sparse.size", "5")
                .pax("GNU.sparse.map", "9,1"),
            "sparse",
        ),
        (
            Entry::file("x", "")
                .pax("GNU.sparse.major", "1")
                .pax("GNU.sparse.realsize", "5"),
            "sparse",
        ),
    ] {
        let error = refused(dir.path(), &tar(&[entry]));
        assert!(error.to_string().contains(expected), "{error}");
    }
    let endless: Vec<Entry> = (0..20).map(|_| Entry::special("x", b'g')).collect();
    let error = refused(dir.path(), &tar(&endless));
    assert!(error.to_string().contains("in a row"), "{error}");
}

#[test]
fn content_with_another_digest_than_stated_is_refused() {
    let dir = temp();
    let good = tar(&[Entry::file("file", "good")]);
    let evil = tar(&[Entry::file("file", "evil")]);
    let path = dir.path().join("image.tar");
    let reference = format!("oci-archive:{}", path.display());
    let store = open(dir.path());
    let fail = |files: &[(String, Vec<u8>)]| {
        write_archive(&path, files);
        let error = ensure(&store, &reference).unwrap_err();
        assert!(matches!(error, ImageError::Broken { .. }), "{error}");
        assert_clean(dir.path());
        error.to_string()
    };
    let built = build(std::slice::from_ref(&good), Compression::Gzip);
    // Another layer under the right name.
    let mut files = built.layout();
    let blob = format!("blobs/sha256/{}", &built.blobs[0][7..]);
    for (name, data) in &mut files {
        if *name == blob {
            *data = compress(&evil, Compression::Gzip);
        }
    }
    assert!(fail(&files).contains("digest"));
    // The right layer, compressed anew: only the file's digest differs.
    for (name, data) in &mut files {
        if *name == blob {
            *data = compress(&good, Compression::Zstd);
        }
    }
    assert!(fail(&files).contains("digest"));
    // Another configuration, another manifest.
    for digest in [&built.config, &built.manifest] {
        let mut files = built.layout();
        for (name, data) in &mut files {
            if *name == format!("blobs/sha256/{}", &digest[7..]) {
                data.push(b' ');
            }
        }
        assert!(fail(&files).contains("should have the digest"));
    }
    // A digest that is a path.
    let mut described = built.descriptor("v1");
    described["digest"] = "sha256:../../../etc/passwd".into();
    assert!(fail(&layout(&[described], &[&built])).contains("no sha256 digest"));
    // Layers the manifest names are not there.
    let files: Vec<_> = built
        .layout()
        .into_iter()
        .filter(|(name, _)| *name != blob)
        .collect();
    assert!(fail(&files).contains("missing"));
    assert_eq!(digest(b"").len(), 71);
}

#[test]
fn a_decompression_bomb_ends_at_the_quota() {
    as_root_and_plain_user("attacks::a_decompression_bomb_ends_at_the_quota", || {
        let dir = temp();
        let store = ImageStore::open(&dir.path().join("images"), Some(4 << 20)).unwrap();
        let zeros = tar(&[Entry::file("zeros", vec![0; 24 << 20])]);
        let noise: Vec<u8> = (0..6_u32 << 20)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let many: Vec<Entry> = (0..2000)
            .map(|n| Entry::file(&format!("f{n}"), ""))
            .collect();
        let mut trailer = tar(&[]);
        trailer.resize(24 << 20, 0);
        for layer in [
            zeros,
            tar(&[Entry::file("noise", noise)]),
            tar(&many),
            trailer,
        ] {
            let path = dir.path().join("bomb.tar");
            build(&[layer], Compression::Zstd).write(&path);
            let error = ensure(&store, &format!("oci-archive:{}", path.display())).unwrap_err();
            assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
            assert!(error.hint().is_some());
            assert_clean(dir.path());
        }
        // The same in the archive around the image.
        let path = dir.path().join("outer.tar.gz");
        let files = vec![("filler".to_owned(), vec![0; 8 << 20])];
        write_archive(&path, &files);
        let packed = compress(&fs::read(&path).unwrap(), Compression::Gzip);
        fs::write(&path, packed).unwrap();
        ensure(&store, &format!("docker-archive:{}", path.display())).unwrap_err();
        assert_clean(dir.path());
    });
}
