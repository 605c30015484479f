//! Cluster storage on a real Ceph cluster, with the smallest capabilities.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use berth::proto::csi;
use berth::proto::csi::volume_capability::access_mode::Mode;
use common::ceph::{Cluster, assert_nothing_mounted, fuse_at, name_of};
use common::{Client, GI, Lab, MI, Use, from_snapshot, from_volume, map, read, refused, run, write};
use sha2::Digest;
use tonic::Code;

fn shared() -> Use {
    Use::mode(Mode::MultiNodeMultiWriter)
}

fn read_only() -> Use {
    Use::mode(Mode::MultiNodeReaderOnly)
}

/// Asks again while the answer is that the copy is not complete.
async fn create_from(
    client: &Client,
    name: &str,
    size: i64,
    usage: &Use,
    source: csi::volume_content_source::Type,
) -> String {
    let end = Instant::now() + Duration::from_secs(180);
    loop {
        match client.create_from(name, size, usage, source.clone()).await {
            Ok(volume) => return volume.volume_id,
            Err(status) if status.code() == Code::Aborted && Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(status) => panic!("{status}"),
        }
    }
}

/// > Workspaces on two nodes write the same volume and read what the other wrote.
#[tokio::test]
async fn two_nodes_share_a_volume() {
    let Some(cluster) = Cluster::lab() else { return };
    let (one, client) = cluster.driver().await;
    let (other, mut second) = cluster.driver().await;
    second.contexts = client.contexts.clone();
    let here = client.make_and_mount(&one, "two-nodes", 64 * MI, &shared()).await;
    let there = second.mount(&other, &here.id, "two-nodes", &shared()).await;
    write(here.file("from-one"), "one");
    write(there.file("from-other"), "other");
    assert_eq!(read(there.file("from-one")), b"one");
    assert_eq!(read(here.file("from-other")), b"other");
    // What one appends, the other sees.
    File::options().append(true).open(there.file("from-one")).unwrap().write_all(b" and two").unwrap();
    assert_eq!(read(here.file("from-one")), b"one and two");
    second.unmount(&there).await;
    client.remove(&here).await;
    assert!(!cluster.subvolumes().contains(&name_of(&here.id).to_owned()));
    assert_nothing_mounted(&one.path(""));
    assert_nothing_mounted(&other.path(""));
}

/// > A volume's size holds: writing ends at it, and `df` shows it.
#[tokio::test]
async fn the_quota_holds() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let volume = client.make_and_mount(&lab, "quota", 32 * MI, &shared()).await;
    assert_eq!(client.total(&volume.id, &volume.target).await.unwrap(), 32 * MI);
    let df = run("df", &["-B1", "--output=size", &volume.target]);
    assert_eq!(df.split_whitespace().last(), Some((32 * MI).to_string().as_str()));
    let mut file = File::create(volume.file("big")).unwrap();
    let block = vec![7; 1 << 20];
    let mut written = 0;
    let refused = loop {
        match file.write_all(&block).and_then(|()| file.sync_data()) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 64, "{written} MiB went into a volume of 32");
    };
    assert!([libc::EDQUOT, libc::ENOSPC].contains(&refused.raw_os_error().unwrap()), "{refused}");
    assert!(written >= 24, "{written}");
    drop(file);
    // Ceph counts with some delay.
    let end = Instant::now() + Duration::from_secs(60);
    while client.health(&volume.id).await.unwrap() != ["QuotaReached"] {
        assert!(Instant::now() < end, "a full volume is reported as well");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    client.remove(&volume).await;
}

/// > What was written to cluster storage survives unpublishing, unstaging and a driver that is killed with SIGKILL.
#[tokio::test]
async fn data_survives() {
    let Some(cluster) = Cluster::lab() else { return };
    let (mut lab, client) = cluster.driver().await;
    let volume = client.make_and_mount(&lab, "survives", 64 * MI, &shared()).await;
    write(volume.file("kept"), vec![42; 3 << 20]);
    client.unmount(&volume).await;
    lab.kill();
    let mut again = cluster.start(&mut lab).await;
    again.contexts = client.contexts.clone();
    let volume = again.mount(&lab, &volume.id, "survives", &shared()).await;
    assert_eq!(read(volume.file("kept")), vec![42; 3 << 20]);
    again.remove(&volume).await;
}

