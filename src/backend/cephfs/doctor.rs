//! Checks of a configured cluster and of this machine, before a volume needs them. Nothing is changed.

mod permissions;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::control::{Account, Command, Control, Rados, Trouble};
use super::group::Group;
use super::lists::without_mds;
use crate::backend::{Finding, Verdict};
use crate::config::{self, Cluster};
use crate::error::ErrorKind;
use crate::host::ceph::{self, Protocol};
use crate::host::command;
use crate::host::librados::{Failure, Librados, Target};
use crate::telemetry::Metrics;

/// So long a monitor may take to greet; and once more, to look its name up.
const GREETING: Duration = Duration::from_secs(5);
/// Berth is tried with Ceph from this version on.
const OLDEST: u32 = 16;

/// Who is looked at besides the user that the configuration names.
#[derive(Clone, Copy, Debug, Default)]
pub struct Users<'a> {
    /// The one in the controller's secrets.
    pub provisioner: Option<&'a config::Account>,
    /// The one in the nodes' secrets.
    pub node: Option<&'a config::Account>,
}

/// What a user is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Provisioner,
    Node,
}

/// A user that has connected.
struct Patient<'a> {
    control: &'a Control,
    cluster: &'a Cluster,
    account: Account,
    role: Role,
    /// What no subvolume, user or key is called.
    nobody: &'a str,
}

/// Ends an examination: the next question would only wait as long as the last.
type Unanswered = Finding;

/// Looks at a cluster. A command has to be answered within `deadline`; after one that is not, no other is sent.
pub fn examine(cluster: &Cluster, users: Users<'_>, deadline: Duration) -> Vec<Finding> {
    let control = Control::new(Arc::new(Rados::default()), deadline, Arc::new(Metrics::default()));
    let mut findings = monitors(cluster);
    let one_answers = findings.iter().any(|finding| finding.verdict == Verdict::Fine);
    match Librados::load() {
        Ok(library) => {
            let what = format!("Ceph's library is here: librados, interface {}", library.version());
            findings.push(Finding::fine(&cluster.name, what));
        }
        Err(error) => {
            let what = format!("Ceph's library librados can't be loaded: {error}");
            findings.push(Finding::wrong(&cluster.name, what, "install Debian's package librados2"));
            return findings;
        }
    }
    if !one_answers {
        return findings;
    }
    let mut accounts: Vec<(&config::Account, Role)> = Vec::new();
    for account in [cluster.account.as_ref(), users.provisioner].into_iter().flatten() {
        if accounts.iter().all(|(known, _)| *known != account) {
            accounts.push((account, Role::Provisioner));
        }
    }
    accounts.extend(users.node.map(|account| (account, Role::Node)));
    if accounts.is_empty() {
        let advice = "name one with --provisioner and --provisioner-key-file, or as the cluster's `user` and `keyFile`";
        findings.push(Finding::doubtful(&cluster.name, "there is no user to ask anything else with", advice));
    }
    let nobody = format!("berth-doctor-{}", SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos());
    let mut has_version = false;
    for (account, role) in accounts {
        let patient = match Patient::connect(&control, cluster, account, role, &nobody) {
            Ok(patient) => patient,
            Err(finding) => {
                findings.push(finding);
                continue;
            }
        };
        if let Err(unanswered) = patient.look(&mut has_version, &mut findings) {
            findings.push(unanswered);
            break;
        }
    }
    findings
}

/// Can this machine mount CephFS? ceph-fuse is asked for its version, and has to answer within `deadline`.
pub fn examine_machine(deadline: Duration) -> Finding {
    let subject = "this machine";
    match ceph::has_kernel_client() {
        Ok(true) => return Finding::fine(subject, "the kernel has a CephFS client"),
        Ok(false) => {}
        Err(error) => return Finding::doubtful(subject, error.to_string(), "try it as root"),
    }
    match command::output("ceph-fuse", &["--version"], deadline) {
        Ok(said) => {
            let version = Version::find(&said).map_or(said.clone(), |version| version.to_string());
            let what = format!("the kernel has no CephFS client; ceph-fuse is here, version {version}, and mounts");
            Finding::fine(subject, what)
        }
        Err(error) => {
            let what = format!("nothing here mounts CephFS: the kernel has no client, and {error}");
            Finding::wrong(subject, what, "load the kernel's module `ceph`, or install ceph-fuse")
        }
    }
}

