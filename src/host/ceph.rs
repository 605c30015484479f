//! Mounting CephFS with the kernel's client, and telling what a CephFS mount shows.
//!
//! The key goes to the kernel by fsconfig(2), which nobody else can read, and into no message.

mod failure;
mod greeting;
mod shown;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountAttrFlags};

pub use self::greeting::{Protocol, greeting};
pub use self::shown::{FUSE_TAG, Shown};
use super::filesystem::{self, Attribute};
use super::{mounts, paths};
use crate::error::{Context, Error, ErrorKind, Result};

/// The kernel's own patience is a minute, for each of two steps.
const MOUNT_TIMEOUT: u32 = 30;

/// fsconfig(2) takes strings up to this length, in bytes.
const LONGEST: usize = 255;

/// A monitor's addresses. Either may be missing, never both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Monitor {
    /// Of the legacy protocol, usually port 6789.
    pub v1: Option<SocketAddr>,
    /// Of the second one, usually port 3300.
    pub v2: Option<SocketAddr>,
}

/// What to mount, and as whom. Not `Debug`: it has the key.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// One that answers is enough.
    pub monitors: &'a [Monitor],
    /// The cluster's UUID.
    pub fsid: &'a str,
    /// The file system's name.
    pub filesystem: &'a str,
    /// Absolute, in the file system.
    pub path: &'a str,
    /// Without `client.`.
    pub user: &'a str,
    /// As in a keyring.
    pub key: &'a str,
}

/// How the kernel is told the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// `USER@FSID.FILESYSTEM=/path`, where the kernel knows it (Linux 5.17), else as [`Self::Monitors`].
    Named,
    /// `MONITOR,MONITOR:/path`, which all kernels know and the mount table shows with neither cluster nor user.
    Monitors,
}

/// Has this kernel the client? Loads its module where there is one.
pub fn has_kernel_client() -> Result<bool> {
    match rustix::mount::fsopen("ceph", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(error) => Err(Error::io("cannot ask for the kernel's CephFS client", error)),
    }
}

/// Mounts a directory of a CephFS at `target`, made if missing. Blocks for up to twice `mount_timeout`, which is
/// 30 seconds unless the options say otherwise.
///
/// The caller knows that the options are harmless. A mount whose client was evicted recovers by itself
/// (`recover_session=clean`) unless they say otherwise.
///
/// # Errors
/// `Denied` for a key or capabilities that don't suffice, `NotFound` for the path, `Unreachable` when no answer comes
/// in time, `Invalid` for an option that the kernel refuses, `Unsupported` without the client, and `Precondition` as
/// for [`mounts::ensure_vacant`]. Nothing is mounted then.
pub fn mount(source: &Source, target: &Path, options: &[(&str, Option<&str>)], read_only: bool) -> Result<()> {
    mount_in(Syntax::Named, source, target, options, read_only)
}

/// As [`mount`], in the given syntax: kernels that know both never need the older one, so only a test asks for it.
pub fn mount_in(
    syntax: Syntax,
    source: &Source,
    target: &Path,
    options: &[(&str, Option<&str>)],
    read_only: bool,
) -> Result<()> {
    let (to, made) = mounts::ensure_vacant(target, paths::Kind::Directory)?;
    mount_on(syntax, source, &to, options, read_only).inspect_err(|_| {
        if made {
            let _ = paths::remove_empty(target);
        }
    })
}

fn mount_on(
    syntax: Syntax,
    source: &Source,
    target: &OwnedFd,
    options: &[(&str, Option<&str>)],
    read_only: bool,
) -> Result<()> {
    let context = match rustix::mount::fsopen("ceph", FsOpenFlags::FSOPEN_CLOEXEC) {
        Err(Errno::NODEV) => fail!(Unsupported, "this kernel has no CephFS client: install its module `ceph`"),
        opened => opened.context(|| "cannot use the kernel's CephFS client".to_owned())?,
    };
    let context = Configuration { context };

    let mut attributes = MountAttrFlags::empty();
    for (key, value) in options {
        match Attribute::parse(key) {
            Some(attribute) => attributes |= attribute.flag(),
            None => context.set(key, *value)?,
        }
    }
    let given = |wanted| options.iter().find(|(key, _)| *key == wanted).map(|(_, value)| value.unwrap_or_default());
    if given("recover_session").is_none() {
        context.set("recover_session", Some("clean"))?;
    }
    let patience = given("mount_timeout").and_then(|value| value.parse().ok()).unwrap_or(MOUNT_TIMEOUT);
    context.set("mount_timeout", Some(&patience.to_string()))?;
    if read_only {
        context.set("ro", None)?;
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }

    let addresses = context.choose_protocol(source.monitors, given("ms_mode"))?;
    context.set_source(syntax, source, &addresses)?;
    // Kernels before 6.13 take the user from here only, even where the source has it.
    context.set("name", Some(source.user))?;
    if !context.accepts("secret", source.key)? {
        let user = source.user;
        fail!(Denied, "the key of client.{user} is none: it has to be as `ceph auth get-key client.{user}` prints it");
    }

    let log = failure::KernelLog::from_now();
    let begun = Instant::now();
    rustix::mount::fsconfig_create(&context.context)
        .and_then(|()| filesystem::attach(&context.context, attributes, target))
        .map_err(|errno| {
            let failure = failure::Failure {
                source,
                addresses: &addresses,
                errno,
                timed_out: begun.elapsed() >= Duration::from_secs(patience.into()),
                log: log.lines(),
                said: filesystem::kernel_messages(&context.context),
            };
            failure.into_error()
        })
}