/// > ceph-fuse does not die with the driver: a mounted volume is read and written while the driver is killed and after,
/// > and the driver that comes then unpublishes and unstages it.
#[tokio::test]
async fn a_mount_outlives_the_driver() {
    let Some(cluster) = Cluster::lab() else { return };
    let mut lab = cluster.idle_lab();
    // As a container runtime ends a container: everything in its control group dies.
    let groups = cgroups();
    skip_unless!(groups.is_some(), "no cgroup v2");
    let groups = groups.unwrap();
    lab.config.extra = format!("fuse: {{cgroup: {}}}", groups.0.join("fuse").display());
    let client = cluster.start(&mut lab).await;
    std::fs::write(groups.0.join("driver/cgroup.procs"), lab.pid().to_string()).unwrap();
    let volume = client.make_and_mount(&lab, "outlives", 64 * MI, &shared()).await;
    let mut open = File::create(volume.file("open")).unwrap();
    open.write_all(b"before, ").unwrap();
    std::fs::write(groups.0.join("driver/cgroup.kill"), "1").unwrap();
    lab.wait();
    open.write_all(b"after").unwrap();
    open.sync_all().unwrap();
    assert_eq!(read(volume.file("open")), b"before, after");
    drop(open);
    let mut again = cluster.start(&mut lab).await;
    again.contexts = client.contexts.clone();
    // All of it is found as it is.
    again.stage(&volume.id, &volume.staging, &shared()).await.unwrap();
    again.publish(&volume.id, &volume.staging, &volume.target, &shared()).await.unwrap();
    again.remove(&volume).await;
    assert_nothing_mounted(&lab.path(""));
}

/// Control groups of the test, empty and gone when it ends.
struct Groups(std::path::PathBuf);

fn cgroups() -> Option<Groups> {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mut places = table.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let root = Path::new(places.next()?.split(' ').nth(1)?).join(format!("berth-test-{}", std::process::id()));
    std::fs::create_dir(&root).ok()?;
    std::fs::create_dir(root.join("driver")).ok()?;
    Some(Groups(root))
}

