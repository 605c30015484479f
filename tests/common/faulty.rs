//! A proxy before an S3 service, in this process, that fails as it is told to.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::CONTENT_LENGTH;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::raw::Endpoint;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// This status, with this code of S3's, and the service never sees the request.
    Refuse(u16, &'static str),
    /// The service does it; then the connection breaks before the answer.
    LoseAnswer,
    /// The connection breaks in the middle of the answer's body.
    BreakBody,
    /// The answer's body ends early, and its header agrees.
    ShortenBody,
    /// A byte of the answer's body is another.
    CorruptBody,
    /// A byte of the request's body is another.
    CorruptRequest,
    /// Half of the answer's body comes, and then nothing more.
    Stall,
    /// Nothing happens before `release`.
    Hold,
}

/// What is asked.
pub struct Asked<'a> {
    pub method: &'a Method,
    pub path: &'a str,
    pub query: &'a str,
    /// Requests before this one.
    pub before: u64,
    pub length: usize,
}

impl Asked<'_> {
    /// Is it about objects of this tree, and not about the driver's own?
    pub fn is_about(&self, prefix: &str) -> bool {
        self.path.contains(prefix)
    }

    pub fn writes(&self) -> bool {
        [Method::PUT, Method::POST].contains(self.method)
    }
}

type Rule = Arc<dyn Fn(&Asked) -> Fault + Send + Sync>;
type Body = BoxBody<Bytes, std::io::Error>;

/// The proxy. Gone with the value.
pub struct Faulty {
    pub url: String,
    shared: Arc<Shared>,
    port: u16,
    serving: Option<JoinHandle<()>>,
    // Dropped last.
    runtime: Option<Runtime>,
}

struct Shared {
    upstream: String,
    rule: Mutex<Rule>,
    count: Mutex<u64>,
    /// Of each fault but `None`: how often.
    faults: Mutex<u64>,
    /// Counts releases of what is held, and tells connections to end.
    released: watch::Sender<u64>,
    down: watch::Sender<bool>,
}

impl Faulty {
    pub fn start(upstream: &Endpoint) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            upstream: upstream.url.strip_prefix("http://").unwrap().trim_end_matches('/').to_owned(),
            rule: Mutex::new(Arc::new(|_| Fault::None)),
            count: Mutex::new(0),
            faults: Mutex::new(0),
            released: watch::Sender::new(0),
            down: watch::Sender::new(false),
        });
        let serving = runtime.spawn(accept(listener, shared.clone()));
        Self { url: format!("http://127.0.0.1:{port}"), shared, port, serving: Some(serving), runtime: Some(runtime) }
    }

    /// From now on.
    pub fn rule(&self, rule: impl Fn(&Asked) -> Fault + Send + Sync + 'static) {
        *self.shared.rule.lock().unwrap() = Arc::new(rule);
    }

    /// No more faults, and what was held goes on.
    pub fn heal(&self) {
        self.rule(|_| Fault::None);
        self.shared.released.send_modify(|count| *count += 1);
    }

    /// How many requests met a fault so far.
    pub fn faults(&self) -> u64 {
        *self.shared.faults.lock().unwrap()
    }

    /// Nobody listens any more, and all connections are broken.
    pub fn down(&mut self) {
        self.shared.down.send_replace(true);
        let serving = self.serving.take().unwrap();
        serving.abort();
        let _ = self.runtime.as_ref().unwrap().block_on(serving);
    }

    pub fn up(&mut self) {
        self.shared.down.send_replace(false);
        let listener = self.runtime.as_ref().unwrap().block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(([127, 0, 0, 1], self.port).into()).unwrap();
            socket.listen(1024).unwrap()
        });
        self.serving = Some(self.runtime.as_ref().unwrap().spawn(accept(listener, self.shared.clone())));
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.heal();
        self.runtime.take().unwrap().shutdown_background();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let shared = shared.clone();
        tokio::spawn(async move {
            let mut down = shared.down.subscribe();
            let service = service_fn(|request| answer(shared.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                _ = down.wait_for(|down| *down) => {}
            }
        });
    }
}

/// An error closes the connection without an answer.
async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, std::io::Error> {
    let broken = || std::io::Error::other("broken on purpose");
    let (parts, body) = request.into_parts();
    let mut sent = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let before = {
        let mut count = shared.count.lock().unwrap();
        *count += 1;
        *count - 1
    };
    // Before the rule is read: a release in between is not to be missed.
    let mut released = shared.released.subscribe();
    let rule = shared.rule.lock().unwrap().clone();
    let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
    let fault = rule(&Asked { method: &parts.method, path, query, before, length: sent.len() });
    if fault != Fault::None {
        *shared.faults.lock().unwrap() += 1;
    }
    match fault {
        Fault::Refuse(status, code) => {
            let text =
                format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>on purpose</Message></Error>");
            return Ok(Response::builder().status(status).body(whole(text.into())).unwrap());
        }
        Fault::Hold => {
            let _ = released.changed().await;
        }
        Fault::CorruptRequest if !sent.is_empty() => sent = corrupted(&sent),
        _ => {}
    }
    let mut answer = forward(&shared.upstream, Request::from_parts(parts, Full::new(sent))).await?;
    if fault == Fault::LoseAnswer {
        return Err(broken());
    }
    if ![Fault::BreakBody, Fault::ShortenBody, Fault::CorruptBody, Fault::Stall].contains(&fault)
        || !answer.status().is_success()
    {
        return Ok(answer);
    }
    let body = std::mem::replace(answer.body_mut(), whole(Bytes::new())).collect().await?.to_bytes();
    let half = body.slice(..body.len() / 2);
    *answer.body_mut() = match fault {
        _ if body.is_empty() => whole(body),
        Fault::CorruptBody => whole(corrupted(&body)),
        Fault::ShortenBody => {
            answer.headers_mut().insert(CONTENT_LENGTH, half.len().into());
            whole(half)
        }
        Fault::Stall => {
            let first = futures_util::stream::iter([Ok(Frame::data(half))]);
            BodyExt::boxed(StreamBody::new(first.chain(futures_util::stream::pending())))
        }
        _ => {
            // A channel, since a body that is sent on has to be Sync. A moment between: the half is to be on its way.
            let (sender, receiver) = half_a_body(half, broken);
            tokio::spawn(sender);
            receiver
        }
    };
    Ok(answer)
}

/// Half a body, and then an error; and what has to run for that.
fn half_a_body(
    half: Bytes,
    broken: impl Fn() -> std::io::Error + Send + 'static,
) -> (impl Future<Output = ()> + Send, Body) {
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    let send = async move {
        let _ = sender.send(Ok(Frame::data(half))).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        let _ = sender.send(Err(broken())).await;
    };
    (send, BodyExt::boxed(StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receiver))))
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed()
}

fn corrupted(bytes: &Bytes) -> Bytes {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x20;
    bytes.into()
}

async fn forward(upstream: &str, request: Request<Full<Bytes>>) -> Result<Response<Body>, std::io::Error> {
    let stream = TcpStream::connect(upstream).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
    tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(std::io::Error::other)?;
    Ok(answer.map(|body| body.map_err(std::io::Error::other).boxed()))
}
