//! Names made and removed: directories, links, special files, and what unlink leaves behind.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::super::attributes::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};
use super::super::store::{Condition, ListRequest, Payload, StoreErrorKind};
use super::Namespace;
use super::errors::refused;
use super::facts::{Facts, Seen, Stored};
use super::look::Asker;
use super::open::File;
use super::tree::{ROOT, Slot};
use crate::fuse::filesystem::{Answer, Caller, Ino};
use crate::host::Errno;

/// Longest target of a symbolic link.
const TARGET_MAX: usize = 4095;

impl Namespace {
    /// Makes a directory: its marker.
    pub(crate) async fn make_directory(
        self: &Arc<Self>,
        who: Caller,
        parent: Ino,
        name: &str,
        mode: u32,
    ) -> Answer<Ino> {
        let ino = self.make(who, parent, name, S_IFDIR | mode & 0o7777, 0, Bytes::new()).await?;
        if let Some(directory) = self.tree().directory_mut(ino) {
            directory.complete = Some(Instant::now());
        }
        Ok(ino)
    }

    /// Makes a symbolic link.
    pub(crate) async fn make_link(
        self: &Arc<Self>,
        who: Caller,
        parent: Ino,
        name: &str,
        target: Bytes,
    ) -> Answer<Ino> {
        if target.len() > TARGET_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let ino = self.make(who, parent, name, S_IFLNK | 0o777, 0, target.clone()).await?;
        if let Some(node) = self.tree().node_mut(ino) {
            node.target = node.facts.stored.as_ref().map(|stored| (stored.etag.clone(), target));
        }
        Ok(ino)
    }

    /// Makes a file that is not opened, a FIFO, a socket or a device.
    pub(crate) async fn make_node(
        self: &Arc<Self>,
        who: Caller,
        parent: Ino,
        name: &str,
        mode: u32,
        rdev: u32,
    ) -> Answer<Ino> {
        match mode & S_IFMT {
            0 => self.make(who, parent, name, S_IFREG | mode, 0, Bytes::new()).await,
            S_IFREG | S_IFIFO | S_IFSOCK => self.make(who, parent, name, mode, 0, Bytes::new()).await,
            S_IFCHR | S_IFBLK => self.make(who, parent, name, mode, rdev, Bytes::new()).await,
            _ => Err(Errno::INVAL),
        }
    }

    /// An object that is whole from the beginning.
    async fn make(
        self: &Arc<Self>,
        who: Caller,
        parent: Ino,
        name: &str,
        mode: u32,
        rdev: u32,
        body: Bytes,
    ) -> Answer<Ino> {
        self.writable()?;
        self.check_name(parent, name)?;
        let _held = self.take(&[(parent, name)], None).await;
        let directory = mode & S_IFMT == S_IFDIR;
        // The condition of the PUT is about the marker, and a file of the same name would be hidden by it.
        let horizon = if directory { Instant::now() } else { self.horizon() };
        if self.find_since(parent, name, horizon, Asker::Holder).await?.0 {
            return Err(Errno::EXIST);
        }
        let attributes = self.inherit(parent, who, mode, rdev)?;
        let mut key = self.tree().key_of(parent, name).ok_or(Errno::STALE)?;
        if directory {
            key.push('/');
        }
        let size = body.len() as u64;
        self.usage.grow(size).map_err(|_| Errno::NOSPC)?;
        let made = self.put_new(parent, name, &key, body, &attributes).await;
        let stored = made.inspect_err(|_| self.usage.shrink(size))?;
        let mut tree = self.tree();
        let changed = tree.tick();
        let facts = Facts::local(directory, attributes, Some(stored), changed);
        let ino = tree.insert(parent, name, facts).ok_or(Errno::STALE)?;
        self.touch(&mut tree, parent);
        drop(tree);
        self.index_later(parent);
        Ok(ino)
    }

