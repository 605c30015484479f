//! Which disks a pool's rules mean.

use crate::config::{DiskRule, Pattern};
use crate::host::disks::{Disk, Sort};
use crate::volume::format_bytes;

/// Whether names count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// To choose a disk, all of a rule counts.
    Count,
    /// A disk that carries a pool's file system may have another name than when it was chosen. What it is still counts:
    /// a tenant of another driver may write that file system's UUID onto a disk of his.
    MayHaveChanged,
}

/// Does one of the rules fit? `Err` says why none does.
pub(super) fn check(rules: &[DiskRule], disk: &Disk, names: Names) -> Result<(), String> {
    match rules {
        [only] => check_rule(only, disk, names),
        rules if rules.iter().any(|rule| check_rule(rule, disk, names).is_ok()) => Ok(()),
        rules => Err(format!("none of the {} rules fits", rules.len())),
    }
}

fn check_rule(rule: &DiskRule, disk: &Disk, names: Names) -> Result<(), String> {
    let paths = || disk.links.iter().chain([&disk.path]).map(|path| path.to_string_lossy().into_owned());
    let has_path = || paths().any(|path| any_fits(&rule.paths, &path));
    match disk.sort {
        Sort::Remote => return Err("it comes over a network, so it is not this node's own".to_owned()),
        Sort::Mapped => return Err("it is made of other disks".to_owned()),
        // By its own name: `/dev/*` means no loop device.
        Sort::Loop => {
            let explicit = rule.paths.iter().filter(|pattern| pattern.as_str().starts_with("/dev/loop"));
            if !explicit.clone().any(|pattern| pattern.fits(&disk.path.to_string_lossy())) {
                return Err("it is a loop device, and no path names it as one".to_owned());
            }
        }
        Sort::Local if names == Names::Count && !rule.paths.is_empty() && !has_path() => {
            return Err("none of `paths` fits".to_owned());
        }
        Sort::Local => {}
    }
    if !rule.models.is_empty() && !any_fits(&rule.models, &disk.model) {
        return Err("none of `models` fits".to_owned());
    }
    if !rule.serials.is_empty() && ![&disk.serial, &disk.wwid].iter().any(|serial| any_fits(&rule.serials, serial)) {
        return Err("none of `serials` fits".to_owned());
    }
    if let Some(min) = rule.min_size.filter(|min| disk.size < *min) {
        return Err(format!("it has less than {}", format_bytes(min)));
    }
    if let Some(max) = rule.max_size.filter(|max| disk.size > *max) {
        return Err(format!("it has more than {}", format_bytes(max)));
    }
    match (disk.rotational, rule.rotational) {
        (true, false) => Err("it rotates: allow that with `rotational: true`".to_owned()),
        (false, true) => Err("it does not rotate".to_owned()),
        _ => Ok(()),
    }
}

fn any_fits(patterns: &[Pattern], text: &str) -> bool {
    patterns.iter().any(|pattern| pattern.fits(text))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn disk(name: &str) -> Disk {
        Disk {
            name: name.to_owned(),
            path: format!("/dev/{name}").into(),
            links: vec!["/dev/disk/by-id/nvme-ONE".into()],
            number: 1,
            sequence: 1,
            size: 10 << 30,
            model: "Model A".to_owned(),
            serial: "S1".to_owned(),
            namespace: 1,
            wwid: "eui.1".to_owned(),
            rotational: false,
            read_only: false,
            sort: if name.starts_with("loop") { Sort::Loop } else { Sort::Local },
        }
    }

    fn patterns(texts: &[&str]) -> Vec<Pattern> {
        texts.iter().map(|text| Pattern::parse(text).unwrap()).collect()
    }

    #[test]
    fn a_disk_fits_when_all_of_a_rule_does() {
        let rule = DiskRule {
            paths: patterns(&["/dev/nvme[0-3]n1"]),
            models: patterns(&["Model *"]),
            serials: patterns(&["S1", "S2"]),
            min_size: Some(10 << 30),
            max_size: Some(10 << 30),
            rotational: false,
        };
        let good = disk("nvme0n1");
        let fits = |rule: &DiskRule, disk: &Disk| check(std::slice::from_ref(rule), disk, Names::Count);
        fits(&rule, &good).unwrap();
        let link = DiskRule { paths: patterns(&["/dev/disk/by-id/*ONE"]), ..rule.clone() };
        fits(&link, &good).unwrap();
        let world = DiskRule { serials: patterns(&["eui.*"]), ..rule.clone() };
        fits(&world, &good).unwrap();
        for (bad, why) in [
            (disk("nvme9n1"), "paths"),
            (Disk { model: "B".to_owned(), ..good.clone() }, "models"),
            (Disk { serial: "S3".to_owned(), ..good.clone() }, "serials"),
            (Disk { size: (10 << 30) - 1, ..good.clone() }, "less than 10Gi"),
            (Disk { size: (10 << 30) + 1, ..good.clone() }, "more than 10Gi"),
            (Disk { rotational: true, ..good.clone() }, "rotates"),
            (Disk { sort: Sort::Remote, ..good.clone() }, "network"),
        ] {
            let error = fits(&rule, &bad).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        assert!(fits(&DiskRule { rotational: true, ..rule.clone() }, &good).is_err());
        let other = DiskRule { serials: patterns(&["no"]), ..rule.clone() };
        check(&[other.clone(), rule.clone()], &good, Names::Count).unwrap();
        assert!(check(&[other.clone(), other], &good, Names::Count).is_err());
        // What has been chosen by its name is found under another one, and only then.
        check(std::slice::from_ref(&rule), &disk("nvme9n1"), Names::MayHaveChanged).unwrap();
        assert!(check(&[rule], &Disk { rotational: true, ..good }, Names::MayHaveChanged).is_err());
    }

    #[test]
    fn a_loop_device_has_to_be_named_as_one() {
        for (paths, fits) in [
            (&["/dev/loop3"][..], true),
            (&["/dev/loop*"], true),
            (&["/dev/loop4"], false),
            (&["/dev/*"], false),
            (&[], false),
        ] {
            let rule = DiskRule { paths: patterns(paths), min_size: Some(1), ..DiskRule::default() };
            for names in [Names::Count, Names::MayHaveChanged] {
                assert_eq!(check(std::slice::from_ref(&rule), &disk("loop3"), names).is_ok(), fits, "{paths:?}");
            }
        }
    }
}
