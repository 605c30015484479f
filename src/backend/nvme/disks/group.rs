//! Pools whose disks are one volume group, `berth-NAME`: found by LVM's labels, with a tag that says that it was finished.
//!
//! With the layout `striped` the group has one volume, over all disks, with the pool's one file system. With `lvm` it is
//! what volumes are carved from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::DiskPool;
use super::finder::{Finder, PATIENCE};
use super::held::{self, Held};
use super::mark;
use crate::backend::nvme::pool::{Below, Trouble};
use crate::config::Layout;
use crate::error::{Context, Result};
use crate::host::disks::{Disk, Machine};
use crate::host::lvm::{self, Group, State};
use crate::host::xfs::{Superblock, Uuid};

/// LVM is asked about the same disks after this time at the earliest.
const AGAIN: Duration = Duration::from_secs(30);
/// The one volume of a striped pool.
pub(super) const STRIPED: &str = "pool";
/// Tag of a group that is being made. Nothing of it is used.
pub(super) const MAKING: &str = "berth.making";
/// Begins the tag of a group that was finished: what is made of its disks.
const LAYOUT: &str = "berth.layout=";
/// Begins the tag that says which file system a striped group has.
const FILESYSTEM: &str = "berth.xfs=";
/// A directory in the pool's own, which says over a restart that there has been a group.
pub(super) const MEMORY: &str = "group";

/// The name of a pool's group.
pub(super) fn name(pool: &str) -> String {
    format!("berth-{pool}")
}

/// The tags of a group that was finished.
pub(super) fn tags(layout: Layout, uuid: Option<Uuid>) -> Vec<String> {
    let uuid = uuid.map(|uuid| format!("{FILESYSTEM}{uuid}"));
    std::iter::once(format!("{LAYOUT}{}", layout.name())).chain(uuid).collect()
}

/// What a finished group was made for. `None`: it was not finished.
pub(super) fn layout(state: &State) -> Option<&str> {
    state.tags.iter().find_map(|tag| tag.strip_prefix(LAYOUT))
}

/// The volume group of a pool.
pub(super) struct GroupPart {
    pub(super) name: String,
    pub(super) held: Held,
    /// Why it can't be used, and how many of its disks LVM misses.
    state: Mutex<(Option<String>, usize)>,
}

impl GroupPart {
    pub(super) fn new(pool: &str, machine: &Machine) -> Self {
        Self { name: name(pool), held: Held::new(pool, machine), state: Mutex::default() }
    }

    fn state(&self) -> (Option<String>, usize) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, trouble: Option<String>, missing: usize) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = (trouble, missing);
    }
}

impl Below for GroupPart {
    fn trouble(&self) -> Option<Trouble> {
        let missing = |message: &str| Some(self.held.trouble("PoolMissing", message));
        if let (Some(trouble), _) = self.state() {
            return missing(&trouble);
        }
        let (all, gone) = (self.held.disks(), self.held.gone());
        if all.is_empty() {
            return missing(&format!("no disk of its volume group {} is there", self.name));
        }
        if gone.len() == all.len() { missing(&format!("{} is gone", held::list(&gone))) } else { None }
    }

    fn warnings(&self) -> Vec<Trouble> {
        let (gone, (_, missing)) = (self.held.gone(), self.state());
        let what = match (gone.is_empty(), missing) {
            (true, 0) => None,
            (true, missing) => Some(format!("{missing} disks of the volume group {} are missing", self.name)),
            (false, _) => Some(format!("{} is gone, with the volumes that lie on it", held::list(&gone))),
        };
        let what = what.map(|what| self.held.trouble("DiskMissing", &what));
        what.into_iter().chain(self.held.warnings()).collect()
    }

    fn disks(&self) -> Vec<PathBuf> {
        self.held.disks().into_iter().map(|disk| disk.path).collect()
    }
}

impl Finder {
    /// Looks for the group of a pool on these disks, which its rules mean. About the settled ones all is known.
    pub(super) fn look_for_group(&self, pool: &DiskPool, disks: &[&Disk], settled: &[Disk], mounts: bool) {
        if let Err(error) = self.find_group(pool, disks, settled, mounts) {
            self.say(&pool.config.name, &format!("cannot find the volume group of pool {}: {error}", pool.config.name));
        }
    }

