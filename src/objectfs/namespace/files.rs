//! Files as programs use them: made, opened, written, closed.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::super::attributes::{Attributes, S_IFDIR, S_IFREG};
use super::super::content::{ContentError, Version};
use super::super::store::{Condition, Head, Payload, StoreErrorKind};
use super::Namespace;
use super::errors::{content_errno, refused};
use super::facts::{Ask, Facts, Seen, Stored};
use super::flags::{O_ACCMODE, O_EXCL, O_TRUNC, O_WRONLY};
use super::look::Asker;
use super::open::File;
use crate::fuse::filesystem::{Answer, Caller, Ino};
use crate::host::Errno;

/// An object up to this size comes whole with the look at it.
const FIRST_WHOLE: u64 = 1 << 20;
/// Of a larger one so much.
const FIRST_PIECE: u64 = 128 << 10;
/// An open that follows the lookup of the same thread so closely is part of the same call.
const SAME_CALL: Duration = Duration::from_millis(2);
/// An open that was refused comes again within this time.
const AGAIN: Duration = Duration::from_secs(1);

const S_ISGID: u32 = 0o2000;

/// What an open makes.
pub(crate) struct OpenFile {
    /// The file.
    pub(crate) file: Arc<File>,
    /// The kernel's pages of it are still right.
    pub(crate) keep_cache: bool,
}

impl Namespace {
    /// Attributes of something new in a directory: set-group-id directories hand their group on.
    pub(super) fn inherit(&self, parent: Ino, who: Caller, mode: u32, rdev: u32) -> Answer<Attributes> {
        let tree = self.tree();
        let node = tree.node(parent).ok_or(Errno::STALE)?;
        let mut attributes = Attributes::new(mode, who.uid, who.gid, rdev);
        if let Some(directory) = node.facts.attributes.as_ref().filter(|directory| directory.mode & S_ISGID != 0) {
            attributes.gid = directory.gid;
            if attributes.kind() == S_IFDIR {
                attributes.mode |= S_ISGID;
            }
        }
        Ok(attributes)
    }

    /// Makes and opens a file; opens what is there unless it is to be new.
    pub(crate) async fn create(
        self: &Arc<Self>,
        who: Caller,
        parent: Ino,
        name: &str,
        mode: u32,
        flags: u32,
    ) -> Answer<(Ino, OpenFile)> {
        self.writable()?;
        self.check_name(parent, name)?;
        let held = self.take(&[(parent, name)], None).await;
        if self.find(parent, name, Asker::Holder).await? {
            if flags & O_EXCL != 0 {
                return Err(Errno::EXIST);
            }
            let ino = self.tree().attach(parent, name).ok_or(Errno::STALE)?;
            drop(held);
            return Ok((ino, self.open_again(who, ino, flags).await?));
        }
        let attributes = self.inherit(parent, who, S_IFREG | mode & 0o7777, 0)?;
        let key = self.tree().key_of(parent, name).ok_or(Errno::STALE)?;
        let (stored, content) = if flags & O_EXCL != 0 {
            // Only the bucket can say who is first among all nodes.
            let stored = self.put_new(parent, name, &key, Bytes::new(), &attributes).await?;
            let version = stored.version(key);
            (Some(stored), self.contents.existing(version, Some(Bytes::new())))
        } else {
            (None, self.contents.new_file())
        };
        let file = Arc::new(File::new(content, stored.is_none()));
        file.state().opens = 1;
        let mut tree = self.tree();
        let changed = tree.tick();
        let etag = stored.as_ref().map(|stored| stored.etag.clone());
        let facts = Facts::local(false, attributes, stored, changed);
        let ino = tree.insert(parent, name, facts).ok_or(Errno::STALE)?;
        if let Some(node) = tree.node_mut(ino) {
            node.file = Some(file.clone());
            node.paged = etag;
        }
        self.touch(&mut tree, parent);
        Ok((ino, OpenFile { file, keep_cache: false }))
    }

