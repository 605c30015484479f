//! File systems on block devices: made, mounted, grown, measured.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::StatVfs;
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};

use super::command;
use crate::error::{Context, Error, ErrorKind, Result};

/// The file systems that we make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Any size from 16 MiB. Grows while mounted only with CAP_SYS_RESOURCE, which is the kernel's rule.
    Ext4,
    /// From 300 MiB, which is mkfs.xfs' own limit. Always grows while mounted.
    Xfs,
}

impl Kind {
    /// # Errors
    /// `Invalid` with the known ones.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            _ => fail!(Invalid, "file system {name:?} is not known: use ext4 or xfs"),
        }
    }

    /// As mount(2) calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Below this many bytes it can't be made, or would hold next to nothing.
    pub fn minimum_size(self) -> u64 {
        match self {
            Self::Ext4 => 16 << 20,
            Self::Xfs => 300 << 20,
        }
    }

    /// Makes the file system. The caller knows that the device is blank.
    pub fn make(self, device: &Path, options: &[String], deadline: Duration) -> Result<()> {
        // No discard: on a large disk it takes minutes, and the device is blank.
        let (program, ours): (_, &[&str]) = match self {
            Self::Ext4 => ("mkfs.ext4", &["-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"]),
            Self::Xfs => ("mkfs.xfs", &["-q", "-f", "-K"]),
        };
        let device = device.as_os_str();
        let arguments: Vec<_> =
            ours.iter().map(AsRef::as_ref).chain(options.iter().map(AsRef::as_ref)).chain([device]).collect();
        command::run(program, &arguments, deadline)
    }

    /// Makes the file system of the device, mounted at `path`, as big as the device is. `false`: it was already.
    ///
    /// # Errors
    /// As [`Self::check_growth`].
    pub fn grow(self, device: &Path, path: &Path) -> Result<bool> {
        let what = || format!("cannot grow the file system at {}", path.display());
        let root = File::open(path).context(what)?;
        let size = device_size(device)?;
        match self {
            Self::Ext4 => match ext4::blocks_missing(device, size)? {
                None => Ok(false),
                Some(blocks) => {
                    self.check_growth()?;
                    rustix::fs::ext4_ioc_resize_fs(&root, blocks).map(|()| true).context(what)
                }
            },
            Self::Xfs => xfs::grow(&root, size).context(what),
        }
    }

    /// Can this process make a mounted file system of this kind bigger? resize2fs could do it unmounted with fewer
    /// rights, but leaves a ruin when it is interrupted.
    ///
    /// # Errors
    /// `Precondition`, with what is missing.
    pub fn check_growth(self) -> Result<()> {
        if self == Self::Ext4 && !has_sys_resource() {
            fail!(
                Precondition,
                "ext4 grows only with CAP_SYS_RESOURCE, which this process lacks: give it to the driver, or use xfs"
            );
        }
        Ok(())
    }
}

fn has_sys_resource() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_RESOURCE))
}

/// A block device's size in bytes.
pub fn device_size(device: &Path) -> Result<u64> {
    let what = || format!("cannot ask {} for its size", device.display());
    File::open(device).and_then(|mut file| file.seek(SeekFrom::End(0))).context(what)
}

/// How a file system is mounted. Each option goes to the kernel on its own, so none can hide another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Nothing is written, not even a journal's replay where the device forbids it.
    pub read_only: bool,
    /// Of this mount: `noatime` and the like.
    pub attributes: Vec<Attribute>,
    /// Of the file system: key, and value if it takes one.
    pub parameters: Vec<(String, Option<String>)>,
}

/// Options that every file system has (mount_setattr(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// Device files are only files.
    NoDev,
    /// Set-user-id bits don't count.
    NoSuid,
    /// Nothing on it can be executed.
    NoExec,
    /// Access times are not kept.
    NoAtime,
    /// Access times are always kept.
    StrictAtime,
    /// Access times of directories are not kept.
    NoDirAtime,
}

