//! Limits of I/O for a pod's control group (`io.max` of cgroup v2), each for one device.
//!
//! See `Documentation/admin-guide/cgroup-v2.rst` of Linux. kubelet makes the groups; nothing here makes or removes one.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, ErrorKind, Result};

/// kubelet's own root may lie so many folders below the hierarchy's: in a slice, or in the container that is a node.
const DEPTH: u32 = 3;

/// Limits per second for one device. `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Reads.
    pub read_iops: Option<u64>,
    /// Writes.
    pub write_iops: Option<u64>,
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
}

/// The control groups of a pod below `root`, which is `/sys/fs/cgroup`: one, unless several kubelets share the hierarchy; or
/// none, when the pod is gone or the hierarchy is not of version 2.
///
/// kubelet's two drivers name them `kubepods/QUALITY/podUID` and `kubepods.slice/kubepods-QUALITY.slice/kubepods-QUALITY-podUID.slice`,
/// the latter with underscores in the UID; both may lie below a root of kubelet's own, with whose name the slices' begin.
///
/// # Errors
/// `Invalid` when that can't be a UID.
pub fn pod_groups(root: &Path, pod: &str) -> Result<Vec<PathBuf>> {
    if pod.is_empty() || !pod.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        fail!(Invalid, "{pod:?} can't be the UID of a pod");
    }
    let wanted = Wanted { folder: format!("pod{pod}"), slice: format!("-pod{}.slice", pod.replace('-', "_")) };
    let mut found = Vec::new();
    // Without a look at all the machine's services, where it is as usual.
    for usual in ["kubepods", "kubepods.slice"] {
        wanted.search(&root.join(usual), true, 0, &mut found);
    }
    if found.is_empty() {
        wanted.search(root, false, DEPTH, &mut found);
    }
    Ok(found)
}

struct Wanted {
    folder: String,
    slice: String,
}

impl Wanted {
    /// Goes down where pods are, and `depth` folders more to find that. What vanishes meanwhile, or can't be read, holds no pod.
    fn search(&self, folder: &Path, holds_pods: bool, depth: u32, found: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            if holds_pods {
                let is_quality = |quality: &str| name == quality || name.ends_with(&format!("-{quality}.slice"));
                if name == self.folder || name.ends_with(&self.slice) {
                    found.push(path);
                } else if is_quality("burstable") || is_quality("besteffort") {
                    self.search(&path, true, 0, found);
                }
            } else if name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice") {
                self.search(&path, true, 0, found);
            } else if depth > 0 {
                self.search(&path, false, depth - 1, found);
            }
        }
    }
}

/// Sets all four limits of a group for the device with this number, as stat(2) has it. Those that are `None` are lifted.
///
/// # Errors
/// `Invalid` for a limit of nothing; `NotFound` when the group or the device is gone; `Precondition` when the kernel or the
/// group's parents don't have the io controller.
pub fn set_limits(group: &Path, device: u64, limits: Limits) -> Result<()> {
    let what = || format!("cannot limit I/O of the control group {}", group.display());
    let mut line = number(device);
    for (key, value) in limits.named() {
        // Formatting into a string can't fail.
        let _ = match value {
            Some(0) => fail!(Invalid, "{}: a limit of 0 would stop it for ever", what()),
            Some(value) => write!(line, " {key}={value}"),
            None => write!(line, " {key}=max"),
        };
    }
    let file = group.join("io.max");
    if !file.exists() {
        if !group.exists() {
            fail!(NotFound, "{}: it is gone", what());
        }
        enable_io(group).map_err(|error| Error::caused(ErrorKind::Precondition, what(), error))?;
    }
    std::fs::OpenOptions::new()
        .write(true)
        .open(&file)
        .and_then(|mut file| {
            use std::io::Write;
            file.write_all(line.as_bytes())
        })
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV) => {
                Error::caused(ErrorKind::NotFound, format!("{} to {line}", what()), error)
            }
            _ => Error::io(format!("{} to {line}", what()), error),
        })
}

/// The limits of a group, by device number.
///
/// # Errors
/// `NotFound` when the group is gone.
pub fn limits(group: &Path) -> Result<BTreeMap<u64, Limits>> {
    let file = group.join("io.max");
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        // Without the controller there are no limits.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && group.exists() => return Ok(BTreeMap::new()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {
            fail!(NotFound, "the control group {} is gone", group.display())
        }
        Err(error) => return Err(error).context(|| format!("cannot read {}", file.display())),
    };
    Ok(text.lines().filter_map(parse).collect())
}

