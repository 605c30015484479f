//! Renames. Of a file: copy on the server, then delete, so that there is either name or both, never neither. Of a
//! directory: the same for each key below it, with a journal by which anybody can finish it.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::content::{Intent, Version};
use super::super::store::{
    Condition, Etag, ListPage, ListRequest, Listed, Metadata, Payload, StoreError, StoreErrorKind, StoreResult,
};
use super::errors::refused;
use super::facts::Stored;
use super::look::Asker;
use super::tree::{ROOT, Slot};
use super::{KEY_MAX, Namespace, at_once};
use crate::fuse::filesystem::{Answer, Ino};
use crate::host::Errno;

const RENAME_NOREPLACE: u32 = 1;
/// Copies and deletes under way at once.
const AT_ONCE: usize = 48;

/// What has to be finished if whoever began it can't.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    /// Whole prefix, ends in `/`.
    pub(super) from: String,
    /// The same.
    pub(super) to: String,
    /// Who: for people.
    pub(super) mount: String,
    /// Seconds since 1970, by the clock of who began it: for people.
    pub(super) began: u64,
}

impl Namespace {
    /// rename(2).
    pub(crate) async fn rename(
        self: &Arc<Self>,
        (parent, name): (Ino, &str),
        (new_parent, new_name): (Ino, &str),
        flags: u32,
    ) -> Answer<()> {
        self.writable()?;
        // RENAME_EXCHANGE needs both names at once, and RENAME_WHITEOUT is for overlays.
        if flags & !RENAME_NOREPLACE != 0 {
            return Err(Errno::INVAL);
        }
        self.check_name(new_parent, new_name)?;
        for _ in 0..8 {
            if !self.find(parent, name, Asker::Other).await? {
                return Err(Errno::NOENT);
            }
            let (ino, directory) = {
                let mut tree = self.tree();
                let Some(ino) = tree.attach(parent, name) else { continue };
                (ino, tree.node(ino).is_some_and(|node| node.facts.directory))
            };
            if directory && self.tree().is_below(new_parent, ino) {
                return Err(Errno::INVAL);
            }
            let mut places = vec![(parent, name)];
            if (new_parent, new_name) != (parent, name) {
                places.push((new_parent, new_name));
            }
            let held = self.take(&places, directory.then_some(ino)).await;
            // It may have changed while we waited.
            if !self.find(parent, name, Asker::Holder).await? || self.tree().live(parent, name) != Some(ino) {
                drop(held);
                continue;
            }
            let no_replace = flags & RENAME_NOREPLACE != 0;
            // What is not to be replaced is looked for now: not every service refuses a copy that replaces something.
            let horizon = if no_replace || directory { Instant::now() } else { self.horizon() };
            let (there, _) = self.find_since(new_parent, new_name, horizon, Asker::Holder).await?;
            if there && no_replace {
                return Err(Errno::EXIST);
            }
            if places.len() == 1 {
                return Ok(());
            }
            if there {
                self.check_target(new_parent, new_name, directory).await?;
            }
            let (from, to) = ((parent, name), (new_parent, new_name));
            return if directory {
                self.rename_directory(ino, from, to).await
            } else {
                self.rename_file(ino, from, to, there, no_replace).await
            };
        }
        Err(Errno::STALE)
    }

    /// May it be replaced by a directory, or a file?
    async fn check_target(&self, parent: Ino, name: &str, by_directory: bool) -> Answer<()> {
        let (ino, directory) = {
            let mut tree = self.tree();
            let ino = tree.attach(parent, name).ok_or(Errno::STALE)?;
            (ino, tree.node(ino).is_some_and(|node| node.facts.directory))
        };
        match (by_directory, directory) {
            (true, false) => Err(Errno::NOTDIR),
            (false, true) => Err(Errno::ISDIR),
            (false, false) => Ok(()),
            (true, true) => {
                let key = self.tree().key(ino).ok_or(Errno::STALE)?;
                self.check_empty(ino, &key).await
            }
        }
    }

