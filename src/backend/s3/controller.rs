//! Object storage as things: made, found, grown, changed, deleted.

use super::ObjectStorage;
use super::names::{self, Address};
use super::node::places_of;
use super::notes::{Notes, State, VolumeNotes};
use super::parameters::{ClassParameters, MutableParameters, check_capability};
use crate::backend::{Controller, Growth, Listing, Modification, VolumeHealth};
use crate::error::Result;
use crate::objectfs::settings::{Checksums, Endpoint};
use crate::objectfs::store::Condition;
use crate::objectfs::store::blocking::Bucket;
use crate::objectfs::usage::Limits;
use crate::secrets::Secrets;
use crate::volume::{Capability, CapacityRange, Name, Parameters, Spec, Volume, VolumeId, format_bytes};

/// How the names of buckets begin that a class says nothing about.
const BUCKET_PREFIX: &str = "berth-";
/// Certificates that are larger don't fit into a context (CSI: 4 KiB for all of it): nodes need the service configured.
const LARGEST_CA: usize = 2560;

impl Controller for ObjectStorage {
    fn volume_id(&self, name: &Name, parameters: &Parameters) -> Result<VolumeId> {
        self.address_for(name, &ClassParameters::parse(parameters)?)?.id()
    }

    fn check(&self, capabilities: &[Capability], parameters: &Parameters, mutable: &Parameters) -> Result<()> {
        capabilities.iter().try_for_each(check_capability)?;
        ClassParameters::parse(parameters)?;
        MutableParameters::parse(mutable).map(drop)
    }

    fn ensure_volume(&self, id: &VolumeId, spec: &Spec, secrets: &Secrets) -> Result<Volume> {
        let class = ClassParameters::parse(&spec.parameters)?;
        let address = self.address_for(&spec.name, &class)?;
        let Some(bucket) = self.bucket(&address, secrets)? else {
            fail!(Precondition, "the service of {id} is not configured here");
        };
        let notes = self.ensure_made(id, &address, &bucket, spec, &class)?;
        self.describe(id, &address, &notes)
    }

    fn ensure_absent(&self, id: &VolumeId, secrets: &Secrets) -> Result<()> {
        // Any other handle is that of a volume that somebody wrote by hand: its files are not ours to delete.
        let Some(address) = Address::of(id) else { return Ok(()) };
        if let Some(place) = places_of(id)?.first() {
            fail!(
                Precondition,
                "{id} is mounted at {} of this machine: unpublish and unstage it first",
                place.display()
            );
        }
        let Some(bucket) = self.bucket(&address, secrets)? else {
            fail!(Precondition, "{id} lies in service {}, which is not configured here: not deleted", address.site);
        };
        self.delete(&address, &bucket)
    }

    fn find(&self, id: &VolumeId, secrets: &Secrets) -> Result<Option<Volume>> {
        self.with(id, secrets, |address, _, notes| self.describe(id, address, &notes))
    }

    fn listing(&self) -> Option<&dyn Listing> {
        self.can_list().then_some(self as _)
    }
    fn health(&self) -> Option<&dyn VolumeHealth> {
        self.can_list().then_some(self as _)
    }
    fn growth(&self) -> Option<&dyn Growth> {
        Some(self)
    }
    fn modification(&self) -> Option<&dyn Modification> {
        Some(self)
    }
}

impl ObjectStorage {
    /// Calls that list bring no secrets.
    fn can_list(&self) -> bool {
        !self.services.is_empty() && self.services.iter().all(|service| service.keys.is_some() || service.chain)
    }

    fn address_for(&self, name: &Name, class: &ClassParameters) -> Result<Address> {
        let site = self.site_of(class.service.as_deref(), class.endpoint.site())?;
        Ok(match &class.bucket {
            Some(bucket) => Address::of_prefix(site, bucket, name),
            None => Address::of_bucket(site, class.bucket_prefix.as_deref().unwrap_or(BUCKET_PREFIX), name),
        })
    }

