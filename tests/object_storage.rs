//! Volumes of object storage as things, on MinIO, with the real binary: made, listed, grown, deleted, killed on the way.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::collections::HashMap;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth::mounter::client::Mounter;
use berth::objectfs::settings::{Checksums, Credentials, Endpoint};
use berth::objectfs::store::{Condition, ListRequest, Metadata, Payload, S3, Store, connect};
use berth::proto::csi;
use common::{Client, GI, Lab, Use, map, refused};
use tonic::Code;

const USER: &str = "canaryuser";
const SECRET: &str = "canarysecret";

/// A MinIO of this test alone.
struct Minio {
    child: Child,
    url: String,
    _dir: tempfile::TempDir,
}

fn program() -> Option<PathBuf> {
    let cache =
        std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| format!("{}/.cache", std::env::var("HOME").unwrap()));
    let program = PathBuf::from(cache).join("berth/bin/minio");
    program.exists().then_some(program)
}

impl Minio {
    async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("berth-minio-").tempdir().unwrap();
        // Two that are free now; MinIO would take a fixed one for its console.
        let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [port, console] = ports.map(|listener| listener.local_addr().unwrap().port());
        let child = Command::new(program().unwrap())
            .args(["server", dir.path().join("data").to_str().unwrap(), "--quiet"])
            .args(["--address", &format!("127.0.0.1:{port}"), "--console-address", &format!("127.0.0.1:{console}")])
            .envs([("MINIO_ROOT_USER", USER), ("MINIO_ROOT_PASSWORD", SECRET)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let minio = Self { child, url: format!("http://127.0.0.1:{port}"), _dir: dir };
        let end = Instant::now() + Duration::from_secs(60);
        while minio.bucket("any").await.bucket_exists().await.is_err() {
            assert!(Instant::now() < end, "MinIO does not answer");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        minio
    }

    /// As somebody who is not the driver.
    async fn bucket(&self, name: &str) -> Arc<S3> {
        let endpoint = Endpoint {
            url: Some(self.url.clone()),
            region: "us-east-1".to_owned(),
            path_style: true,
            ca: None,
            checksums: Checksums::WhenRequired,
            anonymous: false,
            patience: 5000,
            stall: 5000,
        };
        let keys = Credentials { access_key: USER.to_owned(), secret_key: SECRET.to_owned(), session_token: None };
        connect(&endpoint, Some(&keys), name).await.unwrap()
    }

    async fn made(&self, name: &str) -> Arc<S3> {
        let bucket = self.bucket(name).await;
        bucket.ensure_bucket().await.unwrap();
        bucket
    }
}

impl Drop for Minio {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn put(bucket: &S3, key: &str) {
    bucket.put(key, Payload::Bytes("x".into()), &Metadata::default(), &Condition::None).await.unwrap();
}

async fn keys(bucket: &S3) -> Vec<String> {
    let (mut keys, mut token) = (Vec::new(), None);
    loop {
        let page = bucket.list(&ListRequest { token, ..ListRequest::default() }).await.unwrap();
        keys.extend(page.objects.into_iter().map(|object| object.key));
        token = page.token;
        if token.is_none() {
            return keys;
        }
    }
}

async fn user_keys(bucket: &S3) -> Vec<String> {
    keys(bucket).await.into_iter().filter(|key| !key.starts_with(".berth/")).collect()
}

/// MinIO, and a driver whose configuration knows it, without a key of its own but for lists.
async fn lab() -> (Minio, Lab, Client) {
    let minio = Minio::start().await;
    let mut lab = Lab::bare();
    for (file, text) in [("access", USER), ("secret", SECRET)] {
        std::fs::write(lab.path(file), text).unwrap();
    }
    let (access, secret) = (lab.path("access"), lab.path("secret"));
    // Workers are no root, and pass through here.
    std::fs::set_permissions(lab.path(""), std::fs::Permissions::from_mode(0o711)).unwrap();
    let dir = lab.path("");
    let dir = dir.to_str().unwrap().trim_end_matches('/');
    lab.config.extra = format!(
        "mounter: {{socket: {dir}/mounter/sock, start: true, staging: {dir}/s3/staging, cache: {dir}/s3/cache, cacheSize: 64Mi}}"
    );
    lab.config.services = Some(format!(
        "services:\n  - {{name: main, kind: minio, url: '{}', buckets: [data], accessKeyFile: {}, secretKeyFile: {}}}",
        minio.url,
        access.display(),
        secret.display()
    ));
    let mut client = lab.start().await;
    client.secrets = [(); 2].map(|()| map(&[("accessKeyId", USER), ("secretAccessKey", SECRET)]));
    (minio, lab, client)
}

fn request(name: &str, parameters: &[(&str, &str)]) -> csi::CreateVolumeRequest {
    let mut request = Client::request(name, GI, &Use::default());
    request.parameters = map(parameters);
    request
}

const PREFIX: &[(&str, &str)] = &[("bucket", "data"), ("path", "${pvc.name}")];

fn claimed(name: &str) -> csi::CreateVolumeRequest {
    let mut request = request(name, PREFIX);
    request.parameters.insert("csi.storage.k8s.io/pvc/name".to_owned(), name.to_owned());
    request
}

macro_rules! needs_minio {
    () => {
        skip_unless!(program().is_some(), "no MinIO: scripts/setup.sh test builds it");
    };
}

/// > A volume is a bucket of its own, or a prefix in a bucket. The same request again finds it, one with another size
/// > is a conflict; deleting it leaves nothing, and deleting it again is no error.
#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_made_found_listed_grown_and_deleted() {
    needs_minio!();
    let (minio, _lab, client) = lab().await;
    let data = minio.made("data").await;
    for wanted in [request("pvc-1", &[]), request("pvc-2", &[("bucket", "data")]), claimed("pvc-3")] {
        let made = client.try_create(wanted.clone()).await.unwrap();
        let again = client.try_create(wanted.clone()).await.unwrap();
        assert_eq!(
            (&made.volume_id, made.capacity_bytes, &made.volume_context),
            (&again.volume_id, GI, &again.volume_context)
        );
        assert_eq!(client.list().await, std::slice::from_ref(&made.volume_id));
        let mut larger = wanted.clone();
        larger.capacity_range = Some(csi::CapacityRange { required_bytes: 2 * GI, limit_bytes: 0 });
        refused(client.try_create(larger).await, Code::AlreadyExists);
        assert_eq!(client.grow(&made.volume_id, 3 * GI).await.unwrap(), 3 * GI);
        assert_eq!(client.health(&made.volume_id).await.unwrap(), [""; 0]);
        client.delete(&made.volume_id).await.unwrap();
        client.delete(&made.volume_id).await.unwrap();
        assert_eq!(client.list().await, [""; 0]);
        refused(client.health(&made.volume_id).await, Code::NotFound);
        assert!(
            !minio.bucket(&made.volume_context["bucket"]).await.bucket_exists().await.unwrap()
                || keys(&data).await.is_empty()
        );
    }
    assert_eq!(keys(&data).await, [""; 0]);
}

/// > Deleting a volume removes what lies in its prefix, and nothing beside it, however alike the names are.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_leaves_neighbours_and_foreign_objects_alone() {
    needs_minio!();
    let (minio, _lab, client) = lab().await;
    let data = minio.made("data").await;
    let one = client.try_create(claimed("vol1")).await.unwrap().volume_id;
    let old = client.try_create(claimed("vol1-old")).await.unwrap().volume_id;
    for key in ["vol1/a", "vol1/b/c", "vol1/b/", "vol1-old/a", "vol1.txt", "other/vol1/a"] {
        put(&data, key).await;
    }
    client.delete(&one).await.unwrap();
    assert_eq!(user_keys(&data).await, ["other/vol1/a", "vol1-old/a", "vol1.txt"]);
    assert_eq!(client.list().await, [old]);
}

/// > A new volume is refused where objects lie already, and at or in another volume's prefix. With `onDelete: retain`
/// > the files stay, and only the notes of the volume go.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_shared_silently_and_retained_files_stay() {
    needs_minio!();
    let (minio, _lab, client) = lab().await;
    let data = minio.made("data").await;
    put(&data, "used/file").await;
    refused(client.try_create(claimed("used")).await, Code::FailedPrecondition);
    client.try_create(claimed("mine")).await.unwrap();
    refused(
        client.try_create(request("other", &[("bucket", "data"), ("path", "mine/inner")])).await,
        Code::AlreadyExists,
    );
    refused(client.try_create(request("other", &[("bucket", "data"), ("path", "mine")])).await, Code::AlreadyExists);
    let kept = client.try_create(request("kept", &[("onDelete", "retain")])).await.unwrap();
    let bucket = minio.bucket(&kept.volume_context["bucket"]).await;
    put(&bucket, "file").await;
    client.delete(&kept.volume_id).await.unwrap();
    let left = keys(&bucket).await;
    assert_eq!(left, ["file"], "{left:?}");
    refused(client.try_create(request("bad", &[("acl", "public-read")])).await, Code::InvalidArgument);
    refused(client.try_create(request("none", &[("bucket", "no-such-bucket")])).await, Code::FailedPrecondition);
}