    /// Puts a small object whose key has to be free. EEXIST when somebody else was faster.
    pub(super) async fn put_new(
        self: &Arc<Self>,
        parent: Ino,
        name: &str,
        key: &str,
        body: Bytes,
        attributes: &Attributes,
    ) -> Answer<Stored> {
        if !attributes.fits() {
            return Err(Errno::NOSPC);
        }
        let size = body.len() as u64;
        let metadata = attributes.metadata();
        match self.store.put(key, Payload::Bytes(body), &metadata, &Condition::Absent).await {
            Ok(etag) => Ok(Stored::written(etag, size)),
            Err(error) if error.kind == StoreErrorKind::Conflict => {
                // An earlier try of the same call may have been carried out without an answer: times to the
                // nanosecond tell ours from others.
                if let Some(head) = self.head(key).await?
                    && head.metadata.user == metadata.user
                    && head.size == size
                {
                    return Ok(Stored { own: true, ..self.stored(&head, false) });
                }
                self.tree().unlearn(parent, name);
                Err(Errno::EXIST)
            }
            Err(error) => {
                // It may have been carried out all the same.
                self.tree().unlearn(parent, name);
                Err(refused(&error))
            }
        }
    }

    /// Opens a file: looks at it in the bucket, unless what is here is newer.
    ///
    /// # Errors
    /// `STALE` when the kernel has been told another size: it then looks the name up again, which tells it, and opens
    /// once more (path_openat with LOOKUP_REVAL). Nothing else makes it forget a size before the open has returned.
    pub(crate) async fn open(self: &Arc<Self>, who: Caller, ino: Ino, flags: u32) -> Answer<OpenFile> {
        let opened = self.open_again(who, ino, flags).await?;
        // The kernel itself sets the size of what it opens to truncate.
        if flags & O_TRUNC != 0 || self.is_told(ino, who) {
            return Ok(opened);
        }
        self.close(ino, &opened.file).await;
        Err(Errno::STALE)
    }

    /// Does the kernel know the size, or has it been sent to look once?
    fn is_told(&self, ino: Ino, who: Caller) -> bool {
        let mut tree = self.tree();
        let Some(node) = tree.node_mut(ino) else { return true };
        let ours = node.place.is_none() || node.file.as_ref().is_some_and(|file| file.is_ours());
        let once = node.refused.take().is_some_and(|at| at.elapsed() < AGAIN);
        if ours || once || node.told == Some(node.facts.size()) {
            return true;
        }
        let now = Instant::now();
        node.refused = Some(now);
        node.looked = Some((who.pid, now));
        false
    }

    /// The same for who is told the size with the answer.
    pub(crate) async fn open_again(self: &Arc<Self>, who: Caller, ino: Ino, flags: u32) -> Answer<OpenFile> {
        if flags & O_ACCMODE != 0 || flags & O_TRUNC != 0 {
            self.writable()?;
        }
        let opened = self.open_as_it_is(who, ino, flags & O_ACCMODE == O_WRONLY || flags & O_TRUNC != 0).await?;
        if flags & O_TRUNC != 0
            && let Err(errno) = self.resize(ino, &opened.file, 0).await
        {
            self.close(ino, &opened.file).await;
            return Err(errno);
        }
        Ok(opened)
    }

    async fn open_as_it_is(self: &Arc<Self>, who: Caller, ino: Ino, blind: bool) -> Answer<OpenFile> {
        let mut asker = Asker::Other;
        let mut _held;
        for tries in 0..4 {
            let (parent, name, key, ask, known, changing) = {
                let tree = self.tree();
                let node = tree.node(ino).ok_or(Errno::STALE)?;
                let file = node.file.as_ref();
                if file.is_some_and(|file| file.state().stale) {
                    return Err(Errno::STALE);
                }
                match (&node.place, file) {
                    // Unlinked, but open: by its descriptor it can be opened again.
                    (None, Some(file)) => {
                        file.state().opens += 1;
                        return Ok(OpenFile { file: file.clone(), keep_cache: true });
                    }
                    (None, None) => return Err(Errno::STALE),
                    (Some(_), Some(file)) if file.is_ours() => {
                        file.state().opens += 1;
                        return Ok(OpenFile { file: file.clone(), keep_cache: true });
                    }
                    (Some((parent, name)), _) => {
                        let key = tree.key(ino).ok_or(Errno::STALE)?;
                        let just_now = node
                            .looked
                            .is_some_and(|(thread, at)| thread == who.pid && thread != 0 && at.elapsed() < SAME_CALL);
                        let known = just_now && node.facts.attributes.is_some() && node.facts.stored.is_some();
                        if known && (blind || node.facts.size() > FIRST_WHOLE || node.file.is_some()) {
                            drop(tree);
                            match self.adopt(ino, None) {
                                Some(opened) => return Ok(opened),
                                None => return Err(Errno::STALE),
                            }
                        }
                        let changing = tries > 0 || self.places.is_changing(&tree, *parent, name);
                        (*parent, name.clone(), key, tree.ask(), node.facts.stored.clone(), changing)
                    }
                }
            };
            if asker == Asker::Other && changing {
                // It may be another name's by then: then it is looked at once more.
                _held = self.take(&[(parent, &name)], None).await;
                asker = Asker::Holder;
                continue;
            }
            let size = known.as_ref().map_or(0, |known| known.size);
            let mut looked = self.look_inside(&key, size, blind).await?;
            if let (Some((head, _)), Some(known)) = (&looked, &known)
                && head.etag == known.etag
                && head.size != known.size
            {
                // The same version has the same length. Of a body that was cut on its way nothing else may tell.
                looked = self.head(&key).await?.map(|head| (head, None));
            }
            let Some((head, first)) = looked else {
                // Gone. The kernel looks the name up again when it sees that.
                self.learn_gone(parent, &name, ask, asker).await?;
                return Err(Errno::STALE);
            };
            if !self.learn_of(&key, parent, &name, ask, Seen::Object(self.stored(&head, false)), asker) {
                continue;
            }
            let first = first.map(|first| (head.etag.clone(), first));
            if let Some(opened) = self.adopt(ino, first) {
                return Ok(opened);
            }
            if self.tree().node(ino).is_none_or(|node| node.place.is_none()) {
                return Err(Errno::STALE);
            }
        }
        Err(Errno::STALE)
    }

