//! Looking for the disks of all pools, again and again, so that what comes late or comes back is used.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{DiskPool, mark};
use crate::config::Layout;
use crate::host::disks::{Disk, Machine};
use crate::host::xfs::{Superblock, Uuid};

/// A look is at most so old when a pool is asked.
const FRESH: Duration = Duration::from_secs(10);
/// So long a disk may take to show its first block.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Looks for the disks of all pools.
#[derive(Default)]
pub(super) struct Finder {
    pub(super) machine: Machine,
    /// A program is killed after this time.
    pub(super) deadline: Duration,
    pub(super) pools: Vec<DiskPool>,
    turn: Mutex<Turn>,
    /// Held by who looks.
    looking: Mutex<()>,
    /// A look has ended.
    ended: Condvar,
    /// What was last said in the log about each disk.
    said: Mutex<BTreeMap<String, String>>,
    /// Of each pool, when LVM was last asked, and about which disks.
    pub(super) asked: Mutex<BTreeMap<String, (Instant, Vec<u64>)>>,
}

#[derive(Default)]
struct Turn {
    is_looking: bool,
    last: Option<Instant>,
}

impl Finder {
    /// Begins a look, unless there was one just now or one is going on.
    pub(super) fn look_soon(self: &Arc<Self>) {
        let mut turn = self.turn();
        if self.pools.is_empty() || turn.is_looking || turn.last.is_some_and(|last| last.elapsed() < FRESH) {
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
    pub(super) fn look_within(self: &Arc<Self>, patience: Duration) {
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
    pub(super) fn look(&self, mounts: bool) {
        let _alone = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        match self.machine.disks() {
            Ok(disks) => self.look_at(&disks, mounts),
            Err(error) => self.say("", &format!("{error}")),
        }
        for pool in &self.pools {
            if let Err(error) = pool.settle_spare() {
                self.say(&pool.config.name, &format!("the pool can't use the root disk: {error}"));
            }
        }
    }

    fn look_at(&self, disks: &[Disk], mounts: bool) {
        let settled: Vec<_> = self.pools.iter().flat_map(DiskPool::settled_disks).collect();
        for pool in self.pools.iter().filter(|pool| pool.disks.layout != Layout::Xfs) {
            let meant: Vec<_> = disks.iter().filter(|disk| pool.may_own(disk)).collect();
            self.look_for_group(pool, &meant, &settled, mounts);
        }
        let mut found: BTreeMap<(usize, Uuid), Vec<Disk>> = BTreeMap::new();
        for disk in disks {
            let pools = self.pools.iter().enumerate();
            let pools: Vec<_> =
                pools.filter(|(_, pool)| pool.disks.layout == Layout::Xfs && pool.may_own(disk)).collect();
            if pools.is_empty() {
                continue;
            }
            let settled = pools.iter().find_map(|(number, pool)| {
                let member = pool.members().find(|member| member.is_settled_on(std::slice::from_ref(disk)))?;
                Some((*number, member.uuid))
            });
            let known = match settled {
                Some(known) => Some(known),
                None => match self.machine.first_block(disk, PATIENCE) {
                    Ok(block) => Superblock::parse(&block).filter(|xfs| !xfs.in_progress).and_then(|xfs| {
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
            self.pools[number].member(uuid, &self.machine).found_on_one_of(&disks, mounts);
        }
    }

    /// Tells the log, unless it has last said the same of this subject.
    pub(super) fn say(&self, subject: &str, text: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.insert(subject.to_owned(), text.to_owned()).as_deref() != Some(text) {
            tracing::error!("{text}");
        }
    }
}
