//! `berth doctor`, against real clusters: what is right, each thing that may be wrong, and that nothing is changed.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests start programs, and fail by panicking"
)]

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use common::berth;
use common::ceph::Cluster;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A configuration that goes away with the value.
struct Config(tempfile::TempDir);

impl Config {
    /// With a cluster, written as the file has it.
    fn of(cluster: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "deadlines: {{ceph: 3s}}\nclusters: [{cluster}]\ndrivers: [{{backend: cephfs, role: controller, socket: /run/none}}]\n"
        );
        std::fs::write(dir.path().join("berth.yaml"), text).unwrap();
        Self(dir)
    }

    /// What is found with these further arguments, as `VERDICT SUBJECT: WHAT -> ADVICE`.
    #[track_caller]
    fn findings(&self, more: &[&str], code: i32) -> Vec<String> {
        let file = self.0.path().join("berth.yaml");
        let (out, err) = berth(&[&["doctor", "--json", "--config", file.to_str().unwrap()][..], more].concat(), code);
        assert_eq!(err.is_empty(), code == 0, "{err}");
        let all: Value = serde_json::from_str(&out).unwrap();
        let line = |one: &Value| {
            let [verdict, subject, what, advice] =
                ["verdict", "subject", "what", "advice"].map(|key| one[key].as_str().unwrap_or_default());
            format!("{verdict} {subject}: {what} -> {advice}")
        };
        all["findings"].as_array().unwrap().iter().map(line).collect()
    }
}

fn account(user: &str, key_file: &Path) -> String {
    format!("user: {user}, keyFile: {}", key_file.display())
}

fn provisioner(ceph: &Cluster) -> String {
    account(ceph.get("PROVISIONER_USER"), &ceph.key_file("PROVISIONER"))
}

/// Those that are not fine.
fn bad(findings: &[String]) -> Vec<&str> {
    findings.iter().map(String::as_str).filter(|line| !line.starts_with("ok ")).collect()
}

#[track_caller]
fn assert_one(findings: &[&str], parts: &[&str]) {
    let [only] = findings else { panic!("{findings:#?}") };
    for part in parts {
        assert!(only.contains(part), "{part} is not in {only}");
    }
}

#[test]
fn the_users_that_are_made_for_berth_may_do_all_that_is_needed_and_no_more() {
    let Some(ceph) = Cluster::lab() else { return };
    let config = Config::of(&ceph.configured(&provisioner(&ceph)));
    let key = ceph.key_file("NODE");
    let node = ["--node", ceph.get("NODE_USER"), "--node-key-file", key.to_str().unwrap()];
    let findings = config.findings(&node, 0);
    assert_eq!(bad(&findings), [""; 0]);
    for part in [
        "monitor v2:",
        "monitor v1:",
        "librados",
        ceph.get("FSID"),
        "(mon, mgr, mds)",
        "an MDS of it is active",
        "client.berth-provisioner may use the 20 commands",
        "client.berth-provisioner may do no more than it needs",
        "client.berth-node may do no more than it needs",
    ] {
        assert!(findings.iter().any(|line| line.contains(part)), "{part} is not in {findings:#?}");
    }
    // The same for people; a user from the command line that is the configured one is looked at once.
    let file = config.0.path().join("berth.yaml");
    let key = ceph.key_file("PROVISIONER");
    let same = ["--provisioner", ceph.get("PROVISIONER_USER"), "--provisioner-key-file", key.to_str().unwrap()];
    let (out, _) = berth(&[&["doctor", "--config", file.to_str().unwrap()][..], &same].concat(), 0);
    assert!(out.starts_with("RESULT  WHERE") && out.contains("\nok      main "), "{out}");
    assert_eq!(out.matches("may use the 20 commands").count(), 1, "{out}");
}

#[test]
fn a_capability_that_is_missing_is_named_as_it_has_to_be_granted() {
    let Some(ceph) = Cluster::lab() else { return };
    let all: Value =
        serde_json::from_str(&ceph.ceph(&["auth", "get", "client.berth-provisioner", "--format", "json"])).unwrap();
    let all = all[0]["caps"]["mgr"].as_str().unwrap();
    let without = |command: &str| {
        let parts: Vec<_> = all.split(", ").filter(|part| !part.contains(&format!("\"{command}\""))).collect();
        assert_eq!(parts.len(), all.split(", ").count() - 1, "{command}");
        parts.join(", ")
    };
    for (name, command, granted) in [
        ("doctor-no-rm", "fs subvolume rm", "with vol_name=cephfs group_name=csi'"),
        ("doctor-no-group", "fs subvolumegroup create", "with vol_name=cephfs group_name=csi'"),
        ("doctor-no-create", "fs subvolume create", "with vol_name=cephfs group_name=csi'"),
        (
            "doctor-no-clone",
            "fs subvolume snapshot clone",
            "with vol_name=cephfs group_name=csi target_group_name=csi'",
        ),
    ] {
        let user = ceph.user(name, &["mon", "allow r fsname=cephfs", "mgr", &without(command)]);
        let config = Config::of(&ceph.configured(""));
        let findings = config.findings(&["--provisioner", name, "--provisioner-key-file", user.key_file()], 1);
        let capability = format!("lacks mgr 'allow command \"{command}\" {granted}");
        assert_one(&bad(&findings), &["wrong main/cephfs/csi", name, &capability, "users.sh"]);
    }
    let user = ceph.user("doctor-none", &["mon", "allow r"]);
    let config = Config::of(&ceph.configured(&account("doctor-none", &user.key_file)));
    assert_one(&bad(&config.findings(&[], 1)), &["wrong main/cephfs/csi", "may use none of the 20 commands"]);
}

