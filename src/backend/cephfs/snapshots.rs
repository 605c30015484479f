//! Snapshots, and read-only volumes that show one.
//!
//! A snapshot outlives its volume: deleting that keeps it. A volume that is only read need not be a copy: it shows the
//! snapshot where it lies. Such a volume is an empty subvolume without a quota, whose notes say what it shows; before
//! it is made, the snapshot's metadata gets a key that names it, so whoever deletes the snapshot knows where to look.
//! The volume that the snapshot was taken of has to stay as well: what was deleted lies in a folder of Ceph's own, and
//! a node that may only see its group can't read it there, not even in a snapshot. So a snapshot whose volume is gone
//! is copied.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use super::Cephfs;
use super::control::Account;
use super::group::{Group, State};
use super::names::{Address, SnapshotAddress, Subvolume, snapshot_name};
use super::notes::{SnapshotNotes, SnapshotView, VolumeNotes};
use super::parameters::ClassParameters;
use crate::backend::{Page, PageRequest, Snapshots};
use crate::error::Result;
use crate::host::Errno;
use crate::secrets::Secrets;
use crate::volume::{ContentSource, Name, Parameters, Snapshot, SnapshotId, Spec, Topology, Volume, VolumeId};

/// A key of a snapshot's metadata that begins so names a volume that shows it.
const SHOWN_BY: &str = "shown-by-";

/// Which subvolume of a group has the snapshot of a name. Only a hint: Ceph is asked before anything follows from it.
pub(super) type SnapshotHints = BTreeMap<String, BTreeMap<String, String>>;

impl Snapshots for Cephfs {
    fn ensure_snapshot(
        &self,
        name: &Name,
        source: &VolumeId,
        parameters: &Parameters,
        _: &[Topology],
        secrets: &Secrets,
    ) -> Result<Snapshot> {
        if let Some(key) = parameters.keys().next() {
            fail!(Invalid, "snapshot parameter {key:?} is not known: snapshots of cluster storage have none");
        }
        let subvolume = match Address::of(source) {
            Some(Address::Subvolume(subvolume)) => subvolume,
            Some(Address::Path { .. }) => fail!(Precondition, "{source} is a plain directory: it has no snapshots"),
            None => fail!(NotFound, "the source volume {source} does not exist"),
        };
        let address = subvolume.snapshot(&snapshot_name(name));
        self.with(&subvolume, secrets, |group| {
            let info = match group.info(&subvolume.name)? {
                State::Present(info) => info,
                State::Copying => fail!(Precondition, "{source} is still being copied"),
                State::Absent | State::Retained | State::HalfMade => {
                    fail!(NotFound, "the source volume {source} does not exist")
                }
            };
            if info.size.is_none()
                && VolumeNotes::read(group, &subvolume.name)?.is_some_and(|notes| notes.shows.is_some())
            {
                fail!(Precondition, "{source} shows a snapshot already, and never changes: use that one");
            }
            let (volume, snapshot) = (&subvolume.name, &address.name);
            let found = group.snapshot(volume, snapshot)?;
            if found.is_none() {
                if let Some(other) = self.holder(group, snapshot)?.filter(|other| other != volume)
                    && group.snapshot(&other, snapshot)?.is_some()
                {
                    let other = group.subvolume(&other);
                    fail!(Conflict, "a snapshot of the name {} exists, but of volume {other}", name.as_str());
                }
                group.create_snapshot(volume, snapshot)?;
                self.hint(group, |hints| hints.insert(snapshot.clone(), volume.clone()));
            }
            let notes = match found {
                Some(_) => SnapshotNotes::read(group, volume, snapshot)?,
                None => None,
            };
            if notes.is_none() {
                let (name, size) = (name.as_str().to_owned(), info.size.unwrap_or_default());
                SnapshotNotes { name, size, path: info.path }.write(group, volume, snapshot)?;
            }
            match describe(group, &address)? {
                Some(snapshot) => Ok(snapshot),
                None => fail!(Internal, "the snapshot {snapshot} of {source} vanished while it was made"),
            }
        })
    }

