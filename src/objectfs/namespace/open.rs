//! A file that is open, or that the bucket does not have as it is here: its content and what is still to be done.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::attributes::Attributes;
use super::super::content::Content;
use super::super::usage::{Full, Usage};
use crate::host::Errno;

/// A file with content at hand.
pub(crate) struct File {
    /// Its bytes.
    pub(crate) content: Content,
    state: Mutex<State>,
}

/// What is to be done with it.
#[derive(Default)]
pub(crate) struct State {
    /// Open handles.
    pub(crate) opens: u32,
    /// The bucket has never had it.
    pub(crate) uncommitted: bool,
    /// The key has to be free for it.
    pub(crate) exclusive: bool,
    /// Open handles that may write.
    pub(crate) writers: u32,
    /// Attributes have changed since the bucket had them.
    pub(crate) attributes: bool,
    /// What they were before that, where the bucket has any.
    pub(crate) before: Option<Arc<Attributes>>,
    /// Somebody else changed it first: nothing can be done with it any more.
    pub(crate) stale: bool,
    /// Unlinked while open: the key that it has instead.
    pub(crate) hidden: Option<String>,
    /// There is an object of that key, to be deleted with the last handle.
    pub(crate) aside: bool,
    /// Bytes that the volume's usage counts for it.
    pub(crate) counted: u64,
    /// A commit in the background failed: for the next fsync or close.
    pub(crate) error: Option<Errno>,
    /// A commit in the background is on its way.
    pub(crate) queued: bool,
}

impl State {
    /// Attributes change here.
    pub(crate) fn change_attributes(&mut self, now: Option<&Arc<Attributes>>) {
        if !self.attributes && !self.uncommitted {
            self.before = now.cloned();
        }
        self.attributes = true;
    }

    /// Does the bucket have nothing at all under its key? A file that was renamed before its first commit may hide
    /// what it is to replace.
    pub(crate) fn is_nothing(&self) -> bool {
        self.uncommitted && self.exclusive
    }
}

impl File {
    /// With content of the bucket, or of its own.
    pub(crate) fn new(content: Content, uncommitted: bool) -> Self {
        let counted = if uncommitted { 0 } else { content.size() };
        Self { content, state: Mutex::new(State { uncommitted, exclusive: uncommitted, counted, ..State::default() }) }
    }

    /// What is to be done with it.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is there anything of it that the bucket does not have?
    pub(crate) fn is_ours(&self) -> bool {
        let state = self.state();
        !state.stale && (state.uncommitted || state.attributes || self.content.is_dirty())
    }

    /// Counts what it grows by.
    pub(crate) fn reserve(&self, usage: &Usage, size: u64) -> Result<(), Full> {
        let mut state = self.state();
        if size > state.counted {
            usage.grow(size - state.counted)?;
            state.counted = size;
        }
        Ok(())
    }

    /// Counts what it is now smaller by.
    pub(crate) fn give_back(&self, usage: &Usage, size: u64) {
        let mut state = self.state();
        if size < state.counted {
            usage.shrink(state.counted - size);
            state.counted = size;
        }
    }
}
