//! The one configuration: a YAML file, read once, checked whole.
//!
//! Every mistake is reported at once, with its path in the file and what would be right. Nothing else in Berth reads
//! the environment or a file for its settings. `docs/configuration.md` describes every key.

pub mod aws;
mod document;
mod parse;
mod pattern;
mod pools;
pub(crate) mod services;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::objectfs::settings::Checksums;
use crate::volume::NodeName;
use document::Reader;
pub use pattern::Pattern;

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What Kubernetes calls this machine. Default: its host name.
    pub node: NodeName,
    /// Labels of this machine, besides its name, that pods may be scheduled by.
    pub labels: BTreeMap<String, String>,
    /// Where this machine's control groups of version 2 are seen.
    pub cgroups: PathBuf,
    /// How to log.
    pub log: Log,
    /// Where `/healthz`, `/readyz` and `/metrics` are served. Absent: nowhere.
    pub http: Option<SocketAddr>,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// Where local volumes are carved from.
    pub pools: Vec<Pool>,
    /// Where cluster storage is.
    pub clusters: Vec<Cluster>,
    /// File systems in user space.
    pub fuse: Fuse,
    /// Where object storage is.
    pub services: Vec<Service>,
    /// The process that keeps mounts of object storage.
    pub mounter: Mounter,
    /// What is served, and where.
    pub drivers: Vec<Driver>,
}

/// How to log, always to standard error.
#[derive(Clone, Debug)]
pub struct Log {
    /// `json: true` is one object a line, for programs.
    pub json: bool,
    /// A `tracing` filter: a level, or `berth=debug,tonic=warn`.
    pub level: String,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// A call is answered within this time, done or not; the work goes on. Below kubelet's 2 minutes.
    pub call: Duration,
    /// The same for calls that only ask (statistics, health), of which one that hangs holds up a pod's others.
    pub question: Duration,
    /// A program such as mkfs is killed after this time.
    pub command: Duration,
    /// A command to Ceph has to be answered within this time. Below `call`.
    pub ceph: Duration,
    /// A call to an S3 service is tried again for this long. Below `call`.
    pub s3: Duration,
    /// A call waits so long for another one on the same volume before it is Aborted.
    pub lock: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(100),
            question: Duration::from_secs(10),
            command: Duration::from_secs(90),
            ceph: Duration::from_secs(30),
            s3: Duration::from_secs(30),
            lock: Duration::from_secs(2),
        }
    }
}

/// Where local volumes are carved from.
#[derive(Clone, Debug)]
pub struct Pool {
    /// What classes call it.
    pub name: String,
    /// What it is made of.
    pub source: Source,
    /// Of `Source::Folder` the directory, which has to exist: a missing one is a disk that is not mounted. Else the
    /// directory below which file systems are mounted, and where the pool lies that `fallback: root` allows.
    pub path: PathBuf,
    /// Volumes and snapshots together get at most this many bytes.
    pub cap: Option<u64>,
    /// Volumes take space only when they are written, and may be promised more than there is.
    pub thin: bool,
    /// What to do when the directory lies on the node's root disk, or no disk is there.
    pub fallback: Fallback,
    /// Only these carves are offered. Empty: all that the pool can have.
    pub carves: Vec<Carve>,
}

/// What a local volume is made of. `docs/local-storage.md` says which is good for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carve {
    /// A directory with a project quota on the pool's XFS.
    Directory,
    /// A logical volume of the pool's volume group.
    Lvm,
    /// A file on the pool, shown through a loop device.
    Image,
}

impl Carve {
    const ALL: [Self; 3] = [Self::Directory, Self::Lvm, Self::Image];

    /// Its name in the file and in classes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Lvm => "lvm",
            Self::Image => "image",
        }
    }

    /// `None`: there is no such carve.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|carve| carve.name() == name)
    }
}

/// What a pool is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The directory `Pool::path`.
    Folder,
    /// Disks that Berth makes file systems or a volume group on.
    Disks(Disks),
    /// The volume group of this name, which exists.
    Group(String),
}

/// Disks that Berth makes file systems or a volume group on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disks {
    /// A disk belongs to the pool when one of them fits. Never empty.
    pub rules: Vec<DiskRule>,
    /// What is made of them.
    pub layout: Layout,
    /// The driver makes the pool when it starts.
    pub create: bool,
}

