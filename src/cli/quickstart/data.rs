//! Data that is easy to make and hard to get right by accident, written and read back with its SHA-256.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::fs::Advice;
use sha2::{Digest, Sha256};

/// So much is written, in bytes.
pub(super) const SIZE: u64 = 256 << 20;
const CHUNK: usize = 4 << 20;

/// One time through the file.
pub(super) struct Pass {
    pub(super) checksum: String,
    pub(super) speed: Speed,
}

/// In bytes and seconds.
pub(super) struct Speed {
    bytes: u64,
    seconds: f64,
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} MB/s", self.bytes as f64 / 1e6 / self.seconds.max(1e-9))
    }
}

/// Writes pseudo-random data and waits until the disk has it. Making and hashing it goes on beside the writing.
pub(super) fn write(path: &Path, seed: u64, stop: &AtomicBool) -> Result<Pass> {
    let what = || format!("cannot write {}", path.display());
    let mut file = File::create(path).with_context(what)?;
    let (sender, receiver) = sync_channel::<Vec<u8>>(2);
    std::thread::scope(|scope| {
        let maker = scope.spawn(move || {
            let (mut hasher, mut state) = (Sha256::new(), seed);
            for _ in 0..SIZE / CHUNK as u64 {
                let chunk = random(&mut state);
                hasher.update(&chunk);
                if sender.send(chunk).is_err() {
                    break;
                }
            }
            hex(hasher)
        });
        let begun = Instant::now();
        let mut bytes = 0;
        // Moved in, so that the maker ends when this does.
        for chunk in receiver {
            check(stop)?;
            file.write_all(&chunk).with_context(what)?;
            bytes += chunk.len() as u64;
        }
        file.sync_all().with_context(what)?;
        let speed = Speed { bytes, seconds: begun.elapsed().as_secs_f64() };
        let checksum = maker.join().map_err(|_| anyhow::anyhow!("cannot hash what was written"))?;
        Ok(Pass { checksum, speed })
    })
}

/// Reads a file from its disk, not from memory. Hashing it goes on beside the reading.
pub(super) fn read(path: &Path, stop: &AtomicBool) -> Result<Pass> {
    let what = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(what)?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).with_context(what)?;
    let (sender, receiver) = sync_channel::<Vec<u8>>(2);
    std::thread::scope(|scope| {
        let hasher = scope.spawn(move || hash(receiver));
        let begun = Instant::now();
        let mut bytes = 0;
        loop {
            check(stop)?;
            let mut chunk = Vec::with_capacity(CHUNK);
            (&file).take(CHUNK as u64).read_to_end(&mut chunk).with_context(what)?;
            if chunk.is_empty() {
                break;
            }
            bytes += chunk.len() as u64;
            sender.send(chunk).context("cannot hash what was read")?;
        }
        let speed = Speed { bytes, seconds: begun.elapsed().as_secs_f64() };
        drop(sender);
        let checksum = hasher.join().map_err(|_| anyhow::anyhow!("cannot hash what was read"))?;
        Ok(Pass { checksum, speed })
    })
}

fn check(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

fn hash(chunks: Receiver<Vec<u8>>) -> String {
    let mut hasher = Sha256::new();
    for chunk in chunks {
        hasher.update(&chunk);
    }
    hex(hasher)
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SplitMix64 (Steele, Lea and Flood, 2014): no secret, only something that neither compresses nor repeats.
fn random(state: &mut u64) -> Vec<u8> {
    let mut chunk = vec![0; CHUNK];
    for place in chunk.as_chunks_mut::<8>().0 {
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = *state;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        *place = (word ^ (word >> 31)).to_le_bytes();
    }
    chunk
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_changes_the_checksum_and_an_interruption_ends_the_work() {
        let dir = tempfile::tempdir().unwrap();
        let (path, go) = (dir.path().join("data"), AtomicBool::new(false));
        let written = write(&path, 7, &go).unwrap();
        assert_eq!(path.metadata().unwrap().len(), SIZE);
        assert_eq!(read(&path, &go).unwrap().checksum, written.checksum);
        let file = File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"?", SIZE / 2).unwrap();
        assert_ne!(read(&path, &go).unwrap().checksum, written.checksum);
        go.store(true, Ordering::Relaxed);
        assert!(write(&path, 7, &go).is_err() && read(&path, &go).is_err());
    }

    #[test]
    fn random_words_are_those_of_splitmix64() {
        let chunk = random(&mut 0);
        assert_eq!(chunk[..8], 0xE220_A839_7B1D_CDAF_u64.to_le_bytes());
    }
}
