//! Local volumes as things: made, found, listed, copied, deleted.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use super::group::Group;
use super::make::Origin;
use super::parameters::{ClassParameters, check_capabilities, have_attributes_only};
use super::pool::Pool;
use super::{Found, Located, Nvme, Sort, carve, directory, reaper};
use crate::backend::{
    Capacity, Cloning, Controller, Listing, Modification, Page, PageRequest, Snapshots, VolumeHealth,
};
use crate::config::Carve;
use crate::error::Result;
use crate::host::filesystem::Kind;
use crate::host::{files, loops, mounts};
use crate::secrets::Secrets;
use crate::volume::{
    Available, Capability, ContentSource, Health, HealthProblem, Name, Parameters, Spec, Topology, Volume, VolumeId,
};

pub(super) const NO_COPIES: &str = "has no snapshots and clones: volumes of the carve image have them";

impl Controller for Nvme {
    fn volume_id(&self, name: &Name, _: &Parameters) -> Result<VolumeId> {
        VolumeId::new(self.id(Sort::Volume, name.as_str()))
    }

    fn check(&self, capabilities: &[Capability], parameters: &Parameters, mutable: &Parameters) -> Result<()> {
        let wanted = check_capabilities(capabilities)?;
        let class = ClassParameters::parse(parameters)?.changed_by(mutable)?;
        match class.carve {
            Some(carve) => carve::check(carve, wanted, &class, have_attributes_only(capabilities)),
            None => Ok(()),
        }
    }

    fn ensure_volume(&self, id: &VolumeId, spec: &Spec, _: &Secrets) -> Result<Volume> {
        self.ensure_made(Sort::Volume, id, spec, None)
    }

    fn ensure_absent(&self, id: &VolumeId, _: &Secrets) -> Result<()> {
        self.ensure_deleted(Sort::Volume, id.as_str())
    }

    fn find(&self, id: &VolumeId, _: &Secrets) -> Result<Option<Volume>> {
        let Some(found) = self.find_volume(id.as_str())? else { return Ok(None) };
        Ok(Some(self.describe(id, &found.descriptor()?)))
    }

    fn listing(&self) -> Option<&dyn Listing> {
        Some(self)
    }
    fn health(&self) -> Option<&dyn VolumeHealth> {
        Some(self)
    }
    fn capacity(&self) -> Option<&dyn Capacity> {
        Some(self)
    }
    fn modification(&self) -> Option<&dyn Modification> {
        Some(self)
    }
    fn cloning(&self) -> Option<&dyn Cloning> {
        self.may_reflink().then_some(self as _)
    }
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.may_reflink().then_some(self as _)
    }
}

impl Nvme {
    /// Snapshots and clones share blocks; full copies of a disk would take minutes and are not offered. A pool whose
    /// disk is missing may have them when it comes: a sidecar asks once, and csi-snapshotter ends if the answer is no.
    fn may_reflink(&self) -> bool {
        let may = |pool: &Arc<Pool>| {
            pool.offers(Carve::Image) && (pool.state().is_err() || pool.has_reflink().unwrap_or(true))
        };
        self.pools.iter().any(may)
    }

    pub(super) fn check_reflink(&self, pool: &Pool) -> Result<()> {
        if !pool.has_reflink()? {
            fail!(Precondition, "pool {} has no snapshots and clones: its file system has no reflink", pool.name());
        }
        Ok(())
    }

    /// A copy is made where its source lies. The scheduler can't know where that is; `Exhausted` makes it choose again.
    pub(super) fn check_source_here(&self, sort: Sort, source: &str) -> Result<()> {
        if self.is_ours(sort, source) == Some(false) {
            fail!(Exhausted, "{source} lies on another node, and a volume can be made from it only there");
        }
        Ok(())
    }

    /// Deletes a volume or snapshot that is not in use.
    pub(super) fn ensure_deleted(&self, sort: Sort, id: &str) -> Result<()> {
        let found = match sort {
            Sort::Snapshot => self.locate(sort, id)?.map(Found::Folder),
            Sort::Volume | Sort::Ephemeral => self.find_volume(id)?,
        };
        let located = match found {
            None => return Ok(()),
            Some(Found::Folder(located)) => located,
            Some(Found::Logical(logical)) => {
                logical.ensure_detached(self, id)?;
                logical.group.delete(id)?;
                reaper::reap(logical.group);
                return Ok(());
            }
        };
        // A descriptor that can't be read does not keep a volume for ever; one that names another volume does.
        if let Ok(descriptor) = std::fs::read(located.folder.join(VolumeDescriptor::FILE))
            && let Ok(serde_json::Value::Object(descriptor)) = serde_json::from_slice(&descriptor)
            && let Some(other) = descriptor.get("id").filter(|other| other.as_str() != Some(id))
        {
            fail!(Internal, "{} holds the descriptor of {other}: not deleted", located.folder.display());
        }
        self.ensure_detached(id, &located)?;
        located.pool.open()?.delete(sort, id)?;
        reaper::reap(located.pool);
        Ok(())
    }

