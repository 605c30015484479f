//! Reading and writing.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use rustix::fs::{FallocateFlags, fallocate};

use crate::common::files::{fails, noise, python, same, sh};
use crate::common::mount::Tree;

crate::on_services!(
    and_plain: [
        a_file_holds_what_was_written,
        writes_in_the_middle_change_only_their_bytes,
        appends_go_to_the_end,
        truncate_cuts_and_extends_with_zeros,
        holes_read_as_zeros,
        room_is_reserved_and_holes_are_punched,
        mapped_files_are_read_and_written,
        handles_of_one_file_see_each_other,
        an_unlinked_file_lives_as_long_as_it_is_open,
        open_flags_do_what_they_say,
        programs_run_from_it,
        large_files_are_changed_in_places,
        locks_hold_on_one_node,
    ],
    only: []
);

/// > A file holds what was written, of any size, and is overwritten, also shorter than it was.
fn a_file_holds_what_was_written(tree: &Tree) {
    let mount = tree.mount();
    let sizes = [0, 1, 4095, 4096, 4097, 131_071, 1 << 20, (1 << 20) + 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1];
    for (index, size) in sizes.into_iter().enumerate() {
        let file = mount.at(format!("f{index}"));
        let bytes = noise(index as u64, size);
        fs::write(&file, &bytes).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().len(), size as u64);
        same(&fs::read(&file).unwrap(), &bytes);
        let shorter = noise(1000, size / 2 + 1);
        fs::write(&file, &shorter).unwrap();
        same(&fs::read(&file).unwrap(), &shorter);
    }
    let other = tree.elsewhere();
    for (index, size) in sizes.into_iter().enumerate() {
        same(&fs::read(other.at(format!("f{index}"))).unwrap(), &noise(1000, size / 2 + 1));
    }
}

/// > A write in the middle of a file changes its bytes and no others, however the file was opened.
fn writes_in_the_middle_change_only_their_bytes(tree: &Tree) {
    let mount = tree.mount();
    let file = mount.at("f");
    let mut wanted = noise(1, 300_000);
    fs::write(&file, &wanted).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..6 {
        let handle = OpenOptions::new().write(true).read(round % 2 == 0).open(&file).unwrap();
        for _ in 0..8 {
            let (at, length) = (random.usize(..299_000), random.usize(1..1000));
            let bytes = noise(random.u64(..), length);
            wanted[at..at + length].copy_from_slice(&bytes);
            handle.write_all_at(&bytes, at as u64).unwrap();
        }
        if round == 3 {
            handle.sync_all().unwrap();
        }
        drop(handle);
        same(&fs::read(&file).unwrap(), &wanted);
    }
    same(&fs::read(tree.elsewhere().at("f")).unwrap(), &wanted);
}

/// > What is appended goes to the end, wherever the descriptor was, and whoever else appends on the node.
fn appends_go_to_the_end(tree: &Tree) {
    let mount = tree.mount();
    let file = mount.at("log");
    let append = || OpenOptions::new().append(true).create(true).read(true).open(&file).unwrap();
    let (mut one, mut two) = (append(), append());
    let mut wanted = Vec::new();
    for number in 0..20 {
        let line = format!("line {number}\n");
        let writer = if number % 3 == 0 { &mut one } else { &mut two };
        writer.seek(SeekFrom::Start(0)).unwrap();
        writer.write_all(line.as_bytes()).unwrap();
        wanted.extend_from_slice(line.as_bytes());
        same(&fs::read(&file).unwrap(), &wanted);
    }
    drop((one, two));
    append().write_all(b"again\n").unwrap();
    wanted.extend_from_slice(b"again\n");
    same(&fs::read(tree.elsewhere().at("log")).unwrap(), &wanted);
}

/// > truncate cuts, and extends with zeros, by path and by descriptor; what was cut off does not come back.
fn truncate_cuts_and_extends_with_zeros(tree: &Tree) {
    let mount = tree.mount();
    let file = mount.at("f");
    let bytes = noise(3, 200_000);
    fs::write(&file, &bytes).unwrap();
    let handle = OpenOptions::new().read(true).write(true).open(&file).unwrap();
    handle.set_len(100_000).unwrap();
    assert_eq!(handle.metadata().unwrap().len(), 100_000);
    handle.set_len(150_000).unwrap();
    let mut wanted = bytes[..100_000].to_vec();
    wanted.resize(150_000, 0);
    same(&fs::read(&file).unwrap(), &wanted);
    drop(handle);
    sh(&mount.path, "truncate -s 120000 f; truncate -s 120001 f");
    wanted.truncate(120_000);
    wanted.push(0);
    same(&fs::read(&file).unwrap(), &wanted);
    same(&fs::read(tree.elsewhere().at("f")).unwrap(), &wanted);
    fails(File::open(&file).unwrap().set_len(5), libc::EINVAL);
    fs::write(&file, "").unwrap();
    sh(&mount.path, "truncate -s 12M f");
    let zeros = fs::read(&file).unwrap();
    assert!(zeros.len() == 12 << 20 && zeros.iter().all(|byte| *byte == 0));
}

