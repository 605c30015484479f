//! Names and ids: a newtype for each, refused when hostile.

use std::fmt;

use crate::error::Result;

/// CSI 1.13, "Size Limits": no string of a request is longer than this, in bytes.
const STRING_LIMIT: usize = 128;
/// The same section allows a node id this many bytes.
const NODE_LIMIT: usize = 256;

/// Refuses what no honest caller sends as an id: anything that could leave a directory or end a string early.
///
/// A well-formed id that no back end made is *not* refused here: it is simply not found.
fn check_id(what: &str, id: &str) -> Result<()> {
    if id.is_empty() {
        fail!(Invalid, "{what} is missing");
    }
    if id.len() > STRING_LIMIT {
        fail!(Invalid, "{what} has {} bytes; at most {STRING_LIMIT} are allowed", id.len());
    }
    if let Some(bad) = id.chars().find(|c| c.is_control() || c.is_whitespace()) {
        fail!(Invalid, "{what} {id:?} has the character {bad:?}, which is not allowed");
    }
    if id.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        fail!(Invalid, "{what} {id:?} has an empty, `.` or `..` part");
    }
    Ok(())
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// # Errors
            /// `Invalid` for an empty, over-long or hostile one.
            pub fn new(id: impl Into<String>) -> Result<Self> {
                let id = id.into();
                check_id($what, &id)?;
                Ok(Self(id))
            }

            /// The id as the orchestrator knows it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// What a volume is called after it was made; the back end derives it from the request's name.
    VolumeId,
    "volume id"
);
id!(
    /// What a snapshot is called after it was made.
    SnapshotId,
    "snapshot id"
);

/// What the orchestrator calls a volume or snapshot that it wants made: free text, and the key of idempotency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// # Errors
    /// `Invalid` when empty, longer than 128 bytes, or with control characters (CSI 1.13, CreateVolumeRequest.name).
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        if name.is_empty() {
            fail!(Invalid, "name is missing");
        }
        if name.len() > STRING_LIMIT {
            fail!(Invalid, "name has {} bytes; at most {STRING_LIMIT} are allowed", name.len());
        }
        if name.chars().any(char::is_control) {
            fail!(Invalid, "name {name:?} has a control character");
        }
        Ok(Self(name))
    }

    /// The name as it came.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What Kubernetes calls this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeName(String);

impl NodeName {
    /// # Errors
    /// `Invalid` unless it is a label value of Kubernetes: it becomes a topology segment.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if name.len() > NODE_LIMIT
            || !name.chars().all(inner)
            || !edge(name.chars().next())
            || !edge(name.chars().last())
        {
            fail!(
                Invalid,
                "node name {name:?} must be letters, digits, `-`, `_` and `.`, and begin and end with one of the first two"
            );
        }
        Ok(Self(name))
    }

    /// The name as it came.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn hostile_ids_are_invalid_and_unknown_ones_are_not() {
        let long = "x".repeat(129);
        for bad in ["", "..", "a/../b", "/etc", "a//b", "a/", "a\0b", "a\nb", "a b", ".", long.as_str()] {
            assert_eq!(VolumeId::new(bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
        for good in ["reallyfakevolumeid", "fake-vol-id-4", "cluster/group/vol", "a..b", &"x".repeat(128)] {
            assert_eq!(VolumeId::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_name_may_be_any_text_of_128_bytes() {
        assert!(Name::new("Ünïcode name/with..dots".to_owned()).is_ok());
        assert!(Name::new("x".repeat(128)).is_ok());
        for bad in [String::new(), "x".repeat(129), "a\0".to_owned()] {
            assert!(Name::new(bad).is_err());
        }
    }

    #[test]
    fn a_node_name_is_a_label_value() {
        assert!(NodeName::new("ip-10-0-0-1.eu.internal").is_ok());
        for bad in ["", "-a", "a.", "a b", "a/b"] {
            assert!(NodeName::new(bad).is_err(), "{bad:?}");
        }
    }
}