/// A mount that is being described to the kernel.
struct Configuration {
    context: OwnedFd,
}

impl Configuration {
    fn set(&self, key: &str, value: Option<&str>) -> Result<()> {
        let result = match value {
            Some(value) => rustix::mount::fsconfig_set_string(&self.context, key, value),
            None => rustix::mount::fsconfig_set_flag(&self.context, key),
        };
        result.map_err(|errno| {
            let said = filesystem::kernel_messages(&self.context);
            let kind = if errno == Errno::INVAL { ErrorKind::Invalid } else { ErrorKind::Internal };
            // Not the value: no caller has to think of what may be in it.
            Error::caused(kind, format!("the kernel refuses the CephFS mount option {key}{said}"), {
                std::io::Error::from(errno)
            })
        })
    }

    /// Sets what the kernel may not know, or not like.
    fn accepts(&self, key: &str, value: &str) -> Result<bool> {
        match self.set(key, Some(value)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Invalid => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Decides between the protocols, and returns the monitors' addresses in the chosen one.
    fn choose_protocol(&self, monitors: &[Monitor], given: Option<&str>) -> Result<Vec<SocketAddr>> {
        let second = match given {
            Some(mode) => mode != "legacy",
            // Linux 5.11.
            None => monitors.iter().all(|monitor| monitor.v2.is_some()) && self.accepts("ms_mode", "prefer-crc")?,
        };
        let addresses: Vec<_> =
            monitors.iter().filter_map(|monitor| if second { monitor.v2 } else { monitor.v1 }).collect();
        if addresses.is_empty() {
            let protocol = if second { "v2" } else { "v1" };
            fail!(Invalid, "no monitor has a {protocol} address, which the kernel's CephFS client needs here");
        }
        Ok(addresses)
    }

    fn set_source(&self, syntax: Syntax, source: &Source, monitors: &[SocketAddr]) -> Result<()> {
        let Source { fsid, filesystem, path, user, .. } = source;
        let named = format!("{user}@{fsid}.{filesystem}={path}");
        if syntax == Syntax::Named
            && named.len() <= LONGEST
            && self.accepts("mon_addr", &as_many(monitors, '/', LONGEST))?
        {
            return self.set("source", Some(&named));
        }
        let monitors = as_many(monitors, ',', LONGEST.saturating_sub(path.len() + 1));
        if monitors.is_empty() {
            fail!(Invalid, "the kernel's CephFS client can't take a path of {} bytes: {path}", path.len());
        }
        self.set("source", Some(&format!("{monitors}:{path}")))?;
        self.set("mds_namespace", Some(filesystem))
    }
}

/// As many as fit: the client asks the first that answers for all others.
fn as_many(addresses: &[SocketAddr], separator: char, room: usize) -> String {
    let mut all = String::new();
    for address in addresses {
        let next = if all.is_empty() { address.to_string() } else { format!("{all}{separator}{address}") };
        if next.len() > room {
            break;
        }
        all = next;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monitors_are_named_as_far_as_there_is_room() {
        let addresses = ["10.0.0.1:6789", "[2001:db8::2]:3300", "10.0.0.3:6789"].map(|text| text.parse().unwrap());
        assert_eq!(as_many(&addresses, '/', 99), "10.0.0.1:6789/[2001:db8::2]:3300/10.0.0.3:6789");
        assert_eq!(as_many(&addresses, ',', 32), "10.0.0.1:6789,[2001:db8::2]:3300");
        assert_eq!(as_many(&addresses, ',', 31), "10.0.0.1:6789");
        assert_eq!(as_many(&addresses, ',', 12), "");
    }
}
