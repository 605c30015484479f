//! LVM volume groups and their logical volumes, by the `lvm` program.
//!
//! Each command sees only the disks that it is meant to: what a tenant writes into a volume may look like a part of a group.
//! Answers are LVM's JSON reports, and udev is not waited for ([`command`]): LVM makes the device nodes itself, beside a
//! running udevd or without one. Commands of other programs on the same group are kept out by LVM's lock files in
//! `/run/lock/lvm`, which a container has to share with its node.
//!
//! A command that was interrupted leaves a group as it was or as it was to be, but perhaps a device whose I/O waits: see
//! [`LogicalVolume::suspended`].

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::command::{self, Answer};
use super::mapper::{self, Mapped};
use crate::error::{Context, Error, ErrorKind, Result};

/// Sizes are given to LVM in whole sectors; it makes whole extents of them.
const SECTOR: u64 = 512;
/// A volume's descriptor is in its tags, so there is more metadata than LVM reckons with by default (1 MiB).
const LAYOUT: [&str; 4] = ["--metadatasize", "64m", "--dataalignment", "1m"];
/// `lvm` ends so when a command can't be meant (EINVALID_CMD_LINE).
const INVALID_COMMAND: i32 = 3;

/// A volume group, by its name. Nothing is kept of it: each question goes to the disks.
#[derive(Clone, Debug)]
pub struct Group {
    name: String,
    disks: Option<Vec<PathBuf>>,
    deadline: Duration,
}

/// What a group is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// LVM's UUID of it, which no other has.
    pub uuid: String,
    /// Bytes of an extent: volumes are of whole ones.
    pub extent_size: u64,
    /// Bytes that volumes can have in all.
    pub size: u64,
    /// Bytes that no volume has, on disks that are there.
    pub free: u64,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its tags.
    pub tags: Vec<String>,
}

/// A disk of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// LVM's UUID of it.
    pub uuid: String,
    /// Bytes that volumes can have on it.
    pub size: u64,
    /// Those that no volume has.
    pub free: u64,
    /// `None`: it is missing.
    pub path: Option<PathBuf>,
    /// It was missing while the group was changed, and is here again: LVM does not use it until [`Group::restore`].
    pub returned: Option<PathBuf>,
}

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalVolume {
    /// Its name in the group.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its tags.
    pub tags: Vec<String>,
    /// Does it have a device?
    pub active: bool,
    /// All I/O of its device waits, after a command was interrupted: [`Group::refresh`] lets it go on.
    pub suspended: bool,
    /// Somebody has its device open, or something lies on it.
    pub open: bool,
    /// Some of it lies on a disk that is missing.
    pub partial: bool,
    /// Where its device is while it is active.
    pub path: PathBuf,
    /// The disks that it lies on and that are there, each once.
    pub disks: Vec<PathBuf>,
}

/// The device of a volume. `None`: it has none now. Asks sysfs only.
///
/// # Errors
/// When sysfs can't be read.
pub fn device(group: &str, name: &str) -> Result<Option<Mapped>> {
    let found = mapper::find(&mapper::join(group, name))?;
    Ok(found.filter(|mapped| mapped.logical_volume().is_some()))
}

/// The path of a volume's device, for people: what is there may be a link.
pub fn device_path(group: &str, name: &str) -> PathBuf {
    Path::new("/dev/mapper").join(mapper::join(group, name))
}

/// The group and the name of the volume whose device has this number, as stat(2) has it. `None`: it is no volume's. Asks sysfs only.
///
/// # Errors
/// When sysfs can't be read.
pub fn name_of_device(device: u64) -> Result<Option<(String, String)>> {
    Ok(Mapped::of(device)?.and_then(|mapped| mapped.logical_volume()))
}

/// Those of the disks that are LVM's, each with the group that it belongs to. `None`: to none, such as one that was to be in
/// a group whose making was interrupted.
///
/// # Errors
/// `Unreachable` when a disk is gone, `Internal` when one can't be read.
pub fn groups_on(disks: &[PathBuf], deadline: Duration) -> Result<Vec<(PathBuf, Option<String>)>> {
    #[derive(Deserialize)]
    struct Row {
        pv_name: PathBuf,
        vg_name: String,
    }
    let answer = run("pvs", &config(Some(disks))?, &report("pv_name,vg_name"), deadline)?;
    let rows: Vec<Row> = rows(&answer, "pv")?;
    disks.iter().try_for_each(|disk| check_readable(disk))?;
    // Others of the same group may be missing.
    let there = rows.into_iter().filter(|row| row.pv_name.is_absolute());
    Ok(there.map(|row| (row.pv_name, Some(row.vg_name).filter(|name| !name.is_empty()))).collect())
}

