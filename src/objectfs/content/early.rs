//! Parts of a new large file that are uploaded while it is still being written.
//!
//! What an upload's object will say of itself, its times too, is fixed when the upload begins, and the times of a file
//! that is being written are not known until it is committed. So these parts become an object of their own among the
//! hidden ones, and the commit makes the file of it by copies on the server, with the right attributes, under its condition, and
//! whatever its name is by then. Parts that were written again after they were sent are sent again with the rest. A copy
//! on the server costs little beside sending the bytes, but it is not free: so this begins only with a file that has been
//! written for a while. One that is written faster than that is sent at its commit, at the full speed of the link.
//!
//! Everything stays staged until the commit is through. So whatever fails here costs time and never bytes.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt;
use tokio::task::JoinHandle;

use super::file::Inner;
use super::journal::Record;
use super::ranges::RangeSet;
use super::{Contents, Version};
use crate::objectfs::store::{Condition, Metadata, Part, Payload, StoreErrorKind, UploadId};

/// What was sent early of one file.
#[derive(Default)]
pub(super) struct Early {
    begun: Option<(String, UploadId)>,
    /// In the order of their numbers.
    sent: Vec<(Range<u64>, Part)>,
    /// The next part: its number less one, and where it begins.
    count: u32,
    start: u64,
    /// How far the file was written without gaps.
    frontier: u64,
    /// When it was large enough first.
    since: Option<Instant>,
    /// Written again after its part was taken.
    stale: RangeSet,
    sender: Option<JoinHandle<()>>,
    /// No more parts are taken.
    over: bool,
}

impl Early {
    /// The next part, if all of it is there. Parts double every 1,000, so that 10,000 pass the largest object.
    fn take(&mut self, part: u64) -> Option<(u32, Range<u64>)> {
        let size = part << (self.count / 1000);
        let range = self.start..self.start + size;
        if self.over || range.end > self.frontier || self.count >= 10_000 {
            return None;
        }
        self.start = range.end;
        self.count += 1;
        Some((self.count, range))
    }
}

impl Inner {
    fn early(&self) -> MutexGuard<'_, Early> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A range was changed: what was sent of it does not count.
    pub(super) fn outdate(&self, range: Range<u64>) {
        let mut early = self.early();
        if early.count > 0 {
            let end = early.start;
            early.stale.insert(range.start.min(end)..range.end.min(end));
        }
        if range.end == u64::MAX {
            early.frontier = early.frontier.min(range.start);
        }
    }

    /// A range was written: sends what has become a whole part. The caller holds `changing`.
    pub(super) fn advance(self: &Arc<Self>, range: Range<u64>) {
        let tuning = &self.contents.tuning;
        let mut early = self.early();
        if range.start <= early.frontier {
            early.frontier = early.frontier.max(range.end);
        }
        let end = early.start;
        early.stale.insert(range.start.min(end)..range.end.min(end));
        if early.over || early.frontier < tuning.early || !self.look(|state| state.is_new_and_large()) {
            return;
        }
        let since = *early.since.get_or_insert_with(Instant::now);
        let busy = early.sender.as_ref().is_some_and(|sender| !sender.is_finished());
        if !busy && since.elapsed() >= tuning.early_after {
            let inner = self.clone();
            early.sender = Some(tokio::spawn(async move {
                if inner.send_early().await.is_none() {
                    inner.early().over = true;
                }
            }));
        }
    }

    /// Sends parts until there is none. `None`: something failed.
    async fn send_early(&self) -> Option<()> {
        let contents = &self.contents;
        let staged = self.look(|state| state.staged.clone())?;
        let file = staged.data(false).ok()?;
        let begun = self.early().begun.clone();
        let (key, upload) = match begun {
            Some(begun) => begun,
            None => {
                let key = contents.temporary_key();
                let upload = contents.store.begin_upload(&key, &Metadata::default()).await.ok()?;
                self.early().begun = Some((key.clone(), upload.clone()));
                // A successor gives it up.
                staged.record(&Record::Upload(key.clone(), upload.clone())).ok()?;
                (key, upload)
            }
        };
        loop {
            let next = std::iter::from_fn(|| self.early().take(contents.tuning.part));
            let parts: Vec<_> = next.take(contents.tuning.in_flight).collect();
            if parts.is_empty() {
                return Some(());
            }
            let work = futures_util::stream::iter(parts.into_iter().map(|(number, range)| {
                let (key, upload, payload) = (&key, &upload, Payload::File(file.clone(), range.clone()));
                async move {
                    let _permit = contents.uploads.acquire().await;
                    let _counted = contents.tally.uploading();
                    (range, contents.store.upload_part(key, upload, number, payload).await)
                }
            }));
            let sent: Vec<_> = work.buffered(contents.tuning.in_flight).collect().await;
            for (range, part) in sent {
                let part = part.ok()?;
                self.early().sent.push((range, part));
            }
        }
    }

    /// Makes an object of what was sent early: its version, and which of its ranges are the file's. `None`: there is
    /// nothing of use. The caller holds `changing`.
    pub(super) async fn finish_early(&self) -> Option<(Version, RangeSet)> {
        let early = self.take_early().await?;
        let end = early.sent.last().map_or(0, |(range, _)| range.end);
        let mut good = RangeSet::default();
        good.insert(0..end.min(self.look(|state| state.size)));
        early.stale.iter().for_each(|range| good.remove(range));
        let (key, upload) = early.begun?;
        if good.total() < end / 2 || good.total() == 0 {
            give_up(&self.contents, key, upload);
            return None;
        }
        let parts: Vec<_> = early.sent.into_iter().map(|(_, part)| part).collect();
        match self.contents.store.finish_upload(&key, &upload, &parts, &Condition::None).await {
            Ok(etag) => Some((Version { key, etag, size: end }, good)),
            Err(error) => {
                tracing::debug!(%error, "cannot use parts that were sent early");
                give_up(&self.contents, key, upload);
                None
            }
        }
    }

    /// Forgets what was sent early. The caller holds `changing`.
    pub(super) async fn abandon_early(&self) {
        if let Some(Early { begun: Some((key, upload)), .. }) = self.take_early().await {
            give_up(&self.contents, key, upload);
        }
    }

    /// What was sent early, once nothing of it is under way; the next time begins anew.
    async fn take_early(&self) -> Option<Early> {
        let sender = {
            let mut early = self.early();
            early.over = true;
            early.sender.take()
        };
        if let Some(sender) = sender {
            let _ = sender.await;
        }
        let early = std::mem::take(&mut *self.early());
        early.begun.is_some().then_some(early)
    }
}

impl Contents {
    /// A key that nobody else has.
    fn temporary_key(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        format!("{}uploads/{now:x}-{:x}", self.hidden, std::process::id())
    }
}

/// Leaves nothing of an upload, or of the object that it became, in the bucket.
pub(super) fn give_up(contents: &Arc<Contents>, key: String, upload: UploadId) {
    let contents = contents.clone();
    tokio::spawn(async move {
        for result in [contents.store.abort_upload(&key, &upload).await, contents.store.delete(&key, None).await] {
            if let Err(error) = result
                && error.kind != StoreErrorKind::NotFound
            {
                tracing::warn!(%error, "cannot give up an upload");
            }
        }
    });
}
