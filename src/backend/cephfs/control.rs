//! Commands to Ceph: connections, deadlines, and what is known of commands that were never answered.
//!
//! A connection is shared by all calls of one user, made when it is first needed, and dropped when nobody has used it
//! for a while. Each command has a thread to itself. When its deadline passes, the caller leaves and the thread
//! waits on: librados sends the command again when the daemon is back, and nobody can call it back. So a command that
//! changes a subvolume and was not answered keeps every further change of that subvolume away until it is: a Delete
//! that comes late must not meet the volume that was made after it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::host::Errno;
use crate::host::librados::{self, Failure, Librados, Target};
use crate::telemetry::Metrics;

/// So long a connection may take, within the command's deadline.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection that nobody has used for so long is dropped.
const IDLE: Duration = Duration::from_secs(300);
/// A connection that leaves a command unanswered is made again, but not more often than this.
const DOUBTED: Duration = Duration::from_secs(60);
/// More commands than this waiting for an answer of one cluster after their deadline: no further one is sent to it.
const UNANSWERED: usize = 64;
/// So long a thread waits for its next command.
const LINGER: Duration = Duration::from_secs(10);
/// Enough for librados' own frames. Memory is taken only where it is touched.
const STACK: usize = 512 << 10;

/// Makes connections.
pub(super) trait Connector: Send + Sync {
    /// Blocks at most `patience`.
    fn connect(&self, monitors: &str, user: &str, key: &str, patience: Duration) -> Result<Arc<dyn Ceph>, Failure>;
}

/// One connection.
pub(super) trait Ceph: Send + Sync {
    /// Blocks until the command has been answered.
    fn command(&self, target: Target, command: &str) -> Result<Vec<u8>, Failure>;
    /// The cluster's own id.
    fn fsid(&self) -> &str;
}

/// A user and its key, as a call brought them.
pub(super) struct Account {
    pub(super) user: String,
    pub(super) key: String,
}

/// A command, and what it changes.
pub(super) struct Command {
    pub(super) target: Target,
    pub(super) prefix: &'static str,
    pub(super) arguments: Vec<(&'static str, Value)>,
    /// The subvolume that it changes; `None`: it only asks.
    pub(super) changes: Option<String>,
}

/// Why a command failed.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Ceph refused.
    Refused(Failure),
    /// There is no answer, or no connection: already an error to be shown.
    Unanswered(Error),
}

pub(super) struct Control {
    connector: Arc<dyn Connector>,
    deadline: Duration,
    pub(super) idle: Duration,
    metrics: Arc<Metrics>,
    pool: Arc<Mutex<Pool>>,
    waiting: Arc<Mutex<Waiting>>,
    threads: Arc<Threads>,
}

/// Cluster, user, and a digest of the key: who brings another key shall not use the connection of the right one.
type Key = (String, String, [u8; 32]);

#[derive(Default)]
struct Pool {
    slots: BTreeMap<Key, Arc<Slot>>,
    /// A thread looks for idle ones.
    is_watched: bool,
}

/// Commands whose deadline has passed.
#[derive(Default)]
struct Waiting {
    /// By cluster: one that hangs holds up no other.
    counts: BTreeMap<String, usize>,
    subvolumes: BTreeSet<String>,
}

/// Threads that send commands. One that is done waits a moment for the next: to start one for each command, with what
/// the library sets up for a new thread, took as long as a quarter of `fs subvolume info`.
#[derive(Default)]
struct Threads {
    idle: Mutex<Vec<(ThreadId, mpsc::Sender<Job>)>>,
}

/// A command on its way.
struct Job {
    session: Session,
    cluster: String,
    target: Target,
    prefix: &'static str,
    text: String,
    /// The subvolume that it changes.
    changes: Option<String>,
    waiting: Arc<Mutex<Waiting>>,
    answer: mpsc::SyncSender<Result<Vec<u8>, Failure>>,
}

/// At most one connection; who needs it waits for who makes it.
struct Slot {
    state: Mutex<State>,
    used: Mutex<Instant>,
}

#[derive(Default)]
struct State {
    session: Option<Session>,
    made: Option<Instant>,
    /// What the last attempt ended with, and when. Who was waiting for it does not make another one.
    failed: Option<(Instant, Failure)>,
}

/// A connection, and what it told about its cluster.
#[derive(Clone)]
pub(super) struct Session {
    connection: Arc<dyn Ceph>,
    /// The monitors' addresses, `v2:HOST:PORT,v1:HOST:PORT,...`, from the monitor map.
    pub(super) monitors: Arc<str>,
}

