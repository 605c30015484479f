//! The mounts of a mounter: each with its descriptor in escrow and a worker, from its beginning to its end.
//!
//! What happens when a worker dies: the descriptor is let go, so that the kernel answers programs with an error instead of
//! letting them wait for nobody, and another worker without a descriptor uploads what the dead one had staged. What a successor
//! would need to go on under a live mount (the answer to INIT) is kept.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::client::Status;
use super::folders::{Folders, short_name};
use super::protocol::{Answer, Connection, Life, Order, Report};
use super::server::Options;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::fuse;
use crate::host::workers::{self, Cgroup, Process};
use crate::objectfs::settings::{Credentials, Settings};

/// A worker that does not answer a question within this time is asked again later.
const QUESTION_LIMIT: Duration = Duration::from_secs(5);
/// Uploading what was staged is tried again after this time, then after twice that, ...
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// ... up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// So often the mounter looks whether a worker was killed and can't end.
const STUCK_CHECK: Duration = Duration::from_secs(5);
/// Beside the memory for data in flight: the program, connections, names.
const OVERHEAD: u64 = 192 << 20;

/// All mounts, by id.
pub(super) struct Mounts {
    options: Options,
    folders: Folders,
    slots: Mutex<BTreeMap<String, Arc<Slot>>>,
}

/// One id: there is at most one worker for it at any time.
#[derive(Default)]
struct Slot {
    /// Who begins a mount holds it.
    gate: tokio::sync::Mutex<()>,
    phase: watch::Sender<Phase>,
}

#[derive(Clone, Default)]
enum Phase {
    /// Nothing is left of it.
    #[default]
    Absent,
    /// A worker serves it, or brings the last of it to safety.
    Running(Arc<Mount>),
    /// The worker has ended too early, and another one uploads what it left.
    Uploading(Arc<Mount>),
    /// The worker has ended too early; its mount is still to be unmounted.
    Dead(Arc<Mount>),
}

/// A mount.
struct Mount {
    settings: Mutex<Settings>,
    mountpoint: PathBuf,
    /// What keeps the connection alive when the worker ends. `None`: let go.
    escrow: Mutex<Option<OwnedFd>>,
    /// What INIT was answered with.
    agreed: Mutex<Option<serde_json::Value>>,
    worker: u32,
    /// What was last heard of it.
    report: Mutex<Report>,
    /// A sleeping upload is to be tried again now.
    hurry: Notify,
    /// A new worker wants to take over: a sleeping upload is to give way.
    give_way: Notify,
}

/// A worker with the connection on which it says what happens.
struct Running {
    process: Process,
    /// `None`: a child of an earlier mounter's.
    child: Option<Child>,
    connection: Connection,
    socket: PathBuf,
}

