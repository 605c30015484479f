//! What one file holds on this mount: which bytes are staged and which are the base's, and the changes to that.
//! Never talks to the bucket.
//!
//! Changes take the file's lock one after another, and a commit holds it until the bucket has answered: so what a
//! commit sends can't change under it, and writes that come meanwhile wait and belong to the next one. Reads take only
//! the state, for a moment, and go on during a commit.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::early::Early;
use super::journal::{self, Base, Record};
use super::ranges::RangeSet;
use super::source::Source;
use super::staging::Staged;
use super::tally::Weight;
use super::{ContentError, Contents, Intent, LARGEST, Version};
use crate::host::files;

/// A file, shared by its handles and by the tasks that commit it.
pub(super) struct Inner {
    pub(super) contents: Arc<Contents>,
    /// Held by whoever changes or commits.
    pub(super) changing: Arc<tokio::sync::Mutex<()>>,
    state: Mutex<State>,
    pub(super) early: Mutex<Early>,
}

/// What is where, at one moment.
#[derive(Default)]
pub(super) struct State {
    /// The version below.
    pub(super) base: Option<Arc<Source>>,
    /// How many of its first bytes are still seen; what lies behind them is staged, if only as a hole.
    pub(super) keep: u64,
    pub(super) size: u64,
    /// It is not in the bucket at all.
    pub(super) fresh: bool,
    pub(super) staged: Option<Arc<Staged>>,
    /// What is staged of the bytes below `keep`.
    pub(super) dirty: RangeSet,
    /// What is staged and known to be zeros.
    pub(super) zeros: RangeSet,
    pub(super) store: Stage,
    /// Left by an earlier process, and not committed by this one.
    pub(super) recovered: bool,
}

/// Where staged bytes are.
#[derive(Clone, Default)]
pub(super) enum Stage {
    /// Nowhere: there are none.
    #[default]
    None,
    /// All of the file is in its log, and here.
    Inline(Arc<Vec<u8>>),
    /// All of the file is in its log.
    InLog,
    /// In the sparse file.
    Sparse,
}

impl State {
    /// A file as the bucket has it.
    pub(super) fn existing(source: Arc<Source>) -> Self {
        let size = source.version().size;
        Self { base: Some(source), keep: size, size, ..Self::default() }
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.fresh || self.staged.is_some()
    }

    /// Is all of it staged, in the sparse file?
    pub(super) fn is_new_and_large(&self) -> bool {
        self.keep == 0 && matches!(self.store, Stage::Sparse)
    }

    pub(super) fn version(&self) -> Option<Version> {
        self.base.as_ref().map(|base| base.version().clone())
    }

    /// The range in pieces that are staged (`true`) or the base's.
    pub(super) fn pieces(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let below = range.start.min(self.keep)..range.end.min(self.keep);
        let mut pieces = self.dirty.pieces(below);
        let above = range.start.max(self.keep)..range.end.max(self.keep);
        if !above.is_empty() {
            match pieces.last_mut() {
                Some((last, true)) => last.end = above.end,
                _ => pieces.push((above, true)),
            }
        }
        pieces
    }

    /// What it adds to the mount's figures.
    fn weight(&self) -> Weight {
        let staged = self.size.saturating_sub(self.keep) + self.dirty.total();
        Weight {
            files: u64::from(self.is_dirty()),
            bytes: if matches!(self.store, Stage::None) { 0 } else { staged },
            memory: if let Stage::Inline(bytes) = &self.store { bytes.len() as u64 } else { 0 },
        }
    }

    /// The state without its sets of ranges, which may be long.
    pub(super) fn sketch(&self) -> Self {
        Self {
            base: self.base.clone(),
            keep: self.keep,
            size: self.size,
            fresh: self.fresh,
            staged: self.staged.clone(),
            store: self.store.clone(),
            recovered: self.recovered,
            ..Self::default()
        }
    }

    fn wrote(&mut self, range: Range<u64>) {
        if range.start > self.size {
            self.zeros.insert(self.size..range.start);
        }
        self.size = self.size.max(range.end);
        self.zeros.remove(range.clone());
        self.dirty.insert(range.start.min(self.keep)..range.end.min(self.keep));
    }

