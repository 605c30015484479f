//! Cluster storage while parts of Ceph stop, clients are thrown out, and the driver is killed.
//!
//! Each test has the cluster for itself, breaks it, and leaves it whole.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::time::{Duration, Instant};

use berth::proto::csi;
use berth::proto::csi::volume_capability::access_mode::Mode;
use common::ceph::{Cluster, assert_nothing_mounted, fuse_at, name_of};
use common::tracer::Tracer;
use common::{Client, Lab, MI, Mounted, Use, from_snapshot, from_volume, read, refused, write};
use rustix::process::Signal;
use tonic::{Code, Status};

fn shared() -> Use {
    Use::mode(Mode::MultiNodeMultiWriter)
}

/// Stops a daemon until it is dropped.
struct Stopped<'a>(&'a Cluster, &'static str);

impl<'a> Stopped<'a> {
    fn new(cluster: &'a Cluster, daemon: &'static str) -> Self {
        cluster.signal(daemon, Signal::STOP);
        Self(cluster, daemon)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.signal(self.1, Signal::CONT);
    }
}

/// A call that ends within a time that leaves no doubt about what bounds it.
async fn bounded<T>(what: &str, call: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(45), call).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

/// Calls until the answer is another one than "try again".
async fn patiently<T, F: Future<Output = Result<T, Status>>>(what: &str, call: impl Fn() -> F) -> T {
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        match call().await {
            Ok(value) => return value,
            Err(status)
                if Instant::now() < end
                    && matches!(status.code(), Code::Aborted | Code::Unavailable | Code::DeadlineExceeded) =>
            {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(status) => panic!("{what}: {status}"),
        }
    }
}

/// > While the manager hangs, a call ends at its deadline; mounting and unmounting other volumes goes on, and so do other
/// > drivers. A change that was not answered keeps later changes of its volume away until it is. When the manager is
/// > back, everything works without a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_manager_holds_up_nobody_else() {
    let Some(cluster) = Cluster::alone() else { return };
    let mut lab = cluster.idle_lab();
    lab.config.extra = "deadlines: {ceph: 2s}".to_owned();
    let client = cluster.start(&mut lab).await;
    let volume = client.make_and_mount(&lab, "mgr-mounted", 32 * MI, &shared()).await;
    let doomed = client.create("mgr-doomed", 32 * MI, &shared()).await;
    let waiting = client.create("mgr-waiting", 32 * MI, &shared()).await;
    // A mgr that is killed while it is stopped would be missed by the monitors only after a while.
    let stopped = Stopped::new(&cluster, "mgr.x");
    let create = client.try_create(Client::request("mgr-new", 32 * MI, &shared()));
    let message = refused(bounded("Create", create).await, Code::Unavailable);
    assert!(message.contains("manager") && message.contains("within 2s"), "{message}");
    refused(bounded("Delete", client.delete(&doomed)).await, Code::Unavailable);
    // Volumes are used as before.
    write(volume.file("file"), "written meanwhile");
    bounded("Unpublish and Unstage", client.unmount(&volume)).await;
    let volume = bounded("Stage and Publish", client.mount(&lab, &volume.id, "mgr-mounted", &shared())).await;
    assert_eq!(read(volume.file("file")), b"written meanwhile");
    // Another driver on this machine, and many calls that hang.
    let mut calls = tokio::task::JoinSet::new();
    for call in 0..100 {
        let client = client.clone();
        calls.spawn(async move {
            client
                .try_create(Client::request(&format!("mgr-hang-{call}"), 32 * MI, &shared()))
                .await
                .unwrap_err()
                .code()
        });
    }
    let (_local, nvme) = Lab::on("ext4", 512 * MI).await;
    let id = bounded("another driver", nvme.create("local", 16 * MI, &Use::default())).await;
    nvme.delete(&id).await.unwrap();
    let codes = bounded("100 calls", calls.join_all()).await;
    assert!(codes.iter().all(|code| *code == Code::Unavailable), "{codes:?}");
    let stats = bounded("stats", client.total(&volume.id, &volume.target)).await.unwrap();
    assert_eq!(stats, 32 * MI);
    drop(stopped);
    cluster.settle();
    patiently("Delete", || client.delete(&doomed)).await;
    patiently("Delete", || client.delete(&waiting)).await;
    let id = patiently("Create", || client.try_create(Client::request("mgr-new", 32 * MI, &shared()))).await;
    client.delete(&id.volume_id).await.unwrap();
    client.remove(&volume).await;
    let left = cluster.subvolumes();
    assert!([&doomed, &waiting, &volume.id].iter().all(|id| !left.contains(&name_of(id).to_owned())), "{left:?}");
}

