//! The bytes of files: staged writes, commits, read-ahead, the node's cache, the memory budget. Knows no names.
//!
//! Skeleton of the interface; the bodies follow.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::settings::Settings;
use super::store::{Condition, Etag, Metadata, Store, StoreError};

/// One version of an object's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Where it is.
    pub key: String,
    /// Which it is.
    pub etag: Etag,
    /// Bytes.
    pub size: u64,
}

/// Why bytes could not be had or kept.
#[derive(Clone, Debug)]
pub enum ContentError {
    /// The bucket has another version: ESTALE. The staged bytes, if any, stay staged until `set_aside`.
    Changed(String),
    /// The node's disk is full, or the volume is: ENOSPC.
    Full(String),
    /// Past the largest object: EFBIG.
    TooLarge,
    /// The service said no.
    Store(StoreError),
    /// The node's disk failed: EIO.
    Disk(String),
}

/// What all files of a mount share: the store, the cache, the memory budget, the staging folder.
pub struct Contents {
    _settings: Arc<Settings>,
    _store: Arc<dyn Store>,
}

/// How a handle reads: its window. One for each open handle.
#[derive(Debug, Default)]
pub struct Window {}

/// A file that an earlier worker has staged and not committed.
pub struct Recovered {
    /// The key it is to be committed under.
    pub key: String,
    /// The metadata it is to have.
    pub metadata: Metadata,
    /// What has to be in the bucket for that.
    pub condition: Condition,
    /// Its bytes.
    pub content: Content,
}

/// For people: `berth volume show`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes that lie only on this node's disk.
    pub dirty_bytes: u64,
    /// Files that lie, in part, only on this node's disk.
    pub dirty_files: u64,
    /// PUTs, parts and copies under way.
    pub uploads: u64,
    /// Bytes asked of the cache that it had.
    pub cache_hit_bytes: u64,
    /// Bytes asked of the cache that it had not.
    pub cache_miss_bytes: u64,
}

/// What one file holds on this mount: a version in the bucket, or nothing yet, and what was written over it. Shared by
/// all handles of the file; every method may be called from many tasks at once.
pub struct Content {
    _contents: Arc<Contents>,
}

impl Contents {
    /// Opens the staging folder (made if missing, private) and the cache.
    ///
    /// # Errors
    /// What the disk says.
    pub async fn open(_settings: Arc<Settings>, _store: Arc<dyn Store>) -> std::io::Result<Arc<Self>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// What an earlier worker left staged, oldest first. Called once, before anything else.
    pub async fn recover(self: &Arc<Self>) -> Vec<Recovered> {
        Vec::new()
    }

    /// A file as the bucket has it. `head`: its first bytes, if they came along with the look at it.
    pub fn existing(self: &Arc<Self>, _version: Version, _head: Option<Bytes>) -> Content {
        Content { _contents: self.clone() }
    }

    /// A file that is not in the bucket yet: empty and dirty. Nothing is written to disk before its first byte.
    pub fn new_file(self: &Arc<Self>) -> Content {
        Content { _contents: self.clone() }
    }

    /// How things stand.
    pub fn progress(&self) -> Progress {
        Progress::default()
    }
}

impl Content {
    /// Its size with what was written.
    pub fn size(&self) -> u64 {
        0
    }

    /// Is there anything that the bucket does not have (or is not in the bucket at all)?
    pub fn is_dirty(&self) -> bool {
        false
    }

    /// What of it the bucket has.
    pub fn base(&self) -> Option<Version> {
        None
    }

    /// The content is unchanged, but is to be found elsewhere or under another tag from now on (renamed, metadata replaced).
    pub fn moved(&self, _version: Version) {}

    /// The bucket has something newer and this file has nothing staged: read that from now on.
    pub fn replaced(&self, _version: Version) {}

    /// Reads up to `size` bytes; fewer mean the end of the file.
    pub async fn read(&self, _window: &mut Window, _offset: u64, _size: u32) -> Result<Vec<Bytes>, ContentError> {
        Err(ContentError::TooLarge)
    }

    /// Writes. May wait (memory, parts on their way). `intent`: the key, metadata and condition that a commit is to have,
    /// kept with the staged bytes for a successor, and used to begin an upload early.
    pub async fn write(&self, _offset: u64, _data: &Bytes, _intent: &Intent) -> Result<(), ContentError> {
        Err(ContentError::TooLarge)
    }

    /// Cuts or extends with zeros.
    pub async fn resize(&self, _size: u64, _intent: &Intent) -> Result<(), ContentError> {
        Err(ContentError::TooLarge)
    }

    /// Makes a range read as zeros.
    pub async fn punch(&self, _offset: u64, _length: u64, _intent: &Intent) -> Result<(), ContentError> {
        Err(ContentError::TooLarge)
    }

    /// SEEK_DATA and SEEK_HOLE. `None`: ENXIO.
    pub fn seek(&self, _offset: u64, _hole: bool) -> Option<u64> {
        None
    }

    /// Puts all that was written before this call into the bucket, whole, under the intent's key. Writes that come meanwhile
    /// are kept for the next commit. On success the version is the new base.
    pub async fn commit(&self, _intent: &Intent) -> Result<Version, ContentError> {
        Err(ContentError::TooLarge)
    }

    /// Makes the intent durable with what is staged, in case this process ends before it is committed (write-back).
    pub async fn remember(&self, _intent: &Intent) -> Result<(), ContentError> {
        Ok(())
    }

    /// What was staged is not wanted any more (unlinked and closed): forgets it, gives uploads up.
    pub async fn discard(&self) {}

    /// Keeps the whole content, base and staged bytes, as a file in the node's `conflicts` folder, forgets the staged bytes
    /// and says where it is.
    pub async fn set_aside(&self, _intent: &Intent) -> Result<PathBuf, ContentError> {
        Err(ContentError::TooLarge)
    }
}

/// What a commit is to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The key.
    pub key: String,
    /// The metadata.
    pub metadata: Metadata,
    /// Does the key have to be free? Otherwise the base has to be there still, or, without one, anything may be.
    pub exclusive: bool,
}
