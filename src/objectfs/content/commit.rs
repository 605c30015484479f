//! Putting what is staged into the bucket, by the shape that costs least: small files in one PUT, others in parts, of
//! which those that nobody touched are copied on the server.
//!
//! The caller holds the file's lock, so nothing changes while it is sent. If anything fails, all stays staged, and the
//! next commit begins anew. An answer that was lost is looked into below, by the store.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};

use super::file::{Inner, Stage, State, disk};
use super::plan::{Planned, plan};
use super::source::Source;
use super::{ContentError, Intent, Version};
use crate::objectfs::store::{Condition, Etag, Part, Payload, StoreError, StoreErrorKind, UploadId};

/// What has to be in the bucket for a commit to happen.
pub(super) fn condition(intent: &Intent, base: Option<&Version>) -> Condition {
    match base {
        _ if intent.exclusive => Condition::Absent,
        Some(base) if base.key == intent.key => Condition::Is(base.etag.clone()),
        _ => Condition::None,
    }
}

/// How a refusal of the store is told: a version that is gone, or a condition that was not met, is a change.
pub(super) fn refused(error: StoreError) -> ContentError {
    match error.kind {
        StoreErrorKind::Conflict | StoreErrorKind::NotFound => ContentError::Changed(error.message),
        StoreErrorKind::Local => ContentError::Disk(error.message),
        _ => ContentError::Store(error),
    }
}

/// Commits. On success nothing is staged any more.
pub(super) async fn commit(inner: &Arc<Inner>, intent: &Intent) -> Result<Version, ContentError> {
    let (state, pieces) = inner.look(|state| (state.sketch(), state.pieces(0..state.size)));
    match &state.base {
        Some(base) if !state.is_dirty() => return Ok(base.version().clone()),
        None if !state.is_dirty() => {
            return Err(ContentError::Changed(format!("cannot commit {}: it is gone", intent.key)));
        }
        _ => {}
    }
    if let Some(staged) = &state.staged
        && let Some(record) = staged.changed(intent, true, std::time::Duration::ZERO)
    {
        // A successor tells by this whether what it finds in the bucket is ours.
        staged.record(&record).map_err(|error| disk("keep an intent", &error))?;
    }
    let condition = condition(intent, state.version().as_ref());
    let sent = send(inner, &state, &pieces, intent, &condition).await;
    let etag = match sent {
        Err(ContentError::Changed(message)) if state.recovered => {
            ours(inner, &state, intent).await.ok_or(ContentError::Changed(message))?
        }
        sent => sent?,
    };
    inner.abandon_early().await;
    let version = Version { key: intent.key.clone(), etag, size: state.size };
    // What is small is in memory anyhow, and often read next.
    let head = match &state.store {
        Stage::Inline(bytes) => Some(Bytes::from(bytes.as_ref().clone())),
        _ => None,
    };
    let source = Source::new(&inner.contents, version.clone(), head);
    let staged = inner.alter(|state| std::mem::replace(state, State::existing(source)).staged);
    if let Some(staged) = staged {
        staged.remove_log();
        if staged.is_sparse() {
            // Giving a large file's blocks back takes its time.
            tokio::task::spawn_blocking(move || staged.remove_data());
        }
    }
    Ok(version)
}

/// A worker that was killed after its commit and before it could forget what it had staged leaves what looks like a
/// conflict. It is none if the bucket has an object of the size and with the attributes, times included, of ours.
async fn ours(inner: &Inner, state: &State, intent: &Intent) -> Option<Etag> {
    let head = inner.contents.store.head(&intent.key).await.ok()?;
    let same = head.size == state.size && head.metadata.user == intent.metadata.user;
    (same && intent.metadata.user.contains_key("mtime")).then_some(head.etag)
}

async fn send(
    inner: &Arc<Inner>,
    state: &State,
    pieces: &[(Range<u64>, bool)],
    intent: &Intent,
    condition: &Condition,
) -> Result<Etag, ContentError> {
    let contents = &inner.contents;
    let payload = match (&state.store, &state.staged) {
        (Stage::Sparse, Some(staged)) => {
            let file = staged.data(false).map_err(|error| disk("read staged bytes", &error))?;
            if state.size > contents.tuning.whole {
                if state.is_new_and_large()
                    && let Some(etag) = send_early_parts(inner, &file, state.size, intent, condition).await
                {
                    return Ok(etag);
                }
                let below = Below { version: state.version(), staged: false };
                return send_parts(inner, &file, pieces, intent, condition, &below).await;
            }
            fill(inner, &file, pieces).await?;
            Payload::File(file, 0..state.size)
        }
        _ => {
            let bytes = inner.inline_bytes(state).map_err(|error| disk("read staged bytes", &error))?;
            Payload::Bytes(bytes.as_ref().clone().into())
        }
    };
    let _permit = contents.uploads.acquire().await;
    let _counted = contents.tally.uploading();
    contents.store.put(&intent.key, payload, &intent.metadata, condition).await.map_err(refused)
}

