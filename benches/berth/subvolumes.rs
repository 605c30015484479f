//! Volumes in a Ceph cluster, made and deleted: against the commands that this takes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth::host::command;
use berth::proto::csi::Volume;
use tokio::task::JoinSet;

use crate::Options;
use crate::ceph::{Bare, Cluster};
use crate::driver::{Client, Driver, Wanted};
use crate::lab::Lab;
use crate::measure::{Pairs, Row, in_turns, median, time, timed};

const GIB: u64 = 1 << 30;
/// Against the commands that a call sends.
const TARGET: f64 = 1.2;
/// Against the `ceph` command line, which takes so much longer.
const TARGET_CLI: f64 = 0.1;
/// Of the commands' throughput.
const TARGET_PARALLEL: f64 = 0.9;
/// A run of `ceph` that takes longer than this is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// Repeated calls whose commands are counted.
const COUNTED: usize = 20;
const ELSEWHERE: &str = "ceph-csi, measured elsewhere on such a cluster";

/// A figure beside one of ceph-csi from another run, which therefore makes no ratio.
pub(crate) fn elsewhere(what: &str, figure: String, theirs: &str) -> Row {
    Row::alone(what, figure, format!("{ELSEWHERE}: {theirs}"))
}

/// CreateVolume, the same again, and DeleteVolume, against the manager's commands.
pub(crate) async fn create(lab: &Lab, cluster: &Cluster, options: &Options) -> Result<Vec<Row>> {
    let driver = Driver::launch(lab, "ceph-create", cluster.setup("controller")).await?;
    let (mut client, bare) = (driver.client().await?, cluster.connect()?);
    let wanted = Wanted::shared(GIB);
    let notes = notes_of(&mut client, &bare).await?;
    let count = options.count(150, 10);

    let (mut create, mut volumes) = (Pairs::default(), Vec::new());
    // The first round does not count: it connects, and makes the group.
    for round in 0..=count {
        let mut one = Pairs::default();
        for is_ours in [round % 2 == 0, round % 2 != 0] {
            if is_ours {
                let (seconds, volume) = timed(client.create(&name(round), wanted)).await?;
                one.subject.push(seconds);
                volumes.push(volume);
            } else {
                one.baseline.push(timed(async { bare.create(&subvolume(round), GIB, &notes) }).await?.0);
            }
        }
        if round > 0 {
            create.extend(one);
        }
    }
    cluster.settle();
    let again = repeat(&mut client, &bare, count).await?;
    let (told, counted) = (driver.ceph_commands()?, cluster.carried_out()?);
    let repeats = COUNTED.min(count);
    for round in 0..repeats {
        client.create(&name(round), wanted).await?;
    }
    // The manager counts a command after it has answered it.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (told, counted) = (driver.ceph_commands()? - told, cluster.carried_out()? - counted);

    let command_line = against_command_line(&mut client, &bare, cluster, &notes, options).await?;

    // One that has just been started knows nothing of the volumes yet.
    drop(client);
    drop(driver);
    let driver = Driver::launch(lab, "ceph-create-restarted", cluster.setup("controller")).await?;
    let mut client = driver.client().await?;
    let restarted = repeat(&mut client, &bare, count).await?;

    cluster.settle();
    let mut delete = Pairs::default();
    for (round, volume) in volumes.iter().enumerate() {
        for is_ours in [round % 2 == 0, round % 2 != 0] {
            if is_ours {
                delete.subject.push(timed(client.delete(volume)).await?.0);
            } else {
                delete.baseline.push(timed(async { bare.delete(&subvolume(round)) }).await?.0);
            }
        }
    }
    Ok(vec![
        create.at_most("CephFS: CreateVolume", "its four commands, sent bare", TARGET, 0.0),
        command_line,
        elsewhere("– CreateVolume", time(median(&create.subject)), "9.3ms"),
        again.at_most("CephFS: CreateVolume again", "`fs subvolume info`, sent bare", TARGET, 0.0),
        Row::alone(
            format!("– commands that {repeats} of these calls sent, as the driver counts them"),
            told.to_string(),
            format!("as the manager counts them: {counted}"),
        )
        .limited(repeats.to_string(), told == counted && usize::try_from(told) == Ok(repeats)),
        restarted.compared("– the first time after a restart of the driver", "`fs subvolume info`, sent bare"),
        elsewhere("– CreateVolume again", time(median(&again.subject)), "2.8ms"),
        delete.compared("– DeleteVolume", "its two commands, sent bare"),
        elsewhere("– DeleteVolume", time(median(&delete.subject)), "6.3ms"),
    ])
}

