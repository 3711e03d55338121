//! Snapshots over real overlays: what the kernel shows of a frozen sandbox is
//! what the sandbox had, through chains, merges and crashes.

use crate::archive::{Entry, image};
use crate::support::{Shown, as_root_and_plain_user, ensure, mounted, names, run_mounted, temp};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use skyrl_protocol::{OwnerId, SandboxId, SnapshotId};
use skyrl_sandbox::snapshot::{MAX_CHAIN, Source};
use skyrl_sandbox::tree::CopyOptions;
use skyrl_sandbox::{Image, ImageError, ImageStore, OwnerLock, SnapshotMode, Snapshots, StateDir};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// An owner with a store and snapshots, and an image to start from.
struct House {
    dir: tempfile::TempDir,
    store: ImageStore,
    owner: OwnerLock,
    snapshots: Snapshots,
    base: Image,
}

impl House {
    fn new() -> Self {
        let dir = temp();
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        let owner = state
            .lock_owner(&"run-1".parse::<OwnerId>().unwrap())
            .unwrap();
        let store = ImageStore::open(&state.images(), None).unwrap();
        let reference = image(
            dir.path(),
            "base",
            &[
                vec![
                    Entry::file("a/b/deep", "base"),
                    Entry::file("kept", "base"),
                    Entry::dir("tmp").mode(0o1777),
                ],
                vec![Entry::file("gone", "base"), Entry::file("d/old", "base")],
            ],
        );
        let base = ensure(&store, &reference).unwrap();
        let snapshots = Snapshots::open(owner.dir().clone(), store.clone()).unwrap();
        Self {
            dir,
            store,
            owner,
            snapshots,
            base,
        }
    }

    /// Runs a script in an overlay over an image; returns the upper directory.
    fn sandbox(&self, name: &str, image: &Image, script: &str) -> PathBuf {
        let place = self.owner.dir().sandbox(&sandbox(name));
        fs::create_dir_all(place.join("upper")).unwrap();
        fs::create_dir_all(place.join("work")).unwrap();
        run_mounted(
            &image.layers,
            &place.join("upper"),
            &place.join("work"),
            self.store.user_xattr(),
            script,
        );
        place.join("upper")
    }

    fn freeze(
        &self,
        name: &str,
        base: &Image,
        upper: &Path,
        mode: SnapshotMode,
    ) -> Result<(), ImageError> {
        self.snapshots.freeze(
            &snapshot(name),
            base,
            Source::Upper(upper),
            mode,
            CopyOptions::default(),
        )
    }

    fn shown(&self, image: &Image) -> BTreeMap<String, Shown> {
        mounted(&image.layers, self.store.user_xattr())
    }

    fn dir_names(&self) -> Vec<String> {
        let dir = self.owner.dir().root().join("snapshots");
        let mut found: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".lock")
            .collect();
        found.sort();
        found
    }
}

fn snapshot(name: &str) -> SnapshotId {
    name.parse().unwrap()
}

fn sandbox(name: &str) -> SandboxId {
    name.parse().unwrap()
}

fn contents(shown: &BTreeMap<String, Shown>) -> Vec<(&str, &str)> {
    shown
        .iter()
        .filter(|(_, one)| one.kind == 'f')
        .map(|(name, one)| (name.as_str(), one.content.as_str()))
        .collect()
}

const CHANGES: &str =
    "rm gone; rm -r d; mkdir d; echo -n new >d/new; echo -n changed >kept; chmod 600 kept";
const CHANGED: [(&str, &str); 3] = [("a/b/deep", "base"), ("d/new", "new"), ("kept", "changed")];

