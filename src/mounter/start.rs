//! Starting a mounter where none runs: for one machine, without Kubernetes.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::client::Mounter;
use super::folders::Users;
use super::server::LOCK;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::files::FileLock;
use crate::host::workers::Process;
use crate::host::{command, workers};
use crate::socket;

/// Where a mounter listens that nobody has configured.
pub const SOCKET: &str = "/run/berth/mounter.sock";

/// What a mounter is started with.
#[derive(Clone, Debug)]
pub struct Start {
    /// Where it listens. Its other files, and its log, lie in the same folder, which is private.
    pub socket: PathBuf,
    /// It, and its workers below, live in this control group, so that they outlive the one of who starts it.
    pub cgroup: Option<PathBuf>,
    /// The users that workers are; the usual ones by default.
    pub users: Option<Users>,
    /// Berth; by default what runs, even if its file was replaced.
    pub program: PathBuf,
}

impl Start {
    /// With nothing but a socket.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), cgroup: None, users: None, program: "/proc/self/exe".into() }
    }

    /// What a mounter at this socket writes.
    pub fn log(&self) -> PathBuf {
        folder(&self.socket).join("mounter.log")
    }
}

fn folder(socket: &Path) -> &Path {
    socket.parent().unwrap_or(socket)
}

/// Starts a mounter at the socket if none answers there, in a session of its own, and waits until it answers. Blocks.
///
/// # Errors
/// `Unreachable` when it does not answer by the deadline: its log says why.
pub fn start_detached(start: &Start, deadline: Duration) -> Result<()> {
    let end = Instant::now() + deadline;
    let mounter = Mounter::new(&start.socket, deadline);
    if mounter.is_there() {
        return Ok(());
    }
    let folder = folder(&start.socket);
    socket::make_private(folder)?;
    // Of two who start one at the same time the second finds that of the first.
    let _one = FileLock::acquire(&folder.join("start.lock"))?;
    if mounter.is_there() {
        return Ok(());
    }
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut arguments = vec!["mounter".to_owned(), "--detach".to_owned(), "--socket".to_owned(), text(&start.socket)];
    let group = start.cgroup.as_ref().map(|cgroup| cgroup.join("mounter"));
    if let Some(cgroup) = &start.cgroup {
        arguments.extend(["--cgroup".to_owned(), text(&cgroup.join("workers"))]);
    }
    if let Some(Users { first, last }) = start.users {
        arguments.extend(["--uids".to_owned(), format!("{first}-{last}")]);
    }
    command::launch(&text(&start.program), &arguments, group.as_deref(), deadline)?;
    while !mounter.is_there() {
        if Instant::now() > end {
            let log = start.log();
            return Err(Error::new(
                ErrorKind::Unreachable,
                format!("the mounter at {} does not answer: see {}", start.socket.display(), log.display()),
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Ends the mounter whose socket this is, where it was started by [`start_detached`]; none is success. Its workers go on. Blocks.
///
/// # Errors
/// `OutcomeUnknown` when it has not ended by the deadline.
pub fn stop(socket: &Path, deadline: Duration) -> Result<()> {
    let file = folder(socket).join(LOCK);
    let Ok(text) = std::fs::read_to_string(&file) else { return Ok(()) };
    // Held before it is looked at whether it is a mounter: from then on it can be no other process.
    let process = text.parse().ok().and_then(|pid| Process::open(pid).ok());
    let (Some(process), None) = (process, FileLock::try_acquire(&file)?) else { return Ok(()) };
    process.terminate();
    if !process.has_ended(deadline) {
        fail!(OutcomeUnknown, "the mounter at {} does not end within {deadline:?}", socket.display());
    }
    Ok(())
}

/// Starts this program again with these arguments, in the background, writing to the log. Of `berth mounter --detach`.
pub fn detach(start: &Start, arguments: &[String]) -> Result<()> {
    let (log, folder) = (start.log(), folder(&start.socket));
    socket::make_private(folder)?;
    let what = || format!("cannot write {}", log.display());
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&log).context(what)?;
    workers::start_in_background(arguments, file)
}
