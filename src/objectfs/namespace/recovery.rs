//! What a mount finds at its beginning, and what it leaves at its end: staged files, journals of renames, unlinked
//! objects of mounts that died.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use futures_util::StreamExt;

use super::super::attributes::Attributes;
use super::super::content::{Contents, Intent, Recovered};
use super::super::settings::Settings;
use super::super::store::{Condition, ListRequest, Listed, Store, StoreError, StoreErrorKind, StoreResult};
use super::super::usage::Usage;
use super::facts::{Ask, Facts, Seen, Stored};
use super::open::File;
use super::rename::Journal;
use super::tables::InodeRow;
use super::tree::ROOT;
use super::{Namespace, at_once, facts};
use crate::fuse::filesystem::Ino;

/// An unlinked object, or what was uploaded early, is swept when it is so old: its file may still be open on another node.
const SWEPT_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);

/// So long after the mount.
const SWEPT_FROM: Duration = Duration::from_secs(60);

impl Namespace {
    /// Opens a tree: staged files of an earlier worker are here again and on their way to the bucket, renames that were
    /// begun are finished.
    /// `rows`: what the kernel knows of a mount that is taken over.
    ///
    /// # Errors
    /// What the node's disk says.
    pub(crate) async fn begin(
        settings: Settings,
        store: Arc<dyn Store>,
        rows: &[InodeRow],
    ) -> std::io::Result<Arc<Self>> {
        let settings = Arc::new(settings);
        let contents = Contents::open(settings.clone(), store.clone()).await?;
        let usage = Usage::open(settings.clone(), store.clone()).await;
        let this = Arc::new(Self::new(settings, store, contents, usage));
        this.restore(rows);
        if !this.settings.read_only {
            this.finish_journals().await;
            for recovered in this.contents.recover().await {
                this.take_recovered(recovered).await;
            }
            this.sweep();
        }
        Ok(this)
    }

    /// All that was written goes to the bucket, and the mount goes on.
    pub(crate) async fn commit_all(self: &Arc<Self>) {
        let files: Vec<(Ino, Arc<File>)> = {
            let tree = self.tree();
            let ours = tree.iter().filter(|(_, node)| node.file.as_ref().is_some_and(|file| file.is_ours()));
            ours.filter_map(|(ino, node)| Some((ino, node.file.clone()?))).collect()
        };
        at_once(16, files, |(ino, file)| async move {
            // What fails stays staged for the next worker; the commit has said why.
            let _ = self.commit(ino, &file).await;
        })
        .await;
    }

    /// Everything is brought into safety.
    pub(crate) async fn end(self: &Arc<Self>) {
        self.ending.send_replace(true);
        self.commit_all().await;
        let unlinked: Vec<Arc<File>> = {
            let tree = self.tree();
            tree.iter().filter(|(_, node)| node.place.is_none()).filter_map(|(_, node)| node.file.clone()).collect()
        };
        for file in unlinked {
            file.content.discard().await;
            let aside = {
                let mut state = file.state();
                std::mem::take(&mut state.aside).then(|| state.hidden.clone()).flatten()
            };
            if let Some(key) = aside {
                // Swept later, if not now.
                let _ = self.store.delete(&key, None).await;
            }
        }
        self.quiet().await;
        self.usage.close().await;
    }

    /// A staged file is a file again, and committed in the background.
    async fn take_recovered(self: &Arc<Self>, recovered: Recovered) {
        let Recovered { key, metadata, condition, content } = recovered;
        if key.starts_with(&format!("{}unlinked/", self.hidden)) {
            // It had no name any more.
            content.discard().await;
            return;
        }
        let uncommitted = content.base().is_none();
        let attributes = Attributes::read(&metadata, SystemTime::now(), false, &self.defaults);
        let file = Arc::new(File::new(content, uncommitted));
        file.state().exclusive = condition == Condition::Absent;
        file.state().counted = file.content.size();
        let placed =
            key.strip_prefix(self.settings.prefix.as_str()).and_then(|path| self.place(path, &attributes, &file));
        match placed {
            Some(ino) => {
                if let Err(errno) = self.commit_later(ino, &file).await {
                    tracing::error!(key, errno = errno.raw_os_error(), "a staged file can't be committed yet");
                }
            }
            None => {
                let intent = Intent { key, metadata, exclusive: false };
                match file.content.set_aside(&intent).await {
                    Ok(path) => tracing::error!(
                        key = intent.key, kept = %path.display(), "a staged file has no place in this tree: it is kept"
                    ),
                    Err(error) => tracing::error!(key = intent.key, "a staged file has no place: {error:?}"),
                }
            }
        }
    }

    /// Makes a node, and those above it, for a path.
    fn place(&self, path: &str, attributes: &Attributes, file: &Arc<File>) -> Option<Ino> {
        let mut tree = self.tree();
        let (folders, name) = path.rsplit_once('/').map_or((None, path), |(folders, name)| (Some(folders), name));
        let mut at = ROOT;
        for folder in folders.into_iter().flat_map(|folders| folders.split('/')) {
            if !self.is_name(at, folder) {
                return None;
            }
            if tree.facts(at, folder).is_none() {
                let ask: Ask = tree.ask();
                tree.learn(at, folder, ask, Seen::Directory(None));
            }
            at = tree.attach(at, folder)?;
            tree.directory(at)?;
        }
        if !self.is_name(at, name) {
            return None;
        }
        let stored = file.content.base().map(|base| Stored::written(base.etag, base.size));
        let changed = tree.tick();
        let ino = tree.insert(at, name, Facts::local(false, attributes.clone(), stored, changed))?;
        tree.node_mut(ino)?.file = Some(file.clone());
        Some(ino)
    }