    async fn learn_gone(self: &Arc<Self>, parent: Ino, name: &str, ask: Ask, asker: Asker) -> Answer<()> {
        let (found, _) = self.find_since(parent, name, Instant::now(), asker).await?;
        if !found {
            self.learn(parent, name, ask, Seen::Absent);
        }
        Ok(())
    }

    /// A look at an object, with its first bytes in the same round trip if they are likely to be read.
    async fn look_inside(&self, key: &str, size: u64, blind: bool) -> Answer<Option<(Head, Option<Bytes>)>> {
        if blind {
            return Ok(self.head(key).await?.map(|head| (head, None)));
        }
        let length = if size <= FIRST_WHOLE { FIRST_WHOLE } else { FIRST_PIECE };
        // Services tell checksums of whole objects only.
        let range = (size > FIRST_WHOLE).then_some(0..length);
        match self.store.get(key, range, None).await {
            Ok((head, mut body)) => {
                let mut first = BytesMut::with_capacity(usize::try_from(head.size.min(length)).unwrap_or(0));
                while let Some(piece) = body.next().await {
                    match piece {
                        // It has become much larger than it was.
                        Ok(_) if first.len() as u64 >= length => break,
                        Ok(piece) => first.extend_from_slice(&piece),
                        // A broken body: the read that needs it says so.
                        Err(_) => return Ok(Some((head, None))),
                    }
                }
                Ok(Some((head, Some(first.freeze()))))
            }
            Err(error) if error.kind == StoreErrorKind::NotFound => Ok(None),
            Err(error) => Err(refused(&error)),
        }
    }

    /// One more handle on the version that is known. `first`: the first bytes of a version. `None`: look again.
    fn adopt(&self, ino: Ino, first: Option<(super::super::store::Etag, Bytes)>) -> Option<OpenFile> {
        let mut tree = self.tree();
        let key = tree.key(ino)?;
        let node = tree.node_mut(ino)?;
        let stored = node.facts.stored.as_ref()?;
        let version = stored.version(key);
        let keep_cache = node.paged.as_ref() == Some(&stored.etag);
        node.paged = Some(stored.etag.clone());
        let file = match &node.file {
            Some(file) => {
                if !file.is_ours() && file.content.base().as_ref() != Some(&version) {
                    file.content.replaced(version);
                    file.state().counted = stored.size;
                }
                file.clone()
            }
            None => {
                let first = first.filter(|(etag, _)| *etag == stored.etag).map(|(_, first)| first);
                Arc::new(File::new(self.contents.existing(version, first), false))
            }
        };
        file.state().opens += 1;
        node.file = Some(file.clone());
        Some(OpenFile { file, keep_cache })
    }

    /// Content has changed: so have the times, and what is here is not in the bucket.
    fn modified(&self, ino: Ino) {
        let mut tree = self.tree();
        let changed = tree.tick();
        let Some(node) = tree.node_mut(ino) else { return };
        let now = SystemTime::now();
        node.facts.changed = changed;
        if let Some(file) = &node.file {
            file.state().change_attributes(node.facts.attributes.as_ref());
        }
        if let Some(attributes) = &node.facts.attributes {
            // Another value, not a changed one: a commit under way tells by that what it has not sent.
            let mut attributes = Attributes::clone(attributes);
            attributes.mtime = now;
            attributes.ctime = now;
            node.facts.attributes = Some(Arc::new(attributes));
        }
    }