    fn ensure_snapshot_absent(&self, id: &SnapshotId, secrets: &Secrets) -> Result<()> {
        let Some(address) = SnapshotAddress::of(id) else { return Ok(()) };
        let SnapshotAddress { subvolume, name } = &address;
        let Some(cluster) = self.cluster(&subvolume.cluster) else {
            fail!(
                Precondition,
                "{id} lies in cluster {}, which is not configured here: not deleted",
                subvolume.cluster
            );
        };
        let account = Account::of(secrets, cluster)?;
        let group = &self.group(cluster, &account, subvolume);
        check_not_shown(group, &address)?;
        match group.remove_snapshot(&subvolume.name, name) {
            Ok(()) => {}
            Err(refusal) if refusal.errno == Errno::NOENT => group.check_filesystem()?,
            Err(refusal) if refusal.errno == Errno::AGAIN => {
                fail!(Busy, "snapshot {id} is being copied into a volume: try again when that is complete")
            }
            Err(refusal) => return Err(refusal.into()),
        }
        self.hint(group, |hints| hints.remove(name));
        Ok(())
    }

    fn find_snapshot(&self, id: &SnapshotId, secrets: &Secrets) -> Result<Option<Snapshot>> {
        match SnapshotAddress::of(id) {
            Some(address) if self.cluster(&address.subvolume.cluster).is_some() => {
                self.with(&address.subvolume, secrets, |group| describe(group, &address))
            }
            _ => Ok(None),
        }
    }

    fn list_snapshots(
        &self,
        source: Option<&VolumeId>,
        page: &PageRequest,
        secrets: &Secrets,
    ) -> Result<Page<Snapshot>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let mut found = Page { entries: Vec::new(), next: None };
        let mut visit = |group: &Group<'_>, subvolume: &Subvolume| -> Result<bool> {
            for name in group.snapshots(&subvolume.name)? {
                let address = subvolume.snapshot(&name);
                let is_before = page.after.as_deref().is_some_and(|after| was_listed(&address, after));
                // What has too long a name somebody else made: CSI has no id for it.
                if is_before || address.is_of_a_copy() || address.id().is_err() {
                    continue;
                }
                if found.entries.len() == limit {
                    found.next = found.entries.last().map(|one: &Snapshot| one.id.as_str().to_owned());
                    return Ok(false);
                }
                found.entries.extend(describe(group, &address)?);
            }
            Ok(true)
        };
        let is_token = |token: &str| token.split_once('@').is_some_and(|(volume, _)| Address::parse(volume).is_some());
        match source.map(Address::of) {
            None => self.walk(page.after.as_deref(), is_token, visit)?,
            Some(Some(Address::Subvolume(subvolume))) if self.cluster(&subvolume.cluster).is_some() => {
                self.with(&subvolume, secrets, |group| visit(group, &subvolume).map(drop))?;
            }
            Some(_) => {}
        }
        Ok(found)
    }

    /// Who deletes the volume looks whether anybody shows its snapshots: nobody may begin to in between.
    fn needs_volume(&self, id: &SnapshotId) -> Option<VolumeId> {
        SnapshotAddress::of(id)?.subvolume.id().ok()
    }

    fn ensure_restored(&self, id: &VolumeId, spec: &Spec, source: &SnapshotId, secrets: &Secrets) -> Result<Volume> {
        let class = ClassParameters::parse(&spec.parameters)?;
        let Some(address) = SnapshotAddress::of(source) else {
            fail!(NotFound, "the source snapshot {source} does not exist");
        };
        let target = self.subvolume_for(&spec.name, &class)?;
        let is_read = spec.capabilities.iter().all(|capability| capability.mode.is_read_only());
        let is_near = (&target.cluster, &target.filesystem, &target.group)
            == (&address.subvolume.cluster, &address.subvolume.filesystem, &address.subvolume.group);
        if is_read && is_near && !class.copies_snapshots {
            let shown = self.with(&target, secrets, |group| self.ensure_shown(group, id, spec, &class, &address))?;
            if let Some(volume) = shown {
                return Ok(volume);
            }
        }
        self.ensure_copied_from_snapshot(id, spec, &class, &address, secrets)
    }
}

