//! Object storage: buckets, and prefixes in buckets, as file systems.
//!
//! The bucket is the only truth: a volume's notes are objects in it, under a name that is derived from the request's, so a
//! retry finds what an interrupted call left. The node mounts, and hands the mount's descriptor to the mounter, which
//! outlives the driver; what it needs travels in the volume's context and its secret. Nothing here knows gRPC, the
//! runtime, kubelet or other back ends.

mod controller;
mod create;
mod delete;
pub mod doctor;
mod lists;
mod names;
mod node;
mod notes;
mod parameters;
mod plan;
mod services;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use super::Backend;
use crate::config::{Config, Mounter, Service};
use crate::error::Result;
use crate::host::probe::Probes;
use crate::objectfs::store::blocking::{Bucket, Buckets};
use crate::secrets::Secrets;
use names::{Address, Site};

/// The back end.
pub struct ObjectStorage {
    services: Vec<Service>,
    buckets: Buckets,
    mounter: Mounter,
    /// Of a mounter that is started here.
    cgroup: Option<PathBuf>,
    probes: Probes,
    /// How long a call to the mounter may take.
    patience: std::time::Duration,
}

impl ObjectStorage {
    /// The back end over these services. Nothing is connected yet.
    pub fn new(config: &Config, buckets: Buckets) -> Arc<Self> {
        Arc::new(Self::over(config, buckets))
    }

    fn over(config: &Config, buckets: Buckets) -> Self {
        let (services, mounter) = (config.services.clone(), config.mounter.clone());
        let (cgroup, patience) = (config.fuse.cgroup.clone(), config.deadlines.command);
        Self { services, buckets, mounter, cgroup, probes: Probes::default(), patience }
    }

    /// Both sides of it.
    pub fn backend(self: Arc<Self>) -> Backend {
        Backend { controller: self.clone(), node: self }
    }

    /// `None`: no such service is configured.
    fn service(&self, name: &str) -> Option<&Service> {
        self.services.iter().find(|service| service.name == name)
    }

    /// The service of a class or of a volume's attributes.
    ///
    /// # Errors
    /// `Invalid`, with the names of those that are configured.
    fn site_of(&self, service: Option<&str>, endpoint: Option<Site>) -> Result<Site> {
        let known = || match self.services.as_slice() {
            [] => "none".to_owned(),
            all => all.iter().map(|service| service.name.as_str()).collect::<Vec<_>>().join(", "),
        };
        match (service, endpoint, self.services.first()) {
            (Some(name), _, _) if self.service(name).is_some() => Ok(Site::Named(name.to_owned())),
            (Some(name), _, _) => fail!(Invalid, "service {name:?} is not configured; configured: {}", known()),
            (None, Some(site), _) => Ok(site),
            (None, None, Some(first)) => Ok(Site::Named(first.name.clone())),
            (None, None, None) => {
                fail!(
                    Invalid,
                    "nobody says where the bucket is: no service is configured, and there is no \"endpoint\""
                )
            }
        }
    }

    /// The bucket of a volume, asked on the account's behalf. `None`: its service is not configured.
    fn bucket(&self, address: &Address, secrets: &Secrets) -> Result<Option<Bucket>> {
        self.bucket_at(&address.site, &address.bucket, secrets)
    }

    fn bucket_at(&self, site: &Site, bucket: &str, secrets: &Secrets) -> Result<Option<Bucket>> {
        let Some(mut endpoint) = self.endpoint(site)? else { return Ok(None) };
        endpoint.patience = u64::try_from(self.buckets.deadline().as_millis() / 2).unwrap_or(u64::MAX);
        let credentials = self.credentials(site, secrets)?;
        Ok(Some(self.buckets.open(&endpoint, credentials.as_ref(), bucket)?))
    }
}
