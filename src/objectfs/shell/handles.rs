//! Open files and directories by number.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::content::Window;
use super::super::namespace::{File, HandleRow, Listing};
use crate::fuse::filesystem::{Answer, Handle, Ino};
use crate::host::Errno;

/// An open file.
pub(super) struct FileHandle {
    /// The file; shared by all its handles.
    pub(super) file: Arc<File>,
    /// How it is read through this handle.
    pub(super) window: tokio::sync::Mutex<Window>,
    /// Does it count as a writer?
    pub(super) writes: bool,
    row: HandleRow,
}

/// An open directory.
pub(super) struct DirectoryHandle {
    /// What was found so far.
    pub(super) listing: tokio::sync::Mutex<Listing>,
    row: HandleRow,
}

enum Open {
    File(Arc<FileHandle>),
    Directory(Arc<DirectoryHandle>),
}

/// All of them.
#[derive(Default)]
pub(super) struct Handles {
    open: Mutex<HashMap<Handle, Open>>,
    last: AtomicU64,
}

impl Handles {
    fn open(&self) -> MutexGuard<'_, HashMap<Handle, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Handle {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A handle of a file. `handle`: the number it has to have.
    pub(super) fn add_file(
        &self,
        handle: Option<Handle>,
        ino: Ino,
        flags: u32,
        writes: bool,
        file: Arc<File>,
    ) -> Handle {
        let handle = self.number(handle);
        let row = HandleRow { handle, ino, flags, directory: false };
        let window = tokio::sync::Mutex::default();
        self.open().insert(handle, Open::File(Arc::new(FileHandle { file, window, writes, row })));
        handle
    }

    /// A handle of a directory.
    pub(super) fn add_directory(&self, handle: Option<Handle>, ino: Ino) -> Handle {
        let handle = self.number(handle);
        let row = HandleRow { handle, ino, flags: 0, directory: true };
        let listing = tokio::sync::Mutex::default();
        self.open().insert(handle, Open::Directory(Arc::new(DirectoryHandle { listing, row })));
        handle
    }

    fn number(&self, wanted: Option<Handle>) -> Handle {
        match wanted {
            Some(handle) => {
                self.last.fetch_max(handle, Ordering::Relaxed);
                handle
            }
            None => self.next(),
        }
    }

    /// An open file.
    pub(super) fn file(&self, handle: Handle) -> Answer<Arc<FileHandle>> {
        match self.open().get(&handle) {
            Some(Open::File(file)) => Ok(file.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// An open directory.
    pub(super) fn directory(&self, handle: Handle) -> Answer<Arc<DirectoryHandle>> {
        match self.open().get(&handle) {
            Some(Open::Directory(directory)) => Ok(directory.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes one. `Some`: it was a file's.
    pub(super) fn remove(&self, handle: Handle) -> Option<Arc<FileHandle>> {
        match self.open().remove(&handle) {
            Some(Open::File(file)) => Some(file),
            _ => None,
        }
    }

    /// All of them, for a successor.
    pub(super) fn rows(&self) -> Vec<HandleRow> {
        let mut rows: Vec<HandleRow> = self
            .open()
            .values()
            .map(|open| match open {
                Open::File(file) => file.row.clone(),
                Open::Directory(directory) => directory.row.clone(),
            })
            .collect();
        rows.sort_by_key(|row| row.handle);
        rows
    }
}