#[test]
fn a_frozen_sandbox_is_an_image_that_shows_what_the_sandbox_had() {
    as_root_and_plain_user(
        "snapshots::a_frozen_sandbox_is_an_image_that_shows_what_the_sandbox_had",
        || {
            let house = House::new();
            for (name, mode) in [
                ("copied", SnapshotMode::Copy),
                ("consumed", SnapshotMode::Consume),
            ] {
                let upper = house.sandbox(name, &house.base, CHANGES);
                house.freeze(name, &house.base, &upper, mode).unwrap();
                assert_eq!(upper.exists(), mode == SnapshotMode::Copy);
                let image = house.snapshots.resolve(&snapshot(name)).unwrap();
                let shown = house.shown(&image);
                assert_eq!(contents(&shown), CHANGED);
                assert_eq!(shown["kept"].mode, 0o600);
                assert_eq!(shown["tmp"].mode, 0o1777);
                assert_eq!(image.config, house.base.config);
                let error = house.freeze(name, &house.base, &upper, mode).unwrap_err();
                assert!(matches!(error, ImageError::Exists { .. }), "{error}");
            }
            let base: ImageError = house.store.remove(&house.base.reference).unwrap_err();
            assert!(base.to_string().contains("snapshot:"), "{base}");
        },
    );
}

#[test]
fn forks_of_forks_stack_up_to_the_stated_depth_and_are_merged_then() {
    as_root_and_plain_user(
        "snapshots::forks_of_forks_stack_up_to_the_stated_depth_and_are_merged_then",
        || {
            let house = House::new();
            let mut image = house.base.clone();
            let mut deepest = 0;
            for turn in 0..MAX_CHAIN + 4 {
                let name = format!("s{turn}");
                // Each removes what the one before made, and makes a directory
                // anew that was there.
                let script = format!(
                    "[ {turn} = 0 ] || rm made-{}; echo -n {turn} >made-{turn}; rm -rf d; mkdir d; echo -n {turn} >d/{turn}; ln made-{turn} same; mv same same-{turn}; rm -f same-{}",
                    turn.wrapping_sub(1),
                    turn.wrapping_sub(1),
                );
                let upper = house.sandbox(&name, &image, &script);
                house
                    .freeze(&name, &image, &upper, SnapshotMode::Consume)
                    .unwrap();
                image = house
                    .snapshots
                    .acquire(&snapshot(&name), &sandbox("keeper"))
                    .unwrap();
                deepest = deepest.max(image.layers.len());
                let shown = house.shown(&image);
                let (made, in_d, same) = (
                    format!("made-{turn}"),
                    format!("d/{turn}"),
                    format!("same-{turn}"),
                );
                let turn = turn.to_string();
                let expected = [
                    ("a/b/deep", "base"),
                    (&in_d, &turn),
                    ("gone", "base"),
                    ("kept", "base"),
                    (&made, &turn),
                    (&same, &turn),
                ];
                assert_eq!(contents(&shown), expected);
            }
            assert_eq!(deepest, house.base.layers.len() + MAX_CHAIN);
            assert!(image.layers.len() < deepest);
        },
    );
}

#[test]
fn files_go_when_the_name_the_sandboxes_and_the_later_snapshots_are_gone() {
    let house = House::new();
    let upper = house.sandbox("a", &house.base, "echo -n 1 >one");
    house
        .freeze("first", &house.base, &upper, SnapshotMode::Consume)
        .unwrap();
    let first = house
        .snapshots
        .acquire(&snapshot("first"), &sandbox("b"))
        .unwrap();
    let upper = house.sandbox("b", &first, "echo -n 2 >two");
    house
        .freeze("second", &first, &upper, SnapshotMode::Consume)
        .unwrap();
    house
        .snapshots
        .acquire(&snapshot("second"), &sandbox("c"))
        .unwrap();
    house.snapshots.release(&sandbox("b")).unwrap();

    house.snapshots.remove(&snapshot("first")).unwrap();
    // Its name is gone, its files are not: the second stacks on them.
    let error = house.snapshots.resolve(&snapshot("first")).unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    assert_eq!(house.dir_names(), ["first", "second"]);
    let image = house.snapshots.resolve(&snapshot("second")).unwrap();
    assert!(contents(&house.shown(&image)).contains(&("one", "1")));
    assert!(house.snapshots.list().unwrap()[0].removed);

    house.snapshots.remove(&snapshot("second")).unwrap();
    // A sandbox still runs from it.
    assert_eq!(house.dir_names(), ["first", "second"]);
    house.snapshots.release(&sandbox("c")).unwrap();
    assert_eq!(house.dir_names(), [""; 0]);
    house.snapshots.remove(&snapshot("second")).unwrap();
    // And the base is free.
    let House {
        base, store, dir, ..
    } = house;
    let reference = base.reference.clone();
    drop(base);
    drop(first);
    store.remove(&reference).unwrap();
    drop(dir);
}

