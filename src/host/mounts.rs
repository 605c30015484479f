//! What is mounted where, and binding it elsewhere.
//!
//! The publish path asks about single paths (statx, statvfs) and never reads the mount table, which is as long as the
//! machine has mounts. Only `binds_of` reads it.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use procfs::process::MountInfo;
use rustix::fs::{Mode, OFlags, ResolveFlags, StatVfsMountFlags, Statx, StatxAttributes};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::filesystem::Attribute;
use super::{busy, paths};
use crate::error::{Context, Error, ErrorKind, Result};

/// What is at a path, held open so that it stays what it was.
pub struct Place {
    fd: OwnedFd,
    seen: Seen,
}

enum Seen {
    /// What statx tells.
    Whole(Box<Statx>),
    /// Its file system tells nothing: what is known comes from the mount table.
    Stopped(Stopped),
}

/// A place in a file system that has stopped after an error: even to look at it is an error.
struct Stopped {
    /// It is where this is mounted.
    is_mount: bool,
    device: u64,
    /// The mount's id.
    mount: String,
    /// What of the file system is mounted there.
    root: PathBuf,
}

impl Place {
    /// Looks at a path. `None`: there is nothing.
    ///
    /// # Errors
    /// `Invalid` when a part of it is a symbolic link.
    pub fn at(path: &Path) -> Result<Option<Self>> {
        paths::open(path)?.map(|fd| Self::of(fd, path)).transpose()
    }

    fn of(fd: OwnedFd, path: &Path) -> Result<Self> {
        let what = || format!("cannot look at {}", path.display());
        match paths::look(&fd) {
            Ok(stat) => Ok(Self { fd, seen: Seen::Whole(Box::new(stat)) }),
            Err(Errno::IO) => match Stopped::of(&fd, path)? {
                Some(stopped) => Ok(Self { fd, seen: Seen::Stopped(stopped) }),
                None => Err(Error::io(what(), Errno::IO)),
            },
            Err(error) => Err(Error::io(what(), error)),
        }
    }

    /// Is it the root of a mount? (Linux 5.8.)
    pub fn is_mount(&self) -> bool {
        match &self.seen {
            Seen::Whole(stat) => stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
            Seen::Stopped(stopped) => stopped.is_mount,
        }
    }

    /// The number of the device below this file system.
    pub fn device(&self) -> u64 {
        match &self.seen {
            Seen::Whole(stat) => rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            Seen::Stopped(stopped) => stopped.device,
        }
    }

    /// Its inode's number; 0 if its file system has stopped.
    pub fn inode(&self) -> u64 {
        match &self.seen {
            Seen::Whole(stat) => stat.stx_ino,
            Seen::Stopped(_) => 0,
        }
    }

    /// What of its file system is mounted here, if that has stopped and tells nothing itself.
    pub fn stopped_root(&self) -> Option<&Path> {
        match &self.seen {
            Seen::Whole(_) => None,
            Seen::Stopped(stopped) => Some(&stopped.root),
        }
    }

    /// The number of the device that this device file stands for.
    pub fn device_file(&self) -> Option<u64> {
        let Seen::Whole(stat) = &self.seen else { return None };
        rustix::fs::FileType::from_raw_mode(u32::from(stat.stx_mode))
            .is_block_device()
            .then(|| rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor))
    }

    /// The id of the mount that it is in, as the mount table has it.
    fn mount(&self) -> Option<String> {
        match &self.seen {
            Seen::Whole(stat) => Some(stat.stx_mnt_id.to_string()),
            Seen::Stopped(stopped) => Some(stopped.mount.clone()),
        }
    }

    /// Do both show the same file or directory of the same file system?
    pub fn is_same(&self, other: &Self) -> bool {
        self.device() == other.device() && self.inode() == other.inode() && self.inode() != 0
    }

    /// Can nothing be written through this mount?
    pub fn is_read_only(&self) -> Result<bool> {
        let stat = rustix::fs::fstatvfs(&self.fd).context(|| "cannot ask a mount for its options".to_owned())?;
        Ok(stat.f_flag.contains(StatVfsMountFlags::RDONLY))
    }

    fn is_empty(&self) -> Result<bool> {
        if let Seen::Whole(stat) = &self.seen
            && !rustix::fs::FileType::from_raw_mode(u32::from(stat.stx_mode)).is_dir()
        {
            return Ok(stat.stx_size == 0);
        }
        let mut entries = std::fs::read_dir(paths::of_fd(&self.fd)).context(|| "cannot read a directory".to_owned())?;
        Ok(entries.next().is_none())
    }
}

