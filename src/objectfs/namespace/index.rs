//! The index of a directory: a hidden object with its entries' attributes, so that a node that has never seen them needs
//! one GET instead of a HEAD for each. Written in the background, believed only for the version that a listing shows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use sha2::Digest;

use super::super::attributes::Attributes;
use super::super::store::{Condition, Metadata, Payload, StoreErrorKind};
use super::Namespace;
use super::facts::seconds;
use super::tree::Slot;
use crate::fuse::filesystem::Ino;

/// Fewer entries are looked at one by one.
const ENTRIES_MIN: usize = 4;
/// More would make an object too large to be worth it.
const ENTRIES_MAX: usize = 50_000;
/// An index is larger than that only if it is none.
const BYTES_MAX: u64 = 64 << 20;
/// It is written when a directory was left in peace for so long.
const PEACE: Duration = Duration::from_secs(5);
/// How often it is read at most.
const AGAIN: Duration = Duration::from_secs(30);

#[derive(Serialize, Deserialize)]
struct Index {
    /// Of this format.
    version: u32,
    /// By name; directories' names end in `/`.
    entries: BTreeMap<String, Row>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    etag: String,
    modified: u64,
    metadata: Metadata,
}

impl Namespace {
    fn index_key(&self, ino: Ino) -> Option<String> {
        let key = self.tree().key(ino)?;
        let path = key.strip_prefix(self.settings.prefix.as_str())?;
        let hash = sha2::Sha256::digest(path.as_bytes());
        let short: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Some(format!("{}index/{short}", self.hidden))
    }

    /// Could a directory's index say what is not known of an entry, and of others?
    pub(super) fn wants_index(&self, ino: Ino, name: &str, horizon: Instant) -> bool {
        if self.store.abilities().listed_metadata {
            return false;
        }
        let tree = self.tree();
        let listed = tree.facts(ino, name).is_some_and(|facts| facts.is_fresh(horizon));
        let Some(directory) = tree.directory(ino) else { return false };
        if !listed || directory.index.is_some_and(|at| at.elapsed() < AGAIN) {
            return false;
        }
        let unknown = |slot: &&Slot| matches!(slot, Slot::Known(facts) if facts.attributes.is_none());
        directory.names.values().filter(unknown).take(ENTRIES_MIN).count() == ENTRIES_MIN
    }

    /// Reads a directory's index, if it has one, and takes over what belongs to the versions that are known.
    pub(super) async fn load_index(&self, ino: Ino) {
        let Some(key) = self.index_key(ino) else { return };
        if let Some(directory) = self.tree().directory_mut(ino) {
            directory.index = Some(Instant::now());
        }
        let Some(index) = self.read_index(&key).await else { return };
        let mut tree = self.tree();
        for (name, row) in index.entries {
            let (name, folder) = name.strip_suffix('/').map_or((name.as_str(), false), |name| (name, true));
            let Some(facts) = tree.facts_mut(ino, name) else { continue };
            let Some(stored) = &facts.stored else { continue };
            let Some(modified) = stored.modified else { continue };
            if facts.directory == folder
                && facts.attributes_seen.is_none()
                && stored.etag.0 == row.etag
                && seconds(modified) == row.modified
            {
                facts.adopt(Arc::new(Attributes::read(&row.metadata, modified, folder, &self.defaults)));
            }
        }
    }

    /// Whatever is wrong with an index, there are HEADs.
    async fn read_index(&self, key: &str) -> Option<Index> {
        let (head, mut body) = self.store.get(key, None, None).await.ok()?;
        if head.size > BYTES_MAX {
            return None;
        }
        let mut bytes = BytesMut::new();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece.ok()?);
        }
        let index: Index = serde_json::from_slice(&bytes).ok()?;
        (index.version == 1).then_some(index)
    }

    /// A directory's entries have changed: its index is written when it is left in peace.
    pub(super) fn index_later(self: &Arc<Self>, ino: Ino) {
        if self.no_index.load(Ordering::Relaxed) {
            return;
        }
        {
            let mut tree = self.tree();
            let Some(directory) = tree.directory_mut(ino) else { return };
            directory.unwritten += 1;
            if directory.indexing {
                return;
            }
            directory.indexing = true;
            tree.pin(ino);
        }
        let this = self.clone();
        self.spawn(async move {
            let mut ending = this.ending.subscribe();
            // At most a minute, however busy it is.
            for _ in 0..12 {
                let before = this.tree().directory(ino).map(|directory| directory.unwritten);
                let ended = tokio::time::timeout(PEACE, ending.wait_for(|ending| *ending)).await.is_ok();
                let after = this.tree().directory(ino).map(|directory| directory.unwritten);
                if ended || before == after {
                    break;
                }
            }
            this.write_index(ino).await;
            let mut tree = this.tree();
            if let Some(directory) = tree.directory_mut(ino) {
                directory.indexing = false;
            }
            tree.unpin(ino);
        });
    }

    async fn write_index(self: &Arc<Self>, ino: Ino) {
        let Some(key) = self.index_key(ino) else { return };
        // What was written here has a time only once it is listed.
        if self.list_once(ino, ENTRIES_MAX / 1000).await.is_err() {
            return;
        }
        let mut entries = BTreeMap::new();
        {
            let mut tree = self.tree();
            let Some(directory) = tree.directory(ino) else { return };
            if directory.names.len() > ENTRIES_MAX {
                return;
            }
            for name in directory.names.keys() {
                let Some(facts) = tree.facts(ino, name) else { continue };
                let ours = tree.live(ino, name).and_then(|live| tree.node(live)?.file.clone());
                let (Some(stored), Some(attributes)) = (&facts.stored, &facts.attributes) else { continue };
                let Some(modified) = stored.modified else { continue };
                if ours.is_some_and(|file| file.is_ours()) || !facts.is_settled(modified) {
                    continue;
                }
                let row =
                    Row { etag: stored.etag.0.clone(), modified: seconds(modified), metadata: attributes.metadata() };
                entries.insert(if facts.directory { format!("{name}/") } else { name.to_string() }, row);
            }
            if let Some(directory) = tree.directory_mut(ino) {
                directory.unwritten = 0;
            }
        }
        if entries.len() < ENTRIES_MIN {
            return;
        }
        let Ok(bytes) = serde_json::to_vec(&Index { version: 1, entries }) else { return };
        let metadata = Metadata { content_type: Some("application/json".to_owned()), ..Metadata::default() };
        let put = self.store.put(&key, Payload::Bytes(Bytes::from(bytes)), &metadata, &Condition::None).await;
        if let Err(error) = put {
            tracing::info!("{error}");
            if error.kind == StoreErrorKind::Denied {
                self.no_index.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Has somebody looked at so many entries one by one that an index would help the next one?
    pub(super) fn many_were_looked_at(self: &Arc<Self>, ino: Ino, count: usize) {
        if count >= ENTRIES_MIN {
            self.index_later(ino);
        }
    }
}

/// Attributes of an object that was just changed in the bucket by somebody else can't be replaced in place at once: the
/// change would have the same time as what it changes. How long to wait.
pub(super) fn until_distinguishable(modified: SystemTime) -> Duration {
    let age = SystemTime::now().duration_since(modified).unwrap_or_default();
    super::facts::SETTLED.saturating_sub(age)
}
