//! A pool on a real file system, the real binary on real sockets, and clean-up that always runs.
#![allow(dead_code, unreachable_pub, unused_imports, unused_macros, reason = "each test file uses a part of it")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

pub mod ceph;
mod client;
pub mod crash;
pub mod disks;
pub mod faulty;
pub mod files;
pub mod local;
pub mod mount;
pub mod raw;
pub mod toxiproxy;
pub mod tracer;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub use client::{Client, Mounted, Use, from_snapshot, from_volume};
use tonic::{Code, Status};

pub const MI: i64 = 1 << 20;
pub const GI: i64 = 1 << 30;

/// Ends the test, with a line that `make test` repeats at its end, when the machine lacks what it needs.
#[macro_export]
macro_rules! skip_unless {
    ($condition:expr, $why:expr) => {
        if !$condition {
            println!("SKIPPED {}: {}", module_path!(), $why);
            return;
        }
    };
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// ext4 grows while mounted only with this.
pub fn has_sys_resource() -> bool {
    let sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.contains(rustix::thread::CapabilitySet::SYS_RESOURCE)
}

/// A pool on a file system of its own, and a driver on it.
pub struct Lab {
    dir: tempfile::TempDir,
    pub config: Config,
    driver: Option<Child>,
    /// Prepended to the driver's command line.
    pub wrapper: Vec<String>,
    pub environment: Vec<(String, String)>,
}

/// What goes into the configuration file.
#[derive(Clone)]
pub struct Config {
    /// Labels of the node: `rack: r1`.
    pub labels: String,
    pub pool: String,
    /// `clusters:` and what lies below it; the driver is cephfs then.
    pub clusters: Option<String>,
    /// `services:` and what lies below it; the driver is s3 then.
    pub services: Option<String>,
    pub extra: String,
    pub kubelet: bool,
}

impl Lab {
    /// A pool on a fresh file system of this size, and a running driver.
    pub async fn on(filesystem: &str, size: i64) -> (Self, Client) {
        let mut lab = Self::without_driver(filesystem, size);
        let client = lab.start().await;
        (lab, client)
    }

    pub fn without_driver(filesystem: &str, size: i64) -> Self {
        let lab = Self::bare();
        lab.make_pool("pool", filesystem, size);
        lab
    }

    /// No pool is mounted.
    pub fn bare() -> Self {
        // Short: a socket's path has at most 107 bytes.
        let dir = tempfile::Builder::new().prefix("berth-").tempdir().unwrap();
        let path = dir.path().display();
        let config = Config {
            labels: String::new(),
            pool: format!("{{name: main, path: {path}/pool}}"),
            clusters: None,
            services: None,
            extra: String::new(),
            kubelet: false,
        };
        Self { dir, config, driver: None, wrapper: Vec::new(), environment: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn pool(&self) -> PathBuf {
        self.path("pool")
    }

    pub fn make_pool(&self, name: &str, filesystem: &str, size: i64) {
        let image = self.path(&format!("{name}.img"));
        File::create(&image).unwrap().set_len(size.cast_unsigned()).unwrap();
        run(&format!("mkfs.{filesystem}"), &["-q", image.to_str().unwrap()]);
        self.mount_pool(name);
    }

    /// A pool on a whole disk with project quotas. What was on the disk is lost.
    pub fn make_pool_on(&self, name: &str, disk: &Path) {
        run("mkfs.xfs", &["-q", "-f", disk.to_str().unwrap()]);
        // By this name a pool's mount is told from a volume's.
        std::os::unix::fs::symlink(disk, self.path(&format!("{name}.img"))).unwrap();
        std::fs::create_dir_all(self.path(name)).unwrap();
        run("mount", &["-o", "prjquota,noatime", disk.to_str().unwrap(), self.path(name).to_str().unwrap()]);
    }

    pub fn mount_pool(&self, name: &str) {
        std::fs::create_dir_all(self.path(name)).unwrap();
        let image = self.path(&format!("{name}.img"));
        run("mount", &["-o", "loop", image.to_str().unwrap(), self.path(name).to_str().unwrap()]);
    }

    /// Starts the driver and waits until it answers.
    pub async fn start(&mut self) -> Client {
        self.spawn();
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(client) = Client::connect(&self.path("run/csi.sock")).await {
                return client;
            }
            let ended = self.driver.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < end, "the driver did not start: {ended:?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn write_config(&self) -> PathBuf {
        let Config { labels, pool, clusters, services, extra, kubelet } = &self.config;
        let dir = self.dir.path().display();
        let kubelet = if *kubelet { format!(", kubelet: {{registry: {dir}/registry}}") } else { String::new() };
        let (backend, storage) = match (clusters, services) {
            (Some(clusters), _) => ("cephfs", clusters.clone()),
            (None, Some(services)) => ("s3", services.clone()),
            (None, None) => ("nvme", format!("pools:\n  - {pool}")),
        };
        let text = format!(
            "node: {{name: node-a, labels: {{{labels}}}}}\nlog: {{level: trace}}\n{extra}\n{storage}\ndrivers:\n  - {{backend: {backend}, socket: {dir}/run/csi.sock{kubelet}}}\n"
        );
        let path = self.path("config.yaml");
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn spawn(&mut self) {
        let config = self.write_config();
        let mut words = self.wrapper.clone();
        words.extend([env!("CARGO_BIN_EXE_berth").to_owned(), "serve".to_owned(), "--config".to_owned()]);
        let log = File::options().append(true).create(true).open(self.path("log")).unwrap();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.envs(self.environment.iter().cloned());
        self.driver = Some(command.spawn().unwrap());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// What the driver finds out beside serving is said sooner or later.
    pub fn assert_says(&self, text: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        while !self.log().contains(text) {
            assert!(Instant::now() < end, "not said: {text}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn pid(&self) -> u32 {
        self.driver.as_ref().unwrap().id()
    }

    /// SIGKILL: no chance to tidy up.
    pub fn kill(&mut self) {
        if let Some(mut driver) = self.driver.take() {
            let _ = driver.kill();
            let _ = driver.wait();
        }
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.driver.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.driver.as_mut().unwrap().wait().unwrap()
    }

    /// Has the driver ended by itself?
    pub fn has_ended(&mut self) -> bool {
        self.driver.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    pub async fn restart(&mut self) -> Client {
        self.kill();
        self.start().await
    }

    /// A fresh directory for kubelet's files.
    pub fn staging(&self, name: &str) -> String {
        let path = self.path(&format!("staging-{name}"));
        std::fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A target whose parent exists.
    pub fn target(&self, name: &str) -> String {
        self.path(&format!("target-{name}")).to_str().unwrap().to_owned()
    }

    pub fn entries(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.pool().join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Mounts below the test's directory, other than its pools.
    pub fn mounts(&self) -> Vec<String> {
        let mut mounts = mounts_below(self.dir.path());
        mounts.retain(|mount| !self.dir.path().join(format!("{}.img", base(mount))).exists());
        mounts
    }

    /// Loop devices whose image lies in the pool.
    pub fn loops(&self) -> Vec<String> {
        loops_below(&self.pool())
    }

    /// No volume is anywhere, as mount or device.
    pub fn assert_no_places(&self) {
        assert_eq!(self.mounts(), Vec::<String>::new());
        assert_eq!(self.loops(), Vec::<String>::new());
    }

    /// Nothing of the volumes is left: no mount, no loop device, no folder.
    pub fn assert_clean(&self) {
        self.assert_no_places();
        // What was a directory is removed in the background.
        let end = Instant::now() + Duration::from_secs(60);
        while !self.entries("trash").is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        for folder in ["volumes", "snapshots", "tmp", "trash"] {
            assert_eq!(self.entries(folder), Vec::<String>::new(), "{folder}");
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("the driver's last words:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
        self.kill();
        for _ in 0..3 {
            for mount in mounts_below(self.dir.path()).iter().rev() {
                let _ = Command::new("umount").arg(mount).stderr(Stdio::null()).status();
            }
        }
        // One that waits for a metadata server that does not answer would wait for long.
        for pid in ceph::fuses_below(self.dir.path()).into_iter().filter_map(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        for device in loops_below(self.dir.path()) {
            for view in loops_below(Path::new(&device)) {
                let _ = Command::new("losetup").args(["-d", &view]).status();
            }
            let _ = Command::new("losetup").args(["-d", &device]).status();
        }
        for mount in mounts_below(self.dir.path()).iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
    }
}

fn base(path: &str) -> &str {
    Path::new(path).file_name().unwrap().to_str().unwrap()
}

pub fn mounts_below(dir: &Path) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let places = table.lines().filter_map(|line| line.split(' ').nth(4));
    places.filter(|place| Path::new(place).starts_with(dir)).map(str::to_owned).collect()
}

pub fn loops_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block").unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Ok(backing) = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"))
            && Path::new(backing.trim_end()).starts_with(dir)
        {
            found.push(format!("/dev/{name}"));
        }
    }
    found
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Unmounts, as soon as nobody looks at what is there: a driver does so now and then.
pub fn unmount(arguments: &[&str]) {
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        if Command::new("umount").args(arguments).stderr(Stdio::null()).status().unwrap().success() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    run("umount", arguments);
}

/// Runs `berth` to its end and asserts its exit code; standard output and standard error.
#[track_caller]
pub fn berth(arguments: &[&str], code: i32) -> (String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_berth")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "berth {arguments:?}\n{out}\n{err}");
    (out, err)
}

/// The code and message of a call that must fail.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> String {
    match result {
        Ok(reply) => panic!("{reply:?} instead of {code:?}"),
        Err(status) => {
            assert_eq!(status.code(), code, "{}", status.message());
            assert!(status.details().is_empty());
            status.message().to_owned()
        }
    }
}

pub fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Writes and makes durable.
pub fn write(path: impl AsRef<Path>, contents: impl AsRef<[u8]>) {
    std::fs::write(&path, contents).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}

pub fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
