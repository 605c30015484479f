//! What there is, for people: every disk of the machine and what it is to the pools, every pool and what it is made of.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::create::{Standing, others, standing};
use super::rules::{self, Names};
use super::{Entry, Part, Pools};
use crate::backend::nvme::group::Group;
use crate::backend::nvme::pool::Pool;
use crate::config::{self, Source};
use crate::error::Result;
use crate::host::disks::{Disk, Found, Machine, Sort};
use crate::host::lvm::State;
use crate::host::smart::Smart;
use crate::host::{files, mounts};

/// A disk, and what it is to the pools.
pub struct DiskView {
    /// Which.
    pub disk: Disk,
    /// What is on it; empty: it is blank. `Err` says why that can't be told.
    pub found: Result<Vec<Found>, String>,
    /// What it is to the pools.
    pub verdict: Verdict,
}

/// What a disk is to the pools of a configuration.
pub enum Verdict {
    /// It belongs to this pool.
    Member(String),
    /// Making it a part of this pool was interrupted; doing it again goes on.
    HalfMade(String),
    /// It is blank, and `berth pool create` would take it for this pool.
    Fits(String),
    /// The rules of this pool mean it, but it would not be taken, for these reasons.
    Refused(String, Vec<String>),
    /// No pool means it; why not, for each pool.
    Unmeant(Vec<(String, String)>),
}

/// Looks at every disk of this machine; at loop devices only where a pool names them. Changes nothing.
///
/// # Errors
/// When the disks can't even be listed.
pub fn discover(pools: &[config::Pool], machine: &Machine, deadline: Duration) -> Result<Vec<DiskView>> {
    let view = |disk: Disk| {
        let found = machine.what_is_on(&disk, deadline).map_err(|error| error.to_string());
        DiskView { verdict: verdict(&disk, pools, machine, deadline), found, disk }
    };
    let is_shown = |disk: &Disk| disk.sort != Sort::Loop || !others("", pools, disk).is_empty();
    Ok(machine.disks()?.into_iter().filter(is_shown).map(view).collect())
}

fn verdict(disk: &Disk, pools: &[config::Pool], machine: &Machine, deadline: Duration) -> Verdict {
    let mut unmeant = Vec::new();
    let mut meant = Vec::new();
    for pool in pools {
        let Source::Disks(disks) = &pool.source else { continue };
        let standing = standing(&pool.name, disks.layout, disk, machine, deadline);
        match (rules::check(&disks.rules, disk, Names::Count), standing) {
            (chosen, Standing::Member) => {
                // It was chosen once.
                return match (chosen, rules::check(&disks.rules, disk, Names::MayHaveChanged)) {
                    (Err(_), Err(why)) => {
                        let what = format!("it has a file system of the pool, but does not fit its rules: {why}");
                        Verdict::Refused(pool.name.clone(), vec![what])
                    }
                    _ => Verdict::Member(pool.name.clone()),
                };
            }
            (Err(why), _) => unmeant.push((pool.name.clone(), why)),
            (Ok(()), standing) => meant.push((pool.name.clone(), standing)),
        }
    }
    if meant.len() > 1 {
        let names: Vec<_> = meant.into_iter().map(|(name, _)| name).collect();
        let why = format!("the rules of {} mean it: say which one it belongs to", names.join(" and "));
        return Verdict::Refused(names.join(", "), vec![why]);
    }
    match meant.pop() {
        None => Verdict::Unmeant(unmeant),
        Some((name, Standing::HalfMade)) => Verdict::HalfMade(name),
        Some((name, Standing::Other(why))) => Verdict::Refused(name, why),
        Some((name, _)) => Verdict::Fits(name),
    }
}

/// A pool.
pub struct PoolView {
    /// What classes call it.
    pub name: String,
    /// As the configuration has it.
    pub source: Source,
    /// What volumes are carved from.
    pub parts: Vec<MemberView>,
}

