//! Local volumes as production has them: XFS with project quotas and volume groups on NVMe disks. Most machines that tests
//! run on have neither, so this is a lane of its own: `make test-vm` runs it in a virtual machine.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use berth::proto::csi;
use berth::proto::csi::volume_capability::access_mode::Mode;
use common::crash::Case;
use common::{Client, GI, Lab, MI, Use, map, read, refused, run, write};
use tonic::Code;

/// A pool of XFS with project quotas on the first disk, and the driver.
async fn quota_pool(disk: &Path) -> (Lab, Client) {
    let mut lab = Lab::bare();
    lab.make_pool_on("pool", disk);
    let client = lab.start().await;
    (lab, client)
}

/// Writes until the file system refuses, and returns how many bytes it took. `user`: as whom.
fn fill(file: &Path, user: u32) -> (u64, i32) {
    let script = format!(
        "dd if=/dev/zero of={} bs=64k oflag=append conv=notrunc 2>/dev/null; \
                          dd if=/dev/zero of={} bs=4k oflag=append conv=notrunc 2>&1 | grep -o 'No space left\\|quota exceeded'; sync",
        file.display(),
        file.display()
    );
    let output = Command::new("setpriv")
        .args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "bash", "-c", &script])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let errno = if said.contains("No space") { libc::ENOSPC } else { 0 };
    (std::fs::metadata(file).unwrap().len(), errno)
}

/// > A directory volume has exactly its size, for root and for everybody else: then programs get ENOSPC. `df` shows it.
/// > The limit is there after the driver, the pool's mount and the machine have been started anew.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_directory_volume_is_full_at_its_size_for_everybody() {
    let disk = disk_or_skip!("berth0001");
    let (mut lab, client) = quota_pool(&disk).await;
    let size = 64 * MI;
    for user in [0, 1000] {
        let mounted = client.make_and_mount(&lab, &format!("u{user}"), size, &Use::default()).await;
        std::fs::set_permissions(&mounted.target, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let file = mounted.file("f");
        let (written, errno) = fill(&file, user);
        assert_eq!(errno, libc::ENOSPC, "user {user}");
        // Nothing but blocks of the file's own map is missing.
        assert!(written <= size.cast_unsigned() && written > (size - 256 * 1024).cast_unsigned(), "{written}");
        let df = run("df", &["-B1", "--output=size,used,avail", &mounted.target]);
        let numbers: Vec<i64> = df.lines().nth(1).unwrap().split_whitespace().map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers[0], size);
        assert!(numbers[1] > size - MI && numbers[2] < MI, "{df}");
        let stats = client.total(&mounted.id, &mounted.target).await.unwrap();
        assert_eq!(stats, size);
        client.unmount(&mounted).await;
    }
    // Another process, another mount of the disk.
    lab.kill();
    common::unmount(&[lab.pool().to_str().unwrap()]);
    run("mount", &["-o", "prjquota,noatime", disk.to_str().unwrap(), lab.pool().to_str().unwrap()]);
    let client = lab.start().await;
    for id in client.list().await {
        let mounted = client.mount(&lab, &id, "again", &Use::default()).await;
        let (_, errno) = fill(&mounted.file("f"), 0);
        assert_eq!(errno, libc::ENOSPC);
        client.remove(&mounted).await;
    }
    lab.assert_clean();
    // Without quotas a volume would have no limit: it is refused, and says why.
    let id = client.create("a", size, &Use::default()).await;
    lab.kill();
    common::unmount(&[lab.pool().to_str().unwrap()]);
    run("mount", &[disk.to_str().unwrap(), lab.pool().to_str().unwrap()]);
    let client = lab.start().await;
    let staging = lab.staging("refused");
    let message = refused(client.stage(&id, &staging, &Use::default()).await, Code::FailedPrecondition);
    assert!(message.contains("prjquota"), "{message}");
    assert_eq!(client.health(&id).await.unwrap(), ["NoQuotas"]);
    client.delete(&id).await.unwrap();
    lab.assert_clean();
}

