//! Where it is measured: a private mount namespace, and in it an XFS file system on a loop device.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use berth::host::filesystem::{self, Kind, MountOptions};
use berth::host::{files, loops, mounts, paths};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;
use tempfile::TempDir;

/// The pool's size. Sparse: what nobody writes takes no space.
const SIZE: u64 = 64 << 30;

/// Gives this process mounts of its own: none reaches the machine, and all end with the process.
///
/// # Errors
/// Without CAP_SYS_ADMIN.
pub(crate) fn leave_mount_namespace() -> Result<()> {
    #[expect(unsafe_code, reason = "rustix marks it so for the sake of another flag")]
    // SAFETY: the mount namespace has no bearing on memory or descriptors, and there is no other thread yet.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.context("this benchmark needs to be root")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context("cannot make this process' mounts private")
}

/// The directory that everything lies in, and the file system in it.
pub(crate) struct Lab {
    folder: TempDir,
}

impl Lab {
    /// Makes and mounts the file system.
    pub(crate) fn new() -> Result<Self> {
        let folder = TempDir::with_prefix("berth-bench-")?;
        // The driver refuses paths behind symbolic links.
        anyhow::ensure!(folder.path().canonicalize()? == folder.path(), "TMPDIR lies behind a symbolic link");
        let lab = Self { folder };
        let path = lab.path("disk.img");
        let image = files::create_sized(&path, SIZE, false)?;
        let options = loops::Options {
            block_size: files::direct_io_alignment(&image)?,
            read_only: false,
            autoclear: true,
            discard: true,
        };
        let device = loops::attach(&image, options)?;
        // Whatever becomes of this process, no image stays behind.
        std::fs::remove_file(&path)?;
        Kind::Xfs.make(&device.path, &[], Duration::from_secs(120))?;
        let (place, _) = mounts::ensure_vacant(&lab.disk(), paths::Kind::Directory)?;
        filesystem::mount(&device.path, Kind::Xfs.name(), &MountOptions::default(), &place)?;
        Ok(lab)
    }

    /// Where the file system is mounted.
    pub(crate) fn disk(&self) -> PathBuf {
        self.path("pool-disk")
    }

    /// What everything lies in.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path beside it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new directory beside it.
    pub(crate) fn new_directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Lab {
    /// Takes away what is mounted beneath the folder, last first, so that removing the folder meets no mount.
    fn drop(&mut self) {
        let Ok(table) = procfs::process::Process::myself().and_then(|me| me.mountinfo()) else { return };
        let ours = |path: &Path| path.starts_with(self.folder.path());
        for mount in table.0.iter().rev().filter(|mount| ours(&mount.mount_point)) {
            if let Err(error) = rustix::mount::unmount(&mount.mount_point, UnmountFlags::DETACH) {
                eprintln!("cannot unmount {}: {error}", mount.mount_point.display());
            }
        }
    }
}

/// Other mounts on the machine, as a node with many pods has them. Gone when dropped.
pub(crate) struct OtherMounts {
    folder: PathBuf,
}

impl OtherMounts {
    /// Makes `count` mounts in a new directory.
    pub(crate) fn new(folder: PathBuf, count: usize) -> Result<Self> {
        std::fs::create_dir(&folder)?;
        rustix::mount::mount("tmpfs", &folder, "tmpfs", rustix::mount::MountFlags::empty(), None)?;
        let made = Self { folder };
        let source = made.folder.join("source");
        std::fs::create_dir(&source)?;
        for number in 0..count {
            let target = made.folder.join(format!("pods-{number}-volume"));
            std::fs::create_dir(&target)?;
            rustix::mount::mount_bind(&source, &target)?;
        }
        Ok(made)
    }
}

impl Drop for OtherMounts {
    fn drop(&mut self) {
        // Takes all the mounts beneath it along.
        let _ = rustix::mount::unmount(&self.folder, UnmountFlags::DETACH);
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// An open file that is written to the disk.
pub(crate) fn create_synced(path: &Path, size: u64) -> Result<()> {
    let file = File::create_new(path)?;
    file.set_len(size)?;
    Ok(file.sync_all()?)
}
