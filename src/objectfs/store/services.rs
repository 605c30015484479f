//! Services that people name instead of spelling out how they want to be talked to. What they can do is found by trial all
//! the same; this is only about addresses, regions and checksums.

use crate::objectfs::settings::{Checksums, Endpoint};

/// The names that [`named`] knows.
pub const NAMES: [&str; 4] = ["aws", "ceph-rgw", "minio", "gcs"];

/// How long a call is tried again, unless it is said otherwise: five minutes, in milliseconds.
pub const PATIENCE: u64 = 300_000;
/// How long an attempt may make no progress, unless it is said otherwise: twenty seconds, in milliseconds.
pub const STALL: u64 = 20_000;

/// An endpoint as a service of this name usually is. Where `url` is `None` for another than `aws`, it has to be given.
pub fn named(name: &str) -> Option<Endpoint> {
    let (url, region, path_style, checksums) = match name {
        "aws" => (None, "us-east-1", false, Checksums::WhenSupported),
        "ceph-rgw" => (None, "us-east-1", true, Checksums::WhenRequired),
        "minio" => (None, "us-east-1", true, Checksums::WhenSupported),
        "gcs" => (Some("https://storage.googleapis.com"), "auto", true, Checksums::WhenRequired),
        _ => return None,
    };
    Some(Endpoint {
        url: url.map(str::to_owned),
        region: region.to_owned(),
        path_style,
        ca: None,
        checksums,
        anonymous: false,
        patience: PATIENCE,
        stall: STALL,
    })
}

/// Does a service of this name need an address?
pub fn needs_url(name: &str) -> bool {
    name != "aws" && named(name).is_none_or(|endpoint| endpoint.url.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_known_and_no_other() {
        for name in NAMES {
            assert!(named(name).is_some(), "{name}");
        }
        assert!(named("s3").is_none());
        assert!(needs_url("minio") && needs_url("ceph-rgw") && !needs_url("aws") && !needs_url("gcs"));
    }
}
