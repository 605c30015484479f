//! `/healthz`, `/readyz` and `/metrics` over plain HTTP, for kubelet's probes and Prometheus.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::wait;
use crate::error::{Context, Result};
use crate::telemetry::Metrics;

/// More connections than this at once are not probes.
const CONNECTIONS: usize = 512;
/// A client gets so long to send its request.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) struct Http {
    listener: TcpListener,
    state: Arc<State>,
}

struct State {
    metrics: Arc<Metrics>,
    ready: Arc<AtomicBool>,
}

impl Http {
    pub(super) async fn bind(address: SocketAddr, metrics: Arc<Metrics>, ready: Arc<AtomicBool>) -> Result<Self> {
        let listener = TcpListener::bind(address).await.context(|| format!("cannot listen at http://{address}"))?;
        let address = listener.local_addr().context(|| format!("cannot listen at http://{address}"))?;
        tracing::info!(%address, "serving /healthz, /readyz and /metrics");
        Ok(Self { listener, state: Arc::new(State { metrics, ready }) })
    }

    /// Serves until `stop`. Connections that are open then are dropped: a probe is not worth waiting for.
    pub(super) async fn serve(self, stop: watch::Receiver<bool>) -> Result<()> {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        let stopped = wait(stop);
        tokio::pin!(stopped);
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return Ok(()) };
            let stream = tokio::select! {
                () = &mut stopped => return Ok(()),
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let state = self.state.clone();
            tokio::spawn(async move {
                let answer = service_fn(move |request| {
                    let reply = state.reply(&request);
                    async move { Ok::<_, Infallible>(reply) }
                });
                let served = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(PATIENCE)
                    .serve_connection(TokioIo::new(stream), answer)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "an HTTP client went away");
                }
                drop(slot);
            });
        }
    }
}

impl State {
    fn reply(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (code, body) = match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => (StatusCode::OK, "ok\n".to_owned()),
            (&Method::GET, "/readyz") if self.ready.load(Ordering::Acquire) => (StatusCode::OK, "ready\n".to_owned()),
            (&Method::GET, "/readyz") => (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
            (&Method::GET, "/metrics") => (StatusCode::OK, self.metrics.encode()),
            _ => (StatusCode::NOT_FOUND, "GET /healthz, /readyz or /metrics\n".to_owned()),
        };
        let kind = match request.uri().path() {
            "/metrics" => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            _ => "text/plain; charset=utf-8",
        };
        let mut response = Response::new(Full::from(body));
        *response.status_mut() = code;
        response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
        response
    }
}
