//! Local volumes as production has them: directories with project quotas, logical volumes and images on NVMe disks.
//!
//! `BENCH_DISKS` names three blank disks of the same kind, whose contents are lost: the pool's file system on the first, a volume
//! group on the second, and the third as it is, for comparison. `scripts/bench-vm.sh` has them in a virtual machine.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth::host::filesystem::{self, Kind, MountOptions};
use berth::host::{command, files, lvm, mounts, paths, quota};

use crate::Options;
use crate::disk::{self, Job, LAYOUT, Run, fio};
use crate::driver::{Client, Driver, Secrets, Setup, Wanted};
use crate::lab::Lab;
use crate::measure::{Pairs, Row, in_turns, median, time};

const GIB: u64 = 1 << 30;
const GROUP: &str = "berthbench";
const DEADLINE: Duration = Duration::from_secs(300);

/// Three disks, and what was made of them.
pub(crate) struct Disks {
    files: PathBuf,
    spare: PathBuf,
    bare: PathBuf,
    group: lvm::Group,
}

impl Disks {
    /// `None`: this machine has none to spare.
    pub(crate) fn new(lab: &Lab, disks: &[String]) -> Result<Option<Self>> {
        let [first, second, third] = disks else { return Ok(None) };
        let mount = |disk: &str, name: &str| {
            let device = Path::new(disk);
            Kind::Xfs.make(device, &[], DEADLINE)?;
            let place = lab.path(name);
            let (directory, _) = mounts::ensure_vacant(&place, paths::Kind::Directory)?;
            let options = MountOptions { parameters: vec![("prjquota".to_owned(), None)], ..MountOptions::default() };
            filesystem::mount(device, "xfs", &options, &directory)?;
            Ok::<_, anyhow::Error>(place)
        };
        let (files, spare) = (mount(first, "files")?, mount(third, "spare")?);
        let group = lvm::Group::make(GROUP, vec![PathBuf::from(second)], &[], DEADLINE)?;
        Ok(Some(Self { files, spare, bare: PathBuf::from(third), group }))
    }

    async fn driver(&self, lab: &Lab, name: &str) -> Result<Driver> {
        let path = self.files.join(name);
        std::fs::create_dir(&path)?;
        let settings =
            format!("pools:\n  - {{name: files, path: \"{}\"}}\n  - {{name: group, group: {GROUP}}}\n", path.display());
        Driver::launch(lab, name, Setup { settings, backend: "nvme", role: "both", secrets: Secrets::default() }).await
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        let _ = command::run("vgremove", &["-q", "-y", "-f", self.group.name()], DEADLINE);
    }
}

const DIRECTORY: &[(&str, &str)] = &[("carve", "directory")];
const IMAGE: &[(&str, &str)] = &[("carve", "image")];
const LVM: &[(&str, &str)] = &[("carve", "lvm")];

/// Making a directory volume against the system calls that it can't be made without, and deleting a full one against an empty one.
pub(crate) async fn create(lab: &Lab, disks: &Disks, options: &Options) -> Result<Vec<Row>> {
    let driver = disks.driver(lab, "nvme-create").await?;
    let mut client = driver.client().await?;
    let wanted = Wanted { parameters: DIRECTORY, ..Wanted::of_size(GIB) };
    let bare = disks.files.join("bare");
    std::fs::create_dir(&bare)?;
    let count = options.count(100, 10);
    let mut made = Vec::new();
    let mut ours = client.clone();
    let creating = in_turns(
        count,
        |round| least(&bare, round),
        async |round| {
            made.push(ours.create(&format!("made-{round}"), wanted).await?);
            Ok(())
        },
    )
    .await?;
    let figure = median(&creating.subject);
    let mut row = creating.at_most("CreateVolume, directory", "mkdir + project id + quota + fsync", 3.0, 0.0);
    row.target = "≤ 3x, or 5 ms".to_owned();
    row.met = Some(row.met == Some(true) || figure < 0.005);

    let mut deleting = Pairs::default();
    let files = options.count(10_000, 500);
    for round in 0..options.count(5, 2) {
        let [empty, full] = [
            client.create(&format!("empty-{round}"), wanted).await?,
            client.create(&format!("full-{round}"), wanted).await?,
        ];
        client.stage(&full, wanted).await?;
        let folder = client.staging(&full);
        for number in 0..files {
            File::create(folder.join(number.to_string()))?;
        }
        client.unstage(&full).await?;
        for (volume, times) in [(&empty, &mut deleting.baseline), (&full, &mut deleting.subject)] {
            let begun = Instant::now();
            client.delete(volume).await?;
            times.push(begun.elapsed().as_secs_f64());
        }
        settle(disks, "nvme-create")?;
    }
    for volume in made {
        client.delete(&volume).await?;
    }
    settle(disks, "nvme-create")?;
    let what = format!("DeleteVolume, directory with {files} files");
    let publish = publishing(&mut client, &disks.files, options).await?;
    Ok(vec![row, deleting.at_most(what, "an empty one", 1.5, 0.002), publish])
}

