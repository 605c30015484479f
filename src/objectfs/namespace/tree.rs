//! The table of inodes and names. Synchronous and pure: it is asked and told, under one short lock.
//!
//! A name that the kernel (or an open file, or a known child) refers to has a node, with a number for as long as that
//! lasts; any other has only its facts, in its directory.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use super::super::attributes::Attributes;
use super::super::store::Etag;
use super::facts::{Ask, Facts, Seen};
use super::open::File;
use crate::fuse::filesystem::Ino;

/// The root directory's number.
pub(crate) const ROOT: Ino = 1;

/// A directory in which so many lookups had to ask is listed.
const MISSES: u32 = 2;
/// A listing costs as much as so many single questions.
const ANSWERS: u32 = 8;

/// What a directory knows of a name.
pub(crate) enum Slot {
    /// There is nothing of that name.
    Absent {
        /// When that was right.
        seen: Instant,
        /// The last local change.
        changed: u64,
    },
    /// Nobody refers to it.
    Known(Facts),
    /// There is a node.
    Live(Ino),
}

/// What a directory knows.
#[derive(Default)]
pub(crate) struct Directory {
    /// Its names.
    pub(crate) names: BTreeMap<Arc<str>, Slot>,
    /// Whatever is not among the names did not exist then.
    pub(crate) complete: Option<Instant>,
    /// It has more names than one page: not listed again for a lookup.
    pub(crate) huge: bool,
    /// Lookups that had to ask since it was listed.
    pub(crate) misses: u32,
    /// Lookups that were answered without asking since then.
    pub(crate) answers: u32,
    /// Entries came or went here, then: newer than the marker's time.
    pub(crate) touched: Option<SystemTime>,
    /// The last listing for a program.
    pub(crate) walked: Option<Instant>,
    /// Its entries were looked at because a walk would come to it.
    pub(crate) ahead: Option<Instant>,
    /// A listing in the background is under way.
    pub(crate) refreshing: bool,
    /// The index was asked for at this time.
    pub(crate) index: Option<Instant>,
    /// A task is to write its index.
    pub(crate) indexing: bool,
    /// Changes that its index does not have.
    pub(crate) unwritten: u32,
}

impl Directory {
    /// Was it listed by a program a moment ago?
    pub(crate) fn is_walked(&self, max_age: Duration) -> bool {
        self.walked.is_some_and(|at| at.elapsed() <= max_age.max(Duration::from_secs(10)))
    }

    /// One more lookup has to ask. `true`: a listing costs no more than all these questions.
    pub(crate) fn missed(&mut self) -> bool {
        self.misses = self.misses.saturating_add(1);
        self.misses >= MISSES && !self.huge
    }

    /// One more lookup needs not ask. `true`: it is worth to renew what answers them.
    pub(crate) fn answers(&mut self) -> bool {
        self.answers = self.answers.saturating_add(1);
        self.answers >= ANSWERS
    }
}

/// An inode.
pub(crate) struct Node {
    /// Directory and name; `None`: the root, or not in the tree any more.
    pub(crate) place: Option<(Ino, Arc<str>)>,
    /// What is known of it.
    pub(crate) facts: Facts,
    /// The kernel's references.
    pub(crate) lookups: u64,
    /// Nodes in this directory, open handles, work under way.
    pub(crate) pins: u32,
    /// Of directories.
    pub(crate) directory: Option<Box<Directory>>,
    /// Of files that are open or not all in the bucket.
    pub(crate) file: Option<Arc<File>>,
    /// The version whose pages the kernel may have.
    pub(crate) paged: Option<Etag>,
    /// The size that the kernel was told last. It places appends by that, and reads no further.
    pub(crate) told: Option<u64>,
    /// An open was refused because of an old [`Self::told`], and comes again.
    pub(crate) refused: Option<Instant>,
    /// Last read, where a program has set it. Kept nowhere else.
    pub(crate) atime: Option<SystemTime>,
    /// The lookup that looked at it last in the bucket: by which thread, answered when.
    pub(crate) looked: Option<(u32, Instant)>,
    /// Where a symbolic link of this version points.
    pub(crate) target: Option<(Etag, Bytes)>,
}

