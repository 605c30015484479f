//! Who is measured, and how each of them is mounted: with the options that its own manual recommends for speed.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use procfs::process::Process;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal};

use super::raw::BUCKET;
use super::service::{self, Access, Programs};
use crate::driver::BINARY;

/// What all of them mount: the objects below this prefix.
pub(crate) const PREFIX: &str = "tree/";
/// A mount process has to end within this time after it was unmounted.
const END: Duration = Duration::from_secs(60);

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    /// Berth; close waits for the bucket.
    Strict,
    /// Berth; close waits for the node's disk.
    WriteBack,
    /// Close waits for the bucket.
    S3fs,
    /// Close waits for nothing.
    Rclone,
    /// The bare client, without a mount.
    Raw,
}

impl Who {
    pub(crate) const ALL: [Self; 5] = [Self::Strict, Self::S3fs, Self::WriteBack, Self::Rclone, Self::Raw];

    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Strict | Self::WriteBack)
    }

    /// The program that does it. `None`: this process.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Strict | Self::WriteBack => Some(BINARY),
            Self::S3fs => Some("s3fs"),
            Self::Rclone => Some("rclone"),
            Self::Raw => None,
        }
    }

    /// Why it can't be measured here.
    pub(crate) fn missing(self) -> Option<String> {
        let program = self.program()?;
        let there = self.is_ours() || service::find_program(program).is_some();
        (!there).then(|| format!("no {program}: scripts/setup.sh bench installs it"))
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Strict => "strict",
            Self::WriteBack => "write-back",
            Self::S3fs => "s3fs",
            Self::Rclone => "rclone",
            Self::Raw => "raw",
        })
    }
}

/// Where and how mounts are made.
pub(crate) struct Mounts {
    pub(crate) programs: Programs,
    pub(crate) access: Access,
    /// Caches, logs and mount points lie in it.
    pub(crate) folder: PathBuf,
}

/// A mounted contender. Unmounted and its processes ended when dropped.
pub(crate) struct Mount {
    pub(crate) who: Who,
    pub(crate) path: PathBuf,
    programs: Programs,
    pid: Pid,
    cache: PathBuf,
}

impl Mounts {
    /// Mounts one with nothing in any cache: nothing of it is in the kernel, and its folder is empty.
    pub(crate) fn cold(&self, who: Who) -> Result<Mount> {
        let (path, cache) = (self.folder.join(who.to_string()), self.folder.join(format!("{who}.cache")));
        std::fs::create_dir_all(&path)?;
        service::remove_tree(&cache)?;
        std::fs::create_dir_all(&cache)?;
        let command = self.command(who, &path, &cache)?;
        let log = self.folder.join(format!("{who}.log"));
        let device = |path: &Path| Ok::<_, std::io::Error>(rustix::fs::stat(path)?.st_dev);
        let before = device(&path)?;
        let pid = self.programs.start(command, &log)?;
        let mount = Mount { who, path, programs: self.programs.clone(), pid, cache };
        self.programs.wait_for(pid, &log, || device(&mount.path).is_ok_and(|now| now != before))?;
        // The first look may be what connects it.
        std::fs::read_dir(&mount.path).with_context(|| format!("{who} is mounted and can't be listed"))?;
        Ok(mount)
    }

