//! What must be remembered about a volume or snapshot: a JSON file beside its image.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::limits::Limits;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::files;
use crate::host::filesystem::Kind;
use crate::volume::{ContentSource, Owner, Parameters};

/// The layout that this build writes and reads.
const VERSION: u32 = 1;

/// A volume. All sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VolumeDescriptor {
    version: u32,
    /// The id, so that a folder that was moved or copied is noticed.
    pub(super) id: String,
    /// The request's name.
    pub(super) name: String,
    /// The size promised; the image is at least as big.
    pub(super) size: u64,
    /// Logical block size of its loop device. Never changes: a file system may depend on it.
    pub(super) block_size: u32,
    /// What is in the image.
    pub(super) contents: Contents,
    /// Words for mkfs, from the class.
    pub(super) mkfs_options: Vec<String>,
    /// The class' parameters, to compare a repeated request with.
    pub(super) parameters: Parameters,
    /// What it was made from.
    pub(super) source: Option<ContentSource>,
    /// How its device is encrypted, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) encryption: Option<Encryption>,
    /// LUKS' header has been made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) sealed: bool,
    /// Of I/O; they may be changed.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub(super) limits: Limits,
    /// For whom.
    pub(super) owner: Owner,
    /// Seconds since 1970.
    pub(super) created: u64,
}

/// What a volume is made of. A file system is made on the first use, not at creation, so creating takes no time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Contents {
    /// Whatever the user of the block device wrote: never formatted by us.
    Raw,
    /// Nothing: this file system will be made on first use.
    Blank(Kind),
    /// mkfs was started and did not report success. Nobody has ever mounted it, so it may be begun anew.
    Formatting(Kind),
    /// This file system. Never formatted again.
    Filesystem(Kind),
    /// No image: a directory of the pool's file system, with this project id.
    Directory {
        /// Of XFS' project quotas.
        project: u32,
    },
}

/// How a logical volume is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Encryption {
    /// LUKS, with a key that each staging brings.
    Luks,
    /// A random key that nobody knows, gone when the volume is unstaged: what it holds ends then too.
    Throwaway,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SnapshotDescriptor {
    version: u32,
    pub(super) id: String,
    pub(super) name: String,
    /// The volume that it was taken of.
    pub(super) source: String,
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) contents: Contents,
    /// Seconds and nanoseconds since 1970.
    pub(super) created: (u64, u32),
}

impl VolumeDescriptor {
    pub(super) fn new(id: &str, name: &str, size: u64, block_size: u32, contents: Contents) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            name: name.to_owned(),
            size,
            block_size,
            contents,
            mkfs_options: Vec::new(),
            parameters: Parameters::new(),
            source: None,
            encryption: None,
            sealed: false,
            limits: Limits::default(),
            owner: Owner::default(),
            created: since_1970().as_secs(),
        }
    }
}

impl SnapshotDescriptor {
    pub(super) fn new(id: &str, name: &str, of: &VolumeDescriptor) -> Self {
        let now = since_1970();
        Self {
            version: VERSION,
            id: id.to_owned(),
            name: name.to_owned(),
            source: of.id.clone(),
            size: of.size,
            block_size: of.block_size,
            contents: of.contents,
            created: (now.as_secs(), now.subsec_nanos()),
        }
    }

    pub(super) fn created(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::new(self.created.0, self.created.1)
    }
}

/// A descriptor of either sort.
pub(super) trait Descriptor: Serialize + DeserializeOwned {
    /// Its name in the folder.
    const FILE: &'static str;

    fn version(&self) -> u32;
    fn id(&self) -> &str;

    /// Reads a folder's descriptor.
    ///
    /// # Errors
    /// `Internal` for one that is damaged, missing, of a newer version, or of another folder: nothing is guessed.
    fn read(folder: &Path) -> Result<Self> {
        let read = Self::read_as_it_is(folder)?;
        if folder.file_name().and_then(|name| name.to_str()) != Some(read.id()) {
            let path = Self::path(folder);
            fail!(Internal, "the descriptor {} is that of {}: the folder was moved", path.display(), read.id());
        }
        Ok(read)
    }

    /// As [`Self::read`], wherever the folder is now.
    fn read_as_it_is(folder: &Path) -> Result<Self> {
        let path = Self::path(folder);
        let text = std::fs::read(&path).context(|| format!("cannot read the descriptor {}", path.display()))?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads a descriptor that lies there.
    fn parse(text: &[u8], place: &str) -> Result<Self> {
        let read: Self = serde_json::from_slice(text)
            .map_err(|error| Error::caused(ErrorKind::Internal, format!("the descriptor {place} is damaged"), error))?;
        if read.version() != VERSION {
            fail!(Internal, "the descriptor {place} has version {}, not {VERSION}", read.version());
        }
        Ok(read)
    }

    /// Replaces it, durably.
    fn write(&self, folder: &Path) -> Result<()> {
        files::write_durably(&Self::path(folder), &self.text()?)
    }

    /// Writes the first one, into a folder that is being made.
    fn write_new(&self, folder: &Path) -> Result<()> {
        files::write_new(&Self::path(folder), &self.text()?)
    }

    fn text(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|error| Error::caused(ErrorKind::Internal, "cannot write a descriptor as JSON", error))
    }

    fn path(folder: &Path) -> PathBuf {
        folder.join(Self::FILE)
    }
}

impl Descriptor for VolumeDescriptor {
    const FILE: &'static str = "volume.json";

    fn version(&self) -> u32 {
        self.version
    }
    fn id(&self) -> &str {
        &self.id
    }
}

impl Descriptor for SnapshotDescriptor {
    const FILE: &'static str = "snapshot.json";

    fn version(&self) -> u32 {
        self.version
    }
    fn id(&self) -> &str {
        &self.id
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_or_moved_descriptor_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("vol-1");
        std::fs::create_dir(&folder).unwrap();
        let written = VolumeDescriptor::new("vol-1", "pvc-1", 4096, 512, Contents::Blank(Kind::Ext4));
        written.write(&folder).unwrap();
        assert_eq!(VolumeDescriptor::read(&folder).unwrap(), written);

        let moved = dir.path().join("vol-2");
        std::fs::rename(&folder, &moved).unwrap();
        assert!(VolumeDescriptor::read(&moved).unwrap_err().to_string().contains("was moved"));
        for damage in ["", "{", "{\"version\":1}", "\0\0\0"] {
            std::fs::write(moved.join("volume.json"), damage).unwrap();
            assert!(VolumeDescriptor::read(&moved).unwrap_err().to_string().contains("vol-2/volume.json"), "{damage}");
        }
    }
}
