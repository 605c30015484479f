//! What is asked for, and what there is.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use super::{CapacityRange, Name, NodeName, SnapshotId, VolumeId};
use crate::error::Result;

/// Keys and values as a class or a caller gives them. A back end parses them into a struct of its own.
pub type Parameters = BTreeMap<String, String>;

/// A volume to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The request's name.
    pub name: Name,
    /// The wanted size; `None` means the back end's default.
    pub capacity: Option<CapacityRange>,
    /// Every way in which it will be used; never empty.
    pub capabilities: Vec<Capability>,
    /// From the StorageClass, without the owner's keys.
    pub parameters: Parameters,
    /// From the VolumeAttributesClass.
    pub mutable: Parameters,
    /// For whom it is made, if the provisioner said.
    pub owner: Owner,
    /// Places of which one has to reach the volume, the preferred first; empty: anywhere.
    pub places: Vec<Topology>,
}

/// The claim behind a volume, as `csi-provisioner --extra-create-metadata` names it. Empty strings where unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Owner {
    /// PersistentVolumeClaim.
    pub claim: String,
    /// Its namespace.
    pub namespace: String,
    /// PersistentVolume.
    pub volume: String,
}

/// One way to use a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// As a device or as a file system.
    pub access: Access,
    /// By how many, and who writes.
    pub mode: AccessMode,
}

/// What appears at the target path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// A block device.
    Block,
    /// A directory.
    Mount {
        /// The wanted file system; empty: the volume's own, or the back end's default.
        filesystem: String,
        /// Mount options, each checked to be one word; the back end allows or refuses it.
        flags: Vec<MountFlag>,
        /// The group that shall own the files (VOLUME_MOUNT_GROUP); empty: none asked for.
        group: String,
    },
}

/// By how many nodes and pods, and who of them writes. The names are those of CSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessMode {
    /// ReadWriteOnce, from an orchestrator that knows no finer modes.
    SingleNodeWriter,
    /// One node, nobody writes.
    SingleNodeReaderOnly,
    /// ReadWriteOncePod: one target path at a time.
    SingleNodeSingleWriter,
    /// ReadWriteOnce: several pods of one node.
    SingleNodeMultiWriter,
    /// ReadOnlyMany.
    MultiNodeReaderOnly,
    /// Many nodes, one of them writes.
    MultiNodeSingleWriter,
    /// ReadWriteMany.
    MultiNodeMultiWriter,
}

impl AccessMode {
    /// Nobody writes.
    pub fn is_read_only(self) -> bool {
        matches!(self, Self::SingleNodeReaderOnly | Self::MultiNodeReaderOnly)
    }

    /// One node at a time is enough.
    pub fn is_single_node(self) -> bool {
        !matches!(self, Self::MultiNodeReaderOnly | Self::MultiNodeSingleWriter | Self::MultiNodeMultiWriter)
    }
}

/// A mount option: one word, so that it can't smuggle in a second one.
///
/// The one exception is the SELinux label that kubelet adds where CSIDriver has `seLinuxMount`: it comes in quotes,
/// since it may have commas (`context="system_u:object_r:container_file_t:s0:c15,c25"`). Here it has lost the quotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountFlag(String);

impl MountFlag {
    /// # Errors
    /// `Invalid` for an empty one, or one with a comma, white space, a quote or a control character.
    pub fn new(flag: impl Into<String>) -> Result<Self> {
        let flag = flag.into();
        if let Some(label) = flag.strip_prefix("context=\"").and_then(|rest| rest.strip_suffix('"'))
            && is_label(label)
        {
            return Ok(Self(format!("context={label}")));
        }
        if flag.is_empty()
            || flag.chars().any(|c| c == ',' || c == '\\' || c == '"' || c.is_whitespace() || c.is_control())
        {
            fail!(Invalid, "mount option {flag:?} is not one plain word");
        }
        Ok(Self(flag))
    }

    /// The option as `mount -o` would take it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `user:role:type`, with SELinux' level of security where there is one.
fn is_label(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | ',');
    text.split(':').count() >= 3 && text.chars().all(fits)
}

/// What a new volume starts with.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentSource {
    /// The contents of a snapshot.
    Snapshot(String),
    /// The contents that another volume has now.
    Volume(String),
}

