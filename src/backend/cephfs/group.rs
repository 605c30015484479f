//! One subvolume group, as one user sees it: each method is one command of Ceph's `volumes` module.
//!
//! What a command answers becomes a value here, and what it refuses an error that says what to do. `group_name` is
//! always sent: capabilities that name a group refuse a command without one.

use serde_json::{Map, Value, json};

use super::control::{Account, Command, Control, Session, Trouble};
use super::names::Subvolume;
use crate::config::Cluster;
use crate::error::{Error, ErrorKind, Result};
use crate::host::Errno;
use crate::host::librados::{Failure, Target};

/// A group of one file system, and on whose behalf it is asked.
pub(super) struct Group<'a> {
    pub(super) control: &'a Control,
    pub(super) cluster: &'a Cluster,
    pub(super) account: &'a Account,
    pub(super) filesystem: String,
    pub(super) name: String,
}

/// What there is of a subvolume.
#[derive(Debug)]
pub(super) enum State {
    Absent,
    /// It was deleted, and only its snapshots are left.
    Retained,
    /// A copy that is not complete, or was given up.
    Copying,
    /// The manager died while it made it, and left it without a layout.
    HalfMade,
    Present(Info),
}

#[derive(Debug)]
pub(super) struct Info {
    /// In bytes; `None`: no quota.
    pub(super) size: Option<u64>,
    pub(super) used: u64,
    pub(super) path: String,
    pub(super) is_copy: bool,
    pub(super) data_pool: String,
    pub(super) namespace: String,
}

/// What a new subvolume is like.
#[derive(Debug, Default)]
pub(super) struct Creation<'a> {
    /// In bytes; `None`: no quota.
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    /// In octal digits.
    pub(super) mode: Option<&'a str>,
    pub(super) data_pool: Option<&'a str>,
    pub(super) is_isolated: bool,
}

/// How far a copy is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) state: String,
    /// The subvolume and snapshot that it is made from, while it is.
    pub(super) source: Option<(String, String)>,
    /// In Ceph's words, from Ceph 18 on.
    pub(super) progress: Option<String>,
    /// Why it failed.
    pub(super) failure: Option<String>,
}

/// A command refused, with the number that some callers know what to do about.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) errno: Errno,
    error: Error,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        refusal.error
    }
}

type Answer<T> = Result<T, Refusal>;