    pub(super) fn pools_named<'a>(&'a self, name: Option<&str>) -> impl Iterator<Item = &'a Arc<Pool>> {
        self.pools.iter().filter(move |pool| name.is_none_or(|name| name == pool.name()))
    }

    pub(super) fn groups_named<'a>(&'a self, name: Option<&str>) -> impl Iterator<Item = &'a Arc<Group>> {
        self.pools.groups().filter(move |group| name.is_none_or(|name| name == group.name()))
    }

    pub(super) fn describe(&self, id: &VolumeId, descriptor: &VolumeDescriptor) -> Volume {
        Volume {
            id: id.clone(),
            size: descriptor.size,
            context: context(descriptor),
            source: descriptor.source.clone(),
            places: vec![self.place.clone()],
        }
    }

    /// The ids behind `after`, in order, with their sizes; one more than asked for if there are more.
    pub(super) fn ids_after(&self, sort: Sort, after: Option<&str>, limit: usize) -> Result<BTreeMap<String, u64>> {
        if let Some(after) = after
            && self.is_ours(sort, after) != Some(true)
        {
            fail!(Busy, "{after:?} is no token of this list: begin it again");
        }
        let mut ids = BTreeMap::new();
        let can_be_read = |pool: &&Arc<Pool>| pool.state().err().is_none_or(|trouble| trouble.leaves_it_readable());
        for pool in self.pools.iter().filter(can_be_read) {
            pool.ask(|books| {
                let all = if sort == Sort::Snapshot { &books.snapshots } else { &books.volumes };
                let behind = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
                let ours = all.range::<str, _>(behind).filter(|(id, _)| self.is_ours(sort, id) == Some(true));
                ids.extend(ours.take(limit.saturating_add(1)).map(|(id, size)| (id.clone(), *size)));
            })?;
        }
        if sort == Sort::Volume {
            for group in self.pools.groups() {
                // One that is missing is in the storage's health.
                let volumes = group.volumes().unwrap_or_default().into_values();
                let behind = volumes.filter(|volume| after.is_none_or(|after| volume.name.as_str() > after));
                let ours = behind.filter(|volume| self.is_ours(sort, &volume.name) == Some(true));
                ids.extend(ours.map(|volume| (volume.name, volume.size)));
            }
        }
        Ok(ids)
    }

    /// What is wrong with a volume, as far as its files tell.
    pub(super) fn problems(&self, found: &Found<'_>) -> Vec<HealthProblem> {
        let located = match found {
            Found::Folder(located) => located,
            Found::Logical(logical) => return logical.problems(),
        };
        let problem = |status, reason, message: String| HealthProblem { status, reason, message };
        let mut problems = Vec::new();
        let descriptor = VolumeDescriptor::read(&located.folder);
        if let Err(error) = &descriptor {
            problems.push(problem(Health::Inaccessible, "DescriptorDamaged", error.to_string()));
        }
        match descriptor {
            Ok(VolumeDescriptor { contents: Contents::Directory { .. }, .. }) => {
                let data = directory::data_of(&located.folder);
                if let Err(error) = data.symlink_metadata() {
                    let message = format!("{}: {error}", data.display());
                    problems.push(problem(Health::DataLoss, "DirectoryMissing", message));
                } else if !located.pool.has_quotas() {
                    let message = "the pool is mounted without prjquota: the volume has no limit".to_owned();
                    problems.push(problem(Health::Degraded, "NoQuotas", message));
                }
            }
            Ok(descriptor) => problems.extend(image_problem(&located.image(), Some(descriptor.size))),
            // It may have been a directory.
            Err(_) if directory::data_of(&located.folder).exists() => {}
            Err(_) => problems.extend(image_problem(&located.image(), None)),
        }
        for trouble in located.pool.state().err().into_iter().chain(located.pool.warnings()) {
            problems.push(problem(Health::Degraded, trouble.reason, trouble.message));
        }
        problems
    }

    /// Brings what programs have written to the volume into its image.
    pub(super) fn sync_users(&self, located: &Located<'_>) -> Result<()> {
        let Some(device) = loops::find(&located.image())? else { return Ok(()) };
        for place in mounts::users_of_device(&device.path)?.iter().filter(|place| place.is_dir()) {
            files::sync_filesystem(place)?;
        }
        files::sync_device(&device.path)
    }
}

impl Listing for Nvme {
    fn list(&self, page: &PageRequest) -> Result<Page<Volume>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let ids = self.ids_after(Sort::Volume, page.after.as_deref(), limit)?;
        page_of(ids, limit, |id, size| {
            let id = VolumeId::new(id)?;
            let descriptor = self.find_volume(id.as_str())?.and_then(|found| found.descriptor().ok());
            // A damaged one is still there: its health says more.
            Ok(Some(match descriptor {
                Some(descriptor) => self.describe(&id, &descriptor),
                None => Volume { id, size, context: [].into(), source: None, places: vec![self.place.clone()] },
            }))
        })
    }
}

