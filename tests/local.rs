//! The life of a local volume, against the real binary on real file systems. Each test that a promise of
//! `docs/semantics.md` names quotes it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use berth::proto::csi;
use berth::proto::csi::volume_capability::access_mode::Mode;
use common::{Client, GI, Lab, Use, from_snapshot, is_root, map, read, refused, run, write};
use tonic::Code;

/// > What a program has written and synced is there after the pod, the staging, the driver and the mount are gone.
#[tokio::test]
async fn data_survives_unpublish_unstage_and_a_killed_driver() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 8 * GI).await;
    for fs in ["xfs", "ext4"] {
        let usage = Use::fs(fs);
        let mounted = client.make_and_mount(&lab, fs, GI, &usage).await;
        write(mounted.file("f"), "precious");
        client.unmount(&mounted).await;
        let client = lab.restart().await;
        let mounted = client.mount(&lab, &mounted.id, fs, &usage).await;
        assert_eq!(read(mounted.file("f")), b"precious");
        client.remove(&mounted).await;
    }
    lab.assert_clean();
}

/// > A driver that dies leaves every mount as it is, and its successor goes on with them.
#[tokio::test]
async fn a_killed_driver_is_not_noticed_by_a_program_that_writes() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 4 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    let file = std::fs::File::create(mounted.file("f")).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    lab.kill();
    file.write_all_at(&[2; 4096], 4096).unwrap();
    file.sync_all().unwrap();
    let client = lab.start().await;
    // Kubelet repeats both calls after a restart of its own.
    client.stage(&mounted.id, &mounted.staging, &Use::default()).await.unwrap();
    client.publish(&mounted.id, &mounted.staging, &mounted.target, &Use::default()).await.unwrap();
    file.write_all_at(&[3; 4096], 8192).unwrap();
    drop(file);
    assert_eq!(lab.loops().len(), 1);
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// > However often a volume is staged, one device is on its image, and all see the same.
#[tokio::test]
async fn a_volume_that_is_staged_twice_has_one_device() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    for usage in [Use::fs("xfs"), Use::fs("ext4"), Use::block()] {
        let first = client.make_and_mount(&lab, "first", GI, &usage).await;
        let second = client.mount(&lab, &first.id, "second", &usage).await;
        assert_eq!(lab.loops().len(), 1);
        if !usage.block {
            write(first.file("f"), "seen");
            assert_eq!(read(second.file("f")), b"seen");
        }
        client.unmount(&first).await;
        client.stage(&second.id, &second.staging, &usage).await.unwrap();
        assert_eq!(lab.loops().len(), 1);
        client.remove(&second).await;
    }
    lab.assert_clean();
}

/// > Several pods of one node share a ReadWriteOnce volume.
/// > A ReadWriteOncePod volume is at one target path at a time.
#[tokio::test]
async fn several_pods_share_a_volume_unless_it_is_for_one_pod() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let mounted = client.make_and_mount(&lab, "many", GI, &Use::default()).await;
    let second = lab.target("second");
    client.publish(&mounted.id, &mounted.staging, &second, &Use::default()).await.unwrap();
    write(mounted.file("f"), "shared");
    assert_eq!(read(format!("{second}/f")), b"shared");
    client.unpublish(&mounted.id, &mounted.target).await.unwrap();
    assert_eq!(read(format!("{second}/f")), b"shared");
    client.unpublish(&mounted.id, &second).await.unwrap();
    client.remove(&mounted).await;

    for usage in
        [Use::mode(Mode::SingleNodeSingleWriter), Use { block: true, ..Use::mode(Mode::SingleNodeSingleWriter) }]
    {
        let mounted = client.make_and_mount(&lab, "one", GI, &usage).await;
        let other = client.publish(&mounted.id, &mounted.staging, &second, &usage).await;
        let message = refused(other, Code::FailedPrecondition);
        assert!(message.contains(&mounted.target), "{message}");
        assert!(!std::path::Path::new(&second).exists());
        // The same target again is a repetition, not a second pod.
        client.publish(&mounted.id, &mounted.staging, &mounted.target, &usage).await.unwrap();
        client.unpublish(&mounted.id, &mounted.target).await.unwrap();
        let mut reader = Client::publication(&mounted.id, &mounted.staging, &second, &usage);
        reader.readonly = true;
        client.node.clone().node_publish_volume(reader).await.unwrap();
        let first = client.publish(&mounted.id, &mounted.staging, &mounted.target, &usage).await;
        refused(first, Code::FailedPrecondition);
        client.unpublish(&mounted.id, &second).await.unwrap();
        client.remove(&mounted).await;
    }
    lab.assert_clean();
}

