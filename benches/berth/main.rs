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
mod local;
mod measure;
mod memory;
mod objects;
mod subvolumes;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{ContentArrangement, Table};
use tokio::signal::unix::{SignalKind, signal};

use ceph::{Ceph, Cluster};
use lab::Lab;
use measure::Row;
use objects::Titled;

/// What the environment asks for.
#[derive(Clone, Debug)]
struct Options {
    /// `BENCH_QUICK=1`: small counts, to try the benchmark itself out.
    quick: bool,
    /// `BENCH_SECONDS`: how long each fio job runs.
    seconds: u32,
    /// `BENCH_ONLY=create,publish`: these rows. Empty: all.
    only: Vec<String>,
    /// `BENCH_SIZE`: MiB of the large object.
    object_size: u64,
    /// `BENCH_ROUNDS`: how often each contender of object storage takes its turn.
    rounds: usize,
    /// `BENCH_LANES=A,B`: these ways to the object storage. Empty: both.
    lanes: Vec<String>,
    /// `BENCH_CONTENDERS=strict,write-back,s3fs,rclone,raw`: only these. Empty: all.
    contenders: Vec<String>,
}

/// A variable of the environment, if it is there and says something.
fn variable(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "these are settings of the benchmark, not of Berth")]
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// What is between the commas of a variable.
fn listed(name: &str) -> Vec<String> {
    let value = variable(name).unwrap_or_default();
    value.split(',').map(str::trim).filter(|part| !part.is_empty()).map(Into::into).collect()
}

impl Options {
    fn from_environment() -> Result<Self> {
        let quick = variable("BENCH_QUICK").is_some_and(|value| value != "0");
        let number = |name, usual: u32, few: u32| -> Result<u32> {
            let usual = if quick { few } else { usual };
            variable(name).map_or(Ok(usual), |value| value.parse().with_context(|| format!("{name}={value}")))
        };
        let options = Self {
            quick,
            seconds: number("BENCH_SECONDS", 5, 1)?,
            only: listed("BENCH_ONLY"),
            object_size: u64::from(number("BENCH_SIZE", 1024, 32)?) << 20,
            rounds: usize::try_from(number("BENCH_ROUNDS", 3, 1)?)?,
            lanes: listed("BENCH_LANES"),
            contenders: listed("BENCH_CONTENDERS"),
        };
        match options.only.iter().find(|only| !all_rows().any(|row| belongs(row, only))) {
            None => Ok(options),
            Some(row) => bail!("BENCH_ONLY names {row:?}; there are: {}", all_rows().collect::<Vec<_>>().join(", ")),
        }
    }

    /// Is this row to be measured?
    fn wants(&self, row: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| belongs(row, only))
    }

    /// Is this way to the object storage to be measured?
    fn wants_lane(&self, lane: &str) -> bool {
        self.lanes.is_empty() || self.lanes.iter().any(|only| only == lane)
    }

    /// Is this client of object storage to be measured?
    fn wants_contender(&self, name: &str) -> bool {
        self.contenders.is_empty() || self.contenders.iter().any(|only| only == name)
    }

    /// `usual`, or `few` when trying out.
    fn count(&self, usual: usize, few: usize) -> usize {
        if self.quick { few } else { usual }
    }
}

const ROWS: [&str; 14] = [
    "create",
    "publish",
    "mounts",
    "list",
    "probe",
    "memory",
    "disk",
    "nvme-create",
    "nvme-disk",
    "ceph-create",
    "ceph-parallel",
    "ceph-memory",
    "ceph-stage",
    "ceph-disk",
];

fn all_rows() -> impl Iterator<Item = &'static str> {
    ROWS.into_iter().chain(objects::ROWS)
}

/// Is it this row, or one of this group, such as `objects`?
fn belongs(row: &str, only: &str) -> bool {
    row.strip_prefix(only).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

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
    let (rows, objects) = runtime.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::select! {
            measured = measure_all(&mut lab, &mut ceph, &options) => measured,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    })?;
    if !rows.is_empty() {
        println!("{}", table(&rows));
    }
    for (title, table) in objects {
        println!("\n{title}\n\n{table}");
    }
    Ok(())
}

async fn measure_all(lab: &mut Lab, ceph: &mut Ceph, options: &Options) -> Result<(Vec<Row>, Vec<Titled>)> {
    let (mut rows, mut disks) = (Vec::new(), None);
    for name in ROWS.into_iter().filter(|row| options.wants(row)) {
        eprintln!("measuring: {name}");
        let measured = match name {
            "create" => calls::create(lab, options).await,
            "publish" => calls::publish(lab, options).await,
            "mounts" => calls::mounts(lab, options).await,
            "list" => lists::list(lab, options).await,
            "probe" => calls::probe(lab, options).await,
            "memory" => memory::memory(lab, options).await,
            "disk" => disk::disk(lab, options).await,
            "nvme-create" | "nvme-disk" => {
                if disks.is_none() {
                    disks = local::Disks::new(lab, &listed("BENCH_DISKS"))?;
                }
                match &disks {
                    Some(disks) if name == "nvme-create" => local::create(lab, disks, options).await,
                    Some(disks) => local::throughput(lab, disks, options).await,
                    None => {
                        println!("SKIPPED {name}: BENCH_DISKS names no three disks; scripts/bench-vm.sh has some");
                        continue;
                    }
                }
            }
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
    let wanted: Vec<_> = objects::ROWS.into_iter().filter(|row| options.wants(row)).collect();
    let tables = if wanted.is_empty() { Vec::new() } else { objects::objects(lab.folder(), options, wanted).await? };
    Ok((rows, tables))
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
    let mut table = new_table();
    table.set_header(["what", "figure", "compared with", "ratio", "target", "met"]);
    for row in rows {
        let ratio = row.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"));
        table.add_row([&row.what, &row.figure, &row.against, &ratio, &row.target, met(row.met)]);
    }
    table
}

fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// Is a target met? `None`: there is none.
fn met(met: Option<bool>) -> &'static str {
    match met {
        Some(true) => "yes",
        Some(false) => "**no**",
        None => "–",
    }
}