/// CreateVolume of volumes that exist, against asking for as many, in turns.
async fn repeat(client: &mut Client, bare: &Bare, count: usize) -> Result<Pairs> {
    let ask = |round| {
        ensure!(bare.info(&subvolume(round))?.is_some(), "{} is gone", subvolume(round));
        Ok(())
    };
    in_turns(count, ask, async |round| client.create(&name(round), Wanted::shared(GIB)).await.map(drop)).await
}

/// What both sides call what they make.
fn name(round: usize) -> String {
    format!("pvc-{round}")
}

fn subvolume(round: usize) -> String {
    format!("bare-{round}")
}

/// What the driver writes down about a volume, which the bare side writes too. The names are as long.
async fn notes_of(client: &mut Client, bare: &Bare) -> Result<String> {
    let volume = client.create("pvc-0", Wanted::shared(GIB)).await?;
    let notes = bare.notes(volume.volume_id.rsplit('/').next().context("an id without a subvolume")?)?;
    client.delete(&volume).await?;
    Ok(notes)
}

/// CreateVolume against `ceph`, which does the same in four runs.
async fn against_command_line(
    client: &mut Client,
    bare: &Bare,
    cluster: &Cluster,
    notes: &str,
    options: &Options,
) -> Result<Row> {
    let size = GIB.to_string();
    let mut pairs = Pairs::default();
    for round in 0..options.count(9, 2) {
        let name = format!("cli-{round}");
        let run = |words: &[&str]| {
            let mut line = cluster.command_line();
            line.extend(["fs", "subvolume"].iter().chain(words).map(|word| (*word).to_owned()));
            line.extend(["cephfs", &name].map(str::to_owned));
            line
        };
        let group = ["--group_name".to_owned(), "csi".to_owned()];
        let send = |words: &[&str], more: &[&str]| {
            let mut line = run(words);
            line.extend(more.iter().map(|word| (*word).to_owned()));
            line.extend(group.clone());
            command::run("ceph", &line, PATIENCE)
        };
        let begun = Instant::now();
        ensure!(send(&["info"], &[]).is_err(), "{name} is there already");
        send(&["create"], &[&size])?;
        send(&["metadata", "set"], &["berth", notes])?;
        send(&["getpath"], &[])?;
        pairs.baseline.push(begun.elapsed().as_secs_f64());
        let (seconds, volume) = timed(client.create(&name, Wanted::shared(GIB))).await?;
        pairs.subject.push(seconds);
        client.delete(&volume).await?;
        bare.delete(&name)?;
    }
    Ok(pairs.at_most("CephFS: the same", "`ceph`, run four times", TARGET_CLI, 0.0))
}

