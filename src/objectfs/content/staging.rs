//! Staged writes on the node's disk: a log for each dirty file, and a sparse file once it is not small any more.
//! Owns the two files, their names and descriptors; never decides what is staged.
//!
//! `ID.log` alone holds a small file: the bytes written are records. A larger one has `ID.data` beside it, in which each
//! staged byte lies at its own offset and whose length is the file's size. A file without a base, or the part of a file
//! behind what the base still shows, needs no records then: all of it is staged. Only ranges over the base are logged,
//! after their bytes were written and before the write is acknowledged. So a process that is killed between two
//! instructions leaves a file that holds all that was acknowledged, and of what was not, either nothing or a part, as
//! any interrupted write does.
//!
//! Nothing is synced to the disk: the page cache survives the worker, and what has to survive the node is in the
//! bucket when fsync returns. That goes for write-back too: close there is as durable as close on a local file system.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Intent;
use super::journal::{self, Record};

/// The staging folder of one mount.
pub(super) struct Folder {
    path: PathBuf,
    next: AtomicU64,
    /// Descriptors of staged files that are open.
    open: AtomicUsize,
    /// Held while this process uses the folder.
    _lock: File,
}

/// The files of one dirty file.
pub(super) struct Staged {
    folder: Arc<Folder>,
    id: u64,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    log: Option<File>,
    data: Option<Arc<File>>,
    /// Where the next record goes.
    end: u64,
    /// The intent that the log holds, and since when.
    intent: Option<(Intent, Instant)>,
    /// There may be a sparse file.
    sparse: bool,
}

