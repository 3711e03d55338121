//! Marks: what a shell tells the guest in line with the output of its
//! commands.
//!
//! A mark is an operating-system-command escape sequence with a number of our
//! own and a random nonce: `ESC ] 7727 ; nonce ; kind ; fields BEL`. Being
//! written to the same terminal as the output, it can't overtake it. This
//! module finds marks in bytes; it knows neither shells nor terminals.

use std::fmt;

/// How a mark begins, before the nonce.
pub(crate) const INTRODUCER: &str = "\u{1b}]7727;";
/// How it ends.
pub(crate) const TERMINATOR: &str = "\u{7}";
/// A mark is never longer: a path name is at most 4096 bytes.
const LONGEST: usize = 8192;

/// Random text that tells a shell's marks from anything a command prints.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Nonce(String);

impl Nonce {
    /// From random hexadecimal digits, of which 16 are used.
    pub(crate) fn new(random: &str) -> Self {
        Self(random.chars().take(16).collect())
    }

    /// As text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nonce(..)")
    }
}

/// One mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A command begins.
    Start {
        /// Its number.
        seq: u64,
    },
    /// A command ended.
    End {
        /// Its number.
        seq: u64,
        /// How.
        end: End,
    },
    /// What follows up to [`Mark::Reported`] is the path of `python`.
    Python {
        /// The command's number.
        seq: u64,
    },
    /// All there is to say about a command has been said.
    Reported {
        /// Its number.
        seq: u64,
    },
    /// The shell waits for the next line.
    Prompt {
        /// The last command's number.
        seq: u64,
        /// Whether it was the prompt after the command's second report.
        last: bool,
    },
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    /// `$?`.
    pub(crate) status: i32,
    /// `$-`.
    pub(crate) flags: String,
    /// `$!`.
    pub(crate) background: Option<i32>,
    /// A prompt command is set; what it prints is no output.
    pub(crate) prompt_command: bool,
    /// `$PWD`.
    pub(crate) cwd: String,
}

/// A piece of what came from the terminal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'b> {
    /// Output.
    Text(&'b [u8]),
    /// A mark.
    Mark(Mark),
}

/// Splits a stream of bytes into text and marks.
#[derive(Debug)]
pub(crate) struct Scanner {
    introducer: Vec<u8>,
    /// The beginning of what may become a mark.
    held: Vec<u8>,
}

impl Scanner {
    /// Finds the marks with this nonce.
    pub(crate) fn new(nonce: &Nonce) -> Self {
        Self {
            introducer: format!("{INTRODUCER}{};", nonce.as_str()).into_bytes(),
            held: Vec::new(),
        }
    }

    /// Takes the next bytes; gives the pieces in order.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut give: impl FnMut(Piece<'_>)) {
        if self.held.is_empty() {
            let rest = self.split(bytes, &mut give);
            self.held.extend_from_slice(rest);
        } else {
            let mut joined = std::mem::take(&mut self.held);
            joined.extend_from_slice(bytes);
            let rest = self.split(&joined, &mut give);
            self.held = rest.to_vec();
        }
    }

    /// What was held back, when no more can come.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    /// Gives all pieces that are certain; returns what may be the beginning
    /// of a mark.
    fn split<'b>(&self, bytes: &'b [u8], give: &mut impl FnMut(Piece<'_>)) -> &'b [u8] {
        let mut text_from = 0;
        let mut at = 0;
        while let Some(found) = bytes[at..].iter().position(|&b| b == 0x1b) {
            let begin = at + found;
            let candidate = &bytes[begin..];
            let common = candidate
                .iter()
                .zip(&self.introducer)
                .take_while(|(a, b)| a == b)
                .count();
            if common < self.introducer.len() {
                if common == candidate.len() {
                    give_text(&bytes[text_from..begin], give);
                    return candidate;
                }
                at = begin + 1;
                continue;
            }
            let body = &candidate[common..];
            match body.iter().take(LONGEST).position(|&b| b == 0x07) {
                Some(length) => {
                    if let Some(mark) = parse(&body[..length]) {
                        give_text(&bytes[text_from..begin], give);
                        give(Piece::Mark(mark));
                        text_from = begin + common + length + 1;
                        at = text_from;
                    } else {
                        at = begin + 1;
                    }
                }
                None if body.len() < LONGEST => {
                    give_text(&bytes[text_from..begin], give);
                    return candidate;
                }
                None => at = begin + 1,
            }
        }
        give_text(&bytes[text_from..], give);
        &[]
    }
}

