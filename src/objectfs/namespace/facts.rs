//! What is known of one name, since when, and what a newer answer makes of it. Pure.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::super::attributes::{Attributes, Defaults};
use super::super::content::Version;
use super::super::store::{Etag, Head, Listed};

/// Metadata can be replaced without a new etag, and times have whole seconds: only attributes that were looked at so
/// long after the object's own time are surely those of a listing with the same etag and time.
pub(crate) const SETTLED: Duration = Duration::from_secs(3);

/// How far the service's clock may be from ours for a version to be recognised as the one that we have just written.
const SKEW: Duration = Duration::from_secs(2);

/// The moment before a question was asked: its answer is no newer than that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    /// Among local changes.
    pub(crate) stamp: u64,
    /// By the clock.
    pub(crate) at: Instant,
}

/// The object of a name, or a directory's marker.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// Its version.
    pub(crate) etag: Etag,
    /// Bytes.
    pub(crate) size: u64,
    /// Last-Modified. `None`: we wrote it ourselves and were not told.
    pub(crate) modified: Option<SystemTime>,
    /// Its attributes, if they came along.
    pub(crate) attributes: Option<Arc<Attributes>>,
    /// This mount has written it.
    pub(crate) own: bool,
}

impl Stored {
    /// As this mount has just written it.
    pub(crate) fn written(etag: Etag, size: u64) -> Self {
        Self { etag, size, modified: None, attributes: None, own: true }
    }

    /// Of an earlier worker's object nothing is known yet.
    pub(crate) fn unknown() -> Self {
        let modified = Some(SystemTime::UNIX_EPOCH);
        Self { etag: Etag(String::new()), size: 0, modified, attributes: None, own: false }
    }

    /// As a HEAD shows it.
    pub(crate) fn looked_at(head: &Head, attributes: Attributes) -> Self {
        let attributes = Some(Arc::new(attributes));
        Self { etag: head.etag.clone(), size: head.size, modified: Some(head.modified), attributes, own: false }
    }

    /// As a listing shows it.
    pub(crate) fn listed(listed: &Listed, directory: bool, defaults: &Defaults) -> Self {
        let read = |metadata| Attributes::read(metadata, listed.modified, directory, defaults);
        Self {
            etag: listed.etag.clone(),
            size: listed.size,
            modified: Some(listed.modified),
            attributes: listed.metadata.as_ref().map(read).map(Arc::new),
            own: false,
        }
    }
}

/// An answer about a name.
#[derive(Clone, Debug)]
pub(crate) enum Seen {
    /// There is nothing.
    Absent,
    /// An object.
    Object(Stored),
    /// Keys below it; `None`: nothing is known of its marker; `Some(None)`: it has none.
    Directory(Option<Option<Stored>>),
}

/// What is known of a name that exists.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Is it one?
    pub(crate) directory: bool,
    /// The object or the marker in the bucket. Directories: `None` may also mean that nobody has looked.
    pub(crate) stored: Option<Stored>,
    /// Directories: is it known whether there is a marker?
    pub(crate) marker_known: bool,
    /// Its attributes, with what was changed here.
    pub(crate) attributes: Option<Arc<Attributes>>,
    /// By our clock, when the attributes were read or written.
    pub(crate) learned: SystemTime,
    /// Name, version and size were right then.
    pub(crate) seen: Instant,
    /// The attributes were right then.
    pub(crate) attributes_seen: Option<Instant>,
    /// The last local change.
    pub(crate) changed: u64,
}

impl Facts {
    /// Made here, now.
    pub(crate) fn local(directory: bool, attributes: Attributes, stored: Option<Stored>, changed: u64) -> Self {
        let now = Instant::now();
        Self {
            directory,
            stored,
            marker_known: true,
            attributes: Some(Arc::new(attributes)),
            learned: SystemTime::now(),
            seen: now,
            attributes_seen: Some(now),
            changed,
        }
    }

    /// The first answer about a name.
    pub(crate) fn first(seen: Seen, ask: Ask, plain: &Attributes) -> Option<Self> {
        let mut facts = Self {
            directory: matches!(seen, Seen::Directory(_)),
            stored: None,
            marker_known: false,
            attributes: None,
            learned: SystemTime::UNIX_EPOCH,
            seen: ask.at,
            attributes_seen: None,
            changed: 0,
        };
        facts.update(seen, ask, plain).then_some(facts)
    }

