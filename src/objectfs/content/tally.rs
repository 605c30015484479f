//! The mount's figures, for people and for the limit on memory of small files.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Progress;
use super::tuning::Tuning;

/// What one file adds.
#[derive(Clone, Copy, Default)]
pub(super) struct Weight {
    pub(super) files: u64,
    /// Staged.
    pub(super) bytes: u64,
    /// Staged and in memory too.
    pub(super) memory: u64,
}

/// Sums over all files.
#[derive(Default)]
pub(super) struct Tally {
    files: AtomicU64,
    bytes: AtomicU64,
    memory: AtomicU64,
    pub(super) uploads: AtomicU64,
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
}

/// Counts one upload while it lives.
pub(super) struct Uploading<'a>(&'a AtomicU64);

impl Tally {
    pub(super) fn changed(&self, before: Weight, after: Weight) {
        let change = |sum: &AtomicU64, before: u64, after: u64| {
            if before != after {
                sum.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
            }
        };
        change(&self.files, before.files, after.files);
        change(&self.bytes, before.bytes, after.bytes);
        change(&self.memory, before.memory, after.memory);
    }

    /// May another small file be kept in memory?
    pub(super) fn room_inline(&self, tuning: &Tuning) -> bool {
        self.memory.load(Ordering::Relaxed) + tuning.inline <= tuning.inline_total
    }

    pub(super) fn uploading(&self) -> Uploading<'_> {
        self.uploads.fetch_add(1, Ordering::Relaxed);
        Uploading(&self.uploads)
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            dirty_bytes: self.bytes.load(Ordering::Relaxed),
            dirty_files: self.files.load(Ordering::Relaxed),
            uploads: self.uploads.load(Ordering::Relaxed),
            cache_hit_bytes: self.hits.load(Ordering::Relaxed),
            cache_miss_bytes: self.misses.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Uploading<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
