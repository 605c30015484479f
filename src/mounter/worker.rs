//! `berth worker`: serves one mount, with the rights of a user who may do nothing else.
//!
//! It listens on the socket that it was started with. The first mounter gives it its work there; a later one asks it what it
//! is doing. It ends when its file system has been unmounted and everything is in the bucket, never because a mounter or a
//! driver ends.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

pub use super::protocol::Report;
use super::protocol::{Answer, Connection, Failure, Frame, Life, Order};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::workers;
use crate::objectfs::settings::{Credentials, Settings};

/// A mounter that started a worker and then says nothing has died.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);
/// So long the end waits for mounters to hear of it.
const FAREWELL_LIMIT: Duration = Duration::from_secs(5);

/// A file system that a worker has opened.
#[async_trait]
pub trait Volume: Send + Sync + 'static {
    /// Answers the kernel's requests until it has unmounted. Calls `agreed` once with what INIT was answered with.
    async fn serve(&self, fuse: OwnedFd, agreed: Box<dyn FnOnce(serde_json::Value) + Send>) -> Result<()>;

    /// Brings everything into safety, the last thing. The number of files that are still only on the node's disk.
    async fn finish(&self) -> u64;

    /// Brings everything into safety and goes on.
    async fn commit(&self);

    /// Uses other credentials from now on.
    fn renew(&self, credentials: &Credentials);

    /// How things stand.
    fn report(&self) -> Report;
}

/// Opens what the settings say, and what an earlier worker has staged there.
#[async_trait]
pub trait Opener: Send + Sync + 'static {
    /// Opens the file system.
    async fn open(&self, settings: Settings) -> Result<Arc<dyn Volume>>;
}

/// What the worker was told to do.
struct Work {
    settings: Mutex<Settings>,
    mountpoint: PathBuf,
    fuse: Option<OwnedFd>,
    volume: OnceLock<Arc<dyn Volume>>,
}

/// What connections share.
struct Shared {
    work: OnceLock<Work>,
    /// All that has happened, in order.
    life: watch::Sender<Vec<Life>>,
    begin: mpsc::Sender<oneshot::Sender<Answer>>,
}

/// Serves the work that comes over the inherited socket, until it is done.
///
/// # Errors
/// Without such a socket; when no work comes; when the volume can't be opened or the kernel's requests can't be read.
pub async fn run(opener: &dyn Opener) -> Result<()> {
    workers::set_process_name(c"berth-worker");
    let listener = UnixListener::from_std(workers::inherited_listener()?).context(|| "cannot listen".to_owned())?;
    serve(listener, opener).await
}

async fn serve(listener: UnixListener, opener: &dyn Opener) -> Result<()> {
    let (begin, mut begun) = mpsc::channel(1);
    let shared = Arc::new(Shared { work: OnceLock::new(), life: watch::Sender::default(), begin });
    let mut connections = JoinSet::new();
    let working = async {
        let waiting = tokio::time::timeout(BEGIN_LIMIT, begun.recv()).await;
        let (Ok(Some(answer)), Some(work)) = (waiting, shared.work.get()) else {
            fail!(Precondition, "no mounter said what to do");
        };
        let done = work.run(opener, answer, &shared.life).await;
        let left = *done.as_ref().unwrap_or(&0);
        // Without this word a mounter knows that the worker has not come to its end.
        if done.is_ok() {
            shared.life.send_modify(|life| life.push(Life::Ended { left }));
        }
        done
    };
    let accepting = async {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(shared.clone().talk(stream));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    };
    let done = tokio::select! {
        done = working => done,
        () = accepting => Ok(0),
    };
    let farewell = async { while connections.join_next().await.is_some() {} };
    // Those that only asked something may keep their connection open.
    let _ = tokio::time::timeout(FAREWELL_LIMIT, farewell).await;
    done.map(drop)
}

impl Work {
    async fn run(
        &self,
        opener: &dyn Opener,
        answer: oneshot::Sender<Answer>,
        life: &watch::Sender<Vec<Life>>,
    ) -> Result<u64> {
        let settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let id = settings.id.clone();
        let volume = match opener.open(settings).await {
            Ok(volume) => volume,
            Err(error) => {
                let _ = answer.send(Answer::Failed(Failure::from(&error)));
                return Err(error);
            }
        };
        let volume = self.volume.get_or_init(|| volume).clone();
        let _ = answer.send(Answer::Ready);
        if let Some(fuse) = &self.fuse {
            let fuse = fuse.try_clone().context(|| "cannot duplicate the FUSE descriptor".to_owned())?;
            let life = life.clone();
            let agreed = Box::new(move |agreed| life.send_modify(|life| life.push(Life::Agreed(agreed))));
            tracing::info!(volume.id = id, target = %self.mountpoint.display(), "serving");
            let committing = commit_on_signal(volume.clone())?;
            let served = volume.serve(fuse, agreed).await;
            committing.abort();
            // Whatever ended it: what was staged goes to the bucket now.
            let left = volume.finish().await;
            served?;
            return Ok(left);
        }
        tracing::info!(volume.id = id, "uploading what was staged");
        Ok(volume.finish().await)
    }
}

