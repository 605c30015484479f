//! Local volumes: carved from pools of this node, as directories with a quota or as files shown through loop devices.
//!
//! The pool's directory is the only truth. A volume is a folder in it with a descriptor and its data; it exists
//! exactly when that folder stands in `volumes/`, so creating and deleting are each one rename. Ids are derived from
//! the request's name and this node's, so a retry finds what an interrupted call left, and another node's volume is
//! never mistaken for one that is gone. Nothing here knows gRPC, kubelet or other back ends.

mod carve;
mod checkpoint;
mod controller;
mod descriptor;
mod device;
mod directory;
pub mod disks;
pub mod doctor;
mod ephemeral;
mod freezing;
mod group;
mod limits;
mod logical;
mod make;
mod mkfs;
mod node;
mod parameters;
mod pool;
mod reaper;
mod snapshots;
mod stage;
mod throttle;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{Backend, PageRequest, VolumeHealth};
use crate::config;
use crate::error::{Error, ErrorKind, Result};
use crate::host::mapper::{self, Mapped};
use crate::host::mounts::Place;
use crate::host::{files, loops, mounts};
use crate::volume::{NodeName, Topology, VolumeId};
use descriptor::{Descriptor, VolumeDescriptor};
use device::Device;
use disks::Pools;
use group::Group;
use limits::Limits;
use logical::Logical;
use pool::{Pool, Trouble};

/// The driver begins to serve when its pools' disks have been looked at, but after this time at the latest.
const DISKS_PATIENCE: Duration = Duration::from_secs(5);

/// The back end of one node.
pub struct Nvme {
    /// This node with all its labels, which pods may be scheduled by.
    topology: Topology,
    /// This node by its name alone: where a volume is to be had stays true when labels change.
    place: Topology,
    /// Eight hex digits that stand for this node in every id.
    node_tag: String,
    pools: Pools,
    /// mkfs is killed after this time.
    command_deadline: Duration,
    /// Where this node's control groups are.
    cgroups: PathBuf,
    /// Limits of I/O of the volumes that were staged.
    limits: Mutex<BTreeMap<String, Limits>>,
    /// Pools in which what was left half done has been finished.
    tended: Mutex<BTreeSet<PathBuf>>,
}

/// Which of the things that a pool holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    /// Made by CreateVolume.
    Volume,
    /// Made with a pod, gone with it.
    Ephemeral,
    /// Made by CreateSnapshot.
    Snapshot,
}

impl Sort {
    fn prefix(self) -> &'static str {
        match self {
            Self::Volume => "vol",
            Self::Ephemeral => "eph",
            Self::Snapshot => "snap",
        }
    }
}

/// A volume's or snapshot's folder.
struct Located<'a> {
    pool: &'a Arc<Pool>,
    folder: PathBuf,
}

/// How a volume is shown at a place.
enum Shown {
    /// Its own directory.
    Directory,
    /// Its device, or the file system on that.
    Device(Device),
}

/// A volume, where it was found.
enum Found<'a> {
    /// In a pool of files.
    Folder(Located<'a>),
    /// In a volume group.
    Logical(Logical<'a>),
}

impl Found<'_> {
    fn descriptor(&self) -> Result<VolumeDescriptor> {
        match self {
            Self::Folder(located) => VolumeDescriptor::read(&located.folder),
            Self::Logical(logical) => logical.descriptor(),
        }
    }

    /// The device that the volume's user sees, if it is attached.
    fn device(&self) -> Result<Option<Device>> {
        match self {
            Self::Folder(located) => Ok(loops::find(&located.image())?.map(Device::Loop)),
            Self::Logical(logical) => Ok(logical.device()?.map(Device::Logical)),
        }
    }
}

impl Shown {
    fn device(self) -> Option<Device> {
        match self {
            Self::Directory => None,
            Self::Device(device) => Some(device),
        }
    }
}

impl Located<'_> {
    fn image(&self) -> PathBuf {
        self.folder.join(pool::IMAGE)
    }
}

