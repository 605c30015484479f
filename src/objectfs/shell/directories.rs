//! Requests about names and directories.

use std::ffi::OsStr;
use std::time::Duration;

use super::super::attributes::S_IFDIR;
use super::super::namespace::{Listing, NAME_MAX, ROOT};
use super::ObjectFs;
use crate::fuse::filesystem::{Answer, Attr, Caller, DirEntry, DirSink, Entry, Handle, Ino, Opened};
use crate::host::Errno;

/// So many entries get their attributes together.
const BATCH: usize = 256;
/// Offsets of `.` and `..`.
const DOTS: u64 = 2;

impl ObjectFs {
    pub(super) async fn look_up(&self, who: Caller, parent: Ino, name: &str) -> Answer<Entry> {
        if name.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        if !self.names.may_exist(parent, name) {
            return Err(Errno::NOENT);
        }
        match self.names.look_up(parent, name, who.pid).await? {
            Some(ino) => self.names.entry(ino, true),
            None => Ok(absent(self.names.absent_ttl(parent, name))),
        }
    }

    pub(super) fn open_directory(&self, ino: Ino) -> Answer<Opened> {
        let mut tree = self.names.tree();
        if tree.directory(ino).is_none() {
            return Err(if tree.node(ino).is_some() { Errno::NOTDIR } else { Errno::STALE });
        }
        tree.pin(ino);
        Ok(Opened { handle: self.handles.add_directory(None, ino), ..Opened::default() })
    }

    pub(super) async fn read_directory(
        &self,
        ino: Ino,
        handle: Handle,
        offset: u64,
        sink: &mut dyn DirSink,
    ) -> Answer<()> {
        let open = self.handles.directory(handle)?;
        let mut listing = open.listing.lock().await;
        if offset == 0 {
            // Opened or rewound: from here on it is seen as it is now.
            *listing = Listing::default();
            self.names.fill(ino, &mut listing, 0).await?;
        }
        let parent = self.names.tree().node(ino).and_then(|node| node.place.as_ref().map(|(parent, _)| *parent));
        for (at, name, number) in [(0, ".", ino), (1, "..", parent.unwrap_or(ROOT))] {
            if offset <= at && !sink.push(&dot(name, number, at + 1)) {
                return Ok(());
            }
        }
        let mut position = usize::try_from(offset.saturating_sub(DOTS)).map_err(|_| Errno::INVAL)?;
        loop {
            self.names.fill(ino, &mut listing, position).await?;
            let names: Vec<String> =
                (position..).map_while(|at| listing.name(at).map(str::to_owned)).take(BATCH).collect();
            if names.is_empty() {
                return Ok(());
            }
            if sink.plus() {
                self.names.look_ahead(ino);
                self.names.find_many(ino, &names).await;
            }
            for name in &names {
                position += 1;
                if !self.push(ino, name, position as u64 + DOTS, sink) {
                    return Ok(());
                }
            }
        }
    }

    /// `false`: the reply is full.
    fn push(&self, parent: Ino, name: &str, next: u64, sink: &mut dyn DirSink) -> bool {
        let kind = self.names.kind_of(parent, name);
        let node = if sink.plus() { self.names.known(parent, name) } else { None };
        let entry = node.and_then(|ino| self.names.entry(ino, false).ok());
        let ino = match &entry {
            Some(entry) => entry.attr.ino,
            None => self.names.tree().number(parent, name),
        };
        let pushed = sink.push(&DirEntry { name: name.into(), ino, kind, next, entry });
        if let Some(ino) = node {
            self.names.shown_to_kernel(ino, pushed);
        }
        pushed
    }
}

fn dot(name: &str, ino: Ino, next: u64) -> DirEntry {
    DirEntry { name: OsStr::new(name).to_owned(), ino, kind: S_IFDIR, next, entry: None }
}

/// There is no such name, for so long.
fn absent(ttl: Duration) -> Entry {
    let never = std::time::SystemTime::UNIX_EPOCH;
    let attr = Attr {
        ino: 0,
        size: 0,
        blocks: 0,
        atime: never,
        mtime: never,
        ctime: never,
        mode: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
    };
    Entry { attr, attr_ttl: ttl, name_ttl: ttl }
}
