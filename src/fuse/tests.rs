//! Requests and answers without a kernel: bytes in, bytes out, and bytes that no kernel would send.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::abi::{self, opcode};
use super::dispatch;
use super::filesystem::{
    Answer, Attr, Caller, DirEntry, DirSink, Entry, FileSystem, Handle, Ino, Opened, SetAttr, StatFs, Time,
};
use super::reply::{self, Body, Listing};
use super::request::{self, Head, Operation};
use crate::host::Errno;

fn request(number: u32, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let len = u32::try_from(size_of::<abi::InHeader>() + body.len()).unwrap();
    let head =
        abi::InHeader { len, opcode: number, unique: 2, node: 1, uid: 5, gid: 6, pid: 7, extensions: 0, padding: 0 };
    [head.as_bytes(), &body].concat()
}

fn decoded(bytes: &[u8]) -> Result<Operation, Errno> {
    let (head, body) = Head::read(bytes).unwrap();
    request::decode(&head, body)
}

fn written(answer: Result<Body, Errno>) -> (abi::OutHeader, Vec<u8>) {
    let bytes = reply::write(9, &answer, |pieces| pieces.iter().map(|piece| &piece[..]).collect::<Vec<_>>().concat());
    let (head, body) = abi::OutHeader::read_from_prefix(&bytes).unwrap();
    assert_eq!(usize::try_from(head.len).unwrap(), bytes.len());
    (head, body.to_vec())
}

fn read<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).unwrap().0
}

fn attr(mode: u32) -> Attr {
    let time = SystemTime::UNIX_EPOCH;
    Attr { ino: 3, size: 4, blocks: 1, atime: time, mtime: time, ctime: time, mode, nlink: 1, uid: 5, gid: 6, rdev: 0 }
}

fn entry() -> Entry {
    Entry { attr: attr(0o100_644), attr_ttl: Duration::from_millis(1500), name_ttl: Duration::from_secs(2) }
}

#[test]
fn who_asks_and_whether_again() {
    let mut bytes = request(opcode::READLINK, &[]);
    let (head, _) = Head::read(&bytes).unwrap();
    assert_eq!((head.who.uid, head.who.gid, head.who.pid, head.who.unique, head.who.resent), (5, 6, 7, 2, false));
    bytes[15] |= 0x80;
    let (head, _) = Head::read(&bytes).unwrap();
    assert_eq!((head.who.unique, head.who.resent, head.unique), (2, true, 2 | 1 << 63));
}

#[test]
fn a_rename_has_both_names_and_flags() {
    let head = abi::Rename2In { new_parent: 8, flags: 1, padding: 0 };
    let bytes = request(opcode::RENAME2, &[head.as_bytes(), b"old\0new\0"]);
    let Ok(Operation::Rename { name, new_parent: 8, new_name, flags: 1 }) = decoded(&bytes) else { panic!() };
    assert_eq!((name.as_os_str(), new_name.as_os_str()), (OsStr::new("old"), OsStr::new("new")));
    decoded(&request(opcode::RENAME2, &[head.as_bytes(), b"old\0new"])).unwrap_err();
    decoded(&request(opcode::RENAME2, &[head.as_bytes(), b"old\0"])).unwrap_err();
}

#[test]
fn names_that_are_paths_are_refused() {
    for name in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"unended"] {
        decoded(&request(opcode::LOOKUP, &[name])).unwrap_err();
    }
    decoded(&request(opcode::LOOKUP, &[b"...\0"])).unwrap();
}

#[test]
fn times_before_1970_are_read_and_written() {
    let asked = abi::SetattrIn {
        valid: abi::valid::MTIME | abi::valid::ATIME | abi::valid::ATIME_NOW,
        mtime: (-5_i64).cast_unsigned(),
        mtime_nanos: 250_000_000,
        ..abi::SetattrIn::default()
    };
    let Ok(Operation::Setattr(change)) = decoded(&request(opcode::SETATTR, &[asked.as_bytes()])) else { panic!() };
    let time = SystemTime::UNIX_EPOCH - Duration::from_millis(4750);
    assert_eq!((change.mtime, change.atime, change.ctime), (Some(Time::At(time)), Some(Time::Now), None));
    let shown = reply::attributes(&Attr { mtime: time, ..attr(0) });
    assert_eq!((shown.mtime.cast_signed(), shown.mtime_nanos), (-5, 250_000_000));
    let whole = reply::attributes(&Attr { mtime: SystemTime::UNIX_EPOCH - Duration::from_secs(3), ..attr(0) });
    assert_eq!((whole.mtime.cast_signed(), whole.mtime_nanos), (-3, 0));
    let wrong = abi::SetattrIn { mtime_nanos: 1_000_000_000, ..asked };
    decoded(&request(opcode::SETATTR, &[wrong.as_bytes()])).unwrap_err();
}

