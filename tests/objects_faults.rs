//! What goes wrong on the way to a bucket, and on the node: it is waited for or told, and nothing is lost.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::faulty::{Fault, Faulty};
use common::files::{fails, names, noise, same, sh};
use common::mount::{Mount, Options, Service, Tree};
use common::raw::{Endpoint, Raw};
use hyper::Method;

/// A tree in MinIO, and the proxy that its mounts go through. The raw bucket does not.
fn behind_a_proxy() -> Option<(Tree, Faulty, Options)> {
    let tree = Tree::new(Service::Minio)?;
    let proxy = Faulty::start(tree.endpoint.as_ref().unwrap());
    // Bounded: what hangs is to fail.
    let options =
        Options { url: Some(proxy.url.clone()), max_age: Some(100), patience: Some(60_000), ..Options::default() };
    Some((tree, proxy, options))
}

/// Waits for what comes by itself.
#[track_caller]
fn until(what: &str, seconds: u64, condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The proxy does what it is told, and nothing else.
#[test]
fn the_proxy_fails_as_it_is_told() {
    let Some((tree, mut proxy, _)) = behind_a_proxy() else { return };
    let endpoint = Endpoint { url: proxy.url.clone(), ..tree.endpoint.clone().unwrap() };
    let through = Raw::once(&endpoint, &tree.bucket);
    let (key, bytes) = (tree.key("f"), noise(1, 3 << 20));
    through.put(&key, &bytes, &[("author", "somebody")]);
    same(&through.get(&key).unwrap(), &bytes);
    assert_eq!(through.head(&key), tree.raw().head(&key));
    assert_eq!(through.list(&tree.prefix), tree.raw().list(&tree.prefix));
    assert_eq!(proxy.faults(), 0);
    for fault in [Fault::BreakBody, Fault::LoseAnswer, Fault::Refuse(503, "SlowDown")] {
        proxy.rule(move |_| fault);
        assert!(through.try_get(&key).is_err(), "{fault:?}");
    }
    for (fault, length) in [(Fault::ShortenBody, bytes.len() / 2), (Fault::CorruptBody, bytes.len())] {
        proxy.rule(move |_| fault);
        let found = through.try_get(&key).unwrap();
        assert!(found.len() == length && found != bytes, "{fault:?}");
    }
    proxy.rule(|asked| if asked.writes() { Fault::LoseAnswer } else { Fault::None });
    assert!(through.try_put(&tree.key("lost"), b"x", &[]).is_err());
    assert_eq!(tree.raw().get(&tree.key("lost")).unwrap(), b"x");
    proxy.rule(|asked| if asked.writes() { Fault::CorruptRequest } else { Fault::None });
    assert!(through.try_put(&tree.key("damaged"), b"body", &[]).is_err(), "its signature covers it");
    assert_eq!(tree.raw().get(&tree.key("damaged")), None);
    assert_eq!(proxy.faults(), 7);
    proxy.down();
    assert!(through.try_get(&key).is_err());
    proxy.heal();
    proxy.up();
    same(&through.get(&key).unwrap(), &bytes);
}

/// The service goes in the middle of a write and comes back after this long.
fn outage(seconds: u64) {
    let Some((tree, mut proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&options);
    let before = noise(5, 300_000);
    tree.raw().put(&tree.key("read"), &before, &[]);
    let bytes = noise(1, 40 << 20);
    let path = mount.at("written");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut file = File::create(&path).unwrap();
            for chunk in bytes.chunks(1 << 20) {
                file.write_all(chunk).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
            file.sync_all().unwrap();
        });
        std::thread::sleep(Duration::from_millis(200));
        proxy.down();
        let reader = scope.spawn(|| fs::read(mount.at("read")).unwrap());
        std::thread::sleep(Duration::from_secs(seconds));
        assert!(!writer.is_finished() && !reader.is_finished(), "they wait");
        proxy.up();
        writer.join().unwrap();
        same(&reader.join().unwrap(), &before);
    });
    same(&tree.raw().get(&tree.key("written")).unwrap(), &bytes);
    sh(&mount.path, "mkdir d; echo x >d/f; mv d e; rm -r e");
}

