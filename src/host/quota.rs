//! Project quotas of XFS: a tree of files with an id, and a hard limit for all that has this id.
//!
//! Facts from `linux/dqblk_xfs.h`, `linux/fs.h` and quotactl(2). No crate wraps these calls. The calls take an open
//! directory of the file system (quotactl_fd, Linux 5.14), so neither a device nor a mount table has to be found.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

use crate::error::{Context, Result};

/// What has a project's id, and what may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In bytes.
    pub bytes: u64,
    /// In bytes; 0: no limit.
    pub limit: u64,
    /// Files, directories and whatever else has an inode.
    pub inodes: u64,
    /// 0: no limit.
    pub inode_limit: u64,
}

/// Are the limits of projects in force on the file system that this directory lies on? `false` also where there is no
/// such thing.
pub fn is_enforced(directory: &File) -> bool {
    let mut state = abi::State::asked();
    call(directory, abi::Q_XGETQSTATV, 0, &mut state).is_ok() && state.flags & abi::PROJECTS_ENFORCED != 0
}

/// Gives a project hard limits: bytes (multiples of 512) and inodes, 0 for none. Asking for less than is used is allowed, and refuses
/// every further byte.
pub fn set_limits(directory: &File, project: u32, bytes: u64, inodes: u64) -> Result<()> {
    let mut quota = abi::Quota::with_limits(project, bytes, inodes);
    call(directory, abi::Q_XSETQLIM, project, &mut quota)
        .context(|| format!("cannot set the limits of project {project}"))
}

/// What a project has. One that nobody has ever used has nothing.
pub fn usage(directory: &File, project: u32) -> Result<Usage> {
    let mut quota = abi::Quota::default();
    match call(directory, abi::Q_XGETQUOTA, project, &mut quota) {
        Ok(()) => Ok(quota.usage()),
        Err(Errno::NOENT) => Ok(Usage::default()),
        Err(error) => Err(error).context(|| format!("cannot ask for the usage of project {project}")),
    }
}

/// The first project at or above this id that has anything or a limit.
pub fn next(directory: &File, from: u32) -> Result<Option<(u32, Usage)>> {
    let mut quota = abi::Quota::default();
    match call(directory, abi::Q_XGETNEXTQUOTA, from, &mut quota) {
        Ok(()) => Ok(Some((quota.id, quota.usage()))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error).context(|| "cannot list the projects".to_owned()),
    }
}

/// The project that a file or directory has.
pub fn project_of(file: &File) -> Result<u32> {
    attributes(file).map(|attributes| attributes.project).context(|| "cannot ask for a project id".to_owned())
}

/// Gives a file or directory a project. Everything that will be made in a directory inherits it; what is in it already
/// keeps its own.
pub fn set_project(file: &File, project: u32) -> Result<()> {
    let set = || {
        let mut changed = attributes(file)?;
        changed.project = project;
        if file.metadata()?.is_dir() {
            changed.flags |= abi::INHERIT;
        }
        Ok::<_, std::io::Error>(set_attributes(file, &mut changed)?)
    };
    set().context(|| format!("cannot set the project id {project}"))
}

/// Lets things of other projects be moved into this directory.
pub fn let_in_all(directory: &File) -> std::io::Result<()> {
    let mut changed = attributes(directory)?;
    changed.flags &= !abi::INHERIT;
    Ok(set_attributes(directory, &mut changed)?)
}

/// Lets a file be removed that was made immutable or append-only.
pub fn make_mutable(file: &File) -> std::io::Result<()> {
    let mut changed = attributes(file)?;
    changed.flags &= !abi::STUCK;
    Ok(set_attributes(file, &mut changed)?)
}

fn attributes(file: &File) -> rustix::io::Result<abi::Attributes> {
    let mut attributes = abi::Attributes::default();
    ioctl(file, abi::FS_IOC_FSGETXATTR, &mut attributes)?;
    Ok(attributes)
}

fn set_attributes(file: &File, attributes: &mut abi::Attributes) -> rustix::io::Result<()> {
    ioctl(file, abi::FS_IOC_FSSETXATTR, attributes)
}

fn ioctl(file: &File, request: libc::Ioctl, argument: &mut abi::Attributes) -> rustix::io::Result<()> {
    #[expect(unsafe_code, reason = "no crate wraps these")]
    // SAFETY: both requests take a `struct fsxattr`, whose layout `Attributes` has (size asserted below).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(last_error()) } else { Ok(()) }
}