    /// Does something with a volume that was handed out. `None`: there is no such volume.
    pub(super) fn with<T>(
        &self,
        id: &VolumeId,
        secrets: &Secrets,
        work: impl FnOnce(&Address, &Bucket, VolumeNotes) -> Result<T>,
    ) -> Result<Option<T>> {
        let Some(address) = Address::of(id) else { return Ok(None) };
        let Some(bucket) = self.bucket(&address, secrets)? else { return Ok(None) };
        match Notes::of(&address, &bucket).read()? {
            Some((notes, _)) if notes.state == State::Ready => work(&address, &bucket, notes).map(Some),
            _ => Ok(None),
        }
    }

    /// What the node needs, and what people want to know. Never a secret.
    pub(super) fn describe(&self, id: &VolumeId, address: &Address, notes: &VolumeNotes) -> Result<Volume> {
        let mut context = Parameters::new();
        let mut tell = |key: &str, value: &str| {
            if !value.is_empty() {
                context.insert(key.to_owned(), value.to_owned());
            }
        };
        tell("bucket", &address.bucket);
        tell("prefix", &notes.prefix);
        tell("notes", &address.notes());
        tell("onDelete", if notes.keeps { "retain" } else { "delete" });
        tell("name", &notes.name);
        tell("claim", &notes.owner.claim);
        tell("namespace", &notes.owner.namespace);
        if let names::Site::Named(name) = &address.site {
            tell("service", name);
        }
        if let Some(endpoint) = self.endpoint(&address.site)? {
            let Endpoint { url, region, path_style, ca, checksums, .. } = endpoint;
            if let Some(url) = &url {
                tell("endpoint", url);
                tell("region", &region);
                tell("pathStyle", if path_style { "true" } else { "false" });
                tell(
                    "checksums",
                    match checksums {
                        Checksums::WhenSupported => "when-supported",
                        Checksums::WhenRequired => "when-required",
                    },
                );
            } else {
                tell("region", &region);
            }
            tell("ca", ca.as_deref().filter(|ca| ca.len() <= LARGEST_CA).unwrap_or_default());
        }
        ClassParameters::parse(&notes.parameters)?.mount.tell(&mut context);
        Ok(Volume { id: id.clone(), size: notes.size, context, source: None, places: Vec::new() })
    }
}

impl Growth for ObjectStorage {
    fn ensure_size(&self, id: &VolumeId, range: CapacityRange, secrets: &Secrets) -> Result<(u64, bool)> {
        let grown = self.with(id, secrets, |address, bucket, notes| {
            if range.limit().is_some_and(|limit| limit < notes.size) {
                fail!(OutOfRange, "{id} has {} already, and volumes never shrink", format_bytes(notes.size));
            }
            let size = range.choose(notes.size, 0, 1)?.max(notes.size);
            let at = Notes::of(address, bucket);
            // The limit first: who asks again finds the old size, and does this again.
            if let Some((mut limits, etag)) = at.limits()?
                && limits.bytes.is_some_and(|bytes| bytes < size)
            {
                limits.bytes = Some(size);
                at.write_limits(&limits, &Condition::Is(etag))?;
            }
            if size > notes.size {
                let Some((current, etag)) = at.read()? else { fail!(NotFound, "{id} does not exist any more") };
                at.write(&VolumeNotes { size, ..current }, &Condition::Is(etag))?;
            }
            // Mounts learn a new limit by themselves.
            Ok((size, false))
        });
        grown?.map_or_else(|| not_found(id), Ok)
    }
}

impl Modification for ObjectStorage {
    fn ensure_modified(&self, id: &VolumeId, mutable: &Parameters, secrets: &Secrets) -> Result<()> {
        let wanted = MutableParameters::parse(mutable)?;
        let modified = self.with(id, secrets, |address, bucket, notes| {
            let at = Notes::of(address, bucket);
            let (old, condition) = match at.limits()? {
                Some((limits, etag)) => (limits, Condition::Is(etag)),
                None => (Limits::default(), Condition::Absent),
            };
            let mut limits = old.clone();
            wanted.apply(&mut limits, notes.size);
            if limits != old {
                at.write_limits(&limits, &condition)?;
            }
            Ok(())
        });
        modified?.map_or_else(|| not_found(id), Ok)
    }
}

fn not_found<T>(id: &VolumeId) -> Result<T> {
    fail!(NotFound, "{id} does not exist")
}