/// > While the service is away programs wait, and then they go on: none of them sees an error.
#[test]
fn a_service_that_goes_away_is_waited_for() {
    outage(8);
}

#[test]
fn it_may_be_away_for_half_a_minute() {
    outage(30);
}

/// > Waiting ends with the mount's patience, in EIO; what was written stays on the node, and goes to the bucket with a later
/// > fsync or by itself.
#[test]
fn patience_ends_and_nothing_is_lost() {
    let Some((tree, mut proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&Options { patience: Some(1500), ..options });
    fs::write(mount.at("before"), "there").unwrap();
    let bytes = noise(1, 100_000);
    let mut file = File::create(mount.at("f")).unwrap();
    file.write_all(&bytes).unwrap();
    let mut other = File::create(mount.at("by-itself")).unwrap();
    other.write_all(b"by itself").unwrap();
    proxy.down();
    fails(file.sync_all(), libc::EIO);
    drop(other);
    std::thread::sleep(Duration::from_millis(200));
    fails(fs::write(mount.at("before"), "changed"), libc::EIO);
    proxy.up();
    file.sync_all().unwrap();
    same(&tree.raw().get(&tree.key("f")).unwrap(), &bytes);
    drop(file);
    until("the upload", 60, || tree.raw().get(&tree.key("by-itself")).is_some_and(|body| body == b"by itself"));
    assert_eq!(fs::read(mount.at("by-itself")).unwrap(), b"by itself");
}

/// A bit of everything, checked through the mount and in the bucket.
fn work(tree: &Tree, mount: &Mount) {
    let large = noise(1, 25 << 20);
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("d/large"), &large).unwrap();
    for number in 0..15 {
        fs::write(mount.at(format!("d/f{number}")), format!("{number}")).unwrap();
    }
    fs::rename(mount.at("d/f3"), mount.at("d/renamed")).unwrap();
    OpenOptions::new().append(true).open(mount.at("d/f4")).unwrap().write_all(b" more").unwrap();
    fs::remove_file(mount.at("d/f5")).unwrap();
    fs::rename(mount.at("d"), mount.at("e")).unwrap();
    OpenOptions::new().write(true).open(mount.at("e/large")).unwrap().write_all_at(b"patch", 11 << 20).unwrap();
    let mut wanted = large;
    wanted[11 << 20..(11 << 20) + 5].copy_from_slice(b"patch");
    assert_eq!(names(mount.at("e")).len(), 15);
    same(&fs::read(mount.at("e/large")).unwrap(), &wanted);
    same(&tree.raw().get(&tree.key("e/large")).unwrap(), &wanted);
    assert_eq!(tree.raw().get(&tree.key("e/renamed")).unwrap(), b"3");
    assert_eq!(tree.raw().get(&tree.key("e/f4")).unwrap(), b"4 more");
    assert_eq!(tree.raw().list(&tree.key("e/")).keys().filter(|key| !key.ends_with('/')).count(), 15);
    assert_eq!(tree.raw().list(&tree.key("d/")).len(), 0);
}

/// > Throttling (503 SlowDown, 429), 500 and broken connections, in storms, are ridden out.
#[test]
fn storms_of_errors_are_ridden_out() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&options);
    proxy.rule(|asked| match asked.before % 7 {
        0 => Fault::Refuse(503, "SlowDown"),
        2 => Fault::Refuse(500, "InternalError"),
        4 => Fault::Refuse(429, "TooManyRequests"),
        5 if asked.method == Method::GET => Fault::BreakBody,
        _ => Fault::None,
    });
    work(&tree, &mount);
    assert!(proxy.faults() > 20, "{}", proxy.faults());
    // All of them for a while.
    proxy.rule(|_| Fault::Refuse(503, "SlowDown"));
    let path = mount.at("throttled");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| fs::write(&path, "in the end").unwrap());
        std::thread::sleep(Duration::from_secs(2));
        assert!(!writer.is_finished());
        proxy.heal();
        writer.join().unwrap();
    });
    assert_eq!(tree.raw().get(&tree.key("throttled")).unwrap(), b"in the end");
}

