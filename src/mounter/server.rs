//! `berth mounter`: answers the driver and the command line, and never ends a worker.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

use super::folders::Users;
use super::mounts::Mounts;
use super::protocol::{Connection, Failure, Frame, Reply, Request};
use crate::error::{Context, Error, Result};
use crate::host::files::FileLock;
use crate::host::workers::Cgroup;
use crate::objectfs::content;
use crate::socket::{self, Directory};

/// Locked by a running mounter, whose process id is in it.
pub(super) const LOCK: &str = "mounter.lock";

/// Caches are looked at after so long.
const EVICTION: Duration = Duration::from_secs(10);

/// How a mounter works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub socket: PathBuf,
    /// Its own folder: workers' sockets, its lock. Private.
    pub run_dir: PathBuf,
    /// Each worker gets a control group of version 2 below this one, with a limit on memory. Absent: no limits.
    pub cgroup: Option<PathBuf>,
    /// The users that workers are. `None`: workers are this process' own user.
    pub users: Option<Users>,
    /// All of a worker's environment.
    pub environment: Vec<(String, String)>,
}

impl Options {
    pub(super) fn workers(&self) -> PathBuf {
        self.run_dir.join("workers")
    }
}

/// Serves until SIGTERM or SIGINT. Workers go on, and the next mounter takes them over.
///
/// # Errors
/// `Precondition` when there is another mounter, or the control group knows no memory; when its folders or its socket can't be
/// made.
pub async fn run(options: Options) -> Result<()> {
    let (run_dir, workers) = (options.run_dir.clone(), options.workers());
    socket::make_private(&run_dir)?;
    socket::make_private(&workers)?;
    let lock_file = run_dir.join(LOCK);
    let Some(lock) = FileLock::try_acquire(&lock_file)? else {
        fail!(Precondition, "another mounter works in {}", run_dir.display());
    };
    // For whoever stops it: who holds the lock.
    let mut who = lock.file();
    who.set_len(0)
        .and_then(|()| write!(who, "{}", std::process::id()))
        .context(|| format!("cannot write {}", lock_file.display()))?;
    let (listener, file) = socket::bind(&options.socket, Directory::Shared)?;
    if options.users.is_none() {
        tracing::warn!("not root: workers are this same user, and can read each other's files");
    }
    match &options.cgroup {
        Some(parent) => Cgroup::prepare(parent)?,
        None => tracing::info!("no control group is configured: workers' memory has no limit but their own budget"),
    }
    let mounts = Arc::new(Mounts::new(options));
    let watch = |kind| signal(kind).context(|| "cannot watch for signals".to_owned());
    let (mut terminate, mut interrupt) = (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?);
    mounts.adopt_all().await?;
    tracing::info!("ready");
    let evicting = tokio::spawn(evict(mounts.clone()));
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        tokio::spawn(talk(mounts.clone(), stream));
    }
    drop(file);
    evicting.abort();
    tracing::info!("ending: workers go on, and the next mounter takes them over");
    Ok(())
}

/// Keeps caches at their size: workers can't, since they don't see what others have put there.
async fn evict(mounts: Arc<Mounts>) {
    loop {
        tokio::time::sleep(EVICTION).await;
        for (folder, size) in mounts.caches() {
            let evicted = tokio::task::spawn_blocking({
                let folder = folder.clone();
                move || content::evict(&folder, size)
            });
            if let Ok(Err(error)) = evicted.await {
                tracing::warn!(folder = %folder.display(), %error, "cannot evict from the cache");
            }
        }
    }
}

async fn talk(mounts: Arc<Mounts>, stream: UnixStream) {
    let talked = async {
        let mut connection = Connection::new(stream)?;
        while let Some(frame) = connection.receive::<Request>().await? {
            let reply = answer(&mounts, frame).await;
            if let Reply::Failed(failure) = &reply {
                tracing::warn!(%failure, "refused");
            }
            connection.send(&reply, &[]).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    if let Err(error) = talked.await {
        tracing::warn!(%error, "a connection broke off");
    }
}

async fn answer(mounts: &Arc<Mounts>, frame: Frame<Request>) -> Reply {
    let done = match frame.message {
        Request::Serve { settings, mountpoint, patience } => {
            let mut descriptors = frame.descriptors;
            match descriptors.pop() {
                Some(fuse) => mounts.serve(*settings, mountpoint, fuse, Duration::from_millis(patience)).await,
                None => Err(Error::new(crate::error::ErrorKind::Invalid, "no descriptor came with the request")),
            }
        }
        Request::Renew { id, credentials } => mounts.renew(&id, credentials).await,
        Request::Ended { id, patience } => mounts.ended(&id, Duration::from_millis(patience)).await,
        Request::Status { id } => return Reply::Mounts(mounts.status(&id).await.into_iter().collect()),
        Request::List => return Reply::Mounts(mounts.list().await),
    };
    match done {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Failed(Failure::from(&error)),
    }
}
