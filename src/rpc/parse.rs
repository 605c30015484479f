//! Messages as domain values. Nearly every INVALID_ARGUMENT arises here.

use std::collections::HashMap;

use crate::backend::PageRequest;
use crate::error::Result;
use crate::proto::csi;
use crate::volume::{
    Access, AccessMode, Capability, CapacityRange, MountFlag, Owner, Parameters, SnapshotId, Topology, VolumeId,
};

/// CSI 1.13, "Size Limits": keys and values of a map together, in bytes.
const MAP_LIMIT: usize = 4096;

/// The provisioner's own keys (`--extra-create-metadata`, and those that it should have taken out).
const KUBERNETES: &str = "csi.storage.k8s.io/";

pub(super) enum Source {
    Snapshot(SnapshotId),
    Volume(VolumeId),
}

impl Source {
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Snapshot(id) => id.as_str(),
            Self::Volume(id) => id.as_str(),
        }
    }
}

pub(super) fn source(message: Option<csi::VolumeContentSource>) -> Result<Option<Source>> {
    use csi::volume_content_source::Type;
    let Some(message) = message else { return Ok(None) };
    match message.r#type {
        Some(Type::Snapshot(snapshot)) => Ok(Some(Source::Snapshot(SnapshotId::new(snapshot.snapshot_id)?))),
        Some(Type::Volume(volume)) => Ok(Some(Source::Volume(VolumeId::new(volume.volume_id)?))),
        None => fail!(Invalid, "volume_content_source names neither a snapshot nor a volume"),
    }
}

pub(super) fn capability(message: Option<csi::VolumeCapability>) -> Result<Capability> {
    use csi::volume_capability::AccessType;
    use csi::volume_capability::access_mode::Mode;
    let Some(message) = message else { fail!(Invalid, "volume_capability is missing") };
    let access = match message.access_type {
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => Access::Mount {
            filesystem: mount.fs_type,
            flags: mount.mount_flags.into_iter().map(MountFlag::new).collect::<Result<_>>()?,
            group: mount.volume_mount_group,
        },
        None => fail!(Invalid, "volume_capability says neither block nor mount"),
    };
    let mode = match message.access_mode.map(|mode| mode.mode()) {
        Some(Mode::SingleNodeWriter) => AccessMode::SingleNodeWriter,
        Some(Mode::SingleNodeReaderOnly) => AccessMode::SingleNodeReaderOnly,
        Some(Mode::SingleNodeSingleWriter) => AccessMode::SingleNodeSingleWriter,
        Some(Mode::SingleNodeMultiWriter) => AccessMode::SingleNodeMultiWriter,
        Some(Mode::MultiNodeReaderOnly) => AccessMode::MultiNodeReaderOnly,
        Some(Mode::MultiNodeSingleWriter) => AccessMode::MultiNodeSingleWriter,
        Some(Mode::MultiNodeMultiWriter) => AccessMode::MultiNodeMultiWriter,
        Some(Mode::Unknown) | None => fail!(Invalid, "volume_capability has no access mode that is known here"),
    };
    Ok(Capability { access, mode })
}

pub(super) fn capabilities(messages: Vec<csi::VolumeCapability>) -> Result<Vec<Capability>> {
    if messages.is_empty() {
        fail!(Invalid, "volume_capabilities is missing");
    }
    messages.into_iter().map(|message| capability(Some(message))).collect()
}

pub(super) fn range(message: Option<csi::CapacityRange>) -> Result<Option<CapacityRange>> {
    message.map(|range| CapacityRange::new(range.required_bytes, range.limit_bytes)).transpose()
}

/// A map of the request, in order.
pub(super) fn map(what: &str, map: HashMap<String, String>) -> Result<Parameters> {
    let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAP_LIMIT {
        fail!(Invalid, "{what} has {size} bytes; at most {MAP_LIMIT} are allowed");
    }
    Ok(map.into_iter().collect())
}

/// A class' parameters, and for whom the volume is made.
pub(super) fn parameters(message: HashMap<String, String>) -> Result<(Parameters, Owner)> {
    let mut parameters = map("parameters", message)?;
    let mut take = |key: &str| parameters.remove(&format!("{KUBERNETES}{key}")).unwrap_or_default();
    let owner = Owner { claim: take("pvc/name"), namespace: take("pvc/namespace"), volume: take("pv/name") };
    parameters.retain(|key, _| !key.starts_with(KUBERNETES));
    Ok((parameters, owner))
}

/// Is this the context of an inline volume of a pod?
pub(super) fn is_ephemeral(context: &Parameters) -> bool {
    context.get(&format!("{KUBERNETES}ephemeral")).is_some_and(|value| value == "true")
}

pub(super) fn topology(message: csi::Topology) -> Topology {
    Topology(message.segments.into_iter().collect())
}

/// Places of which one must do, the preferred first. An orchestrator lists every preferred one among the requisite.
pub(super) fn places(message: Option<csi::TopologyRequirement>) -> Vec<Topology> {
    let Some(message) = message else { return Vec::new() };
    message.preferred.into_iter().chain(message.requisite).map(topology).collect()
}

pub(super) fn page(max_entries: i32, starting_token: String) -> Result<PageRequest> {
    let Ok(limit) = usize::try_from(max_entries) else {
        fail!(Invalid, "max_entries {max_entries} is negative");
    };
    let after = (!starting_token.is_empty()).then_some(starting_token);
    Ok(PageRequest { limit: (limit > 0).then_some(limit), after })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_capability_without_type_or_mode_is_invalid() {
        use csi::volume_capability::{AccessMode as Mode, AccessType, BlockVolume, MountVolume};
        let block = || Some(AccessType::Block(BlockVolume {}));
        let mode = |mode| Some(Mode { mode });
        let evil = MountVolume { mount_flags: vec!["noatime,suid".to_owned()], ..MountVolume::default() };
        for bad in [
            None,
            Some(csi::VolumeCapability { access_type: None, access_mode: mode(1) }),
            Some(csi::VolumeCapability { access_type: block(), access_mode: None }),
            Some(csi::VolumeCapability { access_type: block(), access_mode: mode(99) }),
            Some(csi::VolumeCapability { access_type: Some(AccessType::Mount(evil)), access_mode: mode(1) }),
        ] {
            assert_eq!(capability(bad).unwrap_err().kind(), ErrorKind::Invalid);
        }
        assert!(capability(Some(csi::VolumeCapability { access_type: block(), access_mode: mode(7) })).is_ok());
        assert!(capabilities(Vec::new()).is_err());
    }

    #[test]
    fn the_provisioners_keys_become_the_owner_and_are_no_parameters() {
        let message = [("pool", "a"), ("csi.storage.k8s.io/pvc/name", "data"), ("csi.storage.k8s.io/fstype", "xfs")];
        let message = message.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let (parameters, owner) = parameters(message).unwrap();
        assert_eq!(parameters.into_keys().collect::<Vec<_>>(), ["pool"]);
        assert_eq!(owner.claim, "data");
        assert!(map("parameters", HashMap::from([("k".to_owned(), "v".repeat(4096))])).is_err());
    }

    #[test]
    fn a_page_is_all_unless_a_number_is_given() {
        assert!(page(0, String::new()).unwrap().limit.is_none());
        assert_eq!(page(3, "a".to_owned()).unwrap().after.as_deref(), Some("a"));
        assert!(page(-1, String::new()).is_err());
    }
}
