//! What a class, an inline volume and mount options may say: one struct for each, unknown keys refused.

use super::descriptor::Encryption;
use super::limits::Limits;
use super::mkfs;
use crate::config::Carve;
use crate::error::Result;
use crate::host::filesystem::{Attribute, Kind, MountOptions};
use crate::volume::{Access, Capability, CapacityRange, MountFlag, Parameters, parse_bytes};

/// Parameters of a StorageClass for `nvme.csi.berth.dev`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ClassParameters {
    /// `pool`: the name of a pool of the node's configuration. Absent: the pool with the most room.
    pub(super) pool: Option<String>,
    /// `carve`: `directory`, `lvm` or `image`. Absent: what the pool is best at and can be what is asked for.
    pub(super) carve: Option<Carve>,
    /// `mkfsOptions`: options of the allow-list for mkfs, such as `-m 0 -i 65536`; see `mkfs.rs`.
    pub(super) mkfs_options: Vec<String>,
    /// `encryption`: `luks` or `throwaway`; only of the carve `lvm`.
    pub(super) encryption: Option<Encryption>,
    /// `stripes`: over how many disks each volume is laid; only of the carve `lvm`. Absent: one after the other.
    pub(super) stripes: Option<u32>,
    /// `iops`, `bandwidth` and so on: what each pod may do, a second. Not of the carve `directory`.
    pub(super) limits: Limits,
}

/// Attributes of an inline volume (`volumes[].csi.volumeAttributes` of a pod).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InlineAttributes {
    /// `size`: how big, such as `10Gi`. Needed.
    pub(super) size: CapacityRange,
    /// `pool`, `carve` and `mkfsOptions`: as in a StorageClass.
    pub(super) class: Parameters,
}

impl ClassParameters {
    pub(super) fn parse(parameters: &Parameters) -> Result<Self> {
        let mut parsed = Self::default();
        let is_limit = |key: &str| Limits::KEYS.contains(&key);
        let limits = parameters.iter().filter(|(key, _)| is_limit(key));
        parsed.limits = Limits::default().changed_by(&limits.map(|(k, v)| (k.clone(), v.clone())).collect())?;
        for (key, value) in parameters.iter().filter(|(key, _)| !is_limit(key)) {
            match key.as_str() {
                "pool" => parsed.pool = Some(value.clone()),
                "carve" => match Carve::parse(value) {
                    Some(carve) => parsed.carve = Some(carve),
                    None => fail!(Invalid, "carve {value:?} is not known: use directory, lvm or image"),
                },
                "mkfsOptions" => {
                    let words: Vec<_> = value.split_whitespace().map(str::to_owned).collect();
                    // Which of the two it will be is known later, and checked again then.
                    mkfs::check(Kind::Ext4, &words).or_else(|_| mkfs::check(Kind::Xfs, &words))?;
                    parsed.mkfs_options = words;
                }
                "encryption" => {
                    parsed.encryption = Some(match value.as_str() {
                        "luks" => Encryption::Luks,
                        "throwaway" => Encryption::Throwaway,
                        _ => fail!(Invalid, "encryption {value:?} is not known: use luks or throwaway"),
                    });
                }
                "stripes" => match value.parse() {
                    Ok(stripes @ 1..=128) => parsed.stripes = Some(stripes),
                    _ => fail!(Invalid, "stripes {value:?}: write a number of disks from 1 to 128"),
                },
                _ => fail!(
                    Invalid,
                    "parameter {key:?} is not known; known: pool, carve, mkfsOptions, encryption, stripes, {}",
                    Limits::KEYS.join(", ")
                ),
            }
        }
        Ok(parsed)
    }

    /// With the limits of a VolumeAttributesClass.
    pub(super) fn changed_by(self, mutable: &Parameters) -> Result<Self> {
        Ok(Self { limits: self.limits.changed_by(mutable)?, ..self })
    }
}

impl InlineAttributes {
    pub(super) fn parse(context: &Parameters) -> Result<Self> {
        let mut class = context.clone();
        // Kubelet's own (podInfoOnMount, and the mark of an inline volume).
        class.retain(|key, _| !key.starts_with("csi.storage.k8s.io/"));
        let Some(size) = class.remove("size") else {
            fail!(Invalid, "an inline volume needs the attribute `size`, such as `size: 10Gi`");
        };
        if ClassParameters::parse(&class)?.encryption == Some(Encryption::Luks) {
            fail!(Invalid, "an inline volume has no secret with a passphrase: use encryption throwaway");
        }
        let size = i64::try_from(parse_bytes(&size)?).unwrap_or(i64::MAX);
        Ok(Self { size: CapacityRange::new(size, 0)?, class })
    }
}

/// What a volume is wanted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Block,
    /// A file system; which one may be left open.
    Mount(Option<Kind>),
}

