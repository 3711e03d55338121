//! How Python writes things: the older clients and their users match on it.

use std::io;

/// `repr()` of a string.
pub(super) fn repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut written = String::with_capacity(text.len() + 2);
    written.push(quote);
    for character in text.chars() {
        match character {
            '\\' => written.push_str("\\\\"),
            '\n' => written.push_str("\\n"),
            '\r' => written.push_str("\\r"),
            '\t' => written.push_str("\\t"),
            c if c == quote => {
                written.push('\\');
                written.push(c);
            }
            c if is_printable(c) => written.push(c),
            c => written.push_str(&match u32::from(c) {
                code @ 0..=0xff => format!("\\x{code:02x}"),
                code @ 0..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    written.push(quote);
    written
}

/// Nearly `str.isprintable`: controls, separators, formats and private use are
/// not.
fn is_printable(character: char) -> bool {
    !(character.is_control()
        || character.is_whitespace() && character != ' '
        || matches!(character,
            '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e000}'..='\u{f8ff}'
            | '\u{f0000}'..))
}

/// `repr()` of a list of strings.
pub(super) fn repr_list(texts: &[String]) -> String {
    let items: Vec<String> = texts.iter().map(|text| repr(text)).collect();
    format!("[{}]", items.join(", "))
}

/// `str()` of a float.
pub(super) fn float(number: f64) -> String {
    if number.is_finite() && number.fract() == 0.0 && number.abs() < 1e16 {
        format!("{number:.1}")
    } else {
        number.to_string()
    }
}

/// Bytes as text; what is no UTF-8 is written `\xff`.
pub(super) fn backslash_replace(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Class and message of the exception that an error of the operating system
/// becomes, about a file.
pub(super) fn os_error(error: &io::Error, path: &str) -> (&'static str, String) {
    let Some(number) = error.raw_os_error() else {
        return ("OSError", error.to_string());
    };
    let class = match number {
        libc::ENOENT => "FileNotFoundError",
        libc::EACCES | libc::EPERM => "PermissionError",
        libc::EEXIST => "FileExistsError",
        libc::EISDIR => "IsADirectoryError",
        libc::ENOTDIR => "NotADirectoryError",
        libc::EAGAIN => "BlockingIOError",
        _ => "OSError",
    };
    let text = error.to_string();
    let said = text.split(" (os error").next().unwrap_or_default();
    (class, format!("[Errno {number}] {said}: {}", repr(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_quoted_as_python_quotes_them() {
        for (text, expected) in [
            ("plain", "'plain'"),
            ("it's", "\"it's\""),
            ("it's \"x\"", "'it\\'s \"x\"'"),
            ("a\\b\n\t\r\u{1b}", "'a\\\\b\\n\\t\\r\\x1b'"),
            (
                "\u{e9}\u{1f600}\u{200b}\u{a0}",
                "'\u{e9}\u{1f600}\\u200b\\xa0'",
            ),
        ] {
            assert_eq!(repr(text), expected);
        }
        assert_eq!(repr_list(&["a".into(), "b".into()]), "['a', 'b']");
    }

    #[test]
    fn numbers_and_bytes_are_written_as_python_writes_them() {
        assert_eq!(
            (float(1.0), float(0.5), float(300.0)),
            ("1.0".into(), "0.5".into(), "300.0".into())
        );
        assert_eq!(backslash_replace(b"a\xff\xc3("), "a\\xff\\xc3(");
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(
            os_error(&error, "/nope"),
            (
                "FileNotFoundError",
                "[Errno 2] No such file or directory: '/nope'".into()
            )
        );
    }
}
