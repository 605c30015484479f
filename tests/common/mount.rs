//! Places for files: a mounted bucket, or a plain directory, which shows that what is expected of both is right.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::mounts_below;
use super::raw::{Endpoint, Raw};

/// What keeps the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// No service: a directory of this machine.
    Plain,
    Minio,
    /// Ceph's, of the lab that `scripts/test.sh` starts.
    Rgw,
    /// `s3s-fs`, in this process.
    Embedded,
}

impl Service {
    /// `None`, and why is said: this machine has none.
    pub fn endpoint(self) -> Option<Endpoint> {
        match self {
            Self::Plain => None,
            Self::Minio => minio(),
            Self::Rgw => rgw(),
            Self::Embedded => None,
        }
    }
}

/// Files below one prefix of one bucket, and all that mounts of it leave on this machine. Gone with the value.
pub struct Tree {
    pub service: Service,
    pub endpoint: Option<Endpoint>,
    pub bucket: String,
    /// Ends in `/`, or is empty.
    pub prefix: String,
    pub dir: tempfile::TempDir,
    raw: Option<Raw>,
}

/// How it is mounted.
#[derive(Clone, Debug)]
pub struct Options {
    /// Mounts of one node share the node's disk.
    pub node: String,
    pub write_back: bool,
    pub read_only: bool,
    pub limit: Option<u64>,
    /// Milliseconds.
    pub max_age: Option<u64>,
    /// Milliseconds.
    pub patience: Option<u64>,
    /// Milliseconds.
    pub stall: Option<u64>,
    /// Checksums with each transfer.
    pub checksums: bool,
    /// Instead of the service's own: a proxy's.
    pub url: Option<String>,
    /// Instead of the node's own directory for what is staged.
    pub staging: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            node: "a".to_owned(),
            write_back: false,
            read_only: false,
            limit: None,
            max_age: None,
            patience: None,
            stall: None,
            checksums: false,
            url: None,
            staging: None,
        }
    }
}

