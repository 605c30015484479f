//! Volumes that start as a copy of a snapshot, or of another volume as it is now.
//!
//! Ceph copies in the background, one file after the other, into a subvolume of the name that the volume will have;
//! so there is never a second copy for one request. A volume is copied from a snapshot that is taken for it, whose name
//! is derived from the copy's, and which goes before the copy is handed out. Notes are only written on a copy that is
//! complete and has no such snapshot any more: without them there may be one.

use std::time::{Duration, Instant};

use super::controller::{choose_size, ensure_pinned};
use super::group::{Group, State};
use super::names::{Address, SnapshotAddress, Subvolume};
use super::notes::{SnapshotNotes, VolumeNotes};
use super::parameters::{ClassParameters, STEP};
use super::{COPY_PATIENCE, Cephfs};
use crate::backend::Cloning;
use crate::error::Result;
use crate::host::Errno;
use crate::secrets::Secrets;
use crate::volume::{CapacityRange, ContentSource, Spec, Volume, VolumeId, format_bytes};

/// Between two looks at a copy.
const PAUSE: Duration = Duration::from_millis(200);

/// What is copied.
struct Origin {
    subvolume: Subvolume,
    snapshot: String,
    /// The snapshot is taken for this copy alone.
    is_temporary: bool,
    /// Bytes; 0: no quota.
    size: u64,
    content: ContentSource,
}

impl Cloning for Cephfs {
    fn ensure_clone(&self, id: &VolumeId, spec: &Spec, source: &VolumeId, secrets: &Secrets) -> Result<Volume> {
        let class = ClassParameters::parse(&spec.parameters)?;
        let target = self.subvolume_for(&spec.name, &class)?;
        let subvolume = match Address::of(source) {
            Some(Address::Subvolume(subvolume)) => subvolume,
            Some(Address::Path { .. }) => fail!(Precondition, "{source} is a plain directory: it can't be copied"),
            None => fail!(NotFound, "the source volume {source} does not exist"),
        };
        check_same_group(&target, &subvolume)?;
        let content = ContentSource::Volume(source.as_str().to_owned());
        self.with(&subvolume, secrets, |group| {
            let size = match group.info(&subvolume.name)? {
                State::Present(info) => info.size,
                State::Copying => fail!(Precondition, "the source volume {source} is still being copied itself"),
                State::Absent | State::Retained | State::HalfMade => {
                    fail!(NotFound, "the source volume {source} does not exist")
                }
            };
            let shown = match size {
                None => VolumeNotes::read(group, &subvolume.name)?.and_then(|notes| notes.shows),
                Some(_) => None,
            };
            let origin = match shown {
                // What shows a snapshot is copied from that.
                Some(shown) => Origin {
                    subvolume: group.subvolume(&shown.subvolume),
                    snapshot: shown.snapshot,
                    is_temporary: false,
                    size: shown.size,
                    content,
                },
                None => Origin {
                    snapshot: target.copy_snapshot(),
                    subvolume: subvolume.clone(),
                    is_temporary: true,
                    size: size.unwrap_or_default(),
                    content,
                },
            };
            self.ensure_copied(group, id, spec, &class, &origin)
        })
    }
}

impl Cephfs {
    pub(super) fn ensure_copied_from_snapshot(
        &self,
        id: &VolumeId,
        spec: &Spec,
        class: &ClassParameters,
        source: &SnapshotAddress,
        secrets: &Secrets,
    ) -> Result<Volume> {
        let SnapshotAddress { subvolume, name } = source;
        check_same_group(&self.subvolume_for(&spec.name, class)?, subvolume)?;
        self.with(subvolume, secrets, |group| {
            if group.snapshot(&subvolume.name, name)?.is_none() {
                fail!(NotFound, "the source snapshot {} does not exist", source.id()?);
            }
            let size = SnapshotNotes::read(group, &subvolume.name, name)?.map_or(0, |notes| notes.size);
            let content = ContentSource::Snapshot(source.id()?.as_str().to_owned());
            let origin =
                Origin { subvolume: subvolume.clone(), snapshot: name.clone(), is_temporary: false, size, content };
            self.ensure_copied(group, id, spec, class, &origin)
        })
    }

