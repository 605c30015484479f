//! `berth quickstart`: everything at work on this machine, without Kubernetes, and nothing of it left afterwards.
//!
//! It owns one work folder and the driver that it starts. What the clean-up takes away it learns from that driver, not
//! from a list of its own, so it also ends what was killed half way.

mod data;
mod driver;
mod objects;
mod report;
mod steps;
mod work;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::client::{Client, ControllerCan};
use super::kubelet::Kubelet;
use crate::mounter::start;
use crate::volume::{format_bytes, parse_bytes};
use driver::Driver;
use report::Report;
use work::{State, Work};

/// The data has to fit, with room for the file system.
const MINIMUM: u64 = 2 * data::SIZE;
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// So much of the driver's log is shown after a failure.
const LAST_LINES: usize = 15;

/// What to show, and where.
#[derive(Debug, Args)]
pub struct QuickstartArguments {
    /// Mount the volume here; a fresh temporary directory by default.
    #[arg(long, value_name = "PATH", conflicts_with = "end")]
    pub path: Option<PathBuf>,
    /// Keep the volumes in a fresh folder in this one; by default in TMPDIR or /var/tmp.
    #[arg(long, value_name = "DIR", conflicts_with = "end")]
    pub pool: Option<PathBuf>,
    /// The volume's size; it is doubled on the way.
    #[arg(long, default_value = "1Gi", value_parser = parse_bytes)]
    pub size: u64,
    /// Leave the volume mounted and the driver running.
    #[arg(long, conflicts_with = "end")]
    pub keep: bool,
    /// End what `--keep` left, or what was killed half way: the folder that it printed.
    #[arg(long, value_name = "DIR")]
    pub end: Option<PathBuf>,
    /// Where object storage is.
    #[command(flatten)]
    pub objects: objects::ObjectArguments,
}

/// Shows everything, prints a table of it, and takes it all away again.
///
/// # Errors
/// Without root, before anything is touched; when a step fails or is interrupted, after the clean-up.
pub async fn run(arguments: QuickstartArguments) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("cannot mount volumes: quickstart needs root, so run it with sudo; nothing has been touched");
    }
    if let Some(folder) = &arguments.end {
        let work = Work::open(folder)?;
        let _server = objects::revive(&work.state()?, &work).await.map_err(|error| still_there(&work, &error))?;
        clean(&work).await.map_err(|error| still_there(&work, &error))?;
        super::say(&format!("{} and all that belonged to it are gone", work.folder().display()));
        return Ok(());
    }
    if arguments.size < MINIMUM {
        bail!("cannot use a volume of {}: at least {} are needed", format_bytes(arguments.size), format_bytes(MINIMUM));
    }
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let (mut state, work) = State::plan(program, arguments.path.as_deref(), arguments.pool.as_deref(), arguments.size)?;
    let mut report = Report::new(stop_on_signals(&work)?);
    let _ = writeln!(std::io::stderr(), "berth: working in {}", work.folder().display());
    let mut result = work.make(&state, arguments.size);
    // Alive until the clean-up is over.
    let mut server = None;
    if result.is_ok() {
        let prepared = objects::prepare(&arguments.objects, arguments.keep, &mut report, &mut state, &work).await;
        result = prepared.map(|prepared| server = prepared);
    }
    if result.is_ok() {
        result = steps::run(&mut report, &mut state, &work, arguments.size).await;
    }
    if result.is_ok() {
        result = objects::run(&mut report, &state, &work, arguments.size).await;
    }
    if result.is_ok() && arguments.keep {
        report.print();
        super::say(&how_to_look_around(&state, &work));
        return Ok(());
    }
    let last_words = work.last_words(LAST_LINES);
    let cleaned = clean(&work).await.map_err(|error| still_there(&work, &error));
    drop(server);
    report.print();
    if let Err(error) = result {
        if let Err(error) = &cleaned {
            let _ = writeln!(std::io::stderr(), "berth: {error:#}");
        }
        let interrupted = report.stop.load(Ordering::Relaxed);
        if !interrupted && !last_words.is_empty() {
            let _ = write!(std::io::stderr(), "the driver's last words:\n{last_words}");
        }
        return Err(error);
    }
    cleaned
}

fn still_there(work: &Work, error: &anyhow::Error) -> anyhow::Error {
    let folder = work.folder().display();
    anyhow!("cannot clean up {folder}: {error:#}\ntry again with `berth quickstart --end {folder}`")
}

fn how_to_look_around(state: &State, work: &Work) -> String {
    let program = state.program.display();
    let pid = state.pid.unwrap_or_default();
    let (socket, path) = (work.socket(), &state.path);
    [
        format!("\nThe volume stays mounted, and the driver runs as process {pid}."),
        format!("  its volumes        {program} volume list --socket {}", socket.display()),
        format!("  its free space     df -h '{}'", path.display()),
        format!("  its configuration  {}", work.config().display()),
        format!("  its log            {}", work.log().display()),
        format!("End it with:\n  {program} quickstart --end {}", work.folder().display()),
    ]
    .join("\n")
}

/// The first signal ends the steps, and the clean-up begins; a second one ends that too.
fn stop_on_signals(work: &Work) -> Result<Arc<AtomicBool>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let stop = Arc::new(AtomicBool::new(false));
    let left = format!("ending at once: `berth quickstart --end {}` takes the rest away", work.folder().display());
    let stopped = stop.clone();
    tokio::spawn(async move {
        for words in ["interrupted: cleaning up".to_owned(), left] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            let _ = writeln!(std::io::stderr(), "berth: {words}");
            if stopped.swap(true, Ordering::Relaxed) {
                std::process::exit(1);
            }
        }
    });
    Ok(stop)
}

/// Takes away everything that the work folder's driver has, then the driver, then the folder.
async fn clean(work: &Work) -> Result<()> {
    if !work.folder().exists() {
        return Ok(());
    }
    let mut state = work.state()?;
    let driver = match Driver::find(&state, work) {
        Some(driver) => Some(driver),
        // One that never came up has made nothing.
        None if is_empty(&work.pool()) && is_empty(&work.bucket_store()) => None,
        None => Some(Driver::start(&mut state, work)?),
    };
    if let Some(driver) = driver {
        driver.ready(work).await?;
        delete_all(work, &work.socket()).await?;
        if state.service.is_some() {
            delete_all(work, &work.object_socket()).await?;
        }
        driver.stop().await?;
    }
    let mounter = work.mounter_socket();
    tokio::task::spawn_blocking(move || start::stop(&mounter, STOP_LIMIT)).await??;
    work.remove(&state)
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

async fn delete_all(work: &Work, socket: &Path) -> Result<()> {
    let client = Client::connect(socket, Some(socket)).await?;
    let staging = work.staging();
    let kubelet = Kubelet { client: &client, staging: &staging, secrets: Default::default() };
    for volume in client.volumes().await? {
        let id = volume.volume_id;
        for place in kubelet.published(&id)? {
            kubelet.unmount(&id, &place).await?;
        }
        kubelet.unstage(&id).await?;
        client.delete(&id).await?;
    }
    if client.controller_can(ControllerCan::ListSnapshots) {
        for snapshot in client.snapshots(None).await? {
            client.delete_snapshot(&snapshot.snapshot_id).await?;
        }
    }
    Ok(())
}