    /// Writes.
    pub(crate) async fn write(self: &Arc<Self>, ino: Ino, file: &Arc<File>, offset: u64, data: &Bytes) -> Answer<()> {
        self.writable()?;
        if file.state().stale {
            return Err(Errno::STALE);
        }
        let end = offset.checked_add(data.len() as u64).ok_or(Errno::FBIG)?;
        file.reserve(&self.usage, end).map_err(|_| Errno::NOSPC)?;
        self.modified(ino);
        let (intent, _) = self.intent(ino, file)?;
        let written = file.content.write(offset, data, &intent).await;
        self.written(file, written)
    }

    fn written(&self, file: &File, written: Result<(), ContentError>) -> Answer<()> {
        written.map_err(|error| {
            file.give_back(&self.usage, file.content.size());
            content_errno(&error)
        })
    }

    /// Cuts or extends.
    pub(crate) async fn resize(self: &Arc<Self>, ino: Ino, file: &Arc<File>, size: u64) -> Answer<()> {
        self.writable()?;
        if file.state().stale {
            return Err(Errno::STALE);
        }
        file.reserve(&self.usage, size).map_err(|_| Errno::NOSPC)?;
        self.modified(ino);
        let (intent, _) = self.intent(ino, file)?;
        let resized = file.content.resize(size, &intent).await;
        self.written(file, resized)?;
        file.give_back(&self.usage, size);
        Ok(())
    }

    /// Makes a range zeros.
    pub(crate) async fn punch(self: &Arc<Self>, ino: Ino, file: &Arc<File>, offset: u64, length: u64) -> Answer<()> {
        self.writable()?;
        if file.state().stale {
            return Err(Errno::STALE);
        }
        self.modified(ino);
        let (intent, _) = self.intent(ino, file)?;
        let punched = file.content.punch(offset, length, &intent).await;
        self.written(file, punched)
    }

    /// close(2): in the bucket when it returns; with write-back on this node's disk.
    pub(crate) async fn flush(self: &Arc<Self>, ino: Ino, file: &Arc<File>) -> Answer<()> {
        let failed = file.state().error.take();
        let result = match self.writes_back() {
            true => self.commit_later(ino, file).await,
            false => self.commit(ino, file).await,
        };
        match failed {
            Some(errno) if errno == Errno::STALE || file.is_ours() => Err(errno),
            _ => result,
        }
    }

    /// fsync(2): in the bucket when it returns.
    pub(crate) async fn fsync(self: &Arc<Self>, ino: Ino, file: &Arc<File>) -> Answer<()> {
        let failed = file.state().error.take();
        let result = self.commit(ino, file).await;
        match failed {
            Some(Errno::STALE) => Err(Errno::STALE),
            _ => result,
        }
    }

    /// One handle less. With the last one of an unlinked file its object goes; what a failed close has left staged is
    /// tried again in the background.
    pub(crate) async fn close(self: &Arc<Self>, ino: Ino, file: &Arc<File>) {
        let last = {
            let mut state = file.state();
            state.opens = state.opens.saturating_sub(1);
            state.opens == 0
        };
        if !last {
            return;
        }
        let linked = self.tree().node(ino).is_some_and(|node| node.place.is_some());
        let stale = file.state().stale;
        if !linked && !stale {
            file.content.discard().await;
            let aside = {
                let mut state = file.state();
                std::mem::take(&mut state.aside).then(|| state.hidden.clone()).flatten()
            };
            file.give_back(&self.usage, 0);
            if let Some(key) = aside
                && let Err(error) = self.store.delete(&key, None).await
            {
                // Swept at a later mount.
                tracing::info!("{error}");
            }
        } else if linked && file.is_ours() {
            // No close has told a program that this is safe; it is not given up for that.
            let _ = self.commit_later(ino, file).await;
        }
        self.settle(ino, file);
    }

    /// An unlinked or renamed file's content has gone to another key.
    pub(super) fn moved(&self, file: &File, key: &str, stored: &Stored) {
        file.content.moved(Version { key: key.to_owned(), etag: stored.etag.clone(), size: stored.size });
    }
}
