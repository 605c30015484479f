//! Local volumes: files on a pool of this node, each shown through a loop device (the `image` carve).
//!
//! The pool's directory is the only truth. A volume is a folder in it with the image and a descriptor; it exists
//! exactly when that folder stands in `volumes/`, so creating and deleting are each one rename. Ids are derived from
//! the request's name and this node's, so a retry finds what an interrupted call left, and another node's volume is
//! never mistaken for one that is gone. Nothing here knows gRPC, kubelet or other back ends.

mod checkpoint;
mod controller;
mod descriptor;
pub mod doctor;
mod ephemeral;
mod mkfs;
mod node;
mod parameters;
mod pool;
mod snapshots;
mod stage;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::Backend;
use crate::config;
use crate::error::{Context, Result};
use crate::host::loops::LoopDevice;
use crate::host::mounts::Place;
use crate::host::{loops, mounts};
use crate::volume::{NodeName, Topology, VolumeId};
use pool::Pool;

/// The back end of one node.
pub struct Nvme {
    topology: Topology,
    /// Eight hex digits that stand for this node in every id.
    node_tag: String,
    pools: Vec<Pool>,
    /// mkfs is killed after this time.
    command_deadline: Duration,
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
    pool: &'a Pool,
    folder: PathBuf,
}

impl Located<'_> {
    fn image(&self) -> PathBuf {
        self.folder.join(pool::IMAGE)
    }
}

impl Nvme {
    /// The back end over these pools. Pools that are missing now may come later.
    pub fn new(node: &NodeName, pools: &[config::Pool], command_deadline: Duration) -> Arc<Self> {
        let pools: Vec<_> = pools.iter().cloned().map(Pool::new).collect();
        let node_tag = digest(node.as_str(), 4);
        Arc::new(Self { topology: Topology::of_node(node), node_tag, pools, command_deadline })
    }

    /// Both sides of it.
    pub fn backend(self: Arc<Self>) -> Backend {
        Backend { controller: self.clone(), node: self }
    }

    /// Finishes what a crash left half done, and says in the log what this node's pools can and can't do.
    pub fn start(&self) {
        self.thaw_leftovers();
        for pool in &self.pools {
            match pool.ask(|_| ()).and_then(|()| pool.has_reflink()) {
                Ok(true) => tracing::info!(pool = pool.name(), "pool is ready, with snapshots"),
                Ok(false) => tracing::warn!(
                    pool = pool.name(),
                    "pool is ready, but without snapshots and clones: its file system has no reflink (XFS and btrfs have)"
                ),
                Err(error) => tracing::error!(pool = pool.name(), %error, "pool is not usable now"),
            }
        }
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
        pools: impl Iterator<Item = &'a Pool>,
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
                    missing = missing.or(pool.state().err().filter(|trouble| !trouble.leaves_it_readable()));
                }
                Err(error) => return Err(error).context(|| format!("cannot look for {id} in pool {}", pool.name())),
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

    fn locate_volume(&self, id: &VolumeId) -> Result<Option<Located<'_>>> {
        let sort = if id.as_str().starts_with("eph-") { Sort::Ephemeral } else { Sort::Volume };
        self.locate(sort, id.as_str())
    }

    /// The id of the volume whose file system or device is at this place, if it is one of this node's.
    fn volume_at(&self, place: &Place) -> Result<Option<(VolumeId, LoopDevice)>> {
        let number = place.device_file().unwrap_or(place.device());
        let Some(device) = loops::by_number(number)? else { return Ok(None) };
        let device = device.below()?.unwrap_or(device);
        let Some(image) = device.image_name() else { return Ok(None) };
        let id = image.parent().and_then(|folder| folder.file_name()).and_then(|name| name.to_str());
        let Some(id) =
            id.filter(|id| [Sort::Volume, Sort::Ephemeral].iter().any(|sort| self.is_ours(*sort, id) == Some(true)))
        else {
            return Ok(None);
        };
        let id = VolumeId::new(id)?;
        // The name is only a hint: it depends on the mount namespace. Device and inode decide, unless the image is
        // gone: then the name is all there is, and the volume must still be taken away.
        let image = self.locate_volume(&id).ok().flatten().map(|located| located.image());
        match image.filter(|image| image.symlink_metadata().is_ok()) {
            Some(image) if !device.shows(&image)? => Ok(None),
            _ => Ok(Some((id, device))),
        }
    }

    /// Detaches the image's loop device, if it has one.
    ///
    /// # Errors
    /// `Precondition` while it is mounted, shown to a pod or held open.
    fn ensure_detached(&self, id: &str, located: &Located<'_>) -> Result<()> {
        let Some(device) = loops::find(&located.image())? else { return Ok(()) };
        self.release_view(&device)?;
        let places = mounts::users_of_device(&device.path)?;
        if !places.is_empty() {
            let places = places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(" and ");
            fail!(Precondition, "{id} is in use at {places}: unpublish and unstage it first");
        }
        if !device.detach_now()? {
            fail!(Precondition, "{id} is in use: a process holds {} open", device.path.display());
        }
        Ok(())
    }
}

/// The first `bytes` of the text's SHA-256, in hex.
fn digest(text: &str, bytes: usize) -> String {
    Sha256::digest(text.as_bytes())[..bytes].iter().map(|byte| format!("{byte:02x}")).collect()
}