/// > An answer that is lost after the service did what was asked is no conflict with oneself: the file is there once, whole.
#[test]
fn lost_answers_are_no_conflicts() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&options);
    let prefix = tree.prefix.clone();
    proxy.rule(move |asked| {
        let hit = asked.is_about(&prefix) && asked.before % 3 == 0 && asked.method != Method::GET;
        if hit { Fault::LoseAnswer } else { Fault::None }
    });
    work(&tree, &mount);
    for number in 0..10 {
        let path = mount.at(format!("exclusive-{number}"));
        OpenOptions::new().write(true).create_new(true).open(&path).unwrap().write_all(b"mine").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
    assert!(proxy.faults() > 10, "{}", proxy.faults());
}

/// > What is in a directory that is being renamed is there all the time for whoever is in it: looking and opening wait for the
/// > rename.
#[test]
fn files_are_there_while_their_directory_is_renamed() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&Options { stall: Some(1500), ..options });
    fs::create_dir(mount.at("old")).unwrap();
    let numbers = 0..6;
    for number in numbers.clone() {
        fs::write(mount.at(format!("old/{number}")), noise(number, 100_000)).unwrap();
    }
    let directory = File::open(mount.at("old")).unwrap();
    let inside = |number| format!("/proc/self/fd/{}/{number}", std::os::fd::AsRawFd::as_raw_fd(&directory));
    // The keys are here and there, or only there.
    for (from, to, fault) in [("old", "new", Fault::Hold), ("new", "newer", Fault::Stall)] {
        proxy.rule(move |asked| if asked.query.contains("delete") { fault } else { Fault::None });
        let before = proxy.faults();
        let (from, to) = (mount.at(from), mount.at(to));
        std::thread::scope(|scope| {
            let renaming = scope.spawn(|| fs::rename(&from, &to));
            until("the rename", 20, || proxy.faults() > before);
            // What was known is too old.
            std::thread::sleep(Duration::from_millis(200));
            let look = |number: u64| {
                assert_eq!(fs::metadata(inside(number)).unwrap().len(), 100_000);
                same(&fs::read(inside(number)).unwrap(), &noise(number, 100_000));
            };
            let looking: Vec<_> = numbers.clone().map(|number| scope.spawn(move || look(number))).collect();
            std::thread::sleep(Duration::from_millis(700));
            proxy.heal();
            renaming.join().unwrap().unwrap();
            looking.into_iter().for_each(|looking| looking.join().unwrap());
        });
    }
    assert_eq!(names(mount.at("newer")).len(), 6);
}

/// > A body that breaks off, ends early or was changed on its way is never taken for a file's content: reading tries again.
#[test]
fn damaged_answers_are_never_taken_for_content() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let (small, large) = (noise(1, 10_000), noise(2, 30 << 20));
    for fault in [Fault::BreakBody, Fault::ShortenBody] {
        tree.raw().put(&tree.key("small"), &small, &[]);
        tree.raw().put(&tree.key("large"), &large, &[]);
        let mount = tree.mount_with(&options);
        let before = proxy.faults();
        proxy.rule(move |asked| {
            let body = asked.method == Method::GET && (asked.path.ends_with("small") || asked.path.ends_with("large"));
            if body && asked.before % 2 == 0 { fault } else { Fault::None }
        });
        same(&fs::read(mount.at("small")).unwrap(), &small);
        same(&fs::read(mount.at("large")).unwrap(), &large);
        assert!(proxy.faults() > before, "{fault:?} did not happen");
        proxy.heal();
        mount.unmount();
        fs::remove_dir_all(tree.dir.path().join("node-a/cache")).unwrap();
    }
}

