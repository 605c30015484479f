//! Credentials on their way from a request to the call that needs them.
//!
//! They leave the message when it is parsed. There is no way to print, serialise or compare one.

use std::collections::BTreeMap;
use std::fmt;

/// The secrets of one request, by key.
#[derive(Default)]
pub struct Secrets(BTreeMap<String, String>);

impl Secrets {
    /// Takes the values over; the caller keeps no copy.
    pub fn new(values: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(values.into_iter().collect())
    }

    /// Is there nothing in it?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of a key, for the call that needs it and nothing else.
    pub fn reveal(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

impl fmt::Debug for Secrets {
    /// The number of keys: their names, too, may tell something.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} secrets", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_neither_key_nor_value() {
        let secrets = Secrets::new([("userKey".to_owned(), "canary".to_owned())]);
        assert_eq!(format!("{secrets:?}"), "1 secrets");
        assert_eq!(secrets.reveal("userKey"), Some("canary"));
    }
}
