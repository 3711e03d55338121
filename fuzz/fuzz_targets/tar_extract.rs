//! Tar streams. Whatever they hold, nothing beside the target directory
//! changes. A stream of zeros and ones never has a good checksum, so headers
//! get theirs corrected first.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tempfile::TempDir;

const BLOCK: usize = 512;

thread_local! {
    static DIR: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

/// Gives each block that could be a header the checksum of one.
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
fn outside(dir: &Path) -> (Vec<String>, String, u32, u32) {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let precious = dir.join("precious");
    let text = fs::read_to_string(&precious).unwrap();
    let found = fs::metadata(&precious).unwrap();
    (names, text, found.mode(), fs::metadata(dir).unwrap().mode())
}

fuzz_target!(|input: &[u8]| {
    DIR.with_borrow_mut(|slot| {
        let dir = slot.get_or_insert_with(|| {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("precious"), "gold").unwrap();
            dir
        });
        let target = dir.path().join("target");
        fs::create_dir(&target).unwrap();
        let before = outside(dir.path());
        let _ = skyrl_guest::file::extract(&mut with_checksums(input).as_slice(), &target);
        assert_eq!(outside(dir.path()), before);
        fs::remove_dir_all(&target).unwrap();
    });
});