fn call<T: abi::Answer>(directory: &File, command: u32, project: u32, answer: &mut T) -> rustix::io::Result<()> {
    // QCMD of `linux/quota.h`, for quotas of projects.
    let command = command << 8 | 2;
    #[expect(unsafe_code, reason = "no crate wraps quotactl_fd")]
    // SAFETY: `Answer` types have the kernel's layout for the commands they are used with (sizes asserted below).
    let result = unsafe {
        libc::syscall(libc::SYS_quotactl_fd, directory.as_raw_fd(), command, project, std::ptr::from_mut(answer))
    };
    if result < 0 { Err(last_error()) } else { Ok(()) }
}

fn last_error() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

mod abi {
    pub(super) const Q_XGETQUOTA: u32 = 0x5803;
    pub(super) const Q_XSETQLIM: u32 = 0x5804;
    pub(super) const Q_XGETQSTATV: u32 = 0x5808;
    pub(super) const Q_XGETNEXTQUOTA: u32 = 0x5809;
    /// `FS_QUOTA_PDQ_ENFD`.
    pub(super) const PROJECTS_ENFORCED: u16 = 1 << 5;
    /// `FS_PROJ_QUOTA`.
    const PROJECT: i8 = 2;
    /// `FS_DQ_ISOFT`, `FS_DQ_IHARD`, `FS_DQ_BSOFT` and `FS_DQ_BHARD`.
    const MASK_LIMITS: u16 = 0b1111;
    /// Bytes in the unit of block counts.
    const BLOCK: u64 = 512;

    pub(super) const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801C_581F_u32 as libc::Ioctl;
    pub(super) const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401C_5820_u32 as libc::Ioctl;
    /// `FS_XFLAG_PROJINHERIT`.
    pub(super) const INHERIT: u32 = 0x200;
    /// `FS_XFLAG_IMMUTABLE` and `FS_XFLAG_APPEND`.
    pub(super) const STUCK: u32 = 0x8 | 0x10;

    /// Structures that quotactl reads and writes.
    pub(super) trait Answer {}
    impl Answer for Quota {}
    impl Answer for State {}

    /// `struct fs_disk_quota`.
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct Quota {
        version: i8,
        flags: i8,
        mask: u16,
        pub(super) id: u32,
        block_hard: u64,
        block_soft: u64,
        inode_hard: u64,
        inode_soft: u64,
        blocks: u64,
        inodes: u64,
        timers: [i32; 2],
        warnings: [u16; 2],
        timers_high: [i8; 4],
        realtime: [u64; 3],
        realtime_timer: i32,
        realtime_warnings: u16,
        padding: i16,
        padding_end: [u8; 8],
    }

    impl Quota {
        pub(super) fn with_limits(project: u32, bytes: u64, inodes: u64) -> Self {
            let blocks = bytes / BLOCK;
            Self {
                version: 1,
                flags: PROJECT,
                mask: MASK_LIMITS,
                id: project,
                block_hard: blocks,
                block_soft: blocks,
                inode_hard: inodes,
                inode_soft: inodes,
                ..Self::default()
            }
        }

        pub(super) fn usage(&self) -> super::Usage {
            super::Usage {
                bytes: self.blocks * BLOCK,
                limit: self.block_hard * BLOCK,
                inodes: self.inodes,
                inode_limit: self.inode_hard,
            }
        }
    }

    /// `struct fs_quota_statv`.
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct State {
        version: i8,
        padding: u8,
        pub(super) flags: u16,
        in_core: u32,
        files: [[u64; 3]; 3],
        limits: [i32; 3],
        warnings: [u16; 4],
        padding_middle: u32,
        padding_end: [u64; 7],
    }

    impl State {
        pub(super) fn asked() -> Self {
            Self { version: 1, ..Self::default() }
        }
    }

    /// `struct fsxattr`.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    pub(super) struct Attributes {
        pub(super) flags: u32,
        extent_size: u32,
        extents: u32,
        pub(super) project: u32,
        copy_extent_size: u32,
        padding: [u8; 8],
    }

    const _: () = assert!(size_of::<Quota>() == 112 && size_of::<State>() == 160 && size_of::<Attributes>() == 28);
}
