//! A request's bytes into an operation. Whatever the bytes are, the result is an operation or an error.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, SystemTime};

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::abi::{self, opcode, valid};
use super::filesystem::{Caller, Handle, Ino, SetAttr, Time};
use crate::host::Errno;

/// A request without its operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    /// Which operation.
    pub(super) opcode: u32,
    /// As it came, with the resend mark: the answer carries it so.
    pub(super) unique: u64,
    /// The inode that it is about.
    pub(super) ino: Ino,
    /// Who asks.
    pub(super) who: Caller,
}

/// What is asked for. Names are copied out of the buffer; a WRITE's data stays there.
#[derive(Debug)]
pub(super) enum Operation {
    Lookup {
        name: OsString,
    },
    Forget(Vec<(Ino, u64)>),
    Getattr {
        handle: Option<Handle>,
    },
    Setattr(SetAttr),
    Readlink,
    Symlink {
        name: OsString,
        target: OsString,
    },
    Mknod {
        name: OsString,
        mode: u32,
        umask: u32,
        rdev: u32,
    },
    Mkdir {
        name: OsString,
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: OsString,
    },
    Rmdir {
        name: OsString,
    },
    Rename {
        name: OsString,
        new_parent: Ino,
        new_name: OsString,
        flags: u32,
    },
    Link {
        ino: Ino,
        name: OsString,
    },
    Open {
        flags: u32,
        kill_suid: bool,
    },
    Create {
        name: OsString,
        mode: u32,
        umask: u32,
        flags: u32,
    },
    Read {
        handle: Handle,
        offset: u64,
        size: u32,
    },
    /// `size` bytes from [`WRITE_DATA`] on.
    Write {
        handle: Handle,
        offset: u64,
        size: usize,
        from_cache: bool,
        kill_suid: bool,
    },
    Flush {
        handle: Handle,
    },
    Release {
        handle: Handle,
    },
    Fsync {
        handle: Handle,
        data_only: bool,
    },
    Opendir,
    Readdir {
        handle: Handle,
        offset: u64,
        size: usize,
        plus: bool,
    },
    Releasedir {
        handle: Handle,
    },
    Fsyncdir {
        handle: Handle,
    },
    Statfs,
    Getxattr {
        name: OsString,
        size: usize,
    },
    Setxattr {
        name: OsString,
        value: Vec<u8>,
        flags: u32,
    },
    Listxattr {
        size: usize,
    },
    Removexattr {
        name: OsString,
    },
    Fallocate {
        handle: Handle,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        handle: Handle,
        offset: u64,
        whence: u32,
    },
    Init,
    Interrupt {
        unique: u64,
    },
    Destroy,
    /// Nobody waits for an answer.
    Ignored,
    /// The answer is this error.
    Unsupported(Errno),
}

/// Where a WRITE's data begins.
pub(super) const WRITE_DATA: usize = size_of::<abi::InHeader>() + size_of::<abi::WriteIn>();

impl Head {
    /// The head of a request, and what comes behind it. `None`: there is not even a head that could be answered.
    pub(super) fn read(request: &[u8]) -> Option<(Self, &[u8])> {
        let (head, body) = abi::InHeader::read_from_prefix(request).ok()?;
        let who = Caller {
            uid: head.uid,
            gid: head.gid,
            pid: head.pid,
            unique: head.unique & !abi::UNIQUE_RESEND,
            resent: head.unique & abi::UNIQUE_RESEND != 0,
        };
        let head_of = Self { opcode: head.opcode, unique: head.unique, ino: head.node, who };
        // The kernel gives the length twice; what it says must be there.
        let length = usize::try_from(head.len).ok()?.checked_sub(size_of::<abi::InHeader>())?;
        Some((head_of, body.get(..length)?))
    }
}

