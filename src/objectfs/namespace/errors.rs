//! Which errno a program gets for what the layers below say. The one table.

use super::super::content::ContentError;
use super::super::store::{StoreError, StoreErrorKind};
use crate::host::Errno;

/// Of a call of the service. `Conflict` and `NotFound` are decided where it is known what was wanted; what arrives here
/// is about something that was there a moment ago.
pub(crate) fn store_errno(error: &StoreError) -> Errno {
    match error.kind {
        StoreErrorKind::NotFound => Errno::NOENT,
        StoreErrorKind::Conflict => Errno::STALE,
        StoreErrorKind::NoBucket => Errno::IO,
        StoreErrorKind::Denied => Errno::ACCESS,
        StoreErrorKind::Invalid => Errno::INVAL,
        StoreErrorKind::Unsupported => Errno::OPNOTSUPP,
        StoreErrorKind::Corrupt | StoreErrorKind::Unavailable | StoreErrorKind::Local => Errno::IO,
    }
}

/// The same, said in the log: once, here.
pub(crate) fn refused(error: &StoreError) -> Errno {
    let errno = store_errno(error);
    if errno != Errno::NOENT {
        tracing::warn!(errno = errno.raw_os_error(), "{error}");
    }
    errno
}

/// Of a file's content.
pub(crate) fn content_errno(error: &ContentError) -> Errno {
    let (errno, message) = match error {
        ContentError::Changed(message) => (Errno::STALE, message.as_str()),
        ContentError::Full(message) => (Errno::NOSPC, message.as_str()),
        ContentError::TooLarge => (Errno::FBIG, "larger than the largest object"),
        ContentError::Disk(message) => (Errno::IO, message.as_str()),
        // The version that was open has gone.
        ContentError::Store(error) if error.kind == StoreErrorKind::NotFound => (Errno::STALE, error.message.as_str()),
        ContentError::Store(error) => (store_errno(error), error.message.as_str()),
    };
    tracing::warn!(errno = errno.raw_os_error(), "{message}");
    errno
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_its_errno() {
        for (kind, errno) in [
            (StoreErrorKind::NotFound, Errno::NOENT),
            (StoreErrorKind::NoBucket, Errno::IO),
            (StoreErrorKind::Conflict, Errno::STALE),
            (StoreErrorKind::Denied, Errno::ACCESS),
            (StoreErrorKind::Invalid, Errno::INVAL),
            (StoreErrorKind::Unsupported, Errno::OPNOTSUPP),
            (StoreErrorKind::Corrupt, Errno::IO),
            (StoreErrorKind::Unavailable, Errno::IO),
            (StoreErrorKind::Local, Errno::IO),
        ] {
            assert_eq!(store_errno(&StoreError { kind, message: String::new() }), errno, "{kind:?}");
        }
        let gone = StoreError { kind: StoreErrorKind::NotFound, message: String::new() };
        for (error, errno) in [
            (ContentError::Changed(String::new()), Errno::STALE),
            (ContentError::Full(String::new()), Errno::NOSPC),
            (ContentError::TooLarge, Errno::FBIG),
            (ContentError::Store(gone), Errno::STALE),
            (ContentError::Disk(String::new()), Errno::IO),
        ] {
            assert_eq!(content_errno(&error), errno, "{error:?}");
        }
    }
}
