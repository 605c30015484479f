//! Listings: for programs that read directories, and for lookups that a page answers cheaper than single questions.
//!
//! A program's listing is a snapshot of names, in the order in which they were found: an offset is a position in it, so
//! positions hold whatever is made or removed meanwhile.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::super::store::{ListPage, ListRequest};
use super::Namespace;
use super::errors::refused;
use super::facts::{Ask, Seen, Stored};
use super::flat::{Flat, Whole};
use super::tree::{Slot, Tree};
use crate::fuse::filesystem::{Answer, Ino};
use crate::host::Errno;

/// So many names of one directory are remembered; larger ones are only passed through.
const NAMES_MAX: usize = 200_000;
/// The listing of a larger directory is not renewed in the background.
const PAGES_KEPT: usize = 10;
/// A walk lists so many pages ahead before it gives up on a large directory.
const PAGES_AHEAD: usize = 4;

/// A directory that a program reads: what was found so far.
#[derive(Default)]
pub(crate) struct Listing {
    text: String,
    ends: Vec<u32>,
    begun: Option<Ask>,
    token: Option<String>,
    /// Names that were changed here while they were listed: shown once all the same.
    shown: HashSet<String>,
    whole: bool,
}

impl Listing {
    /// The name at a position.
    pub(crate) fn name(&self, at: usize) -> Option<&str> {
        let end = *self.ends.get(at)? as usize;
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        self.text.get(start..end)
    }

    fn push(&mut self, name: &str) {
        self.text.push_str(name);
        // 4 GiB of names do not fit into a directory handle.
        self.ends.push(u32::try_from(self.text.len()).unwrap_or(u32::MAX));
    }
}

impl Namespace {
    /// Makes sure that a listing has an entry at this position, if the directory has so many.
    pub(crate) async fn fill(self: &Arc<Self>, ino: Ino, listing: &mut Listing, position: usize) -> Answer<()> {
        if listing.begun.is_none() {
            self.begin_listing(ino, listing).await?;
        }
        while listing.ends.len() <= position && !listing.whole {
            let (page, ask) = self.page(ino, listing.token.take()).await?;
            let first = listing.ends.is_empty();
            let shown = self.take_page(ino, &page, first && page.token.is_none(), ask);
            {
                let tree = self.tree();
                let begun = listing.begun.unwrap_or(ask);
                for name in &shown {
                    let changed = tree.facts(ino, name).map(|facts| facts.changed > begun.stamp);
                    if changed == Some(true) {
                        listing.shown.insert(name.clone());
                    }
                }
            }
            shown.iter().for_each(|name| listing.push(name));
            self.trim(shown.len());
            listing.token = page.token;
            if listing.token.is_none() {
                listing.whole = true;
                self.end_listing(ino, listing);
            }
            if let Some(directory) = self.tree().directory_mut(ino) {
                directory.huge = !first || !listing.whole;
            }
        }
        Ok(())
    }

    async fn begin_listing(self: &Arc<Self>, ino: Ino, listing: &mut Listing) -> Answer<()> {
        let horizon = self.horizon();
        if !self.is_listed(ino, horizon) {
            self.walk_ahead(ino).await?;
        }
        let mut tree = self.tree();
        listing.begun = Some(tree.ask());
        let directory = tree.directory_mut(ino).ok_or(Errno::NOTDIR)?;
        directory.walked = Some(Instant::now());
        if directory.complete.is_some_and(|complete| complete >= horizon) {
            for (name, slot) in &directory.names {
                if !matches!(slot, Slot::Absent { .. }) {
                    listing.push(name);
                }
            }
            listing.whole = true;
        }
        Ok(())
    }

    /// What was made here while a listing went on is shown at its end.
    fn end_listing(&self, ino: Ino, listing: &mut Listing) {
        let Some(begun) = listing.begun else { return };
        let mut tree = self.tree();
        let Some(directory) = tree.directory(ino) else { return };
        let mut late = Vec::new();
        for (name, slot) in &directory.names {
            let local = match slot {
                Slot::Absent { .. } => false,
                Slot::Known(facts) => facts.changed > begun.stamp,
                Slot::Live(live) => tree.node(*live).is_some_and(|node| {
                    let ours = node.file.as_ref().is_some_and(|file| file.is_ours());
                    node.facts.changed > begun.stamp || ours
                }),
            };
            let changing = || !matches!(slot, Slot::Absent { .. }) && self.places.is_held(ino, name);
            if (local || changing()) && !listing.shown.contains(name.as_ref()) {
                late.push(name.clone());
            }
        }
        // A file of ours that the bucket has as well was shown although it did not change meanwhile.
        let pages: HashSet<String> = if late.is_empty() {
            HashSet::new()
        } else {
            (0..listing.ends.len()).filter_map(|at| listing.name(at).map(str::to_owned)).collect()
        };
        late.iter().filter(|name| !pages.contains(name.as_ref())).for_each(|name| listing.push(name));
        if listing.ends.len() <= NAMES_MAX {
            self.complete(&mut tree, ino, begun);
        }
    }