    async fn rename_file(
        self: &Arc<Self>,
        ino: Ino,
        from: (Ino, &str),
        to: (Ino, &str),
        there: bool,
        no_replace: bool,
    ) -> Answer<()> {
        let file = self.tree().node(ino).and_then(|node| node.file.clone());
        let (target, target_file) = {
            let tree = self.tree();
            let target = tree.live(to.0, to.1);
            (target, target.and_then(|target| tree.node(target)?.file.clone()))
        };
        let uncommitted = file.as_ref().filter(|file| file.is_ours() && file.state().uncommitted);
        if let Some(file) = uncommitted {
            // The bucket has never had it: its commit makes it under the new name.
            if let Some(target_file) = &target_file {
                self.put_aside(target_file).await?;
            }
            self.renamed_over(to, target, target_file).await;
            if !file.state().is_nothing() {
                // What it was to replace under its old name goes all the same.
                let from_key = self.tree().key(ino).ok_or(Errno::STALE)?;
                self.leave_marker(from.0, from.1).await?;
                self.store.delete(&from_key, None).await.map_err(|error| refused(&error))?;
            }
            file.state().exclusive = !there;
            self.renamed(from, to);
            return self.remember(ino, file).await;
        }
        let (from_key, to_key) = {
            let tree = self.tree();
            (tree.key(ino).ok_or(Errno::STALE)?, tree.key_of(to.0, to.1).ok_or(Errno::STALE)?)
        };
        // A target that may not be replaced needs a condition that only a copy has.
        if let Some(file) = file.as_ref().filter(|file| file.is_ours())
            && (no_replace || !file.content.is_dirty())
        {
            self.commit_held(ino, file, from.0, from.1).await?;
        }
        if let Some(target_file) = &target_file {
            self.put_aside(target_file).await?;
        }
        let version = match file.as_ref().filter(|file| file.content.is_dirty()) {
            Some(file) => self.commit_as(ino, file, &to_key).await?,
            None => self.copy_file(ino, from, &from_key, &to_key, no_replace).await?,
        };
        self.leave_marker(from.0, from.1).await?;
        match self.store.delete(&from_key, Some(&version.1)).await {
            Ok(()) => {}
            // Somebody has written a new file under the old name meanwhile: it stays.
            Err(error) if error.kind == StoreErrorKind::Conflict => {}
            Err(error) => {
                // Both names are there; the new one is as good as the old one.
                return Err(refused(&error));
            }
        }
        self.renamed_over(to, target, target_file).await;
        {
            let mut tree = self.tree();
            if let Some(node) = tree.node_mut(ino) {
                if node.paged.as_ref() == Some(&version.1) {
                    node.paged = Some(version.0.etag.clone());
                }
                if let Some((etag, _)) = node.target.as_mut().filter(|(etag, _)| *etag == version.1) {
                    *etag = version.0.etag.clone();
                }
                node.facts.stored = Some(Stored::written(version.0.etag.clone(), version.0.size));
                node.facts.learned = SystemTime::now();
            }
        }
        if let Some(file) = &file {
            file.content.moved(version.0);
        }
        self.renamed(from, to);
        Ok(())
    }

    /// Commits a file that has changed here under its new name. Returns the new version and the old one's tag.
    async fn commit_as(self: &Arc<Self>, ino: Ino, file: &Arc<super::File>, to_key: &str) -> Answer<(Version, Etag)> {
        let base = file.content.base().ok_or(Errno::STALE)?;
        let (intent, attributes) = self.intent(ino, file)?;
        let intent = Intent { key: to_key.to_owned(), ..intent };
        let version = file.content.commit(&intent).await.map_err(|error| super::errors::content_errno(&error))?;
        self.committed(ino, file, version.clone(), &attributes);
        Ok((version, base.etag))
    }

