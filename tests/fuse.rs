//! Our FUSE layer on this machine's kernel, with a file system in memory behind it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;
#[path = "common/memory.rs"]
mod memory;
#[path = "common/memory_mount.rs"]
mod memory_mount;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use berth::fuse::Ended;
use berth::host::fuse::{abort, connection_of, waiting};
use berth::host::{channel, mounts};
use common::is_root;
use memory_mount::Mount;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 7 + at / 4096) % 251).unwrap()).collect()
}

fn start(program: &str, arguments: &[&str]) -> Child {
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for something that must come.
#[track_caller]
fn until(what: &str, mut is: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !is() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what} has not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[track_caller]
fn succeeds(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}

#[test]
fn files_are_written_read_renamed_and_removed() {
    skip_unless!(is_root(), "needs root");
    let mount = Mount::new();
    let table = mounts::line_of(&mount.root()).unwrap().unwrap();
    assert!(table.contains(" - fuse.berth s3://bucket/a\\040b "), "{table}");
    assert!(table.contains("nosuid,nodev"), "{table}");
    let data = pattern(5 << 20);
    fs::write(mount.path("one"), &data).unwrap();
    assert!(fs::read(mount.path("one")).unwrap() == data);
    let file = OpenOptions::new().read(true).write(true).open(mount.path("one")).unwrap();
    file.write_all_at(b"patch", 4_000_000).unwrap();
    let mut part = [0; 9];
    file.read_exact_at(&mut part, 3_999_998).unwrap();
    assert_eq!((&part[2..7], part[0]), (&b"patch"[..], data[3_999_998]));
    file.set_len(10).unwrap();
    assert_eq!(fs::read(mount.path("one")).unwrap(), data[..10]);
    fs::create_dir(mount.path("dir")).unwrap();
    fs::rename(mount.path("one"), mount.path("dir/two")).unwrap();
    assert_eq!(fs::metadata(mount.path("one")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::remove_dir(mount.path("dir")).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    let dir = File::open(mount.root()).unwrap();
    fs::write(mount.path("other"), "other").unwrap();
    rustix::fs::renameat_with(&dir, "other", &dir, "dir/two", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(mount.path("dir/two")).unwrap(), b"other");
    fs::write(mount.path("other"), "").unwrap();
    assert_eq!(fs::read(mount.path("other")).unwrap(), b"");
    fs::hard_link(mount.path("other"), mount.path("link")).unwrap_err();
    fs::remove_file(mount.path("dir/two")).unwrap();
    fs::remove_dir(mount.path("dir")).unwrap();
    assert_eq!(mount.fs.overdrawn.load(Ordering::SeqCst), 0);
}

#[test]
fn a_large_directory_is_listed_whole_with_attributes_that_count_as_lookups() {
    skip_unless!(is_root(), "needs root");
    let mount = Mount::new();
    let names: BTreeSet<String> = (0..5000).map(|number| format!("a name of some length {number}")).collect();
    for name in &names {
        mount.fs.put(name, b"x");
    }
    for _ in 0..2 {
        let listed: Vec<_> = fs::read_dir(mount.root()).unwrap().map(Result::unwrap).collect();
        assert_eq!(listed.len(), 5000);
        let listed: BTreeSet<_> = listed
            .iter()
            .map(|entry| {
                assert_eq!(entry.metadata().unwrap().len(), 1);
                assert!(entry.file_type().unwrap().is_file());
                entry.file_name().into_string().unwrap()
            })
            .collect();
        assert_eq!(listed, names);
    }
    // Each gives its references back.
    for name in &names {
        fs::remove_file(mount.path(name)).unwrap();
    }
    assert_eq!(fs::read_dir(mount.root()).unwrap().count(), 0);
    assert_eq!(mount.fs.overdrawn.load(Ordering::SeqCst), 0);
}

#[test]
fn links_nodes_times_attributes_and_space() {
    skip_unless!(is_root(), "needs root");
    let mount = Mount::new();
    symlink("else/where", mount.path("link")).unwrap();
    assert_eq!(fs::read_link(mount.path("link")).unwrap().as_os_str(), "else/where");
    let dir = File::open(mount.root()).unwrap();
    rustix::fs::mknodat(&dir, "fifo", FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    assert!(fs::symlink_metadata(mount.path("fifo")).unwrap().file_type().is_fifo());
    let device = rustix::fs::makedev(259, 70_000);
    rustix::fs::mknodat(&dir, "device", FileType::CharacterDevice, Mode::from_raw_mode(0o600), device).unwrap();
    assert_eq!(fs::symlink_metadata(mount.path("device")).unwrap().rdev(), device);

    fs::write(mount.path("file"), "0123456789").unwrap();
    let time = Timespec { tv_sec: -5, tv_nsec: 250_000_001 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(&dir, "file", &times, AtFlags::empty()).unwrap();
    let stat = fs::metadata(mount.path("file")).unwrap();
    assert_eq!((stat.mtime(), stat.mtime_nsec(), stat.atime()), (-5, 250_000_001, -5));

    let file = OpenOptions::new().read(true).write(true).open(mount.path("file")).unwrap();
    rustix::fs::fsetxattr(&file, "user.one", b"value", XattrFlags::CREATE).unwrap();
    rustix::fs::fsetxattr(&file, "user.one", b"value", XattrFlags::CREATE).unwrap_err();
    let long = pattern(60_000);
    rustix::fs::fsetxattr(&file, "user.long", &long, XattrFlags::empty()).unwrap();
    let mut value = vec![0; 1 << 16];
    let length = rustix::fs::fgetxattr(&file, "user.long", &mut value[..]).unwrap();
    assert!(value[..length] == long);
    assert_eq!(rustix::fs::fgetxattr_query(&file, "user.one").unwrap(), 5);
    assert_eq!(rustix::fs::fgetxattr(&file, "user.one", &mut [0; 3][..]).unwrap_err(), rustix::io::Errno::RANGE);
    let length = rustix::fs::flistxattr(&file, &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"user.long\0user.one\0");
    rustix::fs::fremovexattr(&file, "user.one").unwrap();
    assert_eq!(rustix::fs::fgetxattr(&file, "user.one", &mut [0; 9][..]).unwrap_err(), rustix::io::Errno::NODATA);

    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 20);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 2, 3).unwrap();
    let mut data = [0; 7];
    file.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(&data, b"01\0\0\x0056");
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(3)).unwrap(), 20);
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(3)).unwrap(), 3);
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(20)).unwrap_err(), rustix::io::Errno::NXIO);

    let space = rustix::fs::statvfs(mount.root()).unwrap();
    assert_eq!(
        (space.f_bsize, space.f_blocks, space.f_bavail, space.f_ffree, space.f_namemax),
        (4096, 1000, 600, 20, 255)
    );
}