/// > A read-only publication can't be written, from its first moment on, while others of the same volume can.
#[tokio::test]
async fn a_read_only_publication_cannot_be_written() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    let reader = lab.target("reader");
    let mut request = Client::publication(&mounted.id, &mounted.staging, &reader, &Use::default());
    request.readonly = true;
    for _ in 0..2 {
        client.node.clone().node_publish_volume(request.clone()).await.unwrap();
    }
    write(mounted.file("f"), "x");
    assert_eq!(read(format!("{reader}/f")), b"x");
    let error = std::fs::write(format!("{reader}/f"), "y").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    // The same target with the other flag is another publication.
    let message =
        refused(client.publish(&mounted.id, &mounted.staging, &reader, &Use::default()).await, Code::AlreadyExists);
    assert!(message.contains("read-only"), "{message}");
    client.unpublish(&mounted.id, &reader).await.unwrap();
    client.unmount(&mounted).await;

    // A volume that is for readers only is mounted read-only as a whole.
    let usage = Use::mode(Mode::SingleNodeReaderOnly);
    let mounted = client.mount(&lab, &mounted.id, "b", &usage).await;
    client.stage(&mounted.id, &mounted.staging, &usage).await.unwrap();
    client.publish(&mounted.id, &mounted.staging, &mounted.target, &usage).await.unwrap();
    assert!(std::fs::write(mounted.file("f"), "y").is_err());
    assert!(std::fs::write(format!("{}/f", mounted.staging), "y").is_err());
    refused(client.stage(&mounted.id, &mounted.staging, &Use::default()).await, Code::AlreadyExists);
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// > A volume grows while it is used, to exactly the size asked for, and never shrinks.
#[tokio::test]
async fn a_volume_grows_while_it_is_used() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 8 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::fs("xfs")).await;
    write(mounted.file("f"), "kept");
    let before = client.total(&mounted.id, &mounted.target).await.unwrap();
    for path in [&mounted.target, &mounted.staging] {
        assert_eq!(client.expand(&mounted.id, path, 2 * GI).await.unwrap(), 2 * GI);
    }
    let after = client.total(&mounted.id, &mounted.target).await.unwrap();
    assert!(after - before > GI / 10 * 9, "{before} {after}");
    // Less is satisfied already; a limit below is not.
    assert_eq!(client.expand(&mounted.id, &mounted.target, GI).await.unwrap(), 2 * GI);
    let request = csi::NodeExpandVolumeRequest {
        volume_id: mounted.id.clone(),
        volume_path: mounted.target.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 0, limit_bytes: GI }),
        ..Default::default()
    };
    refused(client.node.clone().node_expand_volume(request).await, Code::OutOfRange);
    let message = refused(client.expand(&mounted.id, &mounted.target, 100 * GI).await, Code::ResourceExhausted);
    assert!(message.contains("left, and"), "{message}");
    assert_eq!(read(mounted.file("f")), b"kept");
    let request = csi::ControllerGetVolumeRequest { volume_id: mounted.id.clone() };
    let found = client.controller.clone().controller_get_volume(request).await.unwrap();
    assert_eq!(found.into_inner().volume.unwrap().capacity_bytes, 2 * GI);
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// > ext4 grows like XFS where the driver has CAP_SYS_RESOURCE; where it has not, growing is refused and nothing changes.
#[tokio::test]
async fn ext4_grows_or_says_what_it_lacks() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 8 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::fs("ext4")).await;
    write(mounted.file("f"), "kept");
    let snapshot = client.snapshot(&mounted.id, "s").await.unwrap().snapshot_id;
    let grown = client.expand(&mounted.id, &mounted.target, 2 * GI).await;
    let bigger = client.create_from("b", 2 * GI, &Use::fs("ext4"), from_snapshot(&snapshot)).await;
    if common::has_sys_resource() {
        assert_eq!(grown.unwrap(), 2 * GI);
        assert!(client.total(&mounted.id, &mounted.target).await.unwrap() > GI / 10 * 19);
        let bigger = client.mount(&lab, &bigger.unwrap().volume_id, "b", &Use::fs("ext4")).await;
        assert!(client.total(&bigger.id, &bigger.target).await.unwrap() > GI / 10 * 19);
        client.remove(&bigger).await;
    } else {
        println!("SKIPPED growing ext4: this process lacks CAP_SYS_RESOURCE");
        for message in [refused(grown, Code::FailedPrecondition), refused(bigger, Code::FailedPrecondition)] {
            assert!(message.contains("CAP_SYS_RESOURCE"), "{message}");
        }
        assert_eq!(lab.entries("volumes").len(), 1);
        let request = csi::ControllerGetVolumeRequest { volume_id: mounted.id.clone() };
        let found = client.controller.clone().controller_get_volume(request).await.unwrap().into_inner();
        assert_eq!(found.volume.unwrap().capacity_bytes, GI);
    }
    assert_eq!(read(mounted.file("f")), b"kept");
    client.remove(&mounted).await;
    client.delete_snapshot(&snapshot).await.unwrap();
    lab.assert_clean();
}

