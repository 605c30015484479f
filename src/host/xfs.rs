//! XFS on whole disks: its superblock, made with a UUID of the caller's, mounted with project quotas, failing fast.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use super::command;
use super::filesystem::{self, Attribute, MountOptions};
use crate::error::{Context, Result};

/// A file system's UUID, in the order in which it is printed and lies on the disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// As `Display` has it. `None`: this is no UUID.
    pub fn parse(text: &str) -> Option<Self> {
        let dashes = [8, 13, 18, 23];
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let fits = |at: usize, c: char| if dashes.contains(&at) { c == '-' } else { c.is_ascii_hexdigit() };
        if text.len() != 36 || !text.char_indices().all(|(at, c)| fits(at, c)) {
            return None;
        }
        let mut bytes = [0; 16];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the first sector of a device with XFS says (`struct xfs_dsb`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its label, at most 12 bytes.
    pub label: String,
    /// mkfs has not come to its end: it writes a superblock that says so before anything else, and one that does not at
    /// last.
    pub in_progress: bool,
}

impl Superblock {
    /// Of the device's first bytes. `None`: there is no XFS.
    pub fn parse(sector: &[u8]) -> Option<Self> {
        if sector.len() < 512 || &sector[..4] != b"XFSB" {
            return None;
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&sector[32..48]);
        let label = sector[108..120].split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Self {
            uuid: Uuid(uuid),
            label: String::from_utf8_lossy(label).into_owned(),
            in_progress: sector[126] != 0,
        })
    }
}

/// Makes an XFS that fills the device. With `again` what an interrupted mkfs left is written over; else mkfs itself looks
/// once more whether anything is there, and refuses.
///
/// # Errors
/// As for [`command::run`].
pub fn make(device: &Path, uuid: Uuid, label: &str, again: bool, deadline: Duration) -> Result<()> {
    let features = format!("crc=1,reflink=1,uuid={uuid}");
    let label: String = label.chars().take(12).collect();
    // No discard: on a large disk it takes minutes, and the device is blank.
    let mut arguments = vec!["-q", "-K", "-m", &features, "-L", &label];
    if again {
        arguments.push("-f");
    }
    let arguments: Vec<_> = arguments.into_iter().map(AsRef::as_ref).chain([device.as_os_str()]).collect();
    command::run("mkfs.xfs", &arguments, deadline)
}

/// Mounts the device on the directory that `target` is open on, with project quotas where the kernel has them. Are they
/// there?
///
/// # Errors
/// As for [`filesystem::mount`].
pub fn mount(device: &Path, target: &OwnedFd) -> Result<bool> {
    let mut options = MountOptions {
        read_only: false,
        attributes: vec![Attribute::NoAtime],
        parameters: vec![("prjquota".to_owned(), None)],
    };
    match filesystem::mount(device, "xfs", &options, target) {
        // A kernel without CONFIG_XFS_QUOTA knows the option, and refuses it.
        Err(error) if error.os_error() == Some(libc::EINVAL) => {
            options.parameters.clear();
            filesystem::mount(device, "xfs", &options, target).map(|()| false)
        }
        mounted => mounted.map(|()| true),
    }
}

/// Has the file system stop at once when its metadata can't be written, instead of trying for ever. `device` is the
/// kernel's name of what it lies on.
///
/// # Errors
/// Where sysfs can't be written: then it goes on as the kernel does by itself.
pub fn fail_fast(device: &str) -> Result<()> {
    let folder = Path::new("/sys/fs/xfs").join(device).join("error");
    let write = |file: &str, value: &str| {
        let path = folder.join(file);
        std::fs::write(&path, value).context(|| format!("cannot write {}", path.display()))
    };
    write("fail_at_unmount", "1")?;
    for error in ["default", "EIO", "ENOSPC", "ENODEV"] {
        write(&format!("metadata/{error}/max_retries"), "0")?;
        write(&format!("metadata/{error}/retry_timeout_seconds"), "0")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_uuid_is_read_as_it_is_printed() {
        let text = "01234567-89ab-8cde-8f01-23456789abcd";
        let uuid = Uuid::parse(text).unwrap();
        assert_eq!(uuid.0[..4], [0x01, 0x23, 0x45, 0x67]);
        assert_eq!(uuid.to_string(), text);
        for bad in ["", "0123456789ab8cde8f0123456789abcd", "01234567-89ab-8cde-8f01-23456789abcg", &text[1..]] {
            assert!(Uuid::parse(bad).is_none(), "{bad}");
        }
        assert!(Uuid::parse("01234567-89ab-8cde-8f01-23456789ab+d").is_none());
        assert!(Uuid::parse("0123456-789ab-8cde-8f01-23456789abcd").is_none());
        assert!(Uuid::parse("é1234567-89ab-8cde-8f01-23456789abc").is_none());
    }

    #[test]
    fn a_superblock_says_whose_it_is_and_whether_it_was_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::create_new(&path).unwrap();
        let read = || {
            let mut sector = [0; 512];
            File::open(&path).unwrap().read_exact_at(&mut sector, 0).unwrap();
            Superblock::parse(&sector)
        };
        assert_eq!(Superblock::parse(b"XFSB"), None);
        file.set_len(512 << 20).unwrap();
        assert_eq!(read(), None);
        let uuid = Uuid::parse("01234567-89ab-8cde-8f01-23456789abcd").unwrap();
        make(&path, uuid, "a-long-name-of-a-pool", false, Duration::from_secs(60)).unwrap();
        let made = Superblock { uuid, label: "a-long-name-".to_owned(), in_progress: false };
        assert_eq!(read(), Some(made.clone()));
        assert!(make(&path, uuid, "again", false, Duration::from_secs(60)).is_err());
        assert_eq!(read(), Some(made.clone()));
        file.write_all_at(&[1], 126).unwrap();
        assert_eq!(read(), Some(Superblock { in_progress: true, ..made }));
        make(&path, uuid, "again", true, Duration::from_secs(60)).unwrap();
        assert_eq!(read().unwrap().label, "again");
    }
}
