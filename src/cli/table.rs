//! Answers, for people and for programs. Pure: what they say was found out elsewhere.

use std::collections::BTreeMap;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;
use serde_json::Value;

use crate::proto::csi;
use crate::volume::format_bytes;

/// What a command has to say, in both ways.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) json: Value,
}

/// A volume as `--json` shows it. The keys are a promise.
#[derive(Debug, Serialize)]
pub(super) struct VolumeView {
    pub(super) id: String,
    /// In bytes.
    pub(super) size: u64,
    pub(super) source: Option<SourceView>,
    pub(super) context: BTreeMap<String, String>,
    /// Topology segments; any of them reaches the volume.
    pub(super) places: Vec<BTreeMap<String, String>>,
}

/// What a volume was made from.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SourceView {
    Snapshot(String),
    Volume(String),
}

/// A snapshot as `--json` shows it. The keys are a promise.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotView {
    pub(super) id: String,
    pub(super) volume: String,
    /// In bytes.
    pub(super) size: u64,
    /// RFC 3339, in UTC.
    pub(super) created: Option<String>,
    pub(super) ready: bool,
    pub(super) places: Vec<BTreeMap<String, String>>,
}

/// Something that is wrong with a volume.
#[derive(Debug, Serialize)]
pub(super) struct ProblemView {
    pub(super) status: &'static str,
    pub(super) reason: String,
    pub(super) message: String,
}

fn size(bytes: i64) -> u64 {
    u64::try_from(bytes).unwrap_or_default()
}

fn places(topology: Vec<csi::Topology>) -> Vec<BTreeMap<String, String>> {
    topology.into_iter().map(|place| place.segments.into_iter().collect()).collect()
}

impl From<csi::Volume> for VolumeView {
    fn from(volume: csi::Volume) -> Self {
        use csi::volume_content_source::Type;
        let source = volume.content_source.and_then(|source| source.r#type).map(|source| match source {
            Type::Snapshot(source) => SourceView::Snapshot(source.snapshot_id),
            Type::Volume(source) => SourceView::Volume(source.volume_id),
        });
        Self {
            id: volume.volume_id,
            size: size(volume.capacity_bytes),
            source,
            context: volume.volume_context.into_iter().collect(),
            places: places(volume.accessible_topology),
        }
    }
}

impl From<csi::Snapshot> for SnapshotView {
    fn from(snapshot: csi::Snapshot) -> Self {
        Self {
            id: snapshot.snapshot_id,
            volume: snapshot.source_volume_id,
            size: size(snapshot.size_bytes),
            created: snapshot.creation_time.map(|time| time.to_string()),
            ready: snapshot.ready_to_use,
            places: places(snapshot.accessible_topology),
        }
    }
}

/// What is wrong, worst first as the driver has it.
pub(super) fn problems(health: csi::VolumeHealth) -> Vec<ProblemView> {
    use csi::VolumeHealthErrorType as Status;
    let view = |entry: csi::volume_health::VolumeHealthEntry| ProblemView {
        status: match entry.status() {
            Status::UnknownVolumeHealthType => "unknown",
            Status::Degraded => "degraded",
            Status::Inaccessible => "inaccessible",
            Status::DataLoss => "data loss",
        },
        reason: entry.reason,
        message: entry.message,
    };
    health.health_statuses.into_iter().map(view).collect()
}

impl VolumeView {
    /// What its maker called it, where the driver's context says so.
    pub(super) fn name(&self) -> &str {
        self.told("name")
    }

    /// Whom it was made for, likewise: `namespace/claim`, or nothing.
    pub(super) fn claim(&self) -> String {
        match (self.told("namespace"), self.told("claim")) {
            ("", claim) => claim.to_owned(),
            (namespace, claim) => format!("{namespace}/{claim}"),
        }
    }

    /// What the driver's context says under a key, or nothing.
    pub(super) fn told(&self, key: &str) -> &str {
        self.context.get(key).map_or("", String::as_str)
    }

    /// `snapshot snap-1`, `volume vol-1`, or nothing.
    pub(super) fn made_from(&self) -> String {
        match &self.source {
            None => String::new(),
            Some(SourceView::Snapshot(id)) => format!("snapshot {id}"),
            Some(SourceView::Volume(id)) => format!("volume {id}"),
        }
    }
}