/// > A manager that dies in the middle of calls, and a monitor that restarts, are noticed by nobody who asks again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemons_that_restart_are_found_again() {
    let Some(cluster) = Cluster::alone() else { return };
    let (lab, client) = cluster.driver().await;
    let volume = client.make_and_mount(&lab, "restarts", 32 * MI, &shared()).await;
    for daemon in ["mon", "mgr", "mds"] {
        let mut calls = tokio::task::JoinSet::new();
        for call in 0..8 {
            let (client, name) = (client.clone(), format!("restart-{daemon}-{call}"));
            calls.spawn(async move {
                patiently("Create", || client.try_create(Client::request(&name, 32 * MI, &shared()))).await
            });
        }
        cluster.restart(daemon);
        cluster.settle();
        let ids: Vec<_> = calls.join_all().await.into_iter().map(|volume| volume.volume_id).collect();
        for id in &ids {
            assert_eq!(cluster.info(id)["bytes_quota"], 32 * MI);
            assert!(cluster.notes(id)["name"].as_str().unwrap().starts_with("restart-"));
            patiently("Delete", || client.delete(id)).await;
        }
        // A client that was too late to be known to the new MDS is thrown out.
        client.stage(&volume.id, &volume.staging, &shared()).await.unwrap();
        client.publish(&volume.id, &volume.staging, &volume.target, &shared()).await.unwrap();
        write(volume.file(daemon), daemon);
        assert_eq!(read(volume.file(daemon)), daemon.as_bytes());
    }
    client.remove(&volume).await;
}

/// > While the metadata server hangs, statistics are answered in bounded time, and unpublishing and unstaging complete.
/// > What was written is not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_metadata_server_keeps_no_volume_mounted() {
    let Some(cluster) = Cluster::alone() else { return };
    let (lab, client) = cluster.driver().await;
    let mut volumes = Vec::new();
    for name in 0..2 {
        volumes.push(client.make_and_mount(&lab, &format!("mds-{name}"), 32 * MI, &shared()).await);
    }
    write(volumes[0].file("kept"), vec![1; 1 << 20]);
    let stopped = Stopped::new(&cluster, "mds.a");
    for volume in &volumes {
        // More often than there are slots for calls that hang.
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..60 {
            let (client, id, path) = (client.clone(), volume.id.clone(), volume.target.clone());
            calls.spawn(async move { client.total(&id, &path).await.map_err(|status| status.code()) });
        }
        let answers = bounded("stats", calls.join_all()).await;
        let is_fine = |answer: &Result<i64, Code>| matches!(answer, Ok(_) | Err(Code::Unavailable));
        assert!(answers.iter().all(is_fine), "{answers:?}");
    }
    for volume in &volumes {
        bounded("Unpublish", client.unpublish(&volume.id, &volume.target)).await.unwrap();
        bounded("Unstage", client.unstage(&volume.id, &volume.staging)).await.unwrap();
        assert!(!std::path::Path::new(&volume.target).exists());
    }
    assert_eq!(lab.mounts(), Vec::<String>::new());
    drop(stopped);
    cluster.settle();
    let again = client.mount(&lab, &volumes[0].id, "mds-again", &shared()).await;
    assert_eq!(read(again.file("kept")), vec![1; 1 << 20]);
    client.remove(&again).await;
    for volume in &volumes[1..] {
        patiently("Delete", || client.delete(&volume.id)).await;
    }
}

