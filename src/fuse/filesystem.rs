//! What a file system answers. One method for each request of the kernel; errors are errnos and go to the program as
//! they are.

use std::ffi::{OsStr, OsString};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::host::Errno;

/// An inode number. 1 is the root. Never 0.
pub type Ino = u64;

/// What open and opendir returned to the kernel.
pub type Handle = u64;

/// Answers of the file system.
pub type Answer<T> = Result<T, Errno>;

/// Who asks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    /// File-system user id.
    pub uid: u32,
    /// File-system group id.
    pub gid: u32,
    /// Thread id; 0: the kernel itself.
    pub pid: u32,
    /// The request's id, without the resend mark.
    pub unique: u64,
    /// The kernel sends this again: an earlier server read it and did not answer.
    pub resent: bool,
}

/// Attributes, as stat shows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Which.
    pub ino: Ino,
    /// Bytes.
    pub size: u64,
    /// In 512-byte units.
    pub blocks: u64,
    /// Last read.
    pub atime: SystemTime,
    /// Last change of content.
    pub mtime: SystemTime,
    /// Last change of anything.
    pub ctime: SystemTime,
    /// Type and permission bits (`S_IFREG | 0o644`).
    pub mode: u32,
    /// Links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of device nodes.
    pub rdev: u32,
}

/// A name's inode, and how long the kernel may believe it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The inode's attributes. `ino` 0: there is no such name, believe that for `name_ttl`.
    pub attr: Attr,
    /// How long the attributes hold.
    pub attr_ttl: Duration,
    /// How long the name holds.
    pub name_ttl: Duration,
}

/// What SETATTR changes. `None`: leave it.
#[derive(Clone, Debug, Default)]
pub struct SetAttr {
    /// Permission bits (and type).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncate or extend.
    pub size: Option<u64>,
    /// Last read.
    pub atime: Option<Time>,
    /// Last change of content.
    pub mtime: Option<Time>,
    /// Last change of anything.
    pub ctime: Option<SystemTime>,
    /// The open file through which it is done.
    pub handle: Option<Handle>,
    /// The kernel asks for set-user-id and set-group-id bits to be dropped.
    pub kill_suid: bool,
}

/// A time to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// This one.
    At(SystemTime),
    /// The server's present.
    Now,
}

/// What open returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opened {
    /// Ours.
    pub handle: Handle,
    /// What the kernel has cached of the file is still right.
    pub keep_cache: bool,
    /// Nothing is cached by the kernel.
    pub direct_io: bool,
    /// For directories: the kernel may cache the listing.
    pub cache_dir: bool,
    /// Not seekable.
    pub stream: bool,
}

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// Its name.
    pub name: OsString,
    /// Its inode number, for d_ino.
    pub ino: Ino,
    /// `S_IF*`; 0: unknown.
    pub kind: u32,
    /// Where to go on behind this entry. Holds for as long as the directory handle.
    pub next: u64,
    /// READDIRPLUS: attributes, which count as a lookup. `None`: the kernel looks up itself when it needs to.
    pub entry: Option<Entry>,
}

/// Takes entries until the reply is full.
pub trait DirSink: Send {
    /// Is this READDIRPLUS?
    fn plus(&self) -> bool;
    /// `false`: it did not fit, stop (and this entry was not looked up).
    fn push(&mut self, entry: &DirEntry) -> bool;
}

/// The answer to statfs.
#[derive(Clone, Copy, Debug)]
pub struct StatFs {
    /// Bytes a block.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Files in all.
    pub files: u64,
    /// Files that can still be made.
    pub files_free: u64,
    /// Longest name.
    pub name_max: u32,
}