impl Wanted {
    /// What becomes of a choice that was left open: XFS, which always grows while mounted, where the volume is big
    /// enough for it, and ext4 below.
    pub(super) fn filesystem(self, size: u64) -> Option<Kind> {
        match self {
            Self::Block => None,
            Self::Mount(Some(kind)) => Some(kind),
            Self::Mount(None) if size >= Kind::Xfs.minimum_size() => Some(Kind::Xfs),
            Self::Mount(None) => Some(Kind::Ext4),
        }
    }
}

/// What a volume is wanted as.
///
/// # Errors
/// `Invalid` for what a local volume can't do: many nodes, both kinds of access, two file systems, unknown options.
pub(super) fn check_capabilities(capabilities: &[Capability]) -> Result<Wanted> {
    let mut wanted: Option<Wanted> = None;
    for capability in capabilities {
        if !capability.mode.is_single_node() {
            fail!(Invalid, "a local volume is used from one node: access mode {:?} is impossible", capability.mode);
        }
        let this = match &capability.access {
            Access::Block => Wanted::Block,
            Access::Mount { filesystem, flags, group } => {
                if !group.is_empty() {
                    fail!(Invalid, "local volumes take no mount group: use fsGroup, which kubelet applies");
                }
                let kind = if filesystem.is_empty() { None } else { Some(Kind::parse(filesystem)?) };
                // With the choice left open, options of either kind may turn out right.
                match kind {
                    Some(kind) => drop(mount_options(kind, flags, false)?),
                    None => drop(
                        mount_options(Kind::Xfs, flags, false).or_else(|_| mount_options(Kind::Ext4, flags, false))?,
                    ),
                }
                Wanted::Mount(kind)
            }
        };
        if wanted.is_some_and(|wanted| wanted != this) {
            fail!(Invalid, "a volume has one file system or is a block device: the capabilities ask for two of these");
        }
        wanted = Some(this);
    }
    Ok(wanted.unwrap_or(Wanted::Mount(None)))
}

/// Are the mount options of these capabilities ones that every mount has, whatever is mounted?
pub(super) fn have_attributes_only(capabilities: &[Capability]) -> bool {
    capabilities.iter().all(|capability| match &capability.access {
        Access::Block => true,
        Access::Mount { flags, .. } => flags
            .iter()
            .all(|flag| matches!(flag.as_str(), "ro" | "rw" | "relatime") || Attribute::parse(flag.as_str()).is_some()),
    })
}

/// Options that take a whole number.
const NUMBERS: [(Kind, &str); 5] = [
    (Kind::Ext4, "commit"),
    (Kind::Ext4, "stripe"),
    (Kind::Xfs, "logbufs"),
    (Kind::Xfs, "sunit"),
    (Kind::Xfs, "swidth"),
];
/// Options that take a size: a number with k, m or g.
const SIZES: [(Kind, &str); 2] = [(Kind::Xfs, "logbsize"), (Kind::Xfs, "allocsize")];
/// Options with fixed values, or none.
const WORDS: [(Kind, &str); 12] = [
    (Kind::Ext4, "data=ordered"),
    (Kind::Ext4, "data=writeback"),
    (Kind::Ext4, "data=journal"),
    (Kind::Ext4, "errors=remount-ro"),
    (Kind::Ext4, "errors=continue"),
    (Kind::Ext4, "delalloc"),
    (Kind::Ext4, "nodelalloc"),
    (Kind::Ext4, "lazytime"),
    (Kind::Xfs, "lazytime"),
    (Kind::Xfs, "largeio"),
    (Kind::Xfs, "inode64"),
    (Kind::Xfs, "swalloc"),
];

/// Turns mount options into what the kernel is told. Only what is listed here is allowed.
pub(super) fn mount_options(kind: Kind, flags: &[MountFlag], read_only: bool) -> Result<MountOptions> {
    let mut options = MountOptions { read_only, ..MountOptions::default() };
    if kind == Kind::Xfs {
        // A restored snapshot has its source's UUID, and both may be mounted on this node.
        options.parameters.push(("nouuid".to_owned(), None));
    }
    for flag in flags {
        let text = flag.as_str();
        let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value)));
        match text {
            "ro" => {
                options.read_only = true;
                continue;
            }
            "rw" | "relatime" => continue,
            _ => {}
        }
        if let Some(attribute) = Attribute::parse(text) {
            options.attributes.push(attribute);
            continue;
        }
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let allowed = WORDS.contains(&(kind, text))
            || value.is_some_and(|value| {
                // From kubelet (CSIDriver `seLinuxMount`); the kernel checks the label, and refuses it without SELinux.
                key == "context"
                    || NUMBERS.contains(&(kind, key)) && digits(value)
                    || SIZES.contains(&(kind, key)) && digits(value.trim_end_matches(['k', 'm', 'g']))
            });
        if !allowed {
            fail!(
                Invalid,
                "mount option {text:?} is not allowed on {}; see docs/configuration.md for those that are",
                kind.name()
            );
        }
        options.parameters.push((key.to_owned(), value.map(str::to_owned)));
    }
    if options.attributes.contains(&Attribute::NoAtime) && options.attributes.contains(&Attribute::StrictAtime) {
        fail!(Invalid, "mount options noatime and strictatime contradict each other");
    }
    Ok(options)
}

