//! Names, kinds and refusals.

use super::super::super::store::{Metadata, StoreErrorKind};
use super::*;

#[tokio::test]
async fn an_open_file_outlives_its_name() {
    let mount = Mount::new().await;
    mount.save("f", b"hello").await.unwrap();
    let open = mount.open("f", 0).await.unwrap();
    mount.unlink("f").await.unwrap();
    assert_eq!(mount.look("f").await.unwrap_err(), Errno::NOENT);
    assert_eq!(mount.keys(), Vec::<String>::new());
    assert_eq!(mount.contents(open).await.unwrap(), b"hello");
    mount.put(open, 5, b" there").await.unwrap();
    assert_eq!(mount.contents(open).await.unwrap(), b"hello there");
    assert_eq!(mount.fs.getattr(WHO, open.0, None).await.unwrap().0.nlink, 0);
    mount.close(open).await.unwrap();
    assert_eq!(mount.double.keys(), Vec::<String>::new(), "nothing is left of it");
}

#[tokio::test]
async fn a_new_file_that_is_unlinked_before_its_close_is_never_uploaded() {
    let mount = Mount::new().await;
    let open = mount.open("f", 0).await.unwrap();
    mount.put(open, 0, b"x").await.unwrap();
    mount.unlink("f").await.unwrap();
    assert_eq!(mount.contents(open).await.unwrap(), b"x");
    mount.close(open).await.unwrap();
    assert_eq!(mount.double.count("put"), 0);
    assert!(mount.double.keys().is_empty());
}

#[tokio::test]
async fn the_last_entry_of_a_directory_leaves_a_marker_behind() {
    let mount = Mount::new().await;
    mount.double.put_raw("p/d/f", "x", Metadata::default());
    mount.double.put_raw("p/e/f", "x", Metadata::default());
    mount.unlink("d/f").await.unwrap();
    assert_eq!(mount.keys(), ["p/d/", "p/e/f"]);
    mount.rename("e/f", "g").await.unwrap();
    assert_eq!(mount.keys(), ["p/d/", "p/e/", "p/g"]);
    mount.rmdir("d").await.unwrap();
    assert_eq!(mount.list("").await, ["e", "g"]);
}

#[tokio::test]
async fn a_directory_is_removed_only_when_it_is_empty() {
    let mount = Mount::new().await;
    mount.mkdir("d").await.unwrap();
    mount.double.put_raw("p/d/theirs", "x", Metadata::default());
    assert_eq!(mount.rmdir("d").await, Err(Errno::NOTEMPTY), "also of what nobody here knew");
    mount.double.delete_raw("p/d/theirs");
    let open = mount.open("d/ours", 0).await.unwrap();
    assert_eq!(mount.rmdir("d").await, Err(Errno::NOTEMPTY), "also of what is not in the bucket yet");
    mount.unlink("d/ours").await.unwrap();
    mount.close(open).await.unwrap();
    mount.rmdir("d").await.unwrap();
    assert!(mount.keys().is_empty());
}

#[tokio::test]
async fn renames_refuse_what_posix_refuses() {
    let mount = Mount::new().await;
    for folder in ["a", "b", "full"] {
        mount.mkdir(folder).await.unwrap();
    }
    mount.save("full/x", b"x").await.unwrap();
    mount.save("f", b"f").await.unwrap();
    for (from, to, flags, errno) in [
        ("a", "full", 0, Errno::NOTEMPTY),
        ("a", "f", 0, Errno::NOTDIR),
        ("f", "a", 0, Errno::ISDIR),
        ("a", "a/b", 0, Errno::INVAL),
        ("f", "a", 1, Errno::EXIST),
        ("f", "full/x", 2, Errno::INVAL),
        ("none", "f", 0, Errno::NOENT),
    ] {
        assert_eq!(mount.rename_with(from, to, flags).await, Err(errno), "{from} -> {to}");
    }
    mount.rename("f", "full/x").await.unwrap();
    assert_eq!(mount.load("full/x").await.unwrap(), b"f");
    mount.rename("full", "a").await.unwrap();
    assert_eq!(mount.load("a/x").await.unwrap(), b"f");
    assert_eq!(mount.keys(), ["p/a/", "p/a/x", "p/b/"]);
}

