//! The front room over a back end that has only what every back end must have, or a part more.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tonic::{Code, Request};

use super::Front;
use crate::backend::{Backend, Controller, Growth, Modification, Node, Page, PageRequest, Snapshots, Stage};
use crate::config::Deadlines;
use crate::error::Result;
use crate::locks::Locks;
use crate::proto::csi;
use crate::proto::csi::controller_server::Controller as ControllerService;
use crate::proto::csi::identity_server::Identity as IdentityService;
use crate::proto::csi::node_server::Node as NodeService;
use crate::secrets::Secrets;
use crate::volume::{
    Capability, CapacityRange, MountPath, Name, NodeName, Parameters, Snapshot, SnapshotId, Spec, Topology, Volume,
    VolumeId,
};

/// Has volumes called `present`, panics at `cursed`, and takes its time over `slow`.
#[derive(Default)]
struct Toy {
    grows: bool,
    modifies: bool,
    freezes: bool,
    /// `slow` ends when this turns true.
    released: AtomicBool,
    finished: AtomicBool,
}

impl Controller for Toy {
    fn volume_id(&self, name: &Name, _: &Parameters) -> Result<VolumeId> {
        VolumeId::new(name.as_str())
    }
    fn check(&self, _: &[Capability], _: &Parameters, _: &Parameters) -> Result<()> {
        Ok(())
    }
    fn ensure_volume(&self, _: &VolumeId, _: &Spec, _: &Secrets) -> Result<Volume> {
        fail!(Exhausted, "a toy has no room")
    }
    fn ensure_absent(&self, id: &VolumeId, _: &Secrets) -> Result<()> {
        match id.as_str() {
            "cursed" => panic!("as the test wants it"),
            "slow" => {
                while !self.released.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.finished.store(true, Ordering::SeqCst);
                Ok(())
            }
            _ => Ok(()),
        }
    }
    fn find(&self, _: &VolumeId, _: &Secrets) -> Result<Option<Volume>> {
        Ok(None)
    }
    fn growth(&self) -> Option<&dyn Growth> {
        self.grows.then_some(self as _)
    }
    fn modification(&self) -> Option<&dyn Modification> {
        self.modifies.then_some(self as _)
    }
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.freezes.then_some(self as _)
    }
}

/// Has none, but says of `VOLUME@NAME` what it was taken of.
impl Snapshots for Toy {
    fn ensure_snapshot(&self, _: &Name, _: &VolumeId, _: &Parameters, _: &[Topology], _: &Secrets) -> Result<Snapshot> {
        fail!(Exhausted, "a toy has no room")
    }
    fn ensure_snapshot_absent(&self, _: &SnapshotId, _: &Secrets) -> Result<()> {
        Ok(())
    }
    fn find_snapshot(&self, _: &SnapshotId, _: &Secrets) -> Result<Option<Snapshot>> {
        Ok(None)
    }
    fn list_snapshots(&self, _: Option<&VolumeId>, _: &PageRequest, _: &Secrets) -> Result<Page<Snapshot>> {
        Ok(Page { entries: Vec::new(), next: None })
    }
    fn needs_volume(&self, id: &SnapshotId) -> Option<VolumeId> {
        VolumeId::new(id.as_str().split_once('@')?.0).ok()
    }
    fn ensure_restored(&self, _: &VolumeId, _: &Spec, source: &SnapshotId, _: &Secrets) -> Result<Volume> {
        fail!(NotFound, "{source} does not exist")
    }
}

impl Growth for Toy {
    fn ensure_size(&self, _: &VolumeId, range: CapacityRange, _: &Secrets) -> Result<(u64, bool)> {
        Ok((range.required(), true))
    }
}

impl Modification for Toy {
    fn ensure_modified(&self, id: &VolumeId, mutable: &Parameters, _: &Secrets) -> Result<()> {
        match mutable.keys().next() {
            None => Ok(()),
            Some(key) => fail!(Invalid, "{id} has no {key}"),
        }
    }
}