/// What a volume that survives a crash takes at the least.
fn least(folder: &Path, round: usize) -> Result<()> {
    let path = folder.join(round.to_string());
    std::fs::DirBuilder::new().mode(0o755).create(&path)?;
    let directory = File::open(&path)?;
    let project = 100_000 + u32::try_from(round)?;
    quota::set_project(&directory, project)?;
    quota::set_limits(&directory, project, GIB, 0)?;
    directory.sync_all()?;
    Ok(files::sync_directory(folder)?)
}

/// Waits until what was deleted is removed, so that it does not disturb what comes next.
fn settle(disks: &Disks, name: &str) -> Result<()> {
    let trash = disks.files.join(name).join("trash");
    let begun = Instant::now();
    while std::fs::read_dir(&trash)?.next().is_some() {
        ensure!(begun.elapsed() < DEADLINE, "what was deleted is not removed");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

async fn publishing(client: &mut Client, files: &Path, options: &Options) -> Result<Row> {
    let wanted = Wanted { parameters: DIRECTORY, ..Wanted::of_size(GIB) };
    let volume = client.create("published", wanted).await?;
    client.stage(&volume, wanted).await?;
    let (staging, bare) = (client.staging(&volume), files.join("bare-target"));
    std::fs::create_dir(&bare)?;
    let system_calls = |_| {
        rustix::mount::mount_bind(&staging, &bare)?;
        Ok(rustix::mount::unmount(&bare, rustix::mount::UnmountFlags::empty())?)
    };
    let mut calls = client.clone();
    let pairs = in_turns(options.count(100, 10), system_calls, async |_| {
        calls.publish(&volume, wanted).await?;
        calls.unpublish(&volume).await
    })
    .await?;
    client.unstage(&volume).await?;
    client.delete(&volume).await?;
    Ok(pairs.compared("– publish + unpublish, directory", "mount(MS_BIND) + umount2"))
}

const JOBS: [Job; 4] = [
    Job { what: "4 KiB random read, depth 16", pattern: "randread", block: "4k", depth: 16 },
    Job { what: "4 KiB random write, depth 16", pattern: "randwrite", block: "4k", depth: 16 },
    Job { what: "1 MiB sequential read, depth 4", pattern: "read", block: "1m", depth: 4 },
    Job { what: "1 MiB sequential write, depth 4", pattern: "write", block: "1m", depth: 4 },
];

/// fio on a volume of each carve against the same thing without Berth: a file on an XFS of its own disk, or the bare disk.
pub(crate) async fn throughput(lab: &Lab, disks: &Disks, options: &Options) -> Result<Vec<Row>> {
    let driver = disks.driver(lab, "nvme-disk").await?;
    let mut client = driver.client().await?;
    let size = if options.quick { GIB / 8 } else { GIB };
    let report = lab.path("fio-nvme.json");
    let mut rows = Vec::new();
    let bare_file = disks.spare.join("file");
    fio(&LAYOUT, &bare_file, size, &report, Run::Once)?;
    for (parameters, name, target, block) in
        [(DIRECTORY, "directory", 0.98, false), (IMAGE, "image", 0.9, false), (LVM, "lvm", 0.98, true)]
    {
        let wanted = Wanted { parameters, block, ..Wanted::of_size(2 * size) };
        let volume = client.create(name, wanted).await?;
        client.stage(&volume, wanted).await?;
        client.publish(&volume, wanted).await?;
        let target_path = client.target(&volume);
        let inside = if block { target_path } else { target_path.join("file") };
        if block {
            // The bare disk is needed as it is.
            rustix::mount::unmount(&disks.spare, rustix::mount::UnmountFlags::empty()).context("cannot unmount")?;
        }
        let bare = if block { &disks.bare } else { &bare_file };
        for file in [bare, &inside] {
            fio(&LAYOUT, file, size, &report, Run::Once)?;
        }
        for job in &JOBS {
            let measure = |file: &Path| fio(job, file, size, &report, Run::For(options.seconds));
            let pairs = disk::in_turns(options.count(5, 1), |_| measure(bare), |_| measure(&inside))?;
            let against = if block { "on the bare disk" } else { "on XFS on a disk" };
            rows.push(disk::row(&format!("{name}: {}", job.what), against, target, &pairs));
        }
        client.unpublish(&volume).await?;
        client.unstage(&volume).await?;
        client.delete(&volume).await?;
    }
    let begun = Instant::now();
    while disks.group.volumes()?.iter().any(|volume| volume.name.contains("vol-")) {
        ensure!(begun.elapsed() < DEADLINE, "the logical volume is not wiped");
        std::thread::sleep(Duration::from_millis(100));
    }
    rows.push(Row::alone("– a logical volume wiped after DeleteVolume", time(begun.elapsed().as_secs_f64()), "–"));
    Ok(rows)
}