#[test]
fn a_root_that_was_a_copy_becomes_a_snapshot_of_its_own() {
    let house = House::new();
    let root = house.owner.dir().sandbox(&sandbox("copied-root"));
    fs::create_dir_all(root.join("bin")).unwrap();
    house
        .snapshots
        .freeze(
            &snapshot("whole"),
            &house.base,
            Source::Root(&root),
            SnapshotMode::Copy,
            CopyOptions::default(),
        )
        .unwrap();
    let image = house.snapshots.resolve(&snapshot("whole")).unwrap();
    assert_eq!(image.layers.len(), 1);
    assert_eq!(names(&image.layers[0]), ["bin"]);
}

#[test]
fn whatever_a_crash_interrupts_the_next_start_finds_all_or_nothing() {
    let house = House::new();
    let upper = house.sandbox("a", &house.base, CHANGES);
    house
        .freeze("whole", &house.base, &upper, SnapshotMode::Consume)
        .unwrap();
    let snapshots = house.owner.dir().root().join("snapshots");
    // Killed while freezing: before, and after the upper was moved.
    fs::create_dir_all(snapshots.join(".new-half/diff/x")).unwrap();
    fs::create_dir_all(snapshots.join(".new-begun")).unwrap();
    house
        .store
        .mark_used(&house.base, &"run-1".parse().unwrap(), &sandbox("other"))
        .unwrap();
    let uses = house.dir.path().join("state/images/uses/run-1");
    fs::copy(uses.join("other.json"), uses.join("snapshot:half.json")).unwrap();
    // Killed while removing.
    fs::create_dir_all(snapshots.join(".gone-1234/diff/x")).unwrap();
    let again = Snapshots::open(house.owner.dir().clone(), house.store.clone()).unwrap();
    assert_eq!(house.dir_names(), ["whole"]);
    assert!(!uses.join("snapshot:half.json").exists());
    assert!(uses.join("snapshot:whole.json").exists());
    let image = again.resolve(&snapshot("whole")).unwrap();
    assert_eq!(contents(&house.shown(&image)), CHANGED);
    // Killed after its name was given up.
    fs::write(snapshots.join("whole/removed"), "").unwrap();
    Snapshots::open(house.owner.dir().clone(), house.store.clone()).unwrap();
    assert_eq!(house.dir_names(), [""; 0]);
}

#[test]
fn a_copy_that_is_stopped_leaves_the_sandbox_and_nothing_else() {
    let house = House::new();
    let upper = house.sandbox("a", &house.base, CHANGES);
    let stop = std::sync::atomic::AtomicBool::new(true);
    let options = CopyOptions { stop: Some(&stop) };
    house
        .snapshots
        .freeze(
            &snapshot("x"),
            &house.base,
            Source::Upper(&upper),
            SnapshotMode::Copy,
            options,
        )
        .unwrap_err();
    assert_eq!(house.dir_names(), [""; 0]);
    house
        .freeze("x", &house.base, &upper, SnapshotMode::Consume)
        .unwrap();
}