impl Session {
    pub(super) fn fsid(&self) -> &str {
        self.connection.fsid()
    }
}

impl Control {
    pub(super) fn new(connector: Arc<dyn Connector>, deadline: Duration, metrics: Arc<Metrics>) -> Self {
        let (pool, waiting, threads) = Default::default();
        Self { connector, deadline, idle: IDLE, metrics, pool, waiting, threads }
    }

    /// Sends a command and waits for its answer until the deadline.
    pub(super) fn ask(&self, cluster: &Cluster, account: &Account, command: Command) -> Result<Vec<u8>, Trouble> {
        let begun = Instant::now();
        let prefix = command.prefix;
        let slot = self.slot(cluster, account);
        let result = self.session_of(&slot, cluster, account).and_then(|session| self.send(cluster, session, command));
        if let Err(trouble) = &result {
            slot.doubt(trouble);
        }
        let errno = match &result {
            Ok(_) => 0,
            Err(Trouble::Refused(failure)) => failure.errno.raw_os_error(),
            Err(Trouble::Unanswered(_)) => Errno::TIMEDOUT.raw_os_error(),
        };
        self.metrics.ceph_answered(&cluster.name, prefix, errno, begun.elapsed());
        result
    }

    /// The cluster as this account's connection knows it; connects if need be.
    pub(super) fn session(&self, cluster: &Cluster, account: &Account) -> Result<Session, Trouble> {
        self.session_of(&self.slot(cluster, account), cluster, account)
    }

    fn slot(&self, cluster: &Cluster, account: &Account) -> Arc<Slot> {
        let key = (cluster.name.clone(), account.user.clone(), Sha256::digest(account.key.as_bytes()).into());
        let mut pool = locked(&self.pool);
        let slot = pool.slots.entry(key).or_insert_with(|| Arc::new(Slot::new())).clone();
        *locked(&slot.used) = Instant::now();
        if !std::mem::replace(&mut pool.is_watched, true) {
            self.watch_idle();
        }
        slot
    }

    fn session_of(&self, slot: &Slot, cluster: &Cluster, account: &Account) -> Result<Session, Trouble> {
        let begun = Instant::now();
        let mut state = locked(&slot.state);
        if let Some(session) = &state.session {
            return Ok(session.clone());
        }
        let failure = match &state.failed {
            Some((when, failure)) if *when >= begun => failure.clone(),
            _ => match self.connect(cluster, account) {
                Ok(session) => {
                    *state = State { session: Some(session.clone()), made: Some(Instant::now()), failed: None };
                    return Ok(session);
                }
                Err(failure) => {
                    state.failed = Some((Instant::now(), failure.clone()));
                    failure
                }
            },
        };
        Err(Trouble::Unanswered(cannot_connect(cluster, &account.user, &failure)))
    }

