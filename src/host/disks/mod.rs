//! Whole disks of this machine: what they are, and what is on them.
//!
//! Everything is read from sysfs and from the disks themselves; the one thing that is written is a disk's first block. A
//! disk that can't be looked at is an error, and never a blank one.
//!
//! Loop devices are not disks: what lies on them is a volume's, and so a tenant's. They are listed apart
//! ([`Sort::Loop`]), since a pool may name one explicitly, which is how pools of disks are tested where no disk is free.

mod occupants;

use std::fmt;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

pub use self::occupants::Found;

use super::patience::Patience;
use crate::error::{Context, Error, ErrorKind, Result};

/// Names of disks that are a thing one could hold in one's hand, or a cloud's picture of one.
const REAL: [&str; 6] = ["nvme", "sd", "vd", "xvd", "mmcblk", "pmem"];
/// Where a disk that comes over a network hangs below: NVMe over fabrics, iSCSI, Fibre Channel.
const REMOTE: [&str; 3] = ["/nvme-fabrics/", "/session", "/rport-"];
/// The first bytes of a disk, which say what is on it.
pub const BLOCK: usize = 4096;

/// Where disks are looked for.
#[derive(Clone, Debug)]
pub struct Machine {
    /// `/`, or what stands for it in a test.
    root: PathBuf,
    patience: Patience,
}

/// What a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// As the kernel calls it now: `nvme0n1`. Another disk may have that name after the next boot.
    pub name: String,
    /// Its device file.
    pub path: PathBuf,
    /// Its links in `/dev/disk`.
    pub links: Vec<PathBuf>,
    /// Its device number.
    pub number: u64,
    /// No other disk has this number until the next boot, whatever its name.
    pub sequence: u64,
    /// Bytes.
    pub size: u64,
    /// Empty where it does not say.
    pub model: String,
    /// Likewise. Namespaces of one NVMe controller have the same.
    pub serial: String,
    /// Of NVMe disks the number of the namespace in its controller. 0 for others.
    pub namespace: u32,
    /// A name that no other disk in the world has, if it says one.
    pub wwid: String,
    /// It has heads that have to move.
    pub rotational: bool,
    /// It takes no writes.
    pub read_only: bool,
    /// What sort of thing it is.
    pub sort: Sort,
}

impl Disk {
    /// What tells it from the machine's other disks, also after the next boot where it says who it is: the serial number,
    /// with the namespace's where that is not the first one.
    pub fn identity(&self) -> String {
        match (self.serial.as_str(), self.namespace) {
            ("", _) => self.name.clone(),
            (serial, 0 | 1) => serial.to_owned(),
            (serial, namespace) => format!("{serial}_{namespace}"),
        }
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.serial.as_str() {
            "" => f.write_str(&self.name),
            _ => write!(f, "{} (serial {})", self.name, self.identity()),
        }
    }
}

/// What sort of thing a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// A disk of this machine.
    Local,
    /// A disk that comes over a network: another machine may use it.
    Remote,
    /// A file, shown as a disk.
    Loop,
    /// What device mapper makes of other disks: no disk, but treated as one where that is asked for.
    Mapped,
}

/// How a disk is doing that was there once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It answers.
    Live,
    /// Its controller is in this state, and may come back.
    Unwell(String),
    /// It is not there any more.
    Gone,
}

impl Default for Machine {
    fn default() -> Self {
        Self::below(Path::new("/"))
    }
}

