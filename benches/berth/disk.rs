//! Reading and writing through a volume against the disk below it, with fio.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use berth::host::command;
use serde_json::Value;

use crate::Options;
use crate::driver::{Driver, Pool, Wanted};
use crate::lab::Lab;
use crate::measure::{Pairs, Row, median};

/// What fio works on, in bytes, and the volume that it lies in.
const FILE: u64 = 1 << 30;
const VOLUME: u64 = 8 << 30;
/// Bandwidth of the volume over that of the disk.
const TARGET: f64 = 0.9;
const AGAINST: &str = "on the pool's disk";
/// Odd, so that a median is a measurement.
const ROUNDS: usize = 5;

/// How long a job runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Run {
    /// Once over the file.
    Once,
    /// Over and over for so many seconds, after one that does not count.
    For(u32),
}

/// A way to read or write.
pub(crate) struct Job {
    pub(crate) what: &'static str,
    pub(crate) pattern: &'static str,
    pub(crate) block: &'static str,
    pub(crate) depth: u32,
}

/// Writes a file once over, in order.
pub(crate) const LAYOUT: Job = Job { what: "layout", pattern: "write", block: "1m", depth: 4 };

const JOBS: [Job; 6] = [
    Job { what: "4 KiB random read, depth 16", pattern: "randread", block: "4k", depth: 16 },
    Job { what: "4 KiB random write, depth 16", pattern: "randwrite", block: "4k", depth: 16 },
    Job { what: "1 MiB sequential read, depth 4", pattern: "read", block: "1m", depth: 4 },
    Job { what: "1 MiB sequential write, depth 4", pattern: "write", block: "1m", depth: 4 },
    Job { what: "– 4 KiB random read, depth 1", pattern: "randread", block: "4k", depth: 1 },
    Job { what: "– 4 KiB random write, depth 1", pattern: "randwrite", block: "4k", depth: 1 },
];

/// Over files that nobody has written yet: `FIRST` bytes.
const FIRST_WRITES: [(&str, &str, &str, u32); 2] = [
    ("– first writes, 1 MiB sequential, depth 4", "write", "1m", 4),
    ("– first writes, 4 KiB random, depth 16", "randwrite", "4k", 16),
];
const FIRST: u64 = 128 << 20;

/// Direct I/O on a file of a published volume against one of the pool's file system, in turns.
pub(crate) async fn disk(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    let driver = Driver::start(lab, "disk", Pool::Reserved).await?;
    let mut client = driver.client().await?;
    let wanted = Wanted::of_size(VOLUME);
    let volume = client.create("pvc", wanted).await?;
    client.stage(&volume, wanted).await?;
    client.publish(&volume, wanted).await?;
    let report = lab.path("fio.json");
    let (inside, bare) = (client.target(&volume).join("file"), lab.disk().join("bare-file"));
    // Both files are written once over before anything counts: the first write to a block has to record that it is
    // no longer unwritten, in the volume's file system and once more in the pool's. The last rows show that.
    for file in [&bare, &inside] {
        fio(&LAYOUT, file, FILE, &report, Run::Once)?;
    }
    let mut rows = Vec::new();
    for job in JOBS {
        let measure = |file: &Path| fio(&job, file, FILE, &report, Run::For(options.seconds));
        let pairs = in_turns(ROUNDS, |_| measure(&bare), |_| measure(&inside))?;
        rows.push(row(job.what, AGAINST, TARGET, &pairs));
    }
    for (what, pattern, block, depth) in FIRST_WRITES {
        let job = Job { what, pattern, block, depth };
        let measure = |file: &Path, round: usize| {
            let file = file.with_extension(format!("{block}-{round}"));
            let bandwidth = fio(&job, &file, FIRST, &report, Run::Once)?;
            std::fs::remove_file(file)?;
            Ok(bandwidth)
        };
        let pairs = in_turns(ROUNDS, |round| measure(&bare, round), |round| measure(&inside, round))?;
        rows.push(row(what, AGAINST, TARGET, &pairs));
    }
    client.unpublish(&volume).await?;
    client.unstage(&volume).await?;
    client.delete(&volume).await?;
    Ok(rows)
}

/// Measures both sides in turns, of which either is the first as often: a shared disk has better and worse minutes.
pub(crate) fn in_turns(
    rounds: usize,
    mut baseline: impl FnMut(usize) -> Result<f64>,
    mut subject: impl FnMut(usize) -> Result<f64>,
) -> Result<Pairs> {
    let mut pairs = Pairs::default();
    for round in 0..rounds {
        if round % 2 == 0 {
            pairs.baseline.push(baseline(round)?);
            pairs.subject.push(subject(round)?);
        } else {
            pairs.subject.push(subject(round)?);
            pairs.baseline.push(baseline(round)?);
        }
    }
    Ok(pairs)
}

/// A row of bandwidths, with the lowest and the highest. One that explains has no target.
pub(crate) fn row(what: &str, against: &str, target: f64, pairs: &Pairs) -> Row {
    let explains = what.starts_with('–');
    let show = |rates: &[f64]| {
        let [low, high] = [f64::min, f64::max].map(|pick| rates.iter().copied().reduce(pick).unwrap_or(f64::NAN));
        let per_second = |rate: f64| format!("{:.0}", rate / f64::from(1 << 20));
        format!("{} MiB/s ({} to {})", per_second(median(rates)), per_second(low), per_second(high))
    };
    Row {
        what: what.to_owned(),
        figure: show(&pairs.subject),
        against: format!("{against}: {}", show(&pairs.baseline)),
        ratio: Some(pairs.ratio()),
        target: if explains { "–".to_owned() } else { format!("≥ {target}x") },
        met: (!explains).then(|| pairs.ratio() >= target),
    }
}

/// Runs a job on a file of this size, and returns its bytes per second.
pub(crate) fn fio(job: &Job, file: &Path, size: u64, report: &Path, run: Run) -> Result<f64> {
    let mut arguments = vec![
        "--name=berth".to_owned(),
        format!("--filename={}", file.display()),
        format!("--size={size}"),
        format!("--rw={}", job.pattern),
        format!("--bs={}", job.block),
        format!("--iodepth={}", job.depth),
        "--ioengine=libaio".to_owned(),
        "--direct=1".to_owned(),
        "--output-format=json".to_owned(),
        format!("--output={}", report.display()),
    ];
    let seconds = if let Run::For(seconds) = run { seconds } else { 0 };
    if seconds > 0 {
        arguments.extend(["--time_based".to_owned(), format!("--runtime={seconds}"), "--ramp_time=1".to_owned()]);
    }
    let deadline = Duration::from_secs(u64::from(seconds) + 300);
    command::run("fio", &arguments, deadline)?;
    let report: Value = serde_json::from_slice(&std::fs::read(report)?).context("fio's report is no JSON")?;
    let direction = if job.pattern.ends_with("read") { "read" } else { "write" };
    report["jobs"][0][direction]["bw_bytes"].as_f64().context("fio's report names no bandwidth")
}
