//! Which disks a pool would be made of, and which not.
//!
//! What an earlier attempt has left half made is known. On a single disk mkfs writes a superblock with the pool's UUID,
//! and the mark that it is not finished, before it writes anything else, and takes that mark away at last. A disk of a
//! volume group has our mark in its first sector, or is in a group that lacks the tag of finished ones. Until then nobody
//! uses it, so nobody's data can be on it, and it may be begun anew.

use std::time::Duration;

use super::group;
use super::mark;
use super::rules::{self, Names};
use crate::config::{self, Disks, Layout, Source};
use crate::error::Result;
use crate::host::disks::{BLOCK, Disk, Found, Machine};
use crate::host::filesystem::Kind;
use crate::host::lvm::{self, Group};
use crate::host::xfs::Superblock;
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
    let layout = *layout;
    let mut plan = Plan { pool: name.to_owned(), layout, take: Vec::new(), members: Vec::new(), refused: Vec::new() };
    let mut refuse = |disk: Disk, why: String| plan.refused.push(Refusal { disk, why: vec![why] });
    let mut others_refused = Vec::new();
    for disk in machine.disks()? {
        let is_meant = rules::check(rules, &disk, Names::Count).is_ok();
        if !is_meant && rules::check(rules, &disk, Names::MayHaveChanged).is_err() {
            continue;
        }
        match standing(name, layout, &disk, machine, deadline) {
            Standing::Member => plan.members.push(disk),
            _ if !is_meant => {}
            Standing::Other(why) => others_refused.push(Refusal { disk, why }),
            Standing::HalfMade | Standing::Blank => {
                let others = others(name, pools, &disk);
                let least = Kind::Xfs.minimum_size();
                if !others.is_empty() {
                    let others = others.join(", ");
                    refuse(disk, format!("the rules of pool {others} mean it too: say which one it belongs to"));
                } else if disk.size < least {
                    refuse(disk, format!("it has less than {}", format_bytes(least)));
                } else {
                    plan.take.push(disk);
                }
            }
        }
    }
    if layout == Layout::Striped && !plan.members.is_empty() {
        for disk in std::mem::take(&mut plan.take) {
            refuse(disk, "the pool is striped over its disks, and can't take another one".to_owned());
        }
    }
    plan.refused.extend(others_refused);
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
    try_standing(pool, layout, disk, machine, deadline).unwrap_or_else(|error| Standing::Other(vec![error.to_string()]))
}

fn try_standing(pool: &str, layout: Layout, disk: &Disk, machine: &Machine, deadline: Duration) -> Result<Standing> {
    let block = machine.first_block(disk, deadline)?;
    let is_begun = if layout == Layout::Xfs {
        let ours = Superblock::parse(&block).filter(|xfs| mark::is_of(pool, xfs.uuid));
        if ours.as_ref().is_some_and(|xfs| !xfs.in_progress) {
            return Ok(Standing::Member);
        }
        ours.is_some()
    } else {
        if lvm::is_labelled(&block)
            && let Some(standing) = standing_in_group(pool, disk, deadline)?
        {
            return Ok(standing);
        }
        mark::is_making(pool, &block)
    };
    let found = machine.what_is_on(disk, deadline)?;
    Ok(if found.is_empty() {
        Standing::Blank
    } else if is_begun && found.iter().all(|found| is_left_behind(layout, found)) {
        Standing::HalfMade
    } else {
        Standing::Other(found.iter().map(Found::to_string).collect())
    })
}

/// Of a disk that LVM has labelled. `None`: it is in no group.
fn standing_in_group(pool: &str, disk: &Disk, deadline: Duration) -> Result<Option<Standing>> {
    let Some(found) = group::group_of(disk, deadline)? else { return Ok(None) };
    if found != group::name(pool) {
        return Ok(Some(Standing::Other(vec![format!("a part of volume group {found}")])));
    }
    let state = Group::new(&found, Some(vec![disk.path.clone()]), deadline)?.state()?;
    Ok(Some(match group::layout(&state) {
        Some(_) => Standing::Member,
        None if state.tags.iter().any(|tag| tag == group::MAKING) => Standing::HalfMade,
        None => Standing::Other(vec![format!("a part of volume group {found}, which Berth has not made")]),
    }))
}

/// May an interrupted attempt have left that? A mark of ours is there.
fn is_left_behind(layout: Layout, found: &Found) -> bool {
    match found {
        Found::Signature { name, offset } if layout == Layout::Xfs => name == "xfs" && *offset == 0,
        Found::Signature { name, offset } => name == "LVM2_member" && *offset < BLOCK as u64,
        // The end of the disk was zeros when it was begun, and neither mkfs nor LVM has written there.
        Found::Byte(offset) => *offset < 1 << 20,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_attempt_leaves_counts_as_half_made() {
        let signature = |name: &str, offset| Found::Signature { name: name.to_owned(), offset };
        let both = [Layout::Xfs, Layout::Striped];
        assert!(is_left_behind(Layout::Xfs, &signature("xfs", 0)) && is_left_behind(Layout::Xfs, &Found::Byte(0)));
        assert!(is_left_behind(Layout::Lvm, &signature("LVM2_member", 536)));
        assert!(!is_left_behind(Layout::Lvm, &signature("xfs", 0)));
        assert!(!is_left_behind(Layout::Xfs, &signature("LVM2_member", 536)));
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
            assert!(both.iter().all(|layout| !is_left_behind(*layout, &other)), "{other}");
        }
    }
}
