//! A CSI client over Unix sockets: asks a driver for what the provisioner would.
//!
//! It decides nothing about storage and names no back end. What kubelet would ask for is in `kubelet`.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tower::service_fn;

use crate::proto::csi;
use crate::proto::csi::controller_client::ControllerClient;
pub(super) use crate::proto::csi::controller_service_capability::rpc::Type as ControllerCan;
use crate::proto::csi::identity_client::IdentityClient;
use crate::proto::csi::node_client::NodeClient;
pub(super) use crate::proto::csi::node_service_capability::rpc::Type as NodeCan;
use crate::rpc::code_name;

/// Kubelet's own limit; Berth answers before it.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// So many volumes are asked for at once.
const PAGE: i32 = 200;

/// One driver, with its controller and, where it has one, its node service.
pub(super) struct Client {
    pub(super) driver: String,
    controller: ControllerClient<Channel>,
    node: Option<NodeClient<Channel>>,
    controller_can: HashSet<i32>,
    node_can: HashSet<i32>,
}

/// How a volume is used: as a device, or as a file system with options.
#[derive(Clone, Debug)]
pub(super) enum Access {
    Block,
    Mount { filesystem: String, options: Vec<String> },
}

/// What a new volume starts with.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    Empty,
    Snapshot(String),
    Volume(String),
}

/// A volume to be made.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub(super) name: String,
    /// In bytes; `None` leaves it to the driver.
    pub(super) size: Option<u64>,
    pub(super) access: Access,
    pub(super) parameters: BTreeMap<String, String>,
    pub(super) origin: Origin,
}

/// A driver's refusal: `cannot create data: there is no room (RESOURCE_EXHAUSTED)`.
pub(super) fn refused(what: String) -> impl FnOnce(Status) -> anyhow::Error {
    move |status| anyhow!("{what}: {} ({})", status.message(), code_name(status.code()))
}

/// Sizes of messages are signed.
pub(super) fn range(size: u64) -> Result<csi::CapacityRange> {
    let required_bytes = i64::try_from(size).context("cannot ask for so many bytes: name a smaller size")?;
    Ok(csi::CapacityRange { required_bytes, limit_bytes: 0 })
}

impl Client {
    /// Connects, and asks who is there and what it can do. Without a socket of the node service there is none.
    pub(super) async fn connect(controller: &Path, node: Option<&Path>) -> Result<Self> {
        let to_controller = channel(controller).await?;
        let to_node = match node {
            Some(node) if node != controller => Some(channel(node).await?),
            node => node.map(|_| to_controller.clone()),
        };
        let what = || format!("cannot ask the driver at {} who it is", controller.display());
        let mut identity = IdentityClient::new(to_controller.clone());
        let driver =
            identity.get_plugin_info(csi::GetPluginInfoRequest {}).await.map_err(refused(what()))?.into_inner().name;
        let mut client = Self {
            driver,
            controller: ControllerClient::new(to_controller),
            node: to_node.map(NodeClient::new),
            controller_can: HashSet::new(),
            node_can: HashSet::new(),
        };
        client.ask_capabilities(controller).await?;
        Ok(client)
    }