/// > Empty files are limited too: one for each 16 KiB.
/// > Who gives its files another project id is found out, and its bytes are in the pool's health.
#[tokio::test]
#[ignore = "make test-vm"]
async fn what_leaves_a_limit_is_seen() {
    let disk = disk_or_skip!("berth0001");
    let (lab, client) = quota_pool(&disk).await;
    let mounted = client.make_and_mount(&lab, "a", 32 * MI, &Use::default()).await;
    let mut made = 0;
    let error = loop {
        match std::fs::File::create(mounted.file(&format!("f{made}"))) {
            Ok(_) => made += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!((2000..=2048).contains(&made), "{made}");
    for number in 0..made {
        std::fs::remove_file(mounted.file(&format!("f{number}"))).unwrap();
    }
    assert_eq!(client.storage_health().await, [""; 0]);
    let file = std::fs::File::create(mounted.file("escaped")).unwrap();
    for project in [0, 4711] {
        berth::host::quota::set_project(&file, project).unwrap();
        file.write_all_at(&[1; 1 << 20], 0).unwrap();
        file.sync_all().unwrap();
        assert_eq!(client.storage_health().await, ["StrayFiles"], "project {project}");
    }
    // The volume's root is its owner's, too: statistics and limits don't depend on what it says.
    let root = std::fs::File::open(&mounted.target).unwrap();
    berth::host::quota::set_project(&root, 0).unwrap();
    assert_eq!(client.total(&mounted.id, &mounted.target).await.unwrap(), 32 * MI);
    drop((file, root));
    client.remove(&mounted).await;
    lab.assert_clean();
    assert_eq!(client.storage_health().await, [""; 0]);
}

/// > A thousand volumes on one disk are as good as one.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_thousand_directory_volumes() {
    let disk = disk_or_skip!("berth0001");
    let (mut lab, client) = quota_pool(&disk).await;
    let begun = Instant::now();
    let mut ids = Vec::new();
    for number in 0..1000 {
        ids.push(client.create(&format!("v{number}"), 2 * MI, &Use::default()).await);
    }
    println!("1000 made in {:.1?}", begun.elapsed());
    let before = client.capacity().await.available_capacity;
    let client = lab.restart().await;
    assert_eq!(client.list().await.len(), 1000);
    assert_eq!(client.capacity().await.available_capacity, before);
    let begun = Instant::now();
    let mounted = client.mount(&lab, &ids[999], "last", &Use::default()).await;
    println!("the last one mounted in {:.1?}", begun.elapsed());
    write(mounted.file("f"), "x");
    client.unmount(&mounted).await;
    let begun = Instant::now();
    for id in &ids {
        client.delete(id).await.unwrap();
    }
    println!("1000 deleted in {:.1?}", begun.elapsed());
    lab.assert_clean();
}

/// > Between two volumes of one disk a rename is EXDEV, as between any two file systems: mv copies.
#[tokio::test]
#[ignore = "make test-vm"]
async fn tools_move_files_between_volumes_of_one_disk() {
    let disk = disk_or_skip!("berth0001");
    let (lab, client) = quota_pool(&disk).await;
    let a = client.make_and_mount(&lab, "a", 64 * MI, &Use::default()).await;
    let b = client.make_and_mount(&lab, "b", 64 * MI, &Use::default()).await;
    std::fs::create_dir(a.file("d")).unwrap();
    write(a.file("d/f"), "moved");
    for (from, to) in [(a.file("d"), b.file("d")), (a.file("d/f"), b.file("f"))] {
        assert_eq!(std::fs::rename(&from, &to).unwrap_err().raw_os_error(), Some(libc::EXDEV));
    }
    run("mv", &[a.file("d").to_str().unwrap(), b.file("d").to_str().unwrap()]);
    assert_eq!(read(b.file("d/f")), b"moved");
    assert!(!a.file("d").exists());
    run("rsync", &["-a", "--remove-source-files", &format!("{}/", b.target), &format!("{}/", a.target)]);
    assert_eq!(read(a.file("d/f")), b"moved");
    client.remove(&a).await;
    client.remove(&b).await;
    lab.assert_clean();
}

/// > Deleting returns at once, whatever a volume holds, and what is still there is removed in the background, also by the
/// > driver's successor; the room comes back when the bytes have.
#[tokio::test]
#[ignore = "make test-vm"]
async fn what_was_deleted_is_removed_in_the_background_and_after_a_crash() {
    let disk = disk_or_skip!("berth0001");
    let (mut lab, client) = quota_pool(&disk).await;
    let empty = client.capacity().await.available_capacity;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    for directory in 0..50 {
        let directory = mounted.file(&format!("d{directory}/e"));
        std::fs::create_dir_all(&directory).unwrap();
        for file in 0..200 {
            std::fs::File::create(directory.join(file.to_string())).unwrap().write_all(b"x").unwrap();
        }
    }
    run("chattr", &["+i", mounted.file("d0/e/0").to_str().unwrap(), mounted.file("d1").to_str().unwrap()]);
    client.unmount(&mounted).await;
    let begun = Instant::now();
    client.delete(&mounted.id).await.unwrap();
    println!("a volume of 10,000 files deleted in {:.1?}", begun.elapsed());
    lab.kill();
    let left = lab.entries("trash");
    println!("left when the driver died: {left:?}");
    // The name can be used again at once.
    let client = lab.start().await;
    assert_eq!(client.create("a", GI, &Use::default()).await, mounted.id);
    let end = Instant::now() + Duration::from_secs(120);
    while !lab.entries("trash").is_empty() && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(lab.entries("volumes").len(), 1);
    let usage = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    assert_eq!(client.total(&usage.id, &usage.target).await.unwrap(), GI);
    client.remove(&usage).await;
    lab.assert_clean();
    assert!(empty - client.capacity().await.available_capacity < 4 * MI);
}

/// > A directory volume grows while programs write to it.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_directory_volume_grows_under_load() {
    let disk = disk_or_skip!("berth0001");
    let (lab, client) = quota_pool(&disk).await;
    let mounted = client.make_and_mount(&lab, "a", 16 * MI, &Use::default()).await;
    let path = mounted.file("f");
    // Writes 100 MiB, and waits where there is no room.
    let writer = std::thread::spawn(move || {
        let file = std::fs::File::create(path).unwrap();
        let mut at = 0;
        let end = Instant::now() + Duration::from_secs(120);
        while at < 100 << 20 && Instant::now() < end {
            match file.write_at(&vec![1; 1 << 20], at) {
                Ok(written) => at += u64::try_from(written).unwrap(),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
        file.sync_all().unwrap();
        at
    });
    for step in 1..=8 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let size = (16 + 16 * step) * MI;
        assert_eq!(client.expand(&mounted.id, &mounted.target, size).await.unwrap(), size);
        assert_eq!(client.total(&mounted.id, &mounted.target).await.unwrap(), size);
    }
    assert_eq!(writer.join().unwrap(), 100 << 20);
    refused(client.expand(&mounted.id, &mounted.target, 100 * GI).await, Code::ResourceExhausted);
    client.remove(&mounted).await;
    lab.assert_clean();
}

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

/// > Several pods of one node share a directory volume; ReadWriteOncePod keeps the second one out; what lies on another node is refused.
#[tokio::test]
#[ignore = "make test-vm"]
async fn who_may_use_a_directory_volume() {
    let disk = disk_or_skip!("berth0001");
    let (lab, client) = quota_pool(&disk).await;
    let mounted = client.make_and_mount(&lab, "a", 64 * MI, &Use::default()).await;
    let second = lab.target("second");
    client.publish(&mounted.id, &mounted.staging, &second, &Use::default()).await.unwrap();
    write(mounted.file("f"), "shared");
    assert_eq!(read(format!("{second}/f")), b"shared");
    let message = refused(client.delete(&mounted.id).await, Code::FailedPrecondition);
    assert!(message.contains("in use at"), "{message}");
    client.unpublish(&mounted.id, &second).await.unwrap();
    let mut request = Client::publication(&mounted.id, &mounted.staging, &second, &Use::default());
    request.readonly = true;
    client.node.clone().node_publish_volume(request).await.unwrap();
    assert!(std::fs::write(format!("{second}/g"), "x").is_err());
    client.unpublish(&mounted.id, &second).await.unwrap();
    client.remove(&mounted).await;

    let usage = Use::mode(Mode::SingleNodeSingleWriter);
    let one = client.make_and_mount(&lab, "one", 64 * MI, &usage).await;
    refused(client.publish(&one.id, &one.staging, &second, &usage).await, Code::FailedPrecondition);
    client.remove(&one).await;

    let place = csi::Topology { segments: map(&[("topology.berth.dev/node", "node-b")]) };
    let mut request = Client::request("elsewhere", GI, &Use::default());
    request.accessibility_requirements = Some(csi::TopologyRequirement { requisite: vec![place], preferred: vec![] });
    refused(client.try_create(request).await, Code::ResourceExhausted);
    let elsewhere = "vol-00000000-00000000000000000000000000000000";
    refused(client.stage(elsewhere, &lab.staging("x"), &Use::default()).await, Code::FailedPrecondition);
    lab.assert_clean();
}

/// > Calls at the same time never promise more than there is, to the byte, and a full pool is ResourceExhausted.
#[tokio::test]
#[ignore = "make test-vm"]
async fn parallel_creates_of_directories_conserve_capacity() {
    let disk = disk_or_skip!("berth0001");
    let (lab, client) = quota_pool(&disk).await;
    let before = client.capacity().await;
    assert_eq!(before.maximum_volume_size, Some(before.available_capacity));
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..32 {
        let client = client.clone();
        calls
            .spawn(async move { client.try_create(Client::request(&format!("v{number}"), GI, &Use::default())).await });
    }
    let (mut made, mut full) = (Vec::new(), 0);
    while let Some(result) = calls.join_next().await {
        match result.unwrap() {
            Ok(volume) => made.push(volume.volume_id),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                full += 1;
            }
        }
    }
    let fit = usize::try_from(before.available_capacity / GI).unwrap();
    assert_eq!((made.len(), full), (fit, 32 - fit));
    let after = client.capacity().await.available_capacity;
    assert_eq!(after, before.available_capacity % GI);
    // What they were promised is theirs: each can be filled.
    let mounted = client.mount(&lab, &made[0], "full", &Use::default()).await;
    let file = std::fs::File::create(mounted.file("f")).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, (GI - 8 * MI).cast_unsigned()).unwrap();
    // Writing what was promised changes nothing of what is left.
    assert!(client.capacity().await.available_capacity >= after - MI);
    drop(file);
    client.unmount(&mounted).await;
    for id in made {
        client.delete(&id).await.unwrap();
    }
    lab.assert_clean();
    assert!(before.available_capacity - client.capacity().await.available_capacity < 4 * MI);
}

