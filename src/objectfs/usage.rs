//! How full the volume is, counted by all of its mounts together.
//!
//! `usage.json` among the volume's notes is what all mounts have told; each keeps for itself what it has not told yet, and
//! adds that to the object every few seconds, sooner when the limit is near, on the condition that nobody else has changed
//! it. Whether something fits is decided from both at once, without asking anybody. Every hour one mount counts what is
//! really there. `limit.json` beside it is the limit, which may change at any time.
//!
//! Figures are bytes of files as they are written. Where an answer is lost, or a count meets a file that is being written,
//! the figure may be off until the next count.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::settings::{HIDDEN, Limit, Settings};
use super::store::{Condition, Etag, ListRequest, Metadata, Payload, Store, StoreErrorKind, StoreResult};

/// What this mount has changed is told after this time,
const TELL: Duration = Duration::from_secs(5);
/// or this, where little room is left.
const HURRY: Duration = Duration::from_secs(1);
/// A mount that changes nothing looks this often.
const IDLE: Duration = Duration::from_secs(10);
/// Seconds after which the bytes are counted anew.
const COUNT: u64 = 3600;
/// Less than one part in so many is little room.
const NEAR: u64 = 20;
/// How often a change is tried when others are faster.
const TRIES: usize = 10;
/// So many of the last changes are remembered by name, to know one's own again whose answer was lost.
const REMEMBERED: usize = 16;

/// The name of the shared figure among a volume's notes.
pub const USAGE: &str = "usage.json";
/// The name of the limits among a volume's notes.
pub const LIMIT: &str = "limit.json";

/// `usage.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shared {
    /// In use.
    pub bytes: u64,
    /// When somebody last began to count, in seconds since 1970.
    pub counted: u64,
    /// The last changes: each is the name of one.
    pub recent: Vec<String>,
}

/// `limit.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Limits {
    /// Bytes. Absent: only the service's own.
    pub bytes: Option<u64>,
    /// How old names and attributes may be, in milliseconds. Counts from the next mount on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<u64>,
    /// Memory for data in flight, in bytes. Counts from the next mount on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
}

/// The figures of one mount's volume. Without a limit nothing is counted and everything fits.
pub struct Usage {
    counter: Option<Counter>,
    wake: Notify,
}

/// There is no room for that: ENOSPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

struct Counter {
    settings: Arc<Settings>,
    store: Arc<dyn Store>,
    notes: String,
    /// What this mount's changes are called.
    name: String,
    figures: Mutex<Figures>,
    /// One round at a time.
    round: tokio::sync::Mutex<Round>,
}

/// What is known now.
#[derive(Debug)]
struct Figures {
    /// What all mounts have told.
    shared: u64,
    /// What this one has not told yet.
    own: i64,
    limit: Option<u64>,
    /// The volume has had a `limit.json`.
    is_managed: bool,
    is_closed: bool,
}

/// What rounds remember.
#[derive(Default)]
struct Round {
    number: u64,
    /// A change whose answer was lost: its name and its bytes.
    doubtful: Option<(String, i64)>,
}

impl Figures {
    fn used(&self) -> u64 {
        self.shared.saturating_add_signed(self.own)
    }

    fn is_near(&self) -> bool {
        self.limit.is_some_and(|limit| limit.saturating_sub(self.used()) <= limit / NEAR)
    }
}

impl Usage {
    /// Reads the shared figure; counts by a flat listing where there is none. Starts the task that shares this mount's
    /// changes and takes over the others'. A service that does not answer now is asked again later.
    pub async fn open(settings: Arc<Settings>, store: Arc<dyn Store>) -> Arc<Self> {
        let usage = Arc::new(Self::idle(settings, store));
        if usage.counter.is_some() {
            usage.look().await;
            let weak = Arc::downgrade(&usage);
            tokio::spawn(async move {
                while let Some(pause) = weak.upgrade().and_then(|usage| usage.pause()) {
                    // Not held while it waits: dropping the last one ends this.
                    let Some(usage) = weak.upgrade() else { return };
                    let woken = tokio::time::timeout(pause, usage.wake.notified()).await.is_ok();
                    if woken {
                        // Writers may ask a thousand times a second.
                        tokio::time::sleep(HURRY / 4).await;
                    }
                    usage.round().await;
                }
            });
        }
        usage
    }

    /// Without the task.
    fn idle(settings: Arc<Settings>, store: Arc<dyn Store>) -> Self {
        let counter = settings.limit.clone().map(|Limit { bytes, notes }| Counter {
            notes,
            name: name(&settings.id),
            figures: Mutex::new(Figures { shared: 0, own: 0, limit: Some(bytes), is_managed: false, is_closed: false }),
            round: tokio::sync::Mutex::default(),
            settings,
            store,
        });
        Self { counter, wake: Notify::new() }
    }