fn give_text(text: &[u8], give: &mut impl FnMut(Piece<'_>)) {
    if !text.is_empty() {
        give(Piece::Text(text));
    }
}

/// Reads what stands between nonce and terminator.
fn parse(body: &[u8]) -> Option<Mark> {
    let body = String::from_utf8_lossy(body);
    let (kind, rest) = body.split_once(';')?;
    let (seq, rest) = rest.split_once(';').unwrap_or((rest, ""));
    let seq = seq.parse().ok()?;
    Some(match kind {
        "S" => Mark::Start { seq },
        "Y" => Mark::Python { seq },
        "R" => Mark::Reported { seq },
        "P" => Mark::Prompt {
            seq,
            last: rest == "2",
        },
        "E" => {
            let mut fields = rest.splitn(5, ';');
            Mark::End {
                seq,
                end: End {
                    status: fields.next()?.parse().ok()?,
                    flags: fields.next()?.to_owned(),
                    background: fields.next()?.parse().ok(),
                    prompt_command: !fields.next()?.is_empty(),
                    cwd: fields.next()?.to_owned(),
                },
            }
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(scanner: &mut Scanner, chunks: &[&[u8]]) -> (String, Vec<Mark>) {
        let (mut text, mut marks) = (Vec::new(), Vec::new());
        for chunk in chunks {
            scanner.feed(chunk, |piece| match piece {
                Piece::Text(bytes) => text.extend_from_slice(bytes),
                Piece::Mark(mark) => marks.push(mark),
            });
        }
        (String::from_utf8(text).expect("text"), marks)
    }

    const STREAM: &[u8] = b"a\x1b]7727;000000000000002a;S;1\x07out\x1b[1mput\n\
        \x1b]7727;000000000000002a;E;1;3;himBH;17;;/tmp/a;b\x07\
        \x1b]7727;000000000000002a;R;1\x07\x1b]7727;000000000000002b;R;1\x07z";

    #[test]
    fn marks_are_found_wherever_the_stream_is_cut() {
        let expected = (
            "aout\u{1b}[1mput\n\u{1b}]7727;000000000000002b;R;1\u{7}z".to_owned(),
            vec![
                Mark::Start { seq: 1 },
                Mark::End {
                    seq: 1,
                    end: End {
                        status: 3,
                        flags: "himBH".into(),
                        background: Some(17),
                        prompt_command: false,
                        cwd: "/tmp/a;b".into(),
                    },
                },
                Mark::Reported { seq: 1 },
            ],
        );
        let nonce = Nonce::new("000000000000002a");
        for cut in 0..=STREAM.len() {
            let (head, tail) = STREAM.split_at(cut);
            let mut scanner = Scanner::new(&nonce);
            assert_eq!(
                pieces(&mut scanner, &[head, tail]),
                expected,
                "cut at {cut}"
            );
            assert!(scanner.finish().is_empty());
        }
        let single: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(pieces(&mut Scanner::new(&nonce), &single), expected);
    }

    #[test]
    fn what_only_begins_like_a_mark_is_text_in_the_end() {
        let nonce = Nonce::new("000000000000002a");
        let mut scanner = Scanner::new(&nonce);
        let mut endless = b"\x1b]7727;000000000000002a;E;".to_vec();
        endless.extend(std::iter::repeat_n(b'x', 3 * LONGEST));
        let (text, marks) = pieces(&mut scanner, &[&endless]);
        assert_eq!(text.len(), endless.len());
        assert!(marks.is_empty());
        let (text, _) = pieces(&mut scanner, &[b"\x1b]77"]);
        assert_eq!((text.as_str(), scanner.finish()), ("", b"\x1b]77".to_vec()));
    }
}
