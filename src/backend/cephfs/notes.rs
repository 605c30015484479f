//! What is remembered about a volume or snapshot, in its own metadata in Ceph.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::group::Group;
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{ContentSource, Owner, Parameters};

/// The metadata key of both.
const KEY: &str = "berth";

/// About a volume. One without notes was never handed out, or is not ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct VolumeNotes {
    /// What the request called it.
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) owner: Owner,
    /// Of the class.
    #[serde(skip_serializing_if = "Parameters::is_empty")]
    pub(super) parameters: Parameters,
    /// What it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<ContentSource>,
    /// It shows a snapshot, and holds nothing itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) shows: Option<SnapshotView>,
    /// Somebody else made it and has given it to Berth, to delete it too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) adopted: bool,
}

/// Where a snapshot's contents are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SnapshotView {
    /// In the group of the volume that shows it.
    pub(super) subvolume: String,
    pub(super) snapshot: String,
    /// The folder that the snapshot was taken of.
    pub(super) folder: String,
    /// The contents below the snapshot's root.
    pub(super) inner: String,
    /// Bytes: what the volume had room for.
    pub(super) size: u64,
}

/// About a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SnapshotNotes {
    /// What the request called it.
    pub(super) name: String,
    /// What the volume had room for then, in bytes; 0: no quota.
    pub(super) size: u64,
    /// The volume's path then.
    pub(super) path: String,
}

impl VolumeNotes {
    /// What it was made from, for an error.
    pub(super) fn origin(&self) -> String {
        self.source.as_ref().map_or("nothing".to_owned(), ToString::to_string)
    }

    pub(super) fn read(group: &Group<'_>, name: &str) -> Result<Option<Self>> {
        group.metadata(name, KEY)?.map(|text| decode(&text, name)).transpose()
    }

    pub(super) fn write(&self, group: &Group<'_>, name: &str) -> Result<()> {
        group.set_metadata(name, KEY, &encode(self)?)
    }
}

impl SnapshotNotes {
    pub(super) fn read(group: &Group<'_>, name: &str, snapshot: &str) -> Result<Option<Self>> {
        group.snapshot_metadata(name, snapshot, KEY)?.map(|text| decode(&text, snapshot)).transpose()
    }

    pub(super) fn write(&self, group: &Group<'_>, name: &str, snapshot: &str) -> Result<()> {
        group.set_snapshot_metadata(name, snapshot, KEY, &encode(self)?)
    }
}

/// JSON on one line. Ceph keeps it in an INI file, where `%` begins an expression, and what is not ASCII may be lost.
fn encode(notes: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(notes)
        .map_err(|error| Error::caused(ErrorKind::Internal, "cannot write down what a volume is", error))?;
    let mut plain = String::new();
    for c in text.chars() {
        if c.is_ascii() && c != '%' && c != '\u{7f}' {
            plain.push(c);
        } else {
            let mut units = [0; 2];
            plain.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    Ok(plain)
}

fn decode<T: DeserializeOwned>(text: &str, what: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        Error::caused(ErrorKind::Internal, format!("the metadata `{KEY}` of {what} is damaged"), error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_an_ini_file() {
        let notes = VolumeNotes {
            name: "Ünïcode 100% \u{1F600} \u{7f} [a]=b; #\n".to_owned(),
            source: Some(ContentSource::Volume("main/cephfs/csi/v".to_owned())),
            ..VolumeNotes::default()
        };
        let text = encode(&notes).unwrap();
        assert!(text.bytes().all(|b| (b' '..0x7f).contains(&b)) && !text.contains('%'), "{text}");
        assert_eq!(decode::<VolumeNotes>(&text, "v").unwrap(), notes);
        assert!(decode::<VolumeNotes>("x", "v").unwrap_err().to_string().contains("damaged"));
        let adopted: VolumeNotes = decode(r#"{"adopted":true}"#, "v").unwrap();
        assert!(adopted.adopted);
    }
}
