//! Object storage at places on this machine.
//!
//! There is one FUSE mount for each volume and node, at its staging path. The mount table says whose a mount is; the mounter
//! says how it is doing. The driver only mounts and hands the descriptor over: it can go away at any time.

use std::ffi::OsStr;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::ObjectStorage;
use super::parameters::mount_group;
use super::plan::Plan;
use super::services::{brought, endpoint_of};
use crate::backend::{Node, NodeHealth, Stage, Stats};
use crate::config;
use crate::error::{ErrorKind, Result};
use crate::host::fuse::{self, MountOptions};
use crate::host::probe::Answer;
use crate::host::{Errno, mounts, paths};
use crate::mounter::Users;
use crate::mounter::client::{Mounter, Status};
use crate::mounter::start::{Start, start_detached};
use crate::secrets::Secrets;
use crate::volume::{Access, Health as How, HealthProblem, MountPath, StorageHealth, StorageProblem, Usage, VolumeId};

/// A question that the mounter answers from memory.
pub(super) const QUESTION: Duration = Duration::from_secs(5);
/// So long a mount may take to say that it is alive.
const PATIENCE: Duration = Duration::from_secs(5);
/// So long a service may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(2);

/// The type of our mounts in the mount table.
const TYPE: &str = "fuse.berth";

