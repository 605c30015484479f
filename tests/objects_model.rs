//! Random operations on a mounted bucket and on a plain directory, side by side: each answer is the same, and so is what
//! is there afterwards, through the mount, through another one, and as objects.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use common::mount::{Mount, Options, Service, Tree};
use fastrand::Rng;
use rustix::fs::{AtFlags, CWD, FallocateFlags, RenameFlags, Timespec, Timestamps, XattrFlags};
use sha2::Digest;

const HANDLES: usize = 6;
const NAMES: [&str; 5] = ["a", "b", "c", "d.txt", "é x"];

#[derive(Clone, Debug)]
enum Op {
    Open { slot: usize, path: String, flags: i32, mode: u32 },
    Close { slot: usize },
    WriteAt { slot: usize, at: u64, length: usize, seed: u64 },
    ReadAt { slot: usize, at: u64, length: usize },
    SetLen { slot: usize, length: u64 },
    Punch { slot: usize, at: u64, length: u64 },
    Allocate { slot: usize, at: u64, length: u64 },
    Sync { slot: usize },
    StatHandle { slot: usize },
    WriteWhole { path: String, length: usize, seed: u64 },
    ReadWhole { path: String },
    Truncate { path: String, length: u64 },
    Stat { path: String },
    List { path: String },
    Rename { from: String, to: String },
    RenameNoReplace { from: String, to: String },
    Unlink { path: String },
    Mkdir { path: String, mode: u32 },
    Rmdir { path: String },
    Symlink { target: String, path: String },
    Chmod { path: String, mode: u32 },
    Touch { path: String, seconds: i64, nanoseconds: i64 },
    SetXattr { path: String, name: &'static str, value: String },
    RemoveXattr { path: String, name: &'static str },
}

/// Where the operations are done.
struct Side {
    root: PathBuf,
    handles: [Option<File>; HANDLES],
}

fn path(random: &mut Rng) -> String {
    let depth = [1, 1, 2, 2, 2, 3][random.usize(..6)];
    let names: Vec<_> = (0..depth).map(|_| NAMES[random.usize(..NAMES.len())]).collect();
    names.join("/")
}

/// Mostly small; sometimes where an upload has parts.
fn offset(random: &mut Rng) -> u64 {
    match random.u32(..20) {
        0 => random.u64((5 << 20) - 10..(5 << 20) + 10),
        1 => random.u64(..11 << 20),
        2..=8 => 0,
        _ => random.u64(..200_000),
    }
}

fn length(random: &mut Rng) -> usize {
    match random.u32(..30) {
        0 => random.usize(..9 << 20),
        1..=9 => random.usize(..200_000),
        10 => 0,
        _ => random.usize(1..2000),
    }
}

fn op(random: &mut Rng) -> Op {
    let slot = random.usize(..HANDLES);
    match random.u32(..100) {
        0..=13 => {
            let kinds = [
                libc::O_RDWR | libc::O_CREAT,
                libc::O_RDWR | libc::O_CREAT,
                libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
                libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC,
                libc::O_RDWR | libc::O_APPEND | libc::O_CREAT,
                libc::O_RDONLY,
                libc::O_RDWR,
                libc::O_WRONLY,
                libc::O_WRONLY | libc::O_TRUNC,
            ];
            let mode = [0o644, 0o600, 0o777][random.usize(..3)];
            Op::Open { slot, path: path(random), flags: kinds[random.usize(..kinds.len())], mode }
        }
        14..=18 => Op::Close { slot },
        19..=33 => Op::WriteAt { slot, at: offset(random), length: length(random), seed: random.u64(..) },
        34..=41 => Op::ReadAt { slot, at: offset(random), length: length(random) },
        42..=45 => Op::SetLen { slot, length: offset(random) },
        46 => Op::Punch { slot, at: offset(random), length: random.u64(1..200_000) },
        47 => Op::Allocate { slot, at: offset(random), length: random.u64(1..200_000) },
        48..=49 => Op::Sync { slot },
        50..=51 => Op::StatHandle { slot },
        52..=56 => Op::WriteWhole { path: path(random), length: length(random), seed: random.u64(..) },
        57..=61 => Op::ReadWhole { path: path(random) },
        62..=63 => Op::Truncate { path: path(random), length: offset(random) },
        64..=66 => Op::Stat { path: path(random) },
        67..=69 => Op::List { path: path(random) },
        70..=77 => Op::Rename { from: path(random), to: path(random) },
        78 => Op::RenameNoReplace { from: path(random), to: path(random) },
        79..=82 => Op::Unlink { path: path(random) },
        83..=88 => Op::Mkdir { path: path(random), mode: [0o755, 0o700, 0o1777][random.usize(..3)] },
        89..=90 => Op::Rmdir { path: path(random) },
        91..=92 => Op::Symlink { target: path(random), path: path(random) },
        93..=94 => Op::Chmod { path: path(random), mode: random.u32(..0o1000) },
        95..=96 => Op::Touch {
            path: path(random),
            seconds: random.i64(-1000..1_000_000),
            nanoseconds: random.i64(..1_000_000_000),
        },
        97..=98 => Op::SetXattr {
            path: path(random),
            name: ["user.one", "user.two"][random.usize(..2)],
            value: "v".repeat(random.usize(..40)),
        },
        _ => Op::RemoveXattr { path: path(random), name: ["user.one", "user.two"][random.usize(..2)] },
    }
}

fn hash(bytes: &[u8]) -> String {
    let digest = sha2::Sha256::digest(bytes);
    format!("{} bytes {:02x}{:02x}{:02x}{:02x}", bytes.len(), digest[0], digest[1], digest[2], digest[3])
}

/// What must be the same of anything.
fn looks(stat: &fs::Metadata) -> String {
    let size = if stat.is_dir() { 0 } else { stat.len() };
    let links = if stat.is_dir() { 1 } else { stat.nlink() };
    // Such times were set; others differ from side to side.
    let time =
        if stat.mtime() < 1_000_000_000 { format!("{}.{}", stat.mtime(), stat.mtime_nsec()) } else { String::new() };
    format!("{:o} {size} {links} {}:{} {time}", stat.mode(), stat.uid(), stat.gid())
}

impl Side {
    fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), handles: Default::default() }
    }

    /// What came of it, in words that are the same wherever it is done.
    fn apply(&mut self, op: &Op) -> String {
        match self.try_apply(op) {
            Ok(outcome) => outcome,
            Err(error) => match error.raw_os_error() {
                Some(errno) => format!("{:?}", rustix::io::Errno::from_raw_os_error(errno)),
                None => format!("{error}"),
            },
        }
    }

    fn handle(&self, slot: usize) -> io::Result<&File> {
        self.handles[slot].as_ref().ok_or_else(|| io::Error::other("no handle"))
    }

    fn try_apply(&mut self, op: &Op) -> io::Result<String> {
        let at = |path: &str| self.root.join(path);
        let done = Ok("done".to_owned());
        match op {
            Op::Open { slot, path, flags, mode } => {
                let mut options = OpenOptions::new();
                options.write(flags & (libc::O_WRONLY | libc::O_RDWR) != 0).read(flags & libc::O_WRONLY == 0);
                options.custom_flags(flags & libc::O_APPEND).truncate(flags & libc::O_TRUNC != 0).mode(*mode);
                options.create(flags & libc::O_CREAT != 0).create_new(flags & libc::O_EXCL != 0);
                let opened = options.open(at(path))?;
                self.handles[*slot] = Some(opened);
                done
            }
            Op::Close { slot } => {
                self.handles[*slot] = None;
                done
            }
            Op::WriteAt { slot, at, length, seed } => {
                let file = self.handle(*slot)?;
                file.write_all_at(&common::files::noise(*seed, *length), *at)?;
                done
            }
            Op::ReadAt { slot, at, length } => {
                let file = self.handle(*slot)?;
                let mut bytes = vec![0; *length];
                let mut read = 0;
                while read < *length {
                    match file.read_at(&mut bytes[read..], at + read as u64)? {
                        0 => break,
                        more => read += more,
                    }
                }
                Ok(hash(&bytes[..read]))
            }
            Op::SetLen { slot, length } => self.handle(*slot)?.set_len(*length).map(|()| "done".to_owned()),
            Op::Punch { slot, at, length } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(self.handle(*slot)?, flags, *at, *length)?;
                done
            }
            Op::Allocate { slot, at, length } => {
                rustix::fs::fallocate(self.handle(*slot)?, FallocateFlags::empty(), *at, *length)?;
                done
            }
            Op::Sync { slot } => self.handle(*slot)?.sync_all().map(|()| "done".to_owned()),
            Op::StatHandle { slot } => Ok(looks(&self.handle(*slot)?.metadata()?)),
            Op::WriteWhole { path, length, seed } => {
                fs::write(at(path), common::files::noise(*seed, *length))?;
                done
            }
            Op::ReadWhole { path } => Ok(hash(&fs::read(at(path))?)),
            Op::Truncate { path, length } => {
                OpenOptions::new().write(true).open(at(path))?.set_len(*length)?;
                done
            }
            Op::Stat { path } => Ok(looks(&fs::symlink_metadata(at(path))?)),
            Op::List { path } => {
                let mut names = Vec::new();
                for entry in fs::read_dir(at(path))? {
                    let entry = entry?;
                    names.push((entry.file_name(), entry.file_type()?));
                }
                names.sort_by(|one, other| one.0.cmp(&other.0));
                Ok(format!("{names:?}"))
            }
            Op::Rename { from, to } => fs::rename(at(from), at(to)).map(|()| "done".to_owned()),
            Op::RenameNoReplace { from, to } => {
                rustix::fs::renameat_with(CWD, at(from), CWD, at(to), RenameFlags::NOREPLACE)?;
                done
            }
            Op::Unlink { path } => fs::remove_file(at(path)).map(|()| "done".to_owned()),
            Op::Mkdir { path, mode } => {
                fs::create_dir(at(path))?;
                fs::set_permissions(at(path), fs::Permissions::from_mode(*mode))?;
                done
            }
            Op::Rmdir { path } => fs::remove_dir(at(path)).map(|()| "done".to_owned()),
            Op::Symlink { target, path } => symlink(target, at(path)).map(|()| "done".to_owned()),
            Op::Chmod { path, mode } => {
                fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)).map(|()| "done".to_owned())
            }
            Op::Touch { path, seconds, nanoseconds } => {
                let time = Timespec { tv_sec: *seconds, tv_nsec: *nanoseconds };
                let times = Timestamps { last_access: time, last_modification: time };
                rustix::fs::utimensat(CWD, at(path), &times, AtFlags::SYMLINK_NOFOLLOW)?;
                done
            }
            Op::SetXattr { path, name, value } => {
                rustix::fs::setxattr(at(path), *name, value.as_bytes(), XattrFlags::empty())?;
                done
            }
            Op::RemoveXattr { path, name } => {
                rustix::fs::removexattr(at(path), *name)?;
                done
            }
        }
    }

    /// Everything that is there, by path.
    fn state(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let mut dirs = vec![self.root.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let stat = fs::symlink_metadata(&path).unwrap();
                let mut text = looks(&stat);
                if stat.is_dir() {
                    dirs.push(path.clone());
                } else if stat.is_symlink() {
                    text = format!("{text} -> {}", fs::read_link(&path).unwrap().display());
                } else {
                    text = format!("{text} {}", hash(&fs::read(&path).unwrap()));
                }
                if !stat.is_symlink() {
                    for name in ["user.one", "user.two"] {
                        let mut value = [0; 64];
                        if let Ok(length) = rustix::fs::getxattr(&path, name, &mut value) {
                            text = format!("{text} {name}={length}");
                        }
                    }
                }
                found.insert(path.strip_prefix(&self.root).unwrap().to_str().unwrap().to_owned(), text);
            }
        }
        found
    }
}

