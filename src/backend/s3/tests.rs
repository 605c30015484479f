//! The controller on a service in memory: what it shares with nobody, and that it can die before or after any call.

use super::*;
use crate::backend::{Controller, PageRequest};
use crate::error::ErrorKind;
use crate::objectfs::settings::Settings;
use crate::objectfs::store::cloud::{Cloud, Death};
use crate::objectfs::store::{Metadata, Store};
use crate::volume::{Access, AccessMode, Capability, CapacityRange, Name, Owner, Parameters, Spec, Volume, VolumeId};

struct Lab {
    cloud: Cloud,
    driver: ObjectStorage,
}

const GI: i64 = 1 << 30;

fn map(pairs: &[(&str, &str)]) -> Parameters {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn spec(name: &str, size: i64, parameters: &[(&str, &str)]) -> Spec {
    let mount = Access::Mount { filesystem: String::new(), flags: Vec::new(), group: String::new() };
    Spec {
        name: Name::new(name).unwrap(),
        capacity: Some(CapacityRange::new(size, 0).unwrap()),
        capabilities: vec![Capability { access: mount, mode: AccessMode::MultiNodeMultiWriter }],
        parameters: map(parameters),
        mutable: Parameters::new(),
        owner: Owner { claim: name.to_owned(), namespace: "team".to_owned(), volume: String::new() },
        places: Vec::new(),
    }
}

impl Lab {
    fn new() -> Self {
        let text = "
services:
  - {name: main, kind: minio, url: 'http://127.0.0.1:9000', buckets: [data], chain: true}
drivers: [{backend: s3, socket: /run/a}]";
        let config = Config::parse(text, &|_| None).unwrap();
        let cloud = Cloud::new();
        let driver = ObjectStorage::over(&config, cloud.buckets());
        Self { cloud, driver }
    }

    fn create(&self, spec: &Spec) -> Result<Volume> {
        let id = self.driver.volume_id(&spec.name, &spec.parameters)?;
        self.driver.ensure_volume(&id, spec, &Secrets::default())
    }

    fn delete(&self, id: &VolumeId) -> Result<()> {
        self.driver.ensure_absent(id, &Secrets::default())
    }

    fn listed(&self) -> Vec<String> {
        let page = PageRequest { limit: None, after: None };
        let volumes = self.driver.listing().unwrap().list(&page).unwrap().entries;
        volumes.into_iter().map(|volume| volume.id.to_string()).collect()
    }

    /// All keys of the bucket that has the prefix volumes.
    fn keys(&self) -> Vec<String> {
        self.cloud.bucket("data").unwrap().keys()
    }

    fn put(&self, key: &str) {
        self.cloud.make("data").put_raw(key, "x", Metadata::default());
    }
}

const PREFIX: &[(&str, &str)] = &[("bucket", "data"), ("path", "${pvc.namespace}/${pvc.name}")];

#[track_caller]
fn refused<T>(result: Result<T>, kind: ErrorKind) -> String {
    let Err(error) = result else { panic!("it was done, instead of {kind:?}") };
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

#[test]
fn a_volume_is_made_once_found_again_and_goes_with_all_that_it_holds() {
    for parameters in [&[][..], &[("bucket", "data")], PREFIX] {
        let lab = Lab::new();
        lab.cloud.make("data");
        let wanted = spec("pvc-1", GI, parameters);
        let made = lab.create(&wanted).unwrap();
        assert_eq!((made.size, lab.create(&wanted).unwrap().context), (1 << 30, made.context.clone()));
        assert_eq!(lab.listed(), [made.id.to_string()]);
        refused(lab.create(&spec("pvc-1", 2 * GI, parameters)), ErrorKind::Conflict);
        let mut other = parameters.to_vec();
        other.push(("uid", "7"));
        refused(lab.create(&spec("pvc-1", GI, &other)), ErrorKind::Conflict);
        let bucket = lab.cloud.bucket(&made.context["bucket"]).unwrap();
        let prefix = made.context.get("prefix").cloned().unwrap_or_default();
        bucket.set_page(7);
        for number in 0..50 {
            bucket.put_raw(&format!("{prefix}{number}/file"), "x", Metadata::default());
        }
        bucket.put_raw(&format!("{}index", Settings::hidden_of(&prefix)), "x", Metadata::default());
        lab.delete(&made.id).unwrap();
        lab.delete(&made.id).unwrap();
        assert_eq!((lab.keys(), lab.cloud.names()), (Vec::new(), vec!["data".to_owned()]), "{parameters:?}");
        assert!(lab.driver.find(&made.id, &Secrets::default()).unwrap().is_none());
    }
}

#[test]
fn a_volume_is_deleted_without_its_neighbours() {
    let lab = Lab::new();
    lab.cloud.make("data");
    let pattern = [("bucket", "data"), ("path", "${pvc.name}")];
    let (one, two) =
        (lab.create(&spec("vol1", GI, &pattern)).unwrap(), lab.create(&spec("vol1-old", GI, &pattern)).unwrap());
    for key in ["vol1/a", "vol1-old/a", "vol1.txt", "vol1x/a", "vol", "other/a"] {
        lab.put(key);
    }
    let data = lab.cloud.make("data");
    for key in ["vol1/large", "vol1-old/large"] {
        lab.cloud.wait(data.begin_upload(key, &Metadata::default())).unwrap();
    }
    lab.delete(&one.id).unwrap();
    assert_eq!(data.uploads(), ["vol1-old/large"]);
    let left: Vec<_> = lab.keys().into_iter().filter(|key| !key.starts_with(".berth/")).collect();
    assert_eq!(left, ["other/a", "vol", "vol1-old/a", "vol1.txt", "vol1x/a"]);
    assert_eq!(lab.listed(), [two.id.to_string()]);
}

#[test]
fn no_prefix_is_shared_silently() {
    let lab = Lab::new();
    lab.cloud.make("data");
    let at = |path| [("bucket", "data"), ("path", path)];
    let first = lab.create(&spec("a", GI, &at("team/models"))).unwrap();
    let before = lab.keys();
    for path in ["team/models", "team/models/", "team", "team/models/llama"] {
        refused(lab.create(&spec("b", GI, &at(path))), ErrorKind::Conflict);
        assert_eq!(lab.keys(), before, "{path}");
    }
    lab.put("foreign/file");
    let before = lab.keys();
    let said = refused(lab.create(&spec("b", GI, &at("foreign"))), ErrorKind::Precondition);
    assert!(said.contains("foreign/file"), "{said}");
    assert_eq!(lab.keys(), before);
    // MinIO would hide what lies below an object.
    for path in ["foreign/file", "foreign/file/below"] {
        refused(lab.create(&spec("b", GI, &at(path))), ErrorKind::Conflict);
        assert_eq!(lab.keys(), before, "{path}");
    }
    lab.create(&spec("b", GI, &at("team/models2"))).unwrap();
    lab.delete(&first.id).unwrap();
    lab.create(&spec("c", GI, &at("team/models"))).unwrap();
    // A bucket that is not there is not made for a prefix.
    refused(lab.create(&spec("d", GI, &[("bucket", "none")])), ErrorKind::Precondition);
    assert!(lab.cloud.bucket("none").is_none());
}

#[test]
fn a_bucket_that_holds_something_is_nobodys_volume() {
    let lab = Lab::new();
    let wanted = spec("pvc-1", GI, &[]);
    let id = lab.driver.volume_id(&wanted.name, &wanted.parameters).unwrap();
    let name = id.as_str().split('/').next_back().unwrap().to_owned();
    lab.cloud.make(&name).put_raw("precious", "x", Metadata::default());
    refused(lab.create(&wanted), ErrorKind::Conflict);
    lab.delete(&id).unwrap();
    assert_eq!(lab.cloud.bucket(&name).unwrap().keys(), ["precious"]);
}

#[test]
fn retained_files_stay_and_only_the_notes_go() {
    for parameters in [&[("onDelete", "retain")][..], &[("bucket", "data"), ("onDelete", "retain")]] {
        let lab = Lab::new();
        lab.cloud.make("data");
        let made = lab.create(&spec("pvc-1", GI, parameters)).unwrap();
        let prefix = made.context.get("prefix").cloned().unwrap_or_default();
        let bucket = lab.cloud.bucket(&made.context["bucket"]).unwrap();
        bucket.put_raw(&format!("{prefix}file"), "x", Metadata::default());
        for _ in 0..2 {
            lab.delete(&made.id).unwrap();
            assert_eq!(bucket.keys(), [format!("{prefix}file")]);
        }
        assert_eq!(lab.listed(), [""; 0]);
        refused(
            lab.create(&spec("pvc-1", GI, parameters)),
            if prefix.is_empty() { ErrorKind::Conflict } else { ErrorKind::Precondition },
        );
    }
}

#[test]
fn handles_of_others_are_nobodys_and_deleting_them_touches_nothing() {
    let lab = Lab::new();
    lab.put("models/file");
    for handle in
        ["models", "main/data", "main/data/models", "s3://data/models", "main/data/vol-0123456789abcdef01234567"]
    {
        let id = VolumeId::new(handle.replace("//", "/")).unwrap();
        lab.delete(&id).unwrap();
        assert!(lab.driver.find(&id, &Secrets::default()).unwrap().is_none(), "{handle}");
    }
    assert_eq!(lab.keys(), ["models/file"]);
    let elsewhere = VolumeId::new("other/data/vol-0123456789abcdef01234567").unwrap();
    refused(lab.delete(&elsewhere), ErrorKind::Precondition);
}

#[test]
fn a_volume_whose_claim_is_anothers_is_left_alone() {
    let lab = Lab::new();
    lab.cloud.make("data");
    let made = lab.create(&spec("a", GI, PREFIX)).unwrap();
    lab.put("team/a/file");
    let claim = names::claim("team/a/");
    lab.cloud.make("data").put_raw(&claim, r#"{"volume":"vol-other"}"#, Metadata::default());
    refused(lab.delete(&made.id), ErrorKind::Precondition);
    lab.cloud.make("data").delete_raw(&claim);
    refused(lab.delete(&made.id), ErrorKind::Precondition);
    assert!(lab.keys().contains(&"team/a/file".to_owned()));
    // Damaged notes are no permission either.
    let notes = format!("{}volume.json", made.context["notes"]);
    lab.cloud.make("data").put_raw(&notes, "{", Metadata::default());
    refused(lab.delete(&made.id), ErrorKind::Internal);
    assert!(lab.keys().contains(&"team/a/file".to_owned()));
}

#[test]
fn a_size_grows_never_shrinks_and_reaches_the_limit() {
    let lab = Lab::new();
    let made = lab.create(&spec("a", GI, &[])).unwrap();
    let bucket = lab.cloud.bucket(&made.context["bucket"]).unwrap();
    let limits = || String::from_utf8(bucket.object(".berth/volumes/bucket/limit.json").unwrap().0.to_vec()).unwrap();
    let grow = |required, limit| {
        let range = CapacityRange::new(required, limit).unwrap();
        lab.driver.growth().unwrap().ensure_size(&made.id, range, &Secrets::default())
    };
    assert!(limits().contains(&format!("{GI}")));
    assert_eq!(grow(GI + 1, 0).unwrap(), (GI as u64 + 1, false));
    assert_eq!(grow(GI, 0).unwrap(), (GI as u64 + 1, false));
    refused(grow(1, GI), ErrorKind::OutOfRange);
    assert!(limits().contains(&format!("{}", GI + 1)));
    let modify = |pairs: &[(&str, &str)]| {
        lab.driver.modification().unwrap().ensure_modified(&made.id, &map(pairs), &Secrets::default())
    };
    modify(&[]).unwrap();
    modify(&[("limit", "none"), ("memory", "64Mi")]).unwrap();
    assert!(limits().contains("null") && limits().contains("67108864"), "{}", limits());
    // A limit that is not in force grows with its volume all the same.
    assert_eq!(grow(3 * GI, 0).unwrap().0, 3 * GI as u64);
    modify(&[("limit", "enforced")]).unwrap();
    assert!(limits().contains(&format!("{}", 3 * GI)));
    refused(modify(&[("quota", "1Gi")]), ErrorKind::Invalid);
}

/// A death before or after each call of `work`, which is then begun again. `check` sees what came of it.
fn die_everywhere(prepare: impl Fn(&Lab), work: impl Fn(&Lab) -> Result<()>, check: impl Fn(&Lab, Death)) {
    let count = {
        let lab = Lab::new();
        prepare(&lab);
        lab.cloud.die(None);
        work(&lab).unwrap();
        lab.cloud.calls()
    };
    assert!(count > 3, "{count}");
    for number in 0..=count {
        for death in [Death::Before(number), Death::After(number)] {
            let lab = Lab::new();
            prepare(&lab);
            lab.cloud.die(Some(death));
            let _ = work(&lab);
            lab.cloud.die(None);
            check(&lab, death);
        }
    }
}

#[test]
fn a_create_that_dies_anywhere_is_finished_by_the_next_or_undone_by_a_delete() {
    for parameters in [&[][..], PREFIX] {
        let prepare = |lab: &Lab| {
            lab.put("foreign/file");
        };
        let create = |lab: &Lab| lab.create(&spec("pvc-1", GI, parameters)).map(drop);
        die_everywhere(prepare, create, |lab, death| {
            let made = lab.create(&spec("pvc-1", GI, parameters)).unwrap_or_else(|error| panic!("{death:?}: {error}"));
            assert_eq!(lab.listed(), [made.id.to_string()], "{death:?}");
            lab.delete(&made.id).unwrap();
            assert_eq!((lab.keys(), lab.cloud.names().len()), (vec!["foreign/file".to_owned()], 1), "{death:?}");
        });
        die_everywhere(prepare, create, |lab, death| {
            let wanted = spec("pvc-1", GI, parameters);
            let id = lab.driver.volume_id(&wanted.name, &wanted.parameters).unwrap();
            // What somebody puts there meanwhile is not the volume's, unless it was finished.
            let is_ready = lab.driver.find(&id, &Secrets::default()).unwrap().is_some();
            lab.put("team/pvc-1/file");
            lab.delete(&id).unwrap();
            let stays = !is_ready || parameters.is_empty();
            let left = if stays { vec!["foreign/file", "team/pvc-1/file"] } else { vec!["foreign/file"] };
            assert_eq!(
                (lab.keys(), lab.cloud.names().len()),
                (left.into_iter().map(str::to_owned).collect(), 1),
                "{death:?}"
            );
        });
    }
}

#[test]
fn a_create_that_is_refused_dies_anywhere_and_leaves_the_other_volume_alone() {
    let inner = &[("bucket", "data"), ("path", "team")][..];
    let prepare = |lab: &Lab| {
        lab.cloud.make("data");
        lab.create(&spec("pvc-1", GI, PREFIX)).unwrap();
        lab.put("team/pvc-1/file");
    };
    let count = 12;
    for number in 0..count {
        for death in [Death::Before(number), Death::After(number)] {
            let lab = Lab::new();
            prepare(&lab);
            let before = lab.keys();
            lab.cloud.die(Some(death));
            let _ = lab.create(&spec("other", GI, inner));
            lab.cloud.die(None);
            refused(lab.create(&spec("other", GI, inner)), ErrorKind::Conflict);
            assert_eq!(lab.keys(), before, "{death:?}");
        }
    }
}

#[test]
fn a_delete_that_dies_anywhere_is_finished_by_the_next() {
    for parameters in [&[][..], PREFIX, &[("bucket", "data"), ("onDelete", "retain")]] {
        let keeps = parameters.len() == 2 && parameters[1].0 == "onDelete";
        let id = |lab: &Lab| {
            let wanted = spec("pvc-1", GI, parameters);
            lab.driver.volume_id(&wanted.name, &wanted.parameters).unwrap()
        };
        let prepare = |lab: &Lab| {
            lab.put("foreign/file");
            let made = lab.create(&spec("pvc-1", GI, parameters)).unwrap();
            let bucket = lab.cloud.bucket(&made.context["bucket"]).unwrap();
            bucket.set_page(2);
            for number in 0..5 {
                let prefix = made.context.get("prefix").cloned().unwrap_or_default();
                bucket.put_raw(&format!("{prefix}{number}"), "x", Metadata::default());
            }
        };
        die_everywhere(
            prepare,
            |lab| lab.delete(&id(lab)),
            |lab, death| {
                lab.delete(&id(lab)).unwrap_or_else(|error| panic!("{death:?}: {error}"));
                let left = lab.keys();
                let expected = if keeps { 6 } else { 1 };
                assert_eq!((left.len(), lab.cloud.names().len()), (expected, 1), "{death:?}: {left:?}");
                assert!(!left.iter().any(|key| key.starts_with(".berth/")), "{left:?}");
            },
        );
    }
}

#[test]
fn a_condemned_prefix_that_another_volume_has_by_now_is_its_own() {
    // Dead after the claim is gone, and before the mark is: meanwhile somebody else takes the prefix.
    let lab = Lab::new();
    lab.cloud.make("data");
    let first = lab.create(&spec("pvc-1", GI, PREFIX)).unwrap();
    let claim = names::claim("team/pvc-1/");
    let mut calls = 0;
    while lab.cloud.bucket("data").unwrap().object(&claim).is_some() {
        lab.cloud.die(Some(Death::Before(calls)));
        let _ = lab.delete(&first.id);
        calls += 1;
    }
    lab.cloud.die(None);
    let second = lab.create(&spec("again", GI, &[("bucket", "data"), ("path", "team/pvc-1")])).unwrap();
    lab.put("team/pvc-1/file");
    lab.delete(&first.id).unwrap();
    assert!(lab.keys().contains(&"team/pvc-1/file".to_owned()));
    assert_eq!(lab.listed(), [second.id.to_string()]);
}

#[test]
fn a_list_comes_in_pages_that_leave_nothing_out() {
    let lab = Lab::new();
    lab.cloud.make("data");
    lab.cloud.make("berth-without-a-volume");
    let mut made: Vec<_> = (0..7)
        .map(|number| {
            let parameters: &[_] = if number % 2 == 0 { &[] } else { &[("bucket", "data")] };
            lab.create(&spec(&format!("pvc-{number}"), GI, parameters)).unwrap().id.to_string()
        })
        .collect();
    made.sort();
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = lab.driver.listing().unwrap().list(&PageRequest { limit: Some(2), after }).unwrap();
        found.extend(page.entries.into_iter().map(|volume| volume.id.to_string()));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(found, made);
    let page = PageRequest { limit: None, after: Some("invalid-token".to_owned()) };
    refused(lab.driver.listing().unwrap().list(&page), ErrorKind::Busy);
}

#[test]
fn nothing_secret_is_in_a_volumes_context() {
    let lab = Lab::new();
    lab.cloud.make("data");
    let secrets = || {
        Secrets::new(
            [("accessKeyId", "canary-id"), ("secretAccessKey", "canary-secret"), ("sessionToken", "canary-token")]
                .map(|(key, value)| (key.to_owned(), value.to_owned())),
        )
    };
    let wanted = spec("pvc-1", GI, PREFIX);
    let id = lab.driver.volume_id(&wanted.name, &wanted.parameters).unwrap();
    let made = lab.driver.ensure_volume(&id, &wanted, &secrets()).unwrap();
    assert!(!format!("{made:?}").contains("canary"));
    let bucket = lab.cloud.bucket("data").unwrap();
    for key in bucket.keys() {
        assert!(!String::from_utf8_lossy(&bucket.object(&key).unwrap().0).contains("canary"), "{key}");
    }
    assert!(bucket.abilities().conditional_put);
}