/// Reads the entries of a page; one that vanished meanwhile is left out.
pub(super) fn page_of<T>(
    ids: BTreeMap<String, u64>,
    limit: usize,
    read: impl Fn(&str, u64) -> Result<Option<T>>,
) -> Result<Page<T>> {
    let more = ids.len() > limit;
    let next = ids.keys().take(limit).next_back().filter(|_| more).cloned();
    let entries = ids.iter().take(limit).filter_map(|(id, size)| read(id, *size).transpose()).collect::<Result<_>>()?;
    Ok(Page { entries, next })
}

impl VolumeHealth for Nvme {
    fn health(&self, id: &VolumeId, _: &Secrets) -> Result<Option<Vec<HealthProblem>>> {
        Ok(self.find_volume(id.as_str())?.map(|found| self.problems(&found)))
    }

    fn list_unwell(&self, page: &PageRequest) -> Result<Page<(VolumeId, Vec<HealthProblem>)>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let mut unwell = Page { entries: Vec::new(), next: None };
        for id in self.ids_after(Sort::Volume, page.after.as_deref(), usize::MAX)?.into_keys() {
            let id = VolumeId::new(id)?;
            let Some(found) = self.find_volume(id.as_str())? else { continue };
            let problems = self.problems(&found);
            if problems.is_empty() {
                continue;
            }
            if unwell.entries.len() == limit {
                unwell.next = unwell.entries.last().map(|(id, _): &(VolumeId, _)| id.as_str().to_owned());
                break;
            }
            unwell.entries.push((id, problems));
        }
        Ok(unwell)
    }
}

impl Capacity for Nvme {
    fn available(&self, parameters: &Parameters, place: Option<&Topology>) -> Result<Available> {
        let class = ClassParameters::parse(parameters)?;
        let here = place.is_none_or(|place| self.topology.satisfies(place));
        let mut sum = Available { total: 0, largest: 0, smallest: Kind::Ext4.minimum_size() };
        for place in self.targets(class.pool.as_deref()).filter(|_| here) {
            if class.carve.is_none_or(|carve| place.offers(carve)) {
                let free = place.available_or_none();
                sum.total += free;
                sum.largest = sum.largest.max(free);
            }
        }
        Ok(sum)
    }
}

impl Cloning for Nvme {
    fn ensure_clone(&self, id: &VolumeId, spec: &Spec, source: &VolumeId, _: &Secrets) -> Result<Volume> {
        self.check_source_here(Sort::Volume, source.as_str())?;
        let located = match self.find_volume(source.as_str())? {
            Some(Found::Folder(located)) => located,
            Some(Found::Logical(_)) => fail!(Precondition, "{source} {NO_COPIES}"),
            None => fail!(NotFound, "the source volume {source} does not exist"),
        };
        let descriptor = VolumeDescriptor::read(&located.folder)?;
        check_copyable(&descriptor)?;
        self.check_reflink(located.pool)?;
        self.sync_users(&located)?;
        let origin = Origin {
            image: located.image(),
            pool: located.pool,
            size: descriptor.size,
            block_size: descriptor.block_size,
            contents: descriptor.contents,
            source: ContentSource::Volume(source.as_str().to_owned()),
        };
        self.ensure_made(Sort::Volume, id, spec, Some(origin))
    }
}

fn image_problem(path: &Path, size: Option<u64>) -> Option<HealthProblem> {
    let (status, reason, message) = match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            (Health::DataLoss, "ImageMissing", format!("{} is gone", path.display()))
        }
        Err(error) => (Health::Inaccessible, "ImageUnreadable", format!("cannot look at {}: {error}", path.display())),
        Ok(image) => {
            let size = size.filter(|size| image.len() < *size)?;
            let message = format!("{} has {} of {size} bytes", path.display(), image.len());
            (Health::DataLoss, "ImageTruncated", message)
        }
    };
    Some(HealthProblem { status, reason, message })
}

/// # Errors
/// `Precondition` for a directory: its files could be copied, but not all at one instant.
pub(super) fn check_copyable(descriptor: &VolumeDescriptor) -> Result<()> {
    if let Contents::Directory { .. } = descriptor.contents {
        fail!(Precondition, "{} {NO_COPIES}", descriptor.id);
    }
    Ok(())
}

/// For people who look at a PersistentVolume or a list; the node reads the descriptor.
fn context(descriptor: &VolumeDescriptor) -> Parameters {
    let owner = &descriptor.owner;
    let known = [("name", &descriptor.name), ("claim", &owner.claim), ("namespace", &owner.namespace)];
    known
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect()
}
