//! Who may do what.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use crate::common::files::{as_user, names, succeeded, user_gets};
use crate::common::mount::Tree;

crate::on_services!(
    and_plain: [
        modes_decide_who_reads_and_writes,
        only_the_owner_changes_attributes,
        a_sticky_directory_protects_its_files,
        a_set_group_id_directory_gives_its_group_on,
        privileges_are_dropped_when_they_should,
    ],
    only: []
);

fn mode(path: impl AsRef<std::path::Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// > Modes and owners decide who reads, writes, searches and lists, as on a disk.
fn modes_decide_who_reads_and_writes(tree: &Tree) {
    let mount = tree.mount();
    let dir = mount.at("d");
    fs::create_dir(&dir).unwrap();
    open_up(tree, &mount.path);
    fs::write(dir.join("secret"), "x").unwrap();
    mode(dir.join("secret"), 0o600);
    fs::write(dir.join("open"), "x").unwrap();
    mode(dir.join("open"), 0o644);
    user_gets(1000, &dir, "open('secret')", "EACCES");
    user_gets(1000, &dir, "open('open').read()", "worked");
    user_gets(1000, &dir, "open('open', 'w')", "EACCES");
    user_gets(1000, &dir, "open('new', 'w')", "EACCES");
    user_gets(1000, &dir, "os.mkdir('new')", "EACCES");
    user_gets(1000, &dir, "os.symlink('x', 'new')", "EACCES");
    user_gets(1000, &dir, "os.unlink('open')", "EACCES");
    user_gets(1000, &dir, "os.rename('open', 'other')", "EACCES");
    mode(dir.join("secret"), 0o060);
    chown(dir.join("secret"), None, Some(1000)).unwrap();
    user_gets(1000, &dir, "open('secret', 'r+')", "worked");
    mode(&dir, 0o711);
    user_gets(1000, &mount.path, "os.listdir('d')", "EACCES");
    user_gets(1000, &mount.path, "open('d/open').read()", "worked");
    mode(&dir, 0o744);
    user_gets(1000, &mount.path, "os.listdir('d')", "worked");
    user_gets(1000, &mount.path, "open('d/open').read()", "EACCES");
    mode(&dir, 0o777);
    let files =
        "open('mine', 'w').write('x'); os.mkdir('my-dir'); print(os.stat('mine').st_uid, os.stat('my-dir').st_gid)";
    assert_eq!(succeeded(&as_user(1000, &dir, files)), "1000 1000\n");
    let other = tree.elsewhere();
    assert_eq!(fs::metadata(other.at("d/mine")).unwrap().uid(), 1000);
    user_gets(1001, &other.at("d"), "open('secret')", "EACCES");
}

/// The test's folder is private; somebody else has to get there.
fn open_up(tree: &Tree, mount: &std::path::Path) {
    mode(tree.dir.path(), 0o755);
    mode(mount, 0o755);
}

/// > Only the owner changes mode and times, and only root gives files away.
fn only_the_owner_changes_attributes(tree: &Tree) {
    let mount = tree.mount();
    open_up(tree, &mount.path);
    fs::write(mount.at("f"), "x").unwrap();
    mode(mount.at("f"), 0o666);
    fs::write(mount.at("mine"), "x").unwrap();
    chown(mount.at("mine"), Some(1000), Some(1000)).unwrap();
    user_gets(1000, &mount.path, "os.chmod('f', 0o777)", "EPERM");
    user_gets(1000, &mount.path, "os.chown('f', 1000, 1000)", "EPERM");
    user_gets(1000, &mount.path, "os.utime('f', (1, 1))", "EPERM");
    user_gets(1000, &mount.path, "os.utime('f')", "worked");
    user_gets(1000, &mount.path, "os.setxattr('f', 'user.x', b'1')", "worked");
    user_gets(1000, &mount.path, "os.chmod('mine', 0o400)", "worked");
    user_gets(1000, &mount.path, "os.utime('mine', (1, 1))", "worked");
    user_gets(1000, &mount.path, "os.chown('mine', 1001, -1)", "EPERM");
    user_gets(1000, &mount.path, "os.chown('mine', -1, 0)", "EPERM");
    user_gets(1000, &mount.path, "os.setxattr('mine', 'user.x', b'1')", "EACCES");
    assert_eq!(fs::metadata(mount.at("mine")).unwrap().mode() & 0o777, 0o400);
}

/// > In a sticky directory everybody makes files, and only their owners remove and rename them.
fn a_sticky_directory_protects_its_files(tree: &Tree) {
    let mount = tree.mount();
    open_up(tree, &mount.path);
    fs::create_dir(mount.at("tmp")).unwrap();
    mode(mount.at("tmp"), 0o1777);
    let tmp = mount.at("tmp");
    user_gets(1000, &tmp, "open('a', 'w'); os.chmod('a', 0o666); os.mkdir('d')", "worked");
    user_gets(1001, &tmp, "open('b', 'w')", "worked");
    user_gets(1001, &tmp, "open('a', 'w')", "worked");
    user_gets(1001, &tmp, "os.unlink('a')", "EPERM");
    user_gets(1001, &tmp, "os.rename('a', 'c')", "EPERM");
    user_gets(1001, &tmp, "os.rename('b', 'a')", "EPERM");
    user_gets(1001, &tmp, "os.rmdir('d')", "EPERM");
    user_gets(1000, &tmp, "os.rename('a', 'c'); os.unlink('c'); os.rmdir('d')", "worked");
    assert_eq!(names(&tmp), ["b"]);
    assert_eq!(fs::metadata(tree.elsewhere().at("tmp")).unwrap().mode() & 0o7777, 0o1777);
}

/// > What is made in a set-group-ID directory has its group, and directories the bit as well.
fn a_set_group_id_directory_gives_its_group_on(tree: &Tree) {
    let mount = tree.mount();
    open_up(tree, &mount.path);
    fs::create_dir(mount.at("team")).unwrap();
    chown(mount.at("team"), None, Some(2000)).unwrap();
    mode(mount.at("team"), 0o2777);
    let make = "open('f', 'w'); os.mkdir('d'); os.symlink('x', 'l'); os.mkfifo('p')";
    user_gets(1000, &mount.at("team"), make, "worked");
    for place in [&mount, &tree.elsewhere()] {
        for name in ["f", "d", "l", "p"] {
            let stat = fs::symlink_metadata(place.at("team").join(name)).unwrap();
            assert_eq!((stat.uid(), stat.gid()), (1000, 2000), "{name}");
            assert_eq!(stat.mode() & 0o2000, if name == "d" { 0o2000 } else { 0 }, "{name}");
        }
    }
}

/// > Set-user-ID and set-group-ID bits go when somebody else writes, or the owner changes.
fn privileges_are_dropped_when_they_should(tree: &Tree) {
    let mount = tree.mount();
    open_up(tree, &mount.path);
    let file = mount.at("f");
    let bits = || fs::metadata(&file).unwrap().mode() & 0o7777;
    fs::write(&file, "x").unwrap();
    mode(&file, 0o6777);
    user_gets(1000, &mount.path, "f = open('f', 'r+'); f.write('y'); f.close()", "worked");
    assert_eq!(bits(), 0o777);
    mode(&file, 0o6777);
    user_gets(1000, &mount.path, "os.truncate('f', 0)", "worked");
    assert_eq!(bits(), 0o777);
    mode(&file, 0o6755);
    chown(&file, Some(1000), Some(1000)).unwrap();
    assert_eq!(bits(), 0o755);
    // In the bucket as well.
    assert_eq!(fs::metadata(tree.elsewhere().at("f")).unwrap().mode() & 0o7777, 0o755);
    // The owner may not give a group's power to a group that is not theirs.
    chown(&file, None, Some(2000)).unwrap();
    user_gets(1000, &mount.path, "os.chmod('f', 0o2755)", "worked");
    assert_eq!(bits(), 0o755);
}