/// Brings the base's bytes into the sparse file, where a piece has them. They are not staged by that.
pub(super) async fn fill(inner: &Inner, file: &Arc<File>, pieces: &[(Range<u64>, bool)]) -> Result<(), ContentError> {
    let Some(base) = inner.look(|state| state.base.clone()) else { return Ok(()) };
    let version = base.version();
    for (range, _) in pieces.iter().filter(|(_, staged)| !staged) {
        let got = inner.contents.store.get(&version.key, Some(range.clone()), Some(&version.etag)).await;
        let (_, mut body) = got.map_err(refused)?;
        let mut at = range.start;
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(refused)?;
            let bytes = &bytes[..bytes.len().min((range.end - at) as usize)];
            file.write_all_at(bytes, at).map_err(|error| disk("complete staged bytes", &error))?;
            at += bytes.len() as u64;
        }
        if at != range.end {
            return Err(short(version, at));
        }
    }
    Ok(())
}

/// A body that ended early without saying so.
pub(super) fn short(version: &Version, at: u64) -> ContentError {
    let message = format!("cannot read {}: it ends at byte {at} of {}", version.key, version.size);
    ContentError::Store(StoreError { kind: StoreErrorKind::Corrupt, message })
}

/// What parts are copied from.
struct Below {
    version: Option<Version>,
    /// Is all of it staged, too?
    staged: bool,
}

/// Makes the file of what was sent early, and of what was not. `None`: it has to be sent as if nothing had been.
async fn send_early_parts(
    inner: &Arc<Inner>,
    file: &Arc<File>,
    size: u64,
    intent: &Intent,
    condition: &Condition,
) -> Option<Etag> {
    let (version, good) = inner.finish_early().await?;
    let pieces: Vec<_> = good.pieces(0..size).into_iter().map(|(range, sent)| (range, !sent)).collect();
    let key = version.key.clone();
    let below = Below { version: Some(version), staged: true };
    let sent = send_parts(inner, file, &pieces, intent, condition, &below).await;
    if let Err(error) = inner.contents.store.delete(&key, None).await {
        tracing::warn!(%error, "cannot remove parts that were sent early");
    }
    sent.ok()
}

async fn send_parts(
    inner: &Arc<Inner>,
    file: &Arc<File>,
    pieces: &[(Range<u64>, bool)],
    intent: &Intent,
    condition: &Condition,
    below: &Below,
) -> Result<Etag, ContentError> {
    let contents = &inner.contents;
    let parts = plan(pieces, &contents.tuning);
    let upload = contents.store.begin_upload(&intent.key, &intent.metadata).await.map_err(refused)?;
    let work = futures_util::stream::iter(parts.into_iter().zip(1..).map(|(part, number)| {
        let inside = within(pieces, &part.range);
        send_part(inner, file, intent, &upload, number, part, inside, below)
    }));
    let sent = work.buffer_unordered(contents.tuning.in_flight).try_collect::<Vec<_>>().await;
    let done = match sent {
        Ok(mut sent) => {
            sent.sort_unstable_by_key(|part| part.number);
            contents.store.finish_upload(&intent.key, &upload, &sent, condition).await.map_err(|error| {
                match error.kind {
                    // The upload is gone, not the file.
                    StoreErrorKind::NotFound => ContentError::Store(error),
                    _ => refused(error),
                }
            })
        }
        Err(error) => Err(error),
    };
    if done.is_err()
        && let Err(error) = contents.store.abort_upload(&intent.key, &upload).await
    {
        tracing::warn!(key = %intent.key, %error, "cannot give up an upload");
    }
    done
}

/// The pieces within a range.
fn within(pieces: &[(Range<u64>, bool)], range: &Range<u64>) -> Vec<(Range<u64>, bool)> {
    let from = pieces.partition_point(|(piece, _)| piece.end <= range.start);
    let pieces = pieces[from..].iter().take_while(|(piece, _)| piece.start < range.end);
    pieces.map(|(piece, staged)| (piece.start.max(range.start)..piece.end.min(range.end), *staged)).collect()
}

#[expect(clippy::too_many_arguments, reason = "one call of a loop")]
async fn send_part(
    inner: &Inner,
    file: &Arc<File>,
    intent: &Intent,
    upload: &UploadId,
    number: u32,
    part: Planned,
    inside: Vec<(Range<u64>, bool)>,
    below: &Below,
) -> Result<Part, ContentError> {
    let contents = &inner.contents;
    let _permit = contents.uploads.acquire().await;
    let _counted = contents.tally.uploading();
    if let Some(base) = below.version.as_ref().filter(|_| part.copied) {
        let range = part.range.clone();
        let copied = contents.store.copy_part(&intent.key, upload, number, &base.key, Some(&base.etag), range).await;
        match copied {
            // A service without this call gets all of it from here.
            Err(error) if error.kind == StoreErrorKind::Unsupported => {}
            copied => return copied.map_err(refused),
        }
    }
    if !below.staged {
        fill(inner, file, &inside).await?;
    }
    let payload = Payload::File(file.clone(), part.range.clone());
    let sent = contents.store.upload_part(&intent.key, upload, number, payload).await;
    sent.map_err(|error| match error.kind {
        StoreErrorKind::NotFound => ContentError::Store(error),
        _ => refused(error),
    })
}
