//! The node's cache: blocks of objects as files, shared by all mounts and workers of the node, across restarts.
//!
//! A block's name is a hash over service, bucket, key, etag, its size and its number, so what is found is never stale:
//! another version has other names. A file is written under a temporary name and renamed; it says which block it is and
//! has a checksum for each chunk, so that what is torn, foreign or cut counts as not there. The workers of a node are of
//! one trust: whoever can write here as one of them can make up blocks with right checksums.
//!
//! The folders are like `/tmp` without the right to list: every worker may add, and read what it knows the name of; nobody
//! else gets in. So a worker can't evict; [`evict`] is for who can list, the mounter, and is tried by everybody. One level of
//! folders keeps each at a few thousand files.
//!
//! Nothing here may fail or delay a read: a full disk, a missing right or a queue that is behind only mean no cache.

use std::collections::VecDeque;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::Version;
use super::block::Block;
use super::file::read_up_to;
use super::journal::checksum;
use crate::host::files::open_plain;

const MAGIC: &[u8; 8] = b"BERTHBK1";

/// A block's last use is noted at most so often.
const TOUCH: Duration = Duration::from_secs(60);

/// After a failure nothing is written for so long.
const PAUSE: Duration = Duration::from_secs(30);

/// A temporary file of this age is nobody's.
const STALE: Duration = Duration::from_secs(3600);

/// The cache as one mount sees it.
pub(super) struct Cache {
    folder: PathBuf,
    limit: u64,
    /// Hash state over service and bucket.
    seed: Sha256,
    /// Size of whole blocks, and of pieces of blocks.
    block: u64,
    piece: u64,
    /// Bytes that may wait to be written.
    most_waiting: u64,
    queue: Mutex<Queue>,
    temporary: AtomicU64,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<(Version, Arc<Block>)>,
    bytes: u64,
    running: bool,
    paused: Option<Instant>,
    /// Written since the last eviction.
    written: Option<u64>,
}

impl Cache {
    /// Sizes in bytes; `block` is a multiple of `piece`. `most_waiting`: that much may wait to be written.
    pub(super) fn new(
        (folder, limit): (&Path, u64),
        (url, bucket): (&str, &str),
        (block, piece): (u64, u64),
        most_waiting: u64,
    ) -> Self {
        let mut seed = Sha256::new();
        for text in [url, bucket] {
            seed.update((text.len() as u64).to_le_bytes());
            seed.update(text);
        }
        let folder = folder.to_owned();
        let (queue, temporary) = (Mutex::default(), AtomicU64::new(0));
        Self { folder, limit, seed, block, piece, most_waiting, queue, temporary }
    }

