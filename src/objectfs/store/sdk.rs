//! A bucket through the AWS SDK: the calls, one attempt each. Nothing is tried again here, but for a call that was refused
//! when the credentials of the SDK's chain may have changed meanwhile.
//!
//! Checksums: each body that is sent carries a CRC64-NVME (a header, or a trailer where it is streamed from a file), unless
//! the endpoint wants them only where required; its payload is not hashed for the signature. Without such a checksum and
//! without TLS, bodies from memory are hashed for the signature instead, so that the service can tell. A whole object that
//! is read is compared with the checksum that the service has of it; each body is compared with its length.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::RequestChecksumCalculation;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, ChecksumMode, CompletedMultipartUpload, CompletedPart, EncodingType, MetadataDirective,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use futures_util::StreamExt;

use super::connect::{Wallet, client};
use super::failure::{broken, failed, failure};
use super::legible::Legible;
use super::wire::{body, etag, etag_of, headers, is_beyond_xml, metadata, percent_decoded, percent_encoded};
use super::*;
use crate::objectfs::settings::{Checksums, Credentials, Endpoint};

/// Calls about a bucket as a whole are tried again no longer than this: somebody waits.
const BUCKET_PATIENCE: Duration = Duration::from_secs(30);

/// Begins a token that is a folded prefix: go on behind all that lies below it. Others are the service's own, behind a `=`.
const BEHIND: &str = ">";

/// One bucket of an S3 service.
#[derive(Clone)]
pub struct S3 {
    pub(super) client: Client,
    pub(super) bucket: String,
    pub(super) region: String,
    pub(super) aws: bool,
    wallet: Wallet,
    abilities: Abilities,
    /// Longest time that calls about the bucket as a whole are tried again.
    pub(super) patience: Duration,
    /// The service compares the version of a copy's source. RGW 16.2 does not: then a look goes before.
    pub(super) sources_compared: Arc<AtomicBool>,
    /// Bodies carry checksums.
    checked: bool,
    /// Bodies are hashed for the signature.
    hashed: bool,
}

/// Reaches a service. Asks nothing of it yet, so the bucket need not exist; the abilities are those of [`NONE`](super::probe::NONE)
/// until [`probe`](super::probe::probe) has found out.
///
/// # Errors
/// `Invalid`: the certificates can't be read.
pub async fn connect(endpoint: &Endpoint, credentials: Option<&Credentials>, bucket: &str) -> StoreResult<Arc<S3>> {
    let (client, wallet) = client(endpoint, credentials).await?;
    let checked = endpoint.checksums == Checksums::WhenSupported;
    let tls = endpoint.url.as_ref().is_none_or(|url| !url.starts_with("http://"));
    Ok(Arc::new(S3 {
        client,
        bucket: bucket.to_owned(),
        region: endpoint.region.clone(),
        aws: endpoint.url.is_none(),
        wallet,
        abilities: super::probe::NONE,
        patience: endpoint.patience().min(BUCKET_PATIENCE),
        sources_compared: Arc::default(),
        checked,
        hashed: !checked && !tls,
    }))
}

impl S3 {
    /// The same bucket, taken to honour these conditions.
    pub fn honouring(&self, abilities: Abilities) -> Arc<Self> {
        Arc::new(Self { abilities, ..self.clone() })
    }

    /// Its name.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// Signs with other credentials from now on, also what shares this connection.
    pub fn renew(&self, credentials: &Credentials) {
        self.wallet.replace(credentials);
    }

    /// Makes a call; once more if it was refused and there may be newer credentials.
    pub(super) async fn asked<T, F: Future<Output = StoreResult<T>>>(&self, call: impl Fn() -> F) -> StoreResult<T> {
        match call().await {
            Err(error) if error.kind == StoreErrorKind::Denied && self.wallet.refused() => call().await,
            result => result,
        }
    }

    fn algorithm(&self) -> Option<ChecksumAlgorithm> {
        self.checked.then_some(ChecksumAlgorithm::Crc64Nvme)
    }

