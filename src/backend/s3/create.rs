//! Making a volume: safe to interrupt anywhere, and to begin again.
//!
//! A prefix is made in this order: notes that say `creating`; the claim of the prefix; a look at what is there; limit and
//! usage; notes that say `ready`. A bucket needs no claim. Whatever ends in an error that is not asked again leaves nothing.

use std::time::{SystemTime, UNIX_EPOCH};

use super::ObjectStorage;
use super::names::{self, Address};
use super::notes::{self, Notes, State, VolumeNotes};
use super::parameters::{ClassParameters, MutableParameters};
use crate::error::{Error, ErrorKind, Result};
use crate::objectfs::store::blocking::Bucket;
use crate::objectfs::store::{Condition, Etag, ListRequest, StoreErrorKind};
use crate::objectfs::usage::{Limits, Shared};
use crate::volume::{Spec, VolumeId, format_bytes};

/// The size of a volume whose request has only a limit.
const DEFAULT_SIZE: u64 = 1 << 30;

/// Where a call that was killed may have left an object with which it found out what the service can do.
const TRIALS: &str = ".berth/probe/";

/// After these nobody has to ask again, nor delete.
fn is_final(kind: ErrorKind) -> bool {
    use ErrorKind::*;
    match kind {
        Invalid | Conflict | Denied | OutOfRange | Precondition | Unsupported => true,
        NotFound | Busy | Exhausted | Unreachable | OutcomeUnknown | Internal => false,
    }
}

impl ObjectStorage {
    /// Finds the volume, or makes it.
    pub(super) fn ensure_made(
        &self,
        id: &VolumeId,
        address: &Address,
        bucket: &Bucket,
        spec: &Spec,
        class: &ClassParameters,
    ) -> Result<VolumeNotes> {
        let at = Notes::of(address, bucket);
        let begun = match at.read()? {
            Some((found, _)) if found.state == State::Ready => {
                compare(id, &found, spec, class)?;
                return Ok(found);
            }
            Some((found, _)) if found.state == State::Deleting => {
                // What was condemned goes first.
                self.delete(address, bucket)?;
                None
            }
            begun => begun,
        };
        let wanted = VolumeNotes::of(spec, class, address)?;
        let made = match &address.name {
            None => make_bucket(id, bucket, &at, &wanted, spec),
            Some(name) => make_prefix(bucket, &at, &wanted, spec, name, begun),
        };
        if let Err(error) = &made
            && is_final(error.kind())
        {
            undo(address, bucket, &wanted);
        }
        made.map(|()| wanted)
    }
}

impl VolumeNotes {
    fn of(spec: &Spec, class: &ClassParameters, address: &Address) -> Result<Self> {
        let prefix = match (&address.name, &class.path) {
            (None, _) => String::new(),
            (Some(_), Some(pattern)) => names::prefix_of(pattern, &spec.owner)?,
            (Some(name), None) => format!("{name}/"),
        };
        Ok(Self {
            id: address.to_string(),
            name: spec.name.as_str().to_owned(),
            owner: spec.owner.clone(),
            state: State::Ready,
            size: spec.capacity.map_or(Ok(0), |range| range.choose(DEFAULT_SIZE, 0, 1))?,
            prefix,
            parameters: spec.parameters.clone(),
            keeps: class.keeps,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        })
    }
}

fn make_bucket(id: &VolumeId, bucket: &Bucket, at: &Notes<'_>, wanted: &VolumeNotes, spec: &Spec) -> Result<()> {
    bucket.ensure().map_err(|error| match error.kind {
        StoreErrorKind::Conflict => {
            Error::caused(ErrorKind::Conflict, format!("bucket {} is another account's", bucket.name()), error)
        }
        _ => error.into(),
    })?;
    let page = bucket.list(&ListRequest { limit: Some(10), ..ListRequest::default() })?;
    let is_foreign = |key: &str| !at.has(key) && !key.starts_with(TRIALS);
    if let Some(foreign) = page.objects.iter().find(|object| is_foreign(&object.key)) {
        fail!(
            Conflict,
            "bucket {} of volume {id} exists and was not made for it: it holds {:?}, for example",
            bucket.name(),
            foreign.key
        );
    }
    finish(at, wanted, spec, &Condition::Absent)
}