/// > A raw block volume is the device itself, and grows while it is open.
#[tokio::test]
async fn a_block_volume_is_a_device_that_grows() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 8 * GI).await;
    let usage = Use::block();
    let mounted = client.make_and_mount(&lab, "a", GI, &usage).await;
    assert!(std::fs::metadata(&mounted.target).unwrap().file_type().is_block_device());
    let device = std::fs::File::options().read(true).write(true).open(&mounted.target).unwrap();
    device.write_all_at(&[7; 4096], (GI - 4096).cast_unsigned()).unwrap();
    device.sync_all().unwrap();
    assert_eq!(client.total(&mounted.id, &mounted.target).await.unwrap(), GI);
    assert_eq!(client.expand(&mounted.id, &mounted.target, 2 * GI).await.unwrap(), 2 * GI);
    device.write_all_at(&[8; 4096], (2 * GI - 4096).cast_unsigned()).unwrap();
    drop(device);
    // Nothing holds the device now, and it stays all the same.
    let client2 = lab.restart().await;
    client2.stage(&mounted.id, &mounted.staging, &usage).await.unwrap();
    client2.publish(&mounted.id, &mounted.staging, &mounted.target, &usage).await.unwrap();
    assert_eq!(client2.total(&mounted.id, &mounted.target).await.unwrap(), 2 * GI);
    let message = refused(client2.delete(&mounted.id).await, Code::FailedPrecondition);
    assert!(message.contains("in use at"), "{message}");
    let snapshot = client2.snapshot(&mounted.id, "s").await.unwrap();
    client2.unmount(&mounted).await;
    assert_eq!(lab.loops(), Vec::<String>::new());

    let copy = client2.create_from("copy", 2 * GI, &usage, from_snapshot(&snapshot.snapshot_id)).await.unwrap();
    let copy = client2.mount(&lab, &copy.volume_id, "copy", &usage).await;
    let mut bytes = [0; 4096];
    std::fs::File::open(&copy.target).unwrap().read_exact_at(&mut bytes, (GI - 4096).cast_unsigned()).unwrap();
    assert_eq!(bytes, [7; 4096]);
    client2.remove(&copy).await;
    // A block volume is not formatted because somebody asks for a file system.
    let wrong = client2.stage(&mounted.id, &mounted.staging, &Use::default()).await;
    refused(wrong, Code::FailedPrecondition);
    client2.delete(&mounted.id).await.unwrap();
    client2.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
    drop(client);
    lab.assert_clean();
}

/// > A block volume published read-only refuses writes, also those of a privileged program.
#[tokio::test]
async fn a_read_only_block_publication_refuses_writes() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 8 * GI).await;
    let usage = Use::block();
    let mounted = client.make_and_mount(&lab, "a", GI, &usage).await;
    let readers = [lab.target("reader-1"), lab.target("reader-2")];
    for reader in &readers {
        let mut request = Client::publication(&mounted.id, &mounted.staging, reader, &usage);
        request.readonly = true;
        for _ in 0..2 {
            client.node.clone().node_publish_volume(request.clone()).await.unwrap();
        }
        assert_eq!(client.total(&mounted.id, reader).await.unwrap(), GI);
    }
    assert_eq!(lab.loops().len(), 1, "one device on the image; the readers' is on top of it");
    let device_on_image = lab.loops().remove(0);
    assert_eq!(common::loops_below(std::path::Path::new(&device_on_image)).len(), 1);
    let device = std::fs::File::options().write(true).open(&mounted.target).unwrap();
    device.write_all_at(&[9; 4096], 0).unwrap();
    device.sync_all().unwrap();
    drop(device);
    let mut bytes = [0; 4096];
    std::fs::File::open(&readers[0]).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [9; 4096]);
    // The kernel lets it be opened for writing, and refuses the write.
    let writer = std::fs::File::options().write(true).open(&readers[0]);
    assert!(writer.and_then(|device| device.write_all_at(&[1; 4096], 0)).is_err());
    assert_eq!(run("blockdev", &["--getro", &readers[0]]).trim(), "1");
    let client = lab.restart().await;
    client.unpublish(&mounted.id, &readers[0]).await.unwrap();
    assert_eq!(client.expand(&mounted.id, &mounted.target, 2 * GI).await.unwrap(), 2 * GI);
    assert_eq!(run("blockdev", &["--getsize64", &readers[1]]).trim(), (2 * GI).to_string());
    client.unpublish(&mounted.id, &readers[1]).await.unwrap();
    client.remove(&mounted).await;
    lab.assert_clean();
    assert_eq!(common::loops_below(std::path::Path::new(&device_on_image)), [""; 0]);
}

