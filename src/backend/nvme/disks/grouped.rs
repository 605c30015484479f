//! Pools whose disks are in one volume group, `berth-NAME`: with the layout `lvm` volumes are carved from it, with `striped` all
//! of it is one logical volume with the pool's XFS.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::create::Plan;
use super::mark;
use crate::backend::nvme::group::GROUP_TAG as TAG;
use crate::backend::nvme::pool::{Below, Trouble};
use crate::config::Layout;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::disks::{Disk, DiskLock};
use crate::host::{files, lvm, mounts, paths, xfs, zero};

/// The logical volume of a striped pool, and what it is called until it has its file system.
const WHOLE: &str = "pool";
const UNFINISHED: &str = "new-pool";
/// So much is made zero at a time: 256 MiB.
const CHUNK: u64 = 256 << 20;
/// LVM reads every disk to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The volume group of the pool of this name.
pub(in crate::backend::nvme) fn group_name(pool: &str) -> String {
    format!("berth-{pool}")
}

/// Is this disk in the pool's volume group?
pub(super) fn has(pool: &str, disk: &Disk, deadline: Duration) -> Result<bool> {
    let groups = lvm::groups_on(std::slice::from_ref(&disk.path), deadline)?;
    Ok(groups.into_iter().any(|(_, group)| group.as_deref() == Some(&group_name(pool))))
}

