//! Local volumes as things: made, found, listed, copied, deleted.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Bound;
use std::path::PathBuf;

use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use super::parameters::{ClassParameters, Wanted, check_capabilities};
use super::pool::{self, IMAGE, Pool};
use super::{Located, Nvme, Sort, mkfs};
use crate::backend::{Capacity, Cloning, Controller, Listing, Page, PageRequest, Snapshots, VolumeHealth};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::filesystem::Kind;
use crate::host::{files, loops, mounts};
use crate::secrets::Secrets;
use crate::volume::{
    Available, Capability, ContentSource, Health, HealthProblem, Name, Parameters, Spec, Topology, Volume, VolumeId,
    format_bytes,
};

/// Sizes are multiples of this: the largest block size that disks have.
const STEP: u64 = 4096;
/// The size of a volume whose request names none.
const DEFAULT_SIZE: u64 = 1 << 30;
/// The smallest block volume.
const MINIMUM_RAW: u64 = 1 << 20;

/// The image that a new volume starts from.
pub(super) struct Origin<'a> {
    pub(super) pool: &'a Pool,
    pub(super) image: PathBuf,
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) contents: Contents,
    pub(super) source: ContentSource,
}

impl Controller for Nvme {
    fn volume_id(&self, name: &Name, _: &Parameters) -> Result<VolumeId> {
        VolumeId::new(self.id(Sort::Volume, name.as_str()))
    }

    fn check(&self, capabilities: &[Capability], parameters: &Parameters, mutable: &Parameters) -> Result<()> {
        check_capabilities(capabilities)?;
        ClassParameters::parse(parameters)?;
        match mutable.keys().next() {
            None => Ok(()),
            Some(key) => fail!(Invalid, "mutable parameter {key:?} is not known: local volumes have none"),
        }
    }

    fn ensure_volume(&self, id: &VolumeId, spec: &Spec, _: &Secrets) -> Result<Volume> {
        self.ensure_made(Sort::Volume, id, spec, None)
    }

    fn ensure_absent(&self, id: &VolumeId, _: &Secrets) -> Result<()> {
        self.ensure_deleted(Sort::Volume, id.as_str())
    }

