//! Workers that die, and services that go away in the middle.

use std::time::Duration;

use super::super::super::store::{Metadata, StoreErrorKind};
use super::*;

/// Everything below a folder, by path relative to it.
async fn all(mount: &Mount, top: &str) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in mount.entries(&folder, 100, true).await.unwrap() {
            let path = format!("{folder}/{}", entry.name.to_str().unwrap());
            if mount.look(&path).await.unwrap().mode & 0o170_000 == 0o040_000 {
                folders.push(path);
            } else {
                found.push((path[top.len()..].to_owned(), mount.load(&path).await.unwrap()));
            }
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn a_rename_of_a_directory_that_dies_anywhere_is_finished_by_the_next_mount() {
    for dies_at in 1.. {
        let double = Double::new();
        let mount = Mount::over(&double, |_| ()).await;
        for path in ["a", "a/sub"] {
            mount.mkdir(path).await.unwrap();
        }
        for (path, text) in [("a/1", "one"), ("a/2", "two"), ("a/sub/3", "three")] {
            mount.save(path, text.as_bytes()).await.unwrap();
        }
        let before = all(&mount, "a").await;
        double.forget_calls();
        // From this call on the worker reaches nothing any more.
        double.order(
            "*",
            dies_at - 1,
            usize::MAX,
            super::super::super::store::double::Fault::Fails(StoreErrorKind::Unavailable),
        );
        let renamed = mount.rename("a", "b").await;
        double.heal();
        // The dead worker does nothing any more: a fresh node looks.
        let next = Mount::over(&double, |_| ()).await;
        let names = next.list("").await;
        if renamed.is_ok() {
            assert_eq!(names, ["b"]);
            assert_eq!(all(&next, "b").await, before);
            assert!(dies_at > 5, "the faults have met something");
            return;
        }
        assert_eq!(names.len(), 1, "dies at {dies_at}: {names:?} {:?}", double.keys());
        assert_eq!(all(&next, &names[0]).await, before, "dies at {dies_at}");
        assert!(!double.keys().iter().any(|key| key.contains("renames/")), "the journal is gone: {:?}", double.keys());
    }
}

#[tokio::test]
async fn a_journal_never_touches_what_was_written_after_it() {
    let double = Double::new();
    let old = std::time::SystemTime::now() - Duration::from_secs(100);
    let user = |mode: &str| Metadata { content_type: None, user: [("mode".to_owned(), mode.to_owned())].into() };
    for (key, text) in
        [("p/a/1", "one"), ("p/a/2", "two"), ("p/b/2", "changed since"), ("p/a/3", "three"), ("p/b/3", "three")]
    {
        double.put_raw(key, text, user("33188"));
        double.set_modified(key, old);
    }
    let settings = Mount::over(&double, |_| ()).await.settings;
    let journal = format!("{}renames/x", settings.hidden());
    double.put_raw(&journal, r#"{"from":"p/a/","to":"p/b/","mount":"m","began":1}"#, Metadata::default());
    double.set_modified(&journal, old + Duration::from_secs(10));
    double.put_raw("p/a/new", "new", user("33188"));
    let next = Mount::over(&double, |_| ()).await;
    assert_eq!(next.keys(), ["p/a/2", "p/a/new", "p/b/1", "p/b/2", "p/b/3"], "in doubt both stay");
}

#[tokio::test]
async fn what_was_staged_survives_the_worker_and_is_uploaded_by_the_next_one() {
    let double = Double::new();
    let mount = Mount::over(&double, |settings| settings.consistency = Consistency::WriteBack).await;
    mount.mkdir("d").await.unwrap();
    double.fail("put", StoreErrorKind::Unavailable);
    mount.save("d/f", b"staged").await.unwrap();
    let open = mount.open("d/g", 0).await.unwrap();
    mount.put(open, 0, b"never closed").await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(mount.keys(), ["p/d/"]);
    assert_eq!(mount.fs.fsync(WHO, open.0, open.1, false).await, Err(Errno::IO), "fsync waits for the bucket");
    let settings = mount.left_behind();
    double.heal();
    let next = ObjectFs::open(settings, double.clone()).await.unwrap();
    next.ended().await;
    assert_eq!(double.object("p/d/f").unwrap().0, "staged");
    assert_eq!(double.object("p/d/g").unwrap().0, "never closed");
}

#[tokio::test]
async fn a_close_with_write_back_does_not_wait_and_fsync_does() {
    let double = Double::new();
    let mount = Mount::over(&double, |settings| settings.consistency = Consistency::WriteBack).await;
    mount.list("").await;
    double.freeze();
    mount.save("f", b"later").await.unwrap();
    assert_eq!(mount.look("f").await.unwrap().size, 5);
    assert!(double.object("p/f").is_none());
    double.thaw();
    let open = mount.open("f", 0).await.unwrap();
    mount.fs.fsync(WHO, open.0, open.1, false).await.unwrap();
    assert_eq!(double.object("p/f").unwrap().0, "later");
    mount.close(open).await.unwrap();
}

#[tokio::test]
async fn a_close_that_failed_says_so_and_keeps_the_bytes() {
    let double = Double::new();
    let mount = Mount::over(&double, |_| ()).await;
    let open = mount.open("f", 0).await.unwrap();
    mount.put(open, 0, b"precious").await.unwrap();
    double.fail("put", StoreErrorKind::Unavailable);
    assert_eq!(mount.close(open).await, Err(Errno::IO));
    assert_eq!(mount.load("f").await.unwrap(), b"precious", "it is still here");
    double.heal();
    mount.fs.ended().await;
    assert_eq!(double.object("p/f").unwrap().0, "precious");
}

#[tokio::test]
async fn a_successor_knows_the_kernels_inodes_and_handles() {
    let double = Double::new();
    let mount = Mount::over(&double, |_| ()).await;
    mount.mkdir("d").await.unwrap();
    mount.save("d/f", b"hello").await.unwrap();
    let open = mount.open("d/f", 0).await.unwrap();
    let tables = serde_json::to_string(&mount.fs.tables()).unwrap();
    let next = ObjectFs::open_with(mount.left_behind(), double.clone(), serde_json::from_str(&tables).unwrap());
    let next = Mount {
        fs: next.await.unwrap(),
        double: double.clone(),
        settings: mount.settings.clone(),
        staging: mount.staging.clone(),
    };
    assert_eq!(next.contents(open).await.unwrap(), b"hello");
    assert_eq!(next.look("d/f").await.unwrap().ino, open.0);
    next.put(open, 5, b"!").await.unwrap();
    next.close(open).await.unwrap();
    assert_eq!(double.object("p/d/f").unwrap().0, "hello!");
}

#[tokio::test]
async fn what_dead_mounts_left_is_swept_when_it_is_old() {
    let mount = Mount::new().await;
    let hidden = mount.settings.hidden();
    for folder in ["unlinked", "uploads"] {
        for (name, days) in [("old", 8), ("young", 6)] {
            let key = format!("{hidden}{folder}/{name}");
            mount.double.put_raw(&key, "x", super::super::super::store::Metadata::default());
            let age = std::time::Duration::from_secs(days * 24 * 3600);
            mount.double.set_modified(&key, std::time::SystemTime::now() - age);
        }
    }
    mount.fs.names.sweep_now().await.unwrap();
    let left: Vec<_> =
        mount.double.keys().into_iter().filter(|key| key.contains("/un") || key.contains("/up")).collect();
    assert_eq!(left, [format!("{hidden}unlinked/young"), format!("{hidden}uploads/young")]);
}
