//! New volumes: which pool, which carve, how big; and whether the one that exists is the one that is asked for.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use super::group::Group;
use super::parameters::{ClassParameters, Wanted, check_capabilities, have_attributes_only};
use super::pool::{IMAGE, Pool};
use super::{Nvme, Sort, carve, directory, logical, mkfs};
use crate::config::Carve;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::files;
use crate::host::filesystem::Kind;
use crate::volume::{ContentSource, Spec, Volume, VolumeId, format_bytes};

/// Sizes are multiples of this: the largest block size that disks have.
const STEP: u64 = 4096;
/// The size of a volume whose request names none.
const DEFAULT_SIZE: u64 = 1 << 30;
/// The smallest block volume.
const MINIMUM_RAW: u64 = 1 << 20;

/// The image that a new volume starts from.
pub(super) struct Origin<'a> {
    pub(super) pool: &'a Arc<Pool>,
    pub(super) image: PathBuf,
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) contents: Contents,
    pub(super) source: ContentSource,
}

/// Where a new volume can be.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    Folder(&'a Arc<Pool>),
    Group(&'a Arc<Group>),
}

impl Target<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Folder(pool) => pool.name(),
            Self::Group(group) => group.name(),
        }
    }

    pub(super) fn offers(&self, carve: Carve) -> bool {
        match self {
            Self::Folder(pool) => pool.offers(carve),
            Self::Group(group) => group.offers(carve),
        }
    }

    /// Bytes.
    fn available(&self) -> Result<u64> {
        match self {
            Self::Folder(pool) => pool.available(),
            Self::Group(group) => group.available(),
        }
    }

    /// One that can't be asked has none: others have what they have.
    pub(super) fn available_or_none(&self) -> u64 {
        self.available().unwrap_or_else(|error| {
            tracing::error!(pool = self.name(), %error, "a pool that can't be asked has no room");
            0
        })
    }

    /// Sizes are multiples of so many bytes.
    fn step(&self) -> Result<u64> {
        match self {
            Self::Folder(_) => Ok(STEP),
            Self::Group(group) => group.step(),
        }
    }
}

