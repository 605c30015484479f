//! What a back end is: two traits, one for each side, and optional parts that it has or has not.
//!
//! A capability is advertised exactly when the accessor of its part answers `Some`, and the call goes through that
//! same accessor: there is no list to keep in step. Everything here blocks; `rpc::call` runs each call on a thread of
//! its own, under the volume's lock and with a deadline. `ensure_*` is idempotent by contract: what is already so is
//! compared, and a difference is `Conflict`. No back end knows another, gRPC, or the runtime.

pub mod cephfs;
mod finding;
pub mod nvme;
pub mod s3;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use self::finding::{Finding, Verdict};
use crate::error::Result;
use crate::host::mounts;
use crate::secrets::Secrets;
use crate::volume::{
    Access, Available, Capability, CapacityRange, HealthProblem, MountPath, Name, Parameters, Snapshot, SnapshotId,
    Spec, StorageProblem, Topology, Usage, Volume, VolumeId,
};

/// Both sides of one driver. A process serves either or both of them.
#[derive(Clone)]
pub struct Backend {
    /// Volumes as things.
    pub controller: Arc<dyn Controller>,
    /// Volumes at places on this machine.
    pub node: Arc<dyn Node>,
}

/// Volumes as things: made, found, deleted.
pub trait Controller: Send + Sync {
    /// The id of the volume that a request of this name means, whether it exists or not. Asks nobody.
    fn volume_id(&self, name: &Name, parameters: &Parameters) -> Result<VolumeId>;

    /// Can volumes of this back end be used like this, with these parameters? `Err` says what is wrong. Asks nobody.
    fn check(&self, capabilities: &[Capability], parameters: &Parameters, mutable: &Parameters) -> Result<()>;

    /// Makes an empty volume, or finds it.
    fn ensure_volume(&self, id: &VolumeId, spec: &Spec, secrets: &Secrets) -> Result<Volume>;

    /// Deletes it; not being there is success.
    ///
    /// # Errors
    /// `Precondition` while it is in use.
    fn ensure_absent(&self, id: &VolumeId, secrets: &Secrets) -> Result<()>;

    /// Looks it up.
    fn find(&self, id: &VolumeId, secrets: &Secrets) -> Result<Option<Volume>>;

    /// Lists volumes.
    fn listing(&self) -> Option<&dyn Listing> {
        None
    }
    /// Knows when a volume is not well.
    fn health(&self) -> Option<&dyn VolumeHealth> {
        None
    }
    /// Knows how much room there is.
    fn capacity(&self) -> Option<&dyn Capacity> {
        None
    }
    /// Grows volumes.
    fn growth(&self) -> Option<&dyn Growth> {
        None
    }
    /// Changes parameters of volumes in use.
    fn modification(&self) -> Option<&dyn Modification> {
        None
    }
    /// Makes volumes from volumes.
    fn cloning(&self) -> Option<&dyn Cloning> {
        None
    }
    /// Takes snapshots and makes volumes from them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }
}

/// A page of a list, and where the next one begins.
pub struct Page<T> {
    /// At most as many as asked for, in the order of their ids.
    pub entries: Vec<T>,
    /// The last entry's id, if there may be more.
    pub next: Option<String>,
}

/// Which part of a list is asked for.
pub struct PageRequest {
    /// At most this many entries; `None`: all.
    pub limit: Option<usize>,
    /// Begin behind this id. It need not exist any more.
    pub after: Option<String>,
}

/// LIST_VOLUMES.
pub trait Listing {
    /// Costs what the page costs, not what the list costs.
    ///
    /// # Errors
    /// `Busy` when `after` is no id of this back end (CSI: ABORTED, begin again).
    fn list(&self, page: &PageRequest) -> Result<Page<Volume>>;
}

/// GET_VOLUME_HEALTH and LIST_VOLUME_HEALTH.
pub trait VolumeHealth {
    /// Empty: nothing known to be wrong. `None`: no such volume.
    fn health(&self, id: &VolumeId, secrets: &Secrets) -> Result<Option<Vec<HealthProblem>>>;