#[test]
fn a_user_that_may_do_more_than_it_needs_is_a_warning() {
    let Some(ceph) = Cluster::lab() else { return };
    let everything = ["mon", "allow *", "mgr", "allow *"];
    let user = ceph.user("doctor-admin", &everything);
    let config = Config::of(&ceph.configured(&account("doctor-admin", &user.key_file)));
    let findings = config.findings(&[], 0);
    let all = [
        "warning main: client.doctor-admin may do more than it needs",
        "mon `auth get`",
        "mon `config-key exists`",
        "mon `osd blocklist`",
        "mgr `fs volume ls`",
        "see other groups",
        "see other file systems",
        "copy into other groups",
        "make users",
    ];
    assert_one(&bad(&findings), &all);
    let findings = config.findings(&["--node", "doctor-admin", "--node-key-file", user.key_file()], 0);
    assert_one(&bad(&findings)[1..], &["do the controller's work in cephfs/csi", "`fs subvolume rm`"]);
    // Of one that may use each command in every group, only that.
    let wide = ["mon", "allow r fsname=cephfs", "mgr", r#"allow command "fs subvolume ls" with vol_name=cephfs"#];
    let user = ceph.user("doctor-wide", &wide);
    let config = Config::of(&ceph.configured(&account("doctor-wide", &user.key_file)));
    let findings = config.findings(&[], 1);
    let warnings: Vec<_> = bad(&findings).into_iter().filter(|line| line.starts_with("warning")).collect();
    assert_one(&warnings, &["may do more than it needs: see other groups (mgr `fs subvolume ls`) ->"]);
}

#[test]
fn a_look_changes_nothing_whatever_the_user_may_do() {
    let Some(ceph) = Cluster::lab() else { return };
    ceph.ceph(&["fs", "subvolumegroup", "create", "cephfs", "doctor-there", "--mode", "711"]);
    let user = ceph.user("doctor-harmless", &["mon", "allow *", "mgr", "allow *"]);
    let groups = "groups: [doctor-there, doctor-absent]";
    let config = Config::of(&ceph.configured(&format!("{groups}, {}", account(&user.name, &user.key_file))));
    let state = || {
        let info: Value =
            serde_json::from_str(&ceph.ceph(&["fs", "subvolumegroup", "info", "cephfs", "doctor-there"])).unwrap();
        let kept = ["mode", "uid", "gid", "bytes_quota", "data_pool"].map(|key| info[key].to_string());
        let volumes = ceph.ceph(&["fs", "subvolume", "ls", "cephfs", "doctor-there"]);
        (
            kept,
            volumes,
            ceph.ceph(&["fs", "subvolumegroup", "ls", "cephfs"]),
            ceph.ceph(&["auth", "ls"]).contains("berth-doctor"),
        )
    };
    let before = state();
    let findings = config.findings(&["--node", &user.name, "--node-key-file", user.key_file()], 0);
    assert_eq!(findings.iter().filter(|line| line.contains("may use the 20 commands")).count(), 2, "{findings:#?}");
    assert_eq!(state(), before);
    assert!(!before.2.contains("doctor-absent"));
    ceph.ceph(&["fs", "subvolumegroup", "rm", "cephfs", "doctor-there"]);
}

#[test]
fn a_wrong_key_and_a_user_that_is_not_there_are_told_with_what_to_compare() {
    let Some(ceph) = Cluster::lab() else { return };
    let (node, nothing) = (ceph.key_file("NODE"), ceph.dir.join("doctor-nothing"));
    for (user, key_file, part) in [
        ("berth-provisioner", &node, "does not let client.berth-provisioner in"),
        ("doctor-nobody", &node, "does not let client.doctor-nobody in"),
        ("berth-node", &nothing, "cannot read the key of client.berth-node"),
    ] {
        let config = Config::of(&ceph.configured(&account(user, key_file)));
        assert_one(&bad(&config.findings(&[], 1)), &["wrong main: ", part, "ceph auth get"]);
    }
    let config = Config::of(&ceph.configured(""));
    assert_one(&bad(&config.findings(&[], 0)), &["warning main: there is no user", "--provisioner"]);
}

#[test]
fn a_file_system_that_is_not_there_is_told_with_those_that_are() {
    let Some(ceph) = Cluster::lab() else { return };
    let config = Config::of(&ceph.configured(&format!("filesystems: [cephfs, tank], {}", provisioner(&ceph))));
    let findings = config.findings(&[], 1);
    assert_one(&bad(&findings), &["wrong main/tank", "no file system tank", "only: cephfs"]);
}

#[test]
fn monitors_that_do_not_answer_are_told_in_bounded_time() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent_address = silent.local_addr().unwrap();
    let monitors = format!("v2:{closed}, v2:{silent_address}, v2:no-such-host.invalid:3300");
    let config = Config::of(&format!("{{name: main, monitors: ['{}']}}", monitors.replace(", ", "', '")));
    let begun = Instant::now();
    let findings = config.findings(&[], 1);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let bad: Vec<_> = bad(&findings).into_iter().filter(|line| line.contains("monitor ")).collect();
    assert_eq!(bad.len(), 3, "{findings:#?}");
    assert!(bad[0].contains(&format!("{closed} does not answer: cannot connect: Connection refused")), "{}", bad[0]);
    assert!(
        bad[1].contains("says nothing") && bad[2].contains("no-such-host.invalid:3300 does not answer"),
        "{bad:#?}"
    );
}

