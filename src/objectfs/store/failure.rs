//! What the SDK's errors and the service's codes mean to the caller: one table.

use std::error::Error;
use std::fmt::Write;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use super::{StoreError, StoreErrorKind};

/// An error without a service behind it.
pub(super) fn failure(verb: &str, key: &str, kind: StoreErrorKind, why: impl std::fmt::Display) -> StoreError {
    StoreError { kind, message: format!("cannot {verb} {key}: {why}") }
}

/// What a failed call of the SDK comes to.
pub(super) fn failed<E>(verb: &str, key: &str, error: &SdkError<E, HttpResponse>) -> StoreError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let status = error.raw_response().map_or(0, |response| response.status().as_u16());
    match error {
        SdkError::ServiceError(service) => {
            let code = service.err().code().unwrap_or_default();
            let kind = kind_of(status, code);
            let said = service.err().message().unwrap_or_default();
            let why = [code, said].iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(": ");
            failure(verb, key, kind, if why.is_empty() { format!("HTTP status {status}") } else { why })
        }
        // What came is no answer: cut off on its way, say.
        SdkError::ResponseError(_) | SdkError::TimeoutError(_) => {
            failure(verb, key, StoreErrorKind::Unavailable, chain(error))
        }
        SdkError::DispatchFailure(_) => {
            failure(verb, key, credentials(error).unwrap_or(StoreErrorKind::Unavailable), chain(error))
        }
        _ => failure(verb, key, credentials(error).unwrap_or(StoreErrorKind::Invalid), chain(error)),
    }
}

/// The kind of a service's answer. Where the code is unknown or absent (HEAD has none), the status decides.
pub(super) fn kind_of(status: u16, code: &str) -> StoreErrorKind {
    match code {
        "NoSuchKey" | "NoSuchUpload" | "NoSuchVersion" | "NotFound" => StoreErrorKind::NotFound,
        "NoSuchBucket" => StoreErrorKind::NoBucket,
        "PreconditionFailed" | "ConditionalRequestConflict" | "BucketAlreadyExists" | "BucketNotEmpty" => {
            StoreErrorKind::Conflict
        }
        "BadDigest" | "XAmzContentSHA256Mismatch" | "XAmzContentChecksumMismatch" | "IncompleteBody" => {
            StoreErrorKind::Corrupt
        }
        "SlowDown"
        | "SlowDownRead"
        | "SlowDownWrite"
        | "RequestTimeout"
        | "InternalError"
        | "ServiceUnavailable"
        | "OperationAborted"
        | "ThrottlingException"
        | "Throttling"
        | "TooManyRequests"
        | "Busy" => StoreErrorKind::Unavailable,
        // With status 400.
        "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken" => StoreErrorKind::Denied,
        "NotImplemented" | "MethodNotAllowed" => StoreErrorKind::Unsupported,
        // MinIO's, with status 507: waiting makes no room.
        "XMinioStorageFull" => StoreErrorKind::Invalid,
        _ => match status {
            401 | 403 => StoreErrorKind::Denied,
            404 => StoreErrorKind::NotFound,
            405 | 501 => StoreErrorKind::Unsupported,
            412 => StoreErrorKind::Conflict,
            408 | 425 | 429 | 500.. => StoreErrorKind::Unavailable,
            // An error in the body of a 200: a copy that failed under way.
            ..=299 => StoreErrorKind::Unavailable,
            _ => StoreErrorKind::Invalid,
        },
    }
}

/// Credentials that could not be had: none at all, or their source does not answer.
fn credentials(error: &(dyn Error + 'static)) -> Option<StoreErrorKind> {
    use aws_credential_types::provider::error::CredentialsError;
    let mut next = Some(error);
    while let Some(error) = next {
        match error.downcast_ref::<CredentialsError>() {
            Some(CredentialsError::ProviderTimedOut(_) | CredentialsError::ProviderError(_)) => {
                return Some(StoreErrorKind::Unavailable);
            }
            Some(_) => return Some(StoreErrorKind::Denied),
            None => next = error.source(),
        }
    }
    None
}

/// What became of a body that broke off.
pub(super) fn broken(key: &str, error: &(dyn Error + 'static)) -> StoreError {
    let mut next = Some(error);
    let mut kind = StoreErrorKind::Unavailable;
    while let Some(error) = next {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_incomplete_message)
            // The type of the SDK's checksum error is in a crate that is not ours to name.
            || error.to_string().contains("checksum mismatch")
        {
            kind = StoreErrorKind::Corrupt;
        }
        next = error.source();
    }
    failure("read", key, kind, chain(error))
}

/// An error and its causes, in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let _ = write!(text, ": {error}");
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_has_its_kind() {
        use StoreErrorKind::*;
        for (status, code, kind) in [
            (404, "NoSuchKey", NotFound),
            (404, "", NotFound),
            (404, "NoSuchUpload", NotFound),
            (404, "NoSuchBucket", NoBucket),
            (412, "PreconditionFailed", Conflict),
            (412, "", Conflict),
            (409, "ConditionalRequestConflict", Conflict),
            (409, "OperationAborted", Unavailable),
            (403, "AccessDenied", Denied),
            (403, "ExpiredToken", Denied),
            (400, "ExpiredToken", Denied),
            (400, "InvalidArgument", Invalid),
            (400, "EntityTooSmall", Invalid),
            (400, "BadDigest", Corrupt),
            (400, "RequestTimeout", Unavailable),
            (503, "SlowDown", Unavailable),
            (500, "InternalError", Unavailable),
            (200, "InternalError", Unavailable),
            (429, "", Unavailable),
            (501, "NotImplemented", Unsupported),
            (507, "XMinioStorageFull", Invalid),
            (301, "PermanentRedirect", Invalid),
        ] {
            assert_eq!(kind_of(status, code), kind, "{status} {code}");
        }
    }
}
