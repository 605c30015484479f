//! The file system as the kernel asks for it: requests in, answers out, handles by number. Decides nothing.

mod directories;
mod files;
mod handles;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use self::handles::Handles;
use super::content::Progress;
use super::namespace::{Namespace, Tables};
use super::settings::Settings;
use super::store::Store;
use crate::fuse::filesystem::{
    Answer, Attr, Caller, DirSink, Entry, FileSystem, Handle, Ino, Notify, Opened, SetAttr, StatFs,
};
use crate::host::Errno;

/// Without a limit the volume looks as large as this: an exabyte.
const BOUNDLESS: u64 = 1 << 60;
const BLOCK: u64 = 4096;

/// A mounted prefix of a bucket.
pub struct ObjectFs {
    names: Arc<Namespace>,
    handles: Handles,
}

impl ObjectFs {
    /// Opens a tree: what an earlier worker has left staged is there again and on its way to the bucket, renames that
    /// somebody has begun are finished.
    ///
    /// # Errors
    /// What the node's disk says of the staging folder or the cache.
    pub async fn open(settings: Settings, store: Arc<dyn Store>) -> std::io::Result<Arc<Self>> {
        Self::open_with(settings, store, Tables::default()).await
    }

    /// The same for a mount that is live: the kernel's inodes and handles go on.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_with(settings: Settings, store: Arc<dyn Store>, tables: Tables) -> std::io::Result<Arc<Self>> {
        let names = Namespace::begin(settings, store, &tables.inodes).await?;
        let this = Arc::new(Self { names, handles: Handles::default() });
        this.restore(&tables.handles).await;
        Ok(this)
    }

    /// How things stand: what lies only on this node, bytes in use, and the limit if there is one.
    pub fn status(&self) -> (Progress, u64, Option<u64>) {
        let (used, limit) = self.names.usage.figures();
        (self.names.contents.progress(), used, limit)
    }

    /// All that was written goes to the bucket, and the mount goes on.
    pub async fn commit_all(&self) {
        self.names.commit_all().await;
    }

    /// What a successor needs to know of the kernel's view.
    pub fn tables(&self) -> Tables {
        Tables { inodes: self.names.rows(), handles: self.handles.rows() }
    }

    async fn change(&self, who: Caller, ino: Ino, set: SetAttr) -> Answer<(Attr, Duration)> {
        let file = match set.handle {
            Some(handle) => Some(self.handles.file(handle)?.file.clone()),
            None => None,
        };
        self.names.set(who, ino, &set, file).await?;
        self.shown(ino)
    }

    fn shown(&self, ino: Ino) -> Answer<(Attr, Duration)> {
        let attr = self.names.attr(ino)?;
        let tree = self.names.tree();
        let ttl = tree.node(ino).map_or(Duration::ZERO, |node| self.names.ttl(node));
        Ok((attr, ttl))
    }
}

/// Names that are not UTF-8 can't be keys.
fn text(name: &OsStr) -> Answer<&str> {
    std::str::from_utf8(name.as_bytes()).map_err(|_| Errno::ILSEQ)
}

impl FileSystem for ObjectFs {
    async fn lookup(&self, who: Caller, parent: Ino, name: &OsStr) -> Answer<Entry> {
        self.look_up(who, parent, text(name)?).await
    }

    fn forget(&self, ino: Ino, count: u64) {
        self.names.tree().forget(ino, count);
    }

    async fn getattr(&self, _who: Caller, ino: Ino, _handle: Option<Handle>) -> Answer<(Attr, Duration)> {
        self.names.refresh(ino).await?;
        self.shown(ino)
    }

    async fn setattr(&self, who: Caller, ino: Ino, change: SetAttr) -> Answer<(Attr, Duration)> {
        self.change(who, ino, change).await
    }

    async fn readlink(&self, _who: Caller, ino: Ino) -> Answer<Bytes> {
        self.names.read_link(ino).await
    }

    async fn mknod(&self, who: Caller, parent: Ino, name: &OsStr, mode: u32, umask: u32, rdev: u32) -> Answer<Entry> {
        let ino = self.names.make_node(who, parent, text(name)?, mode & !umask, rdev).await?;
        self.names.entry(ino, true)
    }

    async fn mkdir(&self, who: Caller, parent: Ino, name: &OsStr, mode: u32, umask: u32) -> Answer<Entry> {
        let ino = self.names.make_directory(who, parent, text(name)?, mode & !umask).await?;
        self.names.entry(ino, true)
    }

    async fn unlink(&self, _who: Caller, parent: Ino, name: &OsStr) -> Answer<()> {
        self.names.unlink(parent, text(name)?).await
    }

    async fn rmdir(&self, _who: Caller, parent: Ino, name: &OsStr) -> Answer<()> {
        self.names.remove_directory(parent, text(name)?).await
    }