    /// Copies a file that is all in the bucket. Returns the new version and the old one's tag.
    async fn copy_file(
        self: &Arc<Self>,
        ino: Ino,
        from: (Ino, &str),
        from_key: &str,
        to_key: &str,
        no_replace: bool,
    ) -> Answer<(Version, Etag)> {
        let exclusive = no_replace && self.store.abilities().conditional_copy;
        let condition = if exclusive { Condition::Absent } else { Condition::None };
        for _ in 0..8 {
            let stored = self.tree().node(ino).and_then(|node| node.facts.stored.clone()).ok_or(Errno::STALE)?;
            match self.copy(from_key, &stored.etag, stored.size, to_key, None, &condition).await {
                Ok(etag) => {
                    let version = Version { key: to_key.to_owned(), etag, size: stored.size };
                    return Ok((version, stored.etag));
                }
                Err(error) if matches!(error.kind, StoreErrorKind::Conflict | StoreErrorKind::NotFound) => {
                    if exclusive && self.head(to_key).await?.is_some() {
                        return Err(Errno::EXIST);
                    }
                    // Another version by now: that is renamed.
                    let (found, _) = self.find_since(from.0, from.1, std::time::Instant::now(), Asker::Holder).await?;
                    if !found {
                        return Err(Errno::NOENT);
                    }
                    if self.tree().live(from.0, from.1) != Some(ino) {
                        return Err(Errno::STALE);
                    }
                }
                Err(error) => return Err(refused(&error)),
            }
        }
        Err(Errno::STALE)
    }

    /// What the new name was is gone.
    async fn renamed_over(self: &Arc<Self>, to: (Ino, &str), target: Option<Ino>, file: Option<Arc<super::File>>) {
        self.removed(to.0, to.1, target, file).await;
    }

    fn renamed(self: &Arc<Self>, from: (Ino, &str), to: (Ino, &str)) {
        {
            let mut tree = self.tree();
            tree.rename(from, to);
            self.touch(&mut tree, from.0);
            self.touch(&mut tree, to.0);
        }
        self.index_later(from.0);
        self.index_later(to.0);
    }

    /// What is staged is to be found under the new key by a successor.
    async fn remember(self: &Arc<Self>, ino: Ino, file: &super::File) -> Answer<()> {
        let (intent, _) = self.intent(ino, file)?;
        file.content.remember(&intent).await.map_err(|error| super::errors::content_errno(&error))
    }

    async fn rename_directory(self: &Arc<Self>, ino: Ino, from: (Ino, &str), to: (Ino, &str)) -> Answer<()> {
        let (from_key, to_key) = {
            let tree = self.tree();
            (tree.key(ino).ok_or(Errno::STALE)?, tree.key_of(to.0, to.1).ok_or(Errno::STALE)? + "/")
        };
        if to_key.len() > from_key.len() {
            self.check_lengths(&from_key, to_key.len() - from_key.len()).await?;
        }
        let journal = Journal {
            from: from_key.clone(),
            to: to_key.clone(),
            mount: self.identity.clone(),
            began: super::facts::seconds(SystemTime::now()),
        };
        let journal_key = format!("{}renames/{}", self.hidden, self.unique());
        let body = serde_json::to_vec(&journal).map_err(|_| Errno::IO)?;
        let metadata = Metadata { content_type: Some("application/json".to_owned()), ..Metadata::default() };
        let put = self.store.put(&journal_key, Payload::Bytes(body.into()), &metadata, &Condition::Absent).await;
        put.map_err(|error| refused(&error))?;
        let live = self.live_files(ino);
        let moved = self.move_keys(&from_key, &to_key, &live, || {
            let tree = self.tree();
            let attributes = tree.node(ino).and_then(|node| node.facts.attributes.as_deref());
            attributes.map(super::Attributes::metadata).unwrap_or_default()
        });
        let moved = match moved.await {
            Ok(()) => self.leave_marker_of(from).await,
            Err(error) => Err(refused(&error)),
        };
        if let Err(errno) = moved {
            // Part of it has two names. Nothing is lost: it is finished as soon as the service lets us.
            self.finish_later(ino, journal_key, journal);
            return Err(errno);
        }
        if let Err(error) = self.store.delete(&journal_key, None).await {
            // A journal without keys to move is finished by whoever finds it.
            tracing::info!("{error}");
        }
        let target = self.tree().live(to.0, to.1);
        self.removed(to.0, to.1, target, None).await;
        self.renamed(from, to);
        self.forget_below(ino);
        self.remember_below(ino).await;
        Ok(())
    }

