//! A file system in memory behind our own FUSE layer, with files that wait and panic.
#![allow(unreachable_pub, reason = "as in common")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use berth::fuse::FileSystem;
use berth::fuse::filesystem::{
    Answer, Attr, Caller, DirEntry, DirSink, Entry, Handle, Ino, Notify, Opened, SetAttr, StatFs, Time,
};
use berth::host::Errno;
use bytes::Bytes;
use tokio::sync::watch;

#[derive(Clone)]
struct Node {
    attr: Attr,
    data: Vec<u8>,
    target: Vec<u8>,
    children: BTreeMap<OsString, Ino>,
    xattrs: BTreeMap<OsString, Bytes>,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<Ino, Node>,
    next: Ino,
    references: HashMap<Ino, u64>,
}

/// Names decide how a file behaves: `slow…` waits for the gate, `slow direct…` without the page cache, `panic…` panics.
pub struct Memory {
    state: Mutex<State>,
    pub ttl: Duration,
    pub gate: watch::Sender<bool>,
    /// Requests that wait at the gate now.
    pub waiting: AtomicUsize,
    /// Writes that were begun, and those that were finished.
    pub begun: AtomicUsize,
    pub finished: AtomicUsize,
    pub resent: AtomicUsize,
    pub started: AtomicUsize,
    pub ended: AtomicBool,
    /// More references were given back than were given.
    pub overdrawn: AtomicUsize,
    pub kernel: Mutex<Option<Arc<dyn Notify>>>,
}

struct Count<'a>(&'a AtomicUsize);

impl<'a> Count<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Memory {
    pub fn new(ttl: Duration) -> Self {
        let mut state = State { next: 2, ..State::default() };
        state.nodes.insert(1, Node::new(1, libc::S_IFDIR | 0o777, Caller::default()));
        Self {
            state: Mutex::new(state),
            ttl,
            gate: watch::Sender::new(false),
            waiting: AtomicUsize::new(0),
            begun: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            resent: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            overdrawn: AtomicUsize::new(0),
            kernel: Mutex::new(None),
        }
    }

    /// Behind the kernel's back.
    pub fn put(&self, name: &str, data: &[u8]) -> Ino {
        let mut state = self.state.lock().unwrap();
        let entry = state.make(1, OsStr::new(name), libc::S_IFREG | 0o644, Caller::default(), Duration::ZERO).unwrap();
        state.references.clear();
        let node = state.nodes.get_mut(&entry.attr.ino).unwrap();
        node.set(data.to_vec());
        entry.attr.ino
    }

    /// Behind the kernel's back.
    pub fn take_away(&self, name: &str) {
        self.state.lock().unwrap().nodes.get_mut(&1).unwrap().children.remove(OsStr::new(name));
    }

    fn note(&self, who: Caller) {
        if who.resent {
            self.resent.fetch_add(1, Ordering::SeqCst);
        }
    }

    async fn behave(&self, ino: Ino) {
        let name = self.state.lock().unwrap().name(ino);
        assert!(!name.starts_with("panic"), "as the test wants it");
        if name.starts_with("slow") {
            let _waiting = Count::new(&self.waiting);
            let mut gate = self.gate.subscribe();
            gate.wait_for(|open| *open).await.unwrap();
        }
    }
}

impl Node {
    fn new(ino: Ino, mode: u32, who: Caller) -> Self {
        let now = SystemTime::now();
        let (uid, gid) = (who.uid, who.gid);
        let attr =
            Attr { ino, size: 0, blocks: 0, atime: now, mtime: now, ctime: now, mode, nlink: 1, uid, gid, rdev: 0 };
        Self { attr, data: Vec::new(), target: Vec::new(), children: BTreeMap::new(), xattrs: BTreeMap::new() }
    }

    fn set(&mut self, data: Vec<u8>) {
        self.data = data;
        self.attr.size = self.data.len() as u64;
        self.attr.mtime = SystemTime::now();
    }
}

