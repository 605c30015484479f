//! Reading and writing through a volume against the disk below it, with fio.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use berth::host::command;
use serde_json::Value;

use crate::Options;
use crate::driver::{Driver, Pool, Wanted};
use crate::lab::Lab;
use crate::measure::{Pairs, Row, mebibytes, median};

/// What fio works on, in bytes, and the volume that it lies in.
const FILE: u64 = 1 << 30;
const VOLUME: u64 = 2 << 30;
/// Bandwidth of the volume over that of the disk.
const TARGET: f64 = 0.9;
const ROUNDS: usize = 3;

/// A way to read or write.
struct Job {
    what: &'static str,
    pattern: &'static str,
    block: &'static str,
    depth: u32,
}

const JOBS: [Job; 6] = [
    Job { what: "4 KiB random read, depth 16", pattern: "randread", block: "4k", depth: 16 },
    Job { what: "4 KiB random write, depth 16", pattern: "randwrite", block: "4k", depth: 16 },
    Job { what: "1 MiB sequential read, depth 4", pattern: "read", block: "1m", depth: 4 },
    Job { what: "1 MiB sequential write, depth 4", pattern: "write", block: "1m", depth: 4 },
    Job { what: "– 4 KiB random read, depth 1", pattern: "randread", block: "4k", depth: 1 },
    Job { what: "– 4 KiB random write, depth 1", pattern: "randwrite", block: "4k", depth: 1 },
];

/// Direct I/O on a file of a published volume against one of the pool's file system, in turns.
pub(crate) async fn disk(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    let driver = Driver::start(lab, "disk", Pool::Reserved).await?;
    let mut client = driver.client().await?;
    let wanted = Wanted::of_size(VOLUME);
    let id = client.create("pvc", wanted).await?;
    client.stage(&id, wanted).await?;
    client.publish(&id, wanted).await?;
    let report = lab.path("fio.json");
    let (volume, bare) = (client.target(&id).join("file"), lab.disk().join("bare-file"));
    // Both files are written once over before anything counts: the first write to a block has to record that it is
    // no longer unwritten, in the volume's file system and once more in the pool's.
    let layout = Job { what: "layout", pattern: "write", block: "1m", depth: 4 };
    for file in [&bare, &volume] {
        fio(&layout, file, &report, None)?;
    }
    let mut rows = Vec::new();
    for job in JOBS {
        let mut pairs = Pairs::default();
        for _ in 0..ROUNDS {
            pairs.baseline.push(fio(&job, &bare, &report, Some(options.seconds))?);
            pairs.subject.push(fio(&job, &volume, &report, Some(options.seconds))?);
        }
        let (ours, theirs) = (median(&pairs.subject), median(&pairs.baseline));
        let explains = job.what.starts_with('–');
        rows.push(Row {
            what: job.what.to_owned(),
            figure: format!("{}/s", mebibytes(ours)),
            against: format!("on the pool's disk: {}/s", mebibytes(theirs)),
            ratio: Some(pairs.ratio()),
            target: if explains { "–".to_owned() } else { format!("≥ {TARGET}x") },
            met: (!explains).then(|| pairs.ratio() >= TARGET),
        });
    }
    client.unpublish(&id).await?;
    client.unstage(&id).await?;
    client.delete(&id).await?;
    Ok(rows)
}

/// Runs a job for so many seconds, or once over the file, and returns its bytes per second.
fn fio(job: &Job, file: &Path, report: &Path, seconds: Option<u32>) -> Result<f64> {
    let mut arguments = vec![
        "--name=berth".to_owned(),
        format!("--filename={}", file.display()),
        format!("--size={FILE}"),
        format!("--rw={}", job.pattern),
        format!("--bs={}", job.block),
        format!("--iodepth={}", job.depth),
        "--ioengine=libaio".to_owned(),
        "--direct=1".to_owned(),
        "--output-format=json".to_owned(),
        format!("--output={}", report.display()),
    ];
    if let Some(seconds) = seconds {
        arguments.extend(["--time_based".to_owned(), format!("--runtime={seconds}"), "--ramp_time=1".to_owned()]);
    }
    let deadline = Duration::from_secs(u64::from(seconds.unwrap_or(0)) + 300);
    command::run("fio", &arguments, &[], deadline)?;
    let report: Value = serde_json::from_slice(&std::fs::read(report)?).context("fio's report is no JSON")?;
    let direction = if job.pattern.ends_with("read") { "read" } else { "write" };
    report["jobs"][0][direction]["bw_bytes"].as_f64().context("fio's report names no bandwidth")
}