impl Drop for Groups {
    fn drop(&mut self) {
        for group in ["driver", "fuse", ""] {
            let _ = std::fs::write(self.0.join(group).join("cgroup.kill"), "1");
            for _ in 0..100 {
                if std::fs::remove_dir(self.0.join(group)).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// > A read-only volume from a snapshot shows it at once, without a copy, while its source changes. Neither the snapshot
/// > nor the source can be deleted under it.
#[tokio::test]
async fn a_read_only_volume_shows_its_snapshot() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let source = client.make_and_mount(&lab, "shown-source", 64 * MI, &shared()).await;
    write(source.file("file"), "then");
    let snapshot = client.snapshot(&source.id, "shown-snapshot").await.unwrap();
    assert_eq!(snapshot.size_bytes, 64 * MI);
    write(source.file("file"), "now");
    write(source.file("more"), "more");
    let from = || from_snapshot(&snapshot.snapshot_id);
    let view = client.create_from("shown-view", 64 * MI, &read_only(), from()).await.unwrap();
    // Ready at once: Ceph copies nothing.
    assert_eq!(cluster.info(&view.volume_id)["type"], "subvolume");
    let again = client.create_from("shown-view", 64 * MI, &read_only(), from()).await.unwrap();
    assert_eq!(again.volume_id, view.volume_id);
    let view = client.mount(&lab, &view.volume_id, "shown-view", &read_only()).await;
    assert_eq!(read(view.file("file")), b"then");
    assert!(!view.file("more").exists());
    assert_eq!(std::fs::write(view.file("x"), "x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    let message = refused(client.delete_snapshot(&snapshot.snapshot_id).await, Code::FailedPrecondition);
    assert!(message.contains(&view.id), "{message}");
    refused(client.grow(&view.id, GI).await, Code::FailedPrecondition);
    refused(client.snapshot(&view.id, "of-a-view").await, Code::FailedPrecondition);
    client.unmount(&source).await;
    refused(client.delete(&source.id).await, Code::FailedPrecondition);
    assert_eq!(read(view.file("file")), b"then");
    client.remove(&view).await;
    client.delete(&source.id).await.unwrap();

    // The snapshot has outlived its volume: what is made from it now is a copy, and read-only all the same.
    let late = create_from(&client, "shown-late", 64 * MI, &read_only(), from()).await;
    assert_eq!(cluster.info(&late)["type"], "clone");
    let late = client.mount(&lab, &late, "shown-late", &read_only()).await;
    assert_eq!(read(late.file("file")), b"then");
    client.remove(&late).await;
    client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
    let left = cluster.subvolumes();
    assert!([&source.id, &view.id, &late.id].iter().all(|id| !left.contains(&name_of(id).to_owned())), "{left:?}");
    assert_nothing_mounted(&lab.path(""));
}

fn digests(dir: &str) -> String {
    run("sh", &["-c", &format!("cd {dir} && find . -type f -print0 | sort -z | xargs -0 sha256sum")])
}

/// > A copy of a volume holds what the volume held when it was asked for, file by file, and nothing is left of the copying.
#[tokio::test]
async fn a_copy_is_the_same_file_by_file() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let source = client.make_and_mount(&lab, "copied", 64 * MI, &shared()).await;
    for folder in 0..10 {
        std::fs::create_dir(source.file(&format!("folder-{folder}"))).unwrap();
        for file in 0..100 {
            let name = format!("folder-{folder}/file-{file}");
            std::fs::write(source.file(&name), name.repeat(folder * file % 50)).unwrap();
        }
    }
    run("sync", &["-f", &source.target]);
    let expected = digests(&source.target);
    assert_eq!(expected.lines().count(), 1000);
    let copy = create_from(&client, "copy", 128 * MI, &shared(), from_volume(&source.id)).await;
    write(source.file("folder-1/file-1"), "changed since");
    assert_eq!(cluster.snapshots(name_of(&source.id)), Vec::<String>::new());
    let copy = client.mount(&lab, &copy, "copy", &shared()).await;
    assert_eq!(digests(&copy.target), expected);
    assert_eq!(client.total(&copy.id, &copy.target).await.unwrap(), 128 * MI);
    // The same request again is the same volume; another source under that name is not.
    assert_eq!(create_from(&client, "copy", 128 * MI, &shared(), from_volume(&source.id)).await, copy.id);
    let snapshot = client.snapshot(&source.id, "copied-snapshot").await.unwrap().snapshot_id;
    let other = client.create_from("copy", 128 * MI, &shared(), from_snapshot(&snapshot)).await;
    refused(other, Code::AlreadyExists);
    refused(client.try_create(Client::request("copy", 128 * MI, &shared())).await, Code::AlreadyExists);
    let small = client.create_from("copy-too-small", 32 * MI, &shared(), from_snapshot(&snapshot)).await;
    refused(small, Code::OutOfRange);
    let restored = create_from(&client, "restored", 64 * MI, &shared(), from_snapshot(&snapshot)).await;
    let restored = client.mount(&lab, &restored, "restored", &shared()).await;
    assert_eq!(read(restored.file("folder-1/file-1")), b"changed since");
    for volume in [&copy, &restored, &source] {
        client.remove(volume).await;
    }
    client.delete_snapshot(&snapshot).await.unwrap();
    assert_nothing_mounted(&lab.path(""));
}

/// > Deleting a volume that is still being copied gives the copy up, and leaves neither it nor its snapshot behind.
#[tokio::test]
async fn deleting_a_copy_midway_leaves_nothing() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let source = client.make_and_mount(&lab, "midway", 64 * MI, &shared()).await;
    for file in 0..200 {
        std::fs::write(source.file(&format!("file-{file}")), vec![file; 10_000]).unwrap();
    }
    let request = {
        let (client, id) = (client.clone(), source.id.clone());
        tokio::spawn(async move { client.create_from("midway-copy", 64 * MI, &shared(), from_volume(&id)).await })
    };
    let digest = sha2::Sha256::digest(b"midway-copy");
    let digest: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let copy = format!("main/cephfs/csi/vol-{digest}");
    let end = Instant::now() + Duration::from_secs(30);
    while !cluster.subvolumes().contains(&name_of(&copy).to_owned()) {
        assert!(Instant::now() < end, "the copy never began");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The caller leaves; the copy goes on.
    request.abort();
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        match client.delete(&copy).await {
            Ok(()) => break,
            Err(status) if status.code() == Code::Aborted && Instant::now() < end => {}
            Err(status) => panic!("{status}"),
        }
    }
    assert!(!cluster.subvolumes().contains(&name_of(&copy).to_owned()));
    assert_eq!(cluster.snapshots(name_of(&source.id)), Vec::<String>::new());
    client.remove(&source).await;
}

/// > One driver serves many clusters, and the volume id names its cluster: a volume of one is never found, nor taken for
/// > deleted, through another.
#[tokio::test]
async fn a_cluster_does_not_answer_for_another() {
    let Some(cluster) = Cluster::lab() else { return };
    let Some(other) = Cluster::lab_b() else { return };
    let mut lab = cluster.idle_lab();
    lab.config.clusters = Some(format!("clusters:\n{}{}", cluster.entry("a", "csi"), other.entry("b", "csi")));
    let client = cluster.start(&mut lab).await;
    let mut through_b = client.clone();
    through_b.secrets = [other.secret("PROVISIONER"), other.secret("NODE")];
    let request = |name: &str, cluster: &str| {
        let mut request = Client::request(name, 16 * MI, &shared());
        request.parameters = map(&[("cluster", cluster)]);
        request
    };
    refused(client.try_create(Client::request("which", 16 * MI, &shared())).await, Code::InvalidArgument);
    let unknown = client.try_create(request("which", "c")).await;
    assert!(refused(unknown, Code::InvalidArgument).contains("configured: a, b"));
    let in_a = client.try_create(request("of-a", "a")).await.unwrap().volume_id;
    let in_b = through_b.try_create(request("of-b", "b")).await.unwrap().volume_id;
    assert!(in_a.starts_with("a/") && in_b.starts_with("b/"), "{in_a} {in_b}");
    let as_b = in_a.replacen("a/", "b/", 1);
    refused(through_b.health(&as_b).await, Code::NotFound);
    refused(through_b.grow(&as_b, GI).await, Code::NotFound);
    through_b.delete(&as_b).await.unwrap();
    assert_eq!(client.health(&in_a).await.unwrap(), Vec::<String>::new());
    // A driver that does not know the cluster deletes nothing.
    let mut lonely = other.idle_lab();
    lonely.config.clusters = Some(format!("clusters:\n{}", other.entry("b", "csi")));
    let stranger = other.start(&mut lonely).await;
    refused(stranger.health(&in_a).await, Code::NotFound);
    assert!(refused(stranger.delete(&in_a).await, Code::FailedPrecondition).contains("not configured"));
    let listed = client.list().await;
    assert!(listed.contains(&in_a) && listed.contains(&in_b), "{listed:?}");
    client.delete(&in_a).await.unwrap();
    through_b.delete(&in_b).await.unwrap();
}

/// > Cluster storage grows while it is used, and never shrinks.
#[tokio::test]
async fn volumes_grow_and_never_shrink() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let volume = client.make_and_mount(&lab, "grows", 16 * MI, &shared()).await;
    assert_eq!(client.grow(&volume.id, 64 * MI).await.unwrap(), 64 * MI);
    let end = Instant::now() + Duration::from_secs(30);
    while client.total(&volume.id, &volume.target).await.unwrap() != 64 * MI {
        assert!(Instant::now() < end, "df does not show the new size");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Less than it has is satisfied, and changes nothing.
    assert_eq!(client.grow(&volume.id, 32 * MI).await.unwrap(), 64 * MI);
    let request = csi::ControllerExpandVolumeRequest {
        volume_id: volume.id.clone(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 0, limit_bytes: 32 * MI }),
        secrets: client.secrets[0].clone(),
        ..Default::default()
    };
    let limited = client.controller.clone().controller_expand_volume(request).await;
    refused(limited, Code::OutOfRange);
    let modify = |pairs: &[(&str, &str)]| csi::ControllerModifyVolumeRequest {
        volume_id: volume.id.clone(),
        mutable_parameters: map(pairs),
        secrets: client.secrets[0].clone(),
    };
    let mut controller = client.controller.clone();
    refused(controller.controller_modify_volume(modify(&[("quota", "32Mi")])).await, Code::InvalidArgument);
    controller.controller_modify_volume(modify(&[("quota", "128Mi"), ("pin", "distributed=1")])).await.unwrap();
    assert_eq!(cluster.info(&volume.id)["bytes_quota"], 128 * MI);
    refused(controller.controller_modify_volume(modify(&[("mode", "0777")])).await, Code::InvalidArgument);
    client.remove(&volume).await;
}

/// > A class says who owns a volume's root, with which mode, in which pool and namespace: nobody has to walk over the
/// > files to change that. A class that says something else under the same name is a conflict.
#[tokio::test]
async fn a_class_says_what_a_volume_is_like() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let class = [("uid", "1234"), ("gid", "2345"), ("mode", "2770"), ("dataPool", "cephfs.bulk"), ("isolated", "true")];
    let mut request = Client::request("class", 16 * MI, &shared());
    request.parameters = map(&class);
    request.parameters.extend(map(&[
        ("csi.storage.k8s.io/pvc/name", "training 100%"),
        ("csi.storage.k8s.io/pvc/namespace", "tëam"),
        ("pin", "export=0"),
    ]));
    let volume = client.try_create(request.clone()).await.unwrap();
    let info = cluster.info(&volume.volume_id);
    assert_eq!((info["uid"].as_u64(), info["gid"].as_u64()), (Some(1234), Some(2345)));
    assert_eq!(info["mode"].as_u64().unwrap() & 0o7777, 0o2770);
    assert_eq!(info["data_pool"], "cephfs.bulk");
    assert!(!info["pool_namespace"].as_str().unwrap().is_empty());
    let notes = cluster.notes(&volume.volume_id);
    assert_eq!(
        (&notes["name"], &notes["claim"], &notes["namespace"]),
        (&"class".into(), &"training 100%".into(), &"tëam".into())
    );
    assert_eq!(volume.volume_context["claim"], "training 100%");
    let mounted = client.mount(&lab, &volume.volume_id, "class", &shared()).await;
    write(mounted.file("file"), "in its own pool");
    client.try_create(request.clone()).await.unwrap();
    for (key, value) in [("dataPool", "cephfs.data"), ("isolated", "false")] {
        let mut other = request.clone();
        other.parameters.insert(key.to_owned(), value.to_owned());
        refused(client.try_create(other).await, Code::AlreadyExists);
    }
    let mut larger = request.clone();
    larger.capacity_range = Some(csi::CapacityRange { required_bytes: GI, limit_bytes: 0 });
    refused(client.try_create(larger).await, Code::AlreadyExists);
    client.remove(&mounted).await;
}

/// > A class may name a subvolume group that does not exist: it is made with its first volume.
#[tokio::test]
async fn a_group_is_made_when_it_is_needed() {
    let Some(cluster) = Cluster::lab() else { return };
    let (_lab, mut client) = cluster.driver().await;
    // The least-privileged user has one group only.
    client.secrets[0] = cluster.admin_secret();
    let group = format!("fresh-{}", std::process::id());
    let mut request = Client::request("in-a-fresh-group", 16 * MI, &shared());
    request.parameters = map(&[("group", &group)]);
    let id = client.try_create(request).await.unwrap().volume_id;
    assert!(id.contains(&group), "{id}");
    client.delete(&id).await.unwrap();
    cluster.ceph(&["fs", "subvolumegroup", "rm", "cephfs", &group]);
}

/// > A subvolume that somebody else made is mounted, grown and snapshotted under its own id, and deleted only after it was
/// > given to Berth. A plain directory is mounted, and never deleted.
#[tokio::test]
async fn static_volumes_are_used_and_left_alone() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, mut client) = cluster.driver().await;
    let name = format!("handmade-{}", std::process::id());
    let group = ["--group_name", "csi"];
    cluster.ceph(&["fs", "subvolume", "create", "cephfs", &name, "16777216", group[0], group[1]]);
    let path = cluster.ceph(&["fs", "subvolume", "getpath", "cephfs", &name, group[0], group[1]]).trim().to_owned();
    let id = format!("main/cephfs/csi/{name}");
    assert_eq!(client.health(&id).await.unwrap(), Vec::<String>::new());
    let staging = lab.staging("handmade");
    let missing = refused(client.stage(&id, &staging, &shared()).await, Code::InvalidArgument);
    assert!(missing.contains("getpath"), "{missing}");
    client.contexts.lock().unwrap().insert(id.clone(), map(&[("path", &path)]));
    let volume = client.mount(&lab, &id, "handmade", &shared()).await;
    write(volume.file("file"), "kept");
    assert_eq!(client.grow(&id, 32 * MI).await.unwrap(), 32 * MI);
    let snapshot = client.snapshot(&id, "of-handmade").await.unwrap().snapshot_id;
    assert!(!client.list().await.contains(&id));
    client.unmount(&volume).await;
    let kept = refused(client.delete(&id).await, Code::FailedPrecondition);
    assert!(kept.contains("not made by Berth"), "{kept}");

    // The same folder by its path alone, and nothing outside it.
    let plain = format!("main/cephfs/@{path}");
    client.contexts.lock().unwrap().insert(plain.clone(), map(&[]));
    let mounted = client.mount(&lab, &plain, "plain", &shared()).await;
    assert_eq!(read(mounted.file("file")), b"kept");
    client.unmount(&mounted).await;
    refused(client.delete(&plain).await, Code::FailedPrecondition);
    refused(client.grow(&plain, GI).await, Code::FailedPrecondition);
    client.contexts.lock().unwrap().insert(id.clone(), map(&[("path", "/volumes/other/thing")]));
    refused(client.stage(&id, &staging, &shared()).await, Code::InvalidArgument);

    // Given to Berth.
    let metadata =
        ["fs", "subvolume", "metadata", "set", "cephfs", &name, "berth", r#"{"adopted":true}"#, group[0], group[1]];
    cluster.ceph(&metadata);
    assert!(client.list().await.contains(&id));
    client.delete_snapshot(&snapshot).await.unwrap();
    client.delete(&id).await.unwrap();
    assert!(!cluster.subvolumes().contains(&name));
    client.secrets[0].clear();
}

