//! Files against a row of bytes, over the bucket in memory, with faults and deaths.

use std::collections::BTreeMap;

use tempfile::TempDir;

use super::*;
use crate::objectfs::settings::{Checksums, Consistency, Endpoint};
use crate::objectfs::store::StoreErrorKind;
use crate::objectfs::store::double::Double;

pub(super) fn settings(folder: &TempDir) -> Settings {
    let endpoint = Endpoint {
        url: Some("http://double".to_owned()),
        region: "none".to_owned(),
        path_style: true,
        ca: None,
        checksums: Checksums::WhenRequired,
        anonymous: true,
        patience: 1000,
        stall: 1000,
    };
    Settings {
        id: "volume".to_owned(),
        endpoint,
        credentials: None,
        bucket: "bucket".to_owned(),
        prefix: String::new(),
        read_only: false,
        consistency: Consistency::Strict,
        uid: 0,
        gid: 0,
        file_mode: 0o644,
        dir_mode: 0o755,
        max_age: 1000,
        staging: folder.path().join("staging"),
        cache: Some(folder.path().join("cache")),
        cache_size: 64 << 20,
        memory: 32 << 20,
        limit: None,
    }
}

/// Everything happens with small files too.
pub(super) fn small() -> Tuning {
    Tuning {
        inline: 256,
        inline_total: 4096,
        longest_log: 700,
        descriptors: 3,
        whole: 1000,
        part: 500,
        least_part: 200,
        copy: (300, 1200),
        parts: 100,
        block: 512,
        piece: 128,
        get: 2048,
        window: 512,
        slack: 256,
        ..Tuning::default()
    }
}

pub(super) async fn open(folder: &TempDir, double: &Arc<Double>) -> Arc<Contents> {
    double.set_least_part(200);
    open_with(&settings(folder), double, small()).await
}

/// A predecessor may still be giving its files back.
pub(super) async fn open_with(settings: &Settings, double: &Arc<Double>, tuning: Tuning) -> Arc<Contents> {
    loop {
        match Contents::tuned(settings, double.clone(), tuning.clone()).await {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => tokio::task::yield_now().await,
            opened => return opened.unwrap(),
        }
    }
}

pub(super) fn intent(key: &str, time: u64) -> Intent {
    let user = BTreeMap::from([("mtime".to_owned(), time.to_string())]);
    Intent { key: key.to_owned(), metadata: Metadata { content_type: None, user }, exclusive: false }
}

pub(super) fn bytes(random: &mut fastrand::Rng, length: usize) -> Vec<u8> {
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

pub(super) async fn read(content: &Content, window: &mut Window, offset: u64, size: u32) -> Vec<u8> {
    content.read(window, offset, size).await.unwrap().concat()
}

async fn all(content: &Content) -> Vec<u8> {
    read(content, &mut Window::default(), 0, u32::MAX).await
}

/// An object of so many bytes, and the file over it.
pub(super) async fn object(contents: &Arc<Contents>, double: &Double, key: &str, bytes: Vec<u8>) -> Content {
    let size = bytes.len() as u64;
    let etag = double.put_raw(key, bytes, Metadata::default());
    contents.existing(Version { key: key.to_owned(), etag, size }, None)
}

/// One random change to both; whether it was made is what the file says.
async fn change(random: &mut fastrand::Rng, content: &Content, model: &mut Vec<u8>, intent: &Intent) {
    let most = 6000;
    match random.u32(0..10) {
        0 => {
            let size = if random.bool() { random.usize(0..300) } else { random.usize(0..most) };
            content.resize(size as u64, intent).await.unwrap();
            model.resize(size, 0);
        }
        1 => {
            let (start, length) = (random.usize(0..most), random.usize(0..2000));
            content.punch(start as u64, length as u64, intent).await.unwrap();
            let end = (start + length).min(model.len());
            model[start.min(end)..end].fill(0);
        }
        _ => {
            let start = match random.u32(0..3) {
                0 => model.len(),
                1 => random.usize(0..200),
                _ => random.usize(0..most),
            };
            let length = if random.bool() { random.usize(1..60) } else { random.usize(1..1500) };
            let data = bytes(random, length);
            content.write(start as u64, &Bytes::from(data.clone()), intent).await.unwrap();
            if model.len() < start + length {
                model.resize(start + length, 0);
            }
            model[start..start + length].copy_from_slice(&data);
        }
    }
}

#[tokio::test]
async fn a_file_is_what_a_row_of_bytes_is() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (folder, double) = (TempDir::new().unwrap(), Double::new());
        let contents = open(&folder, &double).await;
        let mut model = Vec::new();
        let content = if random.bool() {
            contents.new_file()
        } else {
            let size = random.usize(0..5000);
            model = bytes(&mut random, size);
            object(&contents, &double, "a", model.clone()).await
        };
        let mut window = Window::default();
        for step in 0..80 {
            let intent = intent("a", step / 3);
            match random.u32(0..12) {
                0 => {
                    let version = content.commit(&intent).await.unwrap();
                    let object = double.object("a").unwrap();
                    assert_eq!(
                        (object.0, version.size),
                        (Bytes::from(model.clone()), model.len() as u64),
                        "seed {seed}"
                    );
                    assert_eq!(content.base(), Some(version));
                    assert!(!content.is_dirty());
                }
                1 => content.remember(&intent).await.unwrap(),
                2..6 => {
                    let start = random.usize(0..6000);
                    let size = random.usize(0..3000);
                    let end = (start + size).min(model.len());
                    let found = read(&content, &mut window, start as u64, size as u32).await;
                    assert!(found == model[start.min(end)..end], "seed {seed} step {step}: {start} {size}");
                }
                _ => change(&mut random, &content, &mut model, &intent).await,
            }
            assert_eq!(content.size(), model.len() as u64, "seed {seed} step {step}");
        }
        assert!(all(&content).await == model, "seed {seed}");
        content.discard().await;
        assert_eq!(contents.progress().dirty_bytes, 0);
        assert_eq!(contents.progress().dirty_files, 0);
        while contents.folder.descriptors() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(double.uploads().is_empty());
    }
}