impl Node for Toy {
    fn ensure_staged(&self, _: &Stage, _: &Secrets) -> Result<()> {
        Ok(())
    }
    fn ensure_unstaged(&self, _: &VolumeId, _: &MountPath) -> Result<()> {
        Ok(())
    }
    fn is_at(&self, _: &VolumeId, _: &Path) -> Result<bool> {
        Ok(false)
    }
}

fn front(toy: Toy) -> (Front, Arc<Toy>) {
    front_with(toy, Duration::from_secs(60))
}

fn front_with(toy: Toy, call: Duration) -> (Front, Arc<Toy>) {
    let toy = Arc::new(toy);
    let backend = Backend { controller: toy.clone(), node: toy.clone() };
    let deadlines = Deadlines { call, lock: Duration::from_millis(10), ..Deadlines::default() };
    let front = Front::new(
        "toy.csi.berth.dev",
        NodeName::new("a").unwrap(),
        (backend, Locks::default()),
        deadlines,
        Arc::default(),
    );
    (front, toy)
}

/// A request that says nothing.
fn none<T: Default>() -> Request<T> {
    Request::new(T::default())
}

fn deletion(id: &str) -> Request<csi::DeleteVolumeRequest> {
    Request::new(csi::DeleteVolumeRequest { volume_id: id.to_owned(), ..Default::default() })
}

async fn capabilities(front: &Front) -> (Vec<i32>, Vec<i32>, usize) {
    let controller = front.controller_get_capabilities(none()).await.unwrap().into_inner();
    let node = front.node_get_capabilities(none()).await.unwrap().into_inner();
    let plugin = front.get_plugin_capabilities(none()).await.unwrap().into_inner();
    let controller = controller.capabilities.into_iter().map(|one| match one.r#type.unwrap() {
        csi::controller_service_capability::Type::Rpc(rpc) => rpc.r#type,
    });
    let node = node.capabilities.into_iter().map(|one| match one.r#type.unwrap() {
        csi::node_service_capability::Type::Rpc(rpc) => rpc.r#type,
    });
    (controller.collect(), node.collect(), plugin.capabilities.len())
}

#[tokio::test]
async fn what_a_back_end_lacks_is_neither_advertised_nor_served() {
    let (front, _) = front(Toy::default());
    // CREATE_DELETE_VOLUME, GET_VOLUME, SINGLE_NODE_MULTI_WRITER; STAGE_UNSTAGE_VOLUME, SINGLE_NODE_MULTI_WRITER.
    assert_eq!(capabilities(&front).await, (vec![1, 12, 13], vec![1, 5], 1));
    let id = || "present".to_owned();
    let range = Some(csi::CapacityRange { required_bytes: 1, limit_bytes: 0 });
    let path = || "/some/path".to_owned();
    let codes = [
        front.list_volumes(none()).await.unwrap_err().code(),
        front.get_capacity(none()).await.unwrap_err().code(),
        front.list_snapshots(none()).await.unwrap_err().code(),
        front.controller_list_volume_health(none()).await.unwrap_err().code(),
        front.node_get_storage_health(none()).await.unwrap_err().code(),
        front
            .controller_expand_volume(Request::new(csi::ControllerExpandVolumeRequest {
                volume_id: id(),
                capacity_range: range,
                ..Default::default()
            }))
            .await
            .unwrap_err()
            .code(),
        front
            .controller_modify_volume(Request::new(csi::ControllerModifyVolumeRequest {
                volume_id: id(),
                ..Default::default()
            }))
            .await
            .unwrap_err()
            .code(),
        front
            .node_get_volume_stats(Request::new(csi::NodeGetVolumeStatsRequest {
                volume_id: id(),
                volume_path: path(),
                ..Default::default()
            }))
            .await
            .unwrap_err()
            .code(),
        front
            .create_snapshot(Request::new(csi::CreateSnapshotRequest {
                source_volume_id: id(),
                name: "s".to_owned(),
                ..Default::default()
            }))
            .await
            .unwrap_err()
            .code(),
    ];
    assert_eq!(codes, [Code::Unimplemented; 9]);
}

