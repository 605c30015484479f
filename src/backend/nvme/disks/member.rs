//! One file system of a pool of disks: where its disk is, whether it is mounted, and how it is doing.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::nvme::pool::{Below, Trouble};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::disks::{Condition, Disk, Machine, device_number};
use crate::host::smart::{self, Smart};
use crate::host::xfs::{self, Uuid};
use crate::host::{Errno, files, mounts, paths};

/// So long a mount may take, which replays the journal. It goes on after that.
const MOUNT_PATIENCE: Duration = Duration::from_secs(30);
/// So long a disk may take to say how it is.
const HEALTH_PATIENCE: Duration = Duration::from_secs(5);
/// A disk that has lasted as long as it was rated for, in percent.
const WORN_OUT: u8 = 100;

/// One file system of a pool of disks.
pub(super) struct Member {
    pool: String,
    pub(super) uuid: Uuid,
    /// Where it is mounted: its pool's directory, and its UUID.
    pub(super) path: PathBuf,
    machine: Machine,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The disk that it was last found on.
    disk: Option<Disk>,
    /// Why it can't be mounted.
    trouble: Option<String>,
    health: Health,
}

/// What a disk has last said about itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    /// `None`: it has not been asked yet, or says nothing.
    pub(super) smart: Option<Smart>,
    /// Why it could not be asked.
    error: Option<String>,
}

