//! One fetch for many callers, use counts, eviction, privileges.

use crate::archive::{Entry, image};
use crate::support::{
    as_root_and_plain_user, assert_clean, ensure, ensure_with, is_root, names, open, runtime, temp,
};
use skyrl_protocol::{OwnerId, SandboxId};
use skyrl_sandbox::image::{PullUpdate, Quiet};
use skyrl_sandbox::{ImageError, ImageRef, ImageStore, PullPolicy};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

fn owner() -> OwnerId {
    "run-1".parse().unwrap()
}

fn sandbox(name: &str) -> SandboxId {
    name.parse().unwrap()
}

/// An image of about this many kibibytes that can't be compressed to nothing.
fn sized(dir: &Path, name: &str, kib: u32) -> String {
    let seed = u32::from(name.as_bytes()[0]);
    let data: Vec<u8> = (0..kib * 1024)
        .map(|n| (n.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 23) as u8)
        .collect();
    image(dir, name, &[vec![Entry::file("data", data)]])
}

#[test]
fn sixteen_threads_and_four_stores_unpack_an_image_once() {
    as_root_and_plain_user(
        "store::sixteen_threads_and_four_stores_unpack_an_image_once",
        || {
            let dir = temp();
            let reference = sized(dir.path(), "shared", 4096);
            let unpackers = Arc::new(AtomicUsize::new(0));
            let together = Arc::new(Barrier::new(16));
            // Stores of their own stand for processes of their own: they share
            // nothing but the disk.
            let stores: Vec<ImageStore> = (0..4).map(|_| open(dir.path())).collect();
            let threads: Vec<_> = (0..16)
                .map(|n| {
                    let store = stores[n % 4].clone();
                    let (reference, together, unpackers) =
                        (reference.clone(), together.clone(), unpackers.clone());
                    std::thread::spawn(move || {
                        let image: ImageRef = reference.parse().unwrap();
                        together.wait();
                        let unpacked = AtomicUsize::new(0);
                        let progress = |update: &PullUpdate| {
                            if matches!(update, PullUpdate::Unpacking { .. }) {
                                unpacked.store(1, Ordering::Relaxed);
                            }
                        };
                        let made = runtime()
                            .block_on(store.ensure(&image, PullPolicy::IfMissing, &progress))
                            .unwrap();
                        unpackers.fetch_add(unpacked.into_inner(), Ordering::Relaxed);
                        made.layers
                    })
                })
                .collect();
            let layers: Vec<_> = threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect();
            assert!(layers.iter().all(|one| *one == layers[0]));
            assert_eq!(unpackers.load(Ordering::Relaxed), 1);
            assert_clean(dir.path());
        },
    );
}

#[test]
fn a_layer_shared_by_images_is_kept_once_and_as_long_as_one_of_them() {
    let dir = temp();
    let base = vec![Entry::file("base", vec![1; 100_000])];
    let one = image(
        dir.path(),
        "one",
        &[base.clone(), vec![Entry::file("one", "")]],
    );
    let two = image(dir.path(), "two", &[base, vec![Entry::file("two", "")]]);
    let store = open(dir.path());
    let first = ensure(&store, &one).unwrap().layers;
    let second = ensure(&store, &two).unwrap().layers;
    assert_eq!(first[1], second[1]);
    assert_eq!(
        fs::read_dir(dir.path().join("images/layers"))
            .unwrap()
            .count(),
        3
    );
    store.remove(&one.parse().unwrap()).unwrap();
    assert!(!first[0].exists() && second[0].exists() && second[1].exists());
    store.remove(&two.parse().unwrap()).unwrap();
    assert_eq!(names(&dir.path().join("images/layers")), [""; 0]);
    assert!(matches!(
        store.remove(&two.parse().unwrap()),
        Err(ImageError::NotFound { .. })
    ));
}

#[test]
fn an_image_in_use_is_neither_removed_nor_evicted() {
    as_root_and_plain_user(
        "store::an_image_in_use_is_neither_removed_nor_evicted",
        || {
            let dir = temp();
            let reference = sized(dir.path(), "used", 100);
            let parsed: ImageRef = reference.parse().unwrap();
            let store = ImageStore::open(&dir.path().join("images"), Some(1)).unwrap();
            let error = ensure(&store, &reference).unwrap_err();
            assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
            let store = ImageStore::open(&dir.path().join("images"), Some(1 << 20)).unwrap();
            let held = ensure(&store, &reference).unwrap();
            let tight = ImageStore::open(&dir.path().join("images"), Some(1)).unwrap();

            // Held by a process.
            assert!(tight.evict().unwrap().images.is_empty());
            let error = store.remove(&parsed).unwrap_err();
            assert!(matches!(error, ImageError::InUse { .. }), "{error}");
            // Marked for a sandbox.
            store.mark_used(&held, &owner(), &sandbox("a")).unwrap();
            store.mark_used(&held, &owner(), &sandbox("b")).unwrap();
            let layer = held.layers[0].clone();
            drop(held);
            assert!(tight.evict().unwrap().images.is_empty());
            let error = store.remove(&parsed).unwrap_err();
            assert!(error.to_string().contains("run-1/a, run-1/b"), "{error}");
            assert_eq!(store.list().unwrap()[0].used_by, ["run-1/a", "run-1/b"]);
            store.unmark(&owner(), &sandbox("a")).unwrap();
            store.unmark(&owner(), &sandbox("a")).unwrap();
            assert!(tight.evict().unwrap().images.is_empty());
            // Nobody needs it any more.
            assert_eq!(store.owners().unwrap(), [owner()]);
            store.unmark_owner(&owner()).unwrap();
            assert!(layer.exists());
            let evicted = tight.evict().unwrap();
            assert_eq!(evicted.images.len(), 1);
            assert!(evicted.bytes >= 100 << 10, "{evicted:?}");
            assert!(!layer.exists());
            assert!(store.list().unwrap().is_empty());
            assert_clean(dir.path());
        },
    );
}

