//! What is on a disk, and who uses it: all that speaks against writing to it.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;
use serde::Deserialize;

use super::{Disk, Machine, open};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::host::{command, mounts};

/// So much of a disk's beginning and end has to be zeros: every signature that is known lies there.
const EDGE: u64 = 1 << 20;
/// At once.
const PIECE: u64 = 64 << 10;

/// Why a disk is not blank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It takes no writes.
    ReadOnly,
    /// These.
    Partitions(Vec<String>),
    /// It, or a partition of it, is a part of these block devices: device mapper, RAID, loop devices.
    Holders(Vec<String>),
    /// Its file system is mounted there.
    Mounted(PathBuf),
    /// The kernel swaps to it.
    Swap,
    /// Somebody uses it exclusively.
    InUse,
    /// A signature that libblkid knows.
    Signature {
        /// `ext4`, `LVM2_member`, `gpt`…
        name: String,
        /// In bytes, from the beginning.
        offset: u64,
    },
    /// A byte that is not zero, in the first or last MiB, at this offset.
    Byte(u64),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReadOnly => f.write_str("it is read-only"),
            Self::Partitions(names) => write!(f, "partitions {}", names.join(", ")),
            Self::Holders(names) => write!(f, "a part of {}", names.join(", ")),
            Self::Mounted(place) => write!(f, "mounted at {}", place.display()),
            Self::Swap => f.write_str("used as swap"),
            Self::InUse => f.write_str("used exclusively by somebody"),
            Self::Signature { name, offset } => write!(f, "signature {name} at byte {offset}"),
            Self::Byte(offset) => write!(f, "data at byte {offset}"),
        }
    }
}

impl Machine {
    /// Everything that speaks against writing to this disk; empty means that it is positively blank: nobody uses it, it
    /// has neither partitions nor a signature, and its first and last MiB are zeros.
    ///
    /// # Errors
    /// When a part of that could not be found out, or not within `deadline`.
    pub fn what_is_on(&self, disk: &Disk, deadline: Duration) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        if disk.read_only {
            found.push(Found::ReadOnly);
        }
        let sys = self.root.join("sys/block").join(&disk.name);
        let entries = |folder: &Path| -> Result<Vec<PathBuf>> {
            let what = || format!("cannot list {}", folder.display());
            let paths = std::fs::read_dir(folder).context(what)?.map(|entry| entry.map(|entry| entry.path()));
            paths.collect::<std::io::Result<Vec<_>>>().context(what)
        };
        let partitions: Vec<_> = entries(&sys)?.into_iter().filter(|path| path.join("partition").exists()).collect();
        let mut holders = Vec::new();
        for device in partitions.iter().chain([&sys]) {
            holders.extend(names(&entries(&device.join("holders"))?));
        }
        let partitions = names(&partitions);
        let ours: Vec<_> = partitions.iter().cloned().chain([disk.name.clone()]).collect();
        for device in entries(&self.root.join("sys/block"))? {
            // Nothing else tells of these: the disk has no holder, and may be opened exclusively.
            let shows = std::fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default();
            let shown = Path::new(shows.trim_end_matches('\n'));
            if shown.parent() == Some(Path::new("/dev")) && ours.iter().any(|our| shown.ends_with(our)) {
                holders.extend(names(&[device]));
            }
        }
        found.extend(self.uses(&ours)?);
        if !partitions.is_empty() {
            found.push(Found::Partitions(partitions));
        }
        if !holders.is_empty() {
            found.push(Found::Holders(holders));
        }
        // All of that was asked by name, and a name may be another disk's by now.
        if self.by_number(disk.number).is_none_or(|now| (now.sequence, now.size) != (disk.sequence, disk.size)) {
            fail!(Busy, "{} has changed while it was looked at: look again", disk.name);
        }
        let this = disk.clone();
        found.extend(self.patience.ask(disk.number, &disk.name, deadline, move || contents(&this, deadline))?);
        Ok(found)
    }

    /// Mounts and swap on devices with these names, as far as this process can see: an exclusive open sees the rest.
    fn uses(&self, names: &[String]) -> Result<Vec<Found>> {
        let read = |file: &str| {
            let path = self.root.join(file);
            std::fs::read_to_string(&path).context(|| format!("cannot read {}", path.display()))
        };
        let is_ours = |device: &str| {
            let device = mounts::unescaped(device.as_ref());
            device.file_name().and_then(|name| name.to_str()).is_some_and(|name| names.iter().any(|our| our == name))
        };
        let mut found = Vec::new();
        for line in read("proc/self/mounts")?.lines() {
            let mut fields = line.split(' ');
            if let (Some(device), Some(place)) = (fields.next(), fields.next())
                && device.starts_with("/dev/")
                && is_ours(device)
            {
                found.push(Found::Mounted(mounts::unescaped(place.as_ref())));
            }
        }
        if read("proc/swaps")?.lines().filter_map(|line| line.split([' ', '\t']).next()).any(is_ours) {
            found.push(Found::Swap);
        }
        Ok(found)
    }
}

