//! Local volumes at places on this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use super::device::Device;
use super::{Found, Located, Nvme, Shown, Sort, checkpoint, directory, logical};
use crate::backend::{Ephemeral, Node, NodeGrowth, NodeHealth, STAGED_DEVICE, Stage, Stats};
use crate::error::{Context, Result};
use crate::host::filesystem::Kind;
use crate::host::loops::LoopDevice;
use crate::host::mounts::Place;
use crate::host::{crypt, files, filesystem, loops, mounts, paths, quota};
use crate::secrets::Secrets;
use crate::volume::{
    CapacityRange, Health, HealthProblem, MountPath, StorageHealth, StorageProblem, Topology, Usage, VolumeId,
};

/// Sizes are multiples of this.
const STEP: u64 = 4096;

impl Node for Nvme {
    fn ensure_staged(&self, stage: &Stage, secrets: &Secrets) -> Result<()> {
        match self.find_volume(stage.id.as_str())? {
            Some(found) => self.stage(found, stage, secrets),
            None => fail!(NotFound, "volume {} does not exist on this node", stage.id),
        }
    }

    fn ensure_unstaged(&self, id: &VolumeId, path: &MountPath) -> Result<()> {
        let file = path.join(STAGED_DEVICE);
        // What is there is asked before it is taken away: an image that vanished can't be found by its name any more.
        let mut shown = None;
        for place in [path.as_path(), file.as_path()] {
            while let Some((_, there)) = self.volume_at_path(place)?.filter(|(there, _)| there == id) {
                mounts::unmount_top(place)?;
                if let Some(Device::Loop(device)) = there.device() {
                    shown = Some(device);
                }
            }
        }
        // The file that the device was bound on; not another volume's device, nor a mounted file system's own file.
        if !mounts::is_mount(path.as_path())? && !mounts::is_mount(file.as_path())? {
            paths::remove_empty(file.as_path())?;
        }
        // A block volume's device stays attached until now, and so does what a crash left.
        if self.release_logical(id)? {
            return Ok(());
        }
        let detached = match self.locate(Sort::Volume, id.as_str()) {
            Ok(Some(located)) => loops::find(&located.image()).and_then(|device| self.detach_unused(device.or(shown))),
            Ok(None) => self.detach_unused(shown),
            Err(error) => self.detach_unused(shown).and(Err(error)),
        };
        // It is gone from the path, which is what was asked for.
        if let Err(error) = detached {
            tracing::warn!(volume.id = %id, %error, "cannot tell whether its device is still attached");
        }
        Ok(())
    }

    fn published(self: Arc<Self>, id: &VolumeId, target: &MountPath) -> Result<()> {
        self.ensure_limited(self.own_id(id)?.as_str(), target.as_path())
    }

    fn is_at(&self, id: &VolumeId, path: &Path) -> Result<bool> {
        Ok(self.volume_at_path(path)?.is_some_and(|(there, _)| self.answers_to(&there, id)))
    }

    fn read_only_device(&self, staged: &Path) -> Result<PathBuf> {
        match self.volume_at_path(staged)? {
            Some((_, Shown::Device(device))) => Ok(loops::ensure_read_only_view(device.path())?.path),
            Some((id, Shown::Directory)) => fail!(Precondition, "{id} is a directory: it has no device"),
            None => fail!(Precondition, "no volume of this driver is staged at {}", staged.display()),
        }
    }

    fn shown_at(&self, staged: &Path) -> Result<Vec<PathBuf>> {
        let mut places = mounts::binds_of(staged)?;
        if let Some((_, Shown::Device(device))) = self.volume_at_path(staged)?
            && let Some(view) = loops::read_only_view(device.path())?
        {
            places.extend(mounts::users_of_device(&view.path)?);
        }
        Ok(places)
    }

    fn release(&self, id: &VolumeId) -> Result<()> {
        match self.find_volume(self.own_id(id)?.as_str())?.map(|found| found.device()).transpose()?.flatten() {
            Some(device) => self.release_view(device.path()),
            None => Ok(()),
        }
    }

