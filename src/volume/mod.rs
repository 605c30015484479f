//! The nouns: what a volume is called, how big it is, who uses it and where it appears. Pure: nothing here touches
//! the machine, and nothing past `rpc::parse` is a raw string.

mod capacity;
mod id;
mod path;
mod spec;

pub use capacity::{CapacityRange, format_bytes, parse_bytes};
pub use id::{Name, NodeName, SnapshotId, VolumeId};
pub use path::MountPath;
pub use spec::{
    Access, AccessMode, Available, Capability, ContentSource, Health, HealthProblem, MountFlag, Owner, Parameters,
    Snapshot, Spec, StorageHealth, StorageProblem, Topology, Usage, Volume,
};