/// > A deletion that is killed midway is finished by the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_is_killed_goes_on_when_it_is_asked_again() {
    needs_minio!();
    let (minio, mut lab, client) = lab().await;
    let data = minio.made("data").await;
    let id = client.try_create(claimed("big")).await.unwrap().volume_id;
    put(&data, "bigger/file").await;
    let writers = (0..16).map(|writer| {
        let data = data.clone();
        tokio::spawn(async move {
            for number in 0..150 {
                put(&data, &format!("big/{writer}/{number}")).await;
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let all = user_keys(&data).await.len();
    let deleting = {
        let (client, id) = (client.clone(), id.clone());
        tokio::spawn(async move { client.delete(&id).await })
    };
    // Killed once something is gone, and hardly everything.
    while user_keys(&data).await.len() == all {
        tokio::task::yield_now().await;
    }
    lab.kill();
    let _ = deleting.await;
    let secrets = client.secrets.clone();
    let mut client = lab.start().await;
    client.secrets = secrets;
    client.delete(&id).await.unwrap();
    assert_eq!(keys(&data).await, ["bigger/file"]);
}

/// > A creation that is killed midway is finished by the next, and nothing is left when the volume is deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_is_killed_is_found_by_the_next() {
    needs_minio!();
    let (minio, mut lab, client) = lab().await;
    let data = minio.made("data").await;
    let (secrets, mut client) = (client.secrets.clone(), client);
    for (round, wait) in [0, 2, 5, 10, 20, 40].into_iter().enumerate() {
        let wanted = claimed(&format!("pvc-{round}"));
        let creating = {
            let (client, wanted) = (client.clone(), wanted.clone());
            tokio::spawn(async move { client.try_create(wanted).await })
        };
        tokio::time::sleep(Duration::from_millis(wait)).await;
        lab.kill();
        let _ = creating.await;
        client = lab.start().await;
        client.secrets = secrets.clone();
        let made = client.try_create(wanted).await.unwrap();
        client.delete(&made.volume_id).await.unwrap();
        assert_eq!(keys(&data).await.iter().filter(|key| !key.starts_with(".berth/probe/")).count(), 0);
    }
}

/// > No key is in a log, a volume's attributes, an error or an argument, whether it is right or wrong.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_in_no_log_context_or_command_line() {
    needs_minio!();
    let (minio, lab, client) = lab().await;
    minio.made("data").await;
    let made = client.try_create(claimed("pvc-1")).await.unwrap();
    assert!(!format!("{made:?}").contains("canary"), "{made:?}");
    let mut wrong = claimed("pvc-2");
    wrong.secrets = map(&[("accessKeyId", USER), ("secretAccessKey", "canary-wrong")]);
    let said = refused(client.try_create(wrong).await, Code::PermissionDenied);
    assert!(!said.contains("canarysecret") && !said.contains("canary-wrong"), "{said}");
    let line = std::fs::read(format!("/proc/{}/cmdline", lab.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&line).contains("canary"));
    client.delete(&made.volume_id).await.unwrap();
    for secret in [SECRET, "canary-wrong"] {
        assert!(!lab.log().contains(secret), "{secret} is in the log");
    }
}

/// > A class may name an endpoint that is in no configuration; its volumes are found, grown and deleted by their id
/// > alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_class_may_say_itself_where_its_service_is() {
    needs_minio!();
    let (minio, _lab, client) = lab().await;
    let made = client.try_create(request("pvc-1", &[("endpoint", &minio.url)])).await.unwrap();
    assert!(made.volume_id.starts_with("@http:127.0.0.1:"), "{}", made.volume_id);
    assert_eq!(made.volume_context["endpoint"], minio.url);
    // Its bucket is one of those that `main` has, too: under that name it would look like nobody's.
    assert_eq!(client.list().await, [""; 0]);
    assert_eq!(client.grow(&made.volume_id, 2 * GI).await.unwrap(), 2 * GI);
    client.delete(&made.volume_id).await.unwrap();
    assert!(!minio.bucket(&made.volume_context["bucket"]).await.bucket_exists().await.unwrap());
    // Nobody answers there: that may end, so it is no final answer.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut elsewhere: HashMap<_, _> = map(&[("endpoint", &format!("http://{nobody}"))]);
    elsewhere.extend(map(&[("bucket", "data")]));
    let mut request = request("pvc-2", &[]);
    request.parameters = elsewhere;
    refused(client.try_create(request).await, Code::Unavailable);
}

/// Ends the mounter that a driver has started. Its workers end when the test's mounts are taken away.
struct StopMounter(PathBuf);

impl Drop for StopMounter {
    fn drop(&mut self) {
        let _ = berth::mounter::start::stop(&self.0, Duration::from_secs(10));
    }
}

macro_rules! needs_fuse {
    () => {
        skip_unless!(common::is_root() && Path::new("/dev/fuse").exists(), "mounting needs root and FUSE");
    };
}

/// > A volume goes on being read and written while its driver is away; the driver that comes back finds it staged and
/// > published, and takes it down as usual.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_on_a_mount_is_in_the_bucket_and_the_driver_may_be_killed_meanwhile() {
    needs_minio!();
    needs_fuse!();
    let (minio, mut lab, client) = lab().await;
    let _stop = StopMounter(lab.path("mounter/sock"));
    let data = minio.made("data").await;
    let id = client.try_create(claimed("vol")).await.unwrap().volume_id;
    let mounted = client.mount(&lab, &id, "vol", &Use::default()).await;
    common::write(mounted.file("before"), "one");
    assert_eq!(user_keys(&data).await, ["vol/before"]);
    lab.kill();
    common::write(mounted.file("without"), "two");
    assert_eq!(user_keys(&data).await, ["vol/before", "vol/without"]);
    let mut again = lab.start().await;
    (again.secrets, again.contexts) = (client.secrets.clone(), client.contexts.clone());
    again.stage(&id, &mounted.staging, &Use::default()).await.unwrap();
    again.publish(&id, &mounted.staging, &mounted.target, &Use::default()).await.unwrap();
    assert_eq!(common::read(mounted.file("without")), b"two");
    assert!(again.total(&id, &mounted.target).await.unwrap() > 0);
    refused(again.total("other", &mounted.target).await, Code::NotFound);
    for process in procfs::process::all_processes().unwrap().flatten() {
        let line = process.cmdline().unwrap_or_default().join(" ");
        let environment = process.environ().unwrap_or_default();
        let is_ours = line.contains("berth") && !line.contains("minio");
        assert!(!is_ours || !line.contains(SECRET), "{line}");
        assert!(!is_ours || !environment.values().any(|value| value.to_string_lossy().contains(SECRET)), "{line}");
    }
    again.unmount(&mounted).await;
    again.unmount(&mounted).await;
    assert_eq!(lab.mounts(), [""; 0]);
    again.delete(&id).await.unwrap();
    assert_eq!(keys(&data).await, [""; 0]);
}

