//! Identity: who the driver is and what it has, on every socket.

use tonic::{Request, Response, Status};

use super::Front;
use crate::proto::csi::{self, identity_server::Identity};

#[tonic::async_trait]
impl Identity for Front {
    async fn get_plugin_info(
        &self,
        _: Request<csi::GetPluginInfoRequest>,
    ) -> Result<Response<csi::GetPluginInfoResponse>, Status> {
        self.answer("GetPluginInfo", "", async {
            Ok(csi::GetPluginInfoResponse {
                name: self.driver.to_string(),
                vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
                manifest: [].into(),
            })
        })
        .await
    }

    /// The same on every socket of the driver, whichever services that has.
    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<csi::GetPluginCapabilitiesResponse>, Status> {
        use csi::plugin_capability::service::Type as Service;
        use csi::plugin_capability::{Type, VolumeExpansion, volume_expansion};
        let backend = self.backend.clone();
        self.answer("GetPluginCapabilities", "", async {
            let (local, snapshots, grows) = self
                .ask(move || {
                    let grows = backend.controller.growth().is_some() || backend.node.growth().is_some();
                    Ok((backend.node.topology().is_some(), backend.controller.snapshots().is_some(), grows))
                })
                .await?;
            let services = [
                (Service::ControllerService, true),
                (Service::VolumeAccessibilityConstraints, local),
                (Service::SnapshotAccessibilityConstraints, local && snapshots),
            ];
            let services = services.into_iter().filter(|(_, has)| *has);
            let services =
                services.map(|(service, _)| Type::Service(csi::plugin_capability::Service { r#type: service.into() }));
            let expansion =
                grows.then(|| Type::VolumeExpansion(VolumeExpansion { r#type: volume_expansion::Type::Online.into() }));
            let capabilities =
                services.chain(expansion).map(|has| csi::PluginCapability { r#type: Some(has) }).collect();
            Ok(csi::GetPluginCapabilitiesResponse { capabilities })
        })
        .await
    }

    async fn probe(&self, _: Request<csi::ProbeRequest>) -> Result<Response<csi::ProbeResponse>, Status> {
        self.answer("Probe", "", async { Ok(csi::ProbeResponse { ready: Some(true) }) }).await
    }
}