/// > A missing capability is named in the error. Wrong keys are PERMISSION_DENIED, unreachable monitors UNAVAILABLE, and a
/// > file system that does not exist is the user's mistake, with the names of those there are.
#[tokio::test]
async fn errors_say_what_to_do() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let mut poor = client.clone();
    let user = format!("client.poor-{}", std::process::id());
    let text = cluster.ceph(&["auth", "get", "client.berth-provisioner"]);
    let caps = |kind: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("caps {kind} = "))).unwrap();
        line.trim_matches('"').replace("\\\"", "\"")
    };
    for missing in ["fs subvolume create", "fs subvolume rm", "fs subvolume metadata set", "fs subvolume getpath"] {
        let one = format!("allow command \"{missing}\" with vol_name=cephfs group_name=csi");
        assert!(caps("mgr").contains(&one), "{}", caps("mgr"));
        let less: Vec<_> = caps("mgr").split(", ").filter(|cap| *cap != one).map(str::to_owned).collect();
        cluster.ceph(&["auth", "get-or-create", &user]);
        cluster.ceph(&["auth", "caps", &user, "mon", &caps("mon"), "mgr", &less.join(", ")]);
        let key = cluster.ceph(&["auth", "get-key", &user]);
        poor.secrets[0] = map(&[("userID", user.trim_start_matches("client.")), ("userKey", key.trim())]);
        let made = poor.try_create(Client::request("poor", 16 * MI, &shared())).await;
        let message = match made {
            Err(status) => refused::<()>(Err(status), Code::PermissionDenied),
            Ok(volume) => refused(poor.delete(&volume.volume_id).await, Code::PermissionDenied),
        };
        assert!(message.contains(&one), "{message}");
        let id = client.create("poor", 16 * MI, &shared()).await;
        client.delete(&id).await.unwrap();
        cluster.ceph(&["auth", "rm", &user]);
    }

    let mut stranger = client.clone();
    let other_key = cluster.get("NODE_KEY");
    stranger.secrets[0].insert("userKey".to_owned(), other_key.to_owned());
    let message = refused(stranger.try_create(Client::request("x", 16 * MI, &shared())).await, Code::PermissionDenied);
    assert!(message.contains("client.berth-provisioner") && !message.contains(other_key), "{message}");
    stranger.secrets[0].remove("userKey");
    refused(stranger.try_create(Client::request("x", 16 * MI, &shared())).await, Code::PermissionDenied);

    let mut elsewhere = Client::request("x", 16 * MI, &shared());
    elsewhere.parameters = map(&[("filesystem", "nofs")]);
    // Also for a user whose capabilities name one file system only.
    for secrets in [cluster.admin_secret(), cluster.secret("PROVISIONER")] {
        elsewhere.secrets = secrets;
        let message = refused(client.try_create(elsewhere.clone()).await, Code::InvalidArgument);
        assert!(message.contains("it has: cephfs"), "{message}");
    }
    for (key, value) in [("fsName", "x"), ("mode", "9"), ("dataPool", "no/pool")] {
        let mut wrong = Client::request("x", 16 * MI, &shared());
        wrong.parameters = map(&[(key, value)]);
        refused(client.try_create(wrong).await, Code::InvalidArgument);
    }
    let mut pool = Client::request("x", 16 * MI, &shared());
    pool.parameters = map(&[("dataPool", "nopool")]);
    refused(client.try_create(pool).await, Code::InvalidArgument);

    // The node's key.
    let id = client.create("denied", 16 * MI, &shared()).await;
    let mut denied = client.clone();
    denied.secrets[1] = cluster.secret("PROVISIONER");
    let staging = lab.staging("denied");
    refused(denied.stage(&id, &staging, &shared()).await, Code::PermissionDenied);
    denied.secrets[1].clear();
    let message = refused(denied.stage(&id, &staging, &shared()).await, Code::PermissionDenied);
    assert!(message.contains("node-stage-secret"), "{message}");
    assert_nothing_mounted(&lab.path(""));
    client.delete(&id).await.unwrap();

    let mut lost = cluster.idle_lab();
    lost.config.clusters = Some("clusters:\n  - {name: main, monitors: ['v2:127.0.0.1:1']}".to_owned());
    lost.config.extra = "deadlines: {ceph: 2s}".to_owned();
    let mut unreachable = cluster.start(&mut lost).await;
    unreachable.contexts = client.contexts.clone();
    let message = refused(unreachable.try_create(Client::request("x", 16 * MI, &shared())).await, Code::Unavailable);
    assert!(message.contains("127.0.0.1:1"), "{message}");
    refused(unreachable.stage(&id, &staging, &shared()).await, Code::Unavailable);
    assert_eq!(unreachable.storage_health().await, ["MonitorsUnreachable"]);
    let listing = unreachable.controller.clone().list_volumes(csi::ListVolumesRequest::default()).await;
    refused(listing, Code::Unimplemented);
    assert_nothing_mounted(&lost.path(""));
}