/// > A damaged descriptor costs its own volume, which is said, and nothing else; and the volume can still be deleted.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_damaged_directory_volume_is_reported() {
    let disk = disk_or_skip!("berth0001");
    let (mut lab, client) = quota_pool(&disk).await;
    let good = client.create("good", 64 * MI, &Use::default()).await;
    let damaged = client.create("damaged", 64 * MI, &Use::default()).await;
    let lost = client.create("lost", 64 * MI, &Use::default()).await;
    let before = client.capacity().await.available_capacity;
    lab.kill();
    let folder = |id: &str| lab.pool().join("volumes").join(id);
    std::fs::write(folder(&damaged).join("volume.json"), "{").unwrap();
    std::fs::remove_dir(folder(&lost).join("data")).unwrap();
    let client = lab.start().await;
    assert_eq!(client.list().await.len(), 3);
    assert_eq!(client.health(&good).await.unwrap(), [""; 0]);
    assert_eq!(client.health(&damaged).await.unwrap(), ["DescriptorDamaged"]);
    assert_eq!(client.health(&lost).await.unwrap(), ["DirectoryMissing"]);
    for (id, what) in [(&damaged, "is damaged"), (&lost, "data: No such file")] {
        let line =
            lab.log().lines().rfind(|line| line.contains("ERROR") && line.contains(id.as_str())).map(str::to_owned);
        assert!(line.is_some_and(|line| line.contains(what)), "{}", lab.log());
    }
    let config = lab.path("config.yaml");
    let arguments = ["volume", "--config", config.to_str().unwrap(), "orphans", "--none-known", "--json"];
    let orphans: serde_json::Value = serde_json::from_str(&common::berth(&arguments, 0).0).unwrap();
    let unwell: Vec<_> = orphans["unwell"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    assert!(unwell.len() == 2 && unwell.contains(&damaged.as_str()) && unwell.contains(&lost.as_str()), "{orphans}");
    // The damaged one's room is still kept.
    assert_eq!(client.capacity().await.available_capacity, before + 64 * MI);
    refused(client.stage(&lost, &lab.staging("lost"), &Use::default()).await, Code::Internal);
    for id in [&good, &damaged, &lost] {
        client.delete(id).await.unwrap();
    }
    lab.assert_clean();
}

