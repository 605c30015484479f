//! Going through all volumes: lists, and which of them are not well.
//!
//! Calls that list bring no secrets, so they are made as the configuration's users, and cover the file systems and groups
//! that it names.

use serde_json::Value;

use super::Cephfs;
use super::control::Account;
use super::group::{Group, Info, State};
use super::names::{Address, Subvolume};
use super::notes::VolumeNotes;
use crate::backend::{Listing, Page, PageRequest, VolumeHealth};
use crate::config::Cluster;
use crate::error::Result;
use crate::secrets::Secrets;
use crate::volume::{Health, HealthProblem, Volume, VolumeId, format_bytes};

/// So many volumes are looked at for one page of those that are not well.
const LOOKED_AT: usize = 500;

impl Cephfs {
    /// Every group that is listed, with the account to ask it by.
    fn listed(&self) -> Result<Vec<(&Cluster, Account, Vec<Subvolume>)>> {
        let mut clusters: Vec<_> = self.clusters.iter().collect();
        clusters.sort_by(|a, b| a.name.cmp(&b.name));
        let mut listed = Vec::new();
        for cluster in clusters {
            let account = Account::of(&Secrets::default(), cluster)?;
            let mut all = Vec::new();
            for filesystem in &cluster.filesystems {
                for name in &cluster.groups {
                    let group = Group {
                        control: &self.control,
                        cluster,
                        account: &account,
                        filesystem: filesystem.clone(),
                        name: name.clone(),
                    };
                    all.extend(group.list()?.iter().map(|name| group.subvolume(name)));
                }
            }
            listed.push((cluster, account, all));
        }
        Ok(listed)
    }

    /// Goes through all subvolumes behind a token, in the order of their ids, until `visit` says that it is enough.
    pub(super) fn walk(
        &self,
        after: Option<&str>,
        is_token: impl Fn(&str) -> bool,
        mut visit: impl FnMut(&Group<'_>, &Subvolume) -> Result<bool>,
    ) -> Result<()> {
        if let Some(after) = after
            && !is_token(after)
        {
            fail!(Busy, "{after:?} is no token of this list: begin it again");
        }
        // A snapshot's token names its volume before the `@`, and that volume may have more.
        let begin = after.map(|after| after.split('@').next().unwrap_or(after));
        let includes_begin = after.is_some_and(|after| after.contains('@'));
        let mut all = Vec::new();
        let listed = self.listed()?;
        for (cluster, account, subvolumes) in &listed {
            all.extend(subvolumes.iter().map(|subvolume| (subvolume.to_string(), *cluster, account, subvolume)));
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        for (id, cluster, account, subvolume) in all {
            let is_before = begin.is_some_and(|begin| id.as_str() < begin || (id == begin && !includes_begin));
            if !is_before && !visit(&self.group(cluster, account, subvolume), subvolume)? {
                break;
            }
        }
        Ok(())
    }

    /// The volume of a subvolume in a list. `None`: it is none of ours, or not complete.
    fn listed_volume(&self, group: &Group<'_>, subvolume: &Subvolume) -> Result<Option<(VolumeId, Volume, Info)>> {
        let State::Present(info) = group.info(&subvolume.name)? else { return Ok(None) };
        // What has too long a name somebody else made: CSI has no id for it.
        let Ok(id) = subvolume.id() else { return Ok(None) };
        if !subvolume.is_ours() && !VolumeNotes::read(group, &subvolume.name)?.is_some_and(|notes| notes.adopted) {
            return Ok(None);
        }
        let volume = self.found(group, &id, &subvolume.name, &info)?;
        Ok(Some((id, volume, info)))
    }
}

fn is_volume_token(token: &str) -> bool {
    matches!(Address::parse(token), Some(Address::Subvolume(_)))
}

impl Listing for Cephfs {
    fn list(&self, page: &PageRequest) -> Result<Page<Volume>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let mut found = Page { entries: Vec::new(), next: None };
        self.walk(page.after.as_deref(), is_volume_token, |group, subvolume| {
            let Some((_, volume, _)) = self.listed_volume(group, subvolume)? else { return Ok(true) };
            if found.entries.len() == limit {
                found.next = found.entries.last().map(|volume: &Volume| volume.id.as_str().to_owned());
                return Ok(false);
            }
            found.entries.push(volume);
            Ok(true)
        })?;
        Ok(found)
    }
}

impl VolumeHealth for Cephfs {
    fn health(&self, id: &VolumeId, secrets: &Secrets) -> Result<Option<Vec<HealthProblem>>> {
        let Some(Address::Subvolume(subvolume)) = Address::of(id) else { return Ok(None) };
        if self.cluster(&subvolume.cluster).is_none() {
            return Ok(None);
        }
        self.with(&subvolume, secrets, |group| {
            let State::Present(info) = group.info(&subvolume.name)? else { return Ok(None) };
            let mut problems = fullness(&info);
            problems.extend(without_mds(group)?);
            Ok(Some(problems))
        })
    }

