//! Pools of disks on loop devices, which stand for disks where no disk is free: chosen, refused, made, interrupted,
//! found again, missing. `vm_pools.rs` has what needs real ones.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use berth::proto::csi;
use common::{GI, Lab, MI, Use, berth, is_root, mounts_below, read, refused, run, write};
use serde_json::Value;
use tonic::Code;

const SIZE: u64 = 600 << 20;

/// Disks for a pool called `fast`, whose file systems are mounted below the lab's `pool`.
struct Disks {
    lab: Lab,
    devices: Vec<String>,
}

impl Disks {
    fn new(count: usize) -> Self {
        let mut disks = Self { lab: Lab::bare(), devices: Vec::new() };
        disks.devices = (0..count).map(|number| disks.attach(&format!("disk{number}"))).collect();
        disks.configure("");
        disks
    }

    /// Makes the disk if it is new.
    fn attach(&self, name: &str) -> String {
        let image = self.image(name);
        if !image.exists() {
            File::create(&image).unwrap().set_len(SIZE).unwrap();
        }
        self.attach_at(&Self::free_device(), name)
    }

    fn attach_at(&self, device: &str, name: &str) -> String {
        run("losetup", &[device, self.image(name).to_str().unwrap()]);
        device.to_owned()
    }

    /// No other test gets this one: some detach theirs, and need it again.
    fn free_device() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(100);
        loop {
            let name = format!("loop{}", NEXT.fetch_add(1, Ordering::Relaxed));
            if !Path::new("/sys/block").join(&name).join("loop/backing_file").exists() {
                return format!("/dev/{name}");
            }
        }
    }

    fn image(&self, name: &str) -> PathBuf {
        self.lab.path(&format!("{name}.disk"))
    }

    /// Further keys of the pool.
    fn configure(&mut self, more: &str) {
        let (path, devices) = (self.lab.pool(), self.devices.join(", "));
        self.lab.config.pool =
            format!("{{name: fast, path: {}, disks: [{{paths: [{devices}]}}]{more}}}", path.display());
    }

    #[track_caller]
    fn berth(&self, words: &[&str], code: i32) -> (String, String) {
        let config = self.lab.write_config();
        berth(&[words, &["--config", config.to_str().unwrap()]].concat(), code)
    }

    #[track_caller]
    fn create(&self) -> String {
        self.berth(&["pool", "create", "fast", "--yes"], 0).0
    }

    /// What `berth pool show` says of each part of the pool.
    #[track_caller]
    fn parts(&self) -> Vec<Value> {
        let (out, _) = self.berth(&["pool", "show", "--json", "fast"], 0);
        let all: Value = serde_json::from_str(&out).unwrap();
        all["pools"][0]["parts"].as_array().unwrap().clone()
    }

    /// What `berth pool discover` says of the disks.
    #[track_caller]
    fn discovered(&self) -> Vec<Value> {
        let (out, _) = self.berth(&["pool", "discover", "--json"], 0);
        let all: Value = serde_json::from_str(&out).unwrap();
        let is_ours = |disk: &&Value| self.devices.contains(&disk["path"].as_str().unwrap().to_owned());
        all["disks"].as_array().unwrap().iter().filter(is_ours).cloned().collect()
    }

    fn unmount(&self) {
        for mount in mounts_below(&self.lab.pool()).iter().rev() {
            common::unmount(&[mount]);
        }
    }

    fn detach(&self) {
        for device in &self.devices {
            run("losetup", &["-d", device]);
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} of {value}"))
}

