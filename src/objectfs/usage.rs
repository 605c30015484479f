//! How full the volume is, counted by all of its mounts together.
//!
//! Skeleton of the interface; the bodies follow.

use std::sync::Arc;

use super::settings::Settings;
use super::store::Store;

/// The figures of one mount's volume. Without a limit nothing is counted and everything fits.
pub struct Usage {}

/// There is no room for that: ENOSPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl Usage {
    /// Reads the shared figure; counts by a flat listing where there is none. Starts the task that shares this mount's
    /// changes and takes over the others'.
    pub async fn open(_settings: Arc<Settings>, _store: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self {})
    }

    /// A file is to grow by so many bytes. Counted at once.
    ///
    /// # Errors
    /// The volume would be larger than its limit.
    pub fn grow(&self, _bytes: u64) -> Result<(), Full> {
        Ok(())
    }

    /// A file has shrunk or gone.
    pub fn shrink(&self, _bytes: u64) {}

    /// Bytes in use and the limit, if there is one.
    pub fn figures(&self) -> (u64, Option<u64>) {
        (0, None)
    }

    /// Shares what is not shared yet; the last thing that a mount does.
    pub async fn close(&self) {}
}