impl Machine {
    /// The machine whose `/sys`, `/proc` and `/dev` lie below this directory.
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned(), patience: Patience::default() }
    }

    /// Every disk, and every loop device with a file, by name.
    pub fn disks(&self) -> Result<Vec<Disk>> {
        let folder = self.root.join("sys/block");
        let what = || format!("cannot list {}", folder.display());
        let links = self.links();
        let mut disks = Vec::new();
        for entry in std::fs::read_dir(&folder).context(what)? {
            if let Ok(name) = entry.context(what)?.file_name().into_string()
                && let Some(mut disk) = self.disk(&name)
                && disk.sort != Sort::Mapped
            {
                disk.links = links.iter().filter(|(to, _)| *to == name).map(|(_, link)| link.clone()).collect();
                disks.push(disk);
            }
        }
        // nvme9n1 comes before nvme10n1.
        disks.sort_by_key(|disk| (disk.name.len(), disk.name.clone()));
        Ok(disks)
    }

    /// What sysfs knows of a device, if it is one of ours. One that vanishes meanwhile is none.
    fn disk(&self, name: &str) -> Option<Disk> {
        let sys = self.root.join("sys/block").join(name);
        let read = |file: &str| read(&sys.join(file));
        let is_real = REAL.iter().any(|real| {
            let rest = name.strip_prefix(real);
            rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
        });
        // mmcblk0boot0 is no disk, and nvme0c0n1 is only a path to one.
        let is_part = name.starts_with("mmcblk") && (name.contains("boot") || name.contains("rpmb"));
        let sort = if is_real && !is_part && sys.join("device").exists() {
            let place = sys.canonicalize().ok()?;
            let is_remote = REMOTE.iter().any(|remote| place.to_string_lossy().contains(remote));
            if is_remote || is_fabric(&sys) { Sort::Remote } else { Sort::Local }
        } else if name.starts_with("loop") {
            Sort::Loop
        } else if name.starts_with("dm-") {
            Sort::Mapped
        } else {
            return None;
        };
        let size = read("size")?.parse::<u64>().ok()?.checked_mul(512)?;
        if size == 0 || read("hidden").is_some_and(|hidden| hidden == "1") {
            return None;
        }
        let first = |files: &[&str]| files.iter().find_map(|file| read(file)).unwrap_or_default();
        Some(Disk {
            name: name.to_owned(),
            path: self.root.join("dev").join(name),
            links: Vec::new(),
            number: device_number(&read("dev")?)?,
            sequence: read("diskseq").and_then(|sequence| sequence.parse().ok()).unwrap_or_default(),
            size,
            model: first(&["device/model", "device/name", "loop/backing_file"]),
            serial: read("device/serial").or_else(|| read("serial")).or_else(|| vital_serial(&sys)).unwrap_or_default(),
            namespace: read("nsid").and_then(|namespace| namespace.parse().ok()).unwrap_or_default(),
            wwid: first(&["wwid", "device/wwid"]),
            // The kernel says that files rotate.
            rotational: sort != Sort::Loop && read("queue/rotational").is_some_and(|rotational| rotational == "1"),
            read_only: read("ro").is_some_and(|read_only| read_only == "1"),
            sort,
        })
    }

    /// The names that links in `/dev/disk/by-*` lead to, with the links. Without udev there are none.
    fn links(&self) -> Vec<(String, PathBuf)> {
        let entries =
            |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let folders = entries(&self.root.join("dev/disk"));
        let name = |to: PathBuf| to.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        let mut links: Vec<_> = folders
            .flat_map(|folder| entries(&folder).collect::<Vec<_>>())
            .filter_map(|link| Some((std::fs::read_link(&link).ok().and_then(name)?, link)))
            .collect();
        links.sort();
        links
    }

    /// The disk that has this device number now.
    pub fn by_number(&self, number: u64) -> Option<Disk> {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let link = std::fs::read_link(self.root.join(format!("sys/dev/block/{major}:{minor}"))).ok()?;
        self.disk(link.file_name()?.to_str()?)
    }

    /// The block device whose file, or a link to it, is at this path.
    ///
    /// # Errors
    /// `Unreachable` when there is none.
    pub fn by_path(&self, path: &Path) -> Result<Disk> {
        let what = || format!("cannot look at {}", path.display());
        let number = std::fs::metadata(path).context(what)?.rdev();
        let disk = self.by_number(number);
        disk.ok_or_else(|| Error::new(ErrorKind::Unreachable, format!("{}: it is no block device", what())))
    }

    /// Has there been a block device with this number, and is there none any more? Memory has no device.
    pub fn is_gone(&self, number: u64) -> bool {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        major != 0 && !self.root.join(format!("sys/dev/block/{major}:{minor}")).exists()
    }

    /// How a disk is doing that was there once. Asks only sysfs, so it never waits for the disk.
    pub fn condition(&self, disk: &Disk) -> Condition {
        let (major, minor) = (rustix::fs::major(disk.number), rustix::fs::minor(disk.number));
        let place = self.root.join(format!("sys/dev/block/{major}:{minor}"));
        let sequence =
            read(&place.join("diskseq")).and_then(|sequence| sequence.parse::<u64>().ok()).unwrap_or_default();
        if !place.exists() || disk.sequence != sequence {
            return Condition::Gone;
        }
        let device = place.join("device");
        let states = match read(&device.join("state")) {
            Some(state) => vec![state],
            // Several NVMe controllers may lead to one disk.
            None => {
                let paths = std::fs::read_dir(&device).into_iter().flatten().flatten();
                paths.filter_map(|path| read(&path.path().join("state"))).collect()
            }
        };
        let is_live = |state: &String| matches!(state.as_str(), "live" | "running");
        match states.first() {
            Some(_) if states.iter().any(is_live) => Condition::Live,
            Some(state) if state.starts_with("delet") || matches!(state.as_str(), "dead" | "cancel") => Condition::Gone,
            Some(state) => Condition::Unwell(state.clone()),
            None => Condition::Live,
        }
    }

    /// A disk's first block.
    ///
    /// # Errors
    /// When it can't be read, or not within `deadline`.
    pub fn first_block(&self, disk: &Disk, deadline: Duration) -> Result<[u8; BLOCK]> {
        let this = disk.clone();
        self.patience.ask(disk.number, &disk.name, deadline, move || {
            let mut block = [0; BLOCK];
            open(&this, OFlags::RDONLY)
                .and_then(|file| file.read_exact_at(&mut block, 0))
                .context(|| format!("cannot read from {}", this.path.display()))?;
            Ok(block)
        })
    }

    /// Has a disk answer a question within `deadline`: see [`Patience::ask`].
    ///
    /// # Errors
    /// As there.
    pub fn ask<T: Send + 'static>(
        &self,
        disk: &Disk,
        deadline: Duration,
        question: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.patience.ask(disk.number, &disk.name, deadline, question)
    }
}

