//! Volumes that are block devices: what staging and growing need of each carve.

use std::borrow::Cow;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Located;
use super::descriptor::{Contents, Descriptor, VolumeDescriptor};
use super::logical::Logical;
use crate::error::{Context, Result};
use crate::host::files;
use crate::host::loops::{self, LoopDevice};
use crate::secrets::Secrets;

/// In the folder of a volume whose file system may be frozen by us.
pub(super) const FROZEN: &str = "frozen";

/// A volume's device, as its user sees it.
pub(super) enum Device {
    /// An image's. It goes with its last user, of which this is one.
    Loop(LoopDevice),
    /// A logical volume's, or the mapping that encrypts it.
    Logical(PathBuf),
}

impl Device {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Loop(device) => &device.path,
            Self::Logical(path) => path,
        }
    }

    /// Makes the device as big as what it shows has become.
    pub(super) fn refresh_size(&self) -> Result<()> {
        match self {
            Self::Loop(device) => device.refresh_size(),
            Self::Logical(_) => Ok(()),
        }
    }

    /// Writes what the device's page cache holds to the disk.
    pub(super) fn sync(&self) -> Result<()> {
        files::sync_device(self.path())
    }
}

/// What a volume's device comes from.
pub(super) trait Backing {
    /// Replaces the descriptor, durably.
    fn write(&mut self, descriptor: &VolumeDescriptor) -> Result<()>;

    /// The device: the one that the volume has, or a new one. With `mounted` it may go by itself after the last user.
    fn attach(&mut self, descriptor: &mut VolumeDescriptor, mounted: bool) -> Result<Device>;

    /// Is it positively blank, as it was made?
    fn is_blank(&self, device: &Device) -> Result<bool>;

    /// Takes away what an interrupted mkfs left: it may mislead the next one.
    fn make_blank(&self, device: &Device) -> Result<()>;

    /// Says, for whoever comes after a crash, that the file system may be frozen by us; or that it is not.
    fn mark_frozen(&mut self, frozen: bool) -> Result<()>;
}

impl Backing for Located<'_> {
    fn write(&mut self, descriptor: &VolumeDescriptor) -> Result<()> {
        descriptor.write(&self.folder)
    }

    fn attach(&mut self, descriptor: &mut VolumeDescriptor, mounted: bool) -> Result<Device> {
        let path = self.image();
        if path.symlink_metadata().is_err() {
            fail!(Internal, "the image of {} is gone: its data is lost", descriptor.id);
        }
        if let Some(device) = loops::find(&path)? {
            if !matches!(descriptor.contents, Contents::Formatting(_)) {
                return Ok(Device::Loop(device));
            }
            if !device.detach_now()? {
                fail!(Busy, "an earlier mkfs of {} is still ending: try again", descriptor.id);
            }
        }
        let options = loops::Options {
            block_size: descriptor.block_size,
            read_only: false,
            autoclear: mounted,
            discard: self.pool.is_thin(),
        };
        loops::attach(&self.open_image()?, options).map(Device::Loop)
    }

    fn is_blank(&self, _: &Device) -> Result<bool> {
        files::is_blank(&self.open_image()?)
    }

    fn make_blank(&self, _: &Device) -> Result<()> {
        files::blank(&self.open_image()?)
    }

    fn mark_frozen(&mut self, frozen: bool) -> Result<()> {
        let mark = self.folder.join(FROZEN);
        self.pool.freezing.mark(&self.id(), frozen, || {
            let marked = if frozen { std::fs::File::create(&mark).map(drop) } else { std::fs::remove_file(&mark) };
            marked.context(|| format!("cannot mark {}", self.folder.display()))
        })
    }
}

impl Located<'_> {
    fn id(&self) -> Cow<'_, str> {
        self.folder.file_name().unwrap_or_default().to_string_lossy()
    }

    pub(super) fn open_image(&self) -> Result<std::fs::File> {
        let path = self.image();
        OpenOptions::new().read(true).write(true).open(&path).context(|| format!("cannot open {}", path.display()))
    }
}

/// A logical volume together with what its encryption needs.
pub(super) struct Opened<'a, 'b> {
    pub(super) logical: Logical<'a>,
    pub(super) secrets: &'b Secrets,
    pub(super) deadline: Duration,
}

impl Backing for Opened<'_, '_> {
    fn write(&mut self, descriptor: &VolumeDescriptor) -> Result<()> {
        self.logical.write(descriptor)
    }

    fn attach(&mut self, descriptor: &mut VolumeDescriptor, _: bool) -> Result<Device> {
        self.logical.attach(descriptor, self.secrets, self.deadline).map(Device::Logical)
    }

    fn is_blank(&self, device: &Device) -> Result<bool> {
        // What encryption makes of zeros is noise: there the descriptor alone says that nobody was shown it.
        if self.logical.descriptor()?.encryption.is_some() { Ok(true) } else { Logical::is_blank(device.path()) }
    }

    fn make_blank(&self, device: &Device) -> Result<()> {
        self.logical.make_blank(device.path())
    }

    fn mark_frozen(&mut self, frozen: bool) -> Result<()> {
        self.logical.group.mark_frozen(&mut self.logical.volume, frozen)
    }
}
