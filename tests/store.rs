//! The store on real services: the contract, and what patience makes of a bad network.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;
#[path = "../src/objectfs/store/contract.rs"]
mod contract;

use std::sync::Arc;
use std::time::Duration;

use berth::objectfs::settings::{self, Checksums, Credentials};
use berth::objectfs::store::patient::{Patient, fetch};
use berth::objectfs::store::probe::probe;
use berth::objectfs::store::{services, *};
use bytes::Bytes;
use common::mount::Service;
use common::raw::Endpoint;
use common::toxiproxy::Toxiproxy;

fn settings_of(url: &str, checksums: Checksums) -> settings::Endpoint {
    settings::Endpoint { url: Some(url.to_owned()), checksums, stall: 2000, ..services::named("minio").unwrap() }
}

fn keys(endpoint: &Endpoint) -> Credentials {
    Credentials { access_key: endpoint.access.clone(), secret_key: endpoint.secret.clone(), session_token: None }
}

fn fresh(name: &str) -> String {
    format!("berth-store-{name}-{:08x}", fastrand::u32(..))
}

/// A bucket that is emptied and removed at the end, if the test got there.
async fn with_bucket(endpoint: &Endpoint, checksums: Checksums, name: &str, test: impl AsyncFnOnce(Arc<S3>)) {
    let keys = keys(endpoint);
    let s3 = connect(&settings_of(&endpoint.url, checksums), Some(&keys), &fresh(name)).await.unwrap();
    assert!(!s3.bucket_exists().await.unwrap());
    s3.ensure_bucket().await.unwrap();
    s3.ensure_bucket().await.unwrap();
    assert!(s3.bucket_exists().await.unwrap());
    test(s3.clone()).await;
    for (key, upload, _) in s3.list_uploads("").await.unwrap() {
        s3.abort_upload(&key, &upload).await.unwrap();
    }
    let mut first = true;
    loop {
        let page = s3.list(&ListRequest::default()).await.unwrap();
        let keys: Vec<_> = page.objects.into_iter().map(|object| object.key).collect();
        if keys.is_empty() {
            break;
        }
        if std::mem::take(&mut first) {
            assert_eq!(s3.delete_bucket().await.unwrap_err().kind, StoreErrorKind::Conflict);
        }
        s3.delete_many(&keys).await.unwrap();
    }
    s3.delete_bucket().await.unwrap();
    s3.delete_bucket().await.unwrap();
    assert_eq!(s3.list(&ListRequest::default()).await.unwrap_err().kind, StoreErrorKind::NoBucket);
}

