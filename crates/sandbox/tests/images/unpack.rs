//! What a layer holds arrives as it was.

use crate::archive::{Compression, Entry, build, image, tar};
use crate::support::{as_root_and_plain_user, assert_clean, ensure, is_root, mounted, open, temp};
use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

#[test]
fn modes_links_times_holes_names_and_attributes_arrive() {
    as_root_and_plain_user(
        "unpack::modes_links_times_holes_names_and_attributes_arrive",
        || {
            let dir = temp();
            let store = open(dir.path());
            let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
            let gnu_long = gnu_long_name(&"g".repeat(180));
            let mut layer = tar(&[
                Entry::dir("./"),
                Entry::dir("bin/").mode(0o755),
                Entry::file("bin/su", "root program").mode(0o4755).owner(7),
                Entry::hard_link("bin/also-su", "bin/su"),
                Entry::hard_link("bin/su-from-the-root", "/bin/su"),
                Entry::symlink("bin/sh", "../../../../../bin/su"),
                Entry::symlink("absolute", "/etc/passwd"),
                Entry::dir("closed/").mode(0),
                Entry::file("closed/inside", "x").mode(0),
                Entry::dir("tmp/").mode(0o1777),
                Entry::special("pipe", b'6').mode(0o622),
                Entry::special("null", b'3').mode(0o666),
                Entry::file(&long, "long").pax("mtime", "1234567.5"),
                Entry::file("attributes", "a")
                    .mode(0o400)
                    .pax("SCHILY.xattr.user.note", "kept")
                    .pax("SCHILY.xattr.user.overlay.redirect", "/elsewhere")
                    .pax("SCHILY.xattr.trusted.overlay.opaque", "y")
                    .pax("SCHILY.xattr.security.selinux", "label")
                    .pax("SCHILY.xattr.security.capability", capability()),
                Entry::file("zeros", vec![0; 4 << 20]),
                Entry::file("twice", "first"),
                Entry::hard_link("keeps-first", "twice"),
                Entry::file("twice", "second"),
            ]);
            layer.truncate(layer.len() - 1024);
            layer.extend(gnu_long);
            let path = dir.path().join("image.tar");
            build(&[layer], Compression::Gzip).write(&path);
            let image = ensure(&store, &format!("oci-archive:{}", path.display())).unwrap();
            let root = &image.layers[0];

            let meta = |name: &str| root.join(name).symlink_metadata().unwrap();
            assert_eq!(meta("bin/su").mode() & 0o7777, 0o4755);
            assert_eq!(meta("bin/su").ino(), meta("bin/also-su").ino());
            assert_eq!(meta("bin/su").ino(), meta("bin/su-from-the-root").ino());
            assert_eq!(meta("bin/su").uid(), if is_root() { 7 } else { 12345 });
            assert_eq!(meta("bin/su").mtime(), 1_000_000);
            assert_eq!(meta("bin").mtime(), 1_000_000);
            assert_eq!(
                fs::read_link(root.join("bin/sh"))
                    .unwrap()
                    .to_str()
                    .unwrap(),
                "../../../../../bin/su"
            );
            assert_eq!(meta("bin/sh").mtime(), 1_000_000);
            assert_eq!(meta("closed").mode() & 0o7777, 0);
            assert_eq!(meta("tmp").mode() & 0o7777, 0o1777);
            assert!(meta("pipe").file_type().is_fifo());
            assert_eq!(meta("pipe").mode() & 0o7777, 0o622);
            assert!(!root.join("null").exists(), "a device was made");
            assert_eq!(fs::read_to_string(root.join(&long)).unwrap(), "long");
            assert_eq!(
                (meta(&long).mtime(), meta(&long).mtime_nsec()),
                (1_234_567, 500_000_000)
            );
            assert_eq!(
                fs::read_to_string(root.join("g".repeat(180))).unwrap(),
                "gnu"
            );
            assert!(meta("zeros").len() == 4 << 20 && meta("zeros").blocks() == 0);
            assert_eq!(fs::read_to_string(root.join("twice")).unwrap(), "second");
            assert_eq!(
                fs::read_to_string(root.join("keeps-first")).unwrap(),
                "first"
            );
            let xattr = |key: &std::ffi::CStr| {
                let mut value = [0_u8; 64];
                rustix::fs::getxattr(root.join("attributes"), key, &mut value)
                    .ok()
                    .map(|n| value[..n].to_vec())
            };
            assert_eq!(xattr(c"user.note").as_deref(), Some(&b"kept"[..]));
            assert_eq!(xattr(c"user.overlay.redirect"), None);
            assert_eq!(xattr(c"trusted.overlay.opaque"), None);
            assert_eq!(xattr(c"security.capability").is_some(), is_root());
            assert_clean(dir.path());
        },
    );
}

/// `cap_net_raw+ep`.
fn capability() -> Vec<u8> {
    let mut value = vec![0; 20];
    value[..4].copy_from_slice(&0x0200_0001_u32.to_le_bytes());
    value[4..8].copy_from_slice(&(1_u32 << 13).to_le_bytes());
    value
}

