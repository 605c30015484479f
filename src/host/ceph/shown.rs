//! What a CephFS mount shows, told from its line of the mount table: nothing of the file system itself is touched,
//! which would hang where the cluster is gone.

use std::ffi::OsStr;

use procfs::process::MountInfo;

use crate::host::mounts;

/// Before the tag in the `fsname` that a FUSE mount is made with, since a FUSE mount says nothing else of itself.
pub const FUSE_TAG: &str = "berth:";

/// What a mount shows, as far as the mount table knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The cluster's UUID; only of a mount by the kernel in the newer syntax.
    pub fsid: Option<String>,
    /// The file system's name; only of a mount by the kernel.
    pub filesystem: Option<String>,
    /// In the file system, or, of a FUSE mount, below the directory that it was given.
    pub path: String,
    /// What stands after [`FUSE_TAG`].
    pub tag: Option<String>,
}

impl Shown {
    /// From a line of `/proc/self/mountinfo`. `None`: not a CephFS, or a FUSE mount that isn't ours.
    pub fn of_line(line: &str) -> Option<Self> {
        let mount = MountInfo::from_line(line).ok()?;
        let source = unescaped(mount.mount_source.as_deref()?);
        let root = unescaped(&mount.root);
        match mount.fs_type.as_str() {
            "ceph" => {
                // The first slash begins the path: there is none in names and addresses.
                let (device, path) = source.split_at(source.find('/')?);
                let option =
                    || mount.super_options.get("mds_namespace").cloned().flatten().map(|name| unescaped(&name));
                let (fsid, filesystem) = match device.strip_suffix('=') {
                    Some(device) => {
                        let (fsid, filesystem) = device.split_once('@')?.1.split_once('.')?;
                        (Some(fsid.to_owned()), Some(filesystem.to_owned()))
                    }
                    None => (None, option()),
                };
                Some(Self { fsid, filesystem, path: joined(path, &root), tag: None })
            }
            "fuse" | "fuse.ceph-fuse" => {
                let tag = source.strip_prefix(FUSE_TAG)?.to_owned();
                Some(Self { fsid: None, filesystem: None, path: root, tag: Some(tag) })
            }
            _ => None,
        }
    }
}

fn unescaped(text: &str) -> String {
    mounts::unescaped(OsStr::new(text)).to_string_lossy().into_owned()
}

/// The mounted path with what of it is bound here.
fn joined(path: &str, root: &str) -> String {
    match (path.trim_end_matches('/'), root.trim_end_matches('/')) {
        ("", "") => "/".to_owned(),
        (path, root) => format!("{path}{root}"),
    }
}