/// > A mount whose worker has died, with or without mounter and driver, is made again when a pod is published, whoever that is;
/// > pods that had it before have it again when they are published again. Nothing that was closed is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_mount_is_made_again_with_the_next_pod() {
    needs_minio!();
    needs_fuse!();
    let (minio, mut lab, mut client) = lab().await;
    let socket = lab.path("mounter/sock");
    let _stop = StopMounter(socket.clone());
    minio.made("data").await;
    let id = client.try_create(claimed("vol")).await.unwrap().volume_id;
    let kill = |pid: &str| {
        let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    };
    for with_all in [false, true] {
        let mounted = client.mount(&lab, &id, "vol", &Use::default()).await;
        common::write(mounted.file("closed"), "one");
        let open = std::fs::File::create(mounted.file("staged")).unwrap();
        std::io::Write::write_all(&mut &open, b"two").unwrap();
        let mounter = Mounter::new(&socket, Duration::from_secs(10));
        let worker = tokio::task::block_in_place(|| mounter.list().unwrap()[0].worker.unwrap());
        if with_all {
            lab.kill();
            kill(&std::fs::read_to_string(lab.path("mounter/mounter.lock")).unwrap());
        }
        kill(&worker.to_string());
        let end = Instant::now() + Duration::from_secs(30);
        while std::fs::metadata(mounted.file("closed")).is_ok() {
            assert!(Instant::now() < end, "it goes on without its worker");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        drop(open);
        if with_all {
            let mut again = lab.start().await;
            (again.secrets, again.contexts) = (client.secrets.clone(), client.contexts.clone());
            client = again;
        }
        let other = lab.target("other");
        client.publish(&id, &mounted.staging, &other, &Use::default()).await.unwrap();
        let there = |name: &str| common::read(Path::new(&other).join(name));
        assert_eq!((there("closed"), there("staged")), (b"one".to_vec(), b"two".to_vec()));
        // No container that starts there now writes into the empty directory below.
        std::fs::metadata(mounted.file("closed")).unwrap_err();
        client.publish(&id, &mounted.staging, &mounted.target, &Use::default()).await.unwrap();
        assert_eq!(common::read(mounted.file("closed")), b"one");
        client.stage(&id, &mounted.staging, &Use::default()).await.unwrap();
        client.unpublish(&id, &other).await.unwrap();
        refused(client.delete(&id).await, Code::FailedPrecondition);
        client.unmount(&mounted).await;
    }
    client.delete(&id).await.unwrap();
    assert_eq!(lab.mounts(), [""; 0]);
}

