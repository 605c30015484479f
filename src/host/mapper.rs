//! Device mapper's devices, as sysfs shows them: what they are called, and whose they are. Nothing is asked of a program.
//!
//! A device mapper UUID begins with the name of the subsystem that made it (`LVM-`, `CRYPT-LUKS2-`, `CRYPT-PLAIN-`), so
//! what a tenant's data looks like does not count.

use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// A device of device mapper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its name, as in `/dev/mapper`.
    pub name: String,
    /// What its maker gave it; may be empty.
    pub uuid: String,
    /// Its device number, as stat(2) has it.
    pub device: u64,
}

impl Mapped {
    /// What is known of the device with this number. `None`: it is none of device mapper's, or gone.
    ///
    /// # Errors
    /// When sysfs can't be read.
    pub fn of(device: u64) -> Result<Option<Self>> {
        Self::at(&by_number(device), device)
    }

    fn at(sysfs: &Path, device: u64) -> Result<Option<Self>> {
        let read = |name: &str| match std::fs::read_to_string(sysfs.join("dm").join(name)) {
            Ok(text) => Ok(Some(text.trim_end_matches('\n').to_owned())),
            // It goes away just now: the kernel says EINVAL (dm_attr_show) or ENODEV.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => Ok(None),
            Err(error) => Err(error).context(|| format!("cannot read {}", sysfs.join("dm").join(name).display())),
        };
        let (Some(name), Some(uuid)) = (read("name")?, read("uuid")?) else { return Ok(None) };
        Ok(Some(Self { name, uuid, device }))
    }

    /// `/dev/dm-N`, which the kernel itself makes. What is in `/dev/mapper` may be a file, a link that udev made, or left over.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/dm-{}", rustix::fs::minor(self.device)))
    }

    /// Does dm-crypt encrypt it?
    pub fn is_crypt(&self) -> bool {
        self.uuid.starts_with("CRYPT-")
    }

    /// Its volume group and its name there, if it is a logical volume.
    pub fn logical_volume(&self) -> Option<(String, String)> {
        if self.uuid.starts_with("LVM-") { split(&self.name) } else { None }
    }
}

/// The device of this name. Asks sysfs only.
///
/// # Errors
/// When sysfs can't be read.
pub fn find(name: &str) -> Result<Option<Mapped>> {
    Ok(all()?.into_iter().find(|mapped| mapped.name == name))
}

/// Those that stand for disks of this machine: what encrypts a whole one, and one with several paths. What lies on a loop device
/// or a logical volume may be a tenant's. Asks sysfs only.
///
/// # Errors
/// When sysfs can't be read.
pub fn whole_disks() -> Result<Vec<Mapped>> {
    let mut found = Vec::new();
    for mapped in all()? {
        let is_whole = mapped.is_crypt() || mapped.uuid.starts_with("mpath-");
        if is_whole && below_names(mapped.device)?.iter().all(|name| !is_virtual(name)) {
            found.push(mapped);
        }
    }
    Ok(found)
}

fn is_virtual(name: &str) -> bool {
    ["dm-", "loop", "zram", "rbd", "nbd", "drbd"].iter().any(|kind| name.starts_with(kind))
}

/// Is something that this device lies on gone? One that has come back since is another one: the device has to be told.
///
/// # Errors
/// When sysfs can't be read.
pub fn is_stale(device: u64) -> Result<bool> {
    let slaves = by_number(device).join("slaves");
    Ok(below_names(device)?.iter().any(|name| !slaves.join(name).join("dev").exists()))
}

/// What sysfs calls the devices that this one lies on.
fn below_names(device: u64) -> Result<Vec<String>> {
    let slaves = by_number(device).join("slaves");
    let what = || format!("cannot list {}", slaves.display());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&slaves).context(what)? {
        names.push(entry.context(what)?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Every device of device mapper.
fn all() -> Result<Vec<Mapped>> {
    let what = || "cannot list the block devices".to_owned();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block").context(what)? {
        let entry = entry.context(what)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b"dm-") {
            continue;
        }
        let number = std::fs::read_to_string(entry.path().join("dev")).ok().and_then(|text| parse_number(text.trim()));
        found.extend(number.map(|number| Mapped::at(&entry.path(), number)).transpose()?.flatten());
    }
    Ok(found)
}

