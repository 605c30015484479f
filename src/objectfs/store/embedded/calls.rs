//! The calls of S3 that objectfs makes, on a [`Disk`].

use std::fs::File;
use std::io::Write;
use std::ops;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use md5::{Digest, Md5};
use s3s::crypto::{Checksum, Crc64Nvme};
use s3s::dto::*;
use s3s::{S3, S3Request, S3Response, S3Result, TrailingHeaders, s3_error};

use super::super::wire::percent_encoded;
use super::disk::{Bucket, Disk, Objects, Record, Upload, now};

/// What a part has at least, but for the last one.
const LEAST_PART: u64 = 5 << 20;
/// Bodies are read in pieces of this size.
const PIECE: u64 = 128 << 10;

pub(super) struct Calls(pub(super) Disk);

type Answer<T> = S3Result<S3Response<T>>;

fn answer<T>(output: T) -> Answer<T> {
    Ok(S3Response::new(output))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tag(record: &Record) -> Option<ETag> {
    Some(ETag::Strong(record.etag.clone()))
}

fn time(seconds: u64) -> Option<Timestamp> {
    Some(Timestamp::from(UNIX_EPOCH + Duration::from_secs(seconds)))
}

fn disk(error: std::io::Error) -> s3s::S3Error {
    s3s::S3Error::internal_error(error)
}

fn length(size: u64) -> Option<i64> {
    i64::try_from(size).ok()
}

/// Does a condition let a write happen?
fn check(there: Option<&Record>, absent: Option<&ETagCondition>, is: Option<&ETagCondition>) -> S3Result<()> {
    let matches = |condition: &ETagCondition| match (condition, there) {
        (_, None) => false,
        (ETagCondition::Any, Some(_)) => true,
        (ETagCondition::ETag(etag), Some(record)) => etag.value() == record.etag,
    };
    if absent.is_some_and(matches) || is.is_some_and(|is| !matches(is)) {
        return Err(s3_error!(PreconditionFailed));
    }
    Ok(())
}

fn find<'a>(objects: &'a Objects, key: &str) -> S3Result<&'a Record> {
    objects.objects.get(key).ok_or_else(|| s3_error!(NoSuchKey))
}

fn upload<'a>(objects: &'a mut Objects, id: &str, key: &str) -> S3Result<&'a mut Upload> {
    let found = objects.uploads.get_mut(id).filter(|upload| upload.record.key == key);
    found.ok_or_else(|| s3_error!(NoSuchUpload))
}

impl Calls {
    fn bucket(&self, name: &str) -> S3Result<Arc<Bucket>> {
        self.0.bucket(name).ok_or_else(|| s3_error!(NoSuchBucket))
    }

    /// The source of a copy: its record, and its body, which stays readable whatever becomes of the object.
    fn source(&self, source: &CopySource, is: Option<&ETagCondition>) -> S3Result<(Record, PathBuf, File)> {
        let CopySource::Bucket { bucket, key, .. } = source else { return Err(s3_error!(NotImplemented)) };
        let bucket = self.bucket(bucket)?;
        let objects = bucket.objects();
        let record = find(&objects, key)?.clone();
        check(Some(&record), None, is)?;
        let path = bucket.body(&record.body);
        let file = File::open(&path).map_err(disk)?;
        Ok((record, path, file))
    }
}

/// A body on its way to a client. Its reads are short, and mostly from the page cache.
struct Outgoing {
    file: File,
    range: ops::Range<u64>,
}

impl Stream for Outgoing {
    type Item = std::io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let wanted = PIECE.min(this.range.end - this.range.start);
        if wanted == 0 {
            return Poll::Ready(None);
        }
        let mut piece = BytesMut::zeroed(wanted as usize);
        let read = this.file.read_exact_at(&mut piece, this.range.start);
        this.range.start += wanted;
        Poll::Ready(Some(read.map(|()| piece.freeze())))
    }
}

/// A body that came. Removed again, unless it is kept.
struct Received {
    bucket: Arc<Bucket>,
    name: String,
    kept: bool,
}

impl Received {
    fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if !self.kept {
            self.bucket.drop_body(&self.name);
        }
    }
}

