//! A stretch of a version in memory, which is read while it still comes in, and may be read by several handles.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::Notify;

use super::ContentError;
use super::budget::Share;

/// See the module. Its memory is given back when the last who holds it lets go.
pub(super) struct Block {
    range: Range<u64>,
    filling: Mutex<Filling>,
    changed: Notify,
    _share: Option<Share>,
}

#[derive(Default)]
struct Filling {
    /// In order and without gaps, from the start of the range.
    pieces: Vec<(u64, Bytes)>,
    end: u64,
    failed: Option<ContentError>,
}

impl Block {
    pub(super) fn new(range: Range<u64>, share: Option<Share>) -> Arc<Self> {
        let filling = Filling { end: range.start, ..Filling::default() };
        Arc::new(Self { range, filling: Mutex::new(filling), changed: Notify::new(), _share: share })
    }

    pub(super) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    fn filling(&self) -> MutexGuard<'_, Filling> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next bytes of it. What is too much is left out.
    pub(super) fn push(&self, bytes: Bytes) {
        let mut filling = self.filling();
        let length = (bytes.len() as u64).min(self.range.end - filling.end);
        if length > 0 {
            let start = filling.end;
            filling.pieces.push((start, bytes.slice(..length as usize)));
            filling.end += length;
        }
        drop(filling);
        self.changed.notify_waiters();
    }

    /// No more bytes will come.
    pub(super) fn fail(&self, error: ContentError) {
        self.filling().failed = Some(error);
        self.changed.notify_waiters();
    }

    pub(super) fn is_whole(&self) -> bool {
        self.filling().end == self.range.end
    }

    /// Is it not worth waiting for?
    pub(super) fn has_failed(&self) -> bool {
        self.filling().failed.is_some()
    }

    /// All of it, if it is there.
    pub(super) fn whole(&self) -> Option<Vec<Bytes>> {
        let filling = self.filling();
        (filling.end == self.range.end).then(|| filling.pieces.iter().map(|(_, bytes)| bytes.clone()).collect())
    }

    /// Waits until a range within it is there, and appends its bytes.
    pub(super) async fn read(&self, range: Range<u64>, into: &mut Vec<Bytes>) -> Result<(), ContentError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From now on no change is missed.
            changed.as_mut().enable();
            {
                let filling = self.filling();
                if filling.end >= range.end {
                    let first =
                        filling.pieces.partition_point(|(start, bytes)| start + bytes.len() as u64 <= range.start);
                    for (start, bytes) in &filling.pieces[first..] {
                        if *start >= range.end {
                            break;
                        }
                        let from = range.start.saturating_sub(*start) as usize;
                        let to = (range.end - start).min(bytes.len() as u64) as usize;
                        into.push(bytes.slice(from..to));
                    }
                    return Ok(());
                }
                if let Some(error) = &filling.failed {
                    return Err(error.clone());
                }
            }
            changed.await;
        }
    }
}

/// Blocks side by side that one task fills. Those that are not whole when it ends, however it ends, have failed.
pub(super) struct Fill {
    blocks: Vec<Weak<Block>>,
    error: Option<ContentError>,
}

impl Fill {
    pub(super) fn new(blocks: &[Arc<Block>]) -> Self {
        Self { blocks: blocks.iter().map(Arc::downgrade).collect(), error: None }
    }

    /// Blocks that somebody still wants and that are not whole.
    pub(super) fn wanted(&self) -> Vec<Arc<Block>> {
        self.blocks.iter().filter_map(Weak::upgrade).filter(|block| !block.is_whole()).collect()
    }

    /// All of them.
    pub(super) fn weak(&self) -> Vec<Weak<Block>> {
        self.blocks.clone()
    }

    /// Why they will not become whole.
    pub(super) fn fail(&mut self, error: ContentError) {
        self.error = Some(error);
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        for block in self.wanted() {
            let error = self.error.clone();
            block.fail(error.unwrap_or_else(|| ContentError::Disk("cannot read: the read was given up".to_owned())));
        }
    }
}
