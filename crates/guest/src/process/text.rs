//! Text of captured bytes: invalid UTF-8 is replaced, cut characters are not
//! torn further.

use super::capture::Capture;
use skyrl_protocol::guest::Output;

/// How many bytes at the end of `bytes` are the beginning of a character that
/// more bytes could complete.
fn incomplete_suffix(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let byte = bytes[bytes.len() - back];
        let needed = match byte {
            0x80..=0xBF => continue,
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            _ => return 0,
        };
        if needed <= back {
            return 0;
        }
        // A start byte with impossible followers will never be completed.
        return match std::str::from_utf8(&bytes[bytes.len() - back..]) {
            Err(error) if error.error_len().is_none() => back,
            _ => 0,
        };
    }
    0
}

/// How many bytes at the start of `bytes` continue a character whose beginning
/// is gone.
fn orphan_prefix(bytes: &[u8]) -> usize {
    let count = bytes
        .iter()
        .take(4)
        .take_while(|b| matches!(b, 0x80..=0xBF))
        .count();
    // Four in a row are no character: the text is not UTF-8 at all.
    if count > 3 { 0 } else { count }
}

/// Turns pieces of a stream into text; a character cut by a piece's end is
/// held back until it is whole.
#[derive(Debug, Default)]
pub struct Decoder {
    held: Vec<u8>,
}

impl Decoder {
    /// Text of everything held and `bytes`, except an incomplete end.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let keep = incomplete_suffix(&self.held);
        let whole = self.held.len() - keep;
        let text = String::from_utf8_lossy(&self.held[..whole]).into_owned();
        self.held.drain(..whole);
        text
    }

    /// Text of what is still held, at the end of the stream.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

/// The text kept of a stream, with a line in place of what was dropped.
pub fn output_of(capture: &Capture) -> Output {
    let (mut head, tail) = capture.halves();
    let mut dropped = capture.dropped();
    let text = if dropped == 0 {
        head.extend_from_slice(&tail);
        String::from_utf8(head)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    } else {
        let cut = incomplete_suffix(&head);
        head.truncate(head.len() - cut);
        let orphan = orphan_prefix(&tail);
        dropped += (cut + orphan) as u64;
        let mut text = String::from_utf8_lossy(&head).into_owned();
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(&format!("[... {dropped} bytes dropped ...]\n"));
        text.push_str(&String::from_utf8_lossy(&tail[orphan..]));
        text
    };
    Output {
        text,
        total_bytes: capture.total(),
        dropped_bytes: dropped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Keep;

    #[test]
    fn characters_survive_any_cut_between_pieces() {
        let text = "aé€😀z";
        for cut in 0..=text.len() {
            let mut decoder = Decoder::default();
            let mut joined = decoder.push(&text.as_bytes()[..cut]);
            assert!(!joined.contains('\u{FFFD}'), "{cut}: {joined}");
            joined.push_str(&decoder.push(&text.as_bytes()[cut..]));
            joined.push_str(&decoder.finish());
            assert_eq!(joined, text, "{cut}");
        }
    }

    #[test]
    fn bytes_that_never_become_a_character_are_replaced_at_once() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(b"a\xff\xfe"), "a\u{FFFD}\u{FFFD}");
        assert_eq!(decoder.push(b"\xe0\x80"), "\u{FFFD}\u{FFFD}");
        assert_eq!(decoder.push(b"\xe2\x82"), "");
        assert_eq!(decoder.finish(), "\u{FFFD}");
    }

    #[test]
    fn dropped_bytes_are_named_between_the_halves() {
        let mut capture = Capture::new(Keep::HeadTail(8));
        capture.push("abc€defghijkl€mn".as_bytes());
        let output = output_of(&capture);
        assert_eq!(output.text, "abc\n[... 15 bytes dropped ...]\nmn");
        assert_eq!((output.total_bytes, output.dropped_bytes), (20, 15));
    }
}
