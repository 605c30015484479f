//! How a pool's disks are known: file systems by their UUIDs, of which the first half is a hash of the pool's name, and
//! disks that are being made a volume group by what their first sector says.
//!
//! A label would be too short, and anybody may have given the same. A UUID of another pool has the same 60 bits once in
//! 10^18, and nobody gives one by accident. LVM leaves the first sector as it is, and whoever else takes the disk writes
//! over it or has a signature.

use std::io::Read;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{Context, Result};
use crate::host::disks::{self, BLOCK, Disk, Machine};
use crate::host::xfs::Uuid;

const SECTOR: usize = 512;

/// The first half of the UUIDs of a pool's file systems: SHA-256, marked as version 8, which RFC 9562 leaves to whoever
/// makes them.
fn first_half(pool: &str) -> [u8; 8] {
    let digest = Sha256::digest(format!("berth pool {pool}").as_bytes());
    let mut half = [0; 8];
    half.copy_from_slice(&digest[..8]);
    half[6] = (half[6] & 0x0F) | 0x80;
    half
}

/// A UUID that no other file system has, of this pool.
pub(super) fn fresh_uuid(pool: &str) -> Result<Uuid> {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first_half(pool));
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes[8..]))
        .context(|| "cannot read /dev/urandom".to_owned())?;
    bytes[8] = (bytes[8] & 0x3F) | 0x80;
    Ok(Uuid(bytes))
}

/// Is this the UUID of one of the pool's file systems?
pub(super) fn is_of(pool: &str, uuid: Uuid) -> bool {
    uuid.0[..8] == first_half(pool) && uuid.0[8] & 0xC0 == 0x80
}

/// The first block of a disk that is being made a part of the pool's volume group.
fn making(pool: &str) -> [u8; BLOCK] {
    let text = format!("Berth is making pool {pool} here: nothing of it is used yet.\n");
    let mut block = [0; BLOCK];
    block[..text.len()].copy_from_slice(text.as_bytes());
    block
}

/// Does the first block say that the disk is being made a part of the pool's volume group?
pub(super) fn is_making(pool: &str, block: &[u8; BLOCK]) -> bool {
    block[..SECTOR] == making(pool)[..SECTOR]
}

/// Says so on a disk that nobody uses. What LVM had written into its first block is gone.
///
/// # Errors
/// `Busy` when somebody uses it.
pub(super) fn write(pool: &str, disk: &Disk) -> Result<()> {
    disks::write_beginning(disk, &making(pool), true)
}

/// Takes it away again, if it is there.
pub(super) fn erase(pool: &str, disk: &Disk, machine: &Machine, deadline: Duration) -> Result<()> {
    match is_making(pool, &machine.first_block(disk, deadline)?) {
        true => disks::write_beginning(disk, &[0; SECTOR], false),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_tells_its_pool_for_ever() {
        let uuid = fresh_uuid("fast").unwrap();
        assert!(is_of("fast", uuid) && !is_of("slow", uuid));
        assert_ne!(uuid, fresh_uuid("fast").unwrap());
        let text = uuid.to_string();
        // Disks that exist have this: it can't be changed.
        assert_eq!(&text[..18], "818d6197-98aa-88fd");
        assert!(matches!(&text[19..20], "8" | "9" | "a" | "b"), "{text}");
        let mut other = uuid;
        other.0[8] ^= 0x40;
        assert!(!is_of("fast", other));
    }

    #[test]
    fn a_mark_names_its_pool_and_needs_only_the_first_sector() {
        let longest = "x".repeat(63);
        let mut block = making(&longest);
        block[SECTOR] = 1;
        assert!(is_making(&longest, &block) && !is_making("x", &block));
        block[SECTOR - 1] = 1;
        assert!(!is_making(&longest, &block));
        assert!(!is_making("fast", &[0; BLOCK]));
    }
}
