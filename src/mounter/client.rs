//! How the driver and the command line talk to a mounter. Everything here blocks, with a deadline.

use std::io::ErrorKind as Io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::protocol::{self, Frame, Reply, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::objectfs::content::Progress;
use crate::objectfs::settings::{Credentials, Settings};

/// How a mount is doing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// `Settings::id`.
    pub id: String,
    /// Where it was mounted first.
    pub mountpoint: PathBuf,
    /// The worker's process id; `None`: it has ended.
    pub worker: Option<u32>,
    /// What lies only on this node, and more.
    pub progress: Progress,
    /// Bytes in use and the limit, if there is one.
    pub used: u64,
    /// The limit of the volume in bytes.
    pub limit: Option<u64>,
}

/// A mounter behind its Unix socket.
#[derive(Clone, Debug)]
pub struct Mounter {
    socket: PathBuf,
    deadline: Duration,
}

impl Mounter {
    /// Connects anew for each call.
    pub fn new(socket: impl Into<PathBuf>, deadline: Duration) -> Self {
        Self { socket: socket.into(), deadline }
    }

    /// Hands a mounted descriptor over and waits until its worker answers. Repeated for an id whose worker runs: the
    /// descriptor is closed, unless settings differ other than in credentials (`Conflict`); other credentials are taken over.
    ///
    /// # Errors
    /// `Unreachable` when there is no mounter; `Busy` when an earlier worker of this id has not ended yet; what the worker said
    /// when it could not begin.
    pub fn serve(&self, settings: &Settings, mountpoint: &Path, descriptor: OwnedFd) -> Result<()> {
        let request = Request::Serve {
            settings: Box::new(settings.clone()),
            mountpoint: mountpoint.to_owned(),
            patience: self.patience(),
        };
        self.call(&request, &[descriptor.as_fd()]).map(drop)
    }

    /// Gives a running worker other credentials.
    ///
    /// # Errors
    /// `NotFound` when there is no such mount.
    pub fn renew(&self, id: &str, credentials: &Credentials) -> Result<()> {
        let request = Request::Renew { id: id.to_owned(), credentials: credentials.clone() };
        self.call(&request, &[]).map(drop)
    }

    /// `None`: there is no such mount.
    pub fn status(&self, id: &str) -> Result<Option<Status>> {
        Ok(self.call(&Request::Status { id: id.to_owned() }, &[])?.into_iter().next())
    }

    /// All of them.
    pub fn list(&self) -> Result<Vec<Status>> {
        self.call(&Request::List, &[])
    }

    /// Waits until the worker of an unmounted file system has brought everything to safety and ended. No such mount is success.
    ///
    /// # Errors
    /// `OutcomeUnknown` when it is not done by the deadline: staged files are still on this node's disk.
    pub fn ended(&self, id: &str) -> Result<()> {
        self.call(&Request::Ended { id: id.to_owned(), patience: self.patience() }, &[]).map(drop)
    }

    /// Does a mounter answer?
    pub fn is_there(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// The mounter answers a little before this side stops to listen, in milliseconds.
    fn patience(&self) -> u64 {
        u64::try_from(self.deadline.as_millis() * 9 / 10).unwrap_or(u64::MAX)
    }

    fn call(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Vec<Status>> {
        let end = Instant::now() + self.deadline;
        let failed = |kind, verb: &str, error| {
            Error::caused(kind, format!("cannot {verb} the mounter at {}", self.socket.display()), error)
        };
        let stream =
            UnixStream::connect(&self.socket).map_err(|error| failed(ErrorKind::Unreachable, "reach", error))?;
        let frame: Frame<Reply> =
            protocol::ask(&stream, request, descriptors, end).map_err(|error| match error.kind() {
                Io::WouldBlock | Io::TimedOut => failed(ErrorKind::OutcomeUnknown, "wait any longer for", error),
                _ => failed(ErrorKind::Unreachable, "talk to", error),
            })?;
        match frame.message {
            Reply::Done => Ok(Vec::new()),
            Reply::Mounts(mounts) => Ok(mounts),
            Reply::Failed(failure) => Err(failure.into()),
        }
    }
}