/// > A client that Ceph has thrown out works again: at the latest when the volume is staged or published next.
#[tokio::test]
async fn an_evicted_client_is_healed() {
    let Some(cluster) = Cluster::alone() else { return };
    let (lab, client) = cluster.driver().await;
    let volume = client.make_and_mount(&lab, "evicted", 32 * MI, &shared()).await;
    write(volume.file("file"), "before");
    cluster.evict(&volume.staging);
    client.stage(&volume.id, &volume.staging, &shared()).await.unwrap();
    client.publish(&volume.id, &volume.staging, &volume.target, &shared()).await.unwrap();
    assert_eq!(read(volume.file("file")), b"before");
    write(volume.file("file"), "after");
    cluster.evict(&volume.staging);
    // Another pod on the same node.
    let second =
        Mounted { target: lab.target("evicted-second"), staging: volume.staging.clone(), id: volume.id.clone() };
    client.publish(&second.id, &second.staging, &second.target, &shared()).await.unwrap();
    assert_eq!(read(second.file("file")), b"after");
    client.unpublish(&second.id, &second.target).await.unwrap();
    client.remove(&volume).await;
}

/// > A mount whose client has died is told by statistics and health, and is made again when the volume is staged or
/// > published next; unpublishing and unstaging take it away. Nothing is ever written into the directory below it.
#[tokio::test]
async fn a_dead_mount_is_made_again() {
    let Some(cluster) = Cluster::alone() else { return };
    let (mut lab, client) = cluster.driver().await;
    let volume = client.make_and_mount(&lab, "dead", 32 * MI, &shared()).await;
    write(volume.file("file"), "kept");
    let kill = |volume: &Mounted| {
        let pid = rustix::process::Pid::from_raw(fuse_at(&volume.staging).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        while fuse_at(&volume.staging).is_some() {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Its session would be kept for a minute, and with it what it had a right to.
        cluster.evict(&volume.staging);
    };
    let health = async |client: &Client, volume: &Mounted| {
        let request = csi::NodeGetVolumeHealthRequest {
            volume_id: volume.id.clone(),
            volume_publish_path: volume.target.clone(),
            ..Default::default()
        };
        let reply = client.node.clone().node_get_volume_health(request).await.unwrap().into_inner();
        let all = reply.volume_health.unwrap().health_statuses;
        all.into_iter().map(|entry| entry.reason).collect::<Vec<_>>()
    };
    assert_eq!(health(&client, &volume).await, Vec::<String>::new());
    kill(&volume);
    let message = refused(client.total(&volume.id, &volume.target).await, Code::FailedPrecondition);
    assert!(message.contains("dead"), "{message}");
    assert_eq!(health(&client, &volume).await, ["MountDead"]);
    assert_eq!(std::fs::write(volume.file("x"), "lost").unwrap_err().raw_os_error(), Some(libc::ENOTCONN));

    // Published again, also by a driver that has just started: the call brings the key.
    let contexts = client.contexts.clone();
    lab.kill();
    let mut client = cluster.start(&mut lab).await;
    client.contexts = contexts;
    let mut keyless = client.clone();
    keyless.secrets[1].clear();
    let message = refused(
        keyless.publish(&volume.id, &volume.staging, &volume.target, &shared()).await,
        Code::FailedPrecondition,
    );
    assert!(message.contains("node-publish-secret"), "{message}");
    client.publish(&volume.id, &volume.staging, &volume.target, &shared()).await.unwrap();
    assert_eq!(read(volume.file("file")), b"kept");
    assert_eq!(health(&client, &volume).await, Vec::<String>::new());

    // Staged again.
    kill(&volume);
    client.stage(&volume.id, &volume.staging, &shared()).await.unwrap();
    client.publish(&volume.id, &volume.staging, &volume.target, &shared()).await.unwrap();
    assert_eq!(read(volume.file("file")), b"kept");

    // Taken away.
    kill(&volume);
    client.unmount(&volume).await;
    assert_nothing_mounted(&lab.path(""));
    client.delete(&volume.id).await.unwrap();
}

/// Until it is answered before the driver is killed.
const ALL: u32 = 100;
/// A copy takes Ceph five seconds and more. What comes after it is tested on a double.
const UNTIL_COPYING: u32 = 6;

/// Makes a call again and again, the driver killed before its first, second ... message to Ceph; asks again each time,
/// and has `check` look at what there is.
async fn killed_between_commands<T>(
    cluster: &Cluster,
    lab: &mut Lab,
    what: &str,
    rounds: u32,
    prepare: impl AsyncFn(&Client, u32) -> String,
    call: impl AsyncFn(&Client, u32, &str) -> Result<T, Status>,
    check: impl AsyncFn(&Client, u32, &str, T),
) {
    let mut client = cluster.start(lab).await;
    let mut deaths = 0;
    for round in 1..=rounds {
        let prepared = prepare(&client, round).await;
        // It is connected: what it sends from here on are commands, and small talk of the protocol.
        assert!(client.health("main/cephfs/csi/none").await.is_err());
        let tracer = Tracer::kill_before(lab.pid(), &("sendmsg".to_owned(), round));
        let result = call(&client, round, &prepared).await;
        let died = result.as_ref().is_err_and(|status| status.message().contains("transport error"));
        if died {
            deaths += 1;
            lab.wait();
            drop(tracer);
            let contexts = client.contexts.clone();
            client = cluster.start(lab).await;
            client.contexts = contexts;
        } else {
            drop(tracer);
        }
        let value = match result {
            Ok(value) => value,
            Err(_) => patiently(what, || call(&client, round, &prepared)).await,
        };
        check(&client, round, &prepared, value).await;
        if !died {
            break;
        }
    }
    assert!(deaths >= 2, "{what}: killed {deaths} times");
    println!("{what}: killed before each of {deaths} messages");
    lab.kill();
}

/// > A driver that is killed between any two commands to Ceph, in Create and Delete, leaves what the same call finds and
/// > finishes: one volume with its size and its notes, or none.
#[tokio::test]
async fn a_create_or_delete_killed_midway_is_finished_by_the_next() {
    let Some(cluster) = Cluster::alone() else { return };
    let mut lab = cluster.idle_lab();
    let nothing = async |_: &Client, _: u32| String::new();
    let create = async |client: &Client, round: u32, _: &str| {
        let mut request = Client::request(&format!("killed-create-{round}"), 32 * MI, &shared());
        request.parameters = common::map(&[("mode", "0770"), ("pin", "distributed=1")]);
        client.try_create(request).await
    };
    let whole = async |client: &Client, round: u32, _: &str, volume: csi::Volume| {
        let info = cluster.info(&volume.volume_id);
        assert_eq!(info["bytes_quota"], 32 * MI);
        assert_eq!(info["mode"].as_u64().unwrap() & 0o777, 0o770);
        assert_eq!(cluster.notes(&volume.volume_id)["name"], format!("killed-create-{round}"));
        client.delete(&volume.volume_id).await.unwrap();
    };
    killed_between_commands(&cluster, &mut lab, "Create", ALL, nothing, create, whole).await;

    let make =
        async |client: &Client, round: u32| client.create(&format!("killed-delete-{round}"), 32 * MI, &shared()).await;
    let delete = async |client: &Client, _: u32, id: &str| client.delete(id).await;
    let gone = async |_: &Client, _: u32, id: &str, (): ()| {
        assert!(!cluster.subvolumes().contains(&name_of(id).to_owned()));
    };
    killed_between_commands(&cluster, &mut lab, "Delete", ALL, make, delete, gone).await;
}

/// > The same holds for copies of volumes, snapshots, and volumes that show a snapshot; and deleting after such a death,
/// > without asking again, leaves nothing either.
#[tokio::test]
async fn copies_and_snapshots_killed_midway_are_finished_by_the_next() {
    let Some(cluster) = Cluster::alone() else { return };
    let mut lab = cluster.idle_lab();
    let client = cluster.start(&mut lab).await;
    let source = client.create("killed-source", 32 * MI, &shared()).await;
    let snapshot = client.snapshot(&source, "killed-source").await.unwrap().snapshot_id;
    lab.kill();

    let nothing = async |_: &Client, _: u32| String::new();
    let take = async |client: &Client, round: u32, _: &str| client.snapshot(&source, &format!("killed-{round}")).await;
    let taken = async |client: &Client, _: u32, _: &str, snapshot: csi::Snapshot| {
        assert_eq!((snapshot.size_bytes, snapshot.ready_to_use), (32 * MI, true));
        client.delete_snapshot(&snapshot.snapshot_id).await.unwrap();
    };
    killed_between_commands(&cluster, &mut lab, "CreateSnapshot", ALL, nothing, take, taken).await;

    let show = async |client: &Client, round: u32, _: &str| {
        let usage = Use::mode(Mode::MultiNodeReaderOnly);
        client.create_from(&format!("killed-show-{round}"), 32 * MI, &usage, from_snapshot(&snapshot)).await
    };
    let shown = async |client: &Client, _: u32, _: &str, volume: csi::Volume| {
        assert!(volume.volume_context["snapshotPath"].starts_with(".snap/"));
        refused(client.delete_snapshot(&snapshot).await, Code::FailedPrecondition);
        client.delete(&volume.volume_id).await.unwrap();
    };
    killed_between_commands(&cluster, &mut lab, "Create from a snapshot", ALL, nothing, show, shown).await;

    let copy = async |client: &Client, round: u32, _: &str| {
        client.create_from(&format!("killed-copy-{round}"), 48 * MI, &shared(), from_volume(&source)).await
    };
    let copied = async |client: &Client, _: u32, _: &str, volume: csi::Volume| {
        assert_eq!(cluster.info(&volume.volume_id)["bytes_quota"], 48 * MI);
        assert_eq!(cluster.snapshots(name_of(&source)), [snapshot.split('@').nth(1).unwrap()]);
        client.delete(&volume.volume_id).await.unwrap();
    };
    killed_between_commands(&cluster, &mut lab, "Clone", UNTIL_COPYING, nothing, copy, copied).await;

    // Deleted after the death, at every moment of the copying.
    let mut client = cluster.start(&mut lab).await;
    for round in 3..=5 {
        let name = format!("killed-forgotten-{round}");
        assert!(client.health("main/cephfs/csi/none").await.is_err());
        let tracer = Tracer::kill_before(lab.pid(), &("sendmsg".to_owned(), round));
        let result = client.create_from(&name, 32 * MI, &shared(), from_volume(&source)).await;
        let died = result.as_ref().is_err_and(|status| status.message().contains("transport error"));
        if died {
            lab.wait();
            drop(tracer);
            client = cluster.start(&mut lab).await;
        } else {
            drop(tracer);
        }
        let digest = <sha2::Sha256 as sha2::Digest>::digest(name.as_bytes());
        let digest: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let id = format!("main/cephfs/csi/vol-{digest}");
        patiently("Delete", || client.delete(&id)).await;
        assert!(!cluster.subvolumes().contains(&name_of(&id).to_owned()), "round {round}");
        assert_eq!(cluster.snapshots(name_of(&source)), [snapshot.split('@').nth(1).unwrap()], "round {round}");
        if !died && round > 2 {
            break;
        }
    }
    client.delete_snapshot(&snapshot).await.unwrap();
    client.delete(&source).await.unwrap();
}