#[test]
fn another_owner_means_that_privileges_go() {
    let asked = |valid| abi::SetattrIn { valid, uid: 9, ..abi::SetattrIn::default() };
    let kills = |valid| match decoded(&request(opcode::SETATTR, &[asked(valid).as_bytes()])) {
        Ok(Operation::Setattr(change)) => change.kill_suid,
        other => panic!("{other:?}"),
    };
    assert!(kills(abi::valid::UID) && kills(abi::valid::GID) && kills(abi::valid::SIZE | abi::valid::KILL_SUIDGID));
    assert!(!kills(abi::valid::SIZE) && !kills(abi::valid::MODE));
}

#[test]
fn a_write_says_how_much_and_must_have_it() {
    let asked = abi::WriteIn { handle: 4, offset: 10, size: 3, write_flags: 5, ..abi::WriteIn::default() };
    let bytes = request(opcode::WRITE, &[asked.as_bytes(), b"abc"]);
    assert_eq!(&bytes[request::WRITE_DATA..], b"abc");
    let Ok(Operation::Write { handle: 4, offset: 10, size: 3, from_cache: true, kill_suid: true }) = decoded(&bytes)
    else {
        panic!()
    };
    decoded(&request(opcode::WRITE, &[asked.as_bytes(), b"ab"])).unwrap_err();
    let wrong = abi::WriteIn { offset: u64::MAX, ..asked };
    decoded(&request(opcode::WRITE, &[wrong.as_bytes(), b"abc"])).unwrap_err();
}

#[test]
fn forgets_are_no_more_than_there_are() {
    let head = abi::BatchForgetIn { count: u32::MAX, padding: 0 };
    let one = abi::ForgetOne { node: 3, count: 2 };
    let bytes = request(opcode::BATCH_FORGET, &[head.as_bytes(), one.as_bytes(), one.as_bytes()]);
    let Ok(Operation::Forget(list)) = decoded(&bytes) else { panic!() };
    assert_eq!(list, [(3, 2), (3, 2)]);
}

#[test]
fn what_changes_something_is_never_given_up() {
    let abandonable = |number: u32, body: &[u8]| decoded(&request(number, &[body])).unwrap().is_abandonable();
    let open = |flags| abi::OpenIn { flags, open_flags: 0 };
    assert!(abandonable(opcode::OPEN, open(0).as_bytes()));
    assert!(!abandonable(opcode::OPEN, open(request::O_TRUNC).as_bytes()));
    assert!(abandonable(opcode::LOOKUP, b"a\0"));
    assert!(!abandonable(opcode::UNLINK, b"a\0"));
    assert!(!abandonable(opcode::FLUSH, abi::FlushIn::default().as_bytes()));
    assert!(!abandonable(opcode::FSYNC, abi::FsyncIn::default().as_bytes()));
}

#[test]
fn errors_are_negative_and_in_the_kernels_range() {
    assert_eq!(written(Err(Errno::NOENT)).0.error, -2);
    assert_eq!(written(Ok(Body::Empty)).0.error, 0);
    // What the kernel would refuse, and let the program wait for ever.
    assert_eq!(written(Err(Errno::from_raw_os_error(512))).0.error, -5);
}

#[test]
fn no_more_is_read_than_was_asked_for() {
    let pieces = vec![Bytes::from_static(b"abc"), Bytes::new(), Bytes::from_static(b"defg"), Bytes::from_static(b"h")];
    let (head, body) = written(Ok(Body::pieces(pieces, 5)));
    assert_eq!((head.len, &body[..]), (21, &b"abcde"[..]));
    let many = vec![Bytes::from_static(b"x"); 3000];
    let Body::Whole(whole) = Body::pieces(many, 2500) else { panic!("a system call takes no 2,500 pieces") };
    assert_eq!(whole.len(), 2500);
}

