//! Reading one version of an object: which blocks are asked for, and when.
//!
//! A handle has a [`Window`]. While it reads on from where it was (give or take what the kernel's own read-ahead puts
//! out of order), the window grows with what was read, up to the budget, and is filled by parallel GETs in blocks of
//! 1 MiB. When it reads anywhere, just what is asked for is fetched, in pieces of 128 KiB; backwards, the whole block.
//! All handles of a file find each other's blocks, also those that are still coming in, and wait only for the bytes
//! that they need.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;

use super::super::store::patient::fetch;
use super::block::{Block, Fill};
use super::budget::{Budget, Hoard, Share};
use super::commit::{refused, short};
use super::{ContentError, Contents, Version};

/// One version, and what is in memory of it.
pub(super) struct Source {
    contents: Arc<Contents>,
    version: Version,
    /// By where they begin; they do not overlap. Those that nobody holds are gone.
    blocks: Mutex<(BTreeMap<u64, Weak<Block>>, usize)>,
    /// The bytes that came with the open.
    head: Arc<Held>,
}

/// How a handle reads: its window. One for each open handle.
#[derive(Default)]
pub struct Window {
    /// Of which source.
    source: Weak<Source>,
    held: Arc<Held>,
    /// Where a sequential reader reads on.
    next: u64,
    /// How much it has read in sequence.
    run: u64,
    /// How often it went backwards in sequence.
    back: u32,
    /// Up to where blocks have been asked for.
    ahead: u64,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window").field("next", &self.next).field("run", &self.run).finish_non_exhaustive()
    }
}

/// Blocks that are kept for the next reads.
#[derive(Default)]
struct Held {
    blocks: Mutex<BTreeMap<u64, Arc<Block>>>,
    used: Mutex<Option<Instant>>,
    listed: AtomicBool,
}

impl Held {
    fn blocks(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Block>>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn use_now(self: &Arc<Self>, budget: &Budget) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        if !self.listed.swap(true, Ordering::Relaxed) {
            let weak: Weak<Self> = Arc::downgrade(self);
            budget.enlist(weak);
        }
    }

    #[cfg(test)]
    fn holds(&self) -> u64 {
        self.blocks().values().map(|block| block.range().end - block.range().start).sum()
    }
}

impl Hoard for Held {
    fn release(&self) {
        self.listed.store(false, Ordering::Relaxed);
        let blocks = std::mem::take(&mut *self.blocks());
        drop(blocks);
    }

    fn unused(&self) -> Duration {
        let used = *self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.map_or(Duration::MAX, |used| used.elapsed())
    }
}

/// How far blocks reach beyond what is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// To the end of the piece.
    Piece,
    /// To the end of the block.
    Block,
    /// The whole block.
    Around,
}

