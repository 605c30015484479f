//! Files that must survive a crash, and the file systems that they lie on.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Replaces a file's contents so that a crash leaves either the old or the new, never a mix: a temporary file beside
/// it, fsync, rename, fsync of the directory.
pub fn write_durably(path: &Path, contents: &[u8]) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh).context(what)?;
    file.write_all(contents).and_then(|()| file.sync_all()).context(what)?;
    rename_durably(&fresh, path)
}

/// Makes a file that is not there yet, durable but for its name: the directory has to be synced before it is shown.
pub fn write_new(path: &Path, contents: &[u8]) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let mut file = File::create_new(path).context(what)?;
    file.write_all(contents).and_then(|()| file.sync_all()).context(what)
}

/// Renames and makes that durable: a commit point. Both sides lie on one file system, whose journal has a rename whole
/// or not at all, so one of the two directories is enough.
pub fn rename_durably(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
    sync_directory(to.parent().unwrap_or(to))
}

/// Makes a directory's entries durable.
pub fn sync_directory(directory: &Path) -> Result<()> {
    let what = || format!("cannot sync {}", directory.display());
    File::open(directory).and_then(|directory| directory.sync_all()).context(what)
}

/// Makes a file of `size` bytes. With `reserve`, the file system has set aside the space when this returns.
///
/// # Errors
/// `Exhausted` when there is no room.
pub fn create_sized(path: &Path, size: u64, reserve: bool) -> Result<File> {
    let what = || format!("cannot make {} of {size} bytes", path.display());
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).context(what)?;
    resize(&file, size, reserve).context(what)?;
    Ok(file)
}

/// Brings a file to `size` bytes, setting aside the space with `reserve`. What it held stays.
pub fn resize(file: &File, size: u64, reserve: bool) -> std::io::Result<()> {
    if reserve {
        // KEEP_SIZE first: a failure for want of space must not leave the file looking bigger.
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, size)?;
    }
    file.set_len(size)
}

/// Throws away all contents; the size stays, and so does the space set aside.
pub fn blank(file: &File) -> Result<()> {
    let size = file.metadata().context(|| "cannot look at an image".to_owned())?.len();
    rustix::fs::fallocate(file, FallocateFlags::ZERO_RANGE, 0, size)
        .or_else(|error| match error {
            Errno::OPNOTSUPP => {
                rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, size)
            }
            error => Err(error),
        })
        .context(|| "cannot blank an image".to_owned())
}

/// Makes a range within a file read as zeros; the file's size stays. Gives the space back where the file system can.
pub fn punch(file: &File, range: std::ops::Range<u64>) -> std::io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, range.start, range.end - range.start)?)
}

/// Opens a plain file to read, and nothing that somebody may have put in its place: no link is followed, no FIFO waited
/// for.
pub fn open_plain(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

/// Has nothing ever been written to this file? Space that was only set aside does not count.
pub fn is_blank(file: &File) -> Result<bool> {
    match rustix::fs::seek(file, SeekFrom::Data(0)) {
        Err(Errno::NXIO) => Ok(true),
        Ok(_) => Ok(false),
        Err(error) => Err(Error::io("cannot tell whether an image is blank", error)),
    }
}

/// Makes `to` share all of `from`'s blocks, as of this instant (reflink). `to` is new.
pub fn reflink(from: &File, to: &Path) -> Result<File> {
    let what = || format!("cannot clone into {}", to.display());
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to).context(what)?;
    rustix::fs::ioctl_ficlone(&file, from).context(what)?;
    Ok(file)
}

/// Removes a directory of plain files, and nothing deeper: what is in it is what we put there. Gone already is fine.
pub fn remove_flat_directory(path: &Path) -> Result<()> {
    let what = || format!("cannot remove {}", path.display());
    let gone_is_fine = |result: std::io::Result<()>| match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match std::fs::read_dir(path) {
        Ok(entries) => {
            for entry in entries {
                gone_is_fine(std::fs::remove_file(entry.context(what)?.path())).context(what)?;
            }
        }
        Err(error) => return gone_is_fine(Err(error)).context(what),
    }
    gone_is_fine(std::fs::remove_dir(path)).context(what)
}

/// Holds an advisory lock on a file, against other processes and threads alike, until dropped.
pub struct FileLock(File);