    fn list_unwell(&self, page: &PageRequest) -> Result<Page<(VolumeId, Vec<HealthProblem>)>> {
        let limit = page.limit.unwrap_or(usize::MAX);
        let mut unwell = Page { entries: Vec::new(), next: None };
        let mut down: Option<(String, Option<HealthProblem>)> = None;
        let mut looked_at = 0;
        self.walk(page.after.as_deref(), is_volume_token, |group, subvolume| {
            // A page may be empty and yet have a next one.
            if unwell.entries.len() == limit || looked_at == LOOKED_AT {
                return Ok(false);
            }
            looked_at += 1;
            unwell.next = Some(subvolume.to_string());
            let Some((id, _, info)) = self.listed_volume(group, subvolume)? else { return Ok(true) };
            let place = format!("{}/{}", group.cluster.name, group.filesystem);
            if down.as_ref().is_none_or(|(known, _)| *known != place) {
                down = Some((place, without_mds(group)?));
            }
            let mut problems = fullness(&info);
            problems.extend(down.as_ref().and_then(|(_, problem)| problem.clone()));
            if !problems.is_empty() {
                unwell.entries.push((id, problems));
            }
            Ok(true)
        })?;
        if unwell.entries.len() < limit && looked_at < LOOKED_AT {
            unwell.next = None;
        }
        Ok(unwell)
    }
}

/// A volume at its quota.
fn fullness(info: &Info) -> Vec<HealthProblem> {
    let full = info.size.filter(|size| info.used >= *size && *size > 0);
    let message = |size| format!("it holds {} of {}", format_bytes(info.used), format_bytes(size));
    full.map(|size| HealthProblem { status: Health::Degraded, reason: "QuotaReached", message: message(size) })
        .into_iter()
        .collect()
}

/// Is there nobody who serves the file system?
pub(super) fn without_mds(group: &Group<'_>) -> Result<Option<HealthProblem>> {
    let map = group.monitor("fs dump")?;
    let filesystems = map.get("filesystems").and_then(Value::as_array).into_iter().flatten();
    let name = |filesystem: &Value| filesystem.pointer("/mdsmap/fs_name").and_then(Value::as_str).map(str::to_owned);
    let Some(filesystem) = filesystems.into_iter().find(|one| name(one).as_deref() == Some(&group.filesystem)) else {
        return Ok(None);
    };
    let daemons = filesystem.pointer("/mdsmap/info").and_then(Value::as_object).into_iter().flatten();
    // One that the monitors have not heard of for a while is still called active.
    let mut daemons = daemons.filter(|(_, daemon)| daemon.get("laggy_since").is_none());
    if daemons.any(|(_, daemon)| daemon.get("state").and_then(Value::as_str) == Some("up:active")) {
        return Ok(None);
    }
    let message = format!("no MDS of file system {} is active", group.filesystem);
    Ok(Some(HealthProblem { status: Health::Inaccessible, reason: "NoActiveMds", message }))
}