/// Takes a body in: where it is, and its record but for what is said about it.
async fn receive(
    bucket: &Arc<Bucket>,
    key: &str,
    body: Option<StreamingBlob>,
    given: Option<String>,
    trailing: Option<TrailingHeaders>,
) -> S3Result<(Received, Record)> {
    let (name, mut file) = bucket.new_body().map_err(disk)?;
    let received = Received { bucket: bucket.clone(), name: name.clone(), kept: false };
    let (mut md5, mut crc, mut size) = (Md5::new(), <Crc64Nvme as Checksum>::new(), 0);
    if let Some(mut body) = body {
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| s3_error!(IncompleteBody, "{error}"))?;
            md5.update(&piece);
            crc.update(&piece);
            file.write_all(&piece).map_err(disk)?;
            size += piece.len() as u64;
        }
    }
    let trailer = trailing.and_then(|trailing| {
        trailing.read(|headers| Some(headers.get("x-amz-checksum-crc64nvme")?.to_str().ok()?.to_owned()))
    });
    let given = given.or(trailer.flatten());
    let sum = STANDARD.encode(Checksum::finalize(crc));
    if given.as_ref().is_some_and(|given| *given != sum) {
        return Err(s3_error!(BadDigest));
    }
    let record = Record {
        key: key.to_owned(),
        size,
        etag: hex(&md5.finalize()),
        sum: given,
        modified: now(),
        content_type: None,
        user: std::collections::BTreeMap::new(),
        body: name,
    };
    Ok((received, record))
}

#[async_trait::async_trait]
impl S3 for Calls {
    async fn create_bucket(&self, request: S3Request<CreateBucketInput>) -> Answer<CreateBucketOutput> {
        if self.0.make(&request.input.bucket).map_err(disk)? {
            answer(CreateBucketOutput::default())
        } else {
            Err(s3_error!(BucketAlreadyOwnedByYou))
        }
    }

    async fn head_bucket(&self, request: S3Request<HeadBucketInput>) -> Answer<HeadBucketOutput> {
        self.bucket(&request.input.bucket)?;
        answer(HeadBucketOutput::default())
    }

    async fn list_buckets(&self, _: S3Request<ListBucketsInput>) -> Answer<ListBucketsOutput> {
        let buckets =
            self.0.names().into_iter().map(|name| s3s::dto::Bucket { name: Some(name), ..Default::default() });
        answer(ListBucketsOutput { buckets: Some(buckets.collect()), ..Default::default() })
    }

