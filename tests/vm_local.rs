//! What local volumes of all carves promise, on NVMe disks: which carve a class gets, limits of I/O, disks that fail. `make test-vm`
//! runs it in a virtual machine.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use berth::proto::csi;
use common::local::{GROUP, Grouped, lvm, quota_pool};
use common::{Client, GI, Lab, MI, Use, map, read, refused, run, write};
use tonic::Code;

/// > What a class asks for and a directory can't be is refused, and made as an image where the class leaves the choice.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_class_chooses_its_carve() {
    let disk = disk_or_skip!("berth0001");
    let (mut lab, client) = quota_pool(&disk).await;
    let request = |name: &str, usage: &Use, parameters: &[(&str, &str)]| csi::CreateVolumeRequest {
        parameters: map(parameters),
        ..Client::request(name, GI, usage)
    };
    let holds = |lab: &Lab, id: &str| {
        let folder = lab.pool().join("volumes").join(id);
        (folder.join("data").exists(), folder.join("image").exists())
    };
    for (usage, parameters, is_directory) in [
        (Use::default(), vec![], true),
        (Use::fs("xfs"), vec![], true),
        (Use { flags: vec!["noatime".to_owned()], ..Use::default() }, vec![], true),
        (Use::default(), vec![("carve", "directory")], true),
        (Use::fs("ext4"), vec![], false),
        (Use::block(), vec![], false),
        (Use { flags: vec!["logbsize=64k".to_owned()], ..Use::fs("xfs") }, vec![], false),
        (Use::default(), vec![("mkfsOptions", "-L data")], false),
        (Use::default(), vec![("carve", "image")], false),
    ] {
        let volume = client.try_create(request("a", &usage, &parameters)).await.unwrap();
        assert_eq!(holds(&lab, &volume.volume_id), (is_directory, !is_directory), "{usage:?} {parameters:?}");
        client.delete(&volume.volume_id).await.unwrap();
    }
    for (usage, parameters) in [
        (Use::fs("ext4"), vec![("carve", "directory")]),
        (Use::block(), vec![("carve", "directory")]),
        (Use::default(), vec![("carve", "directory"), ("mkfsOptions", "-L data")]),
        (Use { flags: vec!["logbsize=64k".to_owned()], ..Use::fs("xfs") }, vec![("carve", "directory")]),
        (Use::default(), vec![("carve", "thin")]),
    ] {
        refused(client.try_create(request("a", &usage, &parameters)).await, Code::InvalidArgument);
    }
    let message =
        refused(client.try_create(request("a", &Use::default(), &[("carve", "lvm")])).await, Code::ResourceExhausted);
    assert!(message.contains("in a volume group"), "{message}");
    let id = client.create("a", GI, &Use::default()).await;
    let message = refused(client.snapshot(&id, "s").await, Code::FailedPrecondition);
    assert!(message.contains("carve image"), "{message}");
    refused(client.create_from("copy", GI, &Use::default(), common::from_volume(&id)).await, Code::FailedPrecondition);
    client.delete(&id).await.unwrap();

    lab.config.pool = lab.config.pool.replace('}', ", carves: [directory]}");
    let client = lab.restart().await;
    refused(client.try_create(request("a", &Use::block(), &[])).await, Code::ResourceExhausted);
    let capacity = async |carve: &str| {
        let request = csi::GetCapacityRequest { parameters: map(&[("carve", carve)]), ..Default::default() };
        client.controller.clone().get_capacity(request).await.unwrap().into_inner().available_capacity
    };
    assert!(capacity("directory").await > GI);
    assert_eq!((capacity("image").await, capacity("lvm").await), (0, 0));
    lab.assert_clean();
}

/// A pod, as far as a driver sees one: kubelet's path for a volume, and a control group.
struct Pod {
    uid: String,
    group: std::path::PathBuf,
    target: String,
}