/// Which disks belong to a pool: those that everything here fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskRule {
    /// One of these fits its name in `/dev` or one of its links in `/dev/disk`. Empty: any.
    pub paths: Vec<Pattern>,
    /// One of these fits its model. Empty: any.
    pub models: Vec<Pattern>,
    /// One of these fits its serial number or world-wide name. Empty: any.
    pub serials: Vec<Pattern>,
    /// It has at least so many bytes.
    pub min_size: Option<u64>,
    /// It has at most so many bytes.
    pub max_size: Option<u64>,
    /// It rotates, or it does not.
    pub rotational: bool,
}

/// What is made of a pool's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// An XFS on each.
    Xfs,
    /// One XFS over all, striped.
    Striped,
    /// One volume group over all.
    Lvm,
}

impl Layout {
    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xfs => "xfs",
            Self::Striped => "striped",
            Self::Lvm => "lvm",
        }
    }
}

/// What to do when a pool's directory lies on the node's root disk, say because its own disk is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// Report no room, so that pods go elsewhere.
    None,
    /// Use it, up to the pool's cap.
    Root,
}

/// A Ceph cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// What classes and volume ids call it: at most 16 bytes.
    pub name: String,
    /// Addresses of monitors, each as `HOST:PORT`, `v1:HOST:PORT` or `v2:HOST:PORT`.
    pub monitors: Vec<String>,
    /// Its file systems: the first one is where a class that names none makes volumes; all are listed.
    pub filesystems: Vec<String>,
    /// Subvolume groups, likewise.
    pub groups: Vec<String>,
    /// For calls that bring no secrets, such as lists. Absent: they are not offered.
    pub account: Option<Account>,
}

/// A Ceph user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Without `client.`.
    pub user: String,
    /// The file that holds its key and nothing else. It is read anew for each connection.
    pub key_file: PathBuf,
}

/// File systems in user space.
#[derive(Clone, Debug, Default)]
pub struct Fuse {
    /// Their processes are moved into this control group, so that they outlive the one that Berth runs in. Absent: they
    /// stay in Berth's.
    pub cgroup: Option<PathBuf>,
}

/// An S3 service.
#[derive(Clone, Debug)]
pub struct Service {
    /// What classes and volume ids call it: at most 16 bytes.
    pub name: String,
    /// What it is, which decides what the keys below are when they are absent.
    pub kind: ServiceKind,
    /// `https://s3.example.com`. Absent: the kind's own.
    pub url: Option<String>,
    /// Absent: `us-east-1`, which most services other than AWS take.
    pub region: Option<String>,
    /// `https://host/bucket/key`. Absent: as the kind is.
    pub path_style: Option<bool>,
    /// A file with PEM certificates to trust beside the system's.
    pub ca: Option<PathBuf>,
    /// When checksums are sent and asked for. Absent: as the kind is.
    pub checksums: Option<Checksums>,
    /// Buckets that have volumes below prefixes: what lists look at.
    pub buckets: Vec<String>,
    /// For calls that bring no secret, such as lists.
    pub keys: Option<KeyFiles>,
    /// Calls that bring no secret are made with what the environment has: a profile, web identity, the instance.
    pub chain: bool,
}

/// What an S3 service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// Path style, checksums only where they are needed.
    Generic,
    /// Amazon S3.
    Aws,
    /// MinIO.
    Minio,
    /// Ceph's RADOS gateway.
    CephRgw,
    /// Google Cloud Storage's XML interface with HMAC keys.
    Gcs,
}

/// Files that hold one key each and nothing else. They are read anew for each call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFiles {
    /// Access key id.
    pub access_key: PathBuf,
    /// Secret access key.
    pub secret_key: PathBuf,
    /// Of temporary credentials.
    pub session_token: Option<PathBuf>,
}

/// The process that keeps mounts of object storage while the driver comes and goes.
#[derive(Clone, Debug)]
pub struct Mounter {
    /// Its Unix socket.
    pub socket: PathBuf,
    /// The driver starts one when there is none, detached.
    pub starts: bool,
    /// Where written data lies until it is in the bucket.
    pub staging: PathBuf,
    /// Where what was read is kept. `None`: nowhere.
    pub cache: Option<PathBuf>,
    /// The cache holds at most so many bytes.
    pub cache_size: u64,
    /// Memory of one mount for data in flight, in bytes, where its class says nothing else.
    pub memory: u64,
    /// The first and the last of the user ids that workers run as, each volume under one of its own.
    pub users: (u32, u32),
}

