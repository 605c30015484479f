//! Volumes that are directories with project quotas, on an XFS of an NVMe disk. `make test-vm` runs it in a virtual machine.
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
use common::local::quota_pool;
use common::{Client, GI, MI, Use, map, read, refused, run, write};
use tonic::Code;

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
