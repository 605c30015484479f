//! The mounter and its workers as real processes: who holds what, who may do what, and who may die.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth::error::ErrorKind;
use berth::host::{fuse, mounts};
use berth::mounter::client::{Mounter, Status};
use berth::mounter::start::{Start, start_detached, stop};
use berth::objectfs::settings::{Checksums, Consistency, Credentials, Endpoint, Settings};
use common::faulty::{Fault, Faulty};
use common::mount::{Service, Tree};
use common::{Client, GI, Use, is_root, map, mounts_below};

const BERTH: &str = env!("CARGO_BIN_EXE_berth");
const DEADLINE: Duration = Duration::from_secs(60);
/// Not the usual ones: the range is what decides.
const USERS: std::ops::RangeInclusive<u32> = 1_700_000_000..=1_700_000_999;

/// A bucket, a mounter, and clean-up that always runs.
struct Lab {
    tree: Tree,
    mounter: Option<Child>,
}

impl Lab {
    /// `None`, and why is said: this machine can't.
    fn new() -> Option<Self> {
        Self::on(Service::Minio)
    }

    fn on(service: Service) -> Option<Self> {
        let tree = Tree::new(service)?;
        // Workers have to get to their folders.
        std::fs::set_permissions(tree.dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let mut lab = Self { tree, mounter: None };
        lab.start();
        Some(lab)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tree.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/m.sock")
    }

    fn client(&self) -> Mounter {
        Mounter::new(self.socket(), DEADLINE)
    }

    fn start(&mut self) {
        let log = File::options().append(true).create(true).open(self.path("log")).unwrap();
        let mut command = Command::new(BERTH);
        command.args(["mounter", "--log-level", "info,berth=debug", "--socket"]).arg(self.socket());
        command.arg("--uids").arg(format!("{}-{}", USERS.start(), USERS.end()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.mounter = Some(command.spawn().unwrap());
        eventually("the mounter answers", || self.client().list().ok());
    }

    fn kill(&mut self) {
        let mut mounter = self.mounter.take().unwrap();
        mounter.kill().unwrap();
        mounter.wait().unwrap();
    }

    fn settings(&self, id: &str) -> Settings {
        let service = self.tree.endpoint.as_ref().unwrap();
        Settings {
            id: id.to_owned(),
            endpoint: Endpoint {
                url: Some(service.url.clone()),
                region: service.region.clone(),
                path_style: true,
                ca: None,
                checksums: Checksums::WhenRequired,
                anonymous: false,
                patience: 30_000,
                stall: 10_000,
            },
            credentials: Some(Credentials {
                access_key: service.access.clone(),
                secret_key: service.secret.clone(),
                session_token: None,
            }),
            bucket: self.tree.bucket.clone(),
            prefix: self.tree.key(&format!("{id}/")),
            read_only: false,
            consistency: Consistency::Strict,
            uid: 0,
            gid: 0,
            file_mode: 0o644,
            dir_mode: 0o755,
            max_age: 1000,
            staging: self.path("staging"),
            cache: Some(self.path("cache")),
            cache_size: 1 << 30,
            memory: 32 << 20,
            limit: None,
        }
    }

    /// As a driver does it: mounts, hands the descriptor over, and forgets about it.
    fn mount(&self, settings: &Settings) -> PathBuf {
        let path = self.path(&format!("mnt-{}", settings.id));
        std::fs::create_dir_all(&path).unwrap();
        let descriptor = fuse::mount("s3://bucket", &path, &fuse::MountOptions::default()).unwrap();
        self.client().serve(settings, &path, descriptor).unwrap();
        path
    }

    fn status(&self, id: &str) -> Status {
        self.client().status(id).unwrap().unwrap()
    }

    fn worker(&self, id: &str) -> u32 {
        self.status(id).worker.unwrap()
    }

    /// What the bucket has under a key of this volume.
    fn object(&self, id: &str, name: &str) -> Option<Vec<u8>> {
        self.tree.raw().get(&self.tree.key(&format!("{id}/{name}")))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the mounter and its workers said:\n{}", self.log());
        }
        let workers: Vec<_> =
            self.client().list().unwrap_or_default().into_iter().filter_map(|mount| mount.worker).collect();
        for mount in mounts_below(self.tree.dir.path()).iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
        if let Some(mut mounter) = self.mounter.take() {
            let _ = mounter.kill();
            let _ = mounter.wait();
        }
        for pid in workers {
            signal(pid, rustix::process::Signal::KILL);
        }
    }
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

#[track_caller]
fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Writes files one after the other, each with fsync and read back, until told to stop.
struct Writer {
    stop: Arc<AtomicBool>,
    files: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<std::io::Result<u64>>,
}

impl Writer {
    fn start(folder: &Path) -> Self {
        let (stop, files) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = std::thread::spawn({
            let (stop, files, folder) = (stop.clone(), files.clone(), folder.to_owned());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let number = files.load(Ordering::Relaxed);
                    let path = folder.join(format!("file-{number}"));
                    let mut file = File::create(&path)?;
                    file.write_all(&number.to_le_bytes().repeat(5000))?;
                    file.sync_all()?;
                    drop(file);
                    assert_eq!(std::fs::read(&path)?, number.to_le_bytes().repeat(5000));
                    files.store(number + 1, Ordering::Relaxed);
                }
                Ok(files.load(Ordering::Relaxed))
            }
        });
        Self { stop, files, thread }
    }

    /// Waits until it has written so many more.
    #[track_caller]
    fn goes_on(&self, more: u64) {
        let wanted = self.files.load(Ordering::Relaxed) + more;
        eventually("the program goes on", || {
            (self.files.load(Ordering::Relaxed) >= wanted || self.thread.is_finished()).then_some(())
        });
        assert!(!self.thread.is_finished(), "the program has ended");
    }

    fn end(self) -> std::io::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// > A mounter may be killed and replaced under live mounts: programs notice nothing, and the next one has the same workers.
#[test]
fn mounts_outlive_their_mounter() {
    let Some(mut lab) = Lab::new() else { return };
    let path = lab.mount(&lab.settings("one"));
    let worker = lab.worker("one");
    let writer = Writer::start(&path);
    writer.goes_on(2);
    for _ in 0..3 {
        lab.kill();
        writer.goes_on(2);
        lab.start();
        assert_eq!(lab.worker("one"), worker);
        writer.goes_on(2);
    }
    let files = writer.end().unwrap();
    assert!(files > 12);
    // SIGTERM to the worker ends nothing.
    signal(worker, rustix::process::Signal::TERM);
    std::fs::write(path.join("after"), "all the same").unwrap();
    assert_eq!(lab.worker("one"), worker);
    mounts::unmount_top(&path).unwrap();
    lab.client().ended("one").unwrap();
    assert!(lab.client().status("one").unwrap().is_none() && !is_alive(worker));
    assert_eq!(lab.object("one", "after").unwrap(), b"all the same");
    assert_eq!(lab.object("one", &format!("file-{}", files - 1)).unwrap().len(), 40_000);
    assert!(!lab.path("staging/one").exists(), "nothing is staged any more");
}

/// > What was staged by a worker that died is uploaded by another one; programs get an error instead of waiting for ever, until
/// > the volume is mounted again.
#[test]
fn a_dead_worker_is_noticed_and_its_staged_files_are_uploaded() {
    let Some(lab) = Lab::new() else { return };
    let settings = lab.settings("one");
    let path = lab.mount(&settings);
    std::fs::write(path.join("closed"), "in the bucket").unwrap();
    let mut open = File::create(path.join("open")).unwrap();
    open.write_all(&b"staged ".repeat(100_000)).unwrap();
    let worker = lab.worker("one");
    signal(worker, rustix::process::Signal::KILL);
    eventually("the death is noticed", || lab.status("one").worker.is_none().then_some(()));
    let error = std::fs::metadata(path.join("closed")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc_enotconn()), "{error}");
    eventually("the staged file is uploaded", || {
        lab.object("one", "open").filter(|object| *object == b"staged ".repeat(100_000))
    });
    drop(open);
    // Nobody has to know: it can be unmounted and mounted again.
    mounts::detach(&path).unwrap();
    lab.client().ended("one").unwrap();
    assert!(lab.client().status("one").unwrap().is_none());
    let path = lab.mount(&settings);
    assert_eq!(std::fs::read(path.join("open")).unwrap(), b"staged ".repeat(100_000));
    assert_eq!(std::fs::read(path.join("closed")).unwrap(), b"in the bucket");
    assert_ne!(lab.worker("one"), worker);
}

/// > So is the death of one whose thread waits in the kernel for a directory that a program's rename holds.
#[test]
fn a_worker_that_is_killed_while_it_tells_the_kernel_something_ends() {
    let Some(lab) = Lab::new() else { return };
    let service = Faulty::start(lab.tree.endpoint.as_ref().unwrap());
    let mut settings = lab.settings("one");
    settings.endpoint.url = Some(service.url.clone());
    let path = lab.mount(&settings);
    let directory = path.join("directory");
    std::fs::create_dir(&directory).unwrap();
    for name in ["moved", "there", "goes"] {
        std::fs::write(directory.join(name), name).unwrap();
    }
    // The kernel holds the directory from here on.
    service.rule(|asked| if asked.writes() { Fault::Hold } else { Fault::None });
    let renaming = std::thread::spawn({
        let directory = directory.clone();
        move || std::fs::rename(directory.join("moved"), directory.join("elsewhere"))
    });
    eventually("the rename waits", || (service.faults() > 0).then_some(()));
    let worker = lab.worker("one");
    lab.tree.raw().delete(&lab.tree.key("one/directory/goes"));
    let is_telling = || {
        let threads = std::fs::read_dir(format!("/proc/{worker}/task")).unwrap().flatten();
        let mut states = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
        states.any(|state| state.contains("(fuse-notices) D") || state.contains("(fuse-notices) S"))
    };
    eventually("the worker sees what has gone, and tells", || {
        // Asks without the directory's lock: the name is known.
        let _ = std::fs::metadata(directory.join("there"));
        is_telling().then_some(())
    });
    signal(worker, rustix::process::Signal::KILL);
    eventually("the death is noticed", || lab.status("one").worker.is_none().then_some(()));
    renaming.join().unwrap().unwrap_err();
    assert!(!is_alive(worker));
}

fn libc_enotconn() -> i32 {
    rustix::io::Errno::NOTCONN.raw_os_error()
}

/// > A worker has no capability, no other group, no right to get any, no descriptor but its own, and credentials are in nobody's
/// > arguments or environment.
#[test]
fn a_worker_may_do_nothing_but_its_work() {
    let Some(lab) = Lab::new() else { return };
    let path = lab.mount(&lab.settings("one"));
    std::fs::write(path.join("file"), "contents").unwrap();
    let worker = lab.worker("one");
    let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:"))).unwrap();
        line.split_whitespace().collect::<Vec<_>>()
    };
    for name in ["Uid", "Gid"] {
        let ids: Vec<u32> = field(name).iter().map(|id| id.parse().unwrap()).collect();
        assert!(ids.iter().all(|id| USERS.contains(id) && *id == ids[0]), "{name} {ids:?}");
    }
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(name), ["0000000000000000"], "{name}");
    }
    assert_eq!((field("Groups"), field("NoNewPrivs"), field("Umask")), (vec![], vec!["1"], vec!["0077"]));
    let link = |name: &str| std::fs::read_link(format!("/proc/{worker}/{name}")).unwrap();
    assert_eq!(link("cwd"), Path::new("/"));
    let stat = std::fs::read_to_string(format!("/proc/{worker}/stat")).unwrap();
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().to_owned();
    assert_eq!(session, worker.to_string(), "it has a session of its own");
    let limits = std::fs::read_to_string(format!("/proc/{worker}/limits")).unwrap();
    let limit = |name: &str| limits.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(limit("Max core file size").split_whitespace().nth(4) == Some("0"));
    let descriptors: Vec<_> = limit("Max open files").split_whitespace().map(str::to_owned).collect();
    assert_eq!(descriptors[3], descriptors[4], "all that may be had");
    for entry in std::fs::read_dir(format!("/proc/{worker}/fd")).unwrap() {
        let Ok(target) = std::fs::read_link(entry.unwrap().path()) else { continue };
        let target = target.to_str().unwrap().to_owned();
        let own =
            ["/dev/null", "/dev/fuse", "socket:", "anon_inode:", "pipe:"].iter().any(|own| target.starts_with(own))
                || target.starts_with(lab.path("staging/one").to_str().unwrap())
                || target.starts_with(lab.path("cache").to_str().unwrap())
                || target == lab.path("log").to_str().unwrap();
        assert!(own, "a worker has {target}");
    }
    let mounter = lab.mounter.as_ref().unwrap().id();
    let secret = lab.tree.endpoint.as_ref().unwrap().secret.as_str();
    for pid in [worker, mounter] {
        for name in ["cmdline", "environ"] {
            let bytes = std::fs::read(format!("/proc/{pid}/{name}")).unwrap();
            assert!(!String::from_utf8_lossy(&bytes).contains(secret), "{name} of {pid}");
        }
    }
    assert!(!lab.log().contains(secret));
    for (socket, mode) in [(lab.socket(), 0o600), (lab.path("run"), 0o700), (lab.path("run/workers"), 0o700)] {
        assert_eq!(socket.metadata().unwrap().mode() & 0o7777, mode, "{}", socket.display());
    }
}

