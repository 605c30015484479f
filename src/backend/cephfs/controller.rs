//! Cluster storage as things: made, found, listed, grown, changed, deleted.

use super::control::Account;
use super::group::{Group, Info, State};
use super::names::{Address, Subvolume};
use super::notes::VolumeNotes;
use super::parameters::{ClassParameters, MutableParameters, Pin, STEP, check_capability};
use super::snapshots::check_not_shown;
use super::{COPY_PATIENCE, Cephfs};
use crate::backend::{Cloning, Controller, Growth, Listing, Modification, Snapshots, VolumeHealth};
use crate::error::{ErrorKind, Result};
use crate::host::Errno;
use crate::secrets::Secrets;
use crate::volume::{Capability, CapacityRange, Name, Parameters, Spec, Volume, VolumeId, format_bytes};

/// The size of a volume whose request names none.
const DEFAULT_SIZE: u64 = 1 << 30;

impl Controller for Cephfs {
    fn volume_id(&self, name: &Name, parameters: &Parameters) -> Result<VolumeId> {
        self.subvolume_for(name, &ClassParameters::parse(parameters)?)?.id()
    }

    fn check(&self, capabilities: &[Capability], parameters: &Parameters, mutable: &Parameters) -> Result<()> {
        capabilities.iter().try_for_each(check_capability)?;
        ClassParameters::parse(parameters)?;
        MutableParameters::parse(mutable).map(drop)
    }

    fn ensure_volume(&self, id: &VolumeId, spec: &Spec, secrets: &Secrets) -> Result<Volume> {
        let class = ClassParameters::parse(&spec.parameters)?;
        let cluster = self.cluster_of(class.cluster.as_deref())?;
        let account = Account::of(secrets, cluster)?;
        let subvolume = self.subvolume_for(&spec.name, &class)?;
        let group = self.group(cluster, &account, &subvolume);
        let name = &subvolume.name;
        let (size, path) = match group.info(name)? {
            State::Copying => fail!(Conflict, "{id} exists, and is being made from a source"),
            State::Absent | State::Retained | State::HalfMade => {
                let size = choose_size(spec, DEFAULT_SIZE)?;
                group.create(name, &class.creation(Some(size)))?;
                self.finish(&group, id, name, spec, &class).inspect_err(|error| {
                    // Nobody has to ask again after this, nor delete: nothing may stay.
                    if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Denied) {
                        let _ = group.remove(name);
                    }
                })?;
                (size, group.path(name)?)
            }
            State::Present(info) => {
                let is_finished = self.is_settled(id) || self.find_notes(&group, id, name, &info)?;
                match info.size {
                    // It was interrupted before it got its size.
                    None if !is_finished => {}
                    size => compare(id, size.unwrap_or(u64::MAX), &info, spec, &class)?,
                }
                let size = info.size.map_or_else(|| choose_size(spec, DEFAULT_SIZE), Ok)?;
                if !is_finished {
                    // Not handed out yet: what the class wants is set again.
                    group.create(name, &class.creation(Some(size)))?;
                    self.finish(&group, id, name, spec, &class)?;
                }
                (size, info.path)
            }
        };
        self.describe(&group, id, size, &path, &VolumeNotes::of(spec))
    }

    fn ensure_absent(&self, id: &VolumeId, secrets: &Secrets) -> Result<()> {
        let subvolume = match Address::of(id) {
            None => return Ok(()),
            Some(Address::Path { .. }) => {
                fail!(
                    Precondition,
                    "{id} is a directory that Berth did not make: not deleted. Keep the volume with reclaimPolicy Retain"
                )
            }
            Some(Address::Subvolume(subvolume)) => subvolume,
        };
        let Some(cluster) = self.cluster(&subvolume.cluster) else {
            fail!(
                Precondition,
                "{id} lies in cluster {}, which is not configured here: not deleted",
                subvolume.cluster
            );
        };
        let account = Account::of(secrets, cluster)?;
        let group = self.group(cluster, &account, &subvolume);
        self.unsettle(id);
        self.delete(&group, &subvolume)
    }

    fn find(&self, id: &VolumeId, secrets: &Secrets) -> Result<Option<Volume>> {
        match Address::of(id) {
            None => Ok(None),
            Some(address) if self.cluster(address.cluster()).is_none() => Ok(None),
            // Only the node can look at it.
            Some(Address::Path { cluster, filesystem, path }) => {
                let context = [("cluster", cluster), ("filesystem", filesystem), ("path", path)];
                let context = context.map(|(key, value)| (key.to_owned(), value)).into();
                Ok(Some(Volume { id: id.clone(), size: 0, context, source: None, places: Vec::new() }))
            }
            Some(Address::Subvolume(subvolume)) => self.with(&subvolume, secrets, |group| {
                let State::Present(info) = group.info(&subvolume.name)? else { return Ok(None) };
                self.found(group, id, &subvolume.name, &info).map(Some)
            }),
        }
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
    fn cloning(&self) -> Option<&dyn Cloning> {
        Some(self)
    }
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
}

