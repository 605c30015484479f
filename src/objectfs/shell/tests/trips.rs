//! What operations cost: round trips are what a user waits for.

use super::super::super::store::Metadata;
use super::*;

#[tokio::test]
async fn a_small_new_file_costs_one_put() {
    let mount = Mount::new().await;
    mount.mkdir("d").await.unwrap();
    mount.calls();
    mount.save("d/f", b"hello").await.unwrap();
    assert_eq!(mount.calls(), ["put p/d/f"]);
    mount.save("d/empty", b"").await.unwrap();
    assert_eq!(mount.calls(), ["put p/d/empty"], "also an empty one is in the bucket when it is closed");
}

#[tokio::test]
async fn attributes_set_before_the_close_cost_nothing() {
    let mount = Mount::new().await;
    mount.mkdir("d").await.unwrap();
    mount.calls();
    let open = mount.open("d/f", 0).await.unwrap();
    mount.put(open, 0, b"x").await.unwrap();
    for change in [
        SetAttr { mode: Some(0o600), ..SetAttr::default() },
        SetAttr { uid: Some(5), gid: Some(6), ..SetAttr::default() },
        SetAttr { mtime: Some(crate::fuse::filesystem::Time::At(std::time::UNIX_EPOCH)), ..SetAttr::default() },
    ] {
        mount.fs.setattr(WHO, open.0, change).await.unwrap();
    }
    mount.close(open).await.unwrap();
    assert_eq!(mount.calls(), ["put p/d/f"]);
    let (_, metadata) = mount.double.object("p/d/f").unwrap();
    assert_eq!((&*metadata.user["mode"], &*metadata.user["uid"], &*metadata.user["mtime"]), ("33152", "5", "0"));
}

#[tokio::test]
async fn an_exclusive_file_costs_two_puts() {
    let mount = Mount::new().await;
    mount.mkdir("d").await.unwrap();
    mount.calls();
    let open = mount.open("d/f", O_EXCL).await.unwrap();
    mount.put(open, 0, b"x").await.unwrap();
    mount.close(open).await.unwrap();
    assert_eq!(mount.calls(), ["put p/d/f", "put p/d/f"]);
}

#[tokio::test]
async fn reading_a_small_file_of_a_listed_directory_costs_one_get_when_its_attributes_are_known() {
    let double = Double::new();
    let writer = Mount::over(&double, |_| ()).await;
    writer.save("f", b"hello").await.unwrap();
    let mount = Mount::over(&double, |_| ()).await;
    mount.look("").await.unwrap();
    mount.look("f").await.unwrap();
    mount.calls();
    // Long after the lookup.
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    assert_eq!(mount.load("f").await.unwrap(), b"hello");
    assert_eq!(mount.calls(), ["get p/f"]);
}

#[tokio::test]
async fn an_unknown_name_costs_one_round_trip() {
    let mount = Mount::new().await;
    mount.double.put_raw("p/f", "x", Metadata::default());
    mount.look("").await.unwrap();
    mount.calls();
    assert_eq!(mount.look("f").await.unwrap().size, 1);
    let mut calls = mount.calls();
    calls.sort();
    // All three at once: a file, a directory with a marker, one without.
    assert_eq!(calls, ["head p/f", "head p/f/", "list p/f/"]);
}

#[tokio::test]
async fn a_walk_lists_many_directories_at_once() {
    let mount = Mount::new().await;
    for folder in 0..50 {
        for file in 0..4 {
            mount.double.put_raw(&format!("p/tree/{folder:02}/{file}"), vec![0; 5000], Metadata::default());
        }
    }
    assert_eq!(mount.list("tree").await.len(), 50);
    mount.calls();
    for folder in 0..50 {
        let names = mount.list(&format!("tree/{folder:02}")).await;
        assert_eq!(names, ["0", "1", "2", "3"]);
    }
    let calls = mount.calls();
    let lists = calls.iter().filter(|call| call.starts_with("list")).count();
    assert!(lists <= 2, "{calls:?}");
}