/// > What was never written reads as zeros, and SEEK_DATA never calls data a hole.
fn holes_read_as_zeros(tree: &Tree) {
    let mount = tree.mount();
    let file = mount.at("f");
    let handle = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&file).unwrap();
    handle.write_all_at(b"head", 0).unwrap();
    handle.write_all_at(b"tail", 20 << 20).unwrap();
    let mut wanted = vec![0; (20 << 20) + 4];
    wanted[..4].copy_from_slice(b"head");
    wanted[20 << 20..].copy_from_slice(b"tail");
    let check = |handle: &File| {
        use rustix::fs::{SeekFrom, seek};
        assert_eq!(seek(handle, SeekFrom::Data(0)).unwrap(), 0);
        let hole = seek(handle, SeekFrom::Hole(0)).unwrap();
        assert!((4..=(20 << 20) + 4).contains(&hole), "{hole}");
        let data = seek(handle, SeekFrom::Data(hole));
        // A file without holes has one at its end, where there is no data.
        assert!(data.is_err() || (hole..=20 << 20).contains(&data.unwrap()), "{data:?}");
        fails(seek(handle, SeekFrom::Data((20 << 20) + 4)), libc::ENXIO);
        fails(seek(handle, SeekFrom::Hole((20 << 20) + 4)), libc::ENXIO);
    };
    check(&handle);
    same(&fs::read(&file).unwrap(), &wanted);
    drop(handle);
    check(&File::open(&file).unwrap());
    same(&fs::read(tree.elsewhere().at("f")).unwrap(), &wanted);
}

/// > fallocate extends or keeps the size as it is told to, and a punched or zeroed range reads as zeros.
fn room_is_reserved_and_holes_are_punched(tree: &Tree) {
    let mount = tree.mount();
    let file = mount.at("f");
    let handle = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&file).unwrap();
    let mut wanted = noise(9, 100_000);
    handle.write_all_at(&wanted, 0).unwrap();
    fallocate(&handle, FallocateFlags::empty(), 90_000, 20_000).unwrap();
    wanted.resize(110_000, 0);
    assert_eq!(handle.metadata().unwrap().len(), 110_000);
    fallocate(&handle, FallocateFlags::KEEP_SIZE, 110_000, 50_000).unwrap();
    assert_eq!(handle.metadata().unwrap().len(), 110_000);
    fallocate(&handle, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 5000, 30_000).unwrap();
    wanted[5000..35_000].fill(0);
    same(&fs::read(&file).unwrap(), &wanted);
    fallocate(&handle, FallocateFlags::ZERO_RANGE, 60_001, 10_000).unwrap();
    wanted[60_001..70_001].fill(0);
    same(&fs::read(&file).unwrap(), &wanted);
    fails(fallocate(&handle, FallocateFlags::empty(), 0, 0), libc::EINVAL);
    drop(handle);
    // The same in what the bucket has already.
    let handle = OpenOptions::new().write(true).open(&file).unwrap();
    fallocate(&handle, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 80_000, 100_000).unwrap();
    wanted[80_000..].fill(0);
    drop(handle);
    same(&fs::read(tree.elsewhere().at("f")).unwrap(), &wanted);
}

