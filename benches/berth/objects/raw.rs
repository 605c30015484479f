//! A bare S3 client: the limit that mounts are compared with, and the other client that looks whether it is all there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::runtime::Runtime;

use super::content;
use super::service::Access;

/// The bucket of everything.
pub(crate) const BUCKET: &str = "bench";
/// A ranged GET, or a part.
const PART: u64 = 8 << 20;
/// Ranged GETs and parts at once.
const STREAMS: usize = 16;
/// Small calls at once, where a client may do so.
const AT_ONCE: usize = 32;
/// The smallest part that S3 takes.
const SMALLEST_PART: u64 = 5 << 20;
const LOOK: Duration = Duration::from_millis(2);

/// A client with threads of its own. Every method blocks.
pub(crate) struct Raw {
    runtime: Runtime,
    bucket: Bucket,
}

#[derive(Clone)]
struct Bucket {
    client: Client,
}

impl Raw {
    pub(crate) fn new(access: &Access) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let config = aws_sdk_s3::config::Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .endpoint_url(&access.endpoint)
            .force_path_style(true)
            .credentials_provider(Credentials::new(&access.access_key, &access.secret_key, None, None, "bench"))
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .build();
        Ok(Self { runtime, bucket: Bucket { client: Client::from_conf(config) } })
    }

    pub(crate) fn create_bucket(&self) -> Result<()> {
        self.runtime.block_on(self.bucket.client.create_bucket().bucket(BUCKET).send())?;
        Ok(())
    }

    /// Size and tag of an object. `None`: there is none.
    pub(crate) fn head(&self, key: &str) -> Result<Option<(u64, String)>> {
        self.runtime.block_on(self.bucket.head(key))
    }

    /// Waits until an object has this size and another tag than that, and returns the tag.
    pub(crate) fn wait_for(&self, key: &str, size: u64, not: Option<&str>, deadline: Duration) -> Result<String> {
        let begun = Instant::now();
        loop {
            match self.head(key)? {
                Some((found, tag)) if found == size && not != Some(tag.as_str()) => return Ok(tag),
                other => ensure!(begun.elapsed() < deadline, "{key} is not in the bucket, but {other:?}"),
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until these bytes of an object are those.
    pub(crate) fn wait_for_bytes(&self, key: &str, offset: u64, bytes: &[u8], deadline: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            let found = self.runtime.block_on(self.bucket.get(key, Some(offset..offset + bytes.len() as u64)))?;
            if found == bytes {
                return Ok(());
            }
            ensure!(begun.elapsed() < deadline, "the change of {key} is not in the bucket");
            std::thread::sleep(LOOK);
        }
    }

    /// Keys below a prefix, without it, and their sizes; directories' markers are left out.
    pub(crate) fn list(&self, prefix: &str) -> Result<BTreeMap<String, u64>> {
        self.runtime.block_on(self.bucket.list(prefix))
    }

    /// Waits until the files below a prefix are these.
    pub(crate) fn wait_for_all(&self, prefix: &str, wanted: &BTreeMap<String, u64>, deadline: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            let found = self.list(prefix)?;
            if found == *wanted {
                return Ok(());
            }
            let missing = wanted.iter().filter(|(key, size)| found.get(*key) != Some(size)).count();
            let wrong = format!("{missing} of {} files are not in the bucket, {} are", wanted.len(), found.len());
            ensure!(begun.elapsed() < deadline, "{wrong}");
            std::thread::sleep(LOOK);
        }
    }

    pub(crate) fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.runtime.block_on(self.bucket.put(key, bytes))
    }

    /// Writes many objects at once.
    pub(crate) fn put_all(&self, objects: impl IntoIterator<Item = (String, Bytes)>) -> Result<()> {
        let puts = objects.into_iter().map(|(key, bytes)| {
            let bucket = self.bucket.clone();
            async move { bucket.put(&key, bytes).await }
        });
        self.runtime.block_on(stream::iter(puts).buffer_unordered(AT_ONCE).try_collect::<Vec<()>>())?;
        Ok(())
    }

    pub(crate) fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        self.runtime.block_on(self.bucket.get(key, range))
    }

    pub(crate) fn delete(&self, key: &str) -> Result<()> {
        self.runtime.block_on(async {
            self.bucket.client.delete_object().bucket(BUCKET).key(key).send().await?;
            Ok(())
        })
    }

    /// Copies an object on the server.
    pub(crate) fn copy(&self, from: &str, to: &str) -> Result<()> {
        self.runtime.block_on(self.bucket.copy(from, to))
    }

    /// Gives what lies below a prefix another one: copies many at once, then deletes what was copied.
    pub(crate) fn rename_all(&self, from: &str, to: &str) -> Result<()> {
        self.runtime.block_on(async {
            let keys: Vec<_> = self.bucket.list(from).await?.into_keys().collect();
            let copies = keys.iter().map(|key| {
                let (bucket, from, to) = (self.bucket.clone(), format!("{from}{key}"), format!("{to}{key}"));
                async move { bucket.copy(&from, &to).await }
            });
            stream::iter(copies).buffer_unordered(AT_ONCE).try_collect::<Vec<()>>().await?;
            self.bucket.delete_all(keys.iter().map(|key| format!("{from}{key}"))).await
        })
    }

    /// Deletes whatever is below a prefix.
    pub(crate) fn clear(&self, prefix: &str) -> Result<()> {
        self.runtime.block_on(async {
            let keys = self.bucket.list_keys(prefix).await?;
            self.bucket.delete_all(keys.into_iter().map(|(key, _)| key)).await
        })
    }

    /// Reads an object of the known content, by ranges.
    pub(crate) fn read_large(&self, key: &str, size: u64, seed: u64) -> Result<()> {
        let ranges = (0..size.div_ceil(PART)).map(|number| number * PART..size.min((number + 1) * PART));
        let parts = ranges.map(|range| {
            let (bucket, key) = (self.bucket.clone(), key.to_owned());
            let read = async move { content::check(&bucket.get(&key, Some(range.clone())).await?, range.start, seed) };
            // A task of its own: both processors are to work.
            async move { self.runtime.spawn(read).await? }
        });
        self.runtime.block_on(stream::iter(parts).buffer_unordered(STREAMS).try_collect::<Vec<()>>())?;
        Ok(())
    }

    /// Writes an object of the known content, in parts.
    pub(crate) fn write_large(&self, key: &str, size: u64, seed: u64) -> Result<()> {
        self.runtime.block_on(async {
            let upload = Upload::begin(&self.bucket, key).await?;
            let random: Arc<[u8]> = content::random(usize::try_from(PART)?).into();
            let parts = (0..size.div_ceil(PART)).map(|number| {
                let (upload, random) = (upload.clone(), random.clone());
                let begin = number * PART;
                let part = async move {
                    let length = usize::try_from(PART.min(size - begin))?;
                    let mut bytes = BytesMut::from(&random[..length]);
                    content::fill(&mut bytes, begin, seed);
                    upload.put(i32::try_from(number)? + 1, bytes.freeze()).await
                };
                async move { self.runtime.spawn(part).await? }
            });
            let parts = stream::iter(parts).buffered(STREAMS).try_collect().await?;
            upload.finish(parts).await
        })
    }

    /// Appends to an object: what is there is copied on the server.
    pub(crate) fn append(&self, key: &str, size: u64, bytes: Bytes) -> Result<()> {
        self.runtime.block_on(async {
            let upload = Upload::begin(&self.bucket, key).await?;
            let (old, new) = tokio::try_join!(upload.copy(1, 0..size), upload.put(2, bytes))?;
            upload.finish(vec![old, new]).await
        })
    }

    /// Changes some bytes in the middle of an object: what is around them is copied on the server.
    pub(crate) fn patch(&self, key: &str, size: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        let (begin, end) = (offset, offset + SMALLEST_PART);
        ensure!(begin >= SMALLEST_PART && end <= size, "too small a file to be patched in parts");
        self.runtime.block_on(async {
            let (upload, around) =
                tokio::try_join!(Upload::begin(&self.bucket, key), self.bucket.get(key, Some(begin..end)))?;
            let mut middle = BytesMut::from(&around[..]);
            middle[..bytes.len()].copy_from_slice(bytes);
            let parts =
                tokio::try_join!(upload.copy(1, 0..begin), upload.put(2, middle.freeze()), upload.copy(3, end..size))?;
            upload.finish(vec![parts.0, parts.1, parts.2]).await
        })
    }
}

