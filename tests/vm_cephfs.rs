//! The kernel's CephFS client against a real cluster. Most machines that tests run on have no such client, so this is a
//! lane of its own: `make test-vm` runs it in a virtual machine, beside a cluster of `scripts/lab.sh`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth::error::{Error, ErrorKind};
use berth::host::ceph::{self, FUSE_TAG, Monitor, Shown, Source, Syntax};
use berth::host::{filesystem, mounts};

const QUOTA: u64 = 100 << 20;

/// Ends the test where there is no kernel client or no cluster.
macro_rules! cluster_or_skip {
    () => {{
        skip_unless!(common::is_root(), "needs root");
        skip_unless!(ceph::has_kernel_client().unwrap(), "this kernel has no CephFS client; `make test-vm` has one");
        skip_unless!(
            std::env::var_os("BERTH_LAB_CONF").is_some(),
            "no cluster: run scripts/lab.sh up, and source its env"
        );
        Cluster::from_environment()
    }};
}

/// The cluster that `scripts/lab.sh` made, and places to mount it on.
struct Cluster {
    conf: String,
    fsid: String,
    key: String,
    monitors: Vec<Monitor>,
    dir: tempfile::TempDir,
}

impl Cluster {
    fn from_environment() -> Self {
        let get = |name: &str| std::env::var(name).unwrap();
        let addresses = get("BERTH_LAB_MONITORS");
        let address = |protocol| {
            let text = addresses.split(',').find_map(|address| address.strip_prefix(protocol));
            text.map(|text| text.parse().unwrap())
        };
        Self {
            conf: get("BERTH_LAB_CONF"),
            fsid: get("BERTH_LAB_FSID"),
            key: get("BERTH_LAB_ADMIN_KEY"),
            monitors: vec![Monitor { v1: address("v1:"), v2: address("v2:") }],
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn ceph(&self, words: &str) -> String {
        let words: Vec<_> = ["--conf", &self.conf].into_iter().chain(words.split(' ')).collect();
        common::run("ceph", &words).trim().to_owned()
    }

    /// Its path in the file system.
    fn subvolume(&self, name: &str) -> String {
        self.ceph("fs subvolumegroup create cephfs vm");
        self.ceph(&format!("fs subvolume create cephfs {name} {QUOTA} --group_name vm"));
        self.ceph(&format!("fs subvolume getpath cephfs {name} --group_name vm"))
    }

    fn source<'a>(&'a self, path: &'a str) -> Source<'a> {
        let Self { fsid, key, monitors, .. } = self;
        Source { monitors, fsid, filesystem: "cephfs", path, user: "admin", key }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A failure, how long it took, and that it left nothing.
    #[track_caller]
    fn fails(&self, source: &Source, options: &[(&str, Option<&str>)]) -> (Error, Duration) {
        let target = self.place("failed");
        let begun = Instant::now();
        let error = ceph::mount(source, &target, options, false).unwrap_err();
        let took = begun.elapsed();
        println!("{:?} after {took:.1?}: {error}", error.kind());
        assert!(!error.to_string().contains(source.key), "{error}");
        assert!(!target.exists());
        (error, took)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Ok(table) = std::fs::read_to_string("/proc/self/mounts") else { return };
        let below = |place: &&str| Path::new(place).starts_with(self.dir.path());
        for place in table.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(below) {
            let _ = rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// What the mount table says of a place, for people and for the parser.
fn shown(place: &Path) -> Shown {
    let line = mounts::line_of(place).unwrap().unwrap();
    println!("{line}");
    Shown::of_line(&line).unwrap()
}

#[test]
#[ignore = "make test-vm"]
fn a_subvolume_is_mounted_and_is_as_big_as_its_quota() {
    let cluster = cluster_or_skip!();
    let path = cluster.subvolume("use");
    let place = cluster.place("a place");
    let begun = Instant::now();
    ceph::mount(&cluster.source(&path), &place, &[("noexec", None), ("rasize", Some("1048576"))], false).unwrap();
    println!("mounted after {:.2?}", begun.elapsed());
    let expected = Shown {
        fsid: Some(cluster.fsid.clone()),
        filesystem: Some("cephfs".to_owned()),
        path: path.clone(),
        tag: None,
    };
    assert_eq!(shown(&place), expected);
    let line = mounts::line_of(&place).unwrap().unwrap();
    for word in ["noexec", "rasize=1048576", "ms_mode=prefer-crc", "recover_session=clean", "name=admin"] {
        assert!(line.contains(word), "{word}");
    }
    assert_eq!(filesystem::usage(&place).unwrap()[0][0], QUOTA);

    std::fs::write(place.join("file"), "content").unwrap();
    assert!(ceph::mount(&cluster.source(&path), &place, &[], false).is_err(), "mounted over a mount");
    let second = cluster.place("read-only");
    ceph::mount(&cluster.source(&path), &second, &[], true).unwrap();
    shown(&second);
    assert_eq!(std::fs::read(second.join("file")).unwrap(), b"content");
    let error = std::fs::write(second.join("file"), "more").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    std::fs::write(place.join("file"), "more").unwrap();

    // A bind of what lies below shows the whole path.
    std::fs::create_dir(place.join("sub dir")).unwrap();
    let bind = cluster.place("bind");
    mounts::ensure_bind(&place.join("sub dir"), &bind, false).unwrap();
    assert_eq!(shown(&bind).path, format!("{path}/sub dir"));
    for place in [&bind, &second, &place] {
        mounts::unmount_top(place).unwrap();
        assert!(mounts::line_of(place).unwrap().is_none());
    }
}

#[test]
#[ignore = "make test-vm"]
fn the_older_syntax_and_protocol_mount_the_same() {
    let cluster = cluster_or_skip!();
    let path = cluster.subvolume("old");
    let source = cluster.source(&path);
    for (name, v2) in [("v2", source.monitors[0].v2), ("v1", None)] {
        let monitors = [Monitor { v2, ..source.monitors[0] }];
        let source = Source { monitors: &monitors, ..source };
        let place = cluster.place(name);
        ceph::mount_in(Syntax::Monitors, &source, &place, &[], false).unwrap();
        let expected = Shown { fsid: None, filesystem: Some("cephfs".to_owned()), path: path.clone(), tag: None };
        assert_eq!(shown(&place), expected);
        assert_eq!(filesystem::usage(&place).unwrap()[0][0], QUOTA);
        std::fs::write(place.join(name), "content").unwrap();
        mounts::unmount_top(&place).unwrap();
    }
    // The newer syntax with the older protocol, which the caller may demand.
    let place = cluster.place("legacy");
    ceph::mount(&source, &place, &[("ms_mode", Some("legacy"))], false).unwrap();
    shown(&place);
    assert!(place.join("v1").exists() && place.join("v2").exists());
}

#[test]
#[ignore = "make test-vm"]
fn what_is_wrong_is_said_and_nothing_is_left() {
    let cluster = cluster_or_skip!();
    let path = cluster.subvolume("wrong");
    let good = cluster.source(&path);
    let quick = Duration::from_secs(10);

    let wrong = common::run("ceph-authtool", &["--gen-print-key"]);
    for user in ["admin", "nobody"] {
        let (error, took) = cluster.fails(&Source { key: wrong.trim(), user, ..good }, &[]);
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(took < quick);
    }
    let (error, _) = cluster.fails(&Source { key: "not a key", ..good }, &[]);
    assert_eq!(error.kind(), ErrorKind::Denied);

    // Keys that are right, of users who may not.
    cluster.ceph("fs subvolume create cephfs other --group_name vm");
    for (user, mds) in [("poor", ""), ("other", " mds allow·rw·path=/volumes/vm/other osd allow·rw")] {
        let words = format!("--conf {} auth get-or-create-key client.{user} mon allow·r{mds}", cluster.conf);
        let words: Vec<_> = words.split(' ').map(|word| word.replace('·', " ")).collect();
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let key = common::run("ceph", &words);
        let (error, took) = cluster.fails(&Source { user, key: key.trim(), ..good }, &[]);
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(took < quick);
    }

    let (error, _) = cluster.fails(&Source { path: "/volumes/nothing/here", ..good }, &[]);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let (error, took) = cluster.fails(&Source { filesystem: "nothing", ..good }, &[]);
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    assert!(took < quick);
    for option in [("no_such_option", None), ("rasize", Some("much")), ("recover_session", Some("dirty"))] {
        let (error, _) = cluster.fails(&good, &[option]);
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let long = format!("/volumes/{}", "x".repeat(300));
    let (error, _) = cluster.fails(&Source { path: &long, ..good }, &[]);
    assert_eq!(error.kind(), ErrorKind::Invalid);
    // Just too long for the newer syntax.
    let long = format!("/volumes/{}", "x".repeat(200));
    let (error, _) = cluster.fails(&Source { path: &long, ..good }, &[]);
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
#[ignore = "make test-vm"]
fn a_mount_without_an_answer_ends_in_its_time() {
    let cluster = cluster_or_skip!();
    let path = "/volumes";
    // A closed port, and one behind which nobody answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for dead in ["[::1]:6999".parse().unwrap(), silent.local_addr().unwrap()] {
        let monitors = [Monitor { v1: Some(dead), v2: Some(dead) }];
        let source = Source { monitors: &monitors, ..cluster.source(path) };
        let (error, took) = cluster.fails(&source, &[("mount_timeout", Some("4"))]);
        assert_eq!(error.kind(), ErrorKind::Unreachable);
        assert!(error.to_string().contains(&dead.to_string()), "{error}");
        assert!(took > Duration::from_secs(3) && took < Duration::from_secs(6), "{took:?}");
    }

    // A metadata server that hangs.
    let pid = std::fs::read_to_string(format!("{}/run/mds.a.pid", std::env::var("BERTH_LAB_DIR").unwrap())).unwrap();
    common::run("kill", &["-STOP", pid.trim()]);
    let begun = Instant::now();
    let result = ceph::mount(&cluster.source(path), &cluster.place("hung"), &[("mount_timeout", Some("4"))], false);
    common::run("kill", &["-CONT", pid.trim()]);
    let (error, took) = (result.unwrap_err(), begun.elapsed());
    println!("{:?} after {took:.1?}: {error}", error.kind());
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    assert!(took < Duration::from_secs(9), "{took:?}");
    assert!(!cluster.place("hung").exists());
}

#[test]
#[ignore = "make test-vm"]
fn a_mount_whose_client_was_evicted_comes_back() {
    let cluster = cluster_or_skip!();
    let path = cluster.subvolume("evicted");
    let place = cluster.place("evicted");
    ceph::mount(&cluster.source(&path), &place, &[], false).unwrap();
    std::fs::write(place.join("before"), "content").unwrap();
    std::fs::File::open(place.join("before")).unwrap().sync_all().unwrap();
    let kept = std::fs::File::create(place.join("kept open")).unwrap();
    let clients: serde_json::Value = serde_json::from_str(&cluster.ceph("tell mds.a client ls --format json")).unwrap();
    let client = clients.as_array().unwrap().iter().find(|client| client["client_metadata"]["root"] == path.as_str());
    let id = &client.unwrap_or_else(|| panic!("{clients}"))["id"];
    cluster.ceph(&format!("tell mds.a client evict id={id}"));
    let begun = Instant::now();
    let mut said = String::new();
    loop {
        match std::fs::write(place.join("after"), "content") {
            Ok(()) => break,
            Err(error) if error.to_string() != said => {
                said = error.to_string();
                println!("{said} after {:.1?}", begun.elapsed());
            }
            Err(_) => {}
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{said}");
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("writes again {:.1?} after the eviction", begun.elapsed());
    assert_eq!(std::fs::read(place.join("before")).unwrap(), b"content");
    // Only a file that was open stays lost to who has it open.
    println!("writing to a file that was open: {:?}", (&kept).write_all(b"content").and_then(|()| kept.sync_all()));
    println!("{:?} after {:.1?}: usage {:?}", place, begun.elapsed(), filesystem::usage(&place).unwrap());
    drop(kept);
    mounts::unmount_top(&place).unwrap();
}

#[test]
#[ignore = "make test-vm"]
fn a_snapshot_is_bound_out_of_its_subvolume() {
    let cluster = cluster_or_skip!();
    let path = cluster.subvolume("snapped");
    let place = cluster.place("live");
    ceph::mount(&cluster.source(&path), &place, &[], false).unwrap();
    std::fs::write(place.join("file"), "then").unwrap();
    // What the client still holds would be missing in the snapshot.
    std::fs::File::open(place.join("file")).unwrap().sync_all().unwrap();
    cluster.ceph("fs subvolume snapshot create cephfs snapped snap1 --group_name vm");
    std::fs::write(place.join("file"), "now").unwrap();

    let (parent, uuid) = path.rsplit_once('/').unwrap();
    let whole = cluster.place("whole");
    ceph::mount(&cluster.source(parent), &whole, &[], true).unwrap();
    let snapshot = cluster.place("snapshot");
    mounts::ensure_bind(&whole.join(".snap/snap1").join(uuid), &snapshot, true).unwrap();
    mounts::unmount_top(&whole).unwrap();
    assert_eq!(shown(&snapshot).path, format!("{parent}/.snap/snap1/{uuid}"));
    assert_eq!(std::fs::read(snapshot.join("file")).unwrap(), b"then");
    println!("usage of the snapshot: {:?}", filesystem::usage(&snapshot).unwrap());
    assert!(std::fs::write(snapshot.join("file"), "more").is_err());
    mounts::unmount_top(&snapshot).unwrap();

    // Why it is bound: the metadata server does not find a snapshot by its path.
    let (error, _) = cluster.fails(&cluster.source(&format!("{parent}/.snap/snap1/{uuid}")), &[]);
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
#[ignore = "make test-vm"]
fn a_fuse_mount_is_told_by_its_tag() {
    let cluster = cluster_or_skip!();
    let path = cluster.subvolume("fuse");
    let place = cluster.place("fuse");
    std::fs::create_dir(&place).unwrap();
    let name = format!("fsname={FUSE_TAG}cluster.vm.fuse");
    let words =
        ["--conf", &cluster.conf, "-n", "client.admin", "--client_mds_namespace=cephfs", "-r", &path, "-o", &name];
    common::run("ceph-fuse", &[&words[..], &[place.to_str().unwrap()]].concat());
    assert!(place.metadata().unwrap().ino() > 0);
    let expected =
        Shown { fsid: None, filesystem: None, path: "/".to_owned(), tag: Some("cluster.vm.fuse".to_owned()) };
    assert_eq!(shown(&place), expected);
    mounts::unmount_top(&place).unwrap();
}
