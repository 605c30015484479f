//! The one configuration: a YAML file, read once, checked whole.
//!
//! Every mistake is reported at once, with its path in the file and what would be right. Nothing else in Berth reads
//! the environment or a file for its settings. `docs/configuration.md` describes every key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::volume::{MountPath, NodeName, parse_bytes};

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What Kubernetes calls this machine. Default: its host name.
    pub node: NodeName,
    /// How to log.
    pub log: Log,
    /// Where `/healthz`, `/readyz` and `/metrics` are served. Absent: nowhere.
    pub http: Option<SocketAddr>,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// Where local volumes are carved from.
    pub pools: Vec<Pool>,
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
    /// A call waits so long for another one on the same volume before it is Aborted.
    pub lock: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(100),
            question: Duration::from_secs(10),
            command: Duration::from_secs(90),
            lock: Duration::from_secs(2),
        }
    }
}

/// A directory on a file system of this node, from which local volumes are carved.
#[derive(Clone, Debug)]
pub struct Pool {
    /// What classes call it.
    pub name: String,
    /// The directory. It has to exist: a missing one is a disk that is not mounted.
    pub path: PathBuf,
    /// Volumes and snapshots together get at most this many bytes.
    pub cap: Option<u64>,
    /// Volumes take space only when they are written, and may be promised more than there is.
    pub thin: bool,
    /// What to do when the directory lies on the node's root disk.
    pub fallback: Fallback,
}

/// What to do when a pool's directory lies on the node's root disk, say because its own disk is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// Report no room, so that pods go elsewhere.
    None,
    /// Use it, up to the pool's cap.
    Root,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// Local volumes.
    Nvme,
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

/// Gathers mistakes while it reads.
struct Reader<'a> {
    mistakes: RefCell<Vec<Mistake>>,
    environment: &'a dyn Fn(&str) -> Option<String>,
}