/// An entry whose name stands in an entry before it, as GNU tar writes it.
fn gnu_long_name(name: &str) -> Vec<u8> {
    let mut long = Entry::special("././@LongLink", b'L');
    long.data = format!("{name}\0").into_bytes();
    tar(&[long, Entry::file(&name[..100], "gnu")])
}

#[test]
fn sparse_files_in_all_forms_of_gnu_tar_keep_content_and_holes() {
    as_root_and_plain_user(
        "unpack::sparse_files_in_all_forms_of_gnu_tar_keep_content_and_holes",
        || {
            let dir = temp();
            let sparse = dir.path().join("sparse");
            let file = fs::File::create(&sparse).unwrap();
            for piece in 0..40_u64 {
                file.write_all_at(format!("piece {piece}").as_bytes(), piece << 20)
                    .unwrap();
            }
            file.set_len(100 << 20).unwrap();
            let store = open(dir.path());
            for form in [
                &["--format=gnu"][..],
                &["--format=posix", "--sparse-version=0.0"],
                &["--format=posix", "--sparse-version=0.1"],
                &["--format=posix", "--sparse-version=1.0"],
            ] {
                let made = std::process::Command::new("tar")
                    .args(["-S", "-c", "-C"])
                    .arg(dir.path())
                    .args(form)
                    .arg("sparse")
                    .output()
                    .unwrap();
                assert!(made.status.success());
                assert!(made.stdout.len() < 1 << 20, "tar wrote no sparse file");
                let path = dir.path().join("image.tar");
                build(&[made.stdout], Compression::Zstd).write(&path);
                let image = ensure(&store, &format!("oci-archive:{}", path.display())).unwrap();
                let unpacked = image.layers[0].join("sparse");
                assert!(
                    fs::read(&unpacked).unwrap() == fs::read(&sparse).unwrap(),
                    "{form:?}"
                );
                assert!(
                    unpacked.metadata().unwrap().blocks() * 512 < 1 << 20,
                    "{form:?}"
                );
            }
        },
    );
}

#[test]
fn whiteouts_hide_lower_layers_but_never_their_own() {
    as_root_and_plain_user(
        "unpack::whiteouts_hide_lower_layers_but_never_their_own",
        || {
            let dir = temp();
            let store = open(dir.path());
            let reference = image(
                dir.path(),
                "whiteouts",
                &[
                    vec![
                        Entry::file("gone", "1"),
                        Entry::file("replaced", "1"),
                        Entry::file("opaque/old", "1"),
                        Entry::file("opaque/deep/old", "1"),
                        Entry::file("renewed/old", "1"),
                        Entry::file("before", "1"),
                    ],
                    vec![
                        Entry::file(".wh.gone", ""),
                        Entry::file("opaque/new", "2"),
                        Entry::file("opaque/.wh.new", ""),
                        Entry::file("opaque/.wh..wh..opq", ""),
                        Entry::file(".wh.replaced", ""),
                        Entry::file("replaced", "2"),
                        Entry::file(".wh.renewed", ""),
                        Entry::file("renewed/new", "2"),
                        Entry::file("before", "2"),
                        Entry::file(".wh.before", ""),
                        Entry::file(".wh..wh.plnk/13.4", "AUFS"),
                        Entry::file(".wh..wh.aufs", "AUFS"),
                    ],
                    vec![Entry::file(".wh.never-was", "")],
                ],
            );
            let image = ensure(&store, &reference).unwrap();
            assert_eq!(image.layers.len(), 3);
            let shown = mounted(&image.layers, store.user_xattr());
            let files: Vec<(&str, &str)> = shown
                .iter()
                .filter(|(_, shown)| shown.kind == 'f')
                .map(|(name, shown)| (name.as_str(), shown.content.as_str()))
                .collect();
            assert_eq!(
                files,
                [
                    ("before", "2"),
                    ("opaque/new", "2"),
                    ("renewed/new", "2"),
                    ("replaced", "2")
                ]
            );
        },
    );
}

#[test]
fn a_layer_whose_root_is_opaque_leaves_nothing_of_those_below() {
    as_root_and_plain_user(
        "unpack::a_layer_whose_root_is_opaque_leaves_nothing_of_those_below",
        || {
            let dir = temp();
            let store = open(dir.path());
            let reference = image(
                dir.path(),
                "opaque-root",
                &[
                    vec![Entry::file("old", "1")],
                    vec![Entry::file(".wh..wh..opq", ""), Entry::file("new", "2")],
                    vec![Entry::file("newer", "3")],
                ],
            );
            let image = ensure(&store, &reference).unwrap();
            assert_eq!(image.layers.len(), 2);
            let shown = mounted(&image.layers, store.user_xattr());
            assert_eq!(shown.keys().collect::<Vec<_>>(), ["new", "newer"]);
        },
    );
}
