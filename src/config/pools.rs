//! The keys of pools of local volumes: directories, disks, volume groups.

use std::path::PathBuf;

use super::document::{Reader, Section};
use super::parse::{absolute, boolean, plain_name};
use super::{Carve, DiskRule, Disks, Fallback, Layout, Pattern, Pool, Source};
use crate::volume::parse_bytes;

/// Below it, a pool of disks has its file systems in a folder of its name.
const MOUNTS: &str = "/var/lib/berth/pools";

impl<'a> Reader<'a> {
    pub(super) fn pool(&self, section: Section<'_>) -> Option<Pool> {
        let name = section.required("name", |text| plain_name(text, 63));
        let source = self.source(&section);
        let path = match source {
            Some(Source::Folder) => section.required("path", absolute),
            _ => {
                let usual = name.as_ref().map(|name| PathBuf::from(MOUNTS).join(name));
                section.read("path", absolute).unwrap_or(usual)
            }
        };
        let cap = section.read("cap", |text| match parse_bytes(text) {
            Ok(0) => Err("nothing would fit: write a size, or leave it out".to_owned()),
            size => size.map_err(|error| error.to_string()),
        });
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
        if fallback == Some(Fallback::None) && cap.is_some() && matches!(source, Some(Source::Disks(_))) {
            self.mistake::<()>(
                &section.at("cap"),
                "is for `fallback: root` where a pool has `disks`: those are used whole",
            );
        }
        let carves = section
            .values("carves", |text| Carve::parse(text).ok_or_else(|| "write directory, lvm or image".to_owned()));
        if fallback == Some(Fallback::Root)
            && matches!(&source, Some(Source::Disks(disks)) if disks.layout != Layout::Xfs)
        {
            self.mistake::<()>(
                &section.at("fallback"),
                "is offered with `layout: xfs` only: name a second pool for the root disk",
            );
        }
        let is_group = match &source {
            Some(Source::Group(_)) => true,
            Some(Source::Disks(disks)) => disks.layout == Layout::Lvm,
            Some(Source::Folder) | None => false,
        };
        if is_group && thin == Some(true) {
            self.mistake::<()>(&section.at("thin"), "is for images only: logical volumes have all their space");
        }
        if let Some(carves) = carves.as_ref().filter(|carves| !carves.is_empty())
            && is_group != carves.contains(&Carve::Lvm)
        {
            let why = if is_group { "a volume group has the carve lvm" } else { "the carve lvm needs a volume group" };
            self.mistake::<()>(&section.at("carves"), why);
        }
        section.end();
        let (cap, fallback) = (cap.flatten(), fallback?);
        Some(Pool { name: name?, source: source?, path: path?, cap, thin: thin?, fallback, carves: carves? })
    }

    /// Exactly one of `path`, `disks` and `group` says what the pool is made of; `disks` may have a `path` besides.
    fn source(&self, section: &Section<'_>) -> Option<Source> {
        let (has_path, has_disks, has_group) = (section.has("path"), section.has("disks"), section.has("group"));
        let layout = section
            .read("layout", |text| match text {
                "xfs" => Ok(Layout::Xfs),
                "striped" => Ok(Layout::Striped),
                "lvm" => Ok(Layout::Lvm),
                _ => Err("write xfs, striped or lvm".to_owned()),
            })
            .unwrap_or(Some(Layout::Xfs));
        let create = section.read("create", boolean).unwrap_or(Some(false));
        for key in ["layout", "create"].into_iter().filter(|key| !has_disks && section.has(key)) {
            self.mistake::<()>(&section.at(key), "is only for pools with `disks`");
        }
        let contradicts = |key: &str, other: &str| {
            self.mistake(&section.at(key), format!("contradicts `{other}`: leave one of them out"))
        };
        match (has_path, has_disks, has_group) {
            (_, true, true) => contradicts("group", "disks"),
            (true, false, true) => contradicts("group", "path"),
            (_, true, false) => {
                let known = self.mistakes.borrow().len();
                let rules: Vec<_> = section.list("disks").into_iter().map(|rule| self.disk_rule(rule)).collect();
                if rules.is_empty() && self.mistakes.borrow().len() == known {
                    self.mistake::<()>(
                        &section.at("disks"),
                        "is empty: list at least one rule, such as {models: [...]}",
                    );
                }
                let rules = rules.into_iter().collect::<Option<Vec<_>>>()?;
                Some(Source::Disks(Disks { rules, layout: layout?, create: create? }))
            }
            (false, false, true) => section.required("group", group_name).map(Source::Group),
            (true, false, false) => Some(Source::Folder),
            (false, false, false) => {
                self.mistake(&section.at("path"), "is missing: a pool has a `path`, `disks` or a `group`")
            }
        }
    }