    /// Takes a newer answer over. `false`: it is of another kind now, or gone. `plain`: attributes of directories
    /// without a marker.
    pub(crate) fn update(&mut self, seen: Seen, ask: Ask, plain: &Attributes) -> bool {
        match seen {
            Seen::Object(stored) if !self.directory => self.take(stored, ask),
            Seen::Directory(marker) if self.directory => match marker {
                None => {}
                Some(None) => {
                    let unmarked = self.marker_known && self.stored.is_none();
                    if !unmarked || self.attributes.is_none() {
                        self.attributes = Some(Arc::new(plain.clone()));
                    }
                    self.stored = None;
                    self.marker_known = true;
                    self.attributes_seen = Some(ask.at);
                }
                Some(Some(stored)) => {
                    self.marker_known = true;
                    self.take(stored, ask);
                }
            },
            _ => return false,
        }
        self.seen = self.seen.max(ask.at);
        true
    }

    fn take(&mut self, mut stored: Stored, ask: Ask) {
        stored.own = self.stored.as_ref().is_some_and(|old| {
            let modified = stored.modified.unwrap_or(SystemTime::UNIX_EPOCH);
            let known =
                old.modified.map_or(distance(modified, self.learned) <= SKEW, |old| seconds(old) == seconds(modified));
            old.own && old.etag == stored.etag && known
        });
        if let Some(attributes) = stored.attributes.take() {
            self.attributes = Some(attributes);
            self.learned = SystemTime::now();
            self.attributes_seen = Some(ask.at);
        } else if self.stored.as_ref().is_some_and(|old| old.etag == stored.etag) && self.attributes.is_some() {
            let old = self.stored.as_ref().and_then(|old| old.modified);
            let modified = stored.modified.unwrap_or(SystemTime::UNIX_EPOCH);
            match old {
                // Ours, seen in a listing for the first time.
                None if distance(modified, self.learned) <= SKEW => {
                    self.attributes_seen = Some(ask.at);
                    self.learned = modified + SETTLED;
                }
                Some(old) if seconds(old) == seconds(modified) => {
                    if self.is_settled(modified) {
                        self.attributes_seen = Some(ask.at);
                    }
                }
                _ => self.attributes_seen = None,
            }
        } else {
            self.attributes = None;
            self.attributes_seen = None;
        }
        self.stored = Some(stored);
    }

    /// Do the attributes belong to this version for sure?
    pub(crate) fn is_settled(&self, modified: SystemTime) -> bool {
        self.learned.duration_since(modified).is_ok_and(|age| age >= SETTLED)
    }

    /// If a listing shows the same version, are the attributes right again? See [`Self::take`].
    pub(crate) fn is_renewed_by_listing(&self) -> bool {
        let modified = self.stored.as_ref().map(|stored| stored.modified);
        self.attributes.is_some() && modified.is_some_and(|at| at.is_none_or(|at| self.is_settled(at)))
    }

    /// Attributes from an index, which holds for this version.
    pub(crate) fn adopt(&mut self, attributes: Arc<Attributes>) {
        self.attributes = Some(attributes);
        self.attributes_seen = Some(self.seen);
        self.learned = SystemTime::now();
    }

    /// Are name and version known well enough? What was right at the horizon or later is.
    pub(crate) fn is_fresh(&self, horizon: Instant) -> bool {
        self.seen >= horizon
    }

    /// Are the attributes?
    pub(crate) fn has_fresh_attributes(&self, horizon: Instant) -> bool {
        self.attributes.is_some() && self.attributes_seen.is_some_and(|seen| seen >= horizon)
    }

    /// The size in the bucket.
    pub(crate) fn size(&self) -> u64 {
        self.stored.as_ref().map_or(0, |stored| stored.size)
    }
}

/// Whole seconds, as HEAD shows them.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn distance(one: SystemTime, other: SystemTime) -> Duration {
    one.duration_since(other).unwrap_or_else(|error| error.duration())
}

impl Stored {
    /// The version that it is, under a key.
    pub(crate) fn version(&self, key: String) -> Version {
        Version { key, etag: self.etag.clone(), size: self.size }
    }
}
