//! What every store must do, whatever is behind it: the same suite runs on the double (here) and on real services
//! (`tests/store.rs`, which takes this file in). Each part works below a prefix of its own in an empty bucket.

use std::io::Write;
use std::sync::Arc;

use futures_util::StreamExt;

use super::*;

/// 5 MiB: what a part has at least.
const PART: usize = 5 << 20;

fn bytes(text: impl Into<Bytes>) -> Payload {
    Payload::Bytes(text.into())
}

fn about(pairs: &[(&str, &str)]) -> Metadata {
    let user = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Metadata { content_type: Some("text/x-contract".to_owned()), user }
}

/// Bytes in which each range differs from each other.
fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

async fn all(body: Body) -> Vec<u8> {
    let pieces: Vec<_> = body.map(|piece| piece.unwrap()).collect().await;
    pieces.concat()
}

async fn read(store: &dyn Store, key: &str) -> Vec<u8> {
    all(store.get(key, None, None).await.unwrap().1).await
}

#[track_caller]
fn kind<T>(result: StoreResult<T>) -> StoreErrorKind {
    match result {
        Ok(_) => panic!("it worked"),
        Err(error) => {
            assert!(error.message.starts_with("cannot "), "{error}");
            error.kind
        }
    }
}

const NONE: Condition = Condition::None;

/// Runs it all.
pub(crate) async fn holds(store: &dyn Store) {
    objects(store).await;
    ranges(store).await;
    metadata_is_kept(store).await;
    conditions(store).await;
    odd_keys(store).await;
    listings(store).await;
    files_are_streamed(store).await;
    uploads(store).await;
    large_copies(store).await;
    many_deletes(store).await;
}

async fn objects(store: &dyn Store) {
    assert_eq!(kind(store.head("objects/a").await), StoreErrorKind::NotFound);
    assert_eq!(kind(store.get("objects/a", None, None).await), StoreErrorKind::NotFound);
    let etag = store.put("objects/a", bytes("one"), &about(&[]), &NONE).await.unwrap();
    let head = store.head("objects/a").await.unwrap();
    assert_eq!((head.size, &head.etag), (3, &etag));
    assert!(head.modified.elapsed().map_or(0, |age| age.as_secs()) < 3600);
    let (got, body) = store.get("objects/a", None, Some(&etag)).await.unwrap();
    assert_eq!((got.size, &got.etag, got.modified), (3, &etag, head.modified));
    assert_eq!(all(body).await, b"one");
    let two = store.put("objects/a", bytes("two!"), &about(&[]), &NONE).await.unwrap();
    assert_ne!(two, etag);
    assert_eq!(kind(store.get("objects/a", None, Some(&etag)).await), StoreErrorKind::Conflict);
    // Empty objects, which also mark directories.
    store.put("objects/dir/", bytes(""), &about(&[]), &NONE).await.unwrap();
    assert_eq!(store.head("objects/dir/").await.unwrap().size, 0);
    assert_eq!(read(store, "objects/dir/").await, b"");
    store.put("objects/dir/inside", bytes("x"), &about(&[]), &NONE).await.unwrap();
    store.delete("objects/dir/", None).await.unwrap();
    assert_eq!(kind(store.head("objects/dir/").await), StoreErrorKind::NotFound);
    assert_eq!(read(store, "objects/dir/inside").await, b"x");
    // A key and keys below it are independent.
    store.put("objects/a/below", bytes("y"), &about(&[]), &NONE).await.unwrap();
    assert_eq!(read(store, "objects/a").await, b"two!");
    store.delete("objects/a", None).await.unwrap();
    store.delete("objects/a", None).await.unwrap();
    assert_eq!(kind(store.head("objects/a").await), StoreErrorKind::NotFound);
    assert_eq!(read(store, "objects/a/below").await, b"y");
}

