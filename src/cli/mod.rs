//! The commands that a person types.

mod client;
pub mod doctor;
mod kubelet;
pub mod mount;
pub mod mounter;
mod orphans;
pub mod pool;
mod progress;
pub mod quickstart;
pub mod serve;
mod table;
pub mod volume;

use std::io::Write;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Storage for ML platforms on Kubernetes: a Container Storage Interface driver.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the drivers of a configuration file until SIGTERM.
    Serve {
        /// The YAML file; docs/configuration.md describes it.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Look at a configuration file.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Look at the pools, clusters, users and S3 services of a configuration file; exit 1 if anything is wrong.
    Doctor(doctor::DoctorArguments),
    /// Look at this machine's disks and pools, and make pools of blank disks. Needs root.
    Pool(pool::PoolArguments),
    /// Make, mount, grow and delete volumes by hand, over a driver's socket.
    Volume(volume::VolumeArguments),
    /// Mount a bucket, without Kubernetes. Needs root.
    Mount(mount::MountArguments),
    /// Keep mounts of object storage while drivers come and go, with a worker for each.
    Mounter(mounter::MounterArguments),
    /// Serve one mount; started by a mounter.
    #[command(hide = true)]
    Worker(mounter::WorkerArguments),
    /// See all of it work on this machine, without Kubernetes, and take it away again. Needs root.
    Quickstart(quickstart::QuickstartArguments),
}

/// What to do with a configuration file.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say every mistake in it, with what would be right; exit 1 if there is one.
    Check {
        /// The YAML file.
        file: PathBuf,
    },
}

/// Prints lines, unless there are none or nobody listens any more (`berth volume list | head -1`).
fn say(text: &str) {
    if !text.is_empty() {
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}
