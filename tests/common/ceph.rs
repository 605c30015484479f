//! The Ceph clusters that `scripts/test.sh` starts, and drivers on them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Client, Lab, mounts_below, run};

/// Tests that break a cluster keep the others of their program away from it. Programs of tests run one after the other.
static CLUSTERS: RwLock<()> = RwLock::new(());

/// A cluster, held for reading: it stays whole meanwhile. Or alone, to be broken.
pub struct Cluster {
    pub dir: PathBuf,
    pub env: HashMap<String, String>,
    #[expect(dead_code, reason = "dropping it lets others in")]
    held: Held,
}

#[expect(dead_code, reason = "they are only held")]
enum Held {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// The cluster of the tests, or a line that says why there is none.
#[macro_export]
macro_rules! cluster {
    () => {
        $crate::cluster!($crate::common::ceph::Cluster::shared("BERTH_LAB"))
    };
    ($found:expr) => {
        match $found {
            Some(cluster) => cluster,
            None => {
                println!("SKIPPED {}: no Ceph cluster; scripts/test.sh starts one", module_path!());
                return;
            }
        }
    };
}

impl Cluster {
    /// `BERTH_LAB` or `BERTH_LAB_B`.
    pub fn shared(variable: &str) -> Option<Self> {
        let held = CLUSTERS.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::open(variable, Held::Shared(held))
    }

    /// The same cluster, to be broken.
    pub fn alone() -> Option<Self> {
        let held = CLUSTERS.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::open("BERTH_LAB", Held::Alone(held))
    }

    fn open(variable: &str, held: Held) -> Option<Self> {
        let dir = PathBuf::from(std::env::var_os(variable)?);
        let text = std::fs::read_to_string(dir.join("env")).unwrap();
        let words = text.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        let env = words.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Some(Self { dir, env, held })
    }

    pub fn get(&self, key: &str) -> &str {
        &self.env[&format!("BERTH_LAB_{key}")]
    }

    pub fn monitors(&self) -> String {
        let quoted: Vec<_> = self.get("MONITORS").split(',').map(|one| format!("'{one}'")).collect();
        format!("[{}]", quoted.join(", "))
    }

    /// An entry of `clusters:`, in which this cluster has this name and this subvolume group.
    pub fn entry(&self, name: &str, group: &str) -> String {
        let (monitors, dir) = (self.monitors(), self.dir.display());
        format!(
            "  - {{name: {name}, monitors: {monitors}, groups: [{group}], user: berth-provisioner, keyFile: {dir}/provisioner.key}}\n"
        )
    }

    pub fn secret(&self, who: &str) -> HashMap<String, String> {
        let pairs = [("userID", self.get(&format!("{who}_USER"))), ("userKey", self.get(&format!("{who}_KEY")))];
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }

    pub fn admin_secret(&self) -> HashMap<String, String> {
        [("userID", "admin"), ("userKey", self.get("ADMIN_KEY"))].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
    }

    /// A lab whose driver is not started yet.
    pub fn lab(&self) -> Lab {
        let mut lab = Lab::bare();
        lab.config.clusters = Some(format!("clusters:\n{}", self.entry("main", "csi")));
        lab
    }

    pub async fn start(&self, lab: &mut Lab) -> Client {
        let mut client = lab.start().await;
        client.secrets = [self.secret("PROVISIONER"), self.secret("NODE")];
        client
    }

    /// A driver on this cluster.
    pub async fn driver(&self) -> (Lab, Client) {
        let mut lab = self.lab();
        let client = self.start(&mut lab).await;
        (lab, client)
    }

    /// The administrator's `ceph`.
    pub fn ceph(&self, arguments: &[&str]) -> String {
        let mut all = vec!["--conf", self.get("CONF")];
        all.extend(arguments);
        run("ceph", &all)
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.extend(["--format", "json"]);
        serde_json::from_str(&self.ceph(&all)).unwrap()
    }