impl State {
    /// Of a file in the root.
    fn name(&self, ino: Ino) -> String {
        let found = self.nodes[&1].children.iter().find(|(_, child)| **child == ino);
        found.map(|(name, _)| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn node(&mut self, ino: Ino) -> Answer<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(Errno::STALE)
    }

    fn entry(&mut self, ino: Ino, ttl: Duration) -> Answer<Entry> {
        let attr = self.node(ino)?.attr.clone();
        *self.references.entry(ino).or_default() += 1;
        Ok(Entry { attr, attr_ttl: ttl, name_ttl: ttl })
    }

    fn make(&mut self, parent: Ino, name: &OsStr, mode: u32, who: Caller, ttl: Duration) -> Answer<Entry> {
        let ino = self.next;
        if self.node(parent)?.children.contains_key(name) {
            return Err(Errno::EXIST);
        }
        self.next += 1;
        self.node(parent)?.children.insert(name.to_owned(), ino);
        self.nodes.insert(ino, Node::new(ino, mode, who));
        self.entry(ino, ttl)
    }

    fn child(&mut self, parent: Ino, name: &OsStr) -> Answer<Ino> {
        self.node(parent)?.children.get(name).copied().ok_or(Errno::NOENT)
    }
}

impl FileSystem for Memory {
    async fn lookup(&self, who: Caller, parent: Ino, name: &OsStr) -> Answer<Entry> {
        self.note(who);
        let mut state = self.state.lock().unwrap();
        let ino = state.child(parent, name)?;
        state.entry(ino, self.ttl)
    }

    fn forget(&self, ino: Ino, count: u64) {
        let mut state = self.state.lock().unwrap();
        let known = state.references.entry(ino).or_default();
        if *known < count {
            self.overdrawn.fetch_add(1, Ordering::SeqCst);
        }
        *known = known.saturating_sub(count);
    }

    async fn getattr(&self, who: Caller, ino: Ino, _: Option<Handle>) -> Answer<(Attr, Duration)> {
        self.note(who);
        Ok((self.state.lock().unwrap().node(ino)?.attr.clone(), self.ttl))
    }

    async fn setattr(&self, _: Caller, ino: Ino, change: SetAttr) -> Answer<(Attr, Duration)> {
        let mut state = self.state.lock().unwrap();
        let node = state.node(ino)?;
        if let Some(size) = change.size {
            let mut data = std::mem::take(&mut node.data);
            data.resize(usize::try_from(size).unwrap(), 0);
            node.set(data);
        }
        let time = |time| match time {
            Time::At(time) => time,
            Time::Now => SystemTime::now(),
        };
        let attr = &mut node.attr;
        attr.mode = change.mode.map_or(attr.mode, |mode| attr.mode & libc::S_IFMT | mode & 0o7777);
        attr.uid = change.uid.unwrap_or(attr.uid);
        attr.gid = change.gid.unwrap_or(attr.gid);
        attr.atime = change.atime.map_or(attr.atime, time);
        attr.mtime = change.mtime.map_or(attr.mtime, time);
        if change.kill_suid && attr.mode & libc::S_IFMT == libc::S_IFREG {
            attr.mode &= !0o4000;
            if attr.mode & 0o010 != 0 {
                attr.mode &= !0o2000;
            }
        }
        Ok((attr.clone(), self.ttl))
    }

    async fn readlink(&self, _: Caller, ino: Ino) -> Answer<Bytes> {
        Ok(Bytes::copy_from_slice(&self.state.lock().unwrap().node(ino)?.target))
    }

    async fn mknod(&self, who: Caller, parent: Ino, name: &OsStr, mode: u32, umask: u32, rdev: u32) -> Answer<Entry> {
        let mut state = self.state.lock().unwrap();
        let mut entry = state.make(parent, name, mode & !umask, who, self.ttl)?;
        entry.attr.rdev = rdev;
        state.node(entry.attr.ino)?.attr.rdev = rdev;
        Ok(entry)
    }