    /// Looks whether the condition holds, where the service would not.
    async fn look(&self, verb: &str, key: &str, condition: &Condition, honoured: bool) -> StoreResult<()> {
        if honoured || *condition == Condition::None {
            return Ok(());
        }
        let there = match self.head(key).await {
            Ok(head) => Some(head.etag),
            Err(error) if error.kind == StoreErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        match (condition, there) {
            (Condition::Absent, None) => Ok(()),
            (Condition::Is(wanted), Some(etag)) if *wanted == etag => Ok(()),
            _ => Err(failure(verb, key, StoreErrorKind::Conflict, "another version is there")),
        }
    }

    /// Looks whether the source of a copy is of the version, where the service would not.
    async fn look_at_source(&self, verb: &str, from: &str, version: Option<&Etag>) -> StoreResult<()> {
        match version {
            Some(version) if !self.sources_compared.load(Ordering::Relaxed) => {
                if self.head(from).await?.etag == *version {
                    Ok(())
                } else {
                    Err(failure(verb, from, StoreErrorKind::Conflict, "another version is there"))
                }
            }
            _ => Ok(()),
        }
    }

    fn source(&self, key: &str) -> String {
        percent_encoded(&format!("{}/{key}", self.bucket))
    }
}

/// The headers `If-None-Match` and `If-Match` of a condition, where it is honoured.
fn conditions(condition: &Condition, honoured: bool) -> (Option<String>, Option<String>) {
    match condition {
        _ if !honoured => (None, None),
        Condition::None => (None, None),
        Condition::Absent => (Some("*".to_owned()), None),
        Condition::Is(etag) => (None, Some(etag.0.clone())),
    }
}

/// A write that was to replace a version which is gone says "no such key": that, too, is a conflict.
fn gone_is_conflict(mut error: StoreError, condition: &Condition) -> StoreError {
    if error.kind == StoreErrorKind::NotFound && matches!(condition, Condition::Is(_)) {
        error.kind = StoreErrorKind::Conflict;
    }
    error
}

fn local(verb: &str, key: &str, error: StoreError, trouble: &super::wire::Trouble) -> StoreError {
    match trouble.take() {
        Some(why) => failure(verb, key, StoreErrorKind::Local, format!("cannot read the local file: {why}")),
        None => error,
    }
}

fn time(time: Option<DateTime>) -> SystemTime {
    time.map_or(UNIX_EPOCH, |time| UNIX_EPOCH + Duration::from_secs(time.secs().max(0).unsigned_abs()))
}

fn size(size: Option<i64>) -> u64 {
    size.unwrap_or_default().max(0).unsigned_abs()
}

/// First byte and size of the whole, of `bytes 5-9/100`.
fn content_range(text: &str) -> Option<(u64, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, size.parse().ok()?))
}

/// A body whose length is checked, whatever the service says about its checksum.
fn stream(key: String, body: ByteStream, length: u64) -> Body {
    let step = |(key, body, left): (String, Option<ByteStream>, u64)| async move {
        let mut body = body?;
        match body.next().await {
            Some(Ok(piece)) if piece.len() as u64 <= left => {
                let left = left - piece.len() as u64;
                Some((Ok(piece), (key, Some(body), left)))
            }
            Some(Err(error)) => Some((Err(broken(&key, &error)), (key, None, left))),
            None if left == 0 => None,
            wrong => {
                let why =
                    if wrong.is_some() { "more bytes came than were announced" } else { "the body was too short" };
                Some((Err(failure("read", &key, StoreErrorKind::Corrupt, why)), (key, None, left)))
            }
        }
    };
    futures_util::stream::unfold((key, Some(body), length), step).boxed()
}

#[async_trait]
impl Store for S3 {
    fn abilities(&self) -> Abilities {
        self.abilities
    }

