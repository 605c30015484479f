//! Cluster storage: CephFS subvolumes.
//!
//! The manager's `volumes` module is the only truth: a volume is a subvolume whose name is derived from the request's,
//! with notes in its metadata, so a retry finds what an interrupted call left. The controller speaks to Ceph through
//! `librados`; the node mounts, and asks neither the manager nor the library: all that it needs travels in the
//! volume's context and its own secret. Nothing here knows gRPC, kubelet or other back ends.

mod control;
mod controller;
mod copies;
pub mod doctor;
mod group;
mod lists;
mod mount;
mod names;
mod node;
mod notes;
mod parameters;
mod snapshots;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Backend;
use crate::config::{self, Cluster};
use crate::error::{Error, ErrorKind, Result};
use crate::secrets::Secrets;
use crate::telemetry::Metrics;
use crate::volume::VolumeId;
use control::{Account, Control, Rados};
use group::Group;
use names::Subvolume;

/// More volumes than this are not remembered as complete.
const SETTLED: usize = 10_000;

/// The back end.
pub struct Cephfs {
    clusters: Vec<Cluster>,
    control: Control,
    /// Volumes that are known to have their notes, so that a repeated Create need not look.
    settled: Mutex<BTreeSet<VolumeId>>,
    /// Which volume has which snapshot, as far as is known.
    hints: Mutex<snapshots::SnapshotHints>,
    mounts: mount::Mounts,
}

impl Cephfs {
    /// The back end over these clusters. Nothing is connected yet.
    pub fn new(config: &config::Config, metrics: Arc<Metrics>) -> Arc<Self> {
        let control = Control::new(Arc::new(Rados::default()), config.deadlines.ceph, metrics);
        Arc::new(Self::over(control, config))
    }

    fn over(control: Control, config: &config::Config) -> Self {
        let mounts = mount::Mounts::new(config.fuse.cgroup.clone(), config.deadlines.ceph);
        Self { clusters: config.clusters.clone(), control, settled: Mutex::default(), hints: Mutex::default(), mounts }
    }

    /// Both sides of it.
    pub fn backend(self: Arc<Self>) -> Backend {
        Backend { controller: self.clone(), node: self }
    }

    /// The cluster of a class.
    ///
    /// # Errors
    /// `Invalid`, with the names of those that are configured.
    fn cluster_of(&self, name: Option<&str>) -> Result<&Cluster> {
        let known = || self.clusters.iter().map(|cluster| cluster.name.as_str()).collect::<Vec<_>>().join(", ");
        match (name, self.clusters.as_slice()) {
            (None, [only]) => Ok(only),
            (None, _) => fail!(Invalid, "parameter \"cluster\" is needed, since there are several: {}", known()),
            (Some(name), clusters) => match clusters.iter().find(|cluster| cluster.name == name) {
                Some(cluster) => Ok(cluster),
                None => fail!(Invalid, "cluster {name:?} is not configured; configured: {}", known()),
            },
        }
    }

    /// `None`: no such cluster is configured.
    fn cluster(&self, name: &str) -> Option<&Cluster> {
        self.clusters.iter().find(|cluster| cluster.name == name)
    }

    fn hints(&self) -> MutexGuard<'_, snapshots::SnapshotHints> {
        self.hints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_settled(&self, id: &VolumeId) -> bool {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    fn settle(&self, id: &VolumeId) {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        if settled.len() >= SETTLED {
            settled.clear();
        }
        settled.insert(id.clone());
    }

    fn unsettle(&self, id: &VolumeId) {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// The group that the subvolume lies in, asked on the account's behalf.
    fn group<'a>(&'a self, cluster: &'a Cluster, account: &'a Account, subvolume: &Subvolume) -> Group<'a> {
        let (filesystem, name) = (subvolume.filesystem.clone(), subvolume.group.clone());
        Group { control: &self.control, cluster, account, filesystem, name }
    }
}

impl Account {
    /// The account that a call brings, or else the one that the configuration has for calls that bring none.
    ///
    /// # Errors
    /// `Denied` when there is neither.
    fn of(secrets: &Secrets, cluster: &Cluster) -> Result<Self> {
        if let Some(account) = Self::brought(secrets)? {
            return Ok(account);
        }
        let Some(configured) = &cluster.account else {
            fail!(
                Denied,
                "the call brings no secret with userID and userKey, and cluster {} has no user and keyFile in the configuration",
                cluster.name
            );
        };
        Self::configured(configured)
    }

    fn configured(account: &config::Account) -> Result<Self> {
        let file = &account.key_file;
        let key = std::fs::read_to_string(file).map_err(|error| {
            let what = format!("cannot read the key of client.{} in {}", account.user, file.display());
            Error::caused(ErrorKind::Precondition, what, error)
        })?;
        Self::new(&account.user, key.trim())
    }

    /// `userID` and `userKey`; `adminID` and `adminKey` are ceph-csi's older names.
    fn brought(secrets: &Secrets) -> Result<Option<Self>> {
        for (id, key) in [("userID", "userKey"), ("adminID", "adminKey")] {
            match (secrets.reveal(id), secrets.reveal(key)) {
                (Some(id), Some(key)) => return Self::new(id, key.trim()).map(Some),
                (None, None) => {}
                (Some(_), None) => fail!(Denied, "the secret has {id}, but no {key}"),
                (None, Some(_)) => fail!(Denied, "the secret has {key}, but no {id}"),
            }
        }
        Ok(None)
    }

    fn new(user: &str, key: &str) -> Result<Self> {
        let user = user.strip_prefix("client.").unwrap_or(user);
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if user.is_empty() || !user.chars().all(fits) {
            fail!(Denied, "the secret's userID is not a Ceph user: write it without quotes and without `client.`");
        }
        let base64 = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=');
        if key.is_empty() || !key.chars().all(base64) {
            fail!(Denied, "the secret's userKey is not a Ceph key, as `ceph auth get-key` prints it");
        }
        Ok(Self { user: user.to_owned(), key: key.to_owned() })
    }
}

/// So long a call waits for a copy before it says how far it is.
const COPY_PATIENCE: Duration = Duration::from_secs(30);
