//! The work folder: everything that a quickstart makes lies in it, but for the paths where its volumes are mounted.
//!
//! ```text
//! pool/           where the volumes are carved from
//! staging/        where they are staged
//! run/csi.sock    the driver's socket
//! berth.yaml      its configuration
//! berth.log       what it says
//! state.json      what the clean-up has to know
//! objects/        what object storage needs: keys, the embedded server's buckets, the mounter and its files
//! data/           where the volume is mounted, unless the user names a path
//! ```

use std::ffi::OsString;
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::objects::Service;
use crate::cli::kubelet::absolute;
use crate::host::{files, mounts};
use crate::objectfs::settings::Credentials;
use crate::volume::format_bytes;

/// Socket paths have at most 107 bytes (unix(7)), and workers' are the longest here.
const SOCKET_LIMIT: usize = 107 - "objects/run/workers/0123456789abcdef.sock".len() + "run/csi.sock".len();

/// The work folder.
#[derive(Clone, Debug)]
pub(super) struct Work(PathBuf);

/// What the clean-up has to know, kept in the work folder.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// The program that was started as the driver.
    pub(super) program: PathBuf,
    /// Its process, once started.
    pub(super) pid: Option<i32>,
    /// Where the volume is mounted.
    pub(super) path: PathBuf,
    /// Where object storage is, if it is shown.
    pub(super) service: Option<Service>,
    /// Empty directories that volumes are mounted on and that were there before: unmounting removes them.
    pub(super) existed: Vec<Existed>,
    /// Parents that had to be made, the uppermost first.
    pub(super) made: Vec<PathBuf>,
}

/// A directory as it was.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Existed {
    path: PathBuf,
    mode: u32,
    user: u32,
    group: u32,
}

/// A path beside the volume's, for another volume.
pub(super) fn beside(path: &Path, what: &str) -> PathBuf {
    let mut name = path.file_name().map(OsString::from).unwrap_or_default();
    name.push(format!("-{what}"));
    path.with_file_name(name)
}

impl State {
    /// Looks at what will be needed, and makes nothing. With the work folder to be made.
    ///
    /// # Errors
    /// When a path is taken, or there is too little room. `size` is the volume's, before it is doubled.
    pub(super) fn plan(program: PathBuf, path: Option<&Path>, pool: Option<&Path>, size: u64) -> Result<(Self, Work)> {
        let parent = match pool {
            Some(pool) => absolute(pool)?,
            None => absolute(
                &std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map_or("/var/tmp".into(), PathBuf::from),
            )?,
        };
        let unique = std::hash::RandomState::new().build_hasher().finish() as u32;
        let work = Work(parent.join(format!("berth-quickstart-{unique:08x}")));
        if work.socket().as_os_str().len() > SOCKET_LIMIT {
            bail!("cannot work in {}: the path is too long for a socket; name a shorter --pool", parent.display());
        }
        let path = path.map_or_else(|| Ok(work.0.join("data")), absolute)?;
        let mut state =
            Self { program, pid: None, path: path.clone(), service: None, existed: Vec::new(), made: Vec::new() };
        for target in [path.clone(), beside(&path, "restored"), beside(&path, "objects")] {
            state.existed.extend(Existed::look(&target)?);
        }
        let missing = |path: &Path| -> Vec<PathBuf> {
            path.ancestors()
                .take_while(|path| !path.exists() && !path.starts_with(&work.0))
                .map(Path::to_owned)
                .collect()
        };
        state.made = path.parent().map(missing).unwrap_or_default();
        state.made.extend(missing(&parent));
        state.made.sort();
        state.made.dedup();
        check_room(&parent, size)?;
        Ok((state, work))
    }
}

/// The volume grows to twice its size, and where there are snapshots, one of them and one volume from it are as big.
pub(super) fn promised(size: u64) -> u64 {
    size.saturating_mul(6)
}

fn check_room(parent: &Path, size: u64) -> Result<()> {
    let Some(folder) = parent.ancestors().find(|folder| folder.exists()) else { return Ok(()) };
    // Of object storage: what is staged, what the server has, and the cache.
    let objects = 4 * super::data::SIZE;
    let needed = if files::has_reflink(folder)? { promised(size) } else { size.saturating_mul(3) } + objects;
    let free = files::space(folder)?.free;
    if free < needed {
        let (free, needed) = (format_bytes(free), format_bytes(needed));
        bail!(
            "cannot work in {}: {free} are free there, and {needed} are needed; name another --pool",
            parent.display()
        );
    }
    Ok(())
}

