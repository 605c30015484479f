//! Tests of reading: how many GETs, how much memory, who shares what.

use bytes::Bytes;
use tempfile::TempDir;

use super::tests::{bytes, object, open, open_with, read, settings, small};
use super::*;
use crate::objectfs::store::StoreErrorKind;
use crate::objectfs::store::double::{Double, Fault};

const MIB: u64 = 1 << 20;

fn plain(length: u64) -> Vec<u8> {
    (0..length).map(|index| (index ^ (index >> 8) ^ (index >> 16)) as u8).collect()
}

/// Production sizes, no cache.
async fn large(folder: &TempDir, double: &Arc<Double>, memory: u64) -> Arc<Contents> {
    open_with(&Settings { cache: None, memory, ..settings(folder) }, double, Tuning::default()).await
}

#[tokio::test]
async fn a_sequential_reader_gets_large_parts_and_stays_in_its_budget() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = large(&folder, &double, 32 * MIB).await;
    let all = plain(64 * MIB);
    let content = object(&contents, &double, "a", all.clone()).await;
    let mut window = Window::default();
    for offset in (0..64 * MIB).step_by(128 << 10) {
        let found = read(&content, &mut window, offset, 128 << 10).await;
        assert!(found == all[offset as usize..offset as usize + (128 << 10)], "{offset}");
        assert!(window.holds() <= 32 * MIB);
    }
    let gets = double.count("get");
    assert!(gets <= 40, "{gets}");
    assert!(read(&content, &mut window, 64 * MIB, 4096).await.is_empty());
    drop(window);
    drop(content);
    while contents.budget.free() < 32 * MIB {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_random_reader_fetches_what_it_asks_for() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = large(&folder, &double, 32 * MIB).await;
    let all = plain(64 * MIB);
    let content = object(&contents, &double, "a", all.clone()).await;
    let (mut window, mut random) = (Window::default(), fastrand::Rng::with_seed(7));
    for _ in 0..50 {
        let offset = random.u64(MIB..63 * MIB);
        assert!(read(&content, &mut window, offset, 4096).await == all[offset as usize..offset as usize + 4096]);
        assert!(window.holds() <= MIB, "{}", window.holds());
    }
    assert!(double.count("get") <= 51);
}

#[tokio::test]
async fn the_first_read_asks_for_little() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = large(&folder, &double, 32 * MIB).await;
    let content = object(&contents, &double, "a", plain(16 * MIB)).await;
    let mut window = Window::default();
    read(&content, &mut window, 0, 4096).await;
    assert_eq!((double.count("get"), window.holds()), (1, MIB));
    // And nothing at all for what came with the open.
    double.forget_calls();
    let head = Bytes::from(plain(16 * MIB)).slice(..128 << 10);
    let content = contents.existing(content.base().unwrap(), Some(head.clone()));
    assert!(read(&content, &mut Window::default(), 100, 4096).await == head[100..4196]);
    assert_eq!(double.count("get"), 0);
}

#[tokio::test]
async fn two_handles_share_what_is_on_its_way() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = large(&folder, &double, 32 * MIB).await;
    let all = plain(8 * MIB);
    let content = object(&contents, &double, "a", all.clone()).await;
    let (mut one, mut two) = (Window::default(), Window::default());
    double.freeze();
    let both = async { tokio::join!(read(&content, &mut one, 0, 1 << 20), read(&content, &mut two, 0, 1 << 20)) };
    let thaw = async {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        double.thaw();
    };
    let ((first, second), ()) = tokio::join!(both, thaw);
    assert!(first == all[..1 << 20] && second == first);
    for offset in (MIB..8 * MIB).step_by(128 << 10) {
        assert!(read(&content, &mut one, offset, 128 << 10).await == read(&content, &mut two, offset, 128 << 10).await);
    }
    let gets = double.count("get");
    assert!(gets <= 8, "{gets}");
}

#[tokio::test]
async fn backward_and_strided_readers_do_not_fetch_twice() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = large(&folder, &double, 32 * MIB).await;
    let all = plain(16 * MIB);
    let content = object(&contents, &double, "a", all.clone()).await;
    let mut window = Window::default();
    for block in (0..128_u64).rev() {
        let at = block * (128 << 10);
        assert!(read(&content, &mut window, at, 128 << 10).await == all[at as usize..at as usize + (128 << 10)]);
    }
    let gets = double.count("get");
    assert!(gets <= 24, "{gets}");
}

