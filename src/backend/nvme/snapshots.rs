//! Snapshots: copies of an image that share its blocks. Independent of the volume, which may be deleted first.

use std::fs::File;

use super::controller::{NO_COPIES, check_copyable, page_of};
use super::descriptor::{Descriptor, SnapshotDescriptor, VolumeDescriptor};
use super::make::Origin;
use super::pool::IMAGE;
use super::{Found, Nvme, Sort};
use crate::backend::{Page, PageRequest, Snapshots};
use crate::error::{Context, Result};
use crate::host::files;
use crate::secrets::Secrets;
use crate::volume::{ContentSource, Name, Parameters, Snapshot, SnapshotId, Spec, Topology, Volume, VolumeId};

impl Snapshots for Nvme {
    fn ensure_snapshot(
        &self,
        name: &Name,
        source: &VolumeId,
        parameters: &Parameters,
        places: &[Topology],
        _: &Secrets,
    ) -> Result<Snapshot> {
        if let Some(key) = parameters.keys().next() {
            fail!(Invalid, "snapshot parameter {key:?} is not known: local snapshots have none");
        }
        let id = &self.id(Sort::Snapshot, name.as_str());
        if let Some(located) = self.locate(Sort::Snapshot, id)? {
            let present = SnapshotDescriptor::read(&located.folder)?;
            if present.source != source.as_str() {
                fail!(Conflict, "snapshot {id} of the name {} exists, but of volume {}", present.name, present.source);
            }
            return self.describe_snapshot(&present);
        }
        if !places.is_empty() && !places.iter().any(|place| self.topology.satisfies(place)) {
            fail!(Exhausted, "the snapshot is wanted on another node; a local one is usable on its volume's node only");
        }
        let located = match self.find_volume(source.as_str())? {
            Some(Found::Folder(located)) => located,
            Some(Found::Logical(_)) => fail!(Precondition, "{source} {NO_COPIES}"),
            None => fail!(NotFound, "the source volume {source} does not exist"),
        };
        let volume = VolumeDescriptor::read(&located.folder)?;
        check_copyable(&volume)?;
        self.check_reflink(located.pool)?;
        let fresh = SnapshotDescriptor::new(id, name.as_str(), &volume);
        let path = located.image();
        self.sync_users(&located)?;
        located.pool.open()?.create(Sort::Snapshot, id, volume.size, true, |folder| {
            let image = File::open(&path).context(|| format!("cannot open {}", path.display()))?;
            let copy = files::reflink(&image, &folder.join(IMAGE))?;
            fresh.write_new(folder)?;
            copy.sync_all().context(|| format!("cannot sync the snapshot of {source}"))?;
            Ok(None)
        })?;
        self.describe_snapshot(&fresh)
    }

    fn ensure_snapshot_absent(&self, id: &SnapshotId, _: &Secrets) -> Result<()> {
        self.ensure_deleted(Sort::Snapshot, id.as_str())
    }

    fn find_snapshot(&self, id: &SnapshotId, _: &Secrets) -> Result<Option<Snapshot>> {
        let Some(located) = self.locate(Sort::Snapshot, id.as_str())? else { return Ok(None) };
        self.describe_snapshot(&SnapshotDescriptor::read(&located.folder)?).map(Some)
    }

    fn list_snapshots(&self, source: Option<&VolumeId>, page: &PageRequest, _: &Secrets) -> Result<Page<Snapshot>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let fetch = if source.is_some() { usize::MAX } else { limit };
        let mut ids = self.ids_after(Sort::Snapshot, page.after.as_deref(), fetch)?;
        let read = |id: &str| -> Option<SnapshotDescriptor> {
            // One that is damaged can't be used: it is left out, and said so in the log.
            let located = self.locate(Sort::Snapshot, id).ok()??;
            SnapshotDescriptor::read(&located.folder)
                .inspect_err(|error| tracing::error!(snapshot.id = id, %error, "a snapshot can't be used"))
                .ok()
        };
        if let Some(source) = source {
            ids.retain(|id, _| read(id).is_some_and(|snapshot| snapshot.source == source.as_str()));
        }
        page_of(ids, limit, |id, _| read(id).map(|snapshot| self.describe_snapshot(&snapshot)).transpose())
    }

    fn ensure_restored(&self, id: &VolumeId, spec: &Spec, source: &SnapshotId, _: &Secrets) -> Result<Volume> {
        self.check_source_here(Sort::Snapshot, source.as_str())?;
        let Some(located) = self.locate(Sort::Snapshot, source.as_str())? else {
            fail!(NotFound, "the source snapshot {source} does not exist");
        };
        let snapshot = SnapshotDescriptor::read(&located.folder)?;
        let origin = Origin {
            image: located.image(),
            pool: located.pool,
            size: snapshot.size,
            block_size: snapshot.block_size,
            contents: snapshot.contents,
            source: ContentSource::Snapshot(source.as_str().to_owned()),
        };
        self.ensure_made(Sort::Volume, id, spec, Some(origin))
    }
}

impl Nvme {
    fn describe_snapshot(&self, descriptor: &SnapshotDescriptor) -> Result<Snapshot> {
        Ok(Snapshot {
            id: SnapshotId::new(descriptor.id.as_str())?,
            source: VolumeId::new(descriptor.source.as_str())?,
            size: descriptor.size,
            created: descriptor.created(),
            ready: true,
            places: vec![self.place.clone()],
        })
    }
}
