//! The one error type. It says what the *caller* should do about a failure and never who is to blame.
//!
//! `rpc::status` maps each kind to a gRPC code, in one place. This module depends on nothing else of ours.

use std::error::Error as StdError;
use std::fmt;

/// What the caller should do. Serialised between our own processes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum ErrorKind {
    /// The request is wrong and will stay wrong: correct it.
    Invalid,
    /// The thing does not exist.
    NotFound,
    /// A thing of that name exists and differs from what is asked for.
    Conflict,
    /// Something else is going on with the same volume, or time ran out while it goes on: try again.
    Busy,
    /// The credentials do not suffice.
    Denied,
    /// There is no room (here): try elsewhere, or later.
    Exhausted,
    /// A size that can't be had at all, whatever is free.
    OutOfRange,
    /// The state of the thing forbids it: change that first.
    Precondition,
    /// This back end, or this volume's storage, doesn't have the function.
    Unsupported,
    /// What is needed can't be reached now: try again.
    Unreachable,
    /// The work was begun, goes on, and did not end in time: ask again with the same arguments.
    OutcomeUnknown,
    /// A defect or a broken machine: somebody has to look.
    Internal,
}

/// A failure: its kind, what could not be done with what, and the cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What everything here returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure with no cause below it. The message is lower case and says what to do next.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// A failure with its cause.
    pub fn caused(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// A failed system call. A full disk is `Exhausted`, a read-only one `Precondition`; the rest is `Internal`.
    pub fn io(message: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::Exhausted,
            std::io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Precondition,
            _ => ErrorKind::Internal,
        };
        Self::caused(kind, message, source)
    }

    /// What the caller should do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The number of the system call's error (errno(3)) that caused it, if one did.
    pub fn os_error(&self) -> Option<i32> {
        let cause = self.cause()?;
        match cause.downcast_ref::<Self>() {
            Some(error) => error.os_error(),
            None => cause.downcast_ref::<std::io::Error>()?.raw_os_error(),
        }
    }
}

impl fmt::Display for Error {
    /// The whole chain: `cannot mount X: device is busy`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut cause = self.cause();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            // An `Error` below prints the rest of the chain itself.
            cause = if error.is::<Error>() { None } else { error.source() };
        }
        Ok(())
    }
}

/// Without a `source`: `Display` has said it all, and who prints chains would say it twice.
impl StdError for Error {}

impl Error {
    fn cause(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// `Err(bail(...))` in fewer words: `fail!(Invalid, "size {size} is negative")`.
#[macro_export]
macro_rules! fail {
    ($kind:ident, $($message:tt)+) => {
        return Err($crate::error::Error::new($crate::error::ErrorKind::$kind, format!($($message)+)))
    };
}

/// Adds what was being done to a failed system call.
pub trait Context<T> {
    /// The message is made only on failure.
    fn context(self, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Context<T> for Result<T, E> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::io(message(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_shows_the_whole_chain_once() {
        let disk = Error::io("cannot write descriptor", std::io::Error::from(std::io::ErrorKind::StorageFull));
        assert_eq!(disk.kind(), ErrorKind::Exhausted);
        let error = Error::caused(ErrorKind::Internal, "cannot create vol-1", disk);
        assert_eq!(error.to_string(), "cannot create vol-1: cannot write descriptor: no storage space");
    }

    #[test]
    fn the_number_of_the_error_is_found_however_deep_it_lies() {
        let disk = Error::io("cannot mount", std::io::Error::from_raw_os_error(22));
        assert_eq!(Error::caused(ErrorKind::Internal, "cannot stage", disk).os_error(), Some(22));
        assert_eq!(Error::new(ErrorKind::Busy, "busy").os_error(), None);
    }
}
