//! Attempts that make no progress are given up, in either direction, whatever the call.
//!
//! The SDK's own timeouts are for a whole attempt (too short for a large part, too long for a dead peer) or for the first
//! byte alone. This wraps the HTTP connector: an attempt that moved less than [`LEAST`] bytes in the endpoint's `stall`
//! fails, also a peer that trickles; so does a body that comes so slowly. It decides nothing about trying again.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

/// Fewer bytes than this in one `stall` are no progress.
const LEAST: u64 = 4 << 10;
/// Bodies in memory are handed on in pieces, so that their progress can be seen.
const PIECE: usize = 64 << 10;
/// What the service does by itself (copies, making one object of many parts) may take so many times as long.
const SERVICE_WORKS: u32 = 10;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The client, with stalls found.
pub(super) fn watched(client: SharedHttpClient, stall: Duration) -> SharedHttpClient {
    SharedHttpClient::new(Watched { inner: client, stall })
}

struct Watched<T> {
    inner: T,
    stall: Duration,
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "watched for stalls of {:?}", self.stall)
    }
}

impl HttpClient for Watched<SharedHttpClient> {
    fn http_connector(&self, settings: &HttpConnectorSettings, parts: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(Watched { inner: self.inner.http_connector(settings, parts), stall: self.stall })
    }
}

fn stalled(stall: Duration) -> BoxError {
    format!("no progress for {} ms", stall.as_millis()).into()
}

impl HttpConnector for Watched<SharedHttpConnector> {
    fn call(&self, mut request: HttpRequest) -> HttpConnectorFuture {
        let stall = self.stall;
        let service_works = request.method() == "POST" || request.headers().contains_key("x-amz-copy-source");
        let patience = if service_works { stall * SERVICE_WORKS } else { stall };
        let sent = Arc::new(AtomicU64::new(0));
        if let Some(length) = request.body().content_length().filter(|length| *length > 0) {
            let inner = std::mem::replace(request.body_mut(), SdkBody::taken());
            let counted = Counted { inner, piece: Bytes::new(), left: length, sent: sent.clone() };
            *request.body_mut() = SdkBody::from_body_1_x(counted);
        }
        let answer = self.inner.call(request);
        HttpConnectorFuture::new(async move {
            let mut answer = std::pin::pin!(answer);
            let mut seen = 0;
            let response = loop {
                match tokio::time::timeout(patience, &mut answer).await {
                    Ok(response) => break response?,
                    Err(_) => {
                        let now = sent.load(Ordering::Relaxed);
                        if now < seen + LEAST {
                            return Err(ConnectorError::timeout(stalled(patience)));
                        }
                        seen = now;
                    }
                }
            };
            Ok(response.map(|body| SdkBody::from_body_1_x(Incoming::new(body, stall))))
        })
    }
}

/// A body on its way out.
struct Counted {
    inner: SdkBody,
    piece: Bytes,
    left: u64,
    sent: Arc<AtomicU64>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.piece.is_empty() {
            match std::task::ready!(Pin::new(&mut this.inner).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.piece = data,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                other => return Poll::Ready(other),
            }
        }
        let piece = this.piece.split_to(PIECE.min(this.piece.len()));
        this.left = this.left.saturating_sub(piece.len() as u64);
        this.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// A body on its way in. Time counts only while somebody waits for it.
struct Incoming {
    inner: SdkBody,
    stall: Duration,
    deadline: Pin<Box<Sleep>>,
    /// Bytes since the deadline was set.
    moved: u64,
    /// When the last piece was handed on.
    paused: Option<Instant>,
}

impl Incoming {
    fn new(inner: SdkBody, stall: Duration) -> Self {
        Self { inner, stall, deadline: Box::pin(tokio::time::sleep(stall)), moved: 0, paused: Some(Instant::now()) }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Some(paused) = this.paused.take() {
            let now = Instant::now();
            let until = if this.moved >= LEAST { now + this.stall } else { this.deadline.deadline() + (now - paused) };
            this.moved = if this.moved >= LEAST { 0 } else { this.moved };
            this.deadline.as_mut().reset(until);
        }
        match Pin::new(&mut this.inner).poll_frame(context) {
            Poll::Ready(frame) => {
                if let Some(Ok(frame)) = &frame
                    && let Some(data) = frame.data_ref()
                {
                    this.moved += data.len() as u64;
                }
                this.paused = Some(Instant::now());
                Poll::Ready(frame)
            }
            Poll::Pending => this.deadline.as_mut().poll(context).map(|()| Some(Err(stalled(this.stall)))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        Body::size_hint(&self.inner)
    }
}
