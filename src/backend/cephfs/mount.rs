//! A volume's mount: made by the kernel's client, or by ceph-fuse where the kernel has none; told apart from others;
//! found dead; taken away.
//!
//! ceph-fuse runs in a process of its own that a restart of the driver does not touch. Its key comes through a file in
//! memory that is gone when the mount is there; its mount carries the volume's id in the mount table.

use std::io::Write;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::control::Account;
use super::names::Address;
use super::parameters::split_flags;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::ceph::{self, FUSE_TAG, Monitor, Shown};
use crate::host::probe::{Answer, Probes};
use crate::host::{command, files, mounts, processes};
use crate::volume::{MountFlag, MountPath, VolumeId};

/// A file system that does not answer for so long is silent. Kubelet asks all volumes of a node one after the other.
const PATIENCE: Duration = Duration::from_secs(3);
/// So long unmounting may take before it goes on unseen.
const UNMOUNT: Duration = Duration::from_secs(15);
/// The mount options that ceph-fuse knows. The others tune the kernel's client, or are not for it.
const FUSE_OPTIONS: [&str; 8] = ["ro", "rw", "noatime", "nodev", "nosuid", "noexec", "sync", "dirsync"];

/// What is to be mounted.
pub(super) struct Plan<'a> {
    pub(super) id: &'a VolumeId,
    pub(super) address: Address,
    pub(super) fsid: &'a str,
    /// `v2:HOST:PORT,v1:HOST:PORT,...`
    pub(super) monitors: String,
    /// In the file system.
    pub(super) path: &'a str,
    /// Below `path`, the part that is shown, read-only; empty: all of it.
    pub(super) inner: &'a str,
    pub(super) flags: &'a [MountFlag],
}

/// Makes mounts, and knows how they are.
pub(super) struct Mounts {
    cgroup: Option<PathBuf>,
    /// A mount is given up after this time.
    deadline: Duration,
    pub(super) probes: Probes,
}

/// How a mount is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Health {
    Alive,
    /// Why.
    Dead(String),
    Silent,
}

impl Mounts {
    pub(super) fn new(cgroup: Option<PathBuf>, deadline: Duration) -> Self {
        Self { cgroup, deadline, probes: Probes::default() }
    }

    /// Mounts it. What an interrupted call has made of it is used.
    pub(super) fn ensure_mounted(&self, plan: &Plan<'_>, account: &Account, target: &MountPath) -> Result<()> {
        let path = target.as_path();
        while let Some(shown) = shown(path)? {
            if !plan.is_shown(&shown) {
                fail!(Precondition, "something else is mounted at {target}: unmount it first");
            }
            match self.health(path)? {
                Health::Alive if plan.is_whole(&shown) => return Ok(()),
                Health::Alive => return mounts::narrow(path, Path::new(plan.inner)),
                Health::Silent => {
                    fail!(Unreachable, "{} is mounted at {target}, but Ceph does not answer: no active MDS?", plan.id)
                }
                Health::Dead(why) => {
                    tracing::warn!(volume.id = %plan.id, %why, path = %target, "the mount is dead: taken away and made again");
                    mounts::detach(path)?;
                }
            }
        }
        if ceph::has_kernel_client()? {
            self.mount_by_kernel(plan, account, path)?;
        } else {
            self.mount_by_fuse(plan, account, path)?;
        }
        if plan.inner.is_empty() {
            return Ok(());
        }
        mounts::narrow(path, Path::new(plan.inner)).inspect_err(|_| drop(mounts::unmount_top(path)))
    }

    fn mount_by_kernel(&self, plan: &Plan<'_>, account: &Account, target: &Path) -> Result<()> {
        let monitors = monitors(&plan.monitors)?;
        let source = ceph::Source {
            monitors: &monitors,
            fsid: plan.fsid,
            filesystem: plan.address.filesystem(),
            path: plan.path,
            user: &account.user,
            key: &account.key,
        };
        let (generic, tuning) = split_flags(plan.flags);
        let read_only = generic.contains(&"ro") || !plan.inner.is_empty();
        let given = generic.into_iter().chain(tuning);
        let timeout = self.deadline.as_secs().max(1).to_string();
        let mut options = vec![("mount_timeout", Some(timeout.as_str()))];
        for flag in given.filter(|flag| !matches!(*flag, "ro" | "rw" | "atime" | "relatime")) {
            let (key, value) = flag.split_once('=').map_or((flag, None), |(key, value)| (key, Some(value)));
            options.retain(|(known, _)| *known != key);
            options.push((key, value));
        }
        ceph::mount(&source, target, &options, read_only)
    }

