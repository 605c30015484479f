//! Two mounts of one tree, with nothing in common but the bucket: two nodes.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Barrier;
use std::time::Duration;

use common::files::{fails, names, noise, same};
use common::mount::{Mount, Options, Service, Tree};

on_services!(
    and_plain: [
        what_is_closed_is_seen_by_the_next_open_elsewhere,
        names_are_seen_elsewhere_when_they_are_old_enough,
        attributes_are_seen_elsewhere,
        nodes_take_turns_at_appending,
        a_file_that_appears_elsewhere_is_not_removed_with_its_directory,
    ],
    only: [
        a_conflicting_change_is_refused_and_kept,
        files_made_on_two_nodes_at_once_are_a_conflict,
        a_file_replaced_elsewhere_is_never_read_as_a_mixture,
        a_change_by_another_tool_is_a_conflict_too,
        one_node_alone_creates_exclusively,
        read_only_mounts_see_what_is_written,
    ]
);

/// How old a name or an attribute may be, and a bit.
const OLD: Duration = Duration::from_millis(350);

fn node(tree: &Tree, node: &str) -> Mount {
    tree.mount_with(&Options { node: node.to_owned(), max_age: Some(300), ..Options::default() })
}

/// > An open sees what was closed before, on any node, whatever the node has cached.
fn what_is_closed_is_seen_by_the_next_open_elsewhere(tree: &Tree) {
    let nodes = [node(tree, "a"), node(tree, "b")];
    fs::write(nodes[0].at("f"), "first").unwrap();
    assert_eq!(fs::read(nodes[1].at("f")).unwrap(), b"first");
    for round in 0..12 {
        let (writer, reader) = (&nodes[round % 2], &nodes[(round + 1) % 2]);
        // Shorter and longer, whole and in places.
        let bytes = noise(round as u64, [10, 200_000, 5, 9 << 20, 4096, 4096][round % 6]);
        fs::write(writer.at("f"), &bytes).unwrap();
        same(&fs::read(reader.at("f")).unwrap(), &bytes);
        OpenOptions::new().write(true).open(reader.at("f")).unwrap().write_all_at(b"!", 3).unwrap();
        let found = fs::read(writer.at("f")).unwrap();
        assert!(found.len() == bytes.len() && found[3] == b'!', "round {round}");
    }
}

/// > What is made, renamed or removed on one node is so on every other as soon as what that knew is older than its
/// > mount allows (`--max-age`, one second).
fn names_are_seen_elsewhere_when_they_are_old_enough(tree: &Tree) {
    let (a, b) = (node(tree, "a"), node(tree, "b"));
    assert_eq!(names(&b.path), Vec::<String>::new());
    fails(fs::metadata(b.at("f")), libc::ENOENT);
    fs::write(a.at("f"), "x").unwrap();
    fs::create_dir_all(a.at("d/sub")).unwrap();
    fs::write(a.at("d/sub/g"), "g").unwrap();
    std::thread::sleep(OLD);
    assert_eq!(names(&b.path), ["d", "f"]);
    assert_eq!(fs::read(b.at("f")).unwrap(), b"x");
    assert_eq!(names(b.at("d/sub")), ["g"]);
    fs::rename(a.at("f"), a.at("renamed")).unwrap();
    fs::rename(a.at("d"), a.at("e")).unwrap();
    std::thread::sleep(OLD);
    assert_eq!(names(&b.path), ["e", "renamed"]);
    fails(fs::metadata(b.at("f")), libc::ENOENT);
    fails(fs::metadata(b.at("d/sub/g")), libc::ENOENT);
    assert_eq!(fs::read(b.at("e/sub/g")).unwrap(), b"g");
    fs::remove_dir_all(a.at("e")).unwrap();
    fs::remove_file(a.at("renamed")).unwrap();
    std::thread::sleep(OLD);
    assert_eq!(names(&b.path), Vec::<String>::new());
    fails(fs::metadata(b.at("e/sub")), libc::ENOENT);
    // A file becomes a directory, and the other way round.
    fs::write(a.at("f"), "").unwrap();
    std::thread::sleep(OLD);
    assert!(fs::metadata(b.at("f")).unwrap().is_file());
    fs::remove_file(a.at("f")).unwrap();
    fs::create_dir(a.at("f")).unwrap();
    std::thread::sleep(OLD);
    assert!(fs::metadata(b.at("f")).unwrap().is_dir());
    fs::write(b.at("f/below"), "b").unwrap();
    std::thread::sleep(OLD);
    assert_eq!(fs::read(a.at("f/below")).unwrap(), b"b");
}

