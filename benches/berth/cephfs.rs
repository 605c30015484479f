//! Volumes in a Ceph cluster, mounted and used; and the memory that it takes.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use berth::proto::csi::Volume;
use tokio::task::JoinSet;

use crate::Options;
use crate::ceph::{Cluster, unmount};
use crate::disk::{self, Job, LAYOUT, Run};
use crate::driver::{Client, Driver, Wanted};
use crate::lab::Lab;
use crate::measure::{Pairs, Row, mebibytes, median, time, timed};
use crate::subvolumes::{delete_all, elsewhere};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// NodeStageVolume against the mount that it makes.
const TARGET: f64 = 1.2;
/// Of a process that has loaded Ceph's library, in bytes.
const TARGET_CONTROLLER: u64 = 40 * MIB;
/// Of a process that only mounts.
const TARGET_NODE: u64 = 20 * MIB;
const LIBRARY: &str = "librados";
/// So long everything stays mounted. In its first moments ceph-fuse has `mount` remount it; if it is gone by then,
/// ceph-fuse aborts, and the MDS keeps what its session holds for a minute.
const MOUNTED: Duration = Duration::from_millis(100);
/// Calls at once.
const AT_ONCE: usize = 8;

/// Bandwidth of a published volume over that of a bare mount.
const TARGET_DISK: f64 = 0.98;
/// What fio works on. The cluster's disk is memory.
const FILE: u64 = 512 * MIB;
/// Odd, so that a median is a measurement. Many, since the target is near.
const ROUNDS: usize = 11;
const JOBS: [Job; 4] = [
    Job { what: "CephFS: 1 MiB sequential read, depth 4", pattern: "read", block: "1m", depth: 4 },
    Job { what: "CephFS: 1 MiB sequential write, depth 4", pattern: "write", block: "1m", depth: 4 },
    Job { what: "CephFS: 4 KiB random read, depth 16", pattern: "randread", block: "4k", depth: 16 },
    Job { what: "CephFS: 4 KiB random write, depth 16", pattern: "randwrite", block: "4k", depth: 16 },
];

/// Resident memory of a controller that has made and deleted volumes, and of a node that has mounted some.
pub(crate) async fn memory(lab: &Lab, cluster: &Cluster, options: &Options) -> Result<Vec<Row>> {
    let (lives, mounts) = (options.count(1000, 50), options.count(50, 5));
    let controller = Driver::launch(lab, "ceph-memory", cluster.setup("controller")).await?;
    let start = controller.resident()?;
    let client = controller.client().await?;
    live_and_die(&client, "first", lives).await?;
    let (after, is_loaded) = (controller.resident()?, controller.has_loaded(LIBRARY)?);
    live_and_die(&client, "second", lives).await?;
    let later = controller.resident()?;

    let node = Driver::launch(lab, "ceph-memory-node", cluster.setup("node")).await?;
    let node_start = node.resident()?;
    let mut maker = client.clone();
    let mut volumes = Vec::new();
    for number in 0..mounts {
        volumes.push(maker.create(&format!("mounted-{number}"), Wanted::shared(GIB)).await?);
    }
    mount_and_unmount(&node.client().await?, &volumes).await?;
    let (node_after, is_loaded_there) = (node.resident()?, node.has_loaded(LIBRARY)?);
    delete_all(&client, AT_ONCE, volumes).await?;

    let below = |limit: u64| format!("< {}", mebibytes(bytes(limit)));
    let loaded = |is_loaded| if is_loaded { "librados loaded" } else { "librados not loaded" };
    let row = |what: String, after: u64, start: u64| Row {
        ratio: Some(bytes(after) / bytes(start)),
        ..Row::alone(what, mebibytes(bytes(after)), format!("at the start: {}", mebibytes(bytes(start))))
    };
    Ok(vec![
        row(
            format!("CephFS: memory (VmRSS) of a controller, {lives} volumes made and deleted, {}", loaded(is_loaded)),
            after,
            start,
        )
        .limited(below(TARGET_CONTROLLER), is_loaded && after < TARGET_CONTROLLER),
        Row {
            against: format!("after the first {lives}: {}", mebibytes(bytes(after))),
            ..row(format!("– after {lives} more"), later, after)
        },
        elsewhere("– memory of a controller", mebibytes(bytes(after)), "108 MiB"),
        row(
            format!(
                "CephFS: memory (VmRSS) of a node, {mounts} volumes mounted and unmounted, {}",
                loaded(is_loaded_there)
            ),
            node_after,
            node_start,
        )
        .limited(format!("{}, not loaded", below(TARGET_NODE)), !is_loaded_there && node_after < TARGET_NODE),
    ])
}

