//! Directories and their listings.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::mem::MaybeUninit;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, SeekFrom, seek};

use crate::common::files::{fails, names, sh};
use crate::common::mount::Tree;

crate::on_services!(
    and_plain: [
        directories_are_made_and_removed,
        empty_directories_stay,
        a_listing_is_stable_while_the_directory_changes,
        a_listing_goes_on_where_it_was,
        a_directory_may_have_thousands_of_entries,
        trees_are_walked_and_removed,
    ],
    only: [
        the_last_file_leaves_its_directory,
        directories_need_no_markers,
    ]
);

/// > Directories are made, and removed when they are empty; `.` and `..` lead where they should.
fn directories_are_made_and_removed(tree: &Tree) {
    let mount = tree.mount();
    fs::create_dir(mount.at("d")).unwrap();
    fails(fs::create_dir(mount.at("d")), libc::EEXIST);
    fs::create_dir_all(mount.at("d/e/f")).unwrap();
    fs::write(mount.at("d/e/f/x"), "x").unwrap();
    fails(fs::remove_dir(mount.at("d")), libc::ENOTEMPTY);
    fails(fs::remove_dir(mount.at("d/e/f")), libc::ENOTEMPTY);
    fails(fs::remove_file(mount.at("d")), libc::EISDIR);
    assert_eq!(sh(&mount.at("d/e/f"), "cat ../f/./x; cd ../..; ls"), "xe\n");
    fs::remove_file(mount.at("d/e/f/x")).unwrap();
    fs::remove_dir(mount.at("d/e/f")).unwrap();
    fs::remove_dir(mount.at("d/e")).unwrap();
    fails(fs::metadata(mount.at("d/e")), libc::ENOENT);
    let gone = rustix::fs::open(mount.at("d"), OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap();
    fs::remove_dir(mount.at("d")).unwrap();
    fails(rustix::fs::openat(&gone, "x", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR), libc::ENOENT);
    fails(rustix::fs::statat(&gone, "x", AtFlags::empty()), libc::ENOENT);
    assert_eq!(names(&mount.path), Vec::<String>::new());
    assert_eq!(names(&tree.elsewhere().path), Vec::<String>::new());
}

/// > An empty directory stays, and is a key with a final `/` in the bucket.
fn empty_directories_stay(tree: &Tree) {
    let mount = tree.mount();
    fs::create_dir_all(mount.at("a/b")).unwrap();
    fs::create_dir(mount.at("c")).unwrap();
    fs::write(mount.at("c/f"), "").unwrap();
    fs::remove_file(mount.at("c/f")).unwrap();
    let other = tree.elsewhere();
    assert_eq!(names(&other.path), ["a", "c"]);
    assert_eq!(names(other.at("a")), ["b"]);
    assert_eq!(names(other.at("a/b")), Vec::<String>::new());
    assert_eq!(names(other.at("c")), Vec::<String>::new());
    if !tree.is_plain() {
        for marker in ["a/b/", "c/"] {
            let object = tree.raw().head(&tree.key(marker)).unwrap();
            assert_eq!((object.size, object.content_type.as_deref()), (0, Some("application/x-directory")));
        }
    }
}

/// > A listing shows each entry once that is there all the while, whatever comes and goes meanwhile.
fn a_listing_is_stable_while_the_directory_changes(tree: &Tree) {
    let mount = tree.mount();
    let stable: BTreeSet<_> = (0..300).map(|number| format!("stable-{number}")).collect();
    for (number, name) in stable.iter().enumerate() {
        fs::write(mount.at(name), "").unwrap();
        fs::write(mount.at(format!("goes-{number}")), "").unwrap();
    }
    let mut seen = Vec::new();
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let dir = File::open(&mount.path).unwrap();
    let mut listing = RawDir::new(&dir, &mut buffer);
    let mut count = 0;
    while let Some(entry) = listing.next() {
        let name = entry.unwrap().file_name().to_str().unwrap().to_owned();
        count += 1;
        if count % 3 == 0 && count < 600 {
            let _ = fs::remove_file(mount.at(format!("goes-{}", count / 3)));
            fs::write(mount.at(format!("comes-{count}")), "").unwrap();
        }
        seen.push(name);
    }
    let shown: Vec<_> = seen.iter().filter(|name| name.starts_with("stable-")).collect();
    assert_eq!(shown.len(), 300);
    assert_eq!(shown.into_iter().cloned().collect::<BTreeSet<_>>(), stable);
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), seen.len(), "none is shown twice");
}

