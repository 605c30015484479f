//! What a class, a VolumeAttributesClass and mount options may say: one struct for each, unknown keys refused.

use super::group::Creation;
use crate::error::Result;
use crate::volume::{Access, Capability, MountFlag, Parameters, parse_bytes};

/// Sizes are multiples of this: CephFS counts larger quotas in blocks of 4 MiB.
pub(super) const STEP: u64 = 4 << 20;

/// Parameters of a StorageClass for `cephfs.csi.berth.dev`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ClassParameters {
    /// `cluster`: the name of a cluster of the configuration. Absent: the only one.
    pub(super) cluster: Option<String>,
    /// `filesystem`: absent: the cluster's first.
    pub(super) filesystem: Option<String>,
    /// `group`: the subvolume group, made when it is first needed. Absent: the cluster's first.
    pub(super) group: Option<String>,
    /// `dataPool`: the pool for the files' contents. Absent: the file system's default.
    pub(super) data_pool: Option<String>,
    /// `uid`: the owner of the volume's root. Absent: 0.
    pub(super) uid: Option<u32>,
    /// `gid`: its group.
    pub(super) gid: Option<u32>,
    /// `mode`: its permissions in octal, such as `0770`. Absent: `0755`.
    pub(super) mode: Option<String>,
    /// `isolated: "true"`: the volume's objects have a RADOS namespace of their own.
    pub(super) is_isolated: bool,
    /// `pin`: which MDS serves it, see [`Pin`].
    pub(super) pin: Option<Pin>,
    /// `backingSnapshot: "false"`: a read-only volume from a snapshot is copied too, instead of showing the snapshot.
    pub(super) copies_snapshots: bool,
}

/// Parameters of a VolumeAttributesClass: they can be changed while the volume is in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MutableParameters {
    /// `pin`: which MDS serves it.
    pub(super) pin: Option<Pin>,
    /// `quota`: at least this size, such as `20Gi`. A smaller one than the volume has is refused.
    pub(super) quota: Option<u64>,
}

/// `export=RANK`, `distributed=0|1` or `random=FRACTION` (CephFS, "Subvolume pinning").
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    pub(super) kind: &'static str,
    pub(super) setting: String,
}

impl ClassParameters {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self> {
        let mut parsed = Self::default();
        for (key, value) in parameters {
            match key.as_str() {
                "cluster" => parsed.cluster = Some(value.clone()),
                "filesystem" => parsed.filesystem = Some(ceph_name(key, value)?),
                "group" => parsed.group = Some(ceph_name(key, value)?),
                "dataPool" => parsed.data_pool = Some(ceph_name(key, value)?),
                "uid" => parsed.uid = Some(number(key, value)?),
                "gid" => parsed.gid = Some(number(key, value)?),
                "mode" => parsed.mode = Some(mode(value)?),
                "isolated" => parsed.is_isolated = boolean(key, value)?,
                "pin" => parsed.pin = Some(Pin::parse(value)?),
                "backingSnapshot" => parsed.copies_snapshots = !boolean(key, value)?,
                _ => fail!(
                    Invalid,
                    "parameter {key:?} is not known; known: backingSnapshot, cluster, dataPool, filesystem, gid, group, isolated, mode, pin, uid"
                ),
            }
        }
        Ok(parsed)
    }
}

impl ClassParameters {
    /// A subvolume as the class wants it, of this size in bytes.
    pub(super) fn creation(&self, size: Option<u64>) -> Creation<'_> {
        Creation {
            size,
            uid: self.uid,
            gid: self.gid,
            mode: self.mode.as_deref(),
            data_pool: self.data_pool.as_deref(),
            is_isolated: self.is_isolated,
        }
    }
}

impl MutableParameters {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self> {
        let mut parsed = Self::default();
        for (key, value) in parameters {
            match key.as_str() {
                "pin" => parsed.pin = Some(Pin::parse(value)?),
                "quota" => parsed.quota = Some(quota(value)?),
                _ => fail!(Invalid, "mutable parameter {key:?} is not known; known: pin, quota"),
            }
        }
        Ok(parsed)
    }
}

