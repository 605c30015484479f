//! The log beside a staged file: records that are appended whole, each with a checksum, so that a torn tail is seen and
//! left out. Owns the format and never the meaning of what is staged.
//!
//! `BERTHLG1`, then records: length (u32), checksum (u32, both little-endian) of the payload, payload. A payload begins
//! with its kind.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Intent, Version};
use crate::objectfs::store::UploadId;

/// What every log begins with; a format that this program does not know is left alone.
pub(super) const MAGIC: &[u8; 8] = b"BERTHLG1";

/// Records are never longer.
const LONGEST: usize = 16 << 20;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// What a commit is to make; the last one counts.
    Intent(Intent),
    /// The version below, and how many of its first bytes are still seen.
    Base(Base),
    /// The file is small and lies in this log: these bytes were written at this offset.
    Inline(u64, Vec<u8>),
    /// The file is small and lies in this log: it was cut or extended.
    InlineSize(u64),
    /// From here on the bytes are in the sparse file; of what the base shows, these ranges are staged.
    Sparse(Vec<Range<u64>>),
    /// This range was staged over the base.
    Dirty(Range<u64>),
    /// Only so many of the base's first bytes are seen any more.
    Keep(u64),
    /// The file was emptied: nothing of the base is seen, nothing staged before counts, and it is small again.
    Restart,
    /// Parts were sent early under this key, which is ours alone.
    Upload(String, UploadId),
}

/// What lies below the staged bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Base {
    pub(super) version: Option<Version>,
    pub(super) keep: u64,
}

/// FNV-1a over eight bytes at a time, folded: for torn writes, not against an attacker.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut lanes = [0xcbf2_9ce4_8422_2325_u64, 0x9ae1_6a3b_2f90_404f, 0x3c6e_f372_fe94_f82b, 0xa54f_f53a_5f1d_36f1];
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    // Four lanes, so that the multiplications overlap.
    let mut wide = bytes.chunks_exact(32);
    for chunk in &mut wide {
        for (lane, eight) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            *lane = (*lane ^ word(eight)).wrapping_mul(PRIME).rotate_left(23);
        }
    }
    let mut sum = bytes.len() as u64;
    for (lane, eight) in lanes.iter_mut().zip(wide.remainder().chunks(8)) {
        *lane = (*lane ^ word(eight)).wrapping_mul(PRIME).rotate_left(23);
    }
    for lane in lanes {
        sum = (sum ^ lane ^ (lane >> 29)).wrapping_mul(PRIME).rotate_left(31);
    }
    sum ^ (sum >> 32)
}

/// Appends a record to a buffer that is to be written at once.
pub(super) fn encode(record: &Record, into: &mut Vec<u8>) {
    let start = into.len();
    into.extend_from_slice(&[0; 8]);
    let json = |into: &mut Vec<u8>, value: serde_json::Result<Vec<u8>>| into.extend(value.unwrap_or_default());
    match record {
        Record::Intent(intent) => {
            into.push(1);
            json(into, serde_json::to_vec(intent));
        }
        Record::Base(base) => {
            into.push(2);
            json(into, serde_json::to_vec(base));
        }
        Record::Inline(offset, bytes) => inline(*offset, bytes, into),
        Record::InlineSize(size) => {
            into.push(4);
            into.extend(size.to_le_bytes());
        }
        Record::Sparse(ranges) => {
            into.push(5);
            ranges.iter().for_each(|range| put_range(range, into));
        }
        Record::Dirty(range) => {
            into.push(6);
            put_range(range, into);
        }
        Record::Keep(keep) => {
            into.push(7);
            into.extend(keep.to_le_bytes());
        }
        Record::Restart => into.push(8),
        Record::Upload(key, upload) => {
            into.push(9);
            json(into, serde_json::to_vec(&(key, upload)));
        }
    }
    seal(start, into);
}

/// As [`encode`] of [`Record::Inline`], without a copy of the bytes before.
pub(super) fn encode_inline(offset: u64, bytes: &[u8], into: &mut Vec<u8>) {
    let start = into.len();
    into.extend_from_slice(&[0; 8]);
    inline(offset, bytes, into);
    seal(start, into);
}

