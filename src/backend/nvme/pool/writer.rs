//! Changes to a pool, under its lock.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::super::Sort;
use super::super::directory::{self, Directory};
use super::{Books, Pool};
use crate::error::{Context, Result};
use crate::host::files::{self, FileLock};
use crate::host::trees;
use crate::volume::format_bytes;

/// The pool, locked. Dropped without `done`, the books are counted anew.
pub(in super::super) struct Writer<'a> {
    pub(super) pool: &'a Pool,
    pub(super) lock: FileLock,
    pub(super) books: Books,
}

impl Writer<'_> {
    /// Promises bytes, if there is room for them.
    ///
    /// # Errors
    /// `Exhausted`, with what there is.
    pub(in super::super) fn check_room(&self, bytes: u64) -> Result<()> {
        let free = self.pool.available_beside(&self.books, bytes)?;
        if bytes > free {
            let (free, wanted) = (format_bytes(free), format_bytes(bytes));
            fail!(Exhausted, "pool {} has {free} left, and {wanted} is wanted", self.pool.name());
        }
        Ok(())
    }

    /// Makes a folder in `tmp/`, fills it, and moves it to its place: from then on the thing exists. A copy begins by
    /// sharing blocks.
    pub(in super::super) fn create(
        mut self,
        sort: Sort,
        id: &str,
        size: u64,
        is_copy: bool,
        fill: impl FnOnce(&Path) -> Result<Option<Directory>>,
    ) -> Result<()> {
        let folder = self.pool.folder(sort, id);
        if folder.symlink_metadata().is_ok() {
            fail!(Busy, "{id} was made by another process just now: ask again");
        }
        self.check_room(size)?;
        self.raise_generation()?;
        let fresh = self.pool.config.path.join("tmp").join(id);
        let made = std::fs::create_dir(&fresh)
            .context(|| format!("cannot make {}", fresh.display()))
            .and_then(|()| fill(&fresh))
            .and_then(|directory| files::sync_directory(&fresh).map(|()| directory))
            .and_then(|directory| files::rename_durably(&fresh, &folder).map(|()| directory));
        match made {
            Ok(Some(directory)) => drop(self.books.directories.insert(id.to_owned(), directory)),
            Ok(None) => {}
            Err(error) => {
                // Only one of the two can be there, and nobody has been told of it.
                trees::remove(&fresh)?;
                return Err(error);
            }
        }
        self.books.of(sort).insert(id.to_owned(), size);
        if is_copy {
            self.books.saved.set(self.books.saved.get().saturating_add(size));
        }
        self.done();
        Ok(())
    }

    /// A project id for a new directory.
    pub(in super::super) fn free_project(&self) -> Result<u32> {
        directory::free_project(&self.pool.root()?, &self.books.projects())
    }

    /// Deletes a volume or snapshot: gone with one rename. An image's bytes go at once and without the lock, a directory's
    /// when [`super::super::reaper`] comes to them.
    pub(in super::super) fn delete(mut self, sort: Sort, id: &str) -> Result<()> {
        self.raise_generation()?;
        // The same name may be made and deleted again before its bytes have gone.
        let name = format!("{id}.{}", self.books.generation);
        files::rename_durably(&self.pool.folder(sort, id), &self.pool.config.path.join("trash").join(&name))?;
        let size = self.books.of(sort).remove(id).unwrap_or_default();
        let directory = self.books.directories.remove(id);
        self.books.trash.insert(name.clone(), (size, directory));
        let pool = self.pool;
        self.done();
        if directory.is_some() { Ok(()) } else { pool.empty(&name) }
    }

    /// Notes that a volume has grown, which `grow` does.
    pub(in super::super) fn grow(mut self, id: &str, size: u64, grow: impl FnOnce() -> Result<()>) -> Result<()> {
        let present = self.books.volumes.get(id).copied().unwrap_or_default();
        self.check_room(size.saturating_sub(present))?;
        self.raise_generation()?;
        grow()?;
        self.books.volumes.insert(id.to_owned(), size.max(present));
        self.done();
        Ok(())
    }

    /// Everybody else's books are out of date from now on, whatever becomes of us.
    fn raise_generation(&mut self) -> Result<()> {
        self.books.generation = self.books.generation.wrapping_add(1);
        write_generation(self.lock.file(), self.books.generation)
            .context(|| format!("cannot write to the lock of pool {}", self.pool.name()))
    }

    /// The books are right: keep them.
    pub(super) fn done(self) {
        *self.pool.known_books() = Some(self.books);
    }
}

/// The number in the lock file; 0 in a new one.
pub(super) fn generation(lock: &std::fs::File) -> u64 {
    let mut bytes = [0; 8];
    lock.read_exact_at(&mut bytes, 0).map_or(0, |()| u64::from_le_bytes(bytes))
}

pub(super) fn write_generation(lock: &std::fs::File, generation: u64) -> std::io::Result<()> {
    lock.write_all_at(&generation.to_le_bytes(), 0)
}