#[test]
fn the_umask_counts_and_privileges_of_programs_are_lost_when_somebody_else_writes() {
    skip_unless!(is_root(), "needs root");
    let mount = Mount::new();
    let path = mount.path("made");
    let make = format!("umask 027; echo x > {}", path.display());
    succeeds(start("sh", &["-c", &make]));
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&path), 0o640);

    fs::set_permissions(&path, PermissionsExt::from_mode(0o6777)).unwrap();
    fs::write(&path, "by root, who may").unwrap();
    assert_eq!(mode(&path), 0o6777);
    for script in ["echo y >> \"$0\"", "echo y > \"$0\"", "truncate -s 3 \"$0\""] {
        fs::set_permissions(&path, PermissionsExt::from_mode(0o6777)).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&path).uid(1000).gid(1000).stderr(Stdio::piped());
        succeeds(command.spawn().unwrap());
        assert_eq!(mode(&path), 0o777, "{script}");
    }
    fs::set_permissions(&path, PermissionsExt::from_mode(0o6777)).unwrap();
    std::os::unix::fs::chown(&path, Some(1000), None).unwrap();
    assert_eq!(mode(&path), 0o777);
}

#[test]
fn a_descriptor_is_served_by_whoever_gets_it() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::unserved(Duration::ZERO);
    // Before INIT, over a socket as a mounter gets it.
    let (left, right) = std::os::unix::net::UnixStream::pair().unwrap();
    channel::send(&left, b"x", &[mount.descriptor.as_fd()]).unwrap();
    let mut received = channel::receive(&right, &mut [0; 1]).unwrap().descriptors;
    mount.descriptor = received.pop().unwrap();
    mount.serve(None, false);
    assert_eq!(mount.agreed().max_write, 1 << 20);
    fs::write(mount.path("file"), "0123456789").unwrap();
    let mut file = OpenOptions::new().read(true).write(true).open(mount.path("file")).unwrap();
    let mut first = [0; 4];
    file.read_exact(&mut first).unwrap();
    // After INIT, with a file open.
    let agreed = mount.park();
    let waiting = std::thread::spawn({
        let path = mount.path("file");
        move || fs::metadata(path).unwrap().len()
    });
    until("the request of stat", || waiting_in(&mount) > 0);
    mount.serve(Some(agreed), false);
    assert_eq!(waiting.join().unwrap(), 10);
    file.seek(SeekFrom::End(0)).unwrap();
    file.write_all(b"more").unwrap();
    assert_eq!(fs::read(mount.path("file")).unwrap(), b"0123456789more");
    assert_eq!(mount.fs.started.load(Ordering::SeqCst), 2);
    assert!(!mount.fs.ended.load(Ordering::SeqCst));
}

