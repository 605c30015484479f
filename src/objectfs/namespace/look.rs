//! Looking at names in the bucket: as seldom as freshness allows, and in one round trip where that can be.

use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use super::super::attributes::Attributes;
use super::super::store::{Head, ListRequest, StoreErrorKind};
use super::errors::refused;
use super::facts::{Ask, Seen, Stored};
use super::tree::{Directory, Learned, ROOT, Slot};
use super::{Namespace, S_IFDIR, at_once};
use crate::fuse::filesystem::{Answer, Ino};
use crate::host::Errno;

/// HEADs under way at once for one listing.
pub(super) const HEADS: usize = 64;
/// A walk looks into so many directories ahead, and at so many names in each.
const AHEAD: usize = 3;
const NAMES_AHEAD: usize = 512;
/// Held by who asks for the attributes of a directory's entries: no name is like that.
const ATTRIBUTES: &str = "/";

/// What has to be asked before a name can be answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// An object's metadata: HEAD.
    Object,
    /// A directory's marker: HEAD.
    Marker,
    /// Whether a directory is still there, and its marker.
    Directory,
    /// Anything; `true`: and the first page of the directory it would be in.
    Anything(bool),
}

/// Who wants to know.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// Who has taken the name, in order to change it.
    Holder,
    /// Anybody else.
    Other,
}

impl Namespace {
    /// Makes sure that a name and its attributes are known as of now, give or take `max_age`. `false`: it does not exist.
    pub(super) async fn find(self: &Arc<Self>, parent: Ino, name: &str, asker: Asker) -> Answer<bool> {
        self.find_since(parent, name, self.horizon(), asker).await.map(|(found, _)| found)
    }

    /// The same for what was right at the horizon or later; also says whether the bucket was asked.
    pub(super) async fn find_since(
        self: &Arc<Self>,
        parent: Ino,
        name: &str,
        horizon: Instant,
        mut asker: Asker,
    ) -> Answer<(bool, bool)> {
        let mut asked = false;
        let mut _held;
        // A name can change its kind while it is looked at; not for ever.
        for tries in 0..8 {
            let (plan, ask, changing) = {
                let mut tree = self.tree();
                if tree.directory(parent).is_none() {
                    return Err(Errno::STALE);
                }
                let ask = tree.ask();
                let ours = tree.live(parent, name).and_then(|ino| tree.node(ino)?.file.clone());
                if ours.is_some_and(|file| file.is_ours()) {
                    return Ok((true, asked));
                }
                let plan = match tree.facts(parent, name) {
                    Some(facts) if facts.is_fresh(horizon) && facts.has_fresh_attributes(horizon) => {
                        let known = tree.directory_mut(parent).is_some_and(Directory::answers);
                        drop(tree);
                        if known {
                            self.keep_fresh(parent);
                        }
                        return Ok((true, asked));
                    }
                    Some(facts) => match (facts.directory, facts.is_fresh(horizon)) {
                        (false, true) => Plan::Object,
                        (false, false) if facts.is_renewed_by_listing() => {
                            let directory = tree.directory_mut(parent).ok_or(Errno::STALE)?;
                            if directory.missed() { Plan::Anything(true) } else { Plan::Object }
                        }
                        (false, false) => Plan::Object,
                        (true, true) => Plan::Marker,
                        (true, false) => Plan::Directory,
                    },
                    None if tree.is_absent(parent, name, horizon) => {
                        drop(tree);
                        self.keep_fresh(parent);
                        return Ok((false, asked));
                    }
                    None => {
                        let directory = tree.directory_mut(parent).ok_or(Errno::STALE)?;
                        let worth = directory.missed() || directory.complete.is_some();
                        Plan::Anything(worth && !directory.huge)
                    }
                };
                (plan, ask, tries > 0 || self.places.is_changing(&tree, parent, name))
            };
            asked = true;
            if asker == Asker::Other && changing {
                // Nobody changes it while it is looked at.
                _held = self.take(&[(parent, name)], None).await;
                asker = Asker::Holder;
                continue;
            }
            let key = self.tree().key_of(parent, name).ok_or(Errno::STALE)?;
            let seen = if plan == Plan::Object && self.wants_index(parent, name, horizon) {
                // Its neighbours are likely to be looked at next.
                tokio::join!(self.carry_out(parent, name, &key, plan), self.load_index(parent)).0?
            } else {
                self.carry_out(parent, name, &key, plan).await?
            };
            if let Some(seen) = seen {
                self.learn_of(&key, parent, name, ask, seen, asker);
            }
        }
        Err(Errno::IO)
    }