/// Makes a disk one that a group can be made of, or takes in. Its first sector is left as it is.
///
/// # Errors
/// `Precondition` when it is in use or has something on it that LVM knows.
pub fn prepare(disk: &Path, deadline: Duration) -> Result<()> {
    let mut words: Vec<OsString> = LAYOUT.iter().map(OsString::from).collect();
    words.extend(["--zero".into(), "n".into(), disk.as_os_str().to_owned()]);
    let answer = run("pvcreate", &config(Some(&[disk.to_owned()]))?, &words, deadline)?;
    if answer.code() == Some(0) { Ok(()) } else { Err(answer.failure(kind(&answer))) }
}

/// Do a disk's first bytes say that it is LVM's?
pub fn is_labelled(beginning: &[u8]) -> bool {
    // In one of the first four sectors; the kind of label follows behind its number, checksum and offset.
    let mut sectors = beginning.chunks_exact(512).take(4);
    sectors.any(|sector| sector.starts_with(b"LABELONE") && sector[24..].starts_with(b"LVM2 001"))
}

impl Group {
    /// The group of this name on these disks, and on no other; or on any disk of this machine, also one that is encrypted or has
    /// several paths, but on no loop device, no other device of device mapper, no zram and no disk of the network. Each command
    /// has so much time. Nothing is asked yet.
    ///
    /// # Errors
    /// `Invalid` when that can't be the name of a group, or of a disk.
    pub fn new(name: &str, disks: Option<Vec<PathBuf>>, deadline: Duration) -> Result<Self> {
        check_name(name)?;
        config(disks.as_deref())?;
        Ok(Self { name: name.to_owned(), disks, deadline })
    }

