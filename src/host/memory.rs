//! Memory straight from the kernel: page-aligned, not there before it is touched, and given back at once when dropped.
//! The heap would keep it.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use procfs::process::{MMPermissions, MMapPath, Process};

use crate::error::{Error, Result};

/// Bytes a page.
pub fn page_size() -> usize {
    #[expect(unsafe_code, reason = "no crate in use wraps sysconf")]
    // SAFETY: sysconf takes a number and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// Sets the C library's heap to give large blocks back when they are freed: by itself it learns from the first of them to keep
/// the next, and has a heap for each of many threads. For the beginning of a process.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_MMAP_THRESHOLD, 128 << 10), (libc::M_ARENA_MAX, 2)] {
        #[expect(unsafe_code, reason = "no crate in use wraps mallopt")]
        // SAFETY: it takes two integers, and a process that begins has one thread.
        let _ = unsafe { libc::mallopt(option, value) };
    }
}

/// Unmaps this program's code. What runs comes back from the page cache; what only the beginning needed does not count as
/// this process's memory any more, and the kernel can do without it.
pub fn forget_code() {
    advise_code(libc::MADV_DONTNEED);
}

fn advise_code(advice: libc::c_int) {
    let Ok(program) = std::fs::read_link("/proc/self/exe") else { return };
    let Ok(maps) = Process::myself().and_then(|myself| myself.maps()) else { return };
    for map in maps {
        let is_code = map.perms.contains(MMPermissions::EXECUTE) && !map.perms.contains(MMPermissions::WRITE);
        let (start, end) = map.address;
        let Ok(length) = usize::try_from(end - start) else { continue };
        if is_code && map.pathname == MMapPath::Path(program.clone()) {
            #[expect(unsafe_code, reason = "no crate in use wraps madvise")]
            // SAFETY: code is mapped from the program's file and never written, so each page comes back as it was.
            let _ = unsafe { libc::madvise(start as *mut libc::c_void, length, advice) };
        }
    }
}

/// A private mapping, zeroed.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    length: usize,
}

#[expect(unsafe_code, reason = "the mapping is owned like a box of bytes")]
// SAFETY: the memory belongs to this value alone, no thread has a special part in it.
unsafe impl Send for Pages {}
#[expect(unsafe_code, reason = "the mapping is owned like a box of bytes")]
// SAFETY: a shared reference only reads.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps at least this many bytes.
    ///
    /// # Errors
    /// When the kernel gives no more address space.
    pub fn new(length: usize) -> Result<Self> {
        let length = length.max(1).next_multiple_of(page_size());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        #[expect(unsafe_code, reason = "no crate in use wraps mmap")]
        // SAFETY: a new private mapping at a place of the kernel's choice; nothing of ours is replaced.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        let start = if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast::<u8>()) };
        let Some(start) = start else {
            return Err(Error::io(format!("cannot map {length} bytes of memory"), std::io::Error::last_os_error()));
        };
        #[expect(unsafe_code, reason = "no crate in use wraps madvise")]
        // SAFETY: the range is the mapping just made. Huge pages would make a touched byte cost 2 MiB.
        let _ = unsafe { libc::madvise(start.as_ptr().cast(), length, libc::MADV_NOHUGEPAGE) };
        Ok(Self { start, length })
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        #[expect(unsafe_code, reason = "the mapping as a slice")]
        // SAFETY: mapped, readable, initialised by the kernel, and alive as long as `self`.
        unsafe {
            std::slice::from_raw_parts(self.start.as_ptr(), self.length)
        }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        #[expect(unsafe_code, reason = "the mapping as a slice")]
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length)
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "no crate in use wraps munmap")]
        // SAFETY: the whole mapping, made by `new`, and nothing borrows from it any more.
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_on_without_its_pages() {
        let mapped = || Process::myself().unwrap().status().unwrap().rssfile.unwrap();
        // Other tests run meanwhile, and bring back what they need.
        let shrinks = || {
            advise_code(libc::MADV_POPULATE_READ);
            let before = mapped();
            forget_code();
            mapped() < before / 4 * 3
        };
        assert!((0..50).any(|_| shrinks()));
    }

    #[test]
    fn pages_are_aligned_zeroed_and_writable() {
        let mut pages = Pages::new(10_000).unwrap();
        assert_eq!(pages.len() % page_size(), 0);
        assert_eq!(pages.as_ptr().addr() % page_size(), 0);
        assert!(pages.iter().all(|byte| *byte == 0));
        pages[9_999] = 7;
        assert_eq!(pages[9_999], 7);
    }
}
