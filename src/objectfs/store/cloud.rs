//! A service in memory for tests: buckets that are [`Double`]s, and a driver that dies before, or right after, any call.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::runtime::Runtime;

use super::blocking::{Buckets, Connect, Place};
use super::double::{ABLE, Double};
use super::*;
use crate::objectfs::settings::{Credentials, Endpoint};

/// When the driver dies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Death {
    /// So many calls are carried out, and none after them.
    Before(usize),
    /// The same, but the last one's answer is not heard.
    After(usize),
}

#[derive(Default)]
struct State {
    buckets: BTreeMap<String, Arc<Double>>,
    calls: usize,
    death: Option<Death>,
}

/// A service.
pub(crate) struct Cloud {
    runtime: Runtime,
    state: Arc<Mutex<State>>,
}

/// The way to it.
struct Entrance(Arc<Mutex<State>>);

/// A bucket of it, which may not exist.
struct Plot {
    name: String,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn error<T>(kind: StoreErrorKind, what: &str) -> StoreResult<T> {
    Err(StoreError { kind, message: format!("{what}: {kind:?} (double)") })
}

impl Cloud {
    pub(crate) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { runtime, state: Arc::default() }
    }

    pub(crate) fn buckets(&self) -> Buckets {
        let entrance = Arc::new(Entrance(self.state.clone()));
        Buckets::new(self.runtime.handle().clone(), entrance, Duration::from_secs(10))
    }

    /// For tests that know no runtime.
    pub(crate) fn wait<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }

    /// Makes a bucket by hand.
    pub(crate) fn make(&self, name: &str) -> Arc<Double> {
        lock(&self.state).buckets.entry(name.to_owned()).or_insert_with(Double::new).clone()
    }

    pub(crate) fn bucket(&self, name: &str) -> Option<Arc<Double>> {
        lock(&self.state).buckets.get(name).cloned()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        lock(&self.state).buckets.keys().cloned().collect()
    }

    /// Counted from now on.
    pub(crate) fn die(&self, death: Option<Death>) {
        let mut state = lock(&self.state);
        (state.death, state.calls) = (death, 0);
    }

    /// How many calls there were since.
    pub(crate) fn calls(&self) -> usize {
        lock(&self.state).calls
    }
}

#[async_trait]
impl Connect for Entrance {
    async fn connect(&self, _: &Endpoint, _: Option<&Credentials>, bucket: &str) -> StoreResult<Arc<dyn Place>> {
        Ok(Arc::new(Plot { name: bucket.to_owned(), state: self.0.clone() }))
    }
}

impl Plot {
    /// Is this call carried out, and is its answer heard?
    fn enter(&self, verb: &str) -> StoreResult<bool> {
        let mut state = lock(&self.state);
        state.calls += 1;
        let heard = match state.death {
            None => true,
            Some(Death::Before(last)) if state.calls <= last => true,
            Some(Death::After(last)) if state.calls < last => true,
            Some(Death::After(last)) if state.calls == last => false,
            Some(_) => return error(StoreErrorKind::Unavailable, verb),
        };
        Ok(heard)
    }

    fn there(&self, verb: &str) -> StoreResult<Arc<Double>> {
        lock(&self.state).buckets.get(&self.name).cloned().map_or_else(|| error(StoreErrorKind::NoBucket, verb), Ok)
    }

    async fn call<T, F: Future<Output = StoreResult<T>>>(
        &self,
        verb: &str,
        call: impl FnOnce(Arc<Double>) -> F,
    ) -> StoreResult<T> {
        let heard = self.enter(verb)?;
        let result = call(self.there(verb)?).await;
        if heard { result } else { error(StoreErrorKind::Unavailable, verb) }
    }

    async fn change<T>(&self, verb: &str, change: impl FnOnce(&mut State) -> StoreResult<T> + Send) -> StoreResult<T> {
        let heard = self.enter(verb)?;
        let result = change(&mut lock(&self.state));
        if heard { result } else { error(StoreErrorKind::Unavailable, verb) }
    }
}

#[async_trait]
impl Place for Plot {
    async fn able(&self) -> StoreResult<Abilities> {
        Ok(ABLE)
    }

    async fn exists(&self) -> StoreResult<bool> {
        self.change("exists", |state| Ok(state.buckets.contains_key(&self.name))).await
    }

    async fn ensure(&self) -> StoreResult<()> {
        self.change("ensure", |state| {
            state.buckets.entry(self.name.clone()).or_insert_with(Double::new);
            Ok(())
        })
        .await
    }

    async fn remove(&self) -> StoreResult<()> {
        self.change("remove", |state| {
            if state.buckets.get(&self.name).is_some_and(|bucket| !bucket.keys().is_empty()) {
                return error(StoreErrorKind::Conflict, "remove");
            }
            state.buckets.remove(&self.name);
            Ok(())
        })
        .await
    }

    async fn siblings(&self) -> StoreResult<Vec<String>> {
        self.change("siblings", |state| Ok(state.buckets.keys().cloned().collect())).await
    }
}

#[async_trait]
impl Store for Plot {
    fn abilities(&self) -> Abilities {
        ABLE
    }
    async fn head(&self, key: &str) -> StoreResult<Head> {
        self.call("head", |there| async move { there.head(key).await }).await
    }
    async fn get(&self, key: &str, range: Option<Range<u64>>, version: Option<&Etag>) -> StoreResult<(Head, Body)> {
        self.call("get", |there| async move { there.get(key, range, version).await }).await
    }
    async fn put(&self, key: &str, payload: Payload, metadata: &Metadata, condition: &Condition) -> StoreResult<Etag> {
        self.call("put", |there| async move { there.put(key, payload, metadata, condition).await }).await
    }
    async fn copy(
        &self,
        from: &str,
        version: Option<&Etag>,
        to: &str,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> StoreResult<Etag> {
        self.call("copy", |there| async move { there.copy(from, version, to, metadata, condition).await }).await
    }
    async fn delete(&self, key: &str, version: Option<&Etag>) -> StoreResult<()> {
        self.call("delete", |there| async move { there.delete(key, version).await }).await
    }
    async fn delete_many(&self, keys: &[String]) -> StoreResult<()> {
        self.call("delete_many", |there| async move { there.delete_many(keys).await }).await
    }
    async fn list(&self, request: &ListRequest) -> StoreResult<ListPage> {
        self.call("list", |there| async move { there.list(request).await }).await
    }
    async fn begin_upload(&self, key: &str, metadata: &Metadata) -> StoreResult<UploadId> {
        self.call("begin_upload", |there| async move { there.begin_upload(key, metadata).await }).await
    }
    async fn upload_part(&self, key: &str, upload: &UploadId, number: u32, payload: Payload) -> StoreResult<Part> {
        self.call("upload_part", |there| async move { there.upload_part(key, upload, number, payload).await }).await
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
        self.call("copy_part", |there| async move { there.copy_part(key, upload, number, from, version, range).await })
            .await
    }
    async fn finish_upload(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> StoreResult<Etag> {
        self.call("finish_upload", |there| async move { there.finish_upload(key, upload, parts, condition).await })
            .await
    }
    async fn abort_upload(&self, key: &str, upload: &UploadId) -> StoreResult<()> {
        self.call("abort_upload", |there| async move { there.abort_upload(key, upload).await }).await
    }
    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>> {
        self.call("list_uploads", |there| async move { there.list_uploads(prefix).await }).await
    }
}