#[tokio::test]
async fn a_file_that_was_acknowledged_is_found_by_a_successor() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(1000 + seed);
        let (folder, double) = (TempDir::new().unwrap(), Double::new());
        let mut contents = open(&folder, &double).await;
        let mut model = Vec::new();
        let mut content = if random.bool() {
            contents.new_file()
        } else {
            let size = random.usize(0..5000);
            model = bytes(&mut random, size);
            object(&contents, &double, "a", model.clone()).await
        };
        for step in 0..60 {
            change(&mut random, &content, &mut model, &intent("a", step)).await;
            if random.u32(0..4) == 0 && content.inner.look(|state| state.staged.is_some()) {
                let base = content.base();
                drop((content, contents));
                contents = open(&folder, &double).await;
                let mut found = contents.recover().await;
                assert_eq!(found.len(), 1, "seed {seed} step {step}");
                let recovered = found.remove(0);
                assert_eq!((recovered.key.as_str(), recovered.content.base()), ("a", base));
                content = recovered.content;
                assert!(content.is_dirty());
                assert!(all(&content).await == model, "seed {seed} step {step}");
                assert_eq!(content.size(), model.len() as u64);
            }
            if random.u32(0..10) == 0 {
                content.commit(&intent("a", step)).await.unwrap();
                assert!(double.object("a").unwrap().0 == model, "seed {seed} step {step}");
            }
        }
        content.commit(&intent("a", 99)).await.unwrap();
        assert!(double.object("a").unwrap().0 == model);
    }
}

#[tokio::test]
async fn whatever_call_fails_a_second_commit_is_right() {
    for seed in 0..40 {
        for nth in 1..12 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (folder, double) = (TempDir::new().unwrap(), Double::new());
            let contents = open(&folder, &double).await;
            let size = random.usize(0..5000);
            let mut model = bytes(&mut random, size);
            let content = object(&contents, &double, "a", model.clone()).await;
            for _ in 0..6 {
                change(&mut random, &content, &mut model, &intent("a", 1)).await;
            }
            double.fail_nth("*", nth, StoreErrorKind::Unavailable);
            if let Err(error) = content.commit(&intent("a", 2)).await {
                assert!(matches!(error, ContentError::Store(_)), "{error}");
                assert!(content.is_dirty());
                double.heal();
                assert!(all(&content).await == model, "seed {seed} call {nth}");
                content.commit(&intent("a", 2)).await.unwrap();
            }
            assert!(double.object("a").unwrap().0 == model, "seed {seed} call {nth}");
        }
    }
}

