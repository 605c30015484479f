//! Calls that come in pages: deleting many keys, listing uploads.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_sdk_s3::types::{Delete, EncodingType, ObjectIdentifier};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};

use super::failure::{failed, failure, kind_of};
use super::legible::Legible;
use super::sdk::S3;
use super::wire::{is_beyond_xml, percent_decoded};
use super::{Store, StoreErrorKind, StoreResult, UploadId};

/// The most keys that one call takes.
const PAGE: usize = 1000;

/// Deletes keys. Those that no XML can hold go one by one.
pub(super) async fn delete(s3: &S3, keys: &[String]) -> StoreResult<()> {
    let (odd, plain): (Vec<_>, Vec<_>) = keys.iter().partition(|key| key.chars().any(is_beyond_xml));
    for page in plain.chunks(PAGE) {
        delete_page(s3, page).await?;
    }
    for key in odd {
        s3.delete(key, None).await?;
    }
    Ok(())
}

async fn delete_page(s3: &S3, keys: &[&String]) -> StoreResult<()> {
    let what = format!("{} objects", keys.len());
    let invalid = |error| failure("delete", &what, StoreErrorKind::Invalid, error);
    let mut delete = Delete::builder().quiet(true);
    for key in keys {
        delete = delete.objects(ObjectIdentifier::builder().key(*key).build().map_err(invalid)?);
    }
    let delete = delete.build().map_err(invalid)?;
    let done = s3.asked(|| async {
        let call = s3.client.delete_objects().bucket(&s3.bucket).delete(delete.clone());
        // Services older than the newer checksums insist on this one, and the others read it too.
        let call = call.customize().mutate_request(|request: &mut HttpRequest| {
            if let Some(sum) = request.body().bytes().map(|body| STANDARD.encode(Md5::digest(body))) {
                request.headers_mut().insert("content-md5", sum);
            }
        });
        call.send().await.map_err(|error| failed("delete", &what, &error))
    });
    // The first that is not plainly gone.
    for error in done.await?.errors.unwrap_or_default() {
        let code = error.code.unwrap_or_default();
        let kind = kind_of(400, &code);
        let kind = if code == "AccessDenied" { StoreErrorKind::Denied } else { kind };
        if kind != StoreErrorKind::NotFound {
            let said = error.message.unwrap_or_default();
            return Err(failure("delete", &error.key.unwrap_or_default(), kind, format!("{code}: {said}")));
        }
    }
    Ok(())
}

/// Uploads that were begun and not finished.
pub(super) async fn uploads(s3: &S3, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>> {
    let mut found = Vec::new();
    let (mut key, mut upload) = (None, None);
    loop {
        let page = s3.asked(|| async {
            let call = s3.client.list_multipart_uploads().bucket(&s3.bucket).prefix(prefix);
            let call = call.encoding_type(EncodingType::Url);
            let call = call.set_key_marker(key.clone()).set_upload_id_marker(upload.clone());
            let call = call.customize();
            let call = if prefix.chars().any(is_beyond_xml) { call.interceptor(Legible) } else { call };
            call.send().await.map_err(|error| failed("list uploads below", prefix, &error))
        });
        let page = page.await?;
        let encoded = page.encoding_type == Some(EncodingType::Url);
        let decoded = |key: String| if encoded { percent_decoded(&key).unwrap_or(key) } else { key };
        for one in page.uploads.unwrap_or_default() {
            let (Some(key), Some(id)) = (one.key, one.upload_id) else { continue };
            let seconds = one.initiated.map_or(0, |time| time.secs().max(0).unsigned_abs());
            found.push((decoded(key), UploadId(id), UNIX_EPOCH + Duration::from_secs(seconds)));
        }
        let next = (page.next_key_marker.map(decoded), page.next_upload_id_marker);
        // A page that ends where it began would be asked for for ever.
        if page.is_truncated != Some(true) || next.0.is_none() || next == (key.clone(), upload.clone()) {
            return Ok(found);
        }
        (key, upload) = next;
    }
}
