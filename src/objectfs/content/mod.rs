//! The bytes of files: staged writes, commits, read-ahead, the node's cache, the memory budget. Knows no names.
//!
//! | part | owns |
//! |---|---|
//! | `file` | which bytes of a file are staged and which are its base's |
//! | `staging`, `journal` | the staged files on disk, and what a successor reads in them |
//! | `commit`, `plan`, `early` | putting staged bytes into the bucket, by the shape that costs least |
//! | `source` | reading one version: windows, shared blocks, parallel GETs |
//! | `cache` | blocks on the node's disk |
//! | `budget` | memory |

mod block;
mod budget;
mod cache;
mod commit;
mod early;
mod file;
mod journal;
mod plan;
mod ranges;
mod read;
mod recover;
mod source;
mod staging;
mod tally;
mod tuning;

#[cfg(test)]
mod reading;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::cache::evict;
pub use self::source::Window;

use self::file::{Inner, State};
use self::source::Source;
use self::tuning::Tuning;
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

/// The largest object that S3 has.
const LARGEST: u64 = 5 << 40;

/// Writes of more bytes than this go to the disk on a thread that may block.
const LONG_WRITE: usize = 256 << 10;

/// What all files of a mount share: the store, the cache, the memory budget, the staging folder.
pub struct Contents {
    store: Arc<dyn Store>,
    tuning: Tuning,
    folder: Arc<staging::Folder>,
    tally: tally::Tally,
    /// One permit for each upload.
    uploads: tokio::sync::Semaphore,
    budget: budget::Budget,
    cache: Option<Arc<cache::Cache>>,
    /// Prefix of hidden objects.
    hidden: String,
}

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
    inner: Arc<Inner>,
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

impl std::fmt::Display for ContentError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Changed(message) | Self::Full(message) | Self::Disk(message) => f.write_str(message),
            Self::TooLarge => f.write_str("cannot grow past the largest object"),
            Self::Store(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ContentError {}

impl Contents {
    /// Opens the staging folder (made if missing, private) and the cache.
    ///
    /// # Errors
    /// What the disk says.
    pub async fn open(settings: Arc<Settings>, store: Arc<dyn Store>) -> std::io::Result<Arc<Self>> {
        Self::tuned(&settings, store, Tuning::default()).await
    }

    async fn tuned(settings: &Settings, store: Arc<dyn Store>, tuning: Tuning) -> std::io::Result<Arc<Self>> {
        let path = settings.staging.join(&settings.id);
        let folder = tokio::task::spawn_blocking(|| staging::Folder::open(path)).await??;
        let uploads = tokio::sync::Semaphore::new(tuning.uploads);
        let place = (settings.endpoint.url.as_deref().unwrap_or_default(), settings.bucket.as_str());
        let cache = settings.cache.as_ref().filter(|_| settings.cache_size > 0);
        let waiting = (4 * tuning.block).min(settings.memory / 8);
        let sizes = (tuning.block, tuning.piece);
        let cache = cache.map(|folder| cache::Cache::new((folder, settings.cache_size), place, sizes, waiting));
        let (cache, budget) = (cache.map(Arc::new), budget::Budget::new(settings.memory));
        let (idle, hidden) = (tuning.idle, settings.hidden());
        let contents =
            Arc::new(Self { store, tuning, folder, tally: tally::Tally::default(), uploads, budget, cache, hidden });
        let weak = Arc::downgrade(&contents);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(idle).await;
                let Some(contents) = weak.upgrade() else { return };
                contents.budget.release_unused(idle);
            }
        });
        Ok(contents)
    }

    /// What an earlier worker left staged, oldest first. Called once, before anything else.
    pub async fn recover(self: &Arc<Self>) -> Vec<Recovered> {
        let contents = self.clone();
        tokio::task::spawn_blocking(move || recover::recover(&contents)).await.unwrap_or_default()
    }

    /// A file as the bucket has it. `head`: its first bytes, if they came along with the look at it.
    pub fn existing(self: &Arc<Self>, version: Version, head: Option<Bytes>) -> Content {
        Content { inner: Inner::new(self, State::existing(Source::new(self, version, head))) }
    }

    /// A file that is not in the bucket yet: empty and dirty. Nothing is written to disk before its first byte.
    pub fn new_file(self: &Arc<Self>) -> Content {
        Content { inner: Inner::new(self, State { fresh: true, ..State::default() }) }
    }

    /// How things stand.
    pub fn progress(&self) -> Progress {
        self.tally.progress()
    }
}

impl Content {
    /// Its size with what was written.
    pub fn size(&self) -> u64 {
        self.inner.look(|state| state.size)
    }

    /// Is there anything that the bucket does not have (or is not in the bucket at all)?
    pub fn is_dirty(&self) -> bool {
        self.inner.look(State::is_dirty)
    }

