//! Limits of I/O in force: `io.max` in the control group of each pod that uses a volume, for the volume's own device.
//!
//! kubelet may publish a volume before it makes the pod's group, so what can't be done at once is tried again in the
//! background for as long as the pod has the volume. Nothing has to be taken back: the group ends with the pod.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::descriptor::{Contents, VolumeDescriptor};
use super::limits::Limits;
use super::{Nvme, Shown};
use crate::backend::Modification;
use crate::error::{ErrorKind, Result};
use crate::host::{cgroups, files, mounts};
use crate::secrets::Secrets;
use crate::volume::{Parameters, VolumeId};

/// A pod's group comes with the pod's sandbox, which may have to wait for images.
const PATIENCE: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_millis(200);

/// # Errors
/// `Invalid`: all directories of a disk share its queue, and so would the limit.
pub(super) fn check(descriptor: &VolumeDescriptor, limits: Limits) -> Result<()> {
    if matches!(descriptor.contents, Contents::Directory { .. }) && !limits.is_none() {
        fail!(
            Invalid,
            "{} has the carve directory: its limit would hold for all directories of its disk. Use the carve lvm or image",
            descriptor.id
        );
    }
    Ok(())
}

impl Modification for Nvme {
    fn ensure_modified(&self, id: &VolumeId, mutable: &Parameters, secrets: &Secrets) -> Result<()> {
        let Some(found) = self.find_volume(id.as_str())? else { fail!(NotFound, "volume {id} does not exist") };
        let mut descriptor = found.descriptor()?;
        let limits = descriptor.limits.changed_by(mutable)?;
        check(&descriptor, limits)?;
        if limits != descriptor.limits {
            descriptor.limits = limits;
            self.with_backing(found, secrets, |backing| backing.write(&descriptor))?;
        }
        self.note_limits(&descriptor);
        // Also when they were so already: the call before may have died in between. Lifting them, too.
        for (pod, device) in self.users(id.as_str())? {
            self.limit(&pod, device, limits)?;
        }
        Ok(())
    }
}

impl Nvme {
    /// A pod has got the volume at this path: its limits are put in force, now or as soon as the pod has a control group.
    /// Asks neither disk nor LVM: staging has told what they are.
    ///
    /// # Errors
    /// `Precondition` where there is no io controller.
    pub(super) fn ensure_limited(self: &Arc<Self>, id: &str, target: &Path) -> Result<()> {
        let limits = match self.known_limits().get(id) {
            Some(limits) if limits.is_none() => return Ok(()),
            known => known.copied(),
        };
        let Some(limits) = limits else {
            // Staged by a driver that was here before.
            self.limit_later(id);
            return Ok(());
        };
        let Some(pod) = pod_of(target) else {
            tracing::warn!(volume.id = id, path = %target.display(), "this is no pod's path: its limits of I/O are not in force");
            return Ok(());
        };
        let Some((_, Shown::Device(device))) = self.volume_at_path(target)? else { return Ok(()) };
        let Some(device) = files::device_number(device.path())? else { return Ok(()) };
        if !self.limit(&pod, device, limits)? {
            self.limit_later(id);
        }
        Ok(())
    }

    /// What a volume's limits are, from now on.
    pub(super) fn note_limits(&self, descriptor: &VolumeDescriptor) {
        self.known_limits().insert(descriptor.id.clone(), descriptor.limits);
    }

    fn known_limits(&self) -> MutexGuard<'_, BTreeMap<String, Limits>> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the limits of every volume that pods have in force. After a restart of the driver that may have been left undone.
    pub(super) fn limit_all(self: &Arc<Self>) -> Result<()> {
        for id in self.ids_after(super::Sort::Volume, None, usize::MAX)?.into_keys() {
            let limited = self.find_volume(&id).ok().flatten().and_then(|found| found.descriptor().ok());
            if limited.is_some_and(|descriptor| !descriptor.limits.is_none()) {
                self.limit_later(&id);
            }
        }
        Ok(())
    }

