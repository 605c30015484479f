//! Reading one version of an object.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;

use super::commit::refused;
use super::{ContentError, Contents, Version, Window};

/// One version, and what is in memory of it.
pub(super) struct Source {
    contents: Arc<Contents>,
    version: Version,
    head: Option<Bytes>,
}

impl Source {
    pub(super) fn new(contents: &Arc<Contents>, version: Version, head: Option<Bytes>) -> Arc<Self> {
        Arc::new(Self { contents: contents.clone(), version, head })
    }

    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    /// A range within the version, whole.
    pub(super) async fn read(
        self: &Arc<Self>,
        _window: &mut Window,
        range: Range<u64>,
    ) -> Result<Vec<Bytes>, ContentError> {
        if let Some(head) = &self.head
            && range.end <= head.len() as u64
        {
            return Ok(vec![head.slice(range.start as usize..range.end as usize)]);
        }
        let got = self.contents.store.get(&self.version.key, Some(range), Some(&self.version.etag)).await;
        let (_, mut body) = got.map_err(refused)?;
        let mut pieces = Vec::new();
        while let Some(piece) = body.next().await {
            pieces.push(piece.map_err(refused)?);
        }
        Ok(pieces)
    }
}
