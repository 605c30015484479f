//! Bringing files into the bucket: at close and fsync, in the background, and their attributes alone.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::super::attributes::Attributes;
use super::super::content::{ContentError, Intent, Version};
use super::super::store::{Condition, Etag, Metadata, Part, StoreErrorKind, StoreResult};
use super::errors::{content_errno, refused};
use super::facts::Stored;
use super::index::until_distinguishable;
use super::open::File;
use super::{Namespace, places};
use crate::fuse::filesystem::{Answer, Ino};
use crate::host::Errno;

/// CopyObject takes no more.
const COPY_MAX: u64 = 5 << 30;
/// Pieces of larger objects.
const COPY_PART: u64 = 1 << 30;

impl Namespace {
    /// What a commit of this file is to make, as of now.
    pub(super) fn intent(&self, ino: Ino, file: &File) -> Answer<(Intent, Arc<Attributes>)> {
        let tree = self.tree();
        let node = tree.node(ino).ok_or(Errno::STALE)?;
        let attributes = node.facts.attributes.clone().ok_or(Errno::IO)?;
        let state = file.state();
        let key = match &state.hidden {
            Some(hidden) => hidden.clone(),
            None => tree.key(ino).ok_or(Errno::STALE)?,
        };
        Ok((Intent { key, metadata: attributes.metadata(), exclusive: state.exclusive }, attributes))
    }

    /// Takes a node's name for this task. `None`: it has none (any more).
    pub(super) async fn take_place(&self, ino: Ino) -> Option<(places::Held<'_>, Ino, Arc<str>)> {
        loop {
            let (parent, name) = self.tree().node(ino)?.place.clone()?;
            let held = self.take(&[(parent, &name)], None).await;
            if self.tree().node(ino)?.place.as_ref() == Some(&(parent, name.clone())) {
                return Some((held, parent, name));
            }
        }
    }

    /// Brings a file into the bucket, if there is anything of it that the bucket does not have.
    pub(crate) async fn commit(self: &Arc<Self>, ino: Ino, file: &Arc<File>) -> Answer<()> {
        if file.state().stale {
            return Err(Errno::STALE);
        }
        if !file.is_ours() {
            return Ok(());
        }
        let Some((_held, parent, name)) = self.take_place(ino).await else {
            return if file.state().stale { Err(Errno::STALE) } else { Ok(()) };
        };
        let result = self.commit_held(ino, file, parent, &name).await;
        match result {
            Ok(()) => self.index_later(parent),
            // Who sets a version aside says so.
            Err(Errno::STALE) if !file.state().stale => {
                let (base, key) = (file.content.base(), self.tree().key_of(parent, &name));
                tracing::error!(?key, ?base, "the bucket does not have this file any more, or another one: ESTALE");
            }
            Err(_) => {}
        }
        result
    }

    /// The same for who has taken the name.
    pub(super) async fn commit_held(
        self: &Arc<Self>,
        ino: Ino,
        file: &Arc<File>,
        parent: Ino,
        name: &str,
    ) -> Answer<()> {
        self.take_others_attributes(ino, file).await?;
        if file.content.is_dirty() || file.state().uncommitted {
            let (intent, attributes) = self.intent(ino, file)?;
            match file.content.commit(&intent).await {
                Ok(version) => {
                    self.committed(ino, file, version, &attributes);
                    Ok(())
                }
                Err(ContentError::Changed(message)) => {
                    self.set_aside(ino, file, parent, name, &intent, &message).await;
                    Err(Errno::STALE)
                }
                Err(error) => Err(content_errno(&error)),
            }
        } else if file.state().attributes {
            self.commit_attributes(ino, file).await
        } else {
            Ok(())
        }
    }

    /// Takes over that the bucket now has this version with these attributes.
    pub(super) fn committed(&self, ino: Ino, file: &File, version: Version, attributes: &Arc<Attributes>) {
        let mut tree = self.tree();
        let changed = tree.tick();
        let Some(node) = tree.node_mut(ino) else { return };
        node.paged = Some(version.etag.clone());
        // It was written through the kernel.
        node.told = Some(version.size);
        node.facts.stored = Some(Stored::written(version.etag, version.size));
        node.facts.learned = SystemTime::now();
        node.facts.seen = Instant::now();
        node.facts.attributes_seen = Some(node.facts.seen);
        node.facts.changed = changed;
        let mut state = file.state();
        state.uncommitted = false;
        state.exclusive = false;
        // What changed during the commit is for the next one.
        state.attributes = !node.facts.attributes.as_ref().is_some_and(|now| Arc::ptr_eq(now, attributes));
        state.before = state.attributes.then(|| attributes.clone());
    }