impl Nvme {
    /// Makes a volume, empty or from an image, or finds it and compares.
    pub(super) fn ensure_made(
        &self,
        sort: Sort,
        id: &VolumeId,
        spec: &Spec,
        origin: Option<Origin<'_>>,
    ) -> Result<Volume> {
        let wanted = check_capabilities(&spec.capabilities)?;
        let class = ClassParameters::parse(&spec.parameters)?.changed_by(&spec.mutable)?;
        // In all pools: a class may name another one than it did when the volume was made.
        let groups = self.pools.groups().filter(|group| !group.is_known_to_lack(id.as_str()));
        let found = match self.find_volume_in(id.as_str(), groups) {
            // What may lie in a pool that is missing was never handed out, or nobody would ask for it again.
            Err(error) if error.kind() == ErrorKind::Unreachable => {
                tracing::warn!(volume.id = %id, %error, "making it in another pool, or leaving it to another node");
                None
            }
            found => found?,
        };
        if let Some(found) = found {
            let present = found.descriptor()?;
            compare(&present, wanted, spec, origin.as_ref())?;
            return Ok(self.describe(id, &present));
        }
        if !spec.places.is_empty() && !spec.places.iter().any(|place| self.topology.satisfies(place)) {
            fail!(Exhausted, "the volume is wanted on another node than this one");
        }
        let (place, carve) = self.choose_pool(&class, wanted, spec, origin.as_ref())?;
        let minimum = match (carve, wanted) {
            (Carve::Directory, _) => directory::MINIMUM,
            (_, Wanted::Block) => MINIMUM_RAW,
            (_, Wanted::Mount(kind)) => kind.unwrap_or(Kind::Ext4).minimum_size(),
        };
        let default = origin.as_ref().map_or(DEFAULT_SIZE, |origin| origin.size);
        let size = match spec.capacity {
            None => default,
            Some(range) => range.choose(default, minimum, place.step()?)?,
        };
        if let (None, Some(kind), Carve::Image | Carve::Lvm) = (&origin, wanted.filesystem(size), carve) {
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
        let mut fresh = VolumeDescriptor::new(id.as_str(), spec.name.as_str(), size, 0, contents);
        fresh.mkfs_options = class.mkfs_options.clone();
        fresh.parameters = spec.parameters.clone();
        fresh.owner = spec.owner.clone();
        fresh.limits = class.limits;
        fresh.source = origin.as_ref().map(|origin| origin.source.clone());
        let pool = match place {
            Target::Group(group) => {
                fresh.encryption = class.encryption;
                group.create(&fresh, logical::overhead(&class), class.stripes)?;
                return Ok(self.describe(id, &fresh));
            }
            Target::Folder(pool) => pool,
        };
        let writer = pool.open()?;
        if carve == Carve::Directory {
            let project = writer.free_project()?;
            fresh.contents = Contents::Directory { project };
            writer
                .create(sort, id.as_str(), size, false, |folder| directory::make(folder, project, &fresh).map(Some))?;
        } else {
            writer.create(sort, id.as_str(), size, origin.is_some(), |folder| {
                make_image(folder, pool, origin.as_ref(), &mut fresh).map(|()| None)
            })?;
        }
        Ok(self.describe(id, &fresh))
    }

    /// The pool with the most room of those that the class names and that offer what is asked for, and the carve there.
    fn choose_pool<'a>(
        &'a self,
        class: &ClassParameters,
        wanted: Wanted,
        spec: &Spec,
        origin: Option<&Origin<'a>>,
    ) -> Result<(Target<'a>, Carve)> {
        let attributes_only = have_attributes_only(&spec.capabilities);
        if let Some(carve) = class.carve {
            carve::check(carve, wanted, class, attributes_only)?;
        }
        if let Some(origin) = origin {
            let pool = origin.pool;
            if class.pool.as_ref().is_some_and(|name| name != pool.name()) {
                fail!(Invalid, "the source lies in pool {}: blocks can't be shared with another pool", pool.name());
            }
            if let Some(carve) = class.carve.filter(|carve| *carve != Carve::Image) {
                fail!(
                    Invalid,
                    "a copy is made as its source is, of the carve image, and {} is asked for",
                    carve.name()
                );
            }
            return Ok((Target::Folder(pool), Carve::Image));
        }
        let mut possible = Vec::new();
        for place in self.targets(class.pool.as_deref()) {
            possible.extend(
                carve::choose(|carve| place.offers(carve), wanted, class, attributes_only).map(|carve| (place, carve)),
            );
        }
        // Making it there will tell whether there is room.
        if let [only] = possible[..] {
            return Ok(only);
        }
        let mut best: Option<(u64, Target<'a>, Carve)> = None;
        for (place, carve) in possible {
            let free = place.available_or_none();
            if best.is_none_or(|(most, _, _)| free > most) {
                best = Some((free, place, carve));
            }
        }
        if let Some((_, place, carve)) = best {
            return Ok((place, carve));
        }
        let known: BTreeSet<_> = self.targets(None).map(|place| place.name().to_owned()).collect();
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        let which = class.pool.as_ref().map_or(String::new(), |name| format!(" {name}"));
        let needs = match class.carve {
            Some(Carve::Directory) => ". Directories are to be had in an XFS mounted with prjquota",
            Some(Carve::Lvm) => ". Logical volumes are to be had in a volume group",
            None if class.encryption.is_some() || class.stripes.is_some() => {
                ". Encryption and stripes need a volume group"
            }
            _ => "",
        };
        fail!(Exhausted, "this node has no pool{which} for such a volume; it has: {known}{needs}")
    }

    pub(super) fn targets<'a>(&'a self, name: Option<&str>) -> impl Iterator<Item = Target<'a>> {
        self.pools_named(name).map(Target::Folder).chain(self.groups_named(name).map(Target::Group))
    }
}

/// Makes the image of a new volume, empty or from another one, and its descriptor.
fn make_image(folder: &Path, pool: &Pool, origin: Option<&Origin<'_>>, fresh: &mut VolumeDescriptor) -> Result<()> {
    let path = folder.join(IMAGE);
    let size = fresh.size;
    let image = match origin {
        // What an interrupted mkfs left is nothing.
        Some(origin) if !matches!(origin.contents, Contents::Formatting(_) | Contents::Blank(_)) => {
            let from = File::open(&origin.image).context(|| format!("cannot open {}", origin.image.display()))?;
            let image = files::reflink(&from, &path)?;
            // An expansion that was interrupted may have left the image longer than its descriptor says.
            let length = image.metadata().context(|| format!("cannot look at {}", path.display()))?.len();
            files::resize(&image, size.max(length), !pool.is_thin())
                .context(|| format!("cannot grow {}", path.display()))?;
            image
        }
        _ => files::create_sized(&path, size, !pool.is_thin())?,
    };
    fresh.block_size = match origin {
        Some(origin) => origin.block_size,
        None => files::direct_io_alignment(&image)?,
    };
    // In this order the second one finds nothing to do where a journal holds both.
    fresh.write_new(folder)?;
    image.sync_all().context(|| format!("cannot sync {}", path.display()))
}

/// What a copy of the origin's image holds; a blank one gets the `fresh` file system.
fn inherited(origin: &Origin<'_>, wanted: Wanted, fresh: Kind) -> Result<Contents> {
    match origin.contents {
        Contents::Filesystem(kind) if matches!(wanted, Wanted::Mount(asked) if asked.is_none_or(|asked| asked == kind)) => {
            Ok(Contents::Filesystem(kind))
        }
        Contents::Blank(_) | Contents::Formatting(_) => Ok(Contents::Blank(fresh)),
        Contents::Directory { .. } => fail!(Invalid, "the source is a directory, and a copy of an image is asked for"),
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
        Contents::Directory { .. } => Some(Kind::Xfs),
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
