//! Pools of disks on NVMe disks, which are pulled out, renamed, worn and occupied. `make test-vm` runs it in a virtual
//! machine with the controllers berth0001 (two namespaces), berth0002 and berth0003, whose contents are lost.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Lab, MI, Use, berth, disks, mounts_below, read, refused, run, write};
use serde_json::Value;
use tonic::Code;

/// The CPU is emulated: all takes longer.
const PATIENCE: Duration = Duration::from_secs(180);

/// A lab whose pools are made of disks, which are blank.
struct Pools {
    lab: Lab,
}

impl Pools {
    /// A pool for each name, of the disks with these serial numbers, further keys behind.
    fn new(pools: &[(&str, &[&str], &str)]) -> Self {
        let mut lab = Lab::bare();
        let pool = |(name, serials, more): &(&str, &[&str], &str)| {
            for serial in *serials {
                for namespace in [1, 2] {
                    if let Some(disk) = disks::find(serial, namespace) {
                        blank(&disk);
                    }
                }
            }
            let path = lab.path(name);
            let serials = serials.join(", ");
            format!("{{name: {name}, path: {}, disks: [{{serials: [{serials}]}}]{more}}}", path.display())
        };
        let pools: Vec<_> = pools.iter().map(pool).collect();
        lab.config.pool = pools.join("\n  - ");
        Self { lab }
    }

    #[track_caller]
    fn berth(&self, words: &[&str], code: i32) -> (String, String) {
        let config = self.lab.write_config();
        let (out, error) = berth(&[words, &["--config", config.to_str().unwrap()]].concat(), code);
        println!("$ berth {}\n{out}{error}", words.join(" "));
        (out, error)
    }

    #[track_caller]
    fn create(&self, name: &str) {
        self.berth(&["pool", "create", name, "--yes"], 0);
    }

    #[track_caller]
    fn parts(&self, name: &str) -> Vec<Value> {
        let (out, _) = self.berth(&["pool", "show", "--json", name], 0);
        let all: Value = serde_json::from_str(&out).unwrap();
        all["pools"][0]["parts"].as_array().unwrap().clone()
    }

    fn unmount(&self, name: &str) {
        for mount in mounts_below(&self.lab.path(name)).iter().rev() {
            common::unmount(&[mount]);
        }
    }
}

impl Drop for Pools {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kernel = Command::new("dmesg").output().unwrap().stdout;
            let kernel = String::from_utf8_lossy(&kernel);
            let lines: Vec<_> = kernel.lines().collect();
            eprintln!("the kernel's last words:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
    }
}

