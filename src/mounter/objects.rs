//! What a worker opens: objects as a file system.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::worker::{Opener, Report, Volume};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fuse::{FileSystem, Options, Session};
use crate::objectfs::settings::{Credentials, Settings};
use crate::objectfs::shell::ObjectFs;
use crate::objectfs::store::patient::Patient;
use crate::objectfs::store::probe::probe;
use crate::objectfs::store::{self, ListRequest, S3, Store, StoreError, StoreErrorKind, StoreResult};

/// A service that is away is asked again after so long.
const PAUSE: Duration = Duration::from_secs(1);

/// Opens what settings name.
pub struct Objects;

#[async_trait]
impl Opener for Objects {
    async fn open(&self, settings: Settings) -> Result<Arc<dyn Volume>> {
        let id = settings.id.clone();
        let s3 = reach(&settings).await.map_err(|error| refused(&settings, error))?;
        let store = Patient::new(s3.clone(), settings.endpoint.patience());
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
async fn reach(settings: &Settings) -> StoreResult<Arc<S3>> {
    let s3 = store::connect(&settings.endpoint, settings.credentials.as_ref(), &settings.bucket).await?;
    // Nothing is retried below, so a service that is away for a moment is asked again here.
    let end = Instant::now() + settings.endpoint.patience();
    loop {
        let tried = if settings.read_only {
            // Nothing will be written, and the trial would.
            let one = ListRequest { prefix: settings.prefix.clone(), limit: Some(1), ..ListRequest::default() };
            s3.list(&one).await.map(|_| s3.abilities())
        } else {
            probe(&s3).await
        };
        match tried {
            Err(error) if error.kind == StoreErrorKind::Unavailable && Instant::now() < end => {
                tracing::info!(%error, "waiting for the service");
                tokio::time::sleep(PAUSE).await;
            }
            tried => return tried.map(|abilities| s3.honouring(abilities)),
        }
    }
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