/// > A listing can be left and taken up again at any entry, and begun anew.
fn a_listing_goes_on_where_it_was(tree: &Tree) {
    let mount = tree.mount();
    for number in 0..200 {
        fs::write(mount.at(format!("f{number}")), "").unwrap();
    }
    let dir = File::open(&mount.path).unwrap();
    let read = || {
        let mut buffer = [MaybeUninit::uninit(); 2048];
        let mut listing = RawDir::new(&dir, &mut buffer);
        let mut entries = Vec::new();
        while let Some(entry) = listing.next() {
            let entry = entry.unwrap();
            entries.push((entry.file_name().to_str().unwrap().to_owned(), entry.next_entry_cookie()));
        }
        entries
    };
    let all = read();
    assert_eq!(all.len(), 202);
    for at in [0, 1, 77, 150, 200] {
        seek(&dir, SeekFrom::Start(all[at].1)).unwrap();
        assert_eq!(read(), all[at + 1..], "behind entry {at}");
    }
    seek(&dir, SeekFrom::Start(0)).unwrap();
    assert_eq!(read().len(), 202);
    fs::write(mount.at("new"), "").unwrap();
    seek(&dir, SeekFrom::Start(0)).unwrap();
    assert!(read().iter().any(|(name, _)| name == "new"), "rewinddir looks again");
}

/// > A directory may have thousands of entries: all are listed, each once, with their kinds.
fn a_directory_may_have_thousands_of_entries(tree: &Tree) {
    let mount = tree.mount();
    let wanted: Vec<_> = (0..2500).map(|number| format!("f{number:05}")).collect();
    if tree.is_plain() {
        for name in &wanted {
            fs::write(mount.at(format!("../plain/{name}")), "12345").unwrap();
        }
    } else {
        tree.raw().put_many(wanted.iter().map(|name| tree.key(name)), b"12345");
    }
    fs::create_dir(mount.at("sub")).unwrap();
    let found = sh(&mount.path, "ls -l | awk 'NR > 1 {print $1, $5, $9}' | grep -c '^-.* 5 f'; find . -type d | wc -l");
    assert_eq!(found, "2500\n2\n");
    assert_eq!(names(&mount.path)[..2500], wanted);
    assert_eq!(fs::metadata(mount.at("f02499")).unwrap().len(), 5);
    fails(fs::metadata(mount.at("f02500")), libc::ENOENT);
}

/// > Whole trees are found and removed by the usual programs.
fn trees_are_walked_and_removed(tree: &Tree) {
    let mount = tree.mount();
    sh(
        &mount.path,
        "for a in 1 2 3; do for b in 1 2 3 4; do mkdir -p t/$a/$b; for c in 1 2 3; do echo $c >t/$a/$b/$c; done; done; done",
    );
    let count = "find t -type f | wc -l; find t -type d | wc -l; cat t/*/*/3 | sort -u";
    assert_eq!(sh(&mount.path, count), "36\n16\n3\n");
    let other = tree.elsewhere();
    assert_eq!(sh(&other.path, count), "36\n16\n3\n");
    sh(&mount.path, "cp -a t u; diff -r t u; rm -r t; find t 2>/dev/null | wc -l | grep -qx 0; rm -rf u");
    assert_eq!(names(&mount.path), Vec::<String>::new());
    assert_eq!(names(&tree.elsewhere().path), Vec::<String>::new());
}

/// > A directory that only its files made is still there when the last of them is removed or moved away.
fn the_last_file_leaves_its_directory(tree: &Tree) {
    for name in ["removed/f", "moved/f", "deep/er/f"] {
        tree.raw().put(&tree.key(name), b"x", &[]);
    }
    let mount = tree.mount();
    fs::remove_file(mount.at("removed/f")).unwrap();
    fs::rename(mount.at("moved/f"), mount.at("f")).unwrap();
    fs::remove_file(mount.at("deep/er/f")).unwrap();
    fs::remove_dir(mount.at("deep/er")).unwrap();
    for place in [&mount, &tree.elsewhere()] {
        assert_eq!(names(&place.path), ["deep", "f", "moved", "removed"]);
        for dir in ["deep", "moved", "removed"] {
            assert_eq!(names(place.at(dir)), Vec::<String>::new());
        }
    }
}

/// > Objects that any tool put there are a tree; no directory needs a marker.
fn directories_need_no_markers(tree: &Tree) {
    for number in 0..50 {
        tree.raw().put(&tree.key(&format!("a/{}/{number}/f", number % 3)), b"text", &[]);
    }
    tree.raw().put(&tree.key("a-b"), b"sorts before a/", &[]);
    tree.raw().put(&tree.key("a.txt"), b"too", &[]);
    let mount = tree.mount();
    // What has not been listed is found by name.
    assert_eq!(fs::read(mount.at("a/2/47/f")).unwrap(), b"text");
    fails(fs::metadata(mount.at("a/2/48")), libc::ENOENT);
    assert_eq!(names(&mount.path), ["a", "a-b", "a.txt"]);
    assert_eq!(sh(&mount.path, "find a -type f | wc -l; find a -type d | wc -l"), "50\n54\n");
    assert_eq!(sh(&mount.path, "rm -r a; ls"), "a-b\na.txt\n");
    assert_eq!(tree.raw().list(&tree.key("a/")).len(), 0);
}