    /// `None`: it was learned on the way.
    async fn carry_out(self: &Arc<Self>, parent: Ino, name: &str, key: &str, plan: Plan) -> Answer<Option<Seen>> {
        let marker = format!("{key}/");
        match plan {
            Plan::Object => {
                if let Some(head) = self.head(key).await? {
                    return Ok(Some(Seen::Object(self.stored(&head, false))));
                }
            }
            Plan::Marker => {
                let head = self.head(&marker).await?;
                return Ok(Some(Seen::Directory(Some(head.map(|head| self.stored(&head, true))))));
            }
            Plan::Directory => {
                let (head, below) = tokio::try_join!(self.head_marker(&marker), self.has_keys(&marker))?;
                if head.is_some() || below {
                    return Ok(Some(Seen::Directory(Some(head.map(|head| self.stored(&head, true))))));
                }
            }
            Plan::Anything(_) => {}
        }
        self.look_at_all(parent, name, key, plan == Plan::Anything(true)).await
    }

    /// All that a name can be, in one round trip. `list`: a page of its directory answers for its neighbours, too.
    async fn look_at_all(self: &Arc<Self>, parent: Ino, name: &str, key: &str, list: bool) -> Answer<Option<Seen>> {
        let marker = format!("{key}/");
        let (object, below, head) = if list {
            let (object, whole) = tokio::try_join!(self.head(key), self.list_once(parent, 1))?;
            // What the directory's page has not shown is not there, if there was no other page.
            if whole {
                let folder = self.tree().facts(parent, name).is_some_and(|facts| facts.directory);
                let seen = || object.map_or(Seen::Absent, |head| Seen::Object(self.stored(&head, false)));
                return Ok((!folder).then(seen));
            }
            let (below, head) = tokio::try_join!(self.has_keys(&marker), self.head_marker(&marker))?;
            (object, below, head)
        } else {
            tokio::try_join!(self.head(key), self.has_keys(&marker), self.head_marker(&marker))?
        };
        Ok(Some(match (below || head.is_some(), object) {
            (true, _) => Seen::Directory(Some(head.map(|head| self.stored(&head, true)))),
            (false, Some(head)) => Seen::Object(self.stored(&head, false)),
            (false, None) => Seen::Absent,
        }))
    }

    /// A HEAD; `None`: there is no such key.
    pub(super) async fn head(&self, key: &str) -> Answer<Option<Head>> {
        match self.store.head(key).await {
            Ok(head) => Ok(Some(head)),
            Err(error) if error.kind == StoreErrorKind::NotFound => Ok(None),
            Err(error) => {
                if error.kind == StoreErrorKind::Invalid {
                    // The answer to a HEAD has no words, and expired credentials are a 400 too. A listing says which.
                    self.has_keys(key).await?;
                }
                Err(refused(&error))
            }
        }
    }

    /// The same for a marker beside a listing, which tells what is wrong with the credentials: a key that the service
    /// refuses (MinIO: longer than 246 bytes) is not there.
    async fn head_marker(&self, marker: &str) -> Answer<Option<Head>> {
        match self.store.head(marker).await {
            Ok(head) => Ok(Some(head)),
            Err(error) if matches!(error.kind, StoreErrorKind::NotFound | StoreErrorKind::Invalid) => Ok(None),
            Err(error) => Err(refused(&error)),
        }
    }

    /// Is there any key that begins so?
    pub(super) async fn has_keys(&self, prefix: &str) -> Answer<bool> {
        let request = ListRequest { prefix: prefix.to_owned(), limit: Some(1), ..ListRequest::default() };
        let page = self.store.list(&request).await.map_err(|error| refused(&error))?;
        Ok(!page.objects.is_empty() || !page.prefixes.is_empty())
    }

    pub(super) fn stored(&self, head: &Head, directory: bool) -> Stored {
        let attributes = Attributes::read(&head.metadata, head.modified, directory, &self.defaults);
        Stored::looked_at(head, attributes)
    }

