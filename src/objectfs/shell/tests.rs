//! The file system over a bucket in memory, asked as the kernel asks, without FUSE.

mod conflicts;
mod crashes;
mod model;
mod names;
mod trips;

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use bytes::Bytes;

use super::super::settings::{Checksums, Consistency, Endpoint, Settings};
use super::super::store::double::Double;
use super::ObjectFs;
use crate::fuse::filesystem::{Answer, Attr, Caller, DirEntry, DirSink, FileSystem, Handle, Ino, SetAttr};
use crate::host::Errno;

pub(super) const WHO: Caller = Caller { uid: 1000, gid: 1000, pid: 7, unique: 0, resent: false };
pub(super) const O_RDWR: u32 = 2;
pub(super) const O_EXCL: u32 = 0o200;
pub(super) const O_TRUNC: u32 = 0o1000;

/// A mount of a bucket in memory: one node's.
pub(super) struct Mount {
    pub(super) fs: Arc<ObjectFs>,
    pub(super) double: Arc<Double>,
    pub(super) settings: Settings,
    pub(super) staging: Arc<tempfile::TempDir>,
}

pub(super) fn settings(staging: &tempfile::TempDir, consistency: Consistency) -> Settings {
    Settings {
        id: "test".to_owned(),
        endpoint: Endpoint {
            url: None,
            region: "us-east-1".to_owned(),
            path_style: true,
            ca: None,
            checksums: Checksums::WhenSupported,
            anonymous: false,
            patience: 1000,
            stall: 1000,
        },
        credentials: None,
        bucket: "b".to_owned(),
        prefix: "p/".to_owned(),
        read_only: false,
        consistency,
        uid: 7,
        gid: 8,
        file_mode: 0o640,
        dir_mode: 0o750,
        // What was asked holds for as long as a test takes.
        max_age: 600_000,
        staging: staging.path().join("staging"),
        cache: None,
        cache_size: 0,
        memory: 32 << 20,
        limit: None,
    }
}

pub(super) struct Sink {
    pub(super) plus: bool,
    pub(super) room: usize,
    pub(super) entries: Vec<DirEntry>,
}

impl DirSink for Sink {
    fn plus(&self) -> bool {
        self.plus
    }

    fn push(&mut self, entry: &DirEntry) -> bool {
        if self.entries.len() == self.room {
            return false;
        }
        self.entries.push(entry.clone());
        true
    }
}

impl Mount {
    pub(super) async fn new() -> Self {
        Self::over(&Double::new(), |_| ()).await
    }

    /// Another node.
    pub(super) async fn over(double: &Arc<Double>, change: impl FnOnce(&mut Settings)) -> Self {
        let staging = Arc::new(tempfile::tempdir().unwrap());
        let mut settings = settings(&staging, Consistency::Strict);
        change(&mut settings);
        let fs = ObjectFs::open(settings.clone(), double.clone()).await.unwrap();
        double.forget_calls();
        Self { fs, double: double.clone(), settings, staging }
    }

    /// A node that looks at everything again each time.
    pub(super) async fn doubting(double: &Arc<Double>) -> Self {
        Self::over(double, |settings| settings.max_age = 0).await
    }

    /// What the disk of a node has whose worker dies now: the next worker's.
    pub(super) fn left_behind(&self) -> Settings {
        let copy = tempfile::tempdir_in(self.staging.path()).unwrap().keep();
        copy_folder(&self.settings.staging, &copy);
        Settings { staging: copy, ..self.settings.clone() }
    }