/// > Bytes that were changed on their way to the bucket are refused by the service and sent again.
#[test]
fn damaged_uploads_are_sent_again() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&Options { checksums: true, ..options });
    let prefix = tree.prefix.clone();
    proxy.rule(move |asked| {
        let hit = asked.is_about(&prefix) && asked.method == Method::PUT && asked.length > 1000;
        if hit && asked.before % 2 == 0 { Fault::CorruptRequest } else { Fault::None }
    });
    let (small, large) = (noise(1, 10_000), noise(2, 20 << 20));
    for number in 0..4 {
        fs::write(mount.at(format!("small-{number}")), &small).unwrap();
        same(&tree.raw().get(&tree.key(&format!("small-{number}"))).unwrap(), &small);
    }
    fs::write(mount.at("large"), &large).unwrap();
    same(&tree.raw().get(&tree.key("large")).unwrap(), &large);
    assert!(proxy.faults() > 2, "{}", proxy.faults());
}

/// > What was changed on its way from the bucket is noticed, where the service has a checksum of the whole object.
#[test]
fn damaged_downloads_are_noticed() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let small = noise(1, 10_000);
    let writer = tree.mount_with(&Options { node: "writer".to_owned(), checksums: true, ..Options::default() });
    fs::write(writer.at("small"), &small).unwrap();
    writer.unmount();
    let mount = tree.mount_with(&Options { checksums: true, ..options });
    proxy.rule(|asked| {
        let hit = asked.method == Method::GET && asked.path.ends_with("small") && asked.before % 2 == 0;
        if hit { Fault::CorruptBody } else { Fault::None }
    });
    same(&fs::read(mount.at("small")).unwrap(), &small);
    proxy.rule(|asked| {
        let hit = asked.method == Method::GET && asked.path.ends_with("small");
        if hit { Fault::CorruptBody } else { Fault::None }
    });
    mount.unmount();
    // What came with an open is in no cache.
    let _ = fs::remove_dir_all(tree.dir.path().join("node-a/cache"));
    let mount = tree.mount_with(&Options {
        checksums: true,
        patience: Some(1500),
        url: Some(proxy.url.clone()),
        ..Options::default()
    });
    fails(fs::read(mount.at("small")), libc::EIO);
}

/// > A service that begins an answer and never ends it is given up, and asked again.
#[test]
fn a_stalled_answer_is_given_up() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let large = noise(1, 20 << 20);
    tree.raw().put(&tree.key("large"), &large, &[]);
    let mount = tree.mount_with(&Options { stall: Some(1000), ..options });
    proxy.rule(|asked| if asked.before % 3 == 0 { Fault::Stall } else { Fault::None });
    same(&fs::read(mount.at("large")).unwrap(), &large);
    work(&tree, &mount);
    assert!(proxy.faults() > 3, "{}", proxy.faults());
}

/// > With `consistency: write-back` close returns when the node's disk has the file, and fsync when the bucket has it.
#[test]
fn write_back_closes_before_and_syncs_after() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&Options { write_back: true, ..options });
    fs::write(mount.at("warm"), "x").unwrap();
    let prefix = tree.prefix.clone();
    proxy.rule(move |asked| if asked.writes() && asked.is_about(&prefix) { Fault::Hold } else { Fault::None });
    let bytes = noise(1, 12 << 20);
    fs::write(mount.at("closed"), &bytes).unwrap();
    for number in 0..50 {
        fs::write(mount.at(format!("small-{number}")), "small").unwrap();
    }
    assert_eq!(tree.raw().head(&tree.key("closed")), None);
    // The node has it, whatever the bucket has.
    same(&fs::read(mount.at("closed")).unwrap(), &bytes);
    assert_eq!(names(&mount.path).len(), 52);
    let synced = File::create(mount.at("synced")).unwrap();
    synced.write_all_at(b"synced", 0).unwrap();
    std::thread::scope(|scope| {
        let sync = scope.spawn(|| synced.sync_all().unwrap());
        std::thread::sleep(Duration::from_millis(500));
        assert!(!sync.is_finished(), "fsync has to wait for the bucket");
        assert_eq!(tree.raw().head(&tree.key("synced")), None);
        proxy.heal();
        sync.join().unwrap();
        assert_eq!(tree.raw().get(&tree.key("synced")).unwrap(), b"synced");
    });
    drop(synced);
    // By itself, or at the latest when it is unmounted.
    mount.unmount();
    same(&tree.raw().get(&tree.key("closed")).unwrap(), &bytes);
    assert_eq!(tree.raw().list(&tree.key("small-")).len(), 50);
}