/// > A key goes to Ceph and nowhere else: not into a log, a command line, an environment, a volume's context or a file.
#[tokio::test]
async fn keys_leave_no_trace() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client) = cluster.driver().await;
    let volume = client.make_and_mount(&lab, "canary", 16 * MI, &shared()).await;
    let snapshot = client.snapshot(&volume.id, "canary").await.unwrap().snapshot_id;
    client.grow(&volume.id, 32 * MI).await.unwrap();
    let mut wrong = client.clone();
    let fake = "QVNlY3JldENhbmFyeUtleVRoYXRJc05vS2V5QXRBbGw=";
    wrong.secrets.iter_mut().for_each(|secret| drop(secret.insert("userKey".to_owned(), fake.to_owned())));
    let denied = refused(wrong.delete(&volume.id).await, Code::PermissionDenied);
    let other = lab.staging("canary-wrong");
    let unstaged = wrong.stage(&volume.id, &other, &shared()).await.unwrap_err().message().to_owned();
    let keys = [cluster.get("PROVISIONER_KEY"), cluster.get("NODE_KEY"), fake];
    let has_key = |text: &[u8]| {
        let text = String::from_utf8_lossy(text);
        keys.iter().any(|key| text.contains(key) || text.contains(&key[..key.len() - 8]))
    };
    assert!(!has_key(denied.as_bytes()) && !has_key(unstaged.as_bytes()), "{denied} {unstaged}");
    assert!(has_key(keys[0].as_bytes()), "the search finds nothing");
    assert!(!has_key(lab.log().as_bytes()), "the log");
    assert!(lab.log().contains("NodeStageVolume"));
    let context = format!("{:?}", client.contexts.lock().unwrap());
    assert!(!has_key(context.as_bytes()), "{context}");
    for process in procfs::process::all_processes().unwrap().flatten() {
        let at = |file: &str| std::fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
        let is_ours = process.pid == i32::try_from(lab.pid()).unwrap() || Some(process.pid) == fuse_at(&volume.staging);
        if is_ours {
            for file in ["cmdline", "environ", "mountinfo", "mounts"] {
                assert!(!has_key(&at(file)), "/proc/{}/{file}", process.pid);
            }
            for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid)).unwrap().flatten() {
                let target = std::fs::read_link(entry.path()).unwrap_or_default();
                assert!(!target.to_string_lossy().contains("ceph-key"), "{target:?} is still open");
            }
        }
    }
    // Files of the driver, and those that a careless one would leave.
    let mut folders = vec![lab.path(""), "/run".into(), "/etc/ceph".into(), "/var/log/ceph".into()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !entry.path().starts_with(&volume.staging) && !entry.path().starts_with(&volume.target)
            {
                folders.push(entry.path());
            } else if kind.is_file() && entry.metadata().is_ok_and(|file| file.len() < 10 << 20) {
                let mut text = Vec::new();
                let _ = File::open(entry.path()).and_then(|mut file| file.read_to_end(&mut text));
                assert!(!has_key(&text), "{}", entry.path().display());
            }
        }
    }
    client.delete_snapshot(&snapshot).await.unwrap();
    client.remove(&volume).await;
}

