//! Numbers and structures of the FUSE protocol, version 7, in this machine's byte order (fuse(4)). Holds no logic.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The protocol's major version.
pub(super) const MAJOR: u32 = 7;
/// The newest minor version known here.
pub(super) const MINOR: u32 = 45;
/// The oldest minor version that is served (Linux 5.4; the driver asks for 5.15).
pub(super) const OLDEST_MINOR: u32 = 31;

/// In a request's id: it was sent before.
pub(super) const UNIQUE_RESEND: u64 = 1 << 63;

/// Requests.
pub(super) mod opcode {
    pub(in crate::fuse) const LOOKUP: u32 = 1;
    pub(in crate::fuse) const FORGET: u32 = 2;
    pub(in crate::fuse) const GETATTR: u32 = 3;
    pub(in crate::fuse) const SETATTR: u32 = 4;
    pub(in crate::fuse) const READLINK: u32 = 5;
    pub(in crate::fuse) const SYMLINK: u32 = 6;
    pub(in crate::fuse) const MKNOD: u32 = 8;
    pub(in crate::fuse) const MKDIR: u32 = 9;
    pub(in crate::fuse) const UNLINK: u32 = 10;
    pub(in crate::fuse) const RMDIR: u32 = 11;
    pub(in crate::fuse) const RENAME: u32 = 12;
    pub(in crate::fuse) const LINK: u32 = 13;
    pub(in crate::fuse) const OPEN: u32 = 14;
    pub(in crate::fuse) const READ: u32 = 15;
    pub(in crate::fuse) const WRITE: u32 = 16;
    pub(in crate::fuse) const STATFS: u32 = 17;
    pub(in crate::fuse) const RELEASE: u32 = 18;
    pub(in crate::fuse) const FSYNC: u32 = 20;
    pub(in crate::fuse) const SETXATTR: u32 = 21;
    pub(in crate::fuse) const GETXATTR: u32 = 22;
    pub(in crate::fuse) const LISTXATTR: u32 = 23;
    pub(in crate::fuse) const REMOVEXATTR: u32 = 24;
    pub(in crate::fuse) const FLUSH: u32 = 25;
    pub(in crate::fuse) const INIT: u32 = 26;
    pub(in crate::fuse) const OPENDIR: u32 = 27;
    pub(in crate::fuse) const READDIR: u32 = 28;
    pub(in crate::fuse) const RELEASEDIR: u32 = 29;
    pub(in crate::fuse) const FSYNCDIR: u32 = 30;
    pub(in crate::fuse) const CREATE: u32 = 35;
    pub(in crate::fuse) const INTERRUPT: u32 = 36;
    pub(in crate::fuse) const DESTROY: u32 = 38;
    pub(in crate::fuse) const IOCTL: u32 = 39;
    pub(in crate::fuse) const NOTIFY_REPLY: u32 = 41;
    pub(in crate::fuse) const BATCH_FORGET: u32 = 42;
    pub(in crate::fuse) const FALLOCATE: u32 = 43;
    pub(in crate::fuse) const READDIRPLUS: u32 = 44;
    pub(in crate::fuse) const RENAME2: u32 = 45;
    pub(in crate::fuse) const LSEEK: u32 = 46;
}

/// What is told to the kernel unasked; stands where an answer has its error.
pub(super) mod notice {
    pub(in crate::fuse) const INVAL_INODE: i32 = 2;
    pub(in crate::fuse) const INVAL_ENTRY: i32 = 3;
    pub(in crate::fuse) const RESEND: i32 = 7;
}

/// What INIT settles. Bits from 32 on travel in a second field.
pub(super) mod feature {
    /// Several reads of one file at once.
    pub(in crate::fuse) const ASYNC_READ: u64 = 1 << 0;
    /// open gets O_TRUNC.
    pub(in crate::fuse) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    /// Writes of more than a page.
    pub(in crate::fuse) const BIG_WRITES: u64 = 1 << 5;
    /// The umask is the server's matter.
    pub(in crate::fuse) const DONT_MASK: u64 = 1 << 6;
    /// Pages are dropped when size or time change.
    pub(in crate::fuse) const AUTO_INVAL_DATA: u64 = 1 << 12;
    /// Listings with attributes,
    pub(in crate::fuse) const DO_READDIRPLUS: u64 = 1 << 13;
    /// ... where the program wants them.
    pub(in crate::fuse) const READDIRPLUS_AUTO: u64 = 1 << 14;
    /// Several direct reads and writes at once.
    pub(in crate::fuse) const ASYNC_DIO: u64 = 1 << 15;
    /// Lookups and listings of one directory at once.
    pub(in crate::fuse) const PARALLEL_DIROPS: u64 = 1 << 18;
    /// Reading an aborted descriptor gives another error than reading an unmounted one.
    pub(in crate::fuse) const ABORT_ERROR: u64 = 1 << 21;
    /// `max_pages` counts.
    pub(in crate::fuse) const MAX_PAGES: u64 = 1 << 22;
    /// The kernel keeps targets of links.
    pub(in crate::fuse) const CACHE_SYMLINKS: u64 = 1 << 23;
    /// The server drops set-user-id bits on write, truncate and chown.
    pub(in crate::fuse) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    /// There is a second field of bits.
    pub(in crate::fuse) const INIT_EXT: u64 = 1 << 30;
    /// The kernel can send again.
    pub(in crate::fuse) const HAS_RESEND: u64 = 1 << 39;
}