    /// What of it the bucket has.
    pub fn base(&self) -> Option<Version> {
        self.inner.look(State::version)
    }

    /// The content is unchanged, but is to be found elsewhere or under another tag from now on (renamed, metadata replaced).
    pub fn moved(&self, version: Version) {
        self.inner.moved(version);
    }

    /// The bucket has something newer and this file has nothing staged: read that from now on.
    pub fn replaced(&self, version: Version) {
        self.inner.replaced(version);
    }

    /// Reads up to `size` bytes; fewer mean the end of the file.
    ///
    /// # Errors
    /// [`ContentError::Changed`] if the version is gone; what the service or the disk says.
    pub async fn read(&self, window: &mut Window, offset: u64, size: u32) -> Result<Vec<Bytes>, ContentError> {
        self.inner.read(window, offset, size).await
    }

    /// Writes. May wait (memory, parts on their way). `intent`: the key, metadata and condition that a commit is to have,
    /// kept with the staged bytes for a successor, and used to begin an upload early.
    ///
    /// # Errors
    /// The disk is full or failed, or the file would be too large. What was written before is kept.
    pub async fn write(&self, offset: u64, data: &Bytes, intent: &Intent) -> Result<(), ContentError> {
        let guard = self.inner.changing.clone().lock_owned().await;
        let range = offset..offset.saturating_add(data.len() as u64);
        if data.len() < LONG_WRITE {
            self.inner.write(offset, data, intent)?;
            self.inner.advance(range);
            return Ok(());
        }
        let (inner, data, intent) = (self.inner.clone(), data.clone(), intent.clone());
        blocking(move || {
            let _guard = guard;
            inner.write(offset, &data, &intent)?;
            inner.advance(range);
            Ok(())
        })
        .await
    }

    /// Cuts or extends with zeros.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn resize(&self, size: u64, intent: &Intent) -> Result<(), ContentError> {
        let guard = self.inner.changing.clone().lock_owned().await;
        let (inner, intent) = (self.inner.clone(), intent.clone());
        blocking(move || {
            let _guard = guard;
            inner.outdate(size..u64::MAX);
            inner.resize(size, &intent)
        })
        .await
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn punch(&self, offset: u64, length: u64, intent: &Intent) -> Result<(), ContentError> {
        let guard = self.inner.changing.clone().lock_owned().await;
        let (inner, intent) = (self.inner.clone(), intent.clone());
        blocking(move || {
            let _guard = guard;
            inner.outdate(offset..offset.saturating_add(length));
            inner.punch(offset, length, &intent)
        })
        .await
    }

    /// SEEK_DATA and SEEK_HOLE. `None`: ENXIO.
    pub fn seek(&self, offset: u64, hole: bool) -> Option<u64> {
        self.inner.seek(offset, hole)
    }

    /// Puts all that was written before this call into the bucket, whole, under the intent's key. Writes that come meanwhile
    /// wait, and are kept for the next commit. On success the version is the new base. Goes on when it is not waited for
    /// any more.
    ///
    /// # Errors
    /// [`ContentError::Changed`] if the bucket has something else than the intent wants; what the service says. What is
    /// staged stays staged.
    pub async fn commit(&self, intent: &Intent) -> Result<Version, ContentError> {
        let (inner, intent) = (self.inner.clone(), intent.clone());
        let work = tokio::spawn(async move {
            let _guard = inner.changing.clone().lock_owned().await;
            commit::commit(&inner, &intent).await
        });
        work.await.unwrap_or_else(|error| Err(ContentError::Disk(format!("cannot commit: {error}"))))
    }

    /// Makes the intent last with what is staged, in case this process ends before it is committed (write-back): in the
    /// page cache of the node's disk, which is what close promises there. Gives descriptors and memory back.
    ///
    /// # Errors
    /// The disk is full or failed.
    pub async fn remember(&self, intent: &Intent) -> Result<(), ContentError> {
        let _guard = self.inner.changing.lock().await;
        self.inner.remember(intent)
    }

    /// What was staged is not wanted any more (unlinked and closed): forgets it, gives uploads up.
    pub async fn discard(&self) {
        let _guard = self.inner.changing.lock().await;
        self.inner.abandon_early().await;
        self.inner.discard();
    }

    /// Keeps the whole content, base and staged bytes, as a file in the node's `conflicts` folder, forgets the staged bytes
    /// and says where it is.
    ///
    /// # Errors
    /// The disk is full or failed; then it stays staged.
    pub async fn set_aside(&self, intent: &Intent) -> Result<PathBuf, ContentError> {
        let _guard = self.inner.changing.lock().await;
        self.inner.abandon_early().await;
        recover::set_aside(&self.inner, intent).await
    }
}

/// Runs what may wait for the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ContentError> + Send + 'static,
) -> Result<T, ContentError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(ContentError::Disk(format!("cannot work on the disk: {error}"))))
}
