//! Why a CephFS could not be mounted.
//!
//! The kernel says "no route to host" to a wrong key, a wrong name, a missing metadata server and a dead monitor alike:
//! it replaces any error by that one as long as it has no map of the file system. Only its log tells them apart.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::Source;
use crate::error::{Error, ErrorKind};

/// All that is known when the kernel has refused to mount.
pub(super) struct Failure<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) addresses: &'a [SocketAddr],
    pub(super) errno: Errno,
    /// Did it take as long as it was allowed to?
    pub(super) timed_out: bool,
    /// What the kernel logged meanwhile; `None` where that can't be read.
    pub(super) log: Option<&'a [String]>,
    /// What it wrote into the mount's context.
    pub(super) said: String,
}

impl Failure<'_> {
    pub(super) fn into_error(self) -> Error {
        let Source { path, filesystem, user, .. } = self.source;
        let denied = |line: &String| line.contains("authentication failed") || line.contains("auth method");
        let is_denied = self.log.is_some_and(|lines| lines.iter().any(denied));
        let (kind, reason) = match self.errno {
            Errno::HOSTUNREACH if is_denied => {
                (ErrorKind::Denied, "the cluster refuses the user or the key".to_owned())
            }
            Errno::ACCESS | Errno::PERM => (ErrorKind::Denied, "the user's capabilities do not allow it".to_owned()),
            Errno::NOENT => (ErrorKind::NotFound, "there is no such path".to_owned()),
            Errno::HOSTUNREACH if !self.timed_out => {
                // Without the log, there is one more possibility.
                let or_key = if self.log.is_none() { ", or the cluster refuses the user or the key" } else { "" };
                let reason = format!("there is no such file system, or it has no active metadata server{or_key}");
                (ErrorKind::Unreachable, reason)
            }
            Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::CONNREFUSED
            | Errno::CONNRESET
            | Errno::TIMEDOUT
            | Errno::IO => {
                let monitors: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
                (
                    ErrorKind::Unreachable,
                    format!("the cluster does not answer; its monitors are {}", monitors.join(", ")),
                )
            }
            _ => (ErrorKind::Internal, "the kernel refuses it".to_owned()),
        };
        let log = self.log.unwrap_or_default();
        // A long wait repeats itself with small changes.
        let log: String = log.iter().rev().take(3).rev().map(|line| format!(" ({line})")).collect();
        let said = self.said;
        let message = format!("cannot mount {path} of file system {filesystem} as client.{user}: {reason}{said}{log}");
        match kind {
            ErrorKind::Internal => Error::caused(kind, message, std::io::Error::from(self.errno)),
            // The number says less than the message, or something else.
            _ => Error::new(kind, message),
        }
    }
}

/// The kernel's log from some moment on. Other mounts' lines are among it: it is evidence, not proof.
///
/// Without `/dev/kmsg` there is none, and the messages are less exact.
pub(super) struct KernelLog {
    log: Option<OwnedFd>,
    lines: Vec<String>,
}

impl KernelLog {
    pub(super) fn from_now() -> Self {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).and_then(|log| {
            // Containers may have something else there, /dev/null or a terminal.
            if rustix::fs::fstat(&log)?.st_rdev != rustix::fs::makedev(1, 11) {
                return Err(Errno::NODEV);
            }
            rustix::fs::seek(&log, SeekFrom::End(0)).map(|_| log)
        });
        Self { log: opened.ok(), lines: Vec::new() }
    }

    /// Reads on. What Ceph's client wrote until now and is worth telling, each line once.
    pub(super) fn lines(&mut self) -> Option<&[String]> {
        let log = self.log.as_ref()?;
        // One record a read; a shorter buffer is an error.
        let mut buffer = vec![0_u8; 8192];
        loop {
            match rustix::io::read(log, &mut buffer) {
                Ok(length) => {
                    let record = String::from_utf8_lossy(&buffer[..length]);
                    if let Some(line) = worth_telling(&record).map(str::to_owned)
                        && !self.lines.contains(&line)
                    {
                        self.lines.push(line);
                    }
                }
                // Overwritten before it was read.
                Err(Errno::PIPE) => {}
                Err(_) => break,
            }
        }
        Some(&self.lines)
    }

    /// May a metadata server have rejected a client meanwhile?
    pub(super) fn allows_rejection(&mut self) -> bool {
        self.lines().is_none_or(|lines| lines.iter().any(|line| line.contains("rejected session")))
    }
}