    fn disk_rule(&self, section: Section<'_>) -> Option<DiskRule> {
        let size = |key| section.read(key, |text| parse_bytes(text).map_err(|error| error.to_string()));
        let paths = section.values("paths", |text| match text.starts_with("/dev/") {
            true => Pattern::parse(text),
            false => Err("write a path below /dev, such as /dev/nvme*n1 or /dev/disk/by-id/nvme-*".to_owned()),
        });
        let (models, serials) = (section.values("models", Pattern::parse), section.values("serials", Pattern::parse));
        let (min_size, max_size) = (size("minSize"), size("maxSize"));
        let rotational = section.read("rotational", boolean).unwrap_or(Some(false));
        if let (Some(Some(min)), Some(Some(max))) = (min_size, max_size)
            && min > max
        {
            self.mistake::<()>(&section.at("maxSize"), "is below `minSize`: no disk would fit");
        }
        let chooses = ["paths", "models", "serials", "minSize", "maxSize"].into_iter().any(|key| section.has(key));
        if !chooses {
            let path = section.at("paths");
            self.mistake::<()>(
                &path,
                "is missing: without it, `models`, `serials`, `minSize` or `maxSize` any disk fits",
            );
        }
        section.end();
        Some(DiskRule {
            paths: paths?,
            models: models?,
            serials: serials?,
            min_size: min_size.flatten(),
            max_size: max_size.flatten(),
            rotational: rotational?,
        })
    }

    /// What is right by itself may be wrong beside the other pools.
    pub(super) fn check_pools(&self, pools: &[Option<Pool>]) {
        for (index, pool) in pools.iter().enumerate() {
            let Some(pool) = pool else { continue };
            for earlier in pools[..index].iter().flatten() {
                if earlier.name == pool.name {
                    self.mistake::<()>(&format!("pools[{index}].name"), format!("{} is used twice", pool.name));
                }
                if has_directory(earlier)
                    && has_directory(pool)
                    && (earlier.path.starts_with(&pool.path) || pool.path.starts_with(&earlier.path))
                {
                    let message = format!("lies in pool {}, or that one in this", earlier.name);
                    self.mistake::<()>(&format!("pools[{index}].path"), message);
                }
                if let (Some(one), Some(other)) = (volume_group(earlier), volume_group(pool))
                    && one == other
                {
                    let message = format!("pool {} has the volume group {one} too", earlier.name);
                    self.mistake::<()>(&format!("pools[{index}].group"), message);
                }
            }
        }
    }
}

/// Does something of it lie at its path?
fn has_directory(pool: &Pool) -> bool {
    !matches!(pool.source, Source::Group(_)) || pool.fallback == Fallback::Root
}

/// The volume group that it is, or would be made of.
fn volume_group(pool: &Pool) -> Option<String> {
    match &pool.source {
        Source::Group(name) => Some(name.clone()),
        Source::Disks(Disks { layout: Layout::Lvm | Layout::Striped, .. }) => Some(format!("berth-{}", pool.name)),
        _ => None,
    }
}