impl Cephfs {
    /// Makes a volume that shows the snapshot, or finds it. `None`: it has to be a copy.
    fn ensure_shown(
        &self,
        group: &Group<'_>,
        id: &VolumeId,
        spec: &Spec,
        class: &ClassParameters,
        source: &SnapshotAddress,
    ) -> Result<Option<Volume>> {
        let name = &self.subvolume_for(&spec.name, class)?.name;
        let content = ContentSource::Snapshot(source.id()?.as_str().to_owned());
        let (is_there, path) = match group.info(name)? {
            State::Copying => return Ok(None),
            State::Absent | State::Retained | State::HalfMade => (false, None),
            State::Present(info) => match VolumeNotes::read(group, name)? {
                Some(notes) if notes.source.as_ref() == Some(&content) && notes.shows.is_some() => {
                    let size = notes.shows.as_ref().map_or(0, |shown| shown.size);
                    if spec.capacity.is_some_and(|range| !range.allows(size)) {
                        fail!(Conflict, "{id} exists, but its size is {size} bytes");
                    }
                    return self.describe(group, id, size, &info.path, &notes).map(Some);
                }
                Some(notes) if notes.source.as_ref() == Some(&content) => return Ok(None),
                Some(notes) => fail!(Conflict, "{id} exists, but was made from {}", notes.origin()),
                None if info.is_copy => return Ok(None),
                None if info.size.is_some() => {
                    fail!(Conflict, "{id} exists, and is no view of a snapshot")
                }
                // It was interrupted.
                None => (true, Some(info.path)),
            },
        };
        if !is_there && !matches!(group.info(&source.subvolume.name)?, State::Present(_)) {
            return Ok(None);
        }
        let Some(view) = view(group, source)? else {
            fail!(NotFound, "the source snapshot {} does not exist", source.id()?)
        };
        if spec.capacity.is_some_and(|range| range.required() > view.size && view.size > 0) {
            fail!(OutOfRange, "a volume that shows a snapshot has the snapshot's size, {} bytes", view.size);
        }
        let notes = VolumeNotes { source: Some(content), shows: Some(view), ..VolumeNotes::of(spec) };
        // Before the volume: a volume that nobody looks for might lose its snapshot.
        group.set_snapshot_metadata(&source.subvolume.name, &source.name, &format!("{SHOWN_BY}{name}"), "true")?;
        if !is_there {
            group.create(name, &class.creation(None))?;
        }
        notes.write(group, name)?;
        let size = notes.shows.as_ref().map_or(0, |shown| shown.size);
        self.describe(group, id, size, path.as_deref().unwrap_or_default(), &notes).map(Some)
    }

    /// The subvolume of the group that has a snapshot of this name, as far as is known: Ceph may have lost it since.
    ///
    /// All are looked through once for each group. From then on every snapshot passes here.
    pub(super) fn holder(&self, group: &Group<'_>, snapshot: &str) -> Result<Option<String>> {
        let key = group.subvolume("").to_string();
        if !self.hints().contains_key(&key) {
            let mut hints = BTreeMap::new();
            for volume in group.list()? {
                hints.extend(group.snapshots(&volume)?.into_iter().map(|snapshot| (snapshot, volume.clone())));
            }
            self.hints().entry(key.clone()).or_default().extend(hints);
        }
        Ok(self.hints().get(&key).and_then(|hints| hints.get(snapshot).cloned()))
    }

    pub(super) fn hint<T>(&self, group: &Group<'_>, change: impl FnOnce(&mut BTreeMap<String, String>) -> T) {
        if let Some(hints) = self.hints().get_mut(&group.subvolume("").to_string()) {
            change(hints);
        }
    }
}

/// # Errors
/// `Precondition`, while a volume shows the snapshot.
pub(super) fn check_not_shown(group: &Group<'_>, snapshot: &SnapshotAddress) -> Result<()> {
    let SnapshotAddress { subvolume, name } = snapshot;
    for key in group.all_snapshot_metadata(&subvolume.name, name)?.keys() {
        let Some(volume) = key.strip_prefix(SHOWN_BY) else { continue };
        if let State::Present(_) = group.info(volume)?
            && let Some(shown) = VolumeNotes::read(group, volume)?.and_then(|notes| notes.shows)
            && (&shown.subvolume, &shown.snapshot) == (&subvolume.name, name)
        {
            let volume = group.subvolume(volume);
            fail!(Precondition, "snapshot {} is shown by volume {volume}: delete that first", snapshot.id()?);
        }
    }
    Ok(())
}

