//! A pool: a directory on a file system of this node, and its books.
//!
//! ```text
//! lock                    held (flock) by whoever changes the pool; holds the generation number
//! volumes/ID/             a volume: `volume.json`, and `image` or `data/`
//! snapshots/ID/           a snapshot: `image` and `snapshot.json`
//! tmp/ID/                 being made: thrown away when the pool is next opened
//! trash/ID.GENERATION/    deleted: its bytes are on their way out
//! ```
//!
//! The books say how many bytes are promised. They are a copy in memory of what the directory says, good as long as
//! nobody else has raised the generation; whoever changes the pool raises it first. So a crash, or another process at
//! work on the same pool, leads to a fresh count and never to a wrong one.

mod writer;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::Sort;
use super::directory::{self, Directory};
use super::freezing::Freezing;
use super::reaper::Trash;
use crate::config::{self, Carve, Fallback};
use crate::error::{Context, Result};
use crate::host::files::{self, FileLock};
use crate::host::{extents, mounts, quota, trees};
use crate::volume::format_bytes;
pub(super) use writer::Writer;
use writer::{generation, write_generation};

/// The image's name in a volume's folder.
pub(super) const IMAGE: &str = "image";
const READ_ONLY: &str = "PoolReadOnly";
const LOCK: &str = "lock";
const FOLDERS: [&str; 4] = ["volumes", "snapshots", "tmp", "trash"];

/// The file system keeps 1/50 for its own metadata: records of extents, reference counts of shared blocks.
const HEADROOM: u64 = 50;

/// A file system has a few files of its own that are in no project: so many bytes are nobody's fault.
const STRAY_OF_ITS_OWN: u64 = 64 << 10;

/// Directories that lie on a node's root disk, as a process on the node or in a node pod sees it.
const ROOT_DISK: [&str; 2] = ["/", "/var/lib/kubelet"];

pub(super) struct Pool {
    config: config::Pool,
    below: Option<Arc<dyn Below>>,
    books: Mutex<Option<Books>>,
    /// A device number, and whether its file system has reflink.
    reflink: Mutex<Option<(u64, bool)>>,
    /// A thread empties the trash.
    reaping: AtomicBool,
    pub(super) freezing: Freezing,
}

/// What a pool lies on, where Berth itself has put it there. Nothing here waits for a disk.
pub(super) trait Below: Send + Sync {
    /// Why it can't be used now.
    fn trouble(&self) -> Option<Trouble>;

    /// What is not well with it, though it can be used.
    fn warnings(&self) -> Vec<Trouble> {
        Vec::new()
    }

    /// Nothing new is made there.
    fn is_closed(&self) -> bool {
        false
    }