    /// On a thread of its own: librados keeps to its time limit only until it is connected.
    fn connect(&self, cluster: &Cluster, account: &Account) -> Result<Session, Failure> {
        let monitors = cluster.monitors.join(",");
        let (user, key) = (account.user.clone(), account.key.clone());
        let (connector, patience) = (self.connector.clone(), CONNECT.min(self.deadline));
        let (sender, receiver) = mpsc::sync_channel(1);
        let started = std::thread::Builder::new().name("ceph-connect".to_owned()).spawn(move || {
            let connect = || {
                let connection = connector.connect(&monitors, &user, &key, patience)?;
                let map = connection.command(Target::Monitor, r#"{"prefix":"mon dump","format":"json"}"#)?;
                let monitors = monitor_addresses(&map).unwrap_or(monitors).into();
                Ok(Session { connection, monitors })
            };
            // Whoever asked may have left.
            let _ = sender.send(connect());
        });
        let failure = |errno, message: String| Failure { errno, message };
        started.map_err(|error| failure(Errno::AGAIN, format!("cannot start a thread to connect: {error}")))?;
        let unanswered = |_| failure(Errno::TIMEDOUT, String::new());
        let session = receiver.recv_timeout(self.deadline).map_err(unanswered)??;
        tracing::info!(cluster = cluster.name, user = account.user, fsid = session.fsid(), "connected to Ceph");
        Ok(session)
    }

    fn send(&self, cluster: &Cluster, session: Session, command: Command) -> Result<Vec<u8>, Trouble> {
        let Command { target, prefix, arguments, changes } = command;
        {
            let waiting = locked(&self.waiting);
            let count = waiting.counts.get(&cluster.name).copied().unwrap_or_default();
            if count >= UNANSWERED {
                let message = format!("cluster {} has not answered {count} commands yet", cluster.name);
                return Err(Trouble::Unanswered(Error::new(ErrorKind::Unreachable, message)));
            }
            if let Some(subvolume) = changes.as_ref().filter(|subvolume| waiting.subvolumes.contains(*subvolume)) {
                let message = format!("an earlier change of {subvolume} has not been answered by Ceph yet: try again");
                return Err(Trouble::Unanswered(Error::new(ErrorKind::Busy, message)));
            }
        }
        let arguments = arguments.into_iter().map(|(key, value)| (key.to_owned(), value));
        let fixed = [("prefix".to_owned(), prefix.into()), ("format".to_owned(), "json".into())];
        let text = Value::Object(fixed.into_iter().chain(arguments).collect()).to_string();
        let (sender, receiver) = mpsc::sync_channel(1);
        let job = Job {
            session,
            target,
            prefix,
            text,
            cluster: cluster.name.clone(),
            changes: changes.clone(),
            waiting: self.waiting.clone(),
            answer: sender,
        };
        let started = self.threads.run(job);
        if let Err(error) = started {
            return Err(Trouble::Unanswered(Error::io("cannot start a thread for a command to Ceph", error)));
        }
        match receiver.recv_timeout(self.deadline) {
            Ok(result) => result.map_err(Trouble::Refused),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(Trouble::Unanswered(Error::new(ErrorKind::Internal, format!("`{prefix}` ended in a panic"))))
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let mut waiting = locked(&self.waiting);
                // It may have come since.
                if let Ok(result) = receiver.try_recv() {
                    return result.map_err(Trouble::Refused);
                }
                drop(receiver);
                *waiting.counts.entry(cluster.name.clone()).or_default() += 1;
                let kind = if changes.is_some() { ErrorKind::OutcomeUnknown } else { ErrorKind::Unreachable };
                waiting.subvolumes.extend(changes);
                let who = if target == Target::Manager { "manager" } else { "monitor" };
                let message =
                    format!("no {who} of cluster {} has answered `{prefix}` within {:?}", cluster.name, self.deadline);
                Err(Trouble::Unanswered(Error::new(kind, message)))
            }
        }
    }

    /// Drops connections that nobody uses, for as long as there are any.
    fn watch_idle(&self) {
        let (pool, idle) = (Arc::downgrade(&self.pool), self.idle);
        let watcher = std::thread::Builder::new().name("ceph-idle".to_owned()).stack_size(STACK);
        let started = watcher.spawn(move || {
            loop {
                std::thread::sleep(idle / 2);
                match Weak::upgrade(&pool) {
                    Some(pool) if drop_idle(&pool, idle) => {}
                    _ => return,
                }
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "connections to Ceph are kept for ever");
        }
    }
}

impl Threads {
    /// Hands the command to a thread, started if none is idle.
    fn run(self: &Arc<Self>, mut job: Job) -> std::io::Result<()> {
        let idle = locked(&self.idle).pop();
        if let Some((_, thread)) = idle {
            match thread.send(job) {
                Ok(()) => return Ok(()),
                // It has ended in a panic.
                Err(mpsc::SendError(back)) => job = back,
            }
        }
        let threads = self.clone();
        let thread = std::thread::Builder::new().name("ceph-command".to_owned()).stack_size(STACK);
        thread.spawn(move || threads.work(job)).map(drop)
    }