/// > A file can be mapped, shared or private, read and written; msync and munmap write what fsync and close would.
fn mapped_files_are_read_and_written(tree: &Tree) {
    let mount = tree.mount();
    let bytes = noise(11, 100_000);
    fs::write(mount.at("f"), &bytes).unwrap();
    let script = "
import mmap, os
f = open('f', 'r+b')
m = mmap.mmap(f.fileno(), 0)
before = bytes(m)
m[50000:50005] = b'patch'
m[99999:100000] = b'!'
m.flush()
assert open('f', 'rb').read()[50000:50005] == b'patch', 'another descriptor'
m[0:4] = b'late'
m.close()
f.close()
p = open('f', 'r+b')
private = mmap.mmap(p.fileno(), 0, access=mmap.ACCESS_COPY)
private[0:4] = b'mine'
assert open('f', 'rb').read(4) == b'late', 'a private map'
import hashlib
print(hashlib.sha256(before).hexdigest())
";
    let read = python(&mount.path, script);
    use sha2::Digest;
    let wanted: String = sha2::Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(read.trim(), wanted);
    let mut wanted = bytes;
    wanted[50_000..50_005].copy_from_slice(b"patch");
    wanted[99_999] = b'!';
    wanted[..4].copy_from_slice(b"late");
    same(&fs::read(mount.at("f")).unwrap(), &wanted);
    same(&fs::read(tree.elsewhere().at("f")).unwrap(), &wanted);
}

/// > All descriptors of a file on one node see a write when it returns, and its size.
fn handles_of_one_file_see_each_other(tree: &Tree) {
    let mount = tree.mount();
    let file = mount.at("f");
    fs::write(&file, "0123456789").unwrap();
    let (one, mut two) = (OpenOptions::new().write(true).open(&file).unwrap(), File::open(&file).unwrap());
    one.write_all_at(b"abc", 8).unwrap();
    assert_eq!(two.metadata().unwrap().len(), 11);
    assert_eq!(fs::metadata(&file).unwrap().len(), 11);
    let mut text = String::new();
    two.read_to_string(&mut text).unwrap();
    assert_eq!(text, "01234567abc");
    let three = OpenOptions::new().write(true).truncate(true).open(&file).unwrap();
    assert_eq!(two.metadata().unwrap().len(), 0);
    three.write_all_at(b"xyz", 2).unwrap();
    one.write_all_at(b"_", 5).unwrap();
    drop((one, three));
    assert_eq!(fs::read(&file).unwrap(), b"\0\0xyz_");
}

/// > A file that was unlinked, or replaced by a rename, is read and written through its descriptors until the last is
/// > closed, and then it is gone.
fn an_unlinked_file_lives_as_long_as_it_is_open(tree: &Tree) {
    let mount = tree.mount();
    for synced in [false, true] {
        let file = mount.at("f");
        let bytes = noise(5, 100_000);
        let mut handle = OpenOptions::new().create_new(true).read(true).write(true).open(&file).unwrap();
        handle.write_all(&bytes).unwrap();
        if synced {
            handle.sync_all().unwrap();
        }
        let reader = File::open(&file).unwrap();
        fs::remove_file(&file).unwrap();
        fails(fs::metadata(&file), libc::ENOENT);
        assert!(!names_of(&mount.path).contains(&"f".to_owned()));
        let stat = handle.metadata().unwrap();
        assert_eq!((stat.nlink(), stat.len()), (0, 100_000));
        handle.write_all_at(b"more", 100_000).unwrap();
        handle.sync_all().unwrap();
        let mut read = vec![0; 100_004];
        reader.read_exact_at(&mut read, 0).unwrap();
        same(&read[..100_000], &bytes);
        same(&read[100_000..], b"more");
        // The name is free for another file, which this one does not harm.
        fs::write(&file, "other").unwrap();
        handle.write_all_at(b"still mine", 0).unwrap();
        drop((handle, reader));
        assert_eq!(fs::read(&file).unwrap(), b"other");
        // Replaced by a rename.
        let old = File::open(&file).unwrap();
        fs::write(mount.at("new"), "newer").unwrap();
        fs::rename(mount.at("new"), &file).unwrap();
        let mut text = [0; 5];
        old.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"other");
        assert_eq!(fs::read(&file).unwrap(), b"newer");
        fs::remove_file(&file).unwrap();
        drop(old);
    }
    assert_eq!(names_of(&mount.path), Vec::<String>::new());
    assert_eq!(names_of(&tree.elsewhere().path), Vec::<String>::new());
    mount.unmount();
    if !tree.is_plain() {
        let left = tree.raw().list(&tree.prefix);
        assert!(left.keys().all(|key| *key == tree.prefix), "{left:?}");
    }
}

fn names_of(path: &std::path::Path) -> Vec<String> {
    crate::common::files::names(path)
}