/// > A volume's root belongs to its users, and has the mode that a fresh file system's has.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_directory_volumes_root_is_a_fresh_file_systems() {
    let disk = disk_or_skip!("berth0001");
    let (lab, client) = quota_pool(&disk).await;
    let mounted = client.make_and_mount(&lab, "a", 64 * MI, &Use::default()).await;
    let stat = std::fs::metadata(&mounted.target).unwrap();
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (0, 0, 0o755));
    assert_eq!(std::fs::read_dir(&mounted.target).unwrap().count(), 0);
    std::os::unix::fs::chown(&mounted.target, Some(1000), Some(2000)).unwrap();
    client.unmount(&mounted).await;
    let mounted = client.mount(&lab, &mounted.id, "a", &Use::default()).await;
    let stat = std::fs::metadata(&mounted.target).unwrap();
    assert_eq!((stat.uid(), stat.gid()), (1000, 2000));
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// A volume group on a disk, as an administrator makes one, with a volume of somebody else in it; and the driver.
struct Grouped {
    lab: Lab,
    disks: Vec<std::path::PathBuf>,
}

const GROUP: &str = "berthtest";

impl Grouped {
    async fn on(disks: &[std::path::PathBuf]) -> (Self, Client) {
        let names: Vec<_> = disks.iter().map(|disk| disk.to_str().unwrap()).collect();
        for name in &names {
            run("wipefs", &["-q", "-a", name]);
            // Small, since all of it is overwritten again and again.
            run("pvcreate", &["-q", "-y", "--metadatasize", "16m", "--setphysicalvolumesize", "2g", name]);
        }
        run("vgcreate", &[&["-q", "-y", GROUP][..], &names].concat());
        run("lvcreate", &["-q", "-y", "-n", "stranger", "-L", "64m", GROUP]);
        let mut lab = Lab::bare();
        lab.config.pool = format!("{{name: main, group: {GROUP}}}");
        let client = lab.start().await;
        (Self { lab, disks: disks.to_vec() }, client)
    }

