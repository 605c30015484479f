//! The table told older and newer things.

use super::super::super::attributes::S_IFDIR;
use super::super::facts::Stored;
use super::*;

fn object() -> Seen {
    Seen::Object(Stored { modified: Some(SystemTime::UNIX_EPOCH), ..Stored::written(Etag("\"1\"".to_owned()), 1) })
}

fn tree() -> Tree {
    Tree::new("p/", Attributes::new(S_IFDIR | 0o755, 0, 0, 0))
}

#[test]
fn what_was_done_here_is_not_undone_by_an_older_answer() {
    let mut tree = tree();
    let old = tree.ask();
    let changed = tree.tick();
    let facts = Facts::local(false, Attributes::new(0o100_644, 0, 0, 0), None, changed);
    let ino = tree.insert(ROOT, "made", facts).unwrap();
    tree.learn(ROOT, "removed", old, object());
    tree.remove(ROOT, "removed");
    tree.learn(ROOT, "made", old, Seen::Absent);
    tree.learn(ROOT, "removed", old, object());
    tree.completed(ROOT, old, |_| false);
    assert_eq!(tree.live(ROOT, "made"), Some(ino));
    assert!(tree.facts(ROOT, "removed").is_none());
    let new = tree.ask();
    tree.completed(ROOT, new, |name| name == "made");
    assert_eq!(tree.live(ROOT, "made"), Some(ino), "it is just being changed");
    tree.learn(ROOT, "removed", new, object());
    assert!(tree.facts(ROOT, "removed").is_some(), "somebody else has made it again");
    tree.completed(ROOT, new, |_| false);
    assert_eq!(tree.live(ROOT, "made"), None, "a newer listing does not show it");
}

#[test]
fn a_node_lives_as_long_as_somebody_refers_to_it() {
    let mut tree = tree();
    let ask = tree.ask();
    tree.learn(ROOT, "d", ask, Seen::Directory(None));
    let directory = tree.attach(ROOT, "d").unwrap();
    tree.learn(directory, "f", ask, object());
    let file = tree.attach(directory, "f").unwrap();
    tree.node_mut(directory).unwrap().lookups = 1;
    tree.node_mut(file).unwrap().lookups = 2;
    tree.forget(directory, 1);
    assert_eq!(tree.key(file).as_deref(), Some("p/d/f"), "its child refers to it");
    tree.rename((ROOT, "d"), (ROOT, "e"));
    assert_eq!(tree.key(file).as_deref(), Some("p/e/f"));
    tree.forget(file, 2);
    assert!(tree.node(file).is_none() && tree.node(directory).is_none());
    assert!(tree.facts(ROOT, "e").is_some(), "what is known of the name is kept");
    assert_eq!(tree.iter().count(), 1, "nothing but the root");
}