    fn topology(&self) -> Option<Topology> {
        Some(self.topology.clone())
    }
    fn stats(&self) -> Option<&dyn Stats> {
        Some(self)
    }
    fn growth(&self) -> Option<&dyn NodeGrowth> {
        Some(self)
    }
    fn health(&self) -> Option<&dyn NodeHealth> {
        Some(self)
    }
    fn ephemeral(&self) -> Option<&dyn Ephemeral> {
        Some(self)
    }
}

impl Nvme {
    /// Detaches the device's read-only view, unless somebody is shown it.
    pub(super) fn release_view(&self, device: &Path) -> Result<()> {
        match loops::read_only_view(device)? {
            Some(view) if mounts::users_of_device(&view.path)?.is_empty() => view.detach_now().map(drop),
            _ => Ok(()),
        }
    }

    /// Takes away what lies on a logical volume: a read-only view, and what encrypts it. LVM is not asked. `false`: there is no
    /// such volume that is active.
    ///
    /// # Errors
    /// When the mapping can't be taken away: as long as it is there, the volume can be read.
    fn release_logical(&self, id: &VolumeId) -> Result<bool> {
        let mut found = false;
        for group in self.pools.groups() {
            let Some(below) = group.device(id.as_str())? else { continue };
            found = true;
            let mapping = logical::mapping_of(id.as_str())?;
            let shown = mapping.as_ref().unwrap_or(&below).path();
            self.release_view(&shown)?;
            if let Some(mapping) = mapping
                && mounts::users_of_device(&shown)?.is_empty()
            {
                crypt::close(&mapping.name, self.command_deadline)?;
            }
        }
        Ok(found)
    }

    /// Detaches an image's device, unless somebody is shown it.
    fn detach_unused(&self, device: Option<LoopDevice>) -> Result<()> {
        let Some(device) = device else { return Ok(()) };
        self.release_view(&device.path)?;
        if mounts::users_of_device(&device.path)?.is_empty() { device.detach() } else { Ok(()) }
    }
}

impl Stats for Nvme {
    fn usage(&self, id: &VolumeId, path: &Path) -> Result<Option<Usage>> {
        let Some((own, shown)) = self.volume_at_path(path)?.filter(|(there, _)| self.answers_to(there, id)) else {
            return Ok(None);
        };
        let Shown::Device(device) = shown else { return self.directory_usage(&own).map(Some) };
        if mounts::is_device(path)? {
            return Ok(Some(Usage::Block { total: filesystem::device_size(device.path())? }));
        }
        let [bytes, inodes] = filesystem::usage(path)?;
        Ok(Some(Usage::Mount { bytes, inodes }))
    }
}

impl Nvme {
    /// By its quota, whatever its owner has made of its project id.
    fn directory_usage(&self, own: &VolumeId) -> Result<Usage> {
        let Some(Found::Folder(located)) = self.find_volume(own.as_str())? else {
            fail!(NotFound, "{own} has just been deleted")
        };
        let Contents::Directory { project } = VolumeDescriptor::read(&located.folder)?.contents else {
            fail!(Internal, "{own} is mounted as a directory, and its descriptor says that it is none");
        };
        let root = located.pool.root()?;
        let usage = quota::usage(&root, project)?;
        let [[_, _, free], [_, _, free_inodes]] = filesystem::usage(&located.folder)?;
        let available = |limit: u64, used: u64, free: u64| free.min(limit.saturating_sub(used));
        Ok(Usage::Mount {
            bytes: [usage.limit, usage.bytes, available(usage.limit, usage.bytes, free)],
            inodes: [usage.inode_limit, usage.inodes, available(usage.inode_limit, usage.inodes, free_inodes)],
        })
    }
}

