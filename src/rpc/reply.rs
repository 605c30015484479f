//! Domain values as messages.

use prost_types::Timestamp;

use crate::proto::csi;
use crate::volume::{
    ContentSource, Health, HealthProblem, Snapshot, StorageHealth, StorageProblem, Topology, Usage, Volume, VolumeId,
};

/// Sizes are below 2^63: `CapacityRange` sees to that.
pub(super) fn bytes(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

pub(super) fn volume(volume: Volume) -> csi::Volume {
    use csi::volume_content_source::{SnapshotSource, Type, VolumeSource};
    let source = volume.source.map(|source| match source {
        ContentSource::Snapshot(snapshot_id) => Type::Snapshot(SnapshotSource { snapshot_id }),
        ContentSource::Volume(volume_id) => Type::Volume(VolumeSource { volume_id }),
    });
    csi::Volume {
        capacity_bytes: bytes(volume.size),
        volume_id: volume.id.as_str().to_owned(),
        volume_context: volume.context.into_iter().collect(),
        content_source: source.map(|source| csi::VolumeContentSource { r#type: Some(source) }),
        accessible_topology: volume.places.into_iter().map(topology).collect(),
    }
}

pub(super) fn snapshot(snapshot: Snapshot) -> csi::Snapshot {
    csi::Snapshot {
        size_bytes: bytes(snapshot.size),
        snapshot_id: snapshot.id.as_str().to_owned(),
        source_volume_id: snapshot.source.as_str().to_owned(),
        creation_time: Some(Timestamp::from(snapshot.created)),
        ready_to_use: snapshot.ready,
        group_snapshot_id: String::new(),
        accessible_topology: snapshot.places.into_iter().map(topology).collect(),
    }
}

pub(super) fn topology(place: Topology) -> csi::Topology {
    csi::Topology { segments: place.0.into_iter().collect() }
}

pub(super) fn health(id: &VolumeId, problems: Vec<HealthProblem>) -> csi::VolumeHealth {
    use csi::VolumeHealthErrorType as Status;
    let entry = |problem: HealthProblem| csi::volume_health::VolumeHealthEntry {
        status: match problem.status {
            Health::Degraded => Status::Degraded,
            Health::Inaccessible => Status::Inaccessible,
            Health::DataLoss => Status::DataLoss,
        }
        .into(),
        reason: problem.reason.to_owned(),
        message: problem.message,
    };
    csi::VolumeHealth { volume_id: id.as_str().to_owned(), health_statuses: problems.into_iter().map(entry).collect() }
}

pub(super) fn storage(problem: StorageProblem) -> csi::node_get_storage_health_response::StorageBackendHealth {
    use csi::StorageHealthErrorType as Status;
    csi::node_get_storage_health_response::StorageBackendHealth {
        status: match problem.status {
            StorageHealth::Degraded => Status::StorageDegraded,
            StorageHealth::Unreachable => Status::StorageUnreachable,
        }
        .into(),
        reason: problem.reason.to_owned(),
        message: problem.message,
        volume_capability: None,
    }
}

pub(super) fn usage(usage: Usage) -> Vec<csi::VolumeUsage> {
    use csi::volume_usage::Unit;
    let entry = |unit: Unit, [total, used, available]: [u64; 3]| csi::VolumeUsage {
        available: bytes(available),
        total: bytes(total),
        used: bytes(used),
        unit: unit.into(),
    };
    match usage {
        Usage::Block { total } => vec![entry(Unit::Bytes, [total, 0, 0])],
        Usage::Mount { bytes, inodes } => vec![entry(Unit::Bytes, bytes), entry(Unit::Inodes, inodes)],
    }
}
