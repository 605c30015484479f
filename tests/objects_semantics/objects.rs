//! Files as objects: what the bucket has, and when; the size of a volume; mounts that don't write.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

use crate::common::files::{fails, names, noise, same, sh};
use crate::common::mount::{Options, Tree};

crate::on_services!(
    and_plain: [],
    only: [
        a_file_is_an_object_with_its_bytes,
        fsync_and_close_return_when_the_bucket_has_it,
        objects_are_files,
        nothing_is_left_but_the_files,
        a_limit_is_a_limit,
        a_read_only_mount_changes_nothing,
        a_file_has_a_largest_size,
    ]
);

/// > A file is the object whose key is the prefix and the path, and its bytes are the object's, one to one.
fn a_file_is_an_object_with_its_bytes(tree: &Tree) {
    let mount = tree.mount();
    fs::create_dir_all(mount.at("some dir/ü")).unwrap();
    for (index, size) in [0, 1, 100_000, (8 << 20) + 1, 17 << 20].into_iter().enumerate() {
        let (name, bytes) = (format!("some dir/ü/f+{index} %20"), noise(index as u64, size));
        fs::write(mount.at(&name), &bytes).unwrap();
        same(&tree.raw().get(&tree.key(&name)).unwrap(), &bytes);
    }
}

/// > fsync returns when the bucket has the file, and so does the last close.
fn fsync_and_close_return_when_the_bucket_has_it(tree: &Tree) {
    let mount = tree.mount();
    for (name, size) in [("small", 1000), ("large", 9 << 20)] {
        let bytes = noise(1, size);
        let get = || tree.raw().get(&tree.key(name));
        let mut handle = File::create(mount.at(name)).unwrap();
        handle.write_all(&bytes).unwrap();
        handle.sync_all().unwrap();
        same(&get().unwrap(), &bytes);
        handle.write_all(b"tail").unwrap();
        handle.sync_data().unwrap();
        same(&get().unwrap()[size..], b"tail");
        handle.write_all(b"end").unwrap();
        drop(handle);
        same(&get().unwrap()[size..], b"tailend");
        let other = OpenOptions::new().write(true).truncate(true).open(mount.at(name)).unwrap();
        drop(other);
        same(&get().unwrap(), b"");
        fs::remove_file(mount.at(name)).unwrap();
        assert_eq!(get(), None);
    }
}

/// > An object that any tool wrote is a file: it is read, changed and removed like one.
fn objects_are_files(tree: &Tree) {
    let large = noise(2, 12 << 20);
    tree.raw().put(&tree.key("d/large"), &large, &[]);
    tree.raw().put(&tree.key("small"), b"small", &[]);
    let mount = tree.mount();
    same(&fs::read(mount.at("d/large")).unwrap(), &large);
    let mut part = [0; 1000];
    File::open(mount.at("d/large")).unwrap().read_exact_at(&mut part, 7_654_321).unwrap();
    same(&part, &large[7_654_321..7_655_321]);
    OpenOptions::new().append(true).open(mount.at("small")).unwrap().write_all(b" and more").unwrap();
    assert_eq!(tree.raw().get(&tree.key("small")).unwrap(), b"small and more");
    fs::rename(mount.at("d/large"), mount.at("moved")).unwrap();
    assert_eq!(tree.raw().get(&tree.key("d/large")), None);
    same(&tree.raw().get(&tree.key("moved")).unwrap(), &large);
}