    /// The disks that it lies on and that were last there.
    fn disks(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Nothing has ever been made there, whether it can be used or not.
    fn is_surely_empty(&self) -> bool {
        false
    }
}

/// What the pool holds: ids, and the bytes promised to each.
pub(super) struct Books {
    generation: u64,
    pub(super) volumes: BTreeMap<String, u64>,
    pub(super) snapshots: BTreeMap<String, u64>,
    trash: Things,
    /// The volumes that are directories.
    directories: BTreeMap<String, Directory>,
    /// The project of the pool's own files, where quotas are in force.
    own_project: Option<u32>,
    /// At most so many bytes will be needed yet, when blocks that copies share are written again.
    saved: Cell<u64>,
}

/// Sizes, and which of these are directories.
type Things = BTreeMap<String, (u64, Option<Directory>)>;

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
        let trash = self.trash.values().map(|(size, _)| *size).sum::<u64>();
        [&self.volumes, &self.snapshots].into_iter().flat_map(BTreeMap::values).sum::<u64>() + trash
    }

    /// The projects that something of ours has.
    fn projects(&self) -> BTreeSet<u32> {
        let trash = self.trash.values().filter_map(|(_, directory)| directory.as_ref());
        let directories = self.directories.values().chain(trash);
        directories.filter_map(|directory| directory.project).chain(self.own_project).collect()
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
        Self {
            config,
            below: None,
            books: Mutex::new(None),
            reflink: Mutex::new(None),
            reaping: AtomicBool::new(false),
            freezing: Freezing::default(),
        }
    }

    /// On something that Berth looks after.
    pub(super) fn on(config: config::Pool, below: Arc<dyn Below>) -> Self {
        Self { below: Some(below), ..Self::new(config) }
    }

    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    pub(super) fn path(&self) -> &Path {
        &self.config.path
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
        if let Some(trouble) = self.below.as_ref().and_then(|below| below.trouble()) {
            return Err(trouble);
        }
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

    /// Can volumes of this carve be made here?
    pub(super) fn offers(&self, carve: Carve) -> bool {
        (self.config.carves.is_empty() || self.config.carves.contains(&carve))
            && match carve {
                Carve::Directory => self.has_quotas(),
                Carve::Lvm => false,
                Carve::Image => true,
            }
    }

    /// Are project quotas in force?
    pub(super) fn has_quotas(&self) -> bool {
        File::open(&self.config.path).is_ok_and(|root| quota::is_enforced(&root))
    }

    /// The volume whose directory has this inode on this device.
    pub(super) fn directory_at(&self, device: u64, inode: u64) -> Result<Option<String>> {
        if !files::device_of(&self.config.path).is_ok_and(|own| own == device) {
            return Ok(None);
        }
        self.ask(|books| {
            let mut directories = books.directories.iter();
            directories.find(|(_, directory)| directory.inode == inode).map(|(id, _)| id.clone())
        })
    }

    /// Bytes whose project was changed, and that no limit holds. `None`: nobody can tell, since other things lie on this
    /// file system too, or it has no quotas.
    pub(super) fn stray(&self) -> Result<Option<u64>> {
        if !mounts::is_mount(&self.config.path)? || !self.has_quotas() {
            return Ok(None);
        }
        let known = self.ask(Books::projects)?;
        directory::stray(&self.root()?, &known).map(Some)
    }

    /// The pool's directory, open.
    pub(super) fn root(&self) -> Result<File> {
        File::open(&self.config.path).context(|| format!("cannot open {}", self.config.path.display()))
    }

    /// Everything that is wrong with it now.
    pub(super) fn troubles(&self) -> Vec<Trouble> {
        if let Err(trouble) = self.state() {
            return vec![trouble];
        }
        let mut troubles = Vec::new();
        let mut trouble = |reason, message| {
            troubles.push(Trouble { reason, message: format!("pool {}: {message}", self.name()) });
        };
        if self.is_full() {
            trouble("PoolFull", "it has no room left".to_owned());
        }
        match self.stray() {
            Ok(Some(stray)) if stray > STRAY_OF_ITS_OWN => trouble(
                "StrayFiles",
                format!("{} lie in projects that are no volume's: a tenant has left its limit", format_bytes(stray)),
            ),
            Ok(_) => {}
            Err(error) => trouble("QuotasUnknown", error.to_string()),
        }
        troubles.extend(self.warnings());
        troubles
    }

    /// May a volume lie there that can't be seen now?
    pub(super) fn may_hide_volumes(&self) -> bool {
        !self.below.as_ref().is_some_and(|below| below.is_surely_empty())
    }

    /// What is not well, though the pool can be used.
    pub(super) fn warnings(&self) -> Vec<Trouble> {
        self.below.as_ref().map(|below| below.warnings()).unwrap_or_default()
    }

    /// Bytes promised to volumes and snapshots, counted without the lock and without changing anything.
    pub(super) fn promised(&self) -> Result<u64> {
        // Nobody has opened it yet.
        if !self.config.path.join(FOLDERS[0]).exists() {
            return Ok(0);
        }
        Ok(self.look(0)?.promised())
    }

    /// Has the file system no room even for what is small?
    fn is_full(&self) -> bool {
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
            && File::open(self.config.path.join(LOCK)).is_ok_and(|lock| generation(&lock) == books.generation)
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
        match self.ask(|books| self.available_beside(books, u64::MAX)).flatten() {
            // It broke while it was asked. The others have what they have.
            Err(error) if self.state().is_err() => {
                tracing::error!(pool = self.name(), %error, "a pool that can't be asked has no room");
                Ok(0)
            }
            available => available,
        }
    }

    /// Two limits: what the pool may hold less what it has promised, and what is free now less what it will yet need
    /// for what it has promised. They differ when something else lies on the file system. Where there is surely `enough`, no
    /// volume is asked what it has taken.
    fn available_beside(&self, books: &Books, enough: u64) -> Result<u64> {
        if self.below.as_ref().is_some_and(|below| below.is_closed()) {
            return Ok(0);
        }
        let space = files::space(&self.config.path)?;
        let promised = books.promised();
        let capped = self.config.cap.map_or(u64::MAX, |cap| cap.saturating_sub(promised));
        if self.config.thin {
            return Ok(capped.min(space.free));
        }
        let room = capped.min((space.total - space.total / HEADROOM).saturating_sub(promised));
        let most: u64 = books.directories.keys().filter_map(|id| books.volumes.get(id)).sum();
        let surely = room.min(space.free.saturating_sub(books.saved.get().saturating_add(most)));
        if surely >= enough.min(room) {
            return Ok(surely);
        }
        if room.saturating_add(books.saved.get()) > space.free {
            // What was noted is an upper bound. It matters now: look.
            books.saved.set(self.count_saved()?);
        }
        let needed = books.saved.get().saturating_add(self.needed_by_directories(books)?);
        Ok(room.min(space.free.saturating_sub(needed)))
    }

    /// Directories take their space only when they are written.
    fn needed_by_directories(&self, books: &Books) -> Result<u64> {
        let sizes =
            || books.directories.iter().filter_map(|(id, directory)| Some((*books.volumes.get(id)?, directory)));
        if sizes().next().is_none() {
            return Ok(0);
        }
        if !self.has_quotas() {
            // Nobody knows what they have taken: as if it were nothing.
            return Ok(sizes().map(|(size, _)| size).sum());
        }
        directory::needed(&self.root()?, sizes())
    }

    /// How many bytes the images save by sharing blocks.
    fn count_saved(&self) -> Result<u64> {
        let mut shared = Vec::new();
        for folder in ["volumes", "snapshots"] {
            for id in self.look_into(folder)?.into_keys() {
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
        // Nobody was ever shown what is here. It is small.
        for id in self.look_into("tmp")?.into_keys() {
            tracing::info!(pool = self.name(), id, "removing what an interrupted call was making");
            trees::remove(&self.config.path.join("tmp").join(&id))?;
        }
        let own_project = match self.has_quotas() {
            true => Some(directory::own_project(&self.config.path, &FOLDERS)?),
            false => None,
        };
        Ok(Books { own_project, ..self.look(generation)? })
    }

    /// What the directory says, as it is.
    fn look(&self, generation: u64) -> Result<Books> {
        let volumes = self.look_into("volumes")?;
        let sizes = |things: &Things| things.iter().map(|(id, (size, _))| (id.clone(), *size)).collect();
        Ok(Books {
            generation,
            volumes: sizes(&volumes),
            snapshots: sizes(&self.look_into("snapshots")?),
            trash: self.look_into("trash")?,
            directories: volumes.into_iter().filter_map(|(id, (_, directory))| Some((id, directory?))).collect(),
            own_project: None,
            // What sharing saves is found out when it matters.
            saved: Cell::new(u64::MAX),
        })
    }

    /// What is in one of the pool's folders. One with neither image nor directory counts nothing.
    fn look_into(&self, folder: &str) -> Result<Things> {
        let folder = self.config.path.join(folder);
        let what = || format!("cannot list {}", folder.display());
        let mut things = BTreeMap::new();
        for entry in std::fs::read_dir(&folder).context(what)? {
            let entry = entry.context(what)?;
            let Ok(id) = entry.file_name().into_string() else { continue };
            let thing = match entry.path().join(IMAGE).symlink_metadata() {
                Ok(image) => (image.len(), None),
                Err(_) => directory::look(&entry.path()).map_or((0, None), |(size, found)| (size, Some(found))),
            };
            things.insert(id, thing);
        }
        Ok(things)
    }

    /// Removes one thing that was deleted. Its room comes back when its bytes have.
    fn empty(&self, name: &str) -> Result<()> {
        trees::remove(&self.config.path.join("trash").join(name))?;
        let mut writer = self.open()?;
        if let Some((_, Some(Directory { project: Some(project), .. }))) = writer.books.trash.remove(name)
            && !writer.books.projects().contains(&project)
        {
            quota::set_limits(&self.root()?, project, 0, 0)?;
        }
        writer.done();
        Ok(())
    }

    fn known_books(&self) -> MutexGuard<'_, Option<Books>> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Trash for Pool {
    fn name(&self) -> &str {
        self.name()
    }

    fn is_reaped(&self) -> &AtomicBool {
        &self.reaping
    }

    fn next(&self, given_up: &BTreeSet<String>) -> Result<Option<String>> {
        self.ask(|books| books.trash.keys().find(|name| !given_up.contains(*name)).cloned())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.empty(name)
    }
}