    fn command(&self, who: Who, path: &Path, cache: &Path) -> Result<Command> {
        let Access { endpoint, access_key, secret_key } = &self.access;
        let Some(name) = who.program() else { bail!("{who} is no mount") };
        let program = service::find_program(name).unwrap_or_else(|| name.into());
        let mut command = service::program(&program, cache);
        match who {
            Who::Strict | Who::WriteBack => {
                command.args(["mount", &format!("s3://{BUCKET}/{PREFIX}")]).arg(path);
                command.args(["--foreground", "--path-style", "--region", "us-east-1", "--endpoint", endpoint]);
                command.args(["--consistency", &who.to_string()]).arg("--cache").arg(cache.join("blocks"));
                command.arg("--staging").arg(cache.join("staging"));
                command.env("AWS_ACCESS_KEY_ID", access_key).env("AWS_SECRET_ACCESS_KEY", secret_key);
            }
            Who::S3fs => {
                let password = cache.with_extension("password");
                service::write_private(&password, &format!("{access_key}:{secret_key}\n"))?;
                command.arg(format!("{BUCKET}:/{}", PREFIX.trim_end_matches('/'))).arg(path).arg("-f");
                let options = [
                    format!("url={endpoint}"),
                    format!("passwd_file={}", password.display()),
                    format!("use_cache={}", cache.display()),
                    "use_path_request_style,sigv4,endpoint=us-east-1".to_owned(),
                    // Its manual: "set this value depending on a CPU and a network bandwidth"; and what it says to be better for speed.
                    "parallel_count=16,multipart_size=8,multireq_max=32,enable_noobj_cache,max_stat_cache_size=200000"
                        .to_owned(),
                ];
                for option in options {
                    command.args(["-o", &option]);
                }
            }
            Who::Rclone => {
                let remote = format!("bench:{BUCKET}/{}", PREFIX.trim_end_matches('/'));
                command
                    .args(["mount", &remote])
                    .arg(path)
                    .arg("--cache-dir")
                    .arg(cache)
                    .args(["--config", "/dev/null"]);
                let settings = [
                    ("TYPE", "s3"),
                    ("PROVIDER", "Minio"),
                    ("ENDPOINT", endpoint),
                    ("REGION", "us-east-1"),
                    ("ACCESS_KEY_ID", access_key),
                    ("SECRET_ACCESS_KEY", secret_key),
                    ("FORCE_PATH_STYLE", "true"),
                ];
                for (name, value) in settings {
                    command.env(format!("RCLONE_CONFIG_BENCH_{name}"), value);
                }
                // Its manual's advice for S3 and for speed; written back at once, not after five seconds.
                command.args(["--vfs-cache-mode", "full", "--vfs-fast-fingerprint", "--vfs-write-back", "0s"]);
                command.args(["--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "4M", "--transfers", "16"]);
                command.args(["--s3-upload-concurrency", "8", "--s3-chunk-size", "16M", "--s3-disable-checksum"]);
                command.args(["--s3-no-check-bucket"]);
            }
            Who::Raw => {}
        }
        Ok(command)
    }
}

/// Bytes of memory: now, and at most until now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) now: u64,
    pub(crate) most: u64,
}

impl Mount {
    /// What the process and those that it has started have in memory.
    pub(crate) fn memory(&self) -> Result<Memory> {
        let mut sum = Memory::default();
        for pid in family(self.pid)? {
            let status = Process::new(pid).and_then(|process| process.status());
            if let Ok(status) = status {
                sum.now += status.vmrss.unwrap_or_default() * 1024;
                sum.most += status.vmhwm.unwrap_or_default() * 1024;
            }
        }
        ensure!(sum.now > 0, "the process of {} has ended", self.who);
        Ok(sum)
    }

    /// Ends it in the middle of whatever it does, so that programs in it get errors and go on.
    pub(crate) fn abort(&self) {
        // For FUSE this ends the connection, whoever holds it.
        let _ = rustix::mount::unmount(&self.path, UnmountFlags::FORCE | UnmountFlags::DETACH);
        for pid in family(self.pid).unwrap_or_default() {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
    }

    /// Unmounts it, waits for its end, and removes what it has cached.
    pub(crate) fn stop(self) -> Result<()> {
        let begun = std::time::Instant::now();
        while let Err(errno) = rustix::mount::unmount(&self.path, UnmountFlags::empty()) {
            let busy = errno == rustix::io::Errno::BUSY && begun.elapsed() < END;
            ensure!(busy, "cannot unmount {}: {errno}", self.path.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        let family = family(self.pid)?;
        ensure!(self.programs.ended(self.pid, END)?, "{} does not end", self.who);
        let left = family.iter().filter(|pid| Process::new(**pid).is_ok_and(|process| process.is_alive())).count();
        ensure!(left == 0, "{} has ended and left {left} processes", self.who);
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.abort();
        let _ = self.programs.ended(self.pid, Duration::ZERO);
        if let Err(error) = service::remove_tree(&self.cache) {
            eprintln!("cannot remove {}: {error}", self.cache.display());
        }
    }
}

/// The process and all that descend from it.
fn family(pid: Pid) -> Result<Vec<i32>> {
    let all = procfs::process::all_processes()?.flatten().filter_map(|process| process.stat().ok());
    let parents: Vec<_> = all.map(|stat| (stat.ppid, stat.pid)).collect();
    let mut found = vec![pid.as_raw_nonzero().get()];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        found.extend(parents.iter().filter(|(its, _)| *its == parent).map(|(_, child)| *child));
    }
    Ok(found)
}