impl Folder {
    /// Opens the folder, which is made if missing and belongs to one process at a time.
    pub(super) fn open(path: PathBuf) -> io::Result<Arc<Self>> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path.join("lock"))?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => {
                io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is in use by another worker", path.display()))
            }
            std::fs::TryLockError::Error(error) => error,
        })?;
        let folder = Self { path, next: AtomicU64::new(0), open: AtomicUsize::new(0), _lock: lock };
        let last = folder.ids()?.into_iter().max();
        folder.next.store(last.map_or(0, |last| last + 1), Ordering::Relaxed);
        Ok(Arc::new(folder))
    }

    /// Numbers of the files in it, in the order in which they were made.
    pub(super) fn ids(&self) -> io::Result<Vec<u64>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            let Some((stem, ending)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
            if let Ok(id) = u64::from_str_radix(stem, 16)
                && matches!(ending, "log" | "data" | "new")
            {
                ids.push(id);
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Descriptors in use.
    pub(super) fn descriptors(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    fn file(&self, id: u64, ending: &str) -> PathBuf {
        self.path.join(format!("{id:016x}.{ending}"))
    }
}

impl Staged {
    /// A new log that begins with these records.
    pub(super) fn create(folder: &Arc<Folder>, intent: &Intent, records: &[Record]) -> io::Result<Self> {
        let id = folder.next.fetch_add(1, Ordering::Relaxed);
        let mut bytes = journal::MAGIC.to_vec();
        journal::encode(&Record::Intent(intent.clone()), &mut bytes);
        records.iter().for_each(|record| journal::encode(record, &mut bytes));
        let staged = Self { folder: folder.clone(), id, files: Mutex::default() };
        let path = folder.file(id, "log");
        let log = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        folder.open.fetch_add(1, Ordering::Relaxed);
        {
            let mut files = staged.files();
            files.log = Some(log);
            files.intent = Some((intent.clone(), Instant::now()));
        }
        if let Err(error) = staged.append(&bytes) {
            staged.remove();
            return Err(error);
        }
        Ok(staged)
    }

    /// What an earlier process left under this number: its log, cut where it is torn. `None`: nothing that was
    /// acknowledged.
    pub(super) fn recover(folder: &Arc<Folder>, id: u64) -> io::Result<Option<(Self, Vec<Record>)>> {
        let files = Files { sparse: true, ..Files::default() };
        let staged = Self { folder: folder.clone(), id, files: Mutex::new(files) };
        let bytes = match std::fs::read(folder.file(id, "log")) {
            Ok(bytes) => bytes,
            // The log goes first when a file is forgotten, and comes first when it is made.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                staged.remove();
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let Some((records, end)) = journal::decode(&bytes) else {
            if journal::MAGIC.starts_with(&bytes) {
                staged.remove();
                return Ok(None);
            }
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a log of this version"));
        };
        let intent = records.iter().rev().find_map(|record| match record {
            Record::Intent(intent) => Some(intent.clone()),
            _ => None,
        });
        let Some(intent) = intent else {
            staged.remove();
            return Ok(None);
        };
        let mut files = staged.files();
        files.end = end;
        files.intent = Some((intent, Instant::now()));
        if end < bytes.len() as u64 {
            staged.log(&mut files)?.set_len(end)?;
        }
        drop(files);
        Ok(Some((staged, records)))
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log<'a>(&self, files: &'a mut Files) -> io::Result<&'a File> {
        if files.log.is_none() {
            files.log = Some(OpenOptions::new().read(true).write(true).open(self.folder.file(self.id, "log"))?);
            self.folder.open.fetch_add(1, Ordering::Relaxed);
        }
        files.log.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Appends encoded records, whole or not at all.
    pub(super) fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut files = self.files();
        let end = files.end;
        let log = self.log(&mut files)?;
        if let Err(error) = log.write_all_at(bytes, end) {
            // A record that is there in part would hide those after it only until it is overwritten; still, be tidy.
            let _ = log.set_len(end);
            return Err(error);
        }
        files.end += bytes.len() as u64;
        Ok(())
    }

    /// Appends one record.
    pub(super) fn record(&self, record: &Record) -> io::Result<()> {
        let mut bytes = Vec::new();
        journal::encode(record, &mut bytes);
        self.append(&bytes)
    }

    /// The record of an intent, if it has to be logged: with another key, condition or attributes at once. Times, which
    /// change with each write, wait for `spare`.
    pub(super) fn changed(&self, intent: &Intent, now: bool, spare: std::time::Duration) -> Option<Record> {
        let mut files = self.files();
        if let Some((logged, at)) = &files.intent {
            if logged == intent {
                return None;
            }
            let but_times = |intent: &Intent| {
                let mut intent = intent.clone();
                intent.metadata.user.retain(|name, _| name != "mtime" && name != "ctime" && name != "atime");
                intent
            };
            if !now && at.elapsed() < spare && but_times(logged) == but_times(intent) {
                return None;
            }
        }
        files.intent = Some((intent.clone(), Instant::now()));
        Some(Record::Intent(intent.clone()))
    }

    /// The intent as the log has it.
    pub(super) fn intent(&self) -> Option<Intent> {
        self.files().intent.as_ref().map(|(intent, _)| intent.clone())
    }

    /// How long the log is.
    pub(super) fn log_size(&self) -> u64 {
        self.files().end
    }

    /// Replaces the log by one that says the same in fewer records.
    pub(super) fn rewrite(&self, records: &[Record]) -> io::Result<()> {
        let mut bytes = journal::MAGIC.to_vec();
        records.iter().for_each(|record| journal::encode(record, &mut bytes));
        let mut files = self.files();
        let fresh = self.folder.file(self.id, "new");
        let log = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        log.write_all_at(&bytes, 0)?;
        std::fs::rename(&fresh, self.folder.file(self.id, "log"))?;
        if files.log.replace(log).is_none() {
            self.folder.open.fetch_add(1, Ordering::Relaxed);
        }
        files.end = bytes.len() as u64;
        Ok(())
    }

    /// The sparse file; with `fresh` a new, empty one.
    pub(super) fn data(&self, fresh: bool) -> io::Result<Arc<File>> {
        let mut files = self.files();
        if let Some(data) = &files.data
            && !fresh
        {
            return Ok(data.clone());
        }
        let path = self.folder.file(self.id, "data");
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if fresh {
            files.sparse = true;
            options.create(true).truncate(true);
        }
        let data = Arc::new(options.open(path)?);
        if files.data.replace(data.clone()).is_none() {
            self.folder.open.fetch_add(1, Ordering::Relaxed);
        }
        Ok(data)
    }

    /// Gives the descriptors back; they are opened again when needed.
    pub(super) fn close(&self) {
        let mut files = self.files();
        let closed = usize::from(files.log.take().is_some()) + usize::from(files.data.take().is_some());
        self.folder.open.fetch_sub(closed, Ordering::Relaxed);
    }

    /// Gives the sparse file another name beside its own.
    pub(super) fn link(&self, path: &Path) -> io::Result<()> {
        std::fs::hard_link(self.folder.file(self.id, "data"), path)
    }

    /// All bytes of the log, to read a small file again.
    pub(super) fn records(&self) -> io::Result<Vec<Record>> {
        let bytes = std::fs::read(self.folder.file(self.id, "log"))?;
        let found = journal::decode(&bytes).ok_or(io::ErrorKind::InvalidData)?;
        Ok(found.0)
    }

    /// Forgets it: without its log the rest is nothing.
    pub(super) fn remove_log(&self) {
        let path = self.folder.file(self.id, "log");
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(file = %path.display(), %error, "cannot remove a staged file");
        }
    }

    /// May there be a sparse file?
    pub(super) fn is_sparse(&self) -> bool {
        self.files().sparse
    }

    /// Gives the disk space back, once the log is gone.
    pub(super) fn remove_data(&self) {
        if self.is_sparse() {
            let _ = std::fs::remove_file(self.folder.file(self.id, "data"));
        }
        self.close();
    }

    /// Forgets it all.
    pub(super) fn remove(&self) {
        self.remove_log();
        self.remove_data();
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.close();
    }
}