    /// The volumes that are not well. A page may be empty and yet have a next one.
    fn list_unwell(&self, page: &PageRequest) -> Result<Page<(VolumeId, Vec<HealthProblem>)>>;
}

/// GET_CAPACITY.
pub trait Capacity {
    /// Room for volumes with these parameters at this place.
    fn available(&self, parameters: &Parameters, place: Option<&Topology>) -> Result<Available>;
}

/// EXPAND_VOLUME of the controller.
pub trait Growth {
    /// Grows the volume to at least what is required. Returns its size in bytes, and whether the node must act too.
    ///
    /// # Errors
    /// `NotFound`; `Exhausted` when there is no room; `OutOfRange` when it is bigger than the limit.
    fn ensure_size(&self, id: &VolumeId, range: CapacityRange, secrets: &Secrets) -> Result<(u64, bool)>;
}

/// MODIFY_VOLUME.
pub trait Modification {
    /// Puts the parameters in force.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a parameter that it does not know.
    fn ensure_modified(&self, id: &VolumeId, mutable: &Parameters, secrets: &Secrets) -> Result<()>;
}

/// CLONE_VOLUME.
pub trait Cloning {
    /// Makes a volume with the contents that `source` has now, or finds it.
    ///
    /// # Errors
    /// `NotFound` when there is no source; `OutOfRange` when the wanted size is below the source's.
    fn ensure_clone(&self, id: &VolumeId, spec: &Spec, source: &VolumeId, secrets: &Secrets) -> Result<Volume>;
}

/// CREATE_DELETE_SNAPSHOT, LIST_SNAPSHOTS and GET_SNAPSHOT.
pub trait Snapshots {
    /// Freezes what `source` holds now, or finds the snapshot of an earlier call.
    ///
    /// # Errors
    /// `Conflict` when the name is taken by a snapshot of another volume.
    fn ensure_snapshot(
        &self,
        name: &Name,
        source: &VolumeId,
        parameters: &Parameters,
        places: &[Topology],
        secrets: &Secrets,
    ) -> Result<Snapshot>;

    /// Deletes it; not being there is success.
    fn ensure_snapshot_absent(&self, id: &SnapshotId, secrets: &Secrets) -> Result<()>;

    /// Looks it up.
    fn find_snapshot(&self, id: &SnapshotId, secrets: &Secrets) -> Result<Option<Snapshot>>;

    /// Lists them, all or those of one volume.
    fn list_snapshots(
        &self,
        source: Option<&VolumeId>,
        page: &PageRequest,
        secrets: &Secrets,
    ) -> Result<Page<Snapshot>>;

    /// The volume that nobody may delete while another is made from the snapshot; `None`: the snapshot is enough.
    fn needs_volume(&self, _: &SnapshotId) -> Option<VolumeId> {
        None
    }

    /// Makes a volume with a snapshot's contents, or finds it.
    ///
    /// # Errors
    /// As for a clone.
    fn ensure_restored(&self, id: &VolumeId, spec: &Spec, source: &SnapshotId, secrets: &Secrets) -> Result<Volume>;
}

/// A volume to be put at a staging path.
#[derive(Debug)]
pub struct Stage {
    /// The volume.
    pub id: VolumeId,
    /// Where to put it. A block volume's device goes to `path.join(STAGED_DEVICE)`.
    pub path: MountPath,
    /// How it will be used.
    pub capability: Capability,
    /// What `Volume::context` said.
    pub context: Parameters,
}

/// The file inside a block volume's staging directory that is the device.
pub const STAGED_DEVICE: &str = "device";

/// Volumes at places on this machine.
pub trait Node: Send + Sync {
    /// Puts the volume at the staging path.
    fn ensure_staged(&self, stage: &Stage, secrets: &Secrets) -> Result<()>;

    /// Takes whatever of this volume is at the staging path away from there.
    fn ensure_unstaged(&self, id: &VolumeId, path: &MountPath) -> Result<()>;

