//! Snapshots, clones, and what is made from them, against the real binary on real file systems.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use berth::proto::csi;
use common::{GI, Lab, MI, Use, from_snapshot, from_volume, is_root, map, read, refused, write};
use tonic::Code;

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
    lab.assert_says("snapshots=\"no: no reflink");
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    refused(client.snapshot(&mounted.id, "s").await, Code::Unimplemented);
    refused(client.create_from("b", GI, &Use::default(), from_volume(&mounted.id)).await, Code::Unimplemented);
    client.remove(&mounted).await;
    lab.assert_clean();
}