/// A worker ends when its file system is unmounted. A signal makes it bring everything into safety, in case somebody
/// insists.
fn commit_on_signal(volume: Arc<dyn Volume>) -> Result<tokio::task::JoinHandle<()>> {
    let watch = |kind| signal(kind).context(|| "cannot watch for signals".to_owned());
    let (mut terminate, mut hangup) = (watch(SignalKind::terminate())?, watch(SignalKind::hangup())?);
    let mut interrupt = watch(SignalKind::interrupt())?;
    Ok(tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = hangup.recv() => continue,
                _ = interrupt.recv() => continue,
            }
            tracing::info!("SIGTERM: everything written goes to the bucket; unmount to end this worker");
            volume.commit().await;
        }
    }))
}

impl Shared {
    /// Answers one connection until it is closed.
    async fn talk(self: Arc<Self>, stream: UnixStream) {
        let talked = async {
            let mut connection = Connection::new(stream)?;
            while let Some(frame) = connection.receive::<Order>().await? {
                if self.obey(&connection, frame).await? {
                    // It only listens from now on.
                    return self.tell(&connection).await;
                }
            }
            Ok(())
        };
        if let Err(error) = talked.await {
            tracing::debug!(%error, "a connection broke off");
        }
    }

    /// Does what was asked for. Shall it be told what happens?
    async fn obey(&self, connection: &Connection, frame: Frame<Order>) -> std::io::Result<bool> {
        let mut follow = false;
        let mut fuse = None;
        let answer = match frame.message {
            Order::Begin { settings, mountpoint } => {
                follow = true;
                self.begin(*settings, mountpoint, frame.descriptors).await
            }
            Order::Adopt => match self.work.get() {
                Some(work) => {
                    follow = true;
                    fuse = work.fuse.as_ref();
                    Answer::Held { settings: Box::new(work.settings()), mountpoint: work.mountpoint.clone() }
                }
                None => not_yet(),
            },
            Order::Report => match self.volume() {
                Some((_, volume)) => Answer::Report(volume.report()),
                None => not_yet(),
            },
            Order::Renew { credentials } => match self.volume() {
                Some((work, volume)) => {
                    volume.renew(&credentials);
                    work.settings.lock().unwrap_or_else(PoisonError::into_inner).credentials = Some(credentials);
                    Answer::Done
                }
                None => not_yet(),
            },
        };
        let descriptors: Vec<_> = fuse.iter().map(|fuse| fuse.as_fd()).collect();
        connection.send(&answer, &descriptors).await?;
        Ok(follow)
    }

    async fn begin(&self, settings: Settings, mountpoint: PathBuf, mut descriptors: Vec<OwnedFd>) -> Answer {
        let fuse = descriptors.pop();
        let work = Work { settings: Mutex::new(settings), mountpoint, fuse, volume: OnceLock::new() };
        if self.work.set(work).is_err() {
            return Answer::Failed(Failure::from(&Error::new(ErrorKind::Conflict, "this worker has its work already")));
        }
        let (answer, answered) = oneshot::channel();
        if self.begin.send(answer).await.is_err() {
            return not_yet();
        }
        answered.await.unwrap_or_else(|_| not_yet())
    }

    fn volume(&self) -> Option<(&Work, &Arc<dyn Volume>)> {
        let work = self.work.get()?;
        Some((work, work.volume.get()?))
    }

    /// Tells all that has happened and happens.
    async fn tell(&self, connection: &Connection) -> std::io::Result<()> {
        let mut life = self.life.subscribe();
        let mut told = 0;
        loop {
            let news: Vec<_> = life.borrow_and_update().iter().skip(told).cloned().collect();
            told += news.len();
            for event in news {
                let last = matches!(event, Life::Ended { .. });
                connection.send(&Answer::Life(event), &[]).await?;
                if last {
                    return Ok(());
                }
            }
            // The sender lives as long as this does.
            let _ = life.changed().await;
        }
    }
}