/// The same for a directory, which is a part of a file system that is mounted already.
pub(super) fn directory_options(flags: &[MountFlag], read_only: bool) -> Result<MountOptions> {
    for flag in flags {
        let text = flag.as_str();
        if !matches!(text, "ro" | "rw" | "relatime") && Attribute::parse(text).is_none() {
            fail!(Invalid, "mount option {text:?} is not allowed on a directory, only on a whole file system");
        }
    }
    mount_options(Kind::Xfs, flags, read_only)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::AccessMode;

    fn flags(words: &[&str]) -> Vec<MountFlag> {
        words.iter().map(|word| MountFlag::new(*word).unwrap()).collect()
    }

    #[test]
    fn unknown_parameters_are_refused_with_the_known_ones() {
        let parse =
            |key: &str, value: &str| ClassParameters::parse(&Parameters::from([(key.to_owned(), value.to_owned())]));
        assert_eq!(parse("mkfsOptions", " -m  0 ").unwrap().mkfs_options, ["-m", "0"]);
        assert!(
            parse("Pool", "a")
                .unwrap_err()
                .to_string()
                .contains("known: pool, carve, mkfsOptions, encryption, stripes")
        );
        assert!(parse("mkfsOptions", "-J device=/dev/sda").is_err());
    }

    #[test]
    fn an_inline_volume_says_its_size() {
        let context = |pairs: &[(&str, &str)]| -> Parameters {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let parsed =
            InlineAttributes::parse(&context(&[("size", "1Gi"), ("csi.storage.k8s.io/ephemeral", "true")])).unwrap();
        assert_eq!(parsed.size.required(), 1 << 30);
        let luks = context(&[("size", "1Gi"), ("encryption", "luks")]);
        for bad in [context(&[]), context(&[("size", "0")]), context(&[("size", "1Gi"), ("sise", "x")]), luks] {
            assert!(InlineAttributes::parse(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_listed_mount_options_reach_the_kernel() {
        let options =
            mount_options(Kind::Ext4, &flags(&["ro", "noatime", "data=ordered", "commit=30"]), false).unwrap();
        assert!(options.read_only);
        assert_eq!(options.attributes, [Attribute::NoAtime]);
        assert_eq!(options.parameters[1], ("commit".to_owned(), Some("30".to_owned())));
        let labelled = mount_options(Kind::Xfs, &flags(&["context=\"u:r:t:s0:c1,c2\""]), false).unwrap();
        assert_eq!(labelled.parameters[1], ("context".to_owned(), Some("u:r:t:s0:c1,c2".to_owned())));
        for (kind, bad) in [
            (Kind::Ext4, "context"),
            (Kind::Ext4, "fscontext=u:r:t"),
            (Kind::Ext4, "errors=panic"),
            (Kind::Ext4, "journal_path=/etc"),
            (Kind::Ext4, "commit=x"),
            (Kind::Ext4, "logbsize=32k"),
            (Kind::Xfs, "logdev=/dev/sda"),
            (Kind::Xfs, "bind"),
            (Kind::Xfs, "discard"),
        ] {
            assert!(mount_options(kind, &flags(&[bad]), false).is_err(), "{bad}");
        }
        assert!(mount_options(Kind::Xfs, &flags(&["logbsize=256k", "noatime", "strictatime"]), false).is_err());
    }

    #[test]
    fn a_local_volume_is_one_thing_on_one_node() {
        let mount = |filesystem: &str| Capability {
            access: Access::Mount { filesystem: filesystem.to_owned(), flags: Vec::new(), group: String::new() },
            mode: AccessMode::SingleNodeMultiWriter,
        };
        let block = Capability { access: Access::Block, mode: AccessMode::SingleNodeWriter };
        assert_eq!(check_capabilities(&[mount("ext4"), mount("ext4")]).unwrap(), Wanted::Mount(Some(Kind::Ext4)));
        assert_eq!(check_capabilities(std::slice::from_ref(&block)).unwrap(), Wanted::Block);
        let many = Capability { mode: AccessMode::MultiNodeMultiWriter, ..block.clone() };
        for bad in [vec![mount("xfs"), mount("ext4")], vec![mount(""), block], vec![many], vec![mount("ntfs")]] {
            assert!(check_capabilities(&bad).is_err(), "{bad:?}");
        }
    }
}