/// Many volumes at once, against the commands sent from as many threads.
pub(crate) async fn parallel(lab: &Lab, cluster: &Cluster, options: &Options) -> Result<Vec<Row>> {
    let driver = Driver::launch(lab, "ceph-parallel", cluster.setup("controller")).await?;
    let (mut client, bare) = (driver.client().await?, cluster.connect()?);
    let notes = notes_of(&mut client, &bare).await?;
    let count = options.count(192, 64);
    let mut rows = Vec::new();
    for at_once in [16, 64] {
        let (mut create, mut delete) = (Pairs::default(), Pairs::default());
        for round in 0..options.count(9, 2) {
            for is_ours in [round % 2 == 0, round % 2 != 0] {
                cluster.settle();
                if is_ours {
                    let (seconds, volumes) = timed(create_all(&client, at_once, count, round)).await?;
                    create.subject.push(rate(count, seconds));
                    cluster.settle();
                    delete.subject.push(rate(count, timed(delete_all(&client, at_once, volumes)).await?.0));
                } else {
                    let name = |number: usize| format!("bare-{at_once}-{round}-{number}");
                    let make = |number| bare.create(&name(number), GIB, &notes).map(drop);
                    let seconds = timed(async { in_threads(at_once, count, make) }).await?.0;
                    create.baseline.push(rate(count, seconds));
                    cluster.settle();
                    let remove = |number| bare.delete(&name(number));
                    let seconds = timed(async { in_threads(at_once, count, remove) }).await?.0;
                    delete.baseline.push(rate(count, seconds));
                }
            }
        }
        rows.push(rates(format!("CephFS: CreateVolume, {at_once} at once"), &create, true));
        rows.push(rates(format!("– DeleteVolume, {at_once} at once"), &delete, false));
        if at_once == 16 {
            let each = |what: &str, pairs: &Pairs, theirs| {
                elsewhere(&format!("– {what}, 16 at once"), per_second(&pairs.subject), theirs)
            };
            rows.push(each("CreateVolume", &create, "171/s"));
            rows.push(each("DeleteVolume", &delete, "228/s"));
        }
    }
    Ok(rows)
}

/// Creates volumes of this round, so many at once.
async fn create_all(client: &Client, at_once: usize, count: usize, round: usize) -> Result<Vec<Volume>> {
    let (mut all, mut volumes) = (JoinSet::<Result<Vec<Volume>>>::new(), Vec::new());
    for worker in 0..at_once {
        let mut client = client.clone();
        all.spawn(async move {
            let mut volumes = Vec::new();
            for number in (worker..count).step_by(at_once) {
                let name = format!("pvc-{at_once}-{round}-{number}");
                volumes.push(client.create(&name, Wanted::shared(GIB)).await?);
            }
            Ok(volumes)
        });
    }
    while let Some(ended) = all.join_next().await {
        volumes.extend(ended??);
    }
    Ok(volumes)
}

/// Deletes them, so many at once.
pub(crate) async fn delete_all(client: &Client, at_once: usize, volumes: Vec<Volume>) -> Result<()> {
    let mut all = JoinSet::<Result<()>>::new();
    let share = volumes.len().div_ceil(at_once).max(1);
    for share in volumes.chunks(share) {
        let (mut client, share) = (client.clone(), share.to_vec());
        all.spawn(async move {
            for volume in &share {
                client.delete(volume).await?;
            }
            Ok(())
        });
    }
    while let Some(ended) = all.join_next().await {
        ended??;
    }
    Ok(())
}

/// Does something so often, on so many threads.
fn in_threads(threads: usize, count: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let work = &work;
                scope.spawn(move || (worker..count).step_by(threads).try_for_each(work))
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| anyhow::bail!("a thread broke")))
    })
}

fn rate(count: usize, seconds: f64) -> f64 {
    u32::try_from(count).map_or(f64::NAN, f64::from) / seconds
}

fn per_second(rates: &[f64]) -> String {
    let [low, high] = [f64::min, f64::max].map(|pick| rates.iter().copied().reduce(pick).unwrap_or(f64::NAN));
    format!("{:.0}/s ({low:.0} to {high:.0})", median(rates))
}

fn rates(what: String, pairs: &Pairs, has_target: bool) -> Row {
    let against = format!("its commands from as many threads: {}", per_second(&pairs.baseline));
    let row = Row { ratio: Some(pairs.ratio()), ..Row::alone(what, per_second(&pairs.subject), against) };
    if has_target { row.limited(format!("≥ {TARGET_PARALLEL}x"), pairs.ratio() >= TARGET_PARALLEL) } else { row }
}
