//! What a real cluster can't be made to show, on a double of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Cephfs;
use super::control::{Ceph, Connector, Control};
use crate::backend::{Cloning, Controller, Growth, Snapshots};
use crate::config::Config;
use crate::error::ErrorKind;
use crate::host::Errno;
use crate::host::librados::{Failure, Target};
use crate::secrets::Secrets;
use crate::telemetry::Metrics;
use crate::volume::{Access, AccessMode, Capability, CapacityRange, Name, Owner, Spec};

const DEADLINE: Duration = Duration::from_millis(200);

/// A cluster that keeps its subvolumes in memory. A fault answers the next command of its prefix in place of it.
#[derive(Default)]
struct Double {
    subvolumes: Mutex<BTreeMap<String, Value>>,
    /// Of each subvolume, those of its snapshots.
    snapshots: Mutex<BTreeMap<String, BTreeMap<String, Metadata>>>,
    /// Before this command everything ends; 0: never.
    dies_before: AtomicUsize,
    faults: Mutex<BTreeMap<&'static str, Fault>>,
    connections: AtomicUsize,
    commands: Mutex<Vec<String>>,
    /// No command is answered.
    is_hung: Mutex<bool>,
    /// Commands that hang go on when it is true.
    released: Mutex<bool>,
    release: Condvar,
}

type Metadata = BTreeMap<String, String>;

