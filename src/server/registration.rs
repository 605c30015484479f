//! Registration with kubelet, without a registrar sidecar.
//!
//! Kubelet watches its `plugins_registry` directory. When a socket appears there it asks who is behind it (and wants
//! an answer within a second), calls the driver, and tells us its verdict. After a refusal it looks again only at a
//! new socket, so we make one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::{authority, wait};
use crate::config::Kubelet;
use crate::error::{Error, ErrorKind, Result};
use crate::proto::registration::registration_server::{Registration as Protocol, RegistrationServer};
use crate::proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use crate::socket;

/// Between a refusal and the next try.
const PAUSE: Duration = Duration::from_secs(5);

/// One driver's registration.
#[derive(Clone)]
pub(super) struct Registration {
    driver: String,
    socket: PathBuf,
    endpoint: String,
    refused: Arc<Notify>,
}

impl Registration {
    pub(super) fn new(driver: &str, kubelet: Kubelet) -> Self {
        Self {
            driver: driver.to_owned(),
            socket: kubelet.registry.join(format!("{driver}-reg.sock")),
            endpoint: kubelet.endpoint.to_string_lossy().into_owned(),
            refused: Arc::default(),
        }
    }

    /// Keeps the driver registered until `stop`; then takes the socket away, which unregisters it.
    pub(super) async fn keep(self, stop: watch::Receiver<bool>) -> Result<()> {
        while !*stop.borrow() {
            let (listener, file) = socket::bind(&self.socket, socket::Directory::Shared)?;
            let ended = {
                let (stop, refused) = (stop.clone(), self.refused.clone());
                async move {
                    tokio::select! {
                        () = wait(stop) => {}
                        () = refused.notified() => {}
                    }
                }
            };
            let connections = UnixListenerStream::new(listener).map(|accepted| accepted.and_then(authority::replaced));
            let served = Server::builder()
                .add_service(RegistrationServer::new(self.clone()))
                .serve_with_incoming_shutdown(connections, ended)
                .await;
            drop(file);
            served.map_err(|error| {
                Error::caused(ErrorKind::Internal, format!("cannot serve {}", self.socket.display()), error)
            })?;
            tokio::select! {
                () = wait(stop.clone()) => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Protocol for Registration {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.driver.clone(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let verdict = request.into_inner();
        if verdict.plugin_registered {
            tracing::info!(driver = self.driver, "registered with kubelet");
        } else {
            tracing::error!(driver = self.driver, error = verdict.error, "kubelet refused the driver; trying again");
            self.refused.notify_one();
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