    /// A file is to grow by so many bytes. Counted at once.
    ///
    /// # Errors
    /// The volume would be larger than its limit.
    pub fn grow(&self, bytes: u64) -> Result<(), Full> {
        let Some(counter) = &self.counter else { return Ok(()) };
        let mut figures = counter.figures();
        let would_be = figures.used().saturating_add(bytes);
        if figures.limit.is_some_and(|limit| would_be > limit) {
            // Others may have made room, or the limit may have been raised.
            self.wake.notify_one();
            return Err(Full);
        }
        figures.own = figures.own.saturating_add_unsigned(bytes);
        if figures.is_near() {
            self.wake.notify_one();
        }
        Ok(())
    }

    /// A file has shrunk or gone.
    pub fn shrink(&self, bytes: u64) {
        let Some(counter) = &self.counter else { return };
        let mut figures = counter.figures();
        let was_near = figures.is_near();
        figures.own = figures.own.saturating_sub_unsigned(bytes);
        if was_near {
            self.wake.notify_one();
        }
    }

    /// Bytes in use and the limit, if there is one.
    pub fn figures(&self) -> (u64, Option<u64>) {
        let Some(counter) = &self.counter else { return (0, None) };
        let figures = counter.figures();
        (figures.used(), figures.limit)
    }

    /// Shares what is not shared yet; the last thing that a mount does.
    pub async fn close(&self) {
        let Some(counter) = &self.counter else { return };
        counter.figures().is_closed = true;
        self.wake.notify_one();
        if let Err(error) = counter.tell().await {
            tracing::warn!(%error, volume.id = counter.settings.id, "the volume's usage is off until the next count");
        }
    }

    /// How long to wait before the next round; `None`: no more rounds.
    fn pause(&self) -> Option<Duration> {
        let figures = self.counter.as_ref()?.figures();
        let pause = match () {
            () if figures.is_near() => HURRY,
            () if figures.own != 0 => TELL,
            () => IDLE,
        };
        (!figures.is_closed).then_some(pause)
    }

    /// What is known at the beginning: little, so that a mount does not wait for a count.
    async fn look(&self) {
        let Some(counter) = &self.counter else { return };
        if let Err(error) = counter.look().await {
            tracing::warn!(%error, volume.id = counter.settings.id, "the volume's usage is not known yet");
        }
        if counter.figures().is_near() {
            self.wake.notify_one();
        }
    }

    async fn round(&self) {
        let Some(counter) = &self.counter else { return };
        let all = async {
            counter.take_limit().await?;
            counter.tell().await?;
            counter.count_if_old().await
        };
        if let Err(error) = all.await {
            tracing::debug!(%error, volume.id = counter.settings.id, "the volume's usage was not shared: tried again");
        }
    }
}

