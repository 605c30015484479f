//! The process around the drivers: sockets, registration, health, metrics, logs, and the orderly end.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::time::{Duration, Instant};

use berth::proto::csi;
use berth::proto::registration::registration_client::RegistrationClient;
use berth::proto::registration::{InfoRequest, RegistrationStatus};
use common::{Client, GI, Lab, Use, is_root, map, refused};
use rustix::process::Signal;
use tonic::Code;

fn berth(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_berth")).args(arguments).output().unwrap()
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within 20 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// > Nobody but the driver's own user can connect to its socket, from its first moment on.
/// > A socket left by a driver that died is replaced; one that is served is not.
#[tokio::test]
async fn sockets_are_private_and_never_stolen() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 2 * GI).await;
    let socket = lab.path("run/csi.sock");
    let mode = |path: &std::path::Path| std::fs::symlink_metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&socket), mode(&lab.path("run"))), (0o600, 0o700));
    let second = berth(&["serve", "--config", lab.write_config().to_str().unwrap()]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another process serves"));
    assert_eq!(client.list().await.len(), 0);
    // A directory that others may enter is made private again.
    std::fs::set_permissions(lab.path("run"), std::fs::Permissions::from_mode(0o755)).unwrap();
    lab.restart().await;
    assert_eq!((mode(&socket), mode(&lab.path("run"))), (0o600, 0o700));
}

/// > The driver makes itself known to kubelet, again after a refusal, and takes its socket away at the end.
#[tokio::test]
async fn the_driver_registers_itself_with_kubelet() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 2 * GI);
    lab.config.kubelet = true;
    std::fs::create_dir(lab.path("registry")).unwrap();
    let socket = lab.path("registry/nvme.csi.berth.dev-reg.sock");
    // What a driver that died has left.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    lab.start().await;
    let connect = || async {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match Client::connect(&socket).await {
                Ok(client) => return RegistrationClient::new(client.channel),
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut kubelet = connect().await;
    let info = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", "nvme.csi.berth.dev"));
    assert_eq!(info.supported_versions, ["1.0.0"]);
    // The endpoint is open before the registration can be.
    let driver = Client::connect(std::path::Path::new(&info.endpoint)).await.unwrap();
    let node = driver.node.clone().node_get_info(csi::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(node.node_id, "node-a");
    assert_eq!(node.accessible_topology.unwrap().segments, map(&[("topology.berth.dev/node", "node-a")]));

    let first = std::fs::metadata(&socket).unwrap().ino();
    let refusal = RegistrationStatus { plugin_registered: false, error: "not today".to_owned() };
    kubelet.notify_registration_status(refusal).await.unwrap();
    drop(kubelet);
    eventually("a new socket", || std::fs::metadata(&socket).ok().filter(|now| now.ino() != first)).await;
    let mut kubelet = connect().await;
    let success = RegistrationStatus { plugin_registered: true, error: String::new() };
    kubelet.notify_registration_status(success).await.unwrap();
    drop(kubelet);
    assert!(lab.log().contains("not today") && lab.log().contains("registered with kubelet"));
    lab.signal(Signal::TERM);
    assert!(lab.wait().success());
    assert!(!socket.exists() && !lab.path("run/csi.sock").exists());
}

/// > `/healthz`, `/readyz` and `/metrics` answer; every call is counted by driver, RPC and code.
#[tokio::test]
async fn health_and_metrics_are_served() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 2 * GI);
    let port = free_port();
    lab.config.extra = format!("http: {{address: '127.0.0.1:{port}'}}");
    let client = lab.start().await;
    assert!(get(port, "/healthz").starts_with("HTTP/1.1 200"));
    eventually("ready", || get(port, "/readyz").starts_with("HTTP/1.1 200").then_some(())).await;
    assert!(get(port, "/elsewhere").starts_with("HTTP/1.1 404"));
    refused(client.delete("..").await, Code::InvalidArgument);
    client.create("a", GI, &Use::default()).await;
    let metrics = get(port, "/metrics");
    for line in [
        r#"berth_rpc_duration_seconds_count{driver="nvme.csi.berth.dev",rpc="DeleteVolume",code="INVALID_ARGUMENT"} 1"#,
        r#"berth_rpc_duration_seconds_count{driver="nvme.csi.berth.dev",rpc="CreateVolume",code="OK"} 1"#,
        r#"berth_rpc_in_flight{driver="nvme.csi.berth.dev"} 0"#,
        "berth_process_resident_memory_bytes ",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    // A client that says nothing does not keep others out.
    let silent: Vec<_> = (0..40).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let answered = tokio::task::spawn_blocking(move || get(port, "/healthz")).await.unwrap();
    assert!(answered.starts_with("HTTP/1.1 200"));
    drop(silent);
}

/// > SIGTERM lets the calls that are being answered end; a second signal ends the process at once.
#[tokio::test]
async fn sigterm_drains_and_a_second_one_ends() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 4 * GI);
    let programs = lab.path("programs");
    std::fs::create_dir(&programs).unwrap();
    let script = |seconds: u32| {
        let real = common::run("sh", &["-c", "command -v mkfs.ext4"]);
        let text =
            format!("#!/bin/sh\necho >> {}/begun\nsleep {seconds}\nexec {} \"$@\"\n", programs.display(), real.trim());
        std::fs::write(programs.join("mkfs.ext4"), text).unwrap();
        std::fs::set_permissions(programs.join("mkfs.ext4"), std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    script(1);
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    lab.environment.push(("PATH".to_owned(), path));
    let usage = Use::fs("ext4");
    let begun = || std::fs::remove_file(programs.join("begun")).ok();
    let stage = |client: &Client, lab: &Lab, name: &'static str| {
        let (client, staging, usage) = (client.clone(), lab.staging(name), usage.clone());
        tokio::spawn(async move {
            let id = client.create(name, GI, &usage).await;
            client.stage(&id, &staging, &usage).await
        })
    };

    let client = lab.start().await;
    let call = stage(&client, &lab, "a");
    eventually("mkfs", begun).await;
    lab.signal(Signal::TERM);
    call.await.unwrap().unwrap();
    drop(client);
    assert!(lab.wait().success());
    assert!(lab.log().contains("drained"));

    script(60);
    let client = lab.start().await;
    let call = stage(&client, &lab, "b");
    eventually("mkfs", begun).await;
    let sent = Instant::now();
    lab.signal(Signal::TERM);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!lab.has_ended());
    lab.signal(Signal::TERM);
    assert_eq!(lab.wait().code(), Some(1));
    assert!(sent.elapsed() < Duration::from_secs(30));
    assert!(call.await.unwrap().is_err());
}