    /// Makes a group of blank disks.
    ///
    /// # Errors
    /// `Precondition` when a disk is in use or has something on it that LVM knows, which is left as it is; `Conflict` when
    /// there is such a group, or a disk is in one.
    pub fn make(name: &str, disks: Vec<PathBuf>, tags: &[String], deadline: Duration) -> Result<Self> {
        let group = Self::new(name, Some(disks), deadline)?;
        let mut words: Vec<_> = LAYOUT.iter().map(OsString::from).collect();
        add_tags(&mut words, tags)?;
        words.push(name.into());
        words.extend(group.disks.iter().flatten().map(|disk| disk.clone().into_os_string()));
        remove_stale_links(&Path::new("/dev").join(name));
        // Not with --yes: LVM shall refuse what it would have to wipe.
        group.command("vgcreate", &words)?;
        Ok(group)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a blank disk.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn extend(&mut self, disk: &Path) -> Result<()> {
        let mut wider = self.clone();
        if let Some(disks) = &mut wider.disks {
            disks.push(disk.to_owned());
        }
        let mut words: Vec<OsString> = LAYOUT.iter().map(OsString::from).collect();
        words.extend([OsString::from(&self.name), disk.as_os_str().to_owned()]);
        wider.command("vgextend", &words)?;
        *self = wider;
        Ok(())
    }

    /// Takes a disk back that was missing for a while. After a change to the group meanwhile, such as the removal of a volume, it
    /// counts as missing until then.
    ///
    /// # Errors
    /// `Internal` when it was not missing.
    pub fn restore(&self, disk: &Path) -> Result<()> {
        self.command("vgextend", &["--restoremissing".into(), (&self.name).into(), disk.into()]).map(drop)
    }

    /// What it is now.
    ///
    /// # Errors
    /// `NotFound` only when all of the disks can be read and LVM finds none of that name there; `Unreachable` when a disk is gone;
    /// `Internal` when it can't be told.
    pub fn state(&self) -> Result<State> {
        #[derive(Deserialize)]
        struct Row {
            vg_uuid: String,
            vg_extent_size: String,
            vg_size: String,
            vg_tags: String,
            pv_uuid: String,
            pv_size: String,
            pv_free: String,
            pv_name: PathBuf,
            pv_missing: String,
        }
        let fields = "vg_uuid,vg_extent_size,vg_size,vg_tags,pv_uuid,pv_size,pv_free,pv_name,pv_missing";
        let mut words = report(fields);
        // To name it would make an absent one a failure.
        words.extend(["--select".into(), format!("vg_name={}", self.name).into()]);
        let answer = self.ask("vgs", &words)?;
        let rows: Vec<Row> = rows(&answer, "vg")?;
        let Some(first) = rows.first() else { return Err(self.absence(&answer)) };
        if rows.iter().any(|row| row.vg_uuid != first.vg_uuid) {
            fail!(Conflict, "there are several volume groups {}: rename one of them (vgrename UUID NAME)", self.name);
        }
        let disk = |row: &Row| {
            let place = Some(row.pv_name.clone()).filter(|place| place.is_absolute());
            let (path, returned) = if row.pv_missing.is_empty() { (place, None) } else { (None, place) };
            let (size, free) = (number(&row.pv_size)?, number(&row.pv_free)?);
            Ok(Disk { uuid: row.pv_uuid.clone(), size, free, path, returned })
        };
        let disks = rows.iter().map(disk).collect::<Result<Vec<_>>>()?;
        Ok(State {
            uuid: first.vg_uuid.clone(),
            extent_size: number(&first.vg_extent_size)?,
            size: number(&first.vg_size)?,
            // LVM's own sum has missing ones in it.
            free: disks.iter().filter(|disk| disk.path.is_some()).map(|disk| disk.free).sum(),
            disks,
            tags: list(&first.vg_tags),
        })
    }

    /// Why there is no such group in LVM's answer.
    fn absence(&self, answer: &Answer) -> Error {
        // It says what it could not read, and goes on.
        if !answer.errors.trim().is_empty() {
            return answer.failure(ErrorKind::Internal);
        }
        match self.disks.iter().flatten().try_for_each(|disk| check_readable(disk)) {
            Ok(()) => Error::new(ErrorKind::NotFound, format!("there is no volume group {}", self.name)),
            Err(error) => error,
        }
    }

    /// All of its volumes that have a name of their own, whoever made them.
    ///
    /// # Errors
    /// `Unreachable` when there is no such group.
    pub fn volumes(&self) -> Result<Vec<LogicalVolume>> {
        #[derive(Deserialize)]
        struct Row {
            lv_name: String,
            lv_size: String,
            lv_tags: String,
            lv_active: String,
            lv_suspended: String,
            lv_device_open: String,
            lv_health_status: String,
            devices: String,
        }
        let mut words =
            report("lv_name,lv_size,lv_tags,lv_active,lv_suspended,lv_device_open,lv_health_status,devices");
        words.push((&self.name).into());
        let answer = self.command("lvs", &words)?;
        let mut volumes = BTreeMap::new();
        // One row for each segment.
        for row in rows::<Row>(&answer, "lv")? {
            let volume = match volumes.entry(row.lv_name.clone()) {
                std::collections::btree_map::Entry::Occupied(volume) => volume.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => place.insert(LogicalVolume {
                    path: device_path(&self.name, &row.lv_name),
                    name: row.lv_name,
                    size: number(&row.lv_size)?,
                    tags: list(&row.lv_tags),
                    // Of one without a device LVM says `unknown`.
                    active: row.lv_active == "active",
                    suspended: row.lv_suspended == "suspended",
                    open: row.lv_device_open == "open",
                    partial: row.lv_health_status == "partial",
                    disks: Vec::new(),
                }),
            };
            // `/dev/nvme0n1(25)`: the disk and the extent where it begins there.
            for extent in list(&row.devices) {
                let disk = PathBuf::from(extent.rsplit_once('(').map_or(extent.as_str(), |(disk, _)| disk));
                if disk.is_absolute() && !volume.disks.contains(&disk) {
                    volume.disks.push(disk);
                }
            }
        }
        Ok(volumes.into_values().collect())
    }

    /// Makes a thick volume of at least `size` bytes over so many disks, striped, or wherever there is room. It is active; its
    /// first sectors are zero, and what LVM knows as a signature is wiped. The rest is as its last user left it.
    ///
    /// # Errors
    /// `Exhausted` when there is not enough room on so many disks, `Conflict` when there is such a volume, `Invalid` for a name
    /// or tag that LVM does not have.
    pub fn create(&self, name: &str, size: u64, stripes: Option<u32>, tags: &[String]) -> Result<()> {
        check_name(name)?;
        let mut words: Vec<OsString> =
            ["--yes", "-Wy", "-Zy", "--setautoactivation", "n", "-n", name, "-L"].iter().map(OsString::from).collect();
        words.push(bytes(size));
        match stripes {
            None | Some(1) => words.extend(["--type".into(), "linear".into()]),
            Some(stripes) => {
                words.extend(["--type".into(), "striped".into(), "-i".into(), stripes.to_string().into()]);
            }
        }
        add_tags(&mut words, tags)?;
        words.push((&self.name).into());
        self.command("lvcreate", &words).map(drop)
    }

    /// Gives a volume another name, in use or not.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Conflict` when there is one of the new name.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        check_name(from)?;
        check_name(to)?;
        self.command("lvrename", &[&self.name, from, to].map(OsString::from)).map(drop)
    }

