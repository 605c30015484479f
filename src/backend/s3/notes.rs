//! What is remembered about a volume, as objects in its own bucket, outside of what its users see.
//!
//! `volume.json` is the mark: without it nothing is ever deleted. `limit.json` and `usage.json` are shared with the mounts
//! (`objectfs::usage`). A claim says whose a prefix is.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::names::{self, Address};
use crate::error::{Error, ErrorKind, Result};
use crate::objectfs::store::blocking::Bucket;
use crate::objectfs::store::{Condition, Etag, StoreErrorKind, StoreResult};
use crate::objectfs::usage::{LIMIT, Limits, Shared, USAGE};
use crate::volume::{Owner, Parameters};

/// The mark.
const VOLUME: &str = "volume.json";

/// `volume.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VolumeNotes {
    /// Its id. The same bucket may be reached under other ones, say by another name of its service.
    pub(super) id: String,
    /// What the request called it.
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) owner: Owner,
    pub(super) state: State,
    /// Bytes; 0: no size was asked for.
    pub(super) size: u64,
    /// Empty, or ends in `/`.
    pub(super) prefix: String,
    /// Of the class.
    pub(super) parameters: Parameters,
    /// What becomes of the files with it.
    pub(super) keeps: bool,
    /// In seconds since 1970.
    pub(super) created: u64,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// Nobody has it yet: whatever lies in its prefix is somebody else's.
    Creating,
    /// It was handed out.
    Ready,
    /// It is condemned.
    Deleting,
}

/// The notes of one volume.
pub(super) struct Notes<'a> {
    pub(super) bucket: &'a Bucket,
    folder: String,
}

/// Whose a prefix is.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    volume: String,
}

impl<'a> Notes<'a> {
    pub(super) fn of(address: &Address, bucket: &'a Bucket) -> Self {
        Self { bucket, folder: address.notes() }
    }

    pub(super) fn at(folder: &str, bucket: &'a Bucket) -> Self {
        Self { bucket, folder: folder.to_owned() }
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.folder)
    }

    /// Is the key one of these notes?
    pub(super) fn has(&self, key: &str) -> bool {
        key.starts_with(&self.folder)
    }

    /// `None`: no such volume, or no such bucket.
    pub(super) fn read(&self) -> Result<Option<(VolumeNotes, Etag)>> {
        let found = read::<VolumeNotes>(self.bucket, &self.key(VOLUME))?;
        if let Some((notes, _)) = &found
            && !notes.prefix.is_empty()
            && names::checked_prefix(&notes.prefix).ok().as_deref() != Some(&notes.prefix)
        {
            fail!(Internal, "{} is damaged: {:?} is no prefix", self.key(VOLUME), notes.prefix);
        }
        Ok(found)
    }

    pub(super) fn write(&self, notes: &VolumeNotes, condition: &Condition) -> StoreResult<Etag> {
        self.bucket.write(&self.key(VOLUME), encode(notes), condition)
    }

    pub(super) fn limits(&self) -> Result<Option<(Limits, Etag)>> {
        read(self.bucket, &self.key(LIMIT))
    }

    pub(super) fn write_limits(&self, limits: &Limits, condition: &Condition) -> StoreResult<Etag> {
        self.bucket.write(&self.key(LIMIT), encode(limits), condition)
    }

    pub(super) fn usage(&self) -> Result<Option<Shared>> {
        Ok(read(self.bucket, &self.key(USAGE))?.map(|(shared, _)| shared))
    }

    /// An empty volume's.
    pub(super) fn write_usage(&self, shared: &Shared) -> StoreResult<()> {
        self.bucket.write(&self.key(USAGE), encode(shared), &Condition::None).map(drop)
    }

    /// All but the mark.
    pub(super) fn remove_figures(&self) -> StoreResult<()> {
        self.bucket.delete(&self.key(USAGE), None)?;
        self.bucket.delete(&self.key(LIMIT), None)
    }

    /// The mark, or only this version of it: after this it is nobody's.
    pub(super) fn remove(&self, version: Option<&Etag>) -> StoreResult<()> {
        self.bucket.delete(&self.key(VOLUME), version)
    }
}

/// The volume that a prefix belongs to.
pub(super) fn claimant(bucket: &Bucket, key: &str) -> Result<Option<String>> {
    Ok(read::<Claim>(bucket, key)?.map(|(claim, _)| claim.volume))
}

/// Makes the prefix this volume's. False: it is another one's.
pub(super) fn take_claim(bucket: &Bucket, prefix: &str, volume: &str) -> Result<bool> {
    let claim = Claim { volume: volume.to_owned() };
    match bucket.write(&names::claim(prefix), encode(&claim), &Condition::Absent) {
        Ok(_) => Ok(true),
        Err(error) if error.kind == StoreErrorKind::Conflict => {
            Ok(claimant(bucket, &names::claim(prefix))?.as_deref() == Some(volume))
        }
        Err(error) => Err(error.into()),
    }
}

/// Gives it back, if it is this volume's.
pub(super) fn drop_claim(bucket: &Bucket, prefix: &str, volume: &str) -> Result<()> {
    let key = names::claim(prefix);
    let Some((claim, etag)) = read::<Claim>(bucket, &key)? else { return Ok(()) };
    if claim.volume == volume {
        bucket.delete(&key, Some(&etag))?;
    }
    Ok(())
}

fn read<T: DeserializeOwned>(bucket: &Bucket, key: &str) -> Result<Option<(T, Etag)>> {
    let (bytes, etag) = match bucket.read(key) {
        Ok(Some(found)) => found,
        Ok(None) => return Ok(None),
        Err(error) if error.kind == StoreErrorKind::NoBucket => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |error| {
        Error::caused(ErrorKind::Internal, format!("{key} in bucket {} is damaged: left alone", bucket.name()), error)
    };
    serde_json::from_slice(&bytes).map(|value| Some((value, etag))).map_err(damaged)
}

/// Maps of texts and numbers: there is nothing that JSON can't say.
fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
