//! One lane: the contenders on one way to the service, measured in turns.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::contender::{Mount, Mounts, Who};
use super::raw::Raw;
use super::sheet::{Metric, Sheet};

/// What takes longer is given up.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// So long those who were given up may take to end.
const END: Duration = Duration::from_secs(30);
/// Who has taken so long for a pass is not asked again: a second round would change little.
const ENOUGH: Duration = Duration::from_secs(10);

/// A way to the service, and what was measured on it.
pub(crate) struct Lane<'a> {
    pub(crate) mounts: Mounts,
    /// The bare client that is measured: on the same way.
    pub(crate) bare: Raw,
    /// The other client, which makes files and looks whether they are there: close to the service.
    pub(crate) other: &'a Raw,
    pub(crate) sheet: Sheet,
    /// The archive to unpack.
    pub(crate) archive: PathBuf,
    pub(crate) who: Vec<Who>,
    pub(crate) rounds: usize,
    /// What went wrong with Berth.
    pub(crate) failures: Vec<String>,
}

/// Something took longer than [`LIMIT`].
#[derive(Debug)]
struct Beyond;

impl std::fmt::Display for Beyond {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not done within {LIMIT:?}")
    }
}

impl std::error::Error for Beyond {}

/// A part of the work, done by one contender in one round.
pub(crate) type Pass = fn(&mut Lane<'_>, Who, usize) -> Result<()>;

impl Lane<'_> {
    /// Lets all contenders do a pass, in turns, each round beginning with another one.
    pub(crate) fn in_turns(&mut self, name: &str, pass: Pass) {
        let mut left: Vec<_> = self.who.iter().map(|who| (*who, Duration::ZERO)).collect();
        for round in 0..self.rounds {
            let count = left.len();
            left.rotate_left(usize::from(round > 0).min(count));
            for (who, spent) in &mut left {
                if self.mounts.programs.are_over() {
                    return;
                }
                let begun = Instant::now();
                if let Err(error) = pass(self, *who, round) {
                    eprintln!("{name}: {who}, round {round}: {error:#}");
                    *spent += ENOUGH;
                    if who.is_ours() && !error.is::<Beyond>() {
                        self.failures.push(format!("{name}: {who}: {error:#}"));
                    }
                }
                *spent += begun.elapsed();
            }
            left.retain(|(_, spent)| *spent < ENOUGH);
        }
    }

    /// Times what a program does in a mount, until another client sees it. Returns what the program returned.
    pub(crate) fn measure<T: Send + 'static>(
        &mut self,
        mount: &Mount,
        metric: Metric,
        work: impl FnOnce(&Path) -> Result<T> + Send + 'static,
        seen: impl FnOnce(&Raw) -> Result<()>,
    ) -> Result<T> {
        let begun = Instant::now();
        let done = within(mount, work).and_then(|value| seen(self.other).map(|()| value));
        let seconds = begun.elapsed().as_secs_f64();
        self.note(metric, mount.who, seconds, done)
    }

    /// Times the bare client.
    pub(crate) fn measure_bare(&mut self, metric: Metric, work: impl FnOnce(&Raw) -> Result<()>) -> Result<()> {
        let begun = Instant::now();
        let done = work(&self.bare);
        let seconds = begun.elapsed().as_secs_f64();
        self.note(metric, Who::Raw, seconds, done)
    }

    fn note<T>(&mut self, metric: Metric, who: Who, seconds: f64, done: Result<T>) -> Result<T> {
        match &done {
            Ok(_) => self.sheet.add(metric, who, seconds),
            Err(error) if error.is::<Beyond>() => self.sheet.add_beyond(metric, who, LIMIT.as_secs_f64()),
            Err(_) => self.sheet.add_failure(metric, who),
        }
        done.with_context(|| format!("{metric:?}"))
    }
}

/// Does something in a mount, in a thread of its own, since a call into a mount that hangs can't be given up by itself: the mount
/// is ended then.
fn within<T: Send + 'static>(mount: &Mount, work: impl FnOnce(&Path) -> Result<T> + Send + 'static) -> Result<T> {
    let (send, done) = mpsc::channel();
    let path = mount.path.clone();
    std::thread::spawn(move || send.send(work(&path)));
    match done.recv_timeout(LIMIT) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => {
            mount.abort();
            match done.recv_timeout(END) {
                Err(mpsc::RecvTimeoutError::Timeout) => bail!("a program hangs in the mount of {}", mount.who),
                _ => Err(Beyond.into()),
            }
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the program in the mount of {} broke", mount.who),
    }
}
