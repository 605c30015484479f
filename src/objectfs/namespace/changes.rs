//! Changes of attributes and extended attributes.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;

use super::super::attributes::{Attributes, S_IFMT};
use super::super::store::{Condition, Payload, StoreErrorKind};
use super::Namespace;
use super::commit::Base;
use super::errors::refused;
use super::facts::{Facts, Stored};
use super::flags::O_WRONLY;
use super::index::until_distinguishable;
use super::look::Asker;
use super::open::File;
use crate::fuse::filesystem::{Answer, Caller, Ino, SetAttr, Time};
use crate::host::Errno;

const XATTR_CREATE: u32 = 1;
const XATTR_REPLACE: u32 = 2;
/// The kernel's own limit on a list.
const XATTR_NAME_MAX: usize = 255;

/// What of a [`SetAttr`] goes into attributes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<SystemTime>,
    kill: bool,
    now: SystemTime,
}

impl Change {
    fn of(set: &SetAttr) -> Self {
        let now = SystemTime::now();
        let mtime = set.mtime.map(|time| at(time, now));
        Self { mode: set.mode, uid: set.uid, gid: set.gid, mtime, kill: set.kill_suid, now }
    }

    fn is_any(&self) -> bool {
        self.mode.is_some() || self.uid.is_some() || self.gid.is_some() || self.mtime.is_some() || self.kill
    }

    fn apply(&self, attributes: &mut Attributes) {
        if let Some(mode) = self.mode {
            attributes.mode = attributes.mode & S_IFMT | mode & !S_IFMT & 0o7777;
        }
        attributes.uid = self.uid.unwrap_or(attributes.uid);
        attributes.gid = self.gid.unwrap_or(attributes.gid);
        attributes.mtime = self.mtime.unwrap_or(attributes.mtime);
        if self.kill {
            attributes.mode &= !0o4000;
            // Without execution by the group the bit means something else.
            if attributes.mode & 0o010 != 0 {
                attributes.mode &= !0o2000;
            }
        }
        attributes.ctime = self.now;
    }
}

fn at(time: Time, now: SystemTime) -> SystemTime {
    match time {
        Time::At(time) => time,
        Time::Now => now,
    }
}