/// > A change of mode, owner or time is seen on every node when what it knew is old enough; it is no conflict with a
/// > write on another node, and not lost with it.
fn attributes_are_seen_elsewhere(tree: &Tree) {
    let (a, b) = (node(tree, "a"), node(tree, "b"));
    fs::write(a.at("f"), "x").unwrap();
    std::thread::sleep(OLD);
    let mode = |mount: &Mount| fs::metadata(mount.at("f")).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&b), 0o644);
    for change in [0o600, 0o755, 0o640] {
        fs::set_permissions(a.at("f"), fs::Permissions::from_mode(change)).unwrap();
        std::thread::sleep(OLD);
        assert_eq!(mode(&b), change);
        fs::write(b.at("f"), "y").unwrap();
        assert_eq!(fs::read(a.at("f")).unwrap(), b"y");
        std::thread::sleep(OLD);
        assert_eq!(mode(&a), change);
        // While it is open for writing there.
        let mut open = OpenOptions::new().append(true).open(b.at("f")).unwrap();
        open.write_all(b"z").unwrap();
        std::thread::sleep(OLD);
        fs::set_permissions(a.at("f"), fs::Permissions::from_mode(change | 0o111)).unwrap();
        drop(open);
        assert_eq!(fs::read(a.at("f")).unwrap(), b"yz");
        std::thread::sleep(OLD);
        assert_eq!([mode(&a), mode(&b)], [change | 0o111; 2]);
    }
}

/// > Nodes that take turns at appending to a file lose nothing.
fn nodes_take_turns_at_appending(tree: &Tree) {
    let nodes = [node(tree, "a"), node(tree, "b")];
    let mut wanted = String::new();
    for turn in 0..20 {
        let line = format!("turn {turn}\n");
        let path = nodes[turn % 2].at("log");
        // Names that were not there a moment ago may be thought not to be there.
        if turn == 1 {
            std::thread::sleep(OLD);
        }
        let mut file = OpenOptions::new().append(true).create(turn == 0).open(path).unwrap();
        file.write_all(line.as_bytes()).unwrap();
        // An error of close would not be seen.
        file.sync_all().unwrap();
        wanted.push_str(&line);
    }
    for node in &nodes {
        assert_eq!(fs::read_to_string(node.at("log")).unwrap(), wanted);
    }
}

/// > A directory is removed only if the bucket has nothing in it, whatever the node knew.
fn a_file_that_appears_elsewhere_is_not_removed_with_its_directory(tree: &Tree) {
    let (a, b) = (node(tree, "a"), node(tree, "b"));
    fs::create_dir(a.at("d")).unwrap();
    std::thread::sleep(OLD);
    assert_eq!(names(a.at("d")), Vec::<String>::new());
    assert_eq!(names(b.at("d")), Vec::<String>::new());
    fs::write(b.at("d/f"), "precious").unwrap();
    fails(fs::remove_dir(a.at("d")), libc::ENOTEMPTY);
    fs::create_dir(a.at("empty")).unwrap();
    fails(fs::rename(a.at("empty"), a.at("d")), libc::ENOTEMPTY);
    for node in [&a, &b] {
        std::thread::sleep(OLD);
        assert_eq!(fs::read(node.at("d/f")).unwrap(), b"precious");
    }
}

/// What was written here is in a file on the node, at its place, and the log names that file. Of the version that it was
/// written over there is as much as the node had.
#[track_caller]
fn assert_kept(node: &Mount, at: usize, bytes: &[u8]) {
    let log = node.log();
    let words = log.split(['=', ' ', '\n', '"']).filter(|word| word.contains("/conflicts/"));
    let kept: Vec<_> = words.map(PathBuf::from).collect();
    let holds = |path: &PathBuf| fs::read(path).is_ok_and(|found| found.get(at..at + bytes.len()) == Some(bytes));
    assert!(kept.iter().any(holds), "none of {kept:?} holds it:\n{log}");
}

