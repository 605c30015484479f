//! The carve `lvm`: logical volumes as block devices, with or without encryption, at places on this machine.
//!
//! What lies on the device is handled as for images (`stage.rs`); here is what differs: where the descriptor is, how the
//! device comes and goes, and the mapping on top of it that encrypts.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::descriptor::{Contents, Encryption, VolumeDescriptor};
use super::group::{self, Group};
use super::parameters::ClassParameters;
use super::{Nvme, refuse_users};
use crate::error::{Context, Result};
use crate::host::lvm::LogicalVolume;
use crate::host::mapper::{self, Mapped};
use crate::host::{crypt, filesystem, mounts, zero};
use crate::secrets::Secrets;
use crate::volume::{Health, HealthProblem};

/// A LUKS2 header with its key slots and their backup.
const LUKS_HEADER: u64 = 16 << 20;
/// The key of node-stage secrets that has the passphrase or key.
const PASSPHRASE: &str = "encryptionPassphrase";
/// So many characters of hex or base64 are a random key: stretching it would only cost time.
const RANDOM_LENGTH: usize = 32;
/// So many bytes at a blank volume's beginning are zero.
const BLANK: usize = 4096;

/// Signatures lie in so many bytes at either end.
const ENDS: u64 = 4 << 20;

/// A logical volume that exists.
pub(super) struct Logical<'a> {
    pub(super) group: &'a Arc<Group>,
    pub(super) volume: LogicalVolume,
}

/// Bytes of the volume that its user does not get.
pub(super) fn overhead(class: &ClassParameters) -> u64 {
    if class.encryption == Some(Encryption::Luks) { LUKS_HEADER } else { 0 }
}