    fn name(&self, version: &Version, unit: u64, number: u64) -> [u8; 32] {
        let mut hash = self.seed.clone();
        for text in [&version.key, &version.etag.0] {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hash.update(unit.to_le_bytes());
        hash.update(number.to_le_bytes());
        hash.finalize().into()
    }

    fn path(&self, name: &[u8; 32]) -> PathBuf {
        let hex: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        self.folder.join(&hex[..2]).join(&hex[2..])
    }

    /// A range within one block, from the file of the block or those of its pieces. Blocks on the disk.
    pub(super) fn read(&self, version: &Version, range: &Range<u64>) -> Option<Vec<Bytes>> {
        if let Some(bytes) = self.read_unit(version, self.block, range) {
            return Some(vec![bytes]);
        }
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % self.piece + self.piece).min(range.end);
            found.push(self.read_unit(version, self.piece, &(at..end))?);
            at = end;
        }
        Some(found)
    }

    /// A range within one unit of this size.
    fn read_unit(&self, version: &Version, unit: u64, range: &Range<u64>) -> Option<Bytes> {
        let number = range.start / unit;
        let name = self.name(version, unit, number);
        let file = open_plain(&self.path(&name)).ok()?;
        let metadata = file.metadata().ok().filter(|metadata| metadata.is_file())?;
        let length = unit.min(version.size - number * unit);
        let chunk = self.chunk();
        let header = header_size(length, chunk);
        if metadata.len() != header + length {
            return None;
        }
        let within = range.start - number * unit..range.end - number * unit;
        let chunks = within.start / chunk..within.end.div_ceil(chunk);
        let span = chunks.start * chunk..(chunks.end * chunk).min(length);
        let mut head = vec![0; header as usize];
        file.read_exact_at(&mut head, 0).ok()?;
        let sums = check_header(&head, &name, length)?;
        let mut bytes = vec![0; (span.end - span.start) as usize];
        (read_up_to(&file, &mut bytes, header + span.start).ok()? == bytes.len()).then_some(())?;
        let sums = &sums[chunks.start as usize * 8..];
        for (piece, sum) in bytes.chunks(chunk as usize).zip(sums.chunks_exact(8)) {
            if checksum(piece).to_le_bytes() != sum {
                return None;
            }
        }
        if metadata.modified().ok().and_then(|time| time.elapsed().ok()).is_some_and(|age| age > TOUCH) {
            // Only its owner may.
            let _ = file.set_modified(SystemTime::now());
        }
        let from = (within.start - span.start) as usize;
        Some(Bytes::from(bytes).slice(from..from + (range.end - range.start) as usize))
    }

    /// Chunks have a checksum each.
    fn chunk(&self) -> u64 {
        (self.piece / 2).max(1)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a whole block to be written, unless too much is waiting.
    pub(super) fn offer(self: &Arc<Self>, version: &Version, block: &Arc<Block>) {
        let length = block.range().end - block.range().start;
        let mut queue = self.queue();
        if queue.bytes + length > self.most_waiting || queue.paused.is_some_and(|since| since.elapsed() < PAUSE) {
            return;
        }
        queue.bytes += length;
        queue.jobs.push_back((version.clone(), block.clone()));
        if !std::mem::replace(&mut queue.running, true) {
            let cache = self.clone();
            tokio::task::spawn_blocking(move || cache.work());
        }
    }

    /// Writes what is waiting, and evicts from time to time.
    fn work(&self) {
        loop {
            let job = {
                let mut queue = self.queue();
                let job = queue.jobs.pop_front();
                queue.running = job.is_some();
                job
            };
            let Some((version, block)) = job else { return };
            let range = block.range();
            let length = range.end - range.start;
            let stored = block.whole().map_or(Ok(()), |pieces| self.store(&version, &range, &pieces));
            drop(block);
            let due = {
                let mut queue = self.queue();
                queue.bytes -= length;
                if let Err(error) = &stored {
                    tracing::debug!(folder = %self.folder.display(), %error, "cannot cache");
                    queue.paused = Some(Instant::now());
                }
                let written = queue.written.map_or(self.limit, |written| written + length);
                let due = written >= self.limit / 20;
                queue.written = Some(if due { 0 } else { written });
                due
            };
            if due && let Err(error) = evict(&self.folder, self.limit) {
                tracing::debug!(folder = %self.folder.display(), %error, "cannot evict from the cache");
            }
        }
    }

    /// Stores a range: as a block if it is one, otherwise each whole piece in it.
    fn store(&self, version: &Version, range: &Range<u64>, bytes: &[Bytes]) -> io::Result<()> {
        let is_unit = |unit: u64, range: &Range<u64>| {
            range.start.is_multiple_of(unit) && range.end == (range.start + unit).min(version.size)
        };
        if is_unit(self.block, range) {
            return self.store_unit(version, self.block, range, bytes);
        }
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % self.piece + self.piece).min(range.end);
            if is_unit(self.piece, &(at..end)) {
                self.store_unit(version, self.piece, &(at..end), &cut(bytes, at - range.start..end - range.start))?;
            }
            at = end;
        }
        Ok(())
    }

    fn store_unit(&self, version: &Version, unit: u64, range: &Range<u64>, bytes: &[Bytes]) -> io::Result<()> {
        let name = self.name(version, unit, range.start / unit);
        let path = self.path(&name);
        let (length, chunk) = (range.end - range.start, self.chunk());
        let mut file = MAGIC.to_vec();
        file.extend(name);
        file.extend(length.to_le_bytes());
        let header = header_size(length, chunk) as usize;
        let mut body = Vec::with_capacity(header + length as usize);
        body.resize(header, 0);
        bytes.iter().for_each(|piece| body.extend_from_slice(piece));
        body[header..].chunks(chunk as usize).for_each(|chunk| file.extend(checksum(chunk).to_le_bytes()));
        file.extend(checksum(&file).to_le_bytes());
        body[..header].copy_from_slice(&file);
        let folder = path.parent().unwrap_or(&self.folder);
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = folder.join(format!("new-{}-{number}", std::process::id()));
        let mut fresh = match create(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_folder(&self.folder)?;
                self.make_folder(folder)?;
                create(&temporary)?
            }
            other => other?,
        };
        let written = fresh
            .write_all(&body)
            .and_then(|()| fresh.set_permissions(Permissions::from_mode(0o644)))
            .and_then(|()| std::fs::rename(&temporary, &path));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => std::fs::set_permissions(path, Permissions::from_mode(0o1733)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn header_size(length: u64, chunk: u64) -> u64 {
    8 + 32 + 8 + 8 * length.div_ceil(chunk) + 8
}

/// The checksums of the chunks, if this is the header of that block.
fn check_header<'a>(header: &'a [u8], name: &[u8; 32], length: u64) -> Option<&'a [u8]> {
    let (said, sum) = header.split_at_checked(header.len() - 8)?;
    let right = said.starts_with(MAGIC)
        && said.get(8..40)? == name
        && said.get(40..48)? == length.to_le_bytes()
        && checksum(said).to_le_bytes() == sum;
    right.then(|| &said[48..])
}