impl Existed {
    fn look(path: &Path) -> Result<Option<Self>> {
        let Ok(stat) = path.symlink_metadata() else { return Ok(None) };
        let empty = stat.is_dir() && std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        if !empty || mounts::is_mount(path)? {
            bail!("cannot mount at {}: it is not an empty directory; name another --path", path.display());
        }
        Ok(Some(Self { path: path.to_owned(), mode: stat.mode() & 0o7777, user: stat.uid(), group: stat.gid() }))
    }

    fn restore(&self) -> std::io::Result<()> {
        if self.path.exists() {
            return Ok(());
        }
        std::fs::create_dir(&self.path)?;
        std::os::unix::fs::chown(&self.path, Some(self.user), Some(self.group))?;
        std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(self.mode))
    }
}

impl Work {
    /// The work folder of an earlier quickstart.
    ///
    /// # Errors
    /// When it is not one, or others may have written to it: what it says is believed.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let work = Self(folder.canonicalize().with_context(|| format!("cannot find {}", folder.display()))?);
        let stat = work.0.symlink_metadata().with_context(|| format!("cannot look at {}", work.0.display()))?;
        if !work.state_file().is_file() {
            bail!("{} is not a quickstart's folder: name the one that `--keep` printed", work.0.display());
        }
        if stat.uid() != rustix::process::geteuid().as_raw() || stat.mode() & 0o066 != 0 {
            bail!("{} is open to other users: not trusting what it says", work.0.display());
        }
        Ok(work)
    }

    /// Makes the folder with the pool and the configuration. Others may only pass through: workers are other users.
    pub(super) fn make(&self, state: &State, size: u64) -> Result<()> {
        let what = || format!("cannot make {}", self.0.display());
        if let Some(parent) = self.0.parent() {
            std::fs::create_dir_all(parent).with_context(what)?;
        }
        make_passage(&self.0).with_context(what)?;
        self.write_state(state)?;
        std::fs::create_dir(self.pool()).with_context(what)?;
        std::fs::write(self.config(), self.configuration(size)?).with_context(what)
    }

    /// Makes the folder of object storage, with the keys.
    pub(super) fn make_objects(&self, credentials: &Credentials) -> Result<()> {
        let what = || format!("cannot make {}", self.objects().display());
        make_passage(&self.objects()).with_context(what)?;
        std::fs::DirBuilder::new().mode(0o700).create(self.bucket_store()).with_context(what)?;
        // The process' umask keeps them from others.
        std::fs::write(self.access_key(), &credentials.access_key).with_context(what)?;
        std::fs::write(self.secret_key(), &credentials.secret_key).with_context(what)
    }

    pub(super) fn credentials(&self) -> Result<Credentials> {
        let read =
            |path: PathBuf| std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()));
        Ok(Credentials {
            access_key: read(self.access_key())?,
            secret_key: read(self.secret_key())?,
            session_token: None,
        })
    }

    pub(super) fn add_to_configuration(&self, text: &str) -> Result<()> {
        let what = || format!("cannot write {}", self.config().display());
        let there = std::fs::read_to_string(self.config()).with_context(what)?;
        std::fs::write(self.config(), there + text).with_context(what)
    }

    fn configuration(&self, size: u64) -> Result<String> {
        // A JSON string is one of YAML's.
        let (pool, socket) = (serde_json::to_string(&self.pool())?, serde_json::to_string(&self.socket())?);
        Ok(format!(
            "# Written by `berth quickstart`.\n\
             node:\n  name: quickstart\n\
             pools:\n  - name: quickstart\n    path: {pool}\n    fallback: root\n    cap: {}\n\
             drivers:\n  - backend: nvme\n    socket: {socket}\n",
            promised(size)
        ))
    }

    pub(super) fn state(&self) -> Result<State> {
        let what = || format!("cannot read {}", self.state_file().display());
        let text = std::fs::read(self.state_file()).with_context(what)?;
        serde_json::from_slice(&text).with_context(what)
    }

    pub(super) fn write_state(&self, state: &State) -> Result<()> {
        Ok(files::write_durably(&self.state_file(), &serde_json::to_vec_pretty(state)?)?)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.0
    }
    pub(super) fn pool(&self) -> PathBuf {
        self.0.join("pool")
    }
    pub(super) fn staging(&self) -> PathBuf {
        self.0.join("staging")
    }
    pub(super) fn socket(&self) -> PathBuf {
        self.0.join("run/csi.sock")
    }
    pub(super) fn object_socket(&self) -> PathBuf {
        self.0.join("run/s3.sock")
    }
    pub(super) fn objects(&self) -> PathBuf {
        self.0.join("objects")
    }
    pub(super) fn bucket_store(&self) -> PathBuf {
        self.objects().join("buckets")
    }
    pub(super) fn access_key(&self) -> PathBuf {
        self.objects().join("access-key")
    }
    pub(super) fn secret_key(&self) -> PathBuf {
        self.objects().join("secret-key")
    }
    pub(super) fn mounter_socket(&self) -> PathBuf {
        self.objects().join("run/mounter.sock")
    }
    pub(super) fn config(&self) -> PathBuf {
        self.0.join("berth.yaml")
    }
    pub(super) fn log(&self) -> PathBuf {
        self.0.join("berth.log")
    }
    fn state_file(&self) -> PathBuf {
        self.0.join("state.json")
    }

    /// The end of what the driver said.
    pub(super) fn last_words(&self, lines: usize) -> String {
        let log = std::fs::read(self.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let all: Vec<_> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].iter().map(|line| format!("  {line}\n")).collect()
    }

    /// Removes the folder and puts the rest as it was. Call it when the driver has no volume left and has ended.
    ///
    /// # Errors
    /// When something is still mounted below it: that is not touched.
    pub(super) fn remove(&self, state: &State) -> Result<()> {
        remove_tree(&self.0)?;
        for folder in state.made.iter().rev() {
            // Only what is empty goes: somebody may have put something there since.
            let _ = std::fs::remove_dir(folder);
        }
        for existed in &state.existed {
            existed.restore().with_context(|| format!("cannot make {} again", existed.path.display()))?;
        }
        Ok(())
    }
}