#[derive(Clone)]
enum Fault {
    Refuse(Errno, &'static str),
    Say(&'static str),
    /// It is done, but the answer is lost.
    DoAndRefuse(Errno),
    Hang,
}

#[derive(Clone)]
struct Handle(Arc<Double>);

impl Connector for Handle {
    fn connect(&self, monitors: &str, _: &str, key: &str, _: Duration) -> Result<Arc<dyn Ceph>, Failure> {
        self.0.connections.fetch_add(1, Ordering::SeqCst);
        let refused = |errno| Err(Failure { errno, message: String::new() });
        match (monitors, key) {
            ("v2:gone:1", _) => {
                std::thread::sleep(Duration::from_millis(50));
                refused(Errno::TIMEDOUT)
            }
            (_, "right") => Ok(Arc::new(self.clone())),
            _ => refused(Errno::ACCESS),
        }
    }
}

impl Double {
    fn let_go(&self) {
        *self.released.lock().unwrap() = true;
        self.release.notify_all();
    }
}

impl Ceph for Handle {
    fn fsid(&self) -> &str {
        "8833edaa-7b93-432c-ad33-eebf3b535547"
    }

    fn command(&self, _: Target, command: &str) -> Result<Vec<u8>, Failure> {
        let command: Value = serde_json::from_str(command).unwrap();
        let text = |key: &str| command[key].as_str().unwrap_or_default().to_owned();
        let prefix = text("prefix");
        {
            let mut commands = self.0.commands.lock().unwrap();
            commands.push(prefix.clone());
            // Whoever is dead sends nothing more.
            let dies_before = self.0.dies_before.load(Ordering::SeqCst);
            if dies_before > 0 && commands.len() >= dies_before {
                return Err(Failure { errno: Errno::IO, message: "dead".to_owned() });
            }
        }
        let fault = match *self.0.is_hung.lock().unwrap() {
            true => Some(Fault::Hang),
            false => self.0.faults.lock().unwrap().remove(prefix.as_str()),
        };
        match fault {
            Some(Fault::Refuse(errno, message)) => return Err(Failure { errno, message: message.to_owned() }),
            Some(Fault::Say(text)) => return Ok(text.as_bytes().to_vec()),
            Some(Fault::Hang) => {
                let released = self.0.released.lock().unwrap();
                drop(self.0.release.wait_while(released, |released| !*released).unwrap());
            }
            Some(Fault::DoAndRefuse(_)) | None => {}
        }
        let name = text("sub_name");
        let mut subvolumes = self.0.subvolumes.lock().unwrap();
        let missing = || Err(Failure { errno: Errno::NOENT, message: format!("subvolume '{name}' does not exist") });
        let answer = match prefix.as_str() {
            "mon dump" => json!({"mons": [{"public_addrs": {"addrvec": [{"type": "v2", "addr": "10.0.0.1:3300"}]}}]}),
            "fs ls" => json!([{"name": "cephfs"}]),
            "fs subvolume info" => match subvolumes.get(&name) {
                Some(copy) if copy["copying"].is_object() => {
                    return Err(Failure { errno: Errno::AGAIN, message: String::new() });
                }
                Some(subvolume) => subvolume.clone(),
                None => return missing(),
            },
            "fs subvolume create" => {
                let fresh = json!({"bytes_quota": command["size"], "bytes_used": 0, "data_pool": "d", "gid": 0,
                    "path": format!("/volumes/csi/{name}/u"), "pool_namespace": "", "state": "complete", "type": "subvolume"});
                subvolumes.insert(name.clone(), fresh);
                Value::Null
            }
            "fs subvolume metadata set" => {
                let Some(subvolume) = subvolumes.get_mut(&name) else { return missing() };
                subvolume["notes"] = command["value"].clone();
                Value::Null
            }
            "fs subvolume metadata get" => match subvolumes.get(&name).and_then(|one| one["notes"].as_str()) {
                Some(notes) => return Ok(notes.as_bytes().to_vec()),
                None => return missing(),
            },
            "fs subvolume getpath" => return Ok(format!("/volumes/csi/{name}/u\n").into_bytes()),
            "fs subvolume rm" => match subvolumes.remove(&name) {
                Some(_) => Value::Null,
                None => return missing(),
            },
            "fs subvolume ls" => subvolumes.keys().map(|name| json!({"name": name})).collect(),
            other => return self.0.snapshot_command(other, &command, &mut subvolumes),
        };
        if let Some(Fault::DoAndRefuse(errno)) = fault {
            return Err(Failure { errno, message: String::new() });
        }
        Ok(if answer.is_null() { Vec::new() } else { answer.to_string().into_bytes() })
    }
}

impl Double {
    fn snapshot_command(
        &self,
        prefix: &str,
        command: &Value,
        subvolumes: &mut BTreeMap<String, Value>,
    ) -> Result<Vec<u8>, Failure> {
        let text = |key: &str| command[key].as_str().unwrap_or_default().to_owned();
        let refused = |errno| Err(Failure { errno, message: String::new() });
        let (volume, name) = (text("sub_name"), text("snap_name"));
        let mut all = self.snapshots.lock().unwrap();
        let snapshots = all.entry(volume.clone()).or_default();
        let answer = match prefix {
            "fs subvolume snapshot ls" => snapshots.keys().map(|name| json!({"name": name})).collect(),
            "fs subvolume snapshot create" => {
                snapshots.entry(name).or_default();
                Value::Null
            }
            "fs subvolume resize" => {
                let size: u64 = text("new_size").parse().unwrap();
                subvolumes.get_mut(&volume).unwrap()["bytes_quota"] = size.into();
                Value::Null
            }
            "fs clone status" => match subvolumes.get(&text("clone_name")) {
                Some(copy) if copy["copying"].is_object() => {
                    // The next look finds it complete.
                    let source = copy["copying"].clone();
                    let copy = subvolumes.get_mut(&text("clone_name")).unwrap();
                    copy["copying"] = Value::Null;
                    json!({"status": {"state": "in-progress", "source": source}})
                }
                Some(_) => json!({"status": {"state": "complete"}}),
                None => return refused(Errno::NOENT),
            },
            "fs clone cancel" => return refused(Errno::INVAL),
            _ => {
                let Some(metadata) = snapshots.get_mut(&name) else { return refused(Errno::NOENT) };
                match prefix {
                    "fs subvolume snapshot info" => {
                        json!({"created_at": "2026-11-22 13:20:16.184757", "has_pending_clones": "no"})
                    }
                    "fs subvolume snapshot metadata set" => {
                        metadata.insert(text("key_name"), text("value"));
                        Value::Null
                    }
                    "fs subvolume snapshot metadata get" => match metadata.get(&text("key_name")) {
                        Some(value) => return Ok(value.as_bytes().to_vec()),
                        None => return refused(Errno::NOENT),
                    },
                    "fs subvolume snapshot metadata ls" => json!(metadata),
                    "fs subvolume snapshot rm" => {
                        snapshots.remove(&name);
                        Value::Null
                    }
                    "fs subvolume snapshot clone" => {
                        let target = text("target_sub_name");
                        if subvolumes.contains_key(&target) {
                            return refused(Errno::EXIST);
                        }
                        let mut copy = subvolumes[&volume].clone();
                        copy["path"] = format!("/volumes/csi/{target}/u").into();
                        copy["type"] = "clone".into();
                        copy["notes"] = Value::Null;
                        copy["copying"] = json!({"subvolume": volume, "snapshot": name});
                        subvolumes.insert(target, copy);
                        Value::Null
                    }
                    other => panic!("{other}"),
                }
            }
        };
        Ok(if answer.is_null() { Vec::new() } else { answer.to_string().into_bytes() })
    }
}

fn backend() -> (Arc<Double>, Cephfs) {
    let double = Arc::new(Double::default());
    let cephfs = restarted(&double);
    (double, cephfs)
}

/// A driver that knows nothing.
fn restarted(double: &Arc<Double>) -> Cephfs {
    let text = "
clusters:
  - {name: main, monitors: ['v2:here:1']}
  - {name: other, monitors: ['v2:there:1']}
  - {name: gone, monitors: ['v2:gone:1']}
drivers: [{backend: cephfs, socket: /run/x}]";
    let config = Config::parse(text, &|_| None).unwrap();
    let control = Control::new(Arc::new(Handle(double.clone())), DEADLINE, Arc::new(Metrics::default()));
    Cephfs::over(control, &config)
}

fn secrets(key: &str) -> Secrets {
    Secrets::new([("userID", "someone"), ("userKey", key)].map(|(key, value)| (key.to_owned(), value.to_owned())))
}

fn spec(name: &str, cluster: &str) -> Spec {
    Spec {
        name: Name::new(name).unwrap(),
        capacity: Some(CapacityRange::new(32 << 20, 0).unwrap()),
        capabilities: vec![Capability {
            access: Access::Mount { filesystem: String::new(), flags: Vec::new(), group: String::new() },
            mode: AccessMode::MultiNodeMultiWriter,
        }],
        parameters: [("cluster".to_owned(), cluster.to_owned())].into(),
        mutable: [].into(),
        owner: Owner::default(),
        places: Vec::new(),
    }
}

fn create(cephfs: &Cephfs, name: &str) -> crate::error::Result<crate::volume::Volume> {
    let spec = spec(name, "main");
    let id = cephfs.volume_id(&spec.name, &spec.parameters)?;
    cephfs.ensure_volume(&id, &spec, &secrets("right"))
}

#[test]
fn what_ceph_refuses_becomes_an_error_that_says_what_to_do() {
    let (double, cephfs) = backend();
    for (fault, kind, says) in [
        (Fault::Refuse(Errno::NOSPC, ""), ErrorKind::Exhausted, "No space left"),
        (
            Fault::Refuse(Errno::INVAL, "Traceback (most recent call last):\n  File x\nKeyError: 'a'"),
            ErrorKind::Internal,
            "KeyError",
        ),
        (Fault::Refuse(Errno::INVAL, "invalid pool layout 'x'"), ErrorKind::Invalid, "invalid pool layout"),
        (Fault::Refuse(Errno::OPNOTSUPP, "too old"), ErrorKind::Unsupported, "too old"),
        (Fault::Refuse(Errno::IO, ""), ErrorKind::Internal, "Input/output"),
        (Fault::Say("{not json"), ErrorKind::Internal, "cannot read what Ceph answered"),
    ] {
        double.faults.lock().unwrap().insert("fs subvolume create", fault);
        let error = create(&cephfs, "refused").unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says) && !error.to_string().contains("File x"), "{error}");
    }
    double.faults.lock().unwrap().insert("fs subvolume info", Fault::Say("{}"));
    assert_eq!(create(&cephfs, "refused").unwrap_err().kind(), ErrorKind::Internal);
}

