//! `berth volume orphans`: volumes that no PersistentVolume stands for, and those of which something is missing.
//!
//! Whoever names too few known volumes would lose the others. So what looks like a mistake is refused: an empty file,
//! one that is about other volumes, one that is no list of handles, one that is old.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::client::Client;
use super::table::{ProblemView, VolumeView, columns, problems};
use crate::proto::csi;
use crate::volume::format_bytes;

/// Volumes that were made after the file are orphans as far as it knows: nothing is deleted by an older one.
const FRESH: Duration = Duration::from_secs(10 * 60);

/// Which volumes are known, and what becomes of the others.
#[derive(Debug, Args)]
pub struct Orphans {
    /// The known ones: what `kubectl get pv -o json` prints, or one volume handle a line; `-` is standard input.
    #[arg(long, value_name = "FILE", required_unless_present = "none_known")]
    pub known: Option<PathBuf>,
    /// It is no mistake that none of the driver's volumes is known.
    #[arg(long)]
    pub none_known: bool,
    /// Delete the orphans and their data, one after the other.
    #[arg(long)]
    pub delete: bool,
}

/// An orphan as `--json` shows it. The keys are a promise.
#[derive(Debug, Serialize)]
struct OrphanView {
    id: String,
    name: String,
    claim: String,
    namespace: String,
    /// In bytes.
    size: u64,
    deleted: bool,
    /// Why it could not be deleted.
    error: Option<String>,
}

/// Lists the orphans; deletes them if that was asked for, and says of each how it went.
///
/// # Errors
/// When the known volumes can't be trusted, before anything is deleted; when a volume could not be deleted, after all
/// have been tried.
pub(super) async fn run(client: &Client, command: &Orphans, json: bool) -> Result<()> {
    let known = match &command.known {
        Some(file) => read(file, &client.driver, command.delete)?,
        None => BTreeSet::new(),
    };
    let volumes = client.volumes().await?.into_iter().map(VolumeView::from).collect();
    let unwell = unwell(client.unwell().await?);
    let mut orphans = orphans(volumes, &known, command.none_known)?;
    if !json {
        super::say(&table(&orphans));
        if !unwell.is_empty() {
            super::say(&table_of_unwell(&unwell));
        }
    }
    for orphan in orphans.iter_mut().filter(|_| command.delete) {
        let deleted = client.delete(&orphan.id).await;
        orphan.deleted = deleted.is_ok();
        orphan.error = deleted.err().map(|error| format!("{error:#}"));
        if !json {
            super::say(&orphan.error.clone().unwrap_or_else(|| format!("{} is deleted", orphan.id)));
        }
    }
    if json {
        super::say(&serde_json::to_string_pretty(&json!({ "orphans": orphans, "unwell": unwell }))?);
    }
    match orphans.iter().filter(|orphan| orphan.error.is_some()).count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} orphans could not be deleted", orphans.len()),
    }
}

fn read(file: &Path, driver: &str, delete: bool) -> Result<BTreeSet<String>> {
    let what = || format!("cannot take the known volumes from {}", file.display());
    let text = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).with_context(what)?
    } else {
        let written = std::fs::metadata(file).and_then(|metadata| metadata.modified()).with_context(what)?;
        let age = SystemTime::now().duration_since(written).unwrap_or_default();
        if delete && age > FRESH {
            let minutes = age.as_secs() / 60;
            bail!(
                "{}: it was written {minutes} minutes ago, and a volume may have been made since: write it anew",
                what()
            );
        }
        std::fs::read_to_string(file).with_context(what)?
    };
    known(&text, driver).with_context(what)
}

/// The handles of a driver's volumes.
fn known(text: &str, driver: &str) -> Result<BTreeSet<String>> {
    if text.trim_start().starts_with(['{', '[']) {
        let list: Value = serde_json::from_str(text).context("this begins like JSON, and is none")?;
        return known_of_list(&list, driver);
    }
    let mut handles = BTreeSet::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.contains(char::is_whitespace) {
            bail!("line {} is no volume handle: {line:?}", number + 1);
        }
        handles.extend(Some(line.to_owned()).filter(|line| !line.is_empty()));
    }
    Ok(handles)
}

/// Of a `List` of PersistentVolumes, as kubectl prints it, or a `PersistentVolumeList` of Kubernetes itself.
fn known_of_list(list: &Value, driver: &str) -> Result<BTreeSet<String>> {
    let kind = |value: &Value| value.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    let items = match (kind(list).as_str(), list.get("items").and_then(Value::as_array)) {
        ("List" | "PersistentVolumeList", Some(items)) => items.as_slice(),
        ("PersistentVolume", None) => std::slice::from_ref(list),
        _ => bail!("this JSON is no list of PersistentVolumes: write it with `kubectl get pv -o json`"),
    };
    if list.pointer("/metadata/continue").is_some_and(|next| next.as_str() != Some("")) {
        bail!("this is only a part of the list: write all of it with `kubectl get pv -o json`");
    }
    let mut handles = BTreeSet::new();
    for item in items {
        let is_volume = kind(item) == "PersistentVolume" || (kind(item).is_empty() && kind(list) != "List");
        if !is_volume {
            bail!("there is a {} in the list: write it with `kubectl get pv -o json`", kind(item));
        }
        let Some(csi) =
            item.pointer("/spec/csi").filter(|csi| csi.get("driver").and_then(Value::as_str) == Some(driver))
        else {
            continue;
        };
        let handle =
            csi.get("volumeHandle").and_then(Value::as_str).context("a PersistentVolume has no volumeHandle")?;
        handles.insert(handle.to_owned());
    }
    Ok(handles)
}

