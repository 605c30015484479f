//! What a worker opens: objects as a file system.

use std::sync::Arc;

use async_trait::async_trait;

use super::worker::{Opener, Volume};
use crate::error::Result;
use crate::objectfs::settings::Settings;

/// Opens what settings name.
pub struct Objects;

#[async_trait]
impl Opener for Objects {
    async fn open(&self, settings: Settings) -> Result<Arc<dyn Volume>> {
        fail!(Unsupported, "cannot open {}: this build has no object storage yet", settings.bucket)
    }
}
