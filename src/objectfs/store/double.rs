//! A bucket in memory for tests, with faults to order and a log of the calls.
//!
//! It does what S3 does, also where that is inconvenient: an etag is the MD5 of the bytes (of the parts' MD5s for a
//! multipart upload), so replacing only an object's metadata, or writing the same bytes again, leaves the etag as it was;
//! `modified` has whole seconds; a part below 5 MiB that is not the last is refused when the upload is finished.
//! It never waits by itself, and never retries.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use md5::{Digest, Md5};
use tokio::sync::watch;

use super::*;

/// What an ordered fault does.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The call is not carried out and fails so.
    Fails(StoreErrorKind),
    /// The call is carried out, but its answer is lost: `Unavailable`.
    AnswerLost,
    /// The call waits so long first, and is carried out then.
    Slow(Duration),
    /// A body ends with `Corrupt` after so many bytes.
    Truncated(usize),
}

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    metadata: Metadata,
    etag: Etag,
    modified: SystemTime,
}

struct Upload {
    key: String,
    metadata: Metadata,
    begun: SystemTime,
    parts: BTreeMap<u32, (Bytes, Etag)>,
}

struct Order {
    /// `*` for each verb.
    verb: String,
    /// Calls that are still let through.
    skip: usize,
    /// Calls that it still strikes.
    times: usize,
    fault: Fault,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, Upload>,
    counter: u64,
    orders: Vec<Order>,
    calls: Vec<(String, String)>,
}

/// A bucket in memory. Verbs are the names of [`Store`]'s methods.
pub(crate) struct Double {
    state: Mutex<State>,
    settings: Mutex<(Abilities, usize, u64)>,
    frozen: watch::Sender<bool>,
}

/// Everything conditional works.
pub(crate) const ABLE: Abilities = Abilities {
    conditional_put: true,
    conditional_finish: true,
    conditional_delete: true,
    conditional_copy: true,
    listed_metadata: false,
};

fn fail<T>(verb: &str, key: &str, kind: StoreErrorKind) -> StoreResult<T> {
    Err(StoreError { kind, message: format!("cannot {verb} {key}: {kind:?} (double)") })
}