    fn complete(&self, tree: &mut Tree, ino: Ino, ask: Ask) {
        if self.places.is_moving(tree, ino) {
            // Some of it is here already, and some there.
            return;
        }
        // A change that the bucket has and the tree does not have yet; and MinIO's listings leave an object out for a moment while its metadata is being replaced.
        let detached = tree.completed(ino, ask, |name| self.places.is_held(ino, name));
        if !detached.is_empty() {
            self.tell_kernel(move |kernel| {
                detached.iter().for_each(|name| kernel.invalidate_name(ino, name.as_ref().as_ref()));
            });
        }
    }

    /// Is a directory's listing known, as of the horizon?
    pub(super) fn is_listed(&self, ino: Ino, horizon: Instant) -> bool {
        let tree = self.tree();
        tree.directory(ino).is_some_and(|directory| directory.complete.is_some_and(|complete| complete >= horizon))
    }

    async fn page(&self, ino: Ino, token: Option<String>) -> Answer<(ListPage, Ask)> {
        let (prefix, ask) = {
            let tree = self.tree();
            (tree.key(ino).ok_or(Errno::NOENT)?, tree.ask())
        };
        let request = ListRequest { prefix, delimiter: true, token, metadata: true, ..ListRequest::default() };
        let page = self.store.list(&request).await.map_err(|error| refused(&error))?;
        Ok((page, ask))
    }

    /// Takes a page over (`only`: there is no other); returns the names that it shows and that are still there.
    fn take_page(&self, ino: Ino, page: &ListPage, only: bool, ask: Ask) -> Vec<String> {
        let mut tree = self.tree();
        let Some(prefix) = tree.key(ino) else { return Vec::new() };
        let mut shown = Vec::with_capacity(page.objects.len() + page.prefixes.len());
        let mut consequences = Vec::new();
        let known = tree.directory(ino).map_or(0, |directory| directory.names.len());
        let folders: HashSet<&str> = page
            .prefixes
            .iter()
            .filter_map(|key| key.strip_prefix(prefix.as_str())?.strip_suffix('/'))
            .filter(|name| self.is_name(ino, name))
            .collect();
        let mut marker = None;
        let mut entries: Vec<(&str, Seen)> = Vec::new();
        for object in &page.objects {
            match object.key.strip_prefix(prefix.as_str()) {
                Some("") => marker = Some(Stored::listed(object, true, &self.defaults)),
                // Where both exist, the directory is shown.
                Some(name) if self.is_name(ino, name) && !folders.contains(name) => {
                    entries.push((name, Seen::Object(Stored::listed(object, false, &self.defaults))));
                }
                _ => {}
            }
        }
        entries.extend(folders.iter().map(|name| (*name, Seen::Directory(None))));
        entries.sort_by(|one, other| one.0.cmp(other.0));
        for (name, seen) in entries {
            let object = matches!(seen, Seen::Object(_));
            // The directory of the same name came, or comes, on another page.
            if object && !only && tree.facts(ino, name).is_some_and(|facts| facts.directory) {
                continue;
            }
            if known < NAMES_MAX || tree.facts(ino, name).is_some() {
                let learned = tree.learn(ino, name, ask, seen);
                consequences.push((name.to_owned(), learned));
                if tree.facts(ino, name).is_some() {
                    shown.push(name.to_owned());
                }
            } else {
                shown.push(name.to_owned());
            }
        }
        self.take_marker(&mut tree, ino, marker, only, ask);
        drop(tree);
        for (name, learned) in consequences {
            self.consequences(ino, &name, learned);
        }
        shown
    }

    /// The first page shows a directory's own marker, or that there is none.
    pub(super) fn take_marker(&self, tree: &mut Tree, ino: Ino, marker: Option<Stored>, only: bool, ask: Ask) {
        let plain = tree.plain.clone();
        let Some(node) = tree.node_mut(ino) else { return };
        // The root of a bucket has its marker elsewhere.
        if node.facts.changed > ask.stamp || (ino == super::ROOT && self.settings.prefix.is_empty()) {
            return;
        }
        if marker.is_some() || only {
            node.facts.update(Seen::Directory(Some(marker)), ask, &plain);
        }
    }

