//! What the configuration's keys mean, and which values are right.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::document::{Reader, Section};
use super::{Account, BackendKind, Cluster, Config, Deadlines, Driver, Fuse, Kubelet, Log, Pool, Role};
use crate::volume::{MountPath, NodeName, Topology};

impl<'a> Reader<'a> {
    /// The whole file. `None`: there were mistakes.
    pub(super) fn config(&'a self, value: &'a Value) -> Option<Config> {
        let root = self.section(String::new(), Some(value));

        let node = root.section("node");
        let name = node.read("name", |text| NodeName::new(text).map_err(|error| error.to_string()));
        let name = name.unwrap_or_else(|| {
            let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            NodeName::new(host).or_else(|error| self.mistake("node.name", error.to_string()).ok_or(())).ok()
        });
        let labels = node.map("labels", label_name, label_value);
        let cgroups = node.read("cgroups", absolute).unwrap_or_else(|| Some(PathBuf::from("/sys/fs/cgroup")));
        node.end();

        let log = root.section("log");
        let json = log.read("format", |text| match text {
            "text" => Ok(false),
            "json" => Ok(true),
            _ => Err("write text or json".to_owned()),
        });
        let level = log.read("level", log_level);
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
            ceph: duration("ceph", usual.ceph),
            s3: duration("s3", usual.s3),
            lock: duration("lock", usual.lock),
        };
        deadlines.end();

        let pools = root.list("pools").into_iter().map(|pool| self.pool(pool)).collect::<Vec<_>>();
        let clusters = root.list("clusters").into_iter().map(|cluster| self.cluster(cluster)).collect::<Vec<_>>();
        let fuse = root.section("fuse");
        let cgroup = fuse.read("cgroup", absolute);
        fuse.end();
        let services = root.list("services").into_iter().map(|service| self.service(service)).collect::<Vec<_>>();
        let mounter = self.mounter(root.section("mounter"));
        let drivers = root.list("drivers").into_iter().map(|driver| self.driver(driver)).collect::<Vec<_>>();
        root.end();
        self.check_together(&pools, &clusters, &drivers);
        for (index, service) in services.iter().enumerate() {
            let Some(service) = service else { continue };
            if services[..index].iter().flatten().any(|earlier| earlier.name == service.name) {
                self.mistake::<()>(&format!("services[{index}].name"), format!("{} is used twice", service.name));
            }
        }