impl Stopped {
    /// `None`: the mount table has nothing of it.
    fn of(fd: &OwnedFd, path: &Path) -> Result<Option<Self>> {
        use std::os::fd::AsRawFd;
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
        let info = info.context(|| "cannot ask which mount a file is in".to_owned())?;
        let Some(id) = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim) else {
            return Ok(None);
        };
        let table = table()?;
        let Some(line) = lines(&table).find(|line| line.id == id) else { return Ok(None) };
        let Some((major, minor)) = line.device.split_once(':') else { return Ok(None) };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { return Ok(None) };
        Ok(Some(Self {
            is_mount: last_line_at(&table, path) == Some(line.whole),
            device: rustix::fs::makedev(major, minor),
            mount: id.to_owned(),
            root: unescaped(OsStr::new(line.root)),
        }))
    }
}

/// Is something mounted at this path?
pub fn is_mount(path: &Path) -> Result<bool> {
    Ok(Place::at(path)?.is_some_and(|place| place.is_mount()))
}

/// Is a block device's file at this path?
pub fn is_device(path: &Path) -> Result<bool> {
    Ok(Place::at(path)?.is_some_and(|place| place.device_file().is_some()))
}

/// Opens an empty place to mount on, made if missing; with whether it was.
///
/// # Errors
/// `Precondition` when something is mounted there or it is not empty.
pub fn ensure_vacant(path: &Path, kind: paths::Kind) -> Result<(OwnedFd, bool)> {
    let (fd, made) = paths::ensure(path, kind)?;
    let place = Place::of(fd, path)?;
    if place.is_mount() {
        fail!(Precondition, "something else is mounted at {}: unmount it first", path.display());
    }
    if !place.is_empty()? {
        fail!(Precondition, "{} is not empty: mounting there would hide what it holds", path.display());
    }
    Ok((place.fd, made))
}

/// Shows `source` (a staged volume's root, or its device) at `target`, made if missing. Already so is success.
///
/// The read-only flag is set before the mount becomes visible, so there is neither a moment in which it can be
/// written nor a half-made mount to take back.
///
/// # Errors
/// `Conflict` when it is there with the other read-only flag; `Precondition` as for [`ensure_vacant`].
pub fn ensure_bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    ensure_bind_with(source, target, read_only, &[])
}

/// As [`ensure_bind`], for a mount with attributes of its own.
pub fn ensure_bind_with(source: &Path, target: &Path, read_only: bool, attributes: &[Attribute]) -> Result<()> {
    let what = || format!("cannot bind {} to {}", source.display(), target.display());
    let Some(from) = Place::at(source)? else {
        fail!(Precondition, "nothing is staged at {}", source.display());
    };
    if let Some(there) = Place::at(target)?
        && there.is_mount()
        && there.is_same(&from)
    {
        // A device can be written through a read-only mount, so its flag says nothing.
        if from.device_file().is_none() && there.is_read_only()? != (read_only || from.is_read_only()?) {
            let how = if read_only { "writable" } else { "read-only" };
            fail!(Conflict, "the volume is already at {}, but {how}", target.display());
        }
        return Ok(());
    }
    let kind = if from.device_file().is_some() { paths::Kind::File } else { paths::Kind::Directory };
    let (to, made) = ensure_vacant(target, kind)?;
    let bind = || {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&from.fd, "", flags)?;
        let read_only = Some(MountAttrFlags::MOUNT_ATTR_RDONLY).filter(|_| read_only);
        let set = attributes.iter().map(|attribute| attribute.flag()).chain(read_only).collect::<MountAttrFlags>();
        if !set.is_empty() {
            set_attributes(&tree, set)?;
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&tree, "", &to, "", flags)
    };
    bind().map_err(|errno: Errno| {
        if made {
            let _ = paths::remove_empty(target);
        }
        Error::io(what(), errno)
    })
}

/// Takes away the uppermost mount at `path`. Nothing there is success.
///
/// # Errors
/// `Busy` while a process has something of it open.
pub fn unmount_top(path: &Path) -> Result<()> {
    let Some((parent, name)) = paths::open_parent(path)? else { return Ok(()) };
    let target = paths::of_fd(&parent).join(name);
    let unmount = || rustix::mount::unmount(&target, UnmountFlags::NOFOLLOW);
    match busy::settle(unmount, |result| *result == Err(Errno::BUSY)) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => Err(Error::caused(
            ErrorKind::Busy,
            format!("cannot unmount {}: a process still uses it", path.display()),
            std::io::Error::from(Errno::BUSY),
        )),
        Err(error) => Err(Error::io(format!("cannot unmount {}", path.display()), error)),
    }
}