#[test]
fn a_volume_that_cannot_be_as_asked_for_leaves_nothing() {
    let (double, cephfs) = backend();
    let mut spec = spec("x", "main");
    spec.parameters.insert("pin".to_owned(), "export=1".to_owned());
    let id = cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
    for (errno, kind) in [(Errno::INVAL, ErrorKind::Invalid), (Errno::ACCESS, ErrorKind::Denied)] {
        double.faults.lock().unwrap().insert("fs subvolume pin", Fault::Refuse(errno, "no"));
        assert_eq!(cephfs.ensure_volume(&id, &spec, &secrets("right")).unwrap_err().kind(), kind);
        assert!(double.subvolumes.lock().unwrap().is_empty());
    }
}

#[test]
fn a_new_volume_has_the_quota_of_its_attributes_class() {
    let (_, cephfs) = backend();
    let mut spec = spec("x", "main");
    spec.mutable.insert("quota".to_owned(), "64Mi".to_owned());
    let id = cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
    for _ in 0..2 {
        assert_eq!(cephfs.ensure_volume(&id, &spec, &secrets("right")).unwrap().size, 64 << 20);
    }
    spec.name = Name::new("y").unwrap();
    spec.capacity = Some(CapacityRange::new(0, 32 << 20).unwrap());
    let id = cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
    let error = cephfs.ensure_volume(&id, &spec, &secrets("right")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
}

#[test]
fn a_call_whose_answer_was_lost_is_finished_by_the_next() {
    let (double, cephfs) = backend();
    for step in ["fs subvolume create", "fs subvolume metadata set"] {
        double.faults.lock().unwrap().insert(step, Fault::DoAndRefuse(Errno::NOTCONN));
        assert_eq!(create(&cephfs, step).unwrap_err().kind(), ErrorKind::Unreachable);
        let volume = create(&cephfs, step).unwrap();
        let name = volume.id.as_str().rsplit('/').next().unwrap().to_owned();
        assert!(double.subvolumes.lock().unwrap()[&name]["notes"].as_str().unwrap().contains(step));
        double.faults.lock().unwrap().insert("fs subvolume rm", Fault::DoAndRefuse(Errno::SHUTDOWN));
        cephfs.ensure_absent(&volume.id, &secrets("right")).unwrap_err();
        cephfs.ensure_absent(&volume.id, &secrets("right")).unwrap();
    }
    assert!(double.subvolumes.lock().unwrap().is_empty());
    // A connection that Ceph has thrown out is made again.
    assert_eq!(double.connections.load(Ordering::SeqCst), 5);
}

#[test]
fn a_change_that_was_not_answered_keeps_later_ones_of_its_volume_away() {
    let (double, cephfs) = backend();
    let (slow, other) = (create(&cephfs, "slow").unwrap().id, create(&cephfs, "other").unwrap().id);
    double.faults.lock().unwrap().insert("fs subvolume rm", Fault::Hang);
    let begun = Instant::now();
    let error = cephfs.ensure_absent(&slow, &secrets("right")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutcomeUnknown, "{error}");
    assert!(begun.elapsed() >= DEADLINE && begun.elapsed() < 20 * DEADLINE);
    // It may be deleted at any moment: nobody may believe that it is still there.
    assert_eq!(cephfs.ensure_absent(&slow, &secrets("right")).unwrap_err().kind(), ErrorKind::Busy);
    let range = CapacityRange::new(64 << 20, 0).unwrap();
    assert_eq!(cephfs.ensure_size(&slow, range, &secrets("right")).unwrap_err().kind(), ErrorKind::Busy);
    cephfs.ensure_absent(&other, &secrets("right")).unwrap();
    double.let_go();
    let end = Instant::now() + Duration::from_secs(10);
    while cephfs.ensure_absent(&slow, &secrets("right")).is_err() {
        assert!(Instant::now() < end, "it stays away for ever");
    }
    create(&cephfs, "slow").unwrap();
}

#[test]
fn a_cluster_that_answers_nothing_holds_up_no_other() {
    let (double, cephfs) = backend();
    let mine = create(&cephfs, "mine").unwrap().id;
    *double.is_hung.lock().unwrap() = true;
    std::thread::scope(|scope| {
        for _ in 0..80 {
            scope.spawn(|| assert!(cephfs.find(&mine, &secrets("right")).is_err()));
        }
    });
    *double.is_hung.lock().unwrap() = false;
    let error = cephfs.find(&mine, &secrets("right")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    assert!(error.to_string().contains("cluster main has not answered"), "{error}");
    let spec = spec("other", "other");
    let other = cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
    assert!(cephfs.find(&other, &secrets("right")).unwrap().is_none());
    double.let_go();
    let end = Instant::now() + Duration::from_secs(10);
    while cephfs.find(&mine, &secrets("right")).is_err() {
        assert!(Instant::now() < end, "it stays away for ever");
    }
}

#[test]
fn who_brings_another_key_does_not_get_the_connection_of_the_right_one() {
    let (double, cephfs) = backend();
    let id = create(&cephfs, "mine").unwrap().id;
    let error = cephfs.find(&id, &secrets("wrong")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(cephfs.find(&id, &secrets("right")).unwrap().is_some());
    assert_eq!(double.connections.load(Ordering::SeqCst), 2);
    for (bad, kind) in [("", ErrorKind::Denied), ("not a key", ErrorKind::Denied)] {
        assert_eq!(cephfs.find(&id, &secrets(bad)).unwrap_err().kind(), kind);
    }
    assert_eq!(cephfs.find(&id, &Secrets::default()).unwrap_err().kind(), ErrorKind::Denied);
}

#[test]
fn those_who_wait_for_a_connection_share_its_failure() {
    let (double, cephfs) = backend();
    let spec = spec("x", "gone");
    let id = cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                let error = cephfs.find(&id, &secrets("right")).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
            });
        }
    });
    assert!(double.connections.load(Ordering::SeqCst) < 10, "{:?}", double.connections);
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_monitor_that_hangs_once_it_is_connected_is_given_up() {
    let (double, cephfs) = backend();
    let spec = spec("x", "main");
    let id = cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
    double.faults.lock().unwrap().insert("mon dump", Fault::Hang);
    let begun = Instant::now();
    let error = cephfs.find(&id, &secrets("right")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    assert!(begun.elapsed() >= DEADLINE && begun.elapsed() < 20 * DEADLINE);
    assert!(cephfs.find(&id, &secrets("right")).unwrap().is_none());
    double.let_go();
}

#[test]
fn a_connection_that_nobody_uses_is_dropped_and_made_again() {
    let (double, mut cephfs) = backend();
    cephfs.control.idle = Duration::from_millis(40);
    create(&cephfs, "idle").unwrap();
    // The double is held by this test, the back end and the connection.
    let end = Instant::now() + Duration::from_secs(10);
    while Arc::strong_count(&double) > 2 {
        assert!(Instant::now() < end, "the connection stays");
        std::thread::sleep(Duration::from_millis(5));
    }
    create(&cephfs, "idle").unwrap();
    assert_eq!(double.connections.load(Ordering::SeqCst), 2);
}

/// Makes a call once for each command that it sends, with a driver that dies before that command, and again with one
/// that knows nothing.
fn dying_before_each_command<T>(
    double: &Arc<Double>,
    call: impl Fn(&Cephfs, usize) -> crate::error::Result<T>,
    check: impl Fn(&Cephfs, usize, Option<T>),
) {
    for asks_again in [true, false] {
        for step in 1.. {
            let round = step + if asks_again { 0 } else { 1000 };
            let sent = double.commands.lock().unwrap().len();
            double.dies_before.store(sent + step, Ordering::SeqCst);
            let result = call(&restarted(double), round);
            let died = double.commands.lock().unwrap().len() >= sent + step;
            double.dies_before.store(0, Ordering::SeqCst);
            let fresh = restarted(double);
            let value = if asks_again || !died { Some(call(&fresh, round).unwrap()) } else { None };
            assert_eq!(result.is_err(), died);
            check(&fresh, round, value);
            if !died {
                assert!(step > 3, "{step}");
                break;
            }
        }
    }
}

#[test]
fn a_copy_may_die_before_any_command_and_leaves_nothing() {
    let (double, cephfs) = backend();
    let source = create(&cephfs, "source").unwrap().id;
    let source_name = source.as_str().rsplit('/').next().unwrap().to_owned();
    let larger = |round: usize| Spec {
        capacity: Some(CapacityRange::new(64 << 20, 0).unwrap()),
        ..spec(&format!("copy-{round}"), "main")
    };
    let id_of = |cephfs: &Cephfs, spec: &Spec| cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
    dying_before_each_command(
        &double,
        |cephfs, round| {
            let spec = larger(round);
            cephfs.ensure_clone(&id_of(cephfs, &spec), &spec, &source, &secrets("right"))
        },
        |cephfs, round, volume| {
            let id = id_of(cephfs, &larger(round));
            if let Some(volume) = volume {
                assert_eq!((volume.id.clone(), volume.size), (id.clone(), 64 << 20));
                assert!(double.snapshots.lock().unwrap()[&source_name].is_empty(), "round {round}");
            }
            cephfs.ensure_absent(&id, &secrets("right")).unwrap();
            assert!(double.snapshots.lock().unwrap()[&source_name].is_empty(), "round {round}");
            assert_eq!(double.subvolumes.lock().unwrap().len(), 1, "round {round}");
        },
    );
}

#[test]
fn a_view_of_a_snapshot_may_die_before_any_command_and_never_loses_it() {
    let (double, cephfs) = backend();
    let source = create(&cephfs, "source").unwrap().id;
    let name = Name::new("snapshot").unwrap();
    let snapshot = cephfs.ensure_snapshot(&name, &source, &[].into(), &[], &secrets("right")).unwrap().id;
    let read_only = |round: usize| {
        let mut spec = spec(&format!("view-{round}"), "main");
        spec.capabilities[0].mode = AccessMode::MultiNodeReaderOnly;
        spec
    };
    dying_before_each_command(
        &double,
        |cephfs, round| {
            let spec = read_only(round);
            let id = cephfs.volume_id(&spec.name, &spec.parameters)?;
            cephfs.ensure_restored(&id, &spec, &snapshot, &secrets("right"))
        },
        |cephfs, round, volume| {
            let spec = read_only(round);
            let id = cephfs.volume_id(&spec.name, &spec.parameters).unwrap();
            if volume.is_some() {
                let error = cephfs.ensure_snapshot_absent(&snapshot, &secrets("right")).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Precondition, "{error}");
            }
            cephfs.ensure_absent(&id, &secrets("right")).unwrap();
            assert_eq!(double.subvolumes.lock().unwrap().len(), 1, "round {round}");
        },
    );
    cephfs.ensure_snapshot_absent(&snapshot, &secrets("right")).unwrap();
}

#[test]
fn a_repeated_create_asks_once() {
    let (double, cephfs) = backend();
    create(&cephfs, "twice").unwrap();
    let sent = double.commands.lock().unwrap().len();
    create(&cephfs, "twice").unwrap();
    assert_eq!(double.commands.lock().unwrap()[sent..], ["fs subvolume info"]);
}