    fn cut(&mut self, size: u64) {
        self.keep = self.keep.min(size);
        self.dirty.remove(size..u64::MAX);
        if size > self.size {
            self.zeros.insert(self.size..size);
        } else {
            self.zeros.remove(size..u64::MAX);
        }
        self.size = size;
    }

    fn base_record(&self) -> Record {
        Record::Base(Base { version: self.version(), keep: self.keep })
    }

    /// Does a write of a range have to be logged after it was made?
    fn unlogged(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let below = range.start.min(self.keep)..range.end.min(self.keep);
        (!self.dirty.covers(below.clone())).then_some(below)
    }
}

/// How a disk's refusal is told.
pub(super) fn disk(what: &str, error: &io::Error) -> ContentError {
    let message = format!("cannot {what}: {error}");
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ContentError::Full(message),
        io::ErrorKind::FileTooLarge => ContentError::TooLarge,
        _ => ContentError::Disk(message),
    }
}

impl Inner {
    pub(super) fn new(contents: &Arc<Contents>, state: State) -> Arc<Self> {
        let inner = Self {
            contents: contents.clone(),
            changing: Arc::default(),
            state: Mutex::new(state),
            early: Mutex::default(),
        };
        inner.contents.tally.changed(Weight::default(), inner.look(State::weight));
        Arc::new(inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the state.
    pub(super) fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state())
    }