/// As [`unmount_top`], for a file system whose server may be away: after `patience` the mount is out of sight, and the
/// kernel waits for the server in the background. What was written and is not yet sent stays in memory until then.
pub fn unmount_patiently(path: &Path, patience: Duration) -> Result<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let place = path.to_owned();
    let thread = std::thread::Builder::new().name("unmount".to_owned());
    let started = thread.spawn(move || drop(sender.send(unmount_top(&place))));
    started.context(|| format!("cannot start a thread to unmount {}", path.display()))?;
    match receiver.recv_timeout(patience) {
        Ok(result) => result,
        Err(_) => {
            tracing::warn!(path = %path.display(), ?patience, "unmounted, but its server has not answered");
            // The kernel has taken it away before it waits; if not, it does now.
            if is_mount(path)? { detach(path) } else { Ok(()) }
        }
    }
}

/// Takes the uppermost mount at `path` out of sight, whoever still uses it. For what is dead.
pub fn detach(path: &Path) -> Result<()> {
    let Some((parent, name)) = paths::open_parent(path)? else { return Ok(()) };
    let target = paths::of_fd(&parent).join(name);
    match rustix::mount::unmount(&target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(Error::io(format!("cannot detach {}", path.display()), error)),
    }
}

/// Puts a directory inside the mount at `path` in that mount's place, read-only.
pub fn narrow(path: &Path, inner: &Path) -> Result<()> {
    let what = || format!("cannot show {} of {}", inner.display(), path.display());
    let Some(root) = paths::open(path)? else { fail!(Precondition, "nothing is at {}", path.display()) };
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let clone = || {
        let from = rustix::fs::openat2(&root, inner, flags, Mode::empty(), resolve)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&from, "", flags)?;
        set_attributes(&tree, MountAttrFlags::MOUNT_ATTR_RDONLY)?;
        Ok(tree)
    };
    let tree = clone().map_err(|errno| match errno {
        Errno::NOENT => Error::caused(ErrorKind::NotFound, what(), std::io::Error::from(errno)),
        errno => Error::io(what(), errno),
    })?;
    drop(root);
    detach(path)?;
    let (to, _) = ensure_vacant(path, paths::Kind::Directory)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&tree, "", &to, "", flags).map_err(|errno| Error::io(what(), errno))
}

/// The line of the mount table of the uppermost mount at `path`. Reads the whole table, but touches nothing at `path`:
/// asking a file system whose server is gone would hang.
pub fn line_of(path: &Path) -> Result<Option<String>> {
    let table = table()?;
    Ok(last_line_at(&table, path).map(str::to_owned))
}

/// Later mounts come later.
fn last_line_at<'a>(table: &'a str, path: &Path) -> Option<&'a str> {
    let is_there = |line: &&str| line.split(' ').nth(4).is_some_and(|place| unescaped(OsStr::new(place)) == path);
    table.lines().rfind(is_there)
}

/// Where the lines of the mount table that fit are mounted.
pub fn places_where(fits: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    places(&table()?, |line| fits(line.whole))
}

/// Every other place that shows the same thing as the mount at `path`. Reads the whole mount table.
pub fn binds_of(path: &Path) -> Result<Vec<PathBuf>> {
    let Some(place) = Place::at(path)? else { return Ok(Vec::new()) };
    let table = table()?;
    let Some(id) = place.mount() else { return Ok(Vec::new()) };
    let Some(this) = lines(&table).find(|line| line.id == id) else { return Ok(Vec::new()) };
    places(&table, |line| line.id != id && line.device == this.device && line.root == this.root)
}

/// Where a directory, or one in it, is shown other than by its file system's own mounts: binds of it. Reads the whole mount table.
pub fn users_of_directory(path: &Path) -> Result<Vec<PathBuf>> {
    let path = &match std::fs::canonicalize(path) {
        Ok(path) => path,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(|| format!("cannot look at {}", path.display())),
    };
    let Some(place) = Place::at(path)? else { return Ok(Vec::new()) };
    let table = table()?;
    let Some(id) = place.mount() else { return Ok(Vec::new()) };
    let Some(own) = lines(&table).find(|line| line.id == id) else { return Ok(Vec::new()) };
    let mounted = MountInfo::from_line(own.whole).map_err(|error| {
        Error::caused(ErrorKind::Internal, format!("cannot parse {:?} of the mount table", own.whole), error)
    })?;
    // Where it lies in its file system, of which the mount may show a part only.
    let Ok(below) = path.strip_prefix(unescaped(mounted.mount_point.as_os_str())) else { return Ok(Vec::new()) };
    let root = unescaped(OsStr::new(own.root)).join(below);
    places(&table, |line| line.device == own.device && unescaped(OsStr::new(line.root)).starts_with(&root))
}