impl Namespace {
    /// SETATTR.
    pub(crate) async fn set(
        self: &Arc<Self>,
        who: Caller,
        ino: Ino,
        set: &SetAttr,
        file: Option<Arc<File>>,
    ) -> Answer<()> {
        self.writable()?;
        if let Some(size) = set.size {
            self.truncate(who, ino, size, file).await?;
        }
        let change = Change::of(set);
        if let Some(atime) = set.atime {
            if let Some(node) = self.tree().node_mut(ino) {
                node.atime = Some(at(atime, change.now));
            }
            if !change.is_any() {
                return Ok(());
            }
        }
        if change.is_any() {
            self.alter(ino, change.mtime.is_some(), |attributes| {
                change.apply(attributes);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    async fn truncate(self: &Arc<Self>, who: Caller, ino: Ino, size: u64, file: Option<Arc<File>>) -> Answer<()> {
        if let Some(file) = file {
            return self.resize(ino, &file, size).await;
        }
        // By name: opened for the moment, and in the bucket when it returns.
        let opened = self.open(who, ino, O_WRONLY).await?;
        let result = match self.resize(ino, &opened.file, size).await {
            Ok(()) => self.flush(ino, &opened.file).await,
            Err(errno) => Err(errno),
        };
        self.close(ino, &opened.file).await;
        result
    }

    /// Changes attributes: with the next commit where one has to come, else at once.
    async fn alter(
        self: &Arc<Self>,
        ino: Ino,
        times: bool,
        change: impl Fn(&mut Attributes) -> Answer<()>,
    ) -> Answer<()> {
        let held = self.take_place(ino).await;
        let parent = held.as_ref().map(|(_, parent, _)| *parent);
        self.refresh_since(ino, self.horizon(), Asker::Holder).await?;
        let mut again = 0;
        loop {
            let (key, attributes, stored, directory) = {
                let mut tree = self.tree();
                let changed = tree.tick();
                let linked = tree.key(ino);
                let node = tree.node_mut(ino).ok_or(Errno::STALE)?;
                let mut attributes = node.facts.attributes.as_deref().ok_or(Errno::IO)?.clone();
                change(&mut attributes)?;
                if !attributes.fits() {
                    return Err(Errno::NOSPC);
                }
                if let Some(file) = node.file.clone() {
                    let mut state = file.state();
                    if state.stale {
                        return Err(Errno::STALE);
                    }
                    let unlinked = node.place.is_none();
                    let later = state.uncommitted || state.writers > 0 || state.queued || unlinked;
                    drop(state);
                    if later || file.content.is_dirty() {
                        state = file.state();
                        state.change_attributes(node.facts.attributes.as_ref());
                        node.facts.attributes = Some(Arc::new(attributes));
                        node.facts.changed = changed;
                        return Ok(());
                    }
                }
                let key = linked.ok_or(Errno::STALE)?;
                (key, attributes, node.facts.stored.clone(), node.facts.directory)
            };
            let replaced = if directory {
                self.replace_marker(ino, &attributes).await.map(|etag| (etag, 0))
            } else {
                let stored = stored.ok_or(Errno::STALE)?;
                // Changed by others a moment ago: the change has to be seen to be another one.
                if let Some(modified) = stored.modified.filter(|_| !stored.own) {
                    tokio::time::sleep(until_distinguishable(modified)).await;
                }
                let replaced = self.replace_metadata(&key, &stored.etag, stored.size, &attributes.metadata()).await;
                match replaced {
                    Ok(etag) => Ok((etag, stored.size)),
                    Err(error)
                        if matches!(error.kind, StoreErrorKind::Conflict | StoreErrorKind::NotFound) && again < 8 =>
                    {
                        again += 1;
                        self.refresh_since(ino, Instant::now(), Asker::Holder).await?;
                        continue;
                    }
                    Err(error) => Err(refused(&error)),
                }
            };
            let (etag, size) = replaced?;
            self.altered(ino, Base { key, etag, size, directory, times }, attributes);
            if let Some(parent) = parent {
                self.index_later(parent);
            }
            return Ok(());
        }
    }

    /// The bucket has other attributes now.
    fn altered(&self, ino: Ino, base: Base, attributes: Attributes) {
        let mut tree = self.tree();
        let changed = tree.tick();
        let Some(node) = tree.node_mut(ino) else { return };
        if node.paged.is_some() && node.paged.as_ref() == node.facts.stored.as_ref().map(|stored| &stored.etag) {
            node.paged = Some(base.etag.clone());
        }
        let stored = Stored::written(base.etag, base.size);
        if let Some(file) = &node.file {
            self.moved(file, &base.key, &stored);
        }
        node.facts = Facts::local(base.directory, attributes, Some(stored), changed);
        if let Some(directory) = node.directory.as_mut().filter(|_| base.times) {
            directory.touched = None;
        }
    }

    async fn replace_marker(&self, ino: Ino, attributes: &Attributes) -> Answer<super::super::store::Etag> {
        let key = self.marker_key(ino).ok_or(Errno::STALE)?;
        let empty = Payload::Bytes(Bytes::new());
        let put = self.store.put(&key, empty, &attributes.metadata(), &Condition::None).await;
        put.map_err(|error| refused(&error))
    }

    /// An extended attribute.
    pub(crate) async fn xattr(self: &Arc<Self>, ino: Ino, name: &str) -> Answer<Bytes> {
        check_xattr(name)?;
        self.refresh(ino).await?;
        let tree = self.tree();
        let attributes = tree.node(ino).and_then(|node| node.facts.attributes.as_ref()).ok_or(Errno::STALE)?;
        attributes.xattrs.get(name).map(|value| Bytes::copy_from_slice(value)).ok_or(Errno::NODATA)
    }

    /// Names of extended attributes.
    pub(crate) async fn xattrs(self: &Arc<Self>, ino: Ino) -> Answer<Vec<String>> {
        self.refresh(ino).await?;
        let tree = self.tree();
        let attributes = tree.node(ino).and_then(|node| node.facts.attributes.as_ref()).ok_or(Errno::STALE)?;
        // Other clients may have written what no program could ask for.
        let is_name =
            |name: &&String| check_xattr(name).is_ok() && name.len() <= XATTR_NAME_MAX && !name.contains('\0');
        Ok(attributes.xattrs.keys().filter(is_name).cloned().collect())
    }

    /// Sets an extended attribute. ENOSPC: S3 has 2 KiB for all metadata.
    pub(crate) async fn set_xattr(self: &Arc<Self>, ino: Ino, name: &str, value: &[u8], flags: u32) -> Answer<()> {
        self.writable()?;
        check_xattr(name)?;
        if name.len() > XATTR_NAME_MAX {
            return Err(Errno::RANGE);
        }
        self.alter(ino, false, |attributes| {
            match attributes.xattrs.contains_key(name) {
                true if flags & XATTR_CREATE != 0 => return Err(Errno::EXIST),
                false if flags & XATTR_REPLACE != 0 => return Err(Errno::NODATA),
                _ => {}
            }
            attributes.xattrs.insert(name.to_owned(), value.to_vec());
            attributes.ctime = SystemTime::now();
            Ok(())
        })
        .await
    }

    /// Removes an extended attribute.
    pub(crate) async fn remove_xattr(self: &Arc<Self>, ino: Ino, name: &str) -> Answer<()> {
        self.writable()?;
        check_xattr(name)?;
        self.alter(ino, false, |attributes| {
            attributes.xattrs.remove(name).ok_or(Errno::NODATA)?;
            attributes.ctime = SystemTime::now();
            Ok(())
        })
        .await
    }
}

/// ACLs would have to be enforced; of the rest, what has a known prefix is kept.
fn check_xattr(name: &str) -> Answer<()> {
    let kept = ["user.", "trusted.", "security."].iter().any(|prefix| name.starts_with(prefix) && name != *prefix);
    if kept { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}