/// lvm(8), "Valid names".
fn group_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '_' | '.' | '-');
    if text.is_empty() || text.len() > 127 || !text.chars().all(fits) || text.starts_with(['-', '.']) {
        return Err("write letters, digits, `+`, `_`, `.` and `-`, beginning with none of the last two".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Mistake};
    use super::*;

    fn parse(pools: &str) -> Result<Vec<Pool>, Vec<Mistake>> {
        let text = format!("pools: [{pools}]\ndrivers: [{{backend: nvme, socket: /run/a}}]");
        Config::parse(&text, &|_| None).map(|config| config.pools)
    }

    #[test]
    fn a_pool_is_made_of_a_directory_or_disks_or_a_group() {
        let pools = parse(
            "{name: plain, path: /mnt/a},
             {name: fast, disks: [{paths: ['/dev/nvme*n1'], models: ['Amazon EC2*'], minSize: 100Gi}, {serials: [S1], rotational: true}]},
             {name: wide, disks: [{maxSize: 2Ti}], layout: striped, create: true, path: /mnt/wide},
             {name: old, group: vg_data, cap: 1Ti}",
        )
        .unwrap();
        assert_eq!((&pools[0].source, pools[0].path.to_str().unwrap()), (&Source::Folder, "/mnt/a"));
        let Source::Disks(fast) = &pools[1].source else { panic!("{:?}", pools[1]) };
        assert_eq!((fast.layout, fast.create), (Layout::Xfs, false));
        assert_eq!(pools[1].path.to_str().unwrap(), "/var/lib/berth/pools/fast");
        assert!(fast.rules[0].paths[0].fits("/dev/nvme3n1") && fast.rules[0].models[0].fits("Amazon EC2 x"));
        assert_eq!((fast.rules[0].min_size, fast.rules[0].rotational), (Some(100 << 30), false));
        assert!(fast.rules[1].rotational);
        let Source::Disks(wide) = &pools[2].source else { panic!("{:?}", pools[2]) };
        assert_eq!((wide.layout, wide.create, pools[2].path.to_str().unwrap()), (Layout::Striped, true, "/mnt/wide"));
        assert_eq!(pools[3].source, Source::Group("vg_data".to_owned()));
    }

    #[test]
    fn what_chooses_no_disk_or_every_disk_is_a_mistake() {
        for (pool, path, message) in [
            ("{name: a}", "pools[0].path", "a `path`, `disks` or a `group`"),
            ("{name: a, path: /a, group: b}", "pools[0].group", "contradicts `path`"),
            ("{name: a, disks: [{minSize: 1}], group: b}", "pools[0].group", "contradicts `disks`"),
            ("{name: a, disks: []}", "pools[0].disks", "at least one rule"),
            ("{name: a, disks: nvme0n1}", "pools[0].disks", "a list is needed"),
            ("{name: a, disks: [{}]}", "pools[0].disks[0].paths", "any disk fits"),
            ("{name: a, disks: [{rotational: false}]}", "pools[0].disks[0].paths", "any disk fits"),
            ("{name: a, disks: [{paths: [nvme0n1]}]}", "pools[0].disks[0].paths[0]", "below /dev"),
            ("{name: a, disks: [{models: ['[']}]}", "pools[0].disks[0].models[0]", "`[` has no `]`"),
            ("{name: a, disks: [{minSize: 2, maxSize: 1}]}", "pools[0].disks[0].maxSize", "no disk would fit"),
            ("{name: a, disks: [{minSize: 2, size: 1}]}", "pools[0].disks[0].size", "known here: maxSize, minSize"),
            ("{name: a, disks: [{minSize: 2}], layout: raid5}", "pools[0].layout", "xfs, striped or lvm"),
            ("{name: a, disks: [{minSize: 2}], cap: 1Gi}", "pools[0].cap", "used whole"),
            ("{name: a, disks: [{minSize: 2}], fallback: root}", "pools[0].cap", "is needed"),
            (
                "{name: a, disks: [{minSize: 2}], layout: lvm, cap: 1Gi, fallback: root}",
                "pools[0].fallback",
                "with `layout: xfs` only",
            ),
            ("{name: a, path: /a, layout: xfs}", "pools[0].layout", "only for pools with `disks`"),
            ("{name: a, group: b, create: true}", "pools[0].create", "only for pools with `disks`"),
            ("{name: a, group: b, thin: true}", "pools[0].thin", "have all their space"),
            ("{name: a, group: b, carves: [directory]}", "pools[0].carves", "has the carve lvm"),
            ("{name: a, disks: [{minSize: 2}], layout: lvm, carves: [image]}", "pools[0].carves", "has the carve lvm"),
            ("{name: a, path: /a, carves: [lvm]}", "pools[0].carves", "needs a volume group"),
            ("{name: a, group: -b}", "pools[0].group", "letters, digits"),
            ("{name: a, group: b}, {name: c, group: b}", "pools[1].group", "pool a has the volume group b too"),
            (
                "{name: a, disks: [{minSize: 2}], layout: lvm}, {name: c, group: berth-a}",
                "pools[1].group",
                "volume group berth-a",
            ),
            ("{name: a, disks: [{minSize: 2}]}, {name: c, path: /var/lib/berth}", "pools[1].path", "lies in pool a"),
        ] {
            let mistakes = parse(pool).unwrap_err();
            let [mistake] = &mistakes[..] else { panic!("{pool}: {mistakes:#?}") };
            assert_eq!(mistake.path, path, "{pool}");
            assert!(mistake.message.contains(message), "{pool}: {mistake}");
        }
    }
}