    /// Makes a volume at least so many bytes big, in use or not, if it is not.
    ///
    /// # Errors
    /// `Exhausted` when there is not enough room, `NotFound` when there is no such volume.
    pub fn grow(&self, name: &str, size: u64) -> Result<()> {
        let volume = self.volume(name)?;
        match self.command("lvextend", &["-L".into(), bytes(size), volume]) {
            // It may have been interrupted after it grew and before its device did.
            Err(error) if error.kind() == ErrorKind::Conflict => self.refresh(name),
            outcome => outcome.map(drop),
        }
    }

    /// Makes the device of an active volume what the volume is, and lets its I/O go on if it waits.
    ///
    /// # Errors
    /// `NotFound` when there is no such volume.
    pub fn refresh(&self, name: &str) -> Result<()> {
        self.command("lvchange", &["--refresh".into(), self.volume(name)?]).map(drop)
    }

    /// Removes a volume. Its extents are free at once, with all that is written there.
    ///
    /// # Errors
    /// `Busy` when it is in use, `NotFound` when there is none.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.command("lvremove", &["--yes".into(), self.volume(name)?]).map(drop)
    }

    /// Gives a volume its device, if it has none.
    ///
    /// # Errors
    /// `NotFound` when there is no such volume, `Precondition` when a disk that it lies on is missing.
    pub fn activate(&self, name: &str) -> Result<()> {
        self.command("lvchange", &["--activate".into(), "y".into(), self.volume(name)?]).map(drop)
    }

    /// Takes a volume's device away, if it has one.
    ///
    /// # Errors
    /// `Busy` when it is in use, `NotFound` when there is no such volume.
    pub fn deactivate(&self, name: &str) -> Result<()> {
        self.command("lvchange", &["--activate".into(), "n".into(), self.volume(name)?]).map(drop)
    }

    /// Takes tags from a volume and gives it others, all or none of them. One that is in both lists, it has afterwards.
    ///
    /// # Errors
    /// `NotFound` when there is no such volume, `Invalid` for a tag that LVM does not have.
    pub fn retag(&self, name: &str, remove: &[String], add: &[String]) -> Result<()> {
        let mut words = Vec::new();
        for tag in remove.iter().filter(|tag| !add.contains(tag)) {
            check_tag(tag)?;
            words.extend(["--deltag".into(), tag.into()]);
        }
        add_tags(&mut words, add)?;
        if words.is_empty() {
            return Ok(());
        }
        words.push(self.volume(name)?);
        self.command("lvchange", &words).map(drop)
    }

    /// Takes tags from the group itself and gives it others, all or none of them.
    ///
    /// # Errors
    /// `Invalid` for a tag that LVM does not have.
    pub fn retag_group(&self, remove: &[String], add: &[String]) -> Result<()> {
        let mut words = Vec::new();
        for tag in remove {
            check_tag(tag)?;
            words.extend(["--deltag".into(), tag.into()]);
        }
        add_tags(&mut words, add)?;
        words.push((&self.name).into());
        self.command("vgchange", &words).map(drop)
    }

    /// As commands name a volume.
    fn volume(&self, name: &str) -> Result<OsString> {
        check_name(name)?;
        Ok(format!("{}/{name}", self.name).into())
    }

    fn command(&self, command: &str, words: &[OsString]) -> Result<Answer> {
        let answer = self.ask(command, words)?;
        if answer.code() == Some(0) { Ok(answer) } else { Err(answer.failure(kind(&answer))) }
    }

    fn ask(&self, command: &str, words: &[OsString]) -> Result<Answer> {
        run(command, &config(self.disks.as_deref())?, words, self.deadline)
    }
}

/// A group whose disks have vanished leaves a directory of links that lead nowhere, and LVM makes no other one of that name
/// while it is there.
fn remove_stale_links(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let link = entry.path();
        // Nor is a device there only because its file is.
        let is_there = std::fs::metadata(&link).is_ok_and(|to| {
            let number = to.rdev();
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            Path::new(&format!("/sys/dev/block/{major}:{minor}")).exists()
        });
        if link.is_symlink() && !is_there {
            let _ = std::fs::remove_file(link);
        }
    }
    // Only if that was all; if not, LVM says why it can't.
    let _ = std::fs::remove_dir(folder);
}

