//! The life of a local volume, against the real binary on real file systems. Each test that a promise of
//! `docs/semantics.md` names quotes it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use berth::proto::csi;
use berth::proto::csi::volume_capability::access_mode::Mode;
use common::{Client, GI, Lab, MI, Use, from_snapshot, from_volume, is_root, map, read, refused, run, write};
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

/// > A volume that has grown is whole on its disk: its snapshots can be mounted, and so can it after a power cut.
#[tokio::test]
async fn a_volume_that_has_grown_can_be_restored() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, mut client) = Lab::on("xfs", 16 * GI).await;
    let usage = Use::fs("xfs");
    let mounted = client.make_and_mount(&lab, "a", 302 * MI, &usage).await;
    let mut size = 302 * MI;
    for round in 0..8_i64 {
        for file in 0..6 {
            write(mounted.file(&format!("before-{file}")), vec![7; usize::try_from(100_000 * (round + 1)).unwrap()]);
        }
        size += (5 + round * 4) * MI;
        client.expand(&mounted.id, &mounted.target, size).await.unwrap();
        for file in 0..6 {
            write(mounted.file(&format!("after-{file}")), vec![8; usize::try_from(90_000 * (round + 1)).unwrap()]);
        }
        // The image as it is on the disk is what a power cut would leave.
        let snapshot = client.snapshot(&mounted.id, &format!("s{round}")).await.unwrap().snapshot_id;
        let copy = client.create_from(&format!("c{round}"), size, &usage, from_snapshot(&snapshot)).await.unwrap();
        let copy = client.mount(&lab, &copy.volume_id, "copy", &usage).await;
        assert!(read(copy.file("after-5")).iter().all(|byte| *byte == 8));
        client.remove(&copy).await;
        client.delete_snapshot(&snapshot).await.unwrap();
        client = lab.restart().await;
    }
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

/// > Two processes that serve one pool, such as a controller and a node, promise its space once.
#[tokio::test]
async fn two_processes_count_one_pool_alike() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 16 * GI);
    lab.config.pool = lab.config.pool.replace('}', ", cap: 8Gi}");
    let controller = lab.start().await;
    let mut other = Lab::bare();
    other.config.pool = lab.config.pool.clone();
    let node = other.start().await;
    let id = controller.create("a", GI, &Use::default()).await;
    assert_eq!(node.capacity().await.available_capacity, 7 * GI);
    let mounted = node.mount(&lab, &id, "a", &Use::default()).await;
    assert_eq!(node.expand(&id, &mounted.target, 4 * GI).await.unwrap(), 4 * GI);
    assert_eq!(controller.capacity().await.available_capacity, 4 * GI);
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..16 {
        let client = if number % 2 == 0 { controller.clone() } else { node.clone() };
        calls.spawn(async move { client.try_create(Client::request(&format!("v{number}"), GI, &Use::block())).await });
    }
    let mut made = Vec::new();
    while let Some(result) = calls.join_next().await {
        match result.unwrap() {
            Ok(volume) => made.push(volume.volume_id),
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
        }
    }
    assert_eq!(made.len(), 4);
    for (number, id) in made.iter().enumerate() {
        [&controller, &node][number % 2].delete(id).await.unwrap();
    }
    node.unmount(&mounted).await;
    controller.delete(&id).await.unwrap();
    assert_eq!(controller.capacity().await, node.capacity().await);
    assert_eq!(node.list().await, Vec::<String>::new());
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

