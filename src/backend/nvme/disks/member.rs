//! One file system of a pool of disks: where its disks are, whether it is mounted, and how it is doing.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::held::{self, Held};
use crate::backend::nvme::pool::{Below, Trouble};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::disks::{Disk, Machine, device_number};
use crate::host::xfs::{self, Uuid};
use crate::host::{Errno, files, mounts, paths};

/// So long a mount may take, which replays the journal. It goes on after that.
const MOUNT_PATIENCE: Duration = Duration::from_secs(30);

/// One file system of a pool of disks.
pub(super) struct Member {
    pub(super) uuid: Uuid,
    /// Where it is mounted: its pool's directory, and its UUID.
    pub(super) path: PathBuf,
    pub(super) held: Held,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The block device that it was last found on: its disk, or what is made of its disks.
    device: Option<Disk>,
    /// Why it can't be mounted.
    trouble: Option<String>,
}

impl Member {
    pub(super) fn new(pool: &str, uuid: Uuid, folder: &Path, machine: &Machine) -> Self {
        let path = folder.join(uuid.to_string());
        Self { uuid, path, held: Held::new(pool, machine), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is it mounted from these very disks, so that there is nothing to be done?
    pub(super) fn is_settled_on(&self, disks: &[Disk]) -> bool {
        let device = self.state().device.clone();
        self.held.lies_on(disks) && device.is_some_and(|device| self.is_mounted_from(&device))
    }

    /// Are its disks there, but not mounted for no other reason than that nobody has done it?
    pub(super) fn waits_for_mount(&self) -> bool {
        let is_found = {
            let state = self.state();
            state.trouble.is_none() && state.device.is_some()
        };
        is_found && self.held.gone().is_empty() && mounts::line_of(&self.path).is_ok_and(|line| line.is_none())
    }

    /// A look has found it on each of these disks.
    pub(super) fn found_on_one_of(&self, disks: &[Disk], mounts: bool) {
        match disks {
            [disk] => self.found_on(disk, disks, mounts),
            // One that is in use stays so: the kernel mounts no second one.
            several if several.iter().any(|disk| self.is_settled_on(std::slice::from_ref(disk))) => {}
            several => {
                let what = format!("{} are copies of one file system, {}", held::list(several), self.uuid);
                self.note(Some(format!("{what}: take all but one of them away")));
            }
        }
    }

    /// A look has found it on this device, which is made of these disks.
    pub(super) fn found_on(&self, device: &Disk, disks: &[Disk], mounts: bool) {
        let trouble = if mounts { self.ensure_mounted(device).err().map(|error| error.to_string()) } else { None };
        self.held.found_on(disks);
        self.state().device = Some(device.clone());
        self.note(trouble);
    }

    /// Keeps why it can't be used, and tells the log what is new of that.
    pub(super) fn note(&self, trouble: Option<String>) {
        let mut state = self.state();
        if trouble != state.trouble {
            let (pool, uuid) = (&self.held.pool, self.uuid);
            match &trouble {
                Some(trouble) => tracing::error!(pool, %uuid, trouble, "a file system of the pool can't be used"),
                None => tracing::info!(pool, %uuid, "a file system of the pool can be used again"),
            }
        }
        state.trouble = trouble;
    }

    /// Does its directory show the device's file system?
    fn is_mounted_from(&self, device: &Disk) -> bool {
        files::device_of(&self.path).is_ok_and(|number| number == device.number)
    }

    fn ensure_mounted(&self, device: &Disk) -> Result<()> {
        if self.is_mounted_from(device) || !self.make_way(device)? {
            return Ok(());
        }
        let folder = self.path.parent().unwrap_or(&self.path);
        std::fs::create_dir_all(folder).context(|| format!("cannot make {}", folder.display()))?;
        let (path, source, name) = (self.path.clone(), device.path.clone(), device.name.clone());
        let (pool, uuid) = (self.held.pool.clone(), self.uuid);
        self.held.machine.ask(device, MOUNT_PATIENCE, move || {
            let (target, _) = mounts::ensure_vacant(&path, paths::Kind::Directory)?;
            let has_quotas = xfs::mount(&source, &target)?;
            tracing::info!(pool, %uuid, device = name, path = %path.display(), "mounted a file system of the pool");
            if !has_quotas {
                tracing::warn!(pool, "this kernel has no quotas for XFS: no volume of this pool can be a directory");
            }
            if let Err(error) = xfs::fail_fast(&name) {
                tracing::warn!(pool, device = name, %error, "an error in its metadata may hang the file system");
            }
            Ok(())
        })
    }

    /// Takes the mount away that a device has left which is gone. `false`: the device is mounted there, and does not
    /// answer. A file system that does not answers no question, so it is the mount table that is asked.
    fn make_way(&self, device: &Disk) -> Result<bool> {
        let Some(line) = mounts::line_of(&self.path)? else { return Ok(true) };
        let number = line.split(' ').nth(2).and_then(device_number);
        if number == Some(device.number) {
            return Ok(false);
        }
        if !line.contains(" - xfs ") || !number.is_some_and(|number| self.held.machine.is_gone(number)) {
            fail!(Precondition, "something else is mounted at {}: unmount it", self.path.display());
        }
        mounts::unmount_top(&self.path).map(|()| true).map_err(|error| {
            let what = format!("{device} is back, but pods still use the volumes that went with it: end them");
            Error::caused(ErrorKind::Busy, what, error)
        })
    }
}

impl Below for Member {
    fn trouble(&self) -> Option<Trouble> {
        let missing = |message: &str| Some(self.held.trouble("PoolMissing", message));
        let (device, trouble) = {
            let state = self.state();
            (state.device.clone(), state.trouble.clone())
        };
        let gone = self.held.gone();
        if !gone.is_empty() {
            return missing(&format!("{} is gone", held::list(&gone)));
        }
        if let Some(trouble) = trouble {
            return missing(&trouble);
        }
        let Some(device) = device else {
            let forget = format!("if it is gone for good, remove {} and start anew", self.path.display());
            return missing(&format!("no disk has the file system {}: {forget}", self.uuid));
        };
        match files::device_of(&self.path) {
            Ok(number) if number == device.number => None,
            Err(error) if error.os_error() == Some(Errno::IO.raw_os_error()) => {
                let then = format!("when its pods have ended, unmount {}, and it is mounted anew", self.path.display());
                let message = format!("the file system on {device} has stopped, as it does when a write fails: {then}");
                Some(self.held.trouble("PoolStopped", &message))
            }
            _ => missing(&format!("{device} is not mounted at {}", self.path.display())),
        }
    }

    fn warnings(&self) -> Vec<Trouble> {
        self.held.warnings()
    }
}
