//! What an endpoint honours: found out by trial, with objects below `.berth/probe/`, which are removed again.
//!
//! An endpoint counts as able only if it both refuses what the condition forbids and does what it allows; one that ignores
//! a header does not refuse, and one that does not know it may refuse all.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::sdk::S3;
use super::{Abilities, Condition, Etag, ListRequest, Metadata, Payload, Store, StoreErrorKind, StoreResult};
use crate::objectfs::settings::HIDDEN;

/// Nothing conditional works, so far as is known.
pub const NONE: Abilities = Abilities {
    conditional_put: false,
    conditional_finish: false,
    conditional_delete: false,
    conditional_copy: false,
    listed_metadata: false,
};

const ALL: Abilities = Abilities {
    conditional_put: true,
    conditional_finish: true,
    conditional_delete: true,
    conditional_copy: true,
    listed_metadata: true,
};

/// Tries what the endpoint honours, in some ten calls. Credentials that may not write leave it unknown, which is [`NONE`].
///
/// # Errors
/// The service is away, or has no such bucket.
pub async fn probe(s3: &S3) -> StoreResult<Abilities> {
    let able = s3.honouring(ALL);
    let name = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
    let key = format!("{HIDDEN}probe/{name:016x}");
    let result = trials(&able, &key).await;
    for key in [key.clone(), format!("{key}-copy")] {
        let _ = able.delete(&key, None).await;
    }
    match result {
        Ok(abilities) => {
            tracing::info!(bucket = %s3.bucket, ?abilities, "found what the endpoint honours");
            Ok(abilities)
        }
        Err(error) if matches!(error.kind, StoreErrorKind::Unavailable | StoreErrorKind::NoBucket) => Err(error),
        Err(error) => {
            tracing::info!(bucket = %s3.bucket, %error, "cannot find out what the endpoint honours: taken for nothing");
            Ok(NONE)
        }
    }
}

/// What can be found out without writing: whether listings tell metadata, if there is anything to list.
pub(super) async fn without_writing(s3: &S3) -> Abilities {
    let listing = ListRequest { limit: Some(1), metadata: true, ..ListRequest::default() };
    let page = s3.honouring(ALL).list(&listing).await.unwrap_or_default();
    let listed_metadata = page.objects.first().is_some_and(|object| object.metadata.is_some());
    Abilities { listed_metadata, ..NONE }
}

/// Did the call do it? `None`: it was refused by condition, or as unknown.
fn done<T>(result: StoreResult<T>) -> StoreResult<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.kind {
            StoreErrorKind::Unavailable | StoreErrorKind::NoBucket | StoreErrorKind::Denied => Err(error),
            _ => Ok(None),
        },
    }
}

async fn trials(s3: &S3, key: &str) -> StoreResult<Abilities> {
    let about = Metadata { user: [("probe".to_owned(), "told".to_owned())].into(), ..Metadata::default() };
    let other = Condition::Is(Etag("\"00000000000000000000000000000000\"".to_owned()));
    let bytes = |text: &'static str| Payload::Bytes(Bytes::from_static(text.as_bytes()));
    let put = async |text, condition: &Condition| done(s3.put(key, bytes(text), &about, condition).await);

    let made = put("1", &Condition::Absent).await?;
    let refused = put("2", &Condition::Absent).await?.is_none() && put("3", &other).await?.is_none();
    let etag = match made {
        Some(etag) if refused => Some(etag),
        _ => None,
    };
    let replaced = match etag {
        Some(etag) => put("4", &Condition::Is(etag)).await?,
        None => None,
    };
    let conditional_put = replaced.is_some();
    let etag = match replaced {
        Some(etag) => etag,
        None => s3.put(key, bytes("4"), &about, &Condition::None).await?,
    };

    let listing = ListRequest { prefix: key.to_owned(), limit: Some(1), metadata: true, ..ListRequest::default() };
    let page = done(s3.list(&listing).await)?.unwrap_or_default();
    let told = page.objects.first().and_then(|object| object.metadata.as_ref());
    let listed_metadata = told.is_some_and(|told| told.user == about.user);

    let copy = format!("{key}-copy");
    let try_copy = async |to: &str, condition: &Condition| done(s3.copy(key, None, to, None, condition).await);
    let wrong = Etag("\"00000000000000000000000000000000\"".to_owned());
    // Also of the source: here no look may go before.
    s3.sources_compared.store(true, Ordering::Relaxed);
    let upload = done(s3.begin_upload(&copy, &about).await)?;
    let compared = done(s3.copy(key, Some(&wrong), &copy, None, &Condition::None).await);
    let part = match &upload {
        Some(upload) => done(s3.copy_part(&copy, upload, 1, key, Some(&wrong), 0..1).await),
        None => Ok(None),
    };
    if let Some(upload) = upload {
        let _ = s3.abort_upload(&copy, &upload).await;
    }
    let refused = matches!((&compared, &part), (Ok(None), Ok(None)));
    s3.sources_compared.store(refused, Ordering::Relaxed);
    compared?;
    part?;
    s3.delete(&copy, None).await?;
    let conditional_copy = try_copy(&copy, &Condition::Absent).await?.is_some()
        && try_copy(&copy, &Condition::Absent).await?.is_none()
        && try_copy(&copy, &other).await?.is_none();

    let conditional_finish = finish(s3, key, &etag, &other).await?;

    let kept = done(s3.delete(key, Some(&wrong)).await)?.is_none();
    let there = s3.head(key).await.ok().map(|head| head.etag);
    let conditional_delete = kept
        && match there {
            Some(etag) => done(s3.delete(key, Some(&etag)).await)?.is_some() && s3.head(key).await.is_err(),
            None => false,
        };
    Ok(Abilities { conditional_put, conditional_finish, conditional_delete, conditional_copy, listed_metadata })
}

/// The same of uploads: one that must not replace, one that may.
async fn finish(s3: &S3, key: &str, etag: &Etag, other: &Condition) -> StoreResult<bool> {
    let mut able = true;
    for (condition, wanted) in [(&Condition::Absent, false), (other, false), (&Condition::Is(etag.clone()), true)] {
        let Some(upload) = done(s3.begin_upload(key, &Metadata::default()).await)? else { return Ok(false) };
        let payload = Payload::Bytes(Bytes::from_static(b"5"));
        let finished = match done(s3.upload_part(key, &upload, 1, payload).await)? {
            Some(part) => done(s3.finish_upload(key, &upload, &[part], condition).await),
            None => Ok(None),
        };
        if !matches!(finished, Ok(Some(_))) {
            let _ = s3.abort_upload(key, &upload).await;
        }
        able &= finished?.is_some() == wanted;
        if !able {
            break;
        }
    }
    Ok(able)
}
