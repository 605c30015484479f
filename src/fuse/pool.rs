//! The buffers that requests are read into. A large WRITE keeps its buffer until the file system lets go of the data; their
//! number is bounded, and what is not used is given back to the kernel.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::request::WRITE_DATA;
use crate::error::Result;
use crate::host::memory::{self, Pages};

/// Writes up to this size are copied: a buffer for each would be wasteful.
const COPIED: usize = 32 << 10;

/// A reader's buffer. Requests begin so that a WRITE's data begins at a page.
#[derive(Debug)]
pub(super) struct Buffer {
    pages: Pages,
    start: usize,
}

impl Buffer {
    /// For requests up to this size.
    pub(super) fn new(largest: usize) -> Result<Self> {
        let start = memory::page_size() - WRITE_DATA;
        Ok(Self { pages: Pages::new(start + largest)?, start })
    }

    /// What to read into.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.pages[self.start..]
    }

    /// What was read.
    pub(super) fn request(&self, length: usize) -> &[u8] {
        self.pages.get(self.start..).and_then(|rest| rest.get(..length)).unwrap_or_default()
    }
}

/// How many buffers are lent, and those that are free.
#[derive(Debug)]
pub(super) struct Pool {
    most: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lent: usize,
    free: Vec<Buffer>,
    /// Nobody reads: what comes back is not kept.
    idle: bool,
}

impl Pool {
    /// Lends up to `most` at the same time.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), state: Mutex::default(), returned: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer to read into.
    pub(super) fn take(&self, largest: usize) -> Result<Buffer> {
        let free = {
            let mut state = self.state();
            state.idle = false;
            state.free.pop()
        };
        free.map_or_else(|| Buffer::new(largest), Ok)
    }

    /// The data of a WRITE of `size` bytes that is in the buffer. Takes the buffer away when the data is large, and then
    /// waits while too many are lent: that is how a file system that writes slowly slows programs down.
    pub(super) fn data(self: &Arc<Self>, buffer: &mut Option<Buffer>, size: usize) -> Bytes {
        let Some(whole) = buffer.take() else { return Bytes::new() };
        let from = whole.start + WRITE_DATA;
        let range = from..(from + size).min(whole.pages.len());
        if size <= COPIED {
            let copy = Bytes::copy_from_slice(&whole.pages[range]);
            *buffer = Some(whole);
            return copy;
        }
        let mut state = self.state();
        while state.lent >= self.most {
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.lent += 1;
        drop(state);
        Bytes::from_owner(Lent { buffer: Some(whole), range, pool: Arc::clone(self) })
    }

    /// Gives what is free back to the kernel.
    pub(super) fn trim(&self) {
        let mut state = self.state();
        state.idle = true;
        let free = std::mem::take(&mut state.free);
        drop(state);
        drop(free);
    }
}

/// Data that somebody holds; its buffer comes back with the last of them.
struct Lent {
    buffer: Option<Buffer>,
    range: Range<usize>,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref().and_then(|buffer| buffer.pages.get(self.range.clone())).unwrap_or_default()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        state.lent -= 1;
        if !state.idle {
            state.free.extend(self.buffer.take());
        }
        drop(state);
        self.pool.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pool: &Arc<Pool>, size: usize) -> Option<Buffer> {
        let mut buffer = pool.take(WRITE_DATA + (1 << 20)).unwrap();
        buffer.space()[WRITE_DATA..WRITE_DATA + size].fill(7);
        Some(buffer)
    }

    /// Lent, and free.
    fn counts(pool: &Pool) -> (usize, usize) {
        let state = pool.state();
        (state.lent, state.free.len())
    }

    #[test]
    fn large_data_keeps_its_page_aligned_buffer_and_returns_it() {
        let pool = Pool::new(2);
        let mut buffer = filled(&pool, 1 << 20);
        let data = pool.data(&mut buffer, 1 << 20);
        assert!(buffer.is_none());
        assert_eq!(data.len(), 1 << 20);
        assert_eq!(data.as_ptr().addr() % memory::page_size(), 0);
        assert!(data.iter().all(|byte| *byte == 7));
        let part = data.slice(5..9);
        drop(data);
        assert_eq!(counts(&pool), (1, 0));
        drop(part);
        assert_eq!(counts(&pool), (0, 1));
        pool.trim();
        assert_eq!(counts(&pool), (0, 0));
    }

    #[test]
    fn small_data_is_copied() {
        let pool = Pool::new(1);
        let mut buffer = filled(&pool, 100);
        let data = pool.data(&mut buffer, 100);
        assert!(buffer.is_some());
        assert_eq!(&data[..], [7; 100]);
        assert_eq!(counts(&pool).0, 0);
    }

    #[test]
    fn who_wants_more_than_there_is_waits() {
        let pool = Pool::new(1);
        let first = pool.data(&mut filled(&pool, 1 << 20), 1 << 20);
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn({
            let pool = Arc::clone(&pool);
            move || {
                let second = pool.data(&mut filled(&pool, 1 << 20), 1 << 20);
                sender.send(second.len()).unwrap();
            }
        });
        std::thread::yield_now();
        receiver.try_recv().unwrap_err();
        drop(first);
        assert_eq!(receiver.recv().unwrap(), 1 << 20);
        thread.join().unwrap();
    }
}
