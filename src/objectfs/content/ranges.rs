//! Sets of byte ranges. Knows nothing of files.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges that do not touch, in order, and how many bytes they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RangeSet(BTreeMap<u64, u64>, u64);

impl RangeSet {
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // What overlaps or touches: its start lies at or before our end, its end at or behind our start.
        while let Some((&s, &e)) = self.0.range(..=end).next_back().filter(|&(_, &e)| e >= start) {
            self.0.remove(&s);
            self.1 -= e - s;
            start = start.min(s);
            end = end.max(e);
        }
        self.0.insert(start, end);
        self.1 += end - start;
    }

    pub(super) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&s, &e)) = self.0.range(..range.end).next_back().filter(|&(_, &e)| e > range.start) {
            self.0.remove(&s);
            self.1 -= e.min(range.end) - s.max(range.start);
            if s < range.start {
                self.0.insert(s, range.start);
            }
            if e > range.end {
                self.0.insert(range.end, e);
            }
        }
    }

    pub(super) fn covers(&self, range: Range<u64>) -> bool {
        range.is_empty() || self.0.range(..=range.start).next_back().is_some_and(|(_, &e)| e >= range.end)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(&start, &end)| start..end)
    }

    /// The range in pieces that lie wholly within the set (`true`) or wholly outside.
    pub(super) fn pieces(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        let first = self.0.range(..=at).next_back().map_or(at, |(&start, _)| start);
        for (&start, &end) in self.0.range(first..range.end.max(first)) {
            let (start, end) = (start.max(at), end.min(range.end));
            if end <= at {
                continue;
            }
            if start > at {
                pieces.push((at..start, false));
            }
            pieces.push((start..end, true));
            at = end;
        }
        if at < range.end {
            pieces.push((at..range.end, false));
        }
        pieces
    }

    /// How many bytes.
    pub(super) fn total(&self) -> u64 {
        self.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_ranges_is_what_a_row_of_bits_is() {
        for seed in 0..40 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut set, mut bits) = (RangeSet::default(), [false; 64]);
            for _ in 0..60 {
                let start = random.u64(0..64);
                let range = start..random.u64(start..=64);
                let add = random.bool();
                if add {
                    set.insert(range.clone())
                } else {
                    set.remove(range.clone())
                }
                bits[range.start as usize..range.end as usize].fill(add);
                assert_eq!(set.total(), bits.iter().filter(|bit| **bit).count() as u64);
                let start = random.u64(0..64);
                let asked = start..random.u64(start..=64);
                let mut at = asked.start;
                for (piece, inside) in set.pieces(asked.clone()) {
                    assert_eq!(piece.start, at);
                    assert!(bits[piece.start as usize..piece.end as usize].iter().all(|bit| *bit == inside));
                    at = piece.end;
                }
                assert_eq!(at, asked.end);
                let all = bits[asked.start as usize..asked.end as usize].iter().all(|bit| *bit);
                assert_eq!(set.covers(asked), all);
            }
            let ranges: Vec<_> = set.iter().collect();
            assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
        }
    }
}
