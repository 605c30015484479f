//! A pool: a directory on a file system of this node, and its books.
//!
//! ```text
//! lock                    held (flock) by whoever changes the pool; holds the generation number
//! volumes/ID/             a volume: `image` and `volume.json`
//! snapshots/ID/           a snapshot: `image` and `snapshot.json`
//! tmp/ID/                 being made: thrown away when the pool is next opened
//! trash/ID/               deleted: its bytes are on their way out
//! ```
//!
//! The books say how many bytes are promised. They are a copy in memory of what the directory says, good as long as
//! nobody else has raised the generation; whoever changes the pool raises it first. So a crash, or another process at
//! work on the same pool, leads to a fresh count and never to a wrong one.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::Sort;
use crate::config::{self, Fallback};
use crate::error::{Context, Result};
use crate::host::extents;
use crate::host::files::{self, FileLock};
use crate::volume::{Available, format_bytes};

/// The image's name in a volume's folder.
pub(super) const IMAGE: &str = "image";
const READ_ONLY: &str = "PoolReadOnly";
const LOCK: &str = "lock";
const FOLDERS: [&str; 4] = ["volumes", "snapshots", "tmp", "trash"];

/// The file system keeps 1/50 for its own metadata: records of extents, reference counts of shared blocks.
const HEADROOM: u64 = 50;

/// Directories that lie on a node's root disk, as a process on the node or in a node pod sees it.
const ROOT_DISK: [&str; 2] = ["/", "/var/lib/kubelet"];

pub(super) struct Pool {
    config: config::Pool,
    books: Mutex<Option<Books>>,
    /// A device number, and whether its file system has reflink.
    reflink: Mutex<Option<(u64, bool)>>,
}

/// What the pool holds: ids, and the bytes promised to each.
pub(super) struct Books {
    generation: u64,
    pub(super) volumes: BTreeMap<String, u64>,
    pub(super) snapshots: BTreeMap<String, u64>,
    trash: BTreeMap<String, u64>,
    /// At most so many bytes will be needed yet, when blocks that copies share are written again.
    saved: Cell<u64>,
}

/// Why a pool can't be used now.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Trouble {
    /// Nothing can be changed, but what is there can be seen.
    pub(super) fn leaves_it_readable(&self) -> bool {
        self.reason == READ_ONLY
    }
}

impl Books {
    fn promised(&self) -> u64 {
        [&self.volumes, &self.snapshots, &self.trash].into_iter().flat_map(BTreeMap::values).sum()
    }

    fn of(&mut self, sort: Sort) -> &mut BTreeMap<String, u64> {
        match sort {
            Sort::Volume | Sort::Ephemeral => &mut self.volumes,
            Sort::Snapshot => &mut self.snapshots,
        }
    }
}

impl Pool {
    pub(super) fn new(config: config::Pool) -> Self {
        Self { config, books: Mutex::new(None), reflink: Mutex::new(None) }
    }

    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    pub(super) fn is_thin(&self) -> bool {
        self.config.thin
    }

    /// Where a volume or snapshot is, if it exists.
    pub(super) fn folder(&self, sort: Sort, id: &str) -> PathBuf {
        let parent = match sort {
            Sort::Volume | Sort::Ephemeral => "volumes",
            Sort::Snapshot => "snapshots",
        };
        self.config.path.join(parent).join(id)
    }

    /// Can the pool be used now? `Err` says why not.
    pub(super) fn state(&self) -> Result<(), Trouble> {
        let path = self.config.path.display();
        let trouble = |reason, message| Err(Trouble { reason, message: format!("pool {}: {message}", self.name()) });
        let device = match files::device_of(&self.config.path) {
            Ok(device) if self.config.path.is_dir() => device,
            Ok(_) => return trouble("PoolMissing", format!("{path} is not a directory")),
            Err(error) => return trouble("PoolMissing", error.to_string()),
        };
        if self.config.fallback == Fallback::None
            && ROOT_DISK.iter().any(|root| files::device_of(Path::new(root)).is_ok_and(|root| root == device))
        {
            return trouble(
                "PoolOnRootDisk",
                format!("{path} lies on the root disk: mount its disk there, or allow it with `fallback: root`"),
            );
        }
        match files::space(&self.config.path) {
            Ok(space) if space.read_only => trouble(READ_ONLY, format!("{path} is read-only")),
            Ok(_) => Ok(()),
            Err(error) => trouble("PoolMissing", error.to_string()),
        }
    }

    /// Has the file system no room even for what is small?
    pub(super) fn is_full(&self) -> bool {
        files::space(&self.config.path).is_ok_and(|space| space.free < space.total / (2 * HEADROOM))
    }

