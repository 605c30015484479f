//! Names: renaming, links, limits.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::common::files::{fails, names, noise, same};
use crate::common::mount::{Service, Tree};

crate::on_services!(
    and_plain: [
        a_renamed_file_replaces_another,
        a_renamed_directory_takes_all_along,
        impossible_renames_are_refused,
        a_rename_may_insist_on_a_free_name,
        open_files_follow_their_rename,
        symbolic_links_are_kept,
        names_may_hold_anything,
        names_have_a_limit,
        names_that_are_not_there_are_refused_as_such,
        inode_numbers_are_stable,
    ],
    only: [
        hard_links_are_refused,
        names_that_are_not_utf8_and_long_paths_are_refused,
        keys_that_cannot_be_paths_are_not_shown,
        the_drivers_own_objects_are_hidden,
    ]
);

/// > A renamed file is the same file under its new name; a file that had the name is replaced.
fn a_renamed_file_replaces_another(tree: &Tree) {
    let mount = tree.mount();
    let bytes = noise(1, 9 << 20);
    fs::write(mount.at("a"), &bytes).unwrap();
    fs::write(mount.at("b"), "replaced").unwrap();
    fs::create_dir(mount.at("d")).unwrap();
    let ino = fs::metadata(mount.at("a")).unwrap().ino();
    fs::rename(mount.at("a"), mount.at("b")).unwrap();
    assert_eq!(names(&mount.path), ["b", "d"]);
    fails(File::open(mount.at("a")), libc::ENOENT);
    same(&fs::read(mount.at("b")).unwrap(), &bytes);
    assert_eq!(fs::metadata(mount.at("b")).unwrap().ino(), ino);
    fs::rename(mount.at("b"), mount.at("d/c")).unwrap();
    fs::rename(mount.at("d/c"), mount.at("d/c")).unwrap();
    let other = tree.elsewhere();
    assert_eq!((names(&other.path), names(other.at("d"))), (vec!["d".to_owned()], vec!["c".to_owned()]));
    same(&fs::read(other.at("d/c")).unwrap(), &bytes);
    // The name is free again, at once.
    fs::write(mount.at("a"), "anew").unwrap();
    assert_eq!(fs::read(mount.at("a")).unwrap(), b"anew");
}

/// > A renamed directory takes all along that is below it, also what is open, and replaces an empty one.
fn a_renamed_directory_takes_all_along(tree: &Tree) {
    let mount = tree.mount();
    fs::create_dir_all(mount.at("old/deep/deeper")).unwrap();
    fs::create_dir_all(mount.at("old/empty")).unwrap();
    for number in 0..30 {
        fs::write(mount.at(format!("old/f{number}")), format!("{number}")).unwrap();
        fs::write(mount.at(format!("old/deep/deeper/f{number}")), format!("deep {number}")).unwrap();
    }
    symlink("f1", mount.at("old/link")).unwrap();
    fs::create_dir(mount.at("old-er")).unwrap();
    fs::write(mount.at("old-er/f"), "another's").unwrap();
    let mut open = OpenOptions::new().append(true).open(mount.at("old/deep/deeper/f7")).unwrap();
    open.write_all(b" open").unwrap();
    fs::create_dir(mount.at("new")).unwrap();
    fs::rename(mount.at("old"), mount.at("new")).unwrap();
    open.write_all(b" twice").unwrap();
    drop(open);
    fails(fs::metadata(mount.at("old")), libc::ENOENT);
    for place in [&mount, &tree.elsewhere()] {
        assert_eq!(names(&place.path), ["new", "old-er"]);
        assert_eq!(names(place.at("new")).len(), 33);
        assert_eq!(names(place.at("new/empty")), Vec::<String>::new());
        assert_eq!(fs::read_to_string(place.at("new/link")).unwrap(), "1");
        assert_eq!(fs::read_to_string(place.at("new/deep/deeper/f7")).unwrap(), "deep 7 open twice");
        assert_eq!(fs::read_to_string(place.at("new/deep/deeper/f29")).unwrap(), "deep 29");
        assert_eq!(fs::read_to_string(place.at("old-er/f")).unwrap(), "another's");
    }
    fs::rename(mount.at("new/deep"), mount.at("top")).unwrap();
    fs::create_dir(mount.at("old")).unwrap();
    assert_eq!(names(mount.at("old")), Vec::<String>::new());
    assert_eq!(names(mount.at("top/deeper")).len(), 30);
}