/// > `berth config check` says every mistake at once, with its path in the file and what would be right.
#[test]
fn config_check_says_every_mistake_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "pools: [{name: a, path: a, siez: 3}]\ndrivers: [{backend: nvme, socket: /run/a, role: cook}]",
    )
    .unwrap();
    let output = berth(&["config", "check", path]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    for part in ["3 mistakes", "pools[0].path", "pools[0].siez", "drivers[0].role", "write controller, node or both"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    std::fs::write(&file, "pools: [{name: a, path: /a}]\ndrivers: [{backend: nvme, socket: /run/a}]").unwrap();
    let output = berth(&["config", "check", path]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(berth(&["config", "check", "/no/such/file"]).status.code(), Some(1));
}

/// > A secret is in no log at any level, in no error, and in nothing that the driver writes.
#[tokio::test]
async fn secrets_are_nowhere_to_be_found() {
    skip_unless!(is_root(), "needs root");
    const CANARY: &str = "c4n4ry-7f3d";
    let mut lab = Lab::without_driver("xfs", 4 * GI);
    lab.environment.push(("RUST_LOG".to_owned(), "trace".to_owned()));
    let client = lab.start().await;
    let secrets = map(&[("key", CANARY)]);
    let usage = Use::default();
    let mut create = Client::request("a", GI, &usage);
    create.secrets = secrets.clone();
    let id = client.try_create(create.clone()).await.unwrap().volume_id;
    create.capacity_range.as_mut().unwrap().required_bytes = 2 * GI;
    let message = refused(client.try_create(create).await, Code::AlreadyExists);
    assert!(!message.contains(CANARY));
    let stage = csi::NodeStageVolumeRequest {
        volume_id: id.clone(),
        staging_target_path: lab.staging("a"),
        volume_capability: Some(usage.message()),
        secrets: secrets.clone(),
        ..Default::default()
    };
    client.node.clone().node_stage_volume(stage).await.unwrap();
    let mut publish = Client::publication(&id, &lab.staging("a"), "relative", &usage);
    publish.secrets = secrets.clone();
    refused(client.node.clone().node_publish_volume(publish).await, Code::InvalidArgument);
    client.unstage(&id, &lab.staging("a")).await.unwrap();
    let found = std::fs::read(lab.pool().join("volumes").join(&id).join("volume.json")).unwrap();
    assert!(!String::from_utf8_lossy(&found).contains(CANARY));
    let delete = csi::DeleteVolumeRequest { volume_id: id, secrets };
    client.controller.clone().delete_volume(delete).await.unwrap();
    assert!(lab.log().contains("DeleteVolume"));
    assert!(!lab.log().contains(CANARY), "{}", lab.log());
    lab.assert_clean();
}

/// > Logs are text or JSON, one object a line.
#[tokio::test]
async fn json_logs_are_one_object_a_line() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 2 * GI);
    let file = lab.write_config();
    let text = std::fs::read_to_string(&file).unwrap().replace("{level: trace}", "{format: json, level: debug}");
    let config = lab.path("json.yaml");
    std::fs::write(&config, text).unwrap();
    let log = std::fs::File::create(lab.path("log")).unwrap();
    let mut driver = Command::new(env!("CARGO_BIN_EXE_berth"))
        .args(["serve", "--config", config.to_str().unwrap()])
        .stderr(log)
        .spawn()
        .unwrap();
    eventually("the socket", || lab.path("run/csi.sock").exists().then_some(())).await;
    let client = Client::connect(&lab.path("run/csi.sock")).await.unwrap();
    refused(client.delete("a\nb\u{1b}[31m").await, Code::InvalidArgument);
    drop(client);
    rustix::process::kill_process(rustix::process::Pid::from_child(&driver), Signal::TERM).unwrap();
    assert!(driver.wait().unwrap().success());
    let log = lab.log();
    assert!(log.lines().count() >= 3, "{log}");
    for line in log.lines() {
        let object: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(object.is_object());
    }
    lab.kill();
}
