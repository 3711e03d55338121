//! Random stacks of layers: what the kernel shows of them is what the image
//! specification says.

use crate::archive::{Compression, Entry, build, tar};
use crate::support::{Shown, as_root_and_plain_user, ensure, listed, mounted, open, temp};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use skyrl_sandbox::tree::{CopyOptions, copy_layers, remove_tree};
use std::collections::BTreeMap;

/// What a layer does at a path.
#[derive(Debug, Clone)]
enum Change {
    Dir(u32),
    File(String, u32),
    Link(String),
    Remove,
    Opaque,
}

type Layer = Vec<(String, Change)>;

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn change() -> impl Strategy<Value = Change> {
    let mode = prop::sample::select(vec![0o755_u32, 0o700, 0o1777, 0o555]);
    prop_oneof![
        3 => mode.clone().prop_map(Change::Dir),
        4 => ("[a-z]{1,6}", mode).prop_map(|(text, mode)| Change::File(text, mode)),
        1 => path().prop_map(Change::Link),
        3 => Just(Change::Remove),
        1 => Just(Change::Opaque),
    ]
}

fn layers() -> impl Strategy<Value = Vec<Layer>> {
    let layer = prop::collection::vec((path(), change()), 1..12);
    prop::collection::vec(layer, 1..6)
}

/// Entries of a layer's archive; those that would be refused are left out.
fn entries(layer: &Layer) -> Vec<(String, Change, Entry)> {
    let mut own: BTreeMap<String, bool> = BTreeMap::new();
    let mut kept = Vec::new();
    for (path, change) in layer {
        let parents: Vec<&str> = path.match_indices('/').map(|(at, _)| &path[..at]).collect();
        // Through what this layer made a file or a link.
        if parents
            .iter()
            .any(|parent| own.get(*parent) == Some(&false))
        {
            continue;
        }
        let (dir, name) = path
            .rsplit_once('/')
            .map_or((String::new(), path.as_str()), |(d, n)| {
                (format!("{d}/"), n)
            });
        let is_dir = match change {
            Change::Dir(_) => Some(true),
            Change::File(..) | Change::Link(_) => Some(false),
            Change::Remove => None,
            Change::Opaque if own.get(path) == Some(&false) => continue,
            Change::Opaque => Some(true),
        };
        for parent in parents {
            own.insert(parent.to_owned(), true);
        }
        if let Some(is_dir) = is_dir {
            if !is_dir {
                own.retain(|other, _| !other.starts_with(&format!("{path}/")));
            }
            own.insert(path.clone(), is_dir);
        }
        let entry = match change {
            Change::Dir(mode) => Entry::dir(&format!("{path}/")).mode(u64::from(*mode)),
            Change::File(text, mode) => Entry::file(path, text.as_str()).mode(u64::from(*mode)),
            Change::Link(target) => Entry::symlink(path, target),
            Change::Remove => Entry::file(&format!("{dir}.wh.{name}"), ""),
            Change::Opaque => Entry::file(&format!("{path}/.wh..wh..opq"), ""),
        };
        kept.push((path.clone(), change.clone(), entry));
    }
    kept
}

/// The specification: what a layer hides, it hides of the layers below it
/// only; then its entries are put in one after the other.
fn apply(tree: &mut BTreeMap<String, Shown>, layer: &[(String, Change, Entry)]) {
    let below = |path: &str| format!("{path}/");
    for (path, change, _) in layer {
        match change {
            Change::Remove => {
                tree.retain(|name, _| name != path && !name.starts_with(&below(path)))
            }
            Change::Opaque => tree.retain(|name, _| !name.starts_with(&below(path))),
            _ => {}
        }
    }
    let dir = |mode| Shown {
        kind: 'd',
        mode,
        mtime: 0,
        content: String::new(),
    };
    for (path, change, _) in layer {
        let mut parents: Vec<&str> = path.match_indices('/').map(|(at, _)| &path[..at]).collect();
        if matches!(change, Change::Opaque) {
            parents.push(path);
        }
        for parent in parents {
            if tree.get(parent).is_none_or(|shown| shown.kind != 'd') {
                tree.insert(parent.to_owned(), dir(0o755));
            }
        }
        let new = match change {
            Change::Remove | Change::Opaque => continue,
            Change::Dir(mode) => {
                if tree.get(path).is_some_and(|shown| shown.kind == 'd') {
                    tree.insert(path.clone(), dir(*mode));
                    continue;
                }
                dir(*mode)
            }
            Change::File(text, mode) => Shown {
                kind: 'f',
                mode: *mode,
                mtime: 1_000_000,
                content: text.clone(),
            },
            Change::Link(target) => Shown {
                kind: 'l',
                mode: 0o777,
                mtime: 1_000_000,
                content: target.clone(),
            },
        };
        tree.retain(|name, _| !name.starts_with(&below(path)));
        tree.insert(path.clone(), new);
    }
}

#[test]
fn stacked_layers_look_as_the_specification_says() {
    as_root_and_plain_user(
        "merge::stacked_layers_look_as_the_specification_says",
        || {
            let dir = temp();
            let store = open(dir.path());
            let mut runner = TestRunner::new(Config {
                cases: 60,
                failure_persistence: None,
                ..Config::default()
            });
            let file = dir.path().join("image.tar");
            let reference = format!("oci-archive:{}", file.display());
            let check = |stack: Vec<Layer>| {
                let stack: Vec<_> = stack.iter().map(entries).collect();
                let mut expected = BTreeMap::new();
                for layer in &stack {
                    apply(&mut expected, layer);
                }
                let tars: Vec<Vec<u8>> = stack
                    .iter()
                    .map(|layer| {
                        tar(&layer
                            .iter()
                            .map(|(_, _, entry)| entry.clone())
                            .collect::<Vec<_>>())
                    })
                    .collect();
                build(&tars, Compression::None).write(&file);
                let image = ensure(&store, &reference).unwrap();
                let mut shown = mounted(&image.layers, store.user_xattr());
                for one in shown.values_mut().filter(|one| one.kind == 'd') {
                    one.mtime = 0;
                }
                prop_assert_eq!(&shown, &expected);
                // The same without a mount: a root copied from the layers.
                let copy = dir.path().join("copy");
                copy_layers(&image.layers, &copy, CopyOptions::default()).unwrap();
                let mut copied = listed(&copy);
                remove_tree(&copy).unwrap();
                for one in copied.values_mut().filter(|one| one.kind == 'd') {
                    one.mtime = 0;
                }
                prop_assert_eq!(copied, expected);
                Ok(())
            };
            runner.run(&layers(), check).unwrap();
        },
    );
}
