//! Controller: volumes and snapshots as things.

use tonic::{Request, Response, Status};

use super::parse::Source;
use super::{Front, parse, reply};
use crate::error::{Error, ErrorKind, Result};
use crate::proto::csi::{self, controller_server::Controller};
use crate::secrets::Secrets;
use crate::volume::{Name, SnapshotId, Spec, VolumeId};

/// The back end has no such part.
fn absent(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("this driver does not offer {what}"))
}

fn not_found(id: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::NotFound, format!("{id} does not exist"))
}

#[tonic::async_trait]
impl Controller for Front {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("CreateVolume", &request.name.clone(), async {
            let secrets = Secrets::new(request.secrets);
            let (parameters, owner) = parse::parameters(request.parameters)?;
            let spec = Spec {
                name: Name::new(request.name)?,
                capacity: parse::range(request.capacity_range)?,
                capabilities: parse::capabilities(request.volume_capabilities)?,
                parameters,
                mutable: parse::map("mutable_parameters", request.mutable_parameters)?,
                owner,
                places: parse::places(request.accessibility_requirements),
            };
            let source = parse::source(request.volume_content_source)?;
            let backend = self.backend.controller.clone();
            backend.check(&spec.capabilities, &spec.parameters, &spec.mutable)?;
            let id = backend.volume_id(&spec.name, &spec.parameters)?;
            let mut held_still: Vec<_> = source.iter().map(|source| source.id().to_owned()).collect();
            if let Some(Source::Snapshot(snapshot)) = &source {
                let volume = backend.snapshots().and_then(|snapshots| snapshots.needs_volume(snapshot));
                held_still.extend(volume.map(|volume| volume.to_string()));
            }
            let volume = self
                .work_with([id.to_string()], held_still, move || match source {
                    None => backend.ensure_volume(&id, &spec, &secrets),
                    Some(Source::Volume(source)) => {
                        let cloning = backend.cloning().ok_or_else(|| absent("clones"))?;
                        cloning.ensure_clone(&id, &spec, &source, &secrets)
                    }
                    Some(Source::Snapshot(source)) => {
                        let snapshots = backend.snapshots().ok_or_else(|| absent("snapshots"))?;
                        snapshots.ensure_restored(&id, &spec, &source, &secrets)
                    }
                })
                .await?;
            Ok(csi::CreateVolumeResponse { volume: Some(reply::volume(volume)) })
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("DeleteVolume", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let secrets = Secrets::new(request.secrets);
            let backend = self.backend.controller.clone();
            self.work([id.to_string()], move || backend.ensure_absent(&id, &secrets)).await?;
            Ok(csi::DeleteVolumeResponse {})
        })
        .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        self.answer("ControllerPublishVolume", &request.get_ref().volume_id, async { Err(absent("attaching")) }).await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        self.answer("ControllerUnpublishVolume", &request.get_ref().volume_id, async { Err(absent("attaching")) }).await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        use csi::validate_volume_capabilities_response::Confirmed;
        let request = request.into_inner();
        self.answer("ValidateVolumeCapabilities", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let secrets = Secrets::new(request.secrets);
            let confirmed = Confirmed {
                volume_context: request.volume_context,
                volume_capabilities: request.volume_capabilities.clone(),
                parameters: request.parameters.clone(),
                mutable_parameters: request.mutable_parameters.clone(),
            };
            let capabilities = parse::capabilities(request.volume_capabilities)?;
            let (parameters, _) = parse::parameters(request.parameters)?;
            let mutable = parse::map("mutable_parameters", request.mutable_parameters)?;
            let backend = self.backend.controller.clone();
            let found = self.ask(move || backend.find(&id, &secrets)?.ok_or_else(|| not_found(id))).await?;
            let verdict = self.backend.controller.check(&capabilities, &parameters, &mutable);
            tracing::debug!(volume.id = %found.id, ?verdict, "validated");
            Ok(match verdict {
                Ok(()) => {
                    csi::ValidateVolumeCapabilitiesResponse { confirmed: Some(confirmed), message: String::new() }
                }
                Err(error) => csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message: error.to_string() },
            })
        })
        .await
    }

    async fn list_volumes(
        &self,
        request: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        use csi::list_volumes_response::Entry;
        let request = request.into_inner();
        self.answer("ListVolumes", &request.starting_token.clone(), async {
            let page = parse::page(request.max_entries, request.starting_token)?;
            let backend = self.backend.controller.clone();
            let page = self.ask(move || backend.listing().ok_or_else(|| absent("lists"))?.list(&page)).await?;
            let entry = |volume| Entry { volume: Some(reply::volume(volume)), status: None };
            Ok(csi::ListVolumesResponse {
                entries: page.entries.into_iter().map(entry).collect(),
                next_token: page.next.unwrap_or_default(),
            })
        })
        .await
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<csi::ControllerListVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerListVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        self.answer("ControllerListVolumeHealth", &request.starting_token.clone(), async {
            let page = parse::page(request.max_entries, request.starting_token)?;
            let backend = self.backend.controller.clone();
            let page = self.ask(move || backend.health().ok_or_else(|| absent("health"))?.list_unwell(&page)).await?;
            Ok(csi::ControllerListVolumeHealthResponse {
                entries: page.entries.into_iter().map(|(id, problems)| reply::health(&id, problems)).collect(),
                next_token: page.next.unwrap_or_default(),
            })
        })
        .await
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<csi::ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        self.answer("ControllerGetVolumeHealth", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let secrets = Secrets::new(request.secrets);
            let backend = self.backend.controller.clone();
            let health = self
                .ask(move || {
                    let health = backend.health().ok_or_else(|| absent("health"))?;
                    let problems = health.health(&id, &secrets)?.ok_or_else(|| not_found(&id))?;
                    Ok(reply::health(&id, problems))
                })
                .await?;
            Ok(csi::ControllerGetVolumeHealthResponse { volume_health: Some(health) })
        })
        .await
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        let request = request.into_inner();
        self.answer("GetCapacity", "", async {
            let (parameters, _) = parse::parameters(request.parameters)?;
            let place = request.accessible_topology.map(parse::topology);
            let capabilities = request.volume_capabilities.into_iter().map(|one| parse::capability(Some(one)));
            let capabilities = capabilities.collect::<Result<Vec<_>>>()?;
            let backend = self.backend.controller.clone();
            let possible = backend.check(&capabilities, &parameters, &[].into()).is_ok();
            let room = self
                .ask(move || {
                    let capacity = backend.capacity().ok_or_else(|| absent("capacity"))?;
                    capacity.available(&parameters, place.as_ref())
                })
                .await?;
            let free = |size| if possible { reply::bytes(size) } else { 0 };
            Ok(csi::GetCapacityResponse {
                available_capacity: free(room.total),
                maximum_volume_size: Some(free(room.largest)),
                minimum_volume_size: Some(reply::bytes(room.smallest)),
            })
        })
        .await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let backend = self.backend.controller.clone();
        self.answer("ControllerGetCapabilities", "", async {
            Ok(csi::ControllerGetCapabilitiesResponse {
                capabilities: self.ask(move || Ok(capabilities(backend.as_ref()))).await?,
            })
        })
        .await
    }

    async fn create_snapshot(
        &self,
        request: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        let request = request.into_inner();
        self.answer("CreateSnapshot", &request.name.clone(), async {
            let secrets = Secrets::new(request.secrets);
            let name = Name::new(request.name)?;
            let source = VolumeId::new(request.source_volume_id)?;
            let (parameters, _) = parse::parameters(request.parameters)?;
            let places = parse::places(request.accessibility_requirements);
            let backend = self.backend.controller.clone();
            // The name too: another call may want it for another volume.
            let keys = [source.to_string(), format!("snapshot named {}", name.as_str())];
            let snapshot = self
                .work(keys, move || {
                    let snapshots = backend.snapshots().ok_or_else(|| absent("snapshots"))?;
                    snapshots.ensure_snapshot(&name, &source, &parameters, &places, &secrets)
                })
                .await?;
            Ok(csi::CreateSnapshotResponse { snapshot: Some(reply::snapshot(snapshot)) })
        })
        .await
    }

    async fn delete_snapshot(
        &self,
        request: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        let request = request.into_inner();
        self.answer("DeleteSnapshot", &request.snapshot_id.clone(), async {
            let id = SnapshotId::new(request.snapshot_id)?;
            let secrets = Secrets::new(request.secrets);
            let backend = self.backend.controller.clone();
            self.work([id.to_string()], move || {
                backend.snapshots().ok_or_else(|| absent("snapshots"))?.ensure_snapshot_absent(&id, &secrets)
            })
            .await?;
            Ok(csi::DeleteSnapshotResponse {})
        })
        .await
    }

    async fn list_snapshots(
        &self,
        request: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        use csi::list_snapshots_response::Entry;
        let request = request.into_inner();
        self.answer("ListSnapshots", &request.starting_token.clone(), async {
            let secrets = Secrets::new(request.secrets);
            let page = parse::page(request.max_entries, request.starting_token)?;
            let present = |text: String| (!text.is_empty()).then_some(text);
            let id = present(request.snapshot_id).map(SnapshotId::new).transpose()?;
            let source = present(request.source_volume_id).map(VolumeId::new).transpose()?;
            let backend = self.backend.controller.clone();
            let (entries, next) = self
                .ask(move || {
                    let snapshots = backend.snapshots().ok_or_else(|| absent("snapshots"))?;
                    let Some(id) = id else {
                        let page = snapshots.list_snapshots(source.as_ref(), &page, &secrets)?;
                        return Ok((page.entries, page.next));
                    };
                    let found = snapshots.find_snapshot(&id, &secrets)?;
                    let fits = found.filter(|found| source.is_none_or(|source| source == found.source));
                    Ok((fits.into_iter().collect(), None))
                })
                .await?;
            let entry = |snapshot| Entry { snapshot: Some(reply::snapshot(snapshot)) };
            Ok(csi::ListSnapshotsResponse {
                entries: entries.into_iter().map(entry).collect(),
                next_token: next.unwrap_or_default(),
            })
        })
        .await
    }

    async fn get_snapshot(
        &self,
        request: Request<csi::GetSnapshotRequest>,
    ) -> Result<Response<csi::GetSnapshotResponse>, Status> {
        let request = request.into_inner();
        self.answer("GetSnapshot", &request.snapshot_id.clone(), async {
            let id = SnapshotId::new(request.snapshot_id)?;
            let secrets = Secrets::new(request.secrets);
            let backend = self.backend.controller.clone();
            let snapshot = self
                .ask(move || {
                    let snapshots = backend.snapshots().ok_or_else(|| absent("snapshots"))?;
                    snapshots.find_snapshot(&id, &secrets)?.ok_or_else(|| not_found(&id))
                })
                .await?;
            Ok(csi::GetSnapshotResponse { snapshot: Some(reply::snapshot(snapshot)) })
        })
        .await
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("ControllerExpandVolume", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let secrets = Secrets::new(request.secrets);
            let Some(range) = parse::range(request.capacity_range)? else {
                fail!(Invalid, "capacity_range is missing");
            };
            let backend = self.backend.controller.clone();
            let (size, node_expansion_required) = self
                .work([id.to_string()], move || {
                    backend
                        .growth()
                        .ok_or_else(|| absent("expansion by the controller"))?
                        .ensure_size(&id, range, &secrets)
                })
                .await?;
            Ok(csi::ControllerExpandVolumeResponse { capacity_bytes: reply::bytes(size), node_expansion_required })
        })
        .await
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        use csi::controller_get_volume_response::VolumeStatus;
        let request = request.into_inner();
        self.answer("ControllerGetVolume", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let backend = self.backend.controller.clone();
            let volume =
                self.ask(move || backend.find(&id, &Secrets::default())?.ok_or_else(|| not_found(&id))).await?;
            Ok(csi::ControllerGetVolumeResponse {
                volume: Some(reply::volume(volume)),
                status: Some(VolumeStatus::default()),
            })
        })
        .await
    }

    async fn controller_modify_volume(
        &self,
        request: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        let request = request.into_inner();
        self.answer("ControllerModifyVolume", &request.volume_id.clone(), async {
            let id = VolumeId::new(request.volume_id)?;
            let secrets = Secrets::new(request.secrets);
            let mutable = parse::map("mutable_parameters", request.mutable_parameters)?;
            let backend = self.backend.controller.clone();
            self.work([id.to_string()], move || {
                backend.modification().ok_or_else(|| absent("modification"))?.ensure_modified(&id, &mutable, &secrets)
            })
            .await?;
            Ok(csi::ControllerModifyVolumeResponse {})
        })
        .await
    }
}