#[tokio::test]
async fn what_somebody_else_has_changed_is_kept_beside() {
    for size in [40_usize, 5000] {
        let (folder, double) = (TempDir::new().unwrap(), Double::new());
        let contents = open(&folder, &double).await;
        let content = object(&contents, &double, "d/a", vec![7; size]).await;
        content.write(10, &Bytes::from_static(b"ours"), &intent("d/a", 1)).await.unwrap();
        double.put_raw("d/a", "theirs", Metadata::default());
        let error = content.commit(&intent("d/a", 1)).await.unwrap_err();
        assert!(matches!(error, ContentError::Changed(_)), "{error}");
        assert_eq!(double.object("d/a").unwrap().0, "theirs");
        assert!(content.is_dirty());
        let path = content.set_aside(&intent("d/a", 1)).await.unwrap();
        assert!(!content.is_dirty());
        assert!(path.starts_with(folder.path().join("staging/volume/conflicts")), "{}", path.display());
        let kept = std::fs::read(&path).unwrap();
        assert_eq!((kept.len(), &kept[10..14]), (size, &b"ours"[..]));
        let sidecar = std::fs::read_to_string(path.with_added_extension("json")).unwrap();
        assert!(sidecar.contains("\"d/a\"") && sidecar.contains("\"complete\": false"), "{sidecar}");
        // And the file goes on with what is there.
        content.replaced(Version { key: "d/a".to_owned(), etag: double.etag("d/a").unwrap(), size: 6 });
        assert_eq!(all(&content).await, b"theirs");
        assert_eq!(contents.progress().dirty_files, 0);
    }
}

#[tokio::test]
async fn a_new_file_that_must_be_new_takes_nobodys_place() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = open(&folder, &double).await;
    let content = contents.new_file();
    let exclusive = Intent { exclusive: true, ..intent("a", 1) };
    content.write(0, &Bytes::from(vec![1; 3000]), &exclusive).await.unwrap();
    double.put_raw("a", "theirs", Metadata::default());
    assert!(matches!(content.commit(&exclusive).await, Err(ContentError::Changed(_))));
    assert!(double.uploads().is_empty());
    let elsewhere = Intent { exclusive: true, ..intent("b", 1) };
    content.commit(&elsewhere).await.unwrap();
    assert_eq!(double.object("b").unwrap().0, vec![1; 3000]);
}

#[tokio::test]
async fn a_worker_killed_right_after_its_commit_leaves_no_conflict() {
    for size in [40, 3000] {
        let (folder, double) = (TempDir::new().unwrap(), Double::new());
        let contents = open(&folder, &double).await;
        let content = object(&contents, &double, "a", vec![7; 50]).await;
        content.write(0, &Bytes::from(vec![1; size]), &intent("a", 1)).await.unwrap();
        drop((content, contents));
        // What the dead worker had put there.
        let ours = [vec![1; size], vec![7; 50_usize.saturating_sub(size)]].concat();
        double.put_raw("a", ours.clone(), intent("a", 1).metadata);
        let contents = open(&folder, &double).await;
        let found = contents.recover().await.remove(0);
        let intent = Intent { key: found.key, metadata: found.metadata, exclusive: false };
        found.content.commit(&intent).await.unwrap();
        assert!(!found.content.is_dirty());
        assert_eq!(all(&found.content).await, ours);
        assert!(contents.recover().await.is_empty());
    }
}

#[tokio::test]
async fn an_append_to_a_large_file_sends_little() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = open_with(&settings(&folder), &double, Tuning::default()).await;
    let content = object(&contents, &double, "a", vec![7; 20 << 20]).await;
    content.write(20 << 20, &Bytes::from_static(b"more"), &intent("a", 1)).await.unwrap();
    content.commit(&intent("a", 1)).await.unwrap();
    assert_eq!(double.object("a").unwrap().0.len(), (20 << 20) + 4);
    assert_eq!((double.count("upload_part"), double.count("get"), double.count("copy_part")), (1, 0, 1));
    // The base is elsewhere: renamed while it was dirty.
    content.write(0, &Bytes::from_static(b"head"), &intent("a", 1)).await.unwrap();
    let version = content.commit(&intent("b", 1)).await.unwrap();
    assert_eq!(version.key, "b");
    assert_eq!(double.object("b").unwrap().0[..8], *b"head\x07\x07\x07\x07");
}

