//! The driver's services, called as kubelet and the sidecars do.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use berth::proto::csi;
use berth::proto::csi::controller_client::ControllerClient;
use berth::proto::csi::node_client::NodeClient;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::Lab;

/// How a volume is used.
#[derive(Clone, Debug)]
pub struct Use {
    pub fs: String,
    pub block: bool,
    pub mode: csi::volume_capability::access_mode::Mode,
    pub flags: Vec<String>,
    pub group: String,
}

impl Default for Use {
    fn default() -> Self {
        use csi::volume_capability::access_mode::Mode;
        Self {
            fs: String::new(),
            block: false,
            mode: Mode::SingleNodeMultiWriter,
            flags: Vec::new(),
            group: String::new(),
        }
    }
}

impl Use {
    pub fn fs(fs: &str) -> Self {
        Self { fs: fs.to_owned(), ..Self::default() }
    }

    pub fn block() -> Self {
        Self { block: true, ..Self::default() }
    }

    pub fn mode(mode: csi::volume_capability::access_mode::Mode) -> Self {
        Self { mode, ..Self::default() }
    }

    pub fn message(&self) -> csi::VolumeCapability {
        use csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
        let access = if self.block {
            AccessType::Block(BlockVolume {})
        } else {
            AccessType::Mount(MountVolume {
                fs_type: self.fs.clone(),
                mount_flags: self.flags.clone(),
                volume_mount_group: self.group.clone(),
            })
        };
        csi::VolumeCapability { access_type: Some(access), access_mode: Some(AccessMode { mode: self.mode.into() }) }
    }
}

/// Both services, called as kubelet and the sidecars do.
#[derive(Clone)]
pub struct Client {
    pub controller: ControllerClient<Channel>,
    pub node: NodeClient<Channel>,
    pub channel: Channel,
    /// The secrets that the class has for the provisioner and its fellows, and for the node.
    pub secrets: [HashMap<String, String>; 2],
    /// What CreateVolume told the node, as a PersistentVolume keeps it.
    pub contexts: Arc<Mutex<HashMap<String, HashMap<String, String>>>>,
}

impl Client {
    pub async fn connect(socket: &Path) -> Result<Self, tonic::transport::Error> {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await?;
        let (controller, node) = (ControllerClient::new(channel.clone()), NodeClient::new(channel.clone()));
        Ok(Self { controller, node, channel, secrets: Default::default(), contexts: Arc::default() })
    }

    fn context(&self, id: &str) -> HashMap<String, String> {
        self.contexts.lock().unwrap().get(id).cloned().unwrap_or_default()
    }