#[test]
fn blank_disks_become_a_pool_and_nothing_is_done_unasked() {
    skip_unless!(is_root(), "needs root");
    let disks = Disks::new(2);
    let found = disks.discovered();
    assert_eq!(found.len(), 2);
    assert!(found.iter().all(|disk| disk["blank"] == true && text(disk, "verdict") == "fits"), "{found:?}");
    // Nobody can be asked here.
    let (out, error) = disks.berth(&["pool", "create", "fast"], 1);
    assert!(out.contains("becomes a part of fast (xfs)") && error.contains("--yes"), "{out}{error}");
    assert!(disks.discovered().iter().all(|disk| disk["blank"] == true));

    let out = disks.create();
    let parts = disks.parts();
    assert_eq!(parts.len(), 2, "{out}");
    for part in &parts {
        let uuid = text(part, "uuid");
        assert!(uuid.starts_with("818d6197-98aa-88fd-"), "{uuid}");
        assert_eq!(text(part, "path"), disks.lab.pool().join(uuid).to_str().unwrap());
        assert_eq!((&part["trouble"], &part["reflink"], &part["promised"]), (&Value::Null, &true.into(), &0.into()));
        let size = part["size"].as_u64().unwrap();
        assert!(size > SIZE * 8 / 10 && size <= SIZE, "{size}");
        let device = text(&part["disks"][0], "name");
        let label = run("blkid", &["-o", "value", "-s", "LABEL", &format!("/dev/{device}")]);
        assert_eq!(label.trim(), "fast");
        let options = run("findmnt", &["-no", "OPTIONS", text(part, "path")]);
        assert!(options.contains("noatime"), "{options}");
        for error in ["EIO", "ENODEV", "default"] {
            let retries = std::fs::read_to_string(format!("/sys/fs/xfs/{device}/error/metadata/{error}/max_retries"));
            assert_eq!(retries.unwrap().trim(), "0");
        }
    }
    assert!(disks.discovered().iter().all(|disk| text(disk, "verdict") == "member"));
    // Again is no other pool.
    assert!(disks.create().contains("belongs to fast already"));
    assert_eq!(disks.parts(), parts);
    let (out, _) = disks.berth(&["doctor"], 0);
    assert_eq!(out.matches("ok      pool fast").count(), 2, "{out}");
}

/// Each makes a disk that is not blank, and says what of it is found.
const OCCUPANTS: [(&str, &str, &str); 10] = [
    ("an ext4", "mkfs.ext4 -q $D", "signature ext4"),
    ("a foreign XFS", "mkfs.xfs -q $D", "signature xfs"),
    ("another pool's XFS", "mkfs.xfs -q -m uuid=11111111-2222-8333-8444-555555555555 $D", "signature xfs"),
    ("swap", "mkswap -q $D", "signature swap"),
    (
        "LUKS",
        "echo -n secret | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $D -",
        "crypto_LUKS",
    ),
    ("a GPT", "sgdisk -o $D >/dev/null", "signature gpt"),
    ("a physical volume", "pvcreate -q --config devices/use_devicesfile=0 $D >/dev/null 2>&1", "LVM2_member"),
    ("a byte at the start", "printf x | dd of=$D bs=1 seek=70000 conv=notrunc status=none", "data at byte 70000"),
    ("a byte at the end", "printf x | dd of=$D bs=1 seek=629145599 conv=notrunc status=none", "data at byte 629145599"),
    ("a mount", "mkfs.ext2 -q $D && mkdir -p $M && mount -o ro $D $M", "mounted at"),
];

#[test]
fn a_disk_that_is_not_blank_is_refused_with_what_is_on_it_and_left_as_it_is() {
    skip_unless!(is_root(), "needs root");
    for (what, command, found) in OCCUPANTS {
        let disks = Disks::new(1);
        let place = disks.lab.path("elsewhere");
        let script = command.replace("$D", &disks.devices[0]).replace("$M", place.to_str().unwrap());
        let status = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status().unwrap();
        if !status.success() && what == "a physical volume" {
            println!("SKIPPED {}: no pvcreate here", module_path!());
            continue;
        }
        assert!(status.success(), "{script}");
        run("sync", &[]);
        let (image, before) = (disks.image("disk0"), disks.lab.path("before"));
        run("cp", &["--sparse=always", image.to_str().unwrap(), before.to_str().unwrap()]);
        let (out, error) = disks.berth(&["pool", "create", "fast", "--yes"], 1);
        assert!(out.contains("left alone") && out.contains(found), "{what}: {out}");
        assert!(error.contains("nothing was changed"), "{what}: {error}");
        let disk = &disks.discovered()[0];
        assert_eq!((text(disk, "verdict"), &disk["blank"]), ("refused", &false.into()), "{what}");
        run("sync", &[]);
        run("cmp", &[image.to_str().unwrap(), before.to_str().unwrap()]);
        assert_eq!(mounts_below(&disks.lab.pool()), [""; 0], "{what}");
    }
}

#[test]
fn one_disk_that_is_refused_does_not_keep_the_others() {
    skip_unless!(is_root(), "needs root");
    let disks = Disks::new(3);
    run("mkfs.ext4", &["-q", &disks.devices[1]]);
    // One that is too small, and one that nobody can open any more.
    let small = disks.lab.path("small.disk");
    File::create(&small).unwrap().set_len(100 << 20).unwrap();
    let mut disks = disks;
    let device = disks.attach("small");
    disks.devices.push(device);
    disks.configure("");
    let out = disks.create();
    assert!(out.contains("signature ext4") && out.contains("less than 300Mi"), "{out}");
    assert_eq!(disks.parts().len(), 2);
    // What has been refused may come later.
    File::options().write(true).open(&disks.devices[1]).unwrap().write_all_at(&vec![0; 1 << 20], 0).unwrap();
    disks.create();
    assert_eq!(disks.parts().len(), 3);
}