async fn ranges(store: &dyn Store) {
    let text = pattern(300_000);
    let etag = store.put("ranges", bytes(text.clone()), &about(&[]), &NONE).await.unwrap();
    for range in [0..1, 0..300_000, 5..6, 100_000..250_000, 299_999..300_000, 299_000..400_000, 7..u64::MAX] {
        let (head, body) = store.get("ranges", Some(range.clone()), Some(&etag)).await.unwrap();
        assert_eq!((head.size, &head.etag), (300_000, &etag), "{range:?}");
        let end = range.end.min(300_000) as usize;
        assert!(all(body).await == text[range.start as usize..end], "{range:?}");
    }
    for range in [300_000..300_001, 400_000..500_000, 10..10] {
        let (head, body) = store.get("ranges", Some(range.clone()), None).await.unwrap();
        assert_eq!((head.size, &head.etag), (300_000, &etag), "{range:?}");
        assert_eq!(all(body).await, b"", "{range:?}");
    }
    store.put("ranges-empty", bytes(""), &about(&[]), &NONE).await.unwrap();
    let (head, body) = store.get("ranges-empty", Some(0..100), None).await.unwrap();
    assert_eq!((head.size, all(body).await.len()), (0, 0));
    let other = store.put("ranges", bytes("other"), &about(&[]), &NONE).await.unwrap();
    assert_ne!(other, etag);
    assert_eq!(kind(store.get("ranges", Some(0..2), Some(&etag)).await), StoreErrorKind::Conflict);
    assert_eq!(kind(store.get("ranges", Some(300_000..300_001), Some(&etag)).await), StoreErrorKind::Conflict);
    assert_eq!(kind(store.get("ranges-none", Some(0..2), None).await), StoreErrorKind::NotFound);
}

async fn metadata_is_kept(store: &dyn Store) {
    let first =
        about(&[("mode", "33188"), ("mtime", "1700000000.123456789"), ("xattr", "%7B%22user.a%22%3A%22YQ==%22%7D")]);
    let etag = store.put("meta/a", bytes("data"), &first, &NONE).await.unwrap();
    assert_eq!(store.head("meta/a").await.unwrap().metadata, first);
    assert_eq!(store.get("meta/a", Some(0..1), None).await.unwrap().0.metadata, first);
    // A copy keeps it, or takes what is given, content type and all.
    store.copy("meta/a", Some(&etag), "meta/b", None, &NONE).await.unwrap();
    assert_eq!(store.head("meta/b").await.unwrap().metadata, first);
    let second = Metadata { content_type: Some("application/x-other".to_owned()), ..about(&[("mode", "33152")]) };
    store.copy("meta/a", None, "meta/c", Some(&second), &NONE).await.unwrap();
    assert_eq!(store.head("meta/c").await.unwrap().metadata, second);
    // In place.
    let replaced = store.copy("meta/a", Some(&etag), "meta/a", Some(&second), &NONE).await.unwrap();
    let head = store.head("meta/a").await.unwrap();
    assert_eq!((&head.metadata, &head.etag), (&second, &replaced));
    assert_eq!(read(store, "meta/a").await, b"data");
    assert_eq!(read(store, "meta/c").await, b"data");
    // A version that is gone, a key that never was.
    let wrong = Etag("\"00000000000000000000000000000000\"".to_owned());
    assert_eq!(kind(store.copy("meta/a", Some(&wrong), "meta/d", None, &NONE).await), StoreErrorKind::Conflict);
    assert_eq!(kind(store.copy("meta/none", None, "meta/d", None, &NONE).await), StoreErrorKind::NotFound);
    assert_eq!(kind(store.head("meta/d").await), StoreErrorKind::NotFound);
    // What other tools wrote, in letters of the world.
    let foreign = about(&[("author", "Grüße, 世界"), ("note", "plain & <simple>")]);
    store.put("meta/e", bytes(""), &foreign, &NONE).await.unwrap();
    assert_eq!(store.head("meta/e").await.unwrap().metadata, foreign);
    // A listing tells all of it, or nothing.
    let listing = ListRequest { prefix: "meta/".into(), metadata: true, ..ListRequest::default() };
    let page = store.list(&listing).await.unwrap();
    assert_eq!(page.objects.len(), 4);
    for object in page.objects {
        let wanted = store.head(&object.key).await.unwrap().metadata;
        assert_eq!(object.metadata, store.abilities().listed_metadata.then_some(wanted), "{}", object.key);
    }
    let page = store.list(&ListRequest { metadata: false, ..listing }).await.unwrap();
    assert!(page.objects.iter().all(|object| object.metadata.is_none()));
}

