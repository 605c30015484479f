//! Which method of the file system answers which operation.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;

use super::abi::{CreateOut, LseekOut, WriteOut};
use super::filesystem::{Caller, FileSystem, Handle, Ino, SetAttr};
use super::flight::Interrupt;
use super::reply::{self, Body, Listing};
use super::request::{Head, Operation};
use crate::host::Errno;

type Reply = Result<Body, Errno>;

/// An answer in the making. A box for each operation, so that a small one does not carry the largest one's state.
pub(super) type Answering = Pin<Box<dyn Future<Output = Reply> + Send>>;

/// How an operation is given up; `None`: it is not.
pub(super) type GivingUp = Option<(Arc<Interrupt>, Duration)>;

/// Begins an answer; nothing happens before it is polled. `data` is a WRITE's.
#[expect(clippy::too_many_lines, reason = "one arm for each operation")]
pub(super) fn begin<F: FileSystem>(
    filesystem: &Arc<F>,
    head: Head,
    operation: Operation,
    data: Bytes,
    giving_up: GivingUp,
) -> Answering {
    let fs = Arc::clone(filesystem);
    let Head { who, ino, .. } = head;
    match operation {
        Operation::Lookup { name } => {
            patient(
                giving_up,
                async move { fs.lookup(who, ino, &name).await.map(|entry| Body::of(&reply::entry(&entry))) },
            )
        }
        Operation::Getattr { handle } => patient(giving_up, async move {
            fs.getattr(who, ino, handle).await.map(|(attr, ttl)| Body::of(&reply::attr(&attr, ttl)))
        }),
        Operation::Setattr(change) => {
            guarded(
                async move { fs.setattr(who, ino, change).await.map(|(attr, ttl)| Body::of(&reply::attr(&attr, ttl))) },
            )
        }
        Operation::Readlink => {
            patient(giving_up, async move { fs.readlink(who, ino).await.map(|target| Body::Pieces(vec![target])) })
        }
        Operation::Symlink { name, target } => {
            guarded(
                async move { fs.symlink(who, ino, &name, &target).await.map(|entry| Body::of(&reply::entry(&entry))) },
            )
        }
        Operation::Mknod { name, mode, umask, rdev } => guarded(async move {
            fs.mknod(who, ino, &name, mode, umask, rdev).await.map(|entry| Body::of(&reply::entry(&entry)))
        }),
        Operation::Mkdir { name, mode, umask } => {
            guarded(
                async move { fs.mkdir(who, ino, &name, mode, umask).await.map(|entry| Body::of(&reply::entry(&entry))) },
            )
        }
        Operation::Unlink { name } => guarded(async move { empty(fs.unlink(who, ino, &name).await) }),
        Operation::Rmdir { name } => guarded(async move { empty(fs.rmdir(who, ino, &name).await) }),
        Operation::Rename { name, new_parent, new_name, flags } => {
            guarded(async move { empty(fs.rename(who, ino, &name, new_parent, &new_name, flags).await) })
        }
        Operation::Link { ino: old, name } => {
            guarded(async move { fs.link(who, old, ino, &name).await.map(|entry| Body::of(&reply::entry(&entry))) })
        }
        Operation::Open { flags, kill_suid } => patient(giving_up, async move {
            let kill = kill_suid && is_privileged(&*fs, who, ino, None).await?;
            let opened = fs.open(who, ino, flags).await?;
            if kill {
                drop_privileges(&*fs, who, ino, Some(opened.handle)).await?;
            }
            Ok(Body::of(&reply::opened(&opened)))
        }),
        Operation::Create { name, mode, umask, flags } => guarded(async move {
            let (entry, opened) = fs.create(who, ino, &name, mode, umask, flags).await?;
            Ok(Body::of(&CreateOut { entry: reply::entry(&entry), opened: reply::opened(&opened) }))
        }),
        Operation::Read { handle, offset, size } => patient(giving_up, async move {
            let pieces = fs.read(who, ino, handle, offset, size).await?;
            Ok(Body::pieces(pieces, usize::try_from(size).unwrap_or(usize::MAX)))
        }),
        Operation::Write { handle, offset, from_cache, kill_suid, .. } => guarded(async move {
            if kill_suid && is_privileged(&*fs, who, ino, Some(handle)).await? {
                drop_privileges(&*fs, who, ino, Some(handle)).await?;
            }
            let size = fs.write(who, ino, handle, offset, data, from_cache).await?;
            Ok(Body::of(&WriteOut { size, padding: 0 }))
        }),
        Operation::Flush { handle } => guarded(async move { empty(fs.flush(who, ino, handle).await) }),
        Operation::Release { handle } => guarded(async move {
            fs.release(ino, handle).await;
            Ok(Body::Empty)
        }),
        Operation::Fsync { handle, data_only } => {
            guarded(async move { empty(fs.fsync(who, ino, handle, data_only).await) })
        }
        Operation::Opendir => {
            patient(
                giving_up,
                async move { fs.opendir(who, ino).await.map(|opened| Body::of(&reply::opened(&opened))) },
            )
        }
        Operation::Readdir { handle, offset, size, plus } => {
            guarded(list(fs, who, ino, handle, offset, Listing::new(size, plus), giving_up))
        }
        Operation::Releasedir { handle } => guarded(async move {
            fs.releasedir(ino, handle).await;
            Ok(Body::Empty)
        }),
        Operation::Fsyncdir { handle } => guarded(async move { empty(fs.fsyncdir(who, ino, handle).await) }),
        Operation::Statfs => {
            patient(giving_up, async move { fs.statfs(who, ino).await.map(|stat| Body::of(&reply::statfs(&stat))) })
        }
        Operation::Getxattr { name, size } => {
            patient(giving_up, async move { reply::xattr(fs.getxattr(who, ino, &name).await?, size) })
        }
        Operation::Setxattr { name, value, flags } => {
            guarded(async move { empty(fs.setxattr(who, ino, &name, Bytes::from(value), flags).await) })
        }
        Operation::Listxattr { size } => {
            patient(
                giving_up,
                async move { reply::xattr(Bytes::from(reply::names(&fs.listxattr(who, ino).await?)), size) },
            )
        }
        Operation::Removexattr { name } => guarded(async move { empty(fs.removexattr(who, ino, &name).await) }),
        Operation::Fallocate { handle, offset, length, mode } => {
            guarded(async move { empty(fs.fallocate(who, ino, handle, offset, length, mode).await) })
        }
        Operation::Lseek { handle, offset, whence } => patient(giving_up, async move {
            fs.lseek(who, ino, handle, offset, whence).await.map(|offset| Body::of(&LseekOut { offset }))
        }),
        Operation::Unsupported(errno) => Box::pin(std::future::ready(Err(errno))),
        Operation::Destroy => Box::pin(std::future::ready(Ok(Body::Empty))),
        // The reader has dealt with these.
        Operation::Forget(_) | Operation::Init | Operation::Interrupt { .. } | Operation::Ignored => {
            Box::pin(std::future::ready(Err(Errno::IO)))
        }
    }
}

