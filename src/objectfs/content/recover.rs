//! What becomes of staged bytes that are not committed: kept for a successor, found again, set aside or forgotten.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::file::{Inner, Stage, State, disk};
use super::journal::{Base, Record, replay};
use super::source::Source;
use super::staging::Staged;
use super::{Content, ContentError, Contents, Intent, Recovered, Version, commit, early};
use crate::objectfs::store::Metadata;

/// What stands beside a file in the `conflicts` folder.
#[derive(Serialize)]
struct Sidecar<'a> {
    key: &'a str,
    metadata: &'a Metadata,
    /// The version that it was written over.
    base: Option<Version>,
    /// Is all of it there? The base may have been gone already; what was staged is always there.
    complete: bool,
    /// What was staged.
    staged: Vec<std::ops::Range<u64>>,
}

/// All files that are staged in the folder.
pub(super) fn recover(contents: &Arc<Contents>) -> Vec<Recovered> {
    let ids = contents.folder.ids().unwrap_or_else(|error| {
        tracing::warn!(folder = %contents.folder.path().display(), %error, "cannot look for staged files");
        Vec::new()
    });
    let mut found = Vec::new();
    for id in ids {
        match recover_one(contents, id) {
            Ok(recovered) => found.extend(recovered),
            // It stays where it is, for somebody to look at.
            Err(error) => tracing::warn!(
                folder = %contents.folder.path().display(), file = format!("{id:016x}"), %error,
                "cannot read a staged file"
            ),
        }
    }
    found
}

fn recover_one(contents: &Arc<Contents>, id: u64) -> io::Result<Option<Recovered>> {
    let Some((staged, records)) = Staged::recover(&contents.folder, id)? else { return Ok(None) };
    let Some(Intent { key, metadata, exclusive }) = staged.intent() else { return Ok(None) };
    let mut state = State::default();
    let mut known = false;
    for record in &records {
        match record {
            Record::Intent(_) | Record::Inline(..) | Record::InlineSize(_) => {}
            Record::Upload(key, upload) => early::give_up(contents, key.clone(), upload.clone()),
            Record::Base(Base { version, keep }) => {
                known = true;
                state.base = version.clone().map(|version| Source::new(contents, version, None));
                state.keep = *keep;
            }
            Record::Sparse(ranges) => {
                state.store = Stage::Sparse;
                ranges.iter().for_each(|range| state.dirty.insert(range.clone()));
            }
            Record::Dirty(range) => state.dirty.insert(range.clone()),
            Record::Keep(keep) => {
                state.keep = state.keep.min(*keep);
                state.dirty.remove(*keep..u64::MAX);
            }
            Record::Restart => {
                state.keep = 0;
                state.dirty.remove(0..u64::MAX);
                state.store = Stage::None;
            }
        }
    }
    // The log was made, and nothing was acknowledged before the next record.
    if !known {
        staged.remove();
        return Ok(None);
    }
    if let Stage::Sparse = state.store {
        state.size = staged.data(false)?.metadata()?.len();
        // Killed between cutting the file and saying so.
        state.keep = state.keep.min(state.size);
        state.dirty.remove(state.keep..u64::MAX);
    } else {
        state.store = Stage::InLog;
        state.size = replay(&records).len() as u64;
    }
    staged.close();
    state.recovered = true;
    state.staged = Some(Arc::new(staged));
    let intent = Intent { key, metadata, exclusive };
    let condition = commit::condition(&intent, state.version().as_ref());
    let content = Content { inner: Inner::new(contents, state) };
    Ok(Some(Recovered { key: intent.key, metadata: intent.metadata, condition, content }))
}

impl Inner {
    /// The caller holds `changing`.
    pub(super) fn remember(&self, intent: &Intent) -> Result<(), ContentError> {
        let what = |error: io::Error| disk("keep an intent", &error);
        let (staged, state) = self.look(|state| (state.staged.clone(), state.sketch()));
        let staged = match staged {
            Some(staged) => staged,
            None if !state.fresh => return Ok(()),
            None => {
                let records = [Record::Base(Base { version: None, keep: 0 }), Record::InlineSize(0)];
                let staged = Staged::create(&self.contents.folder, intent, &records).map_err(what)?;
                let staged = Arc::new(staged);
                self.alter(|state| {
                    state.staged = Some(staged.clone());
                    state.store = Stage::InLog;
                });
                staged
            }
        };
        if let Some(record) = staged.changed(intent, true, std::time::Duration::ZERO) {
            staged.record(&record).map_err(what)?;
        }
        staged.close();
        self.alter(|state| {
            if let Stage::Inline(_) = state.store {
                state.store = Stage::InLog;
            }
        });
        Ok(())
    }