    async fn symlink(&self, who: Caller, parent: Ino, name: &OsStr, target: &OsStr) -> Answer<Entry> {
        let target = Bytes::copy_from_slice(target.as_bytes());
        let ino = self.names.make_link(who, parent, text(name)?, target).await?;
        self.names.entry(ino, true)
    }

    async fn rename(
        &self,
        _who: Caller,
        parent: Ino,
        name: &OsStr,
        new_parent: Ino,
        new_name: &OsStr,
        flags: u32,
    ) -> Answer<()> {
        self.names.rename((parent, text(name)?), (new_parent, text(new_name)?), flags).await
    }

    /// An object has one key.
    async fn link(&self, _who: Caller, _ino: Ino, _parent: Ino, _name: &OsStr) -> Answer<Entry> {
        Err(Errno::OPNOTSUPP)
    }

    async fn open(&self, who: Caller, ino: Ino, flags: u32) -> Answer<Opened> {
        self.open_file(who, ino, flags).await
    }

    async fn create(
        &self,
        who: Caller,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: u32,
    ) -> Answer<(Entry, Opened)> {
        self.create_file(who, parent, text(name)?, mode & !umask, flags).await
    }

    async fn read(&self, _who: Caller, _ino: Ino, handle: Handle, offset: u64, size: u32) -> Answer<Vec<Bytes>> {
        self.read_file(handle, offset, size).await
    }

    async fn write(
        &self,
        _who: Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        data: Bytes,
        _from_cache: bool,
    ) -> Answer<u32> {
        let file = self.handles.file(handle)?;
        self.names.write(ino, &file.file, offset, &data).await?;
        u32::try_from(data.len()).map_err(|_| Errno::INVAL)
    }

    async fn flush(&self, _who: Caller, ino: Ino, handle: Handle) -> Answer<()> {
        self.flush_file(ino, handle).await
    }

    async fn release(&self, ino: Ino, handle: Handle) {
        self.release_file(ino, handle).await;
    }

    async fn fsync(&self, _who: Caller, ino: Ino, handle: Handle, _data_only: bool) -> Answer<()> {
        self.names.fsync(ino, &self.handles.file(handle)?.file).await
    }

    async fn opendir(&self, _who: Caller, ino: Ino) -> Answer<Opened> {
        self.open_directory(ino)
    }

    async fn readdir(&self, _who: Caller, ino: Ino, handle: Handle, offset: u64, sink: &mut dyn DirSink) -> Answer<()> {
        self.read_directory(ino, handle, offset, sink).await
    }

    async fn releasedir(&self, ino: Ino, handle: Handle) {
        self.handles.remove(handle);
        self.names.tree().unpin(ino);
    }

    async fn statfs(&self, _who: Caller, _ino: Ino) -> Answer<StatFs> {
        let (used, limit) = self.names.usage.figures();
        let size = limit.unwrap_or(BOUNDLESS).max(used);
        Ok(StatFs {
            block_size: BLOCK as u32,
            blocks: size / BLOCK,
            free: (size - used) / BLOCK,
            files: u64::from(u32::MAX),
            files_free: u64::from(u32::MAX),
            name_max: super::namespace::NAME_MAX as u32,
        })
    }

    async fn getxattr(&self, _who: Caller, ino: Ino, name: &OsStr) -> Answer<Bytes> {
        self.names.xattr(ino, text(name)?).await
    }

    async fn setxattr(&self, _who: Caller, ino: Ino, name: &OsStr, value: Bytes, flags: u32) -> Answer<()> {
        self.names.set_xattr(ino, text(name)?, &value, flags).await
    }

    async fn listxattr(&self, who: Caller, ino: Ino) -> Answer<Vec<OsString>> {
        let names = self.names.xattrs(ino).await?;
        // xattr(7): only who may read them sees that they are there.
        let shown = names.into_iter().filter(|name| who.uid == 0 || !name.starts_with("trusted."));
        Ok(shown.map(|name| OsString::from_vec(name.into_bytes())).collect())
    }

    async fn removexattr(&self, _who: Caller, ino: Ino, name: &OsStr) -> Answer<()> {
        self.names.remove_xattr(ino, text(name)?).await
    }

    async fn fallocate(
        &self,
        _who: Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Answer<()> {
        self.allocate(ino, handle, offset, length, mode).await
    }

    async fn lseek(&self, _who: Caller, _ino: Ino, handle: Handle, offset: u64, whence: u32) -> Answer<u64> {
        self.seek(handle, offset, whence)
    }

    fn started(&self, kernel: Arc<dyn Notify>) {
        self.names.set_kernel(kernel);
    }

    async fn ended(&self) {
        self.names.end().await;
    }
}
