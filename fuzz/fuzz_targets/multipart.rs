//! `multipart/form-data` bodies. The first byte says how the bytes are cut
//! into reads, the second how many parts are read rather than skipped.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skyrl_guest::http::multipart::{Multipart, PartHead, boundary};
use std::io::{self, Read};

struct Pieces<'a> {
    bytes: &'a [u8],
    step: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.step.min(buffer.len()).min(self.bytes.len());
        buffer[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes = &self.bytes[count..];
        Ok(count)
    }
}

/// The parts up to the first failure, and whether the form was whole.
fn parts(bytes: &[u8], step: usize, read: usize) -> (Vec<(PartHead, Vec<u8>)>, bool) {
    let mut source = Pieces { bytes, step };
    let mut all = Vec::new();
    let Ok(mut form) = Multipart::new("multipart/form-data; boundary=B", &mut source) else {
        unreachable!("the content type is good");
    };
    loop {
        match form.next_part() {
            Ok(Some(mut part)) => {
                let mut content = Vec::new();
                if all.len() < read && part.read_to_end(&mut content).is_err() {
                    return (all, false);
                }
                all.push((part.head, content));
            }
            Ok(None) => return (all, true),
            Err(_) => return (all, false),
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let [step, read, bytes @ ..] = input else {
        return;
    };
    let _ = boundary(&String::from_utf8_lossy(bytes));
    let read = usize::from(*read);
    let whole = parts(bytes, usize::MAX, read);
    let cut = parts(bytes, usize::from(*step).max(1), read);
    assert_eq!(whole.1, cut.1);
    if whole.1 {
        assert_eq!(whole, cut);
    }
});