impl Pod {
    fn new(lab: &Lab, number: u32) -> Self {
        let uid = format!("0{number}-c0ffee");
        let group = Path::new("/sys/fs/cgroup/kubepods/burstable").join(format!("pod{uid}"));
        let parent = lab.path(&format!("pods/{uid}/volumes/kubernetes.io~csi/pvc"));
        std::fs::create_dir_all(&parent).unwrap();
        Self { uid, group, target: parent.join("mount").to_str().unwrap().to_owned() }
    }

    fn start(&self) {
        std::fs::create_dir_all(&self.group).unwrap();
    }

    /// How long writing and syncing so many MiB takes in its control group.
    fn write(&self, megabytes: u32) -> Duration {
        let script = format!(
            "echo $$ >{}/cgroup.procs && dd if=/dev/zero of={}/f bs=1M count={megabytes} conv=fsync 2>/dev/null",
            self.group.display(),
            self.target
        );
        let begun = Instant::now();
        run("sh", &["-c", &script]);
        begun.elapsed()
    }

    fn limits(&self) -> String {
        std::fs::read_to_string(self.group.join("io.max")).unwrap_or_default()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.group);
        let _ = std::fs::remove_dir(self.group.parent().unwrap());
        let _ = std::fs::remove_dir(self.group.parent().unwrap().parent().unwrap());
    }
}

/// > Each pod that uses a volume with limits of I/O is held to them, whether its control group comes before or after the volume, and
/// > also after the driver has been restarted; a changed limit counts at once. A directory, which shares its disk's queue, has none.
#[tokio::test]
#[ignore = "make test-vm"]
async fn pods_are_held_to_a_volumes_limits() {
    let (one, two) = (disk_or_skip!("berth0001"), disk_or_skip!("berth0002"));
    let (lab, client) = quota_pool(&one).await;
    limits_hold(lab, client.clone(), "image").await;
    let (mut grouped, client) = Grouped::on(&[two]).await;
    let lab = std::mem::replace(&mut grouped.lab, Lab::bare());
    grouped.lab = limits_hold(lab, client, "lvm").await;
    grouped.assert_clean();
}

async fn limits_hold(mut lab: Lab, client: Client, carve: &str) -> Lab {
    let usage = Use::fs("ext4");
    let request = lvm("a", 256 * MI, &usage, &[("carve", carve), ("bandwidth", "4Mi"), ("readIops", "500")]);
    let id = client.try_create(request).await.unwrap().volume_id;
    let staging = lab.staging("a");
    client.stage(&id, &staging, &usage).await.unwrap();
    let (before, after) = (Pod::new(&lab, 1), Pod::new(&lab, 2));
    before.start();
    for pod in [&before, &after] {
        client.publish(&id, &staging, &pod.target, &usage).await.unwrap();
    }
    let expected = "rbps=4194304 wbps=4194304 riops=500 wiops=max";
    assert!(before.limits().contains(expected), "{}", before.limits());
    after.start();
    let client = if carve == "lvm" { lab.restart().await } else { client };
    let end = Instant::now() + Duration::from_secs(20);
    while !after.limits().contains(expected) && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(after.limits().contains(expected), "{} of {}", after.limits(), after.uid);
    // Eight seconds' worth at the limit: no machine is so slow that this says nothing, nor so fast.
    let slow = before.write(32);
    assert!(slow > Duration::from_secs(5), "{slow:?}");
    let modify = async |key: &str, value: &str| {
        let request = csi::ControllerModifyVolumeRequest {
            volume_id: id.clone(),
            mutable_parameters: map(&[(key, value)]),
            ..Default::default()
        };
        client.controller.clone().controller_modify_volume(request).await.map(drop)
    };
    modify("bandwidth", "none").await.unwrap();
    modify("writeIops", "100000").await.unwrap();
    assert!(after.limits().contains("rbps=max wbps=max riops=500 wiops=100000"), "{}", after.limits());
    let fast = before.write(32);
    println!("{carve}: 32 MiB at 4 MiB/s {slow:.1?}, without limit {fast:.1?}");
    assert!(fast < slow, "{fast:?}");
    refused(modify("iops", "0").await, Code::InvalidArgument);
    refused(modify("speed", "1").await, Code::InvalidArgument);
    for pod in [&before, &after] {
        client.unpublish(&id, &pod.target).await.unwrap();
    }
    client.unstage(&id, &staging).await.unwrap();
    client.delete(&id).await.unwrap();
    if carve == "image" {
        let directory = client.create("d", 64 * MI, &Use::default()).await;
        let request = csi::ControllerModifyVolumeRequest {
            volume_id: directory.clone(),
            mutable_parameters: map(&[("iops", "100")]),
            ..Default::default()
        };
        refused(client.controller.clone().controller_modify_volume(request).await, Code::InvalidArgument);
        client.delete(&directory).await.unwrap();
        let both = lvm("d", 64 * MI, &Use::default(), &[("carve", "directory"), ("iops", "100")]);
        refused(client.try_create(both).await, Code::InvalidArgument);
        // Where the class leaves the carve open, a limit makes it an image.
        let chosen = client.try_create(lvm("d", 64 * MI, &Use::fs("ext4"), &[("iops", "100")])).await.unwrap();
        client.delete(&chosen.volume_id).await.unwrap();
        lab.assert_clean();
    }
    lab
}

