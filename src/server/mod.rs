//! Sockets, registration with kubelet, health and metrics, and the orderly end.
//!
//! Nothing here knows what a volume is: `rpc` has the services.

mod authority;
mod http;
mod registration;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::config::{Config, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::proto::csi::controller_server::ControllerServer;
use crate::proto::csi::identity_server::IdentityServer;
use crate::proto::csi::node_server::NodeServer;
use crate::rpc::Front;
use crate::socket;
use crate::telemetry::Metrics;
use registration::Registration;

/// Serves every driver until `stop` turns true, then lets the calls that are being answered end.
///
/// # Errors
/// When a socket can't be had, or something that should serve ended by itself.
pub async fn serve(
    config: &Config,
    drivers: Vec<(Driver, Front)>,
    metrics: Arc<Metrics>,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    let ready = Arc::new(AtomicBool::new(false));
    let mut parts = JoinSet::new();
    if let Some(address) = config.http {
        parts.spawn(http::Http::bind(address, metrics, ready.clone()).await?.serve(stop.clone()));
    }
    let fronts: Vec<_> = drivers.iter().map(|(_, front)| front.clone()).collect();
    for (driver, front) in drivers {
        let (listener, file) = socket::bind(&driver.socket, socket::Directory::Ours)?;
        tracing::info!(driver = driver.name, socket = %driver.socket.display(), role = ?driver.role, "serving");
        let services = Server::builder()
            .add_service(IdentityServer::new(front.clone()))
            .add_optional_service(driver.role.has_controller().then(|| ControllerServer::new(front.clone())))
            .add_optional_service(driver.role.has_node().then(|| NodeServer::new(front)));
        let path = driver.socket.clone();
        let stopped = wait(stop.clone());
        parts.spawn(async move {
            let result = services.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped).await;
            drop(file);
            result
                .map_err(|error| Error::caused(ErrorKind::Internal, format!("cannot serve {}", path.display()), error))
        });
        // After its own socket is open: kubelet calls back at once.
        if let Some(kubelet) = driver.kubelet {
            parts.spawn(Registration::new(&driver.name, kubelet).keep(stop.clone()));
        }
    }
    ready.store(true, Ordering::Release);
    loop {
        let ended = tokio::select! {
            ended = parts.join_next() => ended,
            // A client that keeps its connection open does not keep us.
            () = drained(stop.clone(), &fronts) => return Ok(()),
        };
        let Some(ended) = ended else { return Ok(()) };
        ended.map_err(|error| Error::caused(ErrorKind::Internal, "a part of the server ended in a panic", error))??;
        if !*stop.borrow() {
            fail!(Internal, "a part of the server ended by itself");
        }
    }
}

/// Ends when `stop` has turned true and no call has been at work for a moment, so that the last reply is on its way.
async fn drained(stop: watch::Receiver<bool>, fronts: &[Front]) {
    wait(stop).await;
    let mut quiet = 0;
    while quiet < 3 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        quiet = if fronts.iter().all(Front::is_idle) { quiet + 1 } else { 0 };
    }
}

/// Ends when `stop` turns true, or when nobody can turn it any more.
async fn wait(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}
