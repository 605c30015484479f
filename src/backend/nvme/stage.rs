//! Putting a volume at a path: attach, make the file system once, mount.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use super::parameters::mount_options;
use super::{Located, Nvme};
use crate::backend::{STAGED_DEVICE, Stage};
use crate::error::{Context, Result};
use crate::host::filesystem::{self, Kind, MountOptions};
use crate::host::loops::{self, LoopDevice};
use crate::host::mounts::{self, Place};
use crate::host::{files, paths};
use crate::volume::{Access, MountPath, VolumeId};

impl Nvme {
    /// Stages a volume that exists. What is already so is compared; what an earlier, interrupted call left is used.
    pub(super) fn stage(&self, located: &Located<'_>, stage: &Stage) -> Result<()> {
        let descriptor = VolumeDescriptor::read(&located.folder)?;
        if located.image().symlink_metadata().is_err() {
            fail!(Internal, "the image of {} is gone: its data is lost", stage.id);
        }
        match &stage.capability.access {
            Access::Block => self.stage_block(located, &descriptor, &stage.path),
            Access::Mount { filesystem, flags, .. } => {
                let kind = filesystem_of(&descriptor, filesystem)?;
                let options = mount_options(kind, flags, stage.capability.mode.is_read_only())?;
                self.stage_mount(located, descriptor, kind, &options, &stage.path)
            }
        }
    }

    fn stage_mount(
        &self,
        located: &Located<'_>,
        descriptor: VolumeDescriptor,
        kind: Kind,
        options: &MountOptions,
        path: &MountPath,
    ) -> Result<()> {
        let id = VolumeId::new(descriptor.id.as_str())?;
        if self.is_present(&id, path.as_path())? {
            let place = Place::at(path.as_path())?;
            if place.map(|place| place.is_read_only()).transpose()? != Some(options.read_only) {
                let how = if options.read_only { "writable" } else { "read-only" };
                fail!(Conflict, "{id} is already at {path}, but {how}");
            }
            return Ok(());
        }
        let (directory, made) = mounts::ensure_vacant(path.as_path(), paths::Kind::Directory)?;
        let mounted = self.mount(located, descriptor, kind, options, &directory, path);
        if mounted.is_err() && made {
            let _ = paths::remove_empty(path.as_path());
        }
        mounted
    }

    fn mount(
        &self,
        located: &Located<'_>,
        mut descriptor: VolumeDescriptor,
        kind: Kind,
        options: &MountOptions,
        directory: &OwnedFd,
        path: &MountPath,
    ) -> Result<()> {
        if let Contents::Formatting(_) = descriptor.contents
            && let Some(device) = loops::find(&located.image())?
            && !device.detach_now()?
        {
            fail!(Busy, "an earlier mkfs of {} is still ending: try again", descriptor.id);
        }
        let device = self.attach(located, &descriptor, true)?;
        self.ensure_filesystem(located, &mut descriptor, kind, &device)?;
        filesystem::mount(&device.path, kind.name(), options, directory)?;
        if options.read_only {
            return Ok(());
        }
        // A restored volume may be bigger than its snapshot, and an expansion may have been interrupted here.
        let grown = kind.grow(&device.path, path.as_path());
        let settled = grown.and_then(|grew| match kind {
            Kind::Xfs if grew => self.checkpoint(located, path.as_path()),
            _ => Ok(()),
        });
        settled.inspect_err(|_| {
            let _ = mounts::unmount_top(path.as_path());
        })
    }

    fn stage_block(&self, located: &Located<'_>, descriptor: &VolumeDescriptor, path: &MountPath) -> Result<()> {
        let id = VolumeId::new(descriptor.id.as_str())?;
        if let Contents::Formatting(_) = descriptor.contents {
            fail!(Precondition, "{id} was being formatted as a file system: mount it as one first");
        }
        let place = path.join(STAGED_DEVICE);
        if self.is_present(&id, place.as_path())? {
            return Ok(());
        }
        drop(paths::ensure(path.as_path(), paths::Kind::Directory)?);
        // No autoclear: a bound device file does not hold the device.
        let device = self.attach(located, descriptor, false)?;
        mounts::ensure_bind(&device.path, place.as_path(), false)
    }

