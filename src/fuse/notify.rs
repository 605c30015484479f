//! Notices to the kernel. They are written by a thread of their own, since the kernel may take an inode's lock for one, which
//! a program holds until *we* answer: no thread that answers may wait for that.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::IoSlice;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::IntoBytes;

use super::abi::{InvalEntry, InvalInode, OutHeader, notice};
use super::filesystem::{Ino, Notify};
use crate::host::Errno;
use crate::host::fuse::Device;

/// What waits to be told. The thread lives only while there is something.
#[derive(Debug)]
pub(super) struct Notices {
    device: Arc<Device>,
    state: Mutex<State>,
    told: tokio::sync::Notify,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    running: bool,
    closed: bool,
}

impl Notices {
    pub(super) fn new(device: Arc<Device>) -> Arc<Self> {
        Arc::new(Self { device, state: Mutex::default(), told: tokio::sync::Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what is in the queue and takes nothing new: the thread could have to wait for an answer that nobody gives
    /// once the readers have stopped. Times to live make up for what is not told any more.
    pub(super) async fn close(&self) {
        loop {
            let told = self.told.notified();
            {
                let mut state = self.state();
                state.closed = true;
                if !state.running {
                    return;
                }
            }
            told.await;
        }
    }

    fn tell(self: &Arc<Self>, message: Vec<u8>) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        state.queue.push_back(message);
        if state.running {
            return;
        }
        let this = Arc::clone(self);
        match std::thread::Builder::new().name("fuse-notices".to_owned()).spawn(move || this.run()) {
            Ok(_) => state.running = true,
            Err(error) => {
                state.queue.clear();
                tracing::warn!(%error, "the kernel can't be told that its caches are old");
            }
        }
    }

    fn run(&self) {
        loop {
            let message = {
                let mut state = self.state();
                let Some(message) = state.queue.pop_front() else {
                    state.running = false;
                    self.told.notify_waiters();
                    return;
                };
                message
            };
            match self.device.write(&[IoSlice::new(&message)]) {
                // The kernel knows no such inode or name (any more), or there is no mount any more.
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::NODEV | Errno::CONNABORTED) => {}
                Err(error) => tracing::warn!(%error, "the kernel did not take a notice about its caches"),
            }
        }
    }
}

/// What a file system gets.
#[derive(Debug)]
pub(super) struct Kernel(pub(super) Arc<Notices>);

impl Notify for Kernel {
    fn invalidate_inode(&self, ino: Ino, offset: i64, length: i64) {
        let body = InvalInode { ino, offset, length };
        self.0.tell(message(notice::INVAL_INODE, &[body.as_bytes()]));
    }

    fn invalidate_name(&self, parent: Ino, name: &OsStr) {
        let Ok(name_len) = u32::try_from(name.len()) else { return };
        let body = InvalEntry { parent, name_len, flags: 0 };
        self.0.tell(message(notice::INVAL_ENTRY, &[body.as_bytes(), name.as_bytes(), &[0]]));
    }
}

/// A notice: no request has the id 0.
pub(super) fn message(code: i32, pieces: &[&[u8]]) -> Vec<u8> {
    let length = size_of::<OutHeader>() + pieces.iter().map(|piece| piece.len()).sum::<usize>();
    let head = OutHeader { len: u32::try_from(length).unwrap_or(u32::MAX), error: code, unique: 0 };
    let mut message = head.as_bytes().to_vec();
    for piece in pieces {
        message.extend_from_slice(piece);
    }
    message
}