#[tokio::test]
async fn another_node_needs_no_head_where_there_is_an_index() {
    let double = Double::new();
    let first = Mount::over(&double, |_| ()).await;
    first.mkdir("d").await.unwrap();
    for file in 0..20 {
        let old = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
        let user = [("mode".to_owned(), "33216".to_owned())].into();
        double.put_raw(&format!("p/d/{file}"), "x", Metadata { content_type: None, user });
        double.set_modified(&format!("p/d/{file}"), old);
    }
    let second = Mount::over(&double, |_| ()).await;
    assert_eq!(second.entries("d", 100, true).await.unwrap().len(), 20);
    assert_eq!(double.count("head"), 20 + 3, "each file, the root, and what d could be");
    second.fs.ended().await;
    let third = Mount::over(&double, |_| ()).await;
    let entries = third.entries("d", 100, true).await.unwrap();
    assert_eq!(entries.len(), 20);
    assert!(entries.iter().all(|entry| entry.entry.as_ref().unwrap().attr.mode == 0o100_700));
    assert_eq!(double.count("head"), 3, "{:?}", double.calls());
}

#[tokio::test]
async fn a_directory_of_pages_is_listed_whole_and_once() {
    let double = Double::new();
    double.set_page(100);
    for file in 0..1234 {
        double.put_raw(&format!("p/d/{file:04}"), vec![0; 5000], Metadata::default());
    }
    let mount = Mount::over(&double, |_| ()).await;
    let entries = mount.entries("d", 37, false).await.unwrap();
    let names: Vec<_> = entries.iter().map(|entry| entry.name.to_str().unwrap().to_owned()).collect();
    assert_eq!(names, (0..1234).map(|file| format!("{file:04}")).collect::<Vec<_>>());
    assert!(entries.iter().all(|entry| entry.kind == 0o100_000), "too long for links");
    assert_eq!(double.count("list"), 13 + 1);
}

/// A listing that is too old is renewed by one call, whose answer is good for its neighbours too.
#[tokio::test]
async fn removing_file_after_file_asks_for_few_of_them() {
    let double = Double::new();
    let mount = Mount::over(&double, |settings| settings.max_age = 500).await;
    mount.mkdir("d").await.unwrap();
    for number in 0..40 {
        mount.save(&format!("d/{number}"), b"x").await.unwrap();
    }
    mount.list("d").await;
    tokio::time::sleep(std::time::Duration::from_millis(600)).await;
    mount.calls();
    for number in 0..40 {
        mount.unlink(&format!("d/{number}")).await.unwrap();
    }
    let calls = mount.calls();
    let count = |verb: &str| calls.iter().filter(|call| call.starts_with(verb)).count();
    assert_eq!(count("delete"), 40);
    assert!(count("head p/d/") + count("list") < 15, "{calls:?}");
}

/// The attributes of what a walk comes to next are asked for before it is there.
#[tokio::test]
async fn a_walk_looks_ahead() {
    let mount = Mount::new().await;
    for folder in 0..6 {
        for file in 0..3 {
            mount.double.put_raw(&format!("p/top/{folder}/{file}"), "x", Metadata::default());
        }
    }
    for path in ["", "top", "top/0"] {
        mount.entries(path, 100, true).await.unwrap();
    }
    mount.fs.names.quiet().await;
    let calls = mount.calls();
    for ahead in ["1", "2", "3"] {
        assert!(calls.contains(&format!("head p/top/{ahead}/0")), "{calls:?}");
    }
    assert!(!calls.contains(&"head p/top/4/0".to_owned()), "{calls:?}");
    mount.entries("top/1", 100, true).await.unwrap();
    let calls = mount.calls();
    assert!(!calls.contains(&"head p/top/1/0".to_owned()), "{calls:?}");
}