/// > An inline volume has the size asked for, is empty, and is gone with its pod, even if the driver died between.
#[tokio::test]
async fn an_inline_volume_is_gone_with_its_pod() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 4 * GI).await;
    let id = "csi-4a1b9d0e";
    let target = lab.target("inline");
    let mut request = Client::publication(id, "", &target, &Use::mode(Mode::SingleNodeWriter));
    request.volume_context =
        map(&[("csi.storage.k8s.io/ephemeral", "true"), ("csi.storage.k8s.io/pod.name", "workspace"), ("size", "1Gi")]);
    for _ in 0..2 {
        client.node.clone().node_publish_volume(request.clone()).await.unwrap();
    }
    write(format!("{target}/f"), "scratch");
    assert_eq!(lab.entries("volumes").len(), 1);
    assert_eq!(client.list().await, Vec::<String>::new());
    assert!(client.total(id, &target).await.unwrap() > GI / 10 * 8);
    let client = lab.restart().await;
    assert_eq!(read(format!("{target}/f")), b"scratch");
    for _ in 0..2 {
        client.unpublish(id, &target).await.unwrap();
    }
    lab.assert_clean();

    // What can't be made leaves nothing.
    request.volume_context.insert("size".to_owned(), "100Gi".to_owned());
    refused(client.node.clone().node_publish_volume(request.clone()).await, Code::ResourceExhausted);
    request.volume_context.insert("size".to_owned(), "1Gi".to_owned());
    std::fs::create_dir(&target).unwrap();
    std::fs::write(format!("{target}/mine"), "x").unwrap();
    refused(client.node.clone().node_publish_volume(request.clone()).await, Code::FailedPrecondition);
    assert_eq!(read(format!("{target}/mine")), b"x");
    std::fs::remove_dir_all(&target).unwrap();
    request.volume_context.remove("size");
    refused(client.node.clone().node_publish_volume(request).await, Code::InvalidArgument);
    lab.assert_clean();
}

/// > A loop device does direct I/O, in blocks of the size that the pool's disk has.
#[tokio::test]
async fn loop_devices_do_direct_io_in_the_disks_block_size() {
    skip_unless!(is_root(), "needs root");
    for sector in ["512", "4096"] {
        let lab = Lab::bare();
        let image = lab.path("pool.img");
        std::fs::File::create(&image).unwrap().set_len((4 * GI).cast_unsigned()).unwrap();
        let disk = run("losetup", &["-f", "--show", "-b", sector, "--direct-io=on", image.to_str().unwrap()]);
        let disk = disk.trim();
        run("mkfs.xfs", &["-q", disk]);
        std::fs::create_dir(lab.pool()).unwrap();
        run("mount", &[disk, lab.pool().to_str().unwrap()]);
        run("losetup", &["-d", disk]);
        let mut lab = lab;
        let client = lab.start().await;
        for usage in [Use::fs("xfs"), Use::fs("ext4"), Use::block()] {
            let mounted = client.make_and_mount(&lab, "a", GI, &usage).await;
            let device = lab.loops().remove(0).replace("/dev/", "");
            let sysfs = |name: &str| std::fs::read_to_string(format!("/sys/block/{device}/{name}")).unwrap();
            assert_eq!(sysfs("loop/dio").trim(), "1", "{usage:?}");
            assert_eq!(sysfs("queue/logical_block_size").trim(), sector, "{usage:?}");
            // Space that was set aside is not given back by a discard.
            assert_eq!(sysfs("queue/discard_max_bytes").trim(), "0");
            client.remove(&mounted).await;
        }
        lab.assert_clean();
    }
}

/// > A volume's files belong to its users: the root of a fresh file system is theirs to change.
#[tokio::test]
async fn the_published_directory_is_the_volumes_own_root() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    std::os::unix::fs::chown(&mounted.target, Some(1000), Some(2000)).unwrap();
    client.unmount(&mounted).await;
    let mounted = client.mount(&lab, &mounted.id, "a", &Use::default()).await;
    let stat = std::fs::metadata(&mounted.target).unwrap();
    assert_eq!((stat.uid(), stat.gid()), (1000, 2000));
    client.remove(&mounted).await;
    assert!(!std::path::Path::new(&mounted.target).exists());
    lab.assert_clean();
}