    /// The names of all subvolumes in the tests' group.
    pub fn subvolumes(&self) -> Vec<String> {
        let list = self.json(&["fs", "subvolume", "ls", "cephfs", "--group_name", "csi"]);
        list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    }

    pub fn snapshots(&self, subvolume: &str) -> Vec<String> {
        let list = self.json(&["fs", "subvolume", "snapshot", "ls", "cephfs", subvolume, "--group_name", "csi"]);
        list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    }

    pub fn info(&self, id: &str) -> Value {
        self.json(&["fs", "subvolume", "info", "cephfs", name_of(id), "--group_name", "csi"])
    }

    pub fn notes(&self, id: &str) -> Value {
        let all = self.json(&["fs", "subvolume", "metadata", "ls", "cephfs", name_of(id), "--group_name", "csi"]);
        serde_json::from_str(all["berth"].as_str().unwrap()).unwrap()
    }

    pub fn pid(&self, daemon: &str) -> i32 {
        std::fs::read_to_string(self.dir.join(format!("run/{daemon}.pid"))).unwrap().trim().parse().unwrap()
    }

    pub fn signal(&self, daemon: &str, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid(daemon)).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Kills a daemon and starts it again on its data.
    pub fn restart(&self, daemon: &str) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/lab.sh");
        run(script, &["restart", self.dir.to_str().unwrap(), daemon]);
    }

    /// Waits until all is well again.
    pub fn settle(&self) {
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            let status = self.json(&["status"]);
            let mgr = status["mgrmap"]["available"].as_bool() == Some(true);
            let checks = status["health"]["checks"].as_object().unwrap();
            let mds = !checks.keys().any(|check| check.starts_with("MDS") || check.starts_with("FS"))
                && !self.ceph(&["fs", "dump", "--format", "json"]).contains("laggy_since");
            let volumes = || {
                let mut command = Command::new("timeout");
                command.args(["10", "ceph", "--conf", self.get("CONF"), "fs", "subvolume", "ls", "cephfs"]);
                command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
            };
            if mgr && mds && volumes() {
                return;
            }
            assert!(Instant::now() < end, "the cluster does not come back: {status}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Ends the session of the client that mounted at this path.
    pub fn evict(&self, staging: &str) {
        let sessions = self.json(&["tell", "mds.a", "session", "ls"]);
        let mut ids = Vec::new();
        for session in sessions.as_array().unwrap() {
            let place = session["client_metadata"]["mount_point"].as_str().unwrap_or_default();
            if place == staging {
                ids.push(session["id"].as_u64().unwrap());
            }
        }
        assert!(!ids.is_empty(), "nobody has mounted at {staging}: {sessions}");
        for id in ids {
            self.ceph(&["tell", "mds.a", "session", "evict", &format!("id={id}")]);
        }
    }
}

/// The subvolume of a volume id.
pub fn name_of(id: &str) -> &str {
    id.rsplit('/').next().unwrap()
}

/// The ceph-fuse process that serves a path.
pub fn fuse_at(path: &str) -> Option<i32> {
    for process in procfs::process::all_processes().unwrap().flatten() {
        if let Ok(line) = process.cmdline()
            && line.first().is_some_and(|program| program == "ceph-fuse")
            && line.last().is_some_and(|place| place == path)
        {
            return Some(process.pid);
        }
    }
    None
}

/// No ceph-fuse serves anything below this directory, and nothing is mounted there.
pub fn assert_nothing_mounted(dir: &Path) {
    assert_eq!(mounts_below(dir), Vec::<String>::new());
    for process in procfs::process::all_processes().unwrap().flatten() {
        let line = process.cmdline().unwrap_or_default();
        let serves = line.first().is_some_and(|program| program == "ceph-fuse")
            && line.last().is_some_and(|place| Path::new(place).starts_with(dir));
        assert!(!serves, "{line:?}");
    }
}