    async fn ask_capabilities(&mut self, controller: &Path) -> Result<()> {
        use csi::controller_service_capability::Type as ControllerType;
        use csi::node_service_capability::Type as NodeType;
        let request = csi::ControllerGetCapabilitiesRequest {};
        let reply = self.controller.controller_get_capabilities(request).await;
        let what = format!("{} has no controller service: name its socket with --socket", controller.display());
        let reply = reply.map_err(refused(what))?;
        let can = reply.into_inner().capabilities.into_iter().filter_map(|one| one.r#type);
        self.controller_can = can.map(|ControllerType::Rpc(rpc)| rpc.r#type).collect();
        let Some(node) = &mut self.node else { return Ok(()) };
        match node.node_get_capabilities(csi::NodeGetCapabilitiesRequest {}).await {
            Ok(reply) => {
                let can = reply.into_inner().capabilities.into_iter().filter_map(|one| one.r#type);
                self.node_can = can.map(|NodeType::Rpc(rpc)| rpc.r#type).collect();
            }
            // The controller is all that most commands need.
            Err(status) if status.code() == Code::Unimplemented => self.node = None,
            Err(status) => return Err(refused("cannot ask the node service what it can do".to_owned())(status)),
        }
        Ok(())
    }

    pub(super) fn controller(&self) -> ControllerClient<Channel> {
        self.controller.clone()
    }

    pub(super) fn node(&self) -> Result<NodeClient<Channel>> {
        let node = self.node.clone();
        node.with_context(|| format!("{} has no node service there: name its socket with --node-socket", self.driver))
    }

    pub(super) fn controller_can(&self, what: ControllerCan) -> bool {
        self.controller_can.contains(&i32::from(what))
    }

    pub(super) fn node_can(&self, what: NodeCan) -> bool {
        self.node_can.contains(&i32::from(what))
    }

    /// One node, several pods: what ReadWriteOnce means to a driver that knows it, and to one that doesn't.
    pub(super) fn capability(&self, access: &Access) -> csi::VolumeCapability {
        use csi::volume_capability::access_mode::Mode;
        use csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
        let knows = self.controller_can(ControllerCan::SingleNodeMultiWriter)
            && (self.node.is_none() || self.node_can(NodeCan::SingleNodeMultiWriter));
        let mode = if knows { Mode::SingleNodeMultiWriter } else { Mode::SingleNodeWriter };
        let access = match access {
            Access::Block => AccessType::Block(BlockVolume {}),
            Access::Mount { filesystem, options } => AccessType::Mount(MountVolume {
                fs_type: filesystem.clone(),
                mount_flags: options.clone(),
                volume_mount_group: String::new(),
            }),
        };
        csi::VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(access) }
    }

    /// Makes a volume, or finds the one that an earlier call of the same name made.
    pub(super) async fn create(&self, wish: &Wish) -> Result<csi::Volume> {
        use csi::volume_content_source::{SnapshotSource, Type, VolumeSource};
        let source = match wish.origin.clone() {
            Origin::Empty => None,
            Origin::Snapshot(snapshot_id) => Some(Type::Snapshot(SnapshotSource { snapshot_id })),
            Origin::Volume(volume_id) => Some(Type::Volume(VolumeSource { volume_id })),
        };
        let request = csi::CreateVolumeRequest {
            name: wish.name.clone(),
            capacity_range: wish.size.map(range).transpose()?,
            volume_capabilities: vec![self.capability(&wish.access)],
            parameters: wish.parameters.clone().into_iter().collect(),
            volume_content_source: source.map(|source| csi::VolumeContentSource { r#type: Some(source) }),
            ..csi::CreateVolumeRequest::default()
        };
        let what = format!("cannot create {}", wish.name);
        let reply = self.controller().create_volume(limited(request)).await.map_err(refused(what.clone()))?;
        reply.into_inner().volume.with_context(|| format!("{what}: the driver's reply names no volume"))
    }

    /// One volume as it is now.
    pub(super) async fn volume(&self, id: &str) -> Result<csi::Volume> {
        let what = format!("cannot show {id}");
        if !self.controller_can(ControllerCan::GetVolume) {
            bail!("{what}: driver {} does not tell about single volumes", self.driver);
        }
        let request = csi::ControllerGetVolumeRequest { volume_id: id.to_owned() };
        let reply = self.controller().controller_get_volume(limited(request)).await.map_err(refused(what.clone()))?;
        reply.into_inner().volume.with_context(|| format!("{what}: the driver's reply names no volume"))
    }

    /// What is wrong with a volume. `None`: the driver doesn't tell.
    pub(super) async fn health(&self, id: &str) -> Result<Option<csi::VolumeHealth>> {
        if !self.controller_can(ControllerCan::GetVolumeHealth) {
            return Ok(None);
        }
        let request = csi::ControllerGetVolumeHealthRequest { volume_id: id.to_owned(), secrets: [].into() };
        let reply = self.controller().controller_get_volume_health(limited(request)).await;
        Ok(reply.map_err(refused(format!("cannot ask for the health of {id}")))?.into_inner().volume_health)
    }

    /// Every volume, page by page: a driver that asks its storage about each one takes a while for all of them.
    pub(super) async fn volumes(&self) -> Result<Vec<csi::Volume>> {
        let mut volumes = Vec::new();
        let mut token = String::new();
        loop {
            let request = csi::ListVolumesRequest { max_entries: PAGE, starting_token: token };
            let reply = self.controller().list_volumes(limited(request)).await;
            let reply = reply.map_err(refused("cannot list the volumes".to_owned()))?.into_inner();
            volumes.extend(reply.entries.into_iter().filter_map(|entry| entry.volume));
            token = reply.next_token;
            if token.is_empty() {
                return Ok(volumes);
            }
        }
    }

    /// Every volume that is not well, page by page; none where the driver doesn't tell.
    pub(super) async fn unwell(&self) -> Result<Vec<csi::VolumeHealth>> {
        let mut unwell = Vec::new();
        if !self.controller_can(ControllerCan::ListVolumeHealth) {
            return Ok(unwell);
        }
        let mut token = String::new();
        loop {
            let request =
                csi::ControllerListVolumeHealthRequest { max_entries: PAGE, starting_token: token, secrets: [].into() };
            let reply = self.controller().controller_list_volume_health(limited(request)).await;
            let reply = reply.map_err(refused("cannot ask which volumes are not well".to_owned()))?.into_inner();
            unwell.extend(reply.entries);
            token = reply.next_token;
            if token.is_empty() {
                return Ok(unwell);
            }
        }
    }

    /// Every snapshot, or the one of this id, page by page.
    pub(super) async fn snapshots(&self, id: Option<&str>) -> Result<Vec<csi::Snapshot>> {
        let mut snapshots = Vec::new();
        let mut token = String::new();
        loop {
            let request = csi::ListSnapshotsRequest {
                starting_token: token,
                snapshot_id: id.unwrap_or_default().to_owned(),
                ..csi::ListSnapshotsRequest::default()
            };
            let reply = self.controller().list_snapshots(limited(request)).await;
            let reply = reply.map_err(refused("cannot list the snapshots".to_owned()))?.into_inner();
            snapshots.extend(reply.entries.into_iter().filter_map(|entry| entry.snapshot));
            token = reply.next_token;
            if token.is_empty() {
                return Ok(snapshots);
            }
        }
    }

    /// Takes a snapshot of a volume, or finds the one that an earlier call of the same name took.
    pub(super) async fn snapshot(&self, id: &str, name: &str) -> Result<csi::Snapshot> {
        let what = format!("cannot snapshot {id}");
        let request = csi::CreateSnapshotRequest {
            source_volume_id: id.to_owned(),
            name: name.to_owned(),
            ..csi::CreateSnapshotRequest::default()
        };
        let reply = self.controller().create_snapshot(limited(request)).await.map_err(refused(what.clone()))?;
        reply.into_inner().snapshot.with_context(|| format!("{what}: the driver's reply names no snapshot"))
    }

    /// Deletes a volume; one that is not there is a success.
    pub(super) async fn delete(&self, id: &str) -> Result<()> {
        let request = csi::DeleteVolumeRequest { volume_id: id.to_owned(), secrets: [].into() };
        let reply = self.controller().delete_volume(limited(request)).await;
        reply.map(drop).map_err(refused(format!("cannot delete {id}")))
    }

    /// Deletes a snapshot; one that is not there is a success.
    pub(super) async fn delete_snapshot(&self, id: &str) -> Result<()> {
        let request = csi::DeleteSnapshotRequest { snapshot_id: id.to_owned(), secrets: [].into() };
        let reply = self.controller().delete_snapshot(limited(request)).await;
        reply.map(drop).map_err(refused(format!("cannot delete {id}")))
    }
}

/// A request that is given up when a driver answers no more.
pub(super) fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}

async fn channel(socket: &Path) -> Result<Channel> {
    let what = || format!("cannot connect to {}", socket.display());
    // Tried first for the plain error; tonic's would hide it.
    let tried = UnixStream::connect(socket).await;
    drop(tried.map_err(|error| anyhow!("{}: {error}; is the driver running, and are you its user?", what()))?);
    let path = socket.to_owned();
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address means nothing: the connector knows the socket.
    Endpoint::from_static("http://localhost")
        .timeout(CALL_LIMIT)
        .connect_with_connector(connector)
        .await
        .with_context(what)
}