    async fn leave_marker_of(&self, from: (Ino, &str)) -> Answer<()> {
        self.leave_marker(from.0, from.1).await
    }

    /// Keys of files below a directory that have content here, which has to be told where its base is.
    fn live_files(&self, top: Ino) -> HashMap<String, Arc<super::File>> {
        let tree = self.tree();
        tree.iter()
            .filter(|(ino, node)| node.file.is_some() && node.place.is_some() && tree.is_below(*ino, top))
            .filter_map(|(ino, node)| Some((tree.key(ino)?, node.file.clone()?)))
            .collect()
    }

    /// Files below that were changed here and not committed are to be found under their new keys.
    async fn remember_below(self: &Arc<Self>, top: Ino) {
        let files: Vec<_> = {
            let tree = self.tree();
            let ours = tree.iter().filter(|(ino, node)| {
                node.file.as_ref().is_some_and(|file| file.is_ours())
                    && node.place.is_some()
                    && tree.is_below(*ino, top)
            });
            ours.filter_map(|(ino, node)| Some((ino, node.file.clone()?))).collect()
        };
        for (ino, file) in files {
            // A failing disk shows at the next write or close.
            let _ = self.remember(ino, &file).await;
        }
    }

    /// Copies have new times and may have new tags: what was known of those below has to be looked at again.
    fn forget_below(&self, top: Ino) {
        let mut tree = self.tree();
        let below: Vec<Ino> =
            tree.iter().filter(|(ino, _)| *ino != ROOT && tree.is_below(*ino, top)).map(|(ino, _)| ino).collect();
        let changed = tree.tick();
        for ino in below {
            let Some(node) = tree.node_mut(ino) else { continue };
            node.facts.changed = changed;
            if let Some(stored) = &mut node.facts.stored {
                stored.modified = None;
                stored.own = true;
            }
            if let Some(file) = &node.file
                && let Some(base) = file.content.base()
            {
                node.paged = Some(base.etag.clone());
                node.facts.stored = Some(Stored::written(base.etag, base.size));
            }
            node.facts.learned = SystemTime::now();
            if let Some(directory) = &mut node.directory {
                directory.complete = None;
                directory.index = None;
                directory.names.retain(|_, slot| matches!(slot, Slot::Live(_)));
            }
        }
    }

    async fn check_lengths(&self, from: &str, longer: usize) -> Answer<()> {
        let mut token = None;
        loop {
            let page = self.flat_page(from, token).await.map_err(|error| refused(&error))?;
            if page.objects.iter().any(|object| object.key.len() + longer > KEY_MAX) {
                return Err(Errno::NAMETOOLONG);
            }
            token = page.token;
            if token.is_none() {
                return Ok(());
            }
        }
    }

    async fn flat_page(&self, prefix: &str, token: Option<String>) -> StoreResult<ListPage> {
        self.store.list(&ListRequest { prefix: prefix.to_owned(), token, ..ListRequest::default() }).await
    }

    /// Moves all keys below a prefix: copies all of them first. `marker`: of a directory that has no key at all.
    async fn move_keys(
        &self,
        from: &str,
        to: &str,
        live: &HashMap<String, Arc<super::File>>,
        marker: impl Fn() -> Metadata,
    ) -> StoreResult<()> {
        let mut copied = HashSet::new();
        let mut bases = Vec::new();
        let mut token = None;
        let mut any = false;
        loop {
            let page = self.flat_page(from, token).await?;
            any |= !page.objects.is_empty();
            let results = at_once(AT_ONCE, page.objects, |object: Listed| async move {
                let version = self.copy_key(&object, from, to).await?;
                Ok::<_, StoreError>(version.map(|version| (object, version)))
            });
            for result in results.await {
                let Some((object, version)) = result? else { continue };
                copied.insert(mark(&object.key, &object.etag));
                if let Some(file) = live.get(&object.key) {
                    bases.push((file.clone(), object.etag, version));
                }
            }
            token = page.token;
            if token.is_none() {
                break;
            }
        }
        if !any {
            self.store.put(to, Payload::Bytes(Bytes::new()), &marker(), &Condition::Absent).await?;
        }
        // Readers go on under the new name before the old one goes.
        for (file, etag, version) in bases {
            if file.content.base().is_some_and(|base| base.etag == etag) {
                file.content.moved(version);
            }
        }
        self.delete_keys(from, to, &copied).await
    }