/// The volumes that are not known.
fn orphans(volumes: Vec<VolumeView>, known: &BTreeSet<String>, none_known: bool) -> Result<Vec<OrphanView>> {
    let all = volumes.len();
    let orphans: Vec<_> = volumes.into_iter().filter(|volume| !known.contains(&volume.id)).collect();
    if !none_known && known.is_empty() {
        bail!("no volume of this driver is known, of {all} that it has: if that is no mistake, say --none-known");
    }
    if !none_known && orphans.len() == all && all > 0 {
        let count = known.len();
        bail!(
            "none of the driver's {all} volumes is among the {count} known ones: if that is no mistake, say --none-known"
        );
    }
    Ok(orphans.into_iter().map(OrphanView::from).collect())
}

impl From<VolumeView> for OrphanView {
    fn from(volume: VolumeView) -> Self {
        let [name, claim, namespace] = ["name", "claim", "namespace"].map(|key| volume.told(key).to_owned());
        Self { id: volume.id, name, claim, namespace, size: volume.size, deleted: false, error: None }
    }
}

/// A volume of which something is missing or wrong, known or not: never deleted by itself. The keys are a promise.
#[derive(Debug, Serialize)]
struct UnwellView {
    id: String,
    problems: Vec<ProblemView>,
}

fn unwell(health: Vec<csi::VolumeHealth>) -> Vec<UnwellView> {
    let view = |health: csi::VolumeHealth| UnwellView { id: health.volume_id.clone(), problems: problems(health) };
    health.into_iter().map(view).collect()
}

fn table_of_unwell(unwell: &[UnwellView]) -> String {
    let rows = unwell.iter().flat_map(|volume| {
        let row = |problem: &ProblemView| [volume.id.clone(), problem.reason.clone(), problem.message.clone()];
        volume.problems.iter().map(row)
    });
    columns(["NOT WELL", "REASON", "WHAT"], rows)
}

fn table(orphans: &[OrphanView]) -> String {
    let row = |orphan: &OrphanView| {
        let OrphanView { id, name, claim, namespace, size, .. } = orphan;
        [id.clone(), name.clone(), claim.clone(), namespace.clone(), format_bytes(*size)]
    };
    columns(["ID", "NAME", "CLAIM", "NAMESPACE", "SIZE"], orphans.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Result<Vec<String>, String> {
        known(text, "a.berth.dev").map(|known| known.into_iter().collect()).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn known_volumes_are_those_of_the_driver_or_lines() {
        let volume = |driver: &str, handle: &str| json!({"kind": "PersistentVolume", "spec": {"csi": {"driver": driver, "volumeHandle": handle}}});
        let nfs = json!({"kind": "PersistentVolume", "spec": {"nfs": {"path": "/"}}});
        let items = [volume("a.berth.dev", "one"), volume("b.berth.dev", "two"), nfs, volume("a.berth.dev", "three")];
        let list = json!({"kind": "List", "metadata": {"resourceVersion": ""}, "items": items});
        assert_eq!(names(&list.to_string()).unwrap(), ["one", "three"]);
        assert_eq!(names(&format!("\n {}", volume("a.berth.dev", "one"))).unwrap(), ["one"]);
        assert_eq!(names("one\n\n  main/cephfs/csi/two \r\n").unwrap(), ["main/cephfs/csi/two", "one"]);
        assert_eq!(names("").unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_no_list_of_volumes_is_not_taken_for_a_short_one() {
        let part = json!({"kind": "PersistentVolumeList", "metadata": {"continue": "x"}, "items": []}).to_string();
        let claims = json!({"kind": "List", "items": [{"kind": "PersistentVolumeClaim"}]}).to_string();
        for (text, why) in [
            ("NAME   CAPACITY\npvc-1  1Gi", "line 1 is no volume handle"),
            ("apiVersion: v1\n", "line 1 is no volume handle"),
            ("{\"kind\": \"List\"", "begins like JSON"),
            ("{\"kind\": \"List\"}", "no list of PersistentVolumes"),
            ("[]", "no list of PersistentVolumes"),
            (&part, "only a part"),
            (&claims, "there is a PersistentVolumeClaim"),
            (r#"{"kind":"PersistentVolume","spec":{"csi":{"driver":"a.berth.dev"}}}"#, "has no volumeHandle"),
        ] {
            let error = names(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn nothing_is_an_orphan_where_nothing_is_known_unless_that_is_said() {
        let volume =
            |id: &str| VolumeView { id: id.to_owned(), size: 1, source: None, context: [].into(), places: Vec::new() };
        let found = |known: &[&str], none_known| {
            let known = known.iter().map(|id| (*id).to_owned()).collect();
            let found = orphans(vec![volume("one"), volume("two")], &known, none_known);
            found.map(|orphans| orphans.into_iter().map(|orphan| orphan.id).collect::<Vec<_>>())
        };
        assert_eq!(found(&["one", "gone"], false).unwrap(), ["two"]);
        assert_eq!(found(&["one", "two"], false).unwrap(), [""; 0]);
        assert!(found(&[], false).unwrap_err().to_string().contains("--none-known"));
        assert!(found(&["other"], false).unwrap_err().to_string().contains("--none-known"));
        assert_eq!(found(&[], true).unwrap(), ["one", "two"]);
        assert!(orphans(Vec::new(), &["other".to_owned()].into(), false).unwrap().is_empty());
    }
}