#[test]
fn many_forks_share_one_snapshot_and_consuming_takes_no_longer_for_more_files() {
    let house = House::new();
    let upper = house.sandbox(
        "big",
        &house.base,
        "mkdir many; cd many; seq 3000 | xargs touch; head -c 50000000 /dev/zero >big",
    );
    let begun = std::time::Instant::now();
    house
        .freeze("big", &house.base, &upper, SnapshotMode::Consume)
        .unwrap();
    assert!(
        begun.elapsed() < std::time::Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    let images: Vec<Image> = (0..50)
        .map(|n| {
            house
                .snapshots
                .acquire(&snapshot("big"), &sandbox(&format!("fork-{n}")))
                .unwrap()
        })
        .collect();
    assert!(images.iter().all(|image| image.layers == images[0].layers));
    assert_eq!(house.snapshots.list().unwrap()[0].used_by.len(), 50);
}

/// One thing a sandbox does to a path.
fn action() -> impl Strategy<Value = String> {
    let path = || {
        prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
            .prop_map(|parts| parts.join("/"))
    };
    prop_oneof![
        3 => (path(), "[a-z]{1,4}").prop_map(|(p, text)| format!("[ -d {p} ] || {{ mkdir -p $(dirname {p}) && echo -n {text} >{p}; }}")),
        2 => path().prop_map(|p| format!("mkdir -p {p}")),
        2 => path().prop_map(|p| format!("rm -rf {p}")),
        1 => path().prop_map(|p| format!("rm -rf {p} && mkdir -p {p}")),
        1 => (path(), path()).prop_map(|(p, to)| format!("[ -e {p} ] && [ ! -e {to} ] && mkdir -p $(dirname {to}) && cp -a {p} {to}")),
        1 => (path(), path()).prop_map(|(p, to)| format!("[ -f {p} ] && [ ! -e {to} ] && mkdir -p $(dirname {to}) && ln {p} {to}")),
        1 => path().prop_map(|p| format!("[ -d {p} ] && chmod 1750 {p}")),
        1 => (path(), path()).prop_map(|(p, to)| format!("[ -e {p} ] || ln -sfn {to} {p}")),
    ]
}

#[test]
fn a_merged_chain_shows_what_the_chain_showed() {
    as_root_and_plain_user(
        "snapshots::a_merged_chain_shows_what_the_chain_showed",
        || {
            let house = House::new();
            let mut runner = TestRunner::new(Config {
                cases: 6,
                failure_persistence: None,
                ..Config::default()
            });
            let case = std::sync::atomic::AtomicUsize::new(0);
            let chains =
                prop::collection::vec(prop::collection::vec(action(), 1..10), MAX_CHAIN + 1);
            let check = |chain: Vec<Vec<String>>| {
                let case = case.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let mut image = house.base.clone();
                let mut uppers: Vec<PathBuf> = Vec::new();
                for (turn, actions) in chain.iter().enumerate() {
                    let name = format!("c{case}-{turn}");
                    let script = actions
                        .iter()
                        .map(|action| format!("{{ {action}; }} 2>/dev/null || :\n"))
                        .collect::<String>();
                    let upper = house.sandbox(&name, &image, &script);
                    if turn == MAX_CHAIN {
                        // What the unmerged chain shows.
                        let mut layers = vec![upper.clone()];
                        layers.extend(image.layers.iter().cloned());
                        let before = mounted(&layers, house.store.user_xattr());
                        house
                            .freeze(&name, &image, &upper, SnapshotMode::Consume)
                            .unwrap();
                        let merged = house.snapshots.resolve(&snapshot(&name)).unwrap();
                        prop_assert_eq!(merged.layers.len(), 1 + house.base.layers.len());
                        prop_assert_eq!(house.shown(&merged), before);
                    } else {
                        house
                            .freeze(&name, &image, &upper, SnapshotMode::Consume)
                            .unwrap();
                        image = house.snapshots.resolve(&snapshot(&name)).unwrap();
                    }
                    uppers.push(upper);
                }
                Ok(())
            };
            runner.run(&chains, check).unwrap();
        },
    );
}

#[test]
fn what_fuse_overlayfs_wrote_can_be_stacked_by_the_kernel() {
    as_root_and_plain_user(
        "snapshots::what_fuse_overlayfs_wrote_can_be_stacked_by_the_kernel",
        || {
            let house = House::new();
            let place = house.owner.dir().sandbox(&sandbox("fuse"));
            for part in ["upper", "work", "merged"] {
                fs::create_dir_all(place.join(part)).unwrap();
            }
            crate::support::run_fuse_mounted(&house.base.layers, &place, CHANGES);
            house
                .snapshots
                .freeze(
                    &snapshot("fuse"),
                    &house.base,
                    Source::FuseUpper(&place.join("upper")),
                    SnapshotMode::Consume,
                    CopyOptions::default(),
                )
                .unwrap();
            let image = house.snapshots.resolve(&snapshot("fuse")).unwrap();
            let shown = house.shown(&image);
            assert_eq!(contents(&shown), CHANGED);
            assert!(!shown.keys().any(|name| name.contains(".wh.")), "{shown:?}");
        },
    );
}