/// A mapping of the file, and which of its keys have been asked for.
struct Section<'a> {
    reader: &'a Reader<'a>,
    path: String,
    map: Option<&'a Map<String, Value>>,
    known: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Reader<'a> {
    fn mistake<T>(&self, path: &str, message: impl Into<String>) -> Option<T> {
        self.mistakes.borrow_mut().push(Mistake { path: path.to_owned(), message: message.into() });
        None
    }

    /// A mapping; a missing one reads as empty, anything else is a mistake.
    fn section(&'a self, path: String, value: Option<&'a Value>) -> Section<'a> {
        let map = match value {
            None | Some(Value::Null) => None,
            Some(Value::Object(map)) => Some(map),
            Some(_) => self.mistake(&path, "keys and values are needed here"),
        };
        Section { reader: self, path, map, known: RefCell::default() }
    }

    fn config(&'a self, value: &'a Value) -> Option<Config> {
        let root = self.section(String::new(), Some(value));

        let node = root.section("node");
        let name = node.read("name", |text| NodeName::new(text).map_err(|error| error.to_string()));
        let name = name.unwrap_or_else(|| {
            let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            NodeName::new(host).or_else(|error| self.mistake("node.name", error.to_string()).ok_or(())).ok()
        });
        node.end();

        let log = root.section("log");
        let json = log.read("format", |text| match text {
            "text" => Ok(false),
            "json" => Ok(true),
            _ => Err("write text or json".to_owned()),
        });
        let level = log.read("level", |text| match text.parse::<tracing_subscriber::EnvFilter>() {
            Ok(_) => Ok(text.to_owned()),
            Err(error) => Err(format!("write error, warn, info, debug or trace, or a filter: {error}")),
        });
        log.end();

        let http = root.section("http");
        let address = http.read("address", |text| {
            text.parse().map_err(|_| "write an address and a port, such as 127.0.0.1:9808".to_owned())
        });
        http.end();

        let deadlines = root.section("deadlines");
        let usual = Deadlines::default();
        let duration = |key, usual| deadlines.read(key, parse_duration).unwrap_or(Some(usual)).unwrap_or(usual);
        let read = Deadlines {
            call: duration("call", usual.call),
            question: duration("question", usual.question),
            command: duration("command", usual.command),
            lock: duration("lock", usual.lock),
        };
        deadlines.end();

        let pools = root.list("pools").into_iter().map(|pool| self.pool(pool)).collect::<Vec<_>>();
        let drivers = root.list("drivers").into_iter().map(|driver| self.driver(driver)).collect::<Vec<_>>();
        root.end();
        self.check_together(&pools, &drivers);

        Some(Config {
            node: name?,
            log: Log { json: json.unwrap_or(Some(false))?, level: level.unwrap_or(Some("info".to_owned()))? },
            http: address.flatten(),
            deadlines: read,
            pools: pools.into_iter().collect::<Option<_>>()?,
            drivers: drivers.into_iter().collect::<Option<_>>()?,
        })
    }

    fn pool(&self, section: Section<'_>) -> Option<Pool> {
        let name = section.required("name", |text| {
            let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if text.is_empty() || text.len() > 63 || !text.chars().all(fits) {
                return Err("write up to 63 lower-case letters, digits and `-`".to_owned());
            }
            Ok(text.to_owned())
        });
        let path = section.required("path", absolute);
        let cap = section.read("cap", |text| parse_bytes(text).map_err(|error| error.to_string()));
        let thin = section.read("thin", boolean).unwrap_or(Some(false));
        let fallback = section
            .read("fallback", |text| match text {
                "none" => Ok(Fallback::None),
                "root" => Ok(Fallback::Root),
                _ => Err("write none or root".to_owned()),
            })
            .unwrap_or(Some(Fallback::None));
        if fallback == Some(Fallback::Root) && cap.is_none() {
            self.mistake::<()>(&section.at("cap"), "is needed with `fallback: root`: the root disk must not fill up");
        }
        section.end();
        Some(Pool { name: name?, path: path?, cap: cap.flatten(), thin: thin?, fallback: fallback? })
    }

    fn driver(&self, section: Section<'_>) -> Option<Driver> {
        let backend = section.required("backend", |text| match text {
            "nvme" => Ok(BackendKind::Nvme),
            _ => Err("this build has: nvme".to_owned()),
        });
        let name = section.read("name", driver_name).unwrap_or(Some("nvme.csi.berth.dev".to_owned()));
        let role = section
            .read("role", |text| match text {
                "controller" => Ok(Role::Controller),
                "node" => Ok(Role::Node),
                "both" => Ok(Role::Both),
                _ => Err("write controller, node or both".to_owned()),
            })
            .unwrap_or(Some(Role::Both));
        let socket = section.required("socket", socket_path);
        let kubelet = section.has("kubelet").then(|| {
            let kubelet = section.section("kubelet");
            let registry = kubelet
                .read("registry", absolute)
                .unwrap_or_else(|| Some(PathBuf::from("/var/lib/kubelet/plugins_registry")));
            let endpoint = kubelet.read("endpoint", absolute).unwrap_or_else(|| socket.clone());
            kubelet.end();
            Some(Kubelet { registry: registry?, endpoint: endpoint? })
        });
        if kubelet.is_some() && role == Some(Role::Controller) {
            self.mistake::<()>(
                &section.at("kubelet"),
                "only a node registers with kubelet: leave it out, or change the role",
            );
        }
        section.end();
        let kubelet = match kubelet {
            None => None,
            Some(read) => Some(read?),
        };
        Some(Driver { backend: backend?, name: name?, role: role?, socket: socket?, kubelet })
    }

    /// What is right by itself may be wrong beside the rest.
    fn check_together(&self, pools: &[Option<Pool>], drivers: &[Option<Driver>]) {
        for (index, pool) in pools.iter().enumerate() {
            let Some(pool) = pool else { continue };
            for earlier in pools[..index].iter().flatten() {
                if earlier.name == pool.name {
                    self.mistake::<()>(&format!("pools[{index}].name"), format!("{} is used twice", pool.name));
                }
                if earlier.path == pool.path {
                    self.mistake::<()>(&format!("pools[{index}].path"), format!("is also pool {}'s", earlier.name));
                }
            }
        }
        if drivers.is_empty() {
            self.mistake::<()>("drivers", "nothing would be served: list at least one driver");
        }
        for (index, driver) in drivers.iter().enumerate() {
            let Some(driver) = driver else { continue };
            if driver.backend == BackendKind::Nvme && pools.is_empty() {
                self.mistake::<()>("pools", "the nvme back end needs at least one pool with a name and a path");
            }
            for earlier in drivers[..index].iter().flatten() {
                if earlier.socket == driver.socket {
                    self.mistake::<()>(&format!("drivers[{index}].socket"), "is used twice");
                }
                let overlap = (earlier.role.has_controller() && driver.role.has_controller())
                    || (earlier.role.has_node() && driver.role.has_node());
                if earlier.name == driver.name && overlap {
                    self.mistake::<()>(
                        &format!("drivers[{index}].role"),
                        format!("{} already has this service on another socket", driver.name),
                    );
                }
            }
        }
    }
}

