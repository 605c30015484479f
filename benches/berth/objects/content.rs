//! The bytes of the large files: each block of 4 KiB begins with its number and the file's seed, so that whoever reads
//! can tell whether it got the right ones. What is between the stamps is random, so that nobody can send less of it.

use anyhow::{Result, ensure};

/// Bytes between two stamps.
pub(crate) const BLOCK: u64 = 4096;

/// Random bytes, to be stamped.
pub(crate) fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(5).fill(&mut bytes);
    bytes
}

/// Stamps a buffer of random bytes as the content at this offset, a multiple of a block.
pub(crate) fn fill(buffer: &mut [u8], offset: u64, seed: u64) {
    for (block, number) in buffer.chunks_mut(4096).zip(offset / BLOCK..) {
        stamp(block, number, seed);
    }
}

/// Is this the content at this offset, a multiple of a block?
///
/// # Errors
/// If not.
pub(crate) fn check(buffer: &[u8], offset: u64, seed: u64) -> Result<()> {
    let mut wanted = [0; 16];
    for (block, number) in buffer.chunks(4096).zip(offset / BLOCK..) {
        stamp(&mut wanted, number, seed);
        ensure!(block.starts_with(&wanted), "block {number} holds other bytes than were written");
    }
    Ok(())
}

fn stamp(block: &mut [u8], number: u64, seed: u64) {
    block[..8].copy_from_slice(&number.to_le_bytes());
    block[8..16].copy_from_slice(&seed.to_le_bytes());
}