    /// The caller holds `changing`.
    pub(super) fn discard(&self) {
        let staged = self.alter(|state| {
            state.forget();
            state.staged.take()
        });
        if let Some(staged) = staged {
            staged.remove();
        }
    }

    pub(super) fn moved(self: &Arc<Self>, version: Version) {
        let staged = self.alter(|state| {
            state.base = Some(Source::new(&self.contents, version.clone(), None));
            state.staged.clone().map(|staged| (staged, state.keep))
        });
        if let Some((staged, keep)) = staged
            && let Err(error) = staged.record(&Record::Base(Base { version: Some(version), keep }))
        {
            tracing::warn!(%error, "cannot keep where the base of a staged file is");
        }
    }

    pub(super) fn replaced(&self, version: Version) {
        self.alter(|state| {
            if !state.is_dirty() {
                *state = State::existing(Source::new(&self.contents, version, None));
            }
        });
    }
}

impl State {
    /// Nothing is staged any more; the base is what it was. The staged files are the caller's to remove.
    fn forget(&mut self) {
        let size = self.base.as_ref().map_or(0, |base| base.version().size);
        self.fresh = false;
        self.store = Stage::None;
        self.recovered = false;
        self.dirty.remove(0..u64::MAX);
        self.zeros.remove(0..u64::MAX);
        self.size = size;
        self.keep = size;
    }
}

/// The caller holds `changing`.
pub(super) async fn set_aside(inner: &Arc<Inner>, intent: &Intent) -> Result<PathBuf, ContentError> {
    let what = |error: io::Error| disk("keep the local version of a changed file", &error);
    let (state, pieces) = inner.look(|state| (state.sketch(), state.pieces(0..state.size)));
    let staged: Vec<_> = pieces.iter().filter(|(_, staged)| *staged).map(|(range, _)| range.clone()).collect();
    let folder = inner.contents.folder.path().join("conflicts");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(what)?;
    let mut complete = true;
    if let (Stage::Sparse, Some(files)) = (&state.store, &state.staged) {
        let file = files.data(false).map_err(what)?;
        // The version may be gone; then what was staged is what there is.
        if let Err(error) = commit::fill(inner, &file, &pieces).await {
            tracing::warn!(key = %intent.key, %error, "cannot complete the local version of a changed file");
            complete = false;
        }
    }
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name: String =
        intent.key.rsplit('/').find(|part| !part.is_empty()).unwrap_or("file").chars().take(60).collect();
    let (path, file) = new_name(&folder, &format!("{seconds}-{name}")).map_err(what)?;
    let sidecar = Sidecar { key: &intent.key, metadata: &intent.metadata, base: state.version(), complete, staged };
    let kept = keep(inner, &state, file, &path).and_then(|()| {
        let text = serde_json::to_vec_pretty(&sidecar)?;
        let mut file = File::create(path.with_added_extension("json"))?;
        file.write_all(&text)
    });
    if let Err(error) = kept {
        let _ = std::fs::remove_file(&path);
        return Err(what(error));
    }
    tracing::warn!(key = %intent.key, path = %path.display(), complete, "somebody else has changed the file; the local version is kept");
    inner.discard();
    Ok(path)
}

fn new_name(folder: &std::path::Path, name: &str) -> io::Result<(PathBuf, File)> {
    for number in 0_u32.. {
        let path = folder.join(if number == 0 { name.to_owned() } else { format!("{name}.{number}") });
        match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|file| (path, file)),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Puts the content at the path. The sparse file is linked there, so that nothing is copied and nothing can be lost
/// between.
fn keep(inner: &Inner, state: &State, mut file: File, path: &std::path::Path) -> io::Result<()> {
    match (&state.store, &state.staged) {
        (Stage::Sparse, Some(staged)) => {
            std::fs::remove_file(path)?;
            staged.link(path)
        }
        _ => {
            file.write_all(&inner.inline_bytes(state)?)?;
            file.sync_data()
        }
    }
}