#[test]
fn a_listing_takes_what_fits() {
    let name = |name: &str, entry| DirEntry { name: name.into(), ino: 3, kind: 0o100_000, next: 7, entry };
    let mut plain = Listing::new(64, false);
    assert!(plain.push(&name("a", None)) && plain.push(&name("12345678", None)));
    assert!(!plain.push(&name("b", None)));
    let (_, body) = written(Ok(plain.into_body()));
    assert_eq!(body.len(), 64);
    let first = read::<abi::Dirent>(&body);
    assert_eq!((first.ino, first.next, first.name_len, first.kind, body[24]), (3, 7, 1, 8, b'a'));
    let second = read::<abi::Dirent>(&body[32..]);
    assert_eq!((second.name_len, &body[56..64]), (8, &b"12345678"[..]));

    let mut plus = Listing::new(4096, true);
    assert!(plus.push(&name("..", Some(entry()))) && plus.push(&name("a", Some(entry()))));
    assert!(plus.push(&name("b", None)));
    let (_, body) = written(Ok(plus.into_body()));
    let nodes: Vec<_> = (0..3).map(|at| read::<abi::EntryOut>(&body[at * 160..]).node).collect();
    assert_eq!(nodes, [0, 3, 0]);
    assert_eq!(read::<abi::Dirent>(&body[160 + 128..]).name_len, 1);
}

#[test]
fn an_entry_says_how_long_it_holds() {
    let shown = reply::entry(&entry());
    assert_eq!((shown.attr_valid, shown.attr_valid_nanos, shown.name_valid), (1, 500_000_000, 2));
}

#[test]
fn an_attribute_that_does_not_fit_is_an_error_and_its_size_can_be_asked() {
    let (_, body) = written(reply::xattr(Bytes::from_static(b"value"), 0));
    assert_eq!(read::<abi::XattrSize>(&body).size, 5);
    assert_eq!(written(reply::xattr(Bytes::from_static(b"value"), 5)).1, b"value");
    assert_eq!(reply::xattr(Bytes::from_static(b"value"), 4).unwrap_err(), Errno::RANGE);
    assert_eq!(reply::names(&["a".into(), "bc".into()]), b"a\0bc\0");
}

/// Answers everything, with as much as it can.
struct Everything;

impl FileSystem for Everything {
    async fn lookup(&self, _: Caller, _: Ino, _: &OsStr) -> Answer<Entry> {
        Ok(entry())
    }
    fn forget(&self, _: Ino, _: u64) {}
    async fn getattr(&self, _: Caller, _: Ino, _: Option<Handle>) -> Answer<(Attr, Duration)> {
        Ok((attr(0o106_755), Duration::MAX))
    }
    async fn setattr(&self, _: Caller, _: Ino, _: SetAttr) -> Answer<(Attr, Duration)> {
        Ok((attr(0), Duration::ZERO))
    }
    async fn readlink(&self, _: Caller, _: Ino) -> Answer<Bytes> {
        Ok(Bytes::from_static(b"target"))
    }
    async fn mknod(&self, _: Caller, _: Ino, _: &OsStr, _: u32, _: u32, _: u32) -> Answer<Entry> {
        Ok(entry())
    }
    async fn mkdir(&self, _: Caller, _: Ino, _: &OsStr, _: u32, _: u32) -> Answer<Entry> {
        Ok(entry())
    }
    async fn unlink(&self, _: Caller, _: Ino, _: &OsStr) -> Answer<()> {
        Ok(())
    }
    async fn rmdir(&self, _: Caller, _: Ino, _: &OsStr) -> Answer<()> {
        Ok(())
    }
    async fn symlink(&self, _: Caller, _: Ino, _: &OsStr, _: &OsStr) -> Answer<Entry> {
        Ok(entry())
    }
    async fn rename(&self, _: Caller, _: Ino, _: &OsStr, _: Ino, _: &OsStr, _: u32) -> Answer<()> {
        Ok(())
    }
    async fn open(&self, _: Caller, _: Ino, _: u32) -> Answer<Opened> {
        Ok(Opened { handle: 1, keep_cache: true, ..Opened::default() })
    }
    async fn create(&self, _: Caller, _: Ino, _: &OsStr, _: u32, _: u32, _: u32) -> Answer<(Entry, Opened)> {
        Ok((entry(), Opened::default()))
    }
    async fn read(&self, _: Caller, _: Ino, _: Handle, _: u64, _: u32) -> Answer<Vec<Bytes>> {
        Ok(vec![Bytes::from_static(&[0; 5000]); 3])
    }
    async fn write(&self, _: Caller, _: Ino, _: Handle, _: u64, data: Bytes, _: bool) -> Answer<u32> {
        Ok(u32::try_from(data.len()).unwrap())
    }
    async fn flush(&self, _: Caller, _: Ino, _: Handle) -> Answer<()> {
        Ok(())
    }
    async fn release(&self, _: Ino, _: Handle) {}
    async fn fsync(&self, _: Caller, _: Ino, _: Handle, _: bool) -> Answer<()> {
        Ok(())
    }
    async fn opendir(&self, _: Caller, _: Ino) -> Answer<Opened> {
        Ok(Opened::default())
    }
    async fn readdir(&self, _: Caller, _: Ino, _: Handle, offset: u64, sink: &mut dyn DirSink) -> Answer<()> {
        for next in (1..=50).map(|step| offset.wrapping_add(step)) {
            let entry = DirEntry { name: OsString::from("name"), ino: 3, kind: 0, next, entry: Some(entry()) };
            if !sink.push(&entry) {
                break;
            }
        }
        Ok(())
    }
    async fn releasedir(&self, _: Ino, _: Handle) {}
    async fn statfs(&self, _: Caller, _: Ino) -> Answer<StatFs> {
        Err(Errno::NOSYS)
    }
}