/// A mounted tree. Unmounted with the value.
pub struct Mount {
    pub path: PathBuf,
    pub node: PathBuf,
    process: Option<Child>,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Tree {
    /// A fresh one. `None`, and why is said: this machine can't.
    pub fn new(service: Service) -> Option<Self> {
        let prefix = format!("tree-{}/", COUNT.fetch_add(1, Ordering::Relaxed));
        Self::at(service, "berth-tests", &prefix)
    }

    /// A whole bucket, of its own.
    pub fn bucket(service: Service) -> Option<Self> {
        let bucket = format!("berth-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self::at(service, &bucket, "")
    }

    fn at(service: Service, bucket: &str, prefix: &str) -> Option<Self> {
        if !super::is_root() {
            println!("SKIPPED {}: needs root", module_path!());
            return None;
        }
        let endpoint = service.endpoint();
        if endpoint.is_none() && service != Service::Plain {
            return None;
        }
        // Programs run one after the other, but an RGW outlives them.
        let prefix = if prefix.is_empty() { String::new() } else { format!("{}/{prefix}", std::process::id()) };
        let raw = endpoint.as_ref().map(|endpoint| Raw::new(endpoint, bucket));
        if let Some(raw) = &raw {
            raw.make_bucket();
        }
        let dir = tempfile::Builder::new().prefix("berth-").tempdir().unwrap();
        Some(Self { service, endpoint, bucket: bucket.to_owned(), prefix, dir, raw })
    }

    pub fn is_plain(&self) -> bool {
        self.service == Service::Plain
    }

    /// The bucket, past the mount. Keys are whole.
    pub fn raw(&self) -> &Raw {
        self.raw.as_ref().unwrap()
    }

    /// The key of a path in the tree.
    pub fn key(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    pub fn mount(&self) -> Mount {
        self.mount_with(&Options::default())
    }

    /// The same tree on a node that has not seen it yet: what it shows is in the bucket.
    pub fn elsewhere(&self) -> Mount {
        let node = format!("elsewhere-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.mount_with(&Options { node, ..Options::default() })
    }

    pub fn mount_with(&self, options: &Options) -> Mount {
        self.try_mount_with(options).unwrap_or_else(|log| panic!("the mount did not come up:\n{log}"))
    }

    /// The log, if it fails.
    pub fn try_mount_with(&self, options: &Options) -> Result<Mount, String> {
        let node = self.dir.path().join(format!("node-{}", options.node));
        std::fs::create_dir_all(&node).unwrap();
        if self.is_plain() {
            let path = self.dir.path().join("plain");
            std::fs::create_dir_all(&path).unwrap();
            return Ok(Mount { path, node, process: None });
        }
        let path = self.dir.path().join(format!("mount-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&path).unwrap();
        let log = File::options().append(true).create(true).open(node.join("log")).unwrap();
        let mut command = self.command(options, &node, &path);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut mount = Mount { path, node, process: Some(command.spawn().unwrap()) };
        mount.wait_until_mounted()?;
        Ok(mount)
    }

    /// The same tree through s3fs. `None`, and why is said: this machine has none.
    pub fn mount_s3fs(&self) -> Option<Mount> {
        let node = self.dir.path().join("node-s3fs");
        let path = self.dir.path().join("mount-s3fs");
        std::fs::create_dir_all(&node).unwrap();
        std::fs::create_dir(&path).unwrap();
        let endpoint = self.endpoint.as_ref().unwrap();
        let log = File::create(node.join("log")).unwrap();
        let mut command = Command::new("s3fs");
        command.arg(format!("{}:/{}", self.bucket, self.prefix.trim_end_matches('/'))).arg(&path).arg("-f");
        command.args(["-o", &format!("url={},use_path_request_style,use_xattr,stat_cache_expire=1", endpoint.url)]);
        command.env("AWSACCESSKEYID", &endpoint.access).env("AWSSECRETACCESSKEY", &endpoint.secret);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let Ok(process) = command.spawn() else {
            println!("SKIPPED {}: no s3fs", module_path!());
            return None;
        };
        let mut mount = Mount { path, node, process: Some(process) };
        mount.wait_until_mounted().unwrap_or_else(|log| panic!("s3fs did not come up:\n{log}"));
        Some(mount)
    }

    fn command(&self, options: &Options, node: &Path, path: &Path) -> Command {
        let endpoint = self.endpoint.as_ref().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
        command.arg("mount").arg(format!("s3://{}/{}", self.bucket, self.prefix)).arg(path).arg("--foreground");
        command.args(["--endpoint", options.url.as_ref().unwrap_or(&endpoint.url)]);
        command.args(["--region", &endpoint.region, "--path-style"]);
        command.arg("--cache").arg(node.join("cache"));
        if options.write_back {
            command.args(["--consistency", "write-back"]);
        }
        if options.read_only {
            command.arg("--read-only");
        }
        if let Some(limit) = options.limit {
            command.args(["--limit", &limit.to_string()]);
        }
        if let Some(age) = options.max_age {
            command.args(["--max-age", &age.to_string()]);
        }
        if let Some(patience) = options.patience {
            command.args(["--patience", &patience.to_string()]);
        }
        if let Some(stall) = options.stall {
            command.args(["--stall", &stall.to_string()]);
        }
        command.args(["--checksums", if options.checksums { "when-supported" } else { "when-required" }]);
        command.arg("--staging").arg(options.staging.clone().unwrap_or_else(|| node.join("staging")));
        command.env("AWS_ACCESS_KEY_ID", &endpoint.access).env("AWS_SECRET_ACCESS_KEY", &endpoint.secret);
        command
    }
}

impl Mount {
    /// A path in it.
    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// What the node's processes have said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.node.join("log")).unwrap_or_default()
    }

    pub fn is_mounted(&self) -> bool {
        mounts_below(&self.path).iter().any(|place| Path::new(place) == self.path)
    }

    fn wait_until_mounted(&mut self) -> Result<(), String> {
        let end = Instant::now() + Duration::from_secs(120);
        while !self.is_mounted() {
            let ended = self.process.as_mut().unwrap().try_wait().unwrap();
            if ended.is_some() || Instant::now() > end {
                return Err(format!("{ended:?}\n{}", self.log()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Takes it away, and waits until the bucket has everything.
    pub fn unmount(mut self) {
        if let Some(mut process) = self.process.take() {
            super::run("umount", &[self.path.to_str().unwrap()]);
            let end = Instant::now() + Duration::from_secs(60);
            let status = loop {
                if let Some(status) = process.try_wait().unwrap() {
                    break status;
                }
                assert!(Instant::now() < end, "it does not end:\n{}", self.log());
                std::thread::sleep(Duration::from_millis(5));
            };
            assert!(status.success(), "{status}\n{}", self.log());
        }
    }

    /// All processes behind the mount: the one that was started, and its descendants.
    pub fn processes(&self) -> Vec<(i32, Vec<String>)> {
        let mut found = Vec::new();
        let mut parents: Vec<i32> = self.process.iter().map(|child| child.id().cast_signed()).collect();
        while let Some(pid) = parents.pop() {
            let Ok(process) = procfs::process::Process::new(pid) else { continue };
            found.push((pid, process.cmdline().unwrap_or_default()));
            for task in process.tasks().into_iter().flatten().flatten() {
                let children = std::fs::read_to_string(format!("/proc/{pid}/task/{}/children", task.tid));
                parents
                    .extend(children.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
            }
        }
        found
    }

    /// SIGKILL to everything behind the mount, and the dead mount is taken away.
    pub fn kill(mut self) {
        let pids: Vec<_> = self.processes().into_iter().map(|(pid, _)| pid).collect();
        for pid in pids.into_iter().filter_map(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        let mut process = self.process.take().unwrap();
        let _ = process.kill();
        let _ = process.wait();
        detach(&self.path);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("the mount's last words:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
        let pids: Vec<_> = self.processes().into_iter().map(|(pid, _)| pid).collect();
        let path = self.path.to_str().unwrap();
        let gone = Command::new("umount").arg(path).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        let end = Instant::now() + Duration::from_secs(if gone { 20 } else { 0 });
        while process.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        for pid in pids.into_iter().filter(|pid| is_berth(*pid)).filter_map(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        // One that has ended is not killed.
        let _ = process.kill();
        let _ = process.wait();
        detach(&self.path);
    }
}

fn is_berth(pid: i32) -> bool {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    program == Path::new(env!("CARGO_BIN_EXE_berth"))
}

fn detach(path: &Path) {
    for mount in mounts_below(path).iter().rev() {
        let _ = Command::new("umount").args(["-l", mount]).stderr(Stdio::null()).status();
    }
}

/// One for all tests of the program. A shell guards it: when the program ends, however it does, the shell's input ends,
/// and it takes server and folder away.
fn minio() -> Option<Endpoint> {
    static MINIO: OnceLock<Option<(Endpoint, Mutex<Child>)>> = OnceLock::new();
    let start = || {
        let home = std::env::var("HOME").unwrap_or_default();
        let cache = std::env::var("XDG_CACHE_HOME").unwrap_or(format!("{home}/.cache"));
        let program = PathBuf::from(cache).join("berth/bin/minio");
        if !program.exists() {
            println!("SKIPPED {}: no {}", module_path!(), program.display());
            return None;
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let dir = tempfile::Builder::new().prefix("berth-minio-").tempdir().unwrap().keep();
        let script = r#""$1" server --quiet --address "$2" "$3" >"$3.log" 2>&1 </dev/null & pid=$!
            cat >/dev/null; kill -9 $pid; wait $pid 2>/dev/null; rm -rf "$3" "$3.log""#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(program).arg(format!("127.0.0.1:{port}")).arg(&dir);
        command.env("MINIO_ROOT_USER", "tests").env("MINIO_ROOT_PASSWORD", "tests-secret").env("MINIO_BROWSER", "off");
        command.env("MINIO_UPDATE", "off");
        let guard = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while !answers(port) {
            assert!(Instant::now() < end, "MinIO does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        let endpoint = Endpoint {
            url: format!("http://127.0.0.1:{port}"),
            access: "tests".to_owned(),
            secret: "tests-secret".to_owned(),
            region: "us-east-1".to_owned(),
        };
        Some((endpoint, Mutex::new(guard)))
    };
    MINIO.get_or_init(start).as_ref().map(|(endpoint, _)| endpoint.clone())
}

/// Does it say that it is ready?
fn answers(port: u16) -> bool {
    use std::io::Read as _;
    let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    let asked = stream.write_all(b"GET /minio/health/ready HTTP/1.0\r\nHost: localhost\r\n\r\n");
    let mut answer = [0; 15];
    asked.is_ok() && stream.read_exact(&mut answer).is_ok() && answer.starts_with(b"HTTP/1.0 200 OK")
}

fn rgw() -> Option<Endpoint> {
    let dir = std::env::var_os("BERTH_LAB")?;
    let text = std::fs::read_to_string(Path::new(&dir).join("env")).unwrap();
    let get = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("export BERTH_LAB_{key}=")));
        line.map(|value| value.trim_matches(['\'', '"']).to_owned())
    };
    let Some(url) = get("S3_ENDPOINT") else {
        println!("SKIPPED {}: the lab has no RGW", module_path!());
        return None;
    };
    let (access, secret) = (get("S3_ACCESS_KEY").unwrap(), get("S3_SECRET_KEY").unwrap());
    Some(Endpoint { url, access, secret, region: "us-east-1".to_owned() })
}

/// A test on one service.
pub fn on(service: Service, test: fn(&Tree)) {
    if let Some(tree) = Tree::new(service) {
        test(&tree);
    }
}

/// Runs each test on every service, and those of the first list on a plain directory, too.
#[macro_export]
macro_rules! on_services {
    (and_plain: [$($both:ident),* $(,)?], only: [$($test:ident),* $(,)?]) => {
        mod plain {
            $(#[test] fn $both() { $crate::common::mount::on($crate::common::mount::Service::Plain, super::$both); })*
        }
        mod minio {
            $(#[test] fn $both() { $crate::common::mount::on($crate::common::mount::Service::Minio, super::$both); })*
            $(#[test] fn $test() { $crate::common::mount::on($crate::common::mount::Service::Minio, super::$test); })*
        }
        mod rgw {
            $(#[test] fn $both() { $crate::common::mount::on($crate::common::mount::Service::Rgw, super::$both); })*
            $(#[test] fn $test() { $crate::common::mount::on($crate::common::mount::Service::Rgw, super::$test); })*
        }
        mod embedded {
            $(#[test] fn $both() { $crate::common::mount::on($crate::common::mount::Service::Embedded, super::$both); })*
            $(#[test] fn $test() { $crate::common::mount::on($crate::common::mount::Service::Embedded, super::$test); })*
        }
    };
}