impl Attribute {
    /// As mount(8) calls it.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "nodev" => Some(Self::NoDev),
            "nosuid" => Some(Self::NoSuid),
            "noexec" => Some(Self::NoExec),
            "noatime" => Some(Self::NoAtime),
            "strictatime" => Some(Self::StrictAtime),
            "nodiratime" => Some(Self::NoDirAtime),
            _ => None,
        }
    }

    pub(super) fn flag(self) -> MountAttrFlags {
        match self {
            Self::NoDev => MountAttrFlags::MOUNT_ATTR_NODEV,
            Self::NoSuid => MountAttrFlags::MOUNT_ATTR_NOSUID,
            Self::NoExec => MountAttrFlags::MOUNT_ATTR_NOEXEC,
            Self::NoAtime => MountAttrFlags::MOUNT_ATTR_NOATIME,
            Self::StrictAtime => MountAttrFlags::MOUNT_ATTR_STRICTATIME,
            Self::NoDirAtime => MountAttrFlags::MOUNT_ATTR_NODIRATIME,
        }
    }
}

/// Mounts a device's file system on the directory that `target` is open on.
///
/// # Errors
/// `Internal`, with what the kernel says about it.
pub fn mount(device: &Path, filesystem: &str, options: &MountOptions, target: &OwnedFd) -> Result<()> {
    let context = rustix::mount::fsopen(filesystem, FsOpenFlags::FSOPEN_CLOEXEC)
        .context(|| format!("cannot use the file system {filesystem}"))?;
    let configure = || {
        rustix::mount::fsconfig_set_string(&context, "source", device)?;
        if options.read_only {
            rustix::mount::fsconfig_set_flag(&context, "ro")?;
        }
        for (key, value) in &options.parameters {
            match value {
                Some(value) => rustix::mount::fsconfig_set_string(&context, key.as_str(), value.as_str())?,
                None => rustix::mount::fsconfig_set_flag(&context, key.as_str())?,
            }
        }
        rustix::mount::fsconfig_create(&context)?;
        let attributes = options.attributes.iter().fold(MountAttrFlags::empty(), |all, one| all | one.flag());
        let attributes = if options.read_only { attributes | MountAttrFlags::MOUNT_ATTR_RDONLY } else { attributes };
        attach(&context, attributes, target)
    };
    configure().map_err(|errno: Errno| {
        let said = kernel_messages(&context);
        Error::caused(ErrorKind::Internal, format!("cannot mount {} as {filesystem}{said}", device.display()), {
            std::io::Error::from(errno)
        })
    })
}

/// Mounts what a context has created on the directory that `target` is open on.
pub(super) fn attach(context: &OwnedFd, attributes: MountAttrFlags, target: &OwnedFd) -> rustix::io::Result<()> {
    let mounted = rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&mounted, "", target, "", flags)
}

/// What the kernel wrote into the context's log (fsopen(2)): one message a read.
pub(super) fn kernel_messages(context: &OwnedFd) -> String {
    let mut all = String::new();
    let mut buffer = [0_u8; 512];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        let message = String::from_utf8_lossy(&buffer[..length]);
        all.push_str(&format!(" ({})", message.trim_start_matches(['e', 'w', 'i']).trim()));
    }
    all
}

/// Writes all of the file system at `path` to its device, and holds up writers until it is thawed.
pub fn freeze(path: &Path) -> Result<()> {
    freezing(path, FIFREEZE)
}

/// Lets writers go on. Not frozen is fine.
pub fn thaw(path: &Path) -> Result<()> {
    freezing(path, FITHAW)
}

/// Numbers of `linux/fs.h`.
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;

fn freezing(path: &Path, request: libc::Ioctl) -> Result<()> {
    let what = || format!("cannot freeze or thaw the file system at {}", path.display());
    let root = File::open(path).context(what)?;
    #[expect(unsafe_code, reason = "no crate wraps these")]
    // SAFETY: both requests ignore their argument, so the kernel follows no pointer.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), request, 0) };
    match std::io::Error::last_os_error() {
        _ if result >= 0 => Ok(()),
        error if request == FITHAW && error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        error => Err(error).context(what),
    }
}