    /// Can files here share blocks? Tried, not guessed, and once for each file system that turns up at the path.
    pub(super) fn has_reflink(&self) -> Result<bool> {
        let device = files::device_of(&self.config.path)?;
        let mut tried = self.reflink.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((on, has)) = *tried
            && on == device
        {
            return Ok(has);
        }
        let has = files::has_reflink(&self.config.path)?;
        *tried = Some((device, has));
        Ok(has)
    }

    /// Answers a question from the books, which are counted first if need be.
    pub(super) fn ask<T>(&self, question: impl FnOnce(&Books) -> T) -> Result<T> {
        let known = self.known_books();
        if let Some(books) = known.as_ref()
            && std::fs::File::open(self.config.path.join(LOCK)).is_ok_and(|lock| generation(&lock) == books.generation)
        {
            return Ok(question(books));
        }
        drop(known);
        if self.state().is_err_and(|trouble| trouble.leaves_it_readable()) {
            // Nobody changes it now, so no lock is needed; nothing is kept, since that may end.
            return Ok(question(&self.look(0)?));
        }
        let writer = self.open()?;
        let answer = question(&writer.books);
        writer.done();
        Ok(answer)
    }

    /// Takes the pool's lock to change it.
    ///
    /// # Errors
    /// `Exhausted` when the pool can't be used: another node may do.
    pub(super) fn open(&self) -> Result<Writer<'_>> {
        if let Err(trouble) = self.state() {
            fail!(Exhausted, "{}", trouble.message);
        }
        let lock = FileLock::acquire(&self.config.path.join(LOCK))?;
        let current = match generation(lock.file()) {
            // A new pool: its generations shall never be those of another disk that is mounted here later.
            0 => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let first = u64::try_from(now.as_nanos()).unwrap_or(1);
                write_generation(lock.file(), first)
                    .context(|| format!("cannot write to the lock of {}", self.name()))?;
                first
            }
            current => current,
        };
        let books = match self.known_books().take().filter(|books| books.generation == current) {
            Some(books) => books,
            None => self.count(current)?,
        };
        Ok(Writer { pool: self, lock, books })
    }

    /// Room in the pool, in bytes.
    pub(super) fn available(&self) -> Result<u64> {
        if self.state().is_err() {
            return Ok(0);
        }
        self.ask(|books| self.available_beside(books))?
    }

    /// Two limits: what the pool may hold less what it has promised, and what is free now less what it will yet need
    /// for what it has promised. They differ when something else lies on the file system.
    fn available_beside(&self, books: &Books) -> Result<u64> {
        let space = files::space(&self.config.path)?;
        let promised = books.promised();
        let capped = self.config.cap.map_or(u64::MAX, |cap| cap.saturating_sub(promised));
        if self.config.thin {
            return Ok(capped.min(space.free));
        }
        let room = capped.min((space.total - space.total / HEADROOM).saturating_sub(promised));
        if room.saturating_add(books.saved.get()) > space.free {
            // What was noted is an upper bound. It matters now: look.
            books.saved.set(self.count_saved()?);
        }
        Ok(room.min(space.free.saturating_sub(books.saved.get())))
    }

    /// How many bytes the images save by sharing blocks.
    fn count_saved(&self) -> Result<u64> {
        let mut shared = Vec::new();
        for folder in ["volumes", "snapshots"] {
            for id in self.sizes(folder)?.into_keys() {
                let path = self.config.path.join(folder).join(id).join(IMAGE);
                match std::fs::File::open(&path).and_then(|image| extents::shared(&image)) {
                    Ok(found) => shared.extend(found),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).context(|| format!("cannot map {}", path.display())),
                }
            }
        }
        Ok(extents::saved(shared))
    }

    /// Counts what the directory says, under the lock, and finishes what a crash left.
    fn count(&self, generation: u64) -> Result<Books> {
        for name in FOLDERS {
            let folder = self.config.path.join(name);
            match std::fs::create_dir(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(error).context(|| format!("cannot make {}", folder.display()));
                }
                _ => {}
            }
        }
        let mut trash = BTreeMap::new();
        for name in ["tmp", "trash"] {
            for (id, size) in self.sizes(name)? {
                tracing::info!(pool = self.name(), id, "removing what an interrupted call left in {name}/");
                if let Err(error) = files::remove_flat_directory(&self.config.path.join(name).join(&id)) {
                    tracing::error!(pool = self.name(), id, %error, "cannot remove it: its bytes stay promised");
                    trash.insert(id, size);
                }
            }
        }
        Ok(Books { trash, ..self.look(generation)? })
    }

    /// What the directory says, as it is.
    fn look(&self, generation: u64) -> Result<Books> {
        let (volumes, snapshots) = (self.sizes("volumes")?, self.sizes("snapshots")?);
        // What sharing saves is found out when it matters.
        Ok(Books { generation, volumes, snapshots, trash: BTreeMap::new(), saved: Cell::new(u64::MAX) })
    }

    /// The ids in one of the pool's folders, and the size of each one's image. One without an image counts nothing.
    fn sizes(&self, folder: &str) -> Result<BTreeMap<String, u64>> {
        let folder = self.config.path.join(folder);
        let what = || format!("cannot list {}", folder.display());
        let mut sizes = BTreeMap::new();
        for entry in std::fs::read_dir(&folder).context(what)? {
            let entry = entry.context(what)?;
            if let Ok(id) = entry.file_name().into_string() {
                let size = entry.path().join(IMAGE).symlink_metadata().map_or(0, |image| image.len());
                sizes.insert(id, size);
            }
        }
        Ok(sizes)
    }

    fn known_books(&self) -> MutexGuard<'_, Option<Books>> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pool, locked. Dropped without `done`, the books are counted anew.
