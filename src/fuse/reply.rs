//! Answers into bytes. Touches no descriptor.

use std::ffi::OsString;
use std::io::IoSlice;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use zerocopy::{Immutable, IntoBytes};

use super::abi;
use super::filesystem::{Attr, DirEntry, DirSink, Entry, Opened, StatFs};
use crate::host::Errno;

/// What follows the head of an answer.
#[derive(Debug)]
pub(super) enum Body {
    /// Nothing.
    Empty,
    /// A structure, or several.
    Whole(Vec<u8>),
    /// A file's bytes, where they lie.
    Pieces(Vec<Bytes>),
}

/// As many pieces as one writev(2) takes, less the head.
const MOST_PIECES: usize = 1023;

/// The largest errno that the kernel lets through.
const LARGEST_ERROR: i32 = 511;

impl Body {
    /// One structure.
    pub(super) fn of<T: IntoBytes + Immutable>(value: &T) -> Self {
        Self::Whole(value.as_bytes().to_vec())
    }

    /// No more than `size` bytes, in no more pieces than a system call takes.
    pub(super) fn pieces(mut pieces: Vec<Bytes>, size: usize) -> Self {
        let mut left = size;
        for piece in &mut pieces {
            piece.truncate(left);
            left -= piece.len();
        }
        pieces.retain(|piece| !piece.is_empty());
        if pieces.len() > MOST_PIECES {
            return Self::Whole(pieces.concat());
        }
        Self::Pieces(pieces)
    }
}

