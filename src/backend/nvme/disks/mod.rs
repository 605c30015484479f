//! Pools of disks: found by what is on the disks, mounted, looked after, and made.
//!
//! A disk belongs to a pool when it carries a file system of the pool and is a disk that the pool's rules mean. A look at
//! all disks finds them, at the start and again while the driver runs, on a thread of its own: a disk that does not
//! answer holds up nobody but that thread. What has been found once is remembered, by the directory where it was mounted
//! also over a restart, so a disk that is missing is a trouble and not an empty pool.
//!
//! Nothing here writes to a disk but `create`, and that only to one which is positively blank.

mod chain;
mod create;
mod finder;
mod group;
mod held;
mod make;
mod mark;
mod member;
mod rules;
mod survey;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use self::create::{Plan, Refusal, plan};
pub use self::make::make;
pub use self::survey::{DiskView, MemberView, PoolView, Verdict, discover, show};

use self::chain::Chain;
use self::finder::Finder;
use self::group::GroupPart;
use self::held::Held;
use self::member::Member;
use self::rules::Names;
use super::group::Group;
use super::pool::{Below, Pool, Trouble};
use crate::config::{self, Fallback, Layout, Source};
use crate::error::{Context, Result};
use crate::host::disks::{Disk, Machine};
use crate::host::xfs::Uuid;

/// All pools of a node. Those of disks grow while they are used.
pub(super) struct Pools {
    configs: Vec<config::Pool>,
    entries: Vec<Entry>,
    disks: Arc<Finder>,
}

enum Entry {
    One(Arc<Pool>),
    /// The pool of disks with this number.
    Disks(usize),
    /// A volume group that an administrator has made.
    Group(Arc<Group>),
}

impl Pools {
    /// Of these configurations, with what a first look finds within `patience`. A program is killed after `deadline`.
    pub(super) fn new(pools: &[config::Pool], patience: Duration, deadline: Duration) -> Self {
        let pools = Self::unseen(pools, deadline);
        pools.disks.look_within(patience);
        pools
    }

    /// Nobody has looked yet.
    fn unseen(pools: &[config::Pool], deadline: Duration) -> Self {
        let mut finder = Finder::default();
        finder.deadline = deadline;
        let mut entries = Vec::new();
        for config in pools {
            match &config.source {
                Source::Folder => entries.push(Entry::One(Arc::new(Pool::new(config.clone())))),
                Source::Group(name) => {
                    entries.push(Entry::Group(Arc::new(Group::new(config.clone(), name, deadline))));
                }
                Source::Disks(disks) => {
                    entries.push(Entry::Disks(finder.pools.len()));
                    finder.pools.push(DiskPool::new(config, disks, &finder.machine, deadline));
                }
            }
        }
        Self { configs: pools.to_vec(), entries, disks: Arc::new(finder) }
    }

    /// Every pool that is a file system; of those of disks one for each. Looks for disks that have come, but does not wait for that.
    pub(super) fn iter(&self) -> std::vec::IntoIter<&Arc<Pool>> {
        self.disks.look_soon();
        self.known()
    }

    /// As `iter`, without a look.
    fn known(&self) -> std::vec::IntoIter<&Arc<Pool>> {
        let mut all = Vec::new();
        for entry in &self.entries {
            match entry {
                Entry::One(pool) => all.push(pool),
                Entry::Disks(number) => all.extend(self.disks.pools[*number].pools()),
                Entry::Group(_) => {}
            }
        }
        all.into_iter()
    }

    /// Every pool that is a volume group, and was seen at least once where Berth has made it.
    pub(super) fn groups(&self) -> impl Iterator<Item = &Arc<Group>> + Clone {
        self.entries.iter().flat_map(|entry| match entry {
            Entry::One(_) => None,
            Entry::Disks(number) => self.disks.pools[*number].group(),
            Entry::Group(group) => Some(group),
        })
    }