    /// The volume is about to be shown at `target`: what of it is dead, there and at the staging path, is taken away, and
    /// staged again. Default: volumes don't die.
    fn ensure_alive(&self, _: &Stage, _target: &MountPath, _: &Secrets) -> Result<()> {
        Ok(())
    }

    /// The volume has just been shown at `target`. Default: that is all.
    fn published(self: Arc<Self>, _: &VolumeId, _target: &MountPath) -> Result<()> {
        Ok(())
    }

    /// Takes the uppermost mount at a published path away.
    fn unmount(&self, target: &Path) -> Result<()> {
        mounts::unmount_top(target)
    }

    /// Is what is at this path, as file system or device, this very volume?
    fn is_at(&self, id: &VolumeId, path: &Path) -> Result<bool>;

    /// The path of a device that shows the one staged at `staged`, and refuses writes: a device can be written through
    /// a read-only mount.
    ///
    /// # Errors
    /// `Unsupported` where there is no such thing.
    fn read_only_device(&self, staged: &Path) -> Result<PathBuf> {
        fail!(Unsupported, "the device at {} can't be published read-only", staged.display())
    }

    /// Everywhere else where what is staged at `staged` is shown. Reads the whole mount table.
    fn shown_at(&self, staged: &Path) -> Result<Vec<PathBuf>> {
        mounts::binds_of(staged)
    }

    /// The device of this volume is shown at one path less: what `read_only_device` made for it may go, if nobody else uses it.
    fn release(&self, _: &VolumeId) -> Result<()> {
        Ok(())
    }

    /// This node's place, if volumes can't be used from everywhere.
    fn topology(&self) -> Option<Topology> {
        None
    }
    /// How many volumes fit on this node; 0: no limit.
    fn volume_limit(&self) -> i64 {
        0
    }
    /// Makes files belong to the group that a pod wants for its volumes (VOLUME_MOUNT_GROUP).
    fn takes_mount_group(&self) -> bool {
        false
    }
    /// Knows how full a volume is.
    fn stats(&self) -> Option<&dyn Stats> {
        None
    }
    /// Grows volumes here.
    fn growth(&self) -> Option<&dyn NodeGrowth> {
        None
    }
    /// Knows when a volume or the storage is not well.
    fn health(&self) -> Option<&dyn NodeHealth> {
        None
    }
    /// Makes volumes that live as long as their pod.
    fn ephemeral(&self) -> Option<&dyn Ephemeral> {
        None
    }
}

/// GET_VOLUME_STATS.
pub trait Stats {
    /// What the volume at this path holds. `None`: it is not there.
    fn usage(&self, id: &VolumeId, path: &Path) -> Result<Option<Usage>>;
}

/// EXPAND_VOLUME of the node.
pub trait NodeGrowth {
    /// Grows the volume at this path while it is used; returns its size in bytes. `None`: no such volume.
    ///
    /// # Errors
    /// `Exhausted` when there is no room; a range below the present size is satisfied by it.
    fn ensure_size(
        &self,
        id: &VolumeId,
        path: &Path,
        range: Option<CapacityRange>,
        secrets: &Secrets,
    ) -> Result<Option<u64>>;
}

/// GET_VOLUME_HEALTH and GET_STORAGE_HEALTH of the node.
pub trait NodeHealth {
    /// `None`: no such volume. `path` is where it is staged or published, if the caller said.
    fn volume(&self, id: &VolumeId, path: Option<&Path>) -> Result<Option<Vec<HealthProblem>>>;

    /// What is wrong with the storage as a whole.
    fn storage(&self, secrets: &Secrets) -> Result<Vec<StorageProblem>>;
}

/// Inline volumes of a pod (CSIDriver `volumeLifecycleModes: Ephemeral`).
pub trait Ephemeral {
    /// Makes the volume, if need be, and mounts it at the path.
    fn ensure_present(&self, id: &VolumeId, path: &MountPath, access: &Access, context: &Parameters) -> Result<()>;

    /// Deletes what `ensure_present` made for this id; any other id is left alone.
    fn ensure_gone(&self, id: &VolumeId) -> Result<()>;
}
