//! `berth serve`: run until told to stop.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::config::{Config, Driver};
use crate::rpc::Front;
use crate::server;
use crate::telemetry::Metrics;

/// Serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once.
///
/// # Errors
/// See [`server::serve`].
pub async fn run(config: &Config, drivers: Vec<(Driver, Front)>, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        either(&mut terminate, &mut interrupt).await;
        tracing::info!("draining: no new calls; those being answered may end; a second signal ends them");
        stop.send_replace(true);
        either(&mut terminate, &mut interrupt).await;
        tracing::warn!("second signal: ending at once");
        std::process::exit(1);
    });
    server::serve(config, drivers, metrics, stopped).await?;
    tracing::info!("drained");
    Ok(())
}

async fn either(first: &mut Signal, second: &mut Signal) {
    tokio::select! {
        _ = first.recv() => {}
        _ = second.recv() => {}
    }
}
