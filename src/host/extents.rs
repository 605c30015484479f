//! Which blocks of a disk several files share (reflink). See `Documentation/filesystems/fiemap.rst` of Linux.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Bytes on the disk: where they begin, and how many.
pub type Extent = (u64, u64);

/// The parts of a file that it shares with other files.
pub fn shared(file: &File) -> std::io::Result<Vec<Extent>> {
    let mut found = Vec::new();
    let mut start = 0;
    loop {
        let mut map = abi::Map::from(start);
        #[expect(unsafe_code, reason = "no crate wraps this")]
        // SAFETY: `Map` has the kernel's layout, with room for as many extents as its header says.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), abi::FS_IOC_FIEMAP, std::ptr::from_mut(&mut map)) };
        if result < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let extents = &map.extents[..(map.mapped as usize).min(abi::ROOM)];
        found.extend(
            extents
                .iter()
                .filter(|extent| extent.flags & abi::SHARED != 0)
                .map(|extent| (extent.physical, extent.length)),
        );
        match extents.last() {
            Some(last) if last.flags & abi::LAST == 0 => start = last.logical + last.length,
            _ => return Ok(found),
        }
    }
}

/// How many more bytes the files would take if none shared a block with another: all that they share, less what it
/// takes once.
pub fn saved(mut shared: Vec<Extent>) -> u64 {
    shared.sort_unstable();
    let mut all = 0;
    let mut once = 0;
    let mut end = 0;
    for (start, length) in shared {
        all += length;
        once += (start + length).saturating_sub(end.max(start));
        end = end.max(start + length);
    }
    all - once
}

/// Numbers and layouts of `linux/fiemap.h`.
mod abi {
    pub(super) const FS_IOC_FIEMAP: libc::Ioctl = 0xC020_660B_u32 as libc::Ioctl;
    pub(super) const LAST: u32 = 1;
    pub(super) const SHARED: u32 = 0x2000;
    pub(super) const ROOM: usize = 256;

    /// `struct fiemap_extent`.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    pub(super) struct Entry {
        pub(super) logical: u64,
        pub(super) physical: u64,
        pub(super) length: u64,
        reserved: [u64; 2],
        pub(super) flags: u32,
        reserved_too: [u32; 3],
    }

    /// `struct fiemap`.
    #[repr(C)]
    pub(super) struct Map {
        start: u64,
        length: u64,
        flags: u32,
        pub(super) mapped: u32,
        count: u32,
        reserved: u32,
        pub(super) extents: [Entry; ROOM],
    }

    const _: () = assert!(size_of::<Entry>() == 56 && size_of::<Map>() == 32 + 56 * ROOM);

    impl Map {
        pub(super) fn from(start: u64) -> Self {
            let count = ROOM as u32;
            Self {
                start,
                length: u64::MAX - start,
                flags: 0,
                mapped: 0,
                count,
                reserved: 0,
                extents: [Entry::default(); ROOM],
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_by_k_files_saves_it_k_minus_one_times() {
        assert_eq!(saved(vec![]), 0);
        assert_eq!(saved(vec![(0, 10)]), 0);
        assert_eq!(saved(vec![(0, 10), (0, 10), (0, 10)]), 20);
        assert_eq!(saved(vec![(0, 10), (4, 10), (20, 5), (20, 5)]), 6 + 5);
        assert_eq!(saved(vec![(0, 30), (10, 5), (16, 5)]), 10);
    }
}
