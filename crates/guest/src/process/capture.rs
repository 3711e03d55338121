//! What is kept of an output stream: bounded, whatever is printed.

use super::spec::Keep;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes kept by all captures together; beyond that each keeps only what it
/// has already grown to.
static TOTAL_KEPT: AtomicU64 = AtomicU64::new(0);

/// Bound of [`TOTAL_KEPT`].
const TOTAL_LIMIT: u64 = 512 << 20;

/// Smallest step by which a capture grows, in bytes.
const STEP: u64 = 16 * 1024;

/// Captured bytes of one stream, addressed by their offset in all that was
/// written.
#[derive(Debug)]
pub struct Capture {
    head: Vec<u8>,
    head_limit: u64,
    /// The latest bytes, ending at `total`.
    tail: VecDeque<u8>,
    tail_limit: u64,
    /// Bytes before this offset were given up by the reader (`Keep::Flow`).
    acknowledged: u64,
    /// Unread bytes are never dropped.
    lossless: bool,
    total: u64,
    reserved: u64,
}

impl Capture {
    /// An empty capture.
    pub fn new(keep: Keep) -> Self {
        let (head_limit, tail_limit, lossless) = match keep {
            Keep::HeadTail(limit) => (limit / 2, limit - limit / 2, false),
            Keep::Tail(limit) => (0, limit, false),
            Keep::Flow(window) => (0, window.max(1), true),
        };
        Self {
            head: Vec::new(),
            head_limit,
            tail: VecDeque::new(),
            tail_limit,
            acknowledged: 0,
            lossless,
            total: 0,
            reserved: 0,
        }
    }

    /// Bytes written in all.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes kept now.
    pub fn kept(&self) -> u64 {
        self.head.len() as u64 + self.tail.len() as u64
    }

    /// Bytes lost between head and tail.
    pub fn dropped(&self) -> u64 {
        if self.lossless {
            0
        } else {
            self.total - self.kept()
        }
    }

    /// How many bytes may be pushed now without losing unread ones; more than
    /// anyone reads at once when losing is allowed.
    pub fn room(&self) -> u64 {
        if self.lossless {
            self.tail_limit.saturating_sub(self.tail.len() as u64)
        } else {
            u64::MAX
        }
    }

