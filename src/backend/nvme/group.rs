//! A pool that is a volume group, and its logical volumes (the carve `lvm`).
//!
//! ```text
//! ID                      a volume, with its descriptor in tags
//! new-ID                  being made: nobody was ever shown it
//! del-GENERATION-ID       deleted: being overwritten with zeros, then removed
//! ```
//!
//! Creating and deleting are each one rename, as in a pool of files. LVM itself keeps count of what is promised, so there
//! are no books; its commands cost some tens of milliseconds, and none runs when a volume is published.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::descriptor::{Descriptor, VolumeDescriptor};
use super::freezing::Freezing;
use super::pool::{Below, Trouble};
use super::reaper::Trash;
use crate::config::{self, Carve};
use crate::error::{Error, ErrorKind, Result};
use crate::host::lvm::{self, LogicalVolume};
use crate::host::mapper::{self, Mapped};
use crate::host::{crypt, filesystem, mounts, zero};
use crate::telemetry::PoolFigures;
use crate::volume::format_bytes;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Only what carries it is ever changed or removed.
const TAG: &str = "berth";
/// Its file system may be frozen by us.
const FROZEN: &str = "berth-frozen";
const NEW: &str = "new-";
const DELETED: &str = "del-";

/// LVM takes tags of up to 1024 characters.
const TAG_PIECE: usize = 960;
/// So much is overwritten before the next look whether to go on: 256 MiB.
const CHUNK: u64 = 256 << 20;
/// So long a device may be open because udev looks into it.
const MOMENT: Duration = Duration::from_secs(5);

pub(super) struct Group {
    config: config::Pool,
    /// What LVM calls it.
    name: String,
    /// Each of LVM's commands has so much time.
    deadline: Duration,
    /// What it lies on, where Berth looks after that.
    below: Option<Arc<dyn Below>>,
    /// One change at a time: LVM would have them wait for each other too.
    changing: Mutex<()>,
    reaping: AtomicBool,
    /// Bytes of an extent, once they are known.
    step: OnceLock<u64>,
    /// The names of all volumes that are ours, so that most of those who look for another one need not ask LVM.
    names: Mutex<Names>,
    freezing: Freezing,
}

#[derive(Default)]
struct Names {
    /// Raised before and after a volume is made: what was read meanwhile may lack it.
    changes: u64,
    known: Option<BTreeSet<String>>,
}

impl Group {
    /// The one of this name, wherever it is.
    pub(super) fn new(config: config::Pool, name: &str, deadline: Duration) -> Self {
        let (changing, reaping, step, names, freezing) = Default::default();
        Self { config, name: name.to_owned(), deadline, below: None, changing, reaping, step, names, freezing }
    }

    /// The one of this name that lies on that, and is there while that is.
    pub(super) fn on(config: config::Pool, name: &str, below: Arc<dyn Below>, deadline: Duration) -> Self {
        Self { below: Some(below), ..Self::new(config, name, deadline) }
    }

    /// LVM, which looks at no disk that is known to be another's.
    fn lvm(&self) -> Result<lvm::Group> {
        if let Some(trouble) = self.below.as_ref().and_then(|below| below.trouble()) {
            fail!(Unreachable, "{}", trouble.message);
        }
        lvm::Group::new(&self.name, self.below.as_ref().map(|below| below.disks()), self.deadline)
    }

    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    /// What LVM calls it.
    pub(super) fn group_name(&self) -> &str {
        &self.name
    }

    pub(super) fn offers(&self, carve: Carve) -> bool {
        carve == Carve::Lvm && (self.config.carves.is_empty() || self.config.carves.contains(&carve))
    }

    /// Can the pool be used now? `Err` says why not.
    pub(super) fn state(&self) -> Result<lvm::State, Trouble> {
        if let Some(trouble) = self.below.as_ref().and_then(|below| below.trouble()) {
            return Err(trouble);
        }
        let missing = |error| Trouble { reason: "PoolMissing", message: format!("pool {}: {error}", self.name()) };
        self.lvm().and_then(|lvm| lvm.state()).map_err(missing)
    }

