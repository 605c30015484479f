//! Inodes, names, attributes, listings and how fresh they are; what becomes of them when files are made, committed,
//! renamed and removed. Never reads or writes a file's bytes itself: it says to [`content`](super::content) under which
//! key, with which metadata and on which condition.

mod changes;
mod commit;
pub(crate) mod errors;
mod facts;
mod files;
pub(crate) mod flags;
mod flat;
mod index;
mod listing;
mod look;
mod names;
mod open;
mod places;
mod recovery;
mod rename;
mod tables;
mod tree;
mod trim;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

pub(crate) use listing::Listing;
pub(crate) use open::File;
pub use tables::{HandleRow, InodeRow, Tables};
pub(crate) use tree::ROOT;

use self::places::{Held, Places};
use self::tree::{Node, Tree};
use super::attributes::{Attributes, Defaults, S_IFDIR};
use super::content::Contents;
use super::settings::{Consistency, HIDDEN, Settings};
use super::store::Store;
use super::usage::Usage;
use crate::fuse::filesystem::{Answer, Attr, Entry, Ino, Notify};
use crate::host::Errno;

/// Longest name.
pub(crate) const NAME_MAX: usize = 255;
/// Longest key.
const KEY_MAX: usize = 1024;

/// The names of one mount.
pub(crate) struct Namespace {
    pub(crate) settings: Arc<Settings>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) contents: Arc<Contents>,
    pub(crate) usage: Arc<Usage>,
    defaults: Defaults,
    /// Prefix of this tree's hidden objects.
    hidden: String,
    max_age: Duration,
    tree: Mutex<Tree>,
    places: Places,
    /// Directories that somebody lists for lookups. Apart: who changes a name may have to wait for one.
    lists: Places,
    kernel: Mutex<Option<Arc<dyn Notify>>>,
    /// Commits in the background.
    background: Arc<tokio::sync::Semaphore>,
    /// Tasks in the background that have to end before the mount does.
    tasks: tokio::sync::watch::Sender<usize>,
    /// This mount, among those that ever were.
    identity: String,
    counter: AtomicU64,
    /// The mount is ending: what waits for a quiet moment is done now.
    ending: tokio::sync::watch::Sender<bool>,
    /// Indexes can't be written: not asked again.
    no_index: AtomicBool,
    /// Names learnt since memory was looked after.
    learnt: AtomicUsize,
}