/// > A rename that would lose something, or make no sense, is refused with the errno of a disk.
fn impossible_renames_are_refused(tree: &Tree) {
    let mount = tree.mount();
    fs::create_dir_all(mount.at("d/sub")).unwrap();
    fs::create_dir(mount.at("empty")).unwrap();
    fs::write(mount.at("f"), "f").unwrap();
    fs::write(mount.at("full"), "").unwrap();
    fails(fs::rename(mount.at("d"), mount.at("d/sub/in")), libc::EINVAL);
    fails(fs::rename(mount.at("empty"), mount.at("d")), libc::ENOTEMPTY);
    fails(fs::rename(mount.at("f"), mount.at("empty")), libc::EISDIR);
    fails(fs::rename(mount.at("empty"), mount.at("f")), libc::ENOTDIR);
    fails(fs::rename(mount.at("none"), mount.at("x")), libc::ENOENT);
    fails(fs::rename(mount.at("f"), mount.at("none/x")), libc::ENOENT);
    fails(fs::rename(mount.at("f"), mount.at("full/x")), libc::ENOTDIR);
    assert_eq!(fs::read(mount.at("f")).unwrap(), b"f");
    assert_eq!(names(&mount.path), ["d", "empty", "f", "full"]);
}

/// > RENAME_NOREPLACE replaces nothing.
fn a_rename_may_insist_on_a_free_name(tree: &Tree) {
    let mount = tree.mount();
    fs::write(mount.at("a"), "a").unwrap();
    fs::write(mount.at("b"), "b").unwrap();
    fs::create_dir(mount.at("d")).unwrap();
    let rename = |from: &str, to: &str| renameat_with(CWD, mount.at(from), CWD, mount.at(to), RenameFlags::NOREPLACE);
    fails(rename("a", "b"), libc::EEXIST);
    fails(rename("a", "d"), libc::EEXIST);
    fails(rename("d", "a"), libc::EEXIST);
    rename("a", "c").unwrap();
    rename("d", "e").unwrap();
    assert_eq!(names(&mount.path), ["b", "c", "e"]);
    assert_eq!(fs::read(mount.at("b")).unwrap(), b"b");
}

/// > What is written to a file that was renamed while open is found under its new name, and nothing under the old one.
fn open_files_follow_their_rename(tree: &Tree) {
    let mount = tree.mount();
    fs::create_dir(mount.at("d")).unwrap();
    let handle = File::create(mount.at("tmp")).unwrap();
    handle.write_all_at(b"before ", 0).unwrap();
    fs::rename(mount.at("tmp"), mount.at("d/final")).unwrap();
    handle.write_all_at(b"after", 7).unwrap();
    fs::rename(mount.at("d/final"), mount.at("d/really")).unwrap();
    handle.sync_all().unwrap();
    handle.write_all_at(b"!", 12).unwrap();
    drop(handle);
    for place in [&mount, &tree.elsewhere()] {
        assert_eq!(names(&place.path), ["d"]);
        assert_eq!(names(place.at("d")), ["really"]);
        assert_eq!(fs::read_to_string(place.at("d/really")).unwrap(), "before after!");
    }
}