    fn volumes() -> Vec<String> {
        let names = run("lvs", &["--noheadings", "-o", "lv_name", GROUP]);
        names.split_whitespace().filter(|name| *name != "stranger").map(str::to_owned).collect()
    }

    fn assert_clean(&self) {
        self.lab.assert_no_places();
        let end = Instant::now() + Duration::from_secs(120);
        while !Self::volumes().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(Self::volumes(), [""; 0]);
        assert!(run("lvs", &["--noheadings", "-o", "lv_name", GROUP]).contains("stranger"));
    }
}

impl Drop for Grouped {
    fn drop(&mut self) {
        self.lab.kill();
        for mount in common::mounts_below(&self.lab.path("")).iter().rev() {
            let _ = Command::new("umount").arg(mount).status();
        }
        let mappings = Command::new("sh")
            .args(["-c", "for m in /dev/mapper/berth-*; do [ -e $m ] && cryptsetup close $m; done"])
            .status();
        let removed = Command::new("vgremove").args(["-q", "-y", "-f", GROUP]).status();
        println!("cleaned up: {mappings:?} {removed:?}");
        // LVM leaves links alone that it made without udev.
        let _ = std::fs::remove_dir_all(Path::new("/dev").join(GROUP));
        for disk in &self.disks {
            let _ = Command::new("wipefs").args(["-q", "-a"]).arg(disk).status();
        }
    }
}

fn lvm(name: &str, size: i64, usage: &Use, parameters: &[(&str, &str)]) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest { parameters: map(parameters), ..Client::request(name, size, usage) }
}

/// > A logical volume is made, mounted, grown in use and deleted like an image, and nothing else in its group is touched.
#[tokio::test]
#[ignore = "make test-vm"]
async fn logical_volumes_live_in_a_group() {
    let disk = disk_or_skip!("berth0002");
    let (mut grouped, client) = Grouped::on(&[disk]).await;
    let empty = client.capacity().await.available_capacity;
    for fs in ["xfs", "ext4"] {
        let usage = Use::fs(fs);
        let mounted = client.make_and_mount(&grouped.lab, fs, 512 * MI, &usage).await;
        write(mounted.file("f"), "precious");
        assert_eq!(client.capacity().await.available_capacity, empty - 512 * MI);
        let before = client.total(&mounted.id, &mounted.target).await.unwrap();
        assert_eq!(client.expand(&mounted.id, &mounted.target, GI).await.unwrap(), GI);
        let after = client.total(&mounted.id, &mounted.target).await.unwrap();
        assert!(after - before > 400 * MI, "{before} {after}");
        let message = refused(client.delete(&mounted.id).await, Code::FailedPrecondition);
        assert!(message.contains("in use at"), "{message}");
        refused(client.snapshot(&mounted.id, "s").await, Code::Unimplemented);
        let client = grouped.lab.restart().await;
        client.stage(&mounted.id, &mounted.staging, &usage).await.unwrap();
        assert_eq!(client.list().await, [mounted.id.as_str()]);
        assert_eq!(client.health(&mounted.id).await.unwrap(), [""; 0]);
        client.unmount(&mounted).await;
        // As after a reboot.
        run("lvchange", &["-an", &format!("{GROUP}/{}", mounted.id)]);
        let mounted = client.mount(&grouped.lab, &mounted.id, "again", &usage).await;
        assert_eq!(read(mounted.file("f")), b"precious");
        client.remove(&mounted).await;
        grouped.assert_clean();
        assert_eq!(client.capacity().await.available_capacity, empty);
    }
    // A device is in use as long as it is shown or held open, whoever has forgotten it.
    let block = Use::block();
    let mounted = client.make_and_mount(&grouped.lab, "raw", 64 * MI, &block).await;
    let message = refused(client.delete(&mounted.id).await, Code::FailedPrecondition);
    assert!(message.contains(&mounted.target), "{message}");
    client.unmount(&mounted).await;
    let device = berth::host::lvm::device(GROUP, &mounted.id).unwrap().unwrap();
    let held = std::fs::File::open(device.path()).unwrap();
    let message = refused(client.delete(&mounted.id).await, Code::FailedPrecondition);
    assert!(message.contains("holds its device open"), "{message}");
    drop(held);
    // As udev has it where the node itself starts its groups: links.
    run("lvchange", &["-an", &format!("{GROUP}/{}", mounted.id)]);
    run("lvchange", &["-ay", &format!("{GROUP}/{}", mounted.id)]);
    run("udevadm", &["trigger", "--settle", "--subsystem-match=block"]);
    let mounted = client.mount(&grouped.lab, &mounted.id, "raw", &block).await;
    refused(client.stage(&mounted.id, &grouped.lab.staging("fs"), &Use::fs("ext4")).await, Code::FailedPrecondition);
    client.remove(&mounted).await;
    let id = client.create("not-raw", 64 * MI, &Use::fs("ext4")).await;
    refused(client.stage(&id, &grouped.lab.staging("raw"), &block).await, Code::FailedPrecondition);
    client.delete(&id).await.unwrap();
    grouped.assert_clean();
    // An odd size is rounded up to whole extents; what is too big is refused.
    let volume = client.try_create(lvm("odd", 5 * MI, &Use::block(), &[])).await.unwrap();
    assert_eq!(volume.capacity_bytes, 8 * MI);
    client.delete(&volume.volume_id).await.unwrap();
    refused(client.try_create(lvm("big", 100 * GI, &Use::block(), &[])).await, Code::ResourceExhausted);
    refused(client.try_create(lvm("a", GI, &Use::default(), &[("carve", "directory")])).await, Code::ResourceExhausted);
    refused(client.try_create(lvm("a", GI, &Use::default(), &[("stripes", "2")])).await, Code::ResourceExhausted);
    grouped.assert_clean();
}