/// `SetattrIn::valid`.
pub(super) mod valid {
    pub(in crate::fuse) const MODE: u32 = 1 << 0;
    pub(in crate::fuse) const UID: u32 = 1 << 1;
    pub(in crate::fuse) const GID: u32 = 1 << 2;
    pub(in crate::fuse) const SIZE: u32 = 1 << 3;
    pub(in crate::fuse) const ATIME: u32 = 1 << 4;
    pub(in crate::fuse) const MTIME: u32 = 1 << 5;
    pub(in crate::fuse) const HANDLE: u32 = 1 << 6;
    pub(in crate::fuse) const ATIME_NOW: u32 = 1 << 7;
    pub(in crate::fuse) const MTIME_NOW: u32 = 1 << 8;
    pub(in crate::fuse) const CTIME: u32 = 1 << 10;
    pub(in crate::fuse) const KILL_SUIDGID: u32 = 1 << 11;
}

/// `OpenOut::open_flags`.
pub(super) mod opened {
    pub(in crate::fuse) const DIRECT_IO: u32 = 1 << 0;
    pub(in crate::fuse) const KEEP_CACHE: u32 = 1 << 1;
    pub(in crate::fuse) const NONSEEKABLE: u32 = 1 << 2;
    pub(in crate::fuse) const CACHE_DIR: u32 = 1 << 3;
    pub(in crate::fuse) const STREAM: u32 = 1 << 4;
}

/// `GetattrIn::flags`: the handle counts.
pub(super) const GETATTR_HANDLE: u32 = 1 << 0;
/// `OpenIn::open_flags`: the set-user-id bits go.
pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `WriteIn::write_flags`: out of the page cache, the handle is any that can write.
pub(super) const WRITE_CACHE: u32 = 1 << 0;
/// `WriteIn::write_flags`: the set-user-id bits go.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FsyncIn::flags`: data only.
pub(super) const FSYNC_DATA: u32 = 1 << 0;

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub(super) struct $name { $(pub(super) $field: $kind),* }

            impl Default for $name {
                fn default() -> Self {
                    Self::new_zeroed()
                }
            }
        )*
    };
}

structures! {
    /// Begins each request.
    InHeader { len: u32, opcode: u32, unique: u64, node: u64, uid: u32, gid: u32, pid: u32, extensions: u16, padding: u16 }
    /// Begins each answer. The error is negative.
    OutHeader { len: u32, error: i32, unique: u64 }
    /// The first half of INIT; older kernels send no more.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_granularity: u32, max_pages: u16, map_alignment: u16, flags2: u32, unused: [u32; 7],
    }
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atime_nanos: u32, mtime_nanos: u32,
        ctime_nanos: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, block_size: u32, flags: u32,
    }
    EntryOut {
        node: u64, generation: u64, name_valid: u64, attr_valid: u64, name_valid_nanos: u32, attr_valid_nanos: u32,
        attr: Attr,
    }
    AttrOut { valid: u64, valid_nanos: u32, padding: u32, attr: Attr }
    ForgetIn { count: u64 }
    BatchForgetIn { count: u32, padding: u32 }
    ForgetOne { node: u64, count: u64 }
    GetattrIn { flags: u32, padding: u32, handle: u64 }
    SetattrIn {
        valid: u32, padding: u32, handle: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atime_nanos: u32, mtime_nanos: u32, ctime_nanos: u32, mode: u32, unused: u32, uid: u32, gid: u32, unused2: u32,
    }
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32 }
    MkdirIn { mode: u32, umask: u32 }
    RenameIn { new_parent: u64 }
    Rename2In { new_parent: u64, flags: u32, padding: u32 }
    LinkIn { node: u64 }
    OpenIn { flags: u32, open_flags: u32 }
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    OpenOut { handle: u64, open_flags: u32, backing: u32 }
    CreateOut { entry: EntryOut, opened: OpenOut }
    ReleaseIn { handle: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    FlushIn { handle: u64, unused: u32, padding: u32, lock_owner: u64 }
    ReadIn { handle: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    WriteIn { handle: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    WriteOut { size: u32, padding: u32 }
    FsyncIn { handle: u64, flags: u32, padding: u32 }
    SetxattrIn { size: u32, flags: u32 }
    /// Of GETXATTR and LISTXATTR, and the answer when only the size was asked for.
    XattrSize { size: u32, padding: u32 }
    StatfsOut {
        blocks: u64, free: u64, available: u64, files: u64, files_free: u64, block_size: u32, name_max: u32,
        fragment_size: u32, padding: u32, spare: [u32; 6],
    }
    FallocateIn { handle: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    LseekIn { handle: u64, offset: u64, whence: u32, padding: u32 }
    LseekOut { offset: u64 }
    InterruptIn { unique: u64 }
    /// Its name follows, padded to eight bytes.
    Dirent { ino: u64, next: u64, name_len: u32, kind: u32 }
    InvalInode { ino: u64, offset: i64, length: i64 }
    /// The name follows, with its NUL.
    InvalEntry { parent: u64, name_len: u32, flags: u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<SetattrIn>(), 88);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<WriteIn>(), 40);
        assert_eq!(size_of::<StatfsOut>(), 80);
        assert_eq!(size_of::<Dirent>(), 24);
    }
}
