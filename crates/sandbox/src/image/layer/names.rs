//! Names in a layer: paths that can't lead out of it, and what the layer format
//! means by names that begin with `.wh.`.

use super::unpack::LayerError;
use std::ffi::CString;

/// Longest name of a file, in bytes.
const MAX_NAME: usize = 255;
/// Names in a path.
const MAX_DEPTH: usize = 2000;

/// A path inside a layer: names without `.`, `..`, slashes and zero bytes.
/// Empty for the root.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LayerPath(Vec<CString>);

impl LayerPath {
    /// Parses the name of an entry.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, LayerError> {
        let refuse = |why: &str| LayerError::Broken(format!("entry {} {why}", show(bytes)));
        if bytes.starts_with(b"/") && bytes.iter().any(|byte| *byte != b'/') {
            return Err(refuse("has an absolute path"));
        }
        let mut names = Vec::new();
        for part in bytes.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(refuse("leads out of the image")),
                name if name.len() > MAX_NAME => {
                    return Err(refuse("has a name longer than 255 bytes"));
                }
                name => {
                    names.push(CString::new(name).map_err(|_| refuse("holds a zero byte"))?);
                }
            }
        }
        if names.len() > MAX_DEPTH {
            return Err(refuse("is nested too deep"));
        }
        Ok(Self(names))
    }

    /// The layer's root.
    pub(super) fn root() -> Self {
        Self(Vec::new())
    }

    /// The first names of it.
    pub(super) fn upto(&self, names: usize) -> Self {
        Self(self.0[..names].to_vec())
    }

    /// Parses the target of a hard link, which image builders also write from
    /// the root.
    pub(super) fn parse_target(bytes: &[u8]) -> Result<Self, LayerError> {
        let start = bytes.iter().position(|byte| *byte != b'/');
        Self::parse(&bytes[start.unwrap_or(bytes.len())..])
    }

    pub(super) fn split(&self) -> Option<(Self, &CString)> {
        let (name, parent) = self.0.split_last()?;
        Some((Self(parent.to_vec()), name))
    }

    pub(super) fn join(&self, name: CString) -> Self {
        let mut names = self.0.clone();
        names.push(name);
        Self(names)
    }

    pub(super) fn names(&self) -> &[CString] {
        &self.0
    }

    /// The path as bytes, relative to the root.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let names: Vec<&[u8]> = self.0.iter().map(|name| name.to_bytes()).collect();
        names.join(&b'/')
    }

    pub(super) fn starts_with(&self, other: &Self) -> bool {
        self.0.starts_with(&other.0)
    }
}

impl std::fmt::Display for LayerPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("./");
        }
        f.write_str(&show(&self.to_bytes()))
    }
}

/// A name for messages: escaped, and not too long.
pub(super) fn show(bytes: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]);
    format!("{shown:?}{}", if bytes.len() > 300 { "..." } else { "" })
}

/// What a name in a layer asks for.
pub(super) enum Request {
    Root,
    Entry(LayerPath, CString),
    /// Hides an entry of lower layers.
    Whiteout(LayerPath, CString),
    /// Hides all entries of lower layers in a directory.
    Opaque(LayerPath),
    /// Bookkeeping of AUFS.
    Ignored,
}

/// Understands the names of the layer format.
pub(super) fn request(path: &[u8]) -> Result<Request, LayerError> {
    let parsed = LayerPath::parse(path)?;
    let refuse = |why: &str| LayerError::Broken(format!("entry {} {why}", show(path)));
    let Some((parent, name)) = parsed.split() else {
        return Ok(Request::Root);
    };
    let name = name.clone();
    let hidden = |name: &CString| name.to_bytes().starts_with(b".wh.");
    if parent.names().iter().any(hidden) {
        return match parent.names().iter().find(|n| hidden(n)) {
            Some(first) if first.to_bytes().starts_with(b".wh..wh.") => Ok(Request::Ignored),
            _ => Err(refuse("stands below a whiteout")),
        };
    }
    let Some(target) = name.to_bytes().strip_prefix(b".wh.") else {
        return Ok(Request::Entry(parent, name));
    };
    match target {
        b".wh..opq" => Ok(Request::Opaque(parent)),
        other if other.starts_with(b".wh.") => Ok(Request::Ignored),
        b"" | b"." | b".." => Err(refuse("is a whiteout of nothing")),
        other => {
            let target = CString::new(other).map_err(|_| refuse("holds a zero byte"))?;
            Ok(Request::Whiteout(parent, target))
        }
    }
}

/// The target of a hard link, as an entry of the layer.
pub(super) fn request_target(link: &[u8]) -> Result<Request, LayerError> {
    let target = LayerPath::parse_target(link)?;
    Ok(match target.split() {
        None => Request::Root,
        Some((parent, name)) => {
            let hidden = target
                .names()
                .iter()
                .any(|n| n.to_bytes().starts_with(b".wh."));
            if hidden {
                Request::Ignored
            } else {
                Request::Entry(parent, name.clone())
            }
        }
    })
}