impl Work {
    fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn not_yet() -> Answer {
    Answer::Failed(Failure::from(&Error::new(ErrorKind::Precondition, "this worker has not begun")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::Notify;

    use super::*;
    use crate::objectfs::settings::{Checksums, Consistency, Endpoint};

    /// Is "mounted" until told otherwise.
    #[derive(Default)]
    struct Toy {
        unmounted: Notify,
        left: AtomicU64,
        renewed: Mutex<Option<Credentials>>,
    }

    #[async_trait]
    impl Volume for Toy {
        async fn serve(&self, _: OwnedFd, agreed: Box<dyn FnOnce(serde_json::Value) + Send>) -> Result<()> {
            agreed(serde_json::json!({ "minor": 45 }));
            self.unmounted.notified().await;
            Ok(())
        }
        async fn finish(&self) -> u64 {
            self.left.load(Ordering::Relaxed)
        }
        async fn commit(&self) {}
        fn renew(&self, credentials: &Credentials) {
            *self.renewed.lock().unwrap() = Some(credentials.clone());
        }
        fn report(&self) -> Report {
            Report { used: 7, ..Report::default() }
        }
    }

    struct Toys(Option<Arc<Toy>>);

    #[async_trait]
    impl Opener for Toys {
        async fn open(&self, settings: Settings) -> Result<Arc<dyn Volume>> {
            match &self.0 {
                Some(toy) => Ok(toy.clone()),
                None => fail!(Denied, "cannot open {}", settings.bucket),
            }
        }
    }

    fn settings() -> Settings {
        let endpoint = Endpoint {
            url: None,
            region: "r".into(),
            path_style: true,
            ca: None,
            checksums: Checksums::WhenRequired,
            anonymous: false,
            patience: 1,
            stall: 1,
        };
        Settings {
            id: "one".into(),
            endpoint,
            credentials: None,
            bucket: "bucket".into(),
            prefix: String::new(),
            read_only: false,
            consistency: Consistency::Strict,
            uid: 0,
            gid: 0,
            file_mode: 0o644,
            dir_mode: 0o755,
            max_age: 1,
            staging: "/s".into(),
            cache: None,
            cache_size: 0,
            memory: 0,
            limit: None,
        }
    }

    fn begin() -> Order {
        Order::Begin { settings: Box::new(settings()), mountpoint: "/mnt".into() }
    }

    async fn ask(connection: &mut Connection, order: &Order, descriptors: &[&OwnedFd]) -> Answer {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        connection.send(order, &descriptors).await.unwrap();
        connection.expect::<Answer>().await.unwrap().message
    }

    async fn connect(socket: &Path) -> Connection {
        Connection::new(UnixStream::connect(socket).await.unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_second_mounter_gets_what_the_first_has_given_and_both_hear_of_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("w.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let toy = Arc::new(Toy { left: AtomicU64::new(3), ..Toy::default() });
        let opener = Toys(Some(toy.clone()));
        let worker = tokio::spawn(async move { serve(listener, &opener).await });
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();

        let mut first = connect(&socket).await;
        assert!(matches!(ask(&mut first, &Order::Adopt, &[]).await, Answer::Failed(_)));
        assert!(matches!(ask(&mut first, &begin(), &[&null]).await, Answer::Ready));
        let mut second = connect(&socket).await;
        assert!(matches!(ask(&mut second, &begin(), &[&null]).await, Answer::Failed(_)));
        let mut second = connect(&socket).await;
        assert!(matches!(ask(&mut second, &Order::Report, &[]).await, Answer::Report(Report { used: 7, .. })));
        let credentials = Credentials { access_key: "a".into(), secret_key: "s".into(), session_token: None };
        let renew = Order::Renew { credentials: credentials.clone() };
        assert!(matches!(ask(&mut second, &renew, &[]).await, Answer::Done));
        assert_eq!(*toy.renewed.lock().unwrap(), Some(credentials.clone()));
        second.send(&Order::Adopt, &[]).await.unwrap();
        let held = second.expect::<Answer>().await.unwrap();
        assert_eq!(held.descriptors.len(), 1);
        let expected = Settings { credentials: Some(credentials), ..settings() };
        assert!(matches!(held.message, Answer::Held { settings, .. } if *settings == expected));

        toy.unmounted.notify_one();
        for mounter in [&mut first, &mut second] {
            let agreed = mounter.expect::<Answer>().await.unwrap().message;
            assert!(matches!(agreed, Answer::Life(Life::Agreed(value)) if value["minor"] == 45));
            let ended = mounter.expect::<Answer>().await.unwrap().message;
            assert!(matches!(ended, Answer::Life(Life::Ended { left: 3 })));
        }
        drop((first, second));
        worker.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_worker_without_a_descriptor_only_uploads_and_one_that_can_not_open_says_why() {
        let dir = tempfile::tempdir().unwrap();
        for (name, toy) in [("good", Some(Arc::default())), ("bad", None)] {
            let socket = dir.path().join(name);
            let listener = UnixListener::bind(&socket).unwrap();
            let opens = toy.is_some();
            let worker = tokio::spawn(async move { serve(listener, &Toys(toy)).await });
            let mut mounter = connect(&socket).await;
            let answer = ask(&mut mounter, &begin(), &[]).await;
            if opens {
                assert!(matches!(answer, Answer::Ready));
                let ended = mounter.expect::<Answer>().await.unwrap().message;
                assert!(matches!(ended, Answer::Life(Life::Ended { left: 0 })));
            } else {
                assert!(matches!(answer, Answer::Failed(failure) if failure.to_string() == "cannot open bucket"));
            }
            drop(mounter);
            assert_eq!(worker.await.unwrap().is_ok(), opens);
        }
    }
}