fn empty(answer: Result<(), Errno>) -> Reply {
    answer.map(|()| Body::Empty)
}

/// A handler that panics costs its caller an EIO and nobody else anything.
fn guarded(answer: impl Future<Output = Reply> + Send + 'static) -> Answering {
    Box::pin(async move {
        AssertUnwindSafe(answer).catch_unwind().await.unwrap_or_else(|_| {
            tracing::error!("a request made the file system panic, its answer is an input/output error");
            Err(Errno::IO)
        })
    })
}

/// As `guarded`, given up with EINTR when interrupted for long.
fn patient(giving_up: GivingUp, answer: impl Future<Output = Reply> + Send + 'static) -> Answering {
    let Some((interrupt, patience)) = giving_up else { return guarded(answer) };
    guarded(async move {
        tokio::select! {
            biased;
            answer = answer => answer,
            () = interrupt.outlasted(patience) => Err(Errno::INTR),
        }
    })
}

/// What an interrupted listing has is sent: its entries count as looked up already.
async fn list<F: FileSystem>(
    fs: Arc<F>,
    who: Caller,
    ino: Ino,
    handle: Handle,
    offset: u64,
    mut listing: Listing,
    giving_up: GivingUp,
) -> Reply {
    let result = match giving_up {
        None => fs.readdir(who, ino, handle, offset, &mut listing).await,
        Some((interrupt, patience)) => tokio::select! {
            biased;
            result = fs.readdir(who, ino, handle, offset, &mut listing) => result,
            () = interrupt.outlasted(patience) => Err(Errno::INTR),
        },
    };
    match result {
        Err(errno) if listing.is_empty() => Err(errno),
        _ => Ok(listing.into_body()),
    }
}

const SUID: u32 = 0o4000;
const SGID_AND_GROUP_EXECUTE: u32 = 0o2010;

/// Does a write by somebody without privileges change the file's mode? The kernel leaves it to us (HANDLE_KILLPRIV_V2),
/// and asks with every write: almost always there is nothing to do.
async fn is_privileged<F: FileSystem>(fs: &F, who: Caller, ino: Ino, handle: Option<Handle>) -> Result<bool, Errno> {
    let (attr, _) = fs.getattr(who, ino, handle).await?;
    Ok(attr.mode & SUID != 0 || attr.mode & SGID_AND_GROUP_EXECUTE == SGID_AND_GROUP_EXECUTE)
}

async fn drop_privileges<F: FileSystem>(fs: &F, who: Caller, ino: Ino, handle: Option<Handle>) -> Result<(), Errno> {
    let change = SetAttr { handle, kill_suid: true, ..SetAttr::default() };
    fs.setattr(who, ino, change).await.map(drop)
}