/// A range of bytes that come in pieces.
fn cut(pieces: &[Bytes], range: Range<u64>) -> Vec<Bytes> {
    let mut found = Vec::new();
    let mut at = 0;
    for piece in pieces {
        let end = at + piece.len() as u64;
        let (from, to) = (range.start.max(at), range.end.min(end));
        if from < to {
            found.push(piece.slice((from - at) as usize..(to - at) as usize));
        }
        at = end;
    }
    found
}

/// Brings a cache folder to at most `limit` bytes: those that were not used for longest go first. For whoever can list
/// the folder; does nothing if another process is at it.
///
/// # Errors
/// The folder can't be listed.
pub fn evict(folder: &Path, limit: u64) -> io::Result<()> {
    let lock = File::open(folder)?;
    if lock.try_lock().is_err() {
        return Ok(());
    }
    let (mut found, mut total) = (Vec::new(), 0);
    for shelf in std::fs::read_dir(folder)? {
        let Ok(files) = std::fs::read_dir(shelf?.path()) else { continue };
        for file in files.flatten() {
            let Ok(metadata) = file.metadata() else { continue };
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let is_new = file.file_name().to_string_lossy().starts_with("new-");
            if is_new && used.elapsed().is_ok_and(|age| age > STALE) {
                let _ = std::fs::remove_file(file.path());
                continue;
            }
            total += metadata.len();
            found.push((used, metadata.len(), file.path()));
        }
    }
    if total <= limit {
        return Ok(());
    }
    found.sort_unstable();
    for (_, size, path) in found {
        if total <= limit / 10 * 9 {
            break;
        }
        if std::fs::remove_file(&path).is_ok() {
            total -= size;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::objectfs::store::Etag;

    const BLOCK: u64 = 1024;

    fn cache(folder: &TempDir) -> Cache {
        Cache::new((&folder.path().join("cache"), 20_000), ("http://a", "bucket"), (BLOCK, 128), 1 << 20)
    }

    fn version(etag: &str) -> Version {
        Version { key: "a/b".to_owned(), etag: Etag(etag.to_owned()), size: 3000 }
    }

    fn body(length: usize) -> Vec<Bytes> {
        let bytes: Vec<u8> = (0..length).map(|index| (index * 7 % 251) as u8).collect();
        bytes.chunks(100).map(Bytes::copy_from_slice).collect()
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let shelves = std::fs::read_dir(folder).unwrap().map(|shelf| shelf.unwrap().path());
        shelves.flat_map(|shelf| std::fs::read_dir(shelf).unwrap().map(|file| file.unwrap().path())).collect()
    }

    #[test]
    fn what_was_stored_is_found_by_another_process_and_only_as_that_version() {
        let folder = TempDir::new().unwrap();
        let pieces = body(BLOCK as usize);
        cache(&folder).store(&version("1"), &(1024..2048), &pieces).unwrap();
        let all = pieces.concat();
        let again = cache(&folder);
        assert_eq!(again.read(&version("1"), &(1024..2048)).unwrap().concat(), all);
        assert_eq!(again.read(&version("1"), &(1100..1401)).unwrap().concat(), all[76..377]);
        assert!(again.read(&version("2"), &(1024..2048)).is_none());
        assert!(again.read(&version("1"), &(0..1024)).is_none());
        let other = Version { key: "a/c".to_owned(), ..version("1") };
        assert!(again.read(&other, &(1024..2048)).is_none());
        let folder_of =
            |bucket| Cache::new((&folder.path().join("cache"), 20_000), ("http://a", bucket), (BLOCK, 128), 1 << 20);
        assert!(folder_of("bucket").read(&version("1"), &(1024..2048)).is_some());
        assert!(folder_of("elsewhere").read(&version("1"), &(1024..2048)).is_none());
    }

    #[test]
    fn pieces_are_found_side_by_side() {
        let folder = TempDir::new().unwrap();
        let cache = cache(&folder);
        let all = body(952).concat();
        // The last block is short, and its last piece too.
        cache.store(&version("1"), &(2176..3000), &[Bytes::copy_from_slice(&all[..824])]).unwrap();
        assert_eq!(cache.read(&version("1"), &(2200..3000)).unwrap().concat(), all[24..824]);
        assert!(cache.read(&version("1"), &(2048..3000)).is_none());
    }

    #[test]
    fn a_torn_file_is_a_miss_wherever_it_is_torn() {
        let folder = TempDir::new().unwrap();
        let cache = cache(&folder);
        cache.store(&version("1"), &(0..1024), &body(1024)).unwrap();
        let path = files(&folder.path().join("cache")).remove(0);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut torn = good.clone();
            torn[at] ^= 1;
            std::fs::write(&path, &torn).unwrap();
            assert!(cache.read(&version("1"), &(0..1024)).is_none(), "byte {at}");
        }
        for length in [0, 10, good.len() - 1] {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(cache.read(&version("1"), &(0..1024)).is_none());
        }
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(cache.read(&version("1"), &(0..1024)).is_none());
        cache.store(&version("1"), &(0..1024), &body(1024)).unwrap();
        assert!(cache.read(&version("1"), &(0..1024)).is_some());
    }

    #[test]
    fn eviction_keeps_the_bound_and_what_was_used_last() {
        let folder = TempDir::new().unwrap();
        let cache = cache(&folder);
        let long_ago = SystemTime::now() - Duration::from_secs(5000);
        for number in 0..40 {
            cache.store(&version(&number.to_string()), &(0..1024), &body(1024)).unwrap();
        }
        for path in files(&cache.folder) {
            File::open(&path).unwrap().set_modified(long_ago).unwrap();
        }
        // Being read is being used.
        assert!(cache.read(&version("7"), &(0..1024)).is_some());
        evict(&cache.folder, 20_000).unwrap();
        let total: u64 = files(&cache.folder).iter().map(|path| path.metadata().unwrap().len()).sum();
        assert!(total <= 18_000 && total > 10_000, "{total}");
        assert!(cache.read(&version("7"), &(0..1024)).is_some());
        let mode = cache.folder.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1733);
    }
}
