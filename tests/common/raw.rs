//! A bucket as any other S3 tool sees it: the AWS SDK, and nothing of ours.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Builder, Credentials, Region, RequestChecksumCalculation};
use aws_sdk_s3::config::{ResponseChecksumValidation, retry::RetryConfig};
use aws_sdk_s3::primitives::ByteStream;
use futures_util::{StreamExt, stream};
use tokio::runtime::Runtime;

/// Where a service is, and who may do everything there.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub url: String,
    pub access: String,
    pub secret: String,
    pub region: String,
}

/// One bucket.
pub struct Raw {
    client: Client,
    url: String,
    pub bucket: String,
    runtime: Runtime,
}

/// What a HEAD says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub size: u64,
    pub etag: String,
    pub content_type: Option<String>,
    pub metadata: BTreeMap<String, String>,
}

impl Raw {
    /// A bucket that need not exist yet.
    pub fn new(endpoint: &Endpoint, bucket: &str) -> Self {
        Self::trying(endpoint, bucket, 5)
    }

    /// One that tries nothing again.
    pub fn once(endpoint: &Endpoint, bucket: &str) -> Self {
        Self::trying(endpoint, bucket, 1)
    }

    fn trying(endpoint: &Endpoint, bucket: &str, attempts: u32) -> Self {
        let credentials = Credentials::new(&endpoint.access, &endpoint.secret, None, None, "tests");
        let config = Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(&endpoint.url)
            .region(Region::new(endpoint.region.clone()))
            .credentials_provider(credentials)
            .retry_config(RetryConfig::standard().with_max_attempts(attempts))
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .force_path_style(true)
            .build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { client: Client::from_conf(config), url: endpoint.url.clone(), bucket: bucket.to_owned(), runtime }
    }

    pub fn make_bucket(&self) {
        let made = self.runtime.block_on(self.client.create_bucket().bucket(&self.bucket).send());
        if let Err(error) = made {
            let error = error.into_service_error();
            assert!(error.is_bucket_already_owned_by_you() || error.is_bucket_already_exists(), "{error:?}");
        }
    }

    pub fn remove_bucket(&self) {
        for (key, _) in self.list("") {
            self.delete(&key);
        }
        self.runtime.block_on(self.client.delete_bucket().bucket(&self.bucket).send()).unwrap();
    }

    pub fn head(&self, key: &str) -> Option<Object> {
        let head = self.runtime.block_on(self.client.head_object().bucket(&self.bucket).key(key).send());
        match head {
            Ok(head) => Some(Object {
                size: head.content_length.unwrap().try_into().unwrap(),
                etag: head.e_tag.unwrap(),
                content_type: head.content_type,
                metadata: head.metadata.unwrap_or_default().into_iter().collect(),
            }),
            Err(error) => {
                let error = error.into_service_error();
                assert!(error.is_not_found(), "cannot look at {key}: {error:?}");
                None
            }
        }
    }

    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.runtime.block_on(async {
            match self.client.get_object().bucket(&self.bucket).key(key).send().await {
                Ok(object) => Some(object.body.collect().await.unwrap().to_vec()),
                Err(error) => {
                    let error = error.into_service_error();
                    assert!(error.is_no_such_key(), "cannot read {key}: {error:?}");
                    None
                }
            }
        })
    }

    pub fn try_get(&self, key: &str) -> Result<Vec<u8>, String> {
        self.runtime.block_on(async {
            let object = self.client.get_object().bucket(&self.bucket).key(key).send().await;
            let object = object.map_err(|error| format!("{:?}", error.into_service_error()))?;
            Ok(object.body.collect().await.map_err(|error| error.to_string())?.to_vec())
        })
    }

    /// With metadata, as another tool would have stored it.
    pub fn put(&self, key: &str, body: &[u8], metadata: &[(&str, &str)]) {
        self.try_put(key, body, metadata).unwrap();
    }

    /// Some services refuse some keys.
    pub fn try_put(&self, key: &str, body: &[u8], metadata: &[(&str, &str)]) -> Result<(), String> {
        let mut put = self.client.put_object().bucket(&self.bucket).key(key);
        for (name, value) in metadata {
            put = put.metadata(*name, *value);
        }
        let sent = self.runtime.block_on(put.body(ByteStream::from(body.to_vec())).send());
        sent.map(|_| ()).map_err(|error| format!("cannot write {key}: {:?}", error.into_service_error()))
    }

    /// Many small objects at once.
    pub fn put_many(&self, keys: impl Iterator<Item = String>, body: &'static [u8]) {
        self.runtime.block_on(async {
            let puts = keys.map(|key| {
                let put = self.client.put_object().bucket(&self.bucket).key(key);
                put.body(ByteStream::from_static(body)).send()
            });
            stream::iter(puts).buffer_unordered(32).for_each(|put| async { drop(put.unwrap()) }).await;
        });
    }

    /// Very many, whose keys need no escaping, in MinIO. Nobody signs them, which would take longer than all else: it lets everybody
    /// write to this bucket from here on.
    pub fn put_unsigned(&self, keys: impl Iterator<Item = String>, body: &'static str) {
        let resource = format!("arn:aws:s3:::{}/*", self.bucket);
        let statement =
            format!(r#"{{"Effect":"Allow","Principal":"*","Action":["s3:PutObject"],"Resource":["{resource}"]}}"#);
        let policy = format!(r#"{{"Version":"2012-10-17","Statement":[{statement}]}}"#);
        self.runtime.block_on(self.client.put_bucket_policy().bucket(&self.bucket).policy(policy).send()).unwrap();
        let address = self.url.trim_start_matches("http://").trim_end_matches('/');
        let keys = std::sync::Mutex::new(keys.collect::<Vec<_>>());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
                    while let Some(key) = { keys.lock().unwrap().pop() } {
                        let (bucket, length) = (&self.bucket, body.len());
                        let request = format!(
                            "PUT /{bucket}/{key} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n\r\n{body}"
                        );
                        stream.get_mut().write_all(request.as_bytes()).unwrap();
                        let mut line = String::new();
                        stream.read_line(&mut line).unwrap();
                        assert!(line.starts_with("HTTP/1.1 200 "), "{line}");
                        // The answer has no body.
                        while line.trim_end() != "" {
                            line.clear();
                            stream.read_line(&mut line).unwrap();
                        }
                    }
                });
            }
        });
    }

    pub fn delete(&self, key: &str) {
        self.runtime.block_on(self.client.delete_object().bucket(&self.bucket).key(key).send()).unwrap();
    }

    /// All keys that begin so, with their sizes, in order.
    pub fn list(&self, prefix: &str) -> BTreeMap<String, u64> {
        let list = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix);
        let mut pages = list.into_paginator().send();
        let mut found = BTreeMap::new();
        self.runtime.block_on(async {
            while let Some(page) = pages.next().await {
                for object in page.unwrap().contents.unwrap_or_default() {
                    found.insert(object.key.unwrap(), object.size.unwrap().try_into().unwrap());
                }
            }
        });
        found
    }

    /// Multipart uploads that were begun and neither finished nor given up.
    pub fn uploads(&self, prefix: &str) -> Vec<String> {
        let list = self.client.list_multipart_uploads().bucket(&self.bucket).prefix(prefix);
        let uploads = self.runtime.block_on(list.send()).unwrap().uploads.unwrap_or_default();
        uploads.into_iter().filter_map(|upload| upload.key).collect()
    }
}