/// The operation.
///
/// # Errors
/// What to answer when the request makes no sense.
pub(super) fn decode(head: &Head, body: &[u8]) -> Result<Operation, Errno> {
    let mut body = Body(body);
    let operation = match head.opcode {
        opcode::LOOKUP => Operation::Lookup { name: body.name()? },
        opcode::FORGET => Operation::Forget(vec![(head.ino, body.take::<abi::ForgetIn>()?.count)]),
        opcode::BATCH_FORGET => Operation::Forget(body.forgets()?),
        opcode::GETATTR => {
            let asked = body.take::<abi::GetattrIn>()?;
            Operation::Getattr { handle: (asked.flags & abi::GETATTR_HANDLE != 0).then_some(asked.handle) }
        }
        opcode::SETATTR => Operation::Setattr(change(&body.take()?)?),
        opcode::READLINK => Operation::Readlink,
        opcode::SYMLINK => Operation::Symlink { name: body.name()?, target: body.string()? },
        opcode::MKNOD => {
            let asked = body.take::<abi::MknodIn>()?;
            Operation::Mknod { name: body.name()?, mode: asked.mode, umask: asked.umask, rdev: asked.rdev }
        }
        opcode::MKDIR => {
            let asked = body.take::<abi::MkdirIn>()?;
            Operation::Mkdir { name: body.name()?, mode: asked.mode, umask: asked.umask }
        }
        opcode::UNLINK => Operation::Unlink { name: body.name()? },
        opcode::RMDIR => Operation::Rmdir { name: body.name()? },
        opcode::RENAME => {
            let new_parent = body.take::<abi::RenameIn>()?.new_parent;
            Operation::Rename { name: body.name()?, new_parent, new_name: body.name()?, flags: 0 }
        }
        opcode::RENAME2 => {
            let asked = body.take::<abi::Rename2In>()?;
            let (name, new_name) = (body.name()?, body.name()?);
            Operation::Rename { name, new_parent: asked.new_parent, new_name, flags: asked.flags }
        }
        opcode::LINK => Operation::Link { ino: body.take::<abi::LinkIn>()?.node, name: body.name()? },
        opcode::OPEN => {
            let asked = body.take::<abi::OpenIn>()?;
            Operation::Open { flags: asked.flags, kill_suid: asked.open_flags & abi::OPEN_KILL_SUIDGID != 0 }
        }
        opcode::CREATE => {
            let asked = body.take::<abi::CreateIn>()?;
            Operation::Create { name: body.name()?, mode: asked.mode, umask: asked.umask, flags: asked.flags }
        }
        opcode::READ => {
            let asked = body.take::<abi::ReadIn>()?;
            Operation::Read { handle: asked.handle, offset: position(asked.offset)?, size: asked.size }
        }
        opcode::WRITE => {
            let asked = body.take::<abi::WriteIn>()?;
            let size = length(asked.size)?;
            if body.0.len() != size {
                return Err(Errno::IO);
            }
            Operation::Write {
                handle: asked.handle,
                offset: position(asked.offset)?,
                size,
                from_cache: asked.write_flags & abi::WRITE_CACHE != 0,
                kill_suid: asked.write_flags & abi::WRITE_KILL_SUIDGID != 0,
            }
        }
        opcode::FLUSH => Operation::Flush { handle: body.take::<abi::FlushIn>()?.handle },
        opcode::RELEASE => Operation::Release { handle: body.take::<abi::ReleaseIn>()?.handle },
        opcode::RELEASEDIR => Operation::Releasedir { handle: body.take::<abi::ReleaseIn>()?.handle },
        opcode::FSYNC => {
            let asked = body.take::<abi::FsyncIn>()?;
            Operation::Fsync { handle: asked.handle, data_only: asked.flags & abi::FSYNC_DATA != 0 }
        }
        opcode::FSYNCDIR => Operation::Fsyncdir { handle: body.take::<abi::FsyncIn>()?.handle },
        opcode::OPENDIR => Operation::Opendir,
        opcode::READDIR | opcode::READDIRPLUS => {
            let asked = body.take::<abi::ReadIn>()?;
            let plus = head.opcode == opcode::READDIRPLUS;
            Operation::Readdir { handle: asked.handle, offset: asked.offset, size: length(asked.size)?, plus }
        }
        opcode::STATFS => Operation::Statfs,
        opcode::GETXATTR => {
            let size = length(body.take::<abi::XattrSize>()?.size)?;
            Operation::Getxattr { name: body.string()?, size }
        }
        opcode::SETXATTR => {
            let asked = body.take::<abi::SetxattrIn>()?;
            let name = body.string()?;
            let value = body.0.get(..length(asked.size)?).ok_or(Errno::IO)?;
            Operation::Setxattr { name, value: value.to_vec(), flags: asked.flags }
        }
        opcode::LISTXATTR => Operation::Listxattr { size: length(body.take::<abi::XattrSize>()?.size)? },
        opcode::REMOVEXATTR => Operation::Removexattr { name: body.string()? },
        opcode::FALLOCATE => {
            let asked = body.take::<abi::FallocateIn>()?;
            let (offset, length) = (position(asked.offset)?, position(asked.length)?);
            Operation::Fallocate { handle: asked.handle, offset, length, mode: asked.mode }
        }
        opcode::LSEEK => {
            let asked = body.take::<abi::LseekIn>()?;
            Operation::Lseek { handle: asked.handle, offset: asked.offset, whence: asked.whence }
        }
        opcode::INIT => Operation::Init,
        opcode::INTERRUPT => Operation::Interrupt { unique: body.take::<abi::InterruptIn>()?.unique },
        opcode::DESTROY => Operation::Destroy,
        opcode::NOTIFY_REPLY => Operation::Ignored,
        opcode::IOCTL => Operation::Unsupported(Errno::NOTTY),
        // Locks, access, bmap, poll, copies, syncfs, statx, tmpfile, and what is younger than this code: the kernel
        // does without, and does not ask again.
        _ => Operation::Unsupported(Errno::NOSYS),
    };
    Ok(operation)
}

