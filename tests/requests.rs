//! What a caller may say, and what is refused: a clear error, nothing lost, nothing left behind.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;

use berth::proto::csi;
use common::{Client, GI, Lab, MI, Use, from_snapshot, from_volume, is_root, map, read, refused, run, write};
use tonic::Code;

/// > No id leads out of the pool: `..`, empty parts, control characters and over-long ids are refused as such.
#[tokio::test]
async fn hostile_ids_are_refused_everywhere() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 2 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    write(mounted.file("f"), "precious");
    let inside = format!("../volumes/{}", mounted.id);
    let long = "x".repeat(129);
    for id in ["..", ".", "", "a/../b", "a//b", "/", "/etc", "a/", "a\0b", "a\nb", inside.as_str(), long.as_str()] {
        refused(client.delete(id).await, Code::InvalidArgument);
        refused(client.delete_snapshot(id).await, Code::InvalidArgument);
        refused(client.stage(id, &mounted.staging, &Use::default()).await, Code::InvalidArgument);
        refused(client.unstage(id, &mounted.staging).await, Code::InvalidArgument);
        refused(client.publish(id, &mounted.staging, &lab.target("x"), &Use::default()).await, Code::InvalidArgument);
        refused(client.unpublish(id, &mounted.target).await, Code::InvalidArgument);
        refused(client.expand(id, &mounted.target, 2 * GI).await, Code::InvalidArgument);
        refused(client.total(id, &mounted.target).await, Code::InvalidArgument);
        refused(client.health(id).await, Code::InvalidArgument);
        refused(client.snapshot(id, "s").await, Code::InvalidArgument);
        if !id.is_empty() {
            refused(client.create_from("b", GI, &Use::default(), from_snapshot(id)).await, Code::InvalidArgument);
        }
    }
    // Well-formed ids that nobody made are simply not there; another node's are told apart from those.
    for id in ["fake", "a/b", "vol-x", &mounted.id.to_uppercase()] {
        client.delete(id).await.unwrap();
        refused(client.stage(id, &lab.staging("x"), &Use::default()).await, Code::NotFound);
        refused(client.total(id, &mounted.target).await, Code::NotFound);
    }
    let elsewhere = mounted.id.replace(&mounted.id[4..12], "00000000");
    let message = refused(client.delete(&elsewhere).await, Code::FailedPrecondition);
    assert!(message.contains("another node"), "{message}");
    assert_eq!(read(mounted.file("f")), b"precious");
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// > Paths are absolute and plain, and no part of one is a symbolic link.
#[tokio::test]
async fn relative_and_symlinked_paths_are_refused() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 2 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    let elsewhere = lab.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, lab.target("link")).unwrap();
    let below = format!("{}/below", lab.target("link"));
    let dotted = format!("{}/../x", mounted.target);
    for target in ["", "relative/path", "/", "//", "/a//b", &dotted, &lab.target("link"), &below] {
        refused(client.publish(&mounted.id, &mounted.staging, target, &Use::default()).await, Code::InvalidArgument);
        refused(client.unpublish(&mounted.id, target).await, Code::InvalidArgument);
        refused(client.stage(&mounted.id, target, &Use::default()).await, Code::InvalidArgument);
        refused(client.unstage(&mounted.id, target).await, Code::InvalidArgument);
    }
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    assert!(Path::new(&lab.target("link")).is_symlink());
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// > Nothing is mounted over what is in use, and nothing is unmounted or removed that is not this volume's.
#[tokio::test]
async fn a_place_in_use_is_left_alone() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    let other = client.make_and_mount(&lab, "b", GI, &Use::default()).await;
    write(other.file("f"), "b's");

    let foreign = lab.target("foreign");
    std::fs::create_dir(&foreign).unwrap();
    run("mount", &["-t", "tmpfs", "none", &foreign]);
    let full = lab.target("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(format!("{full}/mine"), "x").unwrap();
    let file = lab.target("file");
    std::fs::write(&file, "x").unwrap();
    for target in [&foreign, &full, &file, &other.target] {
        refused(client.publish(&mounted.id, &mounted.staging, target, &Use::default()).await, Code::FailedPrecondition);
        refused(client.unpublish(&mounted.id, target).await, Code::FailedPrecondition);
    }
    refused(client.stage(&mounted.id, &foreign, &Use::default()).await, Code::FailedPrecondition);
    client.unstage(&mounted.id, &foreign).await.unwrap();
    client.unstage(&mounted.id, &other.staging).await.unwrap();
    assert_eq!(read(other.file("f")), b"b's");
    assert_eq!(read(format!("{full}/mine")), b"x");
    run("mountpoint", &["-q", &foreign]);
    // What was never staged can't be published, and says so.
    let message = refused(
        client.publish(&mounted.id, &lab.staging("none"), &lab.target("x"), &Use::default()).await,
        Code::FailedPrecondition,
    );
    assert!(message.contains("stage it first"), "{message}");
    assert!(!Path::new(&lab.target("x")).exists());
    // Nor what lies below our own mount.
    refused(client.publish(&mounted.id, &mounted.staging, &foreign, &Use::default()).await, Code::FailedPrecondition);
    run("mount", &["--bind", &mounted.staging, &foreign]);
    refused(client.unpublish(&mounted.id, &foreign).await, Code::FailedPrecondition);
    run("mountpoint", &["-q", &foreign]);
    // A busy mount is not torn away.
    let held = std::fs::File::open(mounted.file(".")).unwrap();
    refused(client.unpublish(&mounted.id, &mounted.target).await, Code::Aborted);
    drop(held);
    common::unmount(&[&foreign]);
    client.remove(&mounted).await;
    client.remove(&other).await;
    lab.assert_clean();
}