/// > Symbolic links keep their text, of any kind and up to 4,095 bytes, and lead where it says.
fn symbolic_links_are_kept(tree: &Tree) {
    let mount = tree.mount();
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("d/f"), "found").unwrap();
    let long = "x/".repeat(2047);
    let targets = [("to-file", "d/f"), ("to-dir", "d"), ("up", "d/../d/f"), ("dangling", "nowhere"), ("loop", "loop")];
    for (name, target) in targets.into_iter().chain([("long", long.as_str()), ("odd", " ü%2F\n//")]) {
        symlink(target, mount.at(name)).unwrap();
    }
    fails(symlink("x", mount.at("to-file")), libc::EEXIST);
    for place in [&mount, &tree.elsewhere()] {
        for (name, target) in targets.into_iter().chain([("long", long.as_str()), ("odd", " ü%2F\n//")]) {
            assert_eq!(fs::read_link(place.at(name)).unwrap().to_str().unwrap(), target);
            let stat = fs::symlink_metadata(place.at(name)).unwrap();
            assert!(stat.is_symlink() && stat.len() == target.len() as u64, "{name}: {stat:?}");
        }
        assert_eq!(fs::read(place.at("to-file")).unwrap(), b"found");
        assert_eq!(fs::read(place.at("to-dir/f")).unwrap(), b"found");
        assert_eq!(fs::read(place.at("up")).unwrap(), b"found");
        fails(File::open(place.at("dangling")), libc::ENOENT);
        fails(File::open(place.at("loop")), libc::ELOOP);
    }
    let kinds = fs::read_dir(&mount.path).unwrap().map(Result::unwrap);
    assert_eq!(kinds.filter(|entry| entry.file_type().unwrap().is_symlink()).count(), 7);
    fs::rename(mount.at("to-file"), mount.at("moved")).unwrap();
    fs::remove_file(mount.at("moved")).unwrap();
    assert_eq!(fs::read(mount.at("d/f")).unwrap(), b"found");
}

const ODD: [&str; 26] = [
    " ",
    "a b",
    "a+b",
    "100%",
    "%2F",
    "ü",
    "日本語",
    "q?x=1&y=2",
    "#",
    "'\"<>&",
    "-rf",
    "~",
    "*",
    "[x]",
    ".hidden",
    "..two",
    "end.",
    "new\nline",
    "tab\t",
    "a=b;c,d",
    "\u{1F980}",
    "back\\slash",
    "e\u{301}",
    "$HOME",
    // No XML can hold these.
    "\u{1}",
    "\u{fffe}\u{ffff}",
];

/// > A name may hold anything but `/` and NUL; what looks the same and is not (é in its two spellings) stays two names.
fn names_may_hold_anything(tree: &Tree) {
    let mount = tree.mount();
    let mut wanted: Vec<_> = ODD.iter().map(|name| (*name).to_owned()).chain(["é".to_owned()]).collect();
    wanted.sort();
    for name in &wanted {
        fs::write(mount.at(name), name).unwrap();
        fs::create_dir(mount.at(format!("dir {name}"))).unwrap();
        fs::write(mount.at(format!("dir {name}/{name}")), name).unwrap();
    }
    let other = tree.elsewhere();
    for place in [&mount, &other] {
        let found: Vec<_> = names(&place.path).into_iter().filter(|name| !name.starts_with("dir ")).collect();
        assert_eq!(found, wanted);
        for name in &wanted {
            assert_eq!(fs::read_to_string(place.at(name)).unwrap(), *name);
            assert_eq!(names(place.at(format!("dir {name}"))), [name.as_str()]);
        }
    }
    for name in &wanted {
        fs::rename(mount.at(format!("dir {name}")), mount.at(format!("again {name}"))).unwrap();
        fs::rename(mount.at(name), mount.at(format!("again {name}/moved {name}"))).unwrap();
    }
    for name in &wanted {
        assert_eq!(names(mount.at(format!("again {name}"))).len(), 2);
        fs::remove_file(mount.at(format!("again {name}/moved {name}"))).unwrap();
        fs::remove_dir_all(mount.at(format!("again {name}"))).unwrap();
    }
    assert_eq!(names(&mount.path), Vec::<String>::new());
}

/// > A name has up to 255 bytes; a longer one is ENAMETOOLONG.
fn names_have_a_limit(tree: &Tree) {
    let mount = tree.mount();
    let (fits, long) = ("n".repeat(255), "n".repeat(256));
    fs::write(mount.at(&fits), "x").unwrap();
    assert_eq!(names(&mount.path), [fits.as_str()]);
    fails(fs::write(mount.at(&long), "x"), libc::ENAMETOOLONG);
    fails(fs::metadata(mount.at(&long)), libc::ENAMETOOLONG);
    fails(fs::create_dir(mount.at(&long)), libc::ENAMETOOLONG);
    fails(symlink("x", mount.at(&long)), libc::ENAMETOOLONG);
    fails(fs::rename(mount.at(&fits), mount.at(&long)), libc::ENAMETOOLONG);
    // MinIO keeps such a file as a directory's marker: it is refused there, and not lost.
    match fs::write(mount.at("a__XLDIR__"), "kept") {
        Ok(()) => assert_eq!(fs::read(tree.elsewhere().at("a__XLDIR__")).unwrap(), b"kept"),
        refused => fails(refused, libc::EINVAL),
    }
}