impl Source {
    /// `head`: the version's first bytes, if they are known.
    pub(super) fn new(contents: &Arc<Contents>, version: Version, head: Option<Bytes>) -> Arc<Self> {
        let source = Self { contents: contents.clone(), version, blocks: Mutex::default(), head: Arc::default() };
        let head = head.filter(|head| !head.is_empty());
        if let Some(head) = head
            && let Some(share) = contents.budget.spare(head.len() as u64)
        {
            let range = 0..source.version.size.min(head.len() as u64);
            let block = Block::new(range, Some(share));
            block.push(head);
            source.map().0.insert(0, Arc::downgrade(&block));
            source.head.blocks().insert(0, block);
            source.head.use_now(&contents.budget);
        }
        Arc::new(source)
    }

    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    fn map(&self) -> MutexGuard<'_, (BTreeMap<u64, Weak<Block>>, usize)> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A range within the version, whole.
    pub(super) async fn read(
        self: &Arc<Self>,
        window: &mut Window,
        range: Range<u64>,
    ) -> Result<Vec<Bytes>, ContentError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        if !std::ptr::eq(window.source.as_ptr(), Arc::as_ptr(self)) {
            *window = Window { source: Arc::downgrade(self), ..Window::default() };
        }
        let reach = window.note(&range, &self.contents);
        let budget = &self.contents.budget;
        // What is missing needs memory, and one may wait for that only while holding nothing.
        let missing = self.missing(&range, reach);
        let mut share = if missing > 0 { budget.need(missing).await } else { None };
        let (blocks, mut fresh) = self.cover(range.clone(), reach, &mut |length| {
            // Somebody may have let a block go since: then it is had without.
            Some(share.as_mut().and_then(|share| share.split((length as usize).min(share.num_permits()))))
        });
        drop(share);
        let looked = reach == Reach::Piece;
        if looked {
            // At once, which for a small read is faster than asking somebody to.
            fresh.retain(|block| !self.fill_from_cache(block));
        }
        if !fresh.is_empty() {
            // What was read ahead is gone, if there was anything.
            window.ahead = 0;
        }
        window.keep(&blocks, reach, &self.contents);
        if reach == Reach::Block {
            self.read_ahead(window, &range, &mut fresh);
        }
        self.fetch(fresh, window.part(&self.contents), looked);
        let mut found = Vec::new();
        for block in &blocks {
            let part = block.range();
            block.read(range.start.max(part.start)..range.end.min(part.end), &mut found).await?;
        }
        drop(blocks);
        if range.end >= self.head.blocks().first_key_value().map_or(0, |(_, block)| block.range().end) && window.run > 0
        {
            self.head.blocks().clear();
        }
        if budget.is_short() {
            window.held.release();
        }
        Ok(found)
    }

    /// Blocks beyond what is asked for, while there is memory to spare.
    fn read_ahead(&self, window: &mut Window, range: &Range<u64>, fresh: &mut Vec<Arc<Block>>) {
        let (tuning, size) = (&self.contents.tuning, self.version.size);
        let asked = fresh.last().map_or(range.end, |block| block.range().end);
        let start = window.ahead.max(asked);
        let reached = window.next + window.width(&self.contents);
        let end = if reached >= size { size } else { reached - reached % tuning.block };
        // Not in driblets.
        if start >= end || (end - start < window.part(&self.contents) && end < size) {
            window.ahead = start;
            return;
        }
        let budget = &self.contents.budget;
        let (blocks, more) = self.cover(start..end, Reach::Block, &mut |length| Some(Some(budget.spare(length)?)));
        window.ahead = blocks.last().map_or(start, |block| block.range().end);
        let mut held = window.held.blocks();
        held.extend(blocks.into_iter().map(|block| (block.range().start, block)));
        drop(held);
        fresh.extend(more);
    }

    /// How many bytes of new blocks a range needs.
    fn missing(&self, range: &Range<u64>, reach: Reach) -> u64 {
        let mut missing = 0;
        self.walk(&mut self.map().0, range.clone(), reach, &mut |range| {
            missing += range.end - range.start;
            Some(range.end)
        });
        missing
    }

    /// Blocks that cover a range, and those among them that are new. `room`: memory for a new one; without it the
    /// blocks end there.
    fn cover(
        &self,
        range: Range<u64>,
        reach: Reach,
        room: &mut dyn FnMut(u64) -> Option<Option<Share>>,
    ) -> (Vec<Arc<Block>>, Vec<Arc<Block>>) {
        let mut fresh = Vec::new();
        let mut map = self.map();
        let (map, sweep) = &mut *map;
        let mut blocks = self.walk(map, range, reach, &mut |range| {
            let end = range.end;
            let share = room(end - range.start)?;
            fresh.push(Block::new(range, share));
            Some(end)
        });
        for block in &fresh {
            map.insert(block.range().start, Arc::downgrade(block));
        }
        blocks.extend(fresh.iter().cloned());
        blocks.sort_unstable_by_key(|block| block.range().start);
        if map.len() > *sweep {
            map.retain(|_, block| block.strong_count() > 0);
            *sweep = 2 * map.len() + 64;
        }
        (blocks, fresh)
    }

    /// Goes over a range: gives the blocks that there are, and has `make` make those that there are not, up to the end
    /// that it says.
    fn walk(
        &self,
        map: &mut BTreeMap<u64, Weak<Block>>,
        range: Range<u64>,
        reach: Reach,
        make: &mut dyn FnMut(Range<u64>) -> Option<u64>,
    ) -> Vec<Arc<Block>> {
        let tuning = &self.contents.tuning;
        let mut found = Vec::new();
        let mut at = range.start;
        // Where the block before ends.
        let mut floor = 0;
        if let Some((_, block)) = map.range(..at).next_back()
            && let Some(block) = alive(block)
        {
            floor = block.range().end.min(at);
        }
        while at < range.end {
            let covering = map.range(..=at).next_back().and_then(|(_, block)| alive(block));
            if let Some(block) = covering.filter(|block| block.range().contains(&at)) {
                at = block.range().end;
                floor = at;
                found.push(block);
                continue;
            }
            let next =
                map.range(at + 1..).find(|(_, block)| alive(block).is_some()).map_or(u64::MAX, |(start, _)| *start);
            let unit = if reach == Reach::Around { tuning.block } else { tuning.piece };
            let start = (at - at % unit).max(floor);
            let edge = at - at % tuning.block + tuning.block;
            let end = match reach {
                Reach::Piece => range.end.next_multiple_of(tuning.piece).min(edge),
                Reach::Block | Reach::Around => edge,
            };
            let Some(end) = make(start..end.min(next).min(self.version.size)) else { break };
            at = end;
            floor = end;
        }
        found
    }

    fn fill_from_cache(&self, block: &Block) -> bool {
        let Some(cache) = &self.contents.cache else { return false };
        let range = block.range();
        let length = range.end - range.start;
        let found = cache.read(&self.version, &range);
        let tally = &self.contents.tally;
        let count = if found.is_some() { &tally.hits } else { &tally.misses };
        count.fetch_add(length, Ordering::Relaxed);
        found.map(|pieces| pieces.into_iter().for_each(|piece| block.push(piece))).is_some()
    }

    /// Has new blocks filled, in GETs of about `part` bytes side by side. `looked`: they are not in the cache.
    fn fetch(self: &Arc<Self>, fresh: Vec<Arc<Block>>, part: u64, looked: bool) {
        let mut group: Vec<Arc<Block>> = Vec::new();
        for block in fresh {
            let joins = group.first().zip(group.last()).is_some_and(|(first, last)| {
                last.range().end == block.range().start && block.range().end - first.range().start <= part
            });
            if !joins && !group.is_empty() {
                self.fill(std::mem::take(&mut group), looked);
            }
            group.push(block);
        }
        if !group.is_empty() {
            self.fill(group, looked);
        }
    }

    fn fill(self: &Arc<Self>, blocks: Vec<Arc<Block>>, looked: bool) {
        let source = self.clone();
        let mut fill = Fill::new(&blocks);
        drop(blocks);
        tokio::spawn(async move {
            if let Err(error) = source.fill_blocks(&fill, looked).await {
                fill.fail(error);
            }
        });
    }

    async fn fill_blocks(self: &Arc<Self>, fill: &Fill, looked: bool) -> Result<(), ContentError> {
        if self.contents.cache.is_some() && !looked {
            let (source, blocks) = (self.clone(), fill.weak());
            let work = move || {
                blocks.iter().filter_map(Weak::upgrade).for_each(|block| {
                    source.fill_from_cache(&block);
                })
            };
            let _ = tokio::task::spawn_blocking(work).await;
        }
        loop {
            // The next GET: up to the next block that came from the cache.
            let wanted = fill.wanted();
            let Some(first) = wanted.first() else { return Ok(()) };
            let start = first.range().start;
            let mut end = start;
            let run = wanted.into_iter().take_while(|block| {
                let joins = block.range().start == end;
                end = if joins { block.range().end } else { end };
                joins
            });
            let run: Vec<_> = run.map(|block| (block.range().end, Arc::downgrade(&block))).collect();
            self.get(start..end, run).await?;
        }
    }

    /// One GET, of blocks side by side, each with its end.
    async fn get(&self, range: Range<u64>, blocks: Vec<(u64, Weak<Block>)>) -> Result<(), ContentError> {
        let version = &self.version;
        let store = &self.contents.store;
        let mut body = if range == (0..version.size) && range.end <= self.contents.tuning.block {
            // Services tell checksums of whole objects only. What is damaged is read again before anybody sees it.
            let (_, bytes) = fetch(store.as_ref(), &version.key, None, Some(&version.etag)).await.map_err(refused)?;
            futures_util::stream::iter([Ok(bytes)]).boxed()
        } else {
            store.get(&version.key, Some(range.clone()), Some(&version.etag)).await.map_err(refused)?.1
        };
        let (mut at, mut rest) = (range.start, blocks.as_slice());
        while let Some((end, _)) = rest.first() {
            // Nobody wants the rest any more.
            if rest.iter().all(|(_, block)| block.strong_count() == 0) {
                return Ok(());
            }
            let mut end = *end;
            let Some(bytes) = body.next().await else { return Err(short(version, at)) };
            let mut bytes = bytes.map_err(refused)?;
            while !bytes.is_empty()
                && let Some((_, block)) = rest.first()
            {
                let piece = bytes.split_to((end - at).min(bytes.len() as u64) as usize);
                at += piece.len() as u64;
                if let Some(block) = block.upgrade() {
                    block.push(piece);
                    if at == end
                        && let Some(cache) = &self.contents.cache
                    {
                        cache.offer(version, &block);
                    }
                }
                if at == end {
                    rest = &rest[1..];
                    end = rest.first().map_or(end, |(end, _)| *end);
                }
            }
        }
        Ok(())
    }
}

