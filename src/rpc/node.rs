//! Node: volumes at places on this machine. Back ends stage; publishing is done here, once for all of them.

use std::path::{Path, PathBuf};

use tonic::{Request, Response, Status};

use super::{Front, parse, reply};
use crate::backend::{STAGED_DEVICE, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::host::{mounts, paths};
use crate::proto::csi::{self, node_server::Node};
use crate::secrets::Secrets;
use crate::volume::{Access, AccessMode, Capability, MountPath, VolumeId};

fn absent(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("this driver does not offer {what}"))
}

/// A path that is only looked at: there is no volume at one that no volume can be at.
fn looked_at(what: &str, id: &VolumeId, path: &str) -> Result<PathBuf> {
    if path.is_empty() {
        fail!(Invalid, "{what} is missing");
    }
    match MountPath::new(what, path) {
        Ok(path) => Ok(path.as_path().to_owned()),
        Err(error) => Err(Error::caused(ErrorKind::NotFound, format!("volume {id} is not at {path}"), error)),
    }
}

fn not_there(id: &VolumeId, path: &Path) -> Error {
    Error::new(ErrorKind::NotFound, format!("volume {id} is not at {}", path.display()))
}

#[tonic::async_trait]
impl Node for Front {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("NodeStageVolume", &request.volume_id.clone(), async {
            let secrets = Secrets::new(request.secrets);
            let stage = Stage {
                id: VolumeId::new(request.volume_id)?,
                path: MountPath::new("staging_target_path", &request.staging_target_path)?,
                capability: parse::capability(request.volume_capability)?,
                context: parse::map("volume_context", request.volume_context)?,
            };
            self.check_capability(&stage.capability)?;
            let backend = self.backend.node.clone();
            self.work([stage.id.to_string()], move || backend.ensure_staged(&stage, &secrets)).await?;
            Ok(csi::NodeStageVolumeResponse {})
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("NodeUnstageVolume", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let path = MountPath::new("staging_target_path", &request.staging_target_path)?;
            let backend = self.backend.node.clone();
            self.work([id.to_string()], move || backend.ensure_unstaged(&id, &path)).await?;
            Ok(csi::NodeUnstageVolumeResponse {})
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("NodePublishVolume", &request.volume_id.clone(), async {
            let secrets = Secrets::new(request.secrets);
            let id = VolumeId::new(request.volume_id)?;
            let target = MountPath::new("target_path", &request.target_path)?;
            let capability = parse::capability(request.volume_capability)?;
            let context = parse::map("volume_context", request.volume_context)?;
            let read_only = request.readonly;
            self.check_capability(&capability)?;
            let backend = self.backend.node.clone();
            if parse::is_ephemeral(&context) {
                self.work([id.to_string()], move || {
                    if read_only {
                        fail!(Invalid, "an inline volume is born empty: read-only it would stay so");
                    }
                    let ephemeral = backend.ephemeral().ok_or_else(|| absent("inline volumes"))?;
                    ephemeral.ensure_present(&id, &target, &capability.access, &context)?;
                    backend.published(&id, &target)
                })
                .await?;
            } else {
                let path = MountPath::new("staging_target_path", &request.staging_target_path)?;
                let publish = Publish { stage: Stage { id, path, capability, context }, target, read_only };
                self.work([publish.stage.id.to_string()], move || {
                    publish.bind(backend.as_ref(), &secrets)?;
                    backend.published(&publish.stage.id, &publish.target)
                })
                .await?;
            }
            Ok(csi::NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("NodeUnpublishVolume", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let target = MountPath::new("target_path", &request.target_path)?;
            let backend = self.backend.node.clone();
            self.work([id.to_string()], move || {
                let was_device = mounts::is_device(target.as_path())?;
                while mounts::is_mount(target.as_path())? {
                    if !backend.is_at(&id, target.as_path())? {
                        fail!(Precondition, "what is mounted at {target} is not {id}: left alone");
                    }
                    backend.unmount(target.as_path())?;
                }
                paths::remove_empty(target.as_path())?;
                if was_device {
                    backend.release(&id)?;
                }
                backend.ephemeral().map_or(Ok(()), |ephemeral| ephemeral.ensure_gone(&id))
            })
            .await?;
            Ok(csi::NodeUnpublishVolumeResponse {})
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        self.answer("NodeGetVolumeStats", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let path = looked_at("volume_path", &id, &request.volume_path)?;
            let backend = self.backend.node.clone();
            let usage = self
                .ask(move || {
                    let stats = backend.stats().ok_or_else(|| absent("statistics"))?;
                    stats.usage(&id, &path)?.ok_or_else(|| not_there(&id, &path))
                })
                .await?;
            Ok(csi::NodeGetVolumeStatsResponse { usage: reply::usage(usage) })
        })
        .await
    }

    async fn node_get_volume_health(
        &self,
        request: Request<csi::NodeGetVolumeHealthRequest>,
    ) -> Result<Response<csi::NodeGetVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        self.answer("NodeGetVolumeHealth", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let paths = [request.volume_publish_path, request.staging_target_path];
            let path = paths.iter().find(|path| !path.is_empty());
            let path = path.map(|path| looked_at("volume_publish_path", &id, path)).transpose()?;
            let backend = self.backend.node.clone();
            let health = self
                .ask(move || {
                    let health = backend.health().ok_or_else(|| absent("health"))?;
                    let problems = health.volume(&id, path.as_deref())?.ok_or_else(|| {
                        Error::new(ErrorKind::NotFound, format!("volume {id} does not exist on this node"))
                    })?;
                    Ok(reply::health(&id, problems))
                })
                .await?;
            Ok(csi::NodeGetVolumeHealthResponse { volume_health: Some(health) })
        })
        .await
    }

    async fn node_get_storage_health(
        &self,
        request: Request<csi::NodeGetStorageHealthRequest>,
    ) -> Result<Response<csi::NodeGetStorageHealthResponse>, Status> {
        let secrets = Secrets::new(request.into_inner().secrets);
        self.answer("NodeGetStorageHealth", "", async {
            let backend = self.backend.node.clone();
            let problems =
                self.ask(move || backend.health().ok_or_else(|| absent("health"))?.storage(&secrets)).await?;
            Ok(csi::NodeGetStorageHealthResponse { backend_health: problems.into_iter().map(reply::storage).collect() })
        })
        .await
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("NodeExpandVolume", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let secrets = Secrets::new(request.secrets);
            let range = parse::range(request.capacity_range)?;
            let published = looked_at("volume_path", &id, &request.volume_path)?;
            // The staging path is writable where the published one may be read-only.
            let path = match request.staging_target_path.as_str() {
                "" => published,
                staging => looked_at("staging_target_path", &id, staging)?,
            };
            let backend = self.backend.node.clone();
            let size = self
                .work([id.to_string()], move || {
                    let growth = backend.growth().ok_or_else(|| absent("expansion on the node"))?;
                    growth.ensure_size(&id, &path, range, &secrets)?.ok_or_else(|| not_there(&id, &path))
                })
                .await?;
            Ok(csi::NodeExpandVolumeResponse { capacity_bytes: reply::bytes(size) })
        })
        .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        self.answer("NodeGetCapabilities", "", async {
            Ok(csi::NodeGetCapabilitiesResponse { capabilities: capabilities(self.backend.node.as_ref()) })
        })
        .await
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        self.answer("NodeGetInfo", "", async {
            Ok(csi::NodeGetInfoResponse {
                node_id: self.node.as_str().to_owned(),
                max_volumes_per_node: self.backend.node.volume_limit(),
                accessible_topology: self.backend.node.topology().map(reply::topology),
            })
        })
        .await
    }
}

impl Front {
    fn check_capability(&self, capability: &Capability) -> Result<()> {
        self.backend.controller.check(std::slice::from_ref(capability), &[].into(), &[].into())
    }
}

/// A staged volume to be shown to a pod.
struct Publish {
    stage: Stage,
    target: MountPath,
    read_only: bool,
}

impl Publish {
    fn bind(&self, backend: &dyn crate::backend::Node, secrets: &Secrets) -> Result<()> {
        let Self { stage, target, .. } = self;
        let Stage { id, path: staging, capability, .. } = stage;
        let read_only = self.read_only || capability.mode.is_read_only();
        let source = match capability.access {
            Access::Block => staging.as_path().join(STAGED_DEVICE),
            Access::Mount { .. } => staging.as_path().to_owned(),
        };
        backend.ensure_alive(stage, target, secrets)?;
        if !backend.is_at(id, &source)? {
            fail!(Precondition, "{id} is not staged at {staging}: stage it first");
        }
        if capability.mode == AccessMode::SingleNodeSingleWriter
            && let Some(other) = backend.shown_at(&source)?.iter().find(|place| place.as_path() != target.as_path())
        {
            fail!(Precondition, "{id} is used by one pod at a time, and one has it at {}", other.display());
        }
        if read_only && capability.access == Access::Block {
            let view = backend.read_only_device(&source)?;
            return mounts::ensure_bind(&view, target.as_path(), false);
        }
        mounts::ensure_bind(&source, target.as_path(), read_only)
    }
}

/// What the back end has, and nothing else.
fn capabilities(backend: &dyn crate::backend::Node) -> Vec<csi::NodeServiceCapability> {
    use csi::node_service_capability::rpc::Type;
    use csi::node_service_capability::{Rpc, Type as Capability};
    let health = backend.health().is_some();
    let all = [
        // Every back end stages; the second one is enforced above.
        (Type::StageUnstageVolume, true),
        (Type::SingleNodeMultiWriter, true),
        (Type::VolumeMountGroup, backend.takes_mount_group()),
        (Type::GetVolumeStats, backend.stats().is_some()),
        (Type::ExpandVolume, backend.growth().is_some()),
        (Type::GetVolumeHealth, health),
        (Type::GetStorageHealth, health),
    ];
    let has = all.into_iter().filter(|(_, has)| *has);
    has.map(|(one, _)| csi::NodeServiceCapability { r#type: Some(Capability::Rpc(Rpc { r#type: one.into() })) })
        .collect()
}
