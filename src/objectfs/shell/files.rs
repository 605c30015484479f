//! Requests about open files.

use bytes::Bytes;

use super::super::content::Window;
use super::super::namespace::HandleRow;
use super::super::namespace::errors::content_errno;
use super::super::namespace::flags::{O_ACCMODE, O_TRUNC};
use super::ObjectFs;
use crate::fuse::filesystem::{Answer, Caller, Entry, Handle, Ino, Opened};
use crate::host::Errno;

const FALLOC_FL_KEEP_SIZE: u32 = 1;
const FALLOC_FL_PUNCH_HOLE: u32 = 2;
const FALLOC_FL_ZERO_RANGE: u32 = 16;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

impl ObjectFs {
    pub(super) async fn open_file(&self, who: Caller, ino: Ino, flags: u32) -> Answer<Opened> {
        let opened = self.names.open(who, ino, flags).await?;
        let handle = self.hold(None, ino, flags, opened.file);
        Ok(Opened { handle, keep_cache: opened.keep_cache, ..Opened::default() })
    }

    pub(super) async fn create_file(
        &self,
        who: Caller,
        parent: Ino,
        name: &str,
        mode: u32,
        flags: u32,
    ) -> Answer<(Entry, Opened)> {
        let (ino, opened) = self.names.create(who, parent, name, mode, flags).await?;
        let handle = self.hold(None, ino, flags, opened.file.clone());
        match self.names.entry(ino, true) {
            Ok(entry) => Ok((entry, Opened { handle, keep_cache: opened.keep_cache, ..Opened::default() })),
            Err(errno) => {
                self.release_file(ino, handle).await;
                Err(errno)
            }
        }
    }

    fn hold(
        &self,
        handle: Option<Handle>,
        ino: Ino,
        flags: u32,
        file: std::sync::Arc<super::super::namespace::File>,
    ) -> Handle {
        let writes = flags & O_ACCMODE != 0;
        file.state().writers += u32::from(writes);
        self.names.tree().pin(ino);
        self.handles.add_file(handle, ino, flags, writes, file)
    }

    /// Handles of a mount that is taken over. One that can't be had again answers EBADF.
    pub(super) async fn restore(&self, rows: &[HandleRow]) {
        for row in rows {
            if row.directory {
                self.names.tree().pin(row.ino);
                self.handles.add_directory(Some(row.handle), row.ino);
                continue;
            }
            match self.names.open_again(Caller::default(), row.ino, row.flags & !O_TRUNC).await {
                Ok(opened) => {
                    self.hold(Some(row.handle), row.ino, row.flags, opened.file);
                }
                Err(errno) => {
                    tracing::warn!(ino = row.ino, errno = errno.raw_os_error(), "an open file can't be opened again");
                }
            }
        }
    }

    pub(super) async fn release_file(&self, ino: Ino, handle: Handle) {
        let Some(open) = self.handles.remove(handle) else { return };
        if open.writes {
            let mut state = open.file.state();
            state.writers = state.writers.saturating_sub(1);
        }
        self.names.close(ino, &open.file).await;
        self.names.tree().unpin(ino);
    }

    /// Whoever could not write is not told of what could not be written.
    pub(super) async fn flush_file(&self, ino: Ino, handle: Handle) -> Answer<()> {
        let open = self.handles.file(handle)?;
        if open.writes { self.names.flush(ino, &open.file).await } else { Ok(()) }
    }

    pub(super) async fn read_file(&self, handle: Handle, offset: u64, size: u32) -> Answer<Vec<Bytes>> {
        let open = self.handles.file(handle)?;
        if open.file.state().stale {
            return Err(Errno::STALE);
        }
        let read = match open.window.try_lock() {
            Ok(mut window) => open.file.content.read(&mut window, offset, size).await,
            // Read by several at once through one handle: each for itself.
            Err(_) => open.file.content.read(&mut Window::default(), offset, size).await,
        };
        read.map_err(|error| content_errno(&error))
    }

    pub(super) async fn allocate(&self, ino: Ino, handle: Handle, offset: u64, length: u64, mode: u32) -> Answer<()> {
        let open = self.handles.file(handle)?;
        let size = open.file.content.size();
        let end = offset.checked_add(length).ok_or(Errno::FBIG)?;
        let keep = mode & FALLOC_FL_KEEP_SIZE != 0;
        match mode & !FALLOC_FL_KEEP_SIZE {
            // Objects have no blocks to reserve: there is room, or writing says ENOSPC.
            0 if keep || end <= size => Ok(()),
            0 => self.names.resize(ino, &open.file, end).await,
            FALLOC_FL_PUNCH_HOLE if keep => {
                if offset < size {
                    self.names.punch(ino, &open.file, offset, end.min(size) - offset).await?;
                }
                Ok(())
            }
            FALLOC_FL_ZERO_RANGE => {
                if offset < size {
                    self.names.punch(ino, &open.file, offset, end.min(size) - offset).await?;
                }
                if end > size && !keep {
                    self.names.resize(ino, &open.file, end).await?;
                }
                Ok(())
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    pub(super) fn seek(&self, handle: Handle, offset: u64, whence: u32) -> Answer<u64> {
        let open = self.handles.file(handle)?;
        match whence {
            SEEK_DATA => open.file.content.seek(offset, false).ok_or(Errno::NXIO),
            SEEK_HOLE => open.file.content.seek(offset, true).ok_or(Errno::NXIO),
            _ => Err(Errno::INVAL),
        }
    }
}
