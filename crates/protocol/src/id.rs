//! Identifiers. Each idea has its own type, so that a sandbox id can't be
//! passed where a snapshot id is meant, and each is a safe file name, because
//! all of them name directories, cgroups and containers.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Longest identifier accepted, in bytes: leaves room for prefixes and
/// suffixes in a 255-byte file name and a 64-byte host name.
pub const MAX_ID_LEN: usize = 63;

/// Why a string is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidId {
    /// What was given.
    pub given: String,
    /// The rule that was broken.
    pub rule: &'static str,
}

impl fmt::Display for InvalidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid identifier {:?}: {}", self.given, self.rule)
    }
}

impl std::error::Error for InvalidId {}

fn check(given: &str) -> Result<(), InvalidId> {
    let refuse = |rule| {
        Err(InvalidId {
            given: given.chars().take(MAX_ID_LEN + 1).collect(),
            rule,
        })
    };
    if given.is_empty() || given.len() > MAX_ID_LEN {
        return refuse("it must have 1 to 63 characters");
    }
    if !given
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric())
    {
        return refuse("it must begin with a letter or a digit");
    }
    if !given
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return refuse("it may hold letters, digits, '-', '_' and '.' only");
    }
    Ok(())
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(given: &str) -> Result<Self, InvalidId> {
                check(given)?;
                Ok(Self(given.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(given: String) -> Result<Self, InvalidId> {
                check(&given)?;
                Ok(Self(given))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

identifier! {
    /// Names one sandbox within its owner: its directory, cgroup, container
    /// and host name.
    SandboxId
}
identifier! {
    /// Names who owns a set of sandboxes: one runtime server, one CLI call,
    /// one test. Everything on the machine that belongs to an owner can be
    /// found by this name and removed together.
    OwnerId
}
identifier! {
    /// Names a frozen file-system state that sandboxes can be started from.
    SnapshotId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_is_always_a_safe_file_name() {
        for good in ["a", "task-1.fork_2", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<SandboxId>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "-rf",
            "a/b",
            "a b",
            "ä",
            "a\0",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?} was accepted");
        }
    }
}