impl Nvme {
    /// The back end over these pools. Pools that are missing now may come later.
    pub fn new(
        node: &NodeName,
        labels: &BTreeMap<String, String>,
        pools: &[config::Pool],
        command_deadline: Duration,
        cgroups: &Path,
    ) -> Arc<Self> {
        let place = Topology::of_node(node);
        let pools = Pools::new(pools, DISKS_PATIENCE, command_deadline);
        let node_tag = digest(node.as_str(), 4);
        let topology = place.clone().with(labels);
        let (cgroups, limits, tended) = (cgroups.to_owned(), Mutex::default(), Mutex::default());
        Arc::new(Self { topology, place, node_tag, pools, command_deadline, cgroups, limits, tended })
    }

    /// Both sides of it.
    pub fn backend(self: Arc<Self>) -> Backend {
        Backend { controller: self.clone(), node: self }
    }

    /// Makes the pools that the configuration wants made, finishes what a crash left half done, and says in the log what
    /// this node's pools can and can't do.
    pub fn start(self: &Arc<Self>) {
        // What a driver that died has left frozen comes first, and making pools, which may take long, last.
        self.tend();
        for pool in &self.pools {
            match pool.ask(|_| ()).and_then(|()| pool.has_reflink()) {
                Ok(reflink) => {
                    let directories = if pool.has_quotas() { "yes" } else { "no: not XFS mounted with prjquota" };
                    let snapshots = if reflink { "yes" } else { "no: no reflink, which XFS and btrfs have" };
                    tracing::info!(pool = pool.name(), directories, snapshots, "pool is ready");
                }
                Err(error) => tracing::error!(pool = pool.name(), %error, "pool is not usable now"),
            }
        }
        if let Err(error) = self.report_unwell() {
            tracing::error!(%error, "cannot look through the volumes");
        }
        if let Err(error) = self.limit_all() {
            tracing::error!(%error, "cannot tell which volumes have limits of I/O");
        }
        self.pools.create();
        self.tend();
    }

    /// Finishes what was left half done in each pool that can be used since the last call, since disks may come late; and has
    /// threads remove what was deleted.
    fn tend(self: &Arc<Self>) {
        let mut tended = self.tended.lock().unwrap_or_else(PoisonError::into_inner);
        for pool in self.pools.iter().filter(|pool| pool.state().is_ok()) {
            if tended.insert(pool.path().to_owned()) {
                self.thaw_leftovers(pool);
            }
            reaper::reap(pool);
        }
        for group in self.pools.groups().filter(|group| group.state().is_ok()) {
            if tended.insert(PathBuf::from(group.name()))
                && let Err(error) = group.thaw_leftovers().and_then(|()| group.discard_leftovers())
            {
                tracing::error!(pool = group.name(), %error, "cannot finish what was left half done");
                tended.remove(Path::new(group.name()));
            }
            reaper::reap(group);
        }
    }

    /// Says in the log which volumes are not whole. Nothing is removed: that is for people to decide.
    fn report_unwell(&self) -> Result<()> {
        let all = PageRequest { limit: None, after: None };
        for (id, problems) in VolumeHealth::list_unwell(self, &all)?.entries {
            for problem in problems {
                tracing::error!(volume.id = %id, reason = problem.reason, "{}", problem.message);
            }
        }
        Ok(())
    }

    /// `vol-<node>-<name>`: the node's tag and 128 bits of the name's hash.
    fn id(&self, sort: Sort, name: &str) -> String {
        format!("{}-{}-{}", sort.prefix(), self.node_tag, digest(name, 16))
    }

    /// Is this an id of ours? `Some(true)`: of this node.
    fn is_ours(&self, sort: Sort, id: &str) -> Option<bool> {
        let mut parts = id.splitn(3, '-');
        let hex = |part: &str, length| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let (Some(prefix), Some(node), Some(name)) = (parts.next(), parts.next(), parts.next()) else { return None };
        (prefix == sort.prefix() && hex(node, 8) && hex(name, 32)).then(|| node == self.node_tag)
    }

