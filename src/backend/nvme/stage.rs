//! Putting a volume at a path: attach, make the file system once, mount.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::descriptor::{Contents, VolumeDescriptor};
use super::device::{Backing, Device, Opened};
use super::parameters::{directory_options, mount_options};
use super::{Found, Located, Nvme, Shown, checkpoint, directory};
use crate::backend::{STAGED_DEVICE, Stage};
use crate::error::Result;
use crate::host::filesystem::{self, Kind, MountOptions};
use crate::host::mounts::{self, Place};
use crate::host::paths;
use crate::secrets::Secrets;
use crate::volume::{Access, MountPath, VolumeId};

impl Nvme {
    /// Stages a volume that exists. What is already so is compared; what an earlier, interrupted call left is used.
    pub(super) fn stage(&self, found: Found<'_>, stage: &Stage, secrets: &Secrets) -> Result<()> {
        let descriptor = found.descriptor()?;
        self.note_limits(&descriptor);
        match (&found, descriptor.contents) {
            (Found::Folder(located), Contents::Directory { project }) => {
                self.stage_directory(located, &descriptor, project, stage)
            }
            _ => self.with_backing(found, secrets, |backing| self.stage_device(backing, descriptor, stage)),
        }
    }

    /// Does something with what a volume's device comes from.
    pub(super) fn with_backing<T>(
        &self,
        found: Found<'_>,
        secrets: &Secrets,
        work: impl FnOnce(&mut dyn Backing) -> T,
    ) -> T {
        match found {
            Found::Folder(mut located) => work(&mut located),
            Found::Logical(logical) => work(&mut Opened { logical, secrets, deadline: self.command_deadline }),
        }
    }

    /// Stages a volume that is a device.
    fn stage_device(&self, backing: &mut dyn Backing, descriptor: VolumeDescriptor, stage: &Stage) -> Result<()> {
        match &stage.capability.access {
            Access::Block => self.stage_block(backing, descriptor, &stage.path),
            Access::Mount { filesystem, flags, .. } => {
                let kind = filesystem_of(&descriptor, filesystem)?;
                let options = mount_options(kind, flags, stage.capability.mode.is_read_only())?;
                self.stage_mount(backing, descriptor, kind, &options, &stage.path)
            }
        }
    }

    fn stage_directory(
        &self,
        located: &Located<'_>,
        descriptor: &VolumeDescriptor,
        project: u32,
        stage: &Stage,
    ) -> Result<()> {
        let id = VolumeId::new(descriptor.id.as_str())?;
        let Access::Mount { filesystem, flags, .. } = &stage.capability.access else {
            fail!(Precondition, "{id} is a directory: it has no device");
        };
        filesystem_of(descriptor, filesystem)?;
        let options = directory_options(flags, stage.capability.mode.is_read_only())?;
        // The pool's path may have a link in it, which the administrator has made.
        let Ok(data) = std::fs::canonicalize(directory::data_of(&located.folder)) else {
            fail!(Internal, "the directory of {id} is gone: its data is lost");
        };
        if !located.pool.has_quotas() {
            fail!(
                Precondition,
                "pool {} is mounted without prjquota, so {id} would have no limit: mount it with that",
                located.pool.name()
            );
        }
        // An interrupted expansion may have left less than the descriptor says.
        directory::limit(&located.pool.root()?, project, descriptor.size)?;
        // What another volume left there goes.
        self.is_present(&id, stage.path.as_path())?;
        mounts::ensure_bind_with(&data, stage.path.as_path(), options.read_only, &options.attributes)
    }

    fn stage_mount(
        &self,
        backing: &mut dyn Backing,
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
        let mounted = self.mount(backing, descriptor, kind, options, &directory, path);
        if mounted.is_err() && made {
            let _ = paths::remove_empty(path.as_path());
        }
        mounted
    }

    fn mount(
        &self,
        backing: &mut dyn Backing,
        mut descriptor: VolumeDescriptor,
        kind: Kind,
        options: &MountOptions,
        directory: &OwnedFd,
        path: &MountPath,
    ) -> Result<()> {
        let device = backing.attach(&mut descriptor, true)?;
        self.ensure_filesystem(backing, &mut descriptor, kind, &device)?;
        filesystem::mount(device.path(), kind.name(), options, directory)?;
        if options.read_only {
            return Ok(());
        }
        // A restored volume may be bigger than its snapshot, and an expansion may have been interrupted here.
        let grown = kind.grow(device.path(), path.as_path());
        let settled = grown.and_then(|grew| match kind {
            Kind::Xfs if grew => checkpoint::write(backing, path.as_path()),
            _ => Ok(()),
        });
        settled.inspect_err(|_| {
            let _ = mounts::unmount_top(path.as_path());
        })
    }

    fn stage_block(&self, backing: &mut dyn Backing, mut descriptor: VolumeDescriptor, path: &MountPath) -> Result<()> {
        let id = VolumeId::new(descriptor.id.as_str())?;
        if descriptor.contents != Contents::Raw {
            fail!(Precondition, "{id} was made for a file system: it is no block volume");
        }
        let place = path.join(STAGED_DEVICE);
        if self.is_present(&id, place.as_path())? {
            return Ok(());
        }
        drop(paths::ensure(path.as_path(), paths::Kind::Directory)?);
        // A bound device file does not hold the device.
        let device = backing.attach(&mut descriptor, false)?;
        mounts::ensure_bind(device.path(), place.as_path(), false)
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

    /// Makes the file system if the volume is positively blank, and never otherwise.
    fn ensure_filesystem(
        &self,
        backing: &mut dyn Backing,
        descriptor: &mut VolumeDescriptor,
        kind: Kind,
        device: &Device,
    ) -> Result<()> {
        match descriptor.contents {
            Contents::Filesystem(_) => return Ok(()),
            Contents::Raw => fail!(Precondition, "{} is a block volume: it has no file system", descriptor.id),
            Contents::Directory { .. } => fail!(Internal, "{} is a directory, and has a device", descriptor.id),
            Contents::Blank(_) => {
                if !backing.is_blank(device)? {
                    fail!(
                        Precondition,
                        "{} should be blank, but something has been written to it: not formatting it",
                        descriptor.id
                    );
                }
            }
            // Nobody was ever shown this volume.
            Contents::Formatting(_) => backing.make_blank(device)?,
        }
        descriptor.contents = Contents::Formatting(kind);
        backing.write(descriptor)?;
        kind.make(device.path(), &descriptor.mkfs_options, self.command_deadline)?;
        device.sync()?;
        descriptor.contents = Contents::Filesystem(kind);
        backing.write(descriptor)
    }

    /// The volume at a path, if one of ours is mounted or shown there.
    pub(super) fn volume_at_path(&self, path: &Path) -> Result<Option<(VolumeId, Shown)>> {
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
        Contents::Directory { .. } => Kind::Xfs,
        Contents::Raw => fail!(Precondition, "{} is a block volume: it has no file system", descriptor.id),
    };
    if !wanted.is_empty() && Kind::parse(wanted)? != holds {
        fail!(Invalid, "{} was made for {}, and {wanted} is asked for", descriptor.id, holds.name());
    }
    Ok(holds)
}
