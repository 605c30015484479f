//! One lock per volume id.
//!
//! A guard is owned, so that it moves into the task that does the work and lives as long as the work does, not as
//! long as the call. Nothing here knows what a volume is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

use crate::error::{Error, ErrorKind, Result};

/// The locks of one driver.
#[derive(Clone, Default)]
pub struct Locks {
    held: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

/// Holds one key until dropped.
pub struct Guard {
    locks: Locks,
    key: String,
    held: Option<OwnedMutexGuard<()>>,
}

impl Locks {
    /// Takes the key's lock, waiting at most `patience`: two pods that start at once should not see an error.
    ///
    /// # Errors
    /// `Busy` when another call still holds it; CSI 1.13 has ABORTED for "operation pending for volume".
    pub async fn lock(&self, key: &str, patience: Duration) -> Result<Guard> {
        let lock = self.table().entry(key.to_owned()).or_default().clone();
        // Made before the wait: a caller that gives up, or is cancelled, must not leave the entry behind.
        let mut guard = Guard { locks: self.clone(), key: key.to_owned(), held: None };
        match tokio::time::timeout(patience, lock.lock_owned()).await {
            Ok(held) => {
                guard.held = Some(held);
                Ok(guard)
            }
            Err(_) => Err(Error::new(ErrorKind::Busy, format!("another call on {key} is still at work: try again"))),
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<tokio::sync::Mutex<()>>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut table = self.locks.table();
        self.held = None;
        // Nobody else holds or awaits it: the table's own reference is the only one.
        if table.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            table.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_second_call_on_a_volume_is_busy_and_others_are_not() {
        let locks = Locks::default();
        let first = locks.lock("a", SHORT).await.unwrap();
        assert_eq!(locks.lock("a", SHORT).await.err().unwrap().kind(), ErrorKind::Busy);
        assert!(locks.lock("b", SHORT).await.is_ok());
        drop(first);
        assert!(locks.lock("a", SHORT).await.is_ok());
    }

    #[tokio::test]
    async fn nothing_is_remembered_once_all_are_done() {
        let locks = Locks::default();
        let first = locks.lock("a", SHORT).await.unwrap();
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move { locks.lock("a", Duration::from_secs(60)).await.map(drop) }
        });
        tokio::task::yield_now().await;
        waiting.abort();
        assert!(waiting.await.is_err());
        drop(first);
        assert!(locks.table().is_empty());
    }
}
