//! From terminal bytes to text: escape sequences, carriage returns, broken
//! UTF-8; and the bounded store the text goes to.
//!
//! Input arrives in arbitrary pieces, so everything here keeps its state
//! between calls. It knows nothing of shells.

use skyrl_protocol::guest::ShellText;
use std::collections::VecDeque;

/// A line longer than this is stored in parts; only the last part can still
/// be overwritten by a carriage return.
const LONGEST_LINE: usize = 32 << 10;
/// A control string (window title and the like) longer than this is text
/// again: binary output must not hide the rest.
const LONGEST_CONTROL_STRING: usize = 4096;
/// Columns that moving the cursor may add to a line.
const WIDEST: usize = 4096;

/// Keeps the first and the last bytes of a text; what lies between is counted
/// and dropped.
#[derive(Debug)]
pub(crate) struct HeadTail {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    limit: usize,
    dropped: u64,
    total: u64,
}

impl HeadTail {
    /// Keeps at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            head: Vec::new(),
            tail: VecDeque::new(),
            limit,
            dropped: 0,
            total: 0,
        }
    }

    /// Bytes appended in all, whether kept, dropped or taken.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The last bytes kept, at most `count`.
    pub(crate) fn recent(&self, count: usize) -> Vec<u8> {
        let from_tail = count.min(self.tail.len());
        let from_head = (count - from_tail).min(self.head.len());
        let mut bytes = self.head[self.head.len() - from_head..].to_vec();
        bytes.extend(self.tail.range(self.tail.len() - from_tail..));
        bytes
    }

    /// Changes the limit for what comes.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Whether nothing was stored since the last [`Self::take`].
    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_empty() && self.tail.is_empty() && self.dropped == 0
    }

    /// Appends text.
    pub(crate) fn push(&mut self, text: &[u8]) {
        self.total += text.len() as u64;
        let head_room = (self.limit / 2).saturating_sub(self.head.len());
        let to_head = if self.tail.is_empty() && self.dropped == 0 {
            head_room.min(text.len())
        } else {
            0
        };
        self.head.extend_from_slice(&text[..to_head]);
        let rest = &text[to_head..];
        let tail_limit = self.limit - self.limit / 2;
        let kept = &rest[rest.len().saturating_sub(tail_limit)..];
        self.dropped += (rest.len() - kept.len()) as u64;
        let excess = (self.tail.len() + kept.len()).saturating_sub(tail_limit);
        self.tail.drain(..excess);
        self.dropped += excess as u64;
        self.tail.extend(kept);
    }

    /// All that is kept, and how many bytes were dropped between the halves;
    /// empties the store. Where bytes were dropped, a line says so.
    pub(crate) fn take(&mut self) -> (String, u64) {
        let mut bytes = std::mem::take(&mut self.head);
        let tail = Vec::from(std::mem::take(&mut self.tail));
        let mut dropped = std::mem::take(&mut self.dropped);
        if dropped == 0 {
            bytes.extend_from_slice(&tail);
        } else {
            // Whole characters only.
            let whole = bytes.len() - cut_character(&bytes);
            let skip = tail
                .iter()
                .take(3)
                .take_while(|b| **b & 0xc0 == 0x80)
                .count();
            dropped += (bytes.len() - whole + skip) as u64;
            bytes.truncate(whole);
            bytes.extend_from_slice(format!("\n[... {dropped} bytes dropped ...]\n").as_bytes());
            bytes.extend_from_slice(&tail[skip..]);
        }
        let text = String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        (text, dropped)
    }
}

/// Length of an unfinished character at the end of bytes.
fn cut_character(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let byte = bytes[bytes.len() - back];
        if byte & 0xc0 == 0x80 {
            continue;
        }
        let length = match byte {
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 1,
        };
        return if length > back { back } else { 0 };
    }
    0
}

/// What becomes of bytes that are no UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Invalid {
    /// U+FFFD.
    #[default]
    Replace,
    /// `\xff`, as Python's `backslashreplace` writes it.
    Backslash,
}