/// What a volume's mount is called here: a plain name, whatever the id.
pub fn mount_id(id: &VolumeId) -> String {
    let hash = Sha256::digest(id.as_str().as_bytes());
    hash.iter().take(16).fold("v".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// What the mount table shows as the source of a mount. The last parts say whose it is.
pub(super) fn source(bucket: &str, prefix: &str, group: Option<u32>, mount_id: &str) -> String {
    format!("s3://{bucket}/{prefix}?{}{}", of_group(group), tag(mount_id))
}

fn of_group(group: Option<u32>) -> String {
    group.map(|group| format!("group={group}&")).unwrap_or_default()
}

fn tag(mount_id: &str) -> String {
    format!("volume={mount_id}")
}

/// The source of a mount, of its line in the mount table.
fn source_of(line: &str) -> PathBuf {
    let shown = line.split_once(" - ").and_then(|(_, after)| after.split(' ').nth(1)).unwrap_or_default();
    mounts::unescaped(OsStr::new(shown))
}

/// Is this line of the mount table one of the volume's mounts?
fn is_of(id: &VolumeId, line: &str) -> bool {
    let mut fields = line.split_once(" - ").map_or("", |(_, after)| after).split(' ');
    fields.next() == Some(TYPE) && fields.next().is_some_and(|source| source.ends_with(&tag(&mount_id(id))))
}

/// Where the volume is mounted on this machine.
pub(super) fn places_of(id: &VolumeId) -> Result<Vec<PathBuf>> {
    mounts::places_where(|line| is_of(id, line))
}

fn is_at(id: &VolumeId, path: &Path) -> Result<bool> {
    Ok(mounts::line_of(path)?.is_some_and(|line| is_of(id, &line)))
}

/// A volume's files belong to one group on a node: that of the first pod.
fn check_group(id: &VolumeId, group: Option<u32>, path: &Path) -> Result<()> {
    let line = mounts::line_of(path)?.unwrap_or_default();
    let wanted = format!("?{}{}", of_group(group), tag(&mount_id(id)));
    let shown = source_of(&line);
    if !shown.as_os_str().as_encoded_bytes().ends_with(wanted.as_bytes()) {
        let wanted = group.map_or("none".to_owned(), |group| group.to_string());
        fail!(
            Precondition,
            "the volume is in use on this node with another fsGroup ({}), and this pod wants {wanted}: give both the same",
            shown.display()
        );
    }
    Ok(())
}

impl Node for ObjectStorage {
    fn ensure_staged(&self, stage: &Stage, secrets: &Secrets) -> Result<()> {
        let plan = self.plan(stage, secrets)?;
        let path = stage.path.as_path();
        self.ensure_mounter()?;
        while is_at(&stage.id, path)? {
            match self.death(&stage.id, path)? {
                None => {
                    check_group(&stage.id, plan.group, path)?;
                    return self.compare(&plan, path);
                }
                Some(why) => {
                    tracing::warn!(volume.id = %stage.id, %why, path = %stage.path, "what was staged is dead: mounted anew");
                    mounts::detach(path)?;
                }
            }
        }
        self.check_elsewhere(stage, &plan)?;
        self.attach(&plan, path)
    }

    fn ensure_unstaged(&self, id: &VolumeId, path: &MountPath) -> Result<()> {
        // Refused before anything is taken away: otherwise this would wait for what only an unpublish can end.
        let others = match is_at(id, path.as_path())? {
            true => mounts::binds_of(path.as_path())?,
            false => places_of(id)?,
        };
        if let Some(other) = others.first() {
            fail!(Precondition, "{id} is still published at {}", other.display());
        }
        let mut was_there = false;
        while is_at(id, path.as_path())? {
            was_there = true;
            mounts::unmount_top(path.as_path())?;
        }
        let name = mount_id(id);
        match self.mounter_for(self.patience).ended(&name) {
            // Whoever was never here left nothing: there need not be a mounter.
            Err(error)
                if error.kind() == ErrorKind::Unreachable
                    && !was_there
                    && !self.mounter.staging.join(&name).exists() =>
            {
                Ok(())
            }
            result => result,
        }
    }

    fn ensure_alive(&self, stage: &Stage, target: &MountPath, secrets: &Secrets) -> Result<()> {
        let (id, staging) = (&stage.id, stage.path.as_path());
        if is_at(id, staging)? {
            self.ensure_mounter()?;
            if let Access::Mount { group, .. } = &stage.capability.access {
                check_group(id, mount_group(group)?, staging)?;
            }
            match (self.death(id, staging)?, brought(secrets)?) {
                (Some(_), _) => self.ensure_staged(stage, secrets)?,
                (None, Some(credentials)) => match self.mounter_for(QUESTION).renew(&mount_id(id), &credentials) {
                    // The worker goes on with those that it has.
                    Err(error) if error.kind() == ErrorKind::Unreachable => {
                        tracing::warn!(%error, volume.id = %id, "its credentials are not renewed");
                    }
                    result => result?,
                },
                (None, None) => {}
            }
        }
        while is_at(id, target.as_path())?
            && let Some(why) = self.disconnection(target.as_path())?
        {
            tracing::warn!(volume.id = %id, %why, path = %target, "what was published is dead: taken away");
            mounts::detach(target.as_path())?;
        }
        Ok(())
    }

    fn is_at(&self, id: &VolumeId, path: &Path) -> Result<bool> {
        is_at(id, path)
    }

    fn takes_mount_group(&self) -> bool {
        true
    }
    fn stats(&self) -> Option<&dyn Stats> {
        Some(self)
    }
    fn health(&self) -> Option<&dyn NodeHealth> {
        Some(self)
    }
}

impl ObjectStorage {
    fn mounter_for(&self, deadline: Duration) -> Mounter {
        Mounter::new(&self.mounter.socket, deadline)
    }

    /// Why the volume's mount at this path will never work again, if that is so.
    fn death(&self, id: &VolumeId, path: &Path) -> Result<Option<String>> {
        if let Some(why) = self.disconnection(path)? {
            return Ok(Some(why));
        }
        // Without a mounter nothing is known: the worker may well be alive.
        match self.mounter_for(QUESTION).status(&mount_id(id)) {
            Ok(Some(Status { worker: Some(_), .. })) => Ok(None),
            Ok(Some(_)) => Ok(Some("its worker has ended".to_owned())),
            Ok(None) => Ok(Some("no mounter knows it".to_owned())),
            Err(error) if error.kind() == ErrorKind::Unreachable => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Why nobody serves this mount any more, if that is so. A worker that answers with an error, say since its credentials
    /// have expired, is alive.
    fn disconnection(&self, path: &Path) -> Result<Option<String>> {
        let gone = [Errno::NOTCONN, Errno::CONNABORTED];
        Ok(match self.probes.is_alive(path, PATIENCE)? {
            Answer::Dead(error) if gone.iter().any(|one| error.raw_os_error() == Some(one.raw_os_error())) => {
                Some(error.to_string())
            }
            _ => None,
        })
    }

    /// The volume is there already: as it is wanted?
    fn compare(&self, plan: &Plan, path: &Path) -> Result<()> {
        let settings = &plan.settings;
        let line = mounts::line_of(path)?.unwrap_or_default();
        let is_read_only = line.split(' ').nth(5).is_some_and(|options| options.split(',').any(|one| one == "ro"));
        if is_read_only != settings.read_only {
            let how = if is_read_only { "read-only" } else { "writable" };
            fail!(Conflict, "the volume is already at {}, but {how}", path.display());
        }
        let shown = source_of(&line);
        if shown != Path::new(&plan.source) {
            fail!(Conflict, "{} is already at {}, and not {}", shown.display(), path.display(), plan.source);
        }
        match &settings.credentials {
            Some(credentials) => self.mounter_for(QUESTION).renew(&settings.id, credentials),
            None => Ok(()),
        }
    }

    /// One mount for each volume and node.
    fn check_elsewhere(&self, stage: &Stage, plan: &Plan) -> Result<()> {
        for place in places_of(&stage.id)? {
            // What pods that were there before have of a dead mount stays until they go: nothing writes below it.
            if self.disconnection(&place)?.is_none() {
                fail!(Precondition, "{} is staged at {} already", stage.id, place.display());
            }
        }
        // What an earlier mount has not yet brought to the bucket has to be there before another one begins. Its own keys may
        // be good no more.
        if let Some(credentials) = &plan.settings.credentials
            && let Err(error) = self.mounter_for(QUESTION).renew(&plan.settings.id, credentials)
            && !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Precondition)
        {
            return Err(error);
        }
        self.mounter_for(self.patience).ended(&plan.settings.id)
    }

    /// Starts one where there is none and the configuration says so.
    fn ensure_mounter(&self) -> Result<()> {
        let config::Mounter { socket, starts, users: (first, last), .. } = &self.mounter;
        if !starts || self.mounter_for(QUESTION).is_there() {
            return Ok(());
        }
        let users = Some(Users { first: *first, last: *last });
        start_detached(&Start { cgroup: self.cgroup.clone(), users, ..Start::at(socket) }, self.patience)
    }

    /// Mounts, and hands the descriptor over; nothing stays if that fails.
    fn attach(&self, plan: &Plan, path: &Path) -> Result<()> {
        let (place, made) = mounts::ensure_vacant(path, paths::Kind::Directory)?;
        drop(place);
        let undo = |is_mounted: bool| {
            if is_mounted {
                // Without its descriptor, or with a worker that sees that it is gone, the file system ends.
                let _ = mounts::detach(path);
            }
            if made {
                let _ = paths::remove_empty(path);
            }
        };
        let options = MountOptions { read_only: plan.settings.read_only, ..MountOptions::default() };
        let descriptor = fuse::mount(&plan.source, path, &options).inspect_err(|_| undo(false))?;
        self.mounter_for(self.patience).serve(&plan.settings, path, descriptor).inspect_err(|_| undo(true))
    }
}

impl Stats for ObjectStorage {
    fn usage(&self, id: &VolumeId, path: &Path) -> Result<Option<Usage>> {
        if !is_at(id, path)? {
            return Ok(None);
        }
        match self.probes.usage(path, PATIENCE)? {
            Answer::Alive([bytes, inodes]) => Ok(Some(Usage::Mount { bytes, inodes })),
            Answer::Silent => fail!(Unreachable, "the worker of {} does not answer", path.display()),
            // It stays: a container that starts now must not write into the empty directory below.
            Answer::Dead(error) => fail!(
                Precondition,
                "the mount of {id} at {} is dead ({error}): it is made again when a pod that uses it starts",
                path.display()
            ),
        }
    }
}

impl NodeHealth for ObjectStorage {
    fn volume(&self, id: &VolumeId, path: Option<&Path>) -> Result<Option<Vec<HealthProblem>>> {
        let is_here = match path {
            Some(path) => is_at(id, path)?,
            None => !places_of(id)?.is_empty(),
        };
        if !is_here {
            return Ok(None);
        }
        let lost = |reason, message| vec![HealthProblem { status: How::Inaccessible, reason, message }];
        Ok(Some(match self.mounter_for(QUESTION).status(&mount_id(id)) {
            Err(error) => {
                vec![HealthProblem { status: How::Degraded, reason: "MounterGone", message: error.to_string() }]
            }
            Ok(None) => lost("MountDead", "no mounter knows this mount".to_owned()),
            Ok(Some(Status { worker: None, .. })) => {
                lost("WorkerGone", "the worker of this mount has ended".to_owned())
            }
            Ok(Some(_)) => Vec::new(),
        }))
    }

    fn storage(&self, _: &Secrets) -> Result<Vec<StorageProblem>> {
        let mut problems = Vec::new();
        if let Err(error) = self.mounter_for(QUESTION).list()
            && !self.mounter.starts
        {
            let (status, message) = (StorageHealth::Unreachable, error.to_string());
            problems.push(StorageProblem { status, reason: "MounterUnreachable", message });
        }
        let lost = self.services.iter().filter(|service| {
            endpoint_of(service).ok().and_then(|endpoint| endpoint.url).is_some_and(|url| !reaches(&url))
        });
        let names: Vec<_> = lost.map(|service| service.name.as_str()).collect();
        if !names.is_empty() {
            let message = format!("can't be reached from this node: {}", names.join(", "));
            problems.push(StorageProblem { status: StorageHealth::Unreachable, reason: "ServiceUnreachable", message });
        }
        Ok(problems)
    }
}

/// Does anybody accept connections there?
pub(super) fn reaches(url: &str) -> bool {
    let (scheme, host) = url.split_once("://").unwrap_or(("https", url));
    let host = host.trim_end_matches('/');
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let port = if scheme == "http" { 80 } else { 443 };
    let address = if has_port { host.to_owned() } else { format!("{host}:{port}") };
    let mut addresses = address.to_socket_addrs().into_iter().flatten();
    addresses.any(|address| TcpStream::connect_timeout(&address, CONNECT).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_mount_table_says_whose_mount_it_is() {
        let id = VolumeId::new("main/data/vol-0123456789abcdef01234567").unwrap();
        let source = source("data", "team a/x/", Some(7), &mount_id(&id)).replace(' ', "\\040");
        let line = |kind: &str, source: &str| format!("60 21 0:50 / /stage rw,nosuid shared:9 - {kind} {source} rw");
        assert!(is_of(&id, &line("fuse.berth", &source)));
        assert!(!is_of(&id, &line("fuse.s3fs", &source)));
        assert!(!is_of(&VolumeId::new("other").unwrap(), &line("fuse.berth", &source)));
        assert!(!is_of(&id, "60 21 0:50 / /stage rw"));
    }
}