fn run(command: &str, config: &str, words: &[OsString], deadline: Duration) -> Result<Answer> {
    let mut arguments: Vec<&OsStr> = vec![command.as_ref(), "--config".as_ref(), config.as_ref()];
    arguments.extend(words.iter().map(OsString::as_os_str));
    command::ask("lvm", &arguments, &[], deadline)
}

/// What LVM means, by its words: its exit code is the same for nearly all failures.
fn kind(answer: &Answer) -> ErrorKind {
    let says = |words: &[&str]| words.iter().any(|words| answer.errors.contains(words));
    if says(&["nsufficient", "must not exceed number of physical volumes", "too large for"]) {
        ErrorKind::Exhausted
    } else if says(&["already exists", "already in volume group", "matches existing size", "not larger than existing"])
    {
        ErrorKind::Conflict
    } else if says(&["Failed to find logical volume", "not found in volume group"]) {
        ErrorKind::NotFound
    } else if says(&["Volume group \""]) && says(&["\" not found"]) {
        // Perhaps its disks are gone: who has to know asks for its state.
        ErrorKind::Unreachable
    } else if says(&[" in use", "used by another device"]) {
        ErrorKind::Busy
    } else if says(&["exclusively", "existing signature", "PVs are missing", "Refusing activation of partial LV"]) {
        ErrorKind::Precondition
    } else if answer.code() == Some(INVALID_COMMAND) {
        ErrorKind::Invalid
    } else {
        ErrorKind::Internal
    }
}

/// LVM passes over what it can't read, and does not always say so: only after this, what it did not find is not there.
fn check_readable(disk: &Path) -> Result<()> {
    const BLOCK: usize = 4096;
    let what = || format!("cannot read {}, and so not tell what is on it", disk.display());
    let opened = File::options().read(true).custom_flags(libc::O_DIRECT).open(disk);
    let file = match opened {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::caused(ErrorKind::Unreachable, what(), error));
        }
        opened => opened.context(what)?,
    };
    // Past the page cache, which wants memory that begins where a block does.
    let mut memory = vec![0; 2 * BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    file.read_exact_at(&mut memory[start..start + BLOCK], 0).context(what)
}