#[track_caller]
fn compare(mounted: &Side, model: &Side, when: &str) {
    let (mounted, model) = (mounted.state(), model.state());
    for (path, looks) in &model {
        assert_eq!(mounted.get(path), Some(looks), "{path}, {when}");
    }
    for (path, looks) in &mounted {
        assert!(model.contains_key(path), "{path} ({looks}) should not be there, {when}");
    }
}

/// Every file is an object with its bytes, every empty directory a marker, and nothing else is there.
fn compare_objects(tree: &Tree, model: &Side) {
    let state = model.state();
    let objects = tree.raw().list(&tree.prefix);
    for key in objects.keys() {
        let path = key.strip_prefix(&tree.prefix).unwrap();
        let entry = state.get(path.trim_end_matches('/'));
        let fits = path.is_empty() || entry.is_some_and(|looks| looks.starts_with('4') == path.ends_with('/'));
        assert!(fits, "the object {key} is {entry:?}");
    }
    for path in state.keys() {
        let place = model.root.join(path);
        let stat = fs::symlink_metadata(&place).unwrap();
        if stat.is_symlink() {
            let target = fs::read_link(&place).unwrap();
            assert_eq!(tree.raw().get(&tree.key(path)).unwrap(), target.to_str().unwrap().as_bytes(), "{path}");
        } else if stat.is_file() {
            let object = tree.raw().get(&tree.key(path)).unwrap_or_else(|| panic!("{path} is no object"));
            assert_eq!(hash(&object), hash(&fs::read(&place).unwrap()), "{path}");
        } else {
            let marker = tree.key(&format!("{path}/"));
            assert!(objects.keys().any(|key| key.starts_with(&marker)), "{path} left nothing");
        }
    }
}

