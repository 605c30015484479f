//! Buckets as folders: `BUCKET/bodies/NUMBER`, `BUCKET/records/HASH.json`. Knows no HTTP.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// All about an object but its bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) key: String,
    pub(super) size: u64,
    /// Without quotes.
    pub(super) etag: String,
    /// CRC64-NVME in base64, where whoever wrote it gave one.
    pub(super) sum: Option<String>,
    /// Seconds since 1970.
    pub(super) modified: u64,
    pub(super) content_type: Option<String>,
    pub(super) user: BTreeMap<String, String>,
    /// The name of the file that has its bytes.
    pub(super) body: String,
}

/// An upload that was begun.
pub(super) struct Upload {
    pub(super) record: Record,
    pub(super) parts: BTreeMap<i32, Record>,
}

#[derive(Default)]
pub(super) struct Objects {
    pub(super) objects: BTreeMap<String, Record>,
    pub(super) uploads: BTreeMap<String, Upload>,
}

pub(super) struct Bucket {
    folder: PathBuf,
    objects: Mutex<Objects>,
    next: AtomicU64,
}

pub(super) struct Disk {
    folder: PathBuf,
    buckets: Mutex<BTreeMap<String, Arc<Bucket>>>,
}

/// A page of a listing.
#[derive(Default)]
pub(super) struct Page {
    pub(super) objects: Vec<Record>,
    pub(super) prefixes: Vec<String>,
    /// The last entry, if there are more.
    pub(super) token: Option<String>,
}

/// Now, in whole seconds.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut buckets = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.join("records").is_dir()
                && let Some(name) = path.file_name().and_then(|name| name.to_str())
            {
                buckets.insert(name.to_owned(), Arc::new(Bucket::open(&path)?));
            }
        }
        Ok(Self { folder: folder.to_owned(), buckets: Mutex::new(buckets) })
    }

    pub(super) fn bucket(&self, name: &str) -> Option<Arc<Bucket>> {
        locked(&self.buckets).get(name).cloned()
    }

    pub(super) fn names(&self) -> Vec<String> {
        locked(&self.buckets).keys().cloned().collect()
    }

    /// `false`: there is one already.
    pub(super) fn make(&self, name: &str) -> io::Result<bool> {
        let mut buckets = locked(&self.buckets);
        if buckets.contains_key(name) {
            return Ok(false);
        }
        let path = self.folder.join(name);
        std::fs::create_dir_all(path.join("bodies"))?;
        std::fs::create_dir_all(path.join("records"))?;
        buckets.insert(name.to_owned(), Arc::new(Bucket::open(&path)?));
        Ok(true)
    }

    /// `false`: it is not empty.
    pub(super) fn remove(&self, name: &str) -> io::Result<bool> {
        let mut buckets = locked(&self.buckets);
        let Some(bucket) = buckets.get(name) else { return Ok(true) };
        let objects = bucket.objects();
        if !objects.objects.is_empty() || !objects.uploads.is_empty() {
            return Ok(false);
        }
        // Bodies that are being written may be left; their writers find that the bucket is gone.
        for folder in ["records", "bodies"] {
            let path = bucket.folder.join(folder);
            for entry in std::fs::read_dir(&path)? {
                std::fs::remove_file(entry?.path())?;
            }
            std::fs::remove_dir(path)?;
        }
        std::fs::remove_dir(&bucket.folder)?;
        drop(objects);
        buckets.remove(name);
        Ok(true)
    }
}

impl Bucket {
    /// Reads all records, and removes bodies that belong to none.
    fn open(folder: &Path) -> io::Result<Self> {
        let mut objects = BTreeMap::new();
        for entry in std::fs::read_dir(folder.join("records"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending == "json") {
                let record: Record = serde_json::from_slice(&std::fs::read(&path)?)?;
                objects.insert(record.key.clone(), record);
            } else {
                std::fs::remove_file(path)?;
            }
        }
        let used: std::collections::BTreeSet<_> = objects.values().map(|record| record.body.clone()).collect();
        let mut next = 0;
        for entry in std::fs::read_dir(folder.join("bodies"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if used.contains(&name) {
                next = next.max(name.parse().unwrap_or(0));
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        let objects = Mutex::new(Objects { objects, uploads: BTreeMap::new() });
        Ok(Self { folder: folder.to_owned(), objects, next: AtomicU64::new(next + 1) })
    }

    pub(super) fn objects(&self) -> MutexGuard<'_, Objects> {
        locked(&self.objects)
    }

    /// A number that nothing else has.
    pub(super) fn number(&self) -> String {
        self.next.fetch_add(1, Ordering::Relaxed).to_string()
    }

    pub(super) fn body(&self, name: &str) -> PathBuf {
        self.folder.join("bodies").join(name)
    }

    /// A new body, to be written.
    pub(super) fn new_body(&self) -> io::Result<(String, File)> {
        let name = self.number();
        let file = File::create_new(self.body(&name))?;
        Ok((name, file))
    }

    pub(super) fn drop_body(&self, name: &str) {
        let _ = std::fs::remove_file(self.body(name));
    }

    fn record(&self, key: &str) -> PathBuf {
        let hash: String = Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        self.folder.join("records").join(format!("{hash}.json"))
    }

    /// Makes an object of its record, instead of what was there.
    pub(super) fn store(&self, objects: &mut Objects, record: Record) -> io::Result<()> {
        let path = self.record(&record.key);
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        drop(file);
        std::fs::rename(new, path)?;
        if let Some(old) = objects.objects.insert(record.key.clone(), record) {
            self.drop_body(&old.body);
        }
        Ok(())
    }

    /// Removes an object, if it is there.
    pub(super) fn remove(&self, objects: &mut Objects, key: &str) -> io::Result<()> {
        if let Some(old) = objects.objects.get(key) {
            std::fs::remove_file(self.record(key))?;
            self.drop_body(&old.body);
            objects.objects.remove(key);
        }
        Ok(())
    }
}

impl Objects {
    /// Keys with a prefix behind a place, folded at the next `delimiter`.
    pub(super) fn page(&self, prefix: &str, delimiter: Option<&str>, after: Option<&str>, limit: usize) -> Page {
        let mut page = Page::default();
        let mut last = None;
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after.to_owned()),
            _ => Bound::Included(prefix.to_owned()),
        };
        for (key, record) in self.objects.range((start, Bound::Unbounded)) {
            let Some(rest) = key.strip_prefix(prefix) else { break };
            let end = delimiter.and_then(|delimiter| Some(rest.find(delimiter)? + delimiter.len()));
            let folded = end.map(|end| &key[..prefix.len() + end]);
            // Folded by this page, or by the one before.
            if folded.is_some_and(|folded| {
                page.prefixes.last().is_some_and(|last| last == folded) || after.is_some_and(|after| after == folded)
            }) {
                continue;
            }
            if page.objects.len() + page.prefixes.len() == limit {
                page.token = last;
                break;
            }
            match folded {
                Some(folded) => page.prefixes.push(folded.to_owned()),
                None => page.objects.push(record.clone()),
            }
            last = Some(folded.unwrap_or(key).to_owned());
        }
        page
    }
}