impl FileLock {
    /// Waits for the lock of the file at `path`, which is made if missing.
    pub fn acquire(path: &Path) -> Result<Self> {
        let what = || format!("cannot lock {}", path.display());
        let file = Self::open(path)?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive)).context(what)?;
        Ok(Self(file))
    }

    /// Takes the lock of the file at `path`, which is made if missing. `None`: somebody has it.
    pub fn try_acquire(path: &Path) -> Result<Option<Self>> {
        let file = Self::open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(Error::io(format!("cannot lock {}", path.display()), error)),
        }
    }

    fn open(path: &Path) -> Result<File> {
        let what = || format!("cannot lock {}", path.display());
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).context(what)
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.0
    }
}

/// What a file system has, in bytes, and how it may be used.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// What an ordinary user can still write.
    pub free: u64,
    /// Nothing can be written.
    pub read_only: bool,
}

/// Asks the file system that holds `path`.
pub fn space(path: &Path) -> Result<Space> {
    let stat = rustix::fs::statvfs(path).context(|| format!("cannot ask {} for its space", path.display()))?;
    Ok(Space {
        total: stat.f_blocks * stat.f_frsize,
        free: stat.f_bavail * stat.f_frsize,
        read_only: stat.f_flag.contains(StatVfsMountFlags::RDONLY),
    })
}

/// The file system's device number: equal for two paths exactly when they lie on one file system (or subvolume).
pub fn device_of(path: &Path) -> Result<u64> {
    Ok(rustix::fs::stat(path).context(|| format!("cannot look at {}", path.display()))?.st_dev)
}

/// The number of the device that this device file stands for. `None`: there is no such file.
///
/// # Errors
/// When it can't be looked at.
pub fn device_number(device: &Path) -> Result<Option<u64>> {
    match std::fs::metadata(device) {
        Ok(stat) => Ok(Some(stat.rdev())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(|| format!("cannot look at {}", device.display())),
    }
}

/// The alignment that direct I/O to this file needs, in bytes; 512 where the kernel can't tell (before Linux 6.1).
pub fn direct_io_alignment(file: &File) -> Result<u32> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .context(|| "cannot ask for the alignment of direct I/O".to_owned())?;
    Ok(stat.stx_dio_offset_align.max(512))
}

/// Can files in this directory share blocks? Tried on two nameless files, which vanish by themselves.
pub fn has_reflink(directory: &Path) -> Result<bool> {
    let nameless = || {
        rustix::fs::open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
            .context(|| format!("cannot make a nameless file in {}", directory.display()))
    };
    let (from, to) = (nameless()?, nameless()?);
    rustix::io::write(&from, &[1; 4096]).context(|| format!("cannot write to {}", directory.display()))?;
    Ok(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
}

/// A file that is nowhere but in memory, and gone when it is closed. A program started meanwhile can open it at
/// [`path_of`], and does not inherit it.
pub fn in_memory(name: &str) -> Result<File> {
    let made = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC);
    Ok(File::from(made.context(|| "cannot make a file in memory".to_owned())?))
}

/// Where another process of this user finds a file that this one has open.
pub fn path_of(file: &File) -> PathBuf {
    let pid = rustix::process::getpid().as_raw_nonzero();
    PathBuf::from(format!("/proc/{pid}/fd/{}", file.as_raw_fd()))
}

/// Writes everything that is dirty in the file system mounted at `path` to its device.
pub fn sync_filesystem(path: &Path) -> Result<()> {
    let what = || format!("cannot sync the file system at {}", path.display());
    rustix::fs::syncfs(File::open(path).context(what)?).context(what)
}

/// Writes what the page cache holds of a device to the device.
pub fn sync_device(device: &Path) -> Result<()> {
    File::open(device).and_then(|device| device.sync_all()).context(|| format!("cannot sync {}", device.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_set_aside_is_blank_until_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut file = create_sized(&path, 1 << 20, true).unwrap();
        assert!(is_blank(&file).unwrap());
        file.write_all(b"x").unwrap();
        file.sync_all().unwrap();
        assert!(!is_blank(&file).unwrap());
        blank(&file).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; 1 << 20]);
    }

    #[test]
    fn replacing_a_file_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume.json");
        write_durably(&path, b"one").unwrap();
        write_durably(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        remove_flat_directory(&dir.path().join("none")).unwrap();
    }
}