/// `BERTH_SEED` is where to begin, to see a failure again; `BERTH_ROUNDS` how many.
fn seeds(rounds: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("BERTH_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    first..first + number("BERTH_ROUNDS").unwrap_or(rounds)
}

fn run(service: Service, write_back: bool, operations: usize, rounds: u64) {
    for seed in seeds(rounds) {
        let Some(tree) = Tree::new(service) else { return };
        let told = Told { seed };
        one_life(&tree, write_back, operations, seed);
        std::mem::forget(told);
    }
}

/// Says the seed when the test fails.
struct Told {
    seed: u64,
}

impl Drop for Told {
    fn drop(&mut self) {
        eprintln!("again with BERTH_SEED={} BERTH_ROUNDS=1", self.seed);
    }
}

fn one_life(tree: &Tree, write_back: bool, operations: usize, seed: u64) {
    let options = Options { write_back, ..Options::default() };
    let mut mount: Mount = tree.mount_with(&options);
    let model = tree.dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let (mut mounted, mut model) = (Side::new(&mount.path), Side::new(&model));
    let mut random = Rng::with_seed(seed);
    let mut history = Vec::new();
    for number in 0..operations {
        let op = op(&mut random);
        let (found, wanted) = (mounted.apply(&op), model.apply(&op));
        history.push(format!("{number}: {op:?} = {wanted}"));
        let last = history[history.len().saturating_sub(25)..].join("\n");
        assert_eq!(found, wanted, "operation {number}\n{last}");
        if number % 40 == 39 {
            compare(&mounted, &model, &format!("after operation {number}\n{last}"));
        }
        if number == operations / 2 {
            mounted.handles = Default::default();
            model.handles = Default::default();
            mount.unmount();
            mount = tree.mount_with(&options);
            mounted.root.clone_from(&mount.path);
            compare(&mounted, &model, &format!("mounted again after operation {number}\n{last}"));
        }
    }
    mounted.handles = Default::default();
    model.handles = Default::default();
    compare(&mounted, &model, "at the end");
    if write_back {
        mount.unmount();
        compare(&Side::new(&tree.elsewhere().path), &model, "on another node");
    } else {
        // Everything is closed, so it is everywhere.
        compare(&Side::new(&tree.elsewhere().path), &model, "on another node");
        mount.unmount();
    }
    if !tree.is_plain() {
        compare_objects(tree, &model);
    }
}

/// The model is right about itself.
#[test]
fn two_plain_directories_do_not_differ() {
    run(Service::Plain, false, 1000, 3);
}

/// And it does notice.
#[test]
fn a_difference_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let sides = ["one", "other"].map(|name| {
        fs::create_dir_all(dir.path().join(name).join("d")).unwrap();
        fs::write(dir.path().join(name).join("d/f"), "same").unwrap();
        Side::new(&dir.path().join(name))
    });
    let [one, other] = &sides;
    compare(one, other, "before");
    let differs = || std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compare(one, other, "after"))).is_err();
    let file = one.root.join("d/f");
    for change in ["sane", "same "] {
        fs::write(&file, change).unwrap();
        assert!(differs(), "{change}");
    }
    fs::write(&file, "same").unwrap();
    assert!(!differs());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(differs());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(one.root.join("more"), "").unwrap();
    assert!(differs());
}

/// > Whatever is done to a mounted bucket, every answer, and what is there afterwards, is that of a plain directory: on
/// > the mount, on another node and, byte for byte, in the bucket.
#[test]
fn a_mounted_bucket_is_like_a_plain_directory() {
    run(Service::Minio, false, 500, 2);
}

#[test]
fn so_is_one_with_write_back() {
    run(Service::Minio, true, 500, 2);
}

#[test]
fn so_is_one_of_rgw() {
    run(Service::Rgw, false, 300, 1);
}

#[test]
fn so_is_one_of_the_embedded_server() {
    run(Service::Embedded, false, 300, 1);
}
