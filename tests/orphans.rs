//! `berth volume orphans` and `list` where a controller is all that there is: volumes of a real Ceph cluster.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests start programs, and fail by panicking"
)]

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::berth;
use common::ceph::Cluster;
use serde_json::{Value, json};

const GROUP: &str = "orphans";

/// A controller, ended with the value.
struct Controller {
    config: PathBuf,
    process: Child,
}

impl Controller {
    fn serve(dir: &Path, cluster: &str) -> Self {
        let (config, socket) = (dir.join("berth.yaml"), dir.join("csi.sock"));
        let driver = format!("{{backend: cephfs, role: controller, socket: {}}}", socket.display());
        std::fs::write(&config, format!("clusters: [{cluster}]\ndrivers: [{driver}]\n")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
        let process = command.arg("serve").arg("--config").arg(&config).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the controller does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { config, process }
    }

    #[track_caller]
    fn volume(&self, arguments: &[&str]) -> String {
        berth(&[&["volume", "--config", self.config.to_str().unwrap()][..], arguments].concat(), 0).0
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.volume(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// As `external-provisioner --extra-create-metadata` does.
    fn create(&self, name: &str, claim: &str) -> String {
        let [claim, namespace] =
            [("name", claim), ("namespace", "ml")].map(|(key, value)| format!("csi.storage.k8s.io/pvc/{key}={value}"));
        let made = self.json(&["create", name, "--size", "1Gi", "--param", &claim, "--param", &namespace]);
        made["id"].as_str().unwrap().to_owned()
    }

    fn ids(&self) -> Vec<String> {
        ids(&self.json(&["list"])["volumes"])
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn ids(volumes: &Value) -> Vec<String> {
    let mut ids: Vec<_> =
        volumes.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned()).collect();
    ids.sort();
    ids
}

fn persistent_volume(driver: &str, handle: &str) -> Value {
    json!({"kind": "PersistentVolume", "spec": {"csi": {"driver": driver, "volumeHandle": handle}}})
}

#[test]
fn volumes_without_a_persistent_volume_are_listed_with_their_claims_and_only_those_are_deleted() {
    let Some(ceph) = Cluster::lab() else { return };
    let dir = tempfile::tempdir().unwrap();
    // A group of its own: other tests have volumes too.
    let user = ceph.user("orphans", &["mon", "allow r", "mgr", "allow rw"]);
    let account = format!("groups: [{GROUP}], user: {}, keyFile: {}", user.name, user.key_file());
    let controller = Controller::serve(dir.path(), &ceph.configured(&account));
    let kept = controller.create("pvc-1", "weights");
    let other = controller.create("pvc-2", "dataset");
    let gone = controller.create("pvc-3", "scratch");

    let list = controller.volume(&["list"]);
    let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..5], ["ID", "NAME", "CLAIM", "SIZE", "WHERE"]);
    assert!(lines.contains(&vec![&kept, "pvc-1", "ml/weights", "1Gi", "anywhere"]), "{list}");

    // A volume of the same handle that another driver has is not this one.
    let known = dir.path().join("pv.json");
    let items = [persistent_volume("cephfs.csi.berth.dev", &kept), persistent_volume("cephfs.csi.ceph.com", &other)];
    std::fs::write(&known, json!({"kind": "List", "items": items}).to_string()).unwrap();
    let known = known.to_str().unwrap();
    let mut both = vec![other.clone(), gone.clone()];
    both.sort();
    let orphans = controller.json(&["orphans", "--known", known]);
    assert_eq!(ids(&orphans["orphans"]), both);
    let scratch = orphans["orphans"].as_array().unwrap().iter().find(|one| one["id"] == gone.as_str()).unwrap();
    let expected = json!({"id": gone, "name": "pvc-3", "claim": "scratch", "namespace": "ml", "size": 1 << 30, "deleted": false, "error": null});
    assert_eq!(*scratch, expected);
    assert_eq!(controller.ids().len(), 3, "a list deletes nothing");

    // Handles by line, through a pipe.
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command.args(["volume", "orphans", "--known", "-", "--delete", "--config"]).arg(&controller.config);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("{kept}\n{other}\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && out.contains(&format!("{gone} is deleted")), "{out}");
    let mut left = vec![kept.clone(), other.clone()];
    left.sort();
    assert_eq!(controller.ids(), left);

    let orphans = controller.json(&["orphans", "--known", known, "--delete"]);
    assert_eq!(orphans["orphans"][0]["deleted"], true);
    assert_eq!(controller.ids(), std::slice::from_ref(&kept));

    // What needs the node service says so before anything is made, whether it is a file or a socket that lacks it.
    let (socket, below) = (dir.path().join("csi.sock"), dir.path().join("new"));
    let (socket, target) = (socket.to_str().unwrap(), below.join("data"));
    let (out, _) = berth(&["volume", "--socket", socket, "list"], 0);
    assert!(out.contains(&kept), "{out}");
    let config = controller.config.to_str().unwrap();
    for place in [["--socket", socket], ["--config", config]] {
        let mount = ["mount", &kept, target.to_str().unwrap(), "--staging", below.to_str().unwrap()];
        let (_, err) = berth(&[&["volume"][..], &place, &mount].concat(), 1);
        assert!(err.contains("has no node service there") && !below.exists(), "{err}");
    }
    controller.volume(&["delete", &kept]);
    assert_eq!(ceph.ceph(&["fs", "subvolume", "ls", "cephfs", GROUP]).trim(), "[]");
}