/// > A snapshot holds what was written before it was taken, whatever becomes of the volume.
/// > A restored volume may be bigger than its snapshot, and has the size asked for.
#[tokio::test]
async fn a_snapshot_keeps_what_the_volume_loses() {
    skip_unless!(is_root(), "needs root");
    for pool in ["xfs", "btrfs"] {
        let (lab, client) = Lab::on(pool, 16 * GI).await;
        for fs in ["xfs", "ext4"] {
            let usage = Use::fs(fs);
            let source = client.make_and_mount(&lab, &format!("{fs}-source"), GI, &usage).await;
            // Not synced by us: the driver does it.
            std::fs::write(source.file("f"), "before").unwrap();
            let snapshot = client.snapshot(&source.id, &format!("{fs}-s")).await.unwrap();
            assert!(snapshot.ready_to_use);
            assert_eq!(snapshot.size_bytes, GI);
            assert_eq!(snapshot.accessible_topology[0].segments, map(&[("topology.berth.dev/node", "node-a")]));
            assert_eq!(client.snapshot(&source.id, &format!("{fs}-s")).await.unwrap(), snapshot);
            write(source.file("f"), "after!");
            // Beside its source, which has the same UUID.
            let size = if fs == "xfs" || common::has_sys_resource() { 2 * GI } else { GI };
            let restored = client
                .create_from(&format!("{fs}-restored"), size, &usage, from_snapshot(&snapshot.snapshot_id))
                .await
                .unwrap();
            let restored = client.mount(&lab, &restored.volume_id, &format!("{fs}-restored"), &usage).await;
            assert_eq!(read(restored.file("f")), b"before");
            assert!(client.total(&restored.id, &restored.target).await.unwrap() > size / 10 * 9);
            let clone = client.create_from(&format!("{fs}-clone"), GI, &usage, from_volume(&source.id)).await.unwrap();
            let clone = client.mount(&lab, &clone.volume_id, &format!("{fs}-clone"), &usage).await;
            assert_eq!(read(clone.file("f")), b"after!");
            write(clone.file("f"), "clone");
            assert_eq!(read(source.file("f")), b"after!");
            // The volume may go first.
            client.remove(&source).await;
            client.remove(&restored).await;
            client.remove(&clone).await;
            let again = client
                .create_from(&format!("{fs}-again"), GI, &usage, from_snapshot(&snapshot.snapshot_id))
                .await
                .unwrap();
            client.delete(&again.volume_id).await.unwrap();
            client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
            client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
        }
        lab.assert_clean();
    }
}

/// > What a request asks for is compared with what exists: a difference is refused and changes nothing.
#[tokio::test]
async fn a_repeated_request_is_compared_and_not_just_found() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 32 * GI).await;
    let request = Client::request("a", GI, &Use::fs("xfs"));
    let first = client.try_create(request.clone()).await.unwrap();
    assert_eq!(client.try_create(request.clone()).await.unwrap(), first);
    let snapshot = client.snapshot(&first.volume_id, "s").await.unwrap();
    let differ = |change: fn(&mut csi::CreateVolumeRequest)| {
        let mut other = request.clone();
        change(&mut other);
        other
    };
    for other in [
        differ(|r| r.capacity_range.as_mut().unwrap().required_bytes = 2 * GI),
        differ(|r| r.volume_capabilities = vec![Use::fs("ext4").message()]),
        differ(|r| r.volume_capabilities = vec![Use::block().message()]),
        differ(|r| r.parameters = map(&[("mkfsOptions", "-L other")])),
    ] {
        let message = refused(client.try_create(other).await, Code::AlreadyExists);
        assert!(message.contains("exists, but"), "{message}");
    }
    let restored = client.create_from("a", GI, &Use::fs("xfs"), from_snapshot(&snapshot.snapshot_id)).await;
    refused(restored, Code::AlreadyExists);
    let other = client.create("b", GI, &Use::default()).await;
    refused(client.snapshot(&other, "s").await, Code::AlreadyExists);
    // Wrong file system, too small, no such source.
    let from = |id: &str| from_snapshot(id);
    let small = client.create_from("c", GI / 2, &Use::fs("xfs"), from(&snapshot.snapshot_id)).await;
    refused(small, Code::OutOfRange);
    refused(client.create_from("c", GI, &Use::default(), from("snap-none")).await, Code::NotFound);
    refused(client.create_from("c", GI, &Use::default(), from_volume("vol-none")).await, Code::NotFound);
    for id in [first.volume_id, other] {
        client.delete(&id).await.unwrap();
    }
    client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
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