/// How a worker has ended.
enum End {
    /// As it should, with so many files left on the node's disk.
    Finished { left: u64 },
    /// In the middle of its work.
    Died(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mounts {
    pub(super) fn new(options: Options) -> Self {
        let folders = Folders::new(options.users);
        Self { options, folders, slots: Mutex::default() }
    }

    fn slot(&self, id: &str) -> Arc<Slot> {
        lock(&self.slots).entry(id.to_owned()).or_default().clone()
    }

    fn find(&self, id: &str) -> Option<Arc<Slot>> {
        lock(&self.slots).get(id).cloned()
    }

    /// Starts a worker for a descriptor; see [`Mounter::serve`](super::client::Mounter::serve).
    pub(super) async fn serve(
        self: &Arc<Self>,
        settings: Settings,
        mountpoint: PathBuf,
        fuse: OwnedFd,
        patience: Duration,
    ) -> Result<()> {
        let (id, end) = (settings.id.clone(), Instant::now() + patience);
        let busy = || Error::new(ErrorKind::Busy, format!("an earlier worker of {id} has not come to its end yet"));
        let slot = self.slot(&id);
        let _gate = tokio::time::timeout_at(end, slot.gate.lock()).await.map_err(|_| busy())?;
        let mut phases = slot.phase.subscribe();
        loop {
            let phase = phases.borrow_and_update().clone();
            match phase {
                Phase::Absent | Phase::Dead(_) => break,
                Phase::Running(mount) if mount.is_connected() => return self.again(&mount, &settings).await,
                Phase::Running(_) => {}
                Phase::Uploading(mount) => mount.give_way.notify_one(),
            }
            tokio::time::timeout_at(end, phases.changed()).await.map_err(|_| busy())?.map_err(|_| busy())?;
        }
        let (running, mount) = self.begin(settings, mountpoint, Some(fuse)).await?;
        tracing::info!(volume.id = id, target = %mount.mountpoint.display(), worker = mount.worker, "mounted");
        slot.phase.send_replace(Phase::Running(mount.clone()));
        tokio::spawn(self.clone().watch(slot.clone(), mount, running));
        Ok(())
    }

    /// It is served already. Is it the same?
    async fn again(&self, mount: &Mount, settings: &Settings) -> Result<()> {
        let there = lock(&mount.settings).clone();
        let without = |settings: &Settings| Settings { credentials: None, ..settings.clone() };
        if without(&there) != without(settings) {
            fail!(Conflict, "{} is mounted already, with other settings: unmount it first", settings.id);
        }
        match &settings.credentials {
            Some(credentials) if there.credentials.as_ref() != Some(credentials) => {
                self.give_credentials(mount, credentials).await
            }
            _ => Ok(()),
        }
    }

    /// Gives a mount other credentials.
    pub(super) async fn renew(&self, id: &str, credentials: Credentials) -> Result<()> {
        let phase = self.find(id).map(|slot| slot.phase.borrow().clone());
        match phase {
            Some(Phase::Running(mount)) => self.give_credentials(&mount, &credentials).await,
            Some(Phase::Uploading(mount)) => {
                lock(&mount.settings).credentials = Some(credentials);
                mount.hurry.notify_one();
                Ok(())
            }
            Some(Phase::Dead(_)) => fail!(Precondition, "the worker of {id} has ended: unmount it and mount it again"),
            Some(Phase::Absent) | None => fail!(NotFound, "{id} is not mounted here"),
        }
    }

    async fn give_credentials(&self, mount: &Mount, credentials: &Credentials) -> Result<()> {
        let id = lock(&mount.settings).id.clone();
        let what = || format!("cannot give the worker of {id} other credentials");
        match self.ask(&id, &Order::Renew { credentials: credentials.clone() }).await.context(what)? {
            Answer::Failed(failure) => Err(failure.into()),
            _ => {
                lock(&mount.settings).credentials = Some(credentials.clone());
                Ok(())
            }
        }
    }

    /// How a mount is doing. `None`: there is none.
    pub(super) async fn status(&self, id: &str) -> Option<Status> {
        let phase = self.find(id)?.phase.borrow().clone();
        let (mount, worker) = match phase {
            Phase::Absent => return None,
            Phase::Running(mount) => {
                if let Ok(Answer::Report(report)) = self.ask(id, &Order::Report).await {
                    *lock(&mount.report) = report;
                }
                let worker = Some(mount.worker);
                (mount, worker)
            }
            Phase::Uploading(mount) | Phase::Dead(mount) => (mount, None),
        };
        let Report { progress, used, limit } = *lock(&mount.report);
        Some(Status { id: id.to_owned(), mountpoint: mount.mountpoint.clone(), worker, progress, used, limit })
    }

    /// How all mounts are doing.
    pub(super) async fn list(&self) -> Vec<Status> {
        let ids: Vec<_> = lock(&self.slots).keys().cloned().collect();
        let asked = ids.iter().map(|id| self.status(id));
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }

    /// Waits for the end of what was unmounted.
    pub(super) async fn ended(&self, id: &str, patience: Duration) -> Result<()> {
        let Some(slot) = self.find(id) else { return Ok(()) };
        let end = Instant::now() + patience;
        let late = |why: &str| Error::new(ErrorKind::OutcomeUnknown, format!("{id} is not finished: {why}"));
        drop(tokio::time::timeout_at(end, slot.gate.lock()).await.map_err(|_| late("its worker is being started"))?);
        let mut phases = slot.phase.subscribe();
        loop {
            let phase = phases.borrow_and_update().clone();
            let why = match phase {
                Phase::Absent => return Ok(()),
                Phase::Dead(_) => {
                    slot.phase.send_replace(Phase::Absent);
                    return Ok(());
                }
                Phase::Running(mount) if mount.is_connected() => "it is still mounted",
                Phase::Running(_) | Phase::Uploading(_) => "what was written is still on its way to the bucket",
            };
            tokio::time::timeout_at(end, phases.changed()).await.map_err(|_| late(why))?.map_err(|_| late(why))?;
        }
    }

    /// Caches in use, each with how many bytes it may hold.
    pub(super) fn caches(&self) -> BTreeMap<PathBuf, u64> {
        let slots: Vec<_> = lock(&self.slots).values().cloned().collect();
        let mut caches = BTreeMap::new();
        for slot in slots {
            let (Phase::Running(mount) | Phase::Uploading(mount) | Phase::Dead(mount)) = slot.phase.borrow().clone()
            else {
                continue;
            };
            let settings = lock(&mount.settings);
            if let Some(cache) = &settings.cache {
                let size = caches.entry(cache.clone()).or_insert(settings.cache_size);
                *size = settings.cache_size.max(*size);
            }
        }
        caches
    }

    /// Starts a worker and waits until it is ready.
    async fn begin(
        self: &Arc<Self>,
        settings: Settings,
        mountpoint: PathBuf,
        fuse: Option<OwnedFd>,
    ) -> Result<(Running, Arc<Mount>)> {
        let (this, planned) = (self.clone(), settings.clone());
        let started = tokio::task::spawn_blocking(move || this.start(&planned)).await;
        let (process, child, socket) =
            started.map_err(std::io::Error::other).context(|| "cannot go on".to_owned())??;
        let id = settings.id.clone();
        let talk = async {
            let mut connection = Connection::new(UnixStream::connect(&socket).await?)?;
            let order = Order::Begin { settings: Box::new(settings.clone()), mountpoint: mountpoint.clone() };
            let descriptors: Vec<_> = fuse.iter().map(AsFd::as_fd).collect();
            connection.send(&order, &descriptors).await?;
            loop {
                match tokio::time::timeout(QUESTION_LIMIT, connection.expect::<Answer>()).await {
                    Ok(answer) => return Ok::<_, std::io::Error>((connection, answer?.message)),
                    // Nobody waits for it any more.
                    Err(_) if fuse.as_ref().is_some_and(workers::is_disconnected) => {
                        return Err(std::io::Error::other("it was unmounted meanwhile"));
                    }
                    Err(_) => {}
                }
            }
        };
        let said = talk.await;
        let worker = process.pid();
        let refused = match said {
            Ok((connection, Answer::Ready)) => {
                let running = Running { process, child: Some(child), connection, socket };
                let mount = Mount::new(settings, mountpoint, fuse, worker);
                return Ok((running, Arc::new(mount)));
            }
            Ok((_, Answer::Failed(failure))) => failure.into(),
            Ok(_) => Error::new(ErrorKind::Internal, format!("the worker of {id} answers something else")),
            Err(error) => {
                Error::caused(ErrorKind::Internal, format!("the worker of {id} has ended before it began"), error)
            }
        };
        process.kill();
        self.bury(Some(child), &socket, &id).await;
        Err(refused)
    }

    /// Starts the process, listening already. Blocks.
    fn start(&self, settings: &Settings) -> Result<(Process, Child, PathBuf)> {
        let user = self.folders.prepare(settings)?;
        let name = short_name(&settings.id);
        let socket = self.options.workers().join(format!("{name}.sock"));
        let listener = listen(&socket, &settings.id)?;
        let high = settings.memory.saturating_add(OVERHEAD);
        let cgroup = self.options.cgroup.as_deref().map(|parent| Cgroup::make(parent, &name, high, high * 2));
        let cgroup = cgroup.transpose()?;
        let plan = workers::Plan {
            arguments: &["worker", "--name", &settings.id],
            environment: &self.options.environment,
            user,
            cgroup: cgroup.as_ref(),
        };
        let (process, child) = workers::start(&plan, listener)?.into_parts();
        Ok((process, child, socket))
    }

    /// Takes away what a worker that has ended leaves outside.
    async fn bury(&self, child: Option<Child>, socket: &Path, id: &str) -> Option<String> {
        let status = match child {
            // It has ended, or was killed: this takes no time.
            Some(mut child) => tokio::task::spawn_blocking(move || child.wait()).await.ok().and_then(Result::ok),
            None => None,
        };
        let _ = std::fs::remove_file(socket);
        if let Some(parent) = &self.options.cgroup {
            Cgroup::remove(parent, &short_name(id));
        }
        status.map(|status| status.to_string())
    }

    /// Accompanies a worker that serves a mount, and puts right what it leaves when it ends.
    async fn watch(self: Arc<Self>, slot: Arc<Slot>, mount: Arc<Mount>, running: Running) {
        let id = lock(&mount.settings).id.clone();
        let end = self.until_end(&mount, running).await;
        // With the last descriptor the kernel gives the connection up, and programs get an answer.
        drop(lock(&mount.escrow).take());
        match end {
            End::Finished { left: 0 } => {
                tracing::info!(volume.id = id, "unmounted, and everything is in the bucket");
                self.forget(&slot, &mount);
            }
            End::Finished { left } => {
                tracing::warn!(volume.id = id, files = left, "unmounted, but not everything is in the bucket yet");
                self.upload(&slot, &mount, Phase::Absent).await;
            }
            End::Died(how) => {
                tracing::error!(
                    volume.id = id,
                    worker = mount.worker,
                    how,
                    "the worker of a mount has died: programs get errors until it is mounted again"
                );
                self.upload(&slot, &mount, Phase::Dead(mount.clone())).await;
            }
        }
    }

    fn forget(&self, slot: &Slot, mount: &Mount) {
        Folders::tidy(&lock(&mount.settings));
        slot.phase.send_replace(Phase::Absent);
    }

    /// Hears what a worker has to say until it has ended, and takes the remains away.
    async fn until_end(&self, mount: &Mount, running: Running) -> End {
        let Running { process, child, mut connection, socket } = running;
        let mut finished = None;
        let mut hear = |life| match life {
            Life::Agreed(agreed) => *lock(&mount.agreed) = Some(agreed),
            Life::Ended { left } => finished = Some(left),
        };
        // The kernel closes its end when it ends, whatever ends it.
        let hearing = async {
            while let Ok(Some(frame)) = connection.receive::<Answer>().await {
                if let Answer::Life(life) = frame.message {
                    hear(life);
                }
            }
        };
        tokio::select! {
            () = hearing => {}
            never = mount.free_what_is_stuck(&process) => match never {},
        }
        drop(connection);
        // Provably gone before another one touches what it has staged.
        let gone = tokio::task::spawn_blocking(move || while !process.has_ended(Duration::from_secs(60)) {});
        let _ = gone.await;
        let id = lock(&mount.settings).id.clone();
        let status = self.bury(child, &socket, &id).await;
        match finished {
            Some(left) => End::Finished { left },
            None => End::Died(status.unwrap_or_else(|| "nobody knows how".to_owned())),
        }
    }

    /// Has workers without a descriptor upload what was staged, until it is done. `then`: what is there afterwards.
    async fn upload(self: &Arc<Self>, slot: &Slot, mount: &Arc<Mount>, then: Phase) {
        slot.phase.send_replace(Phase::Uploading(mount.clone()));
        let id = lock(&mount.settings).id.clone();
        let mut pause = FIRST_PAUSE;
        loop {
            let settings = lock(&mount.settings).clone();
            let problem = match self.begin(settings, mount.mountpoint.clone(), None).await {
                Ok((running, uploader)) => match self.until_end(&uploader, running).await {
                    End::Finished { left: 0 } => break,
                    End::Finished { left } => format!("{left} files are left"),
                    End::Died(how) => format!("its worker has died ({how})"),
                },
                Err(error) => error.to_string(),
            };
            tracing::warn!(volume.id = id, problem, retry_in = ?pause, "cannot upload what was staged");
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                () = mount.hurry.notified() => {}
                // The next worker finds what is staged by itself.
                () = mount.give_way.notified() => {
                    slot.phase.send_replace(then);
                    return;
                }
            }
        }
        tracing::info!(volume.id = id, "what was staged is in the bucket");
        self.forget(slot, mount);
        slot.phase.send_replace(then);
    }

    /// Finds the workers of an earlier mounter and takes duplicates of their descriptors. A worker that does not answer now is
    /// asked again later.
    pub(super) async fn adopt_all(self: &Arc<Self>) -> Result<()> {
        let folder = self.options.workers();
        let entries = std::fs::read_dir(&folder).context(|| format!("cannot list {}", folder.display()))?;
        let sockets: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        let adopted = sockets.iter().map(|socket| self.adopt(socket));
        for (socket, adopted) in sockets.iter().zip(futures_util::future::join_all(adopted).await) {
            if let Err(error) = adopted {
                tracing::error!(socket = %socket.display(), %error, "cannot take over a worker: trying again");
                let (this, socket) = (self.clone(), socket.clone());
                tokio::spawn(async move {
                    while this.adopt(&socket).await.is_err() {
                        tokio::time::sleep(FIRST_PAUSE).await;
                    }
                });
            }
        }
        Ok(())
    }

    async fn adopt(self: &Arc<Self>, socket: &Path) -> std::io::Result<()> {
        let stream = match UnixStream::connect(socket).await {
            Ok(stream) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                tracing::warn!(socket = %socket.display(), "a worker has ended while there was no mounter");
                return std::fs::remove_file(socket);
            }
            // Another attempt was faster.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let ask = async {
            let mut connection = Connection::with_senders(stream)?;
            connection.send(&Order::Adopt, &[]).await?;
            let frame = connection.expect::<Answer>().await?;
            Ok::<_, std::io::Error>((connection, frame))
        };
        let (connection, mut frame) = tokio::time::timeout(QUESTION_LIMIT, ask).await??;
        let Answer::Held { settings, mountpoint } = frame.message else {
            // It was started and never got its work: it ends by itself, and its mount is dead.
            return std::fs::remove_file(socket);
        };
        let pid = frame.sender.and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default();
        let process = Process::open(pid)?;
        let fuse = frame.descriptors.pop();
        let slot = self.slot(&settings.id);
        tracing::info!(volume.id = settings.id, target = %mountpoint.display(), worker = pid, "took a worker over");
        let uploads_only = fuse.is_none();
        let mount = Arc::new(Mount::new(*settings, mountpoint, fuse, pid));
        let running = Running { process, child: None, connection, socket: socket.to_owned() };
        let phase = if uploads_only { Phase::Uploading } else { Phase::Running };
        slot.phase.send_replace(phase(mount.clone()));
        let this = self.clone();
        tokio::spawn(async move {
            if !uploads_only {
                return this.watch(slot, mount, running).await;
            }
            match this.until_end(&mount, running).await {
                End::Finished { left: 0 } => this.forget(&slot, &mount),
                End::Finished { .. } | End::Died(_) => this.upload(&slot, &mount, Phase::Absent).await,
            }
        });
        Ok(())
    }

