//! What Berth costs, measured against the bare system calls and disks below it. `docs/benchmarks.md` says what each
//! row means.
//!
//! The release binary runs as a process of its own on a pool of its own (XFS on a loop device), in a mount namespace
//! that ends with this process, and is called over its Unix socket. Rows that begin with `ceph-` have a Ceph cluster of
//! their own. A target that is missed is printed and fails nothing: only what breaks does.

mod calls;
mod ceph;
mod cephfs;
mod disk;
mod driver;
mod lab;
mod lists;
mod measure;
mod memory;
mod subvolumes;

use std::process::ExitCode;

use anyhow::{Result, bail};
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{ContentArrangement, Table};
use tokio::signal::unix::{SignalKind, signal};

use ceph::{Ceph, Cluster};
use lab::Lab;
use measure::Row;

/// What the environment asks for.
#[derive(Clone, Debug)]
struct Options {
    /// `BENCH_QUICK=1`: small counts, to try the benchmark itself out.
    quick: bool,
    /// `BENCH_SECONDS`: how long each fio job runs.
    seconds: u32,
    /// `BENCH_ONLY=create,publish`: these rows. Empty: all.
    only: Vec<String>,
}

impl Options {
    fn from_environment() -> Result<Self> {
        #[expect(clippy::disallowed_methods, reason = "these are settings of the benchmark, not of Berth")]
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let quick = variable("BENCH_QUICK").is_some_and(|value| value != "0");
        let seconds = variable("BENCH_SECONDS").map(|value| value.parse()).transpose()?;
        let only = variable("BENCH_ONLY").unwrap_or_default();
        let only: Vec<String> = only.split(',').map(str::trim).filter(|row| !row.is_empty()).map(Into::into).collect();
        match only.iter().find(|row| !ROWS.contains(&row.as_str())) {
            None => Ok(Self { quick, seconds: seconds.unwrap_or(if quick { 1 } else { 5 }), only }),
            Some(row) => bail!("BENCH_ONLY names {row:?}; there are: {}", ROWS.join(", ")),
        }
    }

    /// `usual`, or `few` when trying out.
    fn count(&self, usual: usize, few: usize) -> usize {
        if self.quick { few } else { usual }
    }
}

const ROWS: [&str; 12] = [
    "create",
    "publish",
    "mounts",
    "list",
    "probe",
    "memory",
    "disk",
    "ceph-create",
    "ceph-parallel",
    "ceph-memory",
    "ceph-stage",
    "ceph-disk",
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark broke: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let options = Options::from_environment()?;
    // Before there is a second thread: a thread keeps the namespace that it was started in.
    lab::leave_mount_namespace()?;
    // One thread serves the client, so that the driver has a processor for itself where there are two.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut lab = Lab::new()?;
    // Dropped before the lab, in which its mounts are.
    let mut ceph = Ceph::default();
    let rows = runtime.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::select! {
            rows = measure_all(&mut lab, &mut ceph, &options) => rows,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    })?;
    println!("{}", table(&rows));
    Ok(())
}

async fn measure_all(lab: &mut Lab, ceph: &mut Ceph, options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for name in ROWS {
        if !options.only.is_empty() && !options.only.iter().any(|only| only == name) {
            continue;
        }
        eprintln!("measuring: {name}");
        let measured = match name {
            "create" => calls::create(lab, options).await,
            "publish" => calls::publish(lab, options).await,
            "mounts" => calls::mounts(lab, options).await,
            "list" => lists::list(lab, options).await,
            "probe" => calls::probe(lab, options).await,
            "memory" => memory::memory(lab, options).await,
            "disk" => disk::disk(lab, options).await,
            name => match ceph.cluster(lab)? {
                Ok(cluster) => on_ceph(name, lab, cluster, options).await,
                Err(why) => {
                    println!("SKIPPED {name}: {why}");
                    continue;
                }
            },
        }?;
        eprintln!("{}", table(&measured));
        rows.extend(measured);
    }
    Ok(rows)
}

/// The rows that need a Ceph cluster.
async fn on_ceph(name: &str, lab: &Lab, cluster: &Cluster, options: &Options) -> Result<Vec<Row>> {
    // Whatever the row before left to do.
    cluster.settle();
    match name {
        "ceph-create" => subvolumes::create(lab, cluster, options).await,
        "ceph-parallel" => subvolumes::parallel(lab, cluster, options).await,
        "ceph-memory" => cephfs::memory(lab, cluster, options).await,
        "ceph-stage" => cephfs::stage(lab, cluster, options).await,
        _ => cephfs::disk(lab, cluster, options).await,
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["what", "figure", "compared with", "ratio", "target", "met"]);
    for row in rows {
        let ratio = row.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"));
        let met = match row.met {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "–",
        };
        table.add_row([&row.what, &row.figure, &row.against, &ratio, &row.target, met]);
    }
    table
}
