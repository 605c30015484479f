//! What every call shares: lock, detached work, deadline, one log line, metrics.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot};
use tonic::{Code, Response, Status};
use tracing::{Instrument, Span};

use super::status;
use crate::backend::Backend;
use crate::config::Deadlines;
use crate::error::{Error, ErrorKind, Result};
use crate::locks::Locks;
use crate::telemetry::Metrics;
use crate::volume::NodeName;

/// So many calls of one driver are at work at a time. When a back end hangs it may hold up so many threads and no
/// more: other drivers go on.
const SLOTS: usize = 128;

/// One driver, as its services see it. Clones share everything.
#[derive(Clone)]
pub struct Front {
    pub(super) driver: Arc<str>,
    pub(super) node: NodeName,
    pub(super) backend: Backend,
    locks: Locks,
    slots: Arc<Semaphore>,
    deadlines: Deadlines,
    metrics: Arc<Metrics>,
}

impl Front {
    /// The driver of this name over this back end. Drivers over one back end share its locks.
    pub fn new(
        driver: &str,
        node: NodeName,
        (backend, locks): (Backend, Locks),
        deadlines: Deadlines,
        metrics: Arc<Metrics>,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(SLOTS));
        Self { driver: driver.into(), node, backend, locks, slots, deadlines, metrics }
    }

    /// Is no call at work?
    pub fn is_idle(&self) -> bool {
        self.slots.available_permits() == SLOTS
    }

    /// Answers one call: counts it, times it, and logs how it ended, once. `subject` is the volume or path it is about.
    pub(super) async fn answer<T>(
        &self,
        rpc: &'static str,
        subject: &str,
        work: impl Future<Output = Result<T>>,
    ) -> Result<Response<T>, Status> {
        let begun = Instant::now();
        let span = tracing::info_span!("call", driver = %self.driver, rpc, subject = %subject.escape_debug());
        let in_flight = self.metrics.begin(&self.driver);
        let result = work.instrument(span.clone()).await;
        drop(in_flight);
        let code = result.as_ref().map_or_else(|error| status::code(error.kind()), |_| Code::Ok);
        let took = begun.elapsed();
        self.metrics.answered(&self.driver, rpc, status::name(code), took);
        let _entered = span.enter();
        match result {
            Ok(reply) => {
                // One line for each change; questions come by the thousand.
                if rpc.contains("Get") || rpc.contains("List") || rpc == "Probe" {
                    tracing::debug!(?took, "done");
                } else {
                    tracing::info!(?took, "done");
                }
                Ok(Response::new(reply))
            }
            Err(error) => {
                match error.kind() {
                    ErrorKind::Internal => tracing::error!(?took, code = status::name(code), %error, "failed"),
                    _ => tracing::info!(?took, code = status::name(code), %error, "refused"),
                }
                Err(status::status(&error))
            }
        }
    }

    /// Does work that changes something, under the locks of these ids.
    ///
    /// The work owns the locks and its thread: a caller that leaves or whose time is up frees neither.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        ids: impl IntoIterator<Item = String>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.work_with(ids, Vec::new(), work).await
    }

    /// The same, while other things are held still for it: those whose contents it reads, which others may read too.
    pub(super) async fn work_with<T: Send + 'static>(
        &self,
        ids: impl IntoIterator<Item = String>,
        sources: Vec<String>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        // In order, so that two calls never wait for each other.
        let alone: BTreeSet<String> = ids.into_iter().collect();
        let all: BTreeSet<String> = alone.iter().cloned().chain(sources).collect();
        let (mut guards, patience) = (Vec::new(), self.deadlines.lock);
        for id in all {
            guards.push(match alone.contains(&id) {
                true => self.locks.lock(&id, patience).await?,
                false => self.locks.share(&id, patience).await?,
            });
        }
        self.detach(self.deadlines.call, guards, work).await
    }

    /// Asks something that changes nothing, and so takes no lock.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.detach(self.deadlines.question, (), question).await
    }

    async fn detach<T: Send + 'static>(
        &self,
        deadline: Duration,
        held: impl Send + 'static,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let end = tokio::time::Instant::now() + deadline;
        let Ok(Ok(slot)) = tokio::time::timeout_at(end, self.slots.clone().acquire_owned()).await else {
            fail!(Unreachable, "{SLOTS} calls of {} are hanging already", self.driver);
        };
        let span = Span::current();
        let (sender, receiver) = oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let result = span.in_scope(work);
            // Before the reply: the caller's next call must find them free.
            drop((held, slot));
            if let Err(Err(error)) = sender.send(result) {
                span.in_scope(|| tracing::error!(%error, "failed after its caller had left"));
            }
        });
        match tokio::time::timeout_at(end, receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::new(ErrorKind::Internal, "the call ended in a panic: this is a defect of Berth")),
            Err(_) => fail!(OutcomeUnknown, "not done within {deadline:?}, and still at work: ask again"),
        }
    }
}