/// > Many calls for one name make one volume; calls for many names don't wait for each other.
#[tokio::test]
async fn parallel_creates_make_each_volume_once() {
    let Some(cluster) = Cluster::lab() else { return };
    let (_lab, client) = cluster.driver().await;
    let mut calls = tokio::task::JoinSet::new();
    for call in 0..40 {
        let client = client.clone();
        calls.spawn(async move {
            let request = Client::request(&format!("parallel-{}", call % 8), 16 * MI, &shared());
            loop {
                // Of those who wait for the same volume on a busy machine one may be told to try again.
                match client.try_create(request.clone()).await {
                    Err(status) if status.code() == Code::Aborted => {}
                    volume => break volume.unwrap().volume_id,
                }
            }
        });
    }
    let mut ids: Vec<_> = calls.join_all().await;
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 8);
    let mut deletes = tokio::task::JoinSet::new();
    for id in ids.clone() {
        let client = client.clone();
        deletes.spawn(async move { client.delete(&id).await.unwrap() });
    }
    deletes.join_all().await;
    let left = cluster.subvolumes();
    assert!(ids.iter().all(|id| !left.contains(&name_of(id).to_owned())), "{left:?}");
}

/// > A list is read page by page, in order, each volume and snapshot once.
#[tokio::test]
async fn lists_are_read_by_pages() {
    let Some(cluster) = Cluster::lab() else { return };
    let (_lab, client) = cluster.driver().await;
    let mut ids = Vec::new();
    for name in 0..5 {
        ids.push(client.create(&format!("listed-{name}"), 16 * MI, &shared()).await);
    }
    // CSI has no ids for these: they are left out, and in nobody's way.
    let foreign = "x".repeat(150);
    let of_foreign = ["cephfs", foreign.as_str(), "s", "--group_name", "csi"];
    cluster.ceph(&["fs", "subvolume", "create", "cephfs", &foreign, "--group_name", "csi"]);
    cluster.ceph(&[["fs", "subvolume", "snapshot", "create"].as_slice(), &of_foreign].concat());
    let mut snapshots = Vec::new();
    for name in 0..5 {
        snapshots.push(client.snapshot(&ids[name % 2], &format!("listed-{name}")).await.unwrap().snapshot_id);
    }
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let request = csi::ListVolumesRequest { max_entries: 2, starting_token: token };
        let page = client.controller.clone().list_volumes(request).await.unwrap().into_inner();
        assert!(page.entries.len() <= 2);
        found.extend(page.entries.into_iter().map(|entry| entry.volume.unwrap().volume_id));
        token = page.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert!(found.is_sorted() && ids.iter().all(|id| found.iter().filter(|one| *one == id).count() == 1), "{found:?}");
    let (mut found, mut token) = (Vec::new(), String::new());
    loop {
        let request = csi::ListSnapshotsRequest { max_entries: 2, starting_token: token, ..Default::default() };
        let page = client.controller.clone().list_snapshots(request).await.unwrap().into_inner();
        found.extend(page.entries.into_iter().map(|entry| entry.snapshot.unwrap().snapshot_id));
        token = page.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert!(snapshots.iter().all(|id| found.iter().filter(|one| *one == id).count() == 1), "{found:?}");
    let of_one = csi::ListSnapshotsRequest { source_volume_id: ids[1].clone(), ..Default::default() };
    let of_one = csi::ListSnapshotsRequest { secrets: client.secrets[0].clone(), ..of_one };
    let of_one = client.controller.clone().list_snapshots(of_one).await.unwrap().into_inner().entries;
    assert_eq!(of_one.len(), 2);
    assert!(of_one.iter().all(|entry| entry.snapshot.as_ref().unwrap().source_volume_id == ids[1]));
    cluster.ceph(&[["fs", "subvolume", "snapshot", "rm"].as_slice(), &of_foreign].concat());
    cluster.ceph(&["fs", "subvolume", "rm", "cephfs", &foreign, "--group_name", "csi"]);
    for id in &snapshots {
        client.delete_snapshot(id).await.unwrap();
    }
    for id in &ids {
        client.delete(id).await.unwrap();
    }
}

/// Every command to Ceph is counted and timed.
#[tokio::test]
async fn commands_to_ceph_are_counted() {
    let Some(cluster) = Cluster::lab() else { return };
    let mut lab = cluster.idle_lab();
    lab.config.extra = "http: {address: '127.0.0.1:0'}".to_owned();
    let client = cluster.start(&mut lab).await;
    let id = client.create("counted", 16 * MI, &shared()).await;
    client.create("counted", 16 * MI, &shared()).await;
    client.delete(&id).await.unwrap();
    let log = lab.log();
    let address =
        log.lines().find_map(|line| line.split("address=").nth(1)).unwrap().split_whitespace().next().unwrap();
    let text = run("curl", &["-s", &format!("http://{address}/metrics")]);
    let count = |command: &str, errno: i32| {
        let labels = format!("cluster=\"main\",command=\"{command}\",errno=\"{errno}\"");
        let line = text
            .lines()
            .find(|line| line.starts_with("berth_ceph_command_duration_seconds_count") && line.contains(&labels));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).unwrap_or_default()
    };
    // Made: one look that finds nothing. Made again: one look. Deleted: one look.
    assert_eq!((count("fs subvolume info", 2), count("fs subvolume info", 0)), (1, 2), "{text}");
    assert_eq!((count("fs subvolume create", 0), count("fs subvolume rm", 0)), (1, 1));
    assert_eq!(count("fs subvolume metadata set", 0), 1);
}