impl<'a> Section<'a> {
    fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.known.borrow_mut().insert(key);
        self.map?.get(key).filter(|value| !value.is_null())
    }

    fn has(&self, key: &'static str) -> bool {
        self.known.borrow_mut().insert(key);
        self.map.is_some_and(|map| map.contains_key(key))
    }

    fn section(&self, key: &'static str) -> Section<'a> {
        self.reader.section(self.at(key), self.get(key))
    }

    fn list(&self, key: &'static str) -> Vec<Section<'a>> {
        match self.get(key) {
            None => Vec::new(),
            Some(Value::Array(items)) => items
                .iter()
                .enumerate()
                .map(|(index, item)| self.reader.section(format!("{}[{index}]", self.at(key)), Some(item)))
                .collect(),
            Some(_) => {
                self.reader.mistake::<()>(&self.at(key), "a list is needed here: begin each item with `- `");
                Vec::new()
            }
        }
    }

    /// `None`: the key is not there. `Some(None)`: it is wrong, and that has been noted.
    fn read<T>(&self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<Option<T>> {
        let value = self.get(key)?;
        let text = match value {
            Value::String(text) => match self.expand(text) {
                Ok(text) => text,
                Err(message) => return Some(self.reader.mistake(&self.at(key), message)),
            },
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            _ => return Some(self.reader.mistake(&self.at(key), "a single value is needed here")),
        };
        Some(
            parse(&text).map_or_else(
                |message| self.reader.mistake(&self.at(key), format!("{text:?} is wrong: {message}")),
                Some,
            ),
        )
    }

    fn required<T>(&self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.read(key, parse).unwrap_or_else(|| self.reader.mistake(&self.at(key), "is missing"))
    }

    /// Replaces `${NAME}` by the environment's value.
    fn expand(&self, text: &str) -> Result<String, String> {
        let mut result = String::new();
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            let Some(length) = rest[start..].find('}') else { return Err("`${` has no `}`".to_owned()) };
            let name = &rest[start + 2..start + length];
            let value = (self.reader.environment)(name)
                .ok_or_else(|| format!("the environment has no {name}: set it, or write the value here"))?;
            result.push_str(&rest[..start]);
            result.push_str(&value);
            rest = &rest[start + length + 1..];
        }
        Ok(result + rest)
    }

    /// Everything has been asked for: what remains is unknown.
    fn end(self) {
        let known = self.known.borrow();
        for key in self.map.into_iter().flat_map(Map::keys).filter(|key| !known.contains(key.as_str())) {
            let list = known.iter().copied().collect::<Vec<_>>().join(", ");
            self.reader.mistake::<()>(&self.at(key), format!("is not known; known here: {list}"));
        }
    }
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    MountPath::new("the path", text).map(|path| path.as_path().to_owned()).map_err(|error| error.to_string())
}

/// unix(7): `sun_path` has 108 bytes with the terminating NUL.
fn socket_path(text: &str) -> Result<PathBuf, String> {
    if text.len() > 107 {
        return Err(format!("a socket's path has at most 107 bytes, and this has {}", text.len()));
    }
    absolute(text)
}

fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "write true or false".to_owned())
}

/// CSI 1.13, GetPluginInfoResponse.name: a domain name of at most 63 characters; kubelet wants lower case.
fn driver_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let begins = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    if text.len() > 63 || !text.chars().all(fits) || !begins || !text.ends_with(|c: char| c.is_ascii_lowercase()) {
        return Err(
            "write up to 63 lower-case letters, digits, `-` and `.`, ending in a letter, such as nvme.csi.berth.dev"
                .to_owned(),
        );
    }
    Ok(text.to_owned())
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60_000),
        _ => None,
    };
    let millis = unit.and_then(|unit| digits.parse::<u64>().ok()?.checked_mul(unit)).filter(|millis| *millis > 0);
    millis.map(Duration::from_millis).ok_or_else(|| "write a whole number above 0 with ms, s or m".to_owned())
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
log: {format: xml}
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
        assert_eq!(unknown.message, "is not known; known here: cap, fallback, name, path, thin");
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
        assert_eq!(paths("- a"), ["", "drivers"]);
        assert!(parse("a: b: c").unwrap_err()[0].message.starts_with("this is not YAML"));
    }
}
