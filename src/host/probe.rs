//! Questions to file systems whose server may be away, answered in bounded time.
//!
//! A question that hangs can't be called back: its thread waits until the server comes back. Until then nobody else
//! asks that file system, and everyone is told at once that it does not answer.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::{filesystem, mounts};
use crate::error::{Context, Result};

/// Enough for one system call.
const STACK: usize = 128 << 10;

/// What a file system answered.
#[derive(Debug)]
pub enum Answer<T> {
    /// It answers.
    Alive(T),
    /// It will never answer again: its server is gone, or has thrown this client out. Why.
    Dead(std::io::Error),
    /// No answer in time.
    Silent,
}

/// Asks, and remembers who does not answer.
#[derive(Clone, Default)]
pub struct Probes {
    hanging: Arc<Mutex<BTreeSet<u64>>>,
}

impl Probes {
    /// Does the file system at this path answer?
    pub fn is_alive(&self, path: &Path, patience: Duration) -> Result<Answer<()>> {
        self.ask(path, patience, |path| touch(path).map_err(std::io::Error::from))
    }

    /// How full it is: bytes and inodes, as [`filesystem::usage`] has them.
    pub fn usage(&self, path: &Path, patience: Duration) -> Result<Answer<[[u64; 3]; 2]>> {
        self.ask(path, patience, |path| {
            touch(path)?;
            let stat = rustix::fs::statvfs(path)?;
            Ok(filesystem::usage_of(&stat))
        })
    }

    fn ask<T: Send + 'static>(
        &self,
        path: &Path,
        patience: Duration,
        question: impl FnOnce(&Path) -> std::io::Result<T> + Send + 'static,
    ) -> Result<Answer<T>> {
        let Some(place) = mounts::Place::at(path)? else {
            return Ok(Answer::Dead(std::io::Error::from(std::io::ErrorKind::NotFound)));
        };
        let device = place.device();
        if self.hanging().contains(&device) {
            return Ok(Answer::Silent);
        }
        let (sender, receiver) = mpsc::channel();
        let (probes, path) = (self.clone(), path.to_owned());
        let thread = std::thread::Builder::new().name("probe".to_owned()).stack_size(STACK);
        let started = thread.spawn(move || {
            let answer = question(&path);
            // Under the lock, so that who gives up either has the answer or is seen to have given up.
            let mut hanging = probes.hanging();
            hanging.remove(&device);
            let _ = sender.send(answer);
        });
        started.context(|| "cannot start a thread to ask a file system".to_owned())?;
        let answer = receiver.recv_timeout(patience).or_else(|_| {
            let mut hanging = self.hanging();
            receiver.try_recv().inspect_err(|_| {
                hanging.insert(device);
            })
        });
        Ok(match answer {
            Ok(Ok(answer)) => Answer::Alive(answer),
            Ok(Err(error)) => Answer::Dead(error),
            Err(_) => Answer::Silent,
        })
    }

    fn hanging(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.hanging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the server look at the root.
fn touch(path: &Path) -> rustix::io::Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
    rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS).map(drop)
}