    /// Copies a key to its new place. `None`: it has gone meanwhile.
    async fn copy_key(&self, object: &Listed, from: &str, to: &str) -> StoreResult<Option<Version>> {
        let Some(rest) = object.key.strip_prefix(from) else { return Ok(None) };
        let to = format!("{to}{rest}");
        match self.copy(&object.key, &object.etag, object.size, &to, None, &Condition::None).await {
            Ok(etag) => Ok(Some(Version { key: to, etag, size: object.size })),
            // Another version by now: the pass that deletes finds it.
            Err(error) if matches!(error.kind, StoreErrorKind::NotFound | StoreErrorKind::Conflict) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the old keys, each in the version that was copied; whatever has come meanwhile is copied now.
    async fn delete_keys(&self, from: &str, to: &str, copied: &HashSet<u64>) -> StoreResult<()> {
        let conditional = self.store.abilities().conditional_delete;
        // Others may go on writing below the old name, but not for ever.
        for _ in 0..16 {
            let mut token = None;
            let mut again = false;
            loop {
                let page = self.flat_page(from, token).await?;
                token = page.token.clone();
                let (mut gone, new): (Vec<Listed>, Vec<Listed>) =
                    page.objects.into_iter().partition(|object| copied.contains(&mark(&object.key, &object.etag)));
                let late = at_once(AT_ONCE, new, |object: Listed| async move {
                    Ok::<_, StoreError>(self.copy_key(&object, from, to).await?.map(|_| object))
                });
                for late in late.await {
                    match late? {
                        Some(object) => gone.push(object),
                        None => again = true,
                    }
                }
                if conditional {
                    let left = at_once(AT_ONCE, gone, |object: Listed| async move {
                        match self.store.delete(&object.key, Some(&object.etag)).await {
                            Err(error) if error.kind == StoreErrorKind::Conflict => Ok(true),
                            other => other.map(|()| false),
                        }
                    });
                    for left in left.await {
                        again |= left?;
                    }
                } else {
                    // The page is of a moment ago: that is as sure as it can be there.
                    let keys: Vec<String> = gone.iter().map(|object| object.key.clone()).collect();
                    if !keys.is_empty() {
                        self.store.delete_many(&keys).await?;
                    }
                }
                if token.is_none() {
                    break;
                }
            }
            if !again {
                return Ok(());
            }
        }
        Ok(())
    }

    /// A rename that could not be finished now is, later.
    fn finish_later(self: &Arc<Self>, ino: Ino, key: String, journal: Journal) {
        let place = {
            let mut tree = self.tree();
            let place = tree.node(ino).and_then(|node| node.place.clone());
            if let Some(directory) = tree.directory_mut(ino) {
                directory.complete = None;
            }
            place
        };
        let this = self.clone();
        self.spawn(async move {
            let mut ending = this.ending.subscribe();
            let mut pause = Duration::from_secs(1);
            loop {
                let ended = tokio::time::timeout(pause, ending.wait_for(|ending| *ending)).await.is_ok();
                if this.finish_journal(&key, &journal).await.is_ok() || ended {
                    break;
                }
                pause = (pause * 2).min(Duration::from_secs(60));
            }
            if let Some((parent, name)) = place {
                let mut tree = this.tree();
                tree.unlearn(parent, &name);
                drop(tree);
                this.tell_kernel(move |kernel| kernel.invalidate_name(parent, name.as_ref().as_ref()));
            }
        });
    }
}

/// A version of a key, in eight bytes: a directory may have millions.
fn mark(key: &str, etag: &Etag) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, &etag.0).hash(&mut hasher);
    hasher.finish()
}
