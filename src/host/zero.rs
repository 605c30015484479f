//! Zeros over a block device, so that its next user reads nothing of its last one.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::Errno;

use crate::error::{Context, Error, ErrorKind, Result};

/// Where the device can't do it, zeros are written in pieces of so many bytes.
const PIECE: usize = 1 << 20;

/// Makes this range of bytes zero, in chunks of `chunk` bytes. After each, which is then on the disk, the callback is told
/// where the next one begins, and may stop the work: whoever goes on later begins there.
///
/// The device is opened exclusively: what somebody has mounted, or a device lies on, is not touched. It is a matter of the
/// device whether the zeros take space.
///
/// # Errors
/// `Busy` when the device is in use, `Invalid` when the range is not one of whole sectors in it.
pub fn write(
    device: &Path,
    range: Range<u64>,
    chunk: u64,
    mut done: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    let what = || format!("cannot write zeros over {}", device.display());
    let opened = File::options().write(true).custom_flags(libc::O_EXCL).open(device);
    let file = match opened {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(Error::caused(ErrorKind::Busy, what(), error));
        }
        opened => opened.context(what)?,
    };
    let mut at = range.start;
    while at < range.end {
        let next = range.end.min(at.saturating_add(chunk.max(1)));
        match zero_out(&file, at, next - at) {
            Ok(()) => {}
            // Nothing that such a device lacks, but a file.
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => write_zeros(&file, at..next).context(what)?,
            Err(Errno::INVAL) => fail!(Invalid, "{}: bytes {at} to {next} are not whole sectors of it", what()),
            Err(error) => return Err(error).context(what),
        }
        // What the device has in a cache of its own, too.
        file.sync_all().context(what)?;
        at = next;
        if done(at).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// The kernel lets the device do it, or writes itself; what is in the page cache goes with it.
fn zero_out(file: &File, start: u64, length: u64) -> rustix::io::Result<()> {
    /// `linux/fs.h`.
    const BLKZEROOUT: libc::Ioctl = 0x127F;
    let range = [start, length];
    #[expect(unsafe_code, reason = "no crate wraps this")]
    // SAFETY: the request reads two numbers of 64 bits, which live through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKZEROOUT, std::ptr::from_ref(&range)) };
    if result < 0 {
        return Err(Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)));
    }
    Ok(())
}

fn write_zeros(file: &File, range: Range<u64>) -> std::io::Result<()> {
    let zeros = vec![0; PIECE];
    let mut at = range.start;
    while at < range.end {
        let length = (range.end - at).min(PIECE as u64);
        file.write_all_at(&zeros[..usize::try_from(length).unwrap_or(PIECE)], at)?;
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_range_becomes_zero_and_it_can_be_stopped_and_gone_on_with() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; 5 << 20]).unwrap();
        let mut seen = Vec::new();
        let stopped = write(file.path(), 512..(4 << 20) + 512, 3 << 20, |next| {
            seen.push(next);
            ControlFlow::Break(())
        });
        assert_eq!(stopped.unwrap(), ControlFlow::Break(()));
        assert_eq!(seen, [(3 << 20) + 512]);
        let rest = write(file.path(), seen[0]..(4 << 20) + 512, 3 << 20, |next| {
            seen.push(next);
            ControlFlow::Continue(())
        });
        assert_eq!(rest.unwrap(), ControlFlow::Continue(()));
        assert_eq!(seen[1..], [(4 << 20) + 512]);
        let bytes = std::fs::read(file.path()).unwrap();
        let zeros: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at] == 0).collect();
        assert_eq!((zeros[0], zeros[zeros.len() - 1], zeros.len()), (512, (4 << 20) + 511, 4 << 20));
        assert_eq!(bytes.len(), 5 << 20);
        assert!(write(Path::new("/no/such/device"), 0..1, 1, |_| ControlFlow::Continue(())).is_err());
    }
}
