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

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of Linux 6.1 and ceph-fuse 16.2.
    #[test]
    fn a_line_of_the_mount_table_tells_what_is_shown() {
        const FSID: &str = "de6cea59-b792-4972-9740-990cc8c47a77";
        let named = (Some(FSID), Some("cephfs"), None);
        for (line, expected) in [
            (
                "72 25 0:58 / /run/a\\040place rw,noexec,relatime - ceph admin@de6cea59-b792-4972-9740-990cc8c47a77.cephfs=/volumes/vm/use/7add7a50 rw,name=admin,secret=<hidden>,ms_mode=prefer-crc,mount_timeout=30,acl,mon_addr=127.0.0.1:40000,recover_session=clean,rasize=1048576",
                Some((named, "/volumes/vm/use/7add7a50")),
            ),
            (
                "74 25 0:58 /sub\\040dir /run/bind rw,noexec,relatime - ceph admin@de6cea59-b792-4972-9740-990cc8c47a77.cephfs=/volumes/vm/use/7add7a50 rw,name=admin,secret=<hidden>,ms_mode=prefer-crc,acl,mon_addr=127.0.0.1:40000",
                Some((named, "/volumes/vm/use/7add7a50/sub dir")),
            ),
            (
                "74 25 0:59 /.snap/snap1/8923faa3 /run/snapshot ro,relatime shared:7 - ceph admin@de6cea59-b792-4972-9740-990cc8c47a77.cephfs=/volumes/vm/snapped ro,name=admin,secret=<hidden>,acl,mon_addr=127.0.0.1:40000,recover_session=clean",
                Some((named, "/volumes/vm/snapped/.snap/snap1/8923faa3")),
            ),
            (
                "72 25 0:58 /below /run/root rw,relatime - ceph admin@de6cea59-b792-4972-9740-990cc8c47a77.cephfs=/ rw,name=admin,secret=<hidden>,acl,mon_addr=127.0.0.1:40000",
                Some((named, "/below")),
            ),
            (
                "72 25 0:58 / /run/v1 rw,relatime - ceph 127.0.0.1:40001,[::1]:40001:/volumes/vm/old/575d7dca rw,name=admin,secret=<hidden>,mount_timeout=30,acl,mds_namespace=cephfs,recover_session=clean",
                Some(((None, Some("cephfs"), None), "/volumes/vm/old/575d7dca")),
            ),
            (
                "72 25 0:58 / /run/v1 rw,relatime - ceph 127.0.0.1:40001:/ rw,name=admin,secret=<hidden>,acl",
                Some(((None, None, None), "/")),
            ),
            (
                "72 25 0:58 / /run/fuse rw,nosuid,nodev,relatime - fuse berth:cluster.vm.fuse rw,user_id=0,group_id=0,allow_other",
                Some(((None, None, Some("cluster.vm.fuse")), "/")),
            ),
            ("72 25 0:58 / /run/fuse rw,relatime - fuse.ceph-fuse ceph-fuse rw,user_id=0,group_id=0", None),
            ("72 25 0:58 / /run/fuse rw,relatime - fuse.sshfs berth:home rw,user_id=0,group_id=0", None),
            ("72 25 254:0 / / rw,relatime - ext4 /dev/vda rw", None),
            ("no line", None),
        ] {
            let expected = expected.map(|((fsid, filesystem, tag), path): (_, &str)| Shown {
                fsid: fsid.map(str::to_owned),
                filesystem: filesystem.map(str::to_owned),
                path: path.to_owned(),
                tag: tag.map(str::to_owned),
            });
            assert_eq!(Shown::of_line(line), expected, "{line}");
        }
    }
}