    async fn delete_bucket(&self, request: S3Request<DeleteBucketInput>) -> Answer<DeleteBucketOutput> {
        self.bucket(&request.input.bucket)?;
        if self.0.remove(&request.input.bucket).map_err(disk)? {
            answer(DeleteBucketOutput::default())
        } else {
            Err(s3_error!(BucketNotEmpty))
        }
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> Answer<HeadObjectOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let record = find(&bucket.objects(), &input.key)?.clone();
        check(Some(&record), None, input.if_match.as_ref())?;
        answer(HeadObjectOutput {
            content_length: length(record.size),
            e_tag: tag(&record),
            last_modified: time(record.modified),
            checksum_crc64nvme: record.sum.filter(|_| input.checksum_mode.is_some()),
            content_type: record.content_type,
            metadata: Some(record.user.into_iter().collect()),
            accept_ranges: Some("bytes".to_owned()),
            ..Default::default()
        })
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> Answer<GetObjectOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let (record, file) = {
            let objects = bucket.objects();
            let record = find(&objects, &input.key)?.clone();
            let file = File::open(bucket.body(&record.body)).map_err(disk)?;
            (record, file)
        };
        check(Some(&record), None, input.if_match.as_ref())?;
        let range = match &input.range {
            Some(range) => range.check(record.size)?,
            None => 0..record.size,
        };
        let ranged = input.range.is_some();
        let content_range = format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), record.size);
        answer(GetObjectOutput {
            content_length: length(range.end - range.start),
            content_range: ranged.then_some(content_range),
            body: Some(StreamingBlob::wrap(Outgoing { file, range })),
            e_tag: tag(&record),
            last_modified: time(record.modified),
            checksum_crc64nvme: record.sum.filter(|_| input.checksum_mode.is_some() && !ranged),
            content_type: record.content_type,
            metadata: Some(record.user.into_iter().collect()),
            accept_ranges: Some("bytes".to_owned()),
            ..Default::default()
        })
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> Answer<PutObjectOutput> {
        let (input, trailing) = (request.input, request.trailing_headers);
        let bucket = self.bucket(&input.bucket)?;
        let (absent, is) = (input.if_none_match.as_ref(), input.if_match.as_ref());
        // Before the body comes, so that one in vain is not waited for; and again as it takes its place.
        check(bucket.objects().objects.get(&input.key), absent, is)?;
        let (mut received, mut record) =
            receive(&bucket, &input.key, input.body, input.checksum_crc64nvme, trailing).await?;
        record.content_type = input.content_type;
        record.user = input.metadata.unwrap_or_default().into_iter().collect();
        let output =
            PutObjectOutput { e_tag: tag(&record), checksum_crc64nvme: record.sum.clone(), ..Default::default() };
        let mut objects = bucket.objects();
        check(objects.objects.get(&input.key), absent, is)?;
        bucket.store(&mut objects, record).map_err(disk)?;
        received.keep();
        answer(output)
    }

    async fn copy_object(&self, request: S3Request<CopyObjectInput>) -> Answer<CopyObjectOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let (mut record, path, _file) = self.source(&input.copy_source, input.copy_source_if_match.as_ref())?;
        let header = |name: &str| {
            let value = request.headers.get(name)?.to_str().ok()?;
            Some(if value == "*" {
                ETagCondition::Any
            } else {
                ETagCondition::ETag(ETag::Strong(value.trim_matches('"').to_owned()))
            })
        };
        let replace = input.metadata_directive.as_ref().is_some_and(|how| how.as_str() == MetadataDirective::REPLACE);
        if !replace && record.key == input.key && path.starts_with(bucket.body("").as_path()) {
            return Err(s3_error!(InvalidRequest, "a copy onto itself has to change something"));
        }
        // Bodies never change, so a second name is a copy.
        let name = bucket.number();
        if std::fs::hard_link(&path, bucket.body(&name)).is_err() {
            std::fs::copy(&path, bucket.body(&name)).map_err(disk)?;
        }
        let mut received = Received { bucket: bucket.clone(), name: name.clone(), kept: false };
        record.body = name;
        record.key = input.key;
        record.modified = now();
        if replace {
            record.content_type = input.content_type;
            record.user = input.metadata.unwrap_or_default().into_iter().collect();
        }
        let result =
            CopyObjectResult { e_tag: tag(&record), last_modified: time(record.modified), ..Default::default() };
        let mut objects = bucket.objects();
        check(objects.objects.get(&record.key), header("if-none-match").as_ref(), header("if-match").as_ref())?;
        bucket.store(&mut objects, record).map_err(disk)?;
        received.keep();
        answer(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() })
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> Answer<DeleteObjectOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let mut objects = bucket.objects();
        if let Some(record) = objects.objects.get(&input.key) {
            check(Some(record), None, input.if_match.as_ref())?;
            bucket.remove(&mut objects, &input.key).map_err(disk)?;
        }
        answer(DeleteObjectOutput::default())
    }

    async fn delete_objects(&self, request: S3Request<DeleteObjectsInput>) -> Answer<DeleteObjectsOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let mut objects = bucket.objects();
        let mut deleted = Vec::new();
        for one in input.delete.objects {
            bucket.remove(&mut objects, &one.key).map_err(disk)?;
            deleted.push(DeletedObject { key: Some(one.key), ..Default::default() });
        }
        let deleted = (input.delete.quiet != Some(true)).then_some(deleted);
        answer(DeleteObjectsOutput { deleted, ..Default::default() })
    }

    async fn list_objects_v2(&self, request: S3Request<ListObjectsV2Input>) -> Answer<ListObjectsV2Output> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let token = match &input.continuation_token {
            Some(token) => {
                let bytes = STANDARD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                Some(bytes.ok_or_else(|| s3_error!(InvalidArgument, "no such continuation token"))?)
            }
            None => None,
        };
        let limit = usize::try_from(input.max_keys.unwrap_or(1000).clamp(0, 1000)).unwrap_or(0);
        let after = token.as_deref().or(input.start_after.as_deref());
        let page = bucket.objects().page(&prefix, input.delimiter.as_deref(), after, limit);
        let url = input.encoding_type.as_ref().is_some_and(|how| how.as_str() == EncodingType::URL);
        let encoded = |key: String| Some(if url { percent_encoded(&key) } else { key });
        let count = page.objects.len() + page.prefixes.len();
        let contents = page.objects.into_iter().map(|record| Object {
            e_tag: tag(&record),
            size: length(record.size),
            last_modified: time(record.modified),
            key: encoded(record.key),
            ..Default::default()
        });
        let prefixes = page.prefixes.into_iter().map(|prefix| CommonPrefix { prefix: encoded(prefix) });
        answer(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: encoded(prefix),
            delimiter: input.delimiter,
            max_keys: input.max_keys,
            key_count: i32::try_from(count).ok(),
            is_truncated: Some(page.token.is_some()),
            next_continuation_token: page.token.map(|token| STANDARD.encode(token)),
            continuation_token: input.continuation_token,
            contents: Some(contents.collect()),
            common_prefixes: Some(prefixes.collect()),
            encoding_type: input.encoding_type,
            ..Default::default()
        })
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> Answer<CreateMultipartUploadOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        // Never one that an earlier run of the server gave out.
        let run = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), bucket.number());
        let id = format!("{run:016x}");
        let record = Record {
            key: input.key.clone(),
            size: 0,
            etag: String::new(),
            sum: None,
            modified: now(),
            content_type: input.content_type,
            user: input.metadata.unwrap_or_default().into_iter().collect(),
            body: String::new(),
        };
        bucket.objects().uploads.insert(id.clone(), Upload { record, parts: std::collections::BTreeMap::new() });
        answer(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        })
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> Answer<UploadPartOutput> {
        let (input, trailing) = (request.input, request.trailing_headers);
        let bucket = self.bucket(&input.bucket)?;
        upload(&mut bucket.objects(), &input.upload_id, &input.key)?;
        let (mut received, record) =
            receive(&bucket, &input.key, input.body, input.checksum_crc64nvme, trailing).await?;
        let output =
            UploadPartOutput { e_tag: tag(&record), checksum_crc64nvme: record.sum.clone(), ..Default::default() };
        let mut objects = bucket.objects();
        let old = upload(&mut objects, &input.upload_id, &input.key)?.parts.insert(input.part_number, record);
        received.keep();
        if let Some(old) = old {
            bucket.drop_body(&old.body);
        }
        answer(output)
    }

    async fn upload_part_copy(&self, request: S3Request<UploadPartCopyInput>) -> Answer<UploadPartCopyOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        upload(&mut bucket.objects(), &input.upload_id, &input.key)?;
        let (source, _, file) = self.source(&input.copy_source, input.copy_source_if_match.as_ref())?;
        let range = match &input.copy_source_range {
            Some(text) => Range::parse(text).map_err(|_| s3_error!(InvalidArgument))?.check(source.size)?,
            None => 0..source.size,
        };
        let body = StreamingBlob::wrap(Outgoing { file, range });
        let (mut received, record) = receive(&bucket, &input.key, Some(body), None, None).await?;
        let result = CopyPartResult { e_tag: tag(&record), last_modified: time(record.modified), ..Default::default() };
        let mut objects = bucket.objects();
        let old = upload(&mut objects, &input.upload_id, &input.key)?.parts.insert(input.part_number, record);
        received.keep();
        if let Some(old) = old {
            bucket.drop_body(&old.body);
        }
        answer(UploadPartCopyOutput { copy_part_result: Some(result), ..Default::default() })
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> Answer<CompleteMultipartUploadOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let (absent, is) = (input.if_none_match.as_ref(), input.if_match.as_ref());
        let wanted = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let (mut record, parts) = {
            let mut objects = bucket.objects();
            upload(&mut objects, &input.upload_id, &input.key)?;
            check(objects.objects.get(&input.key), absent, is)?;
            let upload = upload(&mut objects, &input.upload_id, &input.key)?;
            (upload.record.clone(), chosen(upload, &wanted)?)
        };
        let (name, mut file) = bucket.new_body().map_err(disk)?;
        let mut received = Received { bucket: bucket.clone(), name: name.clone(), kept: false };
        let mut sum = Md5::new();
        for part in &parts {
            sum.update(unhex(&part.etag));
            record.size += part.size;
        }
        let paths: Vec<_> = parts.iter().map(|part| bucket.body(&part.body)).collect();
        let joined = tokio::task::spawn_blocking(move || {
            for path in paths {
                let mut part = File::open(path)?;
                std::io::copy(&mut part, &mut file)?;
            }
            Ok(())
        });
        joined.await.map_err(s3s::S3Error::internal_error)?.map_err(disk)?;
        record.etag = format!("{}-{}", hex(&sum.finalize()), parts.len());
        record.body = name;
        record.modified = now();
        let output = CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key.clone()),
            e_tag: tag(&record),
            ..Default::default()
        };
        let mut objects = bucket.objects();
        check(objects.objects.get(&input.key), absent, is)?;
        upload(&mut objects, &input.upload_id, &input.key)?;
        bucket.store(&mut objects, record).map_err(disk)?;
        received.keep();
        if let Some(upload) = objects.uploads.remove(&input.upload_id) {
            upload.parts.values().for_each(|part| bucket.drop_body(&part.body));
        }
        answer(output)
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> Answer<AbortMultipartUploadOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let mut objects = bucket.objects();
        upload(&mut objects, &input.upload_id, &input.key)?;
        if let Some(upload) = objects.uploads.remove(&input.upload_id) {
            upload.parts.values().for_each(|part| bucket.drop_body(&part.body));
        }
        answer(AbortMultipartUploadOutput::default())
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> Answer<ListMultipartUploadsOutput> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let url = input.encoding_type.as_ref().is_some_and(|how| how.as_str() == EncodingType::URL);
        let objects = bucket.objects();
        let below = objects.uploads.iter().filter(|(_, upload)| upload.record.key.starts_with(&prefix));
        let uploads = below.map(|(id, upload)| MultipartUpload {
            key: Some(if url { percent_encoded(&upload.record.key) } else { upload.record.key.clone() }),
            upload_id: Some(id.clone()),
            initiated: time(upload.record.modified),
            ..Default::default()
        });
        // All at once: there are never many.
        answer(ListMultipartUploadsOutput {
            uploads: Some(uploads.collect()),
            bucket: Some(input.bucket),
            prefix: input.prefix,
            encoding_type: input.encoding_type,
            is_truncated: Some(false),
            ..Default::default()
        })
    }
}

/// The parts that an object is to be made of.
fn chosen(upload: &Upload, wanted: &[CompletedPart]) -> S3Result<Vec<Record>> {
    let mut parts: Vec<Record> = Vec::new();
    let mut last = 0;
    for (index, part) in wanted.iter().enumerate() {
        let number = part.part_number.unwrap_or(0);
        if number <= last {
            return Err(s3_error!(InvalidPartOrder));
        }
        last = number;
        let found = upload.parts.get(&number);
        let same = found.filter(|found| part.e_tag.as_ref().is_none_or(|etag| etag.value() == found.etag));
        let found = same.ok_or_else(|| s3_error!(InvalidPart))?;
        if index + 1 < wanted.len() && found.size < LEAST_PART {
            return Err(s3_error!(EntityTooSmall));
        }
        parts.push(found.clone());
    }
    if parts.is_empty() { Err(s3_error!(MalformedXML)) } else { Ok(parts) }
}

/// The bytes of an etag, which is the MD5 of a part.
fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).filter_map(|at| u8::from_str_radix(text.get(at * 2..at * 2 + 2)?, 16).ok()).collect()
}
