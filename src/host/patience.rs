//! Questions to devices that may be sick, answered in bounded time.
//!
//! A read from a disk that does not answer can't be called back: its thread waits until the kernel gives up. Until then
//! nobody else asks that disk, and everyone is told at once that it does not answer.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use crate::error::{Context, Error, ErrorKind, Result};

/// Asks, and remembers who does not answer.
#[derive(Clone, Debug, Default)]
pub struct Patience {
    hanging: Arc<Mutex<BTreeSet<u64>>>,
}

impl Patience {
    /// Has the device with this number answer a question, on a thread of its own.
    ///
    /// # Errors
    /// What the question answers; `Unreachable` when it is not answered in time, or an earlier one is not answered yet.
    pub fn ask<T: Send + 'static>(
        &self,
        device: u64,
        name: &str,
        patience: Duration,
        question: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let silent = |since: &str| Error::new(ErrorKind::Unreachable, format!("{name} does not answer{since}"));
        if self.hanging().contains(&device) {
            return Err(silent(": it has yet to answer an earlier question"));
        }
        let (sender, receiver) = mpsc::channel();
        let (hanging, thread) = (self.clone(), std::thread::Builder::new().name("ask-disk".to_owned()));
        let started = thread.spawn(move || {
            let answer = question();
            // Under the lock, so that who gives up either has the answer or is seen to have given up.
            let mut hanging = hanging.hanging();
            hanging.remove(&device);
            let _ = sender.send(answer);
        });
        started.context(|| format!("cannot start a thread to ask {name}"))?;
        receiver
            .recv_timeout(patience)
            .or_else(|_| {
                let mut hanging = self.hanging();
                receiver.try_recv().inspect_err(|_| {
                    hanging.insert(device);
                })
            })
            .unwrap_or_else(|_| Err(silent(&format!(" within {patience:?}"))))
    }

    fn hanging(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.hanging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn who_does_not_answer_holds_nobody_up_and_is_asked_again_when_it_has() {
        let patience = Patience::default();
        let (go, wait) = mpsc::channel::<()>();
        let hang = move || {
            let _ = wait.recv();
            Ok(1)
        };
        let short = Duration::from_millis(20);
        let error = patience.ask(7, "sda", short, hang).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::Unreachable, "sda does not answer within 20ms")
        );
        let begun = Instant::now();
        assert!(patience.ask(7, "sda", Duration::from_secs(60), || Ok(2)).is_err());
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert_eq!(patience.ask(8, "sdb", Duration::from_secs(60), || Ok(3)).unwrap(), 3);
        drop(go);
        while patience.ask(7, "sda", Duration::from_secs(60), || Ok(4)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30));
            std::thread::sleep(short);
        }
    }
}