    /// Is this volume at the path? What is left there of another volume of ours, whose unstaging never came, is taken
    /// away: its data is in its image.
    ///
    /// # Errors
    /// `Precondition` when something else is mounted there.
    fn is_present(&self, id: &VolumeId, path: &Path) -> Result<bool> {
        loop {
            let Some(place) = Place::at(path)?.filter(Place::is_mount) else { return Ok(false) };
            match self.volume_at(&place)? {
                Some((there, _)) if there == *id => return Ok(true),
                Some((there, _)) => {
                    tracing::warn!(volume.id = %there, path = %path.display(), "unstaging never came: unmounting it now");
                    drop(place);
                    mounts::unmount_top(path)?;
                }
                None => fail!(Precondition, "something else is mounted at {}: unmount it first", path.display()),
            }
        }
    }

    /// The volume's device: the one that it has, or a new one.
    fn attach(&self, located: &Located<'_>, descriptor: &VolumeDescriptor, autoclear: bool) -> Result<LoopDevice> {
        let path = located.image();
        if let Some(device) = loops::find(&path)? {
            return Ok(device);
        }
        let image = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .context(|| format!("cannot open {}", path.display()))?;
        loops::attach(
            &image,
            loops::Options {
                block_size: descriptor.block_size,
                read_only: false,
                autoclear,
                discard: located.pool.is_thin(),
            },
        )
    }

    /// Makes the file system if the volume is positively blank, and never otherwise.
    fn ensure_filesystem(
        &self,
        located: &Located<'_>,
        descriptor: &mut VolumeDescriptor,
        kind: Kind,
        device: &LoopDevice,
    ) -> Result<()> {
        let path = located.image();
        let image = || {
            OpenOptions::new().write(true).read(true).open(&path).context(|| format!("cannot open {}", path.display()))
        };
        match descriptor.contents {
            Contents::Filesystem(_) => return Ok(()),
            Contents::Raw => fail!(Precondition, "{} is a block volume: it has no file system", descriptor.id),
            Contents::Blank(_) => {
                if !files::is_blank(&image()?)? {
                    fail!(
                        Precondition,
                        "{} should be blank, but something has been written to its image: not formatting it",
                        descriptor.id
                    );
                }
            }
            // Nobody was ever shown this volume. What mkfs left must go: it may mislead the next one.
            Contents::Formatting(_) => files::blank(&image()?)?,
        }
        descriptor.contents = Contents::Formatting(kind);
        descriptor.write(&located.folder)?;
        kind.make(&device.path, &descriptor.mkfs_options, self.command_deadline)?;
        device.sync()?;
        descriptor.contents = Contents::Filesystem(kind);
        descriptor.write(&located.folder)
    }

    /// The volume at a path, if one of ours is mounted or shown there.
    pub(super) fn volume_at_path(&self, path: &Path) -> Result<Option<(VolumeId, LoopDevice)>> {
        match Place::at(path)?.filter(Place::is_mount) {
            Some(place) => self.volume_at(&place),
            None => Ok(None),
        }
    }
}

/// The file system to mount: the one that the volume was made for. The request may leave it open.
fn filesystem_of(descriptor: &VolumeDescriptor, wanted: &str) -> Result<Kind> {
    let holds = match descriptor.contents {
        Contents::Blank(kind) | Contents::Formatting(kind) | Contents::Filesystem(kind) => kind,
        Contents::Raw => fail!(Precondition, "{} is a block volume: it has no file system", descriptor.id),
    };
    if !wanted.is_empty() && Kind::parse(wanted)? != holds {
        fail!(Invalid, "{} was made for {}, and {wanted} is asked for", descriptor.id, holds.name());
    }
    Ok(holds)
}