/// > A volume group may lie on a disk that is encrypted as a whole.
#[tokio::test]
#[ignore = "make test-vm"]
async fn a_group_may_lie_on_an_encrypted_disk() {
    let disk = disk_or_skip!("berth0002");
    let script =
        "echo -n x | cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file - $0 whole";
    run("sh", &["-ec", script, disk.to_str().unwrap()]);
    let (grouped, client) = Grouped::on(&["/dev/mapper/whole".into()]).await;
    let mounted = client.make_and_mount(&grouped.lab, "a", 320 * MI, &Use::default()).await;
    write(mounted.file("f"), "precious");
    client.remove(&mounted).await;
    grouped.assert_clean();
    drop(grouped);
    run("cryptsetup", &["close", "whole"]);
}

/// > The next tenant of a logical volume's extents reads zeros, and the room comes back when the zeros are written, also by the
/// > driver's successor.
#[tokio::test]
#[ignore = "make test-vm"]
async fn the_next_tenant_of_a_logical_volume_reads_zeros() {
    let disk = disk_or_skip!("berth0002");
    let (mut grouped, client) = Grouped::on(&[disk]).await;
    let room = client.capacity().await.available_capacity;
    // All of the group, so that the next one gets the same extents.
    let size = room / (64 * MI) * (64 * MI);
    let usage = Use::block();
    let mut client = client;
    for round in 0..2 {
        let mounted = client.make_and_mount(&grouped.lab, &format!("tenant-{round}"), size, &usage).await;
        let device = std::fs::File::options().read(true).write(true).open(&mounted.target).unwrap();
        let mut found = vec![0; 1 << 20];
        for at in (0..size.cast_unsigned()).step_by(256 << 20) {
            if round > 0 {
                device.read_exact_at(&mut found, at).unwrap();
                assert!(found.iter().all(|byte| *byte == 0), "at {at}");
            }
            device.write_all_at(&vec![0xAB; 1 << 20], at).unwrap();
        }
        device.sync_all().unwrap();
        drop(device);
        client.unmount(&mounted).await;
        client.delete(&mounted.id).await.unwrap();
        // Killed while it writes zeros, and gone on with.
        client = grouped.lab.restart().await;
        grouped.assert_clean();
        assert_eq!(client.capacity().await.available_capacity, room);
    }
}

