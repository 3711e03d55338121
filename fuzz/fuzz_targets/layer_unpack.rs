//! Layers of images. Whatever an archive holds, nothing beside the target
//! directory changes, and what was unpacked can be removed. Headers get their
//! checksums corrected first, or nearly all inputs would end at the first one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tempfile::TempDir;

const BLOCK: usize = 512;
/// Bytes a layer may take.
const LIMIT: u64 = 1 << 20;

thread_local! {
    static DIR: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

fn with_checksums(input: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for block in bytes.chunks_exact_mut(BLOCK) {
        if block[0] == 0 {
            continue;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}

/// What an escape would change.
fn outside(dir: &Path) -> (Vec<String>, String, u32, u64) {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let precious = dir.join("precious");
    let text = fs::read_to_string(&precious).unwrap();
    let found = fs::metadata(&precious).unwrap();
    (names, text, found.mode(), found.nlink())
}

fuzz_target!(|input: &[u8]| {
    DIR.with_borrow_mut(|slot| {
        let dir = slot.get_or_insert_with(|| {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("precious"), "gold").unwrap();
            dir
        });
        let before = outside(dir.path());
        let diff = dir.path().join("diff");
        let archive = with_checksums(input);
        let _ = skyrl_sandbox::image::unpack_layer(archive.as_slice(), &diff, LIMIT);
        skyrl_sandbox::tree::remove_tree(&diff).unwrap();
        assert_eq!(outside(dir.path()), before);
    });
});
