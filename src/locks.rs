//! One lock per volume id.
//!
//! A guard is owned, so that it moves into the task that does the work and lives as long as the work does, not as
//! long as the call. Several may share a lock that they only need to hold still, such as that of a volume to be copied.
//! Nothing here knows what a volume is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::error::{Error, ErrorKind, Result};

/// The locks of one driver.
#[derive(Clone, Default)]
pub struct Locks {
    held: Arc<Mutex<HashMap<String, Arc<RwLock<()>>>>>,
}

/// Holds one key until dropped.
pub struct Guard {
    locks: Locks,
    key: String,
    held: Option<Held>,
}

/// Only there to be dropped.
enum Held {
    Alone(#[expect(dead_code, reason = "dropping it frees the lock")] OwnedRwLockWriteGuard<()>),
    Shared(#[expect(dead_code, reason = "dropping it frees the lock")] OwnedRwLockReadGuard<()>),
}

impl Locks {
    /// Takes the key's lock, waiting at most `patience`: two pods that start at once should not see an error.
    ///
    /// # Errors
    /// `Busy` when another call still holds it; CSI 1.13 has ABORTED for "operation pending for volume".
    pub async fn lock(&self, key: &str, patience: Duration) -> Result<Guard> {
        self.hold(key, patience, async |lock| Held::Alone(lock.write_owned().await)).await
    }

    /// Takes the key's lock together with others who share it.
    ///
    /// # Errors
    /// As for [`Self::lock`].
    pub async fn share(&self, key: &str, patience: Duration) -> Result<Guard> {
        self.hold(key, patience, async |lock| Held::Shared(lock.read_owned().await)).await
    }

    async fn hold(
        &self,
        key: &str,
        patience: Duration,
        take: impl AsyncFnOnce(Arc<RwLock<()>>) -> Held,
    ) -> Result<Guard> {
        let lock = self.table().entry(key.to_owned()).or_default().clone();
        // Made before the wait: a caller that gives up, or is cancelled, must not leave the entry behind.
        let mut guard = Guard { locks: self.clone(), key: key.to_owned(), held: None };
        match tokio::time::timeout(patience, take(lock)).await {
            Ok(held) => {
                guard.held = Some(held);
                Ok(guard)
            }
            Err(_) => Err(Error::new(ErrorKind::Busy, format!("another call on {key} is still at work: try again"))),
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<RwLock<()>>>> {
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
    async fn those_who_share_a_lock_keep_out_who_wants_it_alone() {
        let locks = Locks::default();
        let shared = [locks.share("a", SHORT).await.unwrap(), locks.share("a", SHORT).await.unwrap()];
        assert_eq!(locks.lock("a", SHORT).await.err().unwrap().kind(), ErrorKind::Busy);
        drop(shared);
        let alone = locks.lock("a", SHORT).await.unwrap();
        assert!(locks.share("a", SHORT).await.is_err());
        drop(alone);
        assert!(locks.table().is_empty());
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