#[tokio::test]
async fn open_files_follow_renames() {
    let mount = Mount::new().await;
    mount.mkdir("d").await.unwrap();
    mount.save("d/old", b"hello").await.unwrap();
    let clean = mount.open("d/old", 0).await.unwrap();
    let fresh = mount.open("d/fresh", 0).await.unwrap();
    mount.put(fresh, 0, b"fresh").await.unwrap();
    mount.rename("d", "e").await.unwrap();
    assert_eq!(mount.contents(clean).await.unwrap(), b"hello");
    mount.put(clean, 0, b"J").await.unwrap();
    mount.rename("e/old", "e/older").await.unwrap();
    mount.close(clean).await.unwrap();
    mount.close(fresh).await.unwrap();
    assert_eq!(mount.keys(), ["p/e/", "p/e/fresh", "p/e/older"]);
    assert_eq!(mount.double.object("p/e/older").unwrap().0, "Jello");
    assert_eq!(mount.double.object("p/e/fresh").unwrap().0, "fresh");
    assert_eq!(mount.look("e/older").await.unwrap().ino, clean.0, "a rename keeps the inode");
}

#[tokio::test]
async fn names_that_can_not_be_keys_are_refused_and_such_keys_are_not_shown() {
    let double = Double::new();
    for key in ["a//b", "./x", "../y", "d/./z", ".berth/volumes/x", "fine", "both", "both/x"] {
        double.put_raw(key, "x", Metadata::default());
    }
    let mount = Mount::over(&double, |settings| settings.prefix = String::new()).await;
    assert_eq!(mount.list("").await, ["a", "both", "d", "fine"]);
    assert!(mount.list("a").await.is_empty());
    assert_eq!(mount.look("both").await.unwrap().mode & 0o170_000, 0o040_000, "the directory is shown");
    assert_eq!(mount.look(".berth").await.unwrap_err(), Errno::NOENT);
    assert_eq!(mount.mkdir(".berth").await, Err(Errno::PERM));
    assert_eq!(mount.mkdir(&"n".repeat(256)).await, Err(Errno::NAMETOOLONG));
    assert_eq!(mount.look(&"n".repeat(256)).await.unwrap_err(), Errno::NAMETOOLONG);
    let odd = <OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff");
    assert_eq!(mount.fs.mkdir(WHO, 1, odd, 0o755, 0).await.unwrap_err(), Errno::ILSEQ);
    let mut path = String::new();
    for _ in 0..4 {
        path.push_str(&"d".repeat(250));
        mount.mkdir(&path).await.unwrap();
        path.push('/');
    }
    assert_eq!(mount.mkdir(&format!("{path}{}", "e".repeat(30))).await, Err(Errno::NAMETOOLONG));
}

#[tokio::test]
async fn links_and_special_files_are_what_they_were() {
    let double = Double::new();
    let mount = Mount::over(&double, |_| ()).await;
    mount.fs.symlink(WHO, 1, OsStr::new("link"), OsStr::new("to/here")).await.unwrap();
    for (name, mode, rdev) in [("fifo", 0o010_666, 0), ("dev", 0o020_660, 0x0103), ("sock", 0o140_777, 0)] {
        mount.fs.mknod(WHO, 1, OsStr::new(name), mode, 0o022, rdev).await.unwrap();
    }
    let other = Mount::over(&double, |_| ()).await;
    let link = other.look("link").await.unwrap();
    assert_eq!((link.mode, link.size), (0o120_777, 7));
    assert_eq!(other.fs.readlink(WHO, link.ino).await.unwrap(), "to/here");
    assert_eq!(other.look("fifo").await.unwrap().mode, 0o010_644);
    let device = other.look("dev").await.unwrap();
    assert_eq!((device.mode, device.rdev), (0o020_640, 0x0103));
    assert_eq!(other.fs.link(WHO, link.ino, 1, OsStr::new("hard")).await.unwrap_err(), Errno::OPNOTSUPP);
}