fn hash(bytes: &[u8]) -> Vec<u8> {
    Md5::digest(bytes).to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now() -> SystemTime {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn bytes_of(payload: &Payload) -> StoreResult<Bytes> {
    match payload {
        Payload::Bytes(bytes) => Ok(bytes.clone()),
        Payload::File(file, range) => {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            let read = file.read_exact_at(&mut bytes, range.start);
            read.map_err(|error| StoreError { kind: StoreErrorKind::Local, message: format!("cannot read: {error}") })?;
            Ok(bytes.into())
        }
    }
}

impl Double {
    /// An empty bucket that can do everything.
    pub(crate) fn new() -> Arc<Self> {
        let settings = Mutex::new((ABLE, 1000, 5 << 20));
        Arc::new(Self { state: Mutex::default(), settings, frozen: watch::Sender::new(false) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> MutexGuard<'_, (Abilities, usize, u64)> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Each call of this verb (`*`: of any) fails so, until [`Self::heal`].
    pub(crate) fn fail(&self, verb: &str, kind: StoreErrorKind) {
        self.order(verb, 0, usize::MAX, Fault::Fails(kind));
    }

    /// The `nth` call from now on (1 is the next one) of this verb fails so, and no other.
    pub(crate) fn fail_nth(&self, verb: &str, nth: usize, kind: StoreErrorKind) {
        self.order(verb, nth - 1, 1, Fault::Fails(kind));
    }

    /// After `skip` calls of this verb the next `times` meet the fault. The first order that strikes a call counts.
    pub(crate) fn order(&self, verb: &str, skip: usize, times: usize, fault: Fault) {
        self.state().orders.push(Order { verb: verb.to_owned(), skip, times, fault });
    }

    /// Withdraws all faults that were ordered.
    pub(crate) fn heal(&self) {
        self.state().orders.clear();
    }

    /// The service is gone: calls wait until [`Self::thaw`].
    pub(crate) fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    /// The service is back.
    pub(crate) fn thaw(&self) {
        self.frozen.send_replace(false);
    }

    /// What the bucket is to honour from now on.
    pub(crate) fn set_abilities(&self, abilities: Abilities) {
        self.settings().0 = abilities;
    }

    /// Pages of a listing hold at most so many entries (1,000).
    pub(crate) fn set_page(&self, entries: usize) {
        self.settings().1 = entries;
    }

    /// The least size of a part that is not the last one (5 MiB).
    pub(crate) fn set_least_part(&self, bytes: u64) {
        self.settings().2 = bytes;
    }

    /// All calls since the beginning or [`Self::forget_calls`]: verb and key (the prefix of a listing, the destination
    /// of a copy, the number of keys of `delete_many`).
    pub(crate) fn calls(&self) -> Vec<(String, String)> {
        self.state().calls.clone()
    }

    /// How many of them were of this verb.
    pub(crate) fn count(&self, verb: &str) -> usize {
        self.state().calls.iter().filter(|call| call.0 == verb).count()
    }

    /// Begins the log anew.
    pub(crate) fn forget_calls(&self) {
        self.state().calls.clear();
    }

    /// What is stored under a key.
    pub(crate) fn object(&self, key: &str) -> Option<(Bytes, Metadata)> {
        self.state().objects.get(key).map(|object| (object.bytes.clone(), object.metadata.clone()))
    }

    /// The version under a key.
    pub(crate) fn etag(&self, key: &str) -> Option<Etag> {
        self.state().objects.get(key).map(|object| object.etag.clone())
    }

    /// All keys, in order.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.state().objects.keys().cloned().collect()
    }

    /// Keys of uploads that were begun and neither finished nor given up.
    pub(crate) fn uploads(&self) -> Vec<String> {
        self.state().uploads.values().map(|upload| upload.key.clone()).collect()
    }

    /// Stores behind everybody's back: no fault, no log.
    pub(crate) fn put_raw(&self, key: &str, bytes: impl Into<Bytes>, metadata: Metadata) -> Etag {
        let bytes = bytes.into();
        let etag = Etag(format!("\"{}\"", hex(&hash(&bytes))));
        let object = Object { bytes, metadata, etag: etag.clone(), modified: now() };
        self.state().objects.insert(key.to_owned(), object);
        etag
    }

    /// Sets a `Last-Modified`.
    pub(crate) fn set_modified(&self, key: &str, modified: SystemTime) {
        if let Some(object) = self.state().objects.get_mut(key) {
            object.modified = modified;
        }
    }

    /// Deletes behind everybody's back.
    pub(crate) fn delete_raw(&self, key: &str) {
        self.state().objects.remove(key);
    }

    /// Logs the call, waits while frozen, meets the faults. What it returns is to be done when the call was carried out.
    async fn enter(&self, verb: &str, key: &str) -> StoreResult<Option<Fault>> {
        let fault = {
            let mut state = self.state();
            state.calls.push((verb.to_owned(), key.to_owned()));
            let mut found = None;
            for order in state.orders.iter_mut().filter(|order| order.verb == "*" || order.verb == verb) {
                if order.skip > 0 {
                    order.skip -= 1;
                } else if order.times > 0 && found.is_none() {
                    order.times -= 1;
                    found = Some(order.fault.clone());
                }
            }
            found
        };
        let mut frozen = self.frozen.subscribe();
        let _ = frozen.wait_for(|frozen| !frozen).await;
        match fault {
            Some(Fault::Fails(kind)) => fail(verb, key, kind),
            Some(Fault::Slow(time)) => {
                tokio::time::sleep(time).await;
                Ok(None)
            }
            other => Ok(other),
        }
    }
}

/// The answer of a call that was carried out, unless it is to be lost.
fn leave<T>(verb: &str, key: &str, fault: Option<Fault>, answer: T) -> StoreResult<T> {
    match fault {
        Some(Fault::AnswerLost) => fail(verb, key, StoreErrorKind::Unavailable),
        _ => Ok(answer),
    }
}

impl State {
    fn check(&self, verb: &str, key: &str, condition: &Condition) -> StoreResult<()> {
        let there = self.objects.get(key).map(|object| &object.etag);
        match (condition, there) {
            (Condition::None, _) | (Condition::Absent, None) => Ok(()),
            (Condition::Is(wanted), Some(etag)) if wanted == etag => Ok(()),
            _ => fail(verb, key, StoreErrorKind::Conflict),
        }
    }

    /// The object, if it is there and of the version.
    fn find(&self, verb: &str, key: &str, version: Option<&Etag>) -> StoreResult<Object> {
        match (self.objects.get(key), version) {
            (None, _) => fail(verb, key, StoreErrorKind::NotFound),
            (Some(object), Some(version)) if object.etag != *version => fail(verb, key, StoreErrorKind::Conflict),
            (Some(object), _) => Ok(object.clone()),
        }
    }

    fn upload(&mut self, verb: &str, key: &str, upload: &UploadId) -> StoreResult<&mut Upload> {
        match self.uploads.get_mut(&upload.0) {
            Some(found) if found.key == key => Ok(found),
            _ => fail(verb, key, StoreErrorKind::NotFound),
        }
    }

    fn add_part(&mut self, verb: &str, key: &str, id: &UploadId, number: u32, bytes: Bytes) -> StoreResult<Part> {
        let upload = self.upload(verb, key, id)?;
        if !(1..=10_000).contains(&number) {
            return fail(verb, key, StoreErrorKind::Invalid);
        }
        let etag = Etag(format!("\"{}\"", hex(&hash(&bytes))));
        upload.parts.insert(number, (bytes, etag.clone()));
        Ok(Part { number, etag, checksum: None })
    }
}

fn head_of(object: &Object) -> Head {
    Head {
        size: object.bytes.len() as u64,
        etag: object.etag.clone(),
        modified: object.modified,
        metadata: object.metadata.clone(),
    }
}

/// The part of the bytes that a range covers.
fn cut(bytes: &Bytes, range: Option<Range<u64>>) -> Bytes {
    let size = bytes.len() as u64;
    let range = range.unwrap_or(0..size);
    let start = range.start.min(size);
    bytes.slice(start as usize..range.end.clamp(start, size) as usize)
}

#[async_trait]
impl Store for Double {
    fn abilities(&self) -> Abilities {
        self.settings().0
    }

    async fn head(&self, key: &str) -> StoreResult<Head> {
        let fault = self.enter("head", key).await?;
        let object = self.state().find("head", key, None)?;
        leave("head", key, fault, head_of(&object))
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>, version: Option<&Etag>) -> StoreResult<(Head, Body)> {
        let fault = self.enter("get", key).await?;
        let object = self.state().find("get", key, version)?;
        let bytes = cut(&object.bytes, range);
        let mut pieces: Vec<StoreResult<Bytes>> = Vec::new();
        let good = match fault {
            Some(Fault::Truncated(good)) => good.min(bytes.len()),
            _ => bytes.len(),
        };
        for start in (0..good).step_by(64 << 10) {
            pieces.push(Ok(bytes.slice(start..good.min(start + (64 << 10)))));
        }
        if matches!(fault, Some(Fault::Truncated(_))) {
            pieces.push(fail("get", key, StoreErrorKind::Corrupt));
        }
        leave("get", key, fault, (head_of(&object), futures_util::stream::iter(pieces).boxed()))
    }

    async fn put(&self, key: &str, payload: Payload, metadata: &Metadata, condition: &Condition) -> StoreResult<Etag> {
        let fault = self.enter("put", key).await?;
        let bytes = bytes_of(&payload)?;
        if key.is_empty() || key.len() > 1024 {
            return fail("put", key, StoreErrorKind::Invalid);
        }
        self.state().check("put", key, condition)?;
        leave("put", key, fault, self.put_raw(key, bytes, metadata.clone()))
    }

    async fn copy(
        &self,
        from: &str,
        version: Option<&Etag>,
        to: &str,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> StoreResult<Etag> {
        let fault = self.enter("copy", to).await?;
        let mut state = self.state();
        let mut object = state.find("copy", from, version)?;
        if object.bytes.len() as u64 > 5 << 30 || (from == to && metadata.is_none()) || to.len() > 1024 {
            return fail("copy", to, StoreErrorKind::Invalid);
        }
        state.check("copy", to, condition)?;
        if let Some(metadata) = metadata {
            object.metadata = metadata.clone();
        }
        // A copy is one piece, also of what came in parts.
        object.etag = Etag(format!("\"{}\"", hex(&hash(&object.bytes))));
        object.modified = now();
        let etag = object.etag.clone();
        state.objects.insert(to.to_owned(), object);
        leave("copy", to, fault, etag)
    }

    async fn delete(&self, key: &str, version: Option<&Etag>) -> StoreResult<()> {
        let fault = self.enter("delete", key).await?;
        let mut state = self.state();
        if let Some(version) = version
            && state.objects.contains_key(key)
        {
            state.check("delete", key, &Condition::Is(version.clone()))?;
        }
        state.objects.remove(key);
        leave("delete", key, fault, ())
    }

    async fn delete_many(&self, keys: &[String]) -> StoreResult<()> {
        let count = keys.len().to_string();
        let fault = self.enter("delete_many", &count).await?;
        let mut state = self.state();
        for key in keys {
            state.objects.remove(key);
        }
        leave("delete_many", &count, fault, ())
    }

    async fn list(&self, request: &ListRequest) -> StoreResult<ListPage> {
        let prefix = &request.prefix;
        let fault = self.enter("list", prefix).await?;
        let limit = request.limit.map_or(usize::MAX, |limit| limit as usize).min(self.settings().1);
        let state = self.state();
        let after = request.token.as_ref().or(request.after.as_ref());
        let start = after.map_or(Bound::Included(prefix), |after| Bound::Excluded(after.max(prefix)));
        let start = if after.is_some_and(|after| after < prefix) { Bound::Included(prefix) } else { start };
        let mut page = ListPage::default();
        let mut last = None;
        for (key, object) in state.objects.range::<String, _>((start, Bound::Unbounded)) {
            let Some(rest) = key.strip_prefix(prefix.as_str()) else { break };
            let folded = rest.find('/').filter(|_| request.delimiter).map(|end| &key[..prefix.len() + end + 1]);
            if let Some(folded) = folded
                && (page.prefixes.last().is_some_and(|last| last == folded)
                    || request
                        .token
                        .as_ref()
                        .is_some_and(|token| token.as_str() >= folded && token.starts_with(folded)))
            {
                continue;
            }
            if page.objects.len() + page.prefixes.len() == limit {
                page.token = last;
                break;
            }
            match folded {
                Some(folded) => {
                    page.prefixes.push(folded.to_owned());
                    last = Some(folded.to_owned());
                }
                None => {
                    page.objects.push(Listed {
                        key: key.clone(),
                        size: object.bytes.len() as u64,
                        etag: object.etag.clone(),
                        modified: object.modified,
                        metadata: None,
                    });
                    last = Some(key.clone());
                }
            }
        }
        drop(state);
        leave("list", prefix, fault, page)
    }

    async fn begin_upload(&self, key: &str, metadata: &Metadata) -> StoreResult<UploadId> {
        let fault = self.enter("begin_upload", key).await?;
        let mut state = self.state();
        state.counter += 1;
        let id = format!("upload-{}", state.counter);
        let upload =
            Upload { key: key.to_owned(), metadata: metadata.clone(), begun: now(), parts: BTreeMap::default() };
        state.uploads.insert(id.clone(), upload);
        leave("begin_upload", key, fault, UploadId(id))
    }

    async fn upload_part(&self, key: &str, upload: &UploadId, number: u32, payload: Payload) -> StoreResult<Part> {
        let fault = self.enter("upload_part", key).await?;
        let part = self.state().add_part("upload_part", key, upload, number, bytes_of(&payload)?)?;
        leave("upload_part", key, fault, part)
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
        let fault = self.enter("copy_part", key).await?;
        let mut state = self.state();
        let source = state.find("copy_part", from, version)?;
        if range.is_empty() || range.end > source.bytes.len() as u64 || range.end - range.start > 5 << 30 {
            return fail("copy_part", key, StoreErrorKind::Invalid);
        }
        let part = state.add_part("copy_part", key, upload, number, cut(&source.bytes, Some(range)))?;
        leave("copy_part", key, fault, part)
    }

    async fn finish_upload(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> StoreResult<Etag> {
        let fault = self.enter("finish_upload", key).await?;
        let least = self.settings().2;
        let mut state = self.state();
        state.upload("finish_upload", key, upload)?;
        state.check("finish_upload", key, condition)?;
        let found = state.upload("finish_upload", key, upload)?;
        let (mut bytes, mut hashes) = (Vec::new(), Vec::new());
        for (index, part) in parts.iter().enumerate() {
            let in_order = index == 0 || parts[index - 1].number < part.number;
            match found.parts.get(&part.number) {
                Some((piece, etag)) if *etag == part.etag && in_order => {
                    if index + 1 < parts.len() && (piece.len() as u64) < least {
                        return fail("finish_upload", key, StoreErrorKind::Invalid);
                    }
                    bytes.extend_from_slice(piece);
                    hashes.extend(hash(piece));
                }
                _ => return fail("finish_upload", key, StoreErrorKind::Invalid),
            }
        }
        if parts.is_empty() {
            return fail("finish_upload", key, StoreErrorKind::Invalid);
        }
        let etag = Etag(format!("\"{}-{}\"", hex(&hash(&hashes)), parts.len()));
        let metadata = found.metadata.clone();
        state.uploads.remove(&upload.0);
        let object = Object { bytes: bytes.into(), metadata, etag: etag.clone(), modified: now() };
        state.objects.insert(key.to_owned(), object);
        leave("finish_upload", key, fault, etag)
    }

    async fn abort_upload(&self, key: &str, upload: &UploadId) -> StoreResult<()> {
        let fault = self.enter("abort_upload", key).await?;
        self.state().uploads.remove(&upload.0);
        leave("abort_upload", key, fault, ())
    }

    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>> {
        let fault = self.enter("list_uploads", prefix).await?;
        let state = self.state();
        let below = state.uploads.iter().filter(|(_, upload)| upload.key.starts_with(prefix));
        let found = below.map(|(id, upload)| (upload.key.clone(), UploadId(id.clone()), upload.begun)).collect();
        leave("list_uploads", prefix, fault, found)
    }
}

#[cfg(test)]
mod tests {
    use super::super::contract;
    use super::super::patient::Patient;
    use super::*;

    #[tokio::test]
    async fn the_contract_holds() {
        contract::holds(&*Double::new()).await;
    }

    #[tokio::test]
    async fn the_contract_holds_with_patience() {
        contract::holds(&*Patient::new(Double::new(), Duration::from_secs(1))).await;
    }

    #[tokio::test]
    async fn a_lost_answer_is_of_a_call_that_was_carried_out() {
        let double = Double::new();
        double.order("put", 1, 1, Fault::AnswerLost);
        let none = Metadata::default();
        double.put("a", Payload::Bytes("1".into()), &none, &Condition::Absent).await.unwrap();
        let lost = double.put("b", Payload::Bytes("2".into()), &none, &Condition::Absent).await.unwrap_err();
        assert_eq!(lost.kind, StoreErrorKind::Unavailable);
        assert_eq!(double.object("b").unwrap().0, "2");
        assert_eq!(double.count("put"), 2);
    }

    #[tokio::test]
    async fn a_frozen_service_goes_on_where_it_was() {
        let double = Double::new();
        double.freeze();
        let other = double.clone();
        let waiting = tokio::spawn(async move { other.head("a").await.unwrap_err().kind });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        double.thaw();
        assert_eq!(waiting.await.unwrap(), StoreErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_truncated_body_says_so() {
        let double = Double::new();
        double.put_raw("a", "0123456789", Metadata::default());
        double.order("get", 0, 1, Fault::Truncated(4));
        let (head, mut body) = double.get("a", None, None).await.unwrap();
        assert_eq!(head.size, 10);
        assert_eq!(body.next().await.unwrap().unwrap(), "0123");
        assert_eq!(body.next().await.unwrap().unwrap_err().kind, StoreErrorKind::Corrupt);
    }
}