/// > What is not there is ENOENT, and what lies below a file ENOTDIR; afterwards nothing is there that was not before.
fn names_that_are_not_there_are_refused_as_such(tree: &Tree) {
    let mount = tree.mount();
    fs::write(mount.at("f"), "").unwrap();
    for name in ["none", "none/below", "./none"] {
        fails(fs::metadata(mount.at(name)), libc::ENOENT);
        fails(fs::remove_file(mount.at(name)), libc::ENOENT);
        fails(fs::remove_dir(mount.at(name)), libc::ENOENT);
    }
    fails(fs::write(mount.at("none/below"), ""), libc::ENOENT);
    fails(fs::create_dir(mount.at("none/below")), libc::ENOENT);
    fails(symlink("x", mount.at("none/below")), libc::ENOENT);
    for name in ["f/x", "f/"] {
        fails(fs::metadata(mount.at(name)), libc::ENOTDIR);
    }
    fails(fs::create_dir(mount.at("f/x")), libc::ENOTDIR);
    fails(fs::remove_dir(mount.at("f")), libc::ENOTDIR);
    fails(fs::read_dir(mount.at("f")), libc::ENOTDIR);
    fails(fs::create_dir(mount.at("f")), libc::EEXIST);
    assert_eq!(names(&mount.path), ["f"]);
}

/// > A file keeps its inode number while it is known to the mount, whatever it is called; a listing shows the same.
fn inode_numbers_are_stable(tree: &Tree) {
    let mount = tree.mount();
    for name in ["a", "b", "c"] {
        fs::write(mount.at(name), name).unwrap();
    }
    let open = File::open(mount.at("a")).unwrap();
    let before = open.metadata().unwrap().ino();
    fs::create_dir(mount.at("d")).unwrap();
    fs::rename(mount.at("a"), mount.at("d/a")).unwrap();
    fs::write(mount.at("a"), "another").unwrap();
    assert_eq!(open.metadata().unwrap().ino(), before);
    assert_eq!(fs::metadata(mount.at("d/a")).unwrap().ino(), before);
    let mut numbers = vec![before];
    for entry in fs::read_dir(&mount.path).unwrap().map(Result::unwrap) {
        use std::os::unix::fs::DirEntryExt;
        let stat = entry.metadata().unwrap();
        assert_eq!(stat.ino(), entry.ino(), "{entry:?}");
        numbers.push(stat.ino());
    }
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 5, "no two share a number");
}

/// > Hard links are the one thing refused: ENOTSUP.
fn hard_links_are_refused(tree: &Tree) {
    let mount = tree.mount();
    fs::write(mount.at("f"), "x").unwrap();
    fails(fs::hard_link(mount.at("f"), mount.at("g")), libc::ENOTSUP);
    assert_eq!(names(&mount.path), ["f"]);
    assert_eq!(fs::metadata(mount.at("f")).unwrap().nlink(), 1);
}

