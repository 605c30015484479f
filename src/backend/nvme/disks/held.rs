//! The disks that a part of a pool lies on, looked after.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::nvme::pool::Trouble;
use crate::host::disks::{Condition, Disk, Machine};
use crate::host::smart::{self, Smart};

/// So long a disk may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// A disk that has lasted as long as it was rated for, in percent.
const WORN_OUT: u8 = 100;

/// The disks that a part of a pool lies on.
pub(super) struct Held {
    pub(super) pool: String,
    pub(super) machine: Machine,
    /// Where they were last found. They may be gone.
    wards: Mutex<Vec<Ward>>,
}

/// A disk, and what it has last said about itself.
#[derive(Clone)]
pub(super) struct Ward {
    pub(super) disk: Disk,
    /// `None`: it has not been asked yet, or says nothing.
    pub(super) smart: Option<Smart>,
    /// Why it could not be asked.
    error: Option<String>,
}

impl Held {
    pub(super) fn new(pool: &str, machine: &Machine) -> Self {
        Self { pool: pool.to_owned(), machine: machine.clone(), wards: Mutex::default() }
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Ward>> {
        self.wards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wards(&self) -> Vec<Ward> {
        self.locked().clone()
    }

    pub(super) fn disks(&self) -> Vec<Disk> {
        self.locked().iter().map(|ward| ward.disk.clone()).collect()
    }

    /// It lies on these now. What one of them has said stays.
    pub(super) fn found_on(&self, disks: &[Disk]) {
        let mut wards = self.locked();
        let known = std::mem::take(&mut *wards);
        let ward = |disk: &Disk| {
            let known = known.iter().find(|ward| is_same(&ward.disk, disk)).cloned();
            known.unwrap_or(Ward { disk: disk.clone(), smart: None, error: None })
        };
        *wards = disks.iter().map(ward).collect();
    }

    /// Is it known to lie on these very disks?
    pub(super) fn lies_on(&self, disks: &[Disk]) -> bool {
        let wards = self.locked();
        wards.len() == disks.len() && wards.iter().all(|ward| disks.iter().any(|disk| is_same(&ward.disk, disk)))
    }

    /// Those of its disks that are not there any more.
    pub(super) fn gone(&self) -> Vec<Disk> {
        self.disks().into_iter().filter(|disk| self.machine.condition(disk) == Condition::Gone).collect()
    }

    /// Has each disk say how it is, in bounded time.
    pub(super) fn look_after(&self) {
        for ward in self.wards().into_iter().filter(|ward| self.machine.condition(&ward.disk) != Condition::Gone) {
            let device = ward.disk.path.clone();
            let fresh = match self.machine.ask(&ward.disk, PATIENCE, move || smart::ask(&device)) {
                Ok(smart) => Ward { smart, error: None, ..ward },
                Err(error) => Ward { error: Some(error.to_string()), ..ward },
            };
            let mut wards = self.locked();
            if let Some(place) = wards.iter_mut().find(|place| is_same(&place.disk, &fresh.disk)) {
                *place = fresh;
            }
        }
    }

    pub(super) fn trouble(&self, reason: &'static str, message: &str) -> Trouble {
        Trouble { reason, message: format!("pool {}: {message}", self.pool) }
    }

    /// What is not well with disks that are there.
    pub(super) fn warnings(&self) -> Vec<Trouble> {
        let mut warnings = Vec::new();
        let mut warn = |reason, message: String| warnings.push(self.trouble(reason, &message));
        for Ward { disk, smart, error } in self.wards() {
            if let Condition::Unwell(state) = self.machine.condition(&disk) {
                warn("DiskUnwell", format!("the controller of {disk} is {state}"));
            }
            if let Some(error) = error {
                warn("DiskSilent", format!("{disk} does not say how it is: {error}"));
            }
            let Some(smart) = smart else { continue };
            if smart.critical_warning != 0 {
                warn("DiskWarning", format!("{disk} warns: {}", smart.warnings().join(", ")));
            }
            if smart.percentage_used >= WORN_OUT {
                warn("DiskWornOut", format!("{disk} has used {} % of its rated life", smart.percentage_used));
            }
        }
        warnings
    }
}

/// Not only one of the same name.
fn is_same(one: &Disk, other: &Disk) -> bool {
    (one.number, one.sequence) == (other.number, other.sequence)
}

/// Disks in a sentence.
pub(super) fn list(disks: &[Disk]) -> String {
    disks.iter().map(Disk::to_string).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::super::rules::tests::disk;
    use super::*;

    #[test]
    fn what_a_disk_has_said_is_kept_while_it_is_that_disk() {
        let dir = tempfile::tempdir().unwrap();
        let held = Held::new("fast", &Machine::below(dir.path()));
        let one = disk("nvme0n1");
        held.found_on(std::slice::from_ref(&one));
        assert!(held.warnings().is_empty());
        held.locked()[0].smart = Some(Smart { critical_warning: 4, percentage_used: 100, ..Smart::default() });
        let other = Disk { number: 2, ..disk("nvme1n1") };
        held.found_on(&[other.clone(), one.clone()]);
        let warnings = held.warnings();
        let reasons: Vec<_> = warnings.iter().map(|warning| warning.reason).collect();
        assert_eq!(reasons, ["DiskWarning", "DiskWornOut"]);
        assert_eq!(warnings[0].message, "pool fast: nvme0n1 (serial S1) warns: its reliability is degraded");
        assert!(held.lies_on(&[one.clone(), other.clone()]) && !held.lies_on(std::slice::from_ref(&one)));
        // Another disk has got its name.
        held.found_on(&[Disk { sequence: 2, ..one }]);
        assert!(held.warnings().is_empty());
        // Nothing is there on this machine of files.
        assert_eq!(held.gone().len(), 1);
    }
}
