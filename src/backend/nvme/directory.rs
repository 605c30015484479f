//! The carve `directory`: `data/` beside the descriptor, with a project id of its own and hard limits for it.
//!
//! Nothing here starts a program. Ids are random, so that nobody guesses another volume's or the pool's own.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::files;
use crate::host::quota::{self, Usage};

/// What the pod sees, in a volume's folder.
pub(super) const DATA: &str = "data";

/// One inode for so many bytes, as mkfs.ext4 gives: no limit in bytes counts the pool's space that empty files take.
const BYTES_PER_INODE: u64 = 16 << 10;
const FEWEST_INODES: u64 = 1024;

/// The smallest volume: XFS needs a few blocks for the first directory alone.
pub(super) const MINIMUM: u64 = 1 << 20;

/// A volume's directory, as the pool's books know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Directory {
    /// Its project, as the descriptor says; the directory's owner can change what the directory says. `None`: the
    /// descriptor is damaged.
    pub(super) project: Option<u32>,
    /// The inode of `data/`, by which a mount of it is recognised.
    pub(super) inode: u64,
}

/// The directory that a folder in the pool holds, and the size of the volume. `None`: this is another carve, or nothing.
pub(super) fn look(folder: &Path) -> Option<(u64, Directory)> {
    let data = File::open(data_of(folder)).ok()?;
    let inode = data.metadata().ok()?.ino();
    match VolumeDescriptor::read_as_it_is(folder) {
        Ok(VolumeDescriptor { id, size, contents: Contents::Directory { project }, .. })
            if folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&id)) =>
        {
            Some((size, Directory { project: Some(project), inode }))
        }
        _ => {
            let limit = quota::project_of(&data).and_then(|project| quota::usage(&data, project));
            Some((limit.map_or(0, |usage| usage.limit), Directory { project: None, inode }))
        }
    }
}

/// The volume whose directory has such a path in its pool: `.../volumes/ID/data`.
pub(super) fn volume_of(path: &Path) -> Option<&str> {
    let folder = path.parent().filter(|_| path.ends_with(DATA))?;
    folder.file_name()?.to_str()
}

pub(super) fn data_of(folder: &Path) -> PathBuf {
    folder.join(DATA)
}

/// Makes an empty directory of this size, with its descriptor beside it. The limits are in force before there is anything to
/// limit.
pub(super) fn make(folder: &Path, project: u32, descriptor: &VolumeDescriptor) -> Result<Directory> {
    let path = data_of(folder);
    let what = || format!("cannot make {}", path.display());
    std::fs::DirBuilder::new().mode(0o755).create(&path).context(what)?;
    // The process' umask is for what only we read.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).context(what)?;
    let data = File::open(&path).context(what)?;
    quota::set_project(&data, project)?;
    limit(&data, project, descriptor.size)?;
    // In this order the second sync finds nothing to do: the journal has all up to the descriptor then.
    descriptor.write_new(folder)?;
    data.sync_all().context(what)?;
    Ok(Directory { project: Some(project), inode: data.metadata().context(what)?.ino() })
}

/// Puts a volume's limits in force.
pub(super) fn limit(on: &File, project: u32, size: u64) -> Result<()> {
    quota::set_limits(on, project, size, (size / BYTES_PER_INODE).max(FEWEST_INODES))
}

/// A project id that nothing has.
///
/// # Errors
/// `Internal` when the kernel has no random numbers, or every id tried is taken.
pub(super) fn free_project(on: &File, taken: &BTreeSet<u32>) -> Result<u32> {
    for _ in 0..64 {
        let mut bytes = [0; 4];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .context(|| "cannot get random numbers".to_owned())?;
        // Small numbers are what people give by hand.
        let project = u32::from_le_bytes(bytes) >> 1 | 1 << 20;
        if !taken.contains(&project) && quota::usage(on, project)? == Usage::default() {
            return Ok(project);
        }
    }
    Err(Error::new(ErrorKind::Internal, "no project id is free among 64 random ones"))
}

/// The project of the pool's own files. A pool that has none yet gets one, and so does every file of ours in it.
pub(super) fn own_project(pool: &Path, folders: &[&str]) -> Result<u32> {
    let what = || format!("cannot look through {}", pool.display());
    let root = File::open(pool).context(what)?;
    let own = quota::project_of(&root)?;
    if own != 0 {
        return Ok(own);
    }
    let own = free_project(&root, &BTreeSet::new())?;
    let adopt = |path: &Path| quota::set_project(&files::open_plain(path).context(what)?, own);
    let entries =
        |path: &Path| std::fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).context(what);
    for file in entries(pool)?.iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())) {
        adopt(&file.path())?;
    }
    for folder in folders {
        let folder = pool.join(folder);
        for thing in entries(&folder)? {
            // What a tenant owns is not ours.
            for file in entries(&thing.path())?.iter().filter(|file| file.file_name() != DATA) {
                adopt(&file.path())?;
            }
            adopt(&thing.path())?;
        }
        adopt(&folder)?;
    }
    // The last: an interrupted call begins anew.
    quota::set_project(&root, own)?;
    Ok(own)
}

/// What the directories will yet take, of what they were promised.
pub(super) fn needed<'a>(on: &File, sizes: impl Iterator<Item = (u64, &'a Directory)>) -> Result<u64> {
    let mut needed = 0_u64;
    for (size, directory) in sizes {
        let used = directory.project.map_or(Ok(0), |project| quota::usage(on, project).map(|usage| usage.bytes))?;
        needed = needed.saturating_add(size.saturating_sub(used));
    }
    Ok(needed)
}

/// What XFS takes for an inode, in bytes, unless it was made otherwise.
const INODE: u64 = 512;

/// Bytes of every project that is no volume's nor the pool's, empty files included: somebody has changed the id of files.
pub(super) fn stray(on: &File, known: &BTreeSet<u32>) -> Result<u64> {
    let (mut stray, mut from) = (0, 0);
    while let Some((project, usage)) = quota::next(on, from)? {
        if !known.contains(&project) {
            stray += usage.bytes + usage.inodes * INODE;
        }
        match project.checked_add(1) {
            Some(next) => from = next,
            None => break,
        }
    }
    Ok(stray)
}