/// > A name that is not UTF-8 is EILSEQ, and one whose key would pass 1,023 bytes is ENAMETOOLONG.
fn names_that_are_not_utf8_and_long_paths_are_refused(tree: &Tree) {
    let mount = tree.mount();
    let odd = mount.at(OsStr::from_bytes(b"\xffodd"));
    fails(fs::write(&odd, "x"), libc::EILSEQ);
    fails(fs::create_dir(&odd), libc::EILSEQ);
    fails(symlink("x", &odd), libc::EILSEQ);
    let mut path = mount.path.clone();
    let mut key = tree.prefix.len();
    // MinIO has its own limit for names of directories: 246 bytes.
    while key + 241 <= 1023 {
        path.push("p".repeat(240));
        key += 241;
        fs::create_dir(&path).unwrap();
    }
    let fits = 1023 - key;
    if fits > 0 {
        fs::write(path.join("f".repeat(fits)), "fits").unwrap();
        assert_eq!(fs::read(path.join("f".repeat(fits))).unwrap(), b"fits");
    }
    fails(fs::write(path.join("f".repeat(fits + 1)), "x"), libc::ENAMETOOLONG);
    fails(fs::create_dir(path.join("f".repeat(fits + 1))), libc::ENAMETOOLONG);
    // A short name in a directory that would get too long by being renamed.
    fs::create_dir_all(mount.at("short/sub")).unwrap();
    fs::write(mount.at("short/sub").join("n".repeat(200)), "kept").unwrap();
    fails(fs::rename(mount.at("short/sub"), path.join("s")), libc::ENAMETOOLONG);
    assert_eq!(fs::read(mount.at("short/sub").join("n".repeat(200))).unwrap(), b"kept");
    assert!(!names(&path).contains(&"s".to_owned()));
}

/// > Keys that can't be paths are not shown, and do no harm. Where both `a` and `a/…` exist the directory is shown.
fn keys_that_cannot_be_paths_are_not_shown(tree: &Tree) {
    let raw = tree.raw();
    // Some services refuse some of them.
    let odd = ["a//b", "/a", "a/./b", "a/../b", "./x", "../x", "dir//", "//"];
    let put = odd.iter().filter(|key| raw.try_put(&tree.key(key), b"odd", &[]).is_ok()).count();
    raw.put(&tree.key("a/good"), b"good", &[]);
    raw.put(&tree.key("plain"), b"plain", &[]);
    // MinIO lists nothing below a key that is an object.
    let both = tree.service != Service::Minio
        && raw.try_put(&tree.key("both"), b"file", &[]).is_ok()
        && raw.try_put(&tree.key("both/f"), b"f", &[]).is_ok();
    let mount = tree.mount();
    let shown = names(&mount.path);
    assert!(shown.iter().all(|name| ["a", "plain", "both", "dir"].contains(&name.as_str())), "{shown:?} of {put}");
    assert!(shown.contains(&"a".to_owned()) && shown.contains(&"plain".to_owned()), "{shown:?}");
    assert_eq!(names(mount.at("a")), ["good"]);
    assert_eq!(fs::read(mount.at("a/good")).unwrap(), b"good");
    if both {
        assert_eq!(names(mount.at("both")), ["f"]);
        assert!(fs::metadata(mount.at("both")).unwrap().is_dir());
    }
    // Removing what is shown removes nothing else.
    let files = || raw.list(&tree.prefix).keys().filter(|key| !key.ends_with('/')).count();
    let before = files();
    fs::remove_file(mount.at("plain")).unwrap();
    assert_eq!(files() + 1, before);
}

/// > What the driver keeps for itself, below `.berth/` in the bucket, is not seen in a mount of the whole bucket.
fn the_drivers_own_objects_are_hidden(tree: &Tree) {
    let whole = Tree::bucket(tree.service).unwrap();
    whole.raw().put(".berth/volumes/x/mark.json", b"{}", &[]);
    let mount = whole.mount();
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("d/f"), "x").unwrap();
    assert_eq!(names(&mount.path), ["d"]);
    fails(fs::metadata(mount.at(".berth")), libc::ENOENT);
    fails(fs::metadata(mount.at(".berth/volumes")), libc::ENOENT);
    // Nobody can take the name, or what lies below it.
    for refused in [
        fs::create_dir(mount.at(".berth")),
        fs::write(mount.at(".berth"), "x"),
        fs::rename(mount.at("d"), mount.at(".berth")),
    ] {
        let errno = refused.unwrap_err().raw_os_error().unwrap();
        assert!([libc::EPERM, libc::EACCES].contains(&errno), "{errno}");
    }
    fs::write(mount.at("d/.berth"), "anywhere else it is a name like others").unwrap();
    assert_eq!(names(mount.at("d")), [".berth", "f"]);
    drop(mount);
    assert_eq!(whole.raw().get(".berth/volumes/x/mark.json").unwrap(), b"{}");
    whole.raw().remove_bucket();
}
