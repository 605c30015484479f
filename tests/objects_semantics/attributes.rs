//! Modes, owners, times, extended attributes, and what other tools make of them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::fs::{getxattr, listxattr, makedev, mknodat, removexattr, setxattr, utimensat};

use crate::common::files::{fails, python, sh};
use crate::common::mount::Tree;

crate::on_services!(
    and_plain: [
        modes_and_owners_are_kept,
        times_are_kept_to_the_nanosecond,
        changes_update_the_times,
        extended_attributes_are_kept,
        pipes_sockets_and_devices_are_kept,
    ],
    only: [
        other_tools_read_the_attributes,
        attributes_of_other_tools_are_read,
        what_is_not_ours_is_kept,
    ]
);

/// Sets access and modification time.
fn touch(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// > Mode, owner and group are kept, of files, directories and links, and survive a write, a rename and a new mount.
fn modes_and_owners_are_kept(tree: &Tree) {
    let mount = tree.mount();
    fs::write(mount.at("f"), "x").unwrap();
    fs::create_dir(mount.at("d")).unwrap();
    symlink("f", mount.at("l")).unwrap();
    fs::set_permissions(mount.at("f"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(mount.at("d"), fs::Permissions::from_mode(0o1730)).unwrap();
    std::os::unix::fs::chown(mount.at("d"), Some(5), Some(6)).unwrap();
    std::os::unix::fs::lchown(mount.at("l"), Some(7), Some(8)).unwrap();
    fs::write(mount.at("g"), "").unwrap();
    std::os::unix::fs::chown(mount.at("g"), Some(4_000_000_000), Some(9)).unwrap();
    fs::set_permissions(mount.at("g"), fs::Permissions::from_mode(0o0)).unwrap();
    fs::write(mount.at("g"), "root may").unwrap();
    fs::rename(mount.at("g"), mount.at("h")).unwrap();
    for place in [&mount, &tree.elsewhere()] {
        let stat = |name: &str| {
            let stat = fs::symlink_metadata(place.at(name)).unwrap();
            (stat.mode() & 0o7777, stat.uid(), stat.gid())
        };
        assert_eq!(stat("f"), (0o4751, 0, 0));
        assert_eq!(stat("d"), (0o1730, 5, 6));
        assert_eq!(stat("l"), (0o777, 7, 8));
        assert_eq!(stat("h"), (0, 4_000_000_000, 9));
        assert_eq!(fs::read(place.at("h")).unwrap(), b"root may");
    }
    // What is created is made with the umask of its program.
    sh(
        &mount.path,
        "umask 027; touch masked; mkdir masked-dir; test $(stat -c %a masked) = 640; test $(stat -c %a masked-dir) = 750",
    );
}

/// > A modification time is kept to the nanosecond, also before 1970 and after 2038, of files and directories.
fn times_are_kept_to_the_nanosecond(tree: &Tree) {
    let mount = tree.mount();
    let times =
        [(1_700_000_000, 123_456_789), (-86_400, 5), (-1, 999_999_999), (0, 0), (1, 1), (4_102_444_800, 0), (0, 100)];
    for (index, (seconds, nanoseconds)) in times.into_iter().enumerate() {
        let (file, dir) = (mount.at(format!("f{index}")), mount.at(format!("d{index}")));
        fs::write(&file, "x").unwrap();
        fs::create_dir(&dir).unwrap();
        touch(&file, seconds, nanoseconds);
        touch(&dir, seconds, nanoseconds);
    }
    for place in [&mount, &tree.elsewhere()] {
        for (index, wanted) in times.into_iter().enumerate() {
            for kind in ["f", "d"] {
                let stat = fs::metadata(place.at(format!("{kind}{index}"))).unwrap();
                assert_eq!((stat.mtime(), stat.mtime_nsec()), wanted, "{kind}");
            }
        }
    }
    // An open file's time may be set before its bytes are in the bucket, as tar, cp -p and rsync do.
    let open = File::create(mount.at("open")).unwrap();
    open.write_all_at(b"bytes", 0).unwrap();
    open.set_modified(UNIX_EPOCH + Duration::new(1_000_000_000, 7)).unwrap();
    drop(open);
    for place in [&mount, &tree.elsewhere()] {
        let stat = fs::metadata(place.at("open")).unwrap();
        assert_eq!((stat.mtime(), stat.mtime_nsec(), stat.len()), (1_000_000_000, 7, 5));
    }
}

/// > A write updates mtime and ctime, a change of mode, owner or name ctime alone, and what comes, goes or is renamed the
/// > mtime and ctime of its directory.
fn changes_update_the_times(tree: &Tree) {
    let mount = tree.mount();
    let long_ago = |path: &Path| touch(path, 1_000_000_000, 0);
    let file = mount.at("f");
    fs::write(&file, "x").unwrap();
    let is_old = |path: &Path| fs::metadata(path).unwrap().mtime() == 1_000_000_000;
    let ctime = |path: &Path| {
        let stat = fs::symlink_metadata(path).unwrap();
        Duration::new(stat.ctime().try_into().unwrap(), stat.ctime_nsec().try_into().unwrap())
    };
    let pause = || std::thread::sleep(Duration::from_millis(20));
    let mut last = ctime(&file);
    let mut moves_on = |what: &str| {
        let now = ctime(&file);
        assert!(now > last, "{what} is no change: {now:?} {last:?}");
        last = now;
        pause();
    };
    pause();
    long_ago(&file);
    moves_on("utimens");
    assert!(is_old(&file));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    moves_on("chmod");
    std::os::unix::fs::chown(&file, Some(1), Some(1)).unwrap();
    moves_on("chown");
    setxattr(&file, "user.x", b"1", XattrFlags::empty()).unwrap();
    moves_on("setxattr");
    assert!(is_old(&file));
    let handle = OpenOptions::new().write(true).open(&file).unwrap();
    assert!(is_old(&file), "opening is no change");
    handle.write_all_at(b"y", 0).unwrap();
    moves_on("write");
    assert!(!is_old(&file));
    drop(handle);
    long_ago(&file);
    moves_on("utimens");
    sh(&mount.path, "truncate -s 0 f");
    moves_on("truncate");
    assert!(!is_old(&file));
    long_ago(&file);
    assert_eq!(fs::read(&file).unwrap(), b"");
    assert!(is_old(&file), "reading is no change");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(now.abs_diff(ctime(&file)) < Duration::from_secs(600), "times are the node's");
    // Directories.
    let dir = mount.at("d");
    fs::create_dir(&dir).unwrap();
    let changes: [(&str, &dyn Fn()); 6] = [
        ("create", &|| fs::write(dir.join("new"), "").unwrap()),
        ("mkdir", &|| fs::create_dir(dir.join("sub")).unwrap()),
        ("symlink", &|| symlink("x", dir.join("l")).unwrap()),
        ("rename", &|| fs::rename(dir.join("new"), dir.join("newer")).unwrap()),
        ("unlink", &|| fs::remove_file(dir.join("newer")).unwrap()),
        ("rmdir", &|| fs::remove_dir(dir.join("sub")).unwrap()),
    ];
    for (what, change) in changes {
        long_ago(&dir);
        let before = ctime(&dir);
        pause();
        change();
        assert!(!is_old(&dir), "{what}");
        assert!(ctime(&dir) > before, "{what}");
    }
}

/// > Extended attributes of users are kept: any bytes, listed, replaced, removed, on files and directories.
fn extended_attributes_are_kept(tree: &Tree) {
    let mount = tree.mount();
    let (file, dir) = (mount.at("f"), mount.at("d"));
    fs::write(&file, "x").unwrap();
    fs::create_dir(&dir).unwrap();
    let values: [(&str, &[u8]); 4] =
        [("user.text", b"hello"), ("user.bytes", b"\0\xff\n\"%"), ("user.empty", b""), ("user.\u{fc} {}", b"odd name")];
    for path in [&file, &dir] {
        for (name, value) in values {
            setxattr(path, name, value, XattrFlags::CREATE).unwrap();
        }
        fails(setxattr(path, "user.text", b"x", XattrFlags::CREATE), libc::EEXIST);
        fails(setxattr(path, "user.none", b"x", XattrFlags::REPLACE), libc::ENODATA);
        fails(removexattr(path, "user.none"), libc::ENODATA);
        setxattr(path, "user.gone", b"x", XattrFlags::empty()).unwrap();
        removexattr(path, "user.gone").unwrap();
        setxattr(path, "user.text", b"longer than before", XattrFlags::REPLACE).unwrap();
        setxattr(path, "user.text", b"hello", XattrFlags::empty()).unwrap();
    }
    fs::write(&file, "written again").unwrap();
    fs::rename(&file, mount.at("g")).unwrap();
    fs::rename(&dir, mount.at("e")).unwrap();
    for place in [&mount, &tree.elsewhere()] {
        for path in [place.at("g"), place.at("e")] {
            let mut buffer = vec![0; 4096];
            for (name, value) in values {
                let length = getxattr(&path, name, &mut buffer[..]).unwrap();
                assert_eq!(&buffer[..length], value, "{name}");
            }
            fails(getxattr(&path, "user.none", &mut buffer[..]), libc::ENODATA);
            fails(getxattr(&path, "user.text", &mut buffer[..2]), libc::ERANGE);
            let length = listxattr(&path, &mut buffer[..]).unwrap();
            let mut listed: Vec<_> =
                buffer[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
            listed.sort_unstable();
            let mut wanted = values.map(|(name, _)| name.as_bytes());
            wanted.sort_unstable();
            assert_eq!(listed, wanted);
        }
    }
}

/// > Pipes, sockets and device nodes are kept, and are what they are on every node.
fn pipes_sockets_and_devices_are_kept(tree: &Tree) {
    let mount = tree.mount();
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, mount.at("pipe"), FileType::Fifo, mode, 0).unwrap();
    mknodat(CWD, mount.at("null"), FileType::CharacterDevice, mode, makedev(1, 3)).unwrap();
    mknodat(CWD, mount.at("disk"), FileType::BlockDevice, mode, makedev(259, 70_000)).unwrap();
    mknodat(CWD, mount.at("file"), FileType::RegularFile, mode, 0).unwrap();
    fails(mknodat(CWD, mount.at("pipe"), FileType::Fifo, mode, 0), libc::EEXIST);
    let socket = "
import socket, threading
server = socket.socket(socket.AF_UNIX)
server.bind('socket')
server.listen()
client = socket.socket(socket.AF_UNIX)
client.connect('socket')
peer, _ = server.accept()
client.sendall(b'through')
assert peer.recv(7) == b'through'";
    python(&mount.path, socket);
    assert_eq!(sh(&mount.path, "echo through >pipe & cat pipe; wait"), "through\n");
    for place in [&mount, &tree.elsewhere()] {
        let stat = |name: &str| fs::metadata(place.at(name)).unwrap();
        assert!(stat("pipe").file_type().is_fifo());
        assert!(stat("socket").file_type().is_socket());
        assert!(stat("null").file_type().is_char_device());
        assert_eq!(stat("null").rdev(), makedev(1, 3));
        assert!(stat("disk").file_type().is_block_device());
        assert_eq!(stat("disk").rdev(), makedev(259, 70_000));
        assert!(stat("file").is_file() && stat("file").len() == 0);
        assert_eq!(stat("pipe").mode() & 0o777, 0o600);
        let kinds: Vec<_> =
            fs::read_dir(&place.path).unwrap().map(|entry| entry.unwrap().file_type().unwrap()).collect();
        assert_eq!(kinds.iter().filter(|kind| kind.is_fifo() || kind.is_socket()).count(), 2);
    }
    if !tree.is_plain() {
        let object = tree.raw().head(&tree.key("pipe")).unwrap();
        assert_eq!((object.size, object.metadata["mode"].as_str()), (0, "4480"));
    }
}

/// > Mode, owner, times and extended attributes are in the object's metadata where s3fs and rclone look for them.
fn other_tools_read_the_attributes(tree: &Tree) {
    let mount = tree.mount();
    fs::write(mount.at("f"), "x").unwrap();
    fs::set_permissions(mount.at("f"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(mount.at("f"), Some(1000), Some(100)).unwrap();
    setxattr(mount.at("f"), "user.x", b"v", XattrFlags::empty()).unwrap();
    touch(&mount.at("f"), 1_600_000_000, 500_000_000);
    fs::create_dir(mount.at("d")).unwrap();
    touch(&mount.at("d"), 1_600_000_000, 0);
    symlink("target", mount.at("l")).unwrap();
    let head = |key: &str| tree.raw().head(&tree.key(key)).unwrap();
    let file = head("f");
    let get = |name: &str| file.metadata.get(name).map(String::as_str).unwrap_or_default();
    assert_eq!((get("mode"), get("uid"), get("gid")), ("33184", "1000", "100"), "{file:?}");
    assert_eq!(get("mtime").parse::<f64>().unwrap(), 1_600_000_000.5, "{file:?}");
    // URL-encoded JSON, values in base64.
    assert_eq!(get("xattr").to_lowercase(), "%7b%22user.x%22%3a%22dg%3d%3d%22%7d", "{file:?}");
    let dir = head("d/");
    assert_eq!((dir.metadata["mode"].as_str(), dir.metadata["mtime"].as_str()), ("16877", "1600000000"), "{dir:?}");
    let link = head("l");
    assert_eq!(link.metadata["mode"].parse::<u32>().unwrap() & 0o170_000, 0o120_000, "{link:?}");
    assert_eq!(tree.raw().get(&tree.key("l")).unwrap(), b"target");
}

/// > What s3fs, rclone and tools without metadata wrote is read: decimal and octal modes, times with and without a fraction.
fn attributes_of_other_tools_are_read(tree: &Tree) {
    let raw = tree.raw();
    let s3fs = [("mode", "33184"), ("uid", "1000"), ("gid", "100"), ("mtime", "1600000000"), ("ctime", "1600000001")];
    raw.put(&tree.key("s3fs"), b"x", &s3fs);
    raw.put(&tree.key("s3fs-xattr"), b"x", &[("mode", "33188"), ("xattr", "%7B%22user.x%22%3A%22dg%3D%3D%22%7D")]);
    raw.put(&tree.key("s3fs-link"), b"target", &[("mode", "41471"), ("mtime", "1600000000.25")]);
    raw.put(&tree.key("s3fs-dir/"), b"", &[("mode", "16832"), ("uid", "5"), ("gid", "6")]);
    // s3fs leaves the type of directories out when it makes them.
    raw.put(&tree.key("s3fs-new-dir/"), b"", &[("mode", "488"), ("uid", "5"), ("gid", "6"), ("mtime", "1600000000")]);
    let rclone = [("mode", "100640"), ("uid", "1000"), ("gid", "100"), ("mtime", "1600000000.123456789")];
    raw.put(&tree.key("rclone"), b"x", &rclone);
    raw.put(&tree.key("rclone-iso"), b"x", &[("mode", "0100600"), ("mtime", "1600000000")]);
    raw.put(&tree.key("nothing"), b"x", &[]);
    raw.put(
        &tree.key("nonsense"),
        b"x",
        &[("mode", "rw-r--r--"), ("uid", "me"), ("mtime", "yesterday"), ("xattr", "%%%")],
    );
    // The number by which the kernel says "nobody", and names that no program could ask for beside one that it could.
    let xattrs = "%7B%22%22%3A%22dg%3D%3D%22%2C%22foo%22%3A%22dg%3D%3D%22%2C%22user.x%22%3A%22dg%3D%3D%22%7D";
    raw.put(&tree.key("nobodys"), b"x", &[("uid", "4294967295"), ("gid", "4294967295"), ("xattr", xattrs)]);
    let mount = tree.mount();
    let stat = |name: &str| {
        let stat = fs::symlink_metadata(mount.at(name)).unwrap();
        (stat.mode(), stat.uid(), stat.gid(), stat.mtime(), stat.mtime_nsec())
    };
    assert_eq!(stat("s3fs"), (0o100_640, 1000, 100, 1_600_000_000, 0));
    assert_eq!(stat("rclone"), (0o100_640, 1000, 100, 1_600_000_000, 123_456_789));
    assert_eq!((stat("rclone-iso").0, stat("rclone-iso").3), (0o100_600, 1_600_000_000));
    let mut value = [0; 4];
    assert_eq!(getxattr(mount.at("s3fs-xattr"), "user.x", &mut value).unwrap(), 1);
    assert_eq!(value[0], b'v');
    assert_eq!(fs::read_link(mount.at("s3fs-link")).unwrap(), Path::new("target"));
    assert_eq!((stat("s3fs-link").3, stat("s3fs-link").4), (1_600_000_000, 250_000_000));
    let dir = fs::metadata(mount.at("s3fs-dir")).unwrap();
    assert_eq!((dir.mode(), dir.uid(), dir.gid()), (0o40_700, 5, 6));
    let dir = fs::metadata(mount.at("s3fs-new-dir")).unwrap();
    assert_eq!((dir.mode(), dir.uid(), dir.gid(), dir.mtime()), (0o40_750, 5, 6, 1_600_000_000));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
    for name in ["nothing", "nonsense"] {
        let (mode, _, _, mtime, _) = stat(name);
        assert!(mode & 0o170_000 == 0o100_000 && (now - mtime).abs() < 600, "{name}: {mode:o} {mtime}");
        assert_eq!(fs::read(mount.at(name)).unwrap(), b"x");
    }
    assert_eq!((stat("nobodys").1, stat("nobodys").2), (stat("nothing").1, stat("nothing").2));
    let mut listed = [0; 64];
    let length = listxattr(mount.at("nobodys"), &mut listed[..]).unwrap();
    assert_eq!(&listed[..length], b"user.x\0");
    fs::set_permissions(mount.at("nobodys"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(mount.at("nobodys")).unwrap();
}

/// > Metadata and content types that are not ours are kept by chmod, by a write and by a rename.
fn what_is_not_ours_is_kept(tree: &Tree) {
    let names = ["chmod", "write", "rename"];
    for name in names {
        tree.raw().put(&tree.key(name), b"bytes", &[("author", "somebody"), ("checksum-of", "the-original")]);
    }
    let mount = tree.mount();
    fs::set_permissions(mount.at("chmod"), fs::Permissions::from_mode(0o600)).unwrap();
    OpenOptions::new().write(true).open(mount.at("write")).unwrap().write_all_at(b"B", 0).unwrap();
    fs::rename(mount.at("rename"), mount.at("renamed")).unwrap();
    for name in ["chmod", "write", "renamed"] {
        let object = tree.raw().head(&tree.key(name)).unwrap();
        assert_eq!(object.metadata["author"], "somebody", "{name}: {object:?}");
        assert_eq!(object.metadata["checksum-of"], "the-original", "{name}");
    }
    assert_eq!(tree.raw().get(&tree.key("write")).unwrap(), b"Bytes");
    assert_eq!(tree.raw().head(&tree.key("chmod")).unwrap().metadata["mode"], "33152");
}