impl Counter {
    fn figures(&self) -> MutexGuard<'_, Figures> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look(&self) -> StoreResult<()> {
        self.take_limit().await?;
        match self.read::<Shared>(USAGE).await? {
            Some((shared, _)) => {
                self.figures().shared = shared.bytes;
                Ok(())
            }
            None => self.count(None).await,
        }
    }

    /// What is there under one of the notes' names, and its version. What can't be parsed counts as missing.
    async fn read<T: for<'de> Deserialize<'de>>(&self, name: &str) -> StoreResult<Option<(T, Etag)>> {
        let key = format!("{}{name}", self.notes);
        let (head, mut body) = match self.store.get(&key, None, None).await {
            Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(None),
            result => result?,
        };
        let mut bytes = Vec::new();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece?);
        }
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some((value, head.etag))),
            Err(error) => {
                tracing::warn!(%error, key, "damaged");
                Ok(None)
            }
        }
    }

    async fn take_limit(&self) -> StoreResult<()> {
        if let Some((limits, _)) = self.read::<Limits>(LIMIT).await? {
            let mut figures = self.figures();
            figures.limit = limits.bytes;
            figures.is_managed = true;
        }
        Ok(())
    }

    /// Adds what this mount has changed to the shared figure, and learns what the others have.
    async fn tell(&self) -> StoreResult<()> {
        let mut round = self.round.lock().await;
        for _ in 0..TRIES {
            let Some((mut shared, etag)) = self.read::<Shared>(USAGE).await? else {
                drop(round);
                let is_managed = self.figures().is_managed;
                if is_managed && self.read::<Limits>(LIMIT).await?.is_none() {
                    // The volume was deleted while it was mounted: nothing of it comes back.
                    return Ok(());
                }
                return self.count(None).await;
            };
            if let Some((name, bytes)) = round.doubtful.take()
                && !shared.recent.contains(&name)
            {
                // It was not carried out: it is to be told again.
                self.add_own(bytes);
            }
            let own = {
                let mut figures = self.figures();
                figures.shared = shared.bytes;
                if figures.own == 0 || self.settings.read_only {
                    return Ok(());
                }
                // Taken out before it is told, so that what comes meanwhile is not lost; the sum stays the same.
                let own = std::mem::take(&mut figures.own);
                figures.shared = figures.shared.saturating_add_signed(own);
                own
            };
            shared.bytes = shared.bytes.saturating_add_signed(own);
            round.number += 1;
            let name = format!("{}-{}", self.name, round.number);
            match self.write(shared, &name, &Condition::Is(etag)).await {
                Ok(()) => return Ok(()),
                Err(error) if matches!(error.kind, StoreErrorKind::Conflict | StoreErrorKind::NotFound) => {
                    self.take_back(own);
                }
                Err(error) if error.kind == StoreErrorKind::Unavailable => {
                    // Its sum is in `shared` here until the next read says what is so.
                    round.doubtful = Some((name, own));
                    return Err(error);
                }
                Err(error) => {
                    self.take_back(own);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn add_own(&self, bytes: i64) {
        let mut figures = self.figures();
        figures.own = figures.own.saturating_add(bytes);
    }

    fn take_back(&self, bytes: i64) {
        let mut figures = self.figures();
        figures.shared = figures.shared.saturating_add_signed(bytes.saturating_neg());
        figures.own = figures.own.saturating_add(bytes);
    }

    /// The etag of some services is a hash of the bytes: the name of the change makes each version another one.
    async fn write(&self, mut shared: Shared, name: &str, condition: &Condition) -> StoreResult<()> {
        shared.recent.insert(0, name.to_owned());
        shared.recent.truncate(REMEMBERED);
        let text = serde_json::to_vec(&shared).unwrap_or_default();
        let metadata = Metadata { content_type: Some("application/json".to_owned()), ..Metadata::default() };
        let key = format!("{}{USAGE}", self.notes);
        self.store.put(&key, Payload::Bytes(Bytes::from(text)), &metadata, condition).await.map(drop)
    }

    /// Every hour, by one mount.
    async fn count_if_old(&self) -> StoreResult<()> {
        if self.settings.read_only {
            return Ok(());
        }
        match self.read::<Shared>(USAGE).await? {
            Some((shared, etag)) if now().saturating_sub(shared.counted) >= COUNT => {
                self.count(Some((shared, etag))).await
            }
            _ => Ok(()),
        }
    }

    /// Counts what is there, where there is no figure (`None`) or an old one.
    async fn count(&self, old: Option<(Shared, Etag)>) -> StoreResult<()> {
        let mut round = self.round.lock().await;
        let before = old.as_ref().map(|(shared, _)| shared.bytes);
        if let Some((mut shared, etag)) = old {
            // First of all, so that the others need not.
            shared.counted = now();
            round.number += 1;
            let name = format!("{}-{}", self.name, round.number);
            match self.write(shared, &name, &Condition::Is(etag)).await {
                Err(error) if error.kind == StoreErrorKind::Conflict => return Ok(()),
                result => result?,
            }
        }
        let told_later = self.figures().own;
        let counted = self.sum().await?;
        for _ in 0..TRIES {
            let there = self.read::<Shared>(USAGE).await?;
            let (bytes, condition) = match (&there, before) {
                // What others have told while it was counted is hardly in what was counted.
                (Some((shared, etag)), Some(before)) => {
                    let changed = i128::from(counted) + i128::from(shared.bytes) - i128::from(before);
                    (u64::try_from(changed.max(0)).unwrap_or(u64::MAX), Condition::Is(etag.clone()))
                }
                (Some((_, etag)), None) => (counted, Condition::Is(etag.clone())),
                (None, _) => (counted, Condition::Absent),
            };
            let recent = there.map(|(shared, _)| shared.recent).unwrap_or_default();
            if !self.settings.read_only {
                round.number += 1;
                let name = format!("{}-{}", self.name, round.number);
                match self.write(Shared { bytes, counted: now(), recent }, &name, &condition).await {
                    Err(error) if error.kind == StoreErrorKind::Conflict => continue,
                    result => result?,
                }
            }
            let mut figures = self.figures();
            figures.shared = bytes;
            round.doubtful = None;
            if before.is_none() {
                // There was no figure: what this mount had changed until then was counted with the rest.
                figures.own = figures.own.saturating_sub(told_later);
            }
            return Ok(());
        }
        Ok(())
    }

    /// The bytes of all files of the volume.
    async fn sum(&self) -> StoreResult<u64> {
        let mut request = ListRequest { prefix: self.settings.prefix.clone(), ..ListRequest::default() };
        let mut sum = 0u64;
        loop {
            let page = self.store.list(&request).await?;
            let is_file = |key: &str| !(self.settings.prefix.is_empty() && key.starts_with(HIDDEN));
            let sizes = page.objects.iter().filter(|object| is_file(&object.key)).map(|object| object.size);
            sum = sizes.fold(sum, u64::saturating_add);
            match page.token {
                Some(token) => request.token = Some(token),
                None => return Ok(sum),
            }
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Another one for each mount that there ever is, of any node.
fn name(id: &str) -> String {
    use sha2::Digest;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = format!("{id} {since:?} {} {:?}", std::process::id(), std::thread::current().id());
    sha2::Sha256::digest(text.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "usage/tests.rs"]
mod tests;