    pub(super) async fn look(&self, path: &str) -> Answer<Attr> {
        let mut at = self.fs.getattr(WHO, 1, None).await?.0;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let entry = self.fs.lookup(WHO, at.ino, OsStr::new(name)).await?;
            if entry.attr.ino == 0 {
                return Err(Errno::NOENT);
            }
            at = entry.attr;
        }
        Ok(at)
    }

    pub(super) async fn parent<'a>(&self, path: &'a str) -> Answer<(Ino, &'a OsStr)> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.look(folder).await?.ino, OsStr::new(name)))
    }

    /// open(path, O_RDWR | O_CREAT | flags), as the kernel asks for it.
    pub(super) async fn open(&self, path: &str, flags: u32) -> Answer<(Ino, Handle)> {
        let (parent, name) = self.parent(path).await?;
        let entry = self.fs.lookup(WHO, parent, name).await?;
        if entry.attr.ino != 0 && flags & O_EXCL != 0 {
            return Err(Errno::EXIST);
        }
        if entry.attr.ino != 0 {
            return self.open_there(path, O_RDWR | flags).await;
        }
        let (entry, opened) = self.fs.create(WHO, parent, name, 0o666, 0o022, O_RDWR | flags).await?;
        Ok((entry.attr.ino, opened.handle))
    }

    /// open(path, flags) of what is there: as the kernel does, looks again and tries once more after ESTALE.
    pub(super) async fn open_there(&self, path: &str, flags: u32) -> Answer<(Ino, Handle)> {
        let ino = self.look(path).await?.ino;
        match self.fs.open(WHO, ino, flags).await {
            Err(Errno::STALE) => {
                let ino = self.look(path).await?.ino;
                Ok((ino, self.fs.open(WHO, ino, flags).await?.handle))
            }
            opened => Ok((ino, opened?.handle)),
        }
    }

    pub(super) async fn put(&self, (ino, handle): (Ino, Handle), offset: u64, bytes: &[u8]) -> Answer<()> {
        self.fs.write(WHO, ino, handle, offset, Bytes::copy_from_slice(bytes), false).await.map(|_| ())
    }

    pub(super) async fn close(&self, (ino, handle): (Ino, Handle)) -> Answer<()> {
        let closed = self.fs.flush(WHO, ino, handle).await;
        self.fs.release(ino, handle).await;
        closed
    }

    /// `echo -n text > path`
    pub(super) async fn save(&self, path: &str, text: &[u8]) -> Answer<()> {
        let open = self.open(path, O_TRUNC).await?;
        let written = if text.is_empty() { Ok(()) } else { self.put(open, 0, text).await };
        self.close(open).await.and(written)
    }

    pub(super) async fn contents(&self, (ino, handle): (Ino, Handle)) -> Answer<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let pieces = self.fs.read(WHO, ino, handle, all.len() as u64, 65_536).await?;
            let before = all.len();
            pieces.iter().for_each(|piece| all.extend_from_slice(piece));
            if all.len() < before + 65_536 {
                return Ok(all);
            }
        }
    }

    /// `cat path`
    pub(super) async fn load(&self, path: &str) -> Answer<Vec<u8>> {
        let open = self.open_there(path, 0).await?;
        let read = self.contents(open).await;
        self.close(open).await?;
        read
    }

    pub(super) async fn mkdir(&self, path: &str) -> Answer<()> {
        let (parent, name) = self.parent(path).await?;
        self.fs.mkdir(WHO, parent, name, 0o777, 0o022).await.map(|_| ())
    }

    pub(super) async fn unlink(&self, path: &str) -> Answer<()> {
        let (parent, name) = self.parent(path).await?;
        self.fs.unlink(WHO, parent, name).await
    }

    pub(super) async fn rmdir(&self, path: &str) -> Answer<()> {
        let (parent, name) = self.parent(path).await?;
        self.fs.rmdir(WHO, parent, name).await
    }

    pub(super) async fn rename(&self, from: &str, to: &str) -> Answer<()> {
        self.rename_with(from, to, 0).await
    }

    pub(super) async fn rename_with(&self, from: &str, to: &str, flags: u32) -> Answer<()> {
        let ((parent, name), (new_parent, new_name)) = (self.parent(from).await?, self.parent(to).await?);
        self.fs.rename(WHO, parent, name, new_parent, new_name, flags).await
    }

    pub(super) async fn set(&self, path: &str, change: SetAttr) -> Answer<Attr> {
        let ino = self.look(path).await?.ino;
        self.fs.setattr(WHO, ino, change).await.map(|(attr, _)| attr)
    }

    /// Lists a directory in replies of so many entries.
    pub(super) async fn entries(&self, path: &str, room: usize, plus: bool) -> Answer<Vec<DirEntry>> {
        let ino = self.look(path).await?.ino;
        let handle = self.fs.opendir(WHO, ino).await?.handle;
        let mut all: Vec<DirEntry> = Vec::new();
        loop {
            let mut sink = Sink { plus, room, entries: Vec::new() };
            let offset = all.last().map_or(0, |last| last.next);
            self.fs.readdir(WHO, ino, handle, offset, &mut sink).await?;
            if sink.entries.is_empty() {
                break;
            }
            all.extend(sink.entries);
        }
        self.fs.releasedir(ino, handle).await;
        Ok(all.into_iter().filter(|entry| entry.name != "." && entry.name != "..").collect())
    }

    pub(super) async fn list(&self, path: &str) -> Vec<String> {
        let entries = self.entries(path, 100, false).await.unwrap();
        let mut names: Vec<String> = entries.into_iter().map(|entry| entry.name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Verbs and keys of the calls since the last time.
    pub(super) fn calls(&self) -> Vec<String> {
        let calls = self.double.calls().iter().map(|(verb, key)| format!("{verb} {key}")).collect();
        self.double.forget_calls();
        calls
    }

    /// Keys of files, without what is hidden.
    pub(super) fn keys(&self) -> Vec<String> {
        self.double.keys().into_iter().filter(|key| !key.starts_with(".berth/")).collect()
    }
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        if path.is_dir() {
            std::fs::create_dir(to.join(&name)).unwrap();
            std::fs::set_permissions(to.join(&name), std::fs::metadata(&path).unwrap().permissions()).unwrap();
            copy_folder(&path, &to.join(&name));
        } else {
            std::fs::copy(&path, to.join(&name)).unwrap();
        }
    }
}

pub(super) fn os(text: &str) -> OsString {
    OsString::from(text)
}