/// > A node's disk that is full is the writer's ENOSPC; what was written before is not lost.
#[test]
fn a_full_staging_disk_is_the_writers_error() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let disk = Disk::new(tree.dir.path(), 64 << 20);
    // An upload may be begun early, and is not answered: that is given up soon.
    let stall = Some(1000);
    let mount = tree.mount_with(&Options { staging: Some(disk.path.join("staging")), stall, ..options });
    fs::write(mount.at("before"), "before").unwrap();
    let prefix = tree.prefix.clone();
    proxy.rule(move |asked| if asked.writes() && asked.is_about(&prefix) { Fault::Hold } else { Fault::None });
    let chunk = noise(1, 1 << 20);
    let mut file = File::create(mount.at("f")).unwrap();
    let mut written = 0;
    let error = loop {
        match file.write(&chunk) {
            Ok(more) => written += more,
            Err(error) => break error,
        }
        assert!(written < 200 << 20, "where does it all go?");
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    assert!(written > 16 << 20, "{written}");
    proxy.heal();
    file.sync_all().unwrap();
    drop(file);
    let object = tree.raw().get(&tree.key("f")).unwrap();
    let wanted: Vec<_> = chunk.iter().copied().cycle().take(written).collect();
    same(&object, &wanted);
    // There is room again.
    fs::write(mount.at("after"), noise(2, 20 << 20)).unwrap();
    assert_eq!(fs::read(mount.at("before")).unwrap(), b"before");
    mount.unmount();
}

/// A small file system of its own.
struct Disk {
    path: std::path::PathBuf,
}

impl Disk {
    fn new(dir: &Path, size: u64) -> Self {
        let (image, path) = (dir.join("disk.img"), dir.join("disk"));
        File::create(&image).unwrap().set_len(size).unwrap();
        common::run("mkfs.ext4", &["-q", image.to_str().unwrap()]);
        fs::create_dir(&path).unwrap();
        common::run("mount", &["-o", "loop", image.to_str().unwrap(), path.to_str().unwrap()]);
        Self { path }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l"]).arg(&self.path).status();
    }
}

/// > What was staged when a worker died is uploaded by the next: files that were closed (write-back), and what was written to
/// > files that were open.
#[test]
fn what_a_killed_worker_had_staged_is_uploaded_by_the_next() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    let options = Options { write_back: true, ..options };
    let mount = tree.mount_with(&options);
    let base = noise(7, 9 << 20);
    fs::write(mount.at("changed"), &base).unwrap();
    File::open(mount.at("changed")).unwrap().sync_all().unwrap();
    let prefix = tree.prefix.clone();
    proxy.rule(move |asked| if asked.writes() && asked.is_about(&prefix) { Fault::Hold } else { Fault::None });
    let large = noise(1, 12 << 20);
    fs::write(mount.at("large"), &large).unwrap();
    fs::write(mount.at("small"), "closed").unwrap();
    let open = File::create(mount.at("open")).unwrap();
    open.write_all_at(b"not closed", 0).unwrap();
    let changed = OpenOptions::new().write(true).open(mount.at("changed")).unwrap();
    changed.write_all_at(b"patch", 1000).unwrap();
    mount.kill();
    drop((open, changed));
    proxy.heal();
    assert_eq!(tree.raw().get(&tree.key("small")), None);
    let mount = tree.mount_with(&options);
    // At once on this node, and soon in the bucket.
    assert_eq!(fs::read(mount.at("small")).unwrap(), b"closed");
    same(&fs::read(mount.at("large")).unwrap(), &large);
    let mut patched = base;
    patched[1000..1005].copy_from_slice(b"patch");
    for (name, bytes) in [("small", &b"closed"[..]), ("large", &large), ("open", b"not closed"), ("changed", &patched)]
    {
        until(name, 60, || tree.raw().get(&tree.key(name)).is_some_and(|object| object == bytes));
        same(&fs::read(mount.at(name)).unwrap(), bytes);
    }
}