    async fn mkdir(&self, who: Caller, parent: Ino, name: &OsStr, mode: u32, umask: u32) -> Answer<Entry> {
        self.state.lock().unwrap().make(parent, name, libc::S_IFDIR | mode & !umask, who, self.ttl)
    }

    async fn unlink(&self, _: Caller, parent: Ino, name: &OsStr) -> Answer<()> {
        let mut state = self.state.lock().unwrap();
        state.child(parent, name)?;
        state.node(parent)?.children.remove(name);
        Ok(())
    }

    async fn rmdir(&self, _: Caller, parent: Ino, name: &OsStr) -> Answer<()> {
        let mut state = self.state.lock().unwrap();
        let ino = state.child(parent, name)?;
        if !state.node(ino)?.children.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        state.node(parent)?.children.remove(name);
        Ok(())
    }

    async fn symlink(&self, who: Caller, parent: Ino, name: &OsStr, target: &OsStr) -> Answer<Entry> {
        let mut state = self.state.lock().unwrap();
        let entry = state.make(parent, name, libc::S_IFLNK | 0o777, who, self.ttl)?;
        state.node(entry.attr.ino)?.target = target.as_encoded_bytes().to_vec();
        Ok(entry)
    }

    async fn rename(
        &self,
        _: Caller,
        parent: Ino,
        name: &OsStr,
        new_parent: Ino,
        new_name: &OsStr,
        flags: u32,
    ) -> Answer<()> {
        let mut state = self.state.lock().unwrap();
        let ino = state.child(parent, name)?;
        let other = state.child(new_parent, new_name);
        state.node(parent)?.children.remove(name);
        state.node(new_parent)?.children.insert(new_name.to_owned(), ino);
        if flags & libc::RENAME_EXCHANGE != 0 {
            state.node(parent)?.children.insert(name.to_owned(), other?);
        }
        Ok(())
    }

    async fn open(&self, _: Caller, ino: Ino, flags: u32) -> Answer<Opened> {
        let mut state = self.state.lock().unwrap();
        if flags & libc::O_TRUNC.cast_unsigned() != 0 {
            state.node(ino)?.set(Vec::new());
        }
        let direct_io = state.name(ino).starts_with("slow direct");
        Ok(Opened { handle: ino, direct_io, ..Opened::default() })
    }

    async fn create(
        &self,
        who: Caller,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: u32,
    ) -> Answer<(Entry, Opened)> {
        let mut state = self.state.lock().unwrap();
        let entry = state.make(parent, name, libc::S_IFREG | mode & 0o7777 & !umask, who, self.ttl)?;
        let handle = entry.attr.ino;
        Ok((entry, Opened { handle, ..Opened::default() }))
    }

    async fn read(&self, who: Caller, ino: Ino, _: Handle, offset: u64, size: u32) -> Answer<Vec<Bytes>> {
        self.note(who);
        self.behave(ino).await;
        let mut state = self.state.lock().unwrap();
        let data = &state.node(ino)?.data;
        let from = usize::try_from(offset).unwrap().min(data.len());
        let to = (from + size as usize).min(data.len());
        // In pieces, as a file system out of blocks would.
        Ok(data[from..to].chunks(100_000).map(Bytes::copy_from_slice).collect())
    }

    async fn write(&self, who: Caller, ino: Ino, _: Handle, offset: u64, data: Bytes, _: bool) -> Answer<u32> {
        self.note(who);
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.behave(ino).await;
        let mut state = self.state.lock().unwrap();
        let node = state.node(ino)?;
        let from = usize::try_from(offset).unwrap();
        let mut whole = std::mem::take(&mut node.data);
        whole.resize(whole.len().max(from + data.len()), 0);
        whole[from..from + data.len()].copy_from_slice(&data);
        node.set(whole);
        self.finished.fetch_add(1, Ordering::SeqCst);
        Ok(u32::try_from(data.len()).unwrap())
    }

    async fn flush(&self, _: Caller, _: Ino, _: Handle) -> Answer<()> {
        Ok(())
    }

    async fn release(&self, _: Ino, _: Handle) {}