    /// Where a symbolic link points.
    pub(crate) async fn read_link(self: &Arc<Self>, ino: Ino) -> Answer<Bytes> {
        for _ in 0..4 {
            self.refresh(ino).await?;
            let (key, etag) = {
                let tree = self.tree();
                let node = tree.node(ino).ok_or(Errno::STALE)?;
                if node.facts.attributes.as_ref().is_none_or(|attributes| attributes.kind() != S_IFLNK) {
                    return Err(Errno::INVAL);
                }
                let etag = node.facts.stored.as_ref().ok_or(Errno::STALE)?.etag.clone();
                if let Some((_, target)) = node.target.as_ref().filter(|(of, _)| *of == etag) {
                    return Ok(target.clone());
                }
                (tree.key(ino).ok_or(Errno::STALE)?, etag)
            };
            match self.read_small(&key, &etag).await {
                Ok(target) => {
                    if let Some(node) = self.tree().node_mut(ino) {
                        node.target = Some((etag, target.clone()));
                    }
                    return Ok(target);
                }
                Err(Errno::STALE) => self.refresh_since(ino, Instant::now(), Asker::Other).await?,
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::STALE)
    }

    async fn read_small(&self, key: &str, etag: &super::super::store::Etag) -> Answer<Bytes> {
        let range = Some(0..TARGET_MAX as u64 + 1);
        let (_, mut body) = self.store.get(key, range, Some(etag)).await.map_err(|error| match error.kind {
            StoreErrorKind::NotFound | StoreErrorKind::Conflict => Errno::STALE,
            _ => refused(&error),
        })?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = body.next().await {
            bytes.extend_from_slice(&piece.map_err(|error| refused(&error))?);
        }
        if bytes.is_empty() || bytes.len() > TARGET_MAX { Err(Errno::IO) } else { Ok(bytes.freeze()) }
    }

    /// Takes a file's name away.
    pub(crate) async fn unlink(self: &Arc<Self>, parent: Ino, name: &str) -> Answer<()> {
        self.writable()?;
        let _held = self.take(&[(parent, name)], None).await;
        if !self.find(parent, name, Asker::Holder).await? {
            return Err(Errno::NOENT);
        }
        let (ino, file, directory) = {
            let tree = self.tree();
            let ino = tree.live(parent, name);
            let file = ino.and_then(|ino| tree.node(ino)?.file.clone());
            (ino, file, tree.facts(parent, name).is_some_and(|facts| facts.directory))
        };
        if directory {
            return Err(Errno::ISDIR);
        }
        let key = self.tree().key_of(parent, name).ok_or(Errno::STALE)?;
        let in_bucket = !file.as_ref().is_some_and(|file| file.state().is_nothing());
        if in_bucket {
            self.leave_marker(parent, name).await?;
        }
        if let Some(file) = &file {
            self.put_aside(file).await?;
        }
        if in_bucket {
            self.store.delete(&key, None).await.map_err(|error| refused(&error))?;
        }
        self.removed(parent, name, ino, file).await;
        self.index_later(parent);
        Ok(())
    }

    /// An open file loses its name: what the bucket has of it goes to a hidden key until the last handle is closed.
    pub(super) async fn put_aside(&self, file: &Arc<File>) -> Answer<()> {
        let hidden = format!("{}unlinked/{}", self.hidden, self.unique());
        let open = file.state().opens > 0;
        if let (true, Some(base)) = (open, file.content.base()) {
            let copied = self.copy(&base.key, &base.etag, base.size, &hidden, None, &Condition::None).await;
            match copied {
                Ok(etag) => {
                    let stored = Stored::written(etag, base.size);
                    self.moved(file, &hidden, &stored);
                    file.state().aside = true;
                }
                // Somebody else's version is there, or none: what this file had is gone already.
                Err(error) if matches!(error.kind, StoreErrorKind::NotFound | StoreErrorKind::Conflict) => {}
                Err(error) => return Err(refused(&error)),
            }
        }
        file.state().hidden = Some(hidden);
        Ok(())
    }

    /// A file's name is gone.
    pub(super) async fn removed(self: &Arc<Self>, parent: Ino, name: &str, ino: Option<Ino>, file: Option<Arc<File>>) {
        {
            let mut tree = self.tree();
            if file.is_none()
                && let Some(facts) = tree.facts(parent, name)
            {
                self.usage.shrink(facts.size());
            }
            tree.remove(parent, name);
            self.touch(&mut tree, parent);
        }
        if let (Some(ino), Some(file)) = (ino, file)
            && file.state().opens == 0
        {
            // It waited for its commit; nobody wants it any more.
            file.content.discard().await;
            file.give_back(&self.usage, 0);
            self.settle(ino, &file);
        }
    }

    /// A directory that is about to lose this entry may not vanish with it: without other entries it needs a marker.
    pub(super) async fn leave_marker(&self, parent: Ino, leaving: &str) -> Answer<()> {
        if parent == ROOT {
            return Ok(());
        }
        let horizon = self.horizon();
        let (key, ask) = {
            let tree = self.tree();
            let node = tree.node(parent).ok_or(Errno::STALE)?;
            if node.facts.marker_known && node.facts.stored.is_some() {
                return Ok(());
            }
            let directory = node.directory.as_ref().ok_or(Errno::NOTDIR)?;
            let stays = |(name, slot): (&Arc<str>, &Slot)| {
                let in_bucket = match slot {
                    Slot::Absent { .. } => false,
                    Slot::Known(facts) => facts.is_fresh(horizon),
                    Slot::Live(live) => tree.node(*live).is_some_and(|node| {
                        node.facts.is_fresh(horizon) && (node.facts.directory || node.facts.stored.is_some())
                    }),
                };
                in_bucket && name.as_ref() != leaving
            };
            // From the end: programs remove from the beginning.
            if directory.names.iter().rev().any(stays) {
                return Ok(());
            }
            (tree.key(parent).ok_or(Errno::STALE)?, tree.ask())
        };
        let request = ListRequest { prefix: key.clone(), limit: Some(3), ..ListRequest::default() };
        let page = self.store.list(&request).await.map_err(|error| refused(&error))?;
        let leaving_key = format!("{key}{leaving}");
        let leaving_folder = format!("{leaving_key}/");
        for object in &page.objects {
            if object.key == key {
                let mut tree = self.tree();
                self.take_marker(&mut tree, parent, Some(Stored::listed(object, true, &self.defaults)), true, ask);
                return Ok(());
            }
            if object.key != leaving_key && !object.key.starts_with(&leaving_folder) {
                return Ok(());
            }
        }
        self.put_marker(parent, &key).await
    }

    /// Gives a directory that exists without a marker one.
    async fn put_marker(&self, ino: Ino, key: &str) -> Answer<()> {
        let attributes = {
            let tree = self.tree();
            let node = tree.node(ino).ok_or(Errno::STALE)?;
            node.facts.attributes.as_deref().unwrap_or(&tree.plain).clone()
        };
        let put = self.store.put(key, Payload::Bytes(Bytes::new()), &attributes.metadata(), &Condition::Absent).await;
        match put {
            Ok(etag) => {
                let mut tree = self.tree();
                let changed = tree.tick();
                if let Some(node) = tree.node_mut(ino) {
                    let stored = Stored::written(etag, 0);
                    node.facts = Facts::local(true, attributes, Some(stored), changed);
                }
                Ok(())
            }
            Err(error) if error.kind == StoreErrorKind::Conflict => Ok(()),
            Err(error) => Err(refused(&error)),
        }
    }

    /// Takes an empty directory away.
    pub(crate) async fn remove_directory(self: &Arc<Self>, parent: Ino, name: &str) -> Answer<()> {
        self.writable()?;
        if !self.find(parent, name, Asker::Other).await? {
            return Err(Errno::NOENT);
        }
        let ino = {
            let mut tree = self.tree();
            if !tree.facts(parent, name).is_some_and(|facts| facts.directory) {
                return Err(Errno::NOTDIR);
            }
            tree.attach(parent, name).ok_or(Errno::STALE)?
        };
        let _held = self.take(&[(parent, name)], Some(ino)).await;
        if self.tree().live(parent, name) != Some(ino) {
            return Err(Errno::NOENT);
        }
        let key = self.tree().key(ino).ok_or(Errno::STALE)?;
        self.check_empty(ino, &key).await?;
        self.leave_marker(parent, name).await?;
        self.store.delete(&key, None).await.map_err(|error| refused(&error))?;
        let mut tree = self.tree();
        tree.remove(parent, name);
        self.touch(&mut tree, parent);
        Ok(())
    }

    /// ENOTEMPTY, unless a directory has nothing but its marker, here and in the bucket.
    pub(super) async fn check_empty(&self, ino: Ino, key: &str) -> Answer<()> {
        let ask = {
            let tree = self.tree();
            let directory = tree.directory(ino).ok_or(Errno::NOTDIR)?;
            let ours = directory.names.values().any(|slot| match slot {
                Slot::Live(live) => {
                    tree.node(*live).and_then(|node| node.file.as_ref()).is_some_and(|file| file.is_ours())
                }
                _ => false,
            });
            if ours {
                return Err(Errno::NOTEMPTY);
            }
            tree.ask()
        };
        let request = ListRequest { prefix: key.to_owned(), limit: Some(2), ..ListRequest::default() };
        let page = self.store.list(&request).await.map_err(|error| refused(&error))?;
        for object in &page.objects {
            if let Some(rest) = object.key.strip_prefix(key)
                && !rest.is_empty()
            {
                let name = rest.split('/').next().unwrap_or(rest);
                if self.is_name(ino, name) && name == rest {
                    self.learn(ino, name, ask, Seen::Object(Stored::listed(object, false, &self.defaults)));
                }
                return Err(Errno::NOTEMPTY);
            }
        }
        Ok(())
    }
}
