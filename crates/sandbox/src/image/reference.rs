//! How a user names an image.

use serde::{Deserialize, Serialize};
use skyrl_protocol::SnapshotId;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Names an image.
///
/// `host`, `snapshot:ID`, `oci-archive:FILE[:TAG]`, `docker-archive:FILE[:TAG]`,
/// `dir:PATH` (an unpacked root, an OCI layout or skopeo's `dir:` folder), or
/// a registry reference such as `docker.io/library/busybox:1`, with or without
/// `docker://`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImageRef {
    /// This machine's own `/usr`, read-only.
    Host,
    /// Files frozen from a sandbox.
    Snapshot(SnapshotId),
    /// An OCI archive file (tar of an OCI layout).
    OciArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images, by `org.opencontainers.image.ref.name`.
        tag: Option<String>,
    },
    /// The output of `docker save`.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images, by repo tag.
        tag: Option<String>,
    },
    /// A directory.
    Directory(PathBuf),
    /// A reference in a registry or in the local image storage.
    Registry(String),
}

/// When to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PullPolicy {
    /// Only when the store lacks the image.
    #[default]
    IfMissing,
    /// Always; the store serves when the digest is unchanged.
    Always,
    /// Never: an image that is not in the store is an error.
    Never,
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let archive = |f: &mut fmt::Formatter<'_>, kind, path: &PathBuf, tag: &Option<String>| {
            write!(f, "{kind}:{}", path.display())?;
            tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
        };
        match self {
            Self::Host => f.write_str("host"),
            Self::Snapshot(id) => write!(f, "snapshot:{id}"),
            Self::OciArchive { path, tag } => archive(f, "oci-archive", path, tag),
            Self::DockerArchive { path, tag } => archive(f, "docker-archive", path, tag),
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
            Self::Registry(name) => f.write_str(name),
        }
    }
}

impl From<ImageRef> for String {
    fn from(image: ImageRef) -> String {
        image.to_string()
    }
}

impl TryFrom<String> for ImageRef {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for ImageRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "host" {
            return Ok(Self::Host);
        }
        let archive = |rest: &str| -> Result<(PathBuf, Option<String>), String> {
            // A tag has no '/', so that FILE may hold colons of its own.
            let (path, tag) = match rest.split_once(':') {
                Some((path, tag)) if !tag.is_empty() => (path, Some(tag.to_owned())),
                _ => (rest.trim_end_matches(':'), None),
            };
            if path.is_empty() {
                return Err(format!("{text:?} names no file"));
            }
            Ok((path.into(), tag))
        };
        if let Some(id) = text.strip_prefix("snapshot:") {
            return id.parse().map(Self::Snapshot).map_err(|e| format!("{e}"));
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            return archive(rest).map(|(path, tag)| Self::OciArchive { path, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            return archive(rest).map(|(path, tag)| Self::DockerArchive { path, tag });
        }
        if let Some(path) = text.strip_prefix("dir:") {
            if path.is_empty() {
                return Err("\"dir:\" names no directory".into());
            }
            return Ok(Self::Directory(path.into()));
        }
        let name = text.strip_prefix("docker://").unwrap_or(text);
        let sound = !name.is_empty()
            && !name.starts_with('-')
            && name.bytes().all(|b| {
                b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'/' | b':' | b'@')
            });
        if !sound {
            return Err(format!("{text:?} is not an image reference"));
        }
        Ok(Self::Registry(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_printed_back() {
        for text in [
            "host",
            "snapshot:prepared-1",
            "oci-archive:/a/b.tar",
            "oci-archive:/a/b.tar:v1",
            "docker-archive:x.tar:repo/name:v1",
            "dir:/srv/root",
            "docker.io/library/busybox:1.36",
            "busybox@sha256:00ff",
        ] {
            let image: ImageRef = text.parse().unwrap();
            assert_eq!(image.to_string(), text);
        }
        assert_eq!(
            "docker://busybox".parse::<ImageRef>().unwrap(),
            ImageRef::Registry("busybox".into())
        );
    }

    #[test]
    fn what_could_be_taken_for_an_option_or_a_path_trick_is_refused() {
        for text in [
            "",
            "-v",
            "a b",
            "snapshot:../x",
            "dir:",
            "oci-archive:",
            "x;rm",
        ] {
            assert!(text.parse::<ImageRef>().is_err(), "{text:?} was accepted");
        }
    }
}