/// > A change that would overwrite another node's is refused: fsync and close answer ESTALE, the bucket keeps the other's,
/// > and what was written is kept on the node, in a file that the log names.
fn a_conflicting_change_is_refused_and_kept(tree: &Tree) {
    let (a, b) = (node(tree, "a"), node(tree, "b"));
    for (name, size) in [("small", 1000), ("large", 9 << 20)] {
        fs::write(a.at(name), noise(1, size)).unwrap();
        // The writer is a process of its own: a child of this one, started by another test, would have a copy of the
        // descriptor for a moment, and closing that is a close, too.
        for (call, at, mine) in [("fsync", 100, "mine"), ("close", 0, "MINE")] {
            let script = format!(
                "
import os, errno
f = os.open('{name}', os.O_WRONLY)
os.pwrite(f, b'{mine}', {at})
open('../turn', 'w')
while not os.path.exists('../go'): pass
try:
    os.{call}(f)
    print('worked')
except OSError as error:
    print(errno.errorcode[error.errno])"
            );
            let turn = a.path.parent().unwrap().join("turn");
            let go = a.path.parent().unwrap().join("go");
            let _ = (fs::remove_file(&turn), fs::remove_file(&go));
            let mut python = std::process::Command::new("python3");
            python.args(["-c", &script]).current_dir(&a.path).stdout(std::process::Stdio::piped());
            let python = python.spawn().unwrap();
            while !turn.exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
            let theirs = noise(at as u64 + 2, size + 1);
            fs::write(b.at(name), &theirs).unwrap();
            fs::write(&go, "").unwrap();
            let told = python.wait_with_output().unwrap().stdout;
            assert_eq!(String::from_utf8_lossy(&told).trim(), "ESTALE", "{call}");
            same(&tree.raw().get(&tree.key(name)).unwrap(), &theirs);
            assert_kept(&a, at, mine.as_bytes());
            same(&fs::read(a.at(name)).unwrap(), &theirs);
        }
        // And work goes on.
        fs::write(a.at(name), "resolved").unwrap();
        assert_eq!(fs::read(b.at(name)).unwrap(), b"resolved");
    }
}

/// > Two nodes that make a file of one name at once are a conflict: the first to close has it.
fn files_made_on_two_nodes_at_once_are_a_conflict(tree: &Tree) {
    let (a, b) = (node(tree, "a"), node(tree, "b"));
    names(&a.path);
    names(&b.path);
    let (one, two) = (File::create(a.at("f")).unwrap(), File::create(b.at("f")).unwrap());
    one.write_all_at(b"from a", 0).unwrap();
    two.write_all_at(b"from b, longer", 0).unwrap();
    two.sync_all().unwrap();
    fails(one.sync_all(), libc::ESTALE);
    assert_eq!(tree.raw().get(&tree.key("f")).unwrap(), b"from b, longer");
    assert_kept(&a, 0, b"from a");
    drop((one, two));
    assert_eq!(fs::read(a.at("f")).unwrap(), b"from b, longer");
    // Removed elsewhere while it was being changed: that is not undone either.
    let changed = OpenOptions::new().write(true).open(a.at("f")).unwrap();
    changed.write_all_at(b"FROM", 0).unwrap();
    fs::remove_file(b.at("f")).unwrap();
    fails(changed.sync_all(), libc::ESTALE);
    assert_eq!(tree.raw().get(&tree.key("f")), None);
    assert_kept(&a, 0, b"FROM");
}

/// > A file that is open while it is replaced elsewhere is read as one version or not at all (ESTALE), never as a mixture.
fn a_file_replaced_elsewhere_is_never_read_as_a_mixture(tree: &Tree) {
    let (a, b) = (node(tree, "a"), node(tree, "b"));
    let (old, new) = (noise(1, 40 << 20), noise(2, 40 << 20));
    fs::write(a.at("f"), &old).unwrap();
    std::thread::sleep(OLD);
    let open = File::open(b.at("f")).unwrap();
    let mut chunk = vec![0; 100_000];
    open.read_exact_at(&mut chunk, 0).unwrap();
    same(&chunk, &old[..100_000]);
    fs::write(a.at("f"), &new).unwrap();
    std::thread::sleep(OLD);
    for at in [0, 100_000, 5 << 20, 39 << 20, 17 << 20] {
        match open.read_exact_at(&mut chunk, at as u64) {
            Ok(()) => same(&chunk, &old[at..at + 100_000]),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESTALE), "{error}"),
        }
    }
    drop(open);
    same(&fs::read(b.at("f")).unwrap(), &new);
}

/// > The same holds for a change by any other tool.
fn a_change_by_another_tool_is_a_conflict_too(tree: &Tree) {
    let a = node(tree, "a");
    fs::write(a.at("f"), "first").unwrap();
    let open = OpenOptions::new().append(true).open(a.at("f")).unwrap();
    (&open).write_all(b" and mine").unwrap();
    tree.raw().put(&tree.key("f"), b"another tool's", &[]);
    fails(open.sync_all(), libc::ESTALE);
    drop(open);
    assert_eq!(tree.raw().get(&tree.key("f")).unwrap(), b"another tool's");
    assert_eq!(fs::read(a.at("f")).unwrap(), b"another tool's");
    assert_kept(&a, 5, b" and mine");
    tree.raw().put(&tree.key("f"), b"once more", &[]);
    assert_eq!(fs::read(a.at("f")).unwrap(), b"once more");
    tree.raw().delete(&tree.key("f"));
    fails(File::open(a.at("f")), libc::ENOENT);
}