/// Writes a disk's first bytes, at most a block, through to the disk. `alone`: only if nobody else uses the disk.
///
/// # Errors
/// `Busy` when somebody does.
pub fn write_beginning(disk: &Disk, bytes: &[u8], alone: bool) -> Result<()> {
    let what = || format!("cannot write to {}", disk.path.display());
    let alone = if alone { OFlags::EXCL } else { OFlags::empty() };
    match open(disk, OFlags::RDWR | alone) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(Error::caused(ErrorKind::Busy, what(), error)),
        opened => opened
            .and_then(|file| file.write_all_at(&bytes[..bytes.len().min(BLOCK)], 0).and_then(|()| file.sync_all()))
            .context(what),
    }
}

/// Holds the disk against other processes of ours, and keeps udev's programs from it, until dropped.
pub struct DiskLock(#[expect(dead_code, reason = "open as long as the lock is held")] File);

impl DiskLock {
    /// Takes it. `None`: somebody has it.
    pub fn try_acquire(disk: &Disk) -> Result<Option<Self>> {
        let what = || format!("cannot lock {}", disk.path.display());
        let file = open(disk, OFlags::RDONLY).context(what)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(Error::io(what(), error)),
        }
    }
}

/// Opens the disk, and nothing that has got its name meanwhile.
fn open(disk: &Disk, flags: OFlags) -> std::io::Result<File> {
    let file = rustix::fs::open(&disk.path, flags | OFlags::CLOEXEC, Mode::empty())?;
    let file = File::from(file);
    if file.metadata()?.rdev() != disk.number {
        return Err(std::io::Error::other(format!("{} is another disk by now", disk.path.display())));
    }
    Ok(file)
}