#[test]
fn an_interrupted_making_is_begun_anew_wherever_it_was_interrupted() {
    skip_unless!(is_root(), "needs root");
    let disks = Disks::new(1);
    let config = disks.lab.write_config();
    let (mut half_made, mut deaths) = (0, 0);
    // The first calls of each kind, of berth or of the programs that it starts.
    let steps = [("pwrite64", 1..=8), ("fsync", 1..=2), ("flock", 1..=1), ("vfork", 1..=4), ("clone3", 1..=8)];
    let mounting = ["mkdir", "fsopen", "fsconfig", "fsmount", "move_mount"].map(|step| (step, 1..=1));
    for (call, times) in steps.into_iter().chain(mounting) {
        for time in times {
            let status = Command::new("strace")
                .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
                .args(["-e", &format!("inject={call}:signal=SIGKILL:when={time}")])
                .args([env!("CARGO_BIN_EXE_berth"), "pool", "create", "fast", "--yes", "--config"])
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .unwrap();
            deaths += u32::from(!status.success());
            let verdict = text(&disks.discovered()[0], "verdict").to_owned();
            assert!(["fits", "interrupted", "member"].contains(&verdict.as_str()), "{call} {time}: {verdict}");
            half_made += u32::from(verdict == "interrupted");
            disks.create();
            let parts = disks.parts();
            assert_eq!((parts.len(), &parts[0]["trouble"]), (1, &Value::Null), "{call} {time}: {parts:?}");
            disks.unmount();
            run("xfs_repair", &["-n", &disks.devices[0]]);
            // As a person would clear it.
            std::fs::remove_dir(text(&parts[0], "path")).unwrap();
            let device = File::options().write(true).open(&disks.devices[0]).unwrap();
            device.write_all_at(&vec![0; 1 << 20], 0).unwrap();
            device.sync_all().unwrap();
        }
    }
    assert!(deaths > 15 && half_made > 3, "{deaths} deaths, {half_made} half made");
}

#[tokio::test]
async fn a_pool_is_found_again_whatever_its_disks_are_called() {
    skip_unless!(is_root(), "needs root");
    let mut disks = Disks::new(2);
    disks.create();
    let client = disks.lab.start().await;
    let capacity = client.capacity().await;
    assert!(capacity.available_capacity > capacity.maximum_volume_size.unwrap() * 3 / 2, "{capacity:?}");
    let first = client.make_and_mount(&disks.lab, "a", 400 * MI, &Use::default()).await;
    let second = client.make_and_mount(&disks.lab, "b", 400 * MI, &Use::default()).await;
    write(first.file("f"), "one");
    write(second.file("f"), "two");
    // One on each.
    let parts = disks.parts();
    assert!(parts.iter().all(|part| part["promised"].as_i64() == Some(400 * MI)), "{parts:?}");

    // The driver comes back to a pool that is mounted.
    let client = disks.lab.restart().await;
    client.unmount(&first).await;
    client.unmount(&second).await;
    disks.lab.kill();
    // As after a boot that has found the disks in another order.
    disks.unmount();
    disks.detach();
    let (images, order) = (["disk1", "disk0"], disks.devices.clone());
    for (device, image) in order.iter().zip(images) {
        disks.attach_at(device, image);
    }
    let client = disks.lab.start().await;
    let names = |parts: &[Value]| {
        let mut names: Vec<_> = parts
            .iter()
            .map(|part| (text(part, "uuid").to_owned(), text(&part["disks"][0], "name").to_owned()))
            .collect();
        names.sort();
        names
    };
    let now = disks.parts();
    assert!(now.iter().all(|part| part["trouble"].is_null()), "{now:?}");
    let (before, now) = (names(&parts), names(&now));
    assert_eq!((&before[0].0, &before[0].1, &before[1].1), (&now[0].0, &now[1].1, &now[0].1));
    for (mounted, name, content) in [(&first, "a", b"one"), (&second, "b", b"two")] {
        let mounted = client.mount(&disks.lab, &mounted.id, name, &Use::default()).await;
        assert_eq!(read(mounted.file("f")), content);
        client.remove(&mounted).await;
    }
}

