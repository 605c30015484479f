//! The commands that a person types, as a person types them: the real program, real volumes, and nothing left behind.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests start programs, and fail by panicking")]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

const BERTH: &str = env!("CARGO_BIN_EXE_berth");

/// Says why, and is true, where this can't be tried.
fn skipped() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: mounting needs root");
    }
    !root
}

/// A directory whose mounts, and whatever else is left in it, go away with it, also when a test fails.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("cli-").tempdir_in("/var/tmp").unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap()
    }

    /// An XFS of its own in it, which has reflink. `None`: this machine can't.
    fn mount_xfs(&self) -> Option<PathBuf> {
        let (image, disk) = (self.path().join("disk.img"), self.path().join("disk"));
        std::fs::create_dir(&disk).unwrap();
        std::fs::File::create(&image).unwrap().set_len(6 << 30).unwrap();
        let made = Command::new("mkfs.xfs").arg("-q").arg(&image).status().is_ok_and(|status| status.success());
        let mount = || Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&disk).status().unwrap().success();
        if !made || !mount() {
            println!("SKIPPED: this machine makes or mounts no XFS");
            return None;
        }
        Some(disk)
    }

    /// Lines of the mount table and attached images below this directory.
    fn traces(&self) -> Vec<String> {
        let below = self.path().display().to_string();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let loops = std::fs::read_dir("/sys/block")
            .unwrap()
            .filter_map(|entry| std::fs::read_to_string(entry.unwrap().path().join("loop/backing_file")).ok());
        mounts.lines().map(str::to_owned).chain(loops).filter(|line| line.contains(&below)).collect()
    }

    fn names(&self) -> Vec<String> {
        std::fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let below = self.path();
        // Programs that a failed test left: those whose arguments name this directory.
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let arguments = text(&std::fs::read(process.path().join("cmdline")).unwrap_or_default());
            let pid = process.file_name().to_str().and_then(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?));
            if let Some(pid) =
                pid.filter(|_| arguments.starts_with(BERTH) && arguments.contains(&*below.to_string_lossy()))
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
        for point in points.filter(|point| point.starts_with(&below)).collect::<Vec<_>>().iter().rev() {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
        // File systems' images are detached with their last mount; block volumes' are not.
        for entry in std::fs::read_dir("/sys/block").unwrap().flatten() {
            let image = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            if Path::new(&image).starts_with(&below) {
                let _ = Command::new("losetup").arg("-d").arg(Path::new("/dev").join(entry.file_name())).status();
            }
        }
    }
}

/// A driver on a pool in a folder; killed with the value.
struct Driver(Child);