    /// An etag says nothing of metadata: what others have changed of it since this node last looked is seen by a HEAD, and
    /// kept.
    async fn take_others_attributes(&self, ino: Ino, file: &File) -> Answer<()> {
        let Some(before) = file.state().before.clone() else { return Ok(()) };
        let horizon = self.horizon();
        let (key, ask) = {
            let tree = self.tree();
            let node = tree.node(ino).ok_or(Errno::STALE)?;
            if node.facts.has_fresh_attributes(horizon) {
                return Ok(());
            }
            (tree.key(ino).ok_or(Errno::STALE)?, tree.ask())
        };
        let base = file.content.base().filter(|base| base.key == key);
        let head = if base.is_some() { self.head(&key).await? } else { None };
        // Other bytes, or none, are for the commit to find.
        let Some(head) = head.filter(|head| base.is_some_and(|base| base.etag == head.etag)) else { return Ok(()) };
        let theirs = Attributes::read(&head.metadata, head.modified, false, &self.defaults);
        let mut tree = self.tree();
        let Some(facts) = tree.node_mut(ino).map(|node| &mut node.facts) else { return Ok(()) };
        facts.attributes_seen = Some(ask.at);
        if let Some(ours) = facts.attributes.as_ref().filter(|_| theirs != *before) {
            facts.attributes = Some(Arc::new(ours.merged(&before, &theirs)));
            file.state().before = Some(Arc::new(theirs));
        }
        Ok(())
    }

    /// Somebody else was faster: the local version is kept on the node, and the name is theirs.
    async fn set_aside(
        self: &Arc<Self>,
        ino: Ino,
        file: &Arc<File>,
        parent: Ino,
        name: &str,
        intent: &Intent,
        why: &str,
    ) {
        match file.content.set_aside(intent).await {
            Ok(path) => tracing::error!(
                key = intent.key, kept = %path.display(),
                "somebody else has changed this file first ({why}): the local version is kept on this node"
            ),
            Err(error) => tracing::error!(
                key = intent.key,
                "somebody else has changed this file first ({why}), and the local version stays staged: {error:?}"
            ),
        }
        let mut tree = self.tree();
        {
            let mut state = file.state();
            state.stale = true;
            state.error = Some(Errno::STALE);
        }
        if tree.live(parent, name) == Some(ino) {
            tree.unlearn(parent, name);
        }
        drop(tree);
        let name = name.to_owned();
        self.tell_kernel(move |kernel| {
            kernel.invalidate_name(parent, name.as_ref());
            kernel.invalidate_inode(ino, 0, 0);
        });
    }

    /// Attributes alone: the object is copied onto itself with other metadata. The last change of attributes wins.
    async fn commit_attributes(self: &Arc<Self>, ino: Ino, file: &Arc<File>) -> Answer<()> {
        for _ in 0..8 {
            let (intent, attributes) = self.intent(ino, file)?;
            let Some(base) = file.content.base() else { return Err(Errno::STALE) };
            let modified = self
                .tree()
                .node(ino)
                .and_then(|node| node.facts.stored.as_ref().filter(|stored| !stored.own)?.modified);
            if let Some(modified) = modified {
                // Changed by others a moment ago: the change has to be seen to be another one.
                tokio::time::sleep(until_distinguishable(modified)).await;
            }
            match self.replace_metadata(&intent.key, &base.etag, base.size, &intent.metadata).await {
                Ok(etag) => {
                    let version = Version { etag, ..base };
                    file.content.moved(version.clone());
                    self.committed(ino, file, version, &attributes);
                    return Ok(());
                }
                Err(error) if error.kind == StoreErrorKind::Conflict => {
                    // Other bytes by now: they get the attributes.
                    let Some(head) = self.head(&intent.key).await? else { return Err(Errno::STALE) };
                    let stored = self.stored(&head, false);
                    let version = stored.version(intent.key);
                    if file.content.is_dirty() {
                        return Err(Errno::STALE);
                    }
                    file.content.replaced(version);
                    file.state().counted = head.size;
                    if let Some(node) = self.tree().node_mut(ino) {
                        node.facts.stored = Some(Stored { attributes: None, ..stored });
                    }
                    self.tell_kernel(move |kernel| kernel.invalidate_inode(ino, 0, 0));
                }
                Err(error) if error.kind == StoreErrorKind::NotFound => return Err(Errno::STALE),
                Err(error) => return Err(refused(&error)),
            }
        }
        Err(Errno::STALE)
    }

    /// Replaces an object's metadata, if it is still this version.
    pub(super) async fn replace_metadata(
        &self,
        key: &str,
        version: &Etag,
        size: u64,
        metadata: &Metadata,
    ) -> StoreResult<Etag> {
        let condition = match self.store.abilities().conditional_copy {
            true => Condition::Is(version.clone()),
            // The version of the source is the same condition.
            false => Condition::None,
        };
        self.copy(key, version, size, key, Some(metadata), &condition).await
    }