#[tokio::test]
async fn a_disk_that_is_missing_takes_only_its_own_volumes_with_it() {
    skip_unless!(is_root(), "needs root");
    let mut disks = Disks::new(2);
    let other = Disks::free_device();
    disks.devices.push(other.clone());
    disks.configure("");
    disks.create();
    let client = disks.lab.start().await;
    let [one, two] =
        [client.create("a", 400 * MI, &Use::default()).await, client.create("b", 400 * MI, &Use::default()).await];
    let parts = disks.parts();
    let volume_on = |part: &Value, id: &str| PathBuf::from(text(part, "path")).join("volumes").join(id).exists();
    let lost_part = parts.iter().find(|part| volume_on(part, &one)).unwrap();
    disks.lab.kill();
    disks.unmount();
    let lost = format!("/dev/{}", text(&lost_part["disks"][0], "name"));
    run("losetup", &["-d", &lost]);

    let client = disks.lab.start().await;
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    let message = refused(client.stage(&one, &disks.lab.staging("a"), &Use::default()).await, Code::Unavailable);
    assert!(message.contains(text(lost_part, "uuid")), "{message}");
    // A volume that can't be seen is not taken for one that is gone.
    refused(client.delete(&one).await, Code::Unavailable);
    let mounted = client.mount(&disks.lab, &two, "b", &Use::default()).await;
    write(mounted.file("f"), "fine");
    let third = client.create("c", 50 * MI, &Use::default()).await;
    assert!(disks.berth(&["doctor"], 1).0.contains("no disk has the file system"));

    // It comes back under another name while the driver runs.
    disks.attach_at(&other, if lost == disks.devices[0] { "disk0" } else { "disk1" });
    let end = Instant::now() + Duration::from_secs(60);
    while !client.storage_health().await.is_empty() {
        assert!(Instant::now() < end, "{:?}", client.storage_health().await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let back = client.mount(&disks.lab, &one, "a", &Use::default()).await;
    for id in [&back.id, &mounted.id] {
        assert_eq!(client.health(id).await.unwrap(), [""; 0]);
    }
    client.remove(&back).await;
    client.remove(&mounted).await;
    client.delete(&third).await.unwrap();
}

#[tokio::test]
async fn a_file_system_that_stops_is_told_and_used_again_when_it_was_unmounted() {
    skip_unless!(is_root(), "needs root");
    let mut disks = Disks::new(2);
    disks.create();
    let client = disks.lab.start().await;
    let [one, two] = ["a", "b"].map(|name| common::Client::request(name, 400 * MI, &Use::default()));
    let one = client.try_create(one).await.unwrap().volume_id;
    let two = client.try_create(two).await.unwrap().volume_id;
    let lies_on = |part: &&Value| PathBuf::from(text(part, "path")).join("volumes").join(&one).exists();
    let path = text(disks.parts().iter().find(lies_on).unwrap(), "path").to_owned();
    run("xfs_io", &["-x", "-c", "shutdown", &path]);
    assert_eq!(client.storage_health().await, ["PoolStopped"]);
    refused(client.stage(&one, &disks.lab.staging("a"), &Use::default()).await, Code::Unavailable);
    assert_eq!(client.health(&two).await.unwrap(), [""; 0]);
    let mounted = client.mount(&disks.lab, &two, "b", &Use::default()).await;
    client.remove(&mounted).await;
    assert!(disks.berth(&["doctor"], 1).0.contains("has stopped"));
    run("umount", &[&path]);
    let end = Instant::now() + Duration::from_secs(60);
    while !client.storage_health().await.is_empty() {
        assert!(Instant::now() < end, "{}", disks.lab.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    client.delete(&one).await.unwrap();
}

#[tokio::test]
async fn two_copies_of_one_disk_are_both_left_alone() {
    skip_unless!(is_root(), "needs root");
    let mut disks = Disks::new(1);
    disks.create();
    disks.unmount();
    std::fs::copy(disks.image("disk0"), disks.image("copy")).unwrap();
    let copy = disks.attach("copy");
    disks.devices.push(copy.clone());
    disks.configure("");
    let part = &disks.parts()[0];
    assert!(text(part, "trouble").contains("are copies of one file system"), "{part}");
    let client = disks.lab.start().await;
    assert_eq!(client.capacity().await.available_capacity, 0);
    assert_eq!(mounts_below(&disks.lab.pool()), [""; 0]);
    // When one of them is taken away the other is no copy any more.
    run("losetup", &["-d", &copy]);
    let end = Instant::now() + Duration::from_secs(60);
    while client.capacity().await.available_capacity == 0 {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn the_driver_makes_a_pool_only_where_that_is_wanted() {
    skip_unless!(is_root(), "needs root");
    let mut disks = Disks::new(2);
    run("mkfs.ext4", &["-q", &disks.devices[1]]);
    let client = disks.lab.start().await;
    assert_eq!(client.capacity().await.available_capacity, 0);
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    assert!(disks.discovered()[0]["blank"] == true);
    let message = refused(
        client.try_create(common::Client::request("a", MI * 50, &Use::default())).await,
        Code::ResourceExhausted,
    );
    assert!(message.contains("no disk of it is there"), "{message}");
    // Nothing has ever been there, so nothing is there.
    refused(
        client.stage("vol-66570ff0-00000000000000000000000000000000", &disks.lab.staging("x"), &Use::default()).await,
        Code::NotFound,
    );

    disks.lab.kill();
    disks.configure(", create: true");
    let client = disks.lab.start().await;
    let end = Instant::now() + Duration::from_secs(60);
    while client.capacity().await.available_capacity == 0 {
        assert!(Instant::now() < end, "{}", disks.lab.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    disks.lab.assert_says("a disk is not blank: left alone");
    assert_eq!(disks.parts().len(), 1);
    let mounted = client.make_and_mount(&disks.lab, "a", 100 * MI, &Use::default()).await;
    client.remove(&mounted).await;
    assert_eq!(client.storage_health().await, [""; 0]);
}

#[tokio::test]
async fn the_root_disk_stands_in_where_that_is_allowed_and_only_until_there_is_a_disk() {
    skip_unless!(is_root(), "needs root");
    let mut disks = Disks::new(1);
    disks.configure(", fallback: root, cap: 1Gi");
    let client = disks.lab.start().await;
    assert_eq!(client.capacity().await.available_capacity, GI);
    disks.lab.assert_says("its new volumes lie on the root disk");
    let on_root = client.create("a", 100 * MI, &Use::default()).await;
    assert!(disks.lab.pool().join("volumes").join(&on_root).exists());
    disks.create();
    let end = Instant::now() + Duration::from_secs(60);
    while client.capacity().await.available_capacity == GI - 100 * MI {
        assert!(Instant::now() < end, "{}", disks.lab.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let on_disk = client.create("b", 100 * MI, &Use::default()).await;
    let disk = disks.parts().into_iter().find(|part| part["uuid"].is_string()).unwrap();
    assert!(PathBuf::from(text(&disk, "path")).join("volumes").join(&on_disk).exists());
    assert!(client.capacity().await.available_capacity < SIZE.cast_signed());
    // What lies on the root disk stays to be had.
    let mounted = client.mount(&disks.lab, &on_root, "a", &Use::default()).await;
    client.remove(&mounted).await;
    client.delete(&on_disk).await.unwrap();
    assert_eq!(client.storage_health().await, [""; 0]);
}

#[tokio::test]
async fn labels_of_the_node_choose_it_and_are_no_part_of_a_volumes_place() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 2 * GI);
    lab.config.labels = "rack: r1".to_owned();
    let client = lab.start().await;
    let map = |pairs: &[(&str, &str)]| csi::Topology { segments: common::map(pairs) };
    let node = ("topology.berth.dev/node", "node-a");
    let info = client.node.clone().node_get_info(csi::NodeGetInfoRequest::default()).await.unwrap().into_inner();
    assert_eq!(info.accessible_topology, Some(map(&[node, ("rack", "r1")])));
    let wanted = |name: &str, place: csi::Topology| {
        let mut request = common::Client::request(name, 100 * MI, &Use::default());
        let topology = csi::TopologyRequirement { requisite: vec![place], preferred: Vec::new() };
        request.accessibility_requirements = Some(topology);
        request
    };
    let volume = client.try_create(wanted("a", map(&[node, ("rack", "r1")]))).await.unwrap();
    assert_eq!(volume.accessible_topology, [map(&[node])]);
    refused(client.try_create(wanted("b", map(&[node, ("rack", "r2")]))).await, Code::ResourceExhausted);
    // A label may change later.
    lab.config.labels = "rack: r2".to_owned();
    let client = lab.restart().await;
    let mounted = client.mount(&lab, &volume.volume_id, "a", &Use::default()).await;
    client.remove(&mounted).await;
}