/// `6,1234,94976793,-;libceph: mon0 (2)10.0.0.1:3300 socket closed\n KEY=value` (Documentation/ABI/testing/dev-kmsg).
fn worth_telling(record: &str) -> Option<&str> {
    let line = record.split_once(';')?.1.lines().next()?.trim();
    let ours = line.starts_with("libceph") || line.starts_with("ceph: ");
    let good_news = line.contains("session established") || line.starts_with("libceph: client");
    // It stands for any reason at all.
    let empty = line.contains("No mds server is up or the cluster is laggy");
    (ours && !good_news && !empty).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUTH: &str = "libceph: auth protocol 'cephx' msgr authentication failed: -13";

    fn failed(errno: Errno, timed_out: bool, log: Option<&[&str]>) -> (ErrorKind, String) {
        let monitors = [];
        let source = Source {
            monitors: &monitors,
            fsid: "fsid",
            filesystem: "cephfs",
            path: "/volumes/a",
            user: "bob",
            key: "canary",
        };
        let addresses = ["10.0.0.1:3300".parse().unwrap(), "[::1]:3300".parse().unwrap()];
        let log: Option<Vec<_>> = log.map(|lines| lines.iter().map(|line| (*line).to_owned()).collect());
        let log = log.as_deref();
        let said = String::new();
        let error = Failure { source: &source, addresses: &addresses, errno, timed_out, log, said }.into_error();
        (error.kind(), error.to_string())
    }

    #[test]
    fn each_failure_says_what_is_wrong_and_never_the_key() {
        let beginning = "cannot mount /volumes/a of file system cephfs as client.bob: ";
        for (errno, timed_out, log, kind, ending) in [
            (
                Errno::HOSTUNREACH,
                false,
                Some(&[AUTH][..]),
                ErrorKind::Denied,
                "the cluster refuses the user or the key (libceph: auth protocol 'cephx' msgr authentication failed: -13)",
            ),
            (Errno::ACCESS, false, None, ErrorKind::Denied, "the user's capabilities do not allow it"),
            (Errno::NOENT, false, Some(&[]), ErrorKind::NotFound, "there is no such path"),
            (
                Errno::HOSTUNREACH,
                false,
                Some(&[]),
                ErrorKind::Unreachable,
                "there is no such file system, or it has no active metadata server",
            ),
            (
                Errno::HOSTUNREACH,
                false,
                None,
                ErrorKind::Unreachable,
                "there is no such file system, or it has no active metadata server, or the cluster refuses the user or the key",
            ),
            (
                Errno::HOSTUNREACH,
                true,
                None,
                ErrorKind::Unreachable,
                "the cluster does not answer; its monitors are 10.0.0.1:3300, [::1]:3300",
            ),
            (
                Errno::TIMEDOUT,
                true,
                Some(&["libceph: mds0 (2)10.0.0.1:6800 socket closed"]),
                ErrorKind::Unreachable,
                "the cluster does not answer; its monitors are 10.0.0.1:3300, [::1]:3300 (libceph: mds0 (2)10.0.0.1:6800 socket closed)",
            ),
            (
                Errno::NOMEM,
                false,
                None,
                ErrorKind::Internal,
                "the kernel refuses it: Cannot allocate memory (os error 12)",
            ),
        ] {
            let (found, message) = failed(errno, timed_out, log);
            assert_eq!((found, message.as_str()), (kind, format!("{beginning}{ending}").as_str()));
            assert!(!message.contains("canary"));
        }
    }

    #[test]
    fn of_the_kernels_log_only_what_explains_a_failure_is_told() {
        assert_eq!(worth_telling(&format!("6,812,94976793,-;{AUTH}\n SUBSYSTEM=x\n")), Some(AUTH));
        for line in [
            "libceph: mon0 (2)127.0.0.1:6800 session established",
            "libceph: client4167 fsid 56cbee4d-af3c-4e57-8173-79d172695a63",
            "ceph: No mds server is up or the cluster is laggy",
            "usb 1-1: new device",
        ] {
            assert_eq!(worth_telling(&format!("6,812,94976793,-;{line}\n")), None, "{line}");
        }
        assert_eq!(worth_telling("no record"), None);
    }
}
