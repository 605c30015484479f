//! Pools of disks: found by what is on the disks, mounted, looked after, and made.
//!
//! A disk belongs to a pool when it carries a file system of the pool and is a disk that the pool's rules mean. A look at
//! all disks finds them, at the start and again while the driver runs, on a thread of its own: a disk that does not
//! answer holds up nobody but that thread. What has been found once is remembered, by the directory where it was mounted
//! also over a restart, so a disk that is missing is a trouble and not an empty pool.
//!
//! Nothing here writes to a disk but `create`, and that only to one which is positively blank.

mod create;
mod grouped;
mod mark;
mod member;
mod rules;
mod survey;
mod watch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub use self::create::{Made, Plan, Refusal, make, plan};
pub use self::survey::{DiskView, MemberView, PoolView, Verdict, discover, show};

use self::grouped::Striped;
pub(super) use self::grouped::group_name;
use self::member::Member;
use self::rules::Names;
use super::pool::{Below, Pool, Trouble};
use crate::config::{self, Fallback, Layout, Source};
use crate::error::{Context, Result};
use crate::host::disks::{Disk, Machine};
use crate::host::xfs::Uuid;

/// A look is at most so old when a pool is asked.
const FRESH: Duration = Duration::from_secs(10);
/// So long a disk may take to show its first sector.
const PATIENCE: Duration = Duration::from_secs(5);

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
    /// A volume group, which is no file system.
    Group,
}

impl Pools {
    /// Of these configurations, with what a first look finds within `patience`.
    pub(super) fn new(pools: &[config::Pool], patience: Duration) -> Self {
        let pools = Self::unseen(pools);
        pools.disks.look_within(patience);
        pools
    }

    /// Nobody has looked yet.
    fn unseen(pools: &[config::Pool]) -> Self {
        let mut finder = Finder::default();
        let mut entries = Vec::new();
        for config in pools {
            match &config.source {
                Source::Group(_) => entries.push(Entry::Group),
                Source::Folder => entries.push(Entry::One(Arc::new(Pool::new(config.clone())))),
                Source::Disks(disks) if disks.layout == Layout::Lvm => entries.push(Entry::Group),
                Source::Disks(disks) if disks.layout == Layout::Striped => {
                    let striped = Arc::new(Striped::new(&config.name, config.path.clone()));
                    finder.striped.push(striped.clone());
                    let folder = config::Pool { source: Source::Folder, ..config.clone() };
                    entries.push(Entry::One(Arc::new(Pool::on(folder, striped))));
                }
                Source::Disks(disks) => {
                    entries.push(Entry::Disks(finder.pools.len()));
                    finder.pools.push(DiskPool::new(config, disks, &finder.machine));
                }
            }
        }
        Self { configs: pools.to_vec(), entries, disks: Arc::new(finder) }
    }