    /// Everything that is wrong with it now.
    pub(super) fn troubles(&self) -> Vec<Trouble> {
        let state = match self.state() {
            Err(trouble) => return vec![trouble],
            Ok(state) => state,
        };
        if let Some(below) = &self.below {
            return below.warnings();
        }
        let missing = |message| Trouble { reason: "DiskMissing", message: format!("pool {}: {message}", self.name()) };
        let back = state.disks.iter().filter_map(|disk| disk.returned.as_ref()).map(|disk| {
            let (group, disk) = (&self.name, disk.display());
            missing(format!("{disk} was missing and is back: vgextend --restoremissing {group} {disk}"))
        });
        let gone = state
            .disks
            .iter()
            .filter(|disk| disk.path.is_none() && disk.returned.is_none())
            .map(|disk| missing(format!("the disk {} of volume group {} is missing", disk.uuid, self.name)));
        back.chain(gone).collect()
    }

    /// How big it is and what no volume has. `None`: it can't be used.
    pub(super) fn figures(&self) -> Option<PoolFigures> {
        self.state().ok().map(|state| PoolFigures { size: state.size, free: state.free, stray: None })
    }

    /// Sizes of volumes are multiples of this many bytes.
    pub(super) fn step(&self) -> Result<u64> {
        if let Some(step) = self.step.get() {
            return Ok(*step);
        }
        let step = self.lvm()?.state()?.extent_size;
        Ok(*self.step.get_or_init(|| step))
    }

    /// Room in the pool, in bytes.
    pub(super) fn available(&self) -> Result<u64> {
        let Ok(state) = self.state() else { return Ok(0) };
        if !is_whole(&state) {
            return Ok(0);
        }
        let Some(cap) = self.config.cap else { return Ok(state.free) };
        let promised: u64 = self.ours()?.iter().map(|volume| volume.size).sum();
        Ok(state.free.min(cap.saturating_sub(promised)))
    }

