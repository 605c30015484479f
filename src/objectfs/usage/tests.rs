use super::*;
use crate::objectfs::settings::{Checksums, Consistency, Endpoint};
use crate::objectfs::store::double::{Double, Fault};

const NOTES: &str = ".berth/volumes/v/";

fn settings(prefix: &str, limit: Option<u64>, read_only: bool) -> Arc<Settings> {
    Arc::new(Settings {
        id: "v".to_owned(),
        endpoint: Endpoint {
            url: None,
            region: "us-east-1".to_owned(),
            path_style: true,
            ca: None,
            checksums: Checksums::WhenRequired,
            anonymous: false,
            patience: 1000,
            stall: 1000,
        },
        credentials: None,
        bucket: "b".to_owned(),
        prefix: prefix.to_owned(),
        read_only,
        consistency: Consistency::Strict,
        uid: 0,
        gid: 0,
        file_mode: 0o644,
        dir_mode: 0o755,
        max_age: 1000,
        staging: "/nowhere".into(),
        cache: None,
        cache_size: 0,
        memory: 0,
        limit: limit.map(|bytes| Limit { bytes, notes: NOTES.to_owned() }),
    })
}

fn put(store: &Double, name: &str, value: &impl Serialize) {
    store.put_raw(&format!("{NOTES}{name}"), serde_json::to_vec(value).unwrap(), Metadata::default());
}

fn told(store: &Double) -> Shared {
    serde_json::from_slice(&store.object(&format!("{NOTES}{USAGE}")).unwrap().0).unwrap()
}

/// A volume that is as the controller makes it.
fn fresh(limit: u64) -> Arc<Double> {
    let store = Double::new();
    put(&store, LIMIT, &Limits { bytes: Some(limit), ..Limits::default() });
    put(&store, USAGE, &Shared { counted: now(), ..Shared::default() });
    store
}

async fn mount(store: &Arc<Double>, limit: u64) -> Usage {
    let usage = Usage::idle(settings("p/", Some(limit), false), store.clone());
    usage.look().await;
    usage
}

#[tokio::test]
async fn nothing_comes_back_of_a_volume_that_is_deleted_under_its_mount() {
    let store = fresh(100);
    let usage = mount(&store, 100).await;
    usage.grow(60).unwrap();
    for name in [USAGE, LIMIT] {
        store.delete(&format!("{NOTES}{name}"), None).await.unwrap();
    }
    usage.round().await;
    usage.close().await;
    assert!(store.object(&format!("{NOTES}{USAGE}")).is_none());
}

#[tokio::test]
async fn two_mounts_see_what_each_has_written() {
    let store = fresh(100);
    let (one, two) = (mount(&store, 100).await, mount(&store, 100).await);
    one.grow(60).unwrap();
    two.grow(30).unwrap();
    assert_eq!((one.figures(), two.figures()), ((60, Some(100)), (30, Some(100))));
    one.round().await;
    two.round().await;
    assert_eq!(two.figures(), (90, Some(100)));
    assert_eq!(two.grow(11), Err(Full));
    one.shrink(50);
    one.close().await;
    two.round().await;
    assert_eq!(two.figures(), (40, Some(100)));
    two.grow(60).unwrap();
    assert_eq!(two.grow(1), Err(Full));
    two.close().await;
    assert_eq!(told(&store).bytes, 100);
}

#[tokio::test]
async fn a_raised_limit_reaches_a_mount_in_use_and_a_lifted_one_too() {
    let store = fresh(10);
    let usage = mount(&store, 10).await;
    assert_eq!(usage.grow(11), Err(Full));
    put(&store, LIMIT, &Limits { bytes: Some(20), ..Limits::default() });
    usage.round().await;
    usage.grow(20).unwrap();
    assert_eq!(usage.grow(1), Err(Full));
    put(&store, LIMIT, &Limits::default());
    usage.round().await;
    usage.grow(1000).unwrap();
    assert_eq!(usage.figures(), (1020, None));
}

