//! `berth mounter` and `berth worker`: the processes that keep mounts of object storage.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::config::Log;
use crate::config::aws::Aws;
use crate::mounter::objects::Objects;
use crate::mounter::server::{self, Options};
use crate::mounter::start::{self, SOCKET, Start};
use crate::mounter::{Users, worker};
use crate::telemetry;

/// How a mounter works.
#[derive(Debug, Args)]
pub struct MounterArguments {
    /// Where it listens; only this user can connect.
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub socket: PathBuf,
    /// Its own, private folder; by default the socket's.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// A control group (version 2) below which each worker gets one, with a limit on its memory.
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// The user ids that workers get, one for each volume.
    #[arg(long, value_name = "FIRST-LAST", value_parser = Users::parse)]
    pub uids: Option<Users>,
    /// What to log: error, warn, info, debug or trace, or parts such as info,berth=debug.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
    /// Log as JSON, for programs.
    #[arg(long)]
    pub log_json: bool,
    /// Go to the background, and log to mounter.log in the socket's folder.
    #[arg(long)]
    pub detach: bool,
}

/// What a worker is started with.
#[derive(Debug, Args)]
pub struct WorkerArguments {
    /// Shown by `ps`; nothing else.
    #[arg(long)]
    pub name: String,
}

/// Runs a mounter until SIGTERM; its workers go on.
///
/// # Errors
/// When there is another mounter, or its folders can't be made.
pub async fn run(arguments: MounterArguments) -> Result<()> {
    let socket = std::path::absolute(&arguments.socket)?;
    if arguments.detach {
        let given = std::env::args().skip(1).filter(|argument| argument != "--detach");
        return Ok(start::detach(&Start::at(socket), &given.collect::<Vec<_>>())?);
    }
    telemetry::start_logging(&Log { json: arguments.log_json, level: arguments.log_level })?;
    let run_dir = arguments.run_dir.or_else(|| socket.parent().map(PathBuf::from)).unwrap_or_default();
    let is_root = rustix::process::geteuid().is_root();
    server::run(Options {
        socket,
        run_dir: std::path::absolute(run_dir)?,
        cgroup: arguments.cgroup,
        users: is_root.then(|| arguments.uids.unwrap_or_default()),
        environment: Aws::of_this_process().for_workers(),
    })
    .await?;
    Ok(())
}

/// Runs a worker until its file system is unmounted.
///
/// # Errors
/// When no mounter has started it, and what the worker can't do.
pub async fn work() -> Result<()> {
    telemetry::start_logging(&Log { json: false, level: "info".to_owned() })?;
    Ok(worker::run(&Objects).await?)
}
