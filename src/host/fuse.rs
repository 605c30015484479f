//! The kernel's side of FUSE: mounting, the descriptor's reads and writes, and the switch that ends a connection.
//! Knows nothing of what is in requests.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};

use super::mounts;
use crate::error::{Context, Error, Result};

/// How to mount. Set-user-id programs and device files never work in these mounts.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Nothing can be written through it.
    pub read_only: bool,
    /// Other users than the one that mounts may use it.
    pub allow_other: bool,
    /// The kernel checks permissions from mode and owner.
    pub default_permissions: bool,
    /// Bytes that one request reads at the most; 0: what INIT settles.
    pub max_read: u32,
    /// Shown in the mount table behind `fuse.`.
    pub subtype: String,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            allow_other: true,
            default_permissions: true,
            max_read: 0,
            subtype: "berth".to_owned(),
        }
    }
}

/// Mounts at an existing directory and returns the descriptor to serve. Nobody needs to serve it yet, but whoever looks
/// at the place waits until somebody does.
///
/// # Errors
/// `Unsupported` when this kernel has no FUSE.
pub fn mount(source: &str, target: &Path, options: &MountOptions) -> Result<OwnedFd> {
    let what = || format!("cannot mount {source} at {}", target.display());
    let device = open()?;
    let place = super::paths::open(target)?;
    let Some(place) = place else { fail!(Precondition, "{}: there is no such directory", what()) };
    let attach = || {
        let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let set = |key: &str, value: &str| rustix::mount::fsconfig_set_string(&context, key, value);
        set("source", source)?;
        set("subtype", &options.subtype)?;
        set("fd", &device.as_raw_fd().to_string())?;
        set("rootmode", "40000")?;
        set("user_id", &rustix::process::geteuid().as_raw().to_string())?;
        set("group_id", &rustix::process::getegid().as_raw().to_string())?;
        if options.max_read > 0 {
            set("max_read", &options.max_read.to_string())?;
        }
        if options.allow_other {
            rustix::mount::fsconfig_set_flag(&context, "allow_other")?;
        }
        if options.default_permissions {
            rustix::mount::fsconfig_set_flag(&context, "default_permissions")?;
        }
        if options.read_only {
            rustix::mount::fsconfig_set_flag(&context, "ro")?;
        }
        rustix::mount::fsconfig_create(&context)?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, options.read_only);
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&mount, "", &place, "", flags)
    };
    attach().map_err(|errno: Errno| Error::io(what(), errno))?;
    Ok(device)
}

/// Opens the device. A descriptor serves one mount.
fn open() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open("/dev/fuse", flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
            fail!(Unsupported, "cannot open /dev/fuse: this kernel has no FUSE (try `modprobe fuse`)")
        }
        result => result.context(|| "cannot open /dev/fuse".to_owned()),
    }
}

/// The number of the connection behind the mount at `path`. Asks the mount table, since asking the mount could hang.
/// `None`: no FUSE file system is mounted there.
pub fn connection_of(path: &Path) -> Result<Option<u32>> {
    Ok(mounts::line_of(path)?.as_deref().and_then(connection_in))
}

/// The number of the connection that this descriptor serves, where the kernel tells it (Linux 6.16).
pub fn connection_of_descriptor(fuse: impl AsFd) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fuse.as_fd().as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("fuse_connection:")?.trim().parse().ok())
}

fn connection_in(line: &str) -> Option<u32> {
    let (before, after) = line.split_once(" - ")?;
    let kind = after.split(' ').next()?;
    if kind != "fuse" && !kind.starts_with("fuse.") {
        return None;
    }
    // Its file systems have no device: the minor number is the connection's.
    before.split(' ').nth(2)?.strip_prefix("0:")?.parse().ok()
}

/// Ends a connection: whoever waits for an answer gets an error, and the descriptor can serve no more. For mounts whose
/// server can't be brought back. One that has ended already is success.
pub fn abort(connection: u32) -> Result<()> {
    let what = || format!("cannot abort FUSE connection {connection}");
    match control(connection, "abort", OFlags::WRONLY) {
        Ok(file) => rustix::io::write(file, b"1").map(drop).context(what),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(Error::io(what(), errno)),
    }
}

/// How many requests of a connection wait for an answer.
pub fn waiting(connection: u32) -> Result<u64> {
    let what = || format!("cannot ask for the requests of FUSE connection {connection}");
    let file = control(connection, "waiting", OFlags::RDONLY).context(what)?;
    let mut text = [0; 32];
    let length = rustix::io::read(file, &mut text).context(what)?;
    let text = String::from_utf8_lossy(&text[..length]);
    text.trim().parse().map_err(|error| Error::caused(crate::error::ErrorKind::Internal, what(), error))
}

/// `/sys/fs/fuse/connections` need not be mounted (in a container it is not): a mount of our own shows the same.
fn control(connection: u32, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let flags_of_mount = FsMountFlags::FSMOUNT_CLOEXEC;
    let root = rustix::mount::fsmount(&context, flags_of_mount, MountAttrFlags::empty())?;
    rustix::fs::openat(&root, format!("{connection}/{name}"), flags | OFlags::CLOEXEC, Mode::empty())
}

/// A descriptor of /dev/fuse, read without waiting.
#[derive(Debug)]
pub struct Device(OwnedFd);

impl Device {
    /// Reads of it don't wait from now on, in no process that has it.
    pub fn new(descriptor: OwnedFd) -> Result<Self> {
        let what = || "cannot set a FUSE descriptor to reads that do not wait".to_owned();
        let flags = rustix::fs::fcntl_getfl(&descriptor).context(what)?;
        rustix::fs::fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK).context(what)?;
        Ok(Self(descriptor))
    }

    /// One request. EAGAIN: there is none.
    pub fn read(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        rustix::io::read(&self.0, buffer)
    }

    /// One answer, or one notice.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> rustix::io::Result<()> {
        rustix::io::writev(&self.0, pieces).map(drop)
    }

    /// Waits for a request or the bell. `false`: for so long there was neither.
    pub fn wait(&self, bell: &Bell, timeout: Option<Duration>) -> rustix::io::Result<bool> {
        let mut ready = [PollFd::new(&self.0, PollFlags::IN), PollFd::new(&bell.0, PollFlags::IN)];
        let timeout =
            timeout.map(|time| Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() });
        Ok(rustix::event::poll(&mut ready, timeout.as_ref())? > 0)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Wakes those that wait for a request. Once rung it stays so.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A silent one.
    pub fn new() -> Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        bell.map(Self).context(|| "cannot make an event descriptor".to_owned())
    }

    /// Rings.
    pub fn ring(&self) {
        // Can fail only when it has been rung 2^64 - 1 times.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_is_found_in_the_mount_table() {
        let line = "36 25 0:53 / /mnt rw,nosuid,nodev - fuse.berth s3://bucket/a - b rw,user_id=0";
        assert_eq!(connection_in(line), Some(53));
        assert_eq!(connection_in("36 25 0:53 / /mnt rw - fuse x rw"), Some(53));
        assert_eq!(connection_in("36 25 0:53 / /mnt rw - fusectl x rw"), None);
        assert_eq!(connection_in("36 25 254:0 / /mnt rw - ext4 /dev/vda rw"), None);
        assert_eq!(connection_in("36 25"), None);
    }
}