/// > A volume with encryption is noise on its disk; it opens with its own passphrase and with no other.
/// > With a throw-away key what it held is gone when it is unstaged.
#[tokio::test]
#[ignore = "make test-vm"]
async fn logical_volumes_may_be_encrypted() {
    let disk = disk_or_skip!("berth0002");
    let (mut grouped, client) = Grouped::on(std::slice::from_ref(&disk)).await;
    // Is that on the disk below the encryption?
    let raw = |id: &str, needle: &str| {
        run("sync", &[]);
        let device = berth::host::lvm::device_path(GROUP, id);
        run("blockdev", &["--flushbufs", device.to_str().unwrap()]);
        run("sh", &["-c", &format!("tr '\\0' '\\n' <{} | grep -a -c {needle} || true", device.display())]).trim() != "0"
    };
    let with = |client: &Client, passphrase: &str| {
        let mut client = client.clone();
        client.secrets[1] = map(&[("encryptionPassphrase", passphrase)]);
        client
    };
    let key = "correct horse battery staple";
    let usage = Use::fs("ext4");
    let volume = client.try_create(lvm("luks", 64 * MI, &usage, &[("encryption", "luks")])).await.unwrap();
    let id = volume.volume_id;
    let staging = grouped.lab.staging("luks");
    let message = refused(client.stage(&id, &staging, &usage).await, Code::InvalidArgument);
    assert!(message.contains("encryptionPassphrase"), "{message}");
    let mounted = with(&client, key).mount(&grouped.lab, &id, "luks", &usage).await;
    write(mounted.file("f"), "needle-in-luks");
    assert!(client.total(&id, &mounted.target).await.unwrap() > 50 * MI);
    let mut request = csi::NodeExpandVolumeRequest {
        volume_id: id.clone(),
        volume_path: mounted.target.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 128 * MI, limit_bytes: 0 }),
        ..Default::default()
    };
    request.secrets = map(&[("encryptionPassphrase", key)]);
    assert_eq!(client.node.clone().node_expand_volume(request).await.unwrap().into_inner().capacity_bytes, 128 * MI);
    assert!(client.total(&id, &mounted.target).await.unwrap() > 110 * MI);
    let client = grouped.lab.restart().await;
    client.unmount(&mounted).await;
    assert!(!raw(&id, "needle-in-luks"));
    let wrong = with(&client, "wrong").stage(&id, &staging, &usage).await;
    assert!(matches!(wrong.unwrap_err().code(), Code::PermissionDenied | Code::Unauthenticated));
    assert!(berth::host::mapper::find(&format!("berth-{id}")).unwrap().is_none(), "the key is still in the kernel");
    let mounted = with(&client, key).mount(&grouped.lab, &id, "luks", &usage).await;
    assert_eq!(read(mounted.file("f")), b"needle-in-luks");
    assert!(!grouped.lab.log().contains(key));
    client.remove(&mounted).await;

    let usage = Use::fs("xfs");
    let volume = client.try_create(lvm("scratch", 512 * MI, &usage, &[("encryption", "throwaway")])).await.unwrap();
    for round in 0..2 {
        let mounted = client.mount(&grouped.lab, &volume.volume_id, "scratch", &usage).await;
        assert!(!mounted.file("f").exists(), "round {round}");
        write(mounted.file("f"), "needle-in-scratch");
        // A second staging, and a driver that died, find the same one.
        let client = grouped.lab.restart().await;
        client.stage(&mounted.id, &mounted.staging, &usage).await.unwrap();
        assert_eq!(read(mounted.file("f")), b"needle-in-scratch");
        client.unmount(&mounted).await;
    }
    assert!(!raw(&volume.volume_id, "needle-in-scratch"));
    let client = grouped.lab.restart().await;
    client.delete(&volume.volume_id).await.unwrap();
    grouped.assert_clean();
}

/// > Stripes lie on as many disks. Calls at the same time share a group's room without a byte too much.
#[tokio::test]
#[ignore = "make test-vm"]
async fn stripes_and_parallel_creates_in_a_group() {
    let (one, two) = (disk_or_skip!("berth0002"), disk_or_skip!("berth0003"));
    let (grouped, client) = Grouped::on(&[one, two]).await;
    let volume = client.try_create(lvm("striped", GI, &Use::block(), &[("stripes", "2")])).await.unwrap();
    let segments = run("lvs", &["--noheadings", "-o", "stripes,devices", &format!("{GROUP}/{}", volume.volume_id)]);
    assert!(segments.trim().starts_with('2') && segments.matches("nvme").count() == 2, "{segments}");
    client.delete(&volume.volume_id).await.unwrap();
    grouped.assert_clean();
    let room = client.capacity().await.available_capacity;
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..12 {
        let client = client.clone();
        calls.spawn(async move { client.try_create(lvm(&format!("v{number}"), 512 * MI, &Use::block(), &[])).await });
    }
    let (mut made, mut full) = (Vec::new(), 0);
    while let Some(result) = calls.join_next().await {
        match result.unwrap() {
            Ok(volume) => made.push(volume.volume_id),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                full += 1;
            }
        }
    }
    let fit = usize::try_from(room / (512 * MI)).unwrap();
    assert_eq!((made.len(), full), (fit, 12 - fit));
    assert_eq!(client.capacity().await.available_capacity, room - i64::try_from(fit).unwrap() * 512 * MI);
    for id in made {
        client.delete(&id).await.unwrap();
    }
    grouped.assert_clean();
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