fn make_passage(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711))
}

/// Removes a tree of ours, never across a mount. Nothing goes before all of it has been looked at.
fn remove_tree(folder: &Path) -> Result<()> {
    check_unmounted(folder)?;
    remove_contents(folder).with_context(|| format!("cannot remove {}", folder.display()))
}

fn check_unmounted(path: &Path) -> Result<()> {
    if mounts::is_mount(path)? {
        bail!("{} is still mounted: unmount it first", path.display());
    }
    for entry in std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            check_unmounted(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_contents(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { remove_contents(&entry.path())? } else { std::fs::remove_file(entry.path())? }
    }
    std::fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn planning_makes_nothing_and_refuses_a_path_that_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let plan =
            |path: &str| State::plan("berth".into(), Some(&dir.path().join(path)), Some(&dir.path().join("p/q")), 1);
        let (state, work) = plan("a/b").unwrap();
        let names = |paths: &[PathBuf]| -> Vec<_> {
            paths.iter().map(|path| path.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(&state.made), ["a", "p", "p/q"]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        work.make(&state, 1 << 30).unwrap();
        assert_eq!(work.folder().metadata().unwrap().mode() & 0o777, 0o711);
        assert_eq!(work.state().unwrap().path, dir.path().join("a/b"));
        Config::load(&work.config()).unwrap();
        work.remove(&state).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        std::fs::create_dir_all(dir.path().join("full/of")).unwrap();
        assert!(plan("full").unwrap_err().to_string().contains("not an empty directory"));
        assert_eq!(plan("full/of").unwrap().0.existed.len(), 1);
    }

    #[test]
    fn too_little_room_and_too_long_a_path_are_told_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let plan = |pool: &Path, size| State::plan("berth".into(), None, Some(pool), size).unwrap_err().to_string();
        assert!(plan(dir.path(), 1 << 50).contains("are needed"));
        assert!(plan(&dir.path().join("x".repeat(100)), 1).contains("too long"));
    }
}
