//! What was deleted is removed in the background, by one thread for each pool that has something to remove.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Result;

/// A pool's things that were deleted and are still there.
pub(super) trait Trash: Send + Sync + 'static {
    /// The pool's name.
    fn name(&self) -> &str;

    /// Is a thread at work?
    fn is_reaped(&self) -> &AtomicBool;

    /// One thing to remove, of those not given up.
    fn next(&self, given_up: &BTreeSet<String>) -> Result<Option<String>>;

    /// Removes it. Its room comes back.
    fn remove(&self, name: &str) -> Result<()>;
}

/// Has a thread remove what there is, unless one does already.
pub(super) fn reap(trash: &Arc<impl Trash>) {
    if trash.is_reaped().swap(true, Ordering::AcqRel) {
        return;
    }
    let reaped = trash.clone();
    let started = std::thread::Builder::new().name("reaper".to_owned()).spawn(move || empty(reaped.as_ref()));
    if let Err(error) = started {
        tracing::error!(pool = trash.name(), %error, "cannot start a thread to remove what was deleted");
        trash.is_reaped().store(false, Ordering::Release);
    }
}

fn empty(trash: &impl Trash) {
    let mut given_up = BTreeSet::new();
    let next = |given_up: &BTreeSet<String>| {
        trash.next(given_up).unwrap_or_else(|error| {
            tracing::warn!(pool = trash.name(), %error, "cannot look for what was deleted");
            None
        })
    };
    loop {
        while let Some(name) = next(&given_up) {
            if let Err(error) = trash.remove(&name) {
                tracing::error!(pool = trash.name(), name, %error, "cannot remove what was deleted: its room stays taken");
                given_up.insert(name);
            }
        }
        trash.is_reaped().store(false, Ordering::Release);
        // Something may have come after the last look, from one who saw this thread still at work.
        if next(&given_up).is_none() || trash.is_reaped().swap(true, Ordering::AcqRel) {
            break;
        }
    }
}