fn waiting_in(mount: &Mount) -> u64 {
    waiting(mount.connection).unwrap()
}

#[test]
fn a_session_that_was_not_told_what_was_agreed_serves_nevertheless() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::new();
    fs::write(mount.path("file"), "x").unwrap();
    mount.park();
    mount.serve(None, true);
    assert_eq!(fs::read(mount.path("file")).unwrap(), b"x");
    assert!(!mount.agreed().can_resend());
}

#[test]
fn parking_under_load_harms_nobody() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::new();
    let source = tempfile::NamedTempFile::new().unwrap();
    let data = pattern(48 << 20);
    fs::write(source.path(), &data).unwrap();
    let input = format!("if={}", source.path().display());
    let output = format!("of={}", mount.path("copy").display());
    let writer = start("dd", &[&input, &output, "bs=60k", "conv=fsync"]);
    fs::write(mount.path("read"), &data).unwrap();
    let reader = start("cmp", &[mount.path("read").to_str().unwrap(), source.path().to_str().unwrap()]);
    for _ in 0..20 {
        let agreed = mount.park();
        std::thread::sleep(Duration::from_millis(2));
        mount.serve(Some(agreed), false);
        std::thread::sleep(Duration::from_millis(10));
    }
    succeeds(writer);
    succeeds(reader);
    assert!(fs::read(mount.path("copy")).unwrap() == data);
}

#[test]
fn what_a_dead_session_had_read_is_sent_again() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::new();
    skip_unless!(mount.agreed().can_resend(), "needs Linux 6.9");
    fs::write(mount.path("file"), "0123456789").unwrap();
    let file = OpenOptions::new().read(true).write(true).open(mount.path("file")).unwrap();
    let agreed = mount.park();
    let writer = std::thread::spawn(move || {
        file.write_all_at(b"new", 2).unwrap();
        let mut data = [0; 10];
        file.read_exact_at(&mut data, 0).unwrap();
        data
    });
    // Read, and never answered.
    let mut ready = [PollFd::new(&mount.descriptor, PollFlags::IN)];
    rustix::event::poll(&mut ready, None).unwrap();
    assert!(rustix::io::read(&mount.descriptor, &mut vec![0; 2 << 20][..]).unwrap() > 40);
    mount.serve(Some(agreed), true);
    assert_eq!(&writer.join().unwrap(), b"01new56789");
    assert!(mount.fs.resent.load(Ordering::SeqCst) > 0);
}

#[test]
fn a_killed_reader_goes_though_its_read_hangs_and_a_write_that_was_begun_is_finished() {
    skip_unless!(is_root(), "needs root");
    let mount = Mount::new();
    mount.fs.put("slow direct", b"0123456789");
    let path = mount.path("slow direct");
    let mut reader = start("cat", &[path.to_str().unwrap()]);
    until("the read", || mount.fs.waiting.load(Ordering::SeqCst) > 0);
    reader.kill().unwrap();
    assert!(!reader.wait().unwrap().success());
    until("the end of the read", || mount.fs.waiting.load(Ordering::SeqCst) == 0);

    let output = format!("of={}", path.display());
    let mut writer = start("dd", &["if=/dev/zero", &output, "bs=4", "count=1", "conv=notrunc"]);
    until("the write", || mount.fs.waiting.load(Ordering::SeqCst) > 0);
    writer.kill().unwrap();
    // Time enough for an interrupt that is ten milliseconds patient.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(mount.fs.waiting.load(Ordering::SeqCst), 1);
    mount.fs.gate.send(true).unwrap();
    writer.wait().unwrap();
    until("the end of the write", || mount.fs.finished.load(Ordering::SeqCst) == 1);
    assert_eq!(fs::read(&path).unwrap(), b"\0\0\0\x00456789");
}