#[tokio::test]
async fn many_readers_make_progress_on_very_little_memory() {
    for memory in [100, 700, 5000] {
        let (folder, double) = (TempDir::new().unwrap(), Double::new());
        let settings = Settings { cache: None, memory, ..settings(&folder) };
        let contents = open_with(&settings, &double, small()).await;
        let mut random = fastrand::Rng::with_seed(memory);
        let all = bytes(&mut random, 9000);
        let mut readers = Vec::new();
        for number in 0..50 {
            let content = object(&contents, &double, &format!("{number}"), all.clone()).await;
            let (all, mut random) = (all.clone(), fastrand::Rng::with_seed(number));
            readers.push(tokio::spawn(async move {
                let mut window = Window::default();
                for step in 0..40 {
                    let at = if step < 20 { step * 450 } else { random.u64(0..8500) };
                    let found = read(&content, &mut window, at, 450).await;
                    assert!(found == all[at as usize..(at as usize + 450).min(9000)], "{at}");
                }
                // Held to the end of the test: a handle that has stopped reading stops nobody.
                (content, window)
            }));
        }
        let mut kept = Vec::new();
        for reader in readers {
            kept.push(reader.await.unwrap());
        }
    }
}

#[tokio::test]
async fn a_failed_get_is_an_error_once_and_a_changed_version_is_told() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = large(&folder, &double, 32 * MIB).await;
    let all = plain(4 * MIB);
    let content = object(&contents, &double, "a", all.clone()).await;
    let mut window = Window::default();
    double.order("get", 0, 1, Fault::Truncated(200 << 10));
    let error = content.read(&mut window, 0, 512 << 10).await.err().unwrap();
    assert!(matches!(error, ContentError::Store(error) if error.kind == StoreErrorKind::Corrupt));
    assert!(read(&content, &mut window, 0, 512 << 10).await == all[..512 << 10]);
    // What is in memory is still that version's, and good; then it goes.
    drop(window);
    double.put_raw("a", "other", Metadata::default());
    let error = content.read(&mut Window::default(), 3 * MIB, 4096).await.err().unwrap();
    assert!(matches!(error, ContentError::Changed(_)), "{error}");
}

#[tokio::test]
async fn what_one_mount_has_read_the_next_finds_on_the_disk() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = open(&folder, &double).await;
    let mut random = fastrand::Rng::with_seed(3);
    let all = bytes(&mut random, 9000);
    let content = object(&contents, &double, "a", all.clone()).await;
    let version = content.base().unwrap();
    let path = folder.path().join("cache");
    let count = || {
        let shelves = std::fs::read_dir(&path).into_iter().flatten().map(|shelf| shelf.unwrap().path());
        shelves.map(|shelf| std::fs::read_dir(shelf).unwrap().count()).sum::<usize>()
    };
    // The writing is behind the reading, and what it can't keep up with is left out.
    while count() < 18 {
        let mut window = Window::default();
        for at in (0..9000).step_by(300) {
            assert!(read(&content, &mut window, at, 300).await == all[at as usize..at as usize + 300]);
        }
    }
    drop(content);
    drop(contents);
    double.forget_calls();
    let contents = open(&folder, &double).await;
    let content = contents.existing(version.clone(), None);
    assert!(read(&content, &mut Window::default(), 0, 9000).await == all);
    assert_eq!(double.count("get"), 0);
    assert!(contents.progress().cache_hit_bytes >= 9000);
    // Another version is not found there.
    let etag = double.put_raw("a", vec![1; 9000], Metadata::default());
    let content = contents.existing(Version { etag, ..version }, None);
    assert!(read(&content, &mut Window::default(), 0, 9000).await == vec![1; 9000]);
}

#[tokio::test]
async fn a_window_that_is_not_used_lets_its_memory_go() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let settings = Settings { cache: None, ..settings(&folder) };
    let tuning = Tuning { idle: std::time::Duration::from_millis(20), ..small() };
    let contents = open_with(&settings, &double, tuning).await;
    let content = object(&contents, &double, "a", plain(9000)).await;
    let mut window = Window::default();
    read(&content, &mut window, 0, 1000).await;
    while window.holds() > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(read(&content, &mut window, 1000, 1000).await == plain(9000)[1000..2000]);
}