    /// Every pool; of those of disks one for each file system. Looks for disks that have come, but does not wait for that.
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
                Entry::Group => {}
            }
        }
        all.into_iter()
    }

    /// Makes the pools whose configuration says `create: true`, as far as there are blank disks for them, and looks anew.
    pub(super) fn create(&self, deadline: Duration) {
        let creates = |pool: &&config::Pool| matches!(&pool.source, Source::Disks(disks) if disks.create);
        for config in self.configs.iter().filter(creates) {
            let machine = &self.disks.machine;
            let made = plan(&config.name, &self.configs, machine, deadline).and_then(|plan| {
                for Refusal { disk, why } in &plan.refused {
                    tracing::warn!(pool = config.name, %disk, why = why.join("; "), "a disk is not blank: left alone");
                }
                make(&plan, machine, deadline)
            });
            let errors = match made {
                Ok(made) => made.into_iter().filter_map(|made| made.result.err()).collect(),
                Err(error) => vec![error],
            };
            for error in errors {
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
    members: Chain<Part>,
    /// Stands for the pool while it has no disk; with `fallback: root` a pool of its own, on the root disk.
    spare: Arc<Pool>,
    spare_state: Arc<Spare>,
}

/// A file system of the pool, as what it lies on and as what volumes are carved from.
struct Part {
    member: Arc<Member>,
    pool: Arc<Pool>,
}

impl DiskPool {
    fn new(config: &config::Pool, disks: &config::Disks, machine: &Machine) -> Self {
        let has_fallback = config.fallback == Fallback::Root;
        let spare_state = Arc::new(Spare { pool: config.name.clone(), has_fallback, is_used: AtomicBool::new(false) });
        let folder = config::Pool { source: Source::Folder, ..config.clone() };
        let pool = Self {
            config: config.clone(),
            disks: disks.clone(),
            members: Chain::default(),
            spare: Arc::new(Pool::on(folder, spare_state.clone())),
            spare_state,
        };
        pool.remember(machine);
        pool
    }

    /// What volumes may lie on.
    fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        let has_members = self.members.iter().next().is_some();
        let has_volumes = || self.spare_state.has_fallback && self.config.path.join("volumes").exists();
        let is_needed = !has_members || self.spare_state.is_used() || has_volumes();
        let spare = Some(&self.spare).filter(|_| is_needed);
        self.members.iter().map(|part| &part.pool).chain(spare)
    }

    fn members(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.members.iter().map(|part| &part.member)
    }

    /// The file system with this UUID, known from now on. One thread at a time.
    fn member(&self, uuid: Uuid, machine: &Machine) -> Arc<Member> {
        if let Some(known) = self.members().find(|member| member.uuid == uuid) {
            return known.clone();
        }
        let member = Arc::new(Member::new(&self.config.name, uuid, &self.config.path, machine));
        let config = config::Pool {
            source: Source::Folder,
            path: member.path.clone(),
            cap: None,
            fallback: Fallback::None,
            ..self.config.clone()
        };
        let pool = Arc::new(Pool::on(config, member.clone()));
        self.members.push(Part { member: member.clone(), pool });
        member
    }

    /// The directories where its file systems have been mounted before say which ones there have to be.
    fn remember(&self, machine: &Machine) {
        let entries = std::fs::read_dir(&self.config.path).into_iter().flatten().flatten();
        for name in entries.map(|entry| entry.file_name()) {
            if let Some(uuid) = name.to_str().and_then(Uuid::parse).filter(|uuid| mark::is_of(&self.config.name, *uuid))
            {
                self.member(uuid, machine);
            }
        }
    }

    /// With `fallback: root` the root disk is used exactly as long as no disk can be.
    fn settle_spare(&self) -> Result<()> {
        let is_used =
            self.spare_state.has_fallback && !self.members().any(|member| Below::trouble(&**member).is_none());
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
struct Spare {
    pool: String,
    has_fallback: bool,
    /// New volumes go there.
    is_used: AtomicBool,
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
        !self.has_fallback
    }
}

/// Looks for the disks of all pools.
#[derive(Default)]
struct Finder {
    machine: Machine,
    pools: Vec<DiskPool>,
    striped: Vec<Arc<Striped>>,
    turn: Mutex<Turn>,
    /// Held by who looks.
    looking: Mutex<()>,
    /// A look has ended.
    ended: Condvar,
    /// What was last said in the log about each disk.
    said: Mutex<BTreeMap<String, String>>,
}

#[derive(Default)]
struct Turn {
    is_looking: bool,
    last: Option<Instant>,
}

impl Finder {
    /// Begins a look, unless there was one just now or one is going on.
    fn look_soon(self: &Arc<Self>) {
        let mut turn = self.turn();
        if (self.pools.is_empty() && self.striped.is_empty())
            || turn.is_looking
            || turn.last.is_some_and(|last| last.elapsed() < FRESH)
        {
            return;
        }
        turn.is_looking = true;
        drop(turn);
        let finder = self.clone();
        let started = std::thread::Builder::new().name("look-for-disks".to_owned()).spawn(move || {
            finder.look(true);
            let mut turn = finder.turn();
            *turn = Turn { is_looking: false, last: Some(Instant::now()) };
            finder.ended.notify_all();
        });
        if let Err(error) = started {
            tracing::error!(%error, "cannot start a thread to look for disks");
            self.turn().is_looking = false;
        }
    }

    /// Looks, and waits at most so long for the end of it.
    fn look_within(self: &Arc<Self>, patience: Duration) {
        self.look_soon();
        let waited = self.ended.wait_timeout_while(self.turn(), patience, |turn| turn.is_looking);
        if waited.is_ok_and(|(_, waited)| waited.timed_out()) {
            tracing::warn!(?patience, "looking for the pools' disks takes long: going on without");
        }
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at every disk that may belong to a pool, and mounts what does if that is wanted.
    fn look(&self, mounts: bool) {
        let _alone = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        match self.machine.disks() {
            Ok(disks) => self.look_at(&disks, mounts),
            Err(error) => self.say("", &format!("{error}")),
        }
        // The last: LVM reads every disk, and one of them may not answer.
        for striped in &self.striped {
            striped.look(mounts);
        }
        for pool in &self.pools {
            if let Err(error) = pool.settle_spare() {
                self.say(&pool.config.name, &format!("the pool can't use the root disk: {error}"));
            }
        }
    }

    fn look_at(&self, disks: &[Disk], mounts: bool) {
        let mut found: BTreeMap<(usize, Uuid), Vec<Disk>> = BTreeMap::new();
        for disk in disks {
            let is_meant = |pool: &DiskPool| rules::check(&pool.disks.rules, disk, Names::MayHaveChanged).is_ok();
            let pools =
                self.pools.iter().enumerate().filter(|(_, pool)| pool.disks.layout == Layout::Xfs && is_meant(pool));
            let pools: Vec<_> = pools.collect();
            if pools.is_empty() {
                continue;
            }
            let settled = pools.iter().find_map(|(number, pool)| {
                let member = pool.members().find(|member| member.is_settled_on(disk))?;
                Some((*number, member.uuid))
            });
            let known = match settled {
                Some(known) => Some(known),
                None => match self.machine.superblock(disk, PATIENCE) {
                    Ok(superblock) => superblock.filter(|xfs| !xfs.in_progress).and_then(|xfs| {
                        let (number, _) = pools.iter().find(|(_, pool)| mark::is_of(&pool.config.name, xfs.uuid))?;
                        Some((*number, xfs.uuid))
                    }),
                    Err(error) => {
                        self.say(&disk.name, &format!("cannot tell whether {disk} belongs to a pool: {error}"));
                        None
                    }
                },
            };
            if let Some(known) = known {
                found.entry(known).or_default().push(disk.clone());
            }
        }
        for ((number, uuid), disks) in found {
            self.pools[number].member(uuid, &self.machine).found_on(&disks, mounts);
        }
    }

    /// Tells the log, unless it has last said the same of this subject.
    fn say(&self, subject: &str, text: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.insert(subject.to_owned(), text.to_owned()).as_deref() != Some(text) {
            tracing::error!("{text}");
        }
    }
}

/// A list that only grows, so that what is in it can be lent for as long as the list lives.
struct Chain<T> {
    first: OnceLock<Box<Link<T>>>,
}

struct Link<T> {
    value: T,
    next: OnceLock<Box<Link<T>>>,
}

impl<T> Default for Chain<T> {
    fn default() -> Self {
        Self { first: OnceLock::default() }
    }
}

impl<T> Chain<T> {
    fn push(&self, value: T) {
        let mut fresh = Box::new(Link { value, next: OnceLock::default() });
        let mut place = &self.first;
        while let Err(refused) = place.set(fresh) {
            fresh = refused;
            // Somebody is there: behind him, then.
            if let Some(link) = place.get() {
                place = &link.next;
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        let mut place = &self.first;
        std::iter::from_fn(move || {
            let link = place.get()?;
            place = &link.next;
            Some(&link.value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_lends_what_is_in_it_while_it_grows() {
        let list = Chain::default();
        assert_eq!(list.iter().count(), 0);
        list.push("one".to_owned());
        let first = list.iter().next().unwrap();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let list = &list;
                scope.spawn(move || list.push(number.to_string()));
            }
        });
        assert_eq!(first, "one");
        let mut all: Vec<_> = list.iter().cloned().collect();
        assert_eq!(all.remove(0), "one");
        all.sort();
        assert_eq!(all, ["0", "1", "2", "3", "4", "5", "6", "7"]);
    }
}