    /// Everything in the group that is ours.
    fn ours(&self) -> Result<Vec<LogicalVolume>> {
        let changes = self.names().changes;
        let mut volumes = self.lvm()?.volumes()?;
        volumes.retain(|volume| volume.tags.iter().any(|tag| tag == TAG));
        let mut names = self.names();
        if names.changes == changes {
            names.known = Some(volumes.iter().map(|volume| volume.name.clone()).collect());
        }
        Ok(volumes)
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the volume surely not been here when LVM was last asked, and was not made since? Asks nobody.
    pub(super) fn is_known_to_lack(&self, id: &str) -> bool {
        self.names().known.as_ref().is_some_and(|known| !known.contains(id))
    }

    fn forget_names(&self) {
        let mut names = self.names();
        *names = Names { changes: names.changes + 1, known: None };
    }

    /// The volumes, by id.
    pub(super) fn volumes(&self) -> Result<BTreeMap<String, LogicalVolume>> {
        let hidden = |name: &str| name.starts_with(NEW) || name.starts_with(DELETED);
        let shown = self.ours()?.into_iter().filter(|volume| !hidden(&volume.name));
        Ok(shown.map(|volume| (volume.name.clone(), volume)).collect())
    }

    /// A volume, if it exists.
    pub(super) fn find(&self, id: &str) -> Result<Option<LogicalVolume>> {
        Ok(self.volumes()?.remove(id))
    }

    /// Does a process have the volume's device open? udev looks into every device that has changed, which takes a moment and
    /// does not count.
    pub(super) fn is_held_open(&self, name: &str) -> Result<bool> {
        let end = Instant::now() + MOMENT;
        loop {
            let open = self.ours()?.into_iter().any(|volume| volume.name == name && volume.open);
            if !open || Instant::now() > end {
                return Ok(open);
            }
            std::thread::sleep(MOMENT / 50);
        }
    }

    /// The device of a volume. `None`: it is not active. Asks sysfs only.
    pub(super) fn device(&self, id: &str) -> Result<Option<Mapped>> {
        lvm::device(&self.name, id)
    }

    /// Is that the name of this pool's volume group?
    pub(super) fn is_of(&self, group: &str) -> bool {
        self.name == group
    }

    /// Makes the volume's device be there, and work: an interrupted command may have left its I/O waiting.
    pub(super) fn activate(&self, volume: &LogicalVolume) -> Result<()> {
        if !volume.active {
            self.lvm()?.activate(&volume.name)?;
        }
        // The second: it lies on a disk that was gone.
        if volume.suspended
            || self.device(&volume.name)?.is_some_and(|device| mapper::is_stale(device.device).unwrap_or(true))
        {
            self.lvm()?.refresh(&volume.name)?;
        }
        match self.device(&volume.name)? {
            Some(_) => Ok(()),
            None => fail!(Internal, "{} is active, and has no device", volume.name),
        }
    }

    /// Makes a volume of the descriptor's size and `beside` bytes for a header, with zeros in its first sectors.
    ///
    /// # Errors
    /// `Exhausted`, with what there is.
    pub(super) fn create(&self, descriptor: &VolumeDescriptor, beside: u64, stripes: Option<u32>) -> Result<()> {
        let _changing = self.lock();
        self.forget_names();
        let id = &descriptor.id;
        let size = descriptor.size.saturating_add(beside);
        self.check_room(size)?;
        let lvm = self.lvm()?;
        let (fresh, tags) = (format!("{NEW}{id}"), tags_of(descriptor)?);
        match lvm.create(&fresh, size, stripes, &tags) {
            // What an interrupted call left.
            Err(error) if error.kind() == ErrorKind::Conflict => {
                if !self.ours()?.iter().any(|volume| volume.name == fresh) {
                    fail!(Conflict, "somebody else has a logical volume {fresh} in the pool {}", self.name());
                }
                self.discard(&fresh, id)?;
                lvm.create(&fresh, size, stripes, &tags)?;
            }
            Err(error)
                if error.kind() == ErrorKind::Precondition && !lvm.state().is_ok_and(|state| is_whole(&state)) =>
            {
                fail!(Exhausted, "pool {} lacks a disk: LVM makes no volume in it until it has all", self.name());
            }
            made => made?,
        }
        let made = lvm.rename(&fresh, id);
        self.forget_names();
        made
    }

    /// # Errors
    /// `Exhausted`, with what there is. Without a cap LVM itself keeps count, and to ask it first would only take time.
    fn check_room(&self, size: u64) -> Result<()> {
        if self.config.cap.is_some() {
            let free = self.available()?;
            if size > free {
                let (free, wanted) = (format_bytes(free), format_bytes(size));
                fail!(Exhausted, "pool {} has {free} left, and {wanted} is wanted", self.name());
            }
        }
        Ok(())
    }

    /// Replaces a volume's descriptor.
    pub(super) fn write(&self, volume: &mut LogicalVolume, descriptor: &VolumeDescriptor) -> Result<()> {
        let fresh = tags_of(descriptor)?;
        let old: Vec<_> = volume.tags.iter().filter(|tag| tag.starts_with(PREFIX)).cloned().collect();
        self.retag(volume, &old, &fresh)
    }

    /// Says, for whoever comes after a crash, that the volume's file system may be frozen by us; or that it is not.
    pub(super) fn mark_frozen(&self, volume: &mut LogicalVolume, frozen: bool) -> Result<()> {
        let id = volume.name.clone();
        self.freezing.mark(&id, frozen, || self.tag_frozen(volume, frozen))
    }

    fn tag_frozen(&self, volume: &mut LogicalVolume, frozen: bool) -> Result<()> {
        let mark = [FROZEN.to_owned()];
        if frozen { self.retag(volume, &[], &mark) } else { self.retag(volume, &mark, &[]) }
    }

    fn retag(&self, volume: &mut LogicalVolume, old: &[String], fresh: &[String]) -> Result<()> {
        self.lvm()?.retag(&volume.name, old, fresh)?;
        volume.tags.retain(|tag| !old.contains(tag) && !fresh.contains(tag));
        volume.tags.extend_from_slice(fresh);
        Ok(())
    }

    /// Thaws what a driver that died has left frozen.
    pub(super) fn thaw_leftovers(&self) -> Result<()> {
        let frozen_now = self.freezing.now();
        let is_left =
            |volume: &LogicalVolume| volume.tags.iter().any(|tag| tag == FROZEN) && !frozen_now.contains(&volume.name);
        for mut volume in self.volumes()?.into_values().filter(is_left) {
            if let Some(device) = self.device(&volume.name)? {
                let above = crypt::mapping_on(device.device)?.unwrap_or(device);
                if let Some(place) = mounts::users_of_device(&above.path())?.iter().find(|place| place.is_dir()) {
                    tracing::warn!(volume.id = volume.name, "thawing what an interrupted call left frozen");
                    filesystem::thaw(place)?;
                }
            }
            self.tag_frozen(&mut volume, false)?;
        }
        Ok(())
    }

    /// Makes a volume bigger.
    ///
    /// # Errors
    /// `Exhausted`, with what there is.
    pub(super) fn grow(&self, volume: &LogicalVolume, size: u64) -> Result<()> {
        let _changing = self.lock();
        self.check_room(size.saturating_sub(volume.size))?;
        self.lvm()?.grow(&volume.name, size)
    }

    /// Deletes a volume that nobody uses: gone with one rename, its room when the reaper has overwritten it.
    pub(super) fn delete(&self, id: &str) -> Result<()> {
        let _changing = self.lock();
        self.discard(id, id)
    }

    fn discard(&self, name: &str, id: &str) -> Result<()> {
        // The same name may be made and deleted again before the zeros are written.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.lvm()?.rename(name, &format!("{DELETED}{:x}-{id}", now.as_nanos()))
    }

    /// Throws away what an interrupted call was making.
    pub(super) fn discard_leftovers(&self) -> Result<()> {
        let _changing = self.lock();
        for volume in self.ours()? {
            if let Some(id) = volume.name.strip_prefix(NEW) {
                tracing::info!(pool = self.name(), id, "removing what an interrupted call was making");
                self.discard(&volume.name, id)?;
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// LVM makes no volume in a group that misses a disk.
fn is_whole(state: &lvm::State) -> bool {
    state.disks.iter().all(|disk| disk.path.is_some())
}

impl Trash for Group {
    fn name(&self) -> &str {
        self.name()
    }

    fn is_reaped(&self) -> &AtomicBool {
        &self.reaping
    }

    fn next(&self, given_up: &BTreeSet<String>) -> Result<Option<String>> {
        let deleted = |name: &String| name.starts_with(DELETED) && !given_up.contains(name);
        Ok(self.ours()?.into_iter().map(|volume| volume.name).find(deleted))
    }

    /// The next tenant reads zeros.
    fn remove(&self, name: &str) -> Result<()> {
        if self.is_held_open(name)? {
            fail!(Busy, "somebody still has {name} open");
        }
        let Some(volume) = self.ours()?.into_iter().find(|volume| volume.name == name) else { return Ok(()) };
        self.activate(&volume)?;
        let going_on = |_| ControlFlow::Continue(());
        let Some(device) = self.device(name)? else { fail!(Internal, "{name} has no device") };
        let _ = zero::write(&device.path(), 0..volume.size, CHUNK, going_on)?;
        let _changing = self.lock();
        self.lvm()?.remove(name)
    }
}

/// How a descriptor's tags begin; a number and a piece of its text in base64 follow.
const PREFIX: &str = "berth.";

fn tags_of(descriptor: &VolumeDescriptor) -> Result<Vec<String>> {
    let text = STANDARD.encode(descriptor.text()?);
    let pieces = text.as_bytes().chunks(TAG_PIECE).enumerate();
    let pieces = pieces.map(|(number, piece)| format!("{PREFIX}{number:02}.{}", String::from_utf8_lossy(piece)));
    Ok(std::iter::once(TAG.to_owned()).chain(pieces).collect())
}

/// What a volume's tags say.
///
/// # Errors
/// `Internal` when they don't.
pub(super) fn descriptor_of(volume: &LogicalVolume) -> Result<VolumeDescriptor> {
    let pieces: BTreeMap<_, _> =
        volume.tags.iter().filter_map(|tag| tag.strip_prefix(PREFIX)?.split_once('.')).collect();
    let place = format!("in the tags of {}", volume.name);
    let text = STANDARD.decode(pieces.into_values().collect::<String>()).map_err(|error| {
        Error::caused(ErrorKind::Internal, format!("the descriptor {place} is damaged"), std::io::Error::other(error))
    })?;
    let descriptor = VolumeDescriptor::parse(&text, &place)?;
    if descriptor.id != volume.name {
        fail!(Internal, "the descriptor {place} is that of {}", descriptor.id);
    }
    Ok(descriptor)
}