impl VolumeNotes {
    pub(super) fn of(spec: &Spec) -> Self {
        Self {
            name: spec.name.as_str().to_owned(),
            owner: spec.owner.clone(),
            parameters: spec.parameters.clone(),
            ..Self::default()
        }
    }
}

impl Cephfs {
    /// Calls that list bring no secrets.
    fn can_list(&self) -> bool {
        !self.clusters.is_empty() && self.clusters.iter().all(|cluster| cluster.account.is_some())
    }

    pub(super) fn subvolume_for(&self, name: &Name, class: &ClassParameters) -> Result<Subvolume> {
        let cluster = self.cluster_of(class.cluster.as_deref())?;
        let or = |given: &Option<String>, usual: &[String]| given.clone().or_else(|| usual.first().cloned());
        let filesystem = or(&class.filesystem, &cluster.filesystems).unwrap_or_default();
        let group = or(&class.group, &cluster.groups).unwrap_or_default();
        Ok(Subvolume::named(&cluster.name, &filesystem, &group, name))
    }

    /// Does something with the group of a subvolume whose cluster is configured.
    pub(super) fn with<T>(
        &self,
        subvolume: &Subvolume,
        secrets: &Secrets,
        work: impl FnOnce(&Group<'_>) -> Result<T>,
    ) -> Result<T> {
        let Some(cluster) = self.cluster(&subvolume.cluster) else {
            fail!(NotFound, "cluster {} is not configured here", subvolume.cluster);
        };
        let account = Account::of(secrets, cluster)?;
        work(&self.group(cluster, &account, subvolume))
    }

    /// What makes a volume complete. The notes come last: with them it is known to be.
    fn finish(&self, group: &Group<'_>, id: &VolumeId, name: &str, spec: &Spec, class: &ClassParameters) -> Result<()> {
        ensure_pinned(group, name, spec, class)?;
        VolumeNotes::of(spec).write(group, name)?;
        self.settle(id);
        Ok(())
    }

    /// Does the volume have its notes, and do they say that it is an ordinary one?
    fn find_notes(&self, group: &Group<'_>, id: &VolumeId, name: &str, info: &Info) -> Result<bool> {
        if info.is_copy {
            fail!(Conflict, "{id} exists, but was made from a source");
        }
        match VolumeNotes::read(group, name)? {
            None => Ok(false),
            Some(VolumeNotes { source: Some(source), .. }) => {
                fail!(Conflict, "{id} exists, but was made from {source}")
            }
            Some(_) => {
                self.settle(id);
                Ok(true)
            }
        }
    }

    /// A volume that was found, with what its notes tell.
    pub(super) fn found(&self, group: &Group<'_>, id: &VolumeId, name: &str, info: &Info) -> Result<Volume> {
        let notes = VolumeNotes::read(group, name)?.unwrap_or_default();
        let size = notes.shows.as_ref().map_or(info.size.unwrap_or_default(), |shown| shown.size);
        self.describe(group, id, size, &info.path, &notes)
    }

    /// What the node needs, and what people want to know.
    pub(super) fn describe(
        &self,
        group: &Group<'_>,
        id: &VolumeId,
        size: u64,
        path: &str,
        notes: &VolumeNotes,
    ) -> Result<Volume> {
        let session = group.session()?;
        let (path, inner) = match &notes.shows {
            Some(shown) => (shown.folder.as_str(), shown.inner.as_str()),
            None => (path, ""),
        };
        let owner = &notes.owner;
        let known = [
            ("cluster", group.cluster.name.as_str()),
            ("filesystem", &group.filesystem),
            ("fsid", session.fsid()),
            ("monitors", &session.monitors),
            ("path", path),
            ("snapshotPath", inner),
            ("name", &notes.name),
            ("claim", &owner.claim),
            ("namespace", &owner.namespace),
        ];
        let known = known.into_iter().filter(|(_, value)| !value.is_empty());
        Ok(Volume {
            id: id.clone(),
            size,
            context: known.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            source: notes.source.clone(),
            places: Vec::new(),
        })
    }

    fn delete(&self, group: &Group<'_>, subvolume: &Subvolume) -> Result<()> {
        let name = &subvolume.name;
        match group.info(name)? {
            // A copy that was interrupted before it began has left its snapshot.
            State::Absent | State::Retained => {
                // A file system that is not there, or was renamed, is no proof.
                group.check_filesystem()?;
                return self.forget_copy(group, subvolume);
            }
            State::Copying => return self.delete_copying(group, subvolume, COPY_PATIENCE),
            State::HalfMade if subvolume.is_ours() => {}
            State::HalfMade => fail!(Precondition, "{subvolume} is damaged, and was not made by Berth: not deleted"),
            State::Present(info) => {
                if !subvolume.is_ours() && !VolumeNotes::read(group, name)?.is_some_and(|notes| notes.adopted) {
                    fail!(
                        Precondition,
                        "{subvolume} was not made by Berth: not deleted. Keep the volume with reclaimPolicy Retain, or give it to Berth: docs/cephfs.md says how"
                    );
                }
                if info.is_copy && VolumeNotes::read(group, name)?.is_none() {
                    self.forget_copy(group, subvolume)?;
                }
            }
        }
        let removed = match group.remove(name) {
            Err(refusal) if refusal.errno == Errno::NOTEMPTY => {
                for snapshot in group.snapshots(name)? {
                    check_not_shown(group, &subvolume.snapshot(&snapshot))?;
                }
                group.remove_retaining_snapshots(name)
            }
            removed => removed,
        };
        match removed {
            Err(refusal) if refusal.errno != Errno::NOENT => Err(refusal.into()),
            _ => Ok(()),
        }
    }
}

impl Growth for Cephfs {
    fn ensure_size(&self, id: &VolumeId, range: CapacityRange, secrets: &Secrets) -> Result<(u64, bool)> {
        self.change(id, secrets, |group, name, info| {
            let Some(size) = info.size else {
                fail!(Precondition, "{id} has no quota: it can already grow as far as the file system")
            };
            if range.limit().is_some_and(|limit| limit < size) {
                fail!(OutOfRange, "{id} has {} already, and volumes never shrink", format_bytes(size));
            }
            let wanted = range.choose(size, 0, STEP)?;
            if wanted > size {
                group.resize(name, wanted)?;
            }
            // The kernel and the clients learn a new quota by themselves.
            Ok((wanted.max(size), false))
        })
    }
}

impl Modification for Cephfs {
    fn ensure_modified(&self, id: &VolumeId, mutable: &Parameters, secrets: &Secrets) -> Result<()> {
        let wanted = MutableParameters::parse(mutable)?;
        self.change(id, secrets, |group, name, info| {
            if let Some(quota) = wanted.quota {
                if info.size.is_some_and(|size| quota < size) {
                    let size = format_bytes(info.size.unwrap_or_default());
                    fail!(Invalid, "{id} has {size} already, and volumes never shrink: write a larger quota");
                }
                if info.size != Some(quota) {
                    group.resize(name, quota)?;
                }
            }
            wanted.pin.as_ref().map_or(Ok(()), |pin| set_pin(group, name, pin))
        })
    }
}

impl Cephfs {
    /// Changes a volume that is there and can be written.
    fn change<T>(
        &self,
        id: &VolumeId,
        secrets: &Secrets,
        change: impl FnOnce(&Group<'_>, &str, &Info) -> Result<T>,
    ) -> Result<T> {
        let subvolume = match Address::of(id) {
            Some(Address::Subvolume(subvolume)) => subvolume,
            Some(Address::Path { .. }) => fail!(Precondition, "{id} is a directory without a quota of its own"),
            None => fail!(NotFound, "{id} does not exist"),
        };
        self.with(&subvolume, secrets, |group| {
            let State::Present(info) = group.info(&subvolume.name)? else { fail!(NotFound, "{id} does not exist") };
            // One without a quota may show a snapshot.
            if info.size.is_none()
                && VolumeNotes::read(group, &subvolume.name)?.is_some_and(|notes| notes.shows.is_some())
            {
                fail!(Precondition, "{id} shows a snapshot and can't be changed");
            }
            change(group, &subvolume.name, &info)
        })
    }
}

fn set_pin(group: &Group<'_>, name: &str, pin: &Pin) -> Result<()> {
    group.pin(name, pin.kind, &pin.setting)
}

/// What a new volume's VolumeAttributesClass wants, or else its class.
pub(super) fn ensure_pinned(group: &Group<'_>, name: &str, spec: &Spec, class: &ClassParameters) -> Result<()> {
    let mutable = MutableParameters::parse(&spec.mutable)?;
    mutable.pin.as_ref().or(class.pin.as_ref()).map_or(Ok(()), |pin| set_pin(group, name, pin))
}

/// The size of a new volume: as asked for, and at least the quota of its VolumeAttributesClass.
pub(super) fn choose_size(spec: &Spec, default: u64) -> Result<u64> {
    let size = spec.capacity.map_or(Ok(default), |range| range.choose(default, STEP, STEP))?;
    let quota = MutableParameters::parse(&spec.mutable)?.quota.unwrap_or_default();
    if quota > size && spec.capacity.is_some_and(|range| !range.allows(quota)) {
        fail!(OutOfRange, "the quota {} of the VolumeAttributesClass is above the limit", format_bytes(quota));
    }
    Ok(size.max(quota))
}

/// Is the volume that exists the one that is asked for? Its users may have changed owner and mode since.
pub(super) fn compare(id: &VolumeId, size: u64, info: &Info, spec: &Spec, class: &ClassParameters) -> Result<()> {
    let difference = if spec.capacity.is_some_and(|range| !range.allows(size)) {
        format!("its size is {size} bytes")
    } else if class.data_pool.as_ref().is_some_and(|pool| *pool != info.data_pool) {
        format!("its data pool is {}", info.data_pool)
    } else if class.is_isolated == info.namespace.is_empty() {
        format!("its namespace is {:?}", info.namespace)
    } else {
        return Ok(());
    };
    fail!(Conflict, "volume {id} of the name {} exists, but {difference}", spec.name.as_str())
}
