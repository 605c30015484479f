//! Mounting CephFS with the kernel's client, and telling what a CephFS mount shows.
//!
//! The key goes to the kernel by fsconfig(2), which nobody else can read, and into no message.

mod failure;
mod greeting;
mod shown;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountAttrFlags};

pub use self::greeting::{Protocol, greeting};
pub use self::shown::{FUSE_TAG, Shown};
use super::filesystem::{self, Attribute};
use super::{mounts, paths};
use crate::error::{Context, Error, ErrorKind, Result};

/// The kernel's own patience is a minute, in seconds.
const MOUNT_TIMEOUT: u32 = 30;

/// A mount that takes longer has something wrong with it.
const USUAL: Duration = Duration::from_secs(3);

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
    /// The cluster's UUID; empty where it is not known.
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

/// Mounts a directory of a CephFS at `target`, made if missing. Blocks for little more than `mount_timeout`, which is
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
    let described = Described::new(syntax, source, options, read_only)?;
    let mut log = failure::KernelLog::from_now();
    let begun = Instant::now();
    let is_rejected = || {
        // In an outage many mounts wait: no second client for each.
        if !log.allows_rejection() {
            return false;
        }
        let ours = [("recover_session", Some("no")), ("mount_timeout", Some("3"))];
        let theirs = options.iter().filter(|(key, _)| ours.iter().all(|(other, _)| key != other));
        let options: Vec<_> = theirs.chain(&ours).copied().collect();
        Described::new(syntax, source, &options, true)
            .is_ok_and(|probe| rustix::mount::fsconfig_create(&probe.context) == Err(Errno::ACCESS))
    };
    described.create(is_rejected).map_err(|Refused { errno, said }| {
        let failure = failure::Failure {
            source,
            addresses: &described.addresses,
            errno,
            timed_out: begun.elapsed() >= described.patience,
            log: log.lines(),
            said,
        };
        failure.into_error()
    })?;
    filesystem::attach(&described.context, described.attributes, target)
        .context(|| format!("cannot put {} of file system {} on its place", source.path, source.filesystem))
}

/// A mount that the kernel was told about, and that is not made yet. It ends with its context, whatever becomes of it.
struct Described {
    context: Arc<OwnedFd>,
    addresses: Vec<SocketAddr>,
    attributes: MountAttrFlags,
    patience: Duration,
}

impl Described {
    fn new(syntax: Syntax, source: &Source, options: &[(&str, Option<&str>)], read_only: bool) -> Result<Self> {
        let context = match rustix::mount::fsopen("ceph", FsOpenFlags::FSOPEN_CLOEXEC) {
            Err(Errno::NODEV) => fail!(Unsupported, "this kernel has no CephFS client: install its module `ceph`"),
            opened => opened.context(|| "cannot use the kernel's CephFS client".to_owned())?,
        };
        let context = Configuration(context);

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
            fail!(Denied, "the key of client.{user} is none: give what `ceph auth get-key client.{user}` prints");
        }
        // To the kernel, zero is for ever.
        let patience = Duration::from_secs(if patience == 0 { u32::MAX } else { patience }.into());
        Ok(Self { context: Arc::new(context.0), addresses, attributes, patience })
    }

    /// Has the kernel connect to the cluster and find the path.
    ///
    /// A client that may recover its session waits for a metadata server that rejects it until its time is over, as if
    /// that could have been an eviction. So if it takes long, another client that may not is asked: it gets EACCES at
    /// once where the capabilities don't suffice.
    ///
    /// Nor is the end of a failed mount waited for: a metadata server that hangs makes it last three times as long.
    fn create(&self, is_rejected: impl FnOnce() -> bool) -> Result<(), Refused> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let context = Arc::clone(&self.context);
        let create = move || {
            let _ = sender.send(rustix::mount::fsconfig_create(&*context));
        };
        let started = std::thread::Builder::new().name("cephfs-mount".to_owned()).spawn(create);
        started.map_err(|_| Refused { errno: Errno::AGAIN, said: String::new() })?;
        // The thread goes on in vain for a while, and until then reading the context's messages would block.
        let give_up = |errno| Err(Refused { errno, said: String::new() });
        let begun = Instant::now();
        let result = match receiver.recv_timeout(USUAL) {
            Ok(result) => result,
            Err(_) if is_rejected() => return give_up(Errno::ACCESS),
            Err(_) => match receiver.recv_timeout(self.patience.saturating_sub(begun.elapsed()) + USUAL) {
                Ok(result) => result,
                Err(_) => return give_up(Errno::TIMEDOUT),
            },
        };
        result.map_err(|errno| Refused { errno, said: filesystem::kernel_messages(&self.context) })
    }
}

/// The kernel's answer to a mount that it does not make.
struct Refused {
    errno: Errno,
    said: String,
}

/// A context of fsopen(2) that takes options.
struct Configuration(OwnedFd);

impl Configuration {
    fn set(&self, key: &str, value: Option<&str>) -> Result<()> {
        let result = match value {
            Some(value) => rustix::mount::fsconfig_set_string(&self.0, key, value),
            None => rustix::mount::fsconfig_set_flag(&self.0, key),
        };
        result.map_err(|errno| {
            let said = filesystem::kernel_messages(&self.0);
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
            && !fsid.is_empty()
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
