//! The host's volume groups, encrypted devices, zeros and limits of I/O, on real NVMe disks. `make test-vm` runs these in a
//! virtual machine with three disks of 8 GiB, whose contents are lost.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use berth::error::ErrorKind;
use berth::host::cgroups::{self, Limits};
use berth::host::crypt::{self, Strength};
use berth::host::lvm::{self, Group, LogicalVolume};
use berth::host::{mapper, zero};
use common::{disks, run};

const MI: u64 = 1 << 20;
/// The CPU is emulated: a command of LVM takes two seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// A volume group of some of the machine's disks, and a place to mount on.
struct Lab {
    group: Group,
    disks: Vec<PathBuf>,
    dir: tempfile::TempDir,
}

impl Lab {
    fn on(disks: &[PathBuf]) -> Self {
        for disk in disks {
            run("wipefs", &["-q", "-a", text(disk)]);
        }
        let group = Group::make("berth-vm", disks.to_vec(), &["made-by=test".to_owned()], PATIENCE).unwrap();
        Self { group, disks: disks.to_vec(), dir: tempfile::tempdir().unwrap() }
    }

    fn volume(&self, name: &str) -> LogicalVolume {
        self.group.volumes().unwrap().into_iter().find(|volume| volume.name == name).unwrap()
    }

    fn make(&self, name: &str, size: u64) -> PathBuf {
        self.group.create(name, size, None, &[]).unwrap();
        lvm::device_path(self.group.name(), name)
    }