impl Logical<'_> {
    pub(super) fn descriptor(&self) -> Result<VolumeDescriptor> {
        group::descriptor_of(&self.volume)
    }

    pub(super) fn write(&mut self, descriptor: &VolumeDescriptor) -> Result<()> {
        self.group.write(&mut self.volume, descriptor)
    }

    /// The volume's own device, while it is active.
    fn below(&self) -> Result<Option<Mapped>> {
        self.group.device(&self.volume.name)
    }

    /// What encrypts it now. Only a mapping of ours: a tenant may have put one on a block volume.
    fn mapping(&self) -> Result<Option<Mapped>> {
        mapping_of(&self.volume.name)
    }

    /// Is it shown, and as which device?
    pub(super) fn device(&self) -> Result<Option<PathBuf>> {
        Ok(self.mapping()?.or(self.below()?).map(|device| device.path()))
    }

    /// Nobody uses it, and nothing lies on its device, after this.
    ///
    /// # Errors
    /// `Precondition` while it is mounted, shown to a pod or held open.
    pub(super) fn ensure_detached(&self, nvme: &Nvme, id: &str) -> Result<()> {
        for device in [self.mapping()?, self.below()?].into_iter().flatten() {
            nvme.release_view(&device.path())?;
            refuse_users(id, &mounts::users_of_device(&device.path())?)?;
        }
        if let Some(mapping) = self.mapping()? {
            crypt::close(&mapping.name, nvme.command_deadline)?;
        }
        // A process may have it open that no mount tells of, such as one of a pod that kubelet has forgotten.
        if self.group.is_held_open(id)? {
            fail!(Precondition, "{id} is in use: a process holds its device open");
        }
        Ok(())
    }

    /// The device that the volume's user sees, made to be there. What a throw-away key has encrypted is gone without
    /// it: then the volume is blank, and its descriptor says so from now on.
    pub(super) fn attach(
        &mut self,
        descriptor: &mut VolumeDescriptor,
        secrets: &Secrets,
        deadline: Duration,
    ) -> Result<PathBuf> {
        self.group.activate(&self.volume)?;
        let Some(below) = self.below()?.map(|device| device.path()) else {
            fail!(Internal, "{} has no device after it was activated", descriptor.id);
        };
        let (name, mapping) = (mapping_name(&descriptor.id), self.mapping()?);
        match descriptor.encryption {
            None => Ok(below),
            Some(_) if mapping.is_some() => Ok(mapping.map_or(below, |mapping| mapping.path())),
            Some(Encryption::Throwaway) => {
                // First of all: whoever finds the mapping has to know that there is nothing in it.
                if let Contents::Filesystem(kind) = descriptor.contents {
                    descriptor.contents = Contents::Formatting(kind);
                    self.write(descriptor)?;
                }
                crypt::open_throwaway(&below, &name, deadline)?;
                opened(&descriptor.id)
            }
            Some(Encryption::Luks) => {
                let Some(key) = secrets.reveal(PASSPHRASE).filter(|key| !key.is_empty()) else {
                    fail!(Invalid, "{} is encrypted, and the node-stage secret has no {PASSPHRASE}", descriptor.id);
                };
                if !descriptor.sealed {
                    // What an interrupted call left here has never held anything.
                    let strength = if is_random(key) { crypt::Strength::Random } else { crypt::Strength::Passphrase };
                    crypt::format(&below, key.as_bytes(), strength, deadline)?;
                    descriptor.sealed = true;
                    self.write(descriptor)?;
                }
                crypt::open(&below, &name, key.as_bytes(), deadline)?;
                opened(&descriptor.id)
            }
        }
    }

    /// Is nothing on the volume yet? Its extents were zero when it was made, or its first ones were made so.
    pub(super) fn is_blank(device: &Path) -> Result<bool> {
        let mut first = [0; BLANK];
        let what = || format!("cannot read {}", device.display());
        File::open(device).and_then(|device| device.read_exact_at(&mut first, 0)).context(what)?;
        Ok(first.iter().all(|byte| *byte == 0))
    }

    /// Zeros at both ends, where what an interrupted mkfs has left could be taken for something.
    pub(super) fn make_blank(&self, device: &Path) -> Result<()> {
        let size = filesystem::device_size(device)?;
        let ends = ENDS.min(size);
        for range in [0..ends, size - ends..size] {
            let _ = zero::write(device, range, ENDS, |_| ControlFlow::Continue(()))?;
        }
        Ok(())
    }

    /// Makes the volume bigger, and the mapping on it.
    pub(super) fn grow(
        &mut self,
        descriptor: &mut VolumeDescriptor,
        size: u64,
        deadline: Duration,
        secrets: &Secrets,
    ) -> Result<()> {
        let overhead = if descriptor.encryption == Some(Encryption::Luks) { LUKS_HEADER } else { 0 };
        if size > descriptor.size {
            self.group.grow(&self.volume, size.saturating_add(overhead))?;
            descriptor.size = size;
            self.write(descriptor)?;
        }
        // Also when it had grown already: the call before may have died in between.
        if let Some(mapping) = self.mapping()? {
            let key = secrets.reveal(PASSPHRASE).map(str::as_bytes);
            if descriptor.encryption == Some(Encryption::Luks) && key.is_none() {
                fail!(Invalid, "{} is encrypted, and the node-expand secret has no {PASSPHRASE}", descriptor.id);
            }
            crypt::resize(&mapping.name, key, deadline)?;
        }
        Ok(())
    }

    pub(super) fn problems(&self) -> Vec<HealthProblem> {
        let mut problems = Vec::new();
        let mut problem = |status, reason, message| problems.push(HealthProblem { status, reason, message });
        if let Err(error) = self.descriptor() {
            problem(Health::Inaccessible, "DescriptorDamaged", error.to_string());
        }
        if self.volume.partial {
            problem(Health::DataLoss, "DiskMissing", format!("a disk that {} lies on is missing", self.volume.name));
        }
        problems
    }
}

/// The name of the mapping that encrypts a volume.
fn mapping_name(id: &str) -> String {
    format!("berth-{id}")
}

/// The mapping that encrypts this volume, while it is open. Asks sysfs only.
pub(super) fn mapping_of(id: &str) -> Result<Option<Mapped>> {
    Ok(mapper::find(&mapping_name(id))?.filter(Mapped::is_crypt))
}

fn opened(id: &str) -> Result<PathBuf> {
    match mapping_of(id)? {
        Some(mapping) => Ok(mapping.path()),
        None => fail!(Internal, "{id} has no mapping after it was opened"),
    }
}

/// Words that a person has chosen have spaces, or are shorter.
fn is_random(key: &str) -> bool {
    key.len() >= RANDOM_LENGTH && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=_-".contains(&byte))
}
