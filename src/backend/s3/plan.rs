//! What has to be mounted and how: from the volume's context, its notes, the request and the configuration.

use super::ObjectStorage;
use super::names::{Address, Site};
use super::node::{mount_id, source};
use super::notes::{Notes, State};
use super::parameters::{Attributes, ClassParameters, EndpointParameters, has_flag, mount_group};
use super::services::{PATIENCE, STALL, brought, endpoint_of};
use crate::backend::Stage;
use crate::error::Result;
use crate::objectfs::settings::{Checksums, Consistency, Endpoint, Limit, Settings};
use crate::objectfs::usage::Limits;
use crate::secrets::Secrets;
use crate::volume::Access;

/// How old names and attributes may be, where nothing is said, in milliseconds.
const MAX_AGE: u64 = 1000;
const FILE_MODE: u32 = 0o644;
const DIR_MODE: u32 = 0o755;

/// A mount to be made.
pub(super) struct Plan {
    pub(super) settings: Settings,
    /// What the mount table shows.
    pub(super) source: String,
    /// The pod's group for its volumes.
    pub(super) group: Option<u32>,
}

impl ObjectStorage {
    pub(super) fn plan(&self, stage: &Stage, secrets: &Secrets) -> Result<Plan> {
        let Access::Mount { flags, group, .. } = &stage.capability.access else {
            fail!(Invalid, "object storage has no block volumes");
        };
        let mut attributes = Attributes::parse(&stage.context)?;
        if attributes.bucket.is_none() {
            self.complete(stage, &mut attributes, secrets)?;
        }
        let Some(bucket) = attributes.bucket.clone() else {
            fail!(Invalid, "the volume's attributes have no `bucket`");
        };
        let mut endpoint = self.endpoint_for(&attributes)?;
        endpoint.anonymous = attributes.is_anonymous;
        let credentials = match (brought(secrets)?, &attributes.service) {
            _ if attributes.is_anonymous => None,
            (Some(credentials), _) => Some(credentials),
            (None, Some(service)) => self.credentials(&Site::Named(service.clone()), secrets)?,
            // The first service's keys are for that, and not for what attributes name.
            (None, None) if attributes.endpoint.url.is_none() => match self.services.first() {
                Some(first) => self.credentials(&Site::Named(first.name.clone()), secrets)?,
                None => None,
            },
            (None, None) => None,
        };
        let mount = attributes.mount.clone();
        let mut limits = Limits::default();
        let mut limit = None;
        if let Some(notes) = &attributes.notes {
            let mut asked = endpoint.clone();
            asked.patience = u64::try_from(self.buckets.deadline().as_millis() / 2).unwrap_or(u64::MAX);
            let bucket = self.buckets.open(&asked, credentials.as_ref(), &bucket)?;
            let at = Notes::at(notes, &bucket);
            match at.read()? {
                Some((found, _)) if found.state == State::Ready && found.prefix == attributes.prefix => {}
                Some((found, _)) if found.state == State::Ready => fail!(
                    Invalid,
                    "the notes of {} are those of prefix {:?}, and its attributes say {:?}",
                    stage.id,
                    found.prefix,
                    attributes.prefix
                ),
                _ => fail!(NotFound, "{} does not exist (any more)", stage.id),
            }
            limits = at.limits()?.map(|(limits, _)| limits).unwrap_or_default();
            limit = Some(Limit { bytes: limits.bytes.unwrap_or(u64::MAX), notes: notes.clone() });
        }
        endpoint.patience = mount.patience.unwrap_or(PATIENCE);
        let group = mount_group(group)?;
        let shared = |mode: u32| if group.is_some() { mode | (mode & 0o700) >> 3 } else { mode };
        // As kubelet does it: what is made in a directory gets its group.
        let inherited = if group.is_some() { 0o2000 } else { 0 };
        let id = mount_id(&stage.id);
        let source = source(&bucket, &attributes.prefix, group, &id);
        let settings = Settings {
            id,
            endpoint,
            credentials,
            bucket,
            prefix: attributes.prefix,
            read_only: attributes.is_read_only || stage.capability.mode.is_read_only() || has_flag(flags, "ro"),
            consistency: mount.consistency.unwrap_or(Consistency::Strict),
            uid: mount.uid.unwrap_or(0),
            gid: group.or(mount.gid).unwrap_or(0),
            file_mode: shared(mount.file_mode.unwrap_or(FILE_MODE)),
            dir_mode: shared(mount.dir_mode.unwrap_or(DIR_MODE)) | inherited,
            max_age: limits.max_age.or(mount.max_age).unwrap_or(MAX_AGE),
            staging: self.mounter.staging.clone(),
            cache: self.mounter.cache.clone().filter(|_| !mount.is_uncached),
            cache_size: self.mounter.cache_size,
            memory: limits.memory.or(mount.memory).unwrap_or(self.mounter.memory),
            limit,
        };
        Ok(Plan { settings, source, group })
    }

    /// A volume that Berth made, under its own id and without its attributes: another cluster's, say. Its notes say the rest.
    fn complete(&self, stage: &Stage, attributes: &mut Attributes, secrets: &Secrets) -> Result<()> {
        let Some(address) = Address::of(&stage.id) else {
            fail!(Invalid, "the volume's attributes have no `bucket`");
        };
        let Some(bucket) = self.bucket(&address, secrets)? else {
            fail!(
                Invalid,
                "the volume's attributes have no `bucket`, and service {} is not configured here",
                address.site
            );
        };
        let Some((notes, _)) = Notes::of(&address, &bucket).read()?.filter(|(notes, _)| notes.state == State::Ready)
        else {
            fail!(NotFound, "{} does not exist", stage.id);
        };
        match &address.site {
            Site::Named(name) => attributes.service = Some(name.clone()),
            Site::Given(given) => {
                attributes.endpoint = EndpointParameters {
                    url: Some(given.url.clone()),
                    region: given.region.clone(),
                    path_style: given.path_style,
                    checksums: given.checksums,
                };
            }
        }
        attributes.notes = Some(address.notes());
        attributes.prefix = notes.prefix;
        attributes.mount = ClassParameters::parse(&notes.parameters)?.mount;
        attributes.bucket = Some(address.bucket);
        Ok(())
    }

    /// A service that is configured here is as the configuration says; any other as the attributes say.
    fn endpoint_for(&self, attributes: &Attributes) -> Result<Endpoint> {
        let EndpointParameters { url, region, path_style, checksums } = attributes.endpoint.clone();
        let configured = match &attributes.service {
            Some(name) => self.service(name),
            None if url.is_none() => self.services.first(),
            None => None,
        };
        if let Some(service) = configured {
            return endpoint_of(service);
        }
        if let (Some(name), None, None) = (&attributes.service, &url, &region) {
            fail!(Invalid, "service {name} is not configured here, and the volume's attributes have no `endpoint`");
        }
        // Without an address it is Amazon's.
        let is_aws = url.is_none();
        Ok(Endpoint {
            url,
            region: region.unwrap_or_else(|| "us-east-1".to_owned()),
            path_style: path_style.unwrap_or(!is_aws),
            ca: attributes.ca.clone(),
            checksums: checksums.unwrap_or(if is_aws { Checksums::WhenSupported } else { Checksums::WhenRequired }),
            anonymous: attributes.is_anonymous,
            patience: PATIENCE,
            stall: STALL,
        })
    }
}
