//! Error kinds as gRPC codes.
//!
//! To kubelet and the provisioner a code is semantic: Canceled, DeadlineExceeded, Unavailable, Aborted and
//! ResourceExhausted mean that something may still be going on or left behind; any other one means that surely
//! nothing is.

use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};

pub(super) fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Conflict => Code::AlreadyExists,
        ErrorKind::Busy => Code::Aborted,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::OutOfRange => Code::OutOfRange,
        ErrorKind::Precondition => Code::FailedPrecondition,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Unreachable => Code::Unavailable,
        ErrorKind::OutcomeUnknown => Code::DeadlineExceeded,
        ErrorKind::Internal => Code::Internal,
    }
}

/// The reply; CSI 1.13 forbids `details`.
pub(super) fn status(error: &Error) -> Status {
    Status::new(code(error.kind()), error.to_string())
}

/// The code's name as the metrics and the specification write it.
pub(crate) fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_still_be_going_on_has_a_code_that_says_so() {
        use ErrorKind::*;
        let pending = [Busy, Exhausted, Unreachable, OutcomeUnknown];
        let settled = [Invalid, NotFound, Conflict, Denied, OutOfRange, Precondition, Unsupported, Internal];
        let says_pending = |kind| {
            matches!(
                code(kind),
                Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable | Code::Aborted | Code::ResourceExhausted
            )
        };
        assert!(pending.into_iter().all(says_pending));
        assert!(!settled.into_iter().any(says_pending));
    }
}
