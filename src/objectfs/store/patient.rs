//! A store that tries again: the one retry policy.
//!
//! What may go away by itself (`Unavailable`: refused or broken connections, stalls, 5xx, "slow down"; `Corrupt`: damaged on
//! its way) is tried again, with a growing and scattered pause, until it has been failing for the endpoint's patience. All
//! else is the answer.
//!
//! # Writes whose answer was lost
//!
//! An attempt that ended as `Unavailable` may have been carried out. Repeating it does no harm to calls without a condition.
//! One with a condition then meets its own work: `If-None-Match` finds the object that the first attempt made, `If-Match`
//! finds its version replaced, a finished upload is not known any more. So a refusal after such an attempt is believed only
//! after a look at what is there:
//!
//! - *put*: it is ours if it has our size, our metadata and our bytes, which are read back and compared. Should somebody else
//!   have written just that, the outcome is the one that was asked for; two nodes that create the same empty file at the same
//!   time are told apart by the mtime in nanoseconds in its metadata. No token is stored for this: files stay plain objects.
//! - *finish*: the etag of an object made of parts follows from the parts' etags (MD5 of their MD5s), and the object is ours if it
//!   has it. Where etags are no MD5s (encryption with keys of the bucket's owner), the refusal stands: the caller keeps its data.
//! - *copy*: ours if it has the size, and the metadata that it was to have, and either the etag of the source, or, for
//!   replaced metadata of one key, those alone.
//! - *delete* of a version: gone is what was wanted; another version there is a conflict, whoever removed the one before.
//!
//! # Bodies
//!
//! A body that breaks off goes on where it was, with a ranged read of the same version; the caller sees all bytes or an
//! error. Only a checksum that does not match at the end of a body can't be helped here, since its bytes are gone out already:
//! [`fetch`] holds them back and reads again.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use md5::{Digest, Md5};
use tokio::time::Instant;

use super::*;

/// The first pause; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause: a service that is back is noticed by then.
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// So often [`fetch`] reads what came damaged.
const FETCHES: usize = 4;

/// A store that tries again.
pub struct Patient {
    inner: Arc<dyn Store>,
    policy: Policy,
}

/// When to try again.
#[derive(Clone, Copy)]
struct Policy {
    patience: Duration,
    first: Duration,
    longest: Duration,
}

/// How long something has been failing, and when to try it again.
struct Pauses {
    until: Instant,
    pause: Duration,
    longest: Duration,
}

impl Pauses {
    fn new(policy: Policy) -> Self {
        Self { until: Instant::now() + policy.patience, pause: policy.first, longest: policy.longest }
    }

    /// Waits before the next attempt, or gives the error back: it is final, or patience is at its end.
    async fn after(&mut self, error: StoreError) -> StoreResult<()> {
        if !matches!(error.kind, StoreErrorKind::Unavailable | StoreErrorKind::Corrupt) || Instant::now() >= self.until
        {
            return Err(error);
        }
        tracing::debug!(%error, "trying again");
        // Somewhere in the upper half of the pause, so that many clients don't come back at once.
        let scatter = RandomState::new().hash_one(0_u8) % 1000;
        let pause = self.pause.mul_f64(0.5 + scatter as f64 / 2000.0);
        self.pause = (self.pause * 2).min(self.longest);
        tokio::time::sleep_until(self.until.min(Instant::now() + pause)).await;
        Ok(())
    }
}

/// Tries what may be repeated until it works or is refused, for as long as `patience`.
///
/// # Errors
/// The last one.
pub async fn until<T, F: Future<Output = StoreResult<T>>>(patience: Duration, call: impl Fn() -> F) -> StoreResult<T> {
    repeated(Policy { patience, first: FIRST_PAUSE, longest: LONGEST_PAUSE }, call).await
}

async fn repeated<T, F: Future<Output = StoreResult<T>>>(policy: Policy, call: impl Fn() -> F) -> StoreResult<T> {
    let mut pauses = Pauses::new(policy);
    loop {
        match call().await {
            Err(error) => pauses.after(error).await?,
            done => return done,
        }
    }
}

/// May the attempt have been carried out all the same?
fn is_lost(error: &StoreError) -> bool {
    error.kind == StoreErrorKind::Unavailable
}

impl Patient {
    /// Tries the calls of `inner` again for as long as `patience`.
    pub fn new(inner: Arc<dyn Store>, patience: Duration) -> Arc<Self> {
        let policy = Policy { patience, first: FIRST_PAUSE, longest: LONGEST_PAUSE };
        Arc::new(Self { inner, policy })
    }

    /// Calls that can be repeated whatever came of the attempt before.
    async fn again<T, F: Future<Output = StoreResult<T>>>(&self, call: impl Fn() -> F) -> StoreResult<T> {
        repeated(self.policy, call).await
    }