/// Asks all of them at the same time, without a user.
fn monitors(cluster: &Cluster) -> Vec<Finding> {
    let end = Instant::now() + 2 * GREETING;
    let ask = |address: &'_ String| {
        let (sender, receiver) = mpsc::channel();
        let plain = address.trim_start_matches("v1:").trim_start_matches("v2:").to_owned();
        // Nobody waits for it for ever: looking a name up may take longer than a person likes.
        std::thread::spawn(move || sender.send(ceph::greeting(&plain, GREETING)));
        receiver
    };
    let asked: Vec<_> = cluster.monitors.iter().map(|address| (address, ask(address))).collect();
    let found = asked.into_iter().map(|(address, receiver)| {
        let what = |how: &str| format!("monitor {address} {how}");
        let advice = "compare it with `ceph mon dump`; is the monitor up, and no firewall between?";
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Ok(Protocol::V1)) if address.starts_with("v2:") => {
                Finding::wrong(&cluster.name, what("speaks the protocol v1 there"), "write `v1:` before it")
            }
            Ok(Ok(Protocol::V2)) if address.starts_with("v1:") => {
                Finding::wrong(&cluster.name, what("speaks the protocol v2 there"), "write `v2:` before it")
            }
            Ok(Ok(_)) => Finding::fine(&cluster.name, what("answers")),
            Ok(Err(error)) => Finding::wrong(&cluster.name, what(&format!("does not answer: {error}")), advice),
            Err(_) => Finding::wrong(&cluster.name, what("does not answer: its name is not looked up in time"), advice),
        }
    });
    found.collect()
}

impl<'a> Patient<'a> {
    fn connect(
        control: &'a Control,
        cluster: &'a Cluster,
        account: &config::Account,
        role: Role,
        nobody: &'a str,
    ) -> Result<Self, Finding> {
        let account = Account::configured(account).map_err(|error| {
            Finding::wrong(&cluster.name, error.to_string(), "the file holds what `ceph auth get-key` prints")
        })?;
        let patient = Self { control, cluster, account, role, nobody };
        match control.session(cluster, &patient.account) {
            Ok(_) => Ok(patient),
            Err(Trouble::Unanswered(error)) => {
                let user = patient.user();
                let advice = match error.kind() {
                    ErrorKind::Denied => {
                        format!("compare with `ceph auth get {user}`: the key, and a capability mon 'allow r'")
                    }
                    _ => "see `ceph status`: is there a quorum of monitors?".to_owned(),
                };
                Err(Finding::wrong(&cluster.name, error.to_string(), advice))
            }
            Err(Trouble::Refused(failure)) => Err(Finding::wrong(&cluster.name, failure.message, "")),
        }
    }

    fn user(&self) -> String {
        format!("client.{}", self.account.user)
    }

    fn look(&self, has_version: &mut bool, findings: &mut Vec<Finding>) -> Result<(), Unanswered> {
        let session = self.control.session(self.cluster, &self.account);
        let fsid = session.map(|session| session.fsid().to_owned()).unwrap_or_default();
        findings
            .push(Finding::fine(&self.cluster.name, format!("{} connects; the cluster's id is {fsid}", self.user())));
        if !std::mem::replace(has_version, true) {
            findings.push(self.versions()?);
        }
        let filesystems: Vec<_> = self.cluster.filesystems.iter().filter(|one| self.sees(one, findings)).collect();
        if self.role == Role::Provisioner {
            for filesystem in &filesystems {
                for group in &self.cluster.groups {
                    findings.extend(self.needs(filesystem, group)?);
                }
            }
        }
        findings.push(self.excess(&filesystems)?);
        Ok(())
    }

    fn versions(&self) -> Result<Finding, Unanswered> {
        let subject = &self.cluster.name;
        Ok(match self.ask(Target::Monitor, "versions", Vec::new())? {
            Ok(answer) => judge_versions(subject, &answer),
            Err(failure) => {
                let what = format!("Ceph does not tell its versions: {}", failure.message);
                Finding::doubtful(subject, what, format!("give {} a capability mon 'allow r'", self.user()))
            }
        })
    }

