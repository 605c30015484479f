//! The folders that a worker may use, each with its owner, and which user a worker is.
//!
//! Each volume has a user of its own, so that no worker can read what another one has staged. Who owns a staging folder is
//! that user: nothing else remembers it.

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use crate::error::{Context, Result};
use crate::host::files::FileLock;
use crate::objectfs::settings::Settings;

/// A folder that workers pass through: they may enter, and see nothing.
const PASSAGE: u32 = 0o711;
/// A folder of one worker.
const PRIVATE: u32 = 0o700;
/// The cache, which has the workers' group: each of them may put something there and reads what he knows the name of; none takes
/// away or lists what is another's.
const SHARED: u32 = 0o1730;

/// The users that workers may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Users {
    /// The first one.
    pub first: u32,
    /// The last one.
    pub last: u32,
}

impl Default for Users {
    /// Above what systemd and container runtimes give away (systemd's UIDS-GIDS document), and below 2^31.
    fn default() -> Self {
        Self { first: 1_900_000_000, last: 1_900_065_535 }
    }
}

impl Users {
    /// `FIRST-LAST`.
    ///
    /// # Errors
    /// When it is not that, or holds root.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
        match parsed {
            // -1 is nobody's id: setresuid takes it as "leave it".
            Some((first, last)) if first > 0 && first <= last && last < u32::MAX => Ok(Self { first, last }),
            _ => Err("write FIRST-LAST, such as 1900000000-1900065535".to_owned()),
        }
    }

    fn contains(self, user: u32) -> bool {
        (self.first..=self.last).contains(&user)
    }

    /// This id's user where nobody else has it, else the next that nobody has.
    fn choose(self, id: &str, is_taken: impl Fn(u32) -> bool) -> Option<u32> {
        let count = u64::from(self.last - self.first) + 1;
        let begin = hash(id) % count;
        let nth = |step: u64| self.first + u32::try_from((begin + step) % count).unwrap_or_default();
        (0..count).map(nth).find(|user| !is_taken(*user))
    }
}

fn hash(id: &str) -> u64 {
    let digest = Sha256::digest(id.as_bytes());
    digest.iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}

/// What a worker's socket and control group are called: short, whatever the id.
pub(super) fn short_name(id: &str) -> String {
    format!("{:016x}", hash(id))
}

/// Makes folders for workers.
pub(super) struct Folders {
    /// `None`: this process is not root, and workers are its own user.
    users: Option<Users>,
    /// One after the other: two volumes must not find the same free user.
    choosing: Mutex<()>,
}

impl Folders {
    pub(super) fn new(users: Option<Users>) -> Self {
        Self { users, choosing: Mutex::default() }
    }

    /// Makes what the settings name, if missing, and hands it to the volume's user, who is returned with the group of all workers.
    ///
    /// # Errors
    /// `Invalid` for an id that is no folder's name; `Precondition` when the user could not get there; `Exhausted` when there are
    /// more volumes than users.
    pub(super) fn prepare(&self, settings: &Settings) -> Result<Option<(u32, u32)>> {
        check_id(&settings.id)?;
        let Some(users) = self.users else {
            make(&settings.staging, PRIVATE)?;
            make(&settings.staging.join(&settings.id), PRIVATE)?;
            settings.cache.iter().try_for_each(|cache| make(cache, PRIVATE).map(drop))?;
            return Ok(None);
        };
        make(&settings.staging, PASSAGE)?;
        check_passage(&settings.staging)?;
        if let Some(cache) = &settings.cache {
            make(cache, SHARED)?;
            let what = || format!("cannot hand {} to the group {}", cache.display(), users.first);
            std::os::unix::fs::lchown(cache, None, Some(users.first)).context(what)?;
            check_passage(cache.parent().unwrap_or(cache))?;
        }
        let _one = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = settings.staging.join(&settings.id);
        make(&folder, PRIVATE)?;
        let owner = look(&folder)?.uid();
        if users.contains(owner) {
            return Ok(Some((owner, users.first)));
        }
        let taken = owners(&settings.staging)?;
        let Some(user) = users.choose(&settings.id, |user| taken.contains(&user)) else {
            fail!(Exhausted, "cannot start a worker for {}: each user of {users:?} has a volume", settings.id);
        };
        give(&folder, user)?;
        Ok(Some((user, users.first)))
    }

