//! A mount that is served: beginning, parking, end.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use super::abi::notice;
use super::filesystem::FileSystem;
use super::flight::Flight;
use super::init::{Agreed, Options};
use super::notify::{self, Kernel, Notices};
use super::pool::Pool;
use super::reader::{Shared, Stopped};
use crate::error::Result;
use crate::host::Errno;
use crate::host::fuse::{Bell, Device};

/// How serving ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// There is no mount any more, and the file system has been told.
    Unmounted,
    /// Everything that was read is answered; another session can go on.
    Parked(Agreed),
}

/// A descriptor of /dev/fuse and the file system behind it.
///
/// Methods of the file system are tried on the threads that read (inside the runtime's context), and go on as tasks of
/// the runtime when they have to wait: they may do what a task may, and block no longer than one may.
pub struct Session<F: FileSystem> {
    shared: Arc<Shared<F>>,
    asked: watch::Sender<bool>,
    finished: watch::Sender<Option<Option<Agreed>>>,
}

/// Parks a session.
#[derive(Clone, Debug)]
pub struct Parker {
    asked: watch::Sender<bool>,
    finished: watch::Receiver<Option<Option<Agreed>>>,
}

impl Parker {
    /// Readers stop at a request boundary and every request already read is answered; the kernel keeps what comes later
    /// for the next session. Waits for INIT when that is not done.
    /// A request that hangs (the network is away) holds it up: the caller sets a deadline, and dies after it, since what
    /// is not answered then can be sent again.
    ///
    /// The session's descriptor is closed when the file system and the session are dropped: the connection lives on
    /// only while somebody has a duplicate.
    ///
    /// `None`: the session has ended otherwise, or was dropped.
    pub async fn park(&self) -> Option<Agreed> {
        self.asked.send_replace(true);
        let mut finished = self.finished.clone();
        let finished = finished.wait_for(Option::is_some).await.ok()?;
        finished.clone().flatten()
    }
}

impl<F: FileSystem> Session<F> {
    /// With `agreed`, INIT was answered by another session; without, it is awaited.
    ///
    /// # Errors
    /// When the descriptor takes no settings, or there are no descriptors left.
    pub fn new(descriptor: OwnedFd, filesystem: Arc<F>, options: Options, agreed: Option<Agreed>) -> Result<Self> {
        let device = Arc::new(Device::new(descriptor)?);
        let shared = Arc::new(Shared {
            filesystem,
            agreed: watch::Sender::new(agreed),
            flight: Arc::new(Flight::default()),
            notices: Notices::new(Arc::clone(&device)),
            pool: Pool::new(options.write_buffers),
            bell: Bell::new()?,
            stopping: AtomicBool::new(false),
            device,
            options,
        });
        Ok(Self { shared, asked: watch::Sender::new(false), finished: watch::Sender::new(None) })
    }

    /// What parks it.
    pub fn parker(&self) -> Parker {
        Parker { asked: self.asked.clone(), finished: self.finished.subscribe() }
    }

    /// What INIT settled, as soon as it has: to be kept with the descriptor. It is told before the kernel gets its
    /// answer.
    pub fn agreed(&self) -> watch::Receiver<Option<Agreed>> {
        self.shared.agreed.subscribe()
    }

    /// Asks the kernel to send again what it has no answer to. Only before [`Session::serve`], and once the process that had
    /// read it is gone: it would take what is sent again. `false`: this kernel can't (before Linux 6.9), and those who
    /// wait for these answers wait until they are killed or the connection is aborted.
    ///
    /// # Errors
    /// When the kernel does not take the wish.
    pub fn resend(&self) -> io::Result<bool> {
        // Not knowing, it costs nothing to ask: INIT itself may be what was lost.
        if self.shared.agreed.borrow().as_ref().is_some_and(|agreed| !agreed.can_resend()) {
            return Ok(false);
        }
        let message = notify::message(notice::RESEND, &[]);
        match self.shared.device.write(&[IoSlice::new(&message)]) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Serves until unmounted or parked. Dropped half-way it stops reading, and requests are left without an answer.
    ///
    /// # Errors
    /// When the descriptor can't be read: it is not mounted, or not one of /dev/fuse.
    pub async fn serve(self) -> io::Result<Ended> {
        let shared = Arc::clone(&self.shared);
        if shared.agreed.borrow().is_some() {
            shared.filesystem.started(Arc::new(Kernel(Arc::clone(&shared.notices))));
        }
        let _stop = StopOnDrop(Arc::clone(&shared));
        let readers = start_readers(&shared)?;
        let result = self.wait_for(readers).await;
        match result {
            Ok(Stopped::Asked) => {
                shared.flight.landed().await;
                let agreed = shared.agreed.borrow().clone();
                self.finished.send_replace(Some(agreed.clone()));
                agreed.map(Ended::Parked).ok_or_else(|| io::Error::other("parked before the mount had begun"))
            }
            Ok(Stopped::Unmounted) => {
                shared.flight.abandon();
                shared.flight.landed().await;
                shared.filesystem.ended().await;
                self.finished.send_replace(Some(None));
                Ok(Ended::Unmounted)
            }
            Err(error) => {
                shared.flight.landed().await;
                self.finished.send_replace(Some(None));
                Err(error)
            }
        }
    }

    /// Passes the wish to park on, and returns when the last reader has stopped.
    async fn wait_for(&self, mut readers: mpsc::UnboundedReceiver<io::Result<Stopped>>) -> io::Result<Stopped> {
        let shared = &self.shared;
        let mut asked = self.asked.subscribe();
        let mut agreed = shared.agreed.subscribe();
        let wish = async {
            // Neither sender is dropped before `self`.
            let _ = asked.wait_for(|asked| *asked).await.map(drop);
            let _ = agreed.wait_for(Option::is_some).await.map(drop);
            shared.notices.close().await;
            shared.stop();
            std::future::pending::<()>().await;
        };
        tokio::pin!(wish);
        let mut result = Ok(Stopped::Asked);
        loop {
            let stopped = tokio::select! {
                stopped = readers.recv() => stopped,
                () = &mut wish => None,
            };
            match stopped {
                None => return result,
                Some(Ok(Stopped::Asked)) => {}
                Some(stopped) => {
                    shared.stop();
                    // That there is no mount any more is the better reason.
                    if !matches!(result, Ok(Stopped::Unmounted)) {
                        result = stopped;
                    }
                }
            }
        }
    }
}

fn start_readers<F: FileSystem>(shared: &Arc<Shared<F>>) -> io::Result<mpsc::UnboundedReceiver<io::Result<Stopped>>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for number in 0..shared.options.readers.max(1) {
        let (shared, sender, runtime) = (Arc::clone(shared), sender.clone(), Handle::current());
        std::thread::Builder::new().name(format!("fuse-{number}")).spawn(move || {
            let read = std::panic::catch_unwind(AssertUnwindSafe(|| shared.read(&runtime)));
            let result = read.unwrap_or_else(|_| Err(io::Error::other("a thread that reads requests panicked")));
            drop(shared);
            let _ = sender.send(result);
        })?;
    }
    Ok(receiver)
}

struct StopOnDrop<F: FileSystem>(Arc<Shared<F>>);

impl<F: FileSystem> Drop for StopOnDrop<F> {
    fn drop(&mut self) {
        self.0.stop();
    }
}