impl Pin {
    fn parse(text: &str) -> Result<Self> {
        let fraction = |text: &str| text.parse::<f64>().is_ok_and(|value| (0.0..=1.0).contains(&value));
        let pin = match text.split_once('=') {
            Some(("export", rank)) if rank.parse::<i32>().is_ok_and(|rank| rank >= -1) => Some(("export", rank)),
            Some(("distributed", value @ ("0" | "1"))) => Some(("distributed", value)),
            Some(("random", value)) if fraction(value) => Some(("random", value)),
            _ => None,
        };
        match pin {
            Some((kind, setting)) => Ok(Self { kind, setting: setting.to_owned() }),
            None => fail!(Invalid, "pin {text:?} is not export=RANK, distributed=0, distributed=1 or random=FRACTION"),
        }
    }
}

fn ceph_name(key: &str, value: &str) -> Result<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if matches!(value, "" | "." | "..") || !value.chars().all(fits) {
        fail!(Invalid, "{key} {value:?} must be letters, digits, `-`, `_` and `.`, and not `.` or `..`");
    }
    Ok(value.to_owned())
}

/// The manager refuses larger ones only when it has made half of the subvolume.
fn number(key: &str, value: &str) -> Result<u32> {
    match value.parse() {
        Ok(number) if i32::try_from(number).is_ok() => Ok(number),
        _ => fail!(Invalid, "{key} {value:?} is not a number from 0 to {}", i32::MAX),
    }
}

/// In the steps that sizes have.
fn quota(value: &str) -> Result<u64> {
    match parse_bytes(value)?.checked_next_multiple_of(STEP) {
        Some(size) if i64::try_from(size).is_ok() => Ok(size),
        _ => fail!(Invalid, "quota {value:?} is too large"),
    }
}

fn boolean(key: &str, value: &str) -> Result<bool> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => fail!(Invalid, "{key} {value:?} is neither \"true\" nor \"false\""),
    }
}

fn mode(value: &str) -> Result<String> {
    match u32::from_str_radix(value, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(value.to_owned()),
        _ => fail!(Invalid, "mode {value:?} is not octal permissions such as 0770"),
    }
}

/// Can a volume be used like this?
///
/// # Errors
/// `Invalid` for block access, another file system, a mount group, and options that are not allowed.
pub(super) fn check_capability(capability: &Capability) -> Result<()> {
    match &capability.access {
        Access::Block => fail!(Invalid, "cluster storage is a file system: it has no block volumes"),
        Access::Mount { filesystem, flags, group } => {
            if !matches!(filesystem.as_str(), "" | "ceph" | "cephfs") {
                fail!(Invalid, "file system {filesystem:?} is not what cluster storage is made of: leave fsType out");
            }
            if !group.is_empty() {
                fail!(Invalid, "cluster storage takes no mount group: the class's parameters uid, gid and mode set it");
            }
            flags.iter().try_for_each(|flag| check_flag(flag.as_str()))
        }
    }
}

/// Options of every mount.
const GENERIC: [&str; 12] = [
    "ro",
    "rw",
    "noatime",
    "atime",
    "relatime",
    "strictatime",
    "nodiratime",
    "nodev",
    "nosuid",
    "noexec",
    "sync",
    "dirsync",
];
/// Options of the kernel client without a value (Documentation/filesystems/ceph.rst).
const WORDS: [&str; 15] = [
    "acl",
    "noacl",
    "asyncreaddir",
    "noasyncreaddir",
    "copyfrom",
    "nocopyfrom",
    "dcache",
    "nodcache",
    "dirstat",
    "nodirstat",
    "rbytes",
    "norbytes",
    "wsync",
    "nowsync",
    "noshare",
];
/// Options of the kernel client that take a whole number.
const NUMBERS: [&str; 9] = [
    "rsize",
    "wsize",
    "rasize",
    "readdir_max_entries",
    "readdir_max_bytes",
    "caps_max",
    "caps_wanted_delay_min",
    "caps_wanted_delay_max",
    "mount_timeout",
];
/// Options of the kernel client with fixed values.
const VALUES: [(&str, &[&str]); 3] = [
    ("recover_session", &["no", "clean"]),
    ("ms_mode", &["legacy", "crc", "secure", "prefer-crc", "prefer-secure"]),
    ("read_from_replica", &["no", "balance", "localize"]),
];

