//! The Ceph clusters that `scripts/test.sh` starts, and drivers on them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
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

/// A user that is gone with the value, and the file that has its key.
pub struct User<'a> {
    pub name: String,
    pub key_file: PathBuf,
    cluster: &'a Cluster,
}

impl Cluster {
    /// The cluster of the tests. Says why, and is `None`, where there is none.
    pub fn lab() -> Option<Self> {
        let held = CLUSTERS.read().unwrap_or_else(PoisonError::into_inner);
        Self::open("BERTH_LAB", Held::Shared(held))
    }

    /// The other one.
    pub fn lab_b() -> Option<Self> {
        let held = CLUSTERS.read().unwrap_or_else(PoisonError::into_inner);
        Self::open("BERTH_LAB_B", Held::Shared(held))
    }

    /// The cluster of the tests, to be broken.
    pub fn alone() -> Option<Self> {
        let held = CLUSTERS.write().unwrap_or_else(PoisonError::into_inner);
        Self::open("BERTH_LAB", Held::Alone(held))
    }

    fn open(variable: &str, held: Held) -> Option<Self> {
        let Some(dir) = std::env::var_os(variable) else {
            println!("SKIPPED {}: no Ceph cluster in ${variable}; scripts/test.sh starts one", module_path!());
            return None;
        };
        let dir = PathBuf::from(dir);
        let text = std::fs::read_to_string(dir.join("env")).unwrap();
        let words = text.lines().filter_map(|line| line.strip_prefix("export BERTH_LAB_")?.split_once('='));
        let env = words.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Some(Self { dir, env, held })
    }

    /// A value of the lab's `env`, without the prefix: `MONITORS`, `PROVISIONER_KEY`.
    pub fn get(&self, key: &str) -> &str {
        &self.env[key]
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

    /// A cluster of the configuration, called `main`, and whatever else it has.
    pub fn configured(&self, more: &str) -> String {
        format!("{{name: main, monitors: {}, {more}}}", self.monitors())
    }

    /// `PROVISIONER` or `NODE`.
    pub fn key_file(&self, user: &str) -> PathBuf {
        self.dir.join(format!("{}.key", user.to_lowercase()))
    }

    /// A user with these capabilities.
    pub fn user(&self, name: &str, capabilities: &[&str]) -> User<'_> {
        let entity = format!("client.{name}");
        self.ceph(&[&["auth", "get-or-create", &entity][..], capabilities].concat());
        let key_file = self.dir.join(format!("{name}.key"));
        std::fs::write(&key_file, self.ceph(&["auth", "get-key", &entity])).unwrap();
        User { name: name.to_owned(), key_file, cluster: self }
    }

    pub fn secret(&self, who: &str) -> HashMap<String, String> {
        let pairs = [("userID", self.get(&format!("{who}_USER"))), ("userKey", self.get(&format!("{who}_KEY")))];
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }

    pub fn admin_secret(&self) -> HashMap<String, String> {
        [("userID", "admin"), ("userKey", self.get("ADMIN_KEY"))].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
    }

    /// A lab whose driver is not started yet.
    pub fn idle_lab(&self) -> Lab {
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
        let mut lab = self.idle_lab();
        let client = self.start(&mut lab).await;
        (lab, client)
    }

    /// The administrator's `ceph`.
    pub fn ceph(&self, arguments: &[&str]) -> String {
        let all = ["60", "ceph", "--conf", self.get("CONF")];
        run("timeout", &[&all[..], arguments].concat())
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

    /// The pid of a daemon: `mgr.x`.
    pub fn pid(&self, daemon: &str) -> Pid {
        let text = std::fs::read_to_string(self.dir.join(format!("run/{daemon}.pid"))).unwrap();
        Pid::from_raw(text.trim().parse().unwrap()).unwrap()
    }

    pub fn signal(&self, daemon: &str, signal: Signal) {
        rustix::process::kill_process(self.pid(daemon), signal).unwrap();
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

impl User<'_> {
    pub fn key_file(&self) -> &str {
        self.key_file.to_str().unwrap()
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.key_file);
        let entity = format!("client.{}", self.name);
        // Its success is not asserted: this may be the end of a test that has failed.
        let _ = Command::new("timeout")
            .args(["20", "ceph", "--conf", self.cluster.get("CONF"), "auth", "rm", &entity])
            .output();
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

/// Nothing is mounted below this directory, and no ceph-fuse serves anything there.
pub fn assert_nothing_mounted(dir: &Path) {
    assert_eq!(mounts_below(dir), Vec::<String>::new());
    assert_eq!(fuses_below(dir), Vec::<i32>::new());
}

/// The ceph-fuse processes that serve something below this directory.
pub fn fuses_below(dir: &Path) -> Vec<i32> {
    let mut found = Vec::new();
    for process in procfs::process::all_processes().unwrap().flatten() {
        let line = process.cmdline().unwrap_or_default();
        if line.first().is_some_and(|program| program == "ceph-fuse")
            && line.last().is_some_and(|place| Path::new(place).starts_with(dir))
        {
            found.push(process.pid);
        }
    }
    found
}