    fn find_group(&self, pool: &DiskPool, disks: &[&Disk], settled: &[Disk], mounts: bool) -> Result<()> {
        let (mut labelled, mut news) = (Vec::new(), Vec::new());
        for disk in disks {
            if settled.contains(*disk) {
                labelled.push(*disk);
            } else if lvm::is_labelled(&self.machine.first_block(disk, PATIENCE)?) {
                labelled.push(*disk);
                news.push(disk.sequence);
            }
        }
        // Asking LVM takes a process: only when there is something new, or it may have changed.
        if news.is_empty() || !self.may_ask(&pool.config.name, news) {
            return Ok(());
        }
        let name = name(&pool.config.name);
        let paths: Vec<_> = labelled.iter().map(|disk| disk.path.clone()).collect();
        let groups: BTreeMap<_, _> = lvm::groups_on(&paths, self.deadline)?.into_iter().collect();
        let is_ours = |disk: &&Disk| groups.get(&disk.path).is_some_and(|group| group.as_ref() == Some(&name));
        let ours: Vec<_> = labelled.into_iter().filter(is_ours).cloned().collect();
        if ours.is_empty() {
            return Ok(());
        }
        let group = Group::new(&name, Some(ours.iter().map(|disk| disk.path.clone()).collect()), self.deadline)?;
        let mut state = group.state()?;
        let Some(made_for) = layout(&state) else {
            fail!(Precondition, "making it was interrupted: `berth pool create {}` goes on", pool.config.name);
        };
        if made_for != pool.disks.layout.name() {
            let configured = pool.disks.layout.name();
            fail!(Conflict, "it was made with the layout {made_for}, and the configuration says {configured}");
        }
        if mounts {
            // What lies on them is as it was: nobody could use it meanwhile.
            let returned: Vec<_> = state.disks.iter().filter_map(|disk| disk.returned.clone()).collect();
            for disk in &returned {
                tracing::warn!(pool = pool.config.name, disk = %disk.display(), "a disk that was missing is back");
                group.restore(disk)?;
            }
            if !returned.is_empty() {
                state = group.state()?;
            }
        }
        let missing = state.disks.iter().filter(|disk| disk.path.is_none()).count();
        // What is left of the mark under which it was made is done with.
        for disk in &ours {
            mark::erase(&pool.config.name, disk, &self.machine, self.deadline)?;
        }
        match pool.disks.layout {
            Layout::Lvm => {
                let part = pool.known_group(&self.machine);
                part.held.found_on(&ours);
                part.note(None, missing);
                if mounts {
                    let folder = pool.config.path.join(MEMORY);
                    std::fs::create_dir_all(&folder).context(|| format!("cannot make {}", folder.display()))?;
                }
                Ok(())
            }
            _ => self.find_striped(pool, &group, &state, &ours, missing, mounts),
        }
    }

    /// Is it time to ask LVM about these disks?
    fn may_ask(&self, pool: &str, disks: Vec<u64>) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = |(when, known): &(Instant, Vec<u64>)| *known == disks && when.elapsed() < AGAIN;
        if asked.get(pool).is_some_and(is_known) {
            return false;
        }
        asked.insert(pool.to_owned(), (Instant::now(), disks));
        true
    }

    fn find_striped(
        &self,
        pool: &DiskPool,
        group: &Group,
        state: &State,
        disks: &[Disk],
        missing: usize,
        mounts: bool,
    ) -> Result<()> {
        let Some(uuid) = state.tags.iter().find_map(|tag| Uuid::parse(tag.strip_prefix(FILESYSTEM)?)) else {
            fail!(Internal, "volume group {} has no tag {FILESYSTEM}UUID", group.name());
        };
        let member = pool.member(uuid, &self.machine);
        if missing > 0 {
            member.held.found_on(disks);
            member.note(Some(format!("{missing} of its {} disks are missing", state.disks.len())));
            return Ok(());
        }
        if !mounts {
            // Without a device of its own it is not mounted, and that is all there is to say.
            let device = self.machine.by_path(&lvm::device_path(group.name(), STRIPED));
            member.found_on(device.as_ref().unwrap_or(&disks[0]), disks, false);
            return Ok(());
        }
        match striped_device(group, &self.machine) {
            Ok(device) => {
                let found = Superblock::parse(&self.machine.first_block(&device, PATIENCE)?).map(|xfs| xfs.uuid);
                if found == Some(uuid) {
                    member.found_on(&device, disks, true);
                } else {
                    member
                        .note(Some(format!("{} does not have its file system, but {found:?}", device.path.display())));
                }
            }
            Err(error) => member.note(Some(error.to_string())),
        }
        Ok(())
    }
}

/// The device of a striped group's volume, made if there is none. A device's file may be there without it, or be another one's.
pub(super) fn striped_device(group: &Group, machine: &Machine) -> Result<Disk> {
    let path = lvm::device_path(group.name(), STRIPED);
    let wanted = Some((group.name().to_owned(), STRIPED.to_owned()));
    let is_it = |device: &Disk| lvm::name_of_device(device.number).is_ok_and(|name| name == wanted);
    if let Some(device) = machine.by_path(&path).ok().filter(is_it) {
        return Ok(device);
    }
    group.activate(STRIPED)?;
    let device = machine.by_path(&path)?;
    if !is_it(&device) {
        fail!(Internal, "{} is not the volume of group {}", path.display(), group.name());
    }
    Ok(device)
}

/// Of each disk that LVM has labelled, the group that it is in.
pub(super) fn group_of(disk: &Disk, deadline: Duration) -> Result<Option<String>> {
    let mut groups = lvm::groups_on(std::slice::from_ref(&disk.path), deadline)?;
    Ok(groups.pop().and_then(|(_, group)| group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_finished_when_its_tag_says_for_what() {
        let state = |tags: &[String]| State {
            uuid: String::new(),
            extent_size: 0,
            size: 0,
            free: 0,
            disks: Vec::new(),
            tags: tags.to_vec(),
        };
        assert_eq!(layout(&state(&[MAKING.to_owned()])), None);
        let uuid = mark::fresh_uuid("fast").unwrap();
        let tags = tags(Layout::Striped, Some(uuid));
        assert_eq!(layout(&state(&tags)), Some("striped"));
        assert_eq!(tags[1], format!("berth.xfs={uuid}"));
        assert_eq!(layout(&state(&super::tags(Layout::Lvm, None))), Some("lvm"));
    }
}
