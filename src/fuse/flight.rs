//! What has been read and waits for its answer, and the interrupts of it.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

/// Interrupts of requests that are not known here (yet) are kept, this many.
const EARLY: usize = 256;

/// The requests that are being answered.
#[derive(Debug, Default)]
pub(super) struct Flight {
    state: Mutex<State>,
    landed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By id. Without a way to interrupt it: it goes on whatever happens.
    flying: HashMap<u64, Option<Arc<Interrupt>>>,
    /// One reader may see the interrupt before the other has noted the request. Ids are used once.
    early: VecDeque<u64>,
}

/// The wish that a request be given up.
#[derive(Debug, Default)]
pub(super) struct Interrupt {
    raised: Notify,
    at_once: AtomicBool,
}

impl Interrupt {
    /// Returns when the request is to be given up: so long after the interrupt.
    pub(super) async fn outlasted(&self, patience: Duration) {
        self.raised.notified().await;
        if self.at_once.load(Ordering::Acquire) {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(patience) => {}
            () = self.abandoned() => {}
        }
    }

    async fn abandoned(&self) {
        while !self.at_once.load(Ordering::Acquire) {
            self.raised.notified().await;
        }
    }
}

/// A request in flight, until dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    flight: Arc<Flight>,
    id: u64,
}

impl Flight {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request.
    pub(super) fn begin(self: &Arc<Self>, id: u64, interrupt: Option<Arc<Interrupt>>) -> Ticket {
        let mut state = self.state();
        if let Some(at) = state.early.iter().position(|early| *early == id) {
            state.early.remove(at);
            if let Some(interrupt) = &interrupt {
                interrupt.raised.notify_one();
            }
        }
        state.flying.insert(id, interrupt);
        Ticket { flight: Arc::clone(self), id }
    }

    /// The kernel wishes that a request be given up.
    pub(super) fn interrupt(&self, id: u64) {
        let mut state = self.state();
        match state.flying.get(&id) {
            Some(Some(interrupt)) => interrupt.raised.notify_one(),
            Some(None) => {}
            None => {
                if state.early.len() >= EARLY {
                    state.early.pop_front();
                }
                state.early.push_back(id);
            }
        }
    }

    /// Nobody waits for answers any more.
    pub(super) fn abandon(&self) {
        for interrupt in self.state().flying.values().flatten() {
            interrupt.at_once.store(true, Ordering::Release);
            interrupt.raised.notify_one();
        }
    }

    /// Returns when everything is answered.
    pub(super) async fn landed(&self) {
        loop {
            let landed = self.landed.notified();
            if self.state().flying.is_empty() {
                return;
            }
            landed.await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.flight.state();
        state.flying.remove(&self.id);
        if state.flying.is_empty() {
            self.flight.landed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_interrupt_counts_though_it_came_first() {
        let flight = Arc::new(Flight::default());
        flight.interrupt(4);
        let interrupt = Arc::new(Interrupt::default());
        let ticket = flight.begin(4, Some(Arc::clone(&interrupt)));
        interrupt.outlasted(Duration::ZERO).await;
        drop(ticket);
        flight.landed().await;
    }

    #[tokio::test]
    async fn what_is_abandoned_ends_at_once_however_patient_it_is() {
        let flight = Arc::new(Flight::default());
        let interrupt = Arc::new(Interrupt::default());
        let ticket = flight.begin(4, Some(Arc::clone(&interrupt)));
        let wait = tokio::spawn(async move { interrupt.outlasted(Duration::from_hours(1)).await });
        flight.interrupt(4);
        tokio::task::yield_now().await;
        flight.abandon();
        wait.await.unwrap();
        let landing = tokio::spawn({
            let flight = Arc::clone(&flight);
            async move { flight.landed().await }
        });
        tokio::task::yield_now().await;
        assert!(!landing.is_finished());
        drop(ticket);
        landing.await.unwrap();
    }

    #[test]
    fn interrupts_of_unknown_requests_are_kept_in_bounds() {
        let flight = Flight::default();
        for id in 0..1000 {
            flight.interrupt(id);
        }
        assert_eq!(flight.state().early.len(), EARLY);
    }
}