    fn place(&self) -> &str {
        text(self.dir.path())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let quietly = |program: &str, words: &[&str]| {
            let _ = Command::new(program).args(words).output();
        };
        quietly("umount", &["-q", self.place()]);
        for _ in 0..2 {
            // A mapping lies on a volume.
            quietly("dmsetup", &["remove_all", "--force"]);
        }
        for disk in &self.disks {
            quietly("wipefs", &["-q", "-a", text(disk)]);
        }
        // LVM would have removed its links.
        let _ = std::fs::remove_dir_all("/dev/berth-vm");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn number(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().rdev()
}

fn size(path: &Path) -> u64 {
    std::io::Seek::seek(&mut File::open(path).unwrap(), std::io::SeekFrom::End(0)).unwrap()
}

#[track_caller]
fn fails<T: std::fmt::Debug>(result: berth::error::Result<T>, kind: ErrorKind) -> String {
    let error = result.unwrap_err();
    println!("{:?}: {error}", error.kind());
    assert_eq!(error.kind(), kind);
    error.to_string()
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
#[ignore = "make test-vm"]
fn a_logical_volume_lives() {
    let disks = [disk_or_skip!("berth0001"), disk_or_skip!("berth0002")];
    let begun = Instant::now();
    let lab = Lab::on(&disks);
    println!("made after {:.1?}", begun.elapsed());
    let group = &lab.group;
    let begun = Instant::now();
    let state = group.state().unwrap();
    println!("asked after {:.1?}", begun.elapsed());
    assert_eq!(state.tags, ["made-by=test"]);
    assert_eq!(state.disks.iter().map(|disk| disk.path.clone().unwrap()).collect::<Vec<_>>(), disks);
    assert_eq!((state.size, state.extent_size), (state.free, 4 * MI));
    assert!(state.size > 15 << 30);
    // An administrator's, whose disks nobody has told, is the same.
    assert_eq!(Group::new("berth-vm", None, PATIENCE).unwrap().state().unwrap(), state);

    let begun = Instant::now();
    group.create("vol-1", 400 * MI + 1, None, &strings(&["a=1", "b"])).unwrap();
    println!("created after {:.1?}", begun.elapsed());
    group.create("vol-2", 400 * MI, Some(2), &[]).unwrap();
    let (one, two) = (lab.volume("vol-1"), lab.volume("vol-2"));
    assert_eq!((one.size, two.size), (404 * MI, 400 * MI));
    assert_eq!(
        (one.tags.clone(), one.active, one.partial, one.suspended),
        (strings(&["a=1", "b"]), true, false, false)
    );
    assert_eq!((one.disks.len(), two.disks.len()), (1, 2));
    assert_eq!(group.state().unwrap().free, state.size - 804 * MI);
    assert_eq!(size(&one.path), one.size);
    let named = lvm::name_of_device(number(&one.path)).unwrap();
    assert_eq!(named, Some(("berth-vm".to_owned(), "vol-1".to_owned())));
    assert_eq!(lvm::name_of_device(number(&disks[0])).unwrap(), None);

    // In use, it gets another name and other tags, and grows.
    run("mkfs.xfs", &["-q", "-K", text(&one.path)]);
    run("mount", &[text(&one.path), lab.place()]);
    group.rename("vol-1", "trash-1").unwrap();
    group.retag("trash-1", &strings(&["a=1", "c"]), &strings(&["a=2", "c", "d:!&#/"])).unwrap();
    group.grow("trash-1", 500 * MI).unwrap();
    let grown = lab.volume("trash-1");
    let mut tags = grown.tags.clone();
    tags.sort();
    assert_eq!((tags, grown.size), (strings(&["a=2", "b", "c", "d:!&#/"]), 500 * MI));
    assert_eq!(size(&grown.path), 500 * MI);
    assert!(!one.path.exists());
    std::fs::write(lab.dir.path().join("f"), "content").unwrap();
    fails(group.deactivate("trash-1"), ErrorKind::Busy);
    fails(group.remove("trash-1"), ErrorKind::Busy);
    common::unmount(&[lab.place()]);
    group.deactivate("trash-1").unwrap();
    group.deactivate("trash-1").unwrap();
    assert!(!lab.volume("trash-1").active && !grown.path.exists());
    // Without a device it grows, too.
    group.grow("trash-1", 504 * MI).unwrap();
    group.activate("trash-1").unwrap();
    group.activate("trash-1").unwrap();
    assert_eq!(size(&grown.path), 504 * MI);
    run("mount", &[text(&grown.path), lab.place()]);
    assert_eq!(std::fs::read(lab.dir.path().join("f")).unwrap(), b"content");
    common::unmount(&[lab.place()]);
    group.remove("trash-1").unwrap();
    assert!(!grown.path.exists());
    assert_eq!(group.volumes().unwrap().len(), 1);
    // Its successor in the same place has no file system, though the bytes are there.
    lab.make("vol-1", 404 * MI);
    assert_eq!(Command::new("blkid").args(["-p", text(&one.path)]).status().unwrap().code(), Some(2));
}

#[test]
#[ignore = "make test-vm"]
fn what_cannot_be_is_said_in_kinds() {
    let disks = [disk_or_skip!("berth0001"), disk_or_skip!("berth0002")];
    let lab = Lab::on(&disks[..1]);
    let group = &lab.group;
    lab.make("a", 100 * MI);
    lab.make("b", 100 * MI);
    fails(group.create("c", 100 << 30, None, &[]), ErrorKind::Exhausted);
    fails(group.create("c", 100 * MI, Some(2), &[]), ErrorKind::Exhausted);
    fails(group.grow("a", 100 << 30), ErrorKind::Exhausted);
    fails(group.create("a", 100 * MI, None, &[]), ErrorKind::Conflict);
    fails(group.rename("a", "b"), ErrorKind::Conflict);
    fails(group.create("snapshot1", 100 * MI, None, &[]), ErrorKind::Invalid);
    for outcome in [
        group.rename("none", "c"),
        group.remove("none"),
        group.grow("none", 100 * MI),
        group.activate("none"),
        group.deactivate("none"),
        group.retag("none", &[], &strings(&["a"])),
        group.refresh("none"),
    ] {
        fails(outcome, ErrorKind::NotFound);
    }
    // It is as big as that already.
    group.grow("a", 50 * MI).unwrap();
    group.grow("a", 100 * MI).unwrap();
    assert_eq!(group.volumes().unwrap().iter().map(|volume| volume.size).collect::<Vec<_>>(), [100 * MI; 2]);

    let other = |name: &str, disk: &Path| Group::new(name, Some(vec![disk.to_owned()]), PATIENCE).unwrap();
    fails(other("none", &disks[0]).state(), ErrorKind::NotFound);
    fails(other("none", &disks[0]).volumes(), ErrorKind::Unreachable);
    fails(other("none", &disks[0]).remove("a"), ErrorKind::Unreachable);
    // It is there, but not on this disk.
    fails(other("berth-vm", &disks[1]).state(), ErrorKind::NotFound);
    fails(other("berth-vm", Path::new("/dev/nvme77n1")).state(), ErrorKind::Unreachable);
    fails(Group::make("berth-vm", vec![disks[0].clone()], &[], PATIENCE), ErrorKind::Conflict);
    fails(Group::make("other", vec![disks[0].clone()], &[], PATIENCE), ErrorKind::Conflict);
    assert_eq!(lvm::groups_on(&disks, PATIENCE).unwrap(), [(disks[0].clone(), Some("berth-vm".to_owned()))]);
}

#[test]
#[ignore = "make test-vm"]
fn what_is_on_a_disk_is_not_overwritten() {
    let disks = [disk_or_skip!("berth0001"), disk_or_skip!("berth0002")];
    let mut lab = Lab::on(&disks[..1]);
    let disk = &disks[1];
    run("mkfs.xfs", &["-q", "-f", "-K", text(disk)]);
    fails(Group::make("other", vec![disk.clone()], &[], PATIENCE), ErrorKind::Precondition);
    fails(lab.group.extend(disk), ErrorKind::Precondition);
    run("mount", &[text(disk), lab.place()]);
    fails(Group::make("other", vec![disk.clone()], &[], PATIENCE), ErrorKind::Precondition);
    fails(lab.group.extend(disk), ErrorKind::Precondition);
    common::unmount(&[lab.place()]);
    assert_eq!(run("blkid", &["-p", "-s", "TYPE", "-o", "value", text(disk)]).trim(), "xfs");
    run("wipefs", &["-q", "-a", text(disk)]);
    // What an interrupted making leaves is known, and can be used.
    run("pvcreate", &["-q", text(disk)]);
    assert_eq!(lvm::groups_on(std::slice::from_ref(disk), PATIENCE).unwrap(), [(disk.clone(), None)]);
    lab.group.extend(disk).unwrap();
    assert_eq!(lab.group.state().unwrap().disks.len(), 2);
    lab.disks.push(disk.clone());
}

#[test]
#[ignore = "make test-vm"]
fn what_a_tenant_writes_into_a_volume_is_not_seen() {
    let disk = disk_or_skip!("berth0001");
    // A group of the same name, made elsewhere.
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(100 * MI).unwrap();
    let device = run("losetup", &["--find", "--show", text(&image)]);
    run("vgcreate", &["-q", "berth-vm", device.trim()]);
    run("losetup", &["-d", device.trim()]);
    let _ = std::fs::remove_dir_all("/dev/berth-vm");

    let lab = Lab::on(&[disk]);
    let volume = lab.make("vol-1", 100 * MI);
    let state = lab.group.state().unwrap();
    std::fs::write(&volume, std::fs::read(&image).unwrap()).unwrap();
    run("losetup", &[device.trim(), text(&image)]);
    for disks in [Some(lab.disks.clone()), None] {
        let group = Group::new("berth-vm", disks, PATIENCE).unwrap();
        assert_eq!(group.state().unwrap(), state);
        assert_eq!(group.volumes().unwrap().len(), 1);
    }
    run("losetup", &["-d", device.trim()]);
}

#[test]
#[ignore = "make test-vm"]
fn a_group_that_cannot_be_read_is_not_absent() {
    let disk = disk_or_skip!("berth0001");
    let table = |target: &str| format!("0 2097152 {target}");
    run("wipefs", &["-q", "-a", text(&disk)]);
    run("dmsetup", &["create", "bad", "--table", &table(&format!("linear {} 0", text(&disk)))]);
    let mut lab = Lab::on(&["/dev/mapper/bad".into()]);
    lab.disks.push(disk.clone());
    lab.group.state().unwrap();
    // LVM leaves the one out, and fails with the other.
    for target in ["error".to_owned(), format!("flakey {} 0 0 60", text(&disk))] {
        run("dmsetup", &["suspend", "bad"]);
        run("dmsetup", &["load", "bad", "--table", &table(&target)]);
        run("dmsetup", &["resume", "bad"]);
        fails(lab.group.state(), ErrorKind::Internal);
        fails(lvm::groups_on(&["/dev/mapper/bad".into()], PATIENCE), ErrorKind::Internal);
        assert_ne!(lab.group.volumes().unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
#[ignore = "make test-vm"]
fn a_disk_that_is_pulled_out_is_missing() {
    let disks = [disk_or_skip!("berth0001"), disk_or_skip!("berth0003")];
    let lab = Lab::on(&disks);
    let group = &lab.group;
    group.create("both", 100 * MI, Some(2), &[]).unwrap();
    let first = lab.make("first", 100 * MI);
    let second = disks::name(&disks[1]);
    let pci = std::fs::canonicalize(format!("/sys/block/{second}/device/device")).unwrap();
    std::fs::write(pci.join("remove"), "1").unwrap();
    assert!(!disks[1].exists());

    let state = group.state().unwrap();
    assert_eq!(state.disks.iter().filter(|disk| disk.path.is_none()).count(), 1);
    assert!(state.free < 8 << 30 && state.size > 15 << 30);
    let volume = |name: &str| lab.volume(name);
    assert_eq!((volume("both").partial, volume("first").partial), (true, false));
    assert_eq!(volume("both").disks, [disks[0].clone()]);
    // Little is changed in a group that misses a disk: volumes are removed, and get other tags.
    fails(group.create("third", 100 * MI, None, &[]), ErrorKind::Precondition);
    fails(group.grow("first", 200 * MI), ErrorKind::Precondition);
    fails(group.rename("first", "second"), ErrorKind::Precondition);
    group.retag("first", &[], &strings(&["a"])).unwrap();
    group.deactivate("first").unwrap();
    group.activate("first").unwrap();
    assert_eq!(size(&first), 100 * MI);
    group.deactivate("both").unwrap();
    fails(group.activate("both"), ErrorKind::Precondition);
    group.remove("first").unwrap();

    // The machine still has it.
    std::fs::write("/sys/bus/pci/rescan", "1").unwrap();
    let end = Instant::now() + PATIENCE;
    let back = loop {
        if let Some(disk) = disks::find("berth0003", 1).filter(|disk| disk.exists()) {
            break disk;
        }
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(100));
    };
    let group = Group::new("berth-vm", Some(vec![disks[0].clone(), back.clone()]), PATIENCE).unwrap();
    fails(group.activate("both"), ErrorKind::Precondition);
    group.restore(&back).unwrap();
    group.activate("both").unwrap();
    assert!(group.state().unwrap().disks.iter().all(|disk| disk.path.is_some()));
}

#[test]
#[ignore = "make test-vm"]
fn an_interrupted_command_is_made_good() {
    let disk = disk_or_skip!("berth0001");
    let lab = Lab::on(std::slice::from_ref(&disk));
    let device = lab.make("vol-1", 100 * MI);
    // Grown, and killed before the device's I/O went on.
    run("dmsetup", &["suspend", "berth--vm-vol--1"]);
    assert!(lab.volume("vol-1").suspended);
    lab.group.grow("vol-1", 100 * MI).unwrap();
    assert!(!lab.volume("vol-1").suspended);
    assert_eq!(size(&device), 100 * MI);

    // Another command holds the group's lock.
    let lock = File::create("/run/lock/lvm/V_berth-vm").unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let hasty = Group::new("berth-vm", Some(vec![disk]), Duration::from_secs(4)).unwrap();
    let begun = Instant::now();
    fails(hasty.create("vol-2", 100 * MI, None, &[]), ErrorKind::OutcomeUnknown);
    assert!(begun.elapsed() < Duration::from_secs(20));
    drop(lock);
    assert_eq!(lab.group.volumes().unwrap().len(), 1);
    lab.make("vol-2", 100 * MI);
}

#[test]
#[ignore = "make test-vm"]
fn an_encrypted_device_opens_with_its_key_only() {
    let disk = disk_or_skip!("berth0001");
    let lab = Lab::on(&[disk]);
    let device = lab.make("vol-1", 100 * MI);
    // Bytes that a text would end with.
    let key = [b"\0\n\xFFcanary".as_slice(), &[7; 32]].concat();
    assert!(!crypt::is_luks(&device).unwrap());
    crypt::format(&device, &key, Strength::Random, PATIENCE).unwrap();
    assert!(crypt::is_luks(&device).unwrap());
    assert_eq!(crypt::mapping_on(number(&device)).unwrap(), None);
    crypt::open(&device, "crypt-1", &key, PATIENCE).unwrap();
    let mapping = crypt::mapping_on(number(&device)).unwrap().unwrap();
    assert_eq!((mapping.name.as_str(), mapping.device), ("crypt-1", number(&mapping.path())));
    assert_eq!(size(&mapping.path()), 84 * MI);
    fails(crypt::open(&device, "crypt-1", &key, PATIENCE), ErrorKind::Busy);
    fails(crypt::format(&device, &key, Strength::Random, PATIENCE), ErrorKind::Busy);
    let file = File::options().write(true).open(mapping.path()).unwrap();
    file.write_all_at(b"secret words", 4096).unwrap();
    file.sync_all().unwrap();
    fails(crypt::close("crypt-1", PATIENCE), ErrorKind::Busy);
    drop(file);

    lab.group.grow("vol-1", 120 * MI).unwrap();
    fails(crypt::resize("crypt-1", Some(b"canary"), PATIENCE), ErrorKind::Denied);
    crypt::resize("crypt-1", Some(&key), PATIENCE).unwrap();
    assert_eq!(size(&mapping.path()), 104 * MI);
    crypt::close("crypt-1", PATIENCE).unwrap();
    crypt::close("crypt-1", PATIENCE).unwrap();
    for wrong in [b"canary".as_slice(), &key[..key.len() - 1], &[key.as_slice(), b"\n"].concat()] {
        let message = fails(crypt::open(&device, "crypt-1", wrong, PATIENCE), ErrorKind::Denied);
        assert!(!message.contains("canary"), "{message}");
    }
    let holds = |path: &Path| Command::new("grep").args(["-q", "secret words", text(path)]).status().unwrap().success();
    assert!(!holds(&device));
    crypt::open(&device, "crypt-1", &key, PATIENCE).unwrap();
    assert!(holds(&mapping.path()));
    crypt::close("crypt-1", PATIENCE).unwrap();
}

#[test]
#[ignore = "make test-vm"]
fn a_passphrase_is_stretched() {
    let disk = disk_or_skip!("berth0001");
    let lab = Lab::on(&[disk]);
    let device = lab.make("vol-1", 100 * MI);
    let begun = Instant::now();
    crypt::format(&device, b"correct horse", Strength::Passphrase, PATIENCE).unwrap();
    println!("made after {:.1?}", begun.elapsed());
    let shown = run("cryptsetup", &["luksDump", text(&device)]);
    assert!(shown.contains("argon2id") && shown.contains("Memory:     65536"), "{shown}");
    let begun = Instant::now();
    crypt::open(&device, "crypt-1", b"correct horse", PATIENCE).unwrap();
    println!("opened after {:.1?}", begun.elapsed());
    crypt::close("crypt-1", PATIENCE).unwrap();
    fails(crypt::open(&device, "crypt-1", b"correct horse\n", PATIENCE), ErrorKind::Denied);
}

#[test]
#[ignore = "make test-vm"]
fn a_throwaway_device_forgets() {
    let disk = disk_or_skip!("berth0001");
    let lab = Lab::on(&[disk]);
    let device = lab.make("vol-1", 100 * MI);
    crypt::open_throwaway(&device, "throw", PATIENCE).unwrap();
    let mapping = crypt::mapping_on(number(&device)).unwrap().unwrap();
    assert!(mapping.uuid.starts_with("CRYPT-PLAIN"), "{mapping:?}");
    assert_eq!(mapper::above(number(&device)).unwrap(), std::slice::from_ref(&mapping));
    assert_eq!(size(&mapping.path()), 100 * MI);
    std::fs::write(mapping.path(), vec![b'x'; 8192]).unwrap_or_else(|error| panic!("{error}"));
    let read = |path: &Path| {
        let mut bytes = vec![0; 8192];
        File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert_eq!(read(&mapping.path()), vec![b'x'; 8192]);
    lab.group.grow("vol-1", 120 * MI).unwrap();
    crypt::resize("throw", None, PATIENCE).unwrap();
    assert_eq!(size(&mapping.path()), 120 * MI);
    assert_eq!(read(&mapping.path()), vec![b'x'; 8192]);
    crypt::close("throw", PATIENCE).unwrap();
    assert!(!mapping.path().exists());
    crypt::open_throwaway(&device, "throw", PATIENCE).unwrap();
    assert_ne!(read(&mapping.path()), vec![b'x'; 8192]);
    // What lies on a volume keeps it.
    fails(lab.group.remove("vol-1"), ErrorKind::Busy);
    crypt::close("throw", PATIENCE).unwrap();
    lab.group.remove("vol-1").unwrap();
}

#[test]
#[ignore = "make test-vm"]
fn zeros_reach_the_device_in_chunks() {
    let disk = disk_or_skip!("berth0001");
    let lab = Lab::on(&[disk]);
    let device = lab.make("vol-1", 32 * MI);
    run("mkfs.ext4", &["-q", text(&device)]);
    run("mount", &[text(&device), lab.place()]);
    fails(zero::write(&device, 0..MI, MI, |_| ControlFlow::Continue(())), ErrorKind::Busy);
    common::unmount(&[lab.place()]);
    let mut file = File::options().write(true).open(&device).unwrap();
    for _ in 0..32 {
        file.write_all(&[0xAA; MI as usize]).unwrap();
    }
    drop(file);
    fails(zero::write(&device, 1..MI, MI, |_| ControlFlow::Continue(())), ErrorKind::Invalid);
    fails(zero::write(&device, 32 * MI..33 * MI, MI, |_| ControlFlow::Continue(())), ErrorKind::Invalid);
    let begun = Instant::now();
    let mut reached = 0;
    let outcome = zero::write(&device, 0..32 * MI, 4 * MI, |next| {
        reached = next;
        if next == 8 * MI { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((outcome.unwrap(), reached), (ControlFlow::Break(()), 8 * MI));
    let zeros = || {
        // What the device has, not the page cache.
        run("blockdev", &["--flushbufs", text(&device)]);
        let bytes = std::fs::read(&device).unwrap();
        bytes.chunks(MI as usize).map(|chunk| chunk.iter().all(|byte| *byte == 0)).collect::<Vec<_>>()
    };
    assert_eq!(zeros().iter().position(|zero| !zero), Some(8));
    let outcome = zero::write(&device, reached..32 * MI, 4 * MI, |_| ControlFlow::Continue(()));
    assert_eq!(outcome.unwrap(), ControlFlow::Continue(()));
    println!("32 MiB in {:.1?}", begun.elapsed());
    assert_eq!(zeros(), [true; 32]);
}

#[test]
#[ignore = "make test-vm"]
fn a_pods_io_is_slowed_down() {
    const POD: &str = "0f0e-1d2c";
    let disk = disk_or_skip!("berth0001");
    let lab = Lab::on(&[disk]);
    let root = Path::new("/sys/fs/cgroup");
    let group = root.join("kubepods/burstable").join(format!("pod{POD}"));
    let container = group.join("container");
    std::fs::create_dir_all(&container).unwrap();
    // As kubelet does: without it, what is written back counts as nobody's.
    for parent in [root, &root.join("kubepods"), &root.join("kubepods/burstable"), &group] {
        std::fs::write(parent.join("cgroup.subtree_control"), "+memory").unwrap();
    }
    assert_eq!(cgroups::pod_groups(root, POD).unwrap(), std::slice::from_ref(&group));
    assert!(cgroups::pod_groups(root, "0f0e-1d2").unwrap().is_empty());
    assert!(cgroups::limits(&group).unwrap().is_empty());

    let volumes = [lab.make("limited", 400 * MI), lab.make("free", 400 * MI)];
    // Writes 8 MiB in the pod's group.
    let write = |volume: &Path| {
        run("mkfs.xfs", &["-q", "-f", "-K", text(volume)]);
        run("mount", &[text(volume), lab.place()]);
        let script = format!(
            "echo $$ >{}/cgroup.procs && exec dd if=/dev/zero of={}/f bs=1M count=8 conv=fsync status=none",
            text(&container),
            lab.place()
        );
        let begun = Instant::now();
        run("sh", &["-c", &script]);
        let took = begun.elapsed();
        common::unmount(&[lab.place()]);
        took
    };
    let before = write(&volumes[0]);
    let device = number(&volumes[0]);
    let limits = Limits { write_bytes: Some(2 * MI), read_iops: Some(1000), ..Limits::default() };
    cgroups::set_limits(&group, device, limits).unwrap();
    assert_eq!(cgroups::limits(&group).unwrap(), [(device, limits)].into());
    let slow = write(&volumes[0]);
    let other = write(&volumes[1]);
    cgroups::set_limits(&group, device, Limits::default()).unwrap();
    assert!(cgroups::limits(&group).unwrap().is_empty());
    let after = write(&volumes[0]);
    println!("without a limit {before:.1?}, with one {slow:.1?}, on another volume {other:.1?}, lifted {after:.1?}");
    assert!(slow > Duration::from_secs(3));
    for fast in [before, other, after] {
        assert!(fast + Duration::from_millis(1500) < slow);
    }
    let gone = rustix::fs::makedev(250, 99);
    fails(cgroups::set_limits(&group, gone, limits), ErrorKind::NotFound);
    std::fs::remove_dir(&container).unwrap();
    std::fs::remove_dir(&group).unwrap();
    fails(cgroups::set_limits(&group, device, limits), ErrorKind::NotFound);
    fails(cgroups::limits(&group), ErrorKind::NotFound);
}