/// > Sizes are honoured or refused: nothing is rounded down, nothing is promised that can't be kept.
#[tokio::test]
async fn impossible_sizes_are_refused() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let with = |required_bytes, limit_bytes, usage: &Use| {
        let mut request = Client::request("a", 0, usage);
        request.capacity_range = Some(csi::CapacityRange { required_bytes, limit_bytes });
        request
    };
    let any = Use::default();
    for (request, code) in [
        (with(0, 0, &any), Code::InvalidArgument),
        (with(-1, 0, &any), Code::InvalidArgument),
        (with(2 * GI, GI, &any), Code::InvalidArgument),
        (with(1, 0, &any), Code::OutOfRange),
        (with(16 * MI - 4096, 0, &any), Code::OutOfRange),
        (with(200 * MI, 0, &Use::fs("xfs")), Code::OutOfRange),
        (with(GI + 1, GI + 2, &any), Code::OutOfRange),
        (with(i64::MAX, 0, &any), Code::OutOfRange),
        (with(5 * GI, 0, &any), Code::ResourceExhausted),
        (with(1 << 60, 0, &any), Code::ResourceExhausted),
    ] {
        refused(client.try_create(request).await, code);
        lab.assert_clean();
    }
    let exact = client.try_create(with(GI, GI, &any)).await.unwrap();
    assert_eq!(exact.capacity_bytes, GI);
    client.delete(&exact.volume_id).await.unwrap();
    // No size at all: the default. An odd one: the next multiple of a block.
    let mut request = Client::request("b", 0, &any);
    request.capacity_range = None;
    let default = client.try_create(request).await.unwrap();
    assert_eq!(default.capacity_bytes, GI);
    let odd = client.try_create(Client::request("c", 400 * MI + 1, &any)).await.unwrap();
    assert_eq!(odd.capacity_bytes, 400 * MI + 4096);
    for id in [default.volume_id, odd.volume_id] {
        client.delete(&id).await.unwrap();
    }
    // Nor is a place promised where this node is not.
    let mut request = Client::request("d", GI, &any);
    let elsewhere = csi::Topology { segments: map(&[("topology.berth.dev/node", "node-b")]) };
    request.accessibility_requirements =
        Some(csi::TopologyRequirement { requisite: vec![elsewhere.clone()], preferred: Vec::new() });
    refused(client.try_create(request).await, Code::ResourceExhausted);
    let request = csi::GetCapacityRequest { accessible_topology: Some(elsewhere), ..Default::default() };
    assert_eq!(client.controller.clone().get_capacity(request).await.unwrap().into_inner().available_capacity, 0);
    lab.assert_clean();
}

/// > A path may have spaces.
#[tokio::test]
async fn a_path_may_have_spaces() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let usage = Use::mode(csi::volume_capability::access_mode::Mode::SingleNodeSingleWriter);
    let mounted = client.make_and_mount(&lab, "with a space", GI, &usage).await;
    client.publish(&mounted.id, &mounted.staging, &mounted.target, &usage).await.unwrap();
    std::fs::write(mounted.file("f"), "not synced").unwrap();
    let copy = client.create_from("b", GI, &usage, common::from_volume(&mounted.id)).await.unwrap();
    let copy = client.mount(&lab, &copy.volume_id, "copy", &usage).await;
    assert_eq!(read(copy.file("f")), b"not synced");
    client.remove(&copy).await;
    client.remove(&mounted).await;
    lab.assert_clean();
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