    /// Finds the folder of a volume or snapshot. `None`: there is none, or the id is nobody's.
    ///
    /// # Errors
    /// `Precondition` for an id of another node; `Internal` when two pools have one, or a pool that may have it is
    /// not there: absence has to be positive.
    fn locate(&self, sort: Sort, id: &str) -> Result<Option<Located<'_>>> {
        self.locate_in(self.pools.iter(), sort, id)
    }

    /// The same, for a thing that can only be in one of these pools.
    fn locate_in<'a>(
        &self,
        pools: impl Iterator<Item = &'a Arc<Pool>>,
        sort: Sort,
        id: &str,
    ) -> Result<Option<Located<'a>>> {
        match self.is_ours(sort, id) {
            None => return Ok(None),
            Some(false) => fail!(Precondition, "{id} lies on another node, not on this one"),
            Some(true) => {}
        }
        let mut found = None;
        let mut missing = None;
        for pool in pools {
            let folder = pool.folder(sort, id);
            match folder.symlink_metadata() {
                Ok(_) if found.is_some() => {
                    fail!(Internal, "{id} is in two pools: somebody has to decide which one is right")
                }
                Ok(_) => found = Some(Located { pool, folder }),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    let hides = |trouble: &Trouble| !trouble.leaves_it_readable() && pool.may_hide_volumes();
                    missing = missing.or(pool.state().err().filter(hides));
                }
                // Another pool may have it, and a disk that has died must not take those with it.
                Err(error) => {
                    let message = format!("cannot look for it in pool {}: {error}", pool.name());
                    let broken = || Trouble { reason: "PoolUnreadable", message };
                    missing = missing.or(pool.state().err()).or_else(|| Some(broken()));
                }
            }
        }
        match (found, missing) {
            (Some(found), _) => Ok(Some(found)),
            (None, Some(trouble)) => {
                fail!(Unreachable, "cannot tell whether {id} exists: {}", trouble.message)
            }
            (None, None) => Ok(None),
        }
    }

    /// Finds a volume of any carve, wherever it is.
    ///
    /// # Errors
    /// As [`Self::locate`].
    fn find_volume(&self, id: &str) -> Result<Option<Found<'_>>> {
        self.find_volume_in(id, self.pools.groups())
    }

    /// The same, in no other volume groups than these.
    fn find_volume_in<'a>(
        &'a self,
        id: &str,
        groups: impl Iterator<Item = &'a Arc<Group>> + Clone,
    ) -> Result<Option<Found<'a>>> {
        let sort = if id.starts_with(Sort::Ephemeral.prefix()) { Sort::Ephemeral } else { Sort::Volume };
        let mut missing = match self.locate(sort, id) {
            Ok(Some(located)) => {
                for group in groups.clone() {
                    if group.device(id)?.is_some() {
                        fail!(Internal, "{id} is in two pools: somebody has to decide which one is right");
                    }
                }
                return Ok(Some(Found::Folder(located)));
            }
            Ok(None) if self.is_ours(sort, id).is_none() => return Ok(None),
            Ok(None) => None,
            // It may be in a volume group all the same.
            Err(error) if error.kind() == ErrorKind::Unreachable => Some(error),
            Err(error) => return Err(error),
        };
        for group in groups {
            match group.find(id) {
                Ok(Some(volume)) => return Ok(Some(Found::Logical(Logical { group, volume }))),
                Ok(None) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Unreachable | ErrorKind::NotFound) => {
                    missing = missing.or(Some(error));
                }
                // A command that failed says nothing about the volume.
                Err(error) => return Err(error),
            }
        }
        match missing {
            None => Ok(None),
            Some(error) => {
                Err(Error::caused(ErrorKind::Unreachable, format!("cannot tell whether {id} exists"), error))
            }
        }
    }

    /// The volume that is at this place, if it is one of this node's.
    fn volume_at(&self, place: &Place) -> Result<Option<(VolumeId, Shown)>> {
        if let Some(id) = place.stopped_root().and_then(directory::volume_of).filter(|id| self.is_volume_here(id)) {
            return Ok(Some((VolumeId::new(id)?, Shown::Directory)));
        }
        for pool in &self.pools {
            if let Some(id) = pool.directory_at(place.device(), place.inode())? {
                return Ok(Some((VolumeId::new(id)?, Shown::Directory)));
            }
        }
        let found = self.volume_on(place.device_file().unwrap_or(place.device()))?;
        Ok(found.map(|(id, device)| (id, Shown::Device(device))))
    }

    /// The volume whose device has this number, or one that lies on it, and the lowest of these.
    fn volume_on(&self, number: u64) -> Result<Option<(VolumeId, Device)>> {
        if let Some(mapped) = Mapped::of(number)? {
            return self.logical_on(&mapped);
        }
        let Some(device) = loops::by_number(number)? else { return Ok(None) };
        let Some(image) = device.image_name() else { return Ok(None) };
        // A read-only view shows another device.
        if image.starts_with("/dev") {
            return files::device_number(&image)?.map_or(Ok(None), |below| self.volume_on(below));
        }
        let id = image.parent().and_then(|folder| folder.file_name()).and_then(|name| name.to_str());
        let Some(id) = id.filter(|id| self.is_volume_here(id)) else { return Ok(None) };
        // The name is only a hint: it depends on the mount namespace. Device and inode decide, unless the image is
        // gone: then the name is all there is, and the volume must still be taken away.
        let image = match self.find_volume(id) {
            Ok(Some(Found::Folder(located))) => Some(located.image()),
            _ => None,
        };
        match image.filter(|image| image.symlink_metadata().is_ok()) {
            // On a file system that has stopped nobody can tell, and the name is all there is, too.
            Some(image) if !device.shows(&image).unwrap_or(true) => Ok(None),
            _ => Ok(Some((VolumeId::new(id)?, Device::Loop(device)))),
        }
    }

    /// The volume of a device of device mapper: a logical volume, or what encrypts one.
    fn logical_on(&self, mapped: &Mapped) -> Result<Option<(VolumeId, Device)>> {
        let below = if mapped.is_crypt() { mapper::below(mapped.device)? } else { Some(mapped.clone()) };
        let Some((group, name)) = below.and_then(|volume| volume.logical_volume()) else { return Ok(None) };
        if !self.pools.groups().any(|known| known.is_of(&group)) || !self.is_volume_here(&name) {
            return Ok(None);
        }
        Ok(Some((VolumeId::new(name)?, Device::Logical(mapped.path()))))
    }

    /// Is that the id of a volume of this node?
    fn is_volume_here(&self, id: &str) -> bool {
        [Sort::Volume, Sort::Ephemeral].iter().any(|sort| self.is_ours(*sort, id) == Some(true))
    }

    /// Everything that is wrong with this node's pools now.
    fn troubles(&self) -> Vec<Trouble> {
        let groups = self.pools.groups().flat_map(|group| group.troubles());
        self.pools.iter().flat_map(|pool| pool.troubles()).chain(groups).collect()
    }

    /// Nobody uses it, and no device shows it, after this.
    ///
    /// # Errors
    /// `Precondition` while it is mounted, shown to a pod or held open.
    fn ensure_detached(&self, id: &str, located: &Located<'_>) -> Result<()> {
        refuse_users(id, &mounts::users_of_directory(&directory::data_of(&located.folder))?)?;
        let Some(device) = loops::find(&located.image())? else { return Ok(()) };
        self.release_view(&device.path)?;
        refuse_users(id, &mounts::users_of_device(&device.path)?)?;
        if !device.detach_now()? {
            fail!(Precondition, "{id} is in use: a process holds {} open", device.path.display());
        }
        Ok(())
    }
}

fn refuse_users(id: &str, places: &[PathBuf]) -> Result<()> {
    if !places.is_empty() {
        let places = places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(" and ");
        fail!(Precondition, "{id} is in use at {places}: unpublish and unstage it first");
    }
    Ok(())
}

/// The first `bytes` of the text's SHA-256, in hex.
fn digest(text: &str, bytes: usize) -> String {
    Sha256::digest(text.as_bytes())[..bytes].iter().map(|byte| format!("{byte:02x}")).collect()
}
