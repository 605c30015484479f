//! Who is changing which name. Each change takes the names it needs at once, or waits; nobody who holds one waits for
//! another, so no order has to be kept.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use super::tree::Tree;
use crate::fuse::filesystem::Ino;

/// Names and subtrees that are being changed.
#[derive(Default)]
pub(crate) struct Places {
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Default)]
struct State {
    names: HashSet<(Ino, String)>,
    directories: HashMap<Ino, u32>,
    /// Directories with all below them, and whether everybody else has left them.
    moving: Vec<(Ino, bool)>,
}

/// Held while names are changed.
pub(crate) struct Held<'a> {
    places: &'a Places,
    names: Vec<(Ino, String)>,
    moving: Option<Ino>,
}

impl Places {
    /// Takes names for itself, and, to move it, the whole of a directory. `tree` is locked by the caller's closure, for
    /// moments only.
    pub(crate) async fn take(
        &self,
        names: &[(Ino, &str)],
        moving: Option<Ino>,
        with_tree: impl Fn(&mut dyn FnMut(&Tree)),
    ) -> Held<'_> {
        // Made early, so that a caller who gives up while it waits leaves nothing behind.
        let mut held = Held { places: self, names: Vec::new(), moving: None };
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let mut taken = false;
            with_tree(&mut |tree| {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let mut reserved = held.moving.is_some();
                taken = state.try_take(tree, names, moving, &mut reserved);
                held.moving = moving.filter(|_| reserved);
            });
            if taken {
                held.names = names.iter().map(|(ino, name)| (*ino, (*name).to_owned())).collect();
                return held;
            }
            freed.await;
        }
    }

    /// Is somebody moving that directory now, or one above it? Its keys are here and there then, and nobody holds names in it.
    pub(crate) fn is_moving(&self, tree: &Tree, directory: Ino) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.moving.iter().any(|(top, begun)| *begun && tree.is_below(directory, *top))
    }

    /// The same for a name: its key may be gone already, and it is not yet known what has become of it.
    pub(crate) fn is_changing(&self, tree: &Tree, parent: Ino, name: &str) -> bool {
        self.is_held(parent, name) || self.is_moving(tree, parent)
    }

    /// Is somebody changing that name now? The caller may hold the tree.
    pub(crate) fn is_held(&self, parent: Ino, name: &str) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.names.contains(&(parent, name.to_owned()))
    }
}

impl State {
    fn try_take(&mut self, tree: &Tree, names: &[(Ino, &str)], moving: Option<Ino>, reserved: &mut bool) -> bool {
        let other = |top: &Ino| Some(*top) != moving || !*reserved;
        let blocked = names.iter().any(|(ino, name)| {
            self.names.contains(&(*ino, (*name).to_owned()))
                || self.moving.iter().any(|(top, _)| other(top) && tree.is_below(*ino, *top))
        });
        if blocked {
            return false;
        }
        if let Some(top) = moving {
            if !*reserved {
                if self.moving.iter().any(|(at, _)| tree.is_below(*at, top) || tree.is_below(top, *at)) {
                    return false;
                }
                // From now on nothing new begins below it.
                self.moving.push((top, false));
                *reserved = true;
            }
            if self.directories.keys().any(|directory| tree.is_below(*directory, top)) {
                return false;
            }
            self.moving.iter_mut().filter(|(at, _)| *at == top).for_each(|(_, begun)| *begun = true);
        }
        for (ino, name) in names {
            self.names.insert((*ino, (*name).to_owned()));
            *self.directories.entry(*ino).or_default() += 1;
        }
        true
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.places.state.lock().unwrap_or_else(PoisonError::into_inner);
        for place in self.names.drain(..) {
            if let Some(count) = state.directories.get_mut(&place.0) {
                *count -= 1;
                if *count == 0 {
                    state.directories.remove(&place.0);
                }
            }
            state.names.remove(&place);
        }
        if let Some(top) = self.moving {
            state.moving.retain(|(at, _)| *at != top);
        }
        drop(state);
        self.places.freed.notify_waiters();
    }
}