impl Group<'_> {
    pub(super) fn subvolume(&self, name: &str) -> Subvolume {
        Subvolume {
            cluster: self.cluster.name.clone(),
            filesystem: self.filesystem.clone(),
            group: self.name.clone(),
            name: name.to_owned(),
        }
    }

    pub(super) fn info(&self, name: &str) -> Result<State> {
        let answer = match self.ask("fs subvolume info", name, []) {
            Ok(answer) => answer,
            Err(refusal) if refusal.errno == Errno::NOENT => return Ok(State::Absent),
            Err(refusal) if refusal.errno == Errno::AGAIN => return Ok(State::Copying),
            Err(refusal) if refusal.errno == Errno::NODATA => return Ok(State::HalfMade),
            Err(refusal) => return Err(refusal.into()),
        };
        let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        if text("state") == "snapshot-retained" {
            return Ok(State::Retained);
        }
        let path = text("path");
        if path.is_empty() {
            fail!(Internal, "Ceph told no path of {}: {answer}", self.subvolume(name));
        }
        let number = |key: &str| answer.get(key).and_then(Value::as_u64);
        Ok(State::Present(Info {
            size: number("bytes_quota"),
            used: number("bytes_used").unwrap_or_default(),
            path,
            is_copy: text("type") == "clone",
            data_pool: text("data_pool"),
            namespace: text("pool_namespace"),
        }))
    }

    /// Makes a subvolume, and the group if it is the first. On one that exists this sets size, owner and mode again.
    pub(super) fn create(&self, name: &str, creation: &Creation<'_>) -> Result<()> {
        let known = [
            ("size", creation.size.map(Value::from)),
            ("uid", creation.uid.map(Value::from)),
            ("gid", creation.gid.map(Value::from)),
            ("mode", creation.mode.map(Value::from)),
            ("pool_layout", creation.data_pool.map(Value::from)),
            ("namespace_isolated", creation.is_isolated.then_some(Value::from(true))),
        ];
        let create = || {
            let arguments = known.iter().filter_map(|(key, value)| Some((*key, value.clone()?)));
            self.change("fs subvolume create", name, arguments)
        };
        match create() {
            Err(refusal) if refusal.errno == Errno::NOENT => {
                self.create_group()?;
                Ok(create().map(drop)?)
            }
            result => Ok(result.map(drop)?),
        }
    }

    fn create_group(&self) -> Result<()> {
        let arguments = vec![("vol_name", json!(self.filesystem)), ("group_name", json!(self.name))];
        match self.run("fs subvolumegroup create", arguments, None) {
            Err(refusal) if refusal.errno == Errno::NOENT => {
                self.check_filesystem()?;
                Err(refusal.into())
            }
            result => Ok(result.map(drop)?),
        }
    }

    /// Is there such a file system?
    ///
    /// # Errors
    /// `Invalid`, with the names of those there are.
    pub(super) fn check_filesystem(&self) -> Result<()> {
        let names = self.filesystems()?;
        if !names.contains(&self.filesystem) {
            let (name, wanted, names) = (&self.cluster.name, &self.filesystem, names.join(", "));
            fail!(Invalid, "cluster {name} has no file system {wanted} that {} may see; it has: {names}", self.user());
        }
        Ok(())
    }

    /// The file systems that this user may see.
    pub(super) fn filesystems(&self) -> Result<Vec<String>> {
        let answer = self.monitor("fs ls")?;
        let names = answer.as_array().into_iter().flatten().filter_map(|one| one.get("name")?.as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// A question to the monitors.
    pub(super) fn monitor(&self, prefix: &'static str) -> Result<Value> {
        let command = Command { target: Target::Monitor, prefix, arguments: Vec::new(), changes: None };
        Ok(self.send(command)?)
    }

    pub(super) fn path(&self, name: &str) -> Result<String> {
        let answer = match self.raw(self.command("fs subvolume getpath", name, [], false)) {
            Err(refusal) if refusal.errno == Errno::NOENT => {
                fail!(Busy, "{} vanished while it was made: try again", self.subvolume(name))
            }
            answer => answer?,
        };
        Ok(String::from_utf8_lossy(&answer).trim().to_owned())
    }

    /// Deletes it. Not being there is `ENOENT`, having snapshots `ENOTEMPTY`.
    pub(super) fn remove(&self, name: &str) -> Answer<()> {
        self.change("fs subvolume rm", name, []).map(drop)
    }

    /// Deletes it, and keeps its snapshots.
    pub(super) fn remove_retaining_snapshots(&self, name: &str) -> Answer<()> {
        self.change("fs subvolume rm", name, [("retain_snapshots", json!(true))]).map(drop)
    }

    /// Deletes a copy that was given up.
    pub(super) fn remove_copy(&self, name: &str) -> Answer<()> {
        self.change("fs subvolume rm", name, [("force", json!(true))]).map(drop)
    }

    /// Sets the quota, in bytes. Ceph's own `no_shrink` only minds what is used: the caller has compared.
    pub(super) fn resize(&self, name: &str, size: u64) -> Result<()> {
        let arguments = [("new_size", json!(size.to_string())), ("no_shrink", json!(true))];
        Ok(self.change("fs subvolume resize", name, arguments).map(drop)?)
    }

    pub(super) fn pin(&self, name: &str, kind: &str, setting: &str) -> Result<()> {
        let arguments = [("pin_type", json!(kind)), ("pin_setting", json!(setting))];
        Ok(self.change("fs subvolume pin", name, arguments).map(drop)?)
    }

    pub(super) fn set_metadata(&self, name: &str, key: &str, value: &str) -> Result<()> {
        let arguments = [("key_name", json!(key)), ("value", json!(value))];
        Ok(self.change("fs subvolume metadata set", name, arguments).map(drop)?)
    }

    /// `None`: there is no such key, or no such subvolume.
    pub(super) fn metadata(&self, name: &str, key: &str) -> Result<Option<String>> {
        let command = self.command("fs subvolume metadata get", name, [("key_name", json!(key))], false);
        text_of(self.raw(command))
    }

    /// The names of all subvolumes in the group, in order.
    pub(super) fn list(&self) -> Result<Vec<String>> {
        let arguments = vec![("vol_name", json!(self.filesystem)), ("group_name", json!(self.name))];
        match self.run("fs subvolume ls", arguments, None) {
            Ok(answer) => Ok(names(&answer)),
            // The group is made with its first volume.
            Err(refusal) if refusal.errno == Errno::NOENT => self.check_filesystem().map(|()| Vec::new()),
            Err(refusal) => Err(refusal.into()),
        }
    }

    pub(super) fn create_snapshot(&self, name: &str, snapshot: &str) -> Answer<()> {
        self.change("fs subvolume snapshot create", name, [("snap_name", json!(snapshot))]).map(drop)
    }

    /// When the snapshot was taken, in Ceph's words, and whether copies of it are being made. `None`: there is none.
    pub(super) fn snapshot(&self, name: &str, snapshot: &str) -> Result<Option<(String, bool)>> {
        match self.ask("fs subvolume snapshot info", name, [("snap_name", json!(snapshot))]) {
            Ok(answer) => {
                let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                Ok(Some((text("created_at"), text("has_pending_clones") == "yes")))
            }
            Err(refusal) if refusal.errno == Errno::NOENT => Ok(None),
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// The names of all snapshots of a subvolume, in order.
    pub(super) fn snapshots(&self, name: &str) -> Result<Vec<String>> {
        match self.ask("fs subvolume snapshot ls", name, []) {
            Ok(answer) => Ok(names(&answer)),
            Err(refusal) if matches!(refusal.errno, Errno::NOENT | Errno::AGAIN) => Ok(Vec::new()),
            Err(refusal) => Err(refusal.into()),
        }
    }

    pub(super) fn remove_snapshot(&self, name: &str, snapshot: &str) -> Answer<()> {
        self.change("fs subvolume snapshot rm", name, [("snap_name", json!(snapshot))]).map(drop)
    }

    pub(super) fn set_snapshot_metadata(&self, name: &str, snapshot: &str, key: &str, value: &str) -> Result<()> {
        let arguments = [("snap_name", json!(snapshot)), ("key_name", json!(key)), ("value", json!(value))];
        Ok(self.change("fs subvolume snapshot metadata set", name, arguments).map(drop)?)
    }

    pub(super) fn snapshot_metadata(&self, name: &str, snapshot: &str, key: &str) -> Result<Option<String>> {
        let arguments = [("snap_name", json!(snapshot)), ("key_name", json!(key))];
        text_of(self.raw(self.command("fs subvolume snapshot metadata get", name, arguments, false)))
    }

    /// All keys of a snapshot's metadata, with their values.
    pub(super) fn all_snapshot_metadata(&self, name: &str, snapshot: &str) -> Result<Map<String, Value>> {
        match self.ask("fs subvolume snapshot metadata ls", name, [("snap_name", json!(snapshot))]) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(other) => fail!(Internal, "Ceph told no metadata of {}@{snapshot}: {other}", self.subvolume(name)),
            Err(refusal) if refusal.errno == Errno::NOENT => Ok(Map::new()),
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// Begins to copy a snapshot into a new subvolume of the group `target`. One that exists is `EEXIST`.
    pub(super) fn begin_copy(
        &self,
        name: &str,
        snapshot: &str,
        target: &Subvolume,
        data_pool: Option<&str>,
    ) -> Answer<()> {
        let mut arguments = vec![
            ("snap_name", json!(snapshot)),
            ("target_sub_name", json!(target.name)),
            ("target_group_name", json!(target.group)),
        ];
        arguments.extend(data_pool.map(|pool| ("pool_layout", json!(pool))));
        let mut command = self.command("fs subvolume snapshot clone", name, arguments, true);
        command.changes = Some(target.to_string());
        self.send(command).map(drop)
    }

    pub(super) fn copy(&self, name: &str) -> Answer<Copy> {
        let arguments = self.of_copy(name);
        let answer = self.run("fs clone status", arguments, None)?;
        let status = answer.get("status").unwrap_or(&Value::Null);
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let source = status.get("source");
        let source = text(source.and_then(|source| source.get("subvolume")))
            .zip(text(source.and_then(|source| source.get("snapshot"))));
        let failure = status.get("failure").and_then(|failure| text(failure.get("error_msg")));
        let progress = status.get("progress_report").and_then(|report| text(report.get("percentage cloned")));
        Ok(Copy { state: text(status.get("state")).unwrap_or_default(), source, progress, failure })
    }

    pub(super) fn cancel_copy(&self, name: &str) -> Answer<()> {
        self.run("fs clone cancel", self.of_copy(name), Some(self.subvolume(name).to_string())).map(drop)
    }

    fn of_copy(&self, name: &str) -> Vec<(&'static str, Value)> {
        vec![("vol_name", json!(self.filesystem)), ("clone_name", json!(name)), ("group_name", json!(self.name))]
    }

    /// The cluster's id and monitors, for the node.
    pub(super) fn session(&self) -> Result<Session> {
        self.control.session(self.cluster, self.account).map_err(|trouble| match trouble {
            Trouble::Unanswered(error) => error,
            Trouble::Refused(failure) => self.refusal("mon dump", failure).error,
        })
    }

    pub(super) fn user(&self) -> String {
        format!("client.{}", self.account.user)
    }

    fn ask(
        &self,
        prefix: &'static str,
        name: &str,
        more: impl IntoIterator<Item = (&'static str, Value)>,
    ) -> Answer<Value> {
        self.send(self.command(prefix, name, more, false))
    }

    fn change(
        &self,
        prefix: &'static str,
        name: &str,
        more: impl IntoIterator<Item = (&'static str, Value)>,
    ) -> Answer<Value> {
        self.send(self.command(prefix, name, more, true))
    }

    fn command(
        &self,
        prefix: &'static str,
        name: &str,
        more: impl IntoIterator<Item = (&'static str, Value)>,
        is_change: bool,
    ) -> Command {
        let mut arguments =
            vec![("vol_name", json!(self.filesystem)), ("group_name", json!(self.name)), ("sub_name", json!(name))];
        arguments.extend(more);
        let changes = is_change.then(|| self.subvolume(name).to_string());
        Command { target: Target::Manager, prefix, arguments, changes }
    }

    fn run(
        &self,
        prefix: &'static str,
        arguments: Vec<(&'static str, Value)>,
        changes: Option<String>,
    ) -> Answer<Value> {
        self.send(Command { target: Target::Manager, prefix, arguments, changes })
    }

    fn send(&self, command: Command) -> Answer<Value> {
        let prefix = command.prefix;
        let answer = self.raw(command)?;
        if answer.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&answer).map_err(|error| {
            let error =
                Error::caused(ErrorKind::Internal, format!("cannot read what Ceph answered to `{prefix}`"), error);
            Refusal { errno: Errno::BADMSG, error }
        })
    }

    fn raw(&self, command: Command) -> Answer<Vec<u8>> {
        let prefix = command.prefix;
        self.control.ask(self.cluster, self.account, command).map_err(|trouble| match trouble {
            Trouble::Unanswered(error) => Refusal { errno: Errno::TIMEDOUT, error },
            Trouble::Refused(failure) => {
                // Capabilities name the file system: one that is not there looks like one that is not allowed.
                let is_denied = matches!(failure.errno, Errno::ACCESS | Errno::PERM) && prefix != "fs ls";
                match is_denied.then(|| self.check_filesystem()) {
                    Some(Err(error)) if error.kind() == ErrorKind::Invalid => Refusal { errno: failure.errno, error },
                    _ => self.refusal(prefix, failure),
                }
            }
        })
    }

    fn refusal(&self, prefix: &str, failure: Failure) -> Refusal {
        let Failure { errno, message } = failure;
        // A defect in Ceph comes as its whole stack.
        let said = message.lines().last().unwrap_or_default().trim();
        let is_defect = message.starts_with("Traceback");
        let (cluster, filesystem, group) = (&self.cluster.name, &self.filesystem, &self.name);
        let error = match errno {
            Errno::ACCESS | Errno::PERM => Error::new(
                ErrorKind::Denied,
                format!(
                    "{} lacks a capability on cluster {cluster}: mgr 'allow command \"{prefix}\" with vol_name={filesystem} group_name={group}'",
                    self.user()
                ),
            ),
            _ => {
                let kind = match errno {
                    // A manager that has just started.
                    Errno::OPNOTSUPP if said.contains("not enabled/loaded") => ErrorKind::Unreachable,
                    Errno::INVAL if !is_defect => ErrorKind::Invalid,
                    Errno::NOENT => ErrorKind::NotFound,
                    Errno::EXIST => ErrorKind::Conflict,
                    Errno::NOSPC | Errno::DQUOT => ErrorKind::Exhausted,
                    Errno::OPNOTSUPP => ErrorKind::Unsupported,
                    Errno::AGAIN | Errno::BUSY => ErrorKind::Busy,
                    Errno::TIMEDOUT | Errno::NOTCONN | Errno::SHUTDOWN | Errno::CONNREFUSED => ErrorKind::Unreachable,
                    _ => ErrorKind::Internal,
                };
                let what = format!("`{prefix}` failed in {cluster}/{filesystem}/{group}");
                let what = if said.is_empty() { what } else { format!("{what}: {said}") };
                Error::caused(kind, what, std::io::Error::from(errno))
            }
        };
        Refusal { errno, error }
    }
}

fn names(answer: &Value) -> Vec<String> {
    let all = answer.as_array().into_iter().flatten();
    let mut names: Vec<_> = all.filter_map(|one| Some(one.get("name")?.as_str()?.to_owned())).collect();
    names.sort();
    names
}

fn text_of(answer: Answer<Vec<u8>>) -> Result<Option<String>> {
    match answer {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned())),
        Err(refusal) if refusal.errno == Errno::NOENT => Ok(None),
        Err(refusal) => Err(refusal.into()),
    }
}
