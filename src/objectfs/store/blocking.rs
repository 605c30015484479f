//! Buckets for callers that block: the back end's calls have threads of their own, and know no runtime.
//!
//! Every call has a deadline of its own beside the store's patience. Connections are kept for a while, so that a list of
//! a hundred volumes does not shake hands a hundred times. Must not be called on a thread of the runtime.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use futures_util::StreamExt;
use tokio::runtime::Handle;

use super::{Condition, Etag, ListPage, ListRequest, Metadata, Payload, Store};
use super::{StoreError, StoreErrorKind, StoreResult, UploadId};
use crate::error::{Error, ErrorKind};
use crate::objectfs::settings::{Credentials, Endpoint};

/// A bucket as a thing, beside what is in it.
#[async_trait]
pub trait Place: Store {
    /// What its endpoint honours, tried out if need be.
    async fn able(&self) -> StoreResult<super::Abilities>;

    /// Is there such a bucket, and may we use it?
    async fn exists(&self) -> StoreResult<bool>;

    /// Makes it, or finds it among our own.
    ///
    /// # Errors
    /// `Conflict` when it is somebody else's.
    async fn ensure(&self) -> StoreResult<()>;

    /// Removes it. Not being there is success.
    ///
    /// # Errors
    /// `Conflict` when it is not empty.
    async fn remove(&self) -> StoreResult<()>;

    /// The names of the account's buckets.
    async fn siblings(&self) -> StoreResult<Vec<String>>;
}

/// Connects to a bucket, which need not exist.
#[async_trait]
pub trait Connect: Send + Sync + 'static {
    /// Asks nobody, or little. Credentials absent: the SDK's chain, or none where the endpoint is anonymous.
    async fn connect(
        &self,
        endpoint: &Endpoint,
        credentials: Option<&Credentials>,
        bucket: &str,
    ) -> StoreResult<Arc<dyn Place>>;
}

/// So many connections are kept,
const KEPT: usize = 32;
/// for so long: rotated keys and certificates are read again.
const FRESH: Duration = Duration::from_secs(300);

/// What a connection was made with. Holds credentials: never printed.
#[derive(PartialEq, Eq)]
struct Key {
    endpoint: Endpoint,
    credentials: Option<Credentials>,
    bucket: String,
}

/// A connection, what it was made with, and when.
type Kept = (Key, Instant, Arc<dyn Place>);

/// The way to all buckets.
pub struct Buckets {
    runtime: Handle,
    connect: Arc<dyn Connect>,
    deadline: Duration,
    kept: Mutex<Vec<Kept>>,
}

impl Buckets {
    /// Over this runtime; a call takes at most `deadline`.
    pub fn new(runtime: Handle, connect: Arc<dyn Connect>, deadline: Duration) -> Self {
        Self { runtime, connect, deadline, kept: Mutex::default() }
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// A bucket, which need not exist.
    ///
    /// # Errors
    /// `Invalid` when the endpoint can't be one; `Denied` when there are no credentials.
    pub fn open(&self, endpoint: &Endpoint, credentials: Option<&Credentials>, bucket: &str) -> StoreResult<Bucket> {
        let key = Key { endpoint: endpoint.clone(), credentials: credentials.cloned(), bucket: bucket.to_owned() };
        let known = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.retain(|(_, made, _)| made.elapsed() < FRESH);
            kept.iter().find(|(one, _, _)| *one == key).map(|(_, _, place)| place.clone())
        };
        let inner = match known {
            Some(known) => known,
            None => {
                let connecting = self.connect.connect(endpoint, credentials, bucket);
                let made = wait(&self.runtime, self.deadline, bucket, connecting)?;
                let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() >= KEPT {
                    kept.remove(0);
                }
                kept.push((key, Instant::now(), made.clone()));
                made
            }
        };
        Ok(Bucket { name: bucket.to_owned(), runtime: self.runtime.clone(), deadline: self.deadline, inner })
    }
}

fn wait<T>(
    runtime: &Handle,
    deadline: Duration,
    what: &str,
    call: impl Future<Output = StoreResult<T>>,
) -> StoreResult<T> {
    let unanswered = || StoreError {
        kind: StoreErrorKind::Unavailable,
        message: format!("cannot reach {what}: no answer within {deadline:?}"),
    };
    // Made inside of the runtime, whose clock it needs.
    runtime.block_on(async { tokio::time::timeout(deadline, call).await }).unwrap_or_else(|_| Err(unanswered()))
}