impl Bucket {
    async fn head(&self, key: &str) -> Result<Option<(u64, String)>> {
        match self.client.head_object().bucket(BUCKET).key(key).send().await {
            Ok(head) => {
                let size = u64::try_from(head.content_length().unwrap_or_default())?;
                Ok(Some((size, head.e_tag().unwrap_or_default().to_owned())))
            }
            Err(error) if error.as_service_error().is_some_and(|error| error.is_not_found()) => Ok(None),
            Err(error) => bail!("cannot look at {key}: {:?}: {error}", error.code()),
        }
    }

    /// With the metadata that rclone and s3fs write, so that a mount has to look for it.
    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        let put = self.client.put_object().bucket(BUCKET).key(key).body(ByteStream::from(bytes));
        let put =
            put.metadata("mtime", "1700000000").metadata("mode", if key.ends_with('/') { "16877" } else { "33188" });
        let put = put.metadata("uid", "0").metadata("gid", "0");
        put.customize().disable_payload_signing().send().await.with_context(|| format!("cannot put {key}"))?;
        Ok(())
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        let range = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let got = self.client.get_object().bucket(BUCKET).key(key).set_range(range).send().await;
        let body = got.with_context(|| format!("cannot get {key}"))?.body;
        Ok(body.collect().await?.into_bytes())
    }

    async fn copy(&self, from: &str, to: &str) -> Result<()> {
        let copy = self.client.copy_object().bucket(BUCKET).copy_source(format!("{BUCKET}/{from}")).key(to);
        copy.send().await.with_context(|| format!("cannot copy {from}"))?;
        Ok(())
    }

    async fn list_keys(&self, prefix: &str) -> Result<Vec<(String, u64)>> {
        let mut found = Vec::new();
        let mut pages = self.client.list_objects_v2().bucket(BUCKET).prefix(prefix).into_paginator().send();
        while let Some(page) = pages.try_next().await? {
            for object in page.contents() {
                let key = object.key().unwrap_or_default().to_owned();
                found.push((key, u64::try_from(object.size().unwrap_or_default())?));
            }
        }
        Ok(found)
    }

    async fn list(&self, prefix: &str) -> Result<BTreeMap<String, u64>> {
        let keys = self.list_keys(prefix).await?.into_iter();
        let files = keys.filter(|(key, _)| !key.ends_with('/'));
        Ok(files.map(|(key, size)| (key[prefix.len()..].to_owned(), size)).collect())
    }

    async fn delete_all(&self, keys: impl Iterator<Item = String>) -> Result<()> {
        let objects: Vec<_> = keys.map(|key| ObjectIdentifier::builder().key(key).build()).collect::<Result<_, _>>()?;
        for page in objects.chunks(1000) {
            let delete = Delete::builder().set_objects(Some(page.to_vec())).quiet(true).build()?;
            self.client.delete_objects().bucket(BUCKET).delete(delete).send().await?;
        }
        Ok(())
    }
}

