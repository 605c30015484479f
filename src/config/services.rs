//! The keys of object storage: where S3 services are, and the mounter of this machine.

use std::path::PathBuf;

use super::document::{Reader, Section};
use super::parse::{absolute, boolean, plain_name, socket_path};
use super::{KeyFiles, Mounter, Service, ServiceKind};
use crate::objectfs::settings::Checksums;
use crate::volume::parse_bytes;

impl<'a> Reader<'a> {
    pub(super) fn service(&self, section: Section<'_>) -> Option<Service> {
        // It is a part of every volume id, which has at most 128 bytes, of which a bucket may take 63.
        let name = section.required("name", |text| plain_name(text, 16));
        let kind = section.read("kind", ServiceKind::parse).unwrap_or(Some(ServiceKind::Generic));
        let url = section.read("url", service_url);
        if url.is_none() && kind.is_some_and(|kind| !matches!(kind, ServiceKind::Aws | ServiceKind::Gcs)) {
            self.mistake::<()>(&section.at("url"), "is missing: only the kinds aws and gcs have one of their own");
        }
        let region = section.read("region", region);
        let path_style = section.read("pathStyle", boolean);
        let ca = section.read("ca", absolute);
        let checksums = section.read("checksums", checksums);
        let buckets = section.values("buckets", bucket_name);
        let access_key = section.read("accessKeyFile", absolute);
        let secret_key = section.read("secretKeyFile", absolute);
        let session_token = section.read("sessionTokenFile", absolute);
        if access_key.is_some() != secret_key.is_some() {
            let missing = if access_key.is_some() { "secretKeyFile" } else { "accessKeyFile" };
            self.mistake::<()>(&section.at(missing), "is missing: `accessKeyFile` and `secretKeyFile` belong together");
        }
        let chain = section.read("chain", boolean).unwrap_or(Some(false));
        if chain == Some(true) && access_key.is_some() {
            self.mistake::<()>(&section.at("chain"), "contradicts `accessKeyFile`: leave one of them out");
        }
        section.end();
        let keys = match (access_key, secret_key) {
            (Some(access_key), Some(secret_key)) => Some(KeyFiles {
                access_key: access_key?,
                secret_key: secret_key?,
                session_token: session_token.flatten(),
            }),
            _ => None,
        };
        Some(Service {
            name: name?,
            kind: kind?,
            url: url.flatten(),
            region: region.flatten(),
            path_style: path_style.flatten(),
            ca: ca.flatten(),
            checksums: checksums.flatten(),
            buckets: buckets?,
            keys,
            chain: chain?,
        })
    }

    pub(super) fn mounter(&self, section: Section<'_>) -> Option<Mounter> {
        let usual = Mounter::default();
        let size = |text: &str| match parse_bytes(text) {
            Ok(0) => Err("nothing would fit: write a size".to_owned()),
            size => size.map_err(|error| error.to_string()),
        };
        let socket = section.read("socket", socket_path).unwrap_or(Some(usual.socket));
        let starts = section.read("start", boolean).unwrap_or(Some(usual.starts));
        let staging = section.read("staging", absolute).unwrap_or(Some(usual.staging));
        let cache = section
            .read("cache", |text| if text == "none" { Ok(None) } else { absolute(text).map(Some) })
            .unwrap_or(Some(usual.cache));
        let cache_size = section.read("cacheSize", size).unwrap_or(Some(usual.cache_size));
        let memory = section
            .read("memory", |text| match size(text) {
                Ok(size) if size < MEMORY => Err("a mount needs at least 16Mi".to_owned()),
                size => size,
            })
            .unwrap_or(Some(usual.memory));
        let users = section
            .read("users", |text| {
                let parts =
                    text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
                match parts {
                    Some((first, last)) if first > 0 && first <= last && last < u32::MAX => Ok((first, last)),
                    _ => Err("write FIRST-LAST, such as 1900000000-1900065535, without root".to_owned()),
                }
            })
            .unwrap_or(Some(usual.users));
        if let (Some(staging), Some(Some(cache))) = (&staging, &cache)
            && (staging.starts_with(cache) || cache.starts_with(staging))
        {
            self.mistake::<()>(&section.at("cache"), "must not lie in `staging`, nor that in this: caches are emptied");
        }
        section.end();
        Some(Mounter {
            socket: socket?,
            starts: starts?,
            staging: staging?,
            cache: cache?,
            cache_size: cache_size?,
            memory: memory?,
            users: users?,
        })
    }
}

/// A mount can't be given less memory than this.
pub(crate) const MEMORY: u64 = 16 << 20;

impl Default for Mounter {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/run/berth/mounter.sock"),
            starts: false,
            staging: PathBuf::from("/var/lib/berth/s3/staging"),
            cache: Some(PathBuf::from("/var/lib/berth/s3/cache")),
            cache_size: 10 << 30,
            memory: 32 << 20,
            users: (1_900_000_000, 1_900_065_535),
        }
    }
}

impl ServiceKind {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "generic" => Ok(Self::Generic),
            "aws" => Ok(Self::Aws),
            "minio" => Ok(Self::Minio),
            "ceph-rgw" => Ok(Self::CephRgw),
            "gcs" => Ok(Self::Gcs),
            _ => Err("write aws, ceph-rgw, gcs, generic or minio".to_owned()),
        }
    }

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Aws => "aws",
            Self::Minio => "minio",
            Self::CephRgw => "ceph-rgw",
            Self::Gcs => "gcs",
        }
    }
}

/// `http://HOST[:PORT]` or the same with https: no path, no user, no query.
pub(crate) fn service_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    match rest.map(|rest| rest.trim_end_matches('/')) {
        Some(host) if !host.is_empty() && host.chars().all(fits) && !host.starts_with(':') => {
            Ok(text.trim_end_matches('/').to_owned())
        }
        _ => Err("write https://HOST or https://HOST:PORT, without a path".to_owned()),
    }
}

pub(crate) fn region(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if text.is_empty() || text.len() > 32 || !text.chars().all(fits) {
        return Err("write up to 32 letters, digits and `-`".to_owned());
    }
    Ok(text.to_owned())
}

pub(crate) fn checksums(text: &str) -> Result<Checksums, String> {
    match text {
        "when-supported" => Ok(Checksums::WhenSupported),
        "when-required" => Ok(Checksums::WhenRequired),
        _ => Err("write when-supported or when-required".to_owned()),
    }
}

/// Amazon S3 User Guide, "General purpose bucket naming rules".
pub(crate) fn bucket_name(text: &str) -> Result<String, String> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let is_good = (3..=63).contains(&text.len())
        && text.chars().all(inner)
        && edge(text.chars().next())
        && edge(text.chars().last())
        && !text.contains("..");
    if !is_good {
        return Err("a bucket's name has 3 to 63 lower-case letters, digits, `-` and `.`".to_owned());
    }
    Ok(text.to_owned())
}
