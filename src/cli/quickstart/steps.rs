//! What a quickstart shows, step by step: every claim is measured, and every step is a real CSI call.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};

use super::data::{self, Pass};
use super::driver::Driver;
use super::report::Report;
use super::work::{State, Work, beside};
use crate::cli::client::{Access, Client, ControllerCan, Origin, Wish};
use crate::cli::kubelet::Kubelet;
use crate::host::files;
use crate::volume::format_bytes;

/// The file that is written to the volume.
pub(super) const FILE: &str = "random.bin";
const WHOLE: Access = Access::Mount { filesystem: String::new(), options: Vec::new() };

/// Starts the driver and shows what it can. What is left afterwards the clean-up finds by itself.
pub(super) async fn run(report: &mut Report, state: &mut State, work: &Work, size: u64) -> Result<()> {
    let path = state.path.clone();
    let client = report
        .step("start the driver", async {
            Driver::start(state, work)?.ready(work).await?;
            let client = Client::connect(&work.socket(), Some(&work.socket())).await?;
            let name = client.driver.clone();
            Ok((client, name))
        })
        .await?;
    let staging = work.staging();
    let kubelet = Kubelet { client: &client, staging: &staging, secrets: Default::default() };
    let stop = report.stop.clone();

    let id = report.step("create a volume", create(&client, "quickstart", size, Origin::Empty)).await?;
    report.step("mount it", mount(&kubelet, &id, &path)).await?;
    let written = report.step("write 256Mi of random data", write(&path, &stop)).await?;
    report.step("read it back from the disk", read(&path, &stop, &written)).await?;
    report.step("grow it while mounted", grow(&kubelet, &id, &path, size.saturating_mul(2))).await?;

    let (take, restore) = ("take a snapshot", "restore it to a new volume");
    if !client.controller_can(ControllerCan::CreateDeleteSnapshot) {
        report.skip(take, "the pool's file system has no reflink: XFS and btrfs have");
        report.skip(restore, "there is no snapshot");
        return Ok(());
    }
    let snapshot = report
        .step(take, async {
            let snapshot = client.snapshot(&id, "quickstart").await?.snapshot_id;
            Ok((snapshot.clone(), snapshot))
        })
        .await?;
    report
        .step(restore, async {
            let beside = beside(&path, "restored");
            let (id, _) =
                create(&client, "quickstart-restored", size.saturating_mul(2), Origin::Snapshot(snapshot)).await?;
            mount(&kubelet, &id, &beside).await?;
            let ((), read) = read(&beside, &stop, &written).await?;
            Ok(((), format!("at {}, {read}", beside.display())))
        })
        .await
}

pub(super) async fn create(client: &Client, name: &str, size: u64, origin: Origin) -> Result<(String, String)> {
    let parameters = [].into();
    let wish = Wish { name: name.to_owned(), size: Some(size), access: WHOLE, parameters, origin };
    let volume = client.create(&wish).await?;
    let size = u64::try_from(volume.capacity_bytes).unwrap_or_default();
    let result = format!("{} {}", format_bytes(size), volume.volume_id);
    Ok((volume.volume_id, result))
}

pub(super) async fn mount(kubelet: &Kubelet<'_>, id: &str, path: &Path) -> Result<((), String)> {
    let path = kubelet.mount(id, path, &WHOLE, false).await?;
    Ok(((), format!("at {}", path.display())))
}

pub(super) async fn write(path: &Path, stop: &Arc<AtomicBool>) -> Result<(String, String)> {
    let seed = u64::from(std::process::id());
    let pass = through(path, stop, move |file, stop| data::write(file, seed, stop)).await?;
    let result = format!("{}, with fsync", pass.speed);
    Ok((pass.checksum, result))
}

pub(super) async fn read(path: &Path, stop: &Arc<AtomicBool>, written: &str) -> Result<((), String)> {
    let pass = through(path, stop, data::read).await?;
    if pass.checksum != written {
        bail!("{} is not what was written: SHA-256 is {}, and {written} is right", path.display(), pass.checksum);
    }
    Ok(((), format!("{}, SHA-256 is right", pass.speed)))
}

/// Goes once through the volume's file, on a thread that may wait for the disk.
async fn through(
    path: &Path,
    stop: &Arc<AtomicBool>,
    pass: impl FnOnce(&Path, &AtomicBool) -> Result<Pass> + Send + 'static,
) -> Result<Pass> {
    let (file, stop): (PathBuf, _) = (path.join(FILE), stop.clone());
    tokio::task::spawn_blocking(move || pass(&file, &stop)).await.context("cannot go on")?
}

async fn grow(kubelet: &Kubelet<'_>, id: &str, path: &Path, size: u64) -> Result<((), String)> {
    let before = files::space(path)?.total;
    kubelet.grow(id, path, size).await?;
    let after = files::space(path)?.total;
    if after <= before {
        bail!("{} has {} as before", path.display(), format_bytes(after));
    }
    Ok(((), format!("df says {}, was {}", format_bytes(after), format_bytes(before))))
}
