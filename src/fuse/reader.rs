//! The threads that read requests. Each request is tried at once; one that has to wait for something becomes a task.

use std::io;
use std::io::IoSlice;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::abi::{self, UNIQUE_RESEND};
use super::dispatch::{self, Answering};
use super::filesystem::FileSystem;
use super::flight::{Flight, Interrupt};
use super::init::{self, Agreed, Options};
use super::notify::{Kernel, Notices};
use super::pool::{Buffer, Pool};
use super::reply::{self, Body};
use super::request::{self, Head, Operation};
use crate::host::Errno;
use crate::host::fuse::{Bell, Device};

/// What the readers of a session have in common.
pub(super) struct Shared<F> {
    pub(super) device: Arc<Device>,
    pub(super) filesystem: Arc<F>,
    pub(super) options: Options,
    pub(super) agreed: watch::Sender<Option<Agreed>>,
    pub(super) flight: Arc<Flight>,
    pub(super) notices: Arc<Notices>,
    pub(super) pool: Arc<Pool>,
    pub(super) bell: Bell,
    pub(super) stopping: AtomicBool,
}

/// Why a reader stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// It was asked to.
    Asked,
    /// There is no mount any more.
    Unmounted,
}

impl<F: FileSystem> Shared<F> {
    /// The readers stop after the request that they have.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Reads and answers until there is a reason to stop.
    pub(super) fn read(self: &Arc<Self>, runtime: &Handle) -> io::Result<Stopped> {
        let _context = runtime.enter();
        let largest = match &*self.agreed.borrow() {
            Some(agreed) => agreed.largest_request().max(init::largest_request(self.options.max_write)),
            None => init::largest_request(self.options.max_write),
        };
        let mut spare: Option<Buffer> = None;
        while !self.stopping.load(Ordering::Acquire) {
            let mut buffer = match spare.take() {
                Some(buffer) => buffer,
                None => self.pool.take(largest).map_err(io::Error::other)?,
            };
            let read = self.device.read(buffer.space());
            spare = Some(buffer);
            match read {
                Ok(length) => self.request(runtime, &mut spare, length),
                // Two wait, one gets it.
                Err(Errno::AGAIN) => self.wait(&mut spare)?,
                // EIO: a request larger than the buffer, which the kernel has answered.
                Err(Errno::INTR | Errno::NOENT | Errno::IO) => {}
                Err(Errno::NODEV) => return Ok(Stopped::Unmounted),
                Err(Errno::CONNABORTED) => {
                    tracing::warn!("somebody has aborted the connection of the mount");
                    return Ok(Stopped::Unmounted);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Stopped::Asked)
    }

    /// For the next request. When there is none for long, the buffers go.
    fn wait(&self, spare: &mut Option<Buffer>) -> io::Result<()> {
        let wait = |timeout| match self.device.wait(&self.bell, timeout) {
            Err(Errno::INTR) => Ok(true),
            result => result,
        };
        if !wait(Some(self.options.idle))? {
            *spare = None;
            self.pool.trim();
            wait(None)?;
        }
        Ok(())
    }

    fn request(self: &Arc<Self>, runtime: &Handle, buffer: &mut Option<Buffer>, length: usize) {
        let request = buffer.as_ref().map(|buffer| buffer.request(length)).unwrap_or_default();
        let Some((head, body)) = Head::read(request) else {
            tracing::warn!(length, "the kernel sent something that is no request");
            return;
        };
        if head.opcode == abi::opcode::INIT {
            return self.init(&head, body);
        }
        if self.agreed.borrow().is_none() {
            self.begin(init::assumed(&self.options));
        }
        match request::decode(&head, body) {
            Ok(Operation::Forget(list)) => {
                for (ino, count) in list {
                    // Panics stay where they arose.
                    let forget = AssertUnwindSafe(|| self.filesystem.forget(ino, count));
                    if std::panic::catch_unwind(forget).is_err() {
                        tracing::error!(ino, "forgetting an inode made the file system panic");
                    }
                }
            }
            Ok(Operation::Interrupt { unique }) => self.flight.interrupt(unique & !UNIQUE_RESEND),
            Ok(Operation::Ignored) => {}
            Ok(operation) => {
                let data = match &operation {
                    Operation::Write { size, .. } => self.pool.data(buffer, *size),
                    _ => bytes::Bytes::new(),
                };
                self.answer(runtime, head, operation, data);
            }
            Err(_) if request::is_unanswered(head.opcode) => {}
            Err(errno) => self.reply(head.unique, &Err(errno)),
        }
    }

    fn answer(self: &Arc<Self>, runtime: &Handle, head: Head, operation: Operation, data: bytes::Bytes) {
        let interrupt = operation.is_abandonable().then(|| Arc::new(Interrupt::default()));
        let giving_up = interrupt.clone().map(|interrupt| (interrupt, self.options.interrupt_patience));
        let mut answering: Answering = dispatch::begin(&self.filesystem, head, operation, data, giving_up);
        // Most answers are there at once, and then a task would cost more than they do.
        if let Poll::Ready(answer) = answering.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return self.reply(head.unique, &answer);
        }
        let ticket = self.flight.begin(head.who.unique, interrupt);
        let this = Arc::clone(self);
        runtime.spawn(async move {
            let answer = answering.await;
            this.reply(head.unique, &answer);
            drop(ticket);
        });
    }

    fn init(&self, head: &Head, body: &[u8]) {
        let answer = match init::negotiate(body, &self.options) {
            Ok((answer, agreed)) => {
                // Before the answer: requests may follow it at once.
                if let Some(agreed) = agreed {
                    self.begin(agreed);
                }
                Ok(Body::of(&answer))
            }
            Err(errno) => {
                tracing::error!("this kernel's FUSE is of a version that can't be served");
                Err(errno)
            }
        };
        self.reply(head.unique, &answer);
    }

    /// Notes what is agreed, and tells the file system that it is mounted, once.
    pub(super) fn begin(&self, agreed: Agreed) {
        let mut first = false;
        self.agreed.send_modify(|known| {
            first = known.is_none();
            *known = Some(agreed);
        });
        if first {
            self.filesystem.started(Arc::new(Kernel(Arc::clone(&self.notices))));
        }
    }

    fn reply(&self, unique: u64, answer: &Result<Body, Errno>) {
        let write = |answer: &_| reply::write(unique, answer, |pieces: &[IoSlice<'_>]| self.device.write(pieces));
        match write(answer) {
            // ENOENT: nobody waits for it any more.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => {}
            Err(error) => {
                tracing::warn!(%error, "the kernel did not take an answer");
                // It may wait for one still.
                let _ = write(&Err(Errno::IO));
            }
        }
    }
}