async fn contract_holds(endpoint: &Endpoint, checksums: Checksums, name: &str) {
    with_bucket(endpoint, checksums, name, async |s3| {
        let abilities = probe(&s3).await.unwrap();
        println!("{name}: {abilities:?}");
        assert_eq!(abilities.listed_metadata, name == "minio");
        let left = s3.list(&ListRequest::default()).await.unwrap();
        assert!(left.objects.is_empty(), "{:?}", left.objects);
        assert!(s3.list_uploads("").await.unwrap().is_empty());
        let able = s3.honouring(abilities);
        let patient = Patient::new(able, Duration::from_secs(20));
        contract::holds(&*patient).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_on_minio() {
    let Some(endpoint) = Service::Minio.endpoint() else { return };
    contract_holds(&endpoint, Checksums::WhenSupported, "minio").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_on_minio_without_checksums_and_conditions() {
    let Some(endpoint) = Service::Minio.endpoint() else { return };
    // The abilities that were not looked for are none: the store looks before it writes.
    with_bucket(&endpoint, Checksums::WhenRequired, "plain", async |s3| contract::holds(&*s3).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_on_rgw() {
    let Some(endpoint) = Service::Rgw.endpoint() else { return };
    contract_holds(&endpoint, Checksums::WhenRequired, "rgw").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_on_the_embedded_server_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let owner = Credentials { access_key: "a".into(), secret_key: "b".into(), session_token: None };
    let address = "127.0.0.1:0".parse().unwrap();
    let (port, handle) = embedded::serve(folder.path(), address, &owner).await.unwrap();
    let raw = |port| Endpoint {
        url: format!("http://{port}"),
        access: "a".to_owned(),
        secret: "b".to_owned(),
        region: "us-east-1".to_owned(),
    };
    contract_holds(&raw(port), Checksums::WhenSupported, "embedded").await;
    let place = settings_of(&raw(port).url, Checksums::WhenSupported);
    let s3 = connect(&place, Some(&owner), "kept").await.unwrap();
    s3.ensure_bucket().await.unwrap();
    let metadata = Metadata { content_type: None, user: [("mode".to_owned(), "33188".to_owned())].into() };
    let etag = s3.put("a/b", Payload::Bytes("text".into()), &metadata, &Condition::None).await.unwrap();
    let stranger = Credentials { secret_key: "wrong".into(), ..owner.clone() };
    let refused = connect(&place, Some(&stranger), "kept").await.unwrap();
    assert_eq!(refused.head("a/b").await.unwrap_err().kind, StoreErrorKind::Denied);
    let nobody = settings::Endpoint { anonymous: true, ..place };
    let nobody = connect(&nobody, None, "kept").await.unwrap();
    assert_eq!(nobody.head("a/b").await.unwrap_err().kind, StoreErrorKind::Denied);
    drop(handle);
    let (port, _handle) = embedded::serve(folder.path(), address, &owner).await.unwrap();
    let s3 = connect(&settings_of(&raw(port).url, Checksums::WhenSupported), Some(&owner), "kept").await.unwrap();
    assert_eq!(s3.head("a/b").await.unwrap().metadata.user, metadata.user);
    assert_eq!(fetch(&*s3, "a/b", None, Some(&etag)).await.unwrap().1, "text");
}

#[tokio::test]
async fn wrong_credentials_are_denied_and_new_ones_taken_under_a_running_store() {
    let Some(endpoint) = Service::Minio.endpoint() else { return };
    let wrong = Credentials { secret_key: "canary".to_owned(), ..keys(&endpoint) };
    let place = settings_of(&endpoint.url, Checksums::WhenSupported);
    let s3 = connect(&place, Some(&wrong), &fresh("keys")).await.unwrap();
    let store = Patient::new(s3.clone(), Duration::from_secs(20));
    let error = store.list(&ListRequest::default()).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Denied);
    assert!(!format!("{error:?}").contains("canary"));
    s3.renew(&keys(&endpoint));
    assert_eq!(store.list(&ListRequest::default()).await.unwrap_err().kind, StoreErrorKind::NoBucket);
    let nobody = settings::Endpoint { anonymous: true, ..place };
    let nobody = connect(&nobody, None, &fresh("keys")).await.unwrap();
    let error = nobody.list(&ListRequest::default()).await.unwrap_err();
    assert!(matches!(error.kind, StoreErrorKind::Denied | StoreErrorKind::NoBucket), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_network_delays_and_loses_nothing() {
    let Some(endpoint) = Service::Minio.endpoint() else { return };
    let Some(proxy) = Toxiproxy::before(&endpoint.url) else { return };
    let text: Vec<u8> = (0..8 << 20).map(|at: u32| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect();
    let text = Bytes::from(text);
    let none = Metadata::default();
    with_bucket(&endpoint, Checksums::WhenSupported, "bad", async |direct| {
        let bucket = direct.bucket().to_owned();
        let place = settings_of(&proxy.url(), Checksums::WhenSupported);
        let s3 = connect(&place, Some(&keys(&endpoint)), &bucket).await.unwrap();
        let abilities = probe(&s3).await.unwrap();
        assert!(abilities.conditional_put);
        let store = Patient::new(s3.honouring(abilities), Duration::from_secs(60));
        let put = async |key: &str| {
            store.put(key, Payload::Bytes(text.clone()), &none, &Condition::Absent).await.unwrap();
        };
        let same = async |key: &str| {
            assert!(fetch(&*store, key, None, None).await.unwrap().1 == text, "{key}");
        };
        // What is spoiled, and how; each both while it is written and while it is read.
        for (kind, stream, attributes) in [
            ("reset_peer", "upstream", r#"{"timeout":20}"#),
            ("reset_peer", "downstream", r#"{"timeout":20}"#),
            ("limit_data", "upstream", r#"{"bytes":2000000}"#),
            ("limit_data", "downstream", r#"{"bytes":3000000}"#),
            ("slow_close", "downstream", r#"{"delay":500}"#),
            ("latency", "downstream", r#"{"latency":100,"jitter":50}"#),
            // Less than a stall lets pass.
            ("bandwidth", "downstream", r#"{"rate":1}"#),
            ("bandwidth", "upstream", r#"{"rate":1}"#),
            ("timeout", "downstream", r#"{"timeout":0}"#),
        ] {
            let key = format!("{kind}-{stream}");
            let heals = !matches!(kind, "limit_data" | "slow_close" | "latency") || stream == "upstream";
            proxy.add(kind, stream, attributes);
            tokio::join!(put(&key), async {
                tokio::time::sleep(Duration::from_secs(3)).await;
                if heals {
                    proxy.remove(kind);
                }
            });
            same(&key).await;
            if !heals {
                proxy.remove(kind);
            }
            if heals {
                proxy.add(kind, stream, attributes);
                tokio::join!(same(&key), async {
                    tokio::time::sleep(Duration::from_secs(3)).await;
                    proxy.remove(kind);
                });
            }
        }
        // The service is gone, and comes back.
        proxy.set_there(false);
        tokio::join!(put("gone"), async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            proxy.set_there(true);
        });
        same("gone").await;
    })
    .await;
}

#[tokio::test]
async fn a_service_that_stays_away_is_given_up_after_patience() {
    // Nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let place = settings_of(&format!("http://127.0.0.1:{port}"), Checksums::WhenSupported);
    let keys = Credentials { access_key: "a".into(), secret_key: "canary".into(), session_token: None };
    let s3 = connect(&place, Some(&keys), "bucket").await.unwrap();
    assert_eq!(probe(&s3).await.unwrap_err().kind, StoreErrorKind::Unavailable);
    let store = Patient::new(s3, Duration::from_millis(300));
    let error = store.head("key").await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Unavailable);
    assert!(error.message.contains("refused"), "{error}");
}