/// A device that passes everything on to a disk, until it is told to fail.
struct Faulty(String);

impl Faulty {
    fn on(disk: &Path) -> Self {
        let sectors = run("blockdev", &["--getsz", disk.to_str().unwrap()]);
        let name = "berth-faulty".to_owned();
        let table = format!("0 {} linear {} 0", sectors.trim(), disk.display());
        run("dmsetup", &["create", "--noudevsync", &name, "--table", &table]);
        run("dmsetup", &["mknodes", &name]);
        Self(name)
    }

    fn path(&self) -> std::path::PathBuf {
        Path::new("/dev/mapper").join(&self.0)
    }

    fn fail(&self) {
        let sectors = run("blockdev", &["--getsz", self.path().to_str().unwrap()]);
        run("dmsetup", &["reload", &self.0, "--table", &format!("0 {} error", sectors.trim())]);
        run("dmsetup", &["suspend", "--nolockfs", "--noflush", &self.0]);
        run("dmsetup", &["resume", "--noudevsync", &self.0]);
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        let _ = Command::new("dmsetup").args(["remove", "--noudevsync", "-f", &self.0]).status();
    }
}

/// A call that has to be answered in time, however.
async fn in_time<T>(what: &str, call: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), call).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

/// > A disk that fails makes its own pool unwell and nobody else's: calls on it are answered, its volumes can be taken away from their
/// > places, and other pools' volumes are made, written and deleted as before.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_failing_disk_takes_nobody_along() {
    let (good, bad) = (disk_or_skip!("berth0001"), disk_or_skip!("berth0002"));
    let faulty = Faulty::on(&bad);
    let mut lab = Lab::bare();
    lab.make_pool_on("pool", &good);
    lab.make_pool_on("bad", &faulty.path());
    lab.config.pool = format!(
        "{{name: good, path: {}}}\n  - {{name: bad, path: {}}}",
        lab.pool().display(),
        lab.path("bad").display()
    );
    let client = lab.start().await;
    let make = async |name: &str, pool: &str, usage: &Use| {
        client.try_create(lvm(name, 64 * MI, usage, &[("pool", pool)])).await.map(|volume| volume.volume_id)
    };
    let on_good = make("a", "good", &Use::default()).await.unwrap();
    let on_bad = make("b", "bad", &Use::default()).await.unwrap();
    let image_on_bad = make("c", "bad", &Use::fs("ext4")).await.unwrap();
    let a = client.mount(&lab, &on_good, "a", &Use::default()).await;
    let b = client.mount(&lab, &on_bad, "b", &Use::default()).await;
    let c = client.mount(&lab, &image_on_bad, "c", &Use::fs("ext4")).await;
    for mounted in [&a, &b, &c] {
        write(mounted.file("f"), "before");
    }
    faulty.fail();
    // The program sees the error, and the file system stops soon after.
    let failing = |path: std::path::PathBuf| {
        std::thread::spawn(move || {
            std::fs::File::create(path)
                .and_then(|mut file| file.write_all(&[1; 1 << 20]).and_then(|()| file.sync_all()))
        })
    };
    assert!(failing(b.file("g")).join().unwrap().is_err());
    let _ = failing(c.file("g")).join();
    let end = Instant::now() + Duration::from_secs(60);
    while in_time("GetStorageHealth", client.storage_health()).await.is_empty() && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let health = client.storage_health().await;
    assert!(health.iter().any(|reason| reason == "PoolMissing" || reason == "PoolStopped"), "{health:?}");
    assert!(!in_time("health of b", client.health(&on_bad)).await.unwrap_or(vec!["error".to_owned()]).is_empty());
    assert_eq!(in_time("health of a", client.health(&on_good)).await.unwrap(), [""; 0]);
    let _ = in_time("statistics of b", client.total(&b.id, &b.target)).await;
    assert!(in_time("create on the bad one", make("d", "bad", &Use::default())).await.is_err());
    assert!(in_time("delete on the bad one", client.delete(&on_bad)).await.is_err());

    // The other goes on, also where the class leaves the choice.
    write(a.file("f"), "after");
    assert_eq!(read(a.file("f")), b"after");
    let chosen = in_time("create", client.create("e", 64 * MI, &Use::default())).await;
    assert!(lab.pool().join("volumes").join(&chosen).exists());
    in_time("delete", client.delete(&chosen)).await.unwrap();
    assert!(client.capacity().await.available_capacity > GI);
    // The driver starts beside it, and pods that had its volumes can end.
    let client = in_time("restart", lab.restart()).await;
    for mounted in [&b, &c] {
        in_time("unpublish", client.unpublish(&mounted.id, &mounted.target)).await.unwrap();
        in_time("unstage", client.unstage(&mounted.id, &mounted.staging)).await.unwrap();
    }
    in_time("remove", client.remove(&a)).await;
    lab.kill();
    for _ in 0..2 {
        let _ = Command::new("umount").arg(lab.path("bad")).status();
    }
}