/// Takes everything off a disk, as a person would.
fn blank(disk: &Path) {
    let name = disk.to_str().unwrap();
    let held = format!("for held in /sys/block/{}/holders/*; do", disks::name(disk));
    let release = "[ ! -e $held ] || dmsetup remove --retry /dev/${held##*/}; done";
    run("sh", &["-ec", &format!("{held} {release}")]);
    run("wipefs", &["-qaf", name]);
    let size: u64 = run("blockdev", &["--getsz", name]).trim().parse::<u64>().unwrap() / 2048;
    for seek in [0, size - 1] {
        run("dd", &["if=/dev/zero", &format!("of={name}"), "bs=1M", "count=1", &format!("seek={seek}"), "status=none"]);
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} of {value}"))
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// The PCI device of the controller with this serial number.
fn controller(serial: &str) -> PathBuf {
    let disk = disks::find(serial, 1).unwrap();
    let place = Path::new("/sys/block").join(disk.file_name().unwrap()).canonicalize().unwrap();
    place.ancestors().find(|folder| folder.join("remove").exists()).unwrap().to_owned()
}

/// Waits until the disk is there again, and udev has looked at it.
fn rescan(serials: &[&str]) {
    std::fs::write("/sys/bus/pci/rescan", "1").unwrap();
    let end = Instant::now() + PATIENCE;
    while serials.iter().any(|serial| disks::find(serial, 1).is_none()) {
        assert!(Instant::now() < end, "{serials:?} did not come back");
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = Command::new("udevadm").arg("settle").status();
}

#[test]
#[ignore = "make test-vm"]
fn every_disk_is_shown_with_what_it_is() {
    let disk = disk_or_skip!("berth0001");
    blank(&disk);
    let (out, _) = berth(&["pool", "discover", "--json"], 0);
    let all: Value = serde_json::from_str(&out).unwrap();
    let all = all["disks"].as_array().unwrap();
    assert_eq!(all.iter().filter(|disk| text(disk, "model") == "QEMU NVMe Ctrl").count(), 4, "{out}");
    let shown = all.iter().find(|one| text(one, "path") == disk.to_str().unwrap()).unwrap();
    assert_eq!((text(shown, "serial"), &shown["blank"], text(shown, "verdict")), ("berth0001", &true.into(), "none"));
    assert_eq!(shown["size"].as_u64(), Some(1 << 30));
    let links = shown["links"].as_array().unwrap();
    assert!(links.contains(&"/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_berth0001_1".into()), "{links:?}");
    println!("{}", berth(&["pool", "discover"], 0).0);
}

/// Each occupies the disk `$D`, and is undone by the second command; `$M` is a directory.
const OCCUPANTS: [(&str, &str, &str); 12] = [
    ("mkfs.ext4 -q $D", "true", "signature ext4"),
    ("mkfs.xfs -q $D", "true", "signature xfs"),
    ("mkfs.xfs -q $D && mount $D $M", "umount $M", "mounted at"),
    ("mkswap -q $D && swapon $D", "swapoff $D", "used as swap"),
    ("pvcreate -qq $D", "true", "signature LVM2_member"),
    (
        "vgcreate -qq busy $D && lvcreate -qq -Wn -L 100M -n lv busy",
        "vgchange -qq -an busy; vgremove -qqff busy; pvremove -qqff $D",
        "a part of dm-",
    ),
    ("echo -n x | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $D -", "true", "crypto_LUKS"),
    ("sgdisk -o $D", "true", "signature gpt"),
    ("sgdisk -n 1:2048:0 $D && udevadm settle", "sgdisk -d 1 $D && udevadm settle", "partitions nvme"),
    (
        "sgdisk -n 1:2048:0 $D && udevadm settle && mkfs.ext4 -q ${D}p1 && mount ${D}p1 $M",
        "umount $M && sgdisk -d 1 $D && udevadm settle",
        "used exclusively by somebody",
    ),
    ("losetup /dev/loop60 $D", "losetup -d /dev/loop60", "a part of loop60"),
    ("printf x | dd of=$D bs=1 seek=1048575 conv=notrunc status=none", "true", "data at byte 1048575"),
];

/// > A disk that holds anything, or that anybody uses, is refused with what was found, and left as it is.
#[test]
#[ignore = "make test-vm"]
fn an_occupied_disk_is_refused_and_left_as_it_is() {
    let disk = disk_or_skip!("berth0002");
    let pools = Pools::new(&[("fast", &["berth0002"], "")]);
    let place = pools.lab.path("place");
    std::fs::create_dir(&place).unwrap();
    let shell = |script: &str| {
        let script = format!("D={} M={}; {script}", disk.display(), place.display());
        run("sh", &["-ec", &script])
    };
    for (occupy, undo, found) in OCCUPANTS {
        println!("== {occupy}");
        shell(occupy);
        let ends = "sync; (head -c 4M $D; tail -c 4M $D) | sha256sum";
        let before = shell(ends);
        let (out, _) = pools.berth(&["pool", "create", "fast", "--yes"], 1);
        assert!(out.contains("left alone") && out.contains(found), "{occupy}: {out}");
        assert_eq!(shell(ends), before, "{occupy}");
        shell(undo);
        blank(&disk);
    }
    pools.create("fast");
}

/// > A pool of disks is found by what is on them, whatever they are called after a boot.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_pool_has_quotas_fails_fast_and_is_found_under_other_names() {
    skip_unless!(
        disks::find("berth0003", 1).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let mut pools = Pools::new(&[("fast", &["berth0002", "berth0003"], "")]);
    pools.create("fast");
    let parts = pools.parts("fast");
    assert_eq!(parts.len(), 2);
    for part in &parts {
        assert_eq!((&part["quotas"], &part["reflink"], &part["trouble"]), (&true.into(), &true.into(), &Value::Null));
        // What QEMU's controller says.
        assert_eq!(
            (&part["disks"][0]["smart"]["temperature"], &part["disks"][0]["smart"]["critical_warning"]),
            (&50.into(), &0.into())
        );
        for file in ["EIO/max_retries", "ENODEV/retry_timeout_seconds", "default/max_retries", "ENOSPC/max_retries"] {
            let path = format!("/sys/fs/xfs/{}/error/metadata/{file}", text(&part["disks"][0], "name"));
            assert_eq!(std::fs::read_to_string(path).unwrap().trim(), "0");
        }
    }
    let client = pools.lab.start().await;
    let first = client.make_and_mount(&pools.lab, "a", 600 * MI, &Use::default()).await;
    let second = client.make_and_mount(&pools.lab, "b", 600 * MI, &Use::default()).await;
    write(first.file("f"), "one");
    write(second.file("f"), "two");
    client.unmount(&first).await;
    client.unmount(&second).await;
    pools.lab.kill();
    pools.unmount("fast");

    // Another order of finding the controllers gives them other names.
    let serial = |part: &Value| text(&part["disks"][0], "serial").to_owned();
    let name = |serial: &str| disks::find(serial, 1).unwrap();
    let before = [name("berth0002"), name("berth0003")];
    let slots = [controller("berth0002"), controller("berth0003")];
    let driver = Path::new("/sys/bus/pci/drivers/nvme");
    let slot = |place: &Path| place.file_name().unwrap().to_str().unwrap().to_owned();
    let mut order = slots.clone();
    if before[0] < before[1] {
        order.reverse();
    }
    for place in &order {
        std::fs::write(driver.join("unbind"), slot(place)).unwrap();
    }
    for (place, serial) in order.iter().map(|place| (place, if *place == slots[0] { "berth0002" } else { "berth0003" }))
    {
        std::fs::write(driver.join("bind"), slot(place)).unwrap();
        let end = Instant::now() + PATIENCE;
        while disks::find(serial, 1).is_none() {
            assert!(Instant::now() < end, "{serial} did not come back");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    println!("{before:?} are now {:?}", [name("berth0002"), name("berth0003")]);

    let client = pools.lab.start().await;
    let now = pools.parts("fast");
    for part in &parts {
        let same = now.iter().find(|one| one["uuid"] == part["uuid"]).unwrap();
        assert_eq!((serial(same), &same["trouble"], &same["quotas"]), (serial(part), &Value::Null, &true.into()));
        assert_ne!(same["disks"][0]["name"], part["disks"][0]["name"]);
    }
    for (mounted, name, content) in [(&first, "a", b"one"), (&second, "b", b"two")] {
        let mounted = client.mount(&pools.lab, &mounted.id, name, &Use::default()).await;
        assert_eq!(read(mounted.file("f")), content);
        client.remove(&mounted).await;
    }
}

/// > A disk of a pool that is gone makes itself missed and nothing else; when it is back, so are its volumes.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_disk_that_is_pulled_out_takes_nothing_else_with_it_and_may_come_back() {
    skip_unless!(
        disks::find("berth0003", 1).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let mut pools = Pools::new(&[("fast", &["berth0002", "berth0003"], "")]);
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    pools.lab.config.extra = format!("http: {{address: '127.0.0.1:{port}'}}");
    pools.create("fast");
    let client = pools.lab.start().await;
    let first = client.make_and_mount(&pools.lab, "a", 600 * MI, &Use::fs("ext4")).await;
    let second = client.make_and_mount(&pools.lab, "b", 600 * MI, &Use::fs("xfs")).await;
    write(first.file("f"), "one");
    write(second.file("f"), "two");
    let lies_on = |id: &str, part: &Value| Path::new(text(part, "path")).join("volumes").join(id).exists();
    let parts = pools.parts("fast");
    let part = parts.iter().find(|part| lies_on(&first.id, part)).unwrap();
    let serial = text(&part["disks"][0], "serial").to_owned();
    let other = if serial == "berth0002" { "berth0003" } else { "berth0002" };
    eventually("figures of both", async || metrics(port).matches("berth_disk_wear_percent{").count() == 2).await;

    let room = client.capacity().await.available_capacity;
    std::fs::write(controller(&serial).join("remove"), "1").unwrap();
    // Nothing waits for it.
    let begun = Instant::now();
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    let left = client.capacity().await.available_capacity;
    assert!(left > 0 && left < room, "{left} of {room}");
    refused(client.stage(&first.id, &pools.lab.staging("again"), &Use::fs("ext4")).await, Code::Unavailable);
    assert_eq!(client.health(&second.id).await.unwrap(), [""; 0]);
    write(second.file("g"), "goes on");
    let third = client.make_and_mount(&pools.lab, "c", 100 * MI, &Use::default()).await;
    client.remove(&third).await;
    println!("answered within {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(60));
    let shown = pools.parts("fast");
    let gone = shown.iter().find(|one| one["uuid"] == part["uuid"]).unwrap();
    assert!(!gone["trouble"].is_null() && gone["size"].is_null(), "{gone}");
    assert!(shown.iter().any(|one| one["disks"][0]["serial"] == other && one["trouble"].is_null()), "{shown:?}");
    // A fresh driver, too, goes on with the other one.
    let client = pools.lab.restart().await;
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    assert_eq!(read(second.file("g")), b"goes on");
    eventually("the metric", async || metrics(port).contains(&format!("pool=\"fast\",disk=\"{other}\"}} 1"))).await;

    // It comes back, and waits for the pod that still has what went.
    rescan(&[&serial]);
    eventually("the pod is waited for", async || {
        client.storage_health().await;
        pools.lab.log().contains("pods still use the volumes that went with it")
    })
    .await;
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    client.unpublish(&first.id, &first.target).await.unwrap();
    client.unstage(&first.id, &first.staging).await.unwrap();
    eventually("the disk is used again", async || client.storage_health().await.is_empty()).await;
    let back = client.mount(&pools.lab, &first.id, "a", &Use::fs("ext4")).await;
    assert_eq!(read(back.file("f")), b"one");
    for mounted in [&back, &second] {
        assert_eq!(client.health(&mounted.id).await.unwrap(), [""; 0]);
        client.remove(mounted).await;
    }
}

#[tokio::test]
#[ignore = "make test-vm"]
async fn a_disk_that_warns_is_told_and_a_file_system_that_stops_is_no_other_ones_trouble() {
    skip_unless!(
        disks::find("berth0003", 1).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let mut pools = Pools::new(&[("fast", &["berth0002"], ""), ("slow", &["berth0003"], "")]);
    pools.create("fast");
    pools.create("slow");
    // It is 323 K warm, and from now on should have less.
    let disk = disks::find("berth0002", 1).unwrap();
    let place = Path::new("/sys/block").join(disks::name(&disk)).join("device").canonicalize().unwrap();
    let controller = format!("/dev/{}", place.file_name().unwrap().to_str().unwrap());
    run("nvme", &["set-feature", &controller, "-f", "4", "-v", "0x12c"]);
    let client = pools.lab.start().await;
    eventually("the warning", async || client.storage_health().await == ["DiskWarning"]).await;
    let in_pool = |name: &str, pool: &str| {
        let mut request = common::Client::request(name, 600 * MI, &Use::default());
        request.parameters.insert("pool".to_owned(), pool.to_owned());
        request
    };
    let warned = client.try_create(in_pool("a", "fast")).await.unwrap().volume_id;
    let other = client.try_create(in_pool("b", "slow")).await.unwrap().volume_id;
    assert_eq!(client.health(&warned).await.unwrap(), ["DiskWarning"]);
    assert_eq!(client.health(&other).await.unwrap(), [""; 0]);
    let (out, _) = pools.berth(&["doctor"], 0);
    assert!(out.contains("warning  pool fast  nvme") && out.contains("its temperature is out of range"), "{out}");
    assert!(pools.parts("fast")[0]["warnings"][0].as_str().unwrap().contains("(serial berth0002) warns"));
    run("nvme", &["set-feature", &controller, "-f", "4", "-v", "0x157"]);

    let path = text(&pools.parts("fast")[0], "path").to_owned();
    run("xfs_io", &["-x", "-c", "shutdown", &path]);
    let health = client.storage_health().await;
    assert!(health.contains(&"PoolStopped".to_owned()), "{health:?}");
    refused(client.stage(&warned, &pools.lab.staging("a"), &Use::default()).await, Code::Unavailable);
    let mounted = client.mount(&pools.lab, &other, "b", &Use::default()).await;
    client.remove(&mounted).await;
    assert!(pools.berth(&["doctor"], 1).0.contains("has stopped"));
    // Mounted anew it goes on.
    pools.lab.kill();
    pools.unmount("fast");
    let client = pools.lab.start().await;
    assert_eq!(client.health(&warned).await.unwrap(), [""; 0]);
    client.delete(&warned).await.unwrap();
}

#[tokio::test]
#[ignore = "make test-vm"]
async fn namespaces_of_one_controller_are_disks_of_their_own() {
    skip_unless!(
        disks::find("berth0001", 2).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let mut pools = Pools::new(&[("fast", &["berth0001"], ", create: true")]);
    let client = pools.lab.start().await;
    eventually("the pool is made", async || client.capacity().await.available_capacity > 1500 * MI).await;
    let parts = pools.parts("fast");
    assert_eq!(parts.len(), 2);
    assert_eq!(parts.iter().map(|part| text(&part["disks"][0], "serial")).collect::<Vec<_>>(), ["berth0001"; 2]);
    assert_eq!(client.storage_health().await, [""; 0]);
}

#[tokio::test]
#[ignore = "make test-vm"]
async fn a_striped_pool_is_one_file_system_over_all_disks() {
    skip_unless!(
        disks::find("berth0003", 1).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let mut pools = Pools::new(&[("wide", &["berth0002", "berth0003"], ", layout: striped")]);
    pools.create("wide");
    let parts = pools.parts("wide");
    let [part] = &parts[..] else { panic!("{parts:?}") };
    assert_eq!((&part["trouble"], &part["quotas"], &part["reflink"]), (&Value::Null, &true.into(), &true.into()));
    assert!(text(part, "uuid").len() == 36 && part["disks"].as_array().unwrap().len() == 2, "{part}");
    let stripes = run("dmsetup", &["table", "berth--wide-pool"]);
    assert!(stripes.contains(" striped 2 128 "), "{stripes}");
    // Nothing of the mark is left, under which it was made.
    for serial in ["berth0002", "berth0003"] {
        let mut sector = [1; 512];
        std::fs::File::open(disks::find(serial, 1).unwrap()).unwrap().read_exact(&mut sector).unwrap();
        assert_eq!(sector, [0; 512], "{serial}");
    }
    assert!(pools.berth(&["pool", "create", "wide", "--yes"], 0).0.contains("belongs to wide already"));

    let client = pools.lab.start().await;
    let mounted = client.make_and_mount(&pools.lab, "a", 1400 * MI, &Use::default()).await;
    write(mounted.file("f"), "wide");
    client.unmount(&mounted).await;
    pools.lab.kill();
    pools.unmount("wide");
    run("dmsetup", &["remove", "--retry", "berth--wide-pool"]);
    // As after a boot: nothing is mounted, and the group has no device.
    assert!(text(&pools.parts("wide")[0], "trouble").contains("is not mounted"));
    let client = pools.lab.start().await;
    eventually("the pool is found", async || client.storage_health().await.is_empty()).await;
    let mounted = client.mount(&pools.lab, &mounted.id, "a", &Use::default()).await;
    assert_eq!(read(mounted.file("f")), b"wide");
    client.unmount(&mounted).await;
    // One disk dies, and all is gone with it.
    pools.lab.kill();
    pools.unmount("wide");
    run("dmsetup", &["remove", "--retry", "berth--wide-pool"]);
    std::fs::write(controller("berth0003").join("remove"), "1").unwrap();
    let client = pools.lab.start().await;
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    refused(client.delete(&mounted.id).await, Code::Unavailable);
    rescan(&["berth0003"]);
    eventually("the disk is back", async || client.storage_health().await.is_empty()).await;
    client.delete(&mounted.id).await.unwrap();
}

/// > Making a pool that was interrupted at any program is gone on with by the same command.
#[test]
#[ignore = "make test-vm"]
fn a_striped_pool_whose_making_was_interrupted_is_made_by_doing_it_again() {
    skip_unless!(
        disks::find("berth0003", 1).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let pools = Pools::new(&[("wide", &["berth0002", "berth0003"], ", layout: striped")]);
    let config = pools.lab.write_config();
    // During the second pvcreate, vgcreate, lvcreate, mkfs, and the vgchange that says that all is done.
    for (time, program) in [(2, "pvcreate"), (3, "vgcreate"), (7, "lvcreate"), (8, "mkfs"), (9, "vgchange")] {
        for serial in ["berth0002", "berth0003"] {
            blank(&disks::find(serial, 1).unwrap());
        }
        let output = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pidfd_open"])
            .args(["-e", &format!("inject=pidfd_open:signal=SIGKILL:when={time}")])
            .args([env!("CARGO_BIN_EXE_berth"), "pool", "create", "wide", "--yes", "--config"])
            .arg(&config)
            .output()
            .unwrap();
        println!("killed during {program}: {}", output.status);
        assert!(!output.status.success());
        let (out, _) = pools.berth(&["pool", "create", "wide", "--yes"], 0);
        assert!(out.contains(" ok; wear"), "{program}: {out}");
        pools.unmount("wide");
        for place in std::fs::read_dir(pools.lab.path("wide")).unwrap() {
            std::fs::remove_dir(place.unwrap().path()).unwrap();
        }
    }
}

/// > A volume group that Berth makes is zeroed first, and grows by disks that come later.
#[test]
#[ignore = "make test-vm"]
fn a_volume_group_is_zeroed_first_and_grows_by_disks() {
    skip_unless!(
        disks::find("berth0003", 1).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let mut pools = Pools::new(&[("carved", &["berth0002", "berth0003"], ", layout: lvm")]);
    let all = pools.lab.config.pool.clone();
    pools.lab.config.pool = all.replace("berth0002, ", "");
    let [first, second] = ["berth0003", "berth0002"].map(|serial| disks::find(serial, 1).unwrap());
    let secret = ["bs=1M", "seek=300", "count=1", "conv=notrunc,fsync", "status=none"];
    for disk in [&first, &second] {
        run("dd", &[&["if=/dev/urandom", &format!("of={}", disk.display())][..], &secret].concat());
    }
    let is_zero = |disk: &Path| {
        let read =
            format!("dd if={} bs=1M skip=300 count=1 iflag=direct status=none | tr -d '\\0' | wc -c", disk.display());
        run("sh", &["-c", &read]).trim() == "0"
    };
    assert!(!is_zero(&first) && !is_zero(&second));
    pools.create("carved");
    let part = &pools.parts("carved")[0];
    assert_eq!((text(part, "path"), &part["trouble"], &part["promised"]), ("berth-carved", &Value::Null, &0.into()));
    assert!(part["size"].as_u64().unwrap() > 900 << 20, "{part}");
    assert!(is_zero(&first) && !is_zero(&second));
    pools.lab.config.pool = all;
    pools.create("carved");
    let part = &pools.parts("carved")[0];
    assert!(part["size"].as_u64().unwrap() > 1800 << 20 && is_zero(&second), "{part}");
    assert_eq!(part["disks"].as_array().unwrap().len(), 2);
    let tags = run("vgs", &["--noheadings", "-o", "vg_tags", "--config", "devices/use_devicesfile=0", "berth-carved"]);
    assert_eq!(tags.trim(), "berth.layout=lvm");
}

/// > A volume group that Berth has made goes on with the disks that it has, promises no room while one is missing, and takes it back.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_volume_group_that_lacks_a_disk_goes_on_with_the_others_and_takes_it_back() {
    skip_unless!(
        disks::find("berth0003", 1).is_some(),
        "no NVMe disks of the virtual machine; `make test-vm` has them"
    );
    let mut pools = Pools::new(&[("carved", &["berth0002", "berth0003"], ", layout: lvm")]);
    pools.create("carved");
    let client = pools.lab.start().await;
    let usage = Use::fs("ext4");
    let [stays, goes] = [
        client.make_and_mount(&pools.lab, "a", 700 * MI, &usage).await,
        client.make_and_mount(&pools.lab, "b", 700 * MI, &usage).await,
    ];
    write(stays.file("f"), "one");
    write(goes.file("f"), "two");
    // Its device stays, as after any pod.
    client.unmount(&goes).await;
    let devices = run("lvs", &["--noheadings", "-o", "devices", &format!("berth-carved/{}", goes.id)]);
    let serial = ["berth0002", "berth0003"].into_iter().find(|serial| {
        let disk = disks::find(serial, 1).unwrap();
        devices.contains(&format!("{}(", disk.display()))
    });
    let serial = serial.unwrap();
    std::fs::write(controller(serial).join("remove"), "1").unwrap();
    eventually("it is missed", async || client.storage_health().await == ["DiskMissing"]).await;
    assert_eq!(client.capacity().await.available_capacity, 0);
    let message = refused(
        client.try_create(common::Client::request("c", 64 * MI, &usage)).await.map(drop),
        Code::ResourceExhausted,
    );
    assert!(message.contains("lacks a disk"), "{message}");
    write(stays.file("g"), "goes on");
    assert!(client.stage(&goes.id, &pools.lab.staging("again"), &usage).await.is_err());
    // From the first change on LVM counts the disk as missing also when it is there.
    run("lvchange", &["-q", "--addtag", "changed", &format!("berth-carved/{}", stays.id)]);
    rescan(&[serial]);
    eventually("it is taken back", async || client.storage_health().await.is_empty()).await;
    let back = client.mount(&pools.lab, &goes.id, "back", &usage).await;
    assert_eq!(read(back.file("f")), b"two");
    for mounted in [&back, &stays] {
        client.remove(mounted).await;
    }
    let made = client.create("c", 64 * MI, &usage).await;
    client.delete(&made).await.unwrap();
}

/// > A disk that does not answer holds up neither the start nor any other pool.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_disk_that_does_not_answer_holds_up_nobody() {
    let below = disk_or_skip!("berth0001");
    let mut pools = Pools::new(&[("fast", &["berth0002"], "")]);
    blank(&below);
    let place = pools.lab.path("below");
    // A loop device whose file lies on a device that can be held up.
    let script = "
        dmsetup create held --table \"0 $(blockdev --getsz $D) linear $D 0\"
        mkfs.ext4 -q -F /dev/mapper/held && mkdir $P && mount /dev/mapper/held $P && fallocate -l 500M $P/image
        losetup --direct-io=on /dev/loop60 $P/image";
    let script = format!("D={} P={}; {script}", below.display(), place.display());
    run("sh", &["-ec", &script]);
    let path = pools.lab.path("sick");
    let sick = format!("{{name: sick, path: {}, disks: [{{paths: [/dev/loop60]}}]}}", path.display());
    pools.lab.config.pool = format!("{}\n  - {sick}", pools.lab.config.pool);
    pools.lab.config.extra = "deadlines: {command: 20s}".to_owned();
    pools.create("fast");
    pools.create("sick");
    pools.unmount("sick");

    run("dmsetup", &["suspend", "--nolockfs", "--noflush", "held"]);
    let begun = Instant::now();
    let client = pools.lab.start().await;
    let mounted = client.make_and_mount(&pools.lab, "a", 100 * MI, &Use::default()).await;
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    println!("served after {:?}", begun.elapsed());
    let (out, _) = pools.berth(&["pool", "discover"], 0);
    assert!(out.lines().any(|line| line.starts_with("loop60") && line.contains("does not answer")), "{out}");
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
    assert!(pools.lab.log().contains("cannot tell whether loop60 belongs to a pool"));
    run("dmsetup", &["resume", "held"]);
    eventually("it answers again", async || client.storage_health().await.is_empty()).await;

    // And while it is used.
    run("dmsetup", &["suspend", "--nolockfs", "--noflush", "held"]);
    let begun = Instant::now();
    write(mounted.file("f"), "goes on");
    client.remove(&mounted).await;
    client.storage_health().await;
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    run("dmsetup", &["resume", "held"]);
    pools.lab.kill();
    pools.unmount("sick");
    run("sh", &["-ec", &format!("losetup -d /dev/loop60; umount {}; dmsetup remove --retry held", place.display())]);
}

fn metrics(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}