/// What volumes are carved from: a directory, a file system, or a volume group.
#[derive(Default)]
pub struct MemberView {
    /// Where it is; of a volume group its name.
    pub path: PathBuf,
    /// The file system's UUID, where it is one that Berth has made.
    pub uuid: Option<String>,
    /// The disks that it was found on, and what each says about itself.
    pub disks: Vec<(Disk, Option<Smart>)>,
    /// Its disks are there, and it only has to be mounted, as the driver does.
    pub waits_for_mount: bool,
    /// Why it can't be used.
    pub trouble: Option<String>,
    /// What is not well with it all the same.
    pub warnings: Vec<String>,
    /// Bytes of the file system; `None` where it can't be asked, here and below.
    pub size: Option<u64>,
    /// Bytes that nothing lies on.
    pub free: Option<u64>,
    /// Bytes promised to volumes and snapshots.
    pub promised: Option<u64>,
    /// Files can share blocks: snapshots and clones are to be had.
    pub reflink: Option<bool>,
    /// It is mounted with project quotas: volumes may be directories.
    pub quotas: Option<bool>,
}

/// Shows the pools, or the one of this name. With `mounts` what is not mounted is, as the driver does it.
///
/// # Errors
/// `Invalid` when there is no such pool.
pub fn show(pools: &[config::Pool], name: Option<&str>, mounts: bool, deadline: Duration) -> Result<Vec<PoolView>> {
    let wanted: Vec<_> = pools.iter().filter(|pool| name.is_none_or(|name| name == pool.name)).cloned().collect();
    if let Some(name) = name.filter(|_| wanted.is_empty()) {
        let known = pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>().join(", ");
        fail!(Invalid, "the configuration has no pool {name}; it has: {known}");
    }
    let all = Pools::unseen(&wanted, deadline);
    all.disks.look(mounts);
    let mut views = Vec::new();
    for (config, entry) in wanted.into_iter().zip(&all.entries) {
        let parts = match entry {
            Entry::One(pool) => vec![view(pool)],
            Entry::Group(group) => vec![view_group(group)],
            Entry::Disks(number) => {
                let pool = &all.disks.pools[*number];
                let spare = pool.pools().filter(|part| std::ptr::eq(*part, &pool.spare));
                pool.parts.iter().map(view_part).chain(spare.map(view)).collect()
            }
        };
        views.push(PoolView { name: config.name, source: config.source, parts });
    }
    Ok(views)
}

fn view(pool: &Arc<Pool>) -> MemberView {
    let path = pool.path().to_owned();
    let trouble = pool.state().err();
    let is_there = trouble.as_ref().is_none_or(|trouble| trouble.leaves_it_readable());
    let space = files::space(&path).ok().filter(|_| is_there);
    let line = mounts::line_of(&path).ok().flatten().filter(|_| is_there);
    MemberView {
        warnings: pool.warnings().into_iter().map(|warning| warning.message).collect(),
        size: space.map(|space| space.total),
        free: space.map(|space| space.free),
        promised: pool.promised().ok().filter(|_| is_there),
        reflink: pool.has_reflink().ok().filter(|_| trouble.is_none()),
        quotas: line.map(|line| line.contains("prjquota") || line.contains("pquota")),
        trouble: trouble.map(|trouble| trouble.message),
        path,
        ..MemberView::default()
    }
}

/// All of it is one part.
fn view_group(group: &Group) -> MemberView {
    let path = group.group_name().into();
    match group.state() {
        Err(trouble) => MemberView { path, trouble: Some(trouble.message), ..MemberView::default() },
        Ok(State { size, free, .. }) => MemberView {
            path,
            size: Some(size),
            free: Some(free),
            promised: Some(size.saturating_sub(free)),
            warnings: group.troubles().into_iter().map(|warning| warning.message).collect(),
            ..MemberView::default()
        },
    }
}

fn view_part(part: &Part) -> MemberView {
    let held = part.held();
    held.look_after();
    let disks = held.wards().into_iter().map(|ward| (ward.disk, ward.smart)).collect();
    match part {
        Part::Filesystem(member, pool) => {
            let (uuid, waits_for_mount) = (Some(member.uuid.to_string()), member.waits_for_mount());
            MemberView { uuid, waits_for_mount, disks, ..view(pool) }
        }
        Part::Group(_, group) => MemberView { disks, ..view_group(group) },
    }
}