/// Makes volumes and deletes them, some at once.
async fn live_and_die(client: &Client, prefix: &str, count: usize) -> Result<()> {
    let mut all = JoinSet::<Result<()>>::new();
    for worker in 0..AT_ONCE {
        let (mut client, prefix) = (client.clone(), prefix.to_owned());
        all.spawn(async move {
            for number in (worker..count).step_by(AT_ONCE) {
                let volume = client.create(&format!("{prefix}-{number}"), Wanted::shared(GIB)).await?;
                client.delete(&volume).await?;
            }
            Ok(())
        });
    }
    while let Some(ended) = all.join_next().await {
        ended??;
    }
    Ok(())
}

/// Stages, publishes and takes back each volume, some at once.
async fn mount_and_unmount(client: &Client, volumes: &[Volume]) -> Result<()> {
    let mut all = JoinSet::<Result<()>>::new();
    for share in volumes.chunks(volumes.len().div_ceil(AT_ONCE).max(1)) {
        let (mut client, share) = (client.clone(), share.to_vec());
        all.spawn(async move {
            for volume in &share {
                client.stage(volume, Wanted::shared(GIB)).await?;
                client.publish(volume, Wanted::shared(GIB)).await?;
                tokio::time::sleep(MOUNTED).await;
                client.unpublish(volume).await?;
                client.unstage(volume).await?;
            }
            Ok(())
        });
    }
    while let Some(ended) = all.join_next().await {
        ended??;
    }
    Ok(())
}

/// A driver for both sides of a volume, as two processes, as it is deployed.
struct Sides {
    controller: Client,
    node: Client,
    _drivers: [Driver; 2],
}

impl Sides {
    async fn start(lab: &Lab, cluster: &Cluster, name: &str) -> Result<Self> {
        let controller = Driver::launch(lab, &format!("{name}-controller"), cluster.setup("controller")).await?;
        let node = Driver::launch(lab, &format!("{name}-node"), cluster.setup("node")).await?;
        Ok(Self { controller: controller.client().await?, node: node.client().await?, _drivers: [controller, node] })
    }
}

