//! What a file's bytes are as text, and back: encoding, byte order mark, line
//! ends. Separate because an edit must leave every byte it did not mean to
//! change as it was. Knows no paths and no messages.

/// UTF-8's byte order mark.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// A file as text, with what is needed to write it back the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Document {
    /// The text; line ends are `\n` when all of them were `\r\n`.
    pub(super) text: String,
    format: Format,
}

/// How text is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    encoding: Encoding,
    bom: bool,
    carriage_returns: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Utf8,
    /// Each byte is the character of the same number; round-trips any bytes.
    Latin1,
}

/// The bytes are no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Binary;

impl Document {
    /// Text that begins a new file.
    pub(super) fn new(text: String) -> Self {
        Self {
            text,
            format: Format {
                encoding: Encoding::Utf8,
                bom: false,
                carriage_returns: false,
            },
        }
    }

    /// Reads bytes as UTF-8, else as latin-1 if they look like text.
    pub(super) fn decode(bytes: Vec<u8>) -> Result<Self, Binary> {
        if bytes.contains(&0) {
            return Err(Binary);
        }
        let (bom, body) = match bytes.strip_prefix(BOM) {
            Some(rest) => (true, rest.to_vec()),
            None => (false, bytes),
        };
        let (encoding, text) = match String::from_utf8(body) {
            Ok(text) => (Encoding::Utf8, text),
            Err(error) => {
                let body = error.into_bytes();
                if looks_binary(&body) {
                    return Err(Binary);
                }
                (Encoding::Latin1, body.iter().map(|&b| b as char).collect())
            }
        };
        let carriage_returns = all_lines_end_in_crlf(&text);
        let text = if carriage_returns {
            text.replace("\r\n", "\n")
        } else {
            text
        };
        Ok(Self {
            text,
            format: Format {
                encoding,
                bom,
                carriage_returns,
            },
        })
    }

    /// A text from outside, with line ends as [`Self::text`] has them.
    pub(super) fn adopt(&self, text: &str) -> String {
        if self.format.carriage_returns {
            text.replace("\r\n", "\n")
        } else {
            text.to_owned()
        }
    }

    /// The same file with another text.
    pub(super) fn with_text(&self, text: String) -> Self {
        Self {
            text,
            format: self.format,
        }
    }

    /// The bytes to write; fails with the first character that the file's
    /// encoding can't hold.
    pub(super) fn encode(&self) -> Result<Vec<u8>, char> {
        let mut bytes = if self.format.bom {
            BOM.to_vec()
        } else {
            Vec::new()
        };
        bytes.reserve(self.text.len());
        for c in self.text.chars() {
            if c == '\n' && self.format.carriage_returns {
                bytes.push(b'\r');
            }
            match self.format.encoding {
                Encoding::Utf8 => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                Encoding::Latin1 => bytes.push(u8::try_from(u32::from(c)).map_err(|_| c)?),
            }
        }
        Ok(bytes)
    }
}

fn all_lines_end_in_crlf(text: &str) -> bool {
    let ends = text.matches('\n').count();
    ends > 0 && text.matches("\r\n").count() == ends
}

/// More than a tenth control characters: no text in any one-byte encoding.
fn looks_binary(bytes: &[u8]) -> bool {
    let odd = bytes
        .iter()
        .filter(|&&b| {
            (b < 0x20 && !matches!(b, b'\t' | b'\n' | b'\r' | 0x08 | 0x0c | 0x1b)) || b == 0x7f
        })
        .count();
    odd * 10 > bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(bytes: &[u8]) -> String {
        let document = Document::decode(bytes.to_vec()).expect("text");
        assert_eq!(document.encode().expect("encodable"), bytes);
        document.text
    }

    #[test]
    fn bytes_survive_a_round_trip_whatever_the_encoding() {
        assert_eq!(round_trip(b""), "");
        assert_eq!(round_trip("z\u{fc}rich\n".as_bytes()), "zürich\n");
        assert_eq!(round_trip(b"\xef\xbb\xbfhi\r\nyou\r\n"), "hi\nyou\n");
        assert_eq!(
            round_trip(b"caf\xe9\n\x80\x9f\xff"),
            "caf\u{e9}\n\u{80}\u{9f}\u{ff}"
        );
        assert_eq!(round_trip(b"mixed\r\nends\n"), "mixed\r\nends\n");
        assert_eq!(round_trip(b"odd\r\r\nend\r\n"), "odd\r\nend\n");
    }

    #[test]
    fn any_mix_of_line_ends_marks_and_encodings_survives() {
        let pieces: [&[u8]; 9] = [
            b"\r",
            b"\n",
            b"\r\n",
            b"a",
            b"\xe9",
            b"\xc3\xa9",
            b"\xef\xbb\xbf",
            b"\xef\xbb",
            b"\xff",
        ];
        let mut state = 1u64;
        for _ in 0..5_000 {
            let mut bytes = Vec::new();
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            for step in 0..state >> 61 {
                let piece = (state >> (8 + 6 * step)) as usize % pieces.len();
                bytes.extend_from_slice(pieces[piece]);
            }
            round_trip(&bytes);
        }
    }

    #[test]
    fn a_character_that_latin_1_lacks_is_named() {
        let document = Document::decode(b"caf\xe9".to_vec()).expect("text");
        let edited = document.with_text(format!("{} \u{2192} x", document.text));
        assert_eq!(edited.encode(), Err('\u{2192}'));
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        assert_eq!(Document::decode(b"ab\0c".to_vec()), Err(Binary));
        let noise: Vec<u8> = (1..=255).cycle().take(1024).map(|b| b ^ 0x80 | 1).collect();
        let noise: Vec<u8> = noise
            .into_iter()
            .map(|b| if b > 0x90 { b } else { 2 })
            .collect();
        assert_eq!(Document::decode(noise), Err(Binary));
    }
}