/// > Space is promised to the byte: calls at the same time never get more than there is.
#[tokio::test]
async fn parallel_creates_never_share_the_last_bytes() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 16 * GI);
    lab.config.pool = lab.config.pool.replace('}', ", cap: 10Gi}");
    let client = lab.start().await;
    assert_eq!(client.capacity().await.available_capacity, 10 * GI);
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..64 {
        let client = client.clone();
        calls.spawn(async move { client.try_create(Client::request(&format!("v{number}"), GI, &Use::block())).await });
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
    assert_eq!((made.len(), full), (10, 54));
    let room = client.capacity().await;
    assert_eq!((room.available_capacity, room.maximum_volume_size), (0, Some(0)));
    let mut calls = tokio::task::JoinSet::new();
    for id in made {
        for _ in 0..2 {
            let (client, id) = (client.clone(), id.clone());
            calls.spawn(async move { client.delete(&id).await });
        }
    }
    while let Some(result) = calls.join_next().await {
        result.unwrap().unwrap();
    }
    assert_eq!(client.capacity().await.available_capacity, 10 * GI);
    lab.assert_clean();
}

/// > A snapshot counts like a volume, since every block of the volume may be written again; a thin pool counts nothing.
#[tokio::test]
async fn capacity_counts_promises_and_a_thin_pool_only_bytes() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 16 * GI);
    lab.config.pool = lab.config.pool.replace('}', ", cap: 10Gi}");
    let client = lab.start().await;
    let id = client.create("a", 4 * GI, &Use::default()).await;
    let snapshot = client.snapshot(&id, "s").await.unwrap().snapshot_id;
    assert_eq!(client.capacity().await.available_capacity, 2 * GI);
    refused(client.create_from("b", 4 * GI, &Use::default(), from_snapshot(&snapshot)).await, Code::ResourceExhausted);
    // Nothing of a refused call is left, and another process counts the same.
    assert_eq!(lab.entries("tmp"), Vec::<String>::new());
    let client = lab.restart().await;
    let room = client.capacity().await;
    assert_eq!((room.available_capacity, room.maximum_volume_size), (2 * GI, Some(2 * GI)));
    assert_eq!(room.minimum_volume_size, Some(16 * MI));
    client.delete(&id).await.unwrap();
    client.delete_snapshot(&snapshot).await.unwrap();

    lab.config.pool = lab.config.pool.replace("cap: 10Gi", "thin: true");
    let client = lab.restart().await;
    let mut ids = Vec::new();
    for number in 0..3 {
        ids.push(client.create(&format!("t{number}"), 12 * GI, &Use::default()).await);
    }
    let used = run("du", &["-s", "-k", lab.pool().join("volumes").to_str().unwrap()]);
    let used: u64 = used.split('\t').next().unwrap().parse().unwrap();
    assert!(used < 1024, "{used} KiB");
    for id in ids {
        client.delete(&id).await.unwrap();
    }
    lab.assert_clean();
}

/// > What else lies on the pool's file system is not promised, nor is what snapshots will yet need.
#[tokio::test]
async fn a_promise_holds_beside_what_somebody_else_stores() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 2 * GI).await;
    run("fallocate", &["-l", "800M", lab.pool().join("stranger").to_str().unwrap()]);
    let mounted = client.make_and_mount(&lab, "a", 400 * MI, &Use::block()).await;
    let device = std::fs::File::options().write(true).open(&mounted.target).unwrap();
    let fill = |byte| {
        for at in 0..400 {
            device.write_all_at(&vec![byte; 1 << 20], at << 20).unwrap();
        }
        device.sync_all().unwrap();
    };
    fill(1);
    let before = client.capacity().await.available_capacity;
    let snapshot = client.snapshot(&mounted.id, "s").await.unwrap().snapshot_id;
    let after = client.capacity().await.available_capacity;
    assert!(before - after >= 400 * MI, "{before} {after}");
    // Everything that is left, to the block, and then the volume is written anew.
    let rest = client.create("rest", after / MI * MI, &Use::block()).await;
    assert!(client.capacity().await.available_capacity < MI);
    fill(2);
    drop(device);
    client.remove(&mounted).await;
    client.delete(&rest).await.unwrap();
    client.delete_snapshot(&snapshot).await.unwrap();
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

