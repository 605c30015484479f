//! The driver is killed with SIGKILL before each step of each call that changes something, and the call repeated.
//!
//! The steps are not marked in the code: strace watches one undisturbed call and lists the system calls that change
//! anything; then the call is made once for each of them, with a SIGKILL just before it. So a step that is added later
//! is covered by itself. Where the step is one of mkfs, mkfs is killed instead of the driver.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::process::Command;

use common::crash::Case;
use common::{Client, GI, Lab, MI, Use, from_snapshot, is_root, read, write};

/// > A driver killed before any step of a call, and started again, answers the repeated call as if nothing had been,
/// > and leaves no mount, loop device, file or promise of space over.
#[tokio::test]
async fn every_step_of_every_call_may_be_the_last() {
    skip_unless!(is_root(), "needs root");
    skip_unless!(Command::new("strace").arg("-V").output().is_ok(), "needs strace");
    let mut lab = Lab::without_driver("xfs", 16 * GI);
    lab.config.pool = lab.config.pool.replace('}', ", cap: 12Gi}");
    let client = lab.start().await;
    let mut case = Case::new(&mut lab, client);
    let usage = Use::default();

    case.survive(
        "CreateVolume",
        async |client, _| client.try_create(Client::request("created", GI, &Use::default())).await,
        async |lab, client, _, volume| {
            assert_eq!(lab.entries("volumes"), std::slice::from_ref(&volume.volume_id));
            assert_eq!(lab.entries("tmp"), [""; 0]);
            assert_eq!(client.capacity().await.available_capacity, 11 * GI);
            client.delete(&volume.volume_id).await.unwrap();
        },
    )
    .await;

    // Each round gets a blank volume, so that each includes the making of the file system.
    for fs in ["xfs", "ext4"] {
        let usage = Use::fs(fs);
        let staging = case.lab.staging(fs);
        let target = case.lab.target(fs);
        // The id follows from the name alone.
        let id = case.client.create(fs, GI, &usage).await;
        case.client.delete(&id).await.unwrap();
        case.survive_after(
            &format!("NodeStageVolume with {fs}"),
            async |client, _| assert_eq!(client.create(fs, GI, &usage).await, id),
            async |client, _| client.stage(&id, &staging, &usage).await,
            async |lab, client, _, ()| {
                assert_eq!((lab.mounts().len(), lab.loops().len()), (1, 1));
                client.publish(&id, &staging, &target, &usage).await.unwrap();
                write(format!("{target}/f"), "works");
                client.unpublish(&id, &target).await.unwrap();
                client.unstage(&id, &staging).await.unwrap();
                client.delete(&id).await.unwrap();
                lab.assert_clean();
            },
        )
        .await;
    }
    let block = Use::block();
    let (staging, target) = (case.lab.staging("block"), case.lab.target("block"));
    let id = case.client.create("block", GI, &block).await;
    case.survive(
        "NodeStageVolume of a block volume",
        async |client, _| client.stage(&id, &staging, &block).await,
        async |lab, client, _, ()| {
            assert_eq!((lab.mounts().len(), lab.loops().len()), (1, 1));
            client.unstage(&id, &staging).await.unwrap();
            lab.assert_no_places();
        },
    )
    .await;
    case.client.stage(&id, &staging, &block).await.unwrap();
    case.survive(
        "NodeUnstageVolume of a block volume",
        async |client, _| client.unstage(&id, &staging).await,
        async |lab, client, _, ()| {
            lab.assert_no_places();
            client.stage(&id, &staging, &block).await.unwrap();
        },
    )
    .await;
    case.client.unstage(&id, &staging).await.unwrap();
    case.client.delete(&id).await.unwrap();

    let mounted = case.client.make_and_mount(case.lab, "long-lived", GI, &usage).await;
    write(mounted.file("f"), "precious");
    case.client.unpublish(&mounted.id, &mounted.target).await.unwrap();
    for read_only in [false, true] {
        let mut request = Client::publication(&mounted.id, &mounted.staging, &target, &usage);
        request.readonly = read_only;
        case.survive(
            &format!("NodePublishVolume, read-only {read_only}"),
            async |client, _| client.node.clone().node_publish_volume(request.clone()).await.map(drop),
            async |lab, client, _, ()| {
                assert_eq!(lab.mounts().len(), 2);
                assert_eq!(read(format!("{target}/f")), b"precious");
                assert_eq!(std::fs::write(format!("{target}/g"), "x").is_err(), read_only);
                client.unpublish(&mounted.id, &target).await.unwrap();
                assert!(!std::path::Path::new(&target).exists());
            },
        )
        .await;
    }
    case.client.publish(&mounted.id, &mounted.staging, &mounted.target, &usage).await.unwrap();
    case.survive(
        "NodeUnpublishVolume",
        async |client, _| client.unpublish(&mounted.id, &mounted.target).await,
        async |lab, client, _, ()| {
            assert_eq!(lab.mounts().len(), 1);
            assert!(!std::path::Path::new(&mounted.target).exists());
            client.publish(&mounted.id, &mounted.staging, &mounted.target, &usage).await.unwrap();
        },
    )
    .await;
    let grown = |round: i64| GI + 64 * MI * (round + 1);
    case.survive(
        "NodeExpandVolume",
        async |client, step| client.expand(&mounted.id, &mounted.target, grown(step)).await,
        async |_, client, step, size| {
            assert_eq!(size, grown(step));
            let total = client.total(&mounted.id, &mounted.target).await.unwrap();
            assert!(total > size - 128 * MI, "{total} of {size}");
            assert_eq!(client.capacity().await.available_capacity, 12 * GI - size);
        },
    )
    .await;
    let size = 12 * GI - case.client.capacity().await.available_capacity;
    case.survive(
        "CreateSnapshot",
        async |client, _| client.snapshot(&mounted.id, "s").await,
        async |lab, client, _, snapshot| {
            assert_eq!(lab.entries("snapshots"), std::slice::from_ref(&snapshot.snapshot_id));
            assert_eq!(client.capacity().await.available_capacity, 12 * GI - 2 * size);
            client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
        },
    )
    .await;
    let snapshot = case.client.snapshot(&mounted.id, "s").await.unwrap().snapshot_id;
    case.survive(
        "CreateVolume from a snapshot",
        async |client, _| client.create_from("restored", size, &usage, from_snapshot(&snapshot)).await,
        async |lab, client, _, volume| {
            let restored = client.mount(lab, &volume.volume_id, "restored", &usage).await;
            assert_eq!(read(restored.file("f")), b"precious");
            client.remove(&restored).await;
        },
    )
    .await;
    case.survive(
        "DeleteSnapshot",
        async |client, _| client.delete_snapshot(&snapshot).await,
        async |lab, client, _, ()| {
            assert_eq!(lab.entries("snapshots").len(), 0);
            client.room_comes_back(12 * GI - size).await;
            assert_eq!(lab.entries("trash").len(), 0);
            client.snapshot(&mounted.id, "s").await.unwrap();
        },
    )
    .await;
    case.client.delete_snapshot(&snapshot).await.unwrap();
    assert_eq!(read(mounted.file("f")), b"precious");
    case.client.unpublish(&mounted.id, &mounted.target).await.unwrap();
    case.survive(
        "NodeUnstageVolume",
        async |client, _| client.unstage(&mounted.id, &mounted.staging).await,
        async |lab, client, _, ()| {
            lab.assert_no_places();
            client.stage(&mounted.id, &mounted.staging, &usage).await.unwrap();
            assert_eq!(read(format!("{}/f", mounted.staging)), b"precious");
        },
    )
    .await;
    case.client.unstage(&mounted.id, &mounted.staging).await.unwrap();
    case.client.delete(&mounted.id).await.unwrap();

    let id = case.client.create("deleted", GI, &usage).await;
    case.survive(
        "DeleteVolume",
        async |client, _| client.delete(&id).await,
        async |lab, client, _, ()| {
            lab.assert_clean();
            client.room_comes_back(12 * GI).await;
            assert_eq!(client.create("deleted", GI, &usage).await, id);
        },
    )
    .await;
    case.client.delete(&id).await.unwrap();

    // An inline volume: made and mounted in one call, unmounted and deleted in one.
    let mut request = Client::publication("csi-1", "", &target, &usage);
    request.volume_context = common::map(&[("csi.storage.k8s.io/ephemeral", "true"), ("size", "1Gi")]);
    case.survive(
        "NodePublishVolume of an inline volume",
        async |client, _| client.node.clone().node_publish_volume(request.clone()).await.map(drop),
        async |lab, client, _, ()| {
            write(format!("{target}/f"), "works");
            client.unpublish("csi-1", &target).await.unwrap();
            lab.assert_clean();
        },
    )
    .await;
    case.client.node.clone().node_publish_volume(request.clone()).await.unwrap();
    case.survive(
        "NodeUnpublishVolume of an inline volume",
        async |client, _| client.unpublish("csi-1", &target).await,
        async |lab, client, _, ()| {
            lab.assert_clean();
            client.node.clone().node_publish_volume(request.clone()).await.unwrap();
        },
    )
    .await;
    case.client.unpublish("csi-1", &target).await.unwrap();
    lab.assert_clean();
}