/// > Two volumes' workers are two users: neither reads what the other has staged. They share the cache, into which nobody else
/// > gets.
#[test]
fn workers_can_not_read_each_others_files() {
    let Some(lab) = Lab::new() else { return };
    let mut users = Vec::new();
    for id in ["one", "two"] {
        let path = lab.mount(&lab.settings(id));
        let mut file = File::create(path.join("file")).unwrap();
        file.write_all(&[1; 100_000]).unwrap();
        // Open, so that it stays staged for now.
        users.push((lab.path("staging").join(id), file));
    }
    let owner = |folder: &Path| folder.metadata().unwrap().uid();
    let (one, two) = (owner(&users[0].0), owner(&users[1].0));
    assert!(one != two && USERS.contains(&one) && USERS.contains(&two));
    assert_eq!(users[0].0.metadata().unwrap().mode() & 0o7777, 0o700);
    let list = |user: u32, folder: &Path| {
        let status =
            Command::new("ls").arg(folder).uid(user).gid(user).stderr(Stdio::null()).stdout(Stdio::null()).status();
        status.unwrap().success()
    };
    for (folder, may, may_not) in [(&users[0].0, one, two), (&users[1].0, two, one)] {
        assert!(list(may, folder) && !list(may_not, folder));
    }
    assert!(!list(one, &lab.path("staging")) && !list(one, &lab.path("run")));
    let cache = lab.path("cache");
    lab.tree.raw().put(&lab.tree.key("one/large"), &[3; 5 << 20], &[]);
    assert_eq!(std::fs::read(lab.path("mnt-one/large")).unwrap().len(), 5 << 20);
    eventually("a worker caches", || cache.read_dir().unwrap().next().map(drop));
    let stat = cache.metadata().unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.gid()), (0o1730, *USERS.start()));
    let enters = |user: u32, group: u32| {
        let mut command = Command::new("test");
        command.arg("-x").arg(&cache).uid(user).gid(group).status().unwrap().success()
    };
    assert!(enters(two, *USERS.start()) && !enters(4242, 4242));
}