impl Namespace {
    fn new(settings: Arc<Settings>, store: Arc<dyn Store>, contents: Arc<Contents>, usage: Arc<Usage>) -> Self {
        let defaults = Defaults::from(&*settings);
        let tree = Tree::new(&settings.prefix, defaults.directory(SystemTime::now()));
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            defaults,
            hidden: settings.hidden(),
            max_age: Duration::from_millis(settings.max_age),
            tree: Mutex::new(tree),
            places: Places::default(),
            lists: Places::default(),
            kernel: Mutex::default(),
            background: Arc::new(tokio::sync::Semaphore::new(16)),
            tasks: tokio::sync::watch::Sender::new(0),
            identity: format!("{:x}-{:x}", since.as_nanos(), std::process::id()),
            counter: AtomicU64::new(0),
            ending: tokio::sync::watch::Sender::new(false),
            // Listings may say all that an index would.
            no_index: AtomicBool::new(settings.read_only || store.abilities().listed_metadata),
            learnt: AtomicUsize::new(0),
            settings,
            store,
            contents,
            usage,
        }
    }

    pub(crate) fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was right then or later is fresh enough for a call that begins now.
    fn horizon(&self) -> Instant {
        let now = Instant::now();
        now.checked_sub(self.max_age).unwrap_or(now)
    }

    /// A name that no other mount ever uses.
    fn unique(&self) -> String {
        format!("{}-{:x}", self.identity, self.counter.fetch_add(1, Ordering::Relaxed))
    }

    fn writes_back(&self) -> bool {
        self.settings.consistency == Consistency::WriteBack
    }

    pub(crate) fn writable(&self) -> Answer<()> {
        if self.settings.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// Takes names for this task alone.
    async fn take(&self, names: &[(Ino, &str)], moving: Option<Ino>) -> Held<'_> {
        self.places.take(names, moving, |with| with(&self.tree())).await
    }

    /// Is that a name, and may it be seen? The error is that of a name that is to be made.
    fn check_name(&self, parent: Ino, name: &str) -> Answer<()> {
        if name.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(Errno::INVAL);
        }
        if parent == ROOT && self.is_hidden(name) {
            return Err(Errno::PERM);
        }
        // Only MinIO's listings tell metadata, and only MinIO keeps a file of this name as a directory's marker.
        if name.ends_with("__XLDIR__") && self.store.abilities().listed_metadata {
            return Err(Errno::INVAL);
        }
        let key = self.tree().key_of(parent, name).ok_or(Errno::STALE)?;
        // One more for the `/` of a directory.
        if key.len() >= KEY_MAX { Err(Errno::NAMETOOLONG) } else { Ok(()) }
    }

    /// What the driver keeps for itself, in the root of a bucket.
    fn is_hidden(&self, name: &str) -> bool {
        self.settings.prefix.is_empty() && HIDDEN.trim_end_matches('/') == name
    }

    /// Can a key's part be shown as a name?
    fn is_name(&self, parent: Ino, name: &str) -> bool {
        let odd = name.is_empty() || name == "." || name == ".." || name.len() > NAME_MAX || name.contains(['/', '\0']);
        let hidden = parent == ROOT && self.is_hidden(name);
        !odd && !hidden
    }

    /// The key of a directory's marker.
    fn marker_key(&self, ino: Ino) -> Option<String> {
        let key = self.tree().key(ino)?;
        // A bucket has no key for its root.
        Some(if key.is_empty() { format!("{}root/", self.hidden) } else { key })
    }

    /// Sets what tells the kernel that its caches are old.
    pub(crate) fn set_kernel(&self, kernel: Arc<dyn Notify>) {
        *self.kernel.lock().unwrap_or_else(PoisonError::into_inner) = Some(kernel);
    }

    /// Tells the kernel, from a thread that it may block.
    fn tell_kernel(&self, tell: impl FnOnce(&dyn Notify) + Send + 'static) {
        let kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(kernel) = kernel {
            tokio::task::spawn_blocking(move || tell(&*kernel));
        }
    }

    /// Work in the background that the end of the mount waits for.
    fn spawn(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.send_modify(|count| *count += 1);
        let done = Done(self.clone());
        tokio::spawn(async move {
            let _done = done;
            work.await;
        });
    }

    /// Waits until the background is quiet.
    pub(crate) async fn quiet(&self) {
        let mut tasks = self.tasks.subscribe();
        // The sender is ours, so it can't be gone.
        let _ = tasks.wait_for(|count| *count == 0).await;
    }

    /// What stat shows of a node.
    pub(crate) fn attr(&self, ino: Ino) -> Answer<Attr> {
        let mut tree = self.tree();
        let node = tree.node_mut(ino).ok_or(Errno::STALE)?;
        let attr = shown(ino, node);
        node.told = Some(attr.size);
        Ok(attr)
    }

    /// A node as the kernel is told of it. `count`: as one more reference.
    pub(crate) fn entry(&self, ino: Ino, count: bool) -> Answer<Entry> {
        let mut tree = self.tree();
        let node = tree.node_mut(ino).ok_or(Errno::STALE)?;
        node.lookups += u64::from(count);
        let ttl = self.ttl(node);
        let attr = shown(ino, node);
        if count {
            node.told = Some(attr.size);
        }
        Ok(Entry { attr, attr_ttl: ttl, name_ttl: ttl })
    }

    /// Could there be something of that name? Without asking.
    pub(crate) fn may_exist(&self, parent: Ino, name: &str) -> bool {
        let fits = self.tree().key_of(parent, name).is_some_and(|key| key.len() < KEY_MAX);
        fits && self.is_name(parent, name)
    }

    /// How long the kernel may believe that a name does not exist.
    pub(crate) fn absent_ttl(&self, parent: Ino, name: &str) -> Duration {
        let tree = self.tree();
        let Some(directory) = tree.directory(parent) else { return Duration::ZERO };
        let own = match directory.names.get(name) {
            Some(tree::Slot::Absent { seen, .. }) => Some(*seen),
            _ => None,
        };
        let seen = own.max(directory.complete);
        seen.map_or(Duration::ZERO, |seen| self.max_age.saturating_sub(seen.elapsed()))
    }

    /// The node of a name whose attributes are fresh enough to be shown without asking.
    pub(crate) fn known(&self, parent: Ino, name: &str) -> Option<Ino> {
        let mut tree = self.tree();
        tree.facts(parent, name)?.attributes.as_ref()?;
        let ino = tree.attach(parent, name)?;
        tree.pin(ino);
        Some(ino)
    }

    /// An entry that was made with [`Self::known`] has reached the kernel, or not.
    pub(crate) fn shown_to_kernel(&self, ino: Ino, reached: bool) {
        let mut tree = self.tree();
        if let Some(node) = tree.node_mut(ino).filter(|_| reached) {
            node.lookups += 1;
            node.told = Some(shown(ino, node).size);
        }
        tree.unpin(ino);
    }

    /// How long what is known of a node may still be believed.
    pub(crate) fn ttl(&self, node: &Node) -> Duration {
        if node.file.as_ref().is_some_and(|file| file.is_ours()) {
            return self.max_age;
        }
        let oldest = node.facts.attributes_seen.map_or(node.facts.seen, |seen| seen.min(node.facts.seen));
        self.max_age.saturating_sub(oldest.elapsed())
    }
}

/// Works on many things, so many at once; answers in the order in which they come.
async fn at_once<T, R, F: Future<Output = R>>(limit: usize, things: Vec<T>, work: impl Fn(T) -> F) -> Vec<R> {
    use futures_util::StreamExt;
    futures_util::stream::iter(things.into_iter().map(work)).buffer_unordered(limit).collect().await
}

/// Ends a task of the background, also one that panicked.
struct Done(Arc<Namespace>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.tasks.send_modify(|count| *count -= 1);
    }
}

fn shown(ino: Ino, node: &Node) -> Attr {
    let unknown = Attributes::new(S_IFDIR, 0, 0, 0);
    let attributes = node.facts.attributes.as_deref().unwrap_or(&unknown);
    let size = match &node.file {
        Some(file) => file.content.size(),
        None if node.facts.directory => 4096,
        None => node.facts.size(),
    };
    let touched = node.directory.as_ref().and_then(|directory| directory.touched);
    let mtime = touched.map_or(attributes.mtime, |touched| touched.max(attributes.mtime));
    Attr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: node.atime.unwrap_or(mtime),
        mtime,
        ctime: touched.map_or(attributes.ctime, |touched| touched.max(attributes.ctime)),
        mode: attributes.mode,
        // Directories say 1: nobody counts their subdirectories.
        nlink: u32::from(node.place.is_some() || ino == ROOT),
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
    }
}