/// > The driver may be killed before any step of a call on a directory volume, and before any program that it starts for a
/// > logical volume: the repeated call is answered as if nothing had been, and nothing is left over.
#[tokio::test]
#[ignore = "make test-vm"]
async fn directories_survive_death_at_every_step() {
    skip_unless!(Command::new("strace").arg("-V").output().is_ok(), "needs strace");
    let disk = disk_or_skip!("berth0001");
    let (mut lab, client) = quota_pool(&disk).await;
    let room = client.capacity().await.available_capacity;
    let about = |now: i64, size: i64| (room - size - now).abs() < 4 * MI;
    let usage = Use::default();
    let mut case = Case::new(&mut lab, client);
    case.survive(
        "CreateVolume",
        async |client, _| client.try_create(Client::request("created", GI, &Use::default())).await,
        async |lab, client, _, volume| {
            assert_eq!(lab.entries("volumes"), std::slice::from_ref(&volume.volume_id));
            assert_eq!(lab.entries("tmp"), [""; 0]);
            assert!(about(client.capacity().await.available_capacity, GI));
            client.delete(&volume.volume_id).await.unwrap();
            lab.assert_clean();
        },
    )
    .await;
    let id = case.client.create("a", 64 * MI, &usage).await;
    let (staging, target) = (case.lab.staging("a"), case.lab.target("a"));
    case.survive(
        "NodeStageVolume",
        async |client, _| client.stage(&id, &staging, &usage).await,
        async |lab, client, _, ()| {
            assert_eq!(lab.mounts().len(), 1);
            client.unstage(&id, &staging).await.unwrap();
            assert_eq!(lab.mounts().len(), 0);
        },
    )
    .await;
    case.client.stage(&id, &staging, &usage).await.unwrap();
    case.client.publish(&id, &staging, &target, &usage).await.unwrap();
    write(format!("{target}/f"), "precious");
    let grown = |round: i64| (64 + 4 * (round + 1)) * MI;
    case.survive(
        "NodeExpandVolume",
        async |client, round| client.expand(&id, &target, grown(round)).await,
        async |_, client, round, size| {
            assert_eq!(size, grown(round));
            assert_eq!(client.total(&id, &target).await.unwrap(), size);
        },
    )
    .await;
    assert_eq!(read(format!("{target}/f")), b"precious");
    case.client.unpublish(&id, &target).await.unwrap();
    case.client.unstage(&id, &staging).await.unwrap();
    case.client.delete(&id).await.unwrap();
    let id = case.client.create("deleted", GI, &usage).await;
    case.survive_after(
        "DeleteVolume",
        async |client, _| assert_eq!(client.create("deleted", GI, &usage).await, id),
        async |client, _| client.delete(&id).await,
        // It may die after it has answered, while it removes what was deleted: its successor goes on.
        async |lab, _, _, ()| assert_eq!(lab.entries("volumes"), [""; 0]),
    )
    .await;
    let client = lab.restart().await;
    lab.assert_clean();
    assert!(about(client.capacity().await.available_capacity, 0));
}

#[tokio::test]
#[ignore = "make test-vm"]
async fn logical_volumes_survive_death_before_every_program() {
    skip_unless!(Command::new("strace").arg("-V").output().is_ok(), "needs strace");
    let disk = disk_or_skip!("berth0002");
    let (mut grouped, client) = Grouped::on(&[disk]).await;
    let room = client.capacity().await.available_capacity;
    let usage = Use::fs("ext4");
    let parameters = [("encryption", "luks")];
    let mut client = client;
    client.secrets[1] = map(&[("encryptionPassphrase", "0123456789abcdef0123456789abcdef")]);
    let secrets = client.secrets.clone();
    let staging = grouped.lab.staging("a");
    let mut case = Case::of_programs(&mut grouped.lab, client);
    let with = |client: &Client| Client { secrets: secrets.clone(), ..client.clone() };
    case.survive(
        "CreateVolume",
        async |client, _| client.try_create(lvm("a", 64 * MI, &usage, &parameters)).await,
        async |lab, client, _, volume| {
            let made = Grouped::volumes();
            assert!(made.contains(&volume.volume_id) && !made.iter().any(|name| name.starts_with("new-")), "{made:?}");
            client.delete(&volume.volume_id).await.unwrap();
            drop(lab.log());
        },
    )
    .await;
    let id = case.client.try_create(lvm("a", 64 * MI, &usage, &parameters)).await.unwrap().volume_id;
    case.client.delete(&id).await.unwrap();
    case.survive_after(
        "NodeStageVolume",
        async |client, _| {
            let end = Instant::now() + Duration::from_secs(60);
            while let Err(status) = client.try_create(lvm("a", 64 * MI, &usage, &parameters)).await {
                assert!(Instant::now() < end, "{status}");
            }
        },
        async |client, _| with(client).stage(&id, &staging, &usage).await,
        async |_, client, round, ()| {
            write(format!("{staging}/f"), "works");
            let size = (64 + 8 * (round + 1)) * MI;
            let mut request = csi::NodeExpandVolumeRequest {
                volume_id: id.clone(),
                volume_path: staging.clone(),
                capacity_range: Some(csi::CapacityRange { required_bytes: size, limit_bytes: 0 }),
                ..Default::default()
            };
            request.secrets = secrets[1].clone();
            client.node.clone().node_expand_volume(request).await.unwrap();
            assert_eq!(read(format!("{staging}/f")), b"works");
            client.unstage(&id, &staging).await.unwrap();
            client.delete(&id).await.unwrap();
        },
    )
    .await;
    let client = grouped.lab.restart().await;
    grouped.assert_clean();
    assert_eq!(client.capacity().await.available_capacity, room);
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