    /// Is the file system there for this user?
    fn sees(&self, filesystem: &str, findings: &mut Vec<Finding>) -> bool {
        let subject = format!("{}/{filesystem}", self.cluster.name);
        let user = self.user();
        let group = Group {
            control: self.control,
            cluster: self.cluster,
            account: &self.account,
            filesystem: filesystem.to_owned(),
            name: String::new(),
        };
        let seen = group.filesystems().and_then(|names| Ok((names, without_mds(&group)?)));
        let (sees, finding) = match seen {
            Err(error) => (
                false,
                Finding::wrong(&subject, error.to_string(), format!("{user} needs mon 'allow r fsname={filesystem}'")),
            ),
            Ok((names, _)) if !names.iter().any(|name| name == filesystem) => {
                let what =
                    format!("there is no file system {filesystem} that {user} may see, only: {}", names.join(", "));
                (false, Finding::wrong(&subject, what, "is it right in the configuration? See `ceph fs ls`"))
            }
            Ok((_, Some(problem))) => {
                let advice = "see `ceph fs status`: nothing can be made, mounted or deleted until one is";
                (false, Finding::wrong(&subject, problem.message, advice))
            }
            Ok((_, None)) => (true, Finding::fine(&subject, format!("{user} sees it, and an MDS of it is active"))),
        };
        findings.push(finding);
        sees
    }

    /// Sends a command, and tells an answer from a refusal.
    fn ask(
        &self,
        target: Target,
        prefix: &'static str,
        arguments: Vec<(&'static str, Value)>,
    ) -> Result<Result<Value, Failure>, Unanswered> {
        let command = Command { target, prefix, arguments, changes: None };
        match self.control.ask(self.cluster, &self.account, command) {
            Ok(answer) => Ok(Ok(serde_json::from_slice(&answer).unwrap_or_default())),
            Err(Trouble::Refused(failure)) => Ok(Err(failure)),
            Err(Trouble::Unanswered(error)) => {
                let advice = "see `ceph status`; nothing further was asked";
                Err(Finding::wrong(&self.cluster.name, error.to_string(), advice))
            }
        }
    }
}

/// A version of Ceph: 16.2.15.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version([u32; 3]);

impl Version {
    /// From `ceph version 16.2.15 (618f44...) pacific (stable)`.
    fn find(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace().skip_while(|word| *word != "version").skip(1);
        let mut parts = words.next()?.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        let mut next = || parts.next()?.ok();
        Some(Self([next()?, next()?, next()?]))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// Of the daemons that Berth has to do with, from what `versions` answers.
fn judge_versions(subject: &str, answer: &Value) -> Finding {
    let mut daemons: BTreeMap<Version, Vec<&str>> = BTreeMap::new();
    for daemon in ["mon", "mgr", "mds"] {
        for text in answer.get(daemon).and_then(Value::as_object).into_iter().flat_map(|versions| versions.keys()) {
            daemons.entry(Version::find(text).unwrap_or(Version([0; 3]))).or_default().push(daemon);
        }
    }
    let text = |(version, daemons): (&Version, &Vec<&str>)| format!("{version} ({})", daemons.join(", "));
    let all = daemons.iter().map(text).collect::<Vec<_>>().join(" and ");
    match daemons.keys().next() {
        None => Finding::doubtful(subject, "Ceph tells no version of any daemon", "see `ceph versions`"),
        Some(oldest) if oldest.0[0] < OLDEST => {
            let advice = format!("upgrade Ceph: Berth is tried with {OLDEST} and newer");
            Finding::doubtful(subject, format!("Ceph is old: {all}"), advice)
        }
        Some(_) if daemons.len() > 1 => Finding::doubtful(
            subject,
            format!("Ceph's daemons differ: {all}"),
            "finish the upgrade; see `ceph versions`",
        ),
        Some(_) => Finding::fine(subject, format!("Ceph is {all}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ceph_is_doubtful_when_its_daemons_differ_or_are_old() {
        let name = |version: &str| format!("ceph version {version} (618f44) some (stable)");
        let judge = |mon: &str, mds: &str| {
            let answer = json!({"mon": {name(mon): 3}, "mgr": {name(mon): 2}, "mds": {name(mds): 1}, "overall": {}});
            let finding = judge_versions("main", &answer);
            (finding.verdict, finding.what)
        };
        let fine = (Verdict::Fine, "Ceph is 18.2.4 (mon, mgr, mds)".to_owned());
        assert_eq!(judge("18.2.4", "18.2.4"), fine);
        let differ = "Ceph's daemons differ: 18.2.4 (mds) and 19.2.0 (mon, mgr)".to_owned();
        assert_eq!(judge("19.2.0-12-gabc", "18.2.4"), (Verdict::Doubtful, differ));
        let old = "Ceph is old: 15.2.17 (mon, mgr, mds)".to_owned();
        assert_eq!(judge("15.2.17", "15.2.17"), (Verdict::Doubtful, old));
        assert_eq!(judge_versions("main", &json!({})).verdict, Verdict::Doubtful);
    }
}