/// > Beside the files nothing is left in the tree: no temporary object, no unfinished upload.
fn nothing_is_left_but_the_files(tree: &Tree) {
    let mount = tree.mount();
    fs::write(mount.at("large"), noise(1, 20 << 20)).unwrap();
    OpenOptions::new().write(true).open(mount.at("large")).unwrap().write_all_at(b"x", 10 << 20).unwrap();
    fs::rename(mount.at("large"), mount.at("renamed")).unwrap();
    let given_up = File::create(mount.at("given-up")).unwrap();
    given_up.write_all_at(&noise(2, 18 << 20), 0).unwrap();
    fs::remove_file(mount.at("given-up")).unwrap();
    drop(given_up);
    sh(&mount.path, "mkdir d; touch d/f; mv d e; rm -r e; echo x >t; mv t u");
    mount.unmount();
    let mut left = tree.raw().list(&tree.prefix);
    // The root may have a marker, for its mode.
    left.remove(&tree.prefix);
    let wanted = [(tree.key("renamed"), 20 << 20), (tree.key("u"), 2)];
    assert_eq!(left.into_iter().collect::<Vec<_>>(), wanted);
    assert_eq!(tree.raw().uploads(&tree.prefix), Vec::<String>::new());
}

/// > A volume's size is a limit: statfs shows it, and writing past it is ENOSPC, until something is removed.
fn a_limit_is_a_limit(tree: &Tree) {
    let limit = 8 << 20;
    let mount = tree.mount_with(&Options { limit: Some(limit), ..Options::default() });
    let free = || {
        let stat = rustix::fs::statvfs(&mount.path).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize, limit);
        stat.f_bavail * stat.f_frsize
    };
    assert!(free() > limit - (1 << 20));
    fs::write(mount.at("five"), noise(1, 5 << 20)).unwrap();
    assert!((2 << 20..=3 << 20).contains(&free()), "{}", free());
    let mut handle = File::create(mount.at("more")).unwrap();
    fails(handle.write_all(&noise(2, 4 << 20)), libc::ENOSPC);
    drop(handle);
    fails(OpenOptions::new().write(true).open(mount.at("five")).unwrap().set_len(9 << 20), libc::ENOSPC);
    fs::remove_file(mount.at("more")).unwrap();
    fs::write(mount.at("fits"), noise(3, 2 << 20)).unwrap();
    // Writing over what is there takes no room.
    OpenOptions::new().write(true).open(mount.at("five")).unwrap().write_all_at(&noise(4, 5 << 20), 0).unwrap();
    fs::remove_file(mount.at("five")).unwrap();
    fs::write(mount.at("again"), noise(5, 5 << 20)).unwrap();
    assert_eq!(names(&mount.path), ["again", "fits"]);
    // A rename takes none either.
    fs::rename(mount.at("again"), mount.at("renamed")).unwrap();
    assert!((512 << 10..=1 << 20).contains(&free()), "{}", free());
}

/// > A read-only mount reads everything, and refuses every change with EROFS.
fn a_read_only_mount_changes_nothing(tree: &Tree) {
    tree.raw().put(&tree.key("d/f"), b"text", &[]);
    let mount = tree.mount_with(&Options { read_only: true, ..Options::default() });
    assert_eq!(fs::read(mount.at("d/f")).unwrap(), b"text");
    fails(fs::write(mount.at("new"), ""), libc::EROFS);
    fails(OpenOptions::new().append(true).open(mount.at("d/f")), libc::EROFS);
    fails(fs::create_dir(mount.at("new")), libc::EROFS);
    fails(fs::remove_file(mount.at("d/f")), libc::EROFS);
    fails(fs::remove_dir(mount.at("d")), libc::EROFS);
    fails(fs::rename(mount.at("d/f"), mount.at("g")), libc::EROFS);
    fails(symlink("x", mount.at("l")), libc::EROFS);
    fails(fs::set_permissions(mount.at("d/f"), fs::Permissions::from_mode(0o600)), libc::EROFS);
    mount.unmount();
    assert_eq!(tree.raw().list(&tree.prefix).into_keys().collect::<Vec<_>>(), [tree.key("d/f")]);
}

/// > A file may have 5 TiB; more is EFBIG.
fn a_file_has_a_largest_size(tree: &Tree) {
    let mount = tree.mount();
    let handle = File::create(mount.at("f")).unwrap();
    fails(handle.set_len((5 << 40) + 1), libc::EFBIG);
    fails(handle.write_all_at(b"x", 5 << 40), libc::EFBIG);
    assert_eq!(handle.metadata().unwrap().len(), 0);
}