#[tokio::test]
async fn what_a_back_end_has_is_advertised_and_served() {
    let (front, _) = front(Toy { grows: true, modifies: true, ..Toy::default() });
    // EXPAND_VOLUME and MODIFY_VOLUME more, and the plugin's VolumeExpansion.
    assert_eq!(capabilities(&front).await, (vec![1, 12, 13, 9, 14], vec![1, 5], 2));
    let expand = csi::ControllerExpandVolumeRequest {
        volume_id: "present".to_owned(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 7, limit_bytes: 0 }),
        ..Default::default()
    };
    let grown = front.controller_expand_volume(Request::new(expand)).await.unwrap().into_inner();
    assert_eq!((grown.capacity_bytes, grown.node_expansion_required), (7, true));
    let mut modify = csi::ControllerModifyVolumeRequest { volume_id: "present".to_owned(), ..Default::default() };
    assert!(front.controller_modify_volume(Request::new(modify.clone())).await.is_ok());
    modify.mutable_parameters.insert("speed".to_owned(), "11".to_owned());
    let refused = front.controller_modify_volume(Request::new(modify)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_panic_is_an_internal_error_and_frees_the_volume() {
    let (front, _) = front(Toy::default());
    for _ in 0..2 {
        let status = front.delete_volume(deletion("cursed")).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
    }
    assert!(front.is_idle());
}

#[tokio::test]
async fn a_call_past_its_deadline_is_answered_and_its_work_ends_under_the_lock() {
    let (front, toy) = front_with(Toy::default(), Duration::from_millis(500));
    let status = front.delete_volume(deletion("slow")).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(!toy.finished.load(Ordering::SeqCst) && !front.is_idle());
    assert_eq!(front.delete_volume(deletion("slow")).await.unwrap_err().code(), Code::Aborted);
    assert!(front.delete_volume(deletion("other")).await.is_ok());
    toy.released.store(true, Ordering::SeqCst);
    while !front.is_idle() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(toy.finished.load(Ordering::SeqCst));
}

#[tokio::test]
async fn the_volume_of_a_snapshot_is_held_still_while_that_is_restored() {
    use csi::volume_content_source::{SnapshotSource, Type};
    let (front, toy) = front(Toy { freezes: true, ..Toy::default() });
    let delete = tokio::spawn({
        let front = front.clone();
        async move {
            let request = csi::DeleteVolumeRequest { volume_id: "slow".to_owned(), ..Default::default() };
            front.delete_volume(Request::new(request)).await
        }
    });
    while front.is_idle() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let restore = |snapshot: &str| {
        let snapshot_id = snapshot.to_owned();
        let request = csi::CreateVolumeRequest {
            name: "new".to_owned(),
            volume_capabilities: vec![csi::VolumeCapability {
                access_mode: Some(csi::volume_capability::AccessMode { mode: 1 }),
                access_type: Some(csi::volume_capability::AccessType::Block(csi::volume_capability::BlockVolume {})),
            }],
            volume_content_source: Some(csi::VolumeContentSource {
                r#type: Some(Type::Snapshot(SnapshotSource { snapshot_id })),
            }),
            ..Default::default()
        };
        let front = front.clone();
        async move { front.create_volume(Request::new(request)).await.unwrap_err().code() }
    };
    assert_eq!(restore("slow@s").await, Code::Aborted);
    assert_eq!(restore("other@s").await, Code::NotFound);
    toy.released.store(true, Ordering::SeqCst);
    delete.await.unwrap().unwrap();
    assert_eq!(restore("slow@s").await, Code::NotFound);
}