fn inline(offset: u64, bytes: &[u8], into: &mut Vec<u8>) {
    into.push(3);
    into.extend(offset.to_le_bytes());
    into.extend_from_slice(bytes);
}

fn put_range(range: &Range<u64>, into: &mut Vec<u8>) {
    into.extend(range.start.to_le_bytes());
    into.extend(range.end.to_le_bytes());
}

/// Fills in length and checksum of the record that begins at `start`.
fn seal(start: usize, into: &mut [u8]) {
    let length = (into.len() - start - 8) as u32;
    let sum = checksum(&into[start + 8..]) as u32;
    into[start..start + 4].copy_from_slice(&length.to_le_bytes());
    into[start + 4..start + 8].copy_from_slice(&sum.to_le_bytes());
}

/// The records of a log up to its torn tail, and where that begins. `None`: no log of ours.
pub(super) fn decode(log: &[u8]) -> Option<(Vec<Record>, u64)> {
    let mut rest = log.strip_prefix(MAGIC)?;
    let mut records = Vec::new();
    while let Some((record, length)) = one(rest) {
        records.push(record);
        rest = &rest[length..];
    }
    Some((records, (log.len() - rest.len()) as u64))
}

fn one(bytes: &[u8]) -> Option<(Record, usize)> {
    let length = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let sum = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
    if length == 0 || length > LONGEST {
        return None;
    }
    let payload = bytes.get(8..8 + length)?;
    if checksum(payload) as u32 != sum {
        return None;
    }
    let (kind, body) = payload.split_first()?;
    let number = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
    let range = |at: usize| Some(number(at)?..number(at + 8)?);
    let record = match kind {
        1 => Record::Intent(serde_json::from_slice(body).ok()?),
        2 => Record::Base(serde_json::from_slice(body).ok()?),
        3 => Record::Inline(number(0)?, body.get(8..)?.to_vec()),
        4 => Record::InlineSize(number(0)?),
        5 => Record::Sparse((0..body.len() / 16).map(|index| range(16 * index)).collect::<Option<_>>()?),
        6 => Record::Dirty(range(0)?),
        7 => Record::Keep(number(0)?),
        8 => Record::Restart,
        9 => {
            let (key, upload) = serde_json::from_slice(body).ok()?;
            Record::Upload(key, upload)
        }
        _ => return None,
    };
    Some((record, 8 + length))
}

/// A file's bytes from its log.
pub(super) fn replay(records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        match record {
            Record::Inline(offset, data) => {
                let end = *offset as usize + data.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*offset as usize..end].copy_from_slice(data);
            }
            Record::InlineSize(size) => bytes.resize(*size as usize, 0),
            Record::Restart => bytes.clear(),
            _ => {}
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objectfs::store::{Etag, Metadata};

    #[test]
    fn a_log_that_is_cut_anywhere_gives_the_records_before_the_cut() {
        let intent = Intent { key: "a/b".to_owned(), metadata: Metadata::default(), exclusive: true };
        let version = Version { key: "a/b".to_owned(), etag: Etag("\"1\"".to_owned()), size: 7 };
        let records = vec![
            Record::Base(Base { version: Some(version), keep: 5 }),
            Record::Intent(intent),
            Record::Inline(9, b"some bytes of a file".to_vec()),
            Record::InlineSize(3),
            Record::Sparse(vec![1..4, 6..9]),
            Record::Dirty(77..1 << 40),
            Record::Keep(4),
            Record::Restart,
            Record::Upload("x".to_owned(), UploadId("y".to_owned())),
        ];
        let mut log = MAGIC.to_vec();
        let mut ends = vec![log.len()];
        for record in &records {
            encode(record, &mut log);
            ends.push(log.len());
        }
        for cut in 0..=log.len() {
            let Some((found, end)) = decode(&log[..cut]) else {
                assert!(cut < MAGIC.len());
                continue;
            };
            let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
            assert_eq!(found, records[..whole]);
            assert_eq!(end as usize, ends[whole]);
        }
        for at in MAGIC.len()..log.len() {
            let mut torn = log.clone();
            torn[at] ^= 0x20;
            let (found, _) = decode(&torn).unwrap();
            let whole = ends.iter().filter(|end| **end <= at).count() - 1;
            assert_eq!(found, records[..whole], "byte {at}");
        }
    }
}