impl Node {
    fn new(place: Option<(Ino, Arc<str>)>, facts: Facts) -> Self {
        let directory = facts.directory.then(Box::default);
        let (file, paged, told, refused, atime, looked, target) = (None, None, None, None, None, None, None);
        Self { place, facts, lookups: 0, pins: 0, directory, file, paged, told, refused, atime, looked, target }
    }
}

impl Node {
    /// Does an answer show another version than the one that handles are open on? They never read a mixture, nor write
    /// over it: the inode loses its name, which is somebody else's file from now on.
    fn replaced_while_open(&self, seen: &Seen) -> bool {
        let (Some(file), Seen::Object(now), Some(before)) = (&self.file, seen, &self.facts.stored) else {
            return false;
        };
        let mut state = file.state();
        let replaced = state.opens > 0 && now.etag != before.etag;
        state.stale |= replaced;
        replaced
    }
}

/// What became of a name by an answer about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Learned {
    /// As before, or the answer was too old.
    Same,
    /// Another version.
    Changed,
    /// The node is not in the tree any more: removed or replaced by another kind.
    Detached,
}

/// All inodes.
pub(crate) struct Tree {
    nodes: HashMap<Ino, Node>,
    prefix: String,
    clock: u64,
    /// Attributes of directories without a marker.
    pub(crate) plain: Attributes,
}

impl Tree {
    /// A tree with nothing but a root.
    pub(crate) fn new(prefix: &str, plain: Attributes) -> Self {
        let mut root = Facts::local(true, plain.clone(), None, 0);
        root.marker_known = false;
        root.attributes_seen = None;
        let mut node = Node::new(None, root);
        node.lookups = 1;
        Self { nodes: HashMap::from([(ROOT, node)]), prefix: prefix.to_owned(), clock: 1, plain }
    }

    /// A moment to remember with a question.
    pub(crate) fn ask(&self) -> Ask {
        Ask { stamp: self.clock, at: Instant::now() }
    }

    /// A local change: newer than all questions so far.
    pub(crate) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A node.
    pub(crate) fn node(&self, ino: Ino) -> Option<&Node> {
        self.nodes.get(&ino)
    }

    /// A node, to be changed.
    pub(crate) fn node_mut(&mut self, ino: Ino) -> Option<&mut Node> {
        self.nodes.get_mut(&ino)
    }

    /// A directory.
    pub(crate) fn directory(&self, ino: Ino) -> Option<&Directory> {
        self.nodes.get(&ino)?.directory.as_deref()
    }

    /// A directory, to be changed.
    pub(crate) fn directory_mut(&mut self, ino: Ino) -> Option<&mut Directory> {
        self.nodes.get_mut(&ino)?.directory.as_deref_mut()
    }

