//! Cluster storage at places on this machine.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use super::Cephfs;
use super::control::Account;
use super::mount::{self, Health, Plan};
use super::names::Address;
use crate::backend::{Node, NodeHealth, Stage, Stats};
use crate::error::Result;
use crate::host::mounts;
use crate::host::probe::Answer;
use crate::secrets::Secrets;
use crate::volume::{
    Access, Health as How, HealthProblem, MountFlag, MountPath, StorageHealth, StorageProblem, Usage, VolumeId,
};

/// So long a monitor may take to accept a connection.
const MONITOR: Duration = Duration::from_secs(2);

impl Node for Cephfs {
    fn ensure_staged(&self, stage: &Stage, secrets: &Secrets) -> Result<()> {
        let Some(address) = Address::of(&stage.id) else {
            fail!(NotFound, "{} is no volume of cluster storage", stage.id);
        };
        let plan = self.plan(stage, address)?;
        let Some(account) = Account::brought(secrets)? else {
            fail!(
                Denied,
                "the call brings no secret with userID and userKey: the class needs csi.storage.k8s.io/node-stage-secret-name"
            );
        };
        self.mounts.ensure_mounted(&plan, &account, &stage.path)
    }

    fn ensure_unstaged(&self, id: &VolumeId, path: &MountPath) -> Result<()> {
        self.mounts.ensure_unmounted(id, path.as_path())
    }

    fn ensure_alive(&self, stage: &Stage, target: &MountPath, secrets: &Secrets) -> Result<()> {
        let (id, staging) = (&stage.id, &stage.path);
        if let Some(why) = self.death(id, staging.as_path())? {
            if Account::brought(secrets)?.is_none() {
                fail!(
                    Precondition,
                    "the mount of {id} at {staging} is dead ({why}) and can't be made again without a key: give the class csi.storage.k8s.io/node-publish-secret-name, or delete every pod that uses it on this node"
                );
            }
            self.ensure_staged(stage, secrets)?;
        }
        while let Some(why) = self.death(id, target.as_path())? {
            tracing::warn!(volume.id = %id, %why, path = %target, "what was published is dead: taken away");
            mounts::detach(target.as_path())?;
        }
        Ok(())
    }

    fn unmount(&self, target: &Path) -> Result<()> {
        self.mounts.unmount(target)
    }

    fn is_at(&self, id: &VolumeId, path: &Path) -> Result<bool> {
        mount::is_at(id, path)
    }

    fn stats(&self) -> Option<&dyn Stats> {
        Some(self)
    }
    fn health(&self) -> Option<&dyn NodeHealth> {
        Some(self)
    }
}

impl Cephfs {
    /// What has to be mounted, from the volume's context, and from the configuration where that knows better.
    fn plan<'a>(&self, stage: &'a Stage, address: Address) -> Result<Plan<'a>> {
        let get = |key: &str| stage.context.get(key).map(String::as_str).unwrap_or_default();
        let path = match &address {
            Address::Path { .. } => get("path"),
            Address::Subvolume(_) if get("path").is_empty() => fail!(
                Invalid,
                "the volume's attributes have no `path`: write what `ceph fs subvolume getpath` prints for {}",
                stage.id
            ),
            Address::Subvolume(_) => get("path"),
        };
        // A plain path may be given by the id alone.
        let path = match (&address, path) {
            (Address::Path { .. }, "") => stage.id.as_str().split_once("/@").map_or("", |(_, path)| path),
            (_, path) => path,
        };
        if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
            fail!(Invalid, "path {path:?} of the volume's attributes is not absolute");
        }
        let inner = get("snapshotPath");
        if !inner.is_empty() && !is_in_a_snapshot(inner) {
            fail!(Invalid, "snapshotPath {inner:?} of the volume's attributes is not .snap/SNAPSHOT/FOLDER");
        }
        let is_own = inner.is_empty() && address.covers(path);
        let is_snapshot = !inner.is_empty()
            && matches!(&address, Address::Subvolume(volume) if path.starts_with(&format!("/volumes/{}/", volume.group)));
        if !is_own && !is_snapshot {
            fail!(Invalid, "path {path:?} of the volume's attributes is not one of volume {}", stage.id);
        }
        let monitors = match self.cluster(address.cluster()) {
            Some(cluster) => cluster.monitors.join(","),
            None => get("monitors").to_owned(),
        };
        if monitors.is_empty() {
            fail!(
                Invalid,
                "cluster {} is not configured here, and the volume's attributes have no `monitors`",
                address.cluster()
            );
        }
        let flags: &[MountFlag] = match &stage.capability.access {
            Access::Mount { flags, .. } => flags,
            Access::Block => fail!(Invalid, "cluster storage has no block volumes"),
        };
        Ok(Plan { id: &stage.id, address, fsid: get("fsid"), monitors, path, inner, flags })
    }

    /// Why the volume's mount at this path will never work again, if that is so.
    fn death(&self, id: &VolumeId, path: &Path) -> Result<Option<String>> {
        if !mount::is_at(id, path)? {
            return Ok(None);
        }
        Ok(match self.mounts.health(path)? {
            Health::Dead(why) => Some(why),
            Health::Alive | Health::Silent => None,
        })
    }
}