    fn mount_by_fuse(&self, plan: &Plan<'_>, account: &Account, target: &Path) -> Result<()> {
        if plan.id.as_str().contains([',', '\\']) {
            fail!(Invalid, "volume id {} has a comma or backslash, which ceph-fuse can't take", plan.id);
        }
        let (_, made) = mounts::ensure_vacant(target, crate::host::paths::Kind::Directory)?;
        let mut key = files::in_memory("ceph-key")?;
        key.write_all(account.key.as_bytes()).context(|| "cannot hand a key to ceph-fuse".to_owned())?;
        let (generic, _) = split_flags(plan.flags);
        let mut options = vec![format!("fsname={FUSE_TAG}{}", plan.id)];
        let is_known = |flag: &&str| FUSE_OPTIONS.contains(flag) || flag.starts_with("context=");
        options.extend(generic.into_iter().filter(is_known).map(str::to_owned));
        if !plan.inner.is_empty() {
            options.push("ro".to_owned());
        }
        let patience = (self.deadline.as_secs() / 2).max(1);
        let arguments = [
            "--conf=/dev/null".to_owned(),
            "-m".to_owned(),
            plan.monitors.clone(),
            format!("--id={}", account.user),
            format!("--keyfile={}", files::path_of(&key).display()),
            format!("--client_mds_namespace={}", plan.address.filesystem()),
            format!("--client_mountpoint={}", plan.path),
            format!("--client_mount_timeout={patience}"),
            // As the kernel's `recover_session=clean`.
            "--client_reconnect_stale=true".to_owned(),
            "--admin_socket=".to_owned(),
            "--log_file=".to_owned(),
            "--log_to_stderr=false".to_owned(),
            "-o".to_owned(),
            options.join(","),
            target.display().to_string(),
        ];
        command::launch("ceph-fuse", &arguments, self.cgroup.as_deref(), self.deadline).map_err(|error| {
            // It may be there by now.
            let _ = mounts::detach(target);
            if made {
                let _ = crate::host::paths::remove_empty(target);
            }
            explain(plan, account, &error)
        })
    }

    /// Does what is mounted there answer?
    pub(super) fn health(&self, path: &Path) -> Result<Health> {
        Ok(match self.probes.is_alive(path, PATIENCE)? {
            Answer::Alive(()) => Health::Alive,
            Answer::Silent => Health::Silent,
            Answer::Dead(error) => Health::Dead(error.to_string()),
        })
    }

    pub(super) fn usage(&self, path: &Path) -> Result<Answer<[[u64; 3]; 2]>> {
        self.probes.usage(path, PATIENCE)
    }

    /// Takes the uppermost mount at a path away. One that is dead or silent goes out of sight even if somebody waits for
    /// an answer of it.
    pub(super) fn unmount(&self, path: &Path) -> Result<()> {
        match self.health(path)? {
            Health::Alive => mounts::unmount_patiently(path, UNMOUNT),
            Health::Dead(why) => {
                tracing::warn!(path = %path.display(), %why, "the mount is dead: taken away");
                mounts::detach(path)
            }
            Health::Silent => match mounts::unmount_patiently(path, UNMOUNT) {
                Err(error) if error.kind() == ErrorKind::Busy => mounts::detach(path),
                result => result,
            },
        }
    }

    /// Unmounts what of this volume is at a staging path, and waits until what was written has reached Ceph.
    pub(super) fn ensure_unmounted(&self, id: &VolumeId, path: &Path) -> Result<()> {
        while is_at(id, path)? {
            self.unmount(path)?;
        }
        if ceph::has_kernel_client()? {
            return Ok(());
        }
        // ceph-fuse writes back what it holds after its mount is gone, and ends then.
        let (tag, place) = (format!("fsname={FUSE_TAG}{id}"), path.display().to_string());
        let is_it = |arguments: &[String]| {
            arguments.last() == Some(&place) && arguments.iter().any(|one| one.split(',').any(|part| part == tag))
        };
        if !processes::wait_until_gone("ceph-fuse", is_it, UNMOUNT)? {
            tracing::warn!(volume.id = %id, "ceph-fuse is still writing back what it holds");
        }
        Ok(())
    }
}

impl Plan<'_> {
    /// Is it this volume, whole or in part?
    fn is_shown(&self, shown: &Shown) -> bool {
        match &shown.tag {
            Some(tag) => tag == self.id.as_str(),
            None => {
                let inside = shown.path.strip_prefix(self.path.trim_end_matches('/'));
                shown.filesystem.as_deref() == Some(self.address.filesystem())
                    && shown.fsid.as_deref().is_none_or(|fsid| self.fsid.is_empty() || fsid == self.fsid)
                    && inside.is_some_and(|rest| rest.is_empty() || rest.trim_matches('/') == self.inner)
            }
        }
    }

    /// Is what has to be shown of it on top?
    fn is_whole(&self, shown: &Shown) -> bool {
        self.inner.is_empty() || shown.path.ends_with(&format!("/{}", self.inner))
    }
}