/// > `berth volume` makes, mounts, grows and deletes a volume of cluster storage by hand, with a node's key from a file.
#[tokio::test]
async fn volumes_are_used_by_hand() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, _client) = cluster.driver().await;
    let (config, staging) = (lab.write_config(), lab.path("by-hand"));
    let volume = |arguments: &[&str]| {
        let fixed = ["volume", "--config", config.to_str().unwrap(), "--staging", staging.to_str().unwrap()];
        run(env!("CARGO_BIN_EXE_berth"), &[&fixed[..], arguments].concat())
    };
    let place = lab.target("by-hand");
    let key = cluster.key_file("NODE");
    volume(&["create", "by-hand", "--size", "16Mi"]);
    let node = ["--user", cluster.get("NODE_USER"), "--key-file", key.to_str().unwrap()];
    volume(&[&["mount", "by-hand", &place][..], &node].concat());
    write(Path::new(&place).join("file"), "by hand");
    volume(&["grow", "by-hand", &place, "32Mi"]);
    assert!(volume(&["list"]).contains("32Mi"));
    volume(&["unmount", "by-hand", &place]);
    volume(&["delete", "by-hand"]);
    assert!(!volume(&["list"]).contains("by-hand"));
}

/// A lab without a driver is not mistaken for one: the name of a volume is only taken apart where it is one.
#[tokio::test]
async fn foreign_ids_are_nobodys() {
    let Some(cluster) = Cluster::lab() else { return };
    let (lab, client): (Lab, Client) = cluster.driver().await;
    for id in ["fake", "main/cephfs/csi/vol-00000000000000000000000000000000", "main/cephfs/csi/none"] {
        client.delete(id).await.unwrap();
        refused(client.health(id).await, Code::NotFound);
        refused(client.grow(id, GI).await, Code::NotFound);
    }
    client.delete_snapshot("fake").await.unwrap();
    client.delete_snapshot("main/cephfs/csi/none@snap-none").await.unwrap();
    let staging = lab.staging("foreign");
    refused(client.stage("fake", &staging, &shared()).await, Code::NotFound);
    refused(client.try_create(Client::request("block", 16 * MI, &Use::block())).await, Code::InvalidArgument);
}