    /// One question to a worker.
    async fn ask(&self, id: &str, order: &Order) -> std::io::Result<Answer> {
        let socket = self.options.workers().join(format!("{}.sock", short_name(id)));
        let asked = async {
            let mut connection = Connection::new(UnixStream::connect(&socket).await?)?;
            connection.send(order, &[]).await?;
            Ok(connection.expect::<Answer>().await?.message)
        };
        tokio::time::timeout(QUESTION_LIMIT, asked).await?
    }
}

impl Mount {
    fn new(settings: Settings, mountpoint: PathBuf, fuse: Option<OwnedFd>, worker: u32) -> Self {
        Self {
            settings: Mutex::new(settings),
            mountpoint,
            escrow: Mutex::new(fuse),
            agreed: Mutex::default(),
            worker,
            report: Mutex::default(),
            hurry: Notify::new(),
            give_way: Notify::new(),
        }
    }

    /// A killed worker whose thread tells the kernel something waits for a directory, which a program's request to this worker
    /// holds: neither ever ends. The connection is aborted then, which frees both.
    async fn free_what_is_stuck(&self, process: &Process) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(STUCK_CHECK).await;
            if !process.is_stuck_in_its_end() {
                continue;
            }
            let number = lock(&self.escrow).as_ref().and_then(fuse::connection_of_descriptor);
            let number = number.map_or_else(|| fuse::connection_of(&self.mountpoint), |number| Ok(Some(number)));
            let aborted = number.and_then(|number| number.map(fuse::abort).transpose());
            match aborted {
                Ok(Some(())) => {
                    tracing::warn!(worker = self.worker, "a killed worker was stuck: its mount is given up")
                }
                Ok(None) => tracing::error!(worker = self.worker, "a killed worker is stuck: use `umount -f`"),
                Err(error) => {
                    tracing::error!(worker = self.worker, %error, "a killed worker is stuck: use `umount -f`")
                }
            }
        }
    }

    /// Is the file system still mounted somewhere?
    fn is_connected(&self) -> bool {
        lock(&self.escrow).as_ref().is_some_and(|fuse| !workers::is_disconnected(fuse))
    }
}

/// A worker's socket: in a folder that only this user enters.
fn listen(socket: &Path, id: &str) -> Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        fail!(Busy, "a worker of {id} that an earlier mounter has started does not answer yet");
    }
    let what = || format!("cannot listen at {}", socket.display());
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context(what),
        _ => {}
    }
    UnixListener::bind(socket).context(what)
}