    /// Makes the pools whose configuration says `create: true`, as far as there are blank disks for them, and looks anew.
    pub(super) fn create(&self) {
        let deadline = self.disks.deadline;
        let creates = |pool: &&config::Pool| matches!(&pool.source, Source::Disks(disks) if disks.create);
        for config in self.configs.iter().filter(creates) {
            let machine = &self.disks.machine;
            let made = plan(&config.name, &self.configs, machine, deadline).and_then(|plan| {
                for Refusal { disk, why } in &plan.refused {
                    tracing::warn!(pool = config.name, %disk, why = why.join("; "), "a disk is not blank: left alone");
                }
                make(&plan, machine, deadline)
            });
            for error in made.unwrap_or_else(|error| vec![error]) {
                tracing::error!(pool = config.name, %error, "cannot make the pool, or a part of it");
            }
        }
        if self.configs.iter().any(|pool| creates(&pool)) {
            self.disks.look(true);
        }
    }
}

impl<'a> IntoIterator for &'a Pools {
    type Item = &'a Arc<Pool>;
    type IntoIter = std::vec::IntoIter<&'a Arc<Pool>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A pool of disks.
struct DiskPool {
    config: config::Pool,
    disks: config::Disks,
    parts: Chain<Part>,
    /// Stands for the pool while it has no disk; with `fallback: root` a pool of its own, on the root disk.
    spare: Arc<Pool>,
    spare_state: Arc<Spare>,
    /// A program is killed after this time.
    deadline: Duration,
}

/// A file system of the pool, or its volume group: as what it lies on, and as what volumes are carved from.
enum Part {
    Filesystem(Arc<Member>, Arc<Pool>),
    Group(Arc<GroupPart>, Arc<Group>),
}

impl Part {
    fn held(&self) -> &Held {
        match self {
            Self::Filesystem(member, _) => &member.held,
            Self::Group(part, _) => &part.held,
        }
    }

    /// Why what it lies on can't be used.
    fn trouble(&self) -> Option<Trouble> {
        match self {
            Self::Filesystem(member, _) => member.trouble(),
            Self::Group(part, _) => part.trouble(),
        }
    }
}

impl DiskPool {
    fn new(config: &config::Pool, disks: &config::Disks, machine: &Machine, deadline: Duration) -> Self {
        let has_fallback = config.fallback == Fallback::Root;
        let spare_state = Arc::new(Spare { pool: config.name.clone(), has_fallback, ..Spare::default() });
        let folder = config::Pool { source: Source::Folder, ..config.clone() };
        let pool = Self {
            config: config.clone(),
            disks: disks.clone(),
            parts: Chain::default(),
            spare: Arc::new(Pool::on(folder, spare_state.clone())),
            deadline,
            spare_state,
        };
        match pool.remember(machine) {
            Ok(()) => pool.spare_state.is_surely_empty.store(!has_fallback, Ordering::Relaxed),
            Err(error) => tracing::error!(pool = config.name, %error, "cannot tell which disks the pool has had"),
        }
        pool
    }