    fn ensure_copied(
        &self,
        group: &Group<'_>,
        id: &VolumeId,
        spec: &Spec,
        class: &ClassParameters,
        origin: &Origin,
    ) -> Result<Volume> {
        let target = self.subvolume_for(&spec.name, class)?;
        let name = &target.name;
        let size = choose_size(spec, origin.size.max(STEP))?;
        if size < origin.size {
            fail!(OutOfRange, "a volume made from {} needs at least {}", origin.content, format_bytes(origin.size));
        }
        match group.info(name)? {
            State::Absent | State::Retained | State::HalfMade => {
                let (volume, snapshot) = (&origin.subvolume.name, &origin.snapshot);
                if origin.is_temporary {
                    self.hint(group, |hints| hints.insert(snapshot.clone(), volume.clone()));
                    group.create_snapshot(volume, snapshot)?;
                }
                group.begin_copy(volume, snapshot, &target, class.data_pool.as_deref())?;
            }
            State::Copying => {}
            State::Present(info) => {
                let notes = VolumeNotes::read(group, name)?;
                if !info.is_copy {
                    fail!(Conflict, "{id} exists, but is no copy");
                }
                if let Some(notes) = notes {
                    let size = info.size.unwrap_or_default();
                    if notes.source.as_ref() != Some(&origin.content) {
                        fail!(Conflict, "{id} exists, but was made from {}", notes.origin());
                    }
                    if spec.capacity.is_some_and(|range| !range.allows(size)) {
                        fail!(Conflict, "{id} exists, but its size is {size} bytes");
                    }
                    return self.describe(group, id, size, &info.path, &notes);
                }
            }
        }
        wait(group, &target, origin)?;
        let State::Present(info) = group.info(name)? else { fail!(Busy, "{id} is not ready yet: try again") };
        if info.size.is_none_or(|present| present < size) {
            group.resize(name, size)?;
        }
        // Of a snapshot whose volume is gone only the finished copy tells how large it was.
        let size = info.size.unwrap_or_default().max(size);
        if let Some(limit) = spec.capacity.and_then(CapacityRange::limit).filter(|limit| *limit < size) {
            let (size, limit) = (format_bytes(size), format_bytes(limit));
            fail!(OutOfRange, "a volume made from {} has {size}, and the limit is {limit}", origin.content);
        }
        ensure_pinned(group, name, spec, class)?;
        if origin.is_temporary {
            self.forget(group, &origin.subvolume.name, &origin.snapshot)?;
        }
        let notes = VolumeNotes { source: Some(origin.content.clone()), ..VolumeNotes::of(spec) };
        notes.write(group, name)?;
        self.describe(group, id, size, &info.path, &notes)
    }

    /// Gives a copy up that is not complete, and deletes what there is of it.
    pub(super) fn delete_copying(&self, group: &Group<'_>, target: &Subvolume, patience: Duration) -> Result<()> {
        if !target.is_ours() {
            fail!(Precondition, "{target} is being copied by somebody else: not deleted");
        }
        let name = &target.name;
        let end = Instant::now() + patience;
        loop {
            let copy = match group.copy(name) {
                Ok(copy) => copy,
                Err(refusal) if refusal.errno == Errno::NOENT => return Ok(()),
                Err(refusal) => return Err(refusal.into()),
            };
            if matches!(copy.state.as_str(), "pending" | "in-progress") {
                // It may end at this moment, which is refused and seen in the next round.
                let _ = group.cancel_copy(name);
            } else {
                // First the snapshot: once the copy is gone, nothing tells of it.
                match copy.source {
                    Some((volume, snapshot)) if snapshot == target.copy_snapshot() => {
                        self.forget(group, &volume, &snapshot)?
                    }
                    Some(_) => {}
                    None => self.forget_copy(group, target)?,
                }
                match group.remove_copy(name) {
                    Err(refusal) if refusal.errno == Errno::AGAIN => {}
                    Err(refusal) if refusal.errno != Errno::NOENT => return Err(refusal.into()),
                    _ => return Ok(()),
                }
            }
            if Instant::now() >= end {
                fail!(Busy, "the copy {target} is {}, and is being given up: try again", copy.state);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Deletes the snapshot that a copy was made from, if an interrupted call left it.
    pub(super) fn forget_copy(&self, group: &Group<'_>, target: &Subvolume) -> Result<()> {
        let snapshot = target.copy_snapshot();
        match self.holder(group, &snapshot)? {
            Some(volume) => self.forget(group, &volume, &snapshot),
            None => Ok(()),
        }
    }

    /// Deletes a snapshot that was there for a copy.
    fn forget(&self, group: &Group<'_>, volume: &str, snapshot: &str) -> Result<()> {
        match group.remove_snapshot(volume, snapshot) {
            Err(refusal) if refusal.errno != Errno::NOENT => return Err(refusal.into()),
            _ => {}
        }
        self.hint(group, |hints| hints.remove(snapshot));
        Ok(())
    }
}

/// Waits a while until the copy is complete.
///
/// # Errors
/// `Busy`, with its progress, while it is not; `Conflict` when it is a copy of something else.
fn wait(group: &Group<'_>, target: &Subvolume, origin: &Origin) -> Result<()> {
    let end = Instant::now() + COPY_PATIENCE;
    loop {
        let copy = group.copy(&target.name)?;
        let wanted = (origin.subvolume.name.clone(), origin.snapshot.clone());
        if copy.source.as_ref().is_some_and(|source| *source != wanted) {
            let (volume, snapshot) = copy.source.unwrap_or_default();
            fail!(Conflict, "{target} exists, and is being copied from {volume}@{snapshot}");
        }
        match copy.state.as_str() {
            "complete" => return Ok(()),
            "pending" | "in-progress" => {}
            state => {
                let why = copy.failure.unwrap_or_default();
                // It was never handed out: the next attempt begins anew.
                match group.remove_copy(&target.name) {
                    Err(refusal) if refusal.errno != Errno::AGAIN => return Err(refusal.into()),
                    _ => fail!(Busy, "the copy {target} is {state} ({why}): try again, which begins it anew"),
                }
            }
        }
        if Instant::now() >= end {
            let progress = copy.progress.map(|progress| format!(" ({progress})")).unwrap_or_default();
            fail!(Busy, "the copy {target} is {}{progress}: ask again", copy.state);
        }
        std::thread::sleep(PAUSE);
    }
}

fn check_same_group(target: &Subvolume, source: &Subvolume) -> Result<()> {
    let place = |volume: &Subvolume| format!("{}/{}/{}", volume.cluster, volume.filesystem, volume.group);
    let (target, source) = (place(target), place(source));
    if target != source {
        fail!(Invalid, "the source lies in {source}, and the class in {target}: a copy is made where its source lies");
    }
    Ok(())
}