fn make_prefix(
    bucket: &Bucket,
    at: &Notes<'_>,
    wanted: &VolumeNotes,
    spec: &Spec,
    name: &str,
    begun: Option<(VolumeNotes, Etag)>,
) -> Result<()> {
    let prefix = &wanted.prefix;
    let begun = match begun {
        // An interrupted call wanted another one: that is given back first.
        Some((found, etag)) if found.prefix != *prefix => {
            notes::drop_claim(bucket, &found.prefix, name)?;
            Condition::Is(etag)
        }
        Some((_, etag)) => Condition::Is(etag),
        None => Condition::Absent,
    };
    let creating = VolumeNotes { state: State::Creating, ..wanted.clone() };
    let begun = at.write(&creating, &begun).map_err(|error| match error.kind {
        StoreErrorKind::NoBucket => Error::new(
            ErrorKind::Precondition,
            format!("bucket {} does not exist: make it, or leave the class's `bucket` out", bucket.name()),
        ),
        _ => error.into(),
    })?;
    let taken =
        |whose: &str| Error::new(ErrorKind::Conflict, format!("prefix {prefix:?} of bucket {} {whose}", bucket.name()));
    // Claimed first and looked at afterwards: of two that claim at the same time one at least sees the other.
    if !notes::take_claim(bucket, prefix, name)? {
        return Err(taken("belongs to another volume: choose another `path`"));
    }
    for above in names::claims_above(prefix) {
        if let Some(other) = notes::claimant(bucket, &above)? {
            return Err(taken(&format!("lies in that of volume {other}: choose another `path`")));
        }
    }
    let whole = Address { name: None, site: names::Site::Named(String::new()), bucket: bucket.name().to_owned() };
    if Notes::of(&whole, bucket).read()?.is_some() {
        return Err(taken("lies in a bucket that is a volume as a whole"));
    }
    let below = ListRequest { prefix: names::claims_below(prefix), limit: Some(2), ..ListRequest::default() };
    if let Some(other) = bucket.list(&below)?.objects.iter().find(|object| object.key != names::claim(prefix)) {
        return Err(taken(&format!("holds that of another volume ({}): choose another `path`", other.key)));
    }
    for (end, _) in prefix.match_indices('/') {
        let object = &prefix[..end];
        let there = ListRequest { prefix: object.to_owned(), limit: Some(1), ..ListRequest::default() };
        if bucket.list(&there)?.objects.iter().any(|found| found.key == object) {
            return Err(taken(&format!(
                "lies below the object {object:?}, where MinIO hides files: choose another `path`"
            )));
        }
    }
    let inside = ListRequest { prefix: prefix.clone(), limit: Some(1), ..ListRequest::default() };
    if let Some(foreign) = bucket.list(&inside)?.objects.first() {
        fail!(
            Precondition,
            "prefix {prefix:?} of bucket {} holds objects already ({:?}, for example): a new volume shares nothing silently. Write a PersistentVolume by hand to use them",
            bucket.name(),
            foreign.key
        );
    }
    finish(at, wanted, spec, &Condition::Is(begun))
}

/// The last notes come last: with them it is known to be complete.
fn finish(at: &Notes<'_>, wanted: &VolumeNotes, spec: &Spec, condition: &Condition) -> Result<()> {
    let class = ClassParameters::parse(&spec.parameters)?;
    let mutable = MutableParameters::parse(&spec.mutable)?;
    let mut limits =
        Limits { bytes: (!class.is_unlimited && wanted.size > 0).then_some(wanted.size), ..Limits::default() };
    mutable.apply(&mut limits, wanted.size);
    at.write_limits(&limits, &Condition::None)?;
    at.write_usage(&Shared { counted: wanted.created, ..Shared::default() })?;
    at.write(wanted, condition)?;
    Ok(())
}

/// As if it had never been begun, as far as that can be had.
fn undo(address: &Address, bucket: &Bucket, wanted: &VolumeNotes) {
    let at = Notes::of(address, bucket);
    let all = || -> Result<()> {
        // Somebody else may have been faster, and have finished it.
        match (at.read()?, &address.name) {
            (Some((found, _)), _) if found.state != State::Creating => Ok(()),
            (Some((found, etag)), Some(name)) => {
                notes::drop_claim(bucket, &found.prefix, name)?;
                at.remove_figures()?;
                Ok(at.remove(Some(&etag))?)
            }
            (None, Some(name)) => notes::drop_claim(bucket, &wanted.prefix, name),
            (None, None) => {
                at.remove_figures()?;
                // One that is not empty stays, of course.
                bucket.remove().or_else(|error| match error.kind {
                    StoreErrorKind::Conflict | StoreErrorKind::NoBucket | StoreErrorKind::Denied => Ok(()),
                    _ => Err(error.into()),
                })
            }
            (Some(_), None) => Ok(()),
        }
    };
    if let Err(error) = all() {
        tracing::warn!(%error, volume.id = %address, "what was begun of the volume could not be taken back");
    }
}

/// Is the volume that exists the one that is asked for?
fn compare(id: &VolumeId, found: &VolumeNotes, spec: &Spec, class: &ClassParameters) -> Result<()> {
    let was = ClassParameters::parse(&found.parameters)?;
    let difference = if found.name != spec.name.as_str() {
        format!("it was made for {}", found.name)
    } else if spec.capacity.is_some_and(|range| !range.allows(found.size)) {
        format!("its size is {}", format_bytes(found.size))
    } else if was != *class {
        "it was made with other parameters".to_owned()
    } else if class
        .path
        .as_ref()
        .is_some_and(|path| names::prefix_of(path, &spec.owner).ok().as_ref() != Some(&found.prefix))
    {
        format!("its prefix is {:?}", found.prefix)
    } else {
        return Ok(());
    };
    fail!(Conflict, "volume {id} of the name {} exists, but {difference}", spec.name.as_str())
}
