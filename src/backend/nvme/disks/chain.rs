//! A list that only grows.

use std::sync::OnceLock;

/// A list that only grows, so that what is in it can be lent for as long as the list lives.
pub(super) struct Chain<T> {
    first: OnceLock<Box<Link<T>>>,
}

struct Link<T> {
    value: T,
    next: OnceLock<Box<Link<T>>>,
}

impl<T> Default for Chain<T> {
    fn default() -> Self {
        Self { first: OnceLock::default() }
    }
}

impl<T> Chain<T> {
    pub(super) fn push(&self, value: T) {
        let mut fresh = Box::new(Link { value, next: OnceLock::default() });
        let mut place = &self.first;
        while let Err(refused) = place.set(fresh) {
            fresh = refused;
            // Somebody is there: behind him, then.
            if let Some(link) = place.get() {
                place = &link.next;
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let mut place = &self.first;
        std::iter::from_fn(move || {
            let link = place.get()?;
            place = &link.next;
            Some(&link.value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_lends_what_is_in_it_while_it_grows() {
        let list = Chain::default();
        assert_eq!(list.iter().count(), 0);
        list.push("one".to_owned());
        let first = list.iter().next().unwrap();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let list = &list;
                scope.spawn(move || list.push(number.to_string()));
            }
        });
        assert_eq!(first, "one");
        let mut all: Vec<_> = list.iter().cloned().collect();
        assert_eq!(all.remove(0), "one");
        all.sort();
        assert_eq!(all, ["0", "1", "2", "3", "4", "5", "6", "7"]);
    }
}
