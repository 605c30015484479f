//! Which file systems this process freezes just now: what is marked as frozen and is not one of them is a leftover.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Result;

#[derive(Default)]
pub(super) struct Freezing(Mutex<BTreeSet<String>>);

impl Freezing {
    /// Marks a volume, or takes its mark away; `mark` does it where others see it.
    pub(super) fn mark(&self, id: &str, frozen: bool, mark: impl FnOnce() -> Result<()>) -> Result<()> {
        if frozen {
            self.now().insert(id.to_owned());
        }
        let marked = mark();
        if !frozen || marked.is_err() {
            self.now().remove(id);
        }
        marked
    }

    /// Those that are frozen now. None begins while they are looked at.
    pub(super) fn now(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
