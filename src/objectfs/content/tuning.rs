//! The sizes by which content is read, staged and sent, in one place. Tests have smaller ones.

use std::time::Duration;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Sizes are bytes.
#[derive(Clone, Debug)]
pub(super) struct Tuning {
    /// A new file up to this size lies in its log alone.
    pub(super) inline: u64,
    /// So much of small dirty files is kept in memory; others are read from their logs.
    pub(super) inline_total: u64,
    /// A log that is longer is written anew.
    pub(super) longest_log: u64,
    /// So many descriptors of staged files stay open between two calls.
    pub(super) descriptors: usize,
    /// Times in an intent are logged at most so often.
    pub(super) spare: Duration,

    /// A file up to this size is sent whole.
    pub(super) whole: u64,
    /// Parts that are uploaded, at least; they grow so that `parts` of them reach the largest object.
    pub(super) part: u64,
    /// No part but the last may be smaller.
    pub(super) least_part: u64,
    /// Parts that are copied on the server, at least and at most.
    pub(super) copy: (u64, u64),
    /// Parts of an object, at most.
    pub(super) parts: u64,
    /// Parts of one file under way at a time.
    pub(super) in_flight: usize,
    /// Uploads of one mount under way at a time.
    pub(super) uploads: usize,

    /// A new file of this size has its parts sent while it is still being written...
    pub(super) early: u64,
    /// ...once it has been written for so long.
    pub(super) early_after: Duration,

    /// Blocks: what is held, shared and cached.
    pub(super) block: u64,
    /// What is read at random comes in multiples of this.
    pub(super) piece: u64,
    /// One GET asks for so much at most.
    pub(super) get: u64,
    /// GETs of one window under way, at most.
    pub(super) gets: usize,
    /// The window of one who begins to read.
    pub(super) window: u64,
    /// Reads that far from where the last one ended still count as sequential.
    pub(super) slack: u64,
    /// A window that was not used for so long lets its memory go.
    pub(super) idle: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            inline: 64 * KIB,
            inline_total: 4 * MIB,
            longest_log: MIB,
            descriptors: 256,
            spare: Duration::from_secs(1),
            whole: 8 * MIB,
            part: 8 * MIB,
            least_part: 5 * MIB,
            copy: (32 * MIB, 5 * GIB),
            parts: 10_000,
            in_flight: 8,
            uploads: 32,
            early: 16 * MIB,
            early_after: Duration::from_secs(10),
            block: MIB,
            piece: 128 * KIB,
            get: 4 * MIB,
            gets: 8,
            window: MIB,
            slack: 512 * KIB,
            idle: Duration::from_secs(5),
        }
    }
}