async fn conditions(store: &dyn Store) {
    let none = about(&[]);
    let wrong = Condition::Is(Etag("\"00000000000000000000000000000000\"".to_owned()));
    assert_eq!(kind(store.put("if/a", bytes("0"), &none, &wrong).await), StoreErrorKind::Conflict);
    let etag = store.put("if/a", bytes("1"), &none, &Condition::Absent).await.unwrap();
    assert_eq!(kind(store.put("if/a", bytes("2"), &none, &Condition::Absent).await), StoreErrorKind::Conflict);
    assert_eq!(kind(store.put("if/a", bytes("2"), &none, &wrong).await), StoreErrorKind::Conflict);
    assert_eq!(read(store, "if/a").await, b"1");
    let etag = store.put("if/a", bytes("3"), &none, &Condition::Is(etag)).await.unwrap();
    assert_eq!(read(store, "if/a").await, b"3");
    // Of a copy's destination.
    let copy = store.copy("if/a", None, "if/b", None, &Condition::Absent).await.unwrap();
    assert_eq!(kind(store.copy("if/a", None, "if/b", None, &Condition::Absent).await), StoreErrorKind::Conflict);
    assert_eq!(kind(store.copy("if/a", None, "if/b", None, &wrong).await), StoreErrorKind::Conflict);
    store.copy("if/a", None, "if/b", None, &Condition::Is(copy)).await.unwrap();
    // Of what is deleted.
    let Condition::Is(other) = &wrong else { unreachable!() };
    assert_eq!(kind(store.delete("if/a", Some(other)).await), StoreErrorKind::Conflict);
    assert_eq!(read(store, "if/a").await, b"3");
    store.delete("if/a", Some(&etag)).await.unwrap();
    store.delete("if/a", Some(&etag)).await.unwrap();
    assert_eq!(kind(store.head("if/a").await), StoreErrorKind::NotFound);
    // Of what is made of parts.
    let etag = store.put("if/c", bytes("1"), &none, &NONE).await.unwrap();
    for (condition, works) in [(Condition::Absent, false), (wrong, false), (Condition::Is(etag), true)] {
        let upload = store.begin_upload("if/c", &none).await.unwrap();
        let part = store.upload_part("if/c", &upload, 1, bytes("2")).await.unwrap();
        let finished = store.finish_upload("if/c", &upload, &[part], &condition).await;
        assert_eq!(finished.as_ref().err().map(|error| error.kind), (!works).then_some(StoreErrorKind::Conflict));
        assert_eq!(read(store, "if/c").await, if works { b"2" } else { b"1" });
        store.abort_upload("if/c", &upload).await.unwrap();
    }
}

async fn odd_keys(store: &dyn Store) {
    let names = [
        "a b",
        "a+b",
        "a%20b",
        "100%",
        "a?b=c&d",
        "a#b",
        "ünï/世界",
        "\"quoted\"",
        "<tag>&amp;",
        "a\\b",
        "~!@$^*()_-={}|[];:',.",
        "ctrl\u{1}\u{1f}",
        "new\nline",
        "back\r",
        "emoji😀",
        "end ",
        ".hidden",
        "a:b",
        "dir.with.dots/x",
        "=?UTF-8?B?YQ==?=",
    ];
    for name in names {
        let key = format!("odd/{name}");
        store.put(&key, bytes(name), &about(&[]), &NONE).await.unwrap_or_else(|error| panic!("{name:?}: {error}"));
        assert_eq!(read(store, &key).await, name.as_bytes(), "{name:?}");
        let copied = format!("odd-copy/{name}");
        store.copy(&key, None, &copied, None, &NONE).await.unwrap_or_else(|error| panic!("{name:?}: {error}"));
        assert_eq!(read(store, &copied).await, name.as_bytes(), "{name:?}");
    }
    let mut wanted: Vec<_> = names.iter().map(|name| format!("odd/{name}")).collect();
    wanted.sort();
    let page = store.list(&ListRequest { prefix: "odd/".into(), ..ListRequest::default() }).await.unwrap();
    let found: Vec<_> = page.objects.iter().map(|object| object.key.clone()).collect();
    assert_eq!(found, wanted);
    let odd = ListRequest { prefix: "odd/ünï".into(), delimiter: true, ..ListRequest::default() };
    assert_eq!(store.list(&odd).await.unwrap().prefixes, ["odd/ünï/"]);
    store.delete_many(&wanted).await.unwrap();
    let page = store.list(&ListRequest { prefix: "odd/".into(), ..ListRequest::default() }).await.unwrap();
    assert!(page.objects.is_empty(), "{:?}", page.objects);
}

