//! S3 services as the back end asks them: buckets that may not exist yet, and conditions that are tried out when the first
//! one is needed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::OnceCell;

use super::blocking::{Connect, Place};
use super::failure::failed;
use super::patient::Patient;
use super::probe::{NONE, probe};
use super::*;
use crate::objectfs::settings::{Credentials, Endpoint};

/// What each endpoint honours, once one of its buckets has been tried.
type Known = Arc<Mutex<BTreeMap<String, Abilities>>>;

/// The services, through the SDK.
#[derive(Default)]
pub struct Services {
    known: Known,
}

#[async_trait]
impl Connect for Services {
    async fn connect(
        &self,
        endpoint: &Endpoint,
        credentials: Option<&Credentials>,
        bucket: &str,
    ) -> StoreResult<Arc<dyn Place>> {
        let s3 = connect(endpoint, credentials, bucket).await?;
        let address = endpoint.url.clone().unwrap_or_else(|| format!("aws {}", endpoint.region));
        let (plain, patience) = (Patient::new(s3.clone(), endpoint.patience()), endpoint.patience());
        Ok(Arc::new(Remote { s3, plain, able: OnceCell::new(), known: self.known.clone(), address, patience }))
    }
}

/// A bucket of a service.
struct Remote {
    s3: Arc<S3>,
    /// The same for calls without conditions.
    plain: Arc<Patient>,
    able: OnceCell<Arc<Patient>>,
    known: Known,
    address: String,
    patience: Duration,
}

impl Remote {
    /// The bucket, with what its endpoint honours.
    async fn tried(&self) -> StoreResult<&Arc<Patient>> {
        self.able
            .get_or_try_init(|| async {
                let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&self.address).copied();
                let abilities = match known {
                    Some(known) => known,
                    None => {
                        let found = probe(&self.s3).await?;
                        // Nothing at all may also mean that these credentials may not write.
                        if found != NONE {
                            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                            known.insert(self.address.clone(), found);
                        }
                        found
                    }
                };
                Ok(Patient::new(self.s3.honouring(abilities), self.patience))
            })
            .await
    }
}

#[async_trait]
impl Place for Remote {
    async fn able(&self) -> StoreResult<Abilities> {
        Ok(self.tried().await?.abilities())
    }

    async fn exists(&self) -> StoreResult<bool> {
        self.s3.bucket_exists().await
    }

    async fn ensure(&self) -> StoreResult<()> {
        self.s3.ensure_bucket().await
    }

    async fn remove(&self) -> StoreResult<()> {
        self.s3.delete_bucket().await
    }

    async fn siblings(&self) -> StoreResult<Vec<String>> {
        let (mut names, mut token) = (Vec::new(), None);
        loop {
            let call = self.s3.client.list_buckets().set_continuation_token(token);
            let page = call.send().await.map_err(|error| failed("list the buckets of", &self.address, &error))?;
            names.extend(page.buckets().iter().filter_map(|bucket| bucket.name()).map(str::to_owned));
            token = page.continuation_token().map(str::to_owned);
            if token.is_none() {
                return Ok(names);
            }
        }
    }
}

#[async_trait]
impl Store for Remote {
    fn abilities(&self) -> Abilities {
        self.able.get().map_or(NONE, |tried| tried.abilities())
    }

    async fn head(&self, key: &str) -> StoreResult<Head> {
        self.plain.head(key).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>, version: Option<&Etag>) -> StoreResult<(Head, Body)> {
        self.plain.get(key, range, version).await
    }

    async fn put(&self, key: &str, payload: Payload, metadata: &Metadata, condition: &Condition) -> StoreResult<Etag> {
        match condition {
            Condition::None => self.plain.put(key, payload, metadata, condition).await,
            Condition::Absent | Condition::Is(_) => self.tried().await?.put(key, payload, metadata, condition).await,
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
        self.tried().await?.copy(from, version, to, metadata, condition).await
    }

    async fn delete(&self, key: &str, version: Option<&Etag>) -> StoreResult<()> {
        match version {
            None => self.plain.delete(key, None).await,
            Some(_) => self.tried().await?.delete(key, version).await,
        }
    }

    async fn delete_many(&self, keys: &[String]) -> StoreResult<()> {
        self.plain.delete_many(keys).await
    }

    async fn list(&self, request: &ListRequest) -> StoreResult<ListPage> {
        self.plain.list(request).await
    }

    async fn begin_upload(&self, key: &str, metadata: &Metadata) -> StoreResult<UploadId> {
        self.plain.begin_upload(key, metadata).await
    }

    async fn upload_part(&self, key: &str, upload: &UploadId, number: u32, payload: Payload) -> StoreResult<Part> {
        self.plain.upload_part(key, upload, number, payload).await
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
        self.plain.copy_part(key, upload, number, from, version, range).await
    }

    async fn finish_upload(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> StoreResult<Etag> {
        self.tried().await?.finish_upload(key, upload, parts, condition).await
    }

    async fn abort_upload(&self, key: &str, upload: &UploadId) -> StoreResult<()> {
        self.plain.abort_upload(key, upload).await
    }

    async fn list_uploads(&self, prefix: &str) -> StoreResult<Vec<(String, UploadId, SystemTime)>> {
        self.plain.list_uploads(prefix).await
    }
}