/// A byte range lock is not asked of us: the kernel keeps them for one node.
///
/// A file system. Methods may be called from many tasks at once; what is not overridden answers ENOSYS.
#[allow(unused_variables, reason = "names of parameters are the documentation")]
pub trait FileSystem: Send + Sync + 'static {
    /// Looks a name up. Counts a reference to the inode when it answers with one.
    fn lookup(&self, who: Caller, parent: Ino, name: &OsStr) -> impl Future<Output = Answer<Entry>> + Send;
    /// The kernel gives `count` references back.
    fn forget(&self, ino: Ino, count: u64);
    /// Attributes, and how long they hold.
    fn getattr(
        &self,
        who: Caller,
        ino: Ino,
        handle: Option<Handle>,
    ) -> impl Future<Output = Answer<(Attr, Duration)>> + Send;
    /// Changes attributes.
    fn setattr(&self, who: Caller, ino: Ino, change: SetAttr) -> impl Future<Output = Answer<(Attr, Duration)>> + Send;
    /// The target of a symbolic link.
    fn readlink(&self, who: Caller, ino: Ino) -> impl Future<Output = Answer<Bytes>> + Send;
    /// Makes a node that is no directory. `mode` has the type; the umask is not yet taken off.
    fn mknod(
        &self,
        who: Caller,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
    ) -> impl Future<Output = Answer<Entry>> + Send;
    /// Makes a directory.
    fn mkdir(
        &self,
        who: Caller,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        umask: u32,
    ) -> impl Future<Output = Answer<Entry>> + Send;
    /// Takes a name of a file away.
    fn unlink(&self, who: Caller, parent: Ino, name: &OsStr) -> impl Future<Output = Answer<()>> + Send;
    /// Takes an empty directory away.
    fn rmdir(&self, who: Caller, parent: Ino, name: &OsStr) -> impl Future<Output = Answer<()>> + Send;
    /// Makes a symbolic link.
    fn symlink(
        &self,
        who: Caller,
        parent: Ino,
        name: &OsStr,
        target: &OsStr,
    ) -> impl Future<Output = Answer<Entry>> + Send;
    /// Renames; `flags` are renameat2's.
    fn rename(
        &self,
        who: Caller,
        parent: Ino,
        name: &OsStr,
        new_parent: Ino,
        new_name: &OsStr,
        flags: u32,
    ) -> impl Future<Output = Answer<()>> + Send;
    /// Makes a hard link.
    fn link(&self, who: Caller, ino: Ino, parent: Ino, name: &OsStr) -> impl Future<Output = Answer<Entry>> + Send {
        async { Err(Errno::NOSYS) }
    }
    /// Opens a file; `flags` are open(2)'s, without O_CREAT and O_EXCL; O_TRUNC is there (FUSE_ATOMIC_O_TRUNC).
    fn open(&self, who: Caller, ino: Ino, flags: u32) -> impl Future<Output = Answer<Opened>> + Send;
    /// Makes and opens a file in one. `flags` are open(2)'s, with O_EXCL where the program gave it.
    fn create(
        &self,
        who: Caller,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: u32,
    ) -> impl Future<Output = Answer<(Entry, Opened)>> + Send;
    /// Reads; fewer bytes than asked for mean the end of the file. Pieces are sent one after the other.
    fn read(
        &self,
        who: Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        size: u32,
    ) -> impl Future<Output = Answer<Vec<Bytes>>> + Send;
    /// Writes all of it, or fails. `from_cache`: pages written through mmap, whoever `who` is.
    fn write(
        &self,
        who: Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        data: Bytes,
        from_cache: bool,
    ) -> impl Future<Output = Answer<u32>> + Send;
    /// A descriptor of the file is closed (there may be others); its error is close(2)'s.
    fn flush(&self, who: Caller, ino: Ino, handle: Handle) -> impl Future<Output = Answer<()>> + Send;
    /// The last descriptor is gone. Nobody sees its error.
    fn release(&self, ino: Ino, handle: Handle) -> impl Future<Output = ()> + Send;
    /// Durable when it returns.
    fn fsync(&self, who: Caller, ino: Ino, handle: Handle, data_only: bool) -> impl Future<Output = Answer<()>> + Send;
    /// Opens a directory.
    fn opendir(&self, who: Caller, ino: Ino) -> impl Future<Output = Answer<Opened>> + Send;
    /// Entries behind `offset` (0: from the beginning).
    fn readdir(
        &self,
        who: Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        sink: &mut dyn DirSink,
    ) -> impl Future<Output = Answer<()>> + Send;
    /// Closes a directory.
    fn releasedir(&self, ino: Ino, handle: Handle) -> impl Future<Output = ()> + Send;
    /// Durable when it returns.
    fn fsyncdir(&self, who: Caller, ino: Ino, handle: Handle) -> impl Future<Output = Answer<()>> + Send {
        async { Ok(()) }
    }
    /// How full it is.
    fn statfs(&self, who: Caller, ino: Ino) -> impl Future<Output = Answer<StatFs>> + Send;
    /// An extended attribute.
    fn getxattr(&self, who: Caller, ino: Ino, name: &OsStr) -> impl Future<Output = Answer<Bytes>> + Send {
        async { Err(Errno::NOSYS) }
    }
    /// Sets one; `flags`: XATTR_CREATE, XATTR_REPLACE.
    fn setxattr(
        &self,
        who: Caller,
        ino: Ino,
        name: &OsStr,
        value: Bytes,
        flags: u32,
    ) -> impl Future<Output = Answer<()>> + Send {
        async { Err(Errno::NOSYS) }
    }
    /// Their names.
    fn listxattr(&self, who: Caller, ino: Ino) -> impl Future<Output = Answer<Vec<OsString>>> + Send {
        async { Err(Errno::NOSYS) }
    }
    /// Removes one.
    fn removexattr(&self, who: Caller, ino: Ino, name: &OsStr) -> impl Future<Output = Answer<()>> + Send {
        async { Err(Errno::NOSYS) }
    }
    /// Reserves or punches; `mode` is fallocate(2)'s.
    fn fallocate(
        &self,
        who: Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> impl Future<Output = Answer<()>> + Send {
        async { Err(Errno::NOSYS) }
    }
    /// SEEK_DATA and SEEK_HOLE.
    fn lseek(
        &self,
        who: Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> impl Future<Output = Answer<u64>> + Send {
        async { Err(Errno::NOSYS) }
    }
    /// The mount is there: what tells the kernel that its caches are old.
    fn started(&self, kernel: Arc<dyn Notify>) {}
    /// The kernel has unmounted: everything is to be brought into safety. The process ends afterwards.
    fn ended(&self) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// What may be told to the kernel at any time, from any task but one that answers about the same inode.
pub trait Notify: Send + Sync {
    /// Attributes, and pages of this range (`length` 0: to the end; `offset` < 0: attributes only), are old.
    fn invalidate_inode(&self, ino: Ino, offset: i64, length: i64);
    /// A name is old.
    fn invalidate_name(&self, parent: Ino, name: &OsStr);
}
