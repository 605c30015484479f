//! A listing without a delimiter, taken apart into the directories that it shows whole. Pure.

use std::collections::BTreeMap;

use super::super::attributes::Defaults;
use super::super::store::{ListPage, Listed};
use super::facts::{Ask, Seen, Stored};

/// A directory of which all is known.
pub(crate) struct Whole {
    /// Names from the top of the listing down to it.
    pub(crate) path: Vec<String>,
    /// Its entries.
    pub(crate) names: BTreeMap<String, Seen>,
    /// Its marker, if it has one.
    pub(crate) marker: Option<Stored>,
    /// When the first of its pages was asked for.
    pub(crate) ask: Ask,
}

/// The directories on the way to the last key that was seen.
pub(crate) struct Flat {
    prefix: String,
    defaults: Defaults,
    /// Names of those above, which began before the listing did: never whole.
    above: Vec<String>,
    open: Vec<Whole>,
}

impl Flat {
    /// Of keys below a prefix, from the directory at a path on.
    pub(crate) fn new(prefix: String, path: &[String], defaults: Defaults) -> Self {
        let above = path.split_last().map(|(_, above)| above.to_vec()).unwrap_or_default();
        Self { prefix, defaults, above, open: Vec::new() }
    }

    /// Takes a page; returns directories that no later key can belong to.
    pub(crate) fn take(&mut self, page: ListPage, ask: Ask) -> Vec<Whole> {
        let mut done = Vec::new();
        for object in &page.objects {
            if let Some(rest) = object.key.strip_prefix(self.prefix.as_str()) {
                let (folders, name) =
                    rest.rsplit_once('/').map_or((None, rest), |(folders, name)| (Some(folders), name));
                let path: Vec<&str> = folders.map(|folders| folders.split('/').collect()).unwrap_or_default();
                self.place(&path, name, object, ask, &mut done);
            }
        }
        done
    }

    fn place(&mut self, path: &[&str], name: &str, object: &Listed, ask: Ask, done: &mut Vec<Whole>) {
        while self.open.last().is_some_and(|last| !begins_with(path, &last.path)) {
            done.extend(self.open.pop());
        }
        // The part of the way that began before the listing.
        let shared = self.above.iter().zip(path).take_while(|(above, name)| above == *name).count();
        self.above.truncate(shared);
        let from = self.open.last().map_or(shared, |last| last.path.len());
        for depth in from..path.len() {
            if let Some(parent) = self.open.last_mut() {
                parent.names.insert(path[depth].to_owned(), Seen::Directory(None));
            }
            let path = path[..=depth].iter().map(|name| (*name).to_owned()).collect();
            self.open.push(Whole { path, names: BTreeMap::new(), marker: None, ask });
        }
        if let Some(last) = self.open.last_mut().filter(|last| last.path.len() == path.len()) {
            if name.is_empty() {
                last.marker = Some(Stored::listed(object, true, &self.defaults));
            } else {
                last.names
                    .entry(name.to_owned())
                    .or_insert_with(|| Seen::Object(Stored::listed(object, false, &self.defaults)));
            }
        }
    }

    /// There are no more keys.
    pub(crate) fn finish(&mut self) -> Vec<Whole> {
        self.open.drain(..).rev().collect()
    }
}

fn begins_with(path: &[&str], start: &[String]) -> bool {
    path.len() >= start.len() && path.iter().zip(start).all(|(one, other)| one == other)
}

#[cfg(test)]
mod tests {
    use std::time::{Instant, SystemTime};

    use super::super::super::store::Etag;
    use super::*;

    const DEFAULTS: Defaults = Defaults { uid: 0, gid: 0, file_mode: 0o644, dir_mode: 0o755 };

    fn page(keys: &[&str]) -> ListPage {
        let listed = |key: &&str| Listed {
            key: (*key).to_owned(),
            size: 1,
            etag: Etag("\"e\"".to_owned()),
            modified: SystemTime::UNIX_EPOCH,
            metadata: None,
        };
        ListPage { objects: keys.iter().map(listed).collect(), ..ListPage::default() }
    }

    fn shown(done: &[Whole]) -> Vec<String> {
        done.iter()
            .map(|whole| {
                let names: Vec<_> = whole.names.keys().map(String::as_str).collect();
                let marker = if whole.marker.is_some() { "*" } else { "" };
                format!("{}{marker}: {}", whole.path.join("/"), names.join(" "))
            })
            .collect()
    }

    #[test]
    fn a_directory_is_whole_once_a_key_behind_it_has_come() {
        let ask = Ask { stamp: 0, at: Instant::now() };
        let mut flat = Flat::new("p/".to_owned(), &["a".to_owned()], DEFAULTS);
        let done = flat.take(page(&["p/a/", "p/a/1", "p/a/b/2", "p/a/b/3"]), ask);
        assert!(done.is_empty(), "more may come");
        let done = flat.take(page(&["p/a/c", "p/d", "p/e/f/4"]), ask);
        assert_eq!(shown(&done), ["a/b: 2 3", "a*: 1 b c"]);
        assert_eq!(shown(&flat.finish()), ["e/f: 4", "e: f"]);
    }

    #[test]
    fn what_began_before_the_listing_is_never_whole() {
        let ask = Ask { stamp: 0, at: Instant::now() };
        let mut flat = Flat::new(String::new(), &["x".to_owned(), "m".to_owned()], DEFAULTS);
        let done = flat.take(page(&["x/m/1", "x/n/2", "x/z", "y/3", "z"]), ask);
        assert_eq!(shown(&done), ["x/m: 1", "x/n: 2", "y: 3"]);
        assert!(flat.finish().is_empty());
    }
}
