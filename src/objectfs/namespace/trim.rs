//! Memory: a walk over a million files must not leave a million names behind.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Namespace;
use super::tree::{ROOT, Slot};
use crate::fuse::filesystem::Ino;

/// More nodes than that, and the kernel is asked to give old ones back.
const NODES: usize = 65_536;
/// So many names are learnt before old listings are let go of.
const NAMES: usize = 100_000;
/// Listings that were of use a moment ago may be again.
const RECENT: Duration = Duration::from_secs(5);

impl Namespace {
    /// So many names were learnt. Lets go of what is old, from time to time.
    pub(super) fn trim(self: &Arc<Self>, learnt: usize) {
        if self.learnt.fetch_add(learnt, Ordering::Relaxed) + learnt < NAMES {
            return;
        }
        self.learnt.store(0, Ordering::Relaxed);
        let old = RECENT.max(self.max_age);
        let mut tree = self.tree();
        let directories: Vec<Ino> =
            tree.iter().filter(|(_, node)| node.directory.is_some()).map(|(ino, _)| ino).collect();
        for ino in directories {
            let Some(directory) = tree.directory_mut(ino) else { continue };
            if directory.complete.is_none_or(|complete| complete.elapsed() > old) {
                directory.complete = None;
                directory.index = None;
                // What was changed here a moment ago has to outlive answers that are on their way.
                directory.names.retain(|_, slot| match slot {
                    Slot::Live(_) => true,
                    Slot::Known(facts) => facts.seen.elapsed() < old,
                    Slot::Absent { seen, .. } => seen.elapsed() < Duration::from_secs(600),
                });
            }
        }
        if tree.len() < NODES {
            return;
        }
        let unused: Vec<_> = tree
            .iter()
            .filter(|(ino, node)| *ino != ROOT && node.pins == 0 && node.file.is_none())
            .filter(|(_, node)| node.facts.seen.elapsed() > old)
            .filter_map(|(ino, node)| node.place.clone().map(|(parent, name)| (ino, node.lookups, parent, name)))
            .collect();
        let mut told = Vec::new();
        for (ino, lookups, parent, name) in unused {
            if lookups == 0 {
                tree.forget(ino, 0);
            } else {
                told.push((parent, name));
            }
        }
        drop(tree);
        self.tell_kernel(move |kernel| {
            for (parent, name) in told {
                kernel.invalidate_name(parent, name.as_ref().as_ref());
            }
        });
    }
}