/// > O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_DIRECTORY and O_NOFOLLOW do what they do on a disk.
fn open_flags_do_what_they_say(tree: &Tree) {
    let mount = tree.mount();
    let (file, dir, link) = (mount.at("f"), mount.at("d"), mount.at("l"));
    fails(File::open(&file), libc::ENOENT);
    fails(OpenOptions::new().write(true).open(&file), libc::ENOENT);
    OpenOptions::new().write(true).create_new(true).open(&file).unwrap();
    fails(OpenOptions::new().write(true).create_new(true).open(&file), libc::EEXIST);
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink("f", &link).unwrap();
    fails(OpenOptions::new().write(true).open(&dir), libc::EISDIR);
    fails(OpenOptions::new().write(true).create(true).truncate(false).open(&dir), libc::EISDIR);
    fails(OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&file), libc::ENOTDIR);
    fails(OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&link), libc::ELOOP);
    fails(OpenOptions::new().write(true).create_new(true).open(&link), libc::EEXIST);
    fails(File::open(file.join("below")), libc::ENOTDIR);
    let mut read_only = File::open(&file).unwrap();
    fails(read_only.write(b"x"), libc::EBADF);
    let mut write_only = OpenOptions::new().write(true).open(&file).unwrap();
    fails(write_only.read(&mut [0; 4]), libc::EBADF);
    write_only.write_all(b"text").unwrap();
    drop(write_only);
    assert_eq!(fs::metadata(&file).unwrap().len(), 4);
    drop(OpenOptions::new().write(true).truncate(true).open(&file).unwrap());
    assert_eq!(fs::metadata(&file).unwrap().len(), 0);
    assert_eq!(fs::metadata(tree.elsewhere().at("f")).unwrap().len(), 0);
}

/// > Programs run from it.
fn programs_run_from_it(tree: &Tree) {
    let mount = tree.mount();
    fs::copy("/bin/echo", mount.at("echo")).unwrap();
    assert_eq!(sh(&mount.path, "./echo hello"), "hello\n");
    sh(&mount.path, "printf '#!/bin/sh\\necho $0' >script; chmod +x script; ./script | grep -qx ./script");
    let other = tree.elsewhere();
    assert_eq!(sh(&other.path, "./echo hello; ./script"), "hello\n./script\n");
}

/// > A file of many megabytes is patched, appended to and cut without harm to the rest.
fn large_files_are_changed_in_places(tree: &Tree) {
    let mount = tree.mount();
    let file = mount.at("large");
    let mut wanted = noise(21, (25 << 20) + 12_345);
    fs::write(&file, &wanted).unwrap();
    same(&fs::read(&file).unwrap(), &wanted);
    let handle = OpenOptions::new().write(true).open(&file).unwrap();
    for at in [0, (5 << 20) - 3, 13 << 20, (25 << 20) + 12_340] {
        handle.write_all_at(b"PATCH", at as u64).unwrap();
        wanted[at..at + 5].copy_from_slice(b"PATCH");
    }
    drop(handle);
    let other = tree.elsewhere();
    same(&fs::read(other.at("large")).unwrap(), &wanted);
    OpenOptions::new().append(true).open(&file).unwrap().write_all(b"more").unwrap();
    wanted.extend_from_slice(b"more");
    same(&fs::read(&file).unwrap(), &wanted);
    let handle = OpenOptions::new().write(true).open(&file).unwrap();
    handle.set_len(11 << 20).unwrap();
    wanted.truncate(11 << 20);
    handle.write_all_at(b"end", 12 << 20).unwrap();
    wanted.resize(12 << 20, 0);
    wanted.extend_from_slice(b"end");
    drop(handle);
    if tree.is_plain() {
        same(&fs::read(&file).unwrap(), &wanted);
    } else {
        same(&tree.raw().get(&tree.key("large")).unwrap(), &wanted);
    }
}

/// > flock and fcntl locks hold among the programs of one node.
fn locks_hold_on_one_node(tree: &Tree) {
    let mount = tree.mount();
    let script = "
import fcntl, os, subprocess, sys
f = open('lock', 'w')
child = '''
import fcntl, sys
f = open('lock', 'r+')
try:
    getattr(fcntl, sys.argv[1])(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print('got')
except BlockingIOError:
    print('busy')
'''
for kind in ('flock', 'lockf'):
    ask = lambda: subprocess.check_output([sys.executable, '-c', child, kind], text=True).strip()
    getattr(fcntl, kind)(f, fcntl.LOCK_EX)
    assert ask() == 'busy', kind
    getattr(fcntl, kind)(f, fcntl.LOCK_UN)
    assert ask() == 'got', kind
";
    python(&mount.path, script);
}
