//! How a pool's file systems are known: by their UUIDs, of which the first half is a hash of the pool's name.
//!
//! A label would be too short, and anybody may have given the same. A UUID of another pool has the same 60 bits once in
//! 10^18, and nobody gives one by accident.

use std::io::Read;

use sha2::{Digest, Sha256};

use crate::error::{Context, Result};
use crate::host::xfs::Uuid;

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
}
