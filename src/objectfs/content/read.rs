//! Reading what is staged and what is not, together.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::file::{Inner, Stage, State, disk, read_up_to};
use super::{ContentError, Window};

impl Inner {
    /// Staged bytes of a range, zeros where nothing was written. `None`: the files went meanwhile, look again.
    pub(super) fn read_staged(&self, state: &State, range: Range<u64>) -> Result<Option<Bytes>, ContentError> {
        let length = (range.end - range.start) as usize;
        let read = match (&state.store, &state.staged) {
            (Stage::None, _) | (_, None) => return Ok(Some(vec![0; length].into())),
            (Stage::Inline(_) | Stage::InLog, _) => self.inline_bytes(state).map(|bytes| {
                let mut piece = vec![0; length];
                let start = (range.start as usize).min(bytes.len());
                let end = (range.end as usize).min(bytes.len());
                piece[..end - start].copy_from_slice(&bytes[start..end]);
                piece
            }),
            (Stage::Sparse, Some(staged)) => staged.data(false).and_then(|file| {
                let mut piece = vec![0; length];
                read_up_to(&file, &mut piece, range.start).map(|_| piece)
            }),
        };
        match read {
            Ok(piece) => Ok(Some(piece.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(disk("read staged bytes", &error)),
        }
    }

    /// Reads what is staged from the disk and the rest from the base.
    pub(super) async fn read(&self, window: &mut Window, offset: u64, size: u32) -> Result<Vec<Bytes>, ContentError> {
        // A commit may replace the base, and remove staged files, while we read: then what we saw is looked at again.
        loop {
            let (state, pieces) = self.look(|state| {
                let end = offset.saturating_add(u64::from(size)).min(state.size);
                (state.sketch(), state.pieces(offset.min(end)..end))
            });
            match self.read_pieces(window, &state, pieces).await {
                Ok(Some(read)) => return Ok(read),
                Ok(None) if self.changed_since(&state) => {}
                Err(ContentError::Changed(_)) if self.changed_since(&state) => {}
                Ok(None) => return Err(ContentError::Disk("cannot find staged bytes".to_owned())),
                Err(error) => return Err(error),
            }
        }
    }

    fn changed_since(&self, seen: &State) -> bool {
        let same = |state: &State| match (&state.base, &seen.base) {
            (Some(now), Some(then)) => Arc::ptr_eq(now, then),
            (None, None) => true,
            _ => false,
        };
        self.look(|state| !same(state) || state.staged.is_some() != seen.staged.is_some())
    }

    async fn read_pieces(
        &self,
        window: &mut Window,
        state: &State,
        pieces: Vec<(Range<u64>, bool)>,
    ) -> Result<Option<Vec<Bytes>>, ContentError> {
        let mut read = Vec::with_capacity(pieces.len());
        for (range, staged) in pieces {
            match &state.base {
                Some(base) if !staged => read.extend(base.read(window, range).await?),
                _ => match self.read_staged(state, range)? {
                    Some(bytes) => read.push(bytes),
                    None => return Ok(None),
                },
            }
        }
        Ok(Some(read))
    }

    /// SEEK_DATA and SEEK_HOLE, by what is known to be zeros.
    pub(super) fn seek(&self, offset: u64, hole: bool) -> Option<u64> {
        self.look(|state| {
            let pieces = state.zeros.pieces(offset..state.size.max(offset));
            if offset >= state.size {
                return None;
            }
            let found = pieces.into_iter().find(|(_, zeros)| *zeros == hole).map(|(range, _)| range.start);
            // Behind the end there is always a hole.
            if hole { Some(found.unwrap_or(state.size)) } else { found }
        })
    }
}
