//! What a class, a VolumeAttributesClass, a volume's attributes and mount options may say: one struct for each, unknown
//! keys refused.

use super::names::{self, Given, Site};
use crate::config::services::{MEMORY, bucket_name, checksums, region, service_url};
use crate::error::{Error, ErrorKind, Result};
use crate::objectfs::settings::{Checksums, Consistency};
use crate::objectfs::usage::Limits;
use crate::volume::{Access, Capability, MountFlag, Parameters, parse_bytes};

/// Parameters of a StorageClass for `s3.csi.berth.dev`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ClassParameters {
    /// `service`: the name of a service of the configuration. Absent: the first one, or what `endpoint` says.
    pub(super) service: Option<String>,
    /// `endpoint`, and with it `region`, `pathStyle` and `checksums`: a service that no configuration has.
    pub(super) endpoint: EndpointParameters,
    /// `bucket`: volumes are prefixes in this one. Absent: each is a bucket of its own.
    pub(super) bucket: Option<String>,
    /// `bucketPrefix`: how the names of those buckets begin. Absent: `berth-`.
    pub(super) bucket_prefix: Option<String>,
    /// `path`: the prefix, such as `${pvc.namespace}/${pvc.name}`. Absent: a name that nobody else has.
    pub(super) path: Option<String>,
    /// `onDelete`: what becomes of the files with the volume.
    pub(super) keeps: bool,
    /// How it is mounted.
    pub(super) mount: MountParameters,
    /// `limit: none`: the claim's size is no limit.
    pub(super) is_unlimited: bool,
}

/// An endpoint, as a class or a volume's attributes say it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct EndpointParameters {
    /// `endpoint`: `https://s3.example.com`.
    pub(super) url: Option<String>,
    /// `region`: absent: `us-east-1`.
    pub(super) region: Option<String>,
    /// `pathStyle`: absent: `true`.
    pub(super) path_style: Option<bool>,
    /// `checksums`: `when-required` or `when-supported`.
    pub(super) checksums: Option<Checksums>,
}

/// How a volume is mounted, in a class as in a volume's attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MountParameters {
    /// `consistency`: `strict` or `write-back`. Absent: `strict`.
    pub(super) consistency: Option<Consistency>,
    /// `uid`: the owner of files that say none. Absent: 0.
    pub(super) uid: Option<u32>,
    /// `gid`: their group.
    pub(super) gid: Option<u32>,
    /// `fileMode`: their permissions in octal. Absent: `0644`.
    pub(super) file_mode: Option<u32>,
    /// `dirMode`: those of directories. Absent: `0755`.
    pub(super) dir_mode: Option<u32>,
    /// `maxAge`: how old names and attributes may be, in milliseconds. Absent: 1 s.
    pub(super) max_age: Option<u64>,
    /// `memory`: for data in flight, in bytes. Absent: the node's `mounter.memory`.
    pub(super) memory: Option<u64>,
    /// `cache: "false"`: nothing is kept on the nodes' disks.
    pub(super) is_uncached: bool,
    /// `patience`: how long calls are tried again while the service is away, in milliseconds. Absent: 5 minutes.
    pub(super) patience: Option<u64>,
}

/// Parameters of a VolumeAttributesClass: they can be changed while the volume is in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MutableParameters {
    /// `limit`: `enforced` or `none`. Counts in mounts that are there, too.
    pub(super) is_unlimited: Option<bool>,
    /// `maxAge`: counts from the next mount on.
    pub(super) max_age: Option<u64>,
    /// `memory`: counts from the next mount on.
    pub(super) memory: Option<u64>,
}

