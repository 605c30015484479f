//! Local volumes at places on this machine.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use super::pool::{Pool, Trouble};
use super::{Nvme, Sort};
use crate::backend::{Ephemeral, Node, NodeGrowth, NodeHealth, STAGED_DEVICE, Stage, Stats};
use crate::error::{Context, Result};
use crate::host::filesystem::Kind;
use crate::host::loops::LoopDevice;
use crate::host::mounts::Place;
use crate::host::{files, filesystem, loops, mounts, paths};
use crate::secrets::Secrets;
use crate::volume::{
    CapacityRange, Health, HealthProblem, MountPath, StorageHealth, StorageProblem, Topology, Usage, VolumeId,
};

/// Sizes are multiples of this.
const STEP: u64 = 4096;

impl Node for Nvme {
    fn ensure_staged(&self, stage: &Stage, _: &Secrets) -> Result<()> {
        match self.locate(Sort::Volume, stage.id.as_str())? {
            Some(located) => self.stage(&located, stage),
            None => fail!(NotFound, "volume {} does not exist on this node", stage.id),
        }
    }

    fn ensure_unstaged(&self, id: &VolumeId, path: &MountPath) -> Result<()> {
        let file = path.join(STAGED_DEVICE);
        // What is there is asked before it is taken away: an image that vanished can't be found by its name any more.
        let mut shown = None;
        for place in [path.as_path(), file.as_path()] {
            while let Some((_, device)) = self.volume_at_path(place)?.filter(|(there, _)| there == id) {
                mounts::unmount_top(place)?;
                shown = Some(device);
            }
        }
        // The file that the device was bound on; not another volume's device, nor a mounted file system's own file.
        if !mounts::is_mount(path.as_path())? && !mounts::is_mount(file.as_path())? {
            paths::remove_empty(file.as_path())?;
        }
        // A block volume's device stays attached until now, and so does what a crash left.
        let attached = self.locate_volume(id).and_then(|located| match located {
            Some(located) => loops::find(&located.image()),
            None => Ok(None),
        });
        match attached.map(|found| found.or(shown)) {
            Ok(Some(device)) => {
                self.release_view(&device)?;
                if mounts::users_of_device(&device.path)?.is_empty() { device.detach() } else { Ok(()) }
            }
            Ok(None) => Ok(()),
            // It is gone from the path, which is what was asked for.
            Err(error) => {
                tracing::warn!(volume.id = %id, %error, "cannot tell whether its device is still attached");
                Ok(())
            }
        }
    }

    fn is_at(&self, id: &VolumeId, path: &Path) -> Result<bool> {
        Ok(self.volume_at_path(path)?.is_some_and(|(there, _)| self.answers_to(&there, id)))
    }

    fn read_only_device(&self, staged: &Path) -> Result<PathBuf> {
        match self.volume_at_path(staged)? {
            Some((_, device)) => Ok(device.ensure_read_only_view()?.path),
            None => fail!(Precondition, "no volume of this driver is staged at {}", staged.display()),
        }
    }

    fn shown_at(&self, staged: &Path) -> Result<Vec<PathBuf>> {
        let mut places = mounts::binds_of(staged)?;
        if let Some((_, device)) = self.volume_at_path(staged)?
            && let Some(view) = device.read_only_view()?
        {
            places.extend(mounts::users_of_device(&view.path)?);
        }
        Ok(places)
    }

    fn release(&self, id: &VolumeId) -> Result<()> {
        match self.locate_volume(id)?.map(|located| loops::find(&located.image())).transpose()?.flatten() {
            Some(device) => self.release_view(&device),
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
    pub(super) fn release_view(&self, device: &LoopDevice) -> Result<()> {
        match device.read_only_view()? {
            Some(view) if mounts::users_of_device(&view.path)?.is_empty() => view.detach_now().map(drop),
            _ => Ok(()),
        }
    }
}

impl Stats for Nvme {
    fn usage(&self, id: &VolumeId, path: &Path) -> Result<Option<Usage>> {
        let Some((_, device)) = self.volume_at_path(path)?.filter(|(there, _)| self.answers_to(there, id)) else {
            return Ok(None);
        };
        if mounts::is_device(path)? {
            return Ok(Some(Usage::Block { total: device.size()? }));
        }
        let [bytes, inodes] = filesystem::usage(path)?;
        Ok(Some(Usage::Mount { bytes, inodes }))
    }
}

impl NodeGrowth for Nvme {
    fn ensure_size(
        &self,
        id: &VolumeId,
        path: &Path,
        range: Option<CapacityRange>,
        _: &Secrets,
    ) -> Result<Option<u64>> {
        let Some(located) = self.locate(Sort::Volume, id.as_str())? else { return Ok(None) };
        // A block volume's staging path is the directory that its device lies in.
        let device_file = path.join(STAGED_DEVICE);
        let (place, device) = match (self.volume_at_path(path)?, self.volume_at_path(&device_file)?) {
            (Some((there, device)), _) if there == *id => (path, device),
            (_, Some((there, device))) if there == *id => (device_file.as_path(), device),
            _ => return Ok(None),
        };
        let mut descriptor = VolumeDescriptor::read(&located.folder)?;
        let wanted = range.map_or(Ok(descriptor.size), |range| range.choose(descriptor.size, 0, STEP))?;
        if range.and_then(CapacityRange::limit).is_some_and(|limit| limit < descriptor.size) {
            fail!(OutOfRange, "{id} has {} bytes already, and volumes never shrink", descriptor.size);
        }
        if wanted > descriptor.size {
            if let Contents::Filesystem(kind) = descriptor.contents
                && !mounts::is_device(place)?
            {
                kind.check_growth()?;
            }
            let image = located.image();
            located.pool.open()?.grow(id.as_str(), wanted, || {
                let what = || format!("cannot grow {}", image.display());
                let file = OpenOptions::new().read(true).write(true).open(&image).context(what)?;
                files::resize(&file, wanted, !located.pool.is_thin()).context(what)?;
                descriptor.size = wanted;
                descriptor.write(&located.folder)
            })?;
        }
        device.refresh_size()?;
        if let Some(view) = device.read_only_view()? {
            view.refresh_size()?;
        }
        if let Contents::Filesystem(kind) = descriptor.contents
            && !mounts::is_device(place)?
        {
            kind.grow(&device.path, place)?;
            // Also when it had grown already: the call before may have died in between.
            if kind == Kind::Xfs {
                self.checkpoint(&located, place)?;
            }
        }
        Ok(Some(descriptor.size))
    }
}

impl NodeHealth for Nvme {
    fn volume(&self, id: &VolumeId, path: Option<&Path>) -> Result<Option<Vec<HealthProblem>>> {
        let Some(located) = self.locate_volume(&self.own_id(id)?)? else { return Ok(None) };
        let mut problems = self.problems(&located);
        if let Some(path) = path
            && let Some(place) = Place::at(path)?.filter(Place::is_mount)
            && let Some((there, device)) = self.volume_at(&place)?
            && self.answers_to(&there, id)
        {
            let errors = filesystem::recorded_errors(&device.path);
            if errors > 0 {
                let message = format!("the file system on {} has recorded {errors} errors", device.path.display());
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
        let full =
            |pool: &Pool| Trouble { reason: "PoolFull", message: format!("pool {} has no room left", pool.name()) };
        let trouble = |pool: &Pool| pool.state().err().or_else(|| pool.is_full().then(|| full(pool)));
        for trouble in self.pools.iter().filter_map(trouble) {
            let status = match trouble.reason {
                "PoolMissing" => StorageHealth::Unreachable,
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