#[test]
fn a_panic_costs_one_request_an_error() {
    skip_unless!(is_root(), "needs root");
    let mount = Mount::new();
    mount.fs.put("panic", b"0123456789");
    mount.fs.put("fine", b"fine");
    for _ in 0..5 {
        let error = fs::read(mount.path("panic")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert_eq!(fs::read(mount.path("fine")).unwrap(), b"fine");
    }
}

#[test]
fn unmounting_ends_the_session_after_the_file_system_has_ended() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::new();
    fs::write(mount.path("file"), "x").unwrap();
    mounts::unmount_top(&mount.root()).unwrap();
    assert_eq!(mount.ended(), Ended::Unmounted);
    assert!(mount.fs.ended.load(Ordering::SeqCst));
    assert_eq!(connection_of(&mount.root()).unwrap(), None);
}

#[test]
fn aborting_frees_whoever_hangs() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::new();
    mount.fs.put("slow", b"0123456789");
    let path = mount.path("slow");
    let reader = std::thread::spawn(move || fs::read(path).unwrap_err());
    until("the read", || mount.fs.waiting.load(Ordering::SeqCst) > 0);
    assert!(waiting_in(&mount) > 0);
    abort(mount.connection).unwrap();
    reader.join().unwrap();
    assert_eq!(mount.ended(), Ended::Unmounted);
    assert!(mount.fs.ended.load(Ordering::SeqCst));
    mounts::detach(&mount.root()).unwrap();
    drop(mount);
}

#[test]
fn slow_reads_block_nobody_else() {
    skip_unless!(is_root(), "needs root");
    let mount = Mount::new();
    for number in 0..64 {
        mount.fs.put(&format!("slow {number}"), b"0123456789");
    }
    mount.fs.put("fine", b"fine");
    let readers: Vec<_> = (0..64)
        .map(|number| {
            let path = mount.path(format!("slow {number}"));
            std::thread::spawn(move || fs::read(path).unwrap())
        })
        .collect();
    until("64 reads", || mount.fs.waiting.load(Ordering::SeqCst) == 64);
    assert_eq!(fs::metadata(mount.path("fine")).unwrap().len(), 4);
    fs::create_dir(mount.path("dir")).unwrap();
    assert_eq!(mount.fs.waiting.load(Ordering::SeqCst), 64);
    mount.fs.gate.send(true).unwrap();
    for reader in readers {
        assert_eq!(reader.join().unwrap(), b"0123456789");
    }
}

#[test]
fn no_more_large_writes_are_taken_than_there_are_buffers() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::unserved(Duration::from_secs(1));
    mount.write_buffers = 2;
    mount.serve(None, false);
    let data = pattern(1 << 20);
    let writers: Vec<_> = (0..6)
        .map(|number| {
            let (path, data) = (mount.path(format!("slow {number}")), data.clone());
            std::thread::spawn(move || fs::write(path, data).unwrap())
        })
        .collect();
    until("two writes", || mount.fs.waiting.load(Ordering::SeqCst) == 2);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(mount.fs.begun.load(Ordering::SeqCst), 2);
    mount.fs.gate.send(true).unwrap();
    for writer in writers {
        writer.join().unwrap();
    }
    for number in 0..6 {
        assert!(fs::read(mount.path(format!("slow {number}"))).unwrap() == data, "{number}");
    }
}

#[test]
fn the_kernel_believes_what_it_knows_until_it_is_told() {
    skip_unless!(is_root(), "needs root");
    let mut mount = Mount::unserved(Duration::from_secs(3600));
    mount.serve(None, false);
    let ino = mount.fs.put("file", b"0123456789");
    assert_eq!(fs::metadata(mount.path("file")).unwrap().len(), 10);
    mount.fs.take_away("file");
    assert_eq!(fs::metadata(mount.path("file")).unwrap().len(), 10);
    let kernel = mount.fs.kernel.lock().unwrap().clone().unwrap();
    kernel.invalidate_inode(ino, 0, 0);
    kernel.invalidate_name(1, OsStr::new("file"));
    kernel.invalidate_name(1, OsStr::new("never was"));
    until("the name's end", || fs::metadata(mount.path("file")).is_err());
}