    /// Takes an answer over, and does what follows from it.
    pub(super) fn learn(&self, parent: Ino, name: &str, ask: Ask, seen: Seen) {
        let learned = self.tree().learn(parent, name, ask, seen);
        self.consequences(parent, name, learned);
    }

    /// Takes an answer about a key over. `false`: the name was or is being changed, so that it may say nothing of it.
    pub(super) fn learn_of(&self, key: &str, parent: Ino, name: &str, ask: Ask, seen: Seen, asker: Asker) -> bool {
        let mut tree = self.tree();
        let changing = asker == Asker::Other && self.places.is_changing(&tree, parent, name);
        if changing || tree.key_of(parent, name).as_deref() != Some(key) {
            return false;
        }
        let learned = tree.learn(parent, name, ask, seen);
        drop(tree);
        self.consequences(parent, name, learned);
        true
    }

    pub(super) fn consequences(&self, parent: Ino, name: &str, learned: Learned) {
        match learned {
            Learned::Same => {}
            Learned::Detached => {
                let name = name.to_owned();
                self.tell_kernel(move |kernel| kernel.invalidate_name(parent, name.as_ref()));
            }
            Learned::Changed => {
                let tree = self.tree();
                let Some(ino) = tree.live(parent, name) else { return };
                let Some(node) = tree.node(ino) else { return };
                let (Some(file), Some(stored)) = (&node.file, &node.facts.stored) else { return };
                if let Some(key) = tree.key(ino)
                    && !file.is_ours()
                {
                    let version = stored.version(key);
                    file.content.replaced(version);
                    file.state().counted = stored.size;
                    self.tell_kernel(move |kernel| kernel.invalidate_inode(ino, 0, 0));
                }
            }
        }
    }

    /// Makes sure that a node's attributes are fresh. `STALE`: it is not in the tree any more.
    pub(crate) async fn refresh(self: &Arc<Self>, ino: Ino) -> Answer<()> {
        self.refresh_since(ino, self.horizon(), Asker::Other).await
    }

    pub(super) async fn refresh_since(self: &Arc<Self>, ino: Ino, horizon: Instant, asker: Asker) -> Answer<()> {
        if ino == ROOT {
            return self.refresh_root(horizon).await;
        }
        let (parent, name) = {
            let tree = self.tree();
            let node = tree.node(ino).ok_or(Errno::STALE)?;
            match &node.place {
                Some((parent, name)) => (*parent, name.clone()),
                // Unlinked: nobody else can change it.
                None => return Ok(()),
            }
        };
        self.find_since(parent, &name, horizon, asker).await?;
        let tree = self.tree();
        match tree.node(ino) {
            Some(node) if node.place.is_some() || node.file.is_some() => Ok(()),
            _ => Err(Errno::STALE),
        }
    }

    async fn refresh_root(&self, horizon: Instant) -> Answer<()> {
        let ask = {
            let tree = self.tree();
            let root = tree.node(ROOT).ok_or(Errno::STALE)?;
            if root.facts.has_fresh_attributes(horizon) {
                return Ok(());
            }
            tree.ask()
        };
        let marker = self.marker_key(ROOT).ok_or(Errno::STALE)?;
        let stored = self.head(&marker).await?.map(|head| self.stored(&head, true));
        let mut tree = self.tree();
        let plain = tree.plain.clone();
        if let Some(root) = tree.node_mut(ROOT)
            && root.facts.changed <= ask.stamp
        {
            root.facts.update(Seen::Directory(Some(stored)), ask, &plain);
        }
        Ok(())
    }

    /// Makes sure that many names of a directory have attributes, many HEADs at once. Names that are gone stay without.
    pub(crate) async fn find_many(self: &Arc<Self>, parent: Ino, names: &[String]) {
        let horizon = self.horizon();
        let unknown = || -> Vec<String> {
            let tree = self.tree();
            let unknown = |name: &&String| {
                let facts = tree.facts(parent, name);
                !facts.is_some_and(|facts| facts.has_fresh_attributes(horizon))
            };
            names.iter().filter(unknown).cloned().collect()
        };
        if unknown().is_empty() {
            return;
        }
        // Who looks ahead may be looking at the same.
        let _held = self.lists.take(&[(parent, ATTRIBUTES)], None, |with| with(&self.tree())).await;
        let unknown = unknown();
        if unknown.is_empty() {
            return;
        }
        if unknown.len() > 2 && self.wants_index(parent, &unknown[0], horizon) {
            self.load_index(parent).await;
        }
        let looked = at_once(HEADS, unknown, |name| async move {
            // Who can't be looked at is shown without attributes; the program sees why when it looks itself.
            self.look_at_listed(parent, &name, horizon).await.is_ok()
        });
        let count = looked.await.len();
        self.many_were_looked_at(parent, count);
    }

