//! Who is promised which bytes, and whether the promise holds.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::os::unix::fs::FileExt;

use common::{Client, GI, Lab, MI, Use, from_snapshot, is_root, refused, run};
use tonic::Code;

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