    async fn head(&self, key: &str) -> StoreResult<Head> {
        let head = self.asked(|| async {
            let call = self.client.head_object().bucket(&self.bucket).key(key);
            call.send().await.map_err(|error| failed("look at", key, &error))
        });
        let head = head.await?;
        Ok(Head {
            size: size(head.content_length),
            etag: etag(head.e_tag),
            modified: time(head.last_modified),
            metadata: metadata(head.content_type, head.metadata),
        })
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>, version: Option<&Etag>) -> StoreResult<(Head, Body)> {
        let empty = range.as_ref().is_some_and(Range::is_empty);
        let asked = range.as_ref().map(|range| match range.end {
            u64::MAX => format!("bytes={}-", range.start),
            end => format!("bytes={}-{}", range.start, end.saturating_sub(1)),
        });
        let mode = (self.checked && range.is_none()).then_some(ChecksumMode::Enabled);
        let got = self.asked(|| async {
            if empty {
                return Ok(None);
            }
            let call = self.client.get_object().bucket(&self.bucket).key(key).set_range(asked.clone());
            let call = call.set_if_match(version.map(|etag| etag.0.clone())).set_checksum_mode(mode.clone());
            match call.send().await {
                Ok(got) => Ok(Some(got)),
                // Past the end.
                Err(error) if error.raw_response().is_some_and(|raw| raw.status().as_u16() == 416) => Ok(None),
                Err(error) => Err(failed("read", key, &error)),
            }
        });
        let Some(got) = got.await? else {
            let head = self.head(key).await?;
            if version.is_some_and(|version| *version != head.etag) {
                return Err(failure("read", key, StoreErrorKind::Conflict, "another version is there"));
            }
            return Ok((head, futures_util::stream::empty().boxed()));
        };
        let length = size(got.content_length);
        let whole = match (&range, got.content_range.as_deref()) {
            (None, _) => length,
            (Some(range), Some(text)) => match content_range(text) {
                Some((first, whole)) if first == range.start => whole,
                _ => return Err(failure("read", key, StoreErrorKind::Corrupt, format!("the service sent {text}"))),
            },
            // The service has sent all of it, which is right only if that was asked for.
            (Some(range), None) if range.start == 0 && length <= range.end => length,
            (Some(_), None) => return Err(failure("read", key, StoreErrorKind::Unsupported, "no range was honoured")),
        };
        let head = Head {
            size: whole,
            etag: etag(got.e_tag),
            modified: time(got.last_modified),
            metadata: metadata(got.content_type, got.metadata),
        };
        Ok((head, stream(key.to_owned(), got.body, length)))
    }

    async fn put(&self, key: &str, payload: Payload, about: &Metadata, condition: &Condition) -> StoreResult<Etag> {
        let honoured = self.abilities.conditional_put;
        self.look("write", key, condition, honoured).await?;
        let (absent, is) = conditions(condition, honoured);
        let done = self.asked(|| async {
            let (body, trouble) = body(&payload);
            let call = self.client.put_object().bucket(&self.bucket).key(key).body(body);
            let call = call.content_length(payload.len().cast_signed()).set_checksum_algorithm(self.algorithm());
            let call = call.set_content_type(about.content_type.clone()).set_metadata(Some(headers(about)));
            let call = call.set_if_none_match(absent.clone()).set_if_match(is.clone()).customize();
            let call = if self.hashed { call } else { call.disable_payload_signing() };
            call.send().await.map_err(|error| local("write", key, failed("write", key, &error), &trouble))
        });
        Ok(etag(done.await.map_err(|error| gone_is_conflict(error, condition))?.e_tag))
    }

    async fn copy(
        &self,
        from: &str,
        version: Option<&Etag>,
        to: &str,
        about: Option<&Metadata>,
        condition: &Condition,
    ) -> StoreResult<Etag> {
        self.look_at_source("copy", from, version).await?;
        let honoured = self.abilities.conditional_copy;
        self.look("copy to", to, condition, honoured).await?;
        let (absent, is) = conditions(condition, honoured);
        let done = self.asked(|| async {
            let call = self.client.copy_object().bucket(&self.bucket).key(to).copy_source(self.source(from));
            let call = call.set_copy_source_if_match(version.map(|etag| etag.0.clone()));
            let call = match about {
                None => call.metadata_directive(MetadataDirective::Copy),
                Some(about) => call
                    .metadata_directive(MetadataDirective::Replace)
                    .set_content_type(about.content_type.clone())
                    .set_metadata(Some(headers(about))),
            };
            // The SDK has no names yet for conditions on the destination.
            let (absent, is) = (absent.clone(), is.clone());
            let call = call.customize().mutate_request(move |request: &mut HttpRequest| {
                for (name, value) in [("if-none-match", &absent), ("if-match", &is)] {
                    if let Some(value) = value {
                        request.headers_mut().insert(name, value.clone());
                    }
                }
            });
            call.send().await.map_err(|error| failed("copy to", to, &error))
        });
        Ok(etag(done.await?.copy_object_result.and_then(|result| result.e_tag)))
    }