#[test]
fn above_the_quota_the_image_longest_unused_goes_first() {
    let dir = temp();
    let images: Vec<String> = ["a", "b", "c"]
        .iter()
        .map(|name| sized(dir.path(), name, 200))
        .collect();
    let store = open(dir.path());
    for image in &images {
        ensure(&store, image).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // The oldest becomes the most recently used.
    ensure(&store, &images[0]).unwrap();
    let tight = ImageStore::open(&dir.path().join("images"), Some(450 << 10)).unwrap();
    let evicted = tight.evict().unwrap();
    assert_eq!(evicted.images.len(), 1);
    let left: Vec<String> = store
        .list()
        .unwrap()
        .into_iter()
        .flat_map(|image| image.references)
        .collect();
    assert_eq!(left, [images[0].clone(), images[2].clone()]);
    // A further image makes room by itself.
    let another = sized(dir.path(), "d", 200);
    ensure(&tight, &another).unwrap();
    let left: Vec<String> = store
        .list()
        .unwrap()
        .into_iter()
        .flat_map(|image| image.references)
        .collect();
    assert_eq!(left, [another, images[0].clone()]);
}

#[test]
fn an_archive_that_changed_is_read_again_and_one_that_is_gone_is_not_missed() {
    let dir = temp();
    let store = open(dir.path());
    let reference = image(dir.path(), "x", &[vec![Entry::file("one", "")]]);
    let first = ensure(&store, &reference).unwrap();
    assert_eq!(
        ensure_with(&store, &reference, PullPolicy::Always)
            .unwrap()
            .digest,
        first.digest
    );
    image(dir.path(), "x", &[vec![Entry::file("two", "")]]);
    let second = ensure(&store, &reference).unwrap();
    assert_ne!(first.digest, second.digest);
    fs::remove_file(dir.path().join("x.tar")).unwrap();
    assert_eq!(ensure(&store, &reference).unwrap().digest, second.digest);
    let never = image(dir.path(), "y", &[vec![Entry::file("three", "")]]);
    let error = ensure_with(&store, &never, PullPolicy::Never).unwrap_err();
    assert!(error.to_string().contains("not allowed"), "{error}");
}

#[test]
fn a_store_of_other_privileges_is_refused() {
    if !is_root() {
        return;
    }
    let dir = temp();
    drop(open(dir.path()));
    let format = dir.path().join("images/format.json");
    let text = fs::read_to_string(&format).unwrap();
    for (from, to, expected) in [
        ("\"trusted\"", "\"user\"", "without privileges"),
        ("\"uid\": 0", "\"uid\": 5", "made by user 5"),
        ("\"version\": 1", "\"version\": 99", "version 99"),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(&format, text.replace(from, to)).unwrap();
        let error = ImageStore::open(&dir.path().join("images"), None).unwrap_err();
        assert!(matches!(error, ImageError::Store { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn an_image_that_takes_too_long_is_given_up() {
    let dir = temp();
    let reference = sized(dir.path(), "slow", 20 << 10);
    let store = open(dir.path()).with_pull_limit(std::time::Duration::ZERO);
    let error = ensure(&store, &reference).unwrap_err();
    assert!(matches!(error, ImageError::Deadline { .. }), "{error}");
    assert_clean(dir.path());
}

#[test]
fn a_caller_that_gives_up_ends_the_work() {
    let dir = temp();
    let reference: ImageRef = sized(dir.path(), "large", 24 << 10).parse().unwrap();
    let store = open(dir.path());
    let runtime = runtime();
    runtime.block_on(async {
        let begun = tokio::sync::Notify::new();
        let progress = |_: &PullUpdate| begun.notify_one();
        tokio::select! {
            _ = store.ensure(&reference, PullPolicy::IfMissing, &progress) => {}
            () = begun.notified() => {}
        }
    });
    // Waits for the abandoned work.
    drop(runtime);
    assert_clean(dir.path());
    crate::support::runtime()
        .block_on(store.ensure(&reference, PullPolicy::IfMissing, &Quiet))
        .unwrap();
}
