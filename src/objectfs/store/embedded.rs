//! An S3 server in this process, on a folder: for the quick start and for tests, where no service is at hand.
//!
//! `s3s` speaks the protocol (signatures, XML, chunked bodies). Its companion `s3s-fs` is not used: it keeps objects at the
//! paths of their keys, so a key and keys below it exclude each other, it lists without etags, forgets nothing of a deleted
//! object's metadata, cannot hold the metadata of long keys, and knows no conditions. So the storage is ours: bodies are files
//! with numbers for names, and a record beside them says all about an object. Records are in memory while it runs.
//!
//! It is no service for data that matters: it waits for no disk, uploads that were not finished are forgotten when it ends,
//! and one process at a time may have a folder. All requests have to be signed.

mod calls;
mod disk;

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::objectfs::settings::Credentials;

/// A running server. It ends, connections and all, when this is dropped.
pub struct Handle(JoinHandle<()>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves a folder, which is made if missing, at an address (port 0: a free one, which is returned).
///
/// # Errors
/// What the folder or the socket says.
pub async fn serve(folder: &Path, address: SocketAddr, credentials: &Credentials) -> io::Result<(SocketAddr, Handle)> {
    let disk = disk::Disk::open(folder)?;
    let mut builder = S3ServiceBuilder::new(calls::Calls(disk));
    let Credentials { access_key, secret_key, .. } = credentials.clone();
    builder.set_auth(SimpleAuth::from_single(access_key, secret_key));
    let service = builder.build();
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Too many open files, say.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            };
            while connections.try_join_next().is_some() {}
            let _ = stream.set_nodelay(true);
            let mut http = hyper::server::conn::http1::Builder::new();
            let connection = http.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service.clone());
            connections.spawn(async move {
                let _ = connection.await;
            });
        }
    });
    Ok((address, Handle(task)))
}