/// A volume's attributes: what CreateVolume has told, or what an administrator wrote by hand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    /// `service`: of the configuration. Nodes that know it use that; others use what follows.
    pub(super) service: Option<String>,
    /// `endpoint`, `region`, `pathStyle`, `checksums`.
    pub(super) endpoint: EndpointParameters,
    /// `ca`: PEM certificates.
    pub(super) ca: Option<String>,
    /// `anonymous: "true"`: a public bucket, without credentials.
    pub(super) is_anonymous: bool,
    /// `bucket`.
    pub(super) bucket: Option<String>,
    /// `prefix`: absent: the whole bucket.
    pub(super) prefix: String,
    /// `notes`: where the limit and the usage of a volume are that Berth made.
    pub(super) notes: Option<String>,
    /// `readOnly: "true"`.
    pub(super) is_read_only: bool,
    /// How it is mounted.
    pub(super) mount: MountParameters,
}

impl ClassParameters {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self> {
        let mut parsed = Self::default();
        for (key, value) in parameters {
            match key.as_str() {
                "service" => parsed.service = Some(value.clone()),
                "bucket" => parsed.bucket = Some(given(key, value, bucket_name)?),
                "bucketPrefix" => parsed.bucket_prefix = Some(bucket_prefix(value)?),
                "path" => {
                    names::check_pattern(value)?;
                    parsed.path = Some(value.clone());
                }
                "onDelete" => parsed.keeps = one_of(key, value, [("delete", false), ("retain", true)])?,
                "limit" => parsed.is_unlimited = one_of(key, value, LIMIT)?,
                _ if parsed.endpoint.take(key, value)? || parsed.mount.take(key, value)? => {}
                _ => fail!(
                    Invalid,
                    "parameter {key:?} is not known; known: bucket, bucketPrefix, cache, checksums, consistency, dirMode, endpoint, fileMode, gid, limit, maxAge, memory, onDelete, path, pathStyle, patience, region, service, uid"
                ),
            }
        }
        if parsed.bucket.is_none() && parsed.path.is_some() {
            fail!(Invalid, "parameter \"path\" needs \"bucket\": without it each volume is a bucket of its own");
        }
        if parsed.bucket.is_some() && parsed.bucket_prefix.is_some() {
            fail!(Invalid, "parameters \"bucket\" and \"bucketPrefix\" contradict each other: leave one out");
        }
        if parsed.service.is_some() && parsed.endpoint != EndpointParameters::default() {
            fail!(
                Invalid,
                "a service of the configuration says itself where it is: leave \"service\" out, or \"endpoint\", \"region\", \"pathStyle\" and \"checksums\""
            );
        }
        parsed.endpoint.check()?;
        Ok(parsed)
    }
}