/// Where the renderer stands in an escape sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    /// In none.
    None,
    /// After ESC.
    Begun,
    /// After ESC and intermediate bytes.
    Intermediate,
    /// In a control sequence; its first parameter so far.
    Control(Option<u16>),
    /// Past the first parameter of a control sequence.
    ControlMore(Option<u16>),
    /// In a control string, so many bytes long.
    String(usize),
    /// In a control string, after ESC.
    StringEnd(usize),
}

/// Turns terminal bytes into text.
#[derive(Debug)]
pub(crate) struct Renderer {
    mode: ShellText,
    invalid: Invalid,
    escape: Escape,
    /// The beginning of a character whose rest has not come.
    partial: Vec<u8>,
    /// A carriage return whose next byte has not come (plain text).
    carriage_return: bool,
    line: Vec<char>,
    cursor: usize,
}

impl Renderer {
    /// Renders in a mode.
    pub(crate) fn new(mode: ShellText, invalid: Invalid) -> Self {
        Self {
            mode,
            invalid,
            escape: Escape::None,
            partial: Vec::new(),
            carriage_return: false,
            line: Vec::new(),
            cursor: 0,
        }
    }

    /// Takes the next bytes.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], store: &mut HeadTail) {
        while let Some(&first) = bytes.first() {
            if self.escape != Escape::None {
                bytes = &bytes[1..];
                self.continue_escape(first, store);
                continue;
            }
            let run = bytes
                .iter()
                .position(|&b| self.is_special(b))
                .unwrap_or(bytes.len());
            if run > 0 {
                self.characters(&bytes[..run], store);
                bytes = &bytes[run..];
                continue;
            }
            bytes = &bytes[1..];
            self.special(first, store);
        }
    }

    /// Stores the unfinished line; to be called before the text is read while
    /// more may come.
    pub(crate) fn commit(&mut self, store: &mut HeadTail) {
        self.commit_line(store);
    }

    /// Stores all that is still held: an unfinished line or character; to be
    /// called when a command ended.
    pub(crate) fn flush(&mut self, store: &mut HeadTail) {
        self.flush_partial(store);
        self.flush_carriage_return(store);
        self.commit_line(store);
    }

    fn is_special(&self, byte: u8) -> bool {
        match self.mode {
            ShellText::Raw => false,
            ShellText::Plain => byte == 0x1b || byte == b'\r' || byte == b'\n',
            ShellText::Screen => byte < 0x20 && byte != b'\t' || byte == 0x7f,
        }
    }

    fn special(&mut self, byte: u8, store: &mut HeadTail) {
        self.flush_partial(store);
        match (byte, self.mode) {
            (0x1b, _) => self.escape = Escape::Begun,
            (b'\n', ShellText::Screen) => {
                self.commit_line(store);
                store.push(b"\n");
            }
            (b'\n', _) => {
                self.carriage_return = false;
                store.push(b"\n");
            }
            (b'\r', ShellText::Screen) => self.cursor = 0,
            (b'\r', _) => {
                self.flush_carriage_return(store);
                self.carriage_return = true;
            }
            (0x08, ShellText::Screen) => self.cursor = self.cursor.saturating_sub(1),
            // Other control characters leave nothing on a screen.
            _ => {}
        }
    }

    fn continue_escape(&mut self, byte: u8, store: &mut HeadTail) {
        self.escape = match (self.escape, byte) {
            (Escape::Begun, b'[') => Escape::Control(None),
            (Escape::Begun, b']' | b'P' | b'X' | b'^' | b'_') => Escape::String(0),
            (Escape::Begun | Escape::Intermediate, 0x20..=0x2f) => Escape::Intermediate,
            (Escape::Begun | Escape::Intermediate, 0x30..=0x7e) => Escape::None,
            (Escape::Control(value), b'0'..=b'9') => {
                let digit = u16::from(byte - b'0');
                Escape::Control(Some(
                    value.unwrap_or(0).saturating_mul(10).saturating_add(digit),
                ))
            }
            (Escape::Control(value) | Escape::ControlMore(value), 0x20..=0x3f) => {
                Escape::ControlMore(value)
            }
            (Escape::Control(value) | Escape::ControlMore(value), 0x40..=0x7e) => {
                if self.mode == ShellText::Screen {
                    self.control_sequence(byte, value);
                }
                Escape::None
            }
            (Escape::String(_), 0x07) | (Escape::StringEnd(_), b'\\') => Escape::None,
            (Escape::String(length), 0x1b) => Escape::StringEnd(length),
            (Escape::String(length), byte) if byte != b'\n' && length < LONGEST_CONTROL_STRING => {
                Escape::String(length + 1)
            }
            // Another escape sequence, or a byte that belongs to none.
            (Escape::StringEnd(_), byte) => {
                self.escape = Escape::Begun;
                return self.continue_escape(byte, store);
            }
            (_, byte) => {
                self.escape = Escape::None;
                return self.feed(&[byte], store);
            }
        };
    }

    /// The few control sequences that progress displays use within a line.
    fn control_sequence(&mut self, last: u8, value: Option<u16>) {
        let count = usize::from(value.unwrap_or(1).max(1));
        match last {
            b'K' => match value.unwrap_or(0) {
                0 => self.line.truncate(self.cursor),
                1 => {
                    let end = self.cursor.min(self.line.len());
                    self.line[..end].fill(' ');
                }
                _ => self.line.clear(),
            },
            b'C' => self.cursor = (self.cursor + count).min(self.line.len().max(WIDEST)),
            b'D' => self.cursor = self.cursor.saturating_sub(count),
            b'G' => self.cursor = (count - 1).min(self.line.len().max(WIDEST)),
            _ => {}
        }
    }

    fn characters(&mut self, bytes: &[u8], store: &mut HeadTail) {
        self.flush_carriage_return(store);
        if self.partial.is_empty() {
            return self.decode(bytes, store);
        }
        // Finish the character begun by the last piece.
        let mut joined = std::mem::take(&mut self.partial);
        joined.extend_from_slice(bytes);
        self.decode(&joined, store);
    }

    fn decode(&mut self, mut bytes: &[u8], store: &mut HeadTail) {
        while !bytes.is_empty() {
            match std::str::from_utf8(bytes) {
                Ok(text) => {
                    self.text(text, store);
                    return;
                }
                Err(error) => {
                    let (valid, rest) = bytes.split_at(error.valid_up_to());
                    if let Ok(text) = std::str::from_utf8(valid) {
                        self.text(text, store);
                    }
                    let Some(invalid) = error.error_len() else {
                        self.partial.extend_from_slice(rest);
                        return;
                    };
                    self.invalid(&rest[..invalid], store);
                    bytes = &rest[invalid..];
                }
            }
        }
    }

    fn text(&mut self, text: &str, store: &mut HeadTail) {
        if self.mode != ShellText::Screen {
            store.push(text.as_bytes());
            return;
        }
        for character in text.chars() {
            if self.cursor < self.line.len() {
                self.line[self.cursor] = character;
            } else {
                self.line.resize(self.cursor, ' ');
                self.line.push(character);
            }
            self.cursor += 1;
            if self.line.len() >= LONGEST_LINE {
                self.commit_line(store);
            }
        }
    }

    fn invalid(&mut self, bytes: &[u8], store: &mut HeadTail) {
        match self.invalid {
            Invalid::Replace => self.text("\u{fffd}", store),
            Invalid::Backslash => {
                for byte in bytes {
                    self.text(&format!("\\x{byte:02x}"), store);
                }
            }
        }
    }

    fn flush_partial(&mut self, store: &mut HeadTail) {
        if !self.partial.is_empty() {
            let partial = std::mem::take(&mut self.partial);
            self.invalid(&partial, store);
        }
    }

    fn flush_carriage_return(&mut self, store: &mut HeadTail) {
        if std::mem::take(&mut self.carriage_return) {
            store.push(b"\r");
        }
    }

    fn commit_line(&mut self, store: &mut HeadTail) {
        self.cursor = 0;
        if self.line.is_empty() {
            return;
        }
        let line: String = self.line.drain(..).collect();
        store.push(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(mode: ShellText, bytes: &[u8]) -> String {
        let whole = {
            let mut store = HeadTail::new(1 << 20);
            let mut renderer = Renderer::new(mode, Invalid::Replace);
            renderer.feed(bytes, &mut store);
            renderer.flush(&mut store);
            store.take().0
        };
        let mut store = HeadTail::new(1 << 20);
        let mut renderer = Renderer::new(mode, Invalid::Replace);
        for byte in bytes {
            renderer.feed(&[*byte], &mut store);
        }
        renderer.flush(&mut store);
        assert_eq!(store.take().0, whole, "byte by byte");
        whole
    }

    #[test]
    fn plain_text_has_no_escapes_and_no_terminal_line_ends() {
        let plain = |bytes: &[u8]| render(ShellText::Plain, bytes);
        assert_eq!(plain(b"\x1b[1;31mred\x1b[0m\r\nx\ry\r"), "red\nx\ry\r");
        assert_eq!(
            plain(b"\x1b]0;title\x07a\x1b]8;;u\x1b\\b\x1b(Bc\x1b7d"),
            "abcd"
        );
        assert_eq!(plain("h\u{e9}\u{1f600}".as_bytes()), "h\u{e9}\u{1f600}");
        assert_eq!(plain(b"a\xffb\xc3(\xe2\x82"), "a\u{fffd}b\u{fffd}(\u{fffd}");
    }

    #[test]
    fn an_endless_control_string_does_not_hide_what_follows() {
        let mut bytes = b"\x1b]".to_vec();
        bytes.extend([b'x'; 6000]);
        assert!(render(ShellText::Plain, &bytes).len() > 1000);
        assert_eq!(render(ShellText::Plain, b"\x1b]open\nseen"), "\nseen");
    }

    #[test]
    fn a_screen_shows_the_last_state_of_each_line() {
        let screen = |bytes: &[u8]| render(ShellText::Screen, bytes);
        assert_eq!(screen(b"10%\r20%\r100%\n"), "100%\n");
        assert_eq!(screen(b"abcdef\rxy\x1b[K!\n"), "xy!\n");
        assert_eq!(screen(b"ab\x08c\r\nd\x07e"), "ac\nde");
        assert_eq!(screen(b"ab\x1b[2K\rz\x1b[3Cy"), "z   y");
    }

    #[test]
    fn raw_text_is_only_decoded() {
        assert_eq!(
            render(ShellText::Raw, b"\x1b[1ma\r\n\xff"),
            "\u{1b}[1ma\r\n\u{fffd}"
        );
    }

    #[test]
    fn invalid_bytes_can_be_spelled_out() {
        let mut store = HeadTail::new(100);
        let mut renderer = Renderer::new(ShellText::Plain, Invalid::Backslash);
        renderer.feed(b"a\xff\xc3(\xe2\x82", &mut store);
        renderer.flush(&mut store);
        assert_eq!(store.take().0, "a\\xff\\xc3(\\xe2\\x82");
    }

    #[test]
    fn a_store_keeps_both_ends_and_counts_the_rest() {
        let mut store = HeadTail::new(10);
        for _ in 0..1000 {
            store.push(b"0123456789");
        }
        let (text, dropped) = store.take();
        assert_eq!(text, "01234\n[... 9990 bytes dropped ...]\n56789");
        assert_eq!(dropped, 9990);
        assert!(store.is_empty());
        store.push("\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}".as_bytes());
        let (text, dropped) = store.take();
        assert_eq!(
            text,
            "\u{e9}\u{e9}\n[... 4 bytes dropped ...]\n\u{e9}\u{e9}"
        );
        assert_eq!(dropped, 4);
    }
}
