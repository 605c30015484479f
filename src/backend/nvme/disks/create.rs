//! Making a pool's file systems: which disks that would be, and doing it.
//!
//! Each disk is looked at when the plan is made, and again right before it is written to; mkfs looks once more. What an
//! earlier attempt has left half made is known by its superblock: mkfs writes one with the pool's UUID, and the mark that
//! it is not finished, before it writes anything else, and takes that mark away at last. Until then nobody mounts it, so
//! nobody's data can be on it, and it may be begun anew. So a crash at any time is mended by doing the same again.

use std::time::Duration;

use super::rules::{self, Names};
use super::{grouped, mark};
use crate::config::{self, Disks, Layout, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::host::disks::{Disk, DiskLock, Found, Machine};
use crate::host::filesystem::Kind;
use crate::host::xfs;
use crate::volume::format_bytes;

/// What would be made.
pub struct Plan {
    /// The pool.
    pub pool: String,
    /// What is made of the disks.
    pub layout: Layout,
    /// Blank disks that the pool would be made of, and those on which an earlier attempt was interrupted.
    pub take: Vec<Disk>,
    /// Disks that the pool has already.
    pub members: Vec<Disk>,
    /// Disks that its rules mean, and that are left alone.
    pub refused: Vec<Refusal>,
}

/// A disk that is left alone.
pub struct Refusal {
    /// Which.
    pub disk: Disk,
    /// What was found on it, or what else speaks against it.
    pub why: Vec<String>,
}

/// What a disk is to a pool whose rules mean it.
pub(super) enum Standing {
    /// A part of it.
    Member,
    /// An earlier attempt to make it a part was interrupted.
    HalfMade,
    /// Nobody's.
    Blank,
    /// Something else.
    Other(Vec<String>),
}

/// Finds out what making the pool of this name would mean. Writes nothing.
///
/// # Errors
/// `Invalid` when there is no such pool, or it is not one of disks.
pub fn plan(name: &str, pools: &[config::Pool], machine: &Machine, deadline: Duration) -> Result<Plan> {
    let Some(config) = pools.iter().find(|pool| pool.name == name) else {
        let known = pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>().join(", ");
        fail!(Invalid, "the configuration has no pool {name}; it has: {known}");
    };
    let Source::Disks(Disks { rules, layout, .. }) = &config.source else {
        fail!(Invalid, "pool {name} has no `disks` in the configuration: there is nothing to be made");
    };
    let mut plan =
        Plan { pool: name.to_owned(), layout: *layout, take: Vec::new(), members: Vec::new(), refused: Vec::new() };
    for disk in machine.disks()? {
        let is_meant = rules::check(rules, &disk, Names::Count).is_ok();
        if !is_meant && rules::check(rules, &disk, Names::MayHaveChanged).is_err() {
            continue;
        }
        match standing(name, *layout, &disk, machine, deadline) {
            Standing::Member => plan.members.push(disk),
            _ if !is_meant => {}
            Standing::Other(why) => plan.refused.push(Refusal { disk, why }),
            Standing::HalfMade | Standing::Blank => {
                let others = others(name, pools, &disk);
                if others.is_empty() && disk.size >= Kind::Xfs.minimum_size() {
                    plan.take.push(disk);
                } else if others.is_empty() {
                    let why = format!("it has less than {}", format_bytes(Kind::Xfs.minimum_size()));
                    plan.refused.push(Refusal { disk, why: vec![why] });
                } else {
                    let why =
                        format!("the rules of pool {} mean it too: say which one it belongs to", others.join(", "));
                    plan.refused.push(Refusal { disk, why: vec![why] });
                }
            }
        }
    }
    Ok(plan)
}

/// The other pools whose rules mean this disk.
pub(super) fn others(name: &str, pools: &[config::Pool], disk: &Disk) -> Vec<String> {
    let means = |pool: &&config::Pool| {
        pool.name != name
            && matches!(&pool.source, Source::Disks(disks) if rules::check(&disks.rules, disk, Names::Count).is_ok())
    };
    pools.iter().filter(means).map(|pool| pool.name.clone()).collect()
}

/// What this disk is to the pool of this name. What can't be found out speaks against the disk.
pub(super) fn standing(pool: &str, layout: Layout, disk: &Disk, machine: &Machine, deadline: Duration) -> Standing {
    if layout != Layout::Xfs {
        return match machine.what_is_on(disk, deadline) {
            Ok(found) if found.is_empty() => Standing::Blank,
            Ok(found) => match grouped::has(pool, disk, deadline) {
                Ok(true) => Standing::Member,
                Ok(false) => Standing::Other(found.iter().map(Found::to_string).collect()),
                Err(error) => Standing::Other(vec![error.to_string()]),
            },
            Err(error) => Standing::Other(vec![error.to_string()]),
        };
    }
    let ours = match machine.superblock(disk, deadline) {
        Ok(superblock) => superblock.filter(|xfs| mark::is_of(pool, xfs.uuid)),
        Err(error) => return Standing::Other(vec![error.to_string()]),
    };
    if ours.as_ref().is_some_and(|xfs| !xfs.in_progress) {
        return Standing::Member;
    }
    match machine.what_is_on(disk, deadline) {
        Ok(found) if found.is_empty() => Standing::Blank,
        Ok(found) if ours.is_some() && found.iter().all(is_left_by_mkfs) => Standing::HalfMade,
        Ok(found) => Standing::Other(found.iter().map(Found::to_string).collect()),
        Err(error) => Standing::Other(vec![error.to_string()]),
    }
}

fn is_left_by_mkfs(found: &Found) -> bool {
    match found {
        Found::Signature { name, offset } => name == "xfs" && *offset == 0,
        // mkfs has wiped the end before it wrote its superblock.
        Found::Byte(offset) => *offset < 1 << 20,
        _ => false,
    }
}

/// A disk, and whether it is a part of the pool now.
pub struct Made {
    /// Which.
    pub disk: Disk,
    /// Why it is none.
    pub result: Result<()>,
}

/// Makes what the plan says. One disk's failure is not the others'.
///
/// # Errors
/// When the plan as a whole can't be carried out; each disk has a result of its own.
pub fn make(plan: &Plan, machine: &Machine, deadline: Duration) -> Result<Vec<Made>> {
    if plan.layout != Layout::Xfs {
        // The plan was made before somebody agreed to it.
        let check_blank = |disk: &Disk| match standing(&plan.pool, plan.layout, disk, machine, deadline) {
            Standing::Other(why) => fail!(Precondition, "{disk} is not blank any more: {}", why.join("; ")),
            _ => Ok(()),
        };
        plan.take.iter().try_for_each(check_blank)?;
        grouped::make(plan, check_blank, deadline)?;
        return Ok(plan.take.iter().map(|disk| Made { disk: disk.clone(), result: Ok(()) }).collect());
    }
    let one = |disk: &Disk| Made { disk: disk.clone(), result: make_one(&plan.pool, disk, machine, deadline) };
    Ok(plan.take.iter().map(one).collect())
}

fn make_one(pool: &str, disk: &Disk, machine: &Machine, deadline: Duration) -> Result<()> {
    let Some(_lock) = DiskLock::try_acquire(disk)? else {
        fail!(Busy, "another process is at work on {disk}: try again");
    };
    // The plan was made before somebody agreed to it.
    let is_begun = match standing(pool, Layout::Xfs, disk, machine, deadline) {
        Standing::Blank => false,
        Standing::HalfMade => true,
        Standing::Member => return Ok(()),
        Standing::Other(why) => fail!(Precondition, "{disk} is not blank any more: {}", why.join("; ")),
    };
    let uuid = mark::fresh_uuid(pool)?;
    tracing::info!(pool, disk = %disk, %uuid, again = is_begun, "making a file system of the pool");
    xfs::make(&disk.path, uuid, pool, is_begun, deadline)
        .map_err(|error| Error::caused(error.kind(), format!("cannot make a file system on {disk}"), error))?;
    match machine.superblock(disk, deadline)? {
        Some(xfs) if xfs.uuid == uuid && !xfs.in_progress => Ok(()),
        found => {
            let message =
                format!("mkfs.xfs has ended well, but {disk} does not have what it should have made: {found:?}");
            Err(Error::new(ErrorKind::Internal, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_mkfs_leaves_counts_as_half_made() {
        let signature = |name: &str, offset| Found::Signature { name: name.to_owned(), offset };
        assert!(is_left_by_mkfs(&signature("xfs", 0)) && is_left_by_mkfs(&Found::Byte(0)));
        for other in [
            signature("ext4", 0x438),
            signature("xfs", 4096),
            Found::Byte(1 << 20),
            Found::InUse,
            Found::ReadOnly,
            Found::Swap,
            Found::Mounted("/a".into()),
            Found::Partitions(vec!["nvme0n1p1".to_owned()]),
            Found::Holders(vec!["dm-0".to_owned()]),
        ] {
            assert!(!is_left_by_mkfs(&other), "{other}");
        }
    }
}