/// All pages; none may be longer than the limit.
async fn pages(store: &dyn Store, mut request: ListRequest) -> (Vec<String>, Vec<String>) {
    let (mut keys, mut prefixes) = (Vec::new(), Vec::new());
    loop {
        let page = store.list(&request).await.unwrap();
        assert!(page.objects.len() + page.prefixes.len() <= request.limit.unwrap_or(1000) as usize);
        keys.extend(page.objects.into_iter().map(|object| object.key));
        prefixes.extend(page.prefixes);
        let Some(token) = page.token else { return (keys, prefixes) };
        request.token = Some(token);
    }
}

async fn listings(store: &dyn Store) {
    // No `a` beside `a/1`: MinIO leaves out of listings what lies below a key that is an object itself.
    let keys = ["a!", "a-b", "a/", "a/1", "a/2", "a0", "b", "c/d/e", "c/f", "d/"].map(|key| format!("list/{key}"));
    for key in &keys {
        store.put(key, bytes(key.clone()), &about(&[]), &NONE).await.unwrap();
    }
    let all = ListRequest { prefix: "list/".into(), ..ListRequest::default() };
    // `-` sorts before `/`, and that before `0`.
    let mut sorted = keys.to_vec();
    sorted.sort();
    assert_eq!(pages(store, all.clone()).await.0, sorted);
    for limit in [1, 2, 3] {
        let small = ListRequest { limit: Some(limit), ..all.clone() };
        assert_eq!(pages(store, small.clone()).await.0, sorted);
        let (found, prefixes) = pages(store, ListRequest { delimiter: true, ..small }).await;
        assert_eq!(found, ["list/a!", "list/a-b", "list/a0", "list/b"]);
        assert_eq!(prefixes, ["list/a/", "list/c/", "list/d/"]);
    }
    let after = ListRequest { after: Some("list/a/1".into()), ..all.clone() };
    assert_eq!(pages(store, after).await.0, &sorted[4..]);
    let below = ListRequest { prefix: "list/a/".into(), delimiter: true, ..ListRequest::default() };
    assert_eq!(pages(store, below).await.0, ["list/a/", "list/a/1", "list/a/2"]);
    let page = store.list(&ListRequest { limit: Some(1), ..all }).await.unwrap();
    let head = store.head("list/a!").await.unwrap();
    let first = &page.objects[0];
    assert_eq!((&first.etag, first.size, first.modified), (&head.etag, 7, head.modified));
    let none = ListRequest { prefix: "list/none".into(), ..ListRequest::default() };
    assert_eq!(pages(store, none).await, (vec![], vec![]));
}

async fn files_are_streamed(store: &dyn Store) {
    let text = pattern(1_000_000);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&text).unwrap();
    let file = Arc::new(file);
    let payload = Payload::File(file.clone(), 1000..900_001);
    let etag = store.put("file", payload.clone(), &about(&[]), &Condition::Absent).await.unwrap();
    assert!(read(store, "file").await == text[1000..900_001]);
    assert_eq!(store.head("file").await.unwrap().etag, etag);
    let empty = Payload::File(file.clone(), 5..5);
    store.put("file-empty", empty, &about(&[]), &NONE).await.unwrap();
    assert_eq!(read(store, "file-empty").await, b"");
    // What the file does not have is not sent.
    let short = Payload::File(file, 900_000..1_100_000);
    assert_eq!(kind(store.put("file-short", short, &about(&[]), &NONE).await), StoreErrorKind::Local);
    assert_eq!(kind(store.head("file-short").await), StoreErrorKind::NotFound);
}

