//! Understanding what skopeo and Podman say when they fail.

use crate::image::error::ImageError;
use std::fmt;

/// What went wrong, as far as the words tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    RateLimited,
    NotFound,
    Unauthorized,
    /// Worth another attempt.
    Unreachable,
    /// Not worth one: the answer will be the same.
    Untrusted,
    DiskFull,
    Other,
}

/// A failed fetch.
#[derive(Debug)]
pub(super) struct Failure {
    kind: Kind,
    program: &'static str,
    reason: String,
}

/// Words by which each kind is told, in the order they are looked for: a
/// refusal to answer too many requests also speaks of authentication.
const WORDS: [(Kind, &[&str]); 6] = [
    (
        Kind::RateLimited,
        &["toomanyrequests", "too many requests", "rate limit", " 429"],
    ),
    (
        Kind::DiskFull,
        &["no space left on device", "disk quota exceeded"],
    ),
    (
        Kind::NotFound,
        &[
            "manifest unknown",
            "name unknown",
            "name_unknown",
            "manifest_unknown",
            "repository name not known",
            "no image found in manifest list",
            "no image found in image index",
            "does not resolve to an image id",
            "no such image",
            "image not known",
            "status 404",
            "404 (not found)",
            "was deleted or has expired",
        ],
    ),
    (
        Kind::Unauthorized,
        &[
            "unauthorized",
            "authentication required",
            "invalid username/password",
            "access to the resource is denied",
            "denied:",
            "403 (forbidden)",
            "status 403",
            "status 401",
            "no basic auth credentials",
        ],
    ),
    (
        Kind::Untrusted,
        &[
            "x509:",
            "server gave http response to https client",
            "first record does not look like a tls",
        ],
    ),
    (
        Kind::Unreachable,
        &[
            "no such host",
            "connection refused",
            "connection reset",
            "broken pipe",
            "network is unreachable",
            "no route to host",
            "timeout",
            "timed out",
            "deadline exceeded",
            "server misbehaving",
            "temporary failure in name resolution",
            "unexpected eof",
            ": eof",
            "status: 50",
            "status 50",
            "bad gateway",
            "service unavailable",
            "internal server error",
            "stream error",
        ],
    ),
];

impl Failure {
    /// Reads a program's last words.
    pub(super) fn read(program: &'static str, status: &str, output: &str) -> Self {
        let reason = last_words(output);
        let lower = reason.to_lowercase();
        let kind = WORDS
            .iter()
            .find(|(_, words)| words.iter().any(|word| lower.contains(word)))
            .map_or(Kind::Other, |(kind, _)| *kind);
        let reason = if reason.is_empty() {
            format!("it ended with {status} and said nothing")
        } else {
            reason
        };
        Self {
            kind,
            program,
            reason,
        }
    }

    pub(super) fn unreachable(reason: String) -> Self {
        Self {
            kind: Kind::Unreachable,
            program: "",
            reason,
        }
    }

    /// Whether it may be gone at the next attempt. A registry that limits
    /// requests is not asked again: the copying programs have waited as long
    /// as it told them before they gave up.
    pub(super) fn may_pass(&self) -> bool {
        self.kind == Kind::Unreachable
    }

    pub(super) fn into_error(self, image: &str) -> ImageError {
        let image = image.to_owned();
        let reason = self.reason;
        match self.kind {
            Kind::RateLimited => ImageError::RateLimited { image, reason },
            Kind::NotFound => ImageError::NotFound { image, reason },
            Kind::Unauthorized => ImageError::Unauthorized { image, reason },
            Kind::Unreachable | Kind::Untrusted => ImageError::Unreachable { image, reason },
            Kind::DiskFull => ImageError::Io {
                step: "fetching",
                path: image.into(),
                source: std::io::Error::from_raw_os_error(libc::ENOSPC),
            },
            Kind::Other => ImageError::Program {
                program: self.program.to_owned(),
                reason,
            },
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// The error message: the last lines that are no mere warnings, without the
/// logging around them.
fn last_words(output: &str) -> String {
    let lines: Vec<&str> = output
        .lines()
        .map(str::trim)
        .filter(|line| {
            !line.is_empty() && !line.contains("level=warning") && !line.contains("level=info")
        })
        .collect();
    let last = &lines[lines.len().saturating_sub(3)..];
    let text = last.join("; ");
    let message = text
        .split_once("msg=\"")
        .map_or(text.as_str(), |(_, message)| message.trim_end_matches('"'));
    message.replace("\\\"", "\"").chars().take(1000).collect()
}

#[cfg(test)]
mod tests {
    use super::{Failure, Kind};

    #[test]
    fn what_registries_say_becomes_what_the_user_can_do_about_it() {
        for (said, kind) in [
            (
                r#"time="2026-11-23T07:38:49Z" level=fatal msg="initializing source docker://docker.io/library/nope:latest: reading manifest latest in docker.io/library/nope: errors:\ndenied: requested access to the resource is denied\nunauthorized: authentication required\n""#,
                Kind::Unauthorized,
            ),
            (
                r#"time="x" level=fatal msg="initializing source docker://a: reading manifest v9 in a: manifest unknown""#,
                Kind::NotFound,
            ),
            (
                r#"level=fatal msg="reading manifest latest in docker.io/x: toomanyrequests: You have reached your unauthenticated pull rate limit. https://www.docker.com/increase-rate-limit""#,
                Kind::RateLimited,
            ),
            (
                r#"level=fatal msg="pinging container registry a.b: Get \"https://a.b/v2/\": dial tcp: lookup a.b: no such host""#,
                Kind::Unreachable,
            ),
            (
                r#"level=fatal msg="pinging container registry localhost:1: Get \"https://localhost:1/v2/\": x509: certificate signed by unknown authority""#,
                Kind::Untrusted,
            ),
            (
                r#"level=fatal msg="writing blob: write /x: no space left on device""#,
                Kind::DiskFull,
            ),
            (r#"level=fatal msg="something new""#, Kind::Other),
        ] {
            assert_eq!(
                Failure::read("skopeo copy", "exit status: 1", said).kind,
                kind,
                "{said}"
            );
        }
    }

    #[test]
    fn the_reason_is_the_message_without_the_logging_around_it() {
        let said = "time=\"a\" level=warning msg=\"noise\"\ntime=\"b\" level=fatal msg=\"reading \\\"x\\\": manifest unknown\"\n";
        let failure = Failure::read("skopeo copy", "exit status: 1", said);
        assert_eq!(failure.to_string(), "reading \"x\": manifest unknown");
    }
}