    /// Changes the state, and the mount's figures with it.
    pub(super) fn alter<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let before = state.weight();
        let result = change(&mut state);
        self.contents.tally.changed(before, state.weight());
        result
    }

    /// Writes. Runs on a thread that may block; the caller holds `changing`.
    pub(super) fn write(&self, offset: u64, data: &[u8], intent: &Intent) -> Result<(), ContentError> {
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= LARGEST).ok_or(ContentError::TooLarge)?;
        if data.is_empty() {
            return Ok(());
        }
        let what = |error: io::Error| disk("stage a write", &error);
        let staged = self.stage(end, intent, Some((offset, data))).map_err(what)?;
        let Some(staged) = staged else { return Ok(()) };
        let file = staged.data(false).map_err(what)?;
        let size = self.look(|state| state.size);
        if let Err(error) = file.write_all_at(data, offset) {
            // A part may be there: it must not count as the file's end after a restart.
            if end > size {
                let _ = file.set_len(size);
            }
            return Err(what(error));
        }
        self.log_range(&staged, offset..end, intent).map_err(|error| {
            if end > size {
                let _ = file.set_len(size);
            }
            what(error)
        })?;
        self.alter(|state| state.wrote(offset..end));
        self.spare(&staged);
        Ok(())
    }

    /// Cuts or extends. As [`Self::write`].
    pub(super) fn resize(&self, size: u64, intent: &Intent) -> Result<(), ContentError> {
        if size > LARGEST {
            return Err(ContentError::TooLarge);
        }
        if self.look(|state| state.size == size) {
            return Ok(());
        }
        let what = |error: io::Error| disk("stage a new size", &error);
        if size == 0 {
            return self.restart(intent).map_err(what);
        }
        let Some(staged) = self.stage(size, intent, None).map_err(what)? else {
            return self.resize_inline(size, intent).map_err(what);
        };
        let file = staged.data(false).map_err(what)?;
        file.set_len(size).map_err(what)?;
        let mut bytes = Vec::new();
        if self.look(|state| size < state.keep) {
            journal::encode(&Record::Keep(size), &mut bytes);
        }
        self.encode_intent(&staged, intent, &mut bytes);
        if !bytes.is_empty() {
            staged.append(&bytes).map_err(what)?;
        }
        self.alter(|state| state.cut(size));
        self.spare(&staged);
        Ok(())
    }

    /// Makes a range read as zeros. As [`Self::write`].
    pub(super) fn punch(&self, offset: u64, length: u64, intent: &Intent) -> Result<(), ContentError> {
        let size = self.look(|state| state.size);
        let range = offset.min(size)..offset.saturating_add(length).min(size);
        if range.is_empty() {
            return Ok(());
        }
        let what = |error: io::Error| disk("stage a hole", &error);
        // Small files are written, so that their log stays a list of writes.
        if self.look(|state| matches!(state.store, Stage::Inline(_) | Stage::InLog)) {
            return self.write(range.start, &vec![0; (range.end - range.start) as usize], intent);
        }
        if let Some(staged) = self.stage(u64::MAX, intent, None).map_err(what)? {
            let file = staged.data(false).map_err(what)?;
            blank(&file, range.clone()).map_err(what)?;
            self.log_range(&staged, range.clone(), intent).map_err(what)?;
            self.alter(|state| {
                state.wrote(range.clone());
                state.zeros.insert(range);
            });
            self.spare(&staged);
        }
        Ok(())
    }

    /// Empties the file: nothing of its base is seen any more, nothing staged counts, and it is small again.
    fn restart(&self, intent: &Intent) -> io::Result<()> {
        let (version, staged) = self.look(|state| (state.version(), state.staged.clone()));
        let records = [Record::Base(Base { version, keep: 0 }), Record::Restart];
        let staged = match staged {
            None => Arc::new(Staged::create(&self.contents.folder, intent, &records)?),
            Some(staged) if staged.log_size() < self.contents.tuning.inline => {
                let mut bytes = Vec::new();
                records.iter().for_each(|record| journal::encode(record, &mut bytes));
                self.encode_intent(&staged, intent, &mut bytes);
                staged.append(&bytes)?;
                staged
            }
            Some(staged) => {
                let intent = staged.intent().map(Record::Intent);
                staged.rewrite(&records.into_iter().chain(intent).collect::<Vec<_>>())?;
                staged
            }
        };
        self.alter(|state| {
            state.cut(0);
            state.staged = Some(staged);
            state.store = Stage::Inline(Arc::default());
        });
        Ok(())
    }

    /// Sees to it that there are staged files for a file of at least `end` bytes. A small file's write is staged here and now;
    /// otherwise the sparse file is there when this returns it.
    fn stage(&self, end: u64, intent: &Intent, write: Option<(u64, &[u8])>) -> io::Result<Option<Arc<Staged>>> {
        let state = self.look(State::sketch);
        if let (Some(staged), Stage::Sparse) = (&state.staged, &state.store) {
            return Ok(Some(staged.clone()));
        }
        let tuning = &self.contents.tuning;
        let small = end.max(state.size) <= tuning.inline && state.keep == 0 && self.contents.tally.room_inline(tuning);
        match (state.staged.clone(), &state.store) {
            (Some(staged), Stage::Inline(_) | Stage::InLog) => {
                if small && staged.log_size() < 4 * tuning.inline {
                    if let Some((offset, data)) = write {
                        let mut bytes = Vec::with_capacity(data.len() + 64);
                        journal::encode_inline(offset, data, &mut bytes);
                        self.encode_intent(&staged, intent, &mut bytes);
                        staged.append(&bytes)?;
                        self.wrote_inline(offset, data);
                    }
                    self.spare(&staged);
                    return Ok(None);
                }
                self.spill(&staged, &state, intent)?;
                Ok(Some(staged))
            }
            (Some(_) | None, _) => {
                if small {
                    let mut records = vec![state.base_record(), Record::InlineSize(state.size)];
                    if let Some((offset, data)) = write {
                        records.push(Record::Inline(offset, data.to_vec()));
                    }
                    let staged = Arc::new(Staged::create(&self.contents.folder, intent, &records)?);
                    self.alter(|state| {
                        state.staged = Some(staged);
                        state.store = Stage::Inline(Arc::new(vec![0; state.size as usize]));
                    });
                    if let Some((offset, data)) = write {
                        self.wrote_inline(offset, data);
                    }
                    return Ok(None);
                }
                // Without this record the log says nothing, and the sparse file is nobody's.
                let staged = Arc::new(Staged::create(&self.contents.folder, intent, &[])?);
                let made = staged.data(true).and_then(|file| file.set_len(state.size));
                let made = made.and_then(|()| {
                    let mut bytes = Vec::new();
                    journal::encode(&state.base_record(), &mut bytes);
                    journal::encode(&Record::Sparse(Vec::new()), &mut bytes);
                    staged.append(&bytes)
                });
                if let Err(error) = made {
                    staged.remove();
                    return Err(error);
                }
                self.alter(|state| {
                    state.staged = Some(staged.clone());
                    state.store = Stage::Sparse;
                });
                Ok(Some(staged))
            }
        }
    }

    /// A small file becomes a sparse one.
    fn spill(&self, staged: &Arc<Staged>, state: &State, intent: &Intent) -> io::Result<()> {
        let bytes = self.inline_bytes(state)?;
        let file = staged.data(true)?;
        file.write_all_at(&bytes, 0)?;
        let mut records = Vec::new();
        journal::encode(&Record::Sparse(Vec::new()), &mut records);
        self.encode_intent(staged, intent, &mut records);
        staged.append(&records)?;
        self.alter(|state| state.store = Stage::Sparse);
        Ok(())
    }

    /// The bytes of a file that lies in its log.
    pub(super) fn inline_bytes(&self, state: &State) -> io::Result<Arc<Vec<u8>>> {
        match (&state.store, &state.staged) {
            (Stage::Inline(bytes), _) => Ok(bytes.clone()),
            (_, Some(staged)) => Ok(Arc::new(journal::replay(&staged.records()?))),
            (_, None) => Ok(Arc::default()),
        }
    }

    /// What is not in memory is read from the log, which has it.
    fn wrote_inline(&self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        self.alter(|state| {
            state.wrote(offset..end as u64);
            if let Stage::Inline(bytes) = &mut state.store {
                let bytes = Arc::make_mut(bytes);
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[offset as usize..end].copy_from_slice(data);
            }
        });
    }

    fn resize_inline(&self, size: u64, intent: &Intent) -> io::Result<()> {
        let Some(staged) = self.look(|state| state.staged.clone()) else { return Ok(()) };
        let mut bytes = Vec::new();
        journal::encode(&Record::InlineSize(size), &mut bytes);
        self.encode_intent(&staged, intent, &mut bytes);
        staged.append(&bytes)?;
        self.alter(|state| {
            state.cut(size);
            if let Stage::Inline(bytes) = &mut state.store {
                Arc::make_mut(bytes).resize(size as usize, 0);
            }
        });
        Ok(())
    }

    fn encode_intent(&self, staged: &Staged, intent: &Intent, bytes: &mut Vec<u8>) {
        if let Some(record) = staged.changed(intent, false, self.contents.tuning.spare) {
            journal::encode(&record, bytes);
        }
    }

    fn log_range(&self, staged: &Staged, range: Range<u64>, intent: &Intent) -> io::Result<()> {
        let mut bytes = Vec::new();
        if let Some(range) = self.look(|state| state.unlogged(&range)) {
            journal::encode(&Record::Dirty(range), &mut bytes);
        }
        self.encode_intent(staged, intent, &mut bytes);
        if bytes.is_empty() { Ok(()) } else { staged.append(&bytes) }
    }

    /// Keeps the log short and the descriptors few.
    fn spare(&self, staged: &Arc<Staged>) {
        let tuning = &self.contents.tuning;
        if staged.log_size() > tuning.longest_log && self.look(|state| matches!(state.store, Stage::Sparse)) {
            let (base, ranges) = self.look(|state| (state.base_record(), state.dirty.iter().collect()));
            let intent = staged.intent().map(Record::Intent);
            let records = [base, Record::Sparse(ranges)].into_iter().chain(intent);
            if let Err(error) = staged.rewrite(&records.collect::<Vec<_>>()) {
                tracing::warn!(%error, "cannot shorten the log of a staged file");
            }
        }
        if self.contents.folder.descriptors() > tuning.descriptors {
            staged.close();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.contents.tally.changed(self.look(State::weight), Weight::default());
    }
}

/// Fills the buffer as far as the file goes.
pub(super) fn read_up_to(file: &std::fs::File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A range becomes a hole, or zeros where there are no holes.
fn blank(file: &std::fs::File, range: Range<u64>) -> io::Result<()> {
    match files::punch(file, range.clone()) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            let zeros = vec![0; 1 << 20];
            let mut at = range.start;
            while at < range.end {
                let length = (range.end - at).min(zeros.len() as u64);
                file.write_all_at(&zeros[..length as usize], at)?;
                at += length;
            }
            Ok(())
        }
        other => other,
    }
}