#[tokio::test]
async fn a_missing_figure_is_counted() {
    let store = Double::new();
    store.set_page(2);
    for key in ["p/a", "p/b/c", "p/d", "p/e", "p2/x"] {
        store.put_raw(key, vec![0; 10], Metadata::default());
    }
    let usage = mount(&store, 100).await;
    assert_eq!(usage.figures(), (40, Some(100)));
    assert_eq!(told(&store).bytes, 40);
    // A mount of the whole bucket does not count what is hidden from it.
    let other = Usage::idle(settings("", Some(100), false), store.clone());
    store.delete_raw(&format!("{NOTES}{USAGE}"));
    store.put_raw(".berth/trees/x/index", vec![0; 10], Metadata::default());
    other.look().await;
    assert_eq!(other.figures(), (50, Some(100)));
}

#[tokio::test]
async fn a_change_whose_answer_is_lost_counts_once() {
    for fault in [Fault::AnswerLost, Fault::Fails(StoreErrorKind::Unavailable)] {
        let store = fresh(100);
        let usage = mount(&store, 100).await;
        usage.grow(10).unwrap();
        store.order("put", 0, 1, fault.clone());
        usage.round().await;
        assert_eq!(usage.figures().0, 10, "{fault:?}");
        usage.grow(5).unwrap();
        usage.round().await;
        assert_eq!((usage.figures().0, told(&store).bytes), (15, 15), "{fault:?}");
    }
}

#[tokio::test]
async fn who_is_slower_adds_to_what_the_faster_one_told() {
    let store = fresh(100);
    let usage = mount(&store, 100).await;
    usage.grow(10).unwrap();
    store.fail_nth("put", 1, StoreErrorKind::Conflict);
    usage.round().await;
    assert_eq!((usage.figures().0, told(&store).bytes), (10, 10));
    store.fail("put", StoreErrorKind::Denied);
    usage.grow(10).unwrap();
    usage.round().await;
    assert_eq!((usage.figures().0, told(&store).bytes), (20, 10));
    store.heal();
    usage.round().await;
    assert_eq!((usage.figures().0, told(&store).bytes), (20, 20));
}

#[tokio::test]
async fn an_old_figure_is_replaced_by_what_is_there() {
    let store = fresh(100);
    store.put_raw("p/a", vec![0; 30], Metadata::default());
    put(&store, USAGE, &Shared { bytes: 77, counted: now() - COUNT, ..Shared::default() });
    let usage = mount(&store, 100).await;
    assert_eq!(usage.figures().0, 77);
    usage.round().await;
    assert_eq!((usage.figures().0, told(&store).bytes), (30, 30));
    assert!(now() - told(&store).counted < COUNT);
    // And not again, since it is young now.
    store.forget_calls();
    usage.round().await;
    assert_eq!(store.count("list"), 0);
}

#[tokio::test]
async fn a_reader_writes_nothing_and_a_volume_without_limit_asks_nothing() {
    let store = Double::new();
    store.put_raw("p/a", vec![0; 30], Metadata::default());
    let usage = Usage::idle(settings("p/", Some(100), true), store.clone());
    usage.look().await;
    usage.round().await;
    usage.close().await;
    assert_eq!((usage.figures(), store.count("put")), ((30, Some(100)), 0));
    store.forget_calls();
    let usage = Usage::open(settings("p/", None, false), store.clone()).await;
    usage.grow(u64::MAX).unwrap();
    usage.close().await;
    assert_eq!((usage.figures(), store.calls().len()), ((0, None), 0));
}

#[tokio::test]
async fn a_service_that_is_away_stops_no_mount() {
    let store = fresh(100);
    store.fail("*", StoreErrorKind::Unavailable);
    let usage = Usage::open(settings("p/", Some(100), false), store.clone()).await;
    usage.grow(10).unwrap();
    assert_eq!(usage.grow(91), Err(Full));
    store.heal();
    usage.close().await;
    assert_eq!(told(&store).bytes, 10);
}
