//! Which parts an object is made of. Pure.

use std::ops::Range;

use super::tuning::Tuning;

/// One part of a multipart upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) range: Range<u64>,
    /// Made of the base on the server; otherwise it is sent.
    pub(super) copied: bool,
}

/// The parts for a file in these pieces (staged or the base's): untouched ranges are copied where they are large enough
/// for a part of their own; what is too small is sent with its staged neighbours.
pub(super) fn plan(pieces: &[(Range<u64>, bool)], tuning: &Tuning) -> Vec<Planned> {
    let mut least = tuning.least_part;
    loop {
        let parts = split(&segments(pieces, least, tuning.least_part), tuning);
        if parts.len() as u64 <= tuning.parts || least > u64::MAX / 2 {
            return parts;
        }
        // Too many small changes: more of what lies between them is sent.
        least *= 2;
    }
}

/// Segments to send or to copy, in turn. Untouched ranges below `gap` are sent, and none but the last is below `least`.
fn segments(pieces: &[(Range<u64>, bool)], gap: u64, least: u64) -> Vec<Planned> {
    let mut segments: Vec<Planned> = Vec::new();
    let size = pieces.last().map_or(0, |(range, _)| range.end);
    let send = |segments: &mut Vec<Planned>, range: Range<u64>| match segments.last_mut() {
        Some(last) if !last.copied => last.range.end = range.end,
        _ => segments.push(Planned { range, copied: false }),
    };
    for (range, staged) in pieces {
        let mut range = range.clone();
        if *staged {
            send(&mut segments, range);
            continue;
        }
        // A segment before that is too small takes what it lacks from here.
        if let Some(last) = segments.last_mut().filter(|last| !last.copied) {
            let lacks = least.saturating_sub(last.range.end - last.range.start);
            let taken = lacks.min(range.end - range.start);
            last.range.end += taken;
            range.start += taken;
        }
        if range.is_empty() {
            continue;
        }
        // The last part may be small.
        if range.end - range.start >= gap || range.end == size && !segments.is_empty() {
            segments.push(Planned { range, copied: true });
        } else {
            send(&mut segments, range);
        }
    }
    segments
}

fn split(segments: &[Planned], tuning: &Tuning) -> Vec<Planned> {
    let size = segments.last().map_or(0, |segment| segment.range.end);
    // Leave some numbers for the ends of segments.
    let part = tuning.part.max((size / (tuning.parts * 9 / 10).max(1)).next_multiple_of(tuning.part));
    let mut parts = Vec::new();
    for segment in segments {
        let length = segment.range.end - segment.range.start;
        let most = if segment.copied {
            let even = (length / tuning.in_flight as u64).next_multiple_of(tuning.part);
            even.clamp(tuning.copy.0.max(part), tuning.copy.1)
        } else {
            part
        };
        let mut at = segment.range.start;
        while at < segment.range.end {
            let mut end = (at + most).min(segment.range.end);
            // No small rest in the middle of the object.
            if segment.range.end - end < tuning.least_part && segment.range.end != size {
                end = if segment.range.end - at <= tuning.copy.1 { segment.range.end } else { end - tuning.least_part };
            }
            parts.push(Planned { range: at..end, copied: segment.copied });
            at = end;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn check(pieces: &[(Range<u64>, bool)]) -> Vec<Planned> {
        let tuning = Tuning::default();
        let parts = plan(pieces, &tuning);
        let size = pieces.last().unwrap().0.end;
        let mut at = 0;
        for (number, part) in parts.iter().enumerate() {
            assert_eq!(part.range.start, at);
            let length = part.range.end - at;
            assert!(length > 0 && length <= 5 << 30);
            assert!(length >= 5 * MIB || number + 1 == parts.len(), "{parts:?}");
            if part.copied {
                let staged = pieces
                    .iter()
                    .any(|(range, staged)| *staged && range.start < part.range.end && part.range.start < range.end);
                assert!(!staged, "{parts:?}");
            }
            at = part.range.end;
        }
        assert_eq!(at, size);
        assert!(parts.len() <= 10_000);
        parts
    }

    #[test]
    fn an_append_sends_only_itself() {
        let parts = check(&[(0..1024 * MIB, false), (1024 * MIB..1024 * MIB + 4096, true)]);
        let sent: Vec<_> = parts.iter().filter(|part| !part.copied).collect();
        assert_eq!(sent, [&Planned { range: 1024 * MIB..1024 * MIB + 4096, copied: false }]);
    }

    #[test]
    fn a_patch_sends_one_small_part() {
        let at = 300 * MIB + 77;
        let parts = check(&[(0..at, false), (at..at + 4096, true), (at + 4096..1024 * MIB, false)]);
        let sent: u64 = parts.iter().filter(|part| !part.copied).map(|part| part.range.end - part.range.start).sum();
        assert_eq!(sent, 5 * MIB);
    }

    #[test]
    fn the_largest_object_has_few_enough_parts() {
        check(&[(0..5 << 40, true)]);
        check(&[(0..(5 << 40) - 1, false), ((5 << 40) - 1..5 << 40, true)]);
        let mut pieces = Vec::new();
        for index in 0..30_000_u64 {
            pieces.push((index * 32 * MIB..index * 32 * MIB + 4096, true));
            pieces.push((index * 32 * MIB + 4096..(index + 1) * 32 * MIB, false));
        }
        check(&pieces);
    }

    #[test]
    fn any_pattern_gives_parts_that_s3_takes() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut pieces, mut at, mut staged) = (Vec::new(), 0, random.bool());
            for _ in 0..random.usize(1..12) {
                let length = match random.u32(0..4) {
                    0 => random.u64(1..10_000),
                    1 => random.u64(1..6 * MIB),
                    2 => random.u64(1..100 * MIB),
                    _ => random.u64(1..11 << 30),
                };
                pieces.push((at..at + length, staged));
                at += length;
                staged = !staged;
            }
            check(&pieces);
        }
    }
}