    /// Copies an object of any size on the server. Without metadata it takes its own along.
    pub(super) async fn copy(
        &self,
        from: &str,
        version: &Etag,
        size: u64,
        to: &str,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> StoreResult<Etag> {
        if size <= COPY_MAX {
            return self.store.copy(from, Some(version), to, metadata, condition).await;
        }
        let own = match metadata {
            Some(metadata) => metadata.clone(),
            None => self.store.head(from).await?.metadata,
        };
        let upload = self.store.begin_upload(to, &own).await?;
        let made = async {
            let parts = (0..size.div_ceil(COPY_PART)).map(|index| {
                let range = index * COPY_PART..((index + 1) * COPY_PART).min(size);
                // At most 5 TiB: 5120 parts.
                let number = u32::try_from(index + 1).unwrap_or(u32::MAX);
                self.store.copy_part(to, &upload, number, from, Some(version), range)
            });
            let parts: Vec<StoreResult<Part>> = futures_util::StreamExt::collect(futures_util::StreamExt::buffered(
                futures_util::stream::iter(parts),
                16,
            ))
            .await;
            let parts = parts.into_iter().collect::<StoreResult<Vec<_>>>()?;
            self.store.finish_upload(to, &upload, &parts, condition).await
        };
        let made = made.await;
        if made.is_err() {
            // What stays is swept by the bucket's life cycle rules; the copy's own error matters.
            let _ = self.store.abort_upload(to, &upload).await;
        }
        made
    }

    /// A close with write-back: safe on this node's disk, and on its way.
    pub(super) async fn commit_later(self: &Arc<Self>, ino: Ino, file: &Arc<File>) -> Answer<()> {
        if file.state().stale {
            return Err(Errno::STALE);
        }
        if !file.is_ours() || self.tree().node(ino).is_none_or(|node| node.place.is_none()) {
            return Ok(());
        }
        let (intent, _) = self.intent(ino, file)?;
        file.content.remember(&intent).await.map_err(|error| content_errno(&error))?;
        {
            let mut tree = self.tree();
            let mut state = file.state();
            if state.queued {
                return Ok(());
            }
            state.queued = true;
            drop(state);
            tree.pin(ino);
        }
        let (this, file) = (self.clone(), file.clone());
        self.spawn(async move {
            this.commit_until_done(ino, &file).await;
            this.settle(ino, &file);
            this.tree().unpin(ino);
        });
        Ok(())
    }

    async fn commit_until_done(self: &Arc<Self>, ino: Ino, file: &Arc<File>) {
        let mut pause = Duration::from_secs(1);
        loop {
            let result = {
                // Never closed.
                let _permit = self.background.acquire().await;
                let only_attributes = {
                    let mut state = file.state();
                    state.queued = false;
                    state.opens > 0 && !state.uncommitted && !file.content.is_dirty()
                };
                // Who has it open is about to change more than these, and its close comes here again.
                if only_attributes { Ok(()) } else { self.commit(ino, file).await }
            };
            match result {
                Ok(()) => return,
                Err(Errno::STALE) => {
                    file.state().error = Some(Errno::STALE);
                    return;
                }
                Err(errno) => {
                    file.state().error = Some(errno);
                    let mut ending = self.ending.subscribe();
                    if *ending.borrow() {
                        // It stays staged for the next worker.
                        return;
                    }
                    let _ = tokio::time::timeout(pause, ending.wait_for(|ending| *ending)).await;
                    pause = (pause * 2).min(Duration::from_secs(60));
                    file.state().queued = true;
                }
            }
        }
    }

    /// A file that nobody has open and that is all in the bucket needs no content here.
    pub(super) fn settle(&self, ino: Ino, file: &Arc<File>) {
        let mut tree = self.tree();
        let state = file.state();
        if state.opens > 0 || state.queued {
            return;
        }
        let stale = state.stale;
        drop(state);
        let current = tree.node(ino).and_then(|node| node.file.as_ref()).is_some_and(|now| Arc::ptr_eq(now, file));
        let linked = tree.node(ino).is_some_and(|node| node.place.is_some());
        if current && (stale || !linked || !file.is_ours()) {
            tree.let_go(ino);
        }
    }
}

/// What the bucket has under a key after a change of attributes.
pub(super) struct Base {
    /// The key.
    pub(super) key: String,
    /// Its new version.
    pub(super) etag: Etag,
    /// Bytes.
    pub(super) size: u64,
    /// Is it a directory's marker?
    pub(super) directory: bool,
    /// Was the time of the last change set?
    pub(super) times: bool,
}