    /// Takes a volume's staging folder away if nothing is in it any more but the lock of who has used it.
    pub(super) fn tidy(settings: &Settings) {
        let folder = settings.staging.join(&settings.id);
        // A folder for conflicts may be there, and be empty.
        let _ = std::fs::remove_dir(folder.join("conflicts"));
        let is_lock = |entry: &std::fs::DirEntry| entry.file_name() == "lock";
        let empty = std::fs::read_dir(&folder).is_ok_and(|entries| entries.flatten().all(|entry| is_lock(&entry)));
        // Held while it goes, so that nobody who has it begins here.
        let lock = folder.join("lock");
        if empty && (!lock.exists() || FileLock::try_acquire(&lock).is_ok_and(|held| held.is_some())) {
            let _ = std::fs::remove_file(&lock);
            let _ = std::fs::remove_dir(&folder);
        }
    }
}

/// An id names folders: a plain name it has to be.
fn check_id(id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~' | '+' | '=' | '@' | ':');
    if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.chars().all(plain) {
        fail!(Invalid, "{id:?} can't name a mount: it has to be a plain file name of at most 128 bytes");
    }
    Ok(())
}

fn look(path: &Path) -> Result<std::fs::Metadata> {
    path.symlink_metadata().context(|| format!("cannot look at {}", path.display()))
}

/// Makes a folder of ours; parents that are missing are passages.
fn make(folder: &Path, mode: u32) -> Result<()> {
    let what = || format!("cannot make the folder {}", folder.display());
    let missing: Vec<PathBuf> =
        folder.ancestors().skip(1).take_while(|parent| !parent.exists()).map(Path::to_owned).collect();
    for parent in missing.iter().rev() {
        match std::fs::DirBuilder::new().mode(PASSAGE).create(parent) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error).context(what),
            _ => std::fs::set_permissions(parent, Permissions::from_mode(PASSAGE)).context(what)?,
        }
    }
    match std::fs::DirBuilder::new().mode(PRIVATE).create(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error).context(what),
        _ => {}
    }
    let stat = look(folder)?;
    if !stat.is_dir() {
        fail!(Precondition, "{} is not a directory", folder.display());
    }
    if stat.uid() == rustix::process::geteuid().as_raw() && stat.mode() & 0o7777 != mode {
        std::fs::set_permissions(folder, Permissions::from_mode(mode)).context(what)?;
    }
    Ok(())
}

/// May any user get to what lies below?
fn check_passage(folder: &Path) -> Result<()> {
    for part in folder.ancestors().filter(|part| !part.as_os_str().is_empty()) {
        if look(part)?.mode() & 0o001 == 0 {
            fail!(
                Precondition,
                "workers can't get to {}: {} is closed to other users (chmod o+x)",
                folder.display(),
                part.display()
            );
        }
    }
    Ok(())
}

/// Who owns the staging folders that there are.
fn owners(staging: &Path) -> Result<Vec<u32>> {
    let what = || format!("cannot list {}", staging.display());
    let entries = std::fs::read_dir(staging).context(what)?;
    Ok(entries.flatten().filter_map(|entry| Some(entry.metadata().ok()?.uid())).collect())
}

/// Hands a folder and all in it to a user. Not through links: who had it before may have left some.
fn give(path: &Path, user: u32) -> Result<()> {
    let what = || format!("cannot hand {} to user {user}", path.display());
    let stat = look(path)?;
    if stat.is_dir() {
        for entry in std::fs::read_dir(path).context(what)? {
            give(&entry.context(what)?.path(), user)?;
        }
    } else if stat.nlink() > 1 {
        fail!(Precondition, "{}: it has another name elsewhere", what());
    }
    std::os::unix::fs::lchown(path, Some(user), Some(user)).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_volume_has_a_user_of_its_own_even_if_hashes_collide() {
        let users = Users { first: 100, last: 102 };
        let mut taken = Vec::new();
        for id in ["a", "b", "c"] {
            let user = users.choose(id, |user| taken.contains(&user)).unwrap();
            assert!(users.contains(user) && !taken.contains(&user));
            taken.push(user);
        }
        assert_eq!(users.choose("d", |user| taken.contains(&user)), None);
        assert_eq!(users.choose("a", |_| false), Some(taken[0]));
    }

    #[test]
    fn a_range_of_users_holds_neither_root_nor_the_id_that_means_none() {
        assert_eq!(Users::parse("5-7"), Ok(Users { first: 5, last: 7 }));
        for wrong in ["", "5", "0-7", "7-5", "5-4294967295", "a-b", "-5"] {
            assert!(Users::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_id_that_could_leave_its_folder_is_refused() {
        for good in ["s3-0123abcd", "pvc_1.x"] {
            check_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "a b", "é", &"x".repeat(129)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }
}