/// > The same mount handed over again is served already; one with other settings is refused; other credentials are taken over.
#[test]
fn a_mount_is_served_once() {
    let Some(lab) = Lab::new() else { return };
    let settings = lab.settings("one");
    let path = lab.mount(&settings);
    let worker = lab.worker("one");
    let null = || File::open("/dev/null").unwrap().into();
    lab.client().serve(&settings, &path, null()).unwrap();
    assert_eq!(lab.worker("one"), worker);
    let other = Settings { read_only: true, ..settings.clone() };
    assert_eq!(lab.client().serve(&other, &path, null()).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(
        lab.client().renew("two", settings.credentials.as_ref().unwrap()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    lab.client().renew("one", settings.credentials.as_ref().unwrap()).unwrap();
    assert!(lab.client().status("two").unwrap().is_none());
    lab.client().ended("two").unwrap();
    // Not unmounted: it does not end.
    let hasty = Mounter::new(lab.socket(), Duration::from_millis(500));
    let error = hasty.ended("one").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutcomeUnknown, "{error}");
    assert!(error.to_string().contains("still mounted"), "{error}");
}

/// A further key of the lab's S3 user, gone with the value.
struct Key(Credentials);

impl Key {
    fn new(name: &str) -> Self {
        let name = format!("{name}{}", std::process::id());
        Self::admin(&["create", "--access-key", &name, "--secret-key", &name]);
        Self(Credentials { access_key: name.clone(), secret_key: name, session_token: None })
    }

    fn admin(arguments: &[&str]) {
        let conf = Path::new(&std::env::var_os("BERTH_LAB").unwrap()).join("ceph.conf");
        let mut command = Command::new("radosgw-admin");
        command.arg("--conf").arg(conf).args(["key", arguments[0], "--uid=berth", "--key-type=s3"]);
        assert!(command.args(&arguments[1..]).output().unwrap().status.success(), "{arguments:?}");
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        Self::admin(&["rm", "--access-key", &self.0.access_key]);
    }
}

/// > Keys that the service does not take any more are EACCES; with new ones, which the driver hands over when kubelet brings
/// > them, the mount goes on, and nothing is lost.
#[test]
fn a_mount_goes_on_with_new_credentials() {
    let Some(lab) = Lab::on(Service::Rgw) else { return };
    let old = Key::new("old");
    let path = lab.mount(&Settings { credentials: Some(old.0.clone()), max_age: 100, ..lab.settings("one") });
    let file = File::create(path.join("file")).unwrap();
    drop(old);
    let refused = eventually("the old key is refused", || {
        file.write_all_at(b"staged", 0).unwrap();
        file.sync_all().err()
    });
    assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::ACCESS.raw_os_error()), "{refused}");
    let worker = lab.worker("one");
    let new = Key::new("new");
    lab.client().renew("one", &new.0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(lab.object("one", "file").unwrap(), b"staged");
    std::fs::write(path.join("another"), "with the new key").unwrap();
    assert_eq!(lab.worker("one"), worker);
    // Unmounted with a key that is good no more: the next stage brings one, and what is staged is uploaded with it.
    drop(new);
    eventually("the new key is refused, too", || {
        file.write_all_at(b"left", 0).unwrap();
        file.sync_all().err()
    });
    drop(file);
    mounts::unmount_top(&path).unwrap();
    eventually("its end waits", || lab.status("one").worker.is_none().then_some(()));
    let newest = Key::new("newest");
    lab.client().renew("one", &newest.0).unwrap();
    lab.client().ended("one").unwrap();
    assert_eq!(lab.object("one", "file").unwrap(), b"lefted");
}

/// > Who may not be root or the same user is not listened to; what can't be opened says why, and leaves no process.
#[test]
fn what_can_not_be_served_is_said_and_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    let path = lab.path("mnt");
    std::fs::create_dir(&path).unwrap();
    for (settings, kind) in [
        (Settings { id: "../x".to_owned(), ..lab.settings("one") }, Some(ErrorKind::Invalid)),
        (Settings { bucket: "no-such-bucket".to_owned(), ..lab.settings("one") }, None),
    ] {
        let descriptor = fuse::mount("s3://bucket", &path, &fuse::MountOptions::default()).unwrap();
        let error = lab.client().serve(&settings, &path, descriptor).unwrap_err();
        assert!(kind.is_none_or(|kind| error.kind() == kind), "{error}");
        mounts::detach(&path).unwrap();
        assert!(lab.client().list().unwrap().is_empty());
    }
    assert_eq!(std::fs::read_dir(lab.path("run/workers")).unwrap().count(), 0);
    assert_eq!(children(lab.mounter.as_ref().unwrap().id()), Vec::<u32>::new());
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// > Of many who start a mounter at the same time one does; it outlives them all, and a second one is refused.
#[test]
fn one_mounter_is_started_however_many_want_one() {
    skip_unless!(is_root(), "needs root");
    let dir = tempfile::Builder::new().prefix("berth-").tempdir().unwrap();
    let start = Start { program: BERTH.into(), ..Start::at(dir.path().join("run/m.sock")) };
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let start = start.clone();
            std::thread::spawn(move || start_detached(&start, DEADLINE).unwrap())
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let log = std::fs::read_to_string(start.log()).unwrap();
    assert_eq!(log.matches("ready").count(), 1, "{log}");
    assert!(Mounter::new(&start.socket, DEADLINE).list().unwrap().is_empty());
    let second = Command::new(BERTH).arg("mounter").arg("--socket").arg(&start.socket).output().unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another mounter"));
    stop(&start.socket, DEADLINE).unwrap();
    assert!(!start.socket.exists());
    stop(&start.socket, DEADLINE).unwrap();
}

/// Stops the mounter that a driver has started, also when the test fails.
struct Started(PathBuf);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = stop(&self.0, DEADLINE);
    }
}

