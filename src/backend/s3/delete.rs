//! Deleting a volume: only what carries our mark, and resumed where it was interrupted.
//!
//! The mark says `deleting` before the first file goes, and goes last. What is deleted lies below a prefix that ends in `/`,
//! and that the volume's claim says to be its own; a bucket goes only if nothing is left in it.

use super::ObjectStorage;
use super::names::{self, Address};
use super::notes::{self, Notes, State, VolumeNotes};
use crate::error::{Error, ErrorKind, Result};
use crate::objectfs::settings::Settings;
use crate::objectfs::store::blocking::Bucket;
use crate::objectfs::store::{Condition, ListRequest, StoreErrorKind};

impl ObjectStorage {
    pub(super) fn delete(&self, address: &Address, bucket: &Bucket) -> Result<()> {
        let at = Notes::of(address, bucket);
        let Some((found, etag)) = at.read()? else {
            // Its mark may have gone, and the bucket not yet: if it is empty it goes, whosever it is.
            return if address.name.is_none() { remove_unmarked(bucket, &at) } else { Ok(()) };
        };
        if found.id != address.to_string() {
            fail!(Precondition, "{address} is another name for the volume {}: delete that", found.id);
        }
        match (&address.name, found.state) {
            (Some(name), State::Creating) => {
                // Nobody had it: what lies in its prefix is not its own.
                notes::drop_claim(bucket, &found.prefix, name)?;
                at.remove_figures()?;
                return Ok(at.remove(None)?);
            }
            (Some(name), state) => {
                let claimant = notes::claimant(bucket, &names::claim(&found.prefix))?;
                let is_own = claimant.as_deref() == Some(name);
                if !is_own && state == State::Ready {
                    let prefix = &found.prefix;
                    fail!(
                        Precondition,
                        "{address} is in doubt: prefix {prefix:?} is not marked as its own, but as that of {claimant:?}. Nothing is deleted"
                    );
                }
                mark(&at, &found, &etag)?;
                // Without its claim all that was in the prefix has gone before, and what is there now is another one's.
                if is_own {
                    if !found.keeps {
                        wipe(bucket, &found.prefix, &at)?;
                        wipe(bucket, &Settings::hidden_of(&found.prefix), &at)?;
                    }
                    notes::drop_claim(bucket, &found.prefix, name)?;
                }
            }
            (None, _) => {
                if !found.prefix.is_empty() {
                    fail!(
                        Internal,
                        "the notes of {address} are damaged: it is a bucket, and has the prefix {:?}",
                        found.prefix
                    );
                }
                mark(&at, &found, &etag)?;
                if !found.keeps {
                    wipe(bucket, "", &at)?;
                }
            }
        }
        at.remove_figures()?;
        at.remove(None)?;
        if address.name.is_some() || found.keeps {
            return Ok(());
        }
        remove_bucket(bucket).inspect_err(|error| {
            // The next call is to say so again: without a mark nothing would be ours any more.
            if error.kind() == ErrorKind::Precondition {
                let _ = at.write(&VolumeNotes { state: State::Deleting, ..found }, &Condition::Absent);
            }
        })
    }
}

/// It is condemned from here on, whatever happens.
fn mark(at: &Notes<'_>, found: &VolumeNotes, etag: &crate::objectfs::store::Etag) -> Result<()> {
    if found.state == State::Deleting {
        return Ok(());
    }
    let condemned = VolumeNotes { state: State::Deleting, ..found.clone() };
    at.write(&condemned, &Condition::Is(etag.clone()))?;
    Ok(())
}

/// A mount that should have gone may still write: what comes after so many sweeps stays.
const SWEEPS: usize = 3;

/// Deletes all objects and unfinished uploads below a prefix; of a whole bucket (empty prefix) all but the volume's notes.
fn wipe(bucket: &Bucket, prefix: &str, at: &Notes<'_>) -> Result<()> {
    if !prefix.is_empty() && !prefix.ends_with('/') {
        fail!(Internal, "{prefix:?} would be deleted with its neighbours: it does not end in `/`");
    }
    for (key, upload, _) in bucket.uploads(prefix)? {
        if key.starts_with(prefix) {
            bucket.abort(&key, &upload)?;
        }
    }
    for _ in 0..SWEEPS {
        if sweep(bucket, prefix, at)? == 0 {
            break;
        }
    }
    Ok(())
}

/// Page by page; how many there were.
fn sweep(bucket: &Bucket, prefix: &str, at: &Notes<'_>) -> Result<usize> {
    let (mut after, mut swept) = (None, 0);
    loop {
        let page =
            bucket.list(&ListRequest { prefix: prefix.to_owned(), after: after.clone(), ..ListRequest::default() })?;
        let keys: Vec<_> = page.objects.into_iter().map(|object| object.key).collect();
        let last = keys.last().cloned();
        let doomed: Vec<_> = keys.into_iter().filter(|key| !at.has(key)).collect();
        if let Some(foreign) = doomed.iter().find(|key| !key.starts_with(prefix)) {
            fail!(Internal, "the service lists {foreign:?} below {prefix:?}: nothing is deleted");
        }
        if !doomed.is_empty() {
            bucket.delete_many(&doomed)?;
            swept += doomed.len();
        }
        // By the last key, not by the token: what that stands in has been deleted.
        match (page.token, last) {
            (Some(_), Some(last)) => after = Some(last),
            _ => return Ok(swept),
        }
    }
}

/// A bucket that was made for a volume, by its name, and that has no mark: not yet, or not any more.
fn remove_unmarked(bucket: &Bucket, at: &Notes<'_>) -> Result<()> {
    match at.remove_figures() {
        Err(error) if error.kind == StoreErrorKind::NoBucket => Ok(()),
        Err(error) => Err(error.into()),
        Ok(()) => match remove_bucket(bucket) {
            // Kept with its files (`onDelete: retain`), or never ours.
            Err(error) if error.kind() == ErrorKind::Precondition => Ok(()),
            result => result,
        },
    }
}

/// S3 itself refuses to remove one with anything in it.
fn remove_bucket(bucket: &Bucket) -> Result<()> {
    match bucket.remove() {
        Err(error) if error.kind == StoreErrorKind::NoBucket => Ok(()),
        Err(error) if error.kind == StoreErrorKind::Conflict => Err(Error::caused(
            ErrorKind::Precondition,
            format!(
                "bucket {} is not removed, since something that is not the volume's is in it (older versions of objects?): empty it",
                bucket.name()
            ),
            error,
        )),
        result => Ok(result?),
    }
}
