//! Single calls: creating, publishing, probing.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use berth::host::files;
use berth::proto::csi::volume_capability::access_mode::Mode;
use rustix::mount::UnmountFlags;
use tokio::task::JoinSet;

use crate::Options;
use crate::driver::{Driver, Pool, Wanted};
use crate::lab::{Lab, OtherMounts, create_synced};
use crate::measure::{Pairs, Row, in_turns, median, time};

const GIB: u64 = 1 << 30;
/// What a call may cost beyond the system calls that do its work: two round trips over the socket.
const SLACK: f64 = 0.001;

/// CreateVolume and DeleteVolume against making and unlinking a file.
pub(crate) async fn create(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    let driver = Driver::start(lab, "create", Pool::Reserved).await?;
    let mut client = driver.client().await?;
    let wanted = Wanted::of_size(GIB);
    let (bare, folder) = (lab.disk().join("bare"), lab.disk().join("durable"));
    std::fs::create_dir(&folder)?;
    let count = options.count(200, 20);

    let mut ours = async |round: usize| {
        let volume = client.create(&format!("pvc-{round}"), wanted).await?;
        client.delete(&volume).await
    };
    let least = |_| {
        create_synced(&bare, GIB)?;
        Ok(std::fs::remove_file(&bare)?)
    };
    let pairs = in_turns(count, least, &mut ours).await?;
    let durable = in_turns(count, |_| create_durably(&folder), &mut ours).await?;
    Ok(vec![
        pairs.at_most("CreateVolume + DeleteVolume, 1 GiB", "ftruncate + fsync + unlink", 1.5, SLACK),
        durable.compared("– the same", "the least that survives a crash (see below)"),
    ])
}

/// What creating and deleting a volume takes if neither may be half done after a crash, and both are known to be done:
/// reserved space, a descriptor, one rename to commit to each, and an fsync of whatever a later step relies on.
fn create_durably(folder: &Path) -> Result<()> {
    let (fresh, volume, trash) = (folder.join("fresh"), folder.join("volume"), folder.join("trash"));
    std::fs::create_dir(&fresh)?;
    files::create_sized(&fresh.join("image"), GIB, true)?.sync_all()?;
    let mut descriptor = File::create_new(fresh.join("descriptor"))?;
    descriptor.write_all(b"{}")?;
    descriptor.sync_all()?;
    File::open(&fresh)?.sync_all()?;
    files::rename_durably(&fresh, &volume)?;
    files::rename_durably(&volume, &trash)?;
    Ok(files::remove_flat_directory(&trash)?)
}

/// NodePublishVolume and NodeUnpublishVolume against the two system calls.
pub(crate) async fn publish(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    let driver = Driver::start(lab, "publish", Pool::Reserved).await?;
    let mut client = driver.client().await?;
    let wanted = Wanted::of_size(GIB);
    let volume = client.create("pvc", wanted).await?;
    client.stage(&volume, wanted).await?;
    let (staging, bare) = (client.staging(&volume), lab.new_directory("publish-bare")?);

    let system_calls = |_| {
        rustix::mount::mount_bind(&staging, &bare)?;
        Ok(rustix::mount::unmount(&bare, UnmountFlags::empty())?)
    };
    let mut calls = client.clone();
    let pairs = in_turns(options.count(500, 50), system_calls, async |_| {
        calls.publish(&volume, wanted).await?;
        calls.unpublish(&volume).await
    })
    .await?;
    client.unstage(&volume).await?;
    client.delete(&volume).await?;
    Ok(vec![pairs.at_most("NodePublishVolume + NodeUnpublishVolume", "mount(MS_BIND) + umount2", 1.5, SLACK)])
}

