//! Making a pool: a file system on each disk, or a volume group of all.
//!
//! Each disk was looked at when the plan was made, and is looked at again right before it is written to; mkfs and LVM look
//! once more. Every step can be done again after a crash, and the last one says that all of them were done.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use super::create::{Plan, Standing, standing};
use super::group::{self, MAKING, STRIPED};
use super::mark;
use crate::config::Layout;
use crate::error::{Error, ErrorKind, Result};
use crate::host::disks::{BLOCK, Disk, DiskLock, Machine};
use crate::host::lvm::{self, Group};
use crate::host::xfs::{self, Superblock, Uuid};
use crate::host::zero;

/// Zeros are written in pieces of so many bytes, each of which is then on the disk.
const ZEROS: u64 = 1 << 30;

/// Makes what the plan says, and returns what went wrong. With a file system on each, one disk's failure is not the
/// others'.
///
/// # Errors
/// When nothing of the plan can be carried out.
pub fn make(plan: &Plan, machine: &Machine, deadline: Duration) -> Result<Vec<Error>> {
    if plan.take.is_empty() {
        return Ok(Vec::new());
    }
    match plan.layout {
        Layout::Xfs => {
            Ok(plan.take.iter().filter_map(|disk| make_one(&plan.pool, disk, machine, deadline).err()).collect())
        }
        Layout::Striped | Layout::Lvm => make_group(plan, machine, deadline).map(|()| Vec::new()),
    }
}

/// Looks at the disk again, with nobody else of ours at work on it. Was it begun before? `None`: it is done.
fn look_again(
    pool: &str,
    layout: Layout,
    disk: &Disk,
    machine: &Machine,
    deadline: Duration,
) -> Result<Option<(DiskLock, bool)>> {
    let Some(lock) = DiskLock::try_acquire(disk)? else {
        fail!(Busy, "another process is at work on {disk}: try again");
    };
    // The plan was made before somebody agreed to it.
    match standing(pool, layout, disk, machine, deadline) {
        Standing::Blank => Ok(Some((lock, false))),
        Standing::HalfMade => Ok(Some((lock, true))),
        Standing::Member => Ok(None),
        Standing::Other(why) => fail!(Precondition, "{disk} is not blank any more: {}", why.join("; ")),
    }
}

fn make_one(pool: &str, disk: &Disk, machine: &Machine, deadline: Duration) -> Result<()> {
    let Some((_lock, is_begun)) = look_again(pool, Layout::Xfs, disk, machine, deadline)? else { return Ok(()) };
    make_filesystem(pool, disk, is_begun, machine, deadline).map(drop)
}

fn make_filesystem(pool: &str, device: &Disk, again: bool, machine: &Machine, deadline: Duration) -> Result<Uuid> {
    let uuid = mark::fresh_uuid(pool)?;
    tracing::info!(pool, device = %device, %uuid, again, "making a file system of the pool");
    xfs::make(&device.path, uuid, pool, again, deadline)
        .map_err(|error| Error::caused(error.kind(), format!("cannot make a file system on {device}"), error))?;
    match Superblock::parse(&machine.first_block(device, deadline)?) {
        Some(xfs) if xfs.uuid == uuid && !xfs.in_progress => Ok(uuid),
        found => {
            fail!(Internal, "mkfs.xfs has ended well, but {device} does not have what it should have made: {found:?}")
        }
    }
}

fn make_group(plan: &Plan, machine: &Machine, deadline: Duration) -> Result<()> {
    let (pool, name) = (plan.pool.as_str(), group::name(&plan.pool));
    let mut locks = Vec::new();
    let (mut fresh, mut begun) = (Vec::new(), Vec::new());
    for disk in &plan.take {
        let Some((lock, is_begun)) = look_again(pool, plan.layout, disk, machine, deadline)? else { continue };
        locks.push(lock);
        let is_in_group = is_begun && lvm::is_labelled(&machine.first_block(disk, deadline)?);
        match is_in_group && group::group_of(disk, deadline)?.as_ref() == Some(&name) {
            true => begun.push(disk),
            false => fresh.push(disk),
        }
    }
    if plan.layout == Layout::Striped && !begun.is_empty() {
        // The one that was interrupted goes on with the disks that it had.
        fresh.clear();
    }
    for disk in &fresh {
        mark::write(pool, disk)?;
        if plan.layout == Layout::Lvm {
            // The first tenant shall read zeros, too.
            tracing::info!(pool, disk = %disk, "writing zeros over all of a disk");
            let size = disk.size / BLOCK as u64 * BLOCK as u64;
            let _ = zero::write(&disk.path, BLOCK as u64..size, ZEROS, |_| ControlFlow::Continue(()))?;
        }
        lvm::prepare(&disk.path, deadline)?;
    }
    let paths = |disks: &[&Disk]| disks.iter().map(|disk| disk.path.clone()).collect::<Vec<PathBuf>>();
    let present: Vec<_> = begun.iter().copied().chain(&plan.members).collect();
    let group = if present.is_empty() {
        tracing::info!(pool, group = name, "making a volume group of the pool's disks");
        Group::make(&name, paths(&fresh), &[MAKING.to_owned()], deadline)?
    } else {
        let mut group = Group::new(&name, Some(paths(&present)), deadline)?;
        for disk in &fresh {
            group.extend(&disk.path)?;
        }
        group
    };
    let state = group.state()?;
    if state.disks.iter().any(|disk| disk.path.is_none()) {
        fail!(Precondition, "a disk of volume group {name} is missing");
    }
    if group::layout(&state).is_none() {
        let uuid = match plan.layout {
            Layout::Striped => Some(make_striped(pool, &group, machine, deadline)?),
            _ => None,
        };
        // From now on it is used.
        group.retag_group(&[MAKING.to_owned()], &group::tags(plan.layout, uuid))?;
    }
    begun.iter().chain(&fresh).try_for_each(|disk| mark::erase(pool, disk, machine, deadline))
}

/// The one volume of a striped pool, with its file system. Nobody has used the group yet.
fn make_striped(pool: &str, group: &Group, machine: &Machine, deadline: Duration) -> Result<Uuid> {
    if !group.volumes()?.iter().any(|volume| volume.name == STRIPED) {
        let disks = group.state()?.disks;
        let stripes = u32::try_from(disks.len()).unwrap_or(u32::MAX);
        // As much as the smallest has, on each.
        let size = u64::from(stripes) * disks.iter().map(|disk| disk.free).min().unwrap_or_default();
        group.create(STRIPED, size, Some(stripes), &[])?;
    }
    let device = group::striped_device(group, machine)?;
    match Superblock::parse(&machine.first_block(&device, deadline)?) {
        Some(xfs) if mark::is_of(pool, xfs.uuid) && !xfs.in_progress => Ok(xfs.uuid),
        // LVM has wiped what was there; what is there now is from an attempt of ours.
        _ => make_filesystem(pool, &device, true, machine, deadline),
    }
    .map_err(|error| Error::caused(ErrorKind::Internal, format!("cannot make volume group {}", group.name()), error))
}
