//! Two nodes and one bucket.

use super::super::super::store::Metadata;
use super::*;

#[tokio::test]
async fn an_open_sees_what_was_closed_before() {
    let double = Double::new();
    let (one, two) = (Mount::over(&double, |_| ()).await, Mount::over(&double, |_| ()).await);
    one.save("f", b"first").await.unwrap();
    assert_eq!(two.load("f").await.unwrap(), b"first");
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    one.save("f", b"second").await.unwrap();
    assert_eq!(two.load("f").await.unwrap(), b"second");
    assert_eq!(one.load("f").await.unwrap(), b"second");
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    two.save("f", b"third, longer").await.unwrap();
    assert_eq!(one.load("f").await.unwrap(), b"third, longer");
    assert_eq!(one.look("f").await.unwrap().size, 13);
}

#[tokio::test]
async fn a_change_by_somebody_else_is_never_overwritten() {
    let double = Double::new();
    let (one, two) = (Mount::over(&double, |_| ()).await, Mount::over(&double, |_| ()).await);
    one.save("f", b"base").await.unwrap();
    let open = one.open("f", 0).await.unwrap();
    one.put(open, 0, b"mine").await.unwrap();
    two.save("f", b"theirs").await.unwrap();
    assert_eq!(one.close(open).await, Err(Errno::STALE));
    assert_eq!(double.object("p/f").unwrap().0, "theirs");
    assert_eq!(one.load("f").await.unwrap(), b"theirs", "the name is theirs");
    let kept: Vec<_> = files_below(one.staging.path()).into_iter().filter(|bytes| bytes == b"mine").collect();
    assert_eq!(kept.len(), 1, "the local version is kept");
}

fn files_below(folder: &std::path::Path) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(std::fs::read(&path).unwrap());
        }
    }
    found
}

#[tokio::test]
async fn two_new_files_of_one_name_have_one_winner() {
    let double = Double::new();
    let (one, two) = (Mount::over(&double, |_| ()).await, Mount::over(&double, |_| ()).await);
    let (first, second) = (one.open("f", 0).await.unwrap(), two.open("f", 0).await.unwrap());
    one.put(first, 0, b"one").await.unwrap();
    two.put(second, 0, b"two").await.unwrap();
    one.close(first).await.unwrap();
    assert_eq!(two.close(second).await, Err(Errno::STALE));
    assert_eq!(double.object("p/f").unwrap().0, "one");
    assert_eq!(two.load("f").await.unwrap(), b"one");
}

#[tokio::test]
async fn exclusive_creation_is_exclusive_across_nodes() {
    let double = Double::new();
    let (one, two) = (Mount::over(&double, |_| ()).await, Mount::over(&double, |_| ()).await);
    // Both believe that there is nothing.
    assert_eq!(one.look("lock").await.unwrap_err(), Errno::NOENT);
    assert_eq!(two.look("lock").await.unwrap_err(), Errno::NOENT);
    let (first, second) = tokio::join!(one.open("lock", O_EXCL), two.open("lock", O_EXCL));
    assert_eq!([&first, &second].iter().filter(|open| open.is_ok()).count(), 1);
    assert_eq!(first.err().or(second.err()), Some(Errno::EXIST));
}

#[tokio::test]
async fn what_an_earlier_try_has_made_is_no_conflict() {
    let mount = Mount::new().await;
    mount.look("").await.unwrap();
    mount.double.order("put", 0, 1, super::super::super::store::double::Fault::AnswerLost);
    // The first try was carried out and its answer was lost: the program is told of that, and finds what it made.
    assert_eq!(mount.mkdir("d").await, Err(Errno::IO));
    assert_eq!(mount.look("d").await.unwrap().mode, 0o040_755);
    assert_eq!(mount.mkdir("d").await, Err(Errno::EXIST));
}

#[tokio::test]
async fn what_was_done_here_is_not_undone_by_an_older_listing() {
    let mount = Mount::new().await;
    mount.double.put_raw("p/old", "x", Metadata::default());
    let mount = Arc::new(mount);
    mount.double.order(
        "list",
        0,
        1,
        super::super::super::store::double::Fault::Slow(std::time::Duration::from_millis(50)),
    );
    let listing = tokio::spawn({
        let mount = mount.clone();
        async move { mount.list("").await }
    });
    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    // The double answers with what is there when the wait is over; an answer of before is forced by hand.
    mount.save("new", b"x").await.unwrap();
    mount.unlink("old").await.unwrap();
    let listed = listing.await.unwrap();
    assert!(listed.contains(&"new".to_owned()), "{listed:?}");
    assert_eq!(mount.list("").await, ["new"]);
}

#[tokio::test]
async fn other_nodes_see_names_and_attributes_within_max_age() {
    let double = Double::new();
    let (one, two) = (Mount::over(&double, |_| ()).await, Mount::doubting(&double).await);
    assert_eq!(two.look("d/f").await.unwrap_err(), Errno::NOENT);
    one.mkdir("d").await.unwrap();
    one.save("d/f", b"x").await.unwrap();
    assert_eq!(two.look("d/f").await.unwrap().mode, 0o100_644);
    one.set("d/f", SetAttr { mode: Some(0o600), ..SetAttr::default() }).await.unwrap();
    assert_eq!(two.look("d/f").await.unwrap().mode, 0o100_600);
    one.rename("d/f", "g").await.unwrap();
    assert_eq!(two.look("d/f").await.unwrap_err(), Errno::NOENT);
    assert_eq!(two.list("").await, ["d", "g"]);
    one.unlink("g").await.unwrap();
    one.rmdir("d").await.unwrap();
    assert!(two.list("").await.is_empty());
    assert!(double.keys().iter().all(|key| key.starts_with(".berth/")), "{:?}", double.keys());
}

/// What another node has just made is not replaced because a listing from before does not show it.
#[tokio::test]
async fn a_name_that_is_not_to_be_replaced_is_looked_for_in_the_bucket() {
    let double = Double::new();
    let (a, b) = (Mount::over(&double, |_| ()).await, Mount::over(&double, |_| ()).await);
    a.mkdir("from").await.unwrap();
    a.save("from/f", b"a").await.unwrap();
    a.save("x", b"a").await.unwrap();
    a.list("").await;
    b.mkdir("to").await.unwrap();
    for path in ["to/f", "y", "z"] {
        b.save(path, b"b").await.unwrap();
    }
    double.set_abilities(super::super::super::store::Abilities {
        conditional_copy: false,
        ..super::super::super::store::double::ABLE
    });
    assert_eq!(a.rename("from", "to").await, Err(Errno::NOTEMPTY));
    assert_eq!(a.rename_with("x", "y", 1).await, Err(Errno::EXIST));
    assert_eq!(a.mkdir("z").await, Err(Errno::EXIST));
    for path in ["to/f", "y", "z"] {
        assert_eq!(b.load(path).await.unwrap(), b"b");
    }
}
