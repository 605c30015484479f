//! The memory of one mount for data that was read, in bytes. Never refuses: who needs more than there is waits, in the
//! order of coming; who only would like more is told no.
//!
//! What keeps this free of deadlock: a reader waits for memory only while it holds none that others can't take back.
//! Blocks that handles hold for their next reads are taken back at once when a reader waits, and are not handed out to
//! anybody's read-ahead until it has been served. All others lie under reads and GETs that end by themselves.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A part of the budget; given back when dropped.
pub(super) type Share = OwnedSemaphorePermit;

/// Somebody who holds blocks that nobody reads right now.
pub(super) trait Hoard: Send + Sync {
    /// Lets them go.
    fn release(&self);
    /// How long ago they were last used.
    fn unused(&self) -> Duration;
}

/// See the module.
pub(super) struct Budget {
    free: Arc<Semaphore>,
    total: u64,
    waiting: AtomicUsize,
    /// Those who hold something, oldest first. Who has let go is taken off when met.
    hoards: Mutex<VecDeque<Weak<dyn Hoard>>>,
}

/// Counts who waits, also if it stops waiting.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A hoard that was used in this time is taken back last.
const RECENT: Duration = Duration::from_secs(1);

impl Budget {
    pub(super) fn new(total: u64) -> Self {
        let total = total.clamp(1, u64::from(u32::MAX));
        Self {
            free: Arc::new(Semaphore::new(total as usize)),
            total,
            waiting: AtomicUsize::new(0),
            hoards: Mutex::default(),
        }
    }

    /// All of it.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// What nobody has.
    pub(super) fn free(&self) -> u64 {
        self.free.available_permits() as u64
    }

    fn hoards(&self) -> MutexGuard<'_, VecDeque<Weak<dyn Hoard>>> {
        self.hoards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory that a reader can't do without. The caller holds no block but in its hoard. More than all there is counts
    /// as all there is.
    pub(super) async fn need(&self, bytes: u64) -> Option<Share> {
        let bytes = bytes.min(self.total) as u32;
        if let Ok(share) = self.free.clone().try_acquire_many_owned(bytes) {
            return Some(share);
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        self.take_back(u64::from(bytes));
        self.free.clone().acquire_many_owned(bytes).await.ok()
    }

    /// Memory to read ahead into, if there is some that nobody waits for.
    pub(super) fn spare(&self, bytes: u64) -> Option<Share> {
        if self.is_short() {
            return None;
        }
        self.free.clone().try_acquire_many_owned(bytes.min(self.total) as u32).ok()
    }

    /// Does somebody wait? Then a hoard is let go as soon as it is not read from.
    pub(super) fn is_short(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// A hoard holds something from now on.
    pub(super) fn enlist(&self, hoard: Weak<dyn Hoard>) {
        self.hoards().push_back(hoard);
    }

    /// Takes back from those who have not used it lately, then from anybody, until there is enough.
    fn take_back(&self, bytes: u64) {
        for age in [RECENT, Duration::ZERO] {
            if self.free() >= bytes {
                return;
            }
            self.release(age, Some(bytes));
        }
    }

    /// Takes back what was not used for so long.
    pub(super) fn release_unused(&self, age: Duration) {
        self.release(age, None);
    }

    fn release(&self, age: Duration, enough: Option<u64>) {
        let count = self.hoards().len();
        for _ in 0..count {
            let Some(weak) = self.hoards().pop_front() else { return };
            let Some(hoard) = weak.upgrade() else { continue };
            if hoard.unused() < age {
                self.hoards().push_back(weak);
                continue;
            }
            hoard.release();
            if enough.is_some_and(|enough| self.free() >= enough) {
                return;
            }
        }
    }
}