impl NodeGrowth for Nvme {
    fn ensure_size(
        &self,
        id: &VolumeId,
        path: &Path,
        range: Option<CapacityRange>,
        secrets: &Secrets,
    ) -> Result<Option<u64>> {
        let Some(mut found) = self.find_volume(id.as_str())? else { return Ok(None) };
        // A block volume's staging path is the directory that its device lies in.
        let device_file = path.join(STAGED_DEVICE);
        let (place, shown) = match (self.volume_at_path(path)?, self.volume_at_path(&device_file)?) {
            (Some((there, shown)), _) if there == *id => (path, shown),
            (_, Some((there, shown))) if there == *id => (device_file.as_path(), shown),
            _ => return Ok(None),
        };
        let mut descriptor = found.descriptor()?;
        let step = match &found {
            Found::Folder(_) => STEP,
            Found::Logical(logical) => logical.group.step()?,
        };
        let wanted = range.map_or(Ok(descriptor.size), |range| range.choose(descriptor.size, 0, step))?;
        if range.and_then(CapacityRange::limit).is_some_and(|limit| limit < descriptor.size) {
            fail!(OutOfRange, "{id} has {} bytes already, and volumes never shrink", descriptor.size);
        }
        let mounted = match descriptor.contents {
            Contents::Filesystem(kind) if !mounts::is_device(place)? => Some(kind),
            _ => None,
        };
        if let Some(kind) = mounted.filter(|_| wanted > descriptor.size) {
            kind.check_growth()?;
        }
        match &mut found {
            Found::Folder(located) => grow_folder(located, &mut descriptor, wanted)?,
            Found::Logical(logical) => logical.grow(&mut descriptor, wanted, self.command_deadline, secrets)?,
        }
        let Shown::Device(device) = shown else { return Ok(Some(descriptor.size)) };
        device.refresh_size()?;
        if let Some(view) = loops::read_only_view(device.path())? {
            view.refresh_size()?;
        }
        if let Some(kind) = mounted {
            kind.grow(device.path(), place)?;
            // Also when it had grown already: the call before may have died in between.
            if kind == Kind::Xfs {
                self.with_backing(found, secrets, |backing| checkpoint::write(backing, place))?;
            }
        }
        Ok(Some(descriptor.size))
    }
}

/// Makes a directory's limit or an image bigger. The limit also when it had grown already: the call before may have died
/// in between.
fn grow_folder(located: &Located<'_>, descriptor: &mut VolumeDescriptor, wanted: u64) -> Result<()> {
    let present = descriptor.size;
    let contents = descriptor.contents;
    if wanted > present {
        let id = descriptor.id.clone();
        located.pool.open()?.grow(&id, wanted, || {
            if !matches!(contents, Contents::Directory { .. }) {
                let image = located.image();
                let what = || format!("cannot grow {}", image.display());
                let file = located.open_image()?;
                files::resize(&file, wanted, !located.pool.is_thin()).context(what)?;
            }
            descriptor.size = wanted;
            descriptor.write(&located.folder)
        })?;
    }
    match contents {
        Contents::Directory { project } => directory::limit(&located.pool.root()?, project, descriptor.size),
        _ => Ok(()),
    }
}

impl NodeHealth for Nvme {
    fn volume(&self, id: &VolumeId, path: Option<&Path>) -> Result<Option<Vec<HealthProblem>>> {
        let Some(found) = self.find_volume(self.own_id(id)?.as_str())? else { return Ok(None) };
        let mut problems = self.problems(&found);
        if let Some(path) = path
            && let Some(place) = Place::at(path)?.filter(Place::is_mount)
            && let Some((there, shown)) = self.volume_at(&place)?
            && self.answers_to(&there, id)
        {
            if let Shown::Device(device) = shown
                && let errors @ 1.. = filesystem::recorded_errors(device.path())
            {
                let message = format!("the file system on {} has recorded {errors} errors", device.path().display());
                problems.push(HealthProblem { status: Health::Degraded, reason: "FileSystemErrors", message });
            }
            // XFS shuts down after an error in its metadata.
            if let Err(error) = filesystem::usage(path) {
                let message = error.to_string();
                problems.push(HealthProblem { status: Health::Inaccessible, reason: "FileSystemStopped", message });
            }
        }
        Ok(Some(problems))
    }

    fn storage(&self, _: &Secrets) -> Result<Vec<StorageProblem>> {
        let mut problems: Vec<StorageProblem> = Vec::new();
        for trouble in self.troubles() {
            let status = match trouble.reason {
                "PoolMissing" | "PoolStopped" => StorageHealth::Unreachable,
                _ => StorageHealth::Degraded,
            };
            // CSI allows each reason once.
            match problems.iter_mut().find(|problem| problem.reason == trouble.reason) {
                Some(problem) => problem.message = format!("{}; {}", problem.message, trouble.message),
                None => problems.push(StorageProblem { status, reason: trouble.reason, message: trouble.message }),
            }
        }
        Ok(problems)
    }
}