impl Driver {
    fn serve(folder: &Path) -> (Self, PathBuf) {
        let (config, socket) = (folder.join("berth.yaml"), folder.join("run/csi.sock"));
        std::fs::create_dir(folder.join("pool")).unwrap();
        let text = format!(
            "pools: [{{name: a, path: {0}/pool, fallback: root, cap: 4Gi}}]\ndrivers: [{{backend: nvme, socket: {1}}}]\n",
            folder.display(),
            socket.display()
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let driver = Self(Command::new(BERTH).args(["serve", "--config"]).arg(&config).stderr(log).spawn().unwrap());
        wait_until(|| std::os::unix::net::UnixStream::connect(&socket).is_ok());
        (driver, config)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

fn wait_until(mut true_now: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !true_now() {
        assert!(begun.elapsed() < Duration::from_secs(30), "waited in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs to the end and asserts the exit code; standard output and standard error.
fn run(command: &mut Command, code: i32) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (out, err) = (text(&stdout), text(&stderr));
    assert_eq!(status.code(), Some(code), "{command:?}\n{out}\n{err}");
    (out, err)
}

fn quickstart(folder: &Folder) -> Command {
    let mut command = Command::new(BERTH);
    command.args(["quickstart", "--size", "512Mi", "--pool"]).arg(folder.path());
    command
}

#[test]
fn a_quickstart_shows_every_step_and_leaves_nothing() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    let mine = folder.path().join("mine");
    std::fs::create_dir(&mine).unwrap();
    std::fs::set_permissions(&mine, PermissionsExt::from_mode(0o1777)).unwrap();
    let (out, _) = run(quickstart(&folder).arg("--path").arg(&mine), 0);
    for line in ["start the driver", "create a volume", "mount it", "SHA-256 is right", "df says"] {
        assert!(out.contains(line), "{line}: {out}");
    }
    assert_eq!(out.lines().count(), 16, "{out}");
    assert!(!out.contains('\x1b'), "colours are for terminals");
    assert_eq!(folder.traces(), [""; 0]);
    assert_eq!(folder.names(), ["mine"]);
    assert_eq!(mine.metadata().unwrap().mode() & 0o7777, 0o1777, "what was there is as it was");
}

#[test]
fn a_kept_quickstart_can_be_looked_at_and_is_ended_by_the_command_that_it_prints() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    let path = folder.path().join("deep/er/data");
    let (out, _) = run(quickstart(&folder).arg("--keep").arg("--path").arg(&path), 0);
    let end: Vec<_> = out.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(path.join("random.bin").metadata().unwrap().len(), 256 << 20);
    let look: Vec<_> =
        out.lines().find(|line| line.contains("volume list")).unwrap().split_whitespace().skip(2).collect();
    let (list, _) = run(Command::new(look[0]).args(&look[1..]), 0);
    assert!(list.contains("1Gi"), "{list}");
    // A program that only has the same number is left alone, and the driver's death changes nothing.
    let work = PathBuf::from(end.last().unwrap());
    let state: Value = serde_json::from_slice(&std::fs::read(work.join("state.json")).unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(state["pid"].as_i64().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let mut bystander = Command::new("sleep").arg("60").spawn().unwrap();
    let mut forged = state.clone();
    forged["pid"] = bystander.id().into();
    std::fs::write(work.join("state.json"), forged.to_string()).unwrap();
    run(Command::new(end[0]).args(&end[1..]), 0);
    assert!(bystander.try_wait().unwrap().is_none(), "the bystander was ended");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_eq!(folder.traces(), [""; 0]);
    assert_eq!(folder.names(), [""; 0]);
    let (_, err) = run(Command::new(end[0]).args(&end[1..]), 1);
    assert!(err.contains("cannot find"), "{err}");
}

#[test]
fn an_interrupted_quickstart_cleans_up_and_fails() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    let path = folder.path().join("data");
    let mut command = quickstart(&folder);
    command.arg("--path").arg(&path).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    wait_until(|| path.join("random.bin").exists());
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(text(&ended.stderr).contains("interrupted"), "{}", text(&ended.stderr));
    assert_eq!(folder.traces(), [""; 0]);
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn a_failed_step_is_told_with_the_drivers_words_and_cleaned_up() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    // The driver finds no mkfs.
    let tools = folder.path().join("bin");
    std::fs::create_dir(&tools).unwrap();
    let (out, err) = run(quickstart(&folder).env("PATH", &tools), 1);
    assert!(out.contains("failed") && err.contains("mkfs.xfs") && err.contains("last words"), "{out}{err}");
    assert_eq!(folder.traces(), [""; 0]);
    assert_eq!(folder.names(), ["bin"]);
}

#[test]
fn without_root_a_quickstart_refuses_and_touches_nothing() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let berth = folder.path().join("berth");
    std::fs::copy(BERTH, &berth).unwrap();
    std::fs::set_permissions(&berth, PermissionsExt::from_mode(0o755)).unwrap();
    let open = folder.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o777)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&berth).arg("quickstart");
    let (out, err) = run(command.arg("--pool").arg(&open).env("TMPDIR", &open), 1);
    assert_eq!(out, "");
    assert!(err.contains("needs root") && err.contains("nothing has been touched"), "{err}");
    assert_eq!(std::fs::read_dir(&open).unwrap().count(), 0);
}

#[test]
fn a_volume_is_made_mounted_grown_unmounted_and_deleted_by_hand() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    let (driver, config) = Driver::serve(&folder.path());
    let staging = folder.path().join("staging");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(BERTH);
        command.arg("volume").args(arguments).arg("--config").arg(&config).arg("--staging").arg(&staging);
        command.current_dir(folder.path());
        command
    };
    let json =
        |arguments: &[&str]| -> Value { serde_json::from_str(&run(command(arguments).arg("--json"), 0).0).unwrap() };

    let made = json(&["create", "data", "--size", "512Mi"]);
    let id = made["id"].as_str().unwrap();
    assert_eq!(made["size"], 512 << 20);
    assert_eq!(json(&["create", "data", "--size", "512Mi"])["id"], id, "the same name again finds it");
    assert_eq!(json(&["list"])["volumes"][0]["id"], id);
    assert!(run(&mut command(&["list"]), 0).0.starts_with("ID "));

    // Two places, one of them read-only and relative; the volume stays staged until the last one is gone.
    let first = folder.path().join("new/first").display().to_string();
    assert_eq!(json(&["mount", id, &first, "--option", "noatime"])["path"], first);
    run(&mut command(&["mount", id, "second", "--read-only", "--option", "noatime"]), 0);
    std::fs::write(folder.path().join("new/first/file"), "words").unwrap();
    assert_eq!(std::fs::read(folder.path().join("second/file")).unwrap(), b"words");
    assert!(std::fs::write(folder.path().join("second/file"), "").is_err());
    let shown = json(&["show", id]);
    assert_eq!(shown["problems"], serde_json::json!([]));
    assert_eq!(shown["published"].as_array().unwrap().len(), 2);
    let (_, err) = run(&mut command(&["delete", id]), 1);
    assert!(err.contains(&format!("berth: cannot delete {id}: ")) && err.contains("(FAILED_PRECONDITION)"), "{err}");
    assert_eq!(json(&["grow", id, &first, "1Gi"])["size"], 1 << 30);
    json(&["unmount", id, &first]);
    assert!(staging.exists() && !Path::new(&first).exists());
    json(&["unmount", id, "second"]);
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 0);
    assert_eq!(folder.traces(), [""; 0]);

    // A device.
    let block = json(&["create", "raw", "--size", "64Mi", "--block"]);
    let block = block["id"].as_str().unwrap();
    json(&["mount", block, "device", "--block"]);
    json(&["grow", block, "device", "128Mi"]);
    json(&["unmount", block, "device"]);

    let (_, err) = run(&mut command(&["create", "huge", "--size", "9Gi"]), 1);
    assert!(err.starts_with("berth: cannot create huge: ") && err.contains("(RESOURCE_EXHAUSTED)"), "{err}");
    let (_, err) = run(&mut command(&["mount", "vol-nobody", "nowhere"]), 1);
    assert!(err.contains("(NOT_FOUND)"), "{err}");
    for id in [id, block] {
        assert_eq!(json(&["delete", id])["deleted"], true);
        let (out, _) = run(&mut command(&["delete", id]), 0);
        assert!(out.contains("there is no volume"), "{out}");
    }
    assert_eq!(json(&["list"])["volumes"], serde_json::json!([]));
    drop(driver);
    let (_, err) = run(&mut command(&["list"]), 1);
    assert!(err.contains("is the driver running"), "{err}");
}