/// A file's one line, without the blanks that models and serial numbers are padded with.
fn read(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().trim_end_matches('\0').to_owned()).filter(|text| !text.is_empty())
}

/// `259:3` as stat(2) has it.
pub fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Does an NVMe controller sit behind a network? Multipath hides it from the disk's place in sysfs.
fn is_fabric(sys: &Path) -> bool {
    let device = sys.join("device");
    let paths = std::fs::read_dir(&device).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut transports = paths.chain([device]).filter_map(|path| read(&path.join("transport")));
    transports.any(|transport| !matches!(transport.as_str(), "pcie" | "apple-nvme"))
}

/// SCSI's page of vital data with the serial number: four bytes of head, the last two of which are the length.
fn vital_serial(sys: &Path) -> Option<String> {
    let page = std::fs::read(sys.join("device/vpd_pg80")).ok()?;
    let length = usize::from(u16::from_be_bytes([*page.get(2)?, *page.get(3)?]));
    let text = String::from_utf8_lossy(page.get(4..4 + length)?).trim().to_owned();
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A machine of files.
    pub(super) struct Fake(pub(super) tempfile::TempDir);

    impl Fake {
        pub(super) fn new() -> Self {
            let fake = Self(tempfile::tempdir().unwrap());
            for folder in ["sys/block", "sys/dev/block", "proc/self", "dev/disk/by-id", "dev/disk/by-path"] {
                std::fs::create_dir_all(fake.0.path().join(folder)).unwrap();
            }
            fake.write("proc/self/mounts", "proc /proc proc rw 0 0\n");
            fake.write("proc/swaps", "Filename Type Size Used Priority\n");
            fake
        }

        pub(super) fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        /// With files in its folder of sysfs.
        pub(super) fn disk(&self, name: &str, number: &str, files: &[(&str, &str)]) {
            self.write(&format!("sys/block/{name}/dev"), &format!("{number}\n"));
            self.write(&format!("sys/block/{name}/size"), "2048\n");
            std::fs::create_dir_all(self.0.path().join(format!("sys/block/{name}/holders"))).unwrap();
            for (file, text) in files {
                self.write(&format!("sys/block/{name}/{file}"), &format!("{text}\n"));
            }
            let link = self.0.path().join("sys/dev/block").join(number);
            std::os::unix::fs::symlink(format!("../../block/{name}"), link).unwrap();
        }

        pub(super) fn machine(&self) -> Machine {
            Machine::below(self.0.path())
        }

        fn names(&self) -> Vec<String> {
            self.machine().disks().unwrap().into_iter().map(|disk| disk.name).collect()
        }
    }

    #[test]
    fn only_whole_disks_are_disks() {
        let fake = Fake::new();
        let device = [("device/model", "M")];
        for (minor, name) in ["nvme10n1", "nvme9n1", "sda", "vdb", "mmcblk0"].into_iter().enumerate() {
            fake.disk(name, &format!("259:{minor}"), &device);
        }
        for (minor, name) in ["sr0", "nbd0", "rbd0", "fd0", "mmcblk0boot0", "drbd1"].into_iter().enumerate() {
            fake.disk(name, &format!("260:{minor}"), &device);
        }
        fake.disk("dm-1", "261:9", &[]);
        assert_eq!(fake.machine().by_number(rustix::fs::makedev(261, 9)).unwrap().sort, Sort::Mapped);
        for (minor, name) in ["dm-0", "md0", "zram0", "ram0", "vda"].into_iter().enumerate() {
            fake.disk(name, &format!("261:{minor}"), &[]);
        }
        fake.disk("nvme0c1n1", "262:0", &[("device/model", "M"), ("hidden", "1")]);
        fake.disk("sdb", "262:1", &[("device/model", "an empty card reader"), ("size", "0")]);
        fake.disk("loop3", "7:3", &[("loop/backing_file", "/images/a")]);
        fake.disk("loop4", "7:4", &[("size", "0")]);
        assert_eq!(fake.names(), ["sda", "vdb", "loop3", "mmcblk0", "nvme9n1", "nvme10n1"]);
        let sorts = fake.machine().disks().unwrap();
        assert!(sorts.iter().all(|disk| (disk.sort == Sort::Loop) == (disk.name == "loop3")));
    }

    #[test]
    fn a_disk_says_what_it_is() {
        let fake = Fake::new();
        let long = "QEMU NVMe Ctrl                          ";
        fake.disk(
            "nvme0n1",
            "259:0",
            &[("device/model", long), ("device/serial", "berth0001   "), ("diskseq", "7"), ("nsid", "2")],
        );
        fake.disk(
            "sda",
            "8:0",
            &[("device/model", "DISK"), ("queue/rotational", "1"), ("ro", "1"), ("device/wwid", "w")],
        );
        fake.write("sys/block/sda/device/vpd_pg80", "\0\u{1}\0\u{5} Z12 and more");
        fake.disk("vdb", "254:16", &[("device/x", ""), ("serial", "virtual")]);
        fake.disk("nvme1n1", "259:1", &[("device/nvme1/transport", "tcp"), ("device/model", "M"), ("wwid", "eui.1")]);
        for (link, to) in
            [("by-id/nvme-one", "nvme0n1"), ("by-path/pci-1", "nvme0n1"), ("by-id/nvme-one-part1", "nvme0n1p1")]
        {
            std::os::unix::fs::symlink(format!("../../{to}"), fake.0.path().join("dev/disk").join(link)).unwrap();
        }
        let disks = fake.machine().disks().unwrap();
        let [sda, vdb, first, second] = &disks[..] else { panic!("{disks:#?}") };
        assert_eq!((first.model.as_str(), first.serial.as_str()), ("QEMU NVMe Ctrl", "berth0001"));
        assert_eq!(first.to_string(), "nvme0n1 (serial berth0001_2)");
        assert_eq!((vdb.identity(), second.to_string()), ("virtual".to_owned(), "nvme1n1".to_owned()));
        assert_eq!((first.size, first.sequence, first.number), (1 << 20, 7, rustix::fs::makedev(259, 0)));
        let links: Vec<_> = first.links.iter().map(|link| link.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(links, ["nvme-one", "pci-1"]);
        assert_eq!((sda.serial.as_str(), sda.wwid.as_str(), sda.rotational, sda.read_only), ("Z12", "w", true, true));
        assert_eq!((vdb.serial.as_str(), vdb.rotational, vdb.sort), ("virtual", false, Sort::Local));
        assert_eq!((second.sort, second.wwid.as_str()), (Sort::Remote, "eui.1"));
    }

    #[test]
    fn a_disk_is_gone_when_another_one_has_its_name() {
        let fake = Fake::new();
        let files = |sequence, state| [("device/state", state), ("diskseq", sequence)];
        fake.disk("nvme0n1", "259:0", &files("7", "live"));
        fake.disk("nvme1n1", "259:1", &[("device/nvme1/state", "resetting"), ("device/nvme2/state", "live")]);
        fake.disk("vdb", "254:0", &[("device/x", "")]);
        let machine = fake.machine();
        let disks = machine.disks().unwrap();
        assert!(disks.iter().all(|disk| machine.condition(disk) == Condition::Live));
        let first = disks.iter().find(|disk| disk.name == "nvme0n1").unwrap();
        for (state, wanted) in [
            ("connecting", Condition::Unwell("connecting".to_owned())),
            ("dead", Condition::Gone),
            ("deleting (no IO)", Condition::Gone),
            ("live", Condition::Live),
        ] {
            fake.write("sys/block/nvme0n1/device/state", state);
            assert_eq!(machine.condition(first), wanted);
        }
        fake.write("sys/block/nvme0n1/diskseq", "8");
        assert_eq!(machine.condition(first), Condition::Gone);
        std::fs::remove_file(fake.0.path().join("sys/dev/block/259:0")).unwrap();
        assert_eq!(machine.condition(first), Condition::Gone);
    }
}