/// > `berth doctor` is content with a node's services, which have no keys; one that can't be reached is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_services_need_no_keys() {
    needs_minio!();
    let minio = Minio::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("berth.yaml");
    for (url, code, said) in
        [(minio.url.as_str(), 0, "right on nodes"), ("http://127.0.0.1:9", 1, "accepts no connection")]
    {
        let socket = dir.path().join("none").display().to_string();
        let text = format!(
            "services: [{{name: main, kind: minio, url: '{url}'}}]\nmounter: {{start: true, socket: {socket}/m}}\n\
             drivers: [{{backend: s3, role: node, socket: {socket}/s}}]\n"
        );
        std::fs::write(&file, text).unwrap();
        let (out, _) = common::berth(&["doctor", "--config", file.to_str().unwrap()], code);
        assert!(out.contains(said), "{out}");
    }
}

/// > A claim's size is the volume's: beyond it is ENOSPC, and when the claim has grown, a mount that is there learns
/// > of it by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_as_large_as_its_claim_until_that_grows() {
    needs_minio!();
    needs_fuse!();
    let (_minio, lab, client) = lab().await;
    let _stop = StopMounter(lab.path("mounter/sock"));
    let mut wanted = request("small", &[]);
    wanted.capacity_range = Some(csi::CapacityRange { required_bytes: 1 << 20, limit_bytes: 0 });
    let id = client.try_create(wanted).await.unwrap().volume_id;
    let mounted = client.mount(&lab, &id, "small", &Use::default()).await;
    let large = vec![7; 2 << 20];
    let error = std::fs::write(mounted.file("large"), &large).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
    std::fs::remove_file(mounted.file("large")).unwrap();
    assert_eq!(client.total(&id, &mounted.target).await.unwrap(), 1 << 20);
    assert_eq!(client.grow(&id, 8 << 20).await.unwrap(), 8 << 20);
    let end = Instant::now() + Duration::from_secs(60);
    while let Err(error) = std::fs::write(mounted.file("large"), &large) {
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
        assert!(Instant::now() < end, "the mount does not learn of its growth");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    client.remove(&mounted).await;
}