#[test]
fn orphans_are_deleted_one_after_the_other_and_only_on_a_list_that_can_be_trusted() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    let (_driver, config) = Driver::serve(&folder.path());
    let staging = folder.path().join("staging");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(BERTH);
        command.arg("volume").args(arguments).arg("--config").arg(&config).arg("--staging").arg(&staging);
        command
    };
    let create = |name: &str| -> String {
        let (out, _) = run(command(&["create", name, "--size", "512Mi"]).arg("--json"), 0);
        serde_json::from_str::<Value>(&out).unwrap()["id"].as_str().unwrap().to_owned()
    };
    let [kept, used, gone] = ["kept", "used", "gone"].map(create);
    let path = folder.path().join("used").display().to_string();
    run(&mut command(&["mount", &used, &path]), 0);
    let ids = || {
        let (out, _) = run(command(&["list"]).arg("--json"), 0);
        let all: Value = serde_json::from_str(&out).unwrap();
        let mut ids: Vec<_> =
            all["volumes"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids
    };
    let all = ids();

    // Nothing is done with a list that is empty, of other volumes, no list, or old.
    let known = folder.path().join("known");
    let known_text = known.display().to_string();
    for (text, why) in [
        (String::new(), "no volume of this driver is known, of 3 that it has"),
        ("vol-of-somebody\n".to_owned(), "none of the driver's 3 volumes is among the 1 known ones"),
        (format!("NAME  HANDLE\n{kept}"), "is no volume handle"),
        (r#"{"kind": "List", "items": []}"#.to_owned(), "say --none-known"),
    ] {
        std::fs::write(&known, &text).unwrap();
        let (out, err) = run(&mut command(&["orphans", "--known", &known_text, "--delete"]), 1);
        assert!(out.is_empty() && err.contains(why), "{text}: {out}{err}");
    }
    std::fs::write(&known, format!("{kept}\n")).unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    std::fs::File::options().write(true).open(&known).unwrap().set_modified(old).unwrap();
    let (_, err) = run(&mut command(&["orphans", "--known", &known_text, "--delete"]), 1);
    assert!(err.contains("written 60 minutes ago"), "{err}");
    let (_, err) = run(&mut command(&["orphans"]), 2);
    assert!(err.contains("--known"), "{err}");
    assert_eq!(ids(), all);

    // A list is only a list; one that can't be deleted does not keep the others, and is told.
    let (out, _) = run(&mut command(&["orphans", "--known", &known_text]), 0);
    assert!(out.starts_with("ID ") && out.contains(&used) && out.contains(&gone) && !out.contains(&kept), "{out}");
    assert_eq!(ids(), all);
    std::fs::write(&known, format!("{kept}\n")).unwrap();
    let (out, err) = run(&mut command(&["orphans", "--known", &known_text, "--delete"]), 1);
    assert!(out.contains(&format!("\n{gone} is deleted\n")), "{out}");
    assert!(out.contains(&format!("cannot delete {used}: ")) && out.contains("(FAILED_PRECONDITION)"), "{out}");
    assert!(err.contains("1 of 2 orphans could not be deleted"), "{err}");
    let mut left = vec![kept.clone(), used.clone()];
    left.sort();
    assert_eq!(ids(), left);
    run(&mut command(&["unmount", &used, &path]), 0);
    let (out, _) = run(command(&["orphans", "--none-known", "--delete"]).arg("--json"), 0);
    let deleted: Value = serde_json::from_str(&out).unwrap();
    let deleted = deleted["orphans"].as_array().unwrap().iter();
    assert!(deleted.clone().count() == 2 && deleted.clone().all(|one| one["deleted"] == true), "{out}");
    assert_eq!(ids(), [""; 0]);
    assert_eq!(folder.traces(), [""; 0]);
}

#[test]
fn where_the_pool_has_reflink_a_snapshot_outlives_its_volume_and_a_quickstart_skips_nothing() {
    if skipped() {
        return;
    }
    let folder = Folder::new();
    let Some(disk) = folder.mount_xfs() else { return };
    let before = folder.traces();
    let (out, _) = run(Command::new(BERTH).args(["quickstart", "--size", "512Mi", "--pool"]).arg(&disk), 0);
    assert_eq!(out.matches("SHA-256 is right").count(), 4, "{out}");
    assert!(!out.contains("skipped") && out.contains("data-restored"), "{out}");
    assert_eq!(folder.traces(), before);
    assert_eq!(std::fs::read_dir(&disk).unwrap().count(), 0);

    let (_driver, config) = Driver::serve(&disk);
    let command = |arguments: &[&str]| {
        let mut command = Command::new(BERTH);
        command.arg("volume").args(arguments).arg("--config").arg(&config).arg("--json");
        run(&mut command, 0).0
    };
    let id = |out: &str| serde_json::from_str::<Value>(out).unwrap()["id"].as_str().unwrap().to_owned();
    let volume = id(&command(&["create", "data", "--size", "512Mi"]));
    let snapshot = id(&command(&["snapshot", &volume, "first"]));
    command(&["delete", &volume]);
    let listed: Value = serde_json::from_str(&command(&["list", "--snapshots"])).unwrap();
    assert_eq!(listed["snapshots"][0]["id"], snapshot.as_str());
    assert_eq!(id(&command(&["show", "--snapshot", &snapshot])), snapshot);
    let restored: Value = serde_json::from_str(&command(&["create", "again", "--from-snapshot", &snapshot])).unwrap();
    assert_eq!(restored["source"]["snapshot"], snapshot.as_str());
    command(&["delete", "--snapshot", &snapshot]);
    command(&["delete", restored["id"].as_str().unwrap()]);
    assert_eq!(folder.traces(), before);
}