/// > An NVMe disk that is pulled out takes its volume group's volumes along and nothing else; when it is back, they are.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_pulled_disk_takes_its_group_along_and_brings_it_back() {
    let (good, pulled) = (disk_or_skip!("berth0001"), disk_or_skip!("berth0003"));
    let (mut grouped, client) = Grouped::on(std::slice::from_ref(&pulled)).await;
    let id = client.create("a", 64 * MI, &Use::fs("ext4")).await;
    let mounted = client.mount(&grouped.lab, &id, "a", &Use::fs("ext4")).await;
    write(mounted.file("f"), "precious");
    client.unmount(&mounted).await;
    grouped.lab.make_pool_on("pool", &good);
    grouped.lab.config.pool =
        format!("{{name: files, path: {}}}\n  - {{name: main, group: {GROUP}}}", grouped.lab.pool().display());
    let client = grouped.lab.restart().await;
    run("lvchange", &["-an", GROUP]);
    let controller = Path::new("/sys/block").join(pulled.file_name().unwrap()).join("device/device/remove");
    std::fs::write(&controller, "1").unwrap();
    let health = in_time("health", client.storage_health()).await;
    assert!(health.contains(&"PoolMissing".to_owned()), "{health:?}");
    assert!(in_time("stage", client.stage(&id, &grouped.lab.staging("b"), &Use::fs("ext4"))).await.is_err());
    // Nothing is known of it, so nothing is said to be gone.
    let gone = in_time("delete", client.delete(&id)).await.unwrap_err();
    assert!(matches!(gone.code(), Code::Unavailable | Code::Internal), "{gone}");
    let other = in_time("create", client.create("b", 64 * MI, &Use::default())).await;
    // A class that has come to name another pool does not make a second volume of one name.
    let elsewhere = client.try_create(lvm("b", 64 * MI, &Use::default(), &[("pool", "main")])).await;
    refused(elsewhere, Code::AlreadyExists);
    in_time("delete", client.delete(&other)).await.unwrap();
    std::fs::write("/sys/bus/pci/rescan", "1").unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while common::disks::find("berth0003", 1).is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    run("udevadm", &["settle"]);
    let mounted = client.mount(&grouped.lab, &id, "back", &Use::fs("ext4")).await;
    assert_eq!(read(mounted.file("f")), b"precious");
    client.remove(&mounted).await;
    grouped.assert_clean();
}

