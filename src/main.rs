//! Parse the arguments, wire the parts, run. The only place that builds concrete back ends.

use std::collections::BTreeMap;
use std::sync::Arc;

use berth::backend::Backend;
use berth::backend::cephfs::Cephfs;
use berth::backend::nvme::Nvme;
use berth::backend::s3::ObjectStorage;
use berth::cli::{self, Arguments, Command, ConfigCommand};
use berth::config::{BackendKind, Config, Driver};
use berth::host::{memory, processes};
use berth::locks::Locks;
use berth::objectfs::store::blocking::Buckets;
use berth::objectfs::store::places::Services;
use berth::rpc::Front;
use berth::telemetry::{self, Metrics};
use clap::Parser;

/// Few: calls do their work on threads of their own, and every stack is memory on every node.
const RUNTIME_THREADS: usize = 2;

fn main() {
    // Everything that is made from here on is private unless it says otherwise.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    memory::keep_little();
    let result = run(Arguments::parse());
    if let Err(error) = &result {
        eprintln!("berth: {error:#}");
    }
    processes::exit(i32::from(result.is_err()))
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(RUNTIME_THREADS).enable_all().build()?;
    match arguments.command {
        Command::Serve { config } => {
            let config = Config::load(&config)?;
            telemetry::start_logging(&config.log)?;
            let metrics = Arc::new(Metrics::default());
            // Dropping the runtime afterwards waits for work whose caller has left.
            runtime.block_on(async {
                let drivers = drivers(&config, &metrics);
                cli::serve::run(&config, drivers, metrics).await
            })
        }
        Command::Config(ConfigCommand::Check { file }) => {
            Config::load(&file)?;
            println!("{} is right", file.display());
            Ok(())
        }
        Command::Doctor(arguments) => cli::doctor::run(arguments, runtime.handle()),
        Command::Pool(arguments) => cli::pool::run(arguments),
        Command::Volume(arguments) => runtime.block_on(cli::volume::run(arguments)),
        Command::Mount(arguments) => runtime.block_on(cli::mount::run(arguments)),
        Command::Mounter(arguments) => runtime.block_on(cli::mounter::run(arguments)),
        Command::Worker(_) => runtime.block_on(cli::mounter::work()),
        Command::Quickstart(arguments) => runtime.block_on(cli::quickstart::run(arguments)),
    }
}

/// Sockets of one driver name share all; drivers over one back end share that, and its locks.
fn drivers(config: &Config, metrics: &Arc<Metrics>) -> Vec<(Driver, Front)> {
    let mut backends = BTreeMap::new();
    let mut fronts: BTreeMap<&str, Front> = BTreeMap::new();
    for driver in &config.drivers {
        let shared = backends
            .entry(driver.backend)
            .or_insert_with(|| (backend(driver.backend, config, metrics), Locks::default()))
            .clone();
        fronts.entry(&driver.name).or_insert_with(|| {
            Front::new(&driver.name, config.node.clone(), shared, config.deadlines, metrics.clone())
        });
    }
    config.drivers.iter().map(|driver| (driver.clone(), fronts[driver.name.as_str()].clone())).collect()
}

fn backend(kind: BackendKind, config: &Config, metrics: &Arc<Metrics>) -> Backend {
    match kind {
        BackendKind::Nvme => {
            let nvme =
                Nvme::new(&config.node, &config.labels, &config.pools, config.deadlines.command, &config.cgroups);
            let (starting, metrics) = (nvme.clone(), metrics.clone());
            tokio::task::spawn_blocking(move || {
                starting.start();
                starting.watch(metrics);
            });
            nvme.backend()
        }
        BackendKind::Cephfs => Cephfs::new(config, metrics.clone()).backend(),
        BackendKind::S3 => {
            let (runtime, services) = (tokio::runtime::Handle::current(), Arc::new(Services::default()));
            ObjectStorage::new(config, Buckets::new(runtime, services, config.deadlines.s3)).backend()
        }
    }
}
