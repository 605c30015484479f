//! Opening what a caller named, without following a symbolic link anywhere on the way.
//!
//! Everything is then done to the descriptor, so that a path swapped in the middle of a call leads nowhere
//! (CVE-2021-25741, CVE-2017-1002101).

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, ErrorKind, Result};

/// Where a target or staging path's own directories get this mode; kubelet makes its own likewise.
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o750);
const FILE_MODE: Mode = Mode::from_raw_mode(0o600);

/// What shall be at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory, to mount a file system on.
    Directory,
    /// A regular file, to bind a device on.
    File,
}

/// Opens a path as a location (O_PATH). `None`: there is nothing.
///
/// # Errors
/// `Invalid` when a part of it is a symbolic link.
pub fn open(path: &Path) -> Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS)
    {
        Ok(fd) => {
            // O_NOFOLLOW with O_PATH opens a link itself.
            match look(&fd) {
                Ok(stat) if rustix::fs::FileType::from_raw_mode(u32::from(stat.stx_mode)).is_symlink() => {
                    refuse_link(path)
                }
                _ => Ok(Some(fd)),
            }
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(Errno::LOOP) => refuse_link(path),
        Err(error) => Err(Error::io(format!("cannot open {}", path.display()), error)),
    }
}

/// What the kernel knows of it. A file system whose server is gone is not asked: that would hang.
pub(super) fn look(fd: &OwnedFd) -> rustix::io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(fd, "", flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

fn refuse_link(path: &Path) -> Result<Option<OwnedFd>> {
    fail!(Invalid, "{} is or lies behind a symbolic link: give the real path", path.display())
}

/// Opens the path, making its last part if it is missing. Also says whether it made it.
///
/// # Errors
/// `Precondition` when the parent is missing or something of another kind is there.
pub fn ensure(path: &Path, kind: Kind) -> Result<(OwnedFd, bool)> {
    let (parent, name) = open_parent(path)?
        .ok_or_else(|| Error::new(ErrorKind::Precondition, format!("the parent of {} is missing", path.display())))?;
    let made = match kind {
        Kind::Directory => rustix::fs::mkdirat(&parent, name, DIRECTORY_MODE),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            rustix::fs::openat(&parent, name, flags, FILE_MODE).map(drop)
        }
    };
    let made = match made {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(Error::io(format!("cannot make {}", path.display()), error)),
    };
    let fd = open(path)?
        .ok_or_else(|| Error::new(ErrorKind::Precondition, format!("{} vanished while it was used", path.display())))?;
    let stat = look(&fd).context(|| format!("cannot look at {}", path.display()))?;
    let is_directory = rustix::fs::FileType::from_raw_mode(u32::from(stat.stx_mode)).is_dir();
    if is_directory != (kind == Kind::Directory) {
        let (wanted, found) = if is_directory { ("file", "directory") } else { ("directory", "file") };
        fail!(Precondition, "{} is a {found}, but a {wanted} is needed", path.display());
    }
    if made && is_directory {
        // The process' umask has made it more private. By its descriptor: the name may lead elsewhere by now.
        rustix::fs::chmod(of_fd(&fd), DIRECTORY_MODE)
            .context(|| format!("cannot open {} to its users", path.display()))?;
    }
    Ok((fd, made))
}

/// Removes a path that holds nothing: an empty directory or an empty file. Gone already is success.
///
/// # Errors
/// `Precondition` for anything else: never recursively, never contents.
pub fn remove_empty(path: &Path) -> Result<()> {
    let Some((parent, name)) = open_parent(path)? else { return Ok(()) };
    let stat = match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
    };
    let flags = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::Directory => AtFlags::REMOVEDIR,
        rustix::fs::FileType::RegularFile if stat.st_size == 0 => AtFlags::empty(),
        _ => fail!(Precondition, "{} is neither an empty directory nor an empty file: left alone", path.display()),
    };
    match rustix::fs::unlinkat(&parent, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTEMPTY) => fail!(Precondition, "{} is not empty: left alone", path.display()),
        Err(error) => Err(Error::io(format!("cannot remove {}", path.display()), error)),
    }
}

/// The parent as a descriptor and the last part. `None`: no parent.
pub fn open_parent(path: &Path) -> Result<Option<(OwnedFd, &OsStr)>> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        fail!(Invalid, "{} has no parent", path.display());
    };
    Ok(open(parent)?.map(|fd| (fd, name)))
}

/// A path by which a system call reaches what the descriptor is open on.
pub fn of_fd(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbolic_link_anywhere_on_the_way_is_invalid() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        assert!(open(&dir.path().join("real")).unwrap().is_some());
        for path in ["link", "link/below"] {
            assert_eq!(open(&dir.path().join(path)).unwrap_err().kind(), ErrorKind::Invalid, "{path}");
            assert_eq!(ensure(&dir.path().join(path), Kind::Directory).unwrap_err().kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn only_what_is_empty_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        remove_empty(&path).unwrap();
        remove_empty(&path.join("below")).unwrap();
        for kind in [Kind::Directory, Kind::File] {
            assert!(ensure(&path, kind).unwrap().1);
            assert!(!ensure(&path, kind).unwrap().1);
            remove_empty(&path).unwrap();
            assert!(open(&path).unwrap().is_none());
        }
        std::fs::write(&path, "user data").unwrap();
        assert_eq!(remove_empty(&path).unwrap_err().kind(), ErrorKind::Precondition);
        assert_eq!(ensure(&path, Kind::Directory).unwrap_err().kind(), ErrorKind::Precondition);
        assert_eq!(std::fs::read(&path).unwrap(), b"user data");
    }
}