/// What the back end has, and nothing else.
fn capabilities(backend: &dyn crate::backend::Controller) -> Vec<csi::ControllerServiceCapability> {
    use csi::controller_service_capability::rpc::Type;
    use csi::controller_service_capability::{Rpc, Type as Capability};
    let snapshots = backend.snapshots().is_some();
    let all = [
        // The trait has these; the last one is enforced by `rpc::node` for every back end.
        (Type::CreateDeleteVolume, true),
        (Type::GetVolume, true),
        (Type::SingleNodeMultiWriter, true),
        (Type::ListVolumes, backend.listing().is_some()),
        (Type::GetCapacity, backend.capacity().is_some()),
        (Type::CreateDeleteSnapshot, snapshots),
        (Type::ListSnapshots, snapshots),
        (Type::GetSnapshot, snapshots),
        (Type::CloneVolume, backend.cloning().is_some()),
        (Type::ExpandVolume, backend.growth().is_some()),
        (Type::ModifyVolume, backend.modification().is_some()),
        (Type::GetVolumeHealth, backend.health().is_some()),
        (Type::ListVolumeHealth, backend.health().is_some()),
    ];
    let has = all.into_iter().filter(|(_, has)| *has);
    has.map(|(one, _)| csi::ControllerServiceCapability { r#type: Some(Capability::Rpc(Rpc { r#type: one.into() })) })
        .collect()
}