    /// A thread's life.
    fn work(&self, mut job: Job) {
        let this = std::thread::current().id();
        let (sender, receiver) = mpsc::channel();
        loop {
            // Before the answer is given, so that the caller's next command finds this thread.
            job.done(|| locked(&self.idle).push((this, sender.clone())));
            job = match receiver.recv_timeout(LINGER) {
                Ok(next) => next,
                Err(_) => {
                    let mut idle = locked(&self.idle);
                    let count = idle.len();
                    idle.retain(|(thread, _)| *thread != this);
                    if idle.len() < count {
                        return;
                    }
                    drop(idle);
                    // Somebody has just taken it out, to send a command.
                    let Ok(next) = receiver.recv() else { return };
                    next
                }
            }
        }
    }
}

impl Job {
    fn done(self, free: impl FnOnce()) {
        let Self { session, cluster, target, prefix, text, changes, waiting, answer } = self;
        let result = session.connection.command(target, &text);
        drop(session);
        free();
        // Whoever gave it up has written it down before this lock is free.
        let mut waiting = locked(&waiting);
        if answer.try_send(result).is_err() {
            if let Some(count) = waiting.counts.get_mut(&cluster) {
                *count -= 1;
            }
            if let Some(subvolume) = changes {
                waiting.subvolumes.remove(&subvolume);
            }
            tracing::warn!(command = prefix, "Ceph has answered a command that nobody waits for any more");
        }
    }
}

/// Drops what has not been used for so long. Is there anything left to be watched?
fn drop_idle(pool: &Mutex<Pool>, idle: Duration) -> bool {
    let mut pool = locked(pool);
    let is_idle = |slot: &Slot| locked(&slot.used).elapsed() >= idle;
    let all = std::mem::take(&mut pool.slots);
    let (dropped, kept): (BTreeMap<_, _>, _) = all.into_iter().partition(|(_, slot)| is_idle(slot));
    pool.slots = kept;
    pool.is_watched = !pool.slots.is_empty();
    let is_watched = pool.is_watched;
    // Outside the lock: shutting a connection down takes a moment.
    drop(pool);
    drop(dropped);
    is_watched
}

impl Slot {
    fn new() -> Self {
        Self { state: Mutex::default(), used: Mutex::new(Instant::now()) }
    }

    /// Forgets a connection that may be of no use any more, so that the next call makes another one.
    fn doubt(&self, trouble: &Trouble) {
        let mut state = locked(&self.state);
        let is_old = state.made.is_some_and(|made| made.elapsed() > DOUBTED);
        match trouble {
            // Ceph has blocklisted this client.
            Trouble::Refused(failure) if matches!(failure.errno, Errno::SHUTDOWN | Errno::NOTCONN) => {
                state.session = None
            }
            Trouble::Unanswered(_) if is_old => state.session = None,
            _ => {}
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cannot_connect(cluster: &Cluster, user: &str, failure: &Failure) -> Error {
    let (name, monitors) = (&cluster.name, cluster.monitors.join(", "));
    match failure.errno {
        Errno::ACCESS | Errno::PERM => Error::new(
            ErrorKind::Denied,
            format!("cluster {name} does not let client.{user} in: the user does not exist, or the key is another one"),
        ),
        Errno::INVAL => Error::new(
            ErrorKind::Denied,
            format!("cannot use the key of client.{user} for cluster {name}: it is not a Ceph key"),
        ),
        // No library: no network would help.
        Errno::NOENT | Errno::LIBACC => Error::new(ErrorKind::Precondition, failure.message.clone()),
        errno => Error::caused(
            ErrorKind::Unreachable,
            format!("no monitor of cluster {name} answers at {monitors}"),
            std::io::Error::from(errno),
        ),
    }
}

/// Every monitor's addresses from `mon dump`. `None`: it is not what Ceph 14 to 20 answer.
fn monitor_addresses(map: &[u8]) -> Option<String> {
    let map: Value = serde_json::from_slice(map).ok()?;
    let mut addresses = Vec::new();
    for monitor in map.get("mons")?.as_array()? {
        for address in monitor.get("public_addrs")?.get("addrvec")?.as_array()? {
            addresses.push(format!("{}:{}", address.get("type")?.as_str()?, address.get("addr")?.as_str()?));
        }
    }
    (!addresses.is_empty()).then(|| addresses.join(","))
}

/// The real library, loaded with the first connection: a process that makes none does not pay for it.
#[derive(Default)]
pub(super) struct Rados {
    library: Mutex<Option<Arc<Librados>>>,
}

impl Connector for Rados {
    fn connect(&self, monitors: &str, user: &str, key: &str, patience: Duration) -> Result<Arc<dyn Ceph>, Failure> {
        let library = {
            let mut library = locked(&self.library);
            match library.clone() {
                Some(library) => library,
                None => {
                    let loaded = Librados::load().map_err(|error| Failure {
                        errno: Errno::LIBACC,
                        message: format!("cannot load Ceph's library, Debian's package librados2: {error}"),
                    })?;
                    library.insert(loaded).clone()
                }
            }
        };
        Ok(Arc::new(library.connect(monitors, user, key, patience)?))
    }
}

impl Ceph for librados::Connection {
    fn command(&self, target: Target, command: &str) -> Result<Vec<u8>, Failure> {
        self.command(target, command)
    }
    fn fsid(&self) -> &str {
        self.fsid()
    }
}