/// One well-formed request of each kind.
fn seeds() -> Vec<Vec<u8>> {
    let ones = [1_u8; 128];
    let body = |structure: usize, rest: &[u8]| [&ones[..structure], rest].concat();
    let write = abi::WriteIn { size: 200, ..abi::WriteIn::default() };
    [
        (opcode::LOOKUP, b"name\0".to_vec()),
        (opcode::FORGET, body(8, b"")),
        (opcode::GETATTR, body(16, b"")),
        (opcode::SETATTR, body(88, b"")),
        (opcode::READLINK, vec![]),
        (opcode::SYMLINK, b"name\0target\0".to_vec()),
        (opcode::MKNOD, body(16, b"name\0")),
        (opcode::MKDIR, body(8, b"name\0")),
        (opcode::UNLINK, b"name\0".to_vec()),
        (opcode::RENAME, body(8, b"old\0new\0")),
        (opcode::LINK, body(8, b"name\0")),
        (opcode::OPEN, body(8, b"")),
        (opcode::READ, body(40, b"")),
        (opcode::WRITE, [write.as_bytes(), &[7; 200]].concat()),
        (opcode::RELEASE, body(24, b"")),
        (opcode::FSYNC, body(16, b"")),
        (opcode::SETXATTR, [&5_u32.to_ne_bytes()[..], &[0; 4], b"user.a\0value"].concat()),
        (opcode::GETXATTR, body(8, b"user.a\0")),
        (opcode::LISTXATTR, body(8, b"")),
        (opcode::FLUSH, body(24, b"")),
        (opcode::INIT, body(64, b"")),
        (opcode::READDIR, body(40, b"")),
        (opcode::CREATE, body(16, b"name\0")),
        (opcode::INTERRUPT, body(8, b"")),
        (opcode::BATCH_FORGET, [&2_u32.to_ne_bytes()[..], &[0; 4], &[1; 32]].concat()),
        (opcode::FALLOCATE, body(32, b"")),
        (opcode::READDIRPLUS, body(40, b"")),
        (opcode::RENAME2, body(16, b"old\0new\0")),
        (opcode::LSEEK, body(24, b"")),
        (99, body(50, b"")),
    ]
    .into_iter()
    .map(|(number, body)| request(number, &[&body]))
    .collect()
}

#[test]
fn no_request_however_broken_makes_it_panic() {
    let seeds = seeds();
    let filesystem = Arc::new(Everything);
    let mut random = fastrand::Rng::with_seed(7);
    let (mut answered, mut refused) = (0, 0);
    for round in 0..200_000_usize {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..random.usize(0..4) {
            let at = random.usize(0..bytes.len());
            match random.u8(0..4) {
                0 => bytes[at] = random.u8(..),
                1 => bytes[at] ^= 1 << random.u8(0..8),
                2 => bytes.truncate(at.max(1)),
                _ => bytes[at..].fill(if random.bool() { 0 } else { 0xff }),
            }
        }
        if random.bool()
            && let Ok(len) = u32::try_from(bytes.len())
            && let Some(field) = bytes.get_mut(..4)
        {
            field.copy_from_slice(&len.to_ne_bytes());
        }
        let Some((head, body)) = Head::read(&bytes) else {
            refused += 1;
            continue;
        };
        let _ = super::init::negotiate(body, &super::Options::default());
        match request::decode(&head, body) {
            Ok(operation) => {
                let data = Bytes::copy_from_slice(bytes.get(request::WRITE_DATA..).unwrap_or_default());
                let mut answer = dispatch::begin(&filesystem, head, operation, data, None);
                let answer = answer.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                let Poll::Ready(answer) = answer else { panic!("{head:?} waits") };
                written(answer);
                answered += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(answered > 50_000 && refused > 20_000, "{answered} answered, {refused} refused");
}