    /// Puts the limits that are known in force again: whoever rearranges control groups, as systemd does, may have lifted them.
    pub(super) fn renew_limits(&self) {
        let limited = |(id, limits): (&String, &Limits)| (!limits.is_none()).then(|| id.clone());
        let ids: Vec<_> = self.known_limits().iter().filter_map(limited).collect();
        for id in ids {
            match self.limit_users(&id) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => drop(self.known_limits().remove(&id)),
                Err(error) => tracing::warn!(volume.id = id, %error, "cannot put its limits of I/O in force"),
            }
        }
    }

    /// Tries until every pod that has the volume is limited, or none has it any more.
    fn limit_later(self: &Arc<Self>, id: &str) {
        let (nvme, id) = (self.clone(), id.to_owned());
        let work = move || {
            let end = Instant::now() + PATIENCE;
            loop {
                match nvme.limit_users(&id) {
                    Ok(true) => break,
                    Ok(false) if Instant::now() < end => {}
                    Ok(false) => {
                        tracing::error!(
                            volume.id = id,
                            "a pod has the volume and no control group: its limits of I/O are not in force"
                        );
                        break;
                    }
                    Err(error) if error.kind() == ErrorKind::NotFound => break,
                    Err(error) => {
                        tracing::error!(volume.id = id, %error, "cannot put its limits of I/O in force");
                        break;
                    }
                }
                std::thread::sleep(PAUSE);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("limits".to_owned()).spawn(work) {
            tracing::error!(%error, "cannot start a thread for limits of I/O");
        }
    }

    fn limit_users(&self, id: &str) -> Result<bool> {
        let Some(found) = self.find_volume(id)? else { fail!(NotFound, "volume {id} does not exist") };
        let descriptor = found.descriptor()?;
        self.note_limits(&descriptor);
        let limits = descriptor.limits;
        let mut all = true;
        for (pod, device) in self.users(id)? {
            all &= self.limit(&pod, device, limits)?;
        }
        Ok(all)
    }

    /// The pods that have the volume, and the number of its device. Reads the whole mount table.
    fn users(&self, id: &str) -> Result<BTreeSet<(String, u64)>> {
        let Some(device) = self.find_volume(id)?.map(|found| found.device()).transpose()?.flatten() else {
            return Ok(BTreeSet::new());
        };
        let Some(number) = files::device_number(device.path())? else { return Ok(BTreeSet::new()) };
        let places = mounts::users_of_device(device.path())?;
        Ok(places.iter().filter_map(|place| Some((pod_of(place)?, number))).collect())
    }

    /// `false`: the pod has no control group yet.
    fn limit(&self, pod: &str, device: u64, limits: Limits) -> Result<bool> {
        let groups = cgroups::pod_groups(&self.cgroups, pod)?;
        for group in &groups {
            match cgroups::set_limits(group, device, limits.of_group()) {
                // The pod ends just now.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                set => set?,
            }
        }
        Ok(!groups.is_empty())
    }
}

/// The UID in a path of kubelet's: `.../pods/UID/volumes/...` or `.../pods/UID/volumeDevices/...`, or that of a block volume,
/// `.../plugins/kubernetes.io/csi/volumeDevices/publish/NAME/UID`.
fn pod_of(target: &Path) -> Option<String> {
    let parts: Vec<_> = target.components().filter_map(|part| part.as_os_str().to_str()).collect();
    let of_pod =
        parts.windows(3).find(|parts| parts[0] == "pods" && parts[2].starts_with("volume")).map(|parts| parts[1]);
    let of_device = || {
        let at = parts.windows(2).position(|parts| parts == ["volumeDevices", "publish"])?;
        parts.get(at + 3).copied()
    };
    of_pod.or_else(of_device).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_known_by_kubelets_paths() {
        for (path, pod) in [
            ("/var/lib/kubelet/pods/7f-1/volumes/kubernetes.io~csi/pvc-1/mount", Some("7f-1")),
            ("/var/lib/kubelet/pods/7f-1/volumeDevices/kubernetes.io~csi/pvc-1", Some("7f-1")),
            ("/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1/7f-1", Some("7f-1")),
            ("/var/lib/kubelet/plugins/kubernetes.io/csi/nvme.csi.berth.dev/0a/globalmount", None),
            ("/var/lib/kubelet/pods/7f-1/etc-hosts", None),
            ("/mnt/here", None),
        ] {
            assert_eq!(pod_of(Path::new(path)).as_deref(), pod, "{path}");
        }
    }
}