#[tokio::test]
async fn holes_are_told_and_nothing_is_past_the_largest_object() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    let contents = open(&folder, &double).await;
    let content = contents.new_file();
    content.write(5000, &Bytes::from_static(b"data"), &intent("a", 1)).await.unwrap();
    content.resize(9000, &intent("a", 1)).await.unwrap();
    let seek = |offset, hole| content.seek(offset, hole);
    assert_eq!((seek(0, false), seek(0, true), seek(5001, true)), (Some(5000), Some(0), Some(5004)));
    assert_eq!((seek(5004, false), seek(5002, false), seek(9000, true)), (None, Some(5002), None));
    for tried in [
        content.write(LARGEST - 2, &Bytes::from_static(b"data"), &intent("a", 1)).await,
        content.write(u64::MAX - 2, &Bytes::from_static(b"data"), &intent("a", 1)).await,
        content.resize(LARGEST + 1, &intent("a", 1)).await,
    ] {
        assert!(matches!(tried, Err(ContentError::TooLarge)));
    }
    assert_eq!(content.size(), 9000);
}

#[tokio::test]
async fn parts_are_sent_while_a_file_is_still_being_written() {
    let mut early = 0;
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (folder, double) = (TempDir::new().unwrap(), Double::new());
        double.set_least_part(200);
        let tuning = Tuning { early: 1500, early_after: std::time::Duration::ZERO, ..small() };
        let contents = open_with(&settings(&folder), &double, tuning).await;
        let (content, mut model) = (contents.new_file(), Vec::new());
        if seed % 3 == 1 {
            double.fail_nth("*", random.usize(1..20), StoreErrorKind::Unavailable);
        }
        for step in 0..30 {
            let intent = intent("a", step);
            // Mostly in sequence, and back to the head now and then.
            let start = if random.u32(0..6) == 0 { random.usize(0..=model.len()) } else { model.len() };
            let length = random.usize(1..700);
            let data = bytes(&mut random, length);
            content.write(start as u64, &Bytes::from(data.clone()), &intent).await.unwrap();
            model.resize(model.len().max(start + length), 0);
            model[start..start + length].copy_from_slice(&data);
            if random.u32(0..10) == 0 {
                let size = random.usize(0..=model.len());
                content.resize(size as u64, &intent).await.unwrap();
                model.resize(size, 0);
            }
            for _ in 0..random.u32(0..10) {
                tokio::task::yield_now().await;
            }
        }
        let before = double.count("upload_part");
        let mut done = content.commit(&intent("a", 99)).await;
        if done.is_err() {
            done = content.commit(&intent("a", 99)).await;
        }
        done.unwrap();
        early += before;
        let (found, metadata) = double.object("a").unwrap();
        assert!(found == model, "seed {seed}");
        assert_eq!(metadata, intent("a", 99).metadata);
        double.heal();
        drop((content, contents));
        // Nothing of it stays in the bucket.
        while !double.uploads().is_empty() && seed % 3 != 1 {
            tokio::task::yield_now().await;
        }
        while double.keys() != ["a"] && seed % 3 != 1 {
            tokio::task::yield_now().await;
        }
    }
    assert!(early > 100, "{early}");
}

#[tokio::test]
async fn a_successor_gives_up_what_was_sent_early() {
    let (folder, double) = (TempDir::new().unwrap(), Double::new());
    double.set_least_part(200);
    let tuning = Tuning { early: 1500, early_after: std::time::Duration::ZERO, ..small() };
    let contents = open_with(&settings(&folder), &double, tuning).await;
    let content = contents.new_file();
    for step in 0..10_u64 {
        content.write(step * 500, &Bytes::from(vec![1; 500]), &intent("a", 1)).await.unwrap();
    }
    while double.count("upload_part") < 10 {
        tokio::task::yield_now().await;
    }
    drop((content, contents));
    assert_eq!(double.uploads().len(), 1);
    let contents = open(&folder, &double).await;
    let found = contents.recover().await.remove(0);
    found.content.commit(&intent("a", 1)).await.unwrap();
    while !double.uploads().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!((double.keys(), double.object("a").unwrap().0), (vec!["a".to_owned()], Bytes::from(vec![1; 5000])));
}