/// What LVM shall see and do, whatever its own configuration says.
fn config(disks: Option<&[PathBuf]>) -> Result<String> {
    let mut filter = String::new();
    match disks {
        // A disk has many names; it is admitted by this one and by no link to it.
        None => {
            for whole in mapper::whole_disks()? {
                let _ = write!(filter, r#""a|^{}$|", "#, whole.path().display());
            }
            filter.push_str(r#""r|^/dev/(loop|dm-|zram|rbd|nbd|drbd)[^/]*$|", "a|^/dev/[^/]+$|", "#);
        }
        Some(disks) => {
            for disk in disks {
                // Formatting into a string can't fail.
                let _ = write!(filter, r#""a|^{}$|", "#, pattern(disk)?);
            }
        }
    }
    let filter = format!(r#"[{filter}"r|.*|"]"#);
    Ok(format!(
        "devices {{ use_devicesfile=0 hints=\"none\" obtain_device_list_from_udev=0 external_device_info_source=\"none\" \
         scan_lvs=0 issue_discards=0 filter={filter} global_filter={filter} }} \
         activation {{ monitoring=0 }} backup {{ backup=0 archive=0 }} \
         global {{ notify_dbus=0 use_lvmpolld=0 }} log {{ verbose=0 prefix=\"\" }}"
    ))
}

/// LVM's regular expression for a disk's own name, which it may have been given another one of.
fn pattern(disk: &Path) -> Result<String> {
    let real = match std::fs::canonicalize(disk) {
        Ok(real) => real,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => disk.to_owned(),
        Err(error) => return Err(error).context(|| format!("cannot look at {}", disk.display())),
    };
    let mut pattern = String::new();
    for char in real.to_str().unwrap_or_default().chars() {
        match char {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '/' | '_' | '-' => pattern.push(char),
            '.' | '+' | ':' | '!' | '@' | '=' | ',' | '#' => pattern.extend(['[', char, ']']),
            _ => fail!(Invalid, "{} can't be the name of a disk", disk.display()),
        }
    }
    if !pattern.starts_with("/dev/") {
        fail!(Invalid, "{} is no disk: its name does not begin with /dev/", disk.display());
    }
    Ok(pattern)
}

/// Arguments for a report with these fields, sizes in bytes.
fn report(fields: &str) -> Vec<OsString> {
    ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields].iter().map(OsString::from).collect()
}

/// The rows of a report.
fn rows<T: DeserializeOwned>(answer: &Answer, of: &str) -> Result<Vec<T>> {
    #[derive(Deserialize)]
    struct Reports<T> {
        report: Vec<HashMap<String, Vec<T>>>,
    }
    if answer.code() != Some(0) {
        return Err(answer.failure(kind(answer)));
    }
    let reports: Reports<T> = serde_json::from_str(&answer.output)
        .map_err(|error| Error::caused(ErrorKind::Internal, "cannot read LVM's report", error))?;
    Ok(reports.report.into_iter().filter_map(|mut report| report.remove(of)).flatten().collect())
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::new(ErrorKind::Internal, format!("LVM reports {text:?} where a number belongs")))
}

fn list(text: &str) -> Vec<String> {
    text.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn bytes(size: u64) -> OsString {
    format!("{}b", size.next_multiple_of(SECTOR)).into()
}

fn add_tags(words: &mut Vec<OsString>, tags: &[String]) -> Result<()> {
    for tag in tags {
        check_tag(tag)?;
        words.extend(["--addtag".into(), tag.into()]);
    }
    Ok(())
}

/// lvm(8), VALID NAMES. What it reserves besides, it refuses itself.
fn check_name(name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte);
    if name.is_empty() || name.len() > 127 || name.starts_with(['.', '-']) || !name.bytes().all(plain) {
        fail!(Invalid, "{name:?} can't be a name in LVM");
    }
    Ok(())
}

/// The longest tag that LVM takes, in bytes.
pub const TAG: usize = 1024;

fn check_tag(tag: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_+.-/=!:&#".contains(&byte);
    if tag.is_empty() || tag.len() > TAG || tag.starts_with('-') || !tag.bytes().all(plain) {
        fail!(Invalid, "{tag:?} can't be a tag in LVM");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_disks_of_the_group_are_admitted() {
        let of = |disks: &[&str]| {
            let disks: Vec<_> = disks.iter().map(PathBuf::from).collect();
            config(Some(&disks)).map_err(|error| error.kind())
        };
        let both = of(&["/dev/no-such1", "/dev/cciss!c0d0.x"]).unwrap();
        let filter = r#"filter=["a|^/dev/no-such1$|", "a|^/dev/cciss[!]c0d0[.]x$|", "r|.*|"]"#;
        assert!(both.contains(&format!(" {filter} global_{filter} ")), "{both}");
        assert!(of(&[]).unwrap().contains(r#"filter=["r|.*|"]"#));
        for bad in ["/dev/a|b", "/dev/a\"b", "/dev/a]", "/dev/^a", "/home/x", "nvme0n1", "/dev/../etc/passwd", ""] {
            assert_eq!(of(&[bad]), Err(ErrorKind::Invalid), "{bad}");
        }
        // By whatever name it was given.
        assert!(of(&["/proc/self/root/dev/null"]).unwrap().contains("a|^/dev/null$|"));
    }

    #[test]
    fn a_label_is_in_one_of_the_first_four_sectors() {
        for (sector, is) in [(0, true), (1, true), (3, true), (4, false)] {
            let mut block = [0; 4096];
            block[sector * 512..sector * 512 + 8].copy_from_slice(b"LABELONE");
            assert!(!is_labelled(&block));
            block[sector * 512 + 24..sector * 512 + 32].copy_from_slice(b"LVM2 001");
            assert_eq!(is_labelled(&block), is, "{sector}");
        }
        assert!(!is_labelled(b"LABELONE"));
    }

    #[test]
    fn names_and_tags_are_those_that_lvm_has() {
        let patience = Duration::from_secs(1);
        for bad in ["", ".", "..", "-a", "a/b", "a b", "ä", &"a".repeat(128)] {
            assert_eq!(Group::new(bad, None, patience).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
        let group = Group::new("berth-main", Some(Vec::new()), patience).unwrap();
        for bad in ["", "-a", "a,b", "a b", "@ä", &"a".repeat(1025)] {
            let error = group.retag("a", &[], &[bad.to_owned()]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
        }
        group.retag("a", &[], &[]).unwrap();
        assert_eq!(device_path("berth-main", "vol-1"), Path::new("/dev/mapper/berth--main-vol--1"));
    }
}