/// The node's calls against a mount of the same path, made by hand.
pub(crate) async fn stage(lab: &Lab, cluster: &Cluster, options: &Options) -> Result<Vec<Row>> {
    let Sides { mut controller, node: mut client, _drivers } = Sides::start(lab, cluster, "ceph-stage").await?;
    let wanted = Wanted::shared(GIB);
    let volume = controller.create("pvc", wanted).await?;
    let path = path_of(&volume)?;
    let (bare, bound) = (lab.new_directory("ceph-stage-bare")?, lab.new_directory("ceph-stage-bound")?);
    cluster.settle();
    let before = [cluster.carried_out()?, u64::try_from(cluster.commands()?)?];

    let [mut stage, mut publish, mut unpublish, mut unstage] = [const { Pairs::EMPTY }; 4];
    for round in 0..=options.count(50, 5) {
        let mut seconds = [Pairs::EMPTY; 4];
        for is_ours in [round % 2 == 0, round % 2 != 0] {
            let [stage, publish, unpublish, unstage] = &mut seconds;
            if is_ours {
                stage.subject.push(timed(client.stage(&volume, wanted)).await?.0);
                publish.subject.push(timed(client.publish(&volume, wanted)).await?.0);
                tokio::time::sleep(MOUNTED).await;
                unpublish.subject.push(timed(client.unpublish(&volume)).await?.0);
                unstage.subject.push(timed(client.unstage(&volume)).await?.0);
            } else {
                stage.baseline.push(timed(async { cluster.mount(path, &bare) }).await?.0);
                publish.baseline.push(timed(async { Ok(rustix::mount::mount_bind(&bare, &bound)?) }).await?.0);
                tokio::time::sleep(MOUNTED).await;
                unpublish.baseline.push(timed(async { unmount(&bound) }).await?.0);
                unstage.baseline.push(timed(async { cluster.unmount(&bare) }).await?.0);
            }
        }
        if round > 0 {
            let all = [&mut stage, &mut publish, &mut unpublish, &mut unstage];
            all.into_iter().zip(seconds).for_each(|(pairs, seconds)| pairs.extend(seconds));
        }
    }
    // Its log may be a moment late.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = [cluster.carried_out()?, u64::try_from(cluster.commands()?)?];
    controller.delete(&volume).await?;

    let sent = after[1] - before[1];
    let calls = 4 * stage.subject.len();
    let ours = |pairs: &Pairs| time(median(&pairs.subject));
    Ok(vec![
        stage.at_most("CephFS: NodeStageVolume", "ceph-fuse, started by hand", TARGET, 0.0),
        Row::alone(
            format!("– commands that the manager was sent during {calls} calls of the node"),
            sent.to_string(),
            format!("of them about volumes: {}", after[0] - before[0]),
        )
        .limited("0", before == after),
        publish.compared("– NodePublishVolume", "mount(MS_BIND)"),
        unpublish.compared("– NodeUnpublishVolume", "umount2"),
        unstage.compared("– NodeUnstageVolume", "umount2, and the end of ceph-fuse"),
        elsewhere("– NodeStageVolume", ours(&stage), "27ms"),
        elsewhere("– NodePublishVolume", ours(&publish), "1.9ms"),
        elsewhere("– NodeUnpublishVolume", ours(&unpublish), "3.2ms"),
        elsewhere("– NodeUnstageVolume", ours(&unstage), "2.1ms"),
    ])
}

/// Direct I/O on a file of a published volume against one of another volume that is mounted by hand, in turns.
pub(crate) async fn disk(lab: &Lab, cluster: &Cluster, options: &Options) -> Result<Vec<Row>> {
    let Sides { mut controller, node: mut client, _drivers } = Sides::start(lab, cluster, "ceph-disk").await?;
    let wanted = Wanted::shared(GIB);
    let (volume, other) = (controller.create("pvc", wanted).await?, controller.create("bare", wanted).await?);
    client.stage(&volume, wanted).await?;
    client.publish(&volume, wanted).await?;
    let place = lab.new_directory("ceph-disk-bare")?;
    cluster.mount(path_of(&other)?, &place)?;
    let report = lab.path("ceph-fio.json");
    let (ours, bare) = (client.target(&volume).join("file"), place.join("file"));
    for file in [&bare, &ours] {
        disk::fio(&LAYOUT, file, FILE, &report, Run::Once)?;
    }
    let rounds = options.count(ROUNDS, 1);
    let mut rows = Vec::new();
    for job in JOBS {
        let measure = |file: &Path| disk::fio(&job, file, FILE, &report, Run::For(options.seconds));
        let pairs = disk::in_turns(rounds, |_| measure(&bare), |_| measure(&ours))?;
        let row = disk::row(job.what, "ceph-fuse, started by hand", TARGET_DISK, &pairs);
        // The cluster is on the same processors, and its speed changes by more than the target allows.
        let ratio = pairs.ratio_in_rounds();
        rows.push(Row { ratio: Some(ratio), met: Some(ratio >= TARGET_DISK), ..row });
    }
    cluster.unmount(&place)?;
    client.unpublish(&volume).await?;
    client.unstage(&volume).await?;
    controller.delete(&volume).await?;
    controller.delete(&other).await?;
    Ok(rows)
}

/// Where the volume is in the file system.
fn path_of(volume: &Volume) -> Result<&str> {
    volume.volume_context.get("path").map(String::as_str).context("CreateVolume told no path")
}

#[expect(clippy::cast_precision_loss, reason = "sizes below 2^52")]
fn bytes(bytes: u64) -> f64 {
    bytes as f64
}