/// > A pool over several disks is one volume group, or one file system striped over all of them: made once, of blank disks only, found
/// > and mounted again when the driver starts.
#[tokio::test]
#[ignore = "make test-vm"]
async fn pools_over_several_disks() {
    let disks = [disk_or_skip!("berth0002"), disk_or_skip!("berth0003")];
    // Blank, as berth wants them: both ends.
    let clear = || {
        for disk in &disks {
            run("wipefs", &["-q", "-a", disk.to_str().unwrap()]);
            run("blkdiscard", &["-z", "-f", "-l", "4m", disk.to_str().unwrap()]);
            run("blkdiscard", &["-z", "-f", "-o", &(8 * GI - 4 * MI).to_string(), disk.to_str().unwrap()]);
        }
    };
    for layout in ["lvm", "striped"] {
        clear();
        let mut lab = Lab::bare();
        let place = lab.path("pools");
        lab.config.pool = format!(
            "{{name: wide, layout: {layout}, path: {}, disks: [{{serials: [berth0002, berth0003]}}]}}",
            place.display()
        );
        let config = lab.write_config();
        let pool = |arguments: &[&str], code| {
            let all = [&["pool"][..], arguments, &["--config", config.to_str().unwrap()]].concat();
            let (out, err) = common::berth(&all, code);
            format!("{out}{err}")
        };
        // A disk that holds anything is left alone, and nothing else is made then.
        run("mkfs.ext4", &["-q", "-F", disks[1].to_str().unwrap()]);
        assert!(pool(&["discover"], 0).contains("ext4"));
        clear();
        let made = pool(&["create", "wide", "--yes"], 0);
        println!("{made}");
        let again = pool(&["create", "wide", "--yes"], 0);
        assert!(again.contains("belongs to wide already"), "{again}");
        assert!(pool(&["discover"], 0).contains("belongs to wide"));
        let client = lab.start().await;
        let usage = Use::fs("xfs");
        // More than one disk has.
        let volume = client.try_create(lvm("big", 10 * GI, &usage, &[("pool", "wide")])).await.unwrap();
        let mounted = client.mount(&lab, &volume.volume_id, "big", &usage).await;
        write(mounted.file("f"), "precious");
        client.unmount(&mounted).await;
        lab.kill();
        // As after a reboot.
        let unmount = || {
            for entry in std::fs::read_dir(&place).unwrap() {
                let _ = Command::new("umount").arg(entry.unwrap().path()).status();
            }
        };
        unmount();
        run("lvchange", &["-an", "berth-wide"]);
        let client = lab.start().await;
        let mounted = client.mount(&lab, &volume.volume_id, "again", &usage).await;
        assert_eq!(read(mounted.file("f")), b"precious");
        assert_eq!(client.storage_health().await, [""; 0]);
        let shown = pool(&["show"], 0);
        assert!(shown.contains("wide"), "{shown}");
        client.remove(&mounted).await;
        lab.kill();
        unmount();
        let end = Instant::now() + Duration::from_secs(60);
        while !Command::new("vgremove").args(["-q", "-y", "-f", "berth-wide"]).status().unwrap().success() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_secs(1));
        }
        let _ = std::fs::remove_dir_all("/dev/berth-wide");
    }
    clear();
}
