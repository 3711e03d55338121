//! Names of keys, as bytes a terminal sends for them.

/// Bytes of a key named `C-c`, `Enter`, `Up` and so on; none for a name that
/// is no key.
pub(crate) fn key_bytes(name: &str) -> Option<Vec<u8>> {
    if let Some(letter) = name.strip_prefix("C-").or_else(|| name.strip_prefix('^')) {
        return control(letter).map(|byte| vec![byte]);
    }
    let bytes: &[u8] = match name.to_ascii_lowercase().as_str() {
        "enter" | "return" => b"\r",
        "tab" => b"\t",
        "escape" | "esc" => b"\x1b",
        "space" => b" ",
        "backspace" | "bspace" => b"\x7f",
        "delete" | "dc" => b"\x1b[3~",
        "up" => b"\x1b[A",
        "down" => b"\x1b[B",
        "right" => b"\x1b[C",
        "left" => b"\x1b[D",
        "home" => b"\x1b[H",
        "end" => b"\x1b[F",
        "pageup" | "ppage" => b"\x1b[5~",
        "pagedown" | "npage" => b"\x1b[6~",
        _ => return None,
    };
    Some(bytes.to_vec())
}

/// The control character of a letter or sign.
fn control(letter: &str) -> Option<u8> {
    let [byte] = letter.as_bytes() else {
        return None;
    };
    match byte.to_ascii_uppercase() {
        byte @ b'@'..=b'_' => Some(byte & 0x1f),
        b'?' => Some(0x7f),
        b' ' => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::key_bytes;

    #[test]
    fn control_keys_and_named_keys_have_bytes_and_other_names_none() {
        assert_eq!(key_bytes("C-c"), Some(vec![3]));
        assert_eq!(key_bytes("C-Z"), Some(vec![26]));
        assert_eq!(key_bytes("C-\\"), Some(vec![28]));
        assert_eq!(key_bytes("Up"), Some(b"\x1b[A".to_vec()));
        for none in ["C-", "C-cc", "c", "Hyper", "C-\u{e9}"] {
            assert_eq!(key_bytes(none), None, "{none}");
        }
    }
}
