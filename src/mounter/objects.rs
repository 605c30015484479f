//! What a worker opens: objects as a file system.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;

use super::worker::{Opener, Report, Volume};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fuse::{FileSystem, Options, Session};
use crate::host::memory;
use crate::objectfs::settings::{Credentials, Settings};
use crate::objectfs::shell::ObjectFs;
use crate::objectfs::store::{self, ListRequest, Opened, S3, StoreError, StoreErrorKind, StoreResult};

/// Opens what settings name.
pub struct Objects;

#[async_trait]
impl Opener for Objects {
    async fn open(&self, settings: Settings) -> Result<Arc<dyn Volume>> {
        let id = settings.id.clone();
        let Opened { s3, store } = reach(&settings).await.map_err(|error| refused(&settings, error))?;
        let filesystem = ObjectFs::open(settings, store).await.context(|| format!("cannot open {id}"))?;
        Ok(Arc::new(OpenBucket { filesystem, s3, ended: AtomicBool::new(false) }))
    }
}

/// An open bucket.
struct OpenBucket {
    filesystem: Arc<ObjectFs>,
    s3: Arc<S3>,
    ended: AtomicBool,
}

#[async_trait]
impl Volume for OpenBucket {
    async fn serve(&self, fuse: OwnedFd, agreed: Box<dyn FnOnce(serde_json::Value) + Send>) -> Result<()> {
        let session = Session::new(fuse, self.filesystem.clone(), Options::default(), None)?;
        let mut settled = session.agreed();
        let telling = tokio::spawn(async move {
            if let Ok(settled) = settled.wait_for(Option::is_some).await
                && let Ok(value) = serde_json::to_value(&*settled)
            {
                agreed(value);
            }
            // The connection is made and tried, and the mount begun: much code that does not run again.
            memory::forget_code();
        });
        let served = session.serve().await;
        telling.abort();
        // Unmounted, a session has told the file system already.
        self.ended.store(served.is_ok(), Ordering::Relaxed);
        served.map(drop).context(|| "cannot serve the kernel's requests".to_owned())
    }

    async fn finish(&self) -> u64 {
        if !self.ended.swap(true, Ordering::Relaxed) {
            self.filesystem.ended().await;
        }
        self.report().progress.dirty_files
    }

    async fn commit(&self) {
        self.filesystem.commit_all().await;
    }

    fn renew(&self, credentials: &Credentials) {
        self.s3.renew(credentials);
    }

    fn report(&self) -> Report {
        let (progress, used, limit) = self.filesystem.status();
        Report { progress, used, limit }
    }
}

/// Connects, and finds out what the service can do. The bucket has to be there.
async fn reach(settings: &Settings) -> StoreResult<Opened> {
    let Settings { endpoint, credentials, bucket, prefix, read_only, .. } = settings;
    let opened = store::open(endpoint, credentials.as_ref(), bucket, *read_only).await?;
    if *read_only {
        // Nothing has been asked of it yet.
        let one = ListRequest { prefix: prefix.clone(), limit: Some(1), ..ListRequest::default() };
        opened.store.list(&one).await?;
    }
    Ok(opened)
}

fn refused(settings: &Settings, error: StoreError) -> Error {
    let kind = match error.kind {
        StoreErrorKind::NotFound | StoreErrorKind::NoBucket => ErrorKind::NotFound,
        StoreErrorKind::Conflict => ErrorKind::Conflict,
        StoreErrorKind::Denied => ErrorKind::Denied,
        StoreErrorKind::Invalid => ErrorKind::Invalid,
        StoreErrorKind::Unsupported => ErrorKind::Unsupported,
        StoreErrorKind::Unavailable => ErrorKind::Unreachable,
        StoreErrorKind::Corrupt | StoreErrorKind::Local => ErrorKind::Internal,
    };
    Error::caused(kind, format!("cannot use the bucket {}", settings.bucket), error)
}