impl Limits {
    fn named(self) -> [(&'static str, Option<u64>); 4] {
        [("rbps", self.read_bytes), ("wbps", self.write_bytes), ("riops", self.read_iops), ("wiops", self.write_iops)]
    }
}

/// A line of `io.max`: `259:0 rbps=max wbps=1048576 riops=max wiops=100`.
fn parse(line: &str) -> Option<(u64, Limits)> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut limits = Limits::default();
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().ok();
        match key {
            "rbps" => limits.read_bytes = value,
            "wbps" => limits.write_bytes = value,
            "riops" => limits.read_iops = value,
            "wiops" => limits.write_iops = value,
            _ => {}
        }
    }
    Some((rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?), limits))
}

/// A group has the controllers that each of its ancestors hands on.
fn enable_io(group: &Path) -> std::io::Result<()> {
    let hands_on: Vec<_> = group
        .ancestors()
        .skip(1)
        .map(|folder| folder.join("cgroup.subtree_control"))
        .take_while(|file| file.exists())
        .collect();
    for file in hands_on.iter().rev() {
        if !std::fs::read_to_string(file)?.split_whitespace().any(|controller| controller == "io") {
            std::fs::write(file, "+io")?;
        }
    }
    Ok(())
}

fn number(device: u64) -> String {
    format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "3f2a-77";

    /// A tree in which each folder hands no controller on.
    fn tree(folders: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cgroup.subtree_control"), "cpu memory").unwrap();
        for folder in folders {
            let mut path = dir.path().to_owned();
            for part in folder.split('/') {
                path.push(part);
                std::fs::create_dir_all(&path).unwrap();
                std::fs::write(path.join("cgroup.subtree_control"), "").unwrap();
            }
        }
        dir
    }

    #[test]
    fn a_pods_group_is_found_wherever_kubelet_puts_it() {
        for place in [
            "kubepods/pod3f2a-77",
            "kubepods/burstable/pod3f2a-77",
            "kubepods/besteffort/pod3f2a-77",
            "kubepods.slice/kubepods-pod3f2a_77.slice",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod3f2a_77.slice",
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod3f2a_77.slice",
            "kubelet/kubepods/besteffort/pod3f2a-77",
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod3f2a_77.slice",
            "system.slice/docker-0.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod3f2a_77.slice",
        ] {
            let others = [
                "kubepods/burstable/pod3f2a-777",
                "kubepods/burstable/podx/pod3f2a-77",
                "kubepods.slice/kubepods-pod3f2a_7.slice",
                "kubepods.slice/kubepods-pod13f2a_77.slice/cri-0.scope",
                "a/b/c/d/kubepods/pod3f2a-77",
                "user.slice/pod3f2a-77",
                place,
            ];
            let dir = tree(&others);
            assert_eq!(pod_groups(dir.path(), POD).unwrap(), [dir.path().join(place)], "{place}");
        }
        let dir = tree(&["kubepods/pod1"]);
        assert_eq!(pod_groups(dir.path(), POD).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(pod_groups(Path::new("/no/such"), POD).unwrap(), Vec::<PathBuf>::new());
        for bad in ["", "..", "a/b", "*"] {
            assert_eq!(pod_groups(dir.path(), bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
    }

    #[test]
    fn limits_are_written_as_the_kernel_wants_them() {
        let dir = tree(&["kubepods/pod1"]);
        let group = dir.path().join("kubepods/pod1");
        let device = rustix::fs::makedev(259, 3);
        let limits_now = Limits { write_bytes: Some(1 << 20), read_iops: Some(100), ..Limits::default() };
        // The kernel would make the file as soon as the parents hand the controller on.
        assert_eq!(set_limits(&group, device, limits_now).unwrap_err().kind(), ErrorKind::NotFound);
        for parent in ["", "kubepods"] {
            let handed = std::fs::read_to_string(dir.path().join(parent).join("cgroup.subtree_control")).unwrap();
            assert_eq!(handed, "+io", "{parent}");
        }
        assert_eq!(std::fs::read_to_string(group.join("cgroup.subtree_control")).unwrap(), "");
        assert_eq!(limits(&group).unwrap(), BTreeMap::new());
        std::fs::write(group.join("io.max"), "").unwrap();
        set_limits(&group, device, limits_now).unwrap();
        let written = std::fs::read_to_string(group.join("io.max")).unwrap();
        assert_eq!(written, "259:3 rbps=max wbps=1048576 riops=100 wiops=max");
        assert_eq!(limits(&group).unwrap(), BTreeMap::from([(device, limits_now)]));
        let nothing = Limits { write_iops: Some(0), ..Limits::default() };
        assert_eq!(set_limits(&group, device, nothing).unwrap_err().kind(), ErrorKind::Invalid);
        let gone = dir.path().join("kubepods/pod2");
        assert_eq!(set_limits(&gone, device, limits_now).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(limits(&gone).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