    /// Renames that somebody has begun and not finished.
    async fn finish_journals(self: &Arc<Self>) {
        let prefix = format!("{}renames/", self.hidden);
        let mut token = None;
        loop {
            let request = ListRequest { prefix: prefix.clone(), token, ..ListRequest::default() };
            // Without its journals a tree is shown as it is; the next mount tries again.
            let Ok(page) = self.store.list(&request).await else { return };
            for object in &page.objects {
                match self.read_journal(&object.key).await {
                    Ok(Some(journal)) => {
                        tracing::info!(from = journal.from, to = journal.to, "finishing a rename");
                        if let Err(error) = self.finish_journal(&object.key, &journal).await {
                            tracing::warn!("cannot finish the rename of {}: {error}", journal.from);
                        }
                    }
                    Ok(None) => tracing::warn!(key = object.key, "no journal of a rename: left alone"),
                    Err(error) => tracing::warn!("{error}"),
                }
            }
            token = page.token;
            if token.is_none() {
                return;
            }
        }
    }

    async fn read_journal(&self, key: &str) -> StoreResult<Option<Journal>> {
        let (_, mut body) = self.store.get(key, Some(0..64 << 10), None).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece?);
        }
        let journal: Option<Journal> = serde_json::from_slice(&bytes).ok();
        let inside = |key: &str| key.starts_with(&self.settings.prefix) && key.ends_with('/') && key.len() > 1;
        Ok(journal.filter(|journal| inside(&journal.from) && inside(&journal.to) && journal.from != journal.to))
    }

    /// Finishes a rename: whatever is below the old name is moved, unless it was written after the rename began, or the
    /// new name has something else by now. In doubt both stay.
    pub(super) async fn finish_journal(&self, key: &str, journal: &Journal) -> StoreResult<()> {
        let began = match self.store.head(key).await {
            Ok(head) => head.modified,
            // Somebody else has finished it.
            Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut token = None;
        loop {
            let request = ListRequest { prefix: journal.from.clone(), token, ..ListRequest::default() };
            let page = self.store.list(&request).await?;
            let results =
                at_once(48, page.objects, |object| async move { self.finish_key(&object, journal, began).await });
            results.await.into_iter().collect::<StoreResult<()>>()?;
            token = page.token;
            if token.is_none() {
                break;
            }
        }
        self.store.delete(key, None).await
    }

    async fn finish_key(&self, object: &Listed, journal: &Journal, began: SystemTime) -> StoreResult<()> {
        let Some(rest) = object.key.strip_prefix(journal.from.as_str()) else { return Ok(()) };
        if facts::seconds(object.modified) > facts::seconds(began) {
            return Ok(());
        }
        let to = format!("{}{rest}", journal.to);
        match self.store.head(&to).await {
            Ok(there) => {
                let source = match self.store.head(&object.key).await {
                    Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(()),
                    other => other?,
                };
                // The copy of an upload in parts has another tag than it: then metadata says whether it is one.
                let same = source.size == there.size && source.metadata == there.metadata;
                let sure = source.etag == there.etag || !source.metadata.user.is_empty();
                if source.etag != object.etag || !same || !sure {
                    return Ok(());
                }
            }
            Err(error) if error.kind == StoreErrorKind::NotFound => {
                let conditional = self.store.abilities().conditional_copy;
                let condition = if conditional { Condition::Absent } else { Condition::None };
                match self.copy(&object.key, &object.etag, object.size, &to, None, &condition).await {
                    Ok(_) => {}
                    Err(error) if is_overtaken(&error) => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        }
        match self.store.delete(&object.key, Some(&object.etag)).await {
            Err(error) if error.kind == StoreErrorKind::Conflict => Ok(()),
            other => other,
        }
    }

    /// What mounts that died have left: unlinked objects, and what was uploaded early.
    fn sweep(self: &Arc<Self>) {
        let this = Arc::downgrade(self);
        // Not waited for at the end: it is done at the next mount. Nor at once, since there is more urgent work then.
        tokio::spawn(async move {
            tokio::time::sleep(SWEPT_FROM).await;
            let Some(this) = this.upgrade() else { return };
            // What can't be swept now is swept by a later mount.
            let _ = this.sweep_now().await;
        });
    }

    pub(crate) async fn sweep_now(&self) -> StoreResult<()> {
        for folder in ["unlinked/", "uploads/"] {
            self.sweep_below(&format!("{}{folder}", self.hidden)).await?;
        }
        Ok(())
    }

    async fn sweep_below(&self, prefix: &str) -> StoreResult<()> {
        let now = SystemTime::now();
        let is_old = |time: SystemTime| now.duration_since(time).is_ok_and(|age| age > SWEPT_AFTER);
        let mut token = None;
        loop {
            let request = ListRequest { prefix: prefix.to_owned(), token, ..ListRequest::default() };
            let page = self.store.list(&request).await?;
            let old = page.objects.into_iter().filter(|object| is_old(object.modified));
            let keys: Vec<String> = old.map(|object| object.key).collect();
            if !keys.is_empty() {
                self.store.delete_many(&keys).await?;
            }
            token = page.token;
            if token.is_none() {
                break;
            }
        }
        for (key, upload, begun) in self.store.list_uploads(prefix).await? {
            if is_old(begun) {
                self.store.abort_upload(&key, &upload).await?;
            }
        }
        Ok(())
    }
}

fn is_overtaken(error: &StoreError) -> bool {
    matches!(error.kind, StoreErrorKind::Conflict | StoreErrorKind::NotFound)
}