/// Publishing and staging with many other mounts on the machine against few.
pub(crate) async fn mounts(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    const FEW: usize = 10;
    let many = options.count(5000, 500);
    let driver = Driver::start(lab, "mounts", Pool::Reserved).await?;
    let mut client = driver.client().await?;
    let shared = Wanted::of_size(GIB);
    let alone = Wanted { mode: Mode::SingleNodeSingleWriter, ..shared };
    let volume = client.create("pvc", shared).await?;
    let [mut publish, mut publish_alone, mut stage] = [Pairs::default(), Pairs::default(), Pairs::default()];

    // The mounts can't come and go between two calls, so the sides take turns in blocks.
    for round in 0..options.count(6, 2) {
        let crowded = round % 2 == 1;
        let others = OtherMounts::new(lab.path("others"), if crowded { many } else { FEW })?;
        let side = |pairs: &mut Pairs, seconds| {
            if crowded { pairs.subject.push(seconds) } else { pairs.baseline.push(seconds) }
        };
        client.stage(&volume, shared).await?;
        for (wanted, pairs) in [(shared, &mut publish), (alone, &mut publish_alone)] {
            for _ in 0..options.count(100, 20) {
                let begun = Instant::now();
                client.publish(&volume, wanted).await?;
                client.unpublish(&volume).await?;
                side(pairs, begun.elapsed().as_secs_f64());
            }
        }
        client.unstage(&volume).await?;
        for _ in 0..options.count(20, 5) {
            let begun = Instant::now();
            client.stage(&volume, shared).await?;
            client.unstage(&volume).await?;
            side(&mut stage, begun.elapsed().as_secs_f64());
        }
        drop(others);
    }
    client.delete(&volume).await?;
    let against = format!("with {FEW} other mounts");
    let with = |what: &str| format!("{what} with {many} other mounts");
    Ok(vec![
        publish.at_most(with("publish + unpublish"), &against, 2.0, 0.0),
        publish_alone.compared(with("– the same, ReadWriteOncePod,"), &against),
        stage.compared(with("– stage + unstage"), &against),
    ])
}

/// Probe by one client, and by many at once.
pub(crate) async fn probe(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    const CLIENTS: usize = 64;
    const TARGET: f64 = 0.0003;
    let driver = Driver::start(lab, "probe", Pool::Reserved).await?;
    let mut client = driver.client().await?;

    let (mut near, far) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || echo(far));
    let round_trip = |_| {
        near.write_all(&[1])?;
        Ok(near.read_exact(&mut [0])?)
    };
    let pairs = in_turns(options.count(5000, 500), round_trip, async |_| client.probe().await).await?;
    drop(near);
    ensure!(echo.join().is_ok(), "the echo's thread broke");

    // In blocks that alternate; each side makes as many calls.
    let calls = options.count(6400, 640);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(driver.client().await?);
    }
    let mut errors = 0_usize;
    let mut rates = Pairs::default();
    for _ in 0..3 {
        let begun = Instant::now();
        for _ in 0..calls {
            errors += usize::from(client.probe().await.is_err());
        }
        rates.baseline.push(count_as_f64(calls) / begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        let mut all = JoinSet::new();
        for mut one in clients.iter().cloned() {
            all.spawn(async move {
                let mut errors = 0;
                for _ in 0..calls / CLIENTS {
                    errors += usize::from(one.probe().await.is_err());
                }
                errors
            });
        }
        errors += all.join_all().await.iter().sum::<usize>();
        rates.subject.push(count_as_f64(calls) / begun.elapsed().as_secs_f64());
    }
    let latency = median(&pairs.subject);
    let (many, one) = (median(&rates.subject), median(&rates.baseline));
    Ok(vec![
        Row {
            target: format!("< {}", time(TARGET)),
            met: Some(latency < TARGET),
            ..pairs.compared("Probe, one client", "a byte there and back over a Unix socket")
        },
        Row {
            what: format!("Probe, {CLIENTS} clients at once"),
            figure: format!("{many:.0} calls/s, {errors} errors"),
            against: format!("one client: {one:.0} calls/s"),
            ratio: Some(many / one),
            target: "no error, ≥ 1x".to_owned(),
            met: Some(errors == 0 && many >= one),
        },
    ])
}

/// Sends back each byte until the other side closes.
fn echo(mut socket: UnixStream) {
    let mut byte = [0];
    while socket.read_exact(&mut byte).is_ok() && socket.write_all(&byte).is_ok() {}
}

fn count_as_f64(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}