/// Writes an answer in one piece, as the kernel wants it.
pub(super) fn write<T>(unique: u64, answer: &Result<Body, Errno>, write: impl FnOnce(&[IoSlice<'_>]) -> T) -> T {
    let length = |bytes: usize| u32::try_from(bytes + size_of::<abi::OutHeader>()).unwrap_or(u32::MAX);
    let error = |errno: Errno| {
        let number = errno.raw_os_error();
        if (1..=LARGEST_ERROR).contains(&number) { -number } else { -Errno::IO.raw_os_error() }
    };
    match answer {
        Err(errno) => {
            let head = abi::OutHeader { len: length(0), error: error(*errno), unique };
            write(&[IoSlice::new(head.as_bytes())])
        }
        Ok(Body::Empty) => {
            let head = abi::OutHeader { len: length(0), error: 0, unique };
            write(&[IoSlice::new(head.as_bytes())])
        }
        Ok(Body::Whole(bytes)) => {
            let head = abi::OutHeader { len: length(bytes.len()), error: 0, unique };
            write(&[IoSlice::new(head.as_bytes()), IoSlice::new(bytes)])
        }
        Ok(Body::Pieces(pieces)) => {
            let head = abi::OutHeader { len: length(pieces.iter().map(Bytes::len).sum()), error: 0, unique };
            let mut slices = Vec::with_capacity(pieces.len() + 1);
            slices.push(IoSlice::new(head.as_bytes()));
            slices.extend(pieces.iter().map(|piece| IoSlice::new(piece)));
            write(&slices)
        }
    }
}

/// An inode's attributes.
pub(super) fn attributes(attr: &Attr) -> abi::Attr {
    let (atime, atime_nanos) = split(attr.atime);
    let (mtime, mtime_nanos) = split(attr.mtime);
    let (ctime, ctime_nanos) = split(attr.ctime);
    abi::Attr {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime,
        mtime,
        ctime,
        atime_nanos,
        mtime_nanos,
        ctime_nanos,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        block_size: 4096,
        flags: 0,
    }
}

/// Seconds, signed, and the nanoseconds after them.
fn split(time: SystemTime) -> (u64, u32) {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => (after.as_secs(), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let seconds = 0_i64.saturating_sub_unsigned(before.as_secs());
            match before.subsec_nanos() {
                0 => (seconds.cast_unsigned(), 0),
                nanos => (seconds.saturating_sub(1).cast_unsigned(), 1_000_000_000 - nanos),
            }
        }
    }
}

/// A name's inode.
pub(super) fn entry(entry: &Entry) -> abi::EntryOut {
    abi::EntryOut {
        node: entry.attr.ino,
        generation: 0,
        name_valid: entry.name_ttl.as_secs(),
        attr_valid: entry.attr_ttl.as_secs(),
        name_valid_nanos: entry.name_ttl.subsec_nanos(),
        attr_valid_nanos: entry.attr_ttl.subsec_nanos(),
        attr: attributes(&entry.attr),
    }
}

/// Attributes alone.
pub(super) fn attr(attr: &Attr, ttl: Duration) -> abi::AttrOut {
    abi::AttrOut { valid: ttl.as_secs(), valid_nanos: ttl.subsec_nanos(), padding: 0, attr: attributes(attr) }
}

/// What open returned.
pub(super) fn opened(opened: &Opened) -> abi::OpenOut {
    let flag = |set: bool, bit: u32| if set { bit } else { 0 };
    let open_flags = flag(opened.direct_io, abi::opened::DIRECT_IO)
        | flag(opened.keep_cache, abi::opened::KEEP_CACHE)
        | flag(opened.cache_dir, abi::opened::CACHE_DIR)
        | flag(opened.stream, abi::opened::STREAM | abi::opened::NONSEEKABLE);
    abi::OpenOut { handle: opened.handle, open_flags, backing: 0 }
}

/// How full the file system is.
pub(super) fn statfs(stat: &StatFs) -> abi::StatfsOut {
    abi::StatfsOut {
        blocks: stat.blocks,
        free: stat.free,
        available: stat.free,
        files: stat.files,
        files_free: stat.files_free,
        block_size: stat.block_size,
        name_max: stat.name_max,
        fragment_size: stat.block_size,
        ..abi::StatfsOut::default()
    }
}

/// A value, or its size when that is what was asked for (`size` 0).
///
/// # Errors
/// ERANGE: it is larger than the program's buffer.
pub(super) fn xattr(value: Bytes, size: usize) -> Result<Body, Errno> {
    if size == 0 {
        let size = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
        return Ok(Body::of(&abi::XattrSize { size, padding: 0 }));
    }
    if value.len() > size { Err(Errno::RANGE) } else { Ok(Body::Pieces(vec![value])) }
}

/// Names, each with its NUL.
pub(super) fn names(names: &[OsString]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for name in names {
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
    }
    bytes
}

/// The answer to READDIR and READDIRPLUS, as it grows.
#[derive(Debug)]
pub(super) struct Listing {
    bytes: Vec<u8>,
    size: usize,
    plus: bool,
}

impl Listing {
    /// Up to `size` bytes.
    pub(super) fn new(size: usize, plus: bool) -> Self {
        Self { bytes: Vec::new(), size, plus }
    }

    /// Is nothing in it?
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The answer.
    pub(super) fn into_body(self) -> Body {
        Body::Whole(self.bytes)
    }
}

impl DirSink for Listing {
    fn plus(&self) -> bool {
        self.plus
    }

    fn push(&mut self, entry_of: &DirEntry) -> bool {
        let name = entry_of.name.as_bytes();
        let head = if self.plus { size_of::<abi::EntryOut>() } else { 0 } + size_of::<abi::Dirent>();
        let length = (head + name.len()).next_multiple_of(8);
        let Ok(name_len) = u32::try_from(name.len()) else { return false };
        if self.bytes.len() + length > self.size {
            return false;
        }
        if self.plus {
            // These two are never looked up, and so never forgotten.
            let known = entry_of.entry.as_ref().filter(|_| name != b"." && name != b"..");
            let known = known.filter(|known| known.attr.ino != 0).map(entry).unwrap_or_default();
            self.bytes.extend_from_slice(known.as_bytes());
        }
        let kind = (entry_of.kind & 0o170_000) >> 12;
        let dirent = abi::Dirent { ino: entry_of.ino, next: entry_of.next, name_len, kind };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        true
    }
}