impl Member {
    pub(super) fn new(pool: &str, uuid: Uuid, folder: &Path, machine: &Machine) -> Self {
        let path = folder.join(uuid.to_string());
        Self { pool: pool.to_owned(), uuid, path, machine: machine.clone(), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk that it was last found on, which may be gone.
    pub(super) fn disk(&self) -> Option<Disk> {
        self.state().disk.clone()
    }

    pub(super) fn health(&self) -> Health {
        self.state().health.clone()
    }

    /// Is this the disk that it is known to lie on, and nothing to be done about it?
    pub(super) fn is_settled_on(&self, disk: &Disk) -> bool {
        let is_same = |known: &Disk| (known.number, known.sequence) == (disk.number, disk.sequence);
        self.disk().is_some_and(|known| is_same(&known)) && self.is_mounted_from(disk)
    }

    /// Is the disk there, but not mounted for no other reason than that nobody has done it?
    pub(super) fn waits_for_mount(&self) -> bool {
        let (disk, trouble) = (self.disk(), self.state().trouble.clone());
        let is_there = |disk: Disk| self.machine.condition(&disk) != Condition::Gone && !self.is_mounted_from(&disk);
        trouble.is_none() && disk.is_some_and(is_there)
    }

    /// A look has found it on these disks, of which there should be one.
    pub(super) fn found_on(&self, disks: &[Disk], mounts: bool) {
        let [disk] = disks else {
            let names = disks.iter().map(Disk::to_string).collect::<Vec<_>>().join(" and ");
            // One that is in use stays so: the kernel mounts no second one.
            if !disks.iter().any(|disk| self.is_settled_on(disk)) {
                let what =
                    format!("{names} are copies of one file system, {}: take all but one of them away", self.uuid);
                self.note(None, Some(what));
            }
            return;
        };
        let trouble = if mounts { self.ensure_mounted(disk).err().map(|error| error.to_string()) } else { None };
        self.note(Some(disk.clone()), trouble);
    }

    /// Keeps what has been found out, and tells the log what is new.
    fn note(&self, disk: Option<Disk>, trouble: Option<String>) {
        let mut state = self.state();
        if trouble != state.trouble {
            let (pool, uuid) = (&self.pool, self.uuid);
            match &trouble {
                Some(trouble) => tracing::error!(pool, %uuid, trouble, "a file system of the pool can't be used"),
                None => tracing::info!(pool, %uuid, "a file system of the pool can be used again"),
            }
        }
        state.trouble = trouble;
        if let Some(disk) = disk {
            state.disk = Some(disk);
        }
    }

    /// Does its directory show the disk's file system?
    fn is_mounted_from(&self, disk: &Disk) -> bool {
        files::device_of(&self.path).is_ok_and(|device| device == disk.number)
    }

    fn ensure_mounted(&self, disk: &Disk) -> Result<()> {
        if self.is_mounted_from(disk) || !self.make_way(disk)? {
            return Ok(());
        }
        let folder = self.path.parent().unwrap_or(&self.path);
        std::fs::create_dir_all(folder).context(|| format!("cannot make {}", folder.display()))?;
        let (path, device, name) = (self.path.clone(), disk.path.clone(), disk.name.clone());
        let (pool, uuid) = (self.pool.clone(), self.uuid);
        self.machine.ask(disk, MOUNT_PATIENCE, move || {
            let (target, _) = mounts::ensure_vacant(&path, paths::Kind::Directory)?;
            let has_quotas = xfs::mount(&device, &target)?;
            tracing::info!(pool, %uuid, disk = name, path = %path.display(), "mounted a file system of the pool");
            if !has_quotas {
                tracing::warn!(pool, "this kernel has no quotas for XFS: no volume of this pool can be a directory");
            }
            if let Err(error) = xfs::fail_fast(&name) {
                tracing::warn!(pool, disk = name, %error, "an error in its metadata may hang the file system");
            }
            Ok(())
        })
    }

    /// Takes the mount away that a disk has left which is gone. `false`: the disk is mounted there, and does not answer. A
    /// file system that does not answers no question, so it is the mount table that is asked.
    fn make_way(&self, disk: &Disk) -> Result<bool> {
        let Some(line) = mounts::line_of(&self.path)? else { return Ok(true) };
        let number = line.split(' ').nth(2).and_then(device_number);
        if number == Some(disk.number) {
            return Ok(false);
        }
        if !line.contains(" - xfs ") || !number.is_some_and(|number| self.machine.is_gone(number)) {
            fail!(Precondition, "something else is mounted at {}: unmount it", self.path.display());
        }
        mounts::unmount_top(&self.path).map(|()| true).map_err(|error| {
            let what = format!("{disk} is back, but pods still use the volumes that went with it: end them");
            Error::caused(ErrorKind::Busy, what, error)
        })
    }

    /// Has the disk say how it is, in bounded time.
    pub(super) fn look_after(&self) {
        let Some(disk) = self.disk().filter(|disk| self.machine.condition(disk) != Condition::Gone) else { return };
        let device = disk.path.clone();
        let health = match self.machine.ask(&disk, HEALTH_PATIENCE, move || smart::ask(&device)) {
            Ok(smart) => Health { smart, error: None },
            Err(error) => Health { error: Some(error.to_string()), ..self.health() },
        };
        self.state().health = health;
    }

    fn trouble(&self, reason: &'static str, message: &str) -> Trouble {
        Trouble { reason, message: format!("pool {}: {message}", self.pool) }
    }
}

impl Below for Member {
    fn trouble(&self) -> Option<Trouble> {
        let missing = |message: &str| Some(self.trouble("PoolMissing", message));
        let (disk, trouble) = {
            let state = self.state();
            (state.disk.clone(), state.trouble.clone())
        };
        let Some(disk) = disk else {
            let forget = format!("if it is gone for good, remove {} and start anew", self.path.display());
            return missing(&trouble.unwrap_or(format!("no disk has the file system {}: {forget}", self.uuid)));
        };
        if self.machine.condition(&disk) == Condition::Gone {
            return missing(&format!("the disk {disk} is gone"));
        }
        if let Some(trouble) = trouble {
            return missing(&trouble);
        }
        match files::device_of(&self.path) {
            Ok(device) if device == disk.number => None,
            Err(error) if error.os_error() == Some(Errno::IO.raw_os_error()) => {
                let then = format!("when its pods have ended, unmount {}, and it is mounted anew", self.path.display());
                let message = format!("the file system on {disk} has stopped, as it does when a write fails: {then}");
                Some(self.trouble("PoolStopped", &message))
            }
            _ => missing(&format!("{disk} is not mounted at {}", self.path.display())),
        }
    }

    fn warnings(&self) -> Vec<Trouble> {
        let Some(disk) = self.disk() else { return Vec::new() };
        let mut warnings = Vec::new();
        if let Condition::Unwell(state) = self.machine.condition(&disk) {
            let message = format!("the controller of {disk} is {state}");
            warnings.push(self.trouble("DiskUnwell", &message));
        }
        let Health { smart, error } = self.health();
        if let Some(error) = error {
            warnings.push(self.trouble("DiskSilent", &format!("{disk} does not say how it is: {error}")));
        }
        if let Some(smart) = smart {
            if smart.critical_warning != 0 {
                let words = smart.warnings().join(", ");
                warnings.push(self.trouble("DiskWarning", &format!("{disk} warns: {words}")));
            }
            if smart.percentage_used >= WORN_OUT {
                let message = format!("{disk} has used {} % of its rated life", smart.percentage_used);
                warnings.push(self.trouble("DiskWornOut", &message));
            }
        }
        warnings
    }
}