    /// The file systems that volumes may lie on.
    fn pools<'a>(&'a self) -> impl Iterator<Item = &'a Arc<Pool>> {
        let has_parts = self.parts.iter().next().is_some();
        let has_volumes = || self.spare_state.has_fallback && self.config.path.join("volumes").exists();
        let is_needed = !has_parts || self.spare_state.is_used() || has_volumes();
        let spare = Some(&self.spare).filter(|_| is_needed);
        let pool = |part: &'a Part| match part {
            Part::Filesystem(_, pool) => Some(pool),
            Part::Group(..) => None,
        };
        self.parts.iter().filter_map(pool).chain(spare)
    }

    /// The volume group that volumes may lie in.
    fn group(&self) -> Option<&Arc<Group>> {
        self.parts.iter().find_map(|part| match part {
            Part::Filesystem(..) => None,
            Part::Group(_, group) => Some(group),
        })
    }

    fn members(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.parts.iter().filter_map(|part| match part {
            Part::Filesystem(member, _) => Some(member),
            Part::Group(..) => None,
        })
    }

    /// The file system with this UUID, known from now on. One thread at a time.
    fn member(&self, uuid: Uuid, machine: &Machine) -> Arc<Member> {
        if let Some(known) = self.members().find(|member| member.uuid == uuid) {
            return known.clone();
        }
        let member = Arc::new(Member::new(&self.config.name, uuid, &self.config.path, machine));
        let config = self.part_config(Source::Folder, member.path.clone());
        self.parts.push(Part::Filesystem(member.clone(), Arc::new(Pool::on(config, member.clone()))));
        member
    }

    /// The volume group, known from now on. One thread at a time.
    fn known_group(&self, machine: &Machine) -> Arc<GroupPart> {
        let known = self.parts.iter().find_map(|part| match part {
            Part::Group(part, _) => Some(part),
            Part::Filesystem(..) => None,
        });
        if let Some(known) = known {
            return known.clone();
        }
        let part = Arc::new(GroupPart::new(&self.config.name, machine));
        let config = self.part_config(Source::Group(part.name.clone()), self.config.path.clone());
        let group = Group::on(config, &part.name, part.clone(), self.deadline);
        self.parts.push(Part::Group(part.clone(), Arc::new(group)));
        part
    }

    /// What a part looks like to who carves volumes from it.
    fn part_config(&self, source: Source, path: PathBuf) -> config::Pool {
        config::Pool { source, path, cap: None, fallback: Fallback::None, ..self.config.clone() }
    }

    /// The disks of parts about which a look has nothing to find out.
    fn settled_disks(&self) -> Vec<Disk> {
        let is_settled = |part: &&Part| match part {
            Part::Filesystem(member, _) => member.is_settled_on(&member.held.disks()) && member.held.gone().is_empty(),
            Part::Group(part, _) => part.held.gone().is_empty(),
        };
        self.parts.iter().filter(is_settled).flat_map(|part| part.held().disks()).collect()
    }

    /// May it be one of the pool's disks, by whatever name?
    fn may_own(&self, disk: &Disk) -> bool {
        rules::check(&self.disks.rules, disk, Names::MayHaveChanged).is_ok()
    }

    /// The directories where its file systems have been mounted before say which ones there have to be.
    fn remember(&self, machine: &Machine) -> std::io::Result<()> {
        let entries = match std::fs::read_dir(&self.config.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let name = entry?.file_name();
            let uuid = name.to_str().and_then(Uuid::parse);
            if let Some(uuid) = uuid.filter(|uuid| mark::is_of(&self.config.name, *uuid)) {
                self.member(uuid, machine);
            }
            if name == group::MEMORY && self.disks.layout == Layout::Lvm {
                self.known_group(machine);
            }
        }
        Ok(())
    }

    /// With `fallback: root` the root disk is used exactly as long as no disk can be.
    fn settle_spare(&self) -> Result<()> {
        let is_used = self.spare_state.has_fallback && !self.parts.iter().any(|part| part.trouble().is_none());
        if is_used {
            let path = &self.config.path;
            std::fs::create_dir_all(path).context(|| format!("cannot make {}", path.display()))?;
        }
        if self.spare_state.is_used.swap(is_used, Ordering::Relaxed) != is_used {
            let pool = &self.config.name;
            match is_used {
                true => {
                    tracing::warn!(pool, path = %self.config.path.display(), "no disk of the pool can be used: its new volumes lie on the root disk")
                }
                false => tracing::info!(pool, "the pool has disks: no new volume lies on the root disk"),
            }
        }
        Ok(())
    }
}

/// What stands for a pool of disks that has none.
#[derive(Default)]
struct Spare {
    pool: String,
    has_fallback: bool,
    /// New volumes go there.
    is_used: AtomicBool,
    /// No disk of the pool was ever mounted here, so a volume that is not found is nowhere.
    is_surely_empty: AtomicBool,
}

impl Spare {
    fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Relaxed)
    }
}

impl Below for Spare {
    fn trouble(&self) -> Option<Trouble> {
        if self.has_fallback {
            return None;
        }
        let message = format!("pool {}: no disk of it is there: `berth pool discover` shows which ones are", self.pool);
        Some(Trouble { reason: "PoolMissing", message })
    }

    fn is_closed(&self) -> bool {
        !self.is_used()
    }

    fn is_surely_empty(&self) -> bool {
        self.is_surely_empty.load(Ordering::Relaxed)
    }
}
