//! Volumes that are logical volumes, in a volume group on NVMe disks. `make test-vm` runs it in a virtual machine.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use berth::proto::csi;
use common::crash::Case;
use common::local::{GROUP, Grouped, lvm};
use common::{Client, GI, MI, Use, map, read, refused, run, write};
use tonic::Code;

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