fn alive(block: &Weak<Block>) -> Option<Arc<Block>> {
    block.upgrade().filter(|block| !block.has_failed())
}

impl Window {
    /// Notes a read, and says how it is to be answered.
    fn note(&mut self, range: &Range<u64>, contents: &Contents) -> Reach {
        let slack = contents.tuning.slack;
        let length = range.end - range.start;
        let near = range.start <= self.next + slack && range.start + slack >= self.next;
        let begun = self.run > 0 || range.start == 0 || range.start == self.next;
        if near && begun {
            self.back = 0;
            self.run += length;
            self.next = self.next.max(range.end);
            return Reach::Block;
        }
        // Reading backwards, the end is where the last one began.
        let backwards = range.end <= self.next && range.end + 2 * length + slack >= self.next;
        self.back = if backwards { self.back + 1 } else { 0 };
        self.run = 0;
        self.next = range.end;
        self.ahead = 0;
        if self.back > 1 { Reach::Around } else { Reach::Piece }
    }

    /// How far ahead is read.
    fn width(&self, contents: &Contents) -> u64 {
        let tuning = &contents.tuning;
        let most = contents.budget.total().saturating_sub(2 * tuning.block).min(tuning.get * tuning.gets as u64);
        (8 * self.run).max(tuning.window).min(most)
    }

    /// How much one GET asks for.
    fn part(&self, contents: &Contents) -> u64 {
        let tuning = &contents.tuning;
        let part = self.width(contents) / tuning.gets as u64;
        (part - part % tuning.block).clamp(tuning.block, tuning.get)
    }

    /// Holds what was read last, and lets what lies behind go.
    fn keep(&mut self, blocks: &[Arc<Block>], reach: Reach, contents: &Contents) {
        let mut held = self.held.blocks();
        let dropped: Vec<_> = if reach == Reach::Block {
            let behind = self.next.saturating_sub(contents.tuning.slack);
            let gone = held.extract_if(.., |_, block| block.range().end <= behind);
            gone.collect()
        } else {
            let few = held.len() <= 4;
            held.extract_if(.., |_, _| !few).collect()
        };
        held.extend(blocks.iter().map(|block| (block.range().start, block.clone())));
        drop(held);
        drop(dropped);
        self.held.use_now(&contents.budget);
    }

    /// Bytes that it holds.
    #[cfg(test)]
    pub(super) fn holds(&self) -> u64 {
        self.held.holds()
    }
}