pub(super) struct Writer<'a> {
    pool: &'a Pool,
    lock: FileLock,
    books: Books,
}

impl Writer<'_> {
    /// Promises bytes, if there is room for them.
    ///
    /// # Errors
    /// `Exhausted`, with what there is.
    pub(super) fn check_room(&self, bytes: u64) -> Result<()> {
        let free = self.pool.available_beside(&self.books)?;
        if bytes > free {
            let (free, wanted) = (format_bytes(free), format_bytes(bytes));
            fail!(Exhausted, "pool {} has {free} left, and {wanted} is wanted", self.pool.name());
        }
        Ok(())
    }

    /// Makes a folder in `tmp/`, fills it, and moves it to its place: from then on the thing exists. A copy begins by
    /// sharing blocks.
    pub(super) fn create(
        mut self,
        sort: Sort,
        id: &str,
        size: u64,
        is_copy: bool,
        fill: impl FnOnce(&Path) -> Result<()>,
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
            .and_then(|()| files::sync_directory(&fresh))
            .and_then(|()| files::rename_durably(&fresh, &folder));
        if let Err(error) = made {
            // Only one of the two can be there, and nobody has been told of it.
            files::remove_flat_directory(&fresh)?;
            return Err(error);
        }
        self.books.of(sort).insert(id.to_owned(), size);
        if is_copy {
            self.books.saved.set(self.books.saved.get().saturating_add(size));
        }
        self.done();
        Ok(())
    }

    /// Deletes a volume or snapshot: gone with one rename, its bytes after that and without the lock.
    pub(super) fn delete(mut self, sort: Sort, id: &str) -> Result<()> {
        self.raise_generation()?;
        let trash = self.pool.config.path.join("trash").join(id);
        files::remove_flat_directory(&trash)?;
        files::rename_durably(&self.pool.folder(sort, id), &trash)?;
        let size = self.books.of(sort).remove(id).unwrap_or_default();
        self.books.trash.insert(id.to_owned(), size);
        let pool = self.pool;
        self.done();
        files::remove_flat_directory(&trash)?;
        let mut writer = pool.open()?;
        writer.books.trash.remove(id);
        writer.done();
        Ok(())
    }

    /// Notes that a volume has grown, which `grow` does.
    pub(super) fn grow(mut self, id: &str, size: u64, grow: impl FnOnce() -> Result<()>) -> Result<()> {
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
    fn done(self) {
        *self.pool.known_books() = Some(self.books);
    }
}

/// The number in the lock file; 0 in a new one.
fn generation(lock: &std::fs::File) -> u64 {
    let mut bytes = [0; 8];
    lock.read_exact_at(&mut bytes, 0).map_or(0, |()| u64::from_le_bytes(bytes))
}

fn write_generation(lock: &std::fs::File, generation: u64) -> std::io::Result<()> {
    lock.write_all_at(&generation.to_le_bytes(), 0)
}

/// The room in several pools.
pub(super) fn sum_available<'a>(pools: impl Iterator<Item = &'a Pool>, smallest: u64) -> Result<Available> {
    let mut sum = Available { total: 0, largest: 0, smallest };
    for pool in pools {
        let free = pool.available()?;
        sum.total += free;
        sum.largest = sum.largest.max(free);
    }
    Ok(sum)
}
