//! How mounts of object storage are doing: what is only on this machine yet, and how well the cache does.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::table::{Answer, columns};
use crate::backend::s3::mount_id;
use crate::mounter::client::{Mounter, Status};
use crate::volume::{VolumeId, format_bytes};

const DEADLINE: Duration = Duration::from_secs(10);

/// A volume's mount on this machine. `None`: there is none, or no mounter.
pub(super) async fn of_volume(id: &str, socket: &Path) -> Result<Option<Status>> {
    let mounter = Mounter::new(socket, DEADLINE);
    let ids = [VolumeId::new(id).map_or_else(|_| id.to_owned(), |id| mount_id(&id)), id.to_owned()];
    let find = move || {
        // Volumes other than object storage are shown where there is no mounter, too.
        if !mounter.is_there() {
            return Ok(None);
        }
        for id in ids {
            if let Some(there) = mounter.status(&id)? {
                return Ok(Some(there));
            }
        }
        Ok(None)
    };
    tokio::task::spawn_blocking(find).await?
}

/// The mount at a path of this machine. `None`: there is none, and it need not be a path.
pub(super) async fn of_path(path: &Path, socket: &Path, is_path: bool) -> Result<Option<Answer>> {
    let mounter = Mounter::new(socket, DEADLINE);
    if !is_path && !mounter.is_there() {
        return Ok(None);
    }
    let all = tokio::task::spawn_blocking(move || mounter.list()).await??;
    // By its text: looking at a mount whose worker has died could hang. One that has ended may have been there before.
    let there = all.into_iter().filter(|mount| mount.mountpoint == path);
    let Some(mount) = there.max_by_key(|mount| mount.worker.is_some()) else {
        if !is_path {
            return Ok(None);
        }
        bail!("cannot show {}: no mounter has mounted anything there", path.display());
    };
    let rows = [["mounted at".to_owned(), mount.mountpoint.display().to_string()]];
    let text = columns(["id", &mount.id], rows.into_iter().chain(rows_of(&mount)));
    Ok(Some(Answer { text, json: json(&mount) }))
}

/// Lines for people.
pub(super) fn rows(mount: &Status) -> Vec<[String; 2]> {
    rows_of(mount).into()
}

fn rows_of(mount: &Status) -> [[String; 2]; 5] {
    let progress = &mount.progress;
    let worker =
        mount.worker.map_or("has ended: unmount it and mount it again".to_owned(), |pid| format!("process {pid}"));
    let dirty = match progress.dirty_files {
        0 => "nothing".to_owned(),
        1 => format!("{} in 1 file", format_bytes(progress.dirty_bytes)),
        files => format!("{} in {files} files", format_bytes(progress.dirty_bytes)),
    };
    let used = match mount.limit {
        Some(limit) => format!("{} of {}", format_bytes(mount.used), format_bytes(limit)),
        None => "not counted: there is no limit".to_owned(),
    };
    let cache = hit_rate(mount).map_or("not used yet".to_owned(), |rate| format!("{rate:.0} % hits"));
    [
        ["worker".to_owned(), worker],
        ["not in the bucket yet".to_owned(), dirty],
        ["uploads in flight".to_owned(), progress.uploads.to_string()],
        ["cache".to_owned(), cache],
        ["used".to_owned(), used],
    ]
}

/// Per cent of the bytes asked of the cache that it had.
fn hit_rate(mount: &Status) -> Option<f64> {
    let hits = mount.progress.cache_hit_bytes as f64;
    let all = hits + mount.progress.cache_miss_bytes as f64;
    (all > 0.0).then(|| 100.0 * hits / all)
}

/// For programs. The keys are a promise.
pub(super) fn json(mount: &Status) -> Value {
    let progress = &mount.progress;
    json!({
        "id": mount.id,
        "mountpoint": mount.mountpoint,
        "worker": mount.worker,
        "dirtyBytes": progress.dirty_bytes,
        "dirtyFiles": progress.dirty_files,
        "uploads": progress.uploads,
        "cacheHitBytes": progress.cache_hit_bytes,
        "cacheMissBytes": progress.cache_miss_bytes,
        "usedBytes": mount.used,
        "limitBytes": mount.limit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objectfs::content::Progress;

    #[test]
    fn progress_is_told_in_words_and_in_numbers() {
        let progress =
            Progress { dirty_bytes: 3 << 20, dirty_files: 2, uploads: 1, cache_hit_bytes: 75, cache_miss_bytes: 25 };
        let mut mount = Status {
            id: "one".into(),
            mountpoint: "/mnt".into(),
            worker: Some(7),
            progress,
            used: 1 << 30,
            limit: Some(2 << 30),
        };
        let text = |mount: &Status| rows(mount).into_iter().map(|[_, value]| value).collect::<Vec<_>>();
        assert_eq!(text(&mount), ["process 7", "3Mi in 2 files", "1", "75 % hits", "1Gi of 2Gi"]);
        assert_eq!(json(&mount)["dirtyBytes"], 3 << 20);
        mount = Status { worker: None, progress: Progress::default(), limit: None, ..mount };
        assert!(text(&mount)[0].contains("unmount it") && text(&mount)[3].contains("not used"));
        assert_eq!(json(&mount)["worker"], Value::Null);
    }
}