/// > Mount options of the allow-list reach the mount, and mkfs options of the class reach mkfs.
#[tokio::test]
async fn options_reach_mount_and_mkfs() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let usage =
        Use { flags: vec!["noatime".to_owned(), "nodev".to_owned(), "commit=17".to_owned()], ..Use::fs("ext4") };
    let mut request = Client::request("a", GI, &usage);
    request.parameters = map(&[("mkfsOptions", "-L mine -m 0"), ("pool", "main")]);
    let volume = client.try_create(request.clone()).await.unwrap();
    let mounted = client.mount(&lab, &volume.volume_id, "a", &usage).await;
    let options = run("findmnt", &["-no", "OPTIONS,LABEL", &mounted.target]);
    for option in ["noatime", "nodev", "commit=17", "mine"] {
        assert!(options.contains(option), "{options}");
    }
    client.remove(&mounted).await;
    for (key, value) in [
        ("mkfsOptions", "-J device=/dev/sda"),
        ("mkfsOptions", "-d ."),
        ("mkfsOptions", "-d agcount=4"),
        ("mkfsoptions", "-m 0"),
        ("Pool", "main"),
    ] {
        request.parameters = map(&[(key, value)]);
        refused(client.try_create(request.clone()).await, Code::InvalidArgument);
    }
    request.parameters = map(&[("pool", "elsewhere")]);
    let message = refused(client.try_create(request.clone()).await, Code::ResourceExhausted);
    assert!(message.contains("it has: main"), "{message}");
    for flag in ["suid,dev", "errors=panic", "journal_dev=8", "logdev=/dev/sda"] {
        let usage = Use { flags: vec![flag.to_owned()], ..Use::fs("ext4") };
        refused(client.try_create(Client::request("b", GI, &usage)).await, Code::InvalidArgument);
    }
    lab.assert_clean();
}

/// > Where the pool's file system has no reflink, snapshots and clones are not advertised, and the log says why.
#[tokio::test]
async fn a_pool_without_reflink_does_not_claim_snapshots() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("ext4", 4 * GI).await;
    let request = csi::ControllerGetCapabilitiesRequest {};
    let capabilities = client.controller.clone().controller_get_capabilities(request).await.unwrap();
    let capabilities = format!("{:?}", capabilities.into_inner());
    for absent in [5, 6, 7, 15] {
        assert!(!capabilities.contains(&format!("Rpc {{ r#type: {absent} }}")), "{capabilities}");
    }
    assert!(lab.log().contains("no reflink"), "{}", lab.log());
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    refused(client.snapshot(&mounted.id, "s").await, Code::Unimplemented);
    refused(client.create_from("b", GI, &Use::default(), from_volume(&mounted.id)).await, Code::Unimplemented);
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// > Pages of a list neither repeat nor leave out a volume that was there all the time.
#[tokio::test]
async fn pages_neither_repeat_nor_leave_out() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let mut ids = Vec::new();
    for number in 0..7 {
        ids.push(client.create(&format!("v{number}"), 16 * MI, &Use::block()).await);
    }
    ids.sort();
    let page = |token: String| {
        let mut controller = client.controller.clone();
        async move {
            let request = csi::ListVolumesRequest { max_entries: 3, starting_token: token };
            let reply = controller.list_volumes(request).await.unwrap().into_inner();
            let ids: Vec<_> = reply.entries.into_iter().map(|entry| entry.volume.unwrap().volume_id).collect();
            (ids, reply.next_token)
        }
    };
    let (first, token) = page(String::new()).await;
    // The token's own volume may go.
    client.delete(&first[2]).await.unwrap();
    let (second, token) = page(token).await;
    let (third, end) = page(token).await;
    assert_eq!([first.clone(), second, third].concat(), ids);
    assert_eq!(end, "");
    for token in ["nonsense", "vol-00000000-00000000000000000000000000000000", "../.."] {
        let request = csi::ListVolumesRequest { max_entries: 3, starting_token: token.to_owned() };
        refused(client.controller.clone().list_volumes(request).await, Code::Aborted);
    }
    for id in ids {
        client.delete(&id).await.unwrap();
    }
    lab.assert_clean();
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