    /// A program that walks comes to the directories behind this one next: their entries are looked at meanwhile.
    pub(crate) fn look_ahead(self: &Arc<Self>, ino: Ino) {
        if self.store.abilities().listed_metadata {
            return;
        }
        let horizon = self.horizon();
        let mut next = Vec::new();
        {
            let mut tree = self.tree();
            let Some((parent, name)) = tree.node(ino).and_then(|node| node.place.clone()) else { return };
            let Some(above) = tree.directory(parent).filter(|above| above.is_walked(self.max_age)) else { return };
            let behind = above.names.range::<str, _>((Bound::Excluded(&*name), Bound::Unbounded));
            for slot in behind.map(|(_, slot)| slot) {
                let Slot::Live(ino) = slot else { continue };
                let Some(directory) = tree.directory(*ino) else { continue };
                let listed = directory.complete.is_some_and(|complete| complete >= horizon);
                if listed && directory.ahead.is_none_or(|at| at < horizon) {
                    next.push((*ino, directory.names.keys().take(NAMES_AHEAD).map(|name| name.to_string()).collect()));
                }
                if next.len() == AHEAD || !listed {
                    break;
                }
            }
            for (ino, _) in &next {
                tree.pin(*ino);
                if let Some(directory) = tree.directory_mut(*ino) {
                    directory.ahead = Some(Instant::now());
                }
            }
        }
        for (ino, names) in next {
            let this = self.clone();
            self.spawn(async move {
                let names: Vec<String> = names;
                this.find_many(ino, &names).await;
                this.tree().unpin(ino);
            });
        }
    }

    /// The attributes of a name that a listing has just shown: one HEAD.
    async fn look_at_listed(self: &Arc<Self>, parent: Ino, name: &str, horizon: Instant) -> Answer<()> {
        let (key, ask, directory) = {
            let tree = self.tree();
            let Some(facts) = tree.facts(parent, name) else { return Ok(()) };
            if facts.has_fresh_attributes(horizon) {
                return Ok(());
            }
            let ours = tree.live(parent, name).and_then(|ino| tree.node(ino)?.file.clone());
            if ours.is_some_and(|file| file.is_ours()) {
                return Ok(());
            }
            let key = tree.key_of(parent, name).ok_or(Errno::STALE)?;
            (key, tree.ask(), facts.directory)
        };
        if directory {
            let stored = self.head(&format!("{key}/")).await?.map(|head| self.stored(&head, true));
            self.learn(parent, name, ask, Seen::Directory(Some(stored)));
        } else if let Some(head) = self.head(&key).await? {
            self.learn(parent, name, ask, Seen::Object(self.stored(&head, false)));
        }
        Ok(())
    }

    /// Looks a name up for the kernel.
    pub(crate) async fn look_up(self: &Arc<Self>, parent: Ino, name: &str, thread: u32) -> Answer<Option<Ino>> {
        let (found, asked) = self.find_since(parent, name, self.horizon(), Asker::Other).await?;
        if !found {
            return Ok(None);
        }
        let mut tree = self.tree();
        let Some(ino) = tree.attach(parent, name) else { return Ok(None) };
        if asked && let Some(node) = tree.node_mut(ino) {
            node.looked = Some((thread, Instant::now()));
        }
        Ok(Some(ino))
    }

    /// The type of a name as far as it is known; 0: it is not.
    pub(crate) fn kind_of(&self, parent: Ino, name: &str) -> u32 {
        let tree = self.tree();
        match tree.facts(parent, name) {
            Some(facts) if facts.directory => S_IFDIR,
            Some(facts) => match &facts.attributes {
                Some(attributes) => attributes.kind(),
                // Nothing but a regular file is longer than a path.
                None if facts.size() > 4095 => super::super::attributes::S_IFREG,
                None => 0,
            },
            None => 0,
        }
    }
}
