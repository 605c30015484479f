//! What a mount is told: one message, sent over a socket, never through arguments or the environment.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where a bucket is, and how to talk to its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Endpoint {
    /// `https://s3.example.com`. Absent: AWS.
    pub url: Option<String>,
    /// Signed into each request.
    pub region: String,
    /// `https://host/bucket/key` instead of `https://bucket.host/key`.
    pub path_style: bool,
    /// PEM certificates to trust beside the system's.
    pub ca: Option<String>,
    /// When checksums are sent and asked for.
    pub checksums: Checksums,
    /// Without credentials: public buckets.
    pub anonymous: bool,
    /// How long a call is tried again while the service is away, in milliseconds. Then the program gets EIO.
    pub patience: u64,
    /// One attempt without any byte of progress for this long (milliseconds) is given up and tried again.
    pub stall: u64,
}

impl Endpoint {
    /// [`Self::patience`] as a duration.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.patience)
    }
}

/// When checksums are sent and asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checksums {
    /// With each transfer (AWS, MinIO).
    WhenSupported,
    /// Only where S3 insists (older RGW, GCS).
    WhenRequired,
}

/// Credentials. `Debug` shows none of it; they are serialised only into the message to a worker.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Access key id.
    pub access_key: String,
    /// Secret access key.
    pub secret_key: String,
    /// Of temporary credentials.
    pub session_token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("credentials")
    }
}

/// When close returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// When the bucket has the file.
    Strict,
    /// When the node's disk has it; fsync waits for the bucket all the same.
    WriteBack,
}

/// The limit of a volume: where it is kept and what it was when the mount was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Limit {
    /// Bytes.
    pub bytes: u64,
    /// Prefix of hidden objects of this volume: `.berth/volumes/ID/`. `limit.json` there may be changed while mounted;
    /// `usage.json` there is shared by all mounts.
    pub notes: String,
}

/// All that a mount needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// What this mount is called on this node: a volume id, or the hash of bucket and prefix. Names its staging folder.
    pub id: String,
    /// The service.
    pub endpoint: Endpoint,
    /// Absent: the SDK's chain (environment, profile, web identity, instance).
    pub credentials: Option<Credentials>,
    /// The bucket.
    pub bucket: String,
    /// Empty, or ends in `/`. The root directory is this.
    pub prefix: String,
    /// Nothing is ever written.
    pub read_only: bool,
    /// When close returns.
    pub consistency: Consistency,
    /// Owner of files that say none.
    pub uid: u32,
    /// Group of files that say none.
    pub gid: u32,
    /// Permission bits of files that say none, such as 0o644.
    pub file_mode: u32,
    /// Permission bits of directories that say none, such as 0o755.
    pub dir_mode: u32,
    /// How old a name or an attribute may be before it is looked at again, in milliseconds.
    pub max_age: u64,
    /// Where staged writes lie; of this mount alone. `STAGING/ID/` is made below it.
    pub staging: PathBuf,
    /// Where blocks of objects are cached; shared by all mounts of the node. Absent: no cache.
    pub cache: Option<PathBuf>,
    /// The cache holds at most so many bytes.
    pub cache_size: u64,
    /// Memory for data in flight, in bytes.
    pub memory: u64,
    /// The size of the volume. Absent: the service's own.
    pub limit: Option<Limit>,
}

/// What the node keeps for itself in a bucket; hidden in the root directory of a mount whose prefix is empty.
pub const HIDDEN: &str = ".berth/";

impl Settings {
    /// The prefix of hidden objects of this tree: indexes, journals, the unlinked. The same for each mount of the tree.
    pub fn hidden(&self) -> String {
        Self::hidden_of(&self.prefix)
    }

    /// The same for a tree that is not mounted.
    pub fn hidden_of(prefix: &str) -> String {
        use sha2::Digest;
        let hash = sha2::Sha256::digest(prefix.as_bytes());
        let short: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("{HIDDEN}trees/{short}/")
    }
}