    pub fn request(name: &str, size: i64, usage: &Use) -> csi::CreateVolumeRequest {
        csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: size, limit_bytes: 0 }),
            volume_capabilities: vec![usage.message()],
            ..Default::default()
        }
    }

    pub async fn try_create(&self, mut request: csi::CreateVolumeRequest) -> Result<csi::Volume, Status> {
        if request.secrets.is_empty() {
            request.secrets = self.secrets[0].clone();
        }
        let volume = self.controller.clone().create_volume(request).await?.into_inner().volume.unwrap();
        self.contexts.lock().unwrap().insert(volume.volume_id.clone(), volume.volume_context.clone());
        Ok(volume)
    }

    pub async fn create(&self, name: &str, size: i64, usage: &Use) -> String {
        self.try_create(Self::request(name, size, usage)).await.unwrap().volume_id
    }

    pub async fn create_from(
        &self,
        name: &str,
        size: i64,
        usage: &Use,
        source: csi::volume_content_source::Type,
    ) -> Result<csi::Volume, Status> {
        let mut request = Self::request(name, size, usage);
        request.volume_content_source = Some(csi::VolumeContentSource { r#type: Some(source) });
        self.try_create(request).await
    }

    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = csi::DeleteVolumeRequest { volume_id: id.to_owned(), secrets: self.secrets[0].clone() };
        self.controller.clone().delete_volume(request).await.map(drop)
    }

    pub async fn stage(&self, id: &str, path: &str, usage: &Use) -> Result<(), Status> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: path.to_owned(),
            volume_capability: Some(usage.message()),
            secrets: self.secrets[1].clone(),
            volume_context: self.context(id),
            ..Default::default()
        };
        self.node.clone().node_stage_volume(request).await.map(drop)
    }

    pub async fn unstage(&self, id: &str, path: &str) -> Result<(), Status> {
        let request = csi::NodeUnstageVolumeRequest { volume_id: id.to_owned(), staging_target_path: path.to_owned() };
        self.node.clone().node_unstage_volume(request).await.map(drop)
    }

    pub fn publication(id: &str, staging: &str, target: &str, usage: &Use) -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: staging.to_owned(),
            target_path: target.to_owned(),
            volume_capability: Some(usage.message()),
            ..Default::default()
        }
    }

    pub async fn publish(&self, id: &str, staging: &str, target: &str, usage: &Use) -> Result<(), Status> {
        let mut request = Self::publication(id, staging, target, usage);
        request.secrets = self.secrets[1].clone();
        request.volume_context = self.context(id);
        self.node.clone().node_publish_volume(request).await.map(drop)
    }

    pub async fn unpublish(&self, id: &str, target: &str) -> Result<(), Status> {
        let request = csi::NodeUnpublishVolumeRequest { volume_id: id.to_owned(), target_path: target.to_owned() };
        self.node.clone().node_unpublish_volume(request).await.map(drop)
    }

    pub async fn expand(&self, id: &str, path: &str, size: i64) -> Result<i64, Status> {
        let request = csi::NodeExpandVolumeRequest {
            volume_id: id.to_owned(),
            volume_path: path.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: size, limit_bytes: 0 }),
            ..Default::default()
        };
        Ok(self.node.clone().node_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    /// By the controller.
    pub async fn grow(&self, id: &str, size: i64) -> Result<i64, Status> {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: size, limit_bytes: 0 }),
            secrets: self.secrets[0].clone(),
            ..Default::default()
        };
        Ok(self.controller.clone().controller_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    pub async fn snapshot(&self, source: &str, name: &str) -> Result<csi::Snapshot, Status> {
        let request = csi::CreateSnapshotRequest {
            source_volume_id: source.to_owned(),
            name: name.to_owned(),
            secrets: self.secrets[0].clone(),
            ..Default::default()
        };
        Ok(self.controller.clone().create_snapshot(request).await?.into_inner().snapshot.unwrap())
    }

    pub async fn delete_snapshot(&self, id: &str) -> Result<(), Status> {
        let request = csi::DeleteSnapshotRequest { snapshot_id: id.to_owned(), secrets: self.secrets[0].clone() };
        self.controller.clone().delete_snapshot(request).await.map(drop)
    }

    pub async fn capacity(&self) -> csi::GetCapacityResponse {
        self.controller.clone().get_capacity(csi::GetCapacityRequest::default()).await.unwrap().into_inner()
    }

    /// Waits until there is so much room: what was deleted when a driver died is removed in the background.
    pub async fn room_comes_back(&self, wanted: i64) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let mut room = self.capacity().await.available_capacity;
        while room != wanted && std::time::Instant::now() < end {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            room = self.capacity().await.available_capacity;
        }
        assert_eq!(room, wanted);
    }

    pub async fn health(&self, id: &str) -> Result<Vec<String>, Status> {
        let request =
            csi::ControllerGetVolumeHealthRequest { volume_id: id.to_owned(), secrets: self.secrets[0].clone() };
        let reply = self.controller.clone().controller_get_volume_health(request).await?.into_inner();
        Ok(reply.volume_health.unwrap().health_statuses.into_iter().map(|entry| entry.reason).collect())
    }

    pub async fn storage_health(&self) -> Vec<String> {
        let request = csi::NodeGetStorageHealthRequest::default();
        let reply = self.node.clone().node_get_storage_health(request).await.unwrap().into_inner();
        reply.backend_health.into_iter().map(|entry| entry.reason).collect()
    }

    /// Total bytes, as statistics say.
    pub async fn total(&self, id: &str, path: &str) -> Result<i64, Status> {
        let request = csi::NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: path.to_owned(),
            ..Default::default()
        };
        Ok(self.node.clone().node_get_volume_stats(request).await?.into_inner().usage[0].total)
    }

    pub async fn list(&self) -> Vec<String> {
        let reply = self.controller.clone().list_volumes(csi::ListVolumesRequest::default()).await.unwrap();
        reply.into_inner().entries.into_iter().map(|entry| entry.volume.unwrap().volume_id).collect()
    }

    /// Everything from the volume's name to a directory that a pod sees.
    pub async fn make_and_mount(&self, lab: &Lab, name: &str, size: i64, usage: &Use) -> Mounted {
        let id = self.create(name, size, usage).await;
        self.mount(lab, &id, name, usage).await
    }

    pub async fn mount(&self, lab: &Lab, id: &str, name: &str, usage: &Use) -> Mounted {
        let mounted = Mounted { id: id.to_owned(), staging: lab.staging(name), target: lab.target(name) };
        self.stage(id, &mounted.staging, usage).await.unwrap();
        self.publish(id, &mounted.staging, &mounted.target, usage).await.unwrap();
        mounted
    }

    pub async fn unmount(&self, mounted: &Mounted) {
        self.unpublish(&mounted.id, &mounted.target).await.unwrap();
        self.unstage(&mounted.id, &mounted.staging).await.unwrap();
    }

    pub async fn remove(&self, mounted: &Mounted) {
        self.unmount(mounted).await;
        self.delete(&mounted.id).await.unwrap();
    }
}

/// A volume at its places.
pub struct Mounted {
    pub id: String,
    pub staging: String,
    pub target: String,
}

impl Mounted {
    pub fn file(&self, name: &str) -> PathBuf {
        Path::new(&self.target).join(name)
    }
}

pub fn from_snapshot(id: &str) -> csi::volume_content_source::Type {
    use csi::volume_content_source::{SnapshotSource, Type};
    Type::Snapshot(SnapshotSource { snapshot_id: id.to_owned() })
}

pub fn from_volume(id: &str) -> csi::volume_content_source::Type {
    use csi::volume_content_source::{Type, VolumeSource};
    Type::Volume(VolumeSource { volume_id: id.to_owned() })
}