    /// Adds bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let head_room = self.head_limit - self.head.len() as u64;
        // The head is full once anything went to the tail.
        if head_room > 0 && self.tail.is_empty() {
            let count = head_room.min(bytes.len() as u64);
            let count = self.grant(count) as usize;
            self.head.extend_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if !bytes.is_empty() {
                self.head_limit = self.head.len() as u64;
            }
        }
        if bytes.is_empty() {
            return;
        }
        // Under flow control the window bounds what is read, not what is kept:
        // what is left in a pipe at the end may go over it.
        let limit = match self.lossless {
            true => usize::MAX,
            false => usize::try_from(self.tail_limit).unwrap_or(usize::MAX),
        };
        if bytes.len() > limit {
            bytes = &bytes[bytes.len() - limit..];
        }
        let growth = self.tail.len().saturating_add(bytes.len()).min(limit) - self.tail.len();
        let allowed = self.tail.len() + self.grant(growth as u64) as usize;
        if bytes.len() > allowed {
            bytes = &bytes[bytes.len() - allowed..];
        }
        let excess = (self.tail.len() + bytes.len()).saturating_sub(allowed);
        self.tail.drain(..excess);
        self.tail.extend(bytes);
    }

    /// Takes memory from the common budget; less than asked when that is
    /// used up.
    fn grant(&mut self, asked: u64) -> u64 {
        let have = self.reserved - self.kept();
        if asked <= have {
            return asked;
        }
        let step = (asked - have).max(STEP);
        if self.lossless || TOTAL_KEPT.load(Ordering::Relaxed) + step <= TOTAL_LIMIT {
            TOTAL_KEPT.fetch_add(step, Ordering::Relaxed);
            self.reserved += step;
            asked
        } else {
            have
        }
    }

    /// Up to `limit` bytes from `offset` on: the offset of the first byte
    /// given (later than asked when bytes were lost) and the bytes.
    pub fn read(&self, offset: u64, limit: usize) -> (u64, Vec<u8>) {
        let head_end = self.head.len() as u64;
        if offset < head_end {
            let from = offset as usize;
            let to = self.head.len().min(from.saturating_add(limit));
            return (offset, self.head[from..to].to_vec());
        }
        let tail_start = self.total - self.tail.len() as u64;
        let offset = offset.clamp(tail_start, self.total);
        let skip = (offset - tail_start) as usize;
        let count = (self.tail.len() - skip).min(limit);
        let mut bytes = Vec::with_capacity(count);
        let (first, second) = self.tail.as_slices();
        if skip < first.len() {
            let to = first.len().min(skip + count);
            bytes.extend_from_slice(&first[skip..to]);
        }
        let rest = count - bytes.len();
        if rest > 0 {
            let from = (skip + bytes.len()) - first.len();
            bytes.extend_from_slice(&second[from..from + rest]);
        }
        (offset, bytes)
    }

    /// Gives up all before `offset` (`Keep::Flow` only); true when that made
    /// room where there was none.
    pub fn acknowledge(&mut self, offset: u64) -> bool {
        if !self.lossless || offset <= self.acknowledged {
            return false;
        }
        let was_full = self.room() == 0;
        let offset = offset.min(self.total);
        let tail_start = self.total - self.tail.len() as u64;
        self.tail.drain(..(offset - tail_start) as usize);
        self.acknowledged = offset;
        was_full && self.room() > 0
    }

    /// First and last bytes kept, in order.
    pub fn halves(&self) -> (Vec<u8>, Vec<u8>) {
        (self.head.clone(), self.tail.iter().copied().collect())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        TOTAL_KEPT.fetch_sub(self.reserved, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_last_half_are_kept() {
        let mut capture = Capture::new(Keep::HeadTail(10));
        for byte in b'a'..=b'z' {
            capture.push(&[byte]);
        }
        assert_eq!(capture.halves(), (b"abcde".to_vec(), b"vwxyz".to_vec()));
        assert_eq!((capture.total(), capture.dropped()), (26, 16));
        let mut at_once = Capture::new(Keep::HeadTail(10));
        at_once.push(b"abcdefghijklmnopqrstuvwxyz");
        assert_eq!(at_once.halves(), capture.halves());
        let mut none = Capture::new(Keep::HeadTail(0));
        none.push(b"abc");
        assert_eq!((none.kept(), none.dropped()), (0, 3));
    }

    #[test]
    fn reading_by_offset_jumps_over_what_was_lost() {
        let mut capture = Capture::new(Keep::HeadTail(4));
        capture.push(b"abcdefgh");
        assert_eq!(capture.read(0, 100), (0, b"ab".to_vec()));
        assert_eq!(capture.read(1, 100), (1, b"b".to_vec()));
        assert_eq!(capture.read(2, 100), (6, b"gh".to_vec()));
        assert_eq!(capture.read(7, 100), (7, b"h".to_vec()));
        assert_eq!(capture.read(8, 100), (8, vec![]));
        assert_eq!(capture.read(99, 100), (8, vec![]));
    }

    #[test]
    fn nothing_unread_is_lost_under_flow_control() {
        let mut capture = Capture::new(Keep::Flow(4));
        capture.push(b"abcd");
        assert_eq!(capture.room(), 0);
        assert_eq!(capture.read(0, 2), (0, b"ab".to_vec()));
        assert!(capture.acknowledge(2));
        assert_eq!(capture.room(), 2);
        capture.push(b"efgh");
        assert!(!capture.acknowledge(1));
        assert_eq!(capture.read(2, 9), (2, b"cdefgh".to_vec()));
        assert!(capture.acknowledge(8));
        assert_eq!((capture.total(), capture.dropped()), (8, 0));
    }

    #[test]
    fn a_ring_that_wrapped_is_read_in_order() {
        let mut capture = Capture::new(Keep::Tail(5));
        for chunk in [b"abc".as_slice(), b"def", b"gh", b"ijk"] {
            capture.push(chunk);
        }
        assert_eq!(capture.read(0, 100), (6, b"ghijk".to_vec()));
        assert_eq!(capture.read(8, 2), (8, b"ij".to_vec()));
    }
}
