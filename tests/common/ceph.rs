//! A Ceph cluster of `scripts/lab.sh`, and users of it that a test makes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::run;

/// A cluster that `make test` has started.
pub struct Ceph {
    values: HashMap<String, String>,
}

/// A user that is gone with the value, and the file that has its key.
pub struct User<'a> {
    pub name: String,
    pub key_file: PathBuf,
    ceph: &'a Ceph,
}

impl Ceph {
    /// The cluster of tests. Says why, and is `None`, where there is none.
    pub fn lab() -> Option<Self> {
        Self::below("BERTH_LAB")
    }

    /// The other one, whose daemons a test may stop.
    pub fn lab_b() -> Option<Self> {
        Self::below("BERTH_LAB_B")
    }

    fn below(variable: &str) -> Option<Self> {
        let Ok(dir) = std::env::var(variable) else {
            println!("SKIPPED {}: no Ceph cluster in ${variable}", module_path!());
            return None;
        };
        let text = std::fs::read_to_string(Path::new(&dir).join("env")).unwrap();
        let pairs = text.lines().filter_map(|line| line.strip_prefix("export BERTH_LAB_")?.split_once('='));
        Some(Self { values: pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect() })
    }

    /// A value of its `env` without the prefix: `MONITORS`, `PROVISIONER_KEY`.
    pub fn value(&self, name: &str) -> &str {
        &self.values[name]
    }

    pub fn dir(&self) -> &Path {
        Path::new(self.value("DIR"))
    }

    /// `PROVISIONER` or `NODE`.
    pub fn key_file(&self, user: &str) -> PathBuf {
        self.dir().join(format!("{}.key", user.to_lowercase()))
    }

    /// A cluster of the configuration, called `main`, and whatever else it has.
    pub fn configured(&self, more: &str) -> String {
        format!("{{name: main, monitors: [{}], {more}}}", self.value("MONITORS").replace(',', ", "))
    }

    /// An administrator's `ceph`.
    pub fn run(&self, arguments: &[&str]) -> String {
        let all = ["20", "ceph", "--conf", self.value("CONF")];
        run("timeout", &[&all[..], arguments].concat())
    }

    /// A user with these capabilities.
    pub fn user(&self, name: &str, capabilities: &[&str]) -> User<'_> {
        let entity = format!("client.{name}");
        self.run(&[&["auth", "get-or-create", &entity][..], capabilities].concat());
        let key_file = self.dir().join(format!("{name}.key"));
        std::fs::write(&key_file, self.run(&["auth", "get-key", &entity])).unwrap();
        User { name: name.to_owned(), key_file, ceph: self }
    }

    /// The pid of a daemon: `mgr.x`.
    pub fn pid(&self, daemon: &str) -> rustix::process::Pid {
        let text = std::fs::read_to_string(self.dir().join(format!("run/{daemon}.pid"))).unwrap();
        rustix::process::Pid::from_raw(text.trim().parse().unwrap()).unwrap()
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
            .args(["20", "ceph", "--conf", self.ceph.value("CONF"), "auth", "rm", &entity])
            .output();
    }
}