/// The values of topology segments; the keys are the driver's own.
pub(super) fn where_text(places: &[BTreeMap<String, String>]) -> String {
    let place = |place: &BTreeMap<String, String>| place.values().cloned().collect::<Vec<_>>().join("/");
    if places.is_empty() { "anywhere".to_owned() } else { places.iter().map(place).collect::<Vec<_>>().join(", ") }
}

/// Columns without lines, so that `awk` and people read them alike.
pub(super) fn columns<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    // No padding on the left, so that a column's text begins where its title does, at the line's beginning.
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    trimmed(&table)
}

fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Volumes as a table.
pub(super) fn volumes(views: &[VolumeView]) -> String {
    let row = |view: &VolumeView| {
        let size = format_bytes(view.size);
        [view.id.clone(), view.name().to_owned(), view.claim(), size, where_text(&view.places), view.made_from()]
    };
    columns(["ID", "NAME", "CLAIM", "SIZE", "WHERE", "MADE FROM"], views.iter().map(row))
}

/// Snapshots as a table.
pub(super) fn snapshots(views: &[SnapshotView]) -> String {
    let row = |view: &SnapshotView| {
        let ready = if view.ready { "yes" } else { "no" };
        let created = view.created.clone().unwrap_or_default();
        [view.id.clone(), format_bytes(view.size), view.volume.clone(), created, ready.to_owned()]
    };
    columns(["ID", "SIZE", "VOLUME", "CREATED", "READY"], views.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Timestamp;

    fn volume() -> csi::Volume {
        use csi::volume_content_source::{SnapshotSource, Type};
        let source = Type::Snapshot(SnapshotSource { snapshot_id: "snap-1".to_owned() });
        csi::Volume {
            volume_id: "vol-1".to_owned(),
            capacity_bytes: 10 << 30,
            volume_context: [("name", "data"), ("a", "1"), ("claim", "c"), ("namespace", "ml")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            content_source: Some(csi::VolumeContentSource { r#type: Some(source) }),
            accessible_topology: vec![csi::Topology { segments: [("node".to_owned(), "n1".to_owned())].into() }],
        }
    }

    #[test]
    fn a_program_gets_stable_keys_and_sizes_in_bytes() {
        let json = serde_json::to_string(&VolumeView::from(volume())).unwrap();
        let wanted = r#"{"id":"vol-1","size":10737418240,"source":{"snapshot":"snap-1"},"context":{"a":"1","claim":"c","name":"data","namespace":"ml"},"places":[{"node":"n1"}]}"#;
        assert_eq!(json, wanted);
        let snapshot = csi::Snapshot {
            snapshot_id: "snap-1".to_owned(),
            source_volume_id: "vol-1".to_owned(),
            size_bytes: 4096,
            creation_time: Some(Timestamp { seconds: 0, nanos: 0 }),
            ready_to_use: true,
            ..csi::Snapshot::default()
        };
        let json = serde_json::to_value(SnapshotView::from(snapshot)).unwrap();
        assert_eq!(json["created"], "1970-01-01T00:00:00Z");
        assert_eq!(json["size"], 4096);
    }

    #[test]
    fn a_person_gets_aligned_columns_and_sizes_with_units() {
        let text = volumes(&[volume().into()]);
        let wanted = "ID     NAME  CLAIM  SIZE  WHERE  MADE FROM\nvol-1  data  ml/c   10Gi  n1     snapshot snap-1";
        assert_eq!(text, wanted);
        assert_eq!(where_text(&[]), "anywhere");
    }

    #[test]
    fn a_problem_says_how_bad_it_is() {
        let entry = csi::volume_health::VolumeHealthEntry {
            status: csi::VolumeHealthErrorType::DataLoss.into(),
            reason: "ImageMissing".to_owned(),
            message: "image is gone".to_owned(),
        };
        let health = csi::VolumeHealth { volume_id: "vol-1".to_owned(), health_statuses: vec![entry] };
        assert_eq!(problems(health)[0].status, "data loss");
    }
}