/// A driver that is to be started, and that starts a mounter, for a bucket of the tree's service.
fn driven(tree: &Tree, kind: &str, more: &str) -> (common::Lab, Started) {
    let service = tree.endpoint.as_ref().unwrap();
    let mut lab = common::Lab::bare();
    std::fs::set_permissions(lab.path("."), std::fs::Permissions::from_mode(0o711)).unwrap();
    let started = Started(lab.path("mounter/m.sock"));
    for (file, text) in [("access", &service.access), ("secret", &service.secret)] {
        std::fs::write(lab.path(file), text).unwrap();
    }
    let folder = lab.path("");
    let path = |name: &str| folder.join(name).display().to_string();
    lab.config.services = Some(format!(
        "services:\n  - {{name: main, kind: {kind}, url: '{}', buckets: [{}], accessKeyFile: {}, secretKeyFile: {}}}",
        service.url,
        tree.bucket,
        path("access"),
        path("secret")
    ));
    lab.config.extra = format!(
        "{more}\nmounter: {{start: true, socket: {}, staging: {}, cache: {}}}",
        started.0.display(),
        path("staging-of-files"),
        path("cache")
    );
    (lab, started)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// > What a mount left to upload when its keys ended is uploaded with those that the next stage brings.
#[test]
fn a_stage_brings_keys_for_what_is_still_to_be_uploaded() {
    let Some(tree) = Tree::new(Service::Rgw) else { return };
    let runtime = runtime();
    let (mut lab, started) = driven(&tree, "ceph-rgw", "deadlines: {command: 3s}");
    let secrets = |key: &Key| {
        let pair = [("accessKeyId", key.0.access_key.as_str()), ("secretAccessKey", key.0.secret_key.as_str())];
        [(); 2].map(|()| map(&pair))
    };
    let mut client = runtime.block_on(lab.start());
    let old = Key::new("ending");
    client.secrets = secrets(&old);
    let mut request = Client::request("left", GI, &Use::default());
    request.parameters = map(&[("bucket", &tree.bucket), ("consistency", "write-back")]);
    let id = runtime.block_on(client.try_create(request)).unwrap().volume_id;
    let mounted = runtime.block_on(client.mount(&lab, &id, "one", &Use::default()));
    let file = File::create(mounted.file("file")).unwrap();
    drop(old);
    eventually("the old key is refused", || {
        file.write_all_at(b"staged", 0).unwrap();
        file.sync_all().err()
    });
    drop(file);
    runtime.block_on(client.unpublish(&id, &mounted.target)).unwrap();
    let refused = runtime.block_on(client.unstage(&id, &mounted.staging)).unwrap_err();
    assert!(refused.message().contains("on its way"), "{refused}");
    let new = Key::new("coming");
    client.secrets = secrets(&new);
    let stage = || runtime.block_on(client.stage(&id, &mounted.staging, &Use::default())).ok();
    eventually("it is staged", stage);
    runtime.block_on(client.publish(&id, &mounted.staging, &mounted.target, &Use::default())).unwrap();
    assert_eq!(std::fs::read(mounted.file("file")).unwrap(), b"staged");
    runtime.block_on(client.remove(&mounted));
    assert!(Mounter::new(&started.0, DEADLINE).list().unwrap().is_empty());
}

/// > The driver may be killed, stay away and come back under live mounts: programs notice nothing.
#[test]
fn mounts_outlive_their_driver() {
    let Some(tree) = Tree::new(Service::Minio) else { return };
    let service = tree.endpoint.clone().unwrap();
    let runtime = runtime();
    let (mut lab, started) = driven(&tree, "minio", "");
    let secrets = || [(); 2].map(|()| map(&[("accessKeyId", &service.access), ("secretAccessKey", &service.secret)]));
    let mut client = runtime.block_on(lab.start());
    client.secrets = secrets();
    let mut request = Client::request("outlives", GI, &Use::default());
    request.parameters = map(&[("bucket", &tree.bucket)]);
    let id = runtime.block_on(client.try_create(request)).unwrap().volume_id;
    let mounted = runtime.block_on(client.mount(&lab, &id, "one", &Use::default()));
    let writer = Writer::start(mounted.file("x").parent().unwrap());
    writer.goes_on(2);
    for _ in 0..2 {
        lab.kill();
        writer.goes_on(3);
        client = runtime.block_on(lab.start());
        client.secrets = secrets();
        writer.goes_on(2);
    }
    let (out, _) = common::berth(
        &[
            "volume",
            "show",
            &id,
            "--socket",
            lab.path("run/csi.sock").to_str().unwrap(),
            "--mounter",
            started.0.to_str().unwrap(),
        ],
        0,
    );
    assert!(out.contains("uploads in flight") && out.contains("process "), "{out}");
    assert!(writer.end().unwrap() > 10);
    runtime.block_on(client.unmount(&mounted));
    assert!(Mounter::new(&started.0, DEADLINE).list().unwrap().is_empty());
    runtime.block_on(client.delete(&id)).unwrap();
}