    /// How many nodes there are.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// All nodes.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Ino, &Node)> {
        self.nodes.iter().map(|(ino, node)| (*ino, node))
    }

    /// The key of a node; a directory's ends in `/`, the root's is the prefix. `None`: it is not in the tree.
    pub(crate) fn key(&self, ino: Ino) -> Option<String> {
        let mut names = Vec::new();
        let (mut at, directory) = (ino, self.nodes.get(&ino)?.directory.is_some());
        while at != ROOT {
            let (parent, name) = self.nodes.get(&at)?.place.as_ref()?;
            names.push(name);
            at = *parent;
        }
        let mut key = self.prefix.clone();
        for (index, name) in names.iter().rev().enumerate() {
            key.push_str(name);
            if directory || index + 1 < names.len() {
                key.push('/');
            }
        }
        Some(key)
    }

    /// The key that a name in a directory has, without a final `/`.
    pub(crate) fn key_of(&self, parent: Ino, name: &str) -> Option<String> {
        self.key(parent).map(|key| key + name)
    }

    /// Is this node, or one above it, that one?
    pub(crate) fn is_below(&self, mut ino: Ino, top: Ino) -> bool {
        while ino != top {
            match self.nodes.get(&ino).and_then(|node| node.place.as_ref()) {
                Some((parent, _)) => ino = *parent,
                None => return false,
            }
        }
        true
    }

    /// What is known of a name that exists.
    pub(crate) fn facts(&self, parent: Ino, name: &str) -> Option<&Facts> {
        match self.directory(parent)?.names.get(name)? {
            Slot::Absent { .. } => None,
            Slot::Known(facts) => Some(facts),
            Slot::Live(ino) => self.nodes.get(ino).map(|node| &node.facts),
        }
    }

    /// The same, to be changed.
    pub(crate) fn facts_mut(&mut self, parent: Ino, name: &str) -> Option<&mut Facts> {
        match self.nodes.get_mut(&parent)?.directory.as_mut()?.names.get_mut(name)? {
            Slot::Absent { .. } => None,
            Slot::Live(ino) => {
                let ino = *ino;
                self.nodes.get_mut(&ino).map(|node| &mut node.facts)
            }
            Slot::Known(_) => match self.nodes.get_mut(&parent)?.directory.as_mut()?.names.get_mut(name)? {
                Slot::Known(facts) => Some(facts),
                _ => None,
            },
        }
    }

    /// The node of a name, if it has one.
    pub(crate) fn live(&self, parent: Ino, name: &str) -> Option<Ino> {
        match self.directory(parent)?.names.get(name)? {
            Slot::Live(ino) => Some(*ino),
            _ => None,
        }
    }

    /// The number that a name has or would have.
    pub(crate) fn number(&self, parent: Ino, name: &str) -> Ino {
        self.live(parent, name).unwrap_or_else(|| self.free_number(parent, name))
    }

    fn free_number(&self, parent: Ino, name: &str) -> Ino {
        let mut hasher = DefaultHasher::new();
        (parent, name).hash(&mut hasher);
        // Below 2^63, and neither 0 nor the root's.
        let mut ino = (hasher.finish() >> 1).max(2);
        while self.nodes.contains_key(&ino) {
            ino = (ino.wrapping_add(1) & (u64::MAX >> 1)).max(2);
        }
        ino
    }

    /// Takes an answer about a name over, unless something was changed here since it was asked.
    pub(crate) fn learn(&mut self, parent: Ino, name: &str, ask: Ask, seen: Seen) -> Learned {
        let plain = self.plain.clone();
        let Some(directory) = self.nodes.get_mut(&parent).and_then(|node| node.directory.as_mut()) else {
            return Learned::Same;
        };
        let Some(slot) = directory.names.get_mut(name) else {
            let slot = match Facts::first(seen, ask, &plain) {
                Some(facts) => Slot::Known(facts),
                None => Slot::Absent { seen: ask.at, changed: 0 },
            };
            directory.names.insert(name.into(), slot);
            return Learned::Same;
        };
        match slot {
            Slot::Absent { changed, .. } if *changed > ask.stamp => Learned::Same,
            Slot::Absent { changed, .. } => {
                let changed = *changed;
                *slot = match Facts::first(seen, ask, &plain) {
                    Some(facts) => Slot::Known(facts),
                    None => Slot::Absent { seen: ask.at, changed },
                };
                Learned::Same
            }
            Slot::Known(facts) => {
                if facts.changed <= ask.stamp && facts.seen <= ask.at && !facts.update(seen.clone(), ask, &plain) {
                    *slot =
                        Facts::first(seen, ask, &plain).map_or(Slot::Absent { seen: ask.at, changed: 0 }, Slot::Known);
                }
                Learned::Same
            }
            Slot::Live(ino) => {
                let ino = *ino;
                let Some(node) = self.nodes.get_mut(&ino) else { return Learned::Same };
                let ours = node.file.as_ref().is_some_and(|file| file.is_ours());
                if node.facts.changed > ask.stamp || node.facts.seen > ask.at || ours {
                    return Learned::Same;
                }
                let before = node.facts.stored.as_ref().map(|stored| stored.etag.clone());
                // A directory with something of ours in it exists, whatever a listing says.
                let held = matches!(seen, Seen::Absent) && node.directory.is_some() && self.has_ours(ino);
                let Some(node) = self.nodes.get_mut(&ino) else { return Learned::Same };
                let replaced = node.replaced_while_open(&seen);
                if held || !replaced && node.facts.update(seen.clone(), ask, &plain) {
                    let after = node.facts.stored.as_ref().map(|stored| &stored.etag);
                    return if before.as_ref() == after { Learned::Same } else { Learned::Changed };
                }
                self.detach(ino);
                if let Some(directory) = self.directory_mut(parent) {
                    let slot =
                        Facts::first(seen, ask, &plain).map_or(Slot::Absent { seen: ask.at, changed: 0 }, Slot::Known);
                    directory.names.insert(name.into(), slot);
                }
                Learned::Detached
            }
        }
    }

    /// Is there a file below that the bucket does not have?
    fn has_ours(&self, top: Ino) -> bool {
        self.nodes.iter().any(|(ino, node)| {
            node.file.as_ref().is_some_and(|file| file.is_ours()) && node.place.is_some() && self.is_below(*ino, top)
        })
    }

    /// Gives a name that exists a node.
    pub(crate) fn attach(&mut self, parent: Ino, name: &str) -> Option<Ino> {
        if let Some(ino) = self.live(parent, name) {
            return Some(ino);
        }
        let ino = self.free_number(parent, name);
        self.attach_as(parent, name, ino)
    }

    fn attach_as(&mut self, parent: Ino, name: &str, ino: Ino) -> Option<Ino> {
        let directory = self.nodes.get_mut(&parent)?.directory.as_mut()?;
        let (name, Slot::Known(_)) = directory.names.get_key_value(name)? else { return None };
        let name = name.clone();
        let Some(Slot::Known(facts)) = directory.names.insert(name.clone(), Slot::Live(ino)) else { return None };
        self.nodes.insert(ino, Node::new(Some((parent, name)), facts));
        self.pin(parent);
        Some(ino)
    }

    /// Gives a name the number that the kernel knows it by.
    pub(crate) fn adopt_number(&mut self, parent: Ino, name: &str, ino: Ino, lookups: u64) {
        if let Some(old) = self.live(parent, name)
            && old != ino
            && !self.nodes.contains_key(&ino)
            && let Some(node) = self.nodes.remove(&old)
        {
            self.nodes.insert(ino, node);
            if let Some(slot) = self.directory_mut(parent).and_then(|directory| directory.names.get_mut(name)) {
                *slot = Slot::Live(ino);
            }
        } else if self.live(parent, name).is_none() && !self.nodes.contains_key(&ino) {
            self.attach_as(parent, name, ino);
        }
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.lookups = lookups;
        }
    }

    /// A name that was made here. Any node that the name had is detached.
    pub(crate) fn insert(&mut self, parent: Ino, name: &str, facts: Facts) -> Option<Ino> {
        if let Some(old) = self.live(parent, name) {
            self.detach(old);
        }
        self.directory_mut(parent)?.names.insert(name.into(), Slot::Known(facts));
        self.attach(parent, name)
    }

    /// A name that was removed here.
    pub(crate) fn remove(&mut self, parent: Ino, name: &str) {
        if let Some(old) = self.live(parent, name) {
            self.detach(old);
        }
        let changed = self.tick();
        if let Some(directory) = self.directory_mut(parent) {
            directory.names.insert(name.into(), Slot::Absent { seen: Instant::now(), changed });
        }
    }

    /// Nothing is known of a name any more.
    pub(crate) fn unlearn(&mut self, parent: Ino, name: &str) {
        if let Some(old) = self.live(parent, name) {
            self.detach(old);
        }
        if let Some(directory) = self.directory_mut(parent) {
            directory.names.remove(name);
            directory.complete = None;
        }
    }

    /// Takes a node out of the tree; it lives on for those who refer to it.
    pub(crate) fn detach(&mut self, ino: Ino) {
        let Some((parent, name)) = self.nodes.get_mut(&ino).and_then(|node| node.place.take()) else { return };
        if let Some(directory) = self.directory_mut(parent) {
            directory.names.remove(&name);
        }
        self.drop_if_unused(ino);
        self.unpin(parent);
    }

    /// Moves a name with its node and all below it. What the new name was is detached.
    pub(crate) fn rename(&mut self, from: (Ino, &str), to: (Ino, &str)) {
        if let Some(old) = self.live(to.0, to.1) {
            self.detach(old);
        }
        let changed = self.tick();
        let Some(slot) = self.directory_mut(from.0).and_then(|directory| directory.names.remove(from.1)) else {
            return;
        };
        let name: Arc<str> = to.1.into();
        if let Slot::Live(ino) = slot
            && let Some(node) = self.nodes.get_mut(&ino)
        {
            node.place = Some((to.0, name.clone()));
            self.pin(to.0);
            self.unpin(from.0);
        }
        let now = Instant::now();
        if let Some(directory) = self.directory_mut(from.0) {
            directory.names.insert(from.1.into(), Slot::Absent { seen: now, changed });
        }
        if let Some(directory) = self.directory_mut(to.0) {
            directory.names.insert(name, slot);
        }
        if let Some(facts) = self.facts_mut(to.0, to.1) {
            facts.changed = changed;
            facts.seen = now;
        }
    }

    /// Somebody refers to a node.
    pub(crate) fn pin(&mut self, ino: Ino) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.pins += 1;
        }
    }

    /// Not any more.
    pub(crate) fn unpin(&mut self, ino: Ino) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.pins = node.pins.saturating_sub(1);
            self.drop_if_unused(ino);
        }
    }

    /// The kernel gives references back.
    pub(crate) fn forget(&mut self, ino: Ino, count: u64) {
        if let Some(node) = self.nodes.get_mut(&ino)
            && ino != ROOT
        {
            node.lookups = node.lookups.saturating_sub(count);
            self.drop_if_unused(ino);
        }
    }

    /// Without references a node is dropped; its facts go back to its directory.
    fn drop_if_unused(&mut self, ino: Ino) {
        let unused = |node: &Node| node.lookups == 0 && node.pins == 0 && node.file.is_none() && ino != ROOT;
        if !self.nodes.get(&ino).is_some_and(unused) {
            return;
        }
        let Some(node) = self.nodes.remove(&ino) else { return };
        if let Some((parent, name)) = node.place {
            if let Some(directory) = self.directory_mut(parent) {
                directory.names.insert(name, Slot::Known(node.facts));
            }
            self.unpin(parent);
        }
    }

    /// After a file was let go of.
    pub(crate) fn let_go(&mut self, ino: Ino) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.file = None;
            self.drop_if_unused(ino);
        }
    }

    /// A listing of the whole directory has ended: what it did not show, and what was not changed here since, is gone.
    /// Returns the names of nodes that were detached.
    pub(crate) fn completed(&mut self, ino: Ino, ask: Ask, changing: impl Fn(&str) -> bool) -> Vec<Arc<str>> {
        let gone = |tree: &Self, slot: &Slot| match slot {
            Slot::Absent { changed, .. } => *changed <= ask.stamp,
            Slot::Known(facts) => facts.seen < ask.at && facts.changed <= ask.stamp,
            Slot::Live(live) => tree.nodes.get(live).is_none_or(|node| {
                let ours = node.file.as_ref().is_some_and(|file| file.is_ours());
                node.facts.seen < ask.at && node.facts.changed <= ask.stamp && !ours && {
                    node.directory.is_none() || !tree.has_ours(*live)
                }
            }),
        };
        let Some(directory) = self.directory(ino) else { return Vec::new() };
        let lost: Vec<_> = directory
            .names
            .iter()
            .filter(|(name, slot)| gone(self, slot) && !changing(name))
            .map(|(name, _)| name.clone())
            .collect();
        let mut detached = Vec::new();
        for name in lost {
            if let Some(live) = self.live(ino, &name) {
                self.detach(live);
                detached.push(name.clone());
            }
            if let Some(directory) = self.directory_mut(ino) {
                directory.names.remove(&name);
            }
        }
        if let Some(directory) = self.directory_mut(ino) {
            directory.complete = Some(ask.at);
            directory.misses = 0;
            directory.answers = 0;
        }
        detached
    }

    /// Does a fresh and complete listing (or an answer about this name) say that there is nothing?
    pub(crate) fn is_absent(&self, parent: Ino, name: &str, horizon: Instant) -> bool {
        let Some(directory) = self.directory(parent) else { return false };
        let complete = directory.complete.is_some_and(|complete| complete >= horizon);
        match directory.names.get(name) {
            Some(Slot::Absent { seen, .. }) => *seen >= horizon || complete,
            Some(_) => false,
            None => complete,
        }
    }
}

#[cfg(test)]
mod tests;