/// A multipart upload.
#[derive(Clone)]
struct Upload {
    bucket: Bucket,
    key: Arc<str>,
    id: Arc<str>,
}

impl Upload {
    async fn begin(bucket: &Bucket, key: &str) -> Result<Self> {
        let begun = bucket.client.create_multipart_upload().bucket(BUCKET).key(key).send().await?;
        let id = begun.upload_id().context("an upload without an id")?.into();
        Ok(Self { bucket: bucket.clone(), key: key.into(), id })
    }

    async fn put(&self, number: i32, bytes: Bytes) -> Result<CompletedPart> {
        let call = self.bucket.client.upload_part().bucket(BUCKET).key(&*self.key).upload_id(&*self.id);
        let call = call.part_number(number).body(ByteStream::from(bytes));
        let tag = call.customize().disable_payload_signing().send().await?.e_tag;
        Ok(CompletedPart::builder().part_number(number).set_e_tag(tag).build())
    }

    async fn copy(&self, number: i32, range: Range<u64>) -> Result<CompletedPart> {
        let call = self.bucket.client.upload_part_copy().bucket(BUCKET).key(&*self.key).upload_id(&*self.id);
        let call = call.part_number(number).copy_source(format!("{BUCKET}/{}", self.key));
        let call = call.copy_source_range(format!("bytes={}-{}", range.start, range.end - 1));
        let tag = call.send().await?.copy_part_result.and_then(|copied| copied.e_tag);
        Ok(CompletedPart::builder().part_number(number).set_e_tag(tag).build())
    }

    async fn finish(&self, parts: Vec<CompletedPart>) -> Result<()> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let call = self.bucket.client.complete_multipart_upload().bucket(BUCKET).key(&*self.key);
        call.upload_id(&*self.id).multipart_upload(parts).send().await?;
        Ok(())
    }
}