/// One driver on one socket.
#[derive(Clone, Debug)]
pub struct Driver {
    /// What stands behind it.
    pub backend: BackendKind,
    /// The CSI driver name. Default: the back end's own.
    pub name: String,
    /// Which services this socket has.
    pub role: Role,
    /// The Unix socket.
    pub socket: PathBuf,
    /// Where to register with kubelet. Absent: not at all.
    pub kubelet: Option<Kubelet>,
}

/// The back ends that this build has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BackendKind {
    /// Local volumes.
    Nvme,
    /// Cluster storage.
    Cephfs,
    /// Object storage.
    S3,
}

impl BackendKind {
    /// Its name in the file, and in the default driver name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nvme => "nvme",
            Self::Cephfs => "cephfs",
            Self::S3 => "s3",
        }
    }
}

/// Which services a socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Identity and Controller.
    Controller,
    /// Identity and Node.
    Node,
    /// All three.
    Both,
}

impl Role {
    /// Is the Controller service there?
    pub fn has_controller(self) -> bool {
        self != Self::Node
    }
    /// Is the Node service there?
    pub fn has_node(self) -> bool {
        self != Self::Controller
    }
}

/// Where to register with kubelet.
#[derive(Clone, Debug)]
pub struct Kubelet {
    /// Kubelet's `plugins_registry` directory, as this process sees it.
    pub registry: PathBuf,
    /// The CSI socket's path as the *host* sees it. Default: `socket`.
    pub endpoint: PathBuf,
}

