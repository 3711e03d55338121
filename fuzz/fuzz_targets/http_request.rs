//! Requests as a connection delivers them: heads, bodies by length and by
//! chunks, several in a row. The first byte says how the bytes are cut into
//! reads; how they are cut must not matter.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skyrl_guest::http::body::{Body, Buffered, read_head};
use skyrl_guest::http::head::Head;
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

/// The requests understood, each with its body, up to the first failure.
fn requests(bytes: &[u8], step: usize) -> Vec<(Head, Result<Vec<u8>, io::ErrorKind>)> {
    let mut from = Buffered::new(Pieces { bytes, step });
    let mut all = Vec::new();
    while let Ok(Some(head)) = read_head(&mut from) {
        let mut content = Vec::new();
        let mut body = Body::new(&mut from, head.framing);
        let read = body.read_to_end(&mut content).map_err(|error| error.kind());
        let go_on = read.is_ok() && head.keep_alive;
        all.push((head, read.map(|_| content)));
        if !go_on {
            break;
        }
    }
    all
}

fuzz_target!(|input: &[u8]| {
    let Some((step, bytes)) = input.split_first() else {
        return;
    };
    let whole = requests(bytes, usize::MAX);
    let cut = requests(bytes, usize::from(*step).max(1));
    assert_eq!(whole, cut);
    let total: usize = whole
        .iter()
        .map(|(_, body)| body.as_ref().map_or(0, Vec::len))
        .sum();
    assert!(total <= bytes.len());
});
