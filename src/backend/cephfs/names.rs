//! What things are called: ids that say where a volume or snapshot lies, and names derived from a request's.
//!
//! An id names cluster, file system, group and subvolume, so that a call which brings nothing else can find them.

use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::volume::{Name, SnapshotId, VolumeId};

/// What all of our subvolumes are called, before the digest.
const VOLUME: &str = "vol-";
/// What all of our snapshots are called, before the digest.
const SNAPSHOT: &str = "snap-";
/// A snapshot that is there only while a volume is copied, before the copy's digest.
const COPY: &str = "copy-";
/// In the place of a group: a plain path follows. Ceph has no such name.
const PATH: &str = "@";

/// A subvolume: `CLUSTER/FILESYSTEM/GROUP/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Subvolume {
    pub(super) cluster: String,
    pub(super) filesystem: String,
    pub(super) group: String,
    pub(super) name: String,
}

/// What a volume id stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Subvolume(Subvolume),
    /// A directory that somebody made and Berth only mounts: `CLUSTER/FILESYSTEM/@/PATH`.
    Path {
        cluster: String,
        filesystem: String,
        path: String,
    },
}

/// A snapshot of a subvolume: the subvolume's id, `@`, and the snapshot's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SnapshotAddress {
    pub(super) subvolume: Subvolume,
    pub(super) name: String,
}

impl Address {
    /// `None`: not of this form, so no volume of this back end.
    pub(super) fn parse(id: &str) -> Option<Self> {
        let mut parts = id.splitn(4, '/');
        let (cluster, filesystem) = (parts.next()?, parts.next()?);
        let (group, rest) = (parts.next()?, parts.next()?);
        let (cluster, filesystem) = (plain(cluster)?, plain(filesystem)?);
        if group == PATH {
            return Some(Self::Path { cluster, filesystem, path: format!("/{rest}") });
        }
        Some(Self::Subvolume(Subvolume { cluster, filesystem, group: plain(group)?, name: plain(rest)? }))
    }

    pub(super) fn of(id: &VolumeId) -> Option<Self> {
        Self::parse(id.as_str())
    }

    pub(super) fn cluster(&self) -> &str {
        match self {
            Self::Subvolume(subvolume) => &subvolume.cluster,
            Self::Path { cluster, .. } => cluster,
        }
    }

    pub(super) fn filesystem(&self) -> &str {
        match self {
            Self::Subvolume(subvolume) => &subvolume.filesystem,
            Self::Path { filesystem, .. } => filesystem,
        }
    }

    /// Does this path in the file system belong to the volume?
    pub(super) fn covers(&self, shown: &str) -> bool {
        let inside =
            |folder: &str| shown.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        match self {
            Self::Subvolume(Subvolume { group, name, .. }) => inside(&format!("/volumes/{group}/{name}")),
            Self::Path { path, .. } => path.trim_end_matches('/') == shown.trim_end_matches('/'),
        }
    }
}

impl Subvolume {
    /// The subvolume of the volume that a request of this name means.
    pub(super) fn named(cluster: &str, filesystem: &str, group: &str, name: &Name) -> Self {
        let name = format!("{VOLUME}{}", digest(name.as_str()));
        Self { cluster: cluster.to_owned(), filesystem: filesystem.to_owned(), group: group.to_owned(), name }
    }

    /// # Errors
    /// `Invalid` when the parts together are longer than CSI allows.
    pub(super) fn id(&self) -> Result<VolumeId> {
        VolumeId::new(self.to_string())
    }

    /// Did Berth make it? Nobody else makes names of this form.
    pub(super) fn is_ours(&self) -> bool {
        self.name.strip_prefix(VOLUME).is_some_and(is_digest)
    }

    /// The snapshot that is taken to copy a volume into this one.
    pub(super) fn copy_snapshot(&self) -> String {
        format!("{COPY}{}", digest(&self.to_string()))
    }