/// Where a block device's file system is mounted, or the device itself is shown. Reads the whole mount table.
pub fn users_of_device(device: &Path) -> Result<Vec<PathBuf>> {
    let Some(place) = Place::at(device)? else { return Ok(Vec::new()) };
    let number = place.device_file().unwrap_or_default();
    let filesystem = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    // A bound device file is a mount of devtmpfs whose root is the file.
    let devices = format!("{}:{}", rustix::fs::major(place.device()), rustix::fs::minor(place.device()));
    let file = device.file_name().map(|name| format!("/{}", name.to_string_lossy())).unwrap_or_default();
    places(&table()?, |line| line.device == filesystem || (line.device == devices && line.root == file))
}

/// The first fields of a line of the mount table. A node may have thousands of lines: only what fits is parsed whole.
struct Line<'a> {
    id: &'a str,
    device: &'a str,
    root: &'a str,
    whole: &'a str,
}

fn lines(table: &str) -> impl Iterator<Item = Line<'_>> {
    table.lines().filter_map(|whole| {
        let mut fields = whole.split(' ');
        let id = fields.next()?;
        Some(Line { id, device: fields.nth(1)?, root: fields.next()?, whole })
    })
}

/// The mount points of the lines that fit.
fn places(table: &str, fits: impl Fn(&Line<'_>) -> bool) -> Result<Vec<PathBuf>> {
    let parse = |line: Line<'_>| {
        let parsed = MountInfo::from_line(line.whole);
        parsed.map(|mount| unescaped(mount.mount_point.as_os_str())).map_err(|error| {
            Error::caused(ErrorKind::Internal, format!("cannot parse {:?} of the mount table", line.whole), error)
        })
    };
    lines(table).filter(|line| fits(line)).map(parse).collect()
}

/// proc_pid_mounts(5): a space, tab, line end or backslash stands there as three octal digits.
pub fn unescaped(path: &OsStr) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits =
            if *first == b'\\' { tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()) } else { None };
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn table() -> Result<String> {
    std::fs::read_to_string("/proc/self/mountinfo").context(|| "cannot read the mount table".to_owned())
}

/// mount_setattr(2), Linux 5.12.
fn set_attributes(tree: &OwnedFd, set: MountAttrFlags) -> rustix::io::Result<()> {
    use std::os::fd::AsRawFd;
    // How times of access are kept is one value of several bits: all of them go before one is set.
    let times =
        if set.contains(MountAttrFlags::MOUNT_ATTR_NOATIME) || set.contains(MountAttrFlags::MOUNT_ATTR_STRICTATIME) {
            libc::MOUNT_ATTR__ATIME
        } else {
            0
        };
    let attributes =
        libc::mount_attr { attr_set: u64::from(set.bits()), attr_clr: times, propagation: 0, userns_fd: 0 };
    #[expect(unsafe_code, reason = "no crate wraps mount_setattr")]
    // SAFETY: the path is a NUL-terminated literal, and the structure and its size are those that the call expects.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(&attributes),
            size_of_val(&attributes),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_mounts_that_fit_are_parsed_and_found() {
        let table = "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                     40 21 7:3 / /pods/one rw,relatime shared:1 - xfs /dev/loop3 rw,attr2\n\
                     no line of a mount table\n\
                     41 21 0:5 /loop3 /pods/block rw master:2 - devtmpfs devtmpfs rw\n\
                     42 21 7:3 /sub /pods/a\\040b\\134c ro,relatime - xfs /dev/loop3 rw\n";
        let found = places(table, |line| line.device == "7:3" || (line.device == "0:5" && line.root == "/loop3"));
        assert_eq!(found.unwrap(), ["/pods/one", "/pods/block", "/pods/a b\\c"].map(PathBuf::from));
        assert!(places(table, |line| line.id == "no").is_err());
    }

    #[test]
    fn the_line_of_a_place_is_that_of_its_uppermost_mount() {
        let table = "40 21 7:3 / /pods/a\\040b rw - xfs /dev/loop3 rw\n\
                     41 40 7:4 / /pods/a\\040b rw - xfs /dev/loop4 rw\n\
                     42 21 7:5 / /pods/a rw - xfs /dev/loop5 rw\n";
        let id = |path| last_line_at(table, Path::new(path)).map(|line| &line[..2]);
        assert_eq!([id("/pods/a b"), id("/pods/a"), id("/pods")], [Some("41"), Some("42"), None]);
    }
}