/// Without that, it would show what other volumes of the group hold now.
fn is_in_a_snapshot(inner: &str) -> bool {
    let parts: Vec<_> = inner.split('/').collect();
    let is_plain = |part: &&str| !matches!(*part, "" | "." | ".." | ".snap");
    matches!(parts.as_slice(), [".snap", rest @ ..] if rest.len() == 2 && rest.iter().all(is_plain))
}

impl Stats for Cephfs {
    fn usage(&self, id: &VolumeId, path: &Path) -> Result<Option<Usage>> {
        if !mount::is_at(id, path)? {
            return Ok(None);
        }
        match self.mounts.usage(path)? {
            Answer::Alive([bytes, inodes]) => Ok(Some(Usage::Mount { bytes, inodes })),
            Answer::Silent => {
                fail!(Unreachable, "Ceph does not answer for {}: no active MDS, or no OSD?", path.display())
            }
            // It stays: a container that starts now must not write into the empty directory below.
            Answer::Dead(error) => fail!(
                Precondition,
                "the mount of {id} at {} is dead ({error}): it is made again when a pod that uses it starts",
                path.display()
            ),
        }
    }
}

impl NodeHealth for Cephfs {
    fn volume(&self, id: &VolumeId, path: Option<&Path>) -> Result<Option<Vec<HealthProblem>>> {
        let Some(path) = path else {
            let places = mounts::places_where(|line| mount::is_of(id, line))?;
            return places.first().map_or(Ok(None), |place| self.volume(id, Some(place)));
        };
        if !mount::is_at(id, path)? {
            return Ok(None);
        }
        let problem = |reason, message| vec![HealthProblem { status: How::Inaccessible, reason, message }];
        Ok(Some(match self.mounts.health(path)? {
            Health::Alive => Vec::new(),
            Health::Dead(why) => problem("MountDead", format!("the mount at {} is dead: {why}", path.display())),
            Health::Silent => problem("NotAnswering", format!("Ceph does not answer for {}", path.display())),
        }))
    }

    fn storage(&self, _: &Secrets) -> Result<Vec<StorageProblem>> {
        let reaches = |monitor: &String| {
            let address = monitor.trim_start_matches("v1:").trim_start_matches("v2:");
            let mut addresses = address.to_socket_addrs().into_iter().flatten();
            addresses.any(|address| TcpStream::connect_timeout(&address, MONITOR).is_ok())
        };
        let lost = self.clusters.iter().filter(|cluster| !cluster.monitors.iter().any(reaches));
        let names: Vec<_> = lost.map(|cluster| cluster.name.as_str()).collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let message = format!("no monitor can be reached from this node of: {}", names.join(", "));
        Ok(vec![StorageProblem { status: StorageHealth::Unreachable, reason: "MonitorsUnreachable", message }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_volume_shows_instead_of_itself_lies_in_a_snapshot() {
        assert!(is_in_a_snapshot(".snap/snap-1/0b5c6b43-6b64-4f44-a0c3-a3a4f0e0f1d2"));
        for bad in [
            "u",
            "vol-1/u",
            ".",
            ".snap",
            ".snap/s",
            ".snap/../u",
            ".snap/./u",
            ".snap//u",
            "/.snap/s/u",
            ".snap/s/u/x",
        ] {
            assert!(!is_in_a_snapshot(bad), "{bad}");
        }
    }
}