    /// Lists a directory of at most so many pages, for lookups. `true`: that was all of it. Whoever comes while somebody
    /// lists waits.
    pub(super) async fn list_once(self: &Arc<Self>, ino: Ino, pages: usize) -> Answer<bool> {
        let since = Instant::now();
        let _held = self.lists.take(&[(ino, "")], None, |with| with(&self.tree())).await;
        if self.is_listed(ino, since) {
            return Ok(true);
        }
        let (mut begun, mut token) = (None, None);
        for number in 0..pages {
            let (page, ask) = self.page(ino, token).await?;
            let begun = *begun.get_or_insert(ask);
            self.take_page(ino, &page, number == 0 && page.token.is_none(), ask);
            token = page.token;
            let mut tree = self.tree();
            if token.is_none() {
                self.complete(&mut tree, ino, begun);
            }
            let Some(directory) = tree.directory_mut(ino) else { return Err(Errno::STALE) };
            directory.huge = number > 0 || token.is_some();
            if token.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A listing that lookups use is renewed before it is too old, so that none of them has to wait.
    pub(super) fn keep_fresh(self: &Arc<Self>, ino: Ino) {
        {
            let mut tree = self.tree();
            let Some(directory) = tree.directory_mut(ino) else { return };
            let due = directory.complete.is_some_and(|complete| complete.elapsed() * 2 > self.max_age);
            if !due || directory.refreshing || directory.names.len() > PAGES_KEPT * 1000 {
                return;
            }
            directory.refreshing = true;
            tree.pin(ino);
        }
        let this = self.clone();
        self.spawn(async move {
            // Nobody waits for it; who needs it and finds it old asks for itself.
            let _ = this.list_once(ino, PAGES_KEPT).await;
            let mut tree = this.tree();
            if let Some(directory) = tree.directory_mut(ino) {
                directory.refreshing = false;
            }
            tree.unpin(ino);
        });
    }

    /// A directory is listed soon after one above it: a program walks. Lists without a delimiter from here on, so that
    /// one answer fills many directories, until this one is whole.
    async fn walk_ahead(self: &Arc<Self>, ino: Ino) -> Answer<()> {
        let (top, path, prefix, key) = {
            let tree = self.tree();
            let key = tree.key(ino).ok_or(Errno::NOENT)?;
            let (mut top, mut path) = (ino, Vec::new());
            while let Some((parent, name)) = tree.node(top).and_then(|node| node.place.clone()) {
                if !tree.directory(parent).is_some_and(|above| above.is_walked(self.max_age)) {
                    break;
                }
                top = parent;
                path.insert(0, name.to_string());
            }
            if top == ino || tree.directory(ino).is_none_or(|directory| directory.huge) {
                return Ok(());
            }
            (top, path, tree.key(top).ok_or(Errno::NOENT)?, key)
        };
        let mut flat = Flat::new(prefix.clone(), &path, self.defaults);
        // Behind all that sorts before the directory's own marker.
        let mut after = Some(format!("{}.{}", key.trim_end_matches('/'), char::MAX));
        let mut token = None;
        for _ in 0..PAGES_AHEAD {
            let ask = self.tree().ask();
            let request = ListRequest {
                prefix: prefix.clone(),
                after: after.take(),
                token,
                metadata: true,
                ..ListRequest::default()
            };
            let page = self.store.list(&request).await.map_err(|error| refused(&error))?;
            token = page.token.clone();
            let mut whole = flat.take(page, ask);
            if token.is_none() {
                whole.extend(flat.finish());
            }
            let found = whole.iter().any(|whole| whole.path == path);
            self.trim(whole.iter().map(|whole| whole.names.len()).sum());
            self.take_flat(top, whole);
            if found || token.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Directories that a flat listing has shown whole.
    fn take_flat(&self, top: Ino, done: Vec<Whole>) {
        let mut told = Vec::new();
        'directories: for whole in done {
            let mut tree = self.tree();
            // Only what has a node can have a listing: it is made for those on the way.
            let mut at = top;
            for name in &whole.path {
                if !self.is_name(at, name) {
                    continue 'directories;
                }
                let learned = tree.learn(at, name, whole.ask, Seen::Directory(None));
                told.push((at, name.clone(), learned));
                match tree.attach(at, name) {
                    Some(next) => at = next,
                    None => continue 'directories,
                }
            }
            if tree.directory(at).is_none() {
                continue;
            }
            for (name, seen) in whole.names {
                if self.is_name(at, &name) {
                    let learned = tree.learn(at, &name, whole.ask, seen);
                    told.push((at, name, learned));
                }
            }
            self.take_marker(&mut tree, at, whole.marker, true, whole.ask);
            self.complete(&mut tree, at, whole.ask);
        }
        for (parent, name, learned) in told {
            self.consequences(parent, &name, learned);
        }
    }

    /// An entry was made or removed here: the directory's times say so.
    pub(super) fn touch(&self, tree: &mut Tree, ino: Ino) {
        if let Some(directory) = tree.directory_mut(ino) {
            directory.touched = Some(SystemTime::now());
            directory.unwritten += 1;
        }
    }
}