/// Does the kernel take no answer to these?
pub(super) fn is_unanswered(number: u32) -> bool {
    matches!(number, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::NOTIFY_REPLY)
}

impl Operation {
    /// Can it be given up half-way without anybody noticing? Never what changes something once begun.
    pub(super) fn is_abandonable(&self) -> bool {
        match self {
            Self::Open { flags, .. } => flags & O_TRUNC == 0,
            Self::Lookup { .. }
            | Self::Getattr { .. }
            | Self::Readlink
            | Self::Read { .. }
            | Self::Opendir
            | Self::Readdir { .. }
            | Self::Statfs
            | Self::Getxattr { .. }
            | Self::Listxattr { .. }
            | Self::Lseek { .. } => true,
            _ => false,
        }
    }
}

/// open(2): the kernel passes its own flags on, and this one differs on no machine that is built for.
pub(super) const O_TRUNC: u32 = 0o1000;

/// What follows a request's head.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::IO)?;
        self.0 = rest;
        Ok(value)
    }

    /// Up to a NUL.
    fn string(&mut self) -> Result<OsString, Errno> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Errno::IO)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = rest.get(1..).unwrap_or_default();
        Ok(OsString::from_vec(text.to_vec()))
    }

    /// A name in a directory: nothing above this layer need fear a path in it.
    fn name(&mut self) -> Result<OsString, Errno> {
        let name = self.string()?;
        let refused = name.is_empty() || name == OsStr::new(".") || name == OsStr::new("..");
        if refused || name.as_bytes().contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }

    fn forgets(&mut self) -> Result<Vec<(Ino, u64)>, Errno> {
        let count = length(self.take::<abi::BatchForgetIn>()?.count)?;
        let most = self.0.len() / size_of::<abi::ForgetOne>();
        (0..count.min(most)).map(|_| self.take::<abi::ForgetOne>().map(|one| (one.node, one.count))).collect()
    }
}

fn length(size: u32) -> Result<usize, Errno> {
    usize::try_from(size).map_err(|_| Errno::INVAL)
}

/// Positions in files are signed in the kernel.
fn position(offset: u64) -> Result<u64, Errno> {
    if i64::try_from(offset).is_ok() { Ok(offset) } else { Err(Errno::INVAL) }
}

fn change(asked: &abi::SetattrIn) -> Result<SetAttr, Errno> {
    let has = |bit: u32| asked.valid & bit != 0;
    let time = |bit: u32, now: u32, seconds: u64, nanos: u32| -> Result<Option<Time>, Errno> {
        if has(now) {
            return Ok(Some(Time::Now));
        }
        if has(bit) { instant(seconds, nanos).map(|time| Some(Time::At(time))) } else { Ok(None) }
    };
    Ok(SetAttr {
        mode: has(valid::MODE).then_some(asked.mode),
        uid: has(valid::UID).then_some(asked.uid),
        gid: has(valid::GID).then_some(asked.gid),
        size: has(valid::SIZE).then(|| position(asked.size)).transpose()?,
        atime: time(valid::ATIME, valid::ATIME_NOW, asked.atime, asked.atime_nanos)?,
        mtime: time(valid::MTIME, valid::MTIME_NOW, asked.mtime, asked.mtime_nanos)?,
        ctime: has(valid::CTIME).then(|| instant(asked.ctime, asked.ctime_nanos)).transpose()?,
        handle: has(valid::HANDLE).then_some(asked.handle),
        // With HANDLE_KILLPRIV_V2 the bits go with the owner, and the kernel does not say so.
        kill_suid: has(valid::KILL_SUIDGID) || has(valid::UID) || has(valid::GID),
    })
}

/// Seconds are signed; nanoseconds always count forward.
fn instant(seconds: u64, nanos: u32) -> Result<SystemTime, Errno> {
    if nanos >= 1_000_000_000 {
        return Err(Errno::INVAL);
    }
    let seconds = seconds.cast_signed();
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time =
        if seconds < 0 { SystemTime::UNIX_EPOCH.checked_sub(whole) } else { SystemTime::UNIX_EPOCH.checked_add(whole) };
    time.and_then(|time| time.checked_add(Duration::from_nanos(nanos.into()))).ok_or(Errno::INVAL)
}