/// Notes are small: more than this is not one of ours.
const NOTE: usize = 1 << 20;

/// One bucket. Calls block.
#[derive(Clone)]
pub struct Bucket {
    name: String,
    runtime: Handle,
    deadline: Duration,
    inner: Arc<dyn Place>,
}

impl Bucket {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn wait<T>(&self, what: &str, call: impl Future<Output = StoreResult<T>>) -> StoreResult<T> {
        wait(&self.runtime, self.deadline, what, call)
    }

    /// What its endpoint honours, tried out if need be.
    pub fn able(&self) -> StoreResult<super::Abilities> {
        self.wait(&self.name, self.inner.able())
    }

    /// A small object as a whole, with its version. `None`: it is not there.
    pub fn read(&self, key: &str) -> StoreResult<Option<(Vec<u8>, Etag)>> {
        self.wait(key, async {
            let (head, mut body) = match self.inner.get(key, None, None).await {
                Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(None),
                result => result?,
            };
            let mut bytes = Vec::new();
            while let Some(piece) = body.next().await {
                bytes.extend_from_slice(&piece?);
                if bytes.len() > NOTE {
                    let message = format!("cannot read {key}: it is larger than any note");
                    return Err(StoreError { kind: StoreErrorKind::Invalid, message });
                }
            }
            Ok(Some((bytes, head.etag)))
        })
    }

    /// Writes a small object.
    pub fn write(&self, key: &str, bytes: Vec<u8>, condition: &Condition) -> StoreResult<Etag> {
        let metadata = Metadata { content_type: Some("application/json".to_owned()), ..Metadata::default() };
        self.wait(key, self.inner.put(key, Payload::Bytes(bytes.into()), &metadata, condition))
    }

    /// Deletes a key. Not being there is success.
    pub fn delete(&self, key: &str, version: Option<&Etag>) -> StoreResult<()> {
        self.wait(key, self.inner.delete(key, version))
    }

    /// Deletes many.
    pub fn delete_many(&self, keys: &[String]) -> StoreResult<()> {
        self.wait(&self.name, self.inner.delete_many(keys))
    }

    /// One page.
    pub fn list(&self, request: &ListRequest) -> StoreResult<ListPage> {
        self.wait(&self.name, self.inner.list(request))
    }

    /// Unfinished uploads below a prefix.
    pub fn uploads(&self, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>> {
        self.wait(&self.name, self.inner.list_uploads(prefix))
    }

    /// Gives one up.
    pub fn abort(&self, key: &str, upload: &UploadId) -> StoreResult<()> {
        self.wait(key, self.inner.abort_upload(key, upload))
    }

    /// Is there such a bucket, and may we use it?
    pub fn exists(&self) -> StoreResult<bool> {
        self.wait(&self.name, self.inner.exists())
    }

    /// Makes the bucket, or finds it among our own.
    pub fn ensure(&self) -> StoreResult<()> {
        self.wait(&self.name, self.inner.ensure())
    }

    /// Removes the bucket, which has to be empty.
    pub fn remove(&self) -> StoreResult<()> {
        self.wait(&self.name, self.inner.remove())
    }

    /// The names of the account's buckets.
    pub fn siblings(&self) -> StoreResult<Vec<String>> {
        self.wait(&self.name, self.inner.siblings())
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let kind = match error.kind {
            StoreErrorKind::NotFound => ErrorKind::NotFound,
            StoreErrorKind::NoBucket => ErrorKind::Precondition,
            // Somebody else was faster: the next call sees what they did.
            StoreErrorKind::Conflict => ErrorKind::Busy,
            StoreErrorKind::Denied => ErrorKind::Denied,
            StoreErrorKind::Invalid => ErrorKind::Invalid,
            StoreErrorKind::Unsupported => ErrorKind::Unsupported,
            StoreErrorKind::Unavailable => ErrorKind::Unreachable,
            StoreErrorKind::Corrupt | StoreErrorKind::Local => ErrorKind::Internal,
        };
        Self::new(kind, error.message)
    }
}
