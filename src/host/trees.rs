//! Removing whole trees that strangers made: of any depth, with any names, in bounded memory and with few open files.
//!
//! A tree may be deeper than a path is long or than files can be open. So what is deep is first moved up: every directory
//! that is not empty is renamed to a number in one flat directory, and emptied there. No link is followed.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{files, quota};
use crate::error::{Context, Result};

/// So many levels are gone down, each with an open file.
const RELIEF: u32 = 64;
const FLAT: &str = "flat";
const FLAT_NAME: &CStr = c"flat";

/// Removes a directory that we made, and everything in it. Its own entries have names that we gave, none of them `flat`.
/// Gone already is fine, and so is what an interrupted call left.
pub fn remove(path: &Path) -> Result<()> {
    let what = || format!("cannot remove {}", path.display());
    let root = match rustix::fs::open(path, DIRECTORY, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error).context(what),
    };
    let emptied = || {
        let mut heap = Heap { root: &root, flat: None, next: 0 };
        if rustix::fs::accessat(&root, FLAT, rustix::fs::Access::EXISTS, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            heap.flat()?;
        }
        heap.empty(&root, Some(FLAT))?;
        while heap.empty_heaped()? {}
        remove_entry(&root, FLAT_NAME, AtFlags::REMOVEDIR, FileType::Directory)
    };
    emptied().context(what)?;
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context(what),
        _ => files::sync_directory(path.parent().unwrap_or(path)),
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn open(parent: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(parent, name, DIRECTORY, Mode::empty())
}

/// Directories that wait to be emptied, by number.
struct Heap<'a> {
    root: &'a OwnedFd,
    /// Made when it is needed: a full file system has no room for a directory.
    flat: Option<OwnedFd>,
    next: u64,
}

impl Heap<'_> {
    fn flat(&mut self) -> rustix::io::Result<&OwnedFd> {
        if self.flat.is_none() {
            match rustix::fs::mkdirat(self.root, FLAT, Mode::RWXU) {
                Err(error) if error != Errno::EXIST => return Err(error),
                _ => {}
            }
            let flat = open(self.root, FLAT)?;
            // A directory whose project is inherited takes none of another project.
            let _ = quota::let_in_all(&File::from(flat.try_clone().map_err(|_| Errno::MFILE)?));
            self.flat = Some(flat);
        }
        self.flat.as_ref().ok_or(Errno::NOENT)
    }

    /// Empties and removes every directory of the heap, which may put others there. `false`: there was none.
    fn empty_heaped(&mut self) -> rustix::io::Result<bool> {
        let mut found = false;
        let Some(flat) = &self.flat else { return Ok(false) };
        let flat = flat.try_clone().map_err(|_| Errno::MFILE)?;
        for entry in Dir::read_from(&flat)? {
            let entry = entry?;
            let name = entry.file_name();
            if is_dots(name) {
                continue;
            }
            found = true;
            let directory = open(&flat, name)?;
            self.empty(&directory, None)?;
            remove_entry(&flat, name, AtFlags::REMOVEDIR, FileType::Directory)?;
        }
        Ok(found)
    }

    /// Removes all entries of a directory but `keep`; directories that hold something go to the heap.
    fn empty(&mut self, directory: &OwnedFd, keep: Option<&str>) -> rustix::io::Result<()> {
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if is_dots(name) || keep.is_some_and(|keep| name.to_bytes() == keep.as_bytes()) {
                continue;
            }
            let mut kind = entry.file_type();
            if kind == FileType::Unknown {
                let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                kind = FileType::from_raw_mode(stat.st_mode);
            }
            if kind != FileType::Directory {
                remove_entry(directory, name, AtFlags::empty(), kind)?;
                continue;
            }
            match remove_entry(directory, name, AtFlags::REMOVEDIR, kind) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => self.take(directory, name)?,
                other => other?,
            }
        }
        Ok(())
    }

    /// Removes a directory with its files; one that has directories in it goes to the heap.
    fn take(&mut self, parent: &OwnedFd, name: &CStr) -> rustix::io::Result<()> {
        let directory = open(parent, name)?;
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            if !matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
                remove_entry(&directory, entry.file_name(), AtFlags::empty(), entry.file_type())?;
            }
        }
        match remove_entry(parent, name, AtFlags::REMOVEDIR, FileType::Directory) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            other => return other,
        }
        loop {
            let number = self.next.to_string();
            self.next += 1;
            if matches!(self.flat(), Err(Errno::NOSPC)) {
                // No room even for a directory: files go first, as far down as can be.
                relieve(&directory, RELIEF)?;
            }
            let flat = self.flat()?;
            match rustix::fs::renameat(parent, name, flat, number.as_str()) {
                // An interrupted call had put something there.
                Err(Errno::NOTEMPTY | Errno::EXIST) => continue,
                Err(Errno::PERM) => {
                    make_mutable(parent, name, FileType::Directory);
                    return rustix::fs::renameat(parent, name, flat, number.as_str());
                }
                other => return other,
            }
        }
    }
}

/// Removes the files in a directory, and in so many levels below it.
fn relieve(directory: &OwnedFd, levels: u32) -> rustix::io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if is_dots(entry.file_name()) {
            continue;
        }
        if entry.file_type() == FileType::Directory {
            if let Some(below) = levels.checked_sub(1) {
                relieve(&open(directory, entry.file_name())?, below)?;
            }
        } else {
            remove_entry(directory, entry.file_name(), AtFlags::empty(), entry.file_type())?;
        }
    }
    Ok(())
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// Removes an entry, also one that was made immutable or lies in such a directory. Gone already is fine.
fn remove_entry(parent: &OwnedFd, name: &CStr, flags: AtFlags, kind: FileType) -> rustix::io::Result<()> {
    let mut removed = rustix::fs::unlinkat(parent, name, flags);
    if removed == Err(Errno::PERM) {
        make_mutable(parent, name, kind);
        removed = rustix::fs::unlinkat(parent, name, flags);
    }
    match removed {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// Best effort: what comes next says whether it helped.
fn make_mutable(parent: &OwnedFd, name: &CStr, kind: FileType) {
    // Nothing else can be immutable, and opening a device may do something.
    if matches!(kind, FileType::RegularFile | FileType::Directory) {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        if let Ok(entry) = rustix::fs::openat(parent, name, flags, Mode::empty()) {
            let _ = quota::make_mutable(&File::from(entry));
        }
    }
    if let Ok(parent) = parent.try_clone() {
        let _ = quota::make_mutable(&File::from(parent));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_tree_of_any_depth_and_any_names_goes_and_what_it_points_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "x").unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("data/a/b")).unwrap();
        std::fs::write(tree.join("volume.json"), "{}").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("data/link")).unwrap();
        std::os::unix::fs::symlink("loop", tree.join("data/loop")).unwrap();
        std::fs::write(tree.join("data").join(std::ffi::OsStr::from_bytes(b"\xff\n \\")), "x").unwrap();
        std::fs::create_dir_all(tree.join("data/flat/0/0")).unwrap();
        // Deeper than a path can be long, and than files can be open.
        let mut at = open(rustix::fs::CWD, tree.join("data/a/b").as_path()).unwrap();
        for _ in 0..5000 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
            at = open(&at, "deep").unwrap();
        }
        drop(at);
        // As an interrupted call leaves it.
        std::fs::create_dir_all(tree.join("flat/0/x")).unwrap();
        remove(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("kept").exists());
        remove(&tree).unwrap();
    }
}