/// The allow-list. What names users, keys, monitors or paths is ours to say.
fn check_flag(flag: &str) -> Result<()> {
    let is_allowed = match flag.split_once('=') {
        None => GENERIC.contains(&flag) || WORDS.contains(&flag),
        Some(("context", _)) => true,
        Some((key, value)) if NUMBERS.contains(&key) => value.parse::<u64>().is_ok(),
        Some((key, value)) => VALUES.iter().any(|(known, values)| *known == key && values.contains(&value)),
    };
    if !is_allowed {
        fail!(
            Invalid,
            "mount option {flag:?} is not allowed for cluster storage: docs/configuration.md lists those that are"
        );
    }
    Ok(())
}

/// The options in two parts: those of every mount, and those that only the kernel client knows.
pub(super) fn split_flags(flags: &[MountFlag]) -> (Vec<&str>, Vec<&str>) {
    flags.iter().map(MountFlag::as_str).partition(|flag| GENERIC.contains(flag) || flag.starts_with("context="))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::volume::AccessMode;

    fn map(pairs: &[(&str, &str)]) -> Parameters {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_parameter_is_read_and_an_unknown_one_is_refused_with_the_known() {
        let class = ClassParameters::parse(&map(&[
            ("cluster", "a"),
            ("filesystem", "fs"),
            ("group", "g"),
            ("dataPool", "p.d"),
            ("uid", "1000"),
            ("gid", "0"),
            ("mode", "2770"),
            ("isolated", "true"),
            ("pin", "export=2"),
            ("backingSnapshot", "false"),
        ]))
        .unwrap();
        assert_eq!((class.uid, class.mode.as_deref(), class.is_isolated), (Some(1000), Some("2770"), true));
        assert_eq!(class.pin.unwrap(), Pin { kind: "export", setting: "2".to_owned() });
        assert!(class.copies_snapshots);
        let error = ClassParameters::parse(&map(&[("fsName", "x")])).unwrap_err();
        assert!(error.to_string().contains("known: backingSnapshot"), "{error}");
        for bad in [
            ("group", "a/b"),
            ("group", ".."),
            ("uid", "-1"),
            ("uid", "2147483648"),
            ("mode", "999"),
            ("mode", "10000"),
            ("isolated", "yes"),
            ("pin", "export"),
            ("pin", "distributed=2"),
            ("pin", "random=2"),
        ] {
            assert_eq!(ClassParameters::parse(&map(&[bad])).unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
        assert_eq!(MutableParameters::parse(&map(&[("quota", "1Gi")])).unwrap().quota, Some(1 << 30));
        assert_eq!(MutableParameters::parse(&map(&[("quota", "1")])).unwrap().quota, Some(4 << 20));
        assert!(MutableParameters::parse(&map(&[("quota", "18446744073709551615")])).is_err());
        assert!(MutableParameters::parse(&map(&[("mode", "0700")])).is_err());
    }

    #[test]
    fn mount_options_are_those_of_the_list() {
        let check = |flag: &str| {
            check_capability(&Capability {
                access: Access::Mount {
                    filesystem: String::new(),
                    flags: vec![MountFlag::new(flag).unwrap()],
                    group: String::new(),
                },
                mode: AccessMode::MultiNodeMultiWriter,
            })
        };
        for good in ["noatime", "rasize=16777216", "recover_session=no", "ms_mode=secure", "nowsync"] {
            check(good).unwrap();
        }
        for bad in
            ["secret=x", "name=admin", "fs=other", "mon_addr=1.2.3.4", "rsize=x", "suid", "ms_mode=none", "key=a"]
        {
            assert_eq!(check(bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
    }
}