/// What CephFS shows at a path, if it is one. Asks the mount table only.
pub(super) fn shown(path: &Path) -> Result<Option<Shown>> {
    let line = mounts::line_of(path)?;
    Ok(line.map(|line| {
        let unknown = Shown { fsid: None, filesystem: None, path: String::new(), tag: None };
        Shown::of_line(&line).unwrap_or(unknown)
    }))
}

/// Is this volume mounted there?
///
/// The kernel's mounts don't carry an id, but their path says which subvolume it is. Of one that shows a snapshot it
/// says the snapshot's: any of the same group is taken for it. Nothing can be written through those.
pub(super) fn is_at(id: &VolumeId, path: &Path) -> Result<bool> {
    Ok(mounts::line_of(path)?.is_some_and(|line| is_of(id, &line)))
}

/// Is this line of the mount table one of the volume's mounts?
pub(super) fn is_of(id: &VolumeId, line: &str) -> bool {
    let (Some(shown), Some(address)) = (Shown::of_line(line), Address::of(id)) else { return false };
    match (&shown.tag, &address) {
        (Some(tag), _) => tag == id.as_str(),
        (None, _) if shown.filesystem.as_deref() != Some(address.filesystem()) => false,
        (None, Address::Subvolume(volume)) if is_view(&shown.path) => {
            shown.path.starts_with(&format!("/volumes/{}/", volume.group))
        }
        (None, _) => address.covers(&shown.path),
    }
}

/// Is it a snapshot, or the folder of a subvolume, which is mounted only on the way to one? A volume's own files lie one
/// level below.
fn is_view(path: &str) -> bool {
    path.contains("/.snap/") || path.split('/').count() == 4
}

/// Each monitor's addresses, those of one host together.
fn monitors(text: &str) -> Result<Vec<Monitor>> {
    let mut found: Vec<Monitor> = Vec::new();
    for one in text.split(',') {
        let (version, address) = match (one.strip_prefix("v1:"), one.strip_prefix("v2:")) {
            (Some(address), _) => (1, address),
            (_, Some(address)) => (2, address),
            // The old protocol's port, or one that says nothing.
            _ => (if one.ends_with(":3300") { 2 } else { 1 }, one),
        };
        let resolved: Option<SocketAddr> = address.to_socket_addrs().ok().and_then(|mut all| all.next());
        let Some(resolved) = resolved else { fail!(Unreachable, "monitor address {address:?} can't be resolved") };
        let (v1, v2) = if version == 1 { (Some(resolved), None) } else { (None, Some(resolved)) };
        let partner = found.iter_mut().find(|monitor| {
            let known = monitor.v1.or(monitor.v2).map(|address| address.ip());
            known == Some(resolved.ip()) && if version == 1 { monitor.v1.is_none() } else { monitor.v2.is_none() }
        });
        match partner {
            Some(monitor) => *monitor = Monitor { v1: monitor.v1.or(v1), v2: monitor.v2.or(v2) },
            None => found.push(Monitor { v1, v2 }),
        }
    }
    Ok(found)
}

/// What ceph-fuse prints, as what to do about it. A key that it can't read it prints.
fn explain(plan: &Plan<'_>, account: &Account, error: &Error) -> Error {
    let said = error.to_string().replace(&account.key, "(the key)");
    let (user, path) = (&account.user, plan.path);
    let what = format!("ceph-fuse cannot mount {path} of file system {} as client.{user}", plan.address.filesystem());
    let kind = if said.contains("No such file or directory") && said.contains("mount failed") {
        ErrorKind::NotFound
    } else if ["auth_bad_method", "Permission denied", "Operation not permitted", "keyring", "decode key"]
        .iter()
        .any(|sign| said.contains(sign))
    {
        ErrorKind::Denied
    } else if ["Connection timed out", "failed to fetch mon config", "no MDS server is up"]
        .iter()
        .any(|sign| said.contains(sign))
        || error.kind() == ErrorKind::OutcomeUnknown
    {
        ErrorKind::Unreachable
    } else {
        error.kind()
    };
    Error::new(kind, format!("{what}: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitors_two_addresses_belong_together() {
        let address = |text: &str| text.parse().ok();
        let found = monitors("v2:10.0.0.1:3300,v1:10.0.0.1:6789,10.0.0.2:6789,v2:[fd00::1]:3300").unwrap();
        assert_eq!(
            found,
            [
                Monitor { v1: address("10.0.0.1:6789"), v2: address("10.0.0.1:3300") },
                Monitor { v1: address("10.0.0.2:6789"), v2: None },
                Monitor { v1: None, v2: address("[fd00::1]:3300") },
            ]
        );
    }
}