/// > Two pods with different groups can't have the volume on one node at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_has_one_group_on_a_node() {
    needs_minio!();
    needs_fuse!();
    let (minio, lab, client) = lab().await;
    let _stop = StopMounter(lab.path("mounter/sock"));
    minio.made("data").await;
    let id = client.try_create(claimed("vol")).await.unwrap().volume_id;
    let of = |group: &str| Use { group: group.to_owned(), ..Use::default() };
    let mounted = client.mount(&lab, &id, "vol", &of("5")).await;
    common::write(mounted.file("f"), "x");
    assert_eq!(std::fs::metadata(mounted.file("f")).unwrap().gid(), 5);
    let other = lab.path("other").display().to_string();
    for group in ["", "6"] {
        refused(client.stage(&id, &mounted.staging, &of(group)).await, Code::FailedPrecondition);
        refused(client.publish(&id, &mounted.staging, &other, &of(group)).await, Code::FailedPrecondition);
    }
    client.stage(&id, &mounted.staging, &of("5")).await.unwrap();
    client.publish(&id, &mounted.staging, &other, &of("5")).await.unwrap();
    // What is still published is not unstaged.
    refused(client.unstage(&id, &mounted.staging).await, Code::FailedPrecondition);
    client.unpublish(&id, &other).await.unwrap();
    client.unmount(&mounted).await;
    let mounted = client.mount(&lab, &id, "vol", &of("6")).await;
    client.remove(&mounted).await;
}