/// One thing that is wrong with the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Where: `drivers[0].socket`.
    pub path: String,
    /// What, and what would be right.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// `Invalid`, listing every mistake on a line of its own.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).context(|| format!("cannot read {}", path.display()))?;
        #[expect(clippy::disallowed_methods, reason = "this is the one place")]
        Self::parse(&text, &|name| std::env::var(name).ok()).map_err(|mistakes| {
            let lines: String = mistakes.iter().map(|mistake| format!("\n  {mistake}")).collect();
            let number = mistakes.len();
            let what = if number == 1 { "mistake" } else { "mistakes" };
            Error::new(ErrorKind::Invalid, format!("{} has {number} {what}:{lines}", path.display()))
        })
    }

    /// Checks a text, with `environment` answering for `${NAME}`.
    ///
    /// # Errors
    /// Every mistake, in the order of the file's sections.
    pub fn parse(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self, Vec<Mistake>> {
        let value: Value = serde_saphyr::from_str(text)
            .map_err(|error| vec![Mistake { path: String::new(), message: format!("this is not YAML: {error}") }])?;
        let reader = Reader { mistakes: RefCell::default(), environment };
        let config = reader.config(&value);
        match (config, reader.mistakes.into_inner()) {
            (Some(config), mistakes) if mistakes.is_empty() => Ok(config),
            (_, mistakes) => Err(mistakes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
node: {name: '${NODE_NAME}'}
log: {format: json, level: 'info,berth=debug'}
http: {address: '127.0.0.1:9808'}
deadlines: {call: 90s, lock: 500ms}
pools:
  - {name: fast, path: /mnt/nvme0}
  - {name: root, path: /var/lib/berth, cap: 20Gi, fallback: root, thin: true}
drivers:
  - backend: nvme
    socket: /var/lib/kubelet/plugins/nvme.csi.berth.dev/csi.sock
    kubelet: {}
";

    fn parse(text: &str) -> Result<Config, Vec<Mistake>> {
        Config::parse(text, &|name| (name == "NODE_NAME").then(|| "node-a".to_owned()))
    }

    #[test]
    fn a_good_file_is_read_with_its_defaults() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.node.as_str(), "node-a");
        assert_eq!(config.deadlines.lock, Duration::from_millis(500));
        assert_eq!(config.deadlines.command, Deadlines::default().command);
        assert_eq!(config.pools[1].cap, Some(20 << 30));
        let driver = &config.drivers[0];
        assert_eq!((driver.name.as_str(), driver.role), ("nvme.csi.berth.dev", Role::Both));
        assert_eq!(driver.kubelet.as_ref().unwrap().endpoint, driver.socket);
    }

    #[test]
    fn every_mistake_is_told_at_once_with_its_path_and_what_would_be_right() {
        let mistakes = parse(
            "
node: {name: '${HOME_NODE}', nmae: x}
log: {format: xml, level: inof}
http: {address: 9808}
deadlines: {call: 0s}
pools:
  - {name: Fast, path: mnt, cap: 1.5Gi, fallback: maybe, size: 3}
  - {name: root, path: /r, fallback: root}
drivers:
  - {backend: floppy, role: boss, socket: run/csi.sock}
  - {backend: nvme, socket: [1]}
  - {backend: nvme, role: controller, socket: /run/a, kubelet: {registry: x}}
",
        )
        .unwrap_err();
        let found: Vec<_> = mistakes.iter().map(|mistake| mistake.path.as_str()).collect();
        for path in [
            "node.name",
            "node.nmae",
            "log.format",
            "log.level",
            "http.address",
            "deadlines.call",
            "pools[0].name",
            "pools[0].path",
            "pools[0].cap",
            "pools[0].fallback",
            "pools[0].size",
            "pools[1].cap",
            "drivers[0].backend",
            "drivers[0].role",
            "drivers[0].socket",
            "drivers[1].socket",
            "drivers[2].kubelet",
            "drivers[2].kubelet.registry",
        ] {
            assert!(found.contains(&path), "{path} is not among {mistakes:#?}");
        }
        let unknown = mistakes.iter().find(|mistake| mistake.path == "pools[0].size").unwrap();
        assert_eq!(
            unknown.message,
            "is not known; known here: cap, carves, create, disks, fallback, group, layout, name, path, thin"
        );
    }

    #[test]
    fn labels_of_the_node_are_topology_that_kubernetes_and_csi_take() {
        let with = |labels: &str| {
            parse(&format!(
                "node: {{name: a, labels: {labels}}}\npools: [{{name: a, path: /a}}]\ndrivers: [{{backend: nvme, socket: /run/a}}]"
            ))
        };
        let config =
            with("{topology.kubernetes.io/zone: eu-1, rack: 'r_2.a', example.com/node: '${NODE_NAME}'}").unwrap();
        let labels: Vec<_> = config.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(
            labels,
            [("example.com/node", "node-a"), ("rack", "r_2.a"), ("topology.kubernetes.io/zone", "eu-1")]
        );
        assert!(parse(GOOD).unwrap().labels.is_empty());
        for bad in [
            "{rack: 3}",
            "{rack: ''}",
            "{rack: '-a'}",
            "{rack: 'a b'}",
            "{rack-: a}",
            "{UPPER.com/rack: a}",
            "{'/rack': a}",
            "{'a/b/c': a}",
            "{topology.berth.dev/node: b}",
            "{rack: '${NOTHING}'}",
            "[rack]",
        ] {
            let mistakes = with(bad).unwrap_err();
            assert_eq!(mistakes.len(), 1, "{bad}: {mistakes:?}");
            assert!(mistakes[0].path.starts_with("node.labels"), "{bad}: {mistakes:?}");
        }
    }

    #[test]
    fn what_is_right_by_itself_may_be_wrong_beside_the_rest() {
        let paths = |text: &str| parse(text).unwrap_err().into_iter().map(|mistake| mistake.path).collect::<Vec<_>>();
        assert_eq!(paths("{}"), ["drivers"]);
        assert_eq!(paths("drivers: [{backend: nvme, socket: /run/a}]"), ["pools"]);
        let twice = "
pools: [{name: a, path: /a}, {name: a, path: /a}]
drivers: [{backend: nvme, socket: /run/a}, {backend: nvme, role: node, socket: /run/a}]";
        assert_eq!(paths(twice), ["pools[1].name", "pools[1].path", "drivers[1].socket", "drivers[1].role"]);
        let nested = "
pools: [{name: a, path: /a, cap: 0}, {name: b, path: /a/b}]
drivers: [{backend: nvme, socket: /run/a}]";
        assert_eq!(paths(nested), ["pools[0].cap", "pools[1].path"]);
        assert_eq!(paths("- a"), ["", "drivers"]);
        assert!(parse("a: b: c").unwrap_err()[0].message.starts_with("this is not YAML"));
    }
}