async fn uploads(store: &dyn Store) {
    let text = pattern(2 * PART + 12_345);
    let metadata = about(&[("mode", "33188")]);
    let upload = store.begin_upload("parts/a", &metadata).await.unwrap();
    // MinIO finds uploads only by a whole key.
    let begun = store.list_uploads("parts/a").await.unwrap();
    assert!(begun.iter().any(|(key, id, _)| key == "parts/a" && *id == upload), "{begun:?}");
    assert_eq!(kind(store.head("parts/a").await), StoreErrorKind::NotFound);
    // In any order, the last one from a file, one replaced.
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&text).unwrap();
    let last = Payload::File(Arc::new(file), 2 * PART as u64..text.len() as u64);
    let third = store.upload_part("parts/a", &upload, 30, last).await.unwrap();
    store.upload_part("parts/a", &upload, 1, bytes(vec![0; PART])).await.unwrap();
    let first = store.upload_part("parts/a", &upload, 1, bytes(text[..PART].to_vec())).await.unwrap();
    let second = store.upload_part("parts/a", &upload, 2, bytes(text[PART..2 * PART].to_vec())).await.unwrap();
    let parts = [first, second, third];
    let etag = store.finish_upload("parts/a", &upload, &parts, &Condition::Absent).await.unwrap();
    let head = store.head("parts/a").await.unwrap();
    assert_eq!((head.size, head.etag, head.metadata), (text.len() as u64, etag.clone(), metadata.clone()));
    assert!(read(store, "parts/a").await == text);
    assert!(store.list_uploads("parts/a").await.unwrap().is_empty());

    // Of ranges of itself, with a change between them, as a commit does it.
    let upload = store.begin_upload("parts/a", &metadata).await.unwrap();
    let version = Some(&etag);
    let end = 2 * PART as u64..text.len() as u64;
    let parts = [
        store.copy_part("parts/a", &upload, 1, "parts/a", version, 0..PART as u64).await.unwrap(),
        store.upload_part("parts/a", &upload, 2, bytes(vec![9; PART])).await.unwrap(),
        store.copy_part("parts/a", &upload, 3, "parts/a", version, end).await.unwrap(),
    ];
    let wrong = Etag("\"00000000000000000000000000000000\"".to_owned());
    let refused = store.copy_part("parts/a", &upload, 4, "parts/a", Some(&wrong), 0..10).await;
    assert_eq!(kind(refused), StoreErrorKind::Conflict);
    store.finish_upload("parts/a", &upload, &parts, &Condition::Is(etag)).await.unwrap();
    let changed = [&text[..PART], &[9; PART], &text[2 * PART..]].concat();
    assert!(read(store, "parts/a").await == changed);

    // Given up.
    let upload = store.begin_upload("parts/b", &metadata).await.unwrap();
    let part = store.upload_part("parts/b", &upload, 1, bytes("x")).await.unwrap();
    store.abort_upload("parts/b", &upload).await.unwrap();
    store.abort_upload("parts/b", &upload).await.unwrap();
    let again = store.upload_part("parts/b", &upload, 2, bytes("x")).await;
    assert_eq!(kind(again), StoreErrorKind::NotFound);
    assert_eq!(kind(store.finish_upload("parts/b", &upload, &[part], &NONE).await), StoreErrorKind::NotFound);
    assert!(store.list_uploads("parts/b").await.unwrap().is_empty());
    // A part that is too small, and not the last one.
    let upload = store.begin_upload("parts/c", &metadata).await.unwrap();
    let small = [
        store.upload_part("parts/c", &upload, 1, bytes("small")).await.unwrap(),
        store.upload_part("parts/c", &upload, 2, bytes("last")).await.unwrap(),
    ];
    assert_eq!(kind(store.finish_upload("parts/c", &upload, &small, &NONE).await), StoreErrorKind::Invalid);
    store.abort_upload("parts/c", &upload).await.unwrap();
}

async fn large_copies(store: &dyn Store) {
    // What came in parts can be copied whole, also onto itself with other metadata.
    let etag = store.head("parts/a").await.unwrap().etag;
    let other = about(&[("mode", "33152")]);
    let copied = store.copy("parts/a", Some(&etag), "parts/copy", None, &NONE).await.unwrap();
    assert_eq!(store.head("parts/copy").await.unwrap().etag, copied);
    let replaced = store.copy("parts/a", Some(&etag), "parts/a", Some(&other), &NONE).await.unwrap();
    let head = store.head("parts/a").await.unwrap();
    assert_eq!((head.etag, head.metadata), (replaced, other));
    assert!(read(store, "parts/a").await == read(store, "parts/copy").await);
}

async fn many_deletes(store: &dyn Store) {
    let keys: Vec<_> = (0..30).map(|number| format!("many/{number}")).collect();
    for key in &keys {
        store.put(key, bytes("x"), &about(&[]), &NONE).await.unwrap();
    }
    // More than one call takes, most of which never were.
    let doomed: Vec<_> = (1..1100).map(|number| format!("many/{number}")).collect();
    store.delete_many(&doomed).await.unwrap();
    let page = store.list(&ListRequest { prefix: "many/".into(), ..ListRequest::default() }).await.unwrap();
    assert_eq!(page.objects.iter().map(|object| &object.key).collect::<Vec<_>>(), ["many/0"]);
    store.delete_many(&[]).await.unwrap();
}