        Some(Config {
            node: name?,
            labels: labels?,
            cgroups: cgroups?,
            log: Log { json: json.unwrap_or(Some(false))?, level: level.unwrap_or(Some("info".to_owned()))? },
            http: address.flatten(),
            deadlines: read,
            pools: pools.into_iter().collect::<Option<_>>()?,
            clusters: clusters.into_iter().collect::<Option<_>>()?,
            fuse: Fuse { cgroup: cgroup.flatten() },
            services: services.into_iter().collect::<Option<_>>()?,
            mounter: mounter?,
            drivers: drivers.into_iter().collect::<Option<_>>()?,
        })
    }

    fn cluster(&self, section: Section<'_>) -> Option<Cluster> {
        // It is a part of every volume id, which has at most 128 bytes.
        let name = section.required("name", |text| plain_name(text, 16));
        let monitors = section.values("monitors", monitor);
        if monitors.as_ref().is_some_and(Vec::is_empty) {
            self.mistake::<()>(
                &section.at("monitors"),
                "is missing: list at least one address, such as v2:10.0.0.1:3300",
            );
        }
        let filesystems = section.values("filesystems", ceph_name);
        let groups = section.values("groups", ceph_name);
        let user = section.read("user", ceph_name);
        let key_file = section.read("keyFile", absolute);
        if user.is_some() != key_file.is_some() {
            let missing = if user.is_some() { "keyFile" } else { "user" };
            self.mistake::<()>(&section.at(missing), "is missing: `user` and `keyFile` belong together");
        }
        section.end();
        let account = match (user, key_file) {
            (Some(user), Some(key_file)) => Some(Account { user: user?, key_file: key_file? }),
            _ => None,
        };
        let or = |list: Vec<String>, usual: &str| if list.is_empty() { vec![usual.to_owned()] } else { list };
        Some(Cluster {
            name: name?,
            monitors: monitors?,
            filesystems: or(filesystems?, "cephfs"),
            groups: or(groups?, "csi"),
            account,
        })
    }

    fn driver(&self, section: Section<'_>) -> Option<Driver> {
        let backend = section.required("backend", |text| match text {
            "nvme" => Ok(BackendKind::Nvme),
            "cephfs" => Ok(BackendKind::Cephfs),
            "s3" => Ok(BackendKind::S3),
            _ => Err("this build has: cephfs, nvme, s3".to_owned()),
        });
        let usual = backend.map(|backend| format!("{}.csi.berth.dev", backend.name()));
        let name = section.read("name", driver_name).unwrap_or(usual);
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
    fn check_together(&self, pools: &[Option<Pool>], clusters: &[Option<Cluster>], drivers: &[Option<Driver>]) {
        for (index, cluster) in clusters.iter().enumerate() {
            let Some(cluster) = cluster else { continue };
            if clusters[..index].iter().flatten().any(|earlier| earlier.name == cluster.name) {
                self.mistake::<()>(&format!("clusters[{index}].name"), format!("{} is used twice", cluster.name));
            }
        }
        self.check_pools(pools);
        if drivers.is_empty() {
            self.mistake::<()>("drivers", "nothing would be served: list at least one driver");
        }
        for (index, driver) in drivers.iter().enumerate() {
            let Some(driver) = driver else { continue };
            if driver.backend == BackendKind::Nvme && pools.is_empty() {
                self.mistake::<()>(
                    "pools",
                    "the nvme back end needs at least one pool with a name and a path, disks or a group",
                );
            }
            if driver.backend == BackendKind::Cephfs && driver.role.has_controller() && clusters.is_empty() {
                self.mistake::<()>(
                    "clusters",
                    "the cephfs controller needs at least one cluster with a name and monitors",
                );
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

pub(super) fn plain_name(text: &str, longest: usize) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if text.is_empty() || text.len() > longest || !text.chars().all(fits) {
        return Err(format!("write up to {longest} lower-case letters, digits and `-`"));
    }
    Ok(text.to_owned())
}

/// CSI 1.13, `Topology.segments`: what a key has to look like. Kubernetes' own rules for labels are wider.
fn label_name(text: &str) -> Result<String, String> {
    let (prefix, name) = text.split_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    if text == Topology::NODE {
        return Err("it is the node's name already".to_owned());
    }
    let domain = |part: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !part.is_empty() && part.chars().all(inner) && !part.starts_with('-') && !part.ends_with('-')
    };
    if prefix.is_some_and(|prefix| prefix.len() > 63 || !prefix.split('.').all(domain)) {
        return Err("what stands before the `/` has to be a domain name of at most 63 lower-case letters".to_owned());
    }
    label_value(name)?;
    Ok(text.to_owned())
}

fn label_value(text: &str) -> Result<String, String> {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if text.len() > 63 || !text.chars().all(inner) || !edge(text.chars().next()) || !edge(text.chars().last()) {
        return Err(
            "write up to 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit".to_owned()
        );
    }
    Ok(text.to_owned())
}

/// The characters that Ceph allows in names of file systems, groups and subvolumes.
fn ceph_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || !text.chars().all(fits) || text.starts_with('.') {
        return Err("write letters, digits, `-`, `_` and `.`".to_owned());
    }
    Ok(text.to_owned())
}

fn monitor(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("v1:").or_else(|| text.strip_prefix("v2:")).unwrap_or(text);
    let port = address.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
    match port {
        Some((host, Ok(_))) if !host.is_empty() && !host.contains([',', '/', ' ']) => Ok(text.to_owned()),
        _ => Err("write a host and a port, such as v2:10.0.0.1:3300 or v1:10.0.0.1:6789".to_owned()),
    }
}

pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    MountPath::new("the path", text).map(|path| path.as_path().to_owned()).map_err(|error| error.to_string())
}

/// unix(7): `sun_path` has 108 bytes with the terminating NUL.
pub(super) fn socket_path(text: &str) -> Result<PathBuf, String> {
    if text.len() > 107 {
        return Err(format!("a socket's path has at most 107 bytes, and this has {}", text.len()));
    }
    absolute(text)
}

/// A filter takes any word for a module's name, so that a misspelt level would silence everything.
fn log_level(text: &str) -> Result<String, String> {
    let level = |word: &str| ["off", "error", "warn", "info", "debug", "trace"].contains(&word);
    let part = |part: &str| part.rsplit_once('=').map_or(level(part), |(_, word)| level(word));
    if !text.split(',').all(part) || text.parse::<tracing_subscriber::EnvFilter>().is_err() {
        return Err("write error, warn, info, debug or trace, or parts such as info,berth=debug".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn boolean(text: &str) -> Result<bool, String> {
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
