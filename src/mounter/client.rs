//! How the driver and the command line talk to a mounter. Everything here blocks, with a deadline.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Result;
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
    /// descriptor is closed, unless settings differ other than in credentials (`Conflict`).
    ///
    /// # Errors
    /// `Unreachable` when there is no mounter; what the worker said when it could not begin.
    pub fn serve(&self, _settings: &Settings, _mountpoint: &Path, _descriptor: OwnedFd) -> Result<()> {
        fail!(Unsupported, "no mounter at {} yet ({:?})", self.socket.display(), self.deadline)
    }

    /// Gives a running worker other credentials.
    pub fn renew(&self, _id: &str, _credentials: &Credentials) -> Result<()> {
        fail!(Unsupported, "not yet")
    }

    /// `None`: there is no such mount.
    pub fn status(&self, _id: &str) -> Result<Option<Status>> {
        Ok(None)
    }

    /// All of them.
    pub fn list(&self) -> Result<Vec<Status>> {
        Ok(Vec::new())
    }

    /// Waits until the worker of an unmounted file system has brought everything to safety and ended.
    ///
    /// # Errors
    /// `OutcomeUnknown` when it is not done by the deadline: staged files are still on this node's disk.
    pub fn ended(&self, _id: &str) -> Result<()> {
        Ok(())
    }
}