/// The devices of device mapper that lie directly on the device with this number.
///
/// # Errors
/// When sysfs can't be read.
pub fn above(device: u64) -> Result<Vec<Mapped>> {
    neighbours(device, "holders")
}

fn neighbours(device: u64, side: &str) -> Result<Vec<Mapped>> {
    let holders = by_number(device).join(side);
    let what = || format!("cannot list {}", holders.display());
    let entries = match std::fs::read_dir(&holders) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(what),
    };
    let mut found = Vec::new();
    for entry in entries {
        let sysfs = entry.context(what)?.path();
        let number = std::fs::read_to_string(sysfs.join("dev")).ok().and_then(|text| parse_number(text.trim()));
        if let Some(number) = number {
            found.extend(Mapped::at(&sysfs, number)?);
        }
    }
    Ok(found)
}

/// The device of device mapper that the one with this number lies on. `None`: on several, on none, or on another kind.
///
/// # Errors
/// When sysfs can't be read.
pub fn below(device: u64) -> Result<Option<Mapped>> {
    let mut found = neighbours(device, "slaves")?;
    Ok(found.pop().filter(|_| found.is_empty()))
}

/// Device mapper's name of a logical volume: dashes of either name are doubled, and one stands between them.
pub(super) fn join(group: &str, volume: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"))
}

/// The group and the volume of which that is the name. `None`: of none, such as the hidden parts of a mirror.
fn split(name: &str) -> Option<(String, String)> {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'-', Some(b'-')) => at += 2,
            (b'-', _) => {
                let (group, volume) = (&name[..at], &name[at + 1..]);
                let is_whole = !group.is_empty() && !volume.is_empty() && !volume.replace("--", "").contains('-');
                return is_whole.then(|| (group.replace("--", "-"), volume.replace("--", "-")));
            }
            _ => at += 1,
        }
    }
    None
}

fn by_number(device: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_one_volume() {
        for (group, volume) in [("vg", "lv"), ("berth-main", "vol-1"), ("a--b", "c-"), ("a-", "--"), ("g", "-x")] {
            if group.ends_with('-') || volume.starts_with('-') {
                continue; // LVM has no such names, and they would be ambiguous
            }
            assert_eq!(split(&join(group, volume)), Some((group.to_owned(), volume.to_owned())), "{group}/{volume}");
        }
        assert_eq!(join("berth-main", "vol-1"), "berth--main-vol--1");
        for other in ["vg", "vg-", "-lv", "vg--lv", "vg-lv-real", ""] {
            assert_eq!(split(other), None, "{other}");
        }
    }

    #[test]
    fn what_sysfs_shows_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let mapped = |name: &str, uuid: &str| {
            std::fs::create_dir_all(dir.path().join("dm")).unwrap();
            std::fs::write(dir.path().join("dm/name"), format!("{name}\n")).unwrap();
            std::fs::write(dir.path().join("dm/uuid"), format!("{uuid}\n")).unwrap();
            Mapped::at(dir.path(), 1).unwrap().unwrap()
        };
        let volume = mapped("berth--main-vol--1", "LVM-abc");
        assert_eq!(volume.logical_volume(), Some(("berth-main".to_owned(), "vol-1".to_owned())));
        assert!(!volume.is_crypt());
        assert_eq!(volume.path(), Path::new("/dev/dm-1"));
        let crypt = mapped("vg-lv", "CRYPT-LUKS2-abc-vg-lv");
        assert!(crypt.is_crypt() && crypt.logical_volume().is_none());
        assert!(!mapped("vg-lv", "").is_crypt());
        assert_eq!(Mapped::at(&dir.path().join("none"), 1).unwrap(), None);
    }
}