    async fn fsync(&self, _: Caller, _: Ino, _: Handle, _: bool) -> Answer<()> {
        Ok(())
    }

    async fn opendir(&self, _: Caller, ino: Ino) -> Answer<Opened> {
        Ok(Opened { handle: ino, ..Opened::default() })
    }

    async fn readdir(&self, _: Caller, ino: Ino, _: Handle, offset: u64, sink: &mut dyn DirSink) -> Answer<()> {
        let mut state = self.state.lock().unwrap();
        let mut list: Vec<(OsString, Ino)> = vec![(".".into(), ino), ("..".into(), 1)];
        list.extend(state.node(ino)?.children.clone());
        for (at, (name, ino)) in list.into_iter().enumerate().skip(usize::try_from(offset).unwrap()) {
            let attr = state.node(ino)?.attr.clone();
            let kind = attr.mode & libc::S_IFMT;
            let entry = sink.plus().then_some(Entry { attr, attr_ttl: self.ttl, name_ttl: self.ttl });
            let dots = name == "." || name == "..";
            if !sink.push(&DirEntry { name, ino, kind, next: at as u64 + 1, entry }) {
                break;
            }
            if sink.plus() && !dots {
                *state.references.entry(ino).or_default() += 1;
            }
        }
        Ok(())
    }

    async fn releasedir(&self, _: Ino, _: Handle) {}

    async fn statfs(&self, _: Caller, _: Ino) -> Answer<StatFs> {
        Ok(StatFs { block_size: 4096, blocks: 1000, free: 600, files: 50, files_free: 20, name_max: 255 })
    }

    async fn getxattr(&self, _: Caller, ino: Ino, name: &OsStr) -> Answer<Bytes> {
        self.state.lock().unwrap().node(ino)?.xattrs.get(name).cloned().ok_or(Errno::NODATA)
    }

    async fn setxattr(&self, _: Caller, ino: Ino, name: &OsStr, value: Bytes, flags: u32) -> Answer<()> {
        let mut state = self.state.lock().unwrap();
        let xattrs = &mut state.node(ino)?.xattrs;
        if flags & libc::XATTR_CREATE.cast_unsigned() != 0 && xattrs.contains_key(name) {
            return Err(Errno::EXIST);
        }
        xattrs.insert(name.to_owned(), value);
        Ok(())
    }

    async fn listxattr(&self, _: Caller, ino: Ino) -> Answer<Vec<OsString>> {
        Ok(self.state.lock().unwrap().node(ino)?.xattrs.keys().cloned().collect())
    }

    async fn removexattr(&self, _: Caller, ino: Ino, name: &OsStr) -> Answer<()> {
        self.state.lock().unwrap().node(ino)?.xattrs.remove(name).map(drop).ok_or(Errno::NODATA)
    }

    async fn fallocate(&self, _: Caller, ino: Ino, _: Handle, offset: u64, length: u64, mode: u32) -> Answer<()> {
        let mut state = self.state.lock().unwrap();
        let node = state.node(ino)?;
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
        let mut data = std::mem::take(&mut node.data);
        if mode & libc::FALLOC_FL_PUNCH_HOLE.cast_unsigned() != 0 {
            let to = to.min(data.len());
            data[from.min(to)..to].fill(0);
        } else {
            data.resize(data.len().max(to), 0);
        }
        node.set(data);
        Ok(())
    }

    async fn lseek(&self, _: Caller, ino: Ino, _: Handle, offset: u64, whence: u32) -> Answer<u64> {
        let size = self.state.lock().unwrap().node(ino)?.attr.size;
        match whence.cast_signed() {
            _ if offset >= size => Err(Errno::NXIO),
            libc::SEEK_DATA => Ok(offset),
            libc::SEEK_HOLE => Ok(size),
            _ => Err(Errno::INVAL),
        }
    }

    fn started(&self, kernel: Arc<dyn Notify>) {
        self.started.fetch_add(1, Ordering::SeqCst);
        *self.kernel.lock().unwrap() = Some(kernel);
    }

    async fn ended(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }
}