/// Makes the group of disks that are blank, or adds them to it.
///
/// # Errors
/// `Unsupported` when a striped pool is there already: it does not grow.
pub(super) fn make(plan: &Plan, check_blank: impl Fn(&Disk) -> Result<()>, deadline: Duration) -> Result<()> {
    let name = group_name(&plan.pool);
    let disks: Vec<PathBuf> = plan.take.iter().map(|disk| disk.path.clone()).collect();
    let mut group = lvm::Group::new(&name, None, deadline)?;
    let exists = match group.state() {
        Ok(state) if state.tags.iter().any(|tag| tag == TAG) => true,
        Ok(_) => fail!(
            Conflict,
            "there is a volume group {name}, which Berth has not made: rename it, or name it as `group`"
        ),
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if plan.layout == Layout::Lvm {
        // What nobody has written since must not be somebody's old data. A disk is blank until it is in the group, so an
        // interrupted call begins anew.
        for disk in &plan.take {
            let Some(_lock) = DiskLock::try_acquire(disk)? else {
                fail!(Busy, "another process is at work on {disk}: try again");
            };
            // It may have been hours since the plan was made.
            check_blank(disk)?;
            tracing::info!(pool = plan.pool, %disk, "writing zeros over the disk");
            let _ = zero::write(&disk.path, 0..disk.size, CHUNK, |_| ControlFlow::Continue(()))?;
        }
    }
    if !exists {
        group = lvm::Group::make(&name, disks, &[TAG.to_owned()], deadline)?;
    } else if plan.layout == Layout::Striped && !disks.is_empty() {
        fail!(Unsupported, "pool {} is striped over other disks already, and does not grow", plan.pool);
    } else {
        for disk in &disks {
            group.extend(disk)?;
        }
    }
    if plan.layout == Layout::Striped { make_whole(&plan.pool, &group, deadline) } else { Ok(()) }
}

/// The file system over all of the group. It has its name when it is whole; until then it is begun anew.
fn make_whole(pool: &str, group: &lvm::Group, deadline: Duration) -> Result<()> {
    let volumes = group.volumes()?;
    if volumes.iter().any(|volume| volume.name == WHOLE) {
        return Ok(());
    }
    match volumes.iter().find(|volume| volume.name == UNFINISHED) {
        Some(volume) if volume.tags.iter().any(|tag| tag == TAG) => group.remove(UNFINISHED)?,
        Some(_) => fail!(Conflict, "somebody else has a logical volume {UNFINISHED} in {}", group.name()),
        None => {}
    }
    let state = group.state()?;
    let count = u64::try_from(state.disks.len()).unwrap_or(1).max(1);
    // As much of each disk as the smallest has.
    let smallest = state.disks.iter().map(|disk| disk.size).min().unwrap_or_default();
    let size = (smallest / state.extent_size * state.extent_size).saturating_mul(count);
    group.create(UNFINISHED, size, u32::try_from(count).ok(), &[TAG.to_owned()])?;
    let Some(device) = lvm::device(group.name(), UNFINISHED)? else { fail!(Internal, "{UNFINISHED} has no device") };
    xfs::make(&device.path(), mark::fresh_uuid(pool)?, pool, true, deadline)?;
    group.rename(UNFINISHED, WHOLE)
}

/// The file system of a striped pool: where it is mounted, and why it can't be used.
pub(super) struct Striped {
    pool: String,
    path: PathBuf,
    trouble: Mutex<Option<String>>,
}

impl Striped {
    pub(super) fn new(pool: &str, path: PathBuf) -> Self {
        let unseen = Some("nobody has looked for its disks yet".to_owned());
        Self { pool: pool.to_owned(), path, trouble: Mutex::new(unseen) }
    }

    /// Looks for it, and mounts it if it is there and that is wanted.
    pub(super) fn look(&self, mounts: bool) {
        let trouble = self.find(mounts).err().map(|error| error.to_string());
        let mut known = self.trouble();
        if *known != trouble {
            match &trouble {
                Some(trouble) => tracing::error!(pool = self.pool, trouble, "the pool's file system can't be used"),
                None => {
                    tracing::info!(pool = self.pool, path = %self.path.display(), "the pool's file system is mounted")
                }
            }
        }
        *known = trouble;
    }

    fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, mounts: bool) -> Result<()> {
        if self.is_mounted()? {
            return Ok(());
        }
        let name = group_name(&self.pool);
        let group = lvm::Group::new(&name, None, PATIENCE)?;
        group.state()?;
        let Some(volume) = group.volumes()?.into_iter().find(|volume| volume.name == WHOLE) else {
            fail!(Precondition, "making it was interrupted: `berth pool create {}` goes on", self.pool);
        };
        if volume.partial {
            fail!(Precondition, "a disk of the volume group {name} is missing");
        }
        if !mounts {
            fail!(Precondition, "it is not mounted at {}", self.path.display());
        }
        if !volume.active {
            group.activate(WHOLE)?;
        }
        std::fs::create_dir_all(&self.path).context(|| format!("cannot make {}", self.path.display()))?;
        let (target, _) = mounts::ensure_vacant(&self.path, paths::Kind::Directory)?;
        let Some(device) = lvm::device(&name, WHOLE)?.map(|device| device.path()) else {
            fail!(Internal, "{name}/{WHOLE} has no device");
        };
        if !xfs::mount(&device, &target)? {
            tracing::warn!(
                pool = self.pool,
                "this kernel has no quotas for XFS: no volume of this pool can be a directory"
            );
        }
        if let Some(name) = device.file_name()
            && let Err(error) = xfs::fail_fast(&name.to_string_lossy())
        {
            tracing::warn!(pool = self.pool, %error, "an error in its metadata may hang the file system");
        }
        Ok(())
    }

    /// Is the pool's own file system at its path?
    fn is_mounted(&self) -> Result<bool> {
        if !mounts::is_mount(&self.path)? {
            return Ok(false);
        }
        let device = files::device_of(&self.path)?;
        match lvm::name_of_device(device)? {
            Some((group, name)) if group == group_name(&self.pool) && name == WHOLE => Ok(true),
            _ => Err(Error::new(
                ErrorKind::Precondition,
                format!("something else is mounted at {}: unmount it", self.path.display()),
            )),
        }
    }
}

impl Below for Striped {
    fn trouble(&self) -> Option<Trouble> {
        let message = match self.trouble().clone() {
            // What was mounted may have stopped since.
            None => self.is_mounted().map_or_else(
                |error| Some(error.to_string()),
                |there| (!there).then(|| "it is not mounted".to_owned()),
            )?,
            Some(trouble) => trouble,
        };
        Some(Trouble { reason: "PoolMissing", message: format!("pool {}: {message}", self.pool) })
    }
}