/// Where a snapshot's contents are. `None`: there is no such snapshot.
fn view(group: &Group<'_>, source: &SnapshotAddress) -> Result<Option<SnapshotView>> {
    let volume = &source.subvolume.name;
    if group.snapshot(volume, &source.name)?.is_none() {
        return Ok(None);
    }
    let (path, size) = match SnapshotNotes::read(group, volume, &source.name)? {
        Some(notes) => (notes.path, notes.size),
        // Somebody else took it: its volume has to be there.
        None => match group.info(volume)? {
            State::Present(info) => (info.path, info.size.unwrap_or_default()),
            _ => fail!(Precondition, "cannot tell where the snapshot {} lies: its volume is gone", source.id()?),
        },
    };
    let Some((folder, inner)) = path.rsplit_once('/') else { fail!(Internal, "{path:?} is no path of a volume") };
    Ok(Some(SnapshotView {
        subvolume: volume.clone(),
        snapshot: source.name.clone(),
        folder: folder.to_owned(),
        inner: format!(".snap/{}/{inner}", source.name),
        size,
    }))
}

/// `None`: there is no such snapshot.
fn describe(group: &Group<'_>, address: &SnapshotAddress) -> Result<Option<Snapshot>> {
    let SnapshotAddress { subvolume, name } = address;
    let Some((created, _)) = group.snapshot(&subvolume.name, name)? else { return Ok(None) };
    let notes = SnapshotNotes::read(group, &subvolume.name, name)?;
    Ok(Some(Snapshot {
        id: address.id()?,
        source: subvolume.id()?,
        size: notes.map_or(0, |notes| notes.size),
        created: parse_time(&created).unwrap_or(SystemTime::UNIX_EPOCH),
        ready: true,
        places: Vec::new(),
    }))
}

/// Was the snapshot on a page that ended with this token? Volumes come in the order of their ids, which is not that of
/// their snapshots' ids: `-` and `.` come before `@`.
fn was_listed(snapshot: &SnapshotAddress, token: &str) -> bool {
    let (volume, name) = token.split_once('@').unwrap_or((token, ""));
    (snapshot.subvolume.to_string().as_str(), snapshot.name.as_str()) <= (volume, name)
}

/// `2026-11-22 13:20:16.184757`, in UTC, as the manager writes it.
fn parse_time(text: &str) -> Option<SystemTime> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let mut date = date.splitn(3, '-').map(str::parse::<u64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let mut time = time.splitn(3, ':');
    let (hour, minute): (u64, u64) = (time.next()?.parse().ok()?, time.next()?.parse().ok()?);
    let second: f64 = time.next()?.parse().ok()?;
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March end with the day that may be missing.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    let whole = days * 86_400 + hour * 3_600 + minute * 60;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(whole) + Duration::try_from_secs_f64(second).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_leave_out_no_volume_whose_name_begins_as_another() {
        let mut tokens: Vec<String> = Vec::new();
        for (volume, snapshot) in [("data", "s"), ("data", "t"), ("data-2", "s"), ("data.old", "s"), ("data2", "s")] {
            let subvolume = Subvolume {
                cluster: "main".to_owned(),
                filesystem: "cephfs".to_owned(),
                group: "csi".to_owned(),
                name: volume.to_owned(),
            };
            let address = subvolume.snapshot(snapshot);
            assert!(tokens.iter().all(|token| !was_listed(&address, token)), "{volume}@{snapshot}");
            tokens.push(address.id().unwrap().as_str().to_owned());
            assert!(was_listed(&address, tokens.last().unwrap()));
        }
    }

    #[test]
    fn the_managers_times_are_read() {
        let seconds =
            |text| parse_time(text).map(|time| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs());
        assert_eq!(seconds("1970-01-01 00:00:00.0"), Some(0));
        assert_eq!(seconds("2000-02-29 12:00:01"), Some(951_825_601));
        assert_eq!(seconds("2026-11-22 13:20:16.184757"), Some(1_795_353_616));
        assert_eq!(seconds("yesterday"), None);
    }
}