/// What the disk itself says.
fn contents(disk: &Disk, deadline: Duration) -> Result<Vec<Found>> {
    let what = || format!("cannot read from {}", disk.path.display());
    let mut found = Vec::new();
    // Kept open to the end: nobody else gets it meanwhile.
    let file = match open(disk, OFlags::RDONLY | OFlags::EXCL) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            found.push(Found::InUse);
            open(disk, OFlags::RDONLY).context(what)?
        }
        Err(error) => return Err(error).context(|| format!("cannot open {}", disk.path.display())),
    };
    found.extend(signatures(&disk.path, deadline)?);
    let end = disk.size.saturating_sub(EDGE).max(EDGE.min(disk.size));
    for range in [0..EDGE.min(disk.size), end..disk.size] {
        if let Some(offset) = first_byte(&file, range).context(what)? {
            found.push(Found::Byte(offset));
        }
    }
    Ok(found)
}

/// What libblkid finds. It does not tell what it could not read from what is not there, so this alone says nothing.
fn signatures(device: &Path, deadline: Duration) -> Result<Vec<Found>> {
    #[derive(Deserialize)]
    struct Answer {
        signatures: Vec<Signature>,
    }
    #[derive(Deserialize)]
    struct Signature {
        offset: String,
        r#type: String,
    }
    let columns = ["--no-act", "--json", "--output", "OFFSET,TYPE"];
    let arguments: Vec<_> = columns.iter().map(AsRef::as_ref).chain([device.as_os_str()]).collect();
    let told = command::ask("wipefs", &arguments, &[], deadline)?.succeeded()?;
    let what = |cause: String| {
        Error::new(ErrorKind::Internal, format!("cannot understand wipefs about {}: {cause}", device.display()))
    };
    // It passes over what it can't read, but says so.
    if !told.errors.trim().is_empty() {
        return Err(told.failure(ErrorKind::Internal));
    }
    let said = told.output.trim();
    // Older ones say nothing where there is nothing.
    if said.is_empty() {
        return Ok(Vec::new());
    }
    let answer: Answer = serde_json::from_str(said).map_err(|error| what(format!("{error} in {said:?}")))?;
    let signature = |one: Signature| {
        let offset = one.offset.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let offset = offset.ok_or_else(|| what(format!("no offset in {said:?}")))?;
        Ok(Found::Signature { name: one.r#type, offset })
    };
    answer.signatures.into_iter().map(signature).collect()
}

/// Where the first byte is that is not zero.
fn first_byte(file: &File, range: std::ops::Range<u64>) -> std::io::Result<Option<u64>> {
    let mut piece = [0; PIECE as usize];
    let mut at = range.start;
    while at < range.end {
        let length = PIECE.min(range.end - at);
        let piece = &mut piece[..length as usize];
        file.read_exact_at(piece, at)?;
        if let Some(offset) = piece.iter().position(|byte| *byte != 0) {
            return Ok(Some(at + offset as u64));
        }
        at += length;
    }
    Ok(None)
}

/// Their last parts, in order.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let mut names: Vec<_> =
        paths.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::super::tests::Fake;
    use super::*;

    #[test]
    fn a_disk_in_use_is_seen_in_sysfs_mounts_and_swaps() {
        let fake = Fake::new();
        fake.disk(
            "nvme0n1",
            "259:0",
            &[("device/x", ""), ("nvme0n1p2/partition", "2"), ("nvme0n1p2/holders/dm-0/x", "")],
        );
        let machine = fake.machine();
        let names = ["nvme0n1".to_owned(), "nvme0n1p2".to_owned()];
        assert_eq!(machine.uses(&names).unwrap(), []);
        fake.write(
            "proc/self/mounts",
            "/dev/nvme0n1p2 /a\\040b ext4 rw 0 0\n/dev/nvme0n12 /c ext4 rw 0 0\nnvme0n1 /d tmpfs rw 0 0\n",
        );
        fake.write("proc/swaps", "Filename Type Size\n/dev/nvme0n1                            partition 1024\n");
        assert_eq!(machine.uses(&names).unwrap(), [Found::Mounted("/a b".into()), Found::Swap]);
        // What can't be looked at is an error: the disk's file is missing here.
        let disk = &machine.disks().unwrap()[0];
        assert!(machine.what_is_on(disk, Duration::from_secs(10)).is_err());
        std::fs::remove_file(fake.0.path().join("proc/swaps")).unwrap();
        assert!(machine.uses(&names).is_err());
    }

    #[test]
    fn the_first_byte_is_found_wherever_it_is() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(3 * EDGE).unwrap();
        assert_eq!(first_byte(&file, 0..EDGE).unwrap(), None);
        for at in [PIECE - 1, PIECE, EDGE - 1] {
            std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(at)).unwrap();
            std::io::Write::write_all(&mut file, &[1]).unwrap();
            assert_eq!(first_byte(&file, 0..EDGE).unwrap(), Some(at));
            assert_eq!(first_byte(&file, at + 1..3 * EDGE).unwrap(), None);
            file.set_len(0).unwrap();
            file.set_len(3 * EDGE).unwrap();
        }
        assert!(first_byte(&file, 0..4 * EDGE).is_err());
    }
}
