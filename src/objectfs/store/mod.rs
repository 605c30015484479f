//! What objectfs and the s3 back end ask of an S3 service, and what it may answer.
//!
//! [`Store`] is one bucket. Keys are whole (nothing is prefixed here). Errors say what the caller can do about them;
//! whatever may go away by itself (throttling, 5xx, a reset connection) has been retried below this trait, with
//! back-off, for as long as [`Endpoint::patience`](super::settings::Endpoint) says.

pub mod blocking;
#[cfg(test)]
#[allow(dead_code, reason = "each layer's tests use a part of it")]
pub(crate) mod cloud;
#[cfg(test)]
#[allow(dead_code, reason = "each layer's tests use a part of it")]
pub(crate) mod double;

mod bucket;
mod connect;
#[cfg(test)]
mod contract;
pub mod embedded;
mod failure;
mod legible;
mod many;
pub mod patient;
pub mod places;
pub mod probe;
mod sdk;
pub mod services;
mod stall;
mod told;
mod wire;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

pub use sdk::{S3, connect};

use super::settings::{Credentials, Endpoint};

/// An entity tag with its quotes, as the service writes it. It is mostly the MD5 of the bytes: versions that differ only in
/// their metadata, or that have the same bytes again, share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Etag(pub String);

/// User metadata (without `x-amz-meta-`, lower case) and the content type.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Metadata {
    /// `Content-Type`. Absent: the service's default.
    pub content_type: Option<String>,
    /// `x-amz-meta-*`.
    pub user: BTreeMap<String, String>,
}

/// What a HEAD says.
#[derive(Clone, Debug)]
pub struct Head {
    /// Bytes of the whole object, also in the answer to a ranged GET.
    pub size: u64,
    /// Which version this is.
    pub etag: Etag,
    /// `Last-Modified`, whole seconds.
    pub modified: SystemTime,
    /// What was stored with it.
    pub metadata: Metadata,
}

/// A body in pieces as they come. A wrong checksum or a short body is an error in the stream, never a short stream.
pub type Body = BoxStream<'static, Result<Bytes, StoreError>>;

/// Bytes to send: replayable, since a call may have to be tried again.
#[derive(Clone, Debug)]
pub enum Payload {
    /// From memory.
    Bytes(Bytes),
    /// A range of a local file that nobody changes meanwhile; never in memory as a whole.
    File(Arc<File>, Range<u64>),
}

impl Payload {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, range) => range.end - range.start,
        }
    }

    /// Is there nothing to send?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What has to be true of the destination key for a write to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Whatever is there.
    None,
    /// Nothing is there (`If-None-Match: *`).
    Absent,
    /// This version is there (`If-Match`).
    Is(Etag),
}

/// One page of keys.
#[derive(Clone, Debug, Default)]
pub struct ListRequest {
    /// Only keys that begin so.
    pub prefix: String,
    /// Fold what lies below the next `/`.
    pub delimiter: bool,
    /// Begin behind this key.
    pub after: Option<String>,
    /// Go on from an earlier page.
    pub token: Option<String>,
    /// At most so many (1 to 1000); `None`: the service's own page.
    pub limit: Option<u32>,
    /// With metadata, where the service tells it ([`Abilities::listed_metadata`]).
    pub metadata: bool,
}

/// A key in a listing.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The whole key.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// Its version.
    pub etag: Etag,
    /// `Last-Modified`.
    pub modified: SystemTime,
    /// What was stored with it, if that was asked for and told.
    pub metadata: Option<Metadata>,
}

/// What a page holds.
#[derive(Clone, Debug, Default)]
pub struct ListPage {
    /// In the order of the bytes of their keys.
    pub objects: Vec<Listed>,
    /// Folded prefixes, each ending in `/`.
    pub prefixes: Vec<String>,
    /// Where the next page begins, if there is one.
    pub token: Option<String>,
}

/// A multipart upload that was begun.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UploadId(pub String);

/// An uploaded part.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Part {
    /// 1 to 10,000.
    pub number: u32,
    /// Its tag.
    pub etag: Etag,
    /// Its checksum, where the service wants it again at the end.
    pub checksum: Option<String>,
}

/// What an endpoint honours. Found out by trial (`probe`), never by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Abilities {
    /// `If-None-Match: *` and `If-Match` on PUT.
    pub conditional_put: bool,
    /// The same on CompleteMultipartUpload.
    pub conditional_finish: bool,
    /// `If-Match` on DELETE.
    pub conditional_delete: bool,
    /// `If-None-Match`/`If-Match` of the *destination* on CopyObject.
    pub conditional_copy: bool,
    /// Listings show metadata, as MinIO's do.
    pub listed_metadata: bool,
}