/// > What was synced is in the bucket, whatever happens to the worker or its disk.
#[test]
fn what_was_synced_survives_the_node() {
    let Some((tree, _proxy, options)) = behind_a_proxy() else { return };
    let mount = tree.mount_with(&Options { write_back: true, ..options });
    let bytes = noise(1, 10 << 20);
    let file = File::create(mount.at("f")).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    file.sync_all().unwrap();
    mount.kill();
    fs::remove_dir_all(tree.dir.path().join("node-a")).unwrap();
    same(&fs::read(tree.elsewhere().at("f")).unwrap(), &bytes);
}

/// > Expired credentials are EACCES for whoever needs the bucket; with good ones everything goes on, and nothing is lost.
#[test]
fn expired_credentials_are_told_and_got_over() {
    let Some((tree, proxy, options)) = behind_a_proxy() else { return };
    tree.raw().put(&tree.key("f"), b"text", &[]);
    let mount = tree.mount_with(&options);
    let mut open = File::create(mount.at("new")).unwrap();
    open.write_all(b"staged").unwrap();
    proxy.rule(|_| Fault::Refuse(400, "ExpiredToken"));
    fails(fs::read(mount.at("f")), libc::EACCES);
    fails(open.sync_all(), libc::EACCES);
    proxy.rule(|_| Fault::Refuse(403, "InvalidAccessKeyId"));
    fails(open.sync_all(), libc::EACCES);
    proxy.heal();
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"text");
    open.sync_all().unwrap();
    assert_eq!(tree.raw().get(&tree.key("new")).unwrap(), b"staged");
}

/// > A bucket that is deleted underneath is an error, not an empty directory; what was staged stays on the node.
#[test]
fn a_bucket_deleted_underneath_is_an_error() {
    let Some(tree) = Tree::bucket(Service::Minio) else { return };
    let mount = tree.mount_with(&Options { max_age: Some(100), patience: Some(1500), ..Options::default() });
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("d/f"), "x").unwrap();
    let mut open = File::create(mount.at("staged")).unwrap();
    open.write_all(b"staged").unwrap();
    tree.raw().remove_bucket();
    std::thread::sleep(Duration::from_millis(200));
    // Opening a directory asks nobody.
    let listed = fs::read_dir(&mount.path).and_then(|mut entries| entries.next().transpose()).map(|_| ());
    for refused in [listed, fs::read(mount.at("d/f")).map(|_| ()), open.sync_all()] {
        fails(refused, libc::EIO);
    }
    // It is made again, by somebody with a backup.
    tree.raw().make_bucket();
    tree.raw().put("restored", b"x", &[]);
    until("the new bucket", 30, || fs::read_dir(&mount.path).is_ok_and(|mut found| found.any(|_| true)));
    assert!(names(&mount.path).contains(&"restored".to_owned()));
    open.sync_all().unwrap();
    drop(open);
    assert_eq!(tree.raw().get("staged").unwrap(), b"staged");
    mount.unmount();
    tree.raw().remove_bucket();
}
