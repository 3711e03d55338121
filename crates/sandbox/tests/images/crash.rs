//! Killed at any moment, the store serves whole images or none.

use crate::archive::{Entry, image};
use crate::support::{assert_clean, ensure, names, open, temp};
use skyrl_sandbox::ImageStore;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What the process that is going to be killed unpacks; empty in all others.
const VICTIM: &str = "SKYRL_TEST_CRASH_VICTIM";

fn many_files() -> Vec<Entry> {
    (0..3000)
        .map(|n| Entry::file(&format!("dir-{}/file-{n}", n % 50), format!("{n}")))
        .collect()
}

#[test]
fn a_process_killed_while_unpacking_leaves_no_image_and_the_next_one_cleans_up() {
    if let Ok(dir) = std::env::var(VICTIM) {
        let store = ImageStore::open(&std::path::Path::new(&dir).join("images"), None).unwrap();
        let _ = ensure(&store, &format!("oci-archive:{dir}/big.tar"));
        return;
    }
    let dir = temp();
    let reference = image(
        dir.path(),
        "big",
        &[vec![Entry::file("base", "b")], many_files()],
    );
    let mut interrupted = 0;
    for delay in [0, 5, 10, 20, 40, 80, 120, 160] {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::a_process_killed_while_unpacking_leaves_no_image_and_the_next_one_cleans_up"])
            .env(VICTIM, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From when it has begun.
        let tmp = dir.path().join("images/tmp");
        let begun = Instant::now();
        while names(&tmp).is_empty()
            && begun.elapsed() < Duration::from_secs(5)
            && victim.try_wait().unwrap().is_none()
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        victim.kill().unwrap();
        victim.wait().unwrap();
        interrupted += usize::from(!names(&tmp).is_empty());
        // Whatever is visible is whole.
        let layers = dir.path().join("images/layers");
        for layer in fs::read_dir(&layers).into_iter().flatten().flatten() {
            let files = names(&layer.path().join("diff")).len();
            assert!(
                files == 1 || files == 3050,
                "a layer of {files} files is visible"
            );
        }
        let store = open(dir.path());
        assert_clean(dir.path());
        if let Some(known) = store.list().unwrap().first() {
            assert_eq!(known.references, std::slice::from_ref(&reference));
            store.remove(&reference.parse().unwrap()).unwrap();
        }
        for layer in names(&layers) {
            let _ = fs::remove_dir_all(layers.join(layer));
        }
    }
    assert!(interrupted > 0, "no kill hit a process at work");
    let store = open(dir.path());
    let made = ensure(&store, &reference).unwrap();
    assert_eq!(names(&made.layers[0]).len(), 3050);
}

#[test]
fn what_the_dead_left_is_removed_and_what_the_living_make_is_not() {
    let dir = temp();
    drop(open(dir.path()));
    let tmp = dir.path().join("images/tmp");
    fs::create_dir_all(tmp.join("0123456789abcdef/diff/half")).unwrap();
    fs::write(tmp.join("0123456789abcdef.lock"), "").unwrap();
    fs::create_dir_all(tmp.join("without-a-lock/diff")).unwrap();
    fs::create_dir_all(tmp.join("feedfeedfeedfeed/diff")).unwrap();
    let living = fs::File::create(tmp.join("feedfeedfeedfeed.lock")).unwrap();
    rustix::fs::flock(&living, rustix::fs::FlockOperation::LockExclusive).unwrap();
    drop(open(dir.path()));
    assert_eq!(
        names(&tmp),
        [
            "feedfeedfeedfeed",
            "feedfeedfeedfeed.lock",
            "feedfeedfeedfeed/diff"
        ]
    );
    drop(living);
    drop(open(dir.path()));
    assert_clean(dir.path());
}

#[test]
fn a_layer_that_was_not_flushed_before_the_machine_went_down_is_unpacked_again() {
    let dir = temp();
    let reference = image(dir.path(), "x", &[vec![Entry::file("file", "content")]]);
    let made = ensure(&open(dir.path()), &reference).unwrap().layers[0].clone();
    let layer = made.parent().unwrap().to_owned();
    let record = fs::read_to_string(layer.join("layer.json")).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    fs::write(
        layer.join("layer.json"),
        record.replace(boot.trim(), "another-boot"),
    )
    .unwrap();
    // Flushed: it is trusted.
    drop(open(dir.path()));
    assert!(made.exists());
    // Not flushed: half of it may be missing.
    fs::remove_file(layer.join("durable")).unwrap();
    fs::write(made.join("file"), "").unwrap();
    let store = open(dir.path());
    assert!(!made.exists());
    assert!(store.list().unwrap().is_empty());
    ensure(&store, &reference).unwrap();
    assert_eq!(fs::read_to_string(made.join("file")).unwrap(), "content");
}

#[test]
fn a_damaged_record_means_the_image_is_made_again() {
    let dir = temp();
    let reference = image(dir.path(), "x", &[vec![Entry::file("file", "content")]]);
    let store = open(dir.path());
    drop(ensure(&store, &reference).unwrap());
    for part in ["records", "refs"] {
        for name in names(&dir.path().join("images").join(part)) {
            fs::write(dir.path().join("images").join(part).join(name), "{ half").unwrap();
        }
        let image = ensure(&store, &reference).unwrap();
        assert!(image.layers[0].join("file").exists());
    }
}