#[test]
fn a_monitor_whose_address_has_the_other_protocol_is_told_what_to_write() {
    let Some(ceph) = Cluster::lab() else { return };
    let swapped = ceph.configured(&provisioner(&ceph)).replacen("v2:", "v3:", 1).replace("v1:", "v2:");
    // The first as it is, so that the cluster can be reached.
    let config = Config::of(&swapped.replace("v3:", "v2:"));
    assert_one(&bad(&config.findings(&[], 1)), &["speaks the protocol v1 there", "write `v1:` before it"]);
}

#[test]
fn pools_and_what_mounts_on_this_machine_are_looked_at_for_the_drivers_that_need_them() {
    let dir = tempfile::tempdir().unwrap();
    let (file, pool) = (dir.path().join("berth.yaml"), dir.path().join("pool"));
    let text = format!(
        "pools: [{{name: fast, path: {}, fallback: root, cap: 1Gi}}]
drivers: [{{backend: nvme, socket: /run/none}}, {{backend: cephfs, role: node, socket: /run/nothing}}]",
        pool.display()
    );
    std::fs::write(&file, text).unwrap();
    let doctor = |more: &[&str], path: &str, code| {
        let all = [&["doctor", "--config", file.to_str().unwrap()][..], more].concat();
        let output =
            std::process::Command::new(env!("CARGO_BIN_EXE_berth")).args(all).env("PATH", path).output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(code), "{out}");
        out
    };
    let nvme = ["--driver", "nvme.csi.berth.dev"];
    let out = doctor(&nvme, "", 1);
    assert!(out.contains("wrong   pool fast  cannot look at") && out.contains(" -> is its disk mounted"), "{out}");
    std::fs::create_dir(&pool).unwrap();
    let out = doctor(&nvme, "", 0);
    assert!(out.contains("ok      pool fast") && !out.contains("this machine"), "{out}");
    if berth::host::ceph::has_kernel_client().ok() == Some(false) {
        // Nothing is found there, so there is no ceph-fuse.
        let out = doctor(&[], "/nowhere", 1);
        assert!(out.contains("wrong   this machine  nothing here mounts CephFS"), "{out}");
    }
    let (_, err) = berth(&["doctor", "--config", file.to_str().unwrap(), "--cluster", "tank"], 1);
    assert!(err.contains("it has no cluster tank"), "{err}");
}

/// A daemon that stands still for as long as the value lives.
struct Stopped(Pid);

impl Stopped {
    fn daemon(pid: Pid) -> Self {
        kill_process(pid, Signal::STOP).unwrap();
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

#[test]
fn a_manager_that_hangs_is_told_once_and_in_bounded_time() {
    let Some(ceph) = Cluster::lab_b() else { return };
    let config = Config::of(&ceph.configured(&provisioner(&ceph)));
    let stopped = Stopped::daemon(ceph.pid("mgr.x"));
    let begun = Instant::now();
    let findings = config.findings(&[], 1);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    drop(stopped);
    assert_one(&bad(&findings), &["wrong main: no manager of cluster main has answered", "within 3s", "ceph status"]);
}