    /// Calls that may meet their own work. `ours` is asked after a refusal that follows a lost answer.
    async fn once<T, F, G>(&self, call: impl Fn() -> F, ours: impl Fn() -> G) -> StoreResult<T>
    where
        F: Future<Output = StoreResult<T>>,
        G: Future<Output = StoreResult<Option<T>>>,
    {
        let mut pauses = Pauses::new(self.policy);
        let mut lost = false;
        loop {
            match call().await {
                Err(error) if lost && matches!(error.kind, StoreErrorKind::Conflict | StoreErrorKind::NotFound) => {
                    return ours().await?.ok_or(error);
                }
                Err(error) => {
                    lost |= is_lost(&error);
                    pauses.after(error).await?;
                }
                done => return done,
            }
        }
    }

    /// What is there, if anything.
    async fn there(&self, key: &str) -> StoreResult<Option<Head>> {
        match self.head(key).await {
            Ok(head) => Ok(Some(head)),
            Err(error) if error.kind == StoreErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn is_ours(&self, key: &str, payload: &Payload, metadata: &Metadata) -> StoreResult<Option<Etag>> {
        let Some(head) = self.there(key).await? else { return Ok(None) };
        if head.size != payload.len() || !has(&head, metadata) {
            return Ok(None);
        }
        let mut body = match self.get(key, None, Some(&head.etag)).await {
            Ok((_, body)) => body,
            Err(error) if matches!(error.kind, StoreErrorKind::NotFound | StoreErrorKind::Conflict) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut offset = 0;
        while let Some(piece) = body.next().await {
            let piece = piece?;
            if !holds(payload, offset, &piece) {
                return Ok(None);
            }
            offset += piece.len() as u64;
        }
        Ok(Some(head.etag))
    }
}

/// Has the object this metadata? What was not said, the service may have chosen.
fn has(head: &Head, metadata: &Metadata) -> bool {
    head.metadata.user == metadata.user
        && (metadata.content_type.is_none() || metadata.content_type == head.metadata.content_type)
}

/// Does the payload have these bytes there?
fn holds(payload: &Payload, offset: u64, piece: &Bytes) -> bool {
    let end = offset + piece.len() as u64;
    if end > payload.len() {
        return false;
    }
    match payload {
        Payload::Bytes(bytes) => bytes[offset as usize..end as usize] == piece[..],
        Payload::File(file, range) => {
            let mut own = vec![0; piece.len()];
            file.read_exact_at(&mut own, range.start + offset).is_ok() && own == piece[..]
        }
    }
}

/// The etag that an object made of these parts has, if theirs are MD5s.
fn etag_of(parts: &[Part]) -> Option<Etag> {
    let mut sum = Md5::new();
    for part in parts {
        let text = part.etag.0.trim_matches('"');
        if text.len() != 32 || !text.is_ascii() {
            return None;
        }
        for at in (0..32).step_by(2) {
            sum.update([u8::from_str_radix(&text[at..at + 2], 16).ok()?]);
        }
    }
    let hex: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Some(Etag(format!("\"{hex}-{}\"", parts.len())))
}

/// What a body needs to go on after it broke off.
struct Resumed {
    inner: Arc<dyn Store>,
    policy: Policy,
    key: String,
    version: Etag,
    /// What is still to come.
    range: Range<u64>,
    body: Option<Body>,
}

impl Resumed {
    /// The next piece; failing that, for as long as patience lasts, a new body from there on.
    async fn next(&mut self) -> Option<StoreResult<Bytes>> {
        let mut pauses = None;
        loop {
            let error = match self.body.as_mut()?.next().await {
                Some(Ok(piece)) => {
                    self.range.start += piece.len() as u64;
                    return Some(Ok(piece));
                }
                None if self.range.is_empty() => return None,
                None => StoreError {
                    kind: StoreErrorKind::Corrupt,
                    message: format!("cannot read {}: the body was too short", self.key),
                },
                // Nothing is left to read, so it is the checksum that is wrong.
                Some(Err(error)) if self.range.is_empty() => {
                    self.body = None;
                    return Some(Err(error));
                }
                Some(Err(error)) => error,
            };
            let pauses = pauses.get_or_insert_with(|| Pauses::new(self.policy));
            if let Err(error) = self.reopen(pauses, error).await {
                self.body = None;
                return Some(Err(error));
            }
        }
    }

    async fn reopen(&mut self, pauses: &mut Pauses, mut error: StoreError) -> StoreResult<()> {
        loop {
            pauses.after(error).await?;
            match self.inner.get(&self.key, Some(self.range.clone()), Some(&self.version)).await {
                Ok((_, body)) => {
                    self.body = Some(body);
                    return Ok(());
                }
                Err(next) => error = next,
            }
        }
    }
}

/// Reads a range into memory; what came damaged is read again.
///
/// # Errors
/// `Corrupt`: it is damaged each time.
pub async fn fetch(
    store: &dyn Store,
    key: &str,
    range: Option<Range<u64>>,
    version: Option<&Etag>,
) -> StoreResult<(Head, Bytes)> {
    let mut left = FETCHES;
    loop {
        left -= 1;
        match whole(store, key, range.clone(), version).await {
            Err(error) if error.kind == StoreErrorKind::Corrupt && left > 0 => {
                tracing::warn!(%error, "reading again");
            }
            result => return result,
        }
    }
}

async fn whole(
    store: &dyn Store,
    key: &str,
    range: Option<Range<u64>>,
    version: Option<&Etag>,
) -> StoreResult<(Head, Bytes)> {
    let (head, mut body) = store.get(key, range, version).await?;
    let Some(first) = body.next().await.transpose()? else { return Ok((head, Bytes::new())) };
    let Some(second) = body.next().await.transpose()? else { return Ok((head, first)) };
    let mut bytes = BytesMut::from(first);
    bytes.extend_from_slice(&second);
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok((head, bytes.freeze()))
}

#[async_trait]
impl Store for Patient {
    fn abilities(&self) -> Abilities {
        self.inner.abilities()
    }

    async fn head(&self, key: &str) -> StoreResult<Head> {
        self.again(|| self.inner.head(key)).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>, version: Option<&Etag>) -> StoreResult<(Head, Body)> {
        let (head, body) = self.again(|| self.inner.get(key, range.clone(), version)).await?;
        let range = range.unwrap_or(0..head.size);
        let end = range.end.min(head.size);
        let resumed = Resumed {
            inner: self.inner.clone(),
            policy: self.policy,
            key: key.to_owned(),
            version: head.etag.clone(),
            range: range.start.min(end)..end,
            body: Some(body),
        };
        let pieces = futures_util::stream::unfold(resumed, |mut resumed| async move {
            let piece = resumed.next().await?;
            Some((piece, resumed))
        });
        Ok((head, pieces.boxed()))
    }

    async fn put(&self, key: &str, payload: Payload, metadata: &Metadata, condition: &Condition) -> StoreResult<Etag> {
        let call = || self.inner.put(key, payload.clone(), metadata, condition);
        match condition {
            Condition::None => self.again(call).await,
            _ => self.once(call, || self.is_ours(key, &payload, metadata)).await,
        }
    }

    async fn copy(
        &self,
        from: &str,
        version: Option<&Etag>,
        to: &str,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> StoreResult<Etag> {
        let call = || self.inner.copy(from, version, to, metadata, condition);
        let ours = || async {
            let (Some(source), Some(head)) = (self.there(from).await?, self.there(to).await?) else { return Ok(None) };
            let wanted = metadata.unwrap_or(&source.metadata);
            let same = head.size == source.size && has(&head, wanted);
            let made = from == to && metadata.is_some();
            Ok((same && (made || head.etag == source.etag)).then_some(head.etag))
        };
        self.once(call, ours).await
    }

    async fn delete(&self, key: &str, version: Option<&Etag>) -> StoreResult<()> {
        self.again(|| self.inner.delete(key, version)).await
    }

    async fn delete_many(&self, keys: &[String]) -> StoreResult<()> {
        self.again(|| self.inner.delete_many(keys)).await
    }

    async fn list(&self, request: &ListRequest) -> StoreResult<ListPage> {
        self.again(|| self.inner.list(request)).await
    }

    async fn begin_upload(&self, key: &str, metadata: &Metadata) -> StoreResult<UploadId> {
        // One whose answer was lost stays begun, as after a crash, until somebody lists uploads and gives it up.
        self.again(|| self.inner.begin_upload(key, metadata)).await
    }

    async fn upload_part(&self, key: &str, upload: &UploadId, number: u32, payload: Payload) -> StoreResult<Part> {
        self.again(|| self.inner.upload_part(key, upload, number, payload.clone())).await
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
        self.again(|| self.inner.copy_part(key, upload, number, from, version, range.clone())).await
    }

    async fn finish_upload(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> StoreResult<Etag> {
        let ours = || async {
            let Some(wanted) = etag_of(parts) else { return Ok(None) };
            Ok(self.there(key).await?.map(|head| head.etag).filter(|etag| *etag == wanted))
        };
        self.once(|| self.inner.finish_upload(key, upload, parts, condition), ours).await
    }

    async fn abort_upload(&self, key: &str, upload: &UploadId) -> StoreResult<()> {
        self.again(|| self.inner.abort_upload(key, upload)).await
    }

    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>> {
        self.again(|| self.inner.list_uploads(prefix)).await
    }
}

#[cfg(test)]
#[path = "patient_tests.rs"]
mod tests;