/// > O_EXCL is exclusive across nodes where the service has conditional writes: of all who create a name, one does.
fn one_node_alone_creates_exclusively(tree: &Tree) {
    if tree.service == Service::Rgw {
        println!("SKIPPED {}: Ceph 16.2 has no conditional writes", module_path!());
        return;
    }
    let nodes = [node(tree, "a"), node(tree, "b")];
    const NAMES: usize = 15;
    let barrier = Barrier::new(4);
    let won: Vec<usize> = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..4)
            .map(|racer| {
                let (node, barrier) = (&nodes[racer % 2], &barrier);
                scope.spawn(move || {
                    (0..NAMES)
                        .filter(|number| {
                            barrier.wait();
                            let path = node.at(format!("lock-{number}"));
                            match OpenOptions::new().write(true).create_new(true).open(path) {
                                Ok(mut file) => {
                                    write!(file, "{racer}").unwrap();
                                    true
                                }
                                Err(error) => {
                                    assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
                                    false
                                }
                            }
                        })
                        .count()
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    assert_eq!(won.iter().sum::<usize>(), NAMES, "{won:?}");
    for number in 0..NAMES {
        let name = format!("lock-{number}");
        let winner = fs::read_to_string(nodes[0].at(&name)).unwrap();
        assert_eq!(fs::read_to_string(nodes[1].at(&name)).unwrap(), winner);
        assert_eq!(winner.len(), 1);
    }
}

/// > A read-only mount sees what others write.
fn read_only_mounts_see_what_is_written(tree: &Tree) {
    let a = node(tree, "a");
    let b =
        tree.mount_with(&Options { node: "b".to_owned(), read_only: true, max_age: Some(300), ..Options::default() });
    for round in 0..3 {
        fs::write(a.at(format!("f{round}")), format!("{round}")).unwrap();
        fs::write(a.at("same"), format!("{round}")).unwrap();
        std::thread::sleep(OLD);
        assert_eq!(names(&b.path).len(), round + 2);
        assert_eq!(fs::read_to_string(b.at("same")).unwrap(), format!("{round}"));
        fails(fs::write(b.at("same"), ""), libc::EROFS);
    }
}

/// > s3fs and Berth read each other's files, modes, owners, times, links and extended attributes.
#[test]
fn s3fs_reads_and_writes_the_same_tree() {
    let Some(tree) = Tree::new(Service::Minio) else { return };
    let make = "
        mkdir -p $0/sub $0/empty; seq 100 >$0/sub/f; chmod 640 $0/sub/f; chown 1000:100 $0/sub/f; ln -s sub/f $0/link
        setfattr -n user.who -v 'any \"body\"' $0/sub/f; chmod 700 $0/empty; chown 5:6 $0/empty; mkfifo $0/pipe
        head -c 12000000 /dev/zero | tr '\\0' x >$0/large; touch -d @1600000000 $0/sub/f $0/empty $0/large";
    let look = "
        cd $0; cat sub/f | wc -l; readlink link; stat -c '%n %A %u %g' sub sub/f empty link pipe large
        stat -c '%n %Y %s' sub/f large; stat -c %Y empty; getfattr --only-values -n user.who sub/f; tr -d x <large | wc -c; ls";
    let act = |mount: &Mount, script: &str, dir: &str| {
        common::files::succeeded(&common::files::output(&mount.path, &["sh", "-ec", script, dir]))
    };
    let ours = node(&tree, "a");
    act(&ours, make, "from-berth");
    let Some(theirs) = tree.mount_s3fs() else { return };
    let wanted = act(&ours, look, "from-berth");
    assert_eq!(act(&theirs, look, "from-berth"), wanted);
    act(&theirs, make, "from-s3fs");
    std::thread::sleep(OLD);
    assert_eq!(act(&ours, look, "from-s3fs"), wanted);
    // What each changes, the other sees.
    act(&ours, "chmod 600 $0/sub/f; echo more >>$0/sub/f; mv $0/large $0/sub/moved", "from-s3fs");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let changed = "cd $0; stat -c '%a %u %s' sub/f; tail -1 sub/f; ls sub; stat -c %s sub/moved";
    assert_eq!(act(&theirs, changed, "from-s3fs"), "600 1000 297\nmore\nf\nmoved\n12000000\n");
}