#[tokio::test]
async fn attributes_are_in_the_bucket_when_the_call_returns() {
    let double = Double::new();
    let mount = Mount::over(&double, |_| ()).await;
    mount.mkdir("d").await.unwrap();
    mount.save("f", b"x").await.unwrap();
    for path in ["d", "f"] {
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 5);
        let mtime = Some(crate::fuse::filesystem::Time::At(time));
        let change = SetAttr { mode: Some(0o701), uid: Some(3), gid: Some(4), mtime, ..SetAttr::default() };
        mount.set(path, change).await.unwrap();
        let ino = mount.look(path).await.unwrap().ino;
        mount.fs.setxattr(WHO, ino, OsStr::new("user.k"), Bytes::from_static(b"v\0w"), 0).await.unwrap();
        let other = Mount::over(&double, |_| ()).await;
        let attr = other.look(path).await.unwrap();
        assert_eq!((attr.mode & 0o7777, attr.uid, attr.gid, attr.mtime), (0o701, 3, 4, time), "{path}");
        assert_eq!(other.fs.getxattr(WHO, attr.ino, OsStr::new("user.k")).await.unwrap(), b"v\0w"[..]);
        assert_eq!(other.fs.listxattr(WHO, attr.ino).await.unwrap(), [os("user.k")]);
    }
    let ino = mount.look("f").await.unwrap().ino;
    for (name, value, flags, errno) in [
        ("user.k", vec![1], 1, Errno::EXIST),
        ("user.none", vec![1], 2, Errno::NODATA),
        ("user.big", vec![1; 2000], 0, Errno::NOSPC),
        ("system.posix_acl_access", vec![1], 0, Errno::OPNOTSUPP),
    ] {
        let set = mount.fs.setxattr(WHO, ino, OsStr::new(name), value.into(), flags).await;
        assert_eq!(set, Err(errno), "{name}");
    }
    mount.fs.removexattr(WHO, ino, OsStr::new("user.k")).await.unwrap();
    assert_eq!(mount.fs.getxattr(WHO, ino, OsStr::new("user.k")).await.unwrap_err(), Errno::NODATA);
}

#[tokio::test]
async fn files_are_cut_extended_and_punched() {
    let mount = Mount::new().await;
    mount.save("f", b"0123456789").await.unwrap();
    mount.set("f", SetAttr { size: Some(4), ..SetAttr::default() }).await.unwrap();
    assert_eq!(mount.double.object("p/f").unwrap().0, "0123", "in the bucket when truncate returns");
    let open = mount.open("f", 0).await.unwrap();
    mount.fs.fallocate(WHO, open.0, open.1, 0, 6, 0).await.unwrap();
    mount.fs.fallocate(WHO, open.0, open.1, 1, 2, 3).await.unwrap();
    mount.fs.fallocate(WHO, open.0, open.1, 0, 100, 1).await.unwrap();
    assert_eq!(mount.fs.fallocate(WHO, open.0, open.1, 0, 2, 8).await, Err(Errno::OPNOTSUPP));
    assert_eq!(mount.fs.lseek(WHO, open.0, open.1, 100, 3).await, Err(Errno::NXIO));
    mount.fs.fsync(WHO, open.0, open.1, false).await.unwrap();
    assert_eq!(mount.double.object("p/f").unwrap().0, b"0\x00\x003\x00\x00"[..]);
    mount.close(open).await.unwrap();
}

#[tokio::test]
async fn a_read_only_mount_changes_nothing() {
    let double = Double::new();
    double.put_raw("p/d/f", "x", Metadata::default());
    let mount = Mount::over(&double, |settings| settings.read_only = true).await;
    let ino = mount.look("d/f").await.unwrap().ino;
    assert_eq!(mount.load("d/f").await.unwrap(), b"x");
    assert_eq!(mount.fs.open(WHO, ino, O_RDWR).await.unwrap_err(), Errno::ROFS);
    assert_eq!(mount.mkdir("e").await, Err(Errno::ROFS));
    assert_eq!(mount.unlink("d/f").await, Err(Errno::ROFS));
    assert_eq!(mount.rename("d", "e").await, Err(Errno::ROFS));
    assert_eq!(mount.set("d/f", SetAttr { mode: Some(0), ..SetAttr::default() }).await.unwrap_err(), Errno::ROFS);
    mount.fs.ended().await;
    assert_eq!(double.keys(), ["p/d/f"]);
}

#[tokio::test]
async fn refusals_of_the_service_reach_the_program() {
    let mount = Mount::new().await;
    mount.look("").await.unwrap();
    for (kind, errno) in [
        (StoreErrorKind::Denied, Errno::ACCESS),
        (StoreErrorKind::Unavailable, Errno::IO),
        (StoreErrorKind::NoBucket, Errno::IO),
    ] {
        mount.double.fail("*", kind);
        assert_eq!(mount.look("x").await.unwrap_err(), errno);
        mount.double.heal();
    }
}