    pub(super) fn snapshot(&self, name: &str) -> SnapshotAddress {
        SnapshotAddress { subvolume: self.clone(), name: name.to_owned() }
    }
}

impl std::fmt::Display for Subvolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}/{}", self.cluster, self.filesystem, self.group, self.name)
    }
}

impl SnapshotAddress {
    /// `None`: not of this form, so no snapshot of this back end.
    pub(super) fn of(id: &SnapshotId) -> Option<Self> {
        let (subvolume, name) = id.as_str().split_once('@')?;
        match Address::parse(subvolume)? {
            Address::Subvolume(subvolume) => Some(Self { subvolume, name: plain(name)? }),
            Address::Path { .. } => None,
        }
    }

    pub(super) fn id(&self) -> Result<SnapshotId> {
        SnapshotId::new(format!("{}@{}", self.subvolume, self.name))
    }

    /// Is it there only while a volume is copied?
    pub(super) fn is_of_a_copy(&self) -> bool {
        self.name.strip_prefix(COPY).is_some_and(is_digest)
    }
}

/// What a snapshot of this name is called in every subvolume.
pub(super) fn snapshot_name(name: &Name) -> String {
    format!("{SNAPSHOT}{}", digest(name.as_str()))
}

/// Ceph's own rule for names, and neither `.` nor `..`: Ceph takes the folder that they lead to for a subvolume made by
/// hand and marks it as one, after which no further subvolume can be made below it.
fn plain(text: &str) -> Option<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (!matches!(text, "" | "." | "..") && text.chars().all(fits)).then(|| text.to_owned())
}

/// 128 bits of the text's SHA-256, in hex.
fn digest(text: &str) -> String {
    Sha256::digest(text.as_bytes())[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_digest(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_says_where_its_volume_lies() {
        let subvolume = Subvolume::named("main", "cephfs", "csi", &Name::new("pvc-1").unwrap());
        let id = subvolume.id().unwrap();
        assert!(subvolume.is_ours());
        assert_eq!(Address::of(&id), Some(Address::Subvolume(subvolume.clone())));
        let snapshot = subvolume.snapshot(&snapshot_name(&Name::new("s").unwrap()));
        assert_eq!(SnapshotAddress::of(&snapshot.id().unwrap()), Some(snapshot));
        let path = Address::parse("main/cephfs/@/models/llama").unwrap();
        let expected = Address::Path {
            cluster: "main".to_owned(),
            filesystem: "cephfs".to_owned(),
            path: "/models/llama".to_owned(),
        };
        assert_eq!(path, expected);
    }

    #[test]
    fn other_ids_are_nobodys() {
        for id in ["fake", "a/b/c", "a/b/c/d/e", "a/b/c d/e", "vol-0a1b-2c", "a/b//c", "a/@/c/d"] {
            assert_eq!(Address::parse(id), None, "{id}");
        }
        assert_eq!(SnapshotAddress::of(&SnapshotId::new("a/b/c/d").unwrap()), None);
        assert_eq!(SnapshotAddress::of(&SnapshotId::new("a/b/@/d@e").unwrap()), None);
        // The rule for ids sees one part there, which is not `..`.
        for id in ["a/b/c/..@s", "a/b/c/.@s", "a/b/c/d@..", "a/b/c/d@."] {
            assert_eq!(SnapshotAddress::of(&SnapshotId::new(id).unwrap()), None, "{id}");
        }
    }

    #[test]
    fn a_volume_covers_its_own_paths_and_no_neighbours() {
        let volume = Address::parse("main/cephfs/csi/vol-1").unwrap();
        assert!(volume.covers("/volumes/csi/vol-1/uuid") && volume.covers("/volumes/csi/vol-1"));
        assert!(!volume.covers("/volumes/csi/vol-10/uuid") && !volume.covers("/volumes/other/vol-1"));
        assert!(Address::parse("main/cephfs/@/a").unwrap().covers("/a"));
    }
}
