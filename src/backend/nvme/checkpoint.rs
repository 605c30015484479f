//! Getting a grown XFS onto its disk.
//!
//! After growing, XFS has the new size in its journal and in memory, but not yet in the superblock on the disk, and no
//! sync writes that one. Whatever reads the disk as it is then (a snapshot, a clone, the same volume after a power cut)
//! can't replay the journal: it speaks of places beyond the end. Freezing writes the superblock, and thawing lets
//! programs go on, a few milliseconds later. Between the two the volume's folder has a mark, so that the successor of a
//! driver that died just then finds what to thaw, and never thaws what somebody else has frozen.

use std::path::Path;
use std::sync::Arc;

use super::device::{Backing, FROZEN};
use super::pool::Pool;
use super::{Located, Nvme, Sort};
use crate::error::{Context, Result};
use crate::host::{filesystem, loops, mounts};

/// Writes all of the file system that is mounted at `path`, superblock and all, to its device.
pub(super) fn write(backing: &mut dyn Backing, path: &Path) -> Result<()> {
    backing.mark_frozen(true)?;
    // The mark stays only if it may still be frozen by us: a freeze that failed may be somebody else's.
    let frozen = filesystem::freeze(path);
    if frozen.is_ok() {
        filesystem::thaw(path)?;
    }
    backing.mark_frozen(false)?;
    frozen
}

impl Nvme {
    /// Thaws what a driver that died has left frozen in this pool. One volume in trouble does not keep others frozen.
    pub(super) fn thaw_leftovers(&self, pool: &Arc<Pool>) {
        let ids = match pool.ask(|books| books.volumes.keys().cloned().collect::<Vec<_>>()) {
            Ok(ids) => ids,
            Err(error) => {
                tracing::error!(pool = pool.name(), %error, "cannot tell whether a volume was left frozen");
                return;
            }
        };
        for id in ids {
            let located = Located { pool, folder: pool.folder(Sort::Volume, &id) };
            if let Err(error) = thaw_leftover(&id, &located) {
                tracing::error!(volume.id = id, %error, "cannot thaw what an interrupted call left frozen");
            }
        }
    }
}

fn thaw_leftover(id: &str, located: &Located<'_>) -> Result<()> {
    let frozen_now = located.pool.freezing.now();
    let mark = located.folder.join(FROZEN);
    if frozen_now.contains(id) || !mark.exists() {
        return Ok(());
    }
    if let Some(device) = loops::find(&located.image())?
        && let Some(place) = mounts::users_of_device(&device.path)?.iter().find(|place| place.is_dir())
    {
        tracing::warn!(volume.id = id, "thawing what an interrupted call left frozen");
        filesystem::thaw(place)?;
    }
    std::fs::remove_file(&mark).context(|| format!("cannot remove {}", mark.display()))
}

#[cfg(test)]
mod tests {
    use super::super::device::Backing;
    use super::*;
    use crate::config::{self, Fallback, Source};

    #[test]
    fn what_this_process_freezes_just_now_is_no_leftover() {
        let dir = tempfile::tempdir().unwrap();
        let config = config::Pool {
            name: "fast".to_owned(),
            source: Source::Folder,
            path: dir.path().to_owned(),
            cap: None,
            thin: false,
            fallback: Fallback::None,
            carves: Vec::new(),
        };
        let pool = Arc::new(Pool::new(config));
        let folder = pool.folder(Sort::Volume, "vol-1");
        std::fs::create_dir_all(&folder).unwrap();
        let located = || Located { pool: &pool, folder: folder.clone() };
        let is_marked = || folder.join(FROZEN).exists();
        located().mark_frozen(true).unwrap();
        thaw_leftover("vol-1", &located()).unwrap();
        assert!(is_marked());
        located().mark_frozen(false).unwrap();
        assert!(!is_marked());
        // As a driver that died has left it.
        std::fs::write(folder.join(FROZEN), "").unwrap();
        thaw_leftover("vol-1", &located()).unwrap();
        assert!(!is_marked());
    }
}