impl fmt::Display for ContentSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot(id) => write!(f, "snapshot {id}"),
            Self::Volume(id) => write!(f, "volume {id}"),
        }
    }
}

/// A place: label keys and values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Topology(pub BTreeMap<String, String>);

impl Topology {
    /// A place that is one node, under the driver family's own label.
    pub fn of_node(node: &NodeName) -> Self {
        Self(BTreeMap::from([(Self::NODE.to_owned(), node.as_str().to_owned())]))
    }

    /// The same place, with these labels too.
    pub fn with(mut self, labels: &BTreeMap<String, String>) -> Self {
        self.0.extend(labels.iter().map(|(key, value)| (key.clone(), value.clone())));
        self
    }

    /// The label that says on which node a local volume lies.
    pub const NODE: &'static str = "topology.berth.dev/node";

    /// Is this place inside `wanted`: does it have every label that `wanted` names?
    pub fn satisfies(&self, wanted: &Self) -> bool {
        wanted.0.iter().all(|(key, value)| self.0.get(key) == Some(value))
    }
}

/// A volume that exists.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Bytes.
    pub size: u64,
    /// What the node will need to know; never a secret.
    pub context: Parameters,
    /// What it was made from.
    pub source: Option<ContentSource>,
    /// From where it can be used; empty: from everywhere.
    pub places: Vec<Topology>,
}

/// A snapshot that exists.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The volume that it was taken of, as it was called then.
    pub source: VolumeId,
    /// Bytes that a volume made from it needs at least.
    pub size: u64,
    /// When it was taken.
    pub created: SystemTime,
    /// Can a volume be made from it yet?
    pub ready: bool,
    /// From where it can be used; empty: from everywhere.
    pub places: Vec<Topology>,
}

/// Room for new volumes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available {
    /// All that is free.
    pub total: u64,
    /// The largest single volume that could be made now.
    pub largest: u64,
    /// The smallest single volume that can be made at all.
    pub smallest: u64,
}

/// What a mounted volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// A block device: nobody but its user knows how much of it is used.
    Block {
        /// Bytes.
        total: u64,
    },
    /// A file system.
    Mount {
        /// Bytes: total, used, and what an ordinary user can still write.
        bytes: [u64; 3],
        /// Inodes, likewise.
        inodes: [u64; 3],
    },
}

/// What kind of harm has come to a volume (CSI 1.13, VolumeHealthErrorType).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    /// Usable, but not as promised.
    Degraded,
    /// Can't be used now; the data may well be there.
    Inaccessible,
    /// Data is gone.
    DataLoss,
}

/// One thing that is wrong with a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthProblem {
    /// How bad.
    pub status: Health,
    /// One CamelCase word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// What is wrong with a back end as a whole (CSI 1.13, StorageHealthErrorType).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StorageHealth {
    /// Works, but not as it should.
    Degraded,
    /// Does not answer, or is not there.
    Unreachable,
}

/// One thing that is wrong with a back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageProblem {
    /// How bad.
    pub status: StorageHealth,
    /// One CamelCase word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_option_is_one_word() {
        for bad in ["", "a,b", "a b", "a\nb", "a\0", "x=\"y\"", "a\\054b"] {
            assert!(MountFlag::new(bad).is_err(), "{bad:?}");
        }
        assert!(MountFlag::new("data=ordered").is_ok());
    }

    #[test]
    fn kubelets_selinux_label_keeps_its_commas_and_loses_its_quotes() {
        let flag = MountFlag::new(r#"context="system_u:object_r:container_file_t:s0:c15,c25""#).unwrap();
        assert_eq!(flag.as_str(), "context=system_u:object_r:container_file_t:s0:c15,c25");
        for bad in [r#"context="a:b:c d""#, r#"context="a:b:c",suid"#, r#"context="a""#, r#"fscontext="a:b:c""#] {
            assert!(MountFlag::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_place_satisfies_what_names_only_labels_that_it_has() {
        let here = Topology::of_node(&NodeName::new("a").unwrap());
        assert!(here.satisfies(&here));
        assert!(here.satisfies(&Topology(BTreeMap::new())));
        assert!(!here.satisfies(&Topology::of_node(&NodeName::new("b").unwrap())));
    }
}
