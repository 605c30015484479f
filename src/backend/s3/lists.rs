//! Going through all volumes: lists, and which of them are not well.
//!
//! Calls that list bring no secrets, so they are made with the configuration's keys, and cover its services: of each the
//! buckets that are volumes, and the volumes in the buckets that it names. Names are listed; notes are read only of what a
//! page shows.

use super::ObjectStorage;
use super::names::{self, Address, Site, VOLUMES};
use super::notes::{Notes, State, VolumeNotes};
use crate::backend::{Listing, Page, PageRequest, VolumeHealth};
use crate::error::{ErrorKind, Result};
use crate::objectfs::store::blocking::Bucket;
use crate::objectfs::store::{ListRequest, StoreErrorKind};
use crate::secrets::Secrets;
use crate::volume::{Health, HealthProblem, Volume, VolumeId, format_bytes};

/// So many volumes are looked at for one page of those that are not well.
const LOOKED_AT: usize = 200;
/// Account-wide calls need a bucket's name as little as it needs to exist.
const NO_BUCKET: &str = "berth";

impl ObjectStorage {
    /// The addresses of all volumes, made or half-made, in the order of their ids.
    fn addresses(&self) -> Result<Vec<Address>> {
        let mut found = Vec::new();
        for service in &self.services {
            let site = Site::Named(service.name.clone());
            let Some(account) = self.bucket_at(&site, NO_BUCKET, &Secrets::default())? else { continue };
            let own = account.siblings()?.into_iter().filter(|bucket| names::is_volume_bucket(bucket));
            found.extend(own.map(|bucket| Address { site: site.clone(), bucket, name: None }));
            for name in &service.buckets {
                let Some(bucket) = self.bucket_at(&site, name, &Secrets::default())? else { continue };
                let names = volume_names(&bucket)?;
                let address = |volume| Address { site: site.clone(), bucket: name.clone(), name: Some(volume) };
                found.extend(names.into_iter().map(address));
            }
        }
        found.sort_by_cached_key(ToString::to_string);
        Ok(found)
    }

    /// Goes through the volumes behind a token until `visit` says that it is enough.
    fn walk(
        &self,
        after: Option<&str>,
        mut visit: impl FnMut(&Address, &Bucket, VolumeNotes) -> Result<bool>,
    ) -> Result<()> {
        if let Some(after) = after
            && Address::parse(after).is_none()
        {
            fail!(Busy, "{after:?} is no token of this list: begin it again");
        }
        for address in self.addresses()? {
            if after.is_some_and(|after| address.to_string().as_str() <= after) {
                continue;
            }
            let Some(bucket) = self.bucket(&address, &Secrets::default())? else { continue };
            let notes = match Notes::of(&address, &bucket).read() {
                // What was made under another id is known by that: here it would look like nobody's.
                Ok(Some((notes, _))) if notes.state != State::Creating && notes.id == address.to_string() => notes,
                Ok(_) => continue,
                // Another account's bucket of such a name, or one whose notes are damaged, hides no others.
                Err(error) if matches!(error.kind(), ErrorKind::Denied | ErrorKind::Internal) => {
                    tracing::warn!(%error, volume.id = %address, "left out of a list");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !visit(&address, &bucket, notes)? {
                break;
            }
        }
        Ok(())
    }
}

/// The volumes that are prefixes in this bucket.
fn volume_names(bucket: &Bucket) -> Result<Vec<String>> {
    let mut request = ListRequest { prefix: VOLUMES.to_owned(), delimiter: true, ..ListRequest::default() };
    let mut found = Vec::new();
    loop {
        let page = match bucket.list(&request) {
            // It is made when it is first needed.
            Err(error) if error.kind == StoreErrorKind::NoBucket => return Ok(found),
            page => page?,
        };
        let name = |prefix: &String| prefix.strip_prefix(VOLUMES)?.strip_suffix('/').map(str::to_owned);
        found.extend(page.prefixes.iter().filter_map(name).filter(|name| names::is_volume_name(name)));
        match page.token {
            Some(token) => request.token = Some(token),
            None => return Ok(found),
        }
    }
}

impl Listing for ObjectStorage {
    fn list(&self, page: &PageRequest) -> Result<Page<Volume>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let mut found = Page { entries: Vec::new(), next: None };
        self.walk(page.after.as_deref(), |address, _, notes| {
            if found.entries.len() == limit {
                found.next = found.entries.last().map(|volume: &Volume| volume.id.as_str().to_owned());
                return Ok(false);
            }
            // What has too long a name for CSI nobody was given.
            if let Ok(id) = address.id() {
                found.entries.push(self.describe(&id, address, &notes)?);
            }
            Ok(true)
        })?;
        Ok(found)
    }
}

impl VolumeHealth for ObjectStorage {
    fn health(&self, id: &VolumeId, secrets: &Secrets) -> Result<Option<Vec<HealthProblem>>> {
        self.with(id, secrets, |address, bucket, notes| problems(address, bucket, &notes))
    }

    fn list_unwell(&self, page: &PageRequest) -> Result<Page<(VolumeId, Vec<HealthProblem>)>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let mut unwell = Page { entries: Vec::new(), next: None };
        let (mut looked_at, mut last) = (0, None);
        self.walk(page.after.as_deref(), |address, bucket, notes| {
            // A page may be empty and yet have a next one.
            if unwell.entries.len() == limit || looked_at == LOOKED_AT {
                unwell.next = last.take();
                return Ok(false);
            }
            looked_at += 1;
            last = Some(address.to_string());
            let problems = problems(address, bucket, &notes)?;
            if let (Ok(id), false) = (address.id(), problems.is_empty()) {
                unwell.entries.push((id, problems));
            }
            Ok(true)
        })?;
        Ok(unwell)
    }
}

fn problems(address: &Address, bucket: &Bucket, notes: &VolumeNotes) -> Result<Vec<HealthProblem>> {
    let at = Notes::of(address, bucket);
    let degraded = |reason, message| HealthProblem { status: Health::Degraded, reason, message };
    let mut problems = Vec::new();
    if notes.state == State::Deleting {
        problems.push(degraded("Deleting", "its deletion was begun, and has not ended".to_owned()));
    }
    let limit = at.limits()?.and_then(|(limits, _)| limits.bytes);
    if let (Some(limit), Some(usage)) = (limit, at.usage()?)
        && usage.bytes >= limit
    {
        let (used, limit) = (format_bytes(usage.bytes), format_bytes(limit));
        problems.push(degraded("LimitReached", format!("it holds {used} of {limit}")));
    }
    Ok(problems)
}
