//! What a user may do: all that its role needs, and no more.
//!
//! That can only be found out by trying. Each command is sent for a subvolume that does not exist, or with a mode that
//! is none; Ceph looks at capabilities first, so what may be used fails for that reason, and what may not is denied.

use serde_json::{Value, json};

use super::{Patient, Role, Unanswered};
use crate::backend::Finding;
use crate::host::Errno;
use crate::host::librados::Target;

/// A group, and a file system, that nobody has.
const NOWHERE: &str = "berth-doctor-nowhere";
/// Ceph refuses such a mode before it makes or changes anything.
const NO_MODE: (&str, &str) = ("mode", "9");
/// Its capability names the group of the target too.
const CLONE: &str = "fs subvolume snapshot clone";

/// A command, what its name argument is called, and what else it takes.
type Probe = (&'static str, Option<&'static str>, &'static [(&'static str, &'static str)]);

/// Every command that the controller uses, in the order of `deploy/cephfs/users.sh`.
const NEEDED: [Probe; 20] = [
    ("fs subvolumegroup create", None, &[NO_MODE]),
    ("fs subvolume create", Some("sub_name"), &[NO_MODE]),
    ("fs subvolume info", Some("sub_name"), &[]),
    ("fs subvolume getpath", Some("sub_name"), &[]),
    ("fs subvolume ls", None, &[]),
    ("fs subvolume rm", Some("sub_name"), &[]),
    ("fs subvolume resize", Some("sub_name"), &[("new_size", "4194304")]),
    ("fs subvolume pin", Some("sub_name"), &[("pin_type", "export"), ("pin_setting", "-1")]),
    ("fs subvolume metadata set", Some("sub_name"), &[("key_name", "none"), ("value", "none")]),
    ("fs subvolume metadata get", Some("sub_name"), &[("key_name", "none")]),
    ("fs subvolume snapshot create", Some("sub_name"), &[("snap_name", "none")]),
    ("fs subvolume snapshot info", Some("sub_name"), &[("snap_name", "none")]),
    ("fs subvolume snapshot ls", Some("sub_name"), &[]),
    ("fs subvolume snapshot rm", Some("sub_name"), &[("snap_name", "none")]),
    (
        "fs subvolume snapshot metadata set",
        Some("sub_name"),
        &[("snap_name", "none"), ("key_name", "none"), ("value", "none")],
    ),
    ("fs subvolume snapshot metadata get", Some("sub_name"), &[("snap_name", "none"), ("key_name", "none")]),
    ("fs subvolume snapshot metadata ls", Some("sub_name"), &[("snap_name", "none")]),
    ("fs clone status", Some("clone_name"), &[]),
    ("fs clone cancel", Some("clone_name"), &[]),
    (CLONE, Some("sub_name"), &[("snap_name", "none"), ("target_sub_name", "none")]),
];

/// How a command ended that had nothing to do.
enum Probed {
    Permitted,
    Denied,
    /// In Ceph's words.
    Strange(String),
}

impl Patient<'_> {
    /// Everything that the controller does in a group: may the user?
    pub(super) fn needs(&self, filesystem: &str, group: &str) -> Result<Vec<Finding>, Unanswered> {
        let subject = format!("{}/{filesystem}/{group}", self.cluster.name);
        let (user, count) = (self.user(), NEEDED.len());
        let (mut missing, mut strange) = (Vec::new(), Vec::new());
        for probe in &NEEDED {
            match self.try_in(filesystem, group, group, probe)? {
                Probed::Permitted => {}
                Probed::Denied => missing.push(capability(probe.0, filesystem, group)),
                Probed::Strange(said) => strange.push((probe.0, said)),
            }
        }
        if missing.is_empty() && strange.is_empty() {
            let what = format!("{user} may use the {count} commands that the controller needs");
            return Ok(vec![Finding::fine(&subject, what)]);
        }
        let advice =
            format!("grant it; deploy/cephfs/users.sh --update {filesystem} {group} makes users that have all");
        if missing.len() == count {
            let what = format!("{user} may use none of the {count} commands that the controller needs");
            return Ok(vec![Finding::wrong(&subject, what, advice)]);
        }
        let missing = missing
            .into_iter()
            .map(|capability| Finding::wrong(&subject, format!("{user} lacks {capability}"), advice.clone()));
        let strange = strange.into_iter().map(|(prefix, said)| {
            let what = format!("`{prefix}` of {user} fails: {said}");
            Finding::wrong(&subject, what, "is Ceph too old for it, or its module `volumes` not running?")
        });
        Ok(missing.chain(strange).collect())
    }

    /// What the user may do, and has no need to.
    pub(super) fn excess(&self, filesystems: &[&String]) -> Result<Finding, Unanswered> {
        let mut found = self.excess_at_monitors()?;
        if self.may(Target::Manager, "fs volume ls", Vec::new())? {
            found.push("list all file systems (mgr `fs volume ls`)".to_owned());
        }
        for filesystem in filesystems {
            for group in &self.cluster.groups {
                let more = match self.role {
                    Role::Provisioner => self.excess_of_a_provisioner(filesystem, group)?,
                    Role::Node => self.excess_of_a_node(filesystem, group)?,
                };
                found.extend(more);
            }
        }
        let (subject, user) = (&self.cluster.name, self.user());
        if found.is_empty() {
            return Ok(Finding::fine(subject, format!("{user} may do no more than it needs, as far as was tried")));
        }
        let what = format!("{user} may do more than it needs: {}", found.join("; "));
        Ok(Finding::doubtful(subject, what, "deploy/cephfs/users.sh makes users that may do less"))
    }

    fn excess_at_monitors(&self) -> Result<Vec<String>, Unanswered> {
        let nobody = json!(format!("client.{}", self.nobody));
        // An address for documentation (RFC 5737): nobody has it, and it is on no list.
        let address = json!("192.0.2.1:0/1");
        let mut found = Vec::new();
        for (harm, prefix, arguments) in [
            ("read every user's key", "auth get", vec![("entity", nobody)]),
            ("read stored secrets", "config-key exists", vec![("key", json!(self.nobody))]),
            ("lock clients out", "osd blocklist", vec![("blocklistop", json!("rm")), ("addr", address)]),
        ] {
            if self.may(Target::Monitor, prefix, arguments)? {
                found.push(format!("{harm} (mon `{prefix}`)"));
            }
        }
        Ok(found)
    }

    fn excess_of_a_provisioner(&self, filesystem: &str, group: &str) -> Result<Vec<String>, Unanswered> {
        let list: Probe = ("fs subvolume ls", None, &[]);
        let clone: Probe = (CLONE, Some("sub_name"), &[("snap_name", "none"), ("target_sub_name", "none")]);
        let authorize: Probe = ("fs subvolume authorize", Some("sub_name"), &[("auth_id", NOWHERE)]);
        let mut found = Vec::new();
        for (harm, filesystem, group, target, probe) in [
            ("see other groups", filesystem, NOWHERE, NOWHERE, list),
            ("see other file systems", NOWHERE, group, group, list),
            ("copy into other groups", filesystem, group, NOWHERE, clone),
            ("make users", filesystem, group, group, authorize),
        ] {
            if let Probed::Permitted = self.try_in(filesystem, group, target, &probe)? {
                found.push(format!("{harm} (mgr `{}`)", probe.0));
            }
        }
        Ok(found)
    }

    fn excess_of_a_node(&self, filesystem: &str, group: &str) -> Result<Vec<String>, Unanswered> {
        let mut found = Vec::new();
        for probe in &NEEDED {
            if let Probed::Permitted = self.try_in(filesystem, group, group, probe)? {
                found.push(format!("`{}`", probe.0));
            }
        }
        if found.is_empty() {
            return Ok(found);
        }
        Ok(vec![format!("do the controller's work in {filesystem}/{group} (mgr {})", found.join(", "))])
    }

    /// Tries a command in a group; one that copies, into the group `target`.
    fn try_in(&self, filesystem: &str, group: &str, target: &str, probe: &Probe) -> Result<Probed, Unanswered> {
        let (prefix, name, more) = *probe;
        let mut arguments = vec![("vol_name", json!(filesystem)), ("group_name", json!(group))];
        arguments.extend(name.map(|key| (key, json!(self.nobody))));
        arguments.extend(more.iter().map(|(key, value)| (*key, json!(value))));
        if prefix == CLONE {
            arguments.push(("target_group_name", json!(target)));
        }
        let failure = match self.ask(Target::Manager, prefix, arguments)? {
            Ok(_) => return Ok(Probed::Permitted),
            Err(failure) => failure,
        };
        Ok(match failure.errno {
            Errno::ACCESS | Errno::PERM => Probed::Denied,
            Errno::NOENT => Probed::Permitted,
            Errno::INVAL if more.contains(&NO_MODE) => Probed::Permitted,
            errno => {
                let said = failure.message.lines().last().unwrap_or_default().trim().to_owned();
                Probed::Strange(if said.is_empty() { std::io::Error::from(errno).to_string() } else { said })
            }
        })
    }

    /// May the user? Whatever is strange counts as no.
    fn may(
        &self,
        target: Target,
        prefix: &'static str,
        arguments: Vec<(&'static str, Value)>,
    ) -> Result<bool, Unanswered> {
        Ok(self.ask(target, prefix, arguments)?.map_or_else(|failure| failure.errno == Errno::NOENT, |_| true))
    }
}

/// What has to be granted for a command.
fn capability(prefix: &str, filesystem: &str, group: &str) -> String {
    let target = if prefix == CLONE { format!(" target_group_name={group}") } else { String::new() };
    format!("mgr 'allow command \"{prefix}\" with vol_name={filesystem} group_name={group}{target}'")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every `"fs ..."` or `'fs ...'` of a text that is about subvolumes or copies.
    fn commands(text: &str, quote: char) -> BTreeSet<&str> {
        let ours = |part: &&str| part.starts_with("fs subvolume") || part.starts_with("fs clone");
        text.split(quote).filter(ours).filter(|part| !part.contains(['\n', '='])).collect()
    }

    #[test]
    fn what_is_tried_is_what_the_controller_uses_and_what_its_user_is_given() {
        let tried: BTreeSet<_> = NEEDED.iter().map(|(prefix, ..)| *prefix).collect();
        assert_eq!(tried.len(), NEEDED.len());
        let script = include_str!("../../../../deploy/cephfs/users.sh").replace("\\\"", "\"");
        let given: BTreeSet<_> = commands(&script, '\'').union(&commands(&script, '"')).copied().collect();
        assert_eq!(given, tried);
        let used = commands(include_str!("../group.rs"), '"');
        assert!(used.len() > 15 && used.is_subset(&tried), "{:?}", used.difference(&tried));
    }
}