/// How many errors ext4 has recorded since the file system was last checked; 0 for file systems that don't count.
pub fn recorded_errors(device: &Path) -> u64 {
    let name = device.file_name().unwrap_or_default().to_string_lossy();
    let count = std::fs::read_to_string(format!("/sys/fs/ext4/{name}/errors_count"));
    count.ok().and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// Total, used and available, in bytes and in inodes, of the file system at `path`.
pub fn usage(path: &Path) -> Result<[[u64; 3]; 2]> {
    let stat = rustix::fs::statvfs(path).context(|| format!("cannot measure {}", path.display()))?;
    Ok(usage_of(&stat))
}

pub(super) fn usage_of(stat: &StatVfs) -> [[u64; 3]; 2] {
    let used = |total: u64, free: u64| total.saturating_sub(free);
    [
        [stat.f_blocks, used(stat.f_blocks, stat.f_bfree), stat.f_bavail].map(|blocks| blocks * stat.f_frsize),
        [stat.f_files, used(stat.f_files, stat.f_ffree), stat.f_favail],
    ]
}

/// The superblock of ext4, which lies 1024 bytes into the device.
mod ext4 {
    use super::{Context, File, Path, Result};
    use std::os::unix::fs::FileExt;

    /// mkfs and the kernel leave out a last block group that is too small to be of use.
    const ROUNDING: u64 = 4 << 20;

    /// The number of blocks that fit on the device, if that is more than the file system has.
    pub(super) fn blocks_missing(device: &Path, size: u64) -> Result<Option<u64>> {
        let mut superblock = [0; 0x160];
        File::open(device)
            .and_then(|file| file.read_exact_at(&mut superblock, 1024))
            .context(|| format!("cannot read the superblock on {}", device.display()))?;
        let word = |at: usize| {
            let bytes = [superblock[at], superblock[at + 1], superblock[at + 2], superblock[at + 3]];
            u64::from(u32::from_le_bytes(bytes))
        };
        let (low, log_block_size, high) = (word(0x04), word(0x18), word(0x150));
        let block = 1024_u64 << log_block_size.min(6);
        let present = (low | high << 32).saturating_mul(block);
        Ok((present.saturating_add(ROUNDING) <= size).then_some(size / block))
    }
}

/// Numbers and layouts of `xfs/xfs_fs.h`, which Linux has no other header for.
mod xfs {
    use super::{AsRawFd, File};

    const XFS_IOC_FSGEOMETRY_V1: libc::Ioctl = 0x8070_5864;
    const XFS_IOC_FSGROWFSDATA: libc::Ioctl = 0x4010_586E;

    /// `struct xfs_fsop_geom_v1`.
    #[repr(C)]
    #[derive(Default)]
    struct Geometry {
        block_size: u32,
        realtime_extent: u32,
        group_blocks: u32,
        group_count: u32,
        log_blocks: u32,
        sector_size: u32,
        inode_size: u32,
        inode_percent: u32,
        data_blocks: u64,
        realtime_blocks: u64,
        realtime_extents: u64,
        log_start: u64,
        uuid: [u8; 16],
        stripe_unit: u32,
        stripe_width: u32,
        version: i32,
        flags: u32,
        log_sector_size: u32,
        realtime_sector_size: u32,
        directory_block_size: u32,
    }

    /// `struct xfs_growfs_data`.
    #[repr(C)]
    struct Growth {
        blocks: u64,
        inode_percent: u32,
    }

    const _: () = assert!(size_of::<Geometry>() == 112 && size_of::<Growth>() == 16);

    pub(super) fn grow(root: &File, size: u64) -> std::io::Result<bool> {
        let mut geometry = Geometry::default();
        call(root, XFS_IOC_FSGEOMETRY_V1, &mut geometry)?;
        let blocks = size / u64::from(geometry.block_size.max(1));
        if blocks <= geometry.data_blocks {
            return Ok(false);
        }
        call(root, XFS_IOC_FSGROWFSDATA, &mut Growth { blocks, inode_percent: geometry.inode_percent })?;
        Ok(true)
    }

    fn call<T>(root: &File, request: libc::Ioctl, argument: &mut T) -> std::io::Result<()> {
        #[expect(unsafe_code, reason = "XFS has no other interface for this")]
        // SAFETY: both structures have the kernel's layout for the request they are used with (sizes asserted above).
        let result = unsafe { libc::ioctl(root.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }
}
