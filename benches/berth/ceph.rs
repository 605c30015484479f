//! A Ceph cluster of its own to measure on, and the ways to reach it without the driver.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use berth::host::librados::{Connection, Failure, Librados, Target};
use berth::host::{Errno, command, processes};
use rustix::mount::UnmountFlags;
use serde_json::{Value, json};

use crate::driver::{Secrets, Setup};
use crate::lab::Lab;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/lab.sh");
/// Where the monitor listens, or the next free ports.
const PORT: &str = "43000";
const START: Duration = Duration::from_secs(90);
/// Daemons that use less of a processor than this, over that time, have nothing left to do.
const IDLE: f64 = 0.06;
const LOOK: Duration = Duration::from_millis(300);
/// So long a mount or its end may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Takes everything away when the benchmark has ended, however: its end of the pipe is closed then.
/// $1 is the folder below which all mounts are, $2 lab.sh, $3 the cluster's folder.
const KEEPER: &str = r#"
trap '' INT TERM HUP
cat >/dev/null
tac /proc/self/mounts | while read -r _ place type _; do
  case $type:$place in fuse*:"$1"/*) umount -l "$place" ;; esac
done
for process in /proc/[0-9]*; do
  [ "$(cat "$process/comm" 2>/dev/null)" = ceph-fuse ] || continue
  case $(tr '\0' '\n' <"$process/cmdline" | tail -n 1) in "$1"/*) kill -KILL "${process#/proc/}" ;; esac
done 2>/dev/null
exec "$2" down "$3"
"#;

/// The cluster, started when a row first wants it.
#[derive(Default)]
pub(crate) struct Ceph {
    cluster: Option<Result<Cluster, String>>,
}

impl Ceph {
    /// The cluster. `Err`: why this machine can't have one.
    pub(crate) fn cluster(&mut self, lab: &Lab) -> Result<Result<&Cluster, &str>> {
        if self.cluster.is_none() {
            let check = command::run(SCRIPT, &["check"], START);
            self.cluster = Some(match check.and_then(|()| command::run("ceph-fuse", &["--version"], START)) {
                Ok(()) => Ok(Cluster::start(lab)?),
                Err(error) => Err(error.to_string()),
            });
        }
        match &self.cluster {
            Some(Ok(cluster)) => Ok(Ok(cluster)),
            Some(Err(why)) => Ok(Err(why)),
            None => bail!("no cluster"),
        }
    }
}

/// A user and its key.
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) key: String,
    /// The key again.
    pub(crate) file: PathBuf,
}

/// A running cluster, with the file system `cephfs` and the group `csi`. Gone when dropped.
pub(crate) struct Cluster {
    folder: PathBuf,
    monitors: String,
    pub(crate) provisioner: User,
    pub(crate) node: User,
    keeper: Child,
    /// Held open for as long as the cluster is wanted.
    pipe: Option<ChildStdin>,
}

impl Cluster {
    fn start(lab: &Lab) -> Result<Self> {
        let folder = lab.path("cluster");
        // First of all: what it would have to take away may be there in a moment.
        #[expect(clippy::disallowed_methods, reason = "it has to outlive this process for a moment")]
        let mut keeper = Command::new("bash");
        keeper.args(["-c", KEEPER, "keeper"]).args([lab.folder(), Path::new(SCRIPT), &folder]);
        let mut keeper = keeper.stdin(Stdio::piped()).process_group(0).spawn().context("cannot start bash")?;
        let pipe = keeper.stdin.take();
        let nobody = || User { name: String::new(), key: String::new(), file: PathBuf::new() };
        let mut cluster = Self { folder, monitors: String::new(), provisioner: nobody(), node: nobody(), keeper, pipe };
        let folder = cluster.folder.display().to_string();
        command::run(SCRIPT, &["up", &folder, PORT], START)?;
        let environment = std::fs::read_to_string(cluster.folder.join("env"))?;
        let value = |name: &str| {
            let assigned = format!("export BERTH_LAB_{name}=");
            let found = environment.lines().find_map(|line| line.strip_prefix(&assigned)).map(str::to_owned);
            found.with_context(|| format!("the cluster's env file has no {name}"))
        };
        let user = |who: &str, file: &str| -> Result<User> {
            let file = cluster.folder.join(file);
            Ok(User { name: value(&format!("{who}_USER"))?, key: value(&format!("{who}_KEY"))?, file })
        };
        (cluster.provisioner, cluster.node) = (user("PROVISIONER", "provisioner.key")?, user("NODE", "node.key")?);
        cluster.monitors = value("MONITORS")?;
        // What it began on its own account shall be over.
        cluster.settle();
        Ok(cluster)
    }

    /// How a driver is started that uses this cluster.
    pub(crate) fn setup(&self, role: &'static str) -> Setup {
        let Self { provisioner, node, .. } = self;
        let settings = format!(
            "clusters:\n  - {{name: main, monitors: ['{}'], filesystems: [cephfs], groups: [csi], user: {}, keyFile: {}}}\n",
            self.monitors.replace(',', "', '"),
            provisioner.name,
            provisioner.file.display()
        );
        let brought = |user: &User| {
            [("userID", &user.name), ("userKey", &user.key)].map(|(key, value)| (key.to_owned(), value.clone())).into()
        };
        let secrets = Secrets { controller: brought(provisioner), node: brought(node) };
        Setup { settings, backend: "cephfs", role, secrets }
    }

    /// A connection with the driver's library and rights, but without the driver.
    pub(crate) fn connect(&self) -> Result<Bare> {
        let library = Librados::load().map_err(anyhow::Error::msg)?;
        let User { name, key, .. } = &self.provisioner;
        let connection = library.connect(&self.monitors, name, key, PATIENCE).map_err(words)?;
        Ok(Bare { connection: Arc::new(connection) })
    }

    /// The start of a `ceph` command line with the driver's rights.
    pub(crate) fn command_line(&self) -> Vec<String> {
        let User { name, file, .. } = &self.provisioner;
        let conf = self.folder.join("ceph.conf");
        let start = ["--conf", &text(&conf), "--id", name, "--keyfile", &text(file)];
        start.map(str::to_owned).into()
    }

    /// Mounts a path of the file system, with what the driver gives to ceph-fuse, and waits for it.
    pub(crate) fn mount(&self, path: &str, target: &Path) -> Result<()> {
        let User { name, file, .. } = &self.node;
        #[expect(clippy::disallowed_methods, reason = "the driver's own way to start programs is what is measured")]
        let mut command = Command::new("ceph-fuse");
        command.args(["--conf=/dev/null", "-m", &self.monitors]);
        command.args([format!("--id={name}"), format!("--keyfile={}", file.display())]);
        command.args(["--client_mds_namespace=cephfs".to_owned(), format!("--client_mountpoint={path}")]);
        command.args(["--client_mount_timeout=30", "--client_reconnect_stale=true", "--admin_socket="]);
        command.args(["--log_file=", "--log_to_stderr=false", "-o", "fsname=bare"]).arg(target);
        // Not pipes: it would hold them open for as long as it lives.
        let said = self.folder.join("log/ceph-fuse");
        let output = std::fs::File::create(&said)?;
        let status = command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).status()?;
        ensure!(status.success(), "ceph-fuse: {}", std::fs::read_to_string(said)?);
        Ok(())
    }

    /// Unmounts it, and waits until ceph-fuse has written back what it held.
    pub(crate) fn unmount(&self, target: &Path) -> Result<()> {
        unmount(target)?;
        let place = text(target);
        let gone = processes::wait_until_gone("ceph-fuse", |line| line.last() == Some(&place), PATIENCE)?;
        ensure!(gone, "ceph-fuse does not end");
        Ok(())
    }

    /// How many commands the manager has been given, by anybody: each is a line of its audit log.
    pub(crate) fn commands(&self) -> Result<usize> {
        let log = std::fs::read_to_string(self.folder.join("log/mgr.x.log"))?;
        Ok(log.lines().filter(|line| line.contains("log_channel(audit)") && line.ends_with(": dispatch")).count())
    }

    /// How many commands about volumes the manager has carried out: a counter, which no log can be late with.
    pub(crate) fn carried_out(&self) -> Result<u64> {
        let mut socket = UnixStream::connect(self.folder.join("run/mgr.x.asok"))?;
        socket.write_all(b"{\"prefix\": \"perf dump\"}\0")?;
        let mut length = [0; 4];
        socket.read_exact(&mut length)?;
        let mut answer = vec![0; usize::try_from(u32::from_be_bytes(length))?];
        socket.read_exact(&mut answer)?;
        let counters: Value = serde_json::from_slice(&answer)?;
        let counter = counters.pointer("/finisher-volumes/complete_latency/avgcount").and_then(Value::as_u64);
        counter.context("the manager does not count its commands")
    }

    /// Waits until the daemons have nothing left to do, such as to purge what was deleted.
    pub(crate) fn settle(&self) {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let before = self.ticks();
            std::thread::sleep(LOOK);
            let allowed =
                IDLE * LOOK.as_secs_f64() * f64::from(u32::try_from(procfs::ticks_per_second()).unwrap_or(100));
            if f64::from(u32::try_from(self.ticks() - before).unwrap_or(u32::MAX)) <= allowed {
                return;
            }
        }
        eprintln!("the cluster does not come to rest; going on");
    }

    /// What its daemons have used of the processors.
    fn ticks(&self) -> u64 {
        let daemons = ["mon.a", "mgr.x", "osd.0", "mds.a"];
        let pid =
            |daemon| std::fs::read_to_string(self.folder.join(format!("run/{daemon}.pid"))).ok()?.trim().parse().ok();
        let used = daemons.iter().filter_map(|daemon| procfs::process::Process::new(pid(daemon)?).ok()?.stat().ok());
        used.map(|stat| stat.utime + stat.stime).sum()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.pipe.take());
        match self.keeper.wait() {
            Ok(status) if status.success() => {}
            result => eprintln!("the cluster below {} was not stopped: {result:?}", self.folder.display()),
        }
    }
}

/// Unmounts, for as long as it takes until nobody is in there any more.
pub(crate) fn unmount(target: &Path) -> Result<()> {
    let begun = Instant::now();
    while let Err(errno) = rustix::mount::unmount(target, UnmountFlags::empty()) {
        ensure!(errno == Errno::BUSY && begun.elapsed() < PATIENCE, "cannot unmount {}: {errno}", target.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Commands to the manager, one after the other, as anybody could send them.
#[derive(Clone)]
pub(crate) struct Bare {
    connection: Arc<Connection>,
}

impl Bare {
    /// What the driver needs to know and do for a new volume, with the same arguments. Returns its path.
    pub(crate) fn create(&self, name: &str, size: u64, notes: &str) -> Result<String> {
        ensure!(self.info(name)?.is_none(), "{name} is there already");
        self.ask("fs subvolume create", name, json!({"size": size}))?;
        self.ask("fs subvolume metadata set", name, json!({"key_name": "berth", "value": notes}))?;
        Ok(self.ask("fs subvolume getpath", name, json!({}))?.trim().to_owned())
    }

    /// `None`: there is no such subvolume.
    pub(crate) fn info(&self, name: &str) -> Result<Option<String>> {
        match self.send("fs subvolume info", name, json!({})) {
            Ok(answer) => Ok(Some(answer)),
            Err(failure) if failure.errno == Errno::NOENT => Ok(None),
            Err(failure) => Err(words(failure)),
        }
    }

    /// The driver's notes about a volume of its own.
    pub(crate) fn notes(&self, name: &str) -> Result<String> {
        Ok(self.ask("fs subvolume metadata get", name, json!({"key_name": "berth"}))?.trim().to_owned())
    }

    pub(crate) fn delete(&self, name: &str) -> Result<()> {
        ensure!(self.info(name)?.is_some(), "{name} is not there");
        self.ask("fs subvolume rm", name, json!({"retain_snapshots": true}))?;
        Ok(())
    }

    fn ask(&self, prefix: &str, name: &str, more: Value) -> Result<String> {
        self.send(prefix, name, more).map_err(words).with_context(|| prefix.to_owned())
    }

    fn send(&self, prefix: &str, name: &str, more: Value) -> Result<String, Failure> {
        let mut command = json!({
            "prefix": prefix, "format": "json", "vol_name": "cephfs", "group_name": "csi", "sub_name": name,
        });
        if let (Value::Object(command), Value::Object(more)) = (&mut command, more) {
            command.extend(more);
        }
        let answer = self.connection.command(Target::Manager, &command.to_string())?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

fn words(failure: Failure) -> anyhow::Error {
    anyhow::Error::from(std::io::Error::from(failure.errno)).context(failure.message)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