    fn find(&self, id: &VolumeId, _: &Secrets) -> Result<Option<Volume>> {
        let Some(located) = self.locate(Sort::Volume, id.as_str())? else { return Ok(None) };
        Ok(Some(self.describe(id, &VolumeDescriptor::read(&located.folder)?)))
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
        self.pools.iter().any(|pool| pool.state().is_err() || pool.has_reflink().unwrap_or(true))
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

    /// Makes a volume, empty or from an image, or finds it and compares.
    pub(super) fn ensure_made(
        &self,
        sort: Sort,
        id: &VolumeId,
        spec: &Spec,
        origin: Option<Origin<'_>>,
    ) -> Result<Volume> {
        let wanted = check_capabilities(&spec.capabilities)?;
        let class = ClassParameters::parse(&spec.parameters)?;
        let found = match self.locate_in(self.pools_named(class.pool.as_deref()), sort, id.as_str()) {
            // What may lie in a pool that is missing was never handed out, or nobody would ask for it again.
            Err(error) if error.kind() == ErrorKind::Unreachable => {
                tracing::warn!(volume.id = %id, %error, "making it in another pool, or leaving it to another node");
                None
            }
            found => found?,
        };
        if let Some(located) = found {
            let present = VolumeDescriptor::read(&located.folder)?;
            compare(&present, wanted, spec, origin.as_ref())?;
            return Ok(self.describe(id, &present));
        }
        if !spec.places.is_empty() && !spec.places.iter().any(|place| self.topology.satisfies(place)) {
            fail!(Exhausted, "the volume is wanted on another node than this one");
        }
        let minimum = match wanted {
            Wanted::Block => MINIMUM_RAW,
            Wanted::Mount(kind) => kind.unwrap_or(Kind::Ext4).minimum_size(),
        };
        let default = origin.as_ref().map_or(DEFAULT_SIZE, |origin| origin.size);
        let size = match spec.capacity {
            None => default,
            Some(range) => range.choose(default, minimum, STEP)?,
        };
        if let (None, Some(kind)) = (&origin, wanted.filesystem(size)) {
            mkfs::check(kind, &class.mkfs_options)?;
        }
        let contents = match (&origin, wanted.filesystem(size)) {
            (_, None) => Contents::Raw,
            (None, Some(kind)) => Contents::Blank(kind),
            (Some(origin), Some(kind)) => inherited(origin, wanted, kind)?,
        };
        if let Some(origin) = &origin
            && size < origin.size
        {
            let least = format_bytes(origin.size);
            fail!(OutOfRange, "a volume made from {} needs at least {least}", origin.source);
        }
        if let Contents::Filesystem(kind) = contents
            && origin.as_ref().is_some_and(|origin| size > origin.size)
        {
            kind.check_growth()?;
        }
        let pool = self.choose_pool(class.pool.as_deref(), origin.as_ref())?;
        let mut fresh = VolumeDescriptor::new(id.as_str(), spec.name.as_str(), size, 0, contents);
        fresh.mkfs_options = class.mkfs_options;
        fresh.parameters = spec.parameters.clone();
        fresh.owner = spec.owner.clone();
        fresh.source = origin.as_ref().map(|origin| origin.source.clone());
        let writer = pool.open()?;
        writer.create(sort, id.as_str(), size, origin.is_some(), |folder| {
            let path = folder.join(IMAGE);
            let image = match &origin {
                // What an interrupted mkfs left is nothing.
                Some(origin) if !matches!(origin.contents, Contents::Formatting(_) | Contents::Blank(_)) => {
                    let from =
                        File::open(&origin.image).context(|| format!("cannot open {}", origin.image.display()))?;
                    let image = files::reflink(&from, &path)?;
                    files::resize(&image, size, !pool.is_thin())
                        .context(|| format!("cannot grow {}", path.display()))?;
                    image
                }
                _ => files::create_sized(&path, size, !pool.is_thin())?,
            };
            fresh.block_size = match &origin {
                Some(origin) => origin.block_size,
                None => files::direct_io_alignment(&image)?,
            };
            // In this order the second one finds nothing to do where a journal holds both.
            fresh.write_new(folder)?;
            image.sync_all().context(|| format!("cannot sync {}", path.display()))
        })?;
        Ok(self.describe(id, &fresh))
    }

    /// Deletes a volume or snapshot that is not in use.
    pub(super) fn ensure_deleted(&self, sort: Sort, id: &str) -> Result<()> {
        let Some(located) = self.locate(sort, id)? else { return Ok(()) };
        // A descriptor that can't be read does not keep a volume for ever; one that names another volume does.
        if let Ok(descriptor) = std::fs::read(located.folder.join(VolumeDescriptor::FILE))
            && let Ok(serde_json::Value::Object(descriptor)) = serde_json::from_slice(&descriptor)
            && let Some(other) = descriptor.get("id").filter(|other| other.as_str() != Some(id))
        {
            fail!(Internal, "{} holds the descriptor of {other}: not deleted", located.folder.display());
        }
        self.ensure_detached(id, &located)?;
        located.pool.open()?.delete(sort, id)
    }

    fn choose_pool<'a>(&'a self, name: Option<&str>, origin: Option<&Origin<'a>>) -> Result<&'a Pool> {
        if let Some(origin) = origin {
            if name.is_some_and(|name| name != origin.pool.name()) {
                fail!(
                    Invalid,
                    "the source lies in pool {}: blocks can't be shared with another pool",
                    origin.pool.name()
                );
            }
            return Ok(origin.pool);
        }
        let mut best: Option<(u64, &Pool)> = None;
        for pool in self.pools_named(name) {
            let free = pool.available()?;
            if best.is_none_or(|(most, _)| free > most) {
                best = Some((free, pool));
            }
        }
        match (best, name) {
            (Some((_, pool)), _) => Ok(pool),
            (None, name) => {
                let known = self.pools.iter().map(Pool::name).collect::<Vec<_>>().join(", ");
                fail!(Exhausted, "this node has no pool {}; it has: {known}", name.unwrap_or_default())
            }
        }
    }

    fn pools_named<'a>(&'a self, name: Option<&str>) -> impl Iterator<Item = &'a Pool> {
        self.pools.iter().filter(move |pool| name.is_none_or(|name| name == pool.name()))
    }

    fn describe(&self, id: &VolumeId, descriptor: &VolumeDescriptor) -> Volume {
        Volume {
            id: id.clone(),
            size: descriptor.size,
            context: context(descriptor),
            source: descriptor.source.clone(),
            places: vec![self.topology.clone()],
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
        let can_be_read = |pool: &&Pool| pool.state().err().is_none_or(|trouble| trouble.leaves_it_readable());
        for pool in self.pools.iter().filter(can_be_read) {
            pool.ask(|books| {
                let all = if sort == Sort::Snapshot { &books.snapshots } else { &books.volumes };
                let behind = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
                let ours = all.range::<str, _>(behind).filter(|(id, _)| self.is_ours(sort, id) == Some(true));
                ids.extend(ours.take(limit.saturating_add(1)).map(|(id, size)| (id.clone(), *size)));
            })?;
        }
        Ok(ids)
    }

    /// What is wrong with a volume, as far as its files tell.
    pub(super) fn problems(&self, located: &Located<'_>) -> Vec<HealthProblem> {
        let problem = |status, reason, message: String| HealthProblem { status, reason, message };
        let mut problems = Vec::new();
        let descriptor = VolumeDescriptor::read(&located.folder);
        if let Err(error) = &descriptor {
            problems.push(problem(Health::Inaccessible, "DescriptorDamaged", error.to_string()));
        }
        let path = located.image();
        match (path.symlink_metadata(), descriptor) {
            (Err(error), _) if error.kind() == std::io::ErrorKind::NotFound => {
                problems.push(problem(Health::DataLoss, "ImageMissing", format!("{} is gone", path.display())));
            }
            (Err(error), _) => {
                let message = format!("cannot look at {}: {error}", path.display());
                problems.push(problem(Health::Inaccessible, "ImageUnreadable", message));
            }
            (Ok(image), Ok(descriptor)) if image.len() < descriptor.size => {
                let message = format!("{} has {} of {} bytes", path.display(), image.len(), descriptor.size);
                problems.push(problem(Health::DataLoss, "ImageTruncated", message));
            }
            _ => {}
        }
        if let Err(trouble) = located.pool.state() {
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
        device.sync()
    }
}

impl Listing for Nvme {
    fn list(&self, page: &PageRequest) -> Result<Page<Volume>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let ids = self.ids_after(Sort::Volume, page.after.as_deref(), limit)?;
        page_of(ids, limit, |id, size| {
            let id = VolumeId::new(id)?;
            let descriptor = self.locate_volume(&id)?.and_then(|found| VolumeDescriptor::read(&found.folder).ok());
            // A damaged one is still there: its health says more.
            Ok(Some(match descriptor {
                Some(descriptor) => self.describe(&id, &descriptor),
                None => Volume { id, size, context: [].into(), source: None, places: vec![self.topology.clone()] },
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
        Ok(self.locate(Sort::Volume, id.as_str())?.map(|located| self.problems(&located)))
    }

    fn list_unwell(&self, page: &PageRequest) -> Result<Page<(VolumeId, Vec<HealthProblem>)>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let mut unwell = Page { entries: Vec::new(), next: None };
        for id in self.ids_after(Sort::Volume, page.after.as_deref(), usize::MAX)?.into_keys() {
            let id = VolumeId::new(id)?;
            let Some(located) = self.locate_volume(&id)? else { continue };
            let problems = self.problems(&located);
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
        pool::sum_available(self.pools_named(class.pool.as_deref()).filter(|_| here), Kind::Ext4.minimum_size())
    }
}

impl Cloning for Nvme {
    fn ensure_clone(&self, id: &VolumeId, spec: &Spec, source: &VolumeId, _: &Secrets) -> Result<Volume> {
        self.check_source_here(Sort::Volume, source.as_str())?;
        let Some(located) = self.locate(Sort::Volume, source.as_str())? else {
            fail!(NotFound, "the source volume {source} does not exist");
        };
        self.check_reflink(located.pool)?;
        let descriptor = VolumeDescriptor::read(&located.folder)?;
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

/// What a copy of the origin's image holds; a blank one gets the `fresh` file system.
fn inherited(origin: &Origin<'_>, wanted: Wanted, fresh: Kind) -> Result<Contents> {
    match origin.contents {
        Contents::Filesystem(kind) if matches!(wanted, Wanted::Mount(asked) if asked.is_none_or(|asked| asked == kind)) => {
            Ok(Contents::Filesystem(kind))
        }
        Contents::Blank(_) | Contents::Formatting(_) => Ok(Contents::Blank(fresh)),
        Contents::Filesystem(kind) => {
            fail!(Invalid, "the source holds {}, and {} is asked for", kind.name(), fresh.name())
        }
        Contents::Raw => fail!(Invalid, "the source is a block volume, and a file system is asked for"),
    }
}

/// Is the volume that exists the one that is asked for?
fn compare(present: &VolumeDescriptor, wanted: Wanted, spec: &Spec, origin: Option<&Origin<'_>>) -> Result<()> {
    let holds = match present.contents {
        Contents::Raw => None,
        Contents::Blank(kind) | Contents::Formatting(kind) | Contents::Filesystem(kind) => Some(kind),
    };
    let fits = match wanted {
        Wanted::Block => holds.is_none(),
        Wanted::Mount(kind) => holds.is_some_and(|holds| kind.is_none_or(|kind| kind == holds)),
    };
    let difference = if spec.capacity.is_some_and(|range| !range.allows(present.size)) {
        format!("its size is {} bytes", present.size)
    } else if !fits {
        format!("it is made for {}", holds.map_or("block access", Kind::name))
    } else if present.parameters != spec.parameters {
        format!("its parameters are {:?}", present.parameters)
    } else if present.source.as_ref() != origin.map(|origin| &origin.source) {
        present.source.as_ref().map_or("it was made empty".to_owned(), |source| format!("it was made from {source}"))
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Conflict,
        format!("volume {} of the name {} exists, but {difference}", present.id, present.name),
    ))
}