impl EndpointParameters {
    /// Is it one of these keys?
    fn take(&mut self, key: &str, value: &str) -> Result<bool> {
        match key {
            "endpoint" => self.url = Some(given(key, value, service_url)?),
            "region" => self.region = Some(given(key, value, region)?),
            "pathStyle" => self.path_style = Some(boolean(key, value)?),
            "checksums" => self.checksums = Some(given(key, value, checksums)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn check(&self) -> Result<()> {
        if self.url.is_none() && *self != Self::default() {
            fail!(
                Invalid,
                "parameters \"region\", \"pathStyle\" and \"checksums\" need an \"endpoint\" that they are about"
            );
        }
        Ok(())
    }

    /// `None`: nothing is said.
    pub(super) fn site(&self) -> Option<Site> {
        let Self { url, region, path_style, checksums } = self.clone();
        url.map(|url| Site::Given(Given { url, region, path_style, checksums }))
    }
}

impl MountParameters {
    /// Is it one of these keys?
    fn take(&mut self, key: &str, value: &str) -> Result<bool> {
        match key {
            "consistency" => {
                let known = [("strict", Consistency::Strict), ("write-back", Consistency::WriteBack)];
                self.consistency = Some(one_of(key, value, known)?);
            }
            "uid" => self.uid = Some(number(key, value)?),
            "gid" => self.gid = Some(number(key, value)?),
            "fileMode" => self.file_mode = Some(mode(key, value)?),
            "dirMode" => self.dir_mode = Some(mode(key, value)?),
            "maxAge" => self.max_age = Some(duration(key, value)?),
            "memory" => self.memory = Some(memory(value)?),
            "cache" => self.is_uncached = !boolean(key, value)?,
            "patience" => self.patience = Some(duration(key, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// As attributes of a volume, which are read as above.
    pub(super) fn tell(&self, context: &mut Parameters) {
        let consistency = self.consistency.map(|consistency| match consistency {
            Consistency::Strict => "strict".to_owned(),
            Consistency::WriteBack => "write-back".to_owned(),
        });
        let octal = |mode: u32| format!("{mode:04o}");
        let millis = |millis: u64| format!("{millis}ms");
        let all = [
            ("consistency", consistency),
            ("uid", self.uid.map(|uid| uid.to_string())),
            ("gid", self.gid.map(|gid| gid.to_string())),
            ("fileMode", self.file_mode.map(octal)),
            ("dirMode", self.dir_mode.map(octal)),
            ("maxAge", self.max_age.map(millis)),
            ("memory", self.memory.map(|memory| memory.to_string())),
            ("cache", self.is_uncached.then(|| "false".to_owned())),
            ("patience", self.patience.map(millis)),
        ];
        context.extend(all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
    }
}

impl MutableParameters {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self> {
        let mut parsed = Self::default();
        for (key, value) in parameters {
            match key.as_str() {
                "limit" => parsed.is_unlimited = Some(one_of(key, value, LIMIT)?),
                "maxAge" => parsed.max_age = Some(duration(key, value)?),
                "memory" => parsed.memory = Some(memory(value)?),
                _ => fail!(Invalid, "mutable parameter {key:?} is not known; known: limit, maxAge, memory"),
            }
        }
        Ok(parsed)
    }

    /// What it changes of a volume of this size (0: none).
    pub(super) fn apply(&self, limits: &mut Limits, size: u64) {
        if let Some(is_unlimited) = self.is_unlimited {
            limits.bytes = (!is_unlimited && size > 0).then_some(size);
        }
        limits.max_age = self.max_age.or(limits.max_age);
        limits.memory = self.memory.or(limits.memory);
    }
}

impl Attributes {
    pub(super) fn parse(context: &Parameters) -> Result<Self> {
        let mut parsed = Self::default();
        for (key, value) in context {
            match key.as_str() {
                "service" => parsed.service = Some(value.clone()),
                "ca" => parsed.ca = Some(value.clone()),
                "anonymous" => parsed.is_anonymous = boolean(key, value)?,
                "bucket" => parsed.bucket = Some(given(key, value, bucket_name)?),
                "prefix" if value.is_empty() => {}
                "prefix" => parsed.prefix = names::checked_prefix(value)?,
                "notes" if is_notes(value) => parsed.notes = Some(value.clone()),
                "notes" => fail!(Invalid, "notes {value:?} of the volume's attributes are none of Berth's"),
                "readOnly" => parsed.is_read_only = boolean(key, value)?,
                // What people want to know.
                "name" | "claim" | "namespace" | "onDelete" => {}
                // What Kubernetes adds: whose pod it is, who made the volume.
                _ if key.contains('/') => {}
                _ if parsed.endpoint.take(key, value)? || parsed.mount.take(key, value)? => {}
                _ => fail!(
                    Invalid,
                    "volume attribute {key:?} is not known; known: anonymous, bucket, ca, cache, checksums, consistency, dirMode, endpoint, fileMode, gid, maxAge, memory, notes, pathStyle, patience, prefix, readOnly, region, service, uid"
                ),
            }
        }
        Ok(parsed)
    }
}

fn is_notes(text: &str) -> bool {
    let name = text.strip_prefix(names::VOLUMES).and_then(|rest| rest.strip_suffix('/'));
    name.is_some_and(|name| name == names::WHOLE || names::is_volume_name(name))
}

const LIMIT: [(&str, bool); 2] = [("enforced", false), ("none", true)];

fn given<T>(key: &str, value: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<T> {
    parse(value).map_err(|message| Error::new(ErrorKind::Invalid, format!("{key} {value:?} is wrong: {message}")))
}

fn one_of<T: Copy, const N: usize>(key: &str, value: &str, known: [(&str, T); N]) -> Result<T> {
    match known.iter().find(|(word, _)| *word == value) {
        Some((_, meaning)) => Ok(*meaning),
        None => fail!(Invalid, "{key} {value:?} is not one of: {}", known.map(|(word, _)| word).join(", ")),
    }
}

fn boolean(key: &str, value: &str) -> Result<bool> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => fail!(Invalid, "{key} {value:?} is neither \"true\" nor \"false\""),
    }
}

/// -1 means "nobody" to the kernel.
fn number(key: &str, value: &str) -> Result<u32> {
    match value.parse() {
        Ok(number) if number != u32::MAX => Ok(number),
        _ => fail!(Invalid, "{key} {value:?} is not a number from 0 to {}", u32::MAX - 1),
    }
}

/// No setuid bit for files that say nothing themselves.
fn mode(key: &str, value: &str) -> Result<u32> {
    match u32::from_str_radix(value, 8) {
        Ok(mode) if mode <= 0o777 || (key == "dirMode" && mode & !0o3777 == 0) => Ok(mode),
        _ => fail!(Invalid, "{key} {value:?} is not octal permissions such as 0770"),
    }
}

/// `0` means that everything is looked at each time.
fn duration(key: &str, value: &str) -> Result<u64> {
    let digits = value.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &value[digits.len()..] {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60_000),
        "" if value == "0" => Some(0),
        _ => None,
    };
    let millis = unit.and_then(|unit| digits.parse::<u64>().ok()?.checked_mul(unit));
    match millis.filter(|millis| *millis <= 24 * 3_600_000) {
        Some(millis) => Ok(millis),
        None => fail!(Invalid, "{key} {value:?} is not a time: write a whole number with ms, s or m, up to a day"),
    }
}

fn memory(value: &str) -> Result<u64> {
    match parse_bytes(value)? {
        size if size >= MEMORY => Ok(size),
        _ => fail!(Invalid, "memory {value:?} is too little: a mount needs at least 16Mi"),
    }
}

fn bucket_prefix(value: &str) -> Result<String> {
    // With the hash behind it.
    match bucket_name(&format!("{value}{}", "0".repeat(24))) {
        Ok(_) if !value.contains('.') => Ok(value.to_owned()),
        _ => fail!(Invalid, "bucketPrefix {value:?} must be up to 39 lower-case letters, digits and `-`"),
    }
}

/// Can a volume be used like this?
///
/// # Errors
/// `Invalid` for block access, another file system, a group that is no number, and options that are not allowed.
pub(super) fn check_capability(capability: &Capability) -> Result<()> {
    match &capability.access {
        Access::Block => fail!(Invalid, "object storage is a file system: it has no block volumes"),
        Access::Mount { filesystem, flags, group } => {
            if !filesystem.is_empty() {
                fail!(Invalid, "object storage has no file system {filesystem:?}: leave fsType out");
            }
            mount_group(group)?;
            flags.iter().try_for_each(|flag| check_flag(flag.as_str()))
        }
    }
}

/// The group that shall own the files, if one was asked for.
pub(super) fn mount_group(group: &str) -> Result<Option<u32>> {
    match group {
        "" => Ok(None),
        _ => number("the mount group", group).map(Some),
    }
}

/// Options of a mount. Times of access are not kept, device files can't be opened and set-user-id bits don't count on any
/// mount, whether asked for or not.
const FLAGS: [&str; 6] = ["ro", "rw", "noatime", "nodiratime", "nodev", "nosuid"];

fn check_flag(flag: &str) -> Result<()> {
    if !FLAGS.contains(&flag) {
        fail!(Invalid, "mount option {flag:?} is not allowed; allowed: {}", FLAGS.join(", "));
    }
    Ok(())
}

/// Has it the option?
pub(super) fn has_flag(flags: &[MountFlag], wanted: &str) -> bool {
    flags.iter().any(|flag| flag.as_str() == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::AccessMode;

    fn map(pairs: &[(&str, &str)]) -> Parameters {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_class_is_read_whole_and_unknown_keys_are_refused() {
        let class = ClassParameters::parse(&map(&[
            ("service", "main"),
            ("bucket", "data"),
            ("path", "${pvc.namespace}/${pvc.name}"),
            ("onDelete", "retain"),
            ("consistency", "write-back"),
            ("fileMode", "0640"),
            ("dirMode", "2770"),
            ("maxAge", "500ms"),
            ("memory", "64Mi"),
        ]))
        .unwrap();
        assert!(class.keeps && class.mount.consistency == Some(Consistency::WriteBack));
        assert_eq!((class.mount.file_mode, class.mount.dir_mode), (Some(0o640), Some(0o2770)));
        assert_eq!((class.mount.max_age, class.mount.memory), (Some(500), Some(64 << 20)));
        let mut context = Parameters::new();
        class.mount.tell(&mut context);
        assert_eq!(Attributes::parse(&context).unwrap().mount, class.mount);
        for bad in [
            &[("bucketname", "x")][..],
            &[("bucket", "X")],
            &[("path", "a")],
            &[("bucket", "data"), ("path", "../a")],
            &[("bucket", "data"), ("bucketPrefix", "x-")],
            &[("bucketPrefix", "-x")],
            &[("endpoint", "s3.example.com")],
            &[("endpoint", "https://user:key@s3.example.com")],
            &[("endpoint", "https://s3.example.com"), ("service", "main")],
            &[("region", "eu-1")],
            &[("onDelete", "maybe")],
            &[("consistency", "eventual")],
            &[("uid", "4294967295")],
            &[("fileMode", "4755")],
            &[("memory", "1Mi")],
            &[("maxAge", "1h")],
            &[("limit", "off")],
        ] {
            assert_eq!(ClassParameters::parse(&map(bad)).unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
    }

    #[test]
    fn attributes_by_hand_need_no_more_than_a_bucket_and_may_hold_what_kubernetes_adds() {
        let parsed = Attributes::parse(&map(&[
            ("bucket", "data"),
            ("prefix", "models"),
            ("readOnly", "true"),
            ("csi.storage.k8s.io/pod.name", "p"),
        ]));
        let parsed = parsed.unwrap();
        assert_eq!((parsed.prefix.as_str(), parsed.is_read_only), ("models/", true));
        for bad in
            [("prefix", "/a"), ("prefix", ".berth/x"), ("notes", "x/"), ("notes", ".berth/volumes/../x/"), ("acl", "x")]
        {
            assert!(Attributes::parse(&map(&[bad])).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_limit_is_lifted_and_put_in_force_again() {
        let mut limits = Limits { bytes: Some(10), ..Limits::default() };
        MutableParameters::parse(&map(&[("limit", "none"), ("maxAge", "0")])).unwrap().apply(&mut limits, 10);
        assert_eq!((limits.bytes, limits.max_age), (None, Some(0)));
        MutableParameters::parse(&map(&[("limit", "enforced")])).unwrap().apply(&mut limits, 10);
        assert_eq!((limits.bytes, limits.max_age), (Some(10), Some(0)));
        assert!(MutableParameters::parse(&map(&[("uid", "1")])).is_err());
    }

    #[test]
    fn mount_options_are_those_of_the_list() {
        let check = |flag: &str, group: &str| {
            check_capability(&Capability {
                access: Access::Mount {
                    filesystem: String::new(),
                    flags: vec![MountFlag::new(flag).unwrap()],
                    group: group.to_owned(),
                },
                mode: AccessMode::MultiNodeMultiWriter,
            })
        };
        for good in FLAGS {
            check(good, "1000").unwrap();
        }
        for bad in
            ["allow_other", "noexec", "suid", "dev", "fd=3", "user_id=0", "passwd_file=/etc/shadow", "context=a:b:c"]
        {
            assert_eq!(check(bad, "").unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
        assert!(check("ro", "users").is_err() && check("ro", "-1").is_err());
    }
}