    async fn delete(&self, key: &str, version: Option<&Etag>) -> StoreResult<()> {
        let honoured = self.abilities.conditional_delete;
        if let Some(version) = version
            && !honoured
        {
            match self.head(key).await {
                Ok(head) if head.etag == *version => {}
                Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(()),
                Ok(_) => return Err(failure("delete", key, StoreErrorKind::Conflict, "another version is there")),
                Err(error) => return Err(error),
            }
        }
        let version = version.filter(|_| honoured).map(|etag| etag.0.clone());
        let done = self.asked(|| async {
            let call = self.client.delete_object().bucket(&self.bucket).key(key).set_if_match(version.clone());
            match call.send().await.map_err(|error| failed("delete", key, &error)) {
                Err(error) if error.kind == StoreErrorKind::NotFound => Ok(()),
                done => done.map(|_| ()),
            }
        });
        done.await
    }

    async fn delete_many(&self, keys: &[String]) -> StoreResult<()> {
        super::many::delete(self, keys).await
    }

    async fn list(&self, request: &ListRequest) -> StoreResult<ListPage> {
        let prefix = &request.prefix;
        let (token, after) = match request.token.as_deref().map(|token| token.split_at_checked(1)) {
            Some(Some((BEHIND, folded))) => (None, Some(format!("{folded}{}", char::MAX))),
            Some(Some((_, token))) => (Some(token.to_owned()), None),
            _ => (None, request.after.clone()),
        };
        let (with, told) = (request.metadata && self.abilities.listed_metadata, told::Told::default());
        let odd = prefix.chars().any(is_beyond_xml);
        let page = self.asked(|| async {
            let call = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix);
            let call = call.set_delimiter(request.delimiter.then(|| "/".to_owned()));
            let call = call.encoding_type(EncodingType::Url).set_start_after(after.clone());
            let limit = request.limit.map(|limit| i32::try_from(limit).unwrap_or(1000));
            let call = call.set_continuation_token(token.clone()).set_max_keys(limit);
            let call = call.customize();
            let call = if with { call.mutate_request(told::ask).interceptor(told.clone()) } else { call };
            let call = if odd { call.interceptor(Legible) } else { call };
            call.send().await.map_err(|error| failed("list", prefix, &error))
        });
        let page = page.await?;
        let mut told = told.take();
        let encoded = page.encoding_type == Some(EncodingType::Url);
        if odd && !encoded {
            return Err(failure(
                "list",
                prefix,
                StoreErrorKind::Invalid,
                "the service does not encode keys in listings",
            ));
        }
        let decoded = |key: Option<String>| {
            let key = key.unwrap_or_default();
            if encoded { percent_decoded(&key).unwrap_or(key) } else { key }
        };
        let objects = page.contents.unwrap_or_default().into_iter().map(|object| Listed {
            metadata: object.key.as_ref().and_then(|key| told.remove(key)),
            key: decoded(object.key),
            size: size(object.size),
            etag: etag(object.e_tag),
            modified: time(object.last_modified),
        });
        let prefixes = page.common_prefixes.unwrap_or_default().into_iter().map(|folded| decoded(folded.prefix));
        let (objects, prefixes): (Vec<Listed>, Vec<String>) = (objects.collect(), prefixes.collect());
        let token = page.next_continuation_token.filter(|_| page.is_truncated == Some(true));
        let token = token.map(|token| match (objects.last(), prefixes.last()) {
            // MinIO leaves out what follows a page that ends with a folded prefix, if the prefix is an object, too.
            (last, Some(folded)) if last.is_none_or(|last| last.key < *folded) => format!("{BEHIND}{folded}"),
            _ => format!("={token}"),
        });
        Ok(ListPage { objects, prefixes, token })
    }

    async fn begin_upload(&self, key: &str, about: &Metadata) -> StoreResult<UploadId> {
        let begun = self.asked(|| async {
            let call = self.client.create_multipart_upload().bucket(&self.bucket).key(key);
            let call = call.set_content_type(about.content_type.clone()).set_metadata(Some(headers(about)));
            // No checksum is declared for the whole, since MinIO then refuses parts that are copied; each part that is sent
            // carries its own all the same.
            let none =
                aws_sdk_s3::Config::builder().request_checksum_calculation(RequestChecksumCalculation::WhenRequired);
            let call = call.customize().config_override(none);
            call.send().await.map_err(|error| failed("begin to write", key, &error))
        });
        match begun.await?.upload_id {
            Some(id) => Ok(UploadId(id)),
            None => Err(failure("begin to write", key, StoreErrorKind::Unavailable, "the service named no upload")),
        }
    }

    async fn upload_part(&self, key: &str, upload: &UploadId, number: u32, payload: Payload) -> StoreResult<Part> {
        let done = self.asked(|| async {
            let (body, trouble) = body(&payload);
            let call = self.client.upload_part().bucket(&self.bucket).key(key).upload_id(&upload.0);
            let call = call.part_number(number.cast_signed()).body(body).content_length(payload.len().cast_signed());
            let call = call.set_checksum_algorithm(self.algorithm()).customize();
            let call = if self.hashed { call } else { call.disable_payload_signing() };
            call.send()
                .await
                .map_err(|error| local("write a part of", key, failed("write a part of", key, &error), &trouble))
        });
        let done = done.await?;
        Ok(Part { number, etag: etag(done.e_tag), checksum: None })
    }

    async fn copy_part(
        &self,
        key: &str,
        upload: &UploadId,
        number: u32,
        from: &str,
        version: Option<&Etag>,
        range: Range<u64>,
    ) -> StoreResult<Part> {
        self.look_at_source("copy a part of", from, version).await?;
        let copied = self.asked(|| async {
            let call = self.client.upload_part_copy().bucket(&self.bucket).key(key).upload_id(&upload.0);
            let call = call.part_number(number.cast_signed()).copy_source(self.source(from));
            let call = call.copy_source_range(format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
            let call = call.set_copy_source_if_match(version.map(|etag| etag.0.clone()));
            // RGW 16.2 insists on the length of a body that there is none of.
            let call = call.customize().mutate_request(|request: &mut HttpRequest| {
                request.headers_mut().insert("content-length", "0");
            });
            call.send().await.map_err(|error| failed("copy a part of", key, &error))
        });
        match copied.await?.copy_part_result {
            Some(part) => Ok(Part { number, etag: etag(part.e_tag), checksum: None }),
            None => Err(failure("copy a part of", key, StoreErrorKind::Unavailable, "the service told no result")),
        }
    }

    async fn finish_upload(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> StoreResult<Etag> {
        let honoured = self.abilities.conditional_finish;
        self.look("finish", key, condition, honoured).await?;
        let (absent, is) = conditions(condition, honoured);
        let pieces = parts
            .iter()
            .map(|part| CompletedPart::builder().part_number(part.number.cast_signed()).e_tag(&part.etag.0).build());
        let list = CompletedMultipartUpload::builder().set_parts(Some(pieces.collect())).build();
        let done = self.asked(|| async {
            let call = self.client.complete_multipart_upload().bucket(&self.bucket).key(key).upload_id(&upload.0);
            let call = call.multipart_upload(list.clone()).set_if_none_match(absent.clone()).set_if_match(is.clone());
            match call.send().await {
                Ok(done) => Ok(done),
                // The key of the condition, not the upload.
                Err(error) if error.as_service_error().and_then(|error| error.code()) == Some("NoSuchKey") => {
                    Err(gone_is_conflict(failed("finish", key, &error), condition))
                }
                // RGW 16.2 says so of an upload that it does not know.
                Err(error) if error.raw_response().is_some_and(|raw| raw.status().as_u16() == 500) => {
                    let call = self.client.list_parts().bucket(&self.bucket).key(key).upload_id(&upload.0).max_parts(1);
                    let gone = call.send().await.map_err(|error| failed("finish", key, &error));
                    let gone = gone.err().filter(|gone| gone.kind == StoreErrorKind::NotFound);
                    Err(gone.unwrap_or_else(|| failed("finish", key, &error)))
                }
                Err(error) => Err(failed("finish", key, &error)),
            }
        });
        let told = done.await?.e_tag.filter(|etag| !etag.trim_matches('"').is_empty());
        match told {
            Some(told) => Ok(etag(Some(told))),
            // RGW 16.2 tells none.
            None => match etag_of(parts) {
                Some(etag) => Ok(etag),
                None => Ok(self.head(key).await?.etag),
            },
        }
    }

    async fn abort_upload(&self, key: &str, upload: &UploadId) -> StoreResult<()> {
        let done = self.asked(|| async {
            let call = self.client.abort_multipart_upload().bucket(&self.bucket).key(key).upload_id(&upload.0);
            match call.send().await.map_err(|error| failed("give up writing", key, &error)) {
                Err(error) if error.kind == StoreErrorKind::NotFound => Ok(()),
                done => done.map(|_| ()),
            }
        });
        done.await
    }

    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>> {
        super::many::uploads(self, prefix).await
    }
}