/// What went wrong, as the caller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// No such key, version or upload.
    NotFound,
    /// No such bucket.
    NoBucket,
    /// The condition was not met: somebody else changed the key (412, or 409 of a concurrent conditional write).
    Conflict,
    /// The credentials do not suffice, or have expired.
    Denied,
    /// The service will not have this: a name, a size, metadata that is too large.
    Invalid,
    /// The service has no such function.
    Unsupported,
    /// What came differs from its checksum or its length, again and again.
    Corrupt,
    /// The service did not answer, or answered 5xx or "slow down", for as long as patience lasted.
    Unavailable,
    /// The local file to be sent can't be read.
    Local,
}

/// A failed call: what was tried with which key, and what came of it. Holds no credentials.
#[derive(Clone, Debug)]
pub struct StoreError {
    /// What the caller can do.
    pub kind: StoreErrorKind,
    /// `cannot VERB KEY: cause`.
    pub message: String,
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for StoreError {}

/// What store calls return.
pub type StoreResult<T> = Result<T, StoreError>;

/// One bucket.
///
/// Where an endpoint lacks a condition ([`Abilities`]), the call looks (HEAD) right before it writes: that narrows the
/// gap between two nodes, and does not close it.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// What the endpoint honours.
    fn abilities(&self) -> Abilities;

    /// Looks at a key.
    async fn head(&self, key: &str) -> StoreResult<Head>;

    /// Reads a range (`None`: all; it may reach past the end), of this version if one is given (`Conflict` if it is
    /// gone). A range that begins at or past the end of the object gives an empty body with the right head.
    async fn get(&self, key: &str, range: Option<Range<u64>>, version: Option<&Etag>) -> StoreResult<(Head, Body)>;

    /// Writes a whole object.
    async fn put(&self, key: &str, payload: Payload, metadata: &Metadata, condition: &Condition) -> StoreResult<Etag>;

    /// Copies on the server, up to 5 GiB, this version if one is given (`Conflict` if it is gone); with other metadata if
    /// given. `from == to` with metadata replaces the metadata.
    async fn copy(
        &self,
        from: &str,
        version: Option<&Etag>,
        to: &str,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> StoreResult<Etag>;

    /// Deletes a key, only this version if one is given (`Conflict` if another is there). Not being there is success.
    async fn delete(&self, key: &str, version: Option<&Etag>) -> StoreResult<()>;

    /// Deletes many keys, in calls of up to 1,000. Not being there is success.
    async fn delete_many(&self, keys: &[String]) -> StoreResult<()>;

    /// One page.
    async fn list(&self, request: &ListRequest) -> StoreResult<ListPage>;

    /// Begins a multipart upload.
    async fn begin_upload(&self, key: &str, metadata: &Metadata) -> StoreResult<UploadId>;

    /// Uploads a part; again under the same number replaces it. At least 5 MiB, but for the last one.
    async fn upload_part(&self, key: &str, upload: &UploadId, number: u32, payload: Payload) -> StoreResult<Part>;

    /// Makes a part of a range of an object, on the server; of this version if one is given.
    async fn copy_part(
        &self,
        key: &str,
        upload: &UploadId,
        number: u32,
        from: &str,
        version: Option<&Etag>,
        range: Range<u64>,
    ) -> StoreResult<Part>;

    /// Makes the object of its parts, in the order of their numbers.
    async fn finish_upload(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> StoreResult<Etag>;

    /// Gives an upload up. Not being there is success.
    async fn abort_upload(&self, key: &str, upload: &UploadId) -> StoreResult<()>;

    /// Uploads that were begun below a prefix, with their keys and times. MinIO finds them only if the prefix is a whole key.
    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>>;
}

/// A bucket that is ready to be used.
pub struct Opened {
    /// The connection: for buckets as a whole, and for new credentials.
    pub s3: Arc<S3>,
    /// The calls, tried again for as long as the endpoint's patience, with the conditions that it honours.
    pub store: Arc<dyn Store>,
}

/// Reaches a bucket and finds out what its endpoint honours, unless nothing is to be written.
///
/// # Errors
/// The service stays away for as long as its patience; there is no such bucket.
pub async fn open(
    endpoint: &Endpoint,
    credentials: Option<&Credentials>,
    bucket: &str,
    read_only: bool,
) -> StoreResult<Opened> {
    let s3 = connect(endpoint, credentials, bucket).await?;
    let abilities = match read_only {
        true => probe::without_writing(&s3).await,
        false => patient::until(endpoint.patience(), || probe::probe(&s3)).await?,
    };
    let s3 = s3.honouring(abilities);
    let store = patient::Patient::new(s3.clone(), endpoint.patience());
    Ok(Opened { s3, store })
}
